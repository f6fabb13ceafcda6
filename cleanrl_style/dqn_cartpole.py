# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "torch>=2.4.0", "gymnasium[classic-control]>=1.0.0", "tyro>=1.0.16", "tensorboard>=2.20.0", "tqdm>=4.66.0",
# ]
# ///
r"""Deep Q-learning (DQN) for flat observations and discrete actions.

Paper    Mnih et al. (2015), "Human-level control through deep reinforcement learning", Algorithm 1. Double Q-learning:
         van Hasselt et al. (2016), "Deep reinforcement learning with double Q-learning", equation 4.
Idea     Learn Q(s, a), the discounted sum of rewards to come after action a in state s if one acts well from then on,
         and take the action of largest Q. What Q should be follows from what came a step later (Bellman's equation):

             y    = r + gamma * max_a' Q_target(s', a')              the target; y = r if the episode terminated in s'
             y    = r + gamma * Q_target(s', argmax_a' Q(s', a'))    that of double Q-learning (--double-q)
             loss = mean of (Q(s, a) - y)^2                          over B transitions (s, a, r, s')

         The transitions are drawn at random from a replay buffer, since neighbours in time are too alike to learn from.
         Q_target is a copy of the network from a while ago, so that the network does not chase a target that moves with
         its every step. With probability epsilon, which decays, an action is random, or nothing new would be tried.
Differs  Adam in place of RMSProp, with a learning rate that falls to 0, so that the policy settles; epsilon falls from
         the first step on; the plain square of the error; a small network, as there are no pixels. N environments are
         stepped side by side, and all begin new episodes at a checkpoint, since Gymnasium cannot save an environment's
         state. Where only a time limit ends an episode, y still counts what would have followed. With --norm-obs,
         observations are normalised by running statistics of what is in the buffer.
Shapes   N environments; B transitions of a batch; O numbers of an observation; K actions.
Run      python dqn_cartpole.py
         python dqn_cartpole.py --env-id MountainCar-v0 --total-timesteps 200000 --num-envs 1 --learning-rate 4e-3 \
             --buffer-size 200000 --gamma 0.98 --target-network-frequency 600 --batch-size 128 --end-e 0.07 \
             --train-frequency 16 --gradient-steps 8 --hidden-size 256
         python dqn_cartpole.py --env-id Acrobot-v1 --num-envs 1 --learning-rate 6.3e-4 --buffer-size 50000 \
             --target-network-frequency 250 --batch-size 128 --end-e 0.1 --exploration-fraction 0.12 \
             --train-frequency 4 --gradient-steps 4 --hidden-size 256
         The settings of the last two are RL Zoo's, but for the loss, the falling learning rate, gradients that are not
         cut, --learning-starts on Acrobot and, on MountainCar, more steps and a buffer for all of them.
Expect   Return of the greedy policy over 100 episodes, mean over seeds 1 to 10 (worst to best seed), and wall time on
         one core of an AMD EPYC that had other work, too, start-up and evaluation included:
             CartPole-v1     488.6 (386.4 to 500.0)    100k steps    60 s   nine seeds of ten reached 500.0
             MountainCar-v0  -113.0 (-200.0 to -98.5)  200k steps   189 s   one seed of ten found the goal too late
             Acrobot-v1      -76.3 (-79.5 to -73.4)    100k steps   370 s   with another run and other work beside it
"""

import math
import os
import sys
import time
from argparse import ArgumentParser
from collections import deque
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, NoReturn

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

SCRIPT = "dqn_cartpole"  # named in checkpoints and messages
MAX_EPISODE_STEPS = 10_000  # the time limit of environments that declare none: no episode is endless
LOG_FREQUENCY = 1_000  # steps between points of the losses
SAMPLE = 1_000  # observations that --norm-obs takes in, first of all and before each update of the target network
MAX_FRAMES = 1_000  # steps, at most, that the animated picture covers; it shows every second one
RunDir = Annotated[str | None, tyro.conf.arg(metavar="RUN_DIR")]


