"""Baseline: 20 weight layers, 15.8 M parameters, convolutions only."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from .ctc import CTCModel
from .layers import MaskedBatchNorm1d, check_kernel_size


@dataclass(frozen=True)
class BaselineConfig:
    """Options of the baseline."""

    vocab_size: int = 29
    """Symbols that the head scores, CTC's blank included."""
    n_mels: int = 80
    """Width of a feature frame."""
    channels: int = 416
    """Width of every convolution."""
    kernel_size: int = 5
    """Taps of every convolution, odd; after subsampling, 0.2 s at a 10 ms hop, all layers 2.9 s."""
    num_layers: int = 17
    """Residual convolutions after the two strided ones."""
    dropout: float = 0.1
    """Probability of dropping a channel of a residual branch."""

    def __post_init__(self):
        check_kernel_size(self.kernel_size)


class Baseline(CTCModel):
    """Two strided and 17 residual 1-d convolutions."""

    def __init__(self, config: BaselineConfig):
        super().__init__(config.n_mels, config.channels, config.kernel_size, config.vocab_size)
        self.config = config
        self.layers = nn.ModuleList(ResidualConvolution(config) for _ in range(config.num_layers))
        self.norm = MaskedBatchNorm1d(config.channels)

    def encode(self, x: Tensor, padding_mask: Tensor) -> Tensor:
        """(B, T', C), (B, T') -> (B, T', C)."""
        x = x.transpose(1, 2).contiguous()  # (B, C, T'), as conv1d wants it
        for layer in self.layers:
            x = layer(x, padding_mask)
        return self.norm(x, padding_mask, silu=True).transpose(1, 2)


class ResidualConvolution(nn.Module):
    """x + dropout(conv(silu(norm(x)))), in the order of He et al. 2016 (arXiv 1603.05027).

    No normalisation follows the convolution. It would undo the scale of the initial weights and
    enlarge their gradient by the inverse.

    Whole channels are dropped (Tompson et al. 2015, arXiv 1411.4280): neighbouring frames are so
    similar that dropping single values has little effect. With one draw per utterance and channel,
    a training step does not depend on the amount of padding.
    """

    def __init__(self, config: BaselineConfig):
        super().__init__()
        channels, kernel_size = config.channels, config.kernel_size
        self.norm = MaskedBatchNorm1d(channels)
        self.conv = nn.Conv1d(channels, channels, kernel_size, padding=kernel_size // 2, bias=False)
        self.dropout = nn.Dropout1d(config.dropout)

    def forward(self, x: Tensor, padding_mask: Tensor) -> Tensor:
        """(B, C, T), (B, T) -> (B, C, T)."""
        branch = self.norm(x, padding_mask, silu=True)
        branch = branch.masked_fill(padding_mask[:, None, :], 0.0)
        return x + self.dropout(self.conv(branch))
