"""The operators behind :mod:`fastguard.attention`: which function serves a call, and references.

What :mod:`fastguard.ops` is for the guard. Fake kernels and autograd: :mod:`.attention_autograd`.
"""

import functools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from fastguard._compiling import is_exporting
from fastguard._tensors import from_first_rank, replicated_beside

from . import _library
from ._autograd import PLAIN, are_dtensors, is_transformed, wants_grad
from ._checks import check_same_device, check_tensor
from .attention_autograd import differentiable
from .philox import dropout_keep_ref
from .types import DTYPES

#: The widest head that the operator takes, and the widest that CUDA's kernels do: theirs have the
#: rows of what they make in registers.
MOST_HEAD_DIM = 256
MOST_CUDA_HEAD_DIM = 128

#: T * S from which torch's attention is asked on GPUs of capability 9 and 10. See :func:`route`.
LONG = 1024 * 1024

#: The kernels compute in float32. A softcap outside of this range would be 0 or inf there, a larger
#: scale inf, and the output NaN.
SMALLEST_SOFTCAP, LARGEST_SOFTCAP = 1e-30, 1e30
LARGEST_SCALE = 1e30


class Attention(NamedTuple):
    output: Tensor  #: (B, H, T, Dv), dtype of the query
    logsumexp: Tensor  #: of each row's logits, (B, H, T), float32 or float64; inf without a key
    stats: Tensor  #: (2, B, H, T): largest logit and entropy of each row; (0,) unless asked for
    unrounded: Tensor  #: the output, of logsumexp's dtype, in memory of its own; (0,) likewise


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    seed: Tensor | None,
    is_causal: bool,
    dropout_p: float,
    scale: float,
    softcap: float,
    clamp: float,
    return_stats: bool,
    in_place: bool = False,
) -> Attention:
    """``clamp(dropout(softmax(softcap(scale * q @ k^T) + attn_mask)) @ v)``, differentiable.

    Tiles after Dao 2023 (FlashAttention-2, arXiv 2307.08691): nothing of size T x S is kept.
    `torch.export` and `torch.jit.trace` see the reference instead, so that their programs run
    without fastguard. It serves what has no row or no key, too, and DTensors.

    Args:
        query: (B, H, T, D), float32, float64, bfloat16 or float16.
        key: (B, G, S, D) and value: (B, G, S, Dv), dtype and device of the query; H a multiple of
            G (each key's head serves H / G of the query's).
        key_padding_mask: bool (B, S), True where a key is left out.
        attn_mask: (B, H, T, S), any strides; bool, True where a key takes part, or added to the
            logits: of the query's dtype or float32 (float64 for a float64 query).
        seed: int64 (2,), of the dropout's generator, see :func:`dropout_keep_ref`.
        is_causal: row i sees keys 0 to i only.
        softcap: c > 0 replaces the logits by ``c * tanh(logits / c)``; 0 does not.
        clamp: bound on the output; inf for none. Gradients pass where ``abs(output) < clamp``.
        in_place: whether the caller may change the output in place. Where a gradient is wanted,
            the backward pass then has a copy of its own.

    Raises:
        RuntimeError: anything else.
    """
    args = (query, key, value, key_padding_mask, attn_mask, seed, is_causal, dropout_p)
    args += (scale, softcap, clamp, return_stats)
    # The kernels give no gradient to a mask, and know backward derivatives only.
    learnt = attn_mask is not None and attn_mask.requires_grad
    recorded = is_exporting() or torch.jit.is_tracing()
    plain = (
        recorded or not _library.has_kernel(query) or learnt or 0 in (query.size(2), key.size(2))
    )
    if plain or is_transformed(query, key, value) or are_dtensors(query, key, value):
        return attention_ref(*args)
    if max(query.size(3), value.size(3)) > MOST_HEAD_DIM:
        serve = beyond_kernels(*args)
    elif query.device.type == "cpu":
        serve = differentiable
    else:
        serve = route(_capability(query.device), *args)
    saves = wants_grad(query, key, value)
    # With dropout a row may see so few keys that the softmax's gradient is a difference of nearly
    # equal numbers, one of which is computed from the output: rounding that makes noise.
    narrow = dropout_p > 0 and query.dtype.itemsize == 2
    return Attention(*serve(*args, saves and (in_place or narrow)))


