"""The mathematics of iqn_atari.py: by loops, by hand, on distributions that are known.

What dqn_atari.py and qrdqn_cartpole.py have word for word, the buffer among it, is tested there.
"""

import inspect
import math

import dqn_atari
import games
import iqn_atari as script
import numpy as np
import pytest
import qrdqn_cartpole
import torch
import torch.nn.functional as F
from games import check_settings, recorded
from test_dqn_atari import random_batch
from test_qrdqn_cartpole import huber
from torch import nn

# The description for the common tests: README.md explains it.
# All actions are random: by rounding, a compiled run would choose others than an eager one.
TINY = (
    "--total-timesteps 800 --num-envs 2 --buffer-size 300 --learning-starts 100 --batch-size 4 "
    "--train-frequency 20 --target-network-frequency 100 --end-e 1 --norm-obs --num-quantiles 3 "
    "--num-target-quantiles 2 --num-action-quantiles 4 "
    "--checkpoint-frequency 150 --eval-frequency 450 --eval-episodes 1 --eval-epsilon 0.5 "
    "--num-threads 1"
)
OWN = "pixels"
OWN_FLAGS = (
    "--total-timesteps 2000 --learning-starts 200 --buffer-size 2000 --learning-rate 1e-3 "
    "--batch-size 8 --exploration-fraction 0.5 --target-network-frequency 100 --gamma 0.5 "
    "--num-action-quantiles 8 --eval-epsilon 0 --num-threads 1"
)
WRONG_SPACES = ["CartPole-v1", "Pendulum-v1"]
DIVERGES = "--learning-rate 1e30"
BAD = [
    ("--num-quantiles 0", "--num-quantiles"),
    ("--num-target-quantiles 1.5", "--num-target-quantiles"),
    ("--num-action-quantiles 5000", "--num-action-quantiles"),
    ("--learning-starts 63", "--learning-starts"),
    ("--loss squared", "--loss"),
]
LEARNS = []  # DQN learns Catch from pixels in its test; longer games are in the record
# What others published, by the record's name after `<script>__`: shown beside our results.
PUBLISHED = {
    "ALE-Pong-v5": "Dopamine -1.8 (1M, 3-step returns, sticky actions)",
    "ALE-Breakout-v5": "Dopamine 31.6 (1M, 3-step returns, sticky actions)",
}

# ---- What others have too ------------------------------------------------------------------------

DQN = (
    "make_games use_bfloat16 make_network linear_epsilon update_target Batch RunningStatistics "
    "newest_frames ReplayBuffer evaluate QNetwork.normalize"
).split()
QRDQN = ["of_actions", "quantile_huber_loss"]


def source(module, name):
    for part in name.split("."):
        module = getattr(module, part)
    return inspect.getsource(module)


@pytest.mark.parametrize(
    "other, name", [(dqn_atari, n) for n in DQN] + [(qrdqn_cartpole, n) for n in QRDQN]
)
def test_what_others_have_too_is_the_same_and_tested_there(other, name):
    assert source(script, name) == source(other, name)


def test_the_loop_is_that_of_dqn_atari_with_random_taus():
    """For the batch, new ones at each gradient step; and to act, as in the evaluation."""
    ours, theirs = (inspect.getsource(s.train) for s in (script, dqn_atari))
    for old, new in (
        ("act(q_network, obs, epsilon)", "act(q_network, obs, epsilon, args.num_action_quantiles)"),
        ("batch, args)\n", "batch, taus, args)\n"),
        (
            " " * 20 + "metrics = update",
            " " * 20 + "taus = Taus(*(part.to(device) for part in draw_taus(args)))\n"
            + " " * 20 + "metrics = update",
        ),
    ):  # fmt: skip
        assert theirs.count(old) == 1
        theirs = theirs.replace(old, new)
    assert ours == theirs


# ---- tau -----------------------------------------------------------------------------------------


