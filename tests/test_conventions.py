"""What every script must look like, read from its source. As the files share no code, these tests hold them together.

Each rule is a function over {file name: source} that yields complaints. It is applied to the scripts, and to a
broken copy of one, where it must complain: a rule that cannot fail holds nothing.
"""

import ast
import difflib
import importlib.metadata
import inspect
import re
import subprocess
import sys
from dataclasses import asdict

import pytest
from conftest import ROOT, SCRIPTS

SOURCES = {path.name: path.read_text() for path in SCRIPTS}
README = (ROOT / "README.md").read_text()

HEADINGS = ["Paper", "Idea", "Differs", "Shapes", "Run", "Expect"]

# Every tag that a script may write. One name means one thing, in all scripts.
TAGS = {
    "charts/episodic_return",  # of the episodes that ended, the environment's own reward, undiscounted
    "charts/episodic_length",  # in steps
    "charts/learning_rate",
    "charts/SPS",  # environment steps per second, since the start or the resumption
    "charts/epsilon",  # probability of a random action
    "losses/td_loss",  # of the last gradient step's batch, as is
    "losses/q_values",  # mean of Q(s, a)
    "losses/policy_loss",
    "losses/value_loss",
    "losses/approx_kl",  # of the old policy from the new one, in nats, mean over the minibatches of an update
    "losses/clipfrac",  # share of the steps where the policy's ratio is beyond its clip
    "losses/explained_variance",  # of the returns, by the values before the update
    "losses/entropy",  # of the policy, in nats, mean over the steps
    "eval/episodic_return",  # mean over the evaluation episodes: greedy, but on Atari as each script says
    "eval/episodic_length",
    "eval/episode",  # the animated picture
    "hyperparameters",  # the arguments, as text
}

# Every script takes these flags, in this order within its own.
COMMON_FLAGS = [
    "env_id", "seed", "total_timesteps", "exp_name", "runs_dir", "device", "checkpoint_frequency", "resume",
    "evaluate", "eval_episodes", "capture_video",
]  # fmt: skip

# Functions and classes that have one name but not one code, with the reason. All others must be equal, word for word.
OWN_CODE = {
    "Args": "every algorithm has settings of its own",
    "__post_init__": "and its own impossible values",
    "train": "is the algorithm",
    "update": "is the algorithm",
    "evaluate": "acts as the algorithm does",
    "main": "builds the networks of the algorithm",
    "make_envs": "asks for the spaces that the algorithm can handle",
    "__init__": "networks differ",
    "forward": "networks differ",
    "save": "lists what the algorithm must remember",
    "pick_device": "depends on how large the networks are",
    "make_network": "networks differ",
    "QNetwork": "networks differ",
    "Batch": "observations differ",
    "ReplayBuffer": "numbers are stored as they are, frames once each",
    "add": "is part of ReplayBuffer",
    "sample": "is part of ReplayBuffer",
    "state_dict": "is part of ReplayBuffer",
    "load_state_dict": "is part of ReplayBuffer",
    "Agent": "networks differ",
    "make_agent": "networks differ",
    "act": "policies differ, and those from pixels are too expensive to be asked twice",
    "make_batch": "policies differ",
    "log_prob_and_entropy": "policies differ",
    "play_greedily": "acts as the algorithm does",
}

MODULE_OF_A_DEPENDENCY = {"numpy": "gymnasium", "PIL": "tensorboard"}  # not named: these packages require them


# ---- The rules ------------------------------------------------------------------------------------------------------


def docstrings(sources):
    for name, source in sources.items():
        docstring = ast.get_docstring(ast.parse(source)) or ""
        lines = docstring.splitlines()
        if not 15 <= len(lines) <= 35:
            yield f"{name}: the docstring has {len(lines)} lines"
        found = [line.split()[0] for line in lines[1:] if re.match(r"[A-Z]\w+ {2,}\S", line)]
        if found != HEADINGS:
            yield f"{name}: the docstring's headings are {found}, not {HEADINGS}"
        if "TODO" in docstring or not lines or not lines[0].endswith("."):
            yield f"{name}: the docstring is unfinished"
        for line in re.findall(r"python (\w+\.py)", docstring):
            if line != name:
                yield f"{name}: the docstring runs {line}"


