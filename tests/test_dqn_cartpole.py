"""The mathematics and the loop of dqn_cartpole.py, against value iteration, brute force and hand-made tables.

The functions that dqn_atari.py has, too, are tested here for both.
"""

import math

import dqn_cartpole as script
import gymnasium as gym
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

# The description for the common tests: README.md explains it.
TINY = (
    "--total-timesteps 2000 --num-envs 2 --checkpoint-frequency 300 --eval-frequency 700 "
    "--eval-episodes 5 --learning-starts 200 --buffer-size 1000 --train-frequency 8"
)
OWN = "discrete"
OWN_FLAGS = "--total-timesteps 6000"
WRONG_SPACES = ["Pendulum-v1"]
DIVERGES = "--learning-rate 1e30"
BAD = [
    ("--tau 1.1", "--tau"),
    ("--learning-starts 5", "--batch-size"),
    ("--buffer-size 10", "--buffer-size"),
    ("--total-timesteps 500", "--total-timesteps"),
    ("--buffer-size 1e15", "--buffer-size"),
]
LEARNS = [("--seed 1", 195)]  # most seeds reach 500

# ---- linear_epsilon -------------------------------------------------------------------------------------------------


def test_epsilon_at_the_start_halfway_at_the_end_and_after():
    steps = (0, 250, 500, 1000, 1001, 10**9)
    expected = [1.0, 0.775, 0.55, 0.1, 0.1, 0.1]
    assert [script.linear_epsilon(step, 1.0, 0.1, 1000) for step in steps] == pytest.approx(expected)


def test_epsilon_may_rise_and_may_have_no_decay():
    assert script.linear_epsilon(5, 0.0, 1.0, 10) == 0.5
    assert script.linear_epsilon(0, 1.0, 0.1, 0) == 0.1
    assert script.linear_epsilon(1, 1.0, 0.1, 0.5) == 0.1  # a duration need not be whole


# ---- td_target ------------------------------------------------------------------------------------------------------

NEXT_Q = torch.tensor([[1.0, 5.0, 2.0], [-3.0, -4.0, -7.0], [10.0, 20.0, 30.0]])
REWARDS, TERMINATED = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([False, False, True])


def test_target_by_hand():
    expected = torch.tensor([1 + 0.5 * 5, 2 + 0.5 * -3, 3.0])
    torch.testing.assert_close(script.td_target(REWARDS, TERMINATED, NEXT_Q, 0.5), expected)


def test_double_target_by_hand_where_the_networks_disagree():
    """The online network likes actions 2, 1 and 0; what counts is what the target network thinks of these."""
    online = torch.tensor([[0.0, 0.0, 1.0], [0.0, 9.0, 0.0], [5.0, 0.0, 0.0]])
    expected = torch.tensor([1 + 0.5 * 2, 2 + 0.5 * -4, 3.0])
    torch.testing.assert_close(script.td_target(REWARDS, TERMINATED, NEXT_Q, 0.5, online), expected)


def test_double_target_is_the_plain_one_where_the_networks_agree():
    plain = script.td_target(REWARDS, TERMINATED, NEXT_Q, 0.9)
    assert torch.equal(script.td_target(REWARDS, TERMINATED, NEXT_Q, 0.9, NEXT_Q), plain)


def test_double_target_is_not_too_high():
    """All true values are 0 and the two networks' errors are independent: the plain maximum is the expected largest of
    4 normal numbers, 1.029; the double estimate has mean 0."""
    generator = torch.Generator().manual_seed(0)
    target, online = torch.randn(2, 40_000, 4, generator=generator)
    zeros = torch.zeros(40_000)
    plain = script.td_target(zeros, zeros.bool(), target, 1.0)
    double = script.td_target(zeros, zeros.bool(), target, 1.0, online)
    assert plain.mean().item() == pytest.approx(1.029, abs=0.02)
    assert double.mean().item() == pytest.approx(0.0, abs=0.02)


# ---- update, against value iteration --------------------------------------------------------------------------------


class Table(nn.Module):
    """A number for each state and action; an observation is a state, one-hot."""

    def __init__(self, num_states, num_actions):
        super().__init__()
        self.q = nn.Parameter(torch.zeros(num_states, num_actions, dtype=torch.float64))

    def forward(self, obs):
        return obs @ self.q


def random_process(states=6, actions=3):
    """(state, action) -> (reward, next state, terminated), at random; about a quarter of the transitions terminate."""
    generator = np.random.default_rng(0)
    return {
        (s, a): (generator.normal(), int(generator.integers(states)), bool(generator.random() < 0.25))
        for s in range(states) for a in range(actions)
    }  # fmt: skip


def one_hot_batch(process, states):
    eye = torch.eye(states, dtype=torch.float64)
    rewards, following, terminated = zip(*process.values())
    state, action = zip(*process)
    return script.Batch(
        eye[list(state)], torch.tensor(action), torch.tensor(rewards).double(), eye[list(following)],
        torch.tensor(terminated),
    )  # fmt: skip


