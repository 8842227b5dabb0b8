"""The documents' commands in an environment without extras: each runs, or names the extra."""

import json
import os
import re
import subprocess
import sys
from collections import defaultdict
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from . import recordings
from .docs.blocks import documents

ROOT = Path(__file__).resolve().parent.parent
#: Without that for developers, who have the extras.
DOCUMENTS = "".join(
    path.read_text(encoding="utf-8") for path in documents() if path.name != "CONTRIBUTING.md"
)


def documented_commands():
    """Files and modules that the documents have Python run, and the trainer's table of commands."""
    text = DOCUMENTS.replace("\\\n", " ")
    named = re.findall(r"python\s+(bench/\w+\.py|-m\s+[\w.]*\w)|torchrun[^`\n]* (-m [\w.]+)", text)
    commands = {" ".join((one or two).split()) for one, two in named} - {"-m fastguard"}
    table = re.search(r"\| `python -m fastguard\.` \| \|\n\|---\|---\|\n((?:\|.*\n)+)", text)
    return commands | {f"-m fastguard.{n}" for n in re.findall(r"^\| `(\w+)", table[1], re.M)}


def commands_of_the_checkout():
    """All files that can be run, by what a document would call them."""
    found = set()
    for pattern in (
        "fastguard/*.py",
        "*/*/__main__.py",
        "bench/*.py",
        "tests/*.py",
        "tests/*/*.py",
    ):
        for path in ROOT.glob(pattern):
            if "\nif __name__ == " in path.read_text(encoding="utf-8"):
                name = path.relative_to(ROOT).with_suffix("")
                module = ".".join(name.parts).removesuffix(".__main__")
                found.add(f"{name}.py" if name.parts[0] == "bench" else f"-m {module}")
    return found


#: Of those of tests/, which are for developers, the ones that a document has its readers run.
COMMANDS = sorted(
    command
    for command in commands_of_the_checkout()
    if not command.startswith("-m tests.") or command in documented_commands()
)

#: Runs each command with --help in one process, which imports torch once.
HELP = """
import contextlib, io, json, runpy, sys, traceback
found = {}
for command in json.loads(sys.argv[1]):
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            if command.startswith("-m "):
                sys.argv, run = [command, "--help"], runpy.run_module
                run(command[3:], run_name="__main__", alter_sys=True)
            else:
                sys.argv, sys.path[0] = [command, "--help"], command.rpartition("/")[0]
                runpy.run_path(command, run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        status = 1
        said.write(traceback.format_exc())
    sys.path[0] = ""
    found[command] = (status, said.getvalue())
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The Python of an environment that `pip install -e .` makes: links to what this one has."""
    folder = tmp_path_factory.mktemp("plain")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    for name in ("Lib/site-packages", packages.relative_to(folder)):
        if (folder / name).is_dir():
            packages = folder / name
    link(without_extras(), packages)
    (packages / "checkout.pth").write_text(str(ROOT))
    (python,) = [path for path in folder.glob("*/python*") if path.stem == "python"]
    return python


def without_extras():
    """The distributions that torch-fastguard requires, and those that they require."""
    wanted, queue = {}, [("torch-fastguard", frozenset())]
    while queue:
        name, extras = queue.pop()
        name = canonicalize_name(name)
        if name in wanted and extras <= wanted[name]:
            continue
        wanted[name] = wanted.get(name, frozenset()) | extras
        for line in metadata.requires(name) or []:
            required = Requirement(line)
            if required.marker is None or any(
                required.marker.evaluate({"extra": extra}) for extra in ("", *extras)
            ):
                queue.append((required.name, frozenset(required.extras)))
    return wanted.keys() - {"torch-fastguard"}


def link(wanted, packages):
    """Link the distributions' files, whole folders where no other distribution has files there."""
    owners = defaultdict(set)
    places = {}
    for distribution in metadata.distributions():
        name = canonicalize_name(distribution.name)
        for file in distribution.files or []:
            if ".." not in file.parts and "__pycache__" not in file.parts:
                for depth in range(1, len(file.parts) + 1):
                    owners[file.parts[:depth]].add(name)
                places[file.parts] = Path(distribution.locate_file(""))
    for parts, base in places.items():
        if not owners[parts] <= wanted:
            continue
        depth = next(d for d in range(1, len(parts) + 1) if owners[parts[:d]] <= wanted)
        target = packages.joinpath(*parts[:depth])
        if not target.is_symlink():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(base.joinpath(*parts[:depth]))


