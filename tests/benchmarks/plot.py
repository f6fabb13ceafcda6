"""Draws the records in results/, and writes the tables of README.md and of results/README.md.

    python tests/benchmarks/plot.py

Tables stand between comments such as <!-- results --> and <!-- end -->. All other text on these
pages is written by hand and stays. Nothing here names a script: what a row says comes from the
script's docstring, its records, and PUBLISHED and SPEED in tests/test_<script>.py.

PUBLISHED = {"CartPole-v1": "CleanRL 490.0 (500k), ..."} has what others published, by the name of
the record after <script>__. The first of these that is recorded is the script's row in README.md;
without any, it is the record of the default environment.
"""

import argparse
import ast
import functools
import re
import textwrap
import zlib
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import ale_py
import gymnasium as gym
import numpy as np
from learn import SCRIPTS, constant, default_environment, read_csv

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = Path(__file__).resolve().parent / "results"

gym.register_envs(ale_py)

# One picture and one headline for each, told by where Gymnasium finds the environment.
GROUPS = {"classic_control": "Classic control", "mujoco": "MuJoCo", "ale_py": "Atari"}
OTHERS = "Other environments"

# Dashed and dotted lines in the pictures: a level, or a curve of (step, return). "Solved" is
# Gymnasium's. The others are published: CleanRL's training returns (docs.cleanrl.dev), the greedy
# policies of RL Baselines3 Zoo (its benchmark.md), and Dopamine's mean training return over 5 seeds
# in each 250k steps, here at their middle (github.com/google/dopamine, commit 5873f54,
# baselines/atari/data/breakout.json). This is also the order of the environments.
MIDDLES = [125_000, 375_000, 625_000, 875_000]
LINES = {
    "CartPole-v1": {"solved: 475": 475},
    "Acrobot-v1": {"CleanRL's PPO, 500k steps: -86.4": -86.4},
    "MountainCar-v0": {"RL Zoo's PPO, 1M steps: -110.4": -110.4},
    "Pendulum-v1": {"RL Zoo's PPO, 100k steps: -172": -172},
    "HalfCheetah-v5": {"CleanRL's PPO, 1M steps: 1443": 1443},
    "Hopper-v5": {"CleanRL's PPO, 1M steps: 2383": 2383},
    "Walker2d-v5": {"CleanRL's PPO, 1M steps: 2288": 2288},
    "ALE/Pong-v5": {"CleanRL's PPO, 10M steps: 20.4": 20.4},
    "ALE/Breakout-v5": {
        "Dopamine's DQN, Adam": list(zip(MIDDLES, [1.79, 6.52, 15.23, 18.86])),
        "Dopamine's DQN, RMSProp": list(zip(MIDDLES, [1.64, 3.06, 3.94, 6.69])),
    },
}


# ---- Records ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Record:
    name: str  # <script>__<environment, or another name>
    head: dict[str, str]
    curves: dict[int, list[tuple[int, float]]]  # (step, training return) by seed
    evaluations: dict[int, float]  # return by seed
    last20: list[float]  # mean of the last 20 training episodes of each seed
    steps: int  # at the end

    @property
    def script(self) -> str:
        return self.name.split("__")[0]

    @property
    def env_id(self) -> str:
        found = re.search(r"--env-id (\S+)", self.head["command"])
        return found[1] if found else default_environment(self.script)

    @property
    def variant(self) -> str:
        return self.head.get("variant", "")


def read(name: str) -> Record:
    head, rows = read_csv(RESULTS / f"{name}.csv")
    curves, evaluations, last20 = {}, {}, []
    for row in rows:
        seed, step, value = int(row["seed"]), int(row["step"]), float(row["return"])
        if row["kind"] == "train":
            curves.setdefault(seed, []).append((step, value))
        elif row["kind"] == "eval":
            evaluations[seed] = value
        elif row["kind"] == "last20":
            last20.append(value)
    steps = max(int(row["step"]) for row in rows)
    return Record(name, head, curves, evaluations, last20, steps)


def records() -> list[Record]:
    """All of them: by script, the one that README.md shows first, variants last."""
    found = [read(path.stem) for path in RESULTS.glob("*.csv")]
    return sorted(found, key=lambda record: (scripts().index(record.script), place(record)))


def place(record: Record) -> tuple:
    published = list(constant(record.script, "PUBLISHED"))
    name = record.name.split("__")[1]
    first = published.index(name) if name in published else len(published)
    other = record.env_id != default_environment(record.script)
    return bool(record.variant), first, other, name