def test_cosines_are_those_of_the_papers_loop():
    """From i = 0 on, whose cosine is 1."""
    taus = torch.tensor([[0.0, 0.25, 0.5], [0.999, 1 / 3, 0.07]], dtype=torch.float64)
    found = script.cosine_embedding(taus, 64)
    assert found.shape == (2, 3, 64)
    for b in range(2):
        for m in range(3):
            expected = [math.cos(math.pi * i * taus[b, m].item()) for i in range(64)]
            np.testing.assert_allclose(found[b, m], expected, atol=1e-12)
    single = script.cosine_embedding(taus.float(), 64)
    torch.testing.assert_close(single.double(), found, rtol=0, atol=1e-4)


def test_taus_are_uniform_and_apart():
    """No number occurs twice: not in two kinds, not in two rows, not in two draws."""
    torch.manual_seed(0)
    args = script.Args(num_quantiles=3, num_target_quantiles=4, num_action_quantiles=5)
    draws = [script.draw_taus(args) for _ in range(10)]
    assert [tuple(part.shape) for part in draws[0]] == [(32, 3), (32, 4), (32, 5)]
    for kind in zip(*draws):
        numbers = torch.cat(kind).flatten()
        counts = torch.histc(numbers, 8, 0, 1) / len(numbers)
        np.testing.assert_allclose(counts, np.full(8, 1 / 8), atol=0.04)
    numbers = torch.cat([part.flatten() for draw in draws for part in draw])
    assert len(numbers) == 10 * 32 * 12
    assert numbers.unique().numel() > 0.999 * len(numbers)  # float32 has 2^24 of them


class Curves(nn.Module):
    """theta(s, a, tau) is a sum of cosines of tau with the weights (S, K, D) of s and a.

    An observation is a state, one-hot. All tau that it was asked for are in `asked`.
    """

    def __init__(self, weights):
        super().__init__()
        self.weights = nn.Parameter(torch.as_tensor(weights).double().clone())
        self.asked = []

    def forward(self, obs, taus):
        self.asked.append(taus)
        cosines = script.cosine_embedding(taus.double(), self.weights.shape[2])
        return torch.einsum("bs,skd,bmd->bkm", obs.double(), self.weights, cosines)


def theta(weights, tau):
    """By hand, for the weights (D,) of a state and an action."""
    return sum(weight * math.cos(math.pi * i * tau) for i, weight in enumerate(weights))


# ---- act -----------------------------------------------------------------------------------------


def test_the_greedy_action_has_the_greatest_mean_over_its_taus():
    """Not the greatest maximum; each row has tau of its own, and each call new ones."""
    torch.manual_seed(0)
    network, obs = Curves(torch.randn(4, 3, 6)), np.eye(4)[np.arange(40) % 4]
    others = 0
    for _ in range(5):
        actions = script.act(network, obs, 0.0, 7)
        taus = network.asked[-1]
        assert taus.shape == (40, 7) and actions.shape == (40,)
        for row, action in enumerate(actions):
            curves = [[theta(w, tau) for tau in taus[row].tolist()]
                      for w in network.weights[row % 4].tolist()]  # fmt: skip
            assert action == max(range(3), key=lambda a: sum(curves[a]))
            others += action != max(range(3), key=lambda a: max(curves[a]))
    assert others > 10
    assert torch.cat(network.asked).unique().numel() == 5 * 40 * 7


def test_actions_are_epsilon_greedy():
    torch.manual_seed(0)
    values = torch.tensor([[0.0, 3, 1], [5, 3, 1]])[:, :, None]  # the same at each tau
    for epsilon in (0.0, 0.3, 1.0):
        actions = script.act(Curves(values), np.eye(2)[[0, 1] * 2000], epsilon, 2).reshape(-1, 2)
        for column, best in zip(actions.T, (1, 0)):
            expected = np.full(3, epsilon / 3)
            expected[best] += 1 - epsilon
            np.testing.assert_allclose(np.bincount(column, minlength=3) / 2000, expected, atol=0.04)


