"""Every script, as a user runs it: copied alone into an empty folder, from the command line."""

import dataclasses
import fcntl
import hashlib
import importlib
import json
import math
import os
import pty
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
import urllib.parse
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SCRIPTS, Bench, Result
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_conventions import TAGS

# A run of each script of a few seconds, with several checkpoints and updates, and a buffer, if any, that wraps around.
TINY = {
    "reinforce_cartpole": (
        "--total-timesteps 10000 --checkpoint-frequency 1000 --eval-episodes 6 --episodes-per-update 4"
    ),
    "dqn_cartpole": (
        "--total-timesteps 6000 --checkpoint-frequency 600 --eval-episodes 6 --buffer-size 3000 --norm-obs"
    ),
    "dqn_atari": (
        "--total-timesteps 2400 --checkpoint-frequency 300 --eval-episodes 2 --num-envs 2 --buffer-size 1000 "
        "--learning-starts 200 --batch-size 8 --train-frequency 20 --eval-epsilon 0.5 --num-threads 1 --norm-obs"
    ),
    "ppo_cartpole": (
        "--total-timesteps 10000 --checkpoint-frequency 1000 --eval-episodes 6 --norm-obs --norm-reward "
        "--update-epochs 4"
    ),
    "ppo_continuous": (
        "--total-timesteps 8000 --checkpoint-frequency 1000 --eval-episodes 6 --num-steps 64 --num-minibatches 4 "
        "--update-epochs 4"
    ),
    "ppo_atari": (
        "--total-timesteps 2400 --checkpoint-frequency 300 --eval-episodes 2 --num-envs 2 --num-steps 25 "
        "--num-minibatches 2 --update-epochs 1 --num-threads 1 --norm-obs"
    ),
}
# What the checkpoint calls the network that plays.
NETWORK = {
    "reinforce_cartpole": "policy", "dqn_cartpole": "q_network", "dqn_atari": "q_network", "ppo_cartpole": "agent",
    "ppo_continuous": "agent", "ppo_atari": "agent",
}  # fmt: skip
# Gymnasium environments whose spaces the script cannot handle.
WRONG_SPACES = {
    "reinforce_cartpole": ["Pendulum-v1", "FrozenLake-v1", "Blackjack-v1"],
    "dqn_cartpole": ["Pendulum-v1", "FrozenLake-v1", "Blackjack-v1"],
    "dqn_atari": ["CartPole-v1", "BreakoutNoFrameskip-v4", "Pendulum-v1"],
    "ppo_cartpole": ["Pendulum-v1", "FrozenLake-v1", "Blackjack-v1"],
    "ppo_continuous": ["CartPole-v1", "FrozenLake-v1", "Blackjack-v1"],
    "ppo_atari": ["CartPole-v1", "BreakoutNoFrameskip-v4", "Pendulum-v1"],
}
# Every second frame is shown, twice as long as a frame is in the environment, in whole hundredths of a second: CartPole
# draws 50 a second, Pendulum 30, and an emulator's 60 are seen by fours.
MILLISECONDS = {
    "reinforce_cartpole": 40, "dqn_cartpole": 40, "dqn_atari": 130, "ppo_cartpole": 40, "ppo_continuous": 60,
    "ppo_atari": 130,
}  # fmt: skip
# A setting that no training survives.
DIVERGES = {
    "reinforce_cartpole": "--learning-rate 1e38",
    "dqn_cartpole": "--learning-rate 1e38 --checkpoint-frequency 100 --total-timesteps 4000",
    "dqn_atari": "--learning-rate 1e38 --learning-starts 200 --buffer-size 1000 --total-timesteps 3000 --num-threads 1",
    "ppo_cartpole": "--learning-rate 1e38",
    "ppo_continuous": "--learning-rate 1e38",
    "ppo_atari": "--learning-rate 1e38 --num-steps 16 --total-timesteps 3000 --num-threads 1",
}


def total_timesteps(tiny):
    return int(tiny[tiny.index("--total-timesteps") + 1])


# The short form of the tests, without the slow ones, runs one script as a user does, and the mathematics of all.
SLOW = pytest.mark.slow
QUICKEST = "reinforce_cartpole"


def marks(script):
    return [] if script.stem == QUICKEST else [SLOW]


@pytest.fixture(
    params=[pytest.param(path, marks=marks(path)) for path in SCRIPTS], ids=lambda path: path.stem, scope="module"
)
def script(request):
    return request.param


@pytest.fixture(scope="module")
def tiny(script):
    return TINY[script.stem].split()


@pytest.fixture
def bench(script, tmp_path):
    return Bench(script, tmp_path)


@pytest.fixture(scope="module")
def reference(script, tiny, tmp_path_factory):
    """One run that nothing interrupted, with its picture; tests only read it, or copy it."""
    bench = Bench(script, tmp_path_factory.mktemp("reference"))
    bench.result = bench.run(*tiny, "--capture-video", forked=False)
    assert bench.result.code == 0, bench.result
    bench.run_dir = bench.folder / bench.result.lines[-1]
    return bench


