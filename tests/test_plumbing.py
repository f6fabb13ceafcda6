"""What is the same text in all scripts, tried with one of them, in the ways in which it could fail.

How environments misbehave stands in cases.py, with what should happen then.
"""

import dataclasses
import errno
import fcntl
import importlib
import json
import math
import os
import platform
import pty
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
import typing
from pathlib import Path

import cases
import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import (
    NAMES, Bench, curves, description, events, fingerprint, first, is_refused, learned, path_of,
    same, state,
)  # fmt: skip
from PIL import Image

SCRIPT = first()
MODULE = importlib.import_module(SCRIPT)
TINY = description(SCRIPT).TINY
SLOW = pytest.mark.slow


@pytest.fixture
def bench(tmp_path):
    return Bench(SCRIPT, tmp_path, cases=True)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The folder of a run. Tests only read it, or copy it."""
    return Bench(SCRIPT, tmp_path_factory.mktemp("reference")).train(TINY)


@pytest.fixture
def run_dir(bench, reference):
    """A copy of it: the folder `run` beside the script."""
    return shutil.copytree(reference, bench.folder / "run")


def train(tmp_path, **settings):
    """From Python, with few steps."""
    few = {"total_timesteps": 400, "num_envs": 2, "eval_episodes": 2, "runs_dir": str(tmp_path)}
    return MODULE.train(MODULE.Args(**few | settings))


# ---- Bad input -----------------------------------------------------------------------------------


BAD = [
    ("--env-id CartPoll-v1", "CartPole"),  # names the nearest
    ("--env-id CartPole-v7", "v1"),
    ("--env-id no_such_module:Env-v0", "no_such_module"),
    ("--env-id nonsense", "nonsense"),
    ("--env-id .:CartPole-v1", ".:CartPole-v1"),
    ("--env-id a..b:CartPole-v1", "a..b"),
    ("--env-id os.:CartPole-v1", "os."),
    ("--env-id :", ":"),
    ("--env-id a:b:c", "a:b:c"),
    ("--env-id=", "''"),
    ("--env-id 'two words'", "two words"),
    ("--env-id \udcff:CartPole-v1", "--env-id"),  # bytes that are not UTF-8
    ("--exp-name \udcff", "--exp-name"),
    ("--runs-dir \udcff", "--runs-dir"),
    ("--env-kwargs '{'", "--env-kwargs"),
    ("--env-kwargs [1]", "[1]"),
    ("--env-kwargs 3", "3"),
    ("""--env-kwargs '{"no_such": 1}'""", "no_such"),
    ("--seed -1", "--seed"),
    ("--seed 18446744073709551616", "--seed"),
    ("--seed one", "--seed"),
    ("--seed 1.5", "--seed"),
    ("--seed", "--seed"),
    ("--total-timesteps 0", "--total-timesteps"),
    ("--total-timesteps 1e13", "--total-timesteps"),
    ("--total-timesteps 1e-3", "--total-timesteps"),
    ("--num-envs 0", "--num-envs"),
    ("--num-envs 1e12", "--num-envs"),
    ("--num-threads 1000000", "--num-threads"),
    ("--num-threads -1", "--num-threads"),
    ("--eval-episodes 0", "--eval-episodes"),
    ("--eval-episodes 1e400", "--eval-episodes"),
    ("--eval-episodes=1e400", "--eval-episodes"),
    ("--eval-frequency -1", "--eval-frequency"),
    ("--checkpoint-frequency -5", "--checkpoint-frequency"),
    ("--learning-rate 0", "--learning-rate"),
    ("--learning-rate nan", "--learning-rate"),
    ("--learning-rate inf", "--learning-rate"),
    ("--gamma 1.5", "--gamma"),
    ("--device tpu", "tpu"),
    ("--device meta", "meta"),
    ("--no-such-flag 3", "--no-such-flag"),
    ("--total-timestep 5", "--total-timesteps"),  # names the nearest
    ("--no-capture-video true", "true"),
    ("stray", "stray"),
    ("--exp-name", "--exp-name"),
    ("--resume a --evaluate b", "--evaluate"),
    ("--resume", "--resume"),
    ("--resume nowhere", "nowhere"),
    ("--resume=", "checkpoint.pt"),  # an empty variable of the shell
    ("--resume .", "checkpoint.pt"),
    ("--resume \udcff", "checkpoint"),
    (f"--resume {SCRIPT}.py", SCRIPT),
    ("--evaluate nowhere", "nowhere"),
    ("--evaluate=", "checkpoint.pt"),
]


@pytest.mark.parametrize("arguments, word", BAD)
def test_bad_arguments_are_refused(bench, arguments, word):
    is_refused(bench.run(arguments), word)
    assert not (bench.folder / "runs").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device")
def test_a_missing_device_is_refused(bench, run_dir):
    is_refused(bench.run("--device cuda"), "--device")
    is_refused(bench.run("--evaluate run --device cuda:7"), "--device")


PLACES = ["a_file", "a_file/runs", "x" * 300, "/proc/runs", "dangling/runs"]


def test_without_a_compiler_compile_is_refused(bench):
    bench.environment |= {"PATH": "", "TORCHINDUCTOR_CACHE_DIR": str(bench.folder / "cache")}
    is_refused(bench.run("--compile"), "--compile needs PyTorch 2.13 and a C++ compiler")
    assert not list(bench.folder.glob("runs/*/checkpoint.pt"))


@pytest.mark.parametrize("place", PLACES)
def test_a_folder_that_cannot_be_written_is_refused(bench, place):
    (bench.folder / "a_file").write_text("mine")
    (bench.folder / "dangling").symlink_to("/proc/a_disk_that_is_not_mounted")
    is_refused(bench.run(f"--runs-dir {place}"), "cannot write", place.split("/")[0] or "/proc")
    assert (bench.folder / "a_file").read_text() == "mine"


def bounds(hint):
    """(type, lowest, highest) of an annotation; also of one that may be None."""
    for part in (hint, *typing.get_args(hint)):
        if hasattr(part, "__metadata__"):
            return part.__origin__, *part.__metadata__


@pytest.mark.parametrize("script", NAMES)
def test_arguments_keep_their_bounds(script):
    """Every number in every script, from Python; only plain values, which a checkpoint can hold."""
    args = importlib.import_module(script).Args
    for name, hint in typing.get_type_hints(args, include_extras=True).items():
        default = getattr(args(), name)
        if isinstance(default, int | float) and not isinstance(default, bool):
            kind, low, high = bounds(hint)
            less = low * 2 if low < 0 else -1e-30
            wrong = [low - 1, high + 1] if kind is int else [math.nan, math.inf, less, high * 2]
            for value in [*wrong, str(default), np.float64(default), torch.tensor(default)]:
                with pytest.raises(ValueError, match=f"--{name.replace('_', '-')}"):
                    args(**{name: value})
    with pytest.raises(ValueError, match="--runs-dir"):
        args(runs_dir=Path("runs"))
    for name, value in {"capture_video": 1, "exp_name": None, "seed": "1"}.items():
        with pytest.raises(ValueError, match=f"--{name.replace('_', '-')}"):
            args(**{name: value})


# ---- Environments --------------------------------------------------------------------------------


def run_case(bench, case, flags="", code=0):
    ended = bench.run(f"{TINY} --env-id cases:{case}-v0 {flags}")
    assert ended.code == code, ended
    return ended


def result(bench, ended):
    return json.loads((bench.folder / ended.lines[-1] / "result.json").read_text())


@pytest.mark.parametrize(
    "case", ["Line", "Square", "Parts", "RewardArray", pytest.param("Endless", marks=SLOW)]
)
def test_environments_that_run(bench, case):
    limit = {"Endless": MODULE.MAX_EPISODE_STEPS}.get(case, 20)
    flags = "--total-timesteps 10000 --eval-frequency 0" if case == "Endless" else ""
    ended = run_case(bench, case, flags)
    assert result(bench, ended)["episodic_length"] == limit and "Warning" not in ended.err


@SLOW
@pytest.mark.parametrize("env_id", ["FrozenLake-v1", "Taxi-v4", "Blackjack-v1"])
def test_observations_that_are_no_vectors(bench, env_id):
    run_dir = bench.train(f"{TINY} --env-id {env_id} --eval-frequency 0")
    env, policy = gym.make(env_id), MODULE.load_policy(run_dir)
    obs, _ = env.reset(seed=1)
    assert env.action_space.contains(policy(obs))


def test_arguments_of_the_environment(bench):
    ended = run_case(bench, "Paid", """--env-kwargs '{"pay": 3.5}'""")
    assert (
        result(bench, ended)["episodic_return"] % 3.5 == 0 < result(bench, ended)["episodic_return"]
    )
    is_refused(bench.run("--env-id cases:Paid-v0 --env-kwargs '{}x'"), "--env-kwargs")


def test_what_the_best_policy_is_does_not_depend_on_the_shape_of_a_flag(bench):
    """`terminated` as an array of one number, with one environment and with several."""
    flags = f"--env-id cases:TerminatedArray-v0 {description(SCRIPT).OWN_FLAGS} --eval-episodes 2"
    folder = bench.train(flags)
    assert json.loads((folder / "result.json").read_text())["episodic_return"] == pytest.approx(0.6)


def test_load_policy_plays_as_the_evaluation(bench, reference):
    """Episode k of environment i begins with the seed that is made from (EVALUATION, i, k)."""
    args = MODULE.Args(**state(reference)["args"])
    policy, env, returns = MODULE.load_policy(reference), gym.make(args.env_id), []
    for i in range(args.num_envs):
        for k in range(len(range(i, args.eval_episodes, args.num_envs))):
            sequence = np.random.SeedSequence(args.seed, spawn_key=(MODULE.EVALUATION, i, k))
            obs, _ = env.reset(seed=int(sequence.generate_state(1)[0]))
            total, end = 0, False
            while not end:
                obs, reward, terminated, truncated, _ = env.step(policy(obs))
                total, end = total + reward, terminated or truncated
            returns.append(total)
    assert (
        np.mean(returns) == json.loads((reference / "result.json").read_text())["episodic_return"]
    )


@pytest.mark.parametrize("reward", [[1.0, 2.0], [], np.ones((2, 1))])
def test_a_reward_that_is_not_one_number_is_refused(monkeypatch, reward):
    """As that of a game of several agents."""
    step = cases.Line.step
    monkeypatch.setattr(
        cases.Line, "step", lambda env, action: (step(env, action)[0], reward, False, False, {})
    )
    envs = MODULE.Envs(MODULE.Args(env_id="cases:Line-v0"), 2, MODULE.TRAINING)
    envs.reset()
    with pytest.raises(MODULE.UsageError, match="not one number"):
        envs.step(np.array([0, 1]))


def test_episodes_have_seeds_of_their_own(monkeypatch):
    """Training and evaluation, environments, episodes, runs: no two have a seed in common."""
    seeds = []
    reset = cases.Line.reset
    monkeypatch.setattr(
        cases.Line, "reset", lambda env, seed, **_: seeds.append(seed) or reset(env, seed=seed)
    )
    for seed in (1, 2):
        for stream in (MODULE.TRAINING, MODULE.EVALUATION):
            envs = MODULE.Envs(MODULE.Args(env_id="cases:Line-v0", seed=seed), 3, stream)
            envs.reset()
            for _ in range(41):
                envs.step(np.array([0, 1, 1]))
    assert len(seeds) == len(set(seeds)) == 2 * 2 * 3 * 3


@pytest.mark.parametrize("env_id", ["CartPole-v1", "FrozenLake-v1", "cases:Line-v0"])
def test_episodes_go_on_where_they_were_saved(tmp_path, env_id):
    """In the middle of episodes: what follows is the same, returns and lengths included."""
    args, actions = MODULE.Args(env_id=env_id), np.random.default_rng(0)

    def play(envs, actions):
        rows = [envs.step(a) for a in actions]
        return [np.stack(column) for column in zip(*rows)], envs.obs.copy(), list(envs.finished)

    whole, first = (MODULE.Envs(args, 3, MODULE.TRAINING) for _ in range(2))
    actions = actions.integers(whole.action_space.n, size=(120, 3))
    for envs in (whole, first):
        envs.reset()
        play(envs, actions[:55])
        envs.finished.clear()
    torch.save(first.state_dict(), tmp_path / "state")
    resumed = MODULE.Envs(args, 3, MODULE.TRAINING)
    resumed.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    resumed.reset()
    assert resumed.steps == 3 * 55
    for ours, theirs in zip(play(resumed, actions[55:])[0], play(whole, actions[55:])[0]):
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(resumed.obs, whole.obs)
    assert resumed.finished == whole.finished and len(whole.finished) >= 6


def test_environments_are_made_once_and_closed_before_the_evaluation(tmp_path, monkeypatch):
    for name in ("made", "closed", "most_open"):
        monkeypatch.setattr(cases.Line, name, 0)
    train(tmp_path, env_id="cases:Line-v0", num_envs=3, checkpoint_frequency=50)
    assert (cases.Line.made, cases.Line.closed, cases.Line.most_open) == (3 + 2, 5, 3)


def test_a_simulator_behind_one_port(bench):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        bench.environment["CASE_PORT"] = str(free.getsockname()[1])
    run_case(bench, "Port", "--num-envs 1 --eval-frequency 0 " + ONE_ENVIRONMENT)


ONE_ENVIRONMENT = "--no-normalize-returns" if hasattr(MODULE.Args(), "normalize_returns") else ""


def test_an_object_lives_as_long_as_the_training(tmp_path, monkeypatch):
    """A curriculum that counts its own steps goes on counting."""
    most, step = [0], cases.Line.step
    monkeypatch.setattr(
        cases.Line, "step", lambda env, action: most.append(env.total + 1) or step(env, action)
    )
    train(tmp_path, env_id="cases:Line-v0", checkpoint_frequency=50)
    assert max(most) >= 200  # of 400 steps, in two environments


def test_long_episodes_end_and_are_logged(bench):
    """Longer than it takes to the next checkpoint, in eight environments."""
    flags = "--num-envs 8 --checkpoint-frequency 1000 --total-timesteps 40000 --eval-frequency 0"
    folder = bench.folder / run_case(bench, "Long", flags + " --eval-episodes 1").lines[-1]
    points = curves(folder)["charts/episodic_length"]
    assert len(points) >= 8 and {value for _, value in points} == {4000}


def test_every_episode_is_logged_at_the_step_that_ended_it(tmp_path):
    """Of two environments, which end one after the other, once in 40 steps."""
    result = train(tmp_path, env_id="cases:Line-v0")
    steps = [step for step, _ in curves(Path(result.folder))["charts/episodic_length"]]
    assert steps == [step for step in range(result.steps + 1) if step % 40 in (39, 0) and step > 0]


@SLOW
def test_an_episode_that_cannot_be_repeated(bench):
    """One warning, and the run goes on."""
    process = bench.start(f"{TINY} --env-id cases:Remembers-v0 --total-timesteps 20000")
    folder = bench.folder / process.stdout.readline().removeprefix("Training in ").strip()
    wait_for(folder, process, 3)
    process.kill()
    process.communicate()
    ended = bench.run(f"--resume {folder}")
    assert ended.code == 0 and ended.err.count("Warning") == 1, ended
    assert "not exactly" in ended.err and "Traceback" not in ended.err


@pytest.mark.parametrize("what", ['{"reward": "nan"}', '{"reward": "inf"}', '{"obs": "nan"}'])
def test_what_is_not_finite_stops_the_run(bench, what):
    """The message says what it was. The checkpoint is good: the run goes on to the same place."""
    ended = run_case(bench, "NotFinite", f"--checkpoint-frequency 100 --env-kwargs '{what}'", 2)
    folder = ended.lines[0].removeprefix("Training in ")
    for ended in (ended, bench.run(f"--resume {folder}")):
        assert (
            "Traceback" not in ended.err and "observation or a reward" in ended.err.splitlines()[-1]
        )
    assert state(bench.folder / folder)["envs"]["steps"] >= 100
    assert all(
        weights.isfinite().all() for weights in state(bench.folder / folder)["network"].values()
    )


def test_an_error_of_the_environment_keeps_its_traceback(bench):
    """The last lines say the step, and the command that goes on: to the same weights and curves."""
    flags = "--checkpoint-frequency 250 --eval-frequency 0"
    ended = run_case(bench, "Disconnects", flags, 1)
    assert "in step" in ended.err and "ConnectionResetError: [Errno 104]" in ended.err
    step, command = ended.err.splitlines()[-2:]
    found = re.fullmatch(
        r"Stopped at step (6\d\d)\. To go on from the checkpoint of step (5\d\d):", step
    )
    folder = bench.folder / ended.lines[0].removeprefix("Training in ")
    assert int(found[2]) == state(folder)["envs"]["steps"]
    assert max(points[-1][0] for points in curves(folder).values()) > int(found[2])
    (bench.folder / "mended").touch()
    time.sleep(1)  # TensorBoard orders the files of a run by the second of their beginning
    ended = bench.run(command.removeprefix(f"python {SCRIPT}.py "))
    assert ended.code == 0, ended
    whole = bench.folder / run_case(bench, "Disconnects", flags).lines[-1]
    assert same(learned(folder), learned(whole)) and curves(folder) == curves(whole)
    ended = run_case(bench, "NoWindow", "", 1)
    assert "RuntimeError: could not allocate a window: no display" in ended.err.splitlines()
    assert "not enough memory" not in ended.err and "--resume" in ended.err.splitlines()[-1]


@pytest.mark.parametrize(
    "case, flags", [("Rich", ""), ("NotFinite", """{"reward": "nan"}"""), ("NoWindow", "")]
)
def test_what_fails_leaves_nothing_open(tmp_path, monkeypatch, case, flags):
    """One trial of a search, from Python: no thread, writer, lock or environment stays."""
    for name in ("made", "closed"):
        monkeypatch.setattr(getattr(cases, case), name, 0, raising=False)
    before, handler = set(threading.enumerate()), signal.getsignal(signal.SIGINT)
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell may have set it to be ignored
    with pytest.raises(RuntimeError if case == "NoWindow" else ValueError):
        train(tmp_path, env_id=f"cases:{case}-v0", env_kwargs=flags or "{}", total_timesteps=2000)
    assert all("TMonitor" in repr(thread) for thread in set(threading.enumerate()) - before)
    assert getattr(cases, case).made == getattr(cases, case).closed > 0
    assert signal.signal(signal.SIGINT, handler) is signal.default_int_handler
    assert not [
        link for link in Path("/proc/self/fd").iterdir() if str(tmp_path) in os.path.realpath(link)
    ]


def test_a_missing_extra_is_named(bench):
    for package in ("mujoco", "pygame"):
        (bench.folder / f"{package}.py").write_text("raise ImportError('hidden by the test')")
    is_refused(bench.run("--env-id HalfCheetah-v5"), "gymnasium[mujoco]")
    is_refused(bench.run("--capture-video"), "gymnasium[classic")  # -control or _control


# ---- Resuming ------------------------------------------------------------------------------------


def wait_for(folder, process, count):
    """Until so many checkpoints were written, the first of them before the training."""
    seen, last = 0, None
    while seen < count and process.poll() is None:
        path = folder / "checkpoint.pt"
        now = path.stat().st_ino if path.exists() else last
        seen, last = seen + (now != last), now
    assert process.poll() is None, process.communicate()


LONGER = f"{TINY} --total-timesteps 12000 --eval-frequency 0"  # does not end before it is stopped


@pytest.fixture(scope="module")
def longer(tmp_path_factory):
    return Bench(SCRIPT, tmp_path_factory.mktemp("longer")).train(LONGER)


def start(bench, arguments, checkpoints):
    """A process, and its folder, once it has written so many checkpoints."""
    process = bench.start(arguments)
    folder = bench.folder / process.stdout.readline().removeprefix("Training in ").strip()
    wait_for(folder, process, checkpoints)
    return process, folder


@SLOW
def test_kill_9_moved_and_resumed(bench, longer):
    """Killed twice, in a folder that has another name since."""
    process, folder = start(bench, LONGER, 3)
    process.kill()
    process.communicate()
    folder = folder.rename(bench.folder / "moved")
    (folder / "checkpoint.tmp").write_bytes(b"half a checkpoint")
    process, folder = start(bench, "--resume moved", 0)
    wait_for(folder, process, 4)
    process.kill()
    process.communicate()
    bench.train("--resume moved")
    assert same(learned(folder), learned(longer)) and not (folder / "checkpoint.tmp").exists()


def test_ctrl_c_saves_and_prints_the_command_that_goes_on(bench, longer):
    """It saves at the step where it is, not at the next checkpoint."""
    process, folder = start(bench, f"{LONGER} --checkpoint-frequency 0", 1)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err, err
    step, command = err.splitlines()[-2:]
    saved = state(folder)["envs"]["steps"]
    assert 0 < saved < 12000
    assert step == f"Stopped at step {saved}. To go on from the checkpoint of step {saved}:"
    assert command == f"python {SCRIPT}.py --resume {folder.relative_to(bench.folder)}"
    ended = bench.run(command.removeprefix(f"python {SCRIPT}.py "))
    assert ended.code == 0 and same(learned(folder), learned(longer)), ended


@SLOW
def test_ctrl_c_once_more_stops_at_once(bench):
    """Where a step takes for ever."""
    process, folder = start(bench, f"{TINY} --env-id cases:Sleeps-v0", 1)
    while not (bench.folder / "asleep").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130 and "Traceback" not in err, err
    assert err.splitlines()[-1] == f"python {SCRIPT}.py --resume {folder.relative_to(bench.folder)}"


def test_a_finished_run_that_is_resumed_says_so(bench, run_dir):
    before = fingerprint(run_dir)
    ended = bench.run("--resume run")
    assert ended.code == 0 and ended.lines[-1] == "run", ended
    assert "has ended" in ended.out and "--total-timesteps" in ended.out
    assert "Evaluation" not in ended.out and fingerprint(run_dir) == before
    result = MODULE.train(
        dataclasses.replace(MODULE.Args(**state(run_dir)["args"]), resume=str(run_dir))
    )
    assert result.steps == state(run_dir)["envs"]["steps"] and fingerprint(run_dir) == before


def test_killed_in_the_last_evaluation(bench, run_dir):
    """All is trained and saved, but there is no result. It is evaluated; the checkpoint stays."""
    before, result = fingerprint(run_dir), (run_dir / "result.json").read_text()
    (run_dir / "result.json").write_text(result[:20])  # killed while it was written
    bench.train("--resume run")
    ours, theirs = (json.loads(text) for text in ((run_dir / "result.json").read_text(), result))
    assert [*ours.values()][1:4] == [*theirs.values()][1:4]
    assert fingerprint(run_dir)[run_dir / "checkpoint.pt"] == before[run_dir / "checkpoint.pt"]


def test_evaluations_go_on_where_they_were(bench, reference):
    """Killed between two of them, it has the same curve and the same best policy in the end."""
    ended = bench.run(TINY, kill_after=0, saves=3)
    assert ended.code == -signal.SIGKILL, ended
    (folder,) = (path.parent for path in (bench.folder / "runs").glob("*/checkpoint.pt"))
    before, whole = (curves(path)["eval/episodic_return"] for path in (folder, reference))
    assert 0 < len(before) < len(whole)
    unbeaten = shutil.copytree(folder, bench.folder / "unbeaten") / "best.pt"
    best = MODULE.read_checkpoint(unbeaten) | {"return": 1e9}
    MODULE.write_checkpoint(unbeaten, best.pop("args"), best)
    time.sleep(1)  # TensorBoard orders the files of a run by the second of their beginning
    bench.train(f"--resume {folder}")
    bench.train("--resume unbeaten")
    assert MODULE.read_checkpoint(unbeaten)["return"] == 1e9
    for tag in ("eval/episodic_return", "eval/episodic_length"):
        assert sorted(set(curves(folder)[tag])) == curves(reference)[tag]
    ours, theirs = (
        torch.load(path / "best.pt", weights_only=True)["network"] for path in (folder, reference)
    )
    assert same(ours, theirs)


def test_the_file_may_be_named_in_place_of_the_folder(bench, run_dir):
    ended = bench.run("--resume run/checkpoint.pt --total-timesteps 3000")
    assert ended.code == 0 and ended.lines[-1] == "run" and state(run_dir)["envs"]["steps"] >= 3000
    is_refused(
        bench.run("--resume run/best.pt --total-timesteps 4000"), "run/best.pt", "does not fit"
    )


def test_flags_beside_resume_replace_those_of_the_run(bench, run_dir, monkeypatch):
    steps = state(run_dir)["envs"]["steps"]
    bench.train(
        f"--resume run --total-timesteps {steps + 1000} --learning-rate 1e-5 --no-anneal-lr"
    )
    args = state(run_dir)["args"]
    assert args["learning_rate"] == 1e-5 and args["total_timesteps"] == steps + 1000
    assert args["num_envs"] == 2 and args["resume"] is None  # as they were
    found = curves(run_dir)
    rates = dict(found["charts/learning_rate"])
    assert {round(rate, 10) for step, rate in rates.items() if step > steps} == {1e-5}
    assert [step for step, _ in found["eval/episodic_return"]][-1] == state(run_dir)["envs"][
        "steps"
    ]
    assert json.loads((run_dir / "result.json").read_text())["steps"] >= steps + 1000
    assert all(group["lr"] == 1e-5 for group in state(run_dir)["optimizer"]["param_groups"])


@pytest.mark.parametrize("change", ["--env-id Acrobot-v1", "--num-envs 3", "--env-id Taxi-v4"])
def test_what_cannot_fit_is_refused(bench, run_dir, change):
    before = fingerprint(run_dir)
    is_refused(bench.run(f"--resume run --total-timesteps 9000 {change}"), "run", "does not fit")
    if change != "--num-envs 3":
        is_refused(bench.run(f"--evaluate run {change}"), "run", "does not fit")
    assert {path: before[path] for path in before if path.name != "lock"}.items() <= fingerprint(
        run_dir
    ).items()


def test_two_processes_cannot_train_in_one_folder(bench):
    process, folder = start(bench, f"{TINY} --total-timesteps 1000000", 2)
    try:
        is_refused(bench.run(f"--resume {folder}", timeout=30), str(folder / "lock"))
        assert process.poll() is None
        assert bench.run(f"--evaluate {folder} --eval-episodes 1").code == 0
    finally:
        process.kill()
        process.communicate()
    assert bench.run(f"--resume {folder} --total-timesteps 1000").code == 0  # the lock died with it


def test_every_flipped_bit_of_a_checkpoint_is_found(reference, tmp_path):
    whole = (reference / "checkpoint.pt").read_bytes()
    generator = random.Random(0)
    places = [*range(0, 200), *range(len(whole) - 200, len(whole))]
    places += [generator.randrange(len(whole)) for _ in range(400)]
    path, loaded, original = tmp_path / "checkpoint.pt", [], MODULE.read_checkpoint(reference)
    for place in places:
        broken = bytearray(whole)
        broken[place] ^= 1 << generator.randrange(8)
        path.write_bytes(broken)
        try:
            if not same(vars(MODULE.read_checkpoint(path).pop("args")), vars(original["args"])):
                loaded.append(place)
            elif not same({**MODULE.read_checkpoint(path), "args": 0}, {**original, "args": 0}):
                loaded.append(place)
        except MODULE.UsageError:
            pass
    assert loaded == []  # a bit that is no part of the contents, such as a date, may be loaded


class RunsCode:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


def foreign_checkpoints(reference):
    """Name -> what is in the file."""
    whole, ours = (reference / "checkpoint.pt").read_bytes(), state(reference)
    yield "empty", b""
    yield "first half", whole[: len(whole) // 2]
    yield "last byte missing", whole[:-1]
    yield "a text", b"these are not the weights you are looking for"
    yield "code", ours | {"seconds": RunsCode()}
    yield "a tensor", torch.zeros(3)
    yield "another program's", {"model": torch.zeros(3)}
    yield "another script's", ours | {"script": "another_script"}
    yield "unknown arguments", ours | {"args": ours["args"] | {"unknown": 1}}
    yield "impossible arguments", ours | {"args": ours["args"] | {"gamma": 7.0}}
    yield "arguments of another type", ours | {"args": ours["args"] | {"seed": "1"}}
    cut = {name: weights[:1] for name, weights in ours["network"].items()}
    yield "weights of another shape", ours | {"network": cut}
    for key in ours:
        yield f"no {key}", {name: value for name, value in ours.items() if name != key}
        yield f"{key} is a text", ours | {key: "text"}
        yield f"{key} is a list", ours | {key: [1, 2, 3]}
    for key in ours["envs"]:
        yield (
            f"no {key} of envs",
            ours | {"envs": {k: v for k, v in ours["envs"].items() if k != key}},
        )
        yield f"{key} of envs is a text", ours | {"envs": ours["envs"] | {key: "text"}}
        yield f"{key} of envs is None", ours | {"envs": ours["envs"] | {key: None}}


def test_a_checkpoint_that_is_not_whole_is_refused(bench, reference, monkeypatch):
    """In one line, whatever is missing or of another type; and nothing is changed."""
    monkeypatch.chdir(bench.folder)
    (bench.folder / "run").mkdir()
    for name, content in foreign_checkpoints(reference):
        path = bench.folder / "run" / "checkpoint.pt"
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        args = dataclasses.replace(MODULE.Args(**state(reference)["args"]), resume=str(path.parent))
        try:
            MODULE.train(dataclasses.replace(args, total_timesteps=9000))
            raise AssertionError(f"{name}: accepted")
        except MODULE.UsageError as error:
            assert "run" in str(error), name
        except Exception as error:
            raise AssertionError(f"{name}: {error!r}") from error
        assert {path.name for path in (bench.folder / "run").iterdir()} <= {
            "checkpoint.pt",
            "lock",
        }, name
    path.write_bytes(b"")
    for flag in ("--resume run", "--evaluate run", "--evaluate run/checkpoint.pt"):
        is_refused(bench.run(flag), "run/checkpoint.pt")
    assert not (bench.folder / "pwned").exists()


# ---- A full disk ---------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a disk of so many kilobytes, for root on Linux."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(kilobytes):
        options = ["-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", place]
        if subprocess.run(["mount", *options], capture_output=True).returncode != 0:
            pytest.skip("a disk cannot be mounted here")
        return place

    yield mount
    subprocess.run(["umount", place], capture_output=True)


@pytest.mark.parametrize(
    "left", ["nothing", "no checkpoint", "a checkpoint", "a checkpoint and a half", "no log"]
)
def test_a_full_disk(bench, reference, small_disk, left):
    """One line, nothing printed by threads, and no half checkpoint is left."""
    size = (reference / "checkpoint.pt").stat().st_size // 1024
    place = small_disk(
        {"nothing": 4, "no checkpoint": 16, "a checkpoint": size + 20}.get(left, 3 * size // 2 + 16)
    )
    if left == "nothing":
        (place / "full").write_bytes(bytes(4096))
    flags = "--checkpoint-frequency 0 --eval-frequency 0" if left == "no log" else ""
    ended = bench.run(f"{TINY} --total-timesteps 1000000 --runs-dir {place} {flags}")
    assert ended.code == 2 and "Traceback" not in ended.err and "Exception" not in ended.err, ended
    assert "No space left" in ended.err.splitlines()[-1], ended
    assert not list(place.rglob("*.tmp"))


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("iostream error")]
)
def test_a_checkpoint_that_cannot_be_written(tmp_path, monkeypatch, error):
    """As on a full disk: the one before stays, and half of a new one does not."""
    save, calls = torch.save, []

    def fails(content, file):
        calls.append(1)
        if len(calls) < 3:
            return save(content, file)
        file.write(b"half")
        raise error

    monkeypatch.setattr(torch, "save", fails)
    with pytest.raises(MODULE.UsageError, match="cannot write .*checkpoint.pt"):
        train(tmp_path, checkpoint_frequency=100)
    (folder,) = tmp_path.iterdir()
    assert not (folder / "checkpoint.tmp").exists() and 0 < state(folder)["envs"]["steps"] < 300


# ---- What the user sees --------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["--total-timesteps 1e4", "--total-timesteps=1e4"])
def test_numbers_may_have_an_exponent(monkeypatch, flag):
    monkeypatch.setattr(sys, "argv", [f"{SCRIPT}.py", *flag.split(), "--learning-rate", "1e-3"])
    args = MODULE.parse_args()
    assert args.total_timesteps == 10_000 and args.learning_rate == 1e-3


@SLOW
def test_the_bar_moves_in_a_terminal(bench):
    """A pseudo-terminal stands for the user's: the bar is drawn again and again over itself."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    process = bench.start(LONGER, stdout=slave, stderr=slave)
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
    assert all(word in output.decode() for word in ("steps/s", "<", "return"))  # speed, time left


