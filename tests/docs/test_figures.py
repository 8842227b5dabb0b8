"""The figures of the README and of benchmarks.md are those of the records in docs/results."""

import importlib.util
import json
import re

import pytest

from .blocks import ROOT

RESULTS = ROOT / "docs" / "results"
README = (ROOT / "README.md").read_text(encoding="utf-8")
BENCHMARKS = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
CASE = "45 M fp32 in 600 tensors (300 matrices, 300 vectors)"


def record(name):
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def row(command):
    """The figures of the README's table that this command prints."""
    (line,) = re.findall(rf"^\|(.*)\| `python bench/{command}` \|$", README, re.M)
    return [float(number) for number in re.findall(r"(\d+\.\d+)", line)]


def test_the_guarded_step():
    seconds = record("optimizer_step_cpu.json")["step"][CASE]["seconds"]
    ours = 1e3 * seconds["guard.step(fastguard.AdamW)"]
    torchs = 1e3 * seconds["clip_grad_norm_ + AdamW(fused=True)"]
    assert row("optimizer_step.py") == [round(ours, 1), round(torchs, 1)]
    plain = 1e3 * seconds["clip_grad_norm_ + AdamW()"]
    ratios = f"is {torchs / ours:.1f}x faster than `clip_grad_norm_` with torch's fused AdamW, and "
    assert f"{ratios}{plain / ours:.1f}x faster than with the default" in " ".join(
        BENCHMARKS.split()
    )


def test_the_norm():
    seconds = record("norm_kernel_cpu.json")["cases"][CASE]
    floor = min(seconds["plain read: sum"], seconds["plain read: dot"])
    ours = seconds["fastguard.ops.grad_norm"]
    torchs = seconds["torch clip_grad_norm_"]
    expected = [round(1e3 * ours, 1), round(ours / floor, 2), round(1e3 * torchs, 1)]
    assert row("norm_kernel.py") == expected


def test_attention():
    times = record("attention_kernel_cpu.json")["kernels"]["fp32, T=500, dropout 0.1"]
    ours, torchs = times["ours"]["both"], times["SDPA"]["both"]
    assert row("attention_kernel.py") == [round(1e3 * ours, 1), round(1e3 * torchs, 1)]


def test_tables_of_steps_are_those_of_the_record():
    for name, seconds in record("optimizer_step_cpu.json")["step"][CASE]["seconds"].items():
        assert re.search(rf"^{re.escape(name)} +{1e3 * seconds:.3f} ", BENCHMARKS, re.M), name
    for name, seconds in record("norm_kernel_cpu.json")["cases"][CASE].items():
        assert re.search(rf"^{re.escape(name)} +{1e3 * seconds:.3f} ", BENCHMARKS, re.M), name


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


def test_the_picture_says_what_happens(bench):
    """The first steps of the record come out again, and its ends are those the README tells of."""
    explosion, found = bench("explosion"), record("explosion.json")
    runs = found["runs"]
    assert runs["fastguard"]["skipped"] == sorted(found["loud"] + found["nan"])
    assert None not in runs["fastguard"]["loss"]
    ends = rf"^fastguard +{runs['fastguard']['loss'][-1]:.4f}  60, 120, 170, 240$"
    assert re.search(ends, BENCHMARKS, re.M)
    (nan,) = found["nan"]
    for name in ("AdamW", "clip_grad_norm_ + AdamW"):
        assert None not in runs[name]["loss"][:nan]
        assert set(runs[name]["loss"][nan:]) == {None}
    explosion.STEPS = found["loud"][0] + 1
    again = explosion.train(explosion.guarded)
    assert again["skipped"] == [found["loud"][0]]
    assert again["loss"][:10] == pytest.approx(runs["fastguard"]["loss"][:10], rel=0.01)


def test_each_picture_is_drawn_and_shown(bench, tmp_path, monkeypatch):
    plots = bench("plots")
    monkeypatch.setattr("sys.argv", ["plots.py", "--output", str(tmp_path)])
    plots.main()
    drawn = {path.name for path in tmp_path.glob("*.svg")}
    assert drawn == {f"{name}.svg" for name in plots.PICTURES}
    assert drawn == {path.name for path in (ROOT / "docs" / "assets").iterdir()}
    for name in drawn:
        assert f"assets/{name})" in README + BENCHMARKS
