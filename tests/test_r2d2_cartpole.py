"""The mathematics of r2d2_cartpole.py: against PyTorch's LSTM, by loops, by hand.

What dqn_cartpole.py, ppo_lstm_cartpole.py and rainbow_atari.py have word for word is tested there.
"""

import copy
import inspect
import math

import dqn_cartpole
import numpy as np
import ppo_lstm_cartpole
import pytest
import r2d2_cartpole as script
import rainbow_atari
import torch
from diary import check_episodes, check_settings, recorded, side_by_side, train
from torch import nn

# For the tests that all scripts share.
TINY = (
    "--total-timesteps 1500 --learning-starts 100 --buffer-size 600 --sequence-length 4 "
    "--burn-in 2 --target-network-frequency 50 --train-frequency 20 --checkpoint-frequency 400 "
    "--eval-frequency 600 --eval-episodes 5"
)
OWN = "discrete"
OWN_FLAGS = "--hide= --total-timesteps 8000 --sequence-length 8 --burn-in 2"
WRONG_SPACES = ["Pendulum-v1"]
DIVERGES = "--learning-rate 1e30"
BAD = [
    ("--hide 0,1,2,3", "--hide"),
    ("--hide x", "--hide"),
    ("--burn-in 17", "--burn-in"),
    ("--learning-starts 127", "--learning-starts"),
    ("--sequence-length 64 --learning-starts 600 --buffer-size 700", "--buffer-size"),
    ("--priority-eta 2", "--priority-eta"),
    ("--n-step 0", "--n-step"),
]
LEARNS = []  # a longer run takes minutes: see the record
# What others published, by the record's name after `<script>__`: shown beside our results.
PUBLISHED = {}
HIDDEN = script.HIDDEN

# ---- rescale, double_q_target, sequence_priorities -----------------------------------------------


def test_h_and_its_inverse():
    """By hand: h(3) = sqrt(4) - 1 + 0.003."""
    x = torch.tensor([0.0, 3.0, -3.0, 99.0, -0.21], dtype=torch.float64)
    expected = [0.0, 1.003, -1.003, 9.099, -(math.sqrt(1.21) - 1) - 0.00021]
    np.testing.assert_allclose(script.rescale(x), expected)
    numbers = torch.linspace(-1000, 1000, 4001, dtype=torch.float64)
    torch.testing.assert_close(script.unscale(script.rescale(numbers)), numbers)
    torch.testing.assert_close(script.rescale(script.unscale(numbers / 50)), numbers / 50)


@pytest.mark.parametrize("n", [1, 2, 5, 20])
def test_returns_of_n_steps_against_their_definition(n):
    """At an end, or at the end of the sequence, they have fewer steps."""
    torch.manual_seed(0)
    rewards, next_values = torch.randn(2, 12, 40, dtype=torch.float64)
    terminated, truncated = torch.rand(2, 12, 40) < 0.1
    found = script.n_step_returns(rewards, terminated, terminated | truncated, next_values, n, 0.9)
    for t, b in np.ndindex(12, 40):
        last = t
        while last < min(t + n - 1, 11) and not (terminated[last, b] or truncated[last, b]):
            last += 1
        expected = sum(0.9 ** (k - t) * rewards[k, b] for k in range(t, last + 1))
        if not terminated[last, b]:
            expected += 0.9 ** (last + 1 - t) * next_values[last, b]
        assert found[t, b].item() == pytest.approx(expected.item())


def test_priority_by_hand():
    errors = torch.tensor([[1.0, -4.0], [3.0, 0.0], [-2.0, 2.0]])
    found = script.sequence_errors(errors, 0.75)
    np.testing.assert_allclose(found, [0.75 * 3 + 0.25 * 2, 0.75 * 4 + 0.25 * 2])


# ---- QNetwork, Actor -----------------------------------------------------------------------------


def network_of(obs_size=4, num_actions=3, hide=(1,), memory=True, seed=0):
    torch.manual_seed(seed)
    return script.QNetwork(obs_size, num_actions, set(hide), memory)


