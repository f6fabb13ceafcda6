"""The network of ppo_atari.py, its losses and updates, and a loop that learns what was played.

Its environments and its evaluation are tested in test_games.py.
"""

import math

import games
import numpy as np
import ppo_atari as script
import pytest
import torch
import torch.nn.functional as F
from conftest import curves, learned
from games import Diary, check_settings, number, numbers, recorded
from torch import nn
from torch.distributions import Categorical

# The description for the common tests: README.md explains it.
TINY = (
    "--total-timesteps 800 --num-envs 2 --num-steps 25 --num-minibatches 2 --update-epochs 1 "
    "--norm-obs --checkpoint-frequency 150 --eval-frequency 450 --eval-episodes 1 --num-threads 1 "
    "--precision float32"
)
OWN = "pixels"
OWN_FLAGS = (
    "--total-timesteps 3000 --learning-rate 1e-3 --num-steps 16 --gamma 0.5 --ent-coef 0 "
    "--num-threads 1"
)
WRONG_SPACES = ["CartPole-v1", "Pendulum-v1"]
DIVERGES = "--learning-rate 1e30"
BAD = [
    ("--num-steps 0", "--num-steps"),
    ("--num-steps 7 --num-envs 1", "--num-minibatches"),
    ("--clip-coef 0", "--clip-coef"),
    ("--precision float16", "--precision"),
]
CATCH = (
    "--env-id cases:Catch-v0 --total-timesteps 20000 --num-steps 32 --learning-rate 1e-3 "
    "--clip-coef 0.2 --eval-episodes 100 --num-threads 1"
)
LEARNS = [(f"{CATCH} --norm-obs --no-clip-vloss", 0.9)]  # from pixels; chance: -0.5
# What others published, by the record's name after `<script>__`: shown beside our results.
PUBLISHED = {
    "ALE-Pong-v5": "CleanRL 20.4, Zoo 21.0 (10M)",
    "ALE-Breakout-v5": "CleanRL 414.7, Zoo 398 (10M)",
    "ALE-Breakout-v5-8M": "CleanRL 414.7, Zoo 398 (10M)",
}
# How speed.py measures the script, and beside what; its first lines explain the form.
SPEED = {
    "steps": 12_000,
    "first": 1_024,
    "peers": {
        "CleanRL's ppo_atari.py": {"flags": "", "equal": "eight games, float32"},
        "Stable-Baselines3's PPO": {
            "env_id": "BreakoutNoFrameskip-v4",
            "num_envs": 8,
            "settings": {
                "n_steps": 128,
                "batch_size": 256,
                "n_epochs": 4,
                "learning_rate": 2.5e-4,
                "ent_coef": 0.01,
                "clip_range": 0.1,
                "clip_range_vf": 0.1,
            },
            "equal": "eight games, float32",
        },
    },
    "flags": "",  # by default the settings are those of CleanRL
    "variants": {
        "eight games, bfloat16, compiled": "--precision bfloat16 --compile",
        "eight games, bfloat16": "--precision bfloat16",
        "eight games, float32": "--precision float32",
    },
    "floors": {
        "floor, bfloat16": "1024 2048 --precision bfloat16",
        "floor, float32": "1024 2048 --precision float32",
    },
}

# ---- The network ---------------------------------------------------------------------------------


def frames(size=8):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (size, 4, 84, 84), dtype=torch.uint8, generator=generator)


def make_agent(num_actions=4, bfloat16=False, norm_obs=False):
    torch.manual_seed(0)
    return script.Agent(num_actions, bfloat16, norm_obs)


