"""The mathematics of dqn_cartpole.py: by hand, against value iteration, against brute force.

What dqn_atari.py has word for word is tested here for both.
"""

import itertools
import math

import dqn_cartpole as script
import numpy as np
import pytest
import torch
from diary import Diary, check_episodes, check_settings, recorded, side_by_side, train
from torch import nn

# For the tests that all scripts share.
TINY = (
    "--total-timesteps 2000 --learning-starts 100 --buffer-size 700 --target-network-frequency 50 "
    "--checkpoint-frequency 500 --eval-frequency 700 --eval-episodes 5"
)
OWN = "discrete"
OWN_FLAGS = "--total-timesteps 6000"
WRONG_SPACES = ["Pendulum-v1"]
DIVERGES = "--learning-rate 1e30"
BAD = [
    ("--learning-starts 32", "--batch-size"),
    ("--buffer-size 999", "--learning-starts"),
    ("--total-timesteps 1000", "--learning-starts"),
    ("--end-e -0.01", "--end-e"),
    ("--train-frequency 0", "--train-frequency"),
    ("--tau nan", "--tau"),
    ("--buffer-size 1e15", "--buffer-size"),
]
LEARNS = [("--seed 1", 195)]  # nine of ten seeds reach 500; chance: 22
# What others published, by the record's name after `<script>__`: shown beside our results.
PUBLISHED = {
    "CartPole-v1": "CleanRL 488.7 (500k), Zoo 500 (50k)",
    "Acrobot-v1": "CleanRL -91.5 (500k), Zoo -76.6 (100k)",
    "MountainCar-v0": "CleanRL -195.0 (500k), Zoo -100.8 (120k)",
}
# How speed.py measures the script, and beside what; its first lines explain the form.
SPEED = {
    "steps": 40_000,
    "first": 11_000,  # all programs learn from step 10,000 on, and rarely act at random
    "peers": {
        "CleanRL's dqn.py": {
            "flags": "--learning-starts 10000 --start-e 0.05 --end-e 0.05",
            # Its layers have 120 and 84 units: they get the 128 of the others.
            "replace": {
                "prod(), 120": "prod(), 128",
                "Linear(120, 84": "Linear(128, 128",
                "Linear(84": "Linear(128",
            },
            "equal": "one environment, compiled",
        },
        "Stable-Baselines3's DQN": {
            "env_id": "CartPole-v1",
            "num_envs": 10,
            "settings": {
                "buffer_size": 10_000,
                "learning_starts": 10_000,
                "batch_size": 128,
                "train_freq": 1,
                "gradient_steps": 1,
                "target_update_interval": 500,
                "exploration_initial_eps": 0.05,
                "exploration_final_eps": 0.05,
                "learning_rate": 2.5e-4,
                "policy_kwargs": {"net_arch": [128, 128]},
                "device": "cpu",
            },
            "equal": "ten environments, compiled",
        },
        "SBX's DQN": {
            "env_id": "CartPole-v1",
            "num_envs": 10,
            "settings": {
                "buffer_size": 10_000,
                "learning_starts": 10_000,
                "batch_size": 128,
                "train_freq": 1,
                "gradient_steps": 1,
                "target_update_interval": 500,
                "exploration_initial_eps": 0.05,
                "exploration_final_eps": 0.05,
                "learning_rate": 2.5e-4,
                "policy_kwargs": {"net_arch": [128, 128]},
            },
            "equal": "ten environments, compiled",
        },
    },
    "flags": "--learning-starts 10000 --start-e 0.05 --end-e 0.05 --buffer-size 10000 "
    "--train-frequency 10 --target-network-frequency 500 --batch-size 128 --hidden-size 128 "
    "--learning-rate 2.5e-4 --no-anneal-lr",
    "variants": {
        "ten environments, compiled": "--num-envs 10 --compile",
        "ten environments": "--num-envs 10",
        "one environment, compiled": "--num-envs 1 --compile",
        "one environment": "--num-envs 1",
    },
    "floors": {"floor": "12000 16000 --num-envs 10"},
}

