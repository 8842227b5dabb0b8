"""Gradient accumulation that leaves bad micro-batches out."""

import functools
import logging
import math

import torch
from torch import Tensor, distributed, nn

from fastguard import ops
from fastguard._tensors import is_dtensor, local_parts, readable, scale_

from .buffers import Buffers
from .decision import Gradients, measurable, present, scalar, unscale_factor
from .distributed import Ranks
from .grad_scaler import check_not_unscaled, enabled, loss_scale, overflowed
from .parameters import Watched
from .report import PendingReport
from .update import reads_decision

logger = logging.getLogger(__name__)

#: The dtypes of the sums where they differ from those of the gradients.
_WIDE = {torch.bfloat16: torch.float32, torch.float16: torch.float32}


class Window:
    """The micro-batches of one step: the sums of the good ones' gradients, and their weight.

    The device decides which micro-batches are good; the host does not know it here. The sums are
    separate tensors, and the tensor in ``.grad`` stays: it may be static memory of a CUDA graph, a
    part of a flat buffer or a view of DDP's bucket. It is set to zero in place. The next backward
    pass may then add to it or overwrite it, with the same result.

    Args:
        buffers: a copy of the guard's :class:`Buffers` from before the first micro-batch.
        scaler: the GradScaler that scales the losses, or None.
    """

    def __init__(self, buffers: Buffers, device: torch.device, scaler: torch.amp.GradScaler | None):
        self._scaled = enabled(scaler)
        #: Whether a micro-batch had a NaN or Inf. A GradScaler has to be told.
        self.found_inf = torch.zeros((), dtype=torch.bool, device=device)
        self.reports: list[PendingReport] = []
        self.buffers = buffers
        #: The number of micro-batches, the number of good ones, and the weight of the good ones.
        self._counts = torch.zeros(3, dtype=torch.float64, device=device)
        #: The number of micro-batches for which ``grad_scaler.overflowed`` is true.
        self._overflowed = torch.zeros((), dtype=torch.float64, device=device)
        self._sums: dict[Tensor, tuple[str, Tensor]] = {}
        #: The gradients that stayed in place, and their versions after they were set to zero.
        self._cleared: dict[Tensor, tuple[Tensor, int]] = {}
        #: The parameters whose ``.grad`` is a sum, and the ``grad_dtype`` that they had before.
        self._handed: dict[Tensor, torch.dtype | None] = {}

    @property
    def weight(self) -> Tensor:
        return self._counts[2]

    @property
    def all_overflowed(self) -> Tensor | None:
        """Whether all micro-batches overflowed, bool, shape (); None without a GradScaler."""
        return self._overflowed == self._counts[0] if self._scaled else None

    def check(self, scaler: torch.amp.GradScaler | None) -> None:
        """ValueError if the window began with a scaler and this is none, or vice versa.

        A scaler whose ``unscale_`` was called is a ValueError too.
        """
        if self._scaled != enabled(scaler):
            raise ValueError(
                "a window's accumulate() and step() need the same GradScaler, or all of them none"
            )
        check_not_unscaled(scaler)

    def check_complete(self, names: list[str], parameters: list[Tensor]) -> None:
        """ValueError if a parameter has a gradient that was not accumulated."""
        for name, p in zip(names, parameters, strict=True):
            cleared, version = self._cleared.get(p, (None, None))
            if p.grad is not cleared or p.grad._version != version:
                raise ValueError(
                    f"{name} has a gradient that was not accumulated: call guard.accumulate() "
                    "after each backward of the window, the last one too"
                )

    def add(
        self,
        names: list[str],
        parameters: list[Tensor],
        decision: ops.GuardDecision,
        weight: float,
        report: PendingReport,
        overflowed: Tensor | None = None,
    ) -> None:
        """Add the gradients to the sums if the verdict is good, and clear them in any case.

        Args:
            overflowed: whether this micro-batch overflowed; None without a GradScaler.
        """
        verdict = decision.verdict
        self.found_inf = self.found_inf | ~decision.entries.total_norm.isfinite()
        if overflowed is not None:
            self._overflowed += overflowed
        for name, p in zip(names, parameters, strict=True):
            if p not in self._sums:
                self._sums[p] = name, _zeros_for(p.grad, p.grad.dtype)
        sums = readable(local_parts([self._sums[p][1] for p in parameters]))
        grads = local_parts([p.grad for p in parameters])
        grads = [grad.resolve_conj() for grad in grads]  # the operator reads memory as it is
        ops.accumulate_(sums, readable(grads), verdict, self._counts, weight)
        self._clear(parameters)
        self.buffers.settle(verdict)
        self.reports.append(report)

    def _clear(self, parameters: list[Tensor]) -> None:
        kept = []
        for p in parameters:
            # The version of a DTensor does not count writes. An expanded tensor and an inference
            # tensor cannot be set to zero in place.
            if is_dtensor(p.grad) or p.grad.is_inference() or ops.overlaps_itself(p.grad):
                p.grad = None
            else:
                kept.append(p)
        if kept:
            torch._foreach_zero_(readable([p.grad for p in kept]))
        self._cleared |= {p: (p.grad, p.grad._version) for p in kept}

    def add_up(self, ranks: Ranks, watched: Watched) -> None:
        """Add the sums and weights up over all replicas, each of which saw its own micro-batches.

        A backward pass of DDP that is not under ``no_sync`` has averaged the gradients already.
        Every replica then adds the same gradient, and the mean stays right.

        A replica without a gradient of a parameter adds zeros for it. In this case the host reads
        which parameters had a gradient on another replica (a host-device sync).
        """
        sums = [
            self._sums[p][1] if p in self._sums else _zeros_for(p, p.dtype)
            for p in watched.parameters
        ]
        present = [p in self._sums for p in watched.parameters]
        told = torch.tensor(present, dtype=torch.float64).to(self._counts.device, non_blocking=True)
        found = torch.stack([self.found_inf.double(), self._overflowed])
        told = ranks.sum_of(torch.cat([self._counts, found, told]))
        ranks.add_up_(sums)
        self._counts, self.found_inf, self._overflowed = told[:3], told[3] > 0, told[4]
        elsewhere = present if all(present) else [n > 0 for n in told[5:].tolist()]
        rows = zip(watched.parameters, watched.names, sums, elsewhere, strict=True)
        self._sums = {p: (name, total) for p, name, total, there in rows if there}

    def gradients(self) -> tuple[list[str], list[Tensor]]:
        """The names of the parameters, and the sums of their gradients."""
        return [name for name, _ in self._sums.values()], [t for _, t in self._sums.values()]

    def hand_over(
        self, optimizer: torch.optim.Optimizer, grads: list[Tensor], decision: ops.GuardDecision
    ) -> ops.GuardDecision:
        """Put the sums into ``.grad`` of the optimizer's parameters; returns the decision for them.

        fastguard's optimizers take float32 gradients of 16-bit parameters. For other optimizers the
        float32 means are computed here and then rounded to the dtype of the parameter, because a
        sum might overflow in float16. The returned decision has the coefficient 1 in this case.
        """
        held = [p for group in optimizer.param_groups for p in group["params"] if p in self._sums]
        sums = [self._sums[p][1] for p in held]
        wide = reads_decision(optimizer)
        if not wide and any(_dtype_for(p) != s.dtype for p, s in zip(held, sums, strict=True)):
            coef = decision.grad_coef
            if coef.dim() > 0:
                row_of = {id(grad): row for row, grad in enumerate(grads)}
                coef = coef[torch.tensor([row_of[id(s)] for s in sums], device=coef.device)]
            scale_(sums, coef)
            sums = [s.to(_dtype_for(p)) for p, s in zip(held, sums, strict=True)]
            decision = decision._replace(grad_coef=coef.new_ones(()))
        for p, total in zip(held, sums, strict=True):
            self._handed[p] = p.grad_dtype
            p.grad = None
            p.grad_dtype = total.dtype
            p.grad = total
        return decision

    def take_back(self) -> None:
        """Undo :meth:`hand_over`."""
        for p, dtype in self._handed.items():
            p.grad = None
            p.grad_dtype = dtype
            p.grad = self._cleared.get(p, (None, None))[0]
        self._handed = {}


