"""Gradient accumulation that leaves bad micro-batches out."""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import ops
from .buffers import Buffers
from .clip import local_parts, readable
from .step_report import PendingReport


class Window:
    """The micro-batches of one step: the sums of the good ones' gradients, and their weight.

    Which are good is decided on the device and not known here.

    Args:
        buffers: a copy of the guard's, as they were before the first micro-batch.
        scaler: the GradScaler that scales the losses, if one does.
    """

    def __init__(self, buffers: Buffers, device: torch.device, scaler: torch.amp.GradScaler | None):
        self._scaled = _scales(scaler)
        #: Whether a micro-batch had a NaN or Inf: what a GradScaler has to hear of.
        self.found_inf = torch.zeros((), dtype=torch.bool, device=device)
        self.reports: list[PendingReport] = []
        self.buffers = buffers
        #: Micro-batches seen, the good ones, and the weight of the good ones.
        self._counts = torch.zeros(3, dtype=torch.float64, device=device)
        self._sums: dict[Tensor, tuple[str, Tensor]] = {}

    @property
    def weight(self) -> Tensor:
        return self._counts[2]

    def check(self, scaler: torch.amp.GradScaler | None, left_over: Sequence[str] = ()) -> None:
        """ValueError if this is not the window's scaler, or parameters have gradients left over."""
        if left_over:
            raise ValueError(
                f"{left_over[0]} has a gradient that was not accumulated: call guard.accumulate() "
                "after each backward of the window, the last one too"
            )
        if self._scaled != _scales(scaler):
            raise ValueError(
                "a window's accumulate() and step() need the same GradScaler, or all of them none"
            )

    def add(
        self,
        names: list[str],
        parameters: list[Tensor],
        decision: ops.GuardDecision,
        weight: float,
        report: PendingReport,
    ) -> None:
        """Move the parameters' gradients into the sums, if the verdict is good."""
        verdict = decision.verdict
        self.found_inf = self.found_inf | ~decision.record[2].isfinite()
        if not self.reports:
            # The first micro-batch gives its tensors away. They may hold anything until there is a
            # good micro-batch, which is copied, not added, if it is the first good one.
            self._sums = {
                p: (name, p.grad.resolve_conj()) for name, p in zip(names, parameters, strict=True)
            }
            ops.accumulate_([], [], verdict, self._counts, weight)
        else:
            for name, p in zip(names, parameters, strict=True):
                self._sums.setdefault(p, (name, None))
            self._sums = {
                p: (name, torch.zeros_like(p.grad) if total is None else total)
                for p, (name, total) in self._sums.items()
            }
            sums = [total for _, total in self._sums.values()]
            grads = [
                torch.zeros_like(total) if p.grad is None else p.grad
                for p, (_, total) in self._sums.items()
            ]
            sums, grads = readable(local_parts(sums)), readable(local_parts(grads))
            ops.accumulate_(sums, grads, verdict, self._counts, weight)
        for p in parameters:
            p.grad = None
        self.buffers.settle(verdict)
        self.reports.append(report)

    def gradients(self) -> tuple[list[str], list[Tensor]]:
        """Names of the parameters, and the sums of their gradients."""
        return [name for name, _ in self._sums.values()], [t for _, t in self._sums.values()]

    def hand_over(self) -> None:
        """Put the sums in the parameters' ``.grad``."""
        for p, (_, total) in self._sums.items():
            p.grad = total

    def take_back(self) -> None:
        """Undo :meth:`hand_over`."""
        for p in self._sums:
            p.grad = None


def _scales(scaler: torch.amp.GradScaler | None) -> bool:
    return scaler is not None and scaler.is_enabled()


def check_summable(names: list[str], grads: list[Tensor]) -> None:
    """ValueError for gradients that can not be added up in place."""
    for name, grad in zip(names, grads, strict=True):
        if grad.layout != torch.strided:
            raise ValueError(
                f"the gradient of {name} is sparse: GradGuard.accumulate takes dense ones; use "
                "sparse=False"
            )
    if len(set(map(id, grads))) < len(grads):
        raise ValueError(
            "two parameters share one gradient tensor: GradGuard.accumulate can not tell whose "
            "sum it is; give each its own"
        )
