"""Multi-head attention whose output is clamped to [-clamp, clamp]."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def clamped_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_padding_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    clamp: float | None = 10.0,
) -> Tensor:
    """``clamp(softmax(scale * query @ key^T) @ value, -clamp, clamp)``.

    This is the pure-torch form, `scaled_dot_product_attention` followed by a separate
    clamp: one more pass over the output than a fused kernel would take.

    Args:
        query: (B, H, T, D), floating point.
        key, value: (B, H, S, D), dtype and device of `query`.
        key_padding_mask: (B, S) bool, True where the key is padding
            (`nn.MultiheadAttention`'s convention, the opposite of SDPA's).
        dropout_p: probability of dropping an attention weight; 0 at evaluation.
        scale: factor on the logits; None means 1 / sqrt(D).
        clamp: bound on the output, > 0; None leaves the output free.

    Returns:
        (B, H, T, D) in the dtype of SDPA's output. A row whose keys are all padded is zero
        and has zero gradients. NaN or Inf in a padded key or value reaches nothing; NaN
        in a valid input passes through the clamp, so that a guard downstream sees it.

    The gradient is that of SDPA where ``abs(output) < clamp`` and zero outside (at exact
    equality: zero from torch 2.14 on, as in `F.hardtanh`; earlier releases pass it).

    Raises:
        ValueError: `clamp` is not positive, or the mask is not bool of shape (B, S).
    """
    check_clamp(clamp)
    attn_mask = None
    if key_padding_mask is not None:
        check_key_padding_mask(key_padding_mask, key)
        padded = key_padding_mask[:, None, :, None]  # (B, 1, S, 1)
        # Masking the logits alone is not enough: 0 * NaN is NaN (pytorch issue 101967).
        key = key.masked_fill(padded, 0.0)
        value = value.masked_fill(padded, 0.0)
        attn_mask = ~key_padding_mask[:, None, None, :]  # (B, 1, 1, S)
    output = F.scaled_dot_product_attention(
        query, key, value, attn_mask=attn_mask, dropout_p=dropout_p, scale=scale
    )
    return output if clamp is None else output.clamp(-clamp, clamp)


class ClampedMultiheadAttention(nn.Module):
    """Batch-first multi-head attention with a clamp before the output projection.

    Vaswani et al. 2017 (arXiv 1706.03762), with `clamped_attention` in the middle.
    Parameters, their names and their initialisation are those of `nn.MultiheadAttention`:
    a checkpoint of one loads into the other, and ``clamp=None`` computes the same
    function as ``nn.MultiheadAttention(..., batch_first=True)``.

    Args:
        embed_dim: C, width of query, key, value and output.
        num_heads: H, must divide `embed_dim`.
        dropout: probability of dropping an attention weight in training.
        bias: whether the four projections have a bias.
        clamp: bound on the attention output, > 0; None leaves it free.

    Raises:
        ValueError: `embed_dim` is not a multiple of `num_heads`, or `clamp` <= 0.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        clamp: float | None = 10.0,
    ):
        super().__init__()
        if num_heads < 1 or embed_dim % num_heads:
            raise ValueError(
                f"num_heads must divide embed_dim, got embed_dim={embed_dim}, "
                f"num_heads={num_heads}: change one of the two"
            )
        check_clamp(clamp)
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.dropout = dropout
        self.clamp = clamp
        self.in_proj_weight = nn.Parameter(torch.empty(3 * embed_dim, embed_dim))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * embed_dim)) if bias else None
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.in_proj_weight)
        if self.in_proj_bias is not None:
            nn.init.zeros_(self.in_proj_bias)
            nn.init.zeros_(self.out_proj.bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
    ) -> tuple[Tensor, None]:
        """Attend from `query` (B, T, C) to `key` and `value` (B, S, C).

        Args:
            key_padding_mask: (B, S) bool, True where the key is padding.
            need_weights: must stay False; the argument exists for `nn.MultiheadAttention`'s
                callers, whose default it reverses.

        Returns:
            (output (B, T, C), None).

        Raises:
            NotImplementedError: `need_weights` is True.
            ValueError: see `clamped_attention`.
        """
        if need_weights:
            raise NotImplementedError(
                "need_weights=True: the attention weights are never materialised here; "
                "pass need_weights=False, or load this state dict into "
                "nn.MultiheadAttention(batch_first=True) to look at them"
            )
        query, key, value = (self._split_heads(x) for x in self._project(query, key, value))
        output = clamped_attention(
            query,
            key,
            value,
            key_padding_mask=key_padding_mask,
            dropout_p=self.dropout if self.training else 0.0,
            clamp=self.clamp,
        )  # (B, H, T, D)
        return self.out_proj(output.transpose(1, 2).flatten(2)), None

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        if query is key and key is value:
            # Self-attention: one GEMM of three times the width.
            return F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        weights = self.in_proj_weight.chunk(3)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return tuple(map(F.linear, (query, key, value), weights, biases))

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, H, T, D)

    def extra_repr(self) -> str:
        return (
            f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, "
            f"dropout={self.dropout}, clamp={self.clamp}"
        )


def check_clamp(clamp: float | None) -> None:
    if clamp is not None and not clamp > 0:
        raise ValueError(f"clamp must be > 0, got {clamp}: pass None for a free output")


def check_key_padding_mask(mask: Tensor, key: Tensor) -> None:
    expected = (key.size(0), key.size(2))
    if mask.dtype != torch.bool or mask.shape != expected:
        raise ValueError(
            f"key_padding_mask must be bool of shape (B, S) = {expected}, got {mask.dtype} "
            f"of shape {tuple(mask.shape)}: pass True where the key is padding"
        )
