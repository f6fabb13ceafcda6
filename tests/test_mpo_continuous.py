"""The mathematics of mpo_continuous.py: by brute force, by loops, against torch.distributions.

What other scripts have word for word, as the replay buffer, is tested there.
"""

import inspect
import itertools
import math
from types import SimpleNamespace

import ddpg_continuous
import gymnasium as gym
import mpo_continuous as script
import numpy as np
import pytest
import sac_continuous
import td3_continuous
import torch
from diary import Diary, Pays, check_episodes, check_settings, recorded, side_by_side, train
from gymnasium.spaces import Box
from torch import nn
from torch.distributions import (
    Independent, Normal, TanhTransform, TransformedDistribution, kl_divergence,
)  # fmt: skip

# For the tests that all scripts share.
TINY = (
    "--total-timesteps 1000 --num-envs 2 --learning-starts 100 --buffer-size 700 --batch-size 32 "
    "--hidden-size 32 --num-samples 5 --train-frequency 4 --gradient-steps 2 "
    "--checkpoint-frequency 250 --eval-frequency 350 --eval-episodes 5 --precision bfloat16"
)
OWN = "continuous"
OWN_FLAGS = "--total-timesteps 3000 --hidden-size 32 --batch-size 64"
WRONG_SPACES = ["CartPole-v1", "cases:HugeBounds-v0"]
DIVERGES = "--learning-rate 1e30"
BAD = [
    ("--num-samples 1", "--num-samples"),
    ("--epsilon 3", "--num-samples"),
    ("--epsilon 0", "--epsilon"),
    ("--epsilon-mean 0", "--epsilon-mean"),
    ("--epsilon-std -1", "--epsilon-std"),
    ("--dual-learning-rate 0", "--dual-learning-rate"),
    ("--learning-starts 100", "--batch-size"),
    ("--tau nan", "--tau"),
]
LEARNS = [  # always the middle: 0
    ("--env-id cases:Aim-v0 --total-timesteps 5000 --hidden-size 64 --tau 0.02", 6)
]


@pytest.mark.parametrize("other, names", [
    (sac_continuous, [
        "make_env", "Bfloat16Linear", "mlp", "use_bfloat16", "Actor", "act", "to_bounds", "Batch",
        "ReplayBuffer", "play",
    ]),
    (ddpg_continuous, ["Critic", "make_network"]), (td3_continuous, ["update_target"]),
])  # fmt: skip
def test_what_others_have_too_is_tested_there(other, names):
    for name in names:
        ours, theirs = (inspect.getsource(getattr(module, name)) for module in (script, other))
        assert ours == theirs, name


def make_agent(obs_size=2, low=(-2, 0), high=(2, 10), hidden_size=16, seed=0):
    torch.manual_seed(seed)
    return script.Agent(obs_size, np.float32(low), np.float32(high), hidden_size)


# ---- The policy ----------------------------------------------------------------------------------


