"""The mathematics of rainbow_atari.py, piece by piece; with all of it off, it is dqn_atari.py.

What it has word for word from dqn_atari.py is tested there, environments in test_games.py.
"""

import inspect
import itertools
import math
import time

import c51_cartpole
import dqn_atari
import games
import numpy as np
import pytest
import rainbow_atari as script
import test_c51_cartpole as c51
import test_dqn_atari as dqn
import torch
import torch.nn.functional as F
from conftest import curves, learned, same
from games import Diary, check_settings, number, numbers, recorded
from torch import nn
from torch.distributions import Categorical, kl_divergence

# The description for the common tests: README.md explains it.
TINY = (
    "--total-timesteps 900 --num-envs 2 --buffer-size 600 --learning-starts 500 --batch-size 4 "
    "--train-frequency 20 --target-network-frequency 100 --network small --norm-obs "
    "--checkpoint-frequency 150 --eval-frequency 450 --eval-episodes 1 --eval-epsilon 0.5 "
    "--num-threads 1"
)
OWN = "pixels"
OWN_FLAGS = (
    "--total-timesteps 2000 --learning-starts 200 --buffer-size 2000 --learning-rate 1e-3 "
    "--batch-size 8 --network small --target-network-frequency 100 --gamma 0.5 --v-min -2 "
    "--v-max 2 --eval-epsilon 0 --num-threads 1"
)
WRONG_SPACES = ["CartPole-v1", "Pendulum-v1"]
DIVERGES = "--learning-rate 1e30"
BAD = [
    ("--learning-starts 79", "--learning-starts"),
    ("--n-step 20 --learning-starts 200", "--n-step"),
    ("--n-step 0", "--n-step"),
    ("--v-min 10", "--v-max"),
    ("--prioritized-replay-alpha 1.5", "--prioritized-replay-alpha"),
    ("--network big", "--network"),
]
LEARNS = []  # DQN learns Catch from pixels in its test; longer games are in the record
# What others published, by the record's name after `<script>__`: shown beside our results.
PUBLISHED = {
    "ALE-Pong-v5": "Dopamine -16.5 (1M, sticky actions)",
    "ALE-Breakout-v5": "Dopamine 15.6 (1M, sticky actions)",
}
# How speed.py measures the script, and beside what; its first lines explain the form.
SPEED = {
    "steps": 5_000,
    "first": 1_500,  # all programs learn from step 1,000 on
    "peers": {
        "CleanRL's rainbow_atari.py": {
            "flags": "--learning-starts 1000 --buffer-size 20000",
            "equal": "one game, float32, compiled",
        },
    },
    "flags": "--learning-starts 1000 --buffer-size 20000 --max-grad-norm 0",
    "variants": {
        "eight games, bfloat16": "--precision bfloat16",
        "eight games, float32": "--precision float32",
        "one game, bfloat16": "--precision bfloat16 --num-envs 1",
        "one game, float32": "--precision float32 --num-envs 1",
        "one game, float32, compiled": "--precision float32 --num-envs 1 --compile",
    },
    "floors": {
        "floor, bfloat16": "1200 1600 --precision bfloat16",
        "floor, float32": "1200 1600 --precision float32",
    },
}
OFF = dict(
    double_q=False, dueling=False, prioritized=False, n_step=1, distributional=False, noisy=False
)
R, N = 20, 3  # rows, games


def test_what_is_not_new_is_that_of_dqn_atari_and_c51_cartpole():
    """Where it is tested. (test_conventions.py compares functions of one name.)"""
    for other, parts in (
        (dqn_atari, "ReplayBuffer.open ReplayBuffer.close act evaluate Envs"),
        (dqn_atari, "linear_epsilon update_target RunningStatistics use_bfloat16"),
        (c51_cartpole, "expected_return of_actions"),
    ):
        for part in parts.split():
            sources = []
            for found in script, other:
                for name in part.split("."):
                    found = getattr(found, name)
                sources.append(inspect.getsource(found))
            assert sources[0] == sources[1], part


# ---- n steps -------------------------------------------------------------------------------------


def by_hand(rewards, terminated, truncated, gamma):
    """What counts of these steps, one by one."""
    total, k = 0.0, 0
    for reward, end, cut in zip(rewards, terminated, truncated):
        if cut:  # its next observation is not stored
            break
        total, k = total + gamma**k * reward, k + 1
        if end:
            return total, True, k
    return total, False, k


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
def test_returns_of_all_episodes_of_n_steps(n):
    """Each step goes on, terminates, is truncated, or both."""
    kinds = torch.tensor(list(itertools.product([0, 1, 2, 3], repeat=n)))
    terminated, truncated = kinds % 2 == 1, kinds >= 2
    rewards = torch.randint(-1, 2, kinds.shape, dtype=torch.int8)
    found = script.n_step_returns(rewards, terminated, truncated, 0.5)
    expected = [by_hand(*rows, 0.5) for rows in zip(rewards.tolist(), terminated, truncated)]
    assert [part.tolist() for part in found] == [list(column) for column in zip(*expected)]
    assert {k for *_, k in expected} == set(range(n + 1))


def new_buffer(folder, num_rows=R, num_envs=N, resume=False, **settings):
    args = script.Args(**{"n_step": 3, "gamma": 0.5, "prioritized_replay_alpha": 1.0} | settings)
    buffer = script.ReplayBuffer(num_rows, num_envs, args)
    buffer.open(folder, resume)
    return buffer