def test_the_evaluation_acts_with_its_own_epsilon_and_as_many_taus(monkeypatch):
    acts, network = recorded(monkeypatch, script, "act"), Curves(torch.randn(4, 3, 6))
    script.play(script.Args(eval_epsilon=0.3, num_action_quantiles=9), network, np.eye(4))
    ((arguments, _),) = acts
    assert arguments[2:] == (0.3, 9) and network.asked[0].shape == (4, 9)


# ---- quantile_target, quantile_loss --------------------------------------------------------------


def test_target_by_hand():
    """The best action by the means of other tau, not by those of the targets themselves."""
    next_quantiles = torch.tensor([
        [[0.0, 9.0, 9.0], [2.0, 3.0, 4.0]],
        [[0.0, 9.0, 9.0], [2.0, 3.0, 4.0]],
        [[7.0, 7.0, 7.0], [8.0, 8.0, 8.0]],
    ])  # fmt: skip
    next_q = torch.tensor([[1.0, 2.0], [2.0, 1.0], [0.0, 1.0]])
    rewards, terminated = torch.tensor([1.0, 0.0, 3.0]), torch.tensor([False, False, True])
    found = script.quantile_target(rewards, terminated, next_quantiles, next_q, 0.5)
    assert found.tolist() == [[2.0, 2.5, 3.0], [0.0, 4.5, 4.5], [3.0, 3.0, 3.0]]


def by_the_papers_loop(quantiles, taus, targets):
    """Equation 3, pair by pair, for one transition."""
    total = 0
    for quantile, tau in zip(quantiles, taus):
        for y in targets:
            below = 1 if y - quantile < 0 else 0
            total = total + abs(tau - below) * huber(y - quantile) / len(targets)
    return total


@pytest.mark.parametrize("num_quantiles, num_targets", [(3, 7), (7, 3), (1, 4), (4, 1), (5, 5)])
def test_loss_is_that_of_the_papers_loop(num_quantiles, num_targets):
    """A sum over the quantiles, each with its own tau in each row, a mean over the targets."""
    torch.manual_seed(0)
    quantiles, taus, targets = (
        scale * torch.rand(50, size, dtype=torch.float64)
        for scale, size in ((4, num_quantiles), (1, num_quantiles), (4, num_targets))
    )
    rows = zip(quantiles.tolist(), taus.tolist(), targets.tolist())
    expected = sum(by_the_papers_loop(*row) for row in rows) / 50
    found = script.quantile_loss(quantiles, taus, targets).item()
    assert found == pytest.approx(expected, rel=1e-12)


# ---- update --------------------------------------------------------------------------------------


def batch_of(states, transitions):
    """Of (state, action, reward, next state, terminated)."""
    eye = torch.eye(states, dtype=torch.float64)
    state, action, reward, following, terminated = map(torch.tensor, zip(*transitions))
    return script.Batch(eye[state], action, reward.double(), eye[following], terminated)