# ---- linear_epsilon, td_target -------------------------------------------------------------------


def test_epsilon_by_hand():
    steps, expected = (0, 250, 500, 1000, 1001, 10**9), [1.0, 0.775, 0.55, 0.1, 0.1, 0.1]
    found = [script.linear_epsilon(step, 1.0, 0.1, 1000) for step in steps]
    assert found == pytest.approx(expected)
    assert script.linear_epsilon(5, 0.0, 1.0, 10) == 0.5  # it may rise
    assert script.linear_epsilon(0, 1.0, 0.1, 0) == 0.1  # and have no decay
    assert script.linear_epsilon(1, 1.0, 0.1, 0.5) == 0.1  # or a duration that is not whole


def test_target_by_hand():
    next_q = torch.tensor([[1.0, 5.0, 2.0], [-3.0, -4.0, -7.0], [10.0, 20.0, 30.0]])
    rewards, terminated = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([False, False, True])
    expected = torch.tensor([1 + 0.5 * 5, 2 + 0.5 * -3, 3.0])
    torch.testing.assert_close(script.td_target(rewards, terminated, next_q, 0.5), expected)


# ---- update, update_target -----------------------------------------------------------------------


class Table(nn.Module):
    """A number for each state and action. An observation is a state, one-hot."""

    def __init__(self, q):
        super().__init__()
        self.q = nn.Parameter(torch.as_tensor(q).double().clone())

    def forward(self, obs):
        return obs @ self.q


def batch_of(states, transitions):
    """Of (state, action, reward, next state, terminated)."""
    eye = torch.eye(states, dtype=torch.float64)
    state, action, reward, following, terminated = map(torch.tensor, zip(*transitions))
    return script.Batch(eye[state], action, reward.double(), eye[following], terminated)


def test_updates_find_the_values_of_value_iteration():
    """6 states, 3 actions, rewards and ways at random; about a quarter of the steps terminate."""
    random, expected = np.random.default_rng(0), np.zeros((6, 3))
    process = [
        (s, a, random.normal(), int(random.integers(6)), bool(random.random() < 0.25))
        for s in range(6) for a in range(3)
    ]  # fmt: skip
    q_network, target_network = Table(np.zeros((6, 3))), Table(np.zeros((6, 3)))
    # The gradient of the mean of 18 squares is the error / 9: in one step, Q becomes y.
    optimizer, batch = torch.optim.SGD(q_network.parameters(), lr=9.0), batch_of(6, process)
    for _ in range(300):
        values = expected.max(1)
        for s, a, reward, following, terminated in process:
            expected[s, a] = reward + 0.9 * values[following] * (not terminated)
        script.update(q_network, target_network, optimizer, batch, script.Args(gamma=0.9))
        script.update_target(target_network, q_network, 1.0)
    np.testing.assert_allclose(q_network.q.detach(), expected, atol=1e-6)


def test_update_takes_one_step_down_the_gradient_and_reports():
    """Q(0, 1) = 3 and y = 2 + 0.5 * 6 = 5; Q(1, 0) = 7 and y = 4. y itself is a constant."""
    q_network, target_network = Table([[1.0, 3.0], [7.0, 8.0]]), Table([[0.0, 0.0], [4.0, 6.0]])
    batch = batch_of(2, [(0, 1, 2.0, 1, False), (1, 0, 4.0, 1, True)])
    optimizer = torch.optim.SGD(q_network.parameters(), lr=0.1)
    q_network.q.grad = torch.ones(2, 2).double()  # what is left over is no matter
    metrics = script.update(q_network, target_network, optimizer, batch, script.Args(gamma=0.5))
    expected = torch.tensor([[1.0, 3 + 0.1 * 2], [7 - 0.1 * 3, 8.0]]).double()  # of the mean of two
    torch.testing.assert_close(q_network.q.detach(), expected)
    assert target_network.q.grad is None and target_network.q.tolist() == [[0, 0], [4, 6]]
    found = {tag: value.item() for tag, value in metrics.items()}
    assert found == pytest.approx({"losses/td_loss": (2**2 + 3**2) / 2, "losses/q_values": 5.0})
    assert not any(value.requires_grad for value in metrics.values())


