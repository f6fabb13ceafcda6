"""The mathematics and the memory of dqn_atari.py, against brute force, hand-made streams and the emulator itself.

What it shares with dqn_cartpole.py, word for word, is tested in test_dqn_cartpole.py; see also test_in_common.py.
"""

import itertools
import re
import time

import dqn_atari as script
import gymnasium as gym
import numpy as np
import ppo_atari
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


# ---- The replay buffer, against hand-made streams -------------------------------------------------------------------


class Stream:
    """Plays scripted games into a buffer as the training loop does, and keeps every transition as it happened.

    Game g of environment n shows the frames 1, 2, 3, ... of its own. A game is (steps, losses of a life); in a row of
    NEXT_STEP, its last frame has an action that leads nowhere. Actions, rewards and ends are made up from the frame.
    """

    def __init__(self, buffer, games):
        self.buffer, self.games = buffer, games
        self.count = itertools.count(1)
        self.now = [None] * buffer.num_envs
        self.game = [0] * buffer.num_envs
        self.real = []  # rounds of lists of transitions, per row of the buffer
        for n in range(buffer.num_envs):
            self.begin(n)

    def begin(self, n):
        games = self.games[n]
        length, lives = games[self.game[n] % len(games)]
        self.game[n] += 1
        self.now[n] = dict(stack=[0, 0, 0, next(self.count)], age=0, left=length, t=0, lives=lives)

    def step(self):
        obs, ages, actions, rewards, terminated, valid, row = [], [], [], [], [], [], []
        for n in range(self.buffer.num_envs):
            env = self.now[n]
            obs.append(np.stack([picture(k) for k in env["stack"]]))
            ages.append(env["age"])
            before = tuple(env["stack"])
            action, reward = before[-1] % 5, before[-1] % 7 - 3
            if env["left"] == 0:  # the game is over: this step is ignored, and the next game begins
                self.begin(n)
                valid.append(False)
                actions.append(action), rewards.append(0), terminated.append(False)
                continue
            env["left"] -= 1
            env["t"] += 1
            env["age"] += 1
            env["stack"] = env["stack"][1:] + [next(self.count)]
            truncated = env["lives"] == "truncated"
            end = not truncated and (env["left"] == 0 or env["t"] in env["lives"])
            actions.append(action), rewards.append(reward), terminated.append(end), valid.append(True)
            row.append((before, action, float(np.sign(reward)), tuple(env["stack"]), end))
        self.buffer.add(np.stack(obs), *map(np.array, (ages, actions, rewards, terminated, valid)))
        self.real.append(row)

    def cut(self):
        """What a checkpoint does to the games."""
        rows = [self.now[n] for n in range(self.buffer.num_envs)]
        obs = np.stack([np.stack([picture(k) for k in env["stack"]]) for env in rows])
        ages = np.array([env["age"] for env in rows])
        zeros = np.zeros(len(rows), np.int64)
        self.buffer.add(obs, ages, zeros, zeros, zeros.astype(bool), zeros.astype(bool))
        self.real.append([])
        for n in range(self.buffer.num_envs):
            self.begin(n)


GAMES = [
    [(5, ()), (1, ()), (7, (2, 4)), (3, "truncated"), (2, ()), (6, (5,))],
    [(2, ()), (9, (3,)), (4, "truncated"), (1, ())],
    [(300, (7, 8, 20, 290))],  # longer than a byte counts
]


def drawn(buffer, draws=400):
    """Counts of the transitions that are drawn, in the form of Stream.real."""
    counts = {}
    for _ in range(draws):
        batch = buffer.sample(32)
        for obs, action, reward, next_obs, terminated in zip(*batch):
            key = (numbers(obs), int(action), float(reward), numbers(next_obs), bool(terminated))
            counts[key] = counts.get(key, 0) + 1
    return counts


@pytest.mark.parametrize("rounds", [6, 15, 20, 21, 50, 173, 310])
def test_exactly_the_real_transitions_are_drawn(tmp_path, rounds):
    """Before the buffer is full, when it just is, and after it has wrapped around: no stack crosses a game's start, the
    next observation is the true one, also at a truncation and a cut, and whatever is in the buffer is found. Only the
    three oldest rows are missing, whose older frames are gone once the buffer is full, and the newest, which waits for
    its successor."""
    torch.manual_seed(rounds)
    buffer = script.ReplayBuffer(tmp_path, 20, 3, create=True)
    stream = Stream(buffer, GAMES)
    for t in range(rounds):
        stream.cut() if t % 11 == 10 and rounds < 300 else stream.step()
    first = max(0, rounds - 20) + script.STACK - 1
    expected = {transition for row in stream.real[first : rounds - 1] for transition in row}
    assert set(drawn(buffer)) == expected


def test_every_transition_is_drawn_as_often_as_any_other(tmp_path):
    """The counts of 12,800 draws: chi-square, whose deviation is the square root of twice its degrees of freedom."""
    torch.manual_seed(0)
    buffer = script.ReplayBuffer(tmp_path, 20, 3, create=True)
    stream = Stream(buffer, GAMES)
    for _ in range(50):
        stream.step()
    counts = np.array(list(drawn(buffer).values()))
    degrees = len(counts) - 1
    chi_square = ((counts - counts.mean()) ** 2).sum() / counts.mean()
    assert abs(chi_square - degrees) < 4 * np.sqrt(2 * degrees)


@pytest.mark.parametrize("before", [0, 3, 19, 20, 47])
@pytest.mark.parametrize("after", [0, 1, 7, 20, 45])
def test_a_buffer_goes_back_to_its_checkpoint(tmp_path, before, after):
    """Whatever was written after the checkpoint, be it more than the buffer holds, or a row that a kill cut in half."""
    buffer = script.ReplayBuffer(tmp_path, 20, 3, create=True)
    buffer.state_dict()
    stream = Stream(buffer, GAMES)
    for _ in range(before):
        stream.step()
    state = {name: value if isinstance(value, int) else value.clone() for name, value in buffer.state_dict().items()}
    buffer.remove_old_files()
    frames, rows = buffer.file.copy(), min(before, 20)
    for _ in range(after):
        stream.step()
    path = tmp_path / f"replay.overwritten-{before}"
    assert path.stat().st_size <= buffer.file.nbytes  # without end, it would fill the disk
    with open(path, "ab") as file:
        file.write(b"half a row")
    again = script.ReplayBuffer(tmp_path, 20, 3, create=False)
    again.load_state_dict(state)
    assert again.rows_written == before
    assert np.array_equal(again.file[:rows], frames[:rows])
    for name in buffer.COLUMNS:
        assert torch.equal(getattr(again, name), state[name]), name
    assert [path.name for path in tmp_path.glob("replay.overwritten-*")] == [f"replay.overwritten-{before}"]


