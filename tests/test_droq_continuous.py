"""The mathematics of droq_continuous.py: by hand, loss by loss, by frequencies.

What sac_continuous.py and tqc_continuous.py have word for word is tested there.
"""

import inspect
import math
from types import SimpleNamespace

import droq_continuous as script
import gymnasium as gym
import numpy as np
import pytest
import sac_continuous
import torch
import torch.nn.functional as F
import tqc_continuous
from diary import Diary, Pays, check_episodes, check_settings, recorded, side_by_side, train
from gymnasium.spaces import Box
from torch.distributions import Independent, Normal, TanhTransform, TransformedDistribution

# For the tests that all scripts share.
TINY = (
    "--total-timesteps 1000 --num-envs 2 --learning-starts 100 --buffer-size 700 --batch-size 32 "
    "--hidden-size 32 --train-frequency 20 --gradient-steps 3 --policy-delay 2 --dropout 0.1 "
    "--checkpoint-frequency 250 --eval-frequency 350 --eval-episodes 5"
)
OWN = "continuous"
OWN_FLAGS = (
    "--total-timesteps 3000 --hidden-size 32 --batch-size 64 --gradient-steps 2 --policy-delay 2"
)
WRONG_SPACES = ["CartPole-v1", "cases:HugeBounds-v0"]
DIVERGES = "--learning-rate 1e30"
BAD = [
    ("--dropout 1", "--dropout"),
    ("--subset-size 3", "--subset-size"),
    ("--num-critics 0", "--num-critics"),
    ("--policy-delay 0", "--policy-delay"),
    ("--learning-starts 128", "--batch-size"),
    ("--gradient-steps 0", "--gradient-steps"),
]
LEARNS = []  # a longer run takes minutes: see the record
# What others published, by the record's name after `<script>__`: shown beside our results.
PUBLISHED = {}


@pytest.mark.parametrize("name, other", [
    *((name, sac_continuous) for name in (
        "Bfloat16Linear", "mlp", "Actor", "act", "to_bounds", "update_target", "ReplayBuffer",
        "evaluate",
    )),
    ("sample_actions", tqc_continuous), ("temperature_loss", tqc_continuous),
])  # fmt: skip
def test_what_others_have_too_is_the_same_and_tested_there(name, other):
    ours, theirs = (inspect.getsource(getattr(module, name)) for module in (script, other))
    assert ours == theirs


# ---- dropout_masks, the critics ------------------------------------------------------------------


def make_agent(obs_size=2, low=(-2, 0), high=(2, 10), seed=0, **settings):
    """An agent that has learned nothing yet, whose norms are not those at first."""
    torch.manual_seed(seed)
    args = script.Args(**{"hidden_size": 16} | settings)
    agent = script.Agent(obs_size, np.float32(low), np.float32(high), args)
    for critic in agent.critics.networks if seed == 0 else ():
        for weights in critic.norms.parameters():
            weights.data.add_(0.3 * torch.randn_like(weights))
    return agent


@pytest.mark.parametrize("probability", [0.01, 0.3])
def test_units_are_dropped_and_the_others_keep_the_mean(probability):
    torch.manual_seed(0)
    masks = script.dropout_masks(probability, 2, 500, 500)
    assert masks.shape == (2, 500, 500)
    dropped = masks == 0
    assert dropped.float().mean().item() == pytest.approx(probability, abs=0.002)
    np.testing.assert_allclose(masks[~dropped], 1 / (1 - probability), rtol=1e-6)
    shares = dropped.float().mean((0, 1))
    assert shares.std().item() == pytest.approx((probability / 1000) ** 0.5, rel=0.25)


def test_without_dropout_nothing_is_changed():
    assert torch.equal(script.dropout_masks(0.0, 2, 3), torch.ones(2, 3))


def plain(critic, rows, masks, layer_norm=True):
    """The network, written down once more: dropout, then the norm, then ReLU."""
    for layer, norm, mask in zip(critic.hidden, critic.norms, masks):
        rows = F.linear(rows, layer.weight, layer.bias) * mask
        if layer_norm:
            rows = (rows - rows.mean(1, keepdim=True)) / (
                rows.var(1, correction=0, keepdim=True) + 1e-5
            ).sqrt()
            rows = norm.weight * rows + norm.bias
        rows = rows.clamp(min=0)
    return F.linear(rows, critic.head.weight, critic.head.bias).squeeze(1)