@pytest.mark.parametrize("double_q", [False, True])
def test_update_finds_the_values_of_value_iteration(double_q):
    process = random_process()
    expected = np.zeros((6, 3))
    for _ in range(300):
        expected = np.array([
            [
                r + (0.0 if end else 0.9 * expected[following].max())
                for r, following, end in (process[s, a] for a in range(3))
            ]
            for s in range(6)
        ])  # fmt: skip
    q_network, target_network = Table(6, 3), Table(6, 3)
    batch = one_hot_batch(process, 6)
    optimizer = torch.optim.SGD(q_network.parameters(), lr=9.0)  # the gradient of the mean of 18 squares: Q becomes y
    for _ in range(300):
        script.update(q_network, target_network, optimizer, batch, script.Args(gamma=0.9, double_q=double_q))
        script.update_target(target_network, q_network, 1.0)
    np.testing.assert_allclose(q_network.q.detach(), expected, atol=1e-6)


def test_update_takes_one_step_down_the_gradient_and_reports():
    """Q(0, 1) = 3 and y = 2 + 0.5 * 6 = 5: the gradient of (3 - 5)^2 is -4, and nothing else moves, not even the
    values that y was made of: y is a constant."""
    q_network, target_network = Table(2, 2), Table(2, 2)
    q_network.q.data[:] = torch.tensor([[1.0, 3.0], [7.0, 8.0]])
    target_network.q.data[:] = torch.tensor([[0.0, 0.0], [4.0, 6.0]])
    optimizer = torch.optim.SGD(q_network.parameters(), lr=0.1)
    batch = one_hot_batch({(0, 1): (2.0, 1, False)}, 2)
    for double_q in (False, True):
        before = q_network.q.detach().clone()
        args = script.Args(gamma=0.5, double_q=double_q)
        metrics = script.update(q_network, target_network, optimizer, batch, args)
        before[0, 1] += 0.1 * 2 * (5 - before[0, 1])
        torch.testing.assert_close(q_network.q.detach(), before)
    assert target_network.q.grad is None and target_network.q.tolist() == [[0.0, 0.0], [4.0, 6.0]]
    assert metrics["losses/q_values"].item() == pytest.approx(3.4)  # before the second step
    assert metrics["losses/td_loss"].item() == pytest.approx((3.4 - 5) ** 2)
    assert not any(value.requires_grad for value in metrics.values())


def test_update_lets_the_online_network_choose_if_asked():
    q_network, target_network = Table(2, 2), Table(2, 2)
    q_network.q.data[:] = torch.tensor([[0.0, 0.0], [9.0, 8.0]])
    target_network.q.data[:] = torch.tensor([[0.0, 0.0], [4.0, 6.0]])
    optimizer = torch.optim.SGD(q_network.parameters(), lr=0.0)
    batch = one_hot_batch({(0, 1): (2.0, 1, False)}, 2)
    plain, double = (
        script.update(q_network, target_network, optimizer, batch, args)["losses/td_loss"].item()
        for args in (script.Args(gamma=0.5), script.Args(gamma=0.5, double_q=True))
    )
    assert (plain, double) == (25.0, 16.0)  # (2 + 0.5 * 6)^2 and (2 + 0.5 * 4)^2


def test_loss_is_a_mean_over_the_batch():
    process = random_process()
    q_network, target_network = Table(6, 3), Table(6, 3)
    optimizer = torch.optim.SGD(q_network.parameters(), lr=0.0)
    batch = one_hot_batch(process, 6)
    loss = script.update(q_network, target_network, optimizer, batch, script.Args())["losses/td_loss"]
    assert loss.item() == pytest.approx(np.mean([reward**2 for reward, _, _ in process.values()]))


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_update_stops_at_what_is_not_finite_before_it_spoils_the_weights(poison):
    q_network = Table(2, 2)
    optimizer = torch.optim.SGD(q_network.parameters(), lr=0.1)
    with pytest.raises(FloatingPointError):
        batch = one_hot_batch({(0, 1): (poison, 1, False)}, 2)
        script.update(q_network, Table(2, 2), optimizer, batch, script.Args())
    assert q_network.q.isfinite().all()


# ---- update_target --------------------------------------------------------------------------------------------------


def networks():
    torch.manual_seed(0)
    return script.QNetwork(4, 2, 8, norm_obs=False), script.QNetwork(4, 2, 8, norm_obs=False)


def test_target_update_moves_a_share_of_the_way():
    target_network, q_network = networks()
    before = [weights.detach().clone() for weights in target_network.parameters()]
    online = [weights.detach().clone() for weights in q_network.parameters()]
    script.update_target(target_network, q_network, 0.25)
    for old, new, after in zip(before, online, target_network.parameters()):
        torch.testing.assert_close(after.detach(), 0.75 * old + 0.25 * new)
    assert all(torch.equal(a, b) for a, b in zip(online, q_network.parameters()))


