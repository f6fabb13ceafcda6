# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch>=2.4.0", "gymnasium[classic-control]>=1.0.0", "tyro>=1.0.16", "tensorboard>=2.20.0",
#   "tqdm>=4.66.0",
# ]
# ///
r"""V-MPO, on-policy MPO, for flat observations and discrete actions.

Paper    Song et al. (2020), "V-MPO: on-policy maximum a posteriori policy optimization for discrete
         and continuous control", Algorithm 1. Schulman et al. (2016), "High-dimensional continuous
         control using generalized advantage estimation", equation 16.
Idea     Like PPO (ppo_cartpole.py), it plays T steps in N environments with the policy pi(a|s), and
         estimates the advantage A of each action. But it goes from advantages to a better policy
         as MPO (mpo_continuous.py) does. Only the better half of the steps of a minibatch counts,
         those of larger A. The E-step weighs them: the larger A, the heavier. The M-step makes
         their actions as likely as they are heavy, by maximum likelihood, while a limit on the KL
         divergence keeps pi near pi_old, the policy that played.

             delta_t = r_t + gamma * V(s_{t+1}) - V(s_t)        TD error
             A_t     = delta_t + gamma * lambda * A_{t+1}       advantage
             w       = exp(A / eta), divided by their sum       over the better half
             g(eta)  = eta * (epsilon_eta + log of the mean of exp(A / eta))        over the same
             J_pi    = -sum of w * log pi(a|s) + alpha * KL     KL over all steps
             J_alpha = alpha * (epsilon_alpha - KL)
             J_V     = mean of (V(s) - (A + V_old(s)))^2 / 2    over all steps

         The temperature eta minimises g. There, the KL divergence of the weights from equal ones
         is epsilon_eta, whatever the scale of the rewards. KL is the mean of
         KL(pi_old(.|s) || pi(.|s)). alpha, a Lagrange multiplier, grows while KL is above its
         limit and shrinks below. Each objective moves what it is named after, and sees the rest
         as constants. No ratio is clipped, and advantages need not be normalised.
Differs  Advantages are GAE's, as in PPO; the paper has n-step returns less V. As in PPO, pi_old is
         the policy of the newest rollout, and several epochs learn from it; in the paper, it is a
         copy of pi that is renewed after a fixed number of updates. eta is learned as a logarithm,
         alpha through softplus. At a time limit, V(s_{t+1}) stands for the rewards that would have
         followed (it bootstraps); at a true end, it counts as 0. Observations are normalised and
         rewards scaled: where V is still far off, the better half are the steps at which it is
         too low, whatever the action. All gradients make one step of Adam, in which the dual
         variables eta and alpha have a step size of their own; the other one falls linearly to 0.
Shapes   T steps of N environments in a rollout, B of them in a minibatch; O numbers of an
         observation; K actions. Row t is the step from t to t+1.
Run      python vmpo_cartpole.py
         python vmpo_cartpole.py --env-id Acrobot-v1 --total-timesteps 300000 --num-envs 16 \
             --num-minibatches 8 --gae-lambda 0.98
Expect   Return of the greedy policy over 100 episodes, mean over seeds 1 to 10 (worst to best
         seed), and median wall time with start-up and evaluation, on one core of an AMD EPYC, whose
         other core was as busy:
             CartPole-v1    439.2 (236.9 to 500.0)    100k steps    11 s    seven of ten reach 500
             Acrobot-v1     -80.6 (-85.0 to -77.8)    300k steps    36 s
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

SCRIPT = "vmpo_cartpole"  # named in checkpoints and messages
LEAST_ETA = 1e-8  # where all actions have the same value, eta falls for ever

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
    env_id: str = "CartPole-v1"  # Gymnasium environment, or my_module:MyEnv-v0
    env_kwargs: str = "{}"  # of the environment, as JSON: '{"is_slippery": false}'
    seed: Annotated[int, 0, 2**63 - 1] = 1  # of all random numbers in the run
    total_timesteps: Steps = 100_000  # environment steps to train for, at least
    num_envs: SmallCount = 8  # parallel environments (N)

    learning_rate: Positive = 1e-3  # step size of the optimizer
    anneal_lr: bool = True  # lower the learning rate linearly to 0 over the run
    num_steps: Count = 128  # steps of each environment in a rollout (T)
    gamma: Fraction = 0.99  # discount factor
    gae_lambda: Fraction = 0.95  # lambda of GAE; 0: one-step TD error, 1: Monte Carlo return
    num_minibatches: Count = 4  # minibatches in an epoch, with one gradient step each
    update_epochs: Count = 10  # epochs over a rollout
    epsilon_eta: Positive = 0.1  # KL divergence of the weights of actions from equal ones, in nats
    epsilon_alpha: Positive = 0.01  # limit of the KL divergence of pi from pi_old, in nats
    dual_learning_rate: Positive = 1e-2  # step size of log eta, and of each alpha before softplus
    norm_obs: bool = True  # normalise observations by their running mean and standard deviation
    norm_reward: bool = True  # divide rewards by the running standard deviation of returns

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
        if self.num_steps * self.num_envs < 2 * self.num_minibatches:
            raise ValueError("--num-minibatches leaves fewer than 2 steps in a minibatch")


# ---- Environment and network ---------------------------------------------------------------------


def make_env(args: Args, render_mode: str | None = None) -> gym.Env:
    """One environment with flat observations and discrete actions."""
    env = make_flat_env(args, render_mode)
    if not isinstance(env.action_space, gym.spaces.Discrete):
        raise UsageError(f"needs Discrete actions; {args.env_id} has {env.action_space}")
    return env


def layer(inputs: int, outputs: int, gain: float = math.sqrt(2)) -> nn.Linear:
    """A linear layer, initialised with an orthogonal matrix times gain, and biases of 0."""
    linear = nn.Linear(inputs, outputs)
    nn.init.orthogonal_(linear.weight, gain)
    nn.init.zeros_(linear.bias)
    return linear


class Agent(nn.Module):
    """pi(a|s) and V(s), two networks with two hidden layers each; and the dual variables."""

    def __init__(self, obs_size: int, num_actions: int, norm_obs: bool) -> None:
        super().__init__()
        self.obs_statistics = RunningStatistics(obs_size) if norm_obs else None
        self.actor = nn.Sequential(  # the small gain makes the first policy nearly uniform
            layer(obs_size, 64), nn.Tanh(), layer(64, 64), nn.Tanh(), layer(64, num_actions, 0.01)
        )
        self.critic = nn.Sequential(
            layer(obs_size, 64), nn.Tanh(), layer(64, 64), nn.Tanh(), layer(64, 1, 1.0)
        )
        # log eta, and alpha before softplus: both are 1 at first.
        self.duals = nn.Parameter(torch.tensor([0.0, math.log(math.e - 1)]))

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Observations (..., O) -> logits of pi(.|s) (..., K) and V(s) (...)."""
        obs = self.normalize(obs)
        return self.actor(obs), self.critic(obs).squeeze(-1)

    def eta_and_alpha(self) -> tuple[Tensor, Tensor]:
        """Temperature and Lagrange multiplier, two positive scalars."""
        return self.duals[0].exp() + LEAST_ETA, F.softplus(self.duals[1])

    def normalize(self, obs: Tensor) -> Tensor:
        """Observations (..., O) -> what the networks see."""
        if self.obs_statistics is None:
            return obs
        mean, variance = self.obs_statistics.mean, self.obs_statistics.variance
        return ((obs - mean) / (variance + 1e-8).sqrt()).clamp(-10, 10)


