"""Statistics and decisions for the tests of guard_decide_."""

import math
import sys

import torch

from fastguard import ops
from fastguard.guard.statistics import unseen
from fastguard.ops import Verdict
from fastguard.thresholds import AdaGC, AutoClip, Fixed, RunningMedian, ZClip

THRESHOLDS = [
    Fixed(),
    ZClip(warmup=5),
    RunningMedian(warmup=4),
    AutoClip(warmup=3),
    AdaGC(warmup=4),
]


def double(value):
    return None if value is None else torch.tensor(value, dtype=torch.float64)


def fresh(window=128, n=3):
    zeros = [torch.zeros(size, dtype=torch.float64) for size in (4, window, window)]
    return ops.Statistics(*zeros, unseen(n, "cpu"))


def measured(*norms):
    norms = double(list(norms))
    return ops.GradNorm(norms.square().sum().sqrt(), norms, None)


def decide(
    found,
    known,
    threshold,
    max_norm=1.0,
    skip_norm=math.inf,
    function=ops.guard_decide_,
    step=0,
    **scalars,
):
    unscale, loss = (double(scalars.get(name)) for name in ("unscale", "loss"))
    return function(found, unscale, loss, known, step, threshold, max_norm, skip_norm)


def decide_by_reference(
    found, known, threshold, max_norm=1.0, skip_norm=math.inf, step=0, **scalars
):
    unscale, loss = (double(scalars.get(name)) for name in ("unscale", "loss"))
    rest = (step, threshold.kind, max_norm, skip_norm, threshold.options)
    return ops.guard_decide_ref_(*found[:2], unscale, loss, *known, *rest)


def same(here, there):
    for a, b in zip(here, there, strict=True):
        # A denormal number has less than 12 digits: the square of a mean of 1e-161 has 3.
        torch.testing.assert_close(a, b, rtol=1e-12, atol=sys.float_info.min, equal_nan=True)


APPLY, SKIP = torch.tensor(int(Verdict.APPLY)), torch.tensor(int(Verdict.SKIP_OUTLIER))