def imports(sources):
    for name, source in sources.items():
        metadata = {package for package, _, _ in requirements(inline_metadata(source)[1])}
        project = {other.removesuffix(".py") for other in sources} | {"cleanrl_style", "tests"}
        for node in ast.walk(ast.parse(source)):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or "."] if isinstance(node, ast.ImportFrom) else []
            for module in (module.split(".")[0] for module in modules):
                package = MODULE_OF_A_DEPENDENCY.get(module, module.replace("_", "-"))
                if module in project or module == "":
                    yield f"{name}: imports {module}, a file of this project"
                elif module not in sys.stdlib_module_names and package not in metadata:
                    yield f"{name}: imports {module}, which its metadata does not name"


def arguments(source):
    """Name -> (annotation, default, comment) of the fields of Args."""
    (node,) = [n for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == "Args"]
    lines = source.splitlines()
    return {
        field.target.id: (
            ast.unparse(field.annotation), ast.unparse(field.value),
            lines[field.end_lineno - 1][field.end_col_offset :].strip().removeprefix("# "),
        )
        for field in node.body if isinstance(field, ast.AnnAssign)
    }  # fmt: skip


def flags(sources):
    seen = {}
    for name, source in sources.items():
        fields = arguments(source)
        if [field for field in fields if field in COMMON_FLAGS] != COMMON_FLAGS:
            yield f"{name}: does not have the common flags in their order"
        for field, (annotation, _, comment) in fields.items():
            if not re.search(rf"\b(args|saved|self)\.{field}\b", source):
                yield f"{name}: nothing reads --{field.replace('_', '-')}"
            if not comment:
                yield f"{name}: --{field} has no comment"
            meaning = annotation.removesuffix(" | None"), comment  # one script may do without what another needs
            if seen.setdefault(field, meaning) != meaning:
                yield f"{name}: --{field} has another type or comment elsewhere"
        if 'exp_name: str = SCRIPT' not in source or f'SCRIPT = "{name.removesuffix(".py")}"' not in source:
            yield f"{name}: SCRIPT is not its name"


def same_name_same_code(sources):
    seen = {}
    for name, source in sources.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name not in OWN_CODE:
                code = ast.unparse(node)
                other, expected = seen.setdefault(node.name, (name, code))
                if code != expected:
                    yield f"{name}: {node.name} is not as in {other}"


def tags(sources):
    for name, source in sources.items():
        strings = {node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)}
        for tag in sorted(s for s in strings if isinstance(s, str) and re.fullmatch(r"(charts|losses|eval)/\w+", s)):
            if tag not in TAGS:
                yield f"{name}: the tag {tag} is not in the registry"


def form(sources):
    for name, source in sources.items():
        if not source.startswith("# /// script\n"):
            yield f"{name}: does not begin with its metadata"
        if not source.endswith('\n\nif __name__ == "__main__":\n    main()\n'):
            yield f"{name}: does not end with the two-line guard"
        for number, line in enumerate(source.splitlines(), 1):
            if len(line) > 120 or line != line.rstrip():
                yield f"{name}:{number}: more than 120 characters, or trailing blanks"
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 90:
                yield f"{name}: {node.name} is too long for a screen"
            if isinstance(node, ast.Global | ast.Nonlocal):
                yield f"{name}: global state"
        for node in ast.parse(source).body:
            if isinstance(node, ast.FunctionDef) and node.name != "main" and not ast.get_docstring(node):
                yield f"{name}: {node.name} has no docstring"


def inline_metadata(source):
    """(requires-python, [requirement, ...]) of the PEP 723 block, parsed as that standard says."""
    (block,) = re.findall(r"(?m)^# /// script$\s((?:^#(?:| .*)$\s)+?)^# ///$", source)
    text = "".join(line[2:] + "\n" for line in block.splitlines())
    (python,) = re.findall(r'requires-python = "(.*)"', text)
    return python, re.findall(r'"([^"]+)"', text.split("dependencies")[1])


