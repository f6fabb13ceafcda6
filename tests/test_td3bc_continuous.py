"""The mathematics of td3bc_continuous.py: by hand, in closed form, by brute force; its statistics.

What td3_continuous.py and iql_continuous.py have word for word, as target and data, they test.
"""

import inspect

import gymnasium as gym
import iql_continuous
import numpy as np
import pytest
import td3_continuous
import td3bc_continuous as script
import torch
from diary import Diary, Pays, check_settings, recorded, train
from gymnasium.spaces import Box
from torch import nn

# For the tests that all scripts share.
TINY = (
    "--total-timesteps 1000 --num-envs 2 --dataset-size 700 --batch-size 32 --hidden-size 32 "
    "--policy-frequency 3 --checkpoint-frequency 250 --eval-frequency 350 --eval-episodes 5"
)
OWN = "continuous"
OWN_FLAGS = "--total-timesteps 3000 --dataset-size 3000 --hidden-size 32"
WRONG_SPACES = ["CartPole-v1", "cases:HugeBounds-v0"]
DIVERGES = "--learning-rate 1e30"
BAD = [
    ("--precision float16", "--precision"),
    ("--q-weight -1", "--q-weight"),
    ("--policy-frequency 0", "--policy-frequency"),
    ("--noise-clip nan", "--noise-clip"),
    ("--dataset-size 0", "--dataset-size"),
    ("--dataset nowhere", "nowhere"),
    ("--dataset td3bc_continuous.py", "td3bc_continuous.py"),
]
PLAYS = False  # while it trains: its data are recorded
LEARNS = [
    ("--env-id cases:Aim-v0 --total-timesteps 5000 --dataset-size 5000 --hidden-size 64", 8),
]  # fmt: skip

OF_TD3 = [
    "Critics", "Bfloat16Linear", "mlp", "to_bounds", "make_env", "use_bfloat16", "make_network",
    "smooth", "td_target", "update_target", "Batch", "update", "evaluate", "Envs",
]  # fmt: skip
OF_IQL = ["random_play", "read_dataset", "read_run", "read_arrays"]


@pytest.mark.parametrize(
    "name, other",
    [(name, td3_continuous) for name in OF_TD3] + [(name, iql_continuous) for name in OF_IQL],
)
def test_what_others_have_too_is_the_same_and_tested_there(name, other):
    ours, theirs = (inspect.getsource(getattr(s, name)) for s in (script, other))
    assert ours == theirs


# ---- policy_loss ---------------------------------------------------------------------------------


def test_policy_loss_by_hand():
    """Two rows of three numbers: squares 1, 0, 4 and 0, 9, 4, whose mean over all six is 3.

    |Q| is 2 and 6, its mean 4, the mean of Q is -2; so lambda is alpha / 4.
    """
    policy_actions = torch.tensor([[1.0, 0.0, 2.0], [0.0, 3.0, -1.0]])
    actions = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    q_values = torch.tensor([2.0, -6.0])
    for alpha, expected in ((0.0, 3.0), (2.0, 3 + 0.5 * 2), (2.5, 3 + 0.625 * 2)):
        loss = script.policy_loss(q_values, policy_actions, actions, alpha)
        assert loss.shape == () and loss.item() == pytest.approx(expected)


def random_rows(size=7, numbers=3):
    torch.manual_seed(0)
    q_values = (3 * torch.randn(size).double() - 1).requires_grad_()
    policy_actions, actions = 2 * torch.rand(2, size, numbers).double() - 1
    return q_values, policy_actions.requires_grad_(), actions


def test_lambda_is_a_constant_for_the_gradient():
    """Each Q has the slope -lambda / B. If lambda moved, they would sum to another number."""
    q_values, policy_actions, actions = random_rows()
    script.policy_loss(q_values, policy_actions, actions, 2.5).backward()
    weight = 2.5 / np.abs(q_values.detach().numpy()).mean()
    np.testing.assert_allclose(q_values.grad, np.full(7, -weight / 7))
    expected = 2 * (policy_actions.detach() - actions) / (7 * 3)  # a mean over rows and numbers
    torch.testing.assert_close(policy_actions.grad, expected)


