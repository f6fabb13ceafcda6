# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch>=2.4.0", "gymnasium[classic-control]>=1.0.0", "tyro>=1.0.16", "tensorboard>=2.20.0",
#   "tqdm>=4.66.0",
# ]
# ///
"""TD-MPC2 for flat observations and continuous actions.

Paper    Hansen, Su, Wang (2024), "TD-MPC2: scalable, robust world models for continuous control".
Idea     Learn a model of the world, and plan in it before each step. The model does not foresee
         observations: its state z need only hold what rewards and values depend on.

             z  = h(x)             latent state of observation x
             z' = d(z, a)          the next one after action a
             R(z, a), c(z)         reward; whether the episode goes on
             Q_k(z, a), p(z)       C critics; a policy

         It learns from sequences of H steps. z_0 is seen, and all further z_t are foreseen:

             z_0 = h(x_0)          z_{t+1} = d(z_t, a_t)          z' = h(x_{t+1}), as it is seen
             y_t     = r_t + gamma * min_k Q_target,k(z', p(z'))  or r_t, if the episode terminated;
                                                                  k: two critics, drawn anew
             L_model = rho^t * (20 * (z_{t+1} - sg z')^2 + 0.1 * CE(r_t, R(z_t, a_t))
                                + 0.1 * mean_k CE(y_t, Q_k(z_t, a_t))) + CE(went on, c(z_{t+1}))
             L_p     = -rho^t * (mean_k Q_k(z_t, p(z_t)) / D + ent_coef * entropy of p(.|z_t))

         sg stops the gradient, rho < 1 trusts the first steps most. CE is the cross-entropy:
         rewards and values are learned as categories, the numbers symexp(-10) to symexp(10). D, how
         far Q spreads, is its 95th less its 5th percentile at t = 0, at least 1, averaged over the
         past. Groups of 8 numbers in z are probabilities, so that z can neither grow nor shrink.
         To act, model-predictive path integral control (MPPI) looks for the H actions with the most
         reward and value after them. P plans come from p, the others from a Gaussian, which is then
         fitted to the E best of all, weighted by e^(value / 2); and so on for some rounds. One of
         the last E is drawn by its weight, and its first action taken, with noise. The next search
         begins with these means, moved on by one step.
Differs  Small networks, small batches and few plans, for a CPU, and a larger learning rate. No
         dropout; SiLU, which CPUs compute faster than Mish. One Adam for all networks. All critics,
         not two, count in plans and in L_p; after a plan, p takes its mean action. Categories are
         spaced by symexp, as in DreamerV3. Sequences are cut at an episode's end. Evaluation takes
         the Gaussian's mean. At a time limit, y counts the rewards that would have followed (it
         bootstraps). load_policy's policy keeps its last plan: load it anew for each episode.
Shapes   N environments; B sequences of a batch, H steps of each; O numbers of an observation; K of
         an action; Z of a latent state; C critics; S plans of a round, P of them p's, E the best.
Run      python tdmpc2_continuous.py
Expect   Return over 20 episodes, mean over seeds 1 to 5 (worst to best seed), and median wall time
         with start-up and evaluation, on one core of an AMD EPYC:
             Pendulum-v1    -190.1 (-290.1 to -116.8)   5k steps, 230 s
         The mean is low because in a few episodes the pole never comes up.
"""

import contextlib
import ctypes
import inspect
import json
import math
import os
import re
import shlex
import signal
import sys
import threading
import time
import zipfile
from collections import deque
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass, make_dataclass, replace
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Annotated, NamedTuple, get_type_hints

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from filelock import FileLock
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from tqdm import tqdm

SCRIPT = "tdmpc2_continuous"  # named in checkpoints and messages
LOG_FREQUENCY = 1_000  # steps between points of the losses
LOG_STD_LIMITS = -10, 2  # of the policy's Gaussian before tanh
GROUP = 8  # numbers of a latent state that add up to 1
NUM_BINS, LARGEST = 101, 10.0  # categories of rewards and returns; their largest symlog
DEVIATION_BOUNDS = 0.05, 2.0  # of the Gaussian that plans are drawn from; it begins with the larger
ENCODER_RATE = 0.3  # learning rate of the encoder, as a share of that of the others
SPREAD_STEP = 0.01  # step of D towards the spread of a batch

# Argument types with their bounds.
Steps = Annotated[int, 1, 10**12]
Frequency = Annotated[int, 0, 10**12]  # interval in steps; 0: never
Size = Annotated[int, 1, 10**8]
Count = Annotated[int, 1, 10**6]
SmallCount = Annotated[int, 1, 4096]
Fraction = Annotated[float, 0, 1]
Positive = Annotated[float, 1e-30, 1e30]
Weight = Annotated[float, 0, 1e30]


@dataclass(frozen=True)
class Args:
    env_id: str = "Pendulum-v1"  # Gymnasium environment, or my_module:MyEnv-v0
    env_kwargs: str = "{}"  # of the environment, as JSON: '{"is_slippery": false}'
    seed: Annotated[int, 0, 2**63 - 1] = 1  # of all random numbers in the run
    total_timesteps: Steps = 5_000  # environment steps to train for, at least
    num_envs: SmallCount = 4  # parallel environments (N)

    learning_rate: Positive = 1e-3  # step size of the optimizer
    buffer_size: Size = 1_000_000  # transitions in the replay buffer
    gamma: Fraction = 0.975  # discount factor
    tau: Fraction = 0.01  # step of the target network towards the Q-network; 1: a copy
    num_sequences: Count = 64  # sequences in a minibatch (B)
    learning_starts: Steps = 500  # environment steps before the first update
    train_frequency: Steps = 1  # environment steps between updates
    gradient_steps: Count = 1  # gradient steps in an update
    max_grad_norm: Weight = 20.0  # largest norm of the gradient; 0: not clipped
    hidden_size: SmallCount = 64  # units in each of the two hidden layers
    latent_size: SmallCount = 32  # numbers in a latent state, a multiple of 8 (Z)
    num_critics: SmallCount = 5  # critics (C)
    consistency_coef: Weight = 20.0  # weight of the error of latent states in the loss
    reward_coef: Weight = 0.1  # weight of the error of rewards in the loss
    value_coef: Weight = 0.1  # weight of the error of values in the loss
    rho: Fraction = 0.5  # weight of a step in the loss, relative to the step before it
    ent_coef: Weight = 1e-4  # weight of the entropy in the loss
    plan_steps: SmallCount = 3  # steps of a plan, and of a sequence (H)
    num_plans: SmallCount = 64  # plans in a round (S)
    num_policy_plans: SmallCount = 4  # of them, how many the policy makes (P)
    num_elites: SmallCount = 8  # best plans of a round, to which the Gaussian is fitted (E)
    num_rounds: SmallCount = 6  # rounds of the search for an action
    inverse_temperature: Weight = 0.5  # of the best plans' weights: 0 makes them equal

    exp_name: str = SCRIPT  # part of the name of the run's folder
    runs_dir: str = "runs"  # where the folders of runs are
    device: str = "cpu"  # cpu, cuda, cuda:1, mps
    compile: bool = False  # compile the gradient steps: 10 s at first, pays after a minute
    num_threads: Annotated[int, 0, 1024] = 1  # CPU threads of PyTorch; 0: one per core
    checkpoint_frequency: Frequency = 20_000  # steps between checkpoints; 0: only first and last
    eval_frequency: Frequency = 0  # steps between evaluations while training; 0: only at the end
    eval_episodes: Count = 20  # episodes of one evaluation
    capture_video: bool = False  # record the first episode of the last evaluation, as episode.gif
    resume: str | None = None  # folder of a run to resume; other flags replace the saved ones
    evaluate: str | None = None  # folder of a run, or its best.pt, to evaluate without training

    def __post_init__(self) -> None:
        check(self)
        if self.latent_size % GROUP != 0:
            raise ValueError(f"--latent-size must be a multiple of {GROUP}")
        if self.num_critics < 2:
            raise ValueError("--num-critics must be at least 2")
        if self.num_policy_plans >= self.num_plans:
            raise ValueError("--num-policy-plans must be less than --num-plans")
        if self.num_elites > self.num_plans:
            raise ValueError("--num-elites must be at most --num-plans")
        if self.buffer_size < self.learning_starts:
            raise ValueError("--buffer-size must be at least --learning-starts")
        if self.learning_starts >= self.total_timesteps:
            raise ValueError("--learning-starts must be less than --total-timesteps")


