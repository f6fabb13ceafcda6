"""What ppo_masked_taxi.py has of its own: the mask, on its way from the environment to the loss.

What it has word for word from ppo_cartpole.py is tested in test_ppo_cartpole.py.
"""

import inspect
import json
from dataclasses import replace

import gymnasium as gym
import numpy as np
import ppo_cartpole
import ppo_masked_taxi as script
import pytest
import torch
from conftest import Bench
from diary import (
    Diary, check_ppo_log, check_ppo_rewards, check_ppo_statistics, check_settings, recorded,
    side_by_side, train,
)  # fmt: skip
from torch.distributions import Categorical

# For the tests that all scripts share.
TINY = (
    "--total-timesteps 2000 --num-envs 4 --num-steps 32 --num-minibatches 2 --update-epochs 2 "
    "--norm-obs --norm-reward --checkpoint-frequency 500 --eval-frequency 700 --eval-episodes 5"
)
OWN = "discrete"
OWN_FLAGS = (  # it has no masks: all actions are valid
    "--total-timesteps 10000 --num-envs 8 --num-steps 32 --num-minibatches 1 --update-epochs 20 "
    "--learning-rate 1e-3 --gamma 0.98 --gae-lambda 0.8 --no-norm-reward"
)
WRONG_SPACES = ["Pendulum-v1"]
DIVERGES = "--learning-rate 1e30"
BAD = [
    ("--num-steps 0", "--num-steps"),
    ("--num-envs 1 --num-steps 5 --num-minibatches 3", "--num-minibatches"),
    ("--gae-lambda 1.01", "--gae-lambda"),
    ("--mask-actions 3", "3"),
]
LEARNS = [("--seed 1 --total-timesteps 25000", -20)]  # chance: -120; whole runs are in the record


@pytest.mark.parametrize("name", [
    "Batch", "RewardScaler", "RunningStatistics", "act", "clipped_policy_loss", "compute_gradient",
    "explained_variance", "gae", "gumbel_noise", "layer", "learn", "log_prob_and_entropy",
    "make_batch", "play", "update",
])  # fmt: skip
def test_what_ppo_has_too_is_the_same_and_tested_there(name):
    ours, theirs = (inspect.getsource(getattr(module, name)) for module in (script, ppo_cartpole))
    assert ours == theirs


def test_the_best_policy_of_taxi_has_what_the_docstring_says():
    """By value iteration, on average over the starts; without a time limit."""
    env = gym.make(script.Args().env_id).unwrapped
    values = np.zeros(500)
    for _ in range(60):
        values = np.array([
            max(sum(p * (r + (0 if end else values[s])) for p, s, r, end in outcomes)
                for outcomes in env.P[state].values())
            for state in range(500)
        ])  # fmt: skip
    best = env.initial_state_distrib @ values
    assert f"best policy has {best:.1f}, on average over all starts" in script.__doc__


# ---- The policy over the valid actions -----------------------------------------------------------

# Every mask of four actions with a valid one.
MASKS = torch.tensor([[i >> a & 1 for a in range(4)] for i in range(1, 16)])
VALID = [mask.nonzero().squeeze(1) for mask in MASKS]


