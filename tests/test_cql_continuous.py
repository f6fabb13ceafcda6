"""The mathematics of cql_continuous.py: by integration, in closed form, by hand; and its loop.

What sac_continuous.py and iql_continuous.py have word for word, as policy and data, they test.
"""

import inspect
import math

import cql_continuous as script
import gymnasium as gym
import iql_continuous
import numpy as np
import pytest
import sac_continuous
import torch
from diary import Pays, check_settings, recorded, train
from gymnasium.spaces import Box
from torch import nn
from torch.distributions import Independent, Normal, TanhTransform, TransformedDistribution

# For the tests that all scripts share.
TINY = (
    "--total-timesteps 600 --num-envs 2 --dataset-size 700 --batch-size 16 --hidden-size 16 "
    "--num-actions 2 --target-gap 0.5 --checkpoint-frequency 150 --eval-frequency 210 "
    "--eval-episodes 5"
)
OWN = "continuous"
OWN_FLAGS = (
    "--total-timesteps 600 --dataset-size 3000 --hidden-size 32 --batch-size 64 --num-actions 2 "
    "--learning-rate 3e-3 --cql-weight 0.1"
)
WRONG_SPACES = ["CartPole-v1", "cases:HugeBounds-v0"]
DIVERGES = "--learning-rate 1e30"
BAD = [
    ("--precision float16", "--precision"),
    ("--cql-weight -1", "--cql-weight"),
    ("--target-gap nan", "--target-gap"),
    ("--cql-weight 0 --target-gap 1", "--cql-weight"),
    ("--num-actions 0", "--num-actions"),
    ("--alpha -0.1", "--alpha"),
    ("--dataset-size 0", "--dataset-size"),
    ("--dataset nowhere", "nowhere"),
    ("--dataset cql_continuous.py", "cql_continuous.py"),
]
PLAYS = False  # while it trains: its data are recorded
LEARNS = [
    ("--env-id cases:Aim-v0 --total-timesteps 1200 --dataset-size 5000 --hidden-size 64 "
     "--batch-size 64 --num-actions 2 --learning-rate 3e-3 --cql-weight 0.1", 8),
]  # fmt: skip

OF_SAC = [
    "Critics", "Bfloat16Linear", "mlp", "to_bounds", "make_env", "use_bfloat16", "make_network",
    "sample_actions", "policy_loss", "temperature_loss", "update_target", "Batch", "evaluate",
    "Envs",
]  # fmt: skip
OF_IQL = ["random_play", "read_dataset", "read_run", "read_arrays"]


@pytest.mark.parametrize(
    "name, other",
    [(name, sac_continuous) for name in OF_SAC] + [(name, iql_continuous) for name in OF_IQL],
)
def test_what_others_have_too_is_the_same_and_tested_there(name, other):
    ours, theirs = (inspect.getsource(getattr(s, name)) for s in (script, other))
    assert ours == theirs


# ---- draw_actions, log_integral ------------------------------------------------------------------


def squashed(means, log_std):
    """The distribution of an action in (-1, 1), PyTorch's own."""
    normal = Independent(Normal(means, log_std.exp()), 1)
    return TransformedDistribution(normal, TanhTransform(cache_size=1))


