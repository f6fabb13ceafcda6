"""The mathematics of simbav2_continuous.py: by hand, by loops, by networks written out again.

What other scripts have word for word, as the replay buffer and `project`, is tested there.
"""

import inspect
import math
from copy import deepcopy
from types import SimpleNamespace

import c51_cartpole
import gymnasium as gym
import numpy as np
import ppo_continuous
import pytest
import sac_continuous
import simbav2_continuous as script
import torch
from diary import Diary, Pays, check_episodes, check_settings, recorded, side_by_side, train
from gymnasium.spaces import Box
from torch.distributions import Independent, Normal, TanhTransform, TransformedDistribution

# For the tests that all scripts share.
TINY = (
    "--total-timesteps 1000 --num-envs 2 --learning-starts 100 --buffer-size 700 --batch-size 32 "
    "--actor-width 16 --critic-width 16 --num-atoms 21 --num-critics 2 --train-frequency 10 "
    "--gradient-steps 2 --checkpoint-frequency 250 --eval-frequency 350 --eval-episodes 5"
)
OWN = "continuous"
OWN_FLAGS = (
    "--total-timesteps 2500 --actor-width 32 --critic-width 32 --batch-size 64 --gamma 0.5 "
    "--learning-rate 3e-3 --final-learning-rate 1e-3"
)
WRONG_SPACES = ["CartPole-v1", "cases:HugeBounds-v0"]
DIVERGES = "--learning-rate 1e30"
BAD = [
    ("--actor-width 0", "--actor-width"),
    ("--critic-blocks 0", "--critic-blocks"),
    ("--num-critics 0", "--num-critics"),
    ("--num-atoms 1", "--num-atoms"),
    ("--max-return 0", "--max-return"),
    ("--initial-alpha 0", "--initial-alpha"),
    ("--learning-starts 100", "--batch-size"),
    ("--final-learning-rate nan", "--final-learning-rate"),
]
LEARNS = [  # always the middle: 0
    ("--env-id cases:Aim-v0 --total-timesteps 4000 --actor-width 32 --critic-width 32", 7)
]


@pytest.mark.parametrize("name", [
    "make_env", "act", "to_bounds", "update_target", "ReplayBuffer", "play",
])  # fmt: skip
def test_what_sac_has_too_is_tested_there(name):
    ours, theirs = (inspect.getsource(getattr(module, name)) for module in (script, sac_continuous))
    assert ours == theirs


@pytest.mark.parametrize("other, names", [
    (c51_cartpole, ["expected_return", "project"]), (ppo_continuous, ["RunningStatistics"]),
])  # fmt: skip
def test_what_others_have_too_is_tested_there(other, names):
    for name in names:
        ours, theirs = (inspect.getsource(getattr(module, name)) for module in (script, other))
        assert ours == theirs, name


@pytest.mark.parametrize("name", ["sample_actions", "policy_loss", "temperature_loss"])
def test_the_code_is_that_of_sac_and_its_docstring_says_whose_equation_it_is(name):
    sources = [inspect.getsource(getattr(module, name)) for module in (script, sac_continuous)]
    ours, theirs = (source.split('"""')[2] for source in sources)
    assert ours == theirs


# ---- The sphere ----------------------------------------------------------------------------------


def small_args(**settings):
    few = {"actor_width": 6, "critic_width": 10, "num_atoms": 11}
    return script.Args(**few | settings)


def make_agent(obs_size=2, low=(-2, 0), high=(2, 10), seed=0, **settings):
    torch.manual_seed(seed)
    return script.Agent(obs_size, np.float32(low), np.float32(high), small_args(**settings))


def lengths(rows):
    """By hand: along the last axis."""
    return (rows.double() ** 2).sum(-1).sqrt()


def check_unit_rows(network):
    """All matrices are of unit linear layers, whose rows have length 1, and are not alike."""
    layers = [m for m in network.modules() if isinstance(m, script.UnitLinear)]
    matrices = [weight for weight in network.parameters() if weight.ndim > 1]
    assert len(layers) == len(matrices) > 0
    for layer in layers:
        assert layer.bias is None and layer.weight.shape == (layer.out_features, layer.in_features)
        found, ones = lengths(layer.weight.detach()), torch.ones(layer.out_features).double()
        torch.testing.assert_close(found, ones, rtol=0, atol=1e-6)


def test_to_the_sphere_by_hand():
    rows = torch.tensor([[3.0, 4.0], [-0.6, 0.8], [0.0, 1e-3], [0.0, 0.0]])
    expected = torch.tensor([[0.6, 0.8], [-0.6, 0.8], [0.0, 1.0], [0.0, 0.0]])
    torch.testing.assert_close(script.to_sphere(rows), expected)


def test_the_shift_keeps_the_length_of_inputs():
    """(4, 0) becomes (4, 0, 3) / 5. Twice as long, it is another point."""
    found = script.shift(torch.tensor([[4.0, 0.0], [0.0, -4.0], [8.0, 0.0], [0.0, 0.0]]))
    root = math.sqrt(73)
    expected = [[0.8, 0, 0.6], [0, -0.8, 0.6], [8 / root, 0, 3 / root], [0, 0, 1]]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32))


def test_weights_have_length_1_from_the_start_on():
    """Also where there are more outputs than inputs, so that rows cannot be orthonormal."""
    for inputs, outputs in (3, 24), (24, 3), (8, 8):
        check_unit_rows(torch.nn.Sequential(script.UnitLinear(inputs, outputs)))
    weight = script.UnitLinear(24, 3).weight.detach()
    torch.testing.assert_close(weight @ weight.T, torch.eye(3), rtol=0, atol=1e-5)
    for seed in range(3):
        check_unit_rows(make_agent(seed=seed, num_critics=2))


