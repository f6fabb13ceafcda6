"""The mathematics of tdmpc2_continuous.py: by hand, by loops over one plan and one sequence after the
other, in models that are known.

What dreamerv3_cartpole.py and sac_continuous.py have word for word is tested there.
"""

import inspect
import math
from copy import deepcopy

import dreamerv3_cartpole
import numpy as np
import pytest
import sac_continuous
import tdmpc2_continuous as script
import torch
from diary import Diary, check_episodes, check_settings, recorded, side_by_side, train
from test_sac_continuous import LOW, scaled
from torch.distributions import Normal

# For the tests that all scripts share.
TINY = (
    "--total-timesteps 900 --num-envs 2 --learning-starts 300 --buffer-size 500 --num-sequences 8 "
    "--hidden-size 16 --latent-size 16 --num-critics 3 --plan-steps 2 --num-plans 6 "
    "--num-policy-plans 2 --num-elites 3 --num-rounds 1 --train-frequency 20 "
    "--checkpoint-frequency 250 --eval-frequency 500 --eval-episodes 3"
)
OWN = "continuous"
OWN_FLAGS = (
    "--total-timesteps 1500 --learning-starts 200 --hidden-size 32 --latent-size 16 --gamma 0.5 "
    "--num-critics 2 --num-plans 32 --num-elites 4 --num-policy-plans 4 --num-rounds 3 "
    "--num-sequences 32 --plan-steps 2"
)
WRONG_SPACES = ["CartPole-v1", "cases:HugeBounds-v0"]
DIVERGES = "--learning-rate 1e30"
BAD = [
    ("--latent-size 12", "--latent-size"),
    ("--num-critics 1", "--num-critics"),
    ("--num-policy-plans 64", "--num-policy-plans"),
    ("--num-elites 65", "--num-elites"),
    ("--plan-steps 0", "--plan-steps"),
    ("--rho 1.5", "--rho"),
    ("--inverse-temperature -1", "--inverse-temperature"),
    ("--buffer-size 499", "--buffer-size"),
    ("--total-timesteps 500", "--learning-starts"),
]
LEARNS = []  # a longer run takes minutes: see the record
# What others published, by the record's name after `<script>__`: shown beside our results.
PUBLISHED = {}

SIZES = {
    "hidden_size": 12, "latent_size": 16, "num_critics": 3, "plan_steps": 3, "num_plans": 9,
    "num_policy_plans": 2, "num_elites": 4, "num_rounds": 3,
}  # fmt: skip


def args_of(**settings):
    return script.Args(**SIZES | settings)


def agent_of(obs_size=2, low=(-2, 0), high=(2, 10), scale=0.5, seed=0, **settings):
    torch.manual_seed(seed)
    agent = script.Agent(obs_size, np.float32(low), np.float32(high), args_of(**settings))
    with torch.no_grad():
        for weights in agent.parameters():
            weights += scale * torch.randn_like(weights)  # opinions of its own
    return agent


@pytest.mark.parametrize("name, other", [
    *((name, dreamerv3_cartpole) for name in (
        "symlog", "symexp", "bins", "two_hot", "expected", "cross_entropy", "draw", "evaluate",
    )),
    ("make_env", sac_continuous), ("update_target", sac_continuous),
])  # fmt: skip
def test_what_others_have_too_is_the_same_and_tested_there(name, other):
    ours, theirs = (inspect.getsource(getattr(module, name)) for module in (script, other))
    assert ours == theirs


def test_actions_and_their_probabilities_are_sacs_in_any_shape():
    means, log_std, noise = torch.randn(3, 4, 5, 2)
    actions, log_probs = script.sample_actions(means, log_std, noise)
    parts = (part.flatten(0, 1) for part in (means, log_std, noise))
    expected = sac_continuous.sample_actions(*parts)
    torch.testing.assert_close(actions.flatten(0, 1), expected[0])
    torch.testing.assert_close(log_probs.flatten(), expected[1])


# ---- The networks --------------------------------------------------------------------------------


def test_to_simplices_by_hand():
    rows = torch.randn(2, 3, 16)
    found = script.to_simplices(rows)
    assert found.shape == (2, 3, 16)
    for ours, row in zip(found.view(-1, 16), rows.view(-1, 16).tolist()):
        for start in (0, 8):
            powers = [math.exp(number) for number in row[start : start + 8]]
            expected = [power / sum(powers) for power in powers]
            assert ours[start : start + 8].tolist() == pytest.approx(expected, rel=1e-5)