def test_the_network_is_that_of_the_paper_with_two_heads():
    agent, x = make_agent(18), frames() / 255
    weights = list(agent.parameters())
    weights[0] = F.pixel_shuffle(weights[0], 4)  # of blocks -> of pixels
    shapes = [(32, 4, 8, 8), (64, 32, 4, 4), (64, 64, 3, 3), (512, 3136), (18, 512), (1, 512)]
    assert [tuple(weight.shape) for weight in weights[::2]] == shapes
    assert all(bias.shape == weight.shape[:1] for weight, bias in zip(weights[::2], weights[1::2]))
    for i, stride in enumerate((4, 2, 1)):
        x = F.conv2d(x, weights[2 * i], weights[2 * i + 1], stride).relu()
    x = F.linear(x.flatten(1), weights[6], weights[7]).relu()
    logits, values = agent(frames())
    expected = F.linear(x, weights[8], weights[9]), F.linear(x, weights[10], weights[11])[:, 0]
    torch.testing.assert_close((logits, values), expected, rtol=1e-4, atol=1e-5)
    for output in logits.square(), values:  # both move what they share
        (gradient,) = torch.autograd.grad(output.sum(), agent.features[0].weight, retain_graph=True)
        assert gradient.any()


def test_it_starts_orthogonal_and_the_policy_nearly_uniform():
    agent = make_agent(6)
    weights = list(agent.parameters())
    for weight, bias, gain in zip(weights[::2], weights[1::2], [2**0.5] * 4 + [0.01, 1.0]):
        matrix = weight.flatten(1)
        matrix = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
        product = gain**2 * torch.eye(len(matrix))
        torch.testing.assert_close(matrix @ matrix.T, product, atol=1e-4, rtol=0)
        assert not bias.any()
    assert (agent(frames())[0].softmax(-1) - 1 / 6).abs().max() < 0.02


def test_bfloat16_is_float32_within_its_rounding():
    exact, rounded = make_agent(), make_agent(bfloat16=True)
    for ours, theirs in zip(rounded(frames()), exact(frames())):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.02)
    assert not torch.equal(rounded(frames())[1], exact(frames())[1])


def test_bfloat16_tells_actions_apart_that_differ_by_a_thousandth():
    agent, biases = make_agent(bfloat16=True), torch.tensor([2.0, 2.001, 2.002, 2.003])
    with torch.no_grad():
        agent.actor.weight.zero_(), agent.critic.weight.zero_()
        agent.actor.bias.copy_(biases), agent.critic.bias.fill_(2.001)
    logits, values = agent(frames(2))
    torch.testing.assert_close(logits[0], biases)
    torch.testing.assert_close(values, torch.full((2,), 2.001))


@pytest.mark.parametrize("bfloat16", [False, True])
def test_normalised_pixels_are_deviations_from_their_mean(bfloat16):
    """Pixel by pixel. One that never changes is 0; a rare change is clipped at 10 deviations."""
    agent, obs, seen = make_agent(4, bfloat16, norm_obs=True), frames(64), []
    obs[:, :, :20] = 87
    agent.obs_statistics.update(script.newest_frames(obs))
    mean, deviation = obs[:, -1].float().mean(0), obs[:, -1].float().std(0, correction=0)
    obs[0, :, 0, 0] = 88
    agent.features[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].float()))
    agent(obs)
    expected = ((obs - mean) / (deviation + 1e-4)).clamp(-10, 10)
    error = {"atol": 0.05, "rtol": 0.02} if bfloat16 else {"atol": 1e-3, "rtol": 1e-3}
    pixels = F.pixel_shuffle(seen[0], 4)
    torch.testing.assert_close(pixels, expected, **error)
    assert (pixels[0, :, 0, 0] == 10).all() and not pixels[1, :, :20].any()


def test_running_statistics_are_those_of_all_rows():
    rows = torch.randn(100, 5, generator=torch.Generator().manual_seed(0)) * 3 + 7
    statistics = script.RunningStatistics(5)
    for part in rows.tensor_split([1, 2, 40]):
        statistics.update(part)
    assert statistics.count == 100
    torch.testing.assert_close(statistics.mean, rows.mean(0))
    torch.testing.assert_close(statistics.variance, rows.var(0, correction=0))


# ---- Advantages and losses -----------------------------------------------------------------------


