"""The operators of attention as autograd and compilers see them: derivatives and fake kernels."""

import torch
from torch import Tensor

from . import _library
from ._autograd import Differentiable
from ._checks import check_same_device


def _empty_heads(like: Tensor, heads: int, rows: int, columns: int) -> Tensor:
    """(B, H, rows, columns) whose memory is that of (B, rows, H, columns); no view."""
    strides = (rows * heads * columns, columns, heads * columns, 1)
    return like.new_empty_strided((like.size(0), heads, rows, columns), strides)


def _fake_attention(query, key, value, *options):
    check_same_device("attention", (query, key, value, *options[:3]))
    batch, heads, rows, _ = query.shape
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    logsumexp = query.new_empty((batch, heads, rows), dtype=wide)
    return_stats, return_unrounded = options[-2:]
    unrounded = logsumexp.new_empty(0)
    if return_unrounded:
        unrounded = _empty_heads(logsumexp, heads, rows, value.size(3))
    return (
        _empty_heads(query, heads, rows, value.size(3)),
        logsumexp,
        logsumexp.new_empty((2, batch, heads, rows) if return_stats else (0,)),
        unrounded,
    )


def _fake_attention_backward(grad_output, query, key, value, *saved_and_options):
    tensors = (grad_output, query, key, value, *saved_and_options[:5])
    check_same_device("attention_backward", tensors)
    return tuple(_empty_heads(x, *x.shape[1:]) for x in (query, key, value))


def _save_for_backward(ctx, inputs, output):
    query, key, value, key_padding_mask, attn_mask, seed, *rest = inputs
    *options, _, return_unrounded = rest
    attended, logsumexp, _, unrounded = output
    if return_unrounded:
        attended = unrounded
    ctx.save_for_backward(query, key, value, attended, logsumexp, key_padding_mask, attn_mask, seed)
    ctx.options = options


def _backward(ctx, operator, grad_output):
    return operator(grad_output, *ctx.saved_tensors, *ctx.options)


_library.register("attention", _fake_attention)
_library.register("attention_backward", _fake_attention_backward)
differentiable = Differentiable(
    "attention",
    _save_for_backward,
    _backward,
    arguments=3,
    instead=", or torch.nn.functional.scaled_dot_product_attention where second ones are needed",
)
