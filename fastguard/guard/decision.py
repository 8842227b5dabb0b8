"""The gradients of a step, their norms, and the decision about them."""

import math
import types
from typing import NamedTuple

import torch
from torch import Tensor

from fastguard import ops
from fastguard._tensors import grad_of, is_dtensor, local_parts, readable
from fastguard.thresholds import Fixed, Threshold

from .distributed import Ranks
from .statistics import Memory

_COMPLEX = frozenset(ops.COMPLEX_DTYPES)
_DTYPES = frozenset(ops.FLOATING_DTYPES)


class Rules(NamedTuple):
    """The settings of a guard that decide what to skip and to clip."""

    threshold: Threshold
    max_norm: float
    skip_norm: float


class Gradients(NamedTuple):
    """The input of one decision."""

    names: list[str]
    #: For each name the gradient, or the sum over several micro-batches.
    tensors: list[Tensor]
    #: The factor that undoes a GradScaler's scale and makes a sum a mean, float64, shape (); None
    #: for 1.
    unscale: Tensor | None
    #: The loss, float64, shape (); None if it was not given.
    loss: Tensor | None


class Decider:
    """Measures gradients and decides about them, on their device.

    Args:
        device: the device of the parameters.
    """

    def __init__(self, device: torch.device):
        self.memory = Memory(device)
        #: The ranks that decide together; None where this process decides by itself.
        self.ranks: Ranks | None = None

    def without_ranks(self) -> "Decider":
        """A copy for a copy of the guard, with the same statistics."""
        other = Decider(self.memory.statistics.numbers.device)
        other.memory = self.memory
        return other

    @property
    def in_one_call(self) -> bool:
        """Whether one operator measures and decides."""
        return self.ranks is None

    @property
    def replicated(self) -> bool:
        """Whether each of several ranks holds all of every parameter."""
        return self.ranks is not None and not self.ranks.sharded

    def decide(
        self, found: Gradients, step: int, rules: Rules, scaling: ops.Scaling | None = None
    ) -> tuple[ops.GradNorm, ops.GuardDecision]:
        """The norms and the decision about a step. This updates the statistics.

        Args:
            step: the number of the step.
            scaling: the state of a GradScaler, which the same call updates; None to leave it alone.
        """
        known = self.memory.statistics
        return self._decide(found, known, step, rules, scaling, self.in_one_call)

    def decide_micro_batch(
        self, found: Gradients, step: int, rules: Rules
    ) -> tuple[ops.GradNorm, ops.GuardDecision]:
        """:meth:`decide` with the statistics of micro-batches. Each replica decides by itself."""
        known = self.memory.of_micro_batches(found.tensors[0].device)
        alone = self.in_one_call or self.replicated
        return self._decide(found, known, step, rules._replace(threshold=Fixed()), None, alone)

    def _decide(self, found: Gradients, known, step: int, rules: Rules, scaling, alone: bool):
        threshold, max_norm, skip_norm = rules
        arguments = (known, step, threshold, max_norm, skip_norm)
        if alone:
            given = (found.unscale, found.loss, *arguments, scaling)
            return _measured(ops.grad_norm_decide_, found, *given)
        norms, unscale, loss = self._agreed(found)
        return norms, ops.guard_decide_(norms, unscale, loss, *arguments)

    def discard(self, found: Gradients) -> tuple[ops.GradNorm, ops.GuardDecision]:
        """The norms, and the decision to skip a batch that is passed over after a rollback."""
        # The NaN makes all ranks skip: a rank that does not pass over the batch must not apply it.
        bad = torch.full((), math.nan, dtype=torch.float64, device=self._device_of(found))
        norms, *_ = self._agreed(found._replace(loss=bad))
        return norms, discarded(norms, found.unscale, found.loss)

    def _device_of(self, found: Gradients) -> torch.device:
        return found.tensors[0].device if found.tensors else self.memory.statistics.numbers.device

    def _agreed(self, found: Gradients):
        """The norms, ``unscale`` and ``loss``, over all ranks where ranks train together."""
        if self.ranks is None:
            return _measured(ops.grad_norm, found), found.unscale, found.loss
        norms = _measured(ops.grad_norm, found._replace(tensors=local_parts(found.tensors)))
        return self.ranks.agree(norms, found.unscale, found.loss)


