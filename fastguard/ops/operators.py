"""fastguard's operators: wrappers, fake kernels and pure-torch references.

With :mod:`fastguard.ops.attention` the only file that touches ``torch.ops.fastguard``. Each
operator has a reference with the same signature, ``<name>_ref``: the tests compare against it, and
it serves where no kernel was built for a device.
"""

import enum
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastguard.thresholds import Kind, Threshold

from . import _library

#: No finite norm is an outlier before as many norms were seen: a median of fewer says little.
OUTLIER_AFTER = 16

#: An outlier is above ``skip_norm`` and above this many times the median of the last norms seen.
OUTLIER_FACTOR = 4.0

#: Of the norm of each tensor: the factor of its moving average, and above what multiple of that it
#: has risen.
USUAL_BETA = 0.98
RISEN_FACTOR = 4.0

#: Steps in a row clipped to less than half, after which AdaGC's average of a tensor restarts.
ADAGC_RESTART_AFTER = 128

#: The largest norm that is let through, after clipping: beyond, fp32 second moments overflow.
LARGEST_APPLIED = 1e18

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
COMPLEX_DTYPES = (torch.complex64, torch.complex128, torch.complex32)
#: Those of buffers whose NaNs and Infs are seen.
FLOATING_DTYPES = (*DTYPES, *COMPLEX_DTYPES)


class Verdict(enum.IntEnum):
    """What becomes of a step; the numbers are those of csrc/decide.h."""

    APPLY = 0
    CLIP = 1
    SKIP_NONFINITE = 2
    SKIP_OUTLIER = 3
    #: The batches after a rollback; decided on the host, so csrc/decide.h does not know it.
    SKIP_ROLLBACK = 4

    @property
    def skipped(self) -> bool:
        return self >= Verdict.SKIP_NONFINITE


class GradNorm(NamedTuple):
    """What one read of N gradients says about them."""

    #: L2 norm over all elements, float64, shape (). NaN or Inf where an element is; Inf also where
    #: the sum of squares of finite float64 elements overflows.
    total_norm: Tensor
    #: L2 norm of each tensor, float64, shape (N,).
    norms: Tensor
    #: For each tensor the number of its NaNs, the number of its Infs and the flat row-major index
    #: of the first of either (-1 if there is none), int64, shape (N, 3).
    nonfinite: Tensor


