"""The mathematics of impala_cartpole.py: against the paper's sum, in closed form, by enumeration.

What it has word for word from ppo_cartpole.py or a2c_cartpole.py is tested there.
"""

import copy
import inspect
import itertools
import math

import a2c_cartpole
import impala_cartpole as script
import numpy as np
import ppo_cartpole
import pytest
import torch
from diary import (
    Diary, check_episodes, check_ppo_rewards, check_settings, recorded, side_by_side, train,
)  # fmt: skip
from torch import nn
from torch.distributions import Categorical

# For the tests that all scripts share.
TINY = (
    "--total-timesteps 2000 --num-envs 4 --lag 3 --norm-obs --norm-reward "
    "--checkpoint-frequency 500 --eval-frequency 700 --eval-episodes 5"
)
OWN = "discrete"
OWN_FLAGS = "--total-timesteps 20000"
WRONG_SPACES = ["Pendulum-v1"]
DIVERGES = "--learning-rate 1e30"
BAD = [
    ("--num-steps 0", "--num-steps"),
    ("--num-envs 1 --num-steps 1", "--num-steps"),
    ("--trace-lambda 1.01", "--trace-lambda"),
    ("--lag -1", "--lag"),
    ("--lag 1001", "--lag"),
    ("--rho-bar 0.9", "--rho-bar"),
    ("--c-bar inf", "--c-bar"),
    ("--total-timesteps 1024", "--lag"),
    ("--vf-coef nan", "--vf-coef"),
    ("--clip-coef 0.2", "--clip-coef"),  # PPO's
]
LEARNS = [("--seed 1 --total-timesteps 150000", 195)]  # chance: 22


@pytest.mark.parametrize("module, names", [
    (ppo_cartpole, ["Actor", "Agent", "RewardScaler", "RunningStatistics", "explained_variance",
                    "gumbel_noise", "layer", "log_prob_and_entropy", "make_network"]),
    (a2c_cartpole, ["policy_gradient_loss", "update"]),
])  # fmt: skip
def test_what_others_have_too_is_the_same_and_tested_there(module, names):
    for name in names:
        ours, theirs = (inspect.getsource(getattr(m, name)) for m in (script, module))
        if name != "update":
            assert ours == theirs
        else:  # one gradient step, but with another batch
            assert ours.split('"""')[::2] == theirs.split('"""')[::2]


# ---- v_trace -------------------------------------------------------------------------------------


def by_equation_1(ratios, rewards, values, next_values, ends, args):
    """The sum over t of gamma^(t-s) * (product of c_i, i = s to t-1) * rho_t * delta_t; and A_s."""
    deltas = [
        r + args.gamma * (0 if end == "terminates" else following) - value
        for r, value, following, end in zip(rewards, values, next_values, ends)
    ]
    errors, advantages = [], []
    for s in range(len(deltas)):
        error = 0.0
        for t in range(s, len(deltas)):
            if any(end != "goes on" for end in ends[s:t]):
                break
            c = [args.trace_lambda * min(args.c_bar, ratio) for ratio in ratios[s:t]]
            error += args.gamma ** (t - s) * math.prod(c) * min(args.rho_bar, ratios[t]) * deltas[t]
        errors.append(error)
    for s, delta in enumerate(deltas):  # r + gamma * v_{s+1} - V(s), where v is V + error
        goes_on = ends[s] == "goes on" and s + 1 < len(deltas)
        following = errors[s + 1] if goes_on else 0.0
        advantages.append(min(args.rho_bar, ratios[s]) * (delta + args.gamma * following))
    return errors, advantages