def test_the_actor_is_the_policy_also_after_an_update():
    """And the evaluation plays the squashed means."""
    agent, obs = make_agent(), 3 * torch.randn(50, 2)
    actor = script.Actor(agent)
    for _ in range(2):
        noise = torch.randn(50, 2)
        means, log_std = agent(obs)
        expected = (means + log_std.exp() * noise).tanh().detach()
        found = script.act(actor, obs.numpy(), noise.numpy())
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
        played = script.play(script.Args(), agent, obs.numpy())
        expected = means.detach().tanh() * torch.tensor([2, 5]) + torch.tensor([0, 5])
        np.testing.assert_allclose(played, expected, rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            for weights in agent.parameters():
                weights += 0.3 * torch.randn_like(weights)


def test_means_come_first_and_deviations_have_bounds():
    agent = make_agent()
    agent.actor[-1].weight.data.zero_()
    agent.actor[-1].bias.data[:] = torch.tensor([1.0, 2.0, -50.0, 50.0])
    means, log_std = agent(torch.zeros(1, 2))
    assert means.tolist() == [[1, 2]] and log_std.tolist() == [[-20, 2]]


def test_hidden_size_is_the_width_of_both_layers_of_two_networks():
    agent = make_agent(obs_size=3, hidden_size=8)
    for network, inputs, outputs in (agent.actor, 3, 4), (agent.critic.network, 5, 1):
        shapes = [tuple(weights.shape) for weights in network.parameters()]
        assert shapes == [(8, inputs), (8,), (8, 8), (8,), (outputs, 8), (outputs,)]
        assert sum(isinstance(part, nn.ReLU) for part in network) == 2


def test_bfloat16_is_for_the_product_between_the_hidden_layers_only():
    box, found = Box(-1, 1, (2,)), {}
    envs = SimpleNamespace(action_space=box, obs=np.zeros((1, 3), np.float32))
    for precision in ("float32", "bfloat16"):
        agent = script.make_network(script.Args(precision=precision), envs)
        parts = dict(agent.named_modules()).items()
        found[precision] = {name for name, part in parts if isinstance(part, script.Bfloat16Linear)}
        assert {weight.dtype for weight in agent.parameters()} == {torch.float32}
    assert found == {"float32": set(), "bfloat16": {"actor.2", "critic.network.2"}}


# ---- The E-step ----------------------------------------------------------------------------------


def random_values(scale=1.0, samples=20, states=7):
    """Values of `samples` actions in each state, in float64: states differ in level and spread."""
    torch.manual_seed(0)
    spread = torch.linspace(0.2, 2, states)
    levels = torch.linspace(-90, 50, states)
    return scale * (levels + spread * torch.randn(samples, states)).double()


def mean_kl(weights):
    """KL of the weights from equal ones, in a double loop, mean over the states."""
    samples, states = weights.shape
    total = 0.0
    for j in range(states):
        for weight in weights[:, j].tolist():
            total += weight * math.log(weight * samples) if weight > 0 else 0.0
    return total / states


def minimum(q_values, epsilon):
    """(eta, g(eta)) where g is least, on a grid that is made finer about its best point."""
    low, high = (math.log(q_values.std().item()) + bound for bound in (-12, 12))
    for _ in range(8):
        grid = torch.linspace(low, high, 41).double().exp()
        values = torch.stack([script.temperature_loss(q_values, eta, epsilon) for eta in grid])
        best, width = grid[values.argmin()].log().item(), (high - low) / 20
        low, high = best - width, best + width
    return math.exp(best), values.min().item()


def test_weights_by_hand():
    """Twice as good, in units of eta * log 2, is twice as heavy. Each state by itself."""
    eta = torch.tensor(0.5)
    q_values = torch.tensor([[0.0, 7.0], [math.log(2), 7.0], [0.5 * math.log(2), 7.0]])
    found = script.action_weights(q_values, eta)
    third = 1 / 3
    expected = [[1 / (1 + 4 + 2), third], [4 / 7, third], [2 / 7, third]]
    torch.testing.assert_close(found, torch.tensor(expected))


@pytest.mark.parametrize("eta", [0.3, 5.0, 200.0])
def test_the_dual_by_a_double_loop(eta):
    q_values, total = random_values(), 0.0
    for state in q_values.T.tolist():
        total += math.log(sum(math.exp(value / eta) for value in state) / len(state))
    expected = eta * 0.1 + eta * total / 7
    found = script.temperature_loss(q_values, torch.tensor(eta), 0.1)
    assert found.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("epsilon", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_where_the_dual_is_least_the_weights_differ_by_epsilon(epsilon, scale):
    """The scale of the rewards is that of eta, and changes nothing else."""
    q_values = random_values(scale)
    eta, _ = minimum(q_values, epsilon)
    weights = script.action_weights(q_values, torch.tensor(eta).double())
    assert mean_kl(weights) == pytest.approx(epsilon, rel=1e-4)
    alone, _ = minimum(random_values(), epsilon)
    assert eta == pytest.approx(scale * alone, rel=1e-4)


def test_the_dual_is_the_best_mean_value_within_the_limit():
    """Over all weights of three actions, on a fine grid (2018, equation 7)."""
    values, best, heaviest, epsilon = [1.0, 3.0, 2.5], -math.inf, None, 0.2
    for i, j in itertools.product(range(1, 400), repeat=2):
        weights = [i / 400, j / 400, (400 - i - j) / 400]
        if i + j < 400 and sum(w * math.log(3 * w) for w in weights) <= epsilon:
            value = sum(w * q for w, q in zip(weights, values))
            best, heaviest = max((best, heaviest), (value, weights))
    q_values = torch.tensor([values]).double().T
    eta, least = minimum(q_values, epsilon)
    assert least == pytest.approx(best, abs=0.01) and least >= best
    found = script.action_weights(q_values, torch.tensor(eta).double())[:, 0]
    np.testing.assert_allclose(found, heaviest, atol=0.03)


@pytest.mark.parametrize("eta", [0.05, 0.7, 30.0])
def test_the_slope_of_the_dual_is_epsilon_less_the_divergence(eta):
    q_values = random_values()
    eta = torch.tensor(eta).double().requires_grad_()
    script.temperature_loss(q_values, eta, 0.1).backward()
    weights = script.action_weights(q_values, eta.detach())
    assert eta.grad.item() == pytest.approx(0.1 - mean_kl(weights), abs=1e-8)
    h = 1e-5 * eta.item()
    below, above = (
        script.temperature_loss(q_values, eta.detach() + d, 0.1).item() for d in (-h, h)
    )
    assert eta.grad.item() == pytest.approx((above - below) / (2 * h), abs=1e-4)


def test_weights_and_dual_are_finite_for_large_values():
    """A level that all actions share moves the dual by itself, and no weight."""
    q_values, eta = random_values(), torch.tensor(0.01).double()
    moved, low = q_values + 1e6, script.temperature_loss(q_values, eta, 0.1)
    weights = [script.action_weights(values, eta) for values in (q_values, moved)]
    torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-7)
    assert (script.temperature_loss(moved, eta, 0.1) - low).item() == pytest.approx(1e6)


# ---- The M-step ----------------------------------------------------------------------------------


def random_policies(states=6, numbers=2):
    """Means and log standard deviations of a policy, and of an older one: four of (B, K)."""
    torch.manual_seed(0)
    means, log_std, old_means, old_log_std = torch.randn(4, states, numbers).double() / 2
    return means, log_std, old_means, old_log_std


def test_log_density_is_that_of_a_normal_distribution():
    means, log_std, *_ = random_policies()
    samples = torch.randn(5, 6, 2).double()
    expected = Independent(Normal(means, log_std.exp()), 1).log_prob(samples)
    torch.testing.assert_close(script.log_density(samples, means, log_std), expected)


def test_log_density_before_tanh_has_the_gradient_of_the_one_after_it():
    samples, found = torch.randn(5, 6, 2).double(), []
    for squashed in (False, True):
        means, log_std = (part.requires_grad_() for part in random_policies()[:2])
        normal = Independent(Normal(means, log_std.exp()), 1)
        policy = TransformedDistribution(normal, TanhTransform(cache_size=1))
        plain = script.log_density(samples, means, log_std)
        log_probs = policy.log_prob(samples.tanh()) if squashed else plain
        found.append(torch.autograd.grad(log_probs.sum(), (means, log_std)))
    torch.testing.assert_close(*found)


def test_the_gradient_of_the_policy_loss_is_that_of_a_double_loop():
    """By hand: d log N / d mean = (a - mean) / variance, d / d log std = distance^2 - 1. Each
    part of the policy learns beside the other part of the old one.
    """
    means, log_std, old_means, old_log_std = random_policies()
    samples = torch.randn(4, 6, 2).double()
    weights = torch.rand(4, 6).double().softmax(0)
    for part in (means, log_std):
        part.requires_grad_()
    loss = script.policy_loss(samples, weights, means, log_std, old_means, old_log_std)
    loss.backward()
    expected, mean_slopes, std_slopes = 0.0, torch.zeros(6, 2), torch.zeros(6, 2)
    for i, j, k in itertools.product(range(4), range(6), range(2)):
        a, w = samples[i, j, k].item(), weights[i, j].item()
        mean, old_mean = means[j, k].item(), old_means[j, k].item()
        std, old_std = math.exp(log_std[j, k].item()), math.exp(old_log_std[j, k].item())
        for m, s in (mean, old_std), (old_mean, std):
            density = math.exp(-(((a - m) / s) ** 2) / 2) / (s * math.sqrt(2 * math.pi))
            expected -= w * math.log(density) / 6
        mean_slopes[j, k] -= w * (a - mean) / old_std**2 / 6
        std_slopes[j, k] -= w * (((a - old_mean) / std) ** 2 - 1) / 6
    assert loss.item() == pytest.approx(expected)
    torch.testing.assert_close(means.grad.float(), mean_slopes)
    torch.testing.assert_close(log_std.grad.float(), std_slopes)


def test_where_the_policy_loss_is_least_mean_and_variance_are_the_weighted_ones():
    """The variance is that around the old mean: so it grows, where good actions are far from it."""
    samples = torch.tensor([-1.0, 0.0, 3.0]).view(3, 1, 1).double()
    weights = torch.tensor([[0.1], [0.2], [0.7]], dtype=torch.float64)
    mean, second = 2.0, 0.1 * 1.5**2 + 0.2 * 0.5**2 + 0.7 * 2.5**2  # around an old mean of 0.5
    means = torch.full((1, 1), mean, dtype=torch.float64, requires_grad=True)
    log_std = torch.full_like(means, math.log(second) / 2, requires_grad=True)
    old = torch.full((1, 1), 0.5).double(), torch.zeros(1, 1).double()
    script.policy_loss(samples, weights, means, log_std, *old).backward()
    assert means.grad.item() == pytest.approx(0, abs=1e-9)
    assert log_std.grad.item() == pytest.approx(0, abs=1e-9)


def divergence(old_means, old_log_std, means, log_std):
    """KL of a policy from the old one, by PyTorch: summed over numbers, mean over states."""
    old, new = Normal(old_means, old_log_std.exp()), Normal(means, log_std.exp())
    return kl_divergence(old, new).sum(1).mean()


def test_divergences_are_those_of_policies_that_changed_in_one_part_only():
    means, log_std, old_means, old_log_std = random_policies()
    expected = divergence(old_means, old_log_std, means, old_log_std)
    torch.testing.assert_close(script.mean_divergence(means, old_means, old_log_std), expected)
    expected = divergence(old_means, old_log_std, old_means, log_std)
    torch.testing.assert_close(script.std_divergence(log_std, old_log_std), expected)


def test_the_sum_of_both_divergences_is_the_whole_one_where_one_of_them_is_zero():
    """Elsewhere it is not: there, the new deviation would be the unit of the means' distance."""
    means, log_std, old_means, old_log_std = random_policies()

    def both(means, log_std):
        parts = script.mean_divergence(means, old_means, old_log_std)
        parts = parts + script.std_divergence(log_std, old_log_std)
        return parts.item(), divergence(old_means, old_log_std, means, log_std).item()

    for changed in (means, old_log_std), (old_means, log_std), (old_means, old_log_std):
        found, expected = both(*changed)
        assert found == pytest.approx(expected, abs=1e-12)
    found, whole = both(means, log_std)
    assert abs(found - whole) > 0.1
    ratios = ((means - old_means) / log_std.exp()).square().sum(1).mean() / 2
    units = script.mean_divergence(means, old_means, old_log_std)
    assert whole == pytest.approx(found + (ratios - units).item())


# ---- The critic, and all together ----------------------------------------------------------------


def test_target_by_hand():
    """The mean over the actions in s'; nothing follows the third, which terminated."""
    next_q = torch.tensor([[1.0, 5.0, 70.0], [3.0, -4.0, 80.0]])
    rewards, terminated = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([False, False, True])
    found = script.td_target(rewards, terminated, next_q, 0.5)
    torch.testing.assert_close(found, torch.tensor([1 + 0.5 * 2, 2 + 0.5 * 0.5, 3]))


def random_batch(size=40, obs_size=2, action_size=2):
    obs, next_obs = torch.randn(2, size, obs_size).double()
    actions = 2 * torch.rand(size, action_size).double() - 1
    return script.Batch(obs, actions, torch.randn(size).double(), next_obs, torch.rand(size) < 0.3)


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_update_goes_down_five_gradients_each_of_the_weights_of_its_own(compile):
    """Separate losses from PyTorch's own distributions, all at the old weights.

    The targets differ from the trained networks. A gradient that is left over is no matter.
    """
    agent, reference, batch = make_agent().double(), make_agent().double(), random_batch()
    target, old = make_agent(seed=1).double(), make_agent(seed=1).double()
    for weights in agent.parameters():
        weights.grad = torch.ones_like(weights)
    eta, alpha_mean, alpha_std = duals = torch.tensor([0.03, 2.0, 5.0]).double()
    agent.log_eta.data = eta.log()
    agent.raw_alphas.data = duals[1:].expm1().log()  # softplus is log(1 + e^x)
    args = script.Args(
        gamma=0.9, tau=0.25, num_samples=6, epsilon=0.2, epsilon_mean=0.04, epsilon_std=0.002,
        compile=compile,
    )  # fmt: skip
    if compile:
        torch.compiler.reset()
        torch._dynamo.config.trace_autograd_ops = True
    optimizer = torch.optim.SGD(agent.parameters(), lr=0.1)
    torch.manual_seed(5)
    metrics = script.update(agent, target, optimizer, batch, args)

    torch.manual_seed(5)
    noise = torch.randn(6, 80, 2)
    sampled = []  # in s, and in s'
    for obs, parts in (batch.obs, noise[:, :40]), (batch.next_obs, noise[:, 40:]):
        old_means, old_log_std = (part.detach() for part in old.actor(obs).split(2, 1))
        samples = [old_means + old_log_std.exp() * part for part in parts]
        inputs = [torch.cat([obs, part.tanh()], 1) for part in samples]
        values = torch.stack([old.critic.network(rows).squeeze(1) for rows in inputs]).detach()
        sampled.append((old_means, old_log_std, samples, values))
    following = torch.where(batch.terminated, 0, 0.9 * sampled[1][-1].mean(0))
    q_values = reference.critic(batch.obs, batch.actions)
    critic_loss = ((q_values - batch.rewards - following) ** 2).mean()
    old_means, old_log_std, samples, values = sampled[0]
    weights = (values / eta).exp() / (values / eta).exp().sum(0)
    means, log_std = reference.actor(batch.obs).split(2, 1)
    policies = Normal(means, old_log_std.exp()), Normal(old_means, log_std.exp())
    likelihoods, divergences = [], []
    for policy in policies:
        log_probs = torch.stack([policy.log_prob(part).sum(1) for part in samples])
        likelihoods.append((weights * log_probs).sum(0).mean())
        divergences.append(
            kl_divergence(Normal(old_means, old_log_std.exp()), policy).sum(1).mean()
        )
    (first, second), policy_value = divergences, sum(likelihoods)
    actor_loss = -policy_value + alpha_mean * first + alpha_std * second
    assert first > 0.04 and second > 0.002 and 0.02 < mean_kl(weights) < 1

    expected = {}
    for name, loss in ("critic", critic_loss), ("actor", actor_loss):
        parts = dict(reference.get_submodule(name).named_parameters())
        gradients = torch.autograd.grad(loss, parts.values())
        for part, gradient in zip(parts, gradients):
            expected[f"{name}.{part}"] = parts[part] - 0.1 * gradient
    expected["log_eta"] = eta.log() - 0.1 * eta * (0.2 - mean_kl(weights))
    slopes = torch.stack([0.04 - first, 0.002 - second]).detach()
    slopes = slopes * (1 - (-duals[1:]).exp())  # of softplus
    expected["raw_alphas"] = duals[1:].expm1().log() - 0.1 * slopes
    found = dict(agent.named_parameters())
    assert expected.keys() == found.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])
    for before, after, source in zip(old.parameters(), target.parameters(), agent.parameters()):
        torch.testing.assert_close(after, 0.75 * before + 0.25 * source)
    values = {
        "losses/td_loss": critic_loss, "losses/q_values": q_values.mean(),
        "losses/policy_loss": -policy_value, "losses/temperature": eta,
        "losses/kl_mean": first, "losses/kl_std": second, "losses/alpha_mean": alpha_mean,
        "losses/alpha_std": alpha_std,
    }  # fmt: skip
    for tag, value in metrics.items():
        assert value.item() == pytest.approx(values.pop(tag).item(), rel=1e-5), tag
        assert not value.requires_grad
    assert not values


