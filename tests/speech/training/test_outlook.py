"""The number of steps that a run will take, and the time that is left."""

import math

import pytest

from fastguard.speech.training.config import Config
from fastguard.speech.training.outlook import Outlook, clock
from fastguard.speech.training.progress import Progress


def at(epoch, batches, step):
    return Progress(step, batches, epochs=[None] * (epoch - 1))


@pytest.mark.parametrize(
    ("settings", "progress", "total"),
    [
        ({"epochs": 3}, at(1, 1, 1), 30),
        ({"epochs": 3}, at(3, 10, 30), 30),
        ({"epochs": 3, "grad_accumulation": 4}, at(1, 4, 1), 9),  # 4 + 4 + 2 batches an epoch
        ({"epochs": 3, "grad_accumulation": 4}, at(2, 10, 6), 9),
        ({"epochs": 3, "max_steps": 12}, at(2, 1, 11), 12),
        ({"epochs": 1, "max_steps": 12}, at(1, 1, 1), 10),
        ({"epochs": 2}, at(2, 3, 25), 32),  # the first epoch had 22 batches
    ],
)
def test_the_steps_of_a_run(settings, progress, total):
    assert Outlook(Config(**settings)).total_steps(progress, 10) == total


def test_the_time_that_is_left():
    outlook = Outlook(Config(epochs=2, max_steps=15))
    assert math.isnan(outlook.seconds_left(at(1, 0, 0), 10))
    for seconds in (1.0, 3.0):
        outlook.step_took(seconds)
    assert outlook.seconds_left(at(1, 2, 2), 10) == 13 * 2.0
    outlook.evaluation_took(7.0)
    assert outlook.seconds_left(at(1, 2, 2), 10) == 13 * 2.0 + 2 * 7.0
    assert outlook.seconds_left(at(1, 9, 9), 10) == 6 * 2.0 + 2 * 7.0
    assert outlook.seconds_left(at(2, 5, 15), 10) == 7.0
    for _ in range(100):  # the first two are forgotten
        outlook.step_took(0.5)
    assert outlook.seconds_left(at(2, 3, 13), 10) == 2 * 0.5 + 7.0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0:00:00"), (59.6, "0:01:00"), (3725.0, "1:02:05"), (360000.0, "100:00:00")],
)
def test_a_time_in_words(seconds, text):
    assert clock(seconds) == text
    assert clock(math.nan) == "unknown"
