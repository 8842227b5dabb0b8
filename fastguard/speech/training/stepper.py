"""The optimizer of a run and what steps it: the guard, or a loop without a guard."""

import logging
from pathlib import Path

import torch
from torch import nn

from fastguard import thresholds
from fastguard.guard import GradGuard
from fastguard.guard.report import StepReport
from fastguard.guard.statistics import as_plain, fresh_statistics
from fastguard.ops import Verdict
from fastguard.optim import AdamW
from fastguard.speech.storage.plain import shown

from .config import Config
from .parallel import Parallel
from .precision import keeps_masters, narrow_

logger = logging.getLogger(__name__)

_THRESHOLDS = {
    "fixed": thresholds.Fixed,
    "zclip": thresholds.ZClip,
    "median": thresholds.RunningMedian,
    "autoclip": thresholds.AutoClip,
    "adagc": thresholds.AdaGC,
}


def build_optimizer(config: Config, model: nn.Module, world_size: int) -> torch.optim.AdamW:
    """fastguard's AdamW with the guard, torch's without: runs then show the effect of both.

    Where the run :func:`keeps_masters`, the model's weights become bfloat16.
    """
    options = _options(config)
    if not config.guard.enabled:
        return torch.optim.AdamW(model.parameters(), fused=True, **options)
    if not keeps_masters(config, world_size):
        return AdamW(model.parameters(), **options)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    narrow_(model)
    optimizer = AdamW(model.parameters(), master_weights=True, **options)
    optimizer.load_master_state_dict(model, weights)
    return optimizer


def set_options(optimizer: torch.optim.Optimizer, config: Config) -> None:
    """Set the options of the settings, in place of those in the state of another run."""
    for group in optimizer.param_groups:
        group.update(_options(config))


def _options(config: Config) -> dict:
    optim = config.optim
    return {
        "lr": optim.lr,
        "betas": optim.betas,
        "eps": optim.eps,
        "weight_decay": optim.weight_decay,
    }


def build_stepper(
    config: Config, model: nn.Module, parallel: Parallel, report_dir: Path
) -> "GradGuard | PlainClip":
    """What clips gradients and steps the optimizer, or skips; the same in every process."""
    guard = config.guard
    if not guard.enabled:
        return PlainClip(model, guard.max_norm)
    return GradGuard(
        model,
        guard.max_norm,
        guard.skip_norm,
        guard.patience,
        threshold=_THRESHOLDS[guard.threshold](),
        report_dir=report_dir if parallel.main else None,
        process_group=parallel.group,
    )


def forget_norms(stepper: "GradGuard | PlainClip") -> None:
    """Let a guard learn anew which norms are usual, because more parameters learn from now on. By
    the norms of a head alone, those of the whole model would be outliers."""
    if isinstance(stepper, GradGuard):
        fresh = as_plain(fresh_statistics(torch.device("cpu")))
        known = stepper.state_dict()
        stepper.load_state_dict({**known, "statistics": fresh, "micro_statistics": fresh})


class PlainClip:
    """torch's clipping and an unconditional step, with the interface of a guard.

    The settings without a guard train with it, so that runs show the effect of the guard.

    Args:
        model: whose gradients are clipped.
        max_norm: largest gradient norm.
    """

    def __init__(self, model: nn.Module, max_norm: float):
        self.parameters = list(model.parameters())
        self.max_norm = max_norm
        self.steps = 0
        self._sums: list[torch.Tensor | None] | None = None
        self._weight = 0.0

    def accumulate(self, *, scaler=None, loss=None, batch_id=None, weight: float = 1.0) -> None:
        """Add and clear the gradients; :meth:`step` divides their sum by the sum of weights."""
        grads = [p.grad for p in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None
        if self._sums is None:
            self._sums = grads
        else:
            pairs = zip(self._sums, grads, strict=True)
            self._sums = [a if b is None else b if a is None else a + b for a, b in pairs]
        self._weight += weight

    def step(self, optimizer, *, scaler=None, loss=None, batch_id=None) -> StepReport:
        """Clip, and step the optimizer."""
        if self._sums is not None:
            for parameter, grad in zip(self.parameters, self._sums, strict=True):
                parameter.grad = None if grad is None else grad / self._weight
            self._sums, self._weight = None, 0.0
        if scaler is not None:
            scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.max_norm)
        norm = getattr(norm, "full_tensor", lambda: norm)().item()
        coef = min(1.0, self.max_norm / (norm + 1e-6))
        if not norm < float("inf"):
            logger.warning("Large gradient norm: %s at batch %s", norm, batch_id)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        self.steps += 1
        verdict = Verdict.CLIP if coef < 1 else Verdict.APPLY
        return StepReport(self.steps - 1, batch_id, verdict, norm, coef)

    def poll(self, wait: bool = False) -> list[StepReport]:
        """No reports: :meth:`step` returned them all."""
        return []  # every report was returned by step

    def state_dict(self) -> dict:
        """The number of steps."""
        return {"steps": self.steps}

    def load_state_dict(self, state: dict) -> None:
        """Take over what :meth:`state_dict` gave; raises ValueError for another state."""
        steps = state["steps"]
        if type(steps) is not int or steps < 0:
            raise ValueError(f"the state of a run without a guard holds steps={shown(steps)}")
        self.steps = steps
