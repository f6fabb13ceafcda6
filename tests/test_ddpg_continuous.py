"""The mathematics of ddpg_continuous.py: by hand, in closed form, against separate losses.

What sac_continuous.py has word for word, as the replay buffer, is tested there.
"""

import math
from types import SimpleNamespace

import ddpg_continuous as script
import gymnasium as gym
import numpy as np
import pytest
import torch
from diary import (
    Diary,
    Pays,
    check_episodes,
    check_settings,
    recorded,
    side_by_side,
    train,
)
from gymnasium.spaces import Box
from torch import nn

# For the tests that all scripts share.
TINY = (
    "--total-timesteps 1000 --num-envs 2 --learning-starts 100 --buffer-size 700 --batch-size 32 "
    "--hidden-size 32 --checkpoint-frequency 250 --eval-frequency 350 --eval-episodes 5"
)
OWN = "continuous"
OWN_FLAGS = "--total-timesteps 3000 --hidden-size 32 --batch-size 64"
WRONG_SPACES = ["CartPole-v1", "cases:HugeBounds-v0"]
DIVERGES = "--learning-rate 1e30"
BAD = [
    ("--precision float16", "--precision"),
    ("--learning-starts 128", "--batch-size"),
    ("--buffer-size 999", "--learning-starts"),
    ("--total-timesteps 1000", "--learning-starts"),
    ("--exploration-noise -0.1", "--exploration-noise"),
    ("--gradient-steps 0", "--gradient-steps"),
    ("--tau nan", "--tau"),
    ("--buffer-size 1e15", "--buffer-size"),
]
LEARNS = [("--env-id cases:Aim-v0 --total-timesteps 5000 --hidden-size 64", 9)]
# What others published, by the record's name after `<script>__`: shown beside our results.
PUBLISHED = {
    "Pendulum-v1": "Zoo -152 (20k)",
    "HalfCheetah-v5": "CleanRL 10374 (1M, an older version)",
}
# How speed.py measures the script, and beside what; its first lines explain the form.
SPEED = {
    "steps": 4_000,
    "first": 1_500,  # all programs learn from step 1,000 on, by one gradient step a step
    "peers": {
        "CleanRL's ddpg_continuous_action.py": {
            # policy_frequency 2 makes one step of the actor after every second one of the critic
            "flags": "--env-id HalfCheetah-v4 --learning-starts 1000 --policy-frequency 1",
            "equal": "one environment, compiled",
        },
        "Stable-Baselines3's DDPG": {
            "env_id": "HalfCheetah-v5",
            "num_envs": 1,
            "settings": {
                "buffer_size": 1_000_000,
                "learning_starts": 1_000,
                "batch_size": 256,
                "train_freq": 1,
                "gradient_steps": 1,
                "learning_rate": 3e-4,
                "policy_kwargs": {"net_arch": [256, 256]},
                "device": "cpu",
            },
            "equal": "one environment, compiled",
        },
    },
    "flags": "--env-id HalfCheetah-v5 --learning-starts 1000 --learning-rate 3e-4",
    "variants": {
        "one environment, compiled": "--num-envs 1 --compile",
        "one environment": "--num-envs 1",
    },
    "floors": {"floor": "1500 2500 --num-envs 1"},
}

# ---- The policy ----------------------------------------------------------------------------------


def make_agent(obs_size=2, low=(-2, 0), high=(2, 10), hidden_size=16, seed=0):
    torch.manual_seed(seed)
    return script.Agent(obs_size, np.float32(low), np.float32(high), hidden_size)