def state(run_dir):
    return torch.load(run_dir / "checkpoint.pt", weights_only=True)


def same(a, b):
    """Whether two checkpoints, or parts of them, are equal to the last bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def learned(run_dir):
    """All of a checkpoint but the arguments: where the run lies is not what it learned."""
    return {key: value for key, value in state(run_dir).items() if key != "args"}


def events(run_dir):
    return EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()


def scalars(run_dir):
    accumulator = events(run_dir)
    return {tag: [(e.step, e.value) for e in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]}


def fingerprint(folder):
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob("*")) if path.is_file()}


def is_refused(result, *words):
    """One clear line on stderr, exit code 2, no traceback. The parser draws a frame around its line."""
    assert result.code == 2, result
    assert "Traceback" not in result.err and result.out == "", result
    lines = result.err.splitlines()
    if not lines[0].startswith("╭"):
        assert len(lines) == 1, result
    for word in words:
        assert word in result.err, result


def test_a_forked_command_is_as_one_of_its_own(tmp_path):
    show = tmp_path / "show.py"
    show.write_text(
        "import os, sys\n"
        "print(sys.argv, sys.path[0], __name__, os.getcwd(), repr(sys.stdin.read()))\n"
        "print({k: v for k, v in os.environ.items() if k != 'LC_CTYPE'})\n"  # which Python itself may set
        "print('ends with', sys.argv[1], file=sys.stderr)\n"
        "sys.exit(int(sys.argv[1])) if sys.argv[1] != 'an error' else 1 / 0\n"
    )
    (tmp_path / "folder").mkdir()
    bench = Bench(show, tmp_path / "folder")
    for end in (0, 3):
        forked = bench.run(end)
        assert forked.code == end and vars(forked) == vars(bench.run(end, forked=False))
    assert bench.run("an error").code == 1 and "Traceback" in bench.run("an error").err
    bench.script.write_text("import random, numpy\nprint(random.random(), numpy.random.rand())")
    assert not set(bench.run().out.split()) & set(bench.run().out.split())
    bench.script.write_text("while True: pass")
    with pytest.raises(AssertionError, match="longer than 1 s"):
        bench.run(timeout=1)


# ---- Training -------------------------------------------------------------------------------------------------------


def test_help_has_a_line_for_every_flag(script, bench):
    result = bench.run("--help", forked=False)
    assert result.code == 0
    args = importlib.import_module(script.stem).Args
    for field in dataclasses.fields(args):
        assert f"--{field.name.replace('_', '-')}" in result.out
    assert importlib.import_module(script.stem).__doc__.splitlines()[0] in result.out


def test_a_run_and_its_folder(script, reference):
    lines, run_dir = reference.result.lines, reference.run_dir
    assert lines[0] == f"Training in {lines[-1]}"
    args = importlib.import_module(script.stem).Args()
    name = re.escape(args.env_id.replace("/", "-")) + rf"__{script.stem}__1__\d{{8}}-\d{{6}}"
    assert re.fullmatch(f"runs/{name}", lines[-1])
    assert "Evaluation: return" in lines[-3]
    files = sorted(path.name.split(".")[0] for path in run_dir.iterdir())
    assert set(files) <= {"checkpoint", "episode", "events", "replay"} and files.count("events") == 2
    assert "100%" in reference.result.err and "steps/s" in reference.result.err and "return" in reference.result.err


def test_tags_and_values_of_a_run(tiny, reference):
    found = scalars(reference.run_dir)
    assert set(found) <= TAGS
    assert {tag for tag in TAGS if tag.startswith(("charts/episodic", "eval/episodic"))} | {"charts/SPS"} <= set(found)
    for tag, points in found.items():
        assert all(math.isfinite(value) for _, value in points), tag
        steps = [step for step, _ in points]
        assert steps == sorted(set(steps)), tag
    (_, mean), = found["eval/episodic_return"]  # fmt: skip
    assert f"return {mean:.1f} ±" in reference.result.out
    assert found["eval/episodic_return"][0][0] == state(reference.run_dir)["global_step"] >= total_timesteps(tiny)


def test_checkpoint_holds_the_arguments(script, tiny, reference):
    args = importlib.import_module(script.stem).Args
    saved = args(**state(reference.run_dir)["args"])
    assert saved.total_timesteps == total_timesteps(tiny) and saved.capture_video and saved.resume is None


def test_the_picture_opens_and_moves(script, reference):
    with Image.open(reference.run_dir / "episode.gif") as picture:
        assert picture.n_frames > 5 and min(picture.size) > 50
        frames, durations = set(), set()
        for i in range(picture.n_frames):
            picture.seek(i)
            frames.add(picture.convert("RGB").tobytes())
            durations.add(picture.info["duration"])  # several times as long where several frames are the same
        assert len(frames) > 5 and min(durations) == MILLISECONDS[script.stem]
    (image,) = events(reference.run_dir).Images("eval/episode")
    assert image.encoded_image_string == (reference.run_dir / "episode.gif").read_bytes()


def test_same_seed_same_weights_another_seed_others(script, bench, tiny, reference):
    again, other = bench.train(*tiny), bench.train(*tiny, "--seed", 2)
    assert same(learned(again), learned(reference.run_dir))
    network = NETWORK[script.stem]
    assert not same(learned(other)[network], learned(reference.run_dir)[network])
    ours, theirs = scalars(again), scalars(reference.run_dir)
    assert {**ours, "charts/SPS": None} == {**theirs, "charts/SPS": None}


@pytest.mark.slow
def test_two_runs_that_begin_together_have_two_folders(bench):
    first, second = bench.start(*TINY[bench.script.stem].split()), bench.start(*TINY[bench.script.stem].split())
    assert first.wait(120) == second.wait(120) == 0
    folders = {process.communicate()[0].splitlines()[-1] for process in (first, second)}
    assert len(folders) == 2


def test_the_bar_moves_in_a_terminal(bench, tiny):
    """A pseudo-terminal stands for the user's: the bar is drawn again and again over itself."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    command, terminal = bench.command(*tiny), {"stdout": slave, "stderr": slave}
    process = subprocess.Popen(command, cwd=bench.folder, env=bench.environment, **terminal)
    os.close(slave)
    output = b""
    try:
        while chunk := os.read(master, 65536):
            output += chunk
    except OSError:  # Linux's way to say that the other end is closed
        pass
    assert process.wait(120) == 0
    percents = [int(found) for found in re.findall(r"\r *(\d+)%\|", output.decode())]
    assert len(set(percents)) >= 3 and percents == sorted(percents) and percents[-1] == 100
    assert all(word in output.decode() for word in ("steps/s", "<", "return"))  # speed, time left, return


