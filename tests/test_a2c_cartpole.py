"""The mathematics of a2c_cartpole.py: by hand, against brute force, against exact gradients.

What it has word for word from ppo_cartpole.py is tested there: networks, actor, running statistics.
"""

import inspect
import itertools
import math

import a2c_cartpole as script
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
    "--total-timesteps 2000 --num-envs 4 --norm-obs --norm-reward --checkpoint-frequency 500 "
    "--eval-frequency 700 --eval-episodes 5"
)
OWN = "discrete"
OWN_FLAGS = "--total-timesteps 20000"
WRONG_SPACES = ["Pendulum-v1"]
DIVERGES = "--learning-rate 1e30"
BAD = [
    ("--num-steps 0", "--num-steps"),
    ("--num-envs 1 --num-steps 1", "--num-steps"),
    ("--gae-lambda 1.01", "--gae-lambda"),
    ("--vf-coef nan", "--vf-coef"),
    ("--clip-coef 0.2", "--clip-coef"),  # PPO's
]
LEARNS = [("--seed 1 --total-timesteps 150000", 195)]  # chance: 22
# What others published, by the record's name after `<script>__`: shown beside our results.
PUBLISHED = {"CartPole-v1": "Zoo 500 (500k)", "Acrobot-v1": "Zoo -83.4 (500k)"}
# How speed.py measures the script, and beside what; its first lines explain the form.
SPEED = {
    "steps": 60_000,
    "first": 5_000,
    "peers": {
        "Stable-Baselines3's A2C": {
            "env_id": "CartPole-v1",
            "num_envs": 8,
            "settings": {"n_steps": 5, "device": "cpu"},
            "equal": "compiled",
        },
    },
    "flags": "--num-steps 5 --learning-rate 7e-4",
    "variants": {"compiled": "--compile", "not compiled": ""},
    "floors": {"floor": "1000 5000"},
}

# ---- gae -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [
    "Actor", "Agent", "RewardScaler", "RunningStatistics", "act", "explained_variance", "gae",
    "gumbel_noise", "layer", "log_prob_and_entropy", "make_network", "play",
])  # fmt: skip
def test_what_ppo_has_too_is_the_same_and_tested_there(name):
    ours, theirs = (inspect.getsource(getattr(module, name)) for module in (script, ppo_cartpole))
    assert ours == theirs


@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("ends", list(itertools.product(["goes on", "terminates", "truncates"],
                                                        repeat=3)))  # fmt: skip
def test_with_lambda_1_it_is_the_n_step_return_whatever_ends_where(gamma, ends):
    """Algorithm S3: R is V(s), or 0 at a true end, then r_i + gamma * R backwards; A = R - V(s_i).

    All 27 ways in which three steps can go on, terminate and be truncated.
    """
    rewards, values, next_values = [1.0, -2.0, 4.0], [0.5, 3.0, -1.0], [3.0, -1.0, 7.0]
    next_values = [10.0 + t if end != "goes on" else next_values[t] for t, end in enumerate(ends)]
    expected = []
    for t in range(3):
        total, k = 0.0, t  # rewards up to the end of the episode or of the rollout
        while True:
            total += gamma ** (k - t) * rewards[k]
            if ends[k] != "goes on" or k == 2:
                break
            k += 1
        if ends[k] != "terminates":
            total += gamma ** (k - t + 1) * next_values[k]
        expected.append(total - values[t])
    masks = [torch.tensor([[end == kind] for end in ends]) for kind in ("terminates", "truncates")]
    columns = [torch.tensor(column)[:, None] for column in (rewards, values, next_values)]
    found = script.gae(*columns, *masks, gamma, 1.0)
    assert found.squeeze(1).tolist() == pytest.approx(expected, abs=1e-5)


# ---- The gradient --------------------------------------------------------------------------------


class Table(nn.Module):
    """Logits and a value for each state. An observation is a state, one-hot."""

    def __init__(self, logits, values):
        super().__init__()
        self.numbers = nn.Parameter(torch.cat([logits, values[:, None]], 1))

    def forward(self, obs):
        return obs @ self.numbers[:, :-1], obs @ self.numbers[:, -1]


# In state 0, action 1 ends the episode with 0.6, and action 0 leads to state 1, whose actions pay 1
# and -0.5. With probability 0.6 for action 0, and 0.3 for it in state 1, 50 episodes are: 20 of the
# first kind, 9 of the second, 21 of the third.
P, Q = 0.6, 0.3
EPISODES = [(20, [(0, 1, 0.6)]), (9, [(0, 0, 0.0), (1, 0, 1.0)]), (21, [(0, 0, 0.0), (1, 1, -0.5)])]
TRUE_VALUES = [P * (Q * 1.0 + (1 - Q) * -0.5) + (1 - P) * 0.6, Q * 1.0 + (1 - Q) * -0.5]