def run(python, *arguments, cwd=ROOT, **environment):
    return subprocess.run(
        [python, *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def helped(plain):
    done = run(plain, "-c", HELP, json.dumps(COMMANDS))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_environment_has_no_extras(plain):
    done = run(plain, "-c", "import torch, fastguard; print(fastguard.__file__)")
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == ROOT / "fastguard" / "__init__.py"
    for module in ("pytest", "hypothesis", "pybind11", "selenium", "safetensors", "onnx"):
        done = run(plain, "-c", f"import {module}")
        assert f"ModuleNotFoundError: No module named '{module}'" in done.stderr


def test_the_documents_commands_are_there():
    named = documented_commands()
    assert len(named) >= 12
    assert named <= set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_it_runs_without_extras(helped, command):
    status, said = helped[command]
    if status == 2:
        assert re.fullmatch(r"error: .* is not installed: pip install '\S+\[\w+\]'\n", said)
    else:
        assert status == 0, said
        assert said


@pytest.mark.parametrize(
    "trainer", ["lightning", "pytorch_lightning", "transformers", "accelerate"]
)
def test_an_integration_names_its_extra(plain, trainer):
    done = run(plain, "-c", f"import fastguard.integrations.{trainer}")
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert re.fullmatch(
        r"fastguard\._extras\.MissingExtra: the package \w+ is not installed: "
        r"pip install 'torch-fastguard\[integrations\]'",
        last,
    )


@pytest.mark.parametrize("logger", ["wandb", "mlflow"])
def test_a_logger_names_its_extra_before_the_run_begins(plain, tmp_path, logger):
    options = ["--run-dir", str(tmp_path / "run"), "--loggers", f"tensorboard,{logger}"]
    (tmp_path / logger).mkdir()  # a folder of that name is no package
    done = run(plain, "-m", "fastguard.train", *options, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (
        2,
        f"error: the package {logger} is not installed: pip install 'torch-fastguard[{logger}]'\n",
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_model_from_training_to_its_report_without_extras(plain, tmp_path):
    """The trainer's commands really run; what an extra brings is refused in one line."""
    options = ["--model", "baseline", "--stable", "--max-steps", "1", "--run-dir", str(tmp_path)]
    speech = recordings.tones(tmp_path)
    commands = {
        ("train", *options, "--data", speech): 0,
        ("evaluate", str(tmp_path)): 0,
        ("evaluate", str(tmp_path), "--decoder", "beam"): "beam",
        ("transcribe", "--checkpoint", str(tmp_path), str(tmp_path / "tone0.wav")): 0,
        ("diagnose", str(tmp_path)): 0,
        ("report", str(tmp_path)): 0,
        ("export", str(tmp_path)): "export",
        ("evaluate", str(tmp_path / "model.safetensors")): "export",
    }
    (tmp_path / "model.safetensors").write_bytes(b"")
    for (name, *arguments), expected in commands.items():
        done = run(plain, "-m", f"fastguard.{name}", *arguments)
        if expected == 0:
            assert done.returncode == 0, done.stderr
        else:
            assert done.returncode == 2, done.stderr
            last = done.stderr.splitlines()[-1]
            assert re.fullmatch(rf"error: .*: pip install 'torch-fastguard\[{expected}\]'", last)
            assert "Traceback" not in done.stderr


def test_the_norm_benchmark_is_timed_without_extras(plain):
    done = run(plain, "bench/norm_kernel.py", "--repeats", "1")
    assert done.returncode == 0, done.stderr
    assert "fastguard.ops.grad_norm" in done.stdout


def test_counting_needs_an_extra(plain):
    done = run(plain, "bench/norm_kernel.py", "--model", "counted")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "error: the package pybind11 is not installed: pip install 'torch-fastguard[test]'\n"
    )


def test_counting_needs_a_compiler():
    command = "bench/norm_kernel.py", "--model", "counted"
    done = run(sys.executable, *command, CXX="no-such-compiler", PYTHONPATH=str(ROOT))
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: .* C\+\+20 compiler; .*'no-such-compiler'.*\n", done.stderr)
