"""torch.amp.GradScaler beside a guard: what it multiplied the loss by, what it found, its update.

GradScaler has no public access to its tensors, its stages and its per-optimizer states. Everything
that fastguard reads or writes of them is in this module; ``tests/guard/test_grad_scaler.py`` checks
them against the installed torch.
"""

import math
import weakref
from typing import NamedTuple

import torch
from torch import Tensor
from torch.amp.grad_scaler import OptState

from fastguard import ops

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


def scale_of(scaler: torch.amp.GradScaler | None, device: torch.device) -> Tensor | None:
    """What the scaler multiplied the loss by, float64, shape (); None for 1."""
    if not enabled(scaler):
        return None
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
    check_scaled(scaler)
    # Not by indexing: that makes an entry, and a scaler with entries can not be pickled.
    states = [scaler._per_optimizer_states.get(id(optimizer)) for optimizer in optimizers]
    stages = {OptState.READY if state is None else state["stage"] for state in states}
    if OptState.STEPPED in stages:
        raise ValueError(
            "the GradScaler has stepped this optimizer since its last update(): call "
            "scaler.update() after each step, or guard.step in place of scaler.step"
        )
    if stages == {OptState.READY, OptState.UNSCALED}:
        raise ValueError("scaler.unscale_ was called for some of the optimizers; call it for none")
    scale = scale_of(scaler, device)
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


def scaling_of(
    scaler: torch.amp.GradScaler | None,
    device: torch.device,
    optimizers: list[torch.optim.Optimizer],
) -> ops.Scaling | None:
    """The scaler's state, for the decision to update in the same call.

    None where that is not all that ``update`` has to do: a scaler of another class may do more, as
    ShardedGradScaler asks all ranks, and what it found for an optimizer that the guard does not
    step counts too.
    """
    if not enabled(scaler):
        return None
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


def copy_of(scaling: ops.Scaling | None) -> tuple[Tensor, ...]:
    return () if scaling is None else tuple(tensor.clone() for tensor in scaling[:2])


def restore(scaling: ops.Scaling | None, copies: tuple[Tensor, ...]) -> None:
    for tensor, copy in zip(scaling or (), copies, strict=False):
        tensor.copy_(copy)


def record_found_inf(
    scaler: torch.amp.GradScaler | None,
    optimizers: list[torch.optim.Optimizer],
    found_inf: Tensor,
) -> None:
    """Tell the scaler, as its ``step`` would have, whether there was a NaN or Inf.

    ``unscale_`` would find that out by reading and writing all gradients once more, and has no
    bf16 on CUDA; the norm has told already. ``scaler.update()`` is to follow.
    """
    if not enabled(scaler):
        return
    for optimizer in optimizers:
        state = scaler._per_optimizer_states[id(optimizer)]
        found = state["found_inf_per_device"]
        # What unscale_ found counts too; found_inf tells what it found on other ranks.
        found[found_inf.device] = found.get(found_inf.device, 0) + found_inf.float()
        state["stage"] = OptState.STEPPED
