"""Trains with a library of Stable-Baselines3's family, for speed.py:

    python sb3.py LIBRARY ALGORITHM SEED STEPS FIRST PEER

LIBRARY is stable_baselines3, sb3_contrib or sbx. PEER is the JSON of a peer in SPEED (speed.py).
Prints the steps per second after step FIRST.
"""

import importlib
import json
import sys
import time

from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_atari_env, make_vec_env
from stable_baselines3.common.vec_env import VecFrameStack, VecNormalize


class Clock(BaseCallback):
    """Notes when each rollout ended."""

    def __init__(self) -> None:
        super().__init__()
        self.times = []

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        self.times.append((self.num_timesteps, time.perf_counter()))


library, algorithm = importlib.import_module(sys.argv[1]), sys.argv[2]
seed, steps, first = map(int, sys.argv[3:6])
peer = json.loads(sys.argv[6])
env_id, num_envs, policy = peer["env_id"], peer["num_envs"], peer.get("policy", "MlpPolicy")
if "NoFrameskip" in env_id:
    import ale_py.registration

    ale_py.registration.register_v0_v4_envs()
    envs = VecFrameStack(make_atari_env(env_id, n_envs=num_envs, seed=seed), n_stack=4)
    policy = "CnnPolicy"
else:
    envs = make_vec_env(env_id, n_envs=num_envs, seed=seed)
if peer.get("normalize"):
    envs = VecNormalize(envs)
model = getattr(library, algorithm)(policy, envs, seed=seed, **peer["settings"])
clock = Clock()
model.learn(steps, callback=clock)
times = [point for point in clock.times if point[0] >= first]
print((times[-1][0] - times[0][0]) / (times[-1][1] - times[0][1]))
