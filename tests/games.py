"""For the tests of scripts that learn from pixels: small games, and what was played in them."""

import importlib
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import gymnasium as gym
import numpy as np
import torch
from conftest import learned, same


def picture(number):
    """A frame that shows a number of 32 bits. Number 0 is black, as before the start of a game."""
    frame = np.zeros((84, 84), np.uint8)
    frame[0, :4] = np.frombuffer(np.uint32(number).tobytes(), np.uint8)
    return frame


def number(frame):
    return int(np.frombuffer(np.asarray(frame)[0, :4].tobytes(), np.uint32)[0])


def numbers(frames):
    return tuple(number(frame) for frame in frames)


class Step(NamedTuple):
    frames: tuple  # the numbers that they show
    action: int
    reward: float  # its sign
    next_frames: tuple
    terminated: bool
    truncated: bool


class Diary(gym.Env):
    """Every frame shows another number, and every step is written down. A step pays 5 * action.

    Games have 1 to 8 steps. Odd lengths terminate, even ones are truncated, 3 steps do both. Seed
    and actions determine all frames. Observations are in one array, which is used again and again.
    With `arrays`, the reward and the ends are arrays of one number. `length` is that of all games.
    """

    observation_space = gym.spaces.Box(0, 255, (4, 84, 84), np.uint8)
    action_space = gym.spaces.Discrete(3)
    steps = {}  # number of the newest frame -> Step
    games = []  # (return, length) of each game that ended

    def __init__(self, arrays=False, length=None):
        self.wrap = np.atleast_1d if arrays else lambda value: value
        self.fixed_length = length

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.number = self.number if seed is None else seed
        self.length, self.t, self.total = int(self.np_random.integers(1, 9)), 0, 0
        self.length = self.fixed_length or self.length
        self.frames = np.zeros((4, 84, 84), np.uint8)
        return self.show(1), {}

    def show(self, difference):
        self.number += difference
        self.frames[:-1] = self.frames[1:].copy()
        self.frames[-1] = picture(self.number)
        return self.frames

    def step(self, action):
        before, obs = numbers(self.frames), self.show(1 + int(action))
        self.t, self.total = self.t + 1, self.total + 5 * int(action)
        over = self.t == self.length
        ends = over and self.length % 2 == 1, over and (self.length % 2 == 0 or self.length == 3)
        reward = float(np.sign(action))
        self.steps[before[-1]] = Step(before, int(action), reward, numbers(obs), *ends)
        if over:
            self.games.append((self.total, self.t))
        return obs, self.wrap(5.0 * action), self.wrap(ends[0]), self.wrap(ends[1]), {}


gym.register("PixelDiary-v0", entry_point=Diary)
gym.register("LimitedPixelDiary-v0", entry_point=Diary, max_episode_steps=9)


class Fixed:
    """In place of `make_games`: game g of environment n has n + 1 steps, each pays 10 to the g."""

    single_observation_space, single_action_space = Diary.observation_space, Diary.action_space

    def __init__(self, args, num_envs):
        self.n, self.obs = np.arange(num_envs), np.zeros((num_envs, 4, 84, 84), np.uint8)

    def reset(self, seed, options):
        self.t, self.games = np.zeros((2, len(self.n)), int)
        return self.obs, {"lives": self.n}

    def send(self, actions):
        assert actions.shape == self.n.shape

    def recv(self):
        self.t += 1
        rewards, ended = 10.0**self.games, self.t > self.n
        self.t[ended], self.games = 0, self.games + ended
        return self.obs, rewards, ended, np.zeros(len(self.n), bool), {"lives": self.n}

    def close(self):
        pass


# ---- To train in this process --------------------------------------------------------------------


def settings(script, tmp_path, **changes):
    """The arguments of the script's TINY, for a run in tmp_path."""
    tiny, command = importlib.import_module(f"test_{script.SCRIPT}").TINY, sys.argv
    try:
        sys.argv = [script.SCRIPT, *tiny.split()]
        return replace(script.parse_args(), runs_dir=str(tmp_path), **changes)
    finally:
        sys.argv = command


def train(script, args):
    """Returns the folder of the run. What the diary says is of this run, and its evaluation."""
    Diary.steps.clear(), Diary.games.clear()
    return Path(script.train(args).folder)


def copied(value):
    """A training uses its arrays again."""
    if isinstance(value, tuple):
        parts = map(copied, value)
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if isinstance(value, np.ndarray):
        return value.copy()
    return value.clone() if type(value) is torch.Tensor else value


def recorded(monkeypatch, script, name):
    """Every call of a function of the script from now on: its arguments and its result."""
    calls, function = [], getattr(script, name)

    def recording(*arguments):
        calls.append((copied(arguments), copied(function(*arguments))))
        return calls[-1][1]

    monkeypatch.setattr(script, name, recording)
    return calls


def check_settings(script, train, changes, others):
    """Every setting of the algorithm has an effect, but for some others; nothing else has one."""
    names = list(script.Args.__dataclass_fields__)
    algorithm = names[names.index("num_envs") : names.index("exp_name")]
    assert {*changes, *others} == {"seed", "total_timesteps", *algorithm}
    plain = learned(train())["network"]
    for name, value in changes.items():
        assert not same(learned(train(**{name: value}))["network"], plain), name
    others = others | {"exp_name": "other", "checkpoint_frequency": 70, "eval_frequency": 50}
    assert same(learned(train(**others))["network"], plain)
