"""What dt_graph.py has of its own: its graph, sequences of recorded steps, what a token sees, and
how the policy asks for a return.

What dqn_cartpole.py has word for word is tested there.
"""

import inspect
import math

import dqn_cartpole
import dt_graph as script
import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diary import Diary, check_settings, recorded, train
from gymnasium.spaces import Box, Discrete
from torch import nn

# For the tests that all scripts share.
TINY = (
    "--total-timesteps 400 --num-envs 3 --dataset-size 600 --num-sequences 4 --sequence-length 3 "
    "--num-layers 1 --checkpoint-frequency 100 --eval-frequency 140 --eval-episodes 5"
)
OWN = "discrete"
OWN_FLAGS = (
    "--total-timesteps 300 --dataset-size 10000 --num-sequences 32 --target-return 9 --num-envs 3"
)
WRONG_SPACES = ["Pendulum-v1"]
DIVERGES = "--learning-rate 1e30"
BAD = [
    ("--sequence-length 0", "--sequence-length"),
    ("--target-return nan", "--target-return"),
    ("--target-return best", "--target-return"),
    ("--dataset nowhere", "nowhere"),
    ("--dataset nowhere.npz", "nowhere.npz"),
    ("--dataset dt_graph.py", "dt_graph.py"),
    ("--env-kwargs '{\"arcs\": 20}'", "--env-kwargs"),
]
PLAYS = False  # while it trains: its data are recorded
LEARNS = [
    ("--total-timesteps 500 --dataset-size 20000 --eval-episodes 10", -8),  # shortest: 7 steps
]


@pytest.mark.parametrize("name", ["make_env", "Envs"])
def test_what_dqn_has_too_is_the_same_and_tested_there(name):
    ours, theirs = (inspect.getsource(getattr(s, name)) for s in (script, dqn_cartpole))
    assert ours == theirs


# ---- Graph ---------------------------------------------------------------------------------------


def breadth_first(arcs, start):
    """Node -> steps of a shortest way from the start."""
    found, front = {start: 0}, [start]
    while front:
        front = [end for node in front for end in set(arcs[node]) if end not in found]
        for node in front:
            found.setdefault(node, None)
        steps = 1 + max(step for step in found.values() if step is not None)
        found |= {node: steps for node in front if found[node] is None}
    return found


@pytest.mark.parametrize("nodes, arcs", [(20, 2), (20, 3), (12, 1), (3, 2), (2, 1)])
def test_start_and_goal_are_the_nodes_that_are_furthest_apart(nodes, arcs):
    graphs = set()
    for seed in range(8):
        env = script.Graph(nodes, arcs, seed)
        leads = env.next.tolist()
        assert len(leads) == nodes and env.action_space.n == arcs
        for node, ends in enumerate(leads):
            assert len(set(ends)) == arcs and node not in ends and set(ends) <= set(range(nodes))
        ways = [breadth_first(leads, node) for node in range(nodes)]
        for start, end in np.ndindex(nodes, nodes):
            assert env.distances[start, end] == ways[start].get(end, math.inf)
        assert ways[env.start][env.goal] == max(max(way.values()) for way in ways)
        assert (script.Graph(nodes, arcs, seed).next == env.next).all()
        graphs.add(env.next.tobytes())
    assert len(graphs) > (nodes > 3)


def test_a_step_takes_an_arc_and_costs_1_until_the_goal():
    env, random = script.Graph(), np.random.default_rng(0)
    goals = 0
    for episode in range(60):
        obs, _ = env.reset(seed=episode)
        assert obs.argmax() == env.start and obs.sum() == 1
        for _ in range(40):
            action, node = random.integers(2), obs.argmax()
            obs, reward, terminated, truncated, _ = env.step(action)
            assert obs.argmax() == env.next[node, action] and env.observation_space.contains(obs)
            assert (reward, terminated, truncated) == (-1, obs.argmax() == env.goal, False)
            if terminated:
                goals += 1
                break
    assert 10 < goals < 60


def test_the_default_graph_is_as_the_docstring_says():
    """7 steps; a random walk is one of the shortest in 43 cases. It has 20 steps."""
    env = gym.make("Graph-v0")
    graph = env.unwrapped
    assert graph.next.shape == (20, 2) and graph.distances[graph.start, graph.goal] == 7
    chance = np.eye(20)[graph.start]
    for _ in range(7):
        chance = np.bincount(graph.next.ravel(), np.repeat(chance / 2, 2), 20)
    assert 1 / chance[graph.goal] == pytest.approx(43, abs=0.5)
    env.reset()
    ends = [env.step(0)[2:4] for _ in range(20)]  # always the first arc: never to the goal
    assert ends == [(False, False)] * 19 + [(False, True)]


def test_it_is_drawn():
    """Each node by another picture: on the shortest way, eight."""
    env, pictures, end = script.Graph(), set(), False
    env.reset()
    while True:
        picture = env.render()
        assert picture.shape == (160, 160, 3) and picture.dtype == np.uint8
        pictures.add(picture.tobytes())
        if end:
            break
        left = env.distances[env.next[env.node], env.goal]
        _, _, end, _, _ = env.step(left.argmin())
    assert len(pictures) == 8