def attention_at_once(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    clamp: float,
    return_stats: bool,
    in_place: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """:func:`attention` without attn_mask, dropout and softcap, where the CPU's operator serves it.

    The checks of Python take as long as the attention of some ten rows. They change nothing for
    plain tensors that autocast, a compiler or a transformation does not see. The operator makes
    checks of its own. Python's have the better words, and some inputs have no kernel.

    Args:
        scale: None means 1 / sqrt(D).

    Returns:
        What :class:`Attention` holds, or None where the call must go through those checks.
    """
    if (
        type(query) not in PLAIN
        or type(key) not in PLAIN
        or type(value) not in PLAIN
        or not (key_padding_mask is None or type(key_padding_mask) is Tensor)
        or not query.is_cpu
        or _library.cpu_problem is not None
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch.is_autocast_enabled("cpu")
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
    ):
        return None
    needed = query.requires_grad or key.requires_grad or value.requires_grad
    recorded = needed and torch.is_grad_enabled()
    try:
        scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
        options = (None, None, is_causal, 0.0, scale, 0.0, clamp, return_stats)
        options = (key_padding_mask, *options, in_place and recorded)
        return differentiable.at_once((query, key, value), options, recorded)
    except (RuntimeError, IndexError, ZeroDivisionError):
        return None


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    if not torch.cuda.is_available():
        return (0, 0)  # a fake tensor's
    properties = torch.cuda.get_device_properties(device)
    return properties.major, properties.minor


def route(
    capability,
    query,
    key,
    value,
    key_padding_mask,
    attn_mask,
    seed,
    is_causal,
    dropout_p,
    scale,
    softcap,
    clamp,
    return_stats,
):
    """Which function serves :func:`attention` on a GPU of this capability.

    The kernels take float32, bfloat16 and float16 and head dims up to 128. Beyond that, and for
    float64, torch's attention with a clamp serves where it can say the same: no dropout, softcap,
    statistics or masks but ``is_causal``. The reference serves the rest.

    On capability 9 and 10 (H100, B200) torch has kernels for their own matrix instructions, about
    twice as fast as any with the older ones, which ours use; the clamp is another pass over the
    output. So 16-bit requests that torch can serve go to it from ``LONG`` = 1024 * 1024 logits a
    head on. That number is an estimate: no GPU has measured it.
    """
    other = beyond_kernels(
        query, key, value, key_padding_mask, attn_mask, seed, is_causal, dropout_p, scale, softcap,
        clamp, return_stats,
    )  # fmt: skip
    if max(query.size(3), value.size(3)) > MOST_CUDA_HEAD_DIM or query.dtype == torch.float64:
        return other
    long = query.size(2) * key.size(2) >= LONG and query.dtype != torch.float32
    torchs = other is attention_sdpa and long and capability[0] in (9, 10)
    return attention_sdpa if torchs else differentiable


def beyond_kernels(
    query, key, value, key_padding_mask, attn_mask, _seed, _is_causal, dropout_p, _scale, softcap,
    _clamp, return_stats,
):  # fmt: skip
    """Which function serves what no kernel does: torch's attention where it says the same."""
    masked = key_padding_mask is not None or attn_mask is not None
    more = masked or return_stats or dropout_p > 0 or softcap > 0
    return attention_ref if more else attention_sdpa


def attention_sdpa(
    query,
    key,
    value,
    _padding,
    _mask,
    _seed,
    is_causal,
    _dropout_p,
    scale,
    _softcap,
    clamp,
    _stats,
    return_unrounded,
) -> Attention:
    """:func:`attention` by torch's, for what :func:`route` sends here; the output alone.

    `return_unrounded` makes sure that torch did not save that output.
    """
    grouped = query.size(1) != key.size(1)
    output = F.scaled_dot_product_attention(
        query, key, value, is_causal=is_causal, scale=scale, enable_gqa=grouped
    )
    bounded = _bounded(output, clamp)
    if return_unrounded and bounded is output:
        bounded = output.clone()
    return Attention(bounded, *[output.new_empty(0)] * 3)


def _bounded(output: Tensor, clamp: float) -> Tensor:
    if clamp > torch.finfo(output.dtype).max:  # none, or beyond what float16 holds
        return output
    return torch.where(output.abs() < clamp, output, output.detach().clamp(-clamp, clamp))


def attention_ref(*args) -> Attention:
    """The operator in plain torch, with tensors of T x S; its gradients are autograd's."""
    return attention_and_weights_ref(*args)[0]


def attention_and_weights_ref(*args) -> tuple[Attention, Tensor]:
    """:func:`attention_ref`, and the weights that its values were multiplied by.

    Args:
        args: those of :func:`attention`, but for the last the operator's `return_unrounded`.

    Returns:
        :class:`Attention` and (B, H, T, S) in the dtype of the query, after dropout; zero where a
        row does not see a key. Both are differentiable.
    """
    device = args[0].device.type
    # The meta device has no autocast, and raises when it is asked.
    if device == "meta" or not torch.is_autocast_enabled(device):
        return _attention_and_weights(*args)
    # Autocast would narrow what the reference widens.
    with torch.autocast(device, enabled=False):
        return _attention_and_weights(*args)


def _attention_and_weights(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    seed: Tensor | None,
    is_causal: bool,
    dropout_p: float,
    scale: float,
    softcap: float,
    clamp: float,
    return_stats: bool,
    return_unrounded: bool = False,
) -> tuple[Attention, Tensor]:
    _check(query, key, value, key_padding_mask, attn_mask, seed, dropout_p, scale, softcap, clamp)
    dtype = query.dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    query, key, value = (x.to(wide) for x in (query, key, value))
    if key_padding_mask is not None:
        # Masking the logits alone is not enough: 0 * NaN is NaN (pytorch issue 101967).
        key = key.masked_fill(key_padding_mask[:, None, :, None], 0.0)
        value = value.masked_fill(key_padding_mask[:, None, :, None], 0.0)
    group = query.size(1) // key.size(1)
    key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))

    logits = query @ key.transpose(2, 3) * scale
    if softcap > 0:
        logits = softcap * (logits / softcap).tanh()
    hidden = _hidden(logits, key_padding_mask, attn_mask, is_causal)
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        logits = logits + attn_mask
    logits = logits.masked_fill(hidden, -torch.inf)
    largest = logits.detach()
    largest = largest.amax(-1) if key.size(2) else largest.new_full(logits.shape[:3], -torch.inf)
    dead = largest == -torch.inf
    weights = logits.masked_fill(dead.unsqueeze(-1), 0.0).softmax(-1)
    weights = weights.masked_fill(hidden | dead.unsqueeze(-1), 0.0)
    logsumexp = logits.detach().logsumexp(-1).masked_fill(dead, torch.inf)
    stats = logsumexp.new_empty(0)
    if return_stats:
        stats = torch.stack([largest, torch.special.entr(weights.detach()).sum(-1)])

    if dropout_p > 0:
        seed = from_first_rank(seed, weights)
        kept, rescale = dropout_keep_ref(seed, logits.shape, dropout_p)
        weights = torch.where(replicated_beside(kept, weights), weights * rescale, 0.0)
    output = (weights @ value).masked_fill(dead.unsqueeze(-1), 0.0)
    unrounded = logsumexp.new_empty(0)
    if return_unrounded:
        unrounded = _bounded(output.detach().clone(), clamp)
    output = _bounded(output.to(dtype), clamp)
    return Attention(output, logsumexp, stats, unrounded), weights.to(dtype)


