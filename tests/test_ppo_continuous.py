"""What ppo_continuous.py has of its own: the normal distribution, the bounds of actions, its loop.

What it shares with ppo_cartpole.py, word for word, is tested in test_ppo_cartpole.py.
"""

import math

import gymnasium as gym
import numpy as np
import ppo_continuous as script
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributions import Independent, MultivariateNormal, Normal

# The description for the common tests: README.md explains it.
TINY = (
    "--total-timesteps 4000 --num-envs 2 --checkpoint-frequency 700 --eval-frequency 1100 "
    "--eval-episodes 5 --num-steps 128 --num-minibatches 4 --update-epochs 2"
)
OWN = "continuous"
OWN_FLAGS = "--total-timesteps 20000 --num-steps 64 --num-minibatches 4"
WRONG_SPACES = ["CartPole-v1", "cases:HugeBounds-v0"]
DIVERGES = "--learning-rate 1e30"
BAD = [("--num-steps 0", "--num-steps"), ("--gae-lambda 1.1", "--gae-lambda")]
LEARNS = [
    ("--env-id cases:Aim-v0 --total-timesteps 80000 --num-steps 256 --num-minibatches 8", 9),
]

# ---- The policy -----------------------------------------------------------------------------------------------------


def test_log_probability_and_entropy_against_pytorchs_own_and_the_formula():
    """A normal distribution in 3 dimensions with a diagonal covariance; and (2 pi e)^(A/2) sigma_1 ... sigma_A."""
    torch.manual_seed(0)
    means, actions = torch.randn(2, 5, 4, 3).double()
    log_deviations = torch.tensor([0.0, -1.0, 0.7]).double()
    log_probs, entropy = script.log_prob_and_entropy(means, log_deviations, actions)
    joint = MultivariateNormal(means, torch.diag(log_deviations.exp().square()))
    torch.testing.assert_close(log_probs, joint.log_prob(actions))
    torch.testing.assert_close(entropy.expand(5, 4), joint.entropy())
    by_hand = 1.5 * math.log(2 * math.pi * math.e) + log_deviations.sum().item()
    assert entropy.item() == pytest.approx(by_hand)


def test_gradients_reach_the_means_and_the_deviations():
    means, log_deviations = torch.zeros(4, 2, requires_grad=True), torch.zeros(2, requires_grad=True)
    actions = torch.tensor([[1.0, 2.0]]).repeat(4, 1)
    script.log_prob_and_entropy(means, log_deviations, actions)[0].sum().backward()
    torch.testing.assert_close(means.grad, actions)  # (a - mean) / deviation^2
    torch.testing.assert_close(log_deviations.grad, 4 * torch.tensor([0.0, 3.0]))  # (a - mean)^2 / deviation^2 - 1


def agent(obs_size=3, action_size=2):
    torch.manual_seed(0)
    return script.Agent(obs_size, action_size, norm_obs=True)


def test_actions_are_distributed_as_the_policy_says():
    ours = agent()
    ours.log_deviations.data[:] = torch.tensor([-1.0, 0.5])
    obs = torch.tensor([[1.0, 2, 3]]).repeat(50_000, 1)
    actions = script.act(ours, obs)
    means = ours(obs[:1])[0].squeeze(0).detach()
    np.testing.assert_allclose(actions.mean(0), means, atol=0.03)
    np.testing.assert_allclose(actions.std(0), [math.exp(-1), math.exp(0.5)], rtol=0.02)
    assert abs(np.corrcoef(actions.T)[0, 1]) < 0.02  # each number for itself
    torch.testing.assert_close(script.act(ours, obs[:2], greedy=True), means.repeat(2, 1))


def test_acting_sees_what_learning_sees():
    ours, obs = agent(), torch.randn(64, 3) * 10 + 50
    ours.obs_statistics.update(obs)
    torch.testing.assert_close(script.act(ours, obs, greedy=True), ours(obs)[0])
    assert ours(obs)[0].std() > 1e-3


