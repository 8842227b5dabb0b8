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
    """The scale and the findings of a GradScaler in one step."""

    #: The scale that the gradients still have, float64, shape (); None for 1.
    scale: Tensor | None
    #: Non-zero if the scaler found a NaN or Inf, perhaps on another rank; None if it did not look.
    found_inf: Tensor | None
    #: The scale of the loss, float64, shape (), also after ``unscale_``. None without a scaler, and
    #: in an attached optimizer after ``unscale_``.
    of_loss: Tensor | None = None

    @property
    def used(self) -> bool:
        """Whether a scaler scaled the loss."""
        return self.found_inf is not None or self.of_loss is not None

    def reject(self, unscale: Tensor | None) -> Tensor | None:
        """``unscale``; a factor that makes every norm non-finite if the scaler found a NaN or Inf.

        The factor is NaN after ``unscale_``: the NaN or Inf may be on another rank. Otherwise it is
        Inf. The norm of this rank is NaN or Inf in this case, and an Inf stays an Inf.
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
    """ValueError if the scaler never scaled a loss: the gradients have no scale to divide by."""
    if enabled(scaler) and scaler._scale is None:
        raise ValueError(
            "this GradScaler has not scaled a loss yet, and the gradients would be divided by its "
            f"scale of {scaler.get_scale():g}: call scaler.scale(loss).backward() instead of "
            "loss.backward(), or leave scaler= out"
        )


def check_not_unscaled(scaler: torch.amp.GradScaler | None) -> None:
    """ValueError after ``scaler.unscale_``: ``guard.step`` unscales the sums of a window."""
    if enabled(scaler) and any(
        state["stage"] is OptState.UNSCALED for state in scaler._per_optimizer_states.values()
    ):
        raise ValueError(
            "scaler.unscale_ was called, but guard.accumulate takes gradients as they are and "
            "guard.step unscales their sums: leave scaler.unscale_ out"
        )


def check_shared(scaler: torch.amp.GradScaler | None, guard, update_scaler: bool | None) -> None:
    """ValueError if two guards would each call ``update`` of one scaler."""
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
    """The scaler's factor of the loss, float64, shape ()."""
    check_scaled(scaler)
    return scaler.scale(torch.ones((), device=device)).double()


def loss_scale(
    scaler: torch.amp.GradScaler | None,
    optimizers: list[torch.optim.Optimizer],
    device: torch.device,
) -> LossScale:
    """The scale that the gradients still have, or the findings of ``scaler.unscale_``.

    Raises:
        ValueError: no loss was scaled; ``unscale_`` was called for some of the optimizers only;
            ``scaler.step`` was called for one of them since the last update.
    """
    if not enabled(scaler):
        return NOT_SCALED
    scale = _current_scale(scaler, device)
    # get, because [] would create an entry: a scaler with entries cannot be pickled.
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
    """A LossScale from ``grad_scale`` and ``found_inf``, which ``GradScaler.step`` leaves."""
    if scale is not None:
        scale = torch.as_tensor(scale).to(device, torch.float64, non_blocking=True).reshape(())
    found = torch.as_tensor(found_inf).to(device, torch.float64, non_blocking=True).reshape(())
    return LossScale(scale, found, scale)


