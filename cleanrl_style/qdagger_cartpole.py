# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch>=2.4.0", "gymnasium[classic-control]>=1.0.0", "tyro>=1.0.16", "tensorboard>=2.20.0",
#   "tqdm>=4.66.0",
# ]
# ///
r"""QDagger: DQN that learns from a teacher, for flat observations and discrete actions.

Paper    Agarwal, Schwarzer, Castro, Courville, Bellemare (2022), "Reincarnating reinforcement
         learning: reusing prior computation to accelerate progress", QDagger, with the authors'
         code (qdagger_dqn_agent.py).
Idea     There is a trained agent, the teacher, with its values Q_T and the transitions that it
         learned from; but you want another one, say with another network. Instead of beginning
         anew, the student learns by DQN (dqn_cartpole.py) from the teacher's transitions at first,
         without playing (offline), then from its own (online). And in the states of each batch, it
         imitates what the teacher would do there, as in DAgger:

             loss   = mean of (Q(s, a) - y)^2 + lambda * w * KL(pi_T(.|s), pi(.|s))
             y      = r + gamma * max_a' Q_target(s', a')   or r alone, if the episode terminated
             pi     = softmax of Q(s, .) / temperature      pi_T: of Q_T(s, .) / temperature
             lambda = 1 - (G - G_0) / (G_T - G_0)           between 0 and 1; offline, it is 1

         G is the mean return of the student's last ten episodes, G_T that of the teacher, G_0 that
         of random play. So the better the student, the less it imitates: it may surpass its
         teacher. Once lambda is 0, it stays 0.
Differs  G_0 is not in the paper's equation, but in the authors' code; without it, lambda would be
         wrong where returns are negative. One-step targets, not three-step ones. lambda has no time
         limit. The learning rate falls linearly to 0, not with lambda. Each phase has its own
         replay buffer, as in the paper. Unless --teacher names a run, the teacher is trained first,
         by DQN with the same settings. Steps in the log and in --total-timesteps are first the
         offline ones, at which it learns as often as if it had played, then environment steps;
         those of the teacher are not counted. At a time limit, y counts the rewards that would have
         followed (it bootstraps).
Shapes   N environments; B transitions of a batch; O numbers of an observation; K actions.
Run      python qdagger_cartpole.py
         python qdagger_cartpole.py --distill-weight 0    (no imitation, for comparison)
         python qdagger_cartpole.py --teacher runs/NAME    (folder of a run of dqn_cartpole.py)
Expect   Return of the greedy policy over 100 episodes, mean over seeds 1 to 10 (worst to best
         seed), and median wall time with start-up, teacher and evaluation, on one core of an AMD
         EPYC, whose other core was as busy. 20k steps, half offline, after 100k of the teacher:
             CartPole-v1             485.8 (379.2 to 500.0)    45 s
             Without imitation       244.5 (104.3 to 500.0)    50 s
             DQN alone, 10k steps    218.5 (194.1 to 251.0)     7 s
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
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from tqdm import tqdm

SCRIPT = "qdagger_cartpole"  # named in checkpoints and messages
LOG_FREQUENCY = 1_000  # steps between points of the losses
WINDOW = 10  # episodes whose mean return says how good the student is
TEACHER = 2  # stream of seeds: the teacher's episodes

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
    total_timesteps: Steps = 20_000  # offline steps and environment steps to train for, at least
    num_envs: SmallCount = 4  # parallel environments (N)

    teacher: str = "dqn"  # dqn: train one first; or the folder of a run of dqn_cartpole.py
    teacher_steps: Steps = 100_000  # environment steps to train the teacher for, at least
    teacher_hidden_size: SmallCount = 64  # units in each of its two hidden layers
    teacher_episodes: Count = 20  # episodes to measure the returns of teacher and random play with
    offline_steps: Frequency = 10_000  # steps at first that learn from the teacher's transitions
    temperature: Positive = 0.1  # of the policy that is made of Q: the lower, the greedier
    distill_weight: Weight = 3.0  # weight of imitation in the loss (w); 0: none
    learning_rate: Positive = 2.5e-3  # step size of the optimizer
    anneal_lr: bool = True  # lower the learning rate linearly to 0 over the run
    buffer_size: Size = 100_000  # transitions in the replay buffer
    gamma: Fraction = 0.99  # discount factor
    tau: Fraction = 1.0  # step of the target network towards the Q-network; 1: a copy
    target_network_frequency: Steps = 500  # environment steps between updates of it
    batch_size: Count = 64  # transitions in a minibatch (B)
    start_e: Fraction = 1.0  # epsilon, the probability of a random action, at the start
    end_e: Fraction = 0.05  # epsilon after its decay
    exploration_fraction: Fraction = 0.2  # fraction of total-timesteps over which epsilon decays
    learning_starts: Steps = 1_000  # environment steps before the first update
    train_frequency: Steps = 2  # environment steps between updates
    gradient_steps: Count = 1  # gradient steps in an update
    hidden_size: SmallCount = 128  # units in each of the two hidden layers

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
        if self.learning_starts >= self.teacher_steps:
            raise ValueError("--learning-starts must be less than --teacher-steps")
        if self.offline_steps + self.learning_starts >= self.total_timesteps:
            raise ValueError(
                "--offline-steps and --learning-starts together must be less than --total-timesteps"
            )


# ---- Environment and network ---------------------------------------------------------------------


def make_env(args: Args, render_mode: str | None = None) -> gym.Env:
    """One environment with flat observations and discrete actions."""
    env = make_flat_env(args, render_mode)
    if not isinstance(env.action_space, gym.spaces.Discrete):
        raise UsageError(f"needs Discrete actions; {args.env_id} has {env.action_space}")
    return env


class QNetwork(nn.Module):
    """Q(s, .): two hidden layers. Output a is the value of action a."""

    def __init__(self, obs_size: int, num_actions: int, hidden_size: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(obs_size, hidden_size), nn.ReLU(),
            nn.Linear(hidden_size, hidden_size), nn.ReLU(),
            nn.Linear(hidden_size, num_actions),
        )  # fmt: skip

    def forward(self, obs: Tensor) -> Tensor:
        """Observations (B, O) -> Q(s, .) (B, K)."""
        return self.layers(obs)


def make_network(args: Args, envs: "Envs", hidden_size: int | None = None) -> QNetwork:
    """A Q-network for these environments: the student's, or a teacher's of another size."""
    size = args.hidden_size if hidden_size is None else hidden_size
    return QNetwork(envs.obs.shape[1], int(envs.action_space.n), size)


# ---- The algorithm -------------------------------------------------------------------------------


def linear_epsilon(step: int, start: float, end: float, duration: float) -> float:
    """Falls linearly from start at step 0 to end at step `duration`, and stays there."""
    return end if step >= duration else start + (end - start) * step / duration


class Actor:
    """The Q-network in NumPy: for a few rows, it is several times as fast as in PyTorch.

    It shares the weights of a network on the CPU. Of one on a GPU, it is a copy.
    """

    def __init__(self, q_network: QNetwork) -> None:
        weights = [weight.detach().cpu().numpy() for weight in q_network.layers.parameters()]
        self.layers = list(zip(weights[::2], weights[1::2]))

    def __call__(self, obs: np.ndarray) -> np.ndarray:
        """Observations (N, O) -> Q(s, .) (N, K)."""
        for weight, bias in self.layers[:-1]:
            obs = np.maximum(obs @ weight.T + bias, 0)
        weight, bias = self.layers[-1]
        return obs @ weight.T + bias


def act(actor: Actor, obs: np.ndarray, epsilon: float) -> np.ndarray:
    """Epsilon-greedy actions: observations (N, O) -> (N,)."""
    q_values = actor(obs)
    explore = torch.rand(len(q_values)).numpy() < epsilon
    random_actions = torch.randint(q_values.shape[1], (len(q_values),)).numpy()
    return np.where(explore, random_actions, q_values.argmax(1))


def td_target(rewards: Tensor, terminated: Tensor, next_q: Tensor, gamma: float) -> Tensor:
    """y = r + gamma * max_a' Q_target(s', a'), or r if terminated: (B,), (B,), (B, K) -> (B,)."""
    return rewards + gamma * next_q.max(1).values * ~terminated


