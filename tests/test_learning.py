"""The scripts learn: the default run of each to its threshold, and small environments whose best return is known."""

import re

import pytest
import torch
from conftest import ROOT, Bench

BFLOAT16 = pytest.mark.skipif(
    not getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)(), reason="takes minutes without instructions for it"
)

def final_return(result):
    assert result.code == 0, result
    (found,) = re.findall(r"Evaluation: return (-?[\d.]+) ±", result.out)
    return float(found)


@pytest.fixture
def reinforce(tmp_path):
    return Bench(ROOT / "cleanrl_style" / "reinforce_cartpole.py", tmp_path)


def test_reinforce_default_run_solves_cartpole(reinforce):
    """475 over 100 episodes is what Gymnasium registers as solved."""
    assert final_return(reinforce.run("--seed", 1)) >= 475


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2, 3])
def test_reinforce_default_run_solves_cartpole_with_other_seeds(reinforce, seed):
    assert final_return(reinforce.run("--seed", seed)) >= 475


@pytest.mark.slow
def test_reinforce_solves_acrobot_with_the_flags_of_its_docstring(reinforce):
    (flags,) = re.findall(r"python reinforce_cartpole.py (--env-id Acrobot-v1.*)", reinforce.script.read_text())
    assert final_return(reinforce.run(*flags.split())) >= -100


@pytest.mark.slow
def test_reinforce_in_the_textbooks_form_learns(reinforce):
    """Nobody claims that it solves CartPole in so few steps; a policy that plays at random gets 22."""
    (flags,) = re.findall(r"Textbook form: (.*)", reinforce.script.read_text())
    assert final_return(reinforce.run(*flags.split())) >= 60


TWO_STATES = """
import gymnasium as gym
import numpy as np


class TwoStates(gym.Env):
    '''In state 0, to stay pays 0.1 and to leave nothing; in state 1, to stay pays 1 and to leave nothing.
    The first reward is a trap: the best of the 10 steps is to leave at once and then to stay, for 9.'''
    observation_space = gym.spaces.Box(0, 1, (2,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state, self.t = 0, 0
        return np.eye(2, dtype=np.float32)[self.state], {}

    def step(self, leave):
        reward = 0.0 if leave else (0.1, 1.0)[self.state]
        self.state, self.t = self.state ^ leave, self.t + 1
        return np.eye(2, dtype=np.float32)[self.state], reward, False, self.t == 10, {}


gym.register("TwoStates-v0", entry_point=TwoStates)
"""


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)])
def test_reinforce_finds_the_delayed_reward_of_two_states(reinforce, seed):
    (reinforce.folder / "two_states.py").write_text(TWO_STATES)
    flags = ["--env-id", "two_states:TwoStates-v0", "--total-timesteps", 10_000, "--eval-episodes", 1, "--seed", seed]
    assert final_return(reinforce.run(*flags)) == 9.0


# ---- DQN ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def dqn(tmp_path):
    return Bench(ROOT / "cleanrl_style" / "dqn_cartpole.py", tmp_path)


@pytest.mark.slow
def test_dqn_default_run_learns_cartpole(dqn):
    """Nine seeds of ten reach 500, the record says; which do depends on the processor's last bits. Chance gets 22."""
    assert final_return(dqn.run("--seed", 1, timeout=600)) >= 195


@pytest.mark.parametrize(
    "flags",
    ["", pytest.param("--double-q --tau 0.02 --target-network-frequency 4 --num-envs 1", marks=pytest.mark.slow)],
)
def test_dqn_finds_the_delayed_reward_of_two_states(dqn, flags):
    """Among 2 states and 2 actions there is no reason to miss it."""
    (dqn.folder / "two_states.py").write_text(TWO_STATES)
    few = ["--env-id", "two_states:TwoStates-v0", "--total-timesteps", 6000, "--eval-episodes", 1]
    assert final_return(dqn.run(*few, *flags.split())) == 9.0


