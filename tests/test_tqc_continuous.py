"""The mathematics of tqc_continuous.py: by hand, by integration, against torch.distributions."""

import math
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
import tqc_continuous as script
from diary import Diary, Pays, check_episodes, check_settings, recorded, side_by_side, train
from gymnasium.spaces import Box
from torch import nn
from torch.distributions import Independent, Normal, TanhTransform, TransformedDistribution

# For the tests that all scripts share.
TINY = (
    "--total-timesteps 1000 --num-envs 2 --learning-starts 100 --buffer-size 700 --batch-size 32 "
    "--hidden-size 32 --num-critics 3 --num-quantiles 5 --train-frequency 4 --gradient-steps 2 "
    "--checkpoint-frequency 250 --eval-frequency 350 --eval-episodes 5"
)
OWN = "continuous"
OWN_FLAGS = "--total-timesteps 3000 --hidden-size 32 --batch-size 64 --num-critics 2"
WRONG_SPACES = ["CartPole-v1", "cases:HugeBounds-v0"]
DIVERGES = "--learning-rate 1e30"
BAD = [
    ("--precision float16", "--precision"),
    ("--learning-starts 128", "--batch-size"),
    ("--buffer-size 999", "--learning-starts"),
    ("--total-timesteps 1000", "--learning-starts"),
    ("--alpha -0.1", "--alpha"),
    ("--gradient-steps 0", "--gradient-steps"),
    ("--tau nan", "--tau"),
    ("--num-dropped 25", "--num-dropped"),
    ("--num-critics 0", "--num-critics"),
    ("--buffer-size 1e15", "--buffer-size"),
]
LEARNS = [
    ("--env-id cases:Aim-v0 --total-timesteps 5000 --hidden-size 64 --num-quantiles 10 --num-critics 3", 9)
]
# What others published, by the record's name after `<script>__`: shown beside our results.
PUBLISHED = {"Pendulum-v1": "Zoo -151 (20k)"}
# How speed.py measures the script, and beside what; its first lines explain the form.
SPEED = {
    "steps": 4_000,
    "first": 1_500,  # all programs learn from step 1,000 on, by one gradient step a step
    "peers": {
        "sb3-contrib's TQC": {
            "env_id": "HalfCheetah-v5",
            "num_envs": 1,
            "settings": {
                "buffer_size": 1_000_000,
                "learning_starts": 1_000,
                "batch_size": 256,
                "train_freq": 1,
                "gradient_steps": 1,
                "learning_rate": 3e-4,
                "policy_kwargs": {"n_critics": 5},
                "device": "cpu",
            },
            "equal": "five critics, compiled",
        },
        "SBX's TQC": {  # has two critics, whatever n_critics says
            "env_id": "HalfCheetah-v5",
            "num_envs": 1,
            "settings": {
                "buffer_size": 1_000_000,
                "learning_starts": 1_000,
                "batch_size": 256,
                "train_freq": 1,
                "gradient_steps": 1,
                "learning_rate": 3e-4,
            },
            "equal": "two critics, compiled",
        },
    },
    "flags": "--env-id HalfCheetah-v5 --learning-starts 1000 --learning-rate 3e-4",
    "variants": {
        "five critics, compiled": "--num-critics 5 --compile",
        "five critics": "--num-critics 5",
        "two critics, compiled": "--num-critics 2 --compile",
    },
    "floors": {"floor": "1500 2500 --num-envs 1"},
}

# ---- The policy ----------------------------------------------------------------------------------


def squashed(means, log_std):
    """The distribution of an action in (-1, 1), PyTorch's own."""
    normal = Independent(Normal(means, log_std.exp()), 1)
    return TransformedDistribution(normal, TanhTransform(cache_size=1))


def sample_alike(count, mean, log_std):
    """`count` samples of one number: actions and log probabilities, (count,) each."""
    torch.manual_seed(0)
    means, log_std = torch.full((count, 1), mean), torch.full((count, 1), log_std)
    actions, log_probs = script.sample_actions(means, log_std, torch.randn(count, 1))
    return actions.squeeze(1), log_probs