@pytest.mark.parametrize("gamma, lam", [(0.9, 0.7), (0.99, 0.95), (1, 0.5), (0.8, 0), (0.8, 1)])
def test_gae_is_the_mean_of_all_n_step_estimates(gamma, lam):
    """Not the recursion, but the definition: (1 - lambda) * sum over n of lambda^(n-1) * A^(n).

    The weight that is left over goes to the longest estimate, at the end of episode or rollout.
    """
    generator = np.random.default_rng(0)
    rewards, values, next_values = generator.normal(size=(3, 30, 4))
    terminated, truncated = generator.random((2, 30, 4)) < 0.12  # some are both
    ended, expected = terminated | truncated, np.zeros((30, 4))
    next_values[:-1] = np.where(ended[:-1], next_values[:-1], values[1:])
    for t, i in np.ndindex(30, 4):
        longest = next((k for k in range(t, 30) if ended[k, i]), 29) - t + 1
        for n in range(1, longest + 1):
            last = t + n - 1
            estimate = sum(gamma**k * rewards[t + k, i] for k in range(n)) - values[t, i]
            estimate += gamma**n * next_values[last, i] * (not terminated[last, i])
            expected[t, i] += lam ** (n - 1) * (1 - lam if n < longest else 1) * estimate
    inputs = map(torch.from_numpy, (rewards, values, next_values, terminated, truncated))
    np.testing.assert_allclose(script.gae(*inputs, gamma, lam), expected, atol=1e-6)


@pytest.mark.parametrize("ratio, advantage, loss, gradient", [
    (1.1, 2.0, -2.2, -2.0),
    (1.3, 2.0, -2.4, 0.0),  # likely enough by now
    (0.5, 2.0, -1.0, -2.0),  # went the wrong way: back
    (0.9, -2.0, 1.8, 2.0),
    (0.5, -2.0, 1.6, 0.0),  # unlikely enough by now
    (1.3, -2.0, 2.6, 2.0),  # went the wrong way: back
])  # fmt: skip
def test_the_clipped_policy_loss_by_hand(ratio, advantage, loss, gradient):
    ratio = torch.tensor([ratio, 1.0], requires_grad=True)
    found = script.clipped_policy_loss(ratio, torch.tensor([advantage, 0.0]), 0.2)
    found.backward()
    assert (2 * found.item(), 2 * ratio.grad[0].item()) == pytest.approx((loss, gradient))


@pytest.mark.parametrize("value, clip, loss, gradient", [
    (2.5, None, 0.125, -0.5),
    (1.1, 0.2, 1.9**2 / 2, -1.9),  # within the clip
    (2.5, 0.2, 1.8**2 / 2, 0.0),  # went from 1 to 3 by more than 0.2: 1.2 counts
    (0.5, 0.2, 2.5**2 / 2, -2.5),  # went the wrong way: counts in full
])  # fmt: skip
def test_the_clipped_value_loss_by_hand(value, clip, loss, gradient):
    """V_old is 1, the return 3."""
    value = torch.tensor([value, 3.0], requires_grad=True)
    found = script.clipped_value_loss(value, torch.tensor([1.0, 3.0]), torch.full((2,), 3.0), clip)
    found.backward()
    assert (2 * found.item(), 2 * value.grad[0].item()) == pytest.approx((loss, gradient))


def test_log_probability_and_entropy_are_pytorchs():
    logits, actions = torch.randn(3, 5, 4), torch.randint(4, (3, 5))
    policy = Categorical(logits=logits)
    log_probs, entropies = script.log_prob_and_entropy(logits, actions)
    torch.testing.assert_close(log_probs, policy.log_prob(actions))
    torch.testing.assert_close(entropies, policy.entropy())


class Fixed(nn.Module):
    """One policy everywhere; V is the number of the row."""

    def __init__(self):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor([2.0, 1.0, -1.0]))

    def forward(self, obs):
        return self.logits.expand(len(obs), 3), torch.arange(len(obs)).float()


