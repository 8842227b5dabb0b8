"""Rules about values that are not finite, forward and backward: the origin of the first one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch
from torch import nn

from .findings import Evidence, Finding
from .growth import largest_growth
from .probes import ROOT, Call, ForwardOrigin
from .summary import Summary

# --- values that are not finite, forward --------------------------------------------------------


def first_nonfinite_value(evidence: Evidence) -> Iterator[Finding]:
    origin = evidence.origin
    if origin is None or origin.kind == "parameter":
        return
    harmless = evidence.loss.finite and evidence.gradients_finite
    if harmless and not evidence.poisoned_buffers:
        what = (
            f"{origin.found.nonfinite} here, but the loss and all gradients are finite: a "
            "mask, or padding that nothing reads"
        )
        suggestion = "nothing, if that is meant"
        yield Finding("undefined value", origin.name, what, suggestion, False, _numbers(origin))
    elif origin.kind == "input":
        what = f"the input itself is not finite ({origin.found.nonfinite})"
        what += _lasting(evidence)
        suggestion = (
            "find the sample that it comes from, and repair it or leave it out; until then let "
            "GradGuard skip such batches"
        )
        yield Finding("bad input", origin.name, what, suggestion, evidence=_numbers(origin))
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
        suggestion = (
            "lower the learning rate, and clip; look for what makes the values before it large"
        )
        if dtype == torch.float16:
            name = "fp16"
            suggestion = "run in bf16 or fp32 (--precision bf16); lower the learning rate"
        what = f"{name} overflow: {what}{_lasting(evidence)}"
        return Finding("overflow", origin.name, what, suggestion, evidence=_numbers(origin))
    what = (
        f"{made}{_lasting(evidence)}: an operation without a value, such as 0/0, Inf - Inf, a "
        "logarithm of 0 or a root of a negative number"
    )
    suggestion = "add an eps under the division, logarithm or root in this module"
    if isinstance(origin.module, nn.MultiheadAttention):
        suggestion = (
            "look for a row whose keys are all masked; fastguard.replace_attention_ makes it "
            "attend to nothing instead"
        )
    return Finding("undefined value", origin.name, what, suggestion, evidence=_numbers(origin))


def _overflowed(origin: ForwardOrigin) -> torch.dtype | None:
    """The dtype whose range was too small; None if the cause is not an overflow."""
    dtype = origin.found.dtype
    if not dtype.is_floating_point or dtype.itemsize < 2:
        return None
    if origin.wider is not None:
        return dtype if origin.wider.finite else None
    near = max(s.largest for s in (origin.found, origin.inputs) if s is not None)
    limit = torch.finfo(dtype).max
    # Products and squares of values above the root of the limit overflow.
    return dtype if origin.found.infs and near > math.sqrt(limit) else None


def _lasting(evidence: Evidence) -> str:
    if not evidence.poisoned_buffers:
        return ""
    first, count = evidence.poisoned_buffers[0], len(evidence.poisoned_buffers)
    return (
        f"; the forward pass writes it into {count} buffers, first {first}, where it stays unless "
        "GradGuard puts them back"
    )


def poisoned(evidence: Evidence) -> Iterator[Finding]:
    poisoned = evidence.poisoned
    if not poisoned:
        return
    met = evidence.origin.poisoned if evidence.origin is not None else ()
    first = (met or [*poisoned])[0]
    what = (
        f"a weight or buffer of the model is not finite ({poisoned[first].nonfinite}), "
        f"{len(poisoned)} tensors in all"
    )
    suggestion = (
        "go back to a checkpoint from before; train with fastguard.GradGuard, which neither takes "
        "such a step nor keeps such a buffer"
    )
    yield Finding("poisoned weight", first, what, suggestion, evidence={"tensors": list(poisoned)})


def loss(evidence: Evidence) -> Iterator[Finding]:
    if evidence.loss.finite or (evidence.origin is not None):
        return
    what = (
        f"the loss is not finite ({evidence.loss.nonfinite}) though all that the modules gave is: "
        "it comes from the loss function"
    )
    suggestion = (
        "look for a target longer than its input (CTC), an empty target, a logarithm of 0 and a "
        "mean over nothing; compute the loss in fp32 outside autocast"
    )
    yield Finding("undefined loss", "the loss function", what, suggestion)


def _numbers(origin: ForwardOrigin) -> dict:
    summaries = {"found": origin.found, "inputs": origin.inputs, "wider": origin.wider}
    return {key: asdict(value) for key, value in summaries.items() if value is not None}


# --- values that are not finite, backward -------------------------------------------------------


@dataclass(frozen=True)
class BackwardOrigin:
    """The origin of the first gradient that is not finite."""

    name: str
    #: Whether the gradient was not finite when it entered the module. The operations that follow
    #: the module in the forward pass made it so.
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
    """The calls in the order of backward. Of two modules with one output the inner one is first."""
    return sorted((c for c in calls if c.entering is not None), key=lambda c: c.entered)


def _own_parameters(call: Call) -> list[str]:
    prefix = "" if call.name == ROOT else f"{call.name}."
    return [prefix + name for name, _ in call.module.named_parameters(recurse=False)]


def first_nonfinite_gradient(evidence: Evidence) -> Iterator[Finding]:
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
    if entering is not None and entering.dtype == torch.float16:
        dtype = torch.float16  # autocast computes in fp16 and casts a weight's gradient to float32
    halves = dtype == torch.float16 and origin.found.infs
    grown = origin.found.infs and largest_growth(evidence)
    if halves or grown or evidence.loss_scale > 1e30:
        scale = f", the loss scale is {evidence.loss_scale:g}" if evidence.loss_scale != 1 else ""
        name = str(dtype).removeprefix("torch.")
        what = f"{name} overflow (at {torch.finfo(dtype).max:.3g}): {what}{scale}"
        suggestion = "run in bf16 or fp32; lower the loss scale; lower the learning rate"
        if dtype != torch.float16:
            suggestion = "see the gradient's growth below; clip activations or normalise them"
        yield Finding("gradient overflow", origin.name, what, suggestion, evidence=numbers)
        return
    suggestion = (
        "look for a root or a norm at 0, a division by 0 behind torch.where, and a logarithm of 0, "
        "and put an eps under it"
    )
    yield Finding("undefined gradient", origin.name, what, suggestion, evidence=numbers)