@pytest.mark.parametrize("flags", [
    {}, {"rho_bar": 3.0, "c_bar": 0.8}, {"rho_bar": 1e30, "trace_lambda": 1.0},
    {"trace_lambda": 0.0}, {"gamma": 1.0, "c_bar": 0.5, "rho_bar": 2.0},
])  # fmt: skip
def test_v_trace_is_the_papers_sum_whatever_ends_where(flags):
    """All 27 ways in which three of four steps can go on, terminate and be truncated, as columns."""
    args = script.Args(**{"gamma": 0.9, "trace_lambda": 0.7} | flags)
    ways = [(*ends, "goes on")
            for ends in itertools.product(["goes on", "terminates", "truncates"], repeat=3)]  # fmt: skip
    torch.manual_seed(0)
    ratios = torch.randn(4, 27).double().exp()
    rewards, values, next_values = torch.randn(3, 4, 27).double()
    for i, ends in enumerate(ways):
        for t in range(3):
            if ends[t] == "goes on":
                next_values[t, i] = values[t + 1, i]
    masks = [torch.tensor([[way[t] == kind for way in ways] for t in range(4)])
             for kind in ("terminates", "truncates")]  # fmt: skip
    found = script.v_trace(ratios, rewards, values, next_values, *masks, args)
    for i, ends in enumerate(ways):
        columns = (x[:, i].tolist() for x in (ratios, rewards, values, next_values))
        expected = by_equation_1(*columns, ends, args)
        assert [x[:, i].tolist() for x in found] == [pytest.approx(x) for x in expected]


@pytest.mark.parametrize("trace_lambda", [0.0, 0.6, 1.0])
def test_on_policy_it_is_gae(trace_lambda):
    """v - V is then GAE's advantage of the same lambda; A is GAE's where lambda is 1, or else
    delta + gamma * that of the next step: its own delta is not damped.
    """
    torch.manual_seed(1)
    rewards, values, next_values = torch.randn(3, 6, 2)
    terminated = torch.zeros(6, 2, dtype=torch.bool)
    terminated[2, 0] = True
    columns = rewards, values, next_values, terminated, terminated.roll(2, 0)
    args = script.Args(gamma=0.9, trace_lambda=trace_lambda)
    errors, advantages = script.v_trace(torch.ones(6, 2), *columns, args)
    expected = a2c_cartpole.gae(*columns, 0.9, trace_lambda)
    torch.testing.assert_close(errors, expected)
    if trace_lambda == 1:
        torch.testing.assert_close(advantages, expected)


@pytest.mark.parametrize("rho_bar", [1.0, 1.5, 2.0, 1e30])
@pytest.mark.parametrize("trace_lambda", [0.2, 1.0])
def test_v_comes_to_rest_at_the_value_of_the_policy_between(rho_bar, trace_lambda):
    """Theorem 1: whatever lambda, of pi_rho(a) = min(rho_bar * mu, pi) / their sum over a.

    Two states, two actions; the expected error, over all ways in which three steps can go, is 0.
    """
    double = {"dtype": torch.float64}
    mu = torch.tensor([[0.8, 0.2], [0.3, 0.7]], **double)
    pi = torch.tensor([[0.4, 0.6], [0.5, 0.5]], **double)
    rewards = torch.tensor([[1.0, -2.0], [0.5, 3.0]], **double)
    leads_to = torch.tensor([[0, 1], [1, 0]])  # [state, action]
    between = (rho_bar * mu).minimum(pi)
    between = between / between.sum(1, keepdim=True)
    transition = torch.zeros(2, 2).double()
    for s, a in itertools.product(range(2), range(2)):
        transition[s, leads_to[s, a]] += between[s, a]
    expected_rewards = (between * rewards).sum(1)
    values = torch.linalg.solve(torch.eye(2).double() - 0.9 * transition, expected_rewards)
    args = script.Args(gamma=0.9, trace_lambda=trace_lambda, rho_bar=rho_bar, c_bar=1.0)
    for first in range(2):
        ways = list(itertools.product(range(2), repeat=3))  # actions of three steps
        states, probs = torch.full((3, len(ways)), first), torch.ones(len(ways)).double()
        actions = torch.tensor(ways).T
        for t in range(3):
            if t > 0:
                states[t] = leads_to[states[t - 1], actions[t - 1]]
            probs *= mu[states[t], actions[t]]
        ratios = (pi / mu)[states, actions]
        next_values = values[leads_to[states, actions]]
        never = torch.zeros(3, len(ways), dtype=torch.bool)
        steps = ratios, rewards[states, actions], values[states], next_values, never, never
        errors, _ = script.v_trace(*steps, args)
        assert (probs * errors[0]).sum().item() == pytest.approx(0.0, abs=1e-12)


