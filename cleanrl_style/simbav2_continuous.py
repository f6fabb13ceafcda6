# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch>=2.4.0", "gymnasium[classic-control]>=1.0.0", "tyro>=1.0.16", "tensorboard>=2.20.0",
#   "tqdm>=4.66.0",
# ]
# ///
r"""SimbaV2 for flat observations and continuous actions.

Paper    Lee et al. (2025), "Hyperspherical normalization for scalable deep reinforcement learning",
         and the authors' code. What it takes from SAC: Haarnoja et al. (2018), "Soft actor-critic
         algorithms and applications". Distributions: Bellemare, Dabney, Munos (2017), "A
         distributional perspective on reinforcement learning".
Idea     Soft actor-critic (SAC, sac_continuous.py) with networks in which nothing can grow. The
         features h and the weights of each unit have length 1: n(x) is x / |x|. Lengths are left to
         scalers c, learned factors of each number. How far a block goes, alpha, is one, too.

             h       = n(c * W n([x; 3]))     x: normalised inputs; from the 3 one can tell |x|
             h      <- n(h + alpha * (n(W2 relu(c * W1 h)) - h))     in each block
             outputs = W2 (c * W1 h) + b
             W      <- n(W), row by row, after each gradient step

         Gradients cannot grow either. As in C51, a critic learns the distribution Z(s, a) of the
         return, on M atoms from -5 to 5, by cross-entropy. For returns to lie there, rewards are
         divided by the deviation of G_t = gamma * G_t-1 + r_t, or by max |G| / 5 if this is more.

             m       = on the atoms, the distribution of r, if the episode terminated, or else of
                       r + gamma * (Z_target(s', a') - temperature * log pi(a'|s')), a' ~ pi(.|s')
             J_Q     = mean of -sum_i m_i * log p_i(s, a)         p_i: probability of atom i
             J_pi    = mean of temperature * log pi(b|s) - Q(s, b)     b ~ pi(.|s), Q: mean of Z

         Weights of Z_target are averages of the critic's, so a little shorter than 1; the authors
         leave them so. They choose gamma = 1 - 5 / (steps of an episode), from 0.95 to 0.995.
Differs  For a CPU: narrower networks (authors: 128 and 512 units), 51 atoms (101), batches of 128
         (256), 1,000 random steps (5,000), one gradient step a step (2, where an action is taken
         twice), a higher learning rate (1e-4 to 5e-5). One critic, as theirs where nothing
         terminates; elsewhere, they take two (--num-critics 2). The last reward of an episode
         counts in its own G; in their code, in the next one's. All gradients are taken at the same
         weights, in one step of Adam. At a time limit, m counts the rewards that would have
         followed (it bootstraps). N environments are stepped in parallel; updates are counted in
         single steps.
Shapes   N environments; B transitions of a batch; O numbers of an observation; K of an action; C
         critics; M atoms; U features.
Run      python simbav2_continuous.py
         python simbav2_continuous.py --env-id Hopper-v5 --total-timesteps 100000 --gamma 0.995 \
             --learning-starts 5000 --num-critics 2 --compile    (needs gymnasium[mujoco])
Expect   Return of the deterministic policy over 100 episodes, mean over seeds 1 to 5 (worst to best
         seed), and median wall time with start-up and evaluation, on one core of an AMD EPYC that
         had other work, too:
             Pendulum-v1    -149.1 (-152.5 to -146.0)    10k steps    243 s
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

SCRIPT = "simbav2_continuous"  # named in checkpoints and messages
LOG_FREQUENCY = 1_000  # steps between points of the losses
LOG_STD_ENDS = -10, 2  # of the Gaussian before tanh, as the authors have it
SHIFT = 3.0  # is appended to inputs
EXPANSION = 4  # units in a block, to one feature
SMALL = 1e-8  # against a division by 0

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
    total_timesteps: Steps = 10_000  # environment steps to train for, at least
    num_envs: SmallCount = 1  # parallel environments (N)

    learning_rate: Positive = 1e-3  # step size of the optimizer
    final_learning_rate: Positive = 5e-4  # the same at the end; it gets there linearly
    buffer_size: Size = 1_000_000  # transitions in the replay buffer
    gamma: Fraction = 0.975  # discount factor
    num_atoms: Annotated[int, 2, 4096] = 51  # atoms of a return's distribution (M)
    max_return: Positive = 5.0  # highest atom, minus the lowest; rewards are scaled to fit
    tau: Fraction = 0.005  # step of the target network towards the Q-network; 1: a copy
    batch_size: Count = 128  # transitions in a minibatch (B)
    learning_starts: Steps = 1_000  # environment steps before the first update
    train_frequency: Steps = 1  # environment steps between updates
    gradient_steps: Count = 1  # gradient steps in an update
    actor_width: SmallCount = 64  # features of the policy
    actor_blocks: SmallCount = 1  # blocks of the policy
    critic_width: SmallCount = 128  # features of a critic (U)
    critic_blocks: SmallCount = 2  # blocks of a critic
    num_critics: SmallCount = 1  # critics (C)
    initial_alpha: Positive = 0.01  # temperature at first; then the one that keeps the entropy at H

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
        if self.learning_starts < self.batch_size:
            raise ValueError("--learning-starts must be at least --batch-size")
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


class UnitLinear(nn.Linear):
    """A linear layer without bias. The weights of each output have length 1, from the start."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)
        nn.init.orthogonal_(self.weight)
        self.project()

    @torch.no_grad()
    def project(self) -> None:
        """Brings the rows of weights, (outputs, inputs), back to length 1."""
        self.weight.copy_(to_sphere(self.weight))