def test_log_probability_is_the_slope_of_the_cumulative_distribution():
    """P(tanh u < a) = P(u < artanh a), differentiated numerically, in two dimensions."""
    torch.manual_seed(0)
    means, log_std, noise = torch.randn(3, 50, 2).double()
    log_std = log_std / 2
    actions, log_probs = script.sample_actions(means, log_std, noise)
    assert actions.abs().max() > 0.99
    h = 1e-4 * (1 - actions.abs())
    below, above = (Normal(means, log_std.exp()).cdf((actions + d).atanh()) for d in (-h, h))
    expected = ((above - below) / (2 * h)).log().sum(1)
    torch.testing.assert_close(log_probs, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("u", [-100.0, -30.0, -9.0, 0.0, 1.0, 9.0, 30.0, 100.0])
def test_log_probability_is_exact_where_tanh_rounds_to_1(u):
    """log(1 - tanh(u)^2) = -2 log cosh(u). A density of 1 - tanh(u)^2 + 1e-6 would be far off."""
    u = torch.tensor([[u]], requires_grad=True)
    _, log_prob = script.sample_actions(u, torch.zeros(1, 1), torch.zeros(1, 1))
    slope = 2 * math.log(math.cosh(u.item())) - math.log(2 * math.pi) / 2
    assert log_prob.item() == pytest.approx(slope, rel=1e-6, abs=1e-6)
    log_prob.backward()
    assert u.grad.item() == pytest.approx(2 * math.tanh(u.item()), abs=1e-6)


@pytest.mark.parametrize("mean, log_std", [(0.0, 0.0), (0.7, -1.5), (-1.0, 0.9)])
def test_mean_of_log_probability_is_the_entropy_by_integration(mean, log_std):
    """The integral of -log p(tanh u) over the Gaussian of u, by the midpoint rule."""
    u = torch.linspace(-20, 20, 100_001, dtype=torch.float64)
    gaussian = Normal(torch.tensor(mean).double(), math.exp(log_std))
    density = gaussian.log_prob(u) + 2 * u.cosh().log()  # log p of tanh u
    entropy = -(gaussian.log_prob(u).exp() * density).sum().item() * 40 / 100_000
    _, log_probs = sample_alike(200_000, mean, log_std)
    assert -log_probs.mean().item() == pytest.approx(entropy, abs=0.01)


def make_agent(obs_size=2, low=(-2, 0), high=(2, 10), hidden_size=16, seed=0, **settings):
    torch.manual_seed(seed)
    args = script.Args(hidden_size=hidden_size, **{"num_critics": 3, "num_quantiles": 5} | settings)
    return script.Agent(obs_size, np.float32(low), np.float32(high), args)


def test_actions_in_their_bounds_are_distributed_as_log_probability_says():
    """Scaled to 0 to 10, a density is 5 times thinner: so says the histogram of played actions."""
    agent = make_agent(low=[0], high=[10])
    agent.actor[-1].weight.data.zero_()
    agent.actor[-1].bias.data[:] = torch.tensor([0.4, -0.5])
    actor, obs = script.Actor(agent), np.zeros((200_000, 2), np.float32)
    torch.manual_seed(0)
    actions = script.act(actor, obs, torch.randn(200_000, 1).numpy())
    found, edges = np.histogram(script.to_bounds(actor, actions), 50, (0, 10), density=True)
    middles = torch.tensor((edges[1:] + edges[:-1]) / 2) / 5 - 1
    deviation = math.exp(-0.5)
    noise = (middles.atanh() - 0.4) / deviation
    ones = torch.ones(50, 1).double()
    _, log_probs = script.sample_actions(0.4 * ones, -0.5 * ones, noise[:, None])
    np.testing.assert_allclose(found, log_probs.exp() / 5, atol=0.01)


def test_the_actor_is_the_policy_also_after_an_update():
    """And the evaluation plays the squashed means."""
    agent, obs = make_agent(), 3 * torch.randn(50, 2)
    actor = script.Actor(agent)
    for _ in range(2):
        noise = torch.randn(50, 2)
        means, log_std = agent(obs)
        expected, _ = script.sample_actions(means, log_std, noise)
        found = script.act(actor, obs.numpy(), noise.numpy())
        np.testing.assert_allclose(found, expected.detach(), rtol=1e-4, atol=1e-5)
        played = script.play(script.Args(), agent, obs.numpy())
        expected = means.detach().tanh() * torch.tensor([2, 5]) + torch.tensor([0, 5])
        np.testing.assert_allclose(played, expected, rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            for weights in agent.parameters():
                weights += 0.3 * torch.randn_like(weights)


def test_deviations_have_bounds():
    agent = make_agent()
    agent.actor[-1].weight.data.zero_()
    agent.actor[-1].bias.data[:] = torch.tensor([1.0, 2.0, -50.0, 50.0])
    means, log_std = agent(torch.zeros(1, 2))
    assert means.tolist() == [[1, 2]] and log_std.tolist() == [[-20, 2]]
    means, deviations = script.Actor(agent)(np.zeros((1, 2), np.float32))
    np.testing.assert_allclose(means, [[1, 2]])
    np.testing.assert_allclose(deviations, np.exp([[-20, 2]]), rtol=1e-6)


def test_settings_are_the_sizes_of_the_networks():
    agent = make_agent(obs_size=3, hidden_size=8, num_critics=4, num_quantiles=7)
    assert len(agent.critics.networks) == 4
    for network, inputs, outputs in [
        (agent.actor, 3, 4), *((critic, 5, 7) for critic in agent.critics.networks)
    ]:  # fmt: skip
        shapes = [tuple(weights.shape) for weights in network.parameters()]
        assert shapes == [(8, inputs), (8,), (8, 8), (8,), (outputs, 8), (outputs,)]
        assert sum(isinstance(part, nn.ReLU) for part in network) == 2
    obs, actions = torch.randn(6, 3), torch.randn(6, 2)
    quantiles = agent.critics(obs, actions)
    assert quantiles.shape == (6, 4, 7) and len(quantiles.unique()) == 6 * 4 * 7
    third = agent.critics.networks[2](torch.cat([obs, actions], 1))
    torch.testing.assert_close(quantiles[:, 2], third)


def test_bfloat16_is_for_the_product_between_the_hidden_layers_only():
    box, found = Box(-1, 1, (2,)), {}
    envs = SimpleNamespace(action_space=box, obs=np.zeros((1, 3), np.float32))
    for precision in ("float32", "bfloat16"):
        agent = script.make_network(script.Args(precision=precision), envs)
        parts = dict(agent.named_modules()).items()
        found[precision] = {name for name, part in parts if isinstance(part, script.Bfloat16Linear)}
        assert {weight.dtype for weight in agent.parameters()} == {torch.float32}
    expected = {"actor.2", *(f"critics.networks.{k}.2" for k in range(5))}
    assert found == {"float32": set(), "bfloat16": expected}


# ---- Bounds --------------------------------------------------------------------------------------


def test_each_number_of_an_action_has_bounds_of_its_own():
    actor = script.Actor(make_agent(low=(-2, 0, 10), high=(2, 1, 30)))
    actions = np.float32([[0, 0, 0], [-1, -1, -1], [1, 1, 1], [0.5, -0.5, 0.1]])
    expected = [[0, 0.5, 20], [-2, 0, 10], [2, 1, 30], [1, 0.25, 21]]
    np.testing.assert_allclose(script.to_bounds(actor, actions), expected, rtol=1e-6)


def test_rounding_does_not_leave_the_bounds():
    low, high = np.float32([-1, -0.7]), np.float32([0.1, 0.3])
    actor = script.Actor(make_agent(low=low, high=high))
    for end in (-1, 1):
        found = script.to_bounds(actor, np.full((1, 2), end, np.float32))
        assert (found >= low).all() and (found <= high).all()


def test_an_action_that_is_no_number_never_reaches_the_environment():
    actor = script.Actor(make_agent())
    with pytest.raises(script.UsageError, match="an action is not finite"):
        script.to_bounds(actor, np.float32([[0, 0], [0, np.nan]]))


# ---- The three losses ----------------------------------------------------------------------------


TWO_CRITICS = torch.tensor([
    [[1.0, 2.0, 3.0, 4.0, 50.0], [60.0, 70.0, 5.0, 90.0, 80.0]],  # the highest are of the second
    [[-1.0, 9.0, 8.0, 7.0, 6.0], [5.0, 4.0, -3.0, 2.0, 1.0]],  # of the first
    [[1.0, 2.0, 3.0, 4.0, 5.0], [1.0, 2.0, 3.0, 4.0, 5.0]],  # of both
])  # fmt: skip


def target(num_dropped, alpha=0.0, gamma=1.0, ends=(False, False, False)):
    """Of TWO_CRITICS, each row in ascending order."""
    rewards, log_probs = torch.tensor([0.0, 0.5, 0.25]), torch.tensor([-0.5, 2.0, 90.0])
    found = script.truncated_target(
        rewards, torch.tensor(ends), TWO_CRITICS, log_probs, torch.tensor(alpha), gamma, num_dropped
    )
    return found.sort(1).values


def test_the_highest_of_all_critics_together_are_dropped():
    """Two per critic are four of all ten, not two of each: in the first row, all of the second."""
    assert target(2).tolist() == [
        [1, 2, 3, 4, 5, 50],
        [-2.5, -0.5, 1.5, 2.5, 4.5, 5.5],
        [1.25, 1.25, 2.25, 2.25, 3.25, 3.25],
    ]
    assert target(4).tolist() == [[1, 2], [-2.5, -0.5], [1.25, 1.25]]


def test_none_dropped_are_all_kept():
    rewards = torch.tensor([0.0, 0.5, 0.25])
    expected = (TWO_CRITICS.flatten(1) + rewards[:, None]).sort(1).values
    torch.testing.assert_close(target(0), expected)


def test_target_by_hand():
    """Of each that is kept, the temperature times log pi is taken off; nothing follows the third.

    The entropy does not change which are dropped. Where the episode ended, all are the reward.
    """
    expected = torch.tensor([
        [0.5 * (z + 0.2 * 0.5) for z in (1, 2, 3, 4, 5, 50)],
        [0.5 + 0.5 * (z - 0.2 * 2) for z in (-3, -1, 1, 2, 4, 5)],
        [0.25] * 6,
    ])  # fmt: skip
    torch.testing.assert_close(target(2, 0.2, 0.5, (False, False, True)), expected)


def test_quantile_huber_loss_is_a_double_loop():
    """Fewer quantiles than targets, which are not sorted. Also at the edges of its two cases."""
    torch.manual_seed(0)
    quantiles, targets = 2 * torch.randn(4, 3).double(), 2 * torch.randn(4, 6).double()
    targets[0, :3] = quantiles[0, 0] + torch.tensor([-1.0, 0.0, 1.0])
    taus = torch.rand(4, 3).double()
    found = script.quantile_huber_loss(quantiles, taus, targets)
    assert found.shape == (4, 3)
    for row in range(4):
        for m in range(3):
            total = 0.0
            for y in targets[row].tolist():
                u, tau = y - quantiles[row, m].item(), taus[row, m].item()
                huber = u * u / 2 if abs(u) < 1 else abs(u) - 1 / 2
                total += (tau if u >= 0 else 1 - tau) * huber
            assert found[row, m].item() == pytest.approx(total / 6)


def test_quantile_huber_loss_broadcasts_what_comes_before():
    """Each of C critics against the same targets, with the same taus."""
    torch.manual_seed(0)
    quantiles, targets, taus = torch.randn(7, 4, 3), torch.randn(7, 6), torch.rand(3)
    found = script.quantile_huber_loss(quantiles, taus, targets[:, None])
    assert found.shape == (7, 4, 3)
    for k in range(4):
        alone = script.quantile_huber_loss(quantiles[:, k], taus.expand(7, 3), targets)
        torch.testing.assert_close(found[:, k], alone)


def slopes(theta, targets):
    """The derivative of the loss of one critic by each of its quantiles: two of (M,) -> (M,)."""
    quantiles = theta.clone().requires_grad_()
    script.critic_loss(quantiles[None, None], targets[None]).backward()
    return quantiles.grad


def test_quantiles_of_four_targets_in_closed_form():
    """At tau = 1/8, the slope is tau for each target above, and 1 - tau times the distance below.

    So 3 tau = (1 - tau) * (theta - y): the best theta is near the first of four, and so on.
    """
    targets = torch.tensor([30.0, -10.0, 10.0, -30.0]).double()
    first, second = 3 * 0.125 / 0.875, (2 * 0.375 - 0.625) / 0.625
    best = torch.tensor([-30 + first, -10 + second, 10 - second, 30 - first]).double()
    torch.testing.assert_close(slopes(best, targets), torch.zeros(4).double(), atol=1e-7, rtol=0)
    assert (slopes(best - 0.1, targets) < 0).all() and (slopes(best + 0.1, targets) > 0).all()


def test_quantiles_of_a_normal_distribution():
    """1000 wide: the part of the loss that is a square no longer matters."""
    normal = Normal(torch.tensor(50.0).double(), 1000)
    targets = normal.icdf((torch.arange(500).double() + 0.5) / 500)
    best = normal.icdf(torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9]).double())
    assert (slopes(best - 10, targets) < 0).all() and (slopes(best + 10, targets) > 0).all()


