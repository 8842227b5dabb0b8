"""The guard: measure the gradients, decide, apply. Three lines in any PyTorch loop.

The way of a step is :meth:`GradGuard.step`; each of its words has a module: parameters, measure,
decision, thresholds, apply, buffers, accumulate, step_report, bad_steps, budget, on_skip,
step_warnings, rollback, sharded.
"""

import copy
import math
import operator
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from fastguard import ops
from fastguard._tensors import local_parts
from fastguard.optim.checks import poisoned
from fastguard.thresholds import Fixed, Kind, Threshold, check_threshold

from . import attached
from .accumulation import Window, check_alone, check_summable
from .backward_hooks import BackwardMeasure
from .budget import Budget, Spent
from .buffers import Buffers, OnLoad
from .distributed import Ranks, check_whole, lay_out_, ranks_of
from .grad_scaler import (
    check_shared,
    copy_of,
    handed_scale,
    loss_scale,
    record_found_inf,
    restore,
    scaling_of,
)
from .lr_scheduler import GuardedScheduler
from .on_skip import OnSkip
from .parameters import Watched, measurable
from .report import PendingReport, StepReport
from .report_files import BadStepFiles, GradientExplosionError, log_skip
from .rollback import RateFactor, Rollback, Snapshots
from .scale_search import overflowed
from .statistics import as_plain, discarded, fresh_statistics, from_plain, scalar, unscaling
from .step_warnings import StepWarnings
from .tensor_norms import TensorNorms
from .update import check_steppable, reads_decision, step_optimizer, unwrapped

_VERSION = 2  # of the state dict; 1, which had none, knew the accepted norms only


