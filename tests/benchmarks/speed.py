"""Environment steps per second of the scripts and of what people use instead, alternating in one run.

    python tests/benchmarks/speed.py --rounds 5

Machines are noisy: nothing else may run meanwhile, and only the ratios and medians mean something. Every figure is of
a whole training, with its gradient steps and its logs, without start-up and evaluation. Prints a table in Markdown.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from learn import processor
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

HERE = Path(__file__).resolve().parent
SCRIPTS = HERE.parent.parent / "cleanrl_style"


def run(*command: object) -> str:
    process = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return process.stdout


def ours(script: str, seed: int, *flags: object) -> float:
    """The last charts/SPS of a run."""
    with tempfile.TemporaryDirectory() as runs:
        out = run(SCRIPTS / f"{script}.py", "--runs-dir", runs, "--seed", seed, "--eval-episodes", 1, *flags)
        events = EventAccumulator(out.splitlines()[-1], size_guidance={"scalars": 0}).Reload()
        return events.Scalars("charts/SPS")[-1].value


def tutorial(seed: int) -> float:
    return float(run(HERE / "tutorial_reinforce.py", seed, 20_000).split()[0])


TEXTBOOK = ["--episodes-per-update", 1, "--no-normalize-returns", "--no-anneal-lr", "--learning-rate", 1e-3]

# Each row of the table: its name, and what measures it, given a seed. The first row of a group is what the others are
# compared with.
GROUPS = {
    "REINFORCE, CartPole-v1": {
        "the tutorial's program, mended only to run": tutorial,
        "reinforce_cartpole.py": lambda seed: ours("reinforce_cartpole", seed),
        "reinforce_cartpole.py, closest to the textbook": lambda seed: ours("reinforce_cartpole", seed, *TEXTBOOK),
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    print(f"`python tests/benchmarks/speed.py --rounds {rounds}`, {time.strftime('%Y-%m-%d')}, {processor()}, ", end="")
    print(f"{os.cpu_count()} cores, torch {version('torch')}, gymnasium {version('gymnasium')}\n")
    for group, rows in GROUPS.items():
        speeds = {name: [] for name in rows}
        for seed in range(1, rounds + 1):
            for name, measure in rows.items():
                speeds[name].append(measure(seed))
        base = speeds[next(iter(rows))]
        print(f"| {group} | steps/s, median | lowest to highest | times the first row, median of the pairs |\n|-|-:|-:|-:|")
        for name, values in speeds.items():
            ratio = statistics.median(value / first for value, first in zip(values, base))
            print(f"| {name} | {statistics.median(values):,.0f} | {min(values):,.0f} to {max(values):,.0f} | {ratio:.1f} |")


if __name__ == "__main__":
    main()
