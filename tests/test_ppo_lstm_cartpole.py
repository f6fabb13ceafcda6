"""What memory adds to PPO: against PyTorch's own LSTM, episode by episode, and finite differences.

What ppo_lstm_cartpole.py has word for word like ppo_cartpole.py is tested in test_ppo_cartpole.py.
"""

import math
import types

import numpy as np
import ppo_cartpole
import ppo_lstm_cartpole as script
import pytest
import torch
from diary import (
    Diary, check_episodes, check_ppo_log, check_ppo_rewards, check_ppo_statistics, check_settings,
    recorded, side_by_side, train,
)  # fmt: skip
from torch import nn
from torch.distributions import Categorical

# For the tests that all scripts share.
TINY = (
    "--total-timesteps 2000 --num-envs 4 --num-steps 8 --num-minibatches 2 --update-epochs 2 "
    "--norm-obs --norm-reward --checkpoint-frequency 500 --eval-frequency 700 --eval-episodes 5"
)
OWN = "discrete"
OWN_FLAGS = "--total-timesteps 20000 --hide="
WRONG_SPACES = ["Pendulum-v1"]
DIVERGES = "--learning-rate 1e30"
BAD = [
    ("--hide 1,x", "--hide"),
    ("--hide 1,4", "--hide"),
    ("--hide 3,2,1,0", "--hide"),
    ("--num-envs 3 --num-minibatches 4", "--num-minibatches"),
    ("--num-envs 5 --num-minibatches 3 --num-steps 1", "--num-minibatches"),
]
LEARNS = [("--seed 1 --total-timesteps 60000", 45)]  # twice chance; whole runs are in the record
# What others published, by the record's name after `<script>__`: shown beside our results.
PUBLISHED = {"CartPole-v1": "sb3-contrib 500 and 402 (two models on Hugging Face)"}
# How speed.py measures the script, and beside what; its first lines explain the form.
SPEED = {
    "steps": 60_000,
    "first": 5_000,
    "peers": {
        "sb3-contrib's RecurrentPPO": {
            "env_id": "CartPole-v1",
            "num_envs": 32,
            "policy": "MlpLstmPolicy",
            "settings": {
                "n_steps": 16,
                "batch_size": 256,
                "n_epochs": 10,
                "learning_rate": 1e-3,
                "device": "cpu",
                "policy_kwargs": {  # one LSTM for both heads, as ours, and no layer more
                    "lstm_hidden_size": 64,
                    "shared_lstm": True,
                    "enable_critic_lstm": False,
                    "net_arch": [],
                },
            },
            "equal": "compiled",
        },
    },
    "flags": "--hide= --no-norm-reward",
    "variants": {"compiled": "--compile", "not compiled": ""},
    "floors": {},
}


@pytest.mark.parametrize("name", [
    "gae", "clipped_policy_loss", "log_prob_and_entropy", "gumbel_noise", "explained_variance",
    "update", "RewardScaler", "RunningStatistics",
])  # fmt: skip
def test_what_ppo_has_too_is_the_same_and_tested_there(name):
    theirs, ours = getattr(ppo_cartpole, name), getattr(script, name)
    if isinstance(ours, types.FunctionType):
        assert ours.__code__.co_code == theirs.__code__.co_code
    assert ours.__doc__ == theirs.__doc__


# ---- Memory --------------------------------------------------------------------------------------


def make_agent(obs_size=4, num_actions=3, hide=(), norm_obs=False, memory=True, seed=0):
    """With weights that are not as even as those of a new one, so that all of it matters."""
    torch.manual_seed(seed)
    agent = script.Agent(obs_size, num_actions, set(hide), norm_obs, memory)
    with torch.no_grad():
        for weights in agent.parameters():
            weights += 0.3 * torch.randn_like(weights)
    return agent


def random_sequence(num_steps=12, dtype=torch.float32):
    """obs, state before the first step, terminated and truncated, of five environments.

    One ends twice in a row, one at the first step, one at the last, one never.
    """
    torch.manual_seed(1)
    obs = torch.randn(num_steps, 5, 4, dtype=dtype)
    state = 0.5 * torch.randn(2, 5, script.HIDDEN, dtype=dtype)
    terminated, truncated = torch.rand(2, num_steps, 5) < 0.12
    terminated[3:5, 0] = truncated[7, 1] = truncated[-1, 2] = terminated[0, 3] = True
    terminated[:, 4] = truncated[:, 4] = False
    return obs, state, terminated, truncated


