"""Accumulated gradients: sums in float32, where gradients lie, later parameters, GradScalers."""

import math

import pytest
import torch
from torch import nn

import fastguard
from fastguard import GradGuard, Verdict
from tests.tensors import assert_same_bits

from .test_accumulation import batch, window
from .test_grad_guard import everything, small_model

# --- sums in float32 ------------------------------------------------------------------------------

MAKERS = {
    "fastguard": lambda p: fastguard.AdamW(p, lr=1.0, weight_decay=0.0),
    "fused": lambda p: torch.optim.AdamW(p, lr=1.0, weight_decay=0.0, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=1.0),
    "fused sgd": lambda p: torch.optim.SGD(p, lr=1.0, fused=True),
}


class Looks(torch.optim.SGD):
    """Remembers the gradients that its step got."""

    def step(self, closure=None):
        self.seen = [p.grad.clone() for group in self.param_groups for p in group["params"]]
        return super().step()


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize(
    "dtype, value, times",
    [
        (torch.float16, 30000.0, 4),  # their sum is beyond float16
        (torch.bfloat16, 1.0, 512),  # bfloat16 has no 257
        (torch.float32, 3.0, 4),
        (torch.float64, 1 + 2**-40, 4),
    ],
    ids=["float16", "bfloat16", "float32", "float64"],
)
def test_sums_of_every_dtype_have_the_mean(make, dtype, value, times):
    weight = nn.Parameter(torch.zeros(3, dtype=dtype))
    optimizer, guard = make([weight]), GradGuard([weight], max_norm=math.inf)
    for _ in range(2):
        before = weight.detach().clone()
        for _ in range(times):
            weight.grad = torch.full((3,), value, dtype=dtype)
            assert guard.accumulate().verdict is Verdict.APPLY
        report = guard.step(optimizer)
        assert report.verdict is Verdict.APPLY
        assert report.total_norm == pytest.approx(value * 3**0.5, rel=1e-12)
        assert weight.grad.dtype == weight.grad_dtype == dtype
        assert not weight.grad.any()
        if isinstance(optimizer, torch.optim.SGD):
            assert torch.equal(weight.detach(), before - value)
        else:
            assert (weight < 0).all()


@pytest.mark.parametrize("threshold", [fastguard.thresholds.Fixed(), fastguard.thresholds.AdaGC()])
@pytest.mark.parametrize("dtypes", [(torch.float16, torch.float32), (torch.bfloat16,) * 2])
def test_the_mean_is_clipped_before_it_is_rounded(dtypes, threshold):
    parameters = [nn.Parameter(torch.zeros(4, dtype=dtype)) for dtype in dtypes]
    optimizer = Looks(parameters, lr=1.0)
    guard = GradGuard(parameters, max_norm=1.0, threshold=threshold)
    for _ in range(3):
        for p in parameters:
            p.grad = torch.full_like(p, 40000.0)
        guard.accumulate()
    report = guard.step(optimizer)
    assert report.verdict is Verdict.CLIP
    norm = torch.stack([grad.double().norm() for grad in optimizer.seen]).norm()
    assert norm == pytest.approx(1.0, rel=1e-2)
    assert [grad.dtype for grad in optimizer.seen] == list(dtypes)


def test_fastguards_step_has_the_float32_mean():
    """Of which float16 could hold three digits."""
    weight, other = (nn.Parameter(torch.zeros(2, dtype=torch.float16)) for _ in range(2))
    one = fastguard.AdamW([weight], lr=0.1)
    guard = GradGuard([weight, other], max_norm=math.inf)
    values = (1.0, 2.0**-10 * 3, 2.0**-12)
    for value in values:
        for p in (weight, other):
            p.grad = torch.full((2,), value, dtype=torch.float16)
        guard.accumulate()
    rest = Looks([other], lr=1.0)
    guard.step([one, rest])
    mean = torch.tensor(sum(values) / 3, dtype=torch.float32)
    assert torch.equal(one.state[weight]["exp_avg"], (0.1 * mean).expand(2).float())
    assert torch.equal(rest.seen[0], mean.half().expand(2))


def test_a_window_that_is_kept_gives_the_means_again():
    """The optimizer raised; the sums are as they were, and so are the gradients' dtypes."""
    weight = nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    optimizer, guard = fastguard.AdamW([weight], lr=0.1), GradGuard([weight], max_norm=math.inf)
    weight.grad = torch.ones(2, dtype=torch.bfloat16)
    guard.accumulate()
    optimizer.param_groups[0]["betas"] = None
    with pytest.raises(TypeError):
        guard.step(optimizer)
    assert weight.grad_dtype == torch.bfloat16 and not weight.grad.any()
    optimizer.param_groups[0]["betas"] = (0.9, 0.99)
    assert guard.step(optimizer).total_norm == pytest.approx(2**0.5)