@pytest.mark.parametrize("tau", [0.0, 0.25, 1.0])
def test_target_update_moves_a_share_of_the_way(tau):
    target_network, q_network = script.QNetwork(4, 2, 8), script.QNetwork(4, 2, 8)
    old, new = ([p.detach().clone() for p in n.parameters()] for n in (target_network, q_network))
    script.update_target(target_network, q_network, tau)
    for a, b, after, source in zip(old, new, target_network.parameters(), q_network.parameters()):
        torch.testing.assert_close(after.detach(), (1 - tau) * a + tau * b)
        assert torch.equal(source, b) and after.data_ptr() != source.data_ptr() and after.is_leaf


def test_hidden_size_is_the_width_of_both_layers():
    network = script.QNetwork(4, 2, 8)
    shapes = [tuple(weights.shape) for weights in network.parameters()]
    assert shapes == [(8, 4), (8,), (8, 8), (8,), (2, 8), (2,)]
    assert sum(isinstance(part, nn.ReLU) for part in network.layers) == 2


# ---- act -----------------------------------------------------------------------------------------


def likes(obs):
    """The action of the largest value is the observation's first number, modulo 3."""
    return 2 * np.eye(3)[obs[:, 0].astype(int) % 3] - 1


def test_without_epsilon_every_environment_gets_the_action_it_likes():
    obs = np.tile(np.float32([[2], [0], [1], [5]]), (50, 1))
    assert script.act(likes, obs, 0.0).tolist() == [2, 0, 1, 2] * 50


def test_the_actor_is_the_q_network_also_after_an_update():
    """And the evaluation is greedy."""
    torch.manual_seed(0)
    q_network, obs = script.QNetwork(4, 3, 8), torch.randn(50, 4)
    actor = script.Actor(q_network)
    for _ in range(2):
        q_values = q_network(obs).detach()
        np.testing.assert_allclose(actor(obs.numpy()), q_values, rtol=1e-4, atol=1e-6)
        found = script.play(script.Args(), q_network, obs.numpy())
        assert found.tolist() == q_values.argmax(1).tolist() and len(set(found)) > 1
        with torch.no_grad():
            for weights in q_network.parameters():
                weights += 0.3 * torch.randn_like(weights)


@pytest.mark.parametrize("epsilon", [0.3, 1.0])
def test_epsilon_is_the_probability_of_any_action_for_each_environment_apart(epsilon):
    torch.manual_seed(0)
    actions = script.act(likes, np.ones((40_000, 1), np.float32), epsilon)
    shares = np.bincount(actions, minlength=3) / 40_000
    expected = epsilon / 3 + (1 - epsilon) * np.array([0, 1, 0])
    np.testing.assert_allclose(shares, expected, atol=0.01)  # 4 standard errors
    both = (actions[::2] != 1) & (actions[1::2] != 1)  # two neighbours explored
    assert both.mean() == pytest.approx((epsilon * 2 / 3) ** 2, abs=0.015)


# ---- ReplayBuffer --------------------------------------------------------------------------------


def add(buffer, numbers):
    """Adds transitions, each of which says in all its parts which one it is."""
    n = np.array(numbers)
    obs, next_obs = np.stack([n, -n], 1), np.stack([n + 0.5, 0 * n + 7], 1)
    buffer.add(np.float32(obs), n % 3, np.float32(n / 2), np.float32(next_obs), n % 4 == 0)


def numbers_in(batch):
    """Which transitions a batch has. All parts of a row must be of the same one."""
    numbers, expected = batch.obs[:, 0].int().tolist(), script.ReplayBuffer(len(batch.obs), 2)
    add(expected, numbers)
    for part, other in zip(batch, expected.rows, strict=True):
        assert torch.equal(part, other) and part.dtype == other.dtype
    return numbers