class Scaler(nn.Module):
    """A learned factor for each number: `initial` at first. It is stored as a multiple of initial /
    scale, and moves in such steps: `scale` is what Adam sees at first.
    """

    def __init__(self, size: int, initial: float, scale: float) -> None:
        super().__init__()
        self.weight, self.unit = nn.Parameter(torch.full((size,), scale)), initial / scale

    def forward(self, rows: Tensor) -> Tensor:
        """(..., size) -> (..., size)."""
        return self.weight * self.unit * rows


class Block(nn.Module):
    """A residual block on the sphere: features go a part alpha of the way to what an MLP says."""

    def __init__(self, width: int, alpha: float) -> None:
        super().__init__()
        units = EXPANSION * width
        self.first, self.second = UnitLinear(width, units), UnitLinear(units, width)
        self.scaler = Scaler(units, math.sqrt(2 / units), math.sqrt(2 / units))
        self.alpha = Scaler(width, alpha, 1 / math.sqrt(width))

    def forward(self, features: Tensor) -> Tensor:
        """(..., U) -> (..., U), of length 1."""
        hidden = self.scaler(self.first(features)).relu() + SMALL  # not all of them are 0
        proposal = to_sphere(self.second(hidden))
        return to_sphere(features + self.alpha(proposal - features))


class Encoder(nn.Module):
    """From inputs to features on the sphere. At first, alpha is 1 / (number of blocks + 1)."""

    def __init__(self, inputs: int, width: int, num_blocks: int) -> None:
        super().__init__()
        self.embedding = UnitLinear(inputs + 1, width)
        self.scaler = Scaler(width, math.sqrt(2 / width), math.sqrt(2 / width))
        self.blocks = nn.ModuleList(Block(width, 1 / (num_blocks + 1)) for _ in range(num_blocks))

    def forward(self, inputs: Tensor) -> Tensor:
        """(..., inputs) -> (..., U), of length 1."""
        features = to_sphere(self.scaler(self.embedding(shift(inputs))))
        for block in self.blocks:
            features = block(features)
        return features