@pytest.mark.parametrize("factor", [1e-6, 0.1, 3.0, 1e6])
def test_the_scale_of_q_does_not_matter(factor):
    """Neither for the loss nor for what the policy learns through Q, here a sum of sines."""
    _, policy_actions, actions = random_rows()
    found = []
    for scale in (1.0, factor):
        policy_actions.grad = None
        q_values = scale * (policy_actions * torch.tensor([1.0, 2.0, -3.0])).sin().sum(1)
        loss = script.policy_loss(q_values, policy_actions, actions, 2.5)
        loss.backward()
        found.append((loss.detach(), policy_actions.grad))
    for ours, expected in zip(found[1], found[0]):
        torch.testing.assert_close(ours, expected)


class Slope(nn.Module):
    """Q_1 = base + slope a in any state. Q_2 goes another way: no policy should follow it."""

    def __init__(self, base, slope):
        super().__init__()
        self.base = nn.Parameter(torch.tensor(base).double())
        self.slope = nn.Parameter(torch.tensor(slope).double())

    def forward(self, obs, actions):
        first = self.base + actions @ self.slope
        return torch.stack([first, -5 * first + 3])


class OneAction(nn.Module):
    """pi is the same in all states."""

    def __init__(self, base, slope):
        super().__init__()
        self.pi = nn.Parameter(torch.zeros(len(slope)).double())
        self.critics = Slope(base, slope)

    def forward(self, obs):
        return self.pi.expand(len(obs), -1)


@pytest.mark.parametrize("base", [8.0, -8.0])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 2.5])
def test_the_optimum_between_the_recorded_actions_and_the_maximum_of_q(alpha, base):
    """For Q = base + slope a it is known. With m, the mean of the recorded actions:

    The slope of the loss is 0 where 2 (pi - m) / K = lambda * slope, so that pi is on the line from
    m up the slope. With lambda * |Q(pi)| = alpha, lambda solves a quadratic equation. If Q is
    negative, it has two solutions; that nearer to m is stable.
    """
    slope, count = np.array([0.9, -0.3]), 40
    torch.manual_seed(0)
    actions = 2 * torch.rand(count, 2).double() - 1
    middle = actions.numpy().mean(0)
    sign, at_middle = np.sign(base), base + slope @ middle
    # lambda * (at_middle + lambda * K / 2 * |slope|^2) = sign * alpha
    roots = np.roots([slope @ slope, at_middle, -sign * alpha])
    weight = min(x for x in roots if x > -1e-9 and sign * (at_middle + x * slope @ slope) > 0)
    expected = middle + weight * slope

    agent, zeros = OneAction(base, slope), torch.zeros(count).double()
    batch = script.Batch(zeros[:, None], actions, zeros, zeros[:, None], zeros == 0)
    args = script.Args(q_weight=alpha)
    optimizer = torch.optim.SGD([agent.pi], lr=0.3)
    for _ in range(300):
        agent.zero_grad()
        script.compute_gradient(agent, agent, batch, torch.zeros(count, 2), True, args)
        optimizer.step()
    np.testing.assert_allclose(agent.pi.detach(), expected, rtol=1e-4, atol=1e-7)
    if alpha == 0:
        np.testing.assert_allclose(agent.pi.detach(), middle, atol=1e-6)
    else:  # by brute force: with lambda as it is there, no action near it is better
        near = expected + 0.1 * np.stack(np.meshgrid(*[np.linspace(-1, 1, 41)] * 2), -1)
        distances = ((near[..., None, :] - actions.numpy()) ** 2).mean((-1, -2))
        losses = distances - alpha / abs(base + slope @ expected) * (base + near @ slope)
        assert np.unravel_index(losses.argmin(), losses.shape) == (20, 20)


# ---- update --------------------------------------------------------------------------------------

