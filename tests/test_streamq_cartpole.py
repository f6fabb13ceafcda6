"""The mathematics of streamq_cartpole.py: by hand, against Watkins' algorithm in a table.

What dqn_cartpole.py and ppo_continuous.py have word for word is tested there.
"""

import copy
import inspect
import math

import dqn_cartpole
import numpy as np
import ppo_continuous
import pytest
import streamq_cartpole as script
import torch
from diary import check_episodes, check_settings, recorded, side_by_side, train
from torch import nn

# For the tests that all scripts share.
TINY = (
    "--total-timesteps 1500 --num-envs 2 --checkpoint-frequency 400 --eval-frequency 600 "
    "--eval-episodes 5"
)
OWN = "discrete"
OWN_FLAGS = "--total-timesteps 8000 --exploration-fraction 0.5"
WRONG_SPACES = ["Pendulum-v1"]
DIVERGES = "--learning-rate 1e30 --kappa 1e-30"  # the steps are bounded: kappa takes the bound away
BAD = [
    ("--kappa 0", "--kappa"),
    ("--q-lambda 1.5", "--q-lambda"),
    ("--sparsity -0.1", "--sparsity"),
    ("--learning-rate 0", "--learning-rate"),
    ("--batch-size 32", "--batch-size"),
]
LEARNS = [("--total-timesteps 10000 --seed 1", 100)]  # chance: 22
# What others published, by the record's name after `<script>__`: shown beside our results.
PUBLISHED = {}

# ---- bounded_step_size ---------------------------------------------------------------------------


@pytest.mark.parametrize("trace, error, alpha, kappa, expected", [
    ([1.0, -3.0], 0.5, 1.0, 2.0, 1 / 8), ([1.0, -3.0], -0.5, 1.0, 2.0, 1 / 8),
    ([1.0, -3.0], -5.0, 1.0, 2.0, 1 / 40), ([1.0, -3.0], 5.0, 0.01, 2.0, 0.01),
    ([0.1, 0.1], 5.0, 1.0, 0.5, 1.0), ([0.0, 0.0], 5.0, 0.3, 2.0, 0.3),
])  # fmt: skip
def test_step_size_by_hand(trace, error, alpha, kappa, expected):
    found = script.bounded_step_size(torch.tensor(trace), torch.tensor(error), alpha, kappa)
    assert found.item() == pytest.approx(expected)


def test_a_step_does_not_overshoot():
    """Of a linear Q whose inputs are within 1, a TD error is corrected by at most 1 / kappa."""
    torch.manual_seed(0)
    for _ in range(200):
        gradient, older = torch.rand(2, 20) * 2 - 1
        trace, error = 0.7 * older + gradient, 5 * torch.randn(())
        step_size = script.bounded_step_size(trace, error, 1.0, 2.0)
        correction = step_size * error * trace @ gradient  # of Q(s, a)
        assert abs(correction) <= abs(error) / 2 + 1e-6


# ---- update --------------------------------------------------------------------------------------


class Table(nn.Module):
    """A number for each state and action. An observation is a state, one-hot."""

    def __init__(self, q):
        super().__init__()
        self.q = nn.Parameter(torch.as_tensor(q).double().clone())

    def forward(self, obs):
        return obs @ self.q


def step_of(states, state, action, reward, following, terminated):
    eye = torch.eye(states, dtype=torch.float64)
    return script.Batch(eye[state][None], torch.tensor([action]), torch.tensor([reward]).double(),
                        eye[following][None], torch.tensor([terminated]))  # fmt: skip


