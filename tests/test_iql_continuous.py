"""The mathematics of iql_continuous.py: by hand, in closed form, in a small process; and its data.

What td3_continuous.py has word for word, as the critics, is tested there.
"""

import inspect
import math

import gymnasium as gym
import iql_continuous as script
import numpy as np
import pytest
import sac_continuous
import td3_continuous
import torch
from diary import Diary, Pays, check_settings, recorded, train
from gymnasium.spaces import Box
from torch import nn

# For the tests that all scripts share.
TINY = (
    "--total-timesteps 1000 --num-envs 2 --dataset-size 700 --batch-size 32 --hidden-size 32 "
    "--checkpoint-frequency 250 --eval-frequency 350 --eval-episodes 5"
)
OWN = "continuous"
OWN_FLAGS = "--total-timesteps 3000 --dataset-size 3000 --hidden-size 32 --reward-scale 1"
WRONG_SPACES = ["CartPole-v1", "cases:HugeBounds-v0"]
DIVERGES = "--learning-rate 1e30"
BAD = [
    ("--precision float16", "--precision"),
    ("--expectile 0.4", "--expectile"),
    ("--expectile 1", "--expectile"),
    ("--beta -1", "--beta"),
    ("--dataset-size 0", "--dataset-size"),
    ("--dataset nowhere", "nowhere"),
    ("--dataset nowhere.npz", "nowhere.npz"),
    ("--dataset iql_continuous.py", "iql_continuous.py"),
]
PLAYS = False  # while it trains: its data are recorded
LEARNS = [
    ("--env-id cases:Aim-v0 --total-timesteps 5000 --dataset-size 5000 --hidden-size 64 "
     "--reward-scale 5", 8),
]  # fmt: skip


@pytest.mark.parametrize("name", ["Critics", "Bfloat16Linear", "mlp", "to_bounds", "make_env",
                                  "update_target", "Batch", "use_bfloat16", "evaluate", "Envs"])  # fmt: skip
def test_what_td3_has_too_is_the_same_and_tested_there(name):
    ours, theirs = (inspect.getsource(getattr(s, name)) for s in (script, td3_continuous))
    assert ours == theirs


# ---- expectile_loss, td_target, log_prob, policy_loss --------------------------------------------


def expectile_of(numbers, expectile):
    """Where the weighted distances to the numbers above and below are equal: by bisection."""
    low, high = min(numbers), max(numbers)
    for _ in range(80):
        middle = (low + high) / 2
        above = sum(x - middle for x in numbers if x > middle)
        below = sum(middle - x for x in numbers if x < middle)
        more = expectile * above > (1 - expectile) * below
        low, high = (middle, high) if more else (low, middle)
    return low


@pytest.mark.parametrize("expectile", [0.5, 0.7, 0.9, 0.999])
def test_the_least_loss_is_at_the_expectile(expectile):
    q_values = torch.randn(60, dtype=torch.float64, generator=torch.manual_seed(0)) * 3 + 1
    value = q_values.new_tensor(expectile_of(q_values.tolist(), expectile)).requires_grad_()
    losses = [script.expectile_loss(q_values - value - x, expectile) for x in (-0.01, 0, 0.01)]
    assert losses[1] < min(losses[0], losses[2])
    (slope,) = torch.autograd.grad(losses[1], value)
    assert abs(slope) < 1e-6
    if expectile == 0.5:
        torch.testing.assert_close(value, q_values.mean())
        torch.testing.assert_close(losses[1], q_values.var(correction=0) / 2)
    if expectile == 0.999:
        assert q_values.max() - 0.5 < value < q_values.max()


def test_target_by_hand():
    next_values = torch.tensor([4.0, 9.0, -2.0])
    rewards, terminated = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([False, True, False])
    assert script.td_target(rewards, terminated, next_values, 0.5).tolist() == [3.0, 2.0, 2.0]


def test_log_prob_is_that_of_independent_gaussians():
    torch.manual_seed(0)
    means, actions = torch.randn(2, 50, 3, dtype=torch.float64)
    log_std = torch.tensor([-1.0, 0.5, -9.0]).double()  # the last one is below its bound
    deviations = torch.tensor([-1.0, 0.5, -5.0]).double().exp()
    expected = torch.distributions.Normal(means, deviations).log_prob(actions).sum(1)
    torch.testing.assert_close(script.log_prob(means, log_std, actions), expected)