LOW, HIGH = np.float32([-2, 0]), np.float32([2, 10])


def make_agent(obs_size=2, hidden_size=16, seed=0):
    torch.manual_seed(seed)
    return script.Agent(obs_size, LOW, HIGH, hidden_size)


def random_batch(size=40):
    obs, next_obs = torch.randn(2, size, 2).double()
    actions = 2 * torch.rand(size, 2).double() - 1
    return script.Batch(obs, actions, torch.randn(size).double(), next_obs, torch.rand(size) < 0.3)


@pytest.mark.parametrize("moves_policy", [True, False])
@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_update_goes_down_the_gradients_each_of_the_weights_of_its_own(moves_policy, compile):
    """Separate losses, at the old weights. All target networks differ from those they follow.

    Large noise, so that both clips count. A gradient that is left over is no matter.
    """
    agent, reference, batch = make_agent().double(), make_agent().double(), random_batch()
    targets, old_targets = make_agent(seed=1).double(), make_agent(seed=1).double()
    for weights in agent.parameters():
        weights.grad = torch.ones_like(weights)
    args = script.Args(
        gamma=0.9, tau=0.25, policy_noise=0.9, noise_clip=0.8, q_weight=1.7, compile=compile
    )
    if compile:
        torch.compiler.reset()
        torch._dynamo.config.trace_autograd_ops = True
    optimizer = torch.optim.SGD(agent.parameters(), lr=0.1)
    torch.manual_seed(5)
    metrics = script.update(agent, targets, optimizer, batch, moves_policy, args)

    torch.manual_seed(5)
    noise = (0.9 * torch.randn(40, 2)).clip(-0.8, 0.8)  # of each row and number its own
    next_actions = (old_targets.actor(batch.next_obs).tanh() + noise).clip(-1, 1)
    assert (noise.abs() == 0.8).any() and (next_actions.abs() == 1).any()
    inputs = torch.cat([batch.next_obs, next_actions], 1)
    first, second = old_targets.critics.networks
    next_values = torch.minimum(first(inputs), second(inputs)).squeeze(1)
    target = torch.where(batch.terminated, batch.rewards, batch.rewards + 0.9 * next_values)
    losses, first, second = [], *reference.critics.networks
    for critic in first, second:
        errors = critic(torch.cat([batch.obs, batch.actions], 1)).squeeze(1) - target.detach()
        losses.append((errors**2).mean() / 2)
    actions = reference.actor(batch.obs).tanh()
    values = first(torch.cat([batch.obs, actions], 1)).squeeze(1)
    weight = 1.7 / float(sum(abs(value) for value in values.tolist()) / 40)
    distances = ((actions - batch.actions) ** 2).sum(1) / 2  # two numbers
    losses.append((distances - weight * values).mean())

    moved = [first, second, reference.actor][: 2 + moves_policy]
    weights = [list(network.parameters()) for network in moved]
    gradients = [torch.autograd.grad(*pair, retain_graph=True) for pair in zip(losses, weights)]
    for old, gradient in zip(sum(weights, []), sum(gradients, ())):
        old.data -= 0.1 * gradient
    expected, followed = dict(reference.named_parameters()), dict(targets.named_parameters())
    for name, found in agent.named_parameters():
        torch.testing.assert_close(found, expected[name], msg=name)
    for name, old in old_targets.named_parameters():
        share = 0.25 if moves_policy else 0
        torch.testing.assert_close(followed[name], old + share * (expected[name] - old), msg=name)
    q_values = make_agent().double().critics(batch.obs, batch.actions)
    values = {"losses/td_loss": losses[0] + losses[1], "losses/q_values": q_values.mean()}
    if moves_policy:
        values["losses/policy_loss"] = losses[2]
    for tag, value in metrics.items():
        assert value.item() == pytest.approx(values.pop(tag).item(), rel=1e-5), tag
        assert not value.requires_grad
    assert not values


