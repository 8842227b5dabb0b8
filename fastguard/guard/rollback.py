"""Rollback to a state from before the explosion, in the running process."""

import contextlib
import copy
import dataclasses
import logging
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastguard._random import random_state, set_random_state
from fastguard._tensors import is_dtensor, local_parts

from .update import plain_class

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Rollback:
    """How :class:`fastguard.GradGuard` goes back when its patience is spent.

    Every ``every`` steps the guard copies the state of parameters, optimizer, buffers, scheduler,
    GradScaler, guard and random number generators (Python's, NumPy's, and torch's on the CPU and on
    CUDA) to host memory. It keeps the last ``keep`` copies. A rollback copies the state back, so it
    is exact, bit for bit. Each copy is used once: a run that explodes again goes further back. When
    no copy is left, it ends with :class:`fastguard.GradientExplosionError`. The position in the
    data does not go back: the run continues with new batches, as in PaLM (Chowdhery et al. 2022,
    section 5.1). With DTensors each rank copies its own shards, and all ranks go back together.

    A rollback multiplies the learning rate by ``lr_factor``. After every ``growth_interval``
    applied steps the rate is divided by ``lr_factor``, as a GradScaler's scale grows, until it is
    that of its schedule again. The factor applies only while the optimizer steps: ``param_groups``
    and schedulers keep their own rates. ``GradGuard.lr_factor`` is the present factor, and the
    guard's ``state_dict`` holds it.

    Raises:
        ValueError: ``every`` < 1, ``keep`` < 1, ``lr_factor`` not in (0, 1], ``growth_interval`` <
            1 or NaN, ``skip_batches`` < 0.
    """

    #: Steps between copies.
    every: int = 500
    #: How many copies are kept. Each needs as much memory as parameters and optimizer state.
    keep: int = 3
    #: The learning rate is multiplied by this at each rollback.
    lr_factor: float = 0.5
    #: Applied steps after which the rate is divided by ``lr_factor`` once; with inf it stays low.
    growth_interval: float = 500
    #: Batches that are passed over after a rollback; see ``GradGuard.skip_batch``.
    skip_batches: int = 0
    #: A learning rate scheduler that is restored too. Without one the schedule goes on.
    scheduler: Any = None

    def __post_init__(self):
        for name, low in (("every", 1), ("keep", 1), ("growth_interval", 1), ("skip_batches", 0)):
            if not getattr(self, name) >= low:
                raise ValueError(f"Rollback: {name} must be >= {low}, got {getattr(self, name)}")
        if not 0 < self.lr_factor <= 1:
            raise ValueError(f"Rollback: lr_factor must be in (0, 1], got {self.lr_factor}")


class RateFactor:
    """The factor of the learning rates: ``lr_factor`` to the power of ``backoffs``.

    Args:
        backoffs: the number of rollbacks minus the number of growths since.
        tracker: applied steps since the last change, like GradScaler's growth tracker.
    """

    def __init__(self, rollback: Rollback, backoffs: int = 0, tracker: int = 0):
        self._rollback = rollback
        self.backoffs, self.tracker = backoffs, tracker

    @property
    def value(self) -> float:
        return self._rollback.lr_factor**self.backoffs

    def back_off(self) -> None:
        self.backoffs, self.tracker = self.backoffs + 1, 0

    def applied(self) -> None:
        """Count an applied step; the factor may grow."""
        if self.backoffs > 0:
            self.tracker += 1
            if self.tracker >= self._rollback.growth_interval:
                self.backoffs, self.tracker = self.backoffs - 1, 0

    @contextlib.contextmanager
    def lowering(self, optimizers: list[torch.optim.Optimizer]) -> Iterator[None]:
        """Multiply the learning rates by the factor while the optimizers step.

        A rate that the step itself sets keeps its new value.
        """
        lowered = []
        try:
            if self.value < 1:
                for group in (group for o in optimizers for group in o.param_groups):
                    if (rate := group.get("lr")) is not None:
                        group["lr"] = rate * self.value
                        lowered.append((group, rate, group["lr"]))
            yield
        finally:
            for group, rate, while_stepping in lowered:
                if group["lr"] is while_stepping:
                    group["lr"] = rate