def test_actions_are_drawn_in_three_ways_each_with_its_density():
    """4 of each way in 5 states, with 2 numbers. A density is that after tanh."""
    torch.manual_seed(0)
    policies = [tuple(torch.randn(2, 5, 2).double() / 2) for _ in range(2)]
    noise, uniform = torch.randn(8, 5, 2).double(), 2 * torch.rand(4, 5, 2).double() - 1
    actions, log_densities = script.draw_actions(policies, noise, uniform)
    assert actions.shape == (12, 5, 2) and log_densities.shape == (12, 5)
    assert torch.equal(actions[:4], uniform)
    torch.testing.assert_close(log_densities[:4].exp(), torch.full((4, 5), 1 / 4).double())
    for i in range(8):
        for state in range(5):
            means, log_std = (part[state] for part in policies[i // 4])
            expected = (means + log_std.exp() * noise[i, state]).tanh()
            torch.testing.assert_close(actions[4 + i, state], expected)
            density = squashed(means, log_std).log_prob(expected)
            torch.testing.assert_close(log_densities[4 + i, state], density)


def test_draws_are_constants_only_if_the_policy_is():
    """So it is for compute_gradient to see to it."""
    means = torch.zeros(3, 1, requires_grad=True)
    drawn = [(means, means)], torch.randn(2, 3, 1), torch.zeros(2, 3, 1)
    assert all(part.requires_grad for part in script.draw_actions(*drawn))
    with torch.no_grad():
        assert not any(part.requires_grad for part in script.draw_actions(*drawn))


# Q in two states by actions of one number, and the log of the integral of e^Q: that of e^(b a + c)
# is (e^b - e^-b) e^c / b, that of a Gaussian the difference of two error functions.
CURVES = [
    (lambda a: 3 * a - 1, lambda a: -2 * a),
    (lambda a: -10 * (a - 0.3) ** 2 + 4, lambda a: 0 * a - 50),
]
EXACT = [
    [math.log((math.exp(b) - math.exp(-b)) / b) + c for b, c in ((3, -1), (-2, 0))],
    [4 + math.log(math.sqrt(math.pi / 10) * (math.erf(0.7 * math.sqrt(10)) / 2
                                             + math.erf(1.3 * math.sqrt(10)) / 2)),
     -50 + math.log(2)],
]  # fmt: skip


def on_a_grid(curve, count=200_000):
    """log of the integral of e^Q over (-1, 1), by the midpoint rule."""
    actions = (torch.arange(count).double() + 0.5) * (2 / count) - 1
    return math.log(curve(actions).exp().sum().item() * 2 / count)


def draw(count, means=((0.2,), (-0.4,)), seed=0):
    """`count` of each kind, in two states, from wide policies, which differ."""
    torch.manual_seed(seed)
    means = torch.tensor(means).double()
    policies = [(means, torch.full_like(means, 0.1)), (-means, torch.full_like(means, -0.1))]
    size = means.shape[1]
    noise = torch.randn(2 * count, 2, size).double()
    return script.draw_actions(policies, noise, 2 * torch.rand(count, 2, size).double() - 1)


def q_of(actions):
    """(M, 2, 1) -> (2, M, 2)."""
    rows = [[curve(actions[:, s, 0]) for s, curve in enumerate(curves)] for curves in CURVES]
    return torch.stack([torch.stack(columns, 1) for columns in rows])


def test_the_integral_against_closed_forms_and_a_grid():
    """All kinds of actions together, and each alone: they estimate the same. Two critics differ."""
    count = 40_000
    actions, log_densities = draw(count)
    q_values = q_of(actions)
    exact = torch.tensor(EXACT).double()
    for k in range(2):
        for state in range(2):
            assert on_a_grid(CURVES[k][state]) == pytest.approx(EXACT[k][state], abs=1e-6)
    found = script.log_integral(q_values, log_densities)
    torch.testing.assert_close(found, exact, rtol=0, atol=0.02)
    for first in range(0, 3 * count, count):
        part = slice(first, first + count)
        found = script.log_integral(q_values[:, part], log_densities[part])
        torch.testing.assert_close(found, exact, rtol=0, atol=0.03)
    # What many copies do instead is far off: no densities, of the wrong sign, before tanh.
    before_tanh = log_densities.clone()
    before_tanh[count:] += (1 - actions[count:, :, 0] ** 2).log()
    for wrong in (torch.zeros_like(log_densities), -log_densities, before_tanh):
        assert (script.log_integral(q_values, wrong) - exact).abs().min() > 0.1


def test_the_integral_over_two_numbers():
    """Of e^(3 a_1 - a_2): the product of two integrals. The range of actions has the area 4."""
    actions, log_densities = draw(40_000, ((0.2, 0.0), (-0.4, 0.3)))
    q_values = torch.stack([3 * actions[..., 0] - actions[..., 1], 0 * actions[..., 0]])
    linear = math.log((math.exp(3) - math.exp(-3)) / 3 * (math.exp(1) - math.exp(-1)))
    expected = torch.tensor([[linear] * 2, [math.log(4)] * 2]).double()
    found = script.log_integral(q_values, log_densities)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.03)


def test_the_integral_of_few_actions_by_hand():
    """Of 2 actions in one state, of densities 1/2 and 4: the mean of e^1 * 2 and e^3 / 4."""
    q_values = torch.tensor([[[1.0], [3.0]], [[0.0], [1000.0]]])
    found = script.log_integral(q_values, torch.tensor([[0.5], [4.0]]).log())
    expected = math.log((2 * math.exp(1) + math.exp(3) / 4) / 2)
    assert found.tolist() == [[pytest.approx(expected)], [pytest.approx(1000 - math.log(8))]]


def test_the_slope_of_the_integral_is_the_softmax():
    """Over the actions of a state, with the weights 1 / density."""
    torch.manual_seed(0)
    q_values, log_densities = 3 * torch.randn(2, 6, 5).double(), torch.randn(6, 5).double()
    q_values.requires_grad_()
    script.log_integral(q_values, log_densities).sum().backward()
    weights = (q_values.detach().exp() / log_densities.exp()).numpy()
    np.testing.assert_allclose(q_values.grad, weights / weights.sum(1, keepdims=True))


# ---- td_target, weight_loss ----------------------------------------------------------------------


def test_target_by_hand():
    next_q = torch.tensor([[4.0, 9.0, 7.0], [6.0, 9.0, -2.0]])
    rewards, terminated = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([False, True, False])
    assert script.td_target(rewards, terminated, next_q, 0.5).tolist() == [3.0, 2.0, 2.0]


@pytest.mark.parametrize("gap, target, slope", [(3.0, 2.5, -0.5), (1.0, 2.0, 1.0), (2.0, 2.0, 0)])
def test_the_weight_grows_where_the_gap_is_too_large(gap, target, slope):
    weight = torch.tensor(0.3, requires_grad=True)
    script.weight_loss(weight, torch.tensor(gap), target).backward()
    assert weight.grad.item() == pytest.approx(slope)  # it goes against its gradient


# ---- update --------------------------------------------------------------------------------------

LOW, HIGH = np.float32([-2, 0]), np.float32([2, 10])


def make_agent(obs_size=2, hidden_size=16, seed=0, low=LOW, high=HIGH):
    torch.manual_seed(seed)
    return script.Agent(obs_size, low, high, hidden_size)


def random_batch(size=40):
    obs, next_obs = torch.randn(2, size, 2).double()
    actions = 2 * torch.rand(size, 2).double() - 1
    return script.Batch(obs, actions, torch.randn(size).double(), next_obs, torch.rand(size) < 0.3)


@pytest.mark.parametrize("autotune, target_gap", [(True, None), (False, -0.5)])
@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_update_goes_down_the_gradients_each_of_the_weights_of_its_own(
    autotune, target_gap, compile
):
    """Separate losses, all at the old weights; the integral in a loop over rows and actions.

    The targets differ from the critics. A gradient that is left over is no matter.
    """
    agent, reference, batch = make_agent().double(), make_agent().double(), random_batch()
    targets, old_targets = (make_agent(seed=1).double().critics for _ in range(2))
    for weights in agent.parameters():
        weights.grad = torch.ones_like(weights)
    agent.log_alpha.data.fill_(math.log(0.3))
    agent.log_factor.data.fill_(math.log(0.6))
    args = script.Args(
        gamma=0.9, tau=0.25, alpha=0.7, autotune=autotune, cql_weight=1.5, target_gap=target_gap,
        num_actions=3, compile=compile,
    )  # fmt: skip
    if compile:
        torch.compiler.reset()
        torch._dynamo.config.trace_autograd_ops = True
    optimizer = torch.optim.SGD(agent.parameters(), lr=0.1)
    torch.manual_seed(5)
    metrics = script.update(agent, targets, optimizer, batch, args)

    torch.manual_seed(5)
    noise, uniform = torch.randn(8, 40, 2), torch.empty(3, 40, 2).uniform_(-1, 1)
    alpha, weight = 0.3 if autotune else 0.7, 1.5 * 0.6
    means, log_std = reference.actor(batch.obs).split(2, 1)
    next_means, next_log_std = (x.detach() for x in reference.actor(batch.next_obs).split(2, 1))
    next_actions = (next_means + next_log_std.exp() * noise[0]).tanh()
    inputs = torch.cat([batch.next_obs, next_actions], 1)
    next_values = torch.minimum(*(critic(inputs) for critic in old_targets.networks)).squeeze(1)
    target = torch.where(batch.terminated, batch.rewards, batch.rewards + 0.9 * next_values)
    ways = [squashed(means.detach(), log_std.detach()), squashed(next_means, next_log_std)]
    losses, gaps = [], []
    for critic in reference.critics.networks:
        values = critic(torch.cat([batch.obs, batch.actions], 1)).squeeze(1)
        terms = [4 * critic(torch.cat([batch.obs, row], 1)).exp().squeeze(1) for row in uniform]
        for way, numbers in zip(ways, noise[2:].split(3)):
            for row in numbers:
                actions = (way.base_dist.mean + way.base_dist.stddev * row).tanh()
                q_values = critic(torch.cat([batch.obs, actions], 1)).squeeze(1)
                terms.append(q_values.exp() / way.log_prob(actions).exp())
        gaps.append(((sum(terms) / 9).log() - values).mean())
        losses.append(((values - target.detach()) ** 2).mean() / 2 + weight * gaps[-1])
    policy, (first, second) = squashed(means, log_std), reference.critics.networks
    actions = (means + log_std.exp() * noise[1]).tanh()
    log_probs, inputs = policy.log_prob(actions), torch.cat([batch.obs, actions], 1)
    values = torch.minimum(first(inputs), second(inputs)).squeeze(1)
    losses.append((alpha * log_probs - values).mean())

    expected = {}
    for name, loss in zip(("critics.networks.0", "critics.networks.1", "actor"), losses):
        weights = dict(reference.get_submodule(name).named_parameters())
        gradients = torch.autograd.grad(loss, weights.values(), retain_graph=True)
        for part, gradient in zip(weights, gradients):
            expected[f"{name}.{part}"] = weights[part] - 0.1 * gradient
    log_alpha, log_factor = math.log(0.3), math.log(0.6)
    gap = (gaps[0] + gaps[1]).item() / 2
    if autotune:  # its target is an entropy of -2
        log_alpha -= 0.1 * -0.3 * (log_probs.mean().item() - 2)
    if target_gap is not None:
        log_factor += 0.1 * weight * (gap - target_gap)
    assert agent.log_alpha.item() == pytest.approx(log_alpha)
    assert agent.log_factor.item() == pytest.approx(log_factor)
    found = dict(agent.named_parameters())
    assert expected.keys() == found.keys() - {"log_alpha", "log_factor"}
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], msg=name)
    old = dict(old_targets.named_parameters())
    for name, weights in targets.named_parameters():
        followed = 0.75 * old[name] + 0.25 * found[f"critics.{name}"]
        torch.testing.assert_close(weights, followed)
    q_values = make_agent().double().critics(batch.obs, batch.actions)
    values = {
        "losses/td_loss": (losses[0] + losses[1]).item() - 2 * weight * gap,
        "losses/q_values": q_values.mean().item(), "losses/cql_gap": gap,
        "losses/cql_weight": weight, "losses/policy_loss": losses[2].item(),
        "losses/entropy": -log_probs.mean().item(), "losses/alpha": alpha,
    }  # fmt: skip
    assert {tag: value.item() for tag, value in metrics.items()} == pytest.approx(values, rel=1e-5)
    assert not any(value.requires_grad for value in metrics.values())


