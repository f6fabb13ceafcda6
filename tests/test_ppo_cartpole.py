"""The mathematics and the loop of ppo_cartpole.py, against brute force, finite differences and hand-made tables.

The functions that the other PPO scripts have, too, word for word, are tested here for all.
"""

import math

import gymnasium as gym
import numpy as np
import ppo_cartpole as script
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.distributions import Categorical

# The description for the common tests: README.md explains it.
TINY = (
    "--total-timesteps 2000 --num-envs 2 --checkpoint-frequency 500 --eval-frequency 700 --eval-episodes 5 "
    "--num-minibatches 2 --update-epochs 2 --norm-obs --norm-reward"
)
OWN = "discrete"
OWN_FLAGS = "--total-timesteps 10000"
WRONG_SPACES = ["Pendulum-v1"]
DIVERGES = "--learning-rate 1e30"
BAD = [("--num-steps 0", "--num-steps"), ("--num-minibatches 129", "--num-minibatches"), ("--vf-coef nan", "--vf-coef")]
LEARNS = [("--seed 1", 475)]  # what Gymnasium calls solved

# ---- gae ------------------------------------------------------------------------------------------------------------


def stream(seed, num_steps=30, num_envs=4):
    """Random rewards, values and ends; also steps that are both, terminated and truncated."""
    generator = np.random.default_rng(seed)
    rewards, values, last_values = generator.normal(size=(3, num_steps, num_envs))
    terminated, truncated = generator.random((2, num_steps, num_envs)) < 0.12
    ended = terminated | truncated
    next_values = np.concatenate([values[1:], last_values[:1]])
    next_values[ended] = last_values[ended]  # the value of an episode's last observation, not of the next one's first
    return rewards, values, next_values, terminated, truncated


def n_step_advantage(rewards, values, next_values, terminated, t, n, i, gamma):
    """r_t + gamma r_{t+1} + ... + gamma^n V(s_{t+n}) - V(s_t), the estimate from n steps."""
    total = sum(gamma**k * rewards[t + k, i] for k in range(n))
    bootstrap = 0.0 if terminated[t + n - 1, i] else next_values[t + n - 1, i]
    return total + gamma**n * bootstrap - values[t, i]


@pytest.mark.parametrize("gamma, lam", [(0.9, 0.7), (1.0, 0.5), (0.99, 0.95), (0.8, 0.0), (0.8, 1.0), (0.0, 0.9)])
@pytest.mark.parametrize("seed", [0, 1])
def test_gae_is_the_mean_of_all_n_step_estimates(seed, gamma, lam):
    """Not the recursion: the definition. (1 - lambda) * sum_n lambda^(n-1) * A^(n), and all the weight that is left
    over goes to the longest estimate, at the end of the episode or of the rollout."""
    rewards, values, next_values, terminated, truncated = stream(seed)
    num_steps, num_envs = rewards.shape
    expected = np.zeros_like(rewards)
    for i in range(num_envs):
        for t in range(num_steps):
            ends = [k for k in range(t, num_steps) if terminated[k, i] or truncated[k, i]]
            longest = (ends[0] if ends else num_steps - 1) - t + 1
            for n in range(1, longest + 1):
                weight = lam ** (n - 1) * (1 - lam if n < longest else 1)
                expected[t, i] += weight * n_step_advantage(rewards, values, next_values, terminated, t, n, i, gamma)
    inputs = map(torch.from_numpy, (rewards, values, next_values, terminated, truncated))
    np.testing.assert_allclose(script.gae(*inputs, gamma, lam), expected, atol=1e-6)


def test_gae_by_hand():
    """gamma 0.5, lambda 0.5. Step 1 is truncated, step 3 terminated, the rollout ends after step 4."""
    rewards, values = torch.tensor([1.0, 2, 3, 4, 5])[:, None], torch.tensor([0.0, 4, 8, 0, 2])[:, None]
    next_values = torch.tensor([4.0, 6, 0, 100, 8])[:, None]
    terminated, truncated = torch.zeros(2, 5, 1, dtype=torch.bool)
    terminated[3], truncated[1] = True, True
    deltas = [1 + 2 - 0, 2 + 3 - 4, 3 + 0 - 8, 4 - 0, 5 + 4 - 2]
    expected = [deltas[0] + 0.25 * deltas[1], deltas[1], deltas[2] + 0.25 * deltas[3], deltas[3], deltas[4]]
    found = script.gae(rewards, values, next_values, terminated, truncated, 0.5, 0.5)
    assert found.squeeze(1).tolist() == expected


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_a_reward_of_1_for_ever_is_worth_1_over_1_minus_gamma(lam):
    """With that value, nothing is better than expected, at a time limit neither. A termination is a disappointment."""
    ones, no = torch.ones(50, 2), torch.zeros(50, 2, dtype=torch.bool)
    every_fifth = no.clone()
    every_fifth[::5] = True
    value = ones / (1 - 0.9)
    assert script.gae(ones, value, value, no, every_fifth, 0.9, lam).abs().max() < 1e-5
    assert script.gae(ones, value, value, every_fifth, no, 0.9, lam)[::5].mean().item() == pytest.approx(-9, abs=1e-4)