@pytest.mark.parametrize("layer_norm", [True, False])
def test_each_critic_has_its_own_units_and_dropped_ones(layer_norm):
    agent = make_agent(obs_size=3, num_critics=4, layer_norm=layer_norm)
    obs, actions = torch.randn(30, 3), torch.randn(30, 2)
    masks = script.dropout_masks(0.4, 4, 2, 30, 16)
    found = agent.critics(obs, actions, masks)
    assert found.shape == (4, 30)
    for q_values, critic, mask in zip(found, agent.critics.networks, masks):
        expected = plain(critic, torch.cat([obs, actions], 1), mask, layer_norm)
        torch.testing.assert_close(q_values, expected)


def test_what_a_gradient_step_draws():
    torch.manual_seed(0)
    args, counts = (
        script.Args(num_critics=5, subset_size=2, batch_size=6, hidden_size=7),
        np.zeros(5),
    )
    for number in range(3000):
        moves_policy = number % 2 == 0
        noise, masks, subset = script.draw_chance(3, moves_policy, args)
        assert noise.shape == (2, 6, 3) and masks.shape == (2 + moves_policy, 5, 2, 6, 7)
        assert len(set(subset.tolist())) == 2
        counts[subset.numpy()] += 1
    np.testing.assert_allclose(counts / 3000, 2 / 5, atol=0.03)


def test_bfloat16_is_for_the_product_between_the_hidden_layers_only():
    box, found = Box(-1, 1, (2,)), {}
    envs = SimpleNamespace(action_space=box, obs=np.zeros((1, 3), np.float32))
    for precision in ("float32", "bfloat16"):
        agent = script.make_network(script.Args(precision=precision), envs)
        parts = dict(agent.named_modules()).items()
        found[precision] = {name for name, part in parts if isinstance(part, script.Bfloat16Linear)}
        assert {weight.dtype for weight in agent.parameters()} == {torch.float32}
    expected = {"actor.2", *map("critics.networks.{}.hidden.1".format, "01")}
    assert found == {"float32": set(), "bfloat16": expected}


# ---- The gradients -------------------------------------------------------------------------------


def squashed(means, log_std):
    """The distribution of an action in (-1, 1), PyTorch's own."""
    normal = Independent(Normal(means, log_std.exp()), 1)
    return TransformedDistribution(normal, TanhTransform(cache_size=1))


def test_target_by_hand():
    """The least of three, less the temperature times log pi; nothing follows the third."""
    next_q = torch.tensor([[1.0, 5.0, 70.0], [3.0, -4.0, 80.0], [2.0, 8.0, 75.0]])
    rewards, log_probs = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([-0.5, 2.0, 90.0])
    terminated, alpha = torch.tensor([False, False, True]), torch.tensor(0.2)
    found = script.td_target(rewards, terminated, next_q, log_probs, alpha, 0.5)
    expected = torch.tensor([1 + 0.5 * (1 + 0.2 * 0.5), 2 + 0.5 * (-4 - 0.2 * 2), 3])
    torch.testing.assert_close(found, expected)


def test_policy_loss_by_hand():
    """0.5 * (1 - 3) / 2 less the mean of 4 and of 1."""
    q_values = torch.tensor([[1.0, 0.0], [4.0, 1.0], [7.0, 2.0]])
    found = script.policy_loss(q_values, torch.tensor([1.0, -3.0]), torch.tensor(0.5))
    assert found.item() == pytest.approx(0.5 * (1 - 3) / 2 - (4 + 1) / 2)


def random_batch(size=40, obs_size=2, action_size=2):
    obs, next_obs = torch.randn(2, size, obs_size).double()
    actions = 2 * torch.rand(size, action_size).double() - 1
    return script.Batch(obs, actions, torch.randn(size).double(), next_obs, torch.rand(size) < 0.3)


