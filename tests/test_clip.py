"""clip_grad_norm_ against torch's where torch is right, and against the truth where it is not."""

import math
import subprocess
import sys
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fastguard

from .drawn import DTYPES, gradients


def parameters_with(grads):
    parameters = []
    for grad in grads:
        parameter = nn.Parameter(torch.zeros(grad.shape, dtype=grad.dtype))
        parameter.grad = grad.clone()  # as autograd leaves it: no memory shared between elements
        parameters.append(parameter)
    return parameters


def bits(tensors):
    return [
        t.clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8) for t in tensors
    ]


def assert_same_bits(before, after):
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a, b)


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


def test_float64_overflows_as_torch_does():
    parameters = parameters_with([torch.full((2,), 2e200, dtype=torch.float64)])
    with pytest.raises(RuntimeError, match="is inf"):
        fastguard.clip_grad_norm_(parameters, 1.0, error_if_nonfinite=True)
    fine = parameters_with([torch.full((2,), 2e22, dtype=torch.float64)])
    fastguard.clip_grad_norm_(fine, 1.0, error_if_nonfinite=True)


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


_DTENSOR = """
import torch, torch.distributed as dist, fastguard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.device_mesh import init_device_mesh
dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
mesh = init_device_mesh("cpu", (1,))
for value in (1.0, float("nan")):
    p = torch.nn.Parameter(distribute_tensor(torch.zeros(8), mesh, [Shard(0)]))
    p.grad = distribute_tensor(torch.full((8,), value), mesh, [Shard(0)])
    norm = fastguard.clip_grad_norm_([p], 1.0)
    print(norm.full_tensor().item(), p.grad.full_tensor()[0].item())
"""


def test_dtensor_gradients():
    run = subprocess.run([sys.executable, "-c", _DTENSOR], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    finite, nan = run.stdout.split("\n")[:2]
    assert [float(x) for x in finite.split()] == pytest.approx([8**0.5, 8**-0.5], rel=1e-5)
    assert nan == "nan nan"


@pytest.mark.parametrize("max_norm", [-1.0, math.nan])
def test_refuses_a_threshold_that_would_flip_or_poison_gradients(max_norm):
    with pytest.raises(ValueError, match=f"max_norm must be a number >= 0.*got {max_norm}"):
        fastguard.clip_grad_norm_(parameters_with([torch.ones(2)]), max_norm)
