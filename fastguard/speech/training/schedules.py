"""Schedules of the learning rate and of the decay of averaged weights: a warm-up, and the rest.

Both are functions of the progress of a run. There is no state to save, and a run that is resumed
with more epochs continues on the new schedule.
"""

import math

import torch

WARMUP_SHARE = 0.2
"""Largest part of a run that is warm-up."""


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


def capped_warmup(warmup: int, steps: int) -> int:
    """The steps of the warm-up in a run of ``steps`` steps: at most WARMUP_SHARE of them.

    With a longer warm-up, a short run would end before it reaches its learning rate.
    """
    return min(warmup, max(1, int(WARMUP_SHARE * steps)))


def average_decay(decay: float, updates: int) -> float:
    """The decay of an exponential average of weights after ``updates`` updates.

    It rises from 0.18 to ``decay``, as (1 + n) / (10 + n) (num_updates of TensorFlow's
    ExponentialMovingAverage). A constant decay of 0.999 would keep the initial weights for the
    first thousand steps.
    """
    return min(decay, (1 + updates) / (10 + updates))


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group of parameters."""
    for group in optimizer.param_groups:
        group["lr"] = lr
