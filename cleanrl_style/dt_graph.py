# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch>=2.4.0", "gymnasium[classic-control]>=1.0.0", "tyro>=1.0.16", "tensorboard>=2.20.0",
#   "tqdm>=4.66.0",
# ]
# ///
"""Decision Transformer (DT) from recorded steps, for flat observations and discrete actions.

Paper    Chen et al. (2021), "Decision Transformer: reinforcement learning via sequence modeling",
         section 3 and Algorithm 1, with the authors' code (gym); a graph as in figure 2.
Idea     Learn a policy from a fixed data set of whole episodes, whoever played them, as a language
         model learns to continue a text. The return-to-go R_t is the sum of the rewards from step t
         to the end. A transformer reads the last T steps, three tokens each, and learns which
         action was taken:

             R_t    = r_t + R_{t+1}       or r_t alone, in the last step of an episode
             text   = R_1, s_1, a_1, R_2, s_2, a_2, ...     each token sees itself and those before
             token  = LayerNorm(embedding of R_t, s_t or a_t + embedding of t)
             loss   = mean of -log pi(a_t | ... R_t, s_t)            at the token of s_t
                      + mean of (prediction of r_t - r_t)^2          at the token of a_t

         To act, set R_1 to the return that you want, then R_{t+1} = R_t - r_t. The most probable
         action is the one taken most often where the rest of the episode was paid R_t. No value is
         learned, and nothing bootstraps. Without R (--no-condition), it is behaviour cloning.
         Here, each step in a graph costs 1, until the goal or for 20 steps. Of random walks, two in
         three never arrive, and one in 43 takes a shortest way, of 7 steps.
Differs  R and r are normalised by mean and deviation over the data, as observations are; the paper
         divides R by a number for each environment, such as 1000. A sequence is drawn by its last
         step, not its first. The network is smaller, without warm-up, weight decay and dropout; the
         learning rate is larger, and falls to 0. On its graph, the paper also samples R, and
         prefers high ones. Rewards are predicted for the policy of load_policy, which is not told
         them; evaluation subtracts the true ones. That policy remembers its calls: load it anew for
         each episode. A run's buffer does not record time limits: where a step does not lead to the
         next row, an episode has ended. Steps in the log and in --total-timesteps are gradient
         steps.
Shapes   N environments; D recorded steps; B sequences of T steps in a batch, S = 3 * T tokens; O
         numbers of an observation, W of a token; K actions; L layers.
Run      python dt_graph.py
         python dt_graph.py --evaluate runs/NAME --target-return -12
         python dt_graph.py --env-id CartPole-v1 --dataset runs/NAME    (a run of dqn_cartpole.py)
         python dt_graph.py --env-id CartPole-v1 --dataset recorded.npz    (arrays of D rows, as
             played, from a start: observations, actions, rewards, terminals, timeouts)
Expect   Return of the greedy policy over 100 episodes, mean over seeds 1 to 10 (worst to best
         seed), and median wall time with start-up, random play and evaluations, on one core of an
         AMD EPYC beside other work:
             Graph-v0    -7.0 (-7.0 to -7.0)    2k gradient steps    58 s
         Asked for -9, -12 or -16, each seed gets exactly that, but for one: -14, not -16. With
         --no-condition, seeds 1 to 3:
             Graph-v0    -20.0 (-20.0 to -20.0)    2k gradient steps    58 s
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

SCRIPT = "dt_graph"  # named in checkpoints and messages
LOG_EVERY = 100  # gradient steps between points of the losses
EPSILON = 1e-3  # is added to deviations: a number of an observation may never change

# Argument types with their bounds.
Steps = Annotated[int, 1, 10**12]
Frequency = Annotated[int, 0, 10**12]  # interval in steps; 0: never
Size = Annotated[int, 1, 10**8]
Count = Annotated[int, 1, 10**6]
SmallCount = Annotated[int, 1, 4096]
Positive = Annotated[float, 1e-30, 1e30]
Weight = Annotated[float, 0, 1e30]

HIDDEN = 64  # numbers of a token (W)
HEADS = 4  # of the attention, with W / 4 numbers each


@dataclass(frozen=True)
class Args:
    env_id: str = "Graph-v0"  # Gymnasium environment, or my_module:MyEnv-v0
    env_kwargs: str = "{}"  # of the environment, as JSON: '{"is_slippery": false}'
    seed: Annotated[int, 0, 2**63 - 1] = 1  # of all random numbers in the run
    total_timesteps: Steps = 2_000  # gradient steps to train for
    num_envs: SmallCount = 10  # parallel environments (N)

    dataset: str = "random"  # random: play at random first; or the folder of a run, or an .npz file
    dataset_size: Size = 40_000  # steps of random play, at least
    learning_rate: Positive = 2e-3  # step size of the optimizer
    anneal_lr: bool = True  # lower the learning rate linearly to 0 over the run
    num_sequences: Count = 64  # sequences in a minibatch (B)
    sequence_length: SmallCount = 5  # steps of a sequence that are learned from (T)
    num_layers: SmallCount = 2  # layers of the transformer (L)
    max_grad_norm: Weight = 0.25  # largest norm of the gradient; 0: not clipped
    condition: bool = True  # show the returns-to-go to the network; off: behaviour cloning
    target_return: float | None = None  # return to ask for; None: the best one in the data

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
        if not math.isfinite(self.target_return or 0):
            raise ValueError(f"--target-return must be finite or None, not {self.target_return}")


# ---- Environment and network ---------------------------------------------------------------------


class Graph(gym.Env):
    """A fixed directed graph, with `arcs` arcs from each node to random others. Action k follows
    the k-th, and costs 1. Start and goal are the two nodes that are furthest apart.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 2}

    def __init__(
        self, nodes: int = 20, arcs: int = 2, graph_seed: int = 8, render_mode: str | None = None
    ) -> None:
        if not 1 <= arcs < nodes:
            raise ValueError("arcs must be at least 1 and fewer than nodes")
        self.render_mode, random = render_mode, np.random.default_rng(graph_seed)
        others = [(node + 1 + random.permutation(nodes - 1)) % nodes for node in range(nodes)]
        self.next = np.stack(others)[:, :arcs]  # where each arc of each node leads
        self.distances = np.full((nodes, nodes), np.inf)  # in steps, from the node of each row
        np.put_along_axis(self.distances, self.next, 1, 1)
        np.fill_diagonal(self.distances, 0)
        for node in range(nodes):  # which may be on the way, too (Floyd and Warshall)
            via = self.distances[:, [node]] + self.distances[node]
            self.distances = np.minimum(self.distances, via)
        reached = np.where(np.isinf(self.distances), -1, self.distances)
        self.start, self.goal = divmod(int(reached.argmax()), nodes)
        self.observation_space = gym.spaces.Box(0, 1, (nodes,), np.float32)  # one-hot
        self.action_space = gym.spaces.Discrete(arcs)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple:
        super().reset(seed=seed)
        self.node = self.start
        return self.observe(), {}

    def observe(self) -> np.ndarray:
        return np.eye(len(self.next), dtype=np.float32)[self.node]

    def step(self, action: int) -> tuple:
        self.node = int(self.next[self.node, action])
        return self.observe(), -1.0, self.node == self.goal, False, {}

    def render(self) -> np.ndarray:
        """The nodes, and dots along the arcs from the current one (blue). The goal is green."""
        line, count = np.linspace(-1.2, 1.2, 160), len(self.next)
        pixels, picture = line - 1j * line[:, None], np.full((160, 160, 3), 255, np.uint8)
        places = np.exp(2j * np.pi * np.arange(count) / count)
        here, ends = places[self.node], places[self.next[self.node]]
        dots = (here + np.linspace(0, 1, 20)[:, None] * (ends - here)).reshape(-1)
        for points, radius, color in (
            (dots, 0.02, (150, 150, 150)), (places, 0.06, (200, 200, 200)),
            (places[[self.goal]], 0.1, (60, 160, 60)), (places[[self.node]], 0.06, (60, 60, 220)),
        ):  # fmt: skip
            picture[(np.abs(pixels[..., None] - points) < radius).any(2)] = color
        return picture


