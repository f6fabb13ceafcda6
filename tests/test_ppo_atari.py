"""What ppo_atari.py has of its own: the network for pixels, and a loop over native emulators.

What it shares with ppo_cartpole.py or dqn_atari.py, word for word, is tested in their files; see also
test_in_common.py.
"""

import itertools

import gymnasium as gym
import numpy as np
import ppo_atari as script
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn


def picture(number):
    """A frame that says which it is; number 0 is all black, as before a game's start."""
    frame = np.zeros((84, 84), np.uint8)
    frame[0, :4] = np.frombuffer(np.uint32(number).tobytes(), np.uint8)
    return frame


def number(frame):
    return int(np.frombuffer(np.asarray(frame)[0, :4].tobytes(), np.uint32)[0])


def numbers(frames):
    return tuple(number(frame) for frame in frames)


# ---- The network ----------------------------------------------------------------------------------------------------


def frames(size=8):
    return torch.randint(0, 256, (size, 4, 84, 84), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_the_network_is_that_of_the_paper_with_two_heads():
    agent = script.Agent(18, bfloat16=False, norm_obs=False)
    layers = [*agent.features, agent.actor, agent.critic]
    shapes = [tuple(layer.weight.shape) for layer in layers if hasattr(layer, "weight")]
    assert shapes == [(32, 4, 8, 8), (64, 32, 4, 4), (64, 64, 3, 3), (512, 3136), (18, 512), (1, 512)]
    logits, values = agent(frames(2))
    assert logits.shape == (2, 18) and values.shape == (2,)


def test_it_starts_orthogonal_and_the_policy_without_a_bias():
    torch.manual_seed(0)
    agent = script.Agent(6, bfloat16=False, norm_obs=False)
    layers = [layer for layer in [*agent.features, agent.actor, agent.critic] if hasattr(layer, "weight")]
    for layer, gain in zip(layers, [2**0.5] * 4 + [0.01, 1.0]):
        matrix = layer.weight.flatten(1)
        matrix = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
        torch.testing.assert_close(matrix @ matrix.T, gain**2 * torch.eye(len(matrix)), atol=1e-4, rtol=0)
        assert not layer.bias.any()
    assert (agent(frames())[0].softmax(-1) - 1 / 6).abs().max() < 0.02


def test_bfloat16_is_float32_within_its_rounding():
    torch.manual_seed(0)
    exact, rounded, obs = script.Agent(4, False, False), script.Agent(4, True, False), frames()
    rounded.load_state_dict(exact.state_dict())
    for ours, theirs in zip(rounded(obs), exact(obs)):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.02)
    assert not torch.equal(rounded(obs)[1], exact(obs)[1])


def test_bfloat16_tells_actions_apart_that_differ_by_a_thousandth():
    agent, biases = script.Agent(4, bfloat16=True, norm_obs=False), torch.tensor([2.0, 2.001, 2.002, 2.003])
    with torch.no_grad():
        agent.actor.weight.zero_(), agent.critic.weight.zero_()
        agent.actor.bias.copy_(biases), agent.critic.bias.fill_(2.001)
    logits, values = agent(frames(2))
    torch.testing.assert_close(logits[0], biases)
    torch.testing.assert_close(values, torch.full((2,), 2.001))


@pytest.mark.parametrize("bfloat16", [False, True])
def test_normalised_pixels_are_deviations_from_their_mean(bfloat16):
    """Pixel by pixel; one that never changes is 0 whatever it is, one that hardly ever does is cut at 10 deviations."""
    agent, obs, seen = script.Agent(4, bfloat16, norm_obs=True), frames(64), []
    obs[:, :, :20] = 87
    agent.obs_statistics.update(script.newest_frames(obs))
    mean, deviation = obs[:, -1].float().mean(0), obs[:, -1].float().std(0, correction=0)
    obs[0, :, 0, 0] = 88
    agent.features[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].float()))
    agent(obs)
    expected, error = ((obs - mean) / (deviation + 1e-4)).clamp(-10, 10), (0.05, 0.02) if bfloat16 else (1e-3, 1e-3)
    torch.testing.assert_close(seen[0], expected, atol=error[0], rtol=error[1])
    assert (seen[0][0, :, 0, 0] == 10).all() and not seen[0][1, :, :20].any()