def test_weights_have_length_1_after_every_update_but_those_of_targets_are_averages():
    """Of each unit, over its inputs: not of each input, over the units."""
    agent = make_agent(num_critics=2)
    target_critics = deepcopy(agent.critics)
    args = small_args(num_critics=2, tau=0.25)
    optimizer = torch.optim.Adam(agent.parameters(), lr=0.05)
    for _ in range(5):
        before = {name: weight.clone() for name, weight in agent.state_dict().items()}
        old_targets = deepcopy(target_critics)
        script.update(agent, target_critics, optimizer, random_batch(torch.float32), args)
        check_unit_rows(agent)
        parameters = dict(agent.named_parameters())
        assert not any(torch.equal(parameters[name], before[name]) for name in parameters)
        columns = lengths(agent.encoder.blocks[0].first.weight.detach().T)
        assert abs(columns - columns[0]).max() > 0.01
        for target, old, source in zip(
            target_critics.parameters(), old_targets.parameters(), agent.critics.parameters()
        ):
            torch.testing.assert_close(target, 0.75 * old + 0.25 * source)
    rows = torch.cat([lengths(w.detach()) for w in target_critics.parameters() if w.ndim > 1])
    assert rows.max() < 1 + 1e-6 and rows.min() < 0.99


def test_only_the_length_is_lost_by_the_projection():
    layer = script.UnitLinear(2, 3)
    layer.weight.data = torch.tensor([[3.0, 4.0], [0.0, -2.0], [0.6, 0.8]])
    script.project_weights(torch.nn.ModuleList([layer, torch.nn.Linear(2, 2)]))
    expected = torch.tensor([[0.6, 0.8], [0.0, -1.0], [0.6, 0.8]])
    torch.testing.assert_close(layer.weight.detach(), expected)
    assert layer.weight.requires_grad


