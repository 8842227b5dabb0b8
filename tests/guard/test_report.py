"""What a bad step leaves behind: names, places, the finite_ranges, and one JSON file."""

import json
import math
import pickle

import pytest
import torch
from torch import nn

import fastguard
from fastguard import GradGuard, GradientExplosionError, StepReport, Verdict
from fastguard.guard import report as step_report
from fastguard.guard import report_files as bad_steps
from fastguard.guard.report import NonfiniteParameter

from .test_grad_guard import small_model, train_step


def deep():
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(3, 3, bias=False) for _ in range(5)])


def bad_step(model, optimizer, guard, scaler=None, **kwargs):
    """A fault between the third and the fourth layer, as a broken kernel there would be."""
    optimizer.zero_grad()
    hidden = model[2](model[1](model[0](torch.ones(2, 3))))
    hidden.register_hook(lambda grad: grad.index_fill(1, torch.tensor([1]), math.nan))
    loss = model[4](model[3](hidden)).sum()
    (loss if scaler is None else scaler.scale(loss)).backward()
    return guard.step(optimizer, scaler=scaler, **kwargs)


def test_the_bracket_shows_between_which_parameters_the_fault_lies():
    model = deep()
    report = bad_step(model, torch.optim.SGD(model.parameters(), lr=0.1), GradGuard(model))
    assert report.nonfinite == ("0.weight", "1.weight", "2.weight")
    assert report.finite_ranges == ((False, "0.weight", "2.weight"), (True, "3.weight", "4.weight"))
    assert report.first_nonfinite == "0.weight[0]"
    assert report.nonfinite_parameters[2] == NonfiniteParameter(
        "2.weight", nans=3, infs=0, first_index=3
    )
    norms = report.norms()
    assert math.isnan(norms["2.weight"])
    assert norms["3.weight"] == pytest.approx(model[3].weight.grad.double().norm().item())


def test_nan_and_inf_are_told_apart():
    weight, bias = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([1.0, math.inf, -math.inf])
    bias.grad = torch.tensor([math.nan, math.inf])
    guard = GradGuard([("weight", weight), ("bias", bias)])
    report = guard.step(torch.optim.SGD([weight, bias], lr=1.0))
    assert [(str(o), o.kind) for o in report.nonfinite_parameters] == [
        ("weight[1]", "Inf"),
        ("bias[0]", "NaN and Inf"),
    ]


def test_good_steps_materialise_nothing(monkeypatch, tmp_path):
    looked = []
    monkeypatch.setattr(step_report.PendingReport, "_nonfinite", lambda self: looked.append(1))
    model = small_model()
    guard = GradGuard(model, report_dir=tmp_path / "run")
    optimizer = fastguard.AdamW(model.parameters())
    assert (
        train_step(model, optimizer, guard, torch.randn(6, 4)).result().nonfinite_parameters == ()
    )
    assert not looked
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_one_file_for_a_bad_step(tmp_path, scale):
    model = deep()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = GradGuard(model, report_dir=tmp_path / "run")
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    bad_step(model, optimizer, guard, scaler, batch_id="a, b")
    (file,) = (tmp_path / "run").iterdir()
    assert file.name == "bad_step_000000.json"
    found = json.loads(file.read_text(), parse_constant=pytest.fail)  # strict JSON: no NaN
    assert found["verdict"] == "skip_nonfinite"
    assert found["batch_id"] == "a, b"
    assert found["total_norm"] == "nan"
    offender = {"name": "0.weight", "nans": 9, "infs": 0, "first_index": 0, "kind": "NaN"}
    assert found["nonfinite_parameters"][0] == offender
    assert found["finite_ranges"] == [
        {"finite": False, "first": "0.weight", "last": "2.weight"},
        {"finite": True, "first": "3.weight", "last": "4.weight"},
    ]
    assert found["skip_norm"] == "inf"
    norm = model[4].weight.grad.double().norm().item() / scale
    assert found["norms"]["4.weight"] == pytest.approx(norm)
    assert list(found["norms"]) == [f"{i}.weight" for i in range(5)]


