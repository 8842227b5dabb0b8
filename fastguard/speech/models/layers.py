"""Layers of both models. Each takes `padding_mask` (B, T), bool, True = padding."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastguard._compiling import is_exporting
from fastguard.ops.masked_batch_norm import masked_batch_norm

from .linear import linear


class MaskedBatchNorm1d(nn.BatchNorm1d):
    """Batch normalisation over the valid frames only.

    Ioffe and Szegedy 2015 (arXiv 1502.03167). The state dict is that of `nn.BatchNorm1d`, and so
    is the result without padding. With padding, `nn.BatchNorm1d` would count zeros, which reduce
    mean and variance.

    - Statistics have the dtype of the parameters, which is float32 under autocast too.
    - Fewer than two valid frames have no variance, and `nn.BatchNorm1d` raises. Here they are
      normalised by the running statistics, as in evaluation, and do not change them.
    - There is no host-device sync: no boolean indexing, no `item()`.
    """

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float = 0.1):
        super().__init__(num_features, eps, momentum)

    def forward(self, x: Tensor, padding_mask: Tensor, silu: bool = False) -> Tensor:
        """(B, C, T) in any memory layout, (B, T) -> (B, C, T), dtype of x; padding gets `bias`.

        With `silu` the SiLU of that, in the same pass over memory.
        """
        output, mean, var = masked_batch_norm(
            x.transpose(1, 2),
            padding_mask,
            self.weight,
            self.bias,
            self.running_mean,
            self.running_var,
            self.eps,
            self.training,
            silu,
        )
        if self.training:
            self.update_running_statistics(mean, var, padding_mask)
        return output.transpose(1, 2)

    @torch.no_grad()
    def update_running_statistics(self, mean: Tensor, var: Tensor, padding_mask: Tensor) -> None:
        """Move them by `momentum` towards the mean and the unbiased variance, as torch does."""
        count = (~padding_mask).sum().to(mean.dtype)
        enough = count >= 2
        momentum = self.momentum * enough.to(mean.dtype)
        unbiased = count / (count - 1).clamp(min=1)
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(var * unbiased, momentum)
        self.num_batches_tracked.add_(enough)


class StridedConv1d(nn.Conv1d):
    """A convolution of stride 2 without bias, over (B, T, C) as it lies in memory."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int):
        super().__init__(
            in_channels, out_channels, kernel_size, stride=2, padding=kernel_size // 2, bias=False
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, ceil(T / 2), C')."""
        if not x.is_cpu or is_exporting() or torch.jit.is_tracing():
            return super().forward(x.transpose(1, 2)).transpose(1, 2)
        # As one GEMM, forward + backward 4.4 against conv1d's 7.5 ms in bfloat16, and 8.4 against
        # 10.3 in float32 (2 x 250 x 384, 5 taps, two cores of an EPYC).
        (reach,), (taps,) = self.padding, self.kernel_size
        windows = F.pad(x, (0, 0, reach, reach)).unfold(1, taps, 2)  # (B, ceil(T / 2), C, K)
        return linear(windows.flatten(2), self.weight.flatten(1))


class Subsampling(nn.Module):
    """Two stride-2 convolutions, each with batch normalisation and SiLU: 1 frame out of FACTOR."""

    FACTOR = 4

    def __init__(self, n_mels: int, channels: int, kernel_size: int):
        super().__init__()
        self.conv1 = StridedConv1d(n_mels, channels, kernel_size)
        self.norm1 = MaskedBatchNorm1d(channels)
        self.conv2 = StridedConv1d(channels, channels, kernel_size)
        self.norm2 = MaskedBatchNorm1d(channels)

    def forward(self, features: Tensor, padding_mask: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, n_mels), (B, T) -> frames (B, T', C) and padding_mask (B, T')."""
        x = features
        for conv, norm in ((self.conv1, self.norm1), (self.conv2, self.norm2)):
            x = conv(x.masked_fill(padding_mask[:, :, None], 0.0))  # (B, ceil(T / 2), C)
            padding_mask = padding_mask[:, ::2]  # frame t is centred on frame 2 t before
            x = norm(x.transpose(1, 2), padding_mask, silu=True).transpose(1, 2)
        return x, padding_mask


def subsampled(length: Tensor | int) -> Tensor | int:
    """ceil(ceil(T / 2) / 2) = ceil(T / 4), the frames that `Subsampling` makes of T."""
    return (length + Subsampling.FACTOR - 1) // Subsampling.FACTOR


def check_kernel_size(kernel_size: int) -> None:
    """Raise ValueError unless the size is odd and positive."""
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(
            f"kernel_size must be odd and positive, got {kernel_size}: "
            f"with {abs(kernel_size) + 1} a convolution keeps the number of frames"
        )