gym.register("Graph-v0", entry_point=Graph, max_episode_steps=20)


def make_env(args: Args, render_mode: str | None = None) -> gym.Env:
    """One environment with flat observations and discrete actions."""
    env = make_flat_env(args, render_mode)
    if not isinstance(env.action_space, gym.spaces.Discrete):
        raise UsageError(f"needs Discrete actions; {args.env_id} has {env.action_space}")
    return env


def visible(real: Tensor) -> Tensor:
    """Which of the S = 3 * T tokens each one sees: itself and those before it, but no padding, from
    whether each step is real: (B, T) -> (B, 1, S, S).

    Padding sees only itself, as the softmax over no token is NaN.
    """
    place = torch.arange(3 * real.shape[1], device=real.device)
    before = (place < place[:, None]) & real.repeat_interleave(3, 1)[:, None]
    return (before | (place == place[:, None]))[:, None]


class Layer(nn.Module):
    """One layer of the transformer: attention to what is visible, then an MLP for each token."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.query_key_value = nn.Linear(HIDDEN, 3 * HIDDEN)
        self.join_heads = nn.Linear(HIDDEN, HIDDEN)
        self.mlp = nn.Sequential(
            nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, 4 * HIDDEN), nn.GELU(),
            nn.Linear(4 * HIDDEN, HIDDEN),
        )  # fmt: skip

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        """Tokens (B, S, W) and the mask of `visible` (B, 1, S, S) -> tokens (B, S, W)."""
        parts = self.query_key_value(self.norm(x)).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in parts)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        x = x + self.join_heads(y.transpose(1, 2).flatten(-2))
        return x + self.mlp(x)


class Agent(nn.Module):
    """pi(a_t | ... R_t, s_t) and, from the same tokens and a_t, the reward that will be paid."""

    def __init__(
        self, obs_size: int, num_actions: int, max_times: int, num_layers: int, condition: bool
    ) -> None:
        super().__init__()
        self.condition = condition
        self.return_scale, self.reward_scale = Scale(1), Scale(1)
        self.obs_scale = Scale(obs_size)
        self.register_buffer("best_return", torch.zeros(()))  # of an episode in the data
        self.embed_return, self.embed_obs = nn.Linear(1, HIDDEN), nn.Linear(obs_size, HIDDEN)
        self.embed_action = nn.Embedding(num_actions, HIDDEN)
        self.embed_time = nn.Embedding(max_times, HIDDEN)
        self.first_norm, self.last_norm = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)
        self.layers = nn.ModuleList([Layer() for _ in range(num_layers)])
        self.actor, self.reward = nn.Linear(HIDDEN, num_actions), nn.Linear(HIDDEN, 1)
        self.state = None  # of the episodes that `play` plays; no part of the checkpoint

    def forward(self, batch: "Batch") -> tuple[Tensor, Tensor]:
        """Sequences of T steps -> logits of pi (B, T, K), which do not depend on the action of
        their step, and rewards (B, T), normalised, which do.
        """
        returns = self.return_scale(batch.returns[..., None]) * self.condition
        tokens = [
            self.embed_return(returns), self.embed_obs(self.obs_scale(batch.obs)),
            self.embed_action(batch.actions),
        ]  # fmt: skip
        times = batch.times.clamp(max=self.embed_time.num_embeddings - 1)  # if no limit ends it
        x = torch.stack(tokens, 2) + self.embed_time(times)[:, :, None]
        x, seen = self.first_norm(x.flatten(1, 2)), visible(batch.real)
        for layer in self.layers:
            x = layer(x, seen)
        x = self.last_norm(x).unflatten(1, (-1, 3))
        return self.actor(x[:, :, 1]), self.reward(x[:, :, 2]).squeeze(-1)

    def measure(self, data: "Episodes") -> None:
        """Takes statistics of the data."""
        self.return_scale.measure(data.returns[:, None])
        self.reward_scale.measure(data.rewards[:, None])
        self.obs_scale.measure(data.obs)
        self.best_return.copy_(data.returns[data.times == 0].max())


def make_network(args: Args, envs: "Envs") -> Agent:
    """An agent for these environments, with an embedding of each step that an episode may have."""
    sizes = envs.obs.shape[1], int(envs.action_space.n), time_limit(envs)
    return Agent(*sizes, args.num_layers, args.condition)


def time_limit(envs: "Envs") -> int:
    """Steps of the longest episode that the environments allow."""
    return envs.envs[0].spec.max_episode_steps


# ---- The algorithm -------------------------------------------------------------------------------


class Episodes(NamedTuple):
    """D recorded steps of whole episodes, one episode after the other. Row d of each:"""

    returns: Tensor  # return-to-go: the rewards from this step to the end of the episode, (D,)
    obs: Tensor  # observation, (D, O)
    actions: Tensor  # action, (D,)
    rewards: Tensor  # reward, (D,)
    times: Tensor  # steps of the episode before this one, (D,)


class Batch(NamedTuple):
    """B sequences of T steps. Row b of each; the first ones may be padding, whose numbers mean
    nothing:
    """

    returns: Tensor  # return-to-go, (B, T)
    obs: Tensor  # observation, (B, T, O)
    actions: Tensor  # action, (B, T)
    rewards: Tensor  # reward, (B, T)
    times: Tensor  # steps of the episode before this one, not of the sequence, (B, T)
    real: Tensor  # True: a step; False: padding, (B, T)


def returns_to_go(rewards: Tensor, last: Tensor) -> Tensor:
    """R_t = r_t + R_{t+1}, or r_t in the last step of an episode: (D,), (D,) -> (D,)."""
    returns, following = [], 0.0
    for reward, is_last in zip(reversed(rewards.tolist()), reversed(last.tolist())):
        following = reward + (0.0 if is_last else following)
        returns.append(following)
    return torch.tensor(returns[::-1], dtype=torch.float32)


def times_in_episodes(last: Tensor) -> Tensor:
    """How many steps of its episode came before each: (D,) -> (D,)."""
    rows = torch.arange(len(last))
    begins = last.roll(1)
    begins[:1] = True
    return rows - torch.where(begins, rows, 0).cummax(0).values


def sequences(data: Episodes, ends: Tensor, length: int) -> Batch:
    """The T steps up to these rows, and including them: (B,). Where an episode has fewer, padding
    stands before its first step.
    """
    back = torch.arange(length - 1, -1, -1, device=ends.device)
    rows, real = ends[:, None] - back, back <= data.times[ends][:, None]
    return Batch(*(column[rows.clamp(min=0)] for column in data), real)


def next_step(
    batch: Batch, obs: Tensor, begins: Tensor, rewards: Tensor, target: Tensor | float
) -> Batch:
    """The last T steps up to a new one, whose action is still to be chosen. From the T steps before
    it, its observation (N, O), whether it begins an episode (N,), and the reward of the action
    before it (N,). R starts at the target, and each reward is subtracted (Algorithm 1).
    """
    returns = torch.where(begins, target, batch.returns[:, -1] - rewards)
    times = torch.where(begins, 0, batch.times[:, -1] + 1)
    unknown = torch.zeros_like(times)
    new = Batch(returns, obs, unknown, unknown.float(), times, torch.ones_like(begins))
    old = batch._replace(real=batch.real & ~begins[:, None])
    return Batch(*(torch.cat([a[:, 1:], b[:, None]], 1) for a, b in zip(old, new)))


def masked_mean(values: Tensor, real: Tensor) -> Tensor:
    """The mean over real steps: (B, T), (B, T) -> scalar."""
    return (values * real).sum() / real.sum()


def compute_gradient(agent: nn.Module, batch: Batch, args: Args) -> dict[str, Tensor]:
    """The gradient of the loss on all steps of B sequences -> metrics."""
    logits, rewards = agent(batch)
    losses = F.cross_entropy(logits.transpose(1, 2), batch.actions, reduction="none")
    policy_loss = masked_mean(losses, batch.real)
    target = agent.reward_scale(batch.rewards)
    reward_loss = masked_mean((rewards - target).square(), batch.real)
    (policy_loss + reward_loss).backward()
    if args.max_grad_norm > 0:
        nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
    return {"losses/policy_loss": policy_loss.detach(), "losses/reward_loss": reward_loss.detach()}


def update(
    agent: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, args: Args
) -> dict[str, Tensor]:
    """One gradient step on a minibatch -> metrics."""
    optimizer.zero_grad()
    metrics = compiled(compute_gradient, args)(agent, batch, args)
    optimizer.step()
    return metrics


# ---- Normalisation -------------------------------------------------------------------------------


class Scale(nn.Module):
    """Normalises by the mean and the deviation of the data, which are saved with the network."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("deviation", torch.ones(size))

    def measure(self, rows: Tensor) -> None:
        """Takes both of each column of (D, size), in double precision, as D may be a million."""
        rows = rows.double()
        self.mean.copy_(rows.mean(0))
        self.deviation.copy_(rows.std(0, correction=0) + EPSILON)

    def forward(self, rows: Tensor) -> Tensor:
        """(..., size) -> (..., size)."""
        return (rows - self.mean) / self.deviation

    def undo(self, rows: Tensor) -> Tensor:
        """(..., size) -> (..., size)."""
        return rows * self.deviation + self.mean


