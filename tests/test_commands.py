"""Every script as a user runs it: copied into a folder, from the command line, and from Python.

What is the same text in all scripts is tried in many ways in test_plumbing.py, with one of them.
"""

import contextlib
import dataclasses
import gc
import importlib
import importlib.util
import json
import math
import random
import re
import shlex
import shutil
import sys
import threading
import time

import cases
import pytest
import torch
from conftest import (
    NAMES, Bench, curves, description, events, fingerprint, first, is_refused, learned, path_of,
    same, state,
)  # fmt: skip
from PIL import Image
from test_conventions import TAGS

# The fast half, -m "not slow", runs one script.
PARAMS = [pytest.param(name, marks=[pytest.mark.slow] * (name != first())) for name in NAMES]


@pytest.fixture(scope="module", params=PARAMS)
def script(request):
    return request.param


@pytest.fixture
def bench(script, tmp_path):
    return Bench(script, tmp_path, cases=True)


@pytest.fixture(scope="module")
def reference(script, tmp_path_factory):
    """A run that nothing interrupted, with a GIF. Tests only read it, or copy it."""
    bench, start = Bench(script, tmp_path_factory.mktemp("reference")), time.monotonic()
    bench.ended = bench.run(f"{description(script).TINY} --capture-video")
    bench.seconds = time.monotonic() - start
    assert bench.ended.code == 0, bench.ended
    bench.run_dir = bench.folder / bench.ended.lines[-1]
    return bench


def test_help(script, bench):
    """Two groups; each flag with its comment and default; the example commands."""
    bench.environment["COLUMNS"] = "100"  # in a wide one, tyro sets the groups side by side
    ended, module = bench.run("--help"), importlib.import_module(script)
    assert ended.code == 0, ended
    ended.out = " ".join(ended.out.replace("│", " ").split())
    comments = dict(re.findall(r"^    (\w+): .*  # (.*)$", path_of(script).read_text(), re.M))
    algorithm, run = ended.out.split("algorithm options")[1].split("run options")
    for name, default in dataclasses.asdict(module.Args()).items():
        flag = name.replace("_", "-")
        kind = f", --no-{flag}" if isinstance(default, bool) else r" \S+"
        line = f" --{flag}{kind} {re.escape(comments[name])} \\(default: '?{default}'?\\)"
        assert len(re.findall(line, algorithm + run)) == 1, name
    assert "--learning-rate" in algorithm and "--checkpoint-frequency" in run
    commands = re.findall(r"^.*python \w+\.py.*$", module.__doc__, re.M)
    assert commands and all(" ".join(command.split()) in ended.out for command in commands)


def test_a_run_and_its_folder(script, reference):
    out, folder = reference.ended.lines, reference.run_dir
    assert out[0] == f"Training in {out[-1]}"
    env_id = importlib.import_module(script).Args().env_id.replace("/", "-")
    assert re.fullmatch(rf"runs/{env_id}__{script}__1__[\d-]+", out[-1])
    files = {re.sub("^events.*", "events", path.name) for path in folder.iterdir()}
    assert {"checkpoint.pt", "best.pt", "result.json", "episode.gif", "events"} <= files
    assert not [name for name in files if name.endswith(".tmp")]
    result = json.loads((folder / "result.json").read_text())
    args = state(folder)["args"]
    assert f"Evaluation: return {result['episodic_return']:.1f} ±" in out[-2]
    assert out[-2].endswith(f"over {args['eval_episodes']} episodes")
    assert args["total_timesteps"] <= result["steps"] and 0 < result["seconds"] < reference.seconds
    assert args["capture_video"] and args["resume"] is None


def test_tags_and_values(script, reference):
    found = curves(reference.run_dir)
    parts = ("charts", "eval") if getattr(description(script), "PLAYS", True) else ("eval",)
    needed = {f"{part}/episodic_{what}" for part in parts for what in ("return", "length")}
    assert needed <= set(found) <= TAGS
    for tag, points in found.items():
        steps = [step for step, _ in points]
        assert steps == sorted(set(steps)), tag
        assert all(math.isfinite(value) for _, value in points), tag
    result = json.loads((reference.run_dir / "result.json").read_text())
    for what in ("return", "length"):
        step, value = found[f"eval/episodic_{what}"][-1]
        assert (step, value) == (result["steps"], pytest.approx(result[f"episodic_{what}"]))
    best = torch.load(reference.run_dir / "best.pt", weights_only=True)
    assert best["network"].keys() == state(reference.run_dir)["network"].keys()
    assert best["return"] == pytest.approx(max(value for _, value in found["eval/episodic_return"]))


