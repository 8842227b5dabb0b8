"""Guards from PyPI that people would pick instead, for bench/optimizer_step.py.

    pip install -e .[bench]

Each is in its fastest configuration: no file is written, nothing is printed, no step is clipped or
skipped. All three read their norms on the host, tensor by tensor.
"""

import tempfile
from collections.abc import Callable

import torch
from torch import nn

from fastguard._extras import MissingExtra, require

_folder = tempfile.TemporaryDirectory()  # StabilityGuard makes a folder for its reports

Step = Callable[[], object]


def zclip(model: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
    """ZClip in its z-score mode, with one step of warm-up."""
    guard = require("zclip", "bench").ZClip(warmup_steps=1, max_grad_norm=None)

    def step():
        guard.step(model)
        optimizer.step()

    return step


def smartclip(model: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
    """AutoClip over all gradients, still warming up: with equal norms it would clip each step."""
    package = require("smartclip", "bench")
    clipper = package.AutoClip(warmup_steps=1 << 30)
    return lambda: package.step(model, optimizer, clipper)


def stabilityguard(model: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
    """GuardedOptimizer without its reports; its hooks in the backward pass are not timed."""
    package = require("stabilityguard", "bench")
    return package.GuardedOptimizer(optimizer, model, verbose=False, log_dir=_folder.name).step


# How to make the step, and bytes per fp32 parameter of the guard: a norm reads 4; isfinite reads 4
# and writes 1, and all() reads that.
_PEERS = {
    "zclip.ZClip, AdamW(fused=True)": (zclip, 4),
    "smartclip.AutoClip, AdamW(fused=True)": (smartclip, 4),
    "stabilityguard.GuardedOptimizer, AdamW(fused=True)": (stabilityguard, 4 + 6),
}


def installed() -> dict[str, tuple[Callable[[nn.Module, torch.optim.Optimizer], Step], int]]:
    """The peers whose package is installed; the others are printed with the way to get them."""
    there = {}
    for name, (make, read) in _PEERS.items():
        try:
            require(make.__name__, "bench")
        except MissingExtra as error:
            print(f"without {name}: {error}")
            continue
        there[name] = make, read
    return there
