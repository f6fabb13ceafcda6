"""The mathematics of vmpo_cartpole.py: by loops, at its optima, against finite differences.

What ppo_cartpole.py has word for word is tested there.
"""

import inspect
import math

import numpy as np
import ppo_cartpole
import pytest
import torch
import vmpo_cartpole as script
from diary import (
    Diary, check_episodes, check_ppo_log, check_ppo_rewards, check_ppo_statistics, check_settings,
    recorded, side_by_side, train,
)  # fmt: skip
from torch import nn

# For the tests that all scripts share.
TINY = (
    "--total-timesteps 2000 --num-envs 4 --num-steps 32 --num-minibatches 2 --update-epochs 2 "
    "--checkpoint-frequency 500 --eval-frequency 700 --eval-episodes 5"
)
OWN = "discrete"
OWN_FLAGS = "--total-timesteps 10000 --num-steps 32 --no-norm-reward"
WRONG_SPACES = ["Pendulum-v1"]
DIVERGES = "--learning-rate 1e30"
BAD = [
    ("--num-steps 0", "--num-steps"),
    ("--num-envs 1 --num-steps 5 --num-minibatches 3", "--num-minibatches"),
    ("--epsilon-eta 0", "--epsilon-eta"),
    ("--epsilon-alpha nan", "--epsilon-alpha"),
    ("--dual-learning-rate -1", "--dual-learning-rate"),
]
LEARNS = [("--seed 1", 195)]  # chance: 22


@pytest.mark.parametrize("name", [
    "Actor", "RewardScaler", "RunningStatistics", "act", "explained_variance", "gae",
    "gumbel_noise", "layer", "learn", "play", "update",
])  # fmt: skip
def test_what_ppo_has_too_is_the_same_and_tested_there(name):
    ours, theirs = (inspect.getsource(getattr(module, name)) for module in (script, ppo_cartpole))
    assert ours == theirs


# ---- The E-step ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 5, 40, 41])
def test_the_better_half(size):
    """Of 5 steps, 3: none of the others is better."""
    advantages = torch.randn(size, generator=torch.manual_seed(0))
    rows = script.top_half(advantages).tolist()
    assert len(set(rows)) == len(rows) == math.ceil(size / 2)
    others = set(range(size)) - set(rows)
    assert min(advantages[rows]) >= max(advantages[list(others)])


def weights(advantages, eta):
    """exp(A / eta), divided by their sum."""
    numbers = [math.exp((a - max(advantages)) / eta) for a in advantages]
    return [number / sum(numbers) for number in numbers]


def divergence(shares):
    """KL of the weights from equal ones."""
    return sum(w * math.log(w * len(shares)) for w in shares if w > 0)


@pytest.mark.parametrize("eta", [0.2, 1.0, 30.0])
def test_policy_loss_is_the_weighted_likelihood(eta):
    """Its gradient is the weights; none is of the temperature."""
    torch.manual_seed(0)
    log_probs, advantages = torch.randn(2, 9).double()
    log_probs.requires_grad_()
    temperature = torch.tensor(eta).double().requires_grad_()
    expected = weights(advantages.tolist(), eta)
    loss = script.policy_loss(log_probs, advantages, temperature)
    assert loss.item() == pytest.approx(-np.dot(expected, log_probs.tolist()))
    loss.backward()
    np.testing.assert_allclose(log_probs.grad, -np.array(expected), rtol=1e-6)
    assert temperature.grad is None


@pytest.mark.parametrize("eta", [0.3, 5.0, 200.0])
def test_the_dual_by_a_loop_and_its_slope(eta):
    """The slope is epsilon less the divergence of the weights from equal ones."""
    torch.manual_seed(0)
    advantages = 3 * torch.randn(20).double() + 7
    temperature = torch.tensor(eta).double().requires_grad_()
    found = script.temperature_loss(advantages, temperature, 0.1)
    numbers = advantages.tolist()
    mean = sum(math.exp(a / eta) for a in numbers) / 20
    assert found.item() == pytest.approx(eta * 0.1 + eta * math.log(mean), rel=1e-6)
    found.backward()
    assert temperature.grad.item() == pytest.approx(0.1 - divergence(weights(numbers, eta)))