class Stream(dqn.Stream):
    """As there. Of every row, `steps` has the step of each game."""

    def __init__(self, buffer):
        super().__init__(buffer)
        self.steps = []

    def play(self, rows):
        for _ in range(rows):
            shown = [number(env.frames[-1]) for env in self.envs]
            super().play(1)
            self.steps.append([Diary.steps[key] for key in shown])

    def expected(self, n):
        """Place -> transition, of all that can be drawn."""
        last, found = len(self.steps), {}
        for t in range(max(0, last - self.buffer.num_rows) + 3, last - n):
            for i in range(self.buffer.num_envs):
                steps = [row[i] for row in self.steps[t : t + n]]
                outcome = zip(*((step.reward, step.terminated, step.truncated) for step in steps))
                total, end, k = by_hand(*outcome, 0.5)
                if k > 0:
                    after = None if end else steps[k - 1].next_frames
                    key = *steps[0][:2], total, after, end, 0.5**k
                    found[t % self.buffer.num_rows * self.buffer.num_envs + i] = key
        return found


def keys_of(batch):
    for obs, action, reward, next_obs, terminated, discount, _ in zip(*batch):
        after = None if terminated else numbers(next_obs)
        yield numbers(obs), int(action), float(reward), after, bool(terminated), float(discount)


@pytest.mark.parametrize("n", [1, 2, 3, 9])
@pytest.mark.parametrize("rows, num_rows", [(16, R), (R, R), (21, R), (265, R), (99, 60)])
@pytest.mark.parametrize("prioritized", [True, False])
def test_exactly_what_was_played_is_drawn(tmp_path, rows, num_rows, n, prioritized):
    """Before the buffer is full, and after: n steps of one game or what is left of it, also the
    last steps of an episode; no truncated step, none of the newest n and oldest three rows."""
    torch.manual_seed(rows)
    buffer = new_buffer(tmp_path, num_rows, n_step=n, prioritized=prioritized)
    stream = Stream(buffer)
    stream.play(rows)
    batch, places = buffer.sample(40 * num_rows, 0.4)
    drawn, expected = dict(zip(places.tolist(), keys_of(batch))), stream.expected(n)
    assert drawn == expected
    if num_rows > R:  # all cases are among them
        lengths = {(end, -int(math.log2(discount))) for *_, end, discount in expected.values()}
        assert lengths >= {(False, k) for k in (*range(1, min(n, 7)), n)}
        assert lengths >= {(True, 1), (True, min(n, 5))}
    if prioritized:  # they are those whose priority is not 0
        priorities = buffer.tree.nodes[buffer.tree.first :]
        assert np.flatnonzero(priorities).tolist() == sorted(expected)


@pytest.mark.parametrize("prioritized", [True, False])
def test_nothing_can_be_drawn_if_every_step_is_truncated(tmp_path, prioritized):
    buffer = new_buffer(tmp_path, prioritized=prioritized)
    for _ in range(15):
        buffer.add(np.zeros((N, 4, 84, 84), np.uint8), *np.zeros((3, N), np.uint8),
                   np.ones(N, bool), np.zeros(N))  # fmt: skip
    with pytest.raises(ValueError, match="every step was truncated"):
        buffer.sample(4, 1.0)


def test_a_million_transitions_take_at_most_7_2_gb(tmp_path):
    """Even with one transition more than a power of two: half of the tree is empty then."""
    buffer = new_buffer(tmp_path, 1025, 1)
    columns = sum(getattr(buffer, name).nbytes for name in buffer.COLUMNS)
    assert (buffer.file.nbytes + columns + buffer.tree.nodes.nbytes) / 1025 <= 7200


def test_learning_starts_when_a_transition_can_be_drawn():
    script.Args(num_envs=8, n_step=20, learning_starts=27 * 8)
    script.Args(num_envs=8, n_step=1, learning_starts=64)
    for n, steps in (20, 27 * 8 - 1), (1, 63):
        with pytest.raises(ValueError, match="--learning-starts"):
            script.Args(num_envs=8, n_step=n, learning_starts=steps)


# ---- Priorities ----------------------------------------------------------------------------------


def tree_of(priorities):
    tree = script.SumTree(len(priorities))
    tree.set(np.arange(len(priorities)), np.array(priorities, float))
    return tree


@pytest.mark.parametrize("size", [1, 2, 5, 64, 1000])
def test_sums_stay_exact(size):
    """After 3,000 updates with priorities of very different sizes, some index twice in one."""
    generator, values = np.random.default_rng(0), np.zeros(size)
    tree = script.SumTree(size)
    for _ in range(3000):
        indices = generator.integers(0, size, 8)
        priorities = 10.0 ** generator.integers(-12, 12, size)[indices] * (indices % 3 > 0)
        tree.set(indices, priorities)
        values[indices] = priorities
    assert tree.nodes[1] == pytest.approx(math.fsum(values), rel=1e-15 * size.bit_length())
    assert np.array_equal(tree.nodes[tree.first :][:size], values)
    assert np.array_equal(tree_of(values).nodes, tree.nodes)