def distillation_loss(q_values: Tensor, teacher_q: Tensor, temperature: float) -> Tensor:
    """Mean of KL(pi_T(.|s), pi(.|s)), from Q(s, .) and Q_T(s, .): (B, K), (B, K) -> scalar."""
    log_probs = F.log_softmax(q_values / temperature, dim=1)
    teacher_log_probs = F.log_softmax(teacher_q / temperature, dim=1)
    return F.kl_div(log_probs, teacher_log_probs, reduction="batchmean", log_target=True)


def distill_coeff(student_return: float, teacher_return: float, random_return: float) -> float:
    """lambda: 1 if the student is as good as random actions, 0 if as good as the teacher.

    Also 0 where the teacher is no better than random actions.
    """
    if teacher_return <= random_return:
        return 0.0
    share = (student_return - random_return) / (teacher_return - random_return)
    return min(max(1.0 - share, 0.0), 1.0)


@torch.no_grad()
def update_target(target_network: nn.Module, q_network: nn.Module, tau: float) -> None:
    """Each weight of the target network <- (1 - tau) * itself + tau * the Q-network's."""
    for target, source in zip(target_network.parameters(), q_network.parameters()):
        target.lerp_(source, tau)


class Batch(NamedTuple):
    """B transitions. Row b of each:"""

    obs: Tensor  # observation, (B, O)
    actions: Tensor  # action, (B,)
    rewards: Tensor  # reward, (B,)
    next_obs: Tensor  # next observation; at the end of an episode its last one, (B, O)
    terminated: Tensor  # whether the episode terminated; False if truncated, (B,)


