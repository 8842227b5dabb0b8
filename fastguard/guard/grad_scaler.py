"""torch.amp.GradScaler beside a guard: its scale, what it found, its update, its search.

GradScaler has no public access to its tensors, its stages and its per-optimizer states. This module
alone reads and writes them. ``tests/guard/test_grad_scaler.py`` checks them against the installed
torch.

A GradScaler multiplies the loss by a scale S, so that small gradients do not vanish in fp16. Where
S is too large, gradients overflow to Inf; the scaler lowers S, by default to half, and tries again.
A fresh scaler of 65536 may need 16 such steps, one that starts at 2^40 may need 40, and one more
follows each growth of S. This is how a GradScaler works. It is not an explosion.
"""

import contextlib
import math
import operator
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.amp.grad_scaler import OptState

from fastguard import ops
from fastguard.ops import GradNorm, GuardDecision, Verdict

#: The guard that ends each scaler's iterations, by :func:`check_shared`.
_updated_by: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


class LossScale(NamedTuple):
    """What a scaler did to the gradients of one step."""

    #: The factor of the loss that the gradients still carry, float64, shape (); None for 1.
    scale: Tensor | None
    #: Non-zero where the scaler found a NaN or Inf, perhaps on another rank; None if it has not
    #: looked.
    found_inf: Tensor | None
    #: The factor of the loss, also where ``unscale_`` has undone it; like ``scale``. None where no
    #: scaler is in use, or where an attached optimizer was handed gradients without it.
    of_loss: Tensor | None = None

    @property
    def used(self) -> bool:
        """Whether a scaler scaled the loss."""
        return self.found_inf is not None or self.of_loss is not None

    def reject(self, unscale: Tensor | None) -> Tensor | None:
        """``unscale``, or what makes every norm non-finite where the scaler found a NaN or Inf.

        NaN after ``unscale_``, which may have found it on another rank; else Inf, for then the
        norm itself is NaN or Inf, and an Inf should be reported as one.
        """
        if self.found_inf is None:
            return unscale
        bad = math.nan if self.scale is None else math.inf
        factor = torch.where(self.found_inf == 0, 1.0, bad).double()
        return factor if unscale is None else unscale * factor


NOT_SCALED = LossScale(None, None)


def enabled(scaler: torch.amp.GradScaler | None) -> bool:
    return scaler is not None and scaler.is_enabled()


def check_scaled(scaler: torch.amp.GradScaler | None) -> None:
    """ValueError if the scaler never scaled a loss: the gradients would be divided for nothing."""
    if enabled(scaler) and scaler._scale is None:
        raise ValueError(
            "this GradScaler has not scaled a loss yet, and the gradients would be divided by its "
            f"scale of {scaler.get_scale():g}: call scaler.scale(loss).backward() instead of "
            "loss.backward(), or leave scaler= out"
        )


def check_not_unscaled(scaler: torch.amp.GradScaler | None) -> None:
    """ValueError after ``scaler.unscale_``: a window's sums are unscaled when it is stepped."""
    if enabled(scaler) and any(
        state["stage"] is OptState.UNSCALED for state in scaler._per_optimizer_states.values()
    ):
        raise ValueError(
            "scaler.unscale_ was called, but guard.accumulate takes gradients as they are and "
            "guard.step unscales their sums: leave scaler.unscale_ out"
        )


def check_shared(scaler: torch.amp.GradScaler | None, guard, update_scaler: bool | None) -> None:
    """ValueError if two guards would each end the iterations of one scaler."""
    if not enabled(scaler) or update_scaler is not None:
        return
    other = _updated_by.get(scaler, lambda: None)()
    if other is not None and other is not guard:
        raise ValueError(
            "another GradGuard updates this GradScaler too. The first guard.step changes the "
            "scale, and the second would unscale its gradients by the new one. Pass "
            "update_scaler=False to both and call scaler.update() after them; or call "
            "guard.attach(optimizer) for each, then scaler.step(optimizer) for each and "
            "scaler.update() once. If each loss is scaled after the other guard's step, pass "
            "update_scaler=True"
        )
    _updated_by[scaler] = weakref.ref(guard)


def _current_scale(scaler: torch.amp.GradScaler, device: torch.device) -> Tensor:
    """What the scaler multiplies the loss by, float64, shape ()."""
    check_scaled(scaler)
    return scaler.scale(torch.ones((), device=device)).double()


