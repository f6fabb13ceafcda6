"""Many runs: are seeds on Ray the same, even where workers are killed, and does the README's search
run? Ray is tested with processes and folders of its own; they end with the tests."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import learn
import pytest
from conftest import ROOT, events, first, path_of
from filelock import FileLock

RAY = pytest.mark.skipif(
    not (learn.found("ray") and Path("/proc/self/stat").exists()), reason="needs Ray, on Linux"
)
FLAGS = "--seeds 1-2 --total-timesteps 10000 --checkpoint-frequency 1000 --eval-episodes 5"
START = """
import ray, sys
ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=80_000_000)
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def environment() -> Iterator[dict[str, str]]:
    """Of processes: Ray in a folder of its own, with a short name, for sockets; and a password."""
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")
    own = {"RAY_TMPDIR": folder, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": uuid.uuid4().hex}
    yield {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "RAY_ADDRESS")} | own
    wait_until(lambda: not processes(folder), 30)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def cluster(environment: dict[str, str]) -> Iterator[str]:
    """The address of two workers. They end when the standard input of their parent does."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    command = [sys.executable, "-c", START]
    where = {"cwd": environment["RAY_TMPDIR"], "env": environment}
    with subprocess.Popen(command, text=True, **where, **pipes) as parent:
        yield parent.stdout.readline().strip()
        parent.communicate()


@pytest.fixture(scope="module")
def plain(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of learn.py and of a script, and the record of two seeds without Ray."""
    folder = tmp_path_factory.mktemp("plain")
    for path in (path_of(first()), Path(learn.__file__)):
        copy = folder / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True)
        shutil.copy(path, copy)
    with call(folder, f"{FLAGS} --name plain", environment) as process:
        assert process.wait(300) == 0, process.stderr.read()
    return folder


