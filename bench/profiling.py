"""Peak memory of a call, and where its time goes, from torch.profiler."""

import itertools
import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it tells of every start and stop


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
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    kind = {"cpu": 0, "cuda": 1}[device.type]
    memory = [
        event
        for event in events
        if event["name"] == "[memory]" and event["args"]["Device Type"] == kind
    ]
    memory.sort(key=lambda event: event["ts"])
    held = itertools.accumulate((event["args"]["Bytes"] for event in memory), initial=0)
    return max(held)


def self_seconds(function: Callable[[], object], device: torch.device) -> Counter[str]:
    """Seconds in each operator of a call, less the operators that it calls.

    On the CPU they add up to the whole call: what no operator covers is under "Python". Of a GPU
    they are the time of its kernels.
    """
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler, record_function("Python"):
        function()
    attribute = "self_cpu_time_total" if device.type == "cpu" else "self_device_time_total"
    return Counter({e.key: getattr(e, attribute) * 1e-6 for e in profiler.key_averages()})