@pytest.mark.parametrize("size", [1, 3, 64, 100])
def test_what_is_found_is_where_the_running_sum_passes(size):
    """In whole numbers, in which all sums are exact."""
    priorities = np.random.default_rng(size).integers(0, 5, size)
    priorities[size // 2] = 3
    sums = np.arange(priorities.sum())
    expected = np.searchsorted(priorities.cumsum(), sums, side="right")
    assert np.array_equal(tree_of(priorities).find(sums.astype(float)), expected)


@pytest.mark.parametrize("seed", range(20))
def test_a_priority_of_0_is_never_found(seed):
    """Not even for a sum that rounding made as large as all, or larger."""
    generator = np.random.default_rng(seed)
    size = int(generator.integers(2, 300))
    priorities = generator.random(size) * 10.0 ** generator.integers(-9, 9, size)
    priorities[generator.random(size) < 0.8] = 0
    priorities[generator.integers(size)] = 0.3
    tree = tree_of(priorities)
    total = tree.nodes[1]
    edges = priorities.cumsum()
    sums = [0, total, total * 1.001, np.nextafter(total, 0), *edges, *(edges * (1 - 1e-15))]
    sums = np.array(sums)
    assert (priorities[tree.find(sums)] > 0).all()


def test_indices_are_drawn_in_proportion_to_their_priorities():
    """Chi-square of 64,000 draws, of 64 each. And each of equal parts of the sum is drawn once."""
    torch.manual_seed(0)
    priorities = np.array([0.0, 1, 2, 3, 4, 5, 0, 10, 0.5])
    tree, counts = tree_of(priorities), np.zeros(9)
    for _ in range(1000):
        indices, probs = tree.sample(64)
        counts += np.bincount(indices, minlength=9)
        np.testing.assert_allclose(probs, priorities[indices] / priorities.sum())
    expected = 64_000 * priorities / priorities.sum()
    possible = expected > 0
    # Below its mean of 6, as the draws are stratified.
    assert (((counts - expected)[possible] ** 2) / expected[possible]).sum() < 18
    assert not counts[~possible].any()
    assert tree_of(np.ones(32)).sample(32)[0].tolist() == list(range(32))
    assert len(set(tree_of([1.0, 1.0]).sample(1)[0].item() for _ in range(20))) == 2


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_weights_make_up_for_the_probabilities(beta):
    """(count * P)^-beta, divided by the largest."""
    probs = torch.tensor([0.1, 0.4, 0.05, 0.1]).double()
    expected = (20 * probs) ** -beta / ((20 * probs) ** -beta).max()
    torch.testing.assert_close(script.importance_weights(probs, beta), expected)


def test_with_weights_a_mean_over_draws_is_that_over_all_transitions(tmp_path):
    """With beta 1, weights and frequencies cancel. In the batch stand those of its rows."""
    torch.manual_seed(0)
    buffer = new_buffer(tmp_path)
    stream = Stream(buffer)
    stream.play(40)
    places = torch.tensor(sorted(stream.expected(3)))
    buffer.set_priorities(places, 1 + torch.arange(len(places)).float())
    batch, drawn = buffer.sample(20_000, 1.0)
    weighted = torch.zeros(R * N).index_add(0, drawn, batch.weights)[places]
    np.testing.assert_allclose(weighted / weighted.mean(), np.ones(len(places)), atol=0.1)
    assert batch.weights.max() == 1 and batch.weights.dtype == torch.float32
    counts = torch.bincount(drawn, minlength=R * N)[places]
    assert counts[-1] / counts[0] == pytest.approx(len(places), rel=0.3)
    weights = buffer.sample(50, 0.0)[0].weights
    assert weights.tolist() == [1.0] * 50


def test_priorities_are_powers_of_errors_and_new_transitions_get_the_largest(tmp_path):
    """The largest so far, also after it was lowered; 1 at first."""
    buffer = new_buffer(tmp_path, prioritized_replay_alpha=0.5)
    stream = Stream(buffer)
    stream.play(12)

    def priorities():
        return buffer.tree.nodes[buffer.tree.first :][: R * N]

    assert set(priorities()) == {0.0, 1.0}
    old = sorted(stream.expected(3))
    buffer.set_priorities(torch.tensor(old[:3]), torch.tensor([16.0, 0.0, 4.0]))
    assert priorities()[old[:3]] == pytest.approx([4.0, 1e-3, 2.0], rel=1e-4)
    buffer.set_priorities(torch.tensor(old[:1]), torch.tensor([1.0]))
    stream.play(3)
    new = sorted(set(stream.expected(3)) - set(old))
    assert priorities()[new] == pytest.approx([4.0] * len(new), rel=1e-4) and len(new) > 3
    assert priorities()[old[:1]] == pytest.approx([1.0], rel=1e-4)


def saved(buffer):
    return {name: games.copied(value) for name, value in buffer.state_dict().items()}


@pytest.mark.parametrize("before", [0, 19, 47])
@pytest.mark.parametrize("after", [0, 3, 45])
def test_a_buffer_goes_back_to_its_checkpoint(tmp_path, before, after):
    """With its priorities: what is drawn from then on is the same, whatever was written since."""
    buffer = new_buffer(tmp_path)
    saved(buffer)
    stream = Stream(buffer)
    stream.play(before)
    places = torch.tensor(sorted(stream.expected(3)), dtype=torch.int64)
    if len(places) > 0:
        buffer.set_priorities(places, 1e3 * torch.rand(len(places)))
    state, nodes = saved(buffer), buffer.tree.nodes.copy()
    drawn = []
    for _ in range(2):
        torch.manual_seed(0)
        drawn.append(buffer.sample(100, 0.4) if before > 10 else None)
        stream.play(after)
        buffer = new_buffer(tmp_path, resume=True)
        buffer.load_state_dict(state)
        stream = Stream(buffer)
        assert np.array_equal(buffer.tree.nodes, nodes)
        assert buffer.largest_priority == state["largest_priority"]
    assert before <= 10 or all(map(torch.equal, drawn[0][0], drawn[1][0]))
    assert state["priorities"].untyped_storage().nbytes() == 8 * R * N  # not of the whole tree


@pytest.mark.parametrize("n", [1, 2, 5])
def test_with_another_number_of_steps_after_a_checkpoint_nothing_false_is_drawn(tmp_path, n):
    """If it is larger, the newest rows of before have to wait; if less, some are never drawn."""
    torch.manual_seed(0)
    buffer = new_buffer(tmp_path, n_step=2)
    saved(buffer)
    stream = Stream(buffer)
    stream.play(30)
    state = saved(buffer)
    stream.buffer = buffer = new_buffer(tmp_path, n_step=n, resume=True)
    buffer.load_state_dict(state)
    for _ in range(8):
        batch, places = buffer.sample(2000, 0.4)
        drawn, expected = dict(zip(places.tolist(), keys_of(batch))), stream.expected(n)
        assert drawn.items() <= expected.items() and (n == 1 or drawn == expected)
        stream.play(1)


def test_drawing_32_transitions_and_their_priorities_takes_less_than_4_ms(tmp_path):
    torch.set_num_threads(1)
    buffer, zeros, seconds = new_buffer(tmp_path, 5000, 4), np.zeros(4, np.uint8), []
    for _ in range(5000):
        no = zeros.astype(bool)
        buffer.add(np.zeros((4, 4, 84, 84), np.uint8), zeros, zeros, no, no, zeros + 4)
    for _ in range(50):
        start = time.perf_counter()
        _, places = buffer.sample(32, 0.4)
        buffer.set_priorities(places, torch.rand(32))
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.004


# ---- Network -------------------------------------------------------------------------------------


def make_network(num_actions=4, **settings):
    class FakeEnvs:
        action_space = type("Discrete", (), {"n": num_actions})

    torch.manual_seed(0)
    args = script.Args(**{"precision": "float32"} | settings)
    return script.make_network(args, FakeEnvs)


def test_a_layer_without_noise_is_a_plain_one():
    torch.manual_seed(0)
    layer, x = script.NoisyLinear(6, 3, 0.5), torch.randn(5, 6)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
    assert layer.weight.abs().max() <= 6**-0.5 and layer.weight.unique().numel() == 18
    for sigma, shape in (layer.weight_sigma, (3, 6)), (layer.bias_sigma, (3,)):
        torch.testing.assert_close(sigma.detach(), torch.full(shape, 0.5 / 6**0.5))
    script.draw_noise(layer)
    assert not torch.allclose(layer(x), F.linear(x, layer.weight, layer.bias))
    script.remove_noise(layer)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
    assert set(layer.state_dict()) == {"weight", "bias", "weight_sigma", "bias_sigma"}


def noisy_weights(layer):
    """Those that its outputs show, and its biases."""
    eye = torch.eye(layer.in_features)
    bias = layer(torch.zeros(1, layer.in_features))
    return (layer(eye) - bias).T, bias[0]


def test_noise_is_factorised():
    """Over sigma, it is a matrix of rank one, whose factors have variance E|x|; entries of one row
    are not correlated, but their signs are: a minor of 2 x 2 is 0. That of a bias is its row's."""
    torch.manual_seed(0)
    layer, noises, biases = script.NoisyLinear(3, 4, 0.5), [], []
    with torch.no_grad():
        for sigma in layer.weight_sigma, layer.bias_sigma:
            sigma.uniform_(0.5, 1.5)
        for _ in range(4000):
            script.draw_noise(layer)
            weight, bias = noisy_weights(layer)
            noises.append((weight - layer.weight) / layer.weight_sigma)
            biases.append((bias - layer.bias) / layer.bias_sigma)
    noises, biases = torch.stack(noises), torch.stack(biases)
    minors = noises[:, :-1, :-1] * noises[:, 1:, 1:] - noises[:, 1:, :-1] * noises[:, :-1, 1:]
    torch.testing.assert_close(minors, torch.zeros_like(minors), rtol=0, atol=1e-4)
    factor = math.sqrt(2 / math.pi)  # E|x|, the variance of sign(x) * sqrt(|x|)
    flat = noises.flatten(1)
    expected = factor**2 * torch.eye(12)
    torch.testing.assert_close(flat.T @ flat / 4000, expected, rtol=0, atol=0.06)
    torch.testing.assert_close(flat.mean(0), torch.zeros(12), rtol=0, atol=0.06)
    torch.testing.assert_close(biases.T @ biases / 4000, factor * torch.eye(4), rtol=0, atol=0.06)
    ratios = noises / biases[:, :, None]  # the factors of the inputs: the same in all rows
    torch.testing.assert_close(ratios, ratios[:, :1].expand_as(ratios), rtol=0.05, atol=1e-3)
    kurtosis = (biases**4).mean() / (biases**2).mean() ** 2
    assert kurtosis == pytest.approx(1 / factor**2, rel=0.05)  # E x^2 / (E|x|)^2


def test_gradients_of_a_noisy_layer_are_those_of_its_weights():
    torch.manual_seed(0)
    layer, x, y = script.NoisyLinear(5, 3, 0.5), torch.randn(4, 5), torch.randn(4, 3)
    script.draw_noise(layer)
    weight = layer.weight + layer.weight_sigma * layer.output_noise[:, None] * layer.input_noise
    bias = layer.bias + layer.bias_sigma * layer.output_noise
    expected = torch.autograd.grad((F.linear(x, weight, bias) * y).sum(), list(layer.parameters()))
    found = torch.autograd.grad((layer(x) * y).sum(), list(layer.parameters()))
    for ours, theirs in zip(found, expected):
        torch.testing.assert_close(ours, theirs)


def test_adding_to_all_advantages_changes_nothing():
    """And the mean over the actions is the value."""
    torch.manual_seed(0)
    values, advantages = torch.randn(5, 7).double(), torch.randn(5, 3, 7).double()
    found = script.dueling(values, advantages)
    for i, k, m in itertools.product(range(5), range(3), range(7)):
        mean = sum(advantages[i, :, m].tolist()) / 3
        assert found[i, k, m] == pytest.approx((values[i, m] + advantages[i, k, m] - mean).item())
    torch.testing.assert_close(script.dueling(values, advantages + torch.randn(5, 1, 7)), found)
    torch.testing.assert_close(found.mean(1), values)


@pytest.mark.parametrize("network, size", [("dqn", 4), ("small", 1)])
def test_pixels_are_normalised_in_blocks(network, size):
    """The statistics and what the network sees are of the same pixels."""
    obs = dqn.random_batch(20).obs
    obs[:, :, :20] //= 3
    found, side = script.blocks(obs, size), 84 // size
    assert found.shape == (20, side, side, 4, size**2) and found.dtype == torch.uint8
    for y, x in itertools.product(range(84), repeat=2):
        part = found[:, y // size, x // size, :, y % size * size + x % size]
        assert torch.equal(part, obs[:, :, y, x])
    net = make_network(3, network=network, norm_obs=True)
    torch.testing.assert_close(make_network(3, network=network).normalize(obs).max().item(), 1.0)
    net.obs_statistics.update(script.newest_frames(obs, size))
    mean, deviation = obs[:, -1].float().mean(0), obs[:, -1].float().std(0, correction=0)
    pixels = F.pixel_shuffle(net.normalize(obs), size)
    torch.testing.assert_close(pixels, (obs - mean) / deviation, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("dueling", [True, False])
@pytest.mark.parametrize("distributional", [True, False])
@pytest.mark.parametrize("noisy", [True, False])
@pytest.mark.parametrize("network, kernels, features, hidden", [
    ("dqn", [(32, 64, 2, 2), (64, 32, 4, 4), (64, 64, 3, 3)], 3136, 512),
    ("small", [(32, 4, 5, 5), (64, 32, 5, 5)], 576, 256),
])  # fmt: skip
def test_networks(dueling, distributional, noisy, network, kernels, features, hidden):
    """Their shapes, and what they compute from their weights, noise included."""
    settings = {"dueling": dueling, "distributional": distributional, "noisy": noisy}
    net, outputs = make_network(3, **settings, network=network), 51 if distributional else 1
    script.draw_noise(net)
    convolutions = [layer for layer in net.features if isinstance(layer, nn.Conv2d)]
    assert [tuple(layer.weight.shape) for layer in convolutions] == kernels
    sizes = [3 * outputs, outputs][: 1 + dueling]
    assert [(layer.in_features, layer.out_features) for layer in net.hidden] == [
        (features, hidden)
    ] * len(sizes)
    assert [(layer.in_features, layer.out_features) for layer in net.heads] == [
        (hidden, size) for size in sizes
    ]
    layers = [*net.hidden, *net.heads]
    assert all(type(x) is (script.NoisyLinear if noisy else nn.Linear) for x in layers)
    obs = dqn.random_batch().obs
    x, strides = obs / 255, (4, 2, 1) if network == "dqn" else (5, 5)
    for layer, stride in zip(convolutions, strides):
        weight = F.pixel_shuffle(layer.weight, 4) if stride == 4 else layer.weight
        x = F.conv2d(x, weight, layer.bias, stride).relu()
    x = x.flatten(1)

    def stream(i):
        return net.heads[i](net.hidden[i](x).relu())

    expected = stream(0).reshape(8, 3, outputs)
    if dueling:
        expected = expected - expected.mean(1, keepdim=True) + stream(1)[:, None]
    torch.testing.assert_close(net.logits(obs), expected, rtol=1e-3, atol=1e-4)
    if distributional:
        atoms = torch.linspace(-10, 10, 51)
        expected = Categorical(logits=expected).probs @ atoms
        assert "atoms" not in net.state_dict()  # else a resumed run could not have others
    torch.testing.assert_close(net(obs), expected.reshape(8, 3), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("noisy", [True, False])
def test_bfloat16_is_for_convolutions_and_noisy_hidden_layers(noisy):
    """Whose weights are made anew in each call, so that to round them, too, costs little."""
    net = make_network(precision="bfloat16", noisy=noisy)
    layers = dqn.float32_layers(net, dqn.random_batch().obs)
    assert layers == ([] if noisy else [*net.hidden]) + [*net.heads]


def test_bfloat16_is_float32_within_its_rounding():
    """And the last layers are not rounded: they tell actions apart that differ by a thousandth."""
    exact, rounded, obs = make_network(), make_network(precision="bfloat16"), dqn.random_batch().obs
    assert rounded(obs).dtype == torch.float32
    torch.testing.assert_close(rounded.logits(obs), exact.logits(obs), rtol=0.05, atol=0.05)
    assert not torch.equal(rounded(obs), exact(obs))
    net = make_network(precision="bfloat16", distributional=False, dueling=False)
    biases = torch.tensor([2.0, 2.001, 2.002, 2.003])
    with torch.no_grad():
        net.heads[0].weight.zero_()
        net.heads[0].bias.copy_(biases)
    torch.testing.assert_close(net(obs)[0], biases)


# ---- Losses --------------------------------------------------------------------------------------


class Table(nn.Module):
    """Logits (S, K, M) of states and actions, or Q (S, K, 1). An observation is a state."""

    def __init__(self, table, atoms=None):
        super().__init__()
        self.table, self.atoms = nn.Parameter(torch.as_tensor(table).double().clone()), atoms

    def logits(self, obs):
        return self.table[obs]

    def forward(self, obs):
        probs = self.table[obs].softmax(2)
        return self.table[obs].squeeze(2) if self.atoms is None else probs @ self.atoms


class C51Table(Table):
    def forward(self, obs):
        return self.table[obs]


def random_batch(states, actions, size=40, **changes):
    torch.manual_seed(1)
    lengths = torch.randint(1, 4, (size,))
    batch = script.Batch(
        torch.randint(states, (size,)), torch.randint(actions, (size,)),
        torch.randn(size).double(), torch.randint(states, (size,)), torch.rand(size) < 0.3,
        0.9**lengths.double(), torch.ones(size).double(),
    )  # fmt: skip
    return batch._replace(**changes)


ATOMS = torch.tensor([-1.0, 0, 1, 2, 3]).double()


@pytest.mark.parametrize("double_q", [True, False])
def test_the_loss_is_the_divergence_from_the_projected_target(double_q):
    """By the C51 paper's loop, row by row with its own discount, and torch.distributions."""
    torch.manual_seed(0)
    q, target = (Table(2 * torch.randn(6, 3, 5), ATOMS) for _ in range(2))
    batch, args = random_batch(6, 3), script.Args(double_q=double_q)
    (losses, errors, values), expected = script.distribution_losses(q, target, batch, args), []
    for s, a, reward, after, end, discount, _ in zip(*(part.tolist() for part in batch)):
        chooser = (q if double_q else target).table[after].softmax(1) @ ATOMS
        probs = target.table[after, chooser.argmax()].softmax(0).detach()
        step = probs[None], -1, 3, torch.tensor([reward]), torch.tensor([end]), discount
        (m,) = c51.by_the_papers_loop(*step)
        expected.append(kl_divergence(Categorical(probs=m), Categorical(logits=q.table[s, a])))
    torch.testing.assert_close(losses, torch.stack(expected), rtol=1e-4, atol=1e-6)
    assert torch.equal(errors, losses.detach().abs()) and not errors.requires_grad
    q_values = [(q.table[s, a].softmax(0) @ ATOMS).item() for s, a in zip(batch.obs, batch.actions)]
    assert values.tolist() == pytest.approx(q_values)


def test_with_nothing_but_distributions_the_gradient_is_that_of_c51():
    torch.manual_seed(0)
    tables = [2 * torch.randn(6, 3, 5), 2 * torch.randn(6, 3, 5)]
    batch = random_batch(6, 3, discounts=torch.full((40,), 0.9).double())
    ours = [Table(table, ATOMS) for table in tables]
    theirs = [C51Table(table, ATOMS) for table in tables]
    args = script.Args(**OFF | {"distributional": True, "max_grad_norm": 0.0})
    script.compute_gradient(*ours, batch, args)
    c51_batch = c51_cartpole.Batch(*batch[:5])
    c51_cartpole.compute_gradient(*theirs, c51_batch, c51_cartpole.Args(gamma=0.9))
    torch.testing.assert_close(ours[0].table.grad, theirs[0].table.grad)
    assert ours[1].table.grad is None


@pytest.mark.parametrize("double_q", [True, False])
@pytest.mark.parametrize("loss", ["huber", "squared"])
def test_all_off_it_has_the_loss_and_the_gradient_of_dqn_atari(double_q, loss):
    """On the same batch with the same weights, to the last bit."""
    batch, settings = dqn.random_batch(), {"double_q": double_q, "loss": loss, "max_grad_norm": 1.0}
    args = script.Args(**OFF | settings)
    theirs = [dqn.make_network() for _ in range(2)]
    ours = [make_network(**OFF) for _ in range(2)]
    with torch.no_grad():
        for our, their in zip(ours, theirs):
            for x, y in zip(our.parameters(), their.parameters(), strict=True):
                assert torch.equal(x, y)  # they begin with the same weights
        for network in (theirs[1], ours[1]):
            list(network.parameters())[-1].copy_(torch.tensor([3.0, -1, 2, 0]))
    ends = torch.full((8,), 0.99), torch.ones(8)
    metrics, errors = script.compute_gradient(*ours, script.Batch(*batch, *ends), args)
    dqn_args = dqn_atari.Args(gamma=0.99, **settings)
    expected = dqn_atari.compute_gradient(*theirs, batch, dqn_args)
    assert metrics == expected
    for x, y in zip(ours[0].parameters(), theirs[0].parameters(), strict=True):
        assert torch.equal(x.grad, y.grad)
    (_, _, _, next_obs, terminated), (q, target) = batch, ours
    best = (q if double_q else target)(next_obs).argmax(1)
    y = batch.rewards + 0.99 * target(next_obs)[torch.arange(8), best] * ~terminated
    distance = (y - q(batch.obs)[torch.arange(8), batch.actions]).abs().detach()
    torch.testing.assert_close(errors, distance)


def test_targets_by_hand():
    """Reward 3 over two steps with gamma 1/2; the networks disagree about the next action."""
    rewards, no = torch.tensor([3.0]), torch.tensor([False])
    next_q, online_q = torch.tensor([[10.0, 4.0]]), torch.tensor([[1.0, 2.0]])
    discounts = torch.tensor([0.25])
    assert script.td_target(rewards, no, next_q, discounts) == 3 + 10 / 4
    assert script.td_target(rewards, no, next_q, discounts, online_q) == 3 + 4 / 4
    assert script.td_target(rewards, ~no, next_q, discounts, online_q) == 3


@pytest.mark.parametrize("distributional", [True, False])
def test_the_gradient_is_weighted(distributional):
    """It is the mean of weight times gradient over the rows, each by itself."""
    torch.manual_seed(0)
    shape, atoms = ((4, 2, 5), ATOMS) if distributional else ((4, 2, 1), None)
    tables = [torch.randn(shape), torch.randn(shape)]
    args = script.Args(distributional=distributional, max_grad_norm=0.0)
    batch = random_batch(4, 2, 6, weights=torch.tensor([0, 0.1, 0.2, 0.5, 0.9, 1]).double())
    expected, loss = torch.zeros(shape).double(), 0
    for b in range(6):
        networks = [Table(table, atoms) for table in tables]
        row = script.Batch(*(part[b : b + 1] for part in batch))
        row = row._replace(weights=torch.ones(1).double())
        metrics, _ = script.compute_gradient(*networks, row, args)
        expected += batch.weights[b] * networks[0].table.grad / 6
        loss += batch.weights[b] * metrics["losses/td_loss"] / 6
    networks = [Table(table, atoms) for table in tables]
    metrics, errors = script.compute_gradient(*networks, batch, args)
    torch.testing.assert_close(networks[0].table.grad, expected)
    torch.testing.assert_close(metrics["losses/td_loss"], loss)
    assert errors.shape == (6,) and (errors[0] > 0 or batch.weights[0] == 0)


def test_every_row_may_have_its_discount():
    probs, atoms, rewards, terminated = c51.case(-10, 10, 51, torch.float32)
    gammas = torch.rand(len(rewards), 1)
    found = script.project(probs, atoms, rewards, terminated, gammas)
    for k in range(0, len(rewards), 10):
        row = (probs[k : k + 1], atoms, rewards[k : k + 1], terminated[k : k + 1], gammas[k].item())
        torch.testing.assert_close(found[k : k + 1], c51_cartpole.project(*row))


@pytest.mark.parametrize("settings", [{}, {"distributional": False, "loss": "squared"}])
def test_longer_gradients_are_clipped_as_one_vector(settings):
    for limit in (0.0, 1e-3):
        network, target = make_network(**settings), make_network(**settings)
        batch = script.Batch(*dqn.random_batch(), torch.full((8,), 0.9), torch.ones(8))
        args = script.Args(max_grad_norm=limit, **settings)
        script.compute_gradient(network, target, batch, args)
        gradients = torch.cat([weights.grad.flatten() for weights in network.parameters()])
        assert gradients.norm() > 0.01 if limit == 0 else gradients.norm() < 1.01e-3


def test_every_gradient_step_has_new_noise_in_each_network(monkeypatch):
    """Drawn before the gradient is computed, in which it does not change."""
    q, target, seen = make_network(network="small"), make_network(network="small"), []
    batch = script.Batch(*dqn.random_batch(), torch.full((8,), 0.9), torch.ones(8))
    args, compute = script.Args(network="small"), script.compute_gradient

    def computing(q_network, target_network, *others):
        noises = [torch.cat(script.noise_of(net)) for net in (q_network, target_network)]
        results = compute(q_network, target_network, *others)
        for noise, net in zip(noises, (q_network, target_network)):
            assert torch.equal(noise, torch.cat(script.noise_of(net)))
        seen.extend(noises)
        return results

    monkeypatch.setattr(script, "compute_gradient", computing)
    for _ in range(2):
        script.update(q, target, torch.optim.SGD(q.parameters(), lr=0.1), batch, args)
    assert all(noise.all() for noise in seen)
    assert not any(torch.isclose(a, b).all() for a, b in itertools.combinations(seen, 2))
    assert len(script.noise_of(q)) == 8


# ---- The loop ------------------------------------------------------------------------------------


def train(tmp_path, module=script, **changes):
    """400 steps in games of the diary. Returns the run's folder."""
    few = dict(
        env_id="PixelDiary-v0", total_timesteps=400, num_envs=2, buffer_size=300,
        learning_starts=40, batch_size=4, train_frequency=4, target_network_frequency=40,
        eval_episodes=2,
        checkpoint_frequency=150, precision="float32", learning_rate=3e-3, num_threads=1,
    )  # fmt: skip
    few |= {} if module is dqn_atari else {"network": "small"}
    return games.train(module, module.Args(**few | changes, runs_dir=str(tmp_path)))


def test_all_off_a_run_is_that_of_dqn_atari(tmp_path):
    """To the last bit: actions, draws, targets, gradients, statistics, evaluation."""
    some = {"max_grad_norm": 0.1, "norm_obs": True, "buffer_size": 100, "exploration_fraction": 0.5}
    some |= {"total_timesteps": 250, "adam_epsilon": 1e-5, "tau": 0.5, "anneal_lr": True}
    theirs = train(tmp_path, dqn_atari, **some)
    ours = train(tmp_path, **OFF | some | {"network": "dqn"})
    weights = [learned(folder)["network"].values() for folder in (ours, theirs)]
    assert all(torch.equal(x, y) for x, y in zip(*weights, strict=True))
    found, expected = curves(ours), curves(theirs)
    assert found == expected and len(found["charts/episodic_return"]) > 20


def test_what_is_learned_from_is_what_was_played(tmp_path, monkeypatch):
    """Over three steps. The rewards are signs; priorities are those of the update, at once."""
    updates, given = recorded(monkeypatch, script, "update"), []
    set_priorities = script.ReplayBuffer.set_priorities

    def setting(buffer, places, errors):
        given.append(errors)
        set_priorities(buffer, places, errors)
        found = buffer.tree.nodes[buffer.tree.first + places.numpy()]
        (_, _, _, batch, _), (_, expected) = updates[-1]
        assert torch.equal(errors, expected)
        assert list(keys_of(batch)) == list(keys_of(whole(buffer, places)))
        if len(set(places.tolist())) == len(places):
            np.testing.assert_allclose(found, (expected + 1e-6).double().sqrt(), rtol=1e-6)

    def whole(buffer, places):
        with pytest.MonkeyPatch.context() as patch:
            chosen = places.numpy(), np.ones(len(places))
            patch.setattr(buffer.tree, "sample", lambda size: chosen)
            return buffer.sample(len(places), 1.0)[0]

    monkeypatch.setattr(script.ReplayBuffer, "set_priorities", setting)
    train(tmp_path)
    assert len(given) == len(updates) == 91
    after = {step.frames: step for step in Diary.steps.values()}
    drawn = {key for (_, _, _, batch, _), _ in updates for key in keys_of(batch)}
    for frames, action, total, next_frames, end, discount in drawn:
        k, steps = round(math.log(discount, 0.99)), [after[frames]]
        while len(steps) < k:
            steps.append(after[steps[-1].next_frames])
        assert steps[0].action == action and steps[-1].terminated == end
        assert total == pytest.approx(sum(0.99**j * step.reward for j, step in enumerate(steps)))
        assert next_frames == (None if end else steps[-1].next_frames)
        assert k == 3 or end or after[steps[-1].next_frames].truncated
    assert len(drawn) > 60


def test_beta_rises_to_1(tmp_path, monkeypatch):
    betas, sample = [], script.ReplayBuffer.sample

    def sampling(buffer, batch_size, beta):
        betas.append(beta)
        return sample(buffer, batch_size, beta)

    monkeypatch.setattr(script.ReplayBuffer, "sample", sampling)
    monkeypatch.setattr(script, "update", lambda *_: ({}, torch.ones(4)))
    train(tmp_path, prioritized_replay_beta=0.2, num_envs=3, train_frequency=1)
    expected = [0.2 + 0.8 * step / 400 for step in range(40, 401)]
    assert betas == pytest.approx([*expected, 1.0, 1.0])  # the last round is whole


def test_noise_explores_but_not_in_the_evaluation(tmp_path, monkeypatch):
    """New noise at every step. Until learning starts actions are random: noise alone, of a network
    that has learned nothing, left out one of Breakout's four in 1,200 steps."""
    choices, act = [], script.act

    def acting(q_network, obs, epsilon):
        noise = tuple(torch.cat(script.noise_of(q_network)).tolist())
        choices.append((noise, epsilon, act(q_network, obs, epsilon)))
        return choices[-1][-1]

    monkeypatch.setattr(script, "act", acting)
    train(tmp_path, learning_starts=300, eval_epsilon=0.3)
    noises, epsilons, actions = zip(*choices)
    assert set(epsilons[:150]) == {1.0} and set(epsilons[150:200]) == {0.0}
    assert len(set(noises[:200])) == 200
    assert np.bincount(np.concatenate(actions[:150]), minlength=3).min() > 70
    assert set(epsilons[200:]) == {0.3} and not np.any(noises[200:]) and len(noises) > 205


def test_without_noise_epsilon_explores(tmp_path, monkeypatch):
    choices = recorded(monkeypatch, script, "act")
    train(tmp_path, noisy=False, exploration_fraction=0.5, start_e=0.9, end_e=0.1)
    epsilons = [epsilon for (_, _, epsilon), _ in choices]
    assert epsilons[0] == 0.9 and epsilons[50] == pytest.approx(0.5) and epsilons[100] == 0.1


def test_evaluation_and_saved_weights_have_no_noise(tmp_path):
    """A network from a checkpoint plays as the one that was trained, without noise."""
    folder = train(tmp_path, total_timesteps=200)
    _, _, network = script.load_network(folder)
    assert not any(noise.any() for noise in script.noise_of(network))
    assert not any("noise" in name for name in learned(folder)["network"])


ALL = {
    "seed": 2, "total_timesteps": 204, "num_envs": 3, "learning_rate": 1e-3, "adam_epsilon": 1e-8,
    "anneal_lr": True, "buffer_size": 100, "gamma": 0.5, "n_step": 2, "num_atoms": 21,
    "v_min": -9.0, "v_max": 9.0, "tau": 0.5, "target_network_frequency": 80, "batch_size": 5,
    "learning_starts": 60, "train_frequency": 8, "double_q": False, "dueling": False,
    "prioritized": False, "prioritized_replay_alpha": 0.9, "prioritized_replay_beta": 0.9,
    "distributional": False, "noisy": False, "noise_scale": 0.1, "network": "dqn",
    "max_grad_norm": 0.01, "norm_obs": True, "precision": "bfloat16",
}  # fmt: skip
SHORT = {"total_timesteps": 200, "train_frequency": 20}
EPSILON = {"start_e": 0.5, "end_e": 0.5, "exploration_fraction": 1.0}
EVALUATION = {"sticky_actions": 0.0, "eval_epsilon": 0.5}


@pytest.mark.slow
def test_every_setting_of_the_algorithm_changes_the_outcome(tmp_path):
    """Each of the six by itself among them. But for those of DQN alone."""
    check_settings(
        script, lambda **changes: train(tmp_path, **SHORT | changes), ALL,
        others=EPSILON | EVALUATION | {"loss": "squared"},
    )  # fmt: skip


@pytest.mark.slow
def test_with_all_off_every_setting_of_dqn_changes_the_outcome(tmp_path):
    """Each of the six as well, if it is switched on. But for those of what is off."""
    idle = ("num_atoms", "v_min", "v_max", "prioritized_replay_alpha", "prioritized_replay_beta",
            "noise_scale")  # fmt: skip
    on = dict.fromkeys([name for name in OFF if name != "n_step"], True)
    changes = {name: value for name, value in ALL.items() if name not in idle}
    check_settings(
        script, lambda **changes: train(tmp_path, **OFF | {"total_timesteps": 200} | changes),
        changes | EPSILON | on | {"loss": "squared"},
        others=EVALUATION | {name: ALL[name] for name in idle},
    )  # fmt: skip


@pytest.mark.parametrize("switch", OFF)
def test_every_switch_has_an_effect(tmp_path, switch):
    few = {"total_timesteps": 240, "target_network_frequency": 120}
    networks = [learned(train(tmp_path, **few | changes))["network"] for changes in (
        {}, {switch: OFF[switch]})]  # fmt: skip
    assert not same(*networks)
