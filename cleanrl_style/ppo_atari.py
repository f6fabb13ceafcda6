# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "torch>=2.6.0", "gymnasium[atari]>=1.4.0", "ale-py>=0.12.1", "tyro>=1.0.16", "tensorboard>=2.20.0", "tqdm>=4.66.0",
# ]
# ///
r"""Proximal policy optimisation (PPO) from pixels, for Atari games.

Paper    Schulman et al. (2017), "Proximal policy optimization algorithms", equations 7 and 9, Algorithm 1. Advantages:
         Schulman et al. (2016), "High-dimensional continuous control using generalized advantage estimation",
         equation 16. Comments such as [D3] are the numbers of details in Huang et al. (2022), "The 37 implementation
         details of proximal policy optimization": D1 to D12 at the core, A1 to A9 for Atari.
Idea     Play T steps in N environments with the policy pi. V(s), which is learned as well, predicts the discounted sum
         of rewards from s on. Go over these steps several times, and make the actions that turned out better than V
         expected more probable, the others less. The steps were taken by pi_old, the policy before these changes, and
         tell little about one that is very different. So the loss no longer rewards moving pi(a|s) further once its
         ratio to pi_old(a|s) is more than epsilon away from 1.

             delta_t = r_t + gamma * V(s_{t+1}) - V(s_t)         how much better than expected one step was
             A_t     = delta_t + gamma * lambda * A_{t+1}        the advantage: all deltas from t on, discounted
             ratio   = pi(a|s) / pi_old(a|s)
             loss    = -mean of min(ratio * A, clip(ratio, 1 - epsilon, 1 + epsilon) * A)      for the policy
                       + vf_coef * mean of (V - (A + V_old))^2 / 2                             for the values
                       - ent_coef * entropy of pi                                              to keep exploring

Differs  Where only a time limit ends an episode, V stands for what would have followed. Ale-py's vector environment
         cannot be saved, so each checkpoint begins new games, and those being played are never scored. For the learner
         only, a reward becomes its sign and the loss of a life ends an episode; what is logged are the true scores of
         whole games. On by default, beyond the equations: A is normalised in each minibatch, the change of V and the
         gradient are clipped, and the learning rate falls to 0 (in the paper, epsilon falls with it). Off by default:
         the early stop by the KL divergence, and the normalisation of observations, with which Pong is learned quickly.
Shapes   T steps (four frames each) of N games in one rollout, row t from t to t+1; B of them in a minibatch; K actions.
Run      python ppo_atari.py
         python ppo_atari.py --env-id ALE/Pong-v5 --total-timesteps 600000 --num-envs 32 --num-minibatches 8 \
             --update-epochs 3 --learning-rate 5e-4 --no-anneal-lr --clip-coef 0.2 --no-clip-vloss --norm-obs \
             --checkpoint-frequency 200000
Expect   10 games after training, actions sampled, mean over seeds 1 to 3 (worst to best), median time on two cores:
             Pong, in bfloat16       19.6 (19.3 to 19.7)   14 min   18.8 to 19.4 in the last 20 training games
             in float32, older CPU   19.4 (19.1 to 19.9)   24 min   18.1 to 19.2 in the last 20 training games
         Breakout, 1M steps, these flags but --anneal-lr --checkpoint-frequency 100000, in float32, seeds 1 and 2:
             52.4 (50.8 to 54.0) in 42 and 63 min, on CPUs without bfloat16
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

import ale_py
import gymnasium as gym
import numpy as np
import torch
import tyro
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

gym.register_envs(ale_py)
ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # no banner

SCRIPT = "ppo_atari"  # named in checkpoints and messages
STACK = 4  # frames of an observation
MAX_EPISODE_STEPS = 10_000  # the time limit of environments that declare none: no episode is endless
MAX_FRAMES = 1_000  # steps, at most, that the animated picture covers; it shows every second one
RunDir = Annotated[str | None, tyro.conf.arg(metavar="RUN_DIR")]


@dataclass(frozen=True)
class Args:
    env_id: str = "ALE/Breakout-v5"  # a Gymnasium environment that fits, or my_module:MyEnv-v0
    seed: int = 1  # of all that is random in the run
    total_timesteps: int = 10_000_000  # environment steps to train for, at least

    learning_rate: float = 2.5e-4  # step size of Adam
    anneal_lr: bool = True  # lower the learning rate linearly, to 0 at the end of the run
    num_envs: int = 8  # environments that are stepped side by side (N)
    num_steps: int = 128  # steps in each environment for one rollout (T)
    gamma: float = 0.99  # discount factor
    gae_lambda: float = 0.95  # how far an advantage looks before it trusts V (lambda); 0: one reward; 1: all to come
    num_minibatches: int = 4  # parts of a rollout, one gradient step for each
    update_epochs: int = 4  # times that a rollout is learned from
    norm_adv: bool = True  # shift and scale a minibatch's advantages to mean 0 and standard deviation 1
    clip_coef: float = 0.1  # how far the ratio of new to old probability may move from 1 and still pay (epsilon)
    clip_vloss: bool = True  # the value loss, too, rewards no change of V beyond clip-coef
    ent_coef: float = 0.01  # weight of the entropy in the loss
    vf_coef: float = 0.5  # weight of the value loss in the loss
    max_grad_norm: float = 0.5  # longer gradients are cut to this length
    target_kl: float | None = None  # learn no more from a rollout once an epoch's KL, taken before its steps, is larger
    norm_obs: bool = False  # shift and scale observations to mean 0 and standard deviation 1
    sticky_actions: float = 0.0  # probability that the emulator repeats its last action; Gymnasium's default is 0.25

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
            "total_timesteps", "num_envs", "num_steps", "num_minibatches", "update_epochs", "eval_episodes",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
        for name in ("gamma", "gae_lambda", "sticky_actions"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"--{name.replace('_', '-')} must be between 0 and 1, not {getattr(self, name)}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"--seed must be between 0 and 2**63 - 1, not {self.seed}")
        for name in ("checkpoint_frequency", "num_threads", "ent_coef", "vf_coef"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"--{name.replace('_', '-')} must be at least 0, not {getattr(self, name)}")
        for name in ("learning_rate", "clip_coef", "max_grad_norm", "target_kl"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"--{name.replace('_', '-')} must be a positive number, not {getattr(self, name)}")
        if self.num_steps // 2 * self.num_envs < 2 * self.num_minibatches:  # half of the steps may be resets
            raise ValueError("--num-minibatches must leave 2 steps for each, even if half of the --num-envs times "
                             "--num-steps are resets")  # fmt: skip
        if self.resume is not None and self.evaluate is not None:
            raise ValueError("--resume and --evaluate exclude each other")


# Arguments that do not change what is learned, apart from rounding. --checkpoint-frequency does: it cuts games.
HOUSEKEEPING = {
    "exp_name", "runs_dir", "device", "resume", "evaluate", "eval_episodes", "capture_video", "compile", "num_threads",
}  # fmt: skip


# ---- Environment and network ----------------------------------------------------------------------------------------


def make_envs(args: Args, num_envs: int) -> gym.vector.VectorEnv:
    """N games. Observations (N, 4, 84, 84) of uint8: the last four frames, newest last; 0 for those before the game.

    The emulators run in native code, in threads of their own [D1]: `send` gives them their actions, `recv` waits for
    what came of them, in new arrays. They wait for a random time at a game's start, by no-ops [A1], press FIRE where a
    game begins only then [A4], repeat each action for four frames, take the brighter of the last two for each pixel
    [A2], in grey, shrink that to 84 x 84 [A5], and stack it [A7]. With life_loss_info [A3], `terminated` is True when a
    life is lost, too, and the game goes on. When it is over, the next step ignores its action and begins a new one.
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
    discrete = isinstance(action_space, gym.spaces.Discrete) and action_space.start == 0
    if not (frames and obs_space.dtype == np.uint8 and discrete):
        fail(f"needs a game such as ALE/Breakout-v5, or observations Box(0, 255, (4, 84, 84), uint8), the newest frame "
             f"last, 0 before a start, and actions Discrete(n); {args.env_id} has {obs_space} and "
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


class Agent(nn.Module):
    """pi(a|s) and V(s), on top of one network: three convolutions and a linear layer, as in Mnih et al. (2015) [A8]."""

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
        self.actor, self.critic = nn.Linear(512, num_actions), nn.Linear(512, 1)
        gains = {self.actor: 0.01, self.critic: 1.0}  # the first policy plays all actions nearly alike
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.orthogonal_(layer.weight, gains.get(layer, math.sqrt(2)))  # [D2]
                nn.init.zeros_(layer.bias)
        self.to(memory_format=torch.channels_last)  # the faster order in memory: the 4 frames of a pixel side by side

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Frames (B, 4, 84, 84) of uint8 -> logits of pi(.|s) (B, K) and V(s) (B,), both in float32."""
        dtype = torch.bfloat16 if self.bfloat16 else torch.float32  # both hold 0 to 255 exactly
        pixels = obs.contiguous(memory_format=torch.channels_last).to(dtype)
        if self.obs_statistics is None:
            pixels /= 255  # [A9] from 0 to 1
        else:  # what never changes is 0, what rarely changes stands out
            mean, variance = (
                statistic.view(84, 84).expand(1, STACK, 84, 84).contiguous(memory_format=torch.channels_last)
                for statistic in (self.obs_statistics.mean, self.obs_statistics.variance)
            )
            pixels.sub_(mean.to(dtype)).div_((variance + 1e-8).sqrt().to(dtype)).clamp_(-10, 10)
        with torch.autocast(obs.device.type, dtype, enabled=self.bfloat16):
            features = self.features(pixels)
        features = features.float()  # bfloat16 has 2 digits, too few for a ratio of probabilities
        return self.actor(features), self.critic(features).squeeze(1)


def make_agent(args: Args, envs: gym.vector.VectorEnv, device: torch.device) -> Agent:
    """An agent that fits the environments; auto: bfloat16 where the CPU has instructions for it, else float32."""
    has_bfloat16 = device.type == "cpu" and getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    bfloat16 = args.precision == "bfloat16" or (args.precision == "auto" and has_bfloat16)
    agent = Agent(int(envs.single_action_space.n), bfloat16, args.norm_obs).to(device)
    if args.compile:
        agent.compile()
    return agent


# ---- The algorithm --------------------------------------------------------------------------------------------------


@torch.no_grad()
def act(agent: nn.Module, obs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Samples actions from pi(.|s): observations (N, ...) -> actions, log pi(a|s), V(s), each (N,), on the CPU."""
    logits, values = (output.cpu() for output in agent(obs))
    if not math.isfinite(logits.sum()):
        raise FloatingPointError("the policy's output is not finite: weights diverged, or an observation is NaN")
    noise = torch.empty_like(logits).exponential_().log()
    actions = (logits - noise).argmax(-1)  # Gumbel's trick: a sample of softmax(logits), faster than multinomial()
    return actions, log_prob_and_entropy(logits, actions)[0], values


def log_prob_and_entropy(logits: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
    """log pi(a|s) of actions, and the entropy of pi(.|s) in nats: (..., K), (...) -> (...), (...)."""
    log_pi = logits.log_softmax(-1)
    return log_pi.gather(-1, actions.unsqueeze(-1)).squeeze(-1), -(log_pi.exp() * log_pi).sum(-1)


def gae(
    rewards: Tensor, values: Tensor, next_values: Tensor, terminated: Tensor, truncated: Tensor, gamma: float,
    gae_lambda: float,
) -> Tensor:  # fmt: skip
    """Generalised advantage estimation (2016, equation 16) [D5]: five of (T, N) -> advantages (T, N).

    Where an episode terminated, nothing follows, and V(s_{t+1}) counts as 0. Where it was truncated, by a time limit,
    V(s_{t+1}) stands for what would have followed. The sum over later steps stops at either, and after row T-1.
    """
    deltas = rewards + gamma * next_values * ~terminated - values
    decay = gamma * gae_lambda * ~(terminated | truncated)
    advantages, following = torch.empty_like(deltas), torch.zeros_like(deltas[0])
    for t in reversed(range(len(deltas))):
        advantages[t] = following = deltas[t] + decay[t] * following
    return advantages


def clipped_policy_loss(ratio: Tensor, advantages: Tensor, clip_coef: float) -> Tensor:
    """-mean of min(ratio * A, clip(ratio, 1 - epsilon, 1 + epsilon) * A) (2017, equation 7) [D8]: (B,), (B,) -> scalar.

    Where the ratio has gone beyond the clip in the direction that A asks for, the gradient is 0. Where it has gone
    beyond in the wrong direction, the gradient remains, so that mistakes are taken back.
    """
    return -torch.min(ratio * advantages, ratio.clamp(1 - clip_coef, 1 + clip_coef) * advantages).mean()


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip_coef: float | None) -> Tensor:
    """mean of (V - return)^2 / 2: three of (B,) -> scalar.

    With a clip [D9], the error is also computed for V held within the clip of V_old, and the larger of the two counts.
    It is not in the paper. Engstrom et al. (2020), "Implementation matters in deep RL", found no sign that it helps.
    """
    errors = (values - returns).square()
    if clip_coef is not None:
        clipped = old_values + (values - old_values).clamp(-clip_coef, clip_coef)
        errors = torch.max(errors, (clipped - returns).square())
    return errors.mean() / 2


class Batch(NamedTuple):
    """Steps of a rollout, B in a minibatch. Row b of each:"""

    obs: Tensor  # what the environment showed, not normalised, (B, 4, 84, 84)
    actions: Tensor  # what was done then, (B,)
    log_probs: Tensor  # log pi_old(a|s), (B,)
    values: Tensor  # V_old(s), (B,)
    advantages: Tensor  # A_t, (B,)
    returns: Tensor  # A_t + V_old(s): what V(s) should have been, (B,)


def update(agent: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, args: Args) -> dict[str, Tensor]:
    """One gradient step on the B steps of a minibatch [D6] -> metrics, scalars."""
    logits, values = agent(batch.obs)
    log_probs, entropies = log_prob_and_entropy(logits, batch.actions)
    log_ratio = log_probs - batch.log_probs
    ratio = log_ratio.exp()
    advantages = batch.advantages
    if args.norm_adv:
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)  # [D7] not in the paper
    loss_pi = clipped_policy_loss(ratio, advantages, args.clip_coef)
    loss_v = value_loss(values, batch.values, batch.returns, args.clip_coef if args.clip_vloss else None)
    entropy = entropies.mean()
    loss = loss_pi + args.vf_coef * loss_v - args.ent_coef * entropy  # [D10] equation 9
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)  # [D11] all as one vector
    optimizer.step()
    with torch.no_grad():  # [D12] what to watch
        return {
            "losses/policy_loss": loss_pi.detach(),
            "losses/value_loss": loss_v.detach(),
            "losses/entropy": entropy.detach(),
            "losses/approx_kl": (ratio - 1 - log_ratio).mean(),  # KL(pi_old || pi): joschu.net/blog/kl-approx.html
            "losses/clipfrac": ((ratio - 1).abs() > args.clip_coef).float().mean(),
        }