# ---- Episodes and sequences ----------------------------------------------------------------------


def random_episodes(count=30, longest=7, seed=0):
    """Lists of (obs, action, reward)."""
    rng = np.random.default_rng(seed)
    return [
        [(rng.normal(size=2), int(rng.integers(3)), rng.normal()) for _ in range(length)]
        for length in rng.integers(1, longest + 1, count)
    ]


def as_data(episodes):
    """What Episodes should be, by a double loop."""
    rows = []
    for episode in episodes:
        for t, (obs, action, reward) in enumerate(episode):
            to_go = sum(later[2] for later in episode[t:])
            rows.append((to_go, obs, action, reward, t))
    kinds = np.float32, np.float32, np.int64, np.float32, np.int64
    columns = (torch.from_numpy(np.array(c).astype(kind)) for c, kind in zip(zip(*rows), kinds))
    return script.Episodes(*columns)


def assert_same(ours, expected):
    for name, column, theirs in zip(expected._fields, ours, expected):
        torch.testing.assert_close(column, theirs, rtol=1e-5, atol=1e-5, msg=name)


def test_returns_to_go_and_times_by_a_double_loop():
    episodes = random_episodes()
    expected = as_data(episodes)
    last = torch.tensor([i == len(e) - 1 for e in episodes for i in range(len(e))])
    returns = script.returns_to_go(expected.rewards, last)
    torch.testing.assert_close(returns, expected.returns)
    assert returns.dtype == torch.float32
    assert torch.equal(script.times_in_episodes(last), expected.times)


def test_a_long_sum_of_rewards_is_not_rounded_away():
    rewards = torch.full((100_000,), 0.1)
    returns = script.returns_to_go(rewards, torch.arange(100_000) == 99_999)
    assert returns[0].item() == pytest.approx(10_000, rel=1e-6)


@pytest.mark.parametrize("begun", [True, False])
def test_whole_episodes_of_environments_side_by_side(begun):
    """What is cut off at either end is left out; one environment has no end at all."""
    steps, expected = [], []
    for i, seed in enumerate((1, 2, 3)):
        episodes = random_episodes(20, seed=seed)
        if i == 1:
            episodes = [sum(episodes, [])]
        rows = [(*step, k == len(e) - 1) for e in episodes for k, step in enumerate(e)][:40]
        steps.append(rows)
        ends = [k for k, row in enumerate(rows) if row[3]]
        firsts = [0, *(end + 1 for end in ends)]
        spans = list(zip(firsts, ends))[0 if begun else 1 :]
        expected += [[row[:3] for row in rows[a : b + 1]] for a, b in spans]
    kinds = np.float32, np.int64, np.float32, bool
    columns = [
        torch.from_numpy(np.array([[rows[t][c] for rows in steps] for t in range(40)]).astype(kind))
        for c, kind in enumerate(kinds)
    ]  # fmt: skip
    data = script.whole_episodes(*columns, begun)
    assert len(data.rewards) < (80 if begun else 76)  # of 40 each, of two
    assert_same(data, as_data(expected))
    none = script.whole_episodes(*(column[:, 1:2] for column in columns), begun)
    assert [len(column) for column in none] == [0] * 5


@pytest.mark.parametrize("length", [1, 3, 9])
def test_sequences_by_enumeration(length):
    """The steps up to each row, of its own episode, at the right; padding at the left."""
    episodes = random_episodes()
    data, row = as_data(episodes), 0
    ends = torch.arange(len(data.rewards))
    batch = script.sequences(data, ends, length)
    assert batch.real.dtype == torch.bool and batch.real.shape == (len(ends), length)
    for episode in episodes:
        whole = as_data([episode])
        for t in range(len(episode)):
            known = min(t + 1, length)
            assert batch.real[row].tolist() == [False] * (length - known) + [True] * known
            for ours, theirs in zip(batch, whole):
                torch.testing.assert_close(
                    ours[row, length - known :], theirs[t + 1 - known : t + 1]
                )
            row += 1
    some = script.sequences(data, ends[[20, 3, 3]], length)
    assert all(torch.equal(ours, theirs[[20, 3, 3]]) for ours, theirs in zip(some, batch))


# ---- What a token sees ---------------------------------------------------------------------------