class Quarters(nn.Module):
    """Q_1 and Q_2 are tables: of any state, a number for each quarter of (-1, 1)."""

    def __init__(self):
        super().__init__()
        self.tables = nn.Parameter(torch.zeros(2, 4).double())

    def forward(self, obs, actions):
        return self.tables[:, (2 * actions[:, 0] + 2).long().clamp(0, 3)]


class WithTables(nn.Module):
    """pi is wide, around 0.3, and stays."""

    def __init__(self):
        super().__init__()
        self.critics = Quarters()
        self.log_alpha, self.log_factor = (nn.Parameter(torch.zeros(()).double()) for _ in "12")

    def forward(self, obs):
        return torch.full_like(obs, 0.3), torch.zeros_like(obs)


@pytest.mark.parametrize("weight", [0.0, 0.5, 100.0])
def test_what_a_table_learns_is_known(weight):
    """Q = r - w * (density of exp(Q) / density of recorded actions - 1), without what follows.

    This changes no mean over what is recorded. For large w, exp(Q) is the density of that.
    """
    share, pays = np.array([0.4, 0.3, 0.2, 0.1]), np.array([1.0, 0.0, -1.0, 3.0])
    quarters = np.repeat(np.arange(4), [40, 30, 20, 10])
    torch.manual_seed(0)
    actions = torch.tensor((quarters + np.random.default_rng(0).random(100)) / 2 - 1)[:, None]
    zeros, ends = torch.zeros(100, 1).double(), torch.ones(100, dtype=torch.bool)
    batch = script.Batch(zeros, actions, torch.tensor(pays[quarters]), zeros, ends)
    agent, args = WithTables(), script.Args(cql_weight=weight, autotune=False)
    optimizer = torch.optim.SGD(agent.critics.parameters(), lr=2 / (1 + weight))
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.985)
    for _ in range(300):
        optimizer.zero_grad()
        noise, uniform = torch.randn(82, 100, 1).double(), 2 * torch.rand(40, 100, 1).double() - 1
        script.compute_gradient(agent, agent.critics, batch, noise, uniform, args)
        optimizer.step()
        schedule.step()
    for q_values in agent.critics.tables.detach().numpy():
        softmax = np.exp(q_values) / np.exp(q_values).sum()
        np.testing.assert_allclose(q_values, pays - weight * (softmax / share - 1),
                                   atol=0.03 * (1 + weight))  # fmt: skip
        if weight == 100:
            np.testing.assert_allclose(softmax, share, atol=0.03)
        else:
            assert (q_values * share).sum() == pytest.approx((pays * share).sum(), abs=0.02)


