"""Problems of attention that the tests of its CUDA kernels share."""

import math

import torch

INF, NAN = math.inf, math.nan

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64

# The allowed errors of forward and backward, relative to the sums of absolute terms. 16-bit weights
# are rounded once, and so are the outputs. Backward also has the rounding of the output and of the
# logits' gradients. In float32, logits up to 20 (sums of 128 products) have errors of about 2e-6.
PRECISION = {BF16: (2 * 2**-8, 4 * 2**-8), F16: (2 * 2**-11, 4 * 2**-11), F32: (8e-6, 16e-6)}

SCHEDULES = ("round_robin", "greedy", "random", "unfair")


def inputs(
    dtype=BF16,
    batch=1,
    heads=1,
    kv_heads=1,
    queries=70,
    keys=100,
    head_dim=64,
    value_dim=64,
    padding=None,
    mask=None,
    is_causal=False,
    dropout_p=0.0,
    softcap=0.0,
    clamp=INF,
    return_stats=True,
    return_unrounded=False,
    layout="heads inside",
    seed=0,
):
    """Arguments of the operator. ``padding`` and ``mask`` name the way to draw them."""
    generator = torch.Generator().manual_seed(seed)

    def normal(heads, rows, columns):
        if layout == "heads outside":
            return torch.randn(batch, heads, rows, columns, generator=generator).to(dtype)
        # The rows of a head lie between those of other heads, as after projections, or unaligned.
        offset = 1 if layout == "misaligned" else 0
        wide = torch.randn(batch, rows, heads, columns + offset, generator=generator).to(dtype)
        return wide[..., offset:].transpose(1, 2)

    def uniform(*shape):
        return torch.rand(*shape, generator=generator)

    tensors = (
        normal(heads, queries, head_dim),
        normal(kv_heads, keys, head_dim),
        normal(kv_heads, keys, value_dim),
    )
    shape = (batch, heads, queries, keys)
    masks = {
        None: None,
        "shown": uniform(*shape) < 0.7,
        "of all heads": (uniform(1, 1, queries, keys) < 0.6).expand(shape),
        "added": uniform(*shape).log() * 3,
        "added, operands' dtype": (uniform(*shape).log() * 3).to(dtype),
        "of keys": (uniform(batch, 1, 1, keys) * 4).expand(shape),
        "of keys, operands' dtype": (uniform(batch, 1, 1, keys) * 4).to(dtype).expand(shape),
        # Some rows see nothing of the first tiles, which other rows see, and some see nothing.
        "from the query on": torch.ones(shape, dtype=torch.bool).triu(),
        "from the query on, added": torch.full(shape, -INF).tril(-1),
    }
    paddings = {
        None: None,
        "some": uniform(batch, keys) < 0.4,
        "all of the first": torch.arange(batch)[:, None].expand(-1, keys) == 0,
        "after a length": torch.arange(keys) >= (uniform(batch, 1) * keys),
        "of the first tiles": (torch.arange(keys) < 64).expand(batch, -1),
    }
    given = (paddings[padding], masks[mask], torch.tensor([7 << 40 | seed, -5]))
    asked = (return_stats, return_unrounded)
    return (*tensors, *given, is_causal, dropout_p, 0.3, softcap, clamp, *asked)


def gradient(arguments, seed=1):
    query, _, value = arguments[:3]
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(*query.shape[:3], value.size(3), generator=generator)
    return drawn.to(query.dtype)


def both(device, arguments):
    """The output and the gradients."""
    found = device.attention(*arguments)
    saved = found.unrounded if arguments[-1] else found.output
    grads = device.attention_backward(
        gradient(arguments), *arguments[:3], saved, found.logsumexp, *arguments[3:-2]
    )
    return found, grads