def learn(agent: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, args: Args) -> dict[str, Tensor]:
    """All gradient steps on a rollout: update-epochs times over it -> the means of the minibatches' metrics."""
    metrics = []
    for _ in range(args.update_epochs):
        for chosen in torch.randperm(len(batch.obs)).to(batch.obs.device).tensor_split(args.num_minibatches):
            metrics.append(update(agent, optimizer, Batch(*(part[chosen] for part in batch)), args))
        if args.target_kl is not None:
            epoch_kl = sum(minibatch["losses/approx_kl"] for minibatch in metrics[-args.num_minibatches :])
            if epoch_kl / args.num_minibatches > args.target_kl:
                break
    means = {tag: torch.stack([minibatch[tag] for minibatch in metrics]).mean() for tag in metrics[0]}
    if not all(value.isfinite() for value in means.values()):
        raise FloatingPointError("the losses are no longer finite")
    return means


def newest_frames(obs: Tensor) -> Tensor:
    """Observations (B, 4, 84, 84) of uint8 -> their newest frames (B, 84 * 84), of which the statistics are kept."""
    return obs[:, -1].flatten(1).float()


def explained_variance(values: Tensor, returns: Tensor) -> Tensor:
    """1: V foresaw the returns, but for a constant; 0: no better than their mean. (B,), (B,) -> scalar [D12]."""
    return 1 - (returns - values).var() / (returns.var() + 1e-8)


