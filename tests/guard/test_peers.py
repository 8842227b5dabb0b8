"""What others get wrong when a gradient explodes, one test for each: fastguard passes it.

Each test says what fastguard does; its docstring names the peer, its file or issue and what happens
there. Peers are not run: one that mends its defect turns nothing red here. The numbers are those of
the project's list of verified defects. Those that another test covers are in ``ELSEWHERE``.
"""

import importlib
import inspect
import logging
import math
import re
import types

import pytest
import torch
from torch import nn
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

import fastguard
from fastguard import GradGuard, Verdict
from tests.native import needs_kernel
from tests.tensors import assert_same_bits, bits, parameters_with

from .test_grad_guard import set_gradient_norms
from .test_guard_device import HOST_READS, Ops, optimizers

#: (defect, the test that covers it).
ELSEWHERE = [
    (
        "1 torch's fused AdamW skips at 1.0 only",
        "optim.test_adam:test_found_inf_of_any_value_and_shape",
    ),
    ("1 and 8, behind a GradGuard", "guard.test_update:test_a_skip_leaves_no_trace"),
    (
        "3 GradScaler reduces found_inf by the placements of the first DTensor",
        "test_clip_distributed:inf_on_rank_1_behind_a_replicated_gradient",
    ),
    ("4 torch zeroes finite gradients", "test_clip:test_torch_zeroes_what_we_clip"),
    ("4 and fp16 DTensors beyond 256", "test_clip_distributed:fp16_norm_over_256_on_each_rank"),
    ("6 torch makes all NaN or zero", "test_clip:test_nonfinite_norm_leaves_the_gradients"),
    ("6 behind a GradGuard", "guard.test_grad_guard:test_never_writes_a_nonfinite_number"),
    ("7 SpeechBrain waits once per parameter", "guard.test_guard_device:test_host_reads_of_a_step"),
    (
        "11 DeepSpeed undoes arithmetic",
        "guard.test_rollback:test_the_state_is_restored_bit_for_bit",
    ),
    ("16 fmaxf drops the NaN", "test_clip_orders:test_a_nan_stays_in_every_order"),
    ("17 a parameter listed twice", "test_clip:test_a_parameter_listed_twice_counts_once"),
    (
        "17 a max_norm that is negative or NaN",
        "test_clip:test_refuses_a_threshold_that_would_flip_or_poison_gradients",
    ),
    (
        "17 the maximum of no elements",
        "test_clip_orders:test_gradients_without_elements_and_of_zeros",
    ),
    (
        "torch raises for Tensors beside DTensors, and for several meshes",
        "test_clip_distributed:mixed_with_tensors_and_other_meshes",
    ),
]


@pytest.mark.parametrize("where", [where for _, where in ELSEWHERE])
def test_what_is_covered_elsewhere_is_still_there(where):
    module, name = where.split(":")
    module = importlib.import_module(f"tests.{module}")
    found = getattr(module, name, None)
    assert callable(found), f"{where} has gone: mend ELSEWHERE"
    # It is run: by pytest, and not skipped, or as a case of a test on two ranks.
    assert name.startswith("test_") or found in module.CASES
    marks = {mark.name for mark in getattr(found, "pytestmark", [])}
    assert not marks & {"skip", "xfail"}, f"{where} is no longer run"
    # And can fail.
    source = inspect.getsource(inspect.unwrap(found))
    assert re.search(r"\bassert|pytest\.raises|\breturn \w", source), f"{where} asserts nothing"


def feed(guard, optimizer, parameters, norms):
    """One step for each norm of the gradients; the reports."""
    reports = []
    for norm in norms:
        set_gradient_norms(parameters, norm)
        reports.append(guard.step(optimizer))
    return reports


def state_of(optimizer, parameters):
    """Parameters and optimizer state, as bits."""
    tensors = [p.detach() for p in parameters]
    for p in parameters:
        tensors += [v for v in optimizer.state[p].values() if isinstance(v, torch.Tensor)]
    return bits(tensors)


# --- GradScaler and its found_inf (1, 2, 12, 18) --------------------------------------------------


