"""What ppo_atari_distributed.py does on several ranks; what it has in common with ppo_atari.py.

Functions with the code of ppo_atari.py (test_conventions.py compares them) are tested there.
"""

import copy
import os
import random
import signal
import subprocess
import sys
import threading
import time

import games
import numpy as np
import ppo_atari
import ppo_atari_distributed as script
import pytest
import torch
from conftest import Bench, curves, learned, same, state
from games import Diary, check_settings, number, numbers, recorded
from torch import nn

# The description for the common tests: README.md explains it.
TINY = (
    "--total-timesteps 800 --num-envs 2 --num-steps 25 --num-minibatches 2 --update-epochs 1 "
    "--norm-obs --checkpoint-frequency 150 --eval-frequency 450 --eval-episodes 1 --num-threads 1 "
    "--precision float32"
)
OWN = "pixels"
OWN_FLAGS = (
    "--total-timesteps 3000 --learning-rate 1e-3 --num-steps 16 --gamma 0.5 --ent-coef 0 "
    "--num-threads 1"
)
WRONG_SPACES = ["CartPole-v1", "Pendulum-v1"]
DIVERGES = "--learning-rate 1e30"
BAD = [
    ("--num-steps 0", "--num-steps"),
    ("--num-steps 7 --num-envs 1", "--num-minibatches"),
    ("--num-steps 3 --num-envs 32", "--num-minibatches"),
    ("--rank-timeout 0", "--rank-timeout"),
]
PUBLISHED = {"ALE-Pong-v5": "CleanRL 20.4, Zoo 21.0 (10M)"}

# ---- Pretended ranks, in threads -----------------------------------------------------------------


class Pretended(script.Ranks):
    """One of W ranks that are threads of this process."""

    def __init__(self, rank, world, board):
        super().__init__()
        self.rank, self.world, self.board = rank, world, board

    def gather(self, thing):
        self.board["things"][self.rank] = thing
        self.board["barrier"].wait()
        things = copy.deepcopy(self.board["things"])
        self.board["barrier"].wait()
        return things

    def average(self, tensors):
        parts = self.gather([tensor.clone() for tensor in tensors])
        for tensor, *theirs in zip(tensors, *parts):
            tensor.copy_(torch.stack(theirs).mean(0))

    def broadcast(self, state):
        return self.gather(state)[0]


def together(world, function):
    """The results of function(ranks), by rank."""
    board, results = {"things": [None] * world, "barrier": threading.Barrier(world, timeout=60)}, {}

    def run(rank):
        results[rank] = function(Pretended(rank, world, board))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [results[rank] for rank in range(world)]


# ---- Updates -------------------------------------------------------------------------------------


class Table(nn.Module):
    """Logits and V of each state. An observation is a state, one-hot."""

    def __init__(self):
        super().__init__()
        numbers = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
        self.numbers = nn.Parameter(numbers.double())

    def forward(self, obs):
        return obs @ self.numbers[:, :-1], obs @ self.numbers[:, -1]


def example(size=12):
    generator, table = torch.Generator().manual_seed(1), Table()
    states, actions = torch.randint(3, (2, size), generator=generator)
    log_probs = table.numbers[states, :-1].log_softmax(1)[range(size), actions].detach()
    noise = torch.randn(4, size, generator=generator).double()
    obs = torch.eye(3, dtype=torch.float64)[states]
    return script.Batch(obs, actions, log_probs + 0.3 * noise[0], *noise[1:])


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize(
    "flags", [{}, {"norm_adv": False}, {"max_grad_norm": 0.01}, {"clip_vloss": False}]
)
def test_the_ranks_together_make_the_update_of_ppo_atari(world, flags):
    """On the same minibatch, cut into their shares; the metrics, too."""
    whole, table = example(), Table()
    flags = {"max_grad_norm": 1e9, "clip_coef": 0.2} | flags
    args = ppo_atari.Args(**flags)
    optimizer = torch.optim.SGD(table.parameters(), lr=0.1)
    expected = ppo_atari.update(table, optimizer, ppo_atari.Batch(*whole), args)
    if args.norm_adv:
        whole = whole._replace(advantages=script.standardize(whole.advantages))

    def run(ranks):
        ours, mine = Table(), ranks.share(12)
        ours.numbers.grad = torch.ones_like(ours.numbers)  # left over from before: does not count
        optimizer = torch.optim.SGD(ours.parameters(), lr=0.1)
        part = script.Batch(*(column[mine] for column in whole))
        return ours, script.update(ours, optimizer, part, script.Args(**flags), ranks)

    for ours, metrics in together(world, run):
        torch.testing.assert_close(ours.numbers, table.numbers)
        assert {tag: m.item() for tag, m in metrics.items()} == pytest.approx(
            {tag: m.item() for tag, m in expected.items()}
        )


