"""The replay buffer of dqn_atari.py, its network and updates, and its loop.

Its environments and its evaluation are tested in test_games.py.
"""

import itertools
import time
from types import SimpleNamespace

import dqn_atari as script
import games
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import curves, learned, same
from games import Diary, check_settings, number, numbers, picture, recorded
from torch import nn

# The description for the common tests: README.md explains it.
TINY = (
    "--total-timesteps 800 --num-envs 2 --buffer-size 300 --learning-starts 100 --batch-size 4 "
    "--train-frequency 20 --target-network-frequency 100 --exploration-fraction 0.5 --norm-obs "
    "--checkpoint-frequency 150 --eval-frequency 450 --eval-episodes 1 --eval-epsilon 0.5 "
    "--num-threads 1 --precision float32"
)
OWN = "pixels"
OWN_FLAGS = (
    "--total-timesteps 2000 --learning-starts 200 --buffer-size 2000 --learning-rate 1e-3 "
    "--batch-size 8 --exploration-fraction 0.5 --target-network-frequency 100 --gamma 0.5 "
    "--eval-epsilon 0 --num-threads 1"
)
WRONG_SPACES = ["CartPole-v1", "Pendulum-v1"]
DIVERGES = "--learning-rate 1e30"
BAD = [
    ("--learning-starts 63", "--learning-starts"),
    ("--buffer-size 1000", "--buffer-size"),
    ("--total-timesteps 1000", "--total-timesteps"),
    ("--loss cubed", "--loss"),
    ("--tau 1.5", "--tau"),
]
CATCH = (
    "--env-id cases:Catch-v0 --total-timesteps 8000 --buffer-size 8000 --learning-starts 500 "
    "--learning-rate 5e-4 --exploration-fraction 0.5 --target-network-frequency 400 "
    "--batch-size 16 --eval-episodes 100 --eval-epsilon 0 --num-threads 1"
)
LEARNS = [  # from pixels; chance: -0.5
    (f"{CATCH} --double-q --loss squared --tau 0.5 --norm-obs", 0.9)
]
# What others published, by the record's name after `<script>__`: shown beside our results.
PUBLISHED = {
    "ALE-Pong-v5": "CleanRL 20.3, Zoo 20.6 (10M)",
    "ALE-Breakout-v5": "Dopamine 18.9 with Adam, 6.7 with RMSProp (1M, sticky actions)",
}
# How speed.py measures the script, and beside what; its first lines explain the form.
SPEED = {
    "steps": 5_000,
    "first": 1_500,  # all programs learn from step 1,000 on, and rarely act at random
    "peers": {
        "CleanRL's dqn_atari.py": {
            "flags": "--learning-starts 1000 --buffer-size 20000 --start-e 0.01",
            "equal": "one game, float32",
        },
        "Stable-Baselines3's DQN": {
            "env_id": "BreakoutNoFrameskip-v4",
            "num_envs": 1,
            "settings": {
                "buffer_size": 20_000,
                "learning_starts": 1_000,
                "batch_size": 32,
                "train_freq": 4,
                "gradient_steps": 1,
                "target_update_interval": 1_000,
                "learning_rate": 1e-4,
                "exploration_initial_eps": 0.01,
                "exploration_final_eps": 0.01,
            },
            "equal": "one game, float32",
        },
    },
    "flags": "--learning-starts 1000 --buffer-size 20000 --start-e 0.01 --adam-epsilon 1e-8 "
    "--loss squared",
    "variants": {
        "eight games, bfloat16": "--precision bfloat16",
        "eight games, float32": "--precision float32",
        "one game, bfloat16": "--precision bfloat16 --num-envs 1",
        "one game, float32": "--precision float32 --num-envs 1",
    },
    "floors": {
        "floor, bfloat16": "1200 1600 --precision bfloat16",
        "floor, float32": "1200 1600 --precision float32",
    },
}

# ---- The replay buffer ---------------------------------------------------------------------------

R, N = 20, 3  # rows, games


def new_buffer(folder, num_rows=R, num_envs=N, resume=False):
    buffer = script.ReplayBuffer(num_rows, num_envs)
    buffer.open(folder, resume)
    return buffer


class Stream:
    """Plays games of the diary into a buffer as the training does. The last one is a long one."""

    def __init__(self, buffer):
        self.buffer, self.rows = buffer, []
        self.envs = [Diary(length=300 if i == N - 1 else None) for i in range(buffer.num_envs)]
        for i, env in enumerate(self.envs):
            env.reset(seed=1000 * i)

    def play(self, rows):
        for _ in range(rows):
            obs = np.stack([env.frames for env in self.envs])
            ages, actions = np.array([env.t for env in self.envs]), obs[:, -1, 0, 0] % 3
            outcomes = [env.step(action)[1:4] for env, action in zip(self.envs, actions)]
            self.buffer.add(obs, actions, *map(np.array, zip(*outcomes)), ages)
            self.rows.append([key_of(Diary.steps[number(frames[-1])]) for frames in obs])
            for env, (_, *ended) in zip(self.envs, outcomes):
                if any(ended):
                    env.reset()


