"""The curves that a run writes for TensorBoard."""

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fastguard.speech.training import journal
from fastguard.speech.training.metrics import StepMetrics
from fastguard.speech.training.tracking import Curves

from .test_train import metrics


def test_curves_for_tensorboard(make, monkeypatch):
    made = make("--epochs", "1", "--stable", "--batch-size", "1")
    monkeypatch.setattr(journal, "_NORMS_EVERY", 1)
    made.fit()
    events = EventAccumulator(str(made.folder.path / "tensorboard"))
    events.Reload()
    tags = events.Tags()["scalars"]
    steps = metrics(made.folder.path, "step")
    for name in ("loss", "norm_before_clip", "norm_after_clip", "clip_coef", "skips", "lr",
                 "seconds_per_step"):  # fmt: skip
        assert f"train/{name}" in tags
    before = [e.value for e in events.Scalars("train/norm_before_clip")]
    after = [e.value for e in events.Scalars("train/norm_after_clip")]
    assert before == pytest.approx([s["grad_norm"] for s in steps], rel=1e-6)
    assert after == pytest.approx([0.5] * len(steps), rel=1e-4)  # all are clipped here
    assert {"epoch/wer", "epoch/cer", "norms/head.weight"} <= set(tags)


def test_curves_of_a_run_that_goes_on(tmp_path):
    step = StepMetrics(3, 1, 2, 1.0, 1.0, 1.0, "skip_nonfinite", 0.1, 0.1)
    for skips in (0, 5):  # the first was killed before it had a state
        curves = Curves(tmp_path, 0 if skips == 0 else 2, skips)
        curves.write(step)
        curves.close()
        if skips == 0:  # of one second and one process, files are read in the order of ".10", ".9"
            (file,) = tmp_path.iterdir()
            file.rename(file.with_name(file.name.replace("tfevents.", "tfevents.0")))
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [e.value for e in events.Scalars("train/skips")] == [6]
