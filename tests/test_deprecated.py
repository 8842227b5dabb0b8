"""fastguard._deprecated: old names work, and warn once."""

import warnings

import pytest

import fastguard
from fastguard import Verdict, _deprecated
from fastguard.diagnose.findings import Finding
from fastguard.guard import report
from fastguard.guard.report import FiniteRange, NonfiniteParameter

FOUND = (NonfiniteParameter("w", nans=1, infs=0, first_index=3),)
BAD = fastguard.StepReport(7, None, Verdict.SKIP_NONFINITE, 1.0, 1.0)
STEP = fastguard.StepReport(
    7,
    "b",
    Verdict.SKIP_NONFINITE,
    float("nan"),
    1.0,
    nonfinite_parameters=FOUND,
    finite_ranges=(FiniteRange(False, "w", "w"),),
    skipped_micro_batches=(BAD,),
    micro_batches=1,
)


@pytest.fixture(autouse=True)
def nothing_warned_yet(monkeypatch):
    monkeypatch.setattr(_deprecated, "_warned", set())


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("offenders", "nonfinite_parameters"),
        ("bracket", "finite_ranges"),
        ("quarantined", "skipped_micro_batches"),
        ("all_quarantined", "all_micro_batches_skipped"),
    ],
)
def test_a_report_has_its_old_attributes(old, new):
    message = f"StepReport.{old} is now called StepReport.{new}"
    with pytest.warns(DeprecationWarning, match=message) as caught:
        assert getattr(STEP, old) == getattr(STEP, new)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert getattr(STEP, old)  # it has warned


@pytest.mark.parametrize(
    ("old", "new"), [("Offender", NonfiniteParameter), ("Stretch", FiniteRange)]
)
def test_a_module_has_its_old_classes(old, new):
    with pytest.warns(DeprecationWarning, match=f"{old} is now called .*{new.__name__}"):
        assert getattr(report, old) is new


def test_what_never_was_there_is_still_not_there():
    with pytest.raises(AttributeError, match="no attribute 'Offenders'"):
        _ = report.Offenders


def test_a_report_of_an_older_fastguard_is_read_without_a_warning():
    values, names = STEP.to_dict(), {new: old for old, new in report.OLD_KEYS.items()}
    older = {names.get(key, key): value for key, value in values.items()}
    inner = {names.get(key, key): value for key, value in BAD.to_dict().items()}
    older["quarantined"] = [inner]
    assert {"offenders", "bracket", "quarantined"} < set(older)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = fastguard.StepReport.from_dict(older)
    assert again.nonfinite_parameters == FOUND
    assert again.finite_ranges == STEP.finite_ranges
    assert again.skipped_micro_batches == (BAD,)


def test_the_new_key_counts_where_both_are_there():
    assert _deprecated.with_new_keys({"a": 1, "b": 2, "c": 3}, {"a": "b"}) == {"b": 2, "c": 3}


def test_a_finding_has_its_old_attribute():
    finding = Finding("dead units", "0", "all are zero", "lower the learning rate")
    with pytest.warns(DeprecationWarning, match=r"Finding\.cure is now called Finding\.suggestion"):
        assert finding.cure == finding.suggestion == "lower the learning rate"
