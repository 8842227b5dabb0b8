"""fastguard's operators, run by the CUDA kernels on the executor.

The functions of a :class:`Device` have the names and signatures of ``fastguard.ops``, so that the
same tests serve both. They do what the launchers in csrc/cuda/*.cu do.
"""

import functools
import math

import torch

from fastguard import ops
from tests import simt

TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


@functools.cache
def kernels():
    return simt.load("fastguard_kernels", ["tests/simt/kernels/fastguard_kernels.cpp"])


class Device:
    """A GPU of ``blocks`` blocks, whose threads run in an order given by ``options``."""

    def __init__(self, blocks=3, **options):
        self.blocks = blocks
        self.options = simt.Options(**options)
        self.report = None  # of the last launch

    def grad_norm(self, grads, repeats=1):
        found = empty_norms(len(grads))
        keep, tensors = described(grads)
        self.report = kernels().grad_norm(
            self.options, tensors, self.blocks, repeats, arrays(found), None
        )
        return ops.GradNorm(**found)

    def decide(self, total_norm, max_norm, skip_norm):
        out = {"clip_coef": nan(()), "verdict": torch.tensor(-1)}
        self.report = kernels().decide(
            self.options, total_norm.numpy(), max_norm, skip_norm, arrays(out)
        )
        return ops.Decision(**out)

    def guard_decide_(
        self, measured, unscale, loss, statistics, threshold, max_norm, skip_norm, accept=True
    ):
        decided, given = deciding(
            len(measured.norms), unscale, loss, statistics, threshold, max_norm, skip_norm, accept
        )
        self.report = kernels().guard_decide(
            self.options, measured.total_norm.numpy(), measured.norms.numpy(), given
        )
        return decided

    def grad_norm_decide_(
        self,
        grads,
        unscale,
        loss,
        statistics,
        threshold,
        max_norm,
        skip_norm,
        accept=True,
        scaling=None,
    ):
        found = empty_norms(len(grads))
        decided, given = deciding(
            *(len(grads), unscale, loss, statistics, threshold, max_norm, skip_norm, accept),
            scaling,
        )
        keep, tensors = described(grads)
        self.report = kernels().grad_norm(
            self.options, tensors, self.blocks, 1, arrays(found), given
        )
        return ops.GradNorm(**found), decided

    def scale_(self, grads, clip_coef):
        keep, tensors = described(grads)
        self.report = kernels().scale(
            self.options, tensors, self.blocks, clip_coef.contiguous().numpy(), clip_coef.dim()
        )
        copy_back(grads, keep)

    def clip_(self, grads, max_norm, skip_norm):
        found = empty_norms(len(grads))
        decided = {"clip_coef": nan(()), "verdict": torch.tensor(-1)}
        keep, tensors = described(grads)
        out = arrays(found | decided)
        self.report = kernels().clip(self.options, tensors, self.blocks, max_norm, skip_norm, out)
        copy_back(grads, keep)
        return ops.GradNorm(**found), ops.Decision(**decided)

    def adamw_(
        self,
        params,
        grads,
        exp_avg,
        exp_avg_sq,
        max_exp_avg_sq,
        state_steps,
        grad_coef,
        verdict,
        lr,
        beta1,
        beta2,
        weight_decay,
        eps,
        decoupled_weight_decay,
        amsgrad,
        maximize,
    ):
        if not params:
            return
        keep, tensors = described(params)
        others = [
            torch.empty_like(p, dtype=g.dtype).copy_(g) if g.stride() != p.stride() else g.detach()
            for p, g in zip(keep, grads, strict=True)
        ]
        tensors = [
            (data, g.data_ptr(), numel, type_, TYPES[g.dtype], dims)
            for (data, _, numel, type_, _, dims), g in zip(tensors, others, strict=True)
        ]
        state = {
            "exp_avg": exp_avg,
            "exp_avg_sq": exp_avg_sq,
            "max_exp_avg_sq": max_exp_avg_sq if amsgrad else None,
            "state_steps": state_steps,
        }
        rule = {
            "lr": lr,
            "beta1": beta1,
            "beta2": beta2,
            "weight_decay": weight_decay,
            "eps": eps,
            "decoupled_weight_decay": decoupled_weight_decay,
            "maximize": maximize,
        }
        self.report = kernels().adamw(
            self.options,
            tensors,
            self.blocks,
            arrays(state),
            grad_coef.contiguous().numpy(),
            grad_coef.dim(),
            verdict.numpy(),
            rule,
        )
        copy_back(params, keep)


def nan(shape):
    return torch.full(shape, math.nan, dtype=torch.float64)


def empty_norms(n):
    return {
        "total_norm": nan(()),
        "norms": nan((n,)),
        "nonfinite": torch.full((n, 3), -77),
    }


def deciding(
    n,
    unscale,
    loss,
    statistics,
    threshold,
    max_norm,
    skip_norm,
    accept,
    scaling=None,
):
    adagc = int(threshold.kind) == 4
    decided = ops.GuardDecision(nan((n,) if adagc else ()), torch.tensor(-1), nan((5,)))
    scale, growth_tracker, *growth = scaling or (None, None, 2.0, 0.5, 2000)
    given = {
        "unscale": unscale,
        "loss": loss,
        "statistics": statistics.moments,
        "history": statistics.history,
        "ema_norms": statistics.ema_norms if adagc else None,
        "scale": scale,
        "growth_tracker": growth_tracker,
        **decided._asdict(),
    }
    return decided, arrays(given) | {
        "threshold": int(threshold.kind),
        "max_norm": max_norm,
        "skip_norm": skip_norm,
        "options": list(threshold.options),
        "accept": accept,
        "growth": growth,
    }


def arrays(tensors):
    return {name: None if t is None else t.numpy() for name, t in tensors.items()}


def described(tensors):
    """What keeps the memory, and the tensors as the plan is given them: dense ones, or copies."""
    keep, descriptions = [], []
    for tensor in tensors:
        tensor = tensor.detach()
        dims = permutation(tensor)
        if dims is None:
            tensor, dims = tensor.contiguous(), []
        keep.append(tensor)
        type_ = TYPES[tensor.dtype]
        descriptions.append((tensor.data_ptr(), 0, tensor.numel(), type_, type_, dims))
    return keep, descriptions


def permutation(tensor):
    """``permutation_of`` of csrc/dense.h; [] for row-major order, None for a tensor with gaps."""
    if tensor.is_contiguous():
        return []
    row_major = torch.empty(tensor.shape, device="meta").stride()
    inner, dims = 1, []
    for stride, size, index in sorted(zip(tensor.stride(), tensor.shape, row_major, strict=True)):
        if size == 1:
            continue
        if stride != inner:
            return None
        inner *= size
        dims.insert(0, (stride, index))
    return dims


def copy_back(tensors, keep):
    for tensor, copy in zip(tensors, keep, strict=True):
        if tensor.data_ptr() != copy.data_ptr():
            tensor.detach().copy_(copy)
