"""The launchers in csrc/cuda, on tensors of the CPU: cases of their own, and the guard's tests.

In a process of their own, for there the operators of fastguard are the launchers.
"""

import os
import re
import subprocess
import sys

import pytest

from tests import simt

from . import launchers

GUARDS = [
    *("ops/test_grad_norm", "ops/test_decide", "ops/test_grad_norm_decide", "ops/test_scale"),
    *("ops/test_guard_decide", "ops/test_guard_thresholds", "ops/test_clip", "ops/test_settle"),
    *("ops/test_accumulate", "ops/test_adamw", "ops/test_adamw_refusals", "optim/test_adam"),
    *("optim/test_packed_state", "optim/test_adam_state_dict", "test_clip", "test_clip_orders"),
    *("guard/test_grad_guard", "guard/test_update", "guard/test_accumulation"),
    *("guard/test_buffers", "guard/test_fault_injection"),
    "guard/test_rollback",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("launchers")
    try:
        launchers.package(folder)
    except simt.NoCompiler as error:
        pytest.skip(str(error))
    return folder


def passed(folder, *files):
    """How many tests of these files pass; all must."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["-p", "tests.simt.launchers.plugin", "--tb=short", *files]
    # The tensors are small: more threads would wait for each other longer than they work.
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    return int(re.search(r"(\d+) passed", done.stdout)[1])


def test_the_launchers(folder):
    cases = sorted(
        path.relative_to(folder) for path in folder.glob("tests/simt/launchers/cases*.py")
    )
    assert passed(folder, *map(str, cases)) >= 50


def test_the_guard_on_the_launchers(folder):
    assert passed(folder, *(f"tests/{name}.py" for name in GUARDS)) >= 700