def test_critics_loss_is_a_mean_over_quantiles_and_a_sum_over_critics():
    """Of M = 2 quantiles at tau = 1/4 and 3/4, and three critics."""
    quantiles = torch.tensor([[[0.0, 0.0], [3.0, 0.0], [0.0, 3.0]], [[0.0, 0.0]] * 3])
    targets = torch.tensor([[3.0, 3.0, 3.0, 0.0], [0.0] * 4])
    above, below = 2.5 * 3 / 4, 2.5 / 4  # Huber(3) is 2.5; three targets are 3 above 0
    critics = [(above / 4 + 3 * above / 4), (3 * below / 4 + 3 * above / 4)]
    critics.append(above / 4 + below / 4)
    found = script.critic_loss(quantiles, targets)
    assert found.item() == pytest.approx(sum(critics) / 2 / 2)


def test_policy_maximises_all_quantiles_of_all_critics():
    """None is dropped."""
    log_probs, alpha = torch.tensor([1.0, -1.0, 2.0]), torch.tensor(0.5)
    means = [365 / 10, 38 / 10, 3]
    expected = sum(0.5 * p - q for p, q in zip((1, -1, 2), means)) / 3
    assert script.policy_loss(TWO_CRITICS, log_probs, alpha).item() == pytest.approx(expected)


