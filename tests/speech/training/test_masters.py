"""Runs in bfloat16 hold weights of bfloat16, and give the bits of runs that hold float32."""

import pytest
import torch

from fastguard.speech.models import build_model
from fastguard.speech.storage import checkpoint
from fastguard.speech.training import stepper
from fastguard.speech.training.precision import autocast, narrow_
from tests.recordings import tones
from tests.tensors import assert_same_bits, bits

from .test_train import losses, train

OPTIONS = ("--stable", "--precision", "bf16", "--epochs", "2")
SMALL = {"baseline": {"channels": 24, "num_layers": 2}, "teacher": {"d_model": 24, "num_blocks": 2}}


def tensors_of(state):
    """Name -> tensor, of all that a step reads or changes."""
    found = {f"model.{name}": value for name, value in state["model"].items()}
    found |= {f"ema.{name}": value for name, value in (state.get("ema") or {}).items()}
    for number, entries in state.get("optimizer", {"state": {}})["state"].items():
        found |= {f"{number}.{name}": value for name, value in entries.items()}
    return found


def assert_same_state(one, other):
    """Check that two checkpoints hold the same tensors."""
    these, those = tensors_of(checkpoint.load(one)), tensors_of(checkpoint.load(other))
    assert these.keys() == those.keys()
    assert_same_bits(bits(these.values()), bits(those[name] for name in these))


@pytest.mark.parametrize("model", SMALL)
@pytest.mark.parametrize("training", [True, False])
def test_narrow_weights_compute_what_autocast_does(model, training):
    torch.manual_seed(0)
    wide = (
        build_model(model, vocab_size=5, num_heads=2, **SMALL[model])
        if model == "teacher"
        else (build_model(model, vocab_size=5, **SMALL[model]))
    )
    narrow = build_model(model, **wide.config.__dict__)
    narrow.load_state_dict(wide.state_dict())
    narrow_(narrow)
    features, lengths = torch.randn(2, 40, 80), torch.tensor([40, 23])
    outputs = []
    for each in (wide, narrow):
        torch.manual_seed(1)
        each.train(training)
        with autocast(torch.device("cpu"), "bf16"):
            log_probs, _ = each(features, lengths)
        (log_probs * torch.linspace(-1, 1, log_probs.numel()).view_as(log_probs)).sum().backward()
        outputs.append(log_probs)
    assert torch.equal(*outputs)
    dtypes = {name: p.dtype for name, p in narrow.named_parameters()}
    assert dtypes["head.weight"] == dtypes["subsampling.conv1.weight"] == torch.bfloat16
    assert dtypes["subsampling.norm1.weight"] == torch.float32
    for p, q in zip(wide.parameters(), narrow.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad.float())


@pytest.mark.parametrize(
    "options", [("--model", "baseline"), ("--model", "teacher", "--ema", "0.9")]
)
def test_the_run_is_that_of_float32_weights(tmp_path, monkeypatch, options):
    data = tones(tmp_path)
    assert train(tmp_path / "masters", data, *OPTIONS, *options) == 0
    monkeypatch.setattr(stepper, "keeps_masters", lambda *args: False)
    assert train(tmp_path / "float32", data, *OPTIONS, *options) == 0
    assert losses(tmp_path / "masters") == losses(tmp_path / "float32")
    for name in ("last.pt", "best.pt"):
        assert_same_state(tmp_path / "masters" / name, tmp_path / "float32" / name)


def test_only_runs_that_gain_hold_narrow_weights(make):
    def dtypes(*options):
        return {p.dtype for p in make(*options).learner.model.parameters()}

    assert dtypes("--stable", "--precision", "bf16") == {torch.float32, torch.bfloat16}
    for options in (
        ("--stable", "--precision", "fp32"),
        ("--stable", "--precision", "fp16"),
        ("--stable", "--precision", "bf16", "--grad-accumulation", "2"),
        ("--precision", "bf16", "--guard.enabled", "false"),
    ):
        assert dtypes(*options) == {torch.float32}


@pytest.mark.parametrize("before, after", [("bf16", "fp32"), ("fp32", "bf16")])
def test_a_run_goes_on_in_another_precision(make, tmp_path, before, after):
    data = tones(tmp_path)
    assert train(tmp_path / "first", data, "--stable", "--precision", before, "--epochs", "1") == 0
    kept = checkpoint.load(tmp_path / "first" / "last.pt")
    assert {w.dtype for w in kept["model"].values()} == {torch.float32, torch.int64}
    names = {name for entries in kept["optimizer"]["state"].values() for name in entries}
    assert names == {"step", "exp_avg", "exp_avg_sq"}
    resumed = make("--stable", "--precision", after, "--resume", str(tmp_path / "first"), data=data)
    assert after in resumed.config.precision
    torch.save(resumed.state.collect(), tmp_path / "collected.pt")
    assert_same_state(tmp_path / "first" / "last.pt", tmp_path / "collected.pt")
