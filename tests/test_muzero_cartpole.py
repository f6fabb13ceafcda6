"""The mathematics of muzero_cartpole.py: against a search that is written down once more, for one
tree, as a recursion, in a model that is known, by loops, by hand.

What dqn_cartpole.py, r2d2_cartpole.py and alphazero_tictactoe.py have word for word is tested there.
"""

import copy
import inspect
import math

import alphazero_tictactoe
import dqn_cartpole
import muzero_cartpole as script
import numpy as np
import pytest
import r2d2_cartpole
import torch
from diary import check_episodes, check_settings, recorded, side_by_side, train

# For the tests that all scripts share.
TINY = (
    "--total-timesteps 1500 --num-envs 8 --num-simulations 4 --learning-starts 220 "
    "--buffer-size 600 --batch-size 32 --checkpoint-frequency 400 --eval-frequency 600 "
    "--eval-episodes 5"
)
OWN = "discrete"
OWN_FLAGS = (
    "--total-timesteps 6000 --learning-starts 1500 --gamma 0.9 --learning-rate 5e-3 --n-step 3 "
    "--root-noise 0.5 --end-temperature 1 --num-simulations 8 --train-frequency 4"
)
WRONG_SPACES = ["Pendulum-v1"]
DIVERGES = "--learning-rate 1e30"
BAD = [
    ("--num-simulations 0", "--num-simulations"),
    ("--root-noise 1.1", "--root-noise"),
    ("--dirichlet-alpha 0", "--dirichlet-alpha"),
    ("--end-temperature 0", "--end-temperature"),
    ("--support 0", "--support"),
    ("--unroll-steps 0", "--unroll-steps"),
    ("--learning-starts 415", "--learning-starts"),
    ("--buffer-size 1999", "--buffer-size"),
]
LEARNS = []  # a longer run takes minutes: see the record
# What others published, by the record's name after `<script>__`: shown beside our results.
PUBLISHED = {}


def agent_of(obs_size=4, num_actions=3, scale=2.0, seed=0, **settings):
    torch.manual_seed(seed)
    agent = script.Agent(obs_size, num_actions, script.Args(**{"state_size": 6} | settings))
    with torch.no_grad():
        for weights in agent.parameters():
            weights *= scale  # opinions of its own
    return agent


# ---- categories, expected ------------------------------------------------------------------------


def test_categories_by_hand():
    """h(3) = 1.003, h(-0.21) = -0.1 - 0.00021, h(99) = 9.099."""
    numbers = torch.tensor([[3.0, 0.0], [-0.21, 99.0]])
    found = script.categories(numbers, 3)
    assert found.shape == (2, 2, 7)
    np.testing.assert_allclose(found[0, 0], [0, 0, 0, 0, 0.997, 0.003, 0], atol=1e-6)
    np.testing.assert_allclose(found[0, 1], [0, 0, 0, 1, 0, 0, 0], atol=1e-6)
    np.testing.assert_allclose(found[1, 0], [0, 0, 0.10021, 0.89979, 0, 0, 0], atol=1e-6)
    np.testing.assert_allclose(found[1, 1], [0, 0, 0, 0, 0, 0, 1], atol=1e-6)


def test_the_mean_of_the_categories_is_the_number():
    numbers = torch.linspace(-300, 300, 2001, dtype=torch.float64)
    shares = script.categories(numbers, 20)
    torch.testing.assert_close(shares.sum(1), torch.ones(2001).double())
    assert ((shares > 0).sum(1) <= 2).all()
    found = script.expected((shares + 1e-30).log().float())
    torch.testing.assert_close(found.double(), numbers, rtol=1e-3, atol=1e-3)


# ---- Agent ---------------------------------------------------------------------------------------