def test_latent_states_are_probabilities_in_groups_of_8():
    agent = agent_of()
    for latents in (
        agent.encode(torch.randn(5, 2)),
        agent.advance(torch.rand(5, 16), torch.rand(5, 2)),
    ):
        assert latents.min() > 0
        torch.testing.assert_close(latents.view(5, 2, 8).sum(2), torch.ones(5, 2))


def test_deviations_have_bounds():
    """-10 and 2 where the network's numbers are huge; the middle, -4, where they are 0."""
    agent = agent_of()
    for size, expected in ((-1e9, -10.0), (0.0, -4.0), (1e9, 2.0)):
        with torch.no_grad():
            agent.actor[-1].weight.zero_()
            agent.actor[-1].bias.fill_(size)
        means, log_std = agent.policy(torch.rand(4, 16))
        torch.testing.assert_close(log_std, torch.full((4, 2), expected))
        assert torch.equal(means, torch.full((4, 2), size))


def test_at_first_rewards_and_values_are_0_and_critics_differ():
    agent = script.Agent(2, np.float32([-1]), np.float32([1]), args_of())
    latents, actions = torch.rand(5, 16), torch.rand(5, 1)
    for logits in (agent.reward(latents, actions), *agent.critics(latents, actions)):
        torch.testing.assert_close(script.expected(logits), torch.zeros(5), rtol=0, atol=1e-2)
    first, second, third = (network[0].weight for network in agent.critics.networks)
    assert not torch.equal(first, second) and not torch.equal(second, third)


def test_each_number_of_an_action_has_bounds_of_its_own():
    agent = agent_of(low=(-2, 0), high=(2, 10))
    actions = np.float32([[-1, 1], [0, 0], [0.5, -1]])
    expected = [[-2, 10], [0, 5], [1, 0]]
    np.testing.assert_allclose(script.to_bounds(agent, actions), expected)
    with pytest.raises(script.UsageError, match="not finite"):
        script.to_bounds(agent, np.float32([[math.nan, 0]]))


# ---- Plans ---------------------------------------------------------------------------------------


@torch.no_grad()
def value_by_hand(agent, latent, plan, args):
    """One plan (H, K) from a latent state (1, Z), written as a recursion over its steps."""
    if len(plan) == 0:
        action = agent.policy(latent)[0].tanh()
        return script.expected(agent.critics(latent, action)).mean().item()
    reward = script.expected(agent.reward(latent, plan[:1])).item()
    after = agent.advance(latent, plan[:1])
    if agent.goes_on(after).item() <= 0:
        return reward
    return reward + args.gamma * value_by_hand(agent, after, plan[1:], args)


@pytest.mark.parametrize("bias", [0.0, 99.0])
def test_values_of_plans_by_a_recursion(bias):
    """Of plans in which the model thinks that some episodes end, or none."""
    agent, args = agent_of(scale=1.0), args_of(gamma=0.8)
    with torch.no_grad():
        agent.goes_on[-1].bias += bias
    latents = agent.encode(torch.randn(40, 2)).detach()
    plans = 2 * torch.rand(3, 40, 2) - 1
    with torch.no_grad():
        found = script.plan_values(agent, latents, plans, args)
    expected = [value_by_hand(agent, latents[i : i + 1], plans[:, i], args) for i in range(40)]
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        after = agent.goes_on(agent.advance(latents, plans[0])) > 0
    assert (after.all() if bias else 2 < after.sum() < 38) and np.ptp(expected) > 1


@torch.no_grad()
def test_the_policys_plans_step_by_step():
    agent, noise = agent_of(), torch.randn(3, 5, 2)
    latents = agent.encode(torch.randn(5, 2))
    found = script.policy_plans(agent, latents, noise)
    for i in range(5):
        latent = latents[i : i + 1]
        for t in range(3):
            means, log_std = agent.policy(latent)
            action = (means + log_std.exp() * noise[t, i]).tanh()
            torch.testing.assert_close(found[t, i], action[0])
            latent = agent.advance(latent, action)