@pytest.mark.parametrize("truncates, value", [(True, 5.0), (False, 1 + 0.8 * (1 + 0.8))])
def test_values_that_follow_the_advantages_find_what_is_true(truncates, value):
    """Episodes of 3 steps, each pays 1. V <- V + A, for a value of each step: 1 / (1 - gamma) in all of them if time
    limits are none of the world's business, else 1 + gamma + gamma^2 in the first."""
    values, ends, no = torch.zeros(3), torch.tensor([[False], [False], [True]]), torch.zeros(3, 1, dtype=torch.bool)
    for _ in range(200):
        following = torch.cat([values[1:], values[:1]])
        terminated, truncated = (no, ends) if truncates else (ends, no)
        values = values + script.gae(
            torch.ones(3, 1), values[:, None], following[:, None], terminated, truncated, 0.8, 0.5
        ).squeeze(1)
    assert values[0].item() == pytest.approx(value, abs=1e-3)


# ---- The two losses -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio, advantage, loss, gradient", [
    (1.0, 2.0, -2.0, -2.0),
    (1.1, 2.0, -2.2, -2.0),
    (1.3, 2.0, -2.4, 0.0),  # likely enough by now
    (0.5, 2.0, -1.0, -2.0),  # went the wrong way: back
    (1.0, -2.0, 2.0, 2.0),
    (0.9, -2.0, 1.8, 2.0),
    (0.5, -2.0, 1.6, 0.0),  # unlikely enough by now
    (1.3, -2.0, 2.6, 2.0),  # went the wrong way: back
])  # fmt: skip
def test_policy_loss_and_its_gradient_on_both_sides_of_the_clip(ratio, advantage, loss, gradient):
    ratio = torch.tensor([ratio], requires_grad=True)
    found = script.clipped_policy_loss(ratio, torch.tensor([advantage]), 0.2)
    found.backward()
    assert found.item() == pytest.approx(loss) and ratio.grad.item() == pytest.approx(gradient)


def test_policy_loss_is_a_mean():
    ratio, advantages = torch.tensor([1.0, 1.3, 0.5, 1.3]), torch.tensor([2.0, 2.0, -2.0, -2.0])
    expected = pytest.approx((-2.0 - 2.4 + 1.6 + 2.6) / 4, abs=1e-6)
    assert script.clipped_policy_loss(ratio, advantages, 0.2).item() == expected


@pytest.mark.parametrize("value, clip, loss, gradient", [
    (1.0, None, 2.0, -2.0),  # (1 - 3)^2 / 2
    (2.5, None, 0.125, -0.5),
    (1.1, 0.2, 1.9**2 / 2, -1.9),  # within the clip
    (2.5, 0.2, 1.8**2 / 2, 0.0),  # moved from 1 towards 3 by more than 0.2: 1.2 counts, and does not pull any further
    (0.5, 0.2, 2.5**2 / 2, -2.5),  # moved away: counts in full
])  # fmt: skip
def test_value_loss_with_and_without_its_clip(value, clip, loss, gradient):
    """The old value is 1, the return 3."""
    value = torch.tensor([value], requires_grad=True)
    found = script.value_loss(value, torch.tensor([1.0]), torch.tensor([3.0]), clip)
    found.backward()
    assert found.item() == pytest.approx(loss) and value.grad.item() == pytest.approx(gradient)


def test_value_loss_is_a_mean():
    values, returns = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 2.0])
    assert script.value_loss(values, values, returns, None).item() == 1.0


# ---- update, against finite differences -----------------------------------------------------------------------------


class Table(nn.Module):
    """Logits and a value for each state; an observation is a state, one-hot."""

    def __init__(self, logits, values):
        super().__init__()
        self.numbers = nn.Parameter(torch.cat([logits, values[:, None]], 1))

    def forward(self, obs):
        return self.actor(obs), obs @ self.numbers[:, -1]

    def actor(self, obs):
        return obs @ self.numbers[:, :-1]

    def normalize(self, obs):
        return obs


def example(seed=0, size=12):
    generator = torch.Generator().manual_seed(seed)
    table = Table(torch.randn(3, 4, generator=generator).double(), torch.randn(3, generator=generator).double())
    states = torch.randint(3, (size,), generator=generator)
    actions = torch.randint(4, (size,), generator=generator)
    now = table.numbers[states, :-1].log_softmax(1)[range(size), actions].detach()
    noise = torch.randn(4, size, generator=generator).double()
    batch = script.Batch(
        torch.eye(3, dtype=torch.float64)[states], actions, now + 0.3 * noise[0], noise[1], noise[2], noise[3]
    )
    return table, states.numpy(), batch


def loss_in_numpy(numbers, states, batch, args):
    """The whole loss once more, row by row, from the paper's equations."""
    total, advantages = 0.0, batch.advantages.numpy()
    if args.norm_adv:
        advantages = (advantages - np.mean(advantages)) / np.std(advantages, ddof=1)
    for b, s in enumerate(states):
        exponentials = np.exp(numbers[s, :-1])
        probabilities = exponentials / exponentials.sum()
        ratio = probabilities[batch.actions[b]] / math.exp(batch.log_probs[b])
        bounded = min(max(ratio, 1 - args.clip_coef), 1 + args.clip_coef)
        value, old, target = numbers[s, -1], batch.values[b].item(), batch.returns[b].item()
        error = (value - target) ** 2
        if args.clip_vloss:
            error = max(error, (min(max(value, old - args.clip_coef), old + args.clip_coef) - target) ** 2)
        total -= min(ratio * advantages[b], bounded * advantages[b])
        total += args.vf_coef * error / 2
        total += args.ent_coef * (probabilities * np.log(probabilities)).sum()
    return total / len(states)


