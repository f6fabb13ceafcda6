"""Do the benchmarks report what happened in a run, and do the pages say what they reported?"""

import importlib
import re
import shlex

import dqn_cartpole
import floor
import learn
import numpy as np
import plot
import pytest
import speed
import tyro
from conftest import ROOT, SCRIPTS
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter


def write_part(monkeypatch, run_dir, start, steps, returns, purge_step=None):
    """One part of a run, from second `start` on: a step takes 0.1 s, a point is due every 100."""
    monkeypatch.setattr(
        "time.time", lambda: float(start)
    )  # stands in the file's first event, and in its name
    writer = SummaryWriter(run_dir, purge_step=purge_step)
    first = steps[0] - 100 if steps else 0
    for step, value in zip(steps, returns):
        writer.add_scalar("charts/SPS", 10, step, walltime=start + (step - first) / 10)
        writer.add_scalar(
            "charts/episodic_return", value, step, walltime=start + (step - first) / 10
        )
    writer.close()


@pytest.fixture
def resumed_run(tmp_path, monkeypatch):
    """300 steps; a resume that is killed at once; hours later, on from step 200, saved, to 3,000.

    Returns are 0 until step 1,000, 10 from there on.
    """
    write_part(monkeypatch, tmp_path, 1_000_000, [100, 200, 300], [0, 0, 0])
    write_part(monkeypatch, tmp_path, 1_005_000, [], [], purge_step=201)
    steps = range(300, 3_001, 100)
    write_part(
        monkeypatch,
        tmp_path,
        1_009_000,
        steps,
        [0 if step <= 1_000 else 10 for step in steps],
        purge_step=201,
    )
    return tmp_path


def test_the_time_of_a_run_is_that_of_its_parts(resumed_run):
    times = learn.clock(resumed_run)
    assert [step for step, _ in times] == [0, *range(100, 3_001, 100)]
    assert [seconds for _, seconds in times] == pytest.approx([step / 10 for step, _ in times])


def test_solved_is_the_first_time_that_20_games_in_a_row_are_good(resumed_run):
    events = EventAccumulator(str(resumed_run), size_guidance={"scalars": 0}).Reload()
    times = learn.clock(resumed_run)
    assert learn.solved(events, times, 10) == pytest.approx(
        (3_000, 300 / 60)
    )  # the games from 1,100 to 3,000
    assert learn.solved(events, times, 5) == pytest.approx((2_000, 200 / 60))  # ten of each
    assert learn.solved(events, times, 11) is None


def test_a_curve_is_the_mean_of_each_of_its_parts(resumed_run):
    with SummaryWriter(resumed_run, filename_suffix=".evaluation") as writer:
        for step, value in (1_500, 4), (3_000, 7):
            writer.add_scalar("eval/episodic_return", value, step)
    events = EventAccumulator(str(resumed_run), size_guidance={"scalars": 0}).Reload()
    points, evaluations = learn.curve(events)
    assert evaluations == [(1_500, 4), (3_000, 7)]
    assert points == [
        (60 * -(-step // 60), 0 if step <= 1_000 else 10) for step in range(100, 3_001, 100)
    ]


def test_the_curve_of_a_run_without_training_games_is_of_evaluations(tmp_path):
    with SummaryWriter(tmp_path) as writer:
        for step, value in (1_500, 4), (3_000, 7):
            writer.add_scalar("eval/episodic_return", value, step)
    events = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0}).Reload()
    assert learn.curve(events) == ([(1_500, 4), (3_000, 7)], [(1_500, 4), (3_000, 7)])
    assert learn.games(events) == []


