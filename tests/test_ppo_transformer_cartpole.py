"""A transformer as PPO's memory: token by token in NumPy, window by window, and finite differences.

What ppo_transformer_cartpole.py has word for word like its siblings is tested there.
"""

import dataclasses
import inspect
import math
import types

import gymnasium as gym
import numpy as np
import ppo_cartpole
import ppo_lstm_cartpole
import ppo_transformer_cartpole as script
import pytest
import torch
from diary import (
    Diary, check_episodes, check_ppo_log, check_ppo_rewards, check_settings, recorded, side_by_side,
    train,
)  # fmt: skip
from gymnasium.spaces import Box, Discrete
from torch import nn
from torch.distributions import Categorical

# For the tests that all scripts share.
TINY = (
    "--total-timesteps 1000 --num-envs 4 --num-steps 8 --num-minibatches 2 --update-epochs 2 "
    "--window 5 --num-layers 2 --gates --norm-obs --norm-reward --checkpoint-frequency 250 "
    "--eval-frequency 350 --eval-episodes 5"
)
OWN = "discrete"
OWN_FLAGS = "--total-timesteps 20000 --hide="
WRONG_SPACES = ["Pendulum-v1"]
DIVERGES = "--learning-rate 1e30"
BAD = [
    ("--hide 1,x", "--hide"),
    ("--hide 1,4", "--hide"),
    ("--window 0", "--window"),
    ("--num-layers 0", "--num-layers"),
    ("--num-envs 3 --num-minibatches 4", "--num-minibatches"),
]


@pytest.mark.parametrize("name", [
    "gae", "clipped_policy_loss", "log_prob_and_entropy", "gumbel_noise", "explained_variance",
    "update", "RewardScaler", "RunningStatistics",
])  # fmt: skip
def test_what_ppo_has_too_is_the_same_and_tested_there(name):
    theirs, ours = getattr(ppo_cartpole, name), getattr(script, name)
    if isinstance(ours, types.FunctionType):
        assert ours.__code__.co_code == theirs.__code__.co_code
    assert ours.__doc__ == theirs.__doc__


@pytest.mark.parametrize("name", ["make_env", "hidden", "layer", "update", "evaluate"])
def test_what_the_lstm_script_has_too_is_the_same_and_tested_there(name):
    theirs, ours = getattr(ppo_lstm_cartpole, name), getattr(script, name)
    assert inspect.getsource(ours) == inspect.getsource(theirs)


def test_the_loss_is_that_of_the_lstm_script():
    ours, theirs = (
        inspect.getsource(module.compute_gradient).partition("    log_probs, entropies")[2]
        for module in (script, ppo_lstm_cartpole)
    )
    assert ours == theirs and "loss.backward()" in ours


def test_flags_and_defaults_are_those_of_the_lstm_script():
    theirs, ours = (
        {field.name: field.default for field in dataclasses.fields(module.Args)}
        for module in (ppo_lstm_cartpole, script)
    )
    own = {"window", "num_layers", "gates"}
    assert set(ours) - set(theirs) == own and set(theirs) - set(ours) == {"memory"}
    assert {n for n in ours if n not in own and ours[n] != theirs[n]} == {"exp_name"}


# ---- Memory --------------------------------------------------------------------------------------

# (window, layers, gates)
KINDS = [(4, 1, False), (3, 2, True), (2, 3, False), (1, 1, False), (1, 2, True)]


def make_agent(
    window=4, layers=1, gates=False, obs_size=4, num_actions=3, hide=(), norm_obs=False, seed=0
):
    """With weights that are not as even as those of a new one, so that all of it matters."""
    torch.manual_seed(seed)
    sizes = obs_size, num_actions, set(hide), norm_obs
    agent = script.Agent(*sizes, window, layers, gates)
    with torch.no_grad():
        for name, weights in agent.named_parameters():
            weights += (1.0 if "distance" in name else 0.1) * torch.randn_like(weights)
    return agent


def random_sequence(agent, num_steps=12, dtype=torch.float32):
    """obs (P + T, N, O) and episodes (P + T, N) of five environments, and ends (P + T, N).

    One ends twice in a row, one with the first step of T, one with the last, one never; one is new.
    """
    torch.manual_seed(1)
    past = agent.past
    obs = torch.randn(past + num_steps, 5, 4, dtype=dtype)
    ended = torch.rand(past + num_steps, 5) < 0.12
    ended[past + 3 : past + 5, 0] = ended[-1, 2] = ended[past, 3] = True
    ended[:, 4] = False
    episodes = 7 + ended.cumsum(0) - ended.long()
    episodes[:past, 1] = -1  # nothing before
    return obs, episodes, ended


