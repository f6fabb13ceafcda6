# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "torch>=2.6.0", "gymnasium[atari]>=1.4.0", "ale-py>=0.12.1", "tyro>=1.0.16", "tensorboard>=2.20.0", "tqdm>=4.66.0",
# ]
# ///
r"""Deep Q-learning (DQN) from pixels, for Atari games.

Paper    Mnih et al. (2015), "Human-level control through deep reinforcement learning", Algorithm 1. Double Q-learning:
         van Hasselt et al. (2016), "Deep reinforcement learning with double Q-learning", equation 4.
Idea     Learn Q(s, a), the discounted sum of rewards to come after action a in state s if one acts well from then on,
         and take the action of largest Q. What Q should be follows from what came a step later (Bellman's equation):

             y    = r + gamma * max_a' Q_target(s', a')              the target; y = r if the episode terminated in s'
             y    = r + gamma * Q_target(s', argmax_a' Q(s', a'))    that of double Q-learning (--double-q)
             loss = mean of huber(Q(s, a) - y)                       over B transitions (s, a, r, s')

         The transitions are drawn at random from a replay buffer, since neighbours in time are too alike to learn from.
         Q_target is a copy of the network from a while ago, so that the network does not chase a target that moves with
         its every step. With probability epsilon, which decays, an action is random, or nothing new would be tried.
Differs  Adam in place of RMSProp, and an initialisation that lets the signal through (He et al. 2015). The target
         network is copied every 250 gradient steps, not every 10,000; epsilon falls from the first step on, to 1%, not
         10%. N games are played side by side, with one gradient step for every 4 of their steps. Where only a time
         limit ends a game, y counts what would have followed. Ale-py's vector environment cannot be saved, so each
         checkpoint begins new games, and those being played are never scored. As in the paper, the learner sees only a
         reward's sign, and takes the loss of a life for an end; what is logged are whole games' true scores. With
         --norm-obs, pixels are normalised by running statistics of those in the buffer: moving things stand out. The
         buffer keeps each frame once, in the file replay.frames of the run's folder, 7.1 GB by default, which must fit
         into memory; beside it, up to 0.7 GB of what was overwritten since the last checkpoint.
Shapes   N environments; B transitions of a batch; K actions; R rows of the buffer. Row t of the buffer is the step from
         t to t+1 in each environment. One step is four frames of the game.
Run      python dqn_atari.py
         python dqn_atari.py --env-id ALE/Pong-v5 --total-timesteps 600000 --norm-obs --double-q --buffer-size 100000 \
             --learning-starts 10000 --target-network-frequency 500 --exploration-fraction 0.125 --learning-rate 3e-4
Expect   Pong with these flags, in bfloat16, on one core (--num-threads 1) of an AMD EPYC, mean over seeds 1 to 3 (worst
         to best seed):
             19.7 (19.4 to 20.0)    10 games after training, epsilon 0.01
             600k steps in 90 min beside another run: 18.3 to 19.6 in the last 20 training games
         Breakout, 1M steps with these flags but --buffer-size 1000000 --max-grad-norm 0.5 --anneal-lr, seed 1 alone:
             82.3    10 games after training, in 132 min beside other work
         Without the last two it collapsed, to 0.5: Q exploded for screens with few bricks left, which are unusual.
"""

import math
import os
import re
import shutil
import sys
import time
from argparse import ArgumentParser
from collections import deque
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, NoReturn

import ale_py
import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

gym.register_envs(ale_py)
ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # no banner

SCRIPT = "dqn_atari"  # named in checkpoints and messages
STACK = 4  # frames of an observation
MAX_EPISODE_STEPS = 10_000  # the time limit of environments that declare none: no episode is endless
LOG_FREQUENCY = 1_000  # steps between points of the losses
SAMPLE = 1_000  # observations that --norm-obs takes in, first of all and before each update of the target network
MAX_FRAMES = 1_000  # steps, at most, that the animated picture covers; it shows every second one
RunDir = Annotated[str | None, tyro.conf.arg(metavar="RUN_DIR")]


