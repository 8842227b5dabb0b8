"""The operators against slow references in float64."""

import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastguard import ops
from fastguard.ops import Verdict, _library
from tests.drawn import DTYPES, gradients
from tests.simt.kernels.devices import DEVICES, on_devices

needs_kernel = pytest.mark.skipif(
    _library.cpu_problem is not None, reason=f"no CPU kernels: {_library.cpu_problem}"
)


def expected_grad_norm(grads):
    """What grad_norm must find, element by element in Python floats."""
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


@settings(max_examples=200, deadline=None)
@given(gradients())
def test_grad_norm(grads):
    check_grad_norm(ops.grad_norm(grads), grads)


@settings(max_examples=30, deadline=None)
@given(gradients())
def test_grad_norm_ref(grads):
    check_grad_norm(ops.grad_norm_ref(grads), grads)


@settings(max_examples=100, deadline=None)
@given(gradients())
@pytest.mark.parametrize("device", DEVICES)
def test_grad_norm_of_the_cuda_kernel(device, grads):
    # 32 elements at a time are summed in float32.
    check_grad_norm(device.grad_norm(grads), grads, rel=1e-6)


def test_grad_norm_of_no_tensors():
    check_grad_norm(ops.grad_norm([]), [])


@pytest.mark.parametrize(
    "function, rel", [(ops.grad_norm, 1e-12), (DEVICES[0].values[0].grad_norm, 1e-6)]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_grad_norm_at_the_ends_of_the_range(dtype, function, rel):
    """Every finite value of <= 32 bits has a finite, right norm; torch's overflows."""
    largest, smallest = torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal
    if dtype == torch.float64:
        largest, smallest = 1e150, 1e-150
    for value in (largest, smallest, smallest / 8 if dtype != torch.float64 else 1.0):
        grad = torch.full((50_000,), value, dtype=dtype)
        norm = function([grad]).total_norm.item()
        assert norm == pytest.approx(grad[0].item() * math.sqrt(50_000), rel=rel)


def test_grad_norm_of_every_half():
    """All 65536 bit patterns of both 16-bit types, each as a tensor of its own."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        values = bits.view(dtype)
        found = ops.grad_norm(values.split(1))
        torch.testing.assert_close(
            found.norms, values.double().abs(), rtol=0, atol=0, equal_nan=True
        )
        first = values.isfinite().long() * -1  # each tensor has but one element, index 0
        expected = torch.stack([values.isnan().long(), values.isinf().long(), first], 1)
        assert torch.equal(found.nonfinite, expected)


@pytest.mark.parametrize("function", [ops.grad_norm, *on_devices("grad_norm")])
def test_the_largest_float64_beside_a_nan_is_not_counted(function):
    grad = torch.full((100,), torch.finfo(torch.float64).max, dtype=torch.float64)
    grad[[3, 50]] = torch.tensor([math.nan, math.inf], dtype=torch.float64)
    found = function([grad])
    assert found.nonfinite.tolist() == [[1, 1, 3]]


@needs_kernel
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_denormals_count_on_every_thread(threads):
    tiny = {dtype: torch.finfo(dtype).smallest_normal / 8 for dtype in DTYPES[:1] + DTYPES[2:]}
    grads = [torch.full((200_001,), value, dtype=dtype) for dtype, value in tiny.items()]
    expected = [math.sqrt(200_001) * grad[0].item() for grad in grads]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        if not torch.set_flush_denormal(True):
            pytest.skip("this processor can not flush denormals")
        norms = ops.grad_norm(grads).norms.tolist()
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(before)
    assert norms == pytest.approx(expected, rel=1e-12)


def test_the_result_is_no_part_of_a_graph():
    x = torch.ones(3, requires_grad=True)
    for function in (ops.grad_norm, ops.grad_norm_ref):
        assert not function([x * 2]).total_norm.requires_grad


@pytest.mark.parametrize("function", [ops.grad_norm, *on_devices("grad_norm")])
def test_float64_overflow_is_told_from_a_nonfinite_element(function):
    found = function([torch.full((3,), 1e200, dtype=torch.float64)])
    assert found.total_norm.item() == math.inf
    assert found.nonfinite.tolist() == [[0, 0, -1]]


@pytest.mark.parametrize("function", [ops.grad_norm, *on_devices("grad_norm")])
def test_first_nonfinite_is_first_in_row_major_order_not_in_memory(function):
    grad = torch.zeros(300, 200).t()
    grad[7, 250] = math.nan  # later in memory than the next, earlier in the tensor
    grad[190, 3] = math.inf
    both = torch.zeros(5, 4).t()
    both[1, 4] = both[2, 0] = math.nan  # in one chunk
    assert function([both]).nonfinite.tolist() == [[2, 0, 9]]
    found = function([torch.ones(5), grad])
    assert found.nonfinite.tolist() == [[0, 0, -1], [1, 1, 7 * 300 + 250]]


@needs_kernel
def test_grad_norm_does_not_depend_on_threads():
    torch.manual_seed(0)
    grads = [
        torch.randn(n) * 10.0**e for n, e in ((100_001, 3), (7, -9), (65_537, 12), (300_000, 0))
    ]
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(
                torch.cat([ops.grad_norm(grads).total_norm.view(1), ops.grad_norm(grads).norms])
            )
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert torch.equal(results[0], other)


_DUMP = """
import hashlib, math, torch
from fastguard import ops
torch.manual_seed(1)
grads = [(torch.randn(n, dtype=torch.float64) * s).to(dtype)
         for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
         for n, s in ((1, 1.0), (63, 1e-3), (4097, 100.0), (70_003, 1.0))]
grads[2][4000] = math.nan
found = ops.grad_norm(grads)
ops.scale_(grads, torch.tensor(0.7, dtype=torch.float64))
sums = [torch.randn(g.shape, dtype=torch.promote_types(g.dtype, torch.float32)) for g in grads]
window = torch.ones(3, dtype=torch.float64)
ops.accumulate_(sums, grads, torch.tensor(0), window, 1.0)
tensors = [*found, *grads, *sums]
print(ops.cpu_info()["chosen"], hashlib.sha256(b"".join(
    t.view(-1).view(torch.uint8).numpy().tobytes() for t in tensors)).hexdigest())
"""


def assert_same_from_every_instruction_set(script):
    """``script`` prints the instruction set that was chosen and a digest of its results."""
    printed = {}
    for capability in ops.cpu_info()["compiled"].split():
        run = subprocess.run(
            [sys.executable, "-c", script],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "FASTGUARD_CPU_CAPABILITY": capability},
        )
        chosen, values = run.stdout.split(" ", 1)
        printed[chosen] = values
    assert "default" in printed
    assert len(set(printed.values())) == 1, printed


@needs_kernel
def test_every_instruction_set_gives_the_same_bits():
    assert_same_from_every_instruction_set(_DUMP)


@needs_kernel
def test_unknown_capability_is_named():
    run = subprocess.run(
        [sys.executable, "-c", _DUMP],
        capture_output=True,
        text=True,
        env={**os.environ, "FASTGUARD_CPU_CAPABILITY": "sse9"},
    )
    assert run.returncode != 0
    assert "FASTGUARD_CPU_CAPABILITY=sse9 is not one of default, avx2, avx512" in run.stderr


@pytest.mark.parametrize("dtype", [torch.int32, torch.complex64])
def test_a_dtype_that_is_no_gradients_is_named(dtype):
    wrong = [torch.ones(3), torch.ones(3, dtype=dtype)]
    half = torch.tensor(0.5, dtype=torch.float64)
    for function in (ops.grad_norm, ops.grad_norm_ref):
        with pytest.raises(RuntimeError, match="grad_norm: tensor 1 has dtype"):
            function(wrong)
    for function in (ops.scale_, ops.scale_ref_):
        with pytest.raises(RuntimeError, match="scale_: tensor 1 has dtype"):
            function(wrong, half)
    assert wrong[0].tolist() == [1.0, 1.0, 1.0]


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


SCALE = [ops.scale_, ops.scale_ref_, *on_devices("scale_")]


def scaled(grads, coef):
    return [(g.double() * coef).to(g.dtype) for g in grads]


def owned(grads):
    """The same layouts with memory that no two elements share, as scale_ wants them."""
    return [g.clone() if 0 in g.stride() else g for g in grads]


@settings(max_examples=100, deadline=None)
@given(gradients(), st.one_of(st.floats(1e-300, 1.0), st.sampled_from([0.0, 1.0, 1e-43])))
@pytest.mark.parametrize("function", SCALE)
def test_scale_(function, grads, coef):
    grads = owned(grads)
    expected = scaled(grads, coef)
    function(grads, torch.tensor(coef, dtype=torch.float64))
    for grad, right in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, right, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("function", SCALE)
def test_scale_with_a_coefficient_for_each(function):
    grads = [torch.full((40_000,), 2.0), torch.ones(0), torch.ones(3, dtype=torch.bfloat16)]
    function(grads, torch.tensor([0.5, 0.1, 1.0], dtype=torch.float64))
    assert grads[0].unique().tolist() == [1.0]
    assert grads[2].unique().tolist() == [1.0]


@pytest.mark.parametrize("function", SCALE)
def test_scale_of_every_half(function):
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        for coef in (0.7, 1e-3, 1.9):
            grads = [bits.view(dtype).clone(), bits.view(dtype)[:7].clone()]
            expected = scaled(grads, coef)
            function(grads, torch.tensor(coef, dtype=torch.float64))
            for grad, right in zip(grads, expected, strict=True):
                torch.testing.assert_close(grad, right, rtol=0, atol=0, equal_nan=True)


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


def test_scale_bumps_the_version_that_autograd_checks():
    leaf = torch.ones(3, requires_grad=True)
    product = leaf * 2
    result = product.exp()  # keeps its own output for backward
    with torch.no_grad():
        ops.scale_([result], torch.tensor(0.5, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.sum().backward()


@pytest.mark.parametrize("function", [ops.scale_, ops.scale_ref_])
def test_scale_refuses_what_it_can_not_write(function):
    with pytest.raises(RuntimeError, match="clip_coef must be a float64 tensor"):
        function([torch.ones(2)], torch.tensor(0.5))
    with pytest.raises(RuntimeError, match="clip_coef must be a float64 tensor"):
        function([torch.ones(2)], torch.ones(2, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="single memory location"):
        function([torch.ones(1).expand(4)], torch.tensor(0.5, dtype=torch.float64))


@needs_kernel
@pytest.mark.parametrize("coef", [1.0, 0.25])
def test_opcheck_scale_(coef):
    grads = [
        torch.ones(3),
        torch.zeros(0),
        torch.randn(2, 3).t(),
        torch.ones((), dtype=torch.bfloat16),
    ]
    torch.library.opcheck(
        torch.ops.fastguard.scale_.default, (grads, torch.tensor(coef, dtype=torch.float64))
    )


@needs_kernel
@pytest.mark.parametrize(
    "grads",
    [
        [
            torch.ones(3),
            torch.zeros(0),
            torch.randn(2, 3).t(),
            torch.ones((), dtype=torch.bfloat16),
        ],
        [torch.tensor([math.inf, 1.0], dtype=torch.float64)],  # opcheck takes NaN != NaN
    ],
)
def test_opcheck_grad_norm(grads):
    torch.library.opcheck(torch.ops.fastguard.grad_norm.default, (grads,))


@needs_kernel
@pytest.mark.parametrize("norm", [0.0, 0.5, 7.0, math.inf, math.nan])
def test_opcheck_decide(norm):
    torch.library.opcheck(
        torch.ops.fastguard.decide.default, (torch.tensor(norm, dtype=torch.float64), 0.5, 5.0)
    )