@functools.cache
def _runs_on(device: torch.device) -> bool:
    """Whether the CUDA library holds code for this GPU: cubins of its generation, or PTX."""
    if not torch.cuda.is_available():
        return True  # a fake tensor's
    archs = cuda_info()["archs"].split()
    built = [int(arch) for arch in archs if arch.isdigit()]
    major, minor = torch.cuda.get_device_capability(device)
    here = 10 * major + minor
    as_cubin = any(arch // 10 == major and arch <= here for arch in built)
    return as_cubin or ("PTX" in archs and here >= built[-1])


def _has_kernel(tensor: Tensor) -> bool:
    if tensor.device.type == "cuda":
        return _library.cuda_problem is None and _runs_on(tensor.device)
    return tensor.device.type == "cpu" and _library.cpu_problem is None


def _check_dtypes(op: str, tensors: Sequence[Tensor]) -> None:
    for i, tensor in enumerate(tensors):
        # The dispatcher refuses these two where there is a kernel.
        if tensor.layout != torch.strided or hasattr(tensor, "full_tensor"):
            raise RuntimeError(
                f"{op}: tensor {i} is a {type(tensor).__name__} of layout {tensor.layout}; it must "
                "be a strided tensor, and a DTensor's local one"
            )
        if tensor.dtype not in DTYPES:
            raise RuntimeError(
                f"{op}: tensor {i} has dtype {tensor.dtype}; float32, float64, bfloat16 and "
                "float16 are supported"
            )


def overlaps_itself(tensor: Tensor) -> bool:
    sizes = zip(tensor.stride(), tensor.shape, strict=True)
    return tensor.numel() > 0 and any(stride == 0 and size > 1 for stride, size in sizes)


def _check_no_overlap(op: str, tensors: Sequence[Tensor]) -> None:
    for i, tensor in enumerate(tensors):
        if overlaps_itself(tensor):
            raise RuntimeError(
                f"{op}: tensor {i} is expanded: several of its elements share a single memory "
                "location; clone it"
            )


def check_tensor(op: str, name: str, tensor: Tensor, dtype: torch.dtype, *shape) -> None:
    """Raise unless the tensor has this dtype and shape, where None stands for any size."""
    fits = tensor.dtype == dtype and tensor.dim() == len(shape) and tensor.is_contiguous()
    if not fits or any(n not in (None, m) for n, m in zip(shape, tensor.shape, strict=True)):
        wanted = str(tuple("N" if n is None else n for n in shape)).replace("'", "")
        raise RuntimeError(
            f"{op}: {name} must be a contiguous tensor of {dtype} and shape {wanted}; got "
            f"{tensor.dtype} of shape {tuple(tensor.shape)}"
        )


def check_same_device(op: str, tensors: Iterable[Tensor | None]) -> None:
    """Of fake tensors, too: the dispatcher has a fake kernel serve meta tensors beside others."""
    devices = {tensor.device for tensor in tensors if tensor is not None}
    if len(devices) > 1:
        raise RuntimeError(f"{op}: tensors on several devices, {sorted(map(str, devices))}")


def _check_writable(op: str, tensors: Sequence[Tensor]) -> None:
    """Raise what torch would after some of the tensors are written already."""
    if torch.is_inference_mode_enabled():
        return
    for i, tensor in enumerate(tensors):
        if tensor.is_inference():
            raise RuntimeError(
                f"{op}: tensor {i} was made in inference mode and cannot be written outside it; "
                "clone it"
            )


def count_writes(tensors: Sequence[Tensor]) -> None:
    """Have autograd see that the kernels wrote; the dispatcher does not, for a list."""
    try:
        torch.autograd.graph.increment_version(tensors)
    except RuntimeError:  # written they are; a tensor made in inference mode has no version
        torch.autograd.graph.increment_version([t for t in tensors if not t.is_inference()])


# --- grad_norm ----------------------------------------------------------------------------------


@torch.no_grad()
def grad_norm(grads: Sequence[Tensor]) -> GradNorm:
    """Global norm, norm of each tensor and place of the non-finite elements, from one read.

    Finite float32, bfloat16 and float16 elements can not overflow, however large, nor do small ones
    vanish. The sum is in float64; on CUDA 32 elements at a time are summed in float32 first, which
    may be 1.1e-7 of the norm. The result does not depend on the number of threads or blocks, nor on
    the CPU's instruction set.

    Args:
        grads: N >= 0 dense tensors of one device and any shape, stride and dtype of float32,
            float64, bfloat16, float16; mixed dtypes, empty and 0-d tensors are fine.

    Raises:
        RuntimeError: a tensor of another dtype, or tensors on several devices.
    """
    grads = list(grads)
    if grads and _has_kernel(grads[0]):
        return GradNorm(*torch.ops.fastguard.grad_norm.default(grads))
    return grad_norm_ref(grads)


@torch.no_grad()
def grad_norm_ref(grads: Sequence[Tensor], device: torch.device | None = None) -> GradNorm:
    """:func:`grad_norm` in plain torch: several reads of every tensor, and copies in float64.

    ``device`` is where the results of no tensors are to be.
    """
    _check_dtypes("grad_norm", grads)
    check_same_device("grad_norm", grads)
    device = grads[0].device if grads else device
    norms = torch.zeros(len(grads), dtype=torch.float64, device=device)
    nonfinite = torch.zeros(len(grads), 3, dtype=torch.int64, device=device)
    nonfinite[:, 2] = -1
    for i, grad in enumerate(grads):
        if grad.numel() == 0:
            continue
        norms[i] = grad.to(torch.float64).square().sum().sqrt()
        bad = ~grad.isfinite().flatten()
        first = torch.where(bad.any(), bad.int().argmax(), -1)
        nonfinite[i] = torch.stack([grad.isnan().sum(), grad.isinf().sum(), first])
    return GradNorm(norms.square().sum().sqrt(), norms, nonfinite)


def _fake_grad_norm(grads, like=None):
    n = len(grads)
    like = grads[0] if grads else like
    check_same_device("grad_norm", grads)
    return (
        like.new_empty((), dtype=torch.float64),
        like.new_empty(n, dtype=torch.float64),
        like.new_empty((n, 3), dtype=torch.int64),
    )


# --- decide -------------------------------------------------------------------------------------


class Decision(NamedTuple):
    """What to do with the gradients, on the device of the norm."""

    #: Factor for the gradients, float64, shape (); exactly 1 unless the verdict is CLIP.
    clip_coef: Tensor
    #: A :class:`Verdict`, int64, shape ().
    verdict: Tensor


def decide(total_norm: Tensor, max_norm: float, skip_norm: float) -> Decision:
    """Apply, clip or skip, without a host synchronisation.

    A non-finite norm is skipped, a norm above ``skip_norm`` is skipped, a norm above ``max_norm``
    is clipped with torch's coefficient ``max_norm / (total_norm + 1e-6)``.

    Args:
        total_norm: float64, shape (), as :func:`grad_norm` returns it.
        max_norm, skip_norm: thresholds; ``inf`` turns one off.

    Raises:
        RuntimeError: ``total_norm`` is not a float64 scalar tensor.
    """
    if _has_kernel(total_norm):
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


def _fake_decide(total_norm, max_norm, skip_norm):
    return torch.empty_like(total_norm), total_norm.new_empty((), dtype=torch.int64)


# --- guard_decide_ --------------------------------------------------------------------------------


class Statistics(NamedTuple):
    """What the guard remembers of global norms: no NaN, no Inf, no 0.

    A norm is *seen* when it and its loss are finite, whether its step was skipped or not; it is
    *accepted* when its step was taken.
    """

    #: How many norms were seen, how many accepted, mean and variance of the accepted ones (these
    #: two for ZClip), float64, shape (4,).
    numbers: Tensor
    #: The last W norms seen, the oldest overwritten first, float64, shape (W,). Outliers are judged
    #: by their median.
    seen_norms: Tensor
    #: The last W norms accepted, likewise. RunningMedian and AutoClip learn from them.
    accepted_norms: Tensor
    #: Of each of N gradients the four numbers below, float64, shape (4, N); or (4, 0), where
    #: nothing of that kind is to be remembered.
    per_tensor: Tensor

    @property
    def ema_norms(self) -> Tensor:
        """AdaGC's moving average of each norm, as clipped; inf where there is none yet."""
        return self.per_tensor[0]

    @property
    def clipped_since(self) -> Tensor:
        """The step since which AdaGC has clipped it to less than half; -1 where it has not."""
        return self.per_tensor[1]

    @property
    def usual_norms(self) -> Tensor:
        """A moving average (factor 0.98) of each norm, skipped steps included; inf where unseen.

        At most 4 times the present value gets in, so one spike raises it by 6 %.
        """
        return self.per_tensor[2]

    @property
    def risen_since(self) -> Tensor:
        """The step since which the norm is above 4 times its usual one; -1 where it is not."""
        return self.per_tensor[3]

    @property
    def seen(self) -> Tensor:
        return self.numbers[0]

    @property
    def accepted(self) -> Tensor:
        return self.numbers[1]

    @property
    def mean(self) -> Tensor:
        return self.numbers[2]

    @property
    def variance(self) -> Tensor:
        return self.numbers[3]

    def copy(self) -> "Statistics":
        flat = [*self[:-1], self.per_tensor.view(-1)]
        *copies, per_tensor = torch.cat(flat).split([len(tensor) for tensor in flat])  # one launch
        return Statistics(*copies, per_tensor.view_as(self.per_tensor))


class GuardDecision(NamedTuple):
    """What to do with N gradients, on their device."""

    #: Factor for the gradients, clipping and unscaling in one, float64, shape () or, with AdaGC,
    #: (N,); exactly 1 on a skip.
    grad_coef: Tensor
    #: A :class:`Verdict`, int64, shape ().
    verdict: Tensor
    #: For the host: verdict, clip coefficient (the smallest one), total norm after unscaling, the
    #: clipping threshold in force, loss (NaN if none was given), and the norm above which a finite
    #: norm was an outlier (inf where none could be); float64, shape (6,).
    record: Tensor


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
    """:func:`decide` with the thresholds of :mod:`fastguard.thresholds`; the host does not wait.

    A finite norm is an outlier, and its step is skipped, if it is above :func:`outlier_above`.

    Args:
        measured: of N gradients, as :func:`grad_norm` returns it.
        unscale: factor that turns the measured norms and gradients into the true ones, float64,
            shape (); None for 1.
        loss: float64, shape (); a NaN or Inf is a verdict by itself. None if not known.
        statistics: updated in place; by a finite norm whose step is skipped only the seen norms
            and the usual ones.
        step: the number of this step, for ``clipped_since`` and ``risen_since``.

    Raises:
        RuntimeError: a tensor of another dtype or shape, or an AdaGC with a ``per_tensor`` that has
            no columns.
    """
    args = (measured.total_norm, measured.norms, unscale, loss, *statistics, step)
    args += (int(threshold.kind), max_norm, skip_norm, threshold.options)
    if _has_kernel(measured.total_norm):
        found = torch.ops.fastguard.guard_decide_.default(*args)
        count_writes(statistics)
        return GuardDecision(*found)
    return guard_decide_ref_(*args)


def guard_decide_ref_(
    total_norm: Tensor,
    norms: Tensor,
    unscale: Tensor | None,
    loss: Tensor | None,
    numbers: Tensor,
    seen_norms: Tensor,
    accepted_norms: Tensor,
    per_tensor: Tensor,
    step: int,
    threshold: int,
    max_norm: float,
    skip_norm: float,
    options: Sequence[float],
) -> GuardDecision:
    """The operator behind :func:`guard_decide_` in plain torch: branches become ``where``."""
    op, known = "guard_decide_", Statistics(numbers, seen_norms, accepted_norms, per_tensor)
    check_tensor(op, "total_norm", total_norm, torch.float64)
    check_tensor(op, "norms", norms, torch.float64, None)
    _check_guard_decide(op, len(norms), unscale, loss, known, threshold, options)
    check_same_device(op, (total_norm, norms, unscale, loss, *known))
    _check_writable(op, known)
    kind = Kind(threshold)
    a, b, warmup = options
    known = known._replace(numbers=numbers.clone())
    factor = torch.ones_like(total_norm) if unscale is None else unscale
    norm, each = total_norm * factor, norms * factor
    warm = known.accepted >= warmup
    if kind is Kind.ZCLIP:
        deviation = _find_new_level(known, norm, a, warm)

    adaptive = torch.full_like(norm, math.inf)
    if kind is Kind.ZCLIP:
        above = norm - known.mean
        spike = above > a * deviation
        adaptive = torch.where(spike, known.mean + a * a * known.variance / above, adaptive)
    elif kind is Kind.RUNNING_MEDIAN:
        adaptive = a * _quantile(accepted_norms, known.accepted, 0.5)
    elif kind is Kind.AUTOCLIP:
        # NaN becomes 0, too: max keeps its first argument.
        adaptive = _quantile(accepted_norms, known.accepted, min(max(0.0, a / 100), 1.0))
    adaptive = torch.where(warm & (known.accepted >= 1), adaptive, math.inf)
    limit = torch.where(adaptive < max_norm, adaptive, max_norm)
    if kind is Kind.ADAGC:
        limit = torch.where(warm, math.inf, limit)

    skip_above = outlier_above(known, skip_norm)
    coef = limit / (norm + 1e-6)
    verdict = torch.where(coef < 1, int(Verdict.CLIP), int(Verdict.APPLY))
    verdict = torch.where(norm > skip_above, int(Verdict.SKIP_OUTLIER), verdict)
    finite = norm.isfinite() if loss is None else norm.isfinite() & loss.isfinite()
    verdict = torch.where(finite, verdict, int(Verdict.SKIP_NONFINITE))
    coef = torch.where(verdict == int(Verdict.CLIP), coef, 1.0)
    skip = verdict >= int(Verdict.SKIP_NONFINITE)
    coefs, applied = coef, norm * coef
    if kind is Kind.ADAGC:
        restarts = _adagc_restarts(known, step)
        average = torch.where(restarts, known.usual_norms, known.ema_norms)
        has_average = warm & (known.ema_norms < math.inf)
        alone = torch.where(warm, (max_norm / (each + 1e-6)).clamp(max=1), coef)
        ratio = a * average / each
        coefs = torch.where(has_average, torch.where(ratio < 1, ratio, 1.0), alone)
        coefs = torch.where(skip | (each == 0), 1.0, coefs)
        coef, applied = torch.ones_like(coef), torch.zeros_like(applied)
        if len(norms):
            coef, applied = coefs.amin(), (coefs * each).amax()
        verdict = torch.where(skip, verdict, (coef < 1).long())
    too_large = ~skip & (applied > LARGEST_APPLIED)
    verdict = torch.where(too_large, int(Verdict.SKIP_OUTLIER), verdict)
    skip = skip | too_large
    coef = torch.where(skip, 1.0, coef)
    if kind is Kind.ADAGC:
        clipped = coefs * each
        smallest = torch.where(clipped < known.ema_norms, clipped, known.ema_norms)
        ema = torch.where(has_average, b * average + (1 - b) * clipped, smallest)
        goes_on = (known.clipped_since >= 0) & ~restarts
        since = torch.where(goes_on, known.clipped_since, float(step))
        since = torch.where(coefs < 0.5, since, -1.0)
        learns = ~skip & (each != 0)
        known.ema_norms.copy_(torch.where(learns, ema, known.ema_norms))
        known.clipped_since.copy_(torch.where(learns & has_average, since, known.clipped_since))
    sees = finite & (norm > 0)
    accepts = sees & ~skip
    if per_tensor.numel():
        _see_each(known, each, step, sees)
    if kind is Kind.ZCLIP:
        updated = _zclip_moments(known, norm.minimum(adaptive), norm, b, warmup)
        numbers[2:].copy_(torch.where(accepts, updated, numbers[2:]))
    _remember(seen_norms, known.seen, norm, sees)
    _remember(accepted_norms, known.accepted, norm, accepts)
    numbers[:2].add_(torch.stack([sees, accepts]))
    grad_coef = torch.where(skip, 1.0, coefs * factor)
    loss = torch.full_like(norm, math.nan) if loss is None else loss
    record = [verdict.double(), coef, norm, limit, loss, skip_above]
    return GuardDecision(grad_coef, verdict, torch.stack(record))


def _check_guard_decide(
    op: str,
    n: int,
    unscale: Tensor | None,
    loss: Tensor | None,
    known: Statistics,
    threshold: int,
    options: Sequence[float],
) -> None:
    """Twin: check_guard_decide in csrc/checks.h."""
    for name, scalar in (("unscale", unscale), ("loss", loss)):
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
    if not 0 <= threshold <= max(Kind) or len(options) != 3:
        raise RuntimeError(
            f"{op}: threshold must be 0 to {int(max(Kind))}, with 3 options; got {threshold} with "
            f"{len(options)}"
        )
    columns = [n] if threshold == Kind.ADAGC else [n, 0]
    if len(known.per_tensor) != 4 or known.per_tensor.shape[1] not in columns:
        raise RuntimeError(
            f"{op}: per_tensor must have 4 rows and a column for each of the {n} gradients, or "
            f"none without AdaGC; got shape {tuple(known.per_tensor.shape)}"
        )


def _find_new_level(known: Statistics, norm: Tensor, z: float, warm: Tensor) -> Tensor:
    """Restart ZClip's moments where this norm and the median are both spikes.

    Returns the deviation.
    """
    median = _median_with_a_larger(known.seen_norms, known.seen)
    deviation = known.variance.sqrt()
    spike = known.mean + z * deviation
    found = warm & (known.accepted >= 1) & (known.seen >= OUTLIER_AFTER)
    found = found & (norm > spike) & (median > spike)
    moved = median - known.mean
    moments = torch.stack([median, moved.square()])
    known.numbers[2:].copy_(torch.where(found, moments, known.numbers[2:]))
    return torch.where(found, moved, deviation)


def _adagc_restarts(known: Statistics, step: int) -> Tensor:
    """Where AdaGC has clipped to less than half for so long that its average is out of date."""
    long = (known.clipped_since >= 0) & (step - known.clipped_since >= ADAGC_RESTART_AFTER)
    return long & (known.usual_norms < math.inf) & (known.usual_norms > known.ema_norms)


def _see_each(known: Statistics, norms: Tensor, step: int, sees: Tensor) -> None:
    """Take the norm of each tensor into its usual norm."""
    usual, most = known.usual_norms, RISEN_FACTOR * known.usual_norms
    since = torch.where(known.risen_since >= 0, known.risen_since, float(step))
    since = torch.where(norms > most, since, -1.0)
    average = USUAL_BETA * usual + (1 - USUAL_BETA) * torch.where(norms < most, norms, most)
    sees = sees & (norms != 0)
    first = ~(usual < math.inf)
    known.risen_since.copy_(torch.where(sees & ~first, since, known.risen_since))
    usual.copy_(torch.where(sees, torch.where(first, norms, average), usual))


def outlier_above(statistics: Statistics, skip_norm: float) -> Tensor:
    """The norm above which a finite norm is an outlier, float64, shape ().

    The larger of ``skip_norm`` and 4 times the median of the last norms seen and one more that is
    above them all; inf while fewer than 16 were seen. The rule asks for the median of the last
    norms and the norm in question. Both say the same: a norm below the larger of those in the
    middle is no outlier by either.
    """
    usual = OUTLIER_FACTOR * _median_with_a_larger(statistics.seen_norms, statistics.seen)
    larger = torch.where(usual > skip_norm, usual, skip_norm)
    return torch.where(statistics.seen >= OUTLIER_AFTER, larger, math.inf)


def _whole(count: Tensor) -> Tensor:
    """A count of norms, >= 0 and whole whatever it was."""
    return torch.where(count >= 1, count.clamp(max=2.0**53), 0.0).floor()


def _remember(norms: Tensor, count: Tensor, norm: Tensor, wanted: Tensor) -> None:
    """Put the norm in the place of the oldest."""
    oldest = torch.arange(len(norms), device=norms.device) == _whole(count) % len(norms)
    norms.copy_(torch.where(wanted & oldest, norm, norms))


def _quantile(norms: Tensor, count: Tensor, q: float) -> Tensor:
    """As numpy.percentile, of the norms that ``count`` have left in the window.

    Where it has none, the result is anything.
    """
    return _at(norms, count, lambda held: q * (held - 1).clamp(min=0))


def _median_with_a_larger(norms: Tensor, count: Tensor) -> Tensor:
    """The median of the norms in the window and of one more that is above them all.

    Where it has none, the result is anything.
    """
    return _at(norms, count, lambda held: 0.5 * held)


def _at(norms: Tensor, count: Tensor, place_among: Callable[[Tensor], Tensor]) -> Tensor:
    """Linear between neighbours, at a place in the ascending order of what the window holds."""
    held = torch.arange(len(norms), device=norms.device) < _whole(count)
    ascending = norms.where(held, math.nan).sort()[0]  # NaN comes last
    last = (held.sum() - 1).clamp(min=0)
    place = place_among(held.sum().double())
    below = place.long()
    above = torch.minimum(below + 1, last)
    # Not by indexing: an index of shape () is read by the host.
    low, high = ascending.gather(0, torch.stack([below, above])).unbind()
    return low + (high - low) * (place - below)


def _zclip_moments(known: Statistics, clipped: Tensor, norm: Tensor, alpha: float, warmup: float):
    """Mean and variance with one more norm."""
    count, mean, variance = known.accepted + 1, known.mean, known.variance
    delta = norm - mean
    first_mean = mean + delta / count
    first_variance = variance + (delta * (norm - first_mean) - variance) / count
    later_mean = alpha * mean + (1 - alpha) * clipped
    later_variance = alpha * variance + (1 - alpha) * (clipped - later_mean).square()
    first = torch.stack([first_mean, first_variance])
    return torch.where(count <= warmup, first, torch.stack([later_mean, later_variance]))


def _fake_guard_decide_(
    total_norm, norms, unscale, loss, numbers, seen, accepted, per_tensor, step, threshold, *_
):
    known = (numbers, seen, accepted, per_tensor)
    check_same_device("guard_decide_", (total_norm, norms, unscale, loss, *known))
    shape = norms.shape if threshold == Kind.ADAGC else ()
    return (
        total_norm.new_empty(shape),
        total_norm.new_empty((), dtype=torch.int64),
        total_norm.new_empty(6),
    )


# --- grad_norm_decide_ --------------------------------------------------------------------------


class Scaling(NamedTuple):
    """A ``torch.amp.GradScaler``'s state and settings, for its update."""

    #: What the loss is multiplied by, float32, one element; shrinks after a NaN or Inf.
    scale: Tensor
    #: Steps without one since the scale last changed, int32, one element.
    growth_tracker: Tensor
    growth_factor: float
    backoff_factor: float
    growth_interval: int


@torch.no_grad()
def grad_norm_decide_(
    grads: Sequence[Tensor],
    unscale: Tensor | None,
    loss: Tensor | None,
    statistics: Statistics,
    step: int,
    threshold: Threshold,
    max_norm: float,
    skip_norm: float,
    scaling: Scaling | None = None,
) -> tuple[GradNorm, GuardDecision]:
    """:func:`grad_norm` and :func:`guard_decide_` in one; on CUDA in one launch.

    Args:
        scaling: updated in place as by ``GradScaler.update``: a norm that is not finite, as it was
            measured, multiplies the scale by ``backoff_factor``; ``growth_interval`` finite ones in
            a row by ``growth_factor``.
        grads, unscale, loss, statistics, step, threshold, max_norm, skip_norm: as for those two.

    Raises:
        RuntimeError: what those two raise; nothing is written then.
    """
    grads = grads if isinstance(grads, list) else list(grads)
    state, growth = (None, None), (0.0, 0.0, 0.0)
    if scaling is not None:
        state, growth = scaling[:2], scaling[2:]
    args = (unscale, loss, *statistics, step, int(threshold.kind), max_norm, skip_norm)
    args += (threshold.options, *state, growth)
    if grads and _has_kernel(grads[0]):
        found = torch.ops.fastguard.grad_norm_decide_.default(grads, *args)
        written = (*statistics, *(state if scaling is not None else ()))
        count_writes(written)
    else:
        found = grad_norm_decide_ref_(grads, *args)
    return GradNorm(*found[:3]), GuardDecision(*found[3:])


def grad_norm_decide_ref_(
    grads: Sequence[Tensor],
    unscale: Tensor | None,
    loss: Tensor | None,
    numbers: Tensor,
    seen_norms: Tensor,
    accepted_norms: Tensor,
    per_tensor: Tensor,
    step: int,
    threshold: int,
    max_norm: float,
    skip_norm: float,
    options: Sequence[float],
    scale: Tensor | None,
    growth_tracker: Tensor | None,
    growth: Sequence[float],
) -> tuple[Tensor, ...]:
    """The operator behind :func:`grad_norm_decide_` in plain torch."""
    _check_growth("grad_norm_decide_", scale, growth_tracker, growth)
    check_same_device("grad_norm_decide_", (*grads, numbers, scale, growth_tracker))
    measured = grad_norm_ref(grads, numbers.device)
    total_norm, norms, _ = measured
    known = (numbers, seen_norms, accepted_norms, per_tensor)
    decided = guard_decide_ref_(
        *(total_norm, norms, unscale, loss, *known, step, threshold, max_norm, skip_norm, options)
    )
    if scale is not None:
        growth_factor, backoff_factor, interval = growth
        interval = math.floor(min(interval, 2.0**53)) if interval >= 1 else 0
        good = total_norm.isfinite()
        steps = torch.where(good, growth_tracker + 1, 0)
        grown = (scale.double() * growth_factor).float()
        full = (steps.long() == interval) & grown.isfinite()
        kept = torch.where(full, grown, scale)
        scale.copy_(torch.where(good, kept, (scale.double() * backoff_factor).float()))
        growth_tracker.copy_(torch.where(steps.long() == interval, 0, steps))
    return *measured, *decided


def _check_growth(op, scale, growth_tracker, growth) -> None:
    """Twin: check_growth in csrc/checks.h."""
    if (scale is None) != (growth_tracker is None) or len(growth) != 3:
        raise RuntimeError(
            f"{op}: scale and growth_tracker come together, and growth has 3 numbers; got "
            f"{len(growth)}"
        )
    if scale is not None:
        found = (scale.numel(), scale.dtype, growth_tracker.numel(), growth_tracker.dtype)
        if found != (1, torch.float32, 1, torch.int32):
            raise RuntimeError(f"{op}: scale and growth_tracker must be one float32 and one int32")
        _check_writable(op, (scale, growth_tracker))


def _fake_grad_norm_decide_(grads, unscale, loss, numbers, *rest):
    scaling = [x for x in rest if isinstance(x, Tensor)]
    check_same_device("grad_norm_decide_", (*grads, unscale, loss, numbers, *scaling))
    measured = _fake_grad_norm(grads, numbers)
    return *measured, *_fake_guard_decide_(*measured[:2], unscale, loss, numbers, *rest)


# --- settle_ ------------------------------------------------------------------------------------


@torch.no_grad()
def settle_(
    buffers: Sequence[Tensor], saved: Sequence[Tensor], verdict: Tensor, owners: Tensor
) -> Tensor:
    """Set ``buffers`` back to their ``saved`` copies on a skip, else bring the copies up to date.

    An element that is finite in a copy and NaN or Inf in its buffer is never brought into the copy:
    whatever the verdict, all buffers of the same owner are set back then. BatchNorm's mean,
    variance and count belong together; the buffers of other modules are not held up.

    Args:
        buffers, saved: N tensors each, of any dtype and device, equal in shape and dtype in pairs.
        verdict: int64, shape (), as :func:`guard_decide_` returns it.
        owners: int64, shape (N,), on the device of ``verdict``: for each buffer the number of the
            module that holds it, from 0 to N - 1.

    Returns:
        int32, shape (2 * N,): not zero, in the first half for each buffer that was set back for its
        own NaN or Inf, in the second half for each owner of one. All zero on a skip.

    Raises:
        RuntimeError: the lists differ in length, shapes or dtypes; on the CPU, an owner that is not
            there. On a device such a buffer counts as its own owner.
    """
    if _has_kernel(verdict) and _can_settle(buffers, saved, verdict.device):
        return torch.ops.fastguard.settle_.default(buffers, saved, verdict, owners)
    return settle_ref_(buffers, saved, verdict, owners)


def _can_settle(buffers, saved, device: torch.device) -> bool:
    """Whether all are where the verdict is and, on a device, which alone knows the direction of the
    copy, can be copied as the memory that they are."""
    if any(tensor.device != device for tensor in (*buffers, *saved)):
        return False
    return device.type == "cpu" or _same_memory(buffers, saved)


def _same_memory(buffers, saved) -> bool:
    return all(
        b.stride() == s.stride() == packed_strides(b) for b, s in zip(buffers, saved, strict=True)
    )


@torch.no_grad()
def settle_ref_(
    buffers: Sequence[Tensor], saved: Sequence[Tensor], verdict: Tensor, owners: Tensor
) -> Tensor:
    """:func:`settle_` in plain torch."""
    _check_settle(buffers, saved, verdict, owners)
    if owners.device.type != "cpu":  # the host cannot look at the numbers
        known = (owners >= 0) & (owners < len(owners))
        owners = torch.where(known, owners, torch.arange(len(owners), device=owners.device))
    skip = verdict >= int(Verdict.SKIP_NONFINITE)
    none = torch.zeros_like(owners, dtype=torch.int32)
    if not buffers:
        return torch.cat([none, none])
    lost = [_lost(b, s).to(verdict.device) for b, s in zip(buffers, saved, strict=True)]
    of_buffer = torch.where(skip, none, torch.stack(lost).int())
    of_owner = none.index_add(0, owners, of_buffer)
    restore = skip | (of_owner[owners] > 0)
    for buffer, copy, back in zip(buffers, saved, restore, strict=True):
        buffer.copy_(torch.where(back.to(buffer.device), copy, buffer))
        copy.copy_(buffer)
    return torch.cat([of_buffer, of_owner])


def _check_settle(buffers, saved, verdict, owners) -> None:
    """Twins: check_settle and check_owner in csrc/checks.h."""
    check_tensor("settle_", "verdict", verdict, torch.int64)
    check_tensor("settle_", "owners", owners, torch.int64, None)
    n = len(buffers)
    if not n == len(saved) == len(owners):
        raise RuntimeError(
            f"settle_: {n} buffers but {len(saved)} saved copies and {len(owners)} owners"
        )
    for i, (buffer, copy) in enumerate(zip(buffers, saved, strict=True)):
        if buffer.shape != copy.shape or buffer.dtype != copy.dtype:
            raise RuntimeError(f"settle_: buffer {i} and its saved copy differ in shape or dtype")
    # Those of a device are read by nobody here, and a fake tensor has none.
    known = owners.device.type == "cpu" and type(owners) is Tensor
    for owner in owners.tolist() if known else ():
        if not 0 <= owner < n:
            raise RuntimeError(
                f"settle_: owners must be numbers from 0 to {n - 1}, one for each buffer; got "
                f"{owner}"
            )
    for tensors in (buffers, saved):
        _check_no_overlap("settle_", tensors)
        _check_writable("settle_", tensors)


def _lost(buffer: Tensor, saved: Tensor) -> Tensor:
    """Whether an element was finite in the copy and is not in the buffer; False of integers."""
    if buffer.dtype not in FLOATING_DTYPES:
        return torch.zeros((), dtype=torch.bool, device=buffer.device)
    if buffer.is_complex():
        buffer, saved = torch.view_as_real(buffer), torch.view_as_real(saved)
    return (saved.isfinite() & ~buffer.isfinite()).any()


def _fake_settle_(buffers, saved, verdict, owners):
    check_same_device("settle_", (*buffers, *saved, verdict, owners))
    return torch.empty(2 * len(buffers), dtype=torch.int32, device=verdict.device)


# --- accumulate_ --------------------------------------------------------------------------------


@torch.no_grad()
def accumulate_(
    sums: Sequence[Tensor],
    grads: Sequence[Tensor],
    verdict: Tensor,
    window: Tensor,
    weight: float,
) -> None:
    """Add a micro-batch's gradients to the sums and count it, unless its verdict is a skip.

    Args:
        sums, grads: as many tensors, equal in shape in pairs; gradients of the dtypes of
            :func:`grad_norm`, sums of float64 for float64 gradients, of float32 for all others.
        verdict: int64, shape ().
        window: float64, shape (3,): micro-batches seen, the good ones, the weight of the good ones.
        weight: of this micro-batch.

    Raises:
        RuntimeError: the lists do not match, a sum is expanded or of another dtype.
    """
    if _has_kernel(window):
        torch.ops.fastguard.accumulate_.default(sums, grads, verdict, window, weight)
        if sums:
            count_writes(sums)
    else:
        accumulate_ref_(sums, grads, verdict, window, weight)


@torch.no_grad()
def accumulate_ref_(
    sums: Sequence[Tensor],
    grads: Sequence[Tensor],
    verdict: Tensor,
    window: Tensor,
    weight: float,
) -> None:
    """:func:`accumulate_` in plain torch."""
    _check_accumulate(sums, grads, verdict, window)
    good = verdict < int(Verdict.SKIP_NONFINITE)
    for total, grad in zip(sums, grads, strict=True):
        total.copy_(torch.where(good, total + grad, total))
    added = torch.where(good, torch.full_like(window[0], weight), 0.0)  # 0 * inf is NaN
    window.add_(torch.stack([torch.ones_like(window[0]), good.double(), added]))


def _check_accumulate(sums, grads, verdict, window) -> None:
    """Twin: check_accumulate in csrc/checks.h."""
    op = "accumulate_"
    check_tensor(op, "verdict", verdict, torch.int64)
    check_tensor(op, "window", window, torch.float64, 3)
    if len(sums) != len(grads):
        raise RuntimeError(
            f"{op}: as many gradients as sums are needed; got {len(sums)} sums and {len(grads)} "
            "gradients"
        )
    for tensors in (sums, grads):
        _check_dtypes(op, tensors)
    for i, (total, grad) in enumerate(zip(sums, grads, strict=True)):
        wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
        if total.shape != grad.shape or total.dtype != wide:
            raise RuntimeError(
                f"{op}: sum {i} must have its gradient's shape, and be float64 for a float64 "
                "gradient, float32 for any other"
            )
    check_same_device(op, (*sums, *grads, verdict, window))
    _check_no_overlap(op, sums)
    _check_writable(op, (*sums, window))


def _fake_accumulate_(sums, grads, verdict, window, weight):
    check_same_device("accumulate_", (*sums, *grads, verdict, window))


# --- scale_ -------------------------------------------------------------------------------------


@torch.no_grad()
def scale_(grads: Sequence[Tensor], clip_coef: Tensor) -> None:
    """Multiply every gradient by ``clip_coef`` in place; write nothing where it is 1.

    The products are computed in float64, so that no coefficient underflows.

    Args:
        grads: N >= 0 tensors as for :func:`grad_norm`, none of which overlaps itself or another.
        clip_coef: float64, shape () for one factor or (N,) for one each, on their device.

    Raises:
        RuntimeError: a tensor of another dtype or device, or one that is expanded.
    """
    grads = list(grads)
    if grads and _has_kernel(grads[0]):
        torch.ops.fastguard.scale_.default(grads, clip_coef)
        count_writes(grads)
    else:
        scale_ref_(grads, clip_coef)


@torch.no_grad()
def scale_ref_(grads: Sequence[Tensor], clip_coef: Tensor) -> None:
    """:func:`scale_` in plain torch; it writes a product with 1 too, lest the host wait."""
    _check_dtypes("scale_", grads)
    _check_no_overlap("scale_", grads)
    check_same_device("scale_", (*grads, clip_coef))
    _check_writable("scale_", grads)
    fits = clip_coef.dtype == torch.float64 and clip_coef.is_contiguous()
    if not fits or clip_coef.shape not in ((), (len(grads),)):
        raise RuntimeError(
            f"scale_: clip_coef must be a float64 tensor of shape () or ({len(grads)},), as decide "
            f"returns it; got {clip_coef.dtype} of shape {tuple(clip_coef.shape)}"
        )
    for grad, coef in zip(grads, clip_coef.expand(len(grads)), strict=True):
        grad.copy_(grad.to(torch.float64) * coef)


def _fake_scale_(grads, clip_coef):
    check_same_device("scale_", (*grads, clip_coef))


# --- clip_ --------------------------------------------------------------------------------------


@torch.no_grad()
def clip_(
    grads: Sequence[Tensor], max_norm: float, skip_norm: float, float32_norm: bool = False
) -> tuple[GradNorm, Decision]:
    """:func:`grad_norm`, :func:`decide` and :func:`scale_` in one; on CUDA in one launch.

    Args:
        grads: N >= 0 tensors as for :func:`scale_`.
        float32_norm: decide by the norm rounded to float32 (unless that is Inf), as one who is
            handed the norm in float32 would.
        max_norm, skip_norm: as for :func:`decide`.

    Raises:
        RuntimeError: a tensor of another dtype or device, or one that is expanded; nothing is
            written then.
    """
    grads = grads if isinstance(grads, list) else list(grads)
    if grads and _has_kernel(grads[0]):
        found = torch.ops.fastguard.clip_.default(grads, max_norm, skip_norm, float32_norm)
        measured, decision = GradNorm(*found[:3]), Decision(*found[3:])
        if decision.clip_coef.device.type != "cpu" or decision.clip_coef != 1:
            count_writes(grads)
        return measured, decision
    found = clip_ref_(grads, max_norm, skip_norm, float32_norm)
    return GradNorm(*found[:3]), Decision(*found[3:])


@torch.no_grad()
def clip_ref_(
    grads: Sequence[Tensor], max_norm: float, skip_norm: float, float32_norm: bool
) -> tuple[Tensor, ...]:
    """The operator behind :func:`clip_` in plain torch."""
    _check_no_overlap("clip_", grads)
    measured = grad_norm_ref(grads)
    norm = measured.total_norm
    if float32_norm:
        rounded = norm.float().double()
        norm = torch.where(rounded.isfinite(), rounded, norm)
    decision = decide_ref(norm, max_norm, skip_norm)
    if decision.clip_coef.device.type != "cpu" or decision.clip_coef != 1:
        scale_ref_(grads, decision.clip_coef)
    return *measured, *decision


def _fake_clip_(grads, max_norm, skip_norm, float32_norm):
    measured = _fake_grad_norm(grads)
    return *measured, *_fake_decide(measured[0], max_norm, skip_norm)


# --- adamw_ -------------------------------------------------------------------------------------

#: Elements; 64 bytes of float32. Twin: packed_alignment in csrc/adamw_options.h.
_PACKED_ALIGNMENT = 16


def packed_offsets(numels: Iterable[int]) -> list[int]:
    """Where the moments of each parameter start in packed state, and at the end its whole size."""
    rounded = (-(-numel // _PACKED_ALIGNMENT) * _PACKED_ALIGNMENT for numel in numels)
    return list(itertools.accumulate(rounded, initial=0))


def packed_strides(param: Tensor) -> tuple[int, ...]:
    """The strides of a parameter's moments: its own, or row-major ones where it has gaps."""
    if not param.is_contiguous():
        inner = 1
        for stride, size in sorted(zip(param.stride(), param.shape, strict=True)):
            if size == 1:
                continue
            if stride != inner:
                return torch.empty(param.shape, device="meta").stride()
            inner *= size
    return param.stride()


def packed_view(pack: Tensor, param: Tensor, offset: int) -> Tensor:
    """The part of packed moments that begins at ``offset``, with the parameter's shape."""
    part = pack.narrow(0, offset, param.numel())
    return part.as_strided(param.shape, packed_strides(param))


@torch.no_grad()
def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor,
    state_steps: Tensor,
    grad_coef: Tensor,
    verdict: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    eps: float,
    decoupled_weight_decay: bool,
    amsgrad: bool,
    maximize: bool,
) -> None:
    """One Adam or AdamW step of N parameters, unless the verdict is a skip.

    ::

        if verdict not in (Verdict.APPLY, Verdict.CLIP):
            return                                          # nothing is written, bit for bit
        for each parameter p with its gradient, m, v, v_max and step t:
            t += 1
            g = gradient * grad_coef                        # the product in float64
            g = -g if maximize else g
            g = g if decoupled_weight_decay else g + weight_decay * p
            m = beta1 * m + (1 - beta1) * g
            v = beta2 * v + (1 - beta2) * g * g
            v_max = max(v_max, v) if amsgrad else v
            decay = lr * weight_decay * p if decoupled_weight_decay else 0
            p -= decay + lr / (1 - beta1**t) * m / (sqrt(v_max / (1 - beta2**t)) + eps)

    in float32, for float64 parameters in float64, the bias corrections in float64. Gradients are
    only read. The result does not depend on the number of threads, nor on the CPU's instruction
    set. Where a gradient lies otherwise in memory than its parameter, or the parameter has gaps,
    copies are made.

    The state is packed, one tensor for all parameters: the moments of parameter i start at
    ``packed_offsets(p.numel() for p in params)[i]`` and lie in the order of the parameter's memory
    (row-major where that has gaps), so that parameter and moments are read straight through.

    Source: Kingma & Ba, "Adam: A Method for Stochastic Optimization", ICLR 2015; Loshchilov &
    Hutter, "Decoupled Weight Decay Regularization", ICLR 2019; amsgrad: Reddi et al., "On the
    Convergence of Adam and Beyond", ICLR 2018.

    Args:
        params: N >= 0 dense tensors of one device, either all of float64, or of float32, bfloat16
            and float16; none overlaps itself or another.
        grads: N tensors of the parameters' shapes, of their dtypes or float32.
        exp_avg, exp_avg_sq: m and v, contiguous, 1-D and of the last of ``packed_offsets``
            elements; float64 for float64 parameters, else float32.
        max_exp_avg_sq: v_max, the same; of shape (0,) without amsgrad.
        state_steps: t, float32, shape (N,), contiguous.
        grad_coef: float64, shape () or (N,): factor for all gradients, or for each.
        verdict: a :class:`Verdict`, int64, shape ().

    Raises:
        RuntimeError: a tensor of another number, dtype, shape or device, or one to be written that
            is expanded; nothing is written then.
    """
    params = params if isinstance(params, list) else list(params)
    grads = grads if isinstance(grads, list) else list(grads)
    state = (exp_avg, exp_avg_sq, max_exp_avg_sq, state_steps)
    options = (lr, beta1, beta2, weight_decay, eps, decoupled_weight_decay, amsgrad, maximize)
    if params and _has_kernel(params[0]):
        torch.ops.fastguard.adamw_.default(params, grads, *state, grad_coef, verdict, *options)
        count_writes(params)
        count_writes(state)
    else:
        adamw_ref_(params, grads, *state, grad_coef, verdict, *options)


@torch.no_grad()
def check_adamw(params, grads, exp_avg, exp_avg_sq, max_exp_avg_sq, state_steps, *rest) -> None:
    """Raise what :func:`adamw_` would of the same arguments; nothing is written."""
    grad_coef, verdict, *options = rest
    state = exp_avg, exp_avg_sq, max_exp_avg_sq, state_steps
    if params and params[0].device.type == "cpu" and _has_kernel(params[0]):  # no launch
        skip = torch.full_like(verdict, int(Verdict.SKIP_NONFINITE))
        torch.ops.fastguard.adamw_.default(params, grads, *state, grad_coef, skip, *options)
    else:
        moments = dict(zip(("exp_avg", "exp_avg_sq", "max_exp_avg_sq"), state, strict=False))
        amsgrad = options[-2]
        _check_adamw(params, grads, moments, state_steps, grad_coef, verdict, amsgrad)


@torch.no_grad()
def adamw_ref_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor,
    state_steps: Tensor,
    grad_coef: Tensor,
    verdict: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    eps: float,
    decoupled_weight_decay: bool,
    amsgrad: bool,
    maximize: bool,
) -> None:
    """:func:`adamw_` in plain torch; on a skip it writes what was there, lest the host wait."""
    moments = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "max_exp_avg_sq": max_exp_avg_sq}
    _check_adamw(params, grads, moments, state_steps, grad_coef, verdict, amsgrad)
    skip = (verdict != int(Verdict.APPLY)) & (verdict != int(Verdict.CLIP))
    coefs = (-grad_coef if maximize else grad_coef).expand(len(params)).unbind()
    offsets = packed_offsets(p.numel() for p in params)
    for i, p in enumerate(params):
        step, m, v = (
            state_steps[i],
            packed_view(exp_avg, p, offsets[i]),
            packed_view(exp_avg_sq, p, offsets[i]),
        )
        new_step = step + 1
        t = new_step.double()
        # A number divided by a tensor would be its reciprocal times the number, rounded twice.
        step_size = (torch.full_like(t, lr) / (1 - beta1**t)).to(m.dtype)
        root_factor = (1 - beta2**t).sqrt().reciprocal().to(m.dtype)
        old = p.to(m.dtype)
        g = (grads[i].double() * coefs[i]).to(m.dtype)
        if weight_decay != 0 and not decoupled_weight_decay:
            g = g + weight_decay * old
        new_m = beta1 * m + (1 - beta1) * g
        new_v = beta2 * v + (1 - beta2) * g * g
        written = [(m, new_m), (v, new_v), (step, new_step)]
        under_root = new_v
        if amsgrad:
            largest = packed_view(max_exp_avg_sq, p, offsets[i])
            under_root = torch.maximum(largest, new_v)
            written.append((largest, under_root))
        move = step_size * (new_m / (under_root.sqrt() * root_factor + eps))
        if decoupled_weight_decay:
            move = (lr * weight_decay) * old + move
        for tensor, new in [*written, (p, (old - move).to(p.dtype))]:
            tensor.copy_(torch.where(skip, tensor, new))


