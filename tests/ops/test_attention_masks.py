"""Masks of attention as the operator reads them: of their own dtype, and where they lie."""

import math
import subprocess
import sys

import pytest
import torch

from fastguard import clamped_attention
from tests.native import needs_kernel
from tests.ops.attention_cases import DTYPES, OPS, SEED

NARROW = [torch.bfloat16, torch.float16]


def drawn(dtype, queries=37, keys=131):
    """query, key, value and the gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    lengths = (queries, keys, keys, queries)
    return [torch.randn(2, 3, n, 16, generator=generator).to(dtype) for n in lengths]


def attend(tensors, mask, padding=None, is_causal=False):
    """The operator's results and gradients."""
    *inputs, grad = tensors
    options = (padding, mask, SEED, is_causal, 0.0, 0.25, 0.0, math.inf)
    output, logsumexp, *_ = OPS.attention(*inputs, *options, False, False)
    return output, logsumexp, *OPS.attention_backward(grad, *inputs, output, logsumexp, *options)


def gapped(mask):
    return torch.stack([torch.full_like(mask, math.nan), mask], -1)[..., 1]


def odd_rows(mask):
    """Rows that begin at odd places."""
    wide = torch.nn.functional.pad(mask, (1, 2), value=math.nan)
    return wide[..., 1:-2]


LAYOUTS = {
    "plain": lambda mask: mask,
    "columns apart": gapped,
    "rows at odd places": odd_rows,
    "columns first": lambda mask: mask.mT.contiguous().mT,
    "one row for all": lambda mask: mask[:, :, :1].expand(mask.shape),
    "one column for all": lambda mask: mask[..., :1].expand(mask.shape),
    "one for all heads": lambda mask: mask[:1, :1].expand(mask.shape),
}


@needs_kernel
@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_mask_of_16_bits_is_its_float32(dtype, layout):
    tensors = drawn(dtype)
    generator = torch.Generator().manual_seed(1)
    mask = torch.randn(2, 3, 37, 131, generator=generator) * 3
    mask[torch.rand(mask.shape, generator=generator) < 0.2] = -math.inf
    mask[0, 0, 5] = -math.inf  # a row without a key
    mask = LAYOUTS[layout](mask.to(dtype))
    for a, b in zip(attend(tensors, mask), attend(tensors, mask.float()), strict=True):
        assert torch.equal(a, b)


@needs_kernel
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_nan_in_a_mask_reaches_nothing_where_the_key_is_hidden(dtype):
    tensors = drawn(dtype, queries=131)
    mask = torch.randn(131, 131).to(dtype)
    padding = torch.zeros(2, 131, dtype=torch.bool)
    padding[:, 100:] = True
    poisoned = mask.masked_fill(torch.ones(131, 131).triu(1) > 0, math.nan)
    poisoned[:, 100:] = math.nan
    results = [
        attend(tensors, each.expand(2, 3, 131, 131), padding, True) for each in (mask, poisoned)
    ]
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b) and a.isfinite().all()


@needs_kernel
@pytest.mark.parametrize("layout", ["plain", "columns first", "one column for all"])
def test_a_bool_mask_is_read_at_every_place(layout):
    """One key after another is the only one that is shown, by a byte of any value but 0."""
    keys = 131
    tensors = drawn(torch.float32, queries=keys, keys=keys)
    values = torch.tensor([1, 2, 127, 128, 129, 254, 255], dtype=torch.uint8)
    shown = torch.eye(keys, dtype=torch.uint8) * values.repeat(20)[:keys, None]
    if layout == "one column for all":
        shown = shown.flip(1)
    mask = LAYOUTS[layout](shown.expand(2, 3, keys, keys)).view(torch.bool)
    clean = mask.view(torch.uint8).ne(0).contiguous()
    for a, b in zip(attend(tensors, mask), attend(tensors, clean), strict=True):
        assert torch.equal(a, b)
    if layout != "one column for all":
        assert torch.equal(attend(tensors, mask)[0], tensors[2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("of_mask", DTYPES, ids=str)
def test_a_mask_of_any_dtype_is_added(dtype, of_mask):
    query, key, value, _ = drawn(dtype)
    mask = torch.randn(37, 131).to(of_mask)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    found = clamped_attention(query, key, value, attn_mask=mask)
    assert torch.equal(found, clamped_attention(query, key, value, attn_mask=mask.to(wide)))


@needs_kernel
@pytest.mark.parametrize(
    ("dtype", "of_mask"),
    [
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float16),
        (torch.bfloat16, torch.float64),
        (torch.float64, torch.float32),
    ],
)
def test_the_operator_refuses_masks_of_other_dtypes(dtype, of_mask):
    tensors = drawn(dtype)
    with pytest.raises(RuntimeError, match="attn_mask must be bool or of dtype number"):
        attend(tensors, torch.zeros(2, 3, 37, 131, dtype=of_mask))


_PEAK = """
import sys, torch
from fastguard import clamped_attention

def peak():
    status = open("/proc/self/status").read()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024

dtype = getattr(torch, sys.argv[1])
mask = torch.zeros(2048, 8192, dtype=dtype)

def step(*lengths):
    query, key = (torch.ones(1, 1, n, 8, dtype=dtype, requires_grad=True) for n in lengths)
    shown = mask[:lengths[0], :lengths[1]]
    clamped_attention(query, key, key, attn_mask=shown).sum().backward()

step(64, 64)
before = peak()
step(*mask.shape)
print(peak() - before)
"""


@needs_kernel
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_no_copy_of_a_16_bit_mask_is_made(dtype):
    run = subprocess.run(
        [sys.executable, "-c", _PEAK, dtype], capture_output=True, text=True, check=True
    )
    print(f"peak {int(run.stdout) / 2**20:.0f} MB; a copy in float32 takes 64 MB")
    assert 2**20 < int(run.stdout) < 24 * 2**20