def test_actions_are_as_frequent_as_the_policy_says():
    torch.manual_seed(0)
    policy = Fixed()
    actions, log_probs, values = script.act(policy, np.zeros((40_000, 1), np.float32))
    shares, logits = np.bincount(actions, minlength=3) / 40_000, policy.logits.detach()
    np.testing.assert_allclose(shares, logits.softmax(0), atol=0.01)
    np.testing.assert_allclose(log_probs, logits.log_softmax(0)[actions], atol=1e-6)
    assert (values == np.arange(40_000)).all()


# ---- Updates -------------------------------------------------------------------------------------


class Table(nn.Module):
    """Logits and V of each state. An observation is a state, one-hot."""

    def __init__(self):
        super().__init__()
        numbers = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
        self.numbers = nn.Parameter(numbers.double())

    def forward(self, obs):
        return obs @ self.numbers[:, :-1], obs @ self.numbers[:, -1]


def example(size=12):
    """A table, states, and a batch whose ratios are not 1."""
    generator, table = torch.Generator().manual_seed(1), Table()
    states, actions = torch.randint(3, (2, size), generator=generator)
    log_probs = table.numbers[states, :-1].log_softmax(1)[range(size), actions].detach()
    noise = torch.randn(4, size, generator=generator).double()
    obs = torch.eye(3, dtype=torch.float64)[states]
    return table, states.numpy(), script.Batch(obs, actions, log_probs + 0.3 * noise[0], *noise[1:])


def loss_in_numpy(numbers, states, batch, args):
    """The loss row by row, from the equations of the paper -> metrics."""
    found = dict.fromkeys(("policy_loss", "value_loss", "entropy", "approx_kl", "clipfrac"), 0.0)
    advantages, size = batch.advantages.numpy(), len(states)
    if args.norm_adv:
        advantages = (advantages - np.mean(advantages)) / np.std(advantages, ddof=1)
    for b, state in enumerate(states):
        probabilities = np.exp(numbers[state, :-1]) / np.exp(numbers[state, :-1]).sum()
        ratio = probabilities[batch.actions[b]] / math.exp(batch.log_probs[b])
        clipped = min(max(ratio, 1 - args.clip_coef), 1 + args.clip_coef)
        value, old, target = numbers[state, -1], batch.values[b].item(), batch.returns[b].item()
        error = (value - target) ** 2
        if args.clip_vloss:
            near = min(max(value, old - args.clip_coef), old + args.clip_coef)
            error = max(error, (near - target) ** 2)
        found["policy_loss"] -= min(ratio * advantages[b], clipped * advantages[b]) / size
        found["value_loss"] += error / 2 / size
        found["entropy"] -= (probabilities * np.log(probabilities)).sum() / size
        found["approx_kl"] += (ratio - 1 - math.log(ratio)) / size
        found["clipfrac"] += (abs(ratio - 1) > args.clip_coef) / size
    loss = found["policy_loss"] + args.vf_coef * found["value_loss"]
    return loss - args.ent_coef * found["entropy"], found


@pytest.mark.parametrize("flags", [
    {}, {"norm_adv": False}, {"clip_vloss": False}, {"ent_coef": 0.5}, {"vf_coef": 2.0},
    {"clip_coef": 0.4},
])  # fmt: skip
def test_an_update_goes_down_the_gradient_of_the_papers_loss(flags):
    """By finite differences. Gradients left over from before do not count."""
    args = script.Args(**{"max_grad_norm": 1e9, "clip_coef": 0.2} | flags)
    table, states, batch = example()
    before, gradient = table.numbers.detach().numpy().copy(), np.zeros((3, 5))
    for place in np.ndindex(3, 5):
        high, low = before.copy(), before.copy()
        high[place] += 1e-6
        low[place] -= 1e-6
        ends = [loss_in_numpy(end, states, batch, args)[0] for end in (high, low)]
        gradient[place] = (ends[0] - ends[1]) / 2e-6
    table.numbers.grad = torch.ones_like(table.numbers)
    metrics = script.update(table, torch.optim.SGD(table.parameters(), lr=0.1), batch, args)
    np.testing.assert_allclose(table.numbers.detach(), before - 0.1 * gradient, atol=1e-7)
    expected = loss_in_numpy(before, states, batch, args)[1]
    found = {tag.removeprefix("losses/"): value.item() for tag, value in metrics.items()}
    assert found == pytest.approx(expected) and 0 < expected["clipfrac"] < 1
    assert not any(value.requires_grad for value in metrics.values())


