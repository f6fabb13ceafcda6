# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch>=2.4.0", "gymnasium[classic-control]>=1.0.0", "tyro>=1.0.16", "tensorboard>=2.20.0",
#   "tqdm>=4.66.0",
# ]
# ///
r"""Maximum a posteriori policy optimisation (MPO) for flat observations and continuous actions.

Paper    Abdolmaleki et al. (2018), "Maximum a posteriori policy optimisation", and (2018b),
         "Relative entropy regularized policy iteration", Algorithm 2.
Idea     Actor-critic in which the policy pi does not follow the gradient of Q. In each state, M
         actions are drawn from pi_target, the policy of a little earlier. The E-step weighs them:
         the higher Q, the heavier. The M-step makes them as likely as they are heavy, by maximum
         likelihood. pi is a Gaussian, whose mean mu moves towards the good actions, and whose
         deviation sigma grows where these are far away, and shrinks where they are near.

             w_i     = exp(Q_target(s, a_i) / eta), divided by their sum;    a_i from pi_target(.|s)
             g(eta)  = eta * (epsilon + mean over s of log mean_i exp(Q_target(s, a_i) / eta))
             J_mean  = mean over s of -sum_i w_i * log N(a_i; mu, sigma_target)
             J_std   = mean over s of -sum_i w_i * log N(a_i; mu_target, sigma)
             J_pi    = J_mean + alpha_mean * KL_mean + J_std + alpha_std * KL_std
             J_alpha = alpha_mean * (epsilon_mean - KL_mean) + alpha_std * (epsilon_std - KL_std)
             y       = r + gamma * mean_i Q_target(s', a'_i)   a'_i from pi_target(.|s');
                       or r alone, if the episode terminated
             J_Q     = mean of (Q(s, a) - y)^2

         The temperature eta minimises g. There, the KL divergence of the weighted actions from
         pi_target is epsilon, whatever the scale of the rewards. KL_mean is
         KL(pi_target || N(mu, sigma_target)), KL_std is KL(pi_target || N(mu_target, sigma)). Each
         has a limit: alpha, a Lagrange multiplier, grows above it and shrinks below. So mu can be
         quick while sigma, which is all exploration there is, shrinks slowly. Transitions are
         drawn at random from a replay buffer. Q_target and pi_target are slowly following averages.
Differs  Actions are squashed by tanh, as in SAC (sac_continuous.py), which changes no weight and no
         divergence; DeepMind's Acme clips them, and penalises those out of bounds. For a CPU, 10
         actions in each state (Acme: 20), and batches of 128 (256). Targets follow at each step;
         (2018b) copies Q every 250. y looks one step ahead, as in (2018b); (2018) has Retrace.
         Deviations are diagonal. eta is learned as a logarithm, the alphas, which ran away as
         logarithms, through softplus (Acme: all three). The limits on KL_mean and KL_std are wider
         than Acme's 2.5e-3 and 1e-6, as gradient steps are fewer and larger. Networks as in
         SAC, with one critic. All gradients make one step of Adam. At a time limit, y counts the
         rewards that would have followed (it bootstraps). N environments are stepped in parallel;
         updates are counted in single steps, so N does not change their number.
Shapes   N environments; B transitions of a batch; O numbers of an observation; K of an action; M
         actions drawn in a state.
Run      python mpo_continuous.py
Expect   Return of the deterministic policy over 100 episodes, mean over seeds 1 to 5 (worst to best
         seed), and median wall time with start-up and evaluation, on one core of an AMD EPYC:
             Pendulum-v1     -149.5 (-154.6 to -146.7)   20k steps, 314 s
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
from typing import Annotated, Literal, NamedTuple, get_type_hints

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from filelock import FileLock
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from tqdm import tqdm

SCRIPT = "mpo_continuous"  # named in checkpoints and messages
LOG_FREQUENCY = 1_000  # steps between points of the losses
LOG_STD_BOUNDS = -20, 2  # of the Gaussian before tanh, as the authors have it
LEAST_ETA = 1e-8  # where all actions have the same value, eta falls for ever

# Argument types with their bounds.
Steps = Annotated[int, 1, 10**12]
Frequency = Annotated[int, 0, 10**12]  # interval in steps; 0: never
Size = Annotated[int, 1, 10**8]
Count = Annotated[int, 1, 10**6]
SmallCount = Annotated[int, 1, 4096]
Fraction = Annotated[float, 0, 1]
Positive = Annotated[float, 1e-30, 1e30]


@dataclass(frozen=True)
class Args:
    env_id: str = "Pendulum-v1"  # Gymnasium environment, or my_module:MyEnv-v0
    env_kwargs: str = "{}"  # of the environment, as JSON: '{"is_slippery": false}'
    seed: Annotated[int, 0, 2**63 - 1] = 1  # of all random numbers in the run
    total_timesteps: Steps = 20_000  # environment steps to train for, at least
    num_envs: SmallCount = 1  # parallel environments (N)

    learning_rate: Positive = 1e-3  # step size of the optimizer
    buffer_size: Size = 1_000_000  # transitions in the replay buffer
    gamma: Fraction = 0.99  # discount factor
    tau: Fraction = 0.005  # step of the target network towards the Q-network; 1: a copy
    batch_size: Count = 128  # transitions in a minibatch (B)
    learning_starts: Steps = 1_000  # environment steps before the first update
    train_frequency: Steps = 1  # environment steps between updates
    gradient_steps: Count = 1  # gradient steps in an update
    hidden_size: SmallCount = 256  # units in each of the two hidden layers
    num_samples: SmallCount = 10  # actions drawn in a state (M)
    epsilon: Positive = 0.1  # KL divergence of the weighted actions from pi_target, in nats
    epsilon_mean: Positive = 0.01  # limit of KL_mean, in nats: how far means may move
    epsilon_std: Positive = 1e-3  # limit of KL_std, in nats: how far deviations may move
    dual_learning_rate: Positive = 1e-2  # step size of log eta, and of each alpha before softplus

    exp_name: str = SCRIPT  # part of the name of the run's folder
    runs_dir: str = "runs"  # where the folders of runs are
    device: str = "cpu"  # cpu, cuda, cuda:1, mps
    precision: Literal["auto", "float32", "bfloat16"] = "float32"  # auto: bfloat16 on CPUs with it
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
        if self.learning_starts < self.batch_size:
            raise ValueError("--learning-starts must be at least --batch-size")
        if self.buffer_size < self.learning_starts:
            raise ValueError("--buffer-size must be at least --learning-starts")
        if self.learning_starts >= self.total_timesteps:
            raise ValueError("--learning-starts must be less than --total-timesteps")
        if self.epsilon >= math.log(self.num_samples):  # then one sample has all the weight
            raise ValueError("--epsilon must be less than the logarithm of --num-samples")


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


class Bfloat16Linear(nn.Linear):
    """A linear layer that multiplies in bfloat16: inputs, weights and product have 2 digits."""

    def forward(self, inputs: Tensor) -> Tensor:
        """(B, in_features) -> (B, out_features), both float32."""
        return F.linear(inputs.bfloat16(), self.weight.bfloat16()).float() + self.bias


def mlp(inputs: int, hidden_size: int, outputs: int, bfloat16: bool = False) -> nn.Sequential:
    """A network with two hidden layers. The product between them, which usually is most of the
    work, may be in bfloat16.
    """
    linear = Bfloat16Linear if bfloat16 else nn.Linear
    return nn.Sequential(
        nn.Linear(inputs, hidden_size), nn.ReLU(),
        linear(hidden_size, hidden_size), nn.ReLU(),
        nn.Linear(hidden_size, outputs),
    )  # fmt: skip


class Critic(nn.Module):
    """Q: a Q-network, which sees actions in (-1, 1)."""

    def __init__(
        self, obs_size: int, action_size: int, hidden_size: int, bfloat16: bool = False
    ) -> None:
        super().__init__()
        self.network = mlp(obs_size + action_size, hidden_size, 1, bfloat16)

    def forward(self, obs: Tensor, actions: Tensor) -> Tensor:
        """Observations (B, O) and actions (B, K) -> Q(s, a) (B,)."""
        inputs = torch.cat([obs, actions], dim=1)
        return self.network(inputs).squeeze(1)


class Agent(nn.Module):
    """pi(a|s), its critic, the logarithm of eta, and alpha_mean and alpha_std before softplus.

    pi is a diagonal Gaussian, whose means and standard deviations depend on s, squashed by tanh.
    Actions in (-1, 1) are scaled to low and high (K,).
    """

    def __init__(
        self, obs_size: int, low: np.ndarray, high: np.ndarray, hidden_size: int,
        bfloat16: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.register_buffer("low", torch.tensor(low))
        self.register_buffer("high", torch.tensor(high))
        self.actor = mlp(obs_size, hidden_size, 2 * len(low), bfloat16)
        self.critic = Critic(obs_size, len(low), hidden_size, bfloat16)
        self.log_eta = nn.Parameter(torch.tensor(0.0))
        self.raw_alphas = nn.Parameter(torch.zeros(2))

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Observations (B, O) -> means and log standard deviations before tanh, (B, K) each."""
        means, log_std = self.actor(obs).chunk(2, dim=1)
        return means, log_std.clamp(*LOG_STD_BOUNDS)


