"""The mathematics of ppo_cartpole.py: by hand, against brute force, against finite differences.

What the other PPO scripts have word for word is tested here for all.
"""

import math

import numpy as np
import ppo_cartpole as script
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
    "--total-timesteps 2000 --num-envs 4 --num-minibatches 2 --update-epochs 2 --norm-obs "
    "--norm-reward --checkpoint-frequency 500 --eval-frequency 700 --eval-episodes 5"
)
OWN = "discrete"
OWN_FLAGS = "--total-timesteps 10000"
WRONG_SPACES = ["Pendulum-v1"]
DIVERGES = "--learning-rate 1e30"
BAD = [
    ("--num-steps 0", "--num-steps"),
    ("--num-envs 1 --num-steps 5 --num-minibatches 3", "--num-minibatches"),
    ("--gae-lambda 1.01", "--gae-lambda"),
    ("--vf-coef nan", "--vf-coef"),
]
LEARNS = [("--seed 1", 475)]  # what Gymnasium calls solved
# What others published, by the record's name after `<script>__`: shown beside our results.
PUBLISHED = {
    "CartPole-v1": "CleanRL 490.0 (500k), Zoo 500 (100k)",
    "Acrobot-v1": "CleanRL -86.4 (500k), Zoo -73.5 (1M)",
    "MountainCar-v0": "CleanRL -200.0 (500k), Zoo -110.4 (1M)",
}
# How speed.py measures the script, and beside what; its first lines explain the form.
SPEED = {
    "steps": 60_000,
    "first": 5_000,
    "peers": {
        "CleanRL's ppo.py": {"flags": "--no-clip-vloss", "equal": "four environments, compiled"},
        "Stable-Baselines3's PPO": {
            "env_id": "CartPole-v1",
            "num_envs": 4,
            "settings": {
                "n_steps": 128,
                "batch_size": 128,
                "n_epochs": 4,
                "learning_rate": 2.5e-4,
                "ent_coef": 0.01,
                "device": "cpu",
            },
            "equal": "four environments, compiled",
        },
        "SBX's PPO": {
            "env_id": "CartPole-v1",
            "num_envs": 4,
            "settings": {
                "n_steps": 128,
                "batch_size": 128,
                "n_epochs": 4,
                "learning_rate": 2.5e-4,
                "ent_coef": 0.01,
            },
            "equal": "four environments, compiled",
        },
    },
    "flags": "--num-steps 128 --num-minibatches 4 --update-epochs 4 --gamma 0.99 "
    "--gae-lambda 0.95 --ent-coef 0.01 --learning-rate 2.5e-4",
    "variants": {
        "four environments, compiled": "--num-envs 4 --compile",
        "four environments": "--num-envs 4",
    },
    "floors": {"floor": "1024 5120 --num-envs 4"},
}

# ---- gae -----------------------------------------------------------------------------------------


def random_rollout(num_steps=30, num_envs=4):
    """Random rewards, values and ends; also steps that are both terminated and truncated."""
    generator = np.random.default_rng(0)
    rewards, values, last_values = generator.normal(size=(3, num_steps, num_envs))
    terminated, truncated = generator.random((2, num_steps, num_envs)) < 0.12
    next_values = np.concatenate([values[1:], last_values[:1]])
    ended = terminated | truncated
    next_values[ended] = last_values[ended]  # of the last observation, not of the next first one
    return rewards, values, next_values, terminated, truncated


