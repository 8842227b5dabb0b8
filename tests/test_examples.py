"""Each of examples/ runs, and prints what the guard did with the bad batch."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
DISTRIBUTED = ("ddp", "fsdp2")

FINITE = "weights and BatchNorm's statistics finite: True"
#: What each prints, in this order; and what goes before its name on the command line.
PRINTED = {
    "plain_loop": ["batch 40: SKIP_NONFINITE, first NaN at 0.weight[0]", FINITE],
    "amp": ["batch 40: SKIP_NONFINITE, scale now 512", FINITE],
    "accumulation": ["micro-batch 10/2: left out, 3 applied", FINITE],
    "fsdp2": ["step 20: SKIP_NONFINITE", "step 20: SKIP_NONFINITE", "weights finite: True"],
    "ddp": ["step 20: SKIP_NONFINITE", "step 20: SKIP_NONFINITE", "weights finite: True"],
    "attention": [
        "replaced: attention",
        "batch 40: output finite: True, SKIP_NONFINITE",
        "weights finite: True",
    ],
    "diagnose": ["exploding gradient at 1 to 16 (Block)", "After stable_init_", "nothing wrong"],
    "muon_adamw": ["batch 40: SKIP_NONFINITE, neither optimizer has stepped", FINITE],
    "lightning_trainer": ["skipped 1 of 100 steps; the scheduler took 99", FINITE],
    "transformers_trainer": ["skipped 1 of 100 steps; the scheduler took 99", FINITE],
    "accelerate_loop": [
        "batch 41: SKIP_NONFINITE, the scheduler waits",
        "50 steps; the scheduler took 49",
        FINITE,
    ],
}


def test_every_example_is_listed_and_short():
    scripts = {path.stem: path.read_text(encoding="utf-8") for path in EXAMPLES.glob("*.py")}
    assert scripts.keys() == {*PRINTED, "onnx_client"}  # tests/speech/cli/test_onnx_client.py
    readme = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    for name, text in scripts.items():
        command = re.search(rf"`((?:python|torchrun).* ?examples/{name}\.py[^`]*)`", readme)[1]
        assert f"\n{command}\n" in text  # the docstring says the same
        assert 30 <= len(text.splitlines()) < 60


@pytest.mark.parametrize("name", PRINTED)
def test_it_says_what_the_guard_did(name):
    command = [
        sys.executable,
        *(TORCHRUN if name in ("fsdp2", "ddp") else []),
        f"examples/{name}.py",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = iter(done.stdout.splitlines())
    for expected in PRINTED[name]:
        assert any(expected in line for line in lines), done.stdout
    assert "finite: False" not in done.stdout