def key_of(step):
    """A step as it can be drawn, or None. There is no next observation after the end."""
    next_frames = None if step.terminated else step.next_frames
    return None if step.truncated else (*step[:3], next_frames, step.terminated)


def keys_of(batch):
    for obs, action, reward, next_obs, terminated in zip(*batch):
        next_frames = None if terminated else numbers(next_obs)
        yield numbers(obs), int(action), float(reward), next_frames, bool(terminated)


@pytest.mark.parametrize("rows", [8, 19, 20, 21, 50, 265, 310])
def test_exactly_what_was_played_is_drawn(tmp_path, rows):
    """Before the buffer is full, and after: no frame from before a game, the true next observation,
    no truncated step. The three oldest rows, which may lack frames, and the newest are left out.
    """
    torch.manual_seed(rows)
    buffer = new_buffer(tmp_path)
    stream = Stream(buffer)
    stream.play(rows)
    expected = sum(stream.rows[max(0, rows - R) + 3 : rows - 1], [])
    drawn = set(keys_of(buffer.sample(5000)))
    assert drawn == set(expected) - {None} and (rows < 50 or None in expected)


def test_every_transition_is_drawn_as_often_as_any_other(tmp_path):
    """Chi-square of 12,800 draws. Its deviation is the root of twice its degrees of freedom."""
    torch.manual_seed(0)
    buffer, counts = new_buffer(tmp_path), {}
    Stream(buffer).play(50)
    for key in keys_of(buffer.sample(12_800)):
        counts[key] = counts.get(key, 0) + 1
    counts, degrees = np.array(list(counts.values())), len(counts) - 1
    chi_square = ((counts - counts.mean()) ** 2).sum() / counts.mean()
    assert abs(chi_square - degrees) < 4 * np.sqrt(2 * degrees)


def saved(buffer):
    """A checkpoint, as on disk: what happens to the buffer later does not change it."""
    return {name: games.copied(value) for name, value in buffer.state_dict().items()}


@pytest.mark.parametrize("before", [0, 3, 19, 20, 47])
@pytest.mark.parametrize("after", [0, 1, 7, 20, 45])
@pytest.mark.parametrize("num_envs", [1, N])
def test_a_buffer_goes_back_to_its_checkpoint(tmp_path, before, after, num_envs):
    """Whatever was written after it, be it more than the buffer holds, or half a row at a kill; and
    again if it is killed once more before the next checkpoint."""
    buffer = new_buffer(tmp_path, num_envs=num_envs)
    saved(buffer)
    Stream(buffer).play(before)
    state, frames, rows = saved(buffer), buffer.file.copy(), min(before, R)
    for _ in range(3):
        Stream(buffer).play(after)
        path = tmp_path / f"replay.journal-{before}"
        overwritten = max(before + min(after, R) - max(before, R), 0)
        assert (
            path.stat().st_size == overwritten * num_envs * 84 * 84
        )  # a kill leaves what is on disk
        with open(path, "ab") as file:
            file.write(b"half a row")
        buffer = new_buffer(tmp_path, num_envs=num_envs, resume=True)
        buffer.load_state_dict(state)
        assert buffer.rows_written == before and np.array_equal(buffer.file[:rows], frames[:rows])
        assert all(torch.equal(getattr(buffer, name), state[name]) for name in buffer.COLUMNS)


def test_the_older_checkpoint_fits_if_the_newer_one_was_not_written(tmp_path):
    """Killed between the buffer's part of a checkpoint and the checkpoint itself. Then all goes on,
    and older journals are deleted."""
    buffer = new_buffer(tmp_path)
    stream = Stream(buffer)
    stream.play(30)
    state, frames = saved(buffer), buffer.file.copy()
    stream.play(5)
    saved(buffer)  # and now it is killed
    buffer = new_buffer(tmp_path, resume=True)
    buffer.load_state_dict(state)
    assert np.array_equal(buffer.file, frames)
    for rows in 2, 4:
        Stream(buffer).play(rows)
        saved(buffer)
    left = {path.name for path in tmp_path.glob("*.journal-*")}
    assert left == {"replay.journal-32", "replay.journal-36"}


