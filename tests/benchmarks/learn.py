"""Runs a script over many seeds, one process per core, and records every learning curve and final evaluation.

    python tests/benchmarks/learn.py reinforce_cartpole --seeds 1-20
    python tests/benchmarks/learn.py reinforce_cartpole --seeds 1-20 --env-id Acrobot-v1 --total-timesteps 400000

Flags that this file does not know go to the script. Finished seeds are kept in runs/, so that a call that was stopped
goes on where it was: give the same command again. The record is results/<script>__<env-id>.csv beside this file: what was run,
where and on which versions, in comment lines at its head; then one row for each point (seed, step, return; the
training return is the mean over 50 equal parts of the run), and two rows per seed at the final step: "eval", and
"last20", the mean of the last 20 training episodes (which the oldest records lack). With --solved LEVEL there is one
row more, "solved": the step at which the mean of 20 training episodes in a row first reached that level, and, as its
return, the minutes that it took. (Early where short games are won games: those end first after a checkpoint has cut
them all. The row "last20" is fair.)
"""

import argparse
import csv
import os
import platform
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

HERE = Path(__file__).resolve().parent
SCRIPTS = HERE.parent.parent / "cleanrl_style"
POINTS = 50


def seeds(text: str) -> list[int]:
    first, _, last = text.partition("-")
    return list(range(int(first), int(last or first) + 1))


def run(script: str, flags: list[str], seed: int, runs: Path) -> tuple[Path, float]:
    """Trains one seed, or goes on with it; returns its folder and the wall time in seconds, start-up included."""
    runs_dir = runs / str(seed)
    done = runs_dir / "wall_time"
    if done.exists():
        run_dir, wall = done.read_text().split("\n")
        return Path(run_dir), float(wall)
    begun = sorted(runs_dir.glob("*/checkpoint.pt"))
    flags = ["--resume", str(begun[-1].parent)] if begun else [*flags, "--seed", str(seed), "--runs-dir", str(runs_dir)]
    start = time.perf_counter()
    process = subprocess.run([sys.executable, SCRIPTS / f"{script}.py", *flags], capture_output=True, text=True)
    wall = time.perf_counter() - start
    assert process.returncode == 0, process.stderr
    run_dir = process.stdout.splitlines()[-1]
    wall = clock(run_dir)[-1][1] if begun else wall  # this was but the last part; the training's time has to do
    done.write_text(f"{run_dir}\n{wall}")
    print(f"seed {seed}: {wall:.1f} s, {process.stdout.splitlines()[-2]}", flush=True)
    return Path(run_dir), wall


def clock(run_dir: str | Path) -> list[tuple[int, float]]:
    """(step, seconds of training until then), without the time that passed between the parts of a resumed run."""
    points = [(0, 0.0)]
    for file in sorted(Path(run_dir).glob("events.out.tfevents.*")):  # one for each part, by the time of its start
        events = EventAccumulator(str(file), size_guidance={"scalars": 0}).Reload()
        if "charts/SPS" not in events.Tags()["scalars"]:
            continue  # it was killed before its first point
        part = [(event.step, event.wall_time - events.FirstEventTimestamp()) for event in events.Scalars("charts/SPS")]
        points = [point for point in points if point[0] < part[0][0]]  # what came after the checkpoint was lost
        points += [(step, points[-1][1] + seconds) for step, seconds in part]
    return points


def curve(events: EventAccumulator) -> tuple[list[tuple[int, float]], tuple[int, float]]:
    """The training returns in POINTS equal parts of the run, and the evaluation: (step, return) each."""
    training = [(event.step, event.value) for event in events.Scalars("charts/episodic_return")]
    evaluation = events.Scalars("eval/episodic_return")[-1]
    edges = np.linspace(0, evaluation.step, POINTS + 1)
    points = []
    for low, high in zip(edges, edges[1:]):
        values = [value for step, value in training if low < step <= high]
        if values:
            points.append((round(high), float(np.mean(values))))
    return points, (evaluation.step, evaluation.value)


def solved(events: EventAccumulator, times: list[tuple[int, float]], level: float) -> tuple[int, float] | None:
    """The first step at which the last 20 training episodes have a mean of level, and the minutes it took."""
    episodes = events.Scalars("charts/episodic_return")
    for last in range(20, len(episodes) + 1):
        if np.mean([event.value for event in episodes[last - 20 : last]]) >= level:
            step = episodes[last - 1].step
            return step, float(np.interp(step, *zip(*times))) / 60
    return None


def processor() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text() if info.exists() else "")
    return f"{found[1] if found else platform.machine()}, {platform.system()}"


def found(package: str) -> bool:
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("script", help="its file name without .py")
    parser.add_argument("--seeds", type=seeds, default=seeds("1-20"), help="first-last")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--name", default="", help="of the record, if not the environment's id")
    parser.add_argument("--solved", type=float, help="a training return; the record says when it was reached")
    ours, flags = parser.parse_known_args()
    source = (SCRIPTS / f"{ours.script}.py").read_text()
    env_id = dict(zip(flags, flags[1:])).get("--env-id") or re.search(r'env_id: str = "(.*?)"', source)[1]
    name = f"{ours.script}__{ours.name or env_id.replace('/', '-')}"
    record = HERE / "results" / f"{name}.csv"
    rows = record.read_text().splitlines() if record.exists() else []
    if len({row.split(",")[0] for row in rows if row[0].isdigit()}) > len(ours.seeds):
        parser.error(f"{record} has more seeds: remove it first, or give another --name")
    runs = Path("runs") / "learn" / name
    with ThreadPoolExecutor(ours.jobs) as pool:
        results = list(pool.map(lambda seed: run(ours.script, flags, seed, runs), ours.seeds))
    walls = [wall for _, wall in results]
    head = {
        "command": " ".join(["python", f"cleanrl_style/{ours.script}.py", *flags, "--seed SEED"]),
        "seeds": f"{ours.seeds[0]}-{ours.seeds[-1]}",
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{processor()}, {os.cpu_count()} cores, {ours.jobs} run{'s' if ours.jobs > 1 else ''} at a time",
        "versions": f"Python {platform.python_version()}, "
        + ", ".join(f"{name} {version(name)}" for name in ("torch", "gymnasium", "numpy", "ale-py", "mujoco") if found(name)),
        "wall time": f"median {np.nanmedian(walls):.1f} s, longest {np.nanmax(walls):.1f} s, from start-up to evaluation",
    }
    if ours.solved is not None:
        head["solved"] = f"the mean of 20 training episodes is {ours.solved:g} or more"
    (HERE / "results").mkdir(exist_ok=True)
    with open(record, "w", newline="") as file:
        file.writelines(f"# {key}: {value}\n" for key, value in head.items())
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["seed", "step", "return", "kind"])
        for seed, (run_dir, _) in zip(ours.seeds, results):
            events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
            points, (step, value) = curve(events)
            rows.writerows([seed, s, f"{v:.6g}", "train"] for s, v in points)
            rows.writerow([seed, step, f"{value:.6g}", "eval"])
            last = [event.value for event in events.Scalars("charts/episodic_return")[-20:]]
            rows.writerow([seed, step, f"{np.mean(last):.6g}", "last20"])
            if ours.solved is not None and (reached := solved(events, clock(run_dir), ours.solved)):
                rows.writerow([seed, reached[0], f"{reached[1]:.2f}", "solved"])
    print(record)


if __name__ == "__main__":
    main()
