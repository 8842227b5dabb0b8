"""Norms of every order, over the whole range, against torch's."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fastguard
from tests.drawn import NORM_TYPES, gradients
from tests.tensors import assert_same_bits, bits, parameters_with


@settings(max_examples=150, deadline=None)
@given(
    gradients(nonfinite=False, magnitudes=False),
    st.sampled_from(NORM_TYPES),
    st.floats(1e-2, 2.0),
)
def test_every_order_is_torchs(grads, norm_type, fraction):
    """Whose own sums are taken in float64 here, and which cannot do without elements."""
    ours, exact = parameters_with(grads), [g.double() for g in grads if g.numel()]
    expected = nn.utils.get_total_norm(exact, norm_type) if exact else torch.tensor(0.0)
    expected = expected.double()
    total_norm = fastguard.get_total_norm([p.grad for p in ours], norm_type)
    rel = 1e-9 if total_norm.dtype == torch.float64 else 1e-6
    torch.testing.assert_close(
        total_norm, expected.to(total_norm.dtype), rtol=rel, atol=torch.finfo().smallest_normal
    )
    max_norm = fraction * expected.item()
    coef = min(1.0, max_norm / (expected.item() + 1e-6))
    fastguard.clip_grad_norm_(ours, max_norm, norm_type)
    for parameter, grad in zip(ours, grads, strict=True):
        info = torch.finfo(grad.dtype)
        torch.testing.assert_close(
            parameter.grad.double(),
            grad.double() * coef,
            rtol=max(1e-9, 4 * info.eps),
            atol=info.smallest_normal,
        )


@pytest.mark.parametrize("norm_type", [2.0, 1.0, 0.5, 3.5, 8, 20, math.inf, -1, -9, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("end", ["max", "tiny"])
def test_no_order_overflows_at_either_end_of_the_range(norm_type, dtype, end):
    value = torch.full((16,), getattr(torch.finfo(dtype), end), dtype=dtype)
    total_norm = fastguard.get_total_norm([value, value[:9]], norm_type)
    power = 0 if math.isinf(norm_type) else 1 / norm_type
    expected = value[0].item() * 25**power
    if 2e-38 < expected < 3e38:  # what float32 can say
        assert total_norm.item() == pytest.approx(expected, rel=1e-6)
    (parameter,) = parameters_with([value])
    fastguard.clip_grad_norm_([parameter], 0.5, norm_type)
    assert parameter.grad.all() and parameter.grad.isfinite().all()


@settings(max_examples=60, deadline=None)
@given(gradients(), st.sampled_from(NORM_TYPES), st.sampled_from(["keep", "torch"]))
def test_in_two_steps_the_same_bits(grads, norm_type, nonfinite):
    one, two = parameters_with(grads), parameters_with(grads)
    returned = fastguard.clip_grad_norm_(one, 0.5, norm_type, nonfinite=nonfinite)
    total_norm = fastguard.get_total_norm([p.grad for p in two], norm_type)
    assert total_norm.dtype == returned.dtype and total_norm.shape == ()
    if total_norm.isinf() and all(g.isfinite().all() for g in grads):
        return  # beyond float32: only clip_grad_norm_ knows the true norm
    assert fastguard.clip_grads_with_norm_(two, 0.5, total_norm, nonfinite=nonfinite) is None
    torch.testing.assert_close(
        returned, total_norm.to(returned.dtype), rtol=0, atol=0, equal_nan=True
    )
    assert_same_bits(bits(p.grad for p in one), bits(p.grad for p in two))


@pytest.mark.parametrize("norm_type", [2.0, 1.0, 3.0, 0.5, -1.0])
@pytest.mark.parametrize("error_if_nonfinite", [False, True])
def test_both_ways_clip_by_the_norm_that_is_returned(norm_type, error_if_nonfinite):
    """Rounded to float32: a coefficient of the norm before that would show in some elements."""
    generator = torch.Generator().manual_seed(0)
    grads = [torch.rand(1000, generator=generator) + 0.5 for _ in range(5)]
    one, two = parameters_with(grads), parameters_with(grads)
    max_norm = 0.3 * fastguard.get_total_norm(grads, norm_type).item()
    norm = fastguard.clip_grad_norm_(one, max_norm, norm_type, error_if_nonfinite)
    assert norm == fastguard.get_total_norm([p.grad for p in two], norm_type)
    fastguard.clip_grads_with_norm_(two, max_norm, norm)
    assert_same_bits(bits(p.grad for p in one), bits(p.grad for p in two))
    for p, grad in zip(one, grads, strict=True):
        assert torch.equal(p.grad, (grad.double() * (max_norm / (norm.double() + 1e-6))).float())


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.5, 8, math.inf, -math.inf])
def test_a_nan_stays_in_every_order(norm_type):
    """Apex's maximum, by fmaxf, drops it. Order 0 counts it, as in torch."""
    for place in range(3):
        grad = torch.tensor([1.0, 2.0, 3.0])
        grad[place] = math.nan
        assert fastguard.get_total_norm([torch.ones(2), grad, torch.ones(2)], norm_type).isnan()
    assert fastguard.get_total_norm([torch.ones(2), grad], 0) == 2


