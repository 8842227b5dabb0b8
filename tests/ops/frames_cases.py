"""Drawn arguments of the operators on frames, and comparisons with their references."""

import math
from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from fastguard.ops._autograd import computed_dtype
from tests.drawn import DTYPES

#: Around the widths of vectors and of a task's channels.
CHANNELS = (1, 3, 8, 16, 31, 32, 33, 70)


class Frames(NamedTuple):
    x: Tensor  # (B, T, C)
    padding_mask: Tensor  # (B, T)
    generator: torch.Generator

    def like(self, *shape, dtype=None):
        """Normal numbers; of a channel's or a frame's dtype."""
        dtype = self.x.dtype if dtype is None else dtype
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(dtype)

    def of_channel(self, *shape):
        return self.like(*shape, dtype=computed_dtype(self.x))


@st.composite
def frames(draw, factor=1, most_frames=70):
    """Frames of `factor` times a drawn number of channels; what is padding may be NaN or Inf."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from(DTYPES))
    batch, length = draw(st.integers(0, 3)), draw(st.integers(0, most_frames))
    channels = factor * draw(st.sampled_from(CHANNELS))
    x = torch.randn(batch, length, channels, generator=generator, dtype=torch.float64).to(dtype)
    lengths = [draw(st.integers(0, length)) for _ in range(batch)]
    mask = torch.arange(length) >= torch.tensor(lengths).view(batch, 1)
    x = x.masked_fill(mask[:, :, None], draw(st.sampled_from([0.0, math.nan, math.inf])))
    return Frames(x, mask, generator)


def assert_near(found, expected, ulps=8, of_largest=True):
    """Check that two tensors are equal but for rounding.

    That is one rounding to the dtype of `found`, and `ulps` units in the last place of what the
    operator computes in: of each number, or of the largest, whose errors a sum has.
    """
    assert found.shape == expected.shape
    expected = expected.detach().to(found.dtype)
    finite = expected[expected.isfinite()].abs().double()
    largest = finite.max().item() if of_largest and finite.numel() else 0.0
    tolerance = ulps * torch.finfo(computed_dtype(found)).eps + torch.finfo(found.dtype).eps
    torch.testing.assert_close(
        found.detach(), expected, rtol=tolerance, atol=tolerance * max(1.0, largest), equal_nan=True
    )


def with_gradients(function, leaves, upstream):
    """The results of ``function(*leaves)``, and the gradients of all leaves."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    results = function(*leaves)
    grads = [g.to(r.dtype) for g, r in zip(upstream, results, strict=True)]
    return [*results, *torch.autograd.grad(results, leaves, grads)]


def check_against_reference(operator, reference, leaves, upstream, ulps=8):
    """Check results and gradients against the reference's in float64."""
    found = with_gradients(operator, leaves, upstream)
    expected = with_gradients(reference, [leaf.double() for leaf in leaves], upstream)
    for a, b in zip(found, expected, strict=True):
        assert_near(a, b, ulps)


def same_bits_for_any_number_of_threads(function):
    """Whether ``function()``, a list of tensors, gives the same bits with 1, 2, 3 and 7 threads."""
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 2, 3, 7):
            torch.set_num_threads(n)
            results.append(function())
    finally:
        torch.set_num_threads(threads)
    return all(
        torch.equal(a, b) for each in results[1:] for a, b in zip(each, results[0], strict=True)
    )