def compute_gradient(
    q_network: nn.Module, target_network: nn.Module, teacher: nn.Module | None, weight: Tensor,
    batch: Batch, args: Args,
) -> dict[str, Tensor]:  # fmt: skip
    """The gradient of the loss on the B transitions of a batch -> metrics. Without a teacher, it is
    that of DQN; weight, a scalar, is that of imitation.
    """
    with torch.no_grad():  # the target is a constant
        next_q = target_network(batch.next_obs)
        target = td_target(batch.rewards, batch.terminated, next_q, args.gamma)
    all_q_values = q_network(batch.obs)
    q_values = all_q_values.gather(1, batch.actions[:, None]).squeeze(1)
    loss = F.mse_loss(q_values, target)
    metrics = {"losses/td_loss": loss.detach(), "losses/q_values": q_values.detach().mean()}
    if teacher is not None:
        with torch.no_grad():
            teacher_q = teacher(batch.obs)
        distill_loss = distillation_loss(all_q_values, teacher_q, args.temperature)
        metrics["losses/distill_loss"] = distill_loss.detach()
        loss = loss + weight * distill_loss
    loss.backward()
    return metrics


def update(
    q_network: nn.Module, target_network: nn.Module, teacher: nn.Module | None, weight: float,
    optimizer: torch.optim.Optimizer, batch: Batch, args: Args,
) -> dict[str, Tensor]:  # fmt: skip
    """One gradient step on a batch -> metrics."""
    scalar = torch.tensor(weight).to(batch.obs.device)  # a tensor, so that it is compiled once
    gradient = compiled(compute_gradient, args)
    optimizer.zero_grad()
    metrics = gradient(q_network, target_network, teacher, scalar, batch, args)
    optimizer.step()
    return metrics


# ---- Memory --------------------------------------------------------------------------------------


class ReplayBuffer:
    """The last `size` transitions, in a ring: the newest one replaces the oldest."""

    def __init__(self, size: int, obs_size: int) -> None:
        with as_usage_error(f"--buffer-size {size} does not fit into memory", RuntimeError):
            self.rows = Batch(
                obs=torch.zeros(size, obs_size), actions=torch.zeros(size, dtype=torch.int64),
                rewards=torch.zeros(size), next_obs=torch.zeros(size, obs_size),
                terminated=torch.zeros(size, dtype=torch.bool),
            )  # fmt: skip
        self.size, self.num_added = size, 0

    def add(self, *transitions: np.ndarray) -> None:
        """Adds N transitions, whose parts are those of a Batch: (N, O) or (N,)."""
        rows = (self.num_added + np.arange(len(transitions[0]))) % self.size
        for column, values in zip(self.rows, transitions):
            column.numpy()[rows] = values
        self.num_added += len(rows)

    def sample(self, batch_size: int) -> Batch:
        """B transitions, drawn uniformly, with replacement."""
        rows = torch.randint(min(self.num_added, self.size), (batch_size,))
        return Batch(*(column[rows] for column in self.rows))

    def state_dict(self) -> dict:
        """The rows that are filled, for a checkpoint."""
        filled = [column[: self.num_added].clone() for column in self.rows]
        return {"num_added": self.num_added, "rows": filled}

    def load_state_dict(self, state: dict) -> None:
        """Takes what `state_dict` gave."""
        self.num_added = int(state["num_added"])
        for column, saved in zip(self.rows, state["rows"], strict=True):
            column[: self.num_added] = saved


