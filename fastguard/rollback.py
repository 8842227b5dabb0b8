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

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Rollback:
    """How :class:`fastguard.GradGuard` goes back when its patience is spent.

    The state of parameters, optimizer, buffers, scheduler, GradScaler, guard and random number
    generators (torch's, of the CPU and the current accelerator, Python's and numpy's) is copied to
    host memory every ``every`` accepted steps; ``keep`` copies are held. Restoring is exact: it
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
        self._newest_step: int | None = None
        self._lr_factor = 1.0  # of all rollbacks so far

    def __len__(self) -> int:
        return len(self._ring)

    def due(self, step: int) -> bool:
        return self._newest_step is None or step - self._newest_step >= self._rollback.every

    def take(self, step: int, parameters: list[Tensor], optimizers, scaler, guard: dict) -> None:
        """Copy the state after ``step``; ``guard`` is kept as it is."""
        scheduler = self._rollback.scheduler
        self._newest_step = step
        self._ring.append(
            {
                "step": step,
                "parameters": [
                    (p, _to_host(p.detach())) for p in _with_held(parameters, optimizers)
                ],
                "optimizers": [_to_host(optimizer.state_dict()) for optimizer in optimizers],
                "scaler": None if scaler is None else copy.deepcopy(scaler.state_dict()),
                "scheduler": None if scheduler is None else copy.deepcopy(scheduler.state_dict()),
                "guard": guard,
                "generators": _generators(),
                "lr_factor": self._lr_factor,
            }
        )

    @torch.no_grad()
    def restore(self, step: int, optimizers, scaler) -> dict:
        """Go back to the newest copy and drop it; returns the guard's state of that time."""
        snapshot = self._ring.pop()
        self._newest_step = step  # the next copy comes when it has gone well for a while
        self._lr_factor *= self._rollback.lr_factor
        for parameter, saved in snapshot["parameters"]:
            parameter.copy_(saved)
        for optimizer, saved in zip(optimizers, snapshot["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        if scaler is not None and snapshot["scaler"]:
            scaler.load_state_dict(snapshot["scaler"])
        ratio = self._lr_factor / snapshot["lr_factor"]
        scheduler = self._rollback.scheduler
        if scheduler is not None:
            scheduler.load_state_dict(snapshot["scheduler"])
            scheduler.base_lrs = [lr * ratio for lr in scheduler.base_lrs]
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        for group in groups:
            group["lr"] = group["lr"] * ratio
        _set_generators(snapshot["generators"])
        rates = ", ".join(f"{float(group['lr']):.3g}" for group in groups)
        logger.warning(
            "Rolled back to the state after step %d; learning rate %s from here, the next %d "
            "batches are skipped",
            snapshot["step"],
            rates,
            self._rollback.skip_batches,
        )
        return snapshot["guard"]


def _with_held(parameters: list[Tensor], optimizers) -> list[Tensor]:
    groups = (group for optimizer in optimizers for group in optimizer.param_groups)
    held = (p for group in groups for p in group["params"])
    return list({id(p): p for p in (*parameters, *held)}.values())


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