def test_policy_loss_by_hand():
    """exp(0.5 * 2) = e, exp(-0.5), and exp(50) is too large. With beta 0, all weights are 1."""
    log_probs, u = torch.tensor([-1.0, -2.0, 0.5]), torch.tensor([2.0, -1.0, 100.0])
    expected = -(-math.e - 2 * math.exp(-0.5) + 100 * 0.5) / 3
    assert script.policy_loss(log_probs, u, 0.5).item() == pytest.approx(expected)
    assert script.policy_loss(log_probs, u, 0.0).item() == pytest.approx(2.5 / 3)


def test_the_policy_becomes_the_weighted_mean_and_deviation():
    """Of the actions that were recorded in one state."""
    torch.manual_seed(0)
    actions, u = torch.rand(40, 2, dtype=torch.float64), torch.randn(40, dtype=torch.float64)
    means, log_std = (torch.zeros(2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    optimizer = torch.optim.Adam([means, log_std], lr=0.02)
    for _ in range(1500):
        optimizer.zero_grad()
        log_probs = script.log_prob(means.expand(40, -1), log_std, actions)
        script.policy_loss(log_probs, u, 2.0).backward()
        optimizer.step()
    weights = np.exp(2 * u.numpy()).clip(max=100)
    expected = np.average(actions, 0, weights)
    variance = np.average((actions.numpy() - expected) ** 2, 0, weights)
    np.testing.assert_allclose(means.detach(), expected, atol=1e-3)
    np.testing.assert_allclose(log_std.exp().detach(), np.sqrt(variance), rtol=1e-2)


# ---- update --------------------------------------------------------------------------------------

LOW, HIGH = np.float32([-2, 0]), np.float32([2, 10])


def random_batch(size=24):
    obs, next_obs = torch.randn(2, size, 3, dtype=torch.float64)
    actions, rewards = torch.rand(size, 2).double() * 2 - 1, 5 * torch.randn(size).double()
    return script.Batch(obs, actions, rewards, next_obs, torch.arange(size) % 3 == 0)


@pytest.mark.parametrize("compile", [False, True])
def test_update_goes_down_the_gradients_each_of_the_weights_of_its_own(compile):
    """Of the three losses, written out; then the targets follow."""
    torch.manual_seed(0)
    agent = script.Agent(3, LOW, HIGH, 8).double()
    target_critics = script.Critics(3, 2, 8).double()
    args = script.Args(gamma=0.9, reward_scale=0.5, expectile=0.8, beta=1.5, tau=0.25,
                       compile=compile)  # fmt: skip
    batch = random_batch()
    if compile:
        torch._dynamo.config.trace_autograd_ops = True
    with torch.no_grad():
        y = 0.5 * batch.rewards + 0.9 * agent.values(batch.next_obs)[:, 0] * (~batch.terminated)
        both = target_critics(batch.obs, batch.actions)
        recorded_q = torch.minimum(both[0], both[1])
    q_values = agent.critics(batch.obs, batch.actions)
    u = recorded_q - agent.values(batch.obs)[:, 0]
    share = torch.where(u > 0, 0.8, 0.2).detach()
    weights = (1.5 * u.detach()).exp().clamp(max=100)
    normal = torch.distributions.Normal(agent(batch.obs), agent.log_std.exp())
    log_probs = normal.log_prob(batch.actions).sum(1)
    losses = {
        "critics": ((q_values[0] - y) ** 2 / 2 + (q_values[1] - y) ** 2 / 2).mean(),
        "values": (share * u**2).mean(),
        "actor": -(weights * log_probs).mean(),
    }
    before = {name: weight.detach().clone() for name, weight in agent.named_parameters()}
    expected = {}
    for part, loss in losses.items():
        names = [name for name in before if name.startswith((part, "log_std" if part == "actor"
                                                             else part))]  # fmt: skip
        weights_of = dict(agent.named_parameters())
        gradients = torch.autograd.grad(loss, [weights_of[name] for name in names])
        expected |= {name: before[name] - 0.1 * g for name, g in zip(names, gradients)}
    followers = [w.detach().clone() for w in target_critics.parameters()]
    optimizer = torch.optim.SGD(agent.parameters(), lr=0.1)
    metrics = script.update(agent, target_critics, optimizer, batch, args)
    assert set(expected) == set(before)
    for name, weight in agent.named_parameters():
        torch.testing.assert_close(weight.detach(), expected[name])
    for old, new, online in zip(followers, target_critics.parameters(),
                                agent.critics.parameters()):  # fmt: skip
        torch.testing.assert_close(new.detach(), 0.75 * old + 0.25 * online.detach())
    found = {tag: value.item() for tag, value in metrics.items()}
    assert found == pytest.approx({
        "losses/td_loss": losses["critics"].item(), "losses/q_values": q_values.mean().item(),
        "losses/value_loss": losses["values"].item(), "losses/policy_loss": losses["actor"].item(),
    })  # fmt: skip
    assert not any(value.requires_grad for value in metrics.values())


class Tables(nn.Module):
    """Q and V of a small process. Observations and actions are one-hot."""

    def __init__(self, q):
        super().__init__()
        self.q, self.v = nn.Parameter(q.clone()), nn.Parameter(torch.zeros(len(q)).double())
        self.log_std = nn.Parameter(torch.zeros(q.shape[1]).double())
        self.means = nn.Parameter(torch.zeros(q.shape).double())

    def critics(self, obs, actions):
        return torch.stack([(obs @ self.q * actions).sum(1)] * 2)

    def values(self, obs):
        return (obs @ self.v)[:, None]

    def forward(self, obs):
        return obs @ self.means


@pytest.mark.parametrize("expectile", [0.5, 0.8, 0.99])
def test_values_are_expectiles_over_recorded_actions(expectile):
    """In a process of 5 states, of whose 4 actions 3 are recorded. Q of the others is 1000.

    In the end, V is where iteration of q = r + gamma * v and of the expectile comes to rest: for
    1/2, the value of who recorded the data; for 0.99, nearly that of the best recorded actions.
    """
    random = np.random.default_rng(0)
    recorded_actions = [sorted(random.permutation(4)[:3]) for _ in range(5)]
    transitions = [
        (s, a, random.normal(), int(random.integers(5)), bool(random.random() < 0.2))
        for s in range(5) for a in recorded_actions[s]
    ]  # fmt: skip
    values = np.zeros(5)
    for _ in range(300):
        q = {(s, a): r + 0.9 * values[n] * (not end) for s, a, r, n, end in transitions}
        values = np.array([
            expectile_of([q[s, a] for a in recorded_actions[s]], expectile) for s in range(5)
        ])  # fmt: skip
    s, a, r, n, end = map(torch.tensor, zip(*transitions))
    states, actions = torch.eye(5).double(), torch.eye(4).double()
    batch = script.Batch(states[s], actions[a], r, states[n], end)
    agent = Tables(torch.full((5, 4), 1000.0).double().index_put((s, a), torch.zeros(15).double()))
    args = script.Args(gamma=0.9, reward_scale=1.0, expectile=expectile, beta=0.0)
    optimizer = torch.optim.Adam(agent.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.998)
    for _ in range(3000):
        optimizer.zero_grad()
        script.compute_gradient(agent, agent.critics, batch, args)
        optimizer.step()
        schedule.step()
    np.testing.assert_allclose(agent.v.detach(), values, atol=0.02)
    assert (agent.q == 1000).sum() == 5


# ---- The data ------------------------------------------------------------------------------------

FEW = dict(
    env_id="ContinuousDiary-v0", total_timesteps=300, num_envs=3, dataset_size=400, batch_size=16,
    hidden_size=16, eval_episodes=3,
)  # fmt: skip


def read(**settings):
    args = script.Args(**settings)
    return script.read_dataset(args, script.Envs(args, 1, script.TRAINING))


def rows_of(data):
    """Transitions as tuples of floats, sorted."""
    columns = [column.reshape(len(column), -1).double().numpy() for column in data]
    return sorted(map(tuple, np.concatenate(columns, 1).round(4).tolist()))


def happened(steps):
    """The same, of entries of a diary."""
    found = []
    for obs, action, reward, next_obs, terminated, _ in steps:
        scaled = [action[0] / 2, action[1] / 5 - 1]
        found.append([*obs, *scaled, reward, *next_obs, float(terminated)])
    return sorted(map(tuple, np.array(found).round(4).tolist()))


def test_random_play_is_what_happened(capfd):
    Diary.made.clear()
    torch.manual_seed(0)
    data = script.random_play(script.Args(**FEW | {"dataset_size": 4000}))
    steps = [step for env in Diary.made for step in env.steps]
    assert len(data.rewards) == len(steps) == 4002
    np.testing.assert_allclose(rows_of(data), happened(steps), atol=2e-4)
    counts = [np.histogram(data.actions[:, k], 10, (-1, 1))[0] for k in range(2)]
    np.testing.assert_allclose(counts, 400, atol=80)
    assert "Random play: return" in "".join(capfd.readouterr())


def test_random_play_is_the_same_when_a_run_is_resumed():
    """Whatever numbers were drawn before, and it leaves them as they were."""
    found = []
    for before in range(2):
        torch.manual_seed(before)
        expected = torch.rand(1)
        torch.manual_seed(before)
        found.append(rows_of(script.random_play(script.Args(**FEW))))
        assert torch.rand(1) == expected
    assert found[0] == found[1] != rows_of(script.random_play(script.Args(**FEW | {"seed": 2})))


@pytest.mark.parametrize("other", [sac_continuous, td3_continuous])
@pytest.mark.parametrize("size", [250, 5000])
def test_the_buffer_of_another_run(tmp_path, other, size):
    """Also of one that is full, in which the newest steps are in the place of the oldest."""
    settings = {"total_timesteps": 1200, "num_envs": 3, "learning_starts": 50, "batch_size": 16}
    settings |= {"env_id": "ContinuousDiary-v0", "hidden_size": 16, "eval_episodes": 3}
    settings |= {"train_frequency": 10} if other is sac_continuous else {}
    folder = other.train(other.Args(**settings, buffer_size=size, runs_dir=str(tmp_path))).folder
    Diary.made.clear()
    state, _ = train(other, tmp_path, **settings, buffer_size=size)
    every = {row for env in Diary.made[:3] for row in happened(env.steps)}
    data = read(env_id="ContinuousDiary-v0", dataset=folder)
    found = rows_of(data)
    assert len(found) == int(state["buffer"]["columns"][-1].sum()) > min(size, 1200) * 0.6
    near = np.array(sorted(every))
    for row in found:
        assert np.abs(near - np.array(row)).max(1).min() < 1e-3


def test_a_file_of_numpy(tmp_path):
    rng, path = np.random.default_rng(0), tmp_path / "data.npz"
    arrays = {
        "observations": rng.normal(size=(7, 2)), "next_observations": rng.normal(size=(7, 2)),
        "rewards": np.arange(7), "terminals": np.arange(7) % 2,
        "actions": np.linspace([-2, 0], [2, 10], 7),
    }  # fmt: skip
    np.savez(path, **arrays)
    args = {"env_id": "ContinuousDiary-v0", "dataset": str(path)}
    obs, actions, rewards, next_obs, terminated = read(**args)
    np.testing.assert_allclose(obs, arrays["observations"], rtol=1e-6)
    np.testing.assert_allclose(next_obs, arrays["next_observations"], rtol=1e-6)
    np.testing.assert_allclose(actions, np.linspace([-1, -1], [1, 1], 7), atol=1e-6)
    assert rewards.tolist() == list(range(7)) and terminated.dtype == torch.bool
    assert terminated.tolist() == [False, True] * 3 + [False]
    np.savez(path, **arrays | {"actions": 3 * arrays["actions"]})  # beyond the bounds
    assert read(**args).actions.abs().max() == 1
    for change, message in (
        ({"rewards": np.arange(6)}, "does not fit"),
        ({"observations": np.zeros((7, 3))}, "does not fit"),
        ({"actions": np.zeros((7, 1))}, "actions have the shape .7, 1."),
        ({"rewards": np.full(7, np.nan)}, "not finite"),
        ({"actions": np.full((7, 2), np.inf)}, "not finite"),
        ({name: column[:0] for name, column in arrays.items()}, "is empty"),
    ):
        np.savez(path, **arrays | change)
        with pytest.raises(script.UsageError, match=message):
            read(**args)
    del arrays["terminals"]
    np.savez(path, **arrays)
    with pytest.raises(script.UsageError, match="cannot be read as .*terminals"):
        read(**args)


def test_a_run_of_another_environment_or_without_a_buffer_is_refused(tmp_path):
    few = {"total_timesteps": 200, "hidden_size": 16, "eval_episodes": 1, "batch_size": 16}
    more = {"learning_starts": 50, "runs_dir": str(tmp_path)}
    folder = sac_continuous.train(sac_continuous.Args(**few, **more)).folder
    with pytest.raises(
        script.UsageError, match="for ContinuousDiary-v0: its environment is Pendulum-v1"
    ):
        read(env_id="ContinuousDiary-v0", dataset=folder)
    folder = script.train(script.Args(**few, dataset_size=300, runs_dir=str(tmp_path))).folder
    with pytest.raises(script.UsageError, match="is no run with a replay buffer"):
        read(dataset=folder)


# ---- The loop ------------------------------------------------------------------------------------


def test_every_step_is_a_gradient_step_on_rows_of_the_data(tmp_path, monkeypatch):
    updates = recorded(monkeypatch, script, "update")
    loaded = recorded(monkeypatch, script, "random_play")
    rates, update = [], script.update

    def noting(agent, target_critics, optimizer, *others):
        rates.append(optimizer.param_groups[0]["lr"])
        return update(agent, target_critics, optimizer, *others)

    monkeypatch.setattr(script, "update", noting)
    state, _ = train(script, tmp_path, **FEW)
    assert len(updates) == 300 == state["envs"]["steps"]
    np.testing.assert_allclose(rates, 1e-3 * (1 - np.arange(300) / 300))
    ((_, data),) = loaded
    known, drawn = rows_of(data), set()
    for (_, _, _, batch, _), _ in updates:
        assert len(batch.rewards) == 16
        drawn |= set(rows_of(batch))
    assert drawn <= set(known) and len(drawn) == len(known)


def test_play_is_the_mean_of_the_policy_within_bounds(tmp_path):
    torch.manual_seed(0)
    agent, obs = script.Agent(2, LOW, HIGH, 16), torch.randn(9, 2)
    found = script.play(script.Args(), agent, obs.numpy())
    means = agent(obs).detach().numpy()
    np.testing.assert_allclose(found, LOW + (means + 1) / 2 * (HIGH - LOW), rtol=1e-4)


class PaysContinuously(Pays):
    """With actions that change nothing."""

    action_space = Box(-1, 1, (1,), np.float32)


gym.register("TruncatesRecorded-v0", entry_point=PaysContinuously, kwargs={"truncates": True})
gym.register("TerminatesRecorded-v0", entry_point=PaysContinuously, kwargs={"truncates": False})


def test_a_time_limit_is_not_the_end_of_the_world(tmp_path):
    """Truncated for ever, a reward of 1 is worth 1 / (1 - gamma); terminated, less."""
    for env_id, value in (("TruncatesRecorded-v0", 5.0), ("TerminatesRecorded-v0", 15 / 7)):
        settings = {"env_id": env_id, "gamma": 0.8, "total_timesteps": 1500, "tau": 0.05}
        settings |= {"reward_scale": 1.0, "expectile": 0.5}
        state, _ = train(script, tmp_path, **FEW | settings)
        agent = script.Agent(1, np.float32([-1]), np.float32([1]), 16)
        agent.load_state_dict(state["network"])
        assert agent.values(torch.ones(1, 1)).item() == pytest.approx(value, rel=0.05)


def test_every_setting_of_the_algorithm_changes_the_outcome(tmp_path):
    path = tmp_path / "data.npz"
    zeros = np.zeros((50, 2))
    np.savez(path, observations=zeros, next_observations=zeros, actions=zeros, rewards=zeros[:, 0],
             terminals=zeros[:, 0])  # fmt: skip

    def outcome(**settings):
        state, _ = train(script, tmp_path, **FEW | {"total_timesteps": 50} | settings)
        return [weights.tolist() for weights in state["network"].values()]

    check_settings(script, outcome, {
        "seed": 2, "total_timesteps": 60, "num_envs": 4, "dataset": str(path), "dataset_size": 500,
        "learning_rate": 5e-4, "anneal_lr": False, "gamma": 0.9, "reward_scale": 0.2,
        "expectile": 0.7, "beta": 1.0, "tau": 0.5, "batch_size": 15, "hidden_size": 15,
    })  # fmt: skip
