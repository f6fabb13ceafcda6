# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch>=2.4.0", "gymnasium[classic-control]>=1.0.0", "tyro>=1.0.16", "tensorboard>=2.20.0",
#   "tqdm>=4.66.0",
# ]
# ///
"""AlphaZero for board games of two players.

Paper    Silver et al. (2018), "A general reinforcement learning algorithm that masters chess, shogi
         and Go through self-play". The search is described in its supplement.
Idea     A network sees a board and gives p, a probability for each action, and v, the outcome that
         it expects for the player to move: from 1, a win, to -1, a loss. A tree search, which knows
         the rules, improves on p. Games are played by this search against itself. The network then
         learns to give at once what the search found, and to predict how the game will end.
         A search makes M simulations. Each goes down the tree from the board of the game, the root,
         to an action that was not yet tried in a node, and adds the node to which it leads. v of
         this node, or the outcome, if the game is over there, counts in the Q of all actions on the
         way, with the sign changed from each to the next: what is good for the one who moves is bad
         for the other.

             a       = argmax_a Q(s, a) + c_puct * p(a|s) * sqrt(N(s)) / (1 + N(s, a))
             Q(s, a) = mean of v, for the player who moves in s, over N(s, a) simulations, or 0
             N(s)    = 1 + sum_a N(s, a)
             pi(a)   = N(root, a) / M                     the policy of the search
             loss    = (v - z)^2 - sum_a pi(a) * log p(a) + c * |weights|^2

         z is the outcome for the player to move; the loss is a mean over B positions. At the root,
         p is mixed with noise, and the first moves of a game are drawn from pi: so games differ.
         In evaluation there is no noise, and the most visited action is played.
Differs  The network has two hidden layers where theirs has 19 residual blocks, and sees one board,
         not those before it. c_puct is constant. Adam in place of SGD. N games are played side by
         side, and searched together; playing and learning take turns in one process. p is a softmax
         over the allowed actions in the search, and over all of them in the loss.
Shapes   N games; M simulations; B positions of a batch; C numbers of a board; K actions. A board is
         always seen by the player to move.
Run      python alphazero_tictactoe.py
         Your own game: --env-id my_module:MyGame-v0, an environment with an opponent, which the
         agent meets in evaluation only, and with TicTacToe's four methods from first_board on.
Expect   Mean outcome of 100 games against an opponent that makes no mistake, where 0 is the best
         that can be reached; mean over seeds 1 to 10 (worst to best seed), and median wall time
         with start-up and evaluation, on one core of an AMD EPYC that had other work, too:
             TicTacToe-v0    0.0 (0.0 to 0.0)    100k steps    89 s
         Eight seeds lose none of the 100 games, one loses 1, one 2. The return that is logged while
         training is the first player's, in games of two that are equally strong.
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

SCRIPT = "alphazero_tictactoe"  # named in checkpoints and messages
LOG_FREQUENCY = 1_000  # steps between points of the losses

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
    env_id: str = "TicTacToe-v0"  # Gymnasium environment, or my_module:MyEnv-v0
    env_kwargs: str = "{}"  # of the environment, as JSON: '{"is_slippery": false}'
    seed: Annotated[int, 0, 2**63 - 1] = 1  # of all random numbers in the run
    total_timesteps: Steps = 100_000  # environment steps to train for, at least
    num_envs: SmallCount = 32  # parallel environments (N)

    learning_rate: Positive = 2e-3  # step size of the optimizer
    anneal_lr: bool = True  # lower the learning rate linearly to 0 over the run
    weight_decay: Weight = 1e-4  # weight of the squared weights in the loss
    num_simulations: SmallCount = 32  # simulations of a search, in training and in evaluation (M)
    c_puct: Weight = 1.25  # how much a search explores what p favours
    root_noise: Fraction = 0.25  # share of noise in p at the root, while training
    dirichlet_alpha: Positive = 1.0  # of the noise: the smaller, the fewer actions it favours
    explore_moves: Annotated[int, 0, 10**6] = 4  # first moves of a game that are drawn from pi
    buffer_size: Size = 20_000  # transitions in the replay buffer
    batch_size: Count = 256  # transitions in a minibatch (B)
    learning_starts: Steps = 2_000  # environment steps before the first update
    train_frequency: Steps = 32  # environment steps between updates
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
        if self.learning_starts >= self.total_timesteps:
            raise ValueError("--learning-starts must be less than --total-timesteps")


# ---- Environment and network ---------------------------------------------------------------------


class TicTacToe(gym.Env):
    """Tic-tac-toe against an opponent that makes no mistake, or, if it is "random", any move.

    Observations are boards: nine squares, 1 where you are, -1 where the opponent is. Chance says
    who begins. The last reward is 1 if you won, -1 if you lost or took a square that was not free.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 1}
    observation_space = gym.spaces.Box(-1, 1, (9,), np.float32)
    action_space = gym.spaces.Discrete(9)

    def __init__(self, opponent: str = "perfect", render_mode: str | None = None) -> None:
        if opponent not in ("perfect", "random"):
            raise ValueError("opponent must be perfect or random")
        self.opponent, self.render_mode = opponent, render_mode

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple:
        super().reset(seed=seed)
        self.board = self.first_board()
        if self.np_random.random() < 0.5:
            self.play(self.opponent_action())
        return self.board, {}

    def step(self, action: int) -> tuple:
        if self.board[action] != 0:
            return self.board, -1.0, True, False, {}
        reward = self.play(action)
        ended = reward > 0 or (self.board != 0).all()
        if ended:
            self.board = -self.board  # seen by you, though the opponent would be to move
        else:
            reward = -self.play(self.opponent_action())
            ended = reward < 0 or (self.board != 0).all()
        return self.board, reward, bool(ended), False, {}

    def play(self, action: int) -> float:
        """Makes a move, and shows the board to the other player: 1 if this wins, else 0."""
        self.board = self.move(self.board[None], np.array([action]))[0]
        return float(self.has_lost(self.board[None])[0])

    def opponent_action(self) -> int:
        """One of the best actions, or any that is allowed."""
        actions = np.flatnonzero(self.board == 0)
        if self.opponent == "perfect":
            boards = self.move(self.board[None].repeat(len(actions), 0), actions)
            values = [solve(tuple(board)) for board in boards.tolist()]  # for the other player
            actions = actions[np.equal(values, min(values))]
        return int(self.np_random.choice(actions))

    def render(self) -> np.ndarray:
        """You are blue, the opponent is red."""
        colours = np.array([[230, 60, 60], [255, 255, 255], [60, 60, 230]], np.uint8)
        picture = colours[self.board.reshape(3, 3).astype(int) + 1]
        picture = picture.repeat(32, 0).repeat(32, 1)
        picture[::32] = picture[:, ::32] = 0
        return picture

    # The rules, for n boards at once, each seen by the player to move. These methods are all that
    # the search knows of the game.

    def first_board(self) -> np.ndarray:
        """The board on which a game begins: (C,)."""
        return np.zeros(9, np.float32)

    def legal_actions(self, boards: np.ndarray) -> np.ndarray:
        """Whether each action is allowed: (n, C) -> (n, K). With none and no loss, it is a draw."""
        return boards == 0

    def move(self, boards: np.ndarray, actions: np.ndarray) -> np.ndarray:
        """The boards after these actions, as the other player sees them: (n, C), (n,) -> (n, C)."""
        boards = boards.copy()
        boards[np.arange(len(boards)), actions] = 1
        return -boards

    def has_lost(self, boards: np.ndarray) -> np.ndarray:
        """Whether the game has ended, with a loss for the player to move: (n, C) -> (n,)."""
        return (boards[:, LINES] == -1).all(2).any(1)