@pytest.mark.parametrize("epsilon", [0.01, 0.1, 0.5])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_where_the_dual_is_least_the_weights_differ_by_epsilon(epsilon, scale):
    """Whatever the scale of the advantages. Found on a grid that is made finer."""
    torch.manual_seed(0)
    advantages = scale * torch.randn(20).double()
    low, high = math.log(scale) - 5, math.log(scale) + 5
    for _ in range(8):
        grid = torch.linspace(low, high, 41).double().exp()
        values = [script.temperature_loss(advantages, eta, epsilon).item() for eta in grid]
        best, width = grid[int(np.argmin(values))].log().item(), (high - low) / 20
        low, high = best - width, best + width
    found = divergence(weights(advantages.tolist(), math.exp(best)))
    assert found == pytest.approx(epsilon, rel=1e-3)


def test_equal_advantages_keep_everything_finite():
    advantages, eta = torch.zeros(4), torch.tensor(script.LEAST_ETA)
    assert script.temperature_loss(advantages, eta, 0.1).isfinite()
    assert script.policy_loss(torch.full((4,), -1.5), advantages, eta).item() == 1.5
    agent = script.Agent(2, 3, norm_obs=False)
    with torch.no_grad():
        agent.duals[0] = -1e4
    assert agent.eta_and_alpha()[0].item() == pytest.approx(script.LEAST_ETA)


# ---- The gradient of all -------------------------------------------------------------------------


class Table(nn.Module):
    """Logits and a value for each state, and the dual variables. An observation is one-hot."""

    def __init__(self, logits, values, duals=(0.4, -0.3)):
        super().__init__()
        self.numbers = nn.Parameter(torch.cat([logits, values[:, None]], 1))
        self.duals = nn.Parameter(torch.tensor(duals).double())

    def forward(self, obs):
        return obs @ self.numbers[:, :-1], obs @ self.numbers[:, -1]

    def eta_and_alpha(self):
        return self.duals[0].exp(), nn.functional.softplus(self.duals[1])


def example():
    """A table of 3 states and 4 actions, and 12 steps by a policy that was somewhat different."""
    torch.manual_seed(0)
    table = Table(torch.randn(3, 4).double(), torch.randn(3).double())
    states, actions = torch.randint(3, (12,)), torch.randint(4, (12,))
    old = (table.numbers[:, :-1] + 0.5 * torch.randn(3, 4).double()).log_softmax(1).detach()
    obs = torch.eye(3).double()[states]
    batch = script.Batch(obs, actions, old[states], *torch.randn(2, 12).double())
    return table, states.tolist(), batch


def objectives(numbers, duals, states, batch, args):
    """J_pi, g, J_alpha, J_V and the KL, once more from the equations, row by row."""
    log_pi = numbers[:, :-1] - np.log(np.exp(numbers[:, :-1]).sum(1, keepdims=True))
    eta, alpha = math.exp(duals[0]), math.log(1 + math.exp(duals[1]))
    old, kl, value_loss = batch.log_pi_old.numpy(), 0.0, 0.0
    for b, s in enumerate(states):
        kl += sum(math.exp(p) * (p - q) for p, q in zip(old[b], log_pi[s])) / 12
        value_loss += (numbers[s, -1] - batch.returns[b].item()) ** 2 / 2 / 12
    order = sorted(range(12), key=lambda b: -batch.advantages[b].item())[:6]
    advantages = [batch.advantages[b].item() for b in order]
    shares = weights(advantages, eta)
    likelihood = sum(w * log_pi[states[b], batch.actions[b]] for w, b in zip(shares, order))
    mean = sum(math.exp(a / eta) for a in advantages) / 6
    dual = eta * (args.epsilon_eta + math.log(mean))
    return -likelihood, dual, alpha * (args.epsilon_alpha - kl), value_loss, kl, alpha


