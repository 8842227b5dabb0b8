"""Every operator against its reference on the CPU. Each has one function, listed at the end."""

import functools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fastguard import ops
from fastguard.guard.statistics import WINDOW, unseen
from fastguard.ops import Verdict
from fastguard.thresholds import AdaGC, AutoClip, Fixed, RunningMedian, ZClip

from . import adamw, attention
from .cases import Grid, Spec, lists, on_cpu, placed
from .checks import Case, Check, Compared, same_bits, untouched_around

EPS = torch.finfo(torch.float64).eps
#: Allowed error of statistics after many sums in float64 in another order than the reference's.
STATISTICS_ULPS = 1e-12 / EPS


def sum_ulps(device: torch.device) -> float:
    """Allowed error of a sum: the CUDA kernel sums 32 elements in float32, others in float64."""
    return (1e-6 if device.type == "cuda" else 1e-13) / EPS


THRESHOLDS = (
    Fixed(),
    ZClip(warmup=5),
    RunningMedian(warmup=4),
    AutoClip(warmup=3),
    AdaGC(warmup=4),
)


def float64(value: float | list, device: torch.device | str = "cpu") -> Tensor:
    return torch.tensor(value, dtype=torch.float64, device=device)


def over_lists(
    run: Callable[[list[Spec], torch.device], Iterator[Compared]],
    device: torch.device,
    grid: Grid,
    **which: bool,
) -> Iterator[Case]:
    for name, specs in lists(grid, **which):
        yield Case(name, functools.partial(run, specs, device))


# --- grad_norm ----------------------------------------------------------------------------------


def grad_norm(device: torch.device, grid: Grid) -> Iterator[Case]:
    return over_lists(_grad_norm, device, grid)


def _grad_norm(specs, device):
    parts = placed(specs, 1, device)
    grads = [part.tensor for part in parts]
    found, right = ops.grad_norm(grads), ops.grad_norm_ref(on_cpu(grads))
    yield Compared("nonfinite (NaNs, Infs, first)", found.nonfinite, right.nonfinite)
    yield Compared("norms", found.norms, right.norms, sum_ulps(device))
    yield Compared("total_norm", found.total_norm, right.total_norm, sum_ulps(device))
    yield from untouched_around(parts)


# --- decide -------------------------------------------------------------------------------------

NORMS = (0.0, 1e-300, 0.3, 0.5, 0.5000001, 7.0, 10.0, 50.0, 1e300, math.inf, math.nan)


def decide(device: torch.device, grid: Grid) -> Iterator[Case]:
    for norm in NORMS:
        for max_norm in (0.0, 0.5, math.inf):
            for skip_norm in (0.0, 10.0, math.inf):
                name = f"norm {norm}, max_norm {max_norm}, skip_norm {skip_norm}"
                yield Case(name, functools.partial(_decide, norm, max_norm, skip_norm, device))


def _decide(norm, max_norm, skip_norm, device):
    found = ops.decide(float64(norm, device), max_norm, skip_norm)
    right = ops.decide_ref(float64(norm), max_norm, skip_norm)
    yield Compared("verdict", found.verdict, right.verdict)
    yield Compared("clip_coef", found.clip_coef, right.clip_coef)


# --- guard_decide_ --------------------------------------------------------------------------------


def guard_decide_(device: torch.device, grid: Grid) -> Iterator[Case]:
    for threshold in THRESHOLDS:
        for window in (1, 7, WINDOW):
            for n in (1, 3, grid.many):
                name = f"{threshold}, window {window}, {n} gradients, 40 steps"
                yield Case(name, functools.partial(_guard_decide_, threshold, window, n, device))


def _guard_decide_(threshold, window, n, device):
    generator = torch.Generator().manual_seed(n + window)
    here, there = (_fresh(window, n, where) for where in (device, "cpu"))
    for step in range(40):
        norms, unscale, loss = _drawn_step(n, generator)
        total = norms.square().sum().sqrt()
        scalars = [None if value is None else float64(value) for value in (unscale, loss)]
        measured = ops.GradNorm(
            total.to(device), norms.to(device), torch.zeros(n, 3, dtype=torch.int64, device=device)
        )
        on_device = [None if s is None else s.to(device) for s in scalars]
        found = ops.guard_decide_(measured, *on_device, here, step, threshold, 1.5, 8.0)
        right = ops.guard_decide_ref_(
            *(total, norms, *scalars, *there, step),
            *(threshold.kind, 1.5, 8.0, threshold.options),
        )
        yield Compared(f"verdict of step {step}", found.verdict, right.verdict)
        names = ("grad_coef", "record", *ops.Statistics._fields)
        found, right = (found[0], found[2], *here), (right[0], right[2], *there)
        for name, a, b in zip(names, found, right, strict=True):
            yield Compared(f"{name} of step {step}", a, b.clone(), STATISTICS_ULPS)