@pytest.mark.parametrize("gae_lambda, values", [
    (1.0, [0.0, 0.0]), (1.0, [5.0, -3.0]), (1.0, TRUE_VALUES), (0.5, TRUE_VALUES),
    (0.0, TRUE_VALUES),
])  # fmt: skip
def test_gradient_is_that_of_the_expected_return(gae_lambda, values):
    """A rollout in which every episode happens as often as it is probable leaves no noise.

    With lambda 1 any V is a baseline that changes nothing. With a lower lambda V must be true.
    """
    numbers = torch.tensor([[P, 1 - P], [Q, 1 - Q]]).double().log()
    table = Table(numbers, torch.tensor(values).double())
    steps = [(*step, end == len(episode)) for count, episode in EPISODES for _ in range(count)
             for end, step in enumerate(episode, 1)]  # fmt: skip
    states, actions, rewards, terminated = map(torch.tensor, zip(*steps))
    obs = torch.eye(2).double()[states][:, None]  # (T, 1, 2)
    next_obs = obs.roll(-1, 0)  # after an end it is that of the next episode, which must not count
    columns = obs, actions[:, None], rewards.double()[:, None], next_obs, terminated[:, None]
    args = script.Args(gamma=1.0, gae_lambda=gae_lambda, vf_coef=0.0, ent_coef=0.0, max_grad_norm=0)
    batch = script.make_batch(table, *columns, torch.zeros_like(terminated)[:, None], args)
    script.compute_gradient(table, batch, args)

    logits = numbers.clone().requires_grad_()
    (p, _), (q, _) = logits.softmax(-1)
    expected_return = p * (q * 1.0 + (1 - q) * -0.5) + (1 - p) * 0.6
    (gradient,) = torch.autograd.grad(expected_return, logits)
    found = -table.numbers.grad[:, :2] * len(steps) / 50  # of the mean over steps; J is of episodes
    torch.testing.assert_close(found, gradient)
    assert not table.numbers.grad[:, 2].any()


def example():
    """A table of 3 states and 4 actions, and 12 steps."""
    torch.manual_seed(0)
    table = Table(torch.randn(3, 4).double(), torch.randn(3).double())
    states, actions = torch.randint(3, (12,)), torch.randint(4, (12,))
    obs = torch.eye(3).double()[states]
    return table, states, script.Batch(obs, actions, *torch.randn(2, 12).double())


@pytest.mark.parametrize("flags", [
    {}, {"ent_coef": 0.5}, {"vf_coef": 2.0}, {"ent_coef": 0.1, "vf_coef": 0.0}
])  # fmt: skip
def test_update_takes_one_step_down_the_gradient_by_hand(flags):
    """Of a softmax: d log pi(a) / d logit_k = [k = a] - pi_k; d entropy = -pi_k (log pi_k + H).

    A mean over the steps, not a sum, of advantages as they are, neither centred nor scaled.
    """
    args = script.Args(**{"max_grad_norm": 0.0, "ent_coef": 0.01, "vf_coef": 0.5} | flags)
    table, states, batch = example()
    before = table.numbers.detach().clone()
    pi, gradient = before[:, :-1].softmax(1), torch.zeros_like(before)
    entropies = Categorical(pi).entropy()
    for s, action, advantage, target in zip(states, *batch[1:]):
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
    })  # fmt: skip
    assert not any(value.requires_grad for value in metrics.values())


def test_it_is_the_gradient_of_ppos_first_minibatch():
    """Where pi is still pi_old, the ratio is 1, and nothing is clipped yet."""
    table, _, batch = example()
    script.compute_gradient(table, batch, script.Args(ent_coef=0.01, vf_coef=0.5, max_grad_norm=0))
    ours, table.numbers.grad = table.numbers.grad, None
    log_probs, _ = script.log_prob_and_entropy(table(batch.obs)[0].detach(), batch.actions)
    theirs = ppo_cartpole.Batch(*batch[:2], log_probs, *batch[2:])
    args = ppo_cartpole.Args(norm_adv=False, ent_coef=0.01, vf_coef=0.5, max_grad_norm=0)
    ppo_cartpole.compute_gradient(table, theirs, args)
    torch.testing.assert_close(ours, table.numbers.grad)


def test_the_gradient_of_all_weights_is_clipped_as_one_vector():
    moves = []
    for limit in (0.0, 1e9, 0.01):  # 0: not clipped
        torch.manual_seed(0)
        agent = script.Agent(2, 3, norm_obs=False)
        before = nn.utils.parameters_to_vector(agent.parameters()).detach()
        batch = script.Batch(torch.randn(8, 2), torch.arange(8) % 3, *torch.randn(2, 8))
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


