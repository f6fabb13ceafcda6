"""The mathematics of crossq_continuous.py: by hand, against PyTorch's own, loss by loss.

What sac_continuous.py has word for word, as the replay buffer, is tested there.
"""

import inspect
import math
from types import SimpleNamespace

import crossq_continuous as script
import gymnasium as gym
import numpy as np
import pytest
import sac_continuous
import torch
import torch.nn.functional as F
from diary import Diary, Pays, check_episodes, check_settings, recorded, side_by_side, train
from gymnasium.spaces import Box
from torch.distributions import Independent, Normal, TanhTransform, TransformedDistribution

# For the tests that all scripts share.
TINY = (
    "--total-timesteps 1000 --num-envs 2 --learning-starts 100 --buffer-size 700 --batch-size 32 "
    "--hidden-size 32 --critic-hidden-size 48 --train-frequency 20 --gradient-steps 2 "
    "--checkpoint-frequency 250 --eval-frequency 350 --eval-episodes 5"
)
OWN = "continuous"
OWN_FLAGS = "--total-timesteps 3000 --hidden-size 32 --critic-hidden-size 32 --batch-size 64"
WRONG_SPACES = ["CartPole-v1", "cases:HugeBounds-v0"]
DIVERGES = "--learning-rate 1e30"
BAD = [
    ("--critic-hidden-size 0", "--critic-hidden-size"),
    ("--policy-delay 0", "--policy-delay"),
    ("--learning-starts 128", "--batch-size"),
    ("--batch-size 1", "--batch-size"),
    ("--adam-beta 1", "--adam-beta"),
    ("--gradient-steps 0", "--gradient-steps"),
]
LEARNS = [  # always the middle: 0
    ("--env-id cases:Aim-v0 --total-timesteps 4000 --hidden-size 64 --critic-hidden-size 64", 7)
]
# What others published, by the record's name after `<script>__`: shown beside our results.
PUBLISHED = {
    "HalfCheetah-v5": "SimbaV2's CrossQ 8112 (100k, v4)",
    "Hopper-v5": "SimbaV2's CrossQ 2764 (100k, v4)",
}


@pytest.mark.parametrize("name", [
    "Bfloat16Linear", "act", "to_bounds", "sample_actions", "policy_loss", "temperature_loss",
    "ReplayBuffer",
])  # fmt: skip
def test_what_sac_has_too_is_tested_there(name):
    ours, theirs = (inspect.getsource(getattr(module, name)) for module in (script, sac_continuous))
    assert ours == theirs


# ---- Batch renormalisation -----------------------------------------------------------------------


def make_norm(size=3, seed=0):
    """A layer in double precision, all of whose numbers are random."""
    torch.manual_seed(seed)
    norm = script.BatchRenorm(size).double()
    for tensor in (norm.weight.data, norm.bias.data, norm.mean):
        tensor.normal_()
    norm.variance.uniform_(0.5, 2)
    return norm


@pytest.mark.parametrize("learning", [True, False])
def test_at_first_it_is_batch_normalisation(learning):
    """PyTorch's own: outputs and all three gradients."""
    norm, gradient = make_norm(), torch.randn(7, 3).double()
    rows = (2 * torch.randn(7, 3).double() + 1).requires_grad_()
    inputs = rows, norm.weight, norm.bias
    running = norm.mean.clone(), norm.variance.clone()
    expected = F.batch_norm(rows, *running, *inputs[1:], training=learning, eps=1e-3)
    found = norm(rows, learning)
    torch.testing.assert_close(found, expected)
    pairs = zip(*(torch.autograd.grad(part, inputs, gradient) for part in (found, expected)))
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs)


def test_running_averages_follow_by_one_percent_and_only_if_it_learns():
    norm, rows = script.BatchRenorm(2), torch.tensor([[1.0, 10.0], [3.0, 10.0]])
    norm(rows, False)
    assert norm.mean.tolist() == [0, 0] and norm.variance.tolist() == [1, 1]
    norm(rows, True)
    norm(rows, True)
    torch.testing.assert_close(norm.mean, (1 - 0.99**2) * torch.tensor([2.0, 10.0]))
    torch.testing.assert_close(norm.variance, torch.tensor([1.0, 0.99**2]))
    assert norm.batches == 2