def test_temperature_moves_the_entropy_to_its_target():
    """The derivative by log alpha is alpha * (entropy - H), whose sign is the right one."""
    for entropy, sign in (-3.0, -1), (-2.0, 0), (-1.0, 1):
        log_alpha = torch.tensor(math.log(0.3), requires_grad=True)
        log_probs = torch.tensor([0.25, -0.25]) - entropy
        script.temperature_loss(log_alpha, log_probs, -2.0).backward()
        assert log_alpha.grad.item() == pytest.approx(0.3 * sign)  # alpha falls if it is positive


def random_batch(size=40, obs_size=2, action_size=2):
    obs, next_obs = torch.randn(2, size, obs_size).double()
    actions = 2 * torch.rand(size, action_size).double() - 1
    return script.Batch(obs, actions, torch.randn(size).double(), next_obs, torch.rand(size) < 0.3)


@pytest.mark.parametrize("autotune", [True, False])
@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_update_goes_down_three_gradients_each_of_the_weights_of_its_own(autotune, compile):
    """Separate losses from PyTorch's own distribution, all at the old weights.

    The targets differ from the critics. A gradient that is left over is no matter.
    """
    agent, reference, batch = make_agent().double(), make_agent().double(), random_batch()
    targets = make_agent(seed=1).double().critics
    old_targets = [weights.detach().clone() for weights in targets.parameters()]
    for weights in agent.parameters():
        weights.grad = torch.ones_like(weights)
    agent.log_alpha.data.fill_(math.log(0.3))
    args = script.Args(
        gamma=0.9, tau=0.25, alpha=0.7, autotune=autotune, compile=compile, num_critics=3,
        num_quantiles=5, num_dropped=3,
    )  # fmt: skip
    if compile:
        torch.compiler.reset()
        torch._dynamo.config.trace_autograd_ops = True
    optimizer = torch.optim.SGD(agent.parameters(), lr=0.1)
    torch.manual_seed(5)
    metrics = script.update(agent, targets, optimizer, batch, args)

    torch.manual_seed(5)
    noise = torch.randn(2, 40, 2)
    alpha = 0.3 if autotune else 0.7
    means, log_std = reference.actor(batch.next_obs).split(2, 1)
    next_actions = (means + log_std.exp() * noise[0]).tanh()
    next_log_probs = squashed(means, log_std).log_prob(next_actions)
    inputs = torch.cat([batch.next_obs, next_actions], 1)
    pool = torch.cat([critic(inputs) for critic in make_agent(seed=1).double().critics.networks], 1)
    kept = pool.sort(1).values[:, :6] - alpha * next_log_probs[:, None]  # of 15
    y = torch.where(batch.terminated[:, None], 0, 0.9 * kept) + batch.rewards[:, None]
    losses = []
    for critic in reference.critics.networks:
        theta = critic(torch.cat([batch.obs, batch.actions], 1))
        errors = y.detach()[:, None] - theta[:, :, None]  # 40 transitions, 5 quantiles, 6 targets
        huber = torch.where(errors.abs() < 1, errors**2 / 2, errors.abs() - 0.5)
        tau = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9])[:, None]
        losses.append((torch.where(errors < 0, 1 - tau, tau) * huber).mean())
    policy = squashed(*reference.actor(batch.obs).split(2, 1))
    actions = (policy.base_dist.mean + policy.base_dist.stddev * noise[1]).tanh()
    log_probs, inputs = policy.log_prob(actions), torch.cat([batch.obs, actions], 1)
    values = torch.cat([critic(inputs) for critic in reference.critics.networks], 1).mean(1)
    losses.append((alpha * log_probs - values).mean())

    expected = {}
    for name, loss in zip([*(f"critics.networks.{k}" for k in range(3)), "actor"], losses):
        weights = dict(reference.get_submodule(name).named_parameters())
        gradients = torch.autograd.grad(loss, weights.values(), retain_graph=True)
        for part, gradient in zip(weights, gradients):
            expected[f"{name}.{part}"] = weights[part] - 0.1 * gradient
    log_alpha = math.log(0.3)
    if autotune:  # its target is an entropy of -2
        log_alpha -= 0.1 * -0.3 * (log_probs.mean().item() - 2)
    assert agent.log_alpha.item() == pytest.approx(log_alpha)
    found = dict(agent.named_parameters())
    assert expected.keys() == found.keys() - {"log_alpha"}
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-6, atol=1e-8)
    for old, found, source in zip(old_targets, targets.parameters(), agent.critics.parameters()):
        torch.testing.assert_close(found, 0.75 * old + 0.25 * source)
    quantiles = make_agent().double().critics(batch.obs, batch.actions)
    values = {
        "losses/td_loss": sum(losses[:3]), "losses/q_values": quantiles.mean(),
        "losses/policy_loss": losses[3], "losses/entropy": -log_probs.mean(),
        "losses/alpha": torch.tensor(alpha),
    }  # fmt: skip
    for tag, value in metrics.items():
        assert value.item() == pytest.approx(values.pop(tag).item(), rel=1e-5), tag
        assert not value.requires_grad
    assert not values