def test_the_policy_stays_where_actions_are_recorded_and_its_value_is_lower():
    """In one state, between -0.6 and 0; the larger they are, the more they pay.

    SAC believes that this goes on.
    """
    torch.manual_seed(0)
    actions, zeros = -0.6 * torch.rand(64, 1), torch.zeros(64, 1)
    batch = script.Batch(zeros, actions, 4 * actions[:, 0], zeros, torch.ones(64) == 1)
    found = []
    for weight in (0.0, 1.0):
        agent = make_agent(1, 32, low=np.float32([-1]), high=np.float32([1]))
        optimizer = torch.optim.Adam(agent.parameters(), lr=1e-2)
        args = script.Args(cql_weight=weight, autotune=False, alpha=0.1)
        for _ in range(100):
            metrics = script.update(agent, agent.critics, optimizer, batch, args)
        played = agent(zeros[:1])[0].tanh().detach()
        value = agent.critics(zeros[:1], played).min().item()
        found.append((played.item(), value, metrics["losses/cql_gap"].item()))
    (sac_action, sac_value, sac_gap), (action, value, gap) = found
    assert sac_action > 0.3 and -0.6 < action < 0.1
    assert value < sac_value - 0.3 and gap < sac_gap - 1


def test_the_weight_is_learned_only_towards_a_target():
    """From --cql-weight on, up or down."""
    batch = random_batch()
    batch = script.Batch(*(x.float() if x.is_floating_point() else x for x in batch))
    for weight, target, sign in [(2.0, None, 0), (2.0, 0.1, 1), (2.0, 9.0, -1)]:
        agent = make_agent()
        optimizer = torch.optim.Adam(agent.parameters(), lr=0.1)
        args = script.Args(cql_weight=weight, target_gap=target)
        weights = [
            script.update(agent, agent.critics, optimizer, batch, args)["losses/cql_weight"].item()
            for _ in range(3)
        ]
        expected = weight * np.exp(0.1 * sign * np.arange(3))
        np.testing.assert_allclose(weights, expected, rtol=0.01)