def test_equal_advantages_have_no_deviation_to_divide_by():
    assert not script.standardize(torch.ones(3, 4)).any()


def one_of(world, rank):
    """A rank that plays alone; the others are missing."""
    ranks = script.Ranks()
    ranks.world, ranks.rank = world, rank
    return ranks


@pytest.mark.parametrize("num_steps, parts, world", [(6, 2, 1), (6, 2, 2), (7, 3, 4)])
def test_every_epoch_has_every_step_once_and_each_minibatch_as_many_of_each_game(
    monkeypatch, num_steps, parts, world
):
    args = script.Args(num_envs=4, num_steps=num_steps, num_minibatches=parts, update_epochs=3)
    advantages = torch.randn(num_steps, 4, generator=torch.Generator().manual_seed(0))
    number = torch.arange(num_steps * 4).view(num_steps, 4)  # of each step
    epochs = []
    for rank in range(world):
        seen, ranks = [], one_of(world, rank)

        def update(agent, optimizer, batch, args, ranks, seen=seen):
            assert torch.equal(batch.obs, batch.returns)  # rows stay together
            seen.append((batch.obs, batch.advantages))
            return {"losses/approx_kl": torch.tensor(0.0)}

        monkeypatch.setattr(script, "update", update)
        torch.manual_seed(0)
        mine = number[:, ranks.share(4)].flatten()
        script.learn(None, None, script.Batch(*[mine] * 6), advantages, args, ranks)
        epochs.append(seen)
    minibatches = []
    for shares in zip(*epochs, strict=True):
        steps, scaled = (torch.cat(columns) for columns in zip(*shares))
        counts = np.bincount(steps % 4, minlength=4)
        assert (counts == counts[0]).all() and len({len(obs) for obs, _ in shares}) == 1
        raw = advantages.flatten()[steps]
        torch.testing.assert_close(scaled, (raw - raw.mean()) / raw.std())
        minibatches.append(steps.tolist())
    orders = [sum(minibatches[i : i + parts], []) for i in range(0, 3 * parts, parts)]
    assert all(sorted(order) == list(range(num_steps * 4)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    times = [[step // 4 for step in minibatches[0] if step % 4 == game] for game in range(4)]
    assert len({tuple(sorted(t)) for t in times}) > 1  # each game is shuffled apart


@pytest.mark.parametrize("stop_kl, epochs", [(0, 4), (0.07, 4), (0.03, 3), (0.02, 2), (0.005, 1)])
def test_the_epoch_that_moves_the_policy_too_far_is_the_last(monkeypatch, stop_kl, epochs):
    """The mean over its minibatches counts: 0.01, 0.025, 0.05, 0.065."""
    divergences = [0.0, 0.02, 0.01, 0.04, 0.02, 0.08, 0.03, 0.1]
    left = list(divergences)
    found = lambda *_: {"losses/approx_kl": torch.tensor(left.pop(0))}  # noqa: E731
    monkeypatch.setattr(script, "update", found)
    args = script.Args(num_envs=2, num_steps=4, num_minibatches=2, stop_kl=float(stop_kl))
    batch = script.Batch(*[torch.arange(8)] * 6)
    metrics = script.learn(None, None, batch, torch.randn(4, 2), args, script.Ranks())
    done = divergences[: 2 * epochs]
    assert len(left) == 8 - 2 * epochs
    assert metrics["losses/approx_kl"].item() == pytest.approx(np.mean(done))


@pytest.mark.parametrize("world", [1, 2, 4])
def test_running_statistics_are_those_of_all_rows_of_all_ranks(world):
    rows = torch.randn(3, 40, 5, generator=torch.Generator().manual_seed(0)) * 3 + 7

    def run(ranks):
        statistics = script.RunningStatistics(5)
        for part in rows:
            statistics.update(part[ranks.share(40)], ranks)
        return statistics

    for statistics in together(world, run):
        assert statistics.count == 120
        torch.testing.assert_close(statistics.mean, rows.flatten(0, 1).mean(0))
        torch.testing.assert_close(statistics.variance, rows.flatten(0, 1).var(0, correction=0))


class Fixed(nn.Module):
    """One policy everywhere; V is the number of the row."""

    def __init__(self):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor([2.0, 1.0, -1.0]))
        self.actor = nn.Linear(1, 3)

    def forward(self, obs):
        return self.logits.expand(len(obs), 3), torch.arange(len(obs)).float()


def test_actions_are_as_frequent_as_the_policy_says():
    torch.manual_seed(0)
    policy, obs = Fixed(), np.zeros((40_000, 1), np.float32)
    noise = script.draw_noise(40_000, policy)
    actions, log_probs, values = script.act(policy, obs, noise)
    shares, logits = np.bincount(actions, minlength=3) / 40_000, policy.logits.detach()
    np.testing.assert_allclose(shares, logits.softmax(0), atol=0.01)
    np.testing.assert_allclose(log_probs, logits.log_softmax(0)[actions], atol=1e-6)
    assert (values == np.arange(40_000)).all() and (script.value(policy, obs) == values).all()


# ---- Games ---------------------------------------------------------------------------------------


def play(envs, steps, start=0):
    """Plays actions that depend on step and game. Returns what came of them."""
    found = []
    for t in range(start, start + steps):
        envs.send((np.arange(envs.total)[envs.ranks.share(envs.total)] + t) % 3)
        found.append((envs.obs.copy(), *envs.recv()))
    return found


@pytest.mark.parametrize("env_id", ["PixelDiary-v0", "ALE/Pong-v5"])
@pytest.mark.parametrize("world, other", [(2, 1), (1, 4), (4, 2)])
def test_the_games_of_the_ranks_are_those_of_one_and_any_number_goes_on(
    monkeypatch, env_id, world, other
):
    """Also where some ranks' games began later: what is saved has the actions that all need."""
    monkeypatch.setattr(script, "RESEED_FREQUENCY", 40)
    args = script.Args(env_id=env_id, num_envs=4)

    def begin(ranks):
        envs = script.Envs(args, 4, script.TRAINING, ranks=ranks)
        envs.reset()
        found = play(envs, 45)
        return found, envs.state_dict(), envs.finished, envs.steps, envs

    def resume(ranks):
        envs = script.Envs(args, 4, script.TRAINING, ranks=ranks)
        envs.load_state_dict(saved if ranks.rank == 0 else None)
        envs.reset()
        return play(envs, 20, 45), envs

    ((_, alone, finished, steps, envs),) = together(1, begin)
    results = together(world, begin)
    saved = results[0][1]
    for each in saved, alone:  # what nobody needs any more
        for actions, since in zip(each["actions"], each["since"]):
            actions[:since] = 0
    assert same(saved, alone) and {steps} == {180} == {result[3] for result in results}
    assert sorted(sum((result[2] for result in results), [])) == sorted(finished)
    expected, resumed = play(envs, 20, 45), together(other, resume)
    for t, columns in enumerate(expected):
        for ours, theirs in zip(zip(*(found[t] for found, _ in resumed)), columns, strict=True):
            assert np.array_equal(np.concatenate(ours), theirs)
    for opened in (envs, *(result[-1] for result in results + resumed)):
        opened.close()


# ---- The loop ------------------------------------------------------------------------------------


def train(tmp_path, **changes):
    """4 rollouts of 60 steps in games of the diary. Returns the run's folder."""
    few = dict(
        env_id="PixelDiary-v0", total_timesteps=240, num_envs=4, num_steps=15, num_minibatches=2,
        update_epochs=2, eval_episodes=2, checkpoint_frequency=90, precision="float32",
        learning_rate=3e-3, num_threads=1,
    )  # fmt: skip
    return games.train(script, script.Args(**few | changes, runs_dir=str(tmp_path)))


@pytest.mark.parametrize("num_envs", [1, 4])
def test_what_is_learned_from_is_what_was_played(tmp_path, monkeypatch, num_envs):
    """Every step once, as it happened, with the sign of its reward. V of the next observation is
    that of the true one, at the end of a game, too, if a time limit truncated it."""
    calls = {name: recorded(monkeypatch, script, name) for name in ("act", "value", "gae", "learn")}
    train(tmp_path, num_envs=num_envs, num_steps=60 // num_envs)
    acted, valued, found = iter(calls["act"]), iter(calls["value"]), []
    for (inputs, advantages), (rollout, _) in zip(calls["gae"], calls["learn"], strict=True):
        batch = rollout[2]
        rewards, values, next_values, terminated, truncated = (x.flatten() for x in inputs[:5])
        looks = [next(acted) for _ in range(60 // num_envs)]
        looks = [(obs, v) for (_, obs, _), (_, _, v) in looks]
        for _ in range(sum(inputs[4].any(1)) + 1):  # where games were truncated, and at the end
            (_, obs), v = next(valued)
            looks.append((obs, v))
        value_of = {}
        for obs, v in looks:
            for i in range(num_envs):
                shown = number(obs[i, -1])
                assert value_of.get(shown, v[i]) == pytest.approx(v[i], abs=1e-6)
                value_of[shown] = v[i]
        for row in range(60):
            shown = number(batch.obs[row, -1])
            step = Diary.steps[shown]
            found.append(shown)
            assert numbers(batch.obs[row]) == step.frames and batch.actions[row] == step.action
            assert rewards[row] == step.reward
            assert (terminated[row], truncated[row]) == (step.terminated, step.truncated)
            assert batch.values[row] == values[row] == pytest.approx(value_of[shown], abs=1e-6)
            if not step.terminated:
                assert next_values[row] == pytest.approx(value_of[step.next_frames[-1]], abs=1e-6)
        torch.testing.assert_close(batch.advantages, advantages.flatten())
        torch.testing.assert_close(batch.returns, batch.advantages + batch.values)
        assert torch.equal(rollout[3].flatten(), batch.advantages)
        assert inputs[5:] == (0.99, 0.95)
    assert sorted(found) == sorted(list(Diary.steps)[:240])  # and then the evaluation


def test_log_probabilities_are_of_the_policy_that_acted(tmp_path, monkeypatch):
    """Before the first update of a rollout all ratios are 1, with normalised observations, too."""
    updates = recorded(monkeypatch, script, "update")
    train(tmp_path, norm_obs=True)
    divergences = [metrics["losses/approx_kl"].item() for _, metrics in updates]
    assert len(updates) == 16 and max(map(abs, divergences[::4])) < 1e-6 < min(divergences[3::4])


@pytest.mark.parametrize("anneal_lr", [True, False])
def test_the_learning_rate_falls_in_a_line_or_stays(tmp_path, anneal_lr):
    points = curves(train(tmp_path, anneal_lr=anneal_lr))["charts/learning_rate"]
    expected = [3e-3 * (1 - k / 4) if anneal_lr else 3e-3 for k in range(4)]
    assert [value for _, value in points] == pytest.approx(expected)


def test_statistics_are_of_all_that_was_learned_from(tmp_path, monkeypatch):
    """And of the first frames, once."""
    acts, rollouts = recorded(monkeypatch, script, "act"), recorded(monkeypatch, script, "learn")
    network = learned(train(tmp_path, norm_obs=True))["network"]
    seen = [torch.from_numpy(acts[0][0][1]), *(inputs[2].obs for inputs, _ in rollouts)]
    seen = torch.cat(seen)[:, -1].flatten(1).double()
    assert network["obs_statistics.count"] == len(seen) == 244
    for name, expected in ("mean", seen.mean(0)), ("variance", seen.var(0, correction=0)):
        found = network[f"obs_statistics.{name}"].double()
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_explained_variance_is_of_the_returns(tmp_path, monkeypatch):
    rollouts = recorded(monkeypatch, script, "learn")
    points = curves(train(tmp_path))
    for (inputs, _), (_, found) in zip(rollouts, points["losses/explained_variance"]):
        batch = inputs[2]
        expected = 1 - (batch.returns - batch.values).var() / batch.returns.var()
        assert found == pytest.approx(expected.item(), rel=1e-3, abs=1e-3)


@pytest.mark.slow
def test_every_setting_of_the_algorithm_changes_the_outcome(tmp_path):
    """But for one, of the emulator."""

    def few(**changes):
        return train(tmp_path, **{"total_timesteps": 120} | changes)

    check_settings(script, few, dict(
        seed=2, total_timesteps=180, num_envs=3, learning_rate=1e-3, anneal_lr=False, num_steps=10,
        gamma=0.5, gae_lambda=0.5, num_minibatches=3, update_epochs=1, norm_adv=False,
        clip_coef=0.01, clip_vloss=False, ent_coef=0.1, vf_coef=0.1, max_grad_norm=0.1,
        stop_kl=1e-9, norm_obs=True, precision="bfloat16",
    ), others={"sticky_actions": 0.0})  # fmt: skip


# ---- Ranks, in processes -------------------------------------------------------------------------

NAME = script.SCRIPT
DRIVER = f'''
import os, runpy, socket, sys, traceback
world = int(sys.argv[1])
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
for rank in range(world):
    if os.fork() == 0:
        # As on machines of one rank each.
        os.environ |= {{"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(world),
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}}
        sys.argv, code = ["{NAME}.py", *sys.argv[2:]], 0
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stderr.flush(), sys.stdout.flush(), os._exit(code)
sys.exit(max(os.waitstatus_to_exitcode(os.wait()[1]) for _ in range(world)))
'''
GAME = (
    "--env-id cases:Side-v0 --total-timesteps 192 --num-envs 4 --num-steps 16 --num-minibatches 2 "
    "--learning-rate 1e-3 --gamma 0.5 --norm-obs --num-threads 1 --precision float32 "
    "--eval-episodes 2 --checkpoint-frequency 100 --rank-timeout 60 --check-ranks"
)


@pytest.fixture
def bench(tmp_path):
    """Runs `WORLD ARGUMENTS`: starts the ranks as torchrun would."""
    bench = Bench(NAME, tmp_path, cases=True)
    (tmp_path / "ranks.py").write_text(DRIVER)
    bench.script = "ranks"
    return bench


def edit(bench, old, new):
    """In the bench's copy of the script."""
    path = bench.folder / f"{NAME}.py"
    assert path.read_text().count(old) == 1, old
    path.write_text(path.read_text().replace(old, new))


def are_close(ours, theirs):
    """Two trainings: the same games and random numbers; the weights to rounding."""
    ours, theirs = learned(ours), learned(theirs)
    assert same(ours["envs"], theirs["envs"]) and same(ours["random_state"], theirs["random_state"])
    torch.manual_seed(1)
    begun = script.Agent(2, False, True).state_dict()

    def distance(a, b):
        return sum((a[name] - b[name]).square().sum() for name in begun if "weight" in name) ** 0.5

    moved = distance(theirs["network"], begun)
    assert distance(ours["network"], theirs["network"]) < 0.01 * moved


@pytest.mark.slow
def test_the_same_flags_are_the_same_training_on_one_two_and_four_ranks(bench):
    """Of which every episode is logged, once, at the same step; by rank 0 alone."""
    one, *others = [bench.train(f"{world} {GAME}") for world in (1, 2, 4)]
    expected = curves(one)
    assert len(expected["charts/episodic_return"]) == 8
    for other in others:
        are_close(other, one)
        found = curves(other)
        assert found.keys() == expected.keys()
        for tag in found:
            assert [step for step, _ in found[tag]] == [step for step, _ in expected[tag]], tag
            values = [value for _, value in expected[tag]]
            assert [value for _, value in found[tag]] == pytest.approx(values, rel=1e-2, abs=1e-3)
    assert len(list((bench.folder / "runs").iterdir())) == 3


@pytest.mark.slow
@pytest.mark.parametrize("what, old, new", [
    ("weights", "distributed.all_reduce(flat)", "pass"),
    ("weights", "flat / self.world", "flat / self.world + 1e-4 * self.rank"),
    ("random numbers", "for _ in range(args.update_epochs):",
     "torch.rand(ranks.rank)\n    for _ in range(args.update_epochs):"),
])  # fmt: skip
def test_ranks_that_differ_are_found_if_a_flag_asks_for_it(bench, what, old, new):
    edit(bench, old, new)
    ended = bench.run(f"2 {GAME}")
    assert ended.code == 2 and f"the {what} of the ranks differ" in ended.err, ended
    assert bench.run(f"2 {GAME} --no-check-ranks").code == 0


@pytest.mark.parametrize("device", ["cuda", "cuda:0", "mps"])
def test_devices_that_ranks_cannot_have_are_refused(monkeypatch, device):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "5"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 5)
    with pytest.raises(script.UsageError, match="GPU of its own" if device == "cuda" else "device"):
        script.Ranks(script.Args(device=device))


@pytest.mark.slow
def test_the_weights_come_from_rank_0(bench):
    """Not from equal seeds: here each rank begins with its own."""
    expected = bench.train(f"2 {GAME}")
    edit(
        bench,
        "torch.manual_seed(args.seed)\n    ranks",
        "torch.manual_seed(args.seed + int(os.environ['RANK']))\n    ranks",
    )
    assert same(learned(bench.train(f"2 {GAME}")), learned(expected))


@pytest.mark.slow
def test_no_rank_stops_its_epochs_alone(bench):
    """With a limit near the divergence of most epochs, which differs from share to share."""
    one, two = [bench.train(f"{world} {GAME} --stop-kl 2e-4") for world in (1, 2)]
    are_close(two, one)
    assert not same(learned(two)["network"], learned(bench.train(f"2 {GAME}"))["network"])


@pytest.mark.slow
def test_another_number_of_ranks_goes_on_and_says_that_it_is_not_exact(bench):
    expected = bench.train(f"1 {GAME}")
    run_dir = bench.train(f"2 {GAME} --total-timesteps 64")
    for world, steps in (4, 128), (1, 192):
        ended = bench.run(f"{world} --resume {run_dir} --total-timesteps {steps} --no-anneal-lr")
        assert ended.code == 0 and "Warning: from" in ended.err and "not exactly" in ended.err, (
            ended
        )
    assert state(run_dir)["envs"]["steps"] == 192
    assert same(state(run_dir)["random_state"], state(expected)["random_state"])


def test_games_that_cannot_be_shared_are_refused(bench):
    ended = bench.run(f"3 {GAME}")
    assert ended.code == 2 and "Traceback" not in ended.err, ended
    assert "--num-envs 4 cannot be shared by 3 ranks" in ended.err, ended


@pytest.mark.slow
def test_a_rank_that_hangs_is_named_after_a_while(bench):
    edit(
        bench,
        "next_obs, reward, terminated[t], truncated[t] = envs.recv()",
        "next_obs, reward, terminated[t], truncated[t] = envs.recv()\n"
        "                if ranks.rank == 1 and envs.steps == 128: time.sleep(12)",
    )
    ended = bench.run(f"2 {GAME} --rank-timeout 4")
    assert ended.code == 2 and "Traceback" not in ended.err, ended
    (line,) = [line for line in ended.err.splitlines() if line.startswith(f"{NAME}: rank 0")]
    assert "Rank 1 failed to pass" in line and "4000 ms" in line and "--resume runs/" in line, line


# ---- torchrun ------------------------------------------------------------------------------------


class Torchrun:
    """Two ranks under torchrun. Standard output is read line by line."""

    def __init__(self, bench, flags):
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
        environment = bench.environment | {"OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [*command, "--max-restarts", "3", f"{NAME}.py", *flags.split()], cwd=bench.folder,
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def begins(self):
        """The run's folder, as soon as it trains."""
        line = self.process.stdout.readline().strip()
        assert line.startswith("Training in "), (line, self.process.stderr.read())
        return line.removeprefix("Training in ")

    def kill(self, rank):
        for name in os.listdir("/proc"):
            try:
                with open(f"/proc/{name}/stat") as stat, open(f"/proc/{name}/environ") as environ:
                    parent = int(stat.read().rsplit(")", 1)[1].split()[1])
                    if parent == self.process.pid and f"\0RANK={rank}\0" in environ.read():
                        return os.kill(int(name), signal.SIGKILL)
            except (OSError, ValueError):
                pass
        raise AssertionError(f"no rank {rank}")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds the ranks in /proc")
def test_whichever_rank_is_killed_torchrun_ends_with_the_same_weights(bench):
    """Rank 1 after a while; then both, while a checkpoint is written; each time anew from it."""
    flags = GAME.replace("--total-timesteps 192", "--total-timesteps 640")
    expected = bench.train(f"2 {flags}")
    run = Torchrun(bench, flags)
    folder = run.begins()
    checkpoint, deadline = bench.folder / folder / "checkpoint.pt", time.monotonic() + 60
    while not checkpoint.exists() and time.monotonic() < deadline:
        pass
    first = checkpoint.stat().st_mtime_ns  # killed before the next, it might begin in a new folder
    while checkpoint.stat().st_mtime_ns == first and time.monotonic() < deadline:
        pass
    time.sleep(random.uniform(0, 0.5))
    run.kill(1)
    for rank in (0, 1):
        assert run.begins() == folder
        unfinished, deadline = bench.folder / folder / "checkpoint.tmp", time.monotonic() + 60
        while not unfinished.exists() and time.monotonic() < deadline:
            pass
        run.kill(rank)
    out, err = run.process.communicate(timeout=120)
    assert run.process.returncode == 0 and out.splitlines()[-1] == folder, (out, err)
    assert same(learned(bench.folder / folder), learned(expected))


@pytest.mark.slow
def test_ctrl_c_saves_and_what_is_printed_goes_on(bench):
    flags = GAME.replace("--total-timesteps 192", "--total-timesteps 960")
    run = Torchrun(bench, flags)
    folder, deadline = run.begins(), time.monotonic() + 60
    while not (bench.folder / folder / "checkpoint.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(0.5)
    run.process.send_signal(signal.SIGINT)
    _, err = run.process.communicate(timeout=60)
    saved = state(bench.folder / folder)["envs"]["steps"]
    assert 0 < saved < 960 and f"--resume {folder}" in err, err
    ended = bench.run(f"2 --resume {folder}")
    assert ended.code == 0, ended
    assert same(learned(bench.folder / folder), learned(bench.train(f"2 {flags}")))