# ---- The gradient --------------------------------------------------------------------------------


class Table(nn.Module):
    """Logits and a value for each state. An observation is a state, one-hot."""

    def __init__(self, logits, values):
        super().__init__()
        self.numbers = nn.Parameter(torch.cat([logits, values[:, None]], 1))

    def forward(self, obs):
        return obs @ self.numbers[:, :-1], obs @ self.numbers[:, -1]


# In state 0, action 1 ends the episode with 0.6, and action 0 leads to state 1, whose actions pay 1
# and -0.5. mu takes action 0 with probability 0.6, and 0.3 in state 1; 50 of its episodes are: 20 of
# the first kind, 9 of the second, 21 of the third. pi takes action 0 with P and Q.
P, Q, MU = 0.2, 0.7, torch.tensor([[0.6, 0.4], [0.3, 0.7]]).double()
EPISODES = [(20, [(0, 1, 0.6)]), (9, [(0, 0, 0.0), (1, 0, 1.0)]), (21, [(0, 0, 0.0), (1, 1, -0.5)])]


@pytest.mark.parametrize("values", [[0.0, 0.0], [5.0, -3.0]])
def test_gradient_is_that_of_the_return_of_pi_though_mu_played(values):
    """A rollout in which every episode happens as often as it is probable leaves no noise.

    If no ratio is limited, any V is a baseline that changes nothing. State 1 counts as often as mu
    comes there: 0.6 / P times as often as pi, which V-trace does not correct.
    """
    numbers = torch.tensor([[P, 1 - P], [Q, 1 - Q]]).double().log()
    table = Table(numbers, torch.tensor(values).double())
    steps = [(*step, end == len(episode)) for count, episode in EPISODES for _ in range(count)
             for end, step in enumerate(episode, 1)]  # fmt: skip
    states, actions, rewards, terminated = map(torch.tensor, zip(*steps))
    obs = torch.eye(2).double()[states][:, None]  # (T, 1, 2)
    next_obs = obs.roll(-1, 0)  # after an end it is that of the next episode, which must not count
    columns = obs, actions[:, None], rewards.double()[:, None], next_obs, terminated[:, None]
    never, mu_logits = torch.zeros_like(terminated)[:, None], MU.log()[states][:, None] + 7
    args = script.Args(gamma=1.0, trace_lambda=1.0, rho_bar=1e9, vf_coef=0.0,
                       ent_coef=0.0, max_grad_norm=0)  # fmt: skip
    batch = script.make_batch(table, *columns, never, mu_logits, args)
    torch.testing.assert_close(batch.log_ratios.exp(), (numbers.exp() / MU)[states, actions])
    script.compute_gradient(table, batch, args)

    logits = numbers.clone().requires_grad_()
    (p, _), (q, _) = logits.softmax(-1)
    expected_return = p * (q * 1.0 + (1 - q) * -0.5) + (1 - p) * 0.6
    (gradient,) = torch.autograd.grad(expected_return, logits)
    gradient[1] *= 0.6 / P
    found = -table.numbers.grad[:, :2] * len(steps) / 50  # of the mean over steps; J is of episodes
    torch.testing.assert_close(found, gradient)
    assert not table.numbers.grad[:, 2].any()


