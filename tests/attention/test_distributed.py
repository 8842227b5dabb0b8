"""Attention on two ranks (gloo): DTensors, and FSDP2 before and after `replace_attention_`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

CASES = (
    "the_function_is_that_of_whole_tensors",
    "the_module_takes_dtensors",
    "fsdp_shards_what_was_replaced",
    "what_is_sharded_is_left_alone_by_name",
)


@pytest.fixture(scope="module")
def ran() -> str:
    """What the ranks wrote, after all cases or the first that failed."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launch, "-m", "tests.attention.ranks", *CASES],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
    )
    return done.stdout


@pytest.mark.parametrize("case", CASES)
def test_on_two_ranks(case, ran):
    assert all(f"rank {rank}: {case}" in ran for rank in (0, 1)), ran
