"""What her_continuous.py has of its own: goals, where they stand, and others in hindsight.

What it has word for word from sac_continuous.py is tested in test_sac_continuous.py.
"""

import inspect
import math

import cases
import gymnasium as gym
import her_continuous as script
import numpy as np
import pytest
import sac_continuous
import torch
from diary import check_settings, recorded, train
from gymnasium.spaces import Box, Dict

# For the tests that all scripts share.
TINY = (
    "--total-timesteps 1000 --num-envs 2 --learning-starts 100 --buffer-size 700 --batch-size 32 "
    "--hidden-size 32 --train-frequency 4 --gradient-steps 2 --checkpoint-frequency 250 "
    "--eval-frequency 350 --eval-episodes 5"
)
OWN = "goals"
OWN_FLAGS = "--total-timesteps 3000 --hidden-size 32 --batch-size 64"
WRONG_SPACES = ["Pendulum-v1", "CartPole-v1", "cases:Parts-v0"]
DIVERGES = "--learning-rate 1e30"
BAD = [
    ("--hindsight 1.1", "--hindsight"),
    ("--hindsight nan", "--hindsight"),
    ("--env-kwargs '{\"dimensions\": 1}'", "--env-kwargs"),
    ("--learning-starts 128", "--batch-size"),
    ("--gradient-steps 0", "--gradient-steps"),
]
LEARNS = [
    (
        "--env-kwargs '{\"dimensions\": 2}' --total-timesteps 3000 --hidden-size 64 "
        "--batch-size 64",
        -15,  # who never comes near: -50
    )
]


@pytest.mark.parametrize("name", [
    "Actor", "Agent", "Batch", "Bfloat16Linear", "Critics", "act", "compute_gradient",
    "make_network", "mlp", "play", "policy_loss", "sample_actions", "td_target",
    "temperature_loss", "to_bounds", "update", "update_target",
])  # fmt: skip
def test_what_sac_has_too_is_the_same_and_tested_there(name):
    ours, theirs = (inspect.getsource(getattr(module, name)) for module in (script, sac_continuous))
    assert ours == theirs


# ---- Goals ---------------------------------------------------------------------------------------


def test_reach_by_hand():
    """A walk straight ahead takes as many steps as the farthest dimension needs, less the 0.1."""
    env = gym.make("Reach-v0", dimensions=3)
    assert env.spec.max_episode_steps == 50
    for seed in range(20):
        obs, _ = env.reset(seed=seed)
        goal, rewards, truncated = obs["desired_goal"].astype(float), [], False
        point = np.zeros(3)
        while not truncated:
            action = ((goal - point) / 0.1).clip(-1, 1)
            point = (point + 0.1 * action).clip(-1, 1)
            obs, reward, terminated, truncated, _ = env.step(action.astype(np.float32))
            np.testing.assert_allclose(obs["achieved_goal"], point, atol=1e-5)
            assert (obs["observation"] == obs["achieved_goal"]).all() and not terminated
            assert reward == (0 if math.dist(point, goal) < 0.1 else -1)
            rewards.append(reward)
        assert rewards[-1] == 0 and sum(rewards) > -11
    points, goals = np.zeros((2, 3)), np.array([[0.05, 0.05, 0.05], [0.1, 0.0, 0.1]])
    assert env.unwrapped.compute_reward(points, goals, {}).tolist() == [0, -1]


def test_straight_to_the_goal_is_what_the_docstring_says():
    random = np.random.default_rng(0)
    goals, total = random.uniform(-1, 1, (200_000, 4)), 0.0
    points = np.zeros_like(goals)
    for _ in range(50):
        points += (goals - points).clip(-0.1, 0.1)
        total += script.Reach().compute_reward(points, goals, {}).mean()
    assert f"straight to the goal is {total:.1f}:" in script.__doc__


