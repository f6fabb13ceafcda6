"""The mathematics of dreamerv3_cartpole.py: by hand, by loops over one sequence and one imagined
game after the other, against torch.distributions.

What muzero_cartpole.py and r2d2_cartpole.py have word for word is tested there.
"""

import copy
import inspect
import math

import dqn_cartpole
import dreamerv3_cartpole as script
import muzero_cartpole
import numpy as np
import pytest
import r2d2_cartpole
import streamq_cartpole
import torch
from diary import check_episodes, check_settings, recorded, side_by_side, train
from torch.distributions import Categorical, kl_divergence

# For the tests that all scripts share.
TINY = (
    "--total-timesteps 1500 --learning-starts 100 --buffer-size 600 --sequence-length 4 "
    "--num-sequences 4 --train-frequency 40 --units 16 --horizon 4 --checkpoint-frequency 400 "
    "--eval-frequency 600 --eval-episodes 5"
)
OWN = "discrete"
OWN_FLAGS = "--total-timesteps 2500 --units 32 --num-sequences 8 --horizon 8 --gamma 0.9"
WRONG_SPACES = ["Pendulum-v1"]
DIVERGES = "--learning-rate 1e30"
BAD = [
    ("--num-classes 1", "--num-classes"),
    ("--num-latents 0", "--num-latents"),
    ("--units 0", "--units"),
    ("--horizon 0", "--horizon"),
    ("--return-lambda 1.1", "--return-lambda"),
    ("--rep-coef -1", "--rep-coef"),
    ("--sequence-length 200", "--learning-starts"),
    ("--buffer-size 499", "--buffer-size"),
    ("--total-timesteps 500", "--learning-starts"),
]
LEARNS = []  # a longer run takes minutes: see the record
# What others published, by the record's name after `<script>__`: shown beside our results.
PUBLISHED = {}

SIZES = {"units": 6, "num_latents": 3, "num_classes": 4}  # F = 18


def agent_of(obs_size=4, num_actions=3, scale=0.4, seed=0):
    torch.manual_seed(seed)
    agent = script.Agent(obs_size, num_actions, script.Args(**SIZES))
    agent.obs_statistics.update(torch.randn(9, obs_size) * 3 + 1)
    with torch.no_grad():
        for weights in agent.parameters():
            weights += scale * torch.randn_like(weights)  # opinions of its own
    return agent


def states_of(*shape):
    """h is any number, z is one-hots."""
    z = torch.nn.functional.one_hot(torch.randint(4, (*shape, 3)), 4).float().flatten(-2)
    return torch.cat([torch.randn(*shape, 6), z], dim=-1)


# ---- symlog, two_hot, expected -------------------------------------------------------------------


def test_symlog_and_its_inverse():
    """By hand: ln(1) = 0, ln(2), ln(e^2) = 2."""
    x = torch.tensor([0.0, 1.0, -1.0, math.e**2 - 1], dtype=torch.float64)
    np.testing.assert_allclose(script.symlog(x), [0, math.log(2), -math.log(2), 2])
    numbers = torch.linspace(-9, 9, 999, dtype=torch.float64)
    torch.testing.assert_close(script.symlog(script.symexp(numbers)), numbers)
    tiny = torch.tensor([1e-6, -1e-6])
    torch.testing.assert_close(script.symexp(script.symlog(tiny)), tiny)


def test_two_hot_by_hand():
    """The numbers beside 0 are symexp(0.2) and symexp(-0.2), about 0.2214."""
    near, far = math.exp(0.2) - 1, math.exp(10) - 1
    numbers = torch.tensor([0.0, 0.25 * near, -near, far, 1e9, -1e9])
    found = script.two_hot(numbers)
    assert found.shape == (6, 101)
    shares = [{50: 1.0}, {50: 0.75, 51: 0.25}, {49: 1.0}, {100: 1.0}, {100: 1.0}, {0: 1.0}]
    for row, expected in zip(found.tolist(), shares):
        wanted = [expected.get(i, 0.0) for i in range(101)]
        assert row == pytest.approx(wanted, abs=1e-5)


