"""Runs for several tests of report pages."""

import json
import math

import pytest

from fastguard.speech.cli.train import main as train
from tests.recordings import tones
from tests.speech.training.test_train import poison

from .pages import HOSTILE, epoch, run_folder, step


@pytest.fixture
def good(tmp_path):
    lines = [step(i, loss=4 - i / 10) for i in range(1, 21)]
    lines += [epoch(1, 10, 0.5), epoch(2, 20, 0.25), epoch(3, 20, 0.4)]
    return run_folder(tmp_path / "good", lines, {"optim": {"lr": 1e-3}, "seed": 0, "run_dir": "g"})


@pytest.fixture
def hostile(tmp_path):
    """A run whose texts are all HTML markup."""
    bad = step(3, math.nan, math.inf, "skip_nonfinite", skipped_utterances=(HOSTILE,))
    folder = run_folder(
        tmp_path / "<b>hostile$x$",
        [step(1), step(2), bad, step(4, norm=50.0, verdict="skip_outlier"), epoch(1, 4, 0.9)],
        {"data": HOSTILE.replace("\0", ""), HOSTILE.replace("\0", ""): {"lr": [HOSTILE[:9]]}},
    )
    details = {
        "step": 2,
        "batch_id": HOSTILE,
        "offenders": [{"name": HOSTILE, "nans": 3, "infs": 1, "first_index": 7, "kind": "NaN"}],
        "bracket": [{"finite": False, "first": HOSTILE, "last": "z"}],
        "norms": {HOSTILE: 2.5, "head.weight": "nan"},
        "max_norm": "inf",
    }
    (folder / "bad_step_000002.json").write_text(json.dumps(details), "utf-8")
    row = {"id": HOSTILE, "reference": f"a {HOSTILE}", "hypothesis": HOSTILE, "wer": 2, "cer": 1}
    (folder / "hypotheses.jsonl").write_text(json.dumps(row) + "\n", "utf-8")
    with (folder / "train.log").open("a", encoding="utf-8") as log:
        log.write(f"ERROR - {HOSTILE}")
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of the trainer with one corrupt recording."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        poison(patch, {"tone2.wav"})
        options = ["--model", "baseline", "--stable", "--precision", "fp32", "--epochs", "2"]
        options += ["--batch-size", "2", "--data", tones(folder), "--run-dir", str(folder / "run")]
        assert train(options) == 0
    return folder / "run"