# --- where gradients lie --------------------------------------------------------------------------


@pytest.mark.parametrize("overwrites", [True, False], ids=["a graph's replay", "backward"])
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_gradients_in_static_memory_stay_there(make, overwrites):
    """A CUDA graph writes to the memory that it was captured with, whatever is in .grad."""
    model, twin = small_model(), small_model()
    optimizer, other = make(model.parameters()), make(twin.parameters())
    guard, other_guard = GradGuard(model, max_norm=0.5), GradGuard(twin, max_norm=0.5)
    static = [torch.zeros_like(p) for p in model.parameters()]
    for p, memory in zip(model.parameters(), static, strict=True):
        p.grad = memory
    for step in range(3):
        batches = [batch(3 * step + i, math.nan if i == step else None) for i in range(3)]
        for x in batches:
            if overwrites:
                loss = model(x).square().mean()
                grads = torch.autograd.grad(loss, list(model.parameters()))
                torch._foreach_copy_(static, grads)
            else:
                model(x).square().mean().backward()
            guard.accumulate()
        report = guard.step(optimizer)
        assert report.total_norm == window(twin, other_guard, other, batches).total_norm
        for p, memory in zip(model.parameters(), static, strict=True):
            assert p.grad is memory and not memory.any()
    assert_same_bits(everything(model, optimizer), everything(twin, other))


def test_gradients_in_a_flat_buffer_stay_there():
    flat = torch.zeros(6)
    parameters = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(4))]
    parameters[0].grad, parameters[1].grad = flat[:2], flat[2:]
    optimizer, guard = torch.optim.SGD(parameters, lr=1.0), GradGuard(parameters, math.inf)
    for _ in range(2):
        for value in (1.0, 3.0):
            flat.add_(value)  # as a reduction of the flat buffer does
            guard.accumulate()
            assert not flat.any()
        guard.step(optimizer)
    assert [p.tolist() for p in parameters] == [[-4.0] * 2, [-4.0] * 4]


def test_gradients_that_cannot_be_written_are_dropped():
    weight = nn.Parameter(torch.zeros(3))
    guard = GradGuard([weight], max_norm=math.inf)
    weight.grad = torch.ones(1).expand(3)
    guard.accumulate()
    assert weight.grad is None
    with torch.inference_mode():
        inference = torch.full((3,), 3.0)
    weight.grad = inference
    guard.accumulate()
    guard.step(torch.optim.SGD([weight], lr=1.0))
    assert weight.tolist() == [-2.0] * 3 and inference.tolist() == [3.0] * 3


def test_a_backward_after_the_last_accumulate_is_not_lost_in_place():
    model = small_model()
    optimizer, guard = fastguard.AdamW(model.parameters()), GradGuard(model)
    model(batch(0)).square().mean().backward()
    guard.accumulate()
    model(batch(1)).square().mean().backward()  # adds to the same tensors
    with pytest.raises(ValueError, match=r"0\.weight has a gradient that was not accumulated"):
        guard.step(optimizer)
    guard.accumulate()
    assert guard.step(optimizer).micro_batches == 2


# --- parameters that come later -------------------------------------------------------------------


@pytest.mark.parametrize("stepped_before", [True, False])
@pytest.mark.parametrize("at", [0, 1], ids=["before the window", "within it"])
def test_a_layer_added_with_its_param_group(stepped_before, at):
    model = nn.Sequential(nn.Linear(4, 4))
    optimizer, guard = fastguard.AdamW(model.parameters(), lr=0.1), GradGuard(model, math.inf)
    if stepped_before:
        window(model, guard, optimizer, [batch(0)])
    optimizer.zero_grad()
    for i in range(3):
        if i == at:
            model.append(nn.Linear(4, 1))
            optimizer.add_param_group({"params": model[1].parameters()})
        model(batch(i)).square().mean().backward()
        guard.accumulate()
    before = model[1].weight.detach().clone()
    report = guard.step(optimizer)
    assert list(report.norms()) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert not torch.equal(model[1].weight.detach(), before)


# --- GradScalers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before accumulate", "before step"])
def test_an_unscaling_within_a_window_is_refused(when):
    """The sums would be divided by the scale twice, or not at all."""
    model = small_model()
    optimizer, guard = fastguard.AdamW(model.parameters()), GradGuard(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for i in range(2):
        scaler.scale(model(batch(i)).square().mean()).backward()
        if when == "before accumulate" and i == 1:
            break
        guard.accumulate(scaler=scaler)
    scaler.unscale_(optimizer)
    with pytest.raises(ValueError, match=r"leave scaler.unscale_ out"):
        if when == "before step":
            guard.step(optimizer, scaler=scaler)
        else:
            guard.accumulate(scaler=scaler)
