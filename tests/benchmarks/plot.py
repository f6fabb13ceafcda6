"""Draws the recorded learning curves, and prints what README.md says of them: python tests/benchmarks/plot.py

Thin lines are seeds, the thick line is their mean, the band its 95% bootstrap interval over the seeds.
"""

import argparse
import csv
from pathlib import Path

import numpy as np

RESULTS = Path(__file__).resolve().parent / "results"

# Each picture: its file, and per panel its title, its records with their labels, its reference levels, its y axis.
PICTURES = {
    "reinforce_cartpole.png": [
        (
            "CartPole-v1",
            {
                "reinforce_cartpole__CartPole-v1": "default",
                "reinforce_cartpole__CartPole-v1-textbook": "textbook form",
            },
            {"solved: 475": 475},
            (0, 520),
        ),
        ("Acrobot-v1", {"reinforce_cartpole__Acrobot-v1": "400k steps"}, {"-100": -100}, (-520, -50)),
    ],
    "dqn_cartpole.png": [
        ("CartPole-v1", {"dqn_cartpole__CartPole-v1": "default"}, {"solved: 475": 475}, (0, 520)),
        ("Acrobot-v1", {"dqn_cartpole__Acrobot-v1": "100k steps"}, {"-100": -100}, (-520, -50)),
    ],
    "ppo_cartpole.png": [
        ("CartPole-v1", {"ppo_cartpole__CartPole-v1": "default"}, {"solved: 475": 475}, (0, 520)),
        ("Acrobot-v1", {"ppo_cartpole__Acrobot-v1": "300k steps"}, {"-100": -100}, (-520, -50)),
        ("MountainCar-v0", {"ppo_cartpole__MountainCar-v0": "300k steps"}, {"solved: -110": -110}, (-205, -90)),
    ],
    "ppo_continuous.png": [
        ("Pendulum-v1", {"ppo_continuous__Pendulum-v1": "default"}, {"-200": -200}, (-1700, 0)),
    ],
    "ppo_atari.png": [
        ("ALE/Pong-v5", {"ppo_atari__ALE-Pong-v5": "PPO"}, {"18": 18}, (-22, 22)),
    ],
}


def read(name: str) -> tuple[dict[str, str], dict[int, list[tuple[int, float]]], dict[int, float]]:
    """A record's head, its training curves by seed, its evaluations by seed."""
    lines = (RESULTS / f"{name}.csv").read_text().splitlines()
    head = dict(line[2:].split(": ", 1) for line in lines if line.startswith("# "))
    curves, evaluations = {}, {}
    for row in csv.DictReader(line for line in lines if not line.startswith("# ")):
        if row["kind"] == "train":
            curves.setdefault(int(row["seed"]), []).append((int(row["step"]), float(row["return"])))
        elif row["kind"] == "eval":
            evaluations[int(row["seed"])] = float(row["return"])
    return head, curves, evaluations


def interval(values: np.ndarray, samples: int = 2000) -> np.ndarray:
    """95% bootstrap interval of the mean over the first axis, the seeds."""
    choices = np.random.default_rng(0).integers(len(values), size=(samples, len(values)))
    return np.percentile(values[choices].mean(1), [2.5, 97.5], axis=0)


def summary(name: str) -> str:
    """For example '497.1 (491.2 to 499.8), 20 seeds': mean of the evaluations and the range of all seeds."""
    _, _, evaluations = read(name)
    values = list(evaluations.values())
    return f"{np.mean(values):.1f} ({min(values):.1f} to {max(values):.1f}), {len(values)} seeds"


def last20(name: str) -> str:
    """For example '18.8 to 19.4 in the last 20 training games', over the seeds; '' if the record is not about that."""
    lines = (RESULTS / f"{name}.csv").read_text().splitlines()
    if not any(line.startswith("# solved: ") for line in lines):
        return ""
    values = [float(line.split(",")[2]) for line in lines if line.endswith(",last20")]
    return f"{min(values):.1f} to {max(values):.1f} in the last 20 training games"


def draw(file: str, panels: list) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(1, len(panels), figsize=(4.6 * len(panels), 3.2), layout="constrained")
    for axis, (title, records, levels, limits) in zip(np.atleast_1d(axes), panels):
        for color, (name, label) in zip(["tab:blue", "tab:orange", "tab:green"], records.items()):
            _, curves, _ = read(name)
            end = min(points[-1][0] for points in curves.values())
            steps = np.linspace(0, end, 101)[1:]
            values = np.array([np.interp(steps, *np.array(points).T) for points in curves.values()])
            axis.plot(steps, values.T, color=color, linewidth=0.4, alpha=0.35)
            axis.fill_between(steps, *interval(values), color=color, alpha=0.3, linewidth=0)
            axis.plot(steps, values.mean(0), color=color, linewidth=2, label=f"{label} ({len(curves)} seeds)")
        for label, level in levels.items():
            axis.axhline(level, color="black", linewidth=0.8, linestyle="--")
            axis.annotate(label, (0, level), (2, -3), textcoords="offset points", va="top", fontsize=8)
        axis.set(title=title, xlabel="environment steps", xlim=(0, end), ylim=limits)
        axis.xaxis.set_major_formatter(lambda x, _: f"{x / 1000:.0f}k" if x else "0")
        axis.legend(loc="lower right", fontsize=8, frameon=False)
    np.atleast_1d(axes)[0].set_ylabel("training return")
    figure.savefig(RESULTS / file, dpi=150)
    print(RESULTS / file)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    for file, panels in PICTURES.items():
        if all((RESULTS / f"{name}.csv").exists() for _, records, _, _ in panels for name in records):
            draw(file, panels)
    for record in sorted(RESULTS.glob("*.csv")):
        head, _, _ = read(record.stem)
        print(f"{record.stem}: {summary(record.stem)}; {last20(record.stem)}; wall time {head['wall time']}")
