"""The mathematics of reinforce_cartpole.py: by hand, against brute force, against closed forms."""

import math

import numpy as np
import pytest
import reinforce_cartpole as script
import torch
from diary import Diary, check_episodes, check_settings, recorded, train
from torch import nn

# For the tests that all scripts share.
TINY = (
    "--total-timesteps 2000 --num-envs 2 --checkpoint-frequency 500 --eval-frequency 700 "
    "--eval-episodes 5"
)
OWN = "discrete"
OWN_FLAGS = "--total-timesteps 10000"
WRONG_SPACES = ["Pendulum-v1"]
DIVERGES = "--env-id cases:Rich-v0"  # a large --learning-rate only makes the policy deterministic
BAD = [
    ("--num-envs 1", "--no-normalize-returns"),
    ("--num-envs 0 --no-normalize-returns", "--num-envs"),
    ("--gamma 1.5", "--gamma"),
    ("--learning-rate 0", "--learning-rate"),
]
LEARNS = [
    ("--seed 1", 475),  # what Gymnasium calls solved
    ("--num-envs 1 --no-normalize-returns --no-anneal-lr --learning-rate 1e-3", 60),  # chance: 22
]
# What others published, by the record's name after `<script>__`: shown beside our results.
PUBLISHED = {}
# How speed.py measures the script, and beside what; its first lines explain the form.
SPEED = {
    "steps": 100_000,
    "first": 0,
    "peers": {
        "the tutorial's program, mended only to run": {
            "file": "tutorial_reinforce.py",
            "steps": 20_000,
            "equal": "textbook form",
        },
    },
    "flags": "",
    "variants": {
        "as it is by default": "",
        "textbook form": "--num-envs 1 --no-normalize-returns --no-anneal-lr --learning-rate 1e-3",
    },
    "floors": {"floor": "10000 20000"},
}

# ---- discounted_returns --------------------------------------------------------------------------


def test_returns_by_hand():
    rewards = [1.0, -2.0, 3.0]
    assert script.discounted_returns(rewards, 0.5).tolist() == [1 - 0.5 * 2 + 0.25 * 3, -0.5, 3]
    assert script.discounted_returns(rewards, 0.0).tolist() == rewards
    assert script.discounted_returns(rewards, 1.0).tolist() == [2, 1, 3]


@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.99, 1.0])
def test_returns_against_the_double_sum(gamma):
    """Equation 3.8, the definition; the script has the recursion 3.9."""
    rewards = np.random.default_rng(0).normal(size=60).tolist()
    expected = [sum(gamma ** (k - t) * rewards[k] for k in range(t, 60)) for t in range(60)]
    torch.testing.assert_close(script.discounted_returns(rewards, gamma), torch.tensor(expected))


# ---- normalize_returns ---------------------------------------------------------------------------


def test_baseline_by_hand():
    """Step 0 has three returns, step 1 has two, step 2 has one, which is its own mean."""
    returns = [torch.tensor([3.0]), torch.tensor([6.0, 1.0]), torch.tensor([9.0, 5.0, 7.0])]
    differences = np.array([3 - 6, 6 - 6, 1 - 3, 9 - 6, 5 - 3, 7 - 7])
    expected = torch.tensor(differences / np.sqrt(np.mean(differences**2)), dtype=torch.float32)
    torch.testing.assert_close(script.normalize_returns(returns), expected)


def test_baseline_against_a_loop_whatever_unit_and_zero():
    torch.manual_seed(0)
    returns, differences = [torch.randn(length) for length in (5, 1, 8, 3, 8)], []
    for episode in returns:
        for t in range(len(episode)):
            others = [other[t].item() for other in returns if t < len(other)]
            differences.append(episode[t].item() - sum(others) / len(others))
    expected = torch.tensor(differences) / np.std(differences)
    for unit, zero in ((1, 0), (100, 7)):
        found = script.normalize_returns([unit * episode + zero for episode in returns])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("lengths", [[1], [500] * 3, [500] * 7, [1, 500, 500, 500], [500, 3, 499]])
