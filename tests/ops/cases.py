"""Helpers for the operators' tests."""

import math

import pytest
import torch


def expected_grad_norm(grads):
    """The expected result of grad_norm, computed element by element in Python floats."""
    norms, nonfinite = [], []
    for grad in grads:
        values = grad.double().flatten().tolist()
        bad = [j for j, v in enumerate(values) if not math.isfinite(v)]
        nans = sum(map(math.isnan, values))
        if bad:
            norms.append(math.nan if nans else math.inf)
        else:
            norms.append(math.sqrt(math.fsum(v * v for v in values)))
        nonfinite.append([nans, len(bad) - nans, bad[0] if bad else -1])
    total = math.nan if any(map(math.isnan, norms)) else math.sqrt(sum(n * n for n in norms))
    return total, norms, nonfinite


def check_grad_norm(found, grads, rel=1e-13):
    total, norms, nonfinite = expected_grad_norm(grads)
    close = {"rel": rel, "abs": 0.0, "nan_ok": True}
    assert found.total_norm.item() == pytest.approx(total, **close)
    assert found.norms.tolist() == pytest.approx(norms, **close)
    assert found.nonfinite.tolist() == nonfinite
    assert found.total_norm.dtype == found.norms.dtype == torch.float64


def scaled(grads, coef):
    return [(g.double() * coef).to(g.dtype) for g in grads]


def owned(grads):
    """The same layouts, in memory that no two elements share, which scale_ needs."""
    return [g.clone() if 0 in g.stride() else g for g in grads]
