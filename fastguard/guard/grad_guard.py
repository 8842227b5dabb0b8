"""GradGuard: measure the gradients, decide, update. Three lines in any PyTorch loop.

:meth:`GradGuard.step` runs these stages; each is a module:

========================= ==================================================================
``parameters``            the watched parameters, and the check that the optimizer fits them
``decision``              the gradients, their norms, and the decision to apply, clip or skip
``statistics``            the statistics of earlier norms
``update``                the optimizer's step by the decision
``buffers``               the module's buffers: copied after a step, restored after a skip
``report``                the report, and its transfer to the host
``accounting``            the host's reaction: patience, warnings, files, callbacks
========================= ==================================================================

The other modules serve optional features: ``accumulation`` (micro-batches), ``attached`` (loops
that call ``optimizer.step``), ``grad_scaler`` (fp16), ``distributed`` (several processes),
``rollback`` and ``state`` (checkpoints).
"""

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from fastguard import ops
from fastguard.thresholds import Fixed, Threshold, check_threshold

from .accounting import Accounting, Following
from .accumulation import Accumulating
from .attached import Attachable
from .decision import Decider, Gradients, Rules, once, present, scalar, unscale_factor
from .grad_scaler import ScalerStep, check_shared
from .parameters import Watching
from .report import PendingReport, StepReport
from .rollback import Rollback
from .state import Restorable
from .update import (
    StepCall,
    check_own,
    check_steppable,
    listed,
    plain_step_of,
    reads_decision,
    step_optimizer,
)