def test_reach_is_drawn_with_its_goal_and_its_point():
    env = script.Reach()
    for seed in range(20):
        env.reset(seed=seed)
        env.point[:2], env.goal[:2] = [-1, -1], [1, 1]
        picture = env.render()
        assert (picture[10, 10] == 255).all() and picture[110, 110].tolist() == [255, 0, 0]
        assert (picture.any(2)).sum() == 2 * 81


class Parts(cases.Walk):
    """Goals of two numbers, with something before, between and after them."""

    observation_space = Dict({
        "a": Box(-1, 1, (2,)), "achieved_goal": Box(-1, 1, (2,)), "b": Box(-1, 1, (3,)),
        "desired_goal": Box(-1, 1, (2,)), "e": Box(-1, 1, (1,)),
    })  # fmt: skip

    def show(self):
        parts = enumerate(self.observation_space.spaces.items())
        return {name: np.full(part.shape, i, np.float32) for i, (name, part) in parts}


gym.register("GoalParts-v0", entry_point=Parts, max_episode_steps=7)


def test_goals_are_where_they_stand_in_the_flat_observation():
    env = script.make_env(script.Args(env_id="GoalParts-v0"))
    achieved, goal = script.goal_columns(env)
    obs, _ = env.reset(seed=1)
    names = list(Parts.observation_space.spaces)
    assert obs[achieved].tolist() == [names.index("achieved_goal")] * 2
    assert obs[goal].tolist() == [names.index("desired_goal")] * 2
    assert len(obs) == 10


# ---- HindsightBuffer -----------------------------------------------------------------------------


class Goals:
    """Stands for an environment. What is achieved is the number of a row; goals are negative."""

    unwrapped = property(lambda self: self)

    def __init__(self):
        self.seen = []

    def compute_reward(self, achieved, goals, info):
        self.seen.append((achieved.copy(), goals.copy()))
        return achieved[:, 0] * 1000 - goals[:, 0]  # tells both


@pytest.fixture(autouse=True)
def columns(monkeypatch, request):
    if "buffer" in request.node.name:
        monkeypatch.setattr(script, "goal_columns", lambda env: (slice(1, 2), slice(2, 3)))


class Stream:
    """Episodes of random lengths in N environments. An observation is (number, number, goal)."""

    def __init__(self, num_envs, longest, seed=0):
        self.random, self.longest, self.next = np.random.default_rng(seed), longest, 0
        self.episodes = [[] for _ in range(num_envs)]  # numbers of the finished and the running one
        self.goal = [0] * num_envs  # of the running one
        self.goals, self.ended = {}, {}  # by number
        for i in range(num_envs):
            self.begin(i)

    def number(self, i):
        self.next += 1
        self.goals[self.next] = self.goal[i]
        return self.next

    def begin(self, i):
        self.goal[i] = -self.next - 1
        self.episodes[i].append([self.number(i)])

    def row(self, number):
        return np.float32([number, number, self.goals[number]])

    def add_to(self, buffer):
        count = len(self.episodes)
        before = [episodes[-1][-1] for episodes in self.episodes]
        after = [self.number(i) for i in range(count)]
        ended = self.random.random(count) < 1 / self.longest
        kind = self.random.random(count) < 0.5
        numbers = np.float32(before)
        buffer.add(
            np.stack([self.row(n) for n in before]), numbers[:, None], numbers / 4,
            np.stack([self.row(n) for n in after]), ended & kind, ended & ~kind,
        )  # fmt: skip
        for i in range(count):
            self.episodes[i][-1].append(after[i])
            self.ended[before[i]] = bool(ended[i] & kind[i])
            if ended[i]:
                self.begin(i)

    def later(self):
        """For each number with an action: what its episode achieved later; [] while it goes on."""
        found = {}
        for episodes in self.episodes:
            for episode in episodes:
                for k, number in enumerate(episode[:-1]):
                    found[number] = episode[k + 1 :] if episode is not episodes[-1] else []
        return found


def make_buffer(size, num_envs, hindsight=0.8):
    return script.HindsightBuffer(size, num_envs, 3, 1, Goals(), hindsight)