def slope(function, before, h=1e-6):
    """Of a function of an array, by differences."""
    gradient = np.zeros_like(before)
    for place in np.ndindex(before.shape):
        ends = []
        for change in (h, -h):
            changed = before.copy()
            changed[place] += change
            ends.append(function(changed))
        gradient[place] = (ends[0] - ends[1]) / (2 * h)
    return gradient


@pytest.mark.parametrize("flags", [{}, {"epsilon_eta": 1.0}, {"epsilon_alpha": 0.5}])
def test_each_objective_moves_what_it_is_named_after(flags):
    """Policy and values go down J_pi and J_V, eta down g, alpha down J_alpha; nothing else."""
    args = script.Args(**flags)
    table, states, batch = example()
    numbers, duals = (part.detach().numpy().copy() for part in (table.numbers, table.duals))

    def for_the_networks(changed):
        loss, _, _, value_loss, kl, alpha = objectives(changed, duals, states, batch, args)
        return loss + alpha * kl + value_loss

    def for_the_duals(changed):
        _, dual, multiplier, *_ = objectives(numbers, changed, states, batch, args)
        return dual + multiplier

    table.numbers.grad = torch.ones_like(table.numbers)  # what is left over is no matter
    metrics = script.update(table, torch.optim.SGD(table.parameters(), lr=0.1), batch, args)
    moved, expected = table.numbers.detach(), numbers - 0.1 * slope(for_the_networks, numbers)
    np.testing.assert_allclose(moved, expected, atol=1e-7)
    moved, expected = table.duals.detach(), duals - 0.1 * slope(for_the_duals, duals)
    np.testing.assert_allclose(moved, expected, atol=1e-7)
    loss, _, _, value_loss, kl, alpha = objectives(numbers, duals, states, batch, args)
    pi = np.exp(numbers[:, :-1]) / np.exp(numbers[:, :-1]).sum(1, keepdims=True)
    entropies = -(pi * np.log(pi)).sum(1)
    expected = {
        "losses/policy_loss": loss, "losses/value_loss": value_loss, "losses/kl": kl,
        "losses/entropy": np.mean(entropies[states]), "losses/temperature": math.exp(duals[0]),
        "losses/kl_multiplier": alpha,
    }  # fmt: skip
    assert {tag: value.item() for tag, value in metrics.items()} == pytest.approx(expected)
    assert not any(value.requires_grad for value in metrics.values())


@pytest.mark.parametrize("epsilon_alpha, grows", [(1e-4, True), (10.0, False)])
def test_the_multiplier_grows_where_the_limit_is_passed(epsilon_alpha, grows):
    table, _, batch = example()
    before = table.eta_and_alpha()[1].item()
    optimizer = torch.optim.SGD(table.parameters(), lr=0.1)
    metrics = script.update(table, optimizer, batch, script.Args(epsilon_alpha=epsilon_alpha))
    assert 1e-4 < metrics["losses/kl"] < 10
    assert (table.eta_and_alpha()[1].item() > before) == grows


def test_without_a_limit_the_policy_becomes_the_weighted_actions():
    """In one state: the probability of an action is the sum of the weights of its steps."""
    torch.manual_seed(0)
    table = Table(torch.zeros(1, 4).double(), torch.zeros(1).double(), duals=(0.2, -50.0))
    actions, advantages = torch.randint(4, (30,)), torch.randn(30).double()
    old = torch.full((30, 4), -math.log(4)).double()
    batch = script.Batch(torch.ones(30, 1).double(), actions, old, advantages, advantages)
    optimizer = torch.optim.SGD([table.numbers], lr=1.0)
    for _ in range(2000):
        script.update(table, optimizer, batch, script.Args())
    better = sorted(range(30), key=lambda b: -advantages[b].item())[:15]
    expected = np.zeros(4)
    for weight, b in zip(weights([advantages[b].item() for b in better], math.exp(0.2)), better):
        expected[actions[b]] += weight
    np.testing.assert_allclose(table.numbers.detach()[0, :4].softmax(0), expected, atol=1e-3)


