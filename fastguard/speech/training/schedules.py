"""Learning rate schedules: a warm-up, and what follows it.

A rate is a function of the progress of a run. There is no state to save, and a run that is resumed
with more epochs continues on the new schedule.
"""

import math

import torch


def learning_rate(schedule: str, lr: float, warmup: int, step: int, progress: float) -> float:
    """The rate of a step.

    Args:
        schedule: "constant"; "cosine", from ``lr`` to 0 (Loshchilov and Hutter 2017, arXiv
            1608.03983, without restarts); "noam", with the inverse square root of the step from
            ``lr`` at the end of the warm-up (Vaswani et al. 2017, section 5.3, with ``lr`` in
            place of their constant).
        lr: the largest rate.
        warmup: steps in which the rate grows linearly from 0.
        step: of the optimizer, counted from 0.
        progress: finished part of the run, in [0, 1].

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
    """Set the learning rate of every group of parameters."""
    for group in optimizer.param_groups:
        group["lr"] = lr
