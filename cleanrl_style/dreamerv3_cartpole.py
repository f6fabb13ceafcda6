# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch>=2.4.0", "gymnasium[classic-control]>=1.0.0", "tyro>=1.0.16", "tensorboard>=2.20.0",
#   "tqdm>=4.66.0",
# ]
# ///
"""DreamerV3 for flat observations and discrete actions.

Paper    Hafner et al. (2025), "Mastering diverse control tasks through world models".
Idea     Learn a model of the world, and learn to act inside it, in games that are only imagined.
         The state s of the model is h and z. h is the memory of a GRU. z holds what h cannot
         foresee: G random numbers of C classes each. The posterior q reads them off the observation
         x, the prior p guesses them without it. From s, the model tells x, the reward r, and c,
         whether the episode goes on.

             h_t   = GRU(h_{t-1}, z_{t-1}, a_{t-1})
             z_t   ~ q(z|h_t, x_t)                       when it sees,
             z_t   ~ p(z|h_t)                            when it imagines
             model = 100 * |x - x'|^2 + CE(r, r') + CE(c, c')        x', r', c': told from s
                     + max(free, KL(sg q | p)) + 0.1 * max(free, KL(q | sg p))

         sg stops the gradient: mostly the prior follows the posterior. A KL below `free` nats costs
         nothing. From each state of the batch on, the actor plays U steps with z from p. Actor and
         critic learn from these games alone.

             R_t    = r_{t+1} + gamma * c_{t+1} * ((1 - lambda) * v(s_{t+1}) + lambda * R_{t+1})
             A_t    = (R_t - v(s_t)) / max(1, S)                     R_U = v(s_U)
             actor  = -w_t * (A_t * log pi(a_t|s_t) + eta * entropy of pi(.|s_t))
             critic = w_t * (CE(R_t, v(s_t)) + CE(v_slow(s_t), v(s_t)))
             loss   = mean of model + mean of actor + mean of critic

         w_t is the discount up to t, the product of all gamma * c. S is the spread of R, from the
         5th to the 95th percentile, averaged over the past. v_slow follows v. CE is the
         cross-entropy: r and v are learned as categories, the numbers symexp(-10) to symexp(10).
Differs  A small model of 4 numbers, not of pictures: one hidden layer in each network, and Adam. An
         error in x counts more, and less KL is free: else, z has too little of x, and chance moves
         what is imagined. x is normalised, and then symlog(x) = sign(x) * ln(|x| + 1). The critic
         does not learn from replayed steps. A time limit leaves c at 1. load_policy's policy
         remembers all its calls: load it anew for each episode.
Shapes   N environments; B sequences of a batch, T observations of each; M = T B imagined games of U
         steps; O numbers of an observation; K actions; H units of h; F = H + G C numbers of s.
Run      python dreamerv3_cartpole.py
Expect   Return over 100 episodes, mean over seeds 1 to 5 (worst to best seed), and median wall
         time with start-up and evaluation, on one core of an AMD EPYC, the other busy:
             CartPole-v1    454.6 (353.4 to 500.0)    30k steps    651 s
"""

import contextlib
import copy
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
from dataclasses import asdict, dataclass, make_dataclass, replace
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Annotated, NamedTuple, get_type_hints

import gymnasium as gym
import numpy as np
import torch
import tyro
from filelock import FileLock
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from tqdm import tqdm