@pytest.mark.parametrize("inverse_temperature", [0.0, 0.5, 3.0])
@pytest.mark.parametrize("num_elites", [1, 3, 6])
def test_fit_by_loops(num_elites, inverse_temperature):
    """Environment by environment: the best plans, their weights, weighted mean and deviation."""
    torch.manual_seed(1)
    actions, values = 2 * torch.rand(3, 2, 6, 2) - 1, torch.randn(2, 6)
    actions[0, :, :, 0] = 0.3  # all plans agree: the deviation is the least one
    found = script.fit(actions, values, num_elites, inverse_temperature)
    for n in range(2):
        best = sorted(range(6), key=lambda i: -values[n, i].item())[:num_elites]
        powers = [math.exp(inverse_temperature * values[n, i].item()) for i in best]
        weights = [power / sum(powers) for power in powers]
        assert found[3][n].tolist() == pytest.approx(weights, rel=1e-4)
        for t in range(3):
            assert torch.equal(found[2][t, n], actions[t, n, best])
            for k in range(2):
                numbers = [actions[t, n, i, k].item() for i in best]
                mean = sum(w * x for w, x in zip(weights, numbers))
                variance = sum(w * (x - mean) ** 2 for w, x in zip(weights, numbers))
                assert found[0][t, n, k].item() == pytest.approx(mean, abs=1e-5)
                deviation = min(max(math.sqrt(variance), 0.05), 2)
                assert found[1][t, n, k].item() == pytest.approx(deviation, abs=1e-4)


def test_what_a_step_draws():
    torch.manual_seed(0)
    args = args_of(num_plans=900, num_policy_plans=300)
    chance = script.draw_chance(4, 2, args)
    assert chance.policy.shape == (3, 4, 300, 2) and chance.plans.shape == (3, 3, 4, 600, 2)
    assert chance.choice.shape == (4,) and chance.action.shape == (4, 2)
    for part in chance[:2]:
        assert abs(part.mean()) < 0.05 and abs(part.std() - 1) < 0.05
    numbers = torch.cat([script.draw_chance(500, 1, args_of()).choice for _ in range(3)])
    assert 0 <= numbers.min() < 0.02 and 0.98 < numbers.max() < 1


@torch.no_grad()
def plan_by_hand(agent, obs, means, chance, args, n):
    """The plan of environment n alone, in the order of the authors' program."""
    latent = agent.encode(obs[n : n + 1])
    own = [
        script.policy_plans(agent, latent, chance.policy[:, n, p : p + 1])[:, 0] for p in range(2)
    ]
    mean, deviation = torch.zeros(3, 2), torch.full((3, 2), 2.0)
    mean[:2] = means[1:, n]
    for r in range(3):
        plans = own + [(mean + deviation * chance.plans[r, :, n, s]).clip(-1, 1) for s in range(7)]
        values = [value_by_hand(agent, latent, plan, args) for plan in plans]
        best = sorted(range(9), key=lambda s: -values[s])[:4]
        powers = [math.exp(args.inverse_temperature * (values[s] - values[best[0]])) for s in best]
        weights = [power / sum(powers) for power in powers]
        mean = sum(w * plans[s] for w, s in zip(weights, best))
        spread = sum(w * (plans[s] - mean) ** 2 for w, s in zip(weights, best))
        deviation = spread.sqrt().clip(0.05, 2)
    total, number = 0.0, chance.choice[n].item()
    for weight, s in zip(weights, best):
        total += weight
        if number < total:
            break
    action = (plans[s][0] + deviation[0] * chance.action[n]).clip(-1, 1)
    return action, mean


@pytest.mark.parametrize("inverse_temperature", [0.0, 0.5])
def test_plan_is_the_papers_for_each_environment(inverse_temperature):
    """With weights that are all equal, and with nearly all weight on the best plan."""
    agent, args = agent_of(scale=0.3), args_of(inverse_temperature=inverse_temperature, gamma=0.9)
    obs, means = torch.randn(6, 2), 0.5 * torch.randn(3, 6, 2)
    chance = script.draw_chance(6, 2, args)
    actions, found = script.plan(agent, obs, means, chance, args)
    for n in range(6):
        action, mean = plan_by_hand(agent, obs, means, chance, args, n)
        torch.testing.assert_close(actions[n], action, rtol=0, atol=1e-3)
        torch.testing.assert_close(found[:, n], mean, rtol=0, atol=1e-3)
    assert not actions.requires_grad and actions.abs().max() <= 1


