"""The library beside torch and numpy alone, with the oldest torch that it claims and the newest.

The libraries that the tests' own torch built are loaded: the Stable ABI promises that they may be.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.slow

PACKAGES = ("numpy", "pytest", "hypothesis", "expecttest", "packaging")
TESTS = ("tests/guard", "tests/optim", "tests/attention", "tests/test_clip.py")
ABSENT = ("soundfile", "torchaudio", "jiwer", "jsonargparse", "yaml", "tqdm")


@pytest.mark.parametrize("torch", ["torch==2.11.0", "torch"])
def test_the_library_needs_torch_and_numpy_alone(torch, tmp_path):
    uv = [sys.executable, "-m", "uv"]
    python = str(tmp_path / "env" / "bin" / "python")
    subprocess.run([*uv, "venv", "-q", "--python", sys.executable, tmp_path / "env"], check=True)
    subprocess.run([*uv, "pip", "install", "-q", "--python", python, torch, *PACKAGES], check=True)
    environment = {**os.environ, "CI": "true", "OMP_NUM_THREADS": "1"}

    def run(*command):
        return subprocess.run(
            [python, *command], cwd=ROOT, env=environment, capture_output=True, text=True
        )

    facts = run("-c", FACTS)
    assert facts.returncode == 0, facts.stderr
    found = json.loads(facts.stdout)
    if "==" in torch:
        assert found["torch"].startswith(torch.partition("==")[2])
    assert found["kernels"], "the references serve: the libraries were not loaded"
    assert found["installed"] == [], "a package of the trainer is there: the test shows nothing"

    tests = run("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "tests.simt.left_out", *TESTS,
                f"--basetemp={tmp_path / 'tests'}")  # fmt: skip
    assert tests.returncode == 0, tests.stdout[-6000:] + tests.stderr[-2000:]


FACTS = f"""
import importlib.util, json, torch, fastguard
from fastguard import ops
print(json.dumps({{
    "torch": torch.__version__,
    "kernels": bool(ops.cpu_info()),
    "installed": [name for name in {ABSENT!r} if importlib.util.find_spec(name)],
}}))
"""
