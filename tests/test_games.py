"""What the scripts that learn from pixels have in common: class Envs, and the evaluation.

Where it is the same text in some, as test_conventions.py makes sure, one of them is tested.
"""

import contextlib
import importlib
import inspect
import io
import itertools

import games
import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import SCRIPTS, curves, learned, same
from games import Diary, number, numbers
from PIL import Image

NAMES = [path.stem for path in SCRIPTS if "\nclass OwnGames:" in path.read_text()]
N = 3  # environments
LIMIT = 150  # steps of an emulator's game: some end before, others are truncated
LIMITED = f'{{"max_num_frames_per_episode": {4 * LIMIT}}}'


def scripts(names):
    """As parameters; the fast half, -m "not slow", tests the first."""
    return [pytest.param(name, marks=[pytest.mark.slow] * (name != names[0])) for name in names]


def text_of_envs(name):
    script = importlib.import_module(name)
    return [inspect.getsource(part) for part in (script.Envs, script.OwnGames, script.make_games)]


@pytest.fixture(params=scripts([
    name for i, name in enumerate(NAMES) if text_of_envs(name) not in map(text_of_envs, NAMES[:i])
]))  # fmt: skip
def script(request):
    """Those whose environments differ."""
    return importlib.import_module(request.param)


@pytest.fixture(params=scripts(NAMES))
def each(request):
    """All of them, for what their networks and loops take part in."""
    return importlib.import_module(request.param)


def opened(script, num_envs=N, stream=0, state=None, draw=False, **settings):
    """Environments with their first observations, closed at the end of a `with`."""
    envs = script.Envs(script.Args(**settings), num_envs, stream, draw)
    if state is not None:
        envs.load_state_dict(state)
    envs.reset()
    return contextlib.closing(envs)


def play(envs, actions):
    """All that a training could see, for each step."""
    for row in actions:
        envs.send(row.copy())
        next_obs, *outcome = envs.recv()
        columns = [envs.seeds, *(getattr(envs, name) for name in envs.COLUMNS), envs.lives]
        after = [*columns, envs.steps, len(envs.actions)]
        yield [np.copy(part) for part in (next_obs, *outcome, envs.obs, *after)]


def random_actions(steps, num_envs=N, seed=0):
    return np.random.default_rng(seed).integers(0, 3, (steps, num_envs))


# ---- Emulators -----------------------------------------------------------------------------------


class Emulator:
    """One game of ale_py's in which the reset after a game is a step of its own.

    So the last observation of a game is seen, as is the number of lives.
    """

    def __init__(self, game, sticky_actions):
        self.env = gym.make_vec(
            game, 1, autoreset_mode="NextStep", reward_clipping=False,
            repeat_action_probability=sticky_actions, max_num_frames_per_episode=4 * LIMIT,
        )  # fmt: skip

    def reset(self, seed):
        (self.obs,), info = self.env.reset(seed=np.array([seed]))
        self.lives = info["lives"].item()

    def step(self, action):
        """-> next observation, reward, terminated, truncated, whether a life was lost."""
        (next_obs,), reward, terminated, truncated, info = self.env.step(np.array([action]))
        lost, self.obs = info["lives"].item() < self.lives, next_obs
        if terminated or truncated:
            (self.obs,), *_, info = self.env.step(np.array([0]))
        self.lives = info["lives"].item()
        return next_obs, reward.item(), terminated.item(), truncated.item(), lost


@pytest.mark.parametrize("game, sticky_actions", [("Breakout", 0.0), ("Pong", 0.25)])
def test_the_emulators_games_are_told_as_they_were(
    script, monkeypatch, game, sticky_actions
):  # fmt: skip
    """A lost life terminates, and the game goes on; a truncated game shows its last observation;
    the true return and length of each game; the first game after so many steps is from a seed."""
    monkeypatch.setattr(script, "RESEED_FREQUENCY", N * 200)
    game, happened = f"ALE/{game}-v5", {"over": 0, "cut": 0, "life": 0, "seed": 0}
    emulators = [Emulator(game, sticky_actions) for _ in range(N)]
    with opened(script, env_id=game, env_kwargs=LIMITED, sticky_actions=sticky_actions) as envs:
        seeds, ages, totals = envs.seeds.copy(), np.zeros(N, int), [[] for _ in range(N)]
        for emulator, seed in zip(emulators, seeds):
            emulator.reset(seed)
        for t, actions in enumerate(random_actions(500)):
            envs.send(actions)
            next_obs, rewards, terminated, truncated = envs.recv()
            for i, emulator in enumerate(emulators):
                last, reward, over, cut, life = emulator.step(actions[i])
                totals[i].append(reward)
                ages[i] += 1
                if over or cut:
                    finished = N * t + 1 + i, sum(totals[i]), len(totals[i])
                    assert envs.finished.pop(0) == finished
                    totals[i] = []
                if (over or cut) and ages[i] >= 200:
                    assert envs.seeds[i] not in seeds
                    emulator.reset(envs.seeds[i])
                    seeds[i], ages[i] = envs.seeds[i], 0
                    happened["seed"] += 1
                assert rewards[i] == reward and truncated[i] == cut
                assert terminated[i] == (over or (life and not cut))
                assert np.array_equal(envs.obs[i], emulator.obs)
                if not over:
                    assert np.array_equal(next_obs[i], last)
                happened |= {"over": happened["over"] + over, "cut": happened["cut"] + cut,
                             "life": happened["life"] + (life and not over)}  # fmt: skip
            assert not envs.finished and np.array_equal(envs.seeds, seeds)
            assert len(envs.actions) == max(ages) <= 200 + LIMIT
    assert happened["cut"] and happened["seed"] >= N
    assert game == "ALE/Pong-v5" or happened["life"] > happened["over"] > 0


