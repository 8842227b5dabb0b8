"""grad_norm against slow references in float64."""

import math

import pytest
import torch
from hypothesis import given, settings

from fastguard import ops
from tests.drawn import DTYPES, gradients
from tests.native import needs_kernel
from tests.ops.cases import check_grad_norm
from tests.simt.kernels.devices import DEVICES, on_devices


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
            pytest.skip("this processor cannot flush denormals")
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