# ---- Memory --------------------------------------------------------------------------------------


def whole_episodes(
    obs: Tensor, actions: Tensor, rewards: Tensor, last: Tensor, begun: bool
) -> Episodes:
    """T steps of N environments side by side, (T, N, O) and three of (T, N), as episodes one after
    the other. Unfinished ones are left out, and where the first steps have not begun an episode,
    also what stands up to the first end, whose times would be unknown.
    """
    number = last.cumsum(0) - last.long()  # of the episode, in its environment
    kept = (number < last.sum(0)) & (number >= (0 if begun else 1))
    columns = (column.transpose(0, 1)[kept.T] for column in (obs, actions, rewards, last))
    obs, actions, rewards, last = columns
    return Episodes(returns_to_go(rewards, last), obs, actions, rewards, times_in_episodes(last))


def random_play(args: Args) -> Episodes:
    """At least D steps of N environments with uniformly random actions, less the episodes that are
    cut off at the end. The same ones each time.
    """
    envs, rows = Envs(args, args.num_envs, TRAINING), []
    with contextlib.closing(envs), torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.seed)
        envs.reset()
        while envs.steps < args.dataset_size or not envs.finished:
            obs = envs.obs.copy()
            actions = torch.randint(int(envs.action_space.n), (len(obs),)).numpy()
            _, rewards, terminated, truncated = envs.step(actions)
            rows.append((obs, actions, rewards, terminated | truncated))
    returns = [episodic_return for _, episodic_return, _ in envs.finished]
    tqdm.write(f"Random play: return {np.mean(returns):.1f}, at best {max(returns):.1f}, over "
               f"{len(returns)} episodes")  # fmt: skip
    return whole_episodes(*(torch.from_numpy(np.stack(column)) for column in zip(*rows)), True)