LINES = np.array([[0, 1, 2], [3, 4, 5], [6, 7, 8], [0, 3, 6], [1, 4, 7], [2, 5, 8], [0, 4, 8],
                  [2, 4, 6]])  # fmt: skip

gym.register("TicTacToe-v0", entry_point=TicTacToe)


@cache
def solve(board: tuple[float, ...]) -> int:
    """The outcome for the player to move if neither makes a mistake: 1, 0 or -1."""
    if any(board[i] == board[j] == board[k] == -1 for i, j, k in LINES.tolist()):
        return -1
    values = []
    for action in range(9):
        if board[action] == 0:
            following = [-x for x in board]
            following[action] = -1
            values.append(-solve(tuple(following)))
    return max(values, default=0)


def make_env(args: Args, render_mode: str | None = None) -> gym.Env:
    """One game against an opponent, with its rules, and with flat boards and discrete actions."""
    env = make_flat_env(args, render_mode)
    rules = "first_board", "legal_actions", "move", "has_lost"
    if not all(hasattr(env.unwrapped, rule) for rule in rules):
        raise UsageError(f"needs a game with the methods {', '.join(rules)}; {args.env_id} is none")
    if not isinstance(env.action_space, gym.spaces.Discrete):
        raise UsageError(f"needs Discrete actions; {args.env_id} has {env.action_space}")
    return env