def test_networks_against_matrices():
    agent = agent_of()
    obs, actions = torch.randn(5, 4), torch.tensor([0, 2, 1, 1, 0])

    def layers(network, x):
        (first, a, second, b) = [
            weights.detach().double().numpy() for weights in network.parameters()
        ]
        return np.maximum(first @ x + a, 0) @ second.T + b

    states = agent.encode(obs)
    following, rewards = agent.step(states, actions)
    logits, values = agent.predict(states)
    for row in range(5):
        x = layers(agent.encoder, obs[row].double().numpy())
        x = (x - x.min()) / (x.max() - x.min())
        np.testing.assert_allclose(states[row].detach(), x, rtol=1e-3, atol=1e-4)
        action = np.eye(3)[actions[row]]
        y = layers(agent.model, np.concatenate([x, action]))
        scaled = (y[:6] - y[:6].min()) / (y[:6].max() - y[:6].min())
        np.testing.assert_allclose(following[row].detach(), scaled, rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(rewards[row].detach(), y[6:], rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(
            torch.cat([logits[row], values[row]]).detach(), layers(agent.f, x), rtol=1e-3, atol=1e-3
        )
    assert rewards.shape == values.shape == (5, 41) and logits.shape == (5, 3)
    assert (script.unit_range(torch.full((2, 4), 7.0)) == 0).all()


# ---- puct, Trees, search -------------------------------------------------------------------------


def test_puct_by_hand():
    """N(x) is 1 + 3: each bonus is 1.5 * p * 2 / (1 + N). Q is 3, -1; the tree's are -1 to 7."""
    totals, visits = np.float32([[6.0, -1.0, 0.0]]), np.array([[2, 1, 0]])
    priors = np.float32([[0.5, 0.2, 0.3]])
    for value, scaled in (1, 0.25), (9, 1), (-2, 0):  # of the action that was not tried
        limits = np.array([value]), np.array([-1.0]), np.array([7.0])
        found = script.puct(totals, visits, priors, *limits, 1.5)
        np.testing.assert_allclose(found, [[0.5 + 0.5, 0 + 0.3, scaled + 0.9]], rtol=1e-6)
    limits = np.array([[2.0]] * 3)  # before the first simulation
    found = script.puct(0 * totals, 0 * visits, priors, *limits, 1.5)
    np.testing.assert_allclose(found, 1.5 * priors, rtol=1e-6)


class Node:
    """The search once more: one tree, one node after the other."""

    def __init__(self, agent, state, reward):
        logits, values = agent.predict(state)
        self.state, self.reward, self.value = state, reward, script.expected(values).item()
        self.edges = [
            {"p": p, "n": 0, "w": 0.0, "node": None} for p in logits[0].softmax(0).tolist()
        ]

    def visit(self, agent, args, known):
        """One simulation from here -> its return. `known` are all Q, and the v of the root."""
        total = 1 + sum(edge["n"] for edge in self.edges)
        low, high = min(known), max(known)

        def score(action):
            edge = self.edges[action]
            value = edge["w"] / edge["n"] if edge["n"] else self.value
            value = min(max((value - low) / (high - low), 0), 1) if high > low else 0
            return value + args.c_puct * edge["p"] * math.sqrt(total) / (1 + edge["n"])

        action = max(range(len(self.edges)), key=score)
        edge = self.edges[action]
        if edge["node"] is None:
            state, reward = agent.step(self.state, torch.tensor([action]))
            edge["node"] = Node(agent, state, script.expected(reward).item())
            value = edge["node"].value
        else:
            value = edge["node"].visit(agent, args, known)
        value = edge["node"].reward + args.gamma * value
        edge["n"], edge["w"] = edge["n"] + 1, edge["w"] + value
        known.append(edge["w"] / edge["n"])  # of all times, as in the paper's pseudocode
        return value


@pytest.mark.parametrize("num_simulations, c_puct", [(1, 1.25), (12, 1.25), (50, 3.0), (80, 0.3)])
@torch.no_grad()
def test_search_is_that_of_the_recursion(num_simulations, c_puct):
    """From many observations at once, whose trees grow to different depths."""
    agent = agent_of()
    args = script.Args(num_simulations=num_simulations, c_puct=c_puct, gamma=0.9, state_size=6)
    obs, equal = np.random.default_rng(0).normal(size=(30, 4)).astype(np.float32), 0
    policies, values = script.search(agent, obs, args)
    assert (policies.max(1) < 1).any() or num_simulations == 1
    for row in range(30):
        root = Node(agent, agent.encode(torch.from_numpy(obs[row : row + 1])), 0.0)
        known = [root.value]
        returns = [root.visit(agent, args, known) for _ in range(num_simulations)]
        expected = [edge["n"] / num_simulations for edge in root.edges]
        same = np.allclose(policies[row], expected)
        equal += same and values[row] == pytest.approx(np.mean(returns), rel=1e-3, abs=1e-3)
    assert equal >= 29  # rounding may turn one of two that are alike


class Chain:
    """A model of a known world: place 0 to 5; action 1 goes on, action 0 stays. Each step costs 1;
    the one from place 4 to 5 pays 20. It has no opinion of its own.
    """

    num_actions, support = 2, 20

    def parameters(self):
        return iter([torch.zeros(1)])

    def encode(self, obs):
        return obs

    def step(self, states, actions):
        following = (states[:, 0] + actions).clamp(max=5)
        arrived = (states[:, 0] == 4) & (actions == 1)
        rewards = torch.where(arrived, 20.0, torch.where(states[:, 0] == 5, 0.0, -1.0))
        return following[:, None], (script.categories(rewards, 20) + 1e-30).log()

    def predict(self, states):
        values = script.categories(torch.zeros(len(states)), 20) + 1e-30
        return torch.zeros(len(states), 2), values.log()


def test_search_finds_a_reward_some_steps_ahead():
    args = script.Args(num_simulations=200, gamma=0.9, state_size=1)
    policies, values = script.search(Chain(), np.float32([[2], [4], [5]]), args)
    assert (policies.argmax(1)[:2] == 1).all()
    assert values[2] == pytest.approx(0, abs=1e-3)
    assert 5 < values[0] < 0.81 * 20 - 1.9 and 10 < values[1] < 20  # means over all simulations


def test_the_first_simulations_by_hand():
    """From place 4, gamma 0.5. Q is -1 and 20, v always 0; after action 1, there is no reward."""
    args = script.Args(num_simulations=3, gamma=0.5, c_puct=1.0, state_size=1)
    trees = script.Trees(Chain(), np.float32([[4]]), args)
    for node, (visits, totals) in enumerate([
        ([1, 0], [-1, 0]), ([1, 1], [-1, 20]), ([1, 2], [-1, 40])
    ], 1):  # fmt: skip
        trees.simulate(node)
        assert trees.visits[0, 0].tolist() == visits
        np.testing.assert_allclose(trees.totals[0, 0], totals, rtol=1e-3)
    assert trees.children[0, 0].tolist() == [1, 2] and trees.children[0, 2].tolist() == [3, 0]
    assert trees.states[0, :, 0].tolist() == [4, 4, 5, 5]
    np.testing.assert_allclose(trees.rewards[0], [0, -1, 20, 0], rtol=1e-3, atol=1e-3)
    assert (trees.least[0], trees.largest[0]) == pytest.approx((-1, 20), rel=1e-3)


def test_noise_is_mixed_into_the_root_only():
    agent, obs = agent_of(), np.zeros((2, 4), np.float32)
    noise = np.eye(3, dtype=np.float32)[[2, 1]]
    args = script.Args(num_simulations=1, root_noise=1.0, state_size=6)
    assert script.search(agent, obs, args, noise)[0].argmax(1).tolist() == [2, 1]
    args = script.Args(num_simulations=9, root_noise=0.25, state_size=6)
    made, kept = [], script.Trees

    class Noted(kept):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append(self)

    script.Trees = Noted
    try:
        script.search(agent, obs, args, noise)
    finally:
        script.Trees = kept
    (trees,) = made
    with torch.no_grad():
        priors, below = (
            agent.predict(torch.from_numpy(trees.states[:, node]))[0].softmax(1).numpy()
            for node in (0, 1)
        )
    np.testing.assert_allclose(trees.priors[:, 0], 0.75 * priors + 0.25 * noise, rtol=1e-4)
    np.testing.assert_allclose(trees.priors[:, 1], below, rtol=1e-4)


@pytest.mark.parametrize("alpha", [0.3, 2.0])
def test_noise_is_dirichlet(alpha):
    """Of k actions, each has the mean 1/k and the variance (k - 1) / (k^2 * (k * alpha + 1))."""
    torch.manual_seed(0)
    noise = script.dirichlet_noise(20_000, 4, alpha)
    np.testing.assert_allclose(noise.sum(1), 1, rtol=1e-5)
    np.testing.assert_allclose(noise.mean(0), 1 / 4, atol=0.01)
    np.testing.assert_allclose(noise.var(0), 3 / (16 * (4 * alpha + 1)), rtol=0.06)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 0.01])
