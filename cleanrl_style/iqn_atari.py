# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch>=2.6.0", "gymnasium[atari]>=1.4.0", "ale-py>=0.12.1", "tyro>=1.0.16",
#   "tensorboard>=2.20.0", "tqdm>=4.66.0",
# ]
# ///
r"""Implicit quantile networks (IQN) from pixels, for Atari games.

Paper    Dabney, Ostrovski, Silver, Munos (2018), "Implicit quantile networks for distributional
         reinforcement learning", Algorithm 1, equations 3 and 4. Double Q-learning: van Hasselt
         et al. (2016), "Deep reinforcement learning with double Q-learning", equation 4.
Idea     DQN learns Q(s, a), the mean of the return; QR-DQN, the quantiles of the return at fixed
         probabilities tau. IQN makes tau an input: theta(s, a, tau) is to exceed the return with
         the probability tau, for any tau. Each use draws new ones, uniformly from [0, 1):

             Q(s, a) = mean of theta(s, a, tau) over A random tau
             a*      = argmax_a' Q_target(s', a')
             y_j     = r + gamma * theta_target(s', a*, tau'_j)     or r alone, if the episode
                       terminated
             u_ij    = y_j - theta(s, a, tau_i)
             loss    = sum over i of the mean over j of |tau_i - (1 if u_ij < 0 else 0)| *
                       Huber(u_ij), mean over B transitions (s, a, r, s')

         A theta that is too low costs tau per unit, one that is too high 1 - tau: so it comes to
         rest where a share tau of the y_j is below it. Huber(u) is u^2 / 2 up to |u| = 1, and
         |u| - 1/2 beyond. In the network, psi(s), what DQN's convolutions see, is multiplied unit
         by unit by phi(tau), a layer over cos(pi * i * tau), i = 0 to 63. The rest is DQN: replay
         buffer, target network, epsilon-greedy actions. With --double-q, the Q-network chooses a*.
Differs  M = T = 8, not 64 as in Dopamine: each tau costs a pass through the layer of 512 units.
         The learning rate is 1e-4.
         Q_target is copied every 250 gradient steps, not every 10,000; epsilon decays from the
         first step on. N games are played side by side, with one gradient step for every 4 of their
         steps. The learner sees the sign of a reward, and a lost life as an end; what is logged are
         the true scores of whole games. A step that a time limit truncated is not learned from.
         With --norm-obs, pixels are normalised by running statistics of the buffer.
Shapes   N games; B transitions of a batch; K actions; R rows of the buffer; M, T and A random tau
         of theta, of its targets and of Q (the paper's N, N' and K). A step is four frames.
Run      python iqn_atari.py
         python iqn_atari.py --env-id ALE/Pong-v5 --total-timesteps 600000 --norm-obs --double-q \
             --num-action-quantiles 8 --buffer-size 100000 --learning-starts 10000 \
             --target-network-frequency 500 --exploration-fraction 0.125 --learning-rate 3e-4
Expect   10 games after training, epsilon 0.01, mean over seeds 1 and 2 (worst to best seed), and
         median time in bfloat16 on one core of an AMD EPYC that had other work, too. Pong with the
         second command:
             10.9 (5.4 to 16.4)    600k steps    150 min
         It wins, but by less than DQN, which has 19.7 with the flags that both know. Around step
         300k, both seeds fell back for a while.
"""

import contextlib
import ctypes
import inspect
import json
import math
import os
import re
import shlex
import shutil
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
from typing import Annotated, Literal, NamedTuple, get_type_hints

import ale_py
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

gym.register_envs(ale_py)
ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # no banner