class Head(nn.Module):
    """From features to outputs: two linear layers with a scaler in between, and biases."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.first, self.second = UnitLinear(width, width), UnitLinear(width, outputs)
        self.scaler, self.bias = Scaler(width, 1.0, 1.0), nn.Parameter(torch.zeros(outputs))

    def forward(self, features: Tensor) -> Tensor:
        """(..., U) -> (..., outputs)."""
        return self.second(self.scaler(self.first(features))) + self.bias


class Critics(nn.Module):
    """Z_1 to Z_C: distributions of the return. They see actions in (-1, 1)."""

    def __init__(self, obs_size: int, action_size: int, args: Args) -> None:
        super().__init__()
        atoms = torch.linspace(-args.max_return, args.max_return, args.num_atoms)
        self.register_buffer("atoms", atoms, persistent=False)  # Args has them, not checkpoints
        self.networks = nn.ModuleList(
            nn.Sequential(
                Encoder(obs_size + action_size, args.critic_width, args.critic_blocks),
                Head(args.critic_width, args.num_atoms),
            )
            for _ in range(args.num_critics)
        )

    def forward(self, obs: Tensor, actions: Tensor) -> Tensor:
        """Normalised observations (B, O), actions (B, K) -> logits of p_k(s, a) (C, B, M)."""
        inputs = torch.cat([obs, actions], dim=1)
        return torch.stack([network(inputs) for network in self.networks])


class Agent(nn.Module):
    """pi(a|s), its critics, its temperature, as a logarithm, and statistics of observations.

    pi is a diagonal Gaussian, whose means and standard deviations depend on s, squashed by tanh.
    Actions in (-1, 1) are scaled to low and high (K,).
    """

    def __init__(self, obs_size: int, low: np.ndarray, high: np.ndarray, args: Args) -> None:
        super().__init__()
        self.register_buffer("low", torch.tensor(low))
        self.register_buffer("high", torch.tensor(high))
        self.obs_statistics = RunningStatistics(obs_size)
        self.encoder = Encoder(obs_size, args.actor_width, args.actor_blocks)
        self.heads = nn.ModuleList(Head(args.actor_width, len(low)) for _ in range(2))
        self.critics = Critics(obs_size, len(low), args)
        self.log_alpha = nn.Parameter(torch.tensor(math.log(args.initial_alpha)))

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised observations (B, O) -> means and log standard deviations before tanh, (B, K)
        each.
        """
        features, (least, most) = self.encoder(obs), LOG_STD_ENDS
        means, outputs = (head(features) for head in self.heads)
        return means, least + (most - least) * (1 + outputs.tanh()) / 2


def make_network(args: Args, envs: "Envs") -> Agent:
    """A policy with its C critics for these environments, with the bounds of their actions."""
    low, high = envs.action_space.low, envs.action_space.high
    return Agent(envs.obs.shape[1], low, high, args)


# ---- The algorithm -------------------------------------------------------------------------------


def to_sphere(rows: Tensor) -> Tensor:
    """n(x) = x / |x|: (..., size) -> (..., size), of length 1."""
    return F.normalize(rows, dim=-1, eps=SMALL)


def shift(inputs: Tensor) -> Tensor:
    """n([x; 3]): (..., inputs) -> (..., inputs + 1), of length 1.

    Of n(x) alone, nobody could tell how long x was.
    """
    return to_sphere(F.pad(inputs, (0, 1), value=SHIFT))


def project_weights(network: nn.Module) -> None:
    """Brings all weights of linear layers back to the sphere, row by row."""
    for module in network.modules():
        if isinstance(module, UnitLinear):
            module.project()