def test_a_scaler_is_what_it_says_at_first_and_moves_in_its_own_steps():
    scaler, rows = script.Scaler(3, 0.5, 0.1), torch.tensor([[1.0, -2.0, 4.0]])
    torch.testing.assert_close(scaler.weight.detach(), torch.full((3,), 0.1))
    torch.testing.assert_close(scaler(rows).detach(), 0.5 * rows)
    optimizer = torch.optim.Adam(scaler.parameters(), lr=0.01)
    scaler(rows).abs().sum().backward()
    optimizer.step()  # each stored number moves by 0.01, what it says by 0.01 * 0.5 / 0.1
    torch.testing.assert_close(scaler(rows).detach(), 0.45 * rows, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("width, num_blocks", [(8, 1), (32, 2), (10, 3)])
def test_scalers_of_a_network_are_first_what_the_authors_have(width, num_blocks):
    encoder, head = script.Encoder(5, width, num_blocks), script.Head(width, 4)
    factors = {name: part.weight * part.unit for name, part in
               torch.nn.ModuleList([encoder, head]).named_modules()
               if isinstance(part, script.Scaler)}  # fmt: skip
    expected = {"0.scaler": (width, math.sqrt(2 / width)), "1.scaler": (width, 1.0)}
    for k in range(num_blocks):
        expected[f"0.blocks.{k}.scaler"] = 4 * width, math.sqrt(2 / width) / 2
        expected[f"0.blocks.{k}.alpha"] = width, 1 / (num_blocks + 1)
    assert factors.keys() == expected.keys()
    for name, (size, value) in expected.items():
        torch.testing.assert_close(factors[name].detach(), torch.full((size,), value))
    for scaler in (encoder.scaler, encoder.blocks[0].scaler, head.scaler):
        assert scaler.unit == pytest.approx(1)
    stored = encoder.blocks[0].alpha.weight.detach()
    torch.testing.assert_close(stored, torch.full((width,), 1 / math.sqrt(width)))


# ---- The networks, written out again -------------------------------------------------------------


def unit(rows):
    return rows / (rows**2).sum(-1, keepdim=True).sqrt()


def factor(scaler):
    return scaler.weight * scaler.unit


def plain_block(block, features):
    hidden = torch.clamp(factor(block.scaler) * (features @ block.first.weight.T), min=0)
    proposal, alpha = unit(hidden @ block.second.weight.T), factor(block.alpha)
    return unit((1 - alpha) * features + alpha * proposal)


def plain(encoder, head, inputs):
    """The outputs for (B, inputs), in double precision."""
    rows = unit(torch.cat([inputs, 3 * torch.ones(len(inputs), 1).to(inputs)], 1))
    features = unit(factor(encoder.scaler) * (rows @ encoder.embedding.weight.T))
    for block in encoder.blocks:
        features = plain_block(block, features)
    hidden = factor(head.scaler) * (features @ head.first.weight.T)
    return hidden @ head.second.weight.T + head.bias


def shaken(module):
    """With other scalers and biases than at first; on the sphere all the same."""
    for weight in module.parameters():
        weight.data += 0.3 * torch.randn_like(weight)
    script.project_weights(module)
    return module.double()


def test_a_block_by_hand():
    """It goes from (1, 0) towards (0, 1): a quarter of the way in x, three quarters in y."""
    block = script.Block(2, 0.5)
    block.first.weight.data[:] = torch.tensor([1.0, 0.0])
    block.second.weight.data[0], block.second.weight.data[1] = 0.0, 1 / math.sqrt(8)
    torch.testing.assert_close(block(torch.tensor([1.0, 0.0])), torch.tensor([0.5, 0.5]) * 2**0.5)
    block.alpha.weight.data *= torch.tensor([0.5, 1.5])  # from 1/2
    expected = torch.tensor([0.75, 0.75]) / (0.75 * 2**0.5)
    torch.testing.assert_close(block(torch.tensor([1.0, 0.0])), expected)
    block.alpha.weight.data *= torch.tensor([1.0, 1 / 3])  # 1/4 of both
    expected = torch.tensor([0.75, 0.25]) / math.sqrt(0.75**2 + 0.25**2)
    torch.testing.assert_close(block(torch.tensor([1.0, 0.0])), expected)
    # Where all units are off, SMALL keeps the direction of the second layer.
    off = block(torch.tensor([-1.0, 0.0]))
    torch.testing.assert_close(off, torch.tensor([-0.75, 0.25]) / math.sqrt(0.75**2 + 0.25**2))


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_block_goes_nowhere_or_all_the_way(share):
    torch.manual_seed(0)
    block, features = shaken(script.Block(6, 0.5)), unit(torch.randn(9, 6).double())
    block.alpha.weight.data[:] = share / block.alpha.unit
    hidden = (block.first(features) * factor(block.scaler)).clamp(min=0)
    proposal = unit(block.second(hidden))
    expected = proposal if share else features
    torch.testing.assert_close(block(features), expected, rtol=0, atol=1e-6)


def test_networks_are_what_is_written_out_again():
    torch.manual_seed(0)
    agent, obs = shaken(make_agent(actor_blocks=2, num_critics=2)), 3 * torch.randn(9, 2).double()
    actions = 2 * torch.rand(9, 2).double() - 1
    means, log_std = agent(obs)
    torch.testing.assert_close(means, plain(agent.encoder, agent.heads[0], obs))
    outputs = plain(agent.encoder, agent.heads[1], obs)
    torch.testing.assert_close(log_std, -10 + 12 * torch.sigmoid(2 * outputs))
    logits = agent.critics(obs, actions)
    for k in range(2):
        expected = plain(*agent.critics.networks[k], torch.cat([obs, actions], 1))
        torch.testing.assert_close(logits[k], expected, rtol=1e-5, atol=1e-6)


def test_features_are_on_the_sphere_in_every_layer():
    agent, seen = make_agent(critic_blocks=3), []
    for part in agent.modules():
        if isinstance(part, script.Block | script.Encoder):
            part.register_forward_hook(lambda *call: seen.append(call[2]))
    obs = torch.tensor([[0.0, 0.0], [1e6, -1e6], [1e-6, 0.0], [0.3, -5.0]])
    agent(obs), agent.critics(obs, torch.zeros(4, 2))
    assert [tuple(part.shape) for part in seen] == [(4, 6)] * 2 + [(4, 10)] * 4
    for features in seen:
        torch.testing.assert_close(lengths(features), torch.ones(4).double(), rtol=0, atol=1e-6)


def test_widths_and_blocks_are_those_of_the_flags():
    agent = make_agent(actor_blocks=2, critic_blocks=1, num_critics=3, actor_width=7)
    assert agent.encoder.embedding.weight.shape == (7, 3) and len(agent.encoder.blocks) == 2
    assert agent.encoder.blocks[1].first.weight.shape == (28, 7)
    assert [head.second.weight.shape for head in agent.heads] == [(2, 7)] * 2
    assert len(agent.critics.networks) == 3
    encoder, head = agent.critics.networks[2]
    assert encoder.embedding.weight.shape == (10, 5) and len(encoder.blocks) == 1
    assert head.second.weight.shape == (11, 10) and head.bias.tolist() == [0] * 11
    logits = agent.critics(torch.randn(4, 2), torch.randn(4, 2))
    assert logits.shape == (3, 4, 11) and not torch.equal(logits[0], logits[1])
    np.testing.assert_allclose(agent.critics.atoms, np.arange(-5, 6), atol=1e-6)
    narrow = make_agent(max_return=2.0).critics.atoms
    np.testing.assert_allclose(narrow, np.arange(-5, 6) * 0.4, atol=1e-6)
    assert not any("atoms" in name for name in agent.state_dict())
    assert agent.log_alpha.item() == pytest.approx(math.log(0.01))
    assert make_agent(initial_alpha=0.5).log_alpha.item() == pytest.approx(math.log(0.5))


def test_deviations_have_bounds():
    agent = make_agent()
    for bias, expected in (-50.0, -10), (0.0, -4), (50.0, 2):
        agent.heads[1].second.weight.data.zero_()
        agent.heads[1].bias.data.fill_(bias)
        _, log_std = agent(torch.randn(3, 2))
        assert log_std.tolist() == [[expected] * 2] * 3
        _, deviations = script.Actor(agent)(np.zeros((3, 2), np.float32))
        np.testing.assert_allclose(deviations, np.full((3, 2), math.exp(expected)), rtol=1e-5)


def test_make_network_takes_sizes_and_bounds_of_the_environment():
    box = Box(np.float32([-2, 0, 1]), np.float32([2, 10, 3]))
    envs = SimpleNamespace(action_space=box, obs=np.zeros((1, 4), np.float32))
    agent = script.make_network(small_args(), envs)
    assert agent.low.tolist() == [-2, 0, 1] and agent.high.tolist() == [2, 10, 3]
    assert agent(torch.zeros(1, 4))[0].shape == (1, 3)


@pytest.mark.parametrize("actor_blocks", [1, 3])
def test_the_actor_is_the_policy_with_its_statistics_also_after_an_update(actor_blocks):
    """And the evaluation plays the squashed means."""
    agent, obs = make_agent(actor_blocks=actor_blocks), 5 + 3 * torch.randn(50, 2)
    agent.obs_statistics.update(4 + 2 * torch.randn(100, 2))
    for _ in range(2):
        noise = torch.randn(50, 2)
        mean, variance = agent.obs_statistics.mean, agent.obs_statistics.variance
        means, log_std = agent((obs - mean) / variance.sqrt())
        expected, _ = script.sample_actions(means, log_std, noise)
        found = script.act(script.Actor(agent), obs.numpy(), noise.numpy())
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected.detach(), rtol=1e-3, atol=1e-5)
        played = script.play(script.Args(), agent, obs.numpy())
        expected = means.detach().tanh() * torch.tensor([2, 5]) + torch.tensor([0, 5])
        np.testing.assert_allclose(played, expected, rtol=1e-3, atol=1e-4)
        agent.obs_statistics.update(100 * torch.randn(100, 2))
        with torch.no_grad():
            for weights in agent.parameters():
                weights += 0.3 * torch.randn_like(weights)


