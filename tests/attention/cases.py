"""Inputs and comparisons for the tests of attention."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from fastguard.attention.module import ClampedMultiheadAttention

# torch's encoder warns of its own nested tensors, and of masks of two dtypes, which are fine here.
TORCHS_WARNINGS = [
    pytest.mark.filterwarnings("ignore:.*nested tensor"),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor"),
    pytest.mark.filterwarnings("ignore:Support for mismatched"),
]

NAN, INF = float("nan"), float("inf")


def draw(*shape: int, seed: int, dtype=torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def twins(*sizes: int, dtype=torch.float64, clamp=None, **options):
    """nn.MultiheadAttention and ours with equal parameters, none at its initial zero."""
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(*sizes, dtype=dtype, **options)
    for parameter in theirs.parameters():
        parameter.data.uniform_(-0.4, 0.4)
    ours = ClampedMultiheadAttention(*sizes, dtype=dtype, clamp=clamp, **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def length_mask(lengths: list[int], size: int) -> Tensor:
    return torch.arange(size) >= torch.tensor(lengths)[:, None]


def as_float(mask: Tensor, dtype=torch.float64) -> Tensor:
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(mask, -INF)


def results(attention, inputs, **call):
    """The output, the weights, and the gradients of all inputs and parameters through both."""
    output, weights = attention(*inputs, **call)
    loss = (output * draw(*output.shape, seed=7, dtype=output.dtype)).sum()
    if call.get("need_weights", True):
        loss = loss + (weights * draw(*weights.shape, seed=8, dtype=weights.dtype)).sum()
    leaves = [x for x in (*dict.fromkeys(inputs), *attention.parameters()) if x.requires_grad]
    return output, weights, torch.autograd.grad(loss, leaves)


def assert_same(got, expected, tolerance: float) -> None:
    """Check that two `results` have equal shapes and dtypes, and small relative differences."""
    for one, other in ((got[:1], expected[:1]), (got[2], expected[2])):
        largest = max(1.0, *(x.abs().max().item() for x in other))
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance * largest)
    assert (got[1] is None) == (expected[1] is None)
    if got[1] is not None:
        torch.testing.assert_close(got[1], expected[1], rtol=0, atol=tolerance)


def encoder_layers(clamp=None, **options):
    """torch's encoder layer, and one with our attention in place of torch's."""
    torch.manual_seed(0)
    theirs = nn.TransformerEncoderLayer(24, 4, 32, dropout=0.0, batch_first=True, **options)
    ours = copy.deepcopy(theirs)
    ours.self_attn = ClampedMultiheadAttention(24, 4, batch_first=True, clamp=clamp)
    ours.self_attn.load_state_dict(theirs.self_attn.state_dict())
    return theirs, ours
