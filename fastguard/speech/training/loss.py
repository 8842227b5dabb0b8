"""The CTC loss of a batch."""

import torch
import torch.nn.functional as F
from torch import Tensor


def ctc_loss(
    log_probs: Tensor, output_lengths: Tensor, targets: Tensor, target_lengths: Tensor
) -> Tensor:
    """Negative log-likelihood per output frame: sum over the batch / sum of its frames.

    torch's ``mean`` divides each utterance by its number of symbols. A one-letter prompt with 50
    frames of silence then weighs as much as a sentence, and gradient norms are 100 or more at
    initialisation. Per frame, every utterance counts by its duration.

    An infeasible target gives an infinite loss on purpose (``zero_infinity`` is off): the guard
    skips the batch and names it. Zeroing would hide it in the mean.

    Args:
        log_probs: (B, T', V) float32.
        output_lengths: (B,) int64, frames of each utterance.
        targets: (sum of target_lengths,) int64; 0 is the blank.
        target_lengths: (B,) int64.

    Returns:
        Scalar float32, in nats per frame (Graves et al. 2006).
    """
    with torch.autocast(log_probs.device.type, enabled=False):
        total = F.ctc_loss(
            log_probs.transpose(0, 1).float(),
            targets,
            output_lengths,
            target_lengths,
            reduction="sum",
        )
    return total / output_lengths.sum()
