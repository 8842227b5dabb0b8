"""Parameters with gradients, and bitwise comparisons."""

import torch
from torch import nn

F64 = torch.float64


def parameters_with(grads):
    """A parameter for each gradient, with a copy of it."""
    parameters = []
    for grad in grads:
        parameter = nn.Parameter(torch.zeros(grad.shape, dtype=grad.dtype))
        parameter.grad = grad.clone()  # no two elements share memory, as in autograd's gradients
        parameters.append(parameter)
    return parameters


def bits(tensors):
    """Copies of the tensors' elements, in row-major order, as bytes."""
    contiguous = torch.contiguous_format
    return [t.detach().clone(memory_format=contiguous).view(-1).view(torch.uint8) for t in tensors]


def assert_same_bits(before, after):
    """Check that two results of :func:`bits`, or two lists of integers, are equal."""
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a, b)


def assert_close(these, those, ulps=8):
    """Check that two lists of tensors are equal up to some units in the last place."""
    for this, that in zip(these, those, strict=True):
        eps = torch.finfo(this.dtype).eps
        torch.testing.assert_close(this, that, rtol=ulps * eps, atol=ulps * eps)
