"""fastguard's operators, run by the CUDA kernels on the executor.

The functions of a :class:`Device` have the names and signatures of ``fastguard.ops``, so the same
tests serve both. They do what the launchers in csrc/cuda/*.cu do.
"""

import dataclasses
import functools
import math

import torch

from fastguard import ops
from fastguard.ops.settle import same_memory
from tests import simt

TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3, torch.uint8: 4}


@functools.cache
def kernels():
    return simt.load("fastguard_kernels", ["tests/simt/kernels/fastguard_kernels.cpp"])


class Device:
    """A GPU with room for ``blocks`` blocks, whose threads run in an order given by ``options``.

    With ``vary`` every call has another order and another number of blocks.
    """

    def __init__(self, blocks=3, vary=False, **options):
        self.blocks = blocks
        self.vary = vary
        self.options = simt.Options(**options)
        self.calls = 0
        self.report = None  # of the last call

    def run(self, kernel, *args):
        self.run_one_block(kernel, self.blocks if not self.vary else 1 + self.calls % 5, *args)

    def run_one_block(self, kernel, *args):
        self.calls += 1
        options = self.options
        if self.vary:
            options = dataclasses.replace(options, seed=self.calls)
        self.report = getattr(kernels(), kernel)(options, *args)

    def grad_norm(self, grads, repeats=1):
        found = empty_norms(len(grads))
        _keep, tensors = described(grads)
        self.run("grad_norm", tensors, repeats, arrays(found), None)
        return ops.GradNorm(**found)

    def decide(self, total_norm, max_norm, skip_norm):
        out = {"clip_coef": nan(()), "verdict": torch.tensor(-1)}
        self.run_one_block("decide", total_norm.numpy(), max_norm, skip_norm, arrays(out))
        return ops.Decision(**out)

    def guard_decide_(
        self, measured, unscale, loss, statistics, step, threshold, max_norm, skip_norm
    ):
        decided, given = deciding(
            *(len(measured.norms), unscale, loss, statistics, step, threshold, max_norm, skip_norm)
        )
        self.run_one_block(
            "guard_decide", measured.total_norm.numpy(), measured.norms.numpy(), given
        )
        return decided

    def grad_norm_decide_(
        self,
        grads,
        unscale,
        loss,
        statistics,
        step,
        threshold,
        max_norm,
        skip_norm,
        scaling=None,
    ):
        found = empty_norms(len(grads))
        decided, given = deciding(
            *(len(grads), unscale, loss, statistics, step, threshold, max_norm, skip_norm),
            scaling,
        )
        _keep, tensors = described(grads)
        self.run("grad_norm", tensors, 1, arrays(found), given)
        return ops.GradNorm(**found), decided

    def scale_(self, grads, clip_coef):
        keep, tensors = described(grads)
        self.run("scale", tensors, clip_coef.contiguous().numpy(), clip_coef.dim())
        copy_back(grads, keep)

    def clip_(self, grads, max_norm, skip_norm, float32_norm=False):
        found = empty_norms(len(grads))
        decided = {"clip_coef": nan(()), "verdict": torch.tensor(-1)}
        keep, tensors = described(grads)
        out = arrays(found | decided)
        self.run("clip", tensors, max_norm, skip_norm, float32_norm, out)
        copy_back(grads, keep)
        return ops.GradNorm(**found), ops.Decision(**decided)

    def settle_(self, buffers, saved, verdict, owners):
        if not same_memory(buffers, saved):
            return ops.settle_ref_(buffers, saved, verdict, owners)
        lost = torch.zeros(2 * len(buffers), dtype=torch.int32)
        tensors = []
        for b, s in zip(buffers, saved, strict=True):
            real = torch.view_as_real(b) if b.is_complex() else b
            type_ = TYPES.get(real.dtype, TYPES[torch.uint8])
            size = real.numel() * (real.element_size() if type_ == TYPES[torch.uint8] else 1)
            tensors.append((b.data_ptr(), s.data_ptr(), size, type_, type_, []))
        self.run("settle", tensors, verdict.numpy(), owners.numpy(), lost.numpy())
        return lost

    def accumulate_(self, sums, grads, verdict, window, weight):
        keep, tensors = described(sums)
        _others, tensors = with_others(keep, tensors, grads)
        self.run("accumulate", tensors, verdict.numpy(), window.numpy(), weight)
        copy_back(sums, keep)

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
        master_param=None,
    ):
        if not params:
            return
        keep, tensors = described(params)
        _others, tensors = with_others(keep, tensors, grads)
        state = {
            "exp_avg": exp_avg,
            "exp_avg_sq": exp_avg_sq,
            "max_exp_avg_sq": max_exp_avg_sq if amsgrad else None,
            "state_steps": state_steps,
            "master_param": master_param,
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
        self.run(
            "adamw",
            tensors,
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
    step,
    threshold,
    max_norm,
    skip_norm,
    scaling=None,
):
    adagc = int(threshold.kind) == 4
    decided = ops.GuardDecision(nan((n,) if adagc else ()), torch.tensor(-1), nan((6,)))
    scale, growth_tracker, *growth = scaling or (None, None, 2.0, 0.5, 2000)
    given = {
        "unscale": unscale,
        "loss": loss,
        "statistics": statistics.numbers,
        "seen_norms": statistics.seen_norms,
        "accepted_norms": statistics.accepted_norms,
        "per_tensor": statistics.per_tensor,
        "scale": scale,
        "growth_tracker": growth_tracker,
        **decided._asdict(),
    }
    return decided, arrays(given) | {
        "columns": statistics.per_tensor.shape[1],
        "step": float(step),
        "threshold": int(threshold.kind),
        "max_norm": max_norm,
        "skip_norm": skip_norm,
        "options": list(threshold.options),
        "growth": growth,
    }


def arrays(tensors):
    return {name: None if t is None else t.numpy() for name, t in tensors.items()}


def described(tensors):
    """The owners of the memory, and the tensors (dense, or copies) in a plan's form."""
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


def with_others(keep, tensors, others):
    """The descriptions with a second list in the same layout, and the owners of its memory."""
    others = [
        other.detach()
        if other.stride() == first.stride()
        else torch.empty_like(first, dtype=other.dtype).copy_(other)
        for first, other in zip(keep, others, strict=True)
    ]
    return others, [
        (data, other.data_ptr(), numel, type_, TYPES[other.dtype], dims)
        for (data, _, numel, type_, _, dims), other in zip(tensors, others, strict=True)
    ]


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