def test_the_policy_plans_from_each_environments_own_state(monkeypatch):
    calls = recorded(monkeypatch, script, "policy_plans")
    agent, args, obs = agent_of(), args_of(), torch.randn(5, 2)
    chance = script.draw_chance(5, 2, args)
    script.plan(agent, obs, torch.zeros(3, 5, 2), chance, args)
    ((_, starts, noise), _), latents = calls[0], agent.encode(obs)
    for n in range(5):
        for p in range(2):
            torch.testing.assert_close(starts[2 * n + p], latents[n])
            assert torch.equal(noise[:, 2 * n + p], chance.policy[:, n, p])


class Known:
    """A world whose state is a number, which moves by a tenth of the action; z is that number.

    The reward is -(state after the step)^2. The policy stands still, and is worth nothing.
    """

    def encode(self, obs):
        return obs

    def advance(self, latents, actions):
        return latents + actions / 10

    def reward(self, latents, actions):
        return -((latents + actions / 10) ** 2).squeeze(1)

    def goes_on(self, latents):
        return torch.ones_like(latents)

    def policy(self, latents):
        return torch.zeros_like(latents), torch.full_like(latents, -5)

    def critics(self, latents, actions):
        return torch.zeros(3, len(latents))


def test_in_a_known_world_it_plans_the_best_actions(monkeypatch):
    """To 0 as fast as the bounds allow, then to stay: by hand."""
    monkeypatch.setattr(script, "expected", lambda numbers: numbers)
    torch.manual_seed(0)
    args = args_of(
        num_plans=400, num_elites=20, num_rounds=8, inverse_temperature=500.0, gamma=0.99
    )
    obs = torch.tensor([[0.25], [-0.05], [0.0], [-0.4]])
    chance, means = script.draw_chance(4, 1, args), torch.zeros(3, 4, 1)
    _, means = script.plan(Known(), obs, means, chance, args)
    expected = [[-1, -1, -0.5], [0.5, 0, 0], [0, 0, 0], [1, 1, 1]]
    np.testing.assert_allclose(means[:, :, 0].T, expected, atol=0.12)


# ---- What is learned -----------------------------------------------------------------------------


def test_target_by_hand():
    """The lesser value; r alone if terminated."""
    rewards, terminated = torch.tensor([[1.0, 2.0]]), torch.tensor([[False, True]])
    next_q = torch.tensor([[[3.0, 30.0]], [[5.0, 4.0]]])
    found = script.td_target(rewards, terminated, next_q, 0.5)
    assert found.tolist() == [[1 + 0.5 * 3, 2.0]]


def test_weights_of_steps_by_hand():
    valid = torch.tensor([[True, True], [True, False], [True, False]])
    assert script.step_weights(valid, 0.5).tolist() == [[1, 1], [0.5, 0], [0.25, 0]]
    assert script.step_weights(valid, 0.0).tolist() == [[1, 1], [0, 0], [0, 0]]


def make_batch(seed=0, steps=3, size=6):
    """Some sequences end early: the first at its first step, terminated; the second truncated."""
    torch.manual_seed(seed)
    valid = torch.ones(steps, size).bool()
    valid[1:, :2] = False
    terminated = torch.zeros(steps, size).bool()
    terminated[0, 0] = terminated[-1, 3] = True
    return script.Batch(
        torch.randn(steps + 1, size, 2), 2 * torch.rand(steps, size, 2) - 1,
        3 * torch.randn(steps, size), terminated, valid,
    )  # fmt: skip


def cross_entropy_by_hand(number, logits):
    """Of one number, which lies between two categories."""
    places, logs = script.bins(logits.device).tolist(), logits.log_softmax(0)
    i = max(j for j in range(100) if places[j] <= number)
    share = (number - places[i]) / (places[i + 1] - places[i])
    return -(1 - share) * logs[i] - share * logs[i + 1]