def test_the_learner_sees_the_sign_of_a_reward():
    rollout, no = script.Rollout(1, 4), np.zeros(4, bool)
    rollout.add_outcome(0, np.array([-7.0, -0.5, 0.0, 300.0]), no, no, ~no)
    assert rollout.rewards.tolist() == [[-1, -1, 0, 1]]


class Fixed(nn.Module):
    """The same policy everywhere, and a value that is the row's number."""

    logits = torch.tensor([2.0, 1.0, -1.0])

    def forward(self, obs):
        return self.logits.expand(len(obs), 3), torch.arange(len(obs)).float()


def test_actions_are_as_frequent_as_the_policy_says_and_come_with_their_probability():
    torch.manual_seed(0)
    actions, log_probs, values = script.act(Fixed(), torch.zeros(40_000, 1))
    shares = np.bincount(actions, minlength=3) / 40_000
    np.testing.assert_allclose(shares, Fixed.logits.softmax(0), atol=0.01)
    torch.testing.assert_close(log_probs, Fixed.logits.log_softmax(0)[actions])
    assert torch.equal(values, torch.arange(40_000).float())


def test_the_emulator_is_asked_for_the_true_score_and_its_own_actions(monkeypatch):
    asked = []
    monkeypatch.setattr(gym, "make_vec", lambda *_, **keywords: asked.append(keywords))
    for sticky_actions in (0.0, 0.25):
        script.make_envs(script.Args(sticky_actions=sticky_actions), 1)
    assert [keywords["repeat_action_probability"] for keywords in asked] == [0.0, 0.25]
    assert all(keywords["life_loss_info"] and keywords["reward_clipping"] is False for keywords in asked)
    assert all(keywords["autoreset_mode"] == "NextStep" for keywords in asked)