@pytest.mark.parametrize("size, at_once, count", [
    (7, 1, 5), (7, 1, 20), (7, 3, 6), (7, 3, 21), (8, 4, 16), (3, 5, 10),  # 5 do not fit into 3
])  # fmt: skip
def test_buffer_holds_the_last_transitions_in_a_ring(size, at_once, count):
    """N at once wrap around as one by one do."""
    torch.manual_seed(0)
    buffer, ring = script.ReplayBuffer(size, 2), {}
    for first in range(1, count + 1, at_once):
        numbers = list(range(first, min(first + at_once, count + 1)))
        add(buffer, numbers)
        ring |= {(number - 1) % size: number for number in numbers}
    assert buffer.num_added == count
    assert [int(buffer.rows.obs[row, 0]) for row in sorted(ring)] == [ring[k] for k in sorted(ring)]
    sampled = numbers_in(buffer.sample(20_000))
    numbers, counts = np.unique(sampled, return_counts=True)
    assert numbers.tolist() == list(range(max(1, count - size + 1), count + 1))
    np.testing.assert_allclose(counts / 20_000, 1 / len(numbers), atol=0.015)  # all alike


def test_buffer_and_batch_are_copies():
    buffer, obs = script.ReplayBuffer(3, 2), np.float32([[1, 2]])
    buffer.add(obs, np.array([0]), np.float32([1]), obs, np.array([False]))
    obs[:] = 9
    batch = buffer.sample(1)
    buffer.rows.obs[:] = 5
    assert batch.obs.tolist() == batch.next_obs.tolist() == [[1, 2]]


@pytest.mark.parametrize("count", [0, 4, 7, 20])
def test_buffer_comes_back_from_a_checkpoint(tmp_path, count):
    """And goes on at the right row."""
    buffers, batches = [script.ReplayBuffer(7, 2), script.ReplayBuffer(7, 2)], []
    add(buffers[0], range(1, count + 1))
    torch.save(buffers[0].state_dict(), tmp_path / "buffer.pt")
    saved = torch.load(tmp_path / "buffer.pt", weights_only=True)
    buffers[1].load_state_dict(saved)
    for buffer in buffers:
        add(buffer, range(100, 103))
        torch.manual_seed(1)
        batches.append(numbers_in(buffer.sample(100)))
    assert batches[0] == batches[1] and {100, 101, 102} <= set(batches[0])


def test_a_checkpoint_has_the_filled_rows_only(tmp_path):
    buffer = script.ReplayBuffer(100_000, 2)
    add(buffer, range(10))
    torch.save(buffer.state_dict(), tmp_path / "buffer.pt")
    assert (tmp_path / "buffer.pt").stat().st_size < 10_000


# ---- The loop ------------------------------------------------------------------------------------

FEW = dict(
    env_id="Diary-v0", total_timesteps=1200, num_envs=3, learning_starts=50, batch_size=16,
    buffer_size=1000, hidden_size=16, train_frequency=4, target_network_frequency=40,
    eval_episodes=3, exploration_fraction=0.5, learning_rate=1e-2,
)  # fmt: skip


@pytest.mark.parametrize("num_envs, size", [(1, 5000), (3, 250)])
def test_the_buffer_holds_what_really_happened(tmp_path, num_envs, size):
    """Also where an episode ends: its last observation, and terminated only if it was."""
    state, points = train(script, tmp_path, **FEW | {"num_envs": num_envs, "buffer_size": size})
    steps = side_by_side(num_envs)
    assert state["buffer"]["num_added"] == state["envs"]["steps"] == len(steps) == 1200
    ring = [None] * min(size, 1200)
    for number, (_, (obs, action, reward, next_obs, terminated, _)) in enumerate(steps):
        ring[number % size] = obs, action, reward, next_obs, terminated
    for column, expected in zip(state["buffer"]["rows"], zip(*ring), strict=True):
        np.testing.assert_allclose(column, np.array(expected), rtol=1e-6)
    check_episodes(points, steps)