def test_the_weight_stays_finite_where_its_target_is_out_of_reach():
    agent, batch = make_agent(), random_batch()
    agent.log_factor.data.fill_(200.0)
    batch = script.Batch(*(x.float() if x.is_floating_point() else x for x in batch))
    optimizer = torch.optim.SGD(agent.parameters(), lr=0)
    args = script.Args(cql_weight=2.0, target_gap=-50.0)
    metrics = script.update(agent, agent.critics, optimizer, batch, args)
    assert metrics["losses/cql_weight"] == 2e6


# ---- The actor -----------------------------------------------------------------------------------


def test_the_actor_is_the_squashed_mean_also_after_an_update():
    agent, obs = make_agent(), 3 * torch.randn(50, 2)
    actor = script.Actor(agent)
    for _ in range(2):
        expected = agent(obs)[0].detach().tanh().numpy()
        np.testing.assert_allclose(actor(obs.numpy()), expected, rtol=1e-4, atol=1e-5)
        played = script.play(script.Args(), agent, obs.numpy())
        np.testing.assert_allclose(played, LOW + (expected + 1) / 2 * (HIGH - LOW), atol=1e-4)
        assert played.dtype == np.float32
        with torch.no_grad():
            for weights in agent.parameters():
                weights += 0.3 * torch.randn_like(weights)


