"""docs/why-it-exploded.md has what the records in docs/results say."""

import json
import re

import pytest

from .blocks import ROOT

RESULTS = ROOT / "docs" / "results"
PAGE = (ROOT / "docs" / "why-it-exploded.md").read_text(encoding="utf-8")


def record(name):
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


@pytest.fixture
def bench(monkeypatch):
    """bench/, importable."""
    monkeypatch.syspath_prepend(ROOT / "bench")


def test_the_log_is_that_of_the_record(bench):
    import first_log

    found = record("first_log.json")
    shown = [first_log.text(line) for line in (*found["before"], *found["before, guarded"])]
    lines = [line for line in PAGE.splitlines() if line.startswith("Batch ")]
    assert len(lines) >= 12 and lines == [line for line in shown if line in lines]
    assert first_log.depth_table(found["by depth"]) in PAGE
    assert first_log.input_table(found["by input"]) in PAGE
    for name, said in found["diagnosis"].items():
        assert first_log.diagnosis_text(name, said) in PAGE


def test_the_first_steps_are_a_search_for_a_scale(bench):
    found = record("first_log.json")
    for lines in (found["before"], found["before, guarded"]):
        searches = [line for line in lines if line["grad_norm"] is None]
        assert [line["batch"] for line in searches[:3]] == [0, 1, 2]
        assert all(line["loss"] < 1000 and line["float32 norm"] < 1000 for line in searches)
    assert all(line["scale_search"] for line in searches)


def test_the_summary_is_that_of_the_record(bench):
    from grid import records

    cells = record("stability.json")["cells"]
    assert records.markdown_table(*records.summary(cells)) in PAGE


def test_parity_is_that_of_the_record(bench):
    import parity

    found = record("parity.json")
    assert f"{parity.weights_table(found)}\n\n{parity.losses_table(found)}" in PAGE
    assert {row["guard"] for row in found["inf"].values()} == {"bitwise torch's"}
    assert len(found["runs"]) == 3
    for runs in found["runs"].values():
        guard, ours, seeds = parity.distances(runs)
        assert max(guard, ours) < seeds


def cells_of(**wanted):
    return [
        cell
        for cell in record("stability.json")["cells"].values()
        if all(cell[name] in values for name, values in wanted.items())
    ]


GUARDED = ["stable", "guarded", "guarded, rollback", "before, guarded"]
NONFINITE = ["infeasible", "nan input", "nan forward", "inf gradient"]


def test_what_the_page_says_of_the_guard():
    """Its claims about all cells of a kind, in the order of the page."""
    found = cells_of(recipe=GUARDED, fault=NONFINITE)
    assert len(found) >= 80 and {cell["verdict"] for cell in found} == {"equal"}
    for recipe in ("plain", "before", "zclip", "smartclip", "OLMo-core", "stable, unguarded"):
        found = cells_of(recipe=[recipe], fault=NONFINITE)
        assert {cell["verdict"] for cell in found} == {"NaN weights"}, recipe
    assert {
        cell["verdict"] for cell in cells_of(fault=["poisoned moment"], recipe=GUARDED[:2])
    } == {"NaN weights"}
    assert len(re.findall(r"^\| `?[\w, -]+`? \| \d+ \|", PAGE, re.M)) >= 20