def test_without_v_trace_all_ratios_count_as_1():
    """It is A2C's batch then, with lambda 1; but the ratios are told."""
    torch.manual_seed(0)
    agent = script.Agent(2, 3, norm_obs=False)
    obs, next_obs = torch.randn(2, 5, 2, 2)
    actions, rewards = torch.randint(3, (5, 2)), torch.randn(5, 2)
    terminated, truncated = torch.rand(2, 5, 2) < 0.2
    steps, mu_logits = (
        (obs, actions, rewards, next_obs, terminated, truncated),
        torch.randn(5, 2, 3),
    )
    found = {v_trace: script.make_batch(agent, *steps, mu_logits,
                                        script.Args(v_trace=v_trace, trace_lambda=1.0))
             for v_trace in (True, False)}  # fmt: skip
    theirs = a2c_cartpole.make_batch(agent, *steps, a2c_cartpole.Args(gae_lambda=1.0))
    torch.testing.assert_close(found[False].advantages, theirs.advantages)
    torch.testing.assert_close(found[False].returns, theirs.returns)
    assert torch.equal(found[True].log_ratios, found[False].log_ratios)
    assert not torch.allclose(found[True].returns, found[False].returns)
    log_ratios = agent(obs)[0].log_softmax(2) - mu_logits.log_softmax(2)
    expected = log_ratios.gather(2, actions[..., None]).flatten()
    torch.testing.assert_close(found[True].log_ratios, expected)


def example():
    """A table of 3 states and 4 actions, and 12 steps."""
    torch.manual_seed(0)
    table = Table(torch.randn(3, 4).double(), torch.randn(3).double())
    states, actions = torch.randint(3, (12,)), torch.randint(4, (12,))
    obs = torch.eye(3).double()[states]
    log_ratios = torch.rand(12).double() - 0.5
    return table, states, script.Batch(obs, actions, log_ratios, *torch.randn(3, 12).double())


@pytest.mark.parametrize("flags", [
    {}, {"ent_coef": 0.5}, {"vf_coef": 2.0}, {"ent_coef": 0.1, "vf_coef": 0.0}
])  # fmt: skip
def test_update_takes_one_step_down_the_gradient_by_hand(flags):
    """Of a softmax: d log pi(a) / d logit_k = [k = a] - pi_k; d entropy = -pi_k (log pi_k + H).

    A mean over the steps, not a sum, of advantages as they are, neither centred nor scaled.
    """
    settings = {"max_grad_norm": 0.0, "ent_coef": 0.01, "vf_coef": 0.5, "rho_bar": 1.2}
    args = script.Args(**settings | flags)
    table, states, batch = example()
    before = table.numbers.detach().clone()
    pi, gradient = before[:, :-1].softmax(1), torch.zeros_like(before)
    entropies = Categorical(pi).entropy()
    for s, action, _, advantage, _, target in zip(states, *batch[1:]):
        one_hot = torch.eye(4).double()[action]
        gradient[s, :-1] -= advantage * (one_hot - pi[s])
        gradient[s, :-1] += args.ent_coef * pi[s] * (pi[s].log() + entropies[s])
        gradient[s, -1] += args.vf_coef * (before[s, -1] - target)
    table.numbers.grad = torch.ones_like(table.numbers)  # a gradient that is left over is no matter
    metrics = script.update(table, torch.optim.SGD(table.parameters(), lr=0.1), batch, args)
    torch.testing.assert_close(table.numbers.detach(), before - 0.1 * gradient / 12)
    log_probs = pi.log()[states, batch.actions]
    assert {tag: value.item() for tag, value in metrics.items()} == pytest.approx({
        "losses/policy_loss": -(log_probs * batch.advantages).mean().item(),
        "losses/value_loss": ((before[states, -1] - batch.returns) ** 2).mean().item() / 2,
        "losses/entropy": entropies[states].mean().item(),
        "losses/approx_kl": np.mean([math.exp(x) - 1 - x for x in batch.log_ratios]),
        "losses/clipfrac": np.mean([math.exp(x) > args.rho_bar for x in batch.log_ratios]),
    })  # fmt: skip
    assert not any(value.requires_grad for value in metrics.values())