def test_deviations_have_bounds():
    agent = make_agent()
    agent.actor[-1].weight.data.zero_()
    agent.actor[-1].bias.data[:] = torch.tensor([1.0, 2.0, -50.0, 50.0])
    means, log_std = agent(torch.zeros(1, 2))
    assert means.tolist() == [[1, 2]] and log_std.tolist() == [[-20, 2]]


# ---- The loop ------------------------------------------------------------------------------------

FEW = dict(
    env_id="ContinuousDiary-v0", total_timesteps=300, num_envs=3, dataset_size=400, batch_size=16,
    hidden_size=16, num_actions=2, eval_episodes=3,
)  # fmt: skip


def rows_of(data):
    """Transitions as tuples of floats."""
    columns = [column.reshape(len(column), -1).double().numpy() for column in data]
    return list(map(tuple, np.concatenate(columns, 1).round(4).tolist()))


def test_every_step_is_a_gradient_step_on_rows_of_the_data(tmp_path, monkeypatch):
    """With noise of its own in each step."""
    loaded = recorded(monkeypatch, script, "random_play")
    notes, noises, networks = [], set(), set()
    update, gradient = script.update, script.compute_gradient

    def noting(agent, target_critics, optimizer, batch, args):
        networks.add((agent, target_critics))
        assert target_critics is not agent.critics
        notes.append((rows_of(batch), type(optimizer), optimizer.param_groups[0]["lr"], args.gamma))
        return update(agent, target_critics, optimizer, batch, args)

    def noting_noise(agent, target_critics, batch, noise, uniform, args):
        assert noise.shape == (6, 16, 2) and uniform.shape == (2, 16, 2)
        rows = [tuple(row) for row in torch.cat([noise, uniform]).flatten(0, 1).tolist()]
        assert noises.isdisjoint(rows) and len(set(rows)) == 8 * 16
        noises.update(rows)
        return gradient(agent, target_critics, batch, noise, uniform, args)

    monkeypatch.setattr(script, "update", noting)
    monkeypatch.setattr(script, "compute_gradient", noting_noise)
    state, _ = train(script, tmp_path, **FEW | {"gamma": 0.8})
    assert len(notes) == 300 == state["envs"]["steps"] and len(networks) == 1
    ((_, data),) = loaded
    known, drawn = set(rows_of(data)), set()
    for rows, *settings in notes:
        assert len(rows) == 16 and settings == [torch.optim.Adam, 1e-3, 0.8]
        drawn |= set(rows)
    assert drawn == known


def test_losses_are_logged_when_they_are_due(tmp_path, monkeypatch):
    metrics, update = [], script.update
    monkeypatch.setattr(script, "update", lambda *a: metrics.append(update(*a)) or metrics[-1])
    assert script.LOG_FREQUENCY == 1000
    monkeypatch.setattr(script, "LOG_FREQUENCY", 50)
    _, points = train(script, tmp_path, **FEW | {"total_timesteps": 70, "target_gap": 1.0})
    for tag, value in metrics[49].items():
        assert points[tag] == [(50, pytest.approx(value.item(), rel=1e-5))]


