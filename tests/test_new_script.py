"""A new algorithm is two files: the script and its test file. No other file has to know of it."""

import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, first


@pytest.mark.slow
def test_a_script_and_its_test_file_are_enough(tmp_path):
    """Both are copied under a new name into a copy of the tree, and pass the common tests there."""
    old, new, tree = first(), "a_new_algorithm", tmp_path / "tree"
    ignored = shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__", ".pytest_cache")
    shutil.copytree(ROOT, tree, ignore=ignored)
    for path in (f"cleanrl_style/{old}.py", f"tests/test_{old}.py"):
        copy = tree / path.replace(old, new)
        copy.write_text((tree / path).read_text().replace(old, new))
    subprocess.run([sys.executable, "tests/benchmarks/plot.py"], cwd=tree, check=True)
    tests = f"test_conventions or {new} and (test_help or test_another_seed)"
    command = [
        "-m",
        "pytest",
        "tests/test_conventions.py",
        "tests/test_commands.py",
        "-rA",
        "-k",
        tests,
    ]
    ended = subprocess.run([sys.executable, *command], cwd=tree, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout
    assert len(re.findall(rf"PASSED tests/test_commands.py::test_\w+\[{new}\]", ended.stdout)) == 2