def requirements(lines):
    """(name, extras, version) of each requirement."""
    for line in lines:
        match = re.fullmatch(r"([\w-]+)(?:\[([\w,-]+)\])?(?:>=|==)([\d.]+)", line)
        assert match, f"not of the form name[extras]>=version: {line}"
        yield match[1], set((match[2] or "").split(",")) - {""}, tuple(map(int, match[3].split(".")))


def metadata(sources):
    def read(path):
        lines = [line for line in path.read_text().splitlines() if line and not line.startswith(("#", "-r"))]
        return {name: (extras, version) for name, extras, version in requirements(lines)}

    pins, oldest = read(ROOT / "requirements.txt"), read(ROOT / "tests" / "requirements-oldest.txt")
    for name, source in sources.items():
        for package, extras, bound in requirements(inline_metadata(source)[1]):
            if package not in pins:
                yield f"{name}: {package} is not in requirements.txt"
                continue
            if not extras <= pins[package][0]:
                yield f"{name}: {package}{extras} is more than requirements.txt has"
            if bound > pins[package][1]:
                yield f"{name}: {package} is newer than in requirements.txt"
            if package not in oldest or oldest[package][1] > bound:
                yield f"{name}: {package} was never run as old as its lower bound says"


RULES = [docstrings, imports, flags, same_name_same_code, tags, form, metadata]


# ---- The tests ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_scripts_keep(rule):
    assert list(rule(SOURCES)) == []


FIRST, SOURCE = next(iter(SOURCES.items()))
BROKEN = [
    (docstrings, r"\nShapes .*", "\n"),
    (docstrings, r"\nExpect  ", "\nExpect   TODO "),
    (imports, r"\nimport tyro", "\nimport tyro\nimport pandas"),
    (imports, r"\nimport tyro", "\nimport tyro\nfrom tests import conftest"),
    (flags, r"\n    seed: int", "\n    unread: int = 0  # nothing reads this\n    seed: int"),
    (flags, r"(\n    seed: int = 1) .*", r"\1"),
    (tags, r'"charts/SPS"', '"charts/steps_per_second"'),
    (form, r"\n    main\(\)\n$", "\n    main()\n    main()\n"),
    (form, r"\n\n\ndef train", "\n\n\ndef undocumented():\n    pass\n\n\ndef train"),
    (metadata, r'"tqdm>=', '"tqdm>=9'),
    (metadata, r'"torch>=2\.\d+', '"torch>=1.9'),
    (metadata, r'"tyro>=', '"rich>=1.0", "tyro>='),
]


@pytest.mark.parametrize("rule, pattern, replacement", BROKEN, ids=[rule.__name__ for rule, _, _ in BROKEN])
def test_rule_finds_a_broken_script(rule, pattern, replacement):
    broken, count = re.subn(pattern, replacement, SOURCE, count=1)
    assert count == 1, "the pattern no longer fits the script"
    assert list(rule({FIRST: broken}))


@pytest.mark.parametrize(
    "rule, pattern, replacement",
    [
        (same_name_same_code, r'"checkpoint\.tmp"', '"checkpoint.new"'),
        (flags, r"(\n    seed: int = 1 ) # .*", r"\1 # another comment"),
        (flags, r"\n    seed: int", "\n    seed: float"),
    ],
)
def test_rule_finds_two_scripts_that_differ(rule, pattern, replacement):
    other = re.sub(pattern, replacement, SOURCE, count=1)
    assert other != SOURCE
    assert list(rule({FIRST: SOURCE, "other.py": other.replace(FIRST.removesuffix(".py"), "other")}))
    assert not list(rule({FIRST: SOURCE, "other.py": SOURCE.replace(FIRST.removesuffix(".py"), "other")}))


