"""``decide`` and ``guard_decide_``: apply, clip or skip, without a host-device sync."""

import dataclasses
import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastguard.thresholds import Kind, Options, Threshold

from . import _library
from ._checks import check_same_device, check_tensor, check_writable
from ._statistics import (
    adagc_restarts,
    find_new_level,
    outlier_above,
    quantile,
    remember,
    see_each,
    zclip_moments,
)
from .types import (
    LARGEST_APPLIED,
    Decision,
    GradNorm,
    GuardDecision,
    Record,
    Statistics,
    Verdict,
)


def decide(total_norm: Tensor, max_norm: float, skip_norm: float) -> Decision:
    """Apply, clip or skip, without a host-device sync.

    A non-finite norm is skipped, a norm above ``skip_norm`` is skipped, a norm above ``max_norm``
    is clipped with torch's coefficient ``max_norm / (total_norm + 1e-6)``.

    Args:
        total_norm: float64, shape (), as :func:`grad_norm` returns it.
        max_norm, skip_norm: thresholds; ``inf`` turns one off.

    Raises:
        RuntimeError: ``total_norm`` is not a float64 scalar tensor.
    """
    if _library.has_kernel(total_norm):
        return Decision(*torch.ops.fastguard.decide.default(total_norm, max_norm, skip_norm))
    return decide_ref(total_norm, max_norm, skip_norm)


def decide_ref(total_norm: Tensor, max_norm: float, skip_norm: float) -> Decision:
    """:func:`decide` in plain torch."""
    if total_norm.dtype != torch.float64 or total_norm.dim() != 0:
        raise RuntimeError(
            "decide: total_norm must be a float64 tensor of shape (), as grad_norm returns it; got "
            f"{total_norm.dtype} of shape {tuple(total_norm.shape)}"
        )
    clip_coef = torch.full_like(total_norm, max_norm) / (total_norm + 1e-6)
    verdict = torch.where(clip_coef < 1, int(Verdict.CLIP), int(Verdict.APPLY))
    verdict = torch.where(total_norm > skip_norm, int(Verdict.SKIP_OUTLIER), verdict)
    verdict = torch.where(total_norm.isfinite(), verdict, int(Verdict.SKIP_NONFINITE))
    return Decision(torch.where(verdict == Verdict.CLIP, clip_coef, 1.0), verdict)


def fake_decide(total_norm, max_norm, skip_norm):
    return torch.empty_like(total_norm), total_norm.new_empty((), dtype=torch.int64)


class GuardDecideArguments(NamedTuple):
    """The arguments of the operator ``guard_decide_``, in the order of its schema."""

    total_norm: Tensor
    norms: Tensor
    unscale: Tensor | None
    loss: Tensor | None
    numbers: Tensor
    seen_norms: Tensor
    accepted_norms: Tensor
    per_tensor: Tensor
    step: int
    threshold: int
    max_norm: float
    skip_norm: float
    options: Options

    @property
    def statistics(self) -> Statistics:
        """The four tensors that the operator writes."""
        return Statistics(self.numbers, self.seen_norms, self.accepted_norms, self.per_tensor)


@torch.no_grad()
def guard_decide_(
    measured: GradNorm,
    unscale: Tensor | None,
    loss: Tensor | None,
    statistics: Statistics,
    step: int,
    threshold: Threshold,
    max_norm: float,
    skip_norm: float,
) -> GuardDecision:
    """:func:`decide` with the thresholds of :mod:`fastguard.thresholds`, without a sync.

    A finite norm is an outlier, and its step is skipped, if it is above :func:`outlier_above`.

    Args:
        measured: of N gradients, as :func:`grad_norm` returns it.
        unscale: factor that turns the measured norms and gradients into the true ones, float64,
            shape (); None for 1.
        loss: float64, shape (); a NaN or Inf alone makes the step a skip. None if not known.
        statistics: updated in place. A finite norm whose step is skipped updates only the seen
            norms and the usual ones.
        step: the number of this step, for ``clipped_since`` and ``risen_since``.
        threshold: where clipping begins, one of :mod:`fastguard.thresholds`.
        max_norm, skip_norm: as for :func:`decide`.

    Raises:
        RuntimeError: a tensor has another dtype or shape, or the threshold is AdaGC and
            ``per_tensor`` has no columns.
    """
    args = (measured.total_norm, measured.norms, unscale, loss, *statistics, step)
    args += (int(threshold.kind), max_norm, skip_norm, threshold.options)
    if _library.has_kernel(measured.total_norm):
        found = torch.ops.fastguard.guard_decide_.default(*args)
        _library.count_writes(statistics)
        return GuardDecision(*found)
    return guard_decide_ref_(*args)


