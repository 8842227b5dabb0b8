"""clip_: norm, decision and scaling in one."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastguard import ops
from tests.drawn import gradients
from tests.native import needs_kernel
from tests.ops.cases import check_grad_norm, owned, scaled
from tests.simt.kernels.devices import DEVICES


def clip_ref_(grads, max_norm, skip_norm, float32_norm=False):
    found = ops.clip_ref_(grads, max_norm, skip_norm, float32_norm)
    return ops.GradNorm(*found[:3]), ops.Decision(*found[3:])


@settings(max_examples=60, deadline=None)
@given(gradients(), st.sampled_from([0.0, 1e-3, 2.0, 1e20, math.inf]), st.booleans())
@pytest.mark.parametrize(
    "function, rel",
    [(ops.clip_, 1e-13), (clip_ref_, 1e-13), *((d.values[0].clip_, 1e-6) for d in DEVICES)],
)
def test_clip_(function, rel, grads, max_norm, float32_norm):
    """Measures as grad_norm does, and does what decide and scale_ do with that norm."""
    grads = owned(grads)
    before = [g.clone() for g in grads]
    measured, decision = function(grads, max_norm, 1e30, float32_norm)
    check_grad_norm(measured, before, rel)
    norm = measured.total_norm
    if float32_norm and norm.float().isfinite():
        norm = norm.float().double()
    coef, verdict = ops.decide_ref(norm, max_norm, 1e30)
    assert decision.verdict == verdict and decision.clip_coef == coef
    for grad, right in zip(grads, scaled(before, coef.item()), strict=True):
        torch.testing.assert_close(grad, right, rtol=0, atol=0, equal_nan=True)


def test_clip_bumps_the_version_where_it_writes():
    for max_norm, writes in ((1.0, True), (1e9, False)):
        grad = torch.ones(3)
        before = grad._version
        ops.clip_([grad], max_norm, math.inf)
        assert (grad._version > before) == writes


@pytest.mark.parametrize("function", [ops.clip_, clip_ref_])
def test_clip_refuses_before_it_writes(function):
    first = torch.ones(2)
    for second, message in (
        (torch.ones(2).int(), "tensor 1 has dtype"),
        (torch.ones(1).expand(4), "single memory location"),
    ):
        with pytest.raises(RuntimeError, match=message):
            function([first, second], 0.1, math.inf)
    assert first.tolist() == [1, 1]


@needs_kernel
@pytest.mark.parametrize("max_norm", [0.5, 1e9])
def test_opcheck_clip_(max_norm):
    grads = [torch.ones(3), torch.randn(2, 3).t(), torch.ones((), dtype=torch.bfloat16)]
    torch.library.opcheck(torch.ops.fastguard.clip_.default, (grads, max_norm, math.inf, True))
