"""Learning rates over a run."""

import math

import pytest
import torch

from fastguard.speech.training.schedules import (
    average_decay,
    capped_warmup,
    learning_rate,
    set_learning_rate,
)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "noam"])
def test_the_warm_up_rises_in_proportion(schedule):
    rates = [learning_rate(schedule, 0.5, 10, step, 0.0) for step in range(10)]
    assert rates == pytest.approx([0.05 * (step + 1) for step in range(10)])


@pytest.mark.parametrize(
    "schedule, step, progress, expected",
    [
        ("constant", 10_000, 0.99, 1.0),
        ("cosine", 50, 0.0, 1.0),
        ("cosine", 50, 0.5, 0.5),
        ("cosine", 50, 1.0, 0.0),
        ("cosine", 50, 1.7, 0.0),
        ("noam", 9, 0.5, 1.0),
        ("noam", 39, 0.5, 0.5),
        ("noam", 999, 0.5, 0.1),
    ],
)
def test_what_follows(schedule, step, progress, expected):
    assert learning_rate(schedule, 1.0, 10, step, progress) == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "noam"])
def test_never_above_lr_and_never_negative(schedule):
    for step in range(200):
        assert 0 <= learning_rate(schedule, 0.3, 17, step, step / 199) <= 0.3


def test_as_torchs_cosine_without_a_warm_up():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.7)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40)
    for step in range(40):
        ours = learning_rate("cosine", 0.7, 0, step, step / 40)
        assert ours == pytest.approx(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()


def test_unknown_schedules_are_refused():
    with pytest.raises(ValueError, match="unknown schedule 'linear'"):
        learning_rate("linear", 1.0, 0, 0, 0.0)


def test_every_group_is_set():
    weights = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": [w]} for w in weights], lr=math.pi)
    set_learning_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]


@pytest.mark.parametrize(
    "warmup, steps, expected",
    [(500, 4620, 500), (500, 2500, 500), (500, 2499, 499), (500, 20, 4), (500, 1, 1), (0, 20, 0)],
)
def test_a_warm_up_is_at_most_a_fifth_of_the_run(warmup, steps, expected):
    assert capped_warmup(warmup, steps) == expected


def test_the_decay_of_an_average_rises_to_its_setting():
    decays = [average_decay(0.999, n) for n in range(20_000)]
    assert decays[1] == pytest.approx(2 / 11)
    assert decays == sorted(decays)
    assert decays[8980] < 0.999 == decays[8999] == decays[-1]
    assert average_decay(0.1, 1) == 0.1
