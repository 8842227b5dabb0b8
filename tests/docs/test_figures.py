"""The figures of the README and of benchmarks.md are those of the records in docs/results."""

import dataclasses
import importlib.util
import json
import re

import pytest

from .blocks import ROOT

RESULTS = ROOT / "docs" / "results"
README = (ROOT / "README.md").read_text(encoding="utf-8")
WHY = (ROOT / "docs" / "why-it-exploded.md").read_text(encoding="utf-8")
BENCHMARKS = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
CASE = "45 M fp32 in 600 tensors (300 matrices, 300 vectors)"


def record(name):
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def of_bench(name):
    """What a benchmark wrote in the run of bench/run_all.py."""
    return record("all.json")["benches"][name]["result"]


def row(command):
    """The figures of the README's table that this command prints."""
    (line,) = re.findall(rf"^\|(.*)\| `python bench/{command}` \|$", README, re.M)
    return [float(number) for number in re.findall(r"(\d+\.\d+)", line)]


def test_the_guarded_step():
    seconds = of_bench("optimizer_step")["step"][CASE]["seconds"]
    ours = 1e3 * seconds["guard.step(fastguard.AdamW)"]
    torchs = 1e3 * seconds["clip_grad_norm_ + AdamW(fused=True)"]
    assert row("optimizer_step.py") == [round(ours, 1), round(torchs, 1)]
    plain = 1e3 * seconds["clip_grad_norm_ + AdamW()"]
    ratios = f"is {torchs / ours:.1f}x faster than `clip_grad_norm_` with torch's fused AdamW, and "
    assert f"{ratios}{plain / ours:.1f}x faster than with the default" in " ".join(
        BENCHMARKS.split()
    )


def test_the_norm():
    seconds = of_bench("norm_kernel")["cases"][CASE]
    floor = min(seconds["plain read: sum"], seconds["plain read: dot"])
    ours = seconds["fastguard.ops.grad_norm"]
    torchs = seconds["torch clip_grad_norm_"]
    expected = [round(1e3 * ours, 1), round(ours / floor, 2), round(1e3 * torchs, 1)]
    assert row("norm_kernel.py") == expected


def test_attention():
    times = of_bench("attention_kernel")["kernels"]["fp32, T=500, dropout 0.1"]
    ours, torchs = times["ours"]["both"], times["SDPA"]["both"]
    assert row("attention_kernel.py") == [round(1e3 * ours, 1), round(1e3 * torchs, 1)]


@pytest.fixture
def bench(monkeypatch):
    """A script of bench/ as a module."""
    monkeypatch.syspath_prepend(ROOT / "bench")

    def load(name):
        spec = importlib.util.spec_from_file_location(name, ROOT / "bench" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


def test_targets_and_page_are_those_of_the_record(bench):
    run_all, found = bench("run_all"), record("all.json")
    assert run_all.targets_table(found["benches"]) in BENCHMARKS
    assert (RESULTS / "all.md").read_text(encoding="utf-8") == run_all.page(found)


def test_attention_beside_sdpa():
    """The ratios of fp32 without dropout that the page names."""
    times = of_bench("attention_kernel")["kernels"]
    named = re.search(
        r"Forward and backward in fp32 without dropout: (.*?)\. With", " ".join(BENCHMARKS.split())
    )
    for ratio, length in re.findall(r"(\d\.\d\d) at (?:T = )?(\d+)", named[1]):
        each = times[f"fp32, T={length}"]
        assert f"{each['SDPA']['both'] / each['ours']['both']:.2f}" == ratio, length


def test_the_picture_says_what_happens(bench, monkeypatch):
    """The first steps of the record come out again, and its ends are those the README tells of."""
    bench("stability")
    from grid.cell import run
    from grid.faults import FAULTS
    from grid.patients import PATIENTS
    from grid.recipes import RECIPES

    cells = record("stability.json")["cells"].values()
    plain, guarded = (cell for cell in cells if "losses" in cell)
    assert (plain["recipe"], guarded["recipe"]) == ("before", "before, guarded")
    assert guarded["skipped"] == guarded["bad"] and len(guarded["bad"]) == 4
    assert guarded["verdict"] == "equal"
    infeasible, nan = guarded["bad"][1:3]
    assert None not in plain["losses"][:infeasible]
    assert set(plain["losses"][infeasible:]) == {None}
    lost = [step for step, loss in enumerate(guarded["losses"]) if loss is None]
    assert lost == [infeasible, nan]
    first = dataclasses.replace(PATIENTS["deep, 200 steps"], steps=guarded["bad"][0] + 1)
    again = run(first, RECIPES["before, guarded"], FAULTS["in turns"])
    assert again.skipped == guarded["skipped"][:1]
    assert again.losses[:10] == pytest.approx(guarded["losses"][:10], rel=0.01)


def test_each_picture_is_drawn_and_shown(bench, tmp_path, monkeypatch):
    plots = bench("plots")
    monkeypatch.setattr("sys.argv", ["plots.py", "--output", str(tmp_path)])
    plots.main()
    drawn = {path.name for path in tmp_path.glob("*.svg")}
    assert drawn == {f"{name}.svg" for name in plots.PICTURES}
    assert drawn == {path.name for path in (ROOT / "docs" / "assets").iterdir()}
    for name in drawn:
        assert re.search(rf"assets/{name}[)\"]", README + BENCHMARKS + WHY), name