def test_the_mean_of_the_categories_is_the_number():
    numbers = torch.linspace(-300, 300, 2001)
    shares = script.two_hot(numbers)
    assert ((shares > 1e-6).sum(1) <= 2).all()
    torch.testing.assert_close(shares.sum(1), torch.ones(2001))
    found = script.expected((shares + 1e-30).log())
    torch.testing.assert_close(found, numbers, rtol=1e-4, atol=1e-3)
    assert script.expected(torch.zeros(101)).item() == pytest.approx(0, abs=1e-2)


# ---- mixed, draw, straight_through, kl_divergence ------------------------------------------------


def test_a_share_of_the_probabilities_is_uniform():
    found = script.mixed(torch.tensor([[0.0, math.log(3)], [500.0, -500.0]]))
    np.testing.assert_allclose(found, [[0.2525, 0.7475], [0.995, 0.005]], rtol=1e-5)


def test_draws_by_hand_and_by_their_frequency():
    probs = torch.tensor([[0.5, 0.25, 0.25]]).expand(7, 3)
    numbers = torch.tensor([0.0, 0.499, 0.5, 0.749, 0.75, 0.999, 1.0])
    assert script.draw(probs, numbers).tolist() == [0, 0, 1, 1, 2, 2, 2]
    torch.manual_seed(0)
    probs = torch.tensor([0.1, 0.0, 0.6, 0.3]).expand(40_000, 4)
    shares = np.bincount(script.draw(probs, torch.rand(40_000)), minlength=4) / 40_000
    np.testing.assert_allclose(shares, probs[0], atol=0.01)


def test_what_is_drawn_has_the_gradient_of_its_probabilities():
    torch.manual_seed(0)
    probs = torch.randn(5, 3, 4).softmax(-1).requires_grad_()
    numbers, weights = torch.rand(5, 3), torch.randn(5, 12)
    z = script.straight_through(probs, numbers)
    one_hots = torch.zeros(5, 3, 4)
    for b, g in np.ndindex(5, 3):
        one_hots[b, g, script.draw(probs[b, g], numbers[b, g])] = 1
    torch.testing.assert_close(z.detach(), one_hots.flatten(1))
    (z * weights).sum().backward()
    torch.testing.assert_close(probs.grad.flatten(1), weights)


def test_kl_divergence_is_that_of_all_numbers():
    torch.manual_seed(0)
    probs, others = torch.randn(2, 5, 7, 3, 4).softmax(-1)
    expected = kl_divergence(Categorical(probs), Categorical(others)).sum(-1)
    torch.testing.assert_close(script.kl_divergence(probs, others), expected)


# ---- Agent ---------------------------------------------------------------------------------------


def by_hand(network, x):
    """A network's layers in NumPy: the linear ones, norms and SiLU."""
    for layer in network:
        if isinstance(layer, torch.nn.Linear):
            x = layer.weight.detach().numpy() @ x + layer.bias.detach().numpy()
        elif isinstance(layer, torch.nn.LayerNorm):
            x = (x - x.mean()) / np.sqrt(x.var() + layer.eps)
            x = x * layer.weight.detach().numpy() + layer.bias.detach().numpy()
        else:
            assert isinstance(layer, torch.nn.SiLU)
            x = x / (1 + np.exp(-x))
    return x


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def h_by_hand(agent, state, action):
    """After an action in a state, or at the beginning (action None)."""
    state = np.zeros(18) if action is None else state
    one_hot = np.zeros(3) if action is None else np.eye(3)[action]
    inputs = by_hand(agent.inputs, np.concatenate([state[6:], one_hot]))
    reset, candidate, update = np.split(
        by_hand(agent.gates, np.concatenate([state[:6], inputs])), 3
    )
    candidate, update = np.tanh(sigmoid(reset) * candidate), sigmoid(update - 1)
    return update * candidate + (1 - update) * state[:6]


def probs_by_hand(logits):
    logits = logits.reshape(-1, 4)
    exp = np.exp(logits - logits.max(1, keepdims=True))
    return 0.99 * exp / exp.sum(1, keepdims=True) + 0.01 / 4


