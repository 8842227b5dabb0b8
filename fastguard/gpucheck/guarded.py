"""Whole steps: bad batches change nothing, no step makes a sync, clipping equals torch's."""

import contextlib
import functools
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

import fastguard
from fastguard import ops
from fastguard.thresholds import AdaGC, Fixed, RunningMedian, ZClip

from .cases import Grid
from .checks import Case, Check, Compared, same_bits

STEPS = 30
BAD = {3: math.nan, 4: math.inf, 11: math.nan, 18: -math.inf, 29: math.nan}

OPTIMIZERS = {
    "fastguard.AdamW": lambda p: fastguard.AdamW(p, lr=0.01),
    "fastguard.AdamW(amsgrad=True)": lambda p: fastguard.AdamW(p, lr=0.01, amsgrad=True),
    "torch AdamW(fused=True)": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "torch SGD": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
}


def _net(dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A network with weights drawn on the CPU, so they are equal on all devices."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(40, 300), nn.BatchNorm1d(300), nn.Tanh(), nn.Linear(300, 7))
    return net.to(device, dtype)


def _backward(net: nn.Module, step: int, bad: float | None = None) -> None:
    like = next(net.parameters())
    x = torch.randn(16, 40, generator=torch.Generator().manual_seed(step)).to(like)
    if bad is not None:
        x[3, 5] = bad
    net.zero_grad()
    net(x).square().mean().backward()


# --- bad batches --------------------------------------------------------------------------------


def survival(device: torch.device, grid: Grid) -> Iterator[Case]:
    for name in OPTIMIZERS:
        for dtype in (torch.float32, torch.bfloat16):
            for threshold in (Fixed(), ZClip(warmup=5), RunningMedian(warmup=4), AdaGC(warmup=4)):
                case = functools.partial(_survival, name, dtype, threshold, device)
                yield Case(f"{name}, {dtype}, {threshold}", case)


def _survival(name, dtype, threshold, device) -> Iterator[Compared]:
    def run(steps, bad):
        net = _net(dtype, device)
        optimizer = OPTIMIZERS[name](net.parameters())
        guard = fastguard.GradGuard(net, 0.5, 50.0, STEPS + 1, threshold=threshold)
        for step in steps:
            _backward(net, step, bad.get(step))
            guard.step(optimizer, batch_id=step)
        return _trained(net, optimizer), [int(r.verdict) for r in guard.poll(wait=True)]

    good = [step for step in range(STEPS) if step not in BAD]
    spared, _ = run(good, {})
    again, _ = run(good, {})
    yield from same_bits("without bad batches, torch's own backward repeats tensor", again, spared)
    hit, verdicts = run(range(STEPS), BAD)
    skipped = [verdict == ops.Verdict.SKIP_NONFINITE for verdict in verdicts]
    expected = [step in BAD for step in range(STEPS)]
    yield Compared("skipped steps", torch.tensor(skipped), torch.tensor(expected))
    yield from same_bits("with bad batches, tensor", hit, spared)


def _trained(net: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    state = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
    return [t.detach().clone() for t in (*net.state_dict().values(), *state)]


# --- no synchronisation -------------------------------------------------------------------------


def no_wait(device: torch.device, grid: Grid) -> Iterator[Case]:
    for name in ("fastguard.AdamW", "torch AdamW(fused=True)"):
        for threshold in (Fixed(), ZClip()):
            case = functools.partial(_no_wait, name, threshold, device)
            yield Case(f"{name}, {threshold}", case)
    case = functools.partial(_no_wait, "fastguard.AdamW", AdaGC(), device)
    yield Case("fastguard.AdamW, AdaGC", case)


def _no_wait(name, threshold, device) -> Iterator[Compared]:
    """Steps in a mode in which torch raises at a host-device sync, except the first two.

    The first steps may sync for their setup. The bad step is the last one: a later step would
    report it and read the bad gradients from the device.
    """
    net = _net(torch.float32, device)
    optimizer = OPTIMIZERS[name](net.parameters())
    guard = fastguard.GradGuard(net, 0.5, threshold=threshold, max_lag=64)
    for step in range(6):
        _backward(net, step, math.nan if step == 5 else None)
        with _raising_where_torch_waits() if step >= 2 else contextlib.nullcontext():
            guard.step(optimizer)
    verdicts = [report.verdict.skipped for report in guard.poll(wait=True)]
    expected = [step == 5 for step in range(6)]
    yield Compared("skipped steps", torch.tensor(verdicts), torch.tensor(expected))


@contextlib.contextmanager
def _raising_where_torch_waits() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


# --- clip_grad_norm_ ----------------------------------------------------------------------------


def clipping(device: torch.device, grid: Grid) -> Iterator[Case]:
    for dtype in ops.DTYPES:
        for max_norm in (0.1, 1e9):
            case = functools.partial(_clipping, dtype, max_norm, grid, device)
            yield Case(f"{dtype}, max_norm {max_norm}", case)
        yield Case(f"{dtype}, one NaN", functools.partial(_one_nan, dtype, grid, device))


def _parameters(dtype, grid, device) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(5)
    parameters = []
    for size in [*grid.sizes, *range(1, grid.many)]:
        values = torch.randn(size, generator=generator)
        parameters.append(nn.Parameter(torch.zeros(size, dtype=dtype, device=device)))
        parameters[-1].grad = values.to(device, dtype)
    return parameters


def _clipping(dtype, max_norm, grid, device) -> Iterator[Compared]:
    """Compared with torch's in float64: in 16-bit dtypes torch's norm is wrong by up to 0.5 %."""
    ours, theirs = (_parameters(dtype, grid, device) for _ in range(2))
    theirs = [nn.Parameter(p.double()) for p in theirs]
    for wide, p in zip(theirs, ours, strict=True):
        wide.grad = p.grad.to(torch.float64, copy=True)
    norm = fastguard.clip_grad_norm_(ours, max_norm)
    right = nn.utils.clip_grad_norm_(theirs, max_norm)
    yield Compared("norm", norm, right, 2.0 if norm.dtype == torch.float32 else 500.0)
    allowed = 500.0 if dtype == torch.float64 else 1.0  # ulps; the norms sum in another order
    for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
        yield Compared(f"gradient {i}", p.grad, q.grad, allowed)


def _one_nan(dtype, grid, device) -> Iterator[Compared]:
    parameters = _parameters(dtype, grid, device)
    parameters[2].grad[0] = math.nan
    before = [p.grad.clone() for p in parameters]
    norm = fastguard.clip_grad_norm_(parameters, 0.1)
    yield Compared("norm", norm, torch.full_like(norm, math.nan))
    yield from same_bits("gradient", [p.grad for p in parameters], before)


GUARDED = [
    Check("bad batches leave no trace", survival),
    Check("a step waits for nothing", no_wait, needs_cuda=True),
    Check("clip_grad_norm_ as torch's", clipping),
]