@pytest.mark.parametrize("gamma", [0.0, 0.8, 1.0])
@pytest.mark.parametrize("lam", [0.0, 0.7, 1.0])
def test_gae_is_the_mean_of_all_n_step_estimates(gamma, lam):
    """The definition: (1 - lambda) * sum_n lambda^(n-1) * A^(n), and the rest to the longest.

    A^(n) = r_t + gamma r_{t+1} + ... + gamma^n V(s_{t+n}) - V(s_t), as far as the episode goes.
    """
    rewards, values, next_values, terminated, truncated = inputs = random_rollout()
    expected = np.zeros_like(rewards)
    for t, i in np.ndindex(rewards.shape):
        ends = np.flatnonzero(terminated[t:, i] | truncated[t:, i])
        longest = ends[0] + 1 if len(ends) else len(rewards) - t
        for n in range(1, longest + 1):
            last = t + n - 1
            total = sum(gamma**k * rewards[t + k, i] for k in range(n))
            total += 0 if terminated[last, i] else gamma**n * next_values[last, i]
            weight = lam ** (n - 1) * (1 - lam if n < longest else 1)
            expected[t, i] += weight * (total - values[t, i])
    found = script.gae(*map(torch.from_numpy, inputs), gamma, lam)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_gae_by_hand():
    """gamma and lambda 0.5. Step 1 is truncated, step 3 terminated, step 4 the last one."""
    rewards, values, next_values = torch.tensor(
        [[1.0, 2, 3, 4, 5], [0, 4, 8, 0, 2], [4, 6, 0, 100, 8]]
    )[..., None]
    terminated, truncated = torch.zeros(2, 5, 1, dtype=torch.bool)
    terminated[3], truncated[1] = True, True
    deltas = [1 + 2 - 0, 2 + 3 - 4, 3 + 0 - 8, 4 - 0, 5 + 4 - 2]
    expected = [deltas[0] + 0.25 * deltas[1], deltas[1], deltas[2] + 0.25 * deltas[3], *deltas[3:]]
    found = script.gae(rewards, values, next_values, terminated, truncated, 0.5, 0.5)
    assert found.squeeze(1).tolist() == expected


# ---- The loss and its update ---------------------------------------------------------------------


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
    """The second of two rows, of which the first has no advantage: half of the numbers above."""
    ratio = torch.tensor([1.0, ratio], requires_grad=True)
    found = script.clipped_policy_loss(ratio, torch.tensor([0.0, advantage]), 0.2)
    found.backward()
    assert found.item() == pytest.approx(loss / 2)
    assert ratio.grad.tolist() == pytest.approx([0, gradient / 2])


class Table(nn.Module):
    """Logits and a value for each state. An observation is a state, one-hot."""

    def __init__(self, logits, values):
        super().__init__()
        self.numbers = nn.Parameter(torch.cat([logits, values[:, None]], 1))

    def forward(self, obs):
        return self.actor(obs), obs @ self.numbers[:, -1]

    def actor(self, obs):
        return obs @ self.numbers[:, :-1]

    def normalize(self, obs):
        return obs


def example():
    """A table of 3 states and 4 actions, and 12 steps by a policy that was somewhat different."""
    torch.manual_seed(0)
    table = Table(torch.randn(3, 4).double(), torch.randn(3).double())
    states, actions = torch.randint(3, (12,)), torch.randint(4, (12,))
    now = table.numbers[states, :-1].log_softmax(1)[range(12), actions].detach()
    noise = torch.randn(3, 12).double()
    obs = torch.eye(3).double()[states]
    batch = script.Batch(obs, actions, now + 0.3 * noise[0], noise[1], noise[2])
    return table, states.numpy(), batch


def losses_in_numpy(numbers, states, batch, args):
    """The metrics, and the whole loss, once more from the equations, row by row."""
    advantages, rows = batch.advantages.numpy(), []
    if args.norm_adv:
        advantages = (advantages - np.mean(advantages)) / np.std(advantages, ddof=1)
    for b, s in enumerate(states):
        pi = np.exp(numbers[s, :-1]) / np.exp(numbers[s, :-1]).sum()
        ratio = pi[batch.actions[b]] / math.exp(batch.log_probs[b])
        bounded = min(max(ratio, 1 - args.clip_coef), 1 + args.clip_coef)
        rows.append({
            "losses/policy_loss": -min(ratio * advantages[b], bounded * advantages[b]),
            "losses/value_loss": (numbers[s, -1] - batch.returns[b].item()) ** 2 / 2,
            "losses/entropy": -(pi * np.log(pi)).sum(),
            "losses/approx_kl": ratio - 1 - math.log(ratio),
            "losses/clipfrac": float(ratio != bounded),
        })  # fmt: skip
    means = {tag: np.mean([row[tag] for row in rows]) for tag in rows[0]}
    policy_loss, value_loss, entropy, *_ = means.values()
    return means, policy_loss + args.vf_coef * value_loss - args.ent_coef * entropy


