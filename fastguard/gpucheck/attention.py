"""Attention, forward and backward, against its reference in float64 on the CPU."""

import functools
import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastguard.ops import DTYPES
from fastguard.ops import attention as attention_ops
from fastguard.ops.attention import dropout_keep_ref

from .cases import Grid
from .checks import Case, Compared, same_bits

#: The allowed error, in the units of `_units`.
ALLOWED = 8.0


class Shape(NamedTuple):
    batch: int
    heads: int
    kv_heads: int
    rows: int
    keys: int
    width: int
    value_width: int


SHAPES = (
    Shape(1, 1, 1, 1, 1, 1, 1),
    Shape(2, 3, 3, 65, 65, 64, 64),
    Shape(2, 4, 2, 127, 130, 40, 72),
    Shape(1, 2, 1, 200, 33, 96, 32),
    Shape(1, 2, 2, 300, 300, 128, 128),
    Shape(1, 1, 1, 70, 90, 256, 250),
    Shape(2, 8, 8, 1500, 1500, 64, 64),
    Shape(1, 2, 1, 4097, 4095, 128, 64),
)


class Options(NamedTuple):
    padded: bool = False
    mask: str = "none"  # or bool, float, same: of the dtype of the operands
    is_causal: bool = False
    dropout_p: float = 0.0
    softcap: float = 0.0
    clamp: float | None = None


OPTIONS = (
    Options(),
    Options(padded=True, dropout_p=0.1, clamp=0.7),
    Options(is_causal=True, softcap=2.0, dropout_p=0.5),
    Options(mask="bool", padded=True, clamp=0.05),
    Options(mask="float", is_causal=True, softcap=30.0),
    Options(mask="same", padded=True),
)


def attention(device: torch.device, grid: Grid) -> Iterator[Case]:
    shapes = SHAPES[:3] if grid.rounds < 2 else SHAPES
    for dtype, shape, options in itertools.product(DTYPES, shapes, OPTIONS):
        name = f"{str(dtype)[6:]} {shape} {options}"
        yield Case(name, functools.partial(_attention, dtype, shape, options, device))


def _attention(dtype, shape, options, device):
    inputs, grad, masks = drawn(dtype, shape, options, device)
    found = results(inputs, grad, masks, options)
    again = results(inputs, grad, masks, options)
    yield from same_bits("a second time", again, found)
    wide = [x.detach().cpu().double().requires_grad_() for x in inputs]
    on_cpu = {name: None if mask is None else mask.cpu() for name, mask in masks.items()}
    # The gradient of the clamp is 0 where the output, in this dtype, is at the bound.
    bound = math.inf if options.clamp is None else options.clamp
    passed = grad.cpu() if options.clamp is None else grad.cpu() * (found[0].cpu().abs() < bound)
    right = list(results(wide, passed.double(), on_cpu, options._replace(clamp=None)))
    rounded = torch.tensor(bound, dtype=dtype).item()
    right[0] = right[0].clamp(-rounded, rounded)
    names = ("output", "gradient of query", "gradient of key", "gradient of value")
    ulps = _units(dtype, inputs, grad, right, options)
    for name, here, there, ulp in zip(names, found, right, ulps, strict=True):
        yield Compared(name, here.double(), there, ALLOWED, ulp)


def drawn(dtype, shape, options, device):
    """query, key and value with NaN in padded places; the gradient of the output; named masks."""
    generator = torch.Generator().manual_seed(sum(shape))

    def tensor(heads, rows, width):
        x = torch.randn(shape.batch, rows, heads, width, generator=generator).transpose(1, 2)
        return x.to(dtype)

    query, grad = (
        tensor(shape.heads, shape.rows, width) for width in (shape.width, shape.value_width)
    )
    key, value = (
        tensor(shape.kv_heads, shape.keys, width) for width in (shape.width, shape.value_width)
    )
    padding = attn_mask = None
    if options.padded:
        lengths = torch.randint(0, shape.keys + 1, (shape.batch, 1), generator=generator)
        padding = torch.arange(shape.keys) >= lengths
        key, value = (x.masked_fill(padding[:, None, :, None], math.nan) for x in (key, value))
    if options.mask != "none":
        attn_mask = torch.rand(shape.rows, shape.keys, generator=generator) < 0.8
        if options.mask != "bool":
            attn_mask = torch.zeros(attn_mask.shape).masked_fill(~attn_mask, -math.inf)
        if options.mask == "same":
            attn_mask = attn_mask.to(dtype)
    inputs = [x.to(device).requires_grad_() for x in (query, key, value)]
    masks = {"key_padding_mask": padding, "attn_mask": attn_mask}
    on_device = {name: None if m is None else m.to(device) for name, m in masks.items()}
    return inputs, grad.to(device), on_device


def results(inputs, grad, masks, options) -> tuple[Tensor, ...]:
    """The output and the gradients of the inputs, with one dropout seed for all devices."""
    query, key, _ = inputs
    shape = (*query.shape[:3], key.size(2))
    padding, attn_mask = masks["key_padding_mask"], masks["attn_mask"]
    if attn_mask is not None:
        if attn_mask.is_floating_point() and query.dtype == torch.float64:
            attn_mask = attn_mask.double()
        attn_mask = attn_mask.expand(shape)
    seed = torch.tensor([1234567890123, 9876543210], device=grad.device)
    clamp = math.inf if options.clamp is None else options.clamp
    rest = (options.is_causal, options.dropout_p, query.size(3) ** -0.5, options.softcap, clamp)
    attended = attention_ops.attention(*inputs, padding, attn_mask, seed, *rest, False)
    return attended.output.detach(), *torch.autograd.grad(attended.output, inputs, grad)


def _units(dtype, inputs, grad, right, options) -> Iterator[Tensor]:
    """One unit of rounding for each result.

    It is one ulp of the result's largest element plus a product of typical elements, because the
    terms of a result may cancel.
    """
    sizes = [x.detach().cpu().double().nan_to_num().square().mean().sqrt() for x in (*inputs, grad)]
    query, key, value, back = sizes
    logits = 4 * query * key  # the largest logit is a few times a typical one
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    eps = torch.finfo(dtype).eps + torch.finfo(wide).eps * logits
    rescale = dropout_keep_ref(torch.zeros(2).long(), (1, 1, 1, 1), options.dropout_p)[1]
    through = rescale * back * value
    terms = (rescale * value, through * key, through * query, rescale * back)
    for result, term in zip(right, terms, strict=True):
        yield eps * (result.abs().max() + term)