def test_nothing_can_be_drawn_if_every_step_is_truncated(tmp_path):
    buffer, obs = new_buffer(tmp_path), np.zeros((N, 4, 84, 84), np.uint8)
    for _ in range(10):
        buffer.add(obs, *np.zeros((3, N), np.uint8), np.ones(N, bool), np.zeros(N))
    with pytest.raises(ValueError, match="every step was truncated"):
        buffer.sample(4)


def test_256_actions_and_rewards_of_any_size_are_kept(tmp_path):
    torch.manual_seed(0)
    buffer, obs = new_buffer(tmp_path, num_envs=1), np.zeros((1, 4, 84, 84), np.uint8)
    for action, reward in zip(range(240, 256), [-500.0, -0.25, 0.0, 0.5] * 4):
        obs[0, -1] = picture(action)
        end, no = np.array([action % 2 == 0]), np.array([False])
        buffer.add(obs, np.array([action]), np.array([reward]), end, no, np.array([action - 240]))
    batch = buffer.sample(200)
    actions = batch.actions.tolist()
    assert actions == [number(frames[-1]) for frames in batch.obs]
    assert set(actions) == set(range(243, 255))  # neither the newest nor the three oldest
    assert batch.rewards.tolist() == [(-1.0, -1.0, 0.0, 1.0)[action % 4] for action in actions]
    assert batch.terminated.tolist() == [action % 2 == 0 for action in actions]


def test_a_frame_is_stored_once(tmp_path):
    """A million transitions take at most 7.2 GB, on a disk that is taken before the training."""
    buffer = new_buffer(tmp_path, 1000, 2)
    file = (tmp_path / "replay.frames").stat()
    columns = sum(getattr(buffer, name).nbytes for name in buffer.COLUMNS)
    assert file.st_size == 2000 * 84 * 84 <= file.st_blocks * 512
    assert (file.st_size + columns) / 2000 <= 7200


def test_files_that_are_missing_or_of_another_size_are_named(tmp_path):
    buffer = new_buffer(tmp_path)
    state = saved(buffer)
    for other in ({"num_rows": 21}, {"num_envs": 2}):
        with pytest.raises(ValueError, match="replay.frames .*--buffer-size or --num-envs"):
            new_buffer(tmp_path, **other, resume=True)
    (tmp_path / "replay.journal-0").unlink()
    with pytest.raises(OSError, match="replay.journal-0"):
        buffer.load_state_dict(state)
    (tmp_path / "replay.frames").unlink()
    with pytest.raises(ValueError, match="replay.frames is missing"):
        new_buffer(tmp_path, resume=True)


