# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "torch>=2.4.0", "gymnasium[classic-control]>=1.0.0", "tyro>=1.0.16", "tensorboard>=2.20.0", "tqdm>=4.66.0",
# ]
# ///
r"""Proximal policy optimisation (PPO) for flat observations and discrete actions.

Paper    Schulman et al. (2017), "Proximal policy optimization algorithms", equations 7 and 9, Algorithm 1. Advantages:
         Schulman et al. (2016), "High-dimensional continuous control using generalized advantage estimation",
         equation 16. Comments such as [D3] are the numbers of details in Huang et al. (2022), "The 37 implementation
         details of proximal policy optimization": D1 to D13 at the core, C6 to C9 for normalisation.
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

Differs  Where only a time limit ends an episode, V stands for what would have followed. All environments begin new
         episodes at a checkpoint, since Gymnasium cannot save an environment's state. On by default, beyond the
         equations: A is normalised in each minibatch, the gradient is clipped, and the learning rate falls to 0. Off by
         default: the entropy bonus, the clip of the change of V, the early stop by the KL divergence, and the
         normalisations of observations and of rewards, with both of which the last two below were trained.
Shapes   T steps of N environments in one rollout; B of them in one minibatch; O numbers of an observation; K actions.
         Row t is the step from t to t+1.
Run      python ppo_cartpole.py
         python ppo_cartpole.py --env-id MountainCar-v0 --total-timesteps 300000 --num-envs 16 --num-steps 128 \
             --num-minibatches 8 --update-epochs 10 --gamma 0.99 --gae-lambda 0.98 --norm-obs --norm-reward
         The same with --env-id Acrobot-v1
Expect   Return of the greedy policy over 100 episodes, mean over seeds 1 to 10 (worst to best seed), and wall time on
         one core of an AMD EPYC whose other core had a run, too, start-up and evaluation included:
             CartPole-v1     500.0 (500.0 to 500.0)    100k steps   22 s
             MountainCar-v0  -106.3 (-109.6 to -103.2) 300k steps   27 s
             Acrobot-v1      -81.1 (-88.3 to -73.4)    300k steps   35 s
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
import tyro
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

SCRIPT = "ppo_cartpole"  # named in checkpoints and messages
MAX_EPISODE_STEPS = 10_000  # the time limit of environments that declare none: no episode is endless
MAX_FRAMES = 1_000  # steps, at most, that the animated picture covers; it shows every second one
RunDir = Annotated[str | None, tyro.conf.arg(metavar="RUN_DIR")]


@dataclass(frozen=True)
class Args:
    env_id: str = "CartPole-v1"  # a Gymnasium environment that fits, or my_module:MyEnv-v0
    seed: int = 1  # of all that is random in the run
    total_timesteps: int = 100_000  # environment steps to train for, at least

    learning_rate: float = 1e-3  # step size of Adam
    anneal_lr: bool = True  # lower the learning rate linearly, to 0 at the end of the run
    num_envs: int = 8  # environments that are stepped side by side (N)
    num_steps: int = 32  # steps in each environment for one rollout (T)
    gamma: float = 0.98  # discount factor
    gae_lambda: float = 0.8  # how far an advantage looks before it trusts V (lambda); 0: one reward; 1: all to come
    num_minibatches: int = 1  # parts of a rollout, one gradient step for each
    update_epochs: int = 20  # times that a rollout is learned from
    norm_adv: bool = True  # shift and scale a minibatch's advantages to mean 0 and standard deviation 1
    clip_coef: float = 0.2  # how far the ratio of new to old probability may move from 1 and still pay (epsilon)
    clip_vloss: bool = False  # the value loss, too, rewards no change of V beyond clip-coef
    ent_coef: float = 0.0  # weight of the entropy in the loss
    vf_coef: float = 0.5  # weight of the value loss in the loss
    max_grad_norm: float = 0.5  # longer gradients are cut to this length
    target_kl: float | None = None  # learn no more from a rollout once an epoch's KL, taken before its steps, is larger
    norm_obs: bool = False  # shift and scale observations to mean 0 and standard deviation 1
    norm_reward: bool = False  # scale rewards, so that the discounted sum so far has deviation 1; clip at 10

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
            "total_timesteps", "num_envs", "num_steps", "num_minibatches", "update_epochs", "eval_episodes",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
        for name in ("gamma", "gae_lambda"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"--{name.replace('_', '-')} must be between 0 and 1, not {getattr(self, name)}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"--seed must be between 0 and 2**63 - 1, not {self.seed}")
        for name in ("checkpoint_frequency", "ent_coef", "vf_coef"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"--{name.replace('_', '-')} must be at least 0, not {getattr(self, name)}")
        for name in ("learning_rate", "clip_coef", "max_grad_norm", "target_kl"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"--{name.replace('_', '-')} must be a positive number, not {getattr(self, name)}")
        if self.num_steps * self.num_envs < 2 * self.num_minibatches:  # one has no deviation from the mean
            raise ValueError("--num-minibatches must leave at least 2 of --num-envs times --num-steps steps for each")
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


def layer(inputs: int, outputs: int, gain: float = math.sqrt(2)) -> nn.Linear:
    """A linear layer that starts as an orthogonal matrix times gain, with a bias of 0 [D2]."""
    linear = nn.Linear(inputs, outputs)
    nn.init.orthogonal_(linear.weight, gain)
    nn.init.zeros_(linear.bias)
    return linear


class Agent(nn.Module):
    """pi(a|s) and V(s): two networks [D13] of three linear layers with a tanh between."""

    def __init__(self, obs_size: int, num_actions: int, norm_obs: bool) -> None:
        super().__init__()
        self.obs_statistics = RunningStatistics(obs_size) if norm_obs else None
        self.actor = nn.Sequential(  # the first policy plays all actions nearly alike
            layer(obs_size, 64), nn.Tanh(), layer(64, 64), nn.Tanh(), layer(64, num_actions, gain=0.01)
        )
        self.critic = nn.Sequential(layer(obs_size, 64), nn.Tanh(), layer(64, 64), nn.Tanh(), layer(64, 1, gain=1.0))

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Observations (..., O) -> logits of pi(.|s) (..., K) and V(s) (...)."""
        obs = self.normalize(obs)
        return self.actor(obs), self.critic(obs).squeeze(-1)

    def normalize(self, obs: Tensor) -> Tensor:
        """Observations (..., O) -> what the networks see."""
        if self.obs_statistics is None:
            return obs
        mean, variance = self.obs_statistics.mean, self.obs_statistics.variance
        return ((obs - mean) / (variance + 1e-8).sqrt()).clamp(-10, 10)  # [C6] normalised, [C7] clipped


