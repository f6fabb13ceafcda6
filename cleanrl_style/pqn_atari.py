# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch>=2.6.0", "gymnasium[atari]>=1.4.0", "ale-py>=0.12.1", "tyro>=1.0.16",
#   "tensorboard>=2.20.0", "tqdm>=4.66.0",
# ]
# ///
r"""Parallelised Q-network (PQN) from pixels, for Atari games.

Paper    Gallici et al. (2024), "Simplifying deep temporal difference learning", Algorithm 1, with
         the lambda-returns of its section on Q(lambda).
Idea     Learn Q(s, a), the expected discounted return of action a in state s if the best actions
         follow, and act greedily: DQN without a replay buffer and without a target network. Play T
         steps in N games, whose steps are less correlated than those of one. Learn from them in
         several epochs of minibatches, then forget them. Normalising each hidden layer before its
         activation keeps Q from diverging. The target G_t of Q(s_t, a_t) is computed before the
         epochs, backwards from the end of the rollout:

             G_t  = r_t + gamma * (lambda * G_{t+1} + (1 - lambda) * max_a Q(s_{t+1}, a))
             G_t  = r_t + gamma * max_a Q(s_{t+1}, a)       after the last step of the rollout
             G_t  = r_t                                     where an episode terminates
             loss = mean of (Q(s_t, a_t) - G_t)^2           over the B steps of a minibatch

         lambda = 0 gives the targets of DQN. The larger lambda, the faster a reward is felt many
         steps before it, but the more the targets tell of random actions. While training, an action
         is random with probability epsilon, which decays. RAdam is Adam that warms up.
Differs  8 games and rollouts of 128 steps, as in PPO, instead of 128 and 32, for a few cores; the
         minibatches have 256 steps, not 128, in 4 epochs, not 2. The learning rate falls linearly
         to 0. What a convolution gives is normalised over channels and places together, as in
         CleanRL, and scaled by channel; in the authors' code, over the channels at each place. At a
         time limit, G_t counts the rewards that would have followed, as after the last step of a
         rollout. As in DQN, the learner sees the sign of a reward, and a lost life as an end; what
         is logged are the true scores of whole games. With --norm-obs, pixels are normalised by
         running statistics.
Shapes   T steps (four frames each) of N games in a rollout, B of them in a minibatch; K actions.
         Row t is the step from t to t+1.
Run      python pqn_atari.py
         python pqn_atari.py --env-id ALE/Pong-v5 --total-timesteps 1000000 --num-envs 32 \
             --num-steps 32 --num-minibatches 8 --learning-rate 5e-4 --norm-obs
Expect   Pong with these flags, in bfloat16 and with --compile, 10 games after training, mean over
         seeds 1 and 2 (worst to best seed), median time on one core of an AMD EPYC that had other
         work, too:
             17.6 (16.3 to 19.0)    40 min; 18 reached after 387k and 327k steps, 15 and 13 min
         Breakout with these flags, seed 1, in float32 and with --compile, on one core:
             98.1                   101 min
         After 10M steps, CleanRL reports 20.5 in Pong, 385 in Breakout.
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

SCRIPT = "pqn_atari"  # named in checkpoints and messages
STACK = 4  # frames of an observation

# Argument types with their bounds.
Steps = Annotated[int, 1, 10**12]
Frequency = Annotated[int, 0, 10**12]  # interval in steps; 0: never
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

    learning_rate: Positive = 2.5e-4  # step size of the optimizer
    anneal_lr: bool = True  # lower the learning rate linearly to 0 over the run
    num_steps: Count = 128  # steps of each environment in a rollout (T)
    gamma: Fraction = 0.99  # discount factor
    q_lambda: Fraction = 0.65  # lambda of Q(lambda); 0: one-step target, 1: Monte Carlo return
    num_minibatches: Count = 4  # minibatches in an epoch, with one gradient step each
    update_epochs: Count = 4  # epochs over a rollout
    max_grad_norm: Weight = 10.0  # largest norm of the gradient; 0: not clipped
    start_e: Fraction = 1.0  # epsilon, the probability of a random action, at the start
    end_e: Fraction = 0.001  # epsilon after its decay
    exploration_fraction: Fraction = 0.1  # fraction of total-timesteps over which epsilon decays
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
        if self.num_steps * self.num_envs < self.num_minibatches:
            raise ValueError("--num-minibatches is more than the steps of a rollout")
        if self.num_steps * self.num_envs > 10**6:  # 28 GB
            raise ValueError("--num-steps times --num-envs must be at most 1000000")


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
    """Q(s, .): three convolutions and two linear layers, all but the last one normalised.

    One group is all channels and places: layer normalisation, but in channels_last without a copy.
    """

    def __init__(self, num_actions: int, bfloat16: bool, norm_obs: bool) -> None:
        super().__init__()
        self.bfloat16 = bfloat16
        self.obs_statistics = RunningStatistics(84 * 84) if norm_obs else None  # of each pixel
        self.features = nn.Sequential(
            nn.Conv2d(STACK * 16, 32, 2), nn.GroupNorm(1, 32), nn.ReLU(),  # 8 x 8 pixels, stride 4
            nn.Conv2d(32, 64, 4, stride=2), nn.GroupNorm(1, 64), nn.ReLU(),  # (B, 64, 9, 9)
            nn.Conv2d(64, 64, 3, stride=1), nn.GroupNorm(1, 64), nn.ReLU(),  # (B, 64, 7, 7)
            nn.Flatten(), nn.Linear(64 * 7 * 7, 512), nn.LayerNorm(512), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(512, num_actions)
        for layer in self.features:  # as in the authors' code
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)
        self.to(memory_format=torch.channels_last)  # twice as fast on a CPU

    def forward(self, obs: Tensor) -> Tensor:
        """Frames (B, 4, 84, 84) of uint8 -> Q(s, .) (B, K)."""
        pixels = self.normalize(obs)
        with torch.autocast(obs.device.type, torch.bfloat16, enabled=self.bfloat16):
            features = self.features(pixels)
        return self.head(features.float())  # bfloat16 has 2 digits: too few to compare actions

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


@torch.no_grad()
def act(q_network: nn.Module, obs: np.ndarray, epsilon: float) -> tuple[np.ndarray, np.ndarray]:
    """Epsilon-greedy actions and max_a Q(s, a): observations (N, ...) -> (N,), (N,)."""
    obs = torch.from_numpy(obs).to(next(q_network.parameters()).device)
    q_values = q_network(obs).cpu()
    values, greedy_actions = q_values.max(1)
    random_actions = torch.randint(q_values.shape[1], (len(q_values),))
    actions = torch.where(torch.rand(len(q_values)) < epsilon, random_actions, greedy_actions)
    return actions.numpy(), values.numpy()


def q_lambda(
    rewards: Tensor, next_values: Tensor, terminated: Tensor, truncated: Tensor,
    gamma: float, lam: float,
) -> Tensor:  # fmt: skip
    """The returns G of Q(lambda): four of (T, N) -> (T, N).

    next_values are max_a Q(s_{t+1}, a). Where an episode terminated, they count as 0; where a time
    limit truncated it, and in the last row, they stand for all that follows. No return crosses an
    end. Explored actions do not cut it (Peng's Q(lambda), not Watkins').
    """
    lams = lam * ~(terminated | truncated)  # weight of G_{t+1}
    lams[-1] = 0
    one_step = rewards + gamma * ((1 - lams) * next_values * ~terminated)
    decay = gamma * lams
    returns, following = torch.empty_like(rewards), torch.zeros_like(rewards[0])
    for t in reversed(range(len(rewards))):
        returns[t] = following = one_step[t] + decay[t] * following
    return returns


class Batch(NamedTuple):
    """Steps of a rollout with their targets, B in a minibatch. Row b of each:"""

    obs: Tensor  # observation, (B, 4, 84, 84)
    actions: Tensor  # action, (B,)
    returns: Tensor  # G, the target of Q(s, a), (B,)


def compute_gradient(q_network: nn.Module, batch: Batch, args: Args) -> dict[str, Tensor]:
    """The gradient of the loss on the B steps of a minibatch -> metrics."""
    q_values = q_network(batch.obs).gather(1, batch.actions[:, None]).squeeze(1)
    loss = F.mse_loss(q_values, batch.returns)
    loss.backward()
    if args.max_grad_norm > 0:
        nn.utils.clip_grad_norm_(q_network.parameters(), args.max_grad_norm)
    return {"losses/td_loss": loss.detach(), "losses/q_values": q_values.detach().mean()}


def update(
    q_network: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, args: Args
) -> dict[str, Tensor]:
    """One gradient step on a minibatch -> metrics."""
    optimizer.zero_grad()
    metrics = compiled(compute_gradient, args)(q_network, batch, args)
    optimizer.step()
    return metrics


def learn(
    q_network: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, args: Args
) -> dict[str, Tensor]:
    """All epochs over a rollout -> the means of the minibatches' metrics."""
    metrics = []
    for _ in range(args.update_epochs):
        shuffled = torch.randperm(len(batch.obs)).to(batch.obs.device)
        for rows in shuffled.tensor_split(args.num_minibatches):
            minibatch = Batch(*(part.index_select(0, rows) for part in batch))
            metrics.append(update(q_network, optimizer, minibatch, args))
    return {tag: torch.stack([step[tag] for step in metrics]).mean() for tag in metrics[0]}


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