def test_target_update_with_tau_1_is_a_copy_of_its_own():
    target_network, q_network = networks()
    script.update_target(target_network, q_network, 1.0)
    for ours, theirs in zip(target_network.parameters(), q_network.parameters()):
        assert torch.equal(ours, theirs) and ours.data_ptr() != theirs.data_ptr()
        assert ours.is_leaf and ours.grad_fn is None


# ---- select_actions -------------------------------------------------------------------------------------------------


class Likes(nn.Module):
    """The action of the largest value is the observation's first number, modulo the number of actions."""

    def __init__(self, num_actions=3):
        super().__init__()
        self.num_actions, self.scale = num_actions, nn.Parameter(torch.tensor(2.0))

    def forward(self, obs):
        assert obs.dtype == torch.float32
        return self.scale * nn.functional.one_hot(obs[:, 0].long() % self.num_actions, self.num_actions) - 1


def test_without_epsilon_every_environment_gets_the_action_it_likes():
    obs = torch.tensor([[2.0, 0.0], [0.0, 0.0], [1.0, 0.0], [5.0, 0.0]])
    assert script.select_actions(Likes(), obs, 0.0).tolist() == [2, 0, 1, 2]


@pytest.mark.parametrize("epsilon", [0.3, 1.0])
def test_epsilon_is_the_probability_of_any_action(epsilon):
    torch.manual_seed(0)
    obs = torch.full((30_000, 1), 1.0)
    shares = np.bincount(script.select_actions(Likes(), obs, epsilon), minlength=3) / 30_000
    expected = epsilon / 3 + (1 - epsilon) * np.array([0, 1, 0])
    np.testing.assert_allclose(shares, expected, atol=4 * math.sqrt(0.25 / 30_000))  # 4 standard errors


def test_environments_explore_each_on_its_own():
    torch.manual_seed(0)
    rounds = np.array([script.select_actions(Likes(), torch.ones(2, 1), 0.5).tolist() for _ in range(2000)])
    explored = rounds != 1  # in a third of the rounds each, and in a ninth both
    assert (explored[:, 0] & explored[:, 1]).mean() == pytest.approx(1 / 9, abs=0.03)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_an_observation_that_is_not_finite_is_named(poison):
    q_network, _ = networks()
    with pytest.raises(FloatingPointError, match="observation"):
        script.select_actions(q_network, torch.tensor([[0.0] * 4, [poison] * 4]), 1.0)


def test_acting_keeps_no_graph():
    assert not script.select_actions(Likes(), torch.ones(2, 1), 0.0).requires_grad


# ---- ReplayBuffer ---------------------------------------------------------------------------------------------------


def transition(number):
    """One that says in each of its parts which it is."""
    return np.array([number, -number]), number % 3, number / 2, np.array([number + 0.5, 7.0]), number % 4 == 0


def number_of(batch, row):
    """Which transition a row is; all its parts must be of the same one."""
    number = int(batch.obs[row, 0])
    parts = [np.asarray(part[row], dtype=np.float64).tolist() for part in batch]
    assert parts == [np.asarray(part, dtype=np.float64).tolist() for part in transition(number)]
    return number


def filled(size, count):
    buffer = script.ReplayBuffer(size, 2)
    for number in range(1, count + 1):
        buffer.add(*transition(number))
    return buffer


@pytest.mark.parametrize("count", [1, 3, 7, 8, 20])
def test_buffer_holds_the_last_transitions_whole(count):
    torch.manual_seed(0)
    batch = filled(7, count).sample(500)
    assert [part.shape for part in batch] == [(500, 2), (500,), (500,), (500, 2), (500,)]
    assert [part.dtype for part in batch] == [torch.float32, torch.int64, torch.float32, torch.float32, torch.bool]
    assert {number_of(batch, row) for row in range(500)} == set(range(max(1, count - 6), count + 1))


@pytest.mark.parametrize("size, count", [(10, 25), (50, 10)])
def test_buffer_samples_all_alike(size, count):
    torch.manual_seed(0)
    batch = filled(size, count).sample(20_000)
    shares = np.unique(batch.obs[:, 0], return_counts=True)[1] / 20_000
    np.testing.assert_allclose(shares, [0.1] * 10, atol=4 * math.sqrt(0.09 / 20_000))  # 4 standard errors


def test_buffer_and_batch_keep_copies():
    buffer, obs = script.ReplayBuffer(3, 2), np.array([1.0, 2.0])
    buffer.add(obs, 0, 1.0, obs, False)
    obs[:] = 9
    batch = buffer.sample(1)
    assert batch.obs.tolist() == batch.next_obs.tolist() == [[1, 2]]
    buffer.arrays[0][:] = 5
    assert batch.obs.tolist() == [[1, 2]]