def episodes(ended):
    """(environment, first step, step after the last one) of all parts of episodes: (T, N)."""
    for i, column in enumerate(ended.T):
        ends = [t + 1 for t in range(len(column)) if column[t]]
        edges = sorted({0, len(column), *ends})
        yield from ((i, low, high) for low, high in zip(edges, edges[1:]))


def pytorchs_lstm(agent):
    """nn.LSTM with the weights of the agent's."""
    lstm = nn.LSTM(64, script.HIDDEN)
    weights = [*agent.input_gates.parameters(), *agent.hidden_gates.parameters()]
    names = "weight_ih_l0", "bias_ih_l0", "weight_hh_l0", "bias_hh_l0"
    lstm.load_state_dict(dict(zip(names, weights)))
    return lstm


def hidden_by_pytorch(agent, obs, state, ended):
    """h after each step (T, N, H), one nn.LSTM over each part of an episode."""
    lstm, found = pytorchs_lstm(agent), torch.empty(*ended.shape, script.HIDDEN, dtype=obs.dtype)
    for i, low, high in episodes(ended):
        start = state[:, i] if low == 0 else torch.zeros_like(state[:, i])
        inputs = agent.encoder(agent.normalize(obs[low:high, i])[:, agent.seen]).tanh()
        found[low:high, i] = lstm(inputs, tuple(start[:, None]))[0]
    return found


