"""bench/stability.py: the verdicts of its quick cells, its file, and what its parts do."""

import contextlib
import json
import math

import pytest
import torch

from tests.docs.blocks import ROOT

RESULTS = ROOT / "docs" / "results"


@pytest.fixture
def bench(monkeypatch):
    """The modules of bench/, importable; they train on one thread."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def stability(bench):
    import stability

    return stability


def verdicts(cell):
    """What does not depend on the machine: no time, no loss."""
    names = ("verdict", "steps", "nonfinite_updates", "skipped", "ended", "finite", "same")
    return {name: cell[name] for name in names}


@pytest.mark.slow
def test_the_quick_cells_end_as_published(stability):
    published = json.loads((RESULTS / "stability.json").read_text(encoding="utf-8"))["cells"]
    found = stability.main(["--quick"])
    assert len(found) >= 60
    for name, cell in found.items():
        assert verdicts(cell) == verdicts(published[name]), name


def test_the_published_table_is_that_of_the_published_cells(bench):
    from grid import records

    record = json.loads((RESULTS / "stability.json").read_text(encoding="utf-8"))
    assert (RESULTS / "stability.md").read_text(encoding="utf-8") == records.markdown(record)


def test_every_cell_of_the_grid_is_published(stability, monkeypatch):
    monkeypatch.setattr(stability, "is_installed", lambda package: True)
    record = json.loads((RESULTS / "stability.json").read_text(encoding="utf-8"))
    assert set(record["cells"]) == {stability.name(cell) for cell in stability.chosen()}


ONE = ["--patient", "lstm", "--recipe", "before", "--recipe", "guarded", "--fault", "nan input"]


def test_a_file_keeps_its_cells(stability, tmp_path, capsys):
    path = tmp_path / "new" / "stability.json"
    first = stability.main([*ONE, "--json", str(path)])
    assert {name: cell["verdict"] for name, cell in first.items()} == {
        "lstm / before / nan input": "NaN weights",
        "lstm / guarded / nan input": "equal",
    }
    assert json.loads(path.read_text())["cells"] == first
    assert first["lstm / before / nan input"]["skipped"] == []
    assert first["lstm / guarded / nan input"]["skipped"] == [24, 34, 44]
    assert "| before | NaN weights |" in path.with_suffix(".md").read_text()
    again = stability.main([*ONE, "--fault", "inf gradient", "--json", str(path)])
    assert {name: again[name] for name in first} == first
    assert len(again) == 4
    assert "4 cells, 2 of them in" in capsys.readouterr().out
    other = stability.main([*ONE, "--json", str(path), "--again"])
    seconds = [cells["lstm / guarded / nan input"]["seconds"] for cells in (first, other)]
    assert len(other) == 4 and seconds[0] != seconds[1]


@pytest.mark.parametrize("ending", [KeyboardInterrupt, MemoryError])
def test_what_is_interrupted_is_kept(stability, tmp_path, monkeypatch, capsys, ending):
    measure, path = stability.measure, tmp_path / "stability.json"

    def interrupted(patient, recipe, fault):
        if recipe.name == "guarded":
            raise ending
        return measure(patient, recipe, fault)

    monkeypatch.setattr(stability, "measure", interrupted)
    with contextlib.suppress(MemoryError):
        stability.main([*ONE, "--json", str(path)])
    assert list(json.loads(path.read_text())["cells"]) == ["lstm / before / nan input"]
    if ending is KeyboardInterrupt:
        assert f"stopped; {path} has what was run" in capsys.readouterr().out
    monkeypatch.setattr(stability, "measure", measure)
    assert len(stability.main([*ONE, "--json", str(path)])) == 2


def test_each_fault_does_what_it_says(bench):
    from grid.cell import forward, norm
    from grid.faults import FAULTS
    from grid.patients import PATIENTS

    patient = PATIENTS["teacher"]

    def at(fault, number):
        torch.manual_seed(0)
        model = patient.make()
        forward(patient, fault, model, number, faulty=True).backward()
        loss = forward(patient, fault, patient.make(), number, faulty=True)
        if fault.backward:
            fault.backward(model)
        buffers = all(b.isfinite().all() for b in model.buffers())
        return loss.item(), norm(model), buffers

    plain = at(FAULTS["none"], 24)
    assert math.isfinite(plain[0]) and plain[2]
    assert at(FAULTS["infeasible"], 24)[0] == math.inf
    for name in ("nan input", "nan forward"):
        _, gradient, buffers = at(FAULTS[name], 24)
        assert math.isnan(gradient) and not buffers
    assert at(FAULTS["loud input"], 24)[0] != plain[0]
    assert at(FAULTS["inf gradient"], 24)[1] == math.inf
    assert at(FAULTS["1e30 gradient"], 24)[1] == math.inf  # float32 squares overflow
    kinds = [at(FAULTS["in turns"], number)[0] for number in patient.bad]
    assert math.isfinite(kinds[0]) and kinds[1] == math.inf and math.isnan(kinds[2])
    assert math.isnan(at(FAULTS["fp16"], 24)[0])


def test_a_poisoned_moment_reaches_a_weight(bench):
    from grid.faults import FAULTS
    from grid.recipes import RECIPES

    for name in ("before", "guarded"):
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 1))
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        optimizer, step = RECIPES[name].build(model, 1e-3, scaler)
        for _ in range(2):
            optimizer.zero_grad()
            loss = model(torch.ones(2, 4)).sum()
            loss.backward()
            step(loss)
            finite = model[1].weight.isfinite().flatten().tolist()
            FAULTS["poisoned moment"].optimizer(optimizer)
        assert finite == [False] + [True] * 7


def test_olmo_cores_arithmetic_is_that_of_torch(bench):
    from grid.published import SkipStepAdamW

    models = [torch.nn.Linear(5, 3) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    options = {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.1}
    torchs = torch.optim.AdamW(models[0].parameters(), **options)
    theirs = SkipStepAdamW(models[1].parameters(), **options)
    for factor in (1.0, 1.0, 0.0, 1.0):
        x = torch.randn(4, 5)
        for model in models:
            model.zero_grad()
            model(x).square().sum().backward()
        theirs.step(torch.tensor(factor))
        if factor:
            torchs.step()
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(a, b)


def test_a_verdict_is_the_first_that_applies(bench):
    from grid import records

    good = {
        "finite": dict.fromkeys(("parameters", "moments", "buffers", "evaluation"), True),
        "same": {"weights": True, "buffers": True},
        "evaluation": {"start": 5.0, "end": 3.0, "without": 3.0},
        "ended": None,
        "steps": 64,
        "skipped": [24],
    }

    def verdict(**changed):
        return records.verdict(good | changed)

    assert verdict() == "equal"
    assert verdict(same={"weights": True, "buffers": False}) == "finite"
    assert verdict(same={"weights": None, "buffers": None}) == "finite"
    assert verdict(evaluation={"start": 5.0, "end": 4.1, "without": 3.0}) == "worse"
    assert verdict(skipped=list(range(33))) == "starved"
    assert verdict(skipped=list(range(33)), ended="GradientExplosionError") == "stopped"
    poisoned = good["finite"] | {"buffers": False, "evaluation": False}
    assert verdict(finite=poisoned, ended="ValueError") == "NaN buffers"
    assert set(records.VERDICTS) >= {"NaN buffers", "NaN loss", "NaN weights", "NaN moments"}