@pytest.mark.parametrize("norm_obs", [True, False])
def test_the_model_sees_the_symlog_of_normalised_observations(norm_obs):
    """By hand: 2 ± 1 and 20 ± 10."""
    agent = script.Agent(2, 3, script.Args(**SIZES, norm_obs=norm_obs))
    if norm_obs:
        agent.obs_statistics.update(torch.tensor([[1.0, 10.0], [3.0, 30.0]]))
    found = agent.scale(torch.tensor([[3.0, 0.0]]))
    expected = [math.log(2), -math.log(3)] if norm_obs else [math.log(4), 0]
    np.testing.assert_allclose(found[0], expected, rtol=1e-6)


@torch.no_grad()
def test_states_against_matrices():
    agent = agent_of()
    states, actions, numbers = states_of(9), torch.randint(3, (9,)), torch.rand(9, 3)
    first, encoded = torch.arange(9) % 3 == 0, torch.randn(9, 6)
    seen, probs = agent.observe(states, actions, first, encoded, numbers)
    imagined = agent.imagine(states, actions, numbers)
    assert seen.shape == imagined.shape == (9, 18) and probs.shape == (9, 3, 4)
    for b in range(9):
        state, action = states[b].numpy(), actions[b].item()
        h = h_by_hand(agent, state, None if first[b] else action)
        np.testing.assert_allclose(seen[b, :6], h, rtol=1e-4, atol=1e-5)
        q = probs_by_hand(by_hand(agent.posterior, np.concatenate([h, encoded[b]])))
        np.testing.assert_allclose(probs[b], q, rtol=1e-4, atol=1e-5)
        h = h_by_hand(agent, state, action)
        np.testing.assert_allclose(imagined[b, :6], h, rtol=1e-4, atol=1e-5)
        p = probs_by_hand(by_hand(agent.prior, h))
        for found, shares in (seen, q), (imagined, p):
            z = [np.flatnonzero(shares[g].cumsum() > numbers[b, g].item())[0] for g in range(3)]
            np.testing.assert_allclose(found[b, 6:], np.eye(4)[z].ravel(), atol=1e-6)
    torch.testing.assert_close(agent.policy(states), script.mixed(agent.actor(states)))


def test_at_first_it_has_no_opinion():
    torch.manual_seed(0)
    agent = script.Agent(4, 3, script.Args(**SIZES))
    states = states_of(5)
    for logits in agent.actor(states), agent.critic(states), agent.reward(states):
        assert (logits == 0).all()
    np.testing.assert_allclose(agent.policy(states).detach(), 1 / 3, rtol=1e-6)
    assert not any(weights.requires_grad for weights in agent.slow_critic.parameters())


# ---- lambda_returns ------------------------------------------------------------------------------


@pytest.mark.parametrize("return_lambda", [0.0, 0.7, 1.0])
def test_lambda_returns_are_means_of_n_step_returns(return_lambda):
    """(1 - lambda) * (G1 + lambda * G2 + ...) + lambda^(k-1) * Gk, where k steps are left."""
    torch.manual_seed(0)
    rewards, values = torch.randn(2, 6, 5, dtype=torch.float64)
    discounts = torch.rand(6, 5, dtype=torch.float64)
    discounts[2, 3] = 0  # an end
    found = script.lambda_returns(rewards, discounts, values, return_lambda)
    for t, m in np.ndindex(6, 5):
        returns = []
        for last in range(t, 6):
            total, discount = 0.0, 1.0
            for k in range(t, last + 1):
                total += discount * rewards[k, m].item()
                discount *= discounts[k, m].item()
            returns.append(total + discount * values[last, m].item())
        shares = [(1 - return_lambda) * return_lambda**n for n in range(len(returns))]
        shares[-1] = return_lambda ** (len(returns) - 1)
        expected = sum(share * value for share, value in zip(shares, returns))
        assert found[t, m].item() == pytest.approx(expected)


# ---- The losses ----------------------------------------------------------------------------------


