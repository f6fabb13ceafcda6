"""Small environments: what the scripts learn in the tests, and what people's own environments do.

What should happen with each stands with it. Their ids are cases:Compass-v0 and so on.
"""

import os
import socket
import time

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete, MultiDiscrete

# ---- To be learned, each to a best return that is known ------------------------------------------


class TwoStates(gym.Env):
    """In state 0, staying pays 0.1 and leaving 0; in state 1, staying pays 1 and leaving 0.

    The first reward is a trap. Best is to leave at once, then to stay: 9 in 10 steps. Its numbers
    are of another type than PyTorch's, and its actions are 7 and 8.
    """

    BEST = 9.0
    observation_space = Box(0, 1, (2,), np.float64)
    action_space = Discrete(2, start=7)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state, self.t = 0, 0
        return np.eye(2)[self.state], {}

    def step(self, action):
        leave = {7: False, 8: True}[int(action)]
        reward = 0.0 if leave else (0.1, 1.0)[self.state]
        self.state, self.t = self.state ^ leave, self.t + 1
        return np.eye(2)[self.state], reward, False, self.t == 10, {}


class Compass(gym.Env):
    """Each step shows -1 or 1; 1 for an action of this sign, in bounds that differ. Best: 10 of 10.

    Half of it is for the first number of the action, around 0, and half for the second, around 5.
    """

    BEST = 10.0
    observation_space = Box(-1, 1, (1,), np.float64)
    action_space = Box(np.array([-2, 0], np.float32), np.array([2, 10], np.float32))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.show(), {}

    def show(self):
        self.sign = self.np_random.choice([-1.0, 1.0], 1)
        return self.sign

    def step(self, action):
        assert self.action_space.contains(np.asarray(action, np.float32)), action
        reward = np.mean(np.sign(action - np.array([0, 5])) == self.sign)
        self.t += 1
        return self.show(), float(reward), self.t == 10, False, {}


class Side(gym.Env):
    """Each step shows a white half of the screen, left or right; 1 for saying which. Best: 20."""

    BEST = 20.0
    observation_space = Box(0, 255, (4, 84, 84), np.uint8)
    action_space = Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.frames = 0, np.zeros((4, 84, 84), np.uint8)
        return self.show(), {}

    def show(self):
        self.side = int(self.np_random.integers(2))
        frame = np.zeros((1, 84, 84), np.uint8)
        frame[:, :, 42 * self.side : 42 * self.side + 42] = 255
        self.frames = np.concatenate([self.frames[1:], frame])
        return self.frames

    def step(self, action):
        reward = float(action == self.side)
        self.t += 1
        return self.show(), reward, self.t == 20, False, {}


class Walk(gym.Env):
    """To a goal at -3 or 3, in whole steps, and to stay there: what is less than 1/3 is no step.

    Each of 6 steps pays 0 at the goal and -1 elsewhere. Best: -2.
    """

    BEST = -2.0
    action_space = Box(-1, 1, (1,), np.float64)
    observation_space = Dict({
        "achieved_goal": Box(-6, 6, (1,), np.float64), "desired_goal": Box(-6, 6, (1,), np.float64),
        "observation": Box(-9, 9, (2,), np.float64),
    })  # fmt: skip

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x, self.t, self.goal = np.zeros(1), 0, self.np_random.choice([-3.0, 3.0], 1)
        return self.show(), {}

    def show(self):
        observation = np.array([self.x[0], self.t])
        return {"achieved_goal": self.x, "desired_goal": self.goal, "observation": observation}

    def compute_reward(self, achieved, goals, info):
        return np.float64((achieved == goals).all(-1)) - 1

    def step(self, action):
        self.x, self.t = self.x + np.sign(action) * (np.abs(action) >= 1 / 3), self.t + 1
        reward = self.compute_reward(self.x, self.goal, {})
        return self.show(), float(reward), False, self.t == 6, {}


class Nim(gym.Env):
    """A heap of 6; two players take 1 to 3 of it in turn. Who takes the last one wins. Best: 1.

    That is to leave 4, whatever follows. The opponent does so where it can, and else takes 1.
    """

    BEST = 1.0
    observation_space, action_space = Box(0, 6, (1,), np.float32), Discrete(3)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.heap = 6
        return np.float32([self.heap]), {}

    def step(self, action):
        self.heap -= int(action) + 1
        if self.heap <= 0:
            return np.float32([self.heap]), 1.0 if self.heap == 0 else -1.0, True, False, {}
        self.heap -= self.heap % 4 or 1
        return np.float32([self.heap]), -float(self.heap == 0), self.heap == 0, False, {}

    def first_board(self):
        return np.float32([6])

    def legal_actions(self, boards):
        return boards >= np.arange(1, 4)

    def move(self, boards, actions):
        return boards - (actions[:, None] + 1)

    def has_lost(self, boards):
        return boards[:, 0] == 0


