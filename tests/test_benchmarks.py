"""Is what the benchmarks report of a run what happened in it? (What README makes of it: test_conventions.py.)"""

import dqn_cartpole
import floor
import learn
import numpy as np
import plot
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter


def write_part(monkeypatch, run_dir, start, steps, returns, purge_step=None):
    """One part of a run, from second `start` on: a step takes a tenth of a second, a point is due every 100 steps."""
    monkeypatch.setattr("time.time", lambda: float(start))  # stands in the file's first event, and in its name
    writer = SummaryWriter(run_dir, purge_step=purge_step)
    first = steps[0] - 100 if steps else 0
    for step, value in zip(steps, returns):
        writer.add_scalar("charts/SPS", 10, step, walltime=start + (step - first) / 10)
        writer.add_scalar("charts/episodic_return", value, step, walltime=start + (step - first) / 10)
    writer.close()


@pytest.fixture
def resumed_run(tmp_path, monkeypatch):
    """300 steps; a resume that is killed at once; then, hours later, on from the checkpoint at step 200, to 3,000.

    Returns are 0 until step 1,000, 10 from there on.
    """
    write_part(monkeypatch, tmp_path, 1_000_000, [100, 200, 300], [0, 0, 0])
    write_part(monkeypatch, tmp_path, 1_005_000, [], [], purge_step=201)
    steps = range(300, 3_001, 100)
    write_part(monkeypatch, tmp_path, 1_009_000, steps, [0 if step <= 1_000 else 10 for step in steps], purge_step=201)
    return tmp_path


def test_the_time_of_a_run_is_that_of_its_parts(resumed_run):
    times = learn.clock(resumed_run)
    assert [step for step, _ in times] == [0, *range(100, 3_001, 100)]
    assert [seconds for _, seconds in times] == pytest.approx([step / 10 for step, _ in times])


def test_solved_is_the_first_time_that_20_games_in_a_row_are_good(resumed_run):
    events = EventAccumulator(str(resumed_run), size_guidance={"scalars": 0}).Reload()
    times = learn.clock(resumed_run)
    assert learn.solved(events, times, 10) == pytest.approx((3_000, 300 / 60))  # the games from 1,100 to 3,000
    assert learn.solved(events, times, 5) == pytest.approx((2_000, 200 / 60))  # ten of each
    assert learn.solved(events, times, 11) is None


def test_a_curve_is_the_mean_of_each_of_its_parts(resumed_run):
    with SummaryWriter(resumed_run, filename_suffix=".evaluation") as writer:
        writer.add_scalar("eval/episodic_return", 7, 3_000)
    events = EventAccumulator(str(resumed_run), size_guidance={"scalars": 0}).Reload()
    points, evaluation = learn.curve(events)
    assert evaluation == (3_000, 7)
    assert points == [(60 * -(-step // 60), 0 if step <= 1_000 else 10) for step in range(100, 3_001, 100)]


def test_a_record_is_made_from_the_command_line_and_read_again(tmp_path, monkeypatch):
    """Two seeds of a second each; the same command once more finds them finished."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(learn, "HERE", tmp_path)
    monkeypatch.setattr(plot, "RESULTS", tmp_path / "results")
    flags = ["--seeds", "3-4", "--solved", "1", "--total-timesteps", "3000", "--episodes-per-update", "2"]
    monkeypatch.setattr("sys.argv", ["learn.py", "reinforce_cartpole", *flags])
    learn.main()
    (record,) = (tmp_path / "results").iterdir()
    first = record.read_text()
    learn.main()
    assert record.name == "reinforce_cartpole__CartPole-v1.csv" and record.read_text() == first
    head, curves, evaluations = plot.read(record.stem)
    assert head["command"] == (
        "python cleanrl_style/reinforce_cartpole.py --total-timesteps 3000 --episodes-per-update 2 --seed SEED"
    )
    assert head["seeds"] == "3-4" and "torch" in head["versions"] and "median" in head["wall time"]
    assert set(curves) == set(evaluations) == {3, 4} and all(points[-1][0] >= 3000 for points in curves.values())
    kinds = [row["kind"] for row in plot.read_csv(record)[1] if row["kind"] != "train"]
    assert kinds == ["eval", "last20", "solved"] * 2
    folders = [next((tmp_path / "runs/learn/reinforce_cartpole__CartPole-v1" / seed).glob("*/")) for seed in "34"]
    for folder, value in zip(folders, evaluations.values()):
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
        assert value == pytest.approx(events.Scalars("eval/episodic_return")[-1].value, rel=1e-5)


def test_the_interval_of_the_mean_is_the_normal_one_where_there_are_many_seeds():
    values = np.random.default_rng(1).normal(5, 2, 400)
    low, high = plot.interval(values, 20_000)
    error = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - error, values.mean() + error), abs=0.01)


def test_the_floor_counts_the_products_of_the_networks(monkeypatch, capfd):
    """By hand: a product of (B, K) and (K, L) is B * K * L multiplications, and as many additions."""
    monkeypatch.setattr(dqn_cartpole, "evaluate", dqn_cartpole.evaluate)  # the floor replaces it
    steps, batch, hidden, num_envs, gradient_steps = 1_000, 16, 8, 4, 51  # one at 500, 510, ..., 1,000
    args = dqn_cartpole.Args(
        total_timesteps=steps, learning_starts=500, train_frequency=10, batch_size=batch, hidden_size=hidden,
        num_envs=num_envs, buffer_size=1_000, target_network_frequency=100, checkpoint_frequency=0,
    )  # fmt: skip
    first, second, third = 4 * hidden, hidden * hidden, hidden * 2
    forward = 2 * (first + second + third)  # of one observation
    backward = 2 * (first + 2 * second + 2 * third)  # the gradients of weights, and of what goes into layers 2 and 3
    expected = steps * forward + gradient_steps * batch * (2 * forward + backward)  # the target network, the other one
    assert floor.operations(dqn_cartpole, args) == expected