def cell_of(network):
    """PyTorch's own, with the same weights."""
    cell = nn.LSTMCell(64, HIDDEN)
    cell.weight_ih, cell.bias_ih = network.input_gates.weight, network.input_gates.bias
    cell.weight_hh, cell.bias_hh = network.hidden_gates.weight, network.hidden_gates.bias
    return cell


def by_steps(network, obs, state, ended):
    """Q(s, .) (T, N, K) and states (2, T, N, H), one step of one sequence after the other."""
    cell, seen = cell_of(network), [i for i in range(obs.shape[-1]) if i not in (1,)]
    q_values, states = [], []
    for n in range(obs.shape[1]):
        h, c = state[0, n], state[1, n]
        for t in range(len(obs)):
            x = network.encoder(obs[t, n, seen]).relu()
            h, c = (part[0] for part in cell(x[None], (h[None], c[None])))
            q_values.append(network.head(h))
            states.append(torch.stack([h, c]))
            if ended[t, n]:
                h, c = torch.zeros_like(h), torch.zeros_like(c)
    shape = obs.shape[1], len(obs)
    q_values = torch.stack(q_values).unflatten(0, shape).transpose(0, 1)
    return q_values, torch.stack(states).unflatten(0, shape).permute(2, 1, 0, 3)


def some_sequences(length=7, num=5):
    torch.manual_seed(1)
    ended = torch.rand(length, num) < 0.25
    return torch.randn(length, num, 4), torch.randn(2, num, HIDDEN), ended


def test_network_is_an_lstm_that_forgets_at_an_end():
    network, (obs, state, ended) = network_of(), some_sequences()
    assert 3 < ended.sum() < 15
    found, states = network(obs, state, ended)
    expected, expected_states = by_steps(network, obs, state, ended)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(states, expected_states)
    blind = obs.clone()
    blind[..., 1] += 1
    assert torch.equal(network(blind, state, ended)[0], found)  # what is hidden is not seen


def test_without_memory_it_sees_one_observation():
    network, (obs, state, ended) = network_of(memory=False), some_sequences()
    found, _ = network(obs, state, ended)
    alone, _ = network(obs.flatten(0, 1)[None], torch.zeros(2, 35, HIDDEN), ended.flatten()[None])
    torch.testing.assert_close(found, alone[0].view_as(found))


