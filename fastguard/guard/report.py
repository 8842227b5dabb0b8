"""The report of a step, and its transfer to the host."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fastguard._deprecated import Renamed, renamed_object, with_new_keys
from fastguard.attention import AttentionStats
from fastguard.ops import RISEN_FACTOR, GradNorm, Verdict

from .grad_scaler import NOT_SCALED, LossScale, is_search

MOST_RISEN = 5  # the most parameters that a report names as risen

#: Earlier names of keys of :meth:`StepReport.to_dict`, for JSON files and states of older versions.
OLD_KEYS = {
    "offenders": "nonfinite_parameters",
    "bracket": "finite_ranges",
    "quarantined": "skipped_micro_batches",
}


@dataclasses.dataclass(frozen=True)
class NonfiniteParameter:
    """A parameter whose gradient is not finite."""

    name: str
    nans: int
    infs: int
    #: Flat row-major index of the first NaN or Inf. For a DTensor it is the index in the shard of
    #: this rank, and -1 if all NaNs and Infs are on other ranks.
    first_index: int

    @property
    def kind(self) -> str:
        return " and ".join(k for k, n in (("NaN", self.nans), ("Inf", self.infs)) if n)

    def __str__(self) -> str:
        if self.first_index < 0:
            return f"{self.name}, on another rank"
        return f"{self.name}[{self.first_index}]"


class Risen(NamedTuple):
    """A parameter whose gradient is far larger than it usually is."""

    name: str
    #: L2 norm before clipping, after unscaling.
    norm: float
    #: The average norm of the steps before.
    usual_norm: float
    #: The first of the consecutive steps, up to the present one, that had such norms.
    since_step: int

    @property
    def ratio(self) -> float:
        return self.norm / self.usual_norm

    def __str__(self) -> str:
        return (
            f"{self.name} {self.norm:.3g} ({self.ratio:.3g} times its usual {self.usual_norm:.3g}, "
            f"since step {self.since_step})"
        )


class FiniteRange(NamedTuple):
    """Consecutive parameters of the model whose gradients are all finite or all non-finite."""

    finite: bool
    first: str
    last: str


@dataclasses.dataclass(frozen=True)
class StepReport:
    """What the guard saw in one step and what it did. Norms are L2 norms."""

    #: The number of the step, from 0.
    step: int
    #: As given to the guard; None if it was not.
    batch_id: object
    #: Whether the gradients were applied, clipped or skipped, and why.
    verdict: Verdict
    #: L2 norm of all gradients before clipping, after unscaling.
    total_norm: float
    #: The factor that clipped the gradients, in (0, 1]; 1.0 without clipping. With AdaGC, which has
    #: a factor for each parameter, the smallest one.
    clip_coef: float
    #: The clipping threshold in force; inf with AdaGC, which has one for each parameter.
    max_norm: float = math.inf
    #: The loss that was given to the guard; None if it was not.
    loss: float | None = None
    #: The parameters with a NaN or Inf gradient, in the model's order.
    nonfinite_parameters: tuple[NonfiniteParameter, ...] = ()
    #: The model's parameters, in order, as ranges of finite and of non-finite gradients. The fault
    #: lies where two ranges meet. Empty on a step without non-finite parameters.
    finite_ranges: tuple[FiniteRange, ...] = ()
    #: The micro-batches of this step whose gradients were left out.
    skipped_micro_batches: tuple["StepReport", ...] = ()
    #: How many micro-batches there were, 0 without ``GradGuard.accumulate``.
    micro_batches: int = 0
    #: The number of a micro-batch in its window, from 0; None for a step.
    micro_batch: int | None = None
    #: The factor by which a GradScaler multiplied the loss; None without a GradScaler, and where an
    #: attached optimizer was stepped after ``unscale_``.
    loss_scale: float | None = None
    #: Whether the step was skipped because a GradScaler searches for its scale, as
    #: :func:`fastguard.guard.grad_scaler.is_search` decides. For a window of micro-batches: whether
    #: this holds for all of them, on all ranks.
    scale_search: bool = False
    #: A finite norm above this was an outlier: the larger of ``skip_norm`` and 4 times the median
    #: of the last norms seen and itself; inf while fewer than 16 were seen.
    outlier_above: float = math.inf
    #: The parameters that rose most, as in :meth:`PendingReport.risen`; empty unless the step is a
    #: skipped outlier.
    most_risen: tuple[Risen, ...] = ()

    offenders = Renamed("nonfinite_parameters")
    bracket = Renamed("finite_ranges")
    quarantined = Renamed("skipped_micro_batches")
    all_quarantined = Renamed("all_micro_batches_skipped")

    @property
    def skipped(self) -> bool:
        """Whether the step was not applied."""
        return self.verdict.skipped

    @property
    def batch(self) -> object:
        """The batch's id, or the number of the step where none was given."""
        return self.step if self.batch_id is None else self.batch_id

    @property
    def all_micro_batches_skipped(self) -> bool:
        """Whether there were micro-batches, and all of them were left out."""
        return 0 < self.micro_batches == len(self.skipped_micro_batches)

    @property
    def nonfinite(self) -> tuple[str, ...]:
        """Names of the parameters with a NaN or Inf gradient, in the model's order."""
        return tuple(each.name for each in self.nonfinite_parameters)

    @property
    def first_nonfinite(self) -> str | None:
        """The place of the first NaN or Inf of the first such parameter: "name[flat index]".

        None where all elements are finite, also if the norm of float64 gradients overflowed or the
        loss alone was not finite.
        """
        return str(self.nonfinite_parameters[0]) if self.nonfinite_parameters else None

    def to_dict(self) -> dict:
        """The report as plain values, with the batch's id as text."""
        # asdict copies all values, and the id may be any object.
        bare = dataclasses.replace(self, batch_id=None, skipped_micro_batches=())
        values = dataclasses.asdict(bare)
        values["verdict"] = int(self.verdict)
        values["finite_ranges"] = [each._asdict() for each in self.finite_ranges]
        values["batch_id"] = None if self.batch_id is None else str(self.batch_id)
        values["skipped_micro_batches"] = [
            report.to_dict() for report in self.skipped_micro_batches
        ]
        values["most_risen"] = [risen._asdict() for risen in self.most_risen]
        return values

    @classmethod
    def from_dict(cls, values: Mapping) -> "StepReport":
        """The report from the result of :meth:`to_dict`, also from that of an older fastguard."""
        values = with_new_keys(values, OLD_KEYS)
        found, ranges = values["nonfinite_parameters"], values["finite_ranges"]
        return cls(
            **values
            | {
                "verdict": Verdict(values["verdict"]),
                "nonfinite_parameters": tuple(NonfiniteParameter(**each) for each in found),
                "finite_ranges": tuple(FiniteRange(**each) for each in ranges),
                "skipped_micro_batches": tuple(map(cls.from_dict, values["skipped_micro_batches"])),
                "most_risen": tuple(Risen(**risen) for risen in values.get("most_risen", ())),
            }
        )