class Lamps(gym.Env):
    """Each of two agents sees a lamp of its own, on or off, and has a switch of three positions: 1
    for off, 2 for on. A step pays 1 if both are right, and -1 if none is. Best: 6.
    """

    BEST = 6.0
    observation_space, action_space = Box(0, 1, (2, 1), np.float64), MultiDiscrete([3, 3])

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.show(), {}

    def show(self):
        self.lamps = self.np_random.integers(2, size=(2, 1))
        return self.lamps.astype(np.float64)

    def step(self, action):
        right = int((action == self.lamps[:, 0] + 1).sum())
        self.t += 1
        return self.show(), right - 1.0, False, self.t == 6, {}


# With which of them each script is run: OWN in its test file.
OWN = {
    "discrete": TwoStates, "continuous": Compass, "pixels": Side, "goals": Walk, "boards": Nim,
    "teams": Lamps,
}  # fmt: skip


class Catch(gym.Env):
    """A ball falls through 7 rows of 7 squares. The player at the bottom stays, goes left or right.

    To catch the ball pays 1, to miss it -1. Whoever does not see the ball catches one in three.
    """

    observation_space = Box(0, 255, (4, 84, 84), np.uint8)
    action_space = Discrete(3)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.row, self.ball, self.player = 0, int(self.np_random.integers(7)), 3
        self.frames = np.zeros((4, 84, 84), np.uint8)
        return self.show(), {}

    def show(self):
        squares = np.zeros((7, 7), np.uint8)
        squares[self.row, self.ball] = 255
        squares[6, self.player] = 128
        frame = np.kron(squares, np.ones((1, 12, 12), np.uint8))
        self.frames = np.concatenate([self.frames[1:], frame])
        return self.frames

    def step(self, action):
        self.row += 1
        self.player = min(max(self.player + (0, -1, 1)[action], 0), 6)
        reward = 0.0 if self.row < 6 else 1.0 if self.ball == self.player else -1.0
        return self.show(), reward, self.row == 6, False, {}


class Aim(gym.Env):
    """Each of 10 steps shows a place from -1 to 1. Best: an action there, and opposite of it.

    The place is in bounds of 0 to 10 in the first number, its opposite in -2 to 2 in the second.
    1 less the two distances, each in halves of its range: 10 is best, always the middle gets 0.
    """

    observation_space = Box(-1, 1, (1,), np.float32)
    action_space = Box(np.array([0, -2], np.float32), np.array([10, 2], np.float32))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.show(), {}

    def show(self):
        self.place = self.np_random.uniform(-1, 1, 1).astype(np.float32)
        return self.place

    def step(self, action):
        assert self.action_space.contains(action.astype(np.float32))
        first, second = (action - np.array([5, 0])) / np.array([5, 2])
        reward = 1 - abs(first - self.place[0]) - abs(second + self.place[0])
        self.t += 1
        return self.show(), float(reward), False, self.t == 10, {}


# ---- As people write them ------------------------------------------------------------------------


class Line(gym.Env):
    """Twenty steps on a line; to the right pays 1. Nothing odd. Counts what is done with it."""

    observation_space = Box(-100, 100, (1,), np.float32)
    action_space = Discrete(2)
    made = closed = most_open = 0  # environments of this class

    def __init__(self, render_mode=None):
        kind, self.total = type(self), 0  # steps of this object
        kind.made += 1
        kind.most_open = max(kind.most_open, kind.made - kind.closed)

    def close(self):
        type(self).closed += 1

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x, self.t = 0, 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.x, self.t, self.total = self.x + (1 if action == 1 else -1), self.t + 1, self.total + 1
        return np.full(1, self.x / 10, np.float32), float(action == 1), False, self.t == 20, {}


class Port(Line):
    """A simulator behind one port: there can be only one. Trains, evaluates, closes."""

    def __init__(self, render_mode=None):
        super().__init__()
        self.socket = socket.socket()
        self.socket.bind(("127.0.0.1", int(os.environ["CASE_PORT"])))

    def close(self):
        self.socket.close()


class Remembers(Line):
    """Another first observation at each reset. Runs; resuming it warns, and is not exact."""

    def reset(self, **options):
        obs, info = super().reset(**options)
        return obs + self.total / 1000, info


class TerminatedArray(Line):
    """`terminated` is an array, as a comparison of arrays gives. Learned as with a plain bool."""

    def step(self, action):
        obs, _, _, truncated, info = super().step(action)
        end = obs * 10 >= 5
        return obs, 1.0 if end else -0.1, end, truncated, info