@pytest.mark.parametrize("flags", [
    {}, {"norm_adv": False}, {"ent_coef": 0.5}, {"vf_coef": 2.0}, {"clip_coef": 0.1},
    {"norm_adv": False, "ent_coef": 0.1, "clip_coef": 0.4, "vf_coef": 0.0},
])  # fmt: skip
def test_update_goes_down_the_gradient_of_the_papers_loss(flags):
    args = script.Args(**{"max_grad_norm": 1e9, "ent_coef": 0.01} | flags)
    table, states, batch = example()
    before, h = table.numbers.detach().numpy().copy(), 1e-6
    gradient = np.zeros_like(before)
    for place in np.ndindex(before.shape):
        losses = []
        for change in (h, -h):
            changed = before.copy()
            changed[place] += change
            losses.append(losses_in_numpy(changed, states, batch, args)[1])
        gradient[place] = (losses[0] - losses[1]) / (2 * h)
    table.numbers.grad = torch.ones_like(table.numbers)  # a gradient that is left over is no matter
    metrics = script.update(table, torch.optim.SGD(table.parameters(), lr=0.1), batch, args)
    np.testing.assert_allclose(table.numbers.detach(), before - 0.1 * gradient, atol=1e-7)
    expected, _ = losses_in_numpy(before, states, batch, args)
    assert 0 < expected["losses/clipfrac"] < 1
    found = {tag: value.item() for tag, value in metrics.items()}
    assert found == pytest.approx(expected, rel=1e-6)
    assert not any(value.requires_grad for value in metrics.values())


def test_the_gradient_of_all_weights_is_clipped_as_one_vector():
    moves = []
    for limit in (1e9, 0.01):
        torch.manual_seed(0)
        agent = script.Agent(2, 3, norm_obs=False)
        before = nn.utils.parameters_to_vector(agent.parameters()).detach()
        log_probs = torch.full((8,), -1.1)
        batch = script.Batch(torch.randn(8, 2), torch.arange(8) % 3, log_probs, *torch.randn(2, 8))
        optimizer = torch.optim.SGD(agent.parameters(), lr=1.0)
        script.update(agent, optimizer, batch, script.Args(max_grad_norm=limit))
        moves.append(nn.utils.parameters_to_vector(agent.parameters()).detach() - before)
    assert moves[0].norm() > 0.1
    expected = 0.01 * moves[0] / moves[0].norm()
    torch.testing.assert_close(moves[1], expected, rtol=1e-3, atol=1e-6)


def test_equal_advantages_have_no_deviation_to_divide_by():
    agent, ones = script.Agent(2, 3, norm_obs=False), torch.ones(8)
    batch = script.Batch(torch.randn(8, 2), torch.arange(8) % 3, -ones, ones, ones)
    optimizer = torch.optim.SGD(agent.parameters(), lr=1.0)
    metrics = script.update(agent, optimizer, batch, script.Args(norm_adv=True))
    assert metrics["losses/policy_loss"].item() == 0
    assert all(weights.isfinite().all() for weights in agent.parameters())