def test_the_first_policy_is_centred_and_its_deviation_is_1():
    ours = agent()
    means, _ = ours(torch.randn(100, 3))
    assert means.abs().max() < 0.05 and not ours.log_deviations.any()
    assert ours.log_deviations.requires_grad and ours(torch.randn(7, 5, 3))[1].shape == (7, 5)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_an_observation_that_is_not_finite_is_named(poison):
    ours = script.Agent(2, 1, norm_obs=False)
    with pytest.raises(FloatingPointError, match="observation"):
        script.act(ours, torch.tensor([[0.0, 0.0], [poison, -poison]]))


# ---- Bounds ---------------------------------------------------------------------------------------------------------


def test_each_number_of_an_action_has_bounds_of_its_own():
    low, high = np.array([-2.0, 0.0, 10.0]), np.array([2.0, 1.0, 30.0])
    actions = np.array([[0.0, 0.0, 0.0], [-1, -1, -1], [1, 1, 1], [0.5, -0.5, 0.1], [-9, 9, 1.01]])
    expected = [[0, 0.5, 20], [-2, 0, 10], [2, 1, 30], [1, 0.25, 21], [-2, 1, 30]]
    np.testing.assert_allclose(script.to_bounds(actions, low, high), expected)


def test_rounding_leads_out_of_no_bounds():
    low, high = np.full(1, -1, np.float32), np.full(1, 0.1, np.float32)
    assert script.to_bounds(np.ones((1, 1), np.float32), low, high) <= high


def test_observations_are_seen_in_deviations_from_their_mean():
    ours = agent(2, 3)
    ours.obs_statistics.update(torch.tensor([[1.0, 10.0], [3.0, 30.0]]))  # means 2 and 20, deviations 1 and 10
    obs, normalised = torch.tensor([[3.0, 40.0], [1e6, -1e6]]), torch.tensor([[1.0, 2.0], [10.0, -10.0]])
    torch.testing.assert_close(ours(obs)[0], ours.actor(normalised))
    torch.testing.assert_close(ours(obs)[1], ours.critic(normalised).squeeze(-1))


def test_a_batch_is_every_step_with_its_advantage():
    torch.manual_seed(1)
    ours, args = agent(), script.Args(gamma=0.7, gae_lambda=0.6)
    (obs, next_obs), actions, rewards = torch.randn(2, 5, 4, 3), torch.randn(5, 4, 2), torch.randn(5, 4)
    terminated, truncated = torch.rand(2, 5, 4) < 0.3
    batch = script.make_batch(ours, obs, actions, rewards, next_obs, terminated, truncated, args)
    with torch.no_grad():
        seen, seen_next = (x / math.sqrt(1 + 1e-8) for x in (obs, next_obs))  # mean 0 and variance 1 so far
        values, next_values = ours.critic(seen).squeeze(-1), ours.critic(seen_next).squeeze(-1)
        log_probs = Independent(Normal(ours.actor(seen), ours.log_deviations.exp()), 1).log_prob(actions)
        advantages = script.gae(rewards, values, next_values, terminated, truncated, 0.7, 0.6)
    for part, expected in zip(batch, (obs, actions, log_probs, values, advantages, advantages + values)):
        torch.testing.assert_close(part, expected.flatten(0, 1))
        assert not part.requires_grad


# ---- update ---------------------------------------------------------------------------------------------------------