@pytest.mark.parametrize("lam", [0.0, 0.6, 1.0])
def test_updates_are_watkins_q_lambda_in_a_table(lam):
    """Sutton & Barto (1998), figure 7.14: e(s, a) <- e(s, a) + 1, Q <- Q + alpha * delta * e, and
    then e <- gamma * lambda * e if the next action is greedy, else 0.
    """
    random, gamma, alpha = np.random.default_rng(0), 0.9, 0.05
    ways, rewards = random.integers(5, size=(5, 3)), random.normal(size=(5, 3))
    q_values = random.normal(size=(5, 3))
    network, trace = Table(q_values), torch.zeros(15, dtype=torch.float64)
    args = script.Args(gamma=gamma, q_lambda=lam, learning_rate=alpha, kappa=1e-9)
    expected, eligibility, cuts = q_values.copy(), np.zeros((5, 3)), 0
    state, begins, action = 0, True, int(random.integers(3))
    for t in range(300):
        greedy = action == expected[state].argmax()
        decay = torch.tensor(gamma * lam * (greedy and not begins), dtype=torch.float64)
        terminated = t % 17 == 16
        following = int(ways[state, action])
        step = step_of(5, state, action, rewards[state, action], following, terminated)
        metrics = script.update(network, trace, decay, step, args)
        error = rewards[state, action] - expected[state, action]
        error += 0 if terminated else gamma * expected[following].max()
        q_value = expected[state, action]
        eligibility[state, action] += 1
        expected += alpha * error * eligibility
        found = {tag: value.item() for tag, value in metrics.items()}
        assert found == pytest.approx({"losses/td_loss": error**2, "losses/q_values": q_value})
        np.testing.assert_allclose(network.q.detach(), expected, atol=1e-9)
        # The next action, chosen by the new Q, as in the figure.
        begins, state = terminated, following
        action = int(expected[state].argmax() if random.random() < 0.7 else random.integers(3))
        goes_on = action == expected[state].argmax() and not terminated
        eligibility *= gamma * lam * goes_on
        cuts += not goes_on
    assert cuts > 50


def test_update_is_the_definition():
    """On a whole network, where the bound holds: what is left over of old gradients is no matter."""
    torch.manual_seed(0)
    network, trace = network_of(), torch.randn(8 * 4 + 8 + 8 * 8 + 8 + 3 * 8 + 3)
    network.obs_statistics.update(torch.randn(30, 4))
    for weight in network.parameters():
        weight.grad = torch.ones_like(weight)
    old, before = copy.deepcopy(network), trace.clone()
    obs, next_obs = torch.randn(2, 1, 4)
    step = script.Batch(obs, torch.tensor([2]), torch.tensor([3.0]), next_obs, torch.tensor([False]))
    script.update(network, trace, torch.tensor(0.4), step, script.Args(gamma=0.9, kappa=3.0))
    q_value = old(obs)[0, 2]
    gradients = torch.autograd.grad(q_value, list(old.parameters()))
    error = 3.0 + 0.9 * old(next_obs).max().item() - q_value.item()
    expected = 0.4 * before + torch.cat([gradient.flatten() for gradient in gradients])
    torch.testing.assert_close(trace, expected)
    size = error / (3 * max(abs(error), 1) * expected.abs().sum())
    found = nn.utils.parameters_to_vector(network.parameters())
    start = nn.utils.parameters_to_vector(old.parameters())
    torch.testing.assert_close(found, start + size * expected)
    assert not found.isclose(start).all()


# ---- QNetwork, Actor, act ------------------------------------------------------------------------


def network_of(obs_size=4, num_actions=3, **settings):
    return script.QNetwork(obs_size, num_actions, script.Args(**{"hidden_size": 8} | settings))


@pytest.mark.parametrize("inputs, sparsity, ones", [
    (4, 0.9, 1), (32, 0.9, 4), (20, 0.5, 10), (20, 0.0, 20), (20, 1.0, 1), (1, 0.9, 1),
])  # fmt: skip
def test_each_unit_sees_a_few_inputs(inputs, sparsity, ones):
    """Which of them, is random, and what they weigh, uniform."""
    torch.manual_seed(0)
    layer = script.sparse_layer(inputs, 2000, sparsity)
    weights = layer.weight.detach()
    assert ((weights != 0).sum(1) == ones).all() and (layer.bias == 0).all()
    shares = (weights != 0).float().mean(0)
    np.testing.assert_allclose(shares, ones / inputs, atol=0.05)
    values = weights[weights != 0] * math.sqrt(inputs)
    assert values.abs().max() <= 1 and abs(values.mean()) < 0.05
    assert values.std().item() == pytest.approx(1 / math.sqrt(3), abs=0.03)


def test_each_hidden_layer_is_normalised_before_its_activation():
    torch.manual_seed(0)
    network, seen = network_of(norm_obs=False), []
    for part in network.layers:
        if isinstance(part, nn.LeakyReLU):
            part.register_forward_hook(lambda part, inputs, output: seen.append((*inputs, output)))
    network(10 * torch.randn(50, 4))
    for before, after in seen:
        # Where all that a unit sees is 0, so is a whole layer, whose deviation is 0.
        np.testing.assert_allclose(before.mean(1).detach(), np.zeros(50), atol=1e-5)
        np.testing.assert_allclose(before.std(1, correction=0).detach(), np.ones(50), atol=0.01)
        assert torch.equal(after, torch.where(before > 0, before, 0.01 * before))
    assert len(seen) == 2
    shapes = [tuple(weights.shape) for weights in network.parameters()]
    assert shapes == [(8, 4), (8,), (8, 8), (8,), (3, 8), (3,)]  # normalisation has no weights


