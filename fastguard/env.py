"""``python -m fastguard.env``: what was built, and what this machine chose of it."""

import os
import platform

import torch

from . import _native, ops


def describe() -> dict[str, str]:
    """One line of text per fact, in the order in which one asks for them."""
    cpu, cuda = ops.cpu_info(), ops.cuda_info()
    facts = {
        "python": platform.python_version(),
        "torch running": torch.__version__,
        "torch built against": f"{cpu['torch']} (Stable ABI, target 2.11)" if cpu else "-",
        "CPU kernels": f"built by {cpu['compiler']}"
        if cpu
        else f"not in use: {_native.cpu_problem}",
        "instruction sets compiled": cpu.get("compiled", "-"),
        "instruction set chosen": cpu.get("chosen", "-"),
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} processors",
        "CUDA kernels": (
            f"sm {cuda['archs']}, nvcc {cuda['toolkit']}"
            if cuda
            else f"not in use: {_native.cuda_problem}"
        ),
        "CUDA devices": ", ".join(
            torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())
        )
        or "none",
    }
    return facts


if __name__ == "__main__":
    for key, value in describe().items():
        print(f"{key:26} {value}")