@pytest.mark.parametrize("moves_policy, autotune", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_update_goes_down_the_gradients_each_of_the_weights_of_its_own(
    moves_policy, autotune, compile
):
    """Separate losses from PyTorch's own distribution, all at the old weights, for three critics,
    of which a target takes two. A gradient that is left over is no matter.
    """
    sizes = {"num_critics": 3, "dropout": 0.2, "batch_size": 40}
    agent, reference = (make_agent(**sizes).double() for _ in range(2))
    target_critics = make_agent(seed=3, **sizes).double().critics
    kept, batch = [weights.clone() for weights in target_critics.parameters()], random_batch()
    for weights in agent.parameters():
        weights.grad = torch.ones_like(weights)
    for each in (agent, reference):
        each.log_alpha.data.fill_(math.log(0.3))
    args = script.Args(
        gamma=0.9, alpha=0.7, autotune=autotune, compile=compile, tau=0.1, hidden_size=16, **sizes
    )
    if compile:
        torch.compiler.reset()
        torch._dynamo.config.trace_autograd_ops = True
    optimizer = torch.optim.SGD(agent.parameters(), lr=0.1)
    torch.manual_seed(5)
    metrics = script.update(agent, target_critics, optimizer, batch, moves_policy, args)

    torch.manual_seed(5)
    noise, masks, subset = script.draw_chance(2, moves_policy, args)
    alpha, both = 0.3 if autotune else 0.7, subset.tolist()
    means, log_std = reference.actor(batch.next_obs).split(2, 1)
    next_actions = (means + log_std.exp() * noise[0]).tanh().detach()
    next_log_probs = squashed(means, log_std).log_prob(next_actions).detach()
    later, now = (
        torch.cat(pair, 1) for pair in ((batch.next_obs, next_actions), (batch.obs, batch.actions))
    )
    targets = make_agent(seed=3, **sizes).double().critics.networks
    lesser = torch.minimum(*(plain(targets[k], later, masks[0][k]).detach() for k in both))
    target = batch.rewards + 0.9 * (lesser - alpha * next_log_probs)
    target = torch.where(batch.terminated, batch.rewards, target)
    networks = list(reference.critics.networks)
    q_values = [plain(net, now, mask) for net, mask in zip(networks, masks[1])]
    losses = [((q - target) ** 2 / 2).mean() for q in q_values]
    values = {"losses/td_loss": sum(losses) * 2 / 3, "losses/q_values": sum(q_values).mean() / 3}
    moved = networks
    if moves_policy:
        policy = squashed(*reference.actor(batch.obs).split(2, 1))
        actions = (policy.base_dist.mean + policy.base_dist.stddev * noise[1]).tanh()
        log_probs, inputs = policy.log_prob(actions), torch.cat([batch.obs, actions], 1)
        mean = sum(plain(net, inputs, mask) for net, mask in zip(networks, masks[2])) / 3
        losses.append((alpha * log_probs - mean).mean())
        moved = [*networks, reference.actor]
        values |= {"losses/policy_loss": losses[3], "losses/entropy": -log_probs.mean()}
        values["losses/alpha"] = torch.tensor(alpha)
    weights = [list(network.parameters()) for network in moved]
    gradients = [torch.autograd.grad(*pair, retain_graph=True) for pair in zip(losses, weights)]
    for old, gradient in zip(sum(weights, []), sum(gradients, ())):
        old.data -= 0.1 * gradient
    if moves_policy and autotune:  # its target is an entropy of -2
        reference.log_alpha.data -= 0.1 * -0.3 * (log_probs.mean().item() - 2)
    expected = reference.state_dict()
    for name, found in agent.state_dict().items():
        torch.testing.assert_close(found, expected[name], msg=name)
    for old, new, source in zip(kept, target_critics.parameters(), agent.critics.parameters()):
        torch.testing.assert_close(new, 0.9 * old + 0.1 * source)
    for tag, value in metrics.items():
        assert value.item() == pytest.approx(values.pop(tag).item(), rel=1e-5), tag
        assert not value.requires_grad
    assert not values


@pytest.mark.parametrize("autotune", [True, False])
def test_the_policy_becomes_the_soft_optimum(autotune):
    """For Q = -10 (a - 0.3)^2 in every state, this is proportional to exp(Q / alpha).

    With a fixed temperature of 1, nearly a Gaussian of variance 1 / 20. Learned, the temperature is
    the one at which the entropy is -1.
    """
    sizes = {"hidden_size": 32, "batch_size": 64}
    agent = make_agent(obs_size=1, low=[-1], high=[1], **sizes)
    args = script.Args(gamma=0.0, autotune=autotune, alpha=1.0, **sizes)
    optimizer = torch.optim.Adam(agent.parameters(), lr=1e-2)
    target_critics = make_agent(obs_size=1, low=[-1], high=[1], **sizes).critics
    for _ in range(1000):
        actions = 2 * torch.rand(64, 1) - 1
        ends, obs = torch.ones(64, dtype=torch.bool), torch.randn(64, 1)
        rewards = -10 * (actions - 0.3).square().squeeze(1)
        batch = script.Batch(obs, actions, rewards, obs, ends)
        script.update(agent, target_critics, optimizer, batch, True, args)
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


gym.register("TruncatesDropped-v0", entry_point=PaysContinuously, kwargs={"truncates": True})
gym.register("TerminatesDropped-v0", entry_point=PaysContinuously, kwargs={"truncates": False})

FEW = dict(
    env_id="ContinuousDiary-v0", total_timesteps=1200, num_envs=3, learning_starts=50,
    batch_size=16, buffer_size=1000, hidden_size=16, train_frequency=4, gradient_steps=1,
    policy_delay=1, eval_episodes=3, learning_rate=1e-2,
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

    def note_update(agent, target_critics, optimizer, batch, moves_policy, args):
        networks.add((agent, target_critics))
        assert target_critics is not agent.critics
        group = optimizer.param_groups[0]
        rates = type(optimizer), group["lr"]
        return *rates, len(batch.obs), moves_policy, args.gamma

    spy("act", lambda actor, obs, noise=0.0: (obs.tolist(), np.shape(noise)))
    spy("update", note_update)
    train(script, tmp_path, **FEW | {
        "num_envs": num_envs, "train_frequency": train_frequency, "gradient_steps": gradient_steps,
        "learning_starts": learning_starts, "policy_delay": policy_delay,
        "total_timesteps": 400, "gamma": 0.8,
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
                    note = torch.optim.Adam, 1e-2, 16, moves_policy, 0.8
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
    ("TruncatesDropped-v0", {1: 1 / (1 - 0.8)}),
    ("TerminatesDropped-v0", {1: 1 + 0.8 + 0.8**2, 0: 1 + 0.8, -1: 1}),
])  # fmt: skip
def test_a_time_limit_is_not_the_end_of_the_world(tmp_path, env_id, values):
    """Truncated for ever, a reward of 1 is worth 1 / (1 - gamma). Else it counts to the end."""
    flags = {"env_id": env_id, "gamma": 0.8, "total_timesteps": 3000, "train_frequency": 3}
    flags |= {"autotune": False, "alpha": 0.0, "learning_rate": 3e-3}
    flags |= {"policy_delay": 10**6, "tau": 0.05}  # the first policy takes all actions, as here
    state, _ = train(script, tmp_path, **FEW | flags)
    agent = make_agent(obs_size=1)
    agent.load_state_dict(state["network"] | {"low": agent.low, "high": agent.high})
    for obs, value in values.items():
        obs, actions = torch.full((50, 1), float(obs)), 2 * torch.rand(50, 2) - 1
        found = agent.critics(obs, actions, torch.ones(2, 2, 50, 16)).detach()
        means = found.mean(1)  # a wrong bootstrap is off by more than 2
        torch.testing.assert_close(means, torch.full((2,), float(value)), rtol=0, atol=0.5)


def test_the_least_settings_are_allowed():
    script.Args(learning_starts=16, batch_size=16, buffer_size=16, total_timesteps=17, alpha=0.0)
    for change in ({"learning_starts": 15}, {"buffer_size": 15}, {"total_timesteps": 16}):
        with pytest.raises(ValueError, match="--" + next(iter(change)).replace("_", "-")):
            least = {"learning_starts": 16, "buffer_size": 16, "total_timesteps": 17}
            script.Args(**{"batch_size": 16} | least | change)
    script.Args(num_critics=1, subset_size=1, dropout=0.0)
    with pytest.raises(ValueError, match="--subset-size"):
        script.Args(num_critics=3, subset_size=4)


def test_every_setting_of_the_algorithm_changes_the_outcome(tmp_path):
    def outcome(**settings):
        few = FEW | {"total_timesteps": 250, "autotune": False}
        state, _ = train(script, tmp_path, **few | settings)
        return [weights.tolist() for weights in state["network"].values()]

    check_settings(script, outcome, {
        "seed": 2, "total_timesteps": 260, "num_envs": 4, "learning_rate": 5e-3, "buffer_size": 100,
        "gamma": 0.9, "tau": 0.5, "batch_size": 15, "learning_starts": 100, "train_frequency": 5,
        "gradient_steps": 2, "hidden_size": 15, "num_critics": 3, "subset_size": 1, "dropout": 0.3,
        "layer_norm": False, "policy_delay": 2, "autotune": True, "alpha": 0.5,
    })  # fmt: skip