def batch_of(length=5, num=6, num_actions=3):
    torch.manual_seed(1)
    first, terminated = torch.rand(2, length, num) < 0.25
    return script.Batch(
        torch.randn(length, num, 4), torch.randint(num_actions, (length, num)),
        3 * torch.randn(length, num), terminated, first, states_of(num),
    )  # fmt: skip


def numbers_of(length=5, num=6, horizon=4):
    args = script.Args(sequence_length=length, num_sequences=num, horizon=horizon, num_latents=3)
    return script.random_numbers(args)


def test_random_numbers_have_the_shapes_of_a_gradient_step():
    numbers = numbers_of()
    assert numbers.seen.shape == (5, 6, 3)
    assert numbers.actions.shape == (4, 30) and numbers.imagined.shape == (4, 30, 3)
    assert all(part.min() >= 0 and part.max() < 1 for part in numbers)


def distance(number, logits):
    """The cross-entropy of one number."""
    return -(script.two_hot(number) * logits.log_softmax(-1)).sum()


def model_loss_by_loops(agent, batch, numbers, args):
    """One sequence after the other, one row after the other; its parts, and all states."""
    length, num = batch.rewards.shape
    parts, states = dict.fromkeys(("obs", "reward", "continue", "dyn", "rep"), 0.0), {}
    for b in range(num):
        state = batch.state[b : b + 1]
        for t in range(length):
            if batch.first[t, b]:
                state = torch.zeros(1, 18)
            x = agent.scale(batch.obs[t, b : b + 1])
            row = batch.actions[t, b : b + 1], batch.first[t, b : b + 1], agent.encoder(x)
            state, q = agent.observe(state, *row, numbers[t, b : b + 1])
            p = script.mixed(agent.prior(state[:, :6]).view(1, 3, 4))
            parts["obs"] += ((x - agent.decoder(state)) ** 2).sum()
            parts["reward"] += distance(batch.rewards[t, b], agent.reward(state)[0])
            goes_on = agent.goes_on(state).sigmoid().squeeze()
            parts["continue"] -= (1 - goes_on if batch.terminated[t, b] else goes_on).log()
            for name, ours, theirs in ("dyn", q.detach(), p), ("rep", q, p.detach()):
                kl = kl_divergence(Categorical(ours), Categorical(theirs)).sum()
                parts[name] += kl if kl > args.free_nats else args.free_nats
            states[t, b] = state
    parts = {name: part / (length * num) for name, part in parts.items()}
    stacked = [torch.cat([states[t, b] for b in range(num)]) for t in range(length)]
    return parts, torch.stack(stacked)


@pytest.mark.parametrize("free_nats", [0.0, 2.0])
def test_the_loss_of_the_model_and_its_gradient(free_nats):
    agent, batch, numbers = agent_of(), batch_of(), numbers_of()
    args = script.Args(**SIZES, obs_coef=2.0, dyn_coef=0.8, rep_coef=0.3, free_nats=free_nats)
    loss, states, metrics = script.model_loss(agent, batch, numbers.seen, args)
    parts, expected_states = model_loss_by_loops(agent, batch, numbers.seen, args)
    torch.testing.assert_close(states, expected_states, rtol=1e-4, atol=1e-5)
    expected = 2 * parts["obs"] + parts["reward"] + parts["continue"]
    expected = expected + 0.8 * parts["dyn"] + 0.3 * parts["rep"]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    tags = {"obs_loss": "obs", "reward_loss": "reward", "continue_loss": "continue",
            "latent_kl": "dyn"}  # fmt: skip
    for tag, name in tags.items():
        assert metrics[f"losses/{tag}"].item() == pytest.approx(parts[name].item(), rel=1e-4)
    weights = [w for name, w in agent.named_parameters() if name.split(".")[0] in (
        "encoder", "inputs", "gates", "posterior", "prior", "decoder", "reward", "goes_on")]  # fmt: skip
    ours, theirs = (torch.autograd.grad(value, weights) for value in (loss, expected))
    for found, wanted in zip(ours, theirs):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