def test_a_row_is_normalised_without_the_others():
    norm, rows = make_norm(), torch.randn(7, 3).double()
    alone = torch.cat([norm(row[None], False) for row in rows])
    torch.testing.assert_close(norm(rows, False), alone)
    assert not torch.allclose(norm(rows, True), alone)


def test_renormalised_within_the_bounds_a_batch_is_as_the_running_averages_have_it():
    """But its gradient is that of r * x + d, where x is normalised by the batch; r, d are constants."""
    norm, gradient = make_norm(), torch.randn(50, 3).double()
    norm.batches.fill_(script.RENORM_STARTS)
    rows = torch.randn(50, 3).double().requires_grad_()
    by_averages = norm(rows, False)
    r = ((rows.var(0, correction=0) + 1e-3) / (norm.variance + 1e-3)).sqrt().detach()
    by_batch = F.batch_norm(rows, None, None, norm.weight * r, training=True, eps=1e-3)
    found = norm(rows, True)
    torch.testing.assert_close(found, by_averages)
    ours, theirs = (torch.autograd.grad(part, rows, gradient)[0] for part in (found, by_batch))
    torch.testing.assert_close(ours, theirs)


def test_renormalisation_has_bounds():
    """Two columns: a batch of other means, then of other variances, by hand."""
    norm = script.BatchRenorm(2).double()
    norm.batches.fill_(script.RENORM_STARTS)
    norm.mean.copy_(torch.tensor([100.0, 0.0]))  # a batch has -1 and 1: d is -100, clipped to -5
    norm.variance.copy_(torch.tensor([1.0, 0.01]))  # r is about 10, clipped to 3
    ends = torch.tensor([[-1.0, -1.0], [1.0, 1.0]]).double()
    x = 1 / math.sqrt(1 + 1e-3)
    expected = [[-x - 5, -3 * x], [x - 5, 3 * x]]
    torch.testing.assert_close(norm(ends, True), torch.tensor(expected).double())
    norm.mean.fill_(-100.0)
    norm.variance.copy_(torch.tensor([1.0, 100.0]))  # r is about 1/10, clipped to 1/3; d is 5, 5
    expected = [[-x + 5, -x / 3 + 5], [x + 5, x / 3 + 5]]
    torch.testing.assert_close(norm(ends, True), torch.tensor(expected).double())


def test_renormalisation_begins_after_many_batches(monkeypatch):
    monkeypatch.setattr(script, "RENORM_STARTS", 3)
    norm = make_norm()
    for count in range(5):
        rows = torch.randn(50, 3).double()
        by_batch = F.batch_norm(rows, None, None, norm.weight, norm.bias, True, eps=1e-3)
        by_averages = norm(rows, False)
        expected = by_averages if count >= 3 else by_batch
        torch.testing.assert_close(norm(rows, True), expected)


# ---- The networks --------------------------------------------------------------------------------


def make_agent(obs_size=2, low=(-2, 0), high=(2, 10), hidden_size=16, critic_size=12, seed=0):
    """An agent that has learned nothing yet, but whose running averages are random."""
    torch.manual_seed(seed)
    sizes = hidden_size, critic_size
    agent = script.Agent(obs_size, np.float32(low), np.float32(high), *sizes)
    for norm in agent.modules():
        if isinstance(norm, script.BatchRenorm):
            for tensor in (norm.weight.data, norm.bias.data, norm.mean):
                tensor.add_(0.3 * torch.randn_like(tensor))
            norm.variance.uniform_(0.5, 2)
    return agent