def make_agent(args: Args, envs: list[gym.Env]) -> Agent:
    """An agent that fits the environments."""
    return Agent(envs[0].observation_space.shape[0], int(envs[0].action_space.n), args.norm_obs)


# ---- The algorithm --------------------------------------------------------------------------------------------------


@torch.no_grad()
def act(agent: Agent, obs: Tensor, greedy: bool = False) -> Tensor:
    """Samples actions from pi(.|s), or takes the most probable: observations (N, O) -> (N,)."""
    logits = agent.actor(agent.normalize(obs)).cpu()
    if not math.isfinite(logits.sum()):
        raise FloatingPointError("the policy's output is not finite: weights diverged, or an observation is NaN")
    noise = 0 if greedy else torch.empty_like(logits).exponential_().log()
    return (logits - noise).argmax(-1)  # Gumbel's trick: a sample of softmax(logits), faster than multinomial()


def log_prob_and_entropy(logits: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
    """log pi(a|s) of actions, and the entropy of pi(.|s) in nats: (..., K), (...) -> (...), (...)."""
    log_pi = logits.log_softmax(-1)
    return log_pi.gather(-1, actions.unsqueeze(-1)).squeeze(-1), -(log_pi.exp() * log_pi).sum(-1)


def scale_rewards(
    rewards: Tensor, ended: Tensor, before: Tensor, statistics: RunningStatistics, gamma: float
) -> tuple[Tensor, Tensor]:
    """Divides rewards (T, N) by the running standard deviation of R_t = r_t + gamma * R_{t-1} [C8], clips them [C9].

    They are not shifted, as that would change what is worth doing. R is 0 before an episode's first step. `before` (N,)
    is R just before row 0: the second result of the call for the rollout before, or 0 where new episodes begin.
    """
    sums = torch.empty_like(rewards)
    for t in range(len(rewards)):
        sums[t] = rewards[t] + gamma * before
        before = sums[t] * ~ended[t]
    statistics.update(sums.reshape(-1, 1))
    return (rewards / (statistics.variance + 1e-8).sqrt()).clamp(-10, 10), before


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

    obs: Tensor  # what the environment showed, not normalised, (B, O)
    actions: Tensor  # what was done then, (B,)
    log_probs: Tensor  # log pi_old(a|s), (B,)
    values: Tensor  # V_old(s), (B,)
    advantages: Tensor  # A_t, (B,)
    returns: Tensor  # A_t + V_old(s): what V(s) should have been, (B,)


@torch.no_grad()
def make_batch(
    agent: Agent, obs: Tensor, actions: Tensor, rewards: Tensor, next_obs: Tensor, terminated: Tensor,
    truncated: Tensor, args: Args,
) -> Batch:  # fmt: skip
    """What there is to learn from a rollout: obs, next_obs (T, N, O) and four of (T, N) -> T * N rows.

    next_obs holds an episode's true last observation, not the first one of the next. The agent has not changed since
    the rollout: what it computes here are pi_old and V_old.
    """
    logits, values = agent(obs)
    _, next_values = agent(next_obs)
    log_probs, _ = log_prob_and_entropy(logits, actions)
    advantages = gae(rewards, values, next_values, terminated, truncated, args.gamma, args.gae_lambda)
    parts = obs, actions, log_probs, values, advantages, advantages + values
    return Batch(*(part.flatten(0, 1) for part in parts))


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


def explained_variance(values: Tensor, returns: Tensor) -> Tensor:
    """1: V foresaw the returns, but for a constant; 0: no better than their mean. (B,), (B,) -> scalar [D12]."""
    return 1 - (returns - values).var() / (returns.var() + 1e-8)


def is_due(step: int, count: int, frequency: int) -> bool:
    """Whether a multiple of frequency is among the last `count` numbers up to step; never, if frequency is 0."""
    return frequency > 0 and step % frequency < count


# ---- Training -------------------------------------------------------------------------------------------------------


def train(args: Args) -> Path:
    """Trains an agent, from the start or from the checkpoint in args.resume, and returns the run's folder."""
    torch.set_num_threads(1)  # for a network this small, a second thread costs more than it brings
    torch.manual_seed(args.seed)
    device = pick_device(args.device)
    envs, num_envs = make_envs(args), args.num_envs  # [D1] several side by side
    first_action = int(envs[0].action_space.start)  # Discrete actions count from here, nearly always from 0
    agent, reward_statistics = make_agent(args, envs).to(device), RunningStatistics(1).to(device)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)  # [D3] not 1e-8
    parts, global_step = {"agent": agent, "optimizer": optimizer, "reward_statistics": reward_statistics}, 0
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
                    returns, lengths, sums = [0.0] * num_envs, [0] * num_envs, torch.zeros(num_envs, device=device)
                if args.anneal_lr:  # [D4] once a rollout
                    optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - global_step / args.total_timesteps)

                # Act: T steps in every environment. Where an episode ends, the next one begins.
                rollout = []
                for _ in range(args.num_steps):
                    rows = np.array(obs, dtype=np.float32)
                    actions = act(agent, torch.from_numpy(rows).to(device)).numpy()
                    steps = [env.step(first_action + action) for env, action in zip(envs, actions.tolist())]
                    obs, *outcome, _ = map(list, zip(*steps))  # outcome: rewards, terminated, truncated
                    rollout.append((rows, actions, np.array(obs, dtype=np.float32), *outcome))
                    for i, (reward, terminated, truncated) in enumerate(zip(*outcome)):
                        global_step += 1
                        returns[i], lengths[i] = returns[i] + float(reward), lengths[i] + 1
                        if terminated or truncated:
                            writer.add_scalar("charts/episodic_return", returns[i], global_step)
                            writer.add_scalar("charts/episodic_length", lengths[i], global_step)
                            recent.append(returns[i])
                            obs[i], returns[i], lengths[i] = envs[i].reset()[0], 0.0, 0

                # Learn. A reward may have come as an array of one number, hence view_as.
                rows, actions, next_rows, rewards, terminated, truncated = (
                    torch.from_numpy(np.array(part, dtype=np.float32)).to(device) for part in zip(*rollout)
                )
                terminated, truncated, rewards = terminated.bool(), truncated.bool(), rewards.view_as(terminated)
                if args.norm_reward:
                    rewards, sums = scale_rewards(rewards, terminated | truncated, sums, reward_statistics, args.gamma)
                batch = make_batch(agent, rows, actions.long(), rewards, next_rows, terminated, truncated, args)
                metrics = learn(agent, optimizer, batch, args)
                if args.norm_obs:  # only now: pi and pi_old must see observations that are normalised alike
                    agent.obs_statistics.update(batch.obs)

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
                due = is_due(global_step, args.num_steps * num_envs, args.checkpoint_frequency)
                if due or global_step >= args.total_timesteps:
                    save()
                    obs, envs = None, make_envs(args)  # new ones, as in a resumed run, so that both go on alike
    except (FloatingPointError, KeyboardInterrupt) as error:
        stop(error, global_step, run_dir)

    log_evaluation(writer, args, run_dir, global_step, *evaluate(args, envs, agent, run_dir))
    print(run_dir)
    return run_dir