def test_below_the_free_nats_a_divergence_costs_nothing():
    """A prior that is alike the posterior gets no gradient; one that is not gets one."""
    args, batch, numbers = script.Args(**SIZES, free_nats=1.0), batch_of(), numbers_of()
    for scale, learns in (0.0, False), (30.0, True):
        torch.manual_seed(0)
        agent = script.Agent(4, 3, args)
        with torch.no_grad():
            agent.prior[-1].weight *= scale
            agent.posterior[-1].weight *= 0
        loss, _, metrics = script.model_loss(agent, batch, numbers.seen, args)
        loss.backward()
        assert (agent.prior[-1].weight.grad.abs().sum() > 0) == learns
        assert (metrics["losses/latent_kl"] > 1) == learns


@torch.no_grad()
def test_imagined_games_follow_policy_and_prior():
    agent, states, numbers = agent_of(), states_of(30), numbers_of()
    games, actions = script.play_inside(agent, states, numbers, script.Args())
    assert games.shape == (5, 30, 18) and actions.shape == (4, 30)
    torch.testing.assert_close(games[0], states)
    for t, m in np.ndindex(4, 30):
        probs = agent.policy(games[t, m])
        assert actions[t, m] == script.draw(probs, numbers.actions[t, m])
        row = games[t, m : m + 1], actions[t, m : m + 1], numbers.imagined[t, m : m + 1]
        torch.testing.assert_close(games[t + 1, m], agent.imagine(*row)[0], rtol=1e-4, atol=1e-5)


def behaviour_loss_by_loops(agent, games, actions, running, spread, args):
    """One imagined game after the other."""
    horizon, num = actions.shape
    losses, entropies = {"policy": 0.0, "value": 0.0}, 0.0
    all_returns = np.zeros((horizon, num))
    for m in range(num):
        values = script.expected(agent.critic(games[:, m])).tolist()
        rewards = script.expected(agent.reward(games[:, m])).tolist()
        goes_on = agent.goes_on(games[:, m]).sigmoid().squeeze(1).tolist()
        value = values[-1]
        for t in reversed(range(horizon)):
            value = (1 - args.return_lambda) * values[t + 1] + args.return_lambda * value
            value = rewards[t + 1] + args.gamma * goes_on[t + 1] * value
            all_returns[t, m] = value
    now = np.percentile(all_returns, 95) - np.percentile(all_returns, 5)
    spread = 0.99 * spread + 0.01 * now
    for m in range(num):
        weight = float(running[m])
        for t in range(horizon):
            state = games[t, m].detach()
            value = script.expected(agent.critic(state)).item()
            advantage = (all_returns[t, m] - value) / max(1, spread)
            log_p = agent.policy(state).log()
            entropy = -(log_p.exp() * log_p).sum()
            losses["policy"] -= weight * (
                advantage * log_p[actions[t, m]] + args.ent_coef * entropy
            )
            slow = script.expected(agent.slow_critic(state)).detach()
            logits = agent.critic(state)
            target = torch.tensor(all_returns[t, m], dtype=torch.float32)
            losses["value"] += weight * (distance(target, logits) + distance(slow, logits))
            entropies += entropy.item()
            next_state = games[t + 1, m]
            weight *= args.gamma * agent.goes_on(next_state).sigmoid().item()
    count = horizon * num
    return {name: part / count for name, part in losses.items()}, entropies / count, spread


@pytest.mark.parametrize("spread, scale", [(0.0, 0.4), (40.0, 0.4), (0.0, 0.01)])
def test_the_loss_of_actor_and_critic_and_its_gradient(spread, scale):
    """Where returns are all alike, they are not divided by their spread, but by 1."""
    agent, states, numbers = agent_of(scale=scale), states_of(30), numbers_of()
    agent.spread.fill_(spread)
    args = script.Args(**SIZES, gamma=0.9, return_lambda=0.8, ent_coef=0.05)
    games, actions = script.play_inside(agent, states, numbers, script.Args())
    running = (torch.arange(30) % 4 > 0).float()
    expected, entropy, spread = behaviour_loss_by_loops(
        agent, games, actions, running, spread, args
    )
    loss, metrics = script.behaviour_loss(agent, games, actions, running, args)
    assert agent.spread.item() == pytest.approx(spread, rel=1e-3)
    assert (spread > 1) == (scale > 0.1)
    wanted = {f"losses/{name}_loss": part.item() for name, part in expected.items()}
    found = {tag: value.item() for tag, value in metrics.items()}
    assert found == pytest.approx(wanted | {"losses/entropy": entropy}, rel=1e-3, abs=1e-4)
    total = expected["policy"] + expected["value"]
    weights = [*agent.actor.parameters(), *agent.critic.parameters()]
    ours, theirs = (torch.autograd.grad(value, weights) for value in (loss, total))
    for one, other in zip(ours, theirs):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("limit", [0.0, 0.01])