@pytest.mark.slow
def test_a_terminal_without_unicode_is_no_reason_to_end(bench, tiny):
    bench.environment |= {"PYTHONIOENCODING": "ascii", "PYTHONOPTIMIZE": "2"}  # the latter strips docstrings
    assert "Evaluation: return" in bench.run(*tiny, forked=False).out


@pytest.mark.slow
def test_no_standard_output_is_no_reason_to_end(bench, tiny):
    """Closed, as by some services; in a notebook, it is a stream of another kind."""
    command = ["sh", "-c", '"$@" >&-', "sh", *bench.command(*tiny)]
    result = subprocess.run(command, cwd=bench.folder, env=bench.environment, capture_output=True, text=True)
    assert result.returncode == 0 and "Traceback" not in result.stderr
    (run_dir,) = (bench.folder / "runs").iterdir()
    assert "eval/episodic_return" in scalars(run_dir)


def test_a_bar_in_a_log_file_is_short(reference):
    assert len(reference.result.err) < 2000


# ---- Resuming -------------------------------------------------------------------------------------------------------


def wait_for_checkpoints(process, run_dir, count):
    """Until so many were written, the first of them before training starts; or until the run ends."""
    seen, written = 0, None
    while seen < count and process.poll() is None:
        try:
            now = (run_dir / "checkpoint.pt").stat().st_ino
        except FileNotFoundError:
            continue
        seen, written = seen + (now != written), now


def kill_at(bench, arguments, checkpoints, pause):
    """Starts a run, lets it write so many checkpoints, waits a little, and kills it. Returns its folder."""
    process = bench.start(*arguments)
    run_dir = bench.folder / process.stdout.readline().removeprefix("Training in ").strip()
    wait_for_checkpoints(process, run_dir, checkpoints)
    time.sleep(pause)
    process.kill()
    process.communicate()
    return run_dir


@pytest.mark.parametrize(
    "checkpoints",
    ["twice"] + [pytest.param(checkpoints, marks=SLOW) for checkpoints in (1, 3, 6, "the end")],
)
def test_resume_after_a_kill_is_as_if_nothing_happened(bench, tiny, reference, checkpoints):
    pause = random.random() * 0.05
    print(f"killed {pause:.3f} s after checkpoint {checkpoints}")
    if checkpoints == "the end":
        run_dir = kill_at(bench, tiny, 10**6, pause)
    else:
        run_dir = kill_at(bench, tiny, 2 if checkpoints == "twice" else checkpoints, pause)
    (run_dir / "checkpoint.tmp").write_bytes(b"half a checkpoint")
    if checkpoints == "twice":
        kill_at(bench, ["--resume", run_dir], 3, pause)
    result = bench.run("--resume", run_dir)
    assert result.code == 0 and result.lines[-1] == str(run_dir), result
    assert same(learned(run_dir), learned(reference.run_dir))
    ours, theirs = scalars(run_dir), scalars(reference.run_dir)
    for tag in theirs.keys() - {"charts/SPS"}:
        assert sorted(set(ours[tag])) == theirs[tag], tag
        if checkpoints != "the end":  # a run that had ended evaluates once more
            assert ours[tag] == theirs[tag], tag


