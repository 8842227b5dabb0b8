"""The guard: measure the gradients, decide, apply. Three lines in any PyTorch loop."""

import collections
import dataclasses
import logging
import math
import statistics
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from . import ops
from .clip import check_threshold, readable, scale_
from .ops import Verdict

logger = logging.getLogger(__name__)

_WINDOW = 128  # accepted norms whose median arms skip_norm; llm.c's and OLMo-core's window
_ARMED_AFTER = 16  # a median of fewer says little


@dataclasses.dataclass(frozen=True)
class StepReport:
    """What the guard saw in one step and what it did."""

    step: int
    batch_id: object
    verdict: Verdict
    #: L2 norm of all gradients before clipping, after unscaling.
    total_norm: float
    #: Factor the gradients were multiplied by; 1.0 where nothing was written.
    clip_coef: float
    #: Names of the parameters with a NaN or Inf gradient, in the model's order.
    nonfinite: tuple[str, ...] = ()
    #: Where the first of them has its first NaN or Inf: "name[flat index]". None where all
    #: elements are finite, also if the norm of float64 gradients overflowed.
    first_nonfinite: str | None = None

    @property
    def skipped(self) -> bool:
        return self.verdict.skipped

    @property
    def batch(self) -> object:
        """The batch's id, or the number of the step where none was given."""
        return self.step if self.batch_id is None else self.batch_id


class GradientExplosionError(RuntimeError):
    """``patience`` steps in a row were skipped. ``reports`` holds what each of them looked like."""

    def __init__(self, reports: list[StepReport], skip_norm: float):
        self.reports = reports
        self.skip_norm = skip_norm
        bad = [r for r in reports if r.first_nonfinite is not None]
        large = [r for r in reports if r.first_nonfinite is None]
        seen, cures = [], []
        if bad:
            places = dict.fromkeys(r.first_nonfinite for r in bad)
            seen.append(f"{len(bad)} had a NaN or Inf gradient, first at {_shorten(places)}")
            cures.append(
                "look for corrupt or silent inputs and for targets longer than their inputs in "
                "these batches; run in fp32; lower the learning rate; restart from a checkpoint "
                "older than the first of them"
            )
        if large:
            norms = _shorten(f"{r.total_norm:.3g}" for r in large)
            seen.append(f"{len(large)} had a norm above skip_norm={skip_norm:g} ({norms})")
            cures.append(
                "raise skip_norm or set it to inf, so that large finite gradients are clipped; "
                "lower the learning rate"
            )
        super().__init__(
            f"{len(reports)} steps in a row were skipped, steps {reports[0].step} to "
            f"{reports[-1].step}: {'; '.join(seen)}.\n"
            f"  batches: {_shorten(r.batch for r in reports)}\n"
            f"  parameters that were non-finite first: "
            f"{_shorten(bad[0].nonfinite) if bad else 'none'}\n"
            f"  what to try: {'; '.join(cures)}."
        )

    def __reduce__(self):  # exceptions are pickled by their message, and rebuilt from it
        return type(self), (self.reports, self.skip_norm)