def test_a_record_is_made_from_the_command_line_and_read_again(tmp_path, monkeypatch):
    """Two seeds of a second each; the same command again finds them finished, and keeps notes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(learn, "HERE", tmp_path)
    monkeypatch.setattr(plot, "RESULTS", tmp_path / "results")
    flags = ["--seeds", "3-4", "--solved", "1", "--total-timesteps", "3000"]
    arguments = ["reinforce_cartpole", *flags, "--num-envs", "2", "--eval-frequency", "2000"]
    learn.main([*arguments, "--variant", "quick"])
    (path,) = (tmp_path / "results").iterdir()
    first = path.read_text().replace("# seeds:", "# note: by hand\n# seeds:")
    path.write_text(first)
    learn.main(arguments)
    assert path.name == "reinforce_cartpole__CartPole-v1.csv" and path.read_text() == first
    record = plot.read(path.stem)
    head = record.head
    assert head["command"] == (
        "python cleanrl_style/reinforce_cartpole.py "
        "--total-timesteps 3000 --num-envs 2 --eval-frequency 2000 --seed SEED"
    )
    assert head["seeds"] == "3-4" and "torch" in head["versions"] and "median" in head["wall time"]
    assert (record.script, record.env_id) == ("reinforce_cartpole", "CartPole-v1")
    assert (record.variant, head["note"]) == ("quick", "by hand")
    assert set(record.curves) == set(record.evaluations) == {3, 4} and record.steps >= 3000
    assert all(points[-1][0] >= 3000 for points in record.curves.values())
    kinds = [row["kind"] for row in plot.read_csv(path)[1] if row["kind"] != "train"]
    assert kinds == ["eval", "eval", "last20", "wall", "solved"] * 2
    runs = tmp_path / "runs/learn/reinforce_cartpole__CartPole-v1"
    for seed, value in record.evaluations.items():
        folder = next((runs / str(seed)).glob("*/"))
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
        assert value == pytest.approx(events.Scalars("eval/episodic_return")[-1].value, rel=1e-5)


def test_kept_seeds_are_not_trained_again(tmp_path, monkeypatch):
    """Elsewhere, where their runs are not: the record has them, and what was run where."""
    monkeypatch.setattr(learn, "HERE", tmp_path)
    arguments = "reinforce_cartpole --total-timesteps 3000 --num-envs 2 --seeds".split()
    path = tmp_path / "results/reinforce_cartpole__CartPole-v1.csv"

    def record(*more):
        learn.main([*arguments, *more])
        return learn.read_csv(path)

    for machine in ("first", "second"):
        (tmp_path / machine).mkdir()
        monkeypatch.chdir(tmp_path / machine)
        monkeypatch.setattr(learn, "processor", lambda name=machine: name)
        head, rows = record("1-2", "--keep") if machine == "second" else record("2-2")
    found = [row["seed"] for row in rows]
    assert head["seeds"] == "1-2" and set(found) == {"1", "2"} and found == sorted(found)
    assert re.fullmatch(r"first, [^;]*; seeds 1: second, [^;]*", head["machine"])
    walls = [float(row["return"]) for row in rows if row["kind"] == "wall"]
    assert len(walls) == 2 and head["wall time"].startswith(f"median {np.mean(walls):.1f} s")
    assert [run.parents[3].name for run in tmp_path.glob("*/runs/learn/*/1")] == ["second"]
    before = path.read_text()
    assert record("1-2", "--keep") == (head, rows) and path.read_text() == before
    head, rows = record("3-3", "--keep")
    assert head["seeds"] == "1-3" and {row["seed"] for row in rows} == {"1", "2", "3"}
    assert head["machine"].count("second") == 1  # its seeds are not told twice
    for arguments_of_others in (["1-2"], ["1-2", "--keep", "--solved", "1"]):
        with pytest.raises(SystemExit, match="has more seeds"):
            record(*arguments_of_others)


def test_runs_of_another_command_are_not_recorded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(learn, "HERE", tmp_path)
    arguments = "reinforce_cartpole --seeds 1-1 --num-envs 2 --total-timesteps".split()
    learn.main([*arguments, "1000"])
    (path,) = (tmp_path / "results").iterdir()
    before = path.read_text()
    with pytest.raises(SystemExit, match="has runs of another command"):
        learn.main([*arguments, "2000", "--keep"])
    assert path.read_text() == before


def test_next_is_the_first_line_of_the_queue_whose_record_lacks_seeds(tmp_path, monkeypatch):
    queue = tmp_path / "queue.txt"
    lines = ["# comment", "a --name X", "", "a --name Y --seeds 2-4 --env-id ALE/Pong-v5 # b", "a"]
    queue.write_text("\n".join(lines))
    monkeypatch.setattr(learn, "HERE", tmp_path)
    monkeypatch.setattr(learn, "QUEUE", queue)
    monkeypatch.setattr(learn, "default_environment", lambda script: "CartPole-v1")

    def write(name, seeds, flags=""):
        head = {"command": f"python cleanrl_style/a.py {flags}--seed SEED"}
        rows = [["seed", "step", "return", "kind"], *([seed, 1, 1, "eval"] for seed in seeds)]
        learn.write_csv(tmp_path / f"results/a__{name}.csv", head, rows)

    write("X", range(1, 21))
    second = "a --name Y --seeds 2-4 --env-id ALE/Pong-v5 --keep".split()
    assert learn.next_in_queue() == second
    for seeds, flags in ([2, 3], "--env-id ALE/Pong-v5 "), ([2, 3, 4], ""):  # of another command
        write("Y", seeds, flags)
        assert learn.next_in_queue() == second
    write("Y", [2, 3, 4, 5], "--env-id ALE/Pong-v5 ")
    assert learn.next_in_queue() == ["a", "--keep"]
    write("CartPole-v1", range(1, 21))
    assert learn.next_in_queue() is None


def test_the_interval_of_the_mean_is_the_normal_one_where_there_are_many_seeds():
    values = np.random.default_rng(1).normal(5, 2, 400)
    low, high = plot.interval(values, 20_000)
    error = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - error, values.mean() + error), abs=0.01)


def test_the_floor_counts_the_products_of_the_networks(monkeypatch, capfd):
    """By hand: a product of (B, K) and (K, L) is B * K * L multiplications and additions."""
    monkeypatch.setattr(dqn_cartpole, "evaluate", dqn_cartpole.evaluate)  # the floor replaces it
    steps, batch, hidden, num_envs, gradient_steps = (
        1_000,
        16,
        8,
        4,
        51,
    )  # one at 500, 510, ..., 1,000
    args = dqn_cartpole.Args(
        total_timesteps=steps,
        learning_starts=500,
        train_frequency=10,
        batch_size=batch,
        hidden_size=hidden,
        num_envs=num_envs,
        buffer_size=1_000,
        target_network_frequency=100,
        checkpoint_frequency=0,
    )
    first, second, third = 4 * hidden, hidden * hidden, hidden * 2
    forward = 2 * (first + second + third)  # of one observation
    backward = 2 * (
        first + 2 * second + 2 * third
    )  # the gradients of weights, and of what goes into layers 2 and 3
    expected = gradient_steps * batch * (
        2 * forward + backward
    )  # the target network, the other one; acting is in NumPy
    assert floor.operations(dqn_cartpole, args) == expected


# ---- What the pages say -------------------------------------------------------------------------

NAMES = [path.stem for path in SCRIPTS]
README = ROOT / "README.md"


@pytest.mark.parametrize("path", plot.pages(), ids=lambda path: str(path.relative_to(ROOT)))
def test_pages_are_what_the_records_say(path):
    assert plot.pages()[path] == path.read_text(), "python tests/benchmarks/plot.py writes them"
    for target in re.findall(r"\]\(([^)#:]+)\)|src=\"([^\"]+)\"", path.read_text()):
        assert (path.parent / "".join(target)).exists(), f"a link to {''.join(target)}"


def test_readme_is_short():
    """At most 154 lines for six scripts, and one more for each further script."""
    assert len(README.read_text().splitlines()) <= 148 + len(NAMES)


@pytest.mark.parametrize("program", ["floor", "learn", "plot", "sb3", "speed"])
def test_benchmarks_name_no_script(program):
    """So that a new algorithm is two files: the script and its test."""
    source = (plot.RESULTS.parent / f"{program}.py").read_text()
    assert [name for name in NAMES if name in source] == []


def test_text_by_hand_outlives_the_tables():
    page = "a\n<!-- x -->\nold\n<!-- end -->\nb `<!-- x -->` c\n<!-- y -->\n<!-- end -->\n"
    assert plot.fill(page, "x", r"new \1") == page.replace("old", "\nnew \\1\n")


@pytest.mark.parametrize("record", plot.records(), ids=lambda record: record.name)
def test_docstrings_say_what_the_records_say(record):
    assert plot.summary(record) in " ".join(plot.docstring(record.script).split())


def test_a_mean_that_is_nearly_0_has_no_sign():
    record = plot.Record("a__b", {}, {}, {1: -0.01, 2: 0.0}, [], 1)
    assert plot.summary(record) == "0.0 (0.0 to 0.0)"


def test_every_record_is_on_the_page_and_in_a_picture():
    drawn = [record for group in plot.environments().values() for record in sum(group.values(), [])]
    assert sorted(record.name for record in drawn) == sorted(
        path.stem for path in plot.RESULTS.glob("*.csv")
    )
    for group in plot.environments().values():
        assert sorted(record.name for found in group.values() for record in found) == sorted(
            record.name for found in plot.panels(group).values() for record in found
        )


def test_long_runs_have_a_panel_of_their_own():
    def record(name, steps):
        return plot.Record(name, {}, {}, {}, [], steps)

    short, other, long = record("a", 1_000_000), record("b", 4_900_000), record("c", 10_000_000)
    found = plot.panels({"ALE/Breakout-v5": [long, short, other]})
    assert found == {"Breakout-v5": [short, other], "Breakout-v5, 10M": [long]}


@pytest.mark.parametrize("script", NAMES)
def test_what_others_published_is_beside_a_record_or_one_to_come(script):
    queue = [shlex.split(line, comments=True) for line in learn.QUEUE.read_text().splitlines()]
    known = {record.name for record in plot.records()}
    known |= {learn.parse(arguments)[2].stem for arguments in queue if arguments}
    assert {f"{script}__{name}" for name in learn.constant(script, "PUBLISHED")} <= known


# ---- What speed.py compares ---------------------------------------------------------------------

MEASURED = [script for script in NAMES if learn.constant(script, "SPEED")]


@pytest.mark.parametrize("script", MEASURED)
def test_speed_is_told_in_full(script):
    """Flags that the script knows, equal conditions among its variants, and rows that are named."""
    told = learn.constant(script, "SPEED")
    args = importlib.import_module(script).Args
    for flags in told["variants"].values():
        tyro.cli(args, args=[*told["flags"].split(), *flags.split()])
    for arguments in told["floors"].values():
        tyro.cli(args, args=[*told["flags"].split(), *arguments.split()[2:]])
    assert {peer["equal"] for peer in told["peers"].values()} <= set(told["variants"])
    options = speed.argparse.Namespace(cleanrl="here", sb3_python="here", sbx_python="here")
    assert set(plot.speeds(script)[1]) <= set(speed.programs(script, options))
    options = speed.argparse.Namespace(cleanrl=None, sb3_python=None, sbx_python=None)
    names = [name for name in speed.programs(script, options) if name.startswith(f"{script}.py, ")]
    assert len(names) == len(told["variants"])


def test_speed_in_readme_is_that_under_equal_conditions(tmp_path, monkeypatch):
    monkeypatch.setattr(plot, "RESULTS", tmp_path)
    peers = {"CleanRL's x.py": {"equal": "one"}, "Stable-Baselines3's X": {"equal": "ten"}}
    monkeypatch.setattr(plot, "constant", lambda script, name: {"peers": peers})
    rows = [("CleanRL's x.py", 10), ("Stable-Baselines3's X", 20), ("x.py, ten", 90)]
    rows = [(name, round_, value, 1) for name, value in rows for round_ in (1, 2, 3)]
    columns = ["name", "round", "steps/s", "memory"]
    learn.write_csv(tmp_path / "speed/x.csv", {}, [columns, *rows])
    assert plot.equal_speed("x") == "–"
    assert "Not measured yet: ours under the conditions of CleanRL." in plot.speed_table("x")
    rows += [("x.py, one", round_, value, 1) for round_, value in zip((1, 2, 3), (15, 14, 99))]
    learn.write_csv(tmp_path / "speed/x.csv", {}, [columns, *rows])
    assert plot.equal_speed("x") == "1.5 ×"
    assert "| ours, one | 15 (14 to 99) | **1.5** | 0.8 | 1.00 |" in plot.speed_table("x")
