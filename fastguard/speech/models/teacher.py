"""Teacher: 111 weight layers, 41.8 M parameters, convolutions and self-attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastguard.attention.module import ClampedMultiheadAttention
from fastguard.ops.add_layer_norm import add_layer_norm
from fastguard.ops.glu_depthwise import glu_depthwise
from fastguard.ops.silu import silu

from .ctc import CTCModel
from .layers import MaskedBatchNorm1d, check_kernel_size
from .linear import Linear

FRONT_END_TAPS = 5  # 50 ms at a 10 ms hop; the blocks have the context of phones


@dataclass(frozen=True)
class TeacherConfig:
    """Options of the teacher."""

    vocab_size: int = 29
    """Symbols that the head scores, CTC's blank included."""
    n_mels: int = 80
    """Width of a feature frame."""
    d_model: int = 384
    """Width of the residual stream; a multiple of num_heads."""
    num_heads: int = 6
    """Attention heads, 64 channels each."""
    num_blocks: int = 12
    """Conformer blocks, nine weight layers each."""
    kernel_size: int = 9
    """Taps of the depthwise convolutions, odd; 0.4 s at a 10 ms hop, all blocks 3.9 s."""
    dropout: float = 0.1
    """Probability of dropping a channel of a residual branch."""
    attention_clamp: float | None = 10.0
    """Bound on the attention output before its projection; None for no bound."""
    attention_dropout: float = 0.0
    """Probability of dropping an attention weight."""

    def __post_init__(self):
        check_kernel_size(self.kernel_size)


class Teacher(CTCModel):
    """Two strided convolutions and 12 conformer blocks (Gulati et al. 2020, arXiv 2005.08100).

    There are no positional encodings: the depthwise convolutions encode the order of frames.
    """

    def __init__(self, config: TeacherConfig):
        super().__init__(config.n_mels, config.d_model, FRONT_END_TAPS, config.vocab_size)
        if config.num_heads < 1 or config.d_model % config.num_heads:
            raise ValueError(
                f"num_heads must divide d_model, got d_model={config.d_model}, "
                f"num_heads={config.num_heads}: change one of the two"
            )
        self.config = config
        self.blocks = nn.ModuleList(ConformerBlock(config) for _ in range(config.num_blocks))

    def encode(self, x: Tensor, padding_mask: Tensor) -> Tensor:
        """(B, T', C), (B, T') -> (B, T', C)."""
        for block in self.blocks:
            x = block(x, padding_mask)
        return x


class ConformerBlock(nn.Module):
    """Half-step feed-forward, self-attention, convolution, half-step feed-forward, LayerNorm.

    A branch starts with a LayerNorm, and the next one's follows the addition of this one: one
    operator does both. Dropout drops whole channels of a branch, for the reasons given in
    baseline.py.
    """

    def __init__(self, config: TeacherConfig):
        super().__init__()
        d_model = config.d_model
        self.feed_forward1 = FeedForward(d_model)
        self.attention_norm = AddLayerNorm(d_model)
        self.attention = ClampedMultiheadAttention(
            d_model,
            config.num_heads,
            dropout=config.attention_dropout,
            batch_first=True,
            clamp=config.attention_clamp,
        )
        self.convolution = ConvolutionModule(d_model, config.kernel_size)
        self.feed_forward2 = FeedForward(d_model)
        self.norm = AddLayerNorm(d_model)
        self.dropout = ChannelDropout(config.dropout)

    def forward(self, x: Tensor, padding_mask: Tensor) -> Tensor:
        """(B, T, C), (B, T) -> (B, T, C)."""
        _, y = self.feed_forward1.norm(x)
        y = self.feed_forward1(y)
        x, y = self.attention_norm(x, y, self.dropout(y), alpha=0.5)
        y, _ = self.attention(y, y, y, key_padding_mask=padding_mask, need_weights=False)
        x, y = self.convolution.layer_norm(x, y, self.dropout(y))
        y = self.convolution(y, padding_mask)
        x, y = self.feed_forward2.norm(x, y, self.dropout(y))
        y = self.feed_forward2(y)
        _, y = self.norm(x, y, self.dropout(y), alpha=0.5)
        return y


class ChannelDropout(nn.Dropout1d):
    """`nn.Dropout1d` of frames, as factors: what it draws, and not what it makes of them."""

    def forward(self, x: Tensor) -> Tensor | None:
        """(B, T, C) -> (B, C), 0 or 1 / (1 - p); None where nothing is dropped."""
        if not self.training or self.p == 0.0:
            return None
        kept = torch.empty(x.size(0), x.size(2), device=x.device).bernoulli_(1.0 - self.p)
        return kept.div_(1.0 - self.p) if self.p < 1.0 else kept


class AddLayerNorm(nn.LayerNorm):
    """The layer normalisation of a residual connection's sum."""

    def forward(
        self,
        x: Tensor,
        branch: Tensor | None = None,
        scale: Tensor | None = None,
        alpha: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """Normalise ``x + alpha * scale * branch``, or `x`.

        Args:
            x, branch: (B, T, C).
            scale: (B, C), or None for ones.

        Returns:
            The sum, and its normalisation.
        """
        return add_layer_norm(x, branch, scale, self.weight, self.bias, alpha, self.eps)


class FeedForward(nn.Module):
    """C -> 4 C, SiLU, 4 C -> C; `norm` is the LayerNorm in front, which the block calls."""

    def __init__(self, d_model: int):
        super().__init__()
        self.norm = AddLayerNorm(d_model)
        self.up = Linear(d_model, 4 * d_model)
        self.down = Linear(4 * d_model, d_model)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        return self.down(silu(self.up(x)))


class ConvolutionModule(nn.Module):
    """Pointwise C -> 2 C, GLU, depthwise, BatchNorm, SiLU, pointwise C -> C.

    `layer_norm` is the LayerNorm in front, which the block calls. The pointwise convolutions are
    `Linear`: the same GEMM without a transpose.
    """

    def __init__(self, d_model: int, kernel_size: int):
        super().__init__()
        self.layer_norm = AddLayerNorm(d_model)
        self.pointwise_in = Linear(d_model, 2 * d_model)
        self.depthwise = GatedDepthwiseConv1d(d_model, kernel_size)
        self.batch_norm = MaskedBatchNorm1d(d_model)
        self.pointwise_out = Linear(d_model, d_model)

    def forward(self, x: Tensor, padding_mask: Tensor) -> Tensor:
        """(B, T, C), (B, T) -> (B, T, C)."""
        x = self.depthwise(self.pointwise_in(x), padding_mask)
        x = self.batch_norm(x.transpose(1, 2), padding_mask, silu=True).transpose(1, 2)
        return self.pointwise_out(x)


class GatedDepthwiseConv1d(nn.Conv1d):
    """GLU and one filter per channel, over (B, T, C) as it lies in memory."""

    def __init__(self, channels: int, kernel_size: int):
        super().__init__(
            channels, channels, kernel_size, padding=kernel_size // 2, groups=channels, bias=False
        )

    def forward(self, x: Tensor, padding_mask: Tensor) -> Tensor:
        """(B, T, 2 C), (B, T) -> (B, T, C); padding counts as zeros."""
        return glu_depthwise(x, padding_mask, self.weight)
