"""The mathematics of qmix_twostep.py: the mixing network, targets, and what a sum cannot represent.

What dqn_cartpole.py has word for word, the loop among it, is tested there.
"""

import inspect
import itertools
import json

import dqn_cartpole
import numpy as np
import pytest
import qmix_twostep as script
import torch
from diary import Diary, check_settings, side_by_side, train
from gymnasium.spaces import Box, Discrete, MultiDiscrete
from torch import nn

# For the tests that all scripts share.
TINY = (
    "--total-timesteps 2000 --learning-starts 100 --buffer-size 700 --target-network-frequency 50 "
    "--checkpoint-frequency 500 --eval-frequency 700 --eval-episodes 5"
)
OWN = "teams"
OWN_FLAGS = "--total-timesteps 6000"
WRONG_SPACES = ["CartPole-v1", "Pendulum-v1", "FrozenLake-v1"]
DIVERGES = "--learning-rate 1e30"
BAD = [
    ("--mixer sum", "--mixer"),
    ("--mixing-size 0", "--mixing-size"),
    ("--learning-starts 32", "--batch-size"),
    ("--env-kwargs '{\"payoff\": [[1]]}'", "payoff"),
    ("--env-kwargs '{\"payoff\": [[1, 2], [3]]}'", "payoff"),
    ("--env-kwargs '{\"payoff\": [[1, 2, 3], [4, 5, 6]]}'", "payoff"),
    ("--env-kwargs '{\"payoff\": 3}'", "payoff"),
    ('--env-kwargs \'{"safe": "much"}\'', "safe"),
]
LEARNS = [("--end-e 1", 8), ("--end-e 1 --mixer vdn", 7), ("--end-e 1 --mixer none", 7)]


# ---- TwoStep -------------------------------------------------------------------------------------


@pytest.mark.parametrize("payoff, safe", [
    (((0, 1), (1, 8)), 7.0),
    (np.arange(27).reshape(3, 3, 3).tolist(), -2.5),  # three agents
])  # fmt: skip
def test_all_joint_actions_of_both_steps_pay_what_the_table_says(payoff, safe):
    env, table = script.TwoStep(payoff, safe), np.array(payoff)
    joint = list(itertools.product(range(len(table)), repeat=table.ndim))
    for first, second in itertools.product(joint, repeat=2):
        obs, _ = env.reset()
        assert env.observation_space.contains(obs) and (obs == [1, 0, 0]).all()
        obs, reward, terminated, truncated, _ = env.step(np.array(first))
        assert (reward, terminated, truncated) == (0, False, False)
        assert env.observation_space.contains(obs)
        assert (obs == ([0, 1, 0] if first[0] == 0 else [0, 0, 1])).all()
        _, reward, terminated, truncated, _ = env.step(np.array(second))
        assert (terminated, truncated) == (True, False)
        assert reward == (safe if first[0] == 0 else table[second])


def test_the_game_is_drawn():
    env, pictures = script.TwoStep(), []
    env.reset()
    pictures.append(env.render())
    env.step(np.array([1, 0]))
    pictures.append(env.render())
    for picture, white in zip(pictures, (0, 2)):
        assert picture.shape == (80, 240, 3) and picture.dtype == np.uint8
        squares = picture.reshape(80, 3, 80, 3).transpose(1, 0, 2, 3).reshape(3, -1)
        assert all((square == (255 if i == white else 0)).all() for i, square in enumerate(squares))


@pytest.mark.parametrize("obs_space, action_space", [
    (Box(0, 1, (3, 2)), MultiDiscrete([2, 2])),  # three rows, two agents
    (Box(0, 1, (2, 2)), MultiDiscrete([2, 3])),
    (Box(0, 1, (2, 2)), MultiDiscrete([[2, 2], [2, 2]])),
    (Box(0, 1, (2, 2)), Discrete(2)),
    (MultiDiscrete([4, 5]), MultiDiscrete([2, 2])),  # rows of 4 and of 5, when flattened
])  # fmt: skip
def test_other_spaces_are_refused(monkeypatch, obs_space, action_space):
    monkeypatch.setattr(Diary, "observation_space", obs_space)
    monkeypatch.setattr(Diary, "action_space", action_space)
    with pytest.raises(script.UsageError, match="needs a Box .* Diary-v0 has"):
        script.make_env(script.Args(env_id="Diary-v0"))


