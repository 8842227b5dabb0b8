"""clip_grad_norm_ and its two halves: the 2-norm, what is written, what is refused."""

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fastguard
from fastguard._tensors import by_device
from tests.drawn import DTYPES, NORM_TYPES, gradients
from tests.tensors import assert_same_bits, bits, parameters_with


@settings(max_examples=100, deadline=None)
@given(gradients(nonfinite=False), st.floats(1e-3, 1e3))
def test_clips_to_the_true_norm_over_the_whole_range(grads, max_norm):
    parameters = parameters_with(grads)
    before = bits(p.grad for p in parameters)
    exact = [p.grad.to(torch.float64, copy=True) for p in parameters]
    norm = math.sqrt(sum(g.square().sum().item() for g in exact))
    returned = fastguard.clip_grad_norm_(parameters, max_norm)
    rel = 1e-12 if returned.dtype == torch.float64 else 1e-6
    if norm < torch.finfo(returned.dtype).max:
        assert returned.item() == pytest.approx(norm, rel=rel, abs=torch.finfo(returned.dtype).tiny)
    coef = min(1.0, max_norm / (norm + 1e-6))
    if coef == 1:
        assert_same_bits(before, bits(p.grad for p in parameters))
    for parameter, grad in zip(parameters, exact, strict=True):
        info = torch.finfo(parameter.dtype)
        torch.testing.assert_close(
            parameter.grad.double(), grad * coef, rtol=4 * info.eps, atol=info.smallest_normal
        )