@pytest.mark.parametrize("notebook", [True, False])
def test_the_bar_moves_in_a_notebook_and_not_in_a_log_file(tmp_path, monkeypatch, capsys, notebook):
    """Ten times a second, or twice a minute."""
    if notebook:
        monkeypatch.setitem(sys.modules, "ipykernel", sys)
    train(tmp_path, total_timesteps=40_000)  # seconds, on a fast CPU too
    drawn = capsys.readouterr().err.count("steps/s")
    assert drawn >= 6 if notebook else drawn <= 3


def test_the_speed_is_of_the_whole_training(tmp_path, monkeypatch):
    """A second passes between two looks at the clock, the first of which is at the resumption."""
    first = train(tmp_path)
    steps, clock = first.steps, iter(range(10**6))
    saved = state(Path(first.folder))
    monkeypatch.setattr(MODULE.time, "perf_counter", lambda: next(clock))
    args = MODULE.Args(**saved["args"])
    train(tmp_path, **vars(args) | {"total_timesteps": 3 * steps, "resume": first.folder})
    monkeypatch.undo()
    points = events(Path(first.folder)).Scalars("charts/SPS")
    looks = [point.step / point.value - saved["seconds"] for point in points if point.step > steps]
    assert len(looks) >= 2 and looks == pytest.approx([round(look) for look in looks], abs=1e-3)
    assert looks[0] == pytest.approx(1, abs=1e-3) and looks == sorted(looks)