def test_kl_stays_near_its_limit():
    """Against advantages that would move the policy far: alpha finds the balance."""
    table = Table(torch.zeros(1, 2).double(), torch.zeros(1).double(), duals=(0.0, 0.54))
    actions = torch.arange(40) % 2
    old = torch.full((40, 2), -math.log(2)).double()
    advantages = torch.where(actions == 1, 1.0, -1.0).double()
    batch = script.Batch(torch.ones(40, 1).double(), actions, old, advantages, advantages)
    optimizer = torch.optim.SGD(table.parameters(), lr=0.05)
    for _ in range(6000):
        metrics = script.update(table, optimizer, batch, script.Args(epsilon_alpha=0.05))
    assert metrics["losses/kl"].item() == pytest.approx(0.05, rel=0.1)
    assert table.numbers[0, 1] > table.numbers[0, 0]


def test_networks_and_dual_variables_have_learning_rates_of_their_own():
    agent = script.Agent(2, 3, norm_obs=True)
    args = script.Args(learning_rate=0.5, dual_learning_rate=0.25)
    networks, duals = script.make_optimizer(args, agent).param_groups
    assert (networks["lr"], duals["lr"], networks["eps"]) == (0.5, 0.25, 1e-5)
    assert duals["params"] == [agent.duals]
    both = [*networks["params"], *duals["params"]]
    assert {id(part) for part in both} == {id(part) for part in agent.parameters()}
    assert torch.stack(agent.eta_and_alpha()).tolist() == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize("norm_obs", [True, False])
def test_networks_start_and_act_as_those_of_ppo(norm_obs):
    """The same weights from the same seed, also in NumPy; the evaluation is greedy."""
    agents, obs = [], torch.randn(50, 4)
    for module in (script, ppo_cartpole):
        torch.manual_seed(0)
        agents.append(module.Agent(4, 3, norm_obs))
    for ours, theirs in zip(agents[0](obs), agents[1](obs), strict=True):
        assert torch.equal(ours, theirs)
    logits = agents[0](obs)[0].detach()
    np.testing.assert_allclose(script.Actor(agents[0])(obs.numpy()), logits, rtol=1e-4, atol=1e-6)
    found = script.play(script.Args(), agents[0], obs.numpy())
    assert found.tolist() == logits.argmax(1).tolist() and len(set(found)) > 1


# ---- The loop ------------------------------------------------------------------------------------

FEW = dict(
    env_id="Diary-v0", total_timesteps=600, num_envs=3, num_steps=20, num_minibatches=2,
    update_epochs=2, eval_episodes=2, learning_rate=1e-2, gamma=0.98, gae_lambda=0.8,
    norm_obs=False, norm_reward=False,
)  # fmt: skip


def test_rollouts_are_what_really_happened(tmp_path, monkeypatch):
    """Also where an episode ends: its last observation, not the next one's first."""
    calls = recorded(monkeypatch, script, "make_batch")
    _, points = train(script, tmp_path, **FEW)
    steps = side_by_side(3)
    assert len(calls) == 10 and len(steps) == 600
    for number, ((_, *rollout, _), _) in enumerate(calls):
        for i in range(3):
            happened = Diary.made[i].steps[number * 20 : (number + 1) * 20]
            for column, expected in zip(rollout, zip(*happened), strict=True):
                np.testing.assert_allclose(column[:, i], np.array(expected, np.float32), rtol=1e-6)
    check_episodes(points, steps)