def test_approx_kl_is_the_divergence_on_average():
    """Of the old policy from the new one: actions of the old one against the sum over all."""
    torch.manual_seed(0)
    old, new = torch.tensor([[0.1, 0.4, 0.5], [0.2, 0.35, 0.45]]).double()
    table = Table(new.log()[None], torch.zeros(1).double())
    actions = torch.multinomial(old, 200_000, replacement=True)
    zeros = torch.zeros(200_000).double()
    batch = script.Batch(torch.ones(200_000, 1).double(), actions, old.log()[actions], zeros, zeros)
    optimizer = torch.optim.SGD(table.parameters(), lr=0.0)
    found = script.update(table, optimizer, batch, script.Args())["losses/approx_kl"].item()
    assert found == pytest.approx((old * (old / new).log()).sum().item(), rel=0.03)


@pytest.mark.parametrize("size, parts, epochs", [(12, 4, 3), (13, 4, 2), (5, 1, 2)])
def test_every_epoch_learns_from_every_step_once_in_a_new_order(monkeypatch, size, parts, epochs):
    seen = []

    def update(agent, optimizer, batch, args):
        assert all(torch.equal(part, batch.obs) for part in batch)  # rows stay together
        seen.append(batch.obs.int().tolist())
        return {"losses/value_loss": torch.tensor(float(len(seen)))}

    monkeypatch.setattr(script, "update", update)
    torch.manual_seed(0)
    args = script.Args(num_minibatches=parts, update_epochs=epochs)
    batch = script.Batch(*[torch.arange(size).double()] * 5)
    metrics = script.learn(None, None, batch, args)
    assert len(seen) == parts * epochs and max(map(len, seen)) - min(map(len, seen)) <= 1
    orders = [sum(seen[i : i + parts], []) for i in range(0, len(seen), parts)]
    assert all(sorted(order) == list(range(size)) for order in orders)
    assert len({tuple(order) for order in orders} | {tuple(range(size))}) == epochs + 1
    assert metrics["losses/value_loss"].item() == pytest.approx((len(seen) + 1) / 2)  # their mean


def test_no_minibatch_has_a_single_step():
    """One has no deviation. Of 5 steps, two minibatches have 2 and 3."""
    script.Args(num_envs=1, num_steps=5, num_minibatches=2)
    with pytest.raises(ValueError, match="--num-minibatches"):
        script.Args(num_envs=1, num_steps=5, num_minibatches=3)


def test_explained_variance_by_hand():
    returns = torch.tensor([1.0, 2.0, 3.0, 4.0])
    for values, expected in ((returns, 1), (returns + 5, 1), (torch.zeros(4), 0), (-returns, -3)):
        assert script.explained_variance(values, returns).item() == pytest.approx(expected)
    assert script.explained_variance(torch.ones(4), torch.ones(4)).isfinite()


# ---- The policy ----------------------------------------------------------------------------------


def test_log_probability_and_entropy_against_pytorchs_own():
    torch.manual_seed(0)
    logits, actions = 3 * torch.randn(5, 4, 3).double(), torch.randint(0, 3, (5, 4))
    log_probs, entropies = script.log_prob_and_entropy(logits, actions)
    torch.testing.assert_close(log_probs, Categorical(logits=logits).log_prob(actions))
    torch.testing.assert_close(entropies, Categorical(logits=logits).entropy())
    certain = script.log_prob_and_entropy(torch.tensor([0.0, 200.0]), torch.tensor(0))
    assert [number.item() for number in certain] == [-200, 0]  # and not 0 times infinity


def test_actions_are_as_frequent_as_the_policy_says():
    """Each environment has its own, independent of the others."""
    torch.manual_seed(0)
    probabilities = torch.tensor([[0.1, 0.2, 0.7], [0.5, 0.25, 0.25]])
    logits, obs = probabilities.log().numpy(), np.tile(np.eye(2, dtype=np.float32), (20_000, 1))
    actions = script.act(lambda obs: obs @ logits, obs, script.gumbel_noise(40_000, 3))
    actions = actions.reshape(20_000, 2)
    for i in range(2):
        shares = np.bincount(actions[:, i], minlength=3) / 20_000
        np.testing.assert_allclose(shares, probabilities[i], atol=0.015)
    both = (actions[:, 0] == 2) & (actions[:, 1] == 0)
    assert both.mean() == pytest.approx(0.7 * 0.5, abs=0.015)
    assert script.act(lambda obs: obs @ logits, obs[:200]).tolist() == [2, 0] * 100