def test_alpha_0_is_behaviour_cloning():
    """Whatever is paid, the policy is the mean of the actions that were recorded in a state."""
    states = torch.tensor([[-1.0], [1.0]])
    rows = torch.arange(64) % 2
    torch.manual_seed(0)
    actions = (0.5 * states[rows] + 0.3 * torch.randn(64, 2)).clamp(-1, 1)
    policies = []
    for pay in (0.0, 100.0):
        agent = make_agent(obs_size=1)
        optimizer = torch.optim.Adam(agent.parameters(), lr=1e-2, fused=True)
        rewards = pay * actions.sum(1)
        batch = script.Batch(states[rows], actions, rewards, states[rows], rows > 5)
        for _ in range(250):
            script.update(agent, agent, optimizer, batch, True, script.Args(q_weight=0.0))
        policies.append(agent(states).detach())
    assert torch.equal(*policies)
    expected = torch.stack([actions[rows == state].mean(0) for state in (0, 1)])
    torch.testing.assert_close(policies[0], expected, atol=2e-3, rtol=0)


def test_without_imitation_it_is_td3():
    """Of large alpha and Q alone: the policy's gradient is that of TD3, times lambda."""
    batch, noise = random_batch(), torch.randn(40, 2).double()
    gradients = []
    for module, args in ((script, script.Args(q_weight=1e12)), (td3_continuous, script.Args())):
        agent = make_agent().double()
        module.compute_gradient(agent, make_agent(seed=1).double(), batch, noise, True, args)
        gradients.append([weights.grad for weights in agent.parameters()])
    agent = make_agent().double()
    q_values = agent.critics(batch.obs, agent(batch.obs))[0]
    weight = 1e12 / q_values.abs().mean().item()
    of_actor = len(list(agent.actor.parameters()))
    for i, (ours, theirs) in enumerate(zip(*gradients)):
        torch.testing.assert_close(ours, theirs * (weight if i < of_actor else 1))


# ---- Normalisation -------------------------------------------------------------------------------


def test_statistics_are_those_of_the_data():
    """Of each number by itself; 0.001 is added to a deviation, so that of a constant is not 0."""
    obs = np.random.default_rng(0).normal([3, -50, 0], [1, 20, 1e-4], (501, 3)).astype(np.float32)
    obs = np.concatenate([obs, np.full((501, 1), 7, np.float32)], 1)
    mean, deviation = script.measure(torch.from_numpy(obs))
    np.testing.assert_allclose(mean, obs.astype(float).mean(0))
    np.testing.assert_allclose(deviation, obs.astype(float).std(0) + 1e-3)  # divides by D
    assert deviation[3] == 1e-3
    normalised = script.normalize(torch.from_numpy(obs), mean, deviation)
    np.testing.assert_allclose(normalised.mean(0), 0, atol=1e-9)
    np.testing.assert_allclose(normalised.std(0, correction=0)[:2], 1, atol=2e-3)
    assert (normalised[:, 3] == 0).all()


def test_statistics_of_large_numbers_are_not_rounded_away():
    obs = torch.arange(200_000)[:, None] % 2 + 1e6  # 1000000 and 1000001
    mean, deviation = script.measure(obs.float())
    assert mean.item() == 1e6 + 0.5 and deviation.item() == 0.501


def test_the_actor_normalises_what_the_environment_shows():
    """After the statistics have changed, too; `play` scales its actions to their bounds."""
    agent = make_agent()
    obs = torch.randn(50, 2) * torch.tensor([30.0, 0.1]) + torch.tensor([100.0, -1.0])
    for mean, deviation in (([0.0, 0.0], [1.0, 1.0]), ([100.0, -1.0], [30.0, 0.1])):
        agent.obs_mean[:], agent.obs_deviation[:] = torch.tensor(mean), torch.tensor(deviation)
        expected = agent((obs - torch.tensor(mean)) / torch.tensor(deviation)).detach().numpy()
        np.testing.assert_allclose(script.Actor(agent)(obs.numpy()), expected, atol=2e-5)
        played = script.play(script.Args(), agent, obs.numpy())
        np.testing.assert_allclose(played, LOW + (expected + 1) / 2 * (HIGH - LOW), atol=2e-4)
        assert played.dtype == np.float32
    assert set(agent.state_dict()) >= {"obs_mean", "obs_deviation"}