def model_loss_by_hand(agent, target_critics, batch, noise, pair, args):
    """Sequence by sequence, step by step. What is a target is a number, without a gradient."""
    total = 0.0
    for b in range(6):
        latent = agent.encode(batch.obs[0, b : b + 1])
        for t in range(3):
            action = batch.actions[t, b : b + 1]
            if not batch.valid[t, b]:
                continue
            with torch.no_grad():
                seen = agent.encode(batch.obs[t + 1, b : b + 1])
                means, log_std = agent.policy(seen)
                next_action = (means + log_std.exp() * noise[t, b]).tanh()
                logits = target_critics(seen, next_action)
                q = min(script.expected(logits[k]).item() for k in pair.tolist())
            reward = batch.rewards[t, b].item()
            target = reward if batch.terminated[t, b] else reward + args.gamma * q
            error = args.reward_coef * cross_entropy_by_hand(
                reward, agent.reward(latent, action)[0]
            )
            for logits in agent.critics(latent, action):
                error = error + args.value_coef * cross_entropy_by_hand(target, logits[0]) / 3
            latent = agent.advance(latent, action)
            error = error + args.consistency_coef * ((latent - seen) ** 2).sum() / 16
            goes_on = agent.goes_on(latent).sigmoid()[0, 0]
            certainty = 1 - goes_on if batch.terminated[t, b] else goes_on
            total = total + args.rho**t * error - certainty.log()
    return total / 18


@pytest.mark.parametrize("pair, settings", [
    ([2, 0], {}), ([0, 1], {"rho": 0.9, "reward_coef": 1.0}),
    ([1, 2], {"consistency_coef": 1.0, "value_coef": 2.0}),
])  # fmt: skip
def test_model_loss_and_its_gradient_by_loops(pair, settings):
    """One of the pairs leaves out the critic with the least values."""
    agent, args, batch = agent_of(), args_of(**settings, gamma=0.9), make_batch()
    target_critics = agent_of(seed=5).critics
    noise, pair = torch.randn(3, 6, 2), torch.tensor(pair)
    arguments = agent, target_critics, batch, noise, pair, args
    loss, latents, metrics = script.model_loss(*arguments)
    expected = model_loss_by_hand(*arguments)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)
    names, weights = zip(*agent.named_parameters())
    found = torch.autograd.grad(loss, weights, allow_unused=True)
    wanted = torch.autograd.grad(expected, weights, allow_unused=True)
    for name, ours, theirs in zip(names, found, wanted):
        assert (ours is None) == (theirs is None) == name.startswith("actor"), name
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-4, msg=name)
    assert latents.shape == (3, 6, 16) and not latents.requires_grad
    assert not any(value.requires_grad for value in metrics.values())
    torch.testing.assert_close(latents[0], agent.encode(batch.obs[0]))


def test_what_is_beyond_an_episodes_end_does_not_matter():
    agent, args, batch = agent_of(), args_of(), make_batch()
    noise, pair = torch.randn(2, 3, 6, 2), torch.tensor([0, 1])
    other = deepcopy(batch)
    other.obs[2:, :2], other.actions[1:, :2], other.rewards[1:, :2] = 7.0, 0.5, 99.0
    other.terminated[1:, :2] = True
    found = []
    for rows in (batch, other):
        same = deepcopy(agent)
        script.compute_gradient(same, deepcopy(agent.critics), rows, noise, pair, args)
        gradients = {name: w.grad for name, w in same.named_parameters()}
        found.append(gradients)
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], msg=name)


def test_errors_in_the_log_are_means_over_the_steps_that_there_are():
    errors = torch.tensor([[1.0, 3.0], [8.0, 100.0]], requires_grad=True)
    valid = torch.tensor([[True, True], [True, False]])
    found = script.mean_of_valid(errors, valid)
    assert found.item() == 4 and not found.requires_grad


def test_policy_loss_and_its_gradient_by_loops():
    """Q by the mean of all critics, in units of D, which has moved before; the entropy of p."""
    agent, args = agent_of(scale=0.8), args_of(ent_coef=0.3, rho=0.7)
    valid = make_batch().valid
    latents, noise = script.to_simplices(torch.randn(3, 6, 16)), torch.randn(3, 6, 2)
    before = agent.spread.item()
    loss, metrics = script.policy_loss(agent, latents, valid, noise, args)
    first = []
    for b in range(6):
        with torch.no_grad():
            means, log_std = agent.policy(latents[0, b : b + 1])
            action = (means + log_std.exp() * noise[0, b]).tanh()
            logits = agent.critics(latents[0, b : b + 1], action)
            first.append(script.expected(logits).mean().item())
    low, high = np.quantile(first, [0.05, 0.95])
    spread = 0.99 * before + 0.01 * max(high - low, 1)
    assert high - low > 1.5 and agent.spread.item() == pytest.approx(spread, rel=1e-4)
    total = 0.0
    for b in range(6):
        for t in range(3):
            if valid[t, b]:
                means, log_std = agent.policy(latents[t, b : b + 1])
                u = means + log_std.exp() * noise[t, b]
                action = u.tanh()
                q = script.expected(agent.critics(latents[t, b : b + 1], action)).mean()
                density = Normal(means, log_std.exp()).log_prob(u) - (1 - action**2 + 1e-12).log()
                total = total - 0.7**t * (q / spread - 0.3 * density.sum())
    torch.testing.assert_close(loss, total / 18, rtol=1e-3, atol=1e-3)
    names, weights = zip(*agent.named_parameters())
    found = torch.autograd.grad(loss, weights, allow_unused=True)
    wanted = torch.autograd.grad(total / 18, weights, allow_unused=True)
    for name, ours, theirs in zip(names, found, wanted):
        assert (ours is not None) == name.startswith("actor"), name
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-3, msg=name)
    assert set(metrics) == {"losses/q_values", "losses/entropy"}