def _zeros_for(like: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros_like(like, dtype=_WIDE.get(dtype, dtype), requires_grad=False)


def _dtype_for(parameter: Tensor) -> torch.dtype:
    return parameter.grad_dtype or parameter.dtype


def check_summable(names: list[str], grads: list[Tensor]) -> None:
    """ValueError for gradients that cannot be added up in place."""
    for name, grad in zip(names, grads, strict=True):
        if grad.layout != torch.strided:
            raise ValueError(
                f"the gradient of {name} is sparse: GradGuard.accumulate takes dense ones; use "
                "sparse=False"
            )
    if len(set(map(id, grads))) < len(grads):
        raise ValueError(
            "two parameters share one gradient tensor: GradGuard.accumulate cannot tell whose "
            "sum it is; give each its own"
        )


def check_alone(module: nn.Module | None) -> None:
    """Check that a guard without a process_group sees the gradients of all replicas.

    Raises:
        ValueError: a DDP module did not average the gradients of its last backward pass.
    """
    parts = [] if module is None else module.modules()
    replicas = [p for p in parts if isinstance(p, nn.parallel.DistributedDataParallel)]
    for part in replicas:
        # The first attribute is the present setting. The second one is the setting at the last
        # forward pass, and the backward pass follows that one.
        if not (part.require_backward_grad_sync and part.require_forward_param_sync):
            raise ValueError(
                "under DistributedDataParallel.no_sync() the gradients are those of this rank "
                "alone, and the ranks would take different steps: give GradGuard process_group="
                "torch.distributed.group.WORLD, which adds the windows up over the ranks"
            )
    if not replicas and distributed.is_available() and distributed.is_initialized():
        _warn_of_ranks(distributed.get_world_size())


@functools.cache
def _warn_of_ranks(size: int) -> None:
    if size > 1:
        logger.warning(
            "torch.distributed has %d ranks, and this guard decides by itself. If they train the "
            "same parameters under DDP's no_sync(), give GradGuard process_group="
            "torch.distributed.group.WORLD, or their weights diverge",
            size,
        )


class Accumulating:
    """:meth:`fastguard.GradGuard.accumulate`."""

    def __init__(self):
        #: The micro-batches of the next step; None before the first.
        self._window: Window | None = None

    @torch._disable_dynamo
    @torch.no_grad()
    def accumulate(
        self,
        *,
        scaler: torch.amp.GradScaler | None = None,
        loss: Tensor | float | None = None,
        batch_id: object = None,
        weight: float = 1.0,
    ) -> PendingReport:
        """Take a micro-batch's gradients out of ``.grad`` and add them up, unless they are bad.

        ::

            optimizer.zero_grad()
            for micro_batch in window:
                loss(model, micro_batch).backward()     # not divided by the number of micro-batches
                guard.accumulate(batch_id=micro_batch.id)
            guard.step(optimizer)                        # applies the mean of the good ones

        A micro-batch is bad where a step with its gradients alone would be skipped; its
        contribution, also to the module's buffers, is as if it had never been. (A parameter that
        only bad ones reach has a gradient of zero then, not None.) A window of bad ones only is a
        skipped step.

        The sums are float32, of float64 gradients float64, and take the memory of one more set of
        gradients. So four float16 micro-batches of 30000 have the mean 30000. The tensors in
        ``.grad`` stay where they are and are set to zero, here and by :meth:`step`: they may be
        static memory of a CUDA graph, parts of a flat buffer or views of DDP's buckets.
        :class:`fastguard.AdamW` steps with the float32 mean; for another optimizer it is rounded
        to the dtype of the parameter.

        With DistributedDataParallel, give GradGuard ``process_group=torch.distributed.group.WORLD``
        and run the backwards under ``no_sync()``: each rank decides about its own micro-batches,
        and :meth:`step` adds sums and weights up over the ranks, by all-reduces of the float32
        sums. A micro-batch that is bad on one rank is left out on that rank alone. A backward that
        DDP does average is right too, and communicates twice. Every rank needs at least one
        micro-batch in each window. Of DTensors the gradients are whole only over all ranks, so a
        micro-batch is bad for all or none, and :meth:`step` adds nothing up.

        Args:
            scaler, loss, batch_id: as for :meth:`step`; with the same scaler in all calls.
            weight: share of this micro-batch in the mean: 1 for losses that are means, the number
                of items for losses that are sums over items.

        Returns:
            What would have become of a step with these gradients alone.

        Raises:
            ValueError: a weight that is not a positive number; another scaler than before, or one
                whose ``unscale_`` was called; no gradients, or some that are sparse or shared by
                two parameters, or that :meth:`step` would refuse; those of one rank alone, under
                DDP's ``no_sync`` without a ``process_group``. Nothing was changed then.
        """
        try:
            return self._accumulate(scaler, loss, batch_id, float(weight))
        except BaseException:
            self._heal_buffers()
            raise

    def _accumulate(self, scaler, loss, batch_id, weight: float) -> PendingReport:
        if not 0 < weight < math.inf:
            raise ValueError(f"weight must be a positive number, got {weight}")
        if self._watched.refresh():
            self._look_up_again()
        decider = self._decider
        if decider.ranks is None:
            check_alone(self._watched.module)
        self._lay_out()
        names, parameters, grads = present(self._watched.names, self._watched.parameters)
        if not grads:
            raise ValueError(
                "no gradient to accumulate: call this after backward, before zero_grad"
            )
        values = measurable(names, local_parts(grads))
        check_summable(names, grads)
        device = grads[0].device
        loss = scalar(loss, device)
        window = self._window or Window(self._buffers.copy(), device, scaler)
        window.check(scaler)
        scale = loss_scale(scaler, [], device)
        together = decider.ranks is not None and not decider.replicated
        if together:
            names_of_all, values = decider.ranks.all_of(names, values, device)
        else:
            names_of_all = names
        unscale = unscale_factor(scale.scale, weight, device)
        found = Gradients(names_of_all, values, unscale, loss)
        measured, decision = decider.decide_micro_batch(found, self._steps, self._rules)
        self._window = window
        number, loss_counts = len(window.reports), loss is not None or together
        batch_id = f"micro-batch {number}" if batch_id is None else batch_id
        report = PendingReport(
            self._steps, batch_id, decision.record, measured, unscale, names_of_all, loss,
            scaled=scale, micro_batch=number, loss_counts=loss_counts,
        )  # fmt: skip
        over = overflowed(decision, measured, loss_counts) if scale.used else None
        window.add(names, parameters, decision, weight, report, over)
        return report
