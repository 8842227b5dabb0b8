"""The linear layers: the function is F.linear's on every route."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fastguard.speech.models import linear as module
from fastguard.speech.models.linear import Linear, linear

needs_onednn = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="this torch has no such operator"
)


@pytest.fixture(autouse=True)
def on_every_cpu(monkeypatch):
    """oneDNN's route, also where MKL is the faster one."""
    monkeypatch.setattr(module, "has_faster_products", lambda: True)


@needs_onednn
@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(0, 9), min_size=0, max_size=3),
    sizes=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    transposed=st.booleans(),
    has_bias=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_result_and_gradients_are_those_of_torch(shape, sizes, transposed, has_bias, seed):
    generator = torch.Generator().manual_seed(seed)
    inputs, outputs = sizes
    x = torch.randn(*shape, inputs, generator=generator)
    if transposed and x.dim() > 1:
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    weight = torch.randn(outputs, inputs, generator=generator)
    bias = torch.randn(outputs, generator=generator) if has_bias else None
    leaves = [t.requires_grad_() for t in (x, weight, bias) if t is not None]
    output = linear(x, weight, bias)
    expected = F.linear(*(None if t is None else t.double() for t in (x, weight, bias)))
    upstream = torch.randn(output.shape, generator=generator)
    torch.testing.assert_close(output.double(), expected, rtol=1e-4, atol=1e-4)
    found = torch.autograd.grad(output, leaves, upstream, materialize_grads=True)
    right = torch.autograd.grad(expected, leaves, upstream.double(), materialize_grads=True)
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4)


@needs_onednn
def test_what_onednn_is_asked_for(monkeypatch):
    asked = []
    product = module._product
    monkeypatch.setattr(module, "_product", lambda *args: asked.append(1) or product(*args))
    layer, x = Linear(8, 4), torch.randn(3, 8, requires_grad=True)
    layer(x).sum().backward()
    assert len(asked) == 3
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    with torch.no_grad():
        layer(x)
    layer.double()(x.double())
    torch.export.export(Linear(8, 4), (torch.randn(3, 8),))
    assert len(asked) == 3


def test_state_and_function_are_those_of_nn_linear():
    torch.manual_seed(0)
    ours, theirs = Linear(8, 4), torch.nn.Linear(8, 4)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 8)
    torch.testing.assert_close(ours(x), theirs(x))


@needs_onednn
def test_the_same_bits_for_any_number_of_threads():
    x, weight = torch.randn(250, 96), torch.randn(48, 96, requires_grad=True)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            output = linear(x, weight)
            results.append((output, *torch.autograd.grad(output.square().sum(), weight)))
    finally:
        torch.set_num_threads(threads)
    for output, grad in results[1:]:
        assert torch.equal(output, results[0][0])
        assert torch.equal(grad, results[0][1])
