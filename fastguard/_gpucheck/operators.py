"""Every operator against its reference on the CPU: one function for each, listed at the end."""

import functools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .. import ops
from ..decision import WINDOW
from ..ops import Verdict
from ..thresholds import AdaGC, AutoClip, Fixed, RunningMedian, ZClip
from . import adamw
from .cases import Grid, Spec, lists, on_cpu, placed
from .checks import Case, Check, Compared, same_bits, untouched_around

#: Sums in float64, in another order than the reference's.
SUM_ULPS = 1e-13 / torch.finfo(torch.float64).eps
#: The same after a training's worth of statistics.
STATISTICS_ULPS = 10 * SUM_ULPS

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
    yield Compared("norms", found.norms, right.norms, SUM_ULPS)
    yield Compared("total_norm", found.total_norm, right.total_norm, SUM_ULPS)
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
        norms, unscale, loss, accept = _drawn_step(n, generator)
        total = norms.square().sum().sqrt()
        scalars = [None if value is None else float64(value) for value in (unscale, loss)]
        measured = ops.GradNorm(
            total.to(device), norms.to(device), torch.zeros(n, 3, dtype=torch.int64, device=device)
        )
        on_device = [None if s is None else s.to(device) for s in scalars]
        found = ops.guard_decide_(measured, *on_device, here, threshold, 1.5, 8.0, accept)
        right = ops.guard_decide_ref_(
            *(total, norms, *scalars, *there, threshold.kind, 1.5, 8.0, threshold.options, accept)
        )
        yield Compared(f"verdict of step {step}", found.verdict, right.verdict)
        names = ("grad_coef", "record", *ops.Statistics._fields)
        found, right = (found[0], found[2], *here), (right[0], right[2], *there)
        for name, a, b in zip(names, found, right, strict=True):
            yield Compared(f"{name} of step {step}", a, b.clone(), STATISTICS_ULPS)


def _fresh(window, n, device):
    moments, history = torch.zeros(3, device=device), torch.zeros(window, device=device)
    ema_norms = torch.full((n,), math.inf, device=device)
    return ops.Statistics(moments.double(), history.double(), ema_norms.double())


def _drawn_step(n, generator):
    """Norms that are mostly ordinary, a factor, a loss, and whether the step is to count."""

    def one_of(*choices):
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    norms = 5 * torch.rand(n, generator=generator, dtype=torch.float64) / math.sqrt(n)
    norms[0] = one_of(*[norms[0].item()] * 6, 0.0, 1e-40, 30.0, 1e30, math.nan, math.inf)
    unscale = one_of(None, None, 0.5, 3.0)
    loss = one_of(None, None, 1.0, 1.0, 1.0, math.nan, -math.inf)
    return norms, unscale, loss, one_of(True, True, True, False)


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
    expected = on_cpu(saved if verdict.skipped else buffers)
    ops.settle_(buffers, saved, torch.tensor(int(verdict), device=device))
    yield from same_bits("buffer", on_cpu(buffers), expected)
    yield from same_bits("saved copy", on_cpu(saved), expected)
    yield from untouched_around(parts + copies)


# --- accumulate_ --------------------------------------------------------------------------------


def accumulate_(device: torch.device, grid: Grid) -> Iterator[Case]:
    return over_lists(_accumulate_, device, grid, expanded=False)


def _accumulate_(specs, device):
    """Good, bad, good: the first is copied over what was in the sums, the second is left out."""
    sums = placed([spec._replace(bad=0) for spec in specs], 9, device)
    window, right_window = float64([0.0] * 3, device), float64([0.0] * 3)
    tensors = [part.tensor for part in sums]
    right = on_cpu(tensors)
    for seed, verdict in enumerate((Verdict.CLIP, Verdict.SKIP_NONFINITE, Verdict.APPLY)):
        # Gradients need not lie in memory as the sums do.
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


#: An operator's check is a function like those above and a line here.
OPERATORS = [
    Check("grad_norm", grad_norm),
    Check("decide", decide),
    Check("guard_decide_", guard_decide_),
    Check("settle_", settle_),
    Check("accumulate_", accumulate_),
    Check("scale_", scale_),
    Check("adamw_", adamw.adamw_),
]