class GradGuard(Watching, Accumulating, Attachable, Following, Restorable):
    """Survive gradient explosions: skip what must not reach the weights, clip the rest.

    ::

        guard = GradGuard(model, max_norm=0.5, skip_norm=10.0)
        ...
        loss.backward()
        report = guard.step(optimizer)      # in place of clip_grad_norm_ and optimizer.step

    **The rule.** ``norm`` is the L2 norm of all gradients that the guard watches.

    - A step is skipped when the norm or the loss (if it is given) is NaN or Inf.
    - A step is skipped when its norm is an outlier: above ``skip_norm`` *and* above 4 times the
      median of itself and the last 128 norms seen, of which there must be at least 16. A norm is
      seen when it and its loss are finite and it is not 0, whether its step was skipped or not.
      Batches that are passed over after a rollback do not count.
    - A step is skipped when its norm is above 1e18 after clipping (possible with ``max_norm=inf``):
      fp32 second moments cannot hold its square.
    - Any other norm above the threshold is clipped.

    A sudden jump is therefore skipped. A slow growth and two alternating levels are clipped. A jump
    that stays uses up the ``patience``; with a patience above 64 the new level is ordinary after 64
    steps and is clipped from then on. The rule "skip everything above 10" would skip for ever where
    10 is an ordinary norm. :meth:`accumulate` applies the same rule to micro-batches, with the
    norms of micro-batches.

    **A skipped step** changes no bit of parameters and optimizer state. If the guard was given a
    module, its buffers are set back to their values after the last accepted step (or the last
    ``load_state_dict`` or :meth:`commit_buffers`). A buffer that becomes NaN or Inf in an accepted
    step is set back too, with the other buffers of its layer and a warning.

    **No host-device sync.** The decision is made and carried out on the device of the gradients.
    The host reads it later: from the report, or in :meth:`poll`, which every step calls. On the CPU
    this is immediate, on a GPU at most ``max_lag`` steps later. :class:`fastguard.AdamW` and
    torch's ``fused=True`` optimizers need no sync. Any other optimizer needs one in each step.

    **Several optimizers.** The norm covers every gradient of the guard's parameters, whichever
    optimizer holds them. Networks that are stepped separately, as in a GAN, need a guard each.

    **Several processes** make the same decision, through one small all-reduce in each :meth:`step`
    (with DTensors also in :meth:`accumulate`). This happens where parameters are DTensors, as
    FSDP2's ``fully_shard`` makes them, and where ``process_group`` is given. The norm is that of
    the whole gradients. A NaN or Inf in the gradient or the loss of one rank counts for all ranks.
    All ranks must make the same calls with the same settings, and with DTensors give the same
    weights to :meth:`accumulate`. Other shards (FSDP1, ZeRO, DeepSpeed) are refused.

    Args:
        params_or_model: a module; or a parameter, or an iterable of parameters or of (name,
            parameter) pairs. A module's parameters are looked up again when those of the optimizer
            change and after ``load_state_dict``.
        max_norm: largest norm let through unclipped; inf turns clipping off.
        skip_norm: no norm up to this is an outlier; inf turns the skipping of finite norms off.
        patience: :class:`GradientExplosionError` is raised after this many skips in a row, or when
            more than half of the last 8 x ``patience`` steps were skipped. Skips of a GradScaler
            that searches for its scale do not count; see :attr:`StepReport.scale_search`.
        threshold: one of :mod:`fastguard.thresholds`, which learns where to clip below
            ``max_norm``; ``Fixed()`` by default.
        on_patience: "rollback" goes back to an earlier state instead of raising.
        rollback: how; by default ``Rollback()`` where ``on_patience`` is "rollback".
        report_dir: a folder for one JSON file per bad step: names of the non-finite parameters,
            the norms of all, the batch's id.
        on_skip: called with the :class:`StepReport` of each skipped step, in order and once, when
            the host learns of it. It is also called for each micro-batch that was left out, before
            its step (``micro_batch`` is its number), and for batches passed over after a rollback.
            It runs inside :meth:`step`, :meth:`poll` or :meth:`state_dict`, after the step is
            complete. These methods raise what it raises.
        max_lag: how many reports may be under way before a step waits for the oldest. Where
            processes train together on a device, all ranks learn exactly this many steps late.
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
            ranks of a DTensor's mesh; FSDP1, DeepSpeed, or optimizers that step in the backward
            pass.
        TypeError: an argument is not a parameter, threshold, function, module or buffer.
    """

    def __init__(
        self,
        params_or_model: nn.Module | Tensor | Iterable[Tensor] | Iterable[tuple[str, Tensor]],
        max_norm: float = 1.0,
        skip_norm: float = math.inf,
        patience: int = 25,
        *,
        threshold: Threshold | None = None,
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
        if on_patience not in ("raise", "rollback"):
            raise ValueError(f"on_patience must be one of raise, rollback; got {on_patience!r}")
        if rollback is not None and on_patience != "rollback":
            raise ValueError('a Rollback was given, but on_patience is "raise"; set "rollback"')

        Watching.__init__(self, params_or_model, buffers, process_group)
        Accumulating.__init__(self)
        Attachable.__init__(self)
        Following.__init__(self, Rollback() if rollback is None else rollback, on_patience)
        device = self._watched.parameters[0].device
        self._decider = Decider(device)
        self._accounting = Accounting(self.patience, on_skip, report_dir)
        self._look_up_again()
        self._steps = 0
        self._stepping = False
        self._stepped: tuple = (), None  # optimizers and scaler of the last step
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
        optimizers = listed(optimizer)
        for each in optimizers:
            check_steppable(each)
            check_own(each, self)
        check_shared(scaler, self, update_scaler)
        return self._guarded(
            StepCall(optimizers, loss, batch_id, scaler, update_scaler is not False)
        )

    def _guarded(self, call: StepCall) -> PendingReport:
        """:meth:`_step`, with the checks before it and the accounting after it."""
        if self._stepping:
            raise RuntimeError(
                "guard.step was called from inside guard.step: the optimizer's step calls the "
                "guard that calls it. Use guard.attach(optimizer), which makes optimizer.step() "
                "the guarded step"
            )
        self._stepping = True
        try:
            self.last_report = report = self._step(call)
        except BaseException:
            self._heal_buffers()
            raise
        finally:
            self._stepping = False
        self._heed()
        self._take_snapshot()
        return report

    def _step(self, call: StepCall) -> PendingReport:
        """Collect the gradients, decide, update, settle the buffers, report."""
        self._check(call.optimizers)
        found, with_gradient, scaler = self._collect(call)
        before = self._decider.memory.statistics.copy()
        measured, decision = self._decide(found, scaler)
        try:
            self._update(call, found, decision)
        except BaseException:
            self._decider.memory.statistics = before
            scaler.undo()
            if not all(map(reads_decision, call.optimizers)) or self._decider.replicated:
                self._window = None  # its sums were scaled, or added up over the ranks
            raise
        window, self._window = self._window, None
        self._buffers.settle(decision.verdict)
        scaler.finish(None if window is None else window.found_inf, measured.total_norm)
        report = PendingReport(
            self._steps, call.batch_id, decision.record, measured, found.unscale, found.names,
            found.loss, () if window is None else window.reports,
            self._watched.attention_stats(), scaler.scale,
            loss_counts=found.loss is not None or self._decider.ranks is not None,
            all_overflowed=None if window is None else window.all_overflowed,
            per_tensor=before.per_tensor,
        )  # fmt: skip
        self._steps += 1
        self._stepped = call.optimizers, call.scaler
        self._accounting.add(report)
        self._accounting.warnings.saw_gradients(report.step, with_gradient)
        return report

    def _collect(self, call: StepCall) -> tuple[Gradients, list[str], ScalerStep]:
        """The gradients, the names of the parameters with one on this rank, and the scaler."""
        self._lay_out()
        window, ranks = self._window, self._decider.ranks
        names, parameters, grads = present(self._watched.names, self._watched.parameters)
        device = (grads or self._watched.parameters)[0].device
        loss = scalar(call.loss, device)
        if window is not None:
            window.check(call.scaler)
            window.check_complete(names, parameters)
        scaler = ScalerStep(call.scaler, call.optimizers, device, call.handed, call.update_scaler)
        if window is not None:
            if self._decider.replicated:
                window.add_up(ranks, self._watched)
            names, grads = window.gradients()
        elif not grads:
            self._watched.stale = True  # the module may have other parameters by now
        with_gradient = names
        names, grads = once(names, grads)
        if ranks is not None:
            names, grads = ranks.all_of(names, grads, device)
        weight = 1.0 if window is None else window.weight
        unscale = unscale_factor(scaler.scale.scale, weight, device)
        self._decider.memory.select(names, device)
        return Gradients(names, grads, unscale, loss), with_gradient, scaler

    def _decide(self, found: Gradients, scaler: ScalerStep):
        found = found._replace(unscale=scaler.scale.reject(found.unscale))
        if self.skip_batch():
            self._discarded = self._steps
            return self._decider.discard(found)
        in_one_call = self._decider.in_one_call and self._window is None and found.tensors
        scaling = scaler.give_state() if in_one_call else None
        return self._decider.decide(found, self._steps, self._rules, scaling)

    def _update(self, call: StepCall, found: Gradients, decision: ops.GuardDecision) -> None:
        """Step the optimizers by the decision, at learning rates times :attr:`lr_factor`."""
        window = self._window
        try:
            with self._rate.lowering(call.optimizers):
                for each in call.optimizers:
                    own_step = plain_step_of(each, call.called_by_it)
                    given = decision
                    if window is not None:
                        given = window.hand_over(each, found.tensors, decision)
                    step_optimizer(each, found.tensors, given, own_step)
        finally:
            if window is not None:
                window.take_back()

    @property
    def outlier_above(self) -> float:
        """The finite norm above which the next step is skipped; waits for the device.

        The larger of ``skip_norm`` and 4 times the median of the last norms seen and one more that
        is above them all; inf while fewer than 16 were seen.
        """
        return ops.outlier_above(self._decider.memory.statistics, self.skip_norm).item()

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

    @property
    def _rules(self) -> Rules:
        return Rules(self.threshold, self.max_norm, self.skip_norm)


def _at_least_one(name: str, value: int) -> int:
    try:
        value = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be a whole number of steps, got {value}") from None
    if value < 1:
        raise ValueError(f"{name} must be at least 1 step, got {value}")
    return value