def test_resume_can_go_further(bench, tiny, reference):
    run_dir = shutil.copytree(reference.run_dir, bench.folder / "run")
    further = total_timesteps(tiny) + 1500
    bench.train("--resume", run_dir, "--total-timesteps", further, "--no-capture-video")
    assert state(run_dir)["global_step"] >= further
    assert state(run_dir)["args"]["total_timesteps"] == further
    assert [step for step, _ in scalars(run_dir)["eval/episodic_return"]] == [
        state(reference.run_dir)["global_step"], state(run_dir)["global_step"],
    ]  # fmt: skip


def test_checkpoints_change_the_run_only_where_they_cut_episodes(script, bench, tiny, reference):
    """Whole episodes need no cut. All other scripts begin new ones at a checkpoint, so its place is part of the run."""
    if "checkpoint_frequency" not in importlib.import_module(script.stem).HOUSEKEEPING:
        run_dir = shutil.copytree(reference.run_dir, bench.folder / "run")
        is_refused(bench.run("--resume", "run", "--checkpoint-frequency", 7), "--checkpoint-frequency")
        return
    run_dir = bench.train(*tiny, "--checkpoint-frequency", 0)
    assert same(learned(run_dir), learned(reference.run_dir))


@pytest.mark.slow
def test_a_moved_folder_resumes(bench, tiny, reference):
    run_dir = kill_at(bench, tiny, 3, 0)
    moved = run_dir.rename(bench.folder / "moved")
    bench.train("--resume", moved)
    assert same(learned(moved), learned(reference.run_dir))