@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_gradients_without_elements_and_of_zeros(norm_type):
    """torch raises for the former where the order is negative or infinite."""
    assert fastguard.get_total_norm([torch.zeros(0), torch.zeros(2, 0)], norm_type) == 0
    some = [torch.zeros(0), torch.tensor([3.0, -4.0]), torch.zeros(0, 5)]
    expected = nn.utils.get_total_norm(some[1:2], norm_type)
    torch.testing.assert_close(fastguard.get_total_norm(some, norm_type), expected)
    torch.testing.assert_close(fastguard.get_total_norm(some[1], norm_type), expected)
    parameters = parameters_with([torch.zeros(3), torch.zeros(0)])
    before = bits(p.grad for p in parameters)
    assert fastguard.clip_grad_norm_(parameters, 1.0, norm_type, error_if_nonfinite=True) == 0
    assert_same_bits(before, bits(p.grad for p in parameters))


@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_repeated_gradients_count_and_are_scaled_once(norm_type):
    grad, other = torch.tensor([3.0, 1.0]), torch.tensor([2.0])
    once = fastguard.get_total_norm([grad, other], norm_type)
    assert fastguard.get_total_norm([grad, other, grad], norm_type) == once
    one, two, three = parameters_with([grad, grad, other])
    two.grad = one.grad
    max_norm = once.item() / 2
    returned = fastguard.clip_grad_norm_([one, two, three, one], max_norm, norm_type)
    assert returned == once.float()
    torch.testing.assert_close(one.grad, grad * (max_norm / (once.float() + 1e-6)))
    fastguard.clip_grads_with_norm_([one, two, three], 1.0, 2.0)
    torch.testing.assert_close(three.grad, other * (max_norm / (once.float() + 1e-6)) / 2)


@pytest.mark.parametrize("norm_type", [2.0, 1.0, 3.5, 8, 0, -1, math.inf])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_a_complex_element_counts_by_its_absolute_value(norm_type, dtype):
    grads = [torch.tensor([3 + 4j, 1j], dtype=dtype), torch.tensor([2.0])]
    ours, theirs = parameters_with(grads), parameters_with(grads)
    expected = nn.utils.clip_grad_norm_(theirs, 1.0, norm_type)
    returned = fastguard.clip_grad_norm_(ours, 1.0, norm_type)
    torch.testing.assert_close(returned, expected.to(returned.dtype))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("norm_type", [2.0, 1.0, 3.5, 8, 0, -1, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
def test_sparse_gradients_in_every_order(norm_type, dtype):
    """As torch: of the values that are stored, after duplicates are added up."""
    values = torch.tensor([[1, 2], [3, 4], [5, 6]], dtype=dtype)
    sparse = torch.sparse_coo_tensor([[1, 1, 4]], values, (6, 2), check_invariants=True)
    empty = torch.sparse_coo_tensor(size=(3, 2), dtype=dtype, check_invariants=True)
    # torch 2.11 has no norm of a sparse tensor itself.
    expected = nn.utils.get_total_norm([sparse.coalesce().values()], norm_type)
    grads = [sparse.clone(), sparse.coalesce(), empty]
    for grad in grads[:2]:
        torch.testing.assert_close(fastguard.get_total_norm([grad, empty], norm_type), expected)
    parameters = [nn.Parameter(torch.zeros(grad.shape, dtype=dtype)) for grad in grads]
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad
    versions = [p.grad._version for p in parameters]
    fastguard.clip_grads_with_norm_(parameters, 1.0, 2.0)
    for parameter, version in zip(parameters[:2], versions, strict=False):
        torch.testing.assert_close(parameter.grad.to_dense(), sparse.to_dense() / (2 + 1e-6))
        assert parameter.grad._version > version
    assert fastguard.get_total_norm([empty], norm_type) == 0