@SLOW
def test_seconds_are_added_up(bench, run_dir):
    """Those of the run before, and of this one: not those in between."""
    steps, before = state(run_dir)["envs"]["steps"], state(run_dir)["seconds"]
    start = time.monotonic()
    bench.train(f"--resume run --total-timesteps {steps + 2000}")
    seconds = json.loads((run_dir / "result.json").read_text())["seconds"]
    assert before < seconds < before + time.monotonic() - start


def test_the_hparams_tab(reference):
    """One row for a run; return and script first: TensorBoard sorts the columns."""
    (session,) = [
        value.session_start_info
        for value in hparams_of(reference)
        if value.HasField("session_start_info")
    ]
    names = list(session.hparams)
    (experiment,) = [
        value.experiment for value in hparams_of(reference) if value.HasField("experiment")
    ]
    assert sorted(info.name for info in experiment.hparam_infos)[:2] == ["Return", "Script"]
    assert [info.name.tag for info in experiment.metric_infos] == ["eval/episodic_return"]
    assert session.hparams["Script"].string_value == SCRIPT
    result = json.loads((reference / "result.json").read_text())
    assert session.hparams["Return"].number_value == pytest.approx(result["episodic_return"])
    assert set(names) >= set(state(reference)["args"]) - {"resume", "evaluate"}