def example_batch(size=8):
    noise = torch.randn(3, size, generator=torch.Generator().manual_seed(1))
    return script.Batch(frames(size), torch.arange(size) % 4, torch.full((size,), -1.4), *noise)


@pytest.mark.parametrize("limit", [1e9, 0.01])
def test_longer_gradients_are_clipped_as_one_vector(limit):
    agent = make_agent()
    before = [weights.detach().clone() for weights in agent.parameters()]
    optimizer = torch.optim.SGD(agent.parameters(), lr=1.0)
    script.update(agent, optimizer, example_batch(), script.Args(max_grad_norm=limit))
    moves = [weights.detach() - old for weights, old in zip(agent.parameters(), before)]
    move = torch.cat([part.flatten() for part in moves]).norm().item()
    assert move == pytest.approx(0.01, rel=1e-2) if limit == 0.01 else move > 0.1


def test_equal_advantages_have_no_deviation_to_divide_by():
    table, _, batch = example()
    batch = batch._replace(advantages=torch.ones(12).double())
    optimizer = torch.optim.SGD(table.parameters(), lr=1.0)
    metrics = script.update(table, optimizer, batch, script.Args())
    assert metrics["losses/policy_loss"] == 0 and table.numbers.isfinite().all()


@pytest.mark.parametrize("size, parts, epochs", [(12, 4, 3), (13, 4, 2), (5, 1, 2)])
def test_every_epoch_has_every_step_once_in_another_order(monkeypatch, size, parts, epochs):
    seen = []

    def update(agent, optimizer, batch, args):
        assert all(torch.equal(part, batch.obs) for part in batch)  # rows stay together
        seen.append(batch.obs.tolist())
        number = torch.tensor(float(len(seen)))
        return {"losses/entropy": number, "losses/approx_kl": number}

    monkeypatch.setattr(script, "update", update)
    torch.manual_seed(0)
    args = script.Args(num_minibatches=parts, update_epochs=epochs)
    metrics = script.learn(None, None, script.Batch(*[torch.arange(size)] * 6), args)
    orders = [sum(seen[i : i + parts], []) for i in range(0, len(seen), parts)]
    assert len(orders) == epochs and all(sorted(order) == list(range(size)) for order in orders)
    assert len({tuple(order) for order in [*orders, range(size)]}) == epochs + 1
    assert max(map(len, seen)) - min(map(len, seen)) <= 1
    assert metrics["losses/entropy"].item() == pytest.approx(np.mean(range(1, len(seen) + 1)))


@pytest.mark.parametrize("stop_kl, epochs", [(0, 4), (0.07, 4), (0.03, 3), (0.02, 2), (0.005, 1)])
def test_the_epoch_that_moves_the_policy_too_far_is_the_last(monkeypatch, stop_kl, epochs):
    """The mean over its minibatches counts: 0.01, 0.025, 0.05, 0.065."""
    divergences = [0.0, 0.02, 0.01, 0.04, 0.02, 0.08, 0.03, 0.1]
    left = list(divergences)
    found = lambda *_: {"losses/approx_kl": torch.tensor(left.pop(0))}  # noqa: E731
    monkeypatch.setattr(script, "update", found)
    args = script.Args(num_envs=2, num_steps=4, num_minibatches=2, stop_kl=float(stop_kl))
    metrics = script.learn(None, None, script.Batch(*[torch.arange(8)] * 6), args)
    done = divergences[: 2 * epochs]
    assert len(left) == 8 - 2 * epochs
    assert metrics["losses/approx_kl"].item() == pytest.approx(np.mean(done))


