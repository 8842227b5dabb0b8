"""The growth of gradients and activations over the repetitions of a layer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from .findings import Evidence, Finding
from .probes import ROOT, Call

#: Limits of the gradient's growth from the last to the first repetition of a layer.
LARGEST_GROWTH, SMALLEST_GROWTH = 1e4, 1e-6
FEWEST_REPEATS = 4


@dataclass(frozen=True)
class Growth:
    """The growth of a magnitude over the repetitions of a layer, in the order of computation."""

    where: str
    layers: int
    #: Geometric mean of the factors, each from one layer to the next.
    factor: float

    @property
    def product(self) -> float:
        return self.factor**self.layers


def repeated(calls: list[Call]) -> dict[str, list[Call]]:
    """Groups of calls by name: calls of one module, or of modules of one class in one parent."""
    groups: dict[tuple[str, type], list[Call]] = defaultdict(list)
    for call in calls:
        if call.name != ROOT:  # the model itself is not one of its children
            groups[call.name.rpartition(".")[0], type(call.module)].append(call)
    named = {}
    for (_, kind), group in groups.items():
        if len(group) >= FEWEST_REPEATS:
            first, last = group[0].name, group[-1].name
            span = first if first == last else f"{first} to {last}"
            named[f"{span} ({kind.__name__})"] = group
    return named


def _growth(where: str, sizes: list[float]) -> Growth | None:
    """The growth over `sizes`, which are in the order of computation; None if the first is 0."""
    if len(sizes) < FEWEST_REPEATS or not sizes[0] > 0:
        return None
    last = max(sizes[-1], 1e-300)  # a gradient may be exactly 0
    return Growth(where, len(sizes), (last / sizes[0]) ** (1 / (len(sizes) - 1)))


def gradient_growths(calls: list[Call]) -> list[Growth]:
    """The growth of the gradient over each repeated layer, backwards while it is finite."""
    growths = []
    for where, group in repeated(calls).items():
        sizes = []
        for call in reversed(group):
            if call.entering is None or not call.entering.finite:
                break
            sizes.append(call.entering.norm)
        growths.append(_growth(where, sizes))
    return [growth for growth in growths if growth]


def largest_growth(evidence: Evidence) -> Growth | None:
    growths = [g for g in gradient_growths(evidence.calls) if g.product >= LARGEST_GROWTH]
    return max(growths, key=lambda g: g.product, default=None)


def _forward_growth(calls: list[Call], where: str) -> Growth | None:
    sizes = []
    for call in repeated(calls).get(where, ()):
        if call.outputs is None or not call.outputs.finite:
            break
        sizes.append(call.outputs.rms)
    return _growth(where, sizes)


def exploding(evidence: Evidence) -> Iterator[Finding]:
    growth = largest_growth(evidence)
    if growth is None:
        return
    forward = _forward_growth(evidence.calls, growth.where)
    what = (
        f"the gradient grows {growth.factor:.3g}x per layer over {growth.layers} layers: "
        f"{growth.product:.1e}x"
    )
    if forward is not None:
        what += f" (the activations {forward.factor:.3g}x per layer: {forward.product:.1e}x)"
    suggestion = (
        "put a normalisation before each of these layers or scale their residual branches; start "
        "from smaller weights (fastguard.stable_init_, init.linear_std); clip (guard.max_norm) and "
        "lower the learning rate (optim.lr) until then"
    )
    yield Finding("exploding gradient", growth.where, what, suggestion, evidence=asdict(growth))


def vanishing(evidence: Evidence) -> Iterator[Finding]:
    growths = gradient_growths(evidence.calls)
    growth = min(growths, key=lambda g: g.product, default=None)
    if growth is None or growth.product > SMALLEST_GROWTH:
        return
    what = (
        f"the gradient shrinks to {growth.factor:.3g} of itself per layer over {growth.layers} "
        f"layers: {growth.product:.1e} of it arrives"
    )
    suggestion = (
        "add residual connections or a normalisation to these layers; start from larger weights "
        "(init.linear_std, init.conv_scale); in fp16 scale the loss"
    )
    yield Finding("vanishing gradient", growth.where, what, suggestion, evidence=asdict(growth))
