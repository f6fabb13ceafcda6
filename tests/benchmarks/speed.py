"""Environment steps per second of the scripts and of what people use instead, alternating in one run.

    python tests/benchmarks/speed.py --rounds 5
    python tests/benchmarks/speed.py --rounds 5 --groups dqn --cleanrl DIR --cleanrl-python DIR/venv/bin/python

Machines are noisy: nothing else may run meanwhile, and only the ratios and medians mean something. Every figure is of
a whole training, with its gradient steps and its logs, without start-up, evaluation, and the steps before learning
starts. Peak memory is that of the whole process. The floor is what is left if only matrix products at their best and
the emulator take time (floor.py). DIR is a clone of CleanRL, whose Python has what its scripts import; they are run as
they are, but for the settings that this file gives both sides. --sb3-python is a Python with Stable-Baselines3.

Each group is written to results/speed/<group>.csv, all rounds; plot.py makes the tables of them.
"""

import argparse
import csv
import os
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median

from learn import processor
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

HERE = Path(__file__).resolve().parent
SCRIPTS = HERE.parent.parent / "cleanrl_style"
CLEANRL, SB3 = argparse.Namespace(folder=None, python=None), argparse.Namespace(python=None)


def run(*command: object, folder: str | None = None, path: str = "") -> tuple[str, float]:
    """The command's output and its peak memory in GB."""
    environment = os.environ | {"PYTHONPATH": path}
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(list(map(str, command)), stdout=out, stderr=subprocess.DEVNULL, cwd=folder, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        assert status == 0, command
        out.seek(0)
        return out.read(), usage.ru_maxrss * 1024 / 1e9


def steady(folder: str, first: int) -> float:
    """Steps per second, by the clock, between the first and the last point of charts/SPS after that step."""
    events = EventAccumulator(folder, size_guidance={"scalars": 0}).Reload().Scalars("charts/SPS")
    events = [event for event in events if event.step >= first]
    return (events[-1].step - events[0].step) / (events[-1].wall_time - events[0].wall_time)


def ours(script: str, seed: int, *flags: object, first: int = 0) -> tuple[float, float]:
    with tempfile.TemporaryDirectory() as runs:
        command = [sys.executable, SCRIPTS / f"{script}.py", "--runs-dir", runs, "--seed", seed, "--eval-episodes", 1]
        out, memory = run(*command, *flags)
        return steady(out.splitlines()[-1], first), memory


def cleanrl(script: str, seed: int, *flags: object, first: int) -> tuple[float, float]:
    """A copy of the script, whose layers of 120 and 84 units, if it has such, get our 128."""
    root = Path(CLEANRL.folder).resolve()
    with tempfile.TemporaryDirectory() as folder:
        source = (root / "cleanrl" / f"{script}.py").read_text()
        for a, b in (("prod(), 120", "prod(), 128"), ("Linear(120, 84", "Linear(128, 128"), ("Linear(84", "Linear(128")):
            source = source.replace(a, b)
        if "atari" in script:  # their names of the games are no longer registered by themselves
            source = "from ale_py.registration import register_v0_v4_envs\nregister_v0_v4_envs()\n" + source
        Path(folder, f"{script}.py").write_text(source)
        _, memory = run(CLEANRL.python, f"{script}.py", "--seed", seed, *flags, folder=folder, path=str(root))
        (run_dir,) = Path(folder).glob("runs/*")
        return steady(str(run_dir), first), memory


def sb3(algorithm: str, seed: int, steps: int, first: int) -> tuple[float, float]:
    out, memory = run(SB3.python, HERE / "sb3.py", algorithm, seed, steps, first)
    return float(out.split()[-1]), memory


def floor(script: str, first: int, last: int, *flags: object) -> tuple[float, float]:
    out, _ = run(sys.executable, HERE / "floor.py", script, first, last, *flags)
    return float(out.split()[-1]), float("nan")


def versions(python: str, *packages: str) -> str:
    """What that Python has installed."""
    code = "import sys; from importlib.metadata import version; print(*(f'{p} {version(p)}' for p in sys.argv[1:]), sep=', ')"
    return run(python, "-c", code, *packages)[0].strip()


def tutorial(seed: int) -> tuple[float, float]:
    out, memory = run(sys.executable, HERE / "tutorial_reinforce.py", seed, 20_000)
    return float(out.split()[0]), memory


TEXTBOOK = ["--episodes-per-update", 1, "--no-normalize-returns", "--no-anneal-lr", "--learning-rate", 1e-3]

# CleanRL's settings, where ours are others; both sides act by their networks, not at random, all the time.
DQN = ["--total-timesteps", 40_000, "--learning-starts", 10_000, "--start-e", 0.05, "--end-e", 0.05]
OUR_DQN = [*DQN, "--buffer-size", 10_000, "--train-frequency", 10, "--target-network-frequency", 500, "--batch-size", 128,
           "--hidden-size", 128, "--learning-rate", 2.5e-4, "--no-anneal-lr"]  # fmt: skip
ATARI = ["--total-timesteps", 5_000, "--learning-starts", 1_000, "--buffer-size", 20_000, "--start-e", 0.01]
OUR_ATARI = [*ATARI, "--adam-epsilon", 1e-8, "--loss", "squared"]

PPO = ["--total-timesteps", 60_000]
OUR_PPO = [*PPO, *"--num-envs 4 --num-steps 128 --num-minibatches 4 --update-epochs 4 --clip-vloss --gamma 0.99 "
           "--gae-lambda 0.95 --ent-coef 0.01 --learning-rate 2.5e-4".split()]  # fmt: skip
CONTINUOUS = ["--env-id", "Pendulum-v1", "--total-timesteps", 30_000]
OUR_CONTINUOUS = [*CONTINUOUS, *"--num-envs 1 --num-steps 2048 --num-minibatches 32 --update-epochs 10 --clip-vloss "
                  "--gamma 0.99 --gae-lambda 0.95 --learning-rate 3e-4 --ent-coef 0".split()]  # fmt: skip
PPO_ATARI = ["--total-timesteps", 12_000]  # all other settings are the same on both sides

# Each row of a table: its name, and what measures it, given a seed. Names begin with whose program it is. The first row
# of a group is what the others are compared with.
GROUPS = {
    "reinforce": {
        "the tutorial's program, mended only to run": tutorial,
        "reinforce_cartpole.py": lambda seed: ours("reinforce_cartpole", seed),
        "reinforce_cartpole.py, closest to the textbook": lambda seed: ours("reinforce_cartpole", seed, *TEXTBOOK),
        "floor": lambda seed: floor("reinforce_cartpole", 10_000, 20_000),
    },
    "dqn": {
        "CleanRL's dqn.py": lambda seed: cleanrl("dqn", seed, *DQN, first=11_000),
        "Stable-Baselines3's DQN": lambda seed: sb3("dqn", seed, DQN[1], 11_000),
        "dqn_cartpole.py": lambda seed: ours("dqn_cartpole", seed, *OUR_DQN, "--num-envs", 10, first=11_000),
        "dqn_cartpole.py, one environment": lambda seed: ours(
            "dqn_cartpole", seed, *OUR_DQN, "--num-envs", 1, first=11_000
        ),
        "floor": lambda seed: floor("dqn_cartpole", 12_000, 16_000, *OUR_DQN, "--num-envs", 10),
    },
    "dqn_atari": {
        "CleanRL's dqn_atari.py": lambda seed: cleanrl("dqn_atari", seed, *ATARI, first=1_500),
        "Stable-Baselines3's DQN": lambda seed: sb3("dqn_atari", seed, ATARI[1], 1_500),
        "dqn_atari.py, bfloat16": lambda seed: ours("dqn_atari", seed, *OUR_ATARI, "--precision", "bfloat16", first=1_500),
        "dqn_atari.py, float32": lambda seed: ours("dqn_atari", seed, *OUR_ATARI, "--precision", "float32", first=1_500),
        "dqn_atari.py, one game": lambda seed: ours(
            "dqn_atari", seed, *OUR_ATARI, "--precision", "bfloat16", "--num-envs", 1, first=1_500
        ),
        "floor, bfloat16": lambda seed: floor("dqn_atari", 1_200, 1_600, *OUR_ATARI, "--precision", "bfloat16"),
        "floor, float32": lambda seed: floor("dqn_atari", 1_200, 1_600, *OUR_ATARI, "--precision", "float32"),
    },
    "ppo": {
        "CleanRL's ppo.py": lambda seed: cleanrl("ppo", seed, *PPO, first=5_000),
        "Stable-Baselines3's PPO": lambda seed: sb3("ppo", seed, PPO[1], 5_000),
        "ppo_cartpole.py": lambda seed: ours("ppo_cartpole", seed, *OUR_PPO, first=5_000),
        "floor": lambda seed: floor("ppo_cartpole", 1_024, 5_120, *OUR_PPO),
    },
    "ppo_continuous": {
        "CleanRL's ppo_continuous_action.py": lambda seed: cleanrl("ppo_continuous_action", seed, *CONTINUOUS, first=2_048),
        "Stable-Baselines3's PPO": lambda seed: sb3("ppo_continuous", seed, CONTINUOUS[3], 2_048),
        "ppo_continuous.py": lambda seed: ours("ppo_continuous", seed, *OUR_CONTINUOUS, first=2_048),
        "floor": lambda seed: floor("ppo_continuous", 2_048, 6_144, *OUR_CONTINUOUS),
    },
    "ppo_atari": {
        "CleanRL's ppo_atari.py": lambda seed: cleanrl("ppo_atari", seed, *PPO_ATARI, first=1_024),
        "Stable-Baselines3's PPO": lambda seed: sb3("ppo_atari", seed, PPO_ATARI[1], 1_024),
        "ppo_atari.py, bfloat16": lambda seed: ours("ppo_atari", seed, *PPO_ATARI, "--precision", "bfloat16", first=1_024),
        "ppo_atari.py, float32": lambda seed: ours("ppo_atari", seed, *PPO_ATARI, "--precision", "float32", first=1_024),
        "floor, bfloat16": lambda seed: floor("ppo_atari", 1_024, 2_048, "--precision", "bfloat16"),
        "floor, float32": lambda seed: floor("ppo_atari", 1_024, 2_048, "--precision", "float32"),
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--groups", nargs="*", choices=GROUPS, default=["reinforce"])
    parser.add_argument("--cleanrl", help="a clone of CleanRL")
    parser.add_argument("--cleanrl-python", default=sys.executable)
    parser.add_argument("--sb3-python", help="a Python that has Stable-Baselines3")
    options = parser.parse_args()
    CLEANRL.folder, CLEANRL.python, SB3.python = options.cleanrl, options.cleanrl_python, options.sb3_python
    for group in options.groups:
        names = [name for name in GROUPS[group] if (options.cleanrl or "CleanRL" not in name)
                 and (options.sb3_python or "Baselines" not in name)]  # fmt: skip
        rows = []
        for round_ in range(1, options.rounds + 1):
            for name in names:
                speed, memory = GROUPS[group][name](round_)
                rows.append([name, round_, f"{speed:.5g}", f"{memory:.3g}"])
                print(group, *rows[-1], sep=", ", flush=True)
        head = {
            "rounds": f"{options.rounds}, in turn, one after another",
            "date": time.strftime("%Y-%m-%d"),
            "machine": f"{processor()}, {os.cpu_count()} cores",
            "versions": ", ".join(f"{package} {version(package)}" for package in ("torch", "gymnasium", "ale-py")),
        }
        if options.cleanrl:
            commit, _ = run("git", "-C", options.cleanrl, "rev-parse", "--short", "HEAD")
            head["CleanRL"] = f"commit {commit.strip()}, on {versions(options.cleanrl_python, 'torch', 'gymnasium')}"
        if options.sb3_python:
            head["Stable-Baselines3"] = versions(options.sb3_python, "stable-baselines3", "torch", "gymnasium")
        (HERE / "results" / "speed").mkdir(parents=True, exist_ok=True)
        with open(HERE / "results" / "speed" / f"{group}.csv", "w", newline="") as file:
            file.writelines(f"# {key}: {value}\n" for key, value in head.items())
            csv.writer(file, lineterminator="\n").writerows([["name", "round", "steps/s", "memory"], *rows])
        speeds = {name: [float(row[2]) for row in rows if row[0] == name] for name in names}
        for name in names:
            times = median(a / b for a, b in zip(speeds[name], speeds[names[0]]))
            print(f"{group}, {name}: median {median(speeds[name]):.5g} steps/s, {times:.2f} times the first")


if __name__ == "__main__":
    main()