class PendingReport:
    """A :class:`StepReport` whose values are still on the device.

    It has the attributes of a StepReport. The first access to one of them (other than ``step`` and
    ``batch_id``) waits for the device. ``ready`` is true if it does not have to wait.

    Args:
        loss_counts: whether the record has a loss, so that its NaN or Inf counts. By default this
            is so if ``loss`` was given. The loss of ranks that decide together may come from
            another rank.
        all_overflowed: :attr:`fastguard.guard.accumulation.Window.all_overflowed` of a window.
    """

    def __init__(
        self,
        step: int,
        batch_id: object,
        record: Tensor,
        measured: GradNorm,
        unscale: Tensor | None,
        names: list[str],
        loss: Tensor | None,
        micro_batches: Iterable["PendingReport"] = (),
        attention_stats: Mapping[str, AttentionStats] | None = None,
        scaled: LossScale = NOT_SCALED,
        micro_batch: int | None = None,
        loss_counts: bool | None = None,
        all_overflowed: Tensor | None = None,
        per_tensor: Tensor | None = None,
    ):
        self.step = step
        self.batch_id = batch_id
        self._scaled = scaled.used
        more = {"loss_scale": scaled.of_loss, "all_overflowed": all_overflowed}
        self._more = [name for name, value in more.items() if value is not None]
        self._record = Transfer(record, *(more[name] for name in self._more))
        self._measured = measured
        self._unscale = unscale
        self._loss_given = loss is not None
        self._loss_counts = self._loss_given if loss_counts is None else loss_counts
        self._per_tensor = per_tensor  # the statistics of each parameter before this step
        self._micro_batch = micro_batch
        self._names = names
        self._micro_batches = tuple(micro_batches)
        self._attention_stats = attention_stats or {}
        self._result: StepReport | None = None

    @property
    def ready(self) -> bool:
        return self._record.ready

    def result(self) -> StepReport:
        """The report. The first call waits for the device."""
        if self._result is None:
            record, *more = self._record.wait()
            self._result = self._made_of(record, dict(zip(self._more, more, strict=True)))
        return self._result

    def _made_of(self, record: list[float], more: dict) -> StepReport:
        verdict, clip_coef, total_norm, max_norm, loss, outlier_above = record
        verdict = Verdict(int(verdict))
        micro_batches = [report.result() for report in self._micro_batches]
        found, ranges = ((), ()) if math.isfinite(total_norm) else self._nonfinite()
        overflow = more.get("all_overflowed") or any(each.infs for each in found)
        loss_is_bad = self._loss_counts and not math.isfinite(loss)
        loss_scale = more.get("loss_scale")
        return StepReport(
            self.step,
            self.batch_id,
            verdict,
            total_norm,
            clip_coef,
            max_norm,
            loss if self._loss_given else None,
            nonfinite_parameters=found,
            finite_ranges=ranges,
            skipped_micro_batches=tuple(report for report in micro_batches if report.skipped),
            micro_batches=len(micro_batches),
            micro_batch=self._micro_batch,
            loss_scale=loss_scale,
            scale_search=is_search(verdict, self._scaled, loss_scale, overflow, loss_is_bad),
            outlier_above=outlier_above,
            most_risen=tuple(self.risen()) if verdict is Verdict.SKIP_OUTLIER else (),
        )

    def norms(self) -> dict[str, float]:
        """L2 norm of each parameter's gradient before clipping, after unscaling."""
        norms = self._measured.norms
        norms = norms if self._unscale is None else norms * self._unscale
        return dict(zip(self._names, norms.tolist(), strict=True))

    def risen(self) -> list[Risen]:
        """The parameters whose norm rose most above their own usual norm, at most 5.

        Their norms are above 4 times their usual norms. The usual norm is an exponential average
        over earlier steps with factor 0.98, to which a single spike contributes at most 6 %. Only
        finite norms count. The list of a micro-batch is empty. Waits for the device.
        """
        if self._per_tensor is None:
            return []
        _, _, usual, since = self._per_tensor.tolist()
        risen = [
            Risen(name, norm, usual, self.step if since < 0 else int(since))
            for (name, norm), usual, since in zip(self.norms().items(), usual, since, strict=True)
            if math.isfinite(norm) and norm > RISEN_FACTOR * usual
        ]
        return sorted(risen, key=lambda each: each.ratio, reverse=True)[:MOST_RISEN]

    def attention(self) -> dict[str, dict[str, list[float]]]:
        """The statistics of ``ClampedMultiheadAttention(record_stats=True)`` in the last forward.

        Each module's name maps to the largest logit, entropy and clamped share of each head.
        """
        return {
            name: {key: values.tolist() for key, values in stats._asdict().items()}
            for name, stats in self._attention_stats.items()
        }

    def _nonfinite(self) -> tuple[tuple[NonfiniteParameter, ...], tuple[FiniteRange, ...]]:
        """The parameters with a NaN or Inf, and the ranges. Both are empty if there is none."""
        rows = list(zip(self._names, self._measured.nonfinite.tolist(), strict=True))
        found = tuple(NonfiniteParameter(name, *row) for name, row in rows if row[0] or row[1])
        ranges: list[FiniteRange] = []
        for name, (nans, infs, _) in rows:
            finite = nans == infs == 0
            if ranges and ranges[-1].finite == finite:
                ranges[-1] = ranges[-1]._replace(last=name)
            else:
                ranges.append(FiniteRange(finite, name, name))
        return found, tuple(ranges) if found else ()

    def __getattr__(self, name: str):
        if name.startswith("_"):  # pickle and copy look for methods before the result exists
            raise AttributeError(name)
        return getattr(self.result(), name)

    def __repr__(self) -> str:
        return repr(self.result()) if self.ready else f"PendingReport(step={self.step})"


