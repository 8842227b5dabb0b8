"""Going back to a state from before the explosion, in the running process."""

import copy
import dataclasses
import logging
import random
from collections import deque
from typing import Any

import numpy
import torch
from torch import Tensor

from .apply import plain_class

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Rollback:
    """How :class:`fastguard.GradGuard` goes back when its patience is spent.

    The state of parameters, optimizer, buffers, scheduler, GradScaler, guard and random number
    generators (torch's of the CPU and of CUDA, Python's and numpy's) is copied to
    host memory every ``every`` steps; ``keep`` copies are held. Restoring is exact: it
    copies, it does not undo arithmetic. Each copy serves once; a run that explodes again goes
    further back, and ends with :class:`fastguard.GradientExplosionError` when there is none left.
    The position in the data is not turned back: the run goes on with new batches, as PaLM's did
    (Chowdhery et al. 2022, section 5.1).

    Raises:
        ValueError: ``every`` < 1, ``keep`` < 1, ``lr_factor`` not in (0, 1], ``skip_batches`` < 0.
    """

    #: Steps between copies.
    every: int = 500
    #: Copies held; each takes as much memory as parameters and optimizer state.
    keep: int = 3
    #: The learning rate is multiplied by this at each rollback.
    lr_factor: float = 0.5
    #: Batches that are passed over after a rollback; see ``GradGuard.skip_batch``.
    skip_batches: int = 0
    #: A learning rate scheduler, whose state and ``base_lrs`` are restored and lowered too.
    scheduler: Any = None

    def __post_init__(self):
        for name, low in (("every", 1), ("keep", 1), ("skip_batches", 0)):
            if getattr(self, name) < low:
                raise ValueError(f"Rollback: {name} must be >= {low}, got {getattr(self, name)}")
        if not 0 < self.lr_factor <= 1:
            raise ValueError(f"Rollback: lr_factor must be in (0, 1], got {self.lr_factor}")


class Snapshots:
    """The ring of copies. What is copied is given each time: models and optimizers may grow."""

    def __init__(self, rollback: Rollback):
        self._rollback = rollback
        self._ring: deque[dict] = deque(maxlen=rollback.keep)
        self._last_step: int | None = None
        self._lr_factor = 1.0  # of all rollbacks so far

    def __len__(self) -> int:
        return len(self._ring)

    def clear(self) -> None:
        self._ring.clear()
        self._last_step = None

    def due(self, step: int) -> bool:
        return self._last_step is None or step - self._last_step >= self._rollback.every

    def take(self, step: int, parameters: list[Tensor], optimizers, scaler, guard: dict) -> None:
        """Copy the state after ``step`` steps; ``guard`` is kept as it is."""
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
                "generators": _generators(),
                "lr_factor": self._lr_factor,
            }
        )

    def postpone(self, step: int) -> None:
        """Take no copy before there were good steps again."""
        self._last_step = step

    def forget_since(self, step: int, optimizers) -> None:
        """Drop copies that are younger than the explosion, or of other optimizers or groups."""
        now = [(o, _groups_of(o)) for o in optimizers]
        fitting = [
            s
            for s in self._ring
            if s["step"] <= step and [(o, groups) for o, groups, _ in s["optimizers"]] == now
        ]
        self._ring.clear()
        self._ring.extend(fitting)

    @torch.no_grad()
    def restore(self, step: int) -> dict:
        """Go back to the newest copy and drop it; returns the guard's state of that time."""
        snapshot = self._ring.pop()
        self._last_step = step  # the next copy comes when it has gone well for a while
        self._lr_factor *= self._rollback.lr_factor
        ratio = self._lr_factor / snapshot["lr_factor"]
        for parameter, saved in snapshot["parameters"]:
            parameter.copy_(saved)
        for optimizer, _, saved in snapshot["optimizers"]:
            _load_exactly(optimizer, saved)
        if snapshot["scaler"] is not None:
            scaler, saved = snapshot["scaler"]
            if saved:  # {} of one that is disabled
                scaler.load_state_dict(saved)
        groups = [group for o, _, _ in snapshot["optimizers"] for group in o.param_groups]
        if self._rollback.scheduler is not None:
            self._rollback.scheduler.load_state_dict(snapshot["scheduler"])
            _lower_scheduler(self._rollback.scheduler, ratio)
        for group in groups:
            for name in _RATES & group.keys():
                group[name] = group[name] * ratio
        _set_generators(snapshot["generators"])
        logger.warning(
            "Rolled back to the state after step %d; learning rate %s from here, the next %d "
            "batches are skipped",
            snapshot["step"],
            ", ".join(f"{float(group['lr']):.3g}" for group in groups),
            self._rollback.skip_batches,
        )
        return snapshot["guard"]


#: What optimizers and schedulers keep of learning rates: in the groups, and in themselves.
_RATES = {"lr", "initial_lr", "max_lr", "min_lr"}
_SCHEDULER_RATES = ("base_lrs", "max_lrs", "min_lrs", "_last_lr")


def _lower_scheduler(scheduler, ratio: float) -> None:
    for part in (scheduler, *getattr(scheduler, "_schedulers", ())):  # SequentialLR and its like
        for name in _SCHEDULER_RATES:
            if isinstance(rates := getattr(part, name, None), list):
                setattr(part, name, [rate * ratio for rate in rates])


def _groups_of(optimizer) -> list[list[int]]:
    return [list(map(id, group["params"])) for group in optimizer.param_groups]


def _state_of(optimizer) -> dict:
    """Without the guard's, which is in an attached optimizer's state dict and is kept apart."""
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


def _to_host(value):
    if isinstance(value, Tensor):
        return value.to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _to_host(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_to_host, value))
    return copy.deepcopy(value)


def _generators() -> dict:
    states = {"torch": torch.get_rng_state(), "python": random.getstate()}
    states["numpy"] = numpy.random.get_state()
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def _set_generators(states: dict) -> None:
    torch.set_rng_state(states["torch"])
    random.setstate(states["python"])
    numpy.random.set_state(states["numpy"])
    if "cuda" in states:
        torch.cuda.set_rng_state_all(states["cuda"])