def test_normalised_pixels_start_with_the_first_frames_and_take_in_every_rollout(tmp_path, capsys, monkeypatch):
    """The first frames once, not again after a checkpoint; then all that was learned from."""
    acts, learned, counts = recorded(monkeypatch, "act"), recorded(monkeypatch, "learn"), []
    act = script.act

    def acting(agent, obs):
        counts.append(agent.obs_statistics.count.item())
        return act(agent, obs)

    monkeypatch.setattr(script, "act", acting)
    train(tmp_path, capsys, norm_obs=True)
    (run_dir,) = tmp_path.iterdir()
    weights = torch.load(run_dir / "checkpoint.pt", weights_only=True)["agent"]
    first = acts[0][0][1][:, -1]
    seen = torch.cat([first] + [batch.obs[:, -1] for (_, _, batch, _), _ in learned]).flatten(1).double()
    assert counts[0] == 4 and weights["obs_statistics.count"] == len(seen) and len(learned) == 4
    mean, variance = weights["obs_statistics.mean"].double(), weights["obs_statistics.variance"].double()
    torch.testing.assert_close(mean, seen.mean(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(variance, seen.var(0, correction=0), rtol=1e-3, atol=1e-3)


def test_without_normalisation_there_are_no_statistics(tmp_path, capsys):
    train(tmp_path, capsys)
    (run_dir,) = tmp_path.iterdir()
    assert not any("statistics" in key for key in torch.load(run_dir / "checkpoint.pt", weights_only=True)["agent"])


def example_batch(size=8):
    obs, generator = frames(size), torch.Generator().manual_seed(1)
    noise = torch.randn(3, size, generator=generator)
    return script.Batch(obs, torch.arange(size) % 4, torch.full((size,), -1.4), *noise)


@pytest.mark.slow
def test_compiled_networks_compute_the_same():
    """A training step, too. Needs a compiler, and half a minute."""
    args, results = script.Args(precision="float32"), []
    for compiled in (False, True):
        torch.manual_seed(0)
        agent = script.Agent(4, bfloat16=False, norm_obs=False)
        if compiled:
            agent.compile()
        optimizer = torch.optim.SGD(agent.parameters(), lr=0.1)
        metrics = script.update(agent, optimizer, example_batch(), args)
        results.append([metrics["losses/value_loss"], *agent.state_dict().values()])
    for plain, compiled in zip(*results):
        torch.testing.assert_close(plain, compiled, rtol=1e-3, atol=1e-5)


def test_policy_and_values_both_move_the_network_they_share():
    for part, other in (("vf_coef", "ent_coef"), ("ent_coef", "vf_coef")):
        torch.manual_seed(0)
        agent = script.Agent(4, bfloat16=False, norm_obs=False)
        before = agent.features[0].weight.detach().clone()
        batch = example_batch()._replace(advantages=torch.zeros(8))
        args = script.Args(**{part: 1.0, other: 0.0, "norm_adv": False})
        agent.actor.weight.data.normal_()  # the entropy of a uniform policy has no gradient
        script.update(agent, torch.optim.SGD(agent.parameters(), lr=1.0), batch, args)
        assert not torch.equal(agent.features[0].weight, before)


# ---- The loop -------------------------------------------------------------------------------------------------------


class Scripted(gym.Env):
    """Shows pictures with numbers of its own, in an array that it reuses; its games are as long as its seed says.

    The pay is 5 times the action, which a learner sees as 1. Games of an odd length terminate, others are truncated;
    those of 3 steps do both.
    """

    observation_space = gym.spaces.Box(0, 255, (4, 84, 84), np.uint8)
    action_space = gym.spaces.Discrete(3)
    numbers = itertools.count(1)
    seen = {}  # newest frame -> (frames, action, clipped reward, newest frame after, terminated, truncated)
    games = []  # (return, length) of each game that ended

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.length, self.t, self.total = int(self.np_random.integers(3, 9)), 0, 0
        self.frames = np.zeros((4, 84, 84), np.uint8)
        self.frames[-1] = picture(next(self.numbers))
        return self.frames, {}

    def step(self, action):
        before = numbers(self.frames)
        self.frames[:-1] = self.frames[1:].copy()
        self.frames[-1] = picture(next(self.numbers))
        self.t, self.total = self.t + 1, self.total + 5 * int(action)
        over = self.t == self.length
        terminated, truncated = over and self.length % 2 == 1, over and self.length in (3, 4, 6, 8)
        after = number(self.frames[-1])
        Scripted.seen[before[-1]] = (before, int(action), float(np.sign(action)), after, terminated, truncated)
        if over:
            Scripted.games.append((self.total, self.t))
        return self.frames, 5 * int(action), terminated, truncated, {}


gym.register("PPOScripted-v0", entry_point=Scripted, disable_env_checker=True)


def train(tmp_path, capsys, **settings):
    """Runs in this process; returns the final weights in one vector and the scalars by tag."""
    few = dict(
        env_id="PPOScripted-v0", total_timesteps=240, num_envs=4, num_steps=15, num_minibatches=2, update_epochs=2,
        eval_episodes=2, checkpoint_frequency=120, precision="float32", learning_rate=3e-3, num_threads=1,
    )  # fmt: skip
    Scripted.numbers, Scripted.seen, Scripted.games = itertools.count(1), {}, []
    run_dir = script.train(script.Args(**few | settings, runs_dir=str(tmp_path)))
    capsys.readouterr()
    state = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    scalars = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    return torch.cat([weights.flatten() for weights in state["agent"].values()]), scalars


def recorded(monkeypatch, name):
    """Every call of a function of the script: its arguments and its result."""
    calls, function = [], getattr(script, name)

    def recording(*arguments, **keywords):
        arguments = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
        calls.append((arguments, function(*arguments, **keywords)))
        return calls[-1][1]

    monkeypatch.setattr(script, name, recording)
    return calls


@pytest.mark.parametrize("num_envs", [1, 2, 5])
def test_what_is_learned_from_is_what_was_played(tmp_path, capsys, monkeypatch, num_envs):
    """Every step of every game, once, as it happened; not the resets between games. The value of its next observation
    is that of its true one, at a game's end, too, and it ended as it did."""
    acts, advantages, learned = (recorded(monkeypatch, name) for name in ("act", "gae", "learn"))
    train(tmp_path, capsys, num_envs=num_envs, num_steps=60 // num_envs, checkpoint_frequency=0)
    found, shown = [], set()
    calls_per_rollout = 60 // num_envs + 1
    for k, ((inputs, found_advantages), ((_, _, batch, _), _)) in enumerate(zip(advantages, learned)):
        value_of, log_prob_of = {}, {}
        for (_, obs, *_), (_, log_probs, values) in acts[k * calls_per_rollout : (k + 1) * calls_per_rollout]:
            for row, log_prob, value in zip(obs, log_probs, values):
                value_of[number(row[-1])], log_prob_of[number(row[-1])] = value.item(), log_prob.item()
        shown |= value_of.keys()
        rewards, values, next_values, terminated, truncated = inputs[:5]
        assert inputs[5:] == [0.99, 0.95]
        places = {value.item(): place for place, value in zip(np.ndindex(*values.shape), values.flatten())}
        for row in range(len(batch.obs)):
            key = number(batch.obs[row, -1])
            before, action, reward, after, terminal, limit = Scripted.seen[key]
            found.append(key)
            assert numbers(batch.obs[row]) == before and batch.actions[row] == action
            assert batch.values[row].item() == value_of[key] and batch.log_probs[row].item() == log_prob_of[key]
            place = places[value_of[key]]
            assert rewards[place] == reward and terminated[place] == terminal and truncated[place] == limit
            assert next_values[place].item() == value_of[after]
            assert batch.advantages[row] == found_advantages[place]
            assert batch.returns[row] == found_advantages[place] + values[place]
    last = acts[4 * calls_per_rollout - 1 : 4 * calls_per_rollout]  # seen, but not played any further
    waiting = {number(row[-1]) for (_, obs, *_), _ in last for row in obs}
    assert len(advantages) == 4 and len(set(found)) == len(found)
    assert set(found) == {key for key in shown if key in Scripted.seen} - waiting


def test_every_game_is_logged_with_its_true_score(tmp_path, capsys, monkeypatch):
    """Also when two end in one round; not those that ended in the last, of which no next game tells."""
    rounds, recv = [], script.OwnEnvs.recv
    monkeypatch.setattr(script.OwnEnvs, "recv", lambda self: rounds.append(self.ended.copy()) or recv(self))
    _, scalars = train(tmp_path, capsys, checkpoint_frequency=0)
    returns, lengths = scalars["charts/episodic_return"], scalars["charts/episodic_length"]
    steps = [4 * k + 1 + i for k, ended in enumerate(rounds[:60]) for i in np.flatnonzero(ended)]
    assert [step for step, _ in returns] == [step for step, _ in lengths] == steps and len(steps) > 20
    left = list(Scripted.games)
    for pair in zip([r for _, r in returns], [n for _, n in lengths]):
        left.remove(pair)
    assert len(left) <= 4 + 2 and max(r for _, r in returns) > 5  # ended in the last round; those of the evaluation
    assert any(ended.sum() > 1 for ended in rounds[:60]), "the test needs two games that end together"


@pytest.mark.parametrize("anneal_lr", [True, False])
def test_the_learning_rate_falls_in_a_line_or_stays(tmp_path, capsys, monkeypatch, anneal_lr):
    rates = []
    monkeypatch.setattr(script, "learn", lambda agent, optimizer, batch, args: rates.append(
        (type(optimizer), optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["eps"])) or {})  # fmt: skip
    _, scalars = train(tmp_path, capsys, anneal_lr=anneal_lr)
    expected = [3e-3 * (1 - k / 4) if anneal_lr else 3e-3 for k in range(4)]
    assert rates == [(torch.optim.Adam, pytest.approx(rate), 1e-5) for rate in expected]
    assert [value for _, value in scalars["charts/learning_rate"]] == pytest.approx(expected)


def test_checkpoints_are_written_when_due_and_each_begins_games_of_its_own(tmp_path, capsys, monkeypatch):
    """Rollouts of 60 steps: what is due at 90 and at 180 is done at 120 and at 180."""
    steps, save, seeds = [], script.save_checkpoint, recorded(monkeypatch, "env_seeds")
    resets, reset = [], script.OwnEnvs.reset
    monkeypatch.setattr(script, "save_checkpoint", lambda *a, **counts: steps.append(counts) or save(*a, **counts))
    monkeypatch.setattr(script.OwnEnvs, "reset", lambda self, seed: resets.append(list(seed)) or reset(self, seed=seed))
    train(tmp_path, capsys, checkpoint_frequency=90, seed=3)
    assert steps == [{"global_step": step} for step in (0, 120, 180, 240)]
    streams = [(3, (script.TRAINING, step), 4) for step in (0, 120, 180)] + [(3, (script.EVALUATION,), 2)]
    assert [tuple(arguments) for arguments, _ in seeds] == streams
    assert resets == [result.tolist() for _, result in seeds]


def test_statistics_stay_as_they_are_from_the_first_step_to_the_last_update(tmp_path, capsys, monkeypatch):
    """Of each 20 notes, 15 steps, the last values and 4 updates, there is one count."""
    counts = []
    for name in ("act", "update"):
        def noting(agent, *others, function=getattr(script, name), **keywords):
            counts.append(agent.obs_statistics.count.item())
            return function(agent, *others, **keywords)

        monkeypatch.setattr(script, name, noting)
    train(tmp_path, capsys, norm_obs=True)
    assert [len(set(counts[k : k + 20])) for k in range(0, 80, 20)] == [1] * 4 and len(set(counts[:80])) == 4


def test_explained_variance_is_of_the_returns(tmp_path, capsys, monkeypatch):
    learned = recorded(monkeypatch, "learn")
    _, scalars = train(tmp_path, capsys)
    expected = [1 - ((b.returns - b.values).var() / b.returns.var()).item() for (_, _, b, _), _ in learned]
    assert [value for _, value in scalars["losses/explained_variance"]] == pytest.approx(expected, rel=1e-3, abs=1e-3)


@pytest.mark.slow
def test_every_setting_of_the_algorithm_changes_the_outcome(tmp_path, capsys):
    reference, _ = train(tmp_path, capsys)
    for changed in (
        {"seed": 2}, {"learning_rate": 1e-3}, {"anneal_lr": False}, {"num_envs": 3}, {"num_steps": 10}, {"gamma": 0.5},
        {"gae_lambda": 0.5}, {"num_minibatches": 3}, {"update_epochs": 1}, {"norm_adv": False}, {"clip_coef": 0.01},
        {"clip_vloss": False}, {"norm_obs": True}, {"ent_coef": 0.1}, {"vf_coef": 0.1}, {"max_grad_norm": 0.1},
        {"target_kl": 1e-9},
        {"precision": "bfloat16"}, {"checkpoint_frequency": 60},
    ):  # fmt: skip
        weights, _ = train(tmp_path, capsys, **changed)
        assert not torch.equal(weights, reference), changed
    weights, _ = train(tmp_path, capsys, exp_name="other", eval_episodes=1)
    assert torch.equal(weights, reference)


class FixedGames(script.OwnEnvs):
    """Environment n plays games of n + 1 steps, and each step of its game g pays 10 to the power of g."""

    def __init__(self, num_envs):
        super().__init__(lambda: gym.make_vec("PPOScripted-v0", num_envs))
        self.n = np.arange(num_envs)

    def recv(self):
        obs, _, terminated, truncated, info = super().recv()
        self.t = np.where(self.t > self.n, 0, self.t + 1)  # the step that begins a new game is none of it
        self.games += self.t == 0
        rewards = np.where(self.t == 0, 0, 10.0**self.games)
        return obs, rewards, terminated, truncated, info | {"episode_frame_number": self.t}

    def reset(self, **keywords):
        self.t, self.games = np.zeros((2, self.num_envs), int)
        return super().reset(**keywords)


def test_evaluation_is_one_whole_game_of_each_environment(tmp_path, monkeypatch, capsys):
    """The first game of each, and all of it: lengths 1, 2, 3, 4, each step pays 1."""
    monkeypatch.setattr(script, "make_envs", lambda args, num_envs: FixedGames(num_envs))
    agent = script.Agent(3, bfloat16=False, norm_obs=False)
    assert script.evaluate(script.Args(eval_episodes=4), agent, tmp_path) == (2.5, 2.5)
    assert f"Evaluation: return 2.5 ± {np.std([1, 2, 3, 4]):.1f} over 4 episodes" in capsys.readouterr().out


@pytest.mark.slow
def test_a_lost_life_ends_the_learners_episode_and_a_reset_is_no_step(tmp_path, capsys, monkeypatch):
    """Breakout itself, of five lives: four rows terminate and are followed by a step, the fifth by a reset."""
    learned, advantages = recorded(monkeypatch, "learn"), recorded(monkeypatch, "gae")
    _, scalars = train(
        tmp_path, capsys, env_id="ALE/Breakout-v5", num_envs=2, num_steps=1000, total_timesteps=2000, update_epochs=1,
        num_minibatches=4,
    )  # fmt: skip
    games = len(scalars["charts/episodic_return"])
    ((_, _, batch, _), _), ((rewards, _, _, terminated, truncated, *_), _) = learned[0], advantages[0]
    assert games >= 4 and len(batch.obs) == 2000 - games and not truncated.any()
    assert 5 * games <= terminated.sum() <= 5 * games + 10
    assert set(rewards.unique().tolist()) == {0.0, 1.0}