def test_the_actor_is_the_policy_also_after_an_update():
    """And the evaluation plays it without noise, in the bounds of each number of an action."""
    agent, obs = make_agent(), 3 * torch.randn(50, 2)
    actor = script.Actor(agent)
    for _ in range(2):
        expected = torch.tanh(agent.actor(obs)).detach()
        torch.testing.assert_close(agent(obs).detach(), expected)
        np.testing.assert_allclose(actor(obs.numpy()), expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(script.act(actor, obs.numpy()), actor(obs.numpy()))
        played = script.play(script.Args(), agent, obs.numpy())
        expected = expected * torch.tensor([2, 5]) + torch.tensor([0, 5])
        np.testing.assert_allclose(played, expected, rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            for weights in agent.parameters():
                weights += 0.3 * torch.randn_like(weights)


def test_noise_in_acting_is_added_to_each_number_and_clipped():
    agent = make_agent()
    agent.actor[-1].weight.data.zero_()
    agent.actor[-1].bias.data[:] = torch.tensor([0.5, -0.8]).atanh()
    noise = np.float32([[0, 0], [0.1, -0.1], [0.7, 0.7], [-2, -0.3]])
    found = script.act(script.Actor(agent), np.zeros((4, 2), np.float32), noise)
    expected = [[0.5, -0.8], [0.6, -0.9], [1, -0.1], [-1, -1]]
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_hidden_size_is_the_width_of_both_layers_of_two_networks():
    agent = make_agent(obs_size=3, hidden_size=8)
    for network, inputs, outputs in (agent.actor, 3, 2), (agent.critic.network, 5, 1):
        shapes = [tuple(weights.shape) for weights in network.parameters()]
        assert shapes == [(8, inputs), (8,), (8, 8), (8,), (outputs, 8), (outputs,)]
        assert sum(isinstance(part, nn.ReLU) for part in network) == 2
    assert agent.critic(torch.randn(7, 3), torch.randn(7, 2)).shape == (7,)


def test_bfloat16_is_for_the_product_between_the_hidden_layers_only():
    box, found = Box(-1, 1, (2,)), {}
    envs = SimpleNamespace(action_space=box, obs=np.zeros((1, 3), np.float32))
    for precision in ("float32", "bfloat16"):
        agent = script.make_network(script.Args(precision=precision), envs)
        parts = dict(agent.named_modules()).items()
        found[precision] = {name for name, part in parts if isinstance(part, script.Bfloat16Linear)}
        assert {weight.dtype for weight in agent.parameters()} == {torch.float32}
    expected = {"actor.2", "critic.network.2"}
    assert found == {"float32": set(), "bfloat16": expected}


# ---- The target ----------------------------------------------------------------------------------


def test_target_by_hand():
    """Nothing follows the third."""
    next_q, terminated = torch.tensor([1.0, -4.0, 70.0]), torch.tensor([False, False, True])
    found = script.td_target(torch.tensor([1.0, 2.0, 3.0]), terminated, next_q, 0.5)
    torch.testing.assert_close(found, torch.tensor([1 + 0.5 * 1, 2 + 0.5 * -4, 3]))


# ---- The gradients -------------------------------------------------------------------------------


def random_batch(size=40, obs_size=2, action_size=2):
    obs, next_obs = torch.randn(2, size, obs_size).double()
    actions = 2 * torch.rand(size, action_size).double() - 1
    return script.Batch(obs, actions, torch.randn(size).double(), next_obs, torch.rand(size) < 0.3)


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_update_goes_down_the_gradients_each_of_the_weights_of_its_own(compile):
    """Separate losses, at the old weights. Both target networks differ from those they follow.

    A gradient that is left over is no matter.
    """
    agent, reference, batch = make_agent().double(), make_agent().double(), random_batch()
    targets, old_targets = make_agent(seed=1).double(), make_agent(seed=1).double()
    for weights in agent.parameters():
        weights.grad = torch.ones_like(weights)
    args = script.Args(gamma=0.9, tau=0.25, compile=compile)
    if compile:
        torch.compiler.reset()
        torch._dynamo.config.trace_autograd_ops = True
    optimizer = torch.optim.SGD(agent.parameters(), lr=0.1)
    metrics = script.update(agent, targets, optimizer, batch, args)

    next_actions = old_targets.actor(batch.next_obs).tanh()
    next_values = old_targets.critic.network(torch.cat([batch.next_obs, next_actions], 1))
    following = 0.9 * next_values.squeeze(1)
    target = torch.where(batch.terminated, batch.rewards, batch.rewards + following).detach()
    critic = reference.critic.network
    q_values = critic(torch.cat([batch.obs, batch.actions], 1)).squeeze(1)
    actions = reference.actor(batch.obs).tanh()
    losses = ((q_values - target) ** 2).mean(), -critic(torch.cat([batch.obs, actions], 1)).mean()
    weights = [list(network.parameters()) for network in (critic, reference.actor)]
    gradients = [torch.autograd.grad(*pair, retain_graph=True) for pair in zip(losses, weights)]
    for old, gradient in zip(sum(weights, []), sum(gradients, ())):
        old.data -= 0.1 * gradient
    expected, followed = dict(reference.named_parameters()), dict(targets.named_parameters())
    for name, found in agent.named_parameters():
        torch.testing.assert_close(found, expected[name], msg=name)
    for name, old in old_targets.named_parameters():
        torch.testing.assert_close(followed[name], 0.75 * old + 0.25 * expected[name], msg=name)
    values = dict(zip(["losses/td_loss", "losses/policy_loss"], losses))
    values["losses/q_values"] = q_values.mean()
    for tag, value in metrics.items():
        assert value.item() == pytest.approx(values.pop(tag).item(), rel=1e-5), tag
        assert not value.requires_grad
    assert not values


class Quadratic(nn.Module):
    """Q = -(a - M s)^2."""

    def __init__(self):
        super().__init__()
        self.best = nn.Parameter(torch.randn(3, 4).double())

    def forward(self, obs, actions):
        return -(actions - obs @ self.best.T).square().sum(1)


class Linear(nn.Module):
    """pi(s) = W s."""

    def __init__(self):
        super().__init__()
        self.actor, self.critic = nn.Linear(4, 3, bias=False).double(), Quadratic()

    def forward(self, obs):
        return self.actor(obs)


def test_policy_gradient_in_closed_form():
    """J_pi = mean of (W s - M s)^2, whose gradient is 2 (W - M) times the mean of s s^T.

    The critic, through which it came, has the gradient of J_Q alone: with e = Q - y, the mean of
    4 e (a - M s) s^T.
    """
    torch.manual_seed(0)
    agent, target_agent, batch = Linear(), Linear(), random_batch(30, 4, 3)
    script.compute_gradient(agent, target_agent, batch, script.Args(gamma=0.0))
    moment = batch.obs.T @ batch.obs / 30
    expected = 2 * (agent.actor.weight - agent.critic.best) @ moment
    torch.testing.assert_close(agent.actor.weight.grad, expected.detach())
    away = batch.actions - batch.obs @ agent.critic.best.detach().T
    errors = -away.square().sum(1) - batch.rewards
    expected = 4 * (errors[:, None] * away).T @ batch.obs / 30
    torch.testing.assert_close(agent.critic.best.grad, expected)
    assert all(weights.grad is None for weights in target_agent.parameters())


def test_the_policy_becomes_the_optimum():
    """For Q = -|a - 0.3| - |b + 0.6| in one state."""
    agent = make_agent(obs_size=1, hidden_size=32)
    optimizer = torch.optim.Adam(agent.parameters(), lr=3e-3)
    best = torch.tensor([0.3, -0.6])
    for _ in range(600):
        actions = 2 * torch.rand(64, 2) - 1
        ends, zeros = torch.ones(64, dtype=torch.bool), torch.zeros(64, 1)
        batch = script.Batch(zeros, actions, -(actions - best).abs().sum(1), zeros, ends)
        script.update(agent, agent, optimizer, batch, script.Args())
    torch.testing.assert_close(agent(torch.zeros(1, 1))[0], best, atol=0.1, rtol=0)


# ---- The loop ------------------------------------------------------------------------------------


class PaysContinuously(Pays):
    action_space = Box(-1, 1, (2,), np.float32)


gym.register("TruncatesContinuous-v0", entry_point=PaysContinuously, kwargs={"truncates": True})
gym.register("TerminatesContinuous-v0", entry_point=PaysContinuously, kwargs={"truncates": False})

FEW = dict(
    env_id="ContinuousDiary-v0", total_timesteps=1200, num_envs=3, learning_starts=50,
    batch_size=16, buffer_size=1000, hidden_size=16, train_frequency=4, eval_episodes=3,
    learning_rate=1e-2,
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
    state, _ = train(script, tmp_path, **FEW | {"total_timesteps": 1800, "exploration_noise": 0.3})
    chosen, noises = {}, []
    for (_, obs, *noise), actions in acts:
        chosen |= {tuple(row): scaled(action) for row, action in zip(obs.tolist(), actions)}
        noises += noise
    for i, env in enumerate(Diary.made):
        for obs, action, *_ in env.steps[17 * (i < 3) :]:  # 51 random steps of the first three
            np.testing.assert_allclose(action, chosen[tuple(obs)], rtol=1e-4, atol=1e-5)
    noises = np.stack(noises).reshape(-1, 6)  # 583 rounds, of 3 environments with 2 numbers each
    assert len(np.unique(noises)) == noises.size == 583 * 6
    np.testing.assert_allclose(noises.std(0), 0.3, rtol=0.12)  # 4 standard errors
    assert abs(noises.mean(0)).max() < 0.05
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


@pytest.mark.parametrize("env_id, value", [
    ("TruncatesContinuous-v0", 1 / (1 - 0.8)), ("TerminatesContinuous-v0", 1 / (1 - 0.8 * 2 / 3))
])  # fmt: skip
def test_a_time_limit_is_not_the_end_of_the_world(tmp_path, env_id, value):
    """Truncated for ever, a reward of 1 is worth 1 / (1 - gamma).

    If every third step terminates, which the only state cannot foresee, v = 1 + 2/3 * gamma * v.
    """
    flags = {"env_id": env_id, "gamma": 0.8, "total_timesteps": 3000, "train_frequency": 2}
    flags |= {"tau": 0.05, "learning_rate": 3e-3, "exploration_noise": 1.0}
    state, _ = train(script, tmp_path, **FEW | flags)
    agent = make_agent(obs_size=1)
    agent.load_state_dict(state["network"] | {"low": agent.low, "high": agent.high})
    found = agent.critic(torch.ones(50, 1), 2 * torch.rand(50, 2) - 1).detach()
    torch.testing.assert_close(found.mean(-1), torch.full((), value), rtol=0.08, atol=0)


def test_the_least_settings_are_allowed():
    least = {"learning_starts": 16, "batch_size": 16, "buffer_size": 16, "total_timesteps": 17}
    script.Args(**least, exploration_noise=0.0)
    for change in ({"learning_starts": 15}, {"buffer_size": 15}, {"total_timesteps": 16}):
        with pytest.raises(ValueError, match="--" + next(iter(change)).replace("_", "-")):
            script.Args(**least | change)


def test_every_setting_of_the_algorithm_changes_the_outcome(tmp_path):
    def outcome(**settings):
        state, _ = train(script, tmp_path, **FEW | {"total_timesteps": 250} | settings)
        return [weights.tolist() for weights in state["network"].values()]

    check_settings(script, outcome, {
        "seed": 2, "total_timesteps": 260, "num_envs": 4, "learning_rate": 5e-3, "buffer_size": 100,
        "gamma": 0.9, "tau": 0.5, "batch_size": 15, "learning_starts": 100, "train_frequency": 5,
        "gradient_steps": 2, "hidden_size": 15, "exploration_noise": 0.2,
    })  # fmt: skip
