"""Trains with Stable-Baselines3, for speed.py: python sb3.py {ppo,ppo_continuous,ppo_atari,dqn,dqn_atari} SEED STEPS FIRST

Prints the steps per second after step FIRST. The settings are those that speed.py gives CleanRL and us.
"""

import sys
import time

from stable_baselines3 import DQN, PPO
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


def atari(num_envs: int) -> VecFrameStack:
    import ale_py.registration

    ale_py.registration.register_v0_v4_envs()
    return VecFrameStack(make_atari_env("BreakoutNoFrameskip-v4", n_envs=num_envs, seed=seed), n_stack=4)


algorithm, seed, steps, first = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
clock = Clock()
if algorithm == "ppo":
    envs = make_vec_env("CartPole-v1", n_envs=4, seed=seed)
    model = PPO("MlpPolicy", envs, n_steps=128, batch_size=128, n_epochs=4, learning_rate=2.5e-4, ent_coef=0.01,
                clip_range_vf=0.2, seed=seed, device="cpu")  # fmt: skip
elif algorithm == "ppo_continuous":
    envs = VecNormalize(make_vec_env("Pendulum-v1", n_envs=1, seed=seed))
    model = PPO("MlpPolicy", envs, n_steps=2048, batch_size=64, n_epochs=10, learning_rate=3e-4, clip_range_vf=0.2,
                seed=seed, device="cpu")  # fmt: skip
elif algorithm == "ppo_atari":
    model = PPO("CnnPolicy", atari(8), n_steps=128, batch_size=256, n_epochs=4, learning_rate=2.5e-4, ent_coef=0.01,
                clip_range=0.1, clip_range_vf=0.1, seed=seed)  # fmt: skip
elif algorithm == "dqn_atari":
    model = DQN("CnnPolicy", atari(1), buffer_size=20_000, learning_starts=1_000, batch_size=32, train_freq=4,
                gradient_steps=1, target_update_interval=1_000, learning_rate=1e-4, exploration_initial_eps=0.01,
                exploration_final_eps=0.01, seed=seed)  # fmt: skip
else:
    envs = make_vec_env("CartPole-v1", n_envs=10, seed=seed)
    model = DQN("MlpPolicy", envs, buffer_size=10_000, learning_starts=10_000, batch_size=128, train_freq=1,
                gradient_steps=1, target_update_interval=500, exploration_initial_eps=0.05, exploration_final_eps=0.05,
                learning_rate=2.5e-4, policy_kwargs={"net_arch": [128, 128]}, seed=seed, device="cpu")  # fmt: skip
model.learn(steps, callback=clock)
times = [point for point in clock.times if point[0] >= first]
print((times[-1][0] - times[0][0]) / (times[-1][1] - times[0][1]))
