"""The blocks of the guides run, and do what the guides say."""

import math
import re

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

import fastguard
from fastguard import GradGuard, Rollback, thresholds
from tests.guard.test_grad_guard import everything
from tests.tensors import assert_same_bits

from .blocks import ROOT, printed, run_block
from .test_readme import batches, loss, model, names


def finite(here):
    return all(tensor.isfinite().all() for tensor in here["model"].state_dict().values())


def adamw(here):
    return fastguard.AdamW(here["model"].parameters())


@pytest.fixture
def group(tmp_path):
    """A process group of this process alone."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def test_mixed_precision():
    here = names(device="cpu", loader=batches(6, bad=[3]))
    here |= {"scaler": torch.amp.GradScaler("cpu", init_scale=1024.0)}
    here |= {"guard": GradGuard(here["model"]), "optimizer": adamw(here)}
    run_block("amp-step", here)
    assert finite(here)
    assert here["scaler"].get_scale() == 512


def test_master_weights(tmp_path):
    here = names(device="cpu", loader=batches(6, bad=[3]), path=tmp_path / "weights.pt")
    here |= {"nn": nn, "fastguard": fastguard, "GradGuard": GradGuard}
    run_block("master-weights", here)
    saved = torch.load(here["path"])
    assert finite(here) and all(w.dtype != torch.bfloat16 for w in saved.values())
    masters = [s["master_param"] for s in here["optimizer"].state.values() if "master_param" in s]
    assert masters and all(any(torch.equal(m, w) for w in saved.values()) for m in masters)


def test_accumulation():
    ends = []
    for bad in ([5], []):
        here = names()
        here["optimizer"] = adamw(here)
        here["guard"] = GradGuard(here["model"], max_norm=0.5)
        given = list(batches(12, bad))
        given = given if bad else given[:5] + given[6:]
        here["windows"] = [given[:3], given[3 : 6 - (not bad)], given[6 - (not bad) :]]
        run_block("accumulation", here)
        ends.append(everything(here["model"], here["optimizer"]))
    assert_same_bits(*ends)


def step_once(here, bad):
    (batch,) = batches(1, [0] if bad else [])
    loss(here["model"], batch).backward()
    return here["guard"].step(here["optimizer"])


def test_fsdp2(group):
    here = names(fastguard=fastguard, fully_shard=fully_shard)
    here["model"] = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    here["fully_shard"] = lambda module: fully_shard(module, mesh=mesh)
    run_block("fsdp2", here)
    assert step_once(here, bad=True).skipped


def test_ddp(group):
    here = names(fastguard=fastguard, nn=nn)
    run_block("ddp", here)
    assert isinstance(here["model"], nn.parallel.DistributedDataParallel)
    assert step_once(here, bad=True).skipped
    assert finite(here)


def test_rollback():
    here = names(GradGuard=GradGuard, Rollback=Rollback)
    here["optimizer"] = torch.optim.SGD(here["model"].parameters(), lr=0.1)
    here["scheduler"] = torch.optim.lr_scheduler.StepLR(here["optimizer"], 1)
    run_block("rollback", here)
    for batch in batches(30, bad=range(1, 26)):
        here["optimizer"].zero_grad()
        loss(here["model"], batch).backward()
        here["guard"].step(here["optimizer"])
    assert here["guard"].lr_factor == 0.5
    assert here["guard"].skip_batch()


def test_thresholds():
    here = names(GradGuard=GradGuard)
    run_block("thresholds", here)
    assert here["guard"].threshold == thresholds.ZClip(z=2.5)
    text = (ROOT / "docs" / "guides" / "thresholds.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)\(([\w, ]*)\)`", text, re.M))
    assert len(rows) == 5
    for name, options in rows.items():
        made = getattr(thresholds, name)()
        GradGuard(model(), threshold=made)
        assert all(hasattr(made, option) for option in options.split(", ") if option)


def test_reports(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    here = names(GradGuard=GradGuard)
    here["optimizer"] = adamw(here)
    (batch,) = batches(1, bad=[0])
    here["value"] = loss(here["model"], batch)
    here["value"].backward()
    run_block("reports", here)
    assert "batch utterance 17: SKIP_NONFINITE, first at 0.weight[0]" in capsys.readouterr().out
    assert (tmp_path / "runs" / "my" / "bad_step_000000.json").exists()
    text = (ROOT / "docs" / "guides" / "reports.md").read_text(encoding="utf-8")
    fields = re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`[^|]*)\|", text, re.M)))
    assert len(fields) >= 10
    assert [field for field in fields if not hasattr(here["report"], field)] == []


def test_several_optimizers():
    (batch,) = batches(1, bad=[0])
    here = names(fastguard=fastguard, GradGuard=GradGuard, batch=batch)
    before = [p.clone() for p in here["model"].parameters()]
    run_block("several-optimizers", here)
    assert here["guard"].last_report.skipped
    assert_same_bits(before, list(here["model"].parameters()))


def test_attach(caplog):
    here = names(GradGuard=GradGuard, device="cpu", loader=batches(6, bad=[2]))
    here["optimizer"] = torch.optim.AdamW(here["model"].parameters())
    here["scheduler"] = torch.optim.lr_scheduler.ExponentialLR(here["optimizer"], 0.95)
    here["scaler"] = torch.amp.GradScaler("cpu", init_scale=1024.0)
    run_block("attach", here)
    assert finite(here)
    assert len([r for r in caplog.records if "skipping batch" in r.message]) == 1
    assert here["scheduler"].last_epoch == 5


def test_clipping():
    here = names(fastguard=fastguard)
    weight = here["model"][0].weight
    weight.grad = torch.full_like(weight, 3.0)
    run_block("clipping", here)
    assert here["norm"] == 3 * math.sqrt(32)
    assert torch.linalg.vector_norm(weight.grad).item() == pytest.approx(1.0, rel=1e-5)


def test_attention_and_what_it_is_equivalent_to(monkeypatch):
    query, key, value = 3 * torch.randn(3, 2, 4, 7, 16)
    padding = torch.arange(7) >= torch.tensor([[7], [4]])
    encoder = nn.TransformerEncoderLayer(8, 2)
    here = {"model": encoder, "query": query, "key": key, "value": value, "padding": padding}
    run_block("attention", here)
    assert isinstance(encoder.self_attn, fastguard.ClampedMultiheadAttention)
    assert here["output"].shape == (2, 4, 7, 16)
    same = {"query": query, "key": key, "value": value, "key_padding_mask": padding}
    same |= {"scale": 0.25, "softcap": 20.0, "clamp": 1.0, "dropout_p": 0.0, "math": math}
    same["dropout"] = nn.functional.dropout
    run_block("attention-equivalent", same)
    ours = fastguard.clamped_attention(
        query, key, value, key_padding_mask=padding, softcap=20.0, clamp=1.0
    )
    torch.testing.assert_close(ours, same["output"])


def assert_prints(name, here, capsys):
    """The block prints what its document says: the same words, and numbers within 2 %."""
    run_block(name, here)
    found, expected = capsys.readouterr().out.split(), printed(name).split()
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        parts = [re.split(r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)", word) for word in (one, other)]
        assert parts[0][::2] == parts[1][::2]
        numbers = [[float(number) for number in part[1::2]] for part in parts]
        assert numbers[0] == pytest.approx(numbers[1], rel=0.02)


def test_diagnose_a_bad_input(capsys):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 1))
    x = torch.randn(16, 8)
    here = {"fastguard": fastguard, "math": math, "model": net, "x": x, "y": x.sum(1, keepdim=True)}
    here["criterion"] = nn.MSELoss()
    assert_prints("diagnose-readme", here, capsys)


def test_diagnose_an_explosion(capsys):
    torch.manual_seed(0)
    here = {"fastguard": fastguard, "nn": nn, "torch": torch, "criterion": nn.MSELoss()}
    here |= {"x": torch.randn(16, 64), "y": torch.randn(16, 64)}
    assert_prints("diagnose", here, capsys)