def interval(values: np.ndarray, samples: int = 2000) -> np.ndarray:
    """95% bootstrap interval of the mean over the first axis, the seeds."""
    size = (samples, len(values))
    choices = np.random.default_rng(0).integers(len(values), size=size)
    return np.percentile(values[choices].mean(1), [2.5, 97.5], axis=0)


def summary(record: Record) -> str:
    """For example '497.1 (491.2 to 499.8)': the mean of the evaluations, worst to best seed."""
    values = list(record.evaluations.values())
    if len(values) == 1:
        return f"{values[0]:z.1f}"
    return f"{np.mean(values):z.1f} ({min(values):z.1f} to {max(values):z.1f})"


def last20(record: Record) -> str:
    """For example '18.8 to 19.4 in the last 20 training games', if the record is about that."""
    if "solved" not in record.head:
        return ""
    low, high = min(record.last20), max(record.last20)
    return f"{low:z.1f} to {high:z.1f} in the last 20 training games"


def short(number: int) -> str:
    """A number of steps: 104k, 1M, 1.5M, in which few are left out."""
    thousands = round(number / 1000)
    return f"{thousands}k" if thousands < 999.5 else f"{thousands / 1000:.3g}M"


def wall_time(record: Record) -> str:
    seconds = float(re.search(r"median ([\d.]+) s", record.head["wall time"])[1])
    return f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 60:.0f} min"


# ---- Scripts and environments -------------------------------------------------------------------


@functools.cache
def docstring(script: str) -> str:
    return ast.get_docstring(ast.parse((SCRIPTS / f"{script}.py").read_text()))


def paper(script: str) -> str:
    """For example 'Williams (1992)'."""
    return re.search(r"^Paper\s+(.+?\(\d{4}\))", docstring(script), re.MULTILINE)[1]


@functools.cache
def scripts() -> list[str]:
    """All, in the order of their papers."""
    names = [path.stem for path in SCRIPTS.glob("*.py")]
    return sorted(names, key=lambda script: (paper(script)[-5:], script))


def label(record: Record, beside: list[Record]) -> str:
    """The algorithm's name, or the script's, if another script among these has that, too."""
    algorithm = record.script.split("_")[0]
    those = {other.script for other in beside if other.script.split("_")[0] == algorithm}
    words = re.findall(r"[\w-]+", docstring(record.script).splitlines()[0])
    names = [word for word in words if word.replace("-", "").lower() == algorithm]
    name = [*names, algorithm.upper()][0] if len(those) == 1 else record.script
    return f"{name}, {record.variant}" if record.variant else name


def color(script: str) -> str:
    """By the algorithm. With this salt the ten that are best known have ten colors."""
    algorithm = script.split("_")[0]
    return f"C{zlib.crc32(f'1471471{algorithm}'.encode()) % 10}"


def group(env_id: str) -> str:
    entry_point = str(getattr(gym.registry.get(env_id), "entry_point", ""))
    return next((title for part, title in GROUPS.items() if part in entry_point), OTHERS)


def picture(title: str) -> str:
    """The file's name of a group's picture."""
    return f"{title.lower().replace(' ', '_')}.png"


def environments() -> dict[str, dict[str, list[Record]]]:
    """All records, by group and environment."""
    found = {title: {} for title in [*GROUPS.values(), OTHERS]}
    by_env_id = {}
    for record in records():
        by_env_id.setdefault(record.env_id, []).append(record)
    known = list(LINES)
    order = sorted(by_env_id, key=lambda e: (known.index(e) if e in known else len(known), e))
    for env_id in order:
        found[group(env_id)][env_id] = by_env_id[env_id]
    return {title: members for title, members in found.items() if members}


# ---- Tables of returns --------------------------------------------------------------------------


def scripts_table() -> str:
    """One row for each script: what it is, the first of its records, its speed."""
    lines = ["| Script | Result | Speed |", "|-|-|-:|"]
    for script in scripts():
        what = docstring(script).splitlines()[0].rstrip(".")
        cell = f"[{script}.py](cleanrl_style/{script}.py)<br>{what}; {paper(script)}"
        record = next((record for record in records() if record.script == script), None)
        result = "–"
        if record:
            mean = np.mean(list(record.evaluations.values()))
            result = f"{record.env_id}: **{mean:z.1f}** after "
            result += f"{short(record.steps)} steps, {wall_time(record)}"
        lines.append(f"| {cell} | {result} | {equal_speed(script)} |")
    return "\n".join(lines)


def results() -> str:
    """For each group its picture; for each environment a table, and what is to be said of it."""
    parts = []
    for title, members in environments().items():
        text = f"Learning curves on {', '.join(members)}"
        parts.append(f"## {title}\n\n![{text}]({picture(title)})")
        for env_id, found in members.items():
            parts += [f"### {env_id}", environment_table(found)]
            notes = [note for record in found if (note := environment_note(record, found))]
            parts += ["\n".join(notes)] if notes else []
    return "\n\n".join(parts)


