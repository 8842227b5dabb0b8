"""`nn.MultiheadAttention`'s masks, as `clamped_attention` takes them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .functional import check_mask


def extended(
    name: str,
    mask: Tensor,
    shapes: dict[str, tuple[int, ...]],
    appended: int,
    error: type[Exception],
) -> Tensor:
    """`mask`, checked, with `appended` keys that it leaves seen; a copy only if there are any."""
    check_mask(name, mask)
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise AssertionError(
            f"{name} must be bool (True: hidden) or floating point (added), got {mask.dtype}"
        )
    if tuple(mask.shape) not in shapes.values():
        wanted = " or ".join(f"{axes} = {shape}" for axes, shape in shapes.items())
        raise error(f"{name} must be of shape {wanted}, got {tuple(mask.shape)}")
    return F.pad(mask, (0, appended)) if appended else mask


def seen(
    key_padding_mask: Tensor | None, attn_mask: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """torch's masks, (N, S) and broadcastable to (N, H, T, S), as `clamped_attention` takes them.

    That is a bool `key_padding_mask`, and an `attn_mask` that is True where a key takes part.
    """
    if key_padding_mask is None or key_padding_mask.dtype == torch.bool:
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = ~attn_mask
        return key_padding_mask, attn_mask
    bias = key_padding_mask[:, None, None, :]
    if attn_mask is None:
        attn_mask = bias
    elif attn_mask.dtype == torch.bool:
        attn_mask = bias.masked_fill(attn_mask, -torch.inf)
    else:
        attn_mask = bias + attn_mask
    # nn.TransformerEncoderLayer turns bool masks into these. What they hide is padding all the
    # same, of which NaN must reach nothing.
    return key_padding_mask == -torch.inf, attn_mask