@pytest.mark.parametrize("autotune", [True, False])
def test_the_policy_becomes_the_soft_optimum(autotune):
    """For Q = -10 (a - 0.3)^2 in one state, this is proportional to exp(Q / alpha).

    With a fixed temperature of 1, nearly a Gaussian of variance 1 / 20. Learned, the temperature is
    the one at which the entropy is -1.
    """
    agent = make_agent(obs_size=1, low=[-1], high=[1], hidden_size=32)
    args = script.Args(
        gamma=0.0, autotune=autotune, alpha=1.0, num_critics=3, num_quantiles=5, num_dropped=2
    )
    optimizer = torch.optim.Adam(agent.parameters(), lr=1e-2)
    for _ in range(1000):
        actions = 2 * torch.rand(64, 1) - 1
        ends, zeros = torch.ones(64, dtype=torch.bool), torch.zeros(64, 1)
        rewards = -10 * (actions - 0.3).square().squeeze(1)
        batch = script.Batch(zeros, actions, rewards, zeros, ends)
        script.update(agent, agent.critics, optimizer, batch, args)
    means, log_std = agent(torch.zeros(10_000, 1))
    actions, log_probs = script.sample_actions(means, log_std, torch.randn(10_000, 1))
    variance = 1 / 20
    if autotune:
        assert -log_probs.mean().item() == pytest.approx(-1, abs=0.1)
        # The entropy of a Gaussian is log(2 pi e variance) / 2, its variance alpha / 20.
        variance = math.exp(2 * -1) / (2 * math.pi * math.e)
        assert agent.log_alpha.exp().item() == pytest.approx(20 * variance, rel=0.3)
    assert actions.var().item() == pytest.approx(variance, rel=0.25)
    assert actions.mean().item() == pytest.approx(0.3, abs=0.05)


# ---- ReplayBuffer --------------------------------------------------------------------------------


class Stream:
    """Plays episodes of random lengths in N environments, and keeps a list of what happened.

    Every observation has a number of its own. Action and reward repeat that of the one before.
    """

    def __init__(self, num_envs, longest, seed=0):
        self.random, self.longest, self.next = np.random.default_rng(seed), longest, num_envs
        self.obs, self.happened = np.arange(num_envs), [[] for _ in range(num_envs)]

    def number(self, count):
        self.next += count
        return np.arange(self.next - count, self.next)

    def add_to(self, buffer):
        """One step in all environments, to be added to a buffer."""
        count, numbers = len(self.obs), self.obs
        following = self.number(count)
        ended = self.random.random(count) < 1 / self.longest
        kind = self.random.integers(3, size=count)  # a third of the ends are both
        terminated, truncated = ended & (kind < 2), ended & (kind > 0)
        rows = [np.float32(np.stack([n, -n], 1)) for n in (numbers, following)]
        actions, rewards = np.float32(np.stack([n := numbers, n / 2, -n], 1)), np.float32(n / 4)
        buffer.add(rows[0], actions, rewards, rows[1], terminated, truncated)
        for i in range(count):
            entry = int(numbers[i]), int(following[i]), bool(terminated[i]), bool(ended[i])
            self.happened[i].append(entry)
        self.obs = np.where(ended, self.number(count), following)

    def newest(self, num_rows):
        """The (obs, next_obs, terminated) that fit, if an end takes a row, and the newest one."""
        found = set()
        for steps in self.happened:
            left = num_rows - 1  # a row for the newest observation
            for k, (obs, following, terminated, ended) in enumerate(reversed(steps)):
                left -= 1 + (ended and k > 0)
                if left < 0:
                    break
                found.add((obs, following, terminated))
        return found


