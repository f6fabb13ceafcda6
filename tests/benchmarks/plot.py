"""Draws the records in results/, writes the tables of README.md and results/speed.md: python tests/benchmarks/plot.py

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
    "dqn_atari": "Deep Q-learning from pixels (Mnih et al. 2015)",
    "ppo_cartpole": "Proximal policy optimisation (PPO, Schulman et al. 2017); flat, discrete",
    "ppo_continuous": "PPO for continuous actions (Schulman et al. 2017); flat observations",
    "ppo_atari": "PPO from pixels (Schulman et al. 2017)",
}
# What others published, with the steps it took: CleanRL's training returns (docs.cleanrl.dev), and the greedy policies
# of RL Baselines3 Zoo (its benchmark.md).
PUBLISHED = {
    "dqn_cartpole__CartPole-v1": "CleanRL 488.7 (500k), Zoo 500 (50k)",
    "ppo_cartpole__CartPole-v1": "CleanRL 490.0 (500k), Zoo 500 (100k)",
    "dqn_cartpole__Acrobot-v1": "CleanRL -91.5 (500k), Zoo -76.6 (100k)",
    "ppo_cartpole__Acrobot-v1": "CleanRL -86.4 (500k), Zoo -73.5 (1M)",
    "dqn_cartpole__MountainCar-v0": "CleanRL -195.0 (500k), Zoo -100.8 (120k)",
    "ppo_cartpole__MountainCar-v0": "CleanRL -200.0 (500k), Zoo -110.4 (1M)",
    "ppo_continuous__Pendulum-v1": "Zoo -172 (100k)",
    "ppo_continuous__HalfCheetah-v5": "CleanRL 1443, Zoo 5819 (1M, older versions)",
    "ppo_continuous__Hopper-v5": "CleanRL 2383, Zoo 2410 (1M, older versions)",
    "ppo_continuous__Walker2d-v5": "CleanRL 2288, Zoo 3479 (1M, older versions)",
    "dqn_atari__ALE-Pong-v5": "CleanRL 20.3, Zoo 20.6 (10M)",
    "dqn_atari__ALE-Breakout-v5": "Dopamine 18.9 with Adam, 6.7 with RMSProp (1M, sticky actions)",
    "ppo_atari__ALE-Pong-v5": "CleanRL 20.4, Zoo 21.0 (10M)",
    "ppo_atari__ALE-Breakout-v5": "CleanRL 414.7, Zoo 398 (10M)",
}
# Records of other settings have a name with one of these at its end; in the table it means:
VARIANTS = {"-textbook": ", textbook form", "-uncut": ", gradients not cut, constant learning rate", "-float32": ", float32"}
COLORS = {"reinforce": ("REINFORCE", "tab:green"), "dqn": ("DQN", "tab:orange"), "ppo": ("PPO", "tab:blue")}

# Mean training return of Dopamine's DQN on Breakout, with sticky actions, over 5 seeds, in each 250k steps, of which the
# middle is given here: github.com/google/dopamine, commit 5873f54, baselines/atari/data/breakout.json.
MIDDLES = [125_000, 375_000, 625_000, 875_000]
DOPAMINE = {
    "Dopamine's DQN, Adam": list(zip(MIDDLES, [1.79, 6.52, 15.23, 18.86])),
    "Dopamine's DQN, RMSProp": list(zip(MIDDLES, [1.64, 3.06, 3.94, 6.69])),
}

# Each picture: its file, and per panel the environment, a line with a label, where that stands, and the y axis. In place
# of the line, there may be curves by their labels.
PICTURES = {
    "classic_control.png": {
        "CartPole-v1": (475, "solved: 475", "left", "bottom", (0, 520)),
        "Acrobot-v1": (-86.4, "CleanRL's PPO, 500k steps: -86.4", "right", "top", (-510, -50)),
        "MountainCar-v0": (-110.4, "RL Zoo's PPO, 1M steps: -110.4", "right", "bottom", (-205, -80)),
        "Pendulum-v1": (-172, "RL Zoo's PPO, 100k steps: -172", "right", "bottom", (-1700, 0)),
    },
    "mujoco.png": {
        "HalfCheetah-v5": (1443, "CleanRL's PPO, 1M steps: 1443", "right", "top", (-700, 6000)),
        "Hopper-v5": (2383, "CleanRL's PPO, 1M steps: 2383", "left", "bottom", (0, 3600)),
        "Walker2d-v5": (2288, "CleanRL's PPO, 1M steps: 2288", "left", "bottom", (0, 5400)),
    },
    "atari.png": {
        "ALE-Pong-v5": (20.4, "CleanRL's PPO, 10M steps: 20.4", "left", "bottom", (-22, 24)),
        "ALE-Breakout-v5": (DOPAMINE, "", "left", "bottom", (0, 140)),
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
    """For example '497.1 (491.2 to 499.8)': mean of the evaluations and the range of all seeds, if there are several."""
    _, _, evaluations = read(name)
    values = list(evaluations.values())
    if len(values) == 1:
        return f"{values[0]:.1f}"
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
        "| Environment | Script | Return | 95% interval | Worst to best seed | Seeds | Steps | Time | Others (steps) |",
        "|-|-|-:|-|-|-:|-:|-:|-|",
    ]
    environments = [environment for panels in PICTURES.values() for environment in panels]

    def place(name: str) -> int:
        return next(i for i, environment in enumerate(environments) if name.split("__")[1].startswith(environment))

    for name in sorted(records(), key=place):
        script, title = name.split("__")
        head, curves, evaluations = read(name)
        values = np.array(list(evaluations.values()))
        low, high = interval(values)
        band = f"{low:.1f} to {high:.1f}" if len(values) >= 5 else ""  # of three, it is from worst to best
        extremes = f"{values.min():.1f} to {values.max():.1f}" if len(values) > 1 else ""
        title = title.replace("ALE-", "ALE/")
        for ending, meaning in VARIANTS.items():
            title = title.replace(ending, meaning)
        steps = max(int(row["step"]) for row in read_csv(RESULTS / f"{name}.csv")[1])
        seconds = float(re.search(r"median ([\d.]+) s", head["wall time"])[1])
        time = f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 60:.0f} min"
        lines.append(
            f"| {title} | {script}.py | **{values.mean():.1f}** | {band} | {extremes} | {len(values)} | {round(steps, -3) // 1000:,}k | {time} | {PUBLISHED.get(name, '')} |"
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
        "| Script | Algorithm | Lines | Speed, × CleanRL | Speed, × SB3 | Memory, × CleanRL; SB3 |",
        "|-|-|-:|-:|-:|-:|",
    ]
    for script, algorithm in ALGORITHMS.items():
        group = script.removesuffix("_cartpole")
        programs = speeds(group)[1]
        variants = [name for name in programs if name.startswith(f"{script}.py")]
        cells = []
        for peer, part in (("CleanRL", 0), ("Stable-Baselines3", 0), ("CleanRL", 1), ("Stable-Baselines3", 1)):
            theirs = next((rounds for name, rounds in programs.items() if name.startswith(peer)), None)
            ratios = [f"{ratio(programs[name], theirs, part):.{1 + part}f}" for name in variants] if theirs else ["–"]
            others = [f"{name.split(', ')[1]}: {number}" for name, number in zip(variants[1:], ratios[1:])]
            cells.append(ratios[0] + (f" ({', '.join(others)})" if others and not part else ""))
        cells[2:] = ["; ".join(cells[2:]) if cells[2] != "–" else "–"]
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
        "# Speed\n\nEnvironment steps per second of whole trainings, measured by [speed.py](../speed.py), which says how, "
        "and with which settings. Times the first row: median over the rounds of the ratio in each round. Memory: peak of "
        "the whole process. The floor is the speed that is left if only the emulator and the networks' matrix products, at "
        "the machine's best rate, take time. On CartPole, CleanRL's DQN has one environment, Stable-Baselines3's and ours "
        "have ten; on Breakout, theirs have one, ours eight. All others have the same number."
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
        readme, count = re.subn(rf"(<!-- {name} -->\n\n)(?:\|.*\n)*\n?", lambda found: f"{found[1]}{table}\n\n", readme)
        assert count == 1, f"README.md has no place for the table of {name}"
    return readme


# ---- Pictures -------------------------------------------------------------------------------------------------------


def draw(file: str, panels: dict) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    columns = 3 if len(panels) == 3 else min(len(panels), 2)
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.4 * columns, 3.1 * rows), layout="constrained", squeeze=False)
    for axis, (title, (level, text, side, edge, limits)) in zip(axes.flat, panels.items()):
        ends = []
        for algorithm, (label, color) in COLORS.items():
            for name in (name for name in records() if re.fullmatch(rf"{algorithm}_\w+__{title}", name)):
                _, curves, _ = read(name)
                ends.append(min(points[-1][0] for points in curves.values()))
                steps = np.linspace(0, ends[-1], 101)[1:]
                values = np.array([np.interp(steps, *np.array(points).T) for points in curves.values()])
                axis.plot(steps, values.T, color=color, linewidth=0.4, alpha=0.3)
                axis.fill_between(steps, *interval(values), color=color, alpha=0.25, linewidth=0)
                axis.plot(steps, values.mean(0), color=color, linewidth=2, label=f"{label}, {len(curves)} seed{'s' * (len(curves) > 1)}")
            for name in (name for name in records() if re.fullmatch(rf"{algorithm}_\w+__{title}-uncut", name)):
                _, curves, _ = read(name)
                for points in curves.values():
                    ends.append(points[-1][0])
                    axis.plot(*zip(*points), color=color, linewidth=1, label=f"{label}{VARIANTS['-uncut']}")
        if isinstance(level, dict):
            for (name, points), style in zip(level.items(), ("--", ":")):
                axis.plot(*zip(*points), color="black", linewidth=0.8, linestyle=style, label=name)
            level = 0
        else:
            axis.axhline(level, color="black", linewidth=0.8, linestyle="--")
        place = (0.01 if side == "left" else 0.99, level), (0, 2 if edge == "bottom" else -3)
        axis.annotate(text, place[0], place[1], ("axes fraction", "data"), "offset points", ha=side, va=edge, fontsize=8)
        axis.set(title=title.replace("ALE-", ""), xlim=(0, max(ends)), ylim=limits)
        axis.xaxis.set_major_formatter(lambda x, _: f"{x / 1e6:g}M" if x >= 1e6 else f"{x / 1000:.0f}k" if x else "0")
        axis.legend(loc="upper left" if "Breakout" in title else "lower right", fontsize=9, frameon=False)
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