def _fresh(window, n, device):
    zeros = [torch.zeros(size, device=device).double() for size in (4, window, window)]
    return ops.Statistics(*zeros, unseen(n, device))


def _drawn_step(n, generator):
    """Norms, an unscale factor and a loss, ordinary in most cases."""

    def one_of(*choices):
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    norms = 5 * torch.rand(n, generator=generator, dtype=torch.float64) / math.sqrt(n)
    norms[0] = one_of(*[norms[0].item()] * 6, 0.0, 1e-40, 30.0, 1e30, math.nan, math.inf)
    unscale = one_of(None, None, 0.5, 3.0)
    loss = one_of(None, None, 1.0, 1.0, 1.0, math.nan, -math.inf)
    return norms, unscale, loss


# --- grad_norm_decide_ ----------------------------------------------------------------------------

LIMITS = (1.5, 8.0)  # all norms of the cases differ from these by more than 1e-6


def grad_norm_decide_(device: torch.device, grid: Grid) -> Iterator[Case]:
    for threshold in THRESHOLDS:
        for name, specs in lists(grid):
            run = functools.partial(_grad_norm_decide_, threshold, specs, device)
            yield Case(f"{threshold}; {name}", run)


def _grad_norm_decide_(threshold, specs, device):
    parts = placed(specs, 5, device)
    grads = [part.tensor for part in parts]
    here, there = (_fresh(7, len(grads), where) for where in (device, torch.device("cpu")))
    scaling, right_scaling = (_scaling(where) for where in (device, "cpu"))
    args = (3, threshold, *LIMITS)
    measured, found = ops.grad_norm_decide_(
        *(grads, float64(0.5, device), None, here, *args), scaling=scaling
    )
    right = ops.grad_norm_decide_ref_(
        *(on_cpu(grads), float64(0.5), None, *there, 3, int(threshold.kind), *LIMITS),
        *(threshold.options, *right_scaling[:2], right_scaling[2:]),
    )
    yield Compared("nonfinite (NaNs, Infs, first)", measured.nonfinite, right[2])
    yield Compared("verdict", found.verdict, right[4])
    names = ("total_norm", "norms", "grad_coef", "record", *ops.Statistics._fields, "scale")
    ours = (*measured[:2], found.grad_coef, found.record, *here, scaling.scale)
    theirs = (*right[:2], right[3], right[5], *there, right_scaling.scale)
    for name, a, b in zip(names, ours, theirs, strict=True):
        ulps = sum_ulps(device) * EPS / torch.finfo(a.dtype).eps
        yield Compared(name, a, b, 4 * ulps)
    yield from untouched_around(parts)


def _scaling(device):
    scale, tracker = torch.tensor([8.0], device=device), torch.tensor([1], device=device)
    return ops.Scaling(scale, tracker.int(), 2.0, 0.5, 2)


# --- clip_ --------------------------------------------------------------------------------------


def clip_(device: torch.device, grid: Grid) -> Iterator[Case]:
    for max_norm in (0.5, math.inf):
        for name, specs in lists(grid, expanded=False):
            run = functools.partial(_clip_, max_norm, specs, device)
            yield Case(f"max_norm {max_norm}; {name}", run)


def _clip_(max_norm, specs, device):
    parts = placed(specs, 6, device)
    grads = [part.tensor for part in parts]
    right = on_cpu(grads)
    measured, decision = ops.clip_(grads, max_norm, math.inf)
    total_norm, *_, clip_coef, verdict = ops.clip_ref_(right, max_norm, math.inf, False)
    ulps = 2 * sum_ulps(device)
    yield Compared("total_norm", measured.total_norm, total_norm, ulps)
    yield Compared("verdict", decision.verdict, verdict)
    yield Compared("clip_coef", decision.clip_coef, clip_coef, ulps)
    for i, (grad, expected) in enumerate(zip(grads, right, strict=True)):
        ulps = 1 + 2 * sum_ulps(device) * EPS / torch.finfo(grad.dtype).eps
        yield Compared(f"tensor {i}", grad, expected, ulps)
    yield from untouched_around(parts)


# --- settle_ ------------------------------------------------------------------------------------


def settle_(device: torch.device, grid: Grid) -> Iterator[Case]:
    for verdict in Verdict:
        yield Case(f"{verdict!r}", functools.partial(_settle_, verdict, grid, device))


