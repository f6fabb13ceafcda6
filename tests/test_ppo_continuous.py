"""What ppo_continuous.py has of its own: the normal distribution, bounds of actions, its loop.

What it has word for word like ppo_cartpole.py is tested in test_ppo_cartpole.py.
"""

import math

import gymnasium as gym
import numpy as np
import ppo_continuous as script
import pytest
import torch
from diary import (
    Diary, check_episodes, check_ppo_log, check_ppo_rewards, check_ppo_statistics, check_settings,
    recorded, side_by_side, train,
)  # fmt: skip
from gymnasium.spaces import Box
from torch.distributions import Independent, MultivariateNormal, Normal

# For the tests that all scripts share.
TINY = (
    "--total-timesteps 2000 --num-steps 64 --num-minibatches 4 --update-epochs 2 --norm-obs "
    "--norm-reward --checkpoint-frequency 500 --eval-frequency 700 --eval-episodes 5"
)
OWN = "continuous"
OWN_FLAGS = "--total-timesteps 10000 --num-steps 128 --num-minibatches 8"
WRONG_SPACES = ["CartPole-v1", "cases:HugeBounds-v0"]
DIVERGES = "--learning-rate 1e30"
BAD = [
    ("--num-steps 0", "--num-steps"),
    ("--num-envs 1 --num-steps 5 --num-minibatches 3", "--num-minibatches"),
    ("--clip-coef 0", "--clip-coef"),
    ("--ent-coef nan", "--ent-coef"),
]
LEARNS = [
    ("--env-id cases:Aim-v0 --total-timesteps 80000 --num-steps 256 --num-minibatches 8", 9)
]
# What others published, by the record's name after `<script>__`: shown beside our results.
PUBLISHED = {
    "Pendulum-v1": "Zoo -172 (100k)",
    "HalfCheetah-v5": "CleanRL 1443, Zoo 5819 (1M, older versions)",
    "Hopper-v5": "CleanRL 2383, Zoo 2410 (1M, older versions)",
    "Walker2d-v5": "CleanRL 2288, Zoo 3479 (1M, older versions)",
}
# How speed.py measures the script, and beside what; its first lines explain the form.
SPEED = {
    "steps": 30_000,
    "first": 2_048,
    "peers": {
        "CleanRL's ppo_continuous_action.py": {
            "flags": "--env-id Pendulum-v1 --no-clip-vloss",
            "equal": "one environment, compiled",
        },
        "Stable-Baselines3's PPO": {
            "env_id": "Pendulum-v1",
            "num_envs": 1,
            "normalize": True,
            "settings": {
                "n_steps": 2048,
                "batch_size": 64,
                "n_epochs": 10,
                "learning_rate": 3e-4,
                "device": "cpu",
            },
            "equal": "one environment, compiled",
        },
        "SBX's PPO": {
            "env_id": "Pendulum-v1",
            "num_envs": 1,
            "normalize": True,
            "settings": {
                "n_steps": 2048,
                "batch_size": 64,
                "n_epochs": 10,
                "learning_rate": 3e-4,
            },
            "equal": "one environment, compiled",
        },
    },
    "flags": "--env-id Pendulum-v1 --num-steps 2048 --num-minibatches 32 --update-epochs 10 "
    "--gamma 0.99 --gae-lambda 0.95 --learning-rate 3e-4 --ent-coef 0",
    "variants": {
        "one environment, compiled": "--num-envs 1 --compile",
        "one environment": "--num-envs 1",
    },
    "floors": {"floor": "2048 6144 --num-envs 1"},
}

# ---- The policy ----------------------------------------------------------------------------------


def test_log_probability_and_entropy_against_pytorchs_own_and_the_formula():
    """A normal distribution in 3 dimensions, whose entropy is log((2 pi e)^(3/2) s_1 s_2 s_3)."""
    torch.manual_seed(0)
    means, actions = torch.randn(2, 5, 4, 3).double()
    log_std = torch.tensor([0.0, -1.0, 0.7]).double()
    log_probs, entropy = script.log_prob_and_entropy(means, log_std, actions)
    joint = MultivariateNormal(means, torch.diag(log_std.exp().square()))
    torch.testing.assert_close(log_probs, joint.log_prob(actions))
    by_hand = 1.5 * math.log(2 * math.pi * math.e) + log_std.sum().item()
    assert entropy.item() == pytest.approx(by_hand)