def test_a_full_disk_loses_no_row(tmp_path, monkeypatch):
    """The row that was to be overwritten is still there if the journal has no room for it."""
    buffer = new_buffer(tmp_path)
    stream = Stream(buffer)
    stream.play(R)
    saved(buffer)
    buffer.close()
    buffer.journal = type("Full", (), {"write": lambda self, row: row.nbytes // 2})()
    before = buffer.file.copy()
    with pytest.raises(ValueError, match="cannot write"):
        stream.play(1)
    assert np.array_equal(buffer.file, before) and buffer.rows_written == R

    def no_room(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(script.os, "posix_fallocate", no_room)
    with pytest.raises(ValueError, match="No space left"):
        new_buffer(tmp_path)
    usage = type("Usage", (), {"free": R * N * 84 * 84 - 1})
    monkeypatch.setattr(script.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ValueError, match="--buffer-size needs 0.0 GB of disk"):
        new_buffer(tmp_path)


def test_drawing_32_transitions_takes_less_than_2_ms(tmp_path):
    torch.set_num_threads(1)
    buffer, zeros, seconds = new_buffer(tmp_path, 5000, 4), np.zeros(4, np.uint8), []
    for _ in range(5000):
        buffer.add(np.zeros((4, 4, 84, 84), np.uint8), zeros, zeros, zeros, zeros, zeros + 4)
    for _ in range(50):
        start = time.perf_counter()
        buffer.sample(32)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.002


def test_learning_starts_when_a_transition_can_be_drawn():
    """After 8 rows, of which 4 may be drawn; at least one of them is not truncated."""
    script.Args(num_envs=8, learning_starts=64), script.Args(batch_size=90, learning_starts=90)
    script.Args(learning_starts=100, total_timesteps=101, buffer_size=100)
    for settings in (
        {"num_envs": 8, "learning_starts": 63}, {"batch_size": 91, "learning_starts": 90},
        {"learning_starts": 100, "total_timesteps": 100},
        {"learning_starts": 100, "buffer_size": 99},
    ):  # fmt: skip
        with pytest.raises(ValueError, match="--learning-starts"):
            script.Args(**settings)


# ---- The network ---------------------------------------------------------------------------------


def random_batch(size=8):
    generator = torch.Generator().manual_seed(1)
    frames = torch.randint(0, 256, (size, 5, 84, 84), dtype=torch.uint8, generator=generator)
    actions = torch.randint(0, 4, (size,), generator=generator)
    rewards, ends = torch.ones(size), torch.arange(size) % 3 == 0
    return script.Batch(frames[:, :-1], actions, rewards, frames[:, 1:], ends)


def make_network(num_actions=4, bfloat16=False, norm_obs=False):
    torch.manual_seed(0)
    return script.QNetwork(num_actions, bfloat16, norm_obs)


def test_blocks_are_squares_of_pixels():
    frames = random_batch(3).obs[:, 1:]  # not contiguous
    found = script.blocks(frames)
    assert found.shape == (3, 21, 21, 3, 16) and found.dtype == torch.uint8
    for y, x in itertools.product(range(84), repeat=2):
        assert torch.equal(found[:, y // 4, x // 4, :, y % 4 * 4 + x % 4], frames[:, :, y, x])


def test_the_network_is_that_of_the_paper():
    network, obs = make_network(18), random_batch().obs
    x, weights = obs / 255, list(network.parameters())
    weights[0] = F.pixel_shuffle(weights[0], 4)  # of blocks -> of pixels
    shapes = [(32, 4, 8, 8), (64, 32, 4, 4), (64, 64, 3, 3), (512, 3136), (18, 512)]
    assert [tuple(weight.shape) for weight in weights[::2]] == shapes
    assert all(bias.shape == weight.shape[:1] for weight, bias in zip(weights[::2], weights[1::2]))
    for i, stride in enumerate((4, 2, 1)):
        x = F.conv2d(x, weights[2 * i], weights[2 * i + 1], stride).relu()
    x = F.linear(x.flatten(1), weights[6], weights[7]).relu()
    expected = F.linear(x, weights[8], weights[9])
    torch.testing.assert_close(network(obs), expected, rtol=1e-4, atol=1e-5)


def test_what_the_network_sees_reaches_its_last_layer():
    """A ball, a few of 7056 pixels, is most of what frames differ in. With PyTorch's own first
    weights so little of it arrives that in Pong all units died before they learned anything."""
    obs = torch.full((50, 4, 84, 84), 87, dtype=torch.uint8)
    for i in range(50):
        obs[i, :, 20 + i : 22 + i, 30 + i // 2] = 236
    network = make_network()

    def spread():
        return network.hidden(network.features(network.normalize(obs))).relu().std(0).mean()

    ours = spread()
    for layer in [*network.features, network.hidden]:
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()
    assert ours > 10 * spread()


def test_bfloat16_is_float32_within_its_rounding():
    exact, rounded, obs = make_network(), make_network(bfloat16=True), random_batch().obs
    assert rounded(obs).dtype == torch.float32
    torch.testing.assert_close(rounded(obs), exact(obs), rtol=0.05, atol=0.01)
    assert not torch.equal(rounded(obs), exact(obs))


def float32_layers(network, obs):
    """The linear layers that get and give float32."""
    found = []

    def look(layer, inputs, outputs):
        if inputs[0].dtype == outputs.dtype == torch.float32:
            found.append(layer)

    for layer in network.modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_hook(look)
    network(obs)
    return found


def test_bfloat16_is_for_convolutions_only():
    network = make_network(bfloat16=True)
    assert float32_layers(network, random_batch().obs) == [network.hidden, network.head]


@pytest.mark.parametrize("supported", [True, False, None])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_automatic_precision(supported, device, monkeypatch):
    """None: a PyTorch that cannot tell."""
    name = "_is_avx512_bf16_supported"
    if supported is None:
        monkeypatch.delattr(torch.cpu, name, raising=False)
    else:
        monkeypatch.setattr(torch.cpu, name, lambda: supported, raising=False)
    found = {
        precision: script.use_bfloat16(SimpleNamespace(precision=precision, device=device))
        for precision in ("float32", "bfloat16", "auto")
    }
    automatic = supported is True and device == "cpu"
    assert found == {"float32": False, "bfloat16": True, "auto": automatic}


def test_bfloat16_tells_actions_apart_that_differ_by_a_thousandth():
    """Around 2, bfloat16 has steps of 1/64. For a long time, Pong's actions differ by less."""
    network, biases = make_network(bfloat16=True), torch.tensor([2.0, 2.001, 2.002, 2.003])
    with torch.no_grad():
        network.head.weight.zero_()
        network.head.bias.copy_(biases)
    torch.testing.assert_close(network(random_batch().obs)[0], biases)


@pytest.mark.parametrize("bfloat16", [False, True])
def test_normalised_pixels_are_deviations_from_their_mean(bfloat16):
    """Pixel by pixel. One that never changes is 0; a rare change is clipped at 10 deviations."""
    network, obs, seen = make_network(4, bfloat16, norm_obs=True), random_batch(64).obs, []
    obs[:, :, :20] = 87
    network.obs_statistics.update(script.newest_frames(obs))
    mean, deviation = obs[:, -1].float().mean(0), obs[:, -1].float().std(0, correction=0)
    obs[0, :, 0, 0] = 88
    network.features[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].float()))
    network(obs)
    expected = ((obs - mean) / (deviation + 1e-4)).clamp(-10, 10)
    error = {"atol": 0.05, "rtol": 0.02} if bfloat16 else {"atol": 1e-3, "rtol": 1e-3}
    pixels = F.pixel_shuffle(seen[0], 4)
    torch.testing.assert_close(pixels, expected, **error)
    assert (pixels[0, :, 0, 0] == 10).all() and not pixels[1, :, :20].any()


def test_running_statistics_are_those_of_all_rows():
    rows = torch.randn(100, 5, generator=torch.Generator().manual_seed(0)) * 3 + 7
    statistics = script.RunningStatistics(5)
    for part in rows.tensor_split([1, 2, 40]):
        statistics.update(part)
    assert statistics.count == 100
    torch.testing.assert_close(statistics.mean, rows.mean(0))
    torch.testing.assert_close(statistics.variance, rows.var(0, correction=0))


# ---- Actions and updates -------------------------------------------------------------------------


def test_epsilon_falls_in_a_line_and_stays():
    found = [script.linear_epsilon(step, 0.9, 0.1, 200) for step in (0, 50, 100, 200, 500)]
    assert found == pytest.approx([0.9, 0.7, 0.5, 0.1, 0.1])
    assert script.linear_epsilon(0, 1.0, 0.1, 0.0) == 0.1


class Table(nn.Module):
    """Q as a table over the number that the newest frame shows."""

    def __init__(self, values):
        super().__init__()
        self.values = nn.Parameter(torch.tensor(values, dtype=torch.float32))

    def forward(self, obs):
        return self.values[[number(frames[-1]) for frames in obs]]


def stacks(states):
    frames = [np.stack([picture(0)] * 3 + [picture(state)]) for state in states]
    return torch.from_numpy(np.stack(frames))


def test_actions_are_epsilon_greedy():
    torch.manual_seed(0)
    obs, q_network = stacks([0, 1] * 2000).numpy(), Table([[0.0, 3, 1], [5, 3, 1]])
    for epsilon in (0.0, 0.3, 1.0):
        actions = script.act(q_network, obs, epsilon).reshape(-1, 2)
        for column, best in zip(actions.T, (1, 0)):
            expected = np.full(3, epsilon / 3)
            expected[best] += 1 - epsilon
            np.testing.assert_allclose(np.bincount(column, minlength=3) / 2000, expected, atol=0.04)


def test_updates_find_the_values_of_a_small_markov_chain():
    """Three states, two actions. By brute force: repeated Bellman updates of the table itself."""
    generator = np.random.default_rng(0)
    next_states, rewards = generator.integers(0, 3, (3, 2)), generator.normal(size=(3, 2))
    ends, expected = np.array([[False, False], [True, False], [False, False]]), np.zeros((3, 2))
    for _ in range(200):
        expected = rewards + 0.8 * np.where(ends, 0, expected.max(1)[next_states])
    states, actions = np.divmod(np.arange(6), 2)
    batch = script.Batch(
        stacks(states), torch.from_numpy(actions), torch.from_numpy(rewards.flatten()).float(),
        stacks(next_states.flatten()), torch.from_numpy(ends.flatten()),
    )  # fmt: skip
    for settings in ({}, {"double_q": True, "loss": "squared"}):
        q_network, target_network = Table(np.zeros((3, 2))), Table(np.zeros((3, 2)))
        optimizer = torch.optim.SGD(q_network.parameters(), lr=1.0)
        for _ in range(600):
            args = script.Args(gamma=0.8, **settings)
            script.update(q_network, target_network, optimizer, batch, args)
            script.update_target(target_network, q_network, 0.5)
        found = q_network.values.detach()
        torch.testing.assert_close(found, torch.from_numpy(expected).float(), rtol=1e-3, atol=1e-3)


def test_losses_and_targets_by_hand():
    """State 0, action 1, reward 3, to state 1, where the networks disagree about the best action.

    y is 3 + 0.5 * 10 = 8, with double Q-learning 3 + 0.5 * 4 = 5, and 3 at an end. Q is 0.5.
    Huber's loss is the error less 1/2 beyond 1, with gradient 1; the square's gradient is twice
    the error. Gradients left over from before do not count.
    """
    for settings, end, loss, value in (
        ({}, False, 7.0, 1.5), ({"double_q": True}, False, 4.0, 1.5), ({}, True, 2.0, 1.5),
        ({"loss": "squared"}, False, 7.5**2, 15.5),
    ):  # fmt: skip
        q_network, target = Table([[0.0, 0.5], [1.0, 2.0]]), Table([[9.0, 9.0], [10.0, 4.0]])
        q_network.values.grad = torch.ones(2, 2)
        actions, rewards, ends = torch.tensor([1]), torch.tensor([3.0]), torch.tensor([end])
        batch = script.Batch(stacks([0]), actions, rewards, stacks([1]), ends)
        optimizer = torch.optim.SGD(q_network.parameters(), lr=1.0)
        args = script.Args(gamma=0.5, **settings)
        metrics = script.update(q_network, target, optimizer, batch, args)
        assert metrics == {"losses/td_loss": loss, "losses/q_values": 0.5}
        assert q_network.values.tolist() == [[0.0, value], [1.0, 2.0]]
        assert target.values.tolist() == [[9.0, 9.0], [10.0, 4.0]]


@pytest.mark.parametrize("loss, losses, gradients", [
    ("huber", [0.125, 2.5, 1.5], [0.5, 1.0, -1.0]), ("squared", [0.25, 9.0, 4.0], [1.0, 6.0, -4.0]),
])  # fmt: skip
def test_loss_and_values_are_means_over_the_batch(loss, losses, gradients):
    """Errors of 0.5, 3 and -2."""
    q_network = Table([[0.5, -1.0, 2.0]])
    rewards, ends = torch.tensor([0.0, -4.0, 4.0]), torch.tensor([True, True, True])
    batch = script.Batch(stacks([0] * 3), torch.arange(3), rewards, stacks([0] * 3), ends)
    optimizer = torch.optim.SGD(q_network.parameters(), lr=1.0)
    metrics = script.update(q_network, Table([[0.0] * 3]), optimizer, batch, script.Args(loss=loss))
    assert metrics["losses/td_loss"].item() == pytest.approx(np.mean(losses))
    assert metrics["losses/q_values"].item() == pytest.approx(0.5)
    expected = [value - gradient / 3 for value, gradient in zip([0.5, -1.0, 2.0], gradients)]
    assert q_network.values[0].tolist() == pytest.approx(expected)


@pytest.mark.parametrize("limit", [0.0, 1e9, 0.01])
def test_longer_gradients_are_clipped_as_one_vector(limit):
    """0: they are not clipped."""
    network = make_network()
    before = [weights.detach().clone() for weights in network.parameters()]
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    args = script.Args(max_grad_norm=limit)
    script.update(network, make_network(), optimizer, random_batch(), args)
    moves = [weights.detach() - old for weights, old in zip(network.parameters(), before)]
    move = torch.cat([part.flatten() for part in moves]).norm().item()
    assert move == pytest.approx(0.01, rel=1e-2) if limit == 0.01 else move > 0.1


@pytest.mark.parametrize("tau", [0.25, 1.0])
def test_the_target_network_moves_by_tau(tau):
    target, source = Table([[1.0, 2.0]]), Table([[3.0, -2.0]])
    script.update_target(target, source, tau)
    assert target.values.tolist() == [[1 + 2 * tau, 2 - 4 * tau]] and target.values.grad_fn is None
    assert source.values.tolist() == [[3.0, -2.0]]


# ---- The loop ------------------------------------------------------------------------------------


def train(tmp_path, **changes):
    """400 steps in games of the diary. Returns the run's folder."""
    few = dict(
        env_id="PixelDiary-v0", total_timesteps=400, num_envs=2, buffer_size=300,
        learning_starts=40, batch_size=4, train_frequency=4, target_network_frequency=40,
        eval_episodes=2,
        checkpoint_frequency=150, precision="float32", learning_rate=3e-3, num_threads=1,
    )  # fmt: skip
    return games.train(script, script.Args(**few | changes, runs_dir=str(tmp_path)))


def test_what_is_learned_from_is_what_was_played(tmp_path, monkeypatch):
    updates = recorded(monkeypatch, script, "update")
    train(tmp_path)
    happened = {key_of(step) for step in Diary.steps.values()}
    drawn = {key for (_, _, _, batch, _), _ in updates for key in keys_of(batch)}
    assert drawn < happened and len(drawn) > 80
    assert any(end for *_, end in drawn) and {reward for _, _, reward, _, _ in drawn} == {0, 1}
    assert any(frames[:3] == (0, 0, 0) for frames, *_ in drawn)


def test_all_that_was_played_can_be_learned_from(tmp_path, monkeypatch):
    """But for truncated steps, and the newest row and the three oldest."""
    buffers = recorded(monkeypatch, script, "ReplayBuffer")
    train(tmp_path, buffer_size=1000)
    played = list(Diary.steps.values())[2 * 3 : 400 - 2]
    ((_, buffer),) = buffers
    assert set(keys_of(buffer.sample(5000))) == {key_of(step) for step in played} - {None}


def test_what_is_learned_from_is_what_the_emulator_showed(tmp_path, monkeypatch):
    """To the pixel, over lost lives and ends of games."""
    happened, updates, recv = set(), recorded(monkeypatch, script, "update"), script.Envs.recv

    def seen(obs, action, next_obs, reward, end):
        after = None if end else next_obs.tobytes()
        return obs.tobytes(), int(action), after, float(reward), bool(end)

    def watching(envs, *which):
        obs, actions = envs.obs, envs.actions[-1]
        next_obs, rewards, terminated, truncated = recv(envs, *which)
        for row, action, *outcome in zip(obs, actions, next_obs, np.sign(rewards), terminated):
            happened.add(seen(row, action, *outcome))
        return next_obs, rewards, terminated, truncated

    monkeypatch.setattr(script.Envs, "recv", watching)
    points = curves(train(
        tmp_path, env_id="ALE/Breakout-v5", total_timesteps=1500, num_envs=3, buffer_size=900,
        train_frequency=20, batch_size=32, start_e=1.0, end_e=1.0, eval_epsilon=1.0,
        eval_episodes=1,
    ))  # fmt: skip
    drawn = set()
    for (_, _, _, batch, _), _ in updates:
        obs, actions, rewards, next_obs, terminated = (part.numpy() for part in batch)
        drawn |= set(map(seen, obs, actions, next_obs, rewards, terminated))
    assert drawn <= happened and any(end for *_, end in drawn)
    assert len(points["charts/episodic_return"]) > 2


def test_every_environment_gets_the_action_chosen_for_it(tmp_path, monkeypatch):
    """By the Q-network, not its copy; by epsilon in training, and by eval-epsilon in evaluation."""
    choices, updates = recorded(monkeypatch, script, "act"), recorded(monkeypatch, script, "update")
    train(tmp_path, exploration_fraction=0.5, start_e=0.9, end_e=0.1, eval_epsilon=0.3)
    chosen = {}
    for (_, obs, _), actions in choices:
        chosen |= {number(frames[-1]): int(action) for frames, action in zip(obs, actions)}
    trained = list(Diary.steps.items())[:400]
    assert all(chosen[shown] == step.action for shown, step in trained)
    (network,) = {id(arguments[0]) for arguments, _ in choices + updates}
    assert network not in {id(target) for (_, target, *_), _ in updates}
    epsilons = [epsilon for (_, _, epsilon), _ in choices]
    assert epsilons[0] == 0.9 and epsilons[50] == pytest.approx(0.5)
    assert epsilons[100] == epsilons[199] == 0.1 and set(epsilons[200:]) == {0.3}


def test_updates_are_adams_with_the_settings_asked_for(tmp_path, monkeypatch):
    updates = recorded(monkeypatch, script, "update")
    train(tmp_path, learning_rate=2e-3, adam_epsilon=1e-5, batch_size=5)
    for (_, _, optimizer, batch, _), _ in updates:
        (group,) = optimizer.param_groups
        assert type(optimizer) is torch.optim.Adam and [len(part) for part in batch] == [5] * 5
        found = [group[name] for name in ("lr", "eps", "betas", "weight_decay")]
        assert found == [2e-3, 1e-5, (0.9, 0.999), 0]


@pytest.mark.parametrize("num_envs, train_frequency", [(1, 4), (3, 5), (8, 4), (4, 1)])
def test_steps_between_updates_do_not_depend_on_the_number_of_environments(
    tmp_path, monkeypatch, num_envs, train_frequency
):  # fmt: skip
    """The target network is updated in between, when it is due; it starts as a copy."""
    history, steps = [], -(-120 // num_envs) * num_envs

    def update(q_network, target_network, *others):
        weights = zip(q_network.parameters(), target_network.parameters())
        assert history or all(torch.equal(ours, theirs) for ours, theirs in weights)
        history.append("update")
        return {}

    monkeypatch.setattr(script, "update", update)
    monkeypatch.setattr(script, "update_target", lambda target, q, tau: history.append(tau))
    train(tmp_path, num_envs=num_envs, train_frequency=train_frequency, total_timesteps=120,
          learning_starts=64, tau=0.25)  # fmt: skip
    expected = []
    for step in range(64, steps + 1):
        expected += ["update"] * (step % train_frequency == 0) + [0.25] * (step % 40 == 0)
    assert history == expected


def test_statistics_are_of_the_buffer_and_the_same_in_both_networks(tmp_path, monkeypatch):
    """A sample at learning-starts, 50, and before the target network's updates, at 80, 120 ..."""
    seen, update = [], script.update
    monkeypatch.setattr(script, "SAMPLE", 8)

    def updating(q_network, target_network, *others):
        shared = target_network.obs_statistics is q_network.obs_statistics
        seen.append((q_network.obs_statistics.count.item(), shared))
        return update(q_network, target_network, *others)

    monkeypatch.setattr(script, "update", updating)
    state = learned(train(tmp_path, norm_obs=True, learning_starts=50))
    assert seen == [(8.0 * (step // 40), True) for step in range(52, 401, 4)]
    ours, theirs = (
        {name: value for name, value in state[part].items() if "statistics" in name}
        for part in ("network", "target_network")
    )
    assert same(ours, theirs) and ours["obs_statistics.count"] == 8 * 10
    mean = ours["obs_statistics.mean"].view(84, 84)
    assert (mean[0, :4] > 0).all() and not mean[1:].any()  # where the diary's frames differ


@pytest.mark.parametrize("num_envs, rows", [(2, 50), (3, 34)])
def test_the_buffer_has_the_size_asked_for(tmp_path, num_envs, rows):
    """100 transitions, rounded up to whole rows."""
    folder = train(tmp_path, num_envs=num_envs, buffer_size=100)
    assert (folder / "replay.frames").stat().st_size == rows * num_envs * 84 * 84
    assert learned(folder)["buffer"]["actions"].shape == (rows, num_envs)


def test_checkpoints_are_written_when_they_are_due(tmp_path, monkeypatch):
    """Rounds have 4 steps: what is due at 150 and at 300 is done at 152 and at 300."""
    steps, save = [], script.Run.save
    monkeypatch.setattr(script.Run, "save", lambda run: steps.append(run.envs.steps) or save(run))
    train(tmp_path, num_envs=4)
    assert steps == [0, 152, 300, 400]


def test_every_game_is_logged_with_its_true_score(tmp_path):
    """At the step that ended it. Those of the evaluation come after."""
    points = curves(train(tmp_path, num_envs=4))
    returns, lengths = points["charts/episodic_return"], points["charts/episodic_length"]
    assert [(r, n) for (_, r), (_, n) in zip(returns, lengths)] == Diary.games[: len(returns)]
    assert len(returns) >= len(Diary.games) - 3 and max(r for _, r in returns) > 5
    ends = np.zeros(4)
    for (step, _), (_, length) in zip(returns, lengths):
        ends[(step - 1) % 4] += length
        assert ends[(step - 1) % 4] == (step - 1) // 4 + 1


@pytest.mark.parametrize("anneal_lr", [True, False])
def test_the_learning_rate_falls_in_a_line_or_stays(tmp_path, monkeypatch, anneal_lr):
    rates = []
    monkeypatch.setattr(script, "LOG_FREQUENCY", 100)

    def update(q_network, target_network, optimizer, *others):
        rates.append(optimizer.param_groups[0]["lr"])
        return {}

    monkeypatch.setattr(script, "update", update)
    points = curves(train(tmp_path, anneal_lr=anneal_lr))
    logged = [rate for _, rate in points["charts/learning_rate"]]
    for found, steps in (rates, range(38, 400, 4)), (logged, range(98, 300, 100)):
        assert found == pytest.approx([3e-3 * (1 - anneal_lr * step / 400) for step in steps])


@pytest.mark.slow
def test_a_run_without_its_buffer_can_be_evaluated_but_not_resumed(tmp_path):
    folder = train(tmp_path)
    (folder / "replay.frames").unlink()
    with pytest.raises(ValueError, match="replay.frames is missing"):
        train(tmp_path, resume=str(folder), total_timesteps=500)
    assert callable(script.load_policy(folder))


@pytest.mark.slow
def test_every_setting_of_the_algorithm_changes_the_outcome(tmp_path):
    """But for two, of the emulator and the evaluation."""

    def few(**changes):
        few = {"total_timesteps": 160, "exploration_fraction": 0.5, "train_frequency": 8}
        return train(tmp_path, **few | changes)

    check_settings(script, few, dict(
        seed=2, total_timesteps=168, num_envs=3, learning_rate=1e-3, adam_epsilon=1e-8,
        anneal_lr=True, buffer_size=100, gamma=0.5, tau=0.5, target_network_frequency=80,
        batch_size=5, start_e=0.5, end_e=0.5, exploration_fraction=1.0, learning_starts=60,
        train_frequency=4, double_q=True, loss="squared", max_grad_norm=0.01, norm_obs=True,
        precision="bfloat16",
    ), others={"sticky_actions": 0.0, "eval_epsilon": 0.5})  # fmt: skip
