"""grad_norm_decide_: measured, decided and the scale updated in one."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastguard import ops
from tests.drawn import gradients
from tests.native import needs_kernel
from tests.ops.decide_cases import THRESHOLDS, double, fresh, measured
from tests.simt.kernels.devices import DEVICES, on_devices
from tests.tensors import assert_same_bits, bits

SCALING = (torch.tensor([8.0]), torch.tensor([1], dtype=torch.int32), 2.0, 0.5, 3)


def in_one(function, known, threshold, grads, **kwargs):
    scaling = ops.Scaling(*(t.clone() if isinstance(t, torch.Tensor) else t for t in SCALING))
    measured, decision = function(
        grads, double(0.5), double(1.0), known, 3, threshold, 1.0, 9.0, scaling=scaling, **kwargs
    )
    return (*measured, *decision, *known, *scaling[:2])


def grad_norm_decide_ref_(grads, unscale, loss, known, step, threshold, *rest, scaling):
    found = ops.grad_norm_decide_ref_(
        *(grads, unscale, loss, *known, step, int(threshold.kind), *rest, threshold.options),
        *(*scaling[:2], scaling[2:]),
    )
    return found[:3], found[3:]


@settings(max_examples=30, deadline=None)
@given(st.lists(gradients(magnitudes=False, max_tensors=3), min_size=1, max_size=4))
@pytest.mark.parametrize(
    "function, rtol",
    [(ops.grad_norm_decide_, 1e-12)]
    + [(device.values[0].grad_norm_decide_, 1e-6) for device in DEVICES],
)
@pytest.mark.parametrize(
    "threshold", [THRESHOLDS[0], THRESHOLDS[-1]], ids=lambda t: type(t).__name__
)
def test_measured_and_decided_in_one(threshold, function, rtol, steps):
    for grads in steps:
        ours, reference = fresh(n=len(grads)), fresh(n=len(grads))
        here = in_one(function, ours, threshold, grads)
        there = in_one(grad_norm_decide_ref_, reference, threshold, grads)
        for a, b in zip(here, there, strict=True):
            torch.testing.assert_close(a, b, rtol=rtol, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "function", [ops.grad_norm_decide_, *on_devices("grad_norm_decide_"), grad_norm_decide_ref_]
)
@pytest.mark.parametrize("scale", [4.0, 3e38, 1e-45])
def test_the_scale_grows_and_shrinks_as_a_grad_scalers(function, scale):
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=2)
    scaler.scale(torch.ones(()))
    ours = ops.Scaling(torch.tensor([scale]), torch.tensor([0], dtype=torch.int32), 2.0, 0.5, 2)
    known = fresh(n=1)
    for bad in (0, 0, 0, 1, 0, 0, 1, 1, 0):
        grad = torch.tensor([math.inf if bad else 1.0])
        function([grad], None, None, known, 0, THRESHOLDS[0], 1.0, 9.0, scaling=ours)
        found = {grad.device: torch.tensor(float(bad))}
        scaler._per_optimizer_states[0]["found_inf_per_device"] = found
        scaler.update()
        assert ours.scale.item() == scaler.get_scale()
        assert ours.growth_tracker.item() == scaler._get_growth_tracker()


@pytest.mark.parametrize("shapes", [((), (1,)), ((1,), ()), ((1, 1), ())])
@pytest.mark.parametrize(
    "function", [grad_norm_decide_ref_, pytest.param(ops.grad_norm_decide_, marks=needs_kernel)]
)
def test_the_shapes_of_scale_and_tracker_do_not_matter(function, shapes):
    """One number each is taken, as the operator's check says."""
    scale = torch.full(shapes[0], 8.0)
    tracker = torch.full(shapes[1], 2, dtype=torch.int32)
    function(
        [torch.ones(3)], double(1.0), double(1.0), fresh(n=1), 3, THRESHOLDS[0], 1.0, 9.0,
        scaling=ops.Scaling(scale, tracker, 2.0, 0.5, 3),
    )  # fmt: skip
    assert (scale.item(), tracker.item()) == (16.0, 0)
    assert (scale.shape, tracker.shape) == tuple(map(torch.Size, shapes))


@pytest.mark.parametrize("function", [ops.guard_decide_, ops.grad_norm_decide_])
def test_what_a_decision_writes_has_another_version_then(function):
    """scaler.scale(loss) keeps the scale for backward, and must not get another one silently."""
    known, scaling = fresh(n=1), ops.Scaling(torch.ones(1), SCALING[1].clone(), 2.0, 0.5, 1)
    rest = (None, None, known, 0, THRESHOLDS[0], 1.0, 9.0)
    if function is ops.guard_decide_:
        function(measured(1.0), *rest)
    else:
        function([torch.ones(2)], *rest, scaling=scaling)
        assert scaling.scale._version > 0
    assert all(tensor._version > 0 for tensor in known)


def test_no_gradients_are_decided_about_where_the_statistics_are():
    known = ops.Statistics(*(t.to("meta") for t in fresh(n=0)))
    scalars = (torch.zeros((), dtype=torch.float64, device="meta"), None)
    found = ops.grad_norm_decide_([], *scalars, known, 0, THRESHOLDS[0], 1.0, 9.0)
    assert {t.device.type for part in found for t in part} == {"meta"}


@needs_kernel
def test_measured_and_decided_in_one_refuses_before_it_writes():
    known, grads = fresh(n=0), [torch.ones(2), torch.ones(2).int()]
    before = [t.clone() for t in known]
    args = (None, None, known, 0, THRESHOLDS[0], 1.0, 9.0)
    with pytest.raises(RuntimeError, match="tensor 1 has dtype"):
        ops.grad_norm_decide_(grads, *args)
    for scaling, message in (
        (ops.Scaling(torch.ones(1).double(), SCALING[1], 2.0, 0.5, 3), "one float32 and one int32"),
        (ops.Scaling(torch.ones(1), None, 2.0, 0.5, 3), "come together"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.grad_norm_decide_(grads[:1], *args, scaling=scaling)
    assert_same_bits(bits(known), bits(before))


@needs_kernel
def test_opcheck_grad_norm_decide():
    args = (double(0.5), double(1.0), *fresh(n=1), 0, int(THRESHOLDS[0].kind), 1.0, 5.0)
    torch.library.opcheck(
        torch.ops.fastguard.grad_norm_decide_.default,
        ([torch.ones(3)], *args, THRESHOLDS[0].options, *SCALING[:2], SCALING[2:]),
    )