@pytest.mark.parametrize("norm_type", [2.0, 1.0, 0.5, 3, math.inf, -math.inf, "inf", 0])
@pytest.mark.parametrize("max_norm", [0.1, 1e6, 0])
def test_agrees_with_torch(norm_type, max_norm):
    torch.manual_seed(0)
    grads = [torch.randn(10, 3), torch.randn(7), torch.randn(())]
    ours, theirs = parameters_with(grads), parameters_with(grads)
    torch.testing.assert_close(
        fastguard.clip_grad_norm_(ours, max_norm, norm_type),
        nn.utils.clip_grad_norm_(theirs, max_norm, norm_type),
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("error_if_nonfinite", [False, True])
@pytest.mark.parametrize("norm_type", [2.0, 1.0])
def test_nonfinite_norm_leaves_the_gradients(bad, error_if_nonfinite, norm_type):
    parameters = parameters_with([torch.ones(5), torch.tensor([3.0, bad]), torch.ones(2)])
    before = bits(p.grad for p in parameters)
    if error_if_nonfinite:
        with pytest.raises(
            RuntimeError, match=f"The total norm of order {norm_type} for gradients"
        ):
            fastguard.clip_grad_norm_(parameters, 1.0, norm_type, error_if_nonfinite=True)
    else:
        norm = fastguard.clip_grad_norm_(parameters, 1.0, norm_type)
        assert not norm.isfinite()
        assert norm.isnan() == math.isnan(bad)
    assert_same_bits(before, bits(p.grad for p in parameters))


def test_torch_zeroes_what_we_clip():
    """The peer's failure this guards against: finite gradients zeroed by an overflowing norm."""
    for grad in (torch.full((100,), 1e4, dtype=torch.float16), torch.full((100,), 1e20)):
        ours, theirs = parameters_with([grad]), parameters_with([grad])
        nn.utils.clip_grad_norm_(theirs, 1.0)
        assert not theirs[0].grad.any()
        fastguard.clip_grad_norm_(ours, 1.0)
        expected = (grad.double() / grad.double().norm()).to(grad.dtype)
        torch.testing.assert_close(ours[0].grad, expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("norm_type", [2.0, 3.5])
def test_float64_overflows_as_torch_does(norm_type):
    parameters = parameters_with([torch.full((2,), 2e200, dtype=torch.float64)])
    with pytest.raises(RuntimeError, match="is inf"):
        fastguard.clip_grad_norm_(parameters, 1.0, norm_type, error_if_nonfinite=True)
    assert parameters[0].grad.eq(2e200).all()
    fine = parameters_with([torch.full((2,), 2e22, dtype=torch.float64)])
    fastguard.clip_grad_norm_(fine, 1.0, norm_type, error_if_nonfinite=True)
    assert fine[0].grad.norm(norm_type).item() == pytest.approx(1.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtype_of_the_norm(dtype):
    norm = fastguard.clip_grad_norm_(parameters_with([torch.ones(3, dtype=dtype)]), 1.0)
    assert norm.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert norm.shape == ()


def test_accepts_a_tensor_a_generator_and_parameters_without_gradients():
    single = parameters_with([torch.full((4,), 3.0)])[0]
    assert fastguard.clip_grad_norm_(single, 1.0).item() == 6.0
    parameters = [*parameters_with([torch.full((4,), 3.0)]), nn.Parameter(torch.ones(2))]
    assert fastguard.clip_grad_norm_((p for p in parameters), 1.0).item() == 6.0
    assert fastguard.clip_grad_norm_([nn.Parameter(torch.ones(2))], 1.0).item() == 0.0
    with pytest.warns(UserWarning, match="empty generator"):
        fastguard.clip_grad_norm_((p for p in ()), 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastguard.clip_grad_norm_([], 1.0)


def test_a_parameter_listed_twice_counts_once():
    parameter = parameters_with([torch.full((4,), 3.0)])[0]
    assert fastguard.clip_grad_norm_([parameter, parameter], 3.0).item() == 6.0
    torch.testing.assert_close(parameter.grad, torch.full((4,), 1.5))


@pytest.mark.parametrize("norm_type", [2.0, 1.0, math.inf])
def test_sparse_gradients_clip_like_dense_ones(norm_type):
    """With duplicates, which add up before they count."""
    sparse, dense = nn.Embedding(10, 3, sparse=True), nn.Embedding(10, 3)
    dense.load_state_dict(sparse.state_dict())
    for module in (sparse, dense):
        module(torch.tensor([1, 1, 4])).square().sum().backward()
    assert not sparse.weight.grad.is_coalesced()
    torch.testing.assert_close(
        fastguard.clip_grad_norm_(sparse.parameters(), 0.1, norm_type),
        fastguard.clip_grad_norm_(dense.parameters(), 0.1, norm_type),
    )
    torch.testing.assert_close(sparse.weight.grad.to_dense(), dense.weight.grad)


def test_complex_gradients_clip_like_torch():
    grads = [torch.tensor([3 + 4j]), torch.randn(5)]
    ours, theirs = parameters_with(grads), parameters_with(grads)
    torch.testing.assert_close(
        fastguard.clip_grad_norm_(ours, 1.0), nn.utils.clip_grad_norm_(theirs, 1.0)
    )
    torch.testing.assert_close(ours[0].grad, theirs[0].grad)


def test_two_parameters_that_share_a_gradient_scale_it_once():
    one, two = parameters_with([torch.zeros(70_000), torch.zeros(70_000)])
    one.grad = two.grad = torch.full((70_000,), 3.0)
    norm = fastguard.clip_grad_norm_([one, two], 1.0)
    assert norm.item() == pytest.approx(3 * math.sqrt(70_000))
    assert two.grad.double().norm().item() == pytest.approx(1.0, rel=1e-6)


def test_a_norm_beyond_float32_is_clipped_by_its_true_value():
    parameters = parameters_with([torch.full((1000,), 1e38)])
    returned = fastguard.clip_grad_norm_(parameters, 1.0, error_if_nonfinite=True)
    assert returned.item() == math.inf  # float32, as documented
    torch.testing.assert_close(parameters[0].grad, torch.full((1000,), 1000**-0.5))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("norm_type", [2.0, 1.0, 3.5, math.inf])
@pytest.mark.parametrize("max_norm", [1.0, math.inf])
def test_nonfinite_torch_is_what_torch_does(bad, norm_type, max_norm):
    grads = [torch.ones(5), torch.tensor([-3.0, bad]), torch.ones(2, dtype=torch.float64)]
    ours, theirs = parameters_with(grads), parameters_with(grads)
    fastguard.clip_grad_norm_(ours, max_norm, norm_type, nonfinite="torch")
    nn.utils.clip_grad_norm_(theirs, max_norm, norm_type)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=0, equal_nan=True)


def test_nonfinite_torch_clips_finite_gradients_all_the_same():
    ours, theirs = (parameters_with([torch.full((4,), 3.0)]) for _ in range(2))
    fastguard.clip_grad_norm_(ours, 1.5, nonfinite="torch")
    nn.utils.clip_grad_norm_(theirs, 1.5)
    torch.testing.assert_close(ours[0].grad, theirs[0].grad)
    before = bits(p.grad for p in ours)
    fastguard.clip_grad_norm_(ours, 1e3, nonfinite="torch")
    assert_same_bits(before, bits(p.grad for p in ours))


def test_the_error_begins_with_torchs_and_says_the_value_and_the_cure():
    parameters = parameters_with([torch.tensor([1.0, math.inf])])
    grads = [p.grad for p in parameters]
    with pytest.raises(RuntimeError) as theirs:
        nn.utils.get_total_norm(grads, 1, error_if_nonfinite=True)
    torchs = str(theirs.value).split("To disable")[0].strip()
    calls = (
        lambda: fastguard.get_total_norm(grads, 1, True),
        lambda: fastguard.clip_grad_norm_(parameters, 1.0, 1, True, nonfinite="torch"),
    )
    before = bits(grads)
    for call in calls:
        with pytest.raises(RuntimeError) as ours:
            call()
        assert str(ours.value).startswith(torchs)
        assert "It is inf" in str(ours.value) and "GradGuard" in str(ours.value)
    assert_same_bits(before, bits(grads))


def test_writes_nothing_when_nothing_is_clipped():
    for grads in ([torch.ones(4)], [torch.ones(4), torch.ones(2, dtype=torch.complex64)]):
        for value in (1.0, math.nan, math.inf):
            parameters = parameters_with([g * value for g in grads])
            before = bits(p.grad for p in parameters)
            versions = [p.grad._version for p in parameters]
            fastguard.clip_grad_norm_(parameters, 100.0)
            fastguard.clip_grads_with_norm_(parameters, 100.0, 100.0 * value - 1)
            assert versions == [p.grad._version for p in parameters]
            assert_same_bits(before, bits(p.grad for p in parameters))
        parameters = parameters_with(grads)
        versions = [p.grad._version for p in parameters]
        fastguard.clip_grad_norm_(parameters, 0.1)
        assert all(p.grad._version > v for p, v in zip(parameters, versions, strict=True))


TOTAL_NORMS = [torch.tensor(4.0, dtype=dtype) for dtype in (*DTYPES, torch.int64)]

TOTAL_NORMS += [torch.tensor([4.0]), torch.tensor(4.0, requires_grad=True), 4.0, 4]


@pytest.mark.parametrize("total_norm", TOTAL_NORMS, ids=str)
def test_the_total_norm_may_be_any_number(total_norm):
    (parameter,) = parameters_with([torch.full((4,), 3.0)])
    fastguard.clip_grads_with_norm_(parameter, 2.0, total_norm)
    torch.testing.assert_close(parameter.grad, torch.full((4,), 1.5))
    fastguard.clip_grads_with_norm_((p for p in [parameter]), 2.0, total_norm)
    torch.testing.assert_close(parameter.grad, torch.full((4,), 0.75))
    fastguard.clip_grads_with_norm_([nn.Parameter(torch.ones(2))], 2.0, total_norm)


@pytest.mark.parametrize("total_norm", [-1.0, torch.tensor(-1.0), torch.ones(2), torch.ones(0)])
def test_refuses_a_total_norm_that_is_none(total_norm):
    (parameter,) = parameters_with([torch.ones(2)])
    with pytest.raises(ValueError, match="total_norm must"):
        fastguard.clip_grads_with_norm_(parameter, 1.0, total_norm)
    assert parameter.grad.equal(torch.ones(2))


def test_autograd_may_leave_a_complex_gradient_lazily_conjugated():
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(3, dtype=torch.complex64))
    (parameter.conj() * torch.randn(3)).abs().sum().backward()
    assert parameter.grad.is_conj()
    before = parameter.grad.clone()
    norm = fastguard.clip_grad_norm_(parameter, 0.5)
    torch.testing.assert_close(norm, before.norm())
    torch.testing.assert_close(parameter.grad, before * (0.5 / norm))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.bool])
