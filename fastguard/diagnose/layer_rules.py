"""Rules about layers: attention logits, BatchNorm, dead units, parameters without a gradient."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from .findings import Evidence, Finding
from .nonfinite import backward_origin
from .probes import RECTIFIERS, ROOT, Call

#: QK-Clip (arXiv 2507.20534) rescales queries and keys if the largest logit is above 100.
LARGEST_LOGIT = 100.0
#: A channel is constant if its variance is at most this fraction of BatchNorm's eps.
CONSTANT = 1e-4
MOST_CONSTANT = MOST_DEAD = MOST_CLAMPED = 0.5
#: The least number of values per channel for BatchNorm, and of outputs for a dead channel: a few
#: zeros may be chance.
FEWEST_VALUES, FEWEST_POSITIONS = 8, 16


def logits(evidence: Evidence) -> Iterator[Finding]:
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
        suggestion = (
            "bound the logits (ClampedMultiheadAttention(softcap=50)) or normalise queries and "
            "keys; lower the learning rate of their projections (optim.lr)"
        )
        numbers = {"max_logit": largest[id(worst)], "head": head, "entropy": entropy}
        yield Finding("exploding logits", worst.name, what, suggestion, evidence=numbers)
    clamped = [c for c in seen if float(c.attention.clamped_share.max()) > MOST_CLAMPED]
    if clamped:
        share = float(clamped[0].attention.clamped_share.max())
        what = f"the clamp holds {share:.0%} of a head's output, and these get no gradient"
        suggestion = "raise network.attention_clamp, or lower the learning rate (optim.lr)"
        numbers = {"clamped_share": share}
        yield Finding("clamped attention", clamped[0].name, what, suggestion, evidence=numbers)


def _finite_max(x: torch.Tensor) -> float:
    return float(x.nan_to_num(-math.inf, posinf=math.inf).max())


def batch_norm(evidence: Evidence) -> Iterator[Finding]:
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
        suggestion = "raise batch_size, or use GroupNorm"
        numbers = {"values": few[0].values}
        yield Finding("tiny batch", few[0].name, what, suggestion, False, numbers)


def _blamed(evidence: Evidence, call: Call) -> bool:
    """Whether the first NaN or Inf came out of this module, forward or backward."""
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
        suggestion = "raise batch_size, or use GroupNorm"
    else:
        source = "of this batch" if module.training else "in running_var"
        what = (
            f"BatchNorm: the variance {source} is zero in {channels} of {len(call.variances)} "
            f"channels (smallest {smallest:.1e}, eps {module.eps:g}): the gradient through them is "
            f"multiplied by {1 / math.sqrt(max(smallest + module.eps, 1e-300)):.3g}"
        )
        suggestion = "look for constant inputs and dead units before it; raise batch_size or eps"
    if len(calls) > 1:
        what += f"; in {len(calls)} BatchNorms"
    numbers = {"channels": channels, "smallest": smallest, "values": call.values}
    return Finding("zero variance", call.name, what, suggestion, fault, numbers)


def dead_share(call: Call) -> float | None:
    """The share of channels whose outputs or gradients are all zero; None if it is unknown."""
    dead = call.silent
    if (
        dead is not None
        and call.zero_grad_channels is not None
        and call.zero_grad_channels.shape == dead.shape
    ):
        dead = dead | call.zero_grad_channels
    return None if dead is None else float(dead.double().mean())


def dead(evidence: Evidence) -> Iterator[Finding]:
    dead, without = [], []
    for call in evidence.calls:
        share = dead_share(call)
        if share is None or share <= MOST_DEAD or call.positions < FEWEST_POSITIONS:
            continue
        rectified = isinstance(call.module, RECTIFIERS) and float(call.silent.double().mean())
        if rectified > MOST_DEAD or (call.zero_grad_channels is not None and share < 1):
            dead.append((share, call))
        elif call.zero_grad_channels is not None:
            without.append(call)
    if dead:
        share, call = max(dead, key=lambda pair: pair[0])
        what = f"{share:.0%} of the units are zero, or get a zero gradient, on the whole batch"
        suggestion = (
            "lower the learning rate (optim.lr); start from other weights and biases; use an "
            "activation that is not flat (SiLU, GELU, LeakyReLU)"
        )
        yield Finding("dead units", call.name, what, suggestion, evidence={"share": share})
    elif without:
        what = f"its gradient is exactly zero (so in {len(without)} modules)"
        suggestion = (
            "look for a gate that starts at zero, which is well, a dead activation, a detach(), or "
            "an underflow in fp16"
        )
        yield Finding("no gradient", without[-1].name, what, suggestion, False)


def unreached(evidence: Evidence) -> Iterator[Finding]:
    if evidence.gradients and any(g is not None for g in evidence.gradients.values()):
        return
    what = "the loss depends on no parameter that requires a gradient"
    suggestion = "look for requires_grad=False, detach() and torch.no_grad() around the model"
    yield Finding("no gradient", ROOT, what, suggestion)