def read_dataset(args: Args, envs: "Envs") -> Episodes:
    """All whole episodes that were recorded: D steps."""
    path, limit = Path(args.dataset), time_limit(envs)
    if path.suffix == ".npz":
        data = read_arrays(path, envs.first_action)
    else:
        data = read_run(path, args.env_id, limit)
    if len(data.rewards) == 0:
        raise UsageError(f"--dataset {path} has no whole episode")
    if data.obs.shape[1:] != envs.obs.shape[1:] or data.times.max() >= limit:
        raise UsageError(f"--dataset {path} does not fit {args.env_id}, or exceeds its time limit")
    if not 0 <= data.actions.min() <= data.actions.max() < envs.action_space.n:
        raise UsageError(f"--dataset {path} has actions that are not in {envs.action_space}")
    if not all(column.isfinite().all() for column in data):
        raise UsageError(f"--dataset {path} has numbers that are not finite")
    return data


def read_run(path: Path, env_id: str, limit: int) -> Episodes:
    """The replay buffer in the last checkpoint of dqn_cartpole.py, or of a script like it."""
    with as_usage_error(f"--dataset {path} is no run with a replay buffer for {env_id}", Exception):
        state = torch.load(checkpoint_path(path), map_location="cpu", weights_only=True)
        if state["args"]["env_id"] != env_id:
            raise ValueError(f"its environment is {state['args']['env_id']}")
        added, columns = state["buffer"]["num_added"], state["buffer"]["rows"]
        size, num_envs = len(columns[0]), state["args"]["num_envs"]
        # Transition n is of environment n % N, in row n % size. Steps of which the ring has not
        # kept every environment are left out.
        first = -(-max(added - size, 0) // num_envs) * num_envs
        rows = (torch.arange(first, added) % size).view(-1, num_envs)
        obs, actions, rewards, next_obs, terminated = (column[rows] for column in columns)
        running = torch.tensor(state["envs"]["lengths"]) > 0
        last = find_ends(obs, next_obs, terminated, running, first == 0, limit)
        return whole_episodes(obs, actions, rewards, last, first == 0)


def find_ends(
    obs: Tensor, next_obs: Tensor, terminated: Tensor, running: Tensor, begun: bool, limit: int
) -> Tensor:
    """Where the episodes ended, also by a time limit, which is not recorded: two of (T, N, O),
    (T, N), whether each environment is within an episode at the end (N,) -> (T, N).

    At a limit, the step leads elsewhere than to the observation of the next row; or it leads there
    by chance, but is the last that the limit allows. Steps can be counted only once an episode has
    begun.
    """
    last = terminated | torch.cat([(next_obs[:-1] != obs[1:]).any(-1), ~running[None]])
    counts = torch.full(running.shape, 0 if begun else -len(last))
    for t in range(len(last)):
        counts += 1
        last[t] |= counts == limit
        counts[last[t]] = 0
    return last


def read_arrays(path: Path, first_action: int) -> Episodes:
    """A file of NumPy, of one environment. Its actions are as that takes them."""
    names = "observations", "actions", "rewards", "terminals", "timeouts"
    with as_usage_error(f"--dataset {path} cannot be read as {', '.join(names)}", Exception):
        with np.load(path) as file:
            obs, actions, rewards, terminated, truncated = (file[name] for name in names)
        if actions.dtype.kind not in "iu":
            raise ValueError("the actions are no whole numbers")
        actions, ended = np.int64(actions) - int(first_action), (terminated != 0) | (truncated != 0)
        columns = np.float32(obs), actions, np.float32(rewards), ended
        if obs.ndim != 2 or {column.shape for column in columns[1:]} != {(len(obs),)}:
            raise ValueError(f"the shapes are {', '.join(str(c.shape) for c in columns)}")
        return whole_episodes(*(torch.from_numpy(column)[:, None] for column in columns), True)


# ---- Training and evaluation ---------------------------------------------------------------------


def train(args: Args) -> "Result":
    """Trains an agent, from the start or from the checkpoint in args.resume."""
    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    envs = Envs(args, 1, TRAINING)  # is not played: it counts the steps
    agent = make_network(args, envs).to(device)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, fused=True)
    recorded = None if args.dataset == "random" else read_dataset(args, envs)
    with Run(args, envs, agent, optimizer=optimizer) as run:
        data = recorded or random_play(args)
        if envs.steps == 0:  # a resumed network keeps the statistics that it learned with
            agent.measure(data)
        data = Episodes(*(column.to(device) for column in data))
        while run.is_running():
            if args.anneal_lr:
                remaining = 1 - envs.steps / args.total_timesteps
                optimizer.param_groups[0]["lr"] = args.learning_rate * remaining

            # Learn.
            ends = torch.randint(len(data.rewards), (args.num_sequences,)).to(device)
            batch = sequences(data, ends, args.sequence_length)
            envs.steps += 1
            metrics = update(agent, optimizer, batch, args)

            # Log, evaluate, save.
            if run.is_due(LOG_EVERY):
                run.log(metrics | {"charts/learning_rate": optimizer.param_groups[0]["lr"]})
            if run.is_due(args.eval_frequency):
                run.evaluate()
            if run.is_due(args.checkpoint_frequency):
                run.save()
        return run.finish()


