"""docs/why-it-exploded.md has what the records in docs/results say."""

import json

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


def test_the_table_is_that_of_the_record(bench):
    from grid import records

    cells = record("stability.json")["cells"]
    assert records.markdown_table(*records.worst(cells)) in PAGE


def test_parity_is_that_of_the_record(bench):
    import parity

    found = record("parity.json")
    assert f"{parity.weights_table(found)}\n\n{parity.losses_table(found)}" in PAGE
    assert {row["guard"] for row in found["inf"].values()} == {"bitwise torch's"}
    assert len(found["runs"]) == 3
    all_of = [parity.distances(runs) for runs in found["runs"].values()]
    largest = max(max(guard, ours) for guard, ours, _ in all_of)
    seeds = sorted(spread for _, _, spread in all_of)
    said = f"differ by {largest:.1g} at most, and those of torch's own seeds by {seeds[0]:.2g} to"
    assert f"{said} {seeds[-1]:.2g}." in " ".join(PAGE.split())


CELLS = record("stability.json")["cells"]
GUARDED = ("stable", "guarded", "guarded, rollback", "before, guarded")
TORCHS = ("plain", "before", "zclip", "smartclip", "OLMo-core")
LOOKING = ("clip, look, skip", "stabilityguard", "SpeechBrain", "NeMo", "ESPnet")
NONFINITE = ("infeasible", "nan input", "nan forward", "inf gradient")
NORMED = ("teacher", "baseline", "deep")
WITHOUT_NORM = ("gpt", "vit", "lstm")
PUT_BACK = [recipe for recipe in {c["recipe"] for c in CELLS.values()} if "of before" in recipe]


def verdicts(recipes=None, faults=None, patients=None):
    """Of the cells of these names; None stands for all."""
    found = {
        cell["verdict"]
        for cell in CELLS.values()
        if (recipes is None or cell["recipe"] in recipes)
        and (faults is None or cell["fault"] in faults)
        and (patients is None or cell["patient"] in patients)
    }
    assert found
    return found


def test_nan_and_inf():
    assert verdicts(GUARDED, NONFINITE) == {"equal"}
    assert verdicts((*TORCHS, "stable, unguarded"), NONFINITE) == {"NaN weights"}
    assert verdicts(LOOKING, ("infeasible", "inf gradient")) == {"finite", "equal"}
    assert verdicts(LOOKING, ("nan input", "nan forward"), NORMED) == {"NaN buffers"}
    unclipped = ("clip, look, skip", "NeMo", "ESPnet")
    assert verdicts(unclipped, NONFINITE, WITHOUT_NORM) == {"equal"}


def test_fp16():
    assert verdicts(("plain", "before"), ("fp16",), NORMED) == {"NaN buffers"}
    assert verdicts(GUARDED, ("fp16",), (*NORMED, "vit")) == {"finite"}
    guarded, before = (
        CELLS[f"deep 54 M / {name} / fp16"]["skipped"] for name in ("guarded", "before")
    )
    assert guarded == before and len(guarded) == 7 and 8 in guarded
    assert "The search takes 6 of its 12 steps, and one batch is faulty." in " ".join(PAGE.split())


def test_finite_spikes():
    assert verdicts(("plain", "NeMo", "stabilityguard"), ("1e30 gradient",)) == {"NaN moments"}
    assert verdicts(("OLMo-core",), ("1e30 gradient",)) == {"starved"}
    assert verdicts(("stable", "before, guarded"), ("1e30 gradient",)) == {"equal"}
    assert verdicts(("guarded", "stable, skip_norm of before"), ("1e30 gradient",)) == {"finite"}
    hand = verdicts(("clip, look, skip",), ("1e30 gradient",), WITHOUT_NORM)
    assert hand == {"equal"}


def test_a_loud_input_and_a_learning_rate():
    assert not verdicts(None, ("loud input", "lr x 100")) & {
        name for name in verdicts() if name.startswith("NaN")
    }
    assert verdicts(None, ("loud input",), ("baseline",)) == {"worse"}
    assert verdicts(("before, guarded",), ("loud input",), ("deep",)) == {"equal"}
    assert verdicts(("before",), ("lr x 100",), ("deep", "vit", "lstm")) == {"worse"}
    assert verdicts(("before",), ("lr x 100",), ("teacher", "baseline", "gpt")) == {"finite"}
    assert verdicts(("stable",), ("lr x 100",), ("vit",)) == {"worse"}
    vit = CELLS["vit / stable / none"]["evaluation"]
    assert f"moves in 61 steps: {vit['start']} to {vit['end']}." in " ".join(PAGE.split())


def test_a_poisoned_moment():
    rolled_back = verdicts(("guarded, rollback",), ("poisoned moment",))
    assert rolled_back == {"finite", "worse"}
    assert verdicts(("guarded, rollback",), ("poisoned moment",), ("vit",)) == {"worse"}
    for cell in CELLS.values():
        if cell["fault"] == "poisoned moment" and cell["recipe"] != "guarded, rollback":
            no_step = (cell["patient"], cell["recipe"]) == ("deep", "stable, literal")
            assert cell["verdict"] == ("starved" if no_step else "NaN weights")
    assert CELLS["gpt / stable / poisoned moment"]["ended"] == "GradientExplosionError"


def test_which_setting_cures():
    assert len(PUT_BACK) == 7
    assert verdicts(PUT_BACK, NONFINITE) == {"equal"}
    loud = verdicts(("stable, linear_std of before",), ("loud input",), ("deep",))
    assert loud == {"worse"}
    assert verdicts(("stable, literal",), ("none",), ("deep", "deep 54 M")) == {"starved"}


@pytest.mark.parametrize(
    "name, said",
    [
        ("deep / stable / lr x 100", "trains `deep` to {}"),
        ("lstm / stable / lr x 100", "and `lstm` to {}"),
        ("deep / stable, lr of before / lr x 100", "they end at {} and"),
        ("lstm / stable, lr of before / lr x 100", "17.1 and {}"),
        ("deep / stabilityguard / lr x 100", "ends at a loss of {}"),
        ("deep / before, guarded / lr x 100", "`before, guarded` at {}"),
        ("deep / guarded / lr x 100", "`guarded` at {}"),
        ("teacher / stable / none", "The teacher's loss is {} after 61 steps"),
        ("teacher / before / none", "61 steps and {} with `before`"),
    ],
)
def test_the_losses_that_the_page_names(name, said):
    end = CELLS[name]["evaluation"]["end"]
    assert said.format(f"{end:#.3g}") in " ".join(PAGE.split())