def make_network(args: Args, envs: "Envs") -> Agent:
    """An agent for these environments."""
    return Agent(envs.obs.shape[1], int(envs.action_space.n), args.norm_obs)


# ---- The algorithm -------------------------------------------------------------------------------


class Actor:
    """The actor in NumPy: for a few rows, it is several times as fast as in PyTorch.

    It shares the weights of an agent on the CPU. Of one on a GPU, it is a copy.
    """

    def __init__(self, agent: Agent) -> None:
        weights = [weight.detach().cpu().numpy() for weight in agent.actor.parameters()]
        self.layers = list(zip(weights[::2], weights[1::2]))
        self.statistics = None
        if agent.obs_statistics is not None:
            mean, variance = agent.obs_statistics.mean, agent.obs_statistics.variance
            self.statistics = mean.cpu().numpy(), (variance + 1e-8).sqrt().cpu().numpy()

    def __call__(self, obs: np.ndarray) -> np.ndarray:
        """Observations (N, O) -> logits of pi(.|s) (N, K)."""
        if self.statistics is not None:
            mean, deviation = self.statistics
            obs = ((obs - mean) / deviation).clip(-10, 10)
        for weight, bias in self.layers[:-1]:
            obs = np.tanh(obs @ weight.T + bias)
        weight, bias = self.layers[-1]
        return obs @ weight.T + bias


def act(actor: Actor, obs: np.ndarray, noise: np.ndarray | float = 0.0) -> np.ndarray:
    """The most probable actions or, with Gumbel noise (N, K), samples: (N, O) -> (N,)."""
    return (actor(obs) + noise).argmax(-1)


def gumbel_noise(*shape: int) -> np.ndarray:
    """-log of exponential noise. The argmax of logits plus this is a sample of their softmax."""
    return -torch.empty(shape).exponential_().log().numpy()


