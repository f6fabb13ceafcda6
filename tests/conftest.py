"""What all the tests share: where the scripts are, and how to run one as a user does."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when PyTorch is imported; -n 2 has a test for each of two cores

import pytest
from tensorboard.summary.writer import event_file_writer

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted((ROOT / "cleanrl_style").glob("*.py"))

sys.path.insert(0, str(ROOT / "cleanrl_style"))  # so that a test can `import reinforce_cartpole`
sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes longer than a few seconds; leave out with -m 'not slow'")


@pytest.fixture(autouse=True)
def event_files_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers the event files of each test from 0, as those of a user's program are.

    TensorBoard reads them in the order of their names: the second, the process, and that number, where 10 is before 9.
    """
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))


class Result:
    """What a user sees of a command that has ended."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err, self.lines = code, out, err, out.splitlines()

    def __repr__(self) -> str:
        return f"exit code {self.code}\n--- stdout\n{self.out}\n--- stderr\n{self.err}"


@functools.cache
def fork_server() -> subprocess.Popen:
    """One for all tests of this process; it ends when its standard input does."""
    command = [sys.executable, Path(__file__).with_name("fork_server.py")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    return subprocess.Popen(command, **pipes, text=True, env=os.environ | {"PYTHONPATH": ""})


class Bench:
    """An otherwise empty folder that holds a copy of one script, to run it there."""

    def __init__(self, script: Path, folder: Path) -> None:
        self.folder = folder
        self.script = Path(shutil.copy(script, folder))
        # A user's shell has no PYTHONPATH; a wide terminal keeps the parser's messages on one line.
        self.environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"COLUMNS": "300"}

    def command(self, *arguments: object) -> list[str]:
        return [sys.executable, self.script.name, *map(str, arguments)]

    def run(self, *arguments: object, timeout: int = 300, forked: bool = True) -> Result:
        """Runs to the end, or fails after the timeout in seconds. A fork saves the import of PyTorch."""
        if not forked:
            done = subprocess.run(
                self.command(*arguments), cwd=self.folder, env=self.environment, timeout=timeout,
                capture_output=True, text=True, stdin=subprocess.DEVNULL,
            )  # fmt: skip
            return Result(done.returncode, done.stdout, done.stderr)
        server = fork_server()
        with tempfile.NamedTemporaryFile("r") as out, tempfile.NamedTemporaryFile("r") as err:
            call = {
                "script": self.script.name, "arguments": list(map(str, arguments)), "folder": str(self.folder),
                "environment": self.environment, "out": out.name, "err": err.name, "timeout": timeout,
            }  # fmt: skip
            print(json.dumps(call), file=server.stdin, flush=True)
            result = Result(int(server.stdout.readline()), out.read(), err.read())
        assert result.code != -signal.SIGALRM, f"takes longer than {timeout} s: {arguments}"
        return result

    def train(self, *arguments: object) -> Path:
        """Runs to the end and returns the run's folder, which the last line names."""
        result = self.run(*arguments)
        assert result.code == 0, result
        return self.folder / result.lines[-1]

    def start(self, *arguments: object) -> subprocess.Popen:
        return subprocess.Popen(
            self.command(*arguments), cwd=self.folder, env=self.environment,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL,
            # Ctrl-C reaches a user's program, but not what a shell runs in the background, as it may run these tests.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