def test_no_minibatch_has_a_single_step():
    """Its deviation would be NaN. Of 5 steps, two minibatches have 2 and 3."""
    script.Args(num_envs=1, num_steps=5, num_minibatches=2)
    with pytest.raises(ValueError, match="--num-minibatches"):
        script.Args(num_envs=1, num_steps=5, num_minibatches=3)


# ---- The loop ------------------------------------------------------------------------------------


def train(tmp_path, **changes):
    """4 rollouts of 60 steps in games of the diary. Returns the run's folder."""
    few = dict(
        env_id="PixelDiary-v0", total_timesteps=240, num_envs=4, num_steps=15, num_minibatches=2,
        update_epochs=2, eval_episodes=2, checkpoint_frequency=90, precision="float32",
        learning_rate=3e-3, num_threads=1,
    )  # fmt: skip
    return games.train(script, script.Args(**few | changes, runs_dir=str(tmp_path)))


@pytest.mark.parametrize("num_envs", [1, 4])
def test_what_is_learned_from_is_what_was_played(tmp_path, monkeypatch, num_envs):
    """Every step once, as it happened, with the sign of its reward. V of the next observation is
    that of the true one, at the end of a game, too, if a time limit truncated it."""
    calls = {name: recorded(monkeypatch, script, name) for name in ("act", "gae", "learn")}
    train(tmp_path, num_envs=num_envs, num_steps=60 // num_envs)
    acted, found = iter(calls["act"]), []
    for (inputs, advantages), (rollout, _) in zip(calls["gae"], calls["learn"], strict=True):
        batch = rollout[2]
        rewards, values, next_values, terminated, truncated = (x.flatten() for x in inputs[:5])
        count = 60 // num_envs + 1 + sum(inputs[4].any(1))  # one more where games were truncated
        value_of = {}
        for (_, obs), (_, _, v) in [next(acted) for _ in range(count)]:
            for i in range(num_envs):
                shown = number(obs[i, -1])
                assert value_of.get(shown, v[i]) == pytest.approx(v[i], abs=1e-6)
                value_of[shown] = v[i]
        for row in range(60):
            shown = number(batch.obs[row, -1])
            step = Diary.steps[shown]
            found.append(shown)
            assert numbers(batch.obs[row]) == step.frames and batch.actions[row] == step.action
            assert rewards[row] == step.reward
            assert (terminated[row], truncated[row]) == (step.terminated, step.truncated)
            assert batch.values[row] == values[row] == pytest.approx(value_of[shown], abs=1e-6)
            if not step.terminated:
                assert next_values[row] == pytest.approx(value_of[step.next_frames[-1]], abs=1e-6)
        torch.testing.assert_close(batch.advantages, advantages.flatten())
        torch.testing.assert_close(batch.returns, batch.advantages + batch.values)
        assert inputs[5:] == (0.99, 0.95)
    assert sorted(found) == sorted(list(Diary.steps)[:240])  # and then the evaluation


def test_log_probabilities_are_of_the_policy_that_acted(tmp_path, monkeypatch):
    """Before the first update of a rollout all ratios are 1, with normalised observations, too."""
    updates = recorded(monkeypatch, script, "update")
    train(tmp_path, norm_obs=True)
    divergences = [metrics["losses/approx_kl"].item() for _, metrics in updates]
    assert len(updates) == 16 and max(map(abs, divergences[::4])) < 1e-6 < min(divergences[3::4])


def test_every_game_is_logged_with_its_true_score(tmp_path):
    """At the step that ended it. Those of the evaluation come after."""
    points = curves(train(tmp_path))
    returns, lengths = points["charts/episodic_return"], points["charts/episodic_length"]
    assert [(r, n) for (_, r), (_, n) in zip(returns, lengths)] == Diary.games[: len(returns)]
    assert len(returns) >= len(Diary.games) - 3 and max(r for _, r in returns) > 5
    ends = np.zeros(4)
    for (step, _), (_, length) in zip(returns, lengths):
        ends[(step - 1) % 4] += length
        assert ends[(step - 1) % 4] == (step - 1) // 4 + 1


@pytest.mark.parametrize("anneal_lr", [True, False])
def test_the_learning_rate_falls_in_a_line_or_stays(tmp_path, monkeypatch, anneal_lr):
    rates = []

    def learn(agent, optimizer, batch, args):
        (group,) = optimizer.param_groups
        rates.append((type(optimizer), group["lr"], group["eps"]))
        return {}

    monkeypatch.setattr(script, "learn", learn)
    points = curves(train(tmp_path, anneal_lr=anneal_lr))
    expected = [3e-3 * (1 - k / 4) if anneal_lr else 3e-3 for k in range(4)]
    assert rates == [(torch.optim.Adam, pytest.approx(rate), 1e-5) for rate in expected]
    assert [value for _, value in points["charts/learning_rate"]] == pytest.approx(expected)


def test_checkpoints_are_written_when_they_are_due(tmp_path, monkeypatch):
    """Rollouts have 60 steps: what is due at 90 and at 180 is done at 120 and at 180."""
    steps, save = [], script.Run.save
    monkeypatch.setattr(script.Run, "save", lambda run: steps.append(run.envs.steps) or save(run))
    train(tmp_path)
    assert steps == [0, 120, 180, 240]


def test_statistics_are_of_all_that_was_learned_from(tmp_path, monkeypatch):
    """And of the first frames, once. They change between the rollouts only."""
    acts, rollouts = recorded(monkeypatch, script, "act"), recorded(monkeypatch, script, "learn")
    counts = []
    for name in ("act", "update"):

        def noting(agent, *others, function=getattr(script, name)):
            counts.append(agent.obs_statistics.count.item())
            return function(agent, *others)

        monkeypatch.setattr(script, name, noting)
    network = learned(train(tmp_path, norm_obs=True))["network"]
    seen = [torch.from_numpy(acts[0][0][1]), *(batch.obs for (_, _, batch, _), _ in rollouts)]
    seen = torch.cat(seen)[:, -1].flatten(1).double()
    assert list(dict.fromkeys(counts)) == [4, 64, 124, 184, 244] and len(seen) == 244
    assert network["obs_statistics.count"] == 244
    for name, expected in ("mean", seen.mean(0)), ("variance", seen.var(0, correction=0)):
        found = network[f"obs_statistics.{name}"].double()
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_explained_variance_is_of_the_returns(tmp_path, monkeypatch):
    rollouts = recorded(monkeypatch, script, "learn")
    points = curves(train(tmp_path))
    for ((_, _, batch, _), _), (_, found) in zip(rollouts, points["losses/explained_variance"]):
        expected = 1 - (batch.returns - batch.values).var() / batch.returns.var()
        assert found == pytest.approx(expected.item(), rel=1e-3, abs=1e-3)


@pytest.mark.slow
def test_every_setting_of_the_algorithm_changes_the_outcome(tmp_path):
    """But for one, of the emulator."""

    def few(**changes):
        return train(tmp_path, **{"total_timesteps": 120} | changes)

    check_settings(script, few, dict(
        seed=2, total_timesteps=180, num_envs=3, learning_rate=1e-3, anneal_lr=False, num_steps=10,
        gamma=0.5, gae_lambda=0.5, num_minibatches=3, update_epochs=1, norm_adv=False,
        clip_coef=0.01, clip_vloss=False, ent_coef=0.1, vf_coef=0.1, max_grad_norm=0.1,
        stop_kl=1e-9, norm_obs=True, precision="bfloat16",
    ), others={"sticky_actions": 0.0})  # fmt: skip