class Weaning:
    """lambda, from the mean return of the student's last episodes: 1 until there are enough of
    them. Once it is 0, it stays 0.
    """

    def __init__(self) -> None:
        self.returns, self.coefficient = deque(maxlen=WINDOW), 1.0

    def update(self, returns: list[float], teacher_return: float, random_return: float) -> None:
        """Takes the returns of new episodes, if any."""
        self.returns.extend(returns)
        if len(self.returns) == WINDOW and self.coefficient > 0:
            mean = float(np.mean(self.returns))
            self.coefficient = distill_coeff(mean, teacher_return, random_return)

    def state_dict(self) -> dict:
        return {"returns": list(self.returns), "coefficient": self.coefficient}

    def load_state_dict(self, state: dict) -> None:
        self.returns.extend(float(value) for value in state["returns"])
        self.coefficient = float(state["coefficient"])


# ---- Training and evaluation ---------------------------------------------------------------------


def collect(envs: "Envs", actor: Actor, epsilon: float, buffer: ReplayBuffer) -> None:
    """One step in every environment, which is added to the buffer."""
    obs = envs.obs.copy()
    actions = act(actor, obs, epsilon)
    next_obs, rewards, terminated, _ = envs.step(actions)
    buffer.add(obs, actions, rewards, next_obs, terminated)


def learn(
    q_network: nn.Module, target_network: nn.Module, teacher: nn.Module | None, weight: float,
    optimizer: torch.optim.Optimizer, buffer: ReplayBuffer, steps: range, args: Args,
) -> dict[str, Tensor]:  # fmt: skip
    """The gradient steps and target updates that are due in these environment steps -> metrics of
    the last gradient step.
    """
    metrics = {}
    for step in steps:
        if step % args.train_frequency == 0:
            for _ in range(args.gradient_steps):
                batch = Batch(*(part.to(args.device) for part in buffer.sample(args.batch_size)))
                metrics = update(q_network, target_network, teacher, weight, optimizer, batch, args)
        if step % args.target_network_frequency == 0:
            update_target(target_network, q_network, args.tau)
    return metrics


def train_teacher(args: Args) -> tuple[QNetwork, ReplayBuffer]:
    """A teacher, by DQN, and its transitions: the same ones each time."""
    envs = Envs(args, args.num_envs, TEACHER)
    with contextlib.closing(envs), torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.seed)
        envs.reset()
        sizes = args, envs, args.teacher_hidden_size
        q_network, target_network = make_network(*sizes), make_network(*sizes)
        q_network, target_network = q_network.to(args.device), target_network.to(args.device)
        target_network.load_state_dict(q_network.state_dict())
        optimizer = torch.optim.Adam(q_network.parameters(), lr=args.learning_rate, fused=True)
        buffer = ReplayBuffer(args.buffer_size, envs.obs.shape[1])
        duration = args.exploration_fraction * args.teacher_steps
        while envs.steps < args.teacher_steps:
            if args.anneal_lr:
                remaining = 1 - envs.steps / args.teacher_steps
                optimizer.param_groups[0]["lr"] = args.learning_rate * remaining
            epsilon = linear_epsilon(envs.steps, args.start_e, args.end_e, duration)
            collect(envs, Actor(q_network), epsilon, buffer)
            first = max(envs.steps - args.num_envs + 1, args.learning_starts)
            steps = range(first, envs.steps + 1)
            learn(q_network, target_network, None, 0.0, optimizer, buffer, steps, args)
    if not all(weight.isfinite().all() for weight in q_network.parameters()):
        raise UsageError("a weight of the teacher is not finite: try a lower --learning-rate")
    return q_network, buffer