def test_update_goes_down_the_gradient_of_the_papers_loss():
    """The same loss from torch's own distribution, and no gradient is cut."""
    ours, reference = agent(), agent()
    generator = torch.Generator().manual_seed(1)
    obs, actions = torch.randn(20, 3, generator=generator), torch.randn(20, 2, generator=generator)
    log_probs, values, advantages, returns = torch.randn(4, 20, generator=generator)
    args = script.Args(norm_adv=False, clip_vloss=False, ent_coef=0.1, vf_coef=0.7, max_grad_norm=1e9, clip_coef=0.3)
    log_probs = log_probs * 0.2 - 3
    batch = script.Batch(obs, actions, log_probs, values, advantages, returns)
    metrics = script.update(ours, torch.optim.SGD(ours.parameters(), lr=0.1), batch, args)
    policy = Independent(Normal(reference.actor(obs), reference.log_deviations.exp()), 1)
    ratio = (policy.log_prob(actions) - log_probs).exp()
    gains = torch.stack([ratio * advantages, ratio.clamp(0.7, 1.3) * advantages]).min(0).values
    errors = (reference.critic(obs).squeeze(1) - returns) ** 2
    (-gains.mean() + 0.7 * errors.mean() / 2 - 0.1 * policy.entropy().mean()).backward()
    torch.optim.SGD(reference.parameters(), lr=0.1).step()
    for mine, theirs in zip(ours.parameters(), reference.parameters()):
        torch.testing.assert_close(mine, theirs)
    assert metrics["losses/entropy"].item() == pytest.approx(math.log(2 * math.pi * math.e), rel=1e-5)


# ---- The loop -------------------------------------------------------------------------------------------------------