@pytest.mark.parametrize("norm_obs", [True, False])
def test_the_actor_is_the_agents_also_after_an_update(norm_obs):
    """And the evaluation is greedy."""
    torch.manual_seed(0)
    agent, obs = script.Agent(4, 3, norm_obs), torch.randn(50, 4)
    actor = script.Actor(agent)
    for _ in range(2):
        logits = agent(obs)[0].detach()
        np.testing.assert_allclose(actor(obs.numpy()), logits, rtol=1e-4, atol=1e-6)
        found = script.play(script.Args(), agent, obs.numpy())
        assert found.tolist() == logits.argmax(1).tolist() and len(set(found)) > 1
        with torch.no_grad():
            for weights in agent.parameters():
                weights += 0.3 * torch.randn_like(weights)


def test_the_network_starts_orthogonal_and_the_policy_nearly_uniform():
    agent = script.Agent(4, 3, norm_obs=False)
    for network, last in ((agent.actor, 0.01), (agent.critic, 1.0)):
        linears = [module for module in network if isinstance(module, nn.Linear)]
        for linear, gain in zip(linears, (math.sqrt(2), math.sqrt(2), last)):
            rows = min((linear.weight, linear.weight.T), key=len)
            expected = gain**2 * torch.eye(len(rows))
            torch.testing.assert_close(rows @ rows.T, expected, atol=1e-5, rtol=0)
            assert not linear.bias.any()
    logits, values = agent(torch.randn(7, 5, 4))
    assert (logits.softmax(-1) - 1 / 3).abs().max() < 0.01 and values.shape == (7, 5)
    shared = set(map(id, agent.actor.parameters())) & set(map(id, agent.critic.parameters()))
    assert not shared


# ---- Running statistics --------------------------------------------------------------------------