def test_one_step_down_the_gradient_of_both_losses(limit):
    """The world model does not learn from imagined games, actor and critic only from them."""
    agent, batch, numbers = agent_of(), batch_of(), numbers_of()
    args = script.Args(**SIZES, max_grad_norm=limit, horizon=4)
    before = copy.deepcopy(agent)
    model, states, _ = script.model_loss(before, batch, numbers.seen, args)
    start = states.flatten(0, 1)
    games, actions = script.play_inside(before, start, numbers, args)
    running = (~batch.terminated).flatten().float()
    behaviour, _ = script.behaviour_loss(before, games, actions, running, args)
    learned = {name: w for name, w in before.named_parameters() if w.requires_grad}
    of_model = torch.autograd.grad(model, learned.values(), allow_unused=True)
    of_behaviour = torch.autograd.grad(behaviour, learned.values(), allow_unused=True)
    gradients = {}
    for name, first, second in zip(learned, of_model, of_behaviour):
        if name.split(".")[0] in ("actor", "critic"):
            assert first is None
            gradients[name] = second
        else:
            assert second is None
            gradients[name] = first
    norm = math.sqrt(sum(gradient.square().sum().item() for gradient in gradients.values()))
    scale = 0.01 / norm if limit else 1.0
    assert norm > 0.02
    optimizer = torch.optim.SGD([w for w in agent.parameters() if w.requires_grad], lr=0.1)
    agent.encoder[0].weight.grad = torch.ones_like(agent.encoder[0].weight)  # is no matter
    metrics = script.update(agent, optimizer, batch, numbers, args)
    new = dict(agent.named_parameters())
    for name, gradient in gradients.items():
        expected = learned[name].detach() - 0.1 * scale * gradient
        torch.testing.assert_close(new[name].detach(), expected, rtol=1e-3, atol=1e-4)
    for name, slow in before.slow_critic.named_parameters():
        expected = 0.98 * slow + 0.02 * new[f"critic.{name}"].detach()
        torch.testing.assert_close(new[f"slow_critic.{name}"], expected, rtol=1e-4, atol=1e-6)
    assert len(metrics) == 7 and not any(value.requires_grad for value in metrics.values())


@torch.no_grad()
def test_play_remembers_and_begins_anew_where_it_is_told():
    agent, args, obs = agent_of(), script.Args(**SIZES), torch.randn(3, 5, 4)
    first = np.array([False, True, False, False, False])
    torch.manual_seed(2)
    found = [
        script.play(args, agent, obs[t].numpy(), *([first] if t == 2 else [])) for t in range(3)
    ]
    torch.manual_seed(2)
    states, actions = torch.zeros(5, 18), torch.zeros(5).long()
    for t, begins in enumerate([np.ones(5, bool), np.zeros(5, bool), first]):
        encoded = agent.encoder(agent.scale(obs[t]))
        row = actions, torch.from_numpy(begins), encoded, torch.rand(5, 3)
        states, _ = agent.observe(states, *row)
        actions = agent.policy(states).argmax(1)
        assert found[t].tolist() == actions.tolist()
    torch.testing.assert_close(agent.state[0], states)