# ---- Training and evaluation ---------------------------------------------------------------------


def train(args: Args) -> "Result":
    """Trains a Q-network, from the start or from the checkpoint in args.resume."""
    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    envs = Envs(args, args.num_envs, TRAINING)
    q_network = make_network(args, envs).to(device)
    optimizer = torch.optim.RAdam(q_network.parameters(), lr=args.learning_rate, foreach=True)

    rows = args.num_steps, args.num_envs
    obs = np.zeros((*rows, STACK, 84, 84), dtype=np.uint8)
    values, final_values, rewards = np.zeros((3, *rows), dtype=np.float32)
    actions, (terminated, truncated) = np.zeros(rows, dtype=int), np.zeros((2, *rows), dtype=bool)
    with Run(args, envs, q_network, optimizer=optimizer) as run:
        if args.norm_obs and envs.steps == 0:  # for the first rollout
            q_network.obs_statistics.update(newest_frames(torch.from_numpy(envs.obs)).to(device))
        while run.is_running():
            if args.anneal_lr:
                remaining = 1 - envs.steps / args.total_timesteps
                optimizer.param_groups[0]["lr"] = args.learning_rate * remaining

            # Act: T steps of every game.
            duration = args.exploration_fraction * args.total_timesteps
            epsilon = linear_epsilon(envs.steps, args.start_e, args.end_e, duration)
            for t in range(args.num_steps):
                actions[t], values[t] = act(q_network, envs.obs, epsilon)
                envs.send(actions[t].copy())  # envs keeps them
                obs[t] = envs.obs  # while the emulators step
                next_obs, reward, terminated[t], truncated[t] = envs.recv()
                rewards[t] = np.sign(reward)
                if truncated[t].any():
                    _, final_values[t] = act(q_network, next_obs, epsilon)

            # Learn. max_a Q(s_{t+1}, a) is that of the next row, but for truncated games.
            _, last_values = act(q_network, envs.obs, epsilon)
            next_values = np.concatenate([values[1:], last_values[None]])
            next_values = np.where(truncated, final_values, next_values)
            columns = map(torch.from_numpy, (rewards, next_values, terminated, truncated))
            returns = q_lambda(*columns, args.gamma, args.q_lambda)
            columns = torch.from_numpy(obs), torch.from_numpy(actions), returns
            batch = Batch(*(column.flatten(0, 1).to(device) for column in columns))
            metrics = learn(q_network, optimizer, batch, args)
            if args.norm_obs:  # after the epochs: Q and its targets share one normalisation
                q_network.obs_statistics.update(newest_frames(batch.obs))

            # Log, evaluate, save.
            learning_rate = optimizer.param_groups[0]["lr"]
            rates = {"charts/epsilon": epsilon, "charts/learning_rate": learning_rate}
            run.log(metrics | rates)
            if run.is_due(args.eval_frequency):
                run.evaluate()
            if run.is_due(args.checkpoint_frequency):
                run.save()
        return run.finish()


def play(args: Args, q_network: QNetwork, obs: np.ndarray) -> np.ndarray:
    """How the trained policy is evaluated: observations (N, 4, 84, 84) -> actions (N,).

    A few of them are random: --eval-epsilon.
    """
    return act(q_network, obs, args.eval_epsilon)[0]


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