# ---- Environment and network ---------------------------------------------------------------------


def make_env(args: Args, render_mode: str | None = None) -> gym.Env:
    """One environment with flat observations and flat, bounded actions."""
    env = make_flat_env(args, render_mode)
    space = env.action_space
    flat = isinstance(space, gym.spaces.Box) and len(space.shape) == 1
    if not (flat and space.dtype.kind == "f"):
        raise UsageError(f"needs a flat Box of float actions; {args.env_id} has {space}")
    if max(abs(space.low).max(), abs(space.high).max()) > 1e6:  # also inf, or the largest float
        raise UsageError(f"needs actions with bounds; {args.env_id} has {space}")
    return env


def mlp(inputs: int, hidden_size: int, outputs: int) -> nn.Sequential:
    """A network with two hidden layers, each with a norm, which keeps its units on one scale."""
    return nn.Sequential(
        nn.Linear(inputs, hidden_size), nn.LayerNorm(hidden_size), nn.SiLU(),
        nn.Linear(hidden_size, hidden_size), nn.LayerNorm(hidden_size), nn.SiLU(),
        nn.Linear(hidden_size, outputs),
    )  # fmt: skip


class Critics(nn.Module):
    """Q_1 to Q_C, as logits of categories."""

    def __init__(self, inputs: int, hidden_size: int, num_critics: int) -> None:
        super().__init__()
        self.networks = nn.ModuleList(
            mlp(inputs, hidden_size, NUM_BINS) for _ in range(num_critics)
        )
        for network in self.networks:  # so that the first predictions are 0
            nn.init.zeros_(network[-1].weight)
            nn.init.zeros_(network[-1].bias)

    def forward(self, latents: Tensor, actions: Tensor) -> Tensor:
        """Latent states (..., Z) and actions (..., K) -> logits (C, ..., bins)."""
        inputs = torch.cat([latents, actions], dim=-1)
        return torch.stack([network(inputs) for network in self.networks])


