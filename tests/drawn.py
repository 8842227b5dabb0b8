"""Hypothesis strategies that several tests share."""

import math

import torch
from hypothesis import strategies as st

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

#: Orders of norms, as torch takes them.
NORM_TYPES = [2.0, 1.0, 0.1, 0.5, 3, 3.5, 8, 20.0, 0, -1, -2.5, -9, math.inf, -math.inf, "inf"]


def _layout(draw, tensor):
    """The same values in a memory layout that gradients may have."""
    layout = draw(st.sampled_from(["contiguous", "transposed", "strided", "offset", "expanded"]))
    if layout == "transposed" and tensor.dim() >= 2:
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "strided":
        wide = torch.full((*tensor.shape, 3), math.nan, dtype=tensor.dtype)
        wide[..., 1] = tensor
        return wide[..., 1]
    if layout == "offset":  # aligned only to the size of an element
        return torch.cat([tensor.new_full((1,), math.nan), tensor.flatten()])[1:].view(tensor.shape)
    if layout == "expanded":
        return tensor.unsqueeze(0).expand(2, *tensor.shape)
    return tensor


@st.composite
def gradients(draw, nonfinite=True, magnitudes=True, min_size=1, max_tensors=6):
    """A list of tensors: odd sizes, all dtypes and layouts, both ends of the range, NaN and Inf."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    tensors = []
    for _ in range(draw(st.integers(min_size, max_tensors))):
        dtype = draw(st.sampled_from(DTYPES))
        shape = draw(
            st.one_of(
                st.lists(st.integers(0, 7), max_size=4),
                st.sampled_from([[1], [63], [64], [65], [16384], [16385], [3, 11003], [40000]]),
            )
        )
        tensor = torch.randn(shape, generator=generator, dtype=torch.float64)
        # By contract the squares of float64 values may overflow, so these stay within 1e150.
        largest = min(torch.finfo(dtype).max, 1e150)
        scale = draw(
            st.sampled_from([1.0, 1e-6, largest / 8, torch.finfo(dtype).tiny])
            if magnitudes
            else st.just(1.0)
        )
        tensor = (tensor * scale).clamp(-largest, largest).to(dtype)
        if nonfinite and tensor.numel() and draw(st.booleans()):
            for _ in range(draw(st.integers(1, 3))):
                place = draw(st.integers(0, tensor.numel() - 1))
                tensor.view(-1)[place] = draw(st.sampled_from([math.nan, math.inf, -math.inf]))
        tensors.append(_layout(draw, tensor))
    return tensors
