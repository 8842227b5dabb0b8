"""The findings of a diagnosis, and the evidence that the rules read."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from torch import nn

from fastguard._deprecated import Renamed

from .probes import Call, ForwardOrigin
from .summary import Summary

#: All kinds of findings. A cause comes before its consequences.
KINDS = (
    "bad input",
    "learning rate",
    "weight growth",
    "poisoned weight",
    "infeasible target",
    "zero variance",
    "overflow",
    "undefined value",
    "undefined loss",
    "gradient overflow",
    "undefined gradient",
    "exploding logits",
    "exploding gradient",
    "vanishing gradient",
    "dead units",
    "clamped attention",
    "no gradient",
    "tiny batch",
)


@dataclass(frozen=True)
class Finding:
    """A fault, or something that deserves a look (`fault` is false)."""

    #: One of KINDS.
    kind: str
    #: Name of a module, a parameter, an utterance or a setting.
    where: str
    #: The description in words, with the numbers.
    what: str
    #: The setting to change.
    suggestion: str
    fault: bool = True
    evidence: dict = field(default_factory=dict)

    cure = Renamed("suggestion")

    def __str__(self) -> str:
        return f"{self.kind} at {self.where}: {self.what}.\n  Change: {self.suggestion}."

    def to_dict(self) -> dict:
        return asdict(self)


@dataclass
class Evidence:
    """The input of the rules."""

    model: nn.Module
    calls: list[Call]
    origin: ForwardOrigin | None
    loss: Summary
    #: The gradient of each parameter by name; None if the loss does not depend on it.
    gradients: dict[str, Summary | None]
    loss_scale: float
    #: Parameters and buffers that were not finite before the forward pass.
    poisoned: dict[str, Summary]
    #: Buffers that became non-finite in the forward pass.
    poisoned_buffers: tuple[str, ...]
    #: Of the optimizer; None if it is not known.
    learning_rate: float | None = None

    @property
    def gradients_finite(self) -> bool:
        return all(g is None or g.finite for g in self.gradients.values())
