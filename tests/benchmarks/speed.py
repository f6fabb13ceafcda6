"""Environment steps per second of the scripts and of what people use instead, alternating.

    python tests/benchmarks/speed.py SCRIPT --rounds 5
    python tests/benchmarks/speed.py SCRIPT --cleanrl DIR --cleanrl-python DIR/venv/bin/python

DIR is a clone of CleanRL, whose Python has what its programs import; they are run as they are, but
for the settings below. --sb3-python is a Python that has Stable-Baselines3 and sb3-contrib, --sbx-python
one that has SBX, its form in JAX.

Machines are noisy: nothing else may run meanwhile, and only medians and ratios mean something.
Flat scripts of ours use one core by default, others take all that there are: --cores 1 is fair.
Every figure is of a whole training, with its gradient steps and its logs, without start-up,
evaluation, and the steps before learning starts. Memory is the peak of the whole process. The
floor is what is left if only matrix products at their best and the emulator take time (floor.py).

What is measured stands in SPEED in tests/test_<script>.py, a literal:

    "steps"     of each training
    "first"     the step from which on it is measured
    "peers"     the other programs by name; the first is what all are compared with. The first word
                of its name says whose it is, the last one which:
                    CleanRL's FILE             "flags"; "replace": text of the program to replace
                    Stable-Baselines3's CLASS  "env_id", "num_envs", "normalize", "settings";
                                               so for sb3-contrib's and SBX's
                    any other name             "file" beside this one, called with SEED STEPS
                "steps", if they are not those of all. "equal" names the variant of ours that runs
                under the same conditions: as many environments, the same precision. Only its speed
                stands in README.md.
    "flags"     of all our variants
    "variants"  the flags of each by its name
    "floors"    FIRST LAST FLAGS for floor.py by their name

All rounds are written to results/speed/<script>.csv; plot.py makes the tables of them.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median

from learn import HERE, SCRIPTS, constant, processor, write_csv
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

LIBRARIES = {  # whose Python, and the name of the module
    "Stable-Baselines3's": ("sb3_python", "stable_baselines3"),
    "sb3-contrib's": ("sb3_python", "sb3_contrib"),
    "SBX's": ("sbx_python", "sbx"),
}

Measurement = tuple[float, float]  # steps per second, GB


def run(*command: object, folder: str | None = None, path: str = "") -> tuple[str, float]:
    """The command's output and its peak memory in GB."""
    environment = os.environ | {"PYTHONPATH": path}
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(
            list(map(str, command)),
            stdout=out,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env=environment,
        )
        _, status, usage = os.wait4(process.pid, 0)
        assert status == 0, command
        out.seek(0)
        return out.read(), usage.ru_maxrss * 1024 / 1e9


def steady(folder: str, first: int) -> float:
    """Steps per second, by the clock, between the first and last charts/SPS after that step."""
    events = EventAccumulator(folder, size_guidance={"scalars": 0}).Reload()
    points = [event for event in events.Scalars("charts/SPS") if event.step >= first]
    seconds = points[-1].wall_time - points[0].wall_time
    return (points[-1].step - points[0].step) / seconds


def ours(script: str, flags: str, steps: int, first: int, seed: int) -> Measurement:
    with tempfile.TemporaryDirectory() as runs:
        command = [sys.executable, SCRIPTS / f"{script}.py", "--runs-dir", runs, "--seed", seed]
        command += ["--total-timesteps", steps, "--eval-episodes", 1, *flags.split()]
        out, memory = run(*command)
        return steady(out.splitlines()[-1], first), memory


def cleanrl(options, file: str, peer: dict, steps: int, first: int, seed: int) -> Measurement:
    root = Path(options.cleanrl).resolve()
    with tempfile.TemporaryDirectory() as folder:
        source = (root / "cleanrl" / file).read_text()
        for old, new in peer.get("replace", {}).items():
            assert old in source, f"{file} has no {old}"
            source = source.replace(old, new)
        if "atari" in file:  # the old names of the games are no longer registered by themselves
            lines = "from ale_py.registration import register_v0_v4_envs\nregister_v0_v4_envs()\n"
            source = lines + source
        Path(folder, file).write_text(source)
        flags = ["--seed", seed, "--total-timesteps", steps, *peer["flags"].split()]
        _, memory = run(options.cleanrl_python, file, *flags, folder=folder, path=str(root))
        (run_dir,) = Path(folder).glob("runs/*")
        return steady(str(run_dir), first), memory


