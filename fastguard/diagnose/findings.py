"""Rules: from what the modules saw to what is wrong, where, and which setting to change."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

import torch
from torch import nn

from .probes import RECTIFIERS, ROOT, Call, ForwardOrigin
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

#: QK-Clip (arXiv 2507.20534) rescales queries and keys from a largest logit of 100 on.
LARGEST_LOGIT = 100.0
#: Of a layer that is repeated, from its last to its first repetition.
LARGEST_GROWTH, SMALLEST_GROWTH = 1e4, 1e-6
FEWEST_REPEATS = 4
#: A channel is constant where its variance is this part of BatchNorm's eps, or less.
CONSTANT = 1e-4
MOST_CONSTANT = MOST_DEAD = MOST_CLAMPED = 0.5
#: Of a channel, for its BatchNorm, and to call it dead: a few zeros may be chance.
FEWEST_VALUES, FEWEST_POSITIONS = 8, 16


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
    cure: str
    fault: bool = True
    evidence: dict = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.kind} at {self.where}: {self.what}.\n  Change: {self.cure}."

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


def find(evidence: Evidence, known: tuple[Finding, ...] = ()) -> list[Finding]:
    """All findings, causes first; `known` are those about the data."""
    found = [*known]
    for rule in _RULES:
        found += rule(evidence)
    found = [finding for finding in found if not _explained(finding, found)]
    return sorted(found, key=lambda f: (not f.fault, KINDS.index(f.kind)))


def _explained(finding: Finding, found: list[Finding]) -> bool:
    """Whether another finding says the same, and why."""
    kinds = {f.kind for f in found if f is not finding and f.fault}
    if finding.kind == "bad input":  # the model's word on it, beside that of the recordings
        return "utterance" not in finding.evidence and any(
            f.kind == "bad input" and "utterance" in f.evidence for f in found
        )
    if finding.kind == "undefined loss":
        return "infeasible target" in kinds
    return finding.kind in ("undefined value", "overflow") and any(
        f.kind == "zero variance" and f.fault and f.where == finding.where for f in found
    )


# --- values that are not finite, forward --------------------------------------------------------


def _first_nonfinite_value(evidence: Evidence) -> Iterator[Finding]:
    origin = evidence.origin
    if origin is None or origin.kind == "parameter":
        return
    harmless = evidence.loss.finite and evidence.gradients_finite
    if harmless and not evidence.poisoned_buffers:
        what = (
            f"{origin.found.nonfinite} here, and yet the loss and all gradients are finite: a "
            "mask, or padding that nothing reads"
        )
        cure = "nothing, if that is meant"
        yield Finding("undefined value", origin.name, what, cure, False, _numbers(origin))
    elif origin.kind == "input":
        what = f"the input itself is not finite ({origin.found.nonfinite})"
        what += _lasting(evidence)
        cure = (
            "find the sample that it comes from, and repair it or leave it out; until then let "
            "GradGuard skip such batches"
        )
        yield Finding("bad input", origin.name, what, cure, evidence=_numbers(origin))
    else:
        yield _computed_nonfinite(evidence, origin)


def _computed_nonfinite(evidence: Evidence, origin: ForwardOrigin) -> Finding:
    place = f", in its own operations before {origin.met_by}" if origin.met_by else ""
    inputs = f" of at most {origin.inputs.largest:.3g}" if origin.inputs else ""
    made = f"{origin.found.nonfinite} from finite inputs{inputs}{place}"
    if dtype := _overflowed(origin):
        name, limit = str(dtype).removeprefix("torch."), torch.finfo(dtype).max
        what = f"{made}: {name} ends at {limit:.3g}"
        if origin.wider is not None and origin.wider.finite:
            wider = str(origin.wider.dtype).removeprefix("torch.")
            what += (
                f", and in {wider} the same computation gives at most {origin.wider.largest:.3g}"
            )
        cure = "lower the learning rate, and clip; look for what makes the values before it large"
        if dtype == torch.float16:
            name = "fp16"
            cure = "run in bf16 or fp32 (--precision bf16); lower the learning rate"
        what = f"{name} overflow: {what}{_lasting(evidence)}"
        return Finding("overflow", origin.name, what, cure, evidence=_numbers(origin))
    what = (
        f"{made}{_lasting(evidence)}: an operation without a value, such as 0/0, Inf - Inf, a "
        "logarithm of 0 or a root of a negative number"
    )
    cure = "add an eps under the division, logarithm or root in this module"
    if isinstance(origin.module, nn.MultiheadAttention):
        cure = (
            "look for a row whose keys are all masked; fastguard.replace_attention_ makes it "
            "attend to nothing instead"
        )
    return Finding("undefined value", origin.name, what, cure, evidence=_numbers(origin))


def _overflowed(origin: ForwardOrigin) -> torch.dtype | None:
    """The dtype that was too narrow, if that was it."""
    dtype = origin.found.dtype
    if not dtype.is_floating_point or dtype.itemsize < 2:
        return None
    if origin.wider is not None:
        return dtype if origin.wider.finite else None
    near = max(s.largest for s in (origin.found, origin.inputs) if s is not None)
    limit = torch.finfo(dtype).max
    # The root: products and squares overflow from there on.
    return dtype if origin.found.infs and near > math.sqrt(limit) else None


def _lasting(evidence: Evidence) -> str:
    if not evidence.poisoned_buffers:
        return ""
    first, count = evidence.poisoned_buffers[0], len(evidence.poisoned_buffers)
    return (
        f"; the forward pass writes it into {count} buffers, first {first}, where it stays unless "
        "GradGuard puts them back"
    )


def _poisoned(evidence: Evidence) -> Iterator[Finding]:
    poisoned = evidence.poisoned
    if not poisoned:
        return
    met = evidence.origin.poisoned if evidence.origin is not None else ()
    first = (met or [*poisoned])[0]
    what = (
        f"a weight or buffer of the model is not finite ({poisoned[first].nonfinite}), "
        f"{len(poisoned)} tensors in all"
    )
    cure = (
        "go back to a checkpoint from before; train with fastguard.GradGuard, which neither takes "
        "such a step nor keeps such a buffer"
    )
    yield Finding("poisoned weight", first, what, cure, evidence={"tensors": list(poisoned)})


def _loss(evidence: Evidence) -> Iterator[Finding]:
    if evidence.loss.finite or (evidence.origin is not None):
        return
    what = (
        f"the loss is not finite ({evidence.loss.nonfinite}) though all that the modules gave is: "
        "it comes from the loss function"
    )
    cure = (
        "look for a target longer than its input (CTC), an empty target, a logarithm of 0 and a "
        "mean over nothing; compute the loss in fp32 outside autocast"
    )
    yield Finding("undefined loss", "the loss function", what, cure)


# --- values that are not finite, backward -------------------------------------------------------


@dataclass(frozen=True)
class BackwardOrigin:
    """Where the first gradient that is not finite came from."""

    name: str
    #: Whether it entered the module from what follows, finite everywhere before.
    entered: bool
    found: Summary
    #: The gradient that entered.
    entering: Summary | None


def backward_origin(evidence: Evidence) -> BackwardOrigin | None:
    for call in _in_backward(evidence.calls):
        if not call.entering.finite:
            return BackwardOrigin(call.name, True, call.entering, call.entering)
        own = (evidence.gradients.get(name) for name in _own_parameters(call))
        for gradient in (call.leaving, *own):
            if gradient is not None and not gradient.finite:
                return BackwardOrigin(call.name, False, gradient, call.entering)
    for name, gradient in reversed(evidence.gradients.items()):
        if gradient is not None and not gradient.finite:
            return BackwardOrigin(name, True, gradient, None)
    return None


def _in_backward(calls: list[Call]) -> list[Call]:
    """As backward came by; of modules with the same output the inner one first."""
    return sorted((c for c in calls if c.entering is not None), key=lambda c: c.entered)


def _own_parameters(call: Call) -> list[str]:
    prefix = "" if call.name == ROOT else f"{call.name}."
    return [prefix + name for name, _ in call.module.named_parameters(recurse=False)]


def _first_nonfinite_gradient(evidence: Evidence) -> Iterator[Finding]:
    origin = backward_origin(evidence)
    forward_finite = evidence.loss.finite and evidence.origin is None
    if origin is None or not forward_finite:
        return
    side = "in what follows it" if origin.entered else "in its backward"
    entering = origin.entering
    sizes = (
        f", from gradients of at most {entering.largest:.3g}"
        if entering is not None and not origin.entered
        else ""
    )
    what = f"the forward pass is finite; {origin.found.nonfinite} of a gradient arise {side}{sizes}"
    numbers = {"gradient": asdict(origin.found), "entering": entering and asdict(entering)}
    dtype = origin.found.dtype
    halves = dtype == torch.float16 and origin.found.infs
    grown = origin.found.infs and _growth_of_gradient(evidence)
    if halves or grown or evidence.loss_scale > 1e30:
        scale = f", the loss scale is {evidence.loss_scale:g}" if evidence.loss_scale != 1 else ""
        name = str(dtype).removeprefix("torch.")
        what = f"{name} overflow (at {torch.finfo(dtype).max:.3g}): {what}{scale}"
        cure = "run in bf16 or fp32; lower the loss scale; lower the learning rate"
        if dtype != torch.float16:
            cure = "see the gradient's growth below; clip activations or normalise them"
        yield Finding("gradient overflow", origin.name, what, cure, evidence=numbers)
        return
    cure = (
        "look for a root or a norm at 0, a division by 0 behind torch.where, and a logarithm of 0, "
        "and put an eps under it"
    )
    yield Finding("undefined gradient", origin.name, what, cure, evidence=numbers)


# --- gains --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Growth:
    """Of a magnitude over the repetitions of a layer, from the first that it meets to the last."""

    where: str
    layers: int
    #: Geometric mean of the factors, each from one layer to the next.
    factor: float

    @property
    def product(self) -> float:
        return self.factor**self.layers


def repeated(calls: list[Call]) -> dict[str, list[Call]]:
    """Calls of the same module, or of modules of one class in one parent, by name; in order."""
    groups: dict[tuple[str, type], list[Call]] = defaultdict(list)
    for call in calls:
        if call.name != ROOT:  # which is no child beside its own
            groups[call.name.rpartition(".")[0], type(call.module)].append(call)
    named = {}
    for (_, kind), group in groups.items():
        if len(group) >= FEWEST_REPEATS:
            first, last = group[0].name, group[-1].name
            span = first if first == last else f"{first} to {last}"
            named[f"{span} ({kind.__name__})"] = group
    return named


def _growth(where: str, sizes: list[float]) -> Growth | None:
    """Of sizes in the order in which they were met; None unless the first is above 0."""
    if len(sizes) < FEWEST_REPEATS or not sizes[0] > 0:
        return None
    last = max(sizes[-1], 1e-300)  # a gradient that vanished altogether
    return Growth(where, len(sizes), (last / sizes[0]) ** (1 / (len(sizes) - 1)))


def gradient_growths(calls: list[Call]) -> list[Growth]:
    """Of the gradient that enters each repeated layer; backwards as far as it is finite."""
    growths = []
    for where, group in repeated(calls).items():
        sizes = []
        for call in reversed(group):
            if call.entering is None or not call.entering.finite:
                break
            sizes.append(call.entering.norm)
        growths.append(_growth(where, sizes))
    return [growth for growth in growths if growth]


def _growth_of_gradient(evidence: Evidence) -> Growth | None:
    growths = [g for g in gradient_growths(evidence.calls) if g.product >= LARGEST_GROWTH]
    return max(growths, key=lambda g: g.product, default=None)


def _forward_growth(calls: list[Call], where: str) -> Growth | None:
    sizes = []
    for call in repeated(calls).get(where, ()):
        if call.outputs is None or not call.outputs.finite:
            break
        sizes.append(call.outputs.rms)
    return _growth(where, sizes)


def _exploding(evidence: Evidence) -> Iterator[Finding]:
    growth = _growth_of_gradient(evidence)
    if growth is None:
        return
    forward = _forward_growth(evidence.calls, growth.where)
    what = (
        f"the gradient grows {growth.factor:.3g}x per layer over {growth.layers} layers: "
        f"{growth.product:.1e}x"
    )
    if forward is not None:
        what += f" (the activations {forward.factor:.3g}x per layer: {forward.product:.1e}x)"
    cure = (
        "put a normalisation before each of these layers or scale their residual branches; start "
        "from smaller weights (fastguard.stable_init_, init.linear_std); clip (guard.max_norm) and "
        "lower the learning rate (optim.lr) until then"
    )
    yield Finding("exploding gradient", growth.where, what, cure, evidence=asdict(growth))


def _vanishing(evidence: Evidence) -> Iterator[Finding]:
    growths = gradient_growths(evidence.calls)
    growth = min(growths, key=lambda g: g.product, default=None)
    if growth is None or growth.product > SMALLEST_GROWTH:
        return
    what = (
        f"the gradient shrinks to {growth.factor:.3g} of itself per layer over {growth.layers} "
        f"layers: {growth.product:.1e} of it arrives"
    )
    cure = (
        "add residual connections or a normalisation to these layers; start from larger weights "
        "(init.linear_std, init.conv_scale); in fp16 scale the loss"
    )
    yield Finding("vanishing gradient", growth.where, what, cure, evidence=asdict(growth))


# --- layers -------------------------------------------------------------------------------------


def _logits(evidence: Evidence) -> Iterator[Finding]:
    seen = [c for c in evidence.calls if c.attention is not None and c.attention.max_logit.numel()]
    largest = {id(c): _finite_max(c.attention.max_logit) for c in seen}
    high = [c for c in seen if largest[id(c)] > LARGEST_LOGIT]
    if high:
        worst = max(high, key=lambda c: largest[id(c)])
        head = int(worst.attention.max_logit.nan_to_num(-math.inf).argmax())
        entropy = float(worst.attention.entropy[head])
        what = (
            f"attention logits of up to {largest[id(worst)]:.3g} (head {head}, entropy "
            f"{entropy:.2g} nats), above {LARGEST_LOGIT:g}; in {len(high)} of {len(seen)} layers"
        )
        cure = (
            "bound the logits (ClampedMultiheadAttention(softcap=50)) or normalise queries and "
            "keys; lower the learning rate of their projections (optim.lr)"
        )
        numbers = {"max_logit": largest[id(worst)], "head": head, "entropy": entropy}
        yield Finding("exploding logits", worst.name, what, cure, evidence=numbers)
    clamped = [c for c in seen if float(c.attention.clamped_share.max()) > MOST_CLAMPED]
    if clamped:
        share = float(clamped[0].attention.clamped_share.max())
        what = f"the clamp holds {share:.0%} of a head's output, and these get no gradient"
        cure = "raise network.attention_clamp, or lower the learning rate (optim.lr)"
        numbers = {"clamped_share": share}
        yield Finding("clamped attention", clamped[0].name, what, cure, evidence=numbers)


def _finite_max(x: torch.Tensor) -> float:
    return float(x.nan_to_num(-math.inf, posinf=math.inf).max())


def _batch_norm(evidence: Evidence) -> Iterator[Finding]:
    normed = [c for c in evidence.calls if c.variances is not None]
    constant = []
    for call in normed:
        share = float((call.variances <= CONSTANT * call.module.eps).double().mean())
        single = call.module.training and call.values < 2
        if single or share > 0:
            constant.append((single or share > MOST_CONSTANT or _blamed(evidence, call), call))
    for fault in (True, False):
        calls = [call for f, call in constant if bool(f) is fault]
        if calls:
            yield _zero_variance(calls, fault)
    few = [c for c in normed if c.module.training and 2 <= c.values < FEWEST_VALUES]
    if few:
        what = f"BatchNorm takes its statistics of {few[0].values} values per channel"
        cure = "raise batch_size, or use GroupNorm"
        numbers = {"values": few[0].values}
        yield Finding("tiny batch", few[0].name, what, cure, False, numbers)


def _blamed(evidence: Evidence, call: Call) -> bool:
    """Whether what is not finite came out of this module."""
    if evidence.origin is not None:
        return evidence.origin.kind == "computed" and evidence.origin.name == call.name
    backward = backward_origin(evidence)
    return backward is not None and not backward.entered and backward.name == call.name


def _zero_variance(calls: list[Call], fault: bool) -> Finding:
    call = calls[0]
    module = call.module
    channels = int((call.variances <= CONSTANT * module.eps).sum())
    smallest = float(call.variances.min()) if call.variances.numel() else 0.0
    if module.training and call.values < 2:
        what = f"BatchNorm sees {call.values} value per channel, which has no variance"
        cure = "raise batch_size, or use GroupNorm"
    else:
        source = "of this batch" if module.training else "in running_var"
        what = (
            f"BatchNorm: the variance {source} is zero in {channels} of {len(call.variances)} "
            f"channels (smallest {smallest:.1e}, eps {module.eps:g}): the gradient through them is "
            f"multiplied by {1 / math.sqrt(max(smallest + module.eps, 1e-300)):.3g}"
        )
        cure = "look for constant inputs and dead units before it; raise batch_size or eps"
    if len(calls) > 1:
        what += f"; in {len(calls)} BatchNorms"
    numbers = {"channels": channels, "smallest": smallest, "values": call.values}
    return Finding("zero variance", call.name, what, cure, fault, numbers)


def dead_share(call: Call) -> float | None:
    """Share of the channels that are always zero, or whose gradient is."""
    dead = call.silent
    if dead is not None and call.untaught is not None and call.untaught.shape == dead.shape:
        dead = dead | call.untaught
    return None if dead is None else float(dead.double().mean())


def _dead(evidence: Evidence) -> Iterator[Finding]:
    dead, untaught = [], []
    for call in evidence.calls:
        share = dead_share(call)
        if share is None or share <= MOST_DEAD or call.positions < FEWEST_POSITIONS:
            continue
        rectified = isinstance(call.module, RECTIFIERS) and float(call.silent.double().mean())
        if rectified > MOST_DEAD or (call.untaught is not None and share < 1):
            dead.append((share, call))
        elif call.untaught is not None:
            untaught.append(call)
    if dead:
        share, call = max(dead, key=lambda pair: pair[0])
        what = f"{share:.0%} of the units are zero, or get a zero gradient, on the whole batch"
        cure = (
            "lower the learning rate (optim.lr); start from other weights and biases; use an "
            "activation that is not flat (SiLU, GELU, LeakyReLU)"
        )
        yield Finding("dead units", call.name, what, cure, evidence={"share": share})
    elif untaught:
        what = f"its gradient is exactly zero (so in {len(untaught)} modules)"
        cure = (
            "look for a gate that starts at zero, which is well, a dead activation, a detach(), or "
            "an underflow in fp16"
        )
        yield Finding("no gradient", untaught[-1].name, what, cure, False)


def _unreached(evidence: Evidence) -> Iterator[Finding]:
    if evidence.gradients and any(g is not None for g in evidence.gradients.values()):
        return
    what = "the loss depends on no parameter that requires a gradient"
    cure = "look for requires_grad=False, detach() and torch.no_grad() around the model"
    yield Finding("no gradient", ROOT, what, cure)


def _numbers(origin: ForwardOrigin) -> dict:
    summaries = {"found": origin.found, "inputs": origin.inputs, "wider": origin.wider}
    return {key: asdict(value) for key, value in summaries.items() if value is not None}


_RULES = (
    _first_nonfinite_value,
    _poisoned,
    _loss,
    _first_nonfinite_gradient,
    _logits,
    _exploding,
    _vanishing,
    _batch_norm,
    _dead,
    _unreached,
)