def sampled(batch):
    """(obs, next_obs, terminated) of a batch's rows, whose parts must belong together."""
    number, following = batch.obs[:, 0], batch.next_obs[:, 0]
    for found, expected in [
        (batch.obs, [number, -number]), (batch.next_obs, [following, -following]),
        (batch.actions, [number, number / 2, -number]), (batch.rewards[:, None], [number / 4]),
    ]:  # fmt: skip
        assert torch.equal(found, torch.stack(expected, 1)) and found.dtype == torch.float32
    ints = number.int().tolist(), following.int().tolist()
    return list(zip(*ints, batch.terminated.tolist()))


@pytest.mark.parametrize("num_envs, size, rounds, longest", [
    (1, 50, 20, 5), (1, 50, 50, 1e9), (1, 50, 51, 1e9), (1, 50, 400, 5), (1, 50, 400, 1),
    (3, 50, 10, 5), (3, 50, 300, 5), (4, 50, 300, 1.5), (4, 3, 50, 2), (4, 3, 1, 2),
])  # fmt: skip
def test_buffer_holds_the_last_transitions_of_every_environment(num_envs, size, rounds, longest):
    """Against a list; over ends of both kinds; all are drawn, and all alike."""
    torch.manual_seed(0)
    buffer, stream = script.ReplayBuffer(size, num_envs, 2, 3), Stream(num_envs, longest)
    for _ in range(rounds):
        stream.add_to(buffer)
    expected = stream.newest(math.ceil(size / num_envs) + 1)
    if longest == 1e9:  # no end: exactly as many as were asked for
        assert len(expected) == min(rounds, size)
    numbers = sampled(buffer.sample(20_000))
    rows, counts = np.unique(np.array(numbers), axis=0, return_counts=True)
    assert {tuple(row) for row in rows.tolist()} == expected
    np.testing.assert_allclose(counts / 20_000, 1 / len(expected), atol=0.015)


def test_buffer_is_right_after_every_step():
    torch.manual_seed(0)
    buffer, stream = script.ReplayBuffer(20, 3, 2, 3), Stream(3, 4)
    for _ in range(100):
        stream.add_to(buffer)
        assert set(sampled(buffer.sample(500))) == stream.newest(8)


def test_a_million_transitions_of_halfcheetah_take_103_bytes_each():
    """Stable-Baselines3 takes 172: both observations, action, reward, and two flags of 4 bytes."""
    buffer = script.ReplayBuffer(1_000_000, 1, 17, 6)
    assert sum(column.nbytes for column in buffer.columns) <= 103 * 1_000_000 * 1.001


def test_buffer_and_batch_are_copies():
    buffer, zeros = script.ReplayBuffer(3, 1, 2, 1), np.zeros(1, bool)
    obs, next_obs = np.float32([[1, 2]]), np.float32([[3, 4]])
    buffer.add(obs, np.float32([[0]]), np.float32([1]), next_obs, zeros, zeros)
    obs[:] = next_obs[:] = 9
    batch = buffer.sample(1)
    buffer.obs[:] = 5
    assert batch.obs.tolist() == [[1, 2]] and batch.next_obs.tolist() == [[3, 4]]


@pytest.mark.parametrize("rounds", [1, 4, 7, 100])
def test_buffer_comes_back_from_a_checkpoint(tmp_path, rounds):
    """And goes on at the right rows."""
    buffers, streams = [script.ReplayBuffer(20, 3, 2, 3) for _ in range(2)], []
    stream, batches = Stream(3, 4), []
    for _ in range(rounds):
        stream.add_to(buffers[0])
    torch.save(buffers[0].state_dict(), tmp_path / "buffer.pt")
    saved = torch.load(tmp_path / "buffer.pt", weights_only=True)
    buffers[1].load_state_dict(saved)
    later = np.random.default_rng(1).integers(2**60)
    for buffer in buffers:
        other = Stream(3, 4, later)
        other.next, other.obs = stream.next, stream.obs
        for _ in range(3):
            other.add_to(buffer)
        torch.manual_seed(1)
        batches.append(sampled(buffer.sample(100)))
        streams.append(other)
    assert batches[0] == batches[1]
    assert {step[0] for step in streams[1].happened[2]} <= {obs for obs, *_ in batches[1]}


def test_a_checkpoint_has_the_filled_rows_only_and_fits_no_other_size(tmp_path):
    buffer, stream = script.ReplayBuffer(100_000, 1, 2, 3), Stream(1, 5)
    for _ in range(10):
        stream.add_to(buffer)
    torch.save(buffer.state_dict(), tmp_path / "buffer.pt")
    assert (tmp_path / "buffer.pt").stat().st_size < 10_000
    with pytest.raises(ValueError, match="--buffer-size"):
        script.ReplayBuffer(100_001, 1, 2, 3).load_state_dict(buffer.state_dict())


# ---- The loop ------------------------------------------------------------------------------------


