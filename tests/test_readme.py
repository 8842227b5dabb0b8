"""What the README says of the guard runs, and does what it says."""

import math
import re
import statistics
import types
from pathlib import Path

import torch
from torch import nn

import fastguard
from fastguard import GradGuard, GradientExplosionError, thresholds
from tests.guard.test_grad_guard import everything
from tests.test_clip import assert_same_bits

README = (Path(__file__).parent.parent / "README.md").read_text()
SECTION = README[README.index("## The guard\n") : README.index("## The guard in other loops")]
BLOCKS = re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL)
THREE_LINES, EQUIVALENT, ACCUMULATION, DIAGNOSIS = BLOCKS


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))


def batches(n, bad=(), spikes=()):
    for i in range(n):
        x = torch.randn(6, 4, generator=torch.Generator().manual_seed(i))
        if i in bad:
            x[0, 0] = math.nan
        yield types.SimpleNamespace(id=f"batch {i}", x=x, weight=1e4 if i in spikes else 10)


def loss(model, batch):
    return batch.weight * model(batch.x).square().mean()


def names(**more):
    return {"model": model(), "loss": loss, "torch": torch} | more


def test_three_lines():
    here = names(loader=batches(20, bad=[3, 19]))
    exec(THREE_LINES, here)
    assert here["report"].skipped
    assert here["report"].batch_id == "batch 19"
    assert all(p.isfinite().all() for p in here["model"].parameters())


def test_diagnosis(capsys):
    x = torch.randn(6, 4)
    x[2, 3] = math.inf
    here = names(fastguard=fastguard, x=x, y=torch.randn(6, 1), criterion=nn.MSELoss())
    exec(DIAGNOSIS, here)
    assert "bad input" in capsys.readouterr().out


def test_what_it_is_equivalent_to():
    """The block beside torch's AdamW, against the three lines beside fastguard's."""
    given = 40, [2, 7, 20], [10, 30]  # a spike is an outlier once 16 norms were seen
    ours = names(loader=batches(*given))
    exec(THREE_LINES, ours)
    plain = names(seen_norms=[], skips=[], patience=25, max_norm=0.5, skip_norm=10.0)
    optimizer = torch.optim.AdamW(plain["model"].parameters(), lr=1e-3)

    def set_back(buffers):
        for buffer, saved in zip(buffers, good, strict=True):
            buffer.copy_(saved)

    plain |= {"optimizer": optimizer, "set_back": set_back, "math": math, "statistics": statistics}
    plain["GradientExplosionError"] = GradientExplosionError
    for batch in batches(*given):
        good = [b.clone() for b in plain["model"].buffers()]
        optimizer.zero_grad()
        loss(plain["model"], batch).backward()
        with torch.no_grad():
            exec(EQUIVALENT, plain)
    assert len(plain["seen_norms"]) == 37
    assert [i for i, skip in enumerate(plain["skips"]) if skip] == [2, 7, 20, 30]
    # What comes before the BatchNorm has a bias with gradients of rounding noise, which Adam blows
    # up; the rest agrees.
    for (name, a), b in zip(
        plain["model"].named_parameters(), ours["model"].parameters(), strict=True
    ):
        if name != "0.bias":
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_accumulation():
    ends = []
    for bad in ([5], []):
        here = names()
        here["optimizer"] = fastguard.AdamW(here["model"].parameters())
        here["guard"] = GradGuard(here["model"], max_norm=0.5)
        given = list(batches(12, bad))
        given = given if bad else given[:5] + given[6:]
        here["windows"] = [given[:3], given[3 : 6 - (not bad)], given[6 - (not bad) :]]
        exec(ACCUMULATION, here)
        ends.append(everything(here["model"], here["optimizer"]))
    assert_same_bits(*ends)


def test_the_thresholds_it_names():
    words = re.findall(r"(ZClip|RunningMedian|AutoClip|AdaGC)`", SECTION)
    assert len(set(words)) == 4
    for word in words:
        GradGuard(model(), threshold=getattr(thresholds, word)())


def test_the_files_it_names():
    paths = re.findall(r"`((?:tests|bench|fastguard|configs)/[\w/]+\.\w+)`", README)
    assert paths
    for path in paths:
        assert (Path(__file__).parent.parent / path).exists(), path


ATTENTION = README[README.index("## The attention") : README.index("## The trainer")]
CALLS, SAME = re.findall(r"```python\n(.*?)```", ATTENTION, re.DOTALL)


def test_attention_and_what_it_is_equivalent_to():
    query, key, value = 3 * torch.randn(3, 2, 4, 7, 16)
    padding = torch.arange(7) >= torch.tensor([[7], [4]])
    encoder = nn.TransformerEncoderLayer(8, 2)
    here = {"model": encoder, "query": query, "key": key, "value": value, "padding": padding}
    exec(CALLS.replace("dropout_p=0.1", "dropout_p=0.0"), here)
    assert isinstance(encoder.self_attn, fastguard.ClampedMultiheadAttention)
    same = {"query": query, "key": key, "value": value, "key_padding_mask": padding}
    same |= {"scale": 0.25, "softcap": None, "clamp": 10.0, "dropout_p": 0.0, "math": math}
    same["dropout"] = nn.functional.dropout
    exec(SAME, same)
    torch.testing.assert_close(here["output"], same["output"])