class Agent(nn.Module):
    """p and v: two hidden layers with two heads. It has the rules of the game at hand, too."""

    def __init__(self, game: gym.Env, board_size: int, num_actions: int, hidden_size: int) -> None:
        super().__init__()
        self.game = game
        self.layers = nn.Sequential(
            nn.Linear(board_size, hidden_size), nn.ReLU(),
            nn.Linear(hidden_size, hidden_size), nn.ReLU(),
            nn.Linear(hidden_size, num_actions + 1),
        )  # fmt: skip

    def forward(self, boards: Tensor) -> tuple[Tensor, Tensor]:
        """Boards (B, C) -> logits of p (B, K), v (B,)."""
        outputs = self.layers(boards)
        return outputs[:, :-1], outputs[:, -1].tanh()


def make_network(args: Args, envs: "Envs") -> Agent:
    """An agent for this game."""
    game, board_size = envs.envs[0].unwrapped, envs.obs.shape[1]
    return Agent(game, board_size, int(envs.action_space.n), args.hidden_size)


# ---- The algorithm -------------------------------------------------------------------------------


class Actor:
    """The network in NumPy: for a few rows, it is several times as fast as in PyTorch.

    It shares the weights of a network on the CPU. Of one on a GPU, it is a copy.
    """

    def __init__(self, agent: Agent) -> None:
        weights = [weight.detach().cpu().numpy() for weight in agent.layers.parameters()]
        self.layers = list(zip(weights[::2], weights[1::2]))

    def __call__(self, boards: np.ndarray, legal: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Boards (n, C), allowed actions (n, K) -> p over these (n, K), v (n,)."""
        for weight, bias in self.layers[:-1]:
            boards = np.maximum(boards @ weight.T + bias, 0)
        weight, bias = self.layers[-1]
        outputs = boards @ weight.T + bias
        return masked_softmax(outputs[:, :-1], legal), np.tanh(outputs[:, -1])


def masked_softmax(logits: np.ndarray, legal: np.ndarray) -> np.ndarray:
    """Probabilities of the allowed actions; 0 for the others: (n, K), (n, K) -> (n, K)."""
    logits = np.where(legal, logits, -np.inf)
    weights = np.exp(logits - logits.max(1, keepdims=True, initial=-1e30))
    return weights / np.maximum(weights.sum(1, keepdims=True), 1e-30)  # where none is allowed: 0


def puct(
    totals: np.ndarray, visits: np.ndarray, priors: np.ndarray, legal: np.ndarray, c_puct: float
) -> np.ndarray:
    """Q(s, a) + c_puct * p(a|s) * sqrt(N(s)) / (1 + N(s, a)), or -inf if a is not allowed: sums of
    v, visits N(s, a), p and what is allowed (N, K) -> (N, K). Q is 0 before the first visit.
    """
    q_values = totals / np.maximum(visits, 1)
    bonus = c_puct * priors * np.sqrt(1 + visits.sum(1, keepdims=True)) / (1 + visits)
    return np.where(legal, q_values + bonus, -np.inf)


class Trees:
    """Search trees of N boards. Node 0 is the root; simulation i may add node i to each tree."""

    def __init__(
        self, game: gym.Env, actor: Actor, boards: np.ndarray, num_simulations: int
    ) -> None:
        self.game, self.actor = game, actor
        self.rows, num_nodes = np.arange(len(boards)), num_simulations + 1
        num_actions = game.legal_actions(boards).shape[1]
        self.boards = np.zeros((len(boards), num_nodes, boards.shape[1]), np.float32)
        self.values = np.zeros((len(boards), num_nodes), np.float32)  # v, or the outcome
        self.ended = np.zeros((len(boards), num_nodes), bool)
        edges = len(boards), num_nodes, num_actions
        self.legal, self.priors = np.zeros(edges, bool), np.zeros(edges, np.float32)  # p
        self.visits, self.totals = np.zeros(edges, np.int64), np.zeros(edges, np.float32)
        self.children = np.zeros(edges, np.int64)  # nodes; 0: none yet
        self.add(self.rows, 0, boards)

    def add(self, rows: np.ndarray, node: int, boards: np.ndarray) -> None:
        """Adds a node with these boards (n, C) to the trees `rows` (n,)."""
        legal, lost = self.game.legal_actions(boards), self.game.has_lost(boards)
        priors, values = self.actor(boards, legal)
        ended = lost | ~legal.any(1)
        self.boards[rows, node], self.legal[rows, node] = boards, legal
        self.priors[rows, node], self.ended[rows, node] = priors, ended
        self.values[rows, node] = np.where(ended, -1.0 * lost, values)

    def simulate(self, new_node: int, c_puct: float) -> None:
        """One simulation in each tree: down to a new node, or to an end of the game, and back."""
        rows, running, path = self.rows, ~self.ended[:, 0], []
        nodes = leaves = np.zeros(len(rows), int)
        while running.any():
            edges = self.totals, self.visits, self.priors, self.legal
            actions = puct(*(part[rows, nodes] for part in edges), c_puct).argmax(1)
            path.append((rows[running], nodes[running], actions[running]))
            children = self.children[rows, nodes, actions]
            new = running & (children == 0)
            if new.any():
                boards = self.game.move(self.boards[rows, nodes][new], actions[new])
                self.add(rows[new], new_node, boards)
                self.children[rows[new], nodes[new], actions[new]] = new_node
                children = np.where(new, new_node, children)
            leaves = np.where(running, children, leaves)
            running = running & ~new & ~self.ended[rows, children]
            nodes = np.where(running, children, nodes)
        values = self.values[rows, leaves]  # for the player to move there
        for rows, nodes, actions in reversed(path):
            values[rows] *= -1  # for the other one, who moved to it
            self.totals[rows, nodes, actions] += values[rows]
            self.visits[rows, nodes, actions] += 1


def search(
    agent: Agent, boards: np.ndarray, args: Args, noise: np.ndarray | None = None
) -> np.ndarray:
    """pi, the share of the simulations that took each action: boards (N, C) -> (N, K).

    At the root, p is mixed with the noise (N, K), if there is any.
    """
    trees = Trees(agent.game, Actor(agent), boards, args.num_simulations)
    if noise is not None:
        share = args.root_noise
        trees.priors[:, 0] = (1 - share) * trees.priors[:, 0] + share * noise
    for node in range(1, args.num_simulations + 1):
        trees.simulate(node, args.c_puct)
    return trees.visits[:, 0] / args.num_simulations


def dirichlet_noise(legal: np.ndarray, alpha: float) -> np.ndarray:
    """Random probabilities of the allowed actions: (N, K) -> (N, K)."""
    weights = (torch.distributions.Gamma(alpha, 1.0).sample(legal.shape).numpy() + 1e-30) * legal
    return weights / weights.sum(1, keepdims=True)


def choose(policies: np.ndarray, explore: np.ndarray) -> np.ndarray:
    """Actions drawn from pi (N, K) where `explore` (N,), elsewhere the most visited -> (N,)."""
    drawn = torch.multinomial(torch.from_numpy(policies), 1).squeeze(1).numpy()
    return np.where(explore, drawn, policies.argmax(1))


def outcomes(length: int, won: bool) -> np.ndarray:
    """How a game ended for the player to move, before each move: 1 or -1, or 0 in a draw -> (T,).

    Who made the last move has won, if any.
    """
    return won * (-1.0) ** np.arange(length - 1, -1, -1)


class Batch(NamedTuple):
    """B positions of games. Row b of each:"""

    boards: Tensor  # board, (B, C)
    policies: Tensor  # pi, (B, K)
    outcomes: Tensor  # z, (B,)


def compute_gradient(agent: nn.Module, batch: Batch, args: Args) -> dict[str, Tensor]:
    """The gradient of the loss on the B positions of a batch -> metrics."""
    logits, values = agent(batch.boards)
    policy_loss = -(batch.policies * logits.log_softmax(1)).sum(1).mean()
    value_loss = (values - batch.outcomes).square().mean()
    loss = policy_loss + value_loss
    loss.backward()
    entropy = -(batch.policies * (batch.policies + 1e-30).log()).sum(1).mean()
    return {
        "losses/policy_loss": policy_loss.detach(),
        "losses/value_loss": value_loss.detach(),
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


class SelfPlay:
    """N games that the agent plays against itself. Where one ends, the next one begins."""

    def __init__(self, game: gym.Env, num_games: int) -> None:
        self.game = game
        self.boards = np.stack([game.first_board()] * num_games).astype(np.float32)
        self.moves = [[] for _ in range(num_games)]  # of each running game: (board, pi) so far

    def lengths(self) -> np.ndarray:
        """Moves so far, in each game: (N,)."""
        return np.array([len(moves) for moves in self.moves])

    def step(self, policies: np.ndarray, actions: np.ndarray) -> list[tuple]:
        """One move in each game: pi (N, K), actions (N,) -> of each game that ended, its number,
        and boards (T, C), pi (T, K) and outcomes z (T,) of its T moves.
        """
        following, finished = self.game.move(self.boards, actions), []
        won = self.game.has_lost(following)  # who would move next has lost
        ended = won | ~self.game.legal_actions(following).any(1)
        for i, moves in enumerate(self.moves):
            moves.append((self.boards[i], policies[i]))
            if ended[i]:
                boards, pi = map(np.stack, zip(*moves))
                finished.append((i, boards, pi, outcomes(len(moves), bool(won[i]))))
                self.moves[i], following[i] = [], self.game.first_board()
        self.boards = following.astype(np.float32)
        return finished

    def state_dict(self) -> dict:
        """The running games, for a checkpoint."""
        moves = [[torch.from_numpy(np.stack(part)) for part in zip(*game)] for game in self.moves]
        return {"boards": torch.from_numpy(self.boards), "moves": moves}

    def load_state_dict(self, state: dict) -> None:
        """Takes what `state_dict` gave."""
        if state["boards"].shape != self.boards.shape:
            raise ValueError(f"there were {len(state['boards'])} games, {len(self.boards)} now")
        self.boards = state["boards"].numpy()
        self.moves = [list(zip(*(part.numpy() for part in game))) for game in state["moves"]]


class ReplayBuffer:
    """The last `size` positions of games that ended, in a ring: the newest replaces the oldest."""

    def __init__(self, size: int, board_size: int, num_actions: int) -> None:
        with as_usage_error(f"--buffer-size {size} does not fit into memory", RuntimeError):
            columns = torch.zeros(size, board_size), torch.zeros(size, num_actions)
            self.rows = Batch(*columns, outcomes=torch.zeros(size))
        self.size, self.num_added = size, 0

    def add(self, *positions: np.ndarray) -> None:
        """Adds T positions, whose parts are those of a Batch: (T, C), (T, K), (T,)."""
        rows = (self.num_added + np.arange(len(positions[0]))) % self.size
        for column, values in zip(self.rows, positions):
            column.numpy()[rows] = values
        self.num_added += len(rows)

    def sample(self, batch_size: int) -> Batch:
        """B positions, drawn uniformly, with replacement."""
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


# ---- Training and evaluation ---------------------------------------------------------------------


def train(args: Args) -> "Result":
    """Trains an agent, from the start or from the checkpoint in args.resume."""
    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    envs = Envs(args, 1, TRAINING)  # counts moves and results; its opponent is not played
    agent = make_network(args, envs).to(device)
    optimizer = torch.optim.Adam(
        agent.parameters(), lr=args.learning_rate, fused=True,
        weight_decay=2 * args.weight_decay,  # c * w^2 has the gradient 2 * c * w
    )  # fmt: skip
    games = SelfPlay(agent.game, args.num_envs)
    buffer = ReplayBuffer(args.buffer_size, envs.obs.shape[1], int(envs.action_space.n))
    with Run(args, envs, agent, optimizer=optimizer, games=games, buffer=buffer) as run:
        metrics = {}  # of the last gradient step
        while run.is_running():
            if args.anneal_lr:
                remaining = 1 - envs.steps / args.total_timesteps
                optimizer.param_groups[0]["lr"] = args.learning_rate * remaining

            # Act: one move in every game.
            noise = dirichlet_noise(agent.game.legal_actions(games.boards), args.dirichlet_alpha)
            policies = search(agent, games.boards, args, noise)
            actions = choose(policies, games.lengths() < args.explore_moves)
            for i, boards, pi, z in games.step(policies, actions):
                buffer.add(boards, pi, z)
                envs.finished.append((envs.steps + i + 1, z[0], len(z)))  # z[0]: of who began
            envs.steps += args.num_envs

            # Learn: the gradient steps that are due in these N moves.
            first = max(envs.steps - args.num_envs + 1, args.learning_starts)
            for step in range(first, envs.steps + 1):
                if step % args.train_frequency == 0 and buffer.num_added > 0:
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
    """How the trained policy is evaluated: boards (N, C) -> actions (N,)."""
    return search(agent, obs, args).argmax(1)


def evaluate(args: Args, network: nn.Module, gif: Path | None = None) -> tuple[float, float]:
    """Plays args.eval_episodes whole episodes, the same ones each time: mean return and length.

    Uses its own environments, and leaves the random state of the training as it is. Records every
    board on which the agent moves in the first episode to the file `gif`, if given.
    """
    num_envs, frames, stride = min(args.num_envs, args.eval_episodes), [], 1
    quota = [len(range(i, args.eval_episodes, num_envs)) for i in range(num_envs)]  # for each
    envs = Envs(args, num_envs, EVALUATION, draw=gif is not None)
    with contextlib.closing(envs), torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.seed)
        envs.reset()
        while len(which := np.flatnonzero(np.less(envs.episodes, quota))) > 0:
            if gif is not None and envs.episodes[0] == 0 and envs.lengths[0] % stride == 0:
                frames.append(envs.render())
                if len(frames) > MAX_FRAMES:  # faster from now on: every second frame, fourth ...
                    frames, stride = frames[::2], 2 * stride
            envs.step(play(args, network, envs.obs[which]), which)
    if gif is not None:
        images = [Image.fromarray(frame).quantize(256, FASTOCTREE) for frame in frames]
        with as_usage_error(f"cannot write {gif}", OSError):
            images[0].save(gif, save_all=True, append_images=images[1:], duration=1000 / envs.fps,
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