SCRIPT = "dreamerv3_cartpole"  # named in checkpoints and messages
LOG_FREQUENCY = 1_000  # steps between points of the losses
UNIMIX = 0.01  # share of the uniform distribution in q, p and pi
NUM_BINS, LARGEST = 101, 10.0  # categories of rewards and returns; their largest symlog
SLOW = 0.02  # step of the slow critic towards the critic
SPREAD_STEP = 0.01  # step of S towards the spread of a batch

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
    env_id: str = "CartPole-v1"  # Gymnasium environment, or my_module:MyEnv-v0
    env_kwargs: str = "{}"  # of the environment, as JSON: '{"is_slippery": false}'
    seed: Annotated[int, 0, 2**63 - 1] = 1  # of all random numbers in the run
    total_timesteps: Steps = 30_000  # environment steps to train for, at least
    num_envs: SmallCount = 4  # parallel environments (N)

    learning_rate: Positive = 1e-3  # step size of the optimizer
    anneal_lr: bool = True  # lower the learning rate linearly to 0 over the run
    buffer_size: Size = 50_000  # transitions in the replay buffer
    sequence_length: SmallCount = 16  # steps of a sequence that are learned from (T)
    num_sequences: Count = 16  # sequences in a minibatch (B)
    learning_starts: Steps = 500  # environment steps before the first update
    train_frequency: Steps = 4  # environment steps between updates
    gradient_steps: Count = 1  # gradient steps in an update
    max_grad_norm: Weight = 10.0  # largest norm of the gradient; 0: not clipped
    norm_obs: bool = True  # normalise observations by their running mean and standard deviation
    units: SmallCount = 64  # of h, and of each hidden layer (H)
    num_latents: SmallCount = 8  # numbers in z (G)
    num_classes: Annotated[int, 2, 4096] = 8  # classes of each of them (C)
    free_nats: Weight = 0.1  # of a KL divergence that cost nothing
    obs_coef: Weight = 100.0  # weight of the squared error of observations in the loss
    dyn_coef: Weight = 1.0  # weight of the loss of the prior
    rep_coef: Weight = 0.1  # weight of the loss of the posterior
    horizon: SmallCount = 15  # steps of an imagined game (U)
    gamma: Fraction = 0.99  # discount factor
    return_lambda: Fraction = 0.95  # lambda of imagined returns; 0: one step, 1: all U
    ent_coef: Weight = 3e-4  # weight of the entropy in the loss

    exp_name: str = SCRIPT  # part of the name of the run's folder
    runs_dir: str = "runs"  # where the folders of runs are
    device: str = "cpu"  # cpu, cuda, cuda:1, mps
    compile: bool = False  # compile the gradient steps: 10 s at first, pays after a minute
    num_threads: Annotated[int, 0, 1024] = 1  # CPU threads of PyTorch; 0: one per core
    checkpoint_frequency: Frequency = 20_000  # steps between checkpoints; 0: only first and last
    eval_frequency: Frequency = 0  # steps between evaluations while training; 0: only at the end
    eval_episodes: Count = 100  # episodes of one evaluation
    capture_video: bool = False  # record the first episode of the last evaluation, as episode.gif
    resume: str | None = None  # folder of a run to resume; other flags replace the saved ones
    evaluate: str | None = None  # folder of a run, or its best.pt, to evaluate without training

    def __post_init__(self) -> None:
        check(self)
        if self.learning_starts >= self.total_timesteps:
            raise ValueError("--learning-starts must be less than --total-timesteps")
        if self.learning_starts < self.sequence_length * self.num_envs:
            raise ValueError("--learning-starts must be at least --sequence-length * --num-envs")
        if self.buffer_size < self.learning_starts:
            raise ValueError("--buffer-size must be at least --learning-starts")


# ---- Environment and network ---------------------------------------------------------------------


def make_env(args: Args, render_mode: str | None = None) -> gym.Env:
    """One environment with flat observations and discrete actions."""
    env = make_flat_env(args, render_mode)
    if not isinstance(env.action_space, gym.spaces.Discrete):
        raise UsageError(f"needs Discrete actions; {args.env_id} has {env.action_space}")
    return env


