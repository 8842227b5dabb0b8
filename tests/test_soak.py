"""A minute of tests/soak.py; the hour is for a person to run."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_a_minute_of_disturbances():
    done = subprocess.run(
        [sys.executable, "-m", "tests.soak", "--minutes", "0.7", "--seed", "5"],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all of it held" in done.stdout