@pytest.mark.parametrize("script, name, changes", [
    ("ppo_atari", "update", ""),
    ("ppo_atari", "log_prob_and_entropy", ""),
    ("ppo_continuous", "evaluate", ""),
    ("ppo_continuous", "main", ""),
    ("ppo_continuous", "update", """
-    logits, values = agent(batch.obs)
-    log_probs, entropies = log_prob_and_entropy(logits, batch.actions)
+    means, values = agent(batch.obs)
+    log_probs, entropy = log_prob_and_entropy(means, agent.log_deviations, batch.actions)
-    entropy = entropies.mean()
"""),
    ("ppo_continuous", "make_batch", """
-    \"\"\"What there is to learn from a rollout: obs, next_obs (T, N, O) and four of (T, N) -> T * N rows.
+    \"\"\"What there is to learn from a rollout: obs, next_obs (T, N, O), actions (T, N, K), three of (T, N) -> T * N rows.
-    logits, values = agent(obs)
+    means, values = agent(obs)
-    log_probs, _ = log_prob_and_entropy(logits, actions)
+    log_probs, _ = log_prob_and_entropy(means, agent.log_deviations, actions)
"""),
    ("ppo_continuous", "train", """
-    first_action = int(envs[0].action_space.start)  # Discrete actions count from here, nearly always from 0
+    low, high = envs[0].action_space.low, envs[0].action_space.high
-                    steps = [env.step(first_action + action) for env, action in zip(envs, actions.tolist())]
+                    steps = [env.step(action) for env, action in zip(envs, to_bounds(actions, low, high))]
-                batch = make_batch(agent, rows, actions.long(), rewards, next_rows, terminated, truncated, args)
+                batch = make_batch(agent, rows, actions, rewards, next_rows, terminated, truncated, args)
"""),
    ("ppo_continuous", "play_greedily", """
-    first_action, device = int(envs[0].action_space.start), next(agent.parameters()).device
+    low, high, device = envs[0].action_space.low, envs[0].action_space.high, next(agent.parameters()).device
-        for i, action in zip(running, actions.tolist()):
-            obs[i], reward, terminated, truncated, _ = envs[i].step(first_action + action)
+        for i, action in zip(running, to_bounds(actions.numpy(), low, high)):
+            obs[i], reward, terminated, truncated, _ = envs[i].step(action)
"""),
    ("dqn_cartpole", "play_greedily", """
-    envs: list[gym.Env], agent: Agent, seeds: list[int], frames: list | None = None
+    envs: list[gym.Env], q_network: nn.Module, seeds: list[int], frames: list | None = None
-    \"\"\"Plays one episode for each seed, side by side, by the most probable actions: the rewards of each.
+    \"\"\"Plays one episode for each seed, side by side, by the largest Q(s, .): the rewards of each.
-    first_action, device = int(envs[0].action_space.start), next(agent.parameters()).device
+    first_action, device = int(envs[0].action_space.start), next(q_network.parameters()).device
-        actions = act(agent, torch.from_numpy(rows).to(device), greedy=True)
+        actions = select_actions(q_network, torch.from_numpy(rows).to(device), epsilon=0.0)
"""),
    ("dqn_cartpole", "evaluate", """
-def evaluate(args: Args, envs: list[gym.Env], agent: Agent, run_dir: Path) -> tuple[float, float]:
+def evaluate(args: Args, envs: list[gym.Env], q_network: nn.Module, run_dir: Path) -> tuple[float, float]:
-        episodes += play_greedily(envs, agent, seeds[first : first + len(envs)], None if first else frames)
+        episodes += play_greedily(envs, q_network, seeds[first : first + len(envs)], None if first else frames)
"""),
])  # fmt: skip
def test_what_is_tested_in_ppo_cartpole_is_the_same_but_for_these_lines(script, name, changes):
    """So a test of the one is a test of the other, although OWN_CODE lets them differ."""
    theirs, ours = (
        inspect.getsource(getattr(importlib.import_module(module), name)).splitlines()
        for module in ("ppo_cartpole", script)
    )
    found = list(difflib.unified_diff(theirs, ours, n=0, lineterm=""))[2:]
    assert [line for line in found if not line.startswith("@@")] == changes.strip("\n").splitlines()


