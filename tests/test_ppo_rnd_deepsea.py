"""What ppo_rnd_deepsea.py has of its own: its environment, novelty, and two rewards in one loss.

What it has word for word from ppo_cartpole.py is tested in test_ppo_cartpole.py.
"""

import inspect
import itertools

import numpy as np
import ppo_cartpole
import ppo_rnd_deepsea as script
import pytest
import torch
from diary import (
    Diary, check_ppo_rewards, check_ppo_statistics, check_settings, recorded, side_by_side, train,
)  # fmt: skip
from torch import nn
from torch.distributions import Categorical

# For the tests that all scripts share.
TINY = (
    "--env-kwargs '{\"size\": 5}' --total-timesteps 2000 --num-envs 4 --num-steps 32 "
    "--num-minibatches 2 --update-epochs 2 --norm-obs --norm-reward --checkpoint-frequency 500 "
    "--eval-frequency 700 --eval-episodes 5"
)
OWN = "discrete"
OWN_FLAGS = (
    "--total-timesteps 10000 --num-envs 8 --num-steps 32 --num-minibatches 1 --update-epochs 20 "
    "--gamma 0.98 --gae-lambda 0.8"
)
WRONG_SPACES = ["Pendulum-v1"]
DIVERGES = "--learning-rate 1e30"
BAD = [
    ("--num-steps 0", "--num-steps"),
    ("--num-envs 1 --num-steps 5 --num-minibatches 3", "--num-minibatches"),
    ("--int-gamma 1.01", "--int-gamma"),
    ("--int-coef -1", "--int-coef"),
    ("--env-kwargs '{\"size\": 0}'", "--env-kwargs"),
    ("--env-kwargs '{\"depth\": 5}'", "--env-kwargs"),
]
LEARNS = [("--env-kwargs '{\"size\": 12}' --total-timesteps 60000", 0.98)]  # chance: 1 in 4096


@pytest.mark.parametrize("name", [
    "Actor", "RewardScaler", "RunningStatistics", "act", "clipped_policy_loss",
    "explained_variance", "gae", "gumbel_noise", "layer", "learn", "log_prob_and_entropy", "play",
    "update",
])  # fmt: skip
def test_what_ppo_has_too_is_the_same_and_tested_there(name):
    ours, theirs = (inspect.getsource(getattr(module, name)) for module in (script, ppo_cartpole))
    assert ours == theirs


# ---- DeepSea -------------------------------------------------------------------------------------


def test_one_of_all_dives_finds_the_treasure_and_the_others_pay_for_each_step_to_the_right():
    size = 6
    env, returns = script.DeepSea(size), {}
    for actions in itertools.product((0, 1), repeat=size):
        env.reset()
        total, rights = 0.0, 0
        for row, action in enumerate(actions):
            before = env.column
            obs, reward, terminated, truncated, _ = env.step(action)
            went_right = action == env.right[row, before]
            assert env.column == min(max(before + (1 if went_right else -1), 0), size - 1)
            assert terminated == (row == size - 1) and not truncated
            total, rights = total + reward, rights + went_right
        returns[actions] = total
        if rights < size:
            assert total == pytest.approx(-0.01 * rights / size)
    best = max(returns, key=returns.get)
    assert returns[best] == pytest.approx(0.99) and sum(r > 0 for r in returns.values()) == 1
    assert len(set(best)) == 2  # not always the same action


def test_each_square_looks_different_and_is_drawn():
    env, seen = script.DeepSea(4), {}
    for actions in itertools.product((0, 1), repeat=4):
        obs, _ = env.reset(seed=1)
        for action in actions:
            assert obs.sum() == 1 and env.observation_space.contains(obs)
            picture = env.render()
            assert picture.shape[:2] == (164, 164) and picture[:, :, 0].sum() == 255 * 41 * 41
            place = env.row, env.column
            assert seen.setdefault(place, obs.tobytes() + picture.tobytes()) == (
                obs.tobytes() + picture.tobytes()
            )
            obs, *_ = env.step(action)
        assert not obs.any()  # the bottom
    assert len(set(seen.values())) == len(seen) == 1 + 2 + 3 + 4