@pytest.mark.parametrize("name, other", [
    ("make_env", dqn_cartpole), ("evaluate", r2d2_cartpole), ("cross_entropy", muzero_cartpole),
    ("RunningStatistics", streamq_cartpole),
])  # fmt: skip
def test_what_others_have_too_is_the_same_and_tested_there(name, other):
    ours, theirs = (inspect.getsource(getattr(module, name)) for module in (script, other))
    assert ours == theirs


# ---- ReplayBuffer --------------------------------------------------------------------------------

SMALL = dict(num_envs=2, sequence_length=6, buffer_size=41, learning_starts=20)


def fill(buffer, first, last, which=(0, 1)):
    """Rows that say in all their parts which they are: t + 1000 of the second environment."""
    which = np.array(which)
    for t in range(first, last):
        n = np.float32(t + 1000 * which)
        obs, states = np.stack([n, -n], 1), np.stack([n, n / 7, -n], 1)
        buffer.add(which, obs, n.astype(int) % 3, n / 2, n % 4 == 0, n % 5 == 0, states)


def rows_of(batch):
    """The numbers (T, B) of the rows in a batch. All their parts must be of the same ones."""
    n = batch.obs[..., 0]
    assert torch.equal(batch.obs[..., 1], -n) and torch.equal(batch.actions, n.long() % 3)
    assert torch.equal(batch.rewards, n / 2) and torch.equal(batch.terminated, n % 4 == 0)
    assert torch.equal(batch.first, n % 5 == 0)
    torch.testing.assert_close(batch.state, torch.stack([n[0], n[0] / 7, -n[0]], 1))
    return n.long()


