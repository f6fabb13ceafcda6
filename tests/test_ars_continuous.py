"""The mathematics of ars_continuous.py: by loops, by hand, and on returns whose gradient is known."""

import inspect
import math

import ars_continuous as script
import gymnasium as gym
import numpy as np
import ppo_continuous
import pytest
import torch
from diary import ContinuousDiary, Diary, check_episodes, check_settings, recorded, train

# For the tests that all scripts share.
TINY = (
    "--total-timesteps 12000 --num-envs 2 --num-top 1 --checkpoint-frequency 2500 "
    "--eval-frequency 4500 --eval-episodes 3"
)
OWN = "continuous"
OWN_FLAGS = "--total-timesteps 8000"
WRONG_SPACES = ["CartPole-v1", "cases:HugeBounds-v0"]
DIVERGES = "--env-id cases:Lavish-v0"  # no flag makes it diverge: only the returns' order counts
BAD = [
    ("--num-envs 7", "--num-envs"),
    ("--num-envs 6 --num-top 4", "--num-top"),
    ("--num-top 0", "--num-top"),
    ("--noise-std 0", "--noise-std"),
    ("--alive-bonus nan", "--alive-bonus"),
]
LEARNS = [("--seed 1", 90)]  # what Gymnasium calls solved; without luck or a search: 0
# What others published, by the record's name after `<script>__`: shown beside our results.
PUBLISHED = {"MountainCarContinuous-v0": "Zoo 96.7 (500k)", "Swimmer-v5": "Zoo 355 (2M)"}

# ---- search_direction, update --------------------------------------------------------------------


def by_a_loop(directions, returns, num_top):
    """Algorithm 2, line by line."""
    pairs = [(max(plus, minus), k) for k, (plus, minus) in enumerate(zip(*returns.tolist()))]
    best = [k for _, k in sorted(pairs, reverse=True)[:num_top]]
    kept = [returns[sign, k].item() for sign in (0, 1) for k in best]
    mean = sum(kept) / len(kept)
    sigma = math.sqrt(sum((r - mean) ** 2 for r in kept) / len(kept))
    total = sum((returns[0, k] - returns[1, k]) * directions[k] for k in best)
    return total / (num_top * sigma)


@pytest.mark.parametrize("num_directions, num_top", [(6, 6), (6, 2), (5, 1), (1, 1)])
def test_direction_is_that_of_the_papers_loop(num_directions, num_top):
    torch.manual_seed(0)
    for _ in range(20):
        directions = torch.randn(num_directions, 2, 3, dtype=torch.float64)
        returns = 100 * torch.randn(2, num_directions, dtype=torch.float64)
        found = script.search_direction(directions, returns, num_top)
        torch.testing.assert_close(found, by_a_loop(directions, returns, num_top))


def test_direction_by_hand():
    """Of three directions, the first is the best by r+, the last by r-; the other one is left out.

    The returns 5, 1, 0, 4 deviate by the root of 4.25 from their mean.
    """
    directions = torch.tensor([[[1.0, 0.0]], [[9.0, 9.0]], [[0.0, 1.0]]])
    returns = torch.tensor([[5.0, 3.0, 0.0], [1.0, 2.0, 4.0]])
    found = script.search_direction(directions, returns, 2)
    np.testing.assert_allclose(found, np.array([[4, -4]]) / (2 * math.sqrt(4.25)), rtol=1e-6)


def test_direction_has_no_unit_and_is_0_where_all_returns_are_alike():
    directions, returns = torch.randn(8, 2, 3), torch.randn(2, 8)
    found = script.search_direction(directions, returns, 4)
    other = script.search_direction(directions, 30 * returns - 500, 4)
    torch.testing.assert_close(other, found, rtol=1e-3, atol=1e-4)
    still = script.search_direction(directions, torch.full((2, 8), 7.0), 4)
    assert torch.equal(still, torch.zeros(2, 3))


def test_direction_points_up_the_gradient():
    """Of a return that is a linear function of M, with noise as large."""
    torch.manual_seed(0)
    gradient, directions = torch.randn(2, 3), torch.randn(5000, 2, 3)
    change = torch.einsum("ko,dko->d", gradient, directions)
    returns = torch.stack([change, -change]) + gradient.norm() * torch.randn(2, 5000)
    for num_top in (5000, 500):
        found = script.search_direction(directions, returns, num_top)
        assert torch.cosine_similarity(found.flatten(), gradient.flatten(), dim=0) > 0.98


def policy_of(obs_size=3, norm_obs=True):
    """Bounds are not those of the other dimension, and not around 0."""
    return script.Policy(obs_size, np.float32([-2, 0]), np.float32([2, 10]), norm_obs)


def test_update_steps_up():
    policy, start = policy_of(), torch.randn(2, 3)
    policy.weight.data.copy_(start)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.5)
    directions, returns = torch.randn(6, 2, 3), torch.randn(2, 6)
    script.update(policy, optimizer, directions, returns, script.Args(num_top=3, num_envs=12))
    expected = start + 0.5 * by_a_loop(directions, returns, 3)
    torch.testing.assert_close(policy.weight.detach(), expected)


# ---- Actor, play ---------------------------------------------------------------------------------


