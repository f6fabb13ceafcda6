# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "torch>=2.4.0", "gymnasium[classic-control]>=1.0.0", "tyro>=1.0.16", "tensorboard>=2.20.0", "tqdm>=4.66.0",
# ]
# ///
"""REINFORCE, the Monte Carlo policy gradient, for flat observations and discrete actions.

Paper    Williams (1992), "Simple statistical gradient-following algorithms for connectionist reinforcement
         learning". Equation numbers are those of Sutton and Barto (2018), "Reinforcement Learning", 2nd edition.
Idea     Play whole episodes with the current policy pi(a|s), the probability of action a where s is observed. Then make
         every action more likely if more reward came after it than usual, and less likely if less did. On average, that
         is a step up the gradient of J, the expected return of an episode. Nothing but the policy is learned.

             G_t    = r_t + gamma * G_{t+1}                           the return from step t on (3.9)
             grad J = E[ sum_t (G_t - b_t) * grad log pi(a_t|s_t) ]   the policy gradient, for gamma = 1 (13.5, 13.10);
                                                                      b_t, the baseline, is what is usual at step t

Differs  Adam takes one step for several episodes together, with a learning rate that falls to 0. The baseline b_t is
         their mean return from the same step t on, and the differences are scaled to standard deviation 1. With
         gamma < 1, later rewards, which are mostly noise to a_t, count less; the gradient of that discounted J has a
         factor gamma^t more, which is left out, as in nearly all programs. A time limit counts as an end, since nothing
         here estimates what would have followed: the agent learns to do well within the limit.
Shapes   N episodes of an update; T steps of an episode; B steps of all N episodes together; O numbers of an
         observation; K actions. Row t of an episode is the step from t to t+1, r_t the reward for a_t.
Run      python reinforce_cartpole.py
         python reinforce_cartpole.py --env-id Acrobot-v1 --total-timesteps 400000
         Textbook form: --episodes-per-update 1 --no-normalize-returns --no-anneal-lr --learning-rate 1e-3
Expect   Return of the greedy policy over 100 episodes, mean over seeds 1 to 20 (worst to best seed), and wall time on
         one core of an Intel Xeon, start-up and evaluation included:
             CartPole-v1                   498.2 (489.1 to 500.0)   100k steps    6 s
             CartPole-v1, textbook form    448.3 (206.1 to 500.0)   100k steps   14 s
             Acrobot-v1                    -83.4 (-91.8 to -78.0)   400k steps   30 s
"""

import math
import os
import sys
import time
from argparse import ArgumentParser
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
from torch.distributions import Categorical
from torch.nn.utils.rnn import pad_sequence
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

SCRIPT = "reinforce_cartpole"  # named in checkpoints and messages
MAX_EPISODE_STEPS = 10_000  # the time limit of environments that declare none: no episode is endless
MAX_FRAMES = 1_000  # steps, at most, that the animated picture covers; it shows every second one
RunDir = Annotated[str | None, tyro.conf.arg(metavar="RUN_DIR")]


@dataclass(frozen=True)
class Args:
    env_id: str = "CartPole-v1"  # a Gymnasium environment that fits, or my_module:MyEnv-v0
    seed: int = 1  # of all that is random in the run
    total_timesteps: int = 100_000  # environment steps to train for, at least

    learning_rate: float = 1e-2  # step size of Adam
    anneal_lr: bool = True  # lower the learning rate linearly, to 0 at the end of the run
    gamma: float = 0.99  # discount factor
    episodes_per_update: int = 8  # whole episodes in one gradient step (N)
    normalize_returns: bool = True  # learn from (G_t - b_t) / standard deviation in place of G_t

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
        for name in ("total_timesteps", "episodes_per_update", "eval_episodes"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"--seed must be between 0 and 2**63 - 1, not {self.seed}")
        if self.checkpoint_frequency < 0:
            raise ValueError(f"--checkpoint-frequency must be at least 0, not {self.checkpoint_frequency}")
        if not 0 < self.learning_rate < float("inf"):
            raise ValueError(f"--learning-rate must be a positive number, not {self.learning_rate}")
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"--gamma must be between 0 and 1, not {self.gamma}")
        if self.normalize_returns and self.episodes_per_update == 1:
            raise ValueError("--episodes-per-update 1 leaves nothing to compare with: add --no-normalize-returns")
        if self.resume is not None and self.evaluate is not None:
            raise ValueError("--resume and --evaluate exclude each other")