def test_nothing_is_learned_where_all_episodes_went_alike(lengths):
    """Exactly 0. Rounding errors, divided by their deviation, would be steps of full size."""
    alike = script.discounted_returns([-1.1] * 500, 0.99)
    returns = [alike[:length].clone() for length in lengths]
    assert torch.equal(script.normalize_returns(returns), torch.zeros(sum(lengths)))


# ---- policy_loss and update ----------------------------------------------------------------------


class Bandit(nn.Module):
    """A softmax over three arms, one logit each, whatever the observation."""

    def __init__(self, logits):
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(logits, dtype=torch.float64))

    def forward(self, obs):
        return self.theta.expand(len(obs), 3)


def test_gradient_is_that_of_the_expected_reward_of_a_bandit():
    """d/d theta_k E[r] = pi_k (r_k - E[r]). Each arm is drawn as often as pi says: no noise."""
    pi, rewards = torch.tensor([[0.5, 0.3, 0.2], [1.0, 4.0, -2.0]]).double()
    bandit = Bandit(pi.log().tolist())
    actions = torch.tensor([0] * 5 + [1] * 3 + [2] * 2)
    log_probs = bandit(torch.zeros(10, 1)).log_softmax(-1)[torch.arange(10), actions]
    script.policy_loss(log_probs, rewards[actions], num_episodes=10).backward()
    torch.testing.assert_close(-bandit.theta.grad, pi * (rewards - (pi * rewards).sum()))


@pytest.mark.parametrize("gamma", [1.0, 0.5])
def test_gradient_where_an_action_has_consequences(gamma):
    """Summed over all episodes, each times its probability, against the expected return itself.

    In state 0, action 1 ends the episode with 0.6, and action 0 leads to state 1, whose actions pay
    1 and -0.5. gamma discounts what state 0 learns of the later reward. It does not discount what
    state 1 learns, as gamma^t is left out.
    """
    theta = torch.tensor([[0.3, -0.2], [0.1, 0.4]], dtype=torch.float64, requires_grad=True)
    (p, _), (q, _) = theta.softmax(-1)
    loss = 0.0
    for probability, states, actions, rewards in (
        (1 - p, [0], [1], [0.6]),
        (p * q, [0, 1], [0, 0], [0.0, 1.0]),
        (p * (1 - q), [0, 1], [0, 1], [0.0, -0.5]),
    ):
        returns = script.discounted_returns(rewards, gamma).double()
        log_probs = theta.log_softmax(-1)[states, actions]
        loss = loss + probability.detach() * script.policy_loss(log_probs, returns, num_episodes=1)
    value = q * 1.0 + (1 - q) * -0.5  # of state 1
    expected = p * gamma * value.detach() + (1 - p) * 0.6 + p.detach() * value
    torch.testing.assert_close(*(torch.autograd.grad(x, theta) for x in (-loss, expected)))


def test_update_takes_one_step_down_the_gradient():
    """grad log pi(1) at the uniform policy is (-1/3, 2/3, -1/3). G is 6 and 0, in two episodes."""
    bandit = Bandit([0.0, 0.0, 0.0])
    optimizer = torch.optim.SGD(bandit.parameters(), lr=0.1)
    obs, actions = torch.zeros(2, 1), torch.tensor([1, 0])
    returns = torch.tensor([6.0, 0.0]).double()
    metrics = script.update(bandit, optimizer, obs, actions, returns, script.Args(num_envs=2))
    expected = torch.tensor([-0.1, 0.2, -0.1]).double()
    torch.testing.assert_close(bandit.theta.detach(), expected)
    assert metrics["losses/policy_loss"].item() == pytest.approx(6 * math.log(3) / 2)
    assert metrics["losses/entropy"].item() == pytest.approx(math.log(3))
    assert not any(value.requires_grad for value in metrics.values())
    script.update(bandit, optimizer, obs, actions, 0 * returns, script.Args(num_envs=2))
    torch.testing.assert_close(bandit.theta.detach(), expected)


