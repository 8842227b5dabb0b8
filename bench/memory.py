"""Peak memory of a call, from the allocations that torch.profiler reports."""

import itertools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import profile


def peak_bytes(function: Callable[[], object], device: torch.device) -> int:
    """The most bytes of ``device`` that torch holds at once in a call, beyond those before it.

    Summed over the profiler's events of torch's allocator, so that an operator's scratch counts,
    and what the function returns. What oneDNN or MKL take from malloc does not.
    """
    with profile(profile_memory=True) as profiler:
        result = function()
    del result
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    kind = {"cpu": 0, "cuda": 1}[device.type]
    memory = [
        event
        for event in events
        if event["name"] == "[memory]" and event["args"]["Device Type"] == kind
    ]
    memory.sort(key=lambda event: event["ts"])
    held = itertools.accumulate((event["args"]["Bytes"] for event in memory), initial=0)
    return max(held)