def test_ctrl_c_says_how_to_go_on(bench, tiny):
    process = bench.start(*tiny, "--total-timesteps", 10**7)
    run_dir = bench.folder / process.stdout.readline().removeprefix("Training in ").strip()
    wait_for_checkpoints(process, run_dir, 2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"--resume {run_dir.relative_to(bench.folder)}" in err.splitlines()[-1] and "Traceback" not in err
    assert state(run_dir)["global_step"] > 0


def test_python_cannot_change_what_a_run_is_either(script, reference, tmp_path, capsys):
    module = importlib.import_module(script.stem)
    run_dir = shutil.copytree(reference.run_dir, tmp_path / "run")
    before = fingerprint(run_dir)
    with pytest.raises(SystemExit):
        module.train(dataclasses.replace(module.Args(**state(run_dir)["args"]), seed=7, resume=str(run_dir)))
    assert "--seed" in capsys.readouterr().err and fingerprint(run_dir) == before


def test_python_must_give_plain_values(script):
    """A checkpoint with a numpy number or a Path in it could not be read again with weights_only."""
    module = importlib.import_module(script.stem)
    for settings in ({"seed": np.int64(3)}, {"learning_rate": np.float64(0.1)}, {"runs_dir": Path("runs")}):
        with pytest.raises(ValueError, match="plain"):
            module.Args(**settings)


# ---- Evaluating -----------------------------------------------------------------------------------------------------


def test_evaluate_repeats_the_result_and_changes_nothing(bench, reference):
    run_dir = shutil.copytree(reference.run_dir, bench.folder / "run")
    before = fingerprint(run_dir)
    result = bench.run("--evaluate", run_dir, "--no-capture-video")
    assert result.code == 0, result
    (line,) = [line for line in reference.result.lines if line.startswith("Evaluation")]
    assert result.lines == [line, str(run_dir)]
    assert fingerprint(run_dir) == before
    result = bench.run("--evaluate", run_dir, "--no-capture-video", "--eval-episodes", 2)
    assert "over 2 episodes" in result.out


@pytest.mark.slow
def test_evaluate_with_a_picture(bench, reference):
    run_dir = shutil.copytree(reference.run_dir, bench.folder / "run")
    (run_dir / "episode.gif").unlink()
    result = bench.run("--evaluate", run_dir, "--capture-video")
    assert result.code == 0, result
    with Image.open(run_dir / "episode.gif") as picture:
        assert picture.n_frames > 5


# ---- TensorBoard ----------------------------------------------------------------------------------------------------


def test_tensorboard_shows_the_run(tiny, reference):
    server = subprocess.Popen(
        [sys.executable, "-m", "tensorboard.main", "--logdir", reference.folder / "runs", "--port", "0"],
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    try:
        for line in server.stderr:
            if found := re.search(r"http://\S+:(\d+)/", line):
                break
        url = f"http://localhost:{found[1]}/data/"

        def get(path, body=None):
            data, headers = body and json.dumps(body).encode(), {"Content-Type": "application/json"}
            request = urllib.request.Request(url + path, data, headers)
            return json.loads(urllib.request.urlopen(request, timeout=30).read())

        run = reference.run_dir.name
        deadline = time.monotonic() + 60
        while run not in get("runs") or "eval/episodic_return" not in get("plugin/scalars/tags").get(run, {}):
            assert time.monotonic() < deadline
            time.sleep(0.5)
        query = urllib.parse.urlencode({"run": run, "tag": "charts/episodic_return"})
        points = get(f"plugin/scalars/scalars?{query}")
        assert [(step, value) for _, step, value in points] == [
            (step, pytest.approx(value)) for step, value in scalars(reference.run_dir)["charts/episodic_return"]
        ]
        query = urllib.parse.urlencode({"run": run, "tag": "hyperparameters/text_summary"})
        assert "total_timesteps" in get(f"plugin/text/text?{query}")[0]["text"]
        assert "eval/episode" in get("plugin/images/tags")[run]
        allowed = ["STATUS_UNKNOWN", "STATUS_SUCCESS", "STATUS_FAILURE", "STATUS_RUNNING"]
        groups = get(
            "plugin/hparams/session_groups",
            {"experimentName": "", "allowedStatuses": allowed, "colParams": [], "startIndex": 0, "sliceSize": 10},
        )
        (group,) = groups["sessionGroups"]
        assert group["hparams"]["total_timesteps"] == total_timesteps(tiny)
        (metric,) = [m for m in group["metricValues"] if m["name"]["tag"] == "eval/episodic_return"]
        assert metric["value"] == pytest.approx(scalars(reference.run_dir)["eval/episodic_return"][0][1])
    finally:
        server.kill()
        server.wait()


# ---- One's own environment ------------------------------------------------------------------------------------------

OWN_MODULE = """
import gymnasium as gym
import numpy as np


class Line(gym.Env):
    '''Where am I, on a line? Action 8 is right, action 7 left; right pays. Nothing ends it but its own clock.'''
    observation_space = gym.spaces.Box(-100, 100, (1,), np.float64)
    action_space = gym.spaces.Discrete(2, start=7)

    def __init__(self, poison=False):
        self.poison = poison

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x, self.t = 0, 0
        return np.zeros(1), {}

    def step(self, action):
        self.x += 1 if action == 8 else -1
        self.t += 1
        obs = np.full(1, np.nan if self.poison and self.t == 9 else self.x / 10)
        return obs, float(action == 8), False, self.t == 20, {}


gym.register("Line-v0", entry_point=Line)
gym.register("Poison-v0", entry_point=Line, kwargs={"poison": True})
"""


PIXELS_MODULE = """
import gymnasium as gym
import numpy as np


class Line(gym.Env):
    '''The same line, for those who see: a white column where I am. Action 1 is right, action 0 left; right pays.'''
    observation_space = gym.spaces.Box(0, 255, (4, 84, 84), np.uint8)
    action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x, self.t, self.frames = 42, 0, np.zeros((4, 84, 84), np.uint8)
        return self.draw(), {}

    def draw(self):
        frame = np.zeros((1, 84, 84), np.uint8)
        frame[:, :, self.x] = 255
        self.frames = np.concatenate([self.frames[1:], frame])
        return self.frames

    def step(self, action):
        self.x += 1 if action == 1 else -1
        self.t += 1
        return self.draw(), float(action == 1), False, self.t == 20, {}


gym.register("Line-v0", entry_point=Line)
"""

CONTINUOUS_MODULE = OWN_MODULE.replace("gym.spaces.Discrete(2, start=7)", "gym.spaces.Box(-2, 1, (1,))").replace(
    "action == 8", "action[0] > 0"
)

# The module, and what it takes to learn to go right.
OWN = {
    "reinforce_cartpole": (OWN_MODULE, "--total-timesteps 20000 --eval-episodes 3"),
    "dqn_cartpole": (OWN_MODULE, "--total-timesteps 8000 --eval-episodes 3"),
    "dqn_atari": (
        PIXELS_MODULE,
        "--total-timesteps 2000 --eval-episodes 3 --learning-starts 200 --buffer-size 2000 --learning-rate 1e-3 "
        "--batch-size 8 --exploration-fraction 0.5 --target-network-frequency 100 --gamma 0.5 --eval-epsilon 0 "
        "--num-threads 1",
    ),
    "ppo_cartpole": (OWN_MODULE, "--total-timesteps 20000 --eval-episodes 3"),
    "ppo_continuous": (
        CONTINUOUS_MODULE, "--total-timesteps 20000 --eval-episodes 3 --num-steps 64 --num-minibatches 4"
    ),
    "ppo_atari": (
        PIXELS_MODULE,
        "--total-timesteps 3000 --eval-episodes 3 --learning-rate 1e-3 --num-steps 16 --gamma 0.5 --ent-coef 0 "
        "--num-threads 1",
    ),
}
# Scripts whose observations can be NaN; uint8 cannot.
FLOATS = {"reinforce_cartpole", "dqn_cartpole", "ppo_cartpole", "ppo_continuous"}
# And those that draw what the network sees, so that there is nothing to ask the environment for.
PIXELS = {"dqn_atari", "ppo_atari"}


def test_own_environment_in_the_current_folder(script, bench):
    module, flags = OWN[script.stem]
    (bench.folder / "my_module.py").write_text(module)
    result = bench.run("--env-id", "my_module:Line-v0", *flags.split())
    assert result.code == 0, result
    assert "return 20.0 ± 0.0" in result.out
    assert result.lines[-1].startswith("runs/my_module-Line-v0__")


CANNOT_BE_DRAWN = {
    "no mode": ("pass", "[]", "no render mode"),
    "grey": ("return np.zeros((9, 9, 1), np.uint8)", "['rgb_array']", "(H, W, 3)"),
    "flat": ("return np.zeros((9, 9), np.uint8)", "['rgb_array']", "(H, W, 3)"),
    "numbers": ("return np.zeros((9, 9, 3))", "['rgb_array']", "uint8"),
    "nothing": ("return None", "['rgb_array']", "(H, W, 3)"),
    "no library": ("raise RuntimeError('no OpenGL')", "['rgb_array']", "no OpenGL"),
}


@pytest.mark.parametrize("way", CANNOT_BE_DRAWN)
def test_own_environment_that_cannot_be_drawn(script, bench, way):
    if script.stem in PIXELS:
        pytest.skip("draws what the network sees")
    if script.stem != QUICKEST and way not in ("no mode", "no library"):
        pytest.skip("the code is the same in all")
    body, modes, words = CANNOT_BE_DRAWN[way]
    module = OWN[script.stem][0].replace("poison=False", "poison=False, render_mode=None")
    drawing = f"    metadata = {{'render_modes': {modes}}}\n\n    def render(self):\n        {body}\n\n"
    module = module.replace("    def reset", drawing + "    def reset", 1)
    (bench.folder / "my_module.py").write_text(module)
    result = bench.run("--env-id", "my_module:Line-v0", "--capture-video")
    is_refused(without_warnings(result), "--capture-video", words)
    assert not (bench.folder / "runs").exists()


def without_warnings(result):
    """Gymnasium warns, on lines of its own, about what it finds odd in an environment."""
    result.err = "\n".join(line for line in result.err.splitlines() if "WARN" not in line and "logger" not in line)
    return result


def test_resume_is_exact_where_an_environment_remembers(script, bench, tiny):
    """BipedalWalker, for example, keeps its world when it is reset. Here it is the number of the episode that shows.

    In every second one, it is left that pays, so that no policy is ever content, and learns no more.
    """
    module = OWN[script.stem][0].replace("super().reset(seed=seed)", "self.number = getattr(self, 'number', 0) + 1")
    module = module.replace("self.x / 10", "self.x / 10 * self.number").replace("= 255", "= min(255, 5 * self.number)")
    module = re.sub(r"float\((action.*?)\), False", r"float((\1) == self.number % 2), False", module)
    assert module.count("self.number") == 3
    (bench.folder / "my_module.py").write_text(module)
    steps = total_timesteps(tiny) * (5 if script.stem == QUICKEST else 1)  # not at its end before it is killed
    arguments = "--env-id", "my_module:Line-v0", *tiny, "--total-timesteps", steps
    whole, run_dir = bench.train(*arguments), kill_at(bench, arguments, 3, 0)
    bench.train("--resume", run_dir)
    assert same(learned(run_dir), learned(whole))


# ---- NaN ------------------------------------------------------------------------------------------------------------


def stops_with_a_finite_checkpoint(bench, *arguments):
    network = NETWORK[bench.script.stem]
    process = bench.run(*arguments)
    assert process.code == 1 and "Traceback" not in process.err, process
    last = process.err.splitlines()[-1]
    assert re.search(r"step \d+: .* finite", last), process
    run_dir = bench.folder / process.lines[0].removeprefix("Training in ")
    assert str(run_dir.relative_to(bench.folder)) in last
    assert all(weights.isfinite().all() for weights in state(run_dir)[network].values())
    return last


def test_diverging_weights_stop_the_run(script, bench):
    assert "--learning-rate" in stops_with_a_finite_checkpoint(bench, *DIVERGES[script.stem].split())


def test_an_observation_that_is_nan_stops_the_run(script, bench):
    if script.stem not in FLOATS:
        pytest.skip("its observations are whole numbers")
    (bench.folder / "my_module.py").write_text(OWN[script.stem][0])
    assert "observation" in stops_with_a_finite_checkpoint(bench, "--env-id", "my_module:Poison-v0")


# ---- Bad input ------------------------------------------------------------------------------------------------------


BAD_ARGUMENTS = [
    ("--env-id CartPoll-v1", "CartPole"),  # names the nearest
    ("--env-id CartPole-v7", "v1"),
    ("--env-id no_such_module:Env-v0", "no_such_module"),
    ("--env-id nonsense", "nonsense"),
    ("--seed -1", "--seed"),
    ("--seed 18446744073709551616", "--seed"),
    ("--seed one", "--seed"),
    ("--total-timesteps 0", "--total-timesteps"),
    ("--total-timesteps 1e5", "--total-timesteps"),
    ("--checkpoint-frequency -5", "--checkpoint-frequency"),
    ("--eval-episodes 0", "--eval-episodes"),
    ("--learning-rate 0", "--learning-rate"),
    ("--learning-rate -0.1", "--learning-rate"),
    ("--learning-rate nan", "--learning-rate"),
    ("--learning-rate inf", "--learning-rate"),
    ("--gamma 1.5", "--gamma"),
    ("--gamma nan", "--gamma"),
    ("--device tpu", "--device"),
    ("--no-such-flag 3", "--no-such-flag"),
    ("--total-timestep 5", "--total-timesteps"),  # names the nearest
    ("--seed", "--seed"),
    ("stray", "stray"),
    ("--resume a --evaluate b", "--evaluate"),
    ("--resume nowhere", "nowhere"),
    ("--resume=", "checkpoint.pt"),  # an empty variable of the shell
    ("--evaluate=", "checkpoint.pt"),
    ("--resume .", "checkpoint.pt"),
    ("--seed 1.5", "--seed"),
    ("--no-capture-video true", "true"),
    ("--env-id :", ":"),
    ("--env-id a:b:c", "a:b:c"),
    ("--evaluate nowhere", "nowhere"),
    ("--exp-name", "--exp-name"),
    ("--resume", "--resume"),
]


REPLAY = [
    ("--start-e 1.5", "--start-e"),
    ("--end-e -0.1", "--end-e"),
    ("--exploration-fraction 2", "--exploration-fraction"),
    ("--tau 0", "--tau"),
    ("--tau 1.1", "--tau"),
    ("--batch-size 0", "--batch-size"),
    ("--num-envs 0", "--num-envs"),
    ("--train-frequency 0", "--train-frequency"),
    ("--target-network-frequency 0", "--target-network-frequency"),
    ("--learning-starts -1", "--learning-starts"),
    ("--learning-starts 100000000 --buffer-size 200000000", "--total-timesteps"),
    ("--buffer-size 10 --learning-starts 200", "--buffer-size"),
    ("--learning-starts 5", "--learning-starts"),
]
PPO = [
    ("--num-envs 0", "--num-envs"),
    ("--num-steps 0", "--num-steps"),
    ("--num-minibatches 0", "--num-minibatches"),
    ("--num-minibatches 100000", "--num-minibatches"),  # one step each, or none
    ("--update-epochs 0", "--update-epochs"),
    ("--gae-lambda 1.1", "--gae-lambda"),
    ("--clip-coef 0", "--clip-coef"),
    ("--ent-coef -1", "--ent-coef"),
    ("--vf-coef nan", "--vf-coef"),
    ("--max-grad-norm 0", "--max-grad-norm"),
    ("--target-kl 0", "--target-kl"),
    ("--target-kl soon", "--target-kl"),
]
OWN_BAD_ARGUMENTS = {
    "reinforce_cartpole": [("--episodes-per-update 0", "--episodes-per-update")],
    "dqn_cartpole": [
        *REPLAY,
        ("--hidden-size 0", "--hidden-size"),
        ("--hidden-size 1000000", "not enough memory"),
        ("--buffer-size 1000000000000", "--buffer-size"),
    ],
    "dqn_atari": [
        *REPLAY,
        ("--env-id ALE/Breakot-v5", "Breakout"),  # names the nearest
        ("--env-id ALE/Combat-v5", "Combat"),  # two players
        ("--env-id Breakout-v5", "Breakout"),
        ("--env-id ALE/Breakout-v9", "v5"),
        ("--sticky-actions 2", "--sticky-actions"),
        ("--eval-epsilon -1", "--eval-epsilon"),
        ("--adam-epsilon 0", "--adam-epsilon"),
        ("--max-grad-norm 0", "--max-grad-norm"),
        ("--max-grad-norm nan", "--max-grad-norm"),
        ("--num-threads -1", "--num-threads"),
        ("--precision float16", "--precision"),
        ("--loss hubert", "huber"),
        ("--buffer-size 1000000000000", "--buffer-size"),  # 7 million gigabytes
    ],
    "ppo_cartpole": PPO,
    "ppo_continuous": PPO,
    "ppo_atari": [
        *PPO,
        ("--num-steps 100000000", "not enough memory"),
        ("--env-id ALE/Breakot-v5", "Breakout"),  # names the nearest
        ("--env-id ALE/Combat-v5", "Combat"),  # two players
        ("--sticky-actions 2", "--sticky-actions"),
        ("--num-threads -1", "--num-threads"),
        ("--precision float16", "--precision"),
    ],
}


@pytest.mark.parametrize(
    "case, arguments, word",
    [
        pytest.param(script, *bad, marks=marks(script))
        for script in SCRIPTS
        for bad in BAD_ARGUMENTS + OWN_BAD_ARGUMENTS[script.stem]
    ],
    ids=lambda value: getattr(value, "stem", value),
)
def test_bad_arguments_are_refused(tmp_path, case, arguments, word):
    is_refused(Bench(case, tmp_path).run(*arguments.split()), word)
    assert [path.name for path in tmp_path.iterdir()] == [case.name]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device")
def test_a_missing_device_is_refused(bench, reference):
    is_refused(bench.run("--device", "cuda"), "cuda")
    is_refused(bench.run("--evaluate", reference.run_dir, "--device", "cuda"), "cuda")


def test_wrong_spaces_are_refused(script, bench):
    for env_id in WRONG_SPACES[script.stem]:
        is_refused(bench.run("--env-id", env_id), "needs a", env_id)
    assert not (bench.folder / "runs").exists()


def test_a_missing_extra_is_named(script, bench):
    (bench.folder / "mujoco.py").write_text("raise ImportError('hidden by the test')")
    (bench.folder / "pygame.py").write_text("raise ImportError('hidden by the test')")
    is_refused(bench.run("--env-id", "HalfCheetah-v5"), "gymnasium[mujoco]")
    if script.stem not in PIXELS:
        is_refused(bench.run("--capture-video"), "gymnasium[classic")  # -control or _control


@pytest.mark.parametrize(
    "place",
    ["a_file"]
    + [pytest.param(p, marks=SLOW) for p in ("a_file/runs", "x" * 300, "/proc/runs", "dangling", "dangling/runs")],
)
def test_an_unwritable_runs_folder_is_refused(bench, place):
    (bench.folder / "a_file").write_text("mine")
    (bench.folder / "dangling").symlink_to("a_disk_that_is_not_mounted")
    is_refused(bench.run("--runs-dir", place), place.split("/")[0] or "/proc")
    assert (bench.folder / "a_file").read_text() == "mine"


def foreign_checkpoints(reference):
    whole = (reference.run_dir / "checkpoint.pt").read_bytes()
    other, network = state(reference.run_dir), NETWORK[reference.script.stem]
    yield "empty", b""
    yield "first half", whole[: len(whole) // 2]
    yield "last byte missing", whole[:-1]
    yield "text", b"these are not the weights you are looking for"
    yield "a pickle that runs code", b"cos\nsystem\n(S'touch pwned'\ntR."
    for name, value in (
        ("a tensor", torch.zeros(3)),
        ("another program's", {"model": torch.zeros(3)}),
        ("another script's", other | {"script": "another_script"}),
        ("unknown arguments", other | {"args": other["args"] | {"unknown": 1}}),
        ("impossible arguments", other | {"args": other["args"] | {"gamma": 7.0}}),
        ("no weights", {key: value for key, value in other.items() if key != network}),
        ("weights of another shape", other | {network: {k: w[:1] if w.dim() else w for k, w in other[network].items()}}),
    ):
        file = reference.folder / "made_up.pt"
        torch.save(value, file)
        yield name, file.read_bytes()
        file.unlink()


@pytest.mark.slow
def test_a_checkpoint_that_is_none_of_ours_is_refused(bench, reference):
    for name, content in foreign_checkpoints(reference):
        run_dir = bench.folder / name.replace(" ", "_")
        run_dir.mkdir()
        (run_dir / "checkpoint.pt").write_bytes(content)
        before = fingerprint(bench.folder)
        flag = random.choice(["--resume", "--evaluate"])
        is_refused(bench.run(flag, run_dir.name, "--no-capture-video"), run_dir.name)
        assert fingerprint(bench.folder) == before, name


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["--resume", "--evaluate"])
def test_what_a_run_is_cannot_be_changed(bench, reference, flag):
    shutil.copytree(reference.run_dir, bench.folder / "run")
    before = fingerprint(bench.folder)
    others = {"atari": "ALE/Pong-v5", "cartpole": "Acrobot-v1", "continuous": "MountainCarContinuous-v0"}
    env_id = others[reference.script.stem.split("_")[1]]
    for change in ("--seed 2", "--learning-rate 0.5", f"--env-id {env_id}", "--total-timesteps 100", "--exp-name x"):
        is_refused(bench.run(flag, "run", *change.split()), change.split()[0])
    assert fingerprint(bench.folder) == before


def test_a_run_folder_that_is_a_file_is_refused(bench):
    is_refused(bench.run("--resume", bench.script.name), bench.script.name)


# ---- The repository as a whole --------------------------------------------------------------------------------------


def test_all_scripts_are_covered():
    for table in (TINY, NETWORK, WRONG_SPACES, DIVERGES, OWN, OWN_BAD_ARGUMENTS):
        assert set(table) == {path.stem for path in SCRIPTS}


def test_scripts_run_from_the_top_of_the_repository(tmp_path):
    for script in SCRIPTS:
        result = subprocess.run([sys.executable, script.relative_to(ROOT), "--help"], cwd=ROOT, capture_output=True)
        assert result.returncode == 0