SCRIPT = "iqn_atari"  # named in checkpoints and messages
STACK = 4  # frames of an observation
COSINES = 64  # that stand for a tau (the paper's n)
LOG_FREQUENCY = 1_000  # steps between points of the losses
SAMPLE = 1_000  # observations of the buffer that --norm-obs adds at a time

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
    env_id: str = "ALE/Breakout-v5"  # Gymnasium environment, or my_module:MyEnv-v0
    env_kwargs: str = "{}"  # of the environment, as JSON: '{"is_slippery": false}'
    seed: Annotated[int, 0, 2**63 - 1] = 1  # of all random numbers in the run
    total_timesteps: Steps = 10_000_000  # environment steps to train for, at least
    num_envs: SmallCount = 8  # parallel environments (N)

    learning_rate: Positive = 1e-4  # step size of the optimizer
    adam_epsilon: Positive = 1.5e-4  # is added to the denominator of Adam's step
    anneal_lr: bool = False  # lower the learning rate linearly to 0 over the run
    buffer_size: Size = 1_000_000  # transitions in the replay buffer
    gamma: Fraction = 0.99  # discount factor
    num_quantiles: SmallCount = 8  # quantiles of each return Z(s, a) (M)
    num_target_quantiles: SmallCount = 8  # quantiles of Z(s', a*) that they learn from (T)
    num_action_quantiles: SmallCount = 32  # quantiles whose mean is Q(s, a), to choose actions (A)
    tau: Fraction = 1.0  # step of the target network towards the Q-network; 1: a copy
    target_network_frequency: Steps = 1_000  # environment steps between updates of it
    batch_size: Count = 32  # transitions in a minibatch (B)
    start_e: Fraction = 1.0  # epsilon, the probability of a random action, at the start
    end_e: Fraction = 0.01  # epsilon after its decay
    exploration_fraction: Fraction = 0.1  # fraction of total-timesteps over which epsilon decays
    learning_starts: Steps = 80_000  # environment steps before the first update
    train_frequency: Steps = 4  # environment steps between updates
    double_q: bool = False  # the Q-network chooses the next action, the target network evaluates it
    max_grad_norm: Weight = 0.0  # largest norm of the gradient; 0: not clipped
    norm_obs: bool = False  # normalise observations by their running mean and standard deviation
    sticky_actions: Fraction = 0.0  # probability that the emulator repeats the last action
    eval_epsilon: Fraction = 0.01  # epsilon in evaluation, so that no game is stuck in a loop
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on CPUs with it

    exp_name: str = SCRIPT  # part of the name of the run's folder
    runs_dir: str = "runs"  # where the folders of runs are
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # cpu, cuda, cuda:1, mps
    compile: bool = False  # compile the gradient steps: 10 s at first, pays after a minute
    num_threads: Annotated[int, 0, 1024] = 0  # CPU threads of PyTorch; 0: one per core
    checkpoint_frequency: Frequency = 100_000  # steps between checkpoints; 0: only first and last
    eval_frequency: Frequency = 0  # steps between evaluations while training; 0: only at the end
    eval_episodes: Count = 10  # episodes of one evaluation
    capture_video: bool = False  # record the first episode of the last evaluation, as episode.gif
    resume: str | None = None  # folder of a run to resume; other flags replace the saved ones
    evaluate: str | None = None  # folder of a run, or its best.pt, to evaluate without training

    def __post_init__(self) -> None:
        check(self)
        if self.learning_starts < max(self.batch_size, 8 * self.num_envs):
            raise ValueError("--learning-starts must be at least --batch-size and 8 * --num-envs")
        if self.buffer_size < self.learning_starts:
            raise ValueError("--buffer-size must be at least --learning-starts")
        if self.learning_starts >= self.total_timesteps:
            raise ValueError("--learning-starts must be less than --total-timesteps")


# ---- Environment and network ---------------------------------------------------------------------


def make_games(args: Args, num_envs: int, **picture: int) -> gym.vector.VectorEnv:
    """N games. Observations (N, 4, 84, 84) of uint8: the last four frames, newest last.

    The emulators begin a game by FIRE, if it is needed, and up to 30 no-ops, repeat each action for
    four frames, take the maximum of the last two for each pixel, in grey, and resize to 84 x 84.
    """
    if not args.env_id.startswith("ALE/"):
        if args.sticky_actions:
            raise UsageError(f"--sticky-actions is for the emulator; {args.env_id} has none")
        games = OwnGames(args, num_envs)
    else:
        what = f"--env-id {args.env_id!r} with --env-kwargs {args.env_kwargs!r}"
        with as_usage_error(what, gym.error.Error, ImportError, ValueError, TypeError):
            games = gym.make_vec(
                args.env_id, num_envs, autoreset_mode="SameStep", reward_clipping=False,
                repeat_action_probability=args.sticky_actions, **picture,
                **json.loads(args.env_kwargs),
            )  # fmt: skip
    obs_space, action_space = games.single_observation_space, games.single_action_space
    frames = isinstance(obs_space, gym.spaces.Box) and obs_space.dtype == np.uint8
    discrete = isinstance(action_space, gym.spaces.Discrete) and action_space.start == 0
    fits = frames and (picture or obs_space.shape == (STACK, 84, 84))
    if not (fits and discrete and action_space.n <= 256):
        raise UsageError("needs a game such as ALE/Breakout-v5, or observations Box(0, 255, "
                         "(4, 84, 84), uint8), the newest frame last, and up to 256 Discrete "
                         f"actions; {args.env_id} has {obs_space} and {action_space}")  # fmt: skip
    return games


