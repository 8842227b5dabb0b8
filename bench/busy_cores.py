"""Time of a small guarded step while other processes hold the cores.

    python bench/busy_cores.py [--repeats N] [--json FILE]

2000 tensors of 64 elements, `guard.step(fastguard.AdamW)` and torch's `clip_grad_norm_` with fused
AdamW. First on the machine as it is with one thread, then with as many threads as torch takes by
itself while another process computes on each core. A parallel region waits for threads that the
system does not run. Figures are medians and 90th percentiles.
"""

import contextlib
import multiprocessing
import os
import statistics
import time
from collections.abc import Iterator

import torch
from optimizer_step import FUSED_BASELINE, OURS, ROWS, Contender
from timing import arguments, print_machine, table, write_json

SIZES = [64] * 2000


def compute_forever() -> None:
    while True:
        pass


@contextlib.contextmanager
def busy_cores() -> Iterator[None]:
    """Another process on each core."""
    context = multiprocessing.get_context("spawn")
    count = os.cpu_count() or 1
    others = [context.Process(target=compute_forever, daemon=True) for _ in range(count)]
    for other in others:
        other.start()
    time.sleep(3.0)  # until they compute
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.join()


def readings(contenders: dict[str, Contender], repeats: int) -> dict[str, dict[str, float]]:
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, contender in contenders.items():
            start = time.perf_counter()
            contender()
            seconds[name].append(time.perf_counter() - start)
    return {
        name: {"median": statistics.median(s), "p90": statistics.quantiles(s, n=10)[-1]}
        for name, s in seconds.items()
    }


def main():
    args = arguments(__doc__.splitlines()[0], repeats=101)
    result = {"machine": print_machine(args.device)}
    threads = torch.get_num_threads()
    contenders = {
        name: Contender(*ROWS[name], SIZES, args.device) for name in (OURS, FUSED_BASELINE)
    }
    for contender in contenders.values():
        for parameter in contender.parameters:
            parameter.grad = torch.randn_like(parameter) * 1e-3
    torch.set_num_threads(1)
    readings(contenders, 5)
    result["alone, one thread"] = alone = readings(contenders, args.repeats)
    torch.set_num_threads(threads)
    with busy_cores():
        result[f"busy, {threads} threads"] = busy = readings(contenders, args.repeats)
    rows = [
        [
            name,
            f"{alone[name]['median'] * 1e3:.2f}",
            f"{busy[name]['median'] * 1e3:.2f}",
            f"{busy[name]['p90'] * 1e3:.2f}",
            f"{busy[name]['median'] / alone[name]['median']:.2f}",
        ]
        for name in contenders
    ]
    header = ["2000 tensors of 64 fp32", "alone, ms", "busy, ms", "busy p90", "busy / alone"]
    print(table(f"Alone with one thread, busy with {threads}", header, rows))
    write_json(args.json, result)


if __name__ == "__main__":
    main()
