"""The mathematics of reinforce_cartpole.py, against closed forms, brute force and hand-made tables."""

import copy
import itertools
import math

import gymnasium as gym
import numpy as np
import pytest
import reinforce_cartpole as script
import torch
from torch import nn

# The description for the common tests: README.md explains it.
TINY = "--total-timesteps 2000 --num-envs 2 --checkpoint-frequency 500 --eval-frequency 700 --eval-episodes 5"
OWN = "discrete"
OWN_FLAGS = "--total-timesteps 10000"
WRONG_SPACES = ["Pendulum-v1"]
DIVERGES = "--env-id cases:Rich-v0"  # a large --learning-rate only makes it deterministic
BAD = [("--num-envs 1", "--no-normalize-returns"), ("--gamma 1.5", "--gamma")]
LEARNS = [
    ("--seed 1", 475),  # what Gymnasium calls solved
    ("--env-id Acrobot-v1 --total-timesteps 400000", -100),
    ("--num-envs 1 --no-normalize-returns --no-anneal-lr --learning-rate 1e-3", 60),  # chance: 22
]

# ---- discounted_returns ---------------------------------------------------------------------------------------------


def test_returns_by_hand():
    assert script.discounted_returns([1.0, 2.0, 3.0], 0.5).tolist() == [1 + 0.5 * 2 + 0.25 * 3, 2 + 0.5 * 3, 3]


def test_returns_with_gamma_0_are_the_rewards():
    assert script.discounted_returns([1.0, -2.0, 3.0], 0.0).tolist() == [1, -2, 3]


def test_returns_with_gamma_1_are_the_sums_of_what_follows():
    assert script.discounted_returns([1.0, -2.0, 3.0], 1.0).tolist() == [2, 1, 3]


@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.9, 0.99, 1.0])
def test_returns_against_the_double_sum(gamma):
    """Equation 3.8, the definition, where the script has the recursion 3.9."""
    rewards = np.random.default_rng(0).normal(size=60).tolist()
    expected = [sum(gamma ** (k - t) * rewards[k] for k in range(t, 60)) for t in range(60)]
    torch.testing.assert_close(script.discounted_returns(rewards, gamma), torch.tensor(expected))


def test_returns_of_a_constant_reward_are_the_geometric_series():
    returns = script.discounted_returns([1.0] * 500, 0.99)
    expected = torch.tensor([(1 - 0.99 ** (500 - t)) / (1 - 0.99) for t in range(500)])
    torch.testing.assert_close(returns, expected)


# ---- normalize_returns ----------------------------------------------------------------------------------------------


def test_baseline_by_hand():
    """Three episodes of 1, 2 and 3 steps: step 0 has three returns, step 1 two, step 2 one, which is its own mean."""
    returns = [torch.tensor([3.0]), torch.tensor([6.0, 1.0]), torch.tensor([9.0, 5.0, 7.0])]
    differences = np.array([3 - 6, 6 - 6, 1 - 3, 9 - 6, 5 - 3, 7 - 7])
    expected = torch.tensor(differences / np.sqrt(np.mean(differences**2)), dtype=torch.float32)
    torch.testing.assert_close(script.normalize_returns(returns), expected)