@pytest.mark.parametrize("scale", [1.0, 1e4, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_probabilities_and_entropy_are_those_of_a_policy_that_knows_only_the_valid_actions(
    scale, dtype
):
    """PyTorch's own, over logits from which the invalid ones were cut out."""
    torch.manual_seed(0)
    logits = scale * torch.randn(15, 4, dtype=dtype)
    masked = script.mask_logits(logits, MASKS)
    probabilities = masked.softmax(1)
    assert (probabilities[MASKS == 0] == 0).all()
    for row, valid in enumerate(VALID):
        expected = Categorical(logits=logits[row, valid])
        torch.testing.assert_close(probabilities[row, valid], expected.probs)
        for number, action in enumerate(valid):
            found = script.log_prob_and_entropy(masked[row], action)
            number = torch.tensor(number)
            torch.testing.assert_close(found, (expected.log_prob(number), expected.entropy()))


@pytest.mark.parametrize("scale", [1.0, 1e4, 1e30])
def test_invalid_logits_get_no_gradient_and_valid_ones_that_of_the_smaller_policy(scale):
    """Through the probability of an action and the entropy; and never NaN, as 0 * -inf would be."""
    torch.manual_seed(0)
    numbers = scale * torch.randn(15, 4).double()
    for row, valid in enumerate(VALID):
        for number, action in enumerate(valid):
            logits, cut = numbers[row].clone().requires_grad_(), numbers[row, valid].clone()
            sum(script.log_prob_and_entropy(script.mask_logits(logits, MASKS[row]), action)).backward()
            policy = Categorical(logits=cut.requires_grad_())
            (policy.log_prob(torch.tensor(number)) + policy.entropy()).backward()
            torch.testing.assert_close(logits.grad[valid], cut.grad)
            assert logits.grad.isfinite().all() and (logits.grad[MASKS[row] == 0] == 0).all()


def make_agent(norm_obs=False):
    """Two numbers, four actions, a mask. The policy is far from uniform, the statistics from 0."""
    torch.manual_seed(0)
    agent = script.Agent(4 + 2, 4, norm_obs, 4)
    with torch.no_grad():
        agent.actor[-1].weight *= 100
        if norm_obs:
            agent.obs_statistics.update(torch.tensor([[1.0, 10.0], [3.0, 30.0]]))
    return agent


def test_where_one_action_is_valid_there_is_nothing_to_learn():
    """Its probability is 1, whatever its advantage: no gradient at all reaches the policy."""
    agent = make_agent()
    mask = torch.eye(4)[torch.arange(8) % 4]
    obs = torch.cat([mask, torch.randn(8, 2)], 1)
    batch = script.Batch(obs, torch.arange(8) % 4, torch.zeros(8), *torch.randn(2, 8))
    metrics = script.compute_gradient(agent, batch, script.Args(ent_coef=0.5, norm_adv=False))
    assert metrics["losses/entropy"] == metrics["losses/approx_kl"] == 0
    assert not any(weights.grad.any() for weights in agent.actor.parameters())
    assert all(weights.grad.any() for weights in agent.critic.parameters())


@pytest.mark.parametrize("norm_obs", [True, False])
def test_the_networks_do_not_see_the_mask(norm_obs):
    """Nor is it normalised. In NumPy, logits are the agent's, also after an update."""
    agent = make_agent(norm_obs)
    plain, obs = torch.randn(15, 2), torch.tensor([])
    actor = script.Actor(agent)
    for _ in range(2):
        obs = torch.cat([MASKS.float(), plain], 1)
        logits, values = agent(obs)
        unmasked = agent.actor(agent.normalize(plain))
        torch.testing.assert_close(values, agent.critic(agent.normalize(plain)).squeeze(1))
        torch.testing.assert_close(logits[MASKS == 1], unmasked[MASKS == 1])
        assert (logits[MASKS == 0] == script.LOWEST).all()
        np.testing.assert_allclose(actor(obs.numpy()), logits.detach(), rtol=1e-4, atol=1e-5)
        assert actor(obs.numpy()).dtype == np.float32
        best = [valid[unmasked[row, valid].argmax()].item() for row, valid in enumerate(VALID)]
        assert script.play(script.Args(), agent, obs.numpy()).tolist() == best
        with torch.no_grad():
            for weights in agent.parameters():
                weights += 0.3 * torch.randn_like(weights)


def test_samples_are_valid_and_as_frequent_as_the_policy_says():
    agent = make_agent()
    obs = torch.cat([MASKS.float(), torch.randn(15, 2)], 1)
    rows = obs.numpy().repeat(4000, 0)
    actions = script.act(script.Actor(agent), rows, script.gumbel_noise(60_000, 4))
    shares = np.array([np.bincount(each, minlength=4) for each in actions.reshape(15, 4000)]) / 4000
    assert (shares[MASKS.numpy() == 0] == 0).all()
    unmasked = agent.actor(obs[:, 4:]).detach()
    for row, valid in enumerate(VALID):
        np.testing.assert_allclose(shares[row, valid], unmasked[row, valid].softmax(0), atol=0.03)


def test_the_gradient_is_that_of_the_expected_return():
    """Three states in a row, four actions with masks: the last state is the end.

    Valid actions: in state 0, the first goes to 1 and the second to 2; in state 1, all but the
    first go to 2; in state 2, only the third, to the end. The return is the sum of the rewards.
    The expectation is over paths of policies that know only valid actions.
    """
    agent = make_agent().double()
    masks = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1], [0, 0, 1, 0]]).double()
    rewards = torch.tensor([[1.0, 2, 9, 9], [9, -1, 3, 0.5], [9, 9, 4, 9]]).double()
    states = torch.randn(3, 2).double()
    follows = {(0, 0): 1, (0, 1): 2, (1, 1): 2, (1, 2): 2, (1, 3): 2, (2, 2): 3}
    returns, q, reached = [0, 0, 0, 0.0], {}, [1.0, 0, 0, 0]
    pi = {}
    for s in (2, 1, 0):
        valid = [a for state, a in follows if state == s]
        pi |= dict(zip([(s, a) for a in valid], agent.actor(states[s])[valid].softmax(0)))
        q |= {(s, a): rewards[s, a] + returns[follows[s, a]] for a in valid}
        returns[s] = sum(pi[s, a] * q[s, a] for a in valid)
    for s, a in follows:
        reached[follows[s, a]] = reached[follows[s, a]] + reached[s] * pi[s, a]
    returns[0].backward()
    expected = [weights.grad.clone() for weights in agent.actor.parameters()]
    agent.zero_grad()
    # The same by compute_gradient: a row for each pair, its advantage times how often it occurs.
    rows = torch.tensor(list(follows))
    often = torch.stack([reached[s] * pi[s, a] for s, a in follows]).detach()
    advantages = torch.stack([q[s, a] - returns[s] for s, a in follows]).detach()
    log_probs = torch.stack([pi[pair].log() for pair in follows]).detach()
    obs = torch.cat([masks, states], 1)[rows[:, 0]]
    batch = script.Batch(obs, rows[:, 1], log_probs, len(rows) * often * advantages, advantages)
    script.compute_gradient(agent, batch, script.Args(norm_adv=False, ent_coef=0, max_grad_norm=0))
    for weights, gradient in zip(agent.actor.parameters(), expected, strict=True):
        torch.testing.assert_close(weights.grad, -gradient)