@pytest.mark.parametrize(
    "num_envs, train_frequency, gradient_steps, target_network_frequency, learning_starts, anneal",
    [
        (1, 1, 1, 10, 16, True), (1, 7, 3, 10, 50, False), (4, 4, 1, 4, 50, True),
        (4, 10, 1, 25, 50, True), (3, 5, 1, 1, 50, True), (8, 1, 1, 3, 101, True),
    ],
)  # fmt: skip
def test_the_loop_does_each_thing_when_it_is_due(
    tmp_path, monkeypatch, num_envs, train_frequency, gradient_steps, target_network_frequency,
    learning_starts, anneal,
):  # fmt: skip
    """In a plain loop over the steps: first a round of them, then what is due after each."""
    notes, networks = [], set()

    def spy(name, note):
        def spying(*arguments, function=getattr(script, name), **keywords):
            notes.append((name, note(*arguments, **keywords)))
            return function(*arguments, **keywords)

        monkeypatch.setattr(script, name, spying)

    def note_update(q_network, target_network, optimizer, batch, args):
        networks.add((q_network, target_network))
        return optimizer.param_groups[0]["lr"], type(optimizer), len(batch.obs), args.gamma

    def note_target(target_network, q_network, tau):
        networks.add((q_network, target_network))
        return tau

    def note_act(actor, obs, epsilon):
        return obs.tolist(), epsilon

    spy("act", note_act)
    spy("update", note_update)
    spy("update_target", note_target)
    train(script, tmp_path, **FEW | {
        "num_envs": num_envs, "train_frequency": train_frequency, "gradient_steps": gradient_steps,
        "target_network_frequency": target_network_frequency, "learning_starts": learning_starts,
        "total_timesteps": 400, "anneal_lr": anneal, "tau": 0.5, "gamma": 0.8, "end_e": 0.2,
    })  # fmt: skip
    steps, expected = side_by_side(num_envs), []
    for first in range(0, 400, num_envs):
        seen = [step[0] for _, step in steps[first : first + num_envs]]
        expected.append(("act", (seen, pytest.approx(max(0.2, 1 - 0.8 * first / 200)))))
        for step in range(first + 1, first + num_envs + 1):
            if step >= learning_starts and step % train_frequency == 0:
                rate = pytest.approx(1e-2 * (1 - first / 400 if anneal else 1))
                expected += [("update", (rate, torch.optim.Adam, 16, 0.8))] * gradient_steps
            if step >= learning_starts and step % target_network_frequency == 0:
                expected.append(("update_target", 0.5))
    assert notes[: len(expected)] == expected
    evaluation = notes[len(expected) :]
    assert evaluation and all(name == "act" and note[1] == 0 for name, note in evaluation)
    ((q_network, target_network),) = networks
    assert q_network is not target_network


def test_every_environment_gets_the_action_that_was_chosen_for_it(tmp_path, monkeypatch):
    """By a network that is first made from the seed; in the evaluation by the one that is saved."""
    acts = recorded(monkeypatch, script, "act")
    state, _ = train(script, tmp_path, **FEW | {"start_e": 0.0, "end_e": 0.0, "seed": 3})
    chosen = {}
    for (_, obs, *_), actions in acts:
        chosen |= {tuple(row): action for row, action in zip(obs.tolist(), actions.tolist())}
    steps = [step for env in Diary.made for step in env.steps]
    assert all(chosen[tuple(before)] == action for before, action, *_ in steps)
    torch.manual_seed(3)
    first = script.QNetwork(2, 3, 16).state_dict()
    for weights, ((actor, *_), _) in (first, acts[0]), (state["network"], acts[-1]):
        for expected, found in zip(weights.values(), itertools.chain(*actor.layers), strict=True):
            np.testing.assert_array_equal(found, expected)


def test_at_the_start_the_target_network_is_the_q_network(tmp_path):
    never = {"train_frequency": 1000, "target_network_frequency": 1000}
    state, _ = train(script, tmp_path, **FEW | never | {"total_timesteps": 100})
    for name, weights in state["network"].items():
        assert torch.equal(weights, state["target_network"][name])


