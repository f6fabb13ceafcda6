"""Runs scripts as `python SCRIPT ARGUMENTS` does, without the seconds that PyTorch takes to begin.

It imports what the scripts import, once, and forks for each command that it reads, a line of JSON.
The child becomes what a new process would be: its folder, environment, standard streams and random
numbers are its own. After so many seconds, a signal ends it at once. Then the exit code is printed,
negative if a signal ended it.
"""

import ast
import contextlib
import importlib
import json
import os
import random
import runpy
import signal
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import torch

for path in (Path(__file__).parent.parent / "cleanrl_style").glob("*.py"):
    for node in ast.parse(path.read_text()).body:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for name in [node.module] if isinstance(node, ast.ImportFrom) else names:
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
torch.optim.Adam([torch.zeros(1)])  # the first optimizer imports a thousand modules more


def become(
    arguments: list[str], folder: str, environment: dict, out: str, err: str, seconds: float
) -> None:
    """Makes this process the command's."""
    signal.setitimer(signal.ITIMER_REAL, seconds)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for descriptor, path in enumerate((os.devnull, out, err)):
        os.dup2(os.open(path, os.O_RDWR), descriptor)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    random.seed()
    np.random.seed()
    torch.seed()  # a new process always has the same one: a script that forgets to seed is found
    sys.argv, sys.path[0] = arguments, folder


def run(script: str) -> int:
    """Runs the script as the main program, and returns its exit code."""
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        return end.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def wait(child: int, folder: str, kill_after: float | None, saves: int) -> int:
    """Its exit status. kill -9 comes so many seconds after it wrote so many checkpoints."""
    seen = set()  # when each was written
    while len(seen) < saves:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status
        seen |= {path.stat().st_mtime_ns for path in Path(folder).glob("runs/*/checkpoint.pt")}
        time.sleep(0.002)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


for line in sys.stdin:
    call = json.loads(line)
    kill = {name: call.pop(name) for name in ("kill_after", "saves")}
    child = os.fork()
    if child == 0:
        become(**call)
        code = run(sys.argv[0])
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # without tidying up the memory, which takes a second
    print(os.waitstatus_to_exitcode(wait(child, call["folder"], **kill)), flush=True)