# ---- Masks of environments -----------------------------------------------------------------------


class Masked(Diary):
    """A diary with masks, which raises an error at an invalid action. Its actions are 5 to 7.

    A mask leaves one, two or three actions, others each step; none where an episode has ended. It
    is in an array that is reused. In the diary, it stands before the other numbers of observations.
    """

    def __init__(self, render_mode=None):
        super().__init__()
        self.mask = np.zeros(3, np.int8)

    def draw(self, least=1):
        self.mask[:] = np.arange(3) < self.np_random.integers(least, 4) * least
        self.np_random.shuffle(self.mask)
        return {"action_mask": self.mask}

    def reset(self, **options):
        return super().reset(**options)[0], self.draw()

    def step(self, action):
        assert self.mask[action - 5] == 1, "an invalid action"
        before = self.mask.tolist()
        obs, reward, terminated, truncated, _ = super().step(action)
        info = self.draw(least=0 if terminated or truncated else 1)
        plain, action, _, after, *ends = self.steps[-1]
        self.steps[-1] = (before + plain, action, reward, self.mask.tolist() + after, *ends)
        return obs, reward, terminated, truncated, info


class AllValid(Diary):
    """A diary with a mask that forbids nothing."""

    def reset(self, **options):
        return super().reset(**options)[0], {"action_mask": np.ones(3, bool)}

    def step(self, action):
        return *super().step(action)[:4], {"action_mask": np.ones(3, bool)}


class Spoilt(AllValid):
    """From the third step on, another mask, or none at all."""

    def __init__(self, info, render_mode=None):
        super().__init__()
        self.info = info

    def reset(self, **options):
        obs, info = super().reset(**options)
        self.left = 6
        return obs, info

    def step(self, action):
        *result, info = super().step(action)
        return *result, info if len(self.steps) < 3 else self.info


for kind in (Masked, AllValid, Spoilt):
    gym.register(f"{kind.__name__}-v0", entry_point=kind)

FEW = dict(
    env_id="Masked-v0", total_timesteps=600, num_envs=3, num_steps=20, num_minibatches=2,
    update_epochs=2, eval_episodes=2, learning_rate=1e-2, norm_adv=False, anneal_lr=True, gamma=0.9,
    gae_lambda=0.8, clip_coef=0.2, ent_coef=0.01, vf_coef=0.5, max_grad_norm=0.5, norm_obs=False,
    norm_reward=False,
)  # fmt: skip
PLAIN = FEW | {"env_id": "Diary-v0"}  # it has no masks


def test_taxi_shows_its_mask_before_the_observation():
    env, taxi = script.make_env(script.Args(env_id="Taxi-v4")), gym.make("Taxi-v4")
    assert env.observation_space.shape == (506,)
    (shown, _), (obs, info) = env.reset(seed=3), taxi.reset(seed=3)
    for action in (0, 0, 0, 0, 3, 3, 3):  # into a corner
        mask = info["action_mask"]
        np.testing.assert_array_equal(shown, [*mask, *np.eye(500)[obs]])
        (shown, *_), (obs, *_, info) = env.step(action), taxi.step(action)
    assert 0 < mask.sum() < 6