@pytest.mark.parametrize("flags", [
    {}, {"norm_adv": False}, {"clip_vloss": False}, {"ent_coef": 0.5}, {"vf_coef": 2.0}, {"clip_coef": 0.1},
    {"norm_adv": False, "ent_coef": 0.1, "clip_coef": 0.4, "vf_coef": 0.0},
])  # fmt: skip
def test_update_goes_down_the_gradient_of_the_papers_loss(flags):
    args = script.Args(**{"max_grad_norm": 1e9, "clip_vloss": True, "ent_coef": 0.01} | flags)
    table, states, batch = example()
    before, rate, step = table.numbers.detach().numpy().copy(), 0.1, 1e-6
    gradient = np.zeros_like(before)
    for place in np.ndindex(before.shape):
        high, low = before.copy(), before.copy()
        high[place] += step
        low[place] -= step
        difference = loss_in_numpy(high, states, batch, args) - loss_in_numpy(low, states, batch, args)
        gradient[place] = difference / (2 * step)
    script.update(table, torch.optim.SGD(table.parameters(), lr=rate), batch, args)
    np.testing.assert_allclose(table.numbers.detach(), before - rate * gradient, atol=1e-7)


def test_longer_gradients_are_cut_to_their_limit_and_shorter_ones_are_not():
    moves = {}
    for limit in (1e9, 0.01):
        table, _, batch = example()
        before = table.numbers.detach().clone()
        script.update(table, torch.optim.SGD(table.parameters(), lr=1.0), batch, script.Args(max_grad_norm=limit))
        moves[limit] = before - table.numbers.detach()
    assert moves[1e9].norm() > 0.1 and moves[0.01].norm().item() == pytest.approx(0.01, rel=1e-3)
    torch.testing.assert_close(moves[0.01] / 0.01, moves[1e9] / moves[1e9].norm(), rtol=1e-3, atol=1e-6)


def test_the_gradient_of_all_weights_is_cut_as_one_vector():
    torch.manual_seed(0)
    agent = script.Agent(2, 3, norm_obs=False)
    before = [weights.detach().clone() for weights in agent.parameters()]
    batch = script.Batch(torch.randn(8, 2), torch.arange(8) % 3, torch.full((8,), -1.1), *torch.randn(3, 8))
    script.update(agent, torch.optim.SGD(agent.parameters(), lr=1.0), batch, script.Args(max_grad_norm=0.01))
    moves = [weights.detach() - old for weights, old in zip(agent.parameters(), before)]
    assert torch.cat([move.flatten() for move in moves]).norm().item() == pytest.approx(0.01, rel=1e-3)
    assert sum(move.norm().item() > 0.001 for move in moves) > 1


def test_equal_advantages_have_no_deviation_to_divide_by():
    agent = script.Agent(2, 3, norm_obs=False)
    obs, zeros, ones = torch.randn(8, 2), torch.zeros(8), torch.ones(8)
    batch = script.Batch(obs, torch.arange(8) % 3, -1.1 * ones, values=zeros, advantages=ones, returns=zeros)
    metrics = script.update(agent, torch.optim.SGD(agent.parameters(), lr=1.0), batch, script.Args(norm_adv=True))
    assert metrics["losses/policy_loss"].item() == 0
    assert all(weights.isfinite().all() for weights in agent.parameters())


def test_updates_share_no_gradient():
    """What was there before is cleared: the step is the same."""
    steps = []
    for left_over in (False, True):
        torch.manual_seed(0)
        agent = script.Agent(2, 3, norm_obs=False)
        noise = torch.randn(2, 8)
        batch = script.Batch(torch.randn(8, 2), torch.arange(8) % 3, torch.full((8,), -1.1), torch.zeros(8), *noise)
        optimizer = torch.optim.SGD(agent.parameters(), lr=0.1)
        for weights in agent.parameters():
            weights.grad = torch.ones_like(weights) if left_over else None
        script.update(agent, optimizer, batch, script.Args())
        steps.append(torch.cat([weights.detach().flatten() for weights in agent.parameters()]))
    assert torch.equal(*steps)


def test_update_reports_what_the_minibatch_was_like_before_the_step():
    args = script.Args(clip_coef=0.2, norm_adv=False)
    table, states, batch = example()
    numbers = table.numbers.detach().numpy().copy()
    logs = np.log(np.exp(numbers[:, :-1]) / np.exp(numbers[:, :-1]).sum(1, keepdims=True))
    ratio = np.exp(logs[states, batch.actions] - batch.log_probs.numpy())
    metrics = script.update(table, torch.optim.SGD(table.parameters(), lr=0.1), batch, args)
    expected = {
        "losses/entropy": -(np.exp(logs) * logs).sum(1)[states].mean(),
        "losses/approx_kl": np.mean(ratio - 1 - np.log(ratio)),
        "losses/clipfrac": np.mean(abs(ratio - 1) > 0.2),
        "losses/policy_loss": -np.mean(np.minimum(ratio * batch.advantages.numpy(),
                                                  ratio.clip(0.8, 1.2) * batch.advantages.numpy())),
        "losses/value_loss": np.mean((numbers[states, -1] - batch.returns.numpy()) ** 2) / 2,
    }  # fmt: skip
    assert {tag: pytest.approx(value.item(), rel=1e-6) for tag, value in metrics.items()} == expected
    assert 0 < expected["losses/clipfrac"] < 1
    assert not any(value.requires_grad for value in metrics.values())