def test_where_all_actions_are_equally_good_eta_is_never_0():
    """There, log eta falls for ever: the weights stay equal, and no weight becomes infinite."""
    agent, target, batch = make_agent().double(), make_agent().double(), random_batch()
    with torch.no_grad():
        agent.log_eta.fill_(-1000.0)
        target.critic.network[-1].weight.zero_()
    optimizer = torch.optim.SGD(agent.parameters(), lr=0.1)
    script.update(agent, target, optimizer, batch, script.Args(num_samples=6))
    assert all(weights.isfinite().all() for weights in agent.parameters())


@pytest.mark.parametrize("epsilon_mean, epsilon_std", [(1e-6, 1e6), (1e6, 1e-6)])
def test_a_multiplier_grows_where_its_limit_is_passed_and_falls_where_not(
    epsilon_mean, epsilon_std
):
    """The first step of Adam is as long as its learning rate, whatever the gradient."""
    agent, target = make_agent(), make_agent(seed=1)
    args = script.Args(epsilon_mean=epsilon_mean, epsilon_std=epsilon_std, dual_learning_rate=0.03)
    batch = script.Batch(*(p if p.dtype == torch.bool else p.float() for p in random_batch()))
    script.update(agent, target, script.make_optimizer(args, agent), batch, args)
    sign = 1 if epsilon_mean < epsilon_std else -1
    expected = pytest.approx([0.03 * sign, -0.03 * sign], rel=1e-3)
    assert agent.raw_alphas.tolist() == expected


