"""Beside torch and numpy alone, the trainer's commands name the packages that are missing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from fastguard._extras import COMMAND_PACKAGES

tomllib = pytest.importorskip("tomllib")  # of Python 3.11

ROOT = Path(__file__).resolve().parent.parent

COMMANDS = "train", "evaluate", "transcribe", "report", "diagnose", "export"

#: Runs modules as programs, in a process whose finders do not see the packages of argv[1].
WITHOUT = """
import contextlib, io, json, runpy, sys

class Hiding:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in hidden:
            return self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

hidden, *modules = sys.argv[1:]
hidden = set(hidden.split(","))
sys.meta_path[:] = map(Hiding, sys.meta_path)
found = []
for module in modules:
    out, err, status = io.StringIO(), io.StringIO(), 0
    sys.argv = [module]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            status = end.code
    found.append((status, out.getvalue(), err.getvalue()))
print(json.dumps(found))
"""
EVERYTHING = ",".join(COMMAND_PACKAGES)


def without(hidden, *modules):
    """Exit status, stdout and stderr of each module where the packages are hidden."""
    command = [sys.executable, "-c", WITHOUT, hidden, *modules]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_command_names_all_that_is_missing():
    packages = ", ".join(COMMAND_PACKAGES.values())
    message = f"error: the packages {packages} are not installed: pip install torch-fastguard\n"
    found = without(EVERYTHING, *(f"fastguard.{name}" for name in COMMANDS))
    assert found == [[2, "", message]] * len(COMMANDS)


@pytest.mark.parametrize(
    "hidden, named",
    [("yaml", "PyYAML"), ("markupsafe", "markupsafe")],  # jinja2 needs the second
)
def test_a_command_names_the_one_that_is_missing(hidden, named):
    message = f"error: the package {named} is not installed: pip install torch-fastguard\n"
    assert without(hidden, "fastguard.report") == [[2, "", message]]


def test_the_librarys_commands_need_none_of_them():
    for status, out, err in without(EVERYTHING, "fastguard.__main__", "fastguard.env"):
        assert (status, err) == (0, "")
        assert out


def test_the_list_has_what_the_project_requires():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    required = {canonicalize_name(Requirement(line).name) for line in project["dependencies"]}
    listed = {canonicalize_name(package) for package in COMMAND_PACKAGES.values()}
    assert listed == required - {"torch", "numpy"}
