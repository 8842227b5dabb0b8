"""What `torch.jit.script` compiles for `ClampedMultiheadAttention`, in what its language has."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ScriptedAttention(nn.MultiheadAttention):
    """`ClampedMultiheadAttention` in plain torch, of the same parameters and state dict.

    It makes tensors of T x S, has no statistics, and checks nothing. torch's class lends it what
    the layers of torch.nn ask an attention for.
    """

    def __init__(self, source: nn.MultiheadAttention):
        nn.Module.__init__(self)
        own = {name: copy.copy(value) for name, value in vars(source).items()}
        for name in ("stats", "record_stats", "never_ran", "_forward_pre_hooks"):
            own.pop(name, None)
        vars(self).update(own)
        self.dropout = float(source.dropout)
        self.clamp = float("inf") if source.clamp is None else float(source.clamp)
        self.softcap = 0.0 if source.softcap is None else float(source.softcap)
        # A script has no hooks. This keeps the fast path of nn.TransformerEncoderLayer off.
        self._qkv_same_embed_dim = False

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `ClampedMultiheadAttention.forward`."""
        batched = query.dim() == 3
        if batched and not self.batch_first:
            query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
        if not batched:
            query, key, value = query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)
        batch, rows, keys = query.size(0), query.size(1), key.size(1)
        q, k, v = self._project(query, key, value)
        q, k, v = self._heads(q), self._heads(k), self._heads(v)
        sizes = [batch, self.num_heads, rows, keys]
        hidden, added = self._masks(key_padding_mask, attn_mask, is_causal, sizes, q)
        if key_padding_mask is not None:
            padding = self._padding(key_padding_mask).view(batch, 1, keys, 1)
            k, v = k.masked_fill(padding, 0.0), v.masked_fill(padding, 0.0)
        bias_k, bias_v = self.bias_k, self.bias_v
        if bias_k is not None and bias_v is not None:
            k = torch.cat([k, self._heads(bias_k.expand(batch, -1, -1))], 2)
            v = torch.cat([v, self._heads(bias_v.expand(batch, -1, -1))], 2)
        if self.add_zero_attn:
            zero = k.new_zeros(batch, self.num_heads, 1, k.size(3))
            k, v = torch.cat([k, zero], 2), torch.cat([v, zero], 2)
        appended = k.size(2) - keys
        hidden, added = F.pad(hidden, (0, appended)), F.pad(added, (0, appended))

        logits = torch.matmul(q, k.transpose(2, 3)) * (float(q.size(3)) ** -0.5)
        if self.softcap > 0.0:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        logits = (logits + added).masked_fill(hidden, -float("inf"))
        dead = (logits == -float("inf")).all(-1, keepdim=True)
        weights = torch.softmax(logits.masked_fill(dead, 0.0), -1).masked_fill(hidden | dead, 0.0)
        weights = F.dropout(weights, self.dropout, self.training)
        output = torch.matmul(weights, v).clamp(-self.clamp, self.clamp)
        output = self.out_proj(output.transpose(1, 2).flatten(2))
        if not batched:
            output, weights = output.squeeze(0), weights.squeeze(0)
        elif not self.batch_first:
            output = output.transpose(0, 1)
        if not need_weights:
            return output, None
        return output, weights.mean(-3) if average_attn_weights else weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weight = self.in_proj_weight
        if weight is not None:
            of_query, of_key, of_value = weight.chunk(3)
        else:
            of_query, of_key, of_value = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
        bias = self.in_proj_bias
        biases = [None, None, None] if bias is None else bias.to(of_query.dtype).chunk(3)
        return (
            F.linear(query, of_query, biases[0]),
            F.linear(key, of_key, biases[1]),
            F.linear(value, of_value, biases[2]),
        )

    def _heads(self, x: Tensor) -> Tensor:
        """(N, L, C) -> (N, H, L, D)."""
        return x.view(x.size(0), x.size(1), self.num_heads, -1).transpose(1, 2)

    def _padding(self, mask: Tensor) -> Tensor:
        return mask if mask.dtype == torch.bool else mask == -float("inf")

    def _masks(
        self,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool,
        sizes: list[int],
        like: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Which keys are hidden and what is added to the logits, both (N, H, T, S).

        Args:
            sizes: N, H, T, S.
            like: of the dtype and device of the logits.
        """
        hidden = torch.zeros(sizes, dtype=torch.bool, device=like.device)
        added = torch.zeros(sizes, dtype=like.dtype, device=like.device)
        if is_causal:
            hidden = hidden | torch.ones_like(hidden).triu(1)
        elif attn_mask is not None:
            mask = attn_mask.view(sizes) if attn_mask.dim() == 3 else attn_mask
            if mask.dtype == torch.bool:
                hidden = hidden | mask
            else:
                added = added + mask
        if key_padding_mask is not None:
            mask = key_padding_mask.view(sizes[0], 1, 1, sizes[3])
            hidden = hidden | self._padding(mask)
            if mask.dtype != torch.bool:
                added = added + mask
        return hidden, added