def test_networks_and_duals_have_learning_rates_of_their_own():
    agent = make_agent()
    args = script.Args(learning_rate=0.5, dual_learning_rate=0.25)
    found = {}
    for group in script.make_optimizer(args, agent).param_groups:
        found |= {id(weights): group["lr"] for weights in group["params"]}
    assert len(found) == len(list(agent.parameters()))
    for name, weights in agent.named_parameters():
        assert found[id(weights)] == (0.25 if name in ("log_eta", "raw_alphas") else 0.5), name


def test_the_policy_finds_the_best_action_at_the_pace_of_its_limits():
    """For Q = -10 (a - 0.3)^2 in one state. On the way, the mean is as far ahead of the old one as
    it may be; then the deviation is. eta makes the weights differ by epsilon.
    """
    agent, target = (make_agent(obs_size=1, low=[-1], high=[1], hidden_size=32) for _ in range(2))
    agent.actor[-1].bias.data -= 1
    target.load_state_dict(agent.state_dict())
    limits = {"epsilon": 0.15, "epsilon_mean": 0.03, "epsilon_std": 1e-3}
    args = script.Args(gamma=0.0, tau=0.05, learning_rate=3e-3, dual_learning_rate=0.3, **limits)
    optimizer, found, zeros = script.make_optimizer(args, agent), [], torch.zeros(64, 1)
    for _ in range(500):
        actions = 2 * torch.rand(64, 1) - 1
        rewards = -10 * (actions - 0.3).square().squeeze(1)
        batch = script.Batch(zeros, actions, rewards, zeros, torch.ones(64, dtype=torch.bool))
        found.append(script.update(agent, target, optimizer, batch, args))
    kl_mean, kl_std = (
        [step[f"losses/kl_{part}"].item() for step in found] for part in ("mean", "std")
    )
    means, log_std = agent(zeros)
    rows = torch.zeros(20_000, 1), (means[0] + log_std[0].exp() * torch.randn(20_000, 1)).tanh()
    q_values, eta = agent.critic(*rows).view(20, 1000).double(), agent.log_eta.exp()
    kl_weights = mean_kl(script.action_weights(q_values, eta).detach())
    assert np.mean(kl_mean[100:250]) == pytest.approx(0.03, rel=0.2)
    assert np.mean(kl_mean[-100:]) < 0.003
    assert np.mean(kl_std[-100:]) == pytest.approx(1e-3, rel=0.2)
    assert kl_weights == pytest.approx(0.15, rel=0.3)
    assert means[0].tanh().item() == pytest.approx(0.3, abs=0.07) and log_std[0].item() < -1.3


