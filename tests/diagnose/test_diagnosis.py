"""Planted faults are named; what is healthy is left in peace; nothing of the model changes."""

import math

import pytest
import torch
from torch import nn

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
    assert kinds(found)[:2] == ["weight growth", "overflow"]
    assert [finding.where for finding in found.findings[:2]] == ["1.weight", "1"]
    assert "fp16 overflow" in found.verdict
    assert "in float32 the same computation gives" in found.verdict
    assert "bf16" in found.findings[1].suggestion
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


def test_a_loss_scale_that_overflows_a_weights_gradient_under_autocast():
    """The weights are float32 and so is their gradient; the product overflows in fp16 before."""
    model = nn.Linear(6, 1)
    x = torch.full((64, 6), 2.0)

    def loss():
        with torch.autocast("cpu", torch.float16):
            return model(x).float().mean()

    assert diagnose(model, loss, loss_scale=1024.0).healthy
    found = diagnose(model, loss, loss_scale=65536.0)
    assert kinds(found) == ["gradient overflow"]
    assert "float16 overflow (at 6.55e+04)" in found.verdict
    assert not found.first_nonfinite_backward.entered


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