# ---- The loop ------------------------------------------------------------------------------------

FEW = dict(
    env_id="Diary-v0", total_timesteps=600, num_envs=3, num_steps=20, eval_episodes=2,
    learning_rate=1e-2,
)  # fmt: skip


@pytest.mark.parametrize("num_envs, num_steps", [(3, 20), (1, 7), (5, 1)])
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


def test_a_batch_is_every_step_once_with_its_advantage(tmp_path, monkeypatch):
    """By the agent that played, to which the update before led: the first is made from the seed."""
    rollouts = recorded(monkeypatch, script, "make_batch")
    learned = recorded(monkeypatch, script, "update")
    train(script, tmp_path, **FEW | {"seed": 3, "gamma": 0.7, "gae_lambda": 0.6})
    torch.manual_seed(3)
    agent = script.Agent(2, 3, norm_obs=False)
    optimizer = torch.optim.Adam(agent.parameters(), eps=1e-5, fused=True)
    assert len(rollouts) == len(learned) == 10
    for k, ((arguments, _), ((_, _, batch, args), metrics)) in enumerate(zip(rollouts, learned)):
        _, obs, actions, rewards, next_obs, terminated, truncated, _ = arguments
        values, next_values = agent(obs)[1], agent(next_obs)[1]
        ends = terminated, truncated
        advantages = script.gae(rewards, values, next_values, *ends, 0.7, 0.6)
        columns = obs, actions, advantages, advantages + values
        for part, expected in zip(batch, columns, strict=True):
            torch.testing.assert_close(part, expected.detach().flatten(0, 1))
            assert not part.requires_grad
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - k / 10 if args.anneal_lr else 1)
        for tag, value in script.update(agent, optimizer, batch, args).items():
            torch.testing.assert_close(value, metrics[tag])


@pytest.mark.parametrize("anneal_lr", [True, False])
def test_metrics_and_learning_rate_are_logged(tmp_path, monkeypatch, anneal_lr):
    """Here after every rollout but the last."""
    monkeypatch.setattr(script, "LOG_FREQUENCY", 60)
    learned = recorded(monkeypatch, script, "update")
    _, points = train(script, tmp_path, **FEW, anneal_lr=anneal_lr)
    assert len(learned) == 10 and len(points["losses/entropy"]) == 9
    for k, ((_, optimizer, batch, _), metrics) in enumerate(learned[:-1]):
        rate = 1e-2 * (1 - k / 10 if anneal_lr else 1)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(rate)
        errors = batch.advantages.var() / batch.returns.var()  # V is returns - advantages
        metrics |= {"losses/explained_variance": 1 - errors, "charts/learning_rate": rate}
        for tag, value in metrics.items():
            assert points[tag][k] == (60 * (k + 1), pytest.approx(float(value), abs=1e-5)), tag
    assert type(optimizer) is torch.optim.Adam and optimizer.param_groups[0]["eps"] == 1e-5


def test_statistics_change_only_between_an_update_and_the_next_rollout(tmp_path, monkeypatch):
    """Acting and learning see one normalisation. All observations are counted, once."""
    counts = []
    for name in ("Actor", "make_batch", "update"):
        def noting(agent, *others, name=name, function=getattr(script, name)):
            counts.append((name, agent.obs_statistics.count.item()))
            return function(agent, *others)

        monkeypatch.setattr(script, name, noting)
    network = train(script, tmp_path, **FEW, norm_obs=True)[0]["network"]
    names = ("Actor", "make_batch", "update")
    expected = [(name, before) for before in range(0, 600, 60) for name in names]
    assert counts[:30] == expected and set(counts[30:]) == {("Actor", 600)}
    seen = np.array([step[0] for _, step in side_by_side(3)])
    np.testing.assert_allclose(network["obs_statistics.mean"], seen.mean(0), rtol=1e-4)
    np.testing.assert_allclose(network["obs_statistics.variance"], seen.var(0), rtol=1e-3)


@pytest.mark.parametrize("norm_reward", [True, False])
def test_rewards_are_scaled_for_learning_only(tmp_path, monkeypatch, norm_reward):
    check_ppo_rewards(script, tmp_path, monkeypatch, **FEW, norm_reward=norm_reward, gamma=0.9)


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
    assert script.read_checkpoint(folder)["envs"]["steps"] == 0


@pytest.mark.parametrize("env_id, low, high", [
    ("Truncates-v0", 4.9, 5.1), ("Terminates-v0", 1.7, 1.9)
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
        "num_steps": 25, "gamma": 0.3, "gae_lambda": 0.2, "ent_coef": 0.1, "vf_coef": 0.1,
        "max_grad_norm": 0.01, "norm_obs": True, "norm_reward": True,
    })  # fmt: skip