def test_an_old_checkpoint_still_fits_if_the_new_one_was_not_written(tmp_path):
    """Killed between the buffer's part of a checkpoint and the checkpoint itself: the older one counts."""
    buffer = script.ReplayBuffer(tmp_path, 20, 3, create=True)
    stream = Stream(buffer, GAMES)
    for _ in range(30):
        stream.step()
    state = {name: value if isinstance(value, int) else value.clone() for name, value in buffer.state_dict().items()}
    frames = buffer.file.copy()
    for _ in range(5):
        stream.step()
    buffer.state_dict()  # and then the power of the process ended
    again = script.ReplayBuffer(tmp_path, 20, 3, create=False)
    again.load_state_dict(state)
    assert np.array_equal(again.file, frames)


def test_256_actions_and_rewards_of_any_size_are_kept(tmp_path):
    torch.manual_seed(0)
    buffer, obs = script.ReplayBuffer(tmp_path, 20, 1, create=True), np.zeros((1, 4, 84, 84), np.uint8)
    for action, reward in zip(range(240, 256), [-500.0, -0.25, 0.0, 0.5] * 4):
        obs[0, -1] = picture(action)
        end, valid = np.array([action % 2 == 0]), np.array([True])
        buffer.add(obs, np.array([action - 240]), np.array([action]), np.array([reward]), end, valid)
    batch = buffer.sample(200)
    assert batch.actions.tolist() == [number(frames[-1]) for frames in batch.obs]
    assert set(batch.actions.tolist()) == set(range(243, 255))  # not the newest, nor the three oldest
    assert batch.rewards.tolist() == [(-1.0, -1.0, 0.0, 1.0)[action % 4] for action in batch.actions.tolist()]
    assert batch.terminated.tolist() == [action % 2 == 0 for action in batch.actions.tolist()]


def test_a_frame_is_stored_once(tmp_path):
    """One million transitions in at most 7.2 GB: the file, and the columns beside it."""
    buffer = script.ReplayBuffer(tmp_path, 1000, 2, create=True)
    columns = sum(getattr(buffer, name).nbytes for name in buffer.COLUMNS)
    assert (tmp_path / "replay.frames").stat().st_size == buffer.file.nbytes == 2000 * 7056
    assert (buffer.file.nbytes + columns) / 2000 * 1e6 <= 7.2e9
    blocks = (tmp_path / "replay.frames").stat().st_blocks * 512
    assert blocks >= buffer.file.nbytes  # taken from the disk before training, not when a row is first written


def test_a_lost_file_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        script.ReplayBuffer(tmp_path, 20, 3, create=False)
    assert "replay.frames" in capsys.readouterr().err


def test_a_lost_file_of_overwritten_rows_is_named(tmp_path, capsys):
    buffer = script.ReplayBuffer(tmp_path, 20, 1, create=True)
    saved = buffer.state_dict()
    (tmp_path / "replay.overwritten-0").unlink()
    with pytest.raises(SystemExit):
        buffer.load_state_dict(saved)
    assert re.search(r"replay\.overwritten-0 is missing.*evaluated", capsys.readouterr().err)