def test_actions_are_drawn_from_pi_to_the_power(temperature):
    torch.manual_seed(0)
    policies = np.array([[0.5, 0.3, 0.2]]).repeat(40_000, 0)
    shares = np.bincount(script.draw(policies, temperature), minlength=3) / 40_000
    weights = np.array([0.5, 0.3, 0.2]) ** (1 / temperature)
    np.testing.assert_allclose(shares, weights / weights.sum(), atol=0.01)


# ---- targets, update -----------------------------------------------------------------------------


def batch_of(length=9, num=40, num_actions=3):
    torch.manual_seed(1)
    terminated, truncated = torch.rand(2, length, num) < 0.12
    actions, policies = (
        torch.randint(num_actions, (length, num)),
        torch.rand(length, num, num_actions),
    )
    policies = policies / policies.sum(-1, keepdim=True)
    rewards, values, last_values = 3 * torch.randn(3, length, num)
    return script.Batch(
        torch.randn(num, 4), actions, rewards, terminated, terminated | truncated, policies, values,
        last_values * (truncated & ~terminated),
    )  # fmt: skip


def test_targets_against_their_definition():
    batch, args = batch_of(), script.Args(unroll_steps=3, n_step=5, gamma=0.9)
    found, kinds = script.targets(batch, args), set()
    for k, b in np.ndindex(4, 40):
        ends = [j for j in range(k) if batch.ended[j, b]]
        kind = "running" if not ends else "over" if batch.terminated[ends[0], b] else "unknown"
        kinds.add(kind)
        assert found.running[k, b] == (kind == "running")
        assert found.known[k, b] == (kind != "unknown")
        assert torch.equal(found.policies[k, b], batch.policies[k, b])
        z, reward = 0.0, 0.0
        if kind == "running":
            reward = batch.rewards[k, b].item()
            for j in range(5):
                z += 0.9**j * batch.rewards[k + j, b].item()
                if batch.ended[k + j, b]:
                    if not batch.terminated[k + j, b]:
                        z += 0.9 ** (j + 1) * batch.last_values[k + j, b].item()
                    break
            else:
                z += 0.9**5 * batch.values[k + 5, b].item()
        if kind != "unknown":
            assert found.returns[k, b].item() == pytest.approx(z, abs=1e-4)
            assert found.rewards[k, b].item() == pytest.approx(reward, abs=1e-5)
    assert kinds == {"running", "over", "unknown"}
    assert all(len(part) == 4 for part in found)