def test_a_small_spread_counts_as_1():
    agent = script.Agent(2, np.float32([-1]), np.float32([1]), args_of())  # all values are 0
    latents, valid = torch.rand(3, 6, 16), torch.ones(3, 6).bool()
    with torch.no_grad():
        agent.spread.fill_(3.0)
        script.policy_loss(agent, latents, valid, torch.randn(3, 6, 1), args_of())
    assert agent.spread.item() == pytest.approx(0.99 * 3 + 0.01)


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("limit", [0.0, 0.01])
def test_update_goes_down_both_gradients(limit, compile):
    """Clipped together. The target critics follow the new critics."""
    args, batch = args_of(max_grad_norm=limit, tau=0.25, compile=compile), make_batch()
    agent = agent_of()
    before, target_critics = deepcopy(agent), agent_of(seed=5).critics
    old_target = deepcopy(target_critics)
    torch.manual_seed(3)
    noise, pair = torch.randn(2, 3, 6, 2), torch.randperm(3)[:2]
    model, latents, _ = script.model_loss(before, old_target, batch, noise[0], pair, args)
    policy, _ = script.policy_loss(before, latents, batch.valid, noise[1], args)
    learned = dict(before.named_parameters())
    gradients = torch.autograd.grad(model + policy, learned.values())
    norm = math.sqrt(sum(gradient.square().sum().item() for gradient in gradients))
    scale = limit / norm if limit else 1.0
    assert norm > 0.02
    optimizer = torch.optim.SGD(agent.parameters(), lr=0.1)
    agent.encoder[1].weight.grad = torch.ones_like(agent.encoder[1].weight)  # is no matter
    torch.manual_seed(3)
    metrics = script.update(agent, target_critics, optimizer, batch, args)
    new = dict(agent.named_parameters())
    for (name, weights), gradient in zip(learned.items(), gradients):
        expected = weights.detach() - 0.1 * scale * gradient
        torch.testing.assert_close(new[name].detach(), expected, rtol=1e-3, atol=1e-4)
    for name, weights in target_critics.named_parameters():
        expected = 0.75 * old_target.get_parameter(name) + 0.25 * new[f"critics.{name}"]
        torch.testing.assert_close(weights, expected, rtol=1e-4, atol=1e-6)
    assert len(metrics) == 6 and not any(value.requires_grad for value in metrics.values())


def test_any_two_critics_count_in_the_target(monkeypatch):
    pairs = recorded(monkeypatch, script, "compute_gradient")
    agent, args, batch = agent_of(), args_of(), make_batch()
    optimizer = torch.optim.SGD(agent.parameters(), lr=0.0)
    for _ in range(40):
        script.update(agent, deepcopy(agent.critics), optimizer, batch, args)
    found = [tuple(sorted(arguments[4].tolist())) for arguments, _ in pairs]
    assert set(found) == {(0, 1), (0, 2), (1, 2)}


# ---- ReplayBuffer --------------------------------------------------------------------------------

FEW = dict(
    env_id="ContinuousDiary-v0", total_timesteps=600, num_envs=3, learning_starts=60,
    num_sequences=6, buffer_size=5000, hidden_size=12, latent_size=8, num_critics=2, plan_steps=3,
    num_plans=6, num_policy_plans=2, num_elites=3, num_rounds=2, train_frequency=20,
    eval_episodes=3, learning_rate=1e-2,
)  # fmt: skip