def test_losses_and_schedules_are_logged_every_1000_steps(tmp_path, monkeypatch):
    """Rounds of 3 steps: what is due at 1000 is logged at the end of its round, 1002."""
    metrics, update = [], script.update
    monkeypatch.setattr(script, "update", lambda *a: metrics.append(update(*a)) or metrics[-1])
    flags = {"total_timesteps": 3003, "train_frequency": 10}
    _, points = train(script, tmp_path, **FEW | flags)
    steps = (1002, 2001, 3000)  # the first update is at step 50
    expected = {tag: [metrics[step // 10 - 5][tag].item() for step in steps] for tag in metrics[0]}
    expected["charts/learning_rate"] = [1e-2 * (1 - step / 3003) for step in (999, 1998, 2997)]
    expected["charts/epsilon"] = [1 - 0.95 * 999 / 1501.5, 0.05, 0.05]
    for tag, values in expected.items():
        np.testing.assert_allclose(points[tag], list(zip(steps, values)), rtol=1e-5)


@pytest.mark.parametrize("where", ["loss", "weight"])
def test_a_run_that_diverges_stops_and_is_not_saved(tmp_path, monkeypatch, where):
    """At the next point of the log, or at the next checkpoint."""
    update = script.update

    def spoil(q_network, *others):
        metrics = update(q_network, *others)
        if where == "loss":
            return metrics | {"losses/td_loss": torch.tensor(math.nan)}
        next(q_network.parameters()).data[0, 0] = math.nan
        return metrics

    monkeypatch.setattr(script, "update", spoil)
    frequency = {"loss": 0, "weight": 90}[where]
    with pytest.raises(script.UsageError, match="not finite") as error:
        train(script, tmp_path, **FEW, checkpoint_frequency=frequency)
    assert f"Stopped at step {1002 if where == 'loss' else 90}." in error.value.__notes__[0]
    (folder,) = tmp_path.iterdir()
    assert script.read_checkpoint(folder)["envs"]["steps"] == 0


@pytest.mark.parametrize("env_id, value", [
    ("Truncates-v0", 1 / (1 - 0.8)), ("Terminates-v0", 1 / (1 - 0.8 * 2 / 3))
])  # fmt: skip
def test_a_time_limit_is_not_the_end_of_the_world(tmp_path, env_id, value):
    """Truncated for ever, a reward of 1 is worth 1 / (1 - gamma).

    If every third step terminates, which the only state cannot foresee, v = 1 + 2/3 * gamma * v.
    """
    flags = {"env_id": env_id, "gamma": 0.8, "total_timesteps": 3000, "train_frequency": 3}
    state, _ = train(script, tmp_path, **FEW | flags | {"batch_size": 64, "learning_starts": 64})
    q_network = script.QNetwork(1, 2, 16)
    q_network.load_state_dict(state["network"])
    found = q_network(torch.ones(1, 1)).detach()
    torch.testing.assert_close(found, torch.full((1, 2), value), rtol=0.05, atol=0)


def test_the_least_settings_are_allowed():
    script.Args(learning_starts=16, batch_size=16, buffer_size=16, total_timesteps=17, tau=0.0)
    for change in ({"learning_starts": 15}, {"buffer_size": 15}, {"total_timesteps": 16}):
        with pytest.raises(ValueError, match="--" + next(iter(change)).replace("_", "-")):
            least = {"learning_starts": 16, "buffer_size": 16, "total_timesteps": 17}
            script.Args(**{"batch_size": 16} | least | change)


def test_every_setting_of_the_algorithm_changes_the_outcome(tmp_path):
    def outcome(**settings):
        state, _ = train(script, tmp_path, **FEW | {"total_timesteps": 250} | settings)
        return [weights.tolist() for weights in state["network"].values()]

    check_settings(script, outcome, {
        "seed": 2, "total_timesteps": 260, "num_envs": 4, "learning_rate": 5e-3, "anneal_lr": False,
        "buffer_size": 100, "gamma": 0.9, "tau": 0.5, "target_network_frequency": 50,
        "batch_size": 15, "start_e": 0.9, "end_e": 0.5, "exploration_fraction": 0.2,
        "learning_starts": 100, "train_frequency": 5, "gradient_steps": 2, "hidden_size": 15,
    })  # fmt: skip
