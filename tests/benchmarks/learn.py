"""Runs a script over many seeds, one process per core, and records all curves and evaluations.

    python tests/benchmarks/learn.py SCRIPT --seeds 1-20
    python tests/benchmarks/learn.py SCRIPT --seeds 1-20 --env-id Acrobot-v1
    python tests/benchmarks/learn.py --next

SCRIPT is a file's name without .py. Flags that this file does not know go to the script. Finished
seeds are kept in runs/, so a call that was stopped goes on where it was: give the same command
again. --keep trains only the seeds that the record of the same command lacks. --next does so for
the first line of queue.txt, beside this file, whose record lacks seeds.

    python tests/benchmarks/learn.py SCRIPT --jobs 8 --ray
    python tests/benchmarks/learn.py SCRIPT --jobs 64 --ray-address auto

--ray trains on workers of Ray, here, and --ray-address on those of a cluster that exists; rows are
the same. A seed that is killed goes on from its last checkpoint. Each node needs this repository at
the same path, and the same packages. One that does not see the caller's runs/ trains in its folder
for temporary files, and sends back what the record needs; if it is lost, its seeds begin anew.

The record is results/<script>__<env-id>.csv. Other settings for the same environment need another
--name; --variant says in a few words what they are. Comment lines at the record's head say what
was run, where and on which versions. A line `# note: ...` may be added by hand: it is shown on the
page of results, and kept when the seeds are recorded again, as is `# variant: ...`.

Then one row per point: seed, step, return. "train", the training return, is the mean over each of
50 equal parts of the run. "eval" is an evaluation; each seed has one at the final step, and at that
step "last20", the mean of the last 20 training episodes, and "wall", the seconds from start-up to
evaluation (the oldest records lack them). With --solved LEVEL there is a row "solved": the step at
which the mean of 20 training episodes in a row first reached LEVEL, and the minutes until then.
"""

import argparse
import ast
import contextlib
import csv
import functools
import io
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
from filelock import FileLock
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

HERE = Path(__file__).resolve().parent
SCRIPTS = HERE.parent.parent / "cleanrl_style"
QUEUE = HERE / "queue.txt"
POINTS = 50  # of a curve
# Ends a process with the one that started it, even with kill -9: 1 is PR_SET_PDEATHSIG.
TIED = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9); os.execv(sys.argv[1], sys.argv[1:])"
PACKAGES = ("torch", "gymnasium", "numpy", "ale-py", "mujoco")  # whose versions are recorded


@functools.cache
def constant(script: str, name: str) -> dict:
    """PUBLISHED or SPEED of tests/test_<script>.py; {} if there is none.

    It is read, not imported: those tests set the number of threads, which speed.py must not.
    """
    for path in (HERE.parent / f"test_{script}.py", HERE / f"_constants_{script}.py"):
        for node in ast.parse(path.read_text() if path.exists() else "").body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
                return ast.literal_eval(node.value)
    return {}


def read_csv(path: Path) -> tuple[dict[str, str], list[dict[str, str]]]:
    """The comment lines at the head, and the rows."""
    lines = path.read_text().splitlines()
    head = dict(line[2:].split(": ", 1) for line in lines if line.startswith("# "))
    return head, list(csv.DictReader(line for line in lines if not line.startswith("# ")))


