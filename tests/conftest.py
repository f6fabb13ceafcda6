"""What the tests share: the scripts, how to run one as a user does, and how to look at its run."""

import functools
import hashlib
import importlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when PyTorch is imported; -n 2 uses two cores

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
SCRIPTS = sorted((ROOT / "cleanrl_style").glob("*.py"))
# Names of those with a description in their test file. test_conventions.py complains of the others.
TEST_FILES = {path.stem: TESTS / f"test_{path.stem}.py" for path in SCRIPTS}
NAMES = [n for n, file in TEST_FILES.items() if file.exists() and "\nTINY = " in file.read_text()]

sys.path[:0] = [
    str(ROOT / "cleanrl_style"),
    str(TESTS / "benchmarks"),
]  # for `import reinforce_cartpole`


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: leave out with -m 'not slow'")


@pytest.fixture(autouse=True)
def event_files_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers the event files of each test from 0: TensorBoard reads file 10 before file 9."""
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))


@pytest.fixture(autouse=True)
def graphs_without_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the process of the tests, --compile makes and differentiates graphs, and runs these.

    C++ takes half a minute; test_commands.py has scripts that are compiled to it.
    """
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))


def path_of(script: str) -> Path:
    return ROOT / "cleanrl_style" / f"{script}.py"


def description(script: str) -> ModuleType:
    """The constants at the top of the script's test file. README.md explains them."""
    return importlib.import_module(f"test_{script}")


@functools.cache
def first(kind: str = "discrete") -> str:
    """The shortest script for this kind of environments; for discrete ones, to try the plumbing."""
    scripts = [script for script in NAMES if description(script).OWN == kind]
    return min(scripts, key=lambda script: path_of(script).stat().st_size)


# ---- To run a script -----------------------------------------------------------------------------


class Ended:
    """What a user sees of a command that has ended."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err, self.lines = code, out, err, out.splitlines()

    def __repr__(self) -> str:
        return f"exit code {self.code}\n--- stdout\n{self.out}\n--- stderr\n{self.err}"


@functools.cache
def fork_server() -> subprocess.Popen:
    """One for all tests of this process; it ends when its standard input does."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    return subprocess.Popen([sys.executable, TESTS / "fork_server.py"], **pipes, text=True)


class Bench:
    """A folder with a copy of one script, and of cases.py if asked, to run the script there."""

    def __init__(self, script: str, folder: Path, cases: bool = False) -> None:
        self.folder, self.script = folder, script
        for path in [path_of(script), *[TESTS / "cases.py"] * cases]:
            shutil.copy(path, folder)
        # A user's shell has no PYTHONPATH. A wide terminal keeps the parser's messages on one line.
        self.environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        self.environment |= {"COLUMNS": "300"}

    def start(self, arguments: str, **streams: object) -> subprocess.Popen:
        """A process of its own, which can be sent signals."""
        pipes = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE) | {"stdin": subprocess.DEVNULL}
        return subprocess.Popen(
            [sys.executable, f"{self.script}.py", *shlex.split(arguments)], cwd=self.folder,
            env=self.environment, text=True, **pipes | streams,
            # What a shell runs in the background, as it may run these tests, ignores Ctrl-C.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip

    def run(
        self, arguments: str, kill_after: float | None = None, saves: int = 0, timeout: int = 300
    ) -> Ended:
        """Runs to the end, or is killed so many seconds after it wrote so many checkpoints.

        A fork saves PyTorch's import.
        """
        with tempfile.NamedTemporaryFile("r") as out, tempfile.NamedTemporaryFile("r") as err:
            call = {
                "arguments": [f"{self.script}.py", *shlex.split(arguments)], "out": out.name,
                "err": err.name, "folder": str(self.folder), "environment": self.environment,
                "seconds": timeout, "kill_after": kill_after, "saves": saves,
            }  # fmt: skip
            print(json.dumps(call), file=fork_server().stdin, flush=True)
            ended = Ended(int(fork_server().stdout.readline()), out.read(), err.read())
        assert ended.code != -signal.SIGALRM, f"takes longer than {timeout} s\n{ended}"
        return ended

    def train(self, arguments: str) -> Path:
        """Runs to the end and returns the run's folder, which the last line names."""
        ended = self.run(arguments)
        assert ended.code == 0, ended
        return self.folder / ended.lines[-1]


def is_refused(ended: Ended, *words: str) -> None:
    """One line on stderr, exit code 2, no traceback. The parser draws a frame around its line."""
    assert ended.code == 2 and "Traceback" not in ended.err, ended
    lines = ended.err.splitlines()
    assert len(lines) == 1 or (lines[0].startswith("╭") and ended.out == ""), ended
    for word in words:
        assert word in ended.err, (word, ended)


# ---- To look at a run ----------------------------------------------------------------------------


def state(folder: Path) -> dict:
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def learned(folder: Path) -> dict:
    """What a checkpoint holds, but for the arguments and the time that it took."""
    return {key: value for key, value in state(folder).items() if key not in ("args", "seconds")}


def same(a: object, b: object) -> bool:
    """Whether two checkpoints, or parts of them, are equal to the last bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else type(a) is type(b) and a == b


def events(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The points (step, value) of each tag, as TensorBoard shows them; but for the speed."""
    found = events(folder)
    tags = [tag for tag in found.Tags()["scalars"] if tag != "charts/SPS"]
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in tags}


def fingerprint(folder: Path) -> dict[Path, str]:
    """The contents of all files."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