class RewardArray(Line):
    """The reward is an array of one number. Taken as this number."""

    def step(self, action):
        obs, reward, *rest = super().step(action)
        return obs, np.array([reward]), *rest


class NotFinite(Line):
    """One reward or observation is no number. Stops with one line; the last checkpoint is good."""

    def __init__(self, reward=0.0, obs=0.0, render_mode=None):
        super().__init__()
        self.add = {"nan": np.nan, "inf": np.inf}.get(reward, 0), {"nan": np.nan}.get(obs, 0)

    def step(self, action):
        obs, reward, *rest = super().step(action)
        now = float(self.total == 300)
        return (obs + self.add[1], reward + self.add[0], *rest) if now else (obs, reward, *rest)


class Rich(Line):
    """Rewards so large that no sum of them is finite: the training diverges."""

    def step(self, action):
        obs, _, *rest = super().step(action)
        return obs, 3e38, *rest


class Lavish(Compass):
    """The same with actions of two numbers."""

    def step(self, action):
        obs, _, *rest = super().step(action)
        return obs, 3e38, *rest


class Long(Line):
    """Episodes of 4,000 steps, paid at the end. They end and are logged, whatever is saved."""

    def step(self, action):
        self.t += 1
        obs = np.full(1, self.t / 4000, np.float32)
        return obs, float(self.t == 4000), False, self.t == 4000, {}


class Endless(Line):
    """An episode never ends by itself. It gets a time limit."""

    def step(self, action):
        obs, reward, *_ = super().step(action)
        return obs, reward, False, False, {}


class Disconnects(Line):
    """A connection is lost. Keeps its traceback; the last lines say the step, and how to go on."""

    def step(self, action):
        if self.total == 300 and not os.path.exists("mended"):
            raise ConnectionResetError(104, "Connection reset by peer")
        return super().step(action)


class Sleeps(Line):
    """A step takes for ever. The second Ctrl-C ends it."""

    def step(self, action):
        if self.total == 300:
            open("asleep", "w").close()
            time.sleep(3600)
        return super().step(action)


class NoWindow(Line):
    """Its own error speaks of allocating. Keeps its traceback: this is no lack of memory."""

    def step(self, action):
        raise RuntimeError("could not allocate a window: no display")


class Square(Line):
    """Observations of two dimensions."""

    observation_space = Box(-100, 100, (2, 3), np.float32)

    def reset(self, **options):
        return np.zeros((2, 3), np.float32), super().reset(**options)[1]

    def step(self, action):
        obs, *rest = super().step(action)
        return np.full((2, 3), obs, np.float32), *rest


class Parts(Line):
    """Observations with two parts, one of them no numbers but a choice."""

    observation_space = Dict({"x": Box(-100, 100, (1,), np.float32), "right": Discrete(2)})

    def reset(self, **options):
        obs, info = super().reset(**options)
        return {"x": obs, "right": 0}, info

    def step(self, action):
        obs, *rest = super().step(action)
        return {"x": obs, "right": int(obs[0] > 0)}, *rest


class Paid(Line):
    """Takes an argument: what a step to the right pays."""

    def __init__(self, pay, render_mode=None):
        super().__init__()
        self.pay = pay

    def step(self, action):
        obs, reward, *rest = super().step(action)
        return obs, self.pay * reward, *rest


class HugeBounds(Line):
    """No real bounds, written as the largest float. Refused as infinite ones are."""

    action_space = Box(-np.finfo(np.float32).max, np.finfo(np.float32).max, (1,), np.float32)


class Drawn(Line):
    """Episodes of 3,000 steps. The white pixel tells the step."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 50}

    def step(self, action):
        obs, reward, *_ = super().step(action)
        return obs, reward, False, self.t == 3000, {}

    def render(self):
        picture = np.zeros((60, 51, 3), np.uint8)
        picture.reshape(-1, 3)[self.t] = 255
        return picture


class CannotBeDrawn(Line):
    """--capture-video is refused in one line, before the training."""

    metadata = {"render_modes": ["rgb_array"]}

    def __init__(self, way="", render_mode=None):
        super().__init__()
        self.way = way

    def render(self):
        if self.way == "error":
            raise RuntimeError("no OpenGL")
        pictures = {"grey": np.zeros((9, 9, 1), np.uint8), "flat": np.zeros((9, 9), np.uint8)}
        return pictures.get(self.way, np.zeros((9, 9, 3)) if self.way == "floats" else None)


for name, case in list(globals().items()):
    if isinstance(case, type) and issubclass(case, gym.Env):
        gym.register(f"{name}-v0", entry_point=case)