def test_approx_kl_is_the_divergence_on_average():
    """Of the old policy from the new one, over actions of the old one, against the sum over all actions."""
    torch.manual_seed(0)
    old, new = torch.tensor([0.1, 0.4, 0.5]).double(), torch.tensor([0.2, 0.35, 0.45]).double()
    table = Table(new.log()[None], torch.zeros(1).double())
    actions = torch.multinomial(old, 200_000, replacement=True)
    zeros = torch.zeros(200_000).double()
    batch = script.Batch(torch.ones(200_000, 1).double(), actions, old.log()[actions], zeros, zeros, zeros)
    found = script.update(table, torch.optim.SGD(table.parameters(), lr=0.0), batch, script.Args())
    assert found["losses/approx_kl"].item() == pytest.approx((old * (old / new).log()).sum().item(), rel=0.03)


# ---- learn ----------------------------------------------------------------------------------------------------------


def numbered_batch(size):
    numbers = torch.arange(size).double()
    return script.Batch(*[numbers] * 6)


@pytest.mark.parametrize("size, parts, epochs", [(12, 4, 3), (13, 4, 2), (5, 1, 2), (9, 2, 1)])
def test_every_epoch_learns_from_every_step_once_and_in_another_order(monkeypatch, size, parts, epochs):
    seen = []

    def update(agent, optimizer, batch, args):
        assert all(torch.equal(part, batch.obs) for part in batch)  # rows stay together
        seen.append(batch.obs.int().tolist())
        return {"losses/approx_kl": torch.tensor(float(len(seen)))}

    monkeypatch.setattr(script, "update", update)
    torch.manual_seed(0)
    args = script.Args(num_minibatches=parts, update_epochs=epochs)
    metrics = script.learn(None, None, numbered_batch(size), args)
    assert len(seen) == parts * epochs
    orders = [sum(seen[i : i + parts], []) for i in range(0, len(seen), parts)]
    assert all(sorted(order) == list(range(size)) for order in orders)
    assert len({tuple(order) for order in orders}) == epochs and list(range(size)) not in orders
    assert max(map(len, seen)) - min(map(len, seen)) <= 1
    assert metrics["losses/approx_kl"].item() == pytest.approx(np.mean(range(1, len(seen) + 1)))  # over all of them


@pytest.mark.parametrize("target, updates", [(None, 12), (0.35, 12), (0.25, 12), (0.15, 9), (0.05, 6)])
def test_learning_ends_after_the_epoch_whose_mean_divergence_is_too_large(monkeypatch, target, updates):
    """It is 0, 0.1, 0.2, 0.3 in the four epochs, and in each the last minibatch has less than the others."""
    done = []

    def update(agent, optimizer, batch, args):
        done.append(1)
        epoch, part = divmod(len(done) - 1, 3)
        return {"losses/approx_kl": torch.tensor(0.1 * epoch + (0.05, 0.05, -0.1)[part])}

    monkeypatch.setattr(script, "update", update)
    script.learn(None, None, numbered_batch(9), script.Args(num_minibatches=3, update_epochs=4, target_kl=target))
    assert len(done) == updates


def test_losses_that_are_not_finite_stop_the_run():
    table, _, batch = example()
    batch = batch._replace(returns=batch.returns * float("nan"))
    with pytest.raises(FloatingPointError, match="finite"):
        script.learn(table, torch.optim.SGD(table.parameters(), lr=0.1), batch, script.Args())


def test_explained_variance_by_hand():
    returns = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert script.explained_variance(returns, returns).item() == pytest.approx(1)
    assert script.explained_variance(returns + 5, returns).item() == pytest.approx(1)  # off by a constant
    assert script.explained_variance(torch.zeros(4), returns).item() == pytest.approx(0)
    assert script.explained_variance(-returns, returns).item() == pytest.approx(-3)
    assert script.explained_variance(torch.ones(4), torch.ones(4)).isfinite()


# ---- The policy ------------------------------------------------------------------------------------------------------


def test_log_probability_and_entropy_against_pytorchs_own():
    torch.manual_seed(0)
    logits, actions = 3 * torch.randn(5, 4, 3).double(), torch.randint(0, 3, (5, 4))
    log_probs, entropies = script.log_prob_and_entropy(logits, actions)
    torch.testing.assert_close(log_probs, Categorical(logits=logits).log_prob(actions))
    torch.testing.assert_close(entropies, Categorical(logits=logits).entropy())
    certain = script.log_prob_and_entropy(torch.tensor([0.0, 200.0]), torch.tensor(0))
    assert [number.item() for number in certain] == [-200, 0]  # and not 0 times infinity


def test_actions_are_as_frequent_as_the_policy_says():
    torch.manual_seed(0)
    probabilities = torch.tensor([[0.1, 0.2, 0.7], [0.5, 0.25, 0.25]])
    table = Table(probabilities.log(), torch.zeros(2))
    actions = script.act(table, torch.eye(2).repeat(20_000, 1)).view(20_000, 2)
    for i in range(2):
        shares = np.bincount(actions[:, i], minlength=3) / 20_000
        np.testing.assert_allclose(shares, probabilities[i], atol=0.015)
    pairs = (actions[:, 0] == 2) & (actions[:, 1] == 0)  # each environment for itself
    assert pairs.float().mean().item() == pytest.approx(0.35, abs=0.015)
    assert script.act(table, torch.eye(2), greedy=True).tolist() == [2, 0]


def test_acting_sees_what_learning_sees():
    torch.manual_seed(0)
    agent, obs = script.Agent(4, 3, norm_obs=True), torch.randn(64, 4) * 10 + 50
    agent.obs_statistics.update(obs)
    expected = agent(obs)[0].argmax(-1)
    assert len(set(expected.tolist())) > 1
    assert torch.equal(script.act(agent, obs, greedy=True), expected)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_an_observation_that_is_not_finite_is_named(poison):
    torch.manual_seed(0)
    agent = script.Agent(4, 2, norm_obs=False)
    with pytest.raises(FloatingPointError, match="observation"):
        script.act(agent, torch.tensor([[0.0] * 4, [poison, -poison, 0, 0]]))