def _check_adamw(params, grads, moments, state_steps, grad_coef, verdict, amsgrad):
    n = len(params)
    if len(grads) != n:
        raise RuntimeError(
            f"adamw_: grads has {len(grads)} tensors; with {n} params it must have as many"
        )
    if grad_coef.dtype != torch.float64 or grad_coef.shape not in ((), (n,)):
        raise RuntimeError(
            f"adamw_: grad_coef must be a float64 tensor of shape () or ({n},), one factor for all "
            f"gradients or one for each; got {grad_coef.dtype} of shape {tuple(grad_coef.shape)}"
        )
    if verdict.dtype != torch.int64 or verdict.dim() != 0:
        raise RuntimeError(
            "adamw_: verdict must be an int64 tensor of shape (), as decide returns it; got "
            f"{verdict.dtype} of shape {tuple(verdict.shape)}"
        )
    moment = torch.float64 if n and params[0].dtype == torch.float64 else torch.float32
    for i, (p, grad) in enumerate(zip(params, grads, strict=True)):
        if p.dtype not in DTYPES:
            raise RuntimeError(
                f"adamw_: params[{i}] has dtype {p.dtype}; float32, float64, bfloat16 and float16 "
                "are supported"
            )
        if (p.dtype == torch.float64) != (moment == torch.float64):
            raise RuntimeError(
                f"adamw_: params[{i}] has dtype {p.dtype}, params[0] {params[0].dtype}; float64 "
                "parameters need a call of their own, for one call has one dtype of moments"
            )
        if overlaps_itself(p):
            raise RuntimeError(
                f"adamw_: params[{i}] is expanded or overlaps itself: several of its elements "
                "share a single memory location; clone it"
            )
        if grad.layout != torch.strided:
            raise RuntimeError(f"adamw_: grads[{i}] is {grad.layout}; make it dense with to_dense")
        if grad.shape != p.shape:
            raise RuntimeError(
                f"adamw_: grads[{i}] has shape {tuple(grad.shape)}, its parameter "
                f"{tuple(p.shape)}; make it with torch.zeros_like"
            )
        if grad.dtype not in (p.dtype, moment):
            raise RuntimeError(
                f"adamw_: grads[{i}] has dtype {grad.dtype}, its parameter {p.dtype}; it must be "
                f"{' or '.join(sorted({str(p.dtype), str(moment)}))}"
            )
    state = (*moments.values(), state_steps)
    check_same_device("adamw_", (*params, *grads, *state, grad_coef, verdict))
    _check_writable("adamw_", (*params, *state))
    size = packed_offsets(p.numel() for p in params)[-1]
    packed = [
        (name, tensor, moment, size, "the last of packed_offsets")
        if amsgrad or name != "max_exp_avg_sq"
        else (name, tensor, moment, 0, "as amsgrad is off")
        for name, tensor in moments.items()
    ]
    steps = ("state_steps", state_steps, torch.float32, n, "one step for each parameter")
    for name, tensor, dtype, numel, why in [*packed, steps]:
        contiguous = tensor.is_contiguous()
        if tensor.dtype != dtype or tensor.shape != (numel,) or not contiguous:
            raise RuntimeError(
                f"adamw_: {name} must be a contiguous {dtype} tensor of shape ({numel},), {why}; "
                f"got {tensor.dtype} of shape {tuple(tensor.shape)}"
                + ("" if contiguous else ", not contiguous")
            )