def test_the_gradient_of_all_weights_is_clipped_as_one_vector():
    moves = []
    for limit in (0.0, 1e9, 0.01):  # 0: not clipped
        torch.manual_seed(0)
        agent = script.Agent(2, 3, norm_obs=False)
        before = nn.utils.parameters_to_vector(agent.parameters()).detach()
        batch = script.Batch(torch.randn(8, 2), torch.arange(8) % 3, torch.zeros(8),
                             *torch.randn(3, 8))  # fmt: skip
        optimizer = torch.optim.SGD(agent.parameters(), lr=1.0)
        script.update(agent, optimizer, batch, script.Args(max_grad_norm=limit))
        moves.append(nn.utils.parameters_to_vector(agent.parameters()).detach() - before)
    assert torch.equal(moves[0], moves[1]) and moves[0].norm() > 0.1
    expected = 0.01 * moves[0] / moves[0].norm()
    torch.testing.assert_close(moves[2], expected, rtol=1e-3, atol=1e-6)


def test_a_rollout_of_two_steps_is_the_smallest():
    """The explained variance of one is not a number."""
    script.Args(num_envs=2, num_steps=1)
    script.Args(num_envs=1, num_steps=2)
    with pytest.raises(ValueError, match="--num-steps"):
        script.Args(num_envs=1, num_steps=1)


def test_a_lag_that_leaves_nothing_to_learn_from_is_refused():
    script.Args(lag=16, num_envs=8, num_steps=8, total_timesteps=1025)
    with pytest.raises(ValueError, match="--lag"):
        script.Args(lag=16, num_envs=8, num_steps=8, total_timesteps=1024)


# ---- The loop ------------------------------------------------------------------------------------

FEW = dict(
    env_id="Diary-v0", total_timesteps=600, num_envs=3, num_steps=20, lag=2, eval_episodes=2,
    learning_rate=1e-2,
)  # fmt: skip


@pytest.mark.parametrize("num_envs, num_steps, lag", [(3, 20, 2), (1, 7, 0), (5, 1, 30)])
def test_rollouts_are_what_really_happened(tmp_path, monkeypatch, num_envs, num_steps, lag):
    """In their order, the last ones not yet. Where an episode ends: its last observation."""
    calls = recorded(monkeypatch, script, "make_batch")
    flags = FEW | {"num_envs": num_envs, "num_steps": num_steps, "lag": lag}
    state, points = train(script, tmp_path, **flags)
    rounds, steps = math.ceil(600 / (num_envs * num_steps)), side_by_side(num_envs)
    assert len(calls) == rounds - lag and len(steps) == rounds * num_envs * num_steps
    assert state["envs"]["steps"] == len(steps)
    waiting = [[None, *rollout, None] for rollout in state["queue"]["rollouts"]]
    assert len(waiting) == lag
    for number, (_, *rollout, _, _) in enumerate([call[0] for call in calls] + waiting):
        if number >= rounds - lag:
            rollout = waiting[number - rounds + lag][1:-2]
        for i in range(num_envs):
            happened = Diary.made[i].steps[number * num_steps : (number + 1) * num_steps]
            for column, expected in zip(rollout, zip(*happened), strict=True):
                np.testing.assert_allclose(column[:, i], np.array(expected, np.float32), rtol=1e-6)
    check_episodes(points, steps)


@pytest.mark.parametrize("lag", [0, 1, 3])
@pytest.mark.parametrize("norm_obs", [True, False])
def test_the_learner_is_always_as_many_updates_ahead(tmp_path, monkeypatch, lag, norm_obs):
    """mu's logits are those of the agent before the updates that the lag leaves out."""
    agents, logits = [], []
    make_batch = script.make_batch

    def noting(agent, *others):
        agents.append(copy.deepcopy(agent))
        logits.append(others[6].clone())
        return make_batch(agent, *others)

    monkeypatch.setattr(script, "make_batch", noting)
    calls = recorded(monkeypatch, script, "update")
    train(script, tmp_path, **FEW | {"lag": lag, "norm_obs": norm_obs})
    assert len(agents) == len(calls) == 10 - lag
    for k, ((_, _, batch, _), _) in enumerate(calls):  # rollout k
        mu, pi = agents[max(0, k - lag)], agents[k]
        with torch.no_grad():
            torch.testing.assert_close(mu(batch.obs)[0], logits[k].flatten(0, 1))
            log_ratios = pi(batch.obs)[0].log_softmax(1) - mu(batch.obs)[0].log_softmax(1)
        expected = log_ratios.gather(1, batch.actions[:, None]).squeeze(1)
        torch.testing.assert_close(batch.log_ratios, expected, atol=1e-6, rtol=1e-4)
        assert batch.log_ratios.abs().max() < 1e-5 or min(lag, k) > 0