def is_due(step: int, count: int, frequency: int) -> bool:
    """Whether a multiple of frequency is among the last `count` numbers up to step; never, if frequency is 0."""
    return frequency > 0 and step % frequency < count


# ---- Memory ---------------------------------------------------------------------------------------------------------


class Rollout:
    """T steps of N environments. Of each, in row t: what was seen, done and thought, and what came of it."""

    def __init__(self, num_steps: int, num_envs: int) -> None:
        self.obs = torch.zeros(num_steps, num_envs, STACK, 84, 84, dtype=torch.uint8)
        self.actions = torch.zeros(num_steps, num_envs, dtype=torch.int64)
        self.log_probs, self.values, self.rewards = torch.zeros(3, num_steps, num_envs)
        self.terminated, self.truncated, self.valid = torch.zeros(3, num_steps, num_envs, dtype=torch.bool)

    def add_choice(self, t: int, obs: np.ndarray, actions: Tensor, log_probs: Tensor, values: Tensor) -> None:
        """Observations (N, 4, 84, 84), and what the agent made of them: three of (N,)."""
        self.obs[t] = torch.from_numpy(obs)
        self.actions[t], self.log_probs[t], self.values[t] = actions, log_probs, values

    def add_outcome(
        self, t: int, rewards: np.ndarray, terminated: np.ndarray, truncated: np.ndarray, valid: np.ndarray
    ) -> None:
        """What the environments answered: four of (N,). `valid` is False where the action was ignored."""
        rewards = np.sign(rewards)  # [A6]
        for column, values in zip(
            (self.rewards, self.terminated, self.truncated, self.valid), (rewards, terminated, truncated, valid)
        ):
            column[t] = torch.from_numpy(values)

    def batch(self, last_values: Tensor, gamma: float, gae_lambda: float) -> Batch:
        """All the valid steps, with the advantages of their actions; last_values (N,) are V of what is seen now.

        After a game's last step, the environment shows its last observation; the step after that ignores its action,
        shows the first observation of a new game, and is not valid. So the next row's value is V(s_{t+1}) of every
        valid row t, at a game's end, too. (The loss of a life ends an episode without such a step.)
        """
        next_values = torch.cat([self.values[1:], last_values[None]])
        advantages = gae(self.rewards, self.values, next_values, self.terminated, self.truncated, gamma, gae_lambda)
        parts = self.obs, self.actions, self.log_probs, self.values, advantages, advantages + self.values
        return Batch(*(part[self.valid] for part in parts))