class PaysContinuously(Pays):
    """Where episodes terminate, 1, 0 and -1 tell the step: else noise would seem to be value."""

    action_space = Box(-1, 1, (2,), np.float32)

    def step(self, action):
        obs, *outcome = super().step(action)
        return obs if self.truncates else np.float32([1 - self.t]), *outcome


gym.register("TruncatesCounting-v0", entry_point=PaysContinuously, kwargs={"truncates": True})
gym.register("TerminatesCounting-v0", entry_point=PaysContinuously, kwargs={"truncates": False})

FEW = dict(
    env_id="ContinuousDiary-v0", total_timesteps=1200, num_envs=3, learning_starts=50,
    batch_size=16, buffer_size=1000, hidden_size=16, train_frequency=4, eval_episodes=3,
    learning_rate=1e-2, num_critics=3, num_quantiles=5,
)  # fmt: skip
LOW, HIGH = np.array([-2, 0]), np.array([2, 10])


def scaled(actions):
    """From -1 and 1 to the bounds of the diary."""
    return LOW + (np.asarray(actions) + 1) / 2 * (HIGH - LOW)


@pytest.mark.parametrize("num_envs, size", [(1, 5000), (3, 250)])
def test_the_buffer_holds_what_really_happened(tmp_path, num_envs, size):
    """Also where an episode ends: its last observation, and terminated only if it was."""
    state, points = train(script, tmp_path, **FEW | {"num_envs": num_envs, "buffer_size": size})
    buffer = script.ReplayBuffer(size, num_envs, 2, 2)
    buffer.load_state_dict(state["buffer"])
    batch = buffer.sample(20_000)
    happened = {}
    for i, env in enumerate(Diary.made[:num_envs]):
        for obs, action, reward, next_obs, terminated, _ in env.steps:
            happened[tuple(obs)] = action, reward, next_obs, terminated, i
    drawn = set()
    for obs, action, *found in zip(*(part.tolist() for part in batch)):
        expected_action, *expected, i = happened[tuple(obs)]
        np.testing.assert_allclose(scaled(action), expected_action, rtol=1e-5, atol=1e-5)
        assert found[1:] == expected[1:] and found[0] == pytest.approx(expected[0], rel=1e-6)
        drawn.add(tuple(obs))
    assert len(drawn) == 1200 if size == 5000 else 150 < len(drawn) < 250
    newest = [tuple(env.steps[-1][0]) for env in Diary.made[:num_envs]]
    assert drawn.issuperset(newest)
    check_episodes(points, side_by_side(num_envs))


@pytest.mark.parametrize("num_envs, train_frequency, gradient_steps, learning_starts", [
    (1, 1, 1, 16), (1, 7, 3, 50), (4, 4, 1, 50), (4, 10, 1, 50), (3, 5, 2, 50), (8, 1, 1, 101),
])  # fmt: skip
def test_the_loop_does_each_thing_when_it_is_due(
    tmp_path, monkeypatch, num_envs, train_frequency, gradient_steps, learning_starts
):
    """In a plain loop over the steps: first a round of them, then what is due after each."""
    notes, networks = [], set()

    def spy(name, note):
        def spying(*arguments, function=getattr(script, name), **keywords):
            notes.append((name, note(*arguments, **keywords)))
            return function(*arguments, **keywords)

        monkeypatch.setattr(script, name, spying)

    def note_update(agent, target_critics, optimizer, batch, args):
        networks.add((agent, target_critics))
        assert target_critics is not agent.critics
        return type(optimizer), optimizer.param_groups[0]["lr"], len(batch.obs), args.gamma

    spy("act", lambda actor, obs, noise=0.0: (obs.tolist(), np.shape(noise)))
    spy("update", note_update)
    train(script, tmp_path, **FEW | {
        "num_envs": num_envs, "train_frequency": train_frequency, "gradient_steps": gradient_steps,
        "learning_starts": learning_starts, "total_timesteps": 400, "gamma": 0.8,
    })  # fmt: skip
    steps, expected = side_by_side(num_envs), []
    for first in range(0, 400, num_envs):
        if first >= learning_starts:
            seen = [step[0] for _, step in steps[first : first + num_envs]]
            expected.append(("act", (seen, (num_envs, 2))))
        for step in range(first + 1, first + num_envs + 1):
            if step >= learning_starts and step % train_frequency == 0:
                expected += [("update", (torch.optim.Adam, 1e-2, 16, 0.8))] * gradient_steps
    assert notes[: len(expected)] == expected
    evaluation = notes[len(expected) :]
    assert evaluation and all(name == "act" and note[1] == () for name, note in evaluation)
    assert len(networks) == 1


def test_before_it_learns_actions_are_uniform_and_each_environment_has_its_own(tmp_path):
    flags = {"learning_starts": 5000, "total_timesteps": 5001, "buffer_size": 5000}
    train(script, tmp_path, **FEW | flags)
    actions = np.array([[step[1] for step in env.steps[:1600]] for env in Diary.made[:3]])
    shares = (actions - LOW) / (HIGH - LOW)  # 3 environments, 1600 steps, 2 numbers
    assert shares.min() >= 0 and shares.max() <= 1
    columns = shares.transpose(0, 2, 1).reshape(6, 1600)
    for column in columns:
        np.testing.assert_allclose(np.histogram(column, 4, (0, 1))[0] / 1600, 0.25, atol=0.045)
    assert abs(np.corrcoef(columns) - np.eye(6)).max() < 0.1