@dataclass(frozen=True)
class Args:
    env_id: str = "ALE/Breakout-v5"  # a Gymnasium environment that fits, or my_module:MyEnv-v0
    seed: int = 1  # of all that is random in the run
    total_timesteps: int = 10_000_000  # environment steps to train for, at least

    learning_rate: float = 1e-4  # step size of Adam
    adam_epsilon: float = 1.5e-4  # is added to the denominator of Adam's step
    anneal_lr: bool = False  # lower the learning rate linearly, to 0 at the end of the run
    num_envs: int = 8  # environments that are stepped side by side (N)
    buffer_size: int = 1_000_000  # transitions that the replay buffer holds
    gamma: float = 0.99  # discount factor
    tau: float = 1.0  # share of the Q-network that goes into the target network at each of its updates; 1: a copy
    target_network_frequency: int = 1_000  # environment steps between updates of the target network
    batch_size: int = 32  # transitions in one gradient step (B)
    start_e: float = 1.0  # epsilon, the probability of a random action, at the start
    end_e: float = 0.01  # epsilon at the end of its decay
    exploration_fraction: float = 0.1  # share of total-timesteps that the decay takes
    learning_starts: int = 80_000  # environment steps before the first gradient step
    train_frequency: int = 4  # environment steps between gradient steps
    double_q: bool = False  # the Q-network chooses the next action, the target network values it
    loss: Literal["huber", "squared"] = "huber"  # huber: the gradient of large errors is that of an error of 1
    max_grad_norm: float | None = None  # longer gradients are cut to this length
    norm_obs: bool = False  # shift and scale observations to mean 0 and standard deviation 1
    sticky_actions: float = 0.0  # probability that the emulator repeats its last action; Gymnasium's default is 0.25
    eval_epsilon: float = 0.01  # probability of a random action in evaluation, so that no game goes in circles

    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # of hidden layers; auto: bfloat16 on CPUs made for it
    compile: bool = False  # compile the networks; for a GPU
    num_threads: int = 0  # CPU threads of PyTorch; 0: its own choice, usually one per core

    exp_name: str = SCRIPT  # part of the run folder's name
    runs_dir: str = "runs"  # where run folders are made
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: cpu for small networks; cuda (if any) for pixels
    checkpoint_frequency: int = 100_000  # steps between checkpoints; 0: only at the start and the end
    resume: RunDir = None  # go on with this run from its last checkpoint
    evaluate: RunDir = None  # play this run's policy, do not train
    eval_episodes: int = 10  # episodes to evaluate the policy with after training
    capture_video: bool = False  # save the first evaluation episode as an animated picture, episode.gif

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if type(value) not in (str, int, float, bool, type(None)):  # a checkpoint could not be read again
                raise ValueError(f"{name} must be a plain Python value, not {type(value).__name__}")
        for name in (
            "total_timesteps", "num_envs", "buffer_size", "target_network_frequency", "batch_size", "train_frequency",
            "eval_episodes",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
        for name in ("gamma", "start_e", "end_e", "exploration_fraction", "sticky_actions", "eval_epsilon"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"--{name.replace('_', '-')} must be between 0 and 1, not {getattr(self, name)}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"--seed must be between 0 and 2**63 - 1, not {self.seed}")
        for name in ("checkpoint_frequency", "num_threads"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 0, not {getattr(self, name)}")
        for name in ("learning_rate", "adam_epsilon", "max_grad_norm"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"--{name.replace('_', '-')} must be a positive number, not {getattr(self, name)}")
        if not 0 < self.tau <= 1:
            raise ValueError(f"--tau must be greater than 0 and at most 1, not {self.tau}")
        if self.learning_starts < max(self.batch_size, 8 * self.num_envs):  # 7 rows by then, of which 4 cannot be drawn
            raise ValueError("--learning-starts must be at least --batch-size, and 8 times --num-envs")
        if self.buffer_size < self.learning_starts:
            raise ValueError(f"--buffer-size must be at least --learning-starts, not {self.buffer_size}")
        if self.learning_starts >= self.total_timesteps:
            raise ValueError("--learning-starts must be less than --total-timesteps, or nothing is learned")
        if self.resume is not None and self.evaluate is not None:
            raise ValueError("--resume and --evaluate exclude each other")


# Arguments that do not change what is learned, apart from rounding. --checkpoint-frequency does: it cuts games.
HOUSEKEEPING = {
    "exp_name", "runs_dir", "device", "resume", "evaluate", "eval_episodes", "eval_epsilon", "capture_video",
    "compile", "num_threads",
}  # fmt: skip


# ---- Environment and network ----------------------------------------------------------------------------------------


def make_envs(args: Args, num_envs: int) -> gym.vector.VectorEnv:
    """N games. Observations (N, 4, 84, 84) of uint8: the last four frames, newest last; 0 for those before the game.

    The emulators run in native code, in threads of their own: `send` gives them their actions, `recv` waits for what
    came of them, in new arrays. They wait for a random time at a game's start (no-ops), press FIRE where a game begins
    only then, repeat each action for four frames (frame skip), take the brighter of the last two for each pixel, in
    grey, shrink that to 84 x 84, and stack it. With life_loss_info, `terminated` is True when a life is lost, too, and
    the game goes on. When it is over, the next step ignores its action and begins a new one.
    """
    sys.path.append(os.getcwd())  # my_module may lie where the command was typed
    try:
        if args.env_id.startswith("ALE/"):
            return gym.make_vec(
                args.env_id, num_envs, autoreset_mode="NextStep", life_loss_info=True, reward_clipping=False,
                repeat_action_probability=args.sticky_actions,
            )  # fmt: skip
        envs = OwnEnvs(lambda: gym.make_vec(args.env_id, num_envs, vectorization_mode="sync", wrappers=[limit]))
    except (gym.error.Error, ImportError, ValueError) as error:
        meant = f"; the game is ALE/{args.env_id}" if f"ALE/{args.env_id}" in gym.registry else ""
        fail(f"cannot make the environment {args.env_id!r}: {error}{meant}")
    if args.sticky_actions:
        fail(f"--sticky-actions is for the emulator's games; {args.env_id} is none")
    obs_space, action_space = envs.single_observation_space, envs.single_action_space
    frames = isinstance(obs_space, gym.spaces.Box) and obs_space.shape == (STACK, 84, 84)
    discrete = isinstance(action_space, gym.spaces.Discrete) and action_space.start == 0 and action_space.n <= 256
    if not (frames and obs_space.dtype == np.uint8 and discrete):
        fail(f"needs a game such as ALE/Breakout-v5, or observations Box(0, 255, (4, 84, 84), uint8), the newest frame "
             f"last, 0 before a start, and actions Discrete(n) with n <= 256; {args.env_id} has {obs_space} and "
             f"{action_space}")  # fmt: skip
    return envs


def make_camera(args: Args) -> gym.vector.VectorEnv | None:
    """One more game that shows the screen in colour, (1, 1, 210, 160, 3); None if the environment is no emulator.

    From the same seed, by the same actions, it plays the same game.
    """
    if not args.env_id.startswith("ALE/"):
        return None
    return gym.make_vec(
        args.env_id, 1, autoreset_mode="NextStep", life_loss_info=True, reward_clipping=False,
        repeat_action_probability=args.sticky_actions, grayscale=False, stack_num=1, img_height=210, img_width=160,
    )  # fmt: skip


def limit(env: gym.Env) -> gym.Env:
    """The environment with a time limit, if it has none."""
    return env if env.spec.max_episode_steps else gym.wrappers.TimeLimit(env, MAX_EPISODE_STEPS)


class OwnEnvs(gym.vector.VectorWrapper):
    """Gives your own environments what the emulators have: `send`, `recv`, and a frame number, 0 in a new game."""

    def __init__(self, make):
        super().__init__(make())
        self.make = make

    def reset(self, **keywords):
        self.env = self.make()  # a new one: some remember more than `reset` clears
        obs, info = self.env.reset(**keywords | {"seed": [int(seed) for seed in keywords["seed"]]})
        self.ended, self.frame_numbers = np.zeros(self.num_envs, bool), np.zeros(self.num_envs, int)
        return obs, info | {"episode_frame_number": self.frame_numbers}

    def send(self, actions):
        self.actions = actions

    def recv(self):
        obs, rewards, terminated, truncated, info = self.env.step(self.actions)
        self.frame_numbers = np.where(self.ended, 0, self.frame_numbers + 1)
        self.ended = terminated | truncated
        return obs, rewards, terminated, truncated, info | {"episode_frame_number": self.frame_numbers}


TRAINING, EVALUATION = 0, 1  # streams of seeds: (TRAINING, step) after the checkpoint of that step, (EVALUATION,)


def env_seeds(seed: int, stream: tuple[int, ...], count: int) -> np.ndarray:
    """Seeds to reset the environments with, which depend on the run's seed and the stream alone.

    So a resumed run plays the same games as one that never stopped. The emulators want 31 bits.
    """
    return np.random.SeedSequence(seed, spawn_key=stream).generate_state(count).astype(np.int64) & 0x7FFFFFFF


class RunningStatistics(nn.Module):
    """Mean and variance of all rows that it was shown. Being buffers, they are saved and loaded with the network."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("count", torch.tensor(0.0))
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("variance", torch.ones(size))

    @torch.no_grad()
    def update(self, rows: Tensor) -> None:
        """Takes in (B, size) more rows: Chan et al. (1979), "Updating formulae", equations 2.1."""
        total = self.count + len(rows)
        difference = rows.mean(0) - self.mean
        squares = self.variance * self.count + rows.var(0, correction=0) * len(rows)
        self.variance.copy_((squares + difference.square() * self.count * len(rows) / total) / total)
        self.mean += difference * len(rows) / total
        self.count.copy_(total)


class QNetwork(nn.Module):
    """Q(s, .): the network of Mnih et al., three convolutions and two linear layers."""

    def __init__(self, num_actions: int, bfloat16: bool, norm_obs: bool) -> None:
        super().__init__()
        self.bfloat16 = bfloat16
        self.obs_statistics = RunningStatistics(84 * 84) if norm_obs else None  # of each pixel
        self.features = nn.Sequential(
            nn.Conv2d(STACK, 32, 8, stride=4), nn.ReLU(),  # (B, 32, 20, 20)
            nn.Conv2d(32, 64, 4, stride=2), nn.ReLU(),  # (B, 64, 9, 9)
            nn.Conv2d(64, 64, 3, stride=1), nn.ReLU(), nn.Flatten(),  # (B, 64 * 7 * 7)
            nn.Linear(64 * 7 * 7, 512), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(512, num_actions)
        for layer in self.features:  # PyTorch's own initialisation shrinks the signal in every layer, until it drowns
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)
        self.to(memory_format=torch.channels_last)  # the faster order in memory: the 4 frames of a pixel side by side

    def forward(self, obs: Tensor) -> Tensor:
        """Frames (B, 4, 84, 84) of uint8 -> Q(s, .) (B, K) in float32."""
        dtype = torch.bfloat16 if self.bfloat16 else torch.float32  # both hold 0 to 255 exactly
        pixels = obs.contiguous(memory_format=torch.channels_last).to(dtype)
        if self.obs_statistics is None:
            pixels /= 255  # from 0 to 1
        else:  # what never changes is 0, what rarely changes stands out
            mean, variance = (
                statistic.view(84, 84).expand(1, STACK, 84, 84).contiguous(memory_format=torch.channels_last)
                for statistic in (self.obs_statistics.mean, self.obs_statistics.variance)
            )
            pixels.sub_(mean.to(dtype)).div_((variance + 1e-8).sqrt().to(dtype)).clamp_(-10, 10)
        with torch.autocast(obs.device.type, dtype, enabled=self.bfloat16):
            features = self.features(pixels)
        return self.head(features.float())  # bfloat16 has 2 digits, too few for the small differences between actions


def make_network(args: Args, envs: gym.vector.VectorEnv, device: torch.device) -> QNetwork:
    """A Q-network that fits the environments; auto: bfloat16 where the CPU has instructions for it, else float32."""
    has_bfloat16 = device.type == "cpu" and getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    bfloat16 = args.precision == "bfloat16" or (args.precision == "auto" and has_bfloat16)
    network = QNetwork(int(envs.single_action_space.n), bfloat16, args.norm_obs).to(device)
    if args.compile:
        network.compile()
    return network


# ---- The algorithm --------------------------------------------------------------------------------------------------


def linear_epsilon(step: int, start: float, end: float, duration: float) -> float:
    """The probability of a random action: falls linearly from start at step 0 to end at step `duration`, and stays."""
    return end if step >= duration else start + (end - start) * step / duration


@torch.no_grad()
def select_actions(q_network: nn.Module, obs: Tensor, epsilon: float) -> Tensor:
    """Epsilon-greedy: the action of the largest Q(s, .), or, with probability epsilon, any: (N, ...) -> (N,)."""
    q_values = q_network(obs).cpu()  # to the CPU, whose random numbers a checkpoint saves
    if not math.isfinite(q_values.sum()):
        raise FloatingPointError("the Q-network's output is not finite: weights diverged, or an observation is NaN")
    random_actions = torch.randint(q_values.shape[1], (len(q_values),))
    return torch.where(torch.rand(len(q_values)) < epsilon, random_actions, q_values.argmax(1))


def td_target(
    rewards: Tensor, terminated: Tensor, next_q: Tensor, gamma: float, next_q_online: Tensor | None = None
) -> Tensor:
    """y = r + gamma * max_a' Q_target(s', a'), and y = r where the episode terminated: (B,), (B,), (B, K) -> (B,).

    next_q is Q_target(s', .). The maximum of noisy estimates is too high on average. So in double Q-learning, the
    Q-network's own Q(s', .), next_q_online, chooses a', and next_q, whose noise had less say in that, values it.
    """
    best_actions = (next_q if next_q_online is None else next_q_online).argmax(1, keepdim=True)
    return rewards + gamma * next_q.gather(1, best_actions).squeeze(1) * ~terminated


@torch.no_grad()
def update_target(target_network: nn.Module, q_network: nn.Module, tau: float) -> None:
    """Each weight of the target network <- (1 - tau) * itself + tau * the Q-network's: a copy if tau is 1."""
    torch._foreach_lerp_(list(target_network.parameters()), list(q_network.parameters()), tau)


class Batch(NamedTuple):
    """B transitions. Row b of each:"""

    obs: Tensor  # what the environment showed, not normalised, (B, 4, 84, 84)
    actions: Tensor  # what was done then, (B,)
    rewards: Tensor  # the sign of what it brought, (B,)
    next_obs: Tensor  # what was seen next: after a game's last step, its last observation, (B, 4, 84, 84)
    terminated: Tensor  # whether a life or the game is over and nothing follows; False at a time limit, (B,)


def update(
    q_network: nn.Module, target_network: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, args: Args
) -> dict[str, Tensor]:
    """One gradient step on the B transitions of a batch -> metrics, scalars."""
    with torch.no_grad():  # the target is a constant, although the network made it
        next_q_online = q_network(batch.next_obs) if args.double_q else None
        next_q = target_network(batch.next_obs)
        target = td_target(batch.rewards, batch.terminated, next_q, args.gamma, next_q_online)
    q_values = q_network(batch.obs).gather(1, batch.actions[:, None]).squeeze(1)
    loss = F.huber_loss(q_values, target) if args.loss == "huber" else F.mse_loss(q_values, target)
    optimizer.zero_grad()
    loss.backward()
    if args.max_grad_norm is not None:
        nn.utils.clip_grad_norm_(q_network.parameters(), args.max_grad_norm)  # all as one vector
    optimizer.step()
    return {"losses/td_loss": loss.detach(), "losses/q_values": q_values.detach().mean()}


def newest_frames(obs: Tensor) -> Tensor:
    """Observations (B, 4, 84, 84) of uint8 -> their newest frames (B, 84 * 84), of which the statistics are kept."""
    return obs[:, -1].flatten(1).float()


def is_due(step: int, count: int, frequency: int) -> bool:
    """Whether a multiple of frequency is among the last `count` numbers up to step; never, if frequency is 0."""
    return frequency > 0 and step % frequency < count


# ---- Memory ---------------------------------------------------------------------------------------------------------


class ReplayBuffer:
    """The last R rows of N environments. Each frame is stored once, in a file that is mapped into memory.

    Row t is the step from t to t+1: the newest frame of observation t, the action, and what came of it. The three older
    frames of observation t are in the rows before, the newest one of observation t+1 is in the row after. So a row can
    be drawn only while the row after it and the three before it are there. `ages` says how many steps of its game came
    before a row, or 3 if there were more; frames from before the game are drawn as 0. `valid` is False where a row
    holds no step, only the last observation of a game that ended, or was cut by a checkpoint.

    A checkpoint leaves out the frames, which are gigabytes, but a run that resumes from it must find them as they were.
    So rows that are overwritten later are first appended to a second file, and `load_state_dict` puts them back.
    """

    COLUMNS = "actions", "rewards", "terminated", "ages", "valid"

    def __init__(self, run_dir: Path, num_rows: int, num_envs: int, create: bool) -> None:
        self.run_dir, self.num_rows, self.num_envs = run_dir, num_rows, num_envs
        path, shape = run_dir / "replay.frames", (num_rows, num_envs, 84 * 84)
        if create:
            with open(path, "wb") as file:
                if hasattr(os, "posix_fallocate"):  # not on a Mac
                    os.posix_fallocate(file.fileno(), 0, math.prod(shape))  # a full disk fails here, not hours later
                else:
                    file.truncate(math.prod(shape))
        elif not path.is_file() or path.stat().st_size != math.prod(shape):
            fail(f"{path} is missing, or not of the size that --buffer-size and --num-envs give; a run without it can "
                 "only be evaluated")  # fmt: skip
        self.file = np.memmap(path, np.uint8, "r+", shape=shape)
        self.frames = torch.from_numpy(self.file)
        self.actions = torch.zeros(num_rows, num_envs, dtype=torch.uint8)
        self.rewards = torch.zeros(num_rows, num_envs, dtype=torch.int8)
        self.terminated = torch.zeros(num_rows, num_envs, dtype=torch.bool)
        self.ages = torch.zeros(num_rows, num_envs, dtype=torch.uint8)
        self.valid = torch.zeros(num_rows, num_envs, dtype=torch.bool)
        self.rows_written = 0  # in all, so the next one is row rows_written modulo R
        self.saved_rows = 0  # rows_written at the last checkpoint
        self.overwritten = None  # the second file, new with each checkpoint

    def add(
        self, obs: np.ndarray, ages: np.ndarray, actions: np.ndarray, rewards: np.ndarray, terminated: np.ndarray,
        valid: np.ndarray,
    ) -> None:  # fmt: skip
        """One row: observations (N, 4, 84, 84), of which the newest frame is kept, and five arrays (N,)."""
        if not np.isfinite(rewards).all():
            raise FloatingPointError("a reward is not finite")
        row = self.rows_written % self.num_rows
        if self.num_rows <= self.rows_written < self.saved_rows + self.num_rows:  # the row is the checkpoint's
            if self.overwritten.write(self.file[row]) != self.file[row].nbytes:
                raise OSError(f"the disk of {self.run_dir} is full")
        self.file[row] = obs[:, -1].reshape(self.num_envs, -1)
        values = actions, np.sign(rewards), terminated, np.minimum(ages, STACK - 1), valid
        for name, value in zip(self.COLUMNS, values):
            getattr(self, name)[row] = torch.from_numpy(value)
        self.rows_written += 1

    def sample(self, batch_size: int) -> Batch:
        """B transitions, all equally likely; not from the newest row and the three oldest, which may lack frames."""
        count = min(self.rows_written, self.num_rows) - STACK
        first = self.rows_written - 1 - count
        rows = envs = torch.empty(0, dtype=torch.int64)
        while len(rows) < batch_size:
            new_rows = (first + torch.randint(count, (batch_size,))) % self.num_rows
            new_envs = torch.randint(self.num_envs, (batch_size,))
            valid = self.valid[new_rows, new_envs]
            rows, envs = torch.cat([rows, new_rows[valid]]), torch.cat([envs, new_envs[valid]])
        rows, envs = rows[:batch_size], envs[:batch_size]
        steps_back = torch.arange(STACK - 1, -2, -1)  # 3, 2, 1, 0, and -1 for the next observation's frame
        window = ((rows[:, None] - steps_back) % self.num_rows) * self.num_envs + envs[:, None]
        frames = self.frames.view(-1, 84 * 84).index_select(0, window.flatten()).view(batch_size, STACK + 1, 84, 84)
        before_start = (steps_back > self.ages[rows, envs][:, None]).nonzero(as_tuple=True)  # quicker than a mask
        frames[before_start] = 0
        actions, rewards = self.actions[rows, envs].long(), self.rewards[rows, envs].float()
        return Batch(frames[:, :-1], actions, rewards, frames[:, 1:], self.terminated[rows, envs])

    def state_dict(self) -> dict:
        """All but the frames, for a checkpoint. From here on, rows that are overwritten go to a new second file."""
        self.file.flush()
        if self.overwritten is not None:
            self.overwritten.close()
        self.saved_rows = self.rows_written
        self.overwritten = open(self.run_dir / f"replay.overwritten-{self.saved_rows}", "wb", buffering=0)
        return {"rows_written": self.rows_written} | {name: getattr(self, name) for name in self.COLUMNS}

    def load_state_dict(self, state: dict) -> None:
        """Puts back what `state_dict` gave, and the frames that have been overwritten since."""
        self.rows_written = state["rows_written"]
        for name in self.COLUMNS:
            getattr(self, name).copy_(state[name])
        path, row_shape = self.run_dir / f"replay.overwritten-{self.rows_written}", self.file.shape[1:]
        if not path.is_file():
            fail(f"{path} is missing: this run can be evaluated, but not resumed")
        rows = np.fromfile(path, np.uint8)
        rows = rows[: rows.size // math.prod(row_shape) * math.prod(row_shape)].reshape(-1, *row_shape)
        first = max(self.rows_written, self.num_rows)  # until the buffer is full, nothing is overwritten
        self.file[(first + np.arange(len(rows))) % self.num_rows] = rows

    def remove_old_files(self) -> None:
        """Removes the second files of earlier checkpoints; to be called when the new checkpoint is written."""
        for path in self.run_dir.glob("replay.overwritten-*"):
            if path.name != f"replay.overwritten-{self.saved_rows}":
                path.unlink()


def refuse_too_large(args: Args) -> None:
    """A buffer that does not fit is refused at once, not when it fills up, hours later."""
    size, later = args.buffer_size, max(0, args.total_timesteps - args.buffer_size)
    overwritten = min(args.checkpoint_frequency or later, later, size)  # what the second file holds, at most
    runs_dir = Path(args.resume or args.runs_dir).resolve()  # where the run's folder is, or will be
    folder = next((path for path in (runs_dir, *runs_dir.parents) if path.exists()), ".")
    room = [(f"disk in {folder}", (size if args.resume is None else 0) + overwritten, shutil.disk_usage(folder).free)]
    if Path("/proc/meminfo").exists():  # Linux
        for kilobytes in re.findall(r"MemAvailable: *(\d+) kB", Path("/proc/meminfo").read_text()):
            room.append(("memory", size, int(kilobytes) * 1024))
    for name, frames, free in room:
        if frames * 84 * 84 > free:
            fail(f"--buffer-size needs {frames * 84 * 84 / 1e9:.1f} GB of {name}, where {free / 1e9:.1f} GB are free")


# ---- Training -------------------------------------------------------------------------------------------------------


def train(args: Args) -> Path:
    """Trains a Q-network, from the start or from the checkpoint in args.resume, and returns the run's folder."""
    device = pick_device(args)
    torch.manual_seed(args.seed)
    envs, num_envs = make_envs(args, args.num_envs), args.num_envs
    q_network, target_network = make_network(args, envs, device), make_network(args, envs, device)
    target_network.load_state_dict(q_network.state_dict())
    target_network.obs_statistics = q_network.obs_statistics  # both see the same
    optimizer = torch.optim.Adam(q_network.parameters(), lr=args.learning_rate, eps=args.adam_epsilon, fused=True)
    refuse_too_large(args)
    run_dir = make_run_dir(args) if args.resume is None else Path(args.resume)
    buffer = ReplayBuffer(run_dir, math.ceil(args.buffer_size / num_envs), num_envs, create=args.resume is None)
    parts = {"q_network": q_network, "target_network": target_network, "optimizer": optimizer, "buffer": buffer}
    global_step = 0
    if args.resume is not None:
        state = load_checkpoint(args.resume, args, **parts)
        global_step = state["global_step"]
        torch.set_rng_state(state["random_state"])
    print(f"Training in {run_dir}", flush=True)
    writer = open_log(run_dir, args, global_step)

    def save() -> None:
        writer.flush()  # the event file must not lag behind the checkpoint
        save_checkpoint(run_dir, args, parts, global_step=global_step)
        buffer.remove_old_files()

    first_step, start_time, recent, obs = global_step, time.perf_counter(), deque(maxlen=20), None
    save()  # from here on there is something to resume
    try:
        with progress_bar(global_step, args.total_timesteps) as bar:
            while global_step < args.total_timesteps:
                if obs is None:  # at the start and after each checkpoint: new games, given by seed and step alone
                    obs, info = envs.reset(seed=env_seeds(args.seed, (TRAINING, global_step), num_envs))
                    frame_numbers, metrics = info["episode_frame_number"], {}
                    scores, lengths = np.zeros((2, num_envs), dtype=np.int64)
                if args.anneal_lr:
                    optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - global_step / args.total_timesteps)

                # Act.
                duration = args.exploration_fraction * args.total_timesteps
                epsilon = linear_epsilon(global_step, args.start_e, args.end_e, duration)
                actions = select_actions(q_network, torch.from_numpy(obs).to(device), epsilon)
                envs.send(actions.numpy())
                global_step += num_envs

                # Learn, while the emulators step: the gradient steps and target updates that fall due in these N steps.
                for step in range(max(global_step - num_envs + 1, args.learning_starts), global_step + 1):
                    if args.norm_obs and (step == args.learning_starts or step % args.target_network_frequency == 0):
                        q_network.obs_statistics.update(newest_frames(buffer.sample(SAMPLE).obs).to(device))
                    if step % args.train_frequency == 0:
                        batch = Batch(*(part.to(device) for part in buffer.sample(args.batch_size)))
                        metrics = update(q_network, target_network, optimizer, batch, args)
                    if step % args.target_network_frequency == 0:
                        update_target(target_network, q_network, args.tau)

                # Store. The step after a game's end ignores its action and begins a new game, so it is no transition.
                # It shows in a frame number that falls. The old game is logged now, unless a checkpoint came between.
                next_obs, rewards, terminated, _, info = envs.recv()
                new_game = info["episode_frame_number"] < frame_numbers
                buffer.add(obs, lengths, actions.numpy(), rewards, terminated, ~new_game)
                obs, frame_numbers = next_obs, info["episode_frame_number"]

                # Log, save.
                for i in np.flatnonzero(new_game):
                    recent.append(scores[i])
                    writer.add_scalar("charts/episodic_return", scores[i], global_step - num_envs + 1 + i)
                    writer.add_scalar("charts/episodic_length", lengths[i], global_step - num_envs + 1 + i)
                scores, lengths = np.where(new_game, 0, [scores + rewards, lengths + 1])
                if is_due(global_step, num_envs, LOG_FREQUENCY):
                    scalars = {
                        "charts/epsilon": epsilon,
                        "charts/learning_rate": optimizer.param_groups[0]["lr"],
                        "charts/SPS": (global_step - first_step) / (time.perf_counter() - start_time),
                    }
                    for tag, value in (scalars | metrics).items():
                        writer.add_scalar(tag, value, global_step)
                    if recent:
                        bar.set_postfix_str(f"return {np.mean(recent):.1f}", refresh=False)
                bar.update(min(global_step, args.total_timesteps) - bar.n)
                if is_due(global_step, num_envs, args.checkpoint_frequency) or global_step >= args.total_timesteps:
                    # One row more, with the last observations. The games are cut, so nothing comes of it: not valid.
                    buffer.add(obs, lengths, actions.numpy(), rewards, terminated, np.zeros(num_envs, dtype=bool))
                    save()
                    obs = None  # new games, as in a resumed run, so that both go on alike
    except (FloatingPointError, KeyboardInterrupt) as error:
        stop(error, global_step, run_dir)

    log_evaluation(writer, args, run_dir, global_step, *evaluate(args, q_network, run_dir))
    print(run_dir)
    return run_dir


def evaluate(args: Args, q_network: QNetwork, run_dir: Path) -> tuple[float, float]:
    """Plays args.eval_episodes whole games side by side, prints how it went, returns mean score and length."""
    torch.manual_seed(args.seed)  # of the random actions
    count, device = args.eval_episodes, next(q_network.parameters()).device
    envs, seeds = make_envs(args, count), env_seeds(args.seed, (EVALUATION,), count)
    obs, info = envs.reset(seed=seeds)
    if args.capture_video:
        camera = make_camera(args)
        pictures = [camera.reset(seed=seeds[:1])[0]] if camera else [obs[:1].copy()]
    scores, lengths, playing = np.zeros(count), np.zeros(count), np.ones(count, dtype=bool)
    while playing.any():
        frame_numbers = info["episode_frame_number"]
        actions = select_actions(q_network, torch.from_numpy(obs).to(device), args.eval_epsilon).numpy()
        envs.send(actions)
        obs, rewards, _, _, info = envs.recv()
        playing &= info["episode_frame_number"] > frame_numbers  # each environment plays one game
        scores, lengths = scores + rewards * playing, lengths + playing
        if args.capture_video and playing[0] and len(pictures) < MAX_FRAMES:
            pictures.append(camera.step(actions[:1])[0] if camera else obs[:1].copy())
    print(f"Evaluation: return {np.mean(scores):.1f} ± {np.std(scores):.1f} over {count} episodes, "
          f"epsilon {args.eval_epsilon}")  # fmt: skip
    if args.capture_video:
        path, milliseconds = run_dir / "episode.gif", 2 * 1000 / 15  # of every second frame, to halve the file
        size = (320, 420) if camera else (336, 336)
        pictures = [Image.fromarray(frames[0, -1]).resize(size, Image.Resampling.NEAREST) for frames in pictures[::2]]
        pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=milliseconds, loop=0)
        print(f"Animated picture: {path}")
    return float(np.mean(scores)), float(np.mean(lengths))


# ---- Runs, checkpoints, command line --------------------------------------------------------------------------------


def fail(message: str, code: int = 2) -> NoReturn:
    """Ends the program with one line on stderr."""
    print(f"{SCRIPT}: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(code)


def stop(error: FloatingPointError | KeyboardInterrupt, step: int, run_dir: Path) -> NoReturn:
    """Ends a training with one line that says what happened when, and what can be done now."""
    if isinstance(error, KeyboardInterrupt):
        fail(f"interrupted at step {step}; to go on from the last checkpoint: --resume {run_dir}", code=130)
    fail(f"step {step}: {error}. Are the environment's observations and rewards finite? If so, try a lower "
         f"--learning-rate. The last checkpoint stays in {run_dir}", code=1)  # fmt: skip


def pick_device(args: Args) -> torch.device:
    """auto: cuda if there is one, else the CPU. Also sets what the last bits of results depend on, such as threads."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available.get(args.device, True):
        fail(f"--device {args.device}: PyTorch finds no such device on this machine")
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    torch.backends.cudnn.deterministic = True
    return torch.device(args.device if args.device != "auto" else "cuda" if available["cuda"] else "cpu")


def make_run_dir(args: Args) -> Path:
    """Makes the folder <runs-dir>/<env-id>__<exp-name>__<seed>__<time>, which must be new."""
    name = f"{args.env_id}__{args.exp_name}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
    run_dir = Path(args.runs_dir) / name.replace("/", "-").replace(":", "-")
    try:
        run_dir.mkdir(parents=True)
        return run_dir
    except FileExistsError:
        if not run_dir.is_dir():
            raise
        time.sleep(1)  # another run began in this second
        return make_run_dir(args)


def settings(args: Args) -> dict:
    """All arguments but --resume and --evaluate, which are this call's alone."""
    return {name: value for name, value in asdict(args).items() if name not in ("resume", "evaluate")}


def open_log(run_dir: Path, args: Args, step: int) -> SummaryWriter:
    """TensorBoard's writer, with a table of the arguments. Hides what was logged after the checkpoint of that step."""
    writer = SummaryWriter(run_dir, purge_step=step + 1)
    rows = [f"|{name}|{value}|" for name, value in settings(args).items()]
    writer.add_text("hyperparameters", "\n".join(["|argument|value|", "|-|-|", *rows]), step)
    return writer


def log_evaluation(
    writer: SummaryWriter, args: Args, run_dir: Path, step: int, mean_return: float, mean_length: float
) -> None:
    """The last points of a run, its picture, and its row in the HPARAMS tab."""
    writer.add_scalar("eval/episodic_length", mean_length, step)  # add_hparams adds eval/episodic_return
    if args.capture_video:  # add_image would show a still picture
        image = Summary.Image(encoded_image_string=(run_dir / "episode.gif").read_bytes(), colorspace=3)
        writer.file_writer.add_summary(Summary(value=[Summary.Value(tag="eval/episode", image=image)]), step)
    compared = {name: value for name, value in settings(args).items() if name not in HOUSEKEEPING}
    writer.add_hparams(compared, {"eval/episodic_return": mean_return}, run_name=".", global_step=step)
    writer.close()


def progress_bar(step: int, total: int) -> tqdm:
    """Moves in a terminal; in a log file, it is drawn every 30 seconds at most."""
    interval = 0.1 if sys.stderr.isatty() else 30  # seconds
    return tqdm(total=total, initial=step, unit="steps", unit_scale=True, mininterval=interval)


def save_checkpoint(run_dir: Path, args: Args, parts: dict, **counters: int) -> None:
    """Writes beside the old checkpoint.pt, then renames over it: whenever we are killed, one of the two is whole."""
    networks = [part for part in parts.values() if isinstance(part, nn.Module)]
    if not all(numbers.isfinite().all() for network in networks for numbers in network.state_dict().values()):
        raise FloatingPointError("a weight or a running statistic is no longer finite")
    states = {name: part.state_dict() for name, part in parts.items()}
    state = {"script": SCRIPT, "args": settings(args), "random_state": torch.get_rng_state()} | counters | states
    with open(run_dir / "checkpoint.tmp", "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(run_dir / "checkpoint.tmp", run_dir / "checkpoint.pt")


def load_checkpoint(run_dir: str, args: Args | None = None, **parts) -> dict:
    """Reads a run's checkpoint, compares its arguments with args, fills the parts, each by its name in the file."""
    path = Path(run_dir) / "checkpoint.pt"
    if not path.is_file():
        fail(f"there is no checkpoint.pt in the folder {run_dir!r}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)  # a stranger's file can run no code
        if not isinstance(state, dict) or state.get("script") != SCRIPT:
            fail(f"{path} is not a checkpoint of {SCRIPT}.py")
        state["args"] = Args(**state["args"])
        if args is not None:
            refuse_changes(args, state["args"])
        for name, part in parts.items():
            part.load_state_dict(state[name])
        return state
    except Exception as error:  # a cut or foreign file fails in a dozen ways
        fail(f"{path} is damaged, or does not fit this script or its environment ({type(error).__name__})")


def refuse_changes(args: Args, saved: Args) -> None:
    """A run that goes on or is played keeps its name and all that it learns from; only its length may grow."""
    changeable = (HOUSEKEEPING - {"exp_name", "runs_dir"}) | {"total_timesteps"}
    for name, value in asdict(saved).items():
        if name not in changeable and getattr(args, name) != value:
            fail(f"--{name.replace('_', '-')} cannot be changed: the run has {value!r}")
    if args.total_timesteps < saved.total_timesteps:
        fail(f"--total-timesteps can only grow: the run has {saved.total_timesteps}")


def parse_args() -> Args:
    """The command line; with --resume or --evaluate, its defaults are those in the checkpoint."""
    finder = ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--resume", nargs="?")
    finder.add_argument("--evaluate", nargs="?")
    found, _ = finder.parse_known_args()
    default = Args()
    if (found.resume is None) != (found.evaluate is None):  # exactly one of the two
        saved = load_checkpoint(found.evaluate if found.resume is None else found.resume)["args"]
        default = replace(saved, resume=found.resume, evaluate=found.evaluate)
    return tyro.cli(Args, default=default, description=(__doc__ or SCRIPT).splitlines()[0])  # -OO drops __doc__


def main() -> None:
    if hasattr(sys.stdout, "reconfigure"):  # not in a notebook
        sys.stdout.reconfigure(errors="replace")  # a terminal that has no ± is no reason to end
    try:
        args = parse_args()
        if args.evaluate is None:
            train(args)
        else:
            q_network = make_network(args, make_envs(args, 1), pick_device(args))
            load_checkpoint(args.evaluate, args, q_network=q_network)
            evaluate(args, q_network, Path(args.evaluate))
            print(args.evaluate)
    except FloatingPointError as error:
        fail(str(error), code=1)
    except OSError as error:  # a folder that cannot be written, a full disk
        fail(str(error))
    except (MemoryError, RuntimeError) as error:  # PyTorch has no error of its own for memory on the CPU
        if "allocate" not in str(error):
            raise
        fail(f"not enough memory: {error}")
    except KeyboardInterrupt:
        fail("interrupted", code=130)


if __name__ == "__main__":
    main()
