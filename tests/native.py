"""Helpers for tests of the CPU's kernels."""

import os
import subprocess
import sys

import pytest

from fastguard import ops
from fastguard.ops import _library

needs_kernel = pytest.mark.skipif(
    _library.cpu_problem is not None, reason=f"no CPU kernels: {_library.cpu_problem}"
)


def assert_same_from_every_instruction_set(script):
    """Run ``script``, which prints its instruction set and a digest of its results, on each set."""
    printed = {}
    for capability in ops.cpu_info()["compiled"].split():
        run = subprocess.run(
            [sys.executable, "-c", script],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "FASTGUARD_CPU_CAPABILITY": capability},
        )
        chosen, values = run.stdout.split(" ", 1)
        printed[chosen] = values
    assert "default" in printed
    assert len(set(printed.values())) == 1, printed


def run_tests_on(capability, files, selection):
    """Run tests, selected as by pytest's -k, on another instruction set than the chosen one."""
    if capability == ops.cpu_info()["chosen"]:
        return  # that is what all the other tests run on
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, "-k", selection],
        capture_output=True,
        text=True,
        env={**os.environ, "FASTGUARD_CPU_CAPABILITY": capability},
    )
    assert run.returncode == 0, run.stdout[-5000:]