def gae(
    rewards: Tensor, values: Tensor, next_values: Tensor, terminated: Tensor, truncated: Tensor,
    gamma: float, gae_lambda: float,
) -> Tensor:  # fmt: skip
    """Generalised advantage estimation (2016, equation 16): five of (T, N) -> (T, N).

    Where an episode terminated, V(s_{t+1}) counts as 0; where a time limit truncated it, V(s_{t+1})
    bootstraps. The recursion stops at either, and after the last row.
    """
    deltas = rewards + gamma * next_values * ~terminated - values
    decay = gamma * gae_lambda * ~(terminated | truncated)
    advantages, following = torch.empty_like(deltas), torch.zeros_like(deltas[0])
    for t in reversed(range(len(deltas))):
        advantages[t] = following = deltas[t] + decay[t] * following
    return advantages


def top_half(advantages: Tensor) -> Tensor:
    """The rows of the largest advantages, half of them (rounded up): (B,) -> ((B + 1) // 2,)."""
    return advantages.topk((len(advantages) + 1) // 2).indices


def policy_loss(log_probs: Tensor, advantages: Tensor, eta: Tensor) -> Tensor:
    """-sum of w * log pi(a|s), w = softmax of A / eta: two of (n,), scalar -> scalar."""
    weights = (advantages / eta).softmax(0).detach()
    return -(weights * log_probs).sum()


def temperature_loss(advantages: Tensor, eta: Tensor, epsilon: float) -> Tensor:
    """g(eta), the dual of the E-step: (n,), scalar -> scalar.

    Its slope is epsilon less the KL divergence of the weights from equal ones: while they differ
    more than epsilon allows, eta grows.
    """
    log_mean = (advantages / eta).logsumexp(0) - math.log(len(advantages))
    return eta * (epsilon + log_mean)


class Batch(NamedTuple):
    """Steps of a rollout, B in a minibatch, with the whole of pi_old. Row b of each:"""

    obs: Tensor  # observation, not normalised, (B, O)
    actions: Tensor  # action, (B,)
    log_pi_old: Tensor  # log pi_old(.|s), (B, K)
    advantages: Tensor  # A, (B,)
    returns: Tensor  # A + V_old(s), the target of V(s), (B,)


@torch.no_grad()
def make_batch(
    agent: Agent, obs: Tensor, actions: Tensor, rewards: Tensor, next_obs: Tensor,
    terminated: Tensor, truncated: Tensor, args: Args,
) -> Batch:  # fmt: skip
    """Advantages and pi_old of a rollout: obs, next_obs (T, N, O) and four of (T, N) -> T * N rows.

    Where an episode ends, next_obs is its last observation. The agent has not been updated since
    the rollout, so pi_old and V_old can be computed here.
    """
    logits, values = agent(obs)
    _, next_values = agent(next_obs)
    ends = terminated, truncated
    advantages = gae(rewards, values, next_values, *ends, args.gamma, args.gae_lambda)
    columns = obs, actions, logits.log_softmax(-1), advantages, advantages + values
    return Batch(*(column.flatten(0, 1) for column in columns))


def compute_gradient(agent: nn.Module, batch: Batch, args: Args) -> dict[str, Tensor]:
    """The gradient of J on the B steps of a minibatch -> metrics."""
    logits, values = agent(batch.obs)
    log_pi, (eta, alpha) = logits.log_softmax(-1), agent.eta_and_alpha()
    log_probs = log_pi.gather(1, batch.actions[:, None]).squeeze(1)
    kl = (batch.log_pi_old.exp() * (batch.log_pi_old - log_pi)).sum(1).mean()
    value_loss = (values - batch.returns).square().mean() / 2

    rows = top_half(batch.advantages)
    advantages = batch.advantages[rows]
    actor_loss = policy_loss(log_probs[rows], advantages, eta)
    dual_loss = temperature_loss(advantages, eta, args.epsilon_eta)
    dual_loss = dual_loss + alpha * (args.epsilon_alpha - kl.detach())
    # The actor, the critic and the dual variables share no weights.
    loss = actor_loss + alpha.detach() * kl + value_loss + dual_loss
    loss.backward()
    return {
        "losses/policy_loss": actor_loss.detach(),
        "losses/value_loss": value_loss.detach(),
        "losses/entropy": -(log_pi.exp() * log_pi).sum(1).mean().detach(),
        "losses/kl": kl.detach(),
        "losses/temperature": eta.detach(),
        "losses/kl_multiplier": alpha.detach(),
    }


def make_optimizer(args: Args, agent: Agent) -> torch.optim.Adam:
    """Adam, with a step size of its own for the dual variables."""
    weights = [*agent.actor.parameters(), *agent.critic.parameters()]
    groups = [{"params": weights}, {"params": [agent.duals], "lr": args.dual_learning_rate}]
    return torch.optim.Adam(groups, lr=args.learning_rate, eps=1e-5, fused=True)


def update(
    agent: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, args: Args
) -> dict[str, Tensor]:
    """One gradient step on a minibatch -> metrics."""
    optimizer.zero_grad()
    metrics = compiled(compute_gradient, args)(agent, batch, args)
    optimizer.step()
    return metrics


def learn(
    agent: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, args: Args
) -> dict[str, Tensor]:
    """All epochs over a rollout -> the means of the minibatches' metrics."""
    metrics = []
    for _ in range(args.update_epochs):
        shuffled = torch.randperm(len(batch.obs)).to(batch.obs.device)
        for rows in shuffled.tensor_split(args.num_minibatches):
            minibatch = Batch(*(part.index_select(0, rows) for part in batch))
            metrics.append(update(agent, optimizer, minibatch, args))
    return {tag: torch.stack([step[tag] for step in metrics]).mean() for tag in metrics[0]}


def explained_variance(values: Tensor, returns: Tensor) -> Tensor:
    """1 where V predicts the returns, 0 where it is no better than a constant: (B,), (B,)."""
    return 1 - (returns - values).var() / (returns.var() + 1e-8)


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


class RewardScaler(nn.Module):
    """Divides rewards by the running standard deviation of R_t = r_t + gamma * R_{t-1}.

    Rewards are not shifted: this would change which policy is best.
    """

    def __init__(self, num_envs: int, gamma: float) -> None:
        super().__init__()
        self.gamma, self.statistics = gamma, RunningStatistics(1)
        self.register_buffer("sums", torch.zeros(num_envs))  # gamma * R_{t-1}, 0 at a start

    def forward(self, rewards: Tensor, ended: Tensor) -> Tensor:
        """Rewards and ends of a rollout (T, N) -> rewards (T, N), scaled and clipped to 10."""
        sums = torch.empty_like(rewards)
        for t in range(len(rewards)):
            sums[t] = rewards[t] + self.sums
            self.sums.copy_(self.gamma * sums[t] * ~ended[t])
        self.statistics.update(sums.reshape(-1, 1))
        return (rewards / (self.statistics.variance + 1e-8).sqrt()).clamp(-10, 10)


# ---- Training and evaluation ---------------------------------------------------------------------


def train(args: Args) -> "Result":
    """Trains an agent, from the start or from the checkpoint in args.resume."""
    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    envs = Envs(args, args.num_envs, TRAINING)
    agent = make_network(args, envs).to(device)
    reward_scaler = RewardScaler(args.num_envs, args.gamma).to(device)
    optimizer = make_optimizer(args, agent)

    rows = args.num_steps, args.num_envs
    obs, next_obs = np.zeros((2, *rows, *envs.obs.shape[1:]), dtype=np.float32)
    actions, rewards = np.zeros(rows, dtype=np.int64), np.zeros(rows, dtype=np.float32)
    terminated, truncated = np.zeros((2, *rows), dtype=bool)
    with Run(args, envs, agent, optimizer=optimizer, reward_scaler=reward_scaler) as run:
        while run.is_running():
            if args.anneal_lr:
                remaining = 1 - envs.steps / args.total_timesteps
                optimizer.param_groups[0]["lr"] = args.learning_rate * remaining

            # Act: T steps in every environment.
            actor, noise = Actor(agent), gumbel_noise(*rows, int(envs.action_space.n))
            for t in range(args.num_steps):
                obs[t] = envs.obs
                actions[t] = act(actor, obs[t], noise[t])
                next_obs[t], rewards[t], terminated[t], truncated[t] = envs.step(actions[t])

            # Learn.
            rollout = [
                torch.from_numpy(column).to(device)
                for column in (obs, actions, rewards, next_obs, terminated, truncated)
            ]
            if args.norm_reward:
                rollout[2] = reward_scaler(rollout[2], rollout[4] | rollout[5])  # rewards, ends
            batch = make_batch(agent, *rollout, args)
            metrics = learn(agent, optimizer, batch, args)
            if args.norm_obs:  # after the epochs: pi and pi_old share one normalisation
                agent.obs_statistics.update(batch.obs)

            # Log, evaluate, save.
            values = batch.returns - batch.advantages
            metrics["losses/explained_variance"] = explained_variance(values, batch.returns)
            run.log(metrics | {"charts/learning_rate": optimizer.param_groups[0]["lr"]})
            if run.is_due(args.eval_frequency):
                run.evaluate()
            if run.is_due(args.checkpoint_frequency):
                run.save()
        return run.finish()


def play(args: Args, agent: Agent, obs: np.ndarray) -> np.ndarray:
    """How the trained policy is evaluated: observations (N, O) -> actions (N,)."""
    return act(Actor(agent), obs)


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