def test_at_the_start_the_target_critics_are_the_critics(tmp_path):
    """tau is so small that they hardly move."""
    state, _ = train(script, tmp_path, **FEW | {"seed": 3, "tau": 1e-30, "total_timesteps": 9})
    first = make_agent(seed=3).state_dict()
    for name, weights in state["target_critics"].items():
        assert torch.equal(weights, first[f"critics.{name}"])
        assert not torch.equal(weights, state["network"][f"critics.{name}"])


def all_equal(ours, theirs):
    """Of nested dictionaries and lists with tensors: the same to the bit."""
    if isinstance(ours, torch.Tensor):
        return torch.equal(ours, theirs)
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(all_equal(ours[k], theirs[k]) for k in ours)
    if isinstance(ours, list | tuple):
        return len(ours) == len(theirs) and all(map(all_equal, ours, theirs))
    return ours == theirs


def test_a_resumed_run_is_the_same_to_the_bit(tmp_path):
    settings = FEW | {"total_timesteps": 110, "target_gap": 1.0}
    whole, _ = train(script, tmp_path, **settings)
    args = script.Args(**settings | {"total_timesteps": 51}, runs_dir=str(tmp_path))
    resumed, _ = train(script, tmp_path, **settings, resume=script.train(args).folder)
    assert resumed["envs"]["steps"] == 110
    for part in ("network", "target_critics", "optimizer", "random_state"):
        assert all_equal(resumed[part], whole[part])


class PaysContinuously(Pays):
    """Where episodes terminate, 1, 0 and -1 tell the step: else noise would seem to be value."""

    action_space = Box(-1, 1, (2,), np.float32)

    def step(self, action):
        obs, *outcome = super().step(action)
        return obs if self.truncates else np.float32([1 - self.t]), *outcome


gym.register("TruncatesOffline-v0", entry_point=PaysContinuously, kwargs={"truncates": True})
gym.register("TerminatesOffline-v0", entry_point=PaysContinuously, kwargs={"truncates": False})


@pytest.mark.parametrize("env_id, values", [
    ("TruncatesOffline-v0", {1: 1 / (1 - 0.8)}),
    ("TerminatesOffline-v0", {1: 1 + 0.8 + 0.8**2, 0: 1 + 0.8, -1: 1}),
])  # fmt: skip
def test_a_time_limit_is_not_the_end_of_the_world(tmp_path, env_id, values):
    """Truncated for ever, a reward of 1 is worth 1 / (1 - gamma). Else it counts to the end.

    All actions are alike, in the data and in what they pay: the conservative term takes nothing.
    Nor does entropy count in.
    """
    flags = {"env_id": env_id, "gamma": 0.8, "total_timesteps": 250, "tau": 0.2}
    state, _ = train(script, tmp_path, **FEW | flags | {"learning_rate": 1e-2})
    agent = make_agent(obs_size=1)
    agent.load_state_dict(state["network"] | {"low": agent.low, "high": agent.high})
    for obs, value in values.items():
        found = agent.critics(torch.full((50, 1), float(obs)), 2 * torch.rand(50, 2) - 1).detach()
        means = found.mean(1)  # a wrong bootstrap is off by more than 2
        torch.testing.assert_close(means, torch.full((2,), float(value)), rtol=0, atol=0.5)


def test_every_setting_of_the_algorithm_changes_the_outcome(tmp_path):
    path = tmp_path / "data.npz"
    zeros = np.zeros((50, 2))
    np.savez(path, observations=zeros, next_observations=zeros, actions=zeros, rewards=zeros[:, 0],
             terminals=zeros[:, 0])  # fmt: skip

    def outcome(**settings):
        few = FEW | {"total_timesteps": 9, "autotune": False, "dataset_size": 60}
        state, _ = train(script, tmp_path, **few | settings)
        return [weights.tolist() for weights in state["network"].values()]

    check_settings(script, outcome, {
        "seed": 2, "total_timesteps": 12, "num_envs": 4, "dataset": str(path), "dataset_size": 90,
        "learning_rate": 5e-4, "gamma": 0.9, "tau": 0.5, "batch_size": 15, "hidden_size": 15,
        "autotune": True, "alpha": 0.5, "cql_weight": 0.5, "target_gap": 0.5, "num_actions": 3,
    })  # fmt: skip
