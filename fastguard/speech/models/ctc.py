"""The base of both models: features in, log-probabilities for the CTC loss out."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastguard._compiling import is_exporting

from .layers import Subsampling, subsampled


class CTCModel(nn.Module):
    """Subsampling by 4, an encoder (`encode`, in the subclasses), and a linear CTC head.

    Connectionist temporal classification: Graves et al. 2006. Every layer gets the lengths, so an
    utterance has the same scores alone and padded in a batch, and padding affects neither the
    batch statistics nor a gradient.
    """

    def __init__(self, n_mels: int, channels: int, kernel_size: int, vocab_size: int):
        super().__init__()
        self.n_mels = n_mels
        self.subsampling = Subsampling(n_mels, channels, kernel_size)
        self.head = nn.Linear(channels, vocab_size)

    def forward(self, features: Tensor, feature_lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the symbols in each output frame.

        Args:
            features: (B, T, n_mels) float32; frames past an utterance's end are ignored.
            feature_lengths: (B,) int64, valid frames, 1 <= length <= T.

        Returns:
            log_probs (B, T', vocab_size) float32, T' = ceil(T / 4), and output_lengths
            (B,) int64. Frames past output_lengths are finite and have no meaning.

        Raises:
            ValueError: a shape is wrong, or a length is outside [1, T]. Lengths on a GPU are not
                checked, because reading them needs a host-device sync. An exported program checks
                no lengths.
        """
        check_batch(features, feature_lengths, self.n_mels)
        frames = torch.arange(features.size(1), device=features.device)
        padding_mask = frames >= feature_lengths.to(features.device)[:, None]  # (B, T)
        x, padding_mask = self.subsampling(features, padding_mask)  # (B, T', C)
        x = self.encode(x, padding_mask)  # (B, T', C)
        # An explicit dtype also applies under autocast. Log-probabilities in half precision caused
        # NaN losses (speechbrain issue 1803).
        log_probs = self.head(x).log_softmax(dim=-1, dtype=torch.float32)
        return log_probs, self.output_lengths(feature_lengths)

    def encode(self, x: Tensor, padding_mask: Tensor) -> Tensor:
        """(B, T', C), (B, T') -> (B, T', C)."""
        raise NotImplementedError

    @staticmethod
    def output_lengths(feature_lengths: Tensor | int) -> Tensor | int:
        """T' = ceil(T / 4) for each T: the output frames for a target."""
        return subsampled(feature_lengths)


def check_batch(features: Tensor, feature_lengths: Tensor, n_mels: int) -> None:
    """Raise ValueError unless the shapes, dtypes and lengths are those of a batch."""
    if features.dim() != 3 or features.size(2) != n_mels:
        raise ValueError(
            f"features must be (B, T, {n_mels}), got {tuple(features.shape)}: "
            "transpose them, or build the model with their n_mels"
        )
    batch, frames, _ = features.shape
    if feature_lengths.shape != (batch,) or feature_lengths.is_floating_point():
        raise ValueError(
            f"feature_lengths must be integers of shape ({batch},), got {feature_lengths.dtype} "
            f"of shape {tuple(feature_lengths.shape)}: pass one count of frames per utterance"
        )
    # While torch.export traces, lengths have no values.
    if feature_lengths.is_cpu and not is_exporting():
        wrong = {i: n for i, n in enumerate(feature_lengths.tolist()) if not 1 <= n <= frames}
        if wrong:
            raise ValueError(
                f"feature_lengths must lie in [1, {frames}], got {{utterance: length}} {wrong}: "
                "drop empty utterances, and count feature frames, not audio samples"
            )
