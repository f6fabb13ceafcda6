"""The scripts learn: the default run of each to its threshold, and small environments whose best return is known."""

import re

import pytest
from conftest import ROOT, Bench


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
    (flags,) = re.findall(r"Closest to the textbook: (.*)", reinforce.script.read_text())
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