def play_greedily(
    envs: list[gym.Env], agent: Agent, seeds: list[int], frames: list | None = None
) -> list[list[float]]:
    """Plays one episode for each seed, side by side, by the most probable actions: the rewards of each.

    If there is a list for frames, every second step of the first episode is drawn into it.
    """
    first_action, device = int(envs[0].action_space.start), next(agent.parameters()).device
    rewards = [[] for _ in seeds]
    obs = [env.reset(seed=seed)[0] for env, seed in zip(envs, seeds)]
    running = list(range(len(seeds)))
    while running:
        rows = np.array([obs[i] for i in running], dtype=np.float32)
        actions = act(agent, torch.from_numpy(rows).to(device), greedy=True)
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


def evaluate(args: Args, envs: list[gym.Env], agent: Agent, run_dir: Path) -> tuple[float, float]:
    """Plays args.eval_episodes with the greedy policy, prints how it went, returns their mean return and length."""
    seeds = episode_seeds(args.seed, (EVALUATION,), args.eval_episodes)
    episodes, frames = [], ([] if args.capture_video else None)
    for first in range(0, len(seeds), len(envs)):
        episodes += play_greedily(envs, agent, seeds[first : first + len(envs)], None if first else frames)
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
            agent = make_agent(args, envs)
            load_checkpoint(args.evaluate, args, agent=agent)
            evaluate(args, envs, agent.to(pick_device(args.device)), Path(args.evaluate))
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