def guard_decide_ref_(*arguments) -> GuardDecision:
    """The operator behind :func:`guard_decide_` in plain torch: branches become ``where``.

    Args:
        arguments: those of :class:`GuardDecideArguments`.
    """
    given = _checked(GuardDecideArguments(*arguments))
    known = given.statistics._replace(numbers=given.numbers.clone())
    judged = _judge(given, known)
    if given.threshold == Kind.ADAGC:
        average = _clip_each(given, known, judged)
    _reject_too_large(judged)
    if given.threshold == Kind.ADAGC:
        _learn_each(given, known, judged, average)
    _learn(given, known, judged)
    loss = torch.full_like(judged.norm, math.nan) if given.loss is None else given.loss
    record = Record(
        verdict=judged.verdict.double(),
        clip_coef=judged.coef,
        total_norm=judged.norm,
        limit=judged.limit,
        loss=loss,
        outlier_above=judged.outlier_above,
    )
    grad_coef = torch.where(judged.skips, 1.0, judged.coefs * judged.factor)
    return GuardDecision(grad_coef, judged.verdict, torch.stack(record))


def _checked(given: GuardDecideArguments) -> GuardDecideArguments:
    """``given`` with its options as names; RuntimeError if a tensor or number does not fit."""
    op, known = "guard_decide_", given.statistics
    check_tensor(op, "total_norm", given.total_norm, torch.float64)
    check_tensor(op, "norms", given.norms, torch.float64, None)
    _check_guard_decide(op, given)
    check_same_device(op, (given.total_norm, given.norms, given.unscale, given.loss, *known))
    check_writable(op, known)
    return given._replace(options=Options(*given.options))


def _check_guard_decide(op: str, given: GuardDecideArguments) -> None:
    """Twin: check_guard_decide in csrc/checks.h."""
    known = given.statistics
    for name, scalar in (("unscale", given.unscale), ("loss", given.loss)):
        if scalar is not None:
            check_tensor(op, name, scalar, torch.float64)
    check_tensor(op, "statistics", known.numbers, torch.float64, 4)
    check_tensor(op, "seen_norms", known.seen_norms, torch.float64, None)
    check_tensor(op, "accepted_norms", known.accepted_norms, torch.float64, None)
    check_tensor(op, "per_tensor", known.per_tensor, torch.float64, None, None)
    seen, accepted = len(known.seen_norms), len(known.accepted_norms)
    if not 1 <= seen == accepted:
        raise RuntimeError(
            f"{op}: seen_norms and accepted_norms must have one length, at least 1; got {seen} and "
            f"{accepted}"
        )
    if not 0 <= given.threshold <= max(Kind) or len(given.options) != len(Options._fields):
        raise RuntimeError(
            f"{op}: threshold must be 0 to {int(max(Kind))}, with 3 options; got {given.threshold} "
            f"with {len(given.options)}"
        )
    n = len(given.norms)
    columns = [n] if given.threshold == Kind.ADAGC else [n, 0]
    if len(known.per_tensor) != 4 or known.per_tensor.shape[1] not in columns:
        raise RuntimeError(
            f"{op}: per_tensor must have 4 rows and a column for each of the {n} gradients, or "
            f"none without AdaGC; got shape {tuple(known.per_tensor.shape)}"
        )


@dataclasses.dataclass
class _Judgement:
    """The intermediate values and the result of one decision. Twin: Judgement in csrc/decide.h."""

    factor: Tensor  # divides the measured norms by their scale
    norm: Tensor
    each: Tensor  # the norm of each tensor, (N,)
    warm: Tensor
    adaptive: Tensor
    limit: Tensor
    outlier_above: Tensor
    finite: Tensor  # whether norm and loss are finite
    verdict: Tensor
    coef: Tensor  # the smallest coefficient
    coefs: Tensor  # () or, with AdaGC, (N,)
    applied: Tensor  # the largest norm after clipping

    @property
    def skips(self) -> Tensor:
        return self.verdict >= int(Verdict.SKIP_NONFINITE)


def _judge(given: GuardDecideArguments, known: Statistics) -> _Judgement:
    """Verdict and coefficient by the global norm. This may restart ZClip's moments in ``known``."""
    factor = torch.ones_like(given.total_norm) if given.unscale is None else given.unscale
    norm = given.total_norm * factor
    warm = known.accepted >= given.options.warmup
    adaptive = _adaptive_limit(given, known, norm, warm)
    limit = torch.where(adaptive < given.max_norm, adaptive, given.max_norm)
    if given.threshold == Kind.ADAGC:
        limit = torch.where(warm, math.inf, limit)
    above = outlier_above(known, given.skip_norm)
    coef = limit / (norm + 1e-6)
    verdict = torch.where(coef < 1, int(Verdict.CLIP), int(Verdict.APPLY))
    verdict = torch.where(norm > above, int(Verdict.SKIP_OUTLIER), verdict)
    finite = norm.isfinite() if given.loss is None else norm.isfinite() & given.loss.isfinite()
    verdict = torch.where(finite, verdict, int(Verdict.SKIP_NONFINITE))
    coef = torch.where(verdict == int(Verdict.CLIP), coef, 1.0)
    return _Judgement(
        factor=factor,
        norm=norm,
        each=given.norms * factor,
        warm=warm,
        adaptive=adaptive,
        limit=limit,
        outlier_above=above,
        finite=finite,
        verdict=verdict,
        coef=coef,
        coefs=coef,
        applied=norm * coef,
    )