# ---- Networks and normalisation -------------------------------------------------------------------------------------


def test_the_network_starts_orthogonal_and_the_policy_without_a_bias():
    torch.manual_seed(0)
    agent = script.Agent(4, 3, norm_obs=False)
    for network, last in ((agent.actor, 0.01), (agent.critic, 1.0)):
        linears = [module for module in network if isinstance(module, nn.Linear)]
        for linear, gain in zip(linears, (math.sqrt(2), math.sqrt(2), last)):
            weight = linear.weight if linear.weight.shape[0] <= linear.weight.shape[1] else linear.weight.T
            torch.testing.assert_close(weight @ weight.T, gain**2 * torch.eye(len(weight)), atol=1e-5, rtol=0)
            assert not linear.bias.any()
    probabilities = agent(torch.randn(100, 4))[0].softmax(-1)
    assert (probabilities - 1 / 3).abs().max() < 0.01
    assert not set(map(id, agent.actor.parameters())) & set(map(id, agent.critic.parameters()))


@pytest.mark.parametrize("pieces", [[100], [1] * 100, [3, 50, 1, 46]])
def test_running_statistics_are_numpys_on_the_whole_stream(pieces):
    rows = np.random.default_rng(0).normal([3, -100, 0], [1, 20, 0.01], (100, 3)).astype(np.float32)
    statistics = script.RunningStatistics(3)
    for piece in np.split(rows, np.cumsum(pieces)[:-1]):
        statistics.update(torch.from_numpy(piece))
    np.testing.assert_allclose(statistics.mean, rows.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(statistics.variance, rows.var(0), rtol=1e-3)
    assert statistics.count == 100


def test_statistics_are_saved_with_the_network_and_used_by_it():
    torch.manual_seed(0)
    agent, other = script.Agent(2, 3, norm_obs=True), script.Agent(2, 3, norm_obs=True)
    agent.obs_statistics.update(torch.tensor([[1.0, 10.0], [3.0, 30.0]]))  # means 2 and 20, deviations 1 and 10
    other.load_state_dict(agent.state_dict())
    obs = torch.tensor([[3.0, 40.0], [1e6, -1e6]])
    normalised = torch.tensor([[1.0, 2.0], [10.0, -10.0]])  # clipped to 10 deviations
    for ours in (agent, other):
        torch.testing.assert_close(ours(obs)[0], ours.actor(normalised))
        torch.testing.assert_close(ours(obs)[1], ours.critic(normalised).squeeze(-1))
    assert torch.equal(script.act(agent, obs, greedy=True), script.act(other, obs, greedy=True))


def test_rewards_are_divided_by_the_deviation_of_the_sums_so_far():
    """gamma 0.5, two environments; the sums begin anew after any end, and go on across rollouts."""
    statistics, before = script.RunningStatistics(1), torch.zeros(2)
    rewards = torch.tensor([[1.0, 8.0], [1.0, 0.0], [1.0, 4.0]])
    ended = torch.tensor([[False, False], [True, False], [False, False]])
    sums = [1.0, 8.0, 1.5, 4.0, 1.0, 6.0]
    scaled, before = script.scale_rewards(rewards, ended, before, statistics, 0.5)
    torch.testing.assert_close(scaled, rewards / np.std(sums))
    assert before.tolist() == [1.0, 6.0]
    more, ended = torch.tensor([[2.0, 1.0]]), torch.tensor([[False, True]])
    scaled, before = script.scale_rewards(more, ended, before, statistics, 0.5)
    torch.testing.assert_close(scaled, more / np.std([*sums, 2.5, 4.0]))
    assert before.tolist() == [2.5, 0.0]


def test_scaled_rewards_are_clipped():
    for reward, expected in ((1000.0, 10), (-1000.0, -10)):
        scaled, _ = script.scale_rewards(
            torch.tensor([[reward]] + [[0.0]] * 999), torch.zeros(1000, 1).bool(), torch.zeros(1),
            script.RunningStatistics(1), 0.0,
        )  # fmt: skip
        assert scaled[0].item() == expected


# ---- The loop -------------------------------------------------------------------------------------------------------


class Diary(gym.Env):
    """Episodes of random length, of which a third terminate, a third are truncated, and a third do both in one step;
    with random observations in an array that is reused. Every environment keeps a diary of what really happened."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = gym.spaces.Discrete(3, start=5)
    made = []

    def __init__(self, lengths=(1, 6)):
        self.obs, self.lengths, self.steps, self.seeds = np.zeros(2), lengths, [], []
        Diary.made.append(self)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.seeds.append(seed)
        self.left, self.end = self.np_random.integers(*self.lengths, endpoint=True), self.np_random.integers(3)
        self.obs[:] = self.np_random.random(2)
        return self.obs, {}

    def step(self, action):
        assert self.action_space.contains(action) and self.left > 0
        before, reward = self.obs.astype(np.float32).tolist(), self.np_random.normal()
        self.left -= 1
        self.obs[:] = self.np_random.random(2)
        ends = self.left == 0
        terminated, truncated = bool(ends and self.end < 2), bool(ends and self.end > 0)
        self.steps.append((before, action - 5, reward, self.obs.astype(np.float32).tolist(), terminated, truncated))
        return self.obs, np.array(reward), int(terminated), int(truncated), {}  # as some do


gym.register("PPODiary-v0", entry_point=Diary, disable_env_checker=True)
gym.register("PPOFiveSteps-v0", entry_point=Diary, kwargs={"lengths": (5, 5)}, disable_env_checker=True)

FEW = dict(
    env_id="PPODiary-v0", total_timesteps=600, num_envs=3, num_steps=20, num_minibatches=2, update_epochs=2,
    eval_episodes=2, checkpoint_frequency=0, learning_rate=1e-2,
)  # fmt: skip


def train(tmp_path, **settings):
    """Runs in this process; returns the final checkpoint and the scalars as {tag: [(step, value), ...]}."""
    Diary.made.clear()
    run_dir = script.train(script.Args(**FEW | settings, runs_dir=str(tmp_path)))
    count = (FEW | settings)["num_envs"]
    for i, env in enumerate(Diary.made[count:]):  # after each checkpoint new environments, which go on with the diaries
        Diary.made[i % count].steps += env.steps
        Diary.made[i % count].seeds += env.seeds
    del Diary.made[count:]
    state = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    scalars = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    return state, scalars


def recorded(monkeypatch, name):
    """Every call of a function of the script: its arguments and its result."""
    calls, function = [], getattr(script, name)

    def recording(*arguments, **keywords):
        calls.append((arguments, function(*arguments, **keywords)))
        return calls[-1][1]

    monkeypatch.setattr(script, name, recording)
    return calls


@pytest.mark.parametrize("num_envs, num_steps", [(3, 20), (1, 7), (4, 2)])
def test_rollouts_are_what_really_happened(tmp_path, monkeypatch, num_envs, num_steps):
    """Also where an episode ends: its last observation, not the next one's first, and how it ended."""
    calls = recorded(monkeypatch, "make_batch")
    state, _ = train(tmp_path, num_envs=num_envs, num_steps=num_steps)
    rounds = math.ceil(600 / (num_envs * num_steps))
    assert len(calls) == rounds and state["global_step"] == rounds * num_envs * num_steps
    for number, ((_, obs, actions, rewards, next_obs, terminated, truncated, _), _) in enumerate(calls):
        for i in range(num_envs):
            steps = Diary.made[i].steps[number * num_steps : (number + 1) * num_steps]
            columns = (obs, actions, rewards, next_obs, terminated, truncated)
            for column, expected in zip(columns, zip(*steps)):
                np.testing.assert_allclose(column[:, i], np.array(expected, dtype=np.float32), rtol=1e-6)


def test_a_batch_is_every_step_with_its_advantage(tmp_path, monkeypatch):
    batches, advantages = recorded(monkeypatch, "make_batch"), recorded(monkeypatch, "gae")
    train(tmp_path, total_timesteps=60, gamma=0.7, gae_lambda=0.6)
    (agent, obs, actions, rewards, next_obs, terminated, truncated, _), batch = batches[0]
    inputs, found = advantages[0]
    assert inputs[0] is rewards and inputs[3] is terminated and inputs[4] is truncated and inputs[5:] == (0.7, 0.6)
    torch.manual_seed(1)
    at_start = script.Agent(2, 3, norm_obs=False)  # as it was when the rollout was played
    logits, values = at_start(obs)
    torch.testing.assert_close(inputs[1], values.detach())
    torch.testing.assert_close(inputs[2], at_start(next_obs)[1].detach())
    log_probs = logits.log_softmax(-1).gather(-1, actions[..., None]).squeeze(-1)
    for part, expected in zip(batch, (obs, actions, log_probs, values, found, found + values)):
        torch.testing.assert_close(part, expected.detach().flatten(0, 1))
        assert not part.requires_grad


@pytest.mark.parametrize("anneal_lr", [True, False])
def test_the_learning_rate_falls_in_a_line_or_stays(tmp_path, monkeypatch, anneal_lr):
    rates = []
    monkeypatch.setattr(script, "learn", lambda agent, optimizer, batch, args: rates.append(
        (type(optimizer), optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["eps"])) or {})  # fmt: skip
    _, scalars = train(tmp_path, anneal_lr=anneal_lr)
    expected = [1e-2 * (1 - k / 10) if anneal_lr else 1e-2 for k in range(10)]
    assert rates == [(torch.optim.Adam, pytest.approx(rate), 1e-5) for rate in expected]
    assert [value for _, value in scalars["charts/learning_rate"]] == pytest.approx(expected)


def test_every_episode_is_logged_at_the_step_that_ended_it(tmp_path):
    _, scalars = train(tmp_path)
    steps = [step for steps in zip(*(env.steps[:200] for env in Diary.made[:3])) for step in steps]
    returns, lengths, expected = [0.0] * 3, [0] * 3, []
    for number, (_, _, reward, _, terminated, truncated) in enumerate(steps, 1):
        i = (number - 1) % 3
        returns[i], lengths[i] = returns[i] + reward, lengths[i] + 1
        if terminated or truncated:
            expected.append((number, returns[i], lengths[i]))
            returns[i], lengths[i] = 0.0, 0
    assert len(expected) > 100
    assert scalars["charts/episodic_return"] == [(step, pytest.approx(value, abs=1e-5)) for step, value, _ in expected]
    assert scalars["charts/episodic_length"] == [(step, length) for step, _, length in expected]


def test_environments_begin_anew_at_a_checkpoint_and_only_there_from_a_seed(tmp_path):
    """Rollouts of 8 steps in 2 environments; a checkpoint every 32 steps, with three whole episodes of 5 and a cut."""
    _, scalars = train(
        tmp_path, env_id="PPOFiveSteps-v0", total_timesteps=96, checkpoint_frequency=32, seed=3, num_envs=2, num_steps=8
    )
    seeds = [script.episode_seeds(3, (script.TRAINING, step), 2) for step in (0, 32, 64)]
    evaluation = script.episode_seeds(3, (script.EVALUATION,), 2)
    for i in range(2):
        assert Diary.made[i].seeds == [s for pair in seeds for s in (pair[i], None, None, None)] + [evaluation[i]]
    assert [step for step, _ in scalars["charts/episodic_return"]] == [
        start + s for start in (0, 32, 64) for s in (9, 10, 19, 20, 29, 30)
    ]
    assert {length for _, length in scalars["charts/episodic_length"]} == {5}


@pytest.mark.parametrize("norm_obs", [True, False])
def test_observations_are_counted_in_training_and_frozen_in_evaluation(tmp_path, norm_obs):
    state, _ = train(tmp_path, norm_obs=norm_obs, eval_episodes=30)
    seen = np.array([step[0] for env in Diary.made[:3] for step in env.steps[:200]])
    if norm_obs:
        assert state["agent"]["obs_statistics.count"] == 600
        np.testing.assert_allclose(state["agent"]["obs_statistics.mean"], seen.mean(0), rtol=1e-4)
        np.testing.assert_allclose(state["agent"]["obs_statistics.variance"], seen.var(0), rtol=1e-3)
    else:
        assert not any("obs_statistics" in key for key in state["agent"])


@pytest.mark.parametrize("norm_reward", [True, False])
def test_rewards_are_scaled_by_all_sums_so_far_or_left_as_they_are(tmp_path, monkeypatch, norm_reward):
    """The sums of rewards go on across rollouts, and begin anew at every end of an episode, and at a checkpoint."""
    calls = recorded(monkeypatch, "make_batch")
    state, scalars = train(tmp_path, norm_reward=norm_reward, gamma=0.9, checkpoint_frequency=180)
    sums = []
    for env in Diary.made[:3]:
        total = 0.0
        for t, (_, _, reward, _, terminated, truncated) in enumerate(env.steps[:200]):
            total = reward + 0.9 * (0.0 if t % 60 == 0 else total)
            sums.append(total)
            total = 0.0 if terminated or truncated else total
    rewards = np.array([[step[2] for step in env.steps[:200]] for env in Diary.made[:3]])
    last = calls[-1][0][3].T.numpy()
    if norm_reward:
        np.testing.assert_allclose(state["reward_statistics"]["variance"], np.var(sums), rtol=1e-3)
        np.testing.assert_allclose(last, rewards[:, -20:] / np.std(sums), rtol=1e-3)
    else:
        np.testing.assert_allclose(last, rewards[:, -20:], rtol=1e-6)
    shown = [value for _, value in scalars["charts/episodic_return"]]  # the environment's own, in any case
    assert max(map(abs, shown)) > 2


def test_statistics_stay_as_they_are_from_the_first_step_to_the_last_update(tmp_path, monkeypatch):
    """Else the ratio of pi to pi_old would not start at 1."""
    counts = []
    for name in ("act", "make_batch", "update"):
        def noting(agent, *others, name=name, function=getattr(script, name), **keywords):
            counts.append((name, agent.obs_statistics.count.item()))
            return function(agent, *others, **keywords)

        monkeypatch.setattr(script, name, noting)
    train(tmp_path, norm_obs=True)
    expected = [(name, 60 * k) for k in range(10) for name in ["act"] * 20 + ["make_batch"] + ["update"] * 4]
    assert counts[: len(expected)] == expected


def test_evaluation_plays_each_seed_once_and_tells_the_return_from_the_length(tmp_path):
    Diary.made.clear()
    args = script.Args(**FEW | {"num_envs": 3, "eval_episodes": 7, "seed": 4})
    found = script.evaluate(args, script.make_envs(args), script.Agent(2, 3, norm_obs=False), tmp_path)
    seeds = script.episode_seeds(4, (script.EVALUATION,), 7)
    assert [env.seeds for env in Diary.made] == [seeds[0::3], seeds[1::3], seeds[2::3]]
    rewards = [step[2] for env in Diary.made for step in env.steps]
    assert found == pytest.approx((sum(rewards) / 7, len(rewards) / 7))


def test_in_evaluation_every_environment_gets_the_best_action_for_what_it_shows():
    """Also when others have ended, and wait."""
    Diary.made.clear()
    agent = script.Agent(2, 3, norm_obs=False)
    agent.actor = nn.Linear(2, 3)
    agent.actor.weight.data = torch.tensor([[1.0, -1], [-1, 1], [0, 0]])
    agent.actor.bias.data = torch.tensor([0.0, 0.0, 0.1])
    envs = script.make_envs(script.Args(**FEW | {"num_envs": 5}))
    episodes = script.play_greedily(envs, agent, [1, 2, 3, 4, 5])
    assert len(set(map(len, episodes))) > 1
    steps = [step for env in Diary.made for step in env.steps]
    best = script.act(agent, torch.tensor([step[0] for step in steps]), greedy=True).tolist()
    assert [step[1] for step in steps] == best and len(set(best)) > 1


def test_every_second_step_of_the_first_episode_is_drawn_until_its_end_or_the_limit(monkeypatch):
    agent, drawn = script.Agent(2, 3, norm_obs=False), []
    envs = [gym.make("PPODiary-v0").unwrapped for _ in range(2)]
    envs[0].lengths, envs[1].lengths = (3, 3), (6, 6)
    envs[0].render = lambda: envs[0].left
    for limit, expected in ((1000, [3, 1]), (2, [3])):
        monkeypatch.setattr(script, "MAX_FRAMES", limit)
        drawn.clear()
        script.play_greedily(envs, agent, [1, 2], drawn)
        assert drawn == expected


def test_an_environment_without_a_time_limit_gets_one(monkeypatch):
    gym.register("PPOEndless-v0", entry_point=Diary, kwargs={"lengths": (10**9, 10**9)}, disable_env_checker=True)
    monkeypatch.setattr(script, "MAX_EPISODE_STEPS", 30)
    env = script.make_envs(script.Args(**FEW | {"env_id": "PPOEndless-v0"}))[0]
    env.reset(seed=1)
    assert [tuple(map(bool, env.step(5)[2:4])) for _ in range(30)] == [(False, False)] * 29 + [(False, True)]


def test_speed_is_of_this_process_and_explained_variance_of_the_returns(tmp_path, monkeypatch):
    """Resumed at step 300. The clock goes on by a second with each look at it, one after each rollout of 60 steps."""
    train(tmp_path, total_timesteps=300)
    (run_dir,), clock, learned = tmp_path.iterdir(), iter(range(100)), recorded(monkeypatch, "learn")
    monkeypatch.setattr(script, "time", type("Clock", (), {"perf_counter": lambda: next(clock)}))
    _, scalars = train(tmp_path, resume=str(run_dir))
    assert [value for _, value in sorted(scalars["charts/SPS"])][5:] == [60] * 5
    expected = [1 - ((b.returns - b.values).var() / b.returns.var()).item() for (_, _, b, _), _ in learned]
    found = [value for _, value in sorted(scalars["losses/explained_variance"])][5:]
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-3)


