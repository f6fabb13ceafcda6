"""The network of pqn_atari.py, how it acts, and a loop that learns what was played.

What it has word for word from pqn_cartpole.py, its returns and updates, is tested there; what it
has from dqn_atari.py, there. Its environments and its evaluation are tested in test_games.py.
"""

import inspect

import dqn_atari
import games
import gymnasium as gym
import numpy as np
import pqn_atari as script
import pqn_cartpole
import pytest
import torch
import torch.nn.functional as F
from conftest import curves, learned
from games import Diary, check_settings, number, numbers, recorded
from test_dqn_atari import Table, stacks

# The description for the common tests: README.md explains it.
TINY = (
    "--total-timesteps 800 --num-envs 2 --num-steps 25 --num-minibatches 2 --update-epochs 1 "
    "--norm-obs --checkpoint-frequency 150 --eval-frequency 450 --eval-episodes 1 "
    "--eval-epsilon 0.5 --end-e 0.5 --num-threads 1 --precision float32"
)
OWN = "pixels"
OWN_FLAGS = (
    "--total-timesteps 3000 --learning-rate 1e-3 --num-steps 16 --gamma 0.5 --eval-epsilon 0 "
    "--num-threads 1"
)
WRONG_SPACES = ["CartPole-v1", "Pendulum-v1"]
DIVERGES = "--learning-rate 1e30"
BAD = [
    ("--num-steps 0", "--num-steps"),
    ("--num-envs 1 --num-steps 5 --num-minibatches 6", "--num-minibatches"),
    ("--num-envs 4096 --num-steps 245", "--num-steps"),
    ("--q-lambda 1.01", "--q-lambda"),
    ("--eval-epsilon -0.1", "--eval-epsilon"),
    ("--buffer-size 1000", "--buffer-size"),  # DQN's
]
LEARNS = []  # PPO learns Catch from pixels in its test; longer games are in the record
# What others published, by the record's name after `<script>__`: shown beside our results.
PUBLISHED = {"ALE-Pong-v5": "CleanRL 20.5 (10M)", "ALE-Breakout-v5": "CleanRL 385 (10M)"}


@pytest.mark.parametrize("name", ["q_lambda", "compute_gradient", "update", "learn"])
def test_what_pqn_has_for_flat_observations_is_the_same_and_tested_there(name):
    ours, theirs = (inspect.getsource(getattr(module, name)) for module in (script, pqn_cartpole))
    assert ours == theirs


@pytest.mark.parametrize("name", [
    "linear_epsilon", "make_games", "QNetwork.normalize", "use_bfloat16", "make_network",
    "RunningStatistics", "newest_frames",
])  # fmt: skip
def test_what_dqn_has_too_is_the_same_and_tested_there(name):
    ours, theirs = script, dqn_atari
    for part in name.split("."):
        ours, theirs = getattr(ours, part), getattr(theirs, part)
    assert inspect.getsource(ours) == inspect.getsource(theirs)


# ---- The network and acting ----------------------------------------------------------------------


def frames(size=4):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (size, 4, 84, 84), dtype=torch.uint8, generator=generator)


def make_network(num_actions=4, bfloat16=False, norm_obs=False):
    """No scale is 1 and no shift or bias is 0, so that each of them tells."""
    torch.manual_seed(0)
    network = script.QNetwork(num_actions, bfloat16, norm_obs)
    with torch.no_grad():
        for weight in network.parameters():
            if weight.dim() == 1:
                weight += 0.3 * torch.randn_like(weight)
    return network


def normalised(x, scale, shift):
    """Each row to mean 0 and variance 1; then each of its channels is scaled and shifted."""
    each = (-1, *[1] * (x.ndim - 2))
    rows = [row - np.mean(row) for row in x]
    rows = np.stack([row / np.sqrt(np.mean(np.square(row)) + 1e-5) for row in rows])
    return scale.reshape(each) * rows + shift.reshape(each)


