"""What every script looks like. The scripts share no code: these tests hold them together.

Each rule is a function over {name of a script: source} that yields complaints. It is applied to the
scripts, and to a broken copy of one, where it must complain: a rule that cannot fail holds nothing.
"""

import ast
import importlib.metadata
import itertools
import re
import subprocess
import sys

import pytest
from conftest import ROOT, SCRIPTS, TESTS

SOURCES = {path.stem: path.read_text() for path in SCRIPTS}

HEADINGS = ["Paper", "Idea", "Differs", "Shapes", "Run", "Expect"]
PLUMBING = "# ---- Plumbing"  # from this headline to the end, all scripts are the same

# Every tag that a script may write. One name means one thing, in all scripts.
TAGS = {
    "charts/episodic_return",  # of each finished episode: sum of the environment's own rewards
    "charts/episodic_length",  # in steps
    "charts/learning_rate",
    "charts/SPS",  # environment steps per second of training so far
    "charts/epsilon",  # probability of a random action
    "charts/distill_coeff",  # how much the student imitates, from 1 to 0
    "losses/td_loss",  # of the last gradient step's batch; PQN: mean over the minibatches
    "losses/q_values",  # mean of Q(s, a), over the same
    "losses/distill_loss",  # divergence of the student's policy from the teacher's, in nats
    "losses/cql_gap",  # log of the integral of exp(Q(s, c)) over all actions c, less Q(s, a)
    "losses/cql_weight",  # of this gap in the loss of the critics
    "losses/policy_loss",
    "losses/value_loss",
    "losses/approx_kl",  # of the old policy from the new one, in nats, mean over the minibatches
    "losses/consistency_loss",  # mean squared error of the latent states that a model foresees
    "losses/reward_loss",  # cross-entropy of the rewards that a model predicts; DT: squared error
    "losses/obs_loss",  # squared error of the observations that a model tells, summed over them
    "losses/continue_loss",  # cross-entropy of whether the episode goes on, as a model tells
    "losses/latent_kl",  # of a model's prior from its posterior, in nats, at least the free ones
    "losses/novelty_loss",  # mean squared error of the network that imitates a random one
    "losses/kl",  # of the old policy from the new one, in nats, exact; TRPO: after the step
    "losses/kl_multiplier",  # Lagrange multiplier of the limit on it
    "losses/step_fraction",  # of the step of a trust region, that the line search took; 0: none
    "losses/aux_value_loss",  # of the value head that only trains the policy's layers
    "losses/aux_kl",  # of the policy before an auxiliary phase from the new one, in nats, exact
    "losses/clipfrac",  # share of the steps where the ratio is clipped
    "losses/explained_variance",  # of the returns, by the values before the update
    "losses/entropy",  # of the policy, in nats, mean over the steps
    "losses/alpha",  # temperature: weight of the entropy
    "losses/temperature",  # by which values are divided, before they become weights of actions
    "losses/kl_mean",  # of the target policy from one with new means, in nats
    "losses/kl_std",  # of the target policy from one with new standard deviations, in nats
    "losses/alpha_mean",  # Lagrange multiplier of the limit on kl_mean
    "losses/alpha_std",  # of that on kl_std
    "eval/episodic_return",  # mean over the episodes of one evaluation
    "eval/episodic_length",
    "eval/episode",  # the GIF
}

# Every script takes these flags, in this order within its own.
COMMON_FLAGS = [
    "env_id", "env_kwargs", "seed", "total_timesteps", "num_envs", "exp_name", "runs_dir", "device",
    "num_threads", "checkpoint_frequency", "eval_frequency", "eval_episodes", "capture_video",
    "resume", "evaluate",
]  # fmt: skip

# Packages that need not be named, with the one that requires them.
COMES_WITH = {
    "numpy": ("numpy", "gymnasium"), "PIL": ("pillow", "tensorboard"),
    "filelock": ("filelock", "torch"),
}  # fmt: skip