@pytest.mark.slow
def test_every_setting_of_the_algorithm_changes_the_outcome(tmp_path):
    def outcome(**settings):
        state, _ = train(tmp_path, total_timesteps=240, **settings)
        return [state["agent"][key] for key in sorted(state["agent"]) if "statistics" not in key]

    plain = outcome()
    again = outcome()
    assert all(map(torch.equal, plain, again))
    for settings in (
        {"gae_lambda": 0.2}, {"gamma": 0.3}, {"norm_adv": False}, {"clip_vloss": True}, {"clip_coef": 0.01},
        {"ent_coef": 0.1}, {"vf_coef": 0.1}, {"max_grad_norm": 0.01}, {"target_kl": 1e-6}, {"norm_obs": True},
        {"norm_reward": True}, {"anneal_lr": False}, {"update_epochs": 3}, {"num_minibatches": 3}, {"seed": 2},
    ):  # fmt: skip
        assert not all(map(torch.equal, plain, outcome(**settings))), settings


class Explodes(gym.Env):
    """Shows infinity from the fourth episode of all on, three being the first. Clipped to 10 deviations it hurts nobody, but the mean of all there was."""

    observation_space, action_space = gym.spaces.Box(-np.inf, np.inf, (1,), np.float32), gym.spaces.Discrete(2)

    resets = 0

    def reset(self, *, seed=None, options=None):
        Explodes.resets, self.t = Explodes.resets + 1, 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.t += 1
        return np.full(1, np.inf if Explodes.resets > 3 else self.t, np.float32), 1.0, False, False, {}