def test_rollouts_are_what_really_happened_with_the_mask_of_each_step(tmp_path, monkeypatch):
    """Not that of the next one: the log-probabilities of the batch are under the first."""
    rollouts = recorded(monkeypatch, script, "make_batch")
    learned = recorded(monkeypatch, script, "learn")
    train(script, tmp_path, **FEW)
    assert len(side_by_side(3)) == 600 and len(Diary.made[3].steps) > 0  # evaluated as well
    counts = {sum(step[0][:3]) for env in Diary.made for step in env.steps}
    assert counts == {1, 2, 3}
    assert any(sum(step[3][:3]) == 0 for _, step in side_by_side(3))
    for number, ((agent, *rollout, _), _) in enumerate(rollouts):
        for i in range(3):
            happened = Diary.made[i].steps[number * 20 : number * 20 + 20]
            for column, expected in zip(rollout, zip(*happened), strict=True):
                np.testing.assert_allclose(column[:, i], np.array(expected, np.float32), rtol=1e-6)
        batch = learned[number][0][2]
        assert torch.equal(batch.obs, rollout[0].flatten(0, 1))
        logits = agent.actor(batch.obs[:, 3:])
        for mask, row, action, log_prob in zip(batch.obs, logits, batch.actions, batch.log_probs):
            valid = mask[:3].nonzero().squeeze(1).tolist()
            expected = Categorical(logits=row[valid]).log_prob(torch.tensor(valid.index(action)))
            torch.testing.assert_close(log_prob, expected.detach())
            assert (log_prob == 0) == (len(valid) == 1)


def test_before_the_first_gradient_step_the_ratio_is_one(tmp_path):
    """So acting, the old and the new policy have the same masks."""
    _, points = train(script, tmp_path, **FEW | {"update_epochs": 1, "num_minibatches": 1})
    assert all(value == 0 for _, value in points["losses/clipfrac"])
    assert all(abs(value) < 1e-6 for _, value in points["losses/approx_kl"])


def weights(state):
    return {name: value.tolist() for name, value in state["network"].items()}


@pytest.mark.parametrize("changes", [{}, {"norm_obs": True, "norm_reward": True, "norm_adv": True}])
def test_without_masks_it_is_ppo(tmp_path, capfd, changes):
    """ppo_cartpole.py to the bit, if there are none, or all is valid, or they are not wanted."""
    expected = weights(train(ppo_cartpole, tmp_path, **PLAIN | changes)[0])
    for env_id, mask_actions, words in (
        ("Diary-v0", True, "no action_mask"), ("Diary-v0", False, ""),
        ("AllValid-v0", True, ""), ("AllValid-v0", False, ""),
    ):  # fmt: skip
        capfd.readouterr()
        flags = PLAIN | changes | {"env_id": env_id, "mask_actions": mask_actions}
        state, _ = train(script, tmp_path, **flags)
        err = capfd.readouterr().err
        assert weights(state) == expected and words in err and ("mask" in err) == bool(words)
        assert state["envs"]["obs"].shape == (3, 5 if env_id[0] == "A" and mask_actions else 2)


def test_without_its_mask_the_policy_takes_invalid_actions(tmp_path):
    with pytest.raises(AssertionError, match="an invalid action"):
        train(script, tmp_path, **FEW, mask_actions=False)


@pytest.mark.parametrize("info, words", [
    ({"action_mask": [0, 0, 0]}, "leaves no valid action"),
    ({}, "must be 3 numbers of 0 and 1, not None"),
    ({"action_mask": [1, 1, 1, 1]}, r"must be 3 numbers of 0 and 1, not \[1, 1, 1, 1\]"),
    ({"action_mask": [[1, 1, 1]]}, "must be 3 numbers"),
    ({"action_mask": [0, -1e9, 0]}, "must be 3 numbers"),  # to be added to logits: 0 means valid
])  # fmt: skip
def test_a_mask_that_says_nothing_is_refused_when_it_comes(tmp_path, info, words):
    flags = FEW | {"env_id": "Spoilt-v0", "env_kwargs": json.dumps({"info": info})}
    with pytest.raises(script.UsageError, match=words) as raised:
        train(script, tmp_path, **flags)
    assert "Stopped at step" in raised.value.__notes__[0]
    assert [len(env.steps) for env in Diary.made[:3]] == [3, 2, 2]