def test_quarantined_micro_batches_are_in_the_file(tmp_path):
    weight = nn.Parameter(torch.zeros(2))
    guard = GradGuard([("weight", weight)], report_dir=tmp_path)
    for value in (1.0, math.inf, 2.0):
        weight.grad = torch.tensor([value, 0.0])
        guard.accumulate(batch_id=f"utterance {value}")
    assert not guard.step(torch.optim.SGD([weight], lr=1.0)).skipped
    found = json.loads((tmp_path / "bad_step_000000.json").read_text())
    assert found["verdict"] == "clip"
    assert [q["batch_id"] for q in found["skipped_micro_batches"]] == ["utterance inf"]
    assert found["skipped_micro_batches"][0]["nonfinite_parameters"][0]["infs"] == 1


def test_a_folder_that_can_not_be_written_costs_a_warning(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    weight = nn.Parameter(torch.zeros(2))
    guard = GradGuard([weight], report_dir=tmp_path / "file")
    weight.grad = torch.full((2,), math.nan)
    assert guard.step(torch.optim.SGD([weight], lr=1.0)).skipped
    assert "No report on step 0" in caplog.text


def test_the_files_have_an_end(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(bad_steps, "_MAX_FILES", 3)
    weight = nn.Parameter(torch.zeros(2))
    guard = GradGuard([weight], report_dir=tmp_path)
    for _ in range(5):
        weight.grad = torch.full((2,), math.nan)
        guard.step(torch.optim.SGD([weight], lr=1.0))
    assert len(list(tmp_path.iterdir())) == 3
    assert "3 bad steps were written" in caplog.text


def test_a_bad_loss_alone(caplog):
    """CTC's zero_infinity gives a finite gradient to an infinite loss."""
    weight = nn.Parameter(torch.ones(2))
    guard = GradGuard([weight], patience=2)
    optimizer = fastguard.AdamW([weight])
    with pytest.raises(GradientExplosionError, match="2 had a loss of inf"):
        for _ in range(2):
            weight.grad = torch.ones(2)
            guard.step(optimizer, loss=torch.tensor(math.inf), batch_id="x")
    assert weight.tolist() == [1.0, 1.0]
    assert "Infinite loss, skipping batch x (loss inf)" in caplog.text


def test_reports_as_plain_values_and_back():
    model = deep()
    pending = bad_step(
        model, torch.optim.SGD(model.parameters(), lr=0.1), GradGuard(model), loss=1.0, batch_id="b"
    )
    report = pending.result()
    assert repr(StepReport.from_dict(report.to_dict())) == repr(report)
    assert json.dumps(report.to_dict())
    assert repr(pickle.loads(pickle.dumps(report))) == repr(report)
    assert report.loss == 1.0
    assert report.verdict is Verdict.SKIP_NONFINITE


def test_the_error_says_what_was_wrong_with_the_micro_batches():
    weight = nn.Parameter(torch.zeros(2))
    guard = GradGuard([("weight", weight)], patience=2)
    with pytest.raises(GradientExplosionError) as caught:
        for step in range(2):
            for i in range(2):
                weight.grad = torch.tensor([1.0, math.nan])
                guard.accumulate(batch_id=f"{step}.{i}")
            guard.step(torch.optim.SGD([weight], lr=1.0))
    message = str(caught.value)
    assert "4 had a NaN or Inf gradient, first at weight[1] (NaN)" in message
    assert "batches: 0.0, 0.1, 1.0, 1.1" in message
    assert "skip_norm" not in message


def test_a_batch_id_may_be_anything(tmp_path):
    weight = nn.Parameter(torch.zeros(2))
    guard = GradGuard([weight], report_dir=tmp_path)
    for batch_id in (torch.ones(2, requires_grad=True) * 2, (i for i in range(3)), object()):
        weight.grad = torch.full((2,), math.nan)
        assert guard.step(torch.optim.SGD([weight], lr=1.0), batch_id=batch_id).batch is batch_id
    assert guard.state_dict()["budget"]["in_a_row"] == 3
    assert len(list(tmp_path.iterdir())) == 3


def test_a_norm_that_moments_can_not_hold_is_called_that(caplog):
    weight = nn.Parameter(torch.zeros(2))
    guard = GradGuard([weight], max_norm=math.inf, patience=1)
    weight.grad = torch.full((2,), 1e19)
    with pytest.raises(
        GradientExplosionError, match=r"above 1e\+18.*\n(.*\n)*.*set a finite max_norm"
    ):
        guard.step(fastguard.AdamW([weight]))


def spiky(tmp_path=None, **options):
    """A guard of three layers whose norms have been 0.8, 2 and 1 for 40 steps, and its step."""
    layers = [(f"layer{i}.weight", nn.Parameter(torch.zeros(4))) for i in range(3)]
    guard = GradGuard(layers, skip_norm=10.0, report_dir=tmp_path, **options)
    optimizer = fastguard.AdamW([p for _, p in layers])

    def step(*norms, batch_id=None):
        for (_, p), norm in zip(layers, norms, strict=True):
            p.grad = torch.full((4,), norm / 2)
        return guard.step(optimizer, batch_id=batch_id)

    for _ in range(40):
        assert step(0.8, 2.0, 1.0).most_risen == ()
    return guard, step


def test_a_finite_spike_names_what_rose_and_since_when(tmp_path, caplog):
    _, step = spiky(tmp_path, patience=3)
    report = step(120.0, 2.0, 50.0, batch_id="b7")
    assert [(r.name, r.since_step) for r in report.most_risen] == [
        ("layer0.weight", 40),
        ("layer2.weight", 40),
    ]
    assert report.most_risen[0].norm == pytest.approx(120.0, rel=1e-5)
    assert report.most_risen[0].usual_norm == pytest.approx(0.8, rel=1e-5)
    assert caplog.messages[-1] == (
        "Large gradient norm: 130 at batch b7, skipping (skip_norm=10); risen most: layer0.weight "
        "120 (150 times its usual 0.8, since step 40), layer2.weight 50 (50 times its usual 1, "
        "since step 40)"
    )
    found = json.loads((tmp_path / "bad_step_000040.json").read_text())
    assert [r["name"] for r in found["most_risen"]] == ["layer0.weight", "layer2.weight"]
    assert found["most_risen"][0]["since_step"] == 40
    step(120.0, 2.0, 1.0)
    assert caplog.messages[-1].endswith("since step 40)")
    with pytest.raises(GradientExplosionError) as caught:
        step(120.0, 2.0, 1.0)
    for error in (caught.value, pickle.loads(pickle.dumps(caught.value))):
        assert (
            "  parameters that rose most: layer0.weight 120 (150 times its usual 0.8, since step "
            "40), layer2.weight 50 (50 times its usual 1, since step 40)\n" in str(error)
        )


def test_a_rise_that_was_clipped_before_it_was_an_outlier_began_then():
    _, step = spiky(patience=3)
    assert step(5.0, 2.0, 1.0).most_risen == ()  # clipped
    (risen,) = step(500.0, 2.0, 1.0).most_risen
    assert risen.since_step == 40


def test_where_nothing_rose_by_itself_nothing_is_named(caplog):
    """A first step has no usual norms."""
    weight = nn.Parameter(torch.zeros(2))
    guard = GradGuard([weight], max_norm=math.inf, patience=1)
    weight.grad = torch.full((2,), 1e19)
    with pytest.raises(GradientExplosionError) as caught:
        guard.step(fastguard.AdamW([weight]))
    assert "rose" not in str(caught.value)
    assert "risen" not in caplog.text


def test_risen_parameters_as_plain_values_and_back():
    _, step = spiky()
    report = step(120.0, 2.0, 50.0).result()
    values = json.loads(json.dumps(report.to_dict()))
    assert StepReport.from_dict(values).most_risen == report.most_risen
    del values["most_risen"], values["outlier_above"]
    assert StepReport.from_dict(values).most_risen == ()