@pytest.mark.parametrize("counts", [(6, 6), (7, 19), (20, 21), (20, 6), (39, 73)])
def test_whole_sequences_of_the_last_rows_are_drawn(counts):
    """20 rows fit in each ring, which need not be equally long."""
    torch.manual_seed(0)
    buffer = script.ReplayBuffer(2, 3, script.Args(**SMALL))
    assert buffer.num_rows == 20
    fill(buffer, 0, min(counts))
    fill(buffer, min(counts), max(counts), [int(np.argmax(counts))])
    rows = rows_of(buffer.sample(8000))
    assert rows.shape == (6, 8000) and (rows[1:] - rows[:-1] == 1).all()
    for i, count in enumerate(counts):
        starts, found = np.unique(rows[0][rows[0] // 1000 == i] - 1000 * i, return_counts=True)
        expected = list(range(max(0, count - 20), count - 5))
        assert starts.tolist() == expected
        np.testing.assert_allclose(found / 4000, 1 / len(expected), atol=0.05)


@pytest.mark.parametrize("count", [0, 11, 50])
def test_buffer_comes_back_from_a_checkpoint(tmp_path, count):
    buffers, drawn = [script.ReplayBuffer(2, 3, script.Args(**SMALL)) for _ in range(2)], []
    fill(buffers[0], 0, count)
    fill(buffers[0], count, count + 2, [1])
    torch.save(buffers[0].state_dict(), tmp_path / "buffer.pt")
    buffers[1].load_state_dict(torch.load(tmp_path / "buffer.pt", weights_only=True))
    for buffer in buffers:
        fill(buffer, count, count + 9, [0])
        fill(buffer, count + 2, count + 9, [1])
        torch.manual_seed(1)
        drawn.append(rows_of(buffer.sample(100)).tolist())
    assert drawn[0] == drawn[1]


# ---- The loop ------------------------------------------------------------------------------------

FEW = dict(
    env_id="Diary-v0", total_timesteps=600, num_envs=3, learning_starts=60, buffer_size=5000,
    sequence_length=5, num_sequences=6, train_frequency=20, eval_episodes=3, units=8, num_latents=2,
    num_classes=3, horizon=3, learning_rate=1e-2,
)  # fmt: skip


def test_the_loop(tmp_path, monkeypatch):
    """What is remembered, played, kept and learned; all in a plain loop over the steps."""
    acts, updates = (recorded(monkeypatch, script, name) for name in ("act", "update"))
    state, points = train(script, tmp_path, **FEW)
    steps, columns = side_by_side(3), state["buffer"]["rows"]
    rows, begins = [0, 0, 0], [True] * 3
    states, last_actions = torch.zeros(3, 14), torch.zeros(3).long()
    for number, (i, (obs, action, reward, next_obs, terminated, truncated)) in enumerate(steps):
        (_, seen, before, actions, first), (_, after) = acts[number // 3]
        assert seen[i].tolist() == obs and first[i] == begins[i]
        assert torch.equal(before[i], states[i]) and actions[i] == last_actions[i]
        kept = [(next_obs, action, reward, terminated, False, after[i])]
        if begins[i]:
            kept = [(obs, 0, 0, False, True, torch.zeros(14)), *kept]
        for row in kept:
            for column, part in zip(columns, row, strict=True):
                np.testing.assert_allclose(column[rows[i], i], part, rtol=1e-6)
            rows[i] += 1
        states[i], last_actions[i], begins[i] = after[i], action, terminated or truncated
    assert state["buffer"]["rows_written"].tolist() == rows
    seen = np.array([step[0] for _, step in steps])
    np.testing.assert_allclose(state["network"]["obs_statistics.mean"], seen.mean(0), rtol=1e-4)
    assert torch.equal(state["memory"]["states"], states)
    assert torch.equal(state["memory"]["actions"], last_actions)
    assert state["memory"]["first"].tolist() == begins
    check_episodes(points, steps)
    # Updates are due at the steps that 20 divides, from 60 on, at a rate that falls.
    due = list(range(60, 601, 20))
    assert len(updates) == len(due)
    for step, ((_, optimizer, batch, numbers, _), _) in zip(due, updates):
        first = (step - 1) // 3 * 3  # step of the run at which the round began
        assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-2 * (1 - first / 600))
        assert batch.obs.shape == (5, 6, 2) and numbers.actions.shape == (3, 30)
    assert type(optimizer) is torch.optim.Adam


@pytest.mark.parametrize("env_id", ["Truncates-v0", "Terminates-v0"])
def test_a_time_limit_is_not_the_end_of_the_world(tmp_path, env_id):
    """Truncated for ever, a reward of 1 is worth 1 / (1 - gamma) in every step.

    Who remembers can count to three, and foresees the end: 1 + 0.8 + 0.64, 1 + 0.8, 1.
    """
    flags = {"env_id": env_id, "gamma": 0.8, "total_timesteps": 2500, "train_frequency": 4}
    sizes = {"units": 16, "horizon": 8, "num_sequences": 8}
    state, _ = train(script, tmp_path, **FEW | flags | sizes)
    args = script.Args(**FEW | sizes)
    agent = script.Agent(1, 2, args)
    agent.load_state_dict(state["network"])
    states, actions, values = torch.zeros(1, agent.state_size), torch.zeros(1).long(), []
    for t in range(3):
        first = torch.tensor([t == 0])
        _, states = script.act(agent, np.ones((1, 1), np.float32), states, actions, first)
        values.append(script.expected(agent.critic(states)).item())
    expected = [2.44, 1.8, 1.0] if env_id == "Terminates-v0" else [5, 5, 5]
    np.testing.assert_allclose(values, expected, rtol=0.15)


def test_every_setting_of_the_algorithm_changes_the_outcome(tmp_path):
    def outcome(**settings):
        state, _ = train(script, tmp_path, **FEW | {"total_timesteps": 250} | settings)
        return [weights.tolist() for weights in state["network"].values()]

    check_settings(script, outcome, {
        "seed": 2, "total_timesteps": 260, "num_envs": 4, "learning_rate": 5e-3, "anneal_lr": False,
        "buffer_size": 90, "sequence_length": 4, "num_sequences": 5, "learning_starts": 100,
        "train_frequency": 25, "gradient_steps": 2, "max_grad_norm": 0.01, "norm_obs": False, "units": 7,
        "num_latents": 3, "num_classes": 4, "free_nats": 2.0, "obs_coef": 1.0, "dyn_coef": 0.5, "rep_coef": 0.5, "horizon": 4,
        "gamma": 0.9, "return_lambda": 0.5, "ent_coef": 0.1,
    })  # fmt: skip