@pytest.mark.parametrize("num_envs, size", [(1, 5000), (3, 250)])
def test_sequences_are_what_really_happened(tmp_path, num_envs, size):
    """Up to the end of an episode, and no further; from any step on."""
    few = FEW | {"num_envs": num_envs, "buffer_size": size, "learning_starts": min(size, 590)}
    state, points = train(script, tmp_path, **few | {"train_frequency": 1000})
    buffer = script.ReplayBuffer(size, num_envs, 2, 2)
    buffer.load_state_dict(state["buffer"])
    batch = buffer.sample(6000, 3)
    assert batch.obs.shape == (4, 6000, 2) and batch.valid.shape == (3, 6000)
    happened = {tuple(step[0]): (i, t) for i, env in enumerate(Diary.made[:num_envs])
                for t, step in enumerate(env.steps)}  # fmt: skip
    drawn, lengths = set(), set()
    for b in range(6000):
        i, t = happened[tuple(batch.obs[0, b].tolist())]
        steps, count = Diary.made[i].steps, 0
        drawn.add((i, t))
        for s in range(t, min(t + 3, len(steps))):
            obs, action, reward, next_obs, terminated, truncated = steps[s]
            assert batch.valid[count, b]
            assert batch.obs[count, b].tolist() == obs
            assert batch.obs[count + 1, b].tolist() == next_obs
            np.testing.assert_allclose(
                scaled(batch.actions[count, b]), action, rtol=1e-5, atol=1e-5
            )
            assert batch.rewards[count, b].item() == pytest.approx(reward, rel=1e-6)
            assert batch.terminated[count, b] == terminated
            count += 1
            if terminated or truncated:
                break
        assert not batch.valid[count:, b].any()
        lengths.add(count)
    assert lengths == {1, 2, 3}
    assert len(drawn) == 600 if size == 5000 else 150 < len(drawn) < 250
    check_episodes(points, side_by_side(num_envs))


def test_buffer_fits_no_other_size():
    buffer = script.ReplayBuffer(100, 1, 2, 3)
    with pytest.raises(ValueError, match="--buffer-size"):
        script.ReplayBuffer(101, 1, 2, 3).load_state_dict(buffer.state_dict())


@pytest.mark.parametrize("name", ["__init__", "add", "state_dict", "load_state_dict"])
def test_the_rest_of_the_buffer_is_sacs(name):
    ours, theirs = (getattr(x.ReplayBuffer, name) for x in (script, sac_continuous))
    assert inspect.getsource(ours) == inspect.getsource(theirs)


# ---- The loop ------------------------------------------------------------------------------------


