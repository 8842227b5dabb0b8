"""Attention whose output is clamped to [-clamp, clamp], in one fused operator."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.masked import MaskedTensor
from torch.nn.attention.bias import CausalBias, CausalVariant

from fastguard.ops import DTYPES
from fastguard.ops import attention as attention_ops
from fastguard.ops.attention import LARGEST_SCALE, LARGEST_SOFTCAP, SMALLEST_SOFTCAP


class AttentionStats(NamedTuple):
    """Numbers that show whether a head is about to explode; each has shape (H,)."""

    #: The largest logit of all rows, after `softcap` and `attn_mask`; -inf if no row has a key.
    max_logit: Tensor
    #: Mean over the rows of the entropy of the weights, in nats: 0 where each row looks at one
    #: key only, log S where it looks at all alike. NaN if no row has a key.
    entropy: Tensor
    #: Share of the output's elements that the clamp holds, 0 to 1.
    clamped_share: Tensor


def clamped_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_padding_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    dropout_p: float = 0.0,
    scale: float | None = None,
    softcap: float | None = None,
    clamp: float | None = 10.0,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, AttentionStats]:
    """``clamp(softmax(scale * query @ key^T) @ value, -clamp, clamp)`` in one operator.

    Equivalent to `F.scaled_dot_product_attention` followed by ``clamp``, with these differences.
    Dropout stays in the fused kernel. NaN or Inf in a padded key or value reaches nothing. Keys
    that are padded or above the diagonal are skipped, not computed and masked. Memory is linear in
    T and S. The tiles follow Dao 2023 (FlashAttention-2, arXiv 2307.08691).

    Args:
        query: (B, H, T, D), float32, float64, bfloat16 or float16. Heads wider than 256 channels
            are computed in plain torch, with tensors of T x S.
        key: (B, G, S, D), value: (B, G, S, Dv), dtype and device of `query`. H is a multiple of G:
            with G < H each head of the keys serves H / G of the queries (GQA). Under autocast all
            three are cast to its dtype. B, T and S may be 0.
        key_padding_mask: (B, S) bool, True where the key is padding: `nn.MultiheadAttention`'s
            convention, the opposite of `attn_mask`'s. It alone keeps NaN and Inf in keys and values
            out: what `attn_mask` or `is_causal` hide still meets weights of zero.
        attn_mask: broadcastable to (B, H, T, S); bool, True where the key takes part, or floating
            point, added to the logits (SDPA's convention); or torch's `CausalBias`. It is read as
            it is if it is of the query's dtype or float32, and copied to float32 (for a float64
            query float64) if not. One that requires a gradient takes the slow way, in plain torch,
            with tensors of T x S.
        is_causal: row i sees keys 0 to i; may be combined with the masks.
        dropout_p: probability, in [0, 1), of dropping a weight; rounded to a multiple of 2^-16. The
            same for forward and backward, CPU and CUDA, given the state of torch's generator.
        scale: factor on the logits, between -1e30 and 1e30; None means 1 / sqrt(D).
        softcap: c bounds the logits: ``c * tanh(logits / c)``, before masks (Gemma 2, arXiv
            2408.00118). It must be in [1e-30, 1e30]; None leaves the logits free.
        clamp: bound on the output, > 0; None leaves it free.
        return_stats: also return :class:`AttentionStats`, without gradients.

    Returns:
        (B, H, T, Dv) in the dtype of the query, and with `return_stats` the statistics. A row
        without a key is zero and has zero gradients. NaN in a valid input passes through the clamp,
        so that a guard downstream sees it.

    The gradient passes where ``abs(output) < clamp`` and is zero elsewhere (as torch's from 2.14
    on; earlier releases pass it at exact equality). There are no second derivatives. The output may
    be changed in place: where a gradient is wanted, a copy of it is kept for the backward pass.

    Raises:
        TypeError: a mask is no tensor.
        ValueError: shapes, dtypes, devices or options do not fit; the message names them.
    """
    output, stats = attended(
        query, key, value, key_padding_mask, attn_mask, is_causal, dropout_p, scale, softcap, clamp,
        return_stats, True,
    )  # fmt: skip
    return output if stats is None else (output, stats)


def clamped_attention_and_weights(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_padding_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    dropout_p: float = 0.0,
    scale: float | None = None,
    softcap: float | None = None,
    clamp: float | None = 10.0,
) -> tuple[Tensor, Tensor]:
    """:func:`clamped_attention` and its weights, in plain torch.

    Given the state of torch's generator, the output is that of `clamped_attention`. The weights
    take T x S numbers by definition, and so do a few tensors on the way to them.

    Returns:
        (B, H, T, Dv), and the weights (B, H, T, S), which the values were multiplied by: after
        dropout, zero in a row without a key. Both in the dtype of the query and differentiable.

    Raises:
        TypeError, ValueError: as `clamped_attention`.
    """
    given = operands(
        query, key, value, key_padding_mask, attn_mask, is_causal, dropout_p, scale, softcap, clamp
    )
    found, weights = attention_ops.attention_and_weights_ref(*given, False)
    return found.output, weights


def attended(
    query, key, value, key_padding_mask, attn_mask, is_causal, dropout_p, scale, softcap, clamp,
    return_stats, in_place,
) -> tuple[Tensor, AttentionStats | None]:  # fmt: skip
    """:func:`clamped_attention`, and its statistics if they are wanted.

    Args:
        in_place: whether anybody may change the output in place; see
            :func:`fastguard.ops.attention.attention`.
    """
    bound = math.inf if clamp is None else clamp
    found = None
    if attn_mask is None and softcap is None and dropout_p == 0:
        found = attention_ops.attention_at_once(
            query, key, value, key_padding_mask, is_causal, scale, bound, return_stats, in_place
        )
    if found is None:
        given = operands(
            query, key, value, key_padding_mask, attn_mask, is_causal, dropout_p, scale, softcap,
            clamp,
        )  # fmt: skip
        found = attention_ops.attention(*given, return_stats, in_place)
    output, _, rows, _ = found
    return output, _per_head(output, rows, bound) if return_stats else None


def operands(
    query, key, value, key_padding_mask, attn_mask, is_causal, dropout_p, scale, softcap, clamp
) -> tuple:
    """What the operator takes for these, checked; up to the bound, which is inf for None."""
    query, key, value = _autocast(query, key, value)
    _check_inputs(query, key, value)
    check_options(dropout_p, softcap, clamp)
    if scale is not None and not -LARGEST_SCALE <= scale <= LARGEST_SCALE:
        raise ValueError(f"scale must be between -1e30 and 1e30, got {scale}")
    shape = (*query.shape[:3], key.size(2))
    if key_padding_mask is not None:
        check_mask("key_padding_mask", key_padding_mask)
        check_key_padding_mask(key_padding_mask, shape[0], shape[3])
        _check_device("key_padding_mask", key_padding_mask, query)
    attn_mask, is_causal = plain_mask(attn_mask, is_causal, *shape[2:], query)
    if attn_mask is not None:
        _check_device("attn_mask", attn_mask, query)
        attn_mask = _expanded(attn_mask, shape, query.dtype)
    seed = None
    if dropout_p > 0:
        seed = torch.randint(2**63 - 1, (2,), device=query.device)
    scale = 1 / math.sqrt(query.size(3)) if scale is None else scale
    bound = math.inf if clamp is None else clamp
    masks = (key_padding_mask, attn_mask, seed)
    return query, key, value, *masks, is_causal, dropout_p, scale, softcap or 0.0, bound


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast for autocast, as it casts for torch's own attention."""
    device = tensors[0].device.type
    # The meta device has no autocast, and raises when it is asked.
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)