# ---- The rules -----------------------------------------------------------------------------------


def described(sources):
    """The constants at the top of a script's test file, without which it would not be tested."""
    for name in sources:
        path = TESTS / f"test_{name}.py"
        tree = ast.parse(path.read_text() if path.exists() else "")
        found = {target.id for node in tree.body if isinstance(node, ast.Assign)
                 for target in node.targets if isinstance(target, ast.Name)}  # fmt: skip
        for constant in ("TINY", "OWN", "OWN_FLAGS", "WRONG_SPACES", "DIVERGES", "BAD"):
            if constant not in found:
                yield f"{name}: tests/{path.name} has no {constant} (tests/README.md)"


def docstrings(sources):
    for name, source in sources.items():
        tree = ast.parse(source)
        docstring = ast.get_docstring(tree) or ""
        lines = docstring.splitlines() or [""]
        if not 15 <= len(lines) <= 45:
            yield f"{name}: the docstring has {len(lines)} lines"
        found = [line.split()[0] for line in lines[1:] if re.match(r"[A-Z]\w+ {2,}\S", line)]
        if found != HEADINGS:
            yield f"{name}: the docstring's headings are {found}, not {HEADINGS}"
        if "TODO" in docstring or not lines[0].endswith("."):
            yield f"{name}: the docstring is unfinished"
        for other in set(re.findall(r"python (\w+)\.py", docstring)) - {name}:
            yield f"{name}: the docstring runs {other}.py"
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and not ast.get_docstring(node):
                yield f"{name}: {node.name} has no docstring"


def imports(sources):
    for name, source in sources.items():
        packages = {package for package, _, _ in requirements(inline_metadata(source))}
        packages |= set(sys.stdlib_module_names) | set(COMES_WITH)
        for node in ast.walk(ast.parse(source)):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or "."] if isinstance(node, ast.ImportFrom) else []
            for module in (module.split(".")[0] for module in modules):
                if module.replace("_", "-") not in packages and module not in packages:
                    yield f"{name}: imports {module}, which its metadata does not name"


# Where nothing is played, or not at every step, a step is another one.
OFFLINE = {
    (name, "total_timesteps"): "environment steps to train for, at least"
    for name in (
        "cql_continuous", "dt_graph", "iql_continuous", "rebrac_continuous", "td3bc_continuous",
        "qdagger_cartpole",
    )  # fmt: skip
}


def flags(sources):
    seen = {}
    for name, source in sources.items():
        found = re.findall(r"^    (\w+): (.*?) = (.*?)(?:  # (.*))?$", args_of(source), re.M)
        if [flag for flag, *_ in found if flag in COMMON_FLAGS] != COMMON_FLAGS:
            yield f"{name}: does not have the common flags in their order"
        for flag, kind, _, comment in found:
            if not re.search(rf"\b(args|self)\.{flag}\b", source):
                yield f"{name}: nothing reads {flag}"
            if not comment:
                yield f"{name}: {flag} has no comment"
            meaning = kind.removesuffix(" | None"), OFFLINE.get((name, flag), comment)
            if seen.setdefault(flag, meaning) != meaning:
                yield f"{name}: {flag} has another type or comment elsewhere"
        if f'\nSCRIPT = "{name}"' not in source or "    exp_name: str = SCRIPT  # " not in source:
            yield f"{name}: SCRIPT is not its name"


def args_of(source):
    (args,) = [n for n in ast.parse(source).body if getattr(n, "name", "") == "Args"]
    return ast.get_source_segment(source, args)