def test_visible_by_a_triple_loop():
    real = torch.tensor([[True] * 4, [False, True, True, True], [False, False, False, True]])
    seen = script.visible(real)
    assert seen.shape == (3, 1, 12, 12)
    for b in range(3):
        for one in range(12):
            for other in range(12):
                expected = one == other or (other < one and bool(real[b, other // 3]))
                assert seen[b, 0, one, other] == expected


def make_agent(seed=0, max_times=12, num_layers=2, condition=True):
    """With weights that are large enough for everything to matter."""
    torch.manual_seed(seed)
    agent = script.Agent(2, 3, max_times, num_layers, condition).double()
    for weights in agent.parameters():
        weights.data += 0.2 * torch.randn_like(weights)
    agent.return_scale.mean[:], agent.return_scale.deviation[:] = 1.5, 2.0
    agent.obs_scale.mean[:] = torch.tensor([0.5, -0.5])
    agent.obs_scale.deviation[:] = torch.tensor([0.5, 3.0])
    agent.reward_scale.mean[:], agent.reward_scale.deviation[:] = -0.3, 0.7
    return agent


def random_batch(size=6, length=4, padding=True, seed=0):
    """Row b has b steps of padding, as far as it goes."""
    generator = torch.Generator().manual_seed(seed)
    shape = size, length
    returns, rewards = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    obs = torch.randn(*shape, 2, generator=generator, dtype=torch.float64)
    actions = torch.randint(3, shape, generator=generator)
    lacking = torch.arange(size).clamp(max=length - 1)[:, None] * padding
    real = torch.arange(length) >= lacking
    times = (torch.arange(length) - lacking + 2 * (lacking == 0)).clamp(min=0)
    return script.Batch(returns, obs, actions, rewards, times, real)


def changed(batch, name, step, seed=9):
    """With other numbers in this step of all sequences."""
    column, other = getattr(batch, name).clone(), getattr(random_batch(seed=seed), name)
    column[:, step] = (column[:, step] + 1) % 3 if name == "actions" else other[:, step]
    if name == "times":
        column[:, step] = batch.times[:, step] + 5
    return batch._replace(**{name: column})


@pytest.mark.parametrize("name", ["returns", "obs", "actions", "times"])
def test_a_prediction_sees_what_came_before_it_and_nothing_later(name):
    """Of a step: R and s, and the time; the reward sees the action, too, the policy does not."""
    agent, batch = make_agent(), random_batch(padding=False)
    logits, rewards = agent(batch)
    assert logits.shape == (6, 4, 3) and rewards.shape == (6, 4)
    for step in range(4):
        others = agent(changed(batch, name, step))
        own_logits = name != "actions"
        for t in range(4):
            for before, after, own in zip((logits, rewards), others, (own_logits, True)):
                equal = (before[:, t] == after[:, t]).reshape(6, -1)
                if t < step or (t == step and not own):
                    torch.testing.assert_close(before[:, t], after[:, t])
                else:
                    assert not equal.any(), (step, t)


def test_rewards_are_not_shown():
    agent, batch = make_agent(), random_batch()
    for ours, theirs in zip(agent(batch), agent(batch._replace(rewards=batch.rewards + 1))):
        assert torch.equal(ours, theirs)


def test_padding_is_not_seen_and_a_sequence_is_as_if_alone():
    """Whatever stands in the padding, and as if there were none, and no other sequence."""
    agent, batch = make_agent(), random_batch()
    other = random_batch(seed=3)
    noise = script.Batch(*(
        torch.where(batch.real if a.ndim == 2 else batch.real[..., None], a, b)
        for a, b in zip(batch, other._replace(real=batch.real))
    ))  # fmt: skip
    for found in agent(batch), agent(noise):
        assert all(values.isfinite().all() for values in found)
        for b in range(6):
            part = batch.real[b]
            alone = script.Batch(*(column[b : b + 1, part] for column in batch))
            for ours, theirs in zip(found, agent(alone)):
                torch.testing.assert_close(ours[b, part], theirs[0])


def test_the_time_is_that_in_the_episode_not_in_the_sequence():
    """A row of the table each; the places in the sequence have no embedding. After the last row,
    which load_policy's policy may pass, it counts no further.
    """
    agent, batch = make_agent(), random_batch(padding=False)
    later = batch._replace(times=batch.times + 3)
    shifted = make_agent()
    table = shifted.embed_time.weight.data
    table[3:] = agent.embed_time.weight.data[:-3]
    for ours, theirs in zip(agent(batch), shifted(later)):
        torch.testing.assert_close(ours, theirs)
    assert not torch.equal(agent(batch)[0], agent(later)[0])
    beyond = [agent(batch._replace(times=torch.full_like(batch.times, t)))[0] for t in (11, 12, 99)]
    assert torch.equal(beyond[0], beyond[1]) and torch.equal(beyond[0], beyond[2])


def test_without_condition_returns_change_nothing_and_with_it_they_do():
    batch = random_batch()
    for condition in (True, False):
        agent = make_agent(condition=condition)
        found = agent(batch)[0], agent(batch._replace(returns=batch.returns - 7))[0]
        assert torch.equal(*found) is not condition


def test_the_network_is_pytorchs_transformer():
    """nn.TransformerEncoder with the same weights, of tokens that are put together by hand."""
    agent, batch = make_agent(), random_batch(padding=False)
    wide = script.HIDDEN
    layers = []
    for ours in agent.layers:
        layer = nn.TransformerEncoderLayer(
            wide, script.HEADS, 4 * wide, 0.0, "gelu", batch_first=True, norm_first=True
        ).double()
        layer.load_state_dict({
            "self_attn.in_proj_weight": ours.query_key_value.weight,
            "self_attn.in_proj_bias": ours.query_key_value.bias,
            "self_attn.out_proj.weight": ours.join_heads.weight,
            "self_attn.out_proj.bias": ours.join_heads.bias,
            "linear1.weight": ours.mlp[1].weight, "linear1.bias": ours.mlp[1].bias,
            "linear2.weight": ours.mlp[3].weight, "linear2.bias": ours.mlp[3].bias,
            "norm1.weight": ours.norm.weight, "norm1.bias": ours.norm.bias,
            "norm2.weight": ours.mlp[0].weight, "norm2.bias": ours.mlp[0].bias,
        })  # fmt: skip
        layers.append(layer)
    tokens = []
    for t in range(4):
        time = agent.embed_time.weight[batch.times[:, t]]
        to_go = (batch.returns[:, t : t + 1] - 1.5) / 2
        obs = (batch.obs[:, t] - torch.tensor([0.5, -0.5])) / torch.tensor([0.5, 3.0])
        tokens += [
            F.linear(to_go, agent.embed_return.weight, agent.embed_return.bias) + time,
            F.linear(obs, agent.embed_obs.weight, agent.embed_obs.bias) + time,
            agent.embed_action.weight[batch.actions[:, t]] + time,
        ]
    x = agent.first_norm(torch.stack(tokens, 1))
    mask = nn.Transformer.generate_square_subsequent_mask(12, dtype=torch.float64)
    for layer in layers:
        x = layer(x, mask)
    x = agent.last_norm(x)
    logits, rewards = agent(batch)
    torch.testing.assert_close(logits, agent.actor(x[:, 1::3]))
    torch.testing.assert_close(rewards, agent.reward(x[:, 2::3])[..., 0])


# ---- The loss ------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [0.0, 0.01, 100.0])
@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_gradient_is_that_of_the_mean_over_all_real_steps(clip, compile):
    """By a double loop. What is left of older gradients is no matter."""
    agent, reference, batch = make_agent(), make_agent(), random_batch()
    if compile:
        torch.compiler.reset()
        torch._dynamo.config.trace_autograd_ops = True
    optimizer = torch.optim.SGD(agent.parameters(), lr=0.1)
    for weights in agent.parameters():
        weights.grad = torch.ones_like(weights)
    args = script.Args(max_grad_norm=clip, compile=compile)
    metrics = script.update(agent, optimizer, batch, args)

    logits, rewards = reference(batch)
    policy, reward, count = 0.0, 0.0, 0
    for b in range(6):
        for t in range(4):
            if batch.real[b, t]:
                exps = logits[b, t].exp()
                policy = policy - (exps[batch.actions[b, t]] / exps.sum()).log()
                target = (batch.rewards[b, t] + 0.3) / 0.7
                reward = reward + (rewards[b, t] - target) ** 2
                count += 1
    assert count == 4 + 3 + 2 + 1 + 1 + 1
    gradients = torch.autograd.grad((policy + reward) / count, list(reference.parameters()))
    norm = math.sqrt(sum(float((g**2).sum()) for g in gradients))
    share = min(1, clip / norm) if clip else 1
    assert (share < 1) == (clip == 0.01)
    old = [weights.detach().clone() for weights in reference.parameters()]
    for found, before, gradient in zip(agent.parameters(), old, gradients):
        torch.testing.assert_close(
            found.detach(), before - 0.1 * share * gradient, atol=1e-6, rtol=1e-4
        )
    assert {tag: value.item() for tag, value in metrics.items()} == {
        "losses/policy_loss": pytest.approx(policy.item() / count),
        "losses/reward_loss": pytest.approx(reward.item() / count),
    }
    assert not any(value.requires_grad for value in metrics.values())


def test_padding_does_not_count_in_the_loss():
    """Half of the same sequences with padding: the same gradient as without it."""
    batch, gradients = random_batch(padding=False), []
    noise = random_batch(length=3, seed=5)._replace(real=torch.zeros(6, 3, dtype=torch.bool))
    padded = script.Batch(*(torch.cat([a, b], 1) for a, b in zip(noise, batch)))
    for one in batch, padded:
        agent = make_agent()
        script.compute_gradient(agent, one, script.Args(max_grad_norm=0.0))
        gradients.append([weights.grad for weights in agent.parameters()])
    for ours, theirs in zip(*gradients):
        torch.testing.assert_close(ours, theirs)


def test_statistics_are_those_of_the_data():
    """Of each number by itself; 0.001 is added to a deviation. The best return is of an episode,
    not of its end.
    """
    data = as_data([[(np.array([3.0, -50.0]), 0, -2.0), (np.array([4.0, -90.0]), 1, -1.0)],
                    [(np.array([8.0, -10.0]), 2, -4.0)]])  # fmt: skip
    agent = script.Agent(2, 3, 12, 1, True)
    agent.measure(data)
    for scale, rows in (
        (agent.return_scale, [[-3], [-1], [-4]]), (agent.reward_scale, [[-2], [-1], [-4]]),
        (agent.obs_scale, [[3, -50], [4, -90], [8, -10]]),
    ):  # fmt: skip
        rows = np.array(rows, float)
        np.testing.assert_allclose(scale.mean, rows.mean(0))
        np.testing.assert_allclose(scale.deviation, rows.std(0) + 1e-3)
        rows = torch.from_numpy(rows)
        expected = (rows - rows.mean(0)) / (rows.std(0, correction=0) + 1e-3)
        torch.testing.assert_close(scale(rows), expected)
        torch.testing.assert_close(scale.undo(scale(rows)), rows)
    assert agent.best_return == -3
    names = {"best_return", "obs_scale.mean", "return_scale.deviation", "reward_scale.mean"}
    assert names <= set(agent.state_dict())
    large = torch.arange(200_000)[:, None] % 2 + 1e6
    scale = script.Scale(1)
    scale.measure(large.float())
    assert scale.mean.item() == 1e6 + 0.5 and scale.deviation.item() == pytest.approx(0.501)


# ---- Acting --------------------------------------------------------------------------------------


def rewards_of(agent, batch):
    """What is foreseen of the last action, in the environment's units."""
    return agent(batch)[1][:, -1] * 0.7 - 0.3


@pytest.mark.parametrize("target", [None, 0.0])
@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("length", [1, 3])
def test_one_step_at_a_time_is_the_whole_sequence_at_once(target, told, length):
    """In three environments, whose episodes begin at other times, for longer than T steps."""
    agent, rng = make_agent().float(), np.random.default_rng(0)
    agent.best_return.fill_(4.5)
    args = script.Args(sequence_length=length, target_return=target)
    begins = np.zeros((9, 3), bool)
    begins[0], begins[2, 1], begins[5, 1:], begins[6, 2] = True, True, True, True
    all_obs = rng.normal(size=(9, 3, 2)).astype(np.float32)
    paid = rng.normal(size=(9, 3)).astype(np.float32)
    histories, start = [[], [], []], 4.5 if target is None else target
    for t in range(9):
        rewards = paid[t - 1] if told else None
        first = None if t == 0 and told else begins[t]
        actions = script.play(args, agent, all_obs[t], first, rewards)
        assert actions.shape == (3,) and actions.dtype == np.int64
        for i, history in enumerate(histories):
            if begins[t, i]:
                history.clear()
            if not history:
                to_go = start
            elif told:
                to_go = history[-1][0] - paid[t - 1, i]
            else:
                columns = as_sequence(history, length)
                to_go = history[-1][0] - rewards_of(agent, columns).item()
            history.append([to_go, all_obs[t, i], 0, len(history)])
            logits, _ = agent(as_sequence(history, length))
            assert actions[i] == logits[0, -1].argmax()
            history[-1][2] = int(actions[i])
            found = agent.state.returns[i, -1].item(), agent.state.times[i, -1].item()
            assert found == (pytest.approx(to_go, abs=1e-4), len(history) - 1)
            window = script.Batch(*(column[i : i + 1] for column in agent.state))
            torch.testing.assert_close(agent(window)[0][0, -1], logits[0, -1], atol=1e-5, rtol=1e-4)
    assert len({a for history in histories for _, _, a, _ in history}) > 1


def as_sequence(history, length):
    """The last steps of (return, obs, action, time), without padding."""
    returns, obs, actions, times = zip(*history[-length:])
    zeros = torch.zeros(1, len(returns))
    return script.Batch(
        torch.tensor([returns]).float(), torch.from_numpy(np.stack(obs))[None],
        torch.tensor([actions]), zeros, torch.tensor([times]), zeros == 0,
    )  # fmt: skip


# ---- Data sets -----------------------------------------------------------------------------------


def episodes_of(env):
    """The whole episodes of a Diary, as lists of (obs, action, reward)."""
    episodes, running = [], []
    for obs, action, reward, _, terminated, truncated in env.steps:
        running.append((np.array(obs), action, reward))
        if terminated or truncated:
            episodes.append(running)
            running = []
    return episodes


def test_random_play_is_what_happened():
    """Of whole episodes, with all actions, the same ones each time; it leaves torch as it was."""
    args = script.Args(env_id="Diary-v0", num_envs=3, dataset_size=301)
    Diary.made.clear()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    data = script.random_play(args)
    assert torch.equal(before, torch.get_rng_state())
    envs, Diary.made[:] = list(Diary.made), []
    assert [len(env.steps) for env in envs] == [101] * 3
    assert_same(data, as_data(sum(map(episodes_of, envs), [])))
    assert 280 < len(data.rewards) < 303 and data.actions.unique().tolist() == [0, 1, 2]
    assert_same(script.random_play(args), data)
    other = script.random_play(script.Args(env_id="Diary-v0", num_envs=3, dataset_size=301, seed=2))
    assert not torch.equal(other.actions[:50], data.actions[:50])


class Cycle(gym.Env):
    """A step leads on in a circle of three places. Limits may be where it began: place 0."""

    observation_space, action_space = Box(0, 2, (1,), np.float32), Discrete(2)

    def __init__(self, render_mode=None):
        self.steps = []
        Diary.made.append(self)

    def reset(self, *, seed=None, options=None):
        self.place = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        before, self.place = self.place, (self.place + int(action)) % 3
        self.steps.append(([before], int(action), float(self.place), None, False, False))
        return np.full(1, self.place, np.float32), float(self.place), False, False, {}


gym.register("Cycle-v0", entry_point=Cycle, max_episode_steps=4)
DQN = dict(
    total_timesteps=300, learning_starts=30, batch_size=30, hidden_size=8, eval_episodes=1,
    num_envs=3, start_e=1.0, end_e=1.0,
)  # fmt: skip


@pytest.mark.parametrize("size", [1000, 300, 299, 100, 99])
@pytest.mark.parametrize("env_id", ["Diary-v0", "Cycle-v0"])
def test_episodes_are_rebuilt_from_the_ring_of_dqn(tmp_path, env_id, size):
    """Of three environments, terminated or truncated, with what is kept of them: all of an episode,
    or nothing. Those of Cycle end by a limit that only counting can tell, if at place 0.
    """
    Diary.made.clear()
    settings = DQN | {"env_id": env_id, "buffer_size": size}
    folder = dqn_cartpole.train(dqn_cartpole.Args(**settings, runs_dir=str(tmp_path))).folder
    envs, expected = Diary.made[:3], []
    for i, env in enumerate(envs):
        if env_id == "Cycle-v0":
            ended = [t % 4 == 3 for t in range(100)]
            env.steps = [(*s[:5], end) for s, end in zip(env.steps, ended)]
        kept = -(-(300 - size) // 3) if size < 300 else 0  # rounds of steps that were overwritten
        begins = [0] + [t + 1 for t, s in enumerate(env.steps) if s[4] or s[5]]
        whole = [e for begin, e in zip(begins, episodes_of(env)) if begin >= kept]
        expected.append((whole, kept, begins))
    limit = gym.spec(env_id).max_episode_steps or script.MAX_EPISODE_STEPS
    data = script.read_run(script.Path(folder), env_id, limit)
    episodes = []
    for whole, kept, begins in expected:
        if kept > 0 and kept in begins:  # that it begins there cannot be known
            whole = whole[1:]
        episodes.append(whole)
    if env_id == "Diary-v0" or size >= 300:
        assert_same(data, as_data(sum(episodes, [])))
        assert 50 < len(data.rewards) <= 300
        return
    # Before a first end that shows, none can be counted: some episodes less, but no wrong ones.
    starts = (data.times == 0).nonzero().squeeze(1).tolist() + [len(data.times)]
    lengths = np.diff(starts)
    assert len(data.rewards) > 50 and set(lengths) == {4}
    known = [np.array([(o[0], a, r) for o, a, r in e]).tolist() for e in sum(episodes, [])]
    for start in starts[:-1]:
        rows = slice(start, start + 4)
        columns = data.obs[rows, 0], data.actions[rows], data.rewards[rows]
        assert torch.stack([c.float() for c in columns], 1).tolist() in known


def test_ends_by_hand():
    """Two environments, four steps. The first: 0 1 2 | 5 6, where the step to 3 does not lead to 5.
    The second stays at 7, and a limit of 2 is told by counting; at the end it is in an episode.
    """
    obs = torch.tensor([[0, 7], [1, 7], [2, 7], [5, 7], [6, 7]])[..., None].float()
    next_obs = torch.tensor([[1, 7], [2, 7], [3, 7], [6, 7], [8, 7]])[..., None].float()
    nothing, running = torch.zeros(5, 2, dtype=torch.bool), torch.tensor([False, True])

    def found(terminated=nothing, begun=True, limit=9, running=running):
        ends = script.find_ends(obs, next_obs, terminated, running, begun, limit)
        return [ends[:, i].nonzero().squeeze(1).tolist() for i in (0, 1)]

    assert found() == [[2, 4], []]
    assert found(running=~running) == [[2], [4]]
    assert found(limit=2) == [[1, 2, 4], [1, 3]]
    terminated = nothing.clone()
    terminated[0, 1] = True
    assert found(terminated) == [[2, 4], [0]]
    assert found(limit=2, begun=False) == [[2, 4], []]
    assert found(terminated, limit=2, begun=False) == [[2, 4], [0, 2, 4]]


def write_data(path, episodes, **changes):
    steps = [(*step, k == len(e) - 1) for e in episodes for k, step in enumerate(e)]
    obs, actions, rewards, last = map(np.array, zip(*steps))
    odd = last.cumsum() % 2 == 1
    arrays = {
        "observations": obs, "actions": actions + 5, "rewards": rewards,
        "terminals": last & odd, "timeouts": last & ~odd,
    }  # fmt: skip
    np.savez(path, **arrays | changes)
    return arrays


def read(path, **settings):
    args = script.Args(**{"env_id": "Diary-v0", "dataset": str(path)} | settings)
    envs = script.Envs(args, 1, 0)
    try:
        return script.read_dataset(args, envs)
    finally:
        envs.close()


def test_a_file_is_read_with_either_end_and_without_what_has_none(tmp_path):
    episodes, path = random_episodes(), tmp_path / "data.npz"
    arrays = write_data(path, episodes)
    assert_same(read(path), as_data(episodes))
    last = (arrays["terminals"] | arrays["timeouts"]).nonzero()[0]
    write_data(path, episodes, timeouts=np.zeros(len(arrays["rewards"])))
    assert len(read(path).rewards) == arrays["terminals"].nonzero()[0][-1] + 1
    assert (read(path).times == 0).sum() == arrays["terminals"].sum() < len(last)


def test_a_file_that_does_not_fit_is_refused_in_one_line(tmp_path):
    episodes, path = random_episodes(), tmp_path / "data.npz"
    arrays = write_data(path, episodes)
    obs, rewards = arrays["observations"], arrays["rewards"].copy()
    rewards[3] = np.nan
    nothing = np.zeros(len(rewards))
    for changes, words in (
        ({"terminals": nothing, "timeouts": nothing}, "no whole episode"),
        ({"observations": obs[:, :1]}, "does not fit"),
        ({"observations": obs[1:]}, "shapes"),
        ({"observations": obs[:, 0]}, "shapes"),
        ({"rewards": rewards[:, None]}, "shapes"),
        ({"actions": arrays["actions"] + 1}, "actions"),
        ({"actions": arrays["actions"] - 1}, "actions"),
        ({"actions": arrays["actions"] + 0.5}, "whole numbers"),
        ({"rewards": rewards}, "not finite"),
    ):
        write_data(path, episodes, **changes)
        with pytest.raises(script.UsageError, match=words):
            read(path)
    np.savez(path, **{name: array for name, array in arrays.items() if name != "timeouts"})
    with pytest.raises(script.UsageError, match="timeouts"):
        read(path)
    longest = max(map(len, episodes))
    gym.register("ShortDiary-v0", entry_point=Diary, max_episode_steps=longest - 1)
    gym.register("LongDiary-v0", entry_point=Diary, max_episode_steps=longest)
    write_data(path, episodes)
    assert len(read(path, env_id="LongDiary-v0").rewards) == len(rewards)
    with pytest.raises(script.UsageError, match="time limit"):
        read(path, env_id="ShortDiary-v0")


def test_a_run_of_another_environment_is_refused(tmp_path):
    settings = DQN | {"env_id": "Cycle-v0", "total_timesteps": 31}
    folder = dqn_cartpole.train(dqn_cartpole.Args(**settings, runs_dir=str(tmp_path))).folder
    with pytest.raises(script.UsageError, match="Cycle-v0"):
        read(folder)
    assert len(read(folder, env_id="Cycle-v0").rewards) == 3 * 8


# ---- The loop ------------------------------------------------------------------------------------

gym.register("DecidedDiary-v0", entry_point=Diary, max_episode_steps=7)  # a small table of times
FEW = dict(
    env_id="DecidedDiary-v0", total_timesteps=40, num_envs=3, dataset_size=200, num_sequences=5,
    sequence_length=3, num_layers=1, eval_episodes=4,
)  # fmt: skip


def test_every_step_is_a_gradient_step_on_sequences_of_the_data(tmp_path, monkeypatch):
    """Which end at random rows, each drawn by itself; the learning rate falls to 0."""
    episodes, path = random_episodes(12), tmp_path / "data.npz"
    write_data(path, episodes)
    data, updates, rates = as_data(episodes), [], []
    every = script.sequences(data, torch.arange(len(data.rewards)), 3)
    update = script.update

    def noting(agent, optimizer, batch, args):
        updates.append(batch)
        rates.append(optimizer.param_groups[0]["lr"])
        assert type(optimizer) is torch.optim.Adam and args.max_grad_norm == 0.25
        for scale, rows in ((agent.return_scale, data.returns), (agent.reward_scale, data.rewards)):
            assert scale.mean.item() == pytest.approx(rows.double().mean().item(), abs=1e-5)
        return update(agent, optimizer, batch, args)

    monkeypatch.setattr(script, "update", noting)
    monkeypatch.setattr(script, "LOG_EVERY", 20)
    state, points = train(script, tmp_path, **FEW | {"dataset": str(path)})
    assert len(updates) == 40 == state["envs"]["steps"]
    np.testing.assert_allclose(rates, 2e-3 * (1 - np.arange(40) / 40))
    assert points["charts/learning_rate"] == [(20, pytest.approx(2e-3 * 21 / 40))]
    drawn = set()
    for batch in updates:
        rows = []
        for b in range(5):
            same = [
                ((column[b] - theirs).abs().float().flatten(1).amax(1) < 1e-5)
                for column, theirs in zip(batch[:1] + batch[2:], every[:1] + every[2:])
                if column.dtype != torch.bool
            ]  # fmt: skip
            (row,) = torch.stack(same).all(0).nonzero().squeeze(1).tolist()[:1]
            assert torch.equal(batch.real[b], every.real[row])
            rows.append(row)
        drawn |= set(rows)
    assert len(drawn) == len(data.rewards)
    best = max(sum(step[2] for step in episode) for episode in episodes)
    assert state["network"]["best_return"].item() == pytest.approx(best, abs=1e-5)


def test_metrics_are_logged_and_the_rate_may_stay(tmp_path, monkeypatch):
    assert script.LOG_EVERY == 100
    monkeypatch.setattr(script, "LOG_EVERY", 10)
    updates = recorded(monkeypatch, script, "update")
    _, points = train(script, tmp_path, **FEW, anneal_lr=False)
    assert len(updates) == 40
    for tag in ("losses/policy_loss", "losses/reward_loss"):
        values = [(step, updates[step - 1][1][tag].item()) for step in (10, 20, 30)]
        np.testing.assert_allclose(points[tag], values, rtol=1e-5)
    assert points["charts/learning_rate"] == [(s, pytest.approx(2e-3)) for s in (10, 20, 30)]


def test_the_evaluation_is_told_what_was_paid_and_remembers_each_episode(tmp_path, monkeypatch):
    """Of environments that begin and end at different times; some have played all their episodes.
    The steps of the diary are those that `play` chose.
    """
    agent, calls, play = make_agent(max_times=7).float(), [], script.play

    def noting(args, network, obs, first, rewards):
        actions = play(args, network, obs, first, rewards)
        calls.append((obs.copy(), first.copy(), rewards.copy(), actions, network.state))
        return actions

    monkeypatch.setattr(script, "play", noting)
    Diary.made.clear()
    args = script.Args(**FEW | {"eval_episodes": 7, "target_return": 2.0, "seed": 4})
    agent.state = "of an older evaluation"
    script.evaluate(args, agent)
    envs = Diary.made
    assert [len(episodes_of(env)) for env in envs] == [3, 2, 2]
    assert len(envs[1].steps) + 1 < len(envs[2].steps)  # the last one plays on without the second
    for i, env in enumerate(envs):
        left, begins = None, True
        for (obs, action, reward, _, *ends), call in zip(env.steps, calls):
            np.testing.assert_allclose(call[0][i], obs, rtol=1e-6)
            assert call[3][i] == action and call[1][i] == begins
            left = 2.0 if begins else left
            state = call[4]
            assert state.returns[i, -1].item() == pytest.approx(left, abs=1e-5)
            left, begins = left - reward, any(ends)


def all_equal(ours, theirs):
    """Of nested dictionaries and lists with tensors: the same to the bit."""
    if isinstance(ours, torch.Tensor):
        return torch.equal(ours, theirs)
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(all_equal(ours[k], theirs[k]) for k in ours)
    if isinstance(ours, list | tuple):
        return len(ours) == len(theirs) and all(map(all_equal, ours, theirs))
    return ours == theirs


PARTS = "network", "optimizer", "random_state"


def test_a_resumed_run_is_the_same_to_the_bit_also_if_it_was_killed_before_the_first_step(
    tmp_path, monkeypatch
):
    """The first checkpoint is older than random play."""

    def killed(args):
        raise KeyboardInterrupt

    whole, _ = train(script, tmp_path / "whole", **FEW)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(script, "random_play", killed)
        train(script, tmp_path / "killed", **FEW)
    ((folder),) = (tmp_path / "killed").iterdir()
    assert script.read_checkpoint(folder)["envs"]["steps"] == 0
    resumed, _ = train(script, tmp_path / "killed", **FEW, resume=str(folder))
    assert all(all_equal(resumed[part], whole[part]) for part in PARTS)


def test_statistics_belong_to_the_network_also_when_it_goes_on_with_other_data(tmp_path):
    write_data(tmp_path / "data.npz", random_episodes(12))
    episodes = [[(100 + o, a, 5 + r) for o, a, r in e] for e in random_episodes(9, seed=1)]
    write_data(tmp_path / "more.npz", episodes)
    settings = FEW | {"dataset": str(tmp_path / "data.npz"), "total_timesteps": 10}
    folder = script.train(script.Args(**settings, runs_dir=str(tmp_path))).folder
    before = script.read_checkpoint(folder)["network"]
    more = {"dataset": str(tmp_path / "more.npz"), "total_timesteps": 12}
    after = train(script, tmp_path, **settings | more, resume=folder)[0]["network"]
    for name in before:
        kept = name == "best_return" or "_scale" in name
        assert torch.equal(before[name], after[name]) == kept, name


def test_load_policy_foresees_what_it_is_paid(tmp_path):
    """In the graph, -1 each time: a short training is enough. It plays as the evaluation does."""
    settings = FEW | {"env_id": "Graph-v0", "total_timesteps": 60, "num_sequences": 16}
    result = script.train(script.Args(**settings, learning_rate=3e-3, runs_dir=str(tmp_path)))
    policy, env = script.load_policy(result.folder), gym.make("Graph-v0")
    (obs, _), total, end = env.reset(), 0, False
    network = inspect.getclosurevars(policy).nonlocals["network"]
    while not end:
        obs, reward, terminated, truncated, _ = env.step(policy(obs))
        left = network.state.returns[0, -1].item()
        assert left == pytest.approx(network.best_return.item() - total, abs=0.1)
        total, end = total + reward, terminated or truncated
    assert total == result.episodic_return


def test_every_setting_of_the_algorithm_changes_the_outcome(tmp_path, monkeypatch):
    """The weights, or for which return the evaluation asks."""
    write_data(tmp_path / "data.npz", random_episodes())
    asked = recorded(monkeypatch, script, "next_step")

    def outcome(**settings):
        state, _ = train(
            script,
            tmp_path,
            **FEW | {"total_timesteps": 6, "dataset_size": 120, "eval_episodes": 1} | settings,
        )
        weights = [weights.tolist() for weights in state["network"].values()]
        return weights, float(asked[-1][0][4])

    check_settings(script, outcome, {
        "seed": 2, "total_timesteps": 8, "num_envs": 4, "dataset": str(tmp_path / "data.npz"),
        "dataset_size": 250, "learning_rate": 5e-4, "anneal_lr": False, "num_sequences": 4,
        "sequence_length": 2, "num_layers": 2, "max_grad_norm": 0.01, "condition": False,
        "target_return": 1e4,
    })  # fmt: skip