gym.register("PPOExplodes-v0", entry_point=Explodes, disable_env_checker=True)


def test_statistics_that_are_not_finite_reach_no_checkpoint(tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        train(tmp_path, env_id="PPOExplodes-v0", norm_obs=True, total_timesteps=900, checkpoint_frequency=60)
    assert error.value.code == 1 and "finite" in capsys.readouterr().err
    (run_dir,) = tmp_path.iterdir()
    state = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    assert state["global_step"] > 0 and all(part.isfinite().all() for part in state["agent"].values())


class Pays(gym.Env):
    """One state, in which every step pays 1; episodes of three steps."""

    observation_space, action_space = gym.spaces.Box(-1, 1, (1,), np.float32), gym.spaces.Discrete(2)

    def __init__(self, truncates):
        self.truncates = truncates

    def reset(self, *, seed=None, options=None):
        self.t = 0
        return np.ones(1, np.float32), {}

    def step(self, action):
        self.t += 1
        return np.ones(1, np.float32), 1.0, self.t == 3 and not self.truncates, self.t == 3 and self.truncates, {}


gym.register("PPOTruncates-v0", entry_point=Pays, kwargs={"truncates": True}, disable_env_checker=True)
gym.register("PPOTerminates-v0", entry_point=Pays, kwargs={"truncates": False}, disable_env_checker=True)


@pytest.mark.parametrize("env_id, low, high", [("PPOTruncates-v0", 4.6, 5.2), ("PPOTerminates-v0", 1.5, 2.44)])
def test_a_time_limit_is_not_the_end_of_the_world(tmp_path, env_id, low, high):
    """Truncated for ever, a reward of 1 is worth 1 / (1 - 0.8) = 5. If every third step terminates, the three steps,
    which look alike, are worth 1, 1.8 and 2.44."""
    state, _ = train(
        tmp_path, env_id=env_id, gamma=0.8, gae_lambda=0.9, total_timesteps=6000, update_epochs=10, vf_coef=1.0,
        max_grad_norm=10.0,
    )  # fmt: skip
    agent = script.Agent(1, 2, norm_obs=False)
    agent.load_state_dict(state["agent"])
    assert low < agent(torch.ones(1, 1))[1].item() < high