@dataclass(frozen=True)
class Args:
    env_id: str = "CartPole-v1"  # a Gymnasium environment that fits, or my_module:MyEnv-v0
    seed: int = 1  # of all that is random in the run
    total_timesteps: int = 100_000  # environment steps to train for, at least

    learning_rate: float = 2.5e-3  # step size of Adam
    anneal_lr: bool = True  # lower the learning rate linearly, to 0 at the end of the run
    num_envs: int = 4  # environments that are stepped side by side (N)
    buffer_size: int = 100_000  # transitions that the replay buffer holds
    gamma: float = 0.99  # discount factor
    tau: float = 1.0  # share of the Q-network that goes into the target network at each of its updates; 1: a copy
    target_network_frequency: int = 500  # environment steps between updates of the target network
    batch_size: int = 64  # transitions in one gradient step (B)
    start_e: float = 1.0  # epsilon, the probability of a random action, at the start
    end_e: float = 0.05  # epsilon at the end of its decay
    exploration_fraction: float = 0.2  # share of total-timesteps that the decay takes
    learning_starts: int = 1_000  # environment steps before the first gradient step
    train_frequency: int = 2  # environment steps between gradient steps
    gradient_steps: int = 1  # how many at a time; many, with long pauses, change the policy in bursts
    double_q: bool = False  # the Q-network chooses the next action, the target network values it
    norm_obs: bool = False  # shift and scale observations to mean 0 and standard deviation 1
    hidden_size: int = 64  # units in each of the network's two hidden layers

    exp_name: str = SCRIPT  # part of the run folder's name
    runs_dir: str = "runs"  # where run folders are made
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: cpu for small networks; cuda (if any) for pixels
    checkpoint_frequency: int = 20_000  # steps between checkpoints; 0: only at the start and the end
    resume: RunDir = None  # go on with this run from its last checkpoint
    evaluate: RunDir = None  # play this run's policy, do not train
    eval_episodes: int = 100  # episodes to evaluate the policy with after training
    capture_video: bool = False  # save the first evaluation episode as an animated picture, episode.gif

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if type(value) not in (str, int, float, bool, type(None)):  # a checkpoint could not be read again
                raise ValueError(f"{name} must be a plain Python value, not {type(value).__name__}")
        for name in (
            "total_timesteps", "num_envs", "buffer_size", "target_network_frequency", "batch_size", "train_frequency",
            "gradient_steps", "hidden_size", "eval_episodes",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
        for name in ("gamma", "start_e", "end_e", "exploration_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"--{name.replace('_', '-')} must be between 0 and 1, not {getattr(self, name)}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"--seed must be between 0 and 2**63 - 1, not {self.seed}")
        if self.checkpoint_frequency < 0:
            raise ValueError(f"--checkpoint-frequency must be at least 0, not {self.checkpoint_frequency}")
        if not 0 < self.learning_rate < float("inf"):
            raise ValueError(f"--learning-rate must be a positive number, not {self.learning_rate}")
        if not 0 < self.tau <= 1:
            raise ValueError(f"--tau must be greater than 0 and at most 1, not {self.tau}")
        if self.learning_starts < self.batch_size:
            raise ValueError(f"--learning-starts must be at least --batch-size, not {self.learning_starts}")
        if self.buffer_size < self.learning_starts:
            raise ValueError(f"--buffer-size must be at least --learning-starts, not {self.buffer_size}")
        if self.learning_starts >= self.total_timesteps:
            raise ValueError("--learning-starts must be less than --total-timesteps, or nothing is learned")
        if self.resume is not None and self.evaluate is not None:
            raise ValueError("--resume and --evaluate exclude each other")


# Arguments that do not change what is learned, apart from rounding. --checkpoint-frequency does: it cuts episodes.
HOUSEKEEPING = {"exp_name", "runs_dir", "device", "resume", "evaluate", "eval_episodes", "capture_video"}


# ---- Environment and network ----------------------------------------------------------------------------------------


def make_envs(args: Args) -> list[gym.Env]:
    """N environments, to be stepped side by side; with --capture-video, the first can be drawn."""
    sys.path.append(os.getcwd())  # my_module may lie where the command was typed
    try:
        envs = [gym.make(args.env_id) for _ in range(args.num_envs)]
    except (gym.error.Error, ImportError, ValueError) as error:
        fail(f"cannot make the environment {args.env_id!r}: {error}")
    if args.capture_video:
        if "rgb_array" not in envs[0].metadata.get("render_modes", ()):
            fail(f"--capture-video: {args.env_id} has no render mode 'rgb_array'")
        envs[0] = drawable(args.env_id)
    obs_space, action_space = envs[0].observation_space, envs[0].action_space
    flat = isinstance(obs_space, gym.spaces.Box) and len(obs_space.shape) == 1
    if not (flat and isinstance(action_space, gym.spaces.Discrete)):
        fail(f"needs a flat Box observation and Discrete actions; {args.env_id} has {obs_space} and {action_space}")
    if envs[0].spec.max_episode_steps is None:
        envs = [gym.wrappers.TimeLimit(env, MAX_EPISODE_STEPS) for env in envs]
    return envs


def drawable(env_id: str) -> gym.Env:
    """The environment, made to be drawn. Draws it once: what is missing should not come to light after the training."""
    os.environ["SDL_VIDEODRIVER"] = "dummy"  # drawing needs no screen
    try:
        env = gym.make(env_id, render_mode="rgb_array")
        env.reset()
        frame = env.render()
    except Exception as error:  # graphics libraries fail in a dozen ways
        fail(f"--capture-video: {env_id} cannot be drawn: {error}")
    if not isinstance(frame, np.ndarray) or frame.shape[2:] != (3,) or frame.dtype != np.uint8:
        fail(f"--capture-video: {env_id} does not draw arrays (H, W, 3) of uint8")
    return env


TRAINING, EVALUATION = 0, 1  # streams of seeds: (TRAINING, step) after the checkpoint of that step, (EVALUATION,)


def episode_seeds(seed: int, stream: tuple[int, ...], count: int) -> list[int]:
    """Seeds to reset the environments with, which depend on the run's seed and the stream alone.

    So a resumed run plays the same episodes as one that never stopped. Of 2**32 seeds, two streams rarely share one.
    """
    return np.random.SeedSequence(seed, spawn_key=stream).generate_state(count).tolist()


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
    """Q(s, .): three linear layers with ReLUs between. Output a is the value of action a."""

    def __init__(self, obs_size: int, num_actions: int, hidden_size: int, norm_obs: bool) -> None:
        super().__init__()
        self.obs_statistics = RunningStatistics(obs_size) if norm_obs else None
        self.layers = nn.Sequential(
            nn.Linear(obs_size, hidden_size), nn.ReLU(),
            nn.Linear(hidden_size, hidden_size), nn.ReLU(),
            nn.Linear(hidden_size, num_actions),
        )  # fmt: skip

    def forward(self, obs: Tensor) -> Tensor:
        """Observations (B, O) -> Q(s, .) (B, K)."""
        if self.obs_statistics is not None:
            mean, variance = self.obs_statistics.mean, self.obs_statistics.variance
            obs = ((obs - mean) / (variance + 1e-8).sqrt()).clamp(-10, 10)
        return self.layers(obs)


def make_network(args: Args, envs: list[gym.Env]) -> QNetwork:
    """A Q-network that fits the environments."""
    obs_size, num_actions = envs[0].observation_space.shape[0], int(envs[0].action_space.n)
    return QNetwork(obs_size, num_actions, args.hidden_size, args.norm_obs)


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

    obs: Tensor  # what the environment showed, not normalised, (B, O)
    actions: Tensor  # what was done then, (B,)
    rewards: Tensor  # what it brought, (B,)
    next_obs: Tensor  # what was seen next: after an episode's last step, its last observation, (B, O)
    terminated: Tensor  # whether the episode is over and nothing follows; False at a time limit, (B,)


def update(
    q_network: nn.Module, target_network: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, args: Args
) -> dict[str, Tensor]:
    """One gradient step on the B transitions of a batch -> metrics, scalars."""
    with torch.no_grad():  # the target is a constant, although the network made it
        next_q_online = q_network(batch.next_obs) if args.double_q else None
        next_q = target_network(batch.next_obs)
        target = td_target(batch.rewards, batch.terminated, next_q, args.gamma, next_q_online)
    q_values = q_network(batch.obs).gather(1, batch.actions[:, None]).squeeze(1)
    loss = F.mse_loss(q_values, target)
    if not loss.isfinite():
        raise FloatingPointError(f"the loss is {loss.item()}")
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return {"losses/td_loss": loss.detach(), "losses/q_values": q_values.detach().mean()}


def is_due(step: int, count: int, frequency: int) -> bool:
    """Whether a multiple of frequency is among the last `count` numbers up to step; never, if frequency is 0."""
    return frequency > 0 and step % frequency < count


# ---- Memory ---------------------------------------------------------------------------------------------------------


class ReplayBuffer:
    """The last transitions, as many as `size`, in a ring: once it is full, the newest takes the place of the oldest."""

    def __init__(self, size: int, obs_size: int) -> None:
        try:
            self.rows = Batch(
                obs=torch.zeros(size, obs_size), actions=torch.zeros(size, dtype=torch.int64),
                rewards=torch.zeros(size), next_obs=torch.zeros(size, obs_size),
                terminated=torch.zeros(size, dtype=torch.bool),
            )  # fmt: skip
        except RuntimeError:  # PyTorch has no MemoryError
            fail(f"--buffer-size {size}: so many transitions do not fit into memory")
        self.arrays = [part.numpy() for part in self.rows]  # the same memory, where writing one row is quicker
        self.size, self.num_added = size, 0

    def add(self, *transition: np.ndarray | float | bool) -> None:
        """Copies one transition: obs (O,), action, reward, next_obs (O,), terminated."""
        row = self.num_added % self.size
        for array, value in zip(self.arrays, transition):
            array[row] = value
        self.num_added += 1

    def sample(self, batch_size: int) -> Batch:
        """Each of the B rows is any transition of the buffer, all equally probable."""
        chosen = torch.randint(min(self.num_added, self.size), (batch_size,))
        return Batch(*(part[chosen] for part in self.rows))

    def state_dict(self) -> dict:
        """The rows that are filled, for a checkpoint."""
        return {"num_added": self.num_added, "rows": [part[: self.num_added].clone() for part in self.rows]}

    def load_state_dict(self, state: dict) -> None:
        """Puts back what `state_dict` gave."""
        self.num_added = state["num_added"]
        for part, saved in zip(self.rows, state["rows"]):
            part[: self.num_added] = saved


# ---- Training -------------------------------------------------------------------------------------------------------


def train(args: Args) -> Path:
    """Trains a Q-network, from the start or from the checkpoint in args.resume, and returns the run's folder."""
    torch.set_num_threads(1)  # for a network this small, a second thread costs more than it brings
    torch.manual_seed(args.seed)
    device = pick_device(args.device)
    envs, num_envs = make_envs(args), args.num_envs
    first_action = int(envs[0].action_space.start)  # Discrete actions count from here, nearly always from 0
    q_network, target_network = make_network(args, envs).to(device), make_network(args, envs).to(device)
    target_network.load_state_dict(q_network.state_dict())
    target_network.obs_statistics = q_network.obs_statistics  # both see the same
    optimizer = torch.optim.Adam(q_network.parameters(), lr=args.learning_rate, fused=True)
    buffer = ReplayBuffer(args.buffer_size, envs[0].observation_space.shape[0])
    parts = {"q_network": q_network, "target_network": target_network, "optimizer": optimizer, "buffer": buffer}
    global_step = 0
    if args.resume is not None:
        state = load_checkpoint(args.resume, args, **parts)
        global_step = state["global_step"]
        torch.set_rng_state(state["random_state"])
    run_dir = make_run_dir(args) if args.resume is None else Path(args.resume)
    print(f"Training in {run_dir}", flush=True)
    writer = open_log(run_dir, args, global_step)

    def save() -> None:
        writer.flush()  # the event file must not lag behind the checkpoint
        save_checkpoint(run_dir, args, parts, global_step=global_step)

    first_step, start_time, recent, obs = global_step, time.perf_counter(), deque(maxlen=20), None
    save()  # from here on there is something to resume
    try:
        with progress_bar(global_step, args.total_timesteps) as bar:
            while global_step < args.total_timesteps:
                if obs is None:  # at the start and after each checkpoint: new episodes, given by seed and step alone
                    seeds = episode_seeds(args.seed, (TRAINING, global_step), num_envs)
                    obs = [env.reset(seed=seed)[0] for env, seed in zip(envs, seeds)]
                    returns, lengths, metrics = [0.0] * num_envs, [0] * num_envs, {}
                if args.anneal_lr:
                    optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - global_step / args.total_timesteps)

                # Act: one step in every environment. Where an episode ends, the next one begins.
                duration = args.exploration_fraction * args.total_timesteps
                epsilon = linear_epsilon(global_step, args.start_e, args.end_e, duration)
                rows = np.array(obs, dtype=np.float32)
                actions = select_actions(q_network, torch.from_numpy(rows).to(device), epsilon)
                for i, action in enumerate(actions.tolist()):
                    obs[i], reward, terminated, truncated, _ = envs[i].step(first_action + action)
                    buffer.add(rows[i], action, reward, obs[i], terminated)
                    global_step += 1
                    returns[i], lengths[i] = returns[i] + float(reward), lengths[i] + 1
                    if terminated or truncated:
                        writer.add_scalar("charts/episodic_return", returns[i], global_step)
                        writer.add_scalar("charts/episodic_length", lengths[i], global_step)
                        recent.append(returns[i])
                        obs[i], returns[i], lengths[i] = envs[i].reset()[0], 0.0, 0

                # Learn: the gradient steps and target updates that fall due in these N steps.
                for step in range(max(global_step - num_envs + 1, args.learning_starts), global_step + 1):
                    if args.norm_obs and (step == args.learning_starts or step % args.target_network_frequency == 0):
                        q_network.obs_statistics.update(buffer.sample(SAMPLE).obs.to(device))
                    if step % args.train_frequency == 0:
                        for _ in range(args.gradient_steps):
                            batch = Batch(*(part.to(device) for part in buffer.sample(args.batch_size)))
                            metrics = update(q_network, target_network, optimizer, batch, args)
                    if step % args.target_network_frequency == 0:
                        update_target(target_network, q_network, args.tau)

                # Log, save.
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
                    save()
                    obs, envs = None, make_envs(args)  # new ones, as in a resumed run, so that both go on alike
    except (FloatingPointError, KeyboardInterrupt) as error:
        stop(error, global_step, run_dir)

    log_evaluation(writer, args, run_dir, global_step, *evaluate(args, envs, q_network, run_dir))
    print(run_dir)
    return run_dir


