"""How many skips a run may cost: fastguard.guard.accounting, by itself and in GradGuard."""

import math
import random

import pytest
import torch
from torch import nn

import fastguard
from fastguard import GradGuard, GradientExplosionError, Rollback, StepReport, Verdict
from fastguard.guard.accounting import Budget

from .test_grad_guard import set_gradient_norms


def report(step, verdict):
    return StepReport(step, None, verdict, 1.0, 1.0)


def spent_after(patience, verdicts):
    """The budget, and after how many of the steps it was spent (None if never)."""
    budget = Budget(patience)
    for step, verdict in enumerate(verdicts):
        budget.account(report(step, verdict))
        if budget.spent is not None:
            return budget, step + 1
    return budget, None


GOOD, BAD, OVER = Verdict.CLIP, Verdict.SKIP_NONFINITE, Verdict.SKIP_ROLLBACK


def test_skips_in_a_row():
    budget, steps = spent_after(3, [BAD, BAD, GOOD, BAD, BAD, BAD])
    assert steps == 6
    assert budget.spent.what == "3 steps in a row were skipped, steps 3 to 5"
    assert budget.spent.since == 3
    assert [r.step for r in budget.spent.reports] == [3, 4, 5]


def test_more_than_half_of_the_last_steps():
    """Two of three are skipped and never three in a row."""
    budget, steps = spent_after(3, [BAD, BAD, GOOD] * 20)
    assert steps == 19  # the 13th skip, of at most 24 steps
    assert budget.spent.what == (
        "13 of the last 19 steps were skipped, more than half of 8 x patience=3, though never 3 in "
        "a row; of the last 3, steps 15 to 18"
    )
    assert budget.spent.since == 0
    assert [r.step for r in budget.spent.reports] == [15, 16, 18]


def test_half_of_the_last_steps_is_not_too_many():
    assert spent_after(3, [BAD, GOOD] * 500)[1] is None
    assert spent_after(3, [BAD, BAD, GOOD, GOOD] * 500)[1] is None
    # The window forgets: 12 skips of 24, however many there were before.
    assert spent_after(3, ([BAD, BAD, GOOD] * 6 + [GOOD] * 12) * 20)[1] is None


def test_since_is_the_first_skip_of_the_window():
    budget, steps = spent_after(3, [BAD] + [GOOD] * 30 + [BAD, BAD, GOOD] * 20)
    assert steps == 31 + 19
    assert budget.spent.since == 31


def test_batches_passed_over_after_a_rollback_are_as_if_they_had_not_been():
    assert spent_after(3, [BAD, OVER, BAD, OVER, BAD])[1] == 5
    assert spent_after(3, [OVER] * 500)[1] is None
    assert spent_after(3, [BAD, BAD, GOOD, OVER] * 20)[1] == 25  # the 19th of those that count


def test_account_says_whether_the_step_counts():
    budget = Budget(3)
    counted = [budget.account(report(0, verdict)) for verdict in (GOOD, BAD, OVER)]
    assert counted == [True, True, False]


@pytest.mark.parametrize("patience", [1, 2, 5, 25])
def test_a_random_series_against_the_definition(patience):
    rng = random.Random(patience)
    for share in (0.2, 0.45, 0.55, 0.8):
        verdicts = [BAD if rng.random() < share else GOOD for _ in range(1000)]
        expected = None
        for n in range(1, 1001):
            last = [v.skipped for v in verdicts[max(0, n - 8 * patience) : n]]
            in_a_row = n >= patience and all(last[-patience:])
            if in_a_row or sum(last) > 4 * patience:
                expected = n
                break
        assert spent_after(patience, verdicts)[1] == expected


def test_a_resumed_budget_goes_on():
    verdicts = [BAD, BAD, GOOD] * 20
    first, _ = spent_after(3, verdicts[:17])
    resumed = Budget(3)
    resumed.load_state_dict(first.state_dict())
    assert resumed.state_dict() == first.state_dict()
    for step in (17, 18):
        for budget in (first, resumed):
            budget.account(report(step, verdicts[step]))
    assert resumed.spent == first.spent is not None
    first.clear()
    assert first.state_dict() == Budget(3).state_dict()
    assert first.spent is None


@pytest.mark.parametrize(
    "wrong",
    [{"in_a_row": -1}, {"steps": [0, -2]}, {"steps": [1.5]}, {"skips": [{}]}, {"skips": None}],
)
def test_a_state_that_is_none_changes_nothing(wrong):
    budget, _ = spent_after(3, [BAD, BAD, GOOD, BAD])
    before = budget.state_dict()
    with pytest.raises((KeyError, TypeError, ValueError)):
        budget.load_state_dict({**before, **wrong})
    assert budget.state_dict() == before


# --- in the guard ---------------------------------------------------------------------------------


def run(guard, parameters, norms):
    optimizer = fastguard.AdamW(parameters, lr=0.1)
    for step, norm in enumerate(norms):
        set_gradient_norms(parameters, norm)
        guard.step(optimizer, batch_id=f"batch {step}")
    return optimizer


def mostly_bad(n):
    """19 of 20 batches are NaN, and never 25 in a row."""
    return [1.0 if i % 20 == 0 else math.nan for i in range(n)]


def test_a_run_that_skips_19_of_20_steps_ends():
    """2000 steps of which 1900 were skipped went through without an error."""
    parameters = [nn.Parameter(torch.ones(4))]
    guard = GradGuard(parameters, patience=25)
    with pytest.raises(GradientExplosionError) as caught:
        run(guard, parameters, mostly_bad(2000))
    assert guard.state_dict()["steps"] == 107
    text = str(caught.value)
    for part in (
        "101 of the last 107 steps were skipped, more than half of 8 x patience=25",
        "25 had a NaN or Inf gradient",
        "batches: batch 81, batch 82",
        "what to try: look for corrupt",
    ):
        assert part in text, text
    assert len(caught.value.reports) == 25
    # Who catches it and goes on has all of the patience again.
    run(guard, parameters, mostly_bad(100))


def test_such_a_run_is_rolled_back_to_before_the_first_of_the_skips():
    parameters = [nn.Parameter(torch.ones(4))]
    guard = GradGuard(
        parameters, patience=3, on_patience="rollback", rollback=Rollback(every=1, keep=30)
    )
    optimizer = run(guard, parameters, [1.0] * 6)
    good = parameters[0].detach().clone()
    for norm in [math.nan, math.nan, 1.0] * 6 + [math.nan]:
        set_gradient_norms(parameters, norm)
        guard.step(optimizer)
    assert torch.equal(parameters[0].detach(), good)
    assert guard.lr_factor == 0.5


@pytest.mark.parametrize("patience", [2.5, math.inf, "3", None])
def test_patience_is_a_whole_number(patience):
    with pytest.raises(ValueError, match="patience must be a whole number of steps, got"):
        GradGuard([nn.Parameter(torch.ones(4))], patience=patience)