# ---- The losses ----------------------------------------------------------------------------------


def squashed(means, log_std):
    """The distribution of an action in (-1, 1), PyTorch's own."""
    normal = Independent(Normal(means, log_std.exp()), 1)
    return TransformedDistribution(normal, TanhTransform(cache_size=1))


def looped_target(rewards, terminated, next_probs, next_log_probs, alpha, atoms, gamma):
    """Each atom's mass goes to the two atoms beside y, by loops: (C, B, M) -> (B, M)."""
    atoms, dz = atoms.tolist(), (atoms[1] - atoms[0]).item()
    m = torch.zeros(next_probs.shape[1:]).double()
    for b in range(len(rewards)):
        means = [sum(p * z for p, z in zip(row.tolist(), atoms)) for row in next_probs[:, b]]
        row = next_probs[means.index(min(means)), b].tolist()
        for p, z in zip(row, atoms):
            y = rewards[b].item()
            if not terminated[b]:
                y += gamma * (z - alpha * next_log_probs[b].item())
            y = min(max(y, atoms[0]), atoms[-1])
            i = min(int((y - atoms[0]) / dz), len(atoms) - 2)
            share = (y - atoms[i]) / dz
            m[b, i] += p * (1 - share)
            m[b, i + 1] += p * share
    return m


@pytest.mark.parametrize("num_critics", [1, 2, 3])
@pytest.mark.parametrize("gamma, alpha", [(0.9, 0.3), (1.0, 0.0), (0.5, 4.0)])
def test_target_against_loops_over_atoms(num_critics, gamma, alpha):
    torch.manual_seed(0)
    atoms, logits = torch.linspace(-5, 5, 21).double(), 2 * torch.randn(num_critics, 60, 21)
    logits, (rewards, log_probs) = logits.double(), torch.randn(2, 60).double()
    terminated = torch.rand(60) < 0.3
    temperature = torch.tensor(alpha, dtype=torch.float64)
    found = script.td_target(rewards, terminated, logits, log_probs, temperature, atoms, gamma)
    probs = logits.exp() / logits.exp().sum(2, keepdim=True)
    expected = looped_target(rewards, terminated, probs, log_probs, alpha, atoms, gamma)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(found.sum(1), torch.ones(60).double())


def test_the_mean_of_the_target_is_that_of_sac():
    """r + gamma * (min_k Q_k - alpha * log pi), where nothing is clipped."""
    torch.manual_seed(0)
    atoms, logits = torch.linspace(-5, 5, 21), 2 * torch.randn(2, 60, 21)
    logits[..., [0, 1, 2, 3, -4, -3, -2, -1]] = -100.0
    rewards, log_probs = torch.randn(2, 60).clamp(-1, 1)
    terminated, alpha = torch.rand(60) < 0.3, torch.tensor(0.3)
    found = script.td_target(rewards, terminated, logits, log_probs, alpha, atoms, 0.9) @ atoms
    q_values = (logits.softmax(2) * atoms).sum(2)
    expected = sac_continuous.td_target(rewards, terminated, q_values, log_probs, alpha, 0.9)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_critic_losses_against_loops():
    torch.manual_seed(0)
    logits, target = torch.randn(2, 5, 4).double(), torch.rand(5, 4).double()
    found = script.critic_losses(logits, target)
    for k in range(2):
        total = 0.0
        for b in range(5):
            exps = [math.exp(value) for value in logits[k, b].tolist()]
            for m, e in zip(target[b].tolist(), exps):
                total -= m * math.log(e / sum(exps)) / 5
        assert found[k].item() == pytest.approx(total)


def test_policy_loss_by_hand():
    """The lesser of both critics is counted: mean of 0.2 * 1 - 1 and 0.2 * -2 + 4."""
    q_values, log_probs = torch.tensor([[1.0, 5.0], [3.0, -4.0]]), torch.tensor([1.0, -2.0])
    loss = script.policy_loss(q_values, log_probs, torch.tensor(0.2))
    assert loss.item() == pytest.approx((0.2 - 1 - 0.4 + 4) / 2)
    one = script.policy_loss(q_values[:1], log_probs, torch.tensor(0.2))
    assert one.item() == pytest.approx((0.2 - 1 - 0.4 - 5) / 2)


def test_q_is_the_mean_of_the_distribution():
    atoms = torch.linspace(-5, 5, 5)
    logits = torch.tensor([[0.1, 0.2, 0.3, 0.3, 0.1]]).log()
    assert script.expected_return(logits, atoms).item() == pytest.approx(0.25)


def random_batch(dtype=torch.float64, size=40, obs_size=2, action_size=2):
    obs, next_obs = torch.randn(2, size, obs_size, dtype=dtype)
    actions = 2 * torch.rand(size, action_size, dtype=dtype) - 1
    rewards = torch.randn(size, dtype=dtype)
    return script.Batch(obs, actions, rewards, next_obs, torch.rand(size) < 0.3)


