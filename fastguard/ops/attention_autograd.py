"""The operators of attention as autograd and compilers see them: derivatives and fake kernels."""

import torch
from torch import Tensor

from . import _library
from ._autograd import without_autograd
from ._checks import check_same_device


def differentiable(*args) -> tuple[Tensor, ...]:
    """The operator. Its registered autograd costs some 20 us a pass more than an autograd.Function,
    a tenth of short attention; compilers and torch.func need the former."""
    transformed = torch._C._functorch.peek_interpreter_stack() is not None
    if torch.compiler.is_compiling() or transformed:
        return torch.ops.fastguard.attention.default(*args)
    return differentiable_at_once(*args[:3], args[3:])


def differentiable_at_once(
    query: Tensor, key: Tensor, value: Tensor, options: tuple
) -> tuple[Tensor, ...]:
    """:func:`differentiable` where no compiler and no transformation runs."""
    if wants_grad(query, key, value):
        output, rest = _Differentiable.apply(query, key, value, options)
        return output, *rest
    return without_autograd(torch.ops.fastguard.attention.default, query, key, value, *options)


def wants_grad(query: Tensor, key: Tensor, value: Tensor) -> bool:
    needed = query.requires_grad or key.requires_grad or value.requires_grad
    return needed and torch.is_grad_enabled()


class _Differentiable(torch.autograd.Function):
    # Autograd takes some 0.5 us for each argument and each result. The options are one tuple, into
    # which it does not look; so are the results that have no gradient.

    @staticmethod
    def forward(ctx, query, key, value, options):
        args = (query, key, value, *options)
        results = without_autograd(torch.ops.fastguard.attention.default, *args)
        _save_for_backward(ctx, args, results)
        ctx.set_materialize_grads(False)
        return results[0], results[1:]

    @staticmethod
    def backward(ctx, grad_output, _):
        return (None,) * 4 if grad_output is None else (*_grads(ctx, grad_output), None)


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


def _backward(ctx, grad_output, *_):
    return (*_grads(ctx, grad_output), *[None] * 10)


def _grads(ctx, grad_output):
    operator = torch.ops.fastguard.attention_backward.default
    args = (grad_output, *ctx.saved_tensors, *ctx.options)
    if torch.is_grad_enabled() or torch.compiler.is_compiling():  # of second derivatives, refused
        return operator(*args)
    return without_autograd(operator, *args)


def _no_second_derivative(ctx, *grads):
    raise NotImplementedError(
        "fastguard's attention has first derivatives only: use create_graph=False, or "
        "torch.nn.functional.scaled_dot_product_attention where second ones are needed"
    )


if _library.cpu_problem is None:
    torch.library.register_fake("fastguard::attention", _fake_attention)
    torch.library.register_fake("fastguard::attention_backward", _fake_attention_backward)
    torch.library.register_autograd(
        "fastguard::attention", _backward, setup_context=_save_for_backward
    )
    torch.library.register_autograd("fastguard::attention_backward", _no_second_derivative)