@torch.no_grad()
def play(
    args: Args, agent: Agent, obs: np.ndarray, first: np.ndarray | None = None,
    rewards: np.ndarray | None = None,
) -> np.ndarray:  # fmt: skip
    """How the trained policy is evaluated: observations (N, O) -> actions (N,).

    The agent remembers T calls, but none from before the episode: first (N,) is True where one
    begins. rewards (N,) is what the last actions were paid; if not given, what the agent predicts.
    """
    device = agent.best_return.device
    if agent.state is None:
        first, shape = np.ones(len(obs), bool), (len(obs), args.sequence_length)
        zeros = torch.zeros(shape, device=device)
        agent.state = Batch(
            zeros, zeros.new_zeros(*shape, obs.shape[1]), zeros.long(), zeros, zeros.long(),
            zeros.bool(),
        )  # fmt: skip
    if rewards is None:
        paid = agent.reward_scale.undo(agent(agent.state)[1][:, -1])
    else:
        paid = torch.from_numpy(rewards).to(device)
    begins = torch.from_numpy(np.zeros(len(obs), bool) if first is None else first).to(device)
    target = agent.best_return if args.target_return is None else args.target_return
    batch = next_step(agent.state, torch.from_numpy(obs).to(device), begins, paid, target)
    batch.actions[:, -1] = agent(batch)[0][:, -1].argmax(-1)
    agent.state = batch
    return batch.actions[:, -1].cpu().numpy()