def test_the_loop(tmp_path, monkeypatch):
    """Random steps, then plans, each of which begins with the one before; updates when due."""
    plans, updates = (recorded(monkeypatch, script, name) for name in ("plan", "update"))
    state, points = train(script, tmp_path, **FEW | {"total_timesteps": 300})
    steps = side_by_side(3)
    means = torch.zeros(3, 3, 2)
    for number, (i, (obs, action, _, _, terminated, truncated)) in enumerate(steps):
        if number >= 60:
            (_, seen, before, _, _), (actions, after) = plans[number // 3 - 20]
            assert seen[i].tolist() == obs and torch.equal(before[:, i], means[:, i])
            np.testing.assert_allclose(scaled(actions[i]), action, rtol=1e-5, atol=1e-5)
            means[:, i] = 0 if terminated or truncated else after[:, i]
    assert torch.equal(state["memory"]["means"], means)
    chances = [chance for (_, _, _, chance, _), _ in plans[:80]]
    assert len({chance.action.sum().item() for chance in chances}) == 80
    check_episodes(points, steps)
    due = list(range(60, 301, 20))
    assert len(updates) == len(due)
    for (agent, target_critics, optimizer, batch, _), _ in updates:
        assert batch.obs.shape == (4, 6, 2) and target_critics is not agent.critics
        groups = optimizer.param_groups
        assert [group["lr"] for group in groups] == pytest.approx([3e-3, 1e-2])
        assert len(groups[0]["params"]) == len(list(agent.encoder.parameters()))
        learned = sum(len(group["params"]) for group in groups)
        assert learned == len(list(agent.parameters()))
    assert type(optimizer) is torch.optim.Adam


def test_before_it_learns_actions_are_uniform(tmp_path):
    flags = {"learning_starts": 3000, "total_timesteps": 3001}
    train(script, tmp_path, **FEW | flags)
    actions = np.array([[step[1] for step in env.steps[:1000]] for env in Diary.made[:3]])
    shares = (actions - LOW) / np.array([4, 10])
    for column in shares.transpose(0, 2, 1).reshape(6, 1000):
        np.testing.assert_allclose(np.histogram(column, 4, (0, 1))[0] / 1000, 0.25, atol=0.06)


def test_at_the_start_the_target_critics_are_the_critics(tmp_path):
    never = {"train_frequency": 1000, "total_timesteps": 100}
    state, _ = train(script, tmp_path, **FEW | never)
    for name, weights in state["target_critics"].items():
        assert torch.equal(weights, state["network"][f"critics.{name}"])


@torch.no_grad()
def test_play_remembers_and_begins_anew_where_it_is_told():
    agent, args, obs = agent_of(), args_of(), torch.randn(3, 5, 2)
    first = np.array([False, True, False, False, False])
    torch.manual_seed(2)
    found = [
        script.play(args, agent, obs[t].numpy(), *([first] if t == 2 else [])) for t in range(3)
    ]
    torch.manual_seed(2)
    means = torch.zeros(3, 5, 2)
    for t in range(3):
        if t == 2:
            means[:, 1] = 0
        _, means = script.plan(agent, obs[t], means, script.draw_chance(5, 2, args), args)
        np.testing.assert_allclose(found[t], scaled(means[0]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(agent.state, means)


@pytest.mark.parametrize("env_id, values", [
    ("TruncatesCounting-v0", {1: 1 / (1 - 0.8)}),
    ("TerminatesCounting-v0", {1: 1 + 0.8 + 0.8**2, 0: 1 + 0.8, -1: 1}),
])  # fmt: skip
def test_a_time_limit_is_not_the_end_of_the_world(tmp_path, env_id, values):
    """Truncated for ever, a reward of 1 is worth 1 / (1 - gamma). Else it counts to the end, and
    the model knows when that is.
    """
    flags = {"env_id": env_id, "gamma": 0.8, "learning_starts": 600, "total_timesteps": 650}
    flags |= {"tau": 0.1, "learning_rate": 5e-3, "hidden_size": 32, "num_sequences": 16}
    flags |= {"train_frequency": 10, "gradient_steps": 80}
    state, _ = train(script, tmp_path, **FEW | flags)
    args = script.Args(**FEW | flags)
    agent = script.Agent(1, np.float32([-1, -1]), np.float32([1, 1]), args)
    agent.load_state_dict(state["network"])
    with torch.no_grad():
        for obs, value in values.items():
            latents, actions = (
                agent.encode(torch.full((50, 1), float(obs))),
                2 * torch.rand(50, 2) - 1,
            )
            found = script.expected(agent.critics(latents, actions)).mean(1)
            assert found.tolist() == pytest.approx([value] * 2, abs=0.5)
            ends = obs == -1  # after the step that is the third
            after = agent.goes_on(agent.advance(latents, actions)).mean()
            assert (after < 0) == ends


def test_the_least_settings_are_allowed():
    least = {
        "latent_size": 8,
        "num_critics": 2,
        "num_plans": 2,
        "num_policy_plans": 1,
        "num_elites": 2,
    }
    least |= {"learning_starts": 1, "buffer_size": 1, "total_timesteps": 2, "plan_steps": 1}
    script.Args(**least)


def test_every_setting_of_the_algorithm_changes_the_outcome(tmp_path):
    def outcome(**settings):
        state, _ = train(script, tmp_path, **FEW | {"total_timesteps": 120} | settings)
        return [weights.tolist() for weights in state["network"].values()]

    check_settings(script, outcome, {
        "seed": 2, "total_timesteps": 140, "num_envs": 4, "learning_rate": 5e-3, "buffer_size": 60,
        "gamma": 0.9, "tau": 0.5, "num_sequences": 5, "learning_starts": 80, "train_frequency": 25,
        "gradient_steps": 2, "max_grad_norm": 0.01, "hidden_size": 11, "latent_size": 16, "num_critics": 3,
        "consistency_coef": 1.0, "reward_coef": 1.0, "value_coef": 1.0, "rho": 0.9, "ent_coef": 0.1,
        "plan_steps": 2, "num_plans": 7, "num_policy_plans": 3, "num_elites": 2, "num_rounds": 1,
        "inverse_temperature": 5.0,
    })  # fmt: skip