def test_baseline_against_a_loop():
    generator = torch.Generator().manual_seed(0)
    returns = [torch.randn(length, generator=generator) for length in (5, 1, 8, 3, 8)]
    differences = []
    for episode in returns:
        for t in range(len(episode)):
            others = [other[t].item() for other in returns if t < len(other)]
            differences.append(episode[t].item() - sum(others) / len(others))
    expected = torch.tensor(differences) / np.std(differences)
    torch.testing.assert_close(script.normalize_returns(returns), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("episodes", [1, 2, 3, 5, 6, 7, 8])
def test_nothing_is_learned_where_all_episodes_went_alike(episodes):
    """Exactly 0: rounding errors, scaled to deviation 1 and then by Adam, would be full-sized steps at random."""
    alike = script.discounted_returns([-1.1] * 500, 0.99)
    assert torch.equal(script.normalize_returns([alike.clone() for _ in range(episodes)]), torch.zeros(500 * episodes))


def test_where_the_others_agree_a_shorter_episode_changes_nothing():
    alike = script.discounted_returns([-1.1] * 500, 0.99)
    result = script.normalize_returns([alike[:1].clone(), alike.clone(), alike.clone(), alike.clone()])
    assert torch.equal(result, torch.zeros(1501))


def test_one_step_alone_is_no_nan():
    assert script.normalize_returns([torch.tensor([5.0])]).tolist() == [0.0]


def test_normalized_returns_do_not_depend_on_unit_and_zero_of_the_returns():
    generator = torch.Generator().manual_seed(1)
    returns = [torch.randn(length, generator=generator) for length in (4, 6, 6)]
    scaled = [100 * episode + 7 for episode in returns]
    expected = script.normalize_returns(returns)
    torch.testing.assert_close(script.normalize_returns(scaled), expected, rtol=1e-4, atol=1e-4)


# ---- policy_loss and update -----------------------------------------------------------------------------------------


class Bandit(nn.Module):
    """A softmax over three arms, one logit each, whatever the observation."""

    def __init__(self, logits):
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(logits, dtype=torch.float64))

    def forward(self, obs):
        return self.theta.expand(len(obs), 3)


def test_gradient_is_the_analytic_policy_gradient_of_a_bandit():
    """For a softmax, d/d theta_k E[r] = pi_k (r_k - E[r]). Each arm is drawn as often as pi says: no noise is left."""
    probabilities, rewards = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), torch.tensor([1.0, 4.0, -2.0]).double()
    bandit = Bandit(probabilities.log().tolist())
    actions = torch.tensor([0] * 5 + [1] * 3 + [2] * 2)
    log_probs = bandit(torch.zeros(10, 1)).log_softmax(-1)[torch.arange(10), actions]
    script.policy_loss(log_probs, rewards[actions], num_episodes=10).backward()
    analytic = probabilities * (rewards - (probabilities * rewards).sum())
    torch.testing.assert_close(-bandit.theta.grad, analytic)


def two_step_episodes(theta):
    """A two-state environment, exactly: state 0 leads to state 1 whatever is done, then it ends. A reward for each
    (state, action). Yields every possible episode as (probability, states, actions, rewards)."""
    table = [[1.0, -1.0], [0.5, 3.0]]
    policy = theta.softmax(-1)
    for first, second in itertools.product(range(2), repeat=2):
        yield policy[0, first] * policy[1, second], [0, 1], [first, second], [table[0][first], table[1][second]]


@pytest.mark.parametrize("gamma", [0.0, 0.7, 1.0])
def test_gradient_is_that_of_the_expected_return(gamma):
    """Summed over all episodes with their probabilities, the loss has the gradient that autograd finds for the expected
    return itself. The first action does not influence r_1 here, and the factor gamma^t is left out on purpose: so
    every gamma must give the gradient of E[r_0 + r_1]."""
    theta = torch.tensor([[0.3, -0.2], [0.1, 0.4]], dtype=torch.float64, requires_grad=True)
    objective = sum(probability * sum(rewards) for probability, _, _, rewards in two_step_episodes(theta))
    (expected,) = torch.autograd.grad(objective, theta)
    loss = 0.0
    for probability, states, actions, rewards in two_step_episodes(theta):
        returns = script.discounted_returns(rewards, gamma).double()
        log_probs = theta.log_softmax(-1)[states, actions]
        loss = loss + probability.detach() * script.policy_loss(log_probs, returns, num_episodes=1)
    (gradient,) = torch.autograd.grad(loss, theta)
    torch.testing.assert_close(-gradient, expected)


def test_gradient_where_an_action_has_consequences():
    """State 0: action 1 ends the episode with 0.6, action 0 leads to state 1, whose actions pay 1 and -0.5. By hand:
    gamma discounts what state 0 learns of the later reward, but not, as gamma^t is left out, what state 1 learns."""
    theta = torch.tensor([[0.3, -0.2], [0.1, 0.4]], dtype=torch.float64, requires_grad=True)
    (p, _), (q, _) = theta.softmax(-1)
    loss = 0.0
    for probability, states, actions, rewards in (
        (1 - p, [0], [1], [0.6]), (p * q, [0, 1], [0, 0], [0.0, 1.0]), (p * (1 - q), [0, 1], [0, 1], [0.0, -0.5]),
    ):  # fmt: skip
        returns = script.discounted_returns(rewards, 0.5).double()
        log_probs = theta.log_softmax(-1)[states, actions]
        loss = loss + probability.detach() * script.policy_loss(log_probs, returns, num_episodes=1)
    value = q * 1.0 + (1 - q) * -0.5  # of state 1
    by_hand = p * 0.5 * value.detach() + (1 - p) * 0.6 + p.detach() * value
    torch.testing.assert_close(torch.autograd.grad(-loss, theta), torch.autograd.grad(by_hand, theta))


