"""The decision's statistics in plain torch: windows of norms, medians, moments.

Twins of the functions of the same names in csrc/decide.h.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fastguard.thresholds import Options

from .types import (
    ADAGC_RESTART_AFTER,
    OUTLIER_AFTER,
    OUTLIER_FACTOR,
    RISEN_FACTOR,
    USUAL_BETA,
    Statistics,
)


def outlier_above(statistics: Statistics, skip_norm: float) -> Tensor:
    """The norm above which a finite norm is an outlier, float64, shape ().

    It is the larger of ``skip_norm`` and 4 times a median, and inf while fewer than 16 norms were
    seen. The median is that of the last norms seen and one more norm that is above them all. The
    rule takes the median of the last norms and the norm in question. Both give equal decisions: a
    norm below the larger of the two middle norms is no outlier by either.

    Args:
        statistics: on any device; only read.
        skip_norm: threshold; inf makes the result inf.
    """
    usual = OUTLIER_FACTOR * _median_with_a_larger(statistics.seen_norms, statistics.seen)
    larger = torch.where(usual > skip_norm, usual, skip_norm)
    return torch.where(statistics.seen >= OUTLIER_AFTER, larger, math.inf)


def find_new_level(known: Statistics, norm: Tensor, z: float, warm: Tensor) -> Tensor:
    """Restart ZClip's moments if this norm and the median are both spikes.

    Returns the deviation.
    """
    median = _median_with_a_larger(known.seen_norms, known.seen)
    deviation = known.variance.sqrt()
    spike = known.mean + z * deviation
    found = warm & (known.accepted >= 1) & (known.seen >= OUTLIER_AFTER)
    found = found & (norm > spike) & (median > spike)
    moved = median - known.mean
    moments = torch.stack([median, moved.square()])
    known.moments.copy_(torch.where(found, moments, known.moments))
    return torch.where(found, moved, deviation)


def adagc_restarts(known: Statistics, step: int) -> Tensor:
    """For each tensor whether AdaGC clipped it below half for so long that its average restarts."""
    long = (known.clipped_since >= 0) & (step - known.clipped_since >= ADAGC_RESTART_AFTER)
    return long & (known.usual_norms < math.inf) & (known.usual_norms > known.ema_norms)


def see_each(known: Statistics, norms: Tensor, step: int, sees: Tensor) -> None:
    """Update the usual norm of each tensor by its present norm."""
    usual, most = known.usual_norms, RISEN_FACTOR * known.usual_norms
    since = torch.where(known.risen_since >= 0, known.risen_since, float(step))
    since = torch.where(norms > most, since, -1.0)
    average = USUAL_BETA * usual + (1 - USUAL_BETA) * torch.where(norms < most, norms, most)
    sees = sees & (norms != 0)
    first = ~(usual < math.inf)
    known.risen_since.copy_(torch.where(sees & ~first, since, known.risen_since))
    usual.copy_(torch.where(sees, torch.where(first, norms, average), usual))


def _whole(count: Tensor) -> Tensor:
    """A count of norms as a whole number >= 0, also from an invalid count."""
    return torch.where(count >= 1, count.clamp(max=2.0**53), 0.0).floor()


def remember(norms: Tensor, count: Tensor, norm: Tensor, wanted: Tensor) -> None:
    """Replace the oldest norm of the window by ``norm`` if it is ``wanted``."""
    oldest = torch.arange(len(norms), device=norms.device) == _whole(count) % len(norms)
    norms.copy_(torch.where(wanted & oldest, norm, norms))


def quantile(norms: Tensor, count: Tensor, q: float) -> Tensor:
    """The quantile ``q`` of the norms in the window, as numpy.percentile computes it.

    The result is undefined if the window is empty.

    Args:
        count: the number of norms that were ever put into the window.
    """
    return _at(norms, count, lambda held: q * (held - 1).clamp(min=0))


def _median_with_a_larger(norms: Tensor, count: Tensor) -> Tensor:
    """The median of the norms in the window and of one more norm that is above them all.

    The result is undefined if the window is empty.
    """
    return _at(norms, count, lambda held: 0.5 * held)


def _at(norms: Tensor, count: Tensor, place_among: Callable[[Tensor], Tensor]) -> Tensor:
    """The norm at a fractional index into the sorted window, interpolated linearly.

    Args:
        place_among: gives the index for the number of norms in the window.
    """
    held = torch.arange(len(norms), device=norms.device) < _whole(count)
    ascending = norms.where(held, math.nan).sort()[0]  # sort puts NaNs at the end
    last = (held.sum() - 1).clamp(min=0)
    place = place_among(held.sum().double())
    below = place.long()
    above = torch.minimum(below + 1, last)
    # gather, because the host would read an index of shape ().
    low, high = ascending.gather(0, torch.stack([below, above])).unbind()
    return low + (high - low) * (place - below)


def zclip_moments(known: Statistics, clipped: Tensor, norm: Tensor, options: Options) -> Tensor:
    """ZClip's mean and variance after one more norm, shape (2,)."""
    alpha = options.b
    count, mean, variance = known.accepted + 1, known.mean, known.variance
    delta = norm - mean
    first_mean = mean + delta / count
    first_variance = variance + (delta * (norm - first_mean) - variance) / count
    later_mean = alpha * mean + (1 - alpha) * clipped
    later_variance = alpha * variance + (1 - alpha) * (clipped - later_mean).square()
    first = torch.stack([first_mean, first_variance])
    return torch.where(count <= options.warmup, first, torch.stack([later_mean, later_variance]))