def test_every_environment_gets_the_action_that_was_chosen_for_it(tmp_path, monkeypatch):
    """Each with noise of its own; in the evaluation by the network that is saved."""
    acts = recorded(monkeypatch, script, "act")
    state, _ = train(script, tmp_path, **FEW | {"total_timesteps": 600})
    chosen, noises = {}, []
    for (_, obs, *noise), actions in acts:
        chosen |= {tuple(row): scaled(action) for row, action in zip(obs.tolist(), actions)}
        noises += [part.ravel() for part in noise]
    for i, env in enumerate(Diary.made):
        for obs, action, *_ in env.steps[17 * (i < 3) :]:  # 51 random steps of the first three
            np.testing.assert_allclose(action, chosen[tuple(obs)], rtol=1e-4, atol=1e-5)
    noises = np.concatenate(noises)
    assert len(np.unique(noises)) == noises.size == 549 * 2
    agent = make_agent()
    agent.load_state_dict(state["network"])
    obs, actions, *_ = zip(*(step for env in Diary.made[3:] for step in env.steps))
    played = script.play(script.Args(), agent, np.float32(obs))
    np.testing.assert_allclose(actions, played, rtol=1e-4, atol=1e-5)


def test_at_the_start_the_target_critics_are_the_critics(tmp_path):
    never = {"train_frequency": 1000, "total_timesteps": 100, "seed": 3}
    state, _ = train(script, tmp_path, **FEW | never)
    first = make_agent(seed=3).state_dict()
    for name, weights in state["network"].items():
        assert torch.equal(weights, first[name])
    for name, weights in state["target_critics"].items():
        assert torch.equal(weights, first[f"critics.{name}"])


def test_losses_are_logged_every_1000_steps(tmp_path, monkeypatch):
    """Rounds of 3 steps: what is due at 1000 is logged at the end of its round, 1002."""
    metrics, update = [], script.update
    monkeypatch.setattr(script, "update", lambda *a: metrics.append(update(*a)) or metrics[-1])
    _, points = train(script, tmp_path, **FEW | {"total_timesteps": 3003, "train_frequency": 10})
    steps = (1002, 2001, 3000)  # the first update is at step 50
    for tag in metrics[0]:
        values = [metrics[step // 10 - 5][tag].item() for step in steps]
        np.testing.assert_allclose(points[tag], list(zip(steps, values)), rtol=1e-5)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    spoilt = {"losses/td_loss": torch.tensor(math.nan)}
    monkeypatch.setattr(script, "update", lambda *arguments: dict(spoilt))
    with pytest.raises(script.UsageError, match="not finite"):
        train(script, tmp_path, **FEW)


@pytest.mark.parametrize("env_id, values", [
    ("TruncatesCounting-v0", {1: 1 / (1 - 0.8)}),
    ("TerminatesCounting-v0", {1: 1 + 0.8 + 0.8**2, 0: 1 + 0.8, -1: 1}),
])  # fmt: skip
def test_a_time_limit_is_not_the_end_of_the_world(tmp_path, env_id, values):
    """Truncated for ever, a reward of 1 is worth 1 / (1 - gamma). Else it counts to the end.

    All quantiles learn it, as nothing is left to chance.
    """
    flags = {"env_id": env_id, "gamma": 0.8, "total_timesteps": 3000, "train_frequency": 3}
    flags |= {"autotune": False, "alpha": 0.0, "tau": 0.05, "learning_rate": 3e-3}
    state, _ = train(script, tmp_path, **FEW | flags)
    agent = make_agent(obs_size=1)
    agent.load_state_dict(state["network"] | {"low": agent.low, "high": agent.high})
    for obs, value in values.items():
        found = agent.critics(torch.full((50, 1), float(obs)), 2 * torch.rand(50, 2) - 1).detach()
        means = found.mean(0)  # the reward is the same for all actions; single ones are noisy
        torch.testing.assert_close(means, torch.full((3, 5), float(value)), rtol=0.05, atol=0.1)


def test_the_least_settings_are_allowed():
    script.Args(learning_starts=16, batch_size=16, buffer_size=16, total_timesteps=17, alpha=0.0)
    for change in ({"learning_starts": 15}, {"buffer_size": 15}, {"total_timesteps": 16}):
        with pytest.raises(ValueError, match="--" + next(iter(change)).replace("_", "-")):
            least = {"learning_starts": 16, "buffer_size": 16, "total_timesteps": 17}
            script.Args(**{"batch_size": 16} | least | change)
    script.Args(num_critics=1, num_quantiles=1, num_dropped=0)
    script.Args(num_quantiles=3, num_dropped=2)
    with pytest.raises(ValueError, match="--num-dropped"):
        script.Args(num_quantiles=3, num_dropped=3)


def test_every_setting_of_the_algorithm_changes_the_outcome(tmp_path):
    def outcome(**settings):
        few = FEW | {"total_timesteps": 250, "autotune": False}
        state, _ = train(script, tmp_path, **few | settings)
        return [weights.tolist() for weights in state["network"].values()]

    check_settings(script, outcome, {
        "seed": 2, "total_timesteps": 260, "num_envs": 4, "learning_rate": 5e-3, "buffer_size": 100,
        "gamma": 0.9, "tau": 0.5, "batch_size": 15, "learning_starts": 100, "train_frequency": 5,
        "gradient_steps": 2, "hidden_size": 15, "num_critics": 2, "num_quantiles": 6,
        "num_dropped": 1, "autotune": True, "alpha": 0.5,
    })  # fmt: skip