@torch.no_grad()
def _per_head(output: Tensor, rows: Tensor, bound: float) -> AttentionStats:
    largest, entropy = rows.transpose(1, 2).flatten(2)  # (H, B * T)
    alive = largest != -math.inf
    held = (output.abs() >= bound).transpose(0, 1).flatten(1)
    return AttentionStats(
        F.pad(largest, (0, 1), value=-math.inf).amax(1),  # of an empty batch too
        entropy.where(alive, 0.0).sum(1) / alive.sum(1),
        held.float().mean(1) if bound < math.inf else torch.zeros_like(largest[:, 0]),
    )


def check_options(dropout_p: float, softcap: float | None, clamp: float | None) -> None:
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    if softcap is not None and not SMALLEST_SOFTCAP <= softcap <= LARGEST_SOFTCAP:
        raise ValueError(
            f"softcap must be in [1e-30, 1e30], got {softcap}: pass None for free logits"
        )
    check_clamp(clamp)


def check_clamp(clamp: float | None) -> None:
    if clamp is not None and not clamp > 0:
        raise ValueError(f"clamp must be > 0, got {clamp}: pass None for a free output")


def check_mask(name: str, mask: Tensor) -> None:
    """Raise TypeError or ValueError for what is no dense tensor."""
    if not isinstance(mask, Tensor):
        kind = f"{type(mask).__module__}.{type(mask).__qualname__}"
        cure = "torch.from_numpy makes one" if kind == "numpy.ndarray" else "make one of it"
        raise TypeError(f"{name} must be a torch.Tensor, got {kind}: {cure}")
    masked = isinstance(mask, MaskedTensor)
    if mask.is_nested or mask.layout != torch.strided or masked:
        kind = type(mask).__name__ if masked else "nested" if mask.is_nested else mask.layout
        raise ValueError(f"{name} must be a dense tensor, got {kind}: call its to_dense()")