def evaluate(args: Args, network: nn.Module, gif: Path | None = None) -> tuple[float, float]:
    """Plays args.eval_episodes whole episodes, the same ones each time: mean return and length.

    Uses its own environments, and leaves the random state of the training as it is. Records the
    first episode to the file `gif`, if given. `play` sees all environments, also those that have
    played their episodes: so row i of the memory is always that of environment i. It is told what
    each action was paid.
    """
    num_envs, frames, stride = min(args.num_envs, args.eval_episodes), [], 2
    quota = [len(range(i, args.eval_episodes, num_envs)) for i in range(num_envs)]  # for each
    envs = Envs(args, num_envs, EVALUATION, draw=gif is not None)
    with contextlib.closing(envs), torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.seed)
        envs.reset()
        network.state, rewards = None, np.zeros(num_envs, np.float32)
        while len(which := np.flatnonzero(np.less(envs.episodes, quota))) > 0:
            if gif is not None and envs.episodes[0] == 0 and envs.lengths[0] % stride == 0:
                frames.append(envs.render())
                if len(frames) > MAX_FRAMES:  # faster from now on: every fourth frame, eighth ...
                    frames, stride = frames[::2], 2 * stride
            first = np.equal(envs.lengths, 0)
            actions = play(args, network, envs.obs, first, rewards)
            _, rewards[which], _, _ = envs.step(actions[which], which)
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