# Arguments that do not change what is learned, apart from rounding, where `reset` leaves nothing of earlier episodes.
HOUSEKEEPING = {
    "exp_name", "runs_dir", "device", "checkpoint_frequency", "resume", "evaluate", "eval_episodes", "capture_video",
}  # fmt: skip


# ---- Environment and network ----------------------------------------------------------------------------------------


def make_envs(args: Args) -> list[gym.Env]:
    """One environment for each of the N episodes of an update; with --capture-video, the first can be drawn."""
    sys.path.append(os.getcwd())  # my_module may lie where the command was typed
    try:
        envs = [gym.make(args.env_id) for _ in range(args.episodes_per_update)]
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


class Policy(nn.Module):
    """pi(a|s): two linear layers with a ReLU between. Their outputs are logits: a softmax makes them probabilities."""

    def __init__(self, obs_size: int, num_actions: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(obs_size, 128), nn.ReLU(), nn.Linear(128, num_actions))
        for parameter in self.layers[-1].parameters():
            nn.init.zeros_(parameter)  # the first policy plays all actions alike, so it explores without a bias

    def forward(self, obs: Tensor) -> Tensor:
        """Observations (B, O) -> logits (B, K)."""
        return self.layers(obs)


# ---- Playing episodes -----------------------------------------------------------------------------------------------


class Episode(NamedTuple):
    """One whole episode of T steps. Entry t of each list:"""

    obs: list[np.ndarray]  # what the policy saw, (O,)
    actions: list[int]  # what it did then
    rewards: list[float]  # what it got for that


@torch.no_grad()  # acting keeps no graph: `update` computes the log probabilities again, in one pass
def play_episodes(
    envs: list[gym.Env], policy: Policy, seeds: list[int], greedy: bool = False, frames: list | None = None
) -> list[Episode]:
    """Plays one episode for each seed, side by side, so that one forward pass acts for all that still run.

    Environments that have ended wait for the others. If they began new episodes until enough had ended, short episodes
    would be over-represented. The greedy policy takes the most probable action; otherwise actions are sampled. If
    there is a list for frames, every second step of the first episode is drawn into it.
    """
    first_action = int(envs[0].action_space.start)  # Discrete actions count from here, nearly always from 0
    device = next(policy.parameters()).device
    episodes = [Episode([], [], []) for _ in seeds]
    obs = [env.reset(seed=seed)[0] for env, seed in zip(envs, seeds)]
    running = list(range(len(seeds)))
    while running:
        batch = np.array([obs[i] for i in running], dtype=np.float32)
        logits = policy(torch.from_numpy(batch).to(device)).cpu()
        if not math.isfinite(logits.sum()):
            raise FloatingPointError("the policy's output is not finite: weights diverged, or an observation is NaN")
        actions = logits.argmax(-1) if greedy else torch.multinomial(logits.softmax(-1), 1).squeeze(-1)
        if frames is not None and running[0] == 0 and len(episodes[0].rewards) in range(0, MAX_FRAMES, 2):
            frames.append(envs[0].render())
        still_running = []
        for i, row, action in zip(running, batch, actions.tolist()):
            obs[i], reward, terminated, truncated, _ = envs[i].step(first_action + action)
            episodes[i].obs.append(row)
            episodes[i].actions.append(action)
            episodes[i].rewards.append(float(reward))
            if not (terminated or truncated):
                still_running.append(i)
        running = still_running
    return episodes


TRAINING, EVALUATION = 0, 1  # streams of seeds: (TRAINING, update) for the update of that number, (EVALUATION,)


def episode_seeds(seed: int, stream: tuple[int, ...], count: int) -> list[int]:
    """Seeds to reset the environments with, which depend on the run's seed and the stream alone.

    So a resumed run plays the same episodes as one that never stopped. Of 2**32 seeds, two streams rarely share one.
    """
    return np.random.SeedSequence(seed, spawn_key=stream).generate_state(count).tolist()