def loss_scale(
    scaler: torch.amp.GradScaler | None,
    optimizers: list[torch.optim.Optimizer],
    device: torch.device,
) -> LossScale:
    """The scale that the gradients still carry, or what ``scaler.unscale_`` found.

    Raises:
        ValueError: no loss was scaled; ``unscale_`` was called for some of the optimizers only;
            ``scaler.step`` was called for one of them since the last update.
    """
    if not enabled(scaler):
        return NOT_SCALED
    scale = _current_scale(scaler, device)
    # Not by indexing: that makes an entry, and a scaler with entries cannot be pickled.
    states = [scaler._per_optimizer_states.get(id(optimizer)) for optimizer in optimizers]
    stages = {OptState.READY if state is None else state["stage"] for state in states}
    if OptState.STEPPED in stages:
        raise ValueError(
            "the GradScaler has stepped this optimizer since its last update(): call "
            "scaler.update() after each step, or guard.step in place of scaler.step"
        )
    if stages == {OptState.READY, OptState.UNSCALED}:
        raise ValueError("scaler.unscale_ was called for some of the optimizers; call it for none")
    if OptState.UNSCALED not in stages:
        return LossScale(scale, None, scale)
    found = [f for state in states for f in state["found_inf_per_device"].values()]
    if not found:
        return LossScale(None, None, scale)
    return LossScale(None, torch.stack([f.reshape(()).to(device) for f in found]).sum(), scale)


def handed_scale(scale: Tensor | None, found_inf: Tensor | float, device) -> LossScale:
    """What ``GradScaler.step`` leaves in an optimizer's ``grad_scale`` and ``found_inf``."""
    if scale is not None:
        scale = torch.as_tensor(scale).to(device, torch.float64, non_blocking=True).reshape(())
    found = torch.as_tensor(found_inf).to(device, torch.float64, non_blocking=True).reshape(())
    return LossScale(scale, found, scale)


def _state(
    scaler: torch.amp.GradScaler, device: torch.device, optimizers: list[torch.optim.Optimizer]
) -> ops.Scaling | None:
    """The scaler's state, for the decision to update in the same call.

    None where that is not all that ``update`` has to do: a scaler of another class may do more, as
    ShardedGradScaler asks all ranks, and what it found for an optimizer that the guard does not
    step counts too.
    """
    if type(scaler).update is not torch.amp.GradScaler.update or scaler._scale.device != device:
        return None
    ours = {id(optimizer) for optimizer in optimizers}
    if any(key not in ours for key in scaler._per_optimizer_states):
        return None
    return ops.Scaling(
        scaler._scale,
        scaler._growth_tracker,
        scaler.get_growth_factor(),
        scaler.get_backoff_factor(),
        scaler.get_growth_interval(),
    )


class ScalerStep:
    """A GradScaler in one step of a guard, from its scale to its update.

    Args:
        scaler: None, or one that is not enabled, where no scaler is in use.
        handed: ``grad_scale`` and ``found_inf`` of an attached optimizer, as :func:`taken_from`
            returns them: then the loop updates the scaler, which is not known here.
        update: whether the guard is to call ``scaler.update()``.
    """

    def __init__(
        self,
        scaler: torch.amp.GradScaler | None,
        optimizers: list[torch.optim.Optimizer],
        device: torch.device,
        handed: tuple[Tensor | None, Tensor | float] | None = None,
        update: bool = True,
    ):
        self._scaler = scaler if enabled(scaler) else None
        self._optimizers, self._device, self._update = optimizers, device, update
        if handed is None:
            self.scale = loss_scale(scaler, optimizers, device)
        else:
            self.scale = handed_scale(*handed, device)
        self._given: ops.Scaling | None = None
        self._before: list[Tensor] = []

    def give_state(self) -> ops.Scaling | None:
        """The scaler's state, if the decision can update it; it is updated there then."""
        if self._scaler is None or not self._update or self.scale.found_inf is not None:
            return None
        self._given = _state(self._scaler, self._device, self._optimizers)
        self._before = [] if self._given is None else [t.clone() for t in self._given[:2]]
        return self._given

    def undo(self) -> None:
        """Give the scaler the state that it had before the decision."""
        for tensor, before in zip(self._given or (), self._before, strict=False):
            tensor.copy_(before)

    def finish(self, found_inf: Tensor | None, total_norm: Tensor) -> None:
        """Tell the scaler of a NaN or Inf, and update it, if the decision has not.

        Args:
            found_inf: whether a micro-batch had one, bool, shape (); None without micro-batches.
            total_norm: float64, shape ().
        """
        if self._scaler is None or self._given is not None:
            return
        infinite = ~total_norm.isfinite()
        infinite = infinite if found_inf is None else infinite | found_inf
        _record_found_inf(self._scaler, self._optimizers, infinite)
        if self._update:
            self._scaler.update()