class Diary(gym.Env):
    """Episodes of random length, of which a third terminate, a third are truncated, and a third do both in one step;
    actions with bounds that differ by dimension. Every environment keeps a diary of what really happened."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = gym.spaces.Box(np.array([-2, 0], np.float32), np.array([2, 10], np.float32))
    made = []

    def __init__(self):
        self.obs, self.steps = np.zeros(2), []
        Diary.made.append(self)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left, self.end = self.np_random.integers(1, 6, endpoint=True), self.np_random.integers(3)
        self.obs[:] = self.np_random.random(2)
        return self.obs, {}

    def step(self, action):
        assert self.action_space.contains(action.astype(np.float32)) and self.left > 0
        before, reward = self.obs.astype(np.float32).tolist(), self.np_random.normal()
        self.left -= 1
        self.obs[:] = self.np_random.random(2)
        ends = self.left == 0
        terminated, truncated = bool(ends and self.end < 2), bool(ends and self.end > 0)
        after = self.obs.astype(np.float32).tolist()
        self.steps.append((before, action.tolist(), reward, after, terminated, truncated))
        return self.obs, reward, terminated, truncated, {}


gym.register("ContinuousDiary-v0", entry_point=Diary, disable_env_checker=True)


def test_rollouts_are_what_really_happened(tmp_path, monkeypatch):
    """What is learned from is the action that was sampled; what the environment gets is within its bounds."""
    calls, make_batch = [], script.make_batch
    monkeypatch.setattr(script, "make_batch", lambda *inputs: calls.append(inputs) or make_batch(*inputs))
    Diary.made.clear()
    run_dir = script.train(script.Args(
        env_id="ContinuousDiary-v0", total_timesteps=300, num_envs=3, num_steps=20, num_minibatches=2, update_epochs=2,
        eval_episodes=2, checkpoint_frequency=0, norm_reward=False, runs_dir=str(tmp_path),
    ))  # fmt: skip
    assert len(calls) == 5
    for number, (_, obs, actions, rewards, next_obs, terminated, truncated, _) in enumerate(calls):
        for i in range(3):
            steps = Diary.made[i].steps[number * 20 : (number + 1) * 20]
            seen, _, *outcome = zip(*steps)
            for column, expected in zip((obs, rewards, next_obs, terminated, truncated), (seen, *outcome)):
                np.testing.assert_allclose(column[:, i].numpy(), np.array(expected), rtol=1e-5)
            played = script.to_bounds(actions[:, i].numpy(), np.array([-2, 0]), np.array([2, 10]))
            np.testing.assert_allclose(played, [step[1] for step in steps], rtol=1e-5)
    sampled = torch.cat([call[2].flatten(0, 1) for call in calls])
    assert sampled.abs().max() > 1.5  # beyond the bounds, where the environment saw the bound
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    lengths = [event.value for event in events.Scalars("charts/episodic_length")]
    assert 50 < len(lengths) and max(lengths) <= 6


def test_evaluation_plays_the_means_within_the_bounds(tmp_path):
    """Each environment those of what it shows itself, also when others have ended, and wait."""
    Diary.made.clear()
    args = script.Args(env_id="ContinuousDiary-v0", num_envs=4, eval_episodes=7)
    ours = agent(2, 2)
    script.evaluate(args, script.make_envs(args), ours, tmp_path)
    steps = [step for env in Diary.made for step in env.steps]
    means = script.act(ours, torch.tensor([step[0] for step in steps]), greedy=True)
    expected = script.to_bounds(means.numpy(), np.array([-2, 0]), np.array([2, 10]))
    np.testing.assert_allclose([step[1] for step in steps], expected, rtol=1e-4)


class Unbounded(gym.Env):
    observation_space, action_space = gym.spaces.Box(-1, 1, (1,)), gym.spaces.Box(-np.inf, np.inf, (1,))


class Whole(gym.Env):
    observation_space, action_space = gym.spaces.Box(-1, 1, (1,)), gym.spaces.Box(-128, 127, (1,), np.int8)


gym.register("Unbounded-v0", entry_point=Unbounded, max_episode_steps=5)
gym.register("Whole-v0", entry_point=Whole, max_episode_steps=5)


@pytest.mark.parametrize("env_id", ["Unbounded-v0", "Whole-v0"])
def test_actions_without_bounds_or_of_whole_numbers_are_refused(capsys, env_id):
    with pytest.raises(SystemExit) as error:
        script.make_envs(script.Args(env_id=env_id))
    assert error.value.code == 2 and "bounds" in capsys.readouterr().err


def test_an_environment_without_a_time_limit_gets_one(monkeypatch):
    gym.register("EndlessPendulum-v0", entry_point="gymnasium.envs.classic_control.pendulum:PendulumEnv")
    monkeypatch.setattr(script, "MAX_EPISODE_STEPS", 30)
    env = script.make_envs(script.Args(env_id="EndlessPendulum-v0", num_envs=1))[0]
    env.reset(seed=1)
    assert [env.step(np.zeros(1, np.float32))[2:4] for _ in range(30)] == [(False, False)] * 29 + [(False, True)]


@pytest.mark.slow
def test_every_setting_of_the_algorithm_changes_the_outcome(tmp_path):
    def outcome(**settings):
        few = dict(
            env_id="ContinuousDiary-v0", total_timesteps=180, num_envs=3, num_steps=20, num_minibatches=2,
            update_epochs=2, eval_episodes=1, checkpoint_frequency=0, learning_rate=1e-2,
        )  # fmt: skip
        run_dir = script.train(script.Args(**few | settings, runs_dir=str(tmp_path)))
        state = torch.load(run_dir / "checkpoint.pt", weights_only=True)
        return [state["agent"][key] for key in sorted(state["agent"]) if "statistics" not in key]

    plain = outcome()
    assert all(map(torch.equal, plain, outcome()))
    for settings in (
        {"gae_lambda": 0.2}, {"gamma": 0.3}, {"norm_adv": False}, {"clip_vloss": True}, {"clip_coef": 0.01},
        {"ent_coef": 0.1}, {"vf_coef": 0.1}, {"max_grad_norm": 0.01}, {"target_kl": 1e-9}, {"norm_obs": False},
        {"norm_reward": False}, {"anneal_lr": False}, {"update_epochs": 3}, {"num_minibatches": 3}, {"seed": 2},
    ):  # fmt: skip
        assert not all(map(torch.equal, plain, outcome(**settings))), settings