@pytest.mark.parametrize("num_envs, size, rounds, longest", [
    (1, 60, 40, 5), (1, 60, 500, 5), (3, 60, 300, 4), (4, 20, 100, 1.2), (2, 30, 200, 40),
])  # fmt: skip
def test_buffer_draws_what_happened_with_goals_that_came_later(num_envs, size, rounds, longest):
    """Each later one of the same episode, all alike; with the reward that it would have given."""
    torch.manual_seed(0)
    buffer, stream = make_buffer(size, num_envs), Stream(num_envs, longest)
    for _ in range(rounds):
        stream.add_to(buffer)
    later, drawn = stream.later(), {}
    following = {a: b for envs in stream.episodes for e in envs for a, b in zip(e, e[1:])}
    for _ in range(20):
        batch = buffer.sample(2000)
        for obs, action, reward, next_obs, terminated in zip(*(part.tolist() for part in batch)):
            number, goal = int(obs[0]), obs[2]
            assert action == [number] and obs[1] == number
            assert next_obs[:2] == [following[number]] * 2
            assert next_obs[2] == goal and terminated == stream.ended[number]
            if goal == stream.goals[number]:
                assert reward == number / 4
            else:
                assert goal in later[number] and reward == next_obs[0] * 1000 - goal
            drawn.setdefault(number, []).append(goal)
    for number, goals in drawn.items():
        other = [goal for goal in goals if goal >= 0]
        if not later[number]:
            assert not other
            continue
        share = len(other) / len(goals)
        assert share == pytest.approx(0.8, abs=5 * math.sqrt(0.16 / len(goals)))
        for goal in later[number]:
            chance = 1 / len(later[number])
            spread = math.sqrt(chance * (1 - chance) / len(other))
            assert other.count(goal) / len(other) == pytest.approx(chance, abs=5 * spread + 1e-9)


@pytest.mark.parametrize("num_envs, size, longest", [(1, 40, 5), (3, 40, 4)])
def test_buffer_holds_the_same_transitions_as_sacs(num_envs, size, longest):
    """Without hindsight, also to the last bit of what is drawn first."""
    ours, stream = make_buffer(size, num_envs, 0.0), Stream(num_envs, longest)
    theirs = sac_continuous.ReplayBuffer(size, num_envs, 3, 1)
    for _ in range(150):
        before = [episodes[-1][-1] for episodes in stream.episodes]
        calls, add = [], ours.add
        ours.add = lambda *columns: calls.append(columns) or add(*columns)
        stream.add_to(ours)
        ours.add = add
        theirs.add(*calls[0])
        torch.manual_seed(before[0])
        batch = ours.sample(50)
        torch.manual_seed(before[0])
        for found, expected in zip(batch, theirs.sample(50), strict=True):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("hindsight", [0.0, 0.3, 1.0])
def test_share_of_other_goals_in_the_buffer(hindsight):
    torch.manual_seed(0)
    buffer, stream = make_buffer(100_000, 1, hindsight), Stream(1, 10)
    for _ in range(5000):
        stream.add_to(buffer)
    found = (buffer.sample(20_000).obs[:, 2] >= 0).float().mean().item()
    assert found == pytest.approx(hindsight, abs=0.02)


def test_an_episode_longer_than_the_buffer():
    """Its newest rows have the goals that are still there."""
    torch.manual_seed(0)
    buffer, stream = make_buffer(10, 1), Stream(1, 1e12)
    for _ in range(30):
        stream.add_to(buffer)
    assert (buffer.sample(100).obs[:, 2] < 0).all()  # it goes on
    stream.longest = 1
    stream.add_to(buffer)
    goals = buffer.sample(5000).obs[:, 2]
    assert set(goals[goals >= 0].int().tolist()) == set(range(stream.next - 10, stream.next))


def test_samples_of_the_buffer_are_copies():
    buffer, stream = make_buffer(50, 1, 1.0), Stream(1, 5)
    for _ in range(30):
        stream.add_to(buffer)
    before = [column.clone() for column in buffer.columns]
    buffer.sample(500)
    assert all(map(torch.equal, before, buffer.columns))