def test_names_a_gradient_of_an_integer_type(dtype):
    integer = torch.zeros(3, dtype=dtype)
    integer.grad = torch.ones(3, dtype=dtype)  # only by hand: autograd makes none
    parameters = [nn.Parameter(torch.ones(2)), *parameters_with([torch.ones(2)]), integer]
    message = rf"gradient 2, of shape \(3,\), has dtype {dtype}"
    with pytest.raises(RuntimeError, match=message):
        fastguard.clip_grad_norm_(parameters, 0.1)
    with pytest.raises(RuntimeError, match=message):
        fastguard.clip_grads_with_norm_(parameters, 0.1, 1.0)
    with pytest.raises(RuntimeError, match="gradient 1, "):
        fastguard.get_total_norm([torch.ones(2), integer.grad])
    assert parameters[1].grad.equal(torch.ones(2))


@pytest.mark.parametrize("norm_type", [2.0, 1.0, 8.0, -1.0])
def test_several_devices(norm_type):
    """With the meta device for the other one: its values are none, so not in one norm."""
    here, there = (nn.Parameter(torch.ones(4, device=d)) for d in ("cpu", "meta"))
    here.grad, there.grad = torch.full((4,), 3.0), torch.ones(4, device="meta")
    norm = fastguard.clip_grad_norm_([there], 1.0, norm_type)
    assert (norm.device.type, norm.shape, norm.dtype) == ("meta", (), torch.float32)
    fastguard.clip_grads_with_norm_([there, here], 1.0, 2.0)
    torch.testing.assert_close(here.grad, torch.full((4,), 1.5))
    assert by_device([there.grad, here.grad, there.grad]) == [
        [there.grad, there.grad],
        [here.grad],
    ]