def make_agent(obs_size=3, low=(-2, 0), high=(2, 10), norm_obs=True):
    torch.manual_seed(0)
    return script.Agent(obs_size, np.float32(low), np.float32(high), norm_obs)


def test_the_first_policy_is_centred_with_deviation_1():
    agent = make_agent()
    means, values = agent(torch.randn(7, 5, 3))
    assert means.abs().max() < 0.05 and means.shape == (7, 5, 2) and values.shape == (7, 5)
    assert agent.log_std.requires_grad and not agent.log_std.any()


def test_actions_are_distributed_as_the_policy_says():
    agent, obs = make_agent(), np.float32([[1, 2, 3]])
    agent.log_std.data[:] = torch.tensor([-1.0, 0.5])
    means = agent(torch.tensor(obs))[0].detach().numpy()
    torch.manual_seed(0)
    noise = script.sample_noise(agent, 50_000)
    actions = script.act(script.Actor(agent), np.tile(obs, (50_000, 1)), noise)
    np.testing.assert_allclose(actions.mean(0), means[0], atol=0.03)
    np.testing.assert_allclose(actions.std(0), [math.exp(-1), math.exp(0.5)], rtol=0.02)
    neighbours = np.column_stack([actions[::2], actions[1::2]])  # of two environments
    assert abs(np.corrcoef(neighbours.T) - np.eye(4)).max() < 0.03  # independent, all four
    np.testing.assert_allclose(script.act(script.Actor(agent), obs), means, rtol=1e-6)


def test_acting_and_learning_see_normalised_observations():
    agent = make_agent(obs_size=2)
    agent.obs_statistics.update(torch.tensor([[1.0, 10.0], [3.0, 30.0]]))  # 2 ± 1 and 20 ± 10
    obs, normalised = torch.tensor([[3.0, 40], [1e6, -1e6]]), torch.tensor([[1.0, 2], [10, -10]])
    means, values = agent(obs)
    torch.testing.assert_close(means, agent.actor(normalised))
    torch.testing.assert_close(values, agent.critic(normalised).squeeze(-1))
    found = torch.from_numpy(script.act(script.Actor(agent), obs.numpy()))
    torch.testing.assert_close(found, means.detach())


# ---- Bounds --------------------------------------------------------------------------------------


def test_each_number_of_an_action_has_bounds_of_its_own():
    agent = make_agent(low=(-2, 0, 10), high=(2, 1, 30))
    actions = np.float32([[0, 0, 0], [-1, -1, -1], [1, 1, 1], [0.5, -0.5, 0.1], [-9, 9, 1.01]])
    expected = [[0, 0.5, 20], [-2, 0, 10], [2, 1, 30], [1, 0.25, 21], [-2, 1, 30]]
    np.testing.assert_allclose(script.to_bounds(script.Actor(agent), actions), expected, rtol=1e-6)


def test_rounding_does_not_leave_the_bounds():
    low, high = np.float32([-1, -0.7]), np.float32([0.1, 0.3])
    agent = make_agent(low=low, high=high)
    for end in (-1, 1):
        found = script.to_bounds(script.Actor(agent), np.full((1, 2), end, np.float32))
        assert (found >= low).all() and (found <= high).all()


@pytest.mark.parametrize("space", [
    Box(-np.inf, np.inf, (1,)),
    Box(0, np.inf, (1,)),
    Box(-np.finfo(np.float32).max, np.finfo(np.float32).max, (1,)),
    Box(-128, 127, (1,), np.int8),
    Box(-1, 1, (2, 2)),
], ids=str)  # fmt: skip
def test_actions_without_bounds_of_whole_numbers_or_not_flat_are_refused(space):
    class Wrong(Diary):
        action_space = space

    gym.register("Wrong-v0", entry_point=Wrong)
    with pytest.raises(script.UsageError, match="needs .*Wrong-v0"):
        script.make_env(script.Args(env_id="Wrong-v0"))
    del gym.registry["Wrong-v0"]


# ---- update, the loop ----------------------------------------------------------------------------


