"""The mathematics of qrdqn_cartpole.py: by loops, in closed form, on a chain by hand.

What dqn_cartpole.py has word for word, the loop among it, is tested there.
"""

import inspect
import itertools
import math

import c51_cartpole
import dqn_cartpole
import numpy as np
import pytest
import qrdqn_cartpole as script
import torch
from diary import Diary, check_settings, recorded, train
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
    ("--num-quantiles 0", "--num-quantiles"),
    ("--num-quantiles 25.5", "--num-quantiles"),
    ("--num-quantiles 5000", "--num-quantiles"),
    ("--gamma 1.1", "--gamma"),
    ("--v-max 100", "--v-max"),
    ("--learning-starts 32", "--batch-size"),
]
LEARNS = [("--seed 1 --total-timesteps 30000", 45)]  # twice chance; whole runs are in the record
# What others published, by the record's name after `<script>__`: shown beside our results.
PUBLISHED = {
    "CartPole-v1": "Zoo 500 (50k)",
    "Acrobot-v1": "Zoo -69 (100k)",
    "MountainCar-v0": "Zoo -106 (120k)",
}
# How speed.py measures the script, and beside what; its first lines explain the form.
SPEED = {
    "steps": 40_000,
    "first": 11_000,  # all programs learn from step 10,000 on, and rarely act at random
    "peers": {
        "sb3-contrib's QRDQN": {
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
                "policy_kwargs": {"net_arch": [128, 128], "n_quantiles": 25},
                "device": "cpu",
            },
            "equal": "ten environments, compiled",
        },
        "CleanRL's c51.py": {  # the nearest that CleanRL has, with 101 atoms
            "flags": "--learning-starts 10000 --start-e 0.05 --end-e 0.05",
            # Its layers have 120 and 84 units: they get the 128 of the others.
            "replace": {
                "prod(), 120": "prod(), 128",
                "Linear(120, 84": "Linear(128, 128",
                "Linear(84": "Linear(128",
            },
            "equal": "one environment, compiled",
        },
    },
    "flags": "--num-quantiles 25 --learning-starts 10000 --start-e 0.05 --end-e 0.05 "
    "--buffer-size 10000 --train-frequency 10 --target-network-frequency 500 --batch-size 128 "
    "--hidden-size 128 --learning-rate 2.5e-4 --no-anneal-lr",
    "variants": {
        "ten environments, compiled": "--num-envs 10 --compile",
        "ten environments": "--num-envs 10",
        "one environment, compiled": "--num-envs 1 --compile",
        "one environment": "--num-envs 1",
    },
    "floors": {"floor": "12000 16000 --num-envs 10"},
}

# ---- quantile_huber_loss, quantile_loss ----------------------------------------------------------


def huber(u):
    """Equation 9, kappa = 1."""
    return u * u / 2 if abs(u) <= 1 else abs(u) - 1 / 2


def by_the_papers_loop(quantiles, targets):
    """Equation 10 in Algorithm 1, pair by pair, for one transition."""
    total = 0
    for i, quantile in enumerate(quantiles):
        tau = (i / len(quantiles) + (i + 1) / len(quantiles)) / 2
        for y in targets:
            below = 1 if y - quantile < 0 else 0
            total = total + abs(tau - below) * huber(y - quantile) / len(targets)
    return total


@pytest.mark.parametrize("num_quantiles, num_targets", [(3, 7), (7, 3), (1, 4), (4, 1), (5, 5)])
def test_loss_is_that_of_the_papers_loop(num_quantiles, num_targets):
    """Other numbers of targets than of quantiles tell a sum over one from a mean over the other."""
    torch.manual_seed(0)
    quantiles = 2 * torch.randn(50, num_quantiles, dtype=torch.float64)
    targets = 2 * torch.randn(50, num_targets, dtype=torch.float64)
    rows = [by_the_papers_loop(*row) for row in zip(quantiles.tolist(), targets.tolist())]
    found = script.quantile_loss(quantiles, targets).item()
    assert found == pytest.approx(sum(rows) / 50, rel=1e-12)