@pytest.mark.cuda
@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_on_the_gpu_and_beside_it(norm_type):
    grads = [torch.randn(5), torch.randn(3).cuda(), torch.randn(2, 2).cuda().half()]
    expected = fastguard.get_total_norm([g.cpu() for g in grads], norm_type)
    total_norm = fastguard.get_total_norm(grads, norm_type)
    assert total_norm.device.type == "cpu"
    torch.testing.assert_close(total_norm, expected)
    on_gpu = fastguard.get_total_norm(grads[1:], norm_type)
    assert on_gpu.is_cuda
    parameters = parameters_with(g.cpu() for g in grads)
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.data, parameter.grad = parameter.data.to(grad.device), None
        parameter.grad = grad.clone()
    fastguard.clip_grad_norm_(parameters, expected / 2, norm_type)
    for parameter, grad in zip(parameters, grads, strict=True):
        coef = expected / 2 / (expected + 1e-6)
        torch.testing.assert_close(parameter.grad, (grad.double() * coef.item()).to(grad.dtype))


def test_the_warning_points_at_the_caller():
    with pytest.warns(UserWarning, match="empty generator") as caught:
        assert fastguard.clip_grad_norm_((p for p in ()), 1.0) == 0
    assert caught[0].filename == __file__
    assert fastguard.get_total_norm(p for p in ()) == 0


@pytest.mark.parametrize("max_norm", [-1.0, math.nan])
def test_refuses_a_threshold_that_would_flip_or_poison_gradients(max_norm):
    with pytest.raises(ValueError, match=f"max_norm must be a number >= 0.*got {max_norm}"):
        fastguard.clip_grad_norm_(parameters_with([torch.ones(2)]), max_norm)
    with pytest.raises(ValueError, match=f"max_norm must be a number >= 0.*got {max_norm}"):
        fastguard.clip_grads_with_norm_(parameters_with([torch.ones(2)]), max_norm, 1.0)


def test_refuses_an_unknown_word_for_nonfinite():
    with pytest.raises(ValueError, match=r"nonfinite must be 'keep' .* got 'zero'"):
        fastguard.clip_grad_norm_(parameters_with([torch.ones(2)]), 1.0, nonfinite="zero")
    with pytest.raises(ValueError, match=r"nonfinite must be 'keep' .* got None"):
        fastguard.clip_grads_with_norm_([], 1.0, 1.0, nonfinite=None)
