"""How every command ends: its exit status, and a line instead of a traceback."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastguard._command import exit_status
from fastguard._io import failures

ROOT = str(Path(__file__).parent.parent)
NO_ROOM = "error: [Errno 28] No space left on device\n"


def fail(error):
    raise error


@pytest.mark.parametrize(
    "command, status, message",
    [
        (lambda: None, 0, ""),
        (lambda: 1, 1, ""),
        (lambda: fail(OSError("no space")), 1, "error: no space\n"),
        (lambda: fail(KeyboardInterrupt), 130, ""),
        (lambda: fail(MemoryError), 1, f"error: {failures.in_a_line(MemoryError())}\n"),
        (lambda: torch.empty(1 << 50), 1, None),
    ],
)
def test_exit_status(command, status, message, capsys):
    assert exit_status(command, OSError) == status
    error = capsys.readouterr().err
    assert error == message if message is not None else error.startswith("error: out of memory (")
    assert error.count("\n") <= 1


def test_what_no_command_expects_is_not_hidden():
    with pytest.raises(ZeroDivisionError):
        exit_status(lambda: 1 / 0, OSError)


@pytest.fixture
def run(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    return tmp_path


def report(run, stdout):
    command = [sys.executable, "-m", "fastguard.report", str(run)]
    return subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True)


def test_a_reader_that_has_enough(run):
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = report(run, writer)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")
    assert (run / "report.html").stat().st_size > 0


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a full disk that Linux has")
def test_output_that_finds_no_room(run):
    with open("/dev/full", "w") as full:
        done = report(run, full)
    assert (done.returncode, done.stderr) == (1, NO_ROOM)


PLAIN = {
    "env": [],
    "gpucheck": ["--device", "cpu", "--quick", "--no-tests", "--repeats", "1"],
}


def plain(name, folder, stdout, **environment):
    """A command of the library part, whose home is missing."""
    return subprocess.run(
        [sys.executable, "-m", f"fastguard.{name}", *PLAIN[name]],
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": ROOT,
            "OMP_NUM_THREADS": "1",
            "HOME": "/no",
            **environment,
        },
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a full disk that Linux has")
def test_a_full_disk_under_a_command_of_the_library(tmp_path, name):
    with open("/dev/full", "w") as full:
        done = plain(name, tmp_path, full)
    assert (done.returncode, done.stderr) == (1, NO_ROOM)


@pytest.mark.parametrize("name", PLAIN)
def test_nobody_reads_a_command_of_the_library(tmp_path, name):
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = plain(name, tmp_path, writer)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


def test_a_stream_that_was_closed_before(tmp_path):
    script = "import os, runpy, sys; sys.stdout = None; runpy.run_module('fastguard.env', "
    script += "run_name='__main__')"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_terminal_that_lacks_the_letters(tmp_path, encoding):
    environment = {"PYTHONIOENCODING": encoding, "LC_ALL": "C"}
    done = plain("env", tmp_path, subprocess.PIPE, **environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert "CUDA devices" in done.stdout