@pytest.mark.parametrize("double_q", [False, True])
def test_one_step_down_the_gradient_of_the_definition(double_q):
    """By loops, each tau in its place. Nothing but the Q-network changes."""
    torch.manual_seed(0)
    args = script.Args(gamma=0.9, double_q=double_q, batch_size=18, num_quantiles=3,
                       num_target_quantiles=4, num_action_quantiles=5)  # fmt: skip
    q_network, target_network = (Curves(torch.randn(6, 3, 4)) for _ in range(2))
    transitions = [
        (s, a, float(torch.randn(())), int(torch.randint(6, ())), bool(torch.rand(()) < 0.3))
        for s in range(6) for a in range(3)
    ]  # fmt: skip
    batch, taus = batch_of(6, transitions), script.draw_taus(args)
    before = target_network.weights.detach().clone()
    leaf = q_network.weights.detach().clone().requires_grad_()
    chooser, other = (leaf, before) if double_q else (before, leaf)
    loss, mean, others = 0, 0, np.zeros(2)
    for b, (s, a, reward, following, terminated) in enumerate(transitions):
        own, next_, choice = (part[b].tolist() for part in taus)

        def best(table, taus, following=following):
            rows = table[following].tolist()
            return max(range(3), key=lambda k: sum(theta(rows[k], tau) for tau in taus))

        best_action = best(chooser, choice)
        others += best_action != best(other, choice), best_action != best(chooser, next_)
        weights = before[following, best_action].tolist()
        follows = 0 if terminated else 0.9
        targets = [reward + follows * theta(weights, tau) for tau in next_]
        quantiles = [theta(leaf[s, a], tau) for tau in own]
        loss = loss + by_the_papers_loop(quantiles, own, targets) / 18
        mean += sum(quantiles).item() / 3 / 18
    assert (others > 1).all()  # the choice depends on the network and on its tau
    loss.backward()
    optimizer = torch.optim.SGD(q_network.parameters(), lr=2.0)
    q_network.weights.grad = torch.ones(6, 3, 4).double()  # what is left over is no matter
    metrics = script.update(q_network, target_network, optimizer, batch, taus, args)
    torch.testing.assert_close(q_network.weights.detach(), leaf.detach() - 2 * leaf.grad)
    assert target_network.weights.grad is None and torch.equal(target_network.weights, before)
    found = {tag: value.item() for tag, value in metrics.items()}
    assert found == pytest.approx({"losses/td_loss": loss.item(), "losses/q_values": mean})
    assert not any(value.requires_grad for value in metrics.values())


def test_updates_find_the_distribution_of_the_return():
    """Three flips of a coin that pays 0 or 100, or 25 for sure; gamma is 1/2. Always to flip is
    best: 0, 25 ... or 175, each as likely. But for these stairs, its quantiles are 200 tau - 12.5.
    """
    torch.manual_seed(0)
    flips = [(s, 0, coin, min(s + 1, 2), s == 2) for s in range(3) for coin in (0.0, 100.0)]
    process = flips + [(s, 1, 25.0, min(s + 1, 2), s == 2) for s in range(3) for _ in range(2)]
    q_network, target_network = (Curves(torch.zeros(3, 2, 8)) for _ in range(2))
    args, batch = script.Args(gamma=0.5, batch_size=12, num_quantiles=32), batch_of(3, process)
    optimizer = torch.optim.SGD(q_network.parameters())
    for step in range(1000):
        optimizer.param_groups[0]["lr"] = 3.0 * (1 - step / 1000)
        taus = script.draw_taus(args)
        script.update(q_network, target_network, optimizer, batch, taus, args)
        script.update_target(target_network, q_network, 1.0)
    taus = torch.linspace(0.05, 0.95, 19)
    found = q_network(torch.eye(3), taus.expand(3, 19)).detach()
    np.testing.assert_allclose(found[0, 0], 200 * taus - 12.5, atol=9)
    assert (found[0, 0].diff() > 0).all()
    expected = [[87.5, 62.5], [75, 50], [50, 25]]
    np.testing.assert_allclose(found.mean(2), expected, atol=2.5)
    np.testing.assert_allclose(found[2, 1], np.full(19, 25), atol=1e-3)


def make_network(num_actions=4, bfloat16=False, norm_obs=False):
    torch.manual_seed(0)
    return script.QNetwork(num_actions, bfloat16, norm_obs)