def test_every_environment_gets_a_sample_of_the_policy_for_what_it_shows(tmp_path, monkeypatch):
    """Here one that is as good as certain."""

    def choose(obs):
        return (obs[:, 0] * 1000).astype(int) % 3

    monkeypatch.setattr(script.Actor, "__call__", lambda self, obs: 1e3 * np.eye(3)[choose(obs)])
    train(script, tmp_path, **FEW)
    seen, chosen, *_ = zip(*(step for env in Diary.made for step in env.steps))
    assert list(chosen) == choose(np.array(seen, np.float32)).tolist() and len(set(chosen)) == 3


def test_actions_are_samples_of_mu(tmp_path, monkeypatch):
    """By Gumbel noise, new for each rollout."""
    noises = recorded(monkeypatch, script, "gumbel_noise")
    calls = recorded(monkeypatch, script, "make_batch")
    train(script, tmp_path, **FEW)
    assert len(noises) == len(calls) + 2 and not np.array_equal(noises[0][1], noises[1][1])
    for (shape, noise), ((_, _, actions, *_, mu_logits, _), _) in zip(noises, calls):
        assert shape == (20, 3, 3)
        assert actions.tolist() == (mu_logits.numpy() + noise).argmax(2).tolist()


def test_a_batch_is_every_step_once_with_its_advantage(tmp_path, monkeypatch):
    rollouts = recorded(monkeypatch, script, "make_batch")
    learned = recorded(monkeypatch, script, "update")
    train(script, tmp_path, **FEW | {"gamma": 0.7, "trace_lambda": 0.6})
    assert len(rollouts) == len(learned) == 8
    for k, (((agent, *steps, _), _), ((_, optimizer, batch, args), _)) in enumerate(
        zip(rollouts, learned)
    ):
        obs, actions, rewards, next_obs, terminated, truncated, mu_logits = steps
        with torch.no_grad():
            (logits, values), next_values = agent(obs), agent(next_obs)[1]
        index = actions[..., None]
        log_pi, log_mu = (x.log_softmax(2).gather(2, index) for x in (logits, mu_logits))
        log_ratios = (log_pi - log_mu).squeeze(2)
        columns = rewards, values, next_values, terminated, truncated
        errors, advantages = script.v_trace(log_ratios.exp(), *columns, args)
        columns = obs, actions, log_ratios, advantages, values, values + errors
        for part, expected in zip(batch, columns, strict=True):
            torch.testing.assert_close(part, expected.flatten(0, 1))
            assert not part.requires_grad
        assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-2 * (1 - (k + 2) / 10))


@pytest.mark.parametrize("anneal_lr", [True, False])
def test_metrics_and_learning_rate_are_logged(tmp_path, monkeypatch, anneal_lr):
    """Here after every rollout but the last; before the first gradient step, only the rate."""
    monkeypatch.setattr(script, "LOG_FREQUENCY", 60)
    learned = recorded(monkeypatch, script, "update")
    _, points = train(script, tmp_path, **FEW, anneal_lr=anneal_lr)
    assert len(learned) == 8 and len(points["losses/entropy"]) == 7
    rates = [1e-2 * (1 - k / 10 if anneal_lr else 1) for k in range(9)]
    assert [value for _, value in points["charts/learning_rate"]] == pytest.approx(rates)
    for k, ((_, optimizer, batch, _), metrics) in enumerate(learned[:-1]):
        errors = (batch.returns - batch.values).var() / batch.returns.var()
        metrics |= {"losses/explained_variance": 1 - errors}
        for tag, value in metrics.items():
            assert points[tag][k] == (60 * (k + 3), pytest.approx(float(value), abs=1e-5)), tag
    assert type(optimizer) is torch.optim.Adam and optimizer.param_groups[0]["eps"] == 1e-5