@pytest.mark.parametrize("u, tau, expected", [
    (0.5, 0.1, 0.1 / 8), (-0.5, 0.1, 0.9 / 8), (1.0, 0.1, 0.05), (-1.0, 0.1, 0.45),
    (3.0, 0.1, 0.25), (-3.0, 0.1, 2.25), (0.0, 0.7, 0.0), (-11.0, 0.7, 0.3 * 10.5),
])  # fmt: skip
def test_loss_of_a_pair_by_hand(u, tau, expected):
    """Too low a quantile (u > 0) weighs tau, too high a one 1 - tau."""
    quantile, taus, target = torch.tensor([[2.0]]), torch.tensor([tau]), torch.tensor([[2.0 + u]])
    found = script.quantile_huber_loss(quantile, taus, target).item()
    assert found == pytest.approx(expected, rel=1e-5)


def test_each_tau_is_the_middle_of_its_share():
    """Far below all targets, theta_i's slope is -tau_i; far above, 1 - tau_i."""
    for level, expected in (-9.0, [-1 / 8, -3 / 8, -5 / 8, -7 / 8]), (
        9.0, [7 / 8, 5 / 8, 3 / 8, 1 / 8]
    ):  # fmt: skip
        quantiles = torch.full((1, 4), level, requires_grad=True)
        script.quantile_loss(quantiles, torch.randn(1, 6)).backward()
        np.testing.assert_allclose(quantiles.grad, [expected], rtol=1e-5)


