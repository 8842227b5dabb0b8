"""Attention on two ranks (gloo): DTensors, and FSDP2 before and after `replace_attention_`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packaging.version import Version

ROOT = Path(__file__).parents[2]

DTENSORS = ("the_function_is_that_of_whole_tensors", "the_module_takes_dtensors")
FSDP = ("fsdp_shards_what_was_replaced", "what_is_sharded_is_left_alone_by_name")


def run(cases: tuple[str, ...]) -> str:
    """What the ranks wrote, after all cases or the first that failed."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launch, "-m", "tests.attention.ranks", *cases],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
    )
    return done.stdout


@pytest.fixture(scope="module")
def with_dtensors() -> str:
    return run(DTENSORS)


@pytest.fixture(scope="module")
def with_fsdp() -> str:
    return run(FSDP)


@pytest.mark.parametrize("case", DTENSORS)
def test_dtensors(case, with_dtensors):
    if Version(torch.__version__) < Version("2.12"):  # torch's own error, never another result
        assert "does not have a sharding strategy registered" in with_dtensors
        return
    assert all(f"rank {rank}: {case}" in with_dtensors for rank in (0, 1)), with_dtensors


@pytest.mark.parametrize("case", FSDP)
def test_fsdp(case, with_fsdp):
    assert all(f"rank {rank}: {case}" in with_fsdp for rank in (0, 1)), with_fsdp
