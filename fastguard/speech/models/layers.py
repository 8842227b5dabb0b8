"""Layers of both models. Each takes `padding_mask` (B, T), bool, True = padding."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MaskedBatchNorm1d(nn.BatchNorm1d):
    """Batch normalisation over the valid frames only.

    Ioffe and Szegedy 2015 (arXiv 1502.03167). The state dict is that of `nn.BatchNorm1d`, and so
    is the result without padding. With padding, `nn.BatchNorm1d` would count zeros, which reduce
    mean and variance.

    - Two passes: E[x^2] - E[x]^2 cancels if the mean is large compared with the deviation.
    - Statistics have the dtype of the parameters, which is float32 under autocast too.
    - Fewer than two valid frames have no variance, and `nn.BatchNorm1d` raises. Here they are
      normalised by the running statistics, as in evaluation, and do not change them.
    - There is no host-device sync: no boolean indexing, no `item()`.
    """

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float = 0.1):
        super().__init__(num_features, eps, momentum)

    def forward(self, x: Tensor, padding_mask: Tensor) -> Tensor:
        """(B, C, T) in any memory layout, (B, T) -> (B, C, T), dtype of x; padding gets `bias`."""
        padding_mask = padding_mask[:, None, :]  # (B, 1, T)
        # Filled, not multiplied: 0 * NaN is NaN.
        frames = x.to(self.weight.dtype).masked_fill(padding_mask, 0.0)
        mean, var = self.running_mean[:, None], self.running_var[:, None]  # (C, 1)
        if self.training:
            count = (~padding_mask).sum().to(frames.dtype)
            enough = count >= 2
            mean = torch.where(enough, frames.sum((0, 2))[:, None] / count, mean)
            centred = (frames - mean).masked_fill(padding_mask, 0.0)
            var = torch.where(enough, centred.square().sum((0, 2))[:, None] / count, var)
            self._update_running_statistics(mean, var, count, enough)
        else:
            centred = (frames - mean).masked_fill(padding_mask, 0.0)
        scale = self.weight[:, None] * torch.rsqrt(var + self.eps)
        return torch.addcmul(self.bias[:, None], centred, scale).to(x.dtype)

    @torch.no_grad()
    def _update_running_statistics(
        self, mean: Tensor, var: Tensor, count: Tensor, enough: Tensor
    ) -> None:
        """Move them by `momentum` towards the mean and the unbiased variance, as torch does."""
        momentum = self.momentum * enough.to(mean.dtype)
        unbiased = count / (count - 1).clamp(min=1)
        self.running_mean.lerp_(mean[:, 0], momentum)
        self.running_var.lerp_(var[:, 0] * unbiased, momentum)
        self.num_batches_tracked.add_(enough)


class Subsampling(nn.Module):
    """Two stride-2 convolutions, each with batch normalisation and SiLU: 1 frame out of FACTOR."""

    FACTOR = 4

    def __init__(self, n_mels: int, channels: int, kernel_size: int):
        super().__init__()
        self.conv1 = strided_convolution(n_mels, channels, kernel_size)
        self.norm1 = MaskedBatchNorm1d(channels)
        self.conv2 = strided_convolution(channels, channels, kernel_size)
        self.norm2 = MaskedBatchNorm1d(channels)

    def forward(self, features: Tensor, padding_mask: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, n_mels), (B, T) -> frames (B, C, T') and padding_mask (B, T')."""
        x = features.transpose(1, 2)  # (B, n_mels, T)
        for conv, norm in ((self.conv1, self.norm1), (self.conv2, self.norm2)):
            x = conv(x.masked_fill(padding_mask[:, None, :], 0.0))  # (B, C, ceil(T / 2))
            padding_mask = padding_mask[:, ::2]  # frame t is centred on frame 2 t before
            x = F.silu(norm(x, padding_mask))
        return x, padding_mask


def subsampled(length: Tensor | int) -> Tensor | int:
    """ceil(ceil(T / 2) / 2) = ceil(T / 4), the frames that `Subsampling` makes of T."""
    return (length + Subsampling.FACTOR - 1) // Subsampling.FACTOR


def strided_convolution(in_channels: int, out_channels: int, kernel_size: int) -> nn.Conv1d:
    """A convolution of stride 2 without bias, T -> ceil(T / 2)."""
    return nn.Conv1d(
        in_channels, out_channels, kernel_size, stride=2, padding=kernel_size // 2, bias=False
    )


def check_kernel_size(kernel_size: int) -> None:
    """Raise ValueError unless the size is odd and positive."""
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(
            f"kernel_size must be odd and positive, got {kernel_size}: "
            f"with {abs(kernel_size) + 1} a convolution keeps the number of frames"
        )