# ---- Novelty -------------------------------------------------------------------------------------


def in_numpy(network, rows):
    layers = [part for part in network if isinstance(part, nn.Linear)]
    for part in layers[:-1]:
        rows = np.maximum(rows @ part.weight.detach().numpy().T + part.bias.detach().numpy(), 0)
    return rows @ layers[-1].weight.detach().numpy().T + layers[-1].bias.detach().numpy()


def test_novelty_is_the_mean_squared_error_on_normalised_observations():
    torch.manual_seed(0)
    novelty = script.Novelty(2)
    novelty.statistics.update(torch.tensor([[1.0, 10.0], [3.0, 30.0]]))  # 2 ± 1 and 20 ± 10
    obs = torch.tensor([[[3.0, 40.0], [2.0, 20.0]], [[1e6, -1e6], [2.5, 15.0]]])
    normalised = np.array([[[1.0, 2.0], [0.0, 0.0]], [[5.0, -5.0], [0.5, -0.5]]])
    errors = in_numpy(novelty.predictor, normalised) - in_numpy(novelty.target, normalised)
    np.testing.assert_allclose(novelty(obs).detach(), (errors**2).mean(-1), rtol=1e-4)


def random_batch(size=40, obs_size=2):
    obs, next_obs = torch.randn(2, size, obs_size)
    log_probs, advantages = torch.randn(2, size) * 0.3 - torch.tensor([[1.1], [0.0]])
    values, returns = torch.randn(2, size, 2)
    actions = torch.arange(size) % 3
    return script.Batch(obs, actions, log_probs, advantages, values, returns, next_obs)


def test_what_was_seen_is_not_new_any_more_and_f_never_changes():
    torch.manual_seed(0)
    agent = script.Agent(2, 3, norm_obs=False)
    optimizer = torch.optim.Adam(agent.parameters(), lr=1e-3)
    target = [weights.clone() for weights in agent.novelty.target.parameters()]
    seen, unseen = torch.randn(40, 2) * 0.5 - 2, torch.randn(40, 2) * 0.5 + 2
    agent.novelty.statistics.update(torch.cat([seen, unseen]))
    before = agent.novelty(seen).mean(), agent.novelty(unseen).mean()
    for _ in range(300):
        script.update(agent, optimizer, random_batch()._replace(next_obs=seen), script.Args())
    assert agent.novelty(seen).mean() < 0.05 * before[0]
    assert agent.novelty(unseen).mean() > 10 * agent.novelty(seen).mean()
    assert all(map(torch.equal, target, agent.novelty.target.parameters()))


# ---- Two rewards in one loss ---------------------------------------------------------------------


