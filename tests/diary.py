"""Environments that keep a diary, to compare a training with what really happened in them."""

import copy

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


class Diary(gym.Env):
    """Episodes of 1 to 6 steps. A third of them terminate, a third are truncated, a third do both.

    Observations are random, in an array that is reused. An entry of `steps` is
    (obs, action counted from 0, reward, next_obs, terminated, truncated).
    """

    observation_space, action_space = Box(-np.inf, np.inf, (2,), np.float64), Discrete(3, start=5)
    made = []  # all of them: first those of the training, then those of the evaluation

    def __init__(self, render_mode=None):
        self.obs, self.steps = np.zeros(2), []
        Diary.made.append(self)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left, self.end = self.np_random.integers([1, 0], [7, 3])
        self.obs[:] = self.np_random.random(2)
        return self.obs, {}

    def step(self, action):
        assert self.action_space.contains(action) and self.left > 0
        before, reward = self.obs.astype(np.float32).tolist(), self.np_random.normal()
        self.left -= 1
        self.obs[:] = self.np_random.random(2)
        ends = self.left == 0
        terminated, truncated = bool(ends and self.end < 2), bool(ends and self.end > 0)
        after = self.obs.astype(np.float32).tolist()
        action = (action - getattr(self.action_space, "start", 0)).tolist()
        self.steps.append((before, action, reward, after, terminated, truncated))
        return self.obs, reward, terminated, truncated, {}


class ContinuousDiary(Diary):
    """Its actions have two numbers, with bounds that are not equal, and one not around 0."""

    action_space = Box(np.array([-2, 0], np.float32), np.array([2, 10], np.float32))


class Pays(gym.Env):
    """One state, in which every step pays 1. Episodes of three steps."""

    observation_space, action_space = Box(-1, 1, (1,), np.float32), Discrete(2)

    def __init__(self, truncates, render_mode=None):
        self.truncates = truncates

    def reset(self, *, seed=None, options=None):
        self.t = 0
        return np.ones(1, np.float32), {}

    def step(self, action):
        self.t += 1
        end = self.t == 3
        return np.ones(1, np.float32), 1.0, end and not self.truncates, end and self.truncates, {}


gym.register("Diary-v0", entry_point=Diary)
gym.register("ContinuousDiary-v0", entry_point=ContinuousDiary)
gym.register("Truncates-v0", entry_point=Pays, kwargs={"truncates": True})
gym.register("Terminates-v0", entry_point=Pays, kwargs={"truncates": False})


def train(script, tmp_path, **settings):
    """Trains in this process: the last checkpoint, and the points (step, value) of each tag."""
    Diary.made.clear()
    folder = script.train(script.Args(**settings, runs_dir=str(tmp_path))).folder
    events = EventAccumulator(folder, size_guidance={"scalars": 0}).Reload()
    tags = events.Tags()["scalars"]
    points = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}
    return script.read_checkpoint(folder), points


def recorded(monkeypatch, script, name):
    """Notes each call of a function of the script: its arguments, as they were, and its result."""
    calls, function = [], getattr(script, name)

    def recording(*arguments, **keywords):
        before = copy.deepcopy(arguments)
        calls.append((before, function(*arguments, **keywords)))
        return calls[-1][1]

    monkeypatch.setattr(script, name, recording)
    return calls


def side_by_side(num_envs):
    """(environment, step) for all steps of a training in their order."""
    rounds = zip(*(env.steps for env in Diary.made[:num_envs]))
    return [(i, step) for steps in rounds for i, step in enumerate(steps)]


def check_episodes(points, steps):
    """Every episode of these (environment, step) is logged at the step that ended it."""
    returns, lengths = dict.fromkeys(range(9), 0.0), dict.fromkeys(range(9), 0)
    expected_returns, expected_lengths = [], []
    for number, (i, (_, _, reward, _, terminated, truncated)) in enumerate(steps, 1):
        returns[i], lengths[i] = returns[i] + reward, lengths[i] + 1
        if terminated or truncated:
            expected_returns.append((number, returns[i]))
            expected_lengths.append((number, lengths[i]))
            returns[i], lengths[i] = 0.0, 0
    assert len(expected_returns) > 30
    np.testing.assert_allclose(points["charts/episodic_return"], expected_returns, atol=1e-5)
    assert points["charts/episodic_length"] == expected_lengths


