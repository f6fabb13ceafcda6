"""How ppo_atari_distributed.py scales: measured on this machine, and from a model beyond it.

    python tests/benchmarks/scale.py
    python tests/benchmarks/scale.py --rounds 3 --flags "--env-id ALE/Pong-v5 --num-envs 32"

It trains by one rank with one thread, one rank with two, and two ranks with one thread each,
alternating, and measures the parts of an iteration apart, on one thread:

    acting, for n games on a rank        t * (a0 + a1 * n)          T steps of policy and emulators
    the gradient of a share of B steps   u * (g0 + g1 * B)          u gradient steps
    clipping and Adam                    u * s
    the all-reduce of the gradient       u * (2 (W - 1) latency + 2 (W - 1) / W * bytes / bandwidth)

The last line is that of a ring. Their sum is the model of an iteration on W ranks. It is compared
with what was measured, and tells at how many ranks the all-reduce is 10% of an iteration over
networks that this machine does not have. Nothing else may run meanwhile.
"""

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
import tyro
from learn import SCRIPTS, processor
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

sys.path.append(str(SCRIPTS))
import ppo_atari_distributed as script  # noqa: E402

FILE = SCRIPTS / "ppo_atari_distributed.py"
NETWORKS = {  # bytes per second between two ranks, seconds of latency: nominal, not measured
    "Ethernet of 10 Gbit/s": (1.25e9, 30e-6),
    "NVLink of an A100, 300 GB/s in one direction": (300e9, 5e-6),
}
SETTINGS = {"1 rank, 1 thread": (1, 1), "1 rank, 2 threads": (1, 2), "2 ranks, 1 thread": (2, 1)}


def training(ranks: int, threads: int, flags: str, iterations: int) -> float:
    """Seconds of an iteration of a whole training, without the first two."""
    args = tyro.cli(script.Args, args=shlex.split(flags))
    size = args.num_envs * args.num_steps
    with tempfile.TemporaryDirectory() as runs:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
        options = f"--num-threads {threads} --total-timesteps {size * iterations} --runs-dir {runs}"
        command += [str(FILE), *shlex.split(flags), *options.split(), "--eval-episodes", "1"]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        subprocess.run(command, check=True, capture_output=True, env=environment)
        (folder,) = Path(runs).iterdir()
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
        times = [event.wall_time for event in events.Scalars("losses/entropy")]
    return (times[-1] - times[1]) / (len(times) - 2)


def seconds(function, repeats: int = 15) -> float:
    """The median time of a call."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return median(times[2:])


def line(points: dict[int, float]) -> tuple[float, float]:
    """Intercept and slope, by least squares of the relative errors."""
    x, y = np.array(list(points)), np.array(list(points.values()))
    solution = np.linalg.lstsq(np.stack([1 / y, x / y], 1), np.ones(len(x)), rcond=None)[0]
    return tuple(solution.tolist())


def parts(args: script.Args) -> dict[str, tuple[float, float] | float]:
    """a0 and a1, g0 and g1, s, in seconds, on one thread."""
    torch.set_num_threads(1)
    acting, gradients = {}, {}
    for n in (2, 4, 8, 16):
        envs = script.Envs(args, n, script.TRAINING)
        agent = script.make_network(args, envs)
        envs.reset()

        def act(n=n, envs=envs, agent=agent):
            envs.send(script.act(agent, envs.obs, script.draw_noise(n, agent))[0])
            envs.recv()

        acting[n] = seconds(act, 200)
        envs.close()
    optimizer = torch.optim.Adam(agent.parameters(), fused=True)
    for size in (32, 64, 128, 256):
        frames = torch.randint(0, 256, (size, 4, 84, 84), dtype=torch.uint8)
        batch = script.Batch(frames, torch.zeros(size, dtype=int), *torch.randn(4, size))
        gradients[size] = seconds(lambda batch=batch: script.compute_gradient(agent, batch, args))
        optimizer.zero_grad()

    def step():
        torch.nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
        optimizer.step()

    script.compute_gradient(agent, batch, args)
    return {"acting": line(acting), "gradient": line(gradients), "step": seconds(step)}


def all_reduce(repeats: int = 200) -> float:
    """Seconds of the average of a gradient over two ranks here; this file is run by torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", __file__]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    found = subprocess.run(
        [*command, "--all-reduce", str(repeats)], check=True, capture_output=True, text=True,
        env=environment,
    )  # fmt: skip
    return float(found.stdout.split()[-1])


