"""What a decision is made of: the statistics, the loss, and the factor that undoes a scale."""

import math
import statistics

import torch
from torch import Tensor

from fastguard import ops
from fastguard._tensors import is_dtensor

WINDOW = 128  # norms whose median says what is usual; llm.c's and OLMo-core's window


def fresh_statistics(device: torch.device) -> ops.Statistics:
    zeros = lambda n: torch.zeros(n, dtype=torch.float64, device=device)  # noqa: E731
    return ops.Statistics(zeros(4), zeros(WINDOW), zeros(WINDOW), zeros(0).view(4, 0))


def as_plain(known: ops.Statistics) -> dict:
    """The statistics as numbers and lists, for a checkpoint; without the norms of tensors."""
    seen, accepted, mean, variance = known.numbers.tolist()
    return {
        "seen": int(seen),
        "accepted": int(accepted),
        "mean": mean,
        "variance": variance,
        "seen_norms": _in_order(known.seen_norms, int(seen)),
        "accepted_norms": _in_order(known.accepted_norms, int(accepted)),
    }


def from_plain(plain: dict, device: torch.device, new_moments: bool) -> ops.Statistics:
    """The statistics of which :func:`as_plain` made ``plain``.

    Args:
        new_moments: take mean and variance from the accepted norms: another threshold kept none.

    Raises:
        ValueError: a number is negative or not finite, or a list is not as long as it says.
        AttributeError, KeyError, TypeError: it is something else.
    """
    known = fresh_statistics(device)
    counts = [int(plain["seen"]), int(plain["accepted"])]
    moments = [float(plain["mean"]), float(plain["variance"])]
    windows = [[float(norm) for norm in plain[name]] for name in ("seen_norms", "accepted_norms")]
    if not all(0 <= number < math.inf for number in (*counts, *moments, *windows[0], *windows[1])):
        raise ValueError("a number is negative or not finite")
    for count, norms, window in zip(counts, windows, known[1:3], strict=True):
        if len(norms) != min(count, WINDOW):
            raise ValueError(f"of {count} norms the last {len(norms)} are there")
        places = [i % WINDOW for i in range(count - len(norms), count)]
        window[places] = window.new_tensor(norms)
    accepted = windows[1]
    if new_moments and accepted:
        moments = [statistics.fmean(accepted), statistics.pvariance(accepted)]
    known.numbers.copy_(torch.tensor([*counts, *moments], dtype=torch.float64))
    return known


def _in_order(window: Tensor, count: int) -> list[float]:
    """The norms that ``count`` have left, the oldest first."""
    norms = window.tolist()
    return [norms[i % WINDOW] for i in range(max(0, count - WINDOW), count)]


def scalar(loss: Tensor | float | None, device: torch.device) -> Tensor | None:
    if loss is None:
        return None
    if is_dtensor(loss):
        loss = loss.full_tensor()
    if not isinstance(loss, Tensor):
        try:
            return torch.full((), float(loss), dtype=torch.float64, device=device)
        except (TypeError, ValueError) as error:
            raise ValueError(f"loss must be one real number, got {loss!r}") from error
    if loss.numel() != 1 or loss.is_complex():
        raise ValueError(
            f"loss must be one real number, got a {loss.dtype} tensor of shape {tuple(loss.shape)}"
        )
    return loss.detach().reshape(()).to(device, torch.float64, non_blocking=True)


def unscaling(scale: Tensor | None, weight: Tensor | float, device: torch.device) -> Tensor | None:
    """The factor that undoes the GradScaler's scale and makes a sum a mean; None for 1."""
    if scale is None and not isinstance(weight, Tensor):
        if weight == 1.0:
            return None
        return torch.full((), 1 / weight, dtype=torch.float64, device=device)
    return (weight if scale is None else scale * weight).reciprocal()


def discarded(measured, unscale, loss) -> ops.GuardDecision:
    """The decision about a batch that a rollback passes over."""
    one = torch.ones_like(measured.total_norm)
    verdict = torch.full_like(one, int(ops.Verdict.SKIP_ROLLBACK), dtype=torch.int64)
    norm = measured.total_norm if unscale is None else measured.total_norm * unscale
    inf, loss = one * math.inf, one * math.nan if loss is None else loss
    record = [verdict.double(), one, norm, inf, loss, inf]
    return ops.GuardDecision(one, verdict, torch.stack(record))
