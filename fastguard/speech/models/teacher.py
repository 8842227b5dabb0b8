"""Teacher: 111 weight layers, 41.8 M parameters, convolutions and self-attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastguard.attention.module import ClampedMultiheadAttention

from .ctc import CTCModel
from .layers import MaskedBatchNorm1d, check_kernel_size

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
        """(B, C, T'), (B, T') -> (B, T', C)."""
        x = x.transpose(1, 2).contiguous()  # (B, T', C): rows for the GEMMs of all blocks
        for block in self.blocks:
            x = block(x, padding_mask)
        return x


class ConformerBlock(nn.Module):
    """Half-step feed-forward, self-attention, convolution, half-step feed-forward, LayerNorm.

    Dropout drops whole channels of a branch, for the reasons given in baseline.py.
    """

    def __init__(self, config: TeacherConfig):
        super().__init__()
        d_model = config.d_model
        self.feed_forward1 = FeedForward(d_model)
        self.attention_norm = nn.LayerNorm(d_model)
        self.attention = ClampedMultiheadAttention(
            d_model,
            config.num_heads,
            dropout=config.attention_dropout,
            batch_first=True,
            clamp=config.attention_clamp,
        )
        self.convolution = ConvolutionModule(d_model, config.kernel_size)
        self.feed_forward2 = FeedForward(d_model)
        self.norm = nn.LayerNorm(d_model)
        self.dropout = nn.Dropout1d(config.dropout)

    def forward(self, x: Tensor, padding_mask: Tensor) -> Tensor:
        """(B, T, C), (B, T) -> (B, T, C)."""
        x = torch.add(x, self._drop(self.feed_forward1(x)), alpha=0.5)
        y = self.attention_norm(x)
        y, _ = self.attention(y, y, y, key_padding_mask=padding_mask, need_weights=False)
        x = x + self._drop(y)
        x = x + self._drop(self.convolution(x, padding_mask))
        x = torch.add(x, self._drop(self.feed_forward2(x)), alpha=0.5)
        return self.norm(x)

    def _drop(self, branch: Tensor) -> Tensor:
        return self.dropout(branch.transpose(1, 2)).transpose(1, 2)


class FeedForward(nn.Module):
    """LayerNorm, C -> 4 C, SiLU, 4 C -> C."""

    def __init__(self, d_model: int):
        super().__init__()
        self.norm = nn.LayerNorm(d_model)
        self.up = nn.Linear(d_model, 4 * d_model)
        self.down = nn.Linear(4 * d_model, d_model)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        return self.down(F.silu(self.up(self.norm(x))))


class ConvolutionModule(nn.Module):
    """LayerNorm, pointwise C -> 2 C, GLU, depthwise, BatchNorm, SiLU, pointwise C -> C.

    The pointwise convolutions are `nn.Linear`: the same GEMM without a transpose.
    """

    def __init__(self, d_model: int, kernel_size: int):
        super().__init__()
        self.layer_norm = nn.LayerNorm(d_model)
        self.pointwise_in = nn.Linear(d_model, 2 * d_model)
        self.depthwise = DepthwiseConv1d(d_model, kernel_size)
        self.batch_norm = MaskedBatchNorm1d(d_model)
        self.pointwise_out = nn.Linear(d_model, d_model)

    def forward(self, x: Tensor, padding_mask: Tensor) -> Tensor:
        """(B, T, C), (B, T) -> (B, T, C)."""
        x = F.glu(self.pointwise_in(self.layer_norm(x)), dim=-1)
        x = self.depthwise(x.masked_fill(padding_mask[:, :, None], 0.0))
        x = self.batch_norm(x.transpose(1, 2), padding_mask).transpose(1, 2)
        return self.pointwise_out(F.silu(x))


class DepthwiseConv1d(nn.Conv1d):
    """One filter per channel, over (B, T, C) as it lies in memory."""

    def __init__(self, channels: int, kernel_size: int):
        super().__init__(
            channels, channels, kernel_size, padding=kernel_size // 2, groups=channels, bias=False
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        # conv1d would copy to (B, C, T) and back. A channels-last image of width 1 needs no
        # copy: 0.5 against 1.8 ms forward + backward in float32 and 0.6 against
        # 2.3 in bfloat16 (2 x 50 x 384, 31 taps, one core of a Xeon with AMX).
        image = x.transpose(1, 2).unsqueeze(3)  # (B, C, T, 1)
        image = F.conv2d(
            image, self.weight.unsqueeze(3), padding=(*self.padding, 0), groups=self.groups
        )
        return image.squeeze(3).transpose(1, 2)