def environment_table(found: list[Record]) -> str:
    lines = ["| | Return (95% interval) | Seeds: worst to best | Steps, time |", "|-|-|-|-|"]
    for record in found:
        values = np.array(list(record.evaluations.values()))
        low, high = interval(values)
        # The bootstrap interval of three seeds is from the worst to the best.
        band = f" ({low:z.1f} to {high:z.1f})" if len(values) >= 5 else ""
        spread = f": {values.min():z.1f} to {values.max():z.1f}" if len(values) > 1 else ""
        lines.append(
            f"| [{label(record, found)}]({record.name}.csv) | **{values.mean():z.1f}**{band} "
            f"| {len(values)}{spread} | {short(record.steps)}, {wall_time(record)} |"
        )
    return "\n".join(lines)


def environment_note(record: Record, beside: list[Record]) -> str:
    published = constant(record.script, "PUBLISHED").get(record.name.split("__")[1], "")
    parts = [f"elsewhere {published}" if published else "", last20(record)]
    parts = ["; ".join(part for part in parts if part), record.head.get("note", "")]
    text = " ".join(f"{part[0].upper()}{part[1:]}." for part in parts if part)
    return f"- **{label(record, beside)}.** {text}" if text else ""


# ---- Tables of speeds ---------------------------------------------------------------------------


def speeds(script: str) -> tuple[dict[str, str], dict[str, list[tuple[float, float]]]]:
    """The head of its measurements, and for each program (steps/s, GB) in all rounds."""
    path = RESULTS / "speed" / f"{script}.csv"
    head, rows = read_csv(path) if path.exists() else ({}, [])
    programs = {}
    for row in rows:
        measured = float(row["steps/s"]), float(row["memory"])
        programs.setdefault(row["name"], []).append(measured)
    return head, programs


def ratio(ours: list[tuple[float, float]], theirs: list[tuple[float, float]]) -> float:
    """Of the speeds: median over the rounds."""
    return median(a / b for (a, _), (b, _) in zip(ours, theirs))


def equal_to(script: str, peer: str) -> str:
    """The name of our variant that runs under the same conditions as that peer."""
    return f"{script}.py, {constant(script, 'SPEED')['peers'][peer]['equal']}"


def equal_speed(script: str) -> str:
    """Our speed by CleanRL's under equal conditions, or –."""
    programs = speeds(script)[1]
    for peer in programs:
        if peer.startswith("CleanRL's") and equal_to(script, peer) in programs:
            return f"{ratio(programs[equal_to(script, peer)], programs[peer]):.1f} ×"
    return "–"


def speed() -> str:
    """All measurements: what their heads have in common, then one table for each script."""
    heads = {script: speeds(script)[0] for script in scripts() if speeds(script)[0]}
    lines = [set(head.items()) for head in heads.values()]
    common = set.intersection(*lines) if lines else set()
    parts = ["Unless a table says otherwise:"]
    parts += ["\n".join(f"- {key}: {value}" for key, value in sorted(common))]
    for script, head in heads.items():
        own = [f"{key}: {value}." for key, value in head.items() if (key, value) not in common]
        parts += [f"### {script}.py", *own, speed_table(script)]
    return "\n\n".join(parts)


def speed_table(script: str) -> str:
    programs = speeds(script)[1]
    peers = [peer for peer in constant(script, "SPEED")["peers"] if peer in programs]
    names = {peer: peer.replace("Stable-Baselines3", "SB3").split("'s ")[0] for peer in peers}
    columns = "".join(f" × {name} |" for name in names.values())
    lines = [f"| | Steps/s |{columns} GB |", f"|-|-|{'-:|' * len(peers)}-:|"]
    for program, rounds in programs.items():
        values, memory = [value for value, _ in rounds], max(gb for _, gb in rounds)
        cells = [names.get(program, program.replace(f"{script}.py", "ours"))]
        cells += [f"{median(values):,.0f} ({min(values):,.0f} to {max(values):,.0f})"]
        for peer in peers:
            number = f"{ratio(rounds, programs[peer]):.1f}"
            cells += [f"**{number}**" if program == equal_to(script, peer) else number]
        lines.append(f"| {' | '.join([*cells, '' if np.isnan(memory) else f'{memory:.2f}'])} |")
    missing = [names[peer] for peer in peers if equal_to(script, peer) not in programs]
    if missing:
        lines += ["", f"Not measured yet: ours under the conditions of {' and '.join(missing)}."]
    return "\n".join(lines)