def test_the_network_learns_the_quantiles_of_a_known_distribution():
    """With fewer units, and a torso for one pixel. The return of one action is uniform from 0 to
    100, that of the other exponential with a mean of 30.
    """
    torch.manual_seed(0)
    network = make_network(2)
    network.normalize = lambda obs: obs / 255
    network.features = nn.Sequential(nn.Flatten(), nn.Linear(4, 32), nn.ReLU())
    network.embedding = nn.Sequential(nn.Linear(64, 32), nn.ReLU())
    network.hidden = nn.Sequential(nn.Linear(32, 64), nn.ReLU())
    network.head = nn.Linear(64, 2)
    optimizer = torch.optim.Adam(network.parameters())
    args = script.Args(batch_size=64)
    obs = torch.full((64, 4, 1, 1), 255, dtype=torch.uint8)
    actions, ends = torch.arange(64) % 2, torch.ones(64, dtype=torch.bool)
    for step in range(400):
        optimizer.param_groups[0]["lr"] = 3e-2 * (1 - step / 400)
        chances = torch.rand(64)
        rewards = torch.where(actions == 0, 100 * chances, -30 * (1 - chances).log())
        batch = script.Batch(obs, actions, rewards, obs, ends)
        script.update(network, network, optimizer, batch, script.draw_taus(args), args)
    taus = torch.linspace(0.1, 0.9, 9)
    found = network(obs[:1], taus[None])[0].detach()
    assert (found.diff() > 0).all()
    expected = torch.stack([100 * taus, -30 * (1 - taus).log()])
    torch.testing.assert_close(found, expected, rtol=0, atol=10)


@pytest.mark.parametrize("limit", [0.0, 1e9, 0.01])
def test_longer_gradients_are_clipped_as_one_vector(limit):
    """0: they are not clipped."""
    network, args = make_network(), script.Args(max_grad_norm=limit, batch_size=8)
    before = [weights.detach().clone() for weights in network.parameters()]
    optimizer, taus = torch.optim.SGD(network.parameters(), lr=1.0), script.draw_taus(args)
    script.update(network, make_network(), optimizer, random_batch(), taus, args)
    moves = [weights.detach() - old for weights, old in zip(network.parameters(), before)]
    move = torch.cat([part.flatten() for part in moves]).norm().item()
    assert move == pytest.approx(0.01, rel=1e-2) if limit == 0.01 else move > 0.1


# ---- The network ---------------------------------------------------------------------------------


def test_the_network_is_that_of_the_paper():
    """Equation 4, tau by tau: psi(s), times phi(tau), through a layer of 512 units and the last."""
    network, obs, taus = make_network(18), random_batch(3).obs, torch.rand(3, 2)
    weights = list(network.parameters())
    weights[0] = F.pixel_shuffle(weights[0], 4)  # of blocks -> of pixels
    shapes = [(32, 4, 8, 8), (64, 32, 4, 4), (64, 64, 3, 3), (3136, 64), (512, 3136), (18, 512)]
    assert [tuple(weight.shape) for weight in weights[::2]] == shapes
    assert all(bias.shape == weight.shape[:1] for weight, bias in zip(weights[::2], weights[1::2]))
    with torch.no_grad():
        for bias in weights[1::2]:
            bias.normal_(0, 0.1)
    x = obs / 255
    for i, stride in enumerate((4, 2, 1)):
        x = F.conv2d(x, weights[2 * i], weights[2 * i + 1], stride).relu()
    found = network(obs, taus)
    assert found.shape == (3, 18, 2)
    for b in range(3):
        for m in range(2):
            cosines = torch.tensor([math.cos(math.pi * i * taus[b, m].item()) for i in range(64)])
            phi = F.linear(cosines, weights[6], weights[7]).relu()
            hidden = F.linear(x[b].flatten() * phi, weights[8], weights[9]).relu()
            expected = F.linear(hidden, weights[10], weights[11])
            torch.testing.assert_close(found[b, :, m], expected, rtol=1e-3, atol=1e-4)


