"""What the diagnosis leaves alone: no false alarms, no changes, awkward models."""

import importlib
import inspect
import json
import math
import random
import subprocess
import sys

import numpy
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastguard import diagnose

from .test_diagnosis import layer, mlp, of

# --- no false alarms --------------------------------------------------------------------------


def test_masks_are_no_bad_inputs():
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 3)
    mask = nn.Transformer.generate_square_subsequent_mask(9)
    x = torch.randn(2, 9, 16)
    found = diagnose(model, lambda: model(x, mask=mask, is_causal=True).square().mean())
    assert found.first_nonfinite_forward is None
    assert found.findings == ()


def test_a_value_that_nothing_reads_is_a_note():
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 1)

        def forward(self, x):
            return self.linear(x)

    model, x = Root(), torch.randn(4, 6)
    x[3] = math.nan
    found = diagnose(model, lambda: model(x)[:3].sum())
    # The gradient by the weight multiplies NaN by zero; without it the NaN is harmless.
    assert not found.healthy
    model.linear.weight.requires_grad_(False)
    found = diagnose(model, lambda: model(x)[:3].sum())
    assert found.healthy
    assert [f.kind for f in found.findings] == ["undefined value"]


# --- nothing changes --------------------------------------------------------------------------


def state_of(model):
    return {
        "tensors": {k: v.clone() for k, v in model.state_dict().items()},
        "gradients": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "modes": [m.training for m in model.modules()],
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": numpy.random.get_state()[1].copy(),
        "hooks": [
            [*m._forward_hooks, *m._forward_pre_hooks, *m._backward_hooks] for m in model.modules()
        ],
    }


def assert_same(before, after):
    assert before["python"] == after["python"]
    for key in ("modes", "hooks"):
        assert before[key] == after[key]
    assert (before["numpy"] == after["numpy"]).all()
    torch.testing.assert_close(
        [before["tensors"], before["gradients"], before["torch"]],
        [after["tensors"], after["gradients"], after["torch"]],
        rtol=0,
        atol=0,
        equal_nan=True,
    )


@pytest.mark.parametrize("ending", ["well", "nan", "raises"])
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_everything_is_left_as_it_was(ending, reentrant):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.ReLU(inplace=True), nn.Linear(8, 1)
    )
    model[2].eval()
    model[4].weight.grad = torch.ones(1, 8)
    hooked = []
    model[4].bias.register_hook(lambda g: None)
    model[0].weight.register_post_accumulate_grad_hook(lambda p: hooked.append(p))
    x = torch.randn(4, 6)
    if ending == "nan":
        x[0] = math.nan
    parameters = [*model.parameters()]

    def loss():
        model.train()
        random.random(), numpy.random.rand()
        if ending == "raises":
            model(x)
            raise RuntimeError("mine")
        if reentrant is None:
            return model(x).square().mean()
        y = checkpoint(model[1:4], model[0](x), use_reentrant=reentrant)
        return model[4](y).square().mean()

    before = state_of(model)
    if ending == "raises":
        with pytest.raises(RuntimeError, match="mine"):
            diagnose(model, loss)
    else:
        with torch.no_grad():  # of the caller, who may be in evaluation
            found = diagnose(model, loss)
        assert found.healthy is (ending == "well"), found.verdict
        assert layer(found, "0").grad_norm is not None
        assert (layer(found, "3").gain is not None) is (ending == "well")
    assert_same(before, state_of(model))
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert bool(hooked) is (reentrant is True and ending != "raises")


def test_the_numbers_are_those_of_a_plain_step():
    model, x = mlp(), torch.randn(16, 6)
    found = of(model, x)
    again = of(model, x)
    loss = model(x).float().square().mean()
    loss.backward()
    norms = [p.grad.norm().item() for p in model.parameters()]
    assert found.loss == loss.item() == again.loss
    assert found.grad_norm == pytest.approx(math.hypot(*norms), rel=1e-6)
    assert layer(found, "0").grad_norm == pytest.approx(math.hypot(*norms[:2]), rel=1e-6)
    scaled = diagnose(model, lambda: model(x).square().mean(), loss_scale=1024.0)
    assert scaled.grad_norm == pytest.approx(found.grad_norm, rel=1e-5)


# --- awkward models ---------------------------------------------------------------------------


class Awkward(nn.Module):
    """Indices, dicts, tuples, a shared layer, one never called, recurrent and frozen parts."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 8, sparse=True)
        self.rnn = nn.LSTM(8, 8, batch_first=True)
        self.shared = nn.Linear(8, 8)
        self.alias = self.shared
        self.unused = nn.Linear(3, 3)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.act = nn.ReLU(inplace=True)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.parametrized = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
        self.register_buffer("mask", torch.full((3, 3), -math.inf).triu(1))

    def forward(self, batch, *, scale):
        x, (h, _) = self.rnn(self.embedding(batch["tokens"]))
        packed = nn.utils.rnn.pack_padded_sequence(x, batch["lengths"], batch_first=True)
        x, _ = nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0], batch_first=True)
        x = self.act(self.shared(self.alias(x)))
        with torch.no_grad():
            x = x + self.frozen(x)
        x = x + self.attention(x, x, x)[0]
        x = x + self.parametrized(x) * scale
        x[:, 0] += 1
        return {"x": x, "h": h, "text": "no tensor", "none": None}


def test_awkward_models_do_not_crash():
    torch.manual_seed(0)
    model = Awkward()
    batch = {"tokens": torch.randint(10, (2, 3)), "lengths": torch.tensor([3, 2])}
    found = diagnose(model, lambda: sum(v.square().mean() for v in values(model, batch)))
    assert found.healthy, found.verdict
    assert layer(found, "shared").calls == 2
    assert layer(found, "embedding").gain is None
    assert layer(found, "rnn").calls == 2
    assert "unused" not in [row.name for row in found.layers]
    assert "nan" not in str(found)
    order = [row.name for row in found.layers]
    assert order.index("embedding") < order.index("rnn") < order.index("act")
    json.dumps(found.to_dict(), allow_nan=False)


def values(model, batch):
    out = model(batch, scale=torch.tensor(0.5))
    return out["x"], out["h"]


def test_wrong_arguments():
    model = mlp()
    with pytest.raises(ValueError, match=r"scalar tensor, got \(4, 1\)"):
        diagnose(model, lambda: model(torch.randn(4, 6)))
    with pytest.raises(ValueError, match="called no module"):
        diagnose(nn.Linear(1, 1), lambda: model(torch.randn(4, 6)).mean())
    with pytest.raises(ValueError, match="loss_scale"):
        diagnose(model, lambda: model(torch.randn(4, 6)).mean(), loss_scale=0.0)


# --- the name ---------------------------------------------------------------------------------


def test_the_attribute_is_the_function_whatever_is_imported():
    import fastguard.diagnose
    from fastguard.speech.cli.diagnose import main

    assert inspect.isfunction(fastguard.diagnose)
    assert importlib.import_module("fastguard.diagnose").diagnose is fastguard.diagnose
    assert callable(main)


def test_the_command_runs_as_a_module_without_a_warning():
    command = [sys.executable, "-W", "error::RuntimeWarning", "-m", "fastguard.diagnose", "--help"]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "example" in ran.stdout.splitlines()[-3]