def time_all_reduce(repeats: int) -> None:
    ranks = script.Ranks(script.Args())
    agent = script.Agent(6, False, False)
    gradients = [torch.randn_like(weights) for weights in agent.parameters()]
    time_of_one = seconds(lambda: ranks.average(gradients), repeats)
    if ranks.rank == 0:
        print(time_of_one, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=8)
    parser.add_argument("--flags", default="--env-id ALE/Pong-v5")
    parser.add_argument("--all-reduce", type=int, help=argparse.SUPPRESS)
    ours = parser.parse_args()
    if ours.all_reduce:
        return time_all_reduce(ours.all_reduce)
    args = tyro.cli(script.Args, args=shlex.split(ours.flags))
    measured = {name: [] for name in SETTINGS}
    for _ in range(ours.rounds):
        for name, setting in SETTINGS.items():
            measured[name].append(training(*setting, ours.flags, ours.iterations))
            print(f"{name}: {measured[name][-1]:.3f} s", file=sys.stderr, flush=True)
    cost, reduce = parts(args), all_reduce()
    agent = script.Agent(6, False, False)
    size = 4 * sum(weights.numel() for weights in agent.parameters())  # bytes
    minibatch = args.num_steps * args.num_envs / args.num_minibatches
    updates = args.update_epochs * args.num_minibatches

    def acting(world):
        return args.num_steps * (cost["acting"][0] + cost["acting"][1] * args.num_envs / world)

    def learning(world, share=None):
        share = minibatch / world if share is None else share
        return updates * (cost["gradient"][0] + cost["gradient"][1] * share + cost["step"])

    print(f"On {processor()}, {os.cpu_count()} cores, `{ours.flags}`, {ours.rounds} rounds.\n")
    print("| | seconds of an iteration, median | all rounds | the model |\n|-|-:|-|-:|")
    model = {1: acting(1) + learning(1), 2: acting(2) + learning(2) + updates * reduce}
    for name, (world, threads) in SETTINGS.items():
        rounds = ", ".join(f"{value:.3f}" for value in measured[name])
        guess = f"{model[world]:.3f}" if threads == 1 else ""
        print(f"| {name} | {median(measured[name]):.3f} | {rounds} | {guess} |")
    print(f"\nParts, in ms, on one thread: acting {1e3 * cost['acting'][0]:.2f} + "
          f"{1e3 * cost['acting'][1]:.2f} n for a step of n games; gradient "
          f"{1e3 * cost['gradient'][0]:.2f} + {1e3 * cost['gradient'][1]:.3f} B; clipping and Adam "
          f"{1e3 * cost['step']:.2f}; all-reduce of {size / 1e6:.1f} MB between two ranks here "
          f"{1e3 * reduce:.2f}.\n")  # fmt: skip
    print("| network | ranks | iteration, s | faster than one rank | all-reduce |\n|-|-:|-:|-:|-:|")
    for network, (bandwidth, latency) in NETWORKS.items():
        for world in (2, 4, 8, 16, 32, 64):
            ring = 2 * (world - 1) * (latency + size / world / bandwidth)
            total = acting(world) + learning(world) + updates * ring
            print(f"| {network} | {world} | {total:.3f} | {model[1] / total:.1f} x | "
                  f"{updates * ring / total:.0%} |")  # fmt: skip


if __name__ == "__main__":
    main()