@pytest.mark.parametrize("rounds", [1, 7, 100])
def test_buffer_comes_back_from_a_checkpoint(tmp_path, rounds):
    """In the middle of episodes, whose steps get their later goals when they end."""
    first, second, stream = make_buffer(60, 3), make_buffer(60, 3), Stream(3, 6)
    for _ in range(rounds):
        stream.add_to(first)
    torch.save(first.state_dict(), tmp_path / "buffer.pt")
    second.load_state_dict(torch.load(tmp_path / "buffer.pt", weights_only=True))
    add = first.add
    first.add = lambda *columns: add(*columns) or second.add(*columns)
    for _ in range(10):
        stream.add_to(first)
    batches = []
    for buffer in (first, second):
        torch.manual_seed(1)
        batches.append(buffer.sample(300))
    assert all(map(torch.equal, *batches))
    with pytest.raises(ValueError, match="--buffer-size"):
        make_buffer(61, 3).load_state_dict(first.state_dict())


def test_a_transition_of_the_buffer_takes_four_bytes_more_than_sacs():
    ours = make_buffer(10_000, 1)
    theirs = sac_continuous.ReplayBuffer(10_000, 1, 3, 1)
    sizes = [sum(column.nbytes for column in buffer.columns) for buffer in (ours, theirs)]
    assert sizes[0] == sizes[1] + 4 * 10_001


# ---- The loop ------------------------------------------------------------------------------------

FEW = dict(
    env_id="cases:Walk-v0", total_timesteps=600, num_envs=3, learning_starts=50, batch_size=16,
    buffer_size=1000, hidden_size=16, train_frequency=4, eval_episodes=3, learning_rate=1e-2,
)  # fmt: skip


def test_what_is_learned_from_fits_together(tmp_path, monkeypatch):
    """In Walk, a reward is 0 where what is achieved is the goal; most goals are those of others."""
    updates = recorded(monkeypatch, script, "update")
    train(script, tmp_path, **FEW)
    batches = [batch for (_, _, _, batch, _), _ in updates]
    obs, actions, rewards, next_obs, terminated = (torch.cat(part) for part in zip(*batches))
    achieved, goal, place, t = next_obs.T
    assert torch.equal(rewards, (achieved == goal).float() - 1) and torch.equal(achieved, place)
    assert not terminated.any() and torch.equal(goal, obs[:, 1])
    move = actions[:, 0].sign() * (actions[:, 0].abs() >= 1 / 3)
    assert torch.equal(obs[:, 0] + move, achieved) and torch.equal(obs[:, 3] + 1, t)
    others = goal.abs() != 3
    assert 0.3 < others.float().mean() < 0.8 and set(goal.abs().tolist()) > {0.0, 1.0, 2.0, 3.0}
    assert (rewards == 0).float().mean() > 0.2


def test_the_least_settings_are_allowed():
    least = {"learning_starts": 16, "batch_size": 16, "buffer_size": 16, "total_timesteps": 17}
    script.Args(**least, alpha=0.0, hindsight=0.0)
    for change in ({"learning_starts": 15}, {"buffer_size": 15}, {"total_timesteps": 16}):
        with pytest.raises(ValueError, match="--" + next(iter(change)).replace("_", "-")):
            script.Args(**least | change)


def test_every_setting_of_the_algorithm_changes_the_outcome(tmp_path):
    def outcome(**settings):
        few = FEW | {"total_timesteps": 250, "autotune": False}
        state, _ = train(script, tmp_path, **few | settings)
        return [weights.tolist() for weights in state["network"].values()]

    check_settings(script, outcome, {
        "seed": 2, "total_timesteps": 260, "num_envs": 4, "learning_rate": 5e-3, "buffer_size": 100,
        "gamma": 0.9, "hindsight": 0.5, "tau": 0.5, "batch_size": 15, "learning_starts": 100,
        "train_frequency": 5, "gradient_steps": 2, "hidden_size": 15, "autotune": True,
        "alpha": 0.5,
    })  # fmt: skip