# ---- The loop ------------------------------------------------------------------------------------

FEW = dict(
    env_id="ContinuousDiary-v0", total_timesteps=300, num_envs=3, dataset_size=400, batch_size=16,
    hidden_size=16, eval_episodes=3,
)  # fmt: skip


def write_data(path, count=50, seed=0):
    """Observations whose two numbers differ in place and scale; the next ones are elsewhere."""
    rng = np.random.default_rng(seed)
    arrays = {
        "observations": rng.normal([5, -40], [0.5, 9], (count, 2)),
        "next_observations": rng.normal([-2, 100], [3, 1], (count, 2)),
        "actions": rng.uniform(LOW, HIGH, (count, 2)), "rewards": rng.normal(size=count),
        "terminals": rng.random(count) < 0.2,
    }  # fmt: skip
    np.savez(path, **arrays)
    return arrays


def test_every_step_is_a_gradient_step_on_normalised_rows_of_the_data(tmp_path, monkeypatch):
    """Next observations are normalised by the statistics of observations, too."""
    arrays = write_data(tmp_path / "data.npz")
    mean = arrays["observations"].mean(0)
    deviation = arrays["observations"].std(0) + 1e-3
    known = np.concatenate([
        (arrays["observations"] - mean) / deviation,
        2 * (arrays["actions"] - LOW) / (HIGH - LOW) - 1, arrays["rewards"][:, None],
        (arrays["next_observations"] - mean) / deviation, arrays["terminals"][:, None],
    ], 1)  # fmt: skip
    updates, networks, update = [], set(), script.update

    def noting(agent, target_agent, optimizer, batch, moves_policy, args):
        networks.add((agent, target_agent))
        rate = optimizer.param_groups[0]["lr"]
        updates.append((batch, moves_policy, type(optimizer), rate, args.gamma))
        return update(agent, target_agent, optimizer, batch, moves_policy, args)

    monkeypatch.setattr(script, "update", noting)
    settings = {"dataset": str(tmp_path / "data.npz"), "policy_frequency": 3, "gamma": 0.8}
    state, _ = train(script, tmp_path, **FEW | settings)
    assert len(updates) == 300 == state["envs"]["steps"]
    assert [step for step, note in enumerate(updates, 1) if note[1]] == list(range(3, 301, 3))
    assert {note[2:] for note in updates} == {(torch.optim.Adam, 1e-3, 0.8)}
    drawn = set()
    for batch, *_ in updates:
        assert [len(column) for column in batch] == [16] * 5
        columns = [column.reshape(16, -1).double().numpy() for column in batch]
        distances = abs(known - np.concatenate(columns, 1)[:, None]).max(2)
        assert distances.min(1).max() < 1e-4
        rows = set(distances.argmin(1).tolist())
        assert len(rows) > 7  # each is drawn by itself
        drawn |= rows
    assert len(drawn) == 50
    ((agent, target_agent),) = networks
    pointers = {weights.data_ptr() for weights in agent.parameters()}
    assert pointers.isdisjoint(weights.data_ptr() for weights in target_agent.parameters())
    for part, expected in (("obs_mean", mean), ("obs_deviation", deviation)):
        np.testing.assert_allclose(state["network"][part], expected, rtol=1e-5)


def test_at_the_start_the_target_networks_are_the_trained_ones(tmp_path):
    never = {"policy_frequency": 1000, "seed": 3}
    state, _ = train(script, tmp_path, **FEW | never)
    first = make_agent(seed=3).state_dict()
    for name, weights in first.items():
        assert torch.equal(weights, state["target_agent"][name])
        if name.startswith("actor"):  # which never moved
            assert torch.equal(weights, state["network"][name])