def test_a_batch_is_every_step_with_its_advantage_and_the_old_policy(tmp_path, monkeypatch):
    """Of the agent that played: the first one is made from the seed."""
    rollouts = recorded(monkeypatch, script, "make_batch")
    learned = recorded(monkeypatch, script, "learn")
    train(script, tmp_path, **FEW | {"seed": 3, "gamma": 0.7, "gae_lambda": 0.6})
    _, obs, actions, rewards, next_obs, terminated, truncated, _ = rollouts[0][0]
    torch.manual_seed(3)
    agent = script.Agent(2, 3, norm_obs=False)
    logits, values = agent(obs)
    ends = terminated, truncated
    advantages = script.gae(rewards, values, agent(next_obs)[1], *ends, 0.7, 0.6)
    columns = obs, actions, logits.softmax(-1).log(), advantages, advantages + values
    _, _, batch, _ = learned[0][0]
    for part, expected in zip(batch, columns, strict=True):
        torch.testing.assert_close(part, expected.detach().flatten(0, 1))
        assert not part.requires_grad


def test_before_the_first_gradient_step_of_a_rollout_there_is_no_divergence(tmp_path):
    _, points = train(script, tmp_path, **FEW | {"update_epochs": 1, "num_minibatches": 1})
    assert all(abs(value) < 1e-6 for _, value in points["losses/kl"])


@pytest.mark.parametrize("anneal_lr", [True, False])
def test_metrics_and_learning_rate_are_logged(tmp_path, monkeypatch, anneal_lr):
    check_ppo_log(script, tmp_path, monkeypatch, **FEW, anneal_lr=anneal_lr)


def test_statistics_change_only_between_updates_and_the_next_rollout(tmp_path, monkeypatch):
    check_ppo_statistics(script, tmp_path, monkeypatch, **FEW | {"norm_obs": True})


@pytest.mark.parametrize("norm_reward", [True, False])
def test_rewards_are_scaled_for_learning_only(tmp_path, monkeypatch, norm_reward):
    check_ppo_rewards(script, tmp_path, monkeypatch, **FEW | {"norm_reward": norm_reward, "gamma": 0.9})


@pytest.mark.parametrize("env_id, low, high", [
    ("Truncates-v0", 4.9, 5.1), ("Terminates-v0", 1.7, 1.9)
])  # fmt: skip
def test_a_time_limit_is_not_the_end_of_the_world(tmp_path, env_id, low, high):
    """Truncated for ever, a reward of 1 is worth 1 / (1 - 0.8) = 5.

    If every third step terminates, the three, which look alike, are worth 2.44, 1.8 and 1.
    """
    flags = {"env_id": env_id, "gamma": 0.8, "gae_lambda": 0.9, "total_timesteps": 3000}
    state, _ = train(script, tmp_path, **FEW | flags | {"update_epochs": 20, "num_minibatches": 1})
    agent = script.Agent(1, 2, norm_obs=False)
    agent.load_state_dict(state["network"])
    assert low < agent(torch.ones(1, 1))[1].item() < high


def test_every_setting_of_the_algorithm_changes_the_outcome(tmp_path):
    def outcome(**settings):
        state, _ = train(script, tmp_path, **FEW | {"total_timesteps": 240} | settings)
        parts = state["network"].items()
        return [value.tolist() for name, value in parts if "statistics" not in name]

    check_settings(script, outcome, {
        "seed": 2, "total_timesteps": 250, "num_envs": 4, "learning_rate": 5e-3, "anneal_lr": False,
        "num_steps": 25, "gamma": 0.3, "gae_lambda": 0.2, "num_minibatches": 3, "update_epochs": 3,
        "epsilon_eta": 0.2, "epsilon_alpha": 0.1, "dual_learning_rate": 0.1, "norm_obs": True,
        "norm_reward": True,
    })  # fmt: skip