@pytest.mark.parametrize("limit", [0.0, 0.01])
def test_one_step_down_the_gradient_of_the_definition(limit):
    """One window after the other; a hook halves what flows back through a step of the model."""
    agent, batch = agent_of(scale=1.0), batch_of(num=12)
    args = script.Args(
        unroll_steps=3, n_step=5, gamma=0.9, vf_coef=0.7, max_grad_norm=limit, state_size=6
    )
    made = script.targets(batch, args)
    before = copy.deepcopy(agent)
    losses, entropy = {"policy": 0, "value": 0, "reward": 0}, 0

    def distance(number, logits):
        shares = script.categories(number, 20)
        return -(shares * (logits.exp() / logits.exp().sum()).log()).sum()

    for b in range(12):
        states = before.encode(batch.obs[b : b + 1])
        for k in range(4):
            share = 1 / 12 if k == 0 else 1 / 12 / 3
            logits, values = before.predict(states)
            if made.running[k, b]:
                log_p = (logits[0].exp() / logits[0].exp().sum()).log()
                losses["policy"] -= share * (made.policies[k, b] * log_p).sum()
            if made.known[k, b]:
                losses["value"] += share * distance(made.returns[k, b], values[0])
            if k < 3:
                states, rewards = before.step(states, batch.actions[k, b : b + 1])
                if made.known[k, b]:
                    losses["reward"] += distance(made.rewards[k, b], rewards[0]) / 12 / 3
                states = states.clone()
                states.register_hook(lambda gradient: gradient / 2)
    loss = losses["policy"] + 0.7 * losses["value"] + losses["reward"]
    gradients = torch.autograd.grad(loss, list(before.parameters()))
    norm = math.sqrt(sum(gradient.square().sum().item() for gradient in gradients))
    scale = 0.01 / norm if limit else 1.0
    assert norm > 0.02
    optimizer = torch.optim.SGD(agent.parameters(), lr=2.0)
    agent.f[0].weight.grad = torch.ones_like(agent.f[0].weight)  # what is left over is no matter
    metrics = script.update(agent, optimizer, batch, args)
    for old, gradient, new in zip(before.parameters(), gradients, agent.parameters()):
        torch.testing.assert_close(new.detach(), old - 2 * scale * gradient, rtol=1e-3, atol=1e-5)
    for policy in batch.policies.flatten(0, 1):
        entropy -= sum(p * math.log(p) for p in policy.tolist()) / 9 / 12
    found = {tag: value.item() for tag, value in metrics.items()}
    wanted = {f"losses/{name}_loss": value.item() for name, value in losses.items()}
    assert found == pytest.approx(wanted | {"losses/entropy": entropy}, rel=1e-3)
    assert not any(value.requires_grad for value in metrics.values())