class GradGuard:
    """Survive gradient explosions: skip what must not reach the weights, clip the rest.

    ::

        guard = GradGuard(model, max_norm=0.5, skip_norm=10.0)
        ...
        loss.backward()
        report = guard.step(optimizer)      # in place of clip_grad_norm_ and optimizer.step

    A step is skipped when the norm of all gradients is NaN or Inf. It is skipped as an outlier when
    the norm is finite and above ``skip_norm`` while that threshold is *armed*: while the median of
    the last 128 accepted norms (of at least 16) lies below it. Unarmed, as at the start of a
    training, such a norm is clipped; a rule "skip whatever is above 10" would skip for ever where
    10 is an ordinary norm.

    A skipped step leaves parameters and optimizer state as they are, and, where the guard was given
    a module, sets its buffers back to what they were after the last accepted step (or the last
    ``load_state_dict``): a NaN activation gets into BatchNorm's running statistics before any
    gradient exists, and would stay there for ever.

    Args:
        params_or_model: a module, whose parameters are looked up at every step; or a parameter, or
            an iterable of parameters or of (name, parameter) pairs.
        max_norm: largest norm let through unclipped; inf turns clipping off.
        skip_norm: norm above which an outlier is skipped; inf turns that off.
        patience: this many skips in a row raise :class:`GradientExplosionError`. An fp16
            GradScaler that starts at 65536 may need 16 to find its scale.

    Raises:
        ValueError: no parameters, a negative or NaN threshold, ``patience`` < 1.
    """

    def __init__(
        self,
        params_or_model: nn.Module | Iterable[Tensor] | Iterable[tuple[str, Tensor]],
        max_norm: float = 1.0,
        skip_norm: float = math.inf,
        patience: int = 25,
    ):
        self.max_norm = check_threshold("max_norm", max_norm)
        self.skip_norm = check_threshold("skip_norm", skip_norm)
        if patience < 1:
            raise ValueError(f"patience must be at least 1 step, got {patience}")
        self.patience = patience
        self._module = params_or_model if isinstance(params_or_model, nn.Module) else None
        self._named = [] if self._module is not None else _name(params_or_model)
        self._buffers = _Buffers(self._module)
        if not self._named_parameters():
            raise ValueError(
                "GradGuard got no parameters; pass the module, or its parameters() as a list if a "
                "generator was used up before"
            )
        self._accepted: collections.deque[float] = collections.deque(maxlen=_WINDOW)
        self._skips_in_a_row: list[StepReport] = []
        self._steps = 0

    @property
    def armed(self) -> bool:
        """Whether a norm above ``skip_norm`` is an outlier by now."""
        return (
            len(self._accepted) >= _ARMED_AFTER
            and statistics.median(self._accepted) < self.skip_norm
        )

    @torch.no_grad()
    def step(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        scaler: torch.amp.GradScaler | None = None,
        batch_id: object = None,
    ) -> StepReport:
        """Clip and call ``optimizer.step()``, or skip; gradients stay for ``zero_grad`` to clear.

        Args:
            optimizer: any torch optimizer whose step needs no closure.
            scaler: the GradScaler that scaled the loss, if one did; the guard unscales the
                gradients, steps through it and updates it.
            batch_id: anything that names the batch in reports, warnings and errors.

        Raises:
            GradientExplosionError: this was the ``patience``-th skip in a row.
            ValueError: the optimizer holds a gradient that the guard does not watch, or the
                gradients are on several devices.
        """
        named = self._gradients_of(optimizer)
        grads = [grad for _, grad in named]
        if scaler is not None:
            scaler.unscale_(optimizer)
        measured = ops.grad_norm(readable(grads))
        decision = ops.decide(
            measured.total_norm, self.max_norm, self.skip_norm if self.armed else math.inf
        )
        report = StepReport(
            self._steps,
            batch_id,
            Verdict(int(decision.verdict)),
            measured.total_norm.item(),
            decision.clip_coef.item(),
            *_offenders(named, measured),
        )
        self._steps += 1
        if report.skipped:
            self._buffers.restore()
        else:
            self._buffers.commit()
            scale_(grads, decision.clip_coef)
            optimizer.step() if scaler is None else scaler.step(optimizer)
        if scaler is not None:
            scaler.update()
        self._account(report)
        return report

    def _named_parameters(self) -> list[tuple[str, Tensor]]:
        # Anew each time: layers are unfrozen, added, and replaced by load_state_dict(assign=True).
        return self._named if self._module is None else list(self._module.named_parameters())

    def _gradients_of(self, optimizer: torch.optim.Optimizer) -> list[tuple[str, Tensor]]:
        named = self._named_parameters()
        watched = {id(p) for _, p in named}
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            if id(p) not in watched and p.grad is not None:
                raise ValueError(
                    f"the optimizer holds a parameter of shape {tuple(p.shape)} with a gradient "
                    "that the guard does not watch; give GradGuard the module or all parameters"
                )
        # By gradient, not by parameter: two parameters may share one.
        once = {id(p.grad): (name, p.grad) for name, p in reversed(named) if p.grad is not None}
        gradients = list(reversed(once.values()))
        if len(devices := {str(grad.device) for _, grad in gradients}) > 1:
            raise ValueError(
                f"gradients on several devices, {sorted(devices)}: GradGuard takes one"
            )
        return gradients

    def _account(self, report: StepReport) -> None:
        if not report.skipped:
            if report.total_norm > 0:  # a step without gradients says nothing about their size
                self._accepted.append(report.total_norm)
            self._skips_in_a_row.clear()
            return
        if report.verdict is Verdict.SKIP_NONFINITE:
            logger.warning(
                "Infinite gradient, skipping batch %s (norm %s, first at %s)",
                report.batch,
                report.total_norm,
                report.first_nonfinite or "none: the sum of the squares overflows",
            )
        else:
            logger.warning(
                "Large gradient norm: %.4g at batch %s, skipping (skip_norm %g)",
                report.total_norm,
                report.batch,
                self.skip_norm,
            )
        self._skips_in_a_row.append(report)
        if len(self._skips_in_a_row) >= self.patience:
            reports, self._skips_in_a_row = self._skips_in_a_row, []
            raise GradientExplosionError(reports, self.skip_norm)

    def state_dict(self) -> dict:
        """What the next decision depends on, as plain numbers; thresholds are not part of it."""
        return {
            "steps": self._steps,
            "accepted": list(self._accepted),
            "skips_in_a_row": [
                {**dataclasses.asdict(r), "verdict": int(r.verdict), "batch_id": str(r.batch)}
                for r in self._skips_in_a_row
            ],
        }

    def load_state_dict(self, state: dict) -> None:
        self._steps = state["steps"]
        self._accepted = collections.deque(state["accepted"], maxlen=_WINDOW)
        self._skips_in_a_row = [
            StepReport(
                **{**r, "verdict": Verdict(r["verdict"]), "nonfinite": tuple(r["nonfinite"])}
            )
            for r in state["skips_in_a_row"]
        ]


