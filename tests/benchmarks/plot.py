"""Draws the records in results/, and writes the tables of README.md and results/speed.md: python tests/benchmarks/plot.py

Thin lines are seeds, the thick line is their mean, the band its 95% bootstrap interval over the seeds.
"""

import argparse
import csv
import re
from pathlib import Path
from statistics import median

import numpy as np

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = Path(__file__).resolve().parent / "results"

ALGORITHMS = {
    "reinforce_cartpole": "REINFORCE with a baseline (Williams 1992); flat observations, discrete actions",
    "dqn_cartpole": "Deep Q-learning, double if asked (Mnih et al. 2015, van Hasselt et al. 2016); flat, discrete",
    "dqn_atari": "Deep Q-learning from pixels",
    "ppo_cartpole": "Proximal policy optimisation (PPO, Schulman et al. 2017); flat, discrete",
    "ppo_continuous": "PPO for continuous actions; flat observations",
    "ppo_atari": "PPO from pixels",
}
COLORS = {"reinforce": ("REINFORCE", "tab:green"), "dqn": ("DQN", "tab:orange"), "ppo": ("PPO", "tab:blue")}

# Each picture: its file, and per panel the environment, what others published as level lines, and the y axis.
PICTURES = {
    "classic_control.png": {
        "CartPole-v1": ({"solved: 475": 475}, (0, 520)),
        "Acrobot-v1": ({"CleanRL's PPO, 500k steps: -86.4": -86.4}, (-510, -50)),
        "MountainCar-v0": ({"RL Zoo's PPO, 1M steps: -110.4": -110.4}, (-205, -80)),
        "Pendulum-v1": ({"RL Zoo's PPO, 100k steps: -172": -172}, (-1700, 0)),
    },
    "atari.png": {
        "ALE-Pong-v5": ({"CleanRL's PPO, 10M steps: 20.4": 20.4}, (-22, 23)),
    },
}


def read(name: str) -> tuple[dict[str, str], dict[int, list[tuple[int, float]]], dict[int, float]]:
    """A record's head, its training curves by seed, its evaluations by seed."""
    head, rows = read_csv(RESULTS / f"{name}.csv")
    curves, evaluations = {}, {}
    for row in rows:
        if row["kind"] == "train":
            curves.setdefault(int(row["seed"]), []).append((int(row["step"]), float(row["return"])))
        elif row["kind"] == "eval":
            evaluations[int(row["seed"])] = float(row["return"])
    return head, curves, evaluations


def read_csv(path: Path) -> tuple[dict[str, str], list[dict[str, str]]]:
    """The comment lines at the head, and the rows."""
    lines = path.read_text().splitlines()
    head = dict(line[2:].split(": ", 1) for line in lines if line.startswith("# "))
    return head, list(csv.DictReader(line for line in lines if not line.startswith("# ")))


def records() -> list[str]:
    """The names of all records, in the order of the scripts."""
    names = [path.stem for path in RESULTS.glob("*.csv")]
    return sorted(names, key=lambda name: (list(ALGORITHMS).index(name.split("__")[0]), name))


def interval(values: np.ndarray, samples: int = 2000) -> np.ndarray:
    """95% bootstrap interval of the mean over the first axis, the seeds."""
    choices = np.random.default_rng(0).integers(len(values), size=(samples, len(values)))
    return np.percentile(values[choices].mean(1), [2.5, 97.5], axis=0)


def summary(name: str) -> str:
    """For example '497.1 (491.2 to 499.8)': mean of the evaluations and the range of all seeds."""
    _, _, evaluations = read(name)
    values = list(evaluations.values())
    return f"{np.mean(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def last20(name: str) -> str:
    """For example '18.8 to 19.4 in the last 20 training games', over the seeds; '' if the record is not about that."""
    head, rows = read_csv(RESULTS / f"{name}.csv")
    values = [float(row["return"]) for row in rows if row["kind"] == "last20"]
    return f"{min(values):.1f} to {max(values):.1f} in the last 20 training games" if "solved" in head else ""


# ---- Tables ---------------------------------------------------------------------------------------------------------


def results_table() -> str:
    """One row for each record."""
    lines = [
        "| Environment | Script | Return | 95% interval | Worst to best seed | Seeds | Steps | Time |",
        "|-|-|-:|-|-|-:|-:|-:|",
    ]
    environments = [environment for panels in PICTURES.values() for environment in panels]

    def place(name: str) -> int:
        return next(i for i, environment in enumerate(environments) if name.split("__")[1].startswith(environment))

    for name in sorted(records(), key=place):
        script, title = name.split("__")
        head, curves, evaluations = read(name)
        values = np.array(list(evaluations.values()))
        low, high = interval(values)
        steps = max(int(row["step"]) for row in read_csv(RESULTS / f"{name}.csv")[1])
        seconds = float(re.search(r"median ([\d.]+) s", head["wall time"])[1])
        time = f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 60:.0f} min"
        lines.append(
            f"| {title.replace('ALE-', '')} | {script}.py | **{values.mean():.1f}** | {low:.1f} to {high:.1f} "
            f"| {values.min():.1f} to {values.max():.1f} | {len(values)} | {round(steps, -3) // 1000:,}k | {time} |"
        )
    return "\n".join(lines)


def speeds(group: str) -> tuple[dict[str, str], dict[str, list[tuple[float, float]]]]:
    """The head, and for each program (steps/s, GB) in all rounds."""
    head, rows = read_csv(RESULTS / "speed" / f"{group}.csv")
    programs = {}
    for row in rows:
        programs.setdefault(row["name"], []).append((float(row["steps/s"]), float(row["memory"])))
    return head, programs