@pytest.mark.parametrize("norm_obs", [True, False])
def test_advantages_of_both_rewards_step_by_step(norm_obs):
    """The intrinsic ones go on over all ends, to the next row's observation and, last, last_obs."""
    torch.manual_seed(0)
    agent, (steps, envs) = script.Agent(2, 3, norm_obs), (9, 4)
    obs, next_obs = torch.randn(2, steps, envs, 2)
    actions, last_obs = torch.randint(3, (steps, envs)), torch.randn(envs, 2)
    rewards, novelties = torch.randn(2, steps, envs)
    terminated, truncated = torch.rand(2, steps, envs) < 0.25
    args = script.Args(gamma=0.9, int_gamma=0.8, gae_lambda=0.7, ext_coef=3.0, int_coef=0.5)
    rollout = obs, actions, rewards, next_obs, terminated, truncated
    batch = script.make_batch(agent, *rollout, novelties, last_obs, args)

    def value(state, which):
        return agent(state)[1][which].item()

    row = 0
    for t, i in itertools.product(range(steps), range(envs)):
        extrinsic = intrinsic = 0.0
        weights = [1.0, 1.0]
        for k in range(t, steps):
            after = 0.0 if terminated[k, i] else 0.9 * value(next_obs[k, i], 0)
            extrinsic += weights[0] * (rewards[k, i].item() + after - value(obs[k, i], 0))
            if terminated[k, i] or truncated[k, i]:
                weights[0] = 0.0
            later = obs[k + 1, i] if k + 1 < steps else last_obs[i]
            intrinsic += weights[1] * (
                novelties[k, i].item() + 0.8 * value(later, 1) - value(obs[k, i], 1)
            )
            weights = [weights[0] * 0.9 * 0.7, weights[1] * 0.8 * 0.7]
        assert batch.advantages[row].item() == pytest.approx(
            3 * extrinsic + 0.5 * intrinsic, abs=1e-4
        )
        values = [value(obs[t, i], 0), value(obs[t, i], 1)]
        assert batch.values[row].tolist() == pytest.approx(values, abs=1e-5)
        expected = values[0] + extrinsic, values[1] + intrinsic
        assert batch.returns[row].tolist() == pytest.approx(expected, abs=1e-4)
        log_prob = Categorical(logits=agent(obs[t, i])[0]).log_prob(actions[t, i])
        assert batch.log_probs[row].item() == pytest.approx(log_prob.item(), abs=1e-5)
        assert torch.equal(batch.obs[row], obs[t, i]) and batch.actions[row] == actions[t, i]
        assert torch.equal(batch.next_obs[row], next_obs[t, i])
        row += 1
    assert len(batch.obs) == row and not any(part.requires_grad for part in batch)


@pytest.mark.parametrize("flags", [{}, {"norm_adv": False, "ent_coef": 0.5, "vf_coef": 2.0}])
def test_update_goes_down_the_gradient_of_the_whole_loss(flags):
    """Once more from the equations, with PyTorch's own distribution."""
    torch.manual_seed(0)
    agent, reference = (script.Agent(2, 3, norm_obs=False) for _ in range(2))
    reference.load_state_dict(agent.state_dict())
    args = script.Args(**{"max_grad_norm": 0.0, "ent_coef": 0.01} | flags)
    batch = random_batch()
    optimizer = torch.optim.SGD(agent.parameters(), lr=0.1)
    metrics = script.update(agent, optimizer, batch, args)

    policy = Categorical(logits=reference.actor(batch.obs))
    ratio = (policy.log_prob(batch.actions) - batch.log_probs).exp()
    advantages = batch.advantages
    if args.norm_adv:
        advantages = (advantages - advantages.mean()) / advantages.std()
    gain = torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()
    errors = reference.critic(batch.obs) - batch.returns
    value_loss = (errors[:, 0] ** 2).mean() / 2 + (errors[:, 1] ** 2).mean() / 2
    f, g = reference.novelty.target(batch.next_obs), reference.novelty.predictor(batch.next_obs)
    novelty = ((g - f) ** 2).sum() / (40 * 64)
    entropy = policy.entropy().mean()
    loss = -gain + args.vf_coef * value_loss - args.ent_coef * entropy + novelty
    loss.backward()
    for (name, found), old in zip(agent.named_parameters(), reference.parameters()):
        gradient = 0 if "target" in name else old.grad
        torch.testing.assert_close(found, old - 0.1 * gradient, msg=name)
    values = {
        "losses/policy_loss": -gain, "losses/value_loss": value_loss, "losses/entropy": entropy,
        "losses/novelty_loss": novelty, "losses/approx_kl": (ratio - 1 - ratio.log()).mean(),
        "losses/clipfrac": ((ratio < 0.8) | (ratio > 1.2)).float().mean(),
    }  # fmt: skip
    assert metrics.keys() == values.keys()
    for tag, value in values.items():
        assert metrics[tag].item() == pytest.approx(value.item(), abs=1e-5), tag


# ---- The loop ------------------------------------------------------------------------------------

FEW = dict(
    env_id="Diary-v0", total_timesteps=600, num_envs=3, num_steps=20, num_minibatches=2,
    update_epochs=2, eval_episodes=2, learning_rate=1e-2, norm_adv=False,
)  # fmt: skip