@pytest.mark.parametrize("env_id, sticky_actions, num_envs", [
    ("ALE/Breakout-v5", 0.25, N), ("ALE/Pong-v5", 0.25, N),
    ("PixelDiary-v0", 0, N), ("PixelDiary-v0", 0, 1),
])  # fmt: skip
def test_reset_goes_back_to_a_checkpoint(
    script, monkeypatch, capsys, env_id, sticky_actions, num_envs
):  # fmt: skip
    """At once after a new seed, and in the middle of games, seeds before and after."""
    monkeypatch.setattr(script, "RESEED_FREQUENCY", num_envs * 150)
    args = {"env_id": env_id, "sticky_actions": sticky_actions, "num_envs": num_envs}
    args["env_kwargs"] = LIMITED if "ALE" in env_id else "{}"
    actions, saved = random_actions(750, num_envs), {}
    with opened(script, **args) as envs:
        undisturbed, steps = [], play(envs, actions)
        for t in range(750):
            new_seed = t > 200 and (envs.since == len(envs.actions)).any()
            if t == 450 or (new_seed and not saved):
                file = io.BytesIO()
                torch.save(envs.state_dict(), file)
                saved[t] = file.getvalue(), len(envs.finished), envs.seeds.copy()
            undisturbed.append(next(steps))
        finished, seeds = envs.finished, envs.seeds.copy()
    capsys.readouterr()
    assert len(saved) == 2
    for t, (file, count, seeds_then) in saved.items():
        state = torch.load(io.BytesIO(file), weights_only=True)
        with opened(script, state=state, **args) as envs:
            assert capsys.readouterr() == ("", "")  # no warning
            for step, expected in zip(play(envs, actions[t : t + 300]), undisturbed[t : t + 300]):
                assert all(map(np.array_equal, step, expected)), t
            assert envs.finished == finished[count:][: len(envs.finished)] != []
        assert (seeds_then != seeds).any() and (seeds_then != undisturbed[0][5]).any()


def test_an_emulator_that_plays_another_game_is_reported(script, capsys):
    """Here its actions are more sticky than they were. One line; the run goes on."""
    with opened(script) as envs:
        list(play(envs, random_actions(100)))
        state, steps = envs.state_dict(), envs.steps
    with opened(script, state=state, sticky_actions=0.9) as envs:
        assert envs.steps == steps
        list(play(envs, random_actions(3)))
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and "not exactly" in err


def test_a_long_replay_says_so(script, capsys):
    for steps, said in (1000, ""), (1001, "Replaying 1001 steps of 1 games\n"):
        with opened(script, 1, env_id="PixelDiary-v0") as envs:
            list(play(envs, random_actions(steps, 1)))
            state = envs.state_dict()
        with opened(script, 1, state=state, env_id="PixelDiary-v0"):
            assert capsys.readouterr() == (said, "")


def test_a_checkpoint_of_other_environments_is_refused(script):
    with opened(script, 2, env_id="PixelDiary-v0") as envs:
        state = envs.state_dict()
    with pytest.raises(ValueError, match="observations were"):
        opened(script, 3, state=state, env_id="PixelDiary-v0")


def test_the_camera_films_the_first_game(script):
    """In colour. In grey, and as small as the observation, it is the observation."""
    with opened(script, draw=True, sticky_actions=0.25) as envs:
        for _ in play(envs, random_actions(200)):
            shown = envs.render()
            assert shown.shape == (420, 320, 3) and np.ptp(shown, axis=2).max() > 50
            grey = Image.fromarray(shown).convert("L").resize((84, 84), Image.Resampling.BOX)
            assert abs(np.asarray(grey, int) - envs.obs[0, -1]).max() < 30
        assert envs.episodes[0] > 0 and len(envs.envs) == 2
        closed = []
        for games_or_camera in envs.envs:
            games_or_camera.close = lambda: closed.append(1)
        envs.close(), envs.close()
        assert closed == [1, 1]