def hparams_of(folder):
    from tensorboard.plugins.hparams import plugin_data_pb2

    content = events(folder).summary_metadata
    return [
        plugin_data_pb2.HParamsPluginData.FromString(metadata.plugin_data.content)
        for metadata in content.values() if metadata.plugin_data.plugin_name == "hparams"
    ]  # fmt: skip


def test_the_arguments_stand_in_the_log(reference):
    (text,) = events(reference).Tensors("hyperparameters/text_summary")
    table = text.tensor_proto.string_val[0].decode()
    for name, value in state(reference)["args"].items():
        assert f"|{name}|{value}|" in table.splitlines()


@SLOW
def test_a_gif_shows_a_whole_long_episode(bench):
    """3,000 steps, of which the last picture shows the last ones, in at most 500 pictures."""
    ended = run_case(bench, "Drawn", "--capture-video --eval-frequency 0 --eval-episodes 1")
    steps = []
    with Image.open(bench.folder / ended.lines[-1] / "episode.gif") as gif:
        assert 200 < gif.n_frames <= 500
        for i in range(gif.n_frames):
            gif.seek(i)
            steps.append(int(np.asarray(gif.convert("L")).argmax()))
    assert steps == sorted(set(steps)) and steps[0] == 0 and steps[-1] > 2980