def test_what_the_network_sees_reaches_its_last_layer():
    """A ball, as in dqn_atari's test; and tau: with PyTorch's own first weights, either hardly."""
    obs = torch.full((20, 4, 84, 84), 87, dtype=torch.uint8)
    for i in range(20):
        obs[i, :, 20 + i : 22 + i, 30 + i // 2] = 236
    network, seen = make_network(), []
    network.head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    for _ in range(2):
        network(obs, torch.linspace(0, 1, 10).expand(20, -1))
        for layer in (*network.features, *network.embedding, *network.hidden):
            if hasattr(layer, "reset_parameters"):
                layer.reset_parameters()
    (of_frames, default), (of_tau, default_tau) = (
        [hidden.std(axis).mean() for hidden in seen] for axis in (0, 1)
    )
    assert of_frames > 10 * default and of_tau > 10 * default_tau
    # A unit of phi has the variance (1 + 63 / 2) * 2 / 64 before its ReLU, which takes half of it.
    phi = make_network().embedding(script.cosine_embedding(torch.rand(1000), 64))
    assert phi.square().mean().item() == pytest.approx(32.5 / 64, rel=0.1)


def test_bfloat16_is_float32_within_its_rounding():
    """The cosines too: pi * 63 * tau, rounded to bfloat16, would be off by half a turn."""
    exact, rounded, obs = make_network(), make_network(bfloat16=True), random_batch().obs
    taus = torch.rand(8, 5)
    assert rounded(obs, taus).dtype == torch.float32
    torch.testing.assert_close(rounded(obs, taus), exact(obs, taus), rtol=0.05, atol=0.02)
    assert not torch.equal(rounded(obs, taus), exact(obs, taus))


def test_bfloat16_tells_actions_apart_that_differ_by_a_thousandth():
    """Around 2, bfloat16 has steps of 1/64. For a long time, Pong's actions differ by less."""
    network, biases = make_network(bfloat16=True), torch.tensor([2.0, 2.001, 2.002, 2.003])
    with torch.no_grad():
        network.head.weight.zero_()
        network.head.bias.copy_(biases)
    torch.testing.assert_close(network(random_batch().obs, torch.rand(8, 3))[0, :, 2], biases)


# ---- The loop ------------------------------------------------------------------------------------


def train(tmp_path, **changes):
    """400 steps in games of the diary. Returns the run's folder."""
    few = dict(
        env_id="PixelDiary-v0", total_timesteps=400, num_envs=2, buffer_size=300,
        learning_starts=40, batch_size=4, train_frequency=4, target_network_frequency=40,
        num_quantiles=3, num_target_quantiles=2, num_action_quantiles=4, eval_episodes=2,
        checkpoint_frequency=150, precision="float32", learning_rate=3e-3, num_threads=1,
    )  # fmt: skip
    return games.train(script, script.Args(**few | changes, runs_dir=str(tmp_path)))


def test_no_tau_is_used_twice(tmp_path, monkeypatch):
    """Neither to act nor to learn: those of all calls of the networks, the evaluation's as well."""
    calls = recorded(monkeypatch, script, "cosine_embedding")
    updates = recorded(monkeypatch, script, "update")
    train(tmp_path, total_timesteps=120)
    assert len(updates) == 21 and len(calls) > 60 + 3 * 21
    for (_, _, _, batch, taus, _), _ in updates:
        assert [part.shape for part in taus] == [(4, 3), (4, 2), (4, 4)] and len(batch.obs) == 4
    numbers = torch.cat([taus.flatten() for (taus, _), _ in calls])
    assert numbers.unique().numel() > 0.999 * len(numbers)


@pytest.mark.slow
def test_every_setting_of_the_algorithm_changes_the_outcome(tmp_path):
    """But for two, of the emulator and the evaluation."""

    def few(**changes):
        few = {"total_timesteps": 160, "exploration_fraction": 0.5, "train_frequency": 8}
        return train(tmp_path, **few | changes)

    check_settings(script, few, dict(
        seed=2, total_timesteps=168, num_envs=3, learning_rate=1e-3, adam_epsilon=1e-8,
        anneal_lr=True, buffer_size=100, gamma=0.5, num_quantiles=2, num_target_quantiles=1,
        num_action_quantiles=3, tau=0.5, target_network_frequency=80, batch_size=5, start_e=0.5,
        end_e=0.5, exploration_fraction=1.0, learning_starts=60, train_frequency=4, double_q=True,
        max_grad_norm=0.01, norm_obs=True, precision="bfloat16",
    ), others={"sticky_actions": 0.0, "eval_epsilon": 0.5})  # fmt: skip
