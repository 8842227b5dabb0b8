"""Helpers for the cases of several ranks: a network, its shards, its batches."""

import math
from pathlib import Path

import pytest
import torch
from torch import distributed, nn

import fastguard
from fastguard import GradGuard, Verdict

ROOT = Path(__file__).parents[2]
BAD = {17: "outlier", 18: "nan", 20: "loss", 21: "inf"}
STEPS = 23


# --- networks and batches -----------------------------------------------------------------------


class Net(nn.Module):
    """A network with uneven shards. With 2 ranks, one has no part of ``head.weight``."""

    def __init__(self, norm=nn.LayerNorm, width=8):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, width), norm(width))
        self.head = nn.Linear(width, 1)
        self.plain = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return self.head(self.body(x)).sum(1) * self.plain.sum()


def mesh_of(*shape):
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])


def shard(net, mesh):
    from torch.distributed.fsdp import fully_shard

    fully_shard(net.body, mesh=mesh)
    fully_shard(net, mesh=mesh, ignored_params={net.plain})
    return net


def local(tensor):
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def full(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def bits(net, optimizer):
    """All values of this rank that a skip must not change."""
    tensors = [*net.parameters(), *net.buffers()]
    for state in optimizer.state.values():
        tensors += [state[name] for name in sorted(state)]
    return [local(t.detach()).clone().contiguous().view(torch.uint8) for t in map(flat, tensors)]


def flat(tensor):
    return local(tensor.detach()).reshape(-1)


def same(before, after):
    return all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def batch_of(step, rows=8):
    return torch.randn(rows, 5, generator=torch.Generator().manual_seed(step))


def mine(batch):
    return batch.chunk(distributed.get_world_size())[distributed.get_rank()]


def backward(net, batch, factor=1.0):
    loss = net(batch).square().mean() * factor
    loss.backward()
    if hasattr(net.head.weight, "to_local"):  # the user must add up parameters that FSDP ignores
        distributed.all_reduce(net.plain.grad)
        net.plain.grad /= distributed.get_world_size()
    return loss.detach()


OPTIMIZERS = {
    "fastguard": lambda p: fastguard.AdamW(p, lr=1e-2),
    "amsgrad": lambda p: fastguard.Adam(groups(p), lr=1e-2, weight_decay=0.1, amsgrad=True),
    "grouped": lambda p: fastguard.AdamW(groups(p), lr=1e-2),
    "masters": lambda p: fastguard.AdamW(p, lr=1e-2, master_weights=True),
    "fused": lambda p: torch.optim.AdamW(groups(p), lr=1e-2, fused=True),
    "foreach": lambda p: torch.optim.AdamW(groups(p), lr=1e-2),
}


def groups(parameters):
    """Groups of tensors and of DTensors: torch's step takes no group with both."""
    *others, plain = sorted(parameters, key=lambda p: p.shape == (3,))
    return [{"params": others}, {"params": [plain]}]


def follow(net, name, *, sharded, **options):
    """A run through clipped, good and bad steps of all kinds.

    Returns the reports, and whether the skipped steps changed nothing.
    """
    optimizer = OPTIMIZERS[name](net.parameters())
    guard = GradGuard(net, max_norm=2.0, skip_norm=1e4, **options)
    last = distributed.get_rank() == distributed.get_world_size() - 1
    reports = []
    for step in range(STEPS):
        kind = BAD.get(step)
        optimizer.zero_grad()
        factor = {"outlier": 1e6, None: 30.0 if step % 3 == 0 else 0.01}.get(kind, 1.0)
        batch = batch_of(step).to(net.plain.dtype)
        loss = backward(net, mine(batch) if sharded else batch, factor)
        if kind in ("nan", "inf") and (last or not sharded):
            flat(net.body[0].weight.grad)[-2] = math.nan if kind == "nan" else -math.inf
        if kind == "loss" and (last or not sharded):
            loss = math.nan
        before = bits(net, optimizer)
        report = guard.step(optimizer, loss=loss, batch_id=step).result()
        assert report.skipped == (kind is not None), report
        assert same(before, bits(net, optimizer)) == report.skipped
        reports.append(report)
    return reports, optimizer


def compare_to_one_process(mesh, name, **options):
    alone, net = Net(), shard(Net(), mesh)
    expected, expected_optimizer = follow(alone, name, sharded=False, **options)
    reports, optimizer = follow(net, name, sharded=True, **options)
    assert [r.verdict for r in reports] == [r.verdict for r in expected]
    assert {r.verdict for r in reports} >= {*list(Verdict)[:4]}
    for report, other in zip(reports, expected, strict=True):
        assert report.total_norm == pytest.approx(other.total_norm, rel=1e-4, nan_ok=True)
        assert report.loss == pytest.approx(other.loss, rel=1e-4, nan_ok=True)
        assert report.nonfinite == other.nonfinite and report.finite_ranges == other.finite_ranges
        assert [o.nans + o.infs for o in report.nonfinite_parameters] == [
            1 for _ in other.nonfinite_parameters
        ]
    for p, q in zip(net.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(full(p.detach()), q.detach(), rtol=1e-4, atol=1e-5)
        for key, entry in expected_optimizer.state[q].items():
            found = optimizer.state[p][key]
            assert type(found) is (torch.Tensor if key == "step" else type(p.data)), key
            torch.testing.assert_close(full(found), entry, rtol=1e-3, atol=1e-4)
    return [(r.verdict, r.total_norm.hex(), r.clip_coef.hex(), r.loss.hex()) for r in reports]