# ---- The algorithm --------------------------------------------------------------------------------------------------


def discounted_returns(rewards: list[float], gamma: float) -> Tensor:
    """G_t = r_t + gamma * G_{t+1}, and 0 after the end (3.9): the rewards of one episode -> (T,)."""
    returns, following = [0.0] * len(rewards), 0.0
    for t in reversed(range(len(rewards))):
        returns[t] = following = rewards[t] + gamma * following
    return torch.tensor(returns)


def normalize_returns(returns: list[Tensor]) -> Tensor:
    """(G_t - b_t) / deviation, b_t being the mean of G_t over the n episodes that reached step t: N of (T,) -> (B,).

    b_t is how much is usually left to earn at step t. So a step is not judged bad merely for being late, and where all
    episodes went alike, the gradient is 0. A baseline that a_t cannot influence leaves the expected gradient as it is
    (13.10); this one contains 1/n of G_t itself, which scales the gradient of step t by 1 - 1/n: to 0 where only one
    episode got that far. Dividing by the standard deviation of all B differences lets each batch count the same,
    whatever its rewards' size, at the price of a bias: a batch with a rare, large return is divided by more.
    """
    lengths = torch.tensor([len(episode) for episode in returns])
    padded = pad_sequence(returns, batch_first=True)  # (N, longest T)
    reached = torch.arange(padded.shape[1]) < lengths[:, None]  # (N, longest T), False after an episode's end
    # First less the longest episode's returns, so that equal ones give exactly 0, without a rounding error.
    padded = (padded - padded[lengths.argmax()]) * reached
    baseline = padded.sum(0) / reached.sum(0)  # (longest T,)
    differences = (padded - baseline)[reached]  # (B,), episode after episode
    return differences / (differences.std(correction=0) + 1e-8)


def policy_loss(log_probs: Tensor, returns: Tensor, num_episodes: int) -> Tensor:
    """-1/N * sum of G_t * log pi(a_t|s_t) over all steps of N episodes: (B,), (B,) -> scalar.

    A step down its gradient is the update (13.8), averaged over the episodes; if returns holds G_t - b_t, (13.11). Only
    the gradient means something: a lower loss is not a better policy.
    """
    return -(returns * log_probs).sum() / num_episodes


def update(
    policy: Policy, optimizer: torch.optim.Optimizer, obs: Tensor, actions: Tensor, returns: Tensor, num_episodes: int
) -> dict[str, Tensor]:
    """One gradient step on the B steps of N episodes: obs (B, O), actions (B,), returns (B,) -> metrics, scalars."""
    distribution = Categorical(logits=policy(obs), validate_args=False)
    loss = policy_loss(distribution.log_prob(actions), returns, num_episodes)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if not (loss.isfinite() and all(weights.isfinite().all() for weights in policy.parameters())):
        raise FloatingPointError(f"the loss is {loss.item()}, or a weight is no longer finite")
    return {"losses/policy_loss": loss.detach(), "losses/entropy": distribution.entropy().mean().detach()}


def is_due(step: int, count: int, frequency: int) -> bool:
    """Whether a multiple of frequency is among the last `count` numbers up to step; never, if frequency is 0."""
    return frequency > 0 and step % frequency < count


# ---- Training -------------------------------------------------------------------------------------------------------