def test_a_disk_that_is_full_loses_no_row(tmp_path):
    """The row that is about to be overwritten is still there if the second file has no room for it."""
    buffer = script.ReplayBuffer(tmp_path, 20, 1, create=True)
    stream = Stream(buffer, [[(300, ())]])
    for _ in range(20):
        stream.step()
    buffer.state_dict()
    buffer.overwritten.close()
    buffer.overwritten = type("Full", (), {"write": lambda self, row: row.nbytes // 2})()
    before = buffer.file.copy()
    with pytest.raises(OSError, match="full"):
        stream.step()
    assert (buffer.file == before).all()


def test_a_reward_that_is_not_finite_is_named(tmp_path):
    buffer, one = script.ReplayBuffer(tmp_path, 20, 1, create=True), np.ones(1, dtype=bool)
    with pytest.raises(FloatingPointError, match="reward"):
        buffer.add(np.zeros((1, 4, 84, 84), np.uint8), one, one, np.array([np.nan]), one, one)


def test_drawing_32_transitions_costs_less_than_2_ms(tmp_path):
    torch.set_num_threads(1)
    buffer = script.ReplayBuffer(tmp_path, 5000, 4, create=True)
    obs, zeros = np.zeros((4, 4, 84, 84), np.uint8), np.zeros(4, np.int64)
    for _ in range(5000):
        buffer.add(obs, zeros + 4, zeros, zeros, zeros > 0, zeros == 0)
    seconds = []
    for _ in range(100):
        start = time.perf_counter()
        buffer.sample(32)
        seconds.append(time.perf_counter() - start)
    assert np.median(seconds) < 0.002


# ---- The emulator ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("game", ["Breakout", pytest.param("Pong", marks=pytest.mark.slow)])
def test_the_buffer_gives_back_what_the_emulator_showed(tmp_path, game):
    """Pixel by pixel, over lost lives and ends of games."""
    torch.manual_seed(0)
    envs = script.make_envs(script.Args(env_id=f"ALE/{game}-v5"), 3)
    buffer = script.ReplayBuffer(tmp_path, 400, 3, create=True)
    obs, info = envs.reset(seed=script.env_seeds(1, (0, 0), 3))
    frame_numbers, ages, happened = info["episode_frame_number"], np.zeros(3, np.int64), {}
    generator, ends, lives = np.random.default_rng(0), 0, 0
    for _ in range(1000):
        actions = generator.integers(0, envs.single_action_space.n, 3)
        envs.send(actions)
        next_obs, rewards, terminated, _, info = envs.recv()
        new_game = info["episode_frame_number"] < frame_numbers
        buffer.add(obs, ages, actions, rewards, terminated, ~new_game)
        for n in np.flatnonzero(~new_game):
            outcome = (next_obs[n].tobytes(), float(np.sign(rewards[n])), bool(terminated[n]))
            happened.setdefault((obs[n].tobytes(), actions[n]), set()).add(outcome)
        ends, lives = ends + new_game.sum(), lives + terminated.sum()
        obs, frame_numbers = next_obs, info["episode_frame_number"]
        ages = np.where(new_game, 0, ages + 1)
    assert ends >= 1 and lives >= ends
    for _ in range(100):
        for row, action, reward, next_row, end in zip(*buffer.sample(32)):
            outcome = (next_row.numpy().tobytes(), float(reward), bool(end))
            assert outcome in happened[row.numpy().tobytes(), int(action)]


def test_a_lost_life_ends_the_learners_episode_and_not_the_game():
    envs = script.make_envs(script.Args(), 1)
    _, info = envs.reset(seed=np.array([1]))
    lives = [info["lives"][0]]
    while True:
        frame_number = info["episode_frame_number"]
        envs.send(np.array([1]))
        obs, _, terminated, _, info = envs.recv()
        if info["episode_frame_number"] < frame_number:
            break
        assert terminated[0] == (info["lives"][0] < lives[-1])
        lives.append(info["lives"][0])
    assert set(lives) == {5, 4, 3, 2, 1, 0}
    assert [bool(frame.any()) for frame in obs[0]] == [False, False, False, True]


def test_the_emulator_is_asked_for_the_true_score_and_its_own_actions(monkeypatch):
    asked = []
    monkeypatch.setattr(gym, "make_vec", lambda *_, **keywords: asked.append(keywords))
    script.make_envs(script.Args(), 1)
    script.make_envs(script.Args(sticky_actions=0.25), 1)
    assert [keywords["repeat_action_probability"] for keywords in asked] == [0.0, 0.25]
    assert all(keywords["life_loss_info"] and keywords["reward_clipping"] is False for keywords in asked)
    assert all(keywords["autoreset_mode"] == "NextStep" for keywords in asked)


@pytest.mark.parametrize("sticky_actions", [0.0, 0.5])
def test_sticky_actions_make_the_games_differ(sticky_actions):
    """From one state, by one sequence of actions, the game is one and the same if nothing is repeated at random."""
    games = []
    for seed in (1, 2):
        envs = gym.make_vec(
            "ALE/Breakout-v5", 1, repeat_action_probability=sticky_actions, noop_max=0, reward_clipping=False
        )
        envs.reset(seed=np.array([seed]))
        games.append(b"".join(envs.step(np.array([t // 5 % 4]))[0].tobytes() for t in range(100)))
    assert (games[0] == games[1]) == (sticky_actions == 0)


@pytest.mark.parametrize("sticky_actions", [0.0, 0.25])
def test_the_camera_films_the_same_game(sticky_actions):
    args = script.Args(sticky_actions=sticky_actions)
    envs, camera, seeds = script.make_envs(args, 3), script.make_camera(args), script.env_seeds(1, (1,), 3)
    _, info = envs.reset(seed=seeds)
    picture, filmed = camera.reset(seed=seeds[:1])
    generator = np.random.default_rng(0)
    for _ in range(500):
        assert info["episode_frame_number"][0] == filmed["episode_frame_number"][0]
        actions = generator.integers(0, 4, 3)
        _, rewards, terminated, _, info = envs.step(actions)
        picture, reward, end, _, filmed = camera.step(actions[:1])
        assert rewards[0] == reward[0] and terminated[0] == end[0]
    assert picture.shape == (1, 1, 210, 160, 3) and len(np.unique(picture.reshape(-1, 3), axis=0)) > 3


class Endless(gym.Env):
    observation_space = gym.spaces.Box(0, 255, (4, 84, 84), np.uint8)
    action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        return np.zeros((4, 84, 84), np.uint8), {}

    def step(self, action):
        return np.zeros((4, 84, 84), np.uint8), 0.0, False, False, {}


gym.register("EndlessFrames-v0", entry_point=Endless, disable_env_checker=True)
gym.register("EndlessFrames-v1", entry_point=Endless, max_episode_steps=9, disable_env_checker=True)


@pytest.mark.parametrize("module", [script, ppo_atari], ids=["dqn_atari", "ppo_atari"])
@pytest.mark.parametrize("env_id, expected", [("EndlessFrames-v0", 6), ("EndlessFrames-v1", 9)])
def test_an_environment_without_a_time_limit_gets_one(monkeypatch, module, env_id, expected):
    monkeypatch.setattr(module, "MAX_EPISODE_STEPS", 6)
    envs = module.make_envs(module.Args(env_id=env_id), 2)
    envs.reset(seed=[1, 2])
    ends = []
    for _ in range(expected):
        envs.send(np.zeros(2, dtype=np.int64))
        ends.append(envs.recv()[3].tolist())
    assert ends == [[False, False]] * (expected - 1) + [[True, True]]


def test_env_seeds_never_meet_and_fit_the_emulator():
    streams = [(script.TRAINING, step) for step in range(0, 20_000, 100)] + [(script.EVALUATION,)]
    seeds = [s for seed in range(1, 4) for stream in streams for s in script.env_seeds(seed, stream, 8)]
    assert len(set(seeds)) >= len(seeds) - 1 and 0 <= min(seeds) and max(seeds) < 2**31


# ---- The network and its update -------------------------------------------------------------------------------------


def test_the_network_is_that_of_the_paper():
    network = script.QNetwork(18, bfloat16=False, norm_obs=False)
    shapes = [tuple(layer.weight.shape) for layer in [*network.features, network.head] if hasattr(layer, "weight")]
    assert shapes == [(32, 4, 8, 8), (64, 32, 4, 4), (64, 64, 3, 3), (512, 3136), (18, 512)]
    assert network(torch.zeros(2, 4, 84, 84, dtype=torch.uint8)).shape == (2, 18)


def test_what_the_network_sees_reaches_its_last_layer():
    """A moving ball, a few of 7056 pixels, is most of what a game's frames differ in. Of that, PyTorch's own start lets
    so little through that in Pong units died before they learned anything: Q became one number for all states."""
    torch.manual_seed(0)
    obs = torch.full((50, 4, 84, 84), 87, dtype=torch.uint8)
    for i in range(50):
        obs[i, :, 20 + i : 22 + i, 30 + i // 2] = 236
    network = script.QNetwork(6, bfloat16=False, norm_obs=False)
    ours = network.features(obs / 255).std(0).mean()
    for layer in network.features:
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()
    assert ours > 10 * network.features(obs / 255).std(0).mean()


def random_batch(size=8, generator=None):
    frames = torch.randint(0, 256, (size, 5, 84, 84), dtype=torch.uint8, generator=generator)
    actions = torch.randint(0, 4, (size,), generator=generator)
    return script.Batch(frames[:, :-1], actions, torch.ones(size), frames[:, 1:], torch.arange(size) % 3 == 0)


def test_bfloat16_is_float32_within_its_rounding():
    torch.manual_seed(0)
    exact, rounded, obs = script.QNetwork(4, False, False), script.QNetwork(4, True, False), random_batch().obs
    rounded.load_state_dict(exact.state_dict())
    assert rounded(obs).dtype == torch.float32
    torch.testing.assert_close(rounded(obs), exact(obs), rtol=0.05, atol=0.01)
    assert not torch.equal(rounded(obs), exact(obs))


def test_bfloat16_tells_actions_apart_whose_values_differ_by_a_thousandth():
    """Around 2, bfloat16 itself has steps of 1/64. Pong's actions differ by less than that for a long time."""
    network = script.QNetwork(4, bfloat16=True, norm_obs=False)
    with torch.no_grad():
        network.head.weight.zero_()
        network.head.bias.copy_(torch.tensor([2.0, 2.001, 2.002, 2.003]))
    torch.testing.assert_close(network(random_batch().obs)[0], torch.tensor([2.0, 2.001, 2.002, 2.003]))


@pytest.mark.parametrize("bfloat16", [False, True])
def test_normalised_pixels_are_deviations_from_their_mean(bfloat16):
    """Pixel by pixel; one that never changes is 0 whatever it is, one that hardly ever does is cut at 10 deviations."""
    torch.manual_seed(0)
    network = script.QNetwork(4, bfloat16=bfloat16, norm_obs=True)
    obs = random_batch(64).obs
    obs[:, :, :20] = 87
    network.obs_statistics.update(script.newest_frames(obs))
    mean, deviation = obs[:, -1].float().mean(0), obs[:, -1].float().std(0, correction=0)
    obs[0, :, 0, 0] = 88
    expected = ((obs - mean) / (deviation + 1e-4)).clamp(-10, 10)
    seen = []
    network.features[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].float()))
    network(obs)
    torch.testing.assert_close(seen[0], expected, atol=0.05 if bfloat16 else 1e-3, rtol=0.02 if bfloat16 else 1e-3)
    assert (seen[0][0, :, 0, 0] == 10).all() and not seen[0][1, :, :20].any()


def test_statistics_are_of_the_buffer_and_the_same_for_both_networks(tmp_path, capsys, monkeypatch):
    """A sample at learning-starts, 50, and at the steps 80, 120, ... 400, before the target network is updated."""
    seen, update = [], script.update
    monkeypatch.setattr(script, "SAMPLE", 8)

    def updating(q_network, target_network, *others):
        shared = target_network.obs_statistics is q_network.obs_statistics
        seen.append((q_network.obs_statistics.count.item(), shared))
        return update(q_network, target_network, *others)

    monkeypatch.setattr(script, "update", updating)
    train(tmp_path, capsys, norm_obs=True, learning_starts=50)
    steps = range(52, 401, 4)
    assert seen == [(8.0 * (1 + (step // 40 - 1)), True) for step in steps]
    (run_dir,) = tmp_path.iterdir()
    state = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    assert state["q_network"]["obs_statistics.count"] == 8 * 10
    for name in ("count", "mean", "variance"):
        assert torch.equal(*(state[network][f"obs_statistics.{name}"] for network in ("q_network", "target_network")))
    assert (state["q_network"]["obs_statistics.mean"].view(84, 84)[1:] == 0).all()  # only the first four pixels differ
    assert (state["q_network"]["obs_statistics.mean"][:1] > 0).all()


@pytest.mark.slow
def test_compiled_networks_compute_the_same():
    """A training step, too. Needs a compiler, and half a minute."""
    args, results = script.Args(compile=False, precision="float32"), []
    for compiled in (False, True):
        torch.manual_seed(0)
        networks = [script.QNetwork(4, bfloat16=False, norm_obs=False) for _ in range(2)]
        if compiled:
            for network in networks:
                network.compile()
        optimizer = torch.optim.SGD(networks[0].parameters(), lr=0.1)
        metrics = script.update(*networks, optimizer, random_batch(generator=torch.Generator().manual_seed(1)), args)
        results.append([metrics["losses/td_loss"], *networks[0].state_dict().values()])
    for plain, compiled in zip(*results):
        torch.testing.assert_close(plain, compiled, rtol=1e-4, atol=1e-5)


class Table(nn.Module):
    """Q as a table over the number that the newest frame shows."""

    def __init__(self, values):
        super().__init__()
        self.values = nn.Parameter(torch.tensor(values, dtype=torch.float32))

    def forward(self, obs):
        return self.values[[number(frames[-1]) for frames in obs]]


def stacks(states):
    return torch.from_numpy(np.stack([np.stack([picture(0)] * 3 + [picture(state)]) for state in states]))


def test_update_finds_the_values_of_a_small_markov_chain():
    """Three states, two actions. By brute force: repeated Bellman updates on the table itself."""
    generator = np.random.default_rng(0)
    next_states, rewards = generator.integers(0, 3, (3, 2)), generator.normal(size=(3, 2))
    ends = np.array([[False, False], [True, False], [False, False]])
    expected = np.zeros((3, 2))
    for _ in range(200):
        expected = rewards + 0.8 * np.where(ends, 0, expected.max(1)[next_states])
    states, actions = np.divmod(np.arange(6), 2)
    batch = script.Batch(
        stacks(states), torch.from_numpy(actions), torch.from_numpy(rewards.flatten()).float(),
        stacks(next_states.flatten()), torch.from_numpy(ends.flatten()),
    )  # fmt: skip
    for double_q, loss in ((False, "huber"), (True, "squared")):
        args = script.Args(gamma=0.8, double_q=double_q, loss=loss)
        q_network, target_network = Table(np.zeros((3, 2))), Table(np.zeros((3, 2)))
        optimizer = torch.optim.SGD(q_network.parameters(), lr=1.0)
        for _ in range(600):
            script.update(q_network, target_network, optimizer, batch, args)
            script.update_target(target_network, q_network, 0.5)
        torch.testing.assert_close(q_network.values.detach(), torch.from_numpy(expected).float(), rtol=1e-3, atol=1e-3)


def one_update(**settings):
    """State 0, action 1, reward 3, to state 1, where the networks disagree about the best action."""
    q_network, target_network = Table([[0.0, 0.5], [1.0, 2.0]]), Table([[9.0, 9.0], [10.0, 4.0]])
    batch = script.Batch(stacks([0]), torch.tensor([1]), torch.tensor([3.0]), stacks([1]), torch.tensor([False]))
    optimizer = torch.optim.SGD(q_network.parameters(), lr=1.0)
    metrics = script.update(q_network, target_network, optimizer, batch, script.Args(gamma=0.5, **settings))
    assert target_network.values.tolist() == [[9.0, 9.0], [10.0, 4.0]]
    return metrics["losses/td_loss"].item(), metrics["losses/q_values"].item(), q_network.values.tolist()


def test_losses_and_targets_by_hand():
    """y is 3 + 0.5 * 10 = 8, and with double Q-learning 3 + 0.5 * 4 = 5. Q is 0.5: errors of 7.5 and 4.5. Huber's loss
    is the error less 1/2 beyond 1, with the gradient 1; the square's gradient is twice the error."""
    assert one_update() == (7.0, 0.5, [[0.0, 1.5], [1.0, 2.0]])
    assert one_update(double_q=True) == (4.0, 0.5, [[0.0, 1.5], [1.0, 2.0]])
    assert one_update(loss="squared") == (7.5**2, 0.5, [[0.0, 15.5], [1.0, 2.0]])


@pytest.mark.parametrize("loss", ["huber", "squared"])
def test_loss_and_values_are_means_over_the_batch(loss):
    """Errors of 0.5, 3 and -2; Q-values of 0.5, -1 and 2."""
    values = [[0.5, -1.0, 2.0]]
    q_network, target_network = Table(values), Table(values)
    batch = script.Batch(
        stacks([0, 0, 0]), torch.tensor([0, 1, 2]), torch.tensor([0.0, -4.0, 4.0]), stacks([0, 0, 0]),
        torch.tensor([True, True, True]),
    )  # fmt: skip
    optimizer = torch.optim.SGD(q_network.parameters(), lr=1.0)
    metrics = script.update(q_network, target_network, optimizer, batch, script.Args(loss=loss))
    losses = [0.125, 2.5, 1.5] if loss == "huber" else [0.25, 9, 4]
    steps = torch.tensor([[0.5, 1, -1]]) if loss == "huber" else torch.tensor([[1.0, 6, -4]])
    assert metrics["losses/td_loss"].item() == pytest.approx(sum(losses) / 3)
    assert metrics["losses/q_values"].item() == pytest.approx(0.5)
    torch.testing.assert_close(q_network.values.detach(), torch.tensor(values) - steps / 3)


class FourTables(Table):
    """Q as the sum of four tables, so that the gradient is in four parts, all the same."""

    def __init__(self, values):
        super().__init__(values)
        self.others = nn.ParameterList(torch.zeros_like(self.values) for _ in range(3))

    def forward(self, obs):
        states = [number(frames[-1]) for frames in obs]
        return self.values[states] + sum(table[states] for table in self.others)


@pytest.mark.parametrize("limit, share", [(None, 1.0), (11.0, 1.0), (5.0, 0.5), (0.1, 0.01)])
def test_longer_gradients_are_cut_to_their_limit_and_shorter_ones_are_not(limit, share):
    """Errors of 3 and -4, squared, in a batch of 2: a gradient of (3, -4) in each table, of length 5; in all, of 10."""
    q_network = FourTables([[3.0, -4.0]])
    terminated = torch.tensor([True, True])
    batch = script.Batch(stacks([0, 0]), torch.tensor([0, 1]), torch.zeros(2), stacks([0, 0]), terminated)
    optimizer = torch.optim.SGD(q_network.parameters(), lr=1.0)
    args = script.Args(loss="squared", max_grad_norm=limit)
    script.update(q_network, Table([[0.0, 0.0]]), optimizer, batch, args)
    for table in q_network.others:
        torch.testing.assert_close(table.detach(), torch.tensor([[-3.0, 4.0]]) * share)


# ---- The training loop ----------------------------------------------------------------------------------------------


class Scripted(gym.Env):
    """Shows pictures with numbers of its own, in an array that it reuses; its games are as long as its seed says.

    The pay is 5 times the action, which a learner sees as 1. Games of an odd length terminate, others are truncated;
    those of 3 steps do both.
    """

    observation_space = gym.spaces.Box(0, 255, (4, 84, 84), np.uint8)
    action_space = gym.spaces.Discrete(3)
    numbers = itertools.count(1)
    seen = []  # every step that was a transition: frames before, action, clipped reward, frames after, terminated
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
        Scripted.seen.append((before, int(action), float(np.sign(action)), numbers(self.frames), terminated))
        if over:
            Scripted.games.append((self.total, self.t))
        return self.frames, 5 * int(action), terminated, truncated, {}


gym.register("Scripted-v0", entry_point=Scripted, disable_env_checker=True)


def train(tmp_path, capsys, resume=None, **settings):
    """Runs in this process; returns the final weights in one vector and the scalars by tag."""
    few = dict(
        env_id="Scripted-v0", total_timesteps=400, num_envs=2, buffer_size=300, learning_starts=40, batch_size=4,
        train_frequency=4, target_network_frequency=40, eval_episodes=2, checkpoint_frequency=150, precision="float32",
        learning_rate=3e-3, num_threads=1,
    )  # fmt: skip
    Scripted.numbers, Scripted.seen, Scripted.games = itertools.count(1), [], []
    run_dir = script.train(script.Args(**few | settings, runs_dir=str(tmp_path), resume=resume))
    capsys.readouterr()
    state = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    scalars = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    return torch.cat([weights.flatten() for weights in state["q_network"].values()]), scalars


def recorded(monkeypatch, name, calls):
    """Replaces a function of the script by one that does the same and notes its arguments."""
    function = getattr(script, name)

    def spy(*arguments, **keywords):
        result = function(*arguments, **keywords)
        calls.append((arguments, result))
        return result

    monkeypatch.setattr(script, name, spy)


def test_the_loop_learns_from_what_was_played(tmp_path, capsys, monkeypatch):
    """Every row of every batch is a step that an environment took, of either kind, from a game's first to its last."""
    updates = []
    recorded(monkeypatch, "update", updates)
    train(tmp_path, capsys)
    happened, learned = set(Scripted.seen), set()
    for (_, _, _, batch, _), _ in updates:
        for obs, action, reward, next_obs, terminated in zip(*batch):
            transition = (numbers(obs), int(action), float(reward), numbers(next_obs), bool(terminated))
            assert transition in happened
            learned.add(transition)
    assert len(learned) > 100
    assert any(end for *_, end in learned) and any(reward == 0 for _, _, reward, _, _ in learned)
    assert any(before[:3] == (0, 0, 0) for before, *_ in learned)


def test_all_that_was_played_can_be_learned_from(tmp_path, capsys, monkeypatch):
    """Each step once, also the last of a game, however it ends; but for the three rows that the oldest frames need."""
    buffers, counts, save = [], [], script.save_checkpoint
    recorded(monkeypatch, "ReplayBuffer", buffers)
    monkeypatch.setattr(script, "save_checkpoint", lambda *a, **b: counts.append(len(Scripted.seen)) or save(*a, **b))
    train(tmp_path, capsys, buffer_size=1000, checkpoint_frequency=0)
    ((_, buffer),) = buffers
    drawn = set()
    for obs, action, reward, next_obs, terminated in zip(*buffer.sample(5000)):
        drawn.add((numbers(obs), int(action), float(reward), numbers(next_obs), bool(terminated)))
    assert drawn == set(Scripted.seen[2 * 3 : counts[-1]])
    assert buffer.valid.sum() == counts[-1] > 300


def test_the_loop_keeps_what_the_emulator_showed(tmp_path, capsys, monkeypatch):
    """Over lost lives and ends of games, told by the lives, at which the script does not look: a game ends with the
    last of them, and the step after it is ignored."""
    rows, rounds, made, add, make_envs = [], [], [], script.ReplayBuffer.add, script.make_envs

    def watched(args, num_envs):
        envs = make_envs(args, num_envs)
        made.append((envs, envs.reset, envs.send, envs.recv))
        if len(made) == 1:  # those of the training
            envs.reset = lambda **keywords: note(made[0][1](**keywords))
            envs.recv = lambda: note(made[0][3]())
        return envs

    def note(outcome):
        obs, *others, info = outcome
        rounds.append([obs.copy(), *map(np.copy, others), info["lives"].copy()])
        return outcome

    monkeypatch.setattr(script, "make_envs", watched)
    copying = lambda self, *row: rows.append([np.copy(part) for part in row]) or add(self, *row)  # noqa: E731
    monkeypatch.setattr(script.ReplayBuffer, "add", copying)
    _, scalars = train(
        tmp_path, capsys, env_id="ALE/Breakout-v5", num_envs=3, total_timesteps=1200, buffer_size=1200,
        train_frequency=100, start_e=1.0, end_e=1.0, eval_epsilon=1.0, eval_episodes=1, checkpoint_frequency=0,
    )  # fmt: skip
    (obs, lives), over, ages, scores, games = rounds[0], np.zeros(3, bool), np.zeros(3), np.zeros(3), []
    for k, ((kept, kept_ages, _, kept_rewards, kept_ends, valid), outcome) in enumerate(zip(rows, rounds[1:])):
        next_obs, rewards, _, _, next_lives = outcome
        assert np.array_equal(kept, obs) and np.array_equal(kept_ages, ages) and np.array_equal(valid, ~over)
        assert np.array_equal(kept_rewards, rewards) and np.array_equal(kept_ends[~over], (next_lives < lives)[~over])
        games += [(3 * k + 1 + n, scores[n]) for n in np.flatnonzero(over)]
        ages, scores = np.where(over, 0, [ages + 1, scores + rewards])
        obs, lives, over = next_obs, next_lives, ~over & (next_lives == 0)
    assert k == 399 and scalars["charts/episodic_return"] == games and len(games) > 3


def test_every_environment_gets_the_action_that_the_q_network_chose_for_it(tmp_path, capsys, monkeypatch):
    """In training and in evaluation; and it is the Q-network that acts, not its copy."""
    choices, updates = [], []
    recorded(monkeypatch, "select_actions", choices)
    recorded(monkeypatch, "update", updates)
    train(tmp_path, capsys, num_envs=3, eval_episodes=3, eval_epsilon=1.0)
    chosen = {}
    for (_, obs, _), actions in choices:
        chosen |= {number(frames[-1]): int(action) for frames, action in zip(obs, actions)}
    assert len(Scripted.seen) > 300 and all(chosen[before[-1]] == action for before, action, *_ in Scripted.seen)
    networks = {id(network) for (network, *_), _ in choices} | {id(q_network) for (q_network, *_), _ in updates}
    assert len(networks) == 1 and {id(target) for (_, target, *_), _ in updates}.isdisjoint(networks)


def test_updates_are_adams_with_the_settings_asked_for(tmp_path, capsys, monkeypatch):
    updates = []
    recorded(monkeypatch, "update", updates)
    train(tmp_path, capsys, learning_rate=2e-3, adam_epsilon=1e-5, batch_size=5)
    for (_, _, optimizer, batch, _), _ in updates:
        (group,) = optimizer.param_groups
        assert type(optimizer) is torch.optim.Adam and [len(part) for part in batch] == [5] * 5
        assert (group["lr"], group["eps"], group["betas"], group["weight_decay"]) == (2e-3, 1e-5, (0.9, 0.999), 0)


@pytest.mark.parametrize("num_envs, rows", [pytest.param(2, 50, marks=pytest.mark.slow), (3, 34)])
def test_the_buffer_has_the_size_asked_for(tmp_path, capsys, num_envs, rows):
    """100 transitions, rounded up to whole rows. Of the second files, the last checkpoint's is left."""
    train(tmp_path, capsys, num_envs=num_envs, buffer_size=100)
    (run_dir,) = tmp_path.iterdir()
    assert (run_dir / "replay.frames").stat().st_size == rows * num_envs * 7056
    saved = torch.load(run_dir / "checkpoint.pt", weights_only=True)["buffer"]
    assert saved["actions"].shape == (rows, num_envs)
    (second,) = run_dir.glob("replay.overwritten-*")
    assert second.name == f"replay.overwritten-{saved['rows_written']}"


def test_every_checkpoint_begins_games_of_its_own(tmp_path, capsys, monkeypatch):
    """What is due at 150 and at 300 is done after rounds of 4 steps, at 152 and at 300. The environments are reset
    then, and nowhere else, with the seeds of that step."""
    steps, save, seeds, resets = [], script.save_checkpoint, [], []
    recorded(monkeypatch, "env_seeds", seeds)
    reset = script.OwnEnvs.reset
    monkeypatch.setattr(script, "save_checkpoint", lambda *a, **counts: steps.append(counts) or save(*a, **counts))
    monkeypatch.setattr(script.OwnEnvs, "reset", lambda self, seed: resets.append(list(seed)) or reset(self, seed=seed))
    train(tmp_path, capsys, num_envs=4, seed=3)
    assert steps == [{"global_step": step} for step in (0, 152, 300, 400)]
    streams = [(3, (script.TRAINING, step), 4) for step in (0, 152, 300)] + [(3, (script.EVALUATION,), 2)]
    assert [arguments for arguments, _ in seeds] == streams
    assert resets == [result.tolist() for _, result in seeds]


@pytest.mark.parametrize(
    "num_envs, train_frequency",
    [(3, 5), (8, 4)] + [pytest.param(*pair, marks=pytest.mark.slow) for pair in [(1, 4), (2, 4), (4, 4), (4, 1)]],
)
def test_one_gradient_step_for_so_many_steps_whatever_the_number_of_environments(
    tmp_path, capsys, monkeypatch, num_envs, train_frequency
):  # fmt: skip
    updates, targets = [], []
    recorded(monkeypatch, "update", updates)
    recorded(monkeypatch, "update_target", targets)
    flags = dict(num_envs=num_envs, train_frequency=train_frequency, total_timesteps=120, learning_starts=64)
    train(tmp_path, capsys, **flags)
    steps = -(-120 // num_envs) * num_envs
    assert len(updates) == sum(step % train_frequency == 0 for step in range(64, steps + 1))
    assert len(targets) == sum(step % 40 == 0 for step in range(64, steps + 1))


@pytest.mark.parametrize("tau", [0.25, pytest.param(1.0, marks=pytest.mark.slow)])
def test_the_target_network_moves_when_it_is_due_and_only_then(tmp_path, capsys, monkeypatch, tau):
    history, learners = [], set()
    original, move = script.update, script.update_target

    def update(q_network, target_network, *others):
        before = target_network.features[0].weight.clone()
        result = original(q_network, target_network, *others)
        assert torch.equal(before, target_network.features[0].weight)
        learners.add((id(q_network), id(target_network)))
        history.append("update")
        return result

    def update_target(target_network, q_network, by):
        before, online = target_network.features[0].weight.clone(), q_network.features[0].weight.clone()
        assert by == tau and learners == {(id(q_network), id(target_network))}
        move(target_network, q_network, by)
        torch.testing.assert_close(target_network.features[0].weight, before + tau * (online - before))
        assert torch.equal(q_network.features[0].weight, online)
        assert (tau < 1) or torch.equal(target_network.features[0].weight, online)
        assert not target_network.features[0].weight.grad_fn
        history.append("target")

    monkeypatch.setattr(script, "update", update)
    monkeypatch.setattr(script, "update_target", update_target)
    train(tmp_path, capsys, total_timesteps=200, tau=tau)
    # Steps 40, 44, ... 200 are updates; after those of 40, 80, 120, 160, 200 the target network moves.
    expected = []
    for step in range(40, 201, 4):
        expected += ["update"] + ["target"] * (step % 40 == 0)
    assert history == expected


def test_every_game_is_logged_with_its_true_score(tmp_path, capsys, monkeypatch):
    """Also when two end in one round; not those that ended in the last, of which no next game tells."""
    rounds, recv = [], script.OwnEnvs.recv
    monkeypatch.setattr(script.OwnEnvs, "recv", lambda self: rounds.append(self.ended.copy()) or recv(self))
    _, scalars = train(tmp_path, capsys, num_envs=4, total_timesteps=396, checkpoint_frequency=0)
    returns, lengths = scalars["charts/episodic_return"], scalars["charts/episodic_length"]
    steps = [4 * k + 1 + i for k, ended in enumerate(rounds[:99]) for i in np.flatnonzero(ended)]
    assert [step for step, _ in returns] == [step for step, _ in lengths] == steps and len(steps) > 20
    played = Scripted.games[: len(returns)]  # those of the evaluation come after
    assert sorted(zip([r for _, r in returns], [n for _, n in lengths])) == sorted(played)
    assert max(r for _, r in returns) > 5
    assert any(ended.sum() > 1 for ended in rounds[:99]), "the test needs two games that end together"


def test_actions_follow_epsilon(tmp_path, capsys, monkeypatch):
    calls = []
    recorded(monkeypatch, "select_actions", calls)
    train(tmp_path, capsys, total_timesteps=400, exploration_fraction=0.5, start_e=0.9, end_e=0.1, eval_epsilon=0.3)
    epsilons = [epsilon for (_, _, epsilon), _ in calls]
    assert epsilons[0] == 0.9 and epsilons[50] == pytest.approx(0.5) and epsilons[100] == epsilons[199] == 0.1
    assert set(epsilons[200:]) == {0.3}


class FixedGames(script.OwnEnvs):
    """Environment n plays games of n + 1 steps, and each step of its game g pays 10 to the power of g."""

    def __init__(self, num_envs):
        super().__init__(lambda: gym.make_vec("Scripted-v0", num_envs))
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
    network = script.QNetwork(3, bfloat16=False, norm_obs=False)
    assert script.evaluate(script.Args(eval_episodes=4), network, tmp_path) == (2.5, 2.5)
    assert f"Evaluation: return 2.5 ± {np.std([1, 2, 3, 4]):.1f} over 4 episodes" in capsys.readouterr().out


@pytest.mark.slow
def test_every_setting_of_the_algorithm_changes_the_outcome(tmp_path, capsys):
    reference, _ = train(tmp_path, capsys)
    for changed in (
        {"seed": 2}, {"learning_rate": 1e-3}, {"adam_epsilon": 1e-8}, {"anneal_lr": True}, {"num_envs": 3},
        {"buffer_size": 100}, {"gamma": 0.5}, {"tau": 0.5}, {"target_network_frequency": 80}, {"batch_size": 5},
        {"start_e": 0.5}, {"end_e": 0.5}, {"exploration_fraction": 1.0}, {"learning_starts": 60},
        {"train_frequency": 8}, {"double_q": True}, {"norm_obs": True}, {"loss": "squared"}, {"precision": "bfloat16"},
        {"max_grad_norm": 0.01}, {"checkpoint_frequency": 100},
    ):  # fmt: skip
        weights, _ = train(tmp_path, capsys, **changed)
        assert not torch.equal(weights, reference), changed
    weights, _ = train(tmp_path, capsys, exp_name="other", eval_episodes=1, eval_epsilon=0.5)
    assert torch.equal(weights, reference)


@pytest.mark.slow
def test_learning_rate_falls_in_a_line_or_stays(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(script, "LOG_FREQUENCY", 100)
    _, scalars = train(tmp_path, capsys, anneal_lr=True, learning_rate=1e-3)
    rates = [rate for _, rate in scalars["charts/learning_rate"]]
    assert rates == pytest.approx([1e-3 * (1 - step / 400) for step in (98, 198, 298, 398)])
    _, scalars = train(tmp_path, capsys, learning_rate=1e-3)
    assert [rate for _, rate in scalars["charts/learning_rate"]] == pytest.approx([1e-3] * 4)


@pytest.mark.slow
def test_a_missing_buffer_cannot_be_resumed_but_the_run_be_evaluated(tmp_path, capsys):
    train(tmp_path, capsys)
    (run_dir,) = tmp_path.iterdir()
    (run_dir / "replay.frames").unlink()
    with pytest.raises(SystemExit):
        train(tmp_path, capsys, resume=str(run_dir), total_timesteps=500)
    line = capsys.readouterr().err
    assert re.search(r"replay\.frames.*evaluated", line)


def test_memory_and_disk_are_checked_before_anything_is_made(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(script.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10**6}))
    with pytest.raises(SystemExit):
        train(tmp_path, capsys)
    assert "of disk" in capsys.readouterr().err and list(tmp_path.iterdir()) == []
    monkeypatch.setattr(script.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10**18}))
    monkeypatch.setattr(script.Path, "read_text", lambda _: "MemFree: 9 kB\n")  # of WSL 1, which does not say
    script.refuse_too_large(script.Args(runs_dir=str(tmp_path)))
    with monkeypatch.context() as patches:  # a drive of Windows that does not exist: make_run_dir says so
        patches.setattr(script.Path, "exists", lambda _: False)
        script.refuse_too_large(script.Args(runs_dir=str(tmp_path)))
    monkeypatch.setattr(script.Path, "read_text", lambda _: "MemFree: 9 kB\nMemAvailable:    1000 kB\n")
    with pytest.raises(SystemExit):
        train(tmp_path, capsys)
    assert "of memory" in capsys.readouterr().err and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("settings, on_disk, in_memory", [
    ({"checkpoint_frequency": 0, "total_timesteps": 1000}, 1000, 1000),  # never overwritten
    ({"checkpoint_frequency": 0, "total_timesteps": 1500}, 1500, 1000),  # overwritten by 500 steps before the end
    ({"checkpoint_frequency": 0, "total_timesteps": 5000}, 2000, 1000),  # no more than all of it
    ({"checkpoint_frequency": 100, "total_timesteps": 5000}, 1100, 1000),
    ({"checkpoint_frequency": 100, "total_timesteps": 5000, "resume": "there"}, 100, 1000),  # the first file exists
])  # fmt: skip
def test_the_room_that_a_buffer_needs(tmp_path, capsys, monkeypatch, settings, on_disk, in_memory):
    """In transitions of 7056 bytes: so many fit, and one byte less does not."""
    runs_dir = str(tmp_path / "not" / "yet")
    if "resume" in settings:  # the run may have been moved
        settings, runs_dir = settings | {"resume": str(tmp_path / settings["resume"])}, "/"
    args = script.Args(buffer_size=1000, learning_starts=64, runs_dir=runs_dir, **settings)
    for disk, memory, word in (
        (on_disk * 7056, in_memory * 7056 + 1023, None), (on_disk * 7056 - 1, 10**12, "of disk"),
        (10**12, in_memory * 7056 - 1024, "of memory"),
    ):  # fmt: skip
        usage = type("Usage", (), {"free": disk})
        monkeypatch.setattr(script.shutil, "disk_usage", lambda folder: usage if folder == tmp_path else None)
        monkeypatch.setattr(script.Path, "read_text", lambda _: f"MemAvailable:    {-(-memory // 1024)} kB\n")
        if word is None:
            script.refuse_too_large(args)
            continue
        with pytest.raises(SystemExit):
            script.refuse_too_large(args)
        assert word in capsys.readouterr().err


def test_learning_starts_when_a_transition_can_be_drawn(tmp_path):
    """8 rows: of the first 7, 3 may be drawn, though a game of one step may end in each of them."""
    script.Args(num_envs=8, learning_starts=64), script.Args(batch_size=90, learning_starts=90)
    script.Args(learning_starts=100, total_timesteps=101)
    for settings in (
        {"num_envs": 8, "learning_starts": 63}, {"batch_size": 91, "learning_starts": 90},
        {"learning_starts": 100, "total_timesteps": 100}, {"buffer_size": 99, "learning_starts": 100},
    ):  # fmt: skip
        with pytest.raises(ValueError, match="--learning-starts"):
            script.Args(**settings)


@pytest.mark.slow
def test_a_buffer_of_another_size_is_refused_as_such(tmp_path, capsys):
    train(tmp_path, capsys)
    (run_dir,) = tmp_path.iterdir()
    with pytest.raises(SystemExit):
        train(tmp_path, capsys, resume=str(run_dir), total_timesteps=500, buffer_size=200)
    assert "not of the size that --buffer-size and --num-envs give" in capsys.readouterr().err