def test_update_goes_down_the_gradient_of_the_papers_loss():
    """The same loss from PyTorch's own distribution. A gradient that is left over is no matter."""
    agent, reference = make_agent(), make_agent()
    obs, actions = torch.randn(20, 3), torch.randn(20, 2)
    log_probs, advantages, returns = torch.randn(3, 20)
    log_probs = log_probs * 0.2 - 3
    args = script.Args(norm_adv=False, ent_coef=0.1, vf_coef=0.7, max_grad_norm=1e9, clip_coef=0.3)
    batch = script.Batch(obs, actions, log_probs, advantages, returns)
    for weights in agent.parameters():
        weights.grad = torch.ones_like(weights)
    metrics = script.update(agent, torch.optim.SGD(agent.parameters(), lr=0.1), batch, args)
    policy = Independent(Normal(reference.actor(obs), reference.log_std.exp()), 1)
    ratio = (policy.log_prob(actions) - log_probs).exp()
    gains = torch.min(ratio * advantages, ratio.clamp(0.7, 1.3) * advantages)
    errors = (reference.critic(obs).squeeze(1) - returns) ** 2
    (-gains.mean() + 0.7 * errors.mean() / 2 - 0.1 * policy.entropy().mean()).backward()
    torch.optim.SGD(reference.parameters(), lr=0.1).step()
    for ours, theirs in zip(agent.parameters(), reference.parameters()):
        torch.testing.assert_close(ours, theirs)
    expected = {
        "losses/policy_loss": -gains.mean(), "losses/value_loss": errors.mean() / 2,
        "losses/entropy": policy.entropy().mean(),
        "losses/approx_kl": (ratio - 1 - ratio.log()).mean(),
        "losses/clipfrac": ((ratio < 0.7) | (ratio > 1.3)).float().mean(),
    }  # fmt: skip
    assert 0 < expected["losses/clipfrac"] < 1
    for tag, value in metrics.items():
        assert value.item() == pytest.approx(expected.pop(tag).item(), rel=1e-4)
    assert not expected


def test_rpo_shifts_means_in_gradient_steps_only():
    """By uniform noise of its own for each number; pi_old and actions have none."""
    torch.manual_seed(1)
    means = torch.zeros(20_000, 2, requires_grad=True)
    shifted = script.shift(means, 0.5)
    assert torch.equal(torch.autograd.grad(shifted.sum(), means)[0], torch.ones_like(means))
    for column in shifted.detach().T:
        quantiles = column.quantile(torch.linspace(0, 1, 11))
        torch.testing.assert_close(quantiles, torch.linspace(-0.5, 0.5, 11), atol=0.02, rtol=0)
    assert torch.corrcoef(shifted.detach().T)[0, 1].abs() < 0.03

    agent, args = make_agent(), script.Args(rpo_alpha=0.5, norm_adv=False, max_grad_norm=0)
    obs, ends = torch.randn(4, 5, 3), torch.zeros(2, 4, 5, dtype=torch.bool)
    actions, rewards = torch.randn(4, 5, 2), torch.randn(4, 5)
    batch = script.make_batch(agent, obs, actions, rewards, obs, *ends, args)
    plain = script.make_batch(agent, obs, actions, rewards, obs, *ends, script.Args())
    assert torch.equal(batch.log_probs, plain.log_probs)
    torch.manual_seed(2)
    metrics = script.compute_gradient(agent, batch, args)
    torch.manual_seed(2)
    policy = Normal(script.shift(agent(batch.obs)[0], 0.5), agent.log_std.exp())
    ratio = (policy.log_prob(batch.actions).sum(1) - batch.log_probs).exp()
    gains = torch.min(ratio * batch.advantages, ratio.clamp(0.8, 1.2) * batch.advantages)
    torch.testing.assert_close(metrics["losses/policy_loss"], -gains.mean().detach())
    found = [weights.grad for weights in agent.actor.parameters()]  # nothing else moves the means
    expected = torch.autograd.grad(-gains.mean(), [*agent.actor.parameters()])
    for ours, theirs in zip(found, expected):
        torch.testing.assert_close(ours, theirs)


