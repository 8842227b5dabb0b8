"""Learning rates: a warm-up, and what follows it.

Functions of how far a run has come rather than counters: there is no state to save, and a run that
is resumed with more epochs goes on where its new schedule would be.
"""

import math

import torch


def learning_rate(schedule: str, lr: float, warmup: int, step: int, progress: float) -> float:
    """The rate of a step.

    Args:
        schedule: "constant"; "cosine" falls from ``lr`` to 0 (Loshchilov and Hutter 2017, arXiv
            1608.03983, without restarts); "noam" falls as the inverse square root of the step from
            ``lr`` at the end of the warm-up (Vaswani et al. 2017, section 5.3, whose constant
            ``lr`` takes the place of).
        lr: the largest rate.
        warmup: steps over which the rate rises in proportion to the step.
        step: of the optimizer, from 0.
        progress: share of the run that lies behind, in [0, 1].

    Raises:
        ValueError: an unknown schedule.
    """
    rise = min(1.0, (step + 1) / warmup) if warmup else 1.0
    if schedule == "constant":
        return lr * rise
    if schedule == "cosine":
        return lr * rise * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    if schedule == "noam":
        return lr * min(rise, math.sqrt(warmup / (step + 1)))
    raise ValueError(f"unknown schedule {schedule!r}: choose constant, cosine or noam")


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The same for every group of parameters."""
    for group in optimizer.param_groups:
        group["lr"] = lr