def plain_mask(
    mask: Tensor | None, is_causal: bool, rows: int, keys: int, like: Tensor
) -> tuple[Tensor | None, bool]:
    """`attn_mask` and `is_causal` for a mask that may be one of torch's attention biases.

    A mask that is made is on the device of `like`, and a DTensor if that is one.

    Raises TypeError or ValueError for what is neither None, a `CausalBias` nor a dense tensor.
    """
    if not isinstance(mask, CausalBias):
        if mask is not None:
            check_mask("attn_mask", mask)
        return mask, is_causal
    # What its elements say is memory that nobody has written.
    if is_causal:
        raise ValueError("attn_mask is a CausalBias, which says it all: leave is_causal out")
    if (mask.seq_len_q, mask.seq_len_kv) != (rows, keys):
        raise ValueError(
            f"attn_mask is a CausalBias of {(mask.seq_len_q, mask.seq_len_kv)}, and (T, S) is "
            f"{(rows, keys)}"
        )
    if mask.variant is CausalVariant.UPPER_LEFT or rows == keys:
        return None, True
    return like.new_ones(rows, keys, dtype=torch.bool).tril(keys - rows), False


def check_key_padding_mask(mask: Tensor, batch: int, keys: int) -> None:
    if mask.dtype != torch.bool or mask.shape != (batch, keys):
        raise ValueError(
            f"key_padding_mask must be bool of shape (B, S) = {(batch, keys)}, got {mask.dtype} "
            f"of shape {tuple(mask.shape)}: pass True where the key is padding"
        )


def _check_inputs(query: Tensor, key: Tensor, value: Tensor) -> None:
    shapes = query.shape, key.shape, value.shape
    if not all(len(shape) == 4 for shape in shapes):
        _refuse("query, key and value must have 4 dimensions (B, H, T, D); ", *shapes)
    (batch, heads, _, width), (batch_k, heads_k, keys, width_k), shape_v = shapes
    if shape_v[:3] != (batch_k, heads_k, keys) or batch != batch_k or width != width_k:
        _refuse(
            "query (B, H, T, D), key (B, G, S, D) and value (B, G, S, Dv) do not fit: ", *shapes
        )
    if 0 in (heads, heads_k, width, shape_v[3]) or heads % heads_k:
        _refuse(
            "H must be a multiple of G, and H, G, D and Dv at least 1 (query (B, H, T, D), key "
            "(B, G, S, D), value (B, G, S, Dv)); ",
            *shapes,
        )
    dtype, device = query.dtype, query.device
    if (
        dtype not in DTYPES
        or not dtype == key.dtype == value.dtype
        or not device == key.device == value.device
    ):
        raise ValueError(
            "query, key and value must be on one device and of one dtype of float32, float64, "
            f"bfloat16, float16; got {[x.dtype for x in (query, key, value)]} on "
            f"{[str(x.device) for x in (query, key, value)]}"
        )


def _refuse(why: str, *shapes: torch.Size) -> None:
    got = "got query {}, key {} and value {}".format(*map(tuple, shapes))
    raise ValueError(f"{why}{got}")


def _check_device(name: str, mask: Tensor, query: Tensor) -> None:
    if mask.device != query.device:
        raise ValueError(f"{name} must be on the query's device {query.device}, got {mask.device}")


def _expanded(mask: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """`attn_mask` as the operator takes it: four dimensions, and a dtype that it adds."""
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(
            f"attn_mask must be bool (True: takes part) or floating point (added), got {mask.dtype}"
        )
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    if mask.dtype not in (torch.bool, dtype, wide):
        mask = mask.to(wide)
    try:
        return mask.expand(shape)
    except RuntimeError:
        raise ValueError(
            f"attn_mask must be broadcastable to (B, H, T, S) = {shape}, got shape "
            f"{tuple(mask.shape)}"
        ) from None