def use_bfloat16(args: Args) -> bool:
    """auto: on CPUs with instructions for it."""
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    automatic = args.precision == "auto" and args.device == "cpu" and supported()
    return automatic or args.precision == "bfloat16"


def make_network(args: Args, envs: "Envs") -> Agent:
    """A policy with its critic for these environments, with the bounds of their actions."""
    low, high = envs.action_space.low, envs.action_space.high
    return Agent(envs.obs.shape[1], low, high, args.hidden_size, use_bfloat16(args))


# ---- The algorithm -------------------------------------------------------------------------------


class Actor:
    """The policy in NumPy, with its bounds: for a few rows, several times as fast as in PyTorch.

    It shares the weights of an agent on the CPU. Of one on a GPU, it is a copy. It computes in
    float32, whatever --precision says.
    """

    def __init__(self, agent: Agent) -> None:
        weights = [weight.detach().cpu().numpy() for weight in agent.actor.parameters()]
        self.layers = list(zip(weights[::2], weights[1::2]))
        self.low, self.high = agent.low.cpu().numpy(), agent.high.cpu().numpy()

    def __call__(self, obs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Observations (N, O) -> means and standard deviations before tanh, (N, K) each."""
        for weight, bias in self.layers[:-1]:
            obs = np.maximum(obs @ weight.T + bias, 0)
        weight, bias = self.layers[-1]
        means, log_std = np.split(obs @ weight.T + bias, 2, axis=1)
        return means, np.exp(log_std.clip(*LOG_STD_BOUNDS))


def act(actor: Actor, obs: np.ndarray, noise: np.ndarray | float = 0.0) -> np.ndarray:
    """The squashed means or, with standard normal noise (N, K), samples of pi: (N, O) -> (N, K)."""
    means, deviations = actor(obs)
    return np.tanh(means + deviations * noise)


def to_bounds(actor: Actor, actions: np.ndarray) -> np.ndarray:
    """Scales from -1 and 1 to the bounds of the environment: (N, K) -> (N, K)."""
    if not np.isfinite(actions).all():
        raise UsageError("an action is not finite: try a lower --learning-rate")
    low, high = actor.low, actor.high
    return (low + (actions + 1) / 2 * (high - low)).clip(low, high)  # against rounding


def action_weights(q_values: Tensor, eta: Tensor) -> Tensor:
    """w_i, in each state a softmax over its actions (2018, equation 8): (M, B), scalar -> (M, B).

    As they were drawn from the old policy, its density is in them already.
    """
    return (q_values / eta).softmax(0)


def temperature_loss(q_values: Tensor, eta: Tensor, epsilon: float) -> Tensor:
    """g(eta), the dual of the E-step (2018, equation 9): (M, B), scalar -> scalar.

    Its slope is epsilon less the KL divergence of the weights from equal ones: while they differ
    more than epsilon allows, eta grows.
    """
    log_means = (q_values / eta).logsumexp(0) - math.log(len(q_values))
    return eta * (epsilon + log_means.mean())


def log_density(samples: Tensor, means: Tensor, log_std: Tensor) -> Tensor:
    """Of the Gaussian of actions before tanh: (M, B, K), (B, K), (B, K) -> (M, B).

    Less the logarithm of tanh's slope, which is that of all policies, it is log pi(a|s).
    """
    distances = (samples - means) / log_std.exp()
    return (-distances.square() / 2 - log_std - math.log(2 * math.pi) / 2).sum(-1)


def policy_loss(
    samples: Tensor, weights: Tensor, means: Tensor, log_std: Tensor, old_means: Tensor,
    old_log_std: Tensor,
) -> Tensor:  # fmt: skip
    """The weighted likelihoods of J_mean and J_std (2018b, section 4.2.1): (M, B, K), (M, B), four
    of (B, K) -> scalar. In each of them, the other half of the policy is the old one.
    """
    log_probs = log_density(samples, means, old_log_std) + log_density(samples, old_means, log_std)
    return -(weights * log_probs).sum(0).mean()


def mean_divergence(means: Tensor, old_means: Tensor, old_log_std: Tensor) -> Tensor:
    """Mean over B states of KL(N(old mean, old deviation) || N(mean, old deviation)), in nats:
    three of (B, K) -> scalar.
    """
    return ((means - old_means) / old_log_std.exp()).square().sum(1).mean() / 2


def std_divergence(log_std: Tensor, old_log_std: Tensor) -> Tensor:
    """Mean over B states of KL(N(old mean, old deviation) || N(old mean, deviation)), in nats:
    two of (B, K) -> scalar.
    """
    growth = log_std - old_log_std
    return (growth + (-2 * growth).exp() / 2 - 0.5).sum(1).mean()


def td_target(rewards: Tensor, terminated: Tensor, next_q: Tensor, gamma: float) -> Tensor:
    """y = r + gamma * mean_i Q_target(s', a'_i), or r if terminated: (B,), (B,), (M, B) -> (B,)."""
    return rewards + gamma * next_q.mean(0) * ~terminated


@torch.no_grad()
def update_target(target_agent: nn.Module, agent: nn.Module, tau: float) -> None:
    """Each target weight <- (1 - tau) * itself + tau * the weight that is trained."""
    for target, source in zip(target_agent.parameters(), agent.parameters()):
        target.lerp_(source, tau)


class Batch(NamedTuple):
    """B transitions, with K numbers an action. Row b of each:"""

    obs: Tensor  # observation, (B, O)
    actions: Tensor  # action in (-1, 1), (B, K)
    rewards: Tensor  # reward, (B,)
    next_obs: Tensor  # next observation; at the end of an episode its last one, (B, O)
    terminated: Tensor  # whether the episode terminated; False if truncated, (B,)


def compute_gradient(
    agent: nn.Module, target_agent: nn.Module, batch: Batch, noise: Tensor, args: Args
) -> dict[str, Tensor]:
    """The gradients of J_Q, J_pi, g and J_alpha on the B transitions of a batch ->
    metrics. noise is standard normal, (M, 2 B, K): for the actions in s and in s'.
    """
    with torch.no_grad():  # what the old policy does in s and in s', and what this is worth
        states = torch.cat([batch.obs, batch.next_obs])
        old_means, old_log_std = target_agent(states)
        samples = old_means + old_log_std.exp() * noise  # before tanh
        rows = states.expand(len(noise), -1, -1).flatten(0, 1)
        sampled_q = target_agent.critic(rows, samples.tanh().flatten(0, 1)).view(len(noise), -1)
        sampled_q, next_q = sampled_q.chunk(2, dim=1)
        target = td_target(batch.rewards, batch.terminated, next_q, args.gamma)
        samples, old_means, old_log_std = (
            part.chunk(2, dim=-2)[0] for part in (samples, old_means, old_log_std)
        )
    q_values = agent.critic(batch.obs, batch.actions)
    critic_loss = (q_values - target).square().mean()

    eta = agent.log_eta.exp() + LEAST_ETA  # a logarithm, as the scale of Q is not known
    alpha_mean, alpha_std = F.softplus(agent.raw_alphas)  # as logarithms, they ran away
    weights = action_weights(sampled_q, eta.detach())
    means, log_std = agent(batch.obs)
    actor_loss = policy_loss(samples, weights, means, log_std, old_means, old_log_std)
    kl_mean = mean_divergence(means, old_means, old_log_std)
    kl_std = std_divergence(log_std, old_log_std)
    penalty = alpha_mean.detach() * kl_mean + alpha_std.detach() * kl_std
    dual_loss = (
        temperature_loss(sampled_q, eta, args.epsilon)
        + alpha_mean * (args.epsilon_mean - kl_mean.detach())
        + alpha_std * (args.epsilon_std - kl_std.detach())
    )
    (critic_loss + actor_loss + penalty + dual_loss).backward()  # no term moves another's weights
    return {
        "losses/td_loss": critic_loss.detach(),
        "losses/q_values": q_values.detach().mean(),
        "losses/policy_loss": actor_loss.detach(),
        "losses/temperature": eta.detach(),
        "losses/kl_mean": kl_mean.detach(),
        "losses/kl_std": kl_std.detach(),
        "losses/alpha_mean": alpha_mean.detach(),
        "losses/alpha_std": alpha_std.detach(),
    }


def make_optimizer(args: Args, agent: Agent) -> torch.optim.Adam:
    """Adam, with a learning rate of its own for eta and the alphas."""
    networks = [*agent.actor.parameters(), *agent.critic.parameters()]
    duals = {"params": [agent.log_eta, agent.raw_alphas], "lr": args.dual_learning_rate}
    return torch.optim.Adam([{"params": networks}, duals], lr=args.learning_rate, fused=True)


def update(
    agent: nn.Module, target_agent: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch,
    args: Args,
) -> dict[str, Tensor]:  # fmt: skip
    """One gradient step on a batch -> metrics. All target networks follow."""
    size, action_size = batch.actions.shape
    noise = torch.randn(args.num_samples, 2 * size, action_size).to(batch.obs.device)
    optimizer.zero_grad()
    metrics = compiled(compute_gradient, args)(agent, target_agent, batch, noise, args)
    optimizer.step()
    update_target(target_agent, agent, args.tau)
    return metrics


# ---- Memory --------------------------------------------------------------------------------------


class ReplayBuffer:
    """The newest steps of N environments, with each observation stored once.

    Each environment has a ring of rows, which lie N apart. A row holds an observation, the action
    that was taken there, and what came of it; the next observation is in the ring's next row. So
    an episode's last observation has a row too, like the newest one, but without an action. Such
    rows are not drawn. `size` counts them, except for the newest.
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

    def sample(self, batch_size: int) -> Batch:
        """B transitions, drawn uniformly, with replacement."""
        rows = torch.empty(0, dtype=torch.int64)
        while len(rows) < batch_size:
            drawn = torch.randint(self.num_filled, (batch_size,))
            rows = torch.cat([rows, drawn[self.acted[drawn]]])
        rows = rows[:batch_size]
        obs, actions, rewards, terminated, _ = (column[rows] for column in self.columns)
        next_obs = self.obs[(rows + self.num_envs) % len(self.obs)]
        return Batch(obs, actions, rewards, next_obs, terminated)

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
    target_agent = deepcopy(agent)
    optimizer = make_optimizer(args, agent)
    shape = args.num_envs, envs.action_space.shape[0]
    buffer = ReplayBuffer(args.buffer_size, args.num_envs, envs.obs.shape[1], shape[1])
    parts = {"target_agent": target_agent, "optimizer": optimizer, "buffer": buffer}
    with Run(args, envs, agent, **parts) as run:
        metrics, actor = {}, Actor(agent)  # metrics of the last gradient step
        while run.is_running():
            # Act: one step in every environment.
            obs = envs.obs.copy()
            if envs.steps < args.learning_starts:
                actions = torch.empty(shape).uniform_(-1, 1).numpy()
            else:
                actions = act(actor, obs, torch.randn(shape).numpy())
            next_obs, rewards, terminated, truncated = envs.step(to_bounds(actor, actions))
            buffer.add(obs, actions, rewards, next_obs, terminated, truncated)

            # Learn: the gradient steps that are due in these N steps.
            first = max(envs.steps - args.num_envs + 1, args.learning_starts)
            for step in range(first, envs.steps + 1):
                if step % args.train_frequency == 0:
                    for _ in range(args.gradient_steps):
                        batch = Batch(*(part.to(device) for part in buffer.sample(args.batch_size)))
                        metrics = update(agent, target_agent, optimizer, batch, args)
                    actor = Actor(agent)

            # Log, evaluate, save.
            if run.is_due(LOG_FREQUENCY):
                run.log(metrics)
            if run.is_due(args.eval_frequency):
                run.evaluate()
            if run.is_due(args.checkpoint_frequency):
                run.save()
        return run.finish()


def play(args: Args, agent: Agent, obs: np.ndarray) -> np.ndarray:
    """How the trained policy is evaluated: observations (N, O) -> actions (N, K)."""
    actor = Actor(agent)
    return to_bounds(actor, act(actor, obs))


def evaluate(args: Args, network: nn.Module, gif: Path | None = None) -> tuple[float, float]:
    """Plays args.eval_episodes whole episodes, the same ones each time: mean return and length.

    Uses its own environments, and leaves the random state of the training as it is. Records the
    first episode to the file `gif`, if given.
    """
    num_envs, frames, stride = min(args.num_envs, args.eval_episodes), [], 2
    quota = [len(range(i, args.eval_episodes, num_envs)) for i in range(num_envs)]  # for each
    envs = Envs(args, num_envs, EVALUATION, draw=gif is not None)
    with contextlib.closing(envs), torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.seed)
        envs.reset()
        while len(which := np.flatnonzero(np.less(envs.episodes, quota))) > 0:
            if gif is not None and envs.episodes[0] == 0 and envs.lengths[0] % stride == 0:
                frames.append(envs.render())
                if len(frames) > MAX_FRAMES:  # faster from now on: every fourth frame, eighth ...
                    frames, stride = frames[::2], 2 * stride
            envs.step(play(args, network, envs.obs[which]), which)
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