# ---- The policy ----------------------------------------------------------------------------------


def test_the_first_policy_is_uniform_and_can_learn():
    policy = script.Policy(4, 3)
    assert torch.equal(policy(torch.randn(5, 4)), torch.zeros(5, 3))
    assert policy.layers[0](torch.randn(5, 4)).std() > 0.1


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


def make_policy():
    torch.manual_seed(0)
    policy = script.Policy(2, 3)
    nn.init.normal_(policy.layers[-1].weight)
    policy.layers[-1].bias.data -= policy(torch.rand(1000, 2)).mean(0)  # no action is always best
    return policy


def test_the_actor_is_the_policy_also_after_an_update():
    policy, obs = make_policy(), torch.randn(50, 2)
    actor = script.Actor(policy)
    for _ in range(2):
        logits = policy(obs).detach()
        np.testing.assert_allclose(actor(obs.numpy()), logits, rtol=1e-4, atol=1e-6)
        with torch.no_grad():
            for weights in policy.parameters():
                weights += 0.3 * torch.randn_like(weights)


# ---- Episodes, the loop --------------------------------------------------------------------------

FEW = dict(env_id="Diary-v0", total_timesteps=600, num_envs=4, eval_episodes=2)


def episodes_of(env):
    """The diary of an environment, cut where an episode ended."""
    ends = [t for t, step in enumerate(env.steps, 1) if step[4] or step[5]]
    return [env.steps[start:end] for start, end in zip([0, *ends], ends)]


def test_episodes_wait_for_each_other(monkeypatch):
    """One whole episode from each environment, then the next one; row t is the step from t on."""
    Diary.made.clear()
    envs = script.Envs(script.Args(**FEW), 4, script.TRAINING)
    envs.reset()
    policy, acts = script.Policy(2, 3), recorded(monkeypatch, script, "act")
    played = [script.play_episodes(envs, policy) for _ in range(30)]
    for i, env in enumerate(Diary.made):
        steps = episodes_of(env)
        assert len(steps) == 30 and sum(map(len, steps)) == len(env.steps)
        for episodes, expected in zip(played, steps):
            obs, actions, rewards, *_ = zip(*expected)
            assert np.array(episodes[i].obs).tolist() == list(obs)
            assert episodes[i].actions == list(actions)
            assert episodes[i].rewards == pytest.approx(rewards)
    longest = [max(map(len, lengths)) for lengths in zip(*map(episodes_of, Diary.made))]
    assert len(acts) == sum(longest)  # one forward pass a step, for all that still play
    assert {step[1] for env in Diary.made for step in env.steps} == {0, 1, 2}  # not greedy