def check_settings(script, outcome, changes):
    """Every setting of the algorithm changes the outcome; nothing else does."""
    names = list(script.Args.__dataclass_fields__)
    algorithm = names[names.index("num_envs") : names.index("exp_name")]
    assert list(changes) == ["seed", "total_timesteps", *algorithm]
    plain = outcome()
    for name, value in changes.items():
        assert outcome(**{name: value}) != plain, name
    other = {"exp_name": "other", "checkpoint_frequency": 7, "eval_frequency": 50}
    assert outcome(**other) == plain


# ---- What all PPO loops do, in three environments and rollouts of 20 steps -----------------------


def check_ppo_log(script, tmp_path, monkeypatch, *, anneal_lr, learning_rate, **settings):
    """The learning rate that is used, and all metrics, stand in the log after each rollout."""
    settings |= {"anneal_lr": anneal_lr, "learning_rate": learning_rate}
    learned = recorded(monkeypatch, script, "learn")
    _, points = train(script, tmp_path, **settings)
    for k, ((_, optimizer, batch, _), metrics) in enumerate(learned):
        rate = learning_rate * (1 - k / len(learned) if anneal_lr else 1)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(rate)
        errors = batch.advantages.var() / batch.returns.var()  # V_old is returns - advantages
        metrics |= {"losses/explained_variance": 1 - errors, "charts/learning_rate": rate}
        for tag, value in metrics.items():
            assert points[tag][k] == (60 * (k + 1), pytest.approx(float(value), abs=1e-5)), tag
    assert type(optimizer) is torch.optim.Adam and optimizer.param_groups[0]["eps"] == 1e-5


def check_ppo_statistics(script, tmp_path, monkeypatch, agents=1, **settings):
    """They do not change within a rollout and its updates: else pi / pi_old would not start at 1.

    All observations are counted, once; those of the evaluation are not. Those of the agents of a
    team are counted together.
    """
    counts = []
    for name in ("Actor", "make_batch", "update"):
        def noting(agent, *others, name=name, function=getattr(script, name), **keywords):
            counts.append((name, agent.obs_statistics.count.item() / agents))
            return function(agent, *others, **keywords)

        monkeypatch.setattr(script, name, noting)
    network = train(script, tmp_path, **settings)[0]["network"]
    a_round = ["Actor", "make_batch"] + ["update"] * 4
    total = settings["total_timesteps"]
    expected = [(name, before) for before in range(0, total, 60) for name in a_round]
    assert counts[: len(expected)] == expected
    assert set(counts[len(expected) :]) == {("Actor", total)}
    seen = np.array([step[0] for _, step in side_by_side(3)])
    seen = seen.reshape(agents * len(seen), -1)
    np.testing.assert_allclose(network["obs_statistics.mean"], seen.mean(0), rtol=1e-4)
    np.testing.assert_allclose(network["obs_statistics.variance"], seen.var(0), rtol=1e-3)


def check_ppo_rewards(script, tmp_path, monkeypatch, *, norm_reward, gamma, **settings):
    """Divided by the deviation of the sums of all rollouts, or not. What is logged never is."""
    calls = recorded(monkeypatch, script, "make_batch")
    settings |= {"norm_reward": norm_reward, "gamma": gamma}
    state, points = train(script, tmp_path, **settings)
    sums, last = [], []
    for env in Diary.made[:3]:
        total = 0.0
        for _, _, reward, _, terminated, truncated in env.steps:
            sums.append(reward + total)
            total = 0.0 if terminated or truncated else gamma * sums[-1]
        last.append(total)
    rewards = np.array([[step[2] for step in env.steps[-20:]] for env in Diary.made[:3]])
    if norm_reward:
        rewards /= np.std(sums)
        np.testing.assert_allclose(state["reward_scaler"]["sums"], last, rtol=1e-4)
    np.testing.assert_allclose(calls[-1][0][3].T, rewards, rtol=1e-3)
    check_episodes(points, side_by_side(3))