# ---- Training -------------------------------------------------------------------------------------------------------


def train(args: Args) -> Path:
    """Trains an agent, from the start or from the checkpoint in args.resume, and returns the run's folder."""
    device = pick_device(args)
    torch.manual_seed(args.seed)
    num_envs, num_steps = args.num_envs, args.num_steps
    envs = make_envs(args, num_envs)
    agent = make_agent(args, envs, device)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)  # [D3] not 1e-8
    rollout = Rollout(num_steps, num_envs)
    parts, global_step = {"agent": agent, "optimizer": optimizer}, 0
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
                if obs is None:  # at the start and after each checkpoint: new games, given by seed and step alone
                    obs, info = envs.reset(seed=env_seeds(args.seed, (TRAINING, global_step), num_envs))
                    frame_numbers = info["episode_frame_number"]
                    scores, lengths = np.zeros((2, num_envs), dtype=np.int64)
                    if args.norm_obs and global_step == 0:  # before the first rollout, a first idea of the game
                        agent.obs_statistics.update(newest_frames(torch.from_numpy(obs)).to(device))
                if args.anneal_lr:  # [D4] once a rollout
                    optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - global_step / args.total_timesteps)

                # Act: T steps in every environment. The step after a game's end ignores its action and begins a new
                # game, so it is not learned from. It shows in a frame number that falls. The old game is logged now,
                # unless a checkpoint came between.
                for t in range(num_steps):
                    actions, log_probs, values = act(agent, torch.from_numpy(obs).to(device))
                    envs.send(actions.numpy())
                    rollout.add_choice(t, obs, actions, log_probs, values)  # while the emulators step
                    obs, rewards, terminated, truncated, info = envs.recv()
                    new_game = info["episode_frame_number"] < frame_numbers
                    rollout.add_outcome(t, rewards, terminated, truncated, ~new_game)
                    global_step, frame_numbers = global_step + num_envs, info["episode_frame_number"]
                    for i in np.flatnonzero(new_game):
                        recent.append(scores[i])
                        writer.add_scalar("charts/episodic_return", scores[i], global_step - num_envs + 1 + i)
                        writer.add_scalar("charts/episodic_length", lengths[i], global_step - num_envs + 1 + i)
                    scores, lengths = np.where(new_game, 0, [scores + rewards, lengths + 1])

                # Learn.
                _, _, last_values = act(agent, torch.from_numpy(obs).to(device))
                batch = Batch(*(part.to(device) for part in rollout.batch(last_values, args.gamma, args.gae_lambda)))
                metrics = learn(agent, optimizer, batch, args)
                if args.norm_obs:  # only now: pi and pi_old must see observations that are normalised alike
                    agent.obs_statistics.update(newest_frames(batch.obs))

                # Log, save.
                scalars = {
                    "charts/learning_rate": optimizer.param_groups[0]["lr"],
                    "charts/SPS": (global_step - first_step) / (time.perf_counter() - start_time),
                    "losses/explained_variance": explained_variance(batch.values, batch.returns),
                }
                for tag, value in (scalars | metrics).items():
                    writer.add_scalar(tag, value, global_step)
                if recent:
                    bar.set_postfix_str(f"return {np.mean(recent):.1f}", refresh=False)
                bar.update(min(global_step, args.total_timesteps) - bar.n)
                due = is_due(global_step, num_steps * num_envs, args.checkpoint_frequency)
                if due or global_step >= args.total_timesteps:
                    save()
                    obs = None  # new games, as in a resumed run, so that both go on alike
    except (FloatingPointError, KeyboardInterrupt) as error:
        stop(error, global_step, run_dir)

    log_evaluation(writer, args, run_dir, global_step, *evaluate(args, agent, run_dir))
    print(run_dir)
    return run_dir