def same_plumbing(sources):
    """Word for word the same, save that class Envs is another one for pixels than for vectors.

    And for scripts that run on several ranks, which have a class Follower, too. Among scripts with
    the same Envs, everything is equal; among all, what has the same name.
    """
    kinds, pieces = {}, {}
    for name, source in sources.items():
        plumbing = source[source.find(PLUMBING) :]
        parts = definitions(plumbing)
        kind = ("make_flat_env" in parts, "Follower" in parts)
        other, expected = kinds.setdefault(kind, (name, plumbing))
        if plumbing != expected:
            lines = itertools.zip_longest(plumbing.splitlines(), expected.splitlines())
            line = next(line for line, theirs in lines if line != theirs)
            yield f"{name}: the plumbing is not as in {other}, from this line on: {line}"
        for part, code in parts.items():
            other, expected = pieces.setdefault(part, (name, code))
            if code != expected and part != "Envs":
                yield f"{name}: {part} is not as in {other}"


def same_name_same_code(sources):
    """Above the plumbing: if neither arguments nor docstring say that it differs, it does not.

    Except Args and train: they are what makes a script.
    """
    seen = {}
    for name, source in sources.items():
        for part, code in definitions(source[: source.find(PLUMBING)]).items():
            if part in ("SCRIPT", "Args", "train"):
                continue
            node = ast.parse(code).body[0]
            described = isinstance(node, ast.FunctionDef | ast.ClassDef)
            head = (
                (part, ast.get_docstring(node), ast.unparse(getattr(node, "args", [])))
                if described
                else part
            )
            other, expected = seen.setdefault(head, (name, ast.unparse(node)))
            if ast.unparse(node) != expected:
                yield f"{name}: {part} has arguments and docstring as in {other}, but other code"


def definitions(source):
    """Name -> code of each function, class and constant of a module."""
    found = {}
    for node in ast.parse(source).body:
        name = getattr(node, "name", "")
        if isinstance(node, ast.Assign):
            name = ast.unparse(node.targets[0])
        if name:
            first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
            found[name] = "\n".join(source.splitlines()[first - 1 : node.end_lineno])
    return found


def tags(sources):
    for name, source in sources.items():
        for tag in sorted(set(re.findall(r'"((?:charts|losses|eval)/\w+)"', source)) - TAGS):
            yield f"{name}: the tag {tag} is not registered"


SETTING = "torch._dynamo.config.trace_autograd_ops"  # has no public name


def form(sources):
    for name, source in sources.items():
        if not source.startswith("# /// script\n"):
            yield f"{name}: does not begin with its metadata"
        if not source.endswith('\n\nif __name__ == "__main__":\n    main()\n'):
            yield f"{name}: does not end with the two-line guard"
        if len(re.findall(f"^{PLUMBING}", source, re.M)) != 1:
            yield f"{name}: has no headline {PLUMBING!r}, or two"
        for number, line in enumerate(source.splitlines(), 1):
            if len(line) > 100 or line != line.rstrip():
                yield f"{name}:{number}: more than 100 columns, or trailing blanks"
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 90:
                yield f"{name}: {node.name} is longer than 90 lines"
            if isinstance(node, ast.Global | ast.Nonlocal):
                yield f"{name}:{node.lineno}: global state"
            private = re.match(r"torch\.(.*\.)?_", ast.unparse(node))
            if isinstance(node, ast.Attribute) and private and ast.unparse(node) not in SETTING:
                yield f"{name}:{node.lineno}: {ast.unparse(node)} is private to torch"


def flat_train(sources):
    for name, source in sources.items():
        train = next(n for n in ast.parse(source).body if getattr(n, "name", "") == "train")
        nodes = list(ast.walk(train))
        if sum(isinstance(node, ast.With) for node in nodes) > 1:
            yield f"{name}: train has more than one `with`"
        for node in nodes[1:]:
            if isinstance(node, ast.Try | ast.FunctionDef | ast.ClassDef | ast.Lambda):
                yield f"{name}: train has a {type(node).__name__} in it"


def inline_metadata(source):
    """The requirements of the PEP 723 block, parsed as that standard says."""
    (block,) = re.findall(r"(?m)^# /// script$\s((?:^#(?:| .*)$\s)+?)^# ///$", source)
    text = "".join(line[2:] + "\n" for line in block.splitlines())
    return re.findall(r'"([^"]+)"', text.split("dependencies")[1])