def plain(network, rows, learning):
    """The network, written down once more. Learning, its running averages take the rows in."""
    for i, (norm, layer) in enumerate(zip(network.norms, network.layers)):
        rows = rows.clamp(min=0) if i > 0 else rows
        mean, variance = norm.mean.clone(), norm.variance.clone()
        if learning:
            norm.mean.mul_(0.99).add_(0.01 * rows.mean(0).detach())
            norm.variance.mul_(0.99).add_(0.01 * rows.var(0, correction=0).detach())
        ours = mean, variance, norm.weight, norm.bias
        rows = F.batch_norm(rows, *ours, training=learning, momentum=0.0, eps=1e-3)
        rows = F.linear(rows, layer.weight, layer.bias)
    return rows


def test_the_actor_is_the_policy_also_after_an_update():
    """Of running averages, too. And the evaluation plays the squashed means."""
    agent, obs = make_agent(), 3 * torch.randn(50, 2)
    actor = script.Actor(agent)
    for _ in range(2):
        noise = torch.randn(50, 2)
        means, log_std = plain(agent.actor, obs, False).detach().split(2, 1)
        expected = (means + log_std.clamp(-20, 2).exp() * noise).tanh()
        found = script.act(actor, obs.numpy(), noise.numpy())
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)
        played = script.play(script.Args(), agent, obs.numpy())
        expected = means.tanh() * torch.tensor([2, 5]) + torch.tensor([0, 5])
        np.testing.assert_allclose(played, expected, rtol=1e-3, atol=1e-5)
        with torch.no_grad():
            for weights in agent.parameters():
                weights += 0.3 * torch.randn_like(weights)
        agent(obs, learning=True)


def test_deviations_have_bounds():
    agent = make_agent()
    last = agent.actor.layers[-1]
    last.weight.data.zero_()
    last.bias.data[:] = torch.tensor([1.0, 2.0, -50.0, 50.0])
    means, log_std = agent(torch.zeros(1, 2))
    assert means.tolist() == [[1, 2]] and log_std.tolist() == [[-20, 2]]
    means, deviations = script.Actor(agent)(np.zeros((1, 2), np.float32))
    np.testing.assert_allclose(means, [[1, 2]])
    np.testing.assert_allclose(deviations, np.exp([[-20, 2]]), rtol=1e-6)


def test_widths_and_normalised_layers():
    agent = make_agent(obs_size=3, hidden_size=8, critic_size=9)
    for network, inputs, width, outputs in [
        (agent.actor, 3, 8, 4), *((critic, 5, 9, 1) for critic in agent.critics.networks)
    ]:  # fmt: skip
        shapes = [tuple(layer.weight.shape) for layer in network.layers]
        assert shapes == [(width, inputs), (width, width), (outputs, width)]
        assert [len(norm.mean) for norm in network.norms] == [inputs, width, width]
    q_values = agent.critics(torch.randn(7, 3), torch.randn(7, 2))
    assert q_values.shape == (2, 7) and (q_values[0] != q_values[1]).all()


def test_bfloat16_is_for_the_product_between_the_hidden_layers_only():
    box, found = Box(-1, 1, (2,)), {}
    envs = SimpleNamespace(action_space=box, obs=np.zeros((1, 3), np.float32))
    for precision in ("float32", "bfloat16"):
        agent = script.make_network(script.Args(precision=precision), envs)
        parts = dict(agent.named_modules()).items()
        found[precision] = {name for name, part in parts if isinstance(part, script.Bfloat16Linear)}
        assert {weight.dtype for weight in agent.parameters()} == {torch.float32}
    expected = {f"{name}.layers.1" for name in ("actor", *map("critics.networks.{}".format, "01"))}
    assert found == {"float32": set(), "bfloat16": expected}


# ---- The gradients -------------------------------------------------------------------------------


def squashed(means, log_std):
    """The distribution of an action in (-1, 1), PyTorch's own."""
    normal = Independent(Normal(means, log_std.exp()), 1)
    return TransformedDistribution(normal, TanhTransform(cache_size=1))