def test_each_policy_has_its_own_change():
    torch.manual_seed(0)
    policy, changes, obs = policy_of(), np.random.randn(5, 2, 3), np.float32(np.random.randn(5, 3))
    policy.weight.data.normal_()
    policy.obs_statistics.update(3 * torch.randn(40, 3) + 1)
    mean, variance = policy.obs_statistics.mean.numpy(), policy.obs_statistics.variance.numpy()
    actor = script.Actor(policy, changes)
    which = np.array([3, 0, 4])
    for rows, found in (range(5), actor(obs)), (which, actor(obs[which], which)):
        for row, action in zip(rows, found, strict=True):
            seen = (obs[row] - mean) / np.sqrt(variance + 1e-8)
            expected = (policy.weight.detach().numpy() + changes[row]) @ seen
            np.testing.assert_allclose(action, expected, rtol=1e-5)


def test_the_first_policy_is_in_the_middle_and_large_actions_at_the_bounds():
    policy, obs = policy_of(norm_obs=False), np.float32([[1, 0, 0], [-1, 0, 0], [0.1, 0, 0]])
    assert script.play(script.Args(), policy, obs).tolist() == [[0, 5]] * 3
    policy.weight.data[:, 0] = torch.tensor([5.0, -5.0])
    found = script.play(script.Args(), policy, obs)
    np.testing.assert_allclose(found, [[2, 0], [-2, 10], [1, 2.5]])


@pytest.mark.parametrize("name", ["make_env", "RunningStatistics", "evaluate"])
def test_what_ppo_has_too_is_the_same_and_tested_there(name):
    ours, theirs = (inspect.getsource(getattr(s, name)) for s in (script, ppo_continuous))
    assert ours == theirs


# ---- The loop ------------------------------------------------------------------------------------

FEW = dict(
    env_id="ContinuousDiary-v0", total_timesteps=400, num_envs=6, num_top=2, eval_episodes=3,
    learning_rate=0.3, noise_std=0.2,
)  # fmt: skip


def episodes_of(env):
    """The diary of an environment, cut where its episodes end."""
    episodes, steps = [], []
    for step in env.steps:
        steps.append(step)
        if step[4] or step[5]:
            episodes.append(steps)
            steps = []
    assert not steps
    return episodes


@pytest.mark.parametrize("alive_bonus", [0.0, 0.7])
@pytest.mark.parametrize("norm_obs", [True, False])
def test_every_direction_is_tried_both_ways_for_one_episode(
    tmp_path, monkeypatch, alive_bonus, norm_obs
):
    """And what is learned is from its returns. The observations' statistics change afterwards."""
    updates, draws, draw = recorded(monkeypatch, script, "update"), [], torch.randn
    monkeypatch.setattr(script.torch, "randn", lambda *size: draws.append(draw(*size)) or draws[-1])
    settings = {"alive_bonus": alive_bonus, "norm_obs": norm_obs}
    state, points = train(script, tmp_path, **FEW | settings)
    diaries, seen = [episodes_of(env) for env in Diary.made[:6]], []
    assert {len(episodes) for episodes in diaries} == {len(updates)} == {len(draws)}
    assert len(updates) > 15
    assert len({len(episodes[0]) for episodes in diaries}) > 1  # they wait for each other
    for k, ((policy, _, directions, returns, args), _) in enumerate(updates):
        assert torch.equal(directions, draws[k])
        episodes = [episodes[k] for episodes in diaries]
        expected = [sum(step[2] - alive_bonus for step in steps) for steps in episodes]
        np.testing.assert_allclose(returns.flatten(), expected, rtol=1e-4, atol=1e-5)
        for i, steps in enumerate(episodes):
            sign = 1 if i < 3 else -1
            weight = policy.weight.detach() + sign * 0.2 * directions[i % 3]
            for obs, action, *_ in steps:
                obs = torch.tensor(obs)
                if norm_obs and k > 0:
                    obs = (obs - torch.stack(seen).mean(0)) / torch.stack(seen).std(0, correction=0)
                scaled = (weight @ obs).clamp(-1, 1) * torch.tensor([2, 5]) + torch.tensor([0, 5])
                np.testing.assert_allclose(action, scaled, rtol=1e-3, atol=1e-3)
        seen += [torch.tensor(step[0]) for steps in episodes for step in steps]
    assert type(updates[0][0][1]) is torch.optim.SGD
    if norm_obs:
        assert state["network"]["obs_statistics.count"] == len(seen) == state["envs"]["steps"]
    assert points["charts/learning_rate"][0][1] == pytest.approx(0.3)
    # In the order in which they were played: round after round, those that still run.
    order = []
    for k in range(len(updates)):
        rounds = [episodes[k] for episodes in diaries]
        for t in range(max(map(len, rounds))):
            order += [(i, steps[t]) for i, steps in enumerate(rounds) if t < len(steps)]
    check_episodes(points, order)


class Pays(ContinuousDiary):
    """For the actions as well."""

    def step(self, action):
        obs, reward, *rest = super().step(action)
        return obs, reward + float(action.sum()), *rest


gym.register("PaysForActions-v0", entry_point=Pays)


def test_every_setting_of_the_algorithm_changes_the_outcome(tmp_path):
    def outcome(**settings):
        settings = FEW | {"env_id": "PaysForActions-v0"} | settings
        return train(script, tmp_path, **settings)[0]["network"]["weight"].tolist()

    check_settings(script, outcome, {
        "seed": 2, "total_timesteps": 500, "num_envs": 8, "learning_rate": 0.2, "noise_std": 0.1,
        "num_top": 3, "alive_bonus": 1.0, "norm_obs": False,
    })  # fmt: skip