def test_each_hidden_layer_is_normalised_before_its_activation():
    """A convolution over all its channels and places. Scale and shift are those of a channel."""
    network, x = make_network(18), frames().double() / 255
    weights = list(network.double().parameters())
    weights[0] = F.pixel_shuffle(weights[0], 4)  # of blocks -> of pixels
    shapes = [(32, 4, 8, 8), (64, 32, 4, 4), (64, 64, 3, 3), (512, 3136), (18, 512)]
    assert [tuple(w.shape) for w in weights if w.dim() > 1] == shapes
    assert [len(w) for w in weights[1:] if w.dim() == 1] == [32] * 3 + [64] * 6 + [512] * 3 + [18]
    numbers = [weight.detach().numpy() for weight in weights]
    for i, (stride, side) in enumerate(((4, 20), (2, 9), (1, 7))):
        x = F.conv2d(x, weights[4 * i], weights[4 * i + 1], stride).detach()
        assert x.shape[2:] == (side, side)
        x = normalised(x.numpy(), *numbers[4 * i + 2 : 4 * i + 4])
        x = torch.from_numpy(np.maximum(x, 0))
    x = x.flatten(1).numpy() @ numbers[12].T + numbers[13]
    x = np.maximum(normalised(x, *numbers[14:16]), 0)
    found = network.float()(frames())
    np.testing.assert_allclose(found.detach(), x @ numbers[16].T + numbers[17], atol=1e-4)
    assert found.std(1).min() > 0.01


def test_it_starts_as_the_authors_network_does():
    """Weights of deviation sqrt(2 / inputs); no bias; scales 1 and shifts 0."""
    torch.manual_seed(0)
    features = script.QNetwork(4, False, False).features
    layers = [layer for layer in features if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear)]
    for layer, inputs in zip(layers, (4 * 64, 32 * 16, 64 * 9, 3136), strict=True):
        assert layer.weight.std().item() == pytest.approx((2 / inputs) ** 0.5, rel=0.03)
        assert not layer.bias.any()
    kinds = torch.nn.GroupNorm | torch.nn.LayerNorm
    norms = [layer for layer in features if isinstance(layer, kinds)]
    assert len(norms) == 4
    assert all((norm.weight == 1).all() and not norm.bias.any() for norm in norms)


def test_normalisation_makes_no_copy_in_another_order():
    """Convolutions get and give channels_last: in the other order, a step takes twice as long."""
    network, seen = make_network(), []
    for layer in network.features[:9]:
        layer.register_forward_hook(lambda _, inputs, output: seen.extend([*inputs, output]))
    network(frames())
    assert len(seen) == 18
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in seen)


@pytest.mark.parametrize("norm_obs", [False, True])
def test_bfloat16_is_float32_within_its_rounding(norm_obs):
    """In the values and in the gradients."""
    outputs, gradients = [], []
    for bfloat16 in (False, True):
        network = make_network(bfloat16=bfloat16, norm_obs=norm_obs)
        if norm_obs:
            network.obs_statistics.update(script.newest_frames(frames()))
        batch = script.Batch(frames(), torch.arange(4), 3 * torch.ones(4))
        script.compute_gradient(network, batch, script.Args(max_grad_norm=0.0))
        outputs.append(network(frames()))
        gradients.append(torch.cat([weight.grad.flatten() for weight in network.parameters()]))
        assert outputs[-1].dtype == gradients[-1].dtype == torch.float32
    torch.testing.assert_close(*outputs, rtol=0.05, atol=0.03)
    assert not torch.equal(*outputs)
    assert F.cosine_similarity(*gradients, dim=0) > 0.99


def test_bfloat16_tells_actions_apart_that_differ_by_a_thousandth():
    network, biases = make_network(bfloat16=True), torch.tensor([2.0, 2.001, 2.002, 2.003])
    with torch.no_grad():
        network.head.weight.zero_()
        network.head.bias.copy_(biases)
    torch.testing.assert_close(network(frames())[0], biases)


def test_actions_are_epsilon_greedy_and_values_are_the_largest():
    torch.manual_seed(0)
    obs, q_network = stacks([0, 1] * 2000).numpy(), Table([[0.0, 3, 1], [5, 3, 1]])
    for epsilon in (0.0, 0.3, 1.0):
        actions, values = script.act(q_network, obs, epsilon)
        assert values.reshape(-1, 2).tolist() == [[3, 5]] * 2000  # of the best, whatever is played
        for column, best in zip(actions.reshape(-1, 2).T, (1, 0)):
            expected = np.full(3, epsilon / 3)
            expected[best] += 1 - epsilon
            np.testing.assert_allclose(np.bincount(column, minlength=3) / 2000, expected, atol=0.04)


@pytest.mark.parametrize("limit", [0.0, 1e9, 0.01])
def test_an_update_moves_q_towards_its_target_and_clips_the_gradient_as_one_vector(limit):
    network, batch = make_network(), script.Batch(frames(), torch.arange(4), 3 * torch.ones(4))
    before = [weights.detach().clone() for weights in network.parameters()]
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3)
    first = script.update(network, optimizer, batch, script.Args(max_grad_norm=limit))
    moves = [weights.detach() - old for weights, old in zip(network.parameters(), before)]
    move = 1e3 * torch.cat([part.flatten() for part in moves]).norm().item()
    assert move == pytest.approx(0.01, rel=1e-2) if limit == 0.01 else move > 0.1
    second = script.update(network, optimizer, batch, script.Args(max_grad_norm=limit))
    assert second["losses/td_loss"] < first["losses/td_loss"]