class QNetwork(nn.Module):
    """Quantiles of each action's return, at any tau: DQN's layers, with tau after the third."""

    def __init__(self, num_actions: int, bfloat16: bool, norm_obs: bool) -> None:
        super().__init__()
        self.bfloat16 = bfloat16
        self.obs_statistics = RunningStatistics(84 * 84) if norm_obs else None  # of each pixel
        self.features = nn.Sequential(  # psi
            nn.Conv2d(STACK * 16, 32, 2), nn.ReLU(),  # 8 x 8 pixels, stride 4: (B, 32, 20, 20)
            nn.Conv2d(32, 64, 4, stride=2), nn.ReLU(),  # (B, 64, 9, 9)
            nn.Conv2d(64, 64, 3, stride=1), nn.ReLU(), nn.Flatten(),  # (B, 64 * 7 * 7)
        )  # fmt: skip
        self.embedding = nn.Sequential(nn.Linear(COSINES, 64 * 7 * 7), nn.ReLU())  # phi
        self.hidden = nn.Sequential(nn.Linear(64 * 7 * 7, 512), nn.ReLU())
        self.head = nn.Linear(512, num_actions)
        for layer in (*self.features, *self.embedding, *self.hidden):
            if isinstance(layer, nn.Conv2d | nn.Linear):  # the default shrinks the signal in each
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)
        self.to(memory_format=torch.channels_last)  # twice as fast on a CPU

    def forward(self, obs: Tensor, taus: Tensor) -> Tensor:
        """Frames (B, 4, 84, 84) of uint8 and tau (B, M) -> quantiles theta(s, ., tau) (B, K, M)."""
        pixels, cosines = self.normalize(obs), cosine_embedding(taus, COSINES)
        with torch.autocast(obs.device.type, torch.bfloat16, enabled=self.bfloat16):
            products = self.features(pixels).unsqueeze(1) * self.embedding(cosines)
            hidden = self.hidden(products)  # (B, M, 512), from (B, M, 64 * 7 * 7)
        quantiles = self.head(hidden.float())  # bfloat16 has 2 digits: too few to compare actions
        return quantiles.transpose(1, 2)

    def normalize(self, obs: Tensor) -> Tensor:
        """Frames (B, 4, 84, 84) of uint8 -> what the convolutions see, (B, 64, 21, 21)."""
        dtype = torch.bfloat16 if self.bfloat16 else torch.float32  # both hold 0 to 255 exactly
        pixels = blocks(obs).to(dtype)
        if self.obs_statistics is None:
            pixels.div_(255)
        else:
            statistics = self.obs_statistics.mean, (self.obs_statistics.variance + 1e-8).sqrt()
            mean, deviation = (
                values.to(dtype).view(21, 21, 1, 16).expand(21, 21, STACK, 16).contiguous()
                for values in statistics
            )
            pixels.sub_(mean).div_(deviation).clamp_(-10, 10)
        return pixels.flatten(3).permute(0, 3, 1, 2)  # in memory, channels come last


def blocks(frames: Tensor) -> Tensor:
    """Frames (B, C, 84, 84) of uint8 -> blocks of 4 x 4 pixels, (B, 21, 21, C, 16).

    With the pixels of a block as channels, a convolution of 8 x 8 pixels with stride 4 is one of
    2 x 2 blocks: the same function, which a CPU computes faster in bfloat16.
    """
    words = frames.contiguous().view(torch.int32)  # four pixels of a row, copied as one number
    return words.unflatten(2, (21, 4)).permute(0, 2, 4, 1, 3).contiguous().view(torch.uint8)


def use_bfloat16(args: Args) -> bool:
    """auto: on CPUs with instructions for it."""
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    automatic = args.precision == "auto" and args.device == "cpu" and supported()
    return automatic or args.precision == "bfloat16"


def make_network(args: Args, envs: "Envs") -> QNetwork:
    """A Q-network for these games."""
    return QNetwork(int(envs.action_space.n), use_bfloat16(args), args.norm_obs)


# ---- The algorithm -------------------------------------------------------------------------------


def linear_epsilon(step: int, start: float, end: float, duration: float) -> float:
    """Falls linearly from start at step 0 to end at step `duration`, and stays there."""
    return end if step >= duration else start + (end - start) * step / duration


def cosine_embedding(taus: Tensor, size: int) -> Tensor:
    """cos(pi * i * tau), i = 0 to size - 1, the inner part of equation 4: (...) -> (..., size)."""
    return torch.cos(math.pi * torch.arange(size).to(taus) * taus.unsqueeze(-1))