@pytest.mark.parametrize("memory", [True, False])
def test_the_actor_is_the_network_also_after_an_update(memory):
    network, (obs, state, ended) = network_of(memory=memory), some_sequences()
    actor = script.Actor(network)
    for _ in range(2):
        expected, states = network(obs, state, torch.zeros_like(ended))
        now = state.numpy()
        for t in range(len(obs)):
            q_values, now = actor(obs[t].numpy(), now)
            np.testing.assert_allclose(q_values, expected[t].detach(), rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(now, states[:, t].detach(), rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            for weights in network.parameters():
                weights += 0.1 * torch.randn_like(weights)


def test_play_remembers_and_begins_anew_where_it_is_told():
    network, (obs, _, _) = network_of(), some_sequences()
    args = script.Args()
    script.play(args, network, obs[0].numpy())
    first = np.array([False, True, False, False, False])
    found = script.play(args, network, 3 * obs[1].numpy(), first)
    ended = torch.zeros(2, 5, dtype=torch.bool)
    ended[0, 1] = True
    rows = torch.stack([obs[0], 3 * obs[1]])
    expected, states = network(rows, torch.zeros(2, 5, HIDDEN), ended)
    assert found.tolist() == expected[1].argmax(-1).tolist()
    np.testing.assert_allclose(network.state, states[:, 1].detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("epsilon", [0.0, 0.6])
def test_actions_are_greedy_or_random(epsilon):
    torch.manual_seed(0)
    actor = lambda obs, state: (obs, state + 1)
    obs = np.tile(np.eye(3, dtype=np.float32), (20_000, 1))
    actions, state = script.act(actor, obs, np.zeros((2, 60_000, 4)), epsilon)
    best = np.tile(np.arange(3), 20_000)
    assert (actions == best).mean() == pytest.approx(1 - epsilon * 2 / 3, abs=0.01)
    assert (state == 1).all()


# ---- q_of_sequence, update -----------------------------------------------------------------------


def batch_of(length=9, num=5):
    obs, state, ended = some_sequences(length, num)
    ended[2, 0] = ended[3, 1] = True  # also where a burn-in stops
    next_obs = torch.cat([obs[1:], torch.randn(1, num, 4)])
    next_obs[ended] = torch.randn(int(ended.sum()), 4)  # the last observation of an episode
    terminated = ended & (torch.rand(length, num) < 0.5)
    actions = torch.randint(3, (length, num))
    rewards, weights = torch.randn(length, num), torch.rand(num)
    return script.Batch(obs, actions, rewards, next_obs, terminated, ended, state, weights)


@pytest.mark.parametrize("burn_in", [0, 3, 4])
def test_values_of_a_sequence_go_on_from_its_burn_in(burn_in):
    network, batch = network_of(), batch_of()
    found, next_q = script.q_of_sequence(network, batch, burn_in)
    expected, states = by_steps(network, batch.obs, batch.state, batch.ended)
    torch.testing.assert_close(found, expected[burn_in:])
    for t in range(burn_in, 9):
        for n in range(5):
            one = batch.next_obs[t : t + 1, n : n + 1], states[:, t, n : n + 1]
            value, _ = by_steps(network, *one, torch.zeros(1, 1, dtype=torch.bool))
            torch.testing.assert_close(next_q[t - burn_in, n], value[0, 0])
    assert found.requires_grad and not next_q.requires_grad


def test_no_gradient_flows_into_the_burn_in():
    network, batch = network_of(), batch_of()
    obs, state = batch.obs.clone().requires_grad_(), batch.state.clone().requires_grad_()
    batch = batch._replace(obs=obs, state=state, ended=torch.zeros_like(batch.ended))
    found, _ = script.q_of_sequence(network, batch, 3)
    found[-1].sum().backward()
    assert state.grad is None and (obs.grad[:3] == 0).all() and (obs.grad[3] != 0).any()


@pytest.mark.parametrize("limit, rescale", [(0.0, True), (0.01, True), (0.0, False)])
def test_one_step_down_the_gradient_of_the_definition(limit, rescale):
    """One network chooses the next action, the other one evaluates it."""
    q_network, target_network, batch = network_of(), network_of(seed=5), batch_of()
    args = script.Args(burn_in=4, gamma=0.9, n_step=3, max_grad_norm=limit, rescale=rescale)
    h, inverse = (script.rescale, script.unscale) if rescale else (lambda x: x, lambda x: x)
    before, target_before = copy.deepcopy(q_network), copy.deepcopy(target_network)
    with torch.no_grad():
        own, others = (
            script.q_of_sequence(network, batch, 4)[1] for network in (before, target_before)
        )
    _, states = by_steps(before, batch.obs, batch.state, batch.ended)
    state = states[:, 3].detach() * ~batch.ended[3][:, None]
    q_values, _ = by_steps(before, batch.obs[4:], state, batch.ended[4:])
    loss, errors, mean = 0, torch.zeros(5, 5), 0
    for t in range(5):
        for n in range(5):
            last = t
            while last < min(t + 2, 4) and not batch.ended[4 + last, n]:
                last += 1
            y = 0 if batch.terminated[4 + last, n] else inverse(
                others[last, n, own[last, n].argmax()]
            )
            for k in range(last, t - 1, -1):
                y = batch.rewards[4 + k, n] + 0.9 * y
            y = h(y)
            value = q_values[t, n, batch.actions[4 + t, n]]
            errors[t, n] = (y - value).detach()
            loss = loss + batch.weights[n] * (y - value) ** 2 / 25
            mean += value.item() / 25
    gradients = torch.autograd.grad(loss, list(before.parameters()))
    norm = math.sqrt(sum(gradient.square().sum().item() for gradient in gradients))
    scale = 0.01 / norm if limit else 1.0
    assert norm > 0.02
    optimizer = torch.optim.SGD(q_network.parameters(), lr=2.0)
    q_network.head.weight.grad = torch.ones(3, HIDDEN)  # what is left over is no matter
    found, metrics = script.update(q_network, target_network, optimizer, batch, args)
    torch.testing.assert_close(found, errors, rtol=1e-3, atol=1e-4)
    for old, gradient, new in zip(before.parameters(), gradients, q_network.parameters()):
        torch.testing.assert_close(new.detach(), old - 2 * scale * gradient, rtol=1e-3, atol=1e-5)
    for old, new in zip(target_before.parameters(), target_network.parameters()):
        assert torch.equal(old, new) and new.grad is None
    found = {tag: value.item() for tag, value in metrics.items()}
    expected = {"losses/td_loss": loss.item(), "losses/q_values": mean}
    assert found == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("name, other", [
    ("SumTree", rainbow_atari), ("importance_weights", rainbow_atari),
    ("linear_epsilon", dqn_cartpole), ("update_target", dqn_cartpole),
    ("make_env", ppo_lstm_cartpole), ("hidden", ppo_lstm_cartpole), ("layer", ppo_lstm_cartpole),
    ("evaluate", ppo_lstm_cartpole), ("sigmoid", ppo_lstm_cartpole),
])  # fmt: skip
def test_what_others_have_too_is_the_same_and_tested_there(name, other):
    ours, theirs = (inspect.getsource(getattr(module, name)) for module in (script, other))
    assert ours == theirs


# ---- ReplayBuffer --------------------------------------------------------------------------------

SMALL = dict(num_envs=2, sequence_length=4, burn_in=3, buffer_size=45, learning_starts=20)


def fill(buffer, first, last):
    """Rows that say in all their parts which they are: t + 1000 of the second environment."""
    for t in range(first, last):
        n = np.float32([t, t + 1000])
        obs, state = np.stack([n, -n], 1), np.stack([n, -n])[:, :, None].repeat(HIDDEN, 2)
        buffer.add(obs, n.astype(int) % 3, n / 2, obs + 0.5, n % 4 == 0, n % 2 == 0, state)


def rows_of(batch):
    """The numbers (L, B) of the rows in a batch. All their parts must be of the same ones."""
    n = batch.obs[..., 0]
    assert torch.equal(batch.obs[..., 1], -n) and torch.equal(batch.actions, n.long() % 3)
    assert torch.equal(batch.rewards, n / 2) and torch.equal(batch.next_obs[..., 0], n + 0.5)
    assert torch.equal(batch.terminated, n % 4 == 0) and torch.equal(batch.ended, n % 2 == 0)
    state = torch.stack([n[0], -n[0]])[..., None].expand(2, len(n[0]), HIDDEN)
    assert torch.equal(batch.state, state)
    return n.long()


@pytest.mark.parametrize("burn_in", [0, 3, 4])
@pytest.mark.parametrize("count", [8, 11, 19, 20, 23, 24, 27, 60])
def test_whole_sequences_with_their_burn_in_are_drawn(count, burn_in):
    """5 sequences of 4 rows fit. None that is not whole, whose burn-in is gone, or never was."""
    torch.manual_seed(0)
    buffer = script.ReplayBuffer(2, script.Args(**SMALL | {"burn_in": burn_in}))
    assert buffer.num_rows == 20
    fill(buffer, 0, count)
    batch, _ = buffer.sample(3000, 0.4)
    rows = rows_of(batch)
    assert (rows[1:] - rows[:-1] == 1).all() and len(rows) == burn_in + 4
    starts = set(rows[burn_in].tolist())
    last = count // 4 - 1  # the newest whole one
    # The oldest one of the five lacks its burn-in; while it is written anew, so does the next one.
    oldest = last - 3 if count % 4 == 0 else last - 2
    expected = {4 * k for k in range(max(1, oldest), last + 1)}
    assert starts == expected | {start + 1000 for start in expected}


def test_priorities_say_how_often_a_sequence_is_drawn():
    torch.manual_seed(0)
    buffer = script.ReplayBuffer(2, script.Args(**SMALL))
    fill(buffer, 0, 19)
    batch, places = buffer.sample(8, 0.4)
    assert torch.equal(batch.weights, torch.ones(8))  # all alike
    errors = torch.tensor([4.0, 9.0, 0.0])
    batch, places = buffer.sample(50, 0.4)
    rows = rows_of(batch)[3]
    chosen = [int((rows == start).nonzero()[0]) for start in (4, 1008, 12)]
    buffer.set_priorities(places[chosen], errors, 0.5)
    assert buffer.largest_priority == pytest.approx(3, rel=1e-5)
    expected = {4: 2, 8: 1, 12: 1e-3, 1004: 1, 1008: 3, 1012: 1}
    batch, _ = buffer.sample(20_000, 0.7)
    starts = rows_of(batch)[3].tolist()
    total = sum(expected.values())
    for start, priority in expected.items():
        share = starts.count(start) / 20_000
        assert share == pytest.approx(priority / total, abs=0.01)
    least = min(expected[start] for start in set(starts))
    for start, weight in zip(starts[:2000], batch.weights.tolist()):
        assert weight == pytest.approx((least / expected[start]) ** 0.7, rel=1e-2)
    fill(buffer, 19, 20)  # a new sequence gets the largest priority so far
    found = buffer.tree.nodes[buffer.tree.first :][:10].reshape(5, 2)
    np.testing.assert_allclose(found[4], 3, rtol=1e-5)


@pytest.mark.parametrize("count", [0, 11, 24, 50])
def test_buffer_comes_back_from_a_checkpoint(tmp_path, count):
    args = script.Args(**SMALL)
    buffers, drawn = [script.ReplayBuffer(2, args) for _ in range(2)], []
    fill(buffers[0], 0, count)
    if count > 11:
        buffers[0].set_priorities(np.array([2, 3]), torch.tensor([16.0, 0.5]), 0.5)
    torch.save(buffers[0].state_dict(), tmp_path / "buffer.pt")
    buffers[1].load_state_dict(torch.load(tmp_path / "buffer.pt", weights_only=True))
    for buffer in buffers:
        fill(buffer, count, count + 14)
        torch.manual_seed(1)
        drawn.append(rows_of(buffer.sample(100, 0.4)[0]).tolist())
        drawn.append(buffer.tree.nodes.tolist())
    assert drawn[:2] == drawn[2:]


def test_a_checkpoint_has_the_filled_rows_only(tmp_path):
    args = script.Args(**SMALL | {"sequence_length": 50, "buffer_size": 90_000, "learning_starts": 300})
    buffer = script.ReplayBuffer(2, args)
    fill(buffer, 0, 10)
    torch.save(buffer.state_dict(), tmp_path / "buffer.pt")
    assert (tmp_path / "buffer.pt").stat().st_size < 1_000_000  # most of it a state per sequence


# ---- The loop ------------------------------------------------------------------------------------

FEW = dict(
    env_id="Diary-v0", hide="", total_timesteps=600, num_envs=3, learning_starts=60,
    buffer_size=5000, sequence_length=5, burn_in=2, num_sequences=6, train_frequency=20,
    target_network_frequency=40, eval_episodes=3, exploration_fraction=0.5, learning_rate=1e-2,
)  # fmt: skip


def test_the_loop(tmp_path, monkeypatch):
    """What is remembered, stored, learned, and how often; all in a plain loop over the steps."""
    acts, updates, targets = (
        recorded(monkeypatch, script, name) for name in ("act", "update", "update_target")
    )
    settings = {"prioritized_replay_alpha": 0.7, "prioritized_replay_beta": 0.6}
    samples, sets = [], []
    for name, notes in ("sample", samples), ("set_priorities", sets):
        def noting(self, *others, notes=notes, method=getattr(script.ReplayBuffer, name)):
            result = method(self, *others)
            notes.append((others, result))
            return result

        monkeypatch.setattr(script.ReplayBuffer, name, noting)
    state, points = train(script, tmp_path, **FEW | settings)
    steps, now = side_by_side(3), np.zeros((3, 2, HIDDEN), np.float32)
    columns = {name: state["buffer"][name] for name in
               ("obs", "actions", "rewards", "next_obs", "terminated", "ended")}  # fmt: skip
    assert state["buffer"]["rows_written"] == 200 and len(acts) > 200
    for number, (i, (obs, action, reward, next_obs, terminated, truncated)) in enumerate(steps):
        row = number // 3
        (_, seen, before, epsilon), (actions, after) = acts[row]
        assert seen[i].tolist() == obs and actions[i] == action
        np.testing.assert_array_equal(before[:, i], now[i])
        assert epsilon == pytest.approx(max(0.05, 1 - 0.95 * (3 * row) / 300))
        parts = obs, action, reward, next_obs, terminated, terminated or truncated
        for column, part in zip(columns.values(), parts, strict=True):
            np.testing.assert_allclose(column[row, i], part, rtol=1e-6)
        if row % 5 == 3:  # two of burn-in, then a sequence
            np.testing.assert_array_equal(state["buffer"]["states"][row // 5 + 1, i], now[i])
        now[i] = 0 if terminated or truncated else after[:, i]
    np.testing.assert_array_equal(state["memory"]["state"].transpose(0, 1), now)
    check_episodes(points, steps)
    # Updates are due at the steps that 20 divides, from 60 on.
    due = list(range(60, 601, 20))
    assert len(updates) == len(samples) == len(sets) == len(due)
    assert len(targets) == len([step for step in range(60, 601) if step % 40 == 0])
    for step, (arguments, (errors, _)), sample, priority in zip(due, updates, samples, sets):
        _, _, optimizer, batch, _ = arguments
        first = (step - 1) // 3 * 3  # step of the run at which the round began
        assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-2 * (1 - first / 600))
        (num_sequences, beta), (drawn, places) = sample
        assert (num_sequences, beta) == (6, pytest.approx(0.6 + 0.4 * step / 600))
        assert torch.equal(drawn.obs, batch.obs) and batch.obs.shape == (7, 6, 2)
        (set_places, set_errors, alpha), _ = priority
        assert (set_places == places).all() and alpha == 0.7
        expected = 0.9 * errors.abs().max(0).values + 0.1 * errors.abs().mean(0)
        torch.testing.assert_close(set_errors, expected)


@pytest.mark.parametrize("env_id, value", [
    ("Truncates-v0", 1 / (1 - 0.8)), ("Terminates-v0", None)
])  # fmt: skip
def test_a_time_limit_is_not_the_end_of_the_world(tmp_path, env_id, value):
    """Truncated for ever, a reward of 1 is worth 1 / (1 - gamma) in every step.

    Who remembers can count to three, and foresees the end: 1 + 0.8 + 0.64, 1 + 0.8, 1.
    """
    flags = {"env_id": env_id, "gamma": 0.8, "total_timesteps": 4000, "train_frequency": 4}
    state, _ = train(script, tmp_path, **FEW | flags | {"num_sequences": 16})
    network = script.QNetwork(1, 2, set(), True)
    network.load_state_dict(state["network"])
    rows, ended = torch.ones(3, 1, 1), torch.zeros(3, 1, dtype=torch.bool)
    q_values, _ = network(rows, torch.zeros(2, 1, HIDDEN), ended)
    found = script.unscale(q_values.detach()).max(-1).values.flatten()
    expected = [2.44, 1.8, 1.0] if value is None else [value] * 3
    np.testing.assert_allclose(found, expected, rtol=0.12)


def test_every_setting_of_the_algorithm_changes_the_outcome(tmp_path):
    def outcome(**settings):
        state, _ = train(script, tmp_path, **FEW | {"total_timesteps": 250} | settings)
        return [weights.tolist() for weights in state["network"].values()]

    check_settings(script, outcome, {
        "seed": 2, "total_timesteps": 260, "num_envs": 4, "learning_rate": 5e-3, "anneal_lr": False,
        "buffer_size": 90, "gamma": 0.9, "n_step": 2, "tau": 0.5, "target_network_frequency": 100,
        "sequence_length": 4, "burn_in": 0, "num_sequences": 5, "prioritized_replay_alpha": 0.1,
        "prioritized_replay_beta": 0.9, "priority_eta": 0.0, "rescale": False, "start_e": 0.9,
        "end_e": 0.5, "exploration_fraction": 0.2, "learning_starts": 100, "train_frequency": 25,
        "gradient_steps": 2, "max_grad_norm": 0.01, "memory": False,
    })  # fmt: skip