def play_greedily(
    envs: list[gym.Env], q_network: nn.Module, seeds: list[int], frames: list | None = None
) -> list[list[float]]:
    """Plays one episode for each seed, side by side, by the largest Q(s, .): the rewards of each.

    If there is a list for frames, every second step of the first episode is drawn into it.
    """
    first_action, device = int(envs[0].action_space.start), next(q_network.parameters()).device
    rewards = [[] for _ in seeds]
    obs = [env.reset(seed=seed)[0] for env, seed in zip(envs, seeds)]
    running = list(range(len(seeds)))
    while running:
        rows = np.array([obs[i] for i in running], dtype=np.float32)
        actions = select_actions(q_network, torch.from_numpy(rows).to(device), epsilon=0.0)
        if frames is not None and running[0] == 0 and len(rewards[0]) in range(0, MAX_FRAMES, 2):
            frames.append(envs[0].render())
        still_running = []
        for i, action in zip(running, actions.tolist()):
            obs[i], reward, terminated, truncated, _ = envs[i].step(first_action + action)
            rewards[i].append(float(reward))
            if not (terminated or truncated):
                still_running.append(i)
        running = still_running
    return rewards


def evaluate(args: Args, envs: list[gym.Env], q_network: nn.Module, run_dir: Path) -> tuple[float, float]:
    """Plays args.eval_episodes with the greedy policy, prints how it went, returns their mean return and length."""
    seeds = episode_seeds(args.seed, (EVALUATION,), args.eval_episodes)
    episodes, frames = [], ([] if args.capture_video else None)
    for first in range(0, len(seeds), len(envs)):
        episodes += play_greedily(envs, q_network, seeds[first : first + len(envs)], None if first else frames)
    returns = [sum(rewards) for rewards in episodes]
    print(f"Evaluation: return {np.mean(returns):.1f} ± {np.std(returns):.1f} over {len(returns)} episodes, greedy")
    if frames:
        fps = envs[0].metadata.get("render_fps") or 30
        path, milliseconds = run_dir / "episode.gif", 2 * 1000 / fps  # of every second frame, to halve the file
        pictures = [Image.fromarray(frame).quantize(method=Image.Quantize.FASTOCTREE) for frame in frames]
        pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=milliseconds, loop=0)
        print(f"Animated picture: {path}")
    return float(np.mean(returns)), float(np.mean([len(rewards) for rewards in episodes]))


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


def pick_device(name: str) -> torch.device:
    """auto is the CPU: calling a GPU takes longer than computing so small a network."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available.get(name, True):
        fail(f"--device {name}: PyTorch finds no such device on this machine")
    return torch.device("cpu" if name == "auto" else name)


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
            envs = make_envs(args)
            q_network = make_network(args, envs)
            load_checkpoint(args.evaluate, args, q_network=q_network)
            evaluate(args, envs, q_network.to(pick_device(args.device)), Path(args.evaluate))
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