def train(args: Args) -> Path:
    """Trains a policy, from the start or from the checkpoint in args.resume, and returns the run's folder."""
    torch.set_num_threads(1)  # for a network this small, a second thread costs more than it brings
    torch.manual_seed(args.seed)
    device = pick_device(args.device)
    envs = make_envs(args)
    policy = Policy(envs[0].observation_space.shape[0], int(envs[0].action_space.n)).to(device)
    optimizer = torch.optim.Adam(policy.parameters(), lr=args.learning_rate, fused=True)
    parts, global_step, num_updates = {"policy": policy, "optimizer": optimizer}, 0, 0
    if args.resume is not None:
        state = load_checkpoint(args.resume, args, **parts)
        global_step, num_updates = state["global_step"], state["num_updates"]
        torch.set_rng_state(state["random_state"])
    run_dir = make_run_dir(args) if args.resume is None else Path(args.resume)
    print(f"Training in {run_dir}", flush=True)
    writer = open_log(run_dir, args, global_step)

    def save() -> None:
        writer.flush()  # the event file must not lag behind the checkpoint
        save_checkpoint(run_dir, args, parts, global_step=global_step, num_updates=num_updates)

    first_step, start_time = global_step, time.perf_counter()
    save()  # from here on there is something to resume
    try:
        with progress_bar(global_step, args.total_timesteps) as bar:
            while global_step < args.total_timesteps:
                if args.anneal_lr:
                    optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - global_step / args.total_timesteps)

                # Act: N whole episodes of the current policy.
                seeds = episode_seeds(args.seed, (TRAINING, num_updates), args.episodes_per_update)
                episodes = play_episodes(envs, policy, seeds)

                # Learn: one gradient step. It changes the policy, so these episodes are of no use any more.
                obs = torch.from_numpy(np.array([row for episode in episodes for row in episode.obs]))
                actions = torch.tensor([action for episode in episodes for action in episode.actions])
                returns = [discounted_returns(episode.rewards, args.gamma) for episode in episodes]
                step_returns = normalize_returns(returns) if args.normalize_returns else torch.cat(returns)
                batch = (obs.to(device), actions.to(device), step_returns.to(device))
                metrics = update(policy, optimizer, *batch, len(episodes))

                # Log, save.
                num_updates += 1
                global_step += len(actions)
                episodic_return = float(np.mean([sum(episode.rewards) for episode in episodes]))
                scalars = {
                    "charts/episodic_return": episodic_return,
                    "charts/episodic_length": len(actions) / len(episodes),
                    "charts/learning_rate": optimizer.param_groups[0]["lr"],
                    "charts/SPS": (global_step - first_step) / (time.perf_counter() - start_time),
                }
                for tag, value in (scalars | metrics).items():
                    writer.add_scalar(tag, value, global_step)
                bar.set_postfix_str(f"return {episodic_return:.1f}", refresh=False)
                bar.update(min(global_step, args.total_timesteps) - bar.n)
                due = is_due(global_step, len(actions), args.checkpoint_frequency)
                if due or global_step >= args.total_timesteps:
                    save()
                    envs = make_envs(args)  # new ones, as in a resumed run, so that both go on alike
    except (FloatingPointError, KeyboardInterrupt) as error:
        stop(error, global_step, run_dir)

    log_evaluation(writer, args, run_dir, global_step, *evaluate(args, envs, policy, run_dir))
    print(run_dir)
    return run_dir


def evaluate(args: Args, envs: list[gym.Env], policy: Policy, run_dir: Path) -> tuple[float, float]:
    """Plays args.eval_episodes with the greedy policy, prints how it went, returns their mean return and length."""
    seeds = episode_seeds(args.seed, (EVALUATION,), args.eval_episodes)
    episodes, frames = [], ([] if args.capture_video else None)
    for first in range(0, len(seeds), len(envs)):
        group = seeds[first : first + len(envs)]
        episodes += play_episodes(envs, policy, group, greedy=True, frames=None if first else frames)
    returns = [sum(episode.rewards) for episode in episodes]
    print(f"Evaluation: return {np.mean(returns):.1f} ± {np.std(returns):.1f} over {len(returns)} episodes, greedy")
    if frames:
        fps = envs[0].metadata.get("render_fps") or 30
        path, milliseconds = run_dir / "episode.gif", 2 * 1000 / fps  # of every second frame, to halve the file
        pictures = [Image.fromarray(frame).quantize(method=Image.Quantize.FASTOCTREE) for frame in frames]
        pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=milliseconds, loop=0)
        print(f"Animated picture: {path}")
    return float(np.mean(returns)), float(np.mean([len(episode.rewards) for episode in episodes]))


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
            policy = Policy(envs[0].observation_space.shape[0], int(envs[0].action_space.n))
            load_checkpoint(args.evaluate, args, policy=policy)
            evaluate(args, envs, policy.to(pick_device(args.device)), Path(args.evaluate))
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
