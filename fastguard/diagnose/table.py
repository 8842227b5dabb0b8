"""One row per layer, as numbers and as text."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields

from torch import nn

from fastguard._table import aligned

from .findings import Evidence
from .growth import repeated
from .layer_rules import dead_share
from .probes import ROOT, Call
from .summary import Summary, merge


@dataclass(frozen=True)
class Layer:
    """The numbers of one module over all its calls; None where a number does not apply.

    `activation_max` and the norms are those of the finite values.
    """

    name: str
    kind: str
    calls: int
    activation_max: float | None
    #: The number of outputs that are NaN or Inf.
    nonfinite: int
    #: L2 norm of the gradient with respect to the module's own parameters.
    grad_norm: float | None
    #: The norm of the gradient with respect to the inputs, divided by the norm of the gradient with
    #: respect to the outputs. A module with a gain above 1 amplifies the gradient. Several calls
    #: have the geometric mean of their gains.
    gain: float | None
    #: The number of NaNs and Infs in these two gradients and in that of the parameters.
    nonfinite_gradient: int
    #: Largest logit of all heads; smallest entropy of a head, in nats; largest share of a head's
    #: output that the clamp holds.
    max_logit: float | None
    entropy: float | None
    clamped_share: float | None
    #: Smallest variance of a channel of a BatchNorm.
    min_variance: float | None
    #: The share of channels whose outputs or gradients are all zero.
    dead_share: float | None

    def to_dict(self) -> dict:
        return asdict(self)


def layers(evidence: Evidence) -> list[Layer]:
    """A row for each module without children or with own parameters, and for each repeated block.

    The rows are in the order of the calls. Modules that were not called but have a gradient follow
    at the end.
    """
    calls: dict[nn.Module, list[Call]] = {}
    for call in evidence.calls:
        calls.setdefault(call.module, []).append(call)
    blocks = {call.module for group in repeated(evidence.calls).values() for call in group}
    rows = []
    names = {module: name for name, module in evidence.model.named_modules()}
    for module in dict.fromkeys([*calls, *names]):
        name = names[module]
        own = [f"{name}.{n}" if name else n for n, _ in module.named_parameters(recurse=False)]
        gradient = None
        for parameter in own:
            gradient = merge(gradient, evidence.gradients.get(parameter))
        leaf = not any(True for _ in module.children())
        if (module in calls and (leaf or own or module in blocks)) or gradient is not None:
            rows.append(_layer(name or ROOT, module, calls.get(module, []), gradient))
    return rows


def _layer(name: str, module: nn.Module, calls: list[Call], gradient: Summary | None) -> Layer:
    outputs = entering = leaving = None
    for call in calls:
        outputs = merge(outputs, call.outputs)
        entering, leaving = merge(entering, call.entering), merge(leaving, call.leaving)
    stats = [call.attention for call in calls if call.attention is not None]
    logits = [float(s.max_logit.max()) for s in stats]
    entropies = [float(s.entropy.min()) for s in stats]
    shares = [float(s.clamped_share.max()) for s in stats]
    variances = [float(c.variances.min()) for c in calls if c.variances is not None]
    dead = [share for share in map(dead_share, calls) if share is not None]
    return Layer(
        name,
        type(module).__name__,
        len(calls),
        None if outputs is None else outputs.largest,
        _bad(outputs),
        None if gradient is None else gradient.norm,
        _gain(calls),
        _bad(entering) + _bad(leaving) + _bad(gradient),
        max(logits, default=None),
        min(entropies, default=None),
        max(shares, default=None),
        min(variances, default=None),
        max(dead, default=None),
    )


def _gain(calls: list[Call]) -> float | None:
    gains = [
        call.leaving.norm / call.entering.norm
        for call in calls
        if call.leaving is not None
        and call.entering is not None
        and call.entering.norm > 0
        and call.leaving.finite
        and call.entering.finite
    ]
    if not gains or min(gains) == 0:
        return 0.0 if gains else None
    return math.exp(math.fsum(map(math.log, gains)) / len(gains))


def _bad(summary: Summary | None) -> int:
    return 0 if summary is None else summary.nans + summary.infs


_COLUMNS = {
    "kind": "kind",
    "calls": "calls",
    "activation_max": "act max",
    "nonfinite": "not finite",
    "grad_norm": "grad norm",
    "gain": "gain",
    "nonfinite_gradient": "grads not finite",
    "max_logit": "logit max",
    "entropy": "entropy",
    "clamped_share": "clamped",
    "min_variance": "BN var",
    "dead_share": "dead",
}
_SHARES = ("clamped_share", "dead_share")
_COUNTS = ("nonfinite", "nonfinite_gradient")


def render(rows: list[Layer]) -> str:
    """The table as text, a row for each layer. Columns without a value are left out."""
    names = [f.name for f in fields(Layer) if f.name in _COLUMNS and _says(f.name, rows)]
    table = [["layer", *(_COLUMNS[name] for name in names)]]
    table += [[row.name, *(_cell(name, getattr(row, name)) for name in names)] for row in rows]
    return "\n".join(aligned(table, left=range(1 + ("kind" in names))))


def _says(name: str, rows: list[Layer]) -> bool:
    silent = {"calls": 1}.get(name, 0 if name in _COUNTS else None)
    return any(getattr(row, name) not in (None, silent) for row in rows)


def _cell(name: str, value: object) -> str:
    if value is None or (name in _COUNTS and value == 0):
        return "-"
    if name in _SHARES:
        return f"{value:.0%}"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
