"""Rules about the size of weights, and of the learning rate that changes them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from .findings import Evidence, Finding
from .summary import readable, summarize

#: Largest weights, as multiples of their usual size. torch's own initial weights have 0.6 to 1.
LARGEST_RMS = 120.0
#: An element is alone in its size if it is this many times the median magnitude of its tensor.
LONE, LEAST_LONE = 1000.0, 30.0
#: Largest step of a weight in proportion to its usual size. Good ones are 1e-4 to 1e-1.
LARGEST_STEP = 1.0
#: Layers whose weights usually have a root mean square of about 1 / sqrt(fan-in).
_BY_FAN_IN = (nn.Linear, _ConvNd, nn.MultiheadAttention, nn.RNNBase)


@dataclass(frozen=True)
class Grown:
    """A parameter that is larger than weights usually are."""

    name: str
    rms: float
    largest: float
    #: The root mean square that such a parameter usually has.
    usual: float
    #: How many times the usual size, or the median size, the parameter or its element has.
    times: float
    #: Flat index of an element that alone is large; None if the whole tensor is.
    element: int | None = None

    def __str__(self) -> str:
        if self.element is None:
            return (
                f"its root mean square is {self.rms:.3g}, {self.times:.3g} times that of a usual "
                f"weight of this shape ({self.usual:.2g})"
            )
        return (
            f"its element {self.element} has a magnitude of {self.largest:.3g}, {self.times:.3g} "
            "times the median of the tensor"
        )


def usual_sizes(model: nn.Module) -> dict[str, float]:
    """The usual root mean square of each parameter by name, without biases.

    It is 1 / sqrt(fan-in) for the matrices of linear layers, convolutions, attention and recurrent
    layers, as torch initialises them. Others, such as norms and embeddings, have 1.
    """
    sizes = {}
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix, recurse=False):
            # A bias may have the size of the activations, which is not known here.
            bias = "bias" in name.rpartition(".")[2]
            if bias or nn.parameter.is_lazy(parameter) or not readable(parameter):
                continue
            by_fan_in = isinstance(module, _BY_FAN_IN) and parameter.dim() > 1
            fan_in = math.prod(parameter.shape[1:]) if by_fan_in else 1
            sizes[name] = 1 / math.sqrt(max(fan_in, 1))
    return sizes


@torch.no_grad()
def grown_parameters(model: nn.Module) -> list[Grown]:
    """The parameters that are too large, the most grown one first."""
    parameters = dict(model.named_parameters())
    grown = []
    for name, usual in usual_sizes(model).items():
        weight = parameters.get(name)
        if weight is None or weight.numel() == 0:  # a name of a shared parameter
            continue
        found = summarize([weight])
        rms, times = found.rms, found.rms / usual
        if found.largest > LEAST_LONE * usual:
            lone, index = _lone(weight)
            if lone > LONE:
                grown.append(Grown(name, rms, found.largest, usual, lone, index))
                continue
        if times > LARGEST_RMS:
            grown.append(Grown(name, rms, found.largest, usual, times))
    return sorted(grown, key=lambda g: -g.times)


def _lone(weight: Tensor) -> tuple[float, int]:
    """The largest magnitude divided by the median of the others that are not 0, and its index."""
    sizes = weight.detach().flatten().abs().to(torch.float64).nan_to_num(0.0, posinf=0.0)
    index = int(sizes.argmax())
    others = sizes[sizes > 0]
    if len(others) < 3:
        return 0.0, index
    return float(sizes[index] / others.median()), index


def weight_growth(evidence: Evidence) -> Iterator[Finding]:
    grown = grown_parameters(evidence.model)
    if not grown:
        return
    worst = grown[0]
    what = str(worst)
    if len(grown) > 1:
        count = len(evidence.gradients) or len(grown)
        what += f"; {len(grown)} of {count} parameters have grown in this way"
    suggestion = (
        "lower the learning rate (optim.lr) and raise the weight decay (optim.weight_decay); go "
        "back to a checkpoint from before the growth"
    )
    yield Finding(
        "weight growth",
        worst.name,
        what,
        suggestion,
        evidence={"parameters": [asdict(each) for each in grown]},
    )


def learning_rate(evidence: Evidence) -> Iterator[Finding]:
    if evidence.learning_rate is not None:
        yield from excessive_rate(evidence.model, evidence.learning_rate)


def excessive_rate(model: nn.Module, rate: float) -> Iterator[Finding]:
    """A finding if a step of Adam at this learning rate is larger than the weights usually are."""
    sizes = usual_sizes(model)
    matrices = [size for size in sizes.values() if size < 1] or [*sizes.values()]
    if not matrices:
        return
    usual = statistics.median(matrices)
    if rate < LARGEST_STEP * usual:
        return
    what = (
        f"{rate:.3g} is too large: Adam moves a weight by about as much in each step, "
        f"{rate / usual:.3g} times the size of a usual weight of this model ({usual:.2g})"
    )
    suggestion = (
        f"lower optim.lr, to {_round(usual / 100)} or less, and begin with new weights or a "
        "checkpoint from before"
    )
    numbers = {"learning_rate": rate, "usual_weight": usual}
    yield Finding("learning rate", "optim.lr", what, suggestion, evidence=numbers)


def _round(rate: float) -> str:
    """The power of ten at or below ``rate``."""
    return f"{10.0 ** math.floor(math.log10(rate)):.0e}"