@pytest.mark.parametrize("norm_obs", [True, False])
def test_the_actor_is_the_q_network_also_after_an_update(norm_obs):
    """And the evaluation is greedy."""
    torch.manual_seed(0)
    q_network, obs = network_of(norm_obs=norm_obs), 3 * torch.randn(50, 4) + 1
    for _ in range(3):
        if norm_obs:
            q_network.obs_statistics.update(3 * torch.randn(20, 4) + 1)
        q_values = q_network(obs).detach()
        np.testing.assert_allclose(script.Actor(q_network)(obs.numpy()), q_values, atol=1e-4)
        found = script.play(script.Args(), q_network, obs.numpy())
        assert found.tolist() == q_values.argmax(1).tolist() and len(set(found)) > 1
        with torch.no_grad():
            for weights in q_network.parameters():
                weights += 0.3 * torch.randn_like(weights)


def test_random_actions_are_called_greedy_only_if_they_are():
    """An action is random with probability 0.6, and then the greedy one of three in a third."""
    torch.manual_seed(0)
    obs = np.float32(np.arange(60_000) % 3)[:, None]
    actions, greedy = script.act(lambda obs: 2 * np.eye(3)[obs[:, 0].astype(int)] - 1, obs, 0.6)
    best = np.arange(60_000) % 3
    assert (greedy == (actions == best)).all()
    assert greedy.mean() == pytest.approx(0.6, abs=0.01)
    np.testing.assert_allclose(np.bincount((actions - best) % 3) / 60_000, [0.6, 0.2, 0.2], atol=0.01)
    actions, greedy = script.act(lambda obs: np.eye(3)[obs[:, 0].astype(int)], obs, 0.0)
    assert greedy.all() and (actions == best).all()


@pytest.mark.parametrize("name, other", [
    ("linear_epsilon", dqn_cartpole), ("Batch", dqn_cartpole),
    ("evaluate", dqn_cartpole), ("make_env", dqn_cartpole),
    ("RunningStatistics", ppo_continuous), ("RewardScaler", ppo_continuous),
])  # fmt: skip
def test_what_others_have_too_is_the_same_and_tested_there(name, other):
    ours, theirs = (inspect.getsource(getattr(module, name)) for module in (script, other))
    assert ours == theirs


# ---- The loop ------------------------------------------------------------------------------------

FEW = dict(
    env_id="Diary-v0", total_timesteps=600, num_envs=3, hidden_size=8, exploration_fraction=0.5,
    eval_episodes=3,
)  # fmt: skip