@contextlib.contextmanager
def call(folder: Path, arguments: str, environment: dict) -> Iterator[subprocess.Popen]:
    command = [sys.executable, "tests/benchmarks/learn.py", first(), *arguments.split()]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # What a shell runs in the background, as it may run these tests, ignores Ctrl-C.
    pipes["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(command, cwd=folder, env=environment, **pipes) as process:
        try:
            yield process
        finally:
            process.kill()


def record(folder: Path, name: str) -> tuple[dict[str, str], list[dict[str, str]]]:
    """Without what time and place make different."""
    other = ("machine", "wall time", "date")
    head, rows = learn.read_csv(folder / f"tests/benchmarks/results/{first()}__{name}.csv")
    rows = [row for row in rows if row["kind"] != "wall"]
    return {key: value for key, value in head.items() if key not in other}, rows


def wait_until(true: Callable, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.02)


def processes(*words: str) -> dict[int, int]:
    """Processes, but for dead ones, with these words in their command lines, and their parents."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, parent = (path / "stat").read_text().rpartition(")")[2].split()[:2]
            line = (path / "cmdline").read_bytes().decode(errors="replace")
            if state != "Z" and all(word in line for word in words):
                found[int(path.name)] = int(parent)
    return found


@RAY
@pytest.mark.slow
def test_killed_workers_and_trainings_change_nothing(plain, cluster, environment):
    """kill -9 of one seed's worker and of the other's training; then Ctrl-C; then once more."""
    runs = plain / f"runs/learn/{first()}__ray"

    def training(seed: int) -> dict[int, int]:
        return processes(f"{plain}/cleanrl_style/{first()}.py", f"{runs.relative_to(plain)}/{seed}")

    times, alive = {}, {1, 2}
    with call(plain, f"{FLAGS} --name ray --ray-address {cluster}", environment) as process:
        while alive:
            wait_until(lambda: any(runs.glob("*/*/checkpoint.pt")))
            for path in runs.glob("*/*/checkpoint.pt"):
                seed, saved = int(path.parts[-3]), path.stat().st_mtime_ns
                if seed in alive and saved > times.setdefault(seed, saved):  # not that of step 0
                    ((pid, worker),) = training(seed).items()
                    os.kill(worker if seed == 1 else pid, signal.SIGKILL)
                    wait_until(lambda: pid not in training(seed), 5)  # it dies with its worker
                    alive.remove(seed)
        process.send_signal(signal.SIGINT)  # the threads of a pool would wait for ever in Ray
        assert process.wait(60) != 0
    wait_until(lambda: not training(1) | training(2), 30)
    with call(plain, f"{FLAGS} --name ray --ray-address {cluster}", environment) as process:
        assert process.wait(300) == 0, process.stderr.read()
    assert record(plain, "ray") == record(plain, "plain")
    for seed in (1, 2):
        (folder,) = {path.parent for path in runs.glob(f"{seed}/*/events.*")}
        assert len(list(folder.glob("events.*"))) > 1  # it went on in the same folder
    assert list(runs.glob("tmp*")) == []


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
def test_a_training_ends_with_the_process_that_started_it(plain, environment):
    """Ray ends what its workers started, but not where the whole node is killed."""
    script = f"{plain}/cleanrl_style/{first()}.py"
    with call(plain, f"{FLAGS} --total-timesteps 1000000 --name orphan", environment) as process:
        wait_until(lambda: any(plain.glob("runs/learn/*__orphan/*/*/checkpoint.pt")))
        assert processes(script, "__orphan")
        process.kill()
        wait_until(lambda: not processes(script, "__orphan"), 5)


@RAY
@pytest.mark.slow
def test_wrong_flags_on_ray_are_told_at_once(plain, environment):
    """With workers of its own, on this machine; one line, and none from Ray."""
    with call(plain, f"{FLAGS} --name bad --ray --resume nowhere", environment) as process:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 2 and out == "", (out, err)
        assert err == f"{first()}: there is no checkpoint 'nowhere'\n"


@pytest.mark.parametrize(
    "on_ray, line", [("", "there is no checkpoint 'nowhere'"), ("--ray", "--ray needs Ray")]
)
def test_wrong_flags_are_told_in_a_line(on_ray, line, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(learn, "HERE", tmp_path)
    monkeypatch.setattr(learn, "found", lambda package: False)
    with pytest.raises(SystemExit) as error:
        learn.main([first(), *on_ray.split(), "--seeds", "1-1", "--resume", "nowhere"])
    told = capsys.readouterr()
    assert error.value.code == 2 and told.out == ""
    assert line in told.err and len(told.err.splitlines()) == 1


def test_a_seed_that_is_still_training_is_waited_for(tmp_path, monkeypatch):
    folder = tmp_path / "1/run"
    folder.mkdir(parents=True)
    (folder / "checkpoint.pt").touch()
    done = subprocess.CompletedProcess([], 0, f"Evaluation\n{folder}\n", "")
    free = []
    monkeypatch.setattr(learn, "clock", lambda run_dir: [(1, 1.0)])
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: free.append(not lock.is_locked) or done)
    with FileLock(folder / "lock", thread_local=False) as lock:
        thread = threading.Thread(target=learn.run, args=(first(), [], 1, tmp_path))
        thread.start()
        time.sleep(0.3)
        assert free == []
    thread.join()
    assert free == [True]


@pytest.mark.slow
def test_a_node_without_the_folder_of_the_caller_sends_what_a_record_needs(
    plain, tmp_path, monkeypatch
):
    """Ray is not needed to see it: two folders are two nodes."""
    arguments = first(), FLAGS.split()[2:], 1, Path("runs/x")
    for name in ("caller", "there"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "there"))
    monkeypatch.setenv("OMP_NUM_THREADS", "7")  # as Ray sets it; the caller has another one
    monkeypatch.setenv("MKL_NUM_THREADS", "7")
    monkeypatch.chdir(tmp_path)
    printed, contents = learn.run_there(
        *arguments, tmp_path / "caller", Path("mark"), {"MKL_NUM_THREADS": "1"}
    )
    assert "OMP_NUM_THREADS" not in os.environ and os.environ["MKL_NUM_THREADS"] == "1"
    assert printed.startswith("seed 1: ")
    assert not any(path.is_file() for path in (tmp_path / "there").rglob("*"))
    monkeypatch.chdir(tmp_path / "caller")
    for path, content in contents.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    run_dir, _ = learn.run(*arguments)  # reads it
    rows = [
        (str(step), f"{value:.6g}", kind)
        for kind, points in zip(("train", "eval"), learn.curve(events(run_dir)))
        for step, value in points
    ]
    expected = [row for row in record(plain, "plain")[1] if row["seed"] == "1"]
    assert rows == [(row["step"], row["return"], row["kind"]) for row in expected[:-1]]


@RAY
@pytest.mark.slow
def test_the_search_in_readme_runs(cluster, environment, tmp_path):
    """As it stands but for the numbers; then without Ray, which goes on with the same study."""
    readme = (ROOT / "README.md").read_text()
    (code,) = re.findall(r"```python\n(import os, optuna.*?)```", readme, re.S)
    quick = {"Args(": "Args(total_timesteps=2_000, eval_episodes=5, ", "remote(5)": "remote(1)"}
    for old, new in (quick | {"range(4)": "range(2)", "search(20)": "search(1)"}).items():
        assert old in code
        code = code.replace(old, new)
    ((on_ray, here),) = re.findall(r"^(ray\.get.*?)  # without Ray: (.*)$", code, re.M)
    without = code.replace(on_ray, here).replace("optuna, ray", "optuna")
    shutil.copy(path_of("reinforce_cartpole"), tmp_path)
    for part in (code, without):
        (tmp_path / "search.py").write_text(part)
        ended = subprocess.run(
            [sys.executable, "search.py"], cwd=tmp_path, timeout=300, text=True,
            capture_output=True, env=environment | {"RAY_ADDRESS": cluster},
        )  # fmt: skip
        assert ended.returncode == 0, ended.stderr
        assert "'learning_rate': " in ended.stdout and "'num_envs': " in ended.stdout
    import optuna

    study = optuna.load_study(study_name="cartpole", storage=f"sqlite:///{tmp_path}/search.db")
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 3
    assert len(list(tmp_path.glob("runs/*/result.json"))) == 3