def test_loss_treats_each_episode_apart():
    """Two episodes together are the mean of the two alone. That the training loop keeps their returns apart as well,
    test_the_loop_hands_on_what_was_played checks."""
    episodes = [([1.0, 2.0, 3.0], [0, 1, 2]), ([-5.0, 4.0], [2, 2])]
    gradients = []
    for chosen in (episodes[:1], episodes[1:], episodes):
        bandit = Bandit([0.2, 0.1, -0.3])
        actions = torch.tensor([action for _, actions in chosen for action in actions])
        returns = torch.cat([script.discounted_returns(rewards, 0.9) for rewards, _ in chosen])
        log_probs = bandit(torch.zeros(len(actions), 1)).log_softmax(-1)[torch.arange(len(actions)), actions]
        script.policy_loss(log_probs, returns, num_episodes=len(chosen)).backward()
        gradients.append(bandit.theta.grad)
    torch.testing.assert_close(gradients[2], (gradients[0] + gradients[1]) / 2)


def test_update_takes_one_step_down_the_gradient():
    bandit = Bandit([0.0, 0.0, 0.0])
    optimizer = torch.optim.SGD(bandit.parameters(), lr=0.1)
    metrics = script.update(
        bandit, optimizer, torch.zeros(1, 1), torch.tensor([1]), torch.tensor([6.0], dtype=torch.float64), 1
    )
    # grad log pi(1) at the uniform policy is (-1/3, 2/3, -1/3); times G = 6, times the step size 0.1.
    torch.testing.assert_close(bandit.theta.detach(), torch.tensor([-0.2, 0.4, -0.2], dtype=torch.float64))
    assert metrics["losses/policy_loss"].item() == pytest.approx(6 * math.log(3))
    assert metrics["losses/entropy"].item() == pytest.approx(math.log(3))


def test_updates_share_no_gradient():
    bandit = Bandit([0.0, 0.0, 0.0])
    optimizer = torch.optim.SGD(bandit.parameters(), lr=0.1)
    metrics = script.update(bandit, optimizer, torch.zeros(2, 1), torch.tensor([1, 1]), torch.tensor([6.0, 6.0]), 1)
    assert metrics["losses/entropy"].item() == pytest.approx(math.log(3))  # a mean over the steps
    after = bandit.theta.detach().clone()
    script.update(bandit, optimizer, torch.zeros(2, 1), torch.tensor([1, 1]), torch.zeros(2), 1)
    assert torch.equal(bandit.theta.detach(), after)


def test_update_stops_at_a_weight_that_is_not_finite():
    bandit = Bandit([0.0, 0.0, 0.0])
    optimizer = torch.optim.SGD(bandit.parameters(), lr=1e300)
    with pytest.raises(FloatingPointError):
        script.update(bandit, optimizer, torch.zeros(1, 1), torch.tensor([1]), torch.tensor([1e20]).double(), 1)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_update_stops_at_what_is_not_finite(poison):
    bandit = Bandit([0.0, 0.0, 0.0])
    optimizer = torch.optim.SGD(bandit.parameters(), lr=0.1)
    with pytest.raises(FloatingPointError):
        script.update(bandit, optimizer, torch.zeros(1, 1), torch.tensor([1]), torch.tensor([poison]), 1)


# ---- play_episodes --------------------------------------------------------------------------------------------------