def in_numpy(agent, obs, episodes, weights=None):
    """logits and V of the last of P + 1 tokens of one environment: (P + 1, O), (P + 1,).

    From the equations, with loops over layers, tokens, heads and steps back.
    """
    if weights is None:
        weights = {name: w.detach().numpy() for name, w in agent.state_dict().items()}
    sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731

    def linear(name, x):
        return weights[f"{name}.weight"] @ x + weights[f"{name}.bias"]

    def norm(name, x):
        centred = x - x.mean()
        x = centred / np.sqrt((centred**2).mean() + 1e-5)
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def joined(name, x, y):
        if f"{name}.bias" not in weights:
            return x + y
        y, size = np.maximum(y, 0), script.HIDDEN
        inner, outer = weights[f"{name}.inner.weight"], weights[f"{name}.outer.weight"]
        r = sigmoid(inner[:size] @ y + outer[:size] @ x)
        z = sigmoid(inner[size : 2 * size] @ y + outer[size:] @ x - weights[f"{name}.bias"])
        g = np.tanh(inner[2 * size :] @ y + weights[f"{name}.reset.weight"] @ (r * x))
        return (1 - z) * x + z * g

    tokens = [np.tanh(linear("encoder", row[agent.seen])) for row in obs]
    for number, part in enumerate(agent.layers):
        name, width, after = f"layers.{number}", script.HIDDEN // script.HEADS, []
        normed = [norm(f"{name}.norm", x) for x in tokens]
        for t, x in enumerate(tokens):
            heads, query = [], linear(f"{name}.query", normed[t])
            for head in range(script.HEADS):
                own, scores, values = slice(head * width, (head + 1) * width), [], []
                for back in range(part.window):
                    if t - back < 0 or episodes[t - back] != episodes[t]:
                        continue
                    both = linear(f"{name}.key_value", normed[t - back])
                    score = query[own] @ both[: script.HIDDEN][own] / math.sqrt(width)
                    scores.append(score + weights[f"{name}.distance"][head, back])
                    values.append(both[script.HIDDEN :][own])
                shares = np.exp(scores) / np.exp(scores).sum()
                heads.append(sum(share * value for share, value in zip(shares, values)))
            x = joined(f"{name}.gates.0", x, linear(f"{name}.join_heads", np.concatenate(heads)))
            inner = np.maximum(linear(f"{name}.mlp.1", norm(f"{name}.mlp.0", x)), 0)
            after.append(joined(f"{name}.gates.1", x, linear(f"{name}.mlp.3", inner)))
        tokens = after
    return linear("actor", tokens[-1]), linear("critic", tokens[-1])[0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_sequence_is_each_window_by_itself(kind):
    """By the equations, in loops; and by the agent itself, to 1e-5: so does it act."""
    agent = make_agent(*kind)
    obs, episodes, _ = random_sequence(agent)
    logits, values = agent(obs, episodes)
    assert logits.shape == (12, 5, 3) and values.shape == (12, 5)
    for t in range(12):
        window = slice(t, t + agent.past + 1)
        alone = agent(obs[window], episodes[window])
        torch.testing.assert_close(alone[0][0], logits[t], rtol=0, atol=1e-5)
        torch.testing.assert_close(alone[1][0], values[t], rtol=0, atol=1e-5)
        for n in range(5):
            found = in_numpy(agent, obs[window, n].numpy(), episodes[window, n].numpy())
            np.testing.assert_allclose(logits[t, n].detach(), found[0], rtol=1e-3, atol=1e-4)
            np.testing.assert_allclose(values[t, n].detach(), found[1], rtol=1e-3, atol=1e-4)
        greedy = script.act(agent, obs[window].numpy(), episodes[window].numpy())
        assert greedy.tolist() == logits[t].argmax(-1).tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_matters_to_its_own_window_and_episode_only(kind):
    """Not a bit elsewhere: not earlier, not beyond P steps, in no other episode or environment."""
    agent = make_agent(*kind)
    obs, episodes, _ = random_sequence(agent)
    logits, values = agent(obs, episodes)
    for s in range(len(obs)):
        other = obs.clone()
        other[s] += 1
        for n in range(5):
            one = torch.where((torch.arange(5) == n)[:, None], other, obs)
            found = agent(one, episodes)
            for t in range(12):
                own = torch.arange(5) == n
                steps = agent.past + t - s
                own &= (0 <= steps <= agent.past) & (episodes[s] == episodes[agent.past + t])
                assert torch.equal((found[0][t] != logits[t]).any(-1), own), (s, n, t)
                assert torch.equal(found[1][t] != values[t], own), (s, n, t)


def test_gradients_reach_the_window_and_no_further():
    agent = make_agent(3, 2)
    obs, episodes, _ = random_sequence(agent)
    episodes[:] = 0
    episodes[9:, 0] = 1
    obs.requires_grad_()
    agent(obs, episodes)[1][6].sum().backward()  # token 10, which sees 6 to 10
    reached = (obs.grad.abs().sum(2) > 0).T.int()
    assert reached.tolist() == [[0] * 9 + [1] * 2 + [0] * 5] + [[0] * 6 + [1] * 5 + [0] * 5] * 4


def test_bias_by_hand():
    """Two heads, W = 3, five tokens, of which the first is of another episode."""
    distance = torch.tensor([[0.5, 1.0, 2.0], [-1.0, -2.0, -3.0]])
    found = script.attention_bias(distance, torch.tensor([[0, 8], [1, 8], [1, 8], [1, 8], [1, 9]]))
    x = -math.inf
    expected = [
        [[[x, 1, 0.5, x, x], [x, 2, 1, 0.5, x], [x, x, 2, 1, 0.5]],
         [[x, -2, -1, x, x], [x, -3, -2, -1, x], [x, x, -3, -2, -1]]],
        [[[2, 1, 0.5, x, x], [x, 2, 1, 0.5, x], [x, x, x, x, 0.5]],
         [[-3, -2, -1, x, x], [x, -3, -2, -1, x], [x, x, x, x, -1]]],
    ]  # fmt: skip
    assert found.tolist() == expected


def test_a_position_is_relative_and_each_distance_counts():
    """Shifted in time, all is the same. The order of tokens matters by the distances alone."""
    agent = make_agent(4, 1)
    obs, episodes, _ = random_sequence(agent)
    episodes[:] = 0
    torch.testing.assert_close(agent(obs[3:], episodes[3:])[0], agent(obs, episodes)[0][3:])
    swapped = obs[[1, 2, 0, *range(3, len(obs))]]
    difference = (agent(swapped, episodes)[1] - agent(obs, episodes)[1])[0].abs()
    assert (difference > 1e-4).all()
    with torch.no_grad():
        agent.layers[0].distance[:] = 0.7
    torch.testing.assert_close(agent(swapped, episodes)[1][0], agent(obs, episodes)[1][0])
    # A large number for one distance: that head sees this token alone.
    with torch.no_grad():
        agent.layers[0].distance[:] = torch.tensor([0, 0, 99.0, 0])
    other = obs.clone()
    other[[0, 2]] += 1  # token 3 looks at 1
    torch.testing.assert_close(agent(other, episodes)[1][0], agent(obs, episodes)[1][0])
    other[1] += 1
    assert not torch.allclose(agent(other, episodes)[1][0], agent(obs, episodes)[1][0], atol=1e-3)


def test_gates_begin_near_the_identity_and_are_a_gru():
    """PyTorch's GRU cell has the same equations, with z and 1 - z exchanged and r elsewhere."""
    torch.manual_seed(0)
    gate = script.Gate()
    x, y = torch.randn(2, 50, script.HIDDEN)
    assert gate.bias.tolist() == [2.0] * script.HIDDEN
    small = (gate(x, y) - x).norm() / x.norm()
    with torch.no_grad():
        gate.bias[:] = 0.0
        assert 0.1 < small < 0.2 < 0.4 < (gate(x, y) - x).norm() / x.norm()
        gate.bias[:] = 99.0
        torch.testing.assert_close(gate(x, y), x)
        gate.bias[:] = -99.0  # z = 1: x only by the candidate
        gate.reset.weight[:] = 0.0
        w_g = gate.inner.weight[2 * script.HIDDEN :]
        torch.testing.assert_close(gate(x, y), (y.clamp(min=0) @ w_g.T).tanh())
    gate, cell = script.Gate(), nn.GRUCell(script.HIDDEN, script.HIDDEN)
    with torch.no_grad():
        # With U_g = 0, where r stands does not matter.
        gate.reset.weight[:] = 0.0
        w_r, w_z, w_g = gate.inner.weight.chunk(3)
        u_r, u_z = gate.outer.weight.chunk(2)
        cell.weight_ih[:] = torch.cat([w_r, -w_z, w_g])
        cell.weight_hh[:] = torch.cat([u_r, -u_z, torch.zeros_like(u_z)])
        cell.bias_ih[:], cell.bias_hh[:] = 0.0, 0.0
        cell.bias_ih[script.HIDDEN : 2 * script.HIDDEN] = 2.0
        torch.testing.assert_close(gate(x, y), cell(y.relu(), x))


def test_a_window_of_one_is_no_memory():
    agent = make_agent(1, 2, True)
    obs, episodes, _ = random_sequence(agent)
    assert agent.past == 0
    alone = agent(obs.flatten(0, 1)[None], torch.zeros(1, 60).long())
    for ours, theirs in zip(agent(obs, episodes), alone):
        torch.testing.assert_close(ours.flatten(0, 1), theirs[0])


def test_actions_are_as_frequent_as_the_policy_says():
    torch.manual_seed(0)
    agent = make_agent(3, 1, obs_size=2)
    path = torch.randn(3, 1, 2).expand(3, 40_000, 2).numpy()
    numbers = np.zeros((3, 40_000), np.int64)
    actions = script.act(agent, path, numbers, script.gumbel_noise(40_000, 3))
    with torch.no_grad():
        pi = agent(torch.tensor(path[:, :1]), torch.zeros(3, 1).long())[0][0, 0].softmax(-1)
    assert pi.min() > 0.03
    np.testing.assert_allclose(np.bincount(actions, minlength=3) / 40_000, pi, atol=0.01)
    assert set(script.act(agent, path, numbers)) == {pi.argmax().item()}


@pytest.mark.parametrize("norm_obs", [True, False])
def test_hidden_numbers_change_nothing(norm_obs):
    agent = make_agent(hide={1, 3}, norm_obs=norm_obs)
    obs, episodes, _ = random_sequence(agent)
    other = obs.clone()
    other[..., [1, 3]] = 1e3 * torch.randn(15, 5, 2)
    assert all(map(torch.equal, agent(obs, episodes), agent(other, episodes)))
    for seen in (0, 2):
        other = obs.clone()
        other[..., seen] += 1
        assert not torch.equal(agent(obs, episodes)[0], agent(other, episodes)[0])


def test_observations_are_normalised_as_the_statistics_say():
    plain, agent = make_agent(), make_agent(norm_obs=True)
    rows = 3 * torch.randn(100, 4) + 1
    agent.obs_statistics.update(rows)
    obs, episodes, _ = random_sequence(agent)
    normal = ((obs - rows.mean(0)) / rows.std(0, correction=0)).clamp(-10, 10)
    assert all(map(torch.allclose, agent(obs, episodes), plain(normal, episodes)))
    far = torch.full_like(obs, 1e6)
    assert all(map(torch.equal, agent(far, episodes), plain(0 * far + 10, episodes)))


def test_the_network_starts_orthogonal_and_the_policy_nearly_uniform():
    agent = script.Agent(4, 3, {1}, norm_obs=False, window=4, num_layers=2, gates=False)
    assert agent.seen == [0, 2, 3] and agent.past == 6
    layers = [(agent.encoder, 2**0.5), (agent.actor, 0.01), (agent.critic, 1.0)]
    for one in agent.layers:
        layers += [(one.query, 1.0), (one.key_value, 1.0), (one.join_heads, 1.0)]
        layers += [(one.mlp[1], 2**0.5), (one.mlp[3], 1.0)]
        assert not one.distance.any()
    for linear, gain in layers:
        rows = min((linear.weight, linear.weight.T), key=len)
        expected = gain**2 * torch.eye(len(rows))
        torch.testing.assert_close(rows @ rows.T, expected, atol=1e-5, rtol=0)
    assert not any(w.any() for name, w in agent.named_parameters() if "bias" in name)
    obs, episodes, _ = random_sequence(agent)
    logits, values = agent(obs, episodes)
    assert (logits.softmax(-1) - 1 / 3).abs().max() < 0.05 and values.shape == (12, 5)


# ---- Advantages and gradients --------------------------------------------------------------------


@pytest.mark.parametrize("gae_lambda", [0.0, 0.7])
@pytest.mark.parametrize("kind", [KINDS[0], KINDS[1], KINDS[3]])
def test_v_of_the_last_observation_sees_the_window_that_led_there(kind, gae_lambda):
    """By hand, from the TD errors: with lambda 0 they are the advantages."""
    agent = make_agent(*kind)
    past = agent.past
    obs, episodes, ended = random_sequence(agent)
    ended = ended[past:]
    terminated = ended & (torch.rand(12, 5) < 0.5)
    truncated = ended & ~terminated
    terminated[3, 0] = truncated[3, 0] = True  # both at once: no bootstrap
    terminated[4, 0], truncated[4, 0] = False, True
    assert terminated.sum() > 2 and truncated.sum() > 2
    next_obs = torch.cat([obs[past + 1 :], torch.randn(1, 5, 4)])
    next_obs[ended] = torch.randn(int(ended.sum()), 4)
    actions, rewards = torch.randint(3, (12, 5)), torch.randn(12, 5)
    args = script.Args(gamma=0.9, gae_lambda=gae_lambda, num_envs=5)
    columns = obs, actions, rewards, next_obs, terminated, truncated, episodes
    batch = script.make_batch(agent, *columns, args)
    expected, values, log_probs = torch.empty(3, 12, 5)
    for n in range(5):
        rest = 0.0
        for t in reversed(range(12)):
            window = slice(t, t + past + 1)
            path, numbers = obs[window, n], episodes[window, n]
            logits, values[t, n] = map(torch.tensor, in_numpy(agent, path.numpy(), numbers.numpy()))
            log_probs[t, n] = Categorical(logits=logits).log_prob(actions[t, n])
            path = torch.cat([path[1:], next_obs[t, n][None]])
            numbers = torch.cat([numbers[1:], numbers[-1:]])
            _, following = in_numpy(agent, path.numpy(), numbers.numpy())
            delta = rewards[t, n] + 0.9 * following * ~terminated[t, n] - values[t, n]
            rest = expected[t, n] = delta + 0.9 * gae_lambda * ~ended[t, n] * rest
    torch.testing.assert_close(batch.advantages, expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(batch.returns, expected + values, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(batch.log_probs, log_probs, rtol=1e-3, atol=1e-4)
    assert batch.obs is obs and batch.actions is actions and batch.episodes is episodes
    assert not any(part.requires_grad for part in batch)


def test_a_rollout_without_an_end_has_advantages_too():
    agent = make_agent()
    obs, episodes, _ = random_sequence(agent)
    columns = torch.zeros(12, 5).long(), torch.randn(12, 5), obs[3:], *torch.zeros(2, 12, 5).bool()
    batch = script.make_batch(agent, obs, *columns, 0 * episodes, script.Args(num_envs=5))
    assert batch.advantages.isfinite().all()


def loss_in_numpy(agent, weights, batch, args):
    """The loss once more from the equations: each environment, one window after another."""
    numbers = {name: part.numpy() for name, part in batch._asdict().items()}
    advantages = numbers["advantages"]
    if args.norm_adv:
        advantages = (advantages - advantages.mean()) / advantages.std(ddof=1)
    total, (num_steps, num_envs) = 0.0, advantages.shape
    for n in range(num_envs):
        for t in range(num_steps):
            window = slice(t, t + agent.past + 1)
            path = numbers["obs"][window, n], numbers["episodes"][window, n]
            logits, value = in_numpy(agent, *path, weights)
            pi = np.exp(logits) / np.exp(logits).sum()
            ratio = pi[numbers["actions"][t, n]] / math.exp(numbers["log_probs"][t, n])
            bounded = min(max(ratio, 1 - args.clip_coef), 1 + args.clip_coef)
            total -= min(ratio * advantages[t, n], bounded * advantages[t, n])
            total += args.vf_coef * (value - numbers["returns"][t, n]) ** 2 / 2
            total += args.ent_coef * (pi * np.log(pi)).sum()
    return total / (num_steps * num_envs)


@pytest.mark.parametrize("kind", [(3, 1, False), (2, 2, True)])
def test_the_gradient_reaches_every_weight(kind):
    """Of each tensor, in a random direction, against finite differences of the loss."""
    args = script.Args(max_grad_norm=0.0, ent_coef=0.01)
    agent = make_agent(*kind).double()
    obs, episodes, _ = random_sequence(agent, 3, dtype=torch.float64)
    obs, episodes, actions = obs[:, :3], episodes[:, :3], torch.randint(3, (3, 3))
    with torch.no_grad():
        log_probs = Categorical(logits=agent(obs, episodes)[0]).log_prob(actions)
    noise = torch.randn(3, 3, 3).double()
    batch = script.Batch(obs, actions, log_probs + 0.3 * noise[0], *noise[1:], episodes)
    weights = {name: w.detach().clone().numpy() for name, w in agent.named_parameters()}
    metrics = script.update(agent, torch.optim.SGD(agent.parameters(), lr=1.0), batch, args)
    generator, h = np.random.default_rng(0), 1e-6
    for name, w in agent.named_parameters():
        step = weights[name] - w.detach().numpy()  # the gradient
        direction = generator.normal(size=step.shape)
        direction /= np.linalg.norm(direction)
        sides = [
            loss_in_numpy(agent, weights | {name: weights[name] + change * direction}, batch, args)
            for change in (h, -h)
        ]
        expected = (sides[0] - sides[1]) / (2 * h)
        assert (step * direction).sum() == pytest.approx(expected, rel=1e-5, abs=1e-7), name
    found = metrics["losses/policy_loss"] + args.vf_coef * metrics["losses/value_loss"]
    found -= args.ent_coef * metrics["losses/entropy"]
    assert found.item() == pytest.approx(loss_in_numpy(agent, weights, batch, args))


@pytest.mark.parametrize("num_envs, parts, epochs", [(6, 3, 3), (7, 3, 2), (2, 1, 2)])
def test_minibatches_are_of_whole_environments(monkeypatch, num_envs, parts, epochs):
    """Every environment once an epoch, with all its steps in order, and those before them."""
    seen = []

    def update(agent, optimizer, batch, args):
        for name, part in batch._asdict().items():
            assert torch.equal(part // 100, batch.obs[:1].expand_as(part) // 100), name
            assert torch.equal(part % 100, torch.arange(len(part))[:, None].expand_as(part)), name
        assert list(map(len, batch)) == [6, 4, 4, 4, 4, 6]
        seen.append((batch.obs[0] // 100).tolist())
        return {"losses/value_loss": torch.tensor(float(len(seen)))}

    monkeypatch.setattr(script, "update", update)
    torch.manual_seed(0)
    args = script.Args(num_envs=num_envs, num_minibatches=parts, update_epochs=epochs)
    long = 100 * torch.arange(num_envs) + torch.arange(6)[:, None]
    metrics = script.learn(None, None, script.Batch(long, *[long[:4]] * 4, long), args)
    assert len(seen) == parts * epochs and max(map(len, seen)) - min(map(len, seen)) <= 1
    orders = [sum(seen[i : i + parts], []) for i in range(0, len(seen), parts)]
    assert all(sorted(order) == list(range(num_envs)) for order in orders)
    assert num_envs < 3 or len({tuple(order) for order in orders}) == epochs
    assert metrics["losses/value_loss"].item() == pytest.approx((len(seen) + 1) / 2)  # their mean


# ---- The loop ------------------------------------------------------------------------------------

FEW = dict(
    env_id="Diary-v0", hide="", total_timesteps=600, num_envs=3, num_steps=20, num_minibatches=2,
    update_epochs=2, eval_episodes=2, learning_rate=1e-2, norm_adv=False, norm_reward=False,
    window=4,
)  # fmt: skip


@pytest.mark.parametrize("num_envs, num_steps, layers", [(3, 20, 1), (2, 5, 2)])
def test_rollouts_are_what_really_happened(tmp_path, monkeypatch, num_envs, num_steps, layers):
    """Also where an episode ends: its last observation, not the next one's first. And before it:
    P steps of the environment, also if they are older than the last rollout.
    """
    calls = recorded(monkeypatch, script, "make_batch")
    own = {"num_envs": num_envs, "num_steps": num_steps, "num_layers": layers}
    saved, points = train(script, tmp_path, **FEW | own)
    rounds, steps = math.ceil(600 / (num_envs * num_steps)), side_by_side(num_envs)
    assert len(calls) == rounds and len(steps) == rounds * num_envs * num_steps
    past = 3 * layers
    for number, ((_, obs, *rollout, episodes, _), _) in enumerate(calls):
        assert obs.shape == (past + num_steps, num_envs, 2)
        for i in range(num_envs):
            begin, end = number * num_steps, (number + 1) * num_steps
            happened = list(zip(*Diary.made[i].steps[begin:end]))
            for column, expected in zip(rollout, happened[1:], strict=True):
                np.testing.assert_allclose(column[:, i], np.array(expected, np.float32), rtol=1e-6)
            before = [(np.zeros(2), 0, 0, 0, 0, 0)] * past + Diary.made[i].steps
            shown = [step[0] for step in before[begin : end + past]]
            np.testing.assert_array_equal(obs[:, i], np.array(shown, np.float32))
            ends = np.cumsum([step[4] or step[5] for step in Diary.made[i].steps])
            numbers = [-1] * past + [0, *ends]
            assert episodes[:, i].tolist() == numbers[begin : end + past]
    final = calls[-1][0]
    assert torch.equal(saved["memory"]["obs"], final[1][num_steps:])
    assert torch.equal(saved["memory"]["episodes"], final[-2][num_steps:])
    check_episodes(points, steps)


@pytest.mark.parametrize("own", [{}, {"num_layers": 2, "gates": True, "norm_obs": True}])
def test_who_acts_and_who_learns_are_the_same_policy(tmp_path, monkeypatch, own):
    """log pi of the acting agent is that of the batch to 1e-5, so the first ratio is 1."""
    acted, act = [], script.act

    def acting(agent, obs, episodes, noise=0.0):
        actions = act(agent, obs, episodes, noise)
        with torch.no_grad():
            logits = agent(torch.tensor(obs), torch.tensor(episodes))[0][-1]
        acted.append(Categorical(logits=logits).log_prob(torch.tensor(actions)))
        return actions

    monkeypatch.setattr(script, "act", acting)
    learned = recorded(monkeypatch, script, "learn")
    updates = recorded(monkeypatch, script, "update")
    train(script, tmp_path, **FEW | own | {"learning_rate": 1e-3})
    assert len(learned) == 10 and len(updates) == 40
    log_probs = torch.cat([arguments[2].log_probs for arguments, _ in learned])
    torch.testing.assert_close(torch.stack(acted[:200]), log_probs, rtol=0, atol=1e-5)
    for k in range(0, 40, 4):  # the first minibatch of each rollout
        (agent, _, batch, args), metrics = updates[k]
        with torch.no_grad():
            found = Categorical(logits=agent(batch.obs, batch.episodes)[0]).log_prob(batch.actions)
        torch.testing.assert_close((found - batch.log_probs).exp(), torch.ones(found.shape),
                                   rtol=0, atol=1e-5)  # fmt: skip
        assert metrics["losses/clipfrac"] == 0 and abs(metrics["losses/approx_kl"]) < 1e-6
        assert metrics["losses/policy_loss"].item() == pytest.approx(
            -batch.advantages.mean().item(), abs=1e-5
        )
    assert any(metrics["losses/approx_kl"] > 1e-5 for _, metrics in updates)


def test_every_environment_gets_the_action_for_what_it_shows(tmp_path, monkeypatch):
    def choose(obs):
        return (obs[:, 0] * 1000).astype(int) % 3

    def act(agent, obs, episodes, noise=0.0):
        return choose(obs[-1])

    monkeypatch.setattr(script, "act", act)
    train(script, tmp_path, **FEW)
    seen, chosen, *_ = zip(*(step for env in Diary.made for step in env.steps))
    assert list(chosen) == choose(np.array(seen, np.float32)).tolist() and len(set(chosen)) == 3


def greedy(agent, path):
    """Actions in an episode from its beginning: (T, O) -> list."""
    obs = torch.cat([torch.zeros(agent.past, len(path[0])), torch.tensor(path)])[:, None]
    episodes = torch.ones(len(obs), 1).long()
    episodes[: agent.past] = 0
    return agent(obs, episodes)[0].argmax(-1)[:, 0].tolist()


@pytest.mark.parametrize("layers", [1, 2])
def test_the_evaluation_remembers_each_episode_by_itself(layers):
    """Fifty episodes in a few environments, which have done at different times."""
    agent = make_agent(4, layers, obs_size=2)
    with torch.no_grad():  # no action is the best one everywhere
        start = torch.rand(agent.past + 3, 999, 2), torch.zeros(agent.past + 3, 999).long()
        agent.actor.bias -= agent(*start)[0].mean((0, 1))
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
    agent = script.Agent(2, 3, set(), norm_obs=False, window=4, num_layers=1, gates=False)
    agent.load_state_dict(saved["network"])
    (folder,) = tmp_path.iterdir()
    for seed in range(3):
        path = np.random.default_rng(seed).normal(0, 3, (40, 2)).astype(np.float32)
        policy = script.load_policy(folder)
        chosen = [int(policy(obs)) - 5 for obs in path]  # Diary counts its actions from 5
        assert chosen == greedy(agent, path) and len(set(chosen)) > 1


def test_a_resumed_run_may_have_other_rollouts(tmp_path):
    """What is kept are P steps, however long rollouts are. Exact resuming is tested for all."""
    train(script, tmp_path, **FEW)
    (folder,) = tmp_path.iterdir()
    args = script.Args(**FEW | {"num_steps": 2, "total_timesteps": 700}, resume=str(folder))
    assert script.train(args).steps == 702


@pytest.mark.parametrize("anneal_lr", [True, False])
def test_metrics_and_learning_rate_are_logged(tmp_path, monkeypatch, anneal_lr):
    check_ppo_log(script, tmp_path, monkeypatch, **FEW, anneal_lr=anneal_lr)


def test_statistics_change_only_between_updates_and_the_next_rollout(tmp_path, monkeypatch):
    """Else pi / pi_old would not start at 1. All observations are counted, once."""
    counts = []
    for name in ("act", "make_batch", "update"):
        def noting(agent, *others, name=name, function=getattr(script, name), **keywords):
            counts.append((name, agent.obs_statistics.count.item()))
            return function(agent, *others, **keywords)

        monkeypatch.setattr(script, name, noting)
    network = train(script, tmp_path, **FEW, norm_obs=True)[0]["network"]
    a_round = ["act"] * 20 + ["make_batch"] + ["update"] * 4
    expected = [(name, before) for before in range(0, 600, 60) for name in a_round]
    assert counts[: len(expected)] == expected
    assert set(counts[len(expected) :]) == {("act", 600)}
    seen = np.array([step[0] for _, step in side_by_side(3)])
    np.testing.assert_allclose(network["obs_statistics.mean"], seen.mean(0), rtol=1e-4)
    np.testing.assert_allclose(network["obs_statistics.variance"], seen.var(0), rtol=1e-3)


@pytest.mark.parametrize("norm_reward", [True, False])
def test_rewards_are_scaled_for_learning_only(tmp_path, monkeypatch, norm_reward):
    flags = FEW | {"norm_reward": norm_reward, "gamma": 0.9}
    check_ppo_rewards(script, tmp_path, monkeypatch, **flags)


@pytest.mark.parametrize("env_id, expected", [
    ("Truncates-v0", [2, 2, 2]), ("Terminates-v0", [1.75, 1.5, 1])
])  # fmt: skip
def test_a_time_limit_is_not_the_end_of_the_world(tmp_path, env_id, expected):
    """Truncated for ever, a reward of 1 is worth 1 / (1 - 0.5) = 2.

    If every third step terminates, all look alike, and softmax gives the mean of what is equal:
    so V is the same for the three, and no more than their mean can be learned.
    """
    flags = {"env_id": env_id, "gamma": 0.5, "gae_lambda": 0.9, "total_timesteps": 2400}
    flags |= {"update_epochs": 10, "num_minibatches": 1, "vf_coef": 1.0, "max_grad_norm": 10.0}
    flags |= {"num_envs": 9, "num_steps": 7}  # rollouts begin within episodes
    saved, _ = train(script, tmp_path, **FEW | flags)
    agent = script.Agent(1, 2, set(), norm_obs=False, window=4, num_layers=1, gates=False)
    agent.load_state_dict(saved["network"])
    obs, episodes = torch.ones(6, 1, 1), torch.tensor([0, 0, 0, 1, 1, 1])[:, None]
    values = agent(obs, episodes)[1].detach()[:, 0]
    if env_id == "Terminates-v0":
        expected = values.new_full((3,), values[0].item())
        assert 1 < values[0] < 1.75
    np.testing.assert_allclose(values, expected, atol=0.1)


class Recall(gym.Env):
    """Each step shows -1 or 1; 1 for saying which it was three steps ago. Best: 9 of 12 steps, and
    half of it without memory.
    """

    observation_space, action_space = Box(-1, 1, (1,), np.float32), Discrete(2)

    def __init__(self, render_mode=None):
        pass

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.shown = []
        return self.show(), {}

    def show(self):
        self.shown.append(int(self.np_random.integers(2)))
        return np.float32([2 * self.shown[-1] - 1])

    def step(self, action):
        reward = float(len(self.shown) > 3 and self.shown[-4] == action)
        return self.show(), reward, False, len(self.shown) == 13, {}


gym.register("Recall-v0", entry_point=Recall)


@pytest.mark.parametrize("own, least, most", [
    ({"window": 4}, 8.9, 9), ({"window": 1}, 3, 6), ({"window": 3}, 3, 6),
    pytest.param({"window": 3, "num_layers": 2}, 8, 9, marks=pytest.mark.slow),
])  # fmt: skip
def test_what_the_window_reaches_is_learned_and_nothing_else(tmp_path, own, least, most):
    """Two layers that look two steps back reach four."""
    flags = dict(env_id="Recall-v0", hide="", gamma=0.0, num_envs=16, num_steps=8,
                 num_minibatches=1, update_epochs=10, total_timesteps=6400, learning_rate=3e-3,
                 eval_episodes=100)  # fmt: skip
    result = script.train(script.Args(**flags | own, runs_dir=str(tmp_path)))
    assert least <= result.episodic_return <= most


def test_every_setting_of_the_algorithm_changes_the_outcome(tmp_path):
    def outcome(**settings):
        state, _ = train(script, tmp_path, **FEW | {"total_timesteps": 240} | settings)
        weights = state["network"].items()
        return [value.tolist() for name, value in weights if "statistics" not in name]

    check_settings(script, outcome, {
        "seed": 2, "total_timesteps": 250, "num_envs": 4, "learning_rate": 5e-3, "anneal_lr": False,
        "num_steps": 25, "gamma": 0.3, "gae_lambda": 0.2, "num_minibatches": 3, "update_epochs": 3,
        "norm_adv": True, "clip_coef": 0.01, "ent_coef": 0.1, "vf_coef": 0.1, "max_grad_norm": 0.01,
        "norm_obs": True, "norm_reward": True, "window": 3, "num_layers": 2, "gates": True,
    })  # fmt: skip
    assert outcome(hide="0") != outcome(hide="1") != outcome()