@pytest.mark.parametrize("second", [1.0, math.nan])
def test_a_scaler_that_found_infs_on_two_devices_skips(second):
    """1 torch: GradScaler.step adds up what it found on each device, and the fused kernels
    (FusedAdam.cpp, fused_adam_utils.cuh) skip at exactly 1.0: at 2.0 they step, with the NaN, and
    the step counter goes back, to -1 at the first step; at NaN it is NaN from there on."""
    parameters = [nn.Parameter(torch.ones(3))]
    optimizer = fastguard.AdamW(parameters)
    scaler = torch.amp.GradScaler("cpu")
    for value in (1.0, math.nan):
        before = state_of(optimizer, parameters)
        scaler.scale(parameters[0].sum() * value).backward()
        scaler.unscale_(optimizer)
        found = scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"]
        found["a second device"] = torch.tensor(0.0 if value == 1.0 else second)
        scaler.step(optimizer)
        scaler.update()
    assert_same_bits(before, state_of(optimizer, parameters))
    assert optimizer.state[parameters[0]]["step"] == 1


@pytest.mark.parametrize("here", [1.0, math.inf])
def test_a_sharded_scaler_that_heard_of_an_inf_on_another_rank_skips(here, monkeypatch):
    """2 torch's ShardedGradScaler has a found_inf of shape (1,) and adds it up over the ranks: with
    both bad, torch's fused AdamW writes the NaN and then raises "output with shape [] doesn't
    match [1]"; with one, it raises after the step counter has moved (pytorch#140514)."""

    def all_reduce(found_inf, **_):
        found_inf.add_(1)  # what the other rank found
        return types.SimpleNamespace(wait=lambda: None)

    parameters = [nn.Parameter(torch.ones(3))]
    optimizer = fastguard.AdamW(parameters)
    feed(GradGuard(parameters), optimizer, parameters, [1.0])
    before = state_of(optimizer, parameters)
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    scaler = ShardedGradScaler("cpu", init_scale=2.0)
    optimizer.zero_grad()
    scaler.scale(parameters[0].sum() * here).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert_same_bits(before, state_of(optimizer, parameters))
    assert scaler.get_scale() == 1.0


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("name", ["fastguard", "fused", "foreign"])
def test_bf16_gradients_work_under_a_grad_scaler(name, device):
    """12 torch: unscale_ calls _amp_foreach_non_finite_check_and_unscale_, which has no bf16 on
    CUDA and raises "not implemented for 'BFloat16'" (pytorch#127176). The guard's one read tells
    what it would, so nobody calls it, also not where it would work."""
    parameters = [nn.Parameter(torch.ones(5, dtype=torch.bfloat16, device=device))]
    optimizer = optimizers(parameters)[name]
    guard = GradGuard(parameters, max_norm=math.inf)
    scaler = torch.amp.GradScaler(device, init_scale=4096.0)
    for value in (1.0, math.inf, 2.0):
        optimizer.zero_grad()
        scaler.scale(parameters[0].float().sum() * value).backward()
        with Ops() as ops:
            report = guard.step(optimizer, scaler=scaler)
        assert torch.ops.aten._amp_foreach_non_finite_check_and_unscale_ not in ops.names
        assert report.skipped == math.isinf(value)
        assert report.total_norm == pytest.approx(value * math.sqrt(5))
    assert scaler.get_scale() == 2048.0
    assert parameters[0].isfinite().all() and parameters[0].ne(1).all()


@pytest.mark.parametrize("name", ["fastguard", "fused", "foreign"])
def test_a_scheduler_can_follow_the_applied_steps(name):
    """18 torch: GradScaler.step returns None, and a fused optimizer skips in its kernel: the caller
    cannot know (pytorch#67590 and #55585; Lightning#5558, #21339), and the warm-up runs on."""
    parameters = [nn.Parameter(torch.ones(4))]
    optimizer = optimizers(parameters)[name]
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    guard = GradGuard(parameters)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))
    rates = []
    for norm in (1.0, math.inf, 1.0, math.nan, 1.0):
        set_gradient_norms(parameters, norm)
        rates.append(scheduler.get_last_lr()[0])
        if not guard.step(optimizer, scaler=scaler).skipped:
            scheduler.step()
    assert rates == pytest.approx([0.1, 0.05, 0.05, 0.025, 0.025])
    assert scheduler.last_epoch == 3
    assert optimizer.state[parameters[0]].get("step", 3) == 3


# --- norms and what they are taken of (4, 5, 10, 13, 14, 15) --------------------------------------


