"""Root-cause analysis of a training step: the fault, its place and the setting to change."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastguard._random import random_state, set_random_state
from fastguard.guard.buffers import Buffers
from fastguard.guard.report import strict_json

from .findings import Evidence, Finding
from .growth import gradient_growths
from .nonfinite import BackwardOrigin, backward_origin
from .probes import ForwardOrigin, Probe, poisoned_tensors
from .rules import find
from .summary import Summary, summarize
from .table import Layer, layers, render

__all__ = ["Diagnosis", "Finding", "Layer", "diagnose"]


@dataclass(frozen=True)
class Diagnosis:
    """The result of :func:`diagnose`. Its text is the verdict and the table of layers."""

    loss: float
    #: L2 norm of the finite gradients of all parameters, divided by the loss scale.
    grad_norm: float
    layers: tuple[Layer, ...]
    first_nonfinite_forward: ForwardOrigin | None
    first_nonfinite_backward: BackwardOrigin | None
    #: The cause, then its consequences, then notes that are not faults.
    findings: tuple[Finding, ...]
    #: The change of the gradient over the layer that is repeated most often, in words.
    growth: str = ""

    @property
    def healthy(self) -> bool:
        """Whether there is no fault."""
        return not any(finding.fault for finding in self.findings)

    @property
    def gradients_overflow(self) -> bool:
        """Whether the cause is a gradient above the largest value of its dtype."""
        return bool(self.findings) and self.findings[0].kind == "gradient overflow"

    @property
    def verdict(self) -> str:
        """The faults and notes in words, with the settings to change."""
        faults = [finding for finding in self.findings if finding.fault]
        notes = [finding for finding in self.findings if not finding.fault]
        lines = [f"Also {finding}" for finding in faults[1:]]
        lines += [f"Note: {finding}" for finding in notes]
        if faults:
            return "\n".join([f"Verdict: {faults[0]}", *lines])
        well = (
            f"Verdict: nothing wrong. The loss ({self.loss:.4g}) and all gradients (norm "
            f"{self.grad_norm:.4g}) are finite{self.growth}."
        )
        return "\n".join([well, *lines])

    @property
    def table(self) -> str:
        """A row of numbers for each layer."""
        return render(list(self.layers))

    def __str__(self) -> str:
        return f"{self.verdict}\n\n{self.table}"

    def to_dict(self) -> dict:
        """The diagnosis as plain values. NaN and Inf become text, because JSON has neither."""
        forward, backward = self.first_nonfinite_forward, self.first_nonfinite_backward
        return strict_json(
            {
                "healthy": self.healthy,
                "verdict": self.verdict,
                "loss": self.loss,
                "grad_norm": self.grad_norm,
                "first_nonfinite_forward": forward
                and {"module": forward.name, "kind": forward.kind},
                "first_nonfinite_backward": backward
                and {"module": backward.name, "entered": backward.entered},
                "findings": [_plain(finding.to_dict()) for finding in self.findings],
                "layers": [layer.to_dict() for layer in self.layers],
            }
        )


def diagnose(
    model: nn.Module,
    loss_fn: Callable[[], Tensor],
    *,
    loss_scale: float = 1.0,
    learning_rate: float | None = None,
    data_findings: Iterable[Finding] = (),
) -> Diagnosis:
    """Run `model` forward and backward once, record each of its modules, and name the faults.

    It finds a bad input, a poisoned weight or buffer, an overflow and other values that are not
    finite, with the first module that produced them, forward or backward. It finds a learning rate
    that is too large, weights that have grown, exploding attention logits, repeated layers over
    which the gradient explodes or vanishes, BatchNorm without variance, and dead units.

    The model does not change: its weights, gradients, buffers and modes stay, and so do the random
    number generators of torch, NumPy and Python. Only lazy modules get their shapes. Hooks on the
    accumulation of gradients do not run, unless the model uses reentrant checkpointing, which needs
    a full backward pass.

    Args:
        model: any module, in the mode (training or evaluation) to examine.
        loss_fn: calls the model, under autocast if training uses it, and returns the scalar loss.
            It does not call backward.
        loss_scale: factor on the loss in backward, as of a GradScaler. The reported numbers are
            divided by it.
        learning_rate: of Adam, AdamW or a relative, whose steps move each weight by about as much.
            None: it is not examined.
        data_findings: findings about the batch, such as those of
            :func:`fastguard.speech.data.problems.ctc_problems`. They join the findings.

    Raises:
        ValueError: `loss_fn` does not return a scalar tensor, or calls no module of the model, or
            `loss_scale` is not finite and above 0, or `learning_rate` is NaN or below 0.
        Exception: any exception of `loss_fn`. The model is restored first.
    """
    if not (math.isfinite(loss_scale) and loss_scale > 0):
        raise ValueError(f"loss_scale must be finite and above 0, got {loss_scale}")
    if learning_rate is not None and not learning_rate >= 0:
        raise ValueError(f"learning_rate must be at least 0, got {learning_rate}")
    with _unchanged(model), torch.inference_mode(False), torch.enable_grad():
        probe = Probe(model)
        with probe, torch.compiler.set_stance("force_eager"):
            loss = loss_fn()
            _check(loss, probe)
            later = tuple(name for name in poisoned_tensors(model) if name not in probe.poisoned)
            probe.backward = True
            gradients = _gradients(model, loss, loss_scale)
        evidence = Evidence(
            model,
            probe.calls,
            probe.origin,
            summarize([loss]),
            gradients,
            loss_scale,
            probe.poisoned,
            later,
            learning_rate,
        )
        for call in probe.calls:
            call.entering = _unscaled(call.entering, loss_scale)
            call.leaving = _unscaled(call.leaving, loss_scale)
        return _diagnosis(evidence, loss.item(), tuple(data_findings))


def _diagnosis(evidence: Evidence, loss: float, known: tuple[Finding, ...]) -> Diagnosis:
    norms = [g.norm for g in evidence.gradients.values() if g is not None]
    growths = gradient_growths(evidence.calls)
    growth = ""
    if growths:
        most = max(growths, key=lambda g: g.layers)
        growth = (
            f"; over {most.where}, {most.layers} of them, the gradient changes by "
            f"{most.factor:.3g}x per layer"
        )
    return Diagnosis(
        loss,
        math.hypot(*norms),
        tuple(layers(evidence)),
        evidence.origin,
        backward_origin(evidence),
        tuple(find(evidence, known)),
        growth,
    )


def _check(loss: Tensor, probe: Probe) -> None:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"loss_fn must return a scalar tensor, got {shape}: take its mean or sum")
    if not probe.calls:
        raise ValueError(
            "loss_fn called no module of the model: pass the model that it calls, not a copy or a "
            "wrapper"
        )


def _gradients(model: nn.Module, loss: Tensor, scale: float) -> dict[str, Summary | None]:
    """The summary of each parameter's gradient by name, divided by `scale`; None without one."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not named or not loss.requires_grad:
        return dict.fromkeys(named)
    loss = loss * scale if scale != 1 else loss
    if _reentrant(loss):
        gradients = _by_backward([*named.values()], loss)
    else:
        # backward() would run hooks on parameters, which may step optimizers or communicate.
        gradients = torch.autograd.grad(loss, [*named.values()], allow_unused=True)
    summaries = (None if g is None else summarize([_strided(g)]) for g in gradients)
    return {name: _unscaled(summary, scale) for name, summary in zip(named, summaries, strict=True)}