def test_all_observations_that_were_learned_from_are_counted_once(tmp_path):
    state = train(script, tmp_path, **FEW, norm_obs=True)[0]
    seen = np.array([step[0] for _, step in side_by_side(3)])[: 8 * 60]
    network = state["network"]
    np.testing.assert_allclose(network["obs_statistics.mean"], seen.mean(0), rtol=1e-4)
    np.testing.assert_allclose(network["obs_statistics.variance"], seen.var(0), rtol=1e-3)


@pytest.mark.parametrize("lag, waiting", [(0, 0), (1, 1), (7, 7)])
def test_a_resumed_run_may_have_another_lag(tmp_path, monkeypatch, lag, waiting):
    """What waited for too long is learned from at once, in its order; nothing is lost."""
    rollouts = train(script, tmp_path, **FEW | {"lag": 4})[0]["queue"]["rollouts"]
    (folder,) = tmp_path.iterdir()
    calls = recorded(monkeypatch, script, "make_batch")
    flags = FEW | {"lag": lag, "total_timesteps": 1200, "resume": str(folder)}
    script.train(script.Args(**flags, runs_dir=str(tmp_path)))
    assert len(script.read_checkpoint(folder)["queue"]["rollouts"]) == waiting
    assert len(calls) == 20 - 6 - waiting
    for (_, *learned, _), rollout in zip([call[0] for call in calls], rollouts):
        assert all(map(torch.equal, learned, rollout))


@pytest.mark.parametrize("norm_reward", [True, False])
def test_rewards_are_scaled_for_learning_only(tmp_path, monkeypatch, norm_reward):
    flags = FEW | {"lag": 0, "norm_reward": norm_reward, "gamma": 0.9}
    check_ppo_rewards(script, tmp_path, monkeypatch, **flags)


@pytest.mark.parametrize("where", ["loss", "weight"])
def test_a_run_that_diverges_stops_and_is_not_saved(tmp_path, monkeypatch, where):
    update = script.update

    def spoil(agent, *others):
        metrics = update(agent, *others)
        if where == "loss":
            return metrics | {"losses/value_loss": torch.tensor(math.nan)}
        agent.critic[0].weight.data[0, 0] = math.inf
        return metrics

    monkeypatch.setattr(script, "update", spoil)
    monkeypatch.setattr(script, "LOG_FREQUENCY", 60)
    with pytest.raises(script.UsageError, match="not finite"):
        train(script, tmp_path, **FEW, checkpoint_frequency=60)
    (folder,) = tmp_path.iterdir()
    assert script.read_checkpoint(folder)["envs"]["steps"] == 120  # the first update is at 180


@pytest.mark.parametrize("env_id, low, high", [
    ("Truncates-v0", 4.9, 5.1), ("Terminates-v0", 1.65, 1.9)
])  # fmt: skip
def test_a_time_limit_is_not_the_end_of_the_world(tmp_path, env_id, low, high):
    """Truncated for ever, a reward of 1 is worth 1 / (1 - 0.8) = 5.

    If every third step terminates, the three, which look alike, are worth 2.44, 1.8 and 1.
    """
    flags = {"env_id": env_id, "gamma": 0.8, "total_timesteps": 20_000, "vf_coef": 1.0}
    flags |= {"num_steps": 6, "max_grad_norm": 10.0}
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
        "num_steps": 25, "gamma": 0.3, "lag": 1, "v_trace": False, "rho_bar": 1.001, "c_bar": 0.9,
        "trace_lambda": 0.2, "ent_coef": 0.1, "vf_coef": 0.1, "max_grad_norm": 0.01,
        "norm_obs": True, "norm_reward": True,
    })  # fmt: skip