@pytest.mark.parametrize("count", [0, 4, 7, 20])
def test_buffer_comes_back_from_a_checkpoint(tmp_path, count):
    original, restored = filled(7, count), script.ReplayBuffer(7, 2)
    torch.save(original.state_dict(), tmp_path / "buffer.pt")
    restored.load_state_dict(torch.load(tmp_path / "buffer.pt", weights_only=True))
    for buffer in (original, restored):
        for number in range(count + 1, count + 5):  # goes on at the right row
            buffer.add(*transition(number))
    batches = []
    for buffer in (original, restored):
        torch.manual_seed(1)
        batches.append(buffer.sample(100))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*batches))


def test_checkpoint_has_the_filled_rows_only(tmp_path):
    torch.save(filled(100_000, 10).state_dict(), tmp_path / "buffer.pt")
    assert (tmp_path / "buffer.pt").stat().st_size < 10_000


# ---- is_due ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_steps", [1, 3, 4, 10])
@pytest.mark.parametrize("frequency", [1, 3, 4, 7])
def test_is_due_against_a_search(num_steps, frequency):
    for step in range(num_steps, 60):
        multiples = [k for k in range(step - num_steps + 1, step + 1) if k % frequency == 0]
        assert script.is_due(step, num_steps, frequency) == bool(multiples)


def test_frequency_0_is_never():
    assert not script.is_due(100, 10, 0)


# ---- The loop -------------------------------------------------------------------------------------------------------


class Diary(gym.Env):
    """Episodes of random length, of which a third terminate, a third are truncated, and a third do both in one step;
    with random observations in an array that is reused. Every environment keeps a diary of what really happened."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = gym.spaces.Discrete(3, start=5)
    made = []

    def __init__(self, lengths=(1, 6)):
        self.obs, self.lengths, self.steps, self.seeds = np.zeros(2), lengths, [], []
        Diary.made.append(self)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.seeds.append(seed)
        self.left, self.end = self.np_random.integers(*self.lengths, endpoint=True), self.np_random.integers(3)
        self.obs[:] = self.np_random.random(2)
        return self.obs, {}

    def step(self, action):
        assert self.action_space.contains(action) and self.left > 0
        before, reward = self.obs.astype(np.float32).tolist(), self.np_random.normal()
        self.left -= 1
        self.obs[:] = self.np_random.random(2)
        ends = self.left == 0
        terminated, truncated = bool(ends and self.end < 2), bool(ends and self.end > 0)
        self.steps.append((before, action - 5, reward, self.obs.astype(np.float32).tolist(), terminated, truncated))
        return self.obs, reward, terminated, truncated, {}


gym.register("Diary-v0", entry_point=Diary, disable_env_checker=True)
gym.register("FiveSteps-v0", entry_point=Diary, kwargs={"lengths": (5, 5)}, disable_env_checker=True)

FEW = dict(
    env_id="Diary-v0", total_timesteps=1200, num_envs=2, learning_starts=50, batch_size=16, buffer_size=1000,
    hidden_size=16, train_frequency=4, target_network_frequency=40, eval_episodes=2, checkpoint_frequency=0,
    exploration_fraction=0.5, learning_rate=1e-2,
)  # fmt: skip


def train(tmp_path, **settings):
    """Runs in this process; returns the final checkpoint and the scalars as {tag: [(step, value), ...]}."""
    Diary.made.clear()
    run_dir = script.train(script.Args(**FEW | settings, runs_dir=str(tmp_path)))
    count = (FEW | settings)["num_envs"]
    for i, env in enumerate(Diary.made[count:]):  # after each checkpoint new environments, which go on with the diaries
        Diary.made[i % count].steps += env.steps
        Diary.made[i % count].seeds += env.seeds
    del Diary.made[count:]
    return state_of(run_dir), scalars_of(run_dir)


def state_of(run_dir):
    return torch.load(run_dir / "checkpoint.pt", weights_only=True)


def scalars_of(run_dir):
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def diary(num_envs, total):
    """The steps of all environments in their order: in a round, environment after environment."""
    rounds = zip(*(env.steps[: math.ceil(total / num_envs)] for env in Diary.made[:num_envs]))
    return [step for steps in rounds for step in steps]


@pytest.mark.parametrize("num_envs, size", [(1, 5000), (3, 5000), (2, 250), (3, 250)])
def test_the_buffer_holds_what_really_happened(tmp_path, num_envs, size):
    """Also where an episode ends: its last observation, not the next one's first, and terminated only if it was."""
    state, _ = train(tmp_path, num_envs=num_envs, buffer_size=size)
    steps = diary(num_envs, 1200)
    assert state["buffer"]["num_added"] == len(steps) == state["global_step"] == 1200
    ring = [None] * min(size, 1200)
    for number, step in enumerate(steps):
        ring[number % size] = step
    obs, actions, rewards, next_obs, terminated = (part.tolist() for part in state["buffer"]["rows"])
    assert obs == [step[0] for step in ring] and actions == [step[1] for step in ring]
    assert rewards == pytest.approx([step[2] for step in ring])
    assert next_obs == [step[3] for step in ring] and terminated == [step[4] for step in ring]