def write_csv(path: Path, head: dict[str, str], rows: list[list]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        file.writelines(f"# {key}: {value}\n" for key, value in head.items())
        csv.writer(file, lineterminator="\n").writerows(rows)


@functools.cache
def default_environment(script: str) -> str:
    return re.search(r'env_id: str = "(.*?)"', (SCRIPTS / f"{script}.py").read_text())[1]


def seeds(text: str) -> list[int]:
    first, _, last = text.partition("-")
    return list(range(int(first), int(last or first) + 1))


def run(script: str, flags: list[str], seed: int, runs: Path) -> tuple[Path, float]:
    """Trains one seed, or goes on with it: its folder, and the wall time with start-up, in s."""
    runs_dir = runs / str(seed)
    done = runs_dir / "wall_time"
    if done.exists():
        run_dir, wall = done.read_text().split("\n")
        return Path(run_dir), float(wall)
    begun = sorted(runs_dir.glob("*/checkpoint.pt"))
    if begun:
        with FileLock(begun[-1].with_name("lock")):  # it may still be training: wait for its end
            pass
        flags = ["--resume", str(begun[-1].parent)]
    else:
        flags = [*flags, "--seed", str(seed), "--runs-dir", str(runs_dir)]
    command = [sys.executable, SCRIPTS / f"{script}.py", *flags]
    if sys.platform == "linux":
        command = [sys.executable, "-c", TIED, *command]
    start = time.perf_counter()
    process = subprocess.run(command, capture_output=True, text=True)
    wall = time.perf_counter() - start
    if process.returncode == 2:  # the script refuses its flags, and says why
        raise ValueError(process.stderr.strip())
    if process.returncode < 0:
        raise ChildProcessError(f"seed {seed} was killed by signal {-process.returncode}")
    assert process.returncode == 0, process.stderr
    run_dir = process.stdout.splitlines()[-1]
    if begun:  # this was only the last part: take the time of training, without start-up
        wall = clock(run_dir)[-1][1]
    done.write_text(f"{run_dir}\n{wall}")
    print(f"seed {seed}: {wall:.1f} s, {process.stdout.splitlines()[-2]}", flush=True)
    return Path(run_dir), wall


def run_there(
    script: str, flags: list[str], seed: int, runs: Path, here: Path, mark: Path, threads: dict
) -> tuple[str, dict[Path, bytes]]:
    """`run` on a node of Ray: what it prints, and files for the caller's runs/.

    They are all that the record needs, if the mark in the caller's folder, here, is not seen.
    """
    os.environ.pop("OMP_NUM_THREADS", None)  # Ray's; the number of threads changes the last bits
    os.environ.update(threads)  # the caller's
    shared = (here / mark).exists()
    folder = here if shared else Path(tempfile.gettempdir(), mark.name)
    folder.mkdir(exist_ok=True)
    os.chdir(folder)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        run_dir = run(script, flags, seed, runs)[0]
    files = [] if shared else [*run_dir.glob("events.*"), run_dir / "result.json"]
    contents = {file: file.read_bytes() for file in [*files, runs / str(seed) / "wall_time"]}
    if not shared:
        shutil.rmtree(runs / str(seed))
    return printed.getvalue(), contents


def run_on_ray(ours: argparse.Namespace, flags: list[str], runs: Path) -> list[tuple[Path, float]]:
    """`run` for all seeds, on workers of Ray."""
    if not found("ray"):
        raise ValueError("learn.py: --ray needs Ray: pip install -r tests/requirements.txt")
    import ray

    cluster = {"address": ours.ray_address or "local", "include_dashboard": False}
    if not ours.ray_address:
        cluster["num_cpus"] = ours.jobs
    needs = {"num_cpus": 1, "num_gpus": ours.ray_gpus, "max_retries": 20}  # of one seed
    task = ray.remote(**needs, retry_exceptions=[ChildProcessError])(run_there)
    threads = {name: value for name, value in os.environ.items() if name.endswith("_NUM_THREADS")}
    waiting = [seed for seed in ours.seeds if not (runs / str(seed) / "wall_time").exists()]
    running = []
    runs.mkdir(parents=True, exist_ok=True)
    with ray.init(**cluster, logging_level="ERROR"), tempfile.TemporaryDirectory(dir=runs) as mark:
        here = Path.cwd(), Path(mark), threads
        while waiting or running:
            while waiting and len(running) < ours.jobs:
                running.append(task.remote(ours.script, flags, waiting.pop(0), runs, *here))
            ready, running = ray.wait(running)
            printed, contents = ray.get(ready[0])
            print(printed, end="", flush=True)
            for file, content in contents.items():
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(content)
    return [run(ours.script, flags, seed, runs) for seed in ours.seeds]  # ended: they are read


def clock(run_dir: str | Path) -> list[tuple[int, float]]:
    """(step, seconds of training until then), without the pauses between parts of a resumed run."""
    points = [(0, 0.0)]
    # One file for each part, by the time of its start.
    for file in sorted(Path(run_dir).glob("events.out.tfevents.*")):
        events = EventAccumulator(str(file), size_guidance={"scalars": 0}).Reload()
        if "charts/SPS" not in events.Tags()["scalars"]:
            continue  # it was killed before its first point
        start = events.FirstEventTimestamp()
        part = [(event.step, event.wall_time - start) for event in events.Scalars("charts/SPS")]
        # What came after the checkpoint was lost.
        points = [point for point in points if point[0] < part[0][0]]
        points += [(step, points[-1][1] + seconds) for step, seconds in part]
    return points


def games(events: EventAccumulator) -> list:
    """The returns of training games, as events; none, if it learned from recorded ones."""
    tag = "charts/episodic_return"
    return events.Scalars(tag) if tag in events.Tags()["scalars"] else []


def curve(events: EventAccumulator) -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
    """Training returns in POINTS equal parts of the run, and the evaluations: (step, return).

    Where nothing is played while training, the former are of evaluations, too.
    """
    evaluations = [(event.step, event.value) for event in events.Scalars("eval/episodic_return")]
    training = [(event.step, event.value) for event in games(events)] or evaluations
    edges = np.linspace(0, evaluations[-1][0], POINTS + 1)
    points = []
    for low, high in zip(edges, edges[1:]):
        values = [value for step, value in training if low < step <= high]
        if values:
            points.append((round(high), float(np.mean(values))))
    return points, evaluations


def solved(events, times: list[tuple[int, float]], level: float) -> tuple[int, float] | None:
    """First step at which the last 20 training episodes have a mean of level, and the minutes."""
    episodes = games(events)
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


def parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str], Path]:
    """Our own flags, the script's, and the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("script", help="its file name without .py")
    parser.add_argument("--seeds", type=seeds, default=seeds("1-20"), help="first-last")
    parser.add_argument("--keep", action="store_true", help="the seeds that the record has")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--ray", action="store_true", help="on workers of Ray, on this machine")
    parser.add_argument("--ray-address", help="or of a cluster that exists: auto, or host:port")
    parser.add_argument("--ray-gpus", type=float, default=0, help="of a run; may be a fraction")
    parser.add_argument("--name", default="", help="of the record, if not the environment's id")
    parser.add_argument("--variant", help="what is different, in a few words")
    parser.add_argument("--solved", type=float, help="record when training returns reached this")
    ours, flags = parser.parse_known_args(arguments)
    env_id = dict(zip(flags, flags[1:])).get("--env-id") or default_environment(ours.script)
    name = f"{ours.script}__{ours.name or env_id.replace('/', '-')}"
    return ours, flags, HERE / "results" / f"{name}.csv"


def next_in_queue() -> list[str] | None:
    """The arguments on the first line of queue.txt whose record lacks seeds."""
    for line in QUEUE.read_text().splitlines():
        arguments = shlex.split(line, comments=True)
        if arguments:
            ours, flags, record = parse(arguments)
            if set(ours.seeds) - set(recorded(ours, flags, record)):
                return [*arguments, "--keep"]
    return None


def command_of(ours: argparse.Namespace, flags: list[str]) -> str:
    return shlex.join(["python", f"cleanrl_style/{ours.script}.py", *flags, "--seed", "SEED"])


def solved_line(ours: argparse.Namespace) -> str | None:
    if ours.solved is not None:
        return f"the mean of 20 training episodes is {ours.solved:g} or more"


def recorded(ours: argparse.Namespace, flags: list[str], record: Path) -> dict[int, list[list]]:
    """The rows, by their seed, that the record of this command has."""
    head, rows = read_csv(record) if record.exists() else ({}, [])
    found = {}
    asked = command_of(ours, flags), solved_line(ours)
    if (head.get("command"), head.get("solved")) == asked:
        for row in rows:
            found.setdefault(int(row["seed"]), []).append(list(row.values()))
    return found


def main(arguments: list[str]) -> None:
    if arguments == ["--next"]:
        arguments = next_in_queue()
        if arguments is None:
            print(f"everything in {QUEUE} has its record")
            return
        print(shlex.join(arguments), flush=True)
    ours, flags, record = parse(arguments)
    old, rows = read_csv(record) if record.exists() else ({}, [])
    kept = recorded(ours, flags, record) if ours.keep else {}
    if {int(row["seed"]) for row in rows} - {*kept, *ours.seeds}:
        sys.exit(f"{record} has more seeds: remove it first, or give another --name")
    runs = Path("runs") / "learn" / record.stem
    ours.seeds = [seed for seed in ours.seeds if seed not in kept]
    if not ours.seeds:
        return print(record)
    seeds_of_record = sorted([*kept, *ours.seeds])
    begun = runs / "command"  # of what is in the folder
    if begun.exists() and begun.read_text() != command_of(ours, flags):
        sys.exit(f"{runs} has runs of another command: remove it first, or give another --name")
    runs.mkdir(parents=True, exist_ok=True)
    begun.write_text(command_of(ours, flags))
    try:
        if ours.ray or ours.ray_address:
            results = run_on_ray(ours, flags, runs)
        else:
            with ThreadPoolExecutor(ours.jobs) as pool:
                one = functools.partial(run, ours.script, flags, runs=runs)
                results = list(pool.map(one, ours.seeds))
    except (ValueError, ConnectionError) as error:
        print(getattr(error, "cause", error), file=sys.stderr)  # a cause came by Ray
        sys.exit(2)
    packages = [f"{package} {version(package)}" for package in PACKAGES if found(package)]
    at_a_time = f"{ours.jobs} run{'s' if ours.jobs > 1 else ''} at a time"
    machine = f"{processor()}, {os.cpu_count()} cores, {at_a_time}"
    if ours.ray_address:
        machine = f"a cluster of Ray, up to {at_a_time}"
    head = {
        "command": command_of(ours, flags),
        "variant": ours.variant or old.get("variant"),
        "note": old.get("note"),
        "seeds": f"{seeds_of_record[0]}-{seeds_of_record[-1]}",
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine,
        "versions": f"Python {platform.python_version()}, " + ", ".join(packages),
        "wall time": "",
        "solved": solved_line(ours),
    }
    if kept:
        for key in ("date", "machine", "versions"):
            if not old[key].endswith(head[key]):
                head[key] = f"{old[key]}; seeds {', '.join(map(str, ours.seeds))}: {head[key]}"
    rows = [row for seed in kept for row in kept[seed]]
    for seed, (run_dir, wall) in zip(ours.seeds, results):
        events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
        for kind, points in zip(("train", "eval"), curve(events)):
            rows += [[seed, step, f"{value:.6g}", kind] for step, value in points]
        step = points[-1][0]
        last = [event.value for event in games(events)[-20:]]
        if last:
            rows.append([seed, step, f"{np.mean(last):.6g}", "last20"])
        rows.append([seed, step, f"{wall:.1f}", "wall"])
        if ours.solved is not None and (reached := solved(events, clock(run_dir), ours.solved)):
            rows.append([seed, reached[0], f"{reached[1]:.2f}", "solved"])
    walls = [float(row[2]) for row in rows if row[3] == "wall"]
    longest = f"longest {np.nanmax(walls):.1f} s, from start-up to evaluation"
    head["wall time"] = f"median {np.nanmedian(walls):.1f} s, {longest}"
    rows = [["seed", "step", "return", "kind"], *sorted(rows, key=lambda row: int(row[0]))]
    write_csv(record, {key: value for key, value in head.items() if value}, rows)
    print(record)


if __name__ == "__main__":
    main(sys.argv[1:])