# ---- The mixing network --------------------------------------------------------------------------


def linear(layer, x):
    return layer.weight.detach().numpy() @ x + layer.bias.detach().numpy()


def mixed_by_hand(mixer, q_values, state):
    """Q_tot of one row: a loop over the units."""
    num_agents = len(q_values)
    weights, total = np.abs(linear(mixer.weights_1, state)), 0.0
    biases, outer = linear(mixer.biases_1, state), np.abs(linear(mixer.weights_2, state))
    for unit in range(len(biases)):
        x = biases[unit]
        for agent in range(num_agents):
            x += weights[unit * num_agents + agent] * q_values[agent]
        total += outer[unit] * (x if x > 0 else np.exp(x) - 1)
    hidden = np.maximum(linear(mixer.bias_2[0], state), 0)
    return total + linear(mixer.bias_2[2], hidden)[0]


def test_q_tot_by_hand():
    torch.manual_seed(0)
    mixer = script.Mixer(num_agents=3, obs_size=6, mixing_size=4)
    q_values, states = 3 * torch.randn(50, 3), torch.randn(50, 6)
    expected = [[mixed_by_hand(mixer, q, s)] for q, s in zip(q_values.numpy(), states.numpy())]
    np.testing.assert_allclose(mixer(q_values, states).detach(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mixer", ["qmix", "vdn"])
def test_the_best_actions_of_the_agents_are_the_best_joint_action(mixer):
    """Of 4^3, all tried, in many states."""
    torch.manual_seed(0)
    network = script.QNetwork(3, 6, 4, script.Args(mixer=mixer))
    for state in 2 * torch.randn(30, 1, 6):
        q_values = 5 * torch.randn(3, 4)
        joint = list(itertools.product(range(4), repeat=3))
        rows = torch.stack([q_values[range(3), actions] for actions in joint])
        totals = network.mix(rows, state.expand(len(rows), -1))
        assert totals.shape == (64, 1)
        best = network.mix(q_values.max(1).values[None], state)
        torch.testing.assert_close(best, totals.max().view(1, 1))


def test_q_tot_never_falls_where_one_q_rises_and_the_state_sets_their_shares():
    torch.manual_seed(0)
    mixer = script.Mixer(2, 4, 8)
    q_values = (3 * torch.randn(400, 2)).requires_grad_()
    (slopes,) = torch.autograd.grad(mixer(q_values, torch.randn(400, 4)).sum(), q_values)
    assert (slopes >= 0).all() and slopes.max() > 0
    shares = slopes[:, 0] / slopes.sum(1)
    assert shares.min() < 0.3 and shares.max() > 0.7


def test_a_sum_and_unmixed():
    q_values, obs = torch.tensor([[1.0, 2.0, 4.0], [0.5, -3.0, 0.0]]), torch.zeros(2, 6)
    networks = [script.QNetwork(3, 6, 4, script.Args(mixer=mixer)) for mixer in ("vdn", "none")]
    found = [network.mix(q_values, obs).tolist() for network in networks]
    assert found == [[[7.0], [-2.5]], q_values.tolist()]
    assert all(len(list(network.parameters())) == 6 for network in networks)


# ---- Q of each agent -----------------------------------------------------------------------------


def test_an_agent_sees_its_own_row_and_its_number():
    torch.manual_seed(0)
    network = script.QNetwork(3, 6, 4, script.Args())
    obs = torch.randn(5, 6)
    before = network(obs)
    obs[:, 2:4] += 1  # what the second agent sees
    changed = (network(obs) != before).any(2)
    assert before.shape == (5, 3, 4) and changed.all(0).tolist() == [False, True, False]
    alike = network(torch.ones(1, 6))[0]  # all see the same
    assert not torch.equal(alike[0], alike[1]) and not torch.equal(alike[1], alike[2])


def test_the_actor_is_the_network():
    torch.manual_seed(0)
    network, obs = script.QNetwork(2, 6, 3, script.Args()), torch.randn(7, 6)
    found = script.Actor(network)(obs.numpy())
    np.testing.assert_allclose(found, network(obs).detach(), rtol=1e-4, atol=1e-6)


def test_epsilon_is_each_agents_own():
    """Of 20,000 rows with epsilon 0.5: best actions of both agents by chance, of one, of none."""
    torch.manual_seed(0)
    q_values = np.zeros((20_000, 2, 4))
    q_values[:, 0, 3] = q_values[:, 1, 1] = 1
    actions = script.act(lambda obs: q_values, None, 0.5)
    assert actions.shape == (20_000, 2)
    best = actions == [3, 1]
    both, none, p = best.all(1).mean(), (~best).all(1).mean(), 0.5 + 0.5 / 4
    assert both == pytest.approx(p * p, abs=0.015)
    assert none == pytest.approx((1 - p) ** 2, abs=0.015)
    others = np.bincount(actions[~best[:, 0], 0], minlength=4) / (~best[:, 0]).sum()
    np.testing.assert_allclose(others, [1 / 3, 1 / 3, 1 / 3, 0], atol=0.02)
    assert (script.act(lambda obs: q_values, None, 0.0) == [3, 1]).all()


# ---- Targets and updates -------------------------------------------------------------------------


def test_target_by_hand():
    rewards, terminated = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([False, True, False])
    team, each = torch.tensor([[4.0], [9.0], [-2.0]]), torch.tensor([[4.0, 6], [9, 9], [-2, 0]])
    assert script.td_target(rewards, terminated, team, 0.5).tolist() == [[3.0], [2.0], [2.0]]
    expected = [[3.0, 4.0], [2.0, 2.0], [2.0, 3.0]]
    assert script.td_target(rewards, terminated, each, 0.5).tolist() == expected


def random_batch(size, num_agents=2, obs_size=6, num_actions=3):
    obs, next_obs = torch.randn(2, size, obs_size)
    actions = torch.randint(num_actions, (size, num_agents))
    terminated = torch.arange(size) % 4 == 0
    return script.Batch(obs, actions, torch.randn(size), next_obs, terminated)


@pytest.mark.parametrize("mixer", ["qmix", "vdn", "none"])
def test_the_loss_is_that_of_the_definition(mixer):
    """The target is all of the target network, and gets no gradient; all else gets one."""
    torch.manual_seed(0)
    args = script.Args(mixer=mixer, gamma=0.9, mixing_size=5)
    online, target = (script.QNetwork(2, 6, 3, args) for _ in range(2))
    batch, losses, totals = random_batch(30), [], []
    for b in range(30):
        q_values = online(batch.obs)[b].detach().numpy()
        next_q = target(batch.next_obs)[b].detach().numpy().max(1)
        chosen = np.array([q_values[agent, batch.actions[b, agent]] for agent in range(2)])
        following = 0.0 if batch.terminated[b] else 0.9
        if mixer == "qmix":
            next_q = mixed_by_hand(target.mixer, next_q, batch.next_obs[b].numpy())
            chosen = mixed_by_hand(online.mixer, chosen, batch.obs[b].numpy())
        elif mixer == "vdn":
            next_q, chosen = next_q[0] + next_q[1], chosen[0] + chosen[1]
        y = batch.rewards[b].item() + following * next_q
        losses.append(np.mean((chosen - y) ** 2))
        totals.append(np.mean(chosen))
    metrics = script.compute_gradient(online, target, batch, args)
    found = {tag: value.item() for tag, value in metrics.items()}
    expected = {"losses/td_loss": np.mean(losses), "losses/q_values": np.mean(totals)}
    assert found == pytest.approx(expected, rel=1e-4)
    assert not any(value.requires_grad for value in metrics.values())
    assert all(weights.grad is None for weights in target.parameters())
    assert all(weights.grad.abs().sum() > 0 for weights in online.parameters())


class Table(nn.Module):
    """Q_i of each agent, a table; in one state. Mixed as in the script. Action 1 is the better one
    from the start, as gradients alone may not find the way there.
    """

    def __init__(self, args):
        super().__init__()
        self.q = nn.Parameter(torch.tensor([[0.0, 1.0], [0.0, 1.0]]))
        self.network = script.QNetwork(2, 2, 2, args)

    def forward(self, obs):
        return self.q.expand(len(obs), -1, -1)

    def mix(self, q_values, obs):
        return self.network.mix(q_values, obs)


def fit(mixer, payoff, steps, optimizer, rate):
    """What Q_tot, or the agents' own Q, learn of a table: Q_tot (2, 2), Q (2, 2)."""
    torch.manual_seed(0)
    args = script.Args(mixer=mixer)
    table = Table(args)
    optimizer = optimizer(table.parameters(), lr=rate)
    actions = torch.tensor(list(itertools.product(range(2), repeat=2)))
    obs, rewards = torch.ones(4, 2), torch.tensor(payoff, dtype=torch.float32).flatten()
    batch = script.Batch(obs, actions, rewards, obs, torch.ones(4, dtype=torch.bool))
    for _ in range(steps):
        script.update(table, table, optimizer, batch, args)
    chosen = table(obs).gather(2, actions[:, :, None]).squeeze(2)
    return table.mix(chosen, obs).detach(), table.q.detach()


PAYOFF = [[0, 1], [1, 8]]


def test_a_sum_finds_what_is_nearest_to_the_payoffs():
    """The mean of the row + that of the column - that of all, by least squares: 6.5 is best."""
    total, _ = fit("vdn", PAYOFF, 300, torch.optim.SGD, 0.5)
    table = np.array(PAYOFF, float)
    design = np.array([[1, 0, 1, 0], [1, 0, 0, 1], [0, 1, 1, 0], [0, 1, 0, 1]])  # one-hot actions
    nearest = design @ np.linalg.lstsq(design, table.flatten(), rcond=None)[0]
    np.testing.assert_allclose(nearest, [-1.5, 2.5, 2.5, 6.5])
    np.testing.assert_allclose(total[:, 0], nearest, atol=1e-3)


def test_agents_of_their_own_find_the_mean_over_what_the_other_does():
    _, q_values = fit("none", PAYOFF, 300, torch.optim.SGD, 0.5)
    np.testing.assert_allclose(q_values, [[0.5, 4.5], [0.5, 4.5]], atol=1e-3)


def test_qmix_finds_the_payoffs_themselves():
    total, _ = fit("qmix", PAYOFF, 1500, torch.optim.Adam, 1e-2)
    np.testing.assert_allclose(total[:, 0], [0, 1, 1, 8], atol=0.05)


def test_qmix_cannot_find_payoffs_that_are_not_monotonic():
    """5 if both do the same: no action is the better one, whatever the other agent does.

    Q_tot of one joint action is the least, say of (0, 0), which pays 5. As those of (0, 1) and
    (1, 0) cannot be less, all three are 5/3 at best: the mean error is (100/9 + 2 * 25/9) / 4.
    """
    total, _ = fit("qmix", [[5, 0], [0, 5]], 1500, torch.optim.Adam, 1e-2)
    error = (total[:, 0] - torch.tensor([5.0, 0, 0, 5])).square().mean()
    assert 150 / 36 - 1e-3 < error < 4.6  # 6.25, were they all the same


# ---- The loop ------------------------------------------------------------------------------------


class TeamDiary(Diary):
    """Two agents see a number each."""

    action_space = MultiDiscrete([3, 3])


script.gym.register("TeamDiary-v0", entry_point=TeamDiary)
FEW = dict(
    env_id="TeamDiary-v0", total_timesteps=1200, num_envs=3, learning_starts=50, batch_size=16,
    buffer_size=1000, hidden_size=16, train_frequency=4, target_network_frequency=40,
    eval_episodes=3, exploration_fraction=0.5, learning_rate=1e-2,
)  # fmt: skip


@pytest.mark.parametrize("name", [
    "train", "evaluate", "linear_epsilon", "update", "update_target", "ReplayBuffer.sample",
    "ReplayBuffer.state_dict", "ReplayBuffer.load_state_dict", "Envs",
])  # fmt: skip
def test_what_dqn_has_too_is_the_same_and_tested_there(name):
    sources = []
    for found in script, dqn_cartpole:
        for part in name.split("."):
            found = getattr(found, part)
        sources.append(inspect.getsource(found))
    assert sources[0].replace(".shape[1], q_network.num_agents)", ".shape[1])") == sources[1]


@pytest.mark.parametrize("num_envs, size", [(1, 5000), (3, 250)])
def test_the_buffer_holds_what_really_happened(tmp_path, num_envs, size):
    """Also where an episode ends: its last observation, and terminated only if it was."""
    state, _ = train(script, tmp_path, **FEW | {"num_envs": num_envs, "buffer_size": size})
    steps = side_by_side(num_envs)
    assert state["buffer"]["num_added"] == state["envs"]["steps"] == len(steps) == 1200
    ring = [None] * min(size, 1200)
    for number, (_, (obs, action, reward, next_obs, terminated, _)) in enumerate(steps):
        ring[number % size] = obs, action, reward, next_obs, terminated
    for column, expected in zip(state["buffer"]["rows"], zip(*ring), strict=True):
        np.testing.assert_allclose(column, np.array(expected), rtol=1e-6)


class Pays(script.gym.Env):
    """One state, two agents; every step pays 1. Episodes of three steps."""

    observation_space, action_space = Box(-1, 1, (2, 1), np.float32), MultiDiscrete([2, 2])

    def __init__(self, truncates, render_mode=None):
        self.truncates = truncates

    def reset(self, *, seed=None, options=None):
        self.t = 0
        return np.ones((2, 1), np.float32), {}

    def step(self, action):
        self.t += 1
        end = self.t == 3
        return np.ones((2, 1), np.float32), 1.0, end and not self.truncates, end, {}


script.gym.register("Pays-v0", entry_point=Pays)


@pytest.mark.parametrize("mixer", ["qmix", "vdn", "none"])
@pytest.mark.parametrize("truncates, share", [(True, 1.0), (False, 2 / 3)])
def test_a_time_limit_is_not_the_end_of_the_world(tmp_path, mixer, truncates, share):
    """Truncated for ever, 1 is worth 1 / (1 - gamma); if every third step terminates, less."""
    flags = {"env_id": "Pays-v0", "gamma": 0.8, "total_timesteps": 3000, "train_frequency": 3}
    flags |= {"env_kwargs": json.dumps({"truncates": truncates}), "batch_size": 64}
    flags |= {"learning_starts": 64, "mixer": mixer}
    state, _ = train(script, tmp_path, **FEW | flags)
    q_network = script.QNetwork(2, 2, 2, state["args"])
    q_network.load_state_dict(state["network"])
    obs = torch.ones(1, 2)
    found = q_network.mix(q_network(obs).max(2).values, obs).detach()
    torch.testing.assert_close(found, torch.full_like(found, 1 / (1 - 0.8 * share)), rtol=0.05,
                               atol=0)  # fmt: skip


def test_every_setting_of_the_algorithm_changes_the_outcome(tmp_path):
    def outcome(**settings):
        state, _ = train(script, tmp_path, **FEW | {"total_timesteps": 250} | settings)
        return [weights.tolist() for weights in state["network"].values()]

    check_settings(script, outcome, {
        "seed": 2, "total_timesteps": 260, "num_envs": 4, "learning_rate": 5e-3, "anneal_lr": False,
        "buffer_size": 100, "gamma": 0.9, "mixer": "vdn", "mixing_size": 16, "tau": 0.5,
        "target_network_frequency": 50, "batch_size": 15, "start_e": 0.9, "end_e": 0.5,
        "exploration_fraction": 0.2, "learning_starts": 100, "train_frequency": 5,
        "gradient_steps": 2, "hidden_size": 15,
    })  # fmt: skip