def follow(monkeypatch):
    """Notes what the loop does, in order, with what it does it."""
    notes = []

    def spy(name, note):
        function = getattr(script, name)

        def spying(*arguments, **keywords):
            notes.append((name, note(*arguments, **keywords)))
            return function(*arguments, **keywords)

        monkeypatch.setattr(script, name, spying)

    spy("select_actions", lambda q_network, obs, epsilon: (obs.tolist(), epsilon))
    spy("update", lambda q, target, optimizer, batch, args: (
        optimizer.param_groups[0]["lr"], type(optimizer), len(batch.obs), args.gamma, args.double_q,
    ))  # fmt: skip
    spy("update_target", lambda target, q, tau: tau)
    return notes


@pytest.mark.parametrize("num_envs, train_frequency, gradient_steps, target_frequency, learning_starts", [
    (1, 1, 1, 10, 16), (1, 7, 3, 10, 50), (4, 4, 1, 4, 50), (4, 2, 2, 6, 50), (4, 10, 1, 25, 50), (3, 5, 1, 1, 50),
    (8, 1, 1, 3, 101),
])  # fmt: skip
def test_the_loop_does_each_thing_when_it_is_due(
    tmp_path, monkeypatch, num_envs, train_frequency, gradient_steps, target_frequency, learning_starts
):
    """The same again in a plain loop over the steps; first a round of steps, then what is due after each of them."""
    notes = follow(monkeypatch)
    state, _ = train(
        tmp_path, num_envs=num_envs, train_frequency=train_frequency, target_network_frequency=target_frequency,
        learning_starts=learning_starts, total_timesteps=400, tau=0.5, gamma=0.8, double_q=True, end_e=0.2,
        gradient_steps=gradient_steps,
    )  # fmt: skip
    steps, expected = diary(num_envs, 400), []
    for first in range(0, 400, num_envs):
        seen = [step[0] for step in steps[first : first + num_envs]]
        expected.append(("select_actions", (seen, pytest.approx(max(0.2, 1 - 0.8 * first / 200)))))
        for step in range(first + 1, first + num_envs + 1):
            if step >= learning_starts and step % train_frequency == 0:
                rate = pytest.approx(1e-2 * (1 - first / 400))
                expected += [("update", (rate, torch.optim.Adam, 16, 0.8, True))] * gradient_steps
            if step >= learning_starts and step % target_frequency == 0:
                expected.append(("update_target", 0.5))
    assert notes[: len(expected)] == expected
    assert all(name == "select_actions" and epsilon == 0 for name, (_, epsilon) in notes[len(expected) :])  # evaluation
    assert state["global_step"] == math.ceil(400 / num_envs) * num_envs


def test_at_the_start_the_target_network_is_the_q_network(tmp_path):
    never = {"train_frequency": 1000, "target_network_frequency": 1000}
    state, _ = train(tmp_path, total_timesteps=60, learning_starts=59, **never)
    assert all(torch.equal(state["q_network"][key], state["target_network"][key]) for key in state["q_network"])


def test_every_environment_gets_the_action_that_the_q_network_chose_for_it(tmp_path, monkeypatch):
    """In training and in evaluation; and it is the Q-network that acts, not its copy."""
    chosen, actors, learners, choose, update = {}, set(), set(), script.select_actions, script.update

    def choosing(q_network, obs, epsilon):
        actions = choose(q_network, obs, epsilon)
        chosen.update({tuple(row): int(action) for row, action in zip(obs.tolist(), actions)})
        actors.add(id(q_network))
        return actions

    monkeypatch.setattr(script, "select_actions", choosing)
    monkeypatch.setattr(script, "update", lambda *arguments: learners.add(arguments[:2]) or update(*arguments))
    train(tmp_path, num_envs=3, eval_episodes=3)
    steps = [step for env in Diary.made for step in env.steps]
    assert len(steps) > 1200 and all(chosen[tuple(before)] == action for before, action, *_ in steps)
    ((q_network, target_network),) = learners
    assert actors == {id(q_network)} and target_network is not q_network


def test_every_episode_is_logged_at_the_step_that_ended_it(tmp_path):
    _, scalars = train(tmp_path, num_envs=3)
    returns, lengths, expected = [0.0] * 3, [0] * 3, []
    for number, (_, _, reward, _, terminated, truncated) in enumerate(diary(3, 1200), 1):
        i = (number - 1) % 3
        returns[i], lengths[i] = returns[i] + reward, lengths[i] + 1
        if terminated or truncated:
            expected.append((number, returns[i], lengths[i]))
            returns[i], lengths[i] = 0.0, 0
    assert len(expected) > 200
    assert scalars["charts/episodic_return"] == [(step, pytest.approx(value, abs=1e-5)) for step, value, _ in expected]
    assert scalars["charts/episodic_length"] == [(step, length) for step, _, length in expected]