def test_rollouts_and_their_novelty(tmp_path, monkeypatch):
    """As they happened; novelty by statistics with this rollout in, in deviations of its sums."""
    calls = recorded(monkeypatch, script, "make_batch")
    state, _ = train(script, tmp_path, **FEW | {"seed": 3, "int_gamma": 0.6})
    torch.manual_seed(3)
    agent, sums, totals = script.Agent(2, 3, norm_obs=False), [], np.zeros(3)
    for number, ((_, *rollout, novelties, last_obs, _), _) in enumerate(calls):
        for i in range(3):
            happened = Diary.made[i].steps[number * 20 : (number + 1) * 20]
            for column, expected in zip(rollout, zip(*happened), strict=True):
                np.testing.assert_allclose(column[:, i], np.array(expected, np.float32), rtol=1e-6)
            if number + 1 < len(calls):
                np.testing.assert_allclose(last_obs[i], Diary.made[i].steps[number * 20 + 20][0])
        if number == 0:  # later, g has learned
            next_obs = rollout[3].flatten(0, 1)
            agent.novelty.statistics.mean.copy_(next_obs.mean(0))
            agent.novelty.statistics.variance.copy_(next_obs.var(0, correction=0))
            errors = agent.novelty(rollout[3]).detach().numpy()
            for t in range(20):
                totals = errors[t] + 0.6 * totals
                sums.append(totals)
            np.testing.assert_allclose(novelties, errors / np.std(sums), rtol=1e-3)
    seen = np.array([step[3] for _, step in side_by_side(3)])
    for name, expected in ("mean", seen.mean(0)), ("variance", seen.var(0)):
        found = state["network"][f"novelty.statistics.{name}"]
        np.testing.assert_allclose(found, expected, rtol=1e-3)


@pytest.mark.parametrize("anneal_lr", [True, False])
def test_metrics_and_learning_rate_are_logged(tmp_path, monkeypatch, anneal_lr):
    learned = recorded(monkeypatch, script, "learn")
    _, points = train(script, tmp_path, **FEW, anneal_lr=anneal_lr)
    for k, ((_, optimizer, batch, _), metrics) in enumerate(learned):
        rate = 1e-2 * (1 - k / len(learned) if anneal_lr else 1)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(rate)
        errors = (batch.returns - batch.values)[:, 0].var() / batch.returns[:, 0].var()
        metrics |= {"losses/explained_variance": 1 - errors, "charts/learning_rate": rate}
        for tag, value in metrics.items():
            assert points[tag][k] == (60 * (k + 1), pytest.approx(float(value), abs=1e-5)), tag


def test_statistics_change_only_between_updates_and_the_next_rollout(tmp_path, monkeypatch):
    check_ppo_statistics(script, tmp_path, monkeypatch, **FEW, norm_obs=True)


@pytest.mark.parametrize("norm_reward", [True, False])
def test_rewards_are_scaled_for_learning_only(tmp_path, monkeypatch, norm_reward):
    check_ppo_rewards(script, tmp_path, monkeypatch, **FEW, norm_reward=norm_reward, gamma=0.9)


def test_every_setting_of_the_algorithm_changes_the_outcome(tmp_path):
    def outcome(**settings):
        state, _ = train(script, tmp_path, **FEW | {"total_timesteps": 240} | settings)
        weights = state["network"].items()
        return [value.tolist() for name, value in weights if "statistics" not in name]

    check_settings(script, outcome, {
        "seed": 2, "total_timesteps": 250, "num_envs": 4, "learning_rate": 5e-3, "anneal_lr": False,
        "num_steps": 25, "gamma": 0.3, "int_gamma": 0.3, "gae_lambda": 0.2, "num_minibatches": 3,
        "update_epochs": 3, "norm_adv": True, "ext_coef": 1.0, "int_coef": 2.0, "clip_coef": 0.01,
        "ent_coef": 0.1, "vf_coef": 0.1, "max_grad_norm": 0.01, "norm_obs": True,
        "norm_reward": True,
    })  # fmt: skip