def _check(query, key, value, padding, attn_mask, seed, dropout_p, scale, softcap, clamp) -> None:
    """Twin: check_attention in csrc/attention.h, but for the sizes that only kernels limit."""
    if is_exporting():  # comparing its sizes would limit the program
        return
    shapes = [tuple(x.shape) for x in (query, key, value)]
    fits = all(x.dim() == 4 for x in (query, key, value))
    if fits:
        (b, h, t, d), (_, g, s, _), _ = shapes
        fits = shapes[1] == (b, g, s, d) and shapes[2][:3] == (b, g, s) and g > 0 and h % g == 0
    if not fits:
        raise RuntimeError(
            "attention: query must be (B, H, T, D), key (B, G, S, D) and value (B, G, S, Dv), H a "
            f"multiple of G; got {', '.join(map(str, shapes))}"
        )
    if query.dtype not in DTYPES or not query.dtype == key.dtype == value.dtype:
        raise RuntimeError(
            "attention: query, key and value must have one dtype of float32, float64, bfloat16 and "
            f"float16; got {query.dtype}, {key.dtype} and {value.dtype}"
        )
    added = {query.dtype: None, torch.promote_types(query.dtype, torch.float32): None}
    for name, mask, shape, dtypes in (
        ("key_padding_mask", padding, (b, s), (torch.bool,)),
        ("attn_mask", attn_mask, (b, h, t, s), (torch.bool, *added)),
    ):
        if mask is not None and (mask.dtype not in dtypes or mask.shape != shape):
            raise RuntimeError(
                f"attention: {name} must be {' or '.join(map(str, dtypes))} of shape {shape}; got "
                f"{mask.dtype} of shape {tuple(mask.shape)}"
            )
    capped = softcap == 0 or SMALLEST_SOFTCAP <= softcap <= LARGEST_SOFTCAP
    if not (0 <= dropout_p < 1 and capped and clamp > 0):
        raise RuntimeError(
            "attention: dropout_p must be in [0, 1), softcap 0 or in [1e-30, 1e30], clamp above 0; "
            f"got {dropout_p}, {softcap}, {clamp}"
        )
    if not -LARGEST_SCALE <= scale <= LARGEST_SCALE:
        raise RuntimeError(f"attention: scale must be between -1e30 and 1e30; got {scale}")
    if seed is not None:
        check_tensor("attention", "seed", seed, torch.int64, 2)
    elif dropout_p > 0:
        raise RuntimeError("attention: dropout needs a seed of two int64")
    check_same_device("attention", (query, key, value, padding, attn_mask, seed))


def _hidden(logits, key_padding_mask, attn_mask, is_causal):
    """Which keys a row does not see, (B, H, T, S)."""
    hidden = torch.zeros_like(logits, dtype=torch.bool)
    if key_padding_mask is not None:
        hidden = hidden | key_padding_mask[:, None, None, :]
    if is_causal:
        hidden = hidden | torch.ones_like(hidden[0, 0]).triu_(1)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        hidden = hidden | ~attn_mask
    return hidden


def attention_backward_ref(grad_output, query, key, value, _output, _logsumexp, *options):
    """The backward operator's gradients of query, key and value, by autograd of the reference."""
    with torch.enable_grad():
        inputs = [x.detach().requires_grad_() for x in (query, key, value)]
        again = attention_ref(*inputs, *options, False).output
    return torch.autograd.grad(again, inputs, grad_output)
