"""decide against the rule in plain Python."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastguard import ops
from fastguard.ops import Verdict
from tests.native import needs_kernel
from tests.simt.kernels.devices import on_devices

finite_or_not = st.one_of(
    st.floats(0, 1e300), st.sampled_from([0.0, 1.0, math.inf, math.nan, 1e-300])
)

threshold = st.one_of(st.floats(0, 1e6), st.just(math.inf))


@settings(deadline=None)
@given(finite_or_not, threshold, threshold)
@pytest.mark.parametrize("function", [ops.decide, ops.decide_ref, *on_devices("decide")])
def test_decide(function, norm, max_norm, skip_norm):
    total_norm = torch.tensor(norm, dtype=torch.float64)
    coef, verdict = function(total_norm, max_norm, skip_norm)
    if not math.isfinite(norm):
        expected = (1.0, Verdict.SKIP_NONFINITE)
    elif norm > skip_norm:
        expected = (1.0, Verdict.SKIP_OUTLIER)
    elif max_norm / (norm + 1e-6) < 1:
        expected = (max_norm / (norm + 1e-6), Verdict.CLIP)
    else:
        expected = (1.0, Verdict.APPLY)
    assert (coef.item(), verdict.item()) == expected


@pytest.mark.parametrize("function", [ops.decide, ops.decide_ref])
def test_decide_wants_the_norm_of_grad_norm(function):
    for wrong in (torch.tensor(1.0), torch.ones(1, dtype=torch.float64)):
        with pytest.raises(RuntimeError, match="total_norm must be a float64 tensor"):
            function(wrong, 1.0, 1.0)


@needs_kernel
@pytest.mark.parametrize("norm", [0.0, 0.5, 7.0, math.inf, math.nan])
def test_opcheck_decide(norm):
    torch.library.opcheck(
        torch.ops.fastguard.decide.default, (torch.tensor(norm, dtype=torch.float64), 0.5, 5.0)
    )