def minimiser(num_quantiles, targets):
    """Of the loss, which is convex: (M,)."""
    quantiles = torch.zeros(1, num_quantiles, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [quantiles], max_iter=200, tolerance_grad=1e-12, tolerance_change=0,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def loss():
        optimizer.zero_grad()
        value = script.quantile_loss(quantiles, targets[None])
        value.backward()
        return value

    optimizer.step(loss)
    return quantiles.detach()[0]


def test_the_minimum_for_targets_far_apart_in_closed_form():
    """Of 0, 10, 20, 30, 40, those above pull a quantile by tau each, those below by 1 - tau.

    So at its own target, the k-th, it comes to rest at a small distance d, which pulls by w * d.
    """
    expected = []
    for tau in (0.125, 0.375, 0.625, 0.875):
        k = math.floor(5 * tau)
        pull = tau * (4 - k) - (1 - tau) * k
        expected.append(10 * k + pull / (1 - tau if pull > 0 else tau))
    found = minimiser(4, 10 * torch.arange(5).double())
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("inverse", [
    lambda tau: 100 * tau, lambda tau: -100 * (1 - tau).log(),
    lambda tau: torch.distributions.Normal(-20.0, 80.0).icdf(tau),
])  # fmt: skip
def test_the_minimum_is_the_quantiles_of_a_known_distribution(inverse):
    """Within 1. Where all |u| > 1, Huber's slope is that of |u|: so more than 1 above its quantile
    a theta is pulled down by at least (1 - tau) * tau, and up by less, and so below it.
    """
    targets = inverse((torch.arange(1000).double() + 0.5) / 1000)
    expected = inverse((torch.arange(8).double() + 0.5) / 8)
    found = minimiser(8, targets)
    torch.testing.assert_close(found, expected, rtol=0, atol=1.0)


# ---- quantile_target -----------------------------------------------------------------------------


def test_target_by_hand():
    """a* has the greatest mean, not the greatest quantile, or the greatest of the lowest."""
    next_quantiles = torch.tensor([
        [[0.0, 0.0, 9.0], [2.0, 2.0, 2.0], [1.0, 4.0, 5.0]],
        [[0.0, 0.0, 9.0], [2.0, 2.0, 2.0], [1.0, 1.0, 1.0]],
        [[5.0, 1.0, 6.0], [3.0, 3.0, 3.0], [0.0, 0.0, 0.0]],  # in any order
        [[7.0, 7.0, 7.0], [8.0, 8.0, 8.0], [9.0, 9.0, 9.0]],
    ])  # fmt: skip
    rewards = torch.tensor([1.0, 0.0, -1.0, 3.0])
    terminated = torch.tensor([False, False, False, True])
    found = script.quantile_target(rewards, terminated, next_quantiles, 0.5)
    expected = [[1.5, 3.0, 3.5], [0.0, 0.0, 4.5], [1.5, -0.5, 2.0], [3.0, 3.0, 3.0]]
    assert found.tolist() == expected


def test_rows_of_actions():
    quantiles = torch.arange(24.0).reshape(4, 3, 2)
    found = script.of_actions(quantiles, torch.tensor([2, 0, 1, 1]))
    assert found.tolist() == [[4, 5], [6, 7], [14, 15], [20, 21]]


# ---- update --------------------------------------------------------------------------------------


class Table(nn.Module):
    """Quantiles (S, K, M) of the states and actions. An observation is a state, one-hot."""

    def __init__(self, quantiles):
        super().__init__()
        self.quantiles = nn.Parameter(torch.as_tensor(quantiles).double().clone())

    def forward(self, obs):
        return torch.einsum("bs,skm->bkm", obs, self.quantiles)


def batch_of(states, transitions):
    """Of (state, action, reward, next state, terminated)."""
    eye = torch.eye(states, dtype=torch.float64)
    state, action, reward, following, terminated = map(torch.tensor, zip(*transitions))
    return script.Batch(eye[state], action, reward.double(), eye[following], terminated)


def test_one_step_down_the_gradient_of_the_definition():
    """By loops; a* is the target network's own. Nothing else changes."""
    torch.manual_seed(0)
    gamma = 0.9
    q_network, target_network = (Table(2 * torch.randn(6, 3, 5)) for _ in range(2))
    transitions = [
        (s, a, float(torch.randn(())), int(torch.randint(6, ())), bool(torch.rand(()) < 0.3))
        for s in range(6) for a in range(3)
    ]  # fmt: skip
    batch, before = batch_of(6, transitions), target_network.quantiles.detach().clone()
    leaf = q_network.quantiles.detach().clone().requires_grad_()
    loss, mean, others = 0, 0, 0
    for s, a, reward, following, terminated in transitions:
        means, own = ([sum(row) for row in table[following].tolist()] for table in (before, leaf))
        best = max(range(3), key=means.__getitem__)
        others += best != max(range(3), key=own.__getitem__)
        follows = 0 if terminated else gamma
        targets = [reward + follows * theta for theta in before[following, best].tolist()]
        loss = loss + by_the_papers_loop(leaf[s, a], targets) / len(transitions)
        mean += leaf[s, a].mean().item() / len(transitions)
    assert others > 5
    loss.backward()
    optimizer = torch.optim.SGD(q_network.parameters(), lr=2.0)
    q_network.quantiles.grad = torch.ones(6, 3, 5).double()  # what is left over is no matter
    metrics = script.update(q_network, target_network, optimizer, batch, script.Args(gamma=gamma))
    torch.testing.assert_close(q_network.quantiles.detach(), leaf.detach() - 2 * leaf.grad)
    assert target_network.quantiles.grad is None and torch.equal(target_network.quantiles, before)
    found = {tag: value.item() for tag, value in metrics.items()}
    assert found == pytest.approx({"losses/td_loss": loss.item(), "losses/q_values": mean})
    assert not any(value.requires_grad for value in metrics.values())


@pytest.mark.parametrize("gamma, expected, tolerance", [
    (1.0, [0, 100, 100, 100, 200, 200, 200, 300], 3.0),  # binomial
    (0.5, [0, 25, 50, 75, 100, 125, 150, 175], 1.75),  # r0 + r1 / 2 + r2 / 4: each once
])  # fmt: skip
def test_updates_find_the_distribution_of_the_return(gamma, expected, tolerance):
    """Three flips of a coin that pays 0 or 100, and an action that surely pays 25.

    By Huber's bend, each flip puts a quantile off by 1 at most, times gamma for each before it.
    """
    flips = [(s, 0, coin, min(s + 1, 2), s == 2) for s in range(3) for coin in (0.0, 100.0)]
    process = flips + [(s, 1, 25.0, min(s + 1, 2), s == 2) for s in range(3) for _ in range(2)]
    q_network, target_network = (Table(torch.zeros(3, 2, 8)) for _ in range(2))
    optimizer, batch = torch.optim.SGD(q_network.parameters(), lr=6.0), batch_of(3, process)
    for _ in range(3000):
        script.update(q_network, target_network, optimizer, batch, script.Args(gamma=gamma))
        script.update_target(target_network, q_network, 1.0)
    found = q_network.quantiles.detach()
    np.testing.assert_allclose(found[0, 0], expected, atol=tolerance)
    np.testing.assert_allclose(found[2, 0], [0] * 4 + [100] * 4, atol=1)
    np.testing.assert_allclose(found[2, 1], [25] * 8, atol=1e-6)


# ---- QNetwork, Actor -----------------------------------------------------------------------------


def network_of(obs_size=4, num_actions=3, hidden_size=8, num_quantiles=11):
    return script.QNetwork(obs_size, num_actions, hidden_size, num_quantiles)


def test_quantiles_of_each_action():
    network = network_of()
    assert [tuple(weights.shape) for weights in network.parameters()] == [
        (8, 4), (8,), (8, 8), (8,), (33, 8), (33,)
    ]  # fmt: skip
    assert sum(isinstance(part, nn.ReLU) for part in network.layers) == 2
    with torch.no_grad():
        network.layers[-1].weight.zero_()
        network.layers[-1].bias[:] = torch.arange(33)
    assert torch.equal(network(torch.randn(5, 4))[3], torch.arange(33.0).reshape(3, 11))


def test_the_networks_of_a_run_have_the_sizes_of_its_arguments():
    args = script.Args(num_quantiles=5, hidden_size=7)
    envs = script.Envs(args, 1, script.TRAINING)
    network = script.make_network(args, envs)
    envs.close()
    assert network(torch.zeros(9, 4)).shape == (9, 2, 5)
    assert network.layers[0].weight.shape == (7, 4)


def test_the_actor_is_the_mean_of_the_q_network_also_after_an_update():
    """And the evaluation is greedy."""
    torch.manual_seed(0)
    q_network, obs = network_of(), 5 * torch.randn(50, 4)
    actor = script.Actor(q_network)
    for _ in range(2):
        quantiles = q_network(obs).detach()
        q_values = sum(quantiles[:, :, i] for i in range(11)) / 11
        np.testing.assert_allclose(actor(obs.numpy()), q_values, rtol=1e-3, atol=1e-5)
        best = script.play(script.Args(), q_network, obs.numpy())
        greatest = q_values.gather(1, torch.tensor(best)[:, None]).squeeze(1)
        torch.testing.assert_close(greatest, q_values.max(1).values, rtol=0, atol=1e-5)
        assert len(set(best.tolist())) > 1
        assert (best != quantiles.max(2).values.argmax(1).numpy()).any()
        with torch.no_grad():
            for weights in q_network.parameters():
                weights += 0.3 * torch.randn_like(weights)


# ---- The loop ------------------------------------------------------------------------------------

FEW = dict(
    env_id="Diary-v0", total_timesteps=1200, num_envs=3, learning_starts=50, batch_size=16,
    buffer_size=1000, hidden_size=16, train_frequency=4, target_network_frequency=40,
    eval_episodes=3, exploration_fraction=0.5, learning_rate=1e-2, num_quantiles=5,
)  # fmt: skip


def test_the_loop_is_that_of_dqn_cartpole():
    """Where it is tested. What it calls is another function only where it has to be."""
    same = "train evaluate play act linear_epsilon update update_target Batch ReplayBuffer make_env"
    for name in same.split():
        ours, *theirs = (
            inspect.getsource(getattr(s, name)) for s in (script, dqn_cartpole, c51_cartpole)
        )
        assert [ours, ours] == theirs, name


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
    first = network_of(2, 3, 16, 5).state_dict()
    for weights, ((actor, *_), _) in (first, acts[0]), (state["network"], acts[-1]):
        assert actor.num_quantiles == 5
        for expected, found in zip(weights.values(), itertools.chain(*actor.layers), strict=True):
            np.testing.assert_array_equal(found, expected)


def fixed_point(end, gamma, num_quantiles):
    """theta of the loss's minimum for y = 1 with probability `end`, else 1 + gamma * theta_j."""
    taus = (np.arange(num_quantiles) + 0.5) / num_quantiles
    theta = np.zeros(num_quantiles)
    for _ in range(100):
        y = np.append(1 + gamma * theta, 1.0)
        shares = np.append(np.full(num_quantiles, (1 - end) / num_quantiles), end)
        low, high = np.zeros(num_quantiles), np.full(num_quantiles, 1 / (1 - gamma) + 1)
        for _ in range(50):  # halving
            theta = (low + high) / 2
            u = y - theta[:, None]
            weights = np.where(u < 0, 1 - taus[:, None], taus[:, None])
            pull = (shares * weights * u.clip(-1, 1)).sum(1)
            low, high = np.where(pull > 0, theta, low), np.where(pull > 0, high, theta)
    return theta


@pytest.mark.parametrize("env_id, end", [("Truncates-v0", 0), ("Terminates-v0", 1 / 3)])
def test_a_time_limit_is_not_the_end_of_the_world(tmp_path, env_id, end):
    """Truncated for ever, a reward of 1 is worth 1 / (1 - gamma), 5, in every quantile.

    If every third step terminates, which the only state cannot foresee, the lowest is worth 1.
    """
    flags = {"env_id": env_id, "gamma": 0.8, "total_timesteps": 4000, "train_frequency": 2}
    flags |= {"batch_size": 64, "learning_starts": 64}
    state, _ = train(script, tmp_path, **FEW | flags)
    q_network = network_of(1, 2, 16, 5)
    q_network.load_state_dict(state["network"])
    expected = fixed_point(end, 0.8, 5)
    if end == 0:
        np.testing.assert_allclose(expected, np.full(5, 5.0))
    found = q_network(torch.ones(1, 1)).detach()
    np.testing.assert_allclose(found, np.broadcast_to(expected, (1, 2, 5)), rtol=0.05)


def test_the_least_settings_are_allowed():
    script.Args(num_quantiles=1, gamma=0.0)
    for change in ({"num_quantiles": 0}, {"gamma": 1.1}):
        with pytest.raises(ValueError, match="--" + next(iter(change)).replace("_", "-")):
            script.Args(**change)


def test_every_setting_of_the_algorithm_changes_the_outcome(tmp_path):
    def outcome(**settings):
        state, _ = train(script, tmp_path, **FEW | {"total_timesteps": 250} | settings)
        return [weights.tolist() for weights in state["network"].values()]

    check_settings(script, outcome, {
        "seed": 2, "total_timesteps": 260, "num_envs": 4, "learning_rate": 5e-3, "anneal_lr": False,
        "buffer_size": 100, "gamma": 0.9, "num_quantiles": 4, "tau": 0.5,
        "target_network_frequency": 50, "batch_size": 15, "start_e": 0.9, "end_e": 0.5,
        "exploration_fraction": 0.2, "learning_starts": 100, "train_frequency": 5,
        "gradient_steps": 2, "hidden_size": 15,
    })  # fmt: skip