def test_on_the_command_line_it_is_refused_in_one_line(tmp_path):
    bench = Bench("ppo_masked_taxi", tmp_path)
    (tmp_path / "mine.py").write_text(
        "import gymnasium as gym, numpy as np\n"
        "class Mine(gym.Env):\n"
        "    observation_space, action_space = gym.spaces.Discrete(2), gym.spaces.Discrete(2)\n"
        "    def reset(self, **options):\n"
        "        return 0, {'action_mask': [1, 1]}\n"
        "    def step(self, action):\n"
        "        return 1, 0.0, False, False, {'action_mask': [0, 0]}\n"
        "gym.register('Mine-v0', entry_point=Mine)\n"
    )
    ended = bench.run("--env-id mine:Mine-v0")
    line = ended.err.splitlines()[-1]  # after the progress bar
    assert ended.code == 2 and "Traceback" not in ended.err
    assert line.startswith('ppo_masked_taxi: info["action_mask"] leaves no valid action Stopped at')


def test_statistics_change_only_between_updates_and_the_next_rollout(tmp_path, monkeypatch):
    check_ppo_statistics(script, tmp_path, monkeypatch, **PLAIN | {"norm_obs": True})


def test_statistics_are_not_those_of_masks(tmp_path):
    state, _ = train(script, tmp_path, **FEW | {"norm_obs": True})
    seen = np.array([step[0][3:] for _, step in side_by_side(3)])
    network = state["network"]
    np.testing.assert_allclose(network["obs_statistics.mean"], seen.mean(0), rtol=1e-4)
    np.testing.assert_allclose(network["obs_statistics.variance"], seen.var(0), rtol=1e-3)


@pytest.mark.parametrize("anneal_lr", [True, False])
def test_metrics_and_learning_rate_are_logged(tmp_path, monkeypatch, anneal_lr):
    check_ppo_log(script, tmp_path, monkeypatch, **FEW | {"anneal_lr": anneal_lr})


@pytest.mark.parametrize("norm_reward", [True, False])
def test_rewards_are_scaled_for_learning_only(tmp_path, monkeypatch, norm_reward):
    check_ppo_rewards(script, tmp_path, monkeypatch, **FEW | {"norm_reward": norm_reward})


def test_load_policy_takes_observation_and_mask(tmp_path):
    folder = script.train(script.Args(**FEW, runs_dir=str(tmp_path))).folder
    policy, env = script.load_policy(folder), Masked()
    for seed in range(20):
        (obs, info), ended = env.reset(seed=seed), False
        while not ended:
            action = policy({"action_mask": info["action_mask"], "obs": obs})
            obs, _, terminated, truncated, info = env.step(action)
            ended = terminated or truncated
    assert len({step[1] for step in env.steps}) > 1


def test_a_policy_can_be_evaluated_without_its_mask(tmp_path):
    """As the paper does. It is the same network."""
    folder = script.train(script.Args(**FEW, runs_dir=str(tmp_path))).folder
    args = script.read_checkpoint(folder)["args"]
    masked, plain = (script.load_network(folder, replace(args, mask_actions=each))[-1]
                     for each in (True, False))  # fmt: skip
    assert masked.mask_size == 3 and plain.mask_size == 0
    obs = torch.randn(50, 2)
    logits = plain(obs)[0]
    torch.testing.assert_close(masked(torch.cat([torch.ones(50, 3), obs], 1))[0], logits)
    with pytest.raises(AssertionError, match="an invalid action"):
        script.evaluate(replace(args, mask_actions=False, eval_episodes=50), plain)


def test_every_setting_of_the_algorithm_changes_the_outcome(tmp_path):
    """Masks in an environment that allows what they forbid."""

    def outcome(**settings):
        flags = FEW | {"env_id": "Polite-v0", "total_timesteps": 240} | settings
        state, _ = train(script, tmp_path, **flags)
        return [value.tolist() for name, value in state["network"].items() if "stat" not in name]

    class Polite(Masked):
        def step(self, action):
            self.mask[action - 5] = 1
            return super().step(action)

    gym.register("Polite-v0", entry_point=Polite)
    check_settings(script, outcome, {
        "seed": 2, "total_timesteps": 250, "num_envs": 4, "learning_rate": 5e-3, "anneal_lr": False,
        "num_steps": 25, "gamma": 0.3, "gae_lambda": 0.2, "num_minibatches": 3, "update_epochs": 3,
        "norm_adv": True, "clip_coef": 0.01, "ent_coef": 0.1, "vf_coef": 0.1, "max_grad_norm": 0.01,
        "norm_obs": True, "norm_reward": True, "mask_actions": False,
    })  # fmt: skip