class Agent(nn.Module):
    """World model, policy and critics. Actions from -1 to 1 are scaled to low and high (K,)."""

    def __init__(self, obs_size: int, low: np.ndarray, high: np.ndarray, args: Args) -> None:
        super().__init__()
        self.register_buffer("low", torch.tensor(low))
        self.register_buffer("high", torch.tensor(high))
        hidden, latent, inputs = args.hidden_size, args.latent_size, args.latent_size + len(low)
        self.encoder = nn.Sequential(mlp(obs_size, hidden, latent), nn.LayerNorm(latent))
        self.dynamics = nn.Sequential(mlp(inputs, hidden, latent), nn.LayerNorm(latent))
        self.rewards, self.goes_on = mlp(inputs, hidden, NUM_BINS), mlp(latent, hidden, 1)
        nn.init.zeros_(self.rewards[-1].weight)  # so that the first predictions are 0
        nn.init.zeros_(self.rewards[-1].bias)
        self.actor = mlp(latent, hidden, 2 * len(low))
        self.critics = Critics(inputs, hidden, args.num_critics)
        self.register_buffer("spread", torch.ones(()))  # D
        self.state = None  # of the episodes that `play` plays; no part of the checkpoint

    def encode(self, obs: Tensor) -> Tensor:
        """Latent states of observations: (..., O) -> (..., Z)."""
        return to_simplices(self.encoder(obs))

    def advance(self, latents: Tensor, actions: Tensor) -> Tensor:
        """The next latent states: (..., Z), (..., K) -> (..., Z)."""
        return to_simplices(self.dynamics(torch.cat([latents, actions], dim=-1)))

    def reward(self, latents: Tensor, actions: Tensor) -> Tensor:
        """Logits of the categories of rewards: (..., Z), (..., K) -> (..., bins)."""
        return self.rewards(torch.cat([latents, actions], dim=-1))

    def policy(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Latent states (..., Z) -> means and log deviations before tanh, (..., K) each."""
        means, numbers = self.actor(latents).chunk(2, dim=-1)
        low, high = LOG_STD_LIMITS
        return means, low + (high - low) / 2 * (numbers.tanh() + 1)


def make_network(args: Args, envs: "Envs") -> Agent:
    """An agent, which learns a model of these environments, with the bounds of their actions."""
    return Agent(envs.obs.shape[1], envs.action_space.low, envs.action_space.high, args)


# ---- The algorithm -------------------------------------------------------------------------------


def to_simplices(numbers: Tensor) -> Tensor:
    """Makes each group of 8 numbers probabilities (SimNorm, section 3.1): (..., Z) -> (..., Z)."""
    return numbers.unflatten(-1, (-1, GROUP)).softmax(-1).flatten(-2)


def symlog(x: Tensor) -> Tensor:
    """sign(x) * ln(|x| + 1): large numbers become small, small ones stay as they are."""
    return x.sign() * x.abs().log1p()


def symexp(x: Tensor) -> Tensor:
    """The inverse of symlog."""
    return x.sign() * x.abs().expm1()


def bins(device: torch.device) -> Tensor:
    """The numbers for which the categories stand."""
    return symexp(torch.linspace(-LARGEST, LARGEST, NUM_BINS, device=device))


def two_hot(numbers: Tensor) -> Tensor:
    """Shares of the two categories beside each number, of which it is the mean: (...) -> (..., C).

    Beyond the last category, a number counts as that.
    """
    places = bins(numbers.device)
    numbers = numbers.clamp(-places[-1], places[-1])
    right = torch.searchsorted(places, numbers).clamp(1, NUM_BINS - 1)  # also if it is NaN
    left_place, right_place = places[right - 1], places[right]
    share = ((numbers - left_place) / (right_place - left_place))[..., None]
    left_hot, right_hot = (nn.functional.one_hot(i, NUM_BINS) for i in (right - 1, right))
    return left_hot * (1 - share) + right_hot * share


def expected(logits: Tensor) -> Tensor:
    """The mean of the categories: logits (..., C) -> (...)."""
    return logits.softmax(-1) @ bins(logits.device)


def cross_entropy(target: Tensor, logits: Tensor) -> Tensor:
    """-sum of target * log softmax(logits), over the last dimension: two of (B, C) -> (B,)."""
    return -(target * logits.log_softmax(-1)).sum(-1)


def draw(probs: Tensor, numbers: Tensor) -> Tensor:
    """A class from each row: probabilities (..., C), uniform random numbers (...) -> (...)."""
    chosen = (probs.cumsum(-1) <= numbers[..., None]).sum(-1)
    return chosen.clamp(max=probs.shape[-1] - 1)  # if by rounding they add up to less than 1


def sample_actions(means: Tensor, log_std: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Actions a = tanh(u), u = mean + deviation * noise, and log pi(a|s), in nats (Haarnoja et
    al., appendix C): three of (..., K) -> (..., K), (...).

    It is the density of a in (-1, 1): that of u divided by the slope of tanh, 1 - tanh(u)^2, which
    is 4 / (e^u + e^-u)^2. In this form its logarithm is exact also where tanh(u) rounds to 1.
    """
    u = means + log_std.exp() * noise
    log_density = -noise.square() / 2 - log_std - math.log(2 * math.pi) / 2
    log_slope = 2 * (math.log(2) - u - F.softplus(-2 * u))
    return u.tanh(), (log_density - log_slope).sum(-1)


def to_bounds(agent: Agent, actions: np.ndarray) -> np.ndarray:
    """Scales from -1 and 1 to the bounds of the environment: (N, K) -> (N, K)."""
    if not np.isfinite(actions).all():
        raise UsageError("an action is not finite: try a lower --learning-rate")
    low, high = agent.low.cpu().numpy(), agent.high.cpu().numpy()
    return (low + (actions + 1) / 2 * (high - low)).clip(low, high)  # against rounding


def plan_values(agent: Agent, latents: Tensor, actions: Tensor, args: Args) -> Tensor:
    """What the model expects of M plans: discounted rewards, then the value (section 3.2).

    Latent states (M, Z) where they begin, actions (H, M, K) -> (M,).
    """
    total, discount = 0.0, torch.ones(len(latents), device=latents.device)
    for action in actions:
        total = total + discount * expected(agent.reward(latents, action))
        latents = agent.advance(latents, action)
        discount = discount * args.gamma * (agent.goes_on(latents).squeeze(1) > 0)
    last_action = agent.policy(latents)[0].tanh()
    return total + discount * expected(agent.critics(latents, last_action)).mean(0)


def policy_plans(agent: Agent, latents: Tensor, noise: Tensor) -> Tensor:
    """M plans of the policy, from the states (M, Z) on, by noise (H, M, K) -> (H, M, K)."""
    actions = []
    for step_noise in noise:
        actions.append(sample_actions(*agent.policy(latents), step_noise)[0])
        latents = agent.advance(latents, actions[-1])
    return torch.stack(actions)


def fit(
    actions: Tensor, values: Tensor, num_elites: int, inverse_temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A Gaussian of the E best plans, weighted by e^(inverse_temperature * value) (section 3.2).

    Actions (H, N, S, K), values (N, S) -> means and standard deviations (H, N, K), the best plans
    (H, N, E, K), their weights (N, E), which add up to 1.
    """
    best, which = values.topk(num_elites, dim=1)
    weights = (inverse_temperature * best).softmax(1)
    which = which[None, :, :, None].expand(len(actions), -1, -1, actions.shape[3])
    elites = actions.gather(2, which)
    shares = weights[None, :, :, None]
    means = (shares * elites).sum(2)
    variances = (shares * (elites - means[:, :, None]).square()).sum(2)
    return means, variances.sqrt().clamp(*DEVIATION_BOUNDS), elites, weights


class Chance(NamedTuple):
    """Random numbers for a step of N environments."""

    policy: Tensor  # standard normal, for the policy's plans, (H, N, P, K)
    plans: Tensor  # standard normal, for the other plans of each round, (rounds, H, N, S - P, K)
    choice: Tensor  # uniform from 0 to 1, for one of the best plans, (N,)
    action: Tensor  # standard normal, for its first action, (N, K)


def draw_chance(num_envs: int, action_size: int, args: Args) -> Chance:
    """The numbers for one step."""
    shape = args.plan_steps, num_envs
    others = args.num_plans - args.num_policy_plans
    return Chance(
        torch.randn(*shape, args.num_policy_plans, action_size),
        torch.randn(args.num_rounds, *shape, others, action_size),
        torch.rand(num_envs), torch.randn(num_envs, action_size),
    )  # fmt: skip


@torch.no_grad()
def plan(
    agent: Agent, obs: Tensor, means: Tensor, chance: Chance, args: Args
) -> tuple[Tensor, Tensor]:
    """Model-predictive path integral control (section 3.2): from observations (N, O) and the means
    (H, N, K) of the plans before -> actions (N, K), and the means (H, N, K) of the new plans.
    """
    num_envs, latents = len(obs), agent.encode(obs)
    starts = latents.repeat_interleave(args.num_policy_plans, 0)
    own = compiled(policy_plans, args)(agent, starts, chance.policy.flatten(1, 2))
    own = own.view_as(chance.policy)
    starts = latents.repeat_interleave(args.num_plans, 0)
    means = torch.cat([means[1:], torch.zeros_like(means[:1])])  # a step has passed
    deviations = torch.full_like(means, DEVIATION_BOUNDS[1])
    values_of = compiled(plan_values, args)
    for noise in chance.plans:
        drawn = (means[:, :, None] + deviations[:, :, None] * noise).clamp(-1, 1)
        plans = torch.cat([own, drawn], dim=2)  # (H, N, S, K)
        values = values_of(agent, starts, plans.flatten(1, 2), args).view(num_envs, -1)
        means, deviations, elites, weights = fit(
            plans, values, args.num_elites, args.inverse_temperature
        )
    chosen = draw(weights, chance.choice)
    action = elites[0, torch.arange(num_envs), chosen]
    return (action + deviations[0] * chance.action).clamp(-1, 1), means


def td_target(rewards: Tensor, terminated: Tensor, next_q: Tensor, gamma: float) -> Tensor:
    """y = r + gamma * min_k Q_target,k(z', p(z')), or r if terminated (section 3.1), over those
    critics that count: two of (...), (critics, ...) -> (...).
    """
    return rewards + gamma * next_q.min(0).values * ~terminated


@torch.no_grad()
def update_target(target_network: nn.Module, q_network: nn.Module, tau: float) -> None:
    """Each weight of the target network <- (1 - tau) * itself + tau * the Q-network's."""
    for target, source in zip(target_network.parameters(), q_network.parameters()):
        target.lerp_(source, tau)


class Batch(NamedTuple):
    """B sequences of H steps. Column b of each:"""

    obs: Tensor  # observations at the steps and after the last one, (H + 1, B, O)
    actions: Tensor  # action from -1 to 1, (H, B, K)
    rewards: Tensor  # reward, (H, B)
    terminated: Tensor  # whether the episode terminated; False if truncated, (H, B)
    valid: Tensor  # False for what is beyond the episode's end, (H, B)


def model_loss(
    agent: Agent, target_critics: nn.Module, batch: Batch, noise: Tensor, pair: Tensor, args: Args
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The loss of the model and its critics (section 3.1) -> loss, latents (H, B, Z), metrics.

    noise is standard normal, (H, B, K), for p(z'); pair, two critics that count in the target (2,).
    """
    with torch.no_grad():  # the targets are constants
        seen = agent.encode(batch.obs[1:])
        next_actions, _ = sample_actions(*agent.policy(seen), noise)
        next_q = expected(target_critics(seen, next_actions)[pair])
        target = two_hot(td_target(batch.rewards, batch.terminated, next_q, args.gamma))
    latents = [agent.encode(batch.obs[0])]
    for actions in batch.actions:
        latents.append(agent.advance(latents[-1], actions))
    latents, foreseen = torch.stack(latents[:-1]), torch.stack(latents[1:])
    value_logits = agent.critics(latents, batch.actions)
    goes_on = agent.goes_on(foreseen).squeeze(-1)

    consistency = (foreseen - seen).square().mean(-1)
    reward_error = cross_entropy(two_hot(batch.rewards), agent.reward(latents, batch.actions))
    value_error = cross_entropy(target, value_logits).mean(0)
    errors = args.consistency_coef * consistency + args.reward_coef * reward_error
    errors = errors + args.value_coef * value_error
    continue_error = F.binary_cross_entropy_with_logits(
        goes_on, (~batch.terminated).float(), reduction="none"
    )
    loss = (step_weights(batch.valid, args.rho) * errors + batch.valid * continue_error).mean()
    metrics = {
        "losses/consistency_loss": mean_of_valid(consistency, batch.valid),
        "losses/reward_loss": mean_of_valid(reward_error, batch.valid),
        "losses/value_loss": mean_of_valid(value_error, batch.valid),
        "losses/continue_loss": mean_of_valid(continue_error, batch.valid),
    }
    return loss, latents.detach(), metrics


def mean_of_valid(errors: Tensor, valid: Tensor) -> Tensor:
    """The mean over the valid steps, for the log: two of (H, B) -> scalar."""
    return (errors.detach() * valid).sum() / valid.sum()


def step_weights(valid: Tensor, rho: float) -> Tensor:
    """rho^t, or 0 for steps beyond the end of an episode: (H, B) -> (H, B)."""
    powers = rho ** torch.arange(len(valid), device=valid.device)
    return powers[:, None] * valid


def policy_loss(
    agent: Agent, latents: Tensor, valid: Tensor, noise: Tensor, args: Args
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of the policy (section 3.1) in latent states (H, B, Z) -> loss, metrics.

    noise is standard normal, (H, B, K), for its actions. valid as in a Batch. Moves D, too.
    """
    actions, log_probs = sample_actions(*agent.policy(latents), noise)
    constants = {name: weight.detach() for name, weight in agent.critics.named_parameters()}
    q_values = expected(functional_call(agent.critics, constants, (latents, actions))).mean(0)
    with torch.no_grad():
        low, high = torch.quantile(q_values[0], q_values.new_tensor([0.05, 0.95]))
        agent.spread.lerp_((high - low).clamp(min=1), SPREAD_STEP)
    objective = q_values / agent.spread - args.ent_coef * log_probs
    return -(step_weights(valid, args.rho) * objective).mean(), {
        "losses/q_values": mean_of_valid(q_values, valid),
        "losses/entropy": mean_of_valid(-log_probs, valid),
    }


def compute_gradient(
    agent: Agent, target_critics: nn.Module, batch: Batch, noise: Tensor, pair: Tensor, args: Args
) -> dict[str, Tensor]:
    """The gradients of both losses -> metrics. noise is standard normal, (2, H, B, K)."""
    model, latents, metrics = model_loss(agent, target_critics, batch, noise[0], pair, args)
    policy, others = policy_loss(agent, latents, batch.valid, noise[1], args)
    (model + policy).backward()  # no weight gets a gradient from both
    return metrics | others


def update(
    agent: Agent, target_critics: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch,
    args: Args,
) -> dict[str, Tensor]:  # fmt: skip
    """One gradient step on B sequences -> metrics. The target critics follow."""
    noise = torch.randn(2, *batch.actions.shape).to(batch.obs.device)
    pair = torch.randperm(args.num_critics)[:2].to(batch.obs.device)
    optimizer.zero_grad()
    metrics = compiled(compute_gradient, args)(agent, target_critics, batch, noise, pair, args)
    if args.max_grad_norm > 0:
        nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
    optimizer.step()
    update_target(target_critics, agent.critics, args.tau)
    return metrics


# ---- Memory --------------------------------------------------------------------------------------


class ReplayBuffer:
    """The newest steps of N environments, of which sequences are drawn.

    Each environment has a ring of rows, which lie N apart. A row holds an observation, the action
    that was taken there, and what came of it; the next observation is in the ring's next row. So
    an episode's last observation has a row too, like the newest one, but without an action. Such
    rows are not drawn, and end a sequence. `size` counts them, except for the newest.
    """

    def __init__(self, size: int, num_envs: int, obs_size: int, action_size: int) -> None:
        count = (math.ceil(size / num_envs) + 1) * num_envs
        with as_usage_error(f"--buffer-size {size} does not fit into memory", RuntimeError):
            self.obs, self.actions = torch.zeros(count, obs_size), torch.zeros(count, action_size)
            self.rewards = torch.zeros(count)
            self.terminated, self.acted = torch.zeros(2, count, dtype=torch.bool)
        self.columns = self.obs, self.actions, self.rewards, self.terminated, self.acted
        self.num_envs, self.num_filled = num_envs, 0
        self.rows = np.arange(num_envs)  # where each environment is

    def add(
        self, obs: np.ndarray, actions: np.ndarray, rewards: np.ndarray, next_obs: np.ndarray,
        terminated: np.ndarray, truncated: np.ndarray,
    ) -> None:  # fmt: skip
        """Adds a transition of each environment: (N, O), (N, K), (N,), (N, O), two of (N,)."""
        for column, values in zip(self.columns, (obs, actions, rewards, terminated, True)):
            column.numpy()[self.rows] = values
        self.rows = (self.rows + self.num_envs) % len(self.obs)
        self.obs.numpy()[self.rows], self.acted.numpy()[self.rows] = next_obs, False
        self.num_filled = max(self.num_filled, int(self.rows.max()) + 1)
        skipped = self.num_envs * (terminated | truncated)  # the last observation keeps its row
        self.rows = (self.rows + skipped) % len(self.obs)

    def sample(self, num_sequences: int, num_steps: int) -> Batch:
        """B sequences of H steps. Their first ones are drawn uniformly, with replacement."""
        rows = torch.empty(0, dtype=torch.int64)
        while len(rows) < num_sequences:
            drawn = torch.randint(self.num_filled, (num_sequences,))
            rows = torch.cat([rows, drawn[self.acted[drawn]]])
        later = self.num_envs * torch.arange(num_steps + 1)[:, None]
        rows = (rows[:num_sequences] + later) % len(self.obs)  # (H + 1, B)
        actions, rewards, terminated, acted = (column[rows[:-1]] for column in self.columns[1:])
        return Batch(self.obs[rows], actions, rewards, terminated, acted.cumprod(0).bool())

    def state_dict(self) -> dict:
        """The rows that are filled, for a checkpoint."""
        filled = [column[: self.num_filled].clone() for column in self.columns]
        return {"count": len(self.obs), "rows": torch.tensor(self.rows), "columns": filled}

    def load_state_dict(self, state: dict) -> None:
        """Takes what `state_dict` gave."""
        if state["count"] != len(self.obs):
            raise ValueError("--buffer-size was another")
        self.rows, self.num_filled = state["rows"].numpy().copy(), len(state["columns"][0])
        for column, saved in zip(self.columns, state["columns"], strict=True):
            column[: self.num_filled] = saved


# ---- Training and evaluation ---------------------------------------------------------------------


def train(args: Args) -> "Result":
    """Trains an agent, from the start or from the checkpoint in args.resume."""
    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    envs = Envs(args, args.num_envs, TRAINING)
    agent = make_network(args, envs).to(device)
    target_critics = deepcopy(agent.critics)
    encoder = {"params": agent.encoder.parameters(), "lr": ENCODER_RATE * args.learning_rate}
    others = [w for name, w in agent.named_parameters() if not name.startswith("encoder.")]
    optimizer = torch.optim.Adam([encoder, {"params": others}], lr=args.learning_rate, fused=True)
    shape = args.num_envs, envs.action_space.shape[0]
    buffer = ReplayBuffer(args.buffer_size, args.num_envs, envs.obs.shape[1], shape[1])
    memory = nn.Module()  # of the running episodes, a part of the run
    memory.register_buffer("means", torch.zeros(args.plan_steps, *shape))
    memory = memory.to(device)
    parts = {"target_critics": target_critics, "optimizer": optimizer, "buffer": buffer}
    with Run(args, envs, agent, memory=memory, **parts) as run:
        metrics = {}  # of the last gradient step
        while run.is_running():
            # Act: one step in every environment.
            obs = envs.obs.copy()
            if envs.steps < args.learning_starts:
                actions = torch.empty(shape).uniform_(-1, 1).numpy()
            else:
                chance = Chance(*(part.to(device) for part in draw_chance(*shape, args)))
                rows = torch.from_numpy(obs).to(device)
                actions, memory.means = plan(agent, rows, memory.means, chance, args)
                actions = actions.cpu().numpy()
            next_obs, rewards, terminated, truncated = envs.step(to_bounds(agent, actions))
            buffer.add(obs, actions, rewards, next_obs, terminated, truncated)
            memory.means[:, terminated | truncated] = 0

            # Learn: the gradient steps that are due in these N steps.
            first = max(envs.steps - args.num_envs + 1, args.learning_starts)
            for step in range(first, envs.steps + 1):
                if step % args.train_frequency == 0:
                    for _ in range(args.gradient_steps):
                        batch = buffer.sample(args.num_sequences, args.plan_steps)
                        batch = Batch(*(part.to(device) for part in batch))
                        metrics = update(agent, target_critics, optimizer, batch, args)

            # Log, evaluate, save.
            if run.is_due(LOG_FREQUENCY):
                run.log(metrics)
            if run.is_due(args.eval_frequency):
                run.evaluate()
            if run.is_due(args.checkpoint_frequency):
                run.save()
        return run.finish()


def play(args: Args, agent: Agent, obs: np.ndarray, first: np.ndarray | None = None) -> np.ndarray:
    """How the trained policy is evaluated: observations (N, O) -> the plans' mean actions (N, K).

    It begins with the plans of the last call, but not where `first` (N,): there, an episode begins.
    """
    device = agent.spread.device
    if agent.state is None:
        agent.state = torch.zeros(args.plan_steps, len(obs), len(agent.low), device=device)
    if first is not None:
        agent.state[:, first] = 0
    chance = draw_chance(len(obs), len(agent.low), args)
    chance = Chance(*(part.to(device) for part in chance))
    rows = torch.from_numpy(obs).to(device)
    _, agent.state = plan(agent, rows, agent.state, chance, args)
    return to_bounds(agent, agent.state[0].cpu().numpy())


def evaluate(args: Args, network: nn.Module, gif: Path | None = None) -> tuple[float, float]:
    """Plays args.eval_episodes whole episodes, the same ones each time: mean return and length.

    Uses its own environments, and leaves the random state of the training as it is. Records the
    first episode to the file `gif`, if given. `play` sees all environments, also those that have
    played their episodes: so row i of the memory is always that of environment i.
    """
    num_envs, frames, stride = min(args.num_envs, args.eval_episodes), [], 2
    quota = [len(range(i, args.eval_episodes, num_envs)) for i in range(num_envs)]  # for each
    envs = Envs(args, num_envs, EVALUATION, draw=gif is not None)
    with contextlib.closing(envs), torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.seed)
        envs.reset()
        network.state = None
        while len(which := np.flatnonzero(np.less(envs.episodes, quota))) > 0:
            if gif is not None and envs.episodes[0] == 0 and envs.lengths[0] % stride == 0:
                frames.append(envs.render())
                if len(frames) > MAX_FRAMES:  # faster from now on: every fourth frame, eighth ...
                    frames, stride = frames[::2], 2 * stride
            first = np.equal(envs.lengths, 0)
            envs.step(play(args, network, envs.obs, first)[which], which)
    if gif is not None:
        images = [Image.fromarray(frame).quantize(256, FASTOCTREE) for frame in frames]
        with as_usage_error(f"cannot write {gif}", OSError):
            images[0].save(gif, save_all=True, append_images=images[1:], duration=2000 / envs.fps,
                           loop=0)  # fmt: skip
    _, returns, lengths = np.array(envs.finished).T
    mean, deviation = returns.mean(), returns.std()
    tqdm.write(f"Evaluation: return {mean:.1f} ± {deviation:.1f} over {len(returns)} episodes")
    return float(mean), float(lengths.mean())


# ---- Plumbing: environments, log, checkpoints, command line --------------------------------------

MAX_EPISODE_STEPS = 10_000  # time limit where an environment has none
MAX_FRAMES, FASTOCTREE = 500, Image.Quantize.FASTOCTREE  # of a GIF
TRAINING, EVALUATION = 0, 1  # streams of seeds
TIME = "%Y%m%d-%H%M%S-%f"  # in the name of a run's folder


class UsageError(ValueError):
    """What the user can mend: `main` prints one line."""


@contextlib.contextmanager
def as_usage_error(what: str, *errors: type[Exception]) -> Iterator[None]:
    """Turns these errors into a UsageError."""
    try:
        yield
    except errors as error:
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        raise UsageError(f"{what}: {cause}") from error


class Result(NamedTuple):
    """Of a run. Return and length are means over the evaluation."""

    folder: str
    episodic_return: float
    episodic_length: float
    steps: int
    seconds: float  # of training, without pauses


def check(args: "Args") -> None:
    """Refuses arguments of the wrong type or out of bounds."""
    for name, hint in get_type_hints(type(args), include_extras=True).items():
        flag, value = f"--{name.replace('_', '-')}", getattr(args, name)
        plain = (hint,) if hint in (str, bool) else (str, int, float, bool, type(None))
        if type(value) not in plain:  # a checkpoint could not be read again
            raise ValueError(f"{flag} cannot be of type {type(value).__name__}")
        with as_usage_error(flag, UnicodeError):  # it is not UTF-8
            str(value).encode()
        if hasattr(hint, "__metadata__"):
            kind, (low, high) = hint.__origin__, hint.__metadata__
            if not (isinstance(value, int | kind) and low <= value <= high):
                raise ValueError(f"{flag} must be {kind.__name__}, {low} to {high}, not {value}")
    if args.resume is not None and args.evaluate is not None:
        raise ValueError("--resume and --evaluate exclude each other")


def compiled(function: Callable, args: Args, dynamic: bool = False) -> Callable:
    """With --compile, the function as one graph of fused kernels; the same lines without it.

    It is compiled anew for each new shape; if dynamic, once for all shapes.
    """
    return compile_once(function, dynamic) if args.compile else function


@cache
def compile_once(function: Callable, dynamic: bool) -> Callable:
    """Compiles at the first call."""
    return torch.compile(function, fullgraph=True, dynamic=dynamic)


def make_flat_env(args: Args, render_mode: str | None) -> gym.Env:
    """The environment, with a time limit and flat observations."""
    sys.path.append(os.getcwd())  # my_module may lie where the command was typed
    os.environ["SDL_VIDEODRIVER"] = "dummy"  # drawing needs no screen
    errors = (TypeError, ValueError) if args.env_kwargs != "{}" else ()
    what = f"--env-id {args.env_id!r} with --env-kwargs {args.env_kwargs!r}"
    with as_usage_error(what, gym.error.Error, ImportError, *errors):
        if not re.fullmatch(r"([A-Za-z_][\w.]*:)?[\w/.-]+", args.env_id):
            raise ImportError("this is no name")
        kwargs = json.loads(args.env_kwargs) | ({"render_mode": render_mode} if render_mode else {})
        env = gym.make(args.env_id, disable_env_checker=True, **kwargs)
    if render_mode is not None:
        with as_usage_error(f"--capture-video: {args.env_id} cannot be drawn", Exception):
            env.reset()
            if env.render().shape[2:] != (3,) or env.render().dtype != np.uint8:
                raise ValueError("it does not draw arrays (H, W, 3) of uint8")
    if env.spec.max_episode_steps is None:
        env = gym.wrappers.TimeLimit(env, MAX_EPISODE_STEPS)
    space = env.observation_space
    if not space.is_np_flattenable:
        raise UsageError(f"needs observations of a fixed size; {args.env_id} has {space}")
    flat = isinstance(space, gym.spaces.Box) and len(space.shape) == 1
    return env if flat else gym.wrappers.FlattenObservation(env)


class Envs:
    """N environments, stepped side by side. Where an episode ends, the next one begins.

    Seed and actions determine an episode. A checkpoint holds its number, which gives the seed, and
    its actions so far; `reset` replays them.
    """

    def __init__(self, args: Args, num_envs: int, stream: int, draw: bool = False) -> None:
        modes = ["rgb_array" if draw and i == 0 else None for i in range(num_envs)]
        self.envs = [make_env(args, mode) for mode in modes]
        self.seed, self.stream = args.seed, stream
        self.fps = self.envs[0].metadata.get("render_fps") or 30
        flattened = isinstance(self.envs[0], gym.wrappers.FlattenObservation)
        self.obs_space = (self.envs[0].env if flattened else self.envs[0]).observation_space
        self.action_space = self.envs[0].action_space
        self.first_action = getattr(self.action_space, "start", 0)
        self.obs = np.zeros((num_envs, *self.envs[0].observation_space.shape), np.float32)
        self.steps, self.finished = 0, []  # (step, return, length) of each
        self.episodes = [0] * num_envs  # finished; of the running ones:
        self.returns, self.lengths = [0.0] * num_envs, [0] * num_envs
        self.actions = [[] for _ in self.envs]

    def begin(self, i: int) -> None:
        """Begins an environment's next episode."""
        key = self.stream, i, self.episodes[i]
        (seed,) = np.random.SeedSequence(self.seed, spawn_key=key).generate_state(1).tolist()
        self.obs[i] = np.reshape(self.envs[i].reset(seed=seed)[0], -1)

    def reset(self) -> None:
        """Begins the episodes, and replays the actions of a checkpoint."""
        saved = self.obs.copy()
        for i, env in enumerate(self.envs):
            self.begin(i)
            for action in self.actions[i]:
                self.obs[i] = np.reshape(env.step(action)[0], -1)
        if self.steps > 0 and not np.array_equal(saved, self.obs):
            print("Warning: seed and actions do not repeat an episode. The run goes on, but not "
                  "exactly as if it had not been interrupted.", file=sys.stderr)  # fmt: skip

    def step(self, actions: np.ndarray, which: np.ndarray | None = None) -> tuple[np.ndarray, ...]:
        """One step in all environments, or in the n of `which`: actions (n, ...) -> next_obs
        (n, O), rewards, terminated, truncated (n,). Where an episode ended, next_obs is its last
        observation, and self.obs is the first one of the next.
        """
        which = range(len(self.envs)) if which is None else which
        next_obs = np.empty((len(which), *self.obs.shape[1:]), np.float32)
        rewards = np.empty(len(which), np.float32)
        terminated, truncated = np.empty((2, len(which)), dtype=bool)
        for row, (i, action) in enumerate(zip(which, actions + self.first_action)):
            obs, reward, terminated[row], truncated[row], _ = self.envs[i].step(action)
            next_obs[row] = self.obs[i] = np.reshape(obs, -1)
            numbers = np.asarray(reward)  # it may be an array
            if numbers.size != 1:
                raise UsageError(f"a reward of the environment is not one number: {reward}")
            rewards[row] = reward = numbers.item()
            self.steps += 1
            self.returns[i] += reward
            self.lengths[i] += 1
            self.actions[i].append(action)
            if terminated[row] or truncated[row]:
                self.finished.append((self.steps, self.returns[i], self.lengths[i]))
                self.episodes[i] += 1
                self.returns[i], self.lengths[i], self.actions[i] = 0.0, 0, []
                self.begin(i)
        if not (np.isfinite(next_obs).all() and np.isfinite(rewards).all()):
            raise UsageError("an observation or a reward of the environment is not finite")
        return next_obs, rewards, terminated, truncated

    def render(self) -> np.ndarray:
        return self.envs[0].render()

    def close(self) -> None:
        while self.envs:
            self.envs.pop().close()

    def state_dict(self) -> dict:
        actions = [torch.from_numpy(np.array(actions)) for actions in self.actions]
        counts = {name: getattr(self, name) for name in ("steps", "episodes", "returns", "lengths")}
        return counts | {"actions": actions, "obs": torch.from_numpy(self.obs)}

    def load_state_dict(self, state: dict) -> None:
        if state["obs"].shape != self.obs.shape:
            raise ValueError(f"observations were {tuple(state['obs'].shape)}, {self.obs.shape} now")
        for name, kind in ("episodes", int), ("returns", float), ("lengths", int):
            setattr(self, name, [kind(value) for value in state[name]])
        self.steps = int(state["steps"])
        self.actions = [list(actions.numpy()) for actions in state["actions"]]
        self.obs = state["obs"].numpy()


def available_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def keep_freed_memory() -> None:
    """Makes glibc keep up to 1 GB of freed memory for the next tensors, in this whole process.

    By default it returns large blocks to the system, which clears new pages in each gradient step.
    """
    with contextlib.suppress(AttributeError, TypeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, 2**30)  # M_TRIM_THRESHOLD
        mallopt(-3, 2**30) or mallopt(-3, 2**25)  # M_MMAP_THRESHOLD; older ones allow 32 MB


class Run:
    """Folder, log, progress bar and checkpoints of a training."""

    def __init__(self, args: Args, envs: Envs, network: nn.Module, **parts) -> None:
        self.args, self.envs, self.network = args, envs, network
        self.parts = {"envs": envs, "network": network} | parts
        self.seconds, self.best_return, self.saved_step = 0.0, -math.inf, -1
        self.interrupted, self.recent = False, deque(maxlen=20)  # returns, for the bar
        with contextlib.ExitStack() as stack:
            stack.callback(envs.close)
            stack.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(args.num_threads or available_cores())
            keep_freed_memory()
            torch.backends.cudnn.deterministic = True
            if args.compile:  # fails now, not at the first gradient step
                with as_usage_error("--compile needs PyTorch 2.13 and a C++ compiler", Exception):
                    torch.compiler.reset()  # what other runs of this process have compiled
                    torch._dynamo.config.trace_autograd_ops = True  # for loss.backward()
                    numbers = torch.zeros(8, device=args.device)
                    torch.compile(lambda x: x.sin(), fullgraph=True)(numbers)
            if args.capture_video:  # fails now, not after the training
                Envs(args, 1, EVALUATION, draw=True).close()
            with as_usage_error("cannot write", OSError):  # or it is locked by another process
                new = args.resume is None
                if new:
                    name = f"{args.env_id}__{args.exp_name}__{args.seed}__{datetime.now():{TIME}}"
                    self.folder = Path(args.runs_dir) / re.sub("[/:]", "-", name)
                    self.folder.mkdir(parents=True)
                else:
                    self.folder = checkpoint_path(args.resume).parent
                stack.enter_context(FileLock(self.folder / "lock", blocking=False))
            for part in parts.values():
                if hasattr(part, "open"):
                    part.open(self.folder, args.resume is not None)
                    stack.callback(part.close)
            if args.resume is not None:
                self.load()
            self.old_result = self.find_result()
            if self.old_result is not None:
                self.stack = stack.pop_all()
                return
            envs.reset()
            self.start = time.perf_counter() - self.seconds
            rows = [("argument", "value"), ("-", "-"), *asdict(args).items()]
            table = "\n".join(f"|{name}|{value}|" for name, value in rows)
            with as_usage_error("cannot write the log", OSError):
                self.writer = SummaryWriter(self.folder, purge_step=envs.steps + 1)
                stack.callback(self.close_log)
                self.writer.add_text("hyperparameters", table, envs.steps)
            moves = sys.stderr.isatty() or "ipykernel" in sys.modules
            self.bar = tqdm(initial=envs.steps, total=args.total_timesteps, unit="steps",
                            unit_scale=True, mininterval=0.1 if moves else 30)  # fmt: skip
            stack.callback(self.bar.close)
            if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
                with contextlib.suppress(ValueError):  # not in the main thread
                    signal.signal(signal.SIGINT, self.interrupt)
                    stack.callback(signal.signal, signal.SIGINT, signal.default_int_handler)
            print(f"Training in {self.folder}", flush=True)
            if self.saved_step < 0:
                self.save()
            self.stack = stack.pop_all()

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> None:
        self.stack.close()
        if error is not None:
            command = shlex.join(["python", sys.argv[0], "--resume", str(self.folder)])
            error.add_note(f"Stopped at step {self.envs.steps}. To go on from the checkpoint of "
                           f"step {self.saved_step}:\n{command}")  # fmt: skip

    def interrupt(self, *_: object) -> None:
        """Ctrl-C ends after this iteration; a second one at once."""
        self.interrupted = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def is_running(self) -> bool:
        """Whether there are steps left. After Ctrl-C, saves and stops."""
        if self.interrupted:
            self.save()
            raise KeyboardInterrupt
        self.iteration_start = self.envs.steps
        return self.envs.steps < self.args.total_timesteps

    def is_due(self, frequency: int) -> bool:
        """Whether this iteration passed a multiple of `frequency`; not at the end."""
        passed = frequency > 0 and self.envs.steps // frequency > self.iteration_start // frequency
        return passed and self.envs.steps < self.args.total_timesteps

    def log(self, metrics: dict[str, Tensor | float]) -> None:
        """Writes metrics and finished episodes, and stops at NaN."""
        if metrics:
            speed = self.envs.steps / (time.perf_counter() - self.start)
            metrics = metrics | {"charts/SPS": speed}
        with as_usage_error("cannot write the log", OSError):
            for step, episodic_return, length in self.envs.finished:
                self.writer.add_scalar("charts/episodic_return", episodic_return, step)
                self.writer.add_scalar("charts/episodic_length", length, step)
                self.recent.append(episodic_return)
            for tag, value in metrics.items():
                self.writer.add_scalar(tag, float(value), self.envs.steps)
        self.envs.finished.clear()
        if self.recent:
            self.bar.set_postfix_str(f"return {np.mean(self.recent):.1f}", refresh=False)
        self.bar.update(min(self.envs.steps, self.args.total_timesteps) - self.bar.n)
        numbers = [*metrics.values(), *(w.sum() for w in self.network.state_dict().values())]
        if not all(map(math.isfinite, numbers)):
            raise UsageError("a loss or a weight is not finite: try a lower --learning-rate")

    def save(self) -> None:
        """Writes a checkpoint, which changes nothing in the run."""
        self.log({})
        with as_usage_error("cannot write the log", OSError):
            self.writer.flush()
        seconds = time.perf_counter() - self.start
        state = {"seconds": seconds, "random_state": torch.get_rng_state()}
        state |= {name: part.state_dict() for name, part in self.parts.items()}
        write_checkpoint(self.folder / "checkpoint.pt", self.args, state)
        self.saved_step = self.envs.steps

    def load(self) -> None:
        """Reads the checkpoint, but not the settings of optimizers: they may be new."""
        state = read_checkpoint(self.args.resume)
        with as_usage_error(f"the checkpoint in {self.args.resume} does not fit", Exception):
            self.seconds = float(state["seconds"])
            torch.set_rng_state(state["random_state"])
            for name, part in self.parts.items():
                if isinstance(part, torch.optim.Optimizer):
                    state[name]["param_groups"] = part.state_dict()["param_groups"]
                part.load_state_dict(state[name])
        self.saved_step = self.envs.steps
        (self.folder / "checkpoint.tmp").unlink(missing_ok=True)
        if (self.folder / "best.pt").exists():
            self.best_return = read_checkpoint(self.folder / "best.pt")["return"]

    def evaluate(self, gif: Path | None = None) -> tuple[float, float]:
        """Evaluates, and keeps the best network in best.pt."""
        begun = time.perf_counter()
        mean, length = evaluate(self.args, self.network, gif)
        self.start += time.perf_counter() - begun  # no time of training
        self.log({"eval/episodic_return": mean, "eval/episodic_length": length})
        if mean > self.best_return:
            self.best_return, state = mean, {"network": self.network.state_dict(), "return": mean}
            write_checkpoint(self.folder / "best.pt", self.args, state)
        return mean, length

    def find_result(self) -> Result | None:
        """The result, if the run ended before it was resumed."""
        with contextlib.suppress(OSError, ValueError, TypeError):
            result = Result(**json.loads((self.folder / "result.json").read_text()))
            if result.steps == self.envs.steps >= self.args.total_timesteps:
                return result._replace(folder=str(self.folder))
        return None

    def finish(self) -> Result:
        """Saves, evaluates, writes the result."""
        if self.old_result is not None:
            print("This run has ended. To train it further, give a larger --total-timesteps.")
            return self.old_result
        if self.envs.steps > self.saved_step:
            self.save()
        seconds = time.perf_counter() - self.start
        self.envs.close()
        gif = self.folder / "episode.gif" if self.args.capture_video else None
        mean, length = self.evaluate(gif)
        # Capitals come first in HPARAMS.
        given = {name: value for name, value in asdict(self.args).items() if value is not None}
        row = {"Return": mean, "Script": self.args.exp_name} | given
        summaries = list(hparams(row, {"eval/episodic_return": mean}))
        result = Result(str(self.folder), mean, length, self.envs.steps, seconds)
        with as_usage_error("cannot write the result", OSError):
            if gif is not None:  # add_image would show a still picture
                image = Summary.Image(encoded_image_string=gif.read_bytes(), colorspace=3)
                summaries.append(Summary(value=[Summary.Value(tag="eval/episode", image=image)]))
            for summary in summaries:
                self.writer.file_writer.add_summary(summary, self.envs.steps)
            self.writer.flush()
            (self.folder / "result.json").write_text(json.dumps(result._asdict()))
        return result

    def close_log(self) -> None:
        """On a full disk, this would fail once more."""
        with contextlib.suppress(OSError):
            self.writer.close()


def write_checkpoint(path: Path, args: Args, state: dict) -> None:
    """Writes a new file and renames it, so that one is always whole."""
    new = path.with_suffix(".tmp")
    state = {"script": SCRIPT, "args": asdict(replace(args, resume=None, evaluate=None))} | state
    try:
        with as_usage_error(f"cannot write {path}", OSError, RuntimeError):
            with open(new, "wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


def checkpoint_path(path: str | Path) -> Path:
    """The file itself, or checkpoint.pt in that folder."""
    path = Path(path) / "checkpoint.pt" if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise UsageError(f"there is no checkpoint {str(path)!r}")
    return path


def read_checkpoint(path: str | Path) -> dict:
    """A checkpoint of this script, unchanged since it was written."""
    path = checkpoint_path(path)
    with as_usage_error(f"{path} is no checkpoint of {SCRIPT}.py", Exception):
        if zipfile.ZipFile(path).testzip() is not None:
            raise ValueError("a checksum is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)  # runs no code
        if state["script"] != SCRIPT:
            raise ValueError(f"it is one of {state['script']}.py")
        return state | {"args": Args(**state["args"])}


def load_network(path: str | Path, args: Args | None = None) -> tuple[Args, Envs, nn.Module]:
    """Arguments, environments (closed) and network of a checkpoint."""
    state = read_checkpoint(path)
    args = args or state["args"]
    with contextlib.closing(Envs(args, 1, EVALUATION)) as envs:
        network = make_network(args, envs)
    with as_usage_error(f"{path} does not fit {args.env_id}", Exception):
        network.load_state_dict(state["network"])
    return args, envs, network.to(args.device)


def load_policy(path: str | Path) -> Callable:
    """The policy of a run, or of a best.pt, for `env.step(policy(obs))`."""
    args, envs, network = load_network(path)

    def policy(obs):
        row = np.reshape(gym.spaces.flatten(envs.obs_space, obs), (1, *envs.obs.shape[1:]))
        return (play(args, network, row.astype(envs.obs.dtype)) + envs.first_action)[0]

    return policy


def parse_args() -> Args:
    """The command line; a run's arguments are the defaults of --resume and --evaluate."""
    words = [re.sub(r"^((?:--.*=)?\d+)e(\d{1,3})$", lambda n: n[1] + "0" * int(n[2]), word)
             for word in sys.argv[1:]]  # fmt: skip
    runs = make_dataclass("Runs", [(name, str | None, None) for name in ("resume", "evaluate")])
    run, _ = tyro.cli(runs, args=words, add_help=False, return_unknown_args=True)
    default = Args()
    if (run.resume is None) != (run.evaluate is None):
        default = replace(read_checkpoint(run.resume or run.evaluate or "")["args"], **vars(run))
    # Two groups in --help: the algorithm and, from exp_name on, the run.
    comments = dict(re.findall(r"^    (\w+): .*  # (.*)$", inspect.getsource(Args), re.M))
    groups, hints = {"algorithm": [], "run": []}, get_type_hints(Args, include_extras=True)
    for name in asdict(default):
        group = "run" if name == "exp_name" or groups["run"] else "algorithm"
        hint = Annotated[hints[name], tyro.conf.arg(help=comments[name])]
        groups[group].append((name, hint, getattr(default, name)))
    parts = {name: make_dataclass(name, arguments) for name, arguments in groups.items()}
    fields = [(name, tyro.conf.OmitArgPrefixes[part]) for name, part in parts.items()]
    command = make_dataclass("Command", fields)
    doc = __doc__ or SCRIPT  # none with python -OO
    about = [doc.splitlines()[0], *re.findall(r"^Run .*?(?=^\w)", doc, re.M | re.S)]
    parsed = tyro.cli(command, args=words, description="\n\n".join(about))
    with as_usage_error("arguments", ValueError):
        args = Args(**vars(parsed.algorithm), **vars(parsed.run))
    with as_usage_error(f"--device {args.device}", RuntimeError, AssertionError):
        torch.zeros(1, device=args.device).cpu()  # is it there?
    return args


def main() -> None:
    """Trains or evaluates, and prints the folder of the run last."""
    if hasattr(sys.stdout, "reconfigure"):  # not in a notebook
        sys.stdout.reconfigure(errors="replace")  # where there is no ±
    hook = threading.excepthook  # TensorBoard raises its errors twice
    threading.excepthook = lambda args: "tensorboard" in type(args.thread).__module__ or hook(args)
    try:
        args = parse_args()
        if args.evaluate is None:
            print(train(args).folder)
        else:
            torch.set_num_threads(args.num_threads or available_cores())
            folder = checkpoint_path(args.evaluate).parent
            gif = folder / "episode.gif" if args.capture_video else None
            evaluate(args, load_network(args.evaluate, args)[-1], gif)
            print(folder)
    except UsageError as error:
        message = " ".join([str(error), *getattr(error, "__notes__", [])])
        sys.stderr.write(" ".join([f"{SCRIPT}:", *message.split()]) + "\n")  # whole, among others
        sys.exit(2)
    except KeyboardInterrupt as error:
        print(f"{SCRIPT}: interrupted", *getattr(error, "__notes__", []), sep="\n", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