def _adaptive_limit(
    given: GuardDecideArguments, known: Statistics, norm: Tensor, warm: Tensor
) -> Tensor:
    """The learnt limit, before ``max_norm`` caps it; inf before the warm-up ends."""
    adaptive, a = torch.full_like(norm, math.inf), given.options.a
    if given.threshold == Kind.ZCLIP:
        deviation = find_new_level(known, norm, a, warm)
        above = norm - known.mean
        clipped = known.mean + a * a * known.variance / above
        adaptive = torch.where(above > a * deviation, clipped, adaptive)
    elif given.threshold == Kind.RUNNING_MEDIAN:
        adaptive = a * quantile(given.accepted_norms, known.accepted, 0.5)
    elif given.threshold == Kind.AUTOCLIP:
        # NaN becomes 0 too, because max returns its first argument.
        q = min(max(0.0, a / 100), 1.0)
        adaptive = quantile(given.accepted_norms, known.accepted, q)
    return torch.where(warm & (known.accepted >= 1), adaptive, math.inf)


class _Average(NamedTuple):
    """AdaGC's moving average of each tensor's norm."""

    value: Tensor
    known: Tensor  # whether the average exists
    restarts: Tensor  # whether the average restarts at the usual norm


def _clip_each(given: GuardDecideArguments, known: Statistics, judged: _Judgement) -> _Average:
    """Set AdaGC's coefficient for each tensor; returns the averages before this step."""
    restarts = adagc_restarts(known, given.step)
    average = _Average(
        torch.where(restarts, known.usual_norms, known.ema_norms),
        judged.warm & (known.ema_norms < math.inf),
        restarts,
    )
    each, skips = judged.each, judged.skips
    alone = torch.where(judged.warm, (given.max_norm / (each + 1e-6)).clamp(max=1), judged.coef)
    ratio = given.options.a * average.value / each
    coefs = torch.where(average.known, torch.where(ratio < 1, ratio, 1.0), alone)
    judged.coefs = coefs = torch.where(skips | (each == 0), 1.0, coefs)
    judged.coef, judged.applied = torch.ones_like(judged.coef), torch.zeros_like(judged.applied)
    if len(each):
        judged.coef, judged.applied = coefs.amin(), (coefs * each).amax()
    judged.verdict = torch.where(skips, judged.verdict, (judged.coef < 1).long())
    return average


def _reject_too_large(judged: _Judgement) -> None:
    """Skip a step whose norm after clipping is above LARGEST_APPLIED."""
    too_large = ~judged.skips & (judged.applied > LARGEST_APPLIED)
    judged.verdict = torch.where(too_large, int(Verdict.SKIP_OUTLIER), judged.verdict)
    judged.coef = torch.where(judged.skips, 1.0, judged.coef)


def _learn_each(
    given: GuardDecideArguments, known: Statistics, judged: _Judgement, average: _Average
) -> None:
    """Update AdaGC's averages by the clipped norm of each tensor."""
    beta, each, coefs = given.options.b, judged.each, judged.coefs
    clipped = coefs * each
    smallest = torch.where(clipped < known.ema_norms, clipped, known.ema_norms)
    ema = torch.where(average.known, beta * average.value + (1 - beta) * clipped, smallest)
    goes_on = (known.clipped_since >= 0) & ~average.restarts
    since = torch.where(goes_on, known.clipped_since, float(given.step))
    since = torch.where(coefs < 0.5, since, -1.0)
    learns = ~judged.skips & (each != 0)
    known.ema_norms.copy_(torch.where(learns, ema, known.ema_norms))
    moves = learns & average.known
    known.clipped_since.copy_(torch.where(moves, since, known.clipped_since))


def _learn(given: GuardDecideArguments, known: Statistics, judged: _Judgement) -> None:
    """Update the statistics by the global norm, and the usual norm of each tensor."""
    norm, told = judged.norm, given.statistics
    sees = judged.finite & (norm > 0)
    accepts = sees & ~judged.skips
    if told.per_tensor.numel():
        see_each(known, judged.each, given.step, sees)
    if given.threshold == Kind.ZCLIP:
        updated = zclip_moments(known, norm.minimum(judged.adaptive), norm, given.options)
        told.moments.copy_(torch.where(accepts, updated, told.moments))
    remember(told.seen_norms, known.seen, norm, sees)
    remember(told.accepted_norms, known.accepted, norm, accepts)
    told.counts.add_(torch.stack([sees, accepts]))


def fake_guard_decide_(*arguments):
    given = GuardDecideArguments(*arguments)
    tensors = (given.total_norm, given.norms, given.unscale, given.loss, *given.statistics)
    check_same_device("guard_decide_", tensors)
    return (
        given.total_norm.new_empty(given.norms.shape if given.threshold == Kind.ADAGC else ()),
        given.total_norm.new_empty((), dtype=torch.int64),
        given.total_norm.new_empty(len(Record._fields)),
    )


_library.register("decide", fake_decide)
_library.register("guard_decide_", fake_guard_decide_, writes=True)