def _state(
    scaler: torch.amp.GradScaler, device: torch.device, optimizers: list[torch.optim.Optimizer]
) -> ops.Scaling | None:
    """The scaler's state, which the decision updates in the same call, or None.

    None means that ``scaler.update`` has more to do. The scaler may be of another class: for
    example, ShardedGradScaler communicates with all ranks. Or the scaler has findings for an
    optimizer that the guard does not step.
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
        scaler: the GradScaler; None or a disabled one means that no scaler is in use.
        handed: ``grad_scale`` and ``found_inf`` of an attached optimizer, as :func:`taken_from`
            returns them. The scaler itself is unknown in this case, and the loop updates it.
        update: whether the guard calls ``scaler.update()``.
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
        """The scaler's state for the decision to update, or None if the decision cannot do it."""
        if self._scaler is None or not self._update or self.scale.found_inf is not None:
            return None
        self._given = _state(self._scaler, self._device, self._optimizers)
        self._before = [] if self._given is None else [t.clone() for t in self._given[:2]]
        return self._given

    def undo(self) -> None:
        """Restore the scaler's state from before the decision."""
        for tensor, before in zip(self._given or (), self._before, strict=False):
            tensor.copy_(before)

    def finish(self, found_inf: Tensor | None, total_norm: Tensor) -> None:
        """Tell the scaler of a NaN or Inf and update it, unless the decision has done so.

        Args:
            found_inf: whether a micro-batch had a NaN or Inf, bool, shape (); None without
                micro-batches.
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
    """Record in the scaler whether there was a NaN or Inf, as its own ``step`` does.

    ``unscale_`` would read and write all gradients once more to find this out, and it has no bf16
    on CUDA. The norm already tells. The caller calls ``scaler.update()`` afterwards.
    """
    for optimizer in optimizers:
        state = scaler._per_optimizer_states[id(optimizer)]
        found = state["found_inf_per_device"]
        # Keep the findings of unscale_ on this rank; found_inf includes those of other ranks.
        found[found_inf.device] = found.get(found_inf.device, 0) + found_inf.float()
        state["stage"] = OptState.STEPPED


# --- grad_scale and found_inf, which GradScaler hands to an optimizer -----------------------------

_HANDED = ("grad_scale", "found_inf")


@contextlib.contextmanager
def taken_from(
    optimizer: torch.optim.Optimizer,
) -> Iterator[tuple[Tensor | None, Tensor | float] | None]:
    """``grad_scale`` and ``found_inf`` that ``GradScaler.step`` left in the optimizer, or None.

    The optimizer does not have these attributes inside the context.
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
    """Set ``grad_scale`` and ``found_inf`` in the optimizer during a step, as GradScaler does."""
    optimizer.grad_scale, optimizer.found_inf = grad_scale, found_inf
    try:
        yield
    finally:
        del optimizer.grad_scale, optimizer.found_inf


# --- the search for a scale -----------------------------------------------------------------------

#: The number of searches that spend no patience: 40 halvings lead from 2^40 down to 1.
_FREE = 40
#: The number of steps in which so many searches are free: torch's ``growth_interval``, after which
#: S grows.
_INTERVAL = 2000


def is_search(
    verdict: Verdict, scaled: bool, loss_scale: float | None, infinite: bool, loss_is_bad: bool
) -> bool:
    """Whether a step was skipped because a GradScaler searches for its scale.

    In such a step the gradients of S times the loss overflowed. While S is above 1, the gradients
    of the loss itself may be ordinary, and a lower S is the first thing to try. At S = 1 and below
    the gradients of the loss itself overflow. The dtype of the gradients does not help: under
    autocast an Inf in a float32 ``.grad`` may come from an fp16 activation.

    A NaN beside an Inf changes nothing: the backward pass turns an Inf into a NaN (Inf - Inf in a
    matrix product, Inf times 0 in a ReLU). NaNs without an Inf do not come from an overflow.

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
    """Whether a micro-batch has an Inf and no bad loss: bool, shape (), on the device.

    A window is a search if this holds for all its micro-batches on all ranks. The ranks must agree
    on it.

    Args:
        loss_counts: whether the record has a loss.
    """
    found = (decision.verdict == int(Verdict.SKIP_NONFINITE)) & measured.nonfinite[:, 1].any()
    return found & decision.entries.loss.isfinite() if loss_counts else found


class Searches:
    """Counts the searches that are free, which means that they spend no patience.

    At most 40 searches in 2000 steps are free. A scaler that never reaches a scale of 1, or whose
    scale is unknown, must not let a run skip for ever.

    Args:
        steps: the steps of the last free searches, from :meth:`state_dict`.
    """

    def __init__(self, steps: Iterable[int] = ()):
        self._steps: deque[int] = deque(map(operator.index, steps), maxlen=_FREE)

    def is_free(self, step: int) -> bool:
        """Whether the search at this step is free. A free search is counted."""
        if len(self._steps) == _FREE and step - self._steps[0] < _INTERVAL:
            return False
        self._steps.append(step)
        return True

    def state_dict(self) -> list[int]:
        return list(self._steps)