def _settle_(verdict, grid, device):
    specs = [Spec((size,), dtype, bad=size > 64) for size in grid.sizes for dtype in ops.DTYPES]
    specs += [Spec((3, 2731), torch.float32, "transposed"), Spec((65,), torch.float16, "strided")]
    parts, copies = placed(specs, 1, device), placed(specs, 2, device)
    buffers, saved = ([part.tensor for part in some] for some in (parts, copies))
    counters = [torch.arange(3, device=device), torch.tensor(7, device=device)]
    counters += [torch.tensor([True, False, True], device=device)]
    buffers, saved = buffers + counters, saved + [~c for c in counters]
    right, right_saved = on_cpu(buffers), on_cpu(saved)
    told, owners = torch.tensor(int(verdict)), torch.arange(len(buffers)) // 3
    lost = ops.settle_(buffers, saved, told.to(device), owners.to(device))
    expected = ops.settle_ref_(right, right_saved, told, owners)
    yield from same_bits("saved copy", on_cpu(saved), right_saved)
    yield from same_bits("buffer", on_cpu(buffers), right)
    yield Compared("lost", (lost > 0).long(), (expected > 0).long())
    yield from untouched_around(parts + copies)


# --- accumulate_ --------------------------------------------------------------------------------


def accumulate_(device: torch.device, grid: Grid) -> Iterator[Case]:
    return over_lists(_accumulate_, device, grid, expanded=False)


def _dtype_of_sum(spec):
    return torch.float64 if spec.dtype == torch.float64 else torch.float32


def _accumulate_(specs, device):
    """A good, a bad and a good micro-batch: the second one must be left out."""
    sums = placed([spec._replace(bad=0, dtype=_dtype_of_sum(spec)) for spec in specs], 9, device)
    window, right_window = float64([0.0] * 3, device), float64([0.0] * 3)
    tensors = [part.tensor for part in sums]
    right = on_cpu(tensors)
    for seed, verdict in enumerate((Verdict.CLIP, Verdict.SKIP_NONFINITE, Verdict.APPLY)):
        # Gradients may have another memory layout than the sums.
        laid = [s._replace(layout="contiguous") if seed else s for s in specs]
        grads = [part.tensor for part in placed(laid, seed, device)]
        told = torch.tensor(int(verdict))
        ops.accumulate_(tensors, grads, told.to(device), window, 0.5)
        ops.accumulate_ref_(right, on_cpu(grads), told, right_window, 0.5)
    yield Compared("window", window, right_window)
    for i, (total, expected) in enumerate(zip(tensors, right, strict=True)):
        yield Compared(f"sum {i}", total, expected)
    yield from untouched_around(sums)


# --- scale_ -------------------------------------------------------------------------------------


def scale_(device: torch.device, grid: Grid) -> Iterator[Case]:
    for coef in (0.7, 1.0, 0.0, 1e-43):
        name = f"every float16 and bfloat16 times {coef}"
        yield Case(name, functools.partial(_scale_every_half, coef, device))
    for coef in (0.3, 1.0, None):
        for name, specs in lists(grid, expanded=False):
            name = f"{name}; coefficient {'for each' if coef is None else coef}"
            yield Case(name, functools.partial(_scale_, specs, coef, device))


def _scale_every_half(coef, device):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    values = [every.clone().view(dtype) for dtype in (torch.float16, torch.bfloat16)]
    yield from _scaled([v.to(device) for v in values], float64(coef))


def _scale_(specs, coef, device):
    parts = placed(specs, 3, device)
    each = torch.rand(len(specs), generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    coef = each if coef is None else float64(coef)
    yield from _scaled([part.tensor for part in parts], coef)
    yield from untouched_around(parts)


def _scaled(tensors, coef):
    right = on_cpu(tensors)
    ops.scale_(tensors, coef.to(tensors[0].device) if tensors else coef)
    ops.scale_ref_(right, coef)
    for i, (tensor, expected) in enumerate(zip(tensors, right, strict=True)):
        yield Compared(f"tensor {i}", tensor, expected)


#: To add an operator, write a function like those above and add a line here.
OPERATORS = [
    Check("grad_norm", grad_norm),
    Check("decide", decide),
    Check("guard_decide_", guard_decide_),
    Check("grad_norm_decide_", grad_norm_decide_),
    Check("clip_", clip_),
    Check("settle_", settle_),
    Check("accumulate_", accumulate_),
    Check("scale_", scale_),
    Check("adamw_", adamw.adamw_),
    Check("attention", attention.attention),
]
