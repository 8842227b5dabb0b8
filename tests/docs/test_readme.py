"""What the README says of the guard runs, and does what it says."""

import math
import statistics
import types

import torch
from torch import nn

import fastguard
from fastguard import GradientExplosionError

from .blocks import ROOT, find, run_block


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


def side_of_the_diff(sign):
    """The loop before ("-") or after ("+") the change."""
    lines = find("quick-start").code.splitlines()
    assert all(line[:1] in ("", " ", "+", "-") for line in lines)
    return "\n".join(line[1:] for line in lines if line[:1] in ("", " ", sign))


def run_loop(sign, **more):
    here = names(**more)
    exec(side_of_the_diff(sign), here)
    return here


def parameters(here):
    return list(here["model"].parameters())


def test_quick_start_survives_what_ends_the_plain_loop():
    ours = run_loop("+", loader=batches(20, bad=[3, 19]))
    assert ours["report"].skipped
    assert ours["report"].batch_id == "batch 19"
    assert all(p.isfinite().all() for p in ours["model"].state_dict().values())
    plain = run_loop("-", loader=batches(20, bad=[3, 19]))
    assert not any(p.isfinite().all() for p in parameters(plain))


def test_quick_start_clips_as_the_plain_loop():
    ours, plain = (run_loop(sign, loader=batches(20)) for sign in "+-")
    for (name, a), b in zip(ours["model"].named_parameters(), parameters(plain), strict=True):
        if name != "0.bias":  # of rounding noise alone: BatchNorm takes it out
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_what_it_is_equivalent_to():
    """The block beside torch's AdamW, against the quick start beside fastguard's."""
    given = 40, [2, 7, 20], [10, 30]  # a spike is an outlier once 16 norms were seen
    ours = run_loop("+", loader=batches(*given))
    plain = names(seen_norms=[], skips=[], patience=25, max_norm=0.5, skip_norm=10.0)
    optimizer = torch.optim.AdamW(plain["model"].parameters(), lr=1e-3)

    def restore(buffers):
        for buffer, saved in zip(buffers, good, strict=True):
            buffer.copy_(saved)

    plain |= {"optimizer": optimizer, "restore": restore, "math": math, "statistics": statistics}
    plain["GradientExplosionError"] = GradientExplosionError
    for batch in batches(*given):
        good = [b.clone() for b in plain["model"].buffers()]
        optimizer.zero_grad()
        loss(plain["model"], batch).backward()
        with torch.no_grad():
            run_block("equivalent", plain)
    assert len(plain["seen_norms"]) == 37
    assert [i for i, skip in enumerate(plain["skips"]) if skip] == [2, 7, 20, 30]
    # What comes before the BatchNorm has a bias with gradients of rounding noise, which Adam blows
    # up; the rest agrees.
    for (name, a), b in zip(plain["model"].named_parameters(), parameters(ours), strict=True):
        if name != "0.bias":
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_attention(capsys):
    encoder = nn.TransformerEncoderLayer(8, 2)
    query, key, value = torch.randn(3, 2, 4, 7, 16)
    here = {
        "fastguard": fastguard,
        "model": encoder,
        "query": query,
        "key": key,
        "value": 99 * value,
    }
    run_block("attention-readme", here)
    assert here["output"].abs().max() == 10
    assert isinstance(encoder.self_attn, fastguard.ClampedMultiheadAttention)
    assert "self_attn" in capsys.readouterr().out


def test_it_has_at_most_200_lines():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200