def _record_found_inf(
    scaler: torch.amp.GradScaler,
    optimizers: list[torch.optim.Optimizer],
    found_inf: Tensor,
) -> None:
    """Tell the scaler, as its ``step`` would have, whether there was a NaN or Inf.

    ``unscale_`` would find that out by reading and writing all gradients once more, and has no
    bf16 on CUDA; the norm has told already. ``scaler.update()`` is to follow.
    """
    for optimizer in optimizers:
        state = scaler._per_optimizer_states[id(optimizer)]
        found = state["found_inf_per_device"]
        # What unscale_ found counts too; found_inf tells what it found on other ranks.
        found[found_inf.device] = found.get(found_inf.device, 0) + found_inf.float()
        state["stage"] = OptState.STEPPED


# --- grad_scale and found_inf, which GradScaler hands to an optimizer -----------------------------

_HANDED = ("grad_scale", "found_inf")


@contextlib.contextmanager
def taken_from(
    optimizer: torch.optim.Optimizer,
) -> Iterator[tuple[Tensor | None, Tensor | float] | None]:
    """What ``GradScaler.step`` left in the optimizer; it is not there in the meantime.

    None where it left nothing.
    """
    attributes = vars(optimizer)
    handed = {name: attributes.pop(name) for name in _HANDED if name in attributes}
    try:
        yield (handed.get("grad_scale"), handed.get("found_inf", 0.0)) if handed else None
    finally:
        attributes.update(handed)  # GradScaler deletes them


@contextlib.contextmanager
def handing(
    optimizer: torch.optim.Optimizer, grad_scale: Tensor, found_inf: Tensor
) -> Iterator[None]:
    """Leave the two in the optimizer, as ``GradScaler.step`` does, while it steps."""
    optimizer.grad_scale, optimizer.found_inf = grad_scale, found_inf
    try:
        yield
    finally:
        del optimizer.grad_scale, optimizer.found_inf


# --- the search for a scale -----------------------------------------------------------------------

#: Searches that spend no patience: 40 halvings lead from 2^40 down to 1.
_FREE = 40
#: Steps in which as many searches are free; torch's ``growth_interval``, after which S grows.
_INTERVAL = 2000


def is_search(
    verdict: Verdict, scaled: bool, loss_scale: float | None, infinite: bool, loss_is_bad: bool
) -> bool:
    """Whether a step was skipped because a GradScaler searches for its scale.

    What is known of such a step: the gradients of S times the loss overflowed. While S is above 1
    those of the loss itself may well be ordinary, and a lower S is the first thing to try. The
    dtype of the gradients tells no more: under autocast an Inf in a float32 ``.grad`` may come from
    an fp16 activation. At S = 1 and below the gradients of the loss themselves overflow.

    A NaN beside an Inf changes nothing: an Inf becomes a NaN on its way through backward (Inf - Inf
    in a matrix product, Inf times 0 in a ReLU). NaNs alone come from no overflow.

    Args:
        scaled: whether an enabled GradScaler scaled the loss.
        loss_scale: S at the time of the step; None if it is not known, as after ``unscale_`` in an
            attached optimizer.
        infinite: whether any gradient holds an Inf.
        loss_is_bad: whether the loss is known to be NaN or Inf.
    """
    if verdict is not Verdict.SKIP_NONFINITE or not scaled or not infinite or loss_is_bad:
        return False
    return loss_scale is None or loss_scale > 1


def overflowed(decision: GuardDecision, measured: GradNorm, loss_counts: bool) -> Tensor:
    """Whether a micro-batch has an Inf and no bad loss, on the device, bool, shape ().

    A window in which all did so, on all ranks, is a search; no rank may come to another answer.

    Args:
        loss_counts: whether the record has a loss.
    """
    found = (decision.verdict == int(Verdict.SKIP_NONFINITE)) & measured.nonfinite[:, 1].any()
    return found & decision.entries.loss.isfinite() if loss_counts else found


class Searches:
    """Which searches are free: they spend no patience.

    At most 40 in 2000 steps are: a scaler that never gets to a scale of 1, or whose scale is not
    known, must not let a run skip for ever.

    Args:
        steps: of the last free ones, as :meth:`state_dict` gave them.
    """

    def __init__(self, steps: Iterable[int] = ()):
        self._steps: deque[int] = deque(map(operator.index, steps), maxlen=_FREE)

    def is_free(self, step: int) -> bool:
        """Whether the search at this step is free; it is counted then."""
        if len(self._steps) == _FREE and step - self._steps[0] < _INTERVAL:
            return False
        self._steps.append(step)
        return True

    def state_dict(self) -> list[int]:
        return list(self._steps)