def test_every_environment_gets_the_action_for_what_it_shows(monkeypatch):
    def choose(obs):
        return (obs[:, 0] * 1000).astype(int) % 3

    monkeypatch.setattr(script, "act", lambda actor, obs, noise=0.0: choose(obs))
    Diary.made.clear()
    envs = script.Envs(script.Args(**FEW), 4, script.TRAINING)
    envs.reset()
    for _ in range(10):
        script.play_episodes(envs, make_policy())
    seen, chosen, *_ = zip(*(step for env in Diary.made for step in env.steps))
    assert list(chosen) == choose(np.array(seen, np.float32)).tolist() and len(set(chosen)) == 3


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("anneal_lr", [True, False])
def test_an_update_is_of_one_episode_of_each_environment(
    tmp_path, monkeypatch, normalize, anneal_lr
):
    """What `update` gets and what is logged, computed again from what really happened."""
    updates = recorded(monkeypatch, script, "update")
    flags = {"seed": 3, "gamma": 0.9, "normalize_returns": normalize, "anneal_lr": anneal_lr}
    state, points = train(script, tmp_path, **FEW, **flags)
    torch.manual_seed(3)
    first = script.Policy(2, 3).layers[0].weight
    assert torch.equal(updates[0][0][0].layers[0].weight, first)
    played, step, rates, losses = [], 0, [], []
    for episodes, (arguments, metrics) in zip(zip(*map(episodes_of, Diary.made[:4])), updates):
        _, optimizer, obs, actions, returns, args = arguments
        assert type(optimizer) is torch.optim.Adam and args.num_envs == 4 and step < 600
        rates.append(1e-2 * (1 - step / 600) if anneal_lr else 1e-2)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(rates[-1])
        assert obs.tolist() == [step[0] for episode in episodes for step in episode]
        assert actions.tolist() == [step[1] for episode in episodes for step in episode]
        rewards = [[step[2] for step in episode] for episode in episodes]
        expected = [
            [sum(0.9**k * reward for k, reward in enumerate(r[t:])) for t in range(len(r))]
            for r in rewards
        ]
        if normalize:
            longest = range(max(map(len, expected)))
            means = [np.mean([g[t] for g in expected if t < len(g)]) for t in longest]
            expected = [[x - means[t] for t, x in enumerate(g)] for g in expected]
        expected = np.concatenate(expected)
        expected /= expected.std() if normalize else 1
        np.testing.assert_allclose(returns, expected, rtol=1e-3, atol=1e-4)
        for t in range(max(map(len, episodes))):
            played += [(i, episode[t]) for i, episode in enumerate(episodes) if t < len(episode)]
        step = len(played)
        losses.append((step, metrics["losses/policy_loss"].item()))
    assert step == state["envs"]["steps"] >= 600
    assert state["envs"]["episodes"] == [len(updates)] * 4
    np.testing.assert_allclose(points["losses/policy_loss"], losses, rtol=1e-6)
    assert [rate for _, rate in points["charts/learning_rate"]] == pytest.approx(rates)
    check_episodes(points, played)


def test_evaluation_is_greedy_and_plays_so_many_episodes(capsys):
    """Mean return and mean length over 7 whole episodes; the random numbers go on as before."""
    policy = make_policy()
    Diary.made.clear()
    torch.manual_seed(5)
    result = script.evaluate(script.Args(**FEW | {"num_envs": 3, "eval_episodes": 7}), policy)
    after = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(1))
    episodes = [episode for env in Diary.made for episode in episodes_of(env)]
    returns = [sum(step[2] for step in episode) for episode in episodes]
    assert len(episodes) == 7
    steps = sum(len(env.steps) for env in Diary.made)  # none but those of the 7
    assert result == pytest.approx((np.mean(returns), steps / 7), abs=1e-5)
    expected = f"return {np.mean(returns):.1f} ± {np.std(returns):.1f} over 7 episodes"
    assert expected in capsys.readouterr().out
    obs, actions, *_ = zip(*(step for episode in episodes for step in episode))
    assert list(actions) == policy(torch.tensor(obs)).argmax(1).tolist() and len(set(actions)) > 1


@pytest.mark.parametrize("where", ["loss", "weight"])
def test_a_run_that_diverges_stops_and_is_not_saved(tmp_path, monkeypatch, where):
    update = script.update

    def spoil(policy, *others):
        metrics = update(policy, *others)
        if where == "loss":
            return metrics | {"losses/policy_loss": torch.tensor(math.nan)}
        next(policy.parameters()).data[0, 0] = math.inf
        return metrics

    monkeypatch.setattr(script, "update", spoil)
    with pytest.raises(script.UsageError, match="not finite"):
        train(script, tmp_path, **FEW, checkpoint_frequency=1)
    (folder,) = tmp_path.iterdir()
    assert script.read_checkpoint(folder)["envs"]["steps"] == 0


def test_every_setting_of_the_algorithm_changes_the_outcome(tmp_path):
    def outcome(**settings):
        state, _ = train(script, tmp_path, **FEW | {"total_timesteps": 300} | settings)
        return [weights.tolist() for weights in state["network"].values()]

    check_settings(script, outcome, {
        "seed": 2, "total_timesteps": 310, "num_envs": 3, "learning_rate": 5e-3, "anneal_lr": False,
        "gamma": 0.9, "normalize_returns": False,
    })  # fmt: skip