@pytest.mark.parametrize("num_critics, compile", [
    (1, False), (2, False), pytest.param(1, True, marks=pytest.mark.slow),
])  # fmt: skip
def test_update_goes_down_three_gradients_each_of_the_weights_of_its_own(num_critics, compile):
    """Losses of the networks written out again, all at the old weights; then rows get length 1.

    The targets differ from the critics. A gradient that is left over is no matter.
    """
    sizes = {"num_critics": num_critics, "gamma": 0.9, "tau": 0.25}
    agent = shaken(make_agent(**sizes))
    agent.log_alpha.data.fill_(math.log(0.3))
    reference, targets = deepcopy(agent), shaken(make_agent(seed=1, **sizes)).critics
    plain_targets, batch = deepcopy(targets), random_batch()
    for weights in agent.parameters():
        weights.grad = torch.ones_like(weights)
    args = small_args(compile=compile, **sizes)
    if compile:
        torch.compiler.reset()
        torch._dynamo.config.trace_autograd_ops = True
    optimizer = torch.optim.SGD(agent.parameters(), lr=0.1)
    torch.manual_seed(5)
    metrics = script.update(agent, targets, optimizer, batch, args)

    torch.manual_seed(5)
    noise, atoms = torch.randn(2, 40, 2), torch.linspace(-5, 5, 11).double()

    def policy(obs):
        means, outputs = (plain(reference.encoder, head, obs) for head in reference.heads)
        return means, -10 + 12 * torch.sigmoid(2 * outputs)

    means, log_std = policy(batch.next_obs)
    next_actions = (means + log_std.exp() * noise[0]).tanh()
    next_log_probs = squashed(means, log_std).log_prob(next_actions).detach()
    inputs = torch.cat([batch.next_obs, next_actions], 1)
    probs = torch.stack([plain(*net, inputs).softmax(1) for net in plain_targets.networks]).detach()
    m = looped_target(batch.rewards, batch.terminated, probs, next_log_probs, 0.3, atoms, 0.9)
    inputs = torch.cat([batch.obs, batch.actions], 1)
    logits = [plain(*net, inputs) for net in reference.critics.networks]
    losses = [-(m * (row.softmax(1)).log()).sum(1).mean() for row in logits]
    means, log_std = policy(batch.obs)
    actions = (means + log_std.exp() * noise[1]).tanh()
    log_probs = squashed(means, log_std).log_prob(actions)
    inputs = torch.cat([batch.obs, actions], 1)
    values = [plain(*net, inputs).softmax(1) @ atoms for net in reference.critics.networks]
    actor_loss = (0.3 * log_probs - torch.stack(values).amin(0)).mean()

    groups = [*zip(losses, reference.critics.networks)]
    groups += [(actor_loss, torch.nn.ModuleList([reference.encoder, reference.heads]))]
    for loss, module in groups:
        weights = list(module.parameters())
        for weight, gradient in zip(weights, torch.autograd.grad(loss, weights, retain_graph=True)):
            moved = weight.detach() - 0.1 * gradient
            weight.grad = unit(moved) if moved.ndim == 2 else moved  # kept until all are known
    # The temperature's target is an entropy of -1: half of the two numbers of an action.
    expected_log_alpha = math.log(0.3) - 0.1 * -0.3 * (log_probs.mean().item() - 1)
    assert agent.log_alpha.item() == pytest.approx(expected_log_alpha)
    expected = {name: weight.grad for name, weight in reference.named_parameters()}
    del expected["log_alpha"]
    found = dict(agent.named_parameters())
    assert expected.keys() == found.keys() - {"log_alpha"}
    for name in expected:
        torch.testing.assert_close(found[name].detach(), expected[name], rtol=1e-4, atol=1e-6)
    olds = plain_targets.parameters()
    for old, target, source in zip(olds, targets.parameters(), agent.critics.parameters()):
        torch.testing.assert_close(target, 0.75 * old + 0.25 * source)
    q_values = torch.stack([row.softmax(1) @ atoms for row in logits])
    values = {
        "losses/td_loss": sum(losses) / num_critics, "losses/q_values": q_values.mean(),
        "losses/policy_loss": actor_loss, "losses/entropy": -log_probs.mean(),
        "losses/alpha": torch.tensor(0.3),
    }  # fmt: skip
    for tag, value in metrics.items():
        assert value.item() == pytest.approx(values.pop(tag).item(), rel=1e-5), tag
        assert not value.requires_grad
    assert not values


class Known(torch.nn.Module):
    """A critic that is right: its distributions, on -5 and 5, have the mean -2.5 (a - 0.3)^2."""

    atoms = torch.tensor([-5.0, 5.0])

    def forward(self, obs, actions):
        high = 0.5 - 0.25 * (actions.squeeze(1) - 0.3).square()
        return torch.stack([1 - high, high], 1).log()[None]


def test_the_policy_becomes_the_soft_optimum():
    """This is proportional to exp(Q / temperature), nearly a Gaussian of variance temperature / 5.

    The temperature is the one at which its entropy is -1/2.
    """
    agent = make_agent(obs_size=1, low=[-1], high=[1], actor_width=16)
    agent.critics, args = Known(), small_args()
    optimizer = torch.optim.Adam(agent.parameters(), lr=1e-2)
    for _ in range(500):
        obs, rewards = torch.randn(64, 1), torch.zeros(64)
        batch = script.Batch(obs, torch.zeros(64, 1), rewards, obs, rewards.bool())
        script.update(agent, agent.critics, optimizer, batch, args)
    means, log_std = agent(torch.randn(10_000, 1))
    actions, log_probs = script.sample_actions(means, log_std, torch.randn(10_000, 1))
    assert -log_probs.mean().item() == pytest.approx(-0.5, abs=0.1)
    variance = math.exp(2 * -0.5) / (2 * math.pi * math.e)  # of a Gaussian with this entropy
    assert actions.var().item() == pytest.approx(variance, rel=0.25)
    assert agent.log_alpha.exp().item() == pytest.approx(5 * variance, rel=0.25)
    assert actions.mean().item() == pytest.approx(0.3, abs=0.05)


# ---- Normalisation -------------------------------------------------------------------------------


def scaler_after(steps, gamma=0.9, max_return=5.0):
    """After (rewards, ended) of N environments."""
    scaler = script.ReturnScaler(len(steps[0][0]), gamma, max_return)
    for rewards, ended in steps:
        scaler.update(torch.tensor(rewards), torch.tensor(ended))
    return scaler