class _Buffers:
    """Copies of a module's buffers as they were after the last accepted step.

    All are copied each time: torch's own batch normalisation writes its running statistics without
    counting it in ``_version``, so there is no telling what changed.
    """

    def __init__(self, module: nn.Module | None):
        self._module = module
        self._saved: dict[tuple[nn.Module, str], tuple[Tensor, Tensor] | None] = {}
        self.commit()
        if module is not None:
            module.register_load_state_dict_post_hook(lambda module, keys: self.commit())

    def commit(self) -> None:
        """What is in the buffers now is good."""
        saved = {}
        for key, buffer in self._current():
            old = self._saved.get(key)
            if buffer is None:
                saved[key] = None
            elif old is not None and old[0] is buffer and old[1].shape == buffer.shape:
                saved[key] = (buffer, old[1].copy_(buffer))
            else:
                saved[key] = (buffer, buffer.detach().clone())
        self._saved = saved

    def restore(self) -> None:
        """Undo what was written into the buffers, or put in their place, since the last commit."""
        for (module, name), saved in self._saved.items():
            module._buffers[name] = None if saved is None else saved[0].copy_(saved[1])

    def _current(self) -> Iterator[tuple[tuple[nn.Module, str], Tensor | None]]:
        for module in self._module.modules() if self._module is not None else ():
            for name, buffer in module._buffers.items():
                if not nn.parameter.is_lazy(buffer):
                    yield (module, name), buffer


def _name(
    parameters: Tensor | Iterable[Tensor] | Iterable[tuple[str, Tensor]],
) -> list[tuple[str, Tensor]]:
    if isinstance(parameters, Tensor):
        parameters = [parameters]
    return [
        item if isinstance(item, tuple) else (f"parameter {i}", item)
        for i, item in enumerate(parameters)
    ]


def _offenders(named, measured: ops.GradNorm) -> tuple[tuple[str, ...], str | None]:
    tensor, index = measured.first_nonfinite.tolist()
    if tensor < 0:
        return (), None
    counts = measured.nonfinite_counts.tolist()
    names = tuple(name for (name, _), count in zip(named, counts, strict=True) if count)
    return names, f"{named[tensor][0]}[{index}]"


def _shorten(items: Iterable, at_most: int = 8) -> str:
    words = [str(item) for item in items]
    more = f", ... ({len(words)} in all)" if len(words) > at_most else ""
    return ", ".join(words[:at_most]) + more