class Scripted(gym.Env):
    """Shows its step number, in an array that it reuses; lasts as many steps as the seed says; pays 10 * t + action."""

    observation_space = gym.spaces.Box(-1000, 1000, (2,), np.float64)

    def __init__(self, start=0, truncates=False):
        self.action_space = gym.spaces.Discrete(3, start=start)
        self.truncates, self.obs, self.seen = truncates, np.zeros(2), []

    def reset(self, *, seed=None, options=None):
        self.length, self.t = seed, 0
        self.obs[:] = seed, 0
        return self.obs, {}

    def step(self, action):
        assert self.action_space.contains(action)
        assert self.t < self.length, "stepped on after its end"
        reward = 10 * self.t + action
        self.seen.append(action)
        self.t += 1
        self.obs[1] = self.t
        end = self.t == self.length
        return self.obs, reward, end and not self.truncates, end and self.truncates, {}


class Uniform(nn.Module):
    """Equal logits; with `best`, that action's is the largest."""

    def __init__(self, best=None):
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(3))
        if best is not None:
            self.weights.data[best] = 1.0

    def forward(self, obs):
        assert obs.dtype == torch.float32
        return self.weights.expand(len(obs), 3)


@pytest.mark.parametrize("truncates", [False, True])
def test_every_row_is_the_step_from_t_to_t_plus_1(truncates):
    envs = [Scripted(truncates=truncates) for _ in range(3)]
    episodes = script.play_episodes(envs, Uniform(), [2, 5, 3])
    for length, episode in zip([2, 5, 3], episodes):
        assert np.array(episode.obs).tolist() == [[length, t] for t in range(length)]
        assert episode.rewards == [10 * t + action for t, action in enumerate(episode.actions)]
        assert len(episode.actions) == length


def test_actions_count_from_the_start_of_the_action_space():
    env = Scripted(start=5)
    (episode,) = script.play_episodes([env], Uniform(), [50])
    assert set(env.seen) == {5, 6, 7} and set(episode.actions) == {0, 1, 2}


def test_greedy_takes_the_best_action_and_sampling_follows_the_softmax():
    (episode,) = script.play_episodes([Scripted()], Uniform(best=1), [100], greedy=True)
    assert episode.actions == [1] * 100
    torch.manual_seed(0)
    (episode,) = script.play_episodes([Scripted()], Uniform(best=1), [6000])
    shares = np.bincount(episode.actions) / 6000
    expected = np.exp([0, 1, 0]) / np.exp([0, 1, 0]).sum()
    np.testing.assert_allclose(shares, expected, atol=4 * np.sqrt(0.25 / 6000))  # 4 standard errors


class Chosen(nn.Module):
    """The most probable action is the observation's first number modulo 3: it differs between environments."""

    def __init__(self):
        super().__init__()
        self.weights = nn.Parameter(torch.tensor(100.0))

    def forward(self, obs):
        return self.weights * nn.functional.one_hot(obs[:, 0].long() % 3, 3)


@pytest.mark.parametrize("greedy", [True, False])
def test_every_environment_gets_its_own_action(greedy):
    envs = [Scripted() for _ in range(3)]
    for length, env, episode in zip([2, 4, 6], envs, script.play_episodes(envs, Chosen(), [2, 4, 6], greedy)):
        assert env.seen == episode.actions == [length % 3] * length


def test_the_first_policy_plays_all_actions_alike():
    assert torch.equal(script.Policy(4, 3)(torch.randn(5, 4)), torch.zeros(5, 3))


def test_evaluation_tells_the_return_from_the_length(tmp_path, monkeypatch, capsys):
    """Always action 2, in episodes of 1, 2 and 4 steps: the returns are 2, 2 + 12 and 2 + 12 + 22 + 32."""
    monkeypatch.setattr(script, "episode_seeds", lambda *_: [1, 2, 4])
    result = script.evaluate(script.Args(eval_episodes=3), [Scripted(), Scripted()], Uniform(best=2), tmp_path)
    assert result == pytest.approx(((2 + 14 + 68) / 3, 7 / 3))
    assert f"return 28.0 ± {np.std([2, 14, 68]):.1f} over 3 episodes" in capsys.readouterr().out


def test_every_second_step_of_the_first_episode_is_drawn_until_its_end_or_the_limit(monkeypatch):
    envs, frames = [Scripted(), Scripted()], []
    envs[0].render = lambda: envs[0].t
    for limit, expected in ((1000, [0, 2, 4]), (4, [0, 2]), (3, [0, 2]), (1, [0])):
        monkeypatch.setattr(script, "MAX_FRAMES", limit)
        frames.clear()
        script.play_episodes(envs, Uniform(), [5, 9], frames=frames)
        assert frames == expected


