"""Planted faults are named; what is healthy is left in peace; nothing of the model changes."""

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

from fastguard import ClampedMultiheadAttention, diagnose


def kinds(diagnosis):
    return [finding.kind for finding in diagnosis.findings if finding.fault]


def layer(diagnosis, name):
    return next(row for row in diagnosis.layers if row.name == name)


def orthogonal(width, gain):
    linear = nn.Linear(width, width)
    nn.init.orthogonal_(linear.weight, gain)
    return linear


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))


def of(model, x):
    return diagnose(model, lambda: model(x).float().square().mean())


# --- planted faults ---------------------------------------------------------------------------


def test_a_gain_of_one_and_a_half_fifty_times():
    model = nn.Sequential(*(orthogonal(16, 1.5) for _ in range(50)))
    found = diagnose(model, lambda: model(torch.randn(4, 16)).mean())
    assert kinds(found) == ["exploding gradient"]
    assert "1.5x per layer over 50 layers: 6.4e+08x" in found.verdict
    assert found.findings[0].where == "0 to 49 (Linear)"
    assert [row.gain for row in found.layers[1:]] == pytest.approx([1.5] * 49, rel=1e-4)


def test_the_same_layer_fifty_times():
    torch.manual_seed(0)
    cell = orthogonal(16, 1.5)

    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = cell

        def forward(self, x):
            for _ in range(50):
                x = self.cell(x)
            return x

    model = Recurrent()
    found = diagnose(model, lambda: model(torch.randn(4, 16)).mean())
    assert kinds(found) == ["exploding gradient"]
    assert found.findings[0].where == "cell (Linear)"
    assert (layer(found, "cell").calls, layer(found, "cell").gain) == (50, pytest.approx(1.5))


def test_residual_blocks_explode_through_their_skips_too():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = orthogonal(16, 1.0)

        def forward(self, x):
            return x + self.linear(x)  # about sqrt(2) times

    torch.manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(40)))
    found = diagnose(model, lambda: model(torch.randn(4, 16)).mean())
    assert kinds(found) == ["exploding gradient"]
    assert "(Block)" in found.findings[0].where
    assert layer(found, "3").gain == pytest.approx(math.sqrt(2), rel=0.2)
    assert layer(found, "3.linear").gain == pytest.approx(1.0, rel=1e-4)  # its branch alone


def test_a_growth_that_overflows_forward_and_backward():
    torch.manual_seed(0)
    model = nn.Sequential(*(orthogonal(16, 100.0) for _ in range(30)))
    found = of(model, torch.randn(4, 16))
    assert kinds(found) == ["overflow"]
    assert "float32 overflow" in found.verdict
    with torch.no_grad():
        for linear in model:
            linear.bias.zero_()
    found = diagnose(model, lambda: model(1e-30 * torch.randn(4, 16)).mean())
    assert kinds(found) == ["gradient overflow", "exploding gradient"]
    assert found.first_nonfinite_forward is None
    backward = found.first_nonfinite_backward
    assert not backward.entered
    assert backward.entering.largest > 1e36
    assert "100x per layer" in found.verdict


def test_a_gradient_that_vanishes():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.Sigmoid()) for _ in range(30)))
    found = of(model, torch.randn(8, 16))
    assert kinds(found) == ["vanishing gradient"]


def test_exploding_logits():
    torch.manual_seed(0)
    attention = ClampedMultiheadAttention(16, 2, batch_first=True)
    with torch.no_grad():
        attention.in_proj_weight[:32] *= 30  # queries and keys
    x = torch.randn(2, 9, 16)
    model = nn.ModuleDict({"attention": attention, "head": nn.Linear(16, 1)})

    def loss():
        return model["head"](attention(x, x, x, need_weights=False)[0]).square().mean()

    found = diagnose(model, loss)
    assert kinds(found) == ["exploding logits"]
    assert found.findings[0].where == "attention"
    assert layer(found, "attention").max_logit > 100
    assert layer(found, "attention").entropy < 1.0
    assert not attention.record_stats
    assert attention.stats is None


def test_clamped_attention():
    torch.manual_seed(0)
    model = ClampedMultiheadAttention(16, 2, batch_first=True, clamp=1e-3)
    x = torch.randn(2, 9, 16)
    found = diagnose(model, lambda: model(x, x, x, need_weights=False)[0].square().mean())
    assert "clamped attention" in kinds(found)
    assert found.layers[0].clamped_share > 0.9


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_input(bad):
    model, x = mlp(), torch.randn(4, 6)
    x[2, 3] = bad
    found = of(model, x)
    assert kinds(found) == ["bad input"]
    assert found.first_nonfinite_forward.kind == "input"
    assert "1.running_mean" in found.verdict  # what it would have destroyed


@pytest.mark.parametrize("name", ["3.weight", "1.running_var"])
def test_a_poisoned_weight_or_buffer(name):
    model = mlp()
    model.state_dict()[name].view(-1)[0] = math.nan
    found = of(model, torch.randn(4, 6))
    assert kinds(found) == ["poisoned weight"]
    assert found.findings[0].where == name


