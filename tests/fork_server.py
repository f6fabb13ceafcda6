"""Runs scripts as `python SCRIPT ARGUMENTS` does, without the seconds that Python takes to begin and to end with PyTorch.

This program imports what all scripts import, once, and forks for each command that it reads, a line of JSON. The child
becomes what a new process would be: its folder, environment, standard streams and random numbers are its own. When it
has ended, its exit code is printed, negative if a signal ended it; a child that takes too long gets SIGALRM.
"""

import json
import os
import random
import runpy
import signal
import sys
import traceback

import gymnasium  # noqa: F401
import numpy as np
import PIL.Image  # noqa: F401
import torch.utils.tensorboard
import tqdm  # noqa: F401
import tyro  # noqa: F401

torch.optim.Adam([torch.zeros(1)])  # the first optimizer imports a thousand modules more


def become(
    script: str, arguments: list[str], folder: str, environment: dict[str, str], out: str, err: str, timeout: int
) -> None:
    """Makes this process the command's."""
    signal.alarm(timeout)
    for descriptor, path in enumerate((os.devnull, out, err)):
        os.dup2(os.open(path, os.O_RDWR), descriptor)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    random.seed()
    np.random.seed()
    sys.argv, sys.path[0] = [script, *arguments], folder


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


for line in sys.stdin:
    command = json.loads(line)
    child = os.fork()
    if child == 0:
        become(**command)
        code = run(command["script"])
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # without tidying up the memory, which takes a second
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
