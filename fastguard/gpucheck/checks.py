"""Runs the cases of a check and reports the result in one line."""

import contextlib
import math
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

from fastguard import ops
from fastguard.ops import attention as attention_ops

from .cases import SENTINEL, Grid, Placed
from .report import Report, tail

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Compared(NamedTuple):
    """A result and its expected value."""

    what: str
    found: Tensor
    expected: Tensor
    #: The allowed difference in ulps.
    allowed: float = 0.0
    #: The size of one ulp, larger where terms may cancel; None for that of the expected value.
    ulp: Tensor | None = None


class Case(NamedTuple):
    name: str
    run: Callable[[], Iterable[Compared]]


class Check(NamedTuple):
    name: str
    cases: Callable[[torch.device, Grid], Iterator[Case]]
    needs_cuda: bool = False


class DeviceLost(Exception):
    """The CUDA context is broken: every further call fails, so nothing more can run."""


def bits(tensor: Tensor) -> Tensor:
    """The tensor's bits as integers, which distinguish two NaNs, and -0 from 0."""
    return tensor.detach().contiguous().view(_INTEGERS[tensor.element_size()])


def same_bits(what: str, found: Iterable[Tensor], expected: Iterable[Tensor]) -> Iterator[Compared]:
    pairs = zip(found, expected, strict=True)
    for i, (here, there) in enumerate(pairs):
        yield Compared(f"{what} {i} (as integers)", bits(here), bits(there))


def untouched_around(parts: list[Placed]) -> Iterator[Compared]:
    for i, part in enumerate(parts):
        around = part.around().cpu()
        yield Compared(f"memory around tensor {i}", around, torch.full_like(around, SENTINEL))


def errors(compared: Compared) -> Tensor:
    """The error of each element in ulps: 0 if both are NaN, inf if one is or if integers differ."""
    found, expected = compared.found.detach().cpu(), compared.expected.detach().cpu()
    if not found.is_floating_point():
        return torch.where(found == expected, 0.0, math.inf)
    here, there = found.double(), expected.double()
    ulp = compared.ulp
    if ulp is None:
        limits = torch.finfo(found.dtype)
        ulp = limits.eps * there.abs().clamp(min=limits.smallest_normal)
    same = (here == there) | (here.isnan() & there.isnan())
    return torch.where(same, 0.0, (here - there).abs() / ulp).nan_to_num(
        nan=math.inf, posinf=math.inf
    )


def largest_error(compared: Compared) -> tuple[float, str | None]:
    """The largest error in ulps, and a message if it is not allowed, else None."""
    found, expected = compared.found, compared.expected
    if found.shape != expected.shape:
        return math.inf, f"{compared.what}: shape {[*found.shape]}, expected {[*expected.shape]}"
    if found.numel() == 0:
        return 0.0, None
    flat = errors(compared).flatten()
    worst, index = flat.max(0)
    if worst <= compared.allowed:
        return worst.item(), None
    wrong = int((flat > compared.allowed).sum())
    here, there = (t.detach().flatten()[int(index)].item() for t in (found, expected))
    return worst.item(), (
        f"{compared.what}: element {int(index)} of {[*found.shape]}: expected {there!r}, found "
        f"{here!r}; {worst:.3g} ulp apart, {compared.allowed:g} allowed; {wrong} elements are wrong"
    )


def run_check(check: Check, device: torch.device, grid: Grid, report: Report) -> None:
    """Run all cases of a check and report them in one line, with details of the first failure.

    Raises:
        DeviceLost: a case broke the CUDA context. The report has its line.
    """
    if check.needs_cuda and device.type != "cuda":
        report.line(f"{check.name:32} passed over: needs a CUDA device")
        return
    count, worst, lost = 0, 0.0, None
    ran = _Ran() if hasattr(ops, check.name) or hasattr(attention_ops, check.name) else None
    failures: list[str] = []
    for case in tqdm(check.cases(device, grid), desc=check.name, leave=False, disable=None):
        try:
            with ran if ran and count == 0 else contextlib.nullcontext():
                found, problem = _worst(case)
        except Exception as error:
            found, problem = math.inf, f"raised {_told(error)}"
            lost = lost_device(device)
        count, worst = count + 1, max(worst, found)
        if problem is not None:
            failures.append(f"{case.name}\n{tail(problem, 30)}")
        if lost is not None:
            break
    served = ran.by(check.name) if ran else ""
    _report_line(check.name, served, count, worst, failures, report)
    if lost is not None:
        raise DeviceLost(f"in {check.name}, {case.name}: {lost}")


def _worst(case: Case) -> tuple[float, str | None]:
    worst, problem = 0.0, None
    for compared in case.run():
        error, wrong = largest_error(compared)
        worst, problem = max(worst, error), problem or wrong
    return worst, problem


def _report_line(name, served, count, worst, failures, report) -> None:
    line = f"{name:32} {count:5} cases  {served:10} largest error {worst:.3g} ulp"
    if failures:
        line = f"{line}  FAILED, {len(failures)} of them; the first:\n  {failures[0]}"
        report.fail(name, line)
    else:
        report.line(f"{line}  OK")


def _told(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)[-3:]
    where = "".join(traceback.format_list(frames))
    return f"{type(error).__name__}: {error}\n{where}"


def lost_device(device: torch.device) -> str | None:
    """CUDA's error if an earlier error (such as an illegal memory access) broke the context."""
    try:
        torch.ones(1, device=device).sum().item()
    except torch.OutOfMemoryError:
        return None
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return None


class _Ran(TorchDispatchMode):
    """Records which operators of fastguard ran. Plain torch runs where there is no kernel."""

    def __init__(self):
        super().__init__()
        self._names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self._names.add(func._schema.name)
        return func(*args, **(kwargs or {}))

    def by(self, name: str) -> str:
        return "kernel" if f"fastguard::{name}" in self._names else "reference"