@pytest.mark.parametrize("way", ["", "error", "grey", "flat", "floats"])
def test_what_cannot_be_drawn_is_refused_before_the_training(bench, way):
    flags = f"""--env-id cases:CannotBeDrawn-v0 --capture-video --env-kwargs '{{"way": "{way}"}}'"""
    is_refused(bench.run(flags), "--capture-video", "cannot be drawn")
    assert not (bench.folder / "runs").exists()
    ended = run_case(bench, "CannotBeDrawn", "")
    is_refused(bench.run(f"--evaluate {ended.lines[-1]} --capture-video"), "cannot be drawn")


@SLOW
def test_a_terminal_without_unicode_and_python_oo_are_no_reasons_to_end(bench):
    bench.environment["PYTHONIOENCODING"] = "ascii"
    out, err = bench.start(TINY).communicate()
    assert "Evaluation: return" in out, err
    script = bench.folder / f"{SCRIPT}.py"
    script.write_text(script.read_text().replace(f'"""{MODULE.__doc__}"""', ""))  # as -OO does
    assert bench.run(TINY).code == bench.run("--help").code == 0


@SLOW
def test_no_standard_output_is_no_reason_to_end(bench):
    """Closed, as by some services."""
    command = ["sh", "-c", '"$@" >&-', "sh", sys.executable, f"{SCRIPT}.py", *TINY.split()]
    ended = subprocess.run(
        command, cwd=bench.folder, env=bench.environment, capture_output=True, text=True
    )
    assert ended.returncode == 0 and "Traceback" not in ended.stderr
    (folder,) = (bench.folder / "runs").iterdir()
    assert (folder / "result.json").exists()


