from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fastguard.attention.module import ClampedMultiheadAttention
from fastguard.stable_init import stable_init_


class Everything(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(300, 200)
        self.bare = nn.Linear(300, 200, bias=False)
        self.convolutions = nn.ModuleList(
            conv(4, 6, 3) for conv in (nn.Conv1d, nn.Conv2d, nn.Conv3d)
        )
        self.untouched = nn.ModuleList(
            [nn.BatchNorm1d(5), nn.LayerNorm(5), nn.GroupNorm(1, 5), nn.Embedding(7, 5)]
        )
        self.attentions = nn.ModuleList(
            [
                nn.MultiheadAttention(96, 4),
                nn.MultiheadAttention(96, 4, kdim=80, vdim=70),
                nn.MultiheadAttention(96, 4, bias=False),
                ClampedMultiheadAttention(96, 4),
                ClampedMultiheadAttention(96, 4, bias=False),
            ]
        )
        for parameter in self.parameters():  # biases too, to see them reset
            parameter.data.uniform_(0.5, 1.0)


@pytest.fixture
def model() -> Everything:
    torch.manual_seed(0)
    return Everything()


def is_linear(name: str) -> bool:
    return name.startswith(("linear", "bare", "attentions"))


@pytest.mark.parametrize("linear_std", [0.001, 0.01])
def test_linear_and_attention_weights_are_gaussian_and_biases_zero(model, linear_std):
    assert stable_init_(model, linear_std=linear_std) is model
    for name, parameter in model.named_parameters():
        if not is_linear(name):
            continue
        if name.endswith("bias"):
            assert parameter.abs().max() == 0, name
        else:
            # 6,720 draws or more: 5 % and 0.06 std are beyond 5 standard errors.
            assert parameter.std().item() == pytest.approx(linear_std, rel=0.05), name
            assert abs(parameter.mean().item()) < 0.06 * linear_std, name
            within = (parameter.abs() < linear_std).float().mean().item()
            assert within == pytest.approx(0.683, abs=0.03), name
        assert parameter.requires_grad and parameter.is_leaf


def test_convolutions_are_scaled_and_the_rest_is_untouched(model):
    before = copy.deepcopy(model.state_dict())
    stable_init_(model, conv_scale=0.5)
    others = [name for name in before if not is_linear(name)]
    assert len(others) > 10
    for name in others:
        scale = 0.5 if name.startswith("convolutions") and name.endswith("weight") else 1
        assert torch.equal(model.state_dict()[name], before[name] * scale), name


def test_draws_follow_the_global_seed(model):
    def weight(seed):
        torch.manual_seed(seed)
        return stable_init_(model).linear.weight.clone()

    assert torch.equal(weight(1), weight(1))
    assert not torch.equal(weight(1), weight(2))


@pytest.mark.parametrize("argument", ["linear_std", "conv_scale"])
@pytest.mark.parametrize("number", [-0.1, float("nan"), float("inf")])
def test_impossible_numbers_are_refused_before_anything_changes(model, argument, number):
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=f"{argument} must be finite and >= 0, got {number}"):
        stable_init_(model, **{argument: number})
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