# ---- The loop ------------------------------------------------------------------------------------


class PaysContinuously(Pays):
    action_space = Box(-1, 1, (2,), np.float32)


gym.register("TruncatesWeighted-v0", entry_point=PaysContinuously, kwargs={"truncates": True})
gym.register("TerminatesWeighted-v0", entry_point=PaysContinuously, kwargs={"truncates": False})

FEW = dict(
    env_id="ContinuousDiary-v0", total_timesteps=1200, num_envs=3, learning_starts=50,
    batch_size=16, buffer_size=1000, hidden_size=16, num_samples=4, train_frequency=12,
    eval_episodes=3, learning_rate=1e-2,
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
        if tuple(obs) in drawn:
            continue
        expected_action, *expected, i = happened[tuple(obs)]
        np.testing.assert_allclose(scaled(action), expected_action, rtol=1e-5, atol=1e-5)
        assert found[1:] == expected[1:] and found[0] == pytest.approx(expected[0], rel=1e-6)
        drawn.add(tuple(obs))
    assert len(drawn) == 1200 if size == 5000 else 150 < len(drawn) < 250
    newest = [tuple(env.steps[-1][0]) for env in Diary.made[:num_envs]]
    assert drawn.issuperset(newest)
    check_episodes(points, side_by_side(num_envs))


@pytest.mark.parametrize("num_envs, train_frequency, gradient_steps, learning_starts", [
    (1, 7, 3, 50), (4, 10, 1, 50), (3, 5, 2, 50), (8, 4, 1, 101), (4, 1, 1, 300),
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

    def note_update(agent, target_agent, optimizer, batch, args):
        networks.add((agent, target_agent))
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
    ((agent, target_agent),) = networks
    pointers = {weights.data_ptr() for weights in agent.parameters()}
    assert pointers.isdisjoint(weights.data_ptr() for weights in target_agent.parameters())


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
    """Each number with noise of its own; in the evaluation none, by the network that is saved."""
    acts = recorded(monkeypatch, script, "act")
    state, _ = train(script, tmp_path, **FEW | {"total_timesteps": 1800, "train_frequency": 30})
    chosen, noises = {}, []
    for (_, obs, *noise), actions in acts:
        chosen |= {tuple(row): scaled(action) for row, action in zip(obs.tolist(), actions)}
        noises += noise
    for i, env in enumerate(Diary.made):
        for obs, action, *_ in env.steps[17 * (i < 3) :]:  # 51 random steps of the first three
            np.testing.assert_allclose(action, chosen[tuple(obs)], rtol=1e-4, atol=1e-5)
    noises = np.stack(noises).reshape(-1, 6)  # 583 rounds, of 3 environments with 2 numbers each
    assert len(np.unique(noises)) == noises.size == 583 * 6
    np.testing.assert_allclose(noises.std(0), 1, rtol=0.12)  # 4 standard errors
    assert abs(noises.mean(0)).max() < 0.17
    assert abs(np.corrcoef(noises.T) - np.eye(6)).max() < 0.17
    agent = make_agent()
    agent.load_state_dict(state["network"])
    obs, actions, *_ = zip(*(step for env in Diary.made[3:] for step in env.steps))
    played = script.play(script.Args(), agent, np.float32(obs))
    np.testing.assert_allclose(actions, played, rtol=1e-4, atol=1e-5)


def test_at_the_start_the_target_networks_are_the_trained_ones(tmp_path):
    never = {"train_frequency": 1000, "total_timesteps": 100, "seed": 3}
    state, _ = train(script, tmp_path, **FEW | never)
    first = make_agent(seed=3).state_dict()
    for name, weights in first.items():
        assert torch.equal(weights, state["network"][name])
        assert torch.equal(weights, state["target_agent"][name])


def test_losses_are_logged_every_1000_steps(tmp_path, monkeypatch):
    """Rounds of 3 steps: what is due at 1000 is logged at the end of its round, 1002."""
    metrics, update = [], script.update
    monkeypatch.setattr(script, "update", lambda *a: metrics.append(update(*a)) or metrics[-1])
    _, points = train(script, tmp_path, **FEW | {"total_timesteps": 3003, "train_frequency": 50})
    steps = (1002, 2001, 3000)  # the first update is at step 50
    for tag in metrics[0]:
        values = [metrics[step // 50 - 1][tag].item() for step in steps]
        np.testing.assert_allclose(points[tag], list(zip(steps, values)), rtol=1e-5)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    spoilt = {"losses/td_loss": torch.tensor(math.nan)}
    monkeypatch.setattr(script, "update", lambda *arguments: dict(spoilt))
    with pytest.raises(script.UsageError, match="not finite"):
        train(script, tmp_path, **FEW)


@pytest.mark.parametrize("env_id, value", [
    ("TruncatesWeighted-v0", 1 / (1 - 0.8)), ("TerminatesWeighted-v0", 1 / (1 - 0.8 * 2 / 3))
])  # fmt: skip
def test_a_time_limit_is_not_the_end_of_the_world(tmp_path, env_id, value):
    """Truncated for ever, a reward of 1 is worth 1 / (1 - gamma).

    If every third step terminates, which the only state cannot foresee, v = 1 + 2/3 * gamma * v.
    """
    flags = {"env_id": env_id, "gamma": 0.8, "total_timesteps": 2000, "train_frequency": 4}
    flags |= {"tau": 0.1, "learning_rate": 3e-3}
    state, _ = train(script, tmp_path, **FEW | flags)
    agent = make_agent(obs_size=1)
    agent.load_state_dict(state["network"] | {"low": agent.low, "high": agent.high})
    found = agent.critic(torch.ones(50, 1), 2 * torch.rand(50, 2) - 1).detach()
    torch.testing.assert_close(found.mean(-1), torch.full((), value), rtol=0.08, atol=0)


def test_the_least_settings_are_allowed():
    least = {"learning_starts": 16, "batch_size": 16, "buffer_size": 16, "total_timesteps": 17}
    script.Args(**least, num_samples=2, epsilon=0.69)
    for change in ({"learning_starts": 15}, {"buffer_size": 15}, {"total_timesteps": 16}):
        with pytest.raises(ValueError, match="--" + next(iter(change)).replace("_", "-")):
            script.Args(**least | change)
    with pytest.raises(ValueError, match="--num-samples"):  # log 2 is 0.693
        script.Args(num_samples=2, epsilon=0.7)


def test_every_setting_of_the_algorithm_changes_the_outcome(tmp_path):
    def outcome(**settings):
        state, _ = train(script, tmp_path, **FEW | {"total_timesteps": 120} | settings)
        return [weights.tolist() for weights in state["network"].values()]

    check_settings(script, outcome, {
        "seed": 2, "total_timesteps": 130, "num_envs": 4, "learning_rate": 5e-3, "buffer_size": 60,
        "gamma": 0.9, "tau": 0.5, "batch_size": 15, "learning_starts": 80, "train_frequency": 5,
        "gradient_steps": 2, "hidden_size": 15, "num_samples": 5,
        "epsilon": 0.2, "epsilon_mean": 0.1, "epsilon_std": 1e-4, "dual_learning_rate": 2e-2,
    })  # fmt: skip