class Snapshots:
    """The last copies. Each call names what to copy: models and optimizers may grow."""

    def __init__(self, rollback: Rollback):
        self._rollback = rollback
        self._ring: deque[dict] = deque(maxlen=rollback.keep)
        self._last_step: int | None = None

    def __len__(self) -> int:
        return len(self._ring)

    def clear(self) -> None:
        self._ring.clear()
        self._last_step = None

    def due(self, step: int) -> bool:
        return self._last_step is None or step - self._last_step >= self._rollback.every

    def take(self, step: int, parameters: list[Tensor], optimizers, scaler, guard: dict) -> None:
        """Copy the state after ``step`` steps. ``guard`` is kept without a copy."""
        scheduler = self._rollback.scheduler
        self._last_step = step
        held = [p for o in optimizers for group in o.param_groups for p in group["params"]]
        unique = {id(p): p for p in (*parameters, *held)}.values()
        self._ring.append(
            {
                "step": step,
                "parameters": [(p, _to_host(p.detach())) for p in unique],
                "optimizers": [(o, _groups_of(o), _to_host(_state_of(o))) for o in optimizers],
                "scaler": None if scaler is None else (scaler, copy.deepcopy(scaler.state_dict())),
                "scheduler": None if scheduler is None else copy.deepcopy(scheduler.state_dict()),
                "guard": guard,
                "generators": random_state(),
            }
        )

    def postpone(self, step: int) -> None:
        """Take the next copy ``every`` steps from now."""
        self._last_step = step

    def forget_since(self, step: int, optimizers) -> None:
        """Drop copies from after the explosion, and copies of other optimizers or param groups."""
        now = [(o, _groups_of(o)) for o in optimizers]
        fitting = [
            s
            for s in self._ring
            if s["step"] <= step and [(o, groups) for o, groups, _ in s["optimizers"]] == now
        ]
        self._ring.clear()
        self._ring.extend(fitting)

    @torch.no_grad()
    def restore(self, step: int, factor: float) -> dict:
        """Restore the newest copy and drop it; returns the guard's state of that time.

        ``factor`` is the factor of the learning rates from now on, for the log. Without a scheduler
        to restore, the rates in the param groups stay: the schedule goes on, and a scheduler may
        compute each rate from the last one.
        """
        snapshot = self._ring.pop()
        self._last_step = step  # the next copy follows after ``every`` steps
        for parameter, saved in snapshot["parameters"]:
            local_parts([parameter])[0].copy_(saved.local if isinstance(saved, _Shard) else saved)
        for optimizer, _, saved in snapshot["optimizers"]:
            rates = [_rates_of(group) for group in optimizer.param_groups]
            _load_exactly(optimizer, _from_host(saved))
            if self._rollback.scheduler is None:
                for group, current in zip(optimizer.param_groups, rates, strict=True):
                    group.update(current)
        if snapshot["scaler"] is not None:
            scaler, saved = snapshot["scaler"]
            if saved:  # a disabled scaler has the state {}
                scaler.load_state_dict(saved)
        if self._rollback.scheduler is not None:
            self._rollback.scheduler.load_state_dict(snapshot["scheduler"])
        set_random_state(snapshot["generators"])
        groups = [group for o, _, _ in snapshot["optimizers"] for group in o.param_groups]
        logger.warning(
            "Rolled back to the state after step %d; learning rate %s from here, %.3g of the "
            "schedule's, the next %d batches are skipped",
            snapshot["step"],
            ", ".join(f"{float(group.get('lr') or 0) * factor:.3g}" for group in groups),
            factor,
            self._rollback.skip_batches,
        )
        return snapshot["guard"]


def _rates_of(group: dict) -> dict:
    """The entries of a param group that hold learning rates of optimizers and schedulers."""
    return {key: group[key] for key in ("lr", "initial_lr", "max_lr", "min_lr") if key in group}


def _groups_of(optimizer) -> list[list[int]]:
    return [list(map(id, group["params"])) for group in optimizer.param_groups]


def _state_of(optimizer) -> dict:
    """The optimizer's state without the guard's, which an attached optimizer's state dict holds."""
    return plain_class(optimizer).state_dict(optimizer)


def _load_exactly(optimizer, saved: dict) -> None:
    """``load_state_dict`` without its cast of all state to the parameter's dtype."""
    plain_class(optimizer).load_state_dict(optimizer, saved)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number, entries in saved["state"].items():
        state = optimizer.state[parameters[number]]
        for name, value in entries.items():
            if isinstance(value, Tensor) and state[name].dtype != value.dtype:
                state[name] = value.to(state[name].device, copy=True)


class _Shard:
    """The shard of a DTensor on this rank, in host memory."""

    def __init__(self, dtensor: Tensor):
        self.local = local_parts([dtensor])[0].to("cpu", copy=True)
        self._mesh, self._placements = dtensor.device_mesh, dtensor.placements
        self._shape, self._stride = dtensor.shape, dtensor.stride()

    def whole(self) -> Tensor:
        from torch.distributed.tensor import DTensor

        local = self.local.to(self._mesh.device_type, copy=True)
        layout = {"shape": self._shape, "stride": self._stride}
        return DTensor.from_local(local, self._mesh, self._placements, run_check=False, **layout)


def _from_host(value):
    """The value with each _Shard replaced by its DTensor."""
    if isinstance(value, _Shard):
        return value.whole()
    if isinstance(value, dict):
        return {key: _from_host(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_from_host, value))
    return value


def _to_host(value):
    if is_dtensor(value):
        return _Shard(value)
    if isinstance(value, Tensor):
        return value.to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _to_host(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_to_host, value))
    return copy.deepcopy(value)
