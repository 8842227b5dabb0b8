"""Gradients in parameters, and comparisons bit for bit."""

import torch
from torch import nn

F64 = torch.float64


def parameters_with(grads):
    """A parameter for each gradient, which it holds a copy of."""
    parameters = []
    for grad in grads:
        parameter = nn.Parameter(torch.zeros(grad.shape, dtype=grad.dtype))
        parameter.grad = grad.clone()  # as autograd leaves it: no memory shared between elements
        parameters.append(parameter)
    return parameters


def bits(tensors):
    """Copies of the tensors' elements, in row-major order, as bytes."""
    contiguous = torch.contiguous_format
    return [t.detach().clone(memory_format=contiguous).view(-1).view(torch.uint8) for t in tensors]


def assert_same_bits(before, after):
    """Of two lists that :func:`bits` has made, or of integers."""
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a, b)


def assert_close(these, those, ulps=8):
    """Equal up to some units in the last place."""
    for this, that in zip(these, those, strict=True):
        eps = torch.finfo(this.dtype).eps
        torch.testing.assert_close(this, that, rtol=ulps * eps, atol=ulps * eps)