# What the records were made with, where their commands do not say otherwise. Who changes one of these, records anew.
DEFAULTS = {
    "reinforce_cartpole": """
        total_timesteps=100000 learning_rate=0.01 anneal_lr=True gamma=0.99 episodes_per_update=8
        normalize_returns=True
    """,
    "dqn_cartpole": """
        total_timesteps=100000 learning_rate=0.0025 anneal_lr=True num_envs=4 buffer_size=100000 gamma=0.99
        tau=1.0 target_network_frequency=500 batch_size=64 start_e=1.0 end_e=0.05 exploration_fraction=0.2
        learning_starts=1000 train_frequency=2 gradient_steps=1 double_q=False norm_obs=False hidden_size=64
        checkpoint_frequency=20000
    """,
    "dqn_atari": """
        total_timesteps=10000000 learning_rate=0.0001 adam_epsilon=0.00015 anneal_lr=False num_envs=8
        buffer_size=1000000 gamma=0.99 tau=1.0 target_network_frequency=1000 batch_size=32 start_e=1.0
        end_e=0.01 exploration_fraction=0.1 learning_starts=80000 train_frequency=4 double_q=False loss=huber
        max_grad_norm=None norm_obs=False sticky_actions=0.0 precision=auto checkpoint_frequency=100000
    """,
    "ppo_cartpole": """
        total_timesteps=100000 learning_rate=0.001 anneal_lr=True num_envs=8 num_steps=32 gamma=0.98
        gae_lambda=0.8 num_minibatches=1 update_epochs=20 norm_adv=True clip_coef=0.2 clip_vloss=False
        ent_coef=0.0 vf_coef=0.5 max_grad_norm=0.5 target_kl=None norm_obs=False norm_reward=False
        checkpoint_frequency=20000
    """,
    "ppo_continuous": """
        total_timesteps=200000 learning_rate=0.001 anneal_lr=True num_envs=4 num_steps=512 gamma=0.9
        gae_lambda=0.95 num_minibatches=32 update_epochs=10 norm_adv=True clip_coef=0.2 clip_vloss=False
        ent_coef=0.01 vf_coef=0.5 max_grad_norm=0.5 target_kl=None norm_obs=True norm_reward=True
        checkpoint_frequency=20000
    """,
    "ppo_atari": """
        total_timesteps=10000000 learning_rate=0.00025 anneal_lr=True num_envs=8 num_steps=128 gamma=0.99
        gae_lambda=0.95 num_minibatches=4 update_epochs=4 norm_adv=True clip_coef=0.1 clip_vloss=True
        ent_coef=0.01 vf_coef=0.5 max_grad_norm=0.5 target_kl=None norm_obs=False sticky_actions=0.0
        precision=auto checkpoint_frequency=100000
    """,
}


@pytest.mark.parametrize("script", DEFAULTS)
def test_defaults_are_those_of_the_records(script):
    module = importlib.import_module(script)
    settings = [name for name in asdict(module.Args()) if name not in module.HOUSEKEEPING | {"env_id", "seed"}]
    assert " ".join(f"{name}={getattr(module.Args(), name)}" for name in settings) == " ".join(DEFAULTS[script].split())


@pytest.mark.parametrize("name", ["MAX_EPISODE_STEPS", "LOG_FREQUENCY", "SAMPLE", "MAX_FRAMES", "STACK", "RunDir"])
def test_constants_of_one_name_are_the_same(name):
    lines = {line for source in SOURCES.values() for line in source.splitlines() if line.startswith(f"{name} = ")}
    assert len(lines) == 1


def test_every_registered_tag_is_written_by_some_script():
    assert [tag for tag in TAGS if not any(f'"{tag}"' in source for source in SOURCES.values())] == []


def test_packages_that_are_not_named_come_with_one_that_is():
    for module, package in MODULE_OF_A_DEPENDENCY.items():
        names = " ".join(importlib.metadata.requires(package)).lower()
        assert {"PIL": "pillow"}.get(module, module) in names


def test_ci_finds_the_command_in_the_readme_and_nothing_else(tmp_path):
    (tmp_path / "README.md").write_text(README.replace("~~~", "```"))  # blocks of other languages follow it
    (line,) = (line for line in (ROOT / ".ci" / "run").read_text().splitlines() if line.startswith("command="))
    found = subprocess.run(["bash", "-c", f'{line}; echo "$command"'], cwd=tmp_path, capture_output=True, text=True).stdout
    assert [step.strip(" &") for step in found.split("\n") if step][1:] == [
        "pip install -r tests/requirements.txt", "python -m pytest tests -n 2"
    ]  # fmt: skip