def _reentrant(loss: Tensor) -> bool:
    """Whether a part of the graph is under torch.utils.checkpoint(use_reentrant=True)."""
    seen, nodes = set(), [loss.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        if node.name() == "CheckpointFunctionBackward":
            return True
        seen.add(node)
        nodes += [following for following, _ in node.next_functions]
    return False


def _by_backward(parameters: list[nn.Parameter], loss: Tensor) -> list[Tensor | None]:
    kept = [p.grad for p in parameters]
    try:
        for p in parameters:
            p.grad = None
        loss.backward()
        return [p.grad for p in parameters]
    finally:
        for p, gradient in zip(parameters, kept, strict=True):
            p.grad = gradient


def _strided(gradient: Tensor) -> Tensor:
    if gradient.layout == torch.sparse_coo:
        return gradient.coalesce().values()
    return gradient


def _unscaled(summary: Summary | None, scale: float) -> Summary | None:
    if summary is None or scale == 1:
        return summary
    values = {**vars(summary), "largest": summary.largest / scale, "norm": summary.norm / scale}
    return Summary(**values)


@contextlib.contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Restore buffers, modes and random number generators afterwards."""
    buffers = Buffers(model)
    modes = {module: module.training for module in model.modules()}
    generators = random_state()
    try:
        yield
    finally:
        buffers.restore()
        for module, mode in modes.items():
            module.training = mode
        set_random_state(generators)


def _plain(value):
    """The value with dtypes as text, for JSON."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return str(value) if isinstance(value, torch.dtype) else value