def _fake_adamw_(params, grads, *rest):
    tensors = [tensor for tensor in rest if isinstance(tensor, Tensor)]
    check_same_device("adamw_", (*params, *grads, *tensors))


# --- what was built -----------------------------------------------------------------------------


def cpu_info() -> dict[str, str]:
    """What the CPU library was built with and which instruction set it chose; {} if not built."""
    return {} if _library.cpu_problem else _parse(torch.ops.fastguard.cpu_info.default())


def cuda_info() -> dict[str, str]:
    """What the CUDA library was built with; {} if it is not in use."""
    return {} if _library.cuda_problem else _parse(torch.ops.fastguard.cuda_info.default())


def _parse(info: str) -> dict[str, str]:
    return dict(line.split("=", 1) for line in info.splitlines())


def _refuse_lazy(*args):
    """Torch would negate or conjugate a copy, have the operator write that, and then raise."""
    raise RuntimeError(
        "fastguard: a tensor to be written has a lazy negation or conjugation; materialize it with "
        "resolve_neg() or resolve_conj()"
    )


if _library.cpu_problem is None:
    _registrations = torch.library.Library("fastguard", "IMPL")  # its registrations live as long
    for _name in (
        *("guard_decide_", "grad_norm_decide_", "settle_", "accumulate_", "scale_", "clip_"),
        "adamw_",
    ):
        for _key in ("Negative", "Conjugate"):
            _registrations.impl(_name, _refuse_lazy, _key)
    torch.library.register_fake("fastguard::grad_norm", _fake_grad_norm)
    torch.library.register_fake("fastguard::decide", _fake_decide)
    torch.library.register_fake("fastguard::guard_decide_", _fake_guard_decide_)
    torch.library.register_fake("fastguard::settle_", _fake_settle_)
    torch.library.register_fake("fastguard::accumulate_", _fake_accumulate_)
    torch.library.register_fake("fastguard::grad_norm_decide_", _fake_grad_norm_decide_)
    torch.library.register_fake("fastguard::scale_", _fake_scale_)
    torch.library.register_fake("fastguard::clip_", _fake_clip_)
    torch.library.register_fake("fastguard::adamw_", _fake_adamw_)
