"""What a diagnosis may find, and what the rules look at."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from torch import nn

from fastguard._deprecated import Renamed

from .probes import Call, ForwardOrigin
from .summary import Summary

#: Every kind of finding; of several, the cause comes before its consequences.
KINDS = (
    "bad input",
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
    """Something that is wrong (`fault`), or that is worth a look."""

    #: One of KINDS.
    kind: str
    #: Name of a module, a parameter or an utterance.
    where: str
    #: In plain words, with the numbers.
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
    """What the rules look at."""

    model: nn.Module
    calls: list[Call]
    origin: ForwardOrigin | None
    loss: Summary
    #: Gradients by the parameters, by name; None where the loss does not depend on it.
    gradients: dict[str, Summary | None]
    loss_scale: float
    #: Parameters and buffers that were not finite before, and buffers that forward made so.
    poisoned: dict[str, Summary]
    poisoned_buffers: tuple[str, ...]

    @property
    def gradients_finite(self) -> bool:
        return all(g is None or g.finite for g in self.gradients.values())