class GradGuard:
    """Survive gradient explosions: skip what must not reach the weights, clip the rest.

    ::

        guard = GradGuard(model, max_norm=0.5, skip_norm=10.0)
        ...
        loss.backward()
        report = guard.step(optimizer)      # in place of clip_grad_norm_ and optimizer.step

    A step is skipped when the norm of all gradients (or the loss, if it is given) is NaN or Inf. A
    finite norm is an outlier, and its step is skipped, if it is above ``skip_norm`` *and* above 4
    times the median of itself and the last 128 norms *seen*, of at least 16. Seen are all finite
    norms of finite losses, also those of skipped steps, but neither norms of 0 nor the batches that
    are passed over after a rollback. Other norms are clipped. So a sudden jump is skipped, and a
    slow growth and two levels that alternate are clipped. A jump that stays spends the
    ``patience``; where that is above 64, the new level is ordinary after 64 steps and is clipped
    from there on. A rule "skip whatever is above 10" would skip for ever where 10 is an ordinary
    norm. A norm that is above 1e18 after clipping (with ``max_norm=inf``) is always skipped: fp32
    second moments could not hold its square.
    Micro-batches (:meth:`accumulate`) are judged by the norms of micro-batches in the same way.

    A skipped step leaves parameters and optimizer state as they are, bit for bit, and, where the
    guard was given a module, sets its buffers back to what they were after the last accepted step
    (or the last ``load_state_dict``, or :meth:`commit_buffers`). In an accepted step too, a buffer
    that became NaN or Inf is set back, with those of the same layer and a warning.

    The decision is taken and carried out on the gradients' device. The host learns of it later,
    when it looks at the report or in :meth:`poll`, which every step calls; on the CPU that is at
    once, on a GPU at most ``max_lag`` steps later. With :class:`fastguard.AdamW`, and with torch's
    ``fused=True`` optimizers, no step waits for the device; any other optimizer needs the host to
    know the verdict before it is called.

    The norm is that of every gradient among the guard's parameters, whichever optimizer holds them.
    Networks that are stepped apart, as a GAN's, need a guard each.

    Where processes train together, all come to the same decision, by one small all-reduce in each
    :meth:`step`, of DTensors also in :meth:`accumulate`: where parameters are DTensors, as FSDP2's
    ``fully_shard`` makes them, and where ``process_group`` is given. The norm is that of the whole
    gradients, and a NaN or Inf in the gradient or the loss of any rank is one of all. Every rank
    then has to make the same calls, with the same settings; of DTensors also with the same weights
    in :meth:`accumulate`. Shards that are no DTensors (FSDP1, ZeRO, DeepSpeed) are refused.

    Args:
        params_or_model: a module; or a parameter, or an iterable of parameters or of (name,
            parameter) pairs. A module's parameters are looked up again when those of the optimizer
            change and after ``load_state_dict``.
        max_norm: largest norm let through unclipped; inf turns clipping off.
        skip_norm: no norm up to this is an outlier; inf turns the skipping of finite norms off.
        patience: this many skips in a row, or more than half of the last 8 times as many steps
            skipped, raise :class:`GradientExplosionError`. Those of a GradScaler that searches for
            its scale do not count; see :attr:`StepReport.scale_search`.
        threshold: one of :mod:`fastguard.thresholds`, which learns where to clip below
            ``max_norm``; ``Fixed()`` by default.
        measure: "step" reads the gradients in :meth:`step`; "backward" measures each while it is
            still in the cache, by hooks (not where processes train together, whose gradients are
            added up after the hook).
        on_patience: "rollback" goes back to an earlier state instead of raising.
        rollback: how; by default ``Rollback()`` where ``on_patience`` is "rollback".
        report_dir: a folder for one JSON file per bad step: names of the non-finite parameters,
            the norms of all, the batch's id.
        on_skip: called with the :class:`StepReport` of each skipped step when the host learns of
            it, in order and once; also of each micro-batch that was left out (``micro_batch`` is
            its number then), before its step, and of batches passed over after a rollback. It runs
            inside of :meth:`step`, :meth:`poll` or :meth:`state_dict`, which raise what it raises,
            after the step was done and accounted for.
        max_lag: reports that may be on their way before a step waits for the oldest; where
            processes train together on a device, the host learns exactly so late, on all ranks.
        process_group: of the ranks that decide together, each of which holds a part of every
            parameter; ``torch.distributed.group.WORLD`` with DistributedDataParallel, whose
            gradients are equal but whose losses are not. By default all ranks of the DTensors'
            mesh, the largest of several; without DTensors this process decides by itself.
        buffers: more modules, or (name, buffer) pairs as ``named_buffers`` gives them, whose
            buffers this guard keeps as those of its own module: in a GAN's discriminator step the
            generator's forward pass writes the generator's BatchNorm statistics too.

    Raises:
        ValueError: no parameters, a negative or NaN threshold, ``patience`` or ``max_lag`` < 1, an
            unknown word, a ``rollback`` that nothing would use; a ``process_group`` that lacks
            ranks of a DTensor's mesh; DTensors or ``process_group`` with ``measure="backward"``;
            FSDP1, DeepSpeed, or optimizers that step in the backward pass.
        TypeError: something that is no parameter, threshold, function, module or buffer.
    """

    def __init__(
        self,
        params_or_model: nn.Module | Tensor | Iterable[Tensor] | Iterable[tuple[str, Tensor]],
        max_norm: float = 1.0,
        skip_norm: float = math.inf,
        patience: int = 25,
        *,
        threshold: Threshold | None = None,
        measure: Literal["step", "backward"] = "step",
        on_patience: Literal["raise", "rollback"] = "raise",
        rollback: Rollback | None = None,
        report_dir: str | Path | None = None,
        on_skip: Callable[[StepReport], object] | None = None,
        max_lag: int = 8,
        process_group: torch.distributed.ProcessGroup | None = None,
        buffers: nn.Module | Iterable[nn.Module | tuple[str, Tensor]] = (),
    ):
        self.max_norm = check_threshold("max_norm", max_norm)
        self.skip_norm = check_threshold("skip_norm", skip_norm)
        self.patience = _at_least_one("patience", patience)
        self.max_lag = _at_least_one("max_lag", max_lag)
        self.threshold = Fixed() if threshold is None else threshold
        if not isinstance(self.threshold, Threshold):
            raise TypeError(f"threshold must be one of fastguard.thresholds, got {threshold!r}")
        _one_of("measure", measure, "step", "backward")
        _one_of("on_patience", on_patience, "raise", "rollback")
        if rollback is not None and on_patience != "rollback":
            raise ValueError('a Rollback was given, but on_patience is "raise"; set "rollback"')

        self._watched = Watched(params_or_model)
        self._buffers = Buffers(self._watched.module, buffers)
        self._measure = BackwardMeasure() if measure == "backward" else None
        self._rollback = Rollback() if rollback is None else rollback
        self._snapshots = Snapshots(self._rollback) if on_patience == "rollback" else None
        self._rate = RateFactor(self._rollback)
        self._group = process_group
        self._ranks: Ranks | None = None  # None where this process decides by itself
        self._listening: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._found_others()
        self._files = BadStepFiles(report_dir)
        self._on_skip = OnSkip(on_skip)
        self._warnings = StepWarnings()

        device = self._watched.parameters[0].device
        self._statistics = fresh_statistics(device)
        self._micro_statistics = fresh_statistics(device)  # of what accumulate judges
        self._tensor_norms = TensorNorms()  # whose the columns of statistics.per_tensor are
        self._window: Window | None = None
        self._pending: deque[PendingReport] = deque()
        self._reports: deque[StepReport] = deque(maxlen=1000)  # for poll to return
        self._budget = Budget(self.patience)
        self._steps = 0
        self._batches_to_skip = 0
        self._discarded: int | None = None  # the last step that was, after a rollback
        self._stepping = False
        self._stepped: tuple = (), None  # optimizers and scaler of the last step
        self._attached: torch.optim.Optimizer | None = None
        self._described: tuple[object, Tensor | float | None] = None, None
        self._schedulers: list[GuardedScheduler] = []
        #: The report of the last step.
        self.last_report: PendingReport | None = None

    def __repr__(self) -> str:
        return (
            f"GradGuard(max_norm={self.max_norm:g}, skip_norm={self.skip_norm:g}, "
            f"patience={self.patience}, threshold={self.threshold}; "
            f"{len(self._watched.parameters)} parameters, {self._steps} steps)"
        )

    # --- a step ---------------------------------------------------------------------------------

    @torch._disable_dynamo  # in a compiled training loop the guard runs as it is
    @torch.no_grad()
    def step(
        self,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        *,
        scaler: torch.amp.GradScaler | None = None,
        loss: Tensor | float | None = None,
        batch_id: object = None,
        update_scaler: bool | None = None,
    ) -> PendingReport:
        """Clip and call ``optimizer.step()``, or skip; gradients stay for ``zero_grad`` to clear.

        :class:`fastguard.AdamW` leaves the gradients as they are, torch's ``fused=True`` optimizers
        write back what they used, and for others they are scaled in place where that changes them.

        Args:
            optimizer: any torch optimizer whose step needs no closure; or several that share one
                verdict, as Muon for the matrices and AdamW for the rest.
            scaler: the GradScaler that scaled the loss, if one did. The guard unscales, steps and
                updates it; do not call its ``step`` and ``update`` yourself.
            update_scaler: False leaves ``scaler.update()`` to you, once after the steps of several
                guards with one scaler. By default the guard updates, and refuses a scaler that
                another guard updates too; True allows that.
            loss: of this batch, one number, unscaled; NaN or Inf skips the step. Ranks that decide
                together may each give their own, or none: the report has the mean. With
                DistributedDataParallel and no ``process_group`` it must be the same in all, or
                their weights diverge.
            batch_id: anything that names the batch in reports, warnings and errors.

        Returns:
            A report that reads like a :class:`StepReport` and waits for the device when it is read.

        Raises:
            GradientExplosionError: the ``patience`` is spent. This step is done then.
            ValueError: no optimizer, or one twice; it needs a closure or holds a gradient that the
                guard does not watch; gradients of an unsupported dtype, on several devices, or not
                accumulated as the others of their window; a loss that is not one number; a scaler
                that scaled no loss, or is updated by another guard; a wrapper that holds a scaler
                or accumulates; an optimizer that is attached to another guard. Nothing was changed
                then.
            RuntimeError: the optimizer's ``step`` returned and had not carried the verdict out.
            Exception: what an optimizer raises. Its gradients may be scaled already then, and those
                of several that came before it have stepped.
        """
        optimizers = _listed(optimizer)
        for each in optimizers:
            check_steppable(each)
            attached.check_own(each, self)
        check_shared(scaler, self, update_scaler)
        return self._guarded(
            lambda: self._step(optimizers, scaler, loss, batch_id, update_scaler is not False)
        )

    @torch.no_grad()
    def step_attached(self, optimizer, handed, loss: Tensor | float | None) -> PendingReport:
        """The step of an attached optimizer, which calls this.

        Args:
            handed: the ``grad_scale`` and ``found_inf`` that ``GradScaler.step`` left in it; or
                None.
            loss: what its closure returned; :meth:`describe` comes first.
        """
        if handed is not None and self._window is not None:
            raise ValueError(
                "scaler.step(optimizer) does not see the gradients that guard.accumulate() took: "
                "call guard.step(optimizer, scaler=scaler), which updates the scaler too"
            )
        (batch_id, given), self._described = self._described, (None, None)
        loss = loss if given is None else given
        return self._guarded(
            lambda: self._step([optimizer], None, loss, batch_id, handed=handed, called_by_it=True)
        )

    def _guarded(self, step: Callable[[], PendingReport]) -> PendingReport:
        """``step``, and what has to happen before and after each."""
        if self._stepping:
            raise RuntimeError(
                "guard.step was called from inside guard.step: the optimizer's step calls the "
                "guard that calls it. Use guard.attach(optimizer), which makes optimizer.step() "
                "the guarded step"
            )
        self._stepping = True
        try:
            report = step()
        except BaseException:
            self._heal_buffers()
            raise
        finally:
            self._stepping = False
        self.last_report = report
        self._heed()
        self._take_snapshot()
        return report

    def _step(
        self,
        optimizers,
        scaler,
        loss,
        batch_id,
        update_scaler=True,
        handed=None,
        called_by_it=False,
    ) -> PendingReport:
        self._check(optimizers)
        self._lay_out()
        names, parameters, grads = self._watched.with_gradients()
        device = (grads or self._watched.parameters)[0].device
        loss = scalar(loss, device)
        window = self._window
        if window is not None:
            window.check(scaler)
            window.check_complete(names, parameters)
        if handed is None:
            scaled = loss_scale(scaler, optimizers, device)
        else:
            scaled = handed_scale(*handed, device)
        if window is not None:
            if self._replicated:
                window.add_up(self._ranks, self._watched)
            names, grads = window.gradients()
        elif not grads:
            self._watched.stale = True  # perhaps the module has other parameters by now
        present = names
        names, grads = _once(names, grads)
        if self._ranks is not None:
            names, grads = self._ranks.all_of(names, grads, device)
        unscale = unscaling(scaled.scale, 1.0 if window is None else window.weight, device)
        in_one = self._in_one_call and window is None and scaled.found_inf is None
        in_one = in_one and update_scaler and grads and not self._batches_to_skip
        scaling = scaling_of(scaler, device, optimizers) if in_one else None
        self._statistics = self._statistics_of(names, device)
        before, scaling_before = self._statistics.copy(), copy_of(scaling)
        measured, decision = self._judge(names, grads, scaled.reject(unscale), loss, scaling)

        try:
            with self._rate.lowering(optimizers):
                for each in optimizers:
                    own_step = attached.plain_step_of(each, called_by_it)
                    given = decision if window is None else window.hand_over(each, grads, decision)
                    step_optimizer(each, grads, given, own_step)
        except BaseException:
            self._statistics = before
            restore(scaling, scaling_before)
            intact = all(map(reads_decision, optimizers)) and not self._replicated
            self._window = window if intact else None
            raise
        finally:
            if window is not None:
                window.take_back()
        self._window = None
        self._buffers.settle(decision.verdict)
        if scaler is not None and scaling is None:
            infinite = ~measured.total_norm.isfinite()
            found_inf = infinite if window is None else infinite | window.found_inf
            record_found_inf(scaler, optimizers, found_inf)
            if update_scaler:
                scaler.update()

        micro_batches = () if window is None else window.reports
        report = PendingReport(
            self._steps, batch_id, decision.record, measured, unscale, names, loss, micro_batches,
            self._watched.attention_stats(), scaled,
            loss_counts=loss is not None or self._ranks is not None,
            all_overflowed=None if window is None else window.all_overflowed,
            per_tensor=before.per_tensor,
        )  # fmt: skip
        self._steps += 1
        self._pending.append(report)
        self._warnings.saw_gradients(report.step, present)
        self._stepped = optimizers, scaler
        return report

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
            self._found_others()
        if self._ranks is None:
            check_alone(self._watched.module)
        self._lay_out()
        names, parameters, grads = self._watched.with_gradients()
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
        scaled = loss_scale(scaler, [], device)
        unscale = unscaling(scaled.scale, weight, device)
        judged = names, values
        if self._ranks is not None and not self._replicated:
            judged = self._ranks.all_of(names, values, device)
        measured, decision = self._judge(
            *judged, unscale, loss, micro_batch=True, alone=self._replicated
        )
        self._window = window
        together = self._ranks is not None and not self._replicated
        number, loss_counts = len(window.reports), loss is not None or together
        batch_id = f"micro-batch {number}" if batch_id is None else batch_id
        report = PendingReport(
            self._steps, batch_id, decision.record, measured, unscale, judged[0], loss,
            scaled=scaled, micro_batch=number, loss_counts=loss_counts,
        )  # fmt: skip
        found = overflowed(decision, measured, loss_counts) if scaled.used else None
        self._window.add(names, parameters, decision, weight, report, found)
        return report

    def poll(self, wait: bool = False) -> list[StepReport]:
        """Learn what became of earlier steps: warn, write files, go back or raise.

        Every :meth:`step` does so too, without waiting unless more than ``max_lag`` reports are on
        their way. Call it with ``wait`` at the end of a training, lest the last steps go unnoticed.

        Returns:
            The reports that came since the last call, in order, the last 1000 of them.

        Raises:
            GradientExplosionError: the ``patience`` is spent, and there is no copy to go back to.
        """
        self._heed(wait)
        reports = list(self._reports)
        self._reports.clear()
        return reports

    @property
    def outlier_above(self) -> float:
        """The finite norm above which the next step is skipped; waits for the device.

        The larger of ``skip_norm`` and 4 times the median of the last norms seen and one more that
        is above them all; inf while fewer than 16 were seen.
        """
        return ops.outlier_above(self._statistics, self.skip_norm).item()

    @property
    def lr_factor(self) -> float:
        """What the learning rates are multiplied by in each step; below 1 after a rollback."""
        return self._rate.value

    def skip_batch(self) -> bool:
        """Whether to pass over the next batch, as the first ones after a rollback are.

        A loop that asks before it computes a batch saves the work; in one that does not,
        :meth:`step` discards the gradients of these batches.
        """
        skip = self._batches_to_skip > 0
        self._batches_to_skip -= skip
        return skip

    # --- in other people's loops ------------------------------------------------------------------

    def attach(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Make ``optimizer.step(closure=None)`` the guarded step, for loops that are not yours.

        ::

            guard = GradGuard(model, max_norm=0.5, skip_norm=10.0)
            guard.attach(optimizer)
            ...
            loss.backward()
            optimizer.step()        # guarded: clips, or skips; report in guard.last_report

        It may be called before or after the optimizer is wrapped by accelerate, Lightning or
        Fabric (it attaches to the optimizer inside), and before or after schedulers are built. The
        class of the optimizer becomes a subclass of the same name; its step calls a closure first
        and takes its loss. With a GradScaler the code stays as torch documents it:
        ``scaler.scale(loss).backward(); scaler.step(optimizer); scaler.update()``; one scaler may
        serve several guarded optimizers. ``optimizer.state_dict()`` holds the guard's state, in
        ``param_groups[0]["fastguard"]``; a plain optimizer loads it too, and ignores that entry. A
        torch.distributed.checkpoint without it has to be loaded before the optimizer is attached.
        Copies and pickles of the optimizer are guarded by a copy of the guard.

        Args:
            optimizer: a torch optimizer, or accelerate's, Lightning's or Fabric's wrapper of one.

        Returns:
            The optimizer that is now attached: ``optimizer``, or the one inside.

        Raises:
            ValueError: this guard is attached to another optimizer, another guard to this one; its
                ``step`` was replaced on the instance; what :meth:`step` would refuse. Nothing was
                changed then.
            TypeError: no torch optimizer.
        """
        if self._attached is not None and self._attached is not unwrapped(optimizer):
            raise ValueError(
                "this GradGuard is attached to another optimizer: give each optimizer a guard of "
                "its own parameters, or call guard.step([one, two]) to step several by one verdict"
            )
        if isinstance(unwrapped(optimizer), torch.optim.Optimizer):
            self._check([unwrapped(optimizer)])
        self._attached = attached.attach(self, optimizer)
        return self._attached

    def adopt(self, optimizer: torch.optim.Optimizer) -> None:
        """Take a copy of the attached optimizer, made together with this copy of the guard."""
        self._attached = optimizer

    def detach(self) -> None:
        """Give the attached optimizer its own step back; nothing if there is none."""
        if self._attached is not None:
            attached.detach(self._attached)
            self._attached = None

    def describe(self, *, batch_id: object = None, loss: Tensor | float | None = None) -> None:
        """Say of the next step of the attached optimizer what :meth:`step` takes as arguments.

        Args:
            batch_id: names the batch in reports, warnings and errors.
            loss: of the batch, one number, unscaled; NaN or Inf skips the step.
        """
        self._described = batch_id, loss

    def scheduler(self, lr_scheduler) -> GuardedScheduler:
        """The scheduler, whose ``step()`` counts applied steps only.

        For a scheduler that is stepped once per optimizer step. The host does not wait: a skip
        that becomes known late, as on a GPU, is made up for by a later call that does nothing.

        Args:
            lr_scheduler: one of torch's, or anything with ``step``, ``state_dict`` and
                ``load_state_dict``.
        """
        guarded = GuardedScheduler(lr_scheduler)
        self._schedulers.append(guarded)
        return guarded

    # --- what a step is made of -------------------------------------------------------------------

    @property
    def _in_one_call(self) -> bool:
        return self._measure is None and self._ranks is None

    @property
    def _replicated(self) -> bool:
        """Whether each of several ranks holds all of every parameter."""
        return self._ranks is not None and not self._ranks.sharded

    def _check(self, optimizers: list[torch.optim.Optimizer]) -> None:
        """ValueError if a step with these can not be guarded."""
        if self._watched.check(optimizers):
            self._found_others()
            self._warnings.saw_optimizers(self._watched.names, self._watched.parameters, optimizers)

    def _lay_out(self) -> None:
        if self._ranks is not None and self._ranks.sharded:
            lay_out_(self._watched.parameters)

    def _judge(self, names, grads, unscale, loss, scaling=None, micro_batch=False, alone=False):
        """Measure and decide; ``alone``: about what this rank has, whatever others have."""
        if not micro_batch and self.skip_batch():
            self._discarded = self._steps
            # Ranks that do not pass over it must not apply it alone.
            bad = scalar(math.nan, (grads or self._watched.parameters)[0].device)
            measured, *_ = self._measured(names, grads, unscale, bad)
            return measured, discarded(measured, unscale, loss)
        threshold, known = self.threshold, self._statistics
        if micro_batch:
            threshold, known = Fixed(), _on(self._micro_statistics, grads[0].device)
            self._micro_statistics = known
        rules = (known, self._steps, threshold, self.max_norm, self.skip_norm)
        if self._in_one_call or alone:
            given = (unscale, loss, *rules, scaling)
            return _of_any_kind(ops.grad_norm_decide_, names, grads, *given)
        measured, *given = self._measured(names, grads, unscale, loss)
        return measured, ops.guard_decide_(measured, *given, *rules)

    def _measured(self, names: list[str], grads: list[Tensor], unscale, loss):
        """The norms; and ``unscale`` and ``loss``, where ranks train together those of all."""
        measure = ops.grad_norm if self._measure is None else self._measure.collect
        if self._ranks is None:
            return _of_any_kind(measure, names, grads), unscale, loss
        measured = _of_any_kind(measure, names, local_parts(grads))
        return self._ranks.agree(measured, unscale, loss)

    def _statistics_of(self, names: list[str], device: torch.device) -> ops.Statistics:
        """The statistics with the columns of these gradients, on their device."""
        if self._statistics.numbers.is_meta and device.type != "meta":
            self._tensor_norms = TensorNorms()
        known = _on(self._statistics, device)
        return known._replace(per_tensor=self._tensor_norms.select(known.per_tensor, names))

    # --- what the host learns ---------------------------------------------------------------------

    def _heed(self, wait: bool = False) -> None:
        """Account for the reports that are there, tell of skips, go back or raise."""
        self._learn(wait)
        self._on_skip.tell()
        if (spent := self._budget.spent) is not None:
            self._act(spent)
            self._on_skip.tell()  # of steps that were undone

    def _learn(self, wait: bool = False) -> None:
        """Account for the reports that are there, up to a spent patience."""
        while self._pending and self._budget.spent is None:
            if not (wait or len(self._pending) > self.max_lag or self._may_look_early()):
                break
            self._account(self._pending.popleft())

    def _may_look_early(self) -> bool:
        # Not on a device, where one rank would go back or raise steps before another.
        together = self._ranks is not None and self._statistics.numbers.device.type != "cpu"
        return self._pending[0].ready and not together

    def _act(self, spent: Spent) -> None:
        """Go back or raise: the patience is spent."""
        self._budget.clear()
        if self._snapshots is not None:
            self._snapshots.forget_since(spent.since, self._stepped[0])
        if not self._snapshots:
            names = dict(zip(map(id, self._watched.parameters), self._watched.names, strict=True))
            found = poisoned(self._stepped[0], names)
            raise GradientExplosionError(spent.reports, self.skip_norm, spent.what, found)
        self._go_back()

    def _account(self, pending: PendingReport) -> None:
        report = pending.result()
        self._reports.append(report)
        self._buffers.tell()
        self._warnings.saw_report(report, self.threshold)
        for skipped in (*report.quarantined, *([report] if report.skipped else [])):
            log_skip(skipped, self.skip_norm)
            self._on_skip.add(skipped)
        if report.skipped:
            for scheduler in self._schedulers:
                scheduler.owe()
        counts = self._budget.account(report)
        if counts and (report.skipped or not all(each.scale_search for each in report.quarantined)):
            self._files.write(pending, self.skip_norm)
        if not report.skipped:
            self._rate.applied()

    # --- going back -------------------------------------------------------------------------------

    def _take_snapshot(self) -> None:
        # Whether the last verdicts were skips is not known yet, and need not be: a skip leaves
        # everything alone. What is younger than an explosion is dropped when that is known.
        if self._snapshots is None:
            return
        if self._discarded == self._steps - 1:
            self._snapshots.postpone(self._steps)
        if self._budget.in_a_row or not self._snapshots.due(self._steps):
            return
        own = {
            "statistics": self._statistics.copy(),
            "micro_statistics": self._micro_statistics.copy(),
            "tensor_norms": self._tensor_norms.copy(),
            "buffers": self._buffers.copy(),
        }
        self._snapshots.take(self._steps, self._watched.parameters, *self._stepped, own)

    @torch.no_grad()
    def _go_back(self) -> None:
        while self._pending:  # steps after the explosion, which are undone: say what they were
            self._learn(wait=True)
            self._budget.clear()
        self._rate.back_off()
        own = self._snapshots.restore(self._steps, self.lr_factor)
        self._statistics = own["statistics"]
        self._micro_statistics = own["micro_statistics"]
        self._tensor_norms = own["tensor_norms"]
        self._buffers = own["buffers"]
        self._buffers.restore()
        self._window = None
        self._batches_to_skip = self._rollback.skip_batches

    # --- checkpoints ------------------------------------------------------------------------------

    def state_dict(self) -> dict:
        """What the next decision depends on, as plain numbers; waits for the device.

        ``max_norm`` and its like are not part of it, nor are a window that :meth:`accumulate` has
        begun and the copies that rollback goes back to: these start anew. Where processes train
        together, every rank asks for it and any may save its own: they decide alike.

        ``torch.distributed.checkpoint`` takes it as an entry of its own beside model and optimizer;
        with AdaGC, whose names a fresh guard does not have, as ``json.dumps(guard.state_dict())``.
        In the state of an attached optimizer it is such a text already.
        """
        self._learn(wait=True)
        self._on_skip.tell()
        return {
            "version": _VERSION,
            "steps": self._steps,
            "threshold": self.threshold.kind.name.lower(),
            "statistics": as_plain(self._statistics),
            "micro_statistics": as_plain(self._micro_statistics),
            **self._tensor_norms.as_plain(self._statistics.per_tensor),
            "budget": self._budget.state_dict(),
            "batches_to_skip": self._batches_to_skip,
            "lr_backoffs": self._rate.backoffs,
            "lr_growth_tracker": self._rate.tracker,
        }

    def load_state_dict(self, state: dict) -> None:
        """Go on as the guard did whose :meth:`state_dict` this is.

        That of an older fastguard, which kept the accepted norms only, is taken for one that saw no
        others.

        Raises:
            ValueError: it is not one, or one of a newer fastguard. Nothing was changed then.
        """
        try:
            state = _of_this_version(state)
            device = self._statistics.numbers.device
            other = Kind[state["threshold"].upper()] is not self.threshold.kind
            known = from_plain(state["statistics"], device, other)  # only ZClip keeps moments
            micro = from_plain(state["micro_statistics"], device, False)
            renamed = self._watched.by_current_names
            tensor_norms = TensorNorms.from_plain(state, device, renamed)
            if (
                state["threshold"] == "adagc"
                and not state["ema_norms"]
                and any(known.accepted_norms)
            ):
                raise ValueError(
                    "AdaGC accepted steps, but the norms by parameter are gone, as where torch."
                    "distributed.checkpoint loads into a fresh guard: save "
                    "json.dumps(guard.state_dict()), and load json.loads() of it"
                )
            steps, to_skip = int(state["steps"]), int(state["batches_to_skip"])
            rate = RateFactor(
                self._rollback,
                int(state.get("lr_backoffs", 0)),
                int(state.get("lr_growth_tracker", 0)),
            )
            if min(steps, to_skip, rate.backoffs, rate.tracker) < 0:
                raise ValueError("a number of steps is negative or not finite")
            budget = Budget(self.patience)
            budget.load_state_dict(state["budget"])
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
            raise ValueError(f"this is no state of a GradGuard: {error!r}") from error
        self._statistics, self._micro_statistics, self._budget = known, micro, budget
        self._tensor_norms = tensor_norms
        self._steps, self._batches_to_skip, self._window = steps, to_skip, None
        self._rate = rate
        self._pending.clear()
        self._reports.clear()
        self._on_skip.clear()
        if self._snapshots is not None:
            self._snapshots.clear()
        if self._measure is not None:
            self._measure.forget()

    def __getstate__(self) -> dict:
        """For pickle and copy: the settings, the parameters and what the next decision depends on.

        Copies for a rollback and a begun window start anew, and :meth:`scheduler` has to be called
        again. Waits for the device.
        """
        if self._group is not None:
            raise TypeError(
                "a GradGuard with a process_group cannot be copied or pickled: the group belongs "
                "to this process. Build another GradGuard and give it this one's state_dict()"
            )
        self._learn(wait=True)
        report = self.last_report
        return vars(self) | {
            "_listening": None,
            "_ranks": None,
            "_measure": self._measure and BackwardMeasure(),
            "_snapshots": None if self._snapshots is None else Snapshots(self._rollback),
            "_window": None,
            "_on_skip": copy.copy(self._on_skip),
            "_stepped": ((), None),
            "_described": (None, None),
            "_schedulers": [],
            "last_report": None if report is None else report.result(),
        }

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self._listening = weakref.WeakSet()
        self._found_others()

    def commit_buffers(self) -> None:
        """Tell the guard that what is in the module's buffers is good.

        After something other than a training step wrote them: ``update_bn``, an average of weights
        that is kept in buffers; or after layers without parameters were added, which it would not
        find. ``load_state_dict`` of the module and its parts does it by itself.
        """
        self._buffers.commit()
        if self._window is not None:
            self._window.buffers.commit()

    def _heal_buffers(self) -> None:
        """After an exception: a NaN that the forward pass wrote must not pass for good later."""
        (self._buffers if self._window is None else self._window.buffers).heal()

    def _on_load(self, part: nn.Module) -> None:
        """A part of the module got another state; its parameters may be new objects."""
        self._buffers.commit(part)
        if self._window is not None:
            self._window.buffers.commit(part)
        self._watched.stale = True
        if part is self._watched.module:  # what is under way is of other weights
            self._window = None
            if self._snapshots is not None:
                self._snapshots.clear()

    def _found_others(self) -> None:
        """The parameters were looked up anew, and the module may have other parts."""
        watched = self._watched
        check_whole(watched.module, watched.names, watched.parameters)
        ranks = ranks_of(watched.names, watched.parameters, self._group)
        if ranks is not None and self._measure is not None:
            raise ValueError(
                'measure="backward" sees gradients before they are added up over the ranks; use '
                '"step" where processes train together'
            )
        self._ranks = ranks
        self._buffers.look_up()
        self._listen()
        if self._measure is not None:
            self._measure.watch(watched.parameters)

    def _listen(self) -> None:
        """Have :meth:`_on_load` called after a load_state_dict of a module or a part of it."""
        for part in self._buffers.modules():
            if part not in self._listening:
                self._listening.add(part)
                part.register_load_state_dict_post_hook(OnLoad(self._on_load))


def _on(known: ops.Statistics, device: torch.device) -> ops.Statistics:
    if known.numbers.is_meta and device.type != "meta":  # the guard came before to_empty
        return fresh_statistics(device)
    if known.numbers.device == device:
        return known
    return ops.Statistics(*(tensor.to(device) for tensor in known))


def _of_any_kind(measure, names: list[str], grads: list[Tensor], *args):
    try:
        # To look at dtype, layout and device of 2000 tensors first takes as long as this.
        return measure(grads, *args)
    except RuntimeError:  # the operator takes no sparse, complex and distributed tensors
        values = measurable(names, grads)
        if values is grads:
            raise  # it was something else
        return measure(values, *args)


def _listed(optimizer) -> list[torch.optim.Optimizer]:
    if hasattr(optimizer, "param_groups"):
        return [optimizer]
    listed = list(optimizer) if isinstance(optimizer, Iterable) else []
    different = len(set(map(id, listed))) == len(listed)
    if not listed or not different or not all(hasattr(o, "param_groups") for o in listed):
        raise ValueError(f"step takes one optimizer or several different ones, got {optimizer!r}")
    return listed


def _once(names: list[str], grads: list[Tensor]) -> tuple[list[str], list[Tensor]]:
    """Two parameters may share a gradient: it counts once, under the first name."""
    if len(set(map(id, grads))) == len(grads):
        return names, grads
    once: dict[int, tuple[str, Tensor]] = {}
    for name, grad in zip(names, grads, strict=True):
        once.setdefault(id(grad), (name, grad))
    return [name for name, _ in once.values()], [grad for _, grad in once.values()]


def _of_this_version(state: dict) -> dict:
    version = state.get("version", 1)
    if version == 1:
        count, mean, variance = state["moments"]
        skips = list(state["skips_in_a_row"])
        steps = [skip["step"] for skip in skips]
        known = as_plain(fresh_statistics(torch.device("cpu")))
        norms = {"seen_norms": state["accepted"], "accepted_norms": state["accepted"]}
        counts = {"seen": count, "accepted": count, "mean": mean, "variance": variance}
        return state | {
            "statistics": counts | norms,
            "micro_statistics": known,
            "budget": {
                "steps": steps,
                "skips": skips,
                "in_a_row": len(skips),
                "searches": state.get("searches", []),
            },
        }
    if version != _VERSION:
        raise ValueError(
            f"it is of version {version}, and this fastguard knows the versions 1 to {_VERSION}; "
            "use the fastguard that wrote it, or a newer one"
        )
    return state


def _at_least_one(name: str, value: int) -> int:
    try:
        value = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be a whole number of steps, got {value}") from None
    if value < 1:
        raise ValueError(f"{name} must be at least 1 step, got {value}")
    return value


def _one_of(name: str, value: str, *words: str) -> None:
    if value not in words:
        raise ValueError(f"{name} must be one of {', '.join(words)}; got {value!r}")