def ratio(ours: list[tuple[float, float]], theirs: list[tuple[float, float]], part: int) -> float:
    """Median over the rounds, of the speeds (part 0) or of the memory (part 1)."""
    return median(a[part] / b[part] for a, b in zip(ours, theirs))


def scripts_table() -> str:
    """One row for each script; speed and memory beside its peers, where they were measured."""
    lines = [
        "| Script | Algorithm | Lines | Speed, × CleanRL | × SB3 | Memory, × CleanRL |",
        "|-|-|-:|-:|-:|-:|",
    ]
    for script, algorithm in ALGORITHMS.items():
        group = script.removesuffix("_cartpole")
        programs = speeds(group)[1] if (RESULTS / "speed" / f"{group}.csv").exists() else {}
        (ours,) = [rounds for name, rounds in list(programs.items()) if name.startswith(f"{script}.py")][:1] or [None]
        cells = []
        for peer, part in (("CleanRL", 0), ("Stable-Baselines3", 0), ("CleanRL", 1)):
            theirs = [rounds for name, rounds in programs.items() if name.startswith(peer)]
            cells.append(f"{ratio(ours, theirs[0], part):.{1 + part}f}" if theirs else "–")
        count = len((ROOT / "cleanrl_style" / f"{script}.py").read_text().splitlines())
        lines.append(f"| [{script}.py](cleanrl_style/{script}.py) | {algorithm} | {count} | {' | '.join(cells)} |")
    return "\n".join(lines)


def times_the_tutorial() -> str:
    """For example '14 times': the speed of REINFORCE's default run by that of the usual tutorial's program."""
    tutorial, default, *_ = speeds("reinforce")[1].values()
    return f"{ratio(default, tutorial, 0):.0f} times"


def speed_page() -> str:
    """All measurements of speed, one table for each group."""
    parts = [
        "# Speed\n\nEnvironment steps per second of whole trainings, measured by [speed.py](../speed.py), which says how, and "
        "with which settings. Times the first row: median over the rounds. Memory: peak of the whole process. The floor is "
        "the speed that is left if only the emulator and the networks' matrix products, at the machine's best rate, take "
        "time."
    ]
    for group in sorted(path.stem for path in (RESULTS / "speed").glob("*.csv")):
        head, programs = speeds(group)
        lines = [f"## {group}", "", ". ".join(f"{key}: {value}" for key, value in head.items()) + ".", ""]
        lines += ["| | steps/s, median | lowest to highest | times the first row | memory, GB |", "|-|-:|-:|-:|-:|"]
        first = next(iter(programs.values()))
        for name, rounds in programs.items():
            values, memory = [speed for speed, _ in rounds], max(gigabytes for _, gigabytes in rounds)
            lines.append(
                f"| {name} | {median(values):,.0f} | {min(values):,.0f} to {max(values):,.0f} "
                f"| {ratio(rounds, first, 0):.1f} | {'' if np.isnan(memory) else f'{memory:.2f}'} |"
            )
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def with_tables(readme: str) -> str:
    """README.md with its tables as the records say. Each stands after a comment with its name."""
    for name, table in (("scripts", scripts_table()), ("results", results_table())):
        readme, count = re.subn(rf"(<!-- {name} -->\n\n)(?:\|.*\n)*", lambda found: f"{found[1]}{table}\n", readme)
        assert count == 1, f"README.md has no place for the table of {name}"
    return readme


# ---- Pictures -------------------------------------------------------------------------------------------------------


def draw(file: str, panels: dict) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    rows, columns = -(-len(panels) // 2), min(len(panels), 2)
    figure, axes = plt.subplots(rows, columns, figsize=(4.4 * columns, 3.1 * rows), layout="constrained", squeeze=False)
    for axis, (title, (levels, limits)) in zip(axes.flat, panels.items()):
        ends = []
        for algorithm, (label, color) in COLORS.items():
            for name in (name for name in records() if re.fullmatch(rf"{algorithm}_\w+__{title}", name)):
                _, curves, _ = read(name)
                ends.append(min(points[-1][0] for points in curves.values()))
                steps = np.linspace(0, ends[-1], 101)[1:]
                values = np.array([np.interp(steps, *np.array(points).T) for points in curves.values()])
                axis.plot(steps, values.T, color=color, linewidth=0.4, alpha=0.3)
                axis.fill_between(steps, *interval(values), color=color, alpha=0.25, linewidth=0)
                axis.plot(steps, values.mean(0), color=color, linewidth=2, label=f"{label}, {len(curves)} seeds")
        for label, level in levels.items():
            axis.axhline(level, color="black", linewidth=0.8, linestyle="--")
            axis.annotate(label, (1, level), (0, 3), ("axes fraction", "data"), textcoords="offset points", ha="right", fontsize=8,
                          bbox={"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 1}, zorder=3)  # fmt: skip
        axis.set(title=title.replace("ALE-", ""), xlim=(0, max(ends)), ylim=limits)
        axis.xaxis.set_major_formatter(lambda x, _: f"{x / 1000:.0f}k" if x else "0")
        axis.legend(loc="lower right", fontsize=9, frameon=False)
    figure.supxlabel("environment steps", fontsize=11)
    figure.supylabel("training return", fontsize=11)
    figure.savefig(RESULTS / file, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    for file, panels in PICTURES.items():
        draw(file, panels)
    (ROOT / "README.md").write_text(with_tables((ROOT / "README.md").read_text()))
    (RESULTS / "speed.md").write_text(speed_page())
    for name in records():
        head, _, _ = read(name)
        print(f"{name}: {summary(name)}; {last20(name)}; wall time {head['wall time']}")