# ---- The loop ------------------------------------------------------------------------------------


def train(tmp_path, **changes):
    """4 rollouts of 60 steps in games of the diary. Returns the run's folder."""
    few = dict(
        env_id="PixelDiary-v0", total_timesteps=240, num_envs=4, num_steps=15, num_minibatches=2,
        update_epochs=2, eval_episodes=2, exploration_fraction=0.5, checkpoint_frequency=90,
        precision="float32", learning_rate=3e-3, num_threads=1,
    )  # fmt: skip
    return games.train(script, script.Args(**few | changes, runs_dir=str(tmp_path)))


@pytest.mark.parametrize("num_envs", [1, 4])
def test_what_is_learned_from_is_what_was_played(tmp_path, monkeypatch, num_envs):
    """Every step once, as it happened, frames in their order, with the sign of its reward. max_a Q
    is that of the true next observation, by the network that played: also after the last row, and
    at the end of a game, if a time limit truncated it."""
    calls = {name: recorded(monkeypatch, script, name) for name in ("act", "q_lambda", "learn")}
    train(tmp_path, num_envs=num_envs, num_steps=60 // num_envs)
    acted, found = iter(calls["act"]), []
    for (inputs, returns), (rollout, _) in zip(calls["q_lambda"], calls["learn"], strict=True):
        rewards, next_values, terminated, truncated = (x.flatten() for x in inputs[:4])
        batch, value_of = rollout[2], {}
        count = 60 // num_envs + 1 + sum(inputs[3].any(1))  # one more where games were truncated
        for (_, obs, _), (_, values) in [next(acted) for _ in range(count)]:
            for i in range(num_envs):
                shown = number(obs[i, -1])
                assert value_of.get(shown, values[i]) == pytest.approx(values[i], abs=1e-6)
                value_of[shown] = values[i]
        for row in range(60):
            shown = number(batch.obs[row, -1])
            step = Diary.steps[shown]
            found.append(shown)
            assert numbers(batch.obs[row]) == step.frames and batch.actions[row] == step.action
            assert rewards[row] == step.reward
            assert (terminated[row], truncated[row]) == (step.terminated, step.truncated)
            if not step.terminated:
                expected = value_of[step.next_frames[-1]]
                assert next_values[row] == pytest.approx(expected, abs=1e-6)
        assert torch.equal(batch.returns, returns.flatten()) and inputs[4:] == (0.99, 0.65)
        assert not batch.returns.requires_grad
    assert sorted(found) == sorted(list(Diary.steps)[:240])  # and then the evaluation


def test_every_epoch_learns_from_every_step_of_the_rollout_once(tmp_path, monkeypatch):
    """With the action and the return of that step."""
    monkeypatch.setattr(script, "update", lambda *_: {"losses/td_loss": torch.zeros(())})
    rollouts, updates = (recorded(monkeypatch, script, name) for name in ("learn", "update"))
    train(tmp_path, num_minibatches=7, update_epochs=3)
    assert len(updates) == 4 * 3 * 7

    def rows(batch):
        columns = map(numbers, batch.obs), batch.actions.tolist(), batch.returns.tolist()
        return list(zip(*columns))

    for k, ((_, _, batch, _), _) in enumerate(rollouts):
        orders = []
        for epoch in range(3):
            first = 21 * k + 7 * epoch
            parts = [rows(minibatch) for (_, _, minibatch, _), _ in updates[first : first + 7]]
            assert {len(part) for part in parts} == {8, 9}
            orders.append(sum(parts, []))
            assert sorted(orders[-1]) == sorted(rows(batch))
        assert orders[0] != orders[1] != orders[2] != rows(batch)


def test_what_is_learned_from_is_what_the_emulator_showed(tmp_path, monkeypatch):
    """To the pixel. A lost life terminates; the reward is a sign; the log has the true scores."""
    happened, recv = [], script.Envs.recv

    def act(q_network, obs, epsilon):
        return torch.randint(6, (len(obs),)).numpy(), np.zeros(len(obs), np.float32)

    def watching(envs, *which):
        obs, outcome = envs.obs.copy(), recv(envs, *which)
        happened.append((obs, envs.actions[-1].copy(), *outcome[1:], envs.lives.copy()))
        return outcome

    monkeypatch.setattr(script, "act", act)
    monkeypatch.setattr(script, "learn", lambda *_: {})
    monkeypatch.setattr(script.Envs, "recv", watching)
    returns, rollouts = (recorded(monkeypatch, script, name) for name in ("q_lambda", "learn"))
    points = curves(train(
        tmp_path, env_id="ALE/SpaceInvaders-v5", total_timesteps=1800, num_envs=3, num_steps=300,
        eval_episodes=1,
    ))  # fmt: skip
    columns = [np.concatenate(column) for column in zip(*happened[:600])]
    obs, actions, rewards, terminated, truncated, lives = columns
    for k, ((inputs, _), ((_, _, batch, _), _)) in enumerate(zip(returns, rollouts, strict=True)):
        part = slice(900 * k, 900 * (k + 1))
        assert np.array_equal(batch.obs, obs[part])
        assert np.array_equal(batch.actions, actions[part])
        assert np.array_equal(inputs[0].flatten(), np.sign(rewards[part]))
        for found, expected in zip(inputs[2:4], (terminated, truncated)):
            assert np.array_equal(found.flatten(), expected[part])
    scores = [score for _, score in points["charts/episodic_return"]]
    assert rewards.max() > 1 and max(scores) > 10 and {1, 2} < set(lives)
    assert terminated.sum() > len(scores)


def test_every_environment_gets_the_action_chosen_for_it(tmp_path, monkeypatch):
    """By epsilon of the rollout in training, and by eval-epsilon in evaluation."""
    choices = recorded(monkeypatch, script, "act")
    train(tmp_path, start_e=0.9, end_e=0.1, eval_epsilon=0.3)
    chosen, epsilons = {}, []
    for (_, obs, epsilon), (actions, _) in choices:  # after a rollout, without acting, and again
        chosen |= {number(stack[-1]): int(action) for stack, action in zip(obs, actions)}
        epsilons += [epsilon] * (epsilon not in epsilons)
    trained = list(Diary.steps.items())[:240]
    assert all(chosen[shown] == step.action for shown, step in trained)
    assert epsilons == pytest.approx([0.9, 0.5, 0.1, 0.3])


def test_every_game_is_logged_with_its_true_score(tmp_path):
    """At the step that ended it. Those of the evaluation come after."""
    points = curves(train(tmp_path))
    returns, lengths = points["charts/episodic_return"], points["charts/episodic_length"]
    assert [(r, n) for (_, r), (_, n) in zip(returns, lengths)] == Diary.games[: len(returns)]
    assert len(returns) >= len(Diary.games) - 3 and max(r for _, r in returns) > 5
    ends = np.zeros(4)
    for (step, _), (_, length) in zip(returns, lengths):
        ends[(step - 1) % 4] += length
        assert ends[(step - 1) % 4] == (step - 1) // 4 + 1


@pytest.mark.parametrize("anneal_lr", [True, False])
def test_metrics_and_schedules_are_logged_after_each_rollout(tmp_path, monkeypatch, anneal_lr):
    rollouts = recorded(monkeypatch, script, "learn")
    rates, learn = [], script.learn

    def noting(q_network, optimizer, *others):
        rates.append((type(optimizer), optimizer.param_groups[0]["lr"]))
        return learn(q_network, optimizer, *others)

    monkeypatch.setattr(script, "learn", noting)
    points = curves(train(tmp_path, anneal_lr=anneal_lr))
    expected = [3e-3 * (1 - k / 4 if anneal_lr else 1) for k in range(4)]
    assert rates == [(torch.optim.RAdam, pytest.approx(rate)) for rate in expected]
    for k, (_, metrics) in enumerate(rollouts):
        epsilon = [1, 0.5005, 0.001, 0.001][k]
        logged = {"charts/learning_rate": expected[k], "charts/epsilon": epsilon}
        assert set(metrics) == {"losses/td_loss", "losses/q_values"}
        for tag, value in (metrics | logged).items():
            assert points[tag][k] == (60 * (k + 1), pytest.approx(float(value), abs=1e-5)), tag


def test_checkpoints_are_written_when_they_are_due(tmp_path, monkeypatch):
    """Rollouts have 60 steps: what is due at 90 and at 180 is done at 120 and at 180."""
    steps, save = [], script.Run.save
    monkeypatch.setattr(script.Run, "save", lambda run: steps.append(run.envs.steps) or save(run))
    train(tmp_path)
    assert steps == [0, 120, 180, 240]


def test_statistics_are_of_all_that_was_learned_from(tmp_path, monkeypatch):
    """And of the first frames, once. They change between the rollouts only: Q and its targets
    share one normalisation."""
    acts, rollouts = recorded(monkeypatch, script, "act"), recorded(monkeypatch, script, "learn")
    counts = []
    for name in ("act", "update"):

        def noting(q_network, *others, function=getattr(script, name)):
            counts.append(q_network.obs_statistics.count.item())
            return function(q_network, *others)

        monkeypatch.setattr(script, name, noting)
    network = learned(train(tmp_path, norm_obs=True))["network"]
    seen = [torch.from_numpy(acts[0][0][1]), *(batch.obs for (_, _, batch, _), _ in rollouts)]
    seen = torch.cat(seen)[:, -1].flatten(1).double()
    assert list(dict.fromkeys(counts)) == [4, 64, 124, 184, 244] and len(seen) == 244
    assert network["obs_statistics.count"] == 244
    for name, expected in ("mean", seen.mean(0)), ("variance", seen.var(0, correction=0)):
        found = network[f"obs_statistics.{name}"].double()
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


class Pays(gym.Env):
    """One grey picture, in which every step pays 7. Games of three steps."""

    observation_space = gym.spaces.Box(0, 255, (4, 84, 84), np.uint8)
    action_space = gym.spaces.Discrete(2)

    def __init__(self, truncates):
        self.truncates, self.obs = truncates, np.full((4, 84, 84), 100, np.uint8)

    def reset(self, *, seed=None, options=None):
        self.t = 0
        return self.obs, {}

    def step(self, action):
        self.t += 1
        end = self.t == 3
        return self.obs, 7.0, end and not self.truncates, end and self.truncates, {}


gym.register("PixelTruncates-v0", entry_point=Pays, kwargs={"truncates": True})
gym.register("PixelTerminates-v0", entry_point=Pays, kwargs={"truncates": False})


class Constant(torch.nn.Module):
    """One number for each of two actions, whatever is seen."""

    def __init__(self):
        super().__init__()
        self.q, self.obs_statistics = torch.nn.Parameter(torch.zeros(2)), None

    def forward(self, obs):
        return self.q.expand(len(obs), 2)


@pytest.mark.parametrize("env_id, expected", [("PixelTruncates-v0", 5), ("PixelTerminates-v0", 0)])
def test_a_time_limit_is_not_the_end_of_the_world(tmp_path, monkeypatch, env_id, expected):
    """Truncated for ever, the sign of 7 is worth 1 / (1 - 0.8) = 5.

    If every third step terminates, which the only state cannot foresee, v is the mean of
    G_2 = 1, G_1 = 1 + 0.8 * (lambda * 1 + (1 - lambda) * v) and G_0, which is like G_1 of G_1.
    """
    monkeypatch.setattr(script, "make_network", lambda *_: Constant())
    flags = {"gamma": 0.8, "num_envs": 2, "num_steps": 15, "learning_rate": 0.1}
    flags |= {"total_timesteps": 2100, "update_epochs": 8}
    state = learned(train(tmp_path, env_id=env_id, **flags))
    if env_id == "PixelTerminates-v0":
        for _ in range(100):
            returns = [1.0]
            for _ in range(2):
                returns.append(1 + 0.8 * (0.65 * returns[-1] + 0.35 * expected))
            expected = sum(returns) / 3
    assert state["network"]["q"].max().item() == pytest.approx(expected, rel=0.02)


@pytest.mark.slow
def test_every_setting_of_the_algorithm_changes_the_outcome(tmp_path):
    """But for two, of the emulator and the evaluation."""

    def few(**changes):
        return train(tmp_path, **{"total_timesteps": 120} | changes)

    check_settings(script, few, dict(
        seed=2, total_timesteps=180, num_envs=3, learning_rate=1e-3, anneal_lr=False, num_steps=10,
        gamma=0.5, q_lambda=0.3, num_minibatches=3, update_epochs=1, max_grad_norm=0.1,
        start_e=0.5, end_e=0.5, exploration_fraction=1.0, norm_obs=True, precision="bfloat16",
    ), others={"sticky_actions": 0.0, "eval_epsilon": 0.5})  # fmt: skip


def test_a_minibatch_may_be_a_single_step():
    script.Args(num_envs=1, num_steps=5, num_minibatches=5)
    with pytest.raises(ValueError, match="--num-minibatches"):
        script.Args(num_envs=1, num_steps=5, num_minibatches=6)
