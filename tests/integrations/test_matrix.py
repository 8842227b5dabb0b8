"""Trainer x optimizer x precision x fault: a bad batch leaves no trace, bit for bit."""

import functools

import pytest
import torch

from .runs import FAULTS, OPTIMIZERS, PRECISIONS, TRAINERS, batches, differences, grad_scaler

#: Of each fault: batches, and which of them is bad. A finite spike is an outlier from the 17th on.
PLACES = dict.fromkeys(FAULTS, (8, 5)) | {"1e30": (22, 19)}


@pytest.fixture(autouse=True)
def _eager():
    """torchao compiles its step, which takes longer than all of these tests."""
    with torch.compiler.set_stance("force_eager"):
        yield


@functools.cache
def without_the_bad_batch(trainer, optimizer, precision, count, bad):
    data = batches(count)
    del data[bad]
    # The bad batch halves the scale, and fp16 rounds small gradients otherwise at another scale.
    scaler = grad_scaler(halve_after=bad) if precision == "fp16" else None
    return TRAINERS[trainer](OPTIMIZERS[optimizer], precision, data, scaler).everything()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_batch_leaves_no_trace(trainer, optimizer, precision, fault, caplog):
    count, bad = PLACES[fault]
    scaler = grad_scaler() if precision == "fp16" else None
    data = batches(count, {bad: fault})
    run = TRAINERS[trainer](OPTIMIZERS[optimizer], precision, data, scaler)
    skips = [r for r in caplog.records if r.name == "fastguard.guard.report_files"]
    assert len(skips) == 1, skips
    expected = without_the_bad_batch(trainer, optimizer, precision, count, bad)
    assert differences(run.everything(), expected) == []