FEW = dict(
    env_id="ContinuousDiary-v0", total_timesteps=300, num_envs=3, num_steps=20, num_minibatches=2,
    update_epochs=2, eval_episodes=7, learning_rate=1e-2, norm_adv=False,
)  # fmt: skip


def test_rollouts_are_what_really_happened(tmp_path, monkeypatch):
    """What is learned from is the action that was sampled; the environment saw it in its bounds."""
    calls = recorded(monkeypatch, script, "make_batch")
    state, points = train(script, tmp_path, **FEW, norm_reward=False)
    assert len(calls) == 5 and state["envs"]["steps"] == 300
    low, high = np.array([-2, 0]), np.array([2, 10])
    for number, ((_, *rollout, _), _) in enumerate(calls):
        rollout[1] = (rollout[1].numpy().clip(-1, 1) + 1) / 2 * (high - low) + low
        for i in range(3):
            happened = Diary.made[i].steps[number * 20 : (number + 1) * 20]
            for column, expected in zip(rollout, zip(*happened), strict=True):
                expected = np.array(expected, np.float32)
                np.testing.assert_allclose(column[:, i], expected, rtol=1e-5, atol=1e-6)
    assert max(call[0][2].abs().max() for call in calls) > 1.5  # beyond the bounds
    check_episodes(points, side_by_side(3))
    # The evaluation plays the means, also within the bounds, for what each environment shows.
    obs, actions, *_ = zip(*(step for env in Diary.made[3:] for step in env.steps))
    agent = make_agent(obs_size=2)
    agent.load_state_dict(state["network"])
    means = agent(torch.tensor(obs))[0].detach().numpy()
    np.testing.assert_allclose(actions, script.to_bounds(script.Actor(agent), means), rtol=1e-4, atol=1e-6)


def test_every_environment_gets_the_action_for_what_it_shows(tmp_path, monkeypatch):
    monkeypatch.setattr(script, "act", lambda actor, obs, noise=0.0: 2 * obs - 1)
    train(script, tmp_path, **FEW)
    seen, chosen, *_ = zip(*(step for env in Diary.made for step in env.steps))
    expected = np.array([-2, 0]) + np.array([4, 10]) * np.array(seen)
    np.testing.assert_allclose(chosen, expected, rtol=1e-4, atol=1e-5)


def test_a_batch_is_every_step_with_its_advantage(tmp_path, monkeypatch):
    """With pi_old and V_old of the agent that played: the first one is made from the seed."""
    rollouts = recorded(monkeypatch, script, "make_batch")
    learned = recorded(monkeypatch, script, "learn")
    flags = {"seed": 3, "gamma": 0.7, "gae_lambda": 0.6, "norm_obs": False}
    train(script, tmp_path, **FEW | flags)
    _, obs, actions, rewards, next_obs, terminated, truncated, _ = rollouts[0][0]
    torch.manual_seed(3)
    agent = script.Agent(2, np.float32([-2, 0]), np.float32([2, 10]), norm_obs=False)
    means, values = agent(obs)
    log_probs = Independent(Normal(means, agent.log_std.exp()), 1).log_prob(actions)
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


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    spoilt = {"losses/value_loss": torch.tensor(math.nan)}
    monkeypatch.setattr(script, "learn", lambda *arguments: dict(spoilt))
    with pytest.raises(script.UsageError, match="not finite"):
        train(script, tmp_path, **FEW)


def test_every_setting_of_the_algorithm_changes_the_outcome(tmp_path):
    def outcome(**settings):
        state, _ = train(script, tmp_path, **FEW | {"total_timesteps": 180} | settings)
        weights = state["network"].items()
        return [value.tolist() for name, value in weights if "statistics" not in name]

    check_settings(script, outcome, {
        "seed": 2, "total_timesteps": 190, "num_envs": 4, "learning_rate": 5e-3, "anneal_lr": False,
        "num_steps": 25, "gamma": 0.3, "gae_lambda": 0.2, "num_minibatches": 3, "update_epochs": 3,
        "norm_adv": True, "clip_coef": 0.01, "ent_coef": 0.1, "vf_coef": 0.1, "max_grad_norm": 0.01,
        "rpo_alpha": 0.5, "norm_obs": False, "norm_reward": False,
    })  # fmt: skip
