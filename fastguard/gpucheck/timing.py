"""Times compared with torch's, and with the bandwidth of a plain copy on the same device."""

import statistics
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import nn

import fastguard
from fastguard import ops
from fastguard._table import table
from fastguard._timing import in_turns, synchronize

from . import machine
from .report import Report

MAX_NORM = 1e30  # above all norms


class Workload(NamedTuple):
    name: str
    sizes: list[int]
    dtype: torch.dtype = torch.float32

    @property
    def count(self) -> int:
        return sum(self.sizes)

    @property
    def item(self) -> int:
        return self.dtype.itemsize

    @property
    def needed(self) -> int:
        """Bytes of parameters, gradients, three optimizers' moments and AdamW's temporaries."""
        return self.count * (2 * self.item + 3 * 8 + 2 * 4)


NET = [149_616, 384] * 300
WORKLOADS = [
    Workload("2000 tensors of 64 fp32", [64] * 2000),
    Workload("45 M fp32 in 600 tensors", NET),
    Workload("45 M bf16 in 600 tensors", NET, torch.bfloat16),
    Workload("1 B fp32 in 400 tensors", [2_500_000] * 400),
]


class Seconds(NamedTuple):
    """Median times of one call."""

    gpu: float
    host: float


class Clock:
    """Measures the time of a call on the GPU, and the time until it returns on the host.

    The clock makes two calls. It queues the second one while the GPU sleeps. The time between its
    two events is then the GPU's work, without waiting for Python. A call of more than about 1000
    launches fills the queue while the GPU sleeps, and its time includes some waiting. On the CPU
    both times are equal.
    """

    def __init__(self, device: torch.device):
        self._device = device

    def __call__(self, function: Callable[[], object]) -> Seconds:
        synchronize(self._device)
        start = time.perf_counter()
        function()
        host = time.perf_counter() - start
        if self._device.type != "cuda":
            return Seconds(host, host)
        synchronize(self._device)
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        torch.cuda._sleep(int((2 * host + 1e-3) * 2e9))  # in cycles; clocks reach about 2 GHz
        events[0].record()
        function()
        events[1].record()
        events[1].synchronize()
        return Seconds(events[0].elapsed_time(events[1]) / 1e3, host)


def medians(functions, repeats, device) -> dict[str, Seconds]:
    readings = in_turns(functions, repeats, Clock(device))
    return {
        name: Seconds(*map(statistics.median, zip(*values, strict=True)))
        for name, values in readings.items()
    }


def copy_bandwidth(size: int, repeats: int, device: torch.device) -> float:
    """The bandwidth of ``copy_`` in bytes per second, reads plus writes."""
    a = torch.zeros(size, dtype=torch.uint8, device=device)
    b = torch.ones(size, dtype=torch.uint8, device=device)
    return 2 * size / medians({"copy": lambda: b.copy_(a)}, repeats, device)["copy"].gpu


class Row(NamedTuple):
    call: Callable[[], object]
    #: Bytes that the call reads and writes per parameter, counted from its operations.
    bytes: float


def norm_rows(workload: Workload, parameters: list[nn.Parameter]) -> dict[str, Row]:
    """Calls that compute norms. No gradient needs clipping here, but torch writes them anyway."""
    grads, item = [p.grad for p in parameters], workload.item
    clip, torch_clip = fastguard.clip_grad_norm_, nn.utils.clip_grad_norm_
    return {
        "fastguard.ops.grad_norm": Row(lambda: ops.grad_norm(grads), item),
        "torch get_total_norm": Row(lambda: nn.utils.get_total_norm(grads, foreach=True), item),
        "fastguard.clip_grad_norm_": Row(lambda: clip(parameters, MAX_NORM), item),
        "torch clip_grad_norm_": Row(
            lambda: torch_clip(parameters, MAX_NORM, foreach=True), 3 * item
        ),
    }


def step_rows(workload: Workload, parameters: list[nn.Parameter]) -> dict[str, Row]:
    """Steps of the same parameters by the same gradients, each with its own moments.

    fastguard's moments are float32. torch's have the dtype of the parameters.
    """
    item = workload.item
    guard, ours = fastguard.GradGuard(parameters, MAX_NORM), fastguard.AdamW(parameters)

    def clip_and_step(optimizer):
        def call():
            nn.utils.clip_grad_norm_(parameters, MAX_NORM, foreach=True)
            optimizer.step()

        return call

    fused, default = torch.optim.AdamW(parameters, fused=True), torch.optim.AdamW(parameters)
    return {
        "guard.step(fastguard.AdamW)": Row(lambda: guard.step(ours), 4 * item + 16),
        "clip_grad_norm_ + AdamW(fused=True)": Row(clip_and_step(fused), 10 * item),
        "clip_grad_norm_ + AdamW()": Row(clip_and_step(default), 23 * item),
    }


def times(
    title: str, count: int, rows: dict[str, Row], repeats: int, device: torch.device, copy: float
) -> str:
    """A table whose rows are compared with the first one."""
    seconds = medians({name: row.call for name, row in rows.items()}, repeats, device)
    first = next(iter(seconds.values()))
    lines = []
    for name, row in rows.items():
        gpu, host = seconds[name]
        speed = row.bytes * count / gpu
        lines.append(
            [
                *(name, f"{gpu * 1e3:.3f}", f"{gpu / first.gpu:.2f}"),
                *(f"{host * 1e3:.3f}", f"{host / first.host:.2f}"),
                *(f"{row.bytes:g}", f"{speed / 1e9:.0f}", f"{speed / copy:.0%}"),
            ]
        )
    header = ["", "device ms", "/ ours", "host ms", "/ ours", "bytes/param", "GB/s", "of a copy"]
    return table(title, header, lines)


def measure(
    report: Report,
    device: torch.device,
    repeats: int,
    workloads: list[Workload] = WORKLOADS,
    copy_size: int = 1 << 30,
) -> None:
    report.line(
        f"Medians of {repeats}, the rows of a table in turns. device: of the work, queued while "
        "the GPU\nsleeps. host: until the call returns. bytes/param: counted, not measured.\n"
    )
    copy = copy_bandwidth(copy_size, repeats, device)
    report.line(f"a copy of {copy_size / 2**30:g} GiB reads and writes at {copy / 1e9:.0f} GB/s")
    for workload in workloads:
        _measure_workload(report, workload, repeats, device, copy)


def _measure_workload(report, workload, repeats, device, copy) -> None:
    if (free := machine.free_memory(device)) < workload.needed:
        report.line(
            f"\n{workload.name}: passed over, needs about {workload.needed / 2**30:.0f} GiB of "
            f"memory; {free / 2**30:.0f} are free"
        )
        return
    try:
        for text in _tables(workload, repeats, device, copy):
            report.line(f"\n{text}")
    except torch.OutOfMemoryError as error:
        report.line(f"\n{workload.name}: passed over, out of memory: {str(error).splitlines()[0]}")
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _tables(workload, repeats, device, copy) -> Iterator[str]:
    parameters = []
    for size in workload.sizes:
        values = torch.randn(size, dtype=workload.dtype, device=device) * 0.02
        parameters.append(nn.Parameter(values))
        parameters[-1].grad = torch.randn_like(values) * 1e-3
    for kind, rows in (("norm", norm_rows), ("step", step_rows)):
        title = f"{workload.name}: {kind}"
        yield times(title, workload.count, rows(workload, parameters), repeats, device, copy)