@pytest.mark.parametrize("name, other", [
    ("make_env", dqn_cartpole), ("evaluate", dqn_cartpole), ("rescale", r2d2_cartpole),
    ("unscale", r2d2_cartpole), ("n_step_returns", r2d2_cartpole), ("update", alphazero_tictactoe),
])  # fmt: skip
def test_what_others_have_too_is_the_same_and_tested_there(name, other):
    ours, theirs = (inspect.getsource(getattr(module, name)) for module in (script, other))
    assert ours == theirs


# ---- ReplayBuffer --------------------------------------------------------------------------------

SMALL = dict(num_envs=2, unroll_steps=2, n_step=3, buffer_size=41, learning_starts=20)


def fill(buffer, first, last):
    """Rows that say in all their parts which they are: t + 1000 of the second environment."""
    for t in range(first, last):
        n = np.float32([t, t + 1000])
        obs, policies = np.stack([n, -n], 1), np.stack([n / 3, n, n], 1)
        buffer.add(obs, n.astype(int) % 3, n / 2, n % 4 == 0, n % 2 == 0, policies, n / 5, -n)


def rows_of(batch):
    """The numbers (L, B) of the rows in a batch. All their parts must be of the same ones."""
    n = 2 * batch.rewards
    assert torch.equal(batch.obs, torch.stack([n[0], -n[0]], 1))
    assert torch.equal(batch.actions, n.long() % 3) and torch.equal(batch.last_values, -n)
    assert torch.equal(batch.terminated, n % 4 == 0) and torch.equal(batch.ended, n % 2 == 0)
    assert torch.equal(batch.policies[..., 2], n)
    torch.testing.assert_close(batch.values, n / 5)
    return n.long()


@pytest.mark.parametrize("count", [6, 7, 19, 20, 21, 39, 73])
def test_whole_windows_of_the_last_rows_are_drawn(count):
    """20 rows fit, and a window has 6."""
    torch.manual_seed(0)
    buffer = script.ReplayBuffer(2, 3, script.Args(**SMALL))
    assert (buffer.num_rows, buffer.length) == (20, 6)
    fill(buffer, 0, count)
    rows = rows_of(buffer.sample(8000))
    assert rows.shape == (6, 8000) and (rows[1:] - rows[:-1] == 1).all()
    starts, counts = np.unique(rows[0], return_counts=True)
    expected = list(range(max(0, count - 20), count - 5))
    assert starts.tolist() == expected + [start + 1000 for start in expected]
    np.testing.assert_allclose(counts / 8000, 1 / len(starts), atol=0.025)


@pytest.mark.parametrize("count", [0, 11, 50])
def test_buffer_comes_back_from_a_checkpoint(tmp_path, count):
    buffers, drawn = [script.ReplayBuffer(2, 3, script.Args(**SMALL)) for _ in range(2)], []
    fill(buffers[0], 0, count)
    torch.save(buffers[0].state_dict(), tmp_path / "buffer.pt")
    buffers[1].load_state_dict(torch.load(tmp_path / "buffer.pt", weights_only=True))
    for buffer in buffers:
        fill(buffer, count, count + 9)
        torch.manual_seed(1)
        drawn.append(rows_of(buffer.sample(100)).tolist())
    assert drawn[0] == drawn[1]


# ---- The loop ------------------------------------------------------------------------------------

FEW = dict(
    env_id="Diary-v0", total_timesteps=480, num_envs=4, num_simulations=5, learning_starts=60,
    buffer_size=5000, batch_size=16, train_frequency=8, eval_episodes=3, learning_rate=1e-2,
    unroll_steps=3, n_step=2, state_size=8,
)  # fmt: skip