@pytest.mark.parametrize("norm_reward", [True, False])
@pytest.mark.parametrize("num_envs", [1, 3])
def test_it_learns_from_each_step_once_as_it_happened(tmp_path, monkeypatch, num_envs, norm_reward):
    """In turn, with a trace for each environment, which ends with an episode, of either kind."""
    updates, acts = (recorded(monkeypatch, script, name) for name in ("update", "act"))
    settings = {"num_envs": num_envs, "norm_reward": norm_reward, "gamma": 0.8, "q_lambda": 0.5}
    state, points = train(script, tmp_path, **FEW | settings)
    steps, begins, traces = side_by_side(num_envs), [True] * num_envs, {}
    assert len(updates) == len(steps) == 600
    decays = []
    for number, ((i, expected), (arguments, _)) in enumerate(zip(steps, updates)):
        network, trace, decay, step, _ = arguments
        obs, action, reward, next_obs, terminated, truncated = expected
        (_, seen, _), (chosen, greedy) = acts[number // num_envs]
        assert chosen[i] == action and seen[i].tolist() == obs
        assert decay.item() == pytest.approx(0.4 * (greedy[i] and not begins[i]))
        decays.append(decay.item())
        for part, value in zip(step, (obs, action, reward, next_obs, terminated), strict=True):
            if part is not step.rewards or not norm_reward:
                np.testing.assert_allclose(part[0], value, rtol=1e-6)
        if i in traces:
            torch.testing.assert_close(trace, traces[i], rtol=1e-4, atol=1e-5)
        gradients = torch.autograd.grad(network(step.obs)[0, action], list(network.parameters()))
        traces[i] = decay * trace + torch.cat([gradient.flatten() for gradient in gradients])
        begins[i] = terminated or truncated
    for i, trace in traces.items():
        torch.testing.assert_close(state["memory"]["traces"][i], trace, rtol=1e-4, atol=1e-5)
    assert 0.2 < np.mean(np.array(decays) > 0) < 0.8
    check_episodes(points, steps)


def test_statistics_are_of_all_that_was_seen_so_far(tmp_path, monkeypatch):
    """Also of what the network sees now. Those of the evaluation are not counted."""
    acts = recorded(monkeypatch, script, "act")
    state, _ = train(script, tmp_path, **FEW)
    seen = np.array([step[0] for _, step in side_by_side(3)])
    np.testing.assert_allclose(state["network"]["obs_statistics.mean"], seen.mean(0), rtol=1e-4)
    assert state["network"]["obs_statistics.count"] == 600
    for k in (0, 7, 100):
        mean, deviation = acts[k][0][0].statistics
        np.testing.assert_allclose(mean, seen[: 3 * k + 3].mean(0), rtol=1e-4)
        np.testing.assert_allclose(deviation, seen[: 3 * k + 3].std(0), rtol=1e-2)


def test_rewards_are_divided_by_the_deviation_of_the_sums_so_far(tmp_path, monkeypatch):
    updates = recorded(monkeypatch, script, "update")
    train(script, tmp_path, **FEW | {"gamma": 0.8})
    sums, last = [], [0.0] * 3
    for number, (i, (_, _, reward, _, terminated, truncated)) in enumerate(side_by_side(3)):
        sums.append(reward + last[i])
        last[i] = 0.0 if terminated or truncated else 0.8 * sums[-1]
        if i == 2 and number > 30:
            found = updates[number][0][3].rewards.item()
            assert found == pytest.approx(np.clip(reward / np.std(sums), -10, 10), rel=1e-3)


def test_epsilon_decays_and_is_logged(tmp_path, monkeypatch):
    acts = recorded(monkeypatch, script, "act")
    _, points = train(script, tmp_path, **FEW | {"total_timesteps": 3003, "end_e": 0.1})
    epsilons = [epsilon for (_, _, epsilon), _ in acts[:1001]]
    expected = [max(0.1, 1 - 0.9 * step / 1501.5) for step in range(0, 3003, 3)]
    np.testing.assert_allclose(epsilons, expected)
    logged = [(1002, 1 - 0.9 * 999 / 1501.5), (2001, 0.1), (3000, 0.1)]
    np.testing.assert_allclose(points["charts/epsilon"], logged, rtol=1e-5)
    assert [step for step, _ in points["losses/td_loss"]] == [1002, 2001, 3000]


@pytest.mark.parametrize("env_id, value", [
    ("Truncates-v0", 1 / (1 - 0.8)), ("Terminates-v0", 1 / (1 - 0.8 * 2 / 3))
])  # fmt: skip
def test_a_time_limit_is_not_the_end_of_the_world(tmp_path, env_id, value):
    """Truncated for ever, a reward of 1 is worth 1 / (1 - gamma).

    If every third step terminates, which the only state cannot foresee, v = 1 + 2/3 * gamma * v.
    """
    flags = {"env_id": env_id, "gamma": 0.8, "total_timesteps": 3000, "num_envs": 1}
    flags |= {"norm_reward": False, "norm_obs": False, "q_lambda": 0.0, "learning_rate": 0.02}
    state, _ = train(script, tmp_path, **FEW | flags)
    q_network = network_of(1, 2, norm_obs=False)
    q_network.load_state_dict(state["network"])
    found = q_network(torch.ones(1, 1)).detach().max().item()
    assert found == pytest.approx(value, rel=0.1)


def test_every_setting_of_the_algorithm_changes_the_outcome(tmp_path):
    def outcome(**settings):
        settings = FEW | {"total_timesteps": 120, "learning_rate": 0.01} | settings
        return [w.tolist() for w in train(script, tmp_path, **settings)[0]["network"].values()]

    check_settings(script, outcome, {
        "seed": 2, "total_timesteps": 130, "num_envs": 4, "learning_rate": 5e-3, "kappa": 9.0,
        "gamma": 0.9, "q_lambda": 0.5, "start_e": 0.5, "end_e": 0.9, "exploration_fraction": 0.2,
        "hidden_size": 7, "sparsity": 0.5, "norm_obs": False, "norm_reward": False,
    })  # fmt: skip
