"""The operators of fastguard.ops.attention, run by the CUDA kernels on the executor.

An :class:`AttentionDevice` does what the launcher in csrc/cuda/attention.cu does.
"""

import functools

import torch

from fastguard.ops.attention import Attention
from tests import simt

NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}


@functools.cache
def kernels():
    return simt.load("attention_kernels", ["tests/simt/kernels/attention_kernels.cpp"])


class AttentionDevice:
    """A GPU whose threads run in an order given by ``options``, those of ``simt.Options``."""

    def __init__(self, **options):
        self.options = simt.Options(**options)
        self.report = None  # of the last call

    def run(self, op, given, tensors, **more):
        run = getattr(kernels(), f"{op}_{NAMES[given[0].dtype]}")
        described = {name: strided(x) for name, x in tensors.items()}
        self.report = run(self.options, described | numbers(*given) | more)

    def attention_backward(self, grad_output, query, key, value, output, logsumexp, *options):
        inputs = dict(query=query, key=key, value=value, grad_output=grad_output)
        inputs = {name: ready(x) for name, x in inputs.items()}
        # As many columns at a time as of the gradient, whatever it was saved as.
        saved = ready(output, 16 // query.element_size())
        rounded = output.dtype == query.dtype
        inputs["output"], inputs["unrounded"] = (saved, None) if rounded else (None, saved)
        batch, heads, queries, _ = query.shape
        terms_rows = -(-queries // 64) * 64
        scratch = {
            "logsumexp": logsumexp,
            "passed": torch.full_like(inputs["grad_output"].contiguous(), torch.nan),
            "terms": torch.full((batch, heads, terms_rows, 2), torch.nan),
        }
        grads = {
            f"grad_{name}": empty_heads(inputs[name], *inputs[name].shape[1:])
            for name in ("query", "key", "value")
        }
        tensors = inputs | scratch | grads | of_masks(*options[:5])
        given = (*(inputs[name] for name in ("query", "key", "value")), *options)
        self.run("attention_backward", given, tensors, terms_rows=terms_rows)
        return tuple(
            grad[..., : x.size(3)]
            for grad, x in zip(grads.values(), (query, key, value), strict=True)
        )

    def attention(self, query, key, value, *options):
        *options, return_stats, return_unrounded = options
        inputs = [ready(x) for x in (query, key, value)]
        batch, heads, queries, _ = query.shape
        output = empty_heads(query, heads, queries, value.size(3))
        logsumexp = torch.full((batch, heads, queries), torch.nan)
        stats = torch.full((2, batch, heads, queries), torch.nan) if return_stats else None
        tensors = dict(zip(("query", "key", "value"), inputs, strict=True), output=output)
        unrounded = None
        if return_unrounded:
            unrounded = torch.full_like(output, torch.nan, dtype=torch.float32)
        results = {"logsumexp": logsumexp, "stats": stats, "unrounded": unrounded}
        self.run("attention", (*inputs, *options), tensors | results | of_masks(*options[:5]))
        output, unrounded = (
            torch.zeros(0) if x is None else x[..., : value.size(3)] for x in (output, unrounded)
        )
        return Attention(output, logsumexp, stats if return_stats else torch.zeros(0), unrounded)


def ready(x, unit=None):
    """The tensor, or a copy, whose rows have a multiple of `unit` columns, by default 16 bytes."""
    unit = unit or 16 // x.element_size()
    steps = [s for s, n in zip(x.stride()[:-1], x.shape, strict=False) if n > 1]
    whole = not any(n % unit for n in (x.size(-1), *steps)) and x.data_ptr() % 16 == 0
    if x.stride(-1) == 1 and whole:
        return x
    wide = x.new_zeros(*x.shape[:-1], -(-x.size(-1) // unit) * unit)
    wide[..., : x.size(-1)] = x
    return wide


def empty_heads(like, heads, rows, columns):
    unit = 16 // like.element_size()
    columns = -(-columns // unit) * unit
    made = torch.full((like.size(0), rows, heads, columns), torch.nan, dtype=like.dtype)
    return made.transpose(1, 2)


def of_masks(padding, mask, seed, is_causal, dropout_p):
    given = {"padding": padding, "shown": None, "added": None, "narrow": None}
    return given | {kind_of(mask): mask, "seed": seed if dropout_p > 0 else None}


def kind_of(mask):
    kinds = {torch.bool: "shown", torch.float32: "added"}
    return "shown" if mask is None else kinds.get(mask.dtype, "narrow")


def strided(x):
    if x is None:
        return None
    storage = x.untyped_storage()
    return x.data_ptr(), storage.data_ptr(), storage.nbytes(), list(x.stride())


def numbers(query, key, value, padding, mask, seed, is_causal, dropout_p, scale, softcap, clamp):
    batch, heads, queries, head_dim = query.shape
    return {
        "batch": batch,
        "heads": heads,
        "kv_heads": key.size(1),
        "queries": queries,
        "keys": key.size(2),
        "head_dim": head_dim,
        "value_dim": value.size(3),
        "rows": batch * heads * queries,
        "scale": scale,
        "softcap": softcap,
        "clamp": clamp,
        "dropout_p": dropout_p,
        "is_causal": is_causal,
        "mask_kind": kind_of(mask),
    }