def evaluate(args: Args, agent: Agent, run_dir: Path) -> tuple[float, float]:
    """Plays args.eval_episodes whole games side by side, prints how it went, returns mean score and length.

    Actions are sampled as in training: by the most probable ones, a game can go in circles.
    """
    torch.manual_seed(args.seed)  # of the random actions
    count, device = args.eval_episodes, next(agent.parameters()).device
    envs, seeds = make_envs(args, count), env_seeds(args.seed, (EVALUATION,), count)
    obs, info = envs.reset(seed=seeds)
    if args.capture_video:
        camera = make_camera(args)
        pictures = [camera.reset(seed=seeds[:1])[0]] if camera else [obs[:1].copy()]
    scores, lengths, playing = np.zeros(count), np.zeros(count), np.ones(count, dtype=bool)
    while playing.any():
        frame_numbers = info["episode_frame_number"]
        actions = act(agent, torch.from_numpy(obs).to(device))[0].numpy()
        envs.send(actions)
        obs, rewards, _, _, info = envs.recv()
        playing &= info["episode_frame_number"] > frame_numbers  # each environment plays one game
        scores, lengths = scores + rewards * playing, lengths + playing
        if args.capture_video and playing[0] and len(pictures) < MAX_FRAMES:
            pictures.append(camera.step(actions[:1])[0] if camera else obs[:1].copy())
    print(f"Evaluation: return {np.mean(scores):.1f} ± {np.std(scores):.1f} over {count} episodes, sampled")
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
            agent = make_agent(args, make_envs(args, 1), pick_device(args))
            load_checkpoint(args.evaluate, args, agent=agent)
            evaluate(args, agent, Path(args.evaluate))
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