def requirements(lines):
    """(name, extras, version) of each requirement."""
    for line in lines:
        match = re.fullmatch(r"([\w-]+)(?:\[([\w,-]+)\])?(?:>=|==)([\d.]+)", line)
        assert match, f"not of the form name[extras]>=version: {line}"
        extras = set((match[2] or "").split(",")) - {""}
        yield match[1], extras, tuple(map(int, match[3].split(".")))


def metadata(sources):
    pins, oldest = {}, {}
    for path, found in (
        (ROOT / "requirements.txt", pins),
        (TESTS / "requirements-oldest.txt", oldest),
    ):
        lines = [line for line in path.read_text().splitlines() if line and line[0] not in "#-"]
        found |= {name: (extras, version) for name, extras, version in requirements(lines)}
    for name, source in sources.items():
        for package, extras, bound in requirements(inline_metadata(source)):
            if package not in pins or not extras <= pins[package][0]:
                yield f"{name}: {package}{extras or ''} is not in requirements.txt"
            elif bound > pins[package][1]:
                yield f"{name}: {package} is newer than in requirements.txt"
            if package not in oldest or oldest[package][1] > bound:
                yield f"{name}: {package} was never run as old as its lower bound says"


RULES = [
    described, docstrings, imports, flags, same_plumbing, same_name_same_code, tags, form,
    flat_train, metadata,
]  # fmt: skip


# ---- The tests -----------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_scripts_keep(rule):
    complaints = list(rule(SOURCES))
    assert not complaints, "\n".join(complaints)


FIRST = min(SOURCES, key=lambda name: len(SOURCES[name]))
BROKEN = [
    (docstrings, r"\nShapes .*", "\n"),
    (docstrings, r"\nExpect  ", "\nExpect   TODO "),
    (docstrings, r"python \w+\.py", "python other.py"),
    (docstrings, r"\n\n\ndef train", "\n\n\ndef undocumented():\n    pass\n\n\ndef train"),
    (imports, r"\nimport tyro", "\nimport tyro\nimport pandas"),
    (imports, r"\nimport tyro", "\nimport tyro\nfrom . import other"),
    (imports, r"\nimport tyro", "\nimport tyro\nfrom cleanrl_style import other"),
    (flags, r"\n    seed: ", "\n    unread: int = 0  # nothing reads this\n    seed: "),
    (flags, r"(\n    seed: .*?)  # .*", r"\1"),
    (flags, r"\n    seed: .*", ""),
    (flags, r'\nSCRIPT = "', '\nSCRIPT = "x'),
    (tags, r'"charts/SPS"', '"charts/steps_per_second"'),
    (form, r"\n    main\(\)\n$", "\n    main()\n    main()\n"),
    (form, r"^# ///", "#\n# ///"),
    (form, r"\n# ---- Plumbing", "\n# ---- The rest"),
    (form, r"\n\n\ndef train", f"\n\n\nX = {'1' * 100}\n\n\ndef train"),
    (form, r"\n\n\ndef train", "\n\n\ndef long():\n" + "    pass\n" * 91 + "\n\ndef train"),
    (form, r"\n    torch\.manual_seed", "\n    global envs\n    torch.manual_seed"),
    (form, r"\n    torch\.manual_seed", "\n    torch._foreach_lerp_()\n    torch.manual_seed"),
    (flat_train, r"\n    torch\.manual_seed", "\n    with x: pass\n    torch.manual_seed"),
    (flat_train, r"\n    torch\.manual_seed", "\n    try: pass\n    finally: torch.manual_seed"),
    (flat_train, r"\n    torch\.manual_seed", "\n    def nested(): pass\n    torch.manual_seed"),
    (metadata, r'"tqdm>=', '"tqdm>=9'),
    (metadata, r'"torch>=2\.\d+', '"torch>=1.9'),
    (metadata, r'"tyro>=', '"rich>=1.0", "tyro>='),
]  # fmt: skip


