"""Weights that have grown, and learning rates that make them grow."""

import math

import pytest
import torch
from torch import nn

from fastguard import diagnose
from fastguard.diagnose.weight_rules import grown_parameters


class Zoo(nn.Module):
    """A layer of each kind whose weights are usually of different sizes."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(50, 4096)
        self.down = nn.Linear(4096, 64)
        self.norm = nn.LayerNorm(64)
        self.conv = nn.Conv1d(64, 64, 3, padding=1)
        self.depthwise = nn.Conv1d(64, 64, 3, padding=1, groups=64)
        self.batch_norm = nn.BatchNorm1d(64)
        self.up = nn.ConvTranspose1d(64, 64, 2, stride=2)
        self.lstm = nn.LSTM(64, 32, batch_first=True)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.query = nn.Parameter(torch.randn(1, 5, 32))
        self.gate = nn.Parameter(torch.zeros(32))

    def forward(self, tokens):
        x = self.norm(self.down(self.table(tokens))).transpose(1, 2)
        x = self.up(self.batch_norm(self.depthwise(self.conv(x)))).transpose(1, 2)
        x, _ = self.lstm(x)
        query = self.query.expand(len(x), -1, -1)
        return (self.attention(query, x, x, need_weights=False)[0] * self.gate.exp()).mean()


def zoo():
    torch.manual_seed(0)
    return Zoo(), torch.randint(50, (4, 9))


WEIGHTS = [name for name, p in Zoo().named_parameters() if "bias" not in name and name != "gate"]


def test_new_weights_are_well():
    model, tokens = zoo()
    assert grown_parameters(model) == []
    assert diagnose(model, lambda: model(tokens), learning_rate=1e-3).healthy


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_tensor_and_an_element_that_have_grown(name):
    model, tokens = zoo()
    weight = dict(model.named_parameters())[name].data
    kept = weight.clone()
    weight.mul_(1e4)
    finding = diagnose(model, lambda: model(tokens)).findings[0]
    assert (finding.kind, finding.where) == ("weight growth", name)
    assert finding.what.startswith("its root mean square is ")
    weight.copy_(kept)
    index = int(weight.abs().argmax())
    weight.view(-1)[index] *= 1e4
    found = diagnose(model, lambda: model(tokens))
    assert found.verdict.startswith(f"Verdict: weight growth at {name}: its element {index} has ")
    (grown,) = found.to_dict()["findings"][0]["evidence"]["parameters"]
    assert (grown["name"], grown["element"]) == (name, index)
    assert grown["largest"] == pytest.approx(1e4 * float(kept.view(-1)[index].abs()))
    weight.copy_(kept)
    assert grown_parameters(model) == []


def test_the_cause_comes_before_what_it_causes_and_the_most_grown_first():
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(5)))
    with torch.no_grad():
        for i, layer in enumerate(model):
            layer.weight.mul_(1e9 * (1 + (i == 2)))
    found = diagnose(model, lambda: model(torch.ones(3, 16)).mean())
    assert [f.kind for f in found.findings][:2] == ["weight growth", "overflow"]
    assert found.findings[0].where == "2.weight"
    assert "5 of 10 parameters have grown" in found.verdict


@pytest.mark.parametrize(
    ("weight", "grown"),
    [
        (torch.zeros(8, 8), False),
        (torch.tensor([[1e4, 0.0, 0.0, 0.0]]), True),  # too large as a whole
        (torch.tensor([[3.0, 1e-9, 1e-9, 1e-9]]), False),  # alone, but of a usual size
        (torch.full((8, 8), math.nan), False),  # poisoned, which is another finding
        (torch.tensor([[math.inf, 0.1, 0.1, 0.1]]), False),
        (torch.empty(0, 4), False),
        (torch.full((4, 4), 1e300, dtype=torch.float64), True),
        (torch.full((4, 4), 6e4, dtype=torch.float16), True),
    ],
)
def test_weights_at_the_edges(weight, grown):
    layer = nn.Linear(1, 1, bias=False)
    layer.weight = nn.Parameter(weight)
    assert [g.name for g in grown_parameters(layer)] == ["weight"] * grown


def test_a_shared_weight_is_named_once():
    model = nn.ModuleDict({"table": nn.Embedding(10, 16), "head": nn.Linear(16, 10, bias=False)})
    model["head"].weight = model["table"].weight
    assert grown_parameters(model) == []  # of the size of an embedding, 4 times that of a matrix
    with torch.no_grad():
        model["head"].weight.mul_(1e4)
    assert [g.name for g in grown_parameters(model)] == ["table.weight"]


@pytest.mark.parametrize(
    ("rate", "found"),
    [
        (None, False),
        (0.0, False),
        (1e-2, False),
        (0.12, False),
        (0.13, True),
        (3, True),
        (1e20, True),
    ],
)
def test_a_rate_above_the_size_of_the_weights(rate, found):
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))  # 1 / sqrt(64) = 0.125
    result = diagnose(model, lambda: model(torch.ones(3, 64)).mean(), learning_rate=rate)
    assert [f.kind for f in result.findings] == ["learning rate"] * found
    if found:
        assert result.verdict.startswith(
            f"Verdict: learning rate at optim.lr: {rate:.3g} is too large: Adam moves"
        )
        assert "lower optim.lr, to 1e-03 or less" in result.verdict


@pytest.mark.parametrize("rate", [math.nan, -1.0])
def test_a_rate_that_is_none(rate):
    model = nn.Linear(2, 1)
    with pytest.raises(ValueError, match=rf"learning_rate must be at least 0, got {rate}"):
        diagnose(model, lambda: model(torch.ones(1, 2)).mean(), learning_rate=rate)


def test_an_undefined_value_is_explained_by_the_rate():
    class Ratio(nn.Module):
        def forward(self, x):
            return (x - x) / (x - x)

    model = nn.Sequential(nn.Linear(4, 4), Ratio())
    x = torch.ones(2, 4)
    kinds = [f.kind for f in diagnose(model, lambda: model(x).mean()).findings]
    assert kinds == ["undefined value"]
    found = diagnose(model, lambda: model(x).mean(), learning_rate=3.0)
    assert [f.kind for f in found.findings] == ["learning rate"]


def test_the_verdict_comes_before_the_table():
    model = nn.Linear(4, 4)
    found = diagnose(model, lambda: model(torch.ones(2, 4)).mean())
    assert str(found) == f"{found.verdict}\n\n{found.table}"
    assert found.table.startswith("layer")