class Agent(nn.Module):
    """World model, actor and critic. A state s is one row of F numbers: h, then z as one-hots."""

    def __init__(self, obs_size: int, num_actions: int, args: Args) -> None:
        super().__init__()
        self.num_actions, self.units = num_actions, args.units
        self.latent_shape = args.num_latents, args.num_classes  # (G, C)
        latents = args.num_latents * args.num_classes
        self.state_size = args.units + latents  # F

        def head(inputs: int, outputs: int) -> nn.Sequential:
            return nn.Sequential(*hidden_layer(inputs, args.units), nn.Linear(args.units, outputs))

        self.obs_statistics = RunningStatistics(obs_size) if args.norm_obs else None
        self.encoder = hidden_layer(obs_size, args.units)
        self.inputs = hidden_layer(latents + num_actions, args.units)
        self.gates = nn.Sequential(
            nn.Linear(2 * args.units, 3 * args.units), nn.LayerNorm(3 * args.units)
        )
        self.posterior, self.prior = head(2 * args.units, latents), head(args.units, latents)
        self.decoder, self.reward = head(self.state_size, obs_size), head(self.state_size, NUM_BINS)
        self.goes_on = head(self.state_size, 1)
        self.actor, self.critic = (head(self.state_size, n) for n in (num_actions, NUM_BINS))
        for network in self.reward, self.critic, self.actor:  # have no opinion at first
            nn.init.zeros_(network[-1].weight)
            nn.init.zeros_(network[-1].bias)
        self.slow_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.register_buffer("spread", torch.zeros(()))  # S
        self.state = None  # of the episodes that `play` plays; no part of the checkpoint

    def scale(self, obs: Tensor) -> Tensor:
        """What the model sees of observations, and tells: (..., O) -> (..., O)."""
        if self.obs_statistics is not None:
            mean, variance = self.obs_statistics.mean, self.obs_statistics.variance
            obs = (obs - mean) / (variance + 1e-8).sqrt()
        return symlog(obs)

    def advance(self, states: Tensor, actions: Tensor, first: Tensor | None = None) -> Tensor:
        """h after the actions (B,) in the states (B, F); where an episode begins, without: (B, H).

        The update gate is closed at first (-1), so that the memory lasts.
        """
        one_hot = nn.functional.one_hot(actions, self.num_actions).float()
        if first is not None:
            states, one_hot = states * ~first[:, None], one_hot * ~first[:, None]
        h, z = states[:, : self.units], states[:, self.units :]
        inputs = self.inputs(torch.cat([z, one_hot], dim=1))
        reset, candidate, update = self.gates(torch.cat([h, inputs], dim=1)).chunk(3, dim=1)
        return h.lerp((reset.sigmoid() * candidate).tanh(), (update - 1).sigmoid())

    def observe(
        self, states: Tensor, actions: Tensor, first: Tensor, encoded: Tensor, numbers: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The next states, with what is seen: states (B, F), actions and whether an episode begins
        (B,), encoded observations (B, H), random numbers (B, G) -> (B, F), q (B, G, C).
        """
        h = self.advance(states, actions, first)
        probs = mixed(
            self.posterior(torch.cat([h, encoded], dim=1)).unflatten(1, self.latent_shape)
        )
        return torch.cat([h, straight_through(probs, numbers)], dim=1), probs

    def imagine(self, states: Tensor, actions: Tensor, numbers: Tensor) -> Tensor:
        """The next states, if nothing is seen: three of (B, F), (B,), (B, G) -> (B, F)."""
        h = self.advance(states, actions)
        probs = mixed(self.prior(h).unflatten(1, self.latent_shape))
        return torch.cat([h, straight_through(probs, numbers)], dim=1)

    def policy(self, states: Tensor) -> Tensor:
        """pi(.|s): (..., F) -> (..., K)."""
        return mixed(self.actor(states))


def hidden_layer(inputs: int, outputs: int) -> nn.Sequential:
    """A layer of units with a norm, which keeps their sizes alike whatever the weights are."""
    return nn.Sequential(nn.Linear(inputs, outputs), nn.LayerNorm(outputs), nn.SiLU())


def make_network(args: Args, envs: "Envs") -> Agent:
    """An agent, which learns a model of these environments."""
    return Agent(envs.obs.shape[1], int(envs.action_space.n), args)


# ---- The algorithm -------------------------------------------------------------------------------


def symlog(x: Tensor) -> Tensor:
    """sign(x) * ln(|x| + 1): large numbers become small, small ones stay as they are."""
    return x.sign() * x.abs().log1p()


def symexp(x: Tensor) -> Tensor:
    """The inverse of symlog."""
    return x.sign() * x.abs().expm1()


def mixed(logits: Tensor) -> Tensor:
    """Probabilities, with a small share of uniform ones, so that none is ever 0."""
    return (1 - UNIMIX) * logits.softmax(-1) + UNIMIX / logits.shape[-1]


def draw(probs: Tensor, numbers: Tensor) -> Tensor:
    """A class from each row: probabilities (..., C), uniform random numbers (...) -> (...)."""
    chosen = (probs.cumsum(-1) <= numbers[..., None]).sum(-1)
    return chosen.clamp(max=probs.shape[-1] - 1)  # if by rounding they add up to less than 1


def straight_through(probs: Tensor, numbers: Tensor) -> Tensor:
    """z, drawn: (B, G, C), (B, G) -> one-hots (B, G C). Their gradient is that of the probs."""
    one_hot = nn.functional.one_hot(draw(probs.detach(), numbers), probs.shape[-1]).float()
    return (one_hot + probs - probs.detach()).flatten(1)


def kl_divergence(probs: Tensor, others: Tensor) -> Tensor:
    """KL(probs | others) in nats, summed over the G numbers in z: two of (..., G, C) -> (...)."""
    return (probs * (probs.log() - others.log())).sum((-2, -1))


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


def lambda_returns(
    rewards: Tensor, discounts: Tensor, values: Tensor, return_lambda: float
) -> Tensor:
    """R_t = r_{t+1} + d_{t+1} * ((1 - lambda) * v_{t+1} + lambda * R_{t+1}), and R_U = v_U.

    All of the states that steps 1 to U lead to: three of (U, M) -> R_0 to R_{U-1}, (U, M).
    """
    returns = [values[-1]]
    for t in reversed(range(len(rewards))):
        following = torch.lerp(values[t], returns[-1], return_lambda)
        returns.append(rewards[t] + discounts[t] * following)
    return torch.stack(returns[:0:-1])


class Batch(NamedTuple):
    """B sequences of T observations, with what led to each. Column b of each:"""

    obs: Tensor  # observation, (T, B, O)
    actions: Tensor  # action before it, (T, B)
    rewards: Tensor  # its reward, (T, B)
    terminated: Tensor  # whether it terminated the episode, (T, B)
    first: Tensor  # whether an episode begins: no action or reward was before, (T, B)
    state: Tensor  # state before the first of them, as it was when it was played, (B, F)


class Numbers(NamedTuple):
    """Random numbers, uniform from 0 to 1, for all that a gradient step draws."""

    seen: Tensor  # for z of the batch, (T, B, G)
    actions: Tensor  # for imagined actions, (U, M)
    imagined: Tensor  # for imagined z, (U, M, G)


def random_numbers(args: Args) -> Numbers:
    """The numbers for one gradient step."""
    games = args.sequence_length * args.num_sequences
    return Numbers(
        torch.rand(args.sequence_length, args.num_sequences, args.num_latents),
        torch.rand(args.horizon, games), torch.rand(args.horizon, games, args.num_latents),
    )  # fmt: skip


def model_loss(
    agent: Agent, batch: Batch, numbers: Tensor, args: Args
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The loss of the world model, its states (T, B, F), metrics."""
    obs = agent.scale(batch.obs)
    encoded = agent.encoder(obs)
    states, posteriors = [batch.state], []
    observe = compiled(Agent.observe, args)
    for t in range(len(batch.obs)):
        row = batch.actions[t], batch.first[t], encoded[t], numbers[t]
        state, probs = observe(agent, states[-1], *row)
        states.append(state)
        posteriors.append(probs)
    states, posteriors = torch.stack(states[1:]), torch.stack(posteriors)
    priors = mixed(agent.prior(states[..., : agent.units]).unflatten(2, agent.latent_shape))
    obs_loss = (obs - agent.decoder(states)).square().sum(-1).mean()
    reward_loss = cross_entropy(two_hot(batch.rewards), agent.reward(states)).mean()
    continue_loss = nn.functional.binary_cross_entropy_with_logits(
        agent.goes_on(states).squeeze(-1), (~batch.terminated).float()
    )
    dyn_loss = kl_divergence(posteriors.detach(), priors).clamp(min=args.free_nats).mean()
    rep_loss = kl_divergence(posteriors, priors.detach()).clamp(min=args.free_nats).mean()
    loss = args.obs_coef * obs_loss + reward_loss + continue_loss
    loss = loss + args.dyn_coef * dyn_loss + args.rep_coef * rep_loss
    return loss, states, {
        "losses/obs_loss": obs_loss.detach(), "losses/reward_loss": reward_loss.detach(),
        "losses/continue_loss": continue_loss.detach(), "losses/latent_kl": dyn_loss.detach(),
    }  # fmt: skip


@torch.no_grad()
def play_inside(
    agent: Agent, states: Tensor, numbers: Numbers, args: Args
) -> tuple[Tensor, Tensor]:
    """Imagined games from the states (M, F) on -> all states (U + 1, M, F), actions (U, M)."""
    games, actions, imagine = [states], [], compiled(Agent.imagine, args)
    for action_numbers, latent_numbers in zip(numbers.actions, numbers.imagined):
        actions.append(draw(agent.policy(games[-1]), action_numbers))
        games.append(imagine(agent, games[-1], actions[-1], latent_numbers))
    return torch.stack(games), torch.stack(actions)


def behaviour_loss(
    agent: Agent, states: Tensor, actions: Tensor, running: Tensor, args: Args
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of actor and critic on imagined games: states (U + 1, M, F), actions (U, M), and
    whether the episodes went on where they start (M,) -> loss, metrics.
    """
    value_logits = agent.critic(states)
    with torch.no_grad():
        values = expected(value_logits)
        discounts = args.gamma * agent.goes_on(states[1:]).squeeze(-1).sigmoid()
        steps = expected(agent.reward(states[1:])), discounts, values[1:]
        returns = lambda_returns(*steps, args.return_lambda)
        weights = torch.cat([running[None], discounts[:-1]]).cumprod(0)
        percentiles = returns.new_tensor([0.05, 0.95])
        low, high = torch.quantile(returns.flatten(), percentiles)
        agent.spread.lerp_(high - low, SPREAD_STEP)
        advantages = (returns - values[:-1]) / agent.spread.clamp(min=1)
        targets, slow = two_hot(returns), two_hot(expected(agent.slow_critic(states[:-1])))
    log_probs = agent.policy(states[:-1]).log()
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    log_prob = log_probs.gather(-1, actions[..., None]).squeeze(-1)
    policy_loss = -(weights * (advantages * log_prob + args.ent_coef * entropy)).mean()
    value_loss = (weights * cross_entropy(targets + slow, value_logits[:-1])).mean()
    return policy_loss + value_loss, {
        "losses/policy_loss": policy_loss.detach(), "losses/value_loss": value_loss.detach(),
        "losses/entropy": entropy.detach().mean(),
    }  # fmt: skip


def update(
    agent: Agent, optimizer: torch.optim.Optimizer, batch: Batch, numbers: Numbers, args: Args
) -> dict[str, Tensor]:
    """One gradient step on B sequences and on the games imagined from them -> metrics."""
    optimizer.zero_grad()
    model, states, metrics = model_loss(agent, batch, numbers.seen, args)
    games, actions = play_inside(agent, states.flatten(0, 1), numbers, args)
    running = (~batch.terminated).flatten().float()
    function = compiled(behaviour_loss, args)
    behaviour, others = function(agent, games, actions, running, args)
    (model + behaviour).backward()
    if args.max_grad_norm > 0:
        nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
    optimizer.step()
    with torch.no_grad():
        for slow, source in zip(agent.slow_critic.parameters(), agent.critic.parameters()):
            slow.lerp_(source, SLOW)
    return metrics | others


@torch.no_grad()
def act(
    agent: Agent, obs: np.ndarray, states: Tensor, actions: Tensor, first: Tensor
) -> tuple[Tensor, Tensor]:
    """pi and the states after observations (N, O), from the states before (N, F), the actions since
    and whether an episode begins (N,) -> (N, K), (N, F).
    """
    encoded = agent.encoder(agent.scale(torch.from_numpy(obs).to(states.device)))
    numbers = torch.rand(len(obs), agent.latent_shape[0]).to(states.device)
    states, _ = agent.observe(states, actions, first, encoded, numbers)
    return agent.policy(states), states


# ---- Normalisation -------------------------------------------------------------------------------


class RunningStatistics(nn.Module):
    """Mean and variance of all rows so far. As buffers, they are saved with the network."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("count", torch.tensor(0.0))
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("variance", torch.ones(size))

    @torch.no_grad()
    def update(self, rows: Tensor) -> None:
        """Adds (B, size) rows: Chan et al. (1979), "Updating formulae", equation 2.1."""
        total = self.count + len(rows)
        difference = rows.mean(0) - self.mean
        squares = self.variance * self.count + rows.var(0, correction=0) * len(rows)
        self.variance.copy_((squares + difference**2 * self.count * len(rows) / total) / total)
        self.mean += difference * len(rows) / total
        self.count.copy_(total)


# ---- Memory --------------------------------------------------------------------------------------


class ReplayBuffer:
    """The last observations of N environments, and what led to each, in a ring for each of them.

    An episode of n steps has n + 1 rows: its first observation has no action before it.
    """

    def __init__(self, obs_size: int, state_size: int, args: Args) -> None:
        self.length, self.num_rows = args.sequence_length, args.buffer_size // args.num_envs
        self.rows_written = torch.zeros(args.num_envs).long()  # in each ring
        shape = self.num_rows, args.num_envs
        with as_usage_error(f"--buffer-size {args.buffer_size} does not fit", RuntimeError):
            self.columns = Batch(
                torch.zeros(*shape, obs_size), torch.zeros(shape).long(), torch.zeros(shape),
                torch.zeros(shape).bool(), torch.zeros(shape).bool(),
                torch.zeros(*shape, state_size),
            )  # fmt: skip

    def add(self, which: np.ndarray, *row: np.ndarray) -> None:
        """A row in each of n rings, whose numbers are `which`, in parts of a Batch: (n, ...)."""
        which = torch.from_numpy(which)
        places = self.rows_written[which] % self.num_rows
        for column, values in zip(self.columns, row, strict=True):
            column[places, which] = torch.as_tensor(values, dtype=column.dtype)
        self.rows_written[which] += 1

    def sample(self, num_sequences: int) -> Batch:
        """B sequences of T rows, drawn uniformly, with replacement."""
        envs = torch.randint(len(self.rows_written), (num_sequences,))
        oldest = (self.rows_written - self.num_rows).clamp(min=0)[envs]
        starts = self.rows_written[envs] - self.length + 1 - oldest  # that there are
        start = oldest + (torch.rand(num_sequences, dtype=torch.float64) * starts).long()
        rows = (start + torch.arange(self.length)[:, None]) % self.num_rows  # (T, B)
        *others, states = self.columns
        return Batch(*(column[rows, envs] for column in others), states[rows[0], envs])

    def state_dict(self) -> dict:
        """The rows that are filled, for a checkpoint."""
        filled = [column[: self.rows_written.max()].clone() for column in self.columns]
        return {"rows_written": self.rows_written, "rows": filled}

    def load_state_dict(self, state: dict) -> None:
        """Takes what `state_dict` gave."""
        self.rows_written.copy_(state["rows_written"])
        for column, saved in zip(self.columns, state["rows"], strict=True):
            column[: len(saved)] = saved


# ---- Training and evaluation ---------------------------------------------------------------------


def train(args: Args) -> "Result":
    """Trains an agent, from the start or from the checkpoint in args.resume."""
    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    envs = Envs(args, args.num_envs, TRAINING)
    agent = make_network(args, envs).to(device)
    optimizer = torch.optim.Adam(
        (weights for weights in agent.parameters() if weights.requires_grad),
        lr=args.learning_rate, fused=True,
    )  # fmt: skip
    buffer = ReplayBuffer(envs.obs.shape[1], agent.state_size, args)
    memory = nn.Module()  # of the running episodes, a part of the run
    memory.register_buffer("states", torch.zeros(args.num_envs, agent.state_size))
    memory.register_buffer("actions", torch.zeros(args.num_envs).long())
    memory.register_buffer("first", torch.ones(args.num_envs).bool())
    memory = memory.to(device)
    with Run(args, envs, agent, optimizer=optimizer, buffer=buffer, memory=memory) as run:
        metrics, everyone = {}, np.arange(args.num_envs)  # metrics of the last gradient step
        while run.is_running():
            if args.anneal_lr:
                remaining = 1 - envs.steps / args.total_timesteps
                optimizer.param_groups[0]["lr"] = args.learning_rate * remaining

            # Act: one step in every environment.
            if args.norm_obs:
                agent.obs_statistics.update(torch.from_numpy(envs.obs).to(device))
            begun = memory.first.nonzero().squeeze(1).cpu().numpy()
            buffer.add(begun, envs.obs[begun], 0, 0, False, True, 0)
            before = memory.states, memory.actions, memory.first
            probs, memory.states = act(agent, envs.obs, *before)
            memory.actions = draw(probs, torch.rand(args.num_envs).to(device))
            actions = memory.actions.cpu().numpy()
            next_obs, rewards, terminated, truncated = envs.step(actions)
            states = memory.states.cpu()
            buffer.add(everyone, next_obs, actions, rewards, terminated, False, states)
            memory.first = torch.from_numpy(terminated | truncated).to(device)

            # Learn: the gradient steps that are due in these N steps.
            first = max(envs.steps - args.num_envs + 1, args.learning_starts)
            for step in range(first, envs.steps + 1):
                if step % args.train_frequency == 0:
                    for _ in range(args.gradient_steps):
                        batch = buffer.sample(args.num_sequences)
                        batch = Batch(*(part.to(device) for part in batch))
                        numbers = Numbers(*(part.to(device) for part in random_numbers(args)))
                        metrics = update(agent, optimizer, batch, numbers, args)

            # Log, evaluate, save.
            if run.is_due(LOG_FREQUENCY):
                run.log(metrics | {"charts/learning_rate": optimizer.param_groups[0]["lr"]})
            if run.is_due(args.eval_frequency):
                run.evaluate()
            if run.is_due(args.checkpoint_frequency):
                run.save()
        return run.finish()


def play(args: Args, agent: Agent, obs: np.ndarray, first: np.ndarray | None = None) -> np.ndarray:
    """How the trained policy is evaluated: observations (N, O) -> the likeliest actions (N,).

    It remembers the calls before, but none where `first` (N,): there, an episode begins.
    """
    device = agent.spread.device
    if agent.state is None:
        nothing = torch.zeros(len(obs), agent.state_size, device=device)
        agent.state = nothing, torch.zeros(len(obs), device=device).long()
        first = np.ones(len(obs), bool)
    first = torch.zeros(len(obs)).bool() if first is None else torch.from_numpy(first)
    probs, states = act(agent, obs, *agent.state, first.to(device))
    actions = probs.argmax(1)
    agent.state = states, actions
    return actions.cpu().numpy()


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