@pytest.mark.parametrize("rule, pattern, replacement", BROKEN)
def test_rule_finds_a_broken_script(rule, pattern, replacement):
    broken, count = re.subn(pattern, replacement, SOURCES[FIRST], count=1)
    assert count == 1, "the pattern no longer fits the script"
    assert len(list(rule({FIRST: broken}))) > len(list(rule({FIRST: SOURCES[FIRST]})))


def test_rule_finds_a_script_without_a_test_file():
    assert len(list(described({"no_such_script": ""}))) == 6


DIFFER = [
    (same_plumbing, r'"checkpoint\.pt"', '"checkpoint.bin"'),
    (same_plumbing, r"  # of a GIF", "  # of GIFs"),
    (same_plumbing, r"\n\nclass Envs:", "\n\nclass Envs:  # mine"),
    (same_plumbing, r'(?s)\n\ndef make_flat_env.*?\n\n\n(?=.*".tmp")(.*)".tmp"', r'\n\n\1".new"'),
    (same_name_same_code, r"eval_episodes, num_envs\)", "eval_episodes, num_envs - 1)"),
    (
        same_name_same_code,
        r"\nFraction = Annotated\[float, 0, 1\]",
        "\nFraction = Annotated[float, 0, 2]",
    ),
    (flags, r"(\n    seed: .*?)  # .*", r"\1  # another comment"),
    (flags, r"\n    seed: .* =", "\n    seed: float ="),
]


@pytest.mark.parametrize("rule, pattern, replacement", DIFFER)
def test_rule_finds_two_scripts_that_differ(rule, pattern, replacement):
    copy = SOURCES[FIRST].replace(FIRST, "other")
    assert not list(rule({FIRST: SOURCES[FIRST], "other": copy}))
    differs, count = re.subn(pattern, replacement, copy, count=1)
    assert count == 1, "the pattern no longer fits the script"
    assert list(rule({FIRST: SOURCES[FIRST], "other": differs}))


def test_a_function_may_differ_if_it_says_so_and_envs_from_pixels():
    copy = (
        SOURCES[FIRST]
        .replace(FIRST, "other")
        .replace('"""Plays args.', '"""Plays like others, args.')
    )
    copy = copy.replace("eval_episodes, num_envs)", "eval_episodes, num_envs - 1)")
    assert not list(same_name_same_code({FIRST: SOURCES[FIRST], "other": copy}))
    head, tail = re.split(r"(?<=\n\n)def make_flat_env(?s:.*?)\n\n\n(?=class Envs)", SOURCES[FIRST])
    pixels = head + tail.replace("class Envs:", "class Envs:  # mine")
    assert not list(same_plumbing({FIRST: SOURCES[FIRST], "other": pixels}))


def test_every_registered_tag_is_written_by_some_script():
    sources = "".join(path.read_text() for path in (ROOT / "cleanrl_style").glob("*.py"))
    assert [tag for tag in TAGS if f'"{tag}"' not in sources] == []


def test_packages_that_are_not_named_come_with_one_that_is():
    for package, parent in COMES_WITH.values():
        assert package in " ".join(importlib.metadata.requires(parent)).lower()


def test_ci_finds_the_command_in_the_readme_and_nothing_else(tmp_path):
    # Blocks of other languages follow it.
    (tmp_path / "README.md").write_text((ROOT / "README.md").read_text().replace("~~~", "```"))
    (line,) = re.findall("^command=.*", (ROOT / ".ci" / "run").read_text(), re.M)
    command = ["bash", "-c", f'{line}; echo "$command"']
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stdout
    assert [step.strip(" &") for step in found.split("\n") if step][1:] == [
        "pip install -r tests/requirements.txt", "python -m pytest tests -n 2"
    ]  # fmt: skip