def test_rewards_are_divided_by_the_deviation_of_what_was_added_up():
    """Two environments; an end, whether terminated or truncated, comes after its own reward."""
    steps = [([1.0, 4.0], [False, False]), ([2.0, -1.0], [True, False]),
             ([-3.0, 0.5], [False, True]), ([5.0, 2.0], [False, False])]  # fmt: skip
    first = [1.0, 2 + 0.9 * 1, -3.0, 5 + 0.9 * -3]
    second = [4.0, -1 + 0.9 * 4, 0.5 + 0.9 * (-1 + 0.9 * 4), 2.0]
    scaler, rewards = scaler_after(steps), torch.tensor([1.0, -2.0, 0.0])
    expected = rewards / np.std(first + second)
    torch.testing.assert_close(scaler(rewards), expected.float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(scaler.sums, torch.tensor([0.9 * first[-1], 0.9 * 2]))
    assert scaler.highest.item() == 4.0


def test_rewards_are_divided_by_more_where_returns_would_exceed_the_highest_atom():
    """0 for long, then 10: the deviation is small. And of -20, the size counts."""
    steps = [([0.0], [False])] * 99 + [([10.0], [True])]
    scaler = scaler_after(steps)
    assert np.std([0.0] * 99 + [10.0]) < 1
    assert scaler(torch.tensor([10.0])).item() == pytest.approx(5.0)
    scaler = scaler_after([*steps, ([-20.0], [True])])
    assert scaler(torch.tensor([-20.0, 10.0])).tolist() == pytest.approx([-5.0, 2.5])
    scaler = scaler_after(steps, max_return=2.0)
    assert scaler(torch.tensor([10.0])).item() == pytest.approx(2.0)


def test_a_scaler_knows_the_first_reward_and_divides_nothing_by_0():
    assert scaler_after([([3.0], [False])])(torch.tensor([3.0])).item() == pytest.approx(5.0)
    assert scaler_after([([0.0], [False])])(torch.zeros(2)).tolist() == [0, 0]


@pytest.mark.parametrize("rewards", ["uniform", "sparse", "negative", "growing", "constant"])
@pytest.mark.parametrize("gamma", [0.95, 0.975, 0.995])
def test_no_sum_leaves_the_atoms(rewards, gamma):
    """Of past rewards, as the paper has it: none, at any time, exceeds 5."""
    random = np.random.default_rng(0)
    drawn = {
        "uniform": random.uniform(-1, 1, 400), "sparse": 50.0 * (random.random(400) < 0.02),
        "negative": -random.exponential(16, 400), "growing": np.arange(400.0),
        "constant": np.full(400, 0.7),
    }[rewards].astype(np.float32)  # fmt: skip
    scaler, total, sums = script.ReturnScaler(1, gamma, 5.0), 0.0, []
    for t, reward in enumerate(drawn):
        scaler.update(torch.tensor([reward]), torch.tensor([t % 100 == 99]))
        total = reward + gamma * total * (t % 100 != 0)
        sums.append(total)
        found = scaler(torch.tensor(np.float32(sums)))
        assert found.abs().max() <= 5 + 1e-4


def test_the_authors_gamma_keeps_also_the_returns_after_a_time_limit_there():
    """A reward that is always the same is summed up to 1 - gamma^T of what follows without end.

    With gamma = 1 - 5 / T, this is more than 99%. With another one, it would be much less.
    """
    for steps, gamma, excess in (200, 0.975, 1.01), (1000, 0.995, 1.01), (200, 0.99, 1.16):
        scaler = script.ReturnScaler(1, gamma, 2.0)  # so low that max |G| / 2 divides
        for t in range(2 * steps):
            scaler.update(torch.tensor([-16.0]), torch.tensor([t % steps == steps - 1]))
        value = scaler(torch.tensor([-16.0])).item() / (1 - gamma)
        assert excess - 0.01 < -value / 2 < excess + 0.001


def test_what_the_networks_see_by_hand():
    agent = make_agent()
    agent.obs_statistics.update(torch.tensor([[1.0, 5.0], [3.0, 5.0]]))  # 2 and 5; 1 and 0
    scaler = scaler_after([([10.0], [True])])  # divides by 2
    obs, next_obs = torch.tensor([[4.0, 5.0]]), torch.tensor([[-1.0, 5.0]])
    actions, ended = torch.tensor([[0.5, -0.5]]), torch.tensor([True])
    batch = script.Batch(obs, actions, torch.tensor([6.0]), next_obs, ended)
    found = script.normalize(batch, agent, scaler)
    torch.testing.assert_close(found.obs, torch.tensor([[2.0, 0.0]]))
    torch.testing.assert_close(found.next_obs, torch.tensor([[-3.0, 0.0]]))
    assert found.rewards.item() == pytest.approx(3.0)
    assert found.actions is actions and found.terminated is ended and obs.tolist() == [[4, 5]]


# ---- The loop ------------------------------------------------------------------------------------


class PaysContinuously(Pays):
    """Where episodes terminate, 1, 0 and -1 tell the step: else noise would seem to be value."""

    action_space = Box(-1, 1, (2,), np.float32)

    def step(self, action):
        obs, *outcome = super().step(action)
        return obs if self.truncates else np.float32([1 - self.t]), *outcome


gym.register("TruncatesOnSphere-v0", entry_point=PaysContinuously, kwargs={"truncates": True})
gym.register("TerminatesOnSphere-v0", entry_point=PaysContinuously, kwargs={"truncates": False})

FEW = dict(
    env_id="ContinuousDiary-v0", total_timesteps=600, num_envs=3, learning_starts=50,
    batch_size=16, buffer_size=1000, actor_width=6, critic_width=10, num_atoms=11,
    train_frequency=12, eval_episodes=3, learning_rate=1e-2, final_learning_rate=4e-3,
)  # fmt: skip
LOW, HIGH = np.array([-2, 0]), np.array([2, 10])


def scaled(actions):
    """From -1 and 1 to the bounds of the diary."""
    return LOW + (np.asarray(actions) + 1) / 2 * (HIGH - LOW)


@pytest.mark.parametrize("num_envs, size", [(1, 5000), (3, 250)])
def test_the_buffer_holds_what_really_happened(tmp_path, num_envs, size):
    """As the environment told it: not normalised. At an end its last observation, too."""
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
    assert len(drawn) == 600 if size == 5000 else 150 < len(drawn) < 250
    newest = [tuple(env.steps[-1][0]) for env in Diary.made[:num_envs]]
    assert drawn.issuperset(newest)
    check_episodes(points, side_by_side(num_envs))


def test_every_step_is_measured_once_and_the_evaluation_is_not(tmp_path):
    """And the checkpoint has it: of observations in the network, of rewards beside it."""
    state, _ = train(script, tmp_path, **FEW | {"gamma": 0.7, "eval_frequency": 300})
    seen = np.array([step[0] for _, step in side_by_side(3)])
    network, scaler = state["network"], state["return_scaler"]
    assert network["obs_statistics.count"] == 600
    np.testing.assert_allclose(network["obs_statistics.mean"], seen.mean(0), rtol=1e-4)
    np.testing.assert_allclose(network["obs_statistics.variance"], seen.var(0), rtol=1e-3)
    sums, left = [], []
    for env in Diary.made[:3]:
        total = 0.0
        for _, _, reward, _, terminated, truncated in env.steps:
            sums.append(reward + total)
            total = 0.0 if terminated or truncated else 0.7 * sums[-1]
        left.append(total)
    assert scaler["statistics.count"] == 600
    np.testing.assert_allclose(scaler["statistics.variance"], np.var(sums), rtol=1e-3)
    np.testing.assert_allclose(scaler["highest"], np.abs(sums).max(), rtol=1e-5)
    np.testing.assert_allclose(scaler["sums"], left, rtol=1e-4, atol=1e-6)


def test_updates_and_actions_see_all_that_was_measured_until_then(tmp_path, monkeypatch):
    """The observation that is acted on is counted in before; its reward before the update."""
    acts, updates = (recorded(monkeypatch, script, name) for name in ("act", "update"))
    raw = recorded(monkeypatch, script, "normalize")
    train(script, tmp_path, **FEW | {"total_timesteps": 300})
    seen = np.array([step[0] for _, step in side_by_side(3)])
    for k in (0, 1, 40):
        actor = acts[k][0][0]
        known = seen[: 51 + 3 * k + 3]  # 51 random steps
        np.testing.assert_allclose(actor.mean, known.mean(0), rtol=1e-4)
        np.testing.assert_allclose(actor.deviation, known.std(0), rtol=1e-3)
    assert len(raw) == len(updates) == 21  # steps 60, 72, ..., 300
    for k in (0, 1, 20):
        (batch, _, scaler), normal = raw[k]
        known = seen[: 60 + 12 * k]
        expected = (batch.obs.numpy() - known.mean(0)) / known.std(0)
        np.testing.assert_allclose(normal.obs, expected, rtol=1e-3, atol=1e-4)
        assert scaler.statistics.count == len(known)
        torch.testing.assert_close(updates[k][0][3].rewards, scaler(batch.rewards))
        torch.testing.assert_close(updates[k][0][3].obs, normal.obs)


def test_a_policy_that_is_loaded_has_the_statistics_of_the_run(tmp_path):
    folder = script.train(script.Args(**FEW, runs_dir=str(tmp_path))).folder
    network = script.read_checkpoint(folder)["network"]
    agent = make_agent()
    agent.load_state_dict(network)
    policy, obs = script.load_policy(folder), np.float64([0.2, 0.9])
    mean, variance = (network[f"obs_statistics.{name}"] for name in ("mean", "variance"))
    means, _ = agent(((torch.tensor(obs).float() - mean) / variance.sqrt())[None])
    np.testing.assert_allclose(policy(obs), scaled(means.tanh().detach())[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("num_envs, train_frequency, gradient_steps, learning_starts", [
    (1, 7, 3, 50), (4, 10, 1, 50), (3, 5, 2, 50), (8, 4, 1, 101),
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
        rate = pytest.approx(optimizer.param_groups[0]["lr"])
        return type(optimizer), rate, len(batch.obs), args.gamma

    spy("act", lambda actor, obs, noise=0.0: (obs.tolist(), np.shape(noise)))
    spy("update", note_update)
    train(script, tmp_path, **FEW | {
        "num_envs": num_envs, "train_frequency": train_frequency, "gradient_steps": gradient_steps,
        "learning_starts": learning_starts, "total_timesteps": 320, "gamma": 0.8,
    })  # fmt: skip
    steps, expected = side_by_side(num_envs), []
    for first in range(0, 320, num_envs):
        if first >= learning_starts:
            seen = [step[0] for _, step in steps[first : first + num_envs]]
            expected.append(("act", (seen, (num_envs, 2))))
        rate = 1e-2 - (1e-2 - 4e-3) * first / 320
        for step in range(first + 1, first + num_envs + 1):
            if step >= learning_starts and step % train_frequency == 0:
                expected += [("update", (torch.optim.Adam, rate, 16, 0.8))] * gradient_steps
    assert notes[: len(expected)] == expected
    evaluation = notes[len(expected) :]
    assert evaluation and all(name == "act" and note[1] == () for name, note in evaluation)
    assert len(networks) == 1


def test_before_it_learns_actions_are_uniform_and_each_environment_has_its_own(tmp_path):
    flags = {"learning_starts": 3000, "total_timesteps": 3001, "buffer_size": 3000}
    train(script, tmp_path, **FEW | flags)
    actions = np.array([[step[1] for step in env.steps[:1000]] for env in Diary.made[:3]])
    shares = (actions - LOW) / (HIGH - LOW)  # 3 environments, 1000 steps, 2 numbers
    assert shares.min() >= 0 and shares.max() <= 1
    columns = shares.transpose(0, 2, 1).reshape(6, 1000)
    for column in columns:
        np.testing.assert_allclose(np.histogram(column, 4, (0, 1))[0] / 1000, 0.25, atol=0.05)
    assert abs(np.corrcoef(columns) - np.eye(6)).max() < 0.12


def test_every_environment_gets_the_action_that_was_chosen_for_it(tmp_path, monkeypatch):
    """Each with noise of its own."""
    acts = recorded(monkeypatch, script, "act")
    train(script, tmp_path, **FEW)
    chosen, noises = {}, []
    for (_, obs, *noise), actions in acts:
        chosen |= {tuple(row): scaled(action) for row, action in zip(obs.tolist(), actions)}
        noises += [part.ravel() for part in noise]
    for i, env in enumerate(Diary.made):
        for obs, action, *_ in env.steps[17 * (i < 3) :]:  # 51 random steps of the first three
            np.testing.assert_allclose(action, chosen[tuple(obs)], rtol=1e-3, atol=1e-5)
    noises = np.concatenate(noises)
    assert len(np.unique(noises)) == noises.size == 549 * 2


def test_at_the_start_the_target_critics_are_the_critics(tmp_path):
    never = {"train_frequency": 1000, "total_timesteps": 100, "seed": 3}
    state, _ = train(script, tmp_path, **FEW | never)
    first = make_agent(seed=3).state_dict()
    for name, weights in state["network"].items():
        assert torch.equal(weights, first[name]) or name.startswith("obs_statistics")
    for name, weights in state["target_critics"].items():
        assert torch.equal(weights, first[f"critics.{name}"])


def test_losses_are_logged_every_1000_steps(tmp_path, monkeypatch):
    """Rounds of 3 steps: what is due at 1000 is logged at the end of its round, 1002."""
    metrics, update = [], script.update
    monkeypatch.setattr(script, "update", lambda *a: metrics.append(update(*a)) or metrics[-1])
    _, points = train(script, tmp_path, **FEW | {"total_timesteps": 3003, "train_frequency": 50})
    steps = (1002, 2001, 3000)  # the first update is at step 50
    for tag in metrics[0]:
        values = [metrics[step // 50 - 1][tag].item() for step in steps]
        np.testing.assert_allclose(points[tag], list(zip(steps, values)), rtol=1e-5)
    rates = [1e-2 - 6e-3 * (step - 3) / 3003 for step in steps]
    np.testing.assert_allclose(points["charts/learning_rate"], list(zip(steps, rates)), rtol=1e-5)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    spoilt = {"losses/td_loss": torch.tensor(math.nan)}
    monkeypatch.setattr(script, "update", lambda *arguments: dict(spoilt))
    with pytest.raises(script.UsageError, match="not finite"):
        train(script, tmp_path, **FEW | {"total_timesteps": 1200})


@pytest.mark.parametrize("env_id, values", [
    ("TruncatesOnSphere-v0", {1: 1 / (1 - 0.8)}),
    ("TerminatesOnSphere-v0", {1: 1 + 0.8 + 0.8**2, 0: 1 + 0.8, -1: 1}),
])  # fmt: skip
def test_a_time_limit_is_not_the_end_of_the_world(tmp_path, env_id, values):
    """Truncated for ever, a reward of 1 is worth 1 / (1 - gamma). Else it counts to the end.

    As these episodes are shorter than gamma is long, the first of them needs a wider support.
    """
    flags = {"env_id": env_id, "gamma": 0.8, "total_timesteps": 750, "train_frequency": 3}
    flags |= {"initial_alpha": 1e-30, "tau": 0.3, "max_return": 12.0, "num_atoms": 25}
    state, _ = train(script, tmp_path, **FEW | flags)
    agent = make_agent(obs_size=1, max_return=12.0, num_atoms=25)
    agent.load_state_dict(state["network"] | {"low": agent.low, "high": agent.high})
    scaler = script.ReturnScaler(3, 0.8, 12.0)
    scaler.load_state_dict(state["return_scaler"])
    for obs, value in values.items():
        rows = torch.full((50, 1), float(obs)), 2 * torch.rand(50, 2) - 1, torch.full((50,), value)
        seen = script.normalize(script.Batch(*rows, rows[0], None), agent, scaler)
        logits = agent.critics(seen.obs, seen.actions).detach()
        found = script.expected_return(logits, agent.critics.atoms).mean()
        torch.testing.assert_close(found, seen.rewards[0], rtol=0.1, atol=0)


def test_the_least_settings_are_allowed():
    script.Args(learning_starts=16, batch_size=16, buffer_size=16, total_timesteps=17, num_atoms=2)
    for change in ({"learning_starts": 15}, {"buffer_size": 15}, {"total_timesteps": 16}):
        with pytest.raises(ValueError, match="--" + next(iter(change)).replace("_", "-")):
            least = {"learning_starts": 16, "buffer_size": 16, "total_timesteps": 17}
            script.Args(**{"batch_size": 16} | least | change)


def test_every_setting_of_the_algorithm_changes_the_outcome(tmp_path):
    def outcome(**settings):
        state, _ = train(script, tmp_path, **FEW | {"total_timesteps": 120} | settings)
        return [weights.tolist() for weights in state["network"].values()]

    check_settings(script, outcome, {
        "seed": 2, "total_timesteps": 130, "num_envs": 4, "learning_rate": 5e-3,
        "final_learning_rate": 1e-2, "buffer_size": 60, "gamma": 0.9, "num_atoms": 12,
        "max_return": 4.0, "tau": 0.5, "batch_size": 15, "learning_starts": 80,
        "train_frequency": 5, "gradient_steps": 2, "actor_width": 7, "actor_blocks": 2,
        "critic_width": 9, "critic_blocks": 1, "num_critics": 2, "initial_alpha": 0.5,
    })  # fmt: skip