def test_the_emulator_is_asked_for_true_rewards_and_its_own_actions(script, monkeypatch):
    asked, make_vec = [], gym.make_vec
    monkeypatch.setattr(gym, "make_vec", lambda *a, **b: asked.append(b) or make_vec(*a, **b))
    for sticky_actions in (0.0, 0.25):
        script.make_games(script.Args(sticky_actions=sticky_actions), 1)
    assert [options["repeat_action_probability"] for options in asked] == [0.0, 0.25]
    assert not any(options["reward_clipping"] for options in asked)
    for kwargs in ('{"reward_clipping": true}', '{"no_such_option": 1}'):
        with pytest.raises(ValueError, match="--env-kwargs"):
            script.make_games(script.Args(env_kwargs=kwargs), 1)


# ---- Environments of one's own -------------------------------------------------------------------


@pytest.mark.parametrize("arrays", ["false", "true"])
def test_own_games_are_told_as_they_were(script, arrays):
    """Their arrays are copied: what was seen once stays as it was."""
    Diary.steps.clear(), Diary.games.clear()
    kept, returns = [], []
    with opened(script, env_id="PixelDiary-v0", env_kwargs=f'{{"arrays": {arrays}}}') as envs:
        for actions in random_actions(100):
            obs = envs.obs
            envs.send(actions)
            next_obs, rewards, terminated, truncated = envs.recv()
            for i in range(N):
                step = Diary.steps[number(obs[i, -1])]
                assert step.frames == numbers(obs[i]) and step.action == actions[i]
                assert (step.terminated, step.truncated) == (terminated[i], truncated[i])
                assert rewards[i] == 5 * actions[i]
                if not step.terminated or step.truncated:
                    assert step.next_frames == numbers(next_obs[i])
                ended = step.terminated or step.truncated
                assert (numbers(envs.obs[i])[:3] == (0, 0, 0)) == ended
                kept.append((obs[i], numbers(obs[i])))
        returns = [(total, length) for _, total, length in envs.finished]
        assert returns == Diary.games and len(returns) == envs.episodes.sum() > 50
        assert envs.render().shape == (336, 336, 3) and envs.render()[0, :4, 0].max() > 0
    assert all(numbers(frames) == expected for frames, expected in kept)


def test_only_some_environments_play(script):
    """The others do nothing, and their games are not counted."""
    with opened(script, env_id="PixelDiary-v0") as envs:
        for _ in range(30):
            before = envs.obs[:, -1]
            envs.step(np.array([2, 1]), np.array([0, 2]))
            assert [Diary.steps[number(frame)].action for frame in before] == [2, 0, 1]
        assert {(step - 1) % N for step, _, _ in envs.finished} == {0, 2} and envs.episodes.all()
        for step, total, length in envs.finished:
            assert total == (10 if step % N == 1 else 5) * length


@pytest.mark.parametrize("env_id, steps", [("PixelDiary-v0", 6), ("LimitedPixelDiary-v0", 9)])
def test_an_environment_without_a_time_limit_gets_one(script, monkeypatch, env_id, steps):
    monkeypatch.setattr(script, "MAX_EPISODE_STEPS", 6)
    with opened(script, env_id=env_id, env_kwargs='{"length": 1000}') as envs:
        truncated = [step[3].all() for step in play(envs, random_actions(steps))]
    assert truncated == [False] * (steps - 1) + [True]


def test_a_reward_that_is_not_finite_stops(script, monkeypatch):
    for value in (np.nan, np.inf):
        with opened(script, env_id="PixelDiary-v0") as envs:
            envs.envs[0].recv = lambda: (envs.obs, np.array([1.0, 1.0, value]), *"123")
            with pytest.raises(ValueError, match="not finite"):
                envs.recv()


@pytest.mark.parametrize("obs_space, action_space", [
    (gym.spaces.Box(0, 255, (84, 84, 4), np.uint8), gym.spaces.Discrete(3)),
    (gym.spaces.Box(0, 255, (4, 84, 84), np.float32), gym.spaces.Discrete(3)),
    (gym.spaces.Discrete(5), gym.spaces.Discrete(3)),
    (Diary.observation_space, gym.spaces.Discrete(257)),
    (Diary.observation_space, gym.spaces.Discrete(3, start=1)),
    (Diary.observation_space, gym.spaces.MultiDiscrete([3])),
])  # fmt: skip
def test_other_spaces_are_refused(script, monkeypatch, obs_space, action_space):
    monkeypatch.setattr(Diary, "observation_space", obs_space)
    monkeypatch.setattr(Diary, "action_space", action_space)
    with pytest.raises(ValueError, match="needs a game"):
        script.Envs(script.Args(env_id="PixelDiary-v0"), 1, 0)