def test_acting_keeps_no_graph_and_leaves_no_gradient():
    policy = Uniform()
    script.play_episodes([Scripted()], policy, [5])
    assert policy.weights.grad is None


def test_fewer_seeds_than_environments():
    assert len(script.play_episodes([Scripted() for _ in range(4)], Uniform(), [3, 3])) == 2


def test_an_observation_that_is_nan_is_named():
    env = Scripted()
    policy = script.Policy(2, 3)
    env.reset = lambda seed: (np.array([np.nan, 0.0]), {})
    with pytest.raises(FloatingPointError, match="observation"):
        script.play_episodes([env], policy, [1])


# ---- seeds ----------------------------------------------------------------------------------------------------------


def test_episode_seeds_never_meet():
    """Neighbouring seeds, the updates of one run, training and evaluation: all play different episodes."""
    streams = [(script.TRAINING, update) for update in range(200)] + [(script.EVALUATION,)]
    seeds = [s for seed in range(1, 4) for stream in streams for s in script.episode_seeds(seed, stream, 8)]
    assert len(set(seeds)) == len(seeds)


def test_more_evaluation_episodes_begin_with_the_same_ones():
    assert script.episode_seeds(1, (1,), 100)[:10] == script.episode_seeds(1, (1,), 10)


# ---- The flags have the effect that they name -----------------------------------------------------------------------