def test_the_loop(tmp_path, monkeypatch):
    """What is searched, played, kept and learned; all in a plain loop over the steps."""
    searches, draws, updates = (
        recorded(monkeypatch, script, name) for name in ("search", "draw", "update")
    )
    state, points = train(script, tmp_path, **FEW | {"end_temperature": 0.4})
    steps, row_searches = side_by_side(4), [call for call in searches if len(call[0]) == 4]
    others = iter([call for call in searches if len(call[0]) == 3])
    assert state["buffer"]["rows_written"] == len(row_searches) == len(draws) == 120
    for row in range(120):
        (_, obs, _, noise), (policies, values) = row_searches[row]
        (drawn_from, temperature), actions = draws[row]
        assert (drawn_from == policies).all()
        assert temperature == pytest.approx(1 - 0.6 * row / 120)
        np.testing.assert_allclose(noise.sum(1), 1, rtol=1e-5)
        entries, last_values = [step for _, step in steps[4 * row : 4 * row + 4]], np.zeros(4)
        truncated = np.array([entry[5] for entry in entries])
        if truncated.any():
            (_, last_obs, _), (_, found) = next(others)
            np.testing.assert_allclose(last_obs, [entry[3] for entry in entries if entry[5]])
            last_values[truncated] = found
        for i, (seen, action, reward, _, terminated, cut) in enumerate(entries):
            assert obs[i].tolist() == seen and actions[i] == action
            parts = (
                seen, action, reward, terminated, terminated or cut, policies[i], values[i],
                last_values[i],
            )  # fmt: skip
            for column, part in zip(state["buffer"]["rows"], parts, strict=True):
                np.testing.assert_allclose(column[row, i], part, rtol=1e-5)
    check_episodes(points, steps)
    # Updates are due at the steps that 8 divides, from 60 on, at a rate that falls.
    rates = [optimizer.param_groups[0]["lr"] for (_, optimizer, _, _), _ in updates]
    np.testing.assert_allclose(rates, [1e-2 * (1 - (k - 4) / 480) for k in range(64, 481, 8)])
    shapes = {(len(batch.obs), *batch.rewards.shape) for (_, _, batch, _), _ in updates}
    assert shapes == {(16, 6, 16)}
    (group,) = updates[0][0][1].param_groups
    assert type(updates[0][0][1]) is torch.optim.Adam
    assert group["weight_decay"] == 2 * script.Args().weight_decay


@pytest.mark.parametrize("env_id", ["Truncates-v0", "Terminates-v0"])
def test_a_time_limit_is_not_the_end_of_the_world(tmp_path, env_id):
    """Truncated for ever, a reward of 1 is worth 1 / (1 - gamma) in every step.

    Where the episode ends, one observation stands for 3, 2 and 1 rewards to come: h of the value is
    the mean of the three.
    """
    flags = {"env_id": env_id, "gamma": 0.8, "total_timesteps": 4000, "n_step": 5}
    state, _ = train(script, tmp_path, **FEW | flags)
    network = script.Agent(1, 2, script.Args(**FEW))
    network.load_state_dict(state["network"])
    _, logits = network.predict(network.encode(torch.ones(1, 1)))
    h = script.rescale(torch.tensor([2.44, 1.8, 1.0])).mean()
    expected = 5 if env_id == "Truncates-v0" else script.unscale(h).item()
    assert script.expected(logits).item() == pytest.approx(expected, rel=0.15)


def test_the_most_visited_action_is_played_in_evaluation():
    agent, args = agent_of(), script.Args(num_simulations=20, state_size=6)
    obs = np.random.default_rng(1).normal(size=(50, 4)).astype(np.float32)
    expected = script.search(agent, obs, args)[0].argmax(1)
    assert script.play(args, agent, obs).tolist() == expected.tolist()


def test_every_setting_of_the_algorithm_changes_the_outcome(tmp_path):
    def outcome(**settings):
        state, _ = train(script, tmp_path, **FEW | {"total_timesteps": 160} | settings)
        return [weights.tolist() for weights in state["network"].values()]

    check_settings(script, outcome, {
        "seed": 2, "total_timesteps": 168, "num_envs": 5, "learning_rate": 5e-3, "anneal_lr": False,
        "weight_decay": 0.1, "gamma": 0.9, "n_step": 3, "unroll_steps": 2, "vf_coef": 0.1,
        "num_simulations": 6, "c_puct": 3.0, "root_noise": 0.9, "dirichlet_alpha": 0.1,
        "end_temperature": 0.1, "buffer_size": 60, "batch_size": 15, "learning_starts": 100,
        "train_frequency": 5, "gradient_steps": 2, "max_grad_norm": 0.01, "state_size": 7,
        "support": 19,
    })  # fmt: skip
