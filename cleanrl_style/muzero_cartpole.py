# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch>=2.4.0", "gymnasium[classic-control]>=1.0.0", "tyro>=1.0.16", "tensorboard>=2.20.0",
#   "tqdm>=4.66.0",
# ]
# ///
"""MuZero for flat observations and discrete actions.

Paper    Schrittwieser et al. (2020), "Mastering Atari, Go, chess and shogi by planning with a
         learned model". h: Pohlen et al. (2018), "Observe and look further".
Idea     AlphaZero without the rules: the tree search goes through a model that is learned. The
         encoder turns an observation into a hidden state x; the model gives the next x, and the
         reward, after an action; f gives p, a probability for each action, and v, the return that
         it expects. Nothing asks that x look like the world. It only has to lead to the right
         rewards, values and policies, in the U steps of the model after an observation.
         A search makes M simulations. Each goes down the tree from the root, the x of what is
         observed, to an action not yet tried in a node, and adds the x that follows. The rewards on
         the way and the v at its end count in the Q of all actions on the way.

             a       = argmax_a Q'(x, a) + c_puct * p(a|x) * sqrt(N(x)) / (1 + N(x, a))
             Q(x, a) = mean of r + gamma * (r' + gamma * (r'' + ... v)) over N(x, a) simulations
             Q'      = Q, scaled to 0 for the least and 1 for the largest one in the tree
             pi(a)   = N(root, a) / M                     the policy of the search
             nu      = mean of the M returns at the root  its value
             z_t     = r_t + ... + gamma^(n-1) * r_{t+n-1} + gamma^n * nu_{t+n}
             loss    = CE(pi_t, p_0) + c * CE(z_t, v_0) + 1/U * sum over k = 1 to U of
                       CE(pi_{t+k}, p_k) + c * CE(z_{t+k}, v_k) + CE(r_{t+k-1}, r_k)

         CE is the cross-entropy; p_k, v_k and r_k are the model's after the actions t to t+k-1. v
         and r are learned as categories, the integers from -S to S, whose mean is h of the number,
         h(y) = sign(y) * (sqrt(|y| + 1) - 1) + 0.001 * y. After a true end, z and r are 0.
Differs  Networks of one hidden layer; one process; all positions are learned equally often. Before
         an action is tried, its Q is v(x), as in DeepMind's library mctx; in the paper, Q' is 0,
         and with few simulations some actions are never tried. At a time limit, z counts the nu of
         the last observation (it bootstraps), and the loss ends. Actions are drawn from pi^(1/T),
         and T falls linearly over the run; the most visited one is played in evaluation.
Shapes   N environments; M simulations; B windows of a batch, of U + n + 1 steps each; O numbers of
         an observation; K actions; H numbers of a hidden state; C = 2 S + 1 categories.
Run      python muzero_cartpole.py
Expect   Return over 100 episodes, mean over seeds 1 to 10 (worst to best seed), and median wall
         time with start-up and evaluation, on one core of an AMD EPYC that had other work, too:
             CartPole-v1    469.8 (371.4 to 500.0)    100k steps    506 s (alone: 242 s)
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
import tyro
from filelock import FileLock
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from tqdm import tqdm

SCRIPT = "muzero_cartpole"  # named in checkpoints and messages
LOG_FREQUENCY = 1_000  # steps between points of the losses
H_SLOPE = 1e-3  # of h for large numbers
UNITS = 128  # of the hidden layer of each network

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
    total_timesteps: Steps = 100_000  # environment steps to train for, at least
    num_envs: SmallCount = 16  # parallel environments (N)

    learning_rate: Positive = 1e-3  # step size of the optimizer
    anneal_lr: bool = True  # lower the learning rate linearly to 0 over the run
    weight_decay: Weight = 1e-5  # weight of the squared weights in the loss
    gamma: Fraction = 0.99  # discount factor
    n_step: SmallCount = 20  # steps whose rewards a target counts before it bootstraps (n)
    unroll_steps: SmallCount = 5  # steps of the model that are learned from (U)
    vf_coef: Weight = 0.5  # weight of the value loss in the loss
    num_simulations: SmallCount = 16  # simulations of a search, in training and in evaluation (M)
    c_puct: Weight = 1.25  # how much a search explores what p favours
    root_noise: Fraction = 0.25  # share of noise in p at the root, while training
    dirichlet_alpha: Positive = 0.5  # of the noise: the smaller, the fewer actions it favours
    end_temperature: Annotated[float, 0.01, 1] = 0.25  # T at the end; at the start it is 1
    buffer_size: Size = 20_000  # transitions in the replay buffer
    batch_size: Count = 128  # transitions in a minibatch (B)
    learning_starts: Steps = 2_000  # environment steps before the first update
    train_frequency: Steps = 8  # environment steps between updates
    gradient_steps: Count = 1  # gradient steps in an update
    max_grad_norm: Weight = 10.0  # largest norm of the gradient; 0: not clipped
    state_size: SmallCount = 64  # numbers of a hidden state (H)
    support: Annotated[int, 1, 1000] = 20  # largest category of v and r (S)

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
        if self.learning_starts < self.num_envs * (self.unroll_steps + self.n_step + 1):
            raise ValueError("--learning-starts must be at least --num-envs * (--unroll-steps + "
                             "--n-step + 1)")  # fmt: skip
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
    """Encoder, model and f: three networks of one hidden layer."""

    def __init__(self, obs_size: int, num_actions: int, args: Args) -> None:
        super().__init__()
        self.num_actions, num_categories = num_actions, 2 * args.support + 1
        self.encoder = one_hidden_layer(obs_size, args.state_size)
        self.model = one_hidden_layer(
            args.state_size + num_actions, args.state_size + num_categories
        )
        self.f = one_hidden_layer(args.state_size, num_actions + num_categories)

    def encode(self, obs: Tensor) -> Tensor:
        """Observations (B, O) -> hidden states (B, H)."""
        return unit_range(self.encoder(obs))

    def step(self, states: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states (B, H), actions (B,) -> the next ones (B, H), logits of rewards (B, C)."""
        one_hot = nn.functional.one_hot(actions, self.num_actions).float()
        outputs = self.model(torch.cat([states, one_hot], dim=1))
        return unit_range(outputs[:, : states.shape[1]]), outputs[:, states.shape[1] :]

    def predict(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states (B, H) -> logits of p (B, K), logits of values (B, C)."""
        outputs = self.f(states)
        return outputs[:, : self.num_actions], outputs[:, self.num_actions :]


def one_hidden_layer(num_inputs: int, num_outputs: int) -> nn.Sequential:
    """A network with one hidden layer."""
    return nn.Sequential(nn.Linear(num_inputs, UNITS), nn.ReLU(), nn.Linear(UNITS, num_outputs))


def unit_range(states: Tensor) -> Tensor:
    """Each hidden state, scaled to 0 for its least number, 1 for its largest: (B, H) -> (B, H)."""
    least, largest = states.amin(1, keepdim=True), states.amax(1, keepdim=True)
    return (states - least) / (largest - least + 1e-5)


def make_network(args: Args, envs: "Envs") -> Agent:
    """An agent, which learns a model of these environments."""
    return Agent(envs.obs.shape[1], int(envs.action_space.n), args)


# ---- The algorithm -------------------------------------------------------------------------------


def rescale(x: Tensor) -> Tensor:
    """h(x) = sign(x) * (sqrt(|x| + 1) - 1) + 0.001 * x."""
    return x.sign() * ((x.abs() + 1).sqrt() - 1) + H_SLOPE * x


def unscale(x: Tensor) -> Tensor:
    """h^-1(x), whose closed form is the solution of a quadratic equation."""
    root = (1 + 4 * H_SLOPE * (x.abs() + 1 + H_SLOPE)).sqrt()
    return x.sign() * (((root - 1) / (2 * H_SLOPE)).square() - 1)


def categories(numbers: Tensor, support: int) -> Tensor:
    """Shares of the integers from -S to S, whose mean is h of the number: (...) -> (..., C).

    Only the two integers beside h have a share: the nearer, the larger. Beyond S, h counts as S.
    """
    integers = torch.arange(-support, support + 1, device=numbers.device)
    distances = (rescale(numbers).clamp(-support, support)[..., None] - integers).abs()
    return (1 - distances).clamp(min=0)


def expected(logits: Tensor) -> Tensor:
    """The number whose h is the mean of the categories: logits (..., C) -> (...)."""
    support = logits.shape[-1] // 2
    integers = torch.arange(-support, support + 1.0, device=logits.device)
    return unscale(logits.softmax(-1) @ integers)


def puct(
    totals: np.ndarray, visits: np.ndarray, priors: np.ndarray, values: np.ndarray,
    least: np.ndarray, largest: np.ndarray, c_puct: float,
) -> np.ndarray:  # fmt: skip
    """Q'(x, a) + c_puct * p(a|x) * sqrt(N(x)) / (1 + N(x, a)): sums of returns, visits N(x, a) and
    p (N, K), v(x), and the least and the largest number in the tree (N,) -> (N, K). N(x) is 1 + sum
    of N(x, a). Q is v(x) before the first visit.
    """
    q_values = np.where(visits > 0, totals / np.maximum(visits, 1), values[:, None])
    ranges = np.maximum(largest - least, 1e-6)
    scaled = ((q_values - least[:, None]) / ranges[:, None]).clip(0, 1)
    return scaled + c_puct * priors * np.sqrt(1 + visits.sum(1, keepdims=True)) / (1 + visits)


class Trees:
    """Search trees from N observations. Node 0 is the root; simulation i adds node i to each."""

    def __init__(self, agent: Agent, obs: np.ndarray, args: Args) -> None:
        self.agent, self.gamma, self.c_puct = agent, args.gamma, args.c_puct
        self.rows, num_nodes = np.arange(len(obs)), args.num_simulations + 1
        nodes, edges = (len(obs), num_nodes), (len(obs), num_nodes, agent.num_actions)
        self.states = np.zeros((*nodes, args.state_size), np.float32)
        self.rewards, self.values = np.zeros((2, *nodes), np.float32)  # r on the way to a node; v
        self.priors, self.totals = np.zeros((2, *edges), np.float32)  # p; sums of returns
        self.visits, self.children = np.zeros((2, *edges), np.int64)  # nodes; 0: none yet
        self.device = next(agent.parameters()).device
        self.add(0, agent.encode(torch.from_numpy(obs).to(self.device)))
        self.least, self.largest = self.values[:, 0].copy(), self.values[:, 0].copy()  # and all Q

    def add(self, node: int, states: Tensor) -> None:
        """Adds a node with these hidden states (N, H)."""
        logits, values = self.agent.predict(states)
        self.states[:, node], self.values[:, node] = states.cpu(), expected(values).cpu()
        self.priors[:, node] = logits.softmax(1).cpu()

    def simulate(self, new_node: int) -> None:
        """One simulation in each tree: down to a new node, and back."""
        rows, nodes, path = self.rows, np.zeros(len(self.rows), int), []
        parents, last_actions = np.zeros((2, len(rows)), int)
        while len(rows) > 0:  # those that are still on their way down
            parts = self.totals, self.visits, self.priors, self.values
            limits = self.least[rows], self.largest[rows]
            scores = puct(*(part[rows, nodes] for part in parts), *limits, self.c_puct)
            actions = scores.argmax(1)
            path.append((rows, nodes, actions))
            parents[rows], last_actions[rows] = nodes, actions
            children = self.children[rows, nodes, actions]
            rows, nodes = rows[children > 0], children[children > 0]
        states = torch.from_numpy(self.states[self.rows, parents]).to(self.device)
        states, rewards = self.agent.step(states, torch.from_numpy(last_actions).to(self.device))
        self.add(new_node, states)
        self.rewards[:, new_node] = expected(rewards).cpu()
        self.children[self.rows, parents, last_actions] = new_node
        returns = self.values[:, new_node].copy()
        for rows, nodes, actions in reversed(path):
            reward = self.rewards[rows, self.children[rows, nodes, actions]]
            returns[rows] = reward + self.gamma * returns[rows]
            self.totals[rows, nodes, actions] += returns[rows]
            self.visits[rows, nodes, actions] += 1
            q_values = self.totals[rows, nodes, actions] / self.visits[rows, nodes, actions]
            self.least[rows] = np.minimum(self.least[rows], q_values)
            self.largest[rows] = np.maximum(self.largest[rows], q_values)


@torch.no_grad()
def search(
    agent: Agent, obs: np.ndarray, args: Args, noise: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """pi, the share of the simulations that took each action, and nu, the mean of their returns:
    observations (N, O) -> (N, K), (N,). At the root, p is mixed with the noise (N, K), if any.
    """
    trees = Trees(agent, obs, args)
    if noise is not None:
        share = args.root_noise
        trees.priors[:, 0] = (1 - share) * trees.priors[:, 0] + share * noise
    for node in range(1, args.num_simulations + 1):
        trees.simulate(node)
    policies = trees.visits[:, 0] / args.num_simulations
    return policies, trees.totals[:, 0].sum(1) / args.num_simulations


def dirichlet_noise(num_rows: int, num_actions: int, alpha: float) -> np.ndarray:
    """Random probabilities of the actions -> (N, K)."""
    dirichlet = torch.distributions.Dirichlet(torch.full((num_actions,), alpha))
    return dirichlet.sample((num_rows,)).numpy()


def draw(policies: np.ndarray, temperature: float) -> np.ndarray:
    """Actions drawn in proportion to pi^(1/T): (N, K) -> (N,)."""
    weights = (policies / policies.max(1, keepdims=True)) ** (1 / temperature)
    return torch.multinomial(torch.from_numpy(weights), 1).squeeze(1).numpy()


def n_step_returns(
    rewards: Tensor, terminated: Tensor, ended: Tensor, next_values: Tensor, n: int, gamma: float
) -> Tensor:
    """r_t + ... + gamma^(n-1) * r_{t+n-1} + gamma^n * V(s_{t+n}): four of (T, B) -> (T, B).

    Near the end of an episode or of the sequence, fewer steps. next_values are V(s_{t+1}); they
    count as 0 where the episode terminated, and bootstrap where a time limit truncated it.
    """
    returns = rewards + gamma * next_values * ~terminated  # of one step
    for _ in range(n - 1):  # of one step more, where there is one
        further = rewards[:-1] + gamma * returns[1:]
        returns = torch.cat([torch.where(ended[:-1], returns[:-1], further), returns[-1:]])
    return returns


class Batch(NamedTuple):
    """B windows of what was played, L = U + n + 1 steps each. Column b of each:"""

    obs: Tensor  # first observation, (B, O)
    actions: Tensor  # action, (L, B)
    rewards: Tensor  # reward, (L, B)
    terminated: Tensor  # whether the episode terminated, (L, B)
    ended: Tensor  # whether it terminated or was truncated, (L, B)
    policies: Tensor  # pi, (L, B, K)
    values: Tensor  # nu, (L, B)
    last_values: Tensor  # nu of an episode's last observation, if it was truncated, (L, B)


class Targets(NamedTuple):
    """What the model should say after k = 0 to U of the actions in a window. Row k of each:"""

    policies: Tensor  # pi, (U + 1, B, K)
    returns: Tensor  # z, (U + 1, B)
    rewards: Tensor  # of the action that follows, (U + 1, B)
    running: Tensor  # whether the episode goes on: else there is no policy, (U + 1, B)
    known: Tensor  # whether it does, or has terminated: then returns and rewards are 0, (U + 1, B)


def targets(batch: Batch, args: Args) -> Targets:
    """The targets of B windows. Beyond a time limit, nothing is known."""
    rewards, terminated, ended, last_values = (
        part[:-1] for part in (batch.rewards, batch.terminated, batch.ended, batch.last_values)
    )
    next_values = torch.where(ended, last_values, batch.values[1:])
    steps = rewards, terminated, ended, next_values
    returns = n_step_returns(*steps, args.n_step, args.gamma)
    learned = slice(args.unroll_steps + 1)  # rows
    before = torch.zeros_like(ended[:1])  # nothing ended before the window
    running = ~torch.cat([before, ended]).cumsum(0).bool()[:-1]
    over = torch.cat([before, terminated & running]).cumsum(0).bool()[:-1]
    rows = batch.policies[:-1], returns * running, rewards * running, running, running | over
    return Targets(*(part[learned] for part in rows))


def cross_entropy(target: Tensor, logits: Tensor) -> Tensor:
    """-sum of target * log softmax(logits), over the last dimension: two of (B, C) -> (B,)."""
    return -(target * logits.log_softmax(-1)).sum(-1)


def compute_gradient(agent: nn.Module, batch: Batch, args: Args) -> dict[str, Tensor]:
    """The gradient of the loss on the B windows of a batch, through U steps -> metrics."""
    policies, returns, rewards, running, known = targets(batch, args)
    returns, rewards = categories(returns, args.support), categories(rewards, args.support)
    policy_loss = value_loss = reward_loss = torch.zeros((), device=batch.obs.device)
    states = agent.encode(batch.obs)
    for k in range(args.unroll_steps + 1):
        share = 1 if k == 0 else 1 / args.unroll_steps
        logits, value_logits = agent.predict(states)
        policy_errors = cross_entropy(policies[k], logits) * running[k]
        value_errors = cross_entropy(returns[k], value_logits) * known[k]
        policy_loss = policy_loss + share * policy_errors.mean()
        value_loss = value_loss + share * value_errors.mean()
        if k < args.unroll_steps:
            states, reward_logits = agent.step(states, batch.actions[k])
            reward_errors = cross_entropy(rewards[k], reward_logits) * known[k]
            reward_loss = reward_loss + reward_errors.mean() / args.unroll_steps
            states = states / 2 + states.detach() / 2  # half the gradient for each step back
    loss = policy_loss + args.vf_coef * value_loss + reward_loss
    loss.backward()
    if args.max_grad_norm > 0:
        nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
    entropy = -(batch.policies * (batch.policies + 1e-30).log()).sum(-1).mean()
    return {
        "losses/policy_loss": policy_loss.detach(),
        "losses/value_loss": value_loss.detach(),
        "losses/reward_loss": reward_loss.detach(),
        "losses/entropy": entropy,
    }


def update(
    agent: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, args: Args
) -> dict[str, Tensor]:
    """One gradient step on a batch -> metrics."""
    optimizer.zero_grad()
    metrics = compiled(compute_gradient, args)(agent, batch, args)
    optimizer.step()
    return metrics


# ---- Memory --------------------------------------------------------------------------------------


class ReplayBuffer:
    """The last steps of N environments, in rows of N, in a ring: the newest replaces the oldest."""

    def __init__(self, obs_size: int, num_actions: int, args: Args) -> None:
        self.length = args.unroll_steps + args.n_step + 1
        self.num_rows, self.rows_written = args.buffer_size // args.num_envs, 0
        shape = self.num_rows, args.num_envs
        with as_usage_error(f"--buffer-size {args.buffer_size} does not fit", RuntimeError):
            self.columns = Batch(
                torch.zeros(*shape, obs_size), torch.zeros(shape).long(), torch.zeros(shape),
                torch.zeros(shape).bool(), torch.zeros(shape).bool(),
                torch.zeros(*shape, num_actions), torch.zeros(shape), torch.zeros(shape),
            )  # fmt: skip

    def add(self, *row: np.ndarray) -> None:
        """One step of all environments, in parts of a Batch: (N, ...)."""
        for column, values in zip(self.columns, row, strict=True):
            column.numpy()[self.rows_written % self.num_rows] = values
        self.rows_written += 1

    def sample(self, batch_size: int) -> Batch:
        """B windows of L steps, drawn uniformly, with replacement."""
        oldest = max(0, self.rows_written - self.num_rows)
        first = torch.randint(oldest, self.rows_written - self.length + 1, (batch_size,))
        envs = torch.randint(self.columns.obs.shape[1], (batch_size,))
        rows = (first + torch.arange(self.length)[:, None]) % self.num_rows  # (L, B)
        obs, *others = self.columns
        return Batch(obs[rows[0], envs], *(column[rows, envs] for column in others))

    def state_dict(self) -> dict:
        """The rows that are filled, for a checkpoint."""
        filled = [column[: self.rows_written].clone() for column in self.columns]
        return {"rows_written": self.rows_written, "rows": filled}

    def load_state_dict(self, state: dict) -> None:
        """Takes what `state_dict` gave."""
        self.rows_written = int(state["rows_written"])
        for column, saved in zip(self.columns, state["rows"], strict=True):
            column[: self.rows_written] = saved


# ---- Training and evaluation ---------------------------------------------------------------------


def train(args: Args) -> "Result":
    """Trains an agent, from the start or from the checkpoint in args.resume."""
    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    envs = Envs(args, args.num_envs, TRAINING)
    agent = make_network(args, envs).to(device)
    optimizer = torch.optim.Adam(
        agent.parameters(), lr=args.learning_rate, fused=True,
        weight_decay=2 * args.weight_decay,  # c * w^2 has the gradient 2 * c * w
    )  # fmt: skip
    buffer = ReplayBuffer(envs.obs.shape[1], agent.num_actions, args)
    with Run(args, envs, agent, optimizer=optimizer, buffer=buffer) as run:
        metrics = {}  # of the last gradient step
        while run.is_running():
            done = envs.steps / args.total_timesteps  # share of the run
            if args.anneal_lr:
                optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - done)

            # Act: one step in every environment.
            noise = dirichlet_noise(args.num_envs, agent.num_actions, args.dirichlet_alpha)
            obs = envs.obs.copy()
            policies, values = search(agent, obs, args, noise)
            actions = draw(policies, 1 - done * (1 - args.end_temperature))
            next_obs, rewards, terminated, truncated = envs.step(actions)
            last_values = np.zeros(args.num_envs, np.float32)
            if truncated.any():
                last_values[truncated] = search(agent, next_obs[truncated], args)[1]
            ended = terminated | truncated
            buffer.add(obs, actions, rewards, terminated, ended, policies, values, last_values)

            # Learn: the gradient steps that are due in these N steps.
            first = max(envs.steps - args.num_envs + 1, args.learning_starts)
            for step in range(first, envs.steps + 1):
                if step % args.train_frequency == 0:
                    for _ in range(args.gradient_steps):
                        batch = Batch(*(part.to(device) for part in buffer.sample(args.batch_size)))
                        metrics = update(agent, optimizer, batch, args)

            # Log, evaluate, save.
            if run.is_due(LOG_FREQUENCY):
                run.log(metrics | {"charts/learning_rate": optimizer.param_groups[0]["lr"]})
            if run.is_due(args.eval_frequency):
                run.evaluate()
            if run.is_due(args.checkpoint_frequency):
                run.save()
        return run.finish()


def play(args: Args, agent: Agent, obs: np.ndarray) -> np.ndarray:
    """What a search without noise tries most often: observations (N, O) -> actions (N,)."""
    return search(agent, obs, args)[0].argmax(1)


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