def measure_peer(options, name: str, peer: dict, steps: int, first: int, seed: int) -> Measurement:
    owner, program, steps = name.split()[0], name.split()[-1], peer.get("steps", steps)
    if owner == "CleanRL's":
        return cleanrl(options, program, peer, steps, first, seed)
    if owner in LIBRARIES:
        python, library = getattr(options, LIBRARIES[owner][0]), LIBRARIES[owner][1]
        command = [python, HERE / "sb3.py", library, program, seed, steps, first]
        out, memory = run(*command, json.dumps(peer))
        return float(out.split()[-1]), memory
    out, memory = run(sys.executable, HERE / peer["file"], seed, steps)
    return float(out.split()[0]), memory


def floor(script: str, arguments: str, flags: str) -> Measurement:
    command = [HERE / "floor.py", script, *arguments.split(), *flags.split()]
    return float(run(sys.executable, *command)[0].split()[-1]), float("nan")


def versions(python: str, *packages: str) -> str:
    """What that Python has installed."""
    code = "import sys; from importlib.metadata import version as v; "
    code += "print(*(f'{p} {v(p)}' for p in sys.argv[1:]), sep=', ')"
    return run(python, "-c", code, *packages)[0].strip()


def programs(script: str, options: argparse.Namespace) -> dict:
    """By the name of its row: what measures a program, given a seed."""
    speed = constant(script, "SPEED")
    steps, first, flags = speed["steps"], speed["first"], speed["flags"]
    rows = {}
    for name, peer in speed["peers"].items():
        if name.startswith("CleanRL's") and not options.cleanrl:
            continue
        option = LIBRARIES.get(name.split()[0], [None])[0]
        if option and not getattr(options, option):
            continue
        rows[name] = lambda seed, n=name, p=peer: measure_peer(options, n, p, steps, first, seed)
    for name, more in speed["variants"].items():
        row = f"{script}.py, {name}"
        rows[row] = lambda seed, f=f"{flags} {more}": ours(script, f, steps, first, seed)
    for name, arguments in speed["floors"].items():
        rows[name] = lambda seed, a=arguments: floor(script, a, flags)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("script", nargs="+", help="file names without .py")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cores", type=int, help="for each program; if not given, all")
    parser.add_argument("--cleanrl", help="a clone of CleanRL")
    parser.add_argument("--cleanrl-python", default=sys.executable)
    parser.add_argument("--sb3-python", help="a Python that has Stable-Baselines3 and sb3-contrib")
    parser.add_argument("--sbx-python", help="a Python that has SBX")
    options = parser.parse_args()
    if options.cores:  # the programs inherit it; by default PyTorch and JAX take all
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])
        os.environ["OMP_NUM_THREADS"] = str(options.cores)
    cores = len(os.sched_getaffinity(0))
    head = {
        "rounds": f"{options.rounds}, in turn, one after another",
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{processor()}, {cores} core{'s' if cores > 1 else ''}",
        "versions": ", ".join(f"{p} {version(p)}" for p in ("torch", "gymnasium", "ale-py")),
    }
    if options.cleanrl:
        commit = run("git", "-C", options.cleanrl, "rev-parse", "--short", "HEAD")[0].strip()
        installed = versions(options.cleanrl_python, "torch", "gymnasium")
        head["CleanRL"] = f"commit {commit}, on {installed}"
    if options.sb3_python:
        packages = ("stable-baselines3", "torch", "gymnasium")
        head["Stable-Baselines3"] = versions(options.sb3_python, *packages)
    if options.sbx_python:
        head["SBX"] = versions(options.sbx_python, "sbx-rl", "jax", "gymnasium")
    for script in options.script:
        rows, measured = [["name", "round", "steps/s", "memory"]], {}
        for round_ in range(1, options.rounds + 1):
            for name, measure in programs(script, options).items():
                speed, memory = measure(round_)
                rows.append([name, round_, f"{speed:.5g}", f"{memory:.3g}"])
                measured.setdefault(name, []).append(speed)
                print(script, *rows[-1], sep=", ", flush=True)
        write_csv(HERE / "results" / "speed" / f"{script}.csv", head, rows)
        theirs = next(iter(measured.values()))
        for name, values in measured.items():
            times = median(a / b for a, b in zip(values, theirs))
            print(f"{name}: median {median(values):.5g} steps/s, {times:.2f} times the first")


if __name__ == "__main__":
    main()