# ---- Pages --------------------------------------------------------------------------------------


def fill(page: str, name: str, content: str) -> str:
    """The page with this content between <!-- name --> and the next <!-- end -->."""
    pattern = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
    assert len(re.findall(pattern, page, re.DOTALL)) == 1, f"no place for {name}"
    return re.sub(pattern, lambda m: f"{m[1]}\n{content}\n\n{m[2]}", page, flags=re.DOTALL)


def pages() -> dict[Path, str]:
    """What the pages have to say, by their file."""
    readme, page = ROOT / "README.md", RESULTS / "README.md"
    return {
        readme: fill(readme.read_text(), "scripts", scripts_table()),
        page: fill(fill(page.read_text(), "results", results()), "speed", speed()),
    }


# ---- Pictures -----------------------------------------------------------------------------------


def panels(members: dict[str, list[Record]]) -> dict[str, list[Record]]:
    """By its title. Runs that are five times as long get a panel of their own, or none is seen."""
    found = {}
    for env_id, those in members.items():
        title, shortest = env_id.removeprefix("ALE/"), None
        for record in sorted(those, key=lambda record: record.steps):
            if shortest and record.steps >= 5 * shortest:
                title, shortest = f"{env_id.removeprefix('ALE/')}, {short(record.steps)}", None
            shortest = shortest or record.steps
            found.setdefault(title, []).append(record)
    return found


def draw(title: str, members: dict[str, list[Record]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    spines = {"axes.spines.top": False, "axes.spines.right": False}
    plt.rcParams.update({"font.size": 12, "legend.fontsize": 10.5, **spines})
    drawn = panels(members)
    rows = -(-len(drawn) // 2)
    entries = max(len(found) + len(LINES.get(found[0].env_id, {})) for found in drawn.values())
    size = (8.8, (3 + 0.25 * entries) * rows)
    figure, axes = plt.subplots(rows, 2, figsize=size, layout="constrained", squeeze=False)
    for axis in axes.flat[len(drawn) :]:
        axis.set_axis_off()
    for axis, (name, found) in zip(axes.flat, drawn.items()):
        draw_panel(axis, sorted(found, key=lambda r: (scripts().index(r.script), bool(r.variant))))
        axis.set_title(name)
    for axis in axes[:, 0]:
        axis.set_ylabel("training return")
    figure.savefig(RESULTS / picture(title), dpi=150)
    plt.close(figure)


def draw_panel(axis, found: list[Record]) -> None:
    """Thin lines are seeds, a thick one is their mean, the band its 95% interval over the seeds.

    Of a variant only the mean is drawn, by a thin line.
    """
    ends, drawn = [], []
    for record in found:
        seeds = len(record.curves)
        ends.append(min(points[-1][0] for points in record.curves.values()))
        steps = np.linspace(0, ends[-1], 101)[1:]
        values = np.array([np.interp(steps, *zip(*points)) for points in record.curves.values()])
        text = f"{label(record, found)}, {seeds} seed{'s' * (seeds > 1)}"
        text = textwrap.fill(text, 40)
        # Others of the same color are told apart by their line.
        earlier = [other for other in drawn if color(other.script) == color(record.script)]
        drawn.append(record)
        own = {"color": color(record.script), "linestyle": ("-", "--", "-.", ":")[len(earlier) % 4]}
        if record.variant:
            axis.plot(steps, values.mean(0), linewidth=1, label=text, **own)
            continue
        axis.plot(steps, values.T, linewidth=0.4, alpha=0.3, **own)
        axis.fill_between(steps, *interval(values), alpha=0.25, linewidth=0, **own)
        axis.plot(steps, values.mean(0), linewidth=2, label=text, **own)
    for (text, line), style in zip(LINES.get(found[0].env_id, {}).items(), ("--", ":")):
        points = line if isinstance(line, list) else [(0, line), (max(ends), line)]
        axis.plot(*zip(*points), color="black", linewidth=0.8, linestyle=style, label=text)
    axis.set_xlim(0, max(ends))
    few = axis.get_xlim()[1] < 5_000
    axis.xaxis.set_major_formatter(lambda x, _: f"{x:.0f}" if few or not x else short(round(x)))
    axis.set_xlabel("steps")  # of the environment; offline, gradient steps
    # Below the panel, where it can hide nothing.
    axis.legend(loc="upper left", bbox_to_anchor=(-0.05, -0.17), frameon=False, labelspacing=0.3)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    for title, members in environments().items():
        draw(title, members)
    for path, text in pages().items():
        path.write_text(text)
    for record in records():
        print(f"{record.name}: {summary(record)}; {last20(record)}; {record.head['wall time']}")