@torch.no_grad()
def act(q_network: nn.Module, obs: np.ndarray, epsilon: float, num_quantiles: int) -> np.ndarray:
    """Epsilon-greedy actions, where Q is the mean quantile at so many random tau, which are other
    ones for each row: observations (N, ...) -> (N,).
    """
    obs = torch.from_numpy(obs).to(next(q_network.parameters()).device)
    taus = torch.rand(len(obs), num_quantiles)
    q_values = q_network(obs, taus.to(obs.device)).mean(2).cpu()
    random_actions = torch.randint(q_values.shape[1], (len(q_values),))
    actions = torch.where(torch.rand(len(q_values)) < epsilon, random_actions, q_values.argmax(1))
    return actions.numpy()


def of_actions(quantiles: Tensor, actions: Tensor) -> Tensor:
    """The rows of these actions: (B, K, M), (B,) -> (B, M)."""
    return quantiles.take_along_dim(actions[:, None, None], 1).squeeze(1)


def quantile_target(
    rewards: Tensor, terminated: Tensor, next_quantiles: Tensor, next_q: Tensor, gamma: float
) -> Tensor:
    """y_j = r + gamma * theta_target(s', a*, tau'_j), or r if terminated, where a* is best by
    next_q (Algorithm 1): (B,), (B,), (B, K, T), (B, K) -> (B, T).
    """
    best = of_actions(next_quantiles, next_q.argmax(1))
    return rewards[:, None] + gamma * best * ~terminated[:, None]


def quantile_huber_loss(quantiles: Tensor, taus: Tensor, targets: Tensor) -> Tensor:
    """|tau - (1 if u < 0 else 0)| * Huber(u), u = target - quantile, mean over the targets:
    (..., M), (..., M), (..., T) -> (..., M). Dimensions before the last are broadcast.

    Its minimum is near the tau quantile of the targets: exactly, were Huber(u) = |u|. Huber(u) is
    u^2 / 2 up to |u| = 1, and |u| - 1/2 beyond.
    """
    quantiles, targets = torch.broadcast_tensors(quantiles.unsqueeze(-1), targets.unsqueeze(-2))
    weights = torch.where(targets < quantiles, 1 - taus.unsqueeze(-1), taus.unsqueeze(-1))
    return (weights * F.huber_loss(quantiles, targets, reduction="none")).mean(-1)


def quantile_loss(quantiles: Tensor, taus: Tensor, targets: Tensor) -> Tensor:
    """Sum over the M quantiles, mean over the T targets and B transitions (equation 3, kappa = 1):
    (B, M), (B, M), (B, T) -> scalar.
    """
    return quantile_huber_loss(quantiles, taus, targets).sum(1).mean()


@torch.no_grad()
def update_target(target_network: nn.Module, q_network: nn.Module, tau: float) -> None:
    """Each weight of the target network <- (1 - tau) * itself + tau * the Q-network's."""
    for target, source in zip(target_network.parameters(), q_network.parameters()):
        target.lerp_(source, tau)


class Batch(NamedTuple):
    """B transitions. Row b of each:"""

    obs: Tensor  # observation, (B, 4, 84, 84)
    actions: Tensor  # action, (B,)
    rewards: Tensor  # sign of the reward, (B,)
    next_obs: Tensor  # next observation, (B, 4, 84, 84); not used where terminated
    terminated: Tensor  # whether a life or the game is over, (B,)


class Taus(NamedTuple):
    """Random tau for a gradient step, each in [0, 1) and independent of all others."""

    quantiles: Tensor  # of theta(s, a, .), (B, M)
    targets: Tensor  # of theta_target(s', a*, .), (B, T)
    actions: Tensor  # of theta(s', ., .), whose mean chooses a*, (B, A)


def draw_taus(args: Args) -> Taus:
    """New ones, for a batch."""
    sizes = args.num_quantiles, args.num_target_quantiles, args.num_action_quantiles
    return Taus(*(torch.rand(args.batch_size, size) for size in sizes))


def compute_gradient(
    q_network: nn.Module, target_network: nn.Module, batch: Batch, taus: Taus, args: Args
) -> dict[str, Tensor]:
    """The gradient of the quantile Huber loss on the B transitions of a batch -> metrics."""
    with torch.no_grad():  # the target is a constant
        chooser = q_network if args.double_q else target_network
        next_q = chooser(batch.next_obs, taus.actions).mean(2)
        next_quantiles = target_network(batch.next_obs, taus.targets)
        targets = quantile_target(
            batch.rewards, batch.terminated, next_quantiles, next_q, args.gamma
        )
    quantiles = of_actions(q_network(batch.obs, taus.quantiles), batch.actions)
    loss = quantile_loss(quantiles, taus.quantiles, targets)
    loss.backward()
    if args.max_grad_norm > 0:
        nn.utils.clip_grad_norm_(q_network.parameters(), args.max_grad_norm)
    return {"losses/td_loss": loss.detach(), "losses/q_values": quantiles.detach().mean()}