def test_sticky_actions_are_for_the_emulator(script):
    with pytest.raises(ValueError, match="sticky"):
        script.Envs(script.Args(env_id="PixelDiary-v0", sticky_actions=0.25), 1, 0)


def test_seeds_never_meet(script):
    """Of runs, training and evaluation, environments and games. The emulator takes 31 bits."""
    seeds = []
    for seed, stream in itertools.product((1, 2, 3), (script.TRAINING, script.EVALUATION)):
        with opened(script, 8, stream, env_id="PixelDiary-v0", seed=seed) as envs:
            for envs.episodes[:] in range(50):
                seeds += [envs.new_seed(i) for i in range(8)]
    assert len(set(seeds)) == len(seeds) and 0 <= min(seeds) and max(seeds) < 2**31


# ---- Evaluation ----------------------------------------------------------------------------------


def network_of(script, args):
    with opened(script, 1, env_id="PixelDiary-v0") as envs:
        return script.make_network(args, envs)


def test_evaluation_is_whole_games_and_as_many_of_each_environment(each, monkeypatch, capsys):
    """6 games of 4 environments: two of the first and of the second. It draws no random number."""
    args = each.Args(eval_episodes=6, num_envs=4)
    network = network_of(each, args)
    monkeypatch.setattr(each, "make_games", games.Fixed)
    calls = games.recorded(monkeypatch, each, "play")
    before = torch.get_rng_state()
    returns, lengths = [1, 10, 2, 20, 3, 4], [1, 1, 2, 2, 3, 4]
    assert each.evaluate(args, network) == (np.mean(returns), np.mean(lengths))
    assert [len(obs) for (_, _, obs), _ in calls] == [4, 4, 3, 2]
    assert torch.equal(torch.get_rng_state(), before)
    assert f"return 6.7 ± {np.std(returns):.1f} over 6 episodes" in capsys.readouterr().out


@pytest.mark.parametrize("most, pictures", [(500, range(0, 21, 2)), (4, range(0, 21, 8))])
def test_the_first_game_is_drawn(each, monkeypatch, tmp_path, most, pictures):
    """Every second step; every fourth or eighth if that is too many pictures."""
    monkeypatch.setattr(each, "MAX_FRAMES", most)

    def render(envs):
        return np.full((9, 9, 3), 10 * envs.lengths[0], np.uint8)

    monkeypatch.setattr(each.Envs, "render", render)
    length = '{"length": 21}'
    args = each.Args(env_id="PixelDiary-v0", env_kwargs=length, eval_episodes=2, num_envs=1)
    each.evaluate(args, network_of(each, args), tmp_path / "x.gif")
    with Image.open(tmp_path / "x.gif") as gif:
        for i, step in enumerate(pictures):
            gif.seek(i)
            assert gif.convert("RGB").getpixel((4, 4))[0] == pytest.approx(10 * step, abs=8)
        assert gif.n_frames == len(pictures)


# ---- Training ------------------------------------------------------------------------------------


class Killed(Exception):
    pass


def test_interrupted_or_not_the_run_is_the_same(each, tmp_path, monkeypatch):
    """To the last bit: killed twice and resumed, with checkpoints at other times; own environments
    that truncate, with a reward and ends in arrays, too; with new seeds before and after."""
    interrupted(each, tmp_path, monkeypatch, "PixelDiary-v0", "{}", '{"arrays": true}')


@pytest.mark.slow
def test_interrupted_or_not_emulators_do_the_same(script, tmp_path, monkeypatch):
    interrupted(script, tmp_path, monkeypatch, "ALE/Breakout-v5", LIMITED, LIMITED)


def interrupted(script, tmp_path, monkeypatch, env_id, kwargs, other_kwargs):
    monkeypatch.setattr(script, "RESEED_FREQUENCY", 200)
    few = {"env_id": env_id, "env_kwargs": kwargs, "total_timesteps": 800, "eval_episodes": 1}
    args, recv = games.settings(script, tmp_path, **few), script.Envs.recv
    undisturbed = games.train(script, args)
    args = games.replace(args, checkpoint_frequency=90, env_kwargs=other_kwargs)
    for limit in (380, 690):

        def recv_until(self, *which):
            if self.steps > limit and self.stream == script.TRAINING:
                raise Killed
            return recv(self, *which)

        monkeypatch.setattr(script.Envs, "recv", recv_until)
        with pytest.raises(Killed):
            games.train(script, args)
        folder = max(tmp_path.iterdir())
        args = games.replace(args, resume=str(folder))
    monkeypatch.setattr(script.Envs, "recv", recv)
    games.train(script, args)
    assert same(learned(folder), learned(undisturbed))
    assert curves(folder) == curves(undisturbed)
    assert (learned(folder)["envs"]["episodes"] > 1).all()