class Transfer:
    """A copy of tensors to the host without a sync. Tensors on the CPU need no copy."""

    def __init__(self, *tensors: Tensor):
        self._host, self._event = tensors, None
        device = tensors[0].device
        if device.type != "cpu":
            pinned = [torch.empty_like(t, device="cpu", pin_memory=True) for t in tensors]
            for here, there in zip(pinned, tensors, strict=True):
                here.copy_(there, non_blocking=True)
            self._host, self._event = pinned, torch.Event(device)
            self._event.record(torch.accelerator.current_stream(device))

    @property
    def ready(self) -> bool:
        return self._event is None or self._event.query()

    def wait(self) -> list:
        """The values of each tensor, as numbers or nested lists; waits for the copy."""
        if self._event is not None:
            self._event.synchronize()
        return [tensor.tolist() for tensor in self._host]


def strict_json(value):
    """The value with NaN and Infinity as text: JSON has neither."""
    if isinstance(value, dict):
        return {key: strict_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict_json(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def shorten(items: Iterable, at_most: int = 8) -> str:
    """The items as text. If some are left out, the text ends with the number of all."""
    words = [str(item) for item in items]
    more = f", ... ({len(words)} in all)" if len(words) > at_most else ""
    return ", ".join(words[:at_most]) + more


def __getattr__(name: str):
    old = {
        "Offender": ("NonfiniteParameter", NonfiniteParameter),
        "Stretch": ("FiniteRange", FiniteRange),
    }
    return renamed_object(__name__, name, old)