class Actor:
    """The policy in NumPy, with its bounds: for a few rows, several times as fast as in PyTorch.

    It has the statistics of observations as they are when it is made.
    """

    def __init__(self, agent: Agent) -> None:
        def arrays(*parts: nn.Module) -> list[np.ndarray]:
            """What each of them multiplies by."""
            factors = (part.weight.detach() * getattr(part, "unit", 1) for part in parts)
            return [factor.cpu().numpy() for factor in factors]

        encoder, statistics = agent.encoder, agent.obs_statistics
        self.mean = statistics.mean.cpu().numpy()
        self.deviation = (statistics.variance + SMALL).sqrt().cpu().numpy()
        self.embedding = arrays(encoder.embedding, encoder.scaler)
        self.blocks = [arrays(b.first, b.scaler, b.second, b.alpha) for b in encoder.blocks]
        self.heads = [
            (*arrays(head.first, head.scaler, head.second), head.bias.detach().cpu().numpy())
            for head in agent.heads
        ]
        self.low, self.high = agent.low.cpu().numpy(), agent.high.cpu().numpy()

    def __call__(self, obs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Observations (N, O) -> means and standard deviations before tanh, (N, K) each."""

        def unit(rows: np.ndarray) -> np.ndarray:
            return rows / np.linalg.norm(rows, axis=1, keepdims=True).clip(SMALL)

        inputs = (obs - self.mean) / self.deviation
        inputs = np.concatenate([inputs, np.full((len(obs), 1), SHIFT, np.float32)], axis=1)
        weight, scale = self.embedding
        features = unit(unit(inputs) @ weight.T * scale)
        for first, scale, second, alpha in self.blocks:
            hidden = np.maximum(features @ first.T * scale, 0) + np.float32(SMALL)
            features = unit(features + alpha * (unit(hidden @ second.T) - features))
        means, outputs = (
            features @ first.T * scale @ second.T + bias
            for first, scale, second, bias in self.heads
        )
        least, most = LOG_STD_ENDS
        return means, np.exp(least + (most - least) * (1 + np.tanh(outputs)) / 2)


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


def sample_actions(means: Tensor, log_std: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Actions a = tanh(u), u = mean + deviation * noise, and log pi(a|s), in nats (Haarnoja et
    al., appendix C): three of (B, K) -> (B, K), (B,).

    It is the density of a in (-1, 1): that of u divided by the slope of tanh, 1 - tanh(u)^2, which
    is 4 / (e^u + e^-u)^2. In this form its logarithm is exact also where tanh(u) rounds to 1.
    """
    u = means + log_std.exp() * noise
    log_density = -noise.square() / 2 - log_std - math.log(2 * math.pi) / 2
    log_slope = 2 * (math.log(2) - u - F.softplus(-2 * u))
    return u.tanh(), (log_density - log_slope).sum(1)


def expected_return(logits: Tensor, atoms: Tensor) -> Tensor:
    """Q = sum_i p_i * z_i, where p is the softmax of the logits: (..., M), (M,) -> (...)."""
    return logits.softmax(-1) @ atoms


def project(
    probs: Tensor, atoms: Tensor, rewards: Tensor, terminated: Tensor, gamma: float
) -> Tensor:
    """m, the distribution of r + gamma * Z, or of r if terminated, on the atoms.

    Z is z_j with the probability p_j: (B, M), (M,), (B,), (B,) -> (B, M). Positions are measured
    in atoms, 0 to M - 1. As atom i takes part by its distance from them, and not by a position
    rounded down or up, no mass is lost where one falls on an atom.
    """
    dz, indices = (atoms[-1] - atoms[0]) / (len(atoms) - 1), torch.arange(len(atoms)).to(atoms)
    returns = rewards[:, None] + gamma * atoms * ~terminated[:, None]
    positions = ((returns - atoms[0]) / dz).clamp(0, len(atoms) - 1)
    shares = (1 - (positions[:, None] - indices[:, None]).abs()).clamp(min=0)  # (B, i, j)
    return (shares * probs[:, None]).sum(2)


def td_target(
    rewards: Tensor, terminated: Tensor, next_logits: Tensor, next_log_probs: Tensor, alpha: Tensor,
    atoms: Tensor, gamma: float,
) -> Tensor:  # fmt: skip
    """m, the distribution of r + gamma * (Z_target(s', a') - alpha * log pi(a'|s')), or of r if
    terminated, on the atoms: (B,), (B,), (C, B, M), (B,), scalar, (M,) -> (B, M).

    Z_target is that of the C distributions whose mean is the least.
    """
    least = expected_return(next_logits, atoms).argmin(0)
    probs = next_logits.take_along_dim(least[None, :, None], 0).squeeze(0).softmax(1)
    bonus = -gamma * alpha * next_log_probs * ~terminated
    return project(probs, atoms, rewards + bonus, terminated, gamma)


def critic_losses(logits: Tensor, target: Tensor) -> Tensor:
    """J_Q of each critic, mean of -sum_i m_i * log p_i(s, a): (C, B, M), (B, M) -> (C,)."""
    return -(target * logits.log_softmax(2)).sum(2).mean(1)


def policy_loss(q_values: Tensor, log_probs: Tensor, alpha: Tensor) -> Tensor:
    """J_pi, mean of alpha * log pi(b|s) - min_k Q_k(s, b) (Haarnoja et al., equation 9):
    (C, B), (B,) -> scalar.
    """
    return (alpha * log_probs - q_values.min(0).values).mean()


def temperature_loss(log_alpha: Tensor, log_probs: Tensor, target_entropy: float) -> Tensor:
    """J_alpha, mean of -alpha * (log pi(b|s) + H) (Haarnoja et al., equation 18):
    scalar, (B,), H -> scalar.

    Where the entropy, the mean of -log pi, is less than H, alpha grows.
    """
    return -(log_alpha.exp() * (log_probs + target_entropy)).mean()


@torch.no_grad()
def update_target(target_network: nn.Module, q_network: nn.Module, tau: float) -> None:
    """Each weight of the target network <- (1 - tau) * itself + tau * the Q-network's."""
    for target, source in zip(target_network.parameters(), q_network.parameters()):
        target.lerp_(source, tau)


class Batch(NamedTuple):
    """B transitions, with K numbers an action. Row b of each:"""

    obs: Tensor  # observation, (B, O)
    actions: Tensor  # action in (-1, 1), (B, K)
    rewards: Tensor  # reward, (B,)
    next_obs: Tensor  # next observation; at the end of an episode its last one, (B, O)
    terminated: Tensor  # whether the episode terminated; False if truncated, (B,)


def compute_gradient(
    agent: nn.Module, target_critics: nn.Module, batch: Batch, noise: Tensor, args: Args
) -> dict[str, Tensor]:
    """The gradients of J_Q, J_pi and J_alpha on B transitions with normalised observations and
    rewards -> metrics. noise is standard normal, (2, B, K): for the actions a' and b.
    """
    log_alpha, atoms = agent.log_alpha, agent.critics.atoms
    with torch.no_grad():  # the target is a constant
        alpha = log_alpha.exp()
        next_actions, next_log_probs = sample_actions(*agent(batch.next_obs), noise[0])
        next_logits = target_critics(batch.next_obs, next_actions)
        target = td_target(
            batch.rewards, batch.terminated, next_logits, next_log_probs, alpha, atoms, args.gamma
        )
    logits = agent.critics(batch.obs, batch.actions)
    losses = critic_losses(logits, target)

    actions, log_probs = sample_actions(*agent(batch.obs), noise[1])
    constants = {name: weight.detach() for name, weight in agent.critics.named_parameters()}
    policy_logits = functional_call(agent.critics, constants, (batch.obs, actions))
    actor_loss = policy_loss(expected_return(policy_logits, atoms), log_probs, alpha)

    alpha_loss = temperature_loss(log_alpha, log_probs.detach(), -actions.shape[1] / 2)
    loss = losses.sum() + actor_loss + alpha_loss  # no weight gets a gradient from two of them
    loss.backward()
    return {
        "losses/td_loss": losses.detach().mean(),
        "losses/q_values": expected_return(logits.detach(), atoms).mean(),
        "losses/policy_loss": actor_loss.detach(),
        "losses/entropy": -log_probs.detach().mean(),
        "losses/alpha": alpha,
    }


def update(
    agent: nn.Module, target_critics: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch,
    args: Args,
) -> dict[str, Tensor]:  # fmt: skip
    """One gradient step on a normalised batch -> metrics. The target critics follow."""
    noise = torch.randn(2, *batch.actions.shape).to(batch.obs.device)
    optimizer.zero_grad()
    metrics = compiled(compute_gradient, args)(agent, target_critics, batch, noise, args)
    optimizer.step()
    project_weights(agent)
    update_target(target_critics, agent.critics, args.tau)
    return metrics


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


class ReturnScaler(nn.Module):
    """Divides rewards, so that returns have a deviation of about 1 and rarely exceed max_return.

    Both are measured on G_t = gamma * G_t-1 + r_t, which adds up past rewards, as returns add up
    those to come. No G exceeds max_return; a return may, and is then clipped to the atoms.
    """

    def __init__(self, num_envs: int, gamma: float, max_return: float) -> None:
        super().__init__()
        self.gamma, self.max_return = gamma, max_return
        self.statistics = RunningStatistics(1)
        self.register_buffer("sums", torch.zeros(num_envs))  # gamma * G_t-1, 0 at a start
        self.register_buffer("highest", torch.tensor(0.0))  # max |G|

    @torch.no_grad()
    def update(self, rewards: Tensor, ended: Tensor) -> None:
        """Adds the rewards of a step of N environments, and whether it ended an episode: two of
        (N,).
        """
        sums = self.sums + rewards
        self.statistics.update(sums[:, None])
        self.highest.copy_(torch.maximum(self.highest, sums.abs().max()))
        self.sums.copy_(self.gamma * sums * ~ended)

    def forward(self, rewards: Tensor) -> Tensor:
        """Rewards (B,) -> (B,)."""
        deviation = (self.statistics.variance + SMALL).sqrt()
        return rewards / torch.maximum(deviation, self.highest / self.max_return)


def normalize(batch: Batch, agent: Agent, return_scaler: ReturnScaler) -> Batch:
    """The same transitions as the networks see them, by all that was measured so far."""
    mean, variance = agent.obs_statistics.mean, agent.obs_statistics.variance
    obs, next_obs = (
        (part - mean) / (variance + SMALL).sqrt() for part in (batch.obs, batch.next_obs)
    )
    return batch._replace(obs=obs, next_obs=next_obs, rewards=return_scaler(batch.rewards))


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
    target_critics = deepcopy(agent.critics)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, fused=True)
    shape = args.num_envs, envs.action_space.shape[0]
    buffer = ReplayBuffer(args.buffer_size, args.num_envs, envs.obs.shape[1], shape[1])
    return_scaler = ReturnScaler(args.num_envs, args.gamma, args.max_return).to(device)
    parts = {"target_critics": target_critics, "optimizer": optimizer, "buffer": buffer}
    parts["return_scaler"] = return_scaler
    with Run(args, envs, agent, **parts) as run:
        metrics = {}  # of the last gradient step
        while run.is_running():
            change = args.final_learning_rate - args.learning_rate
            learning_rate = args.learning_rate + change * envs.steps / args.total_timesteps
            optimizer.param_groups[0]["lr"] = learning_rate

            # Act: one step in every environment.
            obs = envs.obs.copy()
            agent.obs_statistics.update(torch.from_numpy(obs).to(device))
            actor = Actor(agent)
            if envs.steps < args.learning_starts:
                actions = torch.empty(shape).uniform_(-1, 1).numpy()
            else:
                actions = act(actor, obs, torch.randn(shape).numpy())
            next_obs, rewards, terminated, truncated = envs.step(to_bounds(actor, actions))
            buffer.add(obs, actions, rewards, next_obs, terminated, truncated)
            outcome = torch.from_numpy(rewards), torch.from_numpy(terminated | truncated)
            return_scaler.update(*(part.to(device) for part in outcome))

            # Learn: the gradient steps that are due in these N steps.
            first = max(envs.steps - args.num_envs + 1, args.learning_starts)
            for step in range(first, envs.steps + 1):
                if step % args.train_frequency == 0:
                    for _ in range(args.gradient_steps):
                        batch = Batch(*(part.to(device) for part in buffer.sample(args.batch_size)))
                        batch = normalize(batch, agent, return_scaler)
                        metrics = update(agent, target_critics, optimizer, batch, args)

            # Log, evaluate, save.
            if run.is_due(LOG_FREQUENCY):
                run.log(metrics | {"charts/learning_rate": learning_rate})
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