def read_teacher(args: Args, envs: "Envs") -> tuple[QNetwork, ReplayBuffer]:
    """Network and replay buffer in the last checkpoint of dqn_cartpole.py, or of this script."""
    what = f"--teacher {args.teacher} is no run of dqn_cartpole.py for {args.env_id}"
    with as_usage_error(what, Exception):
        path = checkpoint_path(args.teacher)
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["args"]["env_id"] != args.env_id:
            raise ValueError(f"its environment is {state['args']['env_id']}")
        q_network = make_network(args, envs, state["args"]["hidden_size"])
        q_network.load_state_dict(state["network"])
        buffer = ReplayBuffer(len(state["buffer"]["rows"][0]), envs.obs.shape[1])
        buffer.load_state_dict(state["buffer"])
        return q_network.to(args.device), buffer


def mean_return(args: Args, q_network: QNetwork, epsilon: float) -> float:
    """Of args.teacher_episodes whole episodes, epsilon-greedy, the same ones each time."""
    num_envs = min(args.num_envs, args.teacher_episodes)
    quota = [len(range(i, args.teacher_episodes, num_envs)) for i in range(num_envs)]  # for each
    envs, actor = Envs(args, num_envs, TEACHER), Actor(q_network)
    with contextlib.closing(envs), torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.seed)
        envs.reset()
        while len(which := np.flatnonzero(np.less(envs.episodes, quota))) > 0:
            envs.step(act(actor, envs.obs[which], epsilon), which)
    return float(np.mean([episodic_return for _, episodic_return, _ in envs.finished]))


def train(args: Args) -> "Result":
    """Trains a student, from the start or from the checkpoint in args.resume."""
    torch.manual_seed(args.seed)
    envs = Envs(args, args.num_envs, TRAINING)
    recorded = None if args.teacher == "dqn" else read_teacher(args, envs)
    q_network, target_network = make_network(args, envs), make_network(args, envs)
    q_network, target_network = q_network.to(args.device), target_network.to(args.device)
    target_network.load_state_dict(q_network.state_dict())
    optimizer = torch.optim.Adam(q_network.parameters(), lr=args.learning_rate, fused=True)
    buffer, weaning = ReplayBuffer(args.buffer_size, envs.obs.shape[1]), Weaning()
    parts = {"target_network": target_network, "optimizer": optimizer, "buffer": buffer}
    with Run(args, envs, q_network, weaning=weaning, **parts) as run:
        teacher, teacher_buffer = recorded or train_teacher(args)
        teacher_return = mean_return(args, teacher, args.end_e)  # explores as the student does
        random_return = mean_return(args, teacher, epsilon=1.0)
        tqdm.write(
            f"Return of the teacher: {teacher_return:.1f}; of random play: {random_return:.1f}"
        )
        metrics = {}  # of the last gradient step
        while run.is_running():
            if args.anneal_lr:
                remaining = 1 - envs.steps / args.total_timesteps
                optimizer.param_groups[0]["lr"] = args.learning_rate * remaining

            # Act: one step in every environment; not at first, while it learns offline.
            offline, ended = envs.steps < args.offline_steps, len(envs.finished)
            if offline:
                envs.steps += args.num_envs
            else:
                collect(envs, Actor(q_network), args.end_e, buffer)
            returns = [episodic_return for _, episodic_return, _ in envs.finished[ended:]]
            weaning.update(returns, teacher_return, random_return)

            # Learn: the gradient steps and target updates that are due in these N steps.
            start = 1 if offline else args.offline_steps + args.learning_starts
            steps = range(max(envs.steps - args.num_envs + 1, start), envs.steps + 1)
            source, weight = teacher_buffer if offline else buffer, args.distill_weight
            metrics |= learn(
                q_network, target_network, teacher, weight * weaning.coefficient, optimizer, source,
                steps, args,
            )  # fmt: skip

            # Log, evaluate, save.
            if run.is_due(LOG_FREQUENCY):
                learning_rate = optimizer.param_groups[0]["lr"]
                rates = {"charts/learning_rate": learning_rate}
                run.log(metrics | rates | {"charts/distill_coeff": weaning.coefficient})
            if run.is_due(args.eval_frequency):
                run.evaluate()
            if run.is_due(args.checkpoint_frequency):
                run.save()
        return run.finish()


def play(args: Args, q_network: QNetwork, obs: np.ndarray) -> np.ndarray:
    """How the trained policy is evaluated: observations (N, O) -> actions (N,)."""
    return act(Actor(q_network), obs, epsilon=0.0)


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