def train(tmp_path, capsys, **settings):
    """Runs in this process; returns the final weights in one vector and the scalars by tag."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    few = dict(total_timesteps=1500, episodes_per_update=4, eval_episodes=2, checkpoint_frequency=0)
    run_dir = script.train(script.Args(**few | settings, runs_dir=str(tmp_path)))
    capsys.readouterr()
    state = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    scalars = {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    scalars["steps"] = [event.step for event in events.Scalars("charts/episodic_return")]
    return torch.cat([weights.flatten() for weights in state["policy"].values()]), scalars


def recorded(monkeypatch, name, calls):
    """Replaces a function of the script by one that does the same and notes its arguments and its result."""
    function = getattr(script, name)

    def spy(*arguments, **keywords):
        note = {}
        if name == "update":
            note["rate"], note["optimizer"] = arguments[1].param_groups[0]["lr"], type(arguments[1])
        result = function(*arguments, **keywords)
        note |= {"arguments": arguments, "keywords": keywords, "result": copy.copy(result)}
        calls.append(note)
        return result

    monkeypatch.setattr(script, name, spy)


@pytest.mark.parametrize("normalize", [True, False])
def test_the_loop_hands_on_what_was_played(tmp_path, capsys, monkeypatch, normalize):
    """Between the functions, too, nothing is shifted, mixed or repeated: what update gets and what is logged is
    computed again, in plain loops, from the episodes that were played."""
    plays, updates = [], []
    recorded(monkeypatch, "play_episodes", plays)
    recorded(monkeypatch, "update", updates)
    _, scalars = train(tmp_path, capsys, seed=7, gamma=0.9, normalize_returns=normalize, eval_episodes=10)
    training, evaluation = plays[: len(updates)], plays[len(updates) :]
    step, returns_logged, lengths_logged, steps = 0, [], [], []
    for number, (play, update) in enumerate(zip(training, updates)):
        episodes = play["result"]
        assert play["arguments"][2] == script.episode_seeds(7, (script.TRAINING, number), 4)
        assert not play["keywords"].get("greedy")
        _, _, obs, actions, returns, num_episodes = update["arguments"]
        assert update["optimizer"] is torch.optim.Adam and num_episodes == 4 and step < 1500
        assert update["rate"] == pytest.approx(1e-2 * (1 - step / 1500))
        assert obs.tolist() == [row.tolist() for episode in episodes for row in episode.obs]
        assert actions.tolist() == [action for episode in episodes for action in episode.actions]
        expected = [
            [sum(0.9**k * reward for k, reward in enumerate(episode.rewards[t:])) for t in range(len(episode.rewards))]
            for episode in episodes
        ]
        if normalize:
            means = [np.mean([g[t] for g in expected if t < len(g)]) for t in range(max(map(len, expected)))]
            expected = [[x - means[t] for t, x in enumerate(g)] for g in expected]
        expected = np.concatenate(expected)
        np.testing.assert_allclose(returns, expected / (expected.std() if normalize else 1), rtol=1e-4, atol=1e-4)
        step += len(actions)
        steps.append(step)
        returns_logged.append(np.mean([sum(episode.rewards) for episode in episodes]))
        lengths_logged.append(np.mean([len(episode.rewards) for episode in episodes]))
    assert step >= 1500 and scalars["steps"] == steps
    assert scalars["charts/episodic_return"] == pytest.approx(returns_logged)
    assert scalars["charts/episodic_length"] == pytest.approx(lengths_logged)
    assert all(play["keywords"]["greedy"] for play in evaluation)
    seeds = [seed for play in evaluation for seed in play["arguments"][2]]
    assert seeds == script.episode_seeds(7, (script.EVALUATION,), 10)
    returns = [sum(episode.rewards) for play in evaluation for episode in play["result"]]
    assert scalars["eval/episodic_return"] == pytest.approx([np.mean(returns)])


@pytest.mark.slow
def test_every_setting_of_the_algorithm_changes_the_outcome(tmp_path, capsys):
    reference, _ = train(tmp_path, capsys)
    for changed in (
        {"learning_rate": 5e-3}, {"anneal_lr": False}, {"gamma": 0.9}, {"episodes_per_update": 3},
        {"normalize_returns": False}, {"seed": 2},
    ):  # fmt: skip
        weights, _ = train(tmp_path, capsys, **changed)
        assert not torch.equal(weights, reference), changed
    weights, _ = train(tmp_path, capsys, checkpoint_frequency=100, exp_name="other", eval_episodes=1)
    assert torch.equal(weights, reference)


@pytest.mark.parametrize("frequency", [0, 400])
def test_checkpoints_are_written_when_they_are_due(tmp_path, capsys, monkeypatch, frequency):
    """At the start, after the update that passes a multiple of the frequency, and at the end."""
    saved, save = [], script.save_checkpoint

    def saving(*arguments, **counters):
        saved.append(counters["global_step"])
        save(*arguments, **counters)

    monkeypatch.setattr(script, "save_checkpoint", saving)
    _, scalars = train(tmp_path, capsys, checkpoint_frequency=frequency)
    before, expected = 0, [0]
    for step in scalars["steps"]:
        if step >= 1500 or (frequency and step // frequency > before // frequency):
            expected.append(step)
        before = step
    assert saved == expected


def test_learning_rate_falls_in_a_line_or_stays(tmp_path, capsys):
    _, scalars = train(tmp_path, capsys, learning_rate=0.02)
    rates = scalars["charts/learning_rate"]
    assert rates[0] == pytest.approx(0.02) and 0 < rates[-1] < rates[-2] < 0.02
    _, scalars = train(tmp_path, capsys, learning_rate=0.02, anneal_lr=False)
    assert scalars["charts/learning_rate"] == pytest.approx([0.02] * len(scalars["charts/learning_rate"]))


def test_an_environment_without_a_time_limit_gets_one(monkeypatch):
    class Endless(Scripted):
        def reset(self, *, seed=None, options=None):
            return super().reset(seed=10**9)

    gym.register("Endless-v0", entry_point=Endless, disable_env_checker=True)
    monkeypatch.setattr(script, "MAX_EPISODE_STEPS", 30)
    envs = script.make_envs(script.Args(env_id="Endless-v0", episodes_per_update=2))
    episodes = script.play_episodes(envs, Uniform(), [1, 2])
    assert [len(episode.rewards) for episode in episodes] == [30, 30]


@pytest.mark.parametrize("settings", [{"episodes_per_update": 0}, {"episodes_per_update": 1}, {"gamma": -0.1}])
def test_impossible_settings_are_refused(settings):
    """One episode is its own baseline: it would learn nothing for ever, and say nothing about it."""
    with pytest.raises(ValueError, match="--" + next(iter(settings)).replace("_", "-")):
        script.Args(**settings)
    script.Args(episodes_per_update=1, normalize_returns=False)