def test_target_by_hand():
    """The lesser of both, less the temperature times log pi; nothing follows the third."""
    next_q = torch.tensor([[1.0, 5.0, 70.0], [3.0, -4.0, 80.0]])
    rewards, log_probs = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([-0.5, 2.0, 90.0])
    terminated, alpha = torch.tensor([False, False, True]), torch.tensor(0.2)
    found = script.td_target(rewards, terminated, next_q, log_probs, alpha, 0.5)
    expected = torch.tensor([1 + 0.5 * (1 + 0.2 * 0.5), 2 + 0.5 * (-4 - 0.2 * 2), 3])
    torch.testing.assert_close(found, expected)


def random_batch(size=40, obs_size=2, action_size=2):
    obs, next_obs = torch.randn(2, size, obs_size).double()
    actions = 2 * torch.rand(size, action_size).double() - 1
    return script.Batch(obs, actions, torch.randn(size).double(), next_obs, torch.rand(size) < 0.3)


@pytest.mark.parametrize("moves_policy, autotune", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_update_goes_down_the_gradients_each_of_the_weights_of_its_own(
    moves_policy, autotune, compile
):
    """Separate losses from PyTorch's own distribution, all at the old weights.

    The critics see both halves in one batch, and in J_pi the running averages with this batch in.
    A gradient that is left over is no matter.
    """
    agent, reference, batch = make_agent().double(), make_agent().double(), random_batch()
    for weights in agent.parameters():
        weights.grad = torch.ones_like(weights)
    for each in (agent, reference):
        each.log_alpha.data.fill_(math.log(0.3))
    args = script.Args(gamma=0.9, alpha=0.7, autotune=autotune, compile=compile)
    if compile:
        torch.compiler.reset()
        torch._dynamo.config.trace_autograd_ops = True
    optimizer = torch.optim.SGD(agent.parameters(), lr=0.1)
    torch.manual_seed(5)
    metrics = script.update(agent, optimizer, batch, moves_policy, args)

    torch.manual_seed(5)
    noise = torch.randn(2, 40, 2)
    alpha = 0.3 if autotune else 0.7
    means, log_std = plain(reference.actor, batch.next_obs, False).split(2, 1)
    next_actions = (means + log_std.exp() * noise[0]).tanh().detach()
    next_log_probs = squashed(means, log_std).log_prob(next_actions).detach()
    now, later = (
        torch.cat(pair, 1)
        for pair in ((batch.obs, batch.actions), (batch.next_obs, next_actions))
    )
    networks = list(reference.critics.networks)
    both = torch.stack([plain(net, torch.cat([now, later]), True).squeeze(1) for net in networks])
    next_values = both[:, 40:].min(0).values.detach() - alpha * next_log_probs
    target = torch.where(batch.terminated, batch.rewards, batch.rewards + 0.9 * next_values)
    losses = [((q_values - target) ** 2 / 2).mean() for q_values in both[:, :40]]
    values = {"losses/td_loss": sum(losses), "losses/q_values": both[:, :40].mean()}
    moved = networks
    if moves_policy:
        policy = squashed(*plain(reference.actor, batch.obs, True).split(2, 1))
        actions = (policy.base_dist.mean + policy.base_dist.stddev * noise[1]).tanh()
        log_probs, inputs = policy.log_prob(actions), torch.cat([batch.obs, actions], 1)
        lesser = torch.minimum(*(plain(net, inputs, False).squeeze(1) for net in networks))
        losses.append((alpha * log_probs - lesser).mean())
        moved = [*networks, reference.actor]
        values |= {"losses/policy_loss": losses[2], "losses/entropy": -log_probs.mean()}
        values["losses/alpha"] = torch.tensor(alpha)
    weights = [list(network.parameters()) for network in moved]
    gradients = [torch.autograd.grad(*pair, retain_graph=True) for pair in zip(losses, weights)]
    for old, gradient in zip(sum(weights, []), sum(gradients, ())):
        old.data -= 0.1 * gradient
    if moves_policy and autotune:  # its target is an entropy of -2
        reference.log_alpha.data -= 0.1 * -0.3 * (log_probs.mean().item() - 2)
    expected = reference.state_dict()
    for name, found in agent.state_dict().items():
        if not name.endswith("batches"):
            torch.testing.assert_close(found, expected[name], msg=name)
    for tag, value in metrics.items():
        assert value.item() == pytest.approx(values.pop(tag).item(), rel=1e-5), tag
        assert not value.requires_grad
    assert not values


def test_what_moves_in_which_step():
    """Adam has momentum, but between its steps the policy stands still; and its averages do."""
    agent = make_agent()
    optimizer = torch.optim.Adam(agent.parameters(), lr=0.01, fused=True)
    networks = {"actor": agent.actor, "critics": agent.critics}
    batch = random_batch()
    batch = script.Batch(*(part.float() for part in batch[:4]), batch.terminated)
    for moves_policy in (True, False, False, True, False):
        before = {name: [w.clone() for w in net.state_dict().values()]
                  for name, net in networks.items()}  # fmt: skip
        script.update(agent, optimizer, batch, moves_policy, script.Args())
        for name, network in networks.items():
            for old, new in zip(before[name], network.state_dict().values()):
                assert torch.equal(old, new) != (moves_policy or name == "critics"), name
    steps = [{optimizer.state[weights]["step"].item() for weights in network.parameters()}
             for network in (agent.actor, agent.critics)]  # fmt: skip
    assert steps == [{2}, {5}]
    assert {norm.batches.item() for norm in agent.actor.norms} == {2}
    for critic in agent.critics.networks:
        assert {norm.batches.item() for norm in critic.norms} == {5}


def test_what_comes_next_is_normalised_with_what_is():
    """A next action that is never taken: apart, it would be shifted to the middle of the others."""
    agent, obs = make_agent(), torch.zeros(30, 2)
    taken, next_taken = torch.full((30, 2), -0.5), torch.full((30, 2), 0.5)
    now, later = agent.critics(
        torch.cat([obs, obs]), torch.cat([taken, next_taken]), learning=True
    ).chunk(2, dim=1)
    assert (now - later).abs().min() > 1e-3
    apart = [agent.critics(obs, actions, learning=True) for actions in (taken, next_taken)]
    torch.testing.assert_close(*apart, rtol=0, atol=1e-4)


@pytest.mark.parametrize("autotune", [True, False])
def test_the_policy_becomes_the_soft_optimum(autotune):
    """For Q = -10 (a - 0.3)^2 in every state, this is proportional to exp(Q / alpha).

    With a fixed temperature of 1, nearly a Gaussian of variance 1 / 20. Learned, the temperature is
    the one at which the entropy is -1.
    """
    agent = make_agent(obs_size=1, low=[-1], high=[1], hidden_size=32, critic_size=32)
    args = script.Args(gamma=0.0, autotune=autotune, alpha=1.0)
    optimizer = torch.optim.Adam(agent.parameters(), lr=1e-2)
    for _ in range(1000):
        actions = 2 * torch.rand(64, 1) - 1
        ends, obs = torch.ones(64, dtype=torch.bool), torch.randn(64, 1)
        rewards = -10 * (actions - 0.3).square().squeeze(1)
        script.update(agent, optimizer, script.Batch(obs, actions, rewards, obs, ends), True, args)
    means, log_std = agent(torch.randn(10_000, 1))
    actions, log_probs = script.sample_actions(means, log_std, torch.randn(10_000, 1))
    variance = 1 / 20
    if autotune:
        assert -log_probs.mean().item() == pytest.approx(-1, abs=0.1)
        # The entropy of a Gaussian is log(2 pi e variance) / 2, its variance alpha / 20.
        variance = math.exp(2 * -1) / (2 * math.pi * math.e)
        assert agent.log_alpha.exp().item() == pytest.approx(20 * variance, rel=0.3)
    assert actions.var().item() == pytest.approx(variance, rel=0.25)
    assert actions.mean().item() == pytest.approx(0.3, abs=0.1)


# ---- The loop ------------------------------------------------------------------------------------


class PaysContinuously(Pays):
    """Where episodes terminate, 1, 0 and -1 tell the step: else noise would seem to be value."""

    action_space = Box(-1, 1, (2,), np.float32)

    def step(self, action):
        obs, *outcome = super().step(action)
        return obs if self.truncates else np.float32([1 - self.t]), *outcome


gym.register("TruncatesCrossed-v0", entry_point=PaysContinuously, kwargs={"truncates": True})
gym.register("TerminatesCrossed-v0", entry_point=PaysContinuously, kwargs={"truncates": False})

FEW = dict(
    env_id="ContinuousDiary-v0", total_timesteps=1200, num_envs=3, learning_starts=50,
    batch_size=16, buffer_size=1000, hidden_size=16, critic_hidden_size=12, train_frequency=4,
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
        expected_action, *expected, i = happened[tuple(obs)]
        np.testing.assert_allclose(scaled(action), expected_action, rtol=1e-5, atol=1e-5)
        assert found[1:] == expected[1:] and found[0] == pytest.approx(expected[0], rel=1e-6)
        drawn.add(tuple(obs))
    assert len(drawn) == 1200 if size == 5000 else 150 < len(drawn) < 250
    newest = [tuple(env.steps[-1][0]) for env in Diary.made[:num_envs]]
    assert drawn.issuperset(newest)
    check_episodes(points, side_by_side(num_envs))


@pytest.mark.parametrize(
    "num_envs, train_frequency, gradient_steps, learning_starts, policy_delay",
    [
        (1, 1, 1, 16, 2), (1, 7, 3, 50, 2), (4, 4, 1, 50, 3), (4, 10, 1, 50, 1), (3, 5, 2, 50, 2),
        (8, 1, 1, 101, 5),
    ],
)  # fmt: skip
def test_the_loop_does_each_thing_when_it_is_due(
    tmp_path, monkeypatch, num_envs, train_frequency, gradient_steps, learning_starts,
    policy_delay,
):  # fmt: skip
    """In a plain loop over the steps: first a round of them, then what is due after each.

    Gradient steps are counted from the start, also where they are left out as nothing is learned.
    """
    notes, networks = [], set()

    def spy(name, note):
        def spying(*arguments, function=getattr(script, name), **keywords):
            notes.append((name, note(*arguments, **keywords)))
            return function(*arguments, **keywords)

        monkeypatch.setattr(script, name, spying)

    def note_update(agent, optimizer, batch, moves_policy, args):
        networks.add(agent)
        group = optimizer.param_groups[0]
        rates = type(optimizer), group["lr"], group["betas"]
        return *rates, len(batch.obs), moves_policy, args.gamma

    spy("act", lambda actor, obs, noise=0.0: (obs.tolist(), np.shape(noise)))
    spy("update", note_update)
    train(script, tmp_path, **FEW | {
        "num_envs": num_envs, "train_frequency": train_frequency, "gradient_steps": gradient_steps,
        "learning_starts": learning_starts, "policy_delay": policy_delay,
        "total_timesteps": 400, "gamma": 0.8, "adam_beta": 0.7,
    })  # fmt: skip
    steps, expected, count = side_by_side(num_envs), [], 0
    for first in range(0, 400, num_envs):
        if first >= learning_starts:
            seen = [step[0] for _, step in steps[first : first + num_envs]]
            expected.append(("act", (seen, (num_envs, 2))))
        for step in range(first + 1, first + num_envs + 1):
            for _ in range(gradient_steps * (step % train_frequency == 0)):
                count += 1
                if step >= learning_starts:
                    moves_policy = count % policy_delay == 0
                    note = torch.optim.Adam, 1e-2, (0.7, 0.999), 16, moves_policy, 0.8
                    expected.append(("update", note))
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
            np.testing.assert_allclose(action, chosen[tuple(obs)], rtol=1e-3, atol=1e-5)
    noises = np.concatenate(noises)
    assert len(np.unique(noises)) == noises.size == 549 * 2
    agent = make_agent()
    agent.load_state_dict(state["network"])
    obs, actions, *_ = zip(*(step for env in Diary.made[3:] for step in env.steps))
    played = script.play(script.Args(), agent, np.float32(obs))
    np.testing.assert_allclose(actions, played, rtol=1e-3, atol=1e-5)


def test_losses_are_logged_every_1000_steps(tmp_path, monkeypatch):
    """Rounds of 3 steps: what is due at 1000 is logged at the end of its round, 1002.

    Of what the policy's step gives, the newest: updates are at 10, 20, ..., its at 70, 140, ...
    """
    metrics, update = [], script.update
    monkeypatch.setattr(script, "update", lambda *a: metrics.append(update(*a)) or metrics[-1])
    flags = {"total_timesteps": 3003, "train_frequency": 10, "policy_delay": 7}
    _, points = train(script, tmp_path, **FEW | flags)
    steps = (1002, 2001, 3000)  # the first update is at step 50
    for tag in set().union(*metrics):
        period = 10 if tag in ("losses/td_loss", "losses/q_values") else 70
        newest = [step // period * period for step in steps]
        values = [metrics[step // 10 - 5][tag].item() for step in newest]
        np.testing.assert_allclose(points[tag], list(zip(steps, values)), rtol=1e-5)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    spoilt = {"losses/td_loss": torch.tensor(math.nan)}
    monkeypatch.setattr(script, "update", lambda *arguments: dict(spoilt))
    with pytest.raises(script.UsageError, match="not finite"):
        train(script, tmp_path, **FEW)


@pytest.mark.parametrize("env_id, values", [
    ("TruncatesCrossed-v0", {1: 1 / (1 - 0.8)}),
    ("TerminatesCrossed-v0", {1: 1 + 0.8 + 0.8**2, 0: 1 + 0.8, -1: 1}),
])  # fmt: skip
def test_a_time_limit_is_not_the_end_of_the_world(tmp_path, env_id, values):
    """Truncated for ever, a reward of 1 is worth 1 / (1 - gamma). Else it counts to the end."""
    flags = {"env_id": env_id, "gamma": 0.8, "total_timesteps": 3000, "train_frequency": 3}
    flags |= {"autotune": False, "alpha": 0.0, "learning_rate": 3e-3}
    flags |= {"policy_delay": 10**6}  # the first policy takes all actions, as here below
    state, _ = train(script, tmp_path, **FEW | flags)
    agent = make_agent(obs_size=1)
    agent.load_state_dict(state["network"] | {"low": agent.low, "high": agent.high})
    for obs, value in values.items():
        found = agent.critics(torch.full((50, 1), float(obs)), 2 * torch.rand(50, 2) - 1).detach()
        means = found.mean(1)  # a wrong bootstrap is off by more than 2
        torch.testing.assert_close(means, torch.full((2,), float(value)), rtol=0, atol=0.5)


def test_the_least_settings_are_allowed():
    script.Args(learning_starts=16, batch_size=16, buffer_size=16, total_timesteps=17, alpha=0.0)
    for change in ({"learning_starts": 15}, {"buffer_size": 15}, {"total_timesteps": 16}):
        with pytest.raises(ValueError, match="--" + next(iter(change)).replace("_", "-")):
            least = {"learning_starts": 16, "buffer_size": 16, "total_timesteps": 17}
            script.Args(**{"batch_size": 16} | least | change)


def test_every_setting_of_the_algorithm_changes_the_outcome(tmp_path):
    def outcome(**settings):
        few = FEW | {"total_timesteps": 250, "autotune": False}
        state, _ = train(script, tmp_path, **few | settings)
        return [weights.tolist() for weights in state["network"].values()]

    check_settings(script, outcome, {
        "seed": 2, "total_timesteps": 260, "num_envs": 4, "learning_rate": 5e-3, "buffer_size": 100,
        "gamma": 0.9, "batch_size": 15, "learning_starts": 100, "train_frequency": 5,
        "gradient_steps": 2, "hidden_size": 15, "critic_hidden_size": 15, "adam_beta": 0.9,
        "policy_delay": 2, "autotune": True, "alpha": 0.5,
    })  # fmt: skip