def test_a_name_with_slashes_is_one_folder(tmp_path):
    folder = Path(train(tmp_path, exp_name="mine/old", env_id="cases:Line-v0", seed=7).folder)
    assert folder.parent == tmp_path and re.fullmatch(
        r"cases-Line-v0__mine-old__7__[\d-]+", folder.name
    )


@SLOW
def test_a_script_runs_where_it_is_on_a_module_of_the_current_folder(bench):
    command = [sys.executable, path_of(SCRIPT), "--env-id", "cases:Line-v0", *TINY.split()]
    ended = subprocess.run(
        command, cwd=bench.folder, env=bench.environment, capture_output=True, text=True
    )
    assert ended.returncode == 0 and (bench.folder / ended.stdout.splitlines()[-1]).is_dir(), ended


def test_a_forked_command_is_as_one_of_its_own(tmp_path):
    """The tests' own tool: see fork_server.py."""
    bench = Bench(SCRIPT, tmp_path)
    script = tmp_path / f"{SCRIPT}.py"
    script.write_text(
        "import os, sys\n"
        "print(sys.argv, sys.path[0], __name__, os.getcwd(), repr(sys.stdin.read()))\n"
        "print({k: v for k, v in os.environ.items() if k != 'LC_CTYPE'})\n"  # which Python may set
        "print('ends with', sys.argv[1], file=sys.stderr)\n"
        "sys.exit(int(sys.argv[1])) if sys.argv[1] != 'error' else 1 / 0\n"
    )
    for end in ("0", "3"):
        process, forked = bench.start(end), bench.run(end)
        assert (*process.communicate(), process.returncode) == (forked.out, forked.err, forked.code)
    assert bench.run("error").code == 1 and "Traceback" in bench.run("error").err
    script.write_text("import random, numpy\nprint(random.random(), numpy.random.rand())")
    assert not set(bench.run("").out.split()) & set(bench.run("").out.split())
    script.write_text("while True: pass")
    with pytest.raises(AssertionError, match="longer than 1 s"):
        bench.run("", timeout=1)
    assert bench.run("", kill_after=0.2).code < 0


# ---- The machine ---------------------------------------------------------------------------------


def test_available_cores_are_those_of_this_process(monkeypatch):
    """Under taskset, and in many batch systems, they are fewer than the machine has."""
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5, 7}, raising=False)
    assert MODULE.available_cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    assert MODULE.available_cores() == 64


PAGES = """
import resource, sys, torch
from {script} import Args, keep_freed_memory, train
{call}
def step():
    [torch.ones(2_000_000) for _ in range(10)]
for _ in range(5):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="for glibc")
@pytest.mark.parametrize("call", [
    "keep_freed_memory()", "train(Args(total_timesteps=100, eval_episodes=1))",
])  # fmt: skip
def test_memory_that_was_freed_is_used_again(call, bench):
    """80 MB of tensors a step, in 20,000 pages: by default, the system gives them anew."""
    code = PAGES.format(script=SCRIPT, call=call)
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=bench.folder, env=bench.environment,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert int(ended.stdout.split()[-1]) < 100
