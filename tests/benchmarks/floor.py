"""The speed that a script cannot beat: python floor.py SCRIPT FIRST LAST [FLAGS OF THE SCRIPT]

Prints the steps per second that would be left if nothing took time but the emulator, and the
multiplications and additions of the networks at the rate of this machine's best matrix product
(but not those of acting in NumPy, which are few).
They are counted between the steps FIRST and LAST of a training. One thread for scripts that set
one, else all cores.
"""

import importlib
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import tyro
from torch.utils.flop_counter import FlopCounterMode

sys.path.append(str(Path(__file__).resolve().parent.parent.parent / "cleanrl_style"))


def operations(script, args) -> int:
    """Of a whole training, without the evaluation."""
    script.evaluate = lambda *_: (0.0, 0.0)
    with tempfile.TemporaryDirectory() as runs, FlopCounterMode(display=False) as counter:
        script.train(replace(args, runs_dir=runs))
    return counter.get_total_flops()


def best_rate(dtype: torch.dtype, seconds: float = 1.0) -> float:
    """Operations per second of the fastest square matrix product."""
    rates = []
    for size in (256, 512, 1024, 2048):
        a, b = torch.randn(2, size, size, dtype=dtype)
        end = time.perf_counter() + seconds
        while (start := time.perf_counter()) < end:
            a @ b
            rates.append(2 * size**3 / (time.perf_counter() - start))
    return max(rates)


def emulator(script, args, seconds: float = 2.0) -> float:
    """Seconds for one step of the environment by random actions."""
    if hasattr(script, "STACK"):  # from pixels: N games at a time, in threads of their own
        envs = script.Envs(args, args.num_envs, script.TRAINING)
        envs.reset()
        actions = np.random.default_rng(0).integers(envs.action_space.n, size=(500, args.num_envs))
        rounds, start = 0, time.perf_counter()
        while time.perf_counter() < start + seconds:
            envs.send(actions[rounds % 500])
            envs.recv()
            rounds += 1
        return (time.perf_counter() - start) / rounds / args.num_envs
    env = gym.make(args.env_id)
    env.reset(seed=1)
    actions, steps, start = [env.action_space.sample() for _ in range(500)], 0, time.perf_counter()
    while time.perf_counter() < start + seconds:
        _, _, terminated, truncated, _ = env.step(actions[steps % 500])
        steps += 1
        if terminated or truncated:
            env.reset()
    return (time.perf_counter() - start) / steps


if __name__ == "__main__":
    script, first, last = importlib.import_module(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    args = tyro.cli(script.Args, args=sys.argv[4:])
    fewer, more = (
        operations(script, replace(args, total_timesteps=steps)) for steps in (first, last)
    )
    # A training leaves the number of threads as it was.
    torch.set_num_threads(args.num_threads or script.available_cores())
    dtype = torch.bfloat16 if getattr(args, "precision", "") == "bfloat16" else torch.float32
    products = (more - fewer) / (last - first) / best_rate(dtype)  # seconds for one step
    print(1 / (products + emulator(script, args)))
