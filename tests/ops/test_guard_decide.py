"""guard_decide_ against its reference, whatever the statistics hold, and what it refuses."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastguard import ops
from fastguard.ops import Verdict
from fastguard.thresholds import AdaGC, Fixed
from tests.native import needs_kernel
from tests.ops.decide_cases import (
    THRESHOLDS,
    decide,
    decide_by_reference,
    double,
    fresh,
    measured,
    same,
)
from tests.simt.kernels.devices import on_devices

# The squares of 1e-40 and 2.46e-214 are tiny and 0 in float64, those of 1e160 overflow.
STRANGE = [0.0, 2.46e-214, 1e-40, 30.0, 100.0, 1e30, 1e160, math.nan, math.inf]

norm = st.one_of(st.floats(0, 5), st.sampled_from(STRANGE))

step = st.tuples(
    norm,
    norm,
    norm,
    st.sampled_from([None, 0.5, 3.0]),
    st.sampled_from([None, None, 1.0, math.nan, -math.inf]),
)

FUNCTIONS = [ops.guard_decide_, *on_devices("guard_decide_")]


@settings(max_examples=60, deadline=None)
@given(st.lists(norm, max_size=30), st.lists(step, max_size=40), st.sampled_from([1, 7, 128]))
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("threshold", THRESHOLDS, ids=lambda t: type(t).__name__)
def test_the_native_decision_is_that_of_the_reference(threshold, function, before, steps, window):
    ours, reference = fresh(window), fresh(window)
    for known in (ours, reference):  # so that some steps are judged by a median
        for norm in before:
            decide_by_reference(measured(norm, 0.1, 0.0), known, threshold, 1.5, 8.0)
    for number, (*norms, unscale, loss) in enumerate(steps):
        found = measured(*norms)
        scalars = {"unscale": unscale, "loss": loss, "step": 40 * number}
        here = decide(found, ours, threshold, 1.5, 8.0, function, **scalars)
        same(
            (*here, *ours),
            (*decide_by_reference(found, reference, threshold, 1.5, 8.0, **scalars), *reference),
        )
        assert all(t.isfinite().all() for t in ours[:3])
        assert not ours.per_tensor.isnan().any()


any_number = st.one_of(st.floats(), st.sampled_from([-1.0, 0.5, 15.5, 16.0, 1e300, math.nan]))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(any_number, min_size=4, max_size=4),
    st.lists(any_number, min_size=14, max_size=14),
    st.lists(any_number, min_size=4, max_size=4),
    st.lists(any_number, min_size=2, max_size=2),
    st.floats(0, 100),
)
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("threshold", THRESHOLDS, ids=lambda t: type(t).__name__)
def test_whatever_the_statistics_hold_nothing_is_read_or_written_beside_them(
    threshold, function, numbers, norms, columns, options, value
):
    """A count of -5 or 1e300, a quantile of 1e9: an index made of them must lie in the window.

    Each window lies between the other tensors in one block of memory, whose values would change.
    The executor of the CUDA kernels finds such accesses by itself.
    """

    class Odd:
        kind = threshold.kind

    Odd.options = [*options, 3.0]
    block, there = (torch.full((42,), 77.0, dtype=torch.float64) for _ in range(2))
    views = [
        ops.Statistics(b[4:8], b[12:19], b[24:31], b[34:38].view(4, 1)) for b in (block, there)
    ]
    for known in views:
        known.numbers.copy_(double(numbers))
        known.seen_norms.copy_(double(norms[:7]))
        known.accepted_norms.copy_(double(norms[7:]))
        known.per_tensor.copy_(double(columns)[:, None])
    found = measured(value)
    here = decide(found, views[0], Odd, 1.5, 8.0, function)
    same((*here, block), (*decide_by_reference(found, views[1], Odd, 1.5, 8.0), there))


def test_tensors_are_not_remembered_where_there_are_no_columns():
    known = fresh(n=0)
    assert decide(measured(3.0, 4.0), known, Fixed()).verdict == Verdict.CLIP
    assert known.per_tensor.shape == (4, 0)
    assert known.seen == 1


def test_the_coefficient_unscales_too():
    known = fresh(n=1)
    coef, _, record = decide(measured(1000.0), known, Fixed(), max_norm=1.0, unscale=1 / 256)
    assert record[2].item() == 1000 / 256
    assert coef.item() == pytest.approx(1 / 1000, rel=1e-5)
    assert record[1].item() == pytest.approx(256 / 1000, rel=1e-5)
    assert known.seen_norms[0] == known.accepted_norms[0] == 1000 / 256


@pytest.mark.parametrize(
    "wrong",
    [
        {"found": ops.GradNorm(torch.tensor(1.0), torch.ones(3).double(), None)},
        {"known": fresh()._replace(numbers=torch.zeros(3, dtype=torch.float64))},
        {"known": fresh()._replace(seen_norms=torch.zeros(4, dtype=torch.float64))},
        {"known": fresh(window=0)},
        {"known": fresh(n=2)},
        {"known": fresh(n=0), "threshold": AdaGC()},
        {"known": fresh()._replace(per_tensor=torch.zeros(3, 3, dtype=torch.float64))},
    ],
)
@needs_kernel
def test_guard_decide_refuses(wrong):
    arguments = {"found": measured(1.0, 1.0, 1.0), "known": fresh(), "threshold": Fixed()} | wrong
    with pytest.raises(RuntimeError, match=r"guard_decide_: .*(must|needs).*got"):
        decide(**arguments)


@needs_kernel
@pytest.mark.parametrize("threshold", THRESHOLDS, ids=lambda t: type(t).__name__)
def test_opcheck_guard_decide(threshold):
    found = measured(1.0, 2.0, 3.0)
    for scalars in ((double(0.5), double(1.0)), (None, double(1.0))):  # opcheck takes NaN != NaN
        torch.library.opcheck(
            torch.ops.fastguard.guard_decide_.default,
            (
                *(found.total_norm, found.norms, *scalars, *fresh(), 0, int(threshold.kind)),
                *(1.0, 5.0, threshold.options),
            ),
        )