def update(
    q_network: nn.Module, target_network: nn.Module, optimizer: torch.optim.Optimizer,
    batch: Batch, taus: Taus, args: Args,
) -> dict[str, Tensor]:  # fmt: skip
    """One gradient step on a batch -> metrics."""
    optimizer.zero_grad()
    metrics = compiled(compute_gradient, args)(q_network, target_network, batch, taus, args)
    optimizer.step()
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


def newest_frames(obs: Tensor) -> Tensor:
    """Observations (..., 4, 84, 84) of uint8 -> newest frames (B, 84 * 84), block by block."""
    return blocks(obs[..., -1, :, :].reshape(-1, 1, 84, 84)).flatten(1).float()


# ---- Memory --------------------------------------------------------------------------------------


class ReplayBuffer:
    """The last R rows of N games, with each frame stored once, in a file that is mapped to memory.

    Row t is the step from t to t+1: the newest frame of observation t, the action, and what came of
    it. The other frames of observation t are in the three rows before, the newest one of t+1 is in
    the row after. `ages` counts the steps of a game before a row, up to 3: frames from before the
    game are drawn as 0. After a truncated step, the last observation is in no row, so this step is
    not drawn.

    A checkpoint leaves out the frames, which are gigabytes. Rows that are overwritten after it are
    appended to a journal first, and `load_state_dict` puts them back.
    """

    COLUMNS = "actions", "rewards", "terminated", "truncated", "ages"

    def __init__(self, num_rows: int, num_envs: int) -> None:
        self.num_rows, self.num_envs = num_rows, num_envs
        self.actions, self.ages = torch.zeros(2, num_rows, num_envs, dtype=torch.uint8)
        self.rewards = torch.zeros(num_rows, num_envs, dtype=torch.int8)
        self.terminated, self.truncated = torch.zeros(2, num_rows, num_envs, dtype=torch.bool)
        self.rows_written = self.saved_rows = 0  # in all, and at the last checkpoint
        self.journal = None

    def open(self, folder: Path, resume: bool) -> None:
        """Makes the file for the frames, or opens the one that is there."""
        self.folder, path = folder, folder / "replay.frames"
        shape = self.num_rows, self.num_envs, 84 * 84
        if not resume:
            with as_usage_error(f"cannot make {path}", OSError), open(path, "wb") as file:
                if math.prod(shape) > shutil.disk_usage(folder).free:  # or it would be filled first
                    raise OSError(f"--buffer-size needs {math.prod(shape) / 1e9:.1f} GB of disk")
                if hasattr(os, "posix_fallocate"):  # a full disk fails now, not hours later
                    os.posix_fallocate(file.fileno(), 0, math.prod(shape))
                file.truncate(math.prod(shape))
        elif not path.is_file() or path.stat().st_size != math.prod(shape):
            raise UsageError(f"{path} is missing, or --buffer-size or --num-envs do not fit it")
        self.file = np.memmap(path, np.uint8, "r+", shape=shape)
        self.frames = torch.from_numpy(self.file).view(-1, 84, 84)

    def add(
        self, obs: np.ndarray, actions: np.ndarray, rewards: np.ndarray, terminated: np.ndarray,
        truncated: np.ndarray, ages: np.ndarray,
    ) -> None:  # fmt: skip
        """One row: observations (N, 4, 84, 84), whose newest frames are kept, and five of (N,)."""
        row = self.rows_written % self.num_rows
        if self.num_rows <= self.rows_written < self.saved_rows + self.num_rows:
            with as_usage_error(f"cannot write to {self.folder}", OSError):
                row_bytes = self.file[row].nbytes  # of a row that belongs to the checkpoint
                if self.journal.write(self.file[row]) < row_bytes:
                    raise OSError("the disk is full")
        self.file[row] = obs[:, -1].reshape(self.num_envs, -1)
        values = actions, np.sign(rewards), terminated, truncated, np.minimum(ages, STACK - 1)
        for name, column in zip(self.COLUMNS, values):
            getattr(self, name)[row] = torch.from_numpy(column)
        self.rows_written += 1

    def sample(self, batch_size: int) -> Batch:
        """B transitions, uniformly; but not of the newest row and the three oldest, which may lack
        frames.
        """
        count = min(self.rows_written, self.num_rows) - STACK
        first = self.rows_written - 1 - count
        rows = envs = torch.empty(0, dtype=torch.int64)
        while len(rows) < batch_size:
            new_rows = (first + torch.randint(count, (batch_size,))) % self.num_rows
            new_envs = torch.randint(self.num_envs, (batch_size,))
            whole = ~self.truncated[new_rows, new_envs]
            if not whole.any() and self.truncated[: self.rows_written].all():
                raise UsageError("every step was truncated: there is nothing to learn from")
            rows, envs = torch.cat([rows, new_rows[whole]]), torch.cat([envs, new_envs[whole]])
        rows, envs = rows[:batch_size], envs[:batch_size]
        steps_back = torch.arange(STACK - 1, -2, -1)  # 3, 2, 1, 0, and -1 for the next observation
        window = ((rows[:, None] - steps_back) % self.num_rows) * self.num_envs + envs[:, None]
        frames = self.frames.index_select(0, window.flatten()).view(-1, STACK + 1, 84, 84)
        frames[(steps_back > self.ages[rows, envs][:, None]).nonzero(as_tuple=True)] = 0
        actions, rewards = self.actions[rows, envs].long(), self.rewards[rows, envs].float()
        return Batch(frames[:, :-1], actions, rewards, frames[:, 1:], self.terminated[rows, envs])

    def state_dict(self) -> dict:
        """All but the frames. From here on, rows that are overwritten go to a new journal."""
        for path in self.folder.glob("replay.journal-*"):  # all but that of the last checkpoint
            if path.name != f"replay.journal-{self.saved_rows}":
                path.unlink()
        with as_usage_error(f"cannot write to {self.folder}", OSError):
            self.file.flush()
            self.close()
            self.journal = open(self.folder / f"replay.journal-{self.rows_written}", "wb", 0)
        self.saved_rows = self.rows_written
        return {"rows_written": self.rows_written} | {n: getattr(self, n) for n in self.COLUMNS}

    def load_state_dict(self, state: dict) -> None:
        """Takes what `state_dict` gave, and puts back the frames that were overwritten since."""
        self.rows_written = self.saved_rows = int(state["rows_written"])
        for name in self.COLUMNS:
            getattr(self, name).copy_(state[name])
        path = self.folder / f"replay.journal-{self.rows_written}"
        rows = np.fromfile(path, np.uint8)
        rows = rows[: rows.size // self.file[0].size * self.file[0].size]  # without half a row
        rows = rows.reshape(-1, *self.file.shape[1:])
        first = max(self.rows_written, self.num_rows)  # until it is full, nothing is overwritten
        self.file[(first + np.arange(len(rows))) % self.num_rows] = rows
        self.journal = open(path, "wb", 0)  # empty: the frames are those of the checkpoint again

    def close(self) -> None:
        """Closes the journal."""
        if self.journal is not None:
            self.journal.close()


# ---- Training and evaluation ---------------------------------------------------------------------


def train(args: Args) -> "Result":
    """Trains a Q-network, from the start or from the checkpoint in args.resume."""
    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    envs = Envs(args, args.num_envs, TRAINING)
    q_network, target_network = make_network(args, envs), make_network(args, envs)
    q_network, target_network = q_network.to(device), target_network.to(device)
    target_network.load_state_dict(q_network.state_dict())
    target_network.obs_statistics = q_network.obs_statistics  # both see the same
    optimizer = torch.optim.Adam(
        q_network.parameters(), lr=args.learning_rate, eps=args.adam_epsilon, fused=True
    )
    buffer = ReplayBuffer(math.ceil(args.buffer_size / args.num_envs), args.num_envs)
    parts = {"target_network": target_network, "optimizer": optimizer, "buffer": buffer}
    with Run(args, envs, q_network, **parts) as run:
        metrics = {}  # of the last gradient step
        while run.is_running():
            if args.anneal_lr:
                remaining = 1 - envs.steps / args.total_timesteps
                optimizer.param_groups[0]["lr"] = args.learning_rate * remaining

            # Act.
            duration = args.exploration_fraction * args.total_timesteps
            epsilon = linear_epsilon(envs.steps, args.start_e, args.end_e, duration)
            obs, ages = envs.obs, envs.lengths.copy()
            actions = act(q_network, obs, epsilon, args.num_action_quantiles)
            envs.send(actions)

            # Learn, while the emulators step: what is due in these N steps.
            steps = envs.steps + args.num_envs
            for step in range(max(envs.steps + 1, args.learning_starts), steps + 1):
                update_due = step % args.target_network_frequency == 0
                if args.norm_obs and (update_due or step == args.learning_starts):
                    sample = newest_frames(buffer.sample(SAMPLE).obs)
                    q_network.obs_statistics.update(sample.to(device))
                if step % args.train_frequency == 0:
                    batch = Batch(*(part.to(device) for part in buffer.sample(args.batch_size)))
                    taus = Taus(*(part.to(device) for part in draw_taus(args)))
                    metrics = update(q_network, target_network, optimizer, batch, taus, args)
                if update_due:
                    update_target(target_network, q_network, args.tau)

            # Store what came of the actions.
            _, rewards, terminated, truncated = envs.recv()
            buffer.add(obs, actions, rewards, terminated, truncated, ages)

            # Log, evaluate, save.
            if run.is_due(LOG_FREQUENCY):
                learning_rate = optimizer.param_groups[0]["lr"]
                rates = {"charts/epsilon": epsilon, "charts/learning_rate": learning_rate}
                run.log(metrics | rates)
            if run.is_due(args.eval_frequency):
                run.evaluate()
            if run.is_due(args.checkpoint_frequency):
                run.save()
        return run.finish()


def play(args: Args, q_network: QNetwork, obs: np.ndarray) -> np.ndarray:
    """How the trained policy is evaluated, with random tau as in training: observations
    (N, 4, 84, 84) -> actions (N,).
    """
    return act(q_network, obs, args.eval_epsilon, args.num_action_quantiles)


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
RESEED_FREQUENCY = 100_000  # steps after which the next game of an environment begins from a seed


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


def make_gym_env(args: Args, render_mode: str | None) -> gym.Env:
    """The environment, with a time limit."""
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
    return env


class OwnGames:
    """Environments of your own with the interface of the emulators."""

    def __init__(self, args: Args, num_envs: int) -> None:
        self.envs = [make_gym_env(args, None) for _ in range(num_envs)]
        self.single_observation_space = self.envs[0].observation_space
        self.single_action_space = self.envs[0].action_space
        self.obs = np.zeros((num_envs, STACK, 84, 84), np.uint8)

    def reset(self, seed: np.ndarray, options: dict) -> tuple[np.ndarray, dict]:
        """Begins episodes from these seeds where the mask is True."""
        for i, env_seed in zip(np.flatnonzero(options["reset_mask"]), seed.tolist()):
            self.obs[i], _ = self.envs[i].reset(seed=env_seed)
        return self.obs.copy(), {"lives": np.zeros(len(self.envs), int)}

    def send(self, actions: np.ndarray) -> None:
        """Takes the actions for `recv`."""
        self.actions = actions

    def recv(self) -> tuple:
        """Steps, and begins a new episode where one ended."""
        terminated, truncated = np.zeros((2, len(self.envs)), bool)
        rewards, final_obs = np.zeros(len(self.envs)), self.obs.copy()
        for i, (env, action) in enumerate(zip(self.envs, self.actions)):
            self.obs[i], reward, terminated[i], truncated[i], _ = env.step(action)
            rewards[i], final_obs[i] = np.asarray(reward).item(), self.obs[i]
            if terminated[i] or truncated[i]:
                self.obs[i], _ = env.reset()
        info = {"lives": np.zeros(len(self.envs), int), "final_obs": final_obs}
        return self.obs.copy(), rewards, terminated, truncated, info

    def close(self) -> None:
        for env in self.envs:
            env.close()


class Envs:
    """N games, stepped side by side. Where a game ends, the next one begins.

    The emulators run in native code: `send` hands them actions, `recv` waits for what came of them.
    A seed and all actions since determine the games. A game begins from a seed now and then (not
    each: it takes 0.1 s); a checkpoint holds the actions since, and `reset` replays them.
    """

    def __init__(self, args: Args, num_envs: int, stream: int, draw: bool = False) -> None:
        self.envs = [make_games(args, num_envs)]
        if draw and args.env_id.startswith("ALE/"):  # one more game that shows the first in colour
            self.envs.append(make_games(args, 1, grayscale=False, stack_num=1, img_height=210,
                                        img_width=160))  # fmt: skip
        self.seed, self.stream, self.fps, self.first_action = args.seed, stream, 15, 0
        self.obs_space = self.envs[0].single_observation_space
        self.action_space = self.envs[0].single_action_space
        self.obs = np.zeros((num_envs, STACK, 84, 84), np.uint8)
        self.steps, self.finished = 0, []  # (step, return, length) of each
        self.episodes, self.lengths = np.zeros((2, num_envs), int)  # finished; of the running ones
        self.returns = np.zeros(num_envs)
        self.seeds = np.array([self.new_seed(i) for i in range(num_envs)])
        self.actions = []  # of all environments, (N,) each, since the oldest of these seeds
        self.since = np.zeros(num_envs, int)  # the number of actions before the seed of each

    def new_seed(self, i: int) -> int:
        """The seed of an environment's next game, of 31 bits."""
        key = self.stream, i, int(self.episodes[i])
        sequence = np.random.SeedSequence(self.seed, spawn_key=key)
        return int(sequence.generate_state(1)[0]) & 0x7FFFFFFF

    def begin(self, mask: np.ndarray) -> None:
        """Begins games from their seeds where the mask is True."""
        options = {"reset_mask": mask}
        self.obs, info = self.envs[0].reset(seed=self.seeds[mask], options=options)
        self.lives = info["lives"]

    def reset(self) -> None:
        """Begins the games, and replays the actions of a checkpoint."""
        saved = self.obs.copy()
        if len(self.actions) > 1000:
            print(f"Replaying {len(self.actions)} steps of {len(saved)} games", flush=True)
        self.begin(np.ones(len(saved), bool))
        for camera in self.envs[1:]:
            self.picture, _ = camera.reset(seed=self.seeds[:1])
        for t in range(len(self.actions) + 1):
            if t > 0 and (self.since == t).any():
                self.begin(self.since == t)
            if t < len(self.actions):
                self.envs[0].send(self.actions[t])
                self.obs, _, _, _, info = self.envs[0].recv()
                self.lives = info["lives"]
        if self.steps > 0 and not np.array_equal(saved, self.obs):
            print("Warning: seed and actions do not repeat an episode. The run goes on, but not "
                  "exactly as if it had not been interrupted.", file=sys.stderr)  # fmt: skip

    def send(self, actions: np.ndarray) -> None:
        """Hands over actions (N,)."""
        self.actions.append(actions)
        self.envs[0].send(actions)
        for camera in self.envs[1:]:
            self.picture, *_ = camera.step(actions[:1])

    def recv(self, which: np.ndarray | slice = slice(None)) -> tuple[np.ndarray, ...]:
        """Waits for next_obs (N, 4, 84, 84), rewards, terminated, truncated (N,).

        `terminated` is also True where a life was lost, and the game goes on. Where a game ended,
        next_obs is its last observation, and self.obs the first one of the next game. Only games
        of the environments in `which` are counted.
        """
        self.obs, rewards, game_over, truncated, info = self.envs[0].recv()
        if not np.isfinite(rewards).all():
            raise UsageError("a reward of the environment is not finite")
        next_obs, ended = self.obs, game_over | truncated
        if truncated.any():  # only then is the last observation of use
            next_obs = self.obs.copy()
            next_obs[truncated] = np.stack(info["final_obs"][truncated])
        terminated = game_over | ((info["lives"] < self.lives) & ~truncated)
        self.lives = info["lives"]
        self.returns += rewards
        self.lengths += 1
        for i in np.arange(len(ended))[which]:
            if ended[i]:
                outcome = self.returns[i].item(), self.lengths[i].item()
                self.finished.append((self.steps + 1 + int(i), *outcome))
        self.steps += len(ended)
        self.episodes += ended
        self.returns[ended] = self.lengths[ended] = 0
        self.reseed(ended & (len(self.actions) - self.since >= RESEED_FREQUENCY // len(ended)))
        return next_obs, rewards, terminated, truncated

    def reseed(self, mask: np.ndarray) -> None:
        """Begins games from new seeds; forgets the actions before the oldest seed."""
        if mask.any():
            self.seeds[mask] = [self.new_seed(i) for i in np.flatnonzero(mask)]
            self.since[mask] = len(self.actions)
            self.begin(mask)
            self.actions = self.actions[self.since.min() :]
            self.since -= self.since.min()

    def step(self, actions: np.ndarray, which: np.ndarray) -> tuple[np.ndarray, ...]:
        """Both, by actions (n,) for the environments in `which`; the others do nothing."""
        everywhere = np.zeros(len(self.obs), int)
        everywhere[which] = actions
        self.send(everywhere)
        return self.recv(which)

    def render(self) -> np.ndarray:
        """A picture of the first game, (H, W, 3), in colour if it is an emulator's."""
        if len(self.envs) > 1:
            return self.picture[0, -1].repeat(2, axis=0).repeat(2, axis=1)
        return np.stack([self.obs[0, -1].repeat(4, axis=0).repeat(4, axis=1)] * 3, axis=-1)

    def close(self) -> None:
        while self.envs:
            self.envs.pop().close()

    COLUMNS = "episodes", "lengths", "returns", "seeds", "since", "obs"

    def state_dict(self) -> dict:
        actions = torch.from_numpy(np.array(self.actions, int).reshape(-1, len(self.obs)))
        columns = {name: torch.from_numpy(getattr(self, name)) for name in self.COLUMNS}
        return {"steps": self.steps, "actions": actions} | columns

    def load_state_dict(self, state: dict) -> None:
        if state["obs"].shape != self.obs.shape:
            raise ValueError(f"observations were {tuple(state['obs'].shape)}, {self.obs.shape} now")
        self.steps, self.actions = int(state["steps"]), list(state["actions"].numpy())
        for name in self.COLUMNS:
            setattr(self, name, state[name].numpy())


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