@pytest.mark.parametrize(
    ("dtype", "value"), [(torch.float16, 1e4), (torch.float32, 1e20), (torch.float32, 3e38)]
)
def test_large_finite_gradients_are_a_clipped_step(dtype, value):
    """4 torch's clip_grad_norm_: an fp16 norm over 65504 and fp32 squares over 3.4e38 are Inf, the
    coefficient is 0, and the step goes on with zeros (pytorch#46849)."""
    parameters = [nn.Parameter(torch.zeros(100, dtype=dtype))]
    parameters[0].grad = torch.full((100,), value, dtype=dtype)
    report = GradGuard(parameters, max_norm=1.0).step(torch.optim.SGD(parameters, lr=1.0))
    assert report.verdict is Verdict.CLIP
    assert report.total_norm == pytest.approx(10 * value, rel=1e-6)
    torch.testing.assert_close(parameters[0].detach(), torch.full((100,), -0.1, dtype=dtype))


def test_the_norm_of_bf16_gradients_is_good_to_float32():
    """5 torch's total_norm of bf16 gradients is bf16, and so is the coefficient (ForeachReduceOp):
    off by 1.6e-3 on average, 4.8e-3 at worst of 200 models."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        sizes = torch.randint(1, 300, (5,), generator=generator).tolist()
        grads = [torch.randn(n, generator=generator).bfloat16() for n in sizes]
        exact = torch.cat([g.double() for g in grads]).norm().item()
        parameters = parameters_with(grads)
        norm = fastguard.clip_grad_norm_(parameters, math.inf)
        assert norm.item() == pytest.approx(exact, rel=1e-7)
        report = GradGuard(parameters).step(fastguard.AdamW(parameters))
        assert report.total_norm == pytest.approx(exact, rel=1e-12)
        assert report.clip_coef == pytest.approx(min(1.0, 1 / (exact + 1e-6)), rel=1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bf16_skip_flips_no_sign_and_is_said(bad, caplog):
    """10 DeepSpeed masks a NaN norm to -1, whose clip coefficient is about -max_norm: the signs
    flip, unless an assertion ends the run first (runtime/utils.py; #5223). In bf16 ZeRO skips an
    overflow without a word (bf16_optimizer.py; #8415)."""
    weight, bias = parameters_with([torch.tensor([1.0, bad]).bfloat16(), torch.ones(2).bfloat16()])
    before = bits([weight.grad, bias.grad])
    guard = GradGuard([("weight", weight), ("bias", bias)])
    with caplog.at_level(logging.WARNING, "fastguard.guard.report_files"):
        report = guard.step(torch.optim.SGD([weight, bias], lr=1.0))
    assert (report.verdict, report.clip_coef) == (Verdict.SKIP_NONFINITE, 1.0)
    assert not weight.any() and not bias.any()
    assert_same_bits(before, bits([weight.grad, bias.grad]))
    expected = f"Infinite gradient, skipping batch 0 (norm {bad}, first at weight[1])"
    assert [record.getMessage() for record in caplog.records] == [expected]


def mixed_gradients(times):
    """Of every dtype, with a transposed and a strided one among them."""
    torch.manual_seed(0)
    return [
        grad
        for _ in range(times)
        for grad in (
            torch.randn(3, 5),
            torch.randn(7).bfloat16(),
            torch.randn(2, 2).half(),
            torch.randn(4).double(),
            torch.randn(5, 3).t(),
            torch.randn(6, 3)[:, 1],
        )
    ]


@needs_kernel
@pytest.mark.parametrize("what", ["clip", "guard"])
def test_mixed_dtypes_and_layouts_are_one_call(what):
    """13 torch: one bf16 tensor beside an fp32 coefficient, or one gradient that is not dense, and
    _foreach_mul_ and _foreach_norm fall back to a kernel for each tensor, of all
    (ForeachBinaryOpScalarTensor.cu, ForeachUtils.h)."""
    calls = []
    for times in (1, 50):
        parameters = []
        for grad in mixed_gradients(times):
            parameters.append(nn.Parameter(torch.zeros_like(grad)))
            parameters[-1].grad = grad
        optimizer = fastguard.AdamW(parameters)
        guard = GradGuard(parameters, max_norm=0.1)
        guard.step(optimizer)  # makes the optimizer's state
        exact = torch.cat([p.grad.double().flatten() for p in parameters]).norm().item()
        with Ops() as ops:
            if what == "clip":
                norm = fastguard.clip_grad_norm_(parameters, 0.1).item()
            else:
                norm = guard.step(optimizer).total_norm
        assert norm == pytest.approx(exact, rel=1e-12)
        calls.append([str(op) for op in ops.names if str(op).startswith("fastguard.")])
        assert not any("_foreach_" in str(op) for op in ops.names)
    # One step for float64 parameters, whose moments are float64, and one for all others; before
    # them one that only looks whether the second can be.
    names = ["clip_"] if what == "clip" else ["grad_norm_decide_", *["adamw_"] * 3]
    assert calls == [[f"fastguard.{name}" for name in names]] * 2


@pytest.mark.parametrize("empty", [{0}, {1}, {999}, {998, 999}, set(range(1, 1000, 2))])
@pytest.mark.parametrize("bad", [None, math.nan])
def test_empty_tensors_lose_nobodys_work(empty, bad):
    """14 Apex's multi_tensor_apply.cuh launches what is pending only after a tensor with elements:
    an empty one at the end, and the tensors before it are neither measured nor scaled; one in the
    last slot writes out of bounds (as TE did: TE#3202; pytorch#100811, #140066)."""
    grads = [torch.full((0 if i in empty else 3,), 2.0) for i in range(1000)]
    last = max(set(range(1000)) - empty)
    if bad is not None:
        grads[last][2] = bad
    parameters = parameters_with(grads)
    norm = 2 * math.sqrt(3 * (1000 - len(empty))) if bad is None else bad
    returned = fastguard.clip_grad_norm_(parameters, norm / 4 if bad is None else 1.0)
    assert returned.item() == pytest.approx(norm, nan_ok=True)
    for i, (parameter, grad) in enumerate(zip(parameters, grads, strict=True)):
        expected = grad / 4 if bad is None else grad
        torch.testing.assert_close(parameter.grad, expected, equal_nan=True, msg=f"gradient {i}")
    report = GradGuard(parameters).step(fastguard.AdamW(parameters))
    assert report.first_nonfinite == (None if bad is None else f"parameter {last}[2]")
    assert parameters[last].ne(0).all() == (bad is None)


@pytest.mark.slow
def test_more_than_2_to_the_31_elements_in_one_tensor():
    """14 Apex keeps a tensor's size in an int (multi_tensor_apply.cuh). On CUDA torch's
    clip_grad_norm_ ends in an illegal memory access (pytorch#169930). Takes 4.3 GB."""
    n = 2**31 + 7
    table = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16).expand(n))  # of one element's memory
    table.grad = torch.zeros(n, dtype=torch.bfloat16)
    ends = torch.tensor([0, n - 1])
    table.grad[0], table.grad[-1] = 3.0, -4.0
    assert fastguard.clip_grad_norm_(table, 1.0).item() == 5.0
    torch.testing.assert_close(table.grad[ends], torch.tensor([0.6, -0.8]).bfloat16())
    table.grad[-1] = math.nan
    before = bits([table.grad[ends]])
    assert fastguard.clip_grad_norm_(table, 0.1).isnan()
    assert_same_bits(before, bits([table.grad[ends]]))
    report = GradGuard([("table", table)]).step(torch.optim.SGD([table], lr=0.1))
    assert report.verdict is Verdict.SKIP_NONFINITE
    assert report.first_nonfinite == f"table[{n - 1}]"
    assert_same_bits(before, bits([table.grad[ends]]))


@pytest.mark.parametrize("norm_type", [2.0, 1.0, math.inf])
def test_clipping_of_any_dtypes_reads_nothing_on_the_host(norm_type):
    """15 Apex's clip_grad_norm_ takes bf16 gradients one by one, and hands a CUDA tensor to a
    float argument: pybind calls __float__, which waits for the device once per dtype
    (contrib/clip_grad.py, amp_C_frontend.cpp). On the meta device reading a value raises."""
    parameters = []
    for grad in mixed_gradients(1):
        parameters.append(nn.Parameter(torch.empty_like(grad, device="meta")))
        parameters[-1].grad = torch.empty_like(grad, device="meta")
    with Ops() as ops:
        total_norm = fastguard.clip_grad_norm_(parameters, 1.0, norm_type)
    assert total_norm.is_meta and not HOST_READS & set(ops.names)