def _measured(measure, found: Gradients, *args):
    try:
        # A check of dtype, layout and device of 2000 tensors takes as long as this call.
        return measure(found.tensors, *args)
    except RuntimeError:  # the operator takes no sparse, complex or distributed tensors
        values = measurable(found.names, found.tensors)
        if values is found.tensors:
            raise  # the error has another cause
        return measure(values, *args)


def discarded(
    measured: ops.GradNorm, unscale: Tensor | None, loss: Tensor | None
) -> ops.GuardDecision:
    """The decision about a batch that is passed over after a rollback."""
    one = torch.ones_like(measured.total_norm)
    verdict = torch.full_like(one, int(ops.Verdict.SKIP_ROLLBACK), dtype=torch.int64)
    norm = measured.total_norm if unscale is None else measured.total_norm * unscale
    inf, loss = one * math.inf, one * math.nan if loss is None else loss
    record = [verdict.double(), one, norm, inf, loss, inf]
    return ops.GuardDecision(one, verdict, torch.stack(record))


# --- the gradients --------------------------------------------------------------------------------


def present(
    names: list[str], parameters: list[Tensor]
) -> tuple[list[str], list[Tensor], list[Tensor]]:
    """The parameters that have a gradient: names, parameters, gradients."""
    grads = list(map(grad_of, parameters))
    if types.NoneType not in map(type, grads):
        return names, parameters, grads
    there = [i for i, grad in enumerate(grads) if grad is not None]
    return tuple([items[i] for i in there] for items in (names, parameters, grads))


def once(names: list[str], grads: list[Tensor]) -> tuple[list[str], list[Tensor]]:
    """Each gradient once. A gradient that two parameters share has the first one's name."""
    if len(set(map(id, grads))) == len(grads):
        return names, grads
    first: dict[int, tuple[str, Tensor]] = {}
    for name, grad in zip(names, grads, strict=True):
        first.setdefault(id(grad), (name, grad))
    return [name for name, _ in first.values()], [grad for _, grad in first.values()]


def measurable(names: list[str], grads: list[Tensor]) -> list[Tensor]:
    """The gradients in a form that :func:`fastguard.ops.grad_norm` can read.

    Raises:
        ValueError: a gradient has an unsupported dtype, or the gradients are on several devices.
    """
    dtypes = {grad.dtype for grad in grads}
    if not dtypes <= _DTYPES:
        name, dtype = next(
            (n, g.dtype) for n, g in zip(names, grads, strict=True) if g.dtype not in _DTYPES
        )
        raise ValueError(
            f"the gradient of {name} has dtype {dtype}; float32, float64, bfloat16, float16 and "
            "complex ones of these are supported"
        )
    if len(devices := {grad.device for grad in grads}) > 1:
        raise ValueError(
            f"gradients on several devices, {sorted(map(str, devices))}: GradGuard takes one; "
            "use a guard for each, or fastguard.clip_grad_norm_"
        )
    if dtypes.isdisjoint(_COMPLEX) and {grad.layout for grad in grads} <= {torch.strided}:
        return grads
    return readable(grads)


# --- beside the gradients -------------------------------------------------------------------------


def scalar(loss: Tensor | float | None, device: torch.device) -> Tensor | None:
    """The loss, float64, shape (), on ``device``, without a host-device sync.

    Raises:
        ValueError: the loss is not one real number.
    """
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


def unscale_factor(
    scale: Tensor | None, weight: Tensor | float, device: torch.device
) -> Tensor | None:
    """The factor that divides by a GradScaler's scale and turns a sum into a mean; None for 1.

    Args:
        scale: the scale of the GradScaler, float64, shape (); None for 1.
        weight: the sum of the weights of the gradients, a number or a float64 tensor of shape ().
    """
    if scale is None and not isinstance(weight, Tensor):
        if weight == 1.0:
            return None
        return torch.full((), 1 / weight, dtype=torch.float64, device=device)
    return (weight if scale is None else scale * weight).reciprocal()