def test_a_sequence_with_ends_is_each_episode_by_itself():
    """Reset at ends of either kind, and also where two follow each other."""
    agent = make_agent()
    obs, state, terminated, truncated = random_sequence()
    ended = terminated | truncated
    logits, values, states = agent(obs, state, ended)
    hidden = hidden_by_pytorch(agent, obs, state, ended)
    torch.testing.assert_close(states[0], hidden, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(logits, agent.actor(hidden), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(values, agent.critic(hidden)[..., 0], rtol=1e-4, atol=1e-5)
    assert len(list(episodes(ended))) > 9


def test_a_sequence_goes_on_from_the_state_it_ended_with():
    agent = make_agent()
    obs, state, *ends = random_sequence()
    ended = ends[0] | ends[1]
    whole = agent(obs, state, ended)
    _, _, states = agent(obs[:5], state, ended[:5])
    rest = agent(obs[5:], states[:, -1] * ~ended[4, :, None], ended[5:])
    torch.testing.assert_close(rest[0], whole[0][5:])
    torch.testing.assert_close(rest[2], whole[2][:, 5:])


def test_nothing_leaks_across_an_end():
    """Not a bit: neither forwards nor backwards. Within the episode, everything matters."""
    agent = make_agent()
    obs, state, *_ = random_sequence(8)
    ended = torch.zeros(8, 5).bool()
    ended[4, 0] = True
    other, other_state = obs.clone(), state.clone()
    other[:5, 0] += 1
    other_state[:, 0] -= 1
    before, after = agent(obs, state, ended), agent(other, other_state, ended)
    for ours, theirs in zip((*before[:2], *before[2]), (*after[:2], *after[2])):
        assert torch.equal(ours[5:, 0], theirs[5:, 0]) and torch.equal(ours[:, 1:], theirs[:, 1:])
        assert not (ours[:5, 0] == theirs[:5, 0]).view(5, -1).all(1).any()
    obs.requires_grad_()
    agent(obs, state, ended)[1][7].sum().backward()
    reached = obs.grad.abs().sum(2) > 0
    assert reached.T.int().tolist() == [[0] * 5 + [1] * 3] + [[1] * 8] * 4


def test_without_memory_each_step_is_the_first():
    agent = make_agent(memory=False)
    obs, state, *ends = random_sequence()
    logits, values, _ = agent(obs, state, ends[0] | ends[1])
    alone = obs.flatten(0, 1)[None], torch.zeros(2, 60, script.HIDDEN), torch.zeros(1, 60).bool()
    first_logits, first_values, _ = make_agent(memory=True)(*alone)
    torch.testing.assert_close(logits.flatten(0, 1), first_logits[0])
    torch.testing.assert_close(values.flatten(), first_values[0])


@pytest.mark.parametrize(
    "norm_obs, hide, memory",
    [(False, (), True), (True, (1, 3), True), (False, (0,), True), (False, (), False)],
)
def test_the_actor_in_numpy_is_the_agent_also_after_an_update(norm_obs, hide, memory):
    """Step by step, with ends; its cell is nn.LSTM's. No product overflows."""
    agent = make_agent(hide=hide, norm_obs=norm_obs, memory=memory)
    if norm_obs:
        agent.obs_statistics.update(3 * torch.randn(100, 4) + 1)
    obs, state, *ends = random_sequence(num_steps=30)
    ended, actor = ends[0] | ends[1], script.Actor(agent)
    for _ in range(2):
        logits, _, states = agent(obs, state, ended)
        now = state.numpy()
        for t in range(len(obs)):
            found, now = actor(obs[t].numpy(), now)
            np.testing.assert_allclose(found, logits[t].detach(), rtol=1e-3, atol=1e-5)
            np.testing.assert_allclose(now, states[:, t].detach(), rtol=1e-3, atol=1e-5)
            assert now.dtype == np.float32
            now *= ~ended[t].numpy()[:, None]
        with torch.no_grad():
            for weights in agent.parameters():
                weights += 0.1 * torch.randn_like(weights)
    with np.errstate(all="raise"):
        assert script.sigmoid(np.float32([-500, 0, 500])).tolist() == [0, 0.5, 1]


def test_actions_are_as_frequent_as_the_policy_says():
    torch.manual_seed(0)
    logits, state = np.log([[0.1, 0.2, 0.7], [0.5, 0.25, 0.25]]), np.zeros((2, 40_000, 1))
    obs = np.tile(np.eye(2), (20_000, 1))

    def actor(obs, state):
        return obs @ logits, state + 1

    actions, after = script.act(actor, obs, state, script.gumbel_noise(40_000, 3))
    assert (after == 1).all()
    for i in range(2):
        shares = np.bincount(actions[i::2], minlength=3) / 20_000
        np.testing.assert_allclose(shares, np.exp(logits[i]), atol=0.015)
    assert script.act(actor, obs, state)[0][:200].tolist() == [2, 0] * 100


@pytest.mark.parametrize("norm_obs", [True, False])
def test_hidden_numbers_change_nothing(norm_obs):
    agent = make_agent(hide={1, 3}, norm_obs=norm_obs)
    obs, state, ended, _ = random_sequence()
    other = obs.clone()
    other[..., [1, 3]] = 1e3 * torch.randn(12, 5, 2)
    assert all(map(torch.equal, agent(obs, state, ended), agent(other, state, ended)))
    actor = script.Actor(agent)
    pairs = [actor(x[0].numpy(), state.numpy()) for x in (obs, other)]
    assert np.array_equal(pairs[0][0], pairs[1][0]) and np.array_equal(pairs[0][1], pairs[1][1])
    for seen in (0, 2):
        other = obs.clone()
        other[..., seen] += 1
        assert not torch.equal(agent(obs, state, ended)[0], agent(other, state, ended)[0])


def test_the_network_starts_orthogonal_and_the_policy_nearly_uniform():
    agent = script.Agent(4, 3, {1}, norm_obs=False, memory=True)
    assert agent.seen == [0, 2, 3]
    layers = [(agent.encoder, 2**0.5), (agent.actor, 0.01), (agent.critic, 1.0)]
    for linear, gain in [*layers, (agent.input_gates, 1.0), (agent.hidden_gates, 1.0)]:
        rows = min((linear.weight, linear.weight.T), key=len)
        expected = gain**2 * torch.eye(len(rows))
        torch.testing.assert_close(rows @ rows.T, expected, atol=1e-5, rtol=0)
    assert not any(w.any() for name, w in agent.named_parameters() if "bias" in name)
    obs, state, ended, _ = random_sequence()
    logits, values, _ = agent(obs, state, ended)
    assert (logits.softmax(-1) - 1 / 3).abs().max() < 0.01 and values.shape == (12, 5)


# ---- Advantages and gradients --------------------------------------------------------------------


@pytest.mark.parametrize("gae_lambda", [0.0, 0.7])
def test_v_of_the_last_observation_continues_the_memory_that_led_there(gae_lambda):
    """By hand, from the TD errors: with lambda 0 they are the advantages."""
    agent = make_agent()
    obs, state, terminated, truncated = random_sequence()
    terminated[5, 1] = truncated[5, 1] = True  # both at once: no bootstrap
    ended = terminated | truncated
    next_obs = torch.cat([obs[1:], torch.randn(1, 5, 4)])
    next_obs[ended] = torch.randn(int(ended.sum()), 4)
    actions, rewards = torch.randint(3, (12, 5)), torch.randn(12, 5)
    args = script.Args(gamma=0.9, gae_lambda=gae_lambda, num_envs=5)
    columns = obs, actions, rewards, next_obs, terminated, truncated, state
    batch = script.make_batch(agent, *columns, args)
    lstm, deltas = pytorchs_lstm(agent), torch.empty(12, 5)
    logits, values = torch.empty(12, 5, 3), torch.empty(12, 5)
    for i, low, high in episodes(ended):
        start = state[:, i] if low == 0 else torch.zeros_like(state[:, i])
        path = torch.cat([obs[low:high, i], next_obs[high - 1 : high, i]])  # and the last one
        hidden = lstm(agent.encoder(path).tanh(), tuple(start[:, None]))[0]
        v = agent.critic(hidden)[:, 0].detach()
        logits[low:high, i], values[low:high, i] = agent.actor(hidden).detach()[:-1], v[:-1]
        following = v[1:].clone()
        following[-1] *= not terminated[high - 1, i]
        deltas[low:high, i] = rewards[low:high, i] + 0.9 * following - v[:-1]
    expected, rest = torch.empty(12, 5), torch.zeros(5)
    for t in reversed(range(12)):
        rest = expected[t] = deltas[t] + 0.9 * gae_lambda * ~ended[t] * rest
    torch.testing.assert_close(batch.advantages, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(batch.returns, expected + values, rtol=1e-4, atol=1e-5)
    log_probs = Categorical(logits=logits).log_prob(actions)
    torch.testing.assert_close(batch.log_probs, log_probs, rtol=1e-4, atol=1e-5)
    assert torch.equal(batch.ended, ended) and torch.equal(batch.state, state)
    assert batch.obs is obs and batch.actions is actions
    assert not any(part.requires_grad for part in batch)


def loss_in_numpy(weights, batch, args):
    """The loss once more from the equations: each environment, one step after another."""
    sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    numbers = {name: part.numpy() for name, part in batch._asdict().items()}
    advantages = numbers["advantages"]
    if args.norm_adv:
        advantages = (advantages - advantages.mean()) / advantages.std(ddof=1)
    total, (num_steps, num_envs) = 0.0, advantages.shape
    for n in range(num_envs):
        h, c = numbers["state"][:, n]
        for t in range(num_steps):
            x = np.tanh(weights["encoder.weight"] @ numbers["obs"][t, n] + weights["encoder.bias"])
            z = weights["input_gates.weight"] @ x + weights["input_gates.bias"]
            z = z + weights["hidden_gates.weight"] @ h + weights["hidden_gates.bias"]
            i, f, g, o = z.reshape(4, -1)
            c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
            h = sigmoid(o) * np.tanh(c)
            logits = weights["actor.weight"] @ h + weights["actor.bias"]
            value = (weights["critic.weight"] @ h + weights["critic.bias"])[0]
            pi = np.exp(logits) / np.exp(logits).sum()
            ratio = pi[numbers["actions"][t, n]] / math.exp(numbers["log_probs"][t, n])
            bounded = min(max(ratio, 1 - args.clip_coef), 1 + args.clip_coef)
            total -= min(ratio * advantages[t, n], bounded * advantages[t, n])
            total += args.vf_coef * (value - numbers["returns"][t, n]) ** 2 / 2
            total += args.ent_coef * (pi * np.log(pi)).sum()
            if numbers["ended"][t, n]:
                h, c = np.zeros_like(h), np.zeros_like(c)
    return total / (num_steps * num_envs)


@pytest.mark.parametrize("flags", [{}, {"norm_adv": False, "ent_coef": 0.3, "vf_coef": 2.0}])
def test_the_gradient_goes_back_through_time(flags):
    """Of each weight tensor in three random directions, against finite differences of the loss."""
    args = script.Args(**{"max_grad_norm": 0.0, "ent_coef": 0.01} | flags)
    agent = make_agent().double()
    obs, state, *ends = random_sequence(8, dtype=torch.float64)
    ended, actions = ends[0] | ends[1], torch.randint(3, (8, 5))
    with torch.no_grad():
        log_probs = Categorical(logits=agent(obs, state, ended)[0]).log_prob(actions)
    noise = torch.randn(3, 8, 5).double()
    batch = script.Batch(obs, actions, log_probs + 0.3 * noise[0], *noise[1:], ended, state)
    weights = {name: w.detach().clone().numpy() for name, w in agent.named_parameters()}
    metrics = script.update(agent, torch.optim.SGD(agent.parameters(), lr=1.0), batch, args)
    generator, h = np.random.default_rng(0), 1e-6
    for name, w in agent.named_parameters():
        step = weights[name] - w.detach().numpy()  # the gradient
        for _ in range(3):
            direction = generator.normal(size=step.shape)
            direction /= np.linalg.norm(direction)
            sides = [
                loss_in_numpy(weights | {name: weights[name] + change * direction}, batch, args)
                for change in (h, -h)
            ]
            expected = (sides[0] - sides[1]) / (2 * h)
            assert (step * direction).sum() == pytest.approx(expected, rel=1e-5, abs=1e-7), name
    found = metrics["losses/policy_loss"] + args.vf_coef * metrics["losses/value_loss"]
    found -= args.ent_coef * metrics["losses/entropy"]
    assert found.item() == pytest.approx(loss_in_numpy(weights, batch, args))
    assert 0 < metrics["losses/clipfrac"] < 1 and not found.requires_grad


def test_the_gradient_of_all_weights_is_clipped_as_one_vector():
    moves = []
    obs, state, ended, _ = random_sequence()
    for limit in (1e9, 0.01):
        agent = make_agent()
        before = nn.utils.parameters_to_vector(agent.parameters()).detach()
        numbers = torch.full((12, 5), -1.1), *torch.randn(2, 12, 5)
        batch = script.Batch(obs, torch.arange(60).view(12, 5) % 3, *numbers, ended, state)
        torch.manual_seed(0)
        optimizer = torch.optim.SGD(agent.parameters(), lr=1.0)
        script.update(agent, optimizer, batch, script.Args(max_grad_norm=limit))
        moves.append(nn.utils.parameters_to_vector(agent.parameters()).detach() - before)
    assert moves[0].norm() > 0.1
    expected = 0.01 * moves[0] / moves[0].norm()
    torch.testing.assert_close(moves[1], expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("num_envs, parts, epochs", [(6, 3, 3), (7, 3, 2), (2, 1, 2)])
def test_minibatches_are_of_whole_environments(monkeypatch, num_envs, parts, epochs):
    """Every environment once an epoch, with all its steps in order and its own state."""
    seen = []

    def update(agent, optimizer, batch, args):
        for name, part in batch._asdict().items():
            assert torch.equal(part // 100, batch.obs[:1].expand_as(part) // 100), name
            assert torch.equal(part % 100, torch.arange(len(part))[:, None].expand_as(part)), name
        assert len(batch.obs) == 4 and len(batch.state) == 2
        seen.append((batch.obs[0] // 100).tolist())
        return {"losses/value_loss": torch.tensor(float(len(seen)))}

    monkeypatch.setattr(script, "update", update)
    torch.manual_seed(0)
    args = script.Args(num_envs=num_envs, num_minibatches=parts, update_epochs=epochs)
    column = 100 * torch.arange(num_envs) + torch.arange(4)[:, None]
    metrics = script.learn(None, None, script.Batch(*[column] * 6, column[:2]), args)
    assert len(seen) == parts * epochs and max(map(len, seen)) - min(map(len, seen)) <= 1
    orders = [sum(seen[i : i + parts], []) for i in range(0, len(seen), parts)]
    assert all(sorted(order) == list(range(num_envs)) for order in orders)
    assert num_envs < 3 or len({tuple(order) for order in orders}) == epochs
    assert metrics["losses/value_loss"].item() == pytest.approx((len(seen) + 1) / 2)  # their mean


def test_every_minibatch_has_an_environment_and_two_steps():
    script.Args(num_envs=5, num_minibatches=5, num_steps=2)
    script.Args(num_envs=5, num_minibatches=2, num_steps=1)
    for num_envs, parts, num_steps in ((5, 6, 99), (5, 3, 1)):
        with pytest.raises(ValueError, match="--num-minibatches"):
            script.Args(num_envs=num_envs, num_minibatches=parts, num_steps=num_steps)


# ---- The loop ------------------------------------------------------------------------------------

FEW = dict(
    env_id="Diary-v0", hide="", total_timesteps=600, num_envs=3, num_steps=20, num_minibatches=2,
    update_epochs=2, eval_episodes=2, learning_rate=1e-2, norm_adv=False, norm_reward=False,
)  # fmt: skip


@pytest.mark.parametrize("num_envs, num_steps", [(3, 20), (2, 7)])
def test_rollouts_are_what_really_happened(tmp_path, monkeypatch, num_envs, num_steps):
    """Also where an episode ends: its last observation, not the next one's first.

    The state stored with a rollout is what the agents so far remember of the running episodes.
    """
    calls = recorded(monkeypatch, script, "make_batch")
    flags = FEW | {"num_envs": num_envs, "num_steps": num_steps}
    saved, points = train(script, tmp_path, **flags)
    rounds, steps = math.ceil(600 / (num_envs * num_steps)), side_by_side(num_envs)
    assert len(calls) == rounds and len(steps) == rounds * num_envs * num_steps
    assert saved["envs"]["steps"] == len(steps)
    states = torch.zeros(2, num_envs, script.HIDDEN)
    for number, ((agent, *rollout, state, _), _) in enumerate(calls):
        torch.testing.assert_close(state, states, rtol=1e-3, atol=1e-5)
        for i in range(num_envs):
            happened = Diary.made[i].steps[number * num_steps : (number + 1) * num_steps]
            for column, expected in zip(rollout, zip(*happened), strict=True):
                np.testing.assert_allclose(column[:, i], np.array(expected, np.float32), rtol=1e-6)
            now = states[:, i : i + 1].clone()
            for obs, *_, terminated, truncated in happened:
                _, _, after = agent(torch.tensor(obs)[None, None], now, torch.zeros(1, 1).bool())
                now = torch.zeros_like(now) if terminated or truncated else after[:, 0].detach()
            states[:, i] = now[:, 0]
    torch.testing.assert_close(saved["memory"]["state"], states, rtol=1e-3, atol=1e-5)
    assert states.any()
    check_episodes(points, steps)


def test_every_environment_gets_the_action_for_what_it_shows(tmp_path, monkeypatch):
    def choose(obs):
        return (obs[:, 0] * 1000).astype(int) % 3

    def act(actor, obs, state, noise=0.0):
        return choose(obs), state + 0

    monkeypatch.setattr(script, "act", act)
    train(script, tmp_path, **FEW)
    seen, chosen, *_ = zip(*(step for env in Diary.made for step in env.steps))
    assert list(chosen) == choose(np.array(seen, np.float32)).tolist() and len(set(chosen)) == 3


def greedy(agent, path):
    """Actions by the agent in PyTorch, in an episode from its beginning: (T, O) -> list."""
    obs = torch.tensor(path)[:, None]
    state = torch.zeros(2, 1, script.HIDDEN)
    return agent(obs, state, torch.zeros(len(obs), 1).bool())[0].argmax(-1)[:, 0].tolist()


def test_the_evaluation_remembers_each_episode_by_itself():
    """Fifty episodes in a few environments, which have done at different times."""
    agent = make_agent(2)
    with torch.no_grad():  # no action is the best one everywhere
        start = torch.zeros(2, 999, script.HIDDEN), torch.zeros(3, 999).bool()
        agent.actor.bias -= agent(torch.rand(3, 999, 2), *start)[0].mean((0, 1))
    for num_envs in (3, 2):
        Diary.made.clear()
        script.evaluate(script.Args(**FEW | {"eval_episodes": 50, "num_envs": num_envs}), agent)
        actions = []
        for env in Diary.made:
            path = []
            for obs, action, _, _, terminated, truncated in env.steps:
                path.append((obs, action))
                if terminated or truncated:
                    seen, chosen = zip(*path)
                    assert greedy(agent, seen) == list(chosen)
                    actions += chosen
                    path = []
            assert not path
        assert len(set(actions)) == 3
    alone = [greedy(agent, [step[0]])[0] for env in Diary.made for step in env.steps]
    assert alone != [step[1] for env in Diary.made for step in env.steps]  # memory matters


def test_load_policy_remembers_an_episode(tmp_path):
    saved, _ = train(script, tmp_path, **FEW)
    agent = script.Agent(2, 3, set(), norm_obs=False, memory=True)
    agent.load_state_dict(saved["network"])
    (folder,) = tmp_path.iterdir()
    for seed in range(3):
        path = np.random.default_rng(seed).normal(0, 3, (40, 2)).astype(np.float32)
        policy = script.load_policy(folder)
        chosen = [int(policy(obs)) - 5 for obs in path]  # Diary counts its actions from 5
        assert chosen == greedy(agent, path) and len(set(chosen)) > 1


@pytest.mark.parametrize("anneal_lr", [True, False])
def test_metrics_and_learning_rate_are_logged(tmp_path, monkeypatch, anneal_lr):
    check_ppo_log(script, tmp_path, monkeypatch, **FEW, anneal_lr=anneal_lr)


def test_statistics_change_only_between_updates_and_the_next_rollout(tmp_path, monkeypatch):
    check_ppo_statistics(script, tmp_path, monkeypatch, **FEW, norm_obs=True)


@pytest.mark.parametrize("norm_reward", [True, False])
def test_rewards_are_scaled_for_learning_only(tmp_path, monkeypatch, norm_reward):
    flags = FEW | {"norm_reward": norm_reward, "gamma": 0.9}
    check_ppo_rewards(script, tmp_path, monkeypatch, **flags)


@pytest.mark.parametrize("env_id, expected", [
    ("Truncates-v0", [2, 2, 2]), ("Terminates-v0", [1.75, 1.5, 1])
])  # fmt: skip
def test_a_time_limit_is_not_the_end_of_the_world(tmp_path, env_id, expected):
    """Truncated for ever, a reward of 1 is worth 1 / (1 - 0.5) = 2.

    If every third step terminates, memory tells the three apart, which look alike.
    """
    flags = {"env_id": env_id, "gamma": 0.5, "gae_lambda": 0.9, "total_timesteps": 2400}
    flags |= {"update_epochs": 10, "num_minibatches": 1, "vf_coef": 1.0, "max_grad_norm": 10.0}
    flags |= {"num_envs": 9, "num_steps": 7}  # rollouts begin within episodes
    saved, _ = train(script, tmp_path, **FEW | flags)
    agent = script.Agent(1, 2, set(), norm_obs=False, memory=True)
    agent.load_state_dict(saved["network"])
    start = torch.zeros(2, 1, script.HIDDEN), torch.zeros(3, 1).bool()
    values = agent(torch.ones(3, 1, 1), *start)[1].detach()[:, 0]
    np.testing.assert_allclose(values, expected, atol=0.1)


def test_every_setting_of_the_algorithm_changes_the_outcome(tmp_path):
    def outcome(**settings):
        state, _ = train(script, tmp_path, **FEW | {"total_timesteps": 240} | settings)
        weights = state["network"].items()
        return [value.tolist() for name, value in weights if "statistics" not in name]

    check_settings(script, outcome, {
        "seed": 2, "total_timesteps": 250, "num_envs": 4, "learning_rate": 5e-3, "anneal_lr": False,
        "num_steps": 25, "gamma": 0.3, "gae_lambda": 0.2, "num_minibatches": 3, "update_epochs": 3,
        "norm_adv": True, "clip_coef": 0.01, "ent_coef": 0.1, "vf_coef": 0.1, "max_grad_norm": 0.01,
        "norm_obs": True, "norm_reward": True, "memory": False,
    })  # fmt: skip
    assert outcome(hide="0") != outcome(hide="1") != outcome()