CATCH = """
import gymnasium as gym
import numpy as np


class Catch(gym.Env):
    '''A ball falls through 7 rows of 7 squares, each of 12 x 12 pixels. The player at the bottom stays, goes left or
    goes right: to catch the ball pays 1, to miss it -1. Whoever does not see the ball catches one in three.'''
    observation_space = gym.spaces.Box(0, 255, (4, 84, 84), np.uint8)
    action_space = gym.spaces.Discrete(3)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.row, self.ball, self.player = 0, int(self.np_random.integers(7)), 3
        self.frames = np.zeros((4, 84, 84), np.uint8)
        return self.draw(), {}

    def draw(self):
        squares = np.zeros((7, 7), np.uint8)
        squares[self.row, self.ball] = 255
        squares[6, self.player] = 128
        self.frames = np.concatenate([self.frames[1:], np.kron(squares, np.ones((1, 12, 12), np.uint8))])
        return self.frames

    def step(self, action):
        self.row += 1
        self.player = min(max(self.player + (0, -1, 1)[action], 0), 6)
        reward = 0.0 if self.row < 6 else 1.0 if self.ball == self.player else -1.0
        return self.draw(), reward, self.row == 6, False, {}


gym.register("Catch-v0", entry_point=Catch)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    ["--precision float32", pytest.param("--double-q --precision bfloat16 --loss squared --tau 0.5", marks=BFLOAT16)],
)
def test_dqn_learns_to_catch_from_pixels(tmp_path, flags):
    """Atari games take hours; this one has as many pixels, and its best return, 1, is known. Chance gets about -0.5."""
    bench = Bench(ROOT / "cleanrl_style" / "dqn_atari.py", tmp_path)
    (tmp_path / "catch.py").write_text(CATCH)
    result = bench.run(
        "--env-id", "catch:Catch-v0", "--total-timesteps", 8000, "--buffer-size", 8000, "--learning-starts", 500,
        "--learning-rate", 5e-4, "--exploration-fraction", 0.5, "--target-network-frequency", 400, "--batch-size", 16,
        "--eval-episodes", 100, "--eval-epsilon", 0, *flags.split(), timeout=600,
    )  # fmt: skip
    assert final_return(result) >= 0.9


# ---- PPO ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def ppo(tmp_path):
    return Bench(ROOT / "cleanrl_style" / "ppo_cartpole.py", tmp_path)


@pytest.mark.slow
def test_ppo_default_run_solves_cartpole(ppo):
    assert final_return(ppo.run("--seed", 1)) >= 475


@pytest.mark.parametrize(
    "flags",
    ["", pytest.param("--norm-obs --norm-reward --clip-vloss --ent-coef 0.01 --num-envs 1", marks=pytest.mark.slow)],
)
def test_ppo_finds_the_delayed_reward_of_two_states(ppo, flags):
    (ppo.folder / "two_states.py").write_text(TWO_STATES)
    few = ["--env-id", "two_states:TwoStates-v0", "--total-timesteps", 10_000, "--eval-episodes", 1]
    assert final_return(ppo.run(*few, *flags.split())) == 9.0


AIM = """
import gymnasium as gym
import numpy as np


class Aim(gym.Env):
    '''Ten steps; each shows a place between -1 and 1. The best action is there, in bounds of 0 to 10 in the first
    number, and at the opposite place, in bounds of -2 to 2, in the second. The pay is 1 less the two distances, each in
    halves of its range.'''
    observation_space = gym.spaces.Box(-1, 1, (1,), np.float32)
    action_space = gym.spaces.Box(np.array([0, -2], np.float32), np.array([10, 2], np.float32))

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


gym.register("Aim-v0", entry_point=Aim)
"""


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["", "--no-norm-obs --no-norm-reward --clip-vloss --target-kl 0.05"])
def test_ppo_aims_with_actions_of_different_bounds(tmp_path, flags):
    """The most is 10. To aim at the middle, whatever is shown, gets 0."""
    bench = Bench(ROOT / "cleanrl_style" / "ppo_continuous.py", tmp_path)
    (tmp_path / "aim.py").write_text(AIM)
    few = ["--env-id", "aim:Aim-v0", "--total-timesteps", 80_000, "--num-steps", 256, "--num-minibatches", 8]
    assert final_return(bench.run(*few, *flags.split())) >= 9


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags", ["--precision float32", pytest.param("--precision bfloat16 --norm-obs --no-clip-vloss", marks=BFLOAT16)]
)
def test_ppo_learns_to_catch_from_pixels(tmp_path, flags):
    bench = Bench(ROOT / "cleanrl_style" / "ppo_atari.py", tmp_path)
    (tmp_path / "catch.py").write_text(CATCH)
    result = bench.run(
        "--env-id", "catch:Catch-v0", "--total-timesteps", 20_000, "--num-steps", 32, "--learning-rate", 1e-3,
        "--clip-coef", 0.2, "--eval-episodes", 100, *flags.split(), timeout=600,
    )  # fmt: skip
    assert final_return(result) >= 0.9