def test_two_episodes_that_end_together_are_both_logged(tmp_path):
    _, scalars = train(tmp_path, env_id="FiveSteps-v0", total_timesteps=100)
    expected = [step for k in range(10, 101, 10) for step in (k - 1, k)]
    assert [step for step, _ in scalars["charts/episodic_return"]] == expected
    assert {length for _, length in scalars["charts/episodic_length"]} == {5}


def test_environments_begin_anew_at_a_checkpoint_and_only_there_from_a_seed(tmp_path):
    """The cut episodes are no ends: they are not logged, and all the episodes of 5 steps that are, are whole."""
    _, scalars = train(tmp_path, env_id="FiveSteps-v0", total_timesteps=96, checkpoint_frequency=32, seed=3)
    seeds = [script.episode_seeds(3, (script.TRAINING, step), 2) for step in (0, 32, 64)]
    evaluation = script.episode_seeds(3, (script.EVALUATION,), 2)
    for i in range(2):
        # 16 steps between the checkpoints: three whole episodes, after each of them a new one, and a step that is cut.
        expected = [seed for pair in seeds for seed in (pair[i], None, None, None)] + [evaluation[i]]
        assert Diary.made[i].seeds == expected
    assert [step for step, _ in scalars["charts/episodic_return"]] == [
        start + s for start in (0, 32, 64) for s in (9, 10, 19, 20, 29, 30)
    ]
    assert {length for _, length in scalars["charts/episodic_length"]} == {5}