@pytest.mark.parametrize("pieces", [[100], [1] * 100, [3, 50, 1, 46]])
def test_running_statistics_are_numpys_on_all_rows_together(pieces):
    rows = np.random.default_rng(0).normal([3, -100, 0], [1, 20, 0.01], (100, 3)).astype(np.float32)
    statistics = script.RunningStatistics(3)
    for piece in np.split(rows, np.cumsum(pieces)[:-1]):
        statistics.update(torch.from_numpy(piece))
    np.testing.assert_allclose(statistics.mean, rows.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(statistics.variance, rows.var(0), rtol=1e-3)
    assert statistics.count == 100


def test_acting_and_learning_see_normalised_observations():
    """Also the agent that comes back from a checkpoint."""
    agent, other = script.Agent(2, 3, norm_obs=True), script.Agent(2, 3, norm_obs=True)
    agent.obs_statistics.update(torch.tensor([[1.0, 10.0], [3.0, 30.0]]))  # 2 ± 1 and 20 ± 10
    other.load_state_dict(agent.state_dict())
    obs = torch.tensor([[3.0, 40], [2, 20], [1e6, -1e6]])
    normalised = torch.tensor([[1.0, 2], [0, 0], [10, -10]])
    for ours in (agent, other):
        logits, values = ours(obs)
        torch.testing.assert_close(logits, ours.actor(normalised))
        torch.testing.assert_close(values, ours.critic(normalised).squeeze(-1))
        assert script.act(script.Actor(ours), obs.numpy()).tolist() == logits.argmax(-1).tolist()


def test_rewards_are_divided_by_the_deviation_of_the_sums_so_far():
    """gamma 0.5. Sums begin anew after an end, and go on in the next rollout and after a pause."""
    scaler = script.RewardScaler(2, 0.5)
    rewards = torch.tensor([[1.0, 8.0], [1.0, 0.0], [1.0, 4.0]])
    ended = torch.tensor([[False, False], [True, False], [False, False]])
    sums = [1.0, 8.0, 1.5, 4.0, 1.0, 6.0]
    torch.testing.assert_close(scaler(rewards, ended), rewards / np.std(sums))
    resumed = script.RewardScaler(2, 0.5)
    resumed.load_state_dict(scaler.state_dict())
    for each in (scaler, resumed):
        more, ended = torch.tensor([[2.0, 1.0]]), torch.tensor([[False, True]])
        torch.testing.assert_close(each(more, ended), more / np.std([*sums, 2.5, 4.0]))
        torch.testing.assert_close(each(more, ended), more / np.std([*sums, 2.5, 4.0, 3.25, 1.0]))


def test_scaled_rewards_are_not_shifted_but_clipped():
    rewards = torch.zeros(1000, 1)
    rewards[0], rewards[1] = 1000.0, -1000.0
    scaled = script.RewardScaler(1, 0.0)(rewards, torch.zeros(1000, 1).bool())
    assert scaled[:3, 0].tolist() == [10, -10, 0]


# ---- The loop ------------------------------------------------------------------------------------

FEW = dict(
    env_id="Diary-v0", total_timesteps=600, num_envs=3, num_steps=20, num_minibatches=2,
    update_epochs=2, eval_episodes=2, learning_rate=1e-2, norm_adv=False,
)  # fmt: skip


@pytest.mark.parametrize("num_envs, num_steps", [(3, 20), (1, 7)])
def test_rollouts_are_what_really_happened(tmp_path, monkeypatch, num_envs, num_steps):
    """Also where an episode ends: its last observation, not the next one's first."""
    calls = recorded(monkeypatch, script, "make_batch")
    flags = FEW | {"num_envs": num_envs, "num_steps": num_steps}
    state, points = train(script, tmp_path, **flags)
    rounds, steps = math.ceil(600 / (num_envs * num_steps)), side_by_side(num_envs)
    assert len(calls) == rounds and len(steps) == rounds * num_envs * num_steps
    assert state["envs"]["steps"] == len(steps)
    for number, ((_, *rollout, _), _) in enumerate(calls):
        for i in range(num_envs):
            happened = Diary.made[i].steps[number * num_steps : (number + 1) * num_steps]
            for column, expected in zip(rollout, zip(*happened), strict=True):
                np.testing.assert_allclose(column[:, i], np.array(expected, np.float32), rtol=1e-6)
    check_episodes(points, steps)


def test_every_environment_gets_the_action_for_what_it_shows(tmp_path, monkeypatch):
    def choose(obs):
        return (obs[:, 0] * 1000).astype(int) % 3

    monkeypatch.setattr(script, "act", lambda actor, obs, noise=0.0: choose(obs))
    train(script, tmp_path, **FEW)
    seen, chosen, *_ = zip(*(step for env in Diary.made for step in env.steps))
    assert list(chosen) == choose(np.array(seen, np.float32)).tolist() and len(set(chosen)) == 3


def test_a_batch_is_every_step_with_its_advantage(tmp_path, monkeypatch):
    """With pi_old and V_old of the agent that played: the first one is made from the seed."""
    rollouts = recorded(monkeypatch, script, "make_batch")
    learned = recorded(monkeypatch, script, "learn")
    train(script, tmp_path, **FEW | {"seed": 3, "gamma": 0.7, "gae_lambda": 0.6})
    _, obs, actions, rewards, next_obs, terminated, truncated, _ = rollouts[0][0]
    torch.manual_seed(3)
    agent = script.Agent(2, 3, norm_obs=False)
    logits, values = agent(obs)
    log_probs = Categorical(logits=logits).log_prob(actions)
    ends = terminated, truncated
    advantages = script.gae(rewards, values, agent(next_obs)[1], *ends, 0.7, 0.6)
    columns = obs, actions, log_probs, advantages, advantages + values
    _, _, batch, _ = learned[0][0]
    for part, expected in zip(batch, columns, strict=True):
        torch.testing.assert_close(part, expected.detach().flatten(0, 1))
        assert not part.requires_grad


@pytest.mark.parametrize("anneal_lr", [True, False])
def test_metrics_and_learning_rate_are_logged(tmp_path, monkeypatch, anneal_lr):
    check_ppo_log(script, tmp_path, monkeypatch, **FEW, anneal_lr=anneal_lr)


def test_statistics_change_only_between_updates_and_the_next_rollout(tmp_path, monkeypatch):
    check_ppo_statistics(script, tmp_path, monkeypatch, **FEW, norm_obs=True)


@pytest.mark.parametrize("norm_reward", [True, False])
def test_rewards_are_scaled_for_learning_only(tmp_path, monkeypatch, norm_reward):
    check_ppo_rewards(script, tmp_path, monkeypatch, **FEW, norm_reward=norm_reward, gamma=0.9)


@pytest.mark.parametrize("where", ["loss", "weight"])
def test_a_run_that_diverges_stops_and_is_not_saved(tmp_path, monkeypatch, where):
    count, update = 0, script.update

    def spoil(agent, *others):
        nonlocal count
        count += 1
        metrics = update(agent, *others)
        if where == "loss" and count == 2:  # of the four of the first rollout
            return metrics | {"losses/value_loss": torch.tensor(math.nan)}
        if where == "weight" and count == 4:
            agent.critic[0].weight.data[0, 0] = math.inf
        return metrics

    monkeypatch.setattr(script, "update", spoil)
    with pytest.raises(script.UsageError, match="not finite"):
        train(script, tmp_path, **FEW, checkpoint_frequency=60)
    (folder,) = tmp_path.iterdir()
    assert script.read_checkpoint(folder)["envs"]["steps"] == 0


@pytest.mark.parametrize("env_id, low, high", [
    ("Truncates-v0", 4.9, 5.1), ("Terminates-v0", 1.7, 1.9)
])  # fmt: skip
def test_a_time_limit_is_not_the_end_of_the_world(tmp_path, env_id, low, high):
    """Truncated for ever, a reward of 1 is worth 1 / (1 - 0.8) = 5.

    If every third step terminates, the three, which look alike, are worth 2.44, 1.8 and 1.
    """
    flags = {"env_id": env_id, "gamma": 0.8, "gae_lambda": 0.9, "total_timesteps": 3000}
    flags |= {"update_epochs": 20, "num_minibatches": 1, "vf_coef": 1.0, "max_grad_norm": 10.0}
    state, _ = train(script, tmp_path, **FEW | flags)
    agent = script.Agent(1, 2, norm_obs=False)
    agent.load_state_dict(state["network"])
    assert low < agent(torch.ones(1, 1))[1].item() < high


def test_every_setting_of_the_algorithm_changes_the_outcome(tmp_path):
    def outcome(**settings):
        state, _ = train(script, tmp_path, **FEW | {"total_timesteps": 240} | settings)
        weights = state["network"].items()
        return [value.tolist() for name, value in weights if "statistics" not in name]

    check_settings(script, outcome, {
        "seed": 2, "total_timesteps": 250, "num_envs": 4, "learning_rate": 5e-3, "anneal_lr": False,
        "num_steps": 25, "gamma": 0.3, "gae_lambda": 0.2, "num_minibatches": 3, "update_epochs": 3,
        "norm_adv": True, "clip_coef": 0.01, "ent_coef": 0.1, "vf_coef": 0.1, "max_grad_norm": 0.01,
        "norm_obs": True, "norm_reward": True,
    })  # fmt: skip