def test_evaluation_and_load_policy_normalise_by_the_statistics_of_the_data(tmp_path):
    """Of random play, here: observations are from 0 to 1."""
    Diary.made.clear()
    result = script.train(script.Args(**FEW | {"total_timesteps": 100}, runs_dir=str(tmp_path)))
    steps = [step for env in Diary.made[1:4] for step in env.steps]  # the first is never played
    seen = np.array([step[0] for step in steps])
    assert len(seen) == 402
    network = script.read_checkpoint(result.folder)["network"]
    np.testing.assert_allclose(network["obs_mean"], seen.mean(0), rtol=1e-5)
    np.testing.assert_allclose(network["obs_deviation"], seen.std(0) + 1e-3, rtol=1e-5)
    agent = make_agent()
    agent.load_state_dict({
        name: torch.zeros(2) if name == "obs_mean" else torch.ones(2) if name == "obs_deviation"
        else weights for name, weights in network.items()
    })  # fmt: skip
    evaluated = [step for env in Diary.made[4:7] for step in env.steps]
    assert evaluated
    policy = script.load_policy(result.folder)
    for obs, action, *_ in evaluated:
        normalised = (np.array(obs) - seen.mean(0)) / (seen.std(0) + 1e-3)
        squashed = torch.tanh(agent.actor(torch.tensor(normalised).float())).detach().numpy()
        expected = LOW + (squashed + 1) / 2 * (HIGH - LOW)
        np.testing.assert_allclose(action, expected, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(policy(np.array(obs)), action, rtol=1e-5, atol=1e-6)


def all_equal(ours, theirs):
    """Of nested dictionaries and lists with tensors: the same to the bit."""
    if isinstance(ours, torch.Tensor):
        return torch.equal(ours, theirs)
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(all_equal(ours[k], theirs[k]) for k in ours)
    if isinstance(ours, list | tuple):
        return len(ours) == len(theirs) and all(map(all_equal, ours, theirs))
    return ours == theirs


PARTS = "network", "target_agent", "optimizer", "random_state"


@pytest.mark.parametrize("kind", ["random", "file"])
def test_a_resumed_run_is_the_same_to_the_bit(tmp_path, kind):
    """Stopped after 51 of 110 steps, which is not a step of the policy."""
    write_data(tmp_path / "data.npz")
    settings = FEW | {"dataset": "random", "total_timesteps": 110}
    if kind == "file":
        settings["dataset"] = str(tmp_path / "data.npz")
    whole, _ = train(script, tmp_path, **settings)
    half = script.train(
        script.Args(**settings | {"total_timesteps": 51}, runs_dir=str(tmp_path))
    ).folder
    resumed, _ = train(script, tmp_path, **settings, resume=half)
    assert resumed["envs"]["steps"] == 110
    assert all(all_equal(resumed[part], whole[part]) for part in PARTS)
    assert resumed["network"]["obs_deviation"].ne(1).all()


def test_killed_before_the_first_step_it_still_measures_the_data(tmp_path, monkeypatch):
    """The first checkpoint is older than random play."""

    def killed(args):
        raise KeyboardInterrupt

    settings = FEW | {"total_timesteps": 40}
    whole, _ = train(script, tmp_path / "whole", **settings)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(script, "random_play", killed)
        train(script, tmp_path / "killed", **settings)
    ((folder),) = (tmp_path / "killed").iterdir()
    assert script.read_checkpoint(folder)["envs"]["steps"] == 0
    resumed, _ = train(script, tmp_path / "killed", **settings, resume=str(folder))
    assert all(all_equal(resumed[part], whole[part]) for part in PARTS)


def test_statistics_belong_to_the_network_also_when_it_goes_on_with_other_data(
    tmp_path, monkeypatch
):
    write_data(tmp_path / "data.npz")
    arrays = write_data(tmp_path / "more.npz", 80, seed=1)
    arrays["observations"] += 1000
    np.savez(tmp_path / "more.npz", **arrays)
    settings = FEW | {"dataset": str(tmp_path / "data.npz"), "total_timesteps": 30}
    folder = script.train(script.Args(**settings, runs_dir=str(tmp_path))).folder
    before = script.read_checkpoint(folder)["network"]
    updates = recorded(monkeypatch, script, "update")
    more = {"dataset": str(tmp_path / "more.npz"), "total_timesteps": 40}
    after, _ = train(script, tmp_path, **settings | more, resume=folder)
    for part in ("obs_mean", "obs_deviation"):
        assert torch.equal(before[part], after["network"][part])
    assert len(updates) == 10
    obs = updates[0][0][3].obs * before["obs_deviation"] + before["obs_mean"]
    assert (obs - torch.tensor([1005.0, 960.0])).abs().max() < 60


def test_losses_are_logged_every_1000_steps(tmp_path, monkeypatch):
    """Of the policy's loss, the newest: it moves at 7, 14, ... 100 stands for 1000 here."""
    assert script.LOG_FREQUENCY == 1000
    monkeypatch.setattr(script, "LOG_FREQUENCY", 100)
    metrics, update = [], script.update
    monkeypatch.setattr(script, "update", lambda *a: metrics.append(update(*a)) or metrics[-1])
    settings = {"total_timesteps": 201, "policy_frequency": 7}
    _, points = train(script, tmp_path, **FEW | settings)
    for tag in ("losses/td_loss", "losses/q_values", "losses/policy_loss"):
        period = 7 if tag == "losses/policy_loss" else 1
        values = [metrics[step // period * period - 1][tag].item() for step in (100, 200)]
        np.testing.assert_allclose(points[tag], list(zip((100, 200), values)), rtol=1e-5)


class PaysContinuously(Pays):
    """With actions that change nothing."""

    action_space = Box(-1, 1, (1,), np.float32)


gym.register("TruncatesImitated-v0", entry_point=PaysContinuously, kwargs={"truncates": True})
gym.register("TerminatesImitated-v0", entry_point=PaysContinuously, kwargs={"truncates": False})


@pytest.mark.parametrize("env_id, value", [
    ("TruncatesImitated-v0", 1 / (1 - 0.8)), ("TerminatesImitated-v0", 1 / (1 - 0.8 * 2 / 3))
])  # fmt: skip
def test_a_time_limit_is_not_the_end_of_the_world(tmp_path, env_id, value):
    """Truncated for ever, a reward of 1 is worth 1 / (1 - gamma); terminated, less.

    The only observation is 1, always: normalised, 0.
    """
    settings = {"env_id": env_id, "gamma": 0.8, "total_timesteps": 800, "tau": 0.2}
    state, _ = train(script, tmp_path, **FEW | settings | {"learning_rate": 5e-3})
    agent = script.Agent(1, np.float32([-1]), np.float32([1]), 16)
    agent.load_state_dict(state["network"])
    assert agent.obs_mean == 1 and agent.obs_deviation == pytest.approx(1e-3)
    found = agent.critics(torch.zeros(50, 1), 2 * torch.rand(50, 1) - 1).detach()
    torch.testing.assert_close(found.mean(-1), torch.full((2,), value), rtol=0.08, atol=0)


def test_every_setting_of_the_algorithm_changes_the_outcome(tmp_path):
    write_data(tmp_path / "data.npz")

    def outcome(**settings):
        state, _ = train(script, tmp_path, **FEW | {"total_timesteps": 20} | settings)
        return [weights.tolist() for weights in state["network"].values()]

    check_settings(script, outcome, {
        "seed": 2, "total_timesteps": 24, "num_envs": 4, "dataset": str(tmp_path / "data.npz"),
        "dataset_size": 500, "learning_rate": 5e-4, "gamma": 0.9, "q_weight": 1.0, "tau": 0.5,
        "batch_size": 15, "hidden_size": 15, "policy_noise": 0.3, "noise_clip": 0.1,
        "policy_frequency": 1,
    })  # fmt: skip