def test_losses_and_schedules_are_logged_every_1000_steps(tmp_path, monkeypatch):
    results, update = [], script.update
    monkeypatch.setattr(script, "update", lambda *arguments: results.append(update(*arguments)) or results[-1])
    _, scalars = train(tmp_path, total_timesteps=3000, num_envs=3, train_frequency=10)
    # Rounds of 3 steps: what is due at 1000 is logged at the end of its round, 1002.
    updates = [(step - 40) // 10 for step in (1002, 2001, 3000)]
    for tag in ("losses/td_loss", "losses/q_values"):
        expected = [results[count - 1][tag].item() for count in updates]
        assert scalars[tag] == [(step, pytest.approx(v)) for step, v in zip((1002, 2001, 3000), expected)]
    rates, epsilons = [(1e-2 * (1 - s / 3000)) for s in (999, 1998, 2997)], [1 - 0.95 * 999 / 1500, 0.05, 0.05]
    assert [value for _, value in scalars["charts/learning_rate"]] == pytest.approx(rates)
    assert [value for _, value in scalars["charts/epsilon"]] == pytest.approx(epsilons)
    assert [step for step, _ in scalars["charts/SPS"]] == [1002, 2001, 3000]


def test_the_learning_rate_stays_if_asked(tmp_path):
    _, scalars = train(tmp_path, anneal_lr=False)
    assert scalars["charts/learning_rate"] == [(1000, pytest.approx(1e-2))]


class Pays(gym.Env):
    """One state, in which every step pays 1; episodes of three steps."""

    observation_space, action_space = gym.spaces.Box(-1, 1, (1,), np.float32), gym.spaces.Discrete(2)

    def __init__(self, truncates):
        self.truncates = truncates

    def reset(self, *, seed=None, options=None):
        self.t = 0
        return np.ones(1, np.float32), {}

    def step(self, action):
        self.t += 1
        return np.ones(1, np.float32), 1.0, self.t == 3 and not self.truncates, self.t == 3 and self.truncates, {}


gym.register("Truncates-v0", entry_point=Pays, kwargs={"truncates": True}, disable_env_checker=True)
gym.register("Terminates-v0", entry_point=Pays, kwargs={"truncates": False}, disable_env_checker=True)


@pytest.mark.parametrize("env_id, value", [("Truncates-v0", 1 / (1 - 0.8)), ("Terminates-v0", 1 / (1 - 0.8 * 2 / 3))])
def test_a_time_limit_is_not_the_end_of_the_world(tmp_path, env_id, value):
    """Truncated for ever, a reward of 1 is worth 1 / (1 - gamma). If every third step terminates, which the only
    state cannot foresee, v = 1 + 2/3 * gamma * v."""
    state, _ = train(
        tmp_path, env_id=env_id, gamma=0.8, total_timesteps=4000, train_frequency=2, batch_size=64, learning_starts=64,
    )  # fmt: skip
    q_network = script.QNetwork(1, 2, 16, norm_obs=False)
    q_network.load_state_dict(state["q_network"])
    torch.testing.assert_close(q_network(torch.ones(1, 1)).detach(), torch.full((1, 2), value), rtol=0.05, atol=0)


# ---- Normalised observations; the statistics themselves are tested in test_ppo_cartpole.py ---------------------------


def test_the_network_sees_observations_in_deviations_from_their_mean():
    torch.manual_seed(0)
    q_network = script.QNetwork(2, 3, 8, norm_obs=True)
    q_network.obs_statistics.update(torch.tensor([[1.0, 10.0], [3.0, 30.0]]))  # means 2 and 20, deviations 1 and 10
    obs, normalised = torch.tensor([[3.0, 40.0], [1e6, -1e6]]), torch.tensor([[1.0, 2.0], [10.0, -10.0]])
    torch.testing.assert_close(q_network(obs), q_network.layers(normalised))


def test_statistics_are_of_the_buffer_and_the_same_for_both_networks(tmp_path, monkeypatch):
    """A sample at learning-starts, 50, and before each update of the target network, at 80, 120, ... 400."""
    seen, update = [], script.update
    monkeypatch.setattr(script, "SAMPLE", 200)

    def updating(q_network, target_network, *others):
        shared = target_network.obs_statistics is q_network.obs_statistics
        seen.append((q_network.obs_statistics.count.item(), shared))
        return update(q_network, target_network, *others)

    monkeypatch.setattr(script, "update", updating)
    state, _ = train(tmp_path, norm_obs=True, total_timesteps=400)
    assert state["q_network"]["obs_statistics.count"] == 200 * 10
    assert seen[0] == (200, True) and seen[-1] == (2000, True) and all(shared for _, shared in seen)
    for name in ("count", "mean", "variance"):
        ours, theirs = (state[network][f"obs_statistics.{name}"] for network in ("q_network", "target_network"))
        assert torch.equal(ours, theirs)
    torch.testing.assert_close(state["q_network"]["obs_statistics.mean"], torch.full((2,), 0.5), atol=0.06, rtol=0)
    torch.testing.assert_close(
        state["q_network"]["obs_statistics.variance"], torch.full((2,), 1 / 12), atol=0.02, rtol=0
    )


# ---- Seeds, resuming ------------------------------------------------------------------------------------------------


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_same_seed_same_run_another_seed_another(tmp_path):
    (first, ours), (again, theirs), (other, _) = train(tmp_path), train(tmp_path), train(tmp_path, seed=2)
    assert same(first, again) and {**ours, "charts/SPS": 0} == {**theirs, "charts/SPS": 0}
    assert not same(first["q_network"], other["q_network"]) and not same(first["buffer"], other["buffer"])


@pytest.mark.parametrize("stop_at", [3, 90, 150, 151, 299, 460])
def test_a_run_that_was_stopped_ends_as_if_it_was_not(tmp_path, monkeypatch, stop_at):
    """Stopped before the first checkpoint, before and after the buffer of 700 wraps around, and just behind a
    checkpoint; some updates of the target network are due in the same round as one. To the bit, with all points."""
    settings = dict(num_envs=4, total_timesteps=2000, checkpoint_frequency=600, buffer_size=700, tau=0.7)
    reference, expected = train(tmp_path, **settings)
    count, update = 0, script.update

    def interrupted(*arguments):
        nonlocal count
        count += 1
        if count == stop_at:
            raise KeyboardInterrupt
        return update(*arguments)

    monkeypatch.setattr(script, "update", interrupted)
    folder = tmp_path / "stopped"
    with pytest.raises(SystemExit):
        train(folder, **settings)
    monkeypatch.setattr(script, "update", update)
    (run_dir,) = folder.iterdir()
    script.train(script.Args(**state_of(run_dir)["args"] | {"resume": str(run_dir)}))
    ours, scalars = state_of(run_dir), scalars_of(run_dir)
    assert ours["buffer"]["num_added"] == 2000
    assert same(ours | {"args": None}, reference | {"args": None})
    assert {**scalars, "charts/SPS": 0} == {**expected, "charts/SPS": 0}


def test_a_network_that_is_not_finite_is_never_saved(tmp_path, monkeypatch, capsys):
    """The last update before a checkpoint spoils a weight, and no later action or loss can tell."""
    count, update = 0, script.update

    def spoil(q_network, *arguments):
        nonlocal count
        count += 1
        metrics = update(q_network, *arguments)
        if count == 38:  # at step 200
            next(q_network.parameters()).data[0] = torch.nan
        return metrics

    monkeypatch.setattr(script, "update", spoil)
    with pytest.raises(SystemExit) as stopped:
        train(tmp_path, checkpoint_frequency=100)
    assert stopped.value.code == 1 and "step 200" in capsys.readouterr().err
    (run_dir,) = tmp_path.iterdir()
    assert state_of(run_dir)["global_step"] == 100
    assert all(weights.isfinite().all() for weights in state_of(run_dir)["q_network"].values())


# ---- Evaluation -----------------------------------------------------------------------------------------------------


def test_evaluation_is_greedy_on_seeds_of_its_own_and_tells_the_return_from_the_length(tmp_path, capsys):
    Diary.made.clear()
    args = script.Args(**FEW | {"num_envs": 3, "eval_episodes": 7, "seed": 4})
    mean_return, mean_length = script.evaluate(args, script.make_envs(args), Likes(), tmp_path)
    seeds = script.episode_seeds(4, (script.EVALUATION,), 7)
    assert [env.seeds for env in Diary.made] == [seeds[0::3], seeds[1::3], seeds[2::3]]
    steps = [step for env in Diary.made for step in env.steps]
    assert all(action == int(obs[0]) % 3 for obs, action, *_ in steps)
    assert sum(terminated or truncated for *_, terminated, truncated in steps) == 7
    assert mean_return == pytest.approx(sum(step[2] for step in steps) / 7) and mean_length == len(steps) / 7
    returns = [0.0]
    for _, _, reward, _, terminated, truncated in steps:
        returns[-1] += reward
        returns += [0.0] if terminated or truncated else []
    deviation = np.std(returns[:7])
    assert f"Evaluation: return {mean_return:.1f} ± {deviation:.1f} over 7 episodes" in capsys.readouterr().out


def test_rewards_of_an_evaluation_are_kept_by_episode():
    Diary.made.clear()
    envs = script.make_envs(script.Args(**FEW | {"num_envs": 3}))
    episodes = script.play_greedily(envs, Likes(), [11, 12, 13])
    assert episodes == [[step[2] for step in env.steps] for env in Diary.made]
    assert len(script.play_greedily(envs, Likes(), [11, 12])) == 2  # fewer seeds than environments


def test_actions_count_from_the_start_of_the_action_space(tmp_path):
    train(tmp_path)  # the environment asserts that it contains them
    assert {step[1] for step in diary(2, 1200)} == {0, 1, 2}


# ---- The flags have the effect that they name -----------------------------------------------------------------------


@pytest.mark.slow
def test_every_setting_of_the_algorithm_changes_the_outcome(tmp_path):
    few = {"total_timesteps": 600}
    reference, _ = train(tmp_path, **few)
    for changed in (
        {"learning_rate": 5e-3}, {"anneal_lr": False}, {"num_envs": 3}, {"buffer_size": 100}, {"gamma": 0.9},
        {"tau": 0.5}, {"target_network_frequency": 50}, {"batch_size": 15}, {"start_e": 0.9}, {"end_e": 0.5},
        {"exploration_fraction": 0.2}, {"learning_starts": 100}, {"train_frequency": 5}, {"double_q": True},
        {"gradient_steps": 2}, {"hidden_size": 15}, {"seed": 2}, {"total_timesteps": 700},
        {"checkpoint_frequency": 250},
    ):  # fmt: skip
        state, _ = train(tmp_path, **few | changed)
        assert not same(state["q_network"], reference["q_network"]), changed
    state, _ = train(tmp_path, **few, exp_name="other", eval_episodes=1)
    assert same(state["q_network"], reference["q_network"])


def test_hidden_size_is_the_width_of_both_layers():
    shapes = [tuple(weights.shape) for weights in script.QNetwork(4, 2, 8, norm_obs=False).parameters()]
    assert shapes == [(8, 4), (8,), (8, 8), (8,), (2, 8), (2,)]


def test_an_environment_without_a_time_limit_gets_one(monkeypatch):
    gym.register("Endless-v1", entry_point=Diary, kwargs={"lengths": (10**9, 10**9)}, disable_env_checker=True)
    monkeypatch.setattr(script, "MAX_EPISODE_STEPS", 30)
    envs = script.make_envs(script.Args(**FEW | {"env_id": "Endless-v1"}))
    assert [len(rewards) for rewards in script.play_greedily(envs, Likes(), [1, 2])] == [30, 30]


@pytest.mark.parametrize("flag, settings", [
    ("--num-envs", {"num_envs": 0}), ("--buffer-size", {"buffer_size": 0}), ("--batch-size", {"batch_size": 0}),
    ("--train-frequency", {"train_frequency": 0}), ("--hidden-size", {"hidden_size": 0}),
    ("--gradient-steps", {"gradient_steps": 0}),
    ("--target-network-frequency", {"target_network_frequency": 0}), ("--start-e", {"start_e": 1.01}),
    ("--end-e", {"end_e": -0.01}), ("--end-e", {"end_e": math.nan}), ("--gamma", {"gamma": -0.1}),
    ("--exploration-fraction", {"exploration_fraction": 1.5}), ("--tau", {"tau": 0.0}), ("--tau", {"tau": 1.1}),
    ("--tau", {"tau": math.nan}), ("--learning-starts", {"learning_starts": -1}),
    ("--learning-starts", {"learning_starts": 15, "batch_size": 16}),
    ("--buffer-size", {"buffer_size": 99, "learning_starts": 100, "batch_size": 16}),
    ("--total-timesteps", {"learning_starts": 500, "total_timesteps": 500}),
])  # fmt: skip
def test_impossible_settings_are_refused(flag, settings):
    with pytest.raises(ValueError, match=flag):
        script.Args(**settings)


def test_extreme_settings_are_not():
    script.Args(gamma=0, start_e=0, end_e=0, exploration_fraction=0, tau=1e-3, checkpoint_frequency=0)
    script.Args(learning_starts=16, batch_size=16, buffer_size=16, total_timesteps=17)