def test_a_value_that_is_undefined_in_a_module_and_between_two():
    class Root(nn.Module):
        def __init__(self, inside):
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 1)
            self.log = Log() if inside else None

        def forward(self, x):
            x = -self.first(x).abs()
            return self.second(self.log(x) if self.log else x.log())

    class Log(nn.Module):
        def forward(self, x):
            return x.log()

    x = torch.randn(4, 6)
    found = of(Root(inside=True), x)
    assert (kinds(found), found.findings[0].where) == (["undefined value"], "log")
    found = of(Root(inside=False), x)
    assert (kinds(found), found.findings[0].where) == (["undefined value"], "(model)")
    assert "before second" in found.findings[0].what


def half_linear():
    model = nn.Sequential(nn.Linear(6, 64), nn.Linear(64, 64), nn.Linear(64, 1))
    with torch.no_grad():
        model[0].weight.fill_(1)
        model[1].weight.fill_(3e4)
    return model


def test_fp16_overflow_and_that_it_is_none_in_fp32():
    torch.manual_seed(0)
    model, x = half_linear(), torch.rand(4, 6)

    def loss(dtype):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            return model(x).float().abs().sqrt().mean()

    found = diagnose(model, lambda: loss(torch.float16))
    assert found.findings[0].kind == "overflow"
    assert found.findings[0].where == "1"
    assert "fp16 overflow" in found.verdict
    assert "in float32 the same computation gives" in found.verdict
    assert "bf16" in found.findings[0].suggestion
    assert "overflow" not in kinds(diagnose(model, lambda: loss(torch.float32)))


def test_a_loss_scale_that_overflows_backward():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 1)).half()
    x = torch.randn(4, 6).half()

    def loss():
        return model(x).float().square().mean() + 1

    assert diagnose(model, loss).healthy
    found = diagnose(model, loss, loss_scale=1e6)
    assert kinds(found) == ["gradient overflow"]
    assert "loss scale is 1e+06" in found.verdict
    assert found.first_nonfinite_forward is None
    assert found.first_nonfinite_backward is not None


def test_an_undefined_gradient_of_a_finite_value():
    class Norm(nn.Module):
        def forward(self, x):
            return x.square().sum(-1).sqrt()

    model = nn.Sequential(nn.Linear(6, 6), Norm())
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.zero_()
    found = diagnose(model, lambda: model(torch.randn(4, 6)).mean())
    assert kinds(found) == ["undefined gradient"]
    assert found.findings[0].where == "1"
    assert not found.first_nonfinite_backward.entered


def test_a_loss_function_that_is_undefined():
    model = mlp()
    found = diagnose(model, lambda: model(torch.randn(4, 6)).mean() / 0)
    assert kinds(found)[0] == "undefined loss"


def test_batch_norm_without_variance():
    model = mlp()
    found = of(model, torch.ones(4, 6))
    assert kinds(found) == ["zero variance"]
    assert found.findings[0].where == "1"
    assert "8 of 8 channels" in found.verdict
    assert layer(found, "1").min_variance < 1e-12
    model = mlp().eval()
    model[1].running_var.zero_()
    found = of(model, torch.randn(4, 6))
    assert kinds(found) == ["zero variance"]
    assert "running_var" in found.verdict
    model[1].eps = 0.0  # an infinity now, of which the finding is the cause
    found = of(model, torch.randn(4, 6))
    assert found.first_nonfinite_forward.name == "1"
    assert kinds(found) == ["zero variance"]


def test_one_constant_channel_and_a_tiny_batch_are_notes():
    model = mlp()
    with torch.no_grad():
        model[0].weight[0] = 0
    found = of(model, torch.randn(4, 6))
    assert found.healthy
    assert [f.kind for f in found.findings] == ["zero variance", "tiny batch"]
    assert "nothing wrong" in found.verdict


def test_dead_units():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 1))
    with torch.no_grad():
        model[0].bias[:15] = -100
    found = of(model, torch.randn(32, 6))
    assert kinds(found) == ["dead units"]
    assert layer(found, "1").dead_share == 0.75
    torch.manual_seed(0)
    with torch.no_grad():
        model[0].bias[:15] = 0
    assert of(model, torch.randn(32, 6)).healthy


def test_a_model_that_no_gradient_reaches():
    model = mlp()
    found = diagnose(model, lambda: model(torch.randn(4, 6)).detach().mean())
    assert kinds(found) == ["no gradient"]
    model.requires_grad_(False)
    assert kinds(of(model, torch.randn(4, 6))) == ["no gradient"]


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
    from fastguard.diagnose.__main__ import main

    assert inspect.isfunction(fastguard.diagnose)
    assert importlib.import_module("fastguard.diagnose").diagnose is fastguard.diagnose
    assert callable(main)


def test_the_command_runs_as_a_module_without_a_warning():
    command = [sys.executable, "-W", "error::RuntimeWarning", "-m", "fastguard.diagnose", "--help"]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "example" in ran.stdout.splitlines()[-3]