def test_the_gif_moves(reference):
    with Image.open(reference.run_dir / "episode.gif") as gif:
        frames = set()
        for i in range(gif.n_frames):
            gif.seek(i)
            frames.add(gif.convert("RGB").tobytes())
        length = json.loads((reference.run_dir / "result.json").read_text())["episodic_length"]
        assert len(frames) > (length > 2) and min(gif.size) > 50  # every second step is drawn
    (image,) = events(reference.run_dir).Images("eval/episode")
    assert image.encoded_image_string == (reference.run_dir / "episode.gif").read_bytes()


def test_another_seed_other_weights(script, bench, reference):
    """As they are made: they hardly learn. Constant ones may be the same."""
    args = state(reference.run_dir)["args"]
    few = max(args["total_timesteps"] // 4, args.get("learning_starts", 0) + 1)
    flags = f"{description(script).TINY} --total-timesteps {few} --eval-episodes 1"
    flags += " --learning-rate 1e-30"
    one, other = (learned(bench.train(f"{flags} --seed {seed}")) for seed in (1, 2))
    weights = [
        name for name, tensor in one["network"].items()
        if "weight" in name and tensor.unique().numel() > 1
    ]  # fmt: skip
    assert weights and not any(
        torch.equal(one["network"][name], other["network"][name]) for name in weights
    )


def kill(bench, arguments, reference):
    """Starts a run like the reference, and kills it at a random moment."""
    args = state(reference.run_dir)["args"]
    for _ in range(20):
        # The first is written at step 0, the last at the end.
        saves = random.randint(1, args["total_timesteps"] // args["checkpoint_frequency"])
        ended = bench.run(arguments, kill_after=random.uniform(0, 0.3), saves=saves)
        assert ended.code <= 0, ended
        (found,) = (path.parent for path in (bench.folder / "runs").glob("*/checkpoint.pt"))
        if ended.code < 0:
            print(f"killed after checkpoint {saves}, saved at step {state(found)['envs']['steps']}")
            return found
        shutil.rmtree(bench.folder / "runs")
    raise AssertionError("it cannot be killed between its first checkpoint and its end")


def test_killed_and_resumed_is_as_if_nothing_happened(script, bench, reference):
    """Whatever is saved and evaluated: here often and only at the end."""
    flags = "--checkpoint-frequency 130 --eval-frequency 0"
    run_dir = kill(bench, f"{description(script).TINY} {flags}", reference)
    time.sleep(1)  # TensorBoard orders the files of a run by the second of their beginning
    ended = bench.run(f"--resume {run_dir}")
    assert ended.code == 0 and "Warning" not in ended.err, ended
    assert same(learned(run_dir), learned(reference.run_dir))
    ours, theirs = curves(run_dir), curves(reference.run_dir)
    assert len(theirs["eval/episodic_return"]) > len(ours["eval/episodic_return"]) == 1
    for tag, points in theirs.items():
        assert ours[tag] == (points[-1:] if tag.startswith("eval") else points), tag
    ours, theirs = (
        json.loads((folder / "result.json").read_text()) for folder in (run_dir, reference.run_dir)
    )
    assert [*ours.values()][1:4] == [*theirs.values()][1:4]


def computes_the_same(script, learned_compiled, reference):
    """To rounding, which is a small part of what was learned."""
    module = importlib.import_module(script)
    args = module.Args(**state(reference.run_dir)["args"])
    torch.manual_seed(args.seed)
    with contextlib.closing(module.Envs(args, 1, module.EVALUATION)) as envs:
        begun = dict(module.make_network(args, envs).named_parameters())

    def distance(ours, theirs):
        return math.sqrt(sum((ours[n] - theirs[n]).square().sum().item() for n in begun))

    eager = learned(reference.run_dir)["network"]
    return distance(learned_compiled["network"], eager) < 0.2 * distance(begun, eager)


@pytest.mark.slow
@pytest.mark.parametrize("script", [*map(first, cases.OWN)], indirect=True, scope="module")
def test_compiled_it_computes_the_same_and_resumes_exactly(script, bench, reference):
    """The shortest script of each kind. Needs a C++ compiler. test_from_python has the others."""
    tiny = f"{description(script).TINY} --compile"
    compiled = learned(bench.train(tiny))
    assert computes_the_same(script, compiled, reference)
    shutil.rmtree(bench.folder / "runs")
    run_dir = kill(bench, tiny, reference)
    assert same(learned(bench.train(f"--resume {run_dir}")), compiled)


def test_evaluate_repeats_the_result_and_changes_nothing(bench, reference):
    run_dir = shutil.copytree(reference.run_dir, bench.folder / "run")
    before = fingerprint(run_dir)
    for path in ("run", "run/checkpoint.pt"):
        ended = bench.run(f"--evaluate {path} --no-capture-video")
        assert ended.code == 0 and ended.lines == [reference.ended.lines[-2], "run"], ended
    assert "over 2 episodes" in bench.run("--evaluate run --no-capture-video --eval-episodes 2").out
    assert fingerprint(run_dir) == before
    best = torch.load(run_dir / "best.pt", weights_only=True)["return"]
    ended = bench.run("--evaluate run/best.pt --no-capture-video")
    assert f"Evaluation: return {best:.1f} ±" in ended.out, ended


def test_learns_a_small_environment_and_load_policy_plays_it(script, bench, monkeypatch):
    """In a module in the current folder, to its best return. From Python it is played as well."""
    case = cases.OWN[description(script).OWN]
    run_dir = bench.train(
        f"--env-id cases:{case.__name__}-v0 --eval-episodes 3 {description(script).OWN_FLAGS}"
    )
    assert run_dir.name.startswith(f"cases-{case.__name__}-v0__")
    assert json.loads((run_dir / "result.json").read_text())["episodic_return"] == case.BEST
    policy, env = importlib.import_module(script).load_policy(run_dir), case()
    total, (obs, _), end = 0, env.reset(seed=5), False
    while not end:
        obs, reward, terminated, truncated, _ = env.step(policy(obs))
        total, end = total + reward, terminated or truncated
    assert total == case.BEST


def test_a_run_that_diverges_stops(script, bench):
    """One line, exit code 2, and the last checkpoint is finite and can be evaluated."""
    ended = bench.run(f"{description(script).TINY} {description(script).DIVERGES}")
    assert ended.code == 2 and "Traceback" not in ended.err, ended
    line = ended.err.splitlines()[-1]
    assert re.match(
        rf"{script}: .* is not finite: .*--learning-rate.* Stopped at step \d+", line
    ), ended
    folder = ended.lines[0].removeprefix("Training in ")
    assert line.endswith(f"python {script}.py --resume {folder}")
    weights = state(bench.folder / folder)["network"].values()
    assert all(torch.isfinite(tensor).all() for tensor in weights)
    assert bench.run(f"--evaluate {folder} --eval-episodes 1").code == 0


def test_wrong_spaces_are_refused(script, bench):
    for env_id in description(script).WRONG_SPACES:
        is_refused(bench.run(f"--env-id {env_id}"), "needs", env_id)
    assert not (bench.folder / "runs").exists()


def test_bad_arguments_of_its_own_are_refused(script, bench):
    for arguments, word in description(script).BAD:
        is_refused(bench.run(arguments), word)
    assert not (bench.folder / "runs").exists()


def settings(script, tmp_path, flags=""):
    """Args as the command line would make them, for a run in tmp_path."""
    module = importlib.import_module(script)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sys, "argv", [f"{script}.py", *shlex.split(f"{description(script).TINY} {flags}")]
        )
        return dataclasses.replace(module.parse_args(), runs_dir=str(tmp_path))


def test_from_python(script, tmp_path, monkeypatch, reference):
    """Importing changes nothing, and `train` leaves behind nothing but its result.

    Nor does a run that diverges. It raises ValueError. Compiled, as graphs that are not turned into
    C++ (see conftest.py), a run computes the same.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        spec = importlib.util.spec_from_file_location("imported_anew", path_of(script))
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "imported_anew", module)
        spec.loader.exec_module(module)
        assert torch.get_num_threads() == 3
        module = importlib.import_module(script)
        threads = set(threading.enumerate())
        opened, threads_seen, args = [], set(), settings(script, tmp_path, "--compile")

        class Envs(module.Envs):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                opened.append(self)

            def reset(self):
                threads_seen.add(torch.get_num_threads())
                super().reset()

            def close(self):
                if self in opened:
                    opened.remove(self)
                super().close()

        monkeypatch.setattr(module, "Envs", Envs)
        result = module.train(args)
        assert threads_seen == {args.num_threads} and opened == [] and torch.get_num_threads() == 3
        folder = tmp_path / result.folder
        assert json.loads((folder / "result.json").read_text()) == result._asdict()
        assert computes_the_same(script, learned(folder), reference)
        with pytest.raises(ValueError, match="is not finite"):
            module.train(settings(script, tmp_path, description(script).DIVERGES))
        assert opened == [] and torch.get_num_threads() == 3
        gc.collect()
        left = {
            thread
            for thread in set(threading.enumerate()) - threads
            if "TMonitor" not in repr(thread)
        }
        assert not left
    finally:
        torch.set_num_threads(before)


LEARNS = [
    pytest.param(name, *line, marks=pytest.mark.slow)
    for name in NAMES for line in getattr(description(name), "LEARNS", [])
]  # fmt: skip


@pytest.mark.parametrize("name, flags, least", LEARNS)
def test_longer_runs_learn(name, flags, least, tmp_path):
    """What takes longer: the default run of a script, and commands of its docstring."""
    run_dir = Bench(name, tmp_path, cases=True).train(flags)
    assert json.loads((run_dir / "result.json").read_text())["episodic_return"] >= least
