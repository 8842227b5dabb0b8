"""The guard where processes train together (gloo): FSDP2's shards, replicas of DDP.

A case is a function below that runs on every rank of one spawn, one case after the other. It
returns what must be equal on all of them.
"""

import contextlib
import datetime
import functools
import json
import math
import subprocess
import sys
import tempfile
import threading
import traceback
from pathlib import Path

import pytest
import torch
from torch import distributed, nn

import fastguard
from fastguard import GradGuard, Rollback, Verdict
from fastguard.guard import distributed as sharded
from fastguard.thresholds import AdaGC

ROOT = Path(__file__).parents[2]
BAD = {17: "outlier", 18: "nan", 20: "loss", 21: "inf"}
STEPS = 23


# --- what cases are made of ---------------------------------------------------------------------


class Net(nn.Module):
    """Of 2 ranks one has no part of ``head.weight``; none of the others is even but the norm's."""

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
    """All of what a skip must leave alone, on this rank."""
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
    if hasattr(net.head.weight, "to_local"):  # what FSDP ignores is the user's to add up
        distributed.all_reduce(net.plain.grad)
        net.plain.grad /= distributed.get_world_size()
    return loss.detach()


OPTIMIZERS = {
    "fastguard": lambda p: fastguard.AdamW(p, lr=1e-2),
    "amsgrad": lambda p: fastguard.Adam(groups(p), lr=1e-2, weight_decay=0.1, amsgrad=True),
    "grouped": lambda p: fastguard.AdamW(groups(p), lr=1e-2),
    "fused": lambda p: torch.optim.AdamW(groups(p), lr=1e-2, fused=True),
    "foreach": lambda p: torch.optim.AdamW(groups(p), lr=1e-2),
}


def groups(parameters):
    """torch's step takes no group that has tensors and DTensors."""
    *others, plain = sorted(parameters, key=lambda p: p.shape == (3,))
    return [{"params": others}, {"params": [plain]}]


def follow(net, name, *, sharded, **options):
    """A run through clipped, good and all kinds of bad steps: reports, and whether skips left all
    alone."""
    optimizer = OPTIMIZERS[name](net.parameters())
    guard = GradGuard(net, max_norm=2.0, skip_norm=1e4, **options)
    last = distributed.get_rank() == distributed.get_world_size() - 1
    reports = []
    for step in range(STEPS):
        kind = BAD.get(step)
        optimizer.zero_grad()
        factor = {"outlier": 1e6, None: 30.0 if step % 3 == 0 else 0.01}.get(kind, 1.0)
        loss = backward(net, mine(batch_of(step)) if sharded else batch_of(step), factor)
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


# --- two ranks ------------------------------------------------------------------------------------


def fsdp_goes_as_one_process_does():
    return [compare_to_one_process(mesh_of(2), name) for name in OPTIMIZERS if name != "grouped"]


def replicas_count_once():
    return compare_to_one_process(mesh_of(2, 1), "fastguard")


def adagc_has_a_coefficient_for_each_parameter():
    """Of the whole gradients."""
    options = {"threshold": AdaGC(relative=1.05, warmup=8)}
    return [compare_to_one_process(mesh_of(2), name, **options) for name in ("fastguard", "fused")]


def a_report_counts_on_all_ranks_and_has_places_of_this_one():
    net = shard(Net(), mesh_of(2))
    optimizer, rank = fastguard.AdamW(net.parameters()), distributed.get_rank()
    backward(net, mine(batch_of(0)))
    grad = local(net.body[0].bias.grad)
    grad[rank] = math.inf  # of 4 and 3 elements
    if rank == 1:
        grad[0] = math.nan
        local(net.head.weight.grad).fill_(math.nan)  # of no elements
        net.plain.grad[2] = math.nan
    report = GradGuard(net).step(optimizer).result()
    found = {o.name: (o.nans, o.infs) for o in report.nonfinite_parameters}
    assert found == {"body.0.bias": (1, 2), "plain": (1, 0)}
    plain, bias = report.nonfinite_parameters
    assert bias.first_index == 0
    assert str(plain) == ("plain[2]" if rank else "plain, on another rank")
    return [report.nonfinite, report.finite_ranges]


def one_all_reduce_and_no_dispatch_of_dtensors():
    from torch.distributed.tensor import DTensor

    net = shard(Net(), mesh_of(2))
    optimizer, guard = fastguard.AdamW(net.parameters()), GradGuard(net)
    reduced, dispatched = [], []
    all_reduce, dispatcher = distributed.all_reduce, DTensor._op_dispatcher

    class Dispatcher:
        def __getattr__(self, name):
            dispatched.append(name)
            return getattr(dispatcher, name)

    for step in range(3):
        backward(net, mine(batch_of(step)), math.nan if step == 2 else 1.0)
        if step:  # the first one makes the state
            distributed.all_reduce = lambda t, **group: (
                reduced.append(len(t)) or all_reduce(t, **group)
            )
            DTensor._op_dispatcher = Dispatcher()
        try:
            guard.step(optimizer)
        finally:
            distributed.all_reduce, DTensor._op_dispatcher = all_reduce, dispatcher
        optimizer.zero_grad()
    assert reduced == [3 * len(list(net.parameters())) + 4] * 2
    assert dispatched == []


def a_gradient_that_one_rank_lacks_is_counted():
    """The collective must not depend on it."""
    net = shard(Net(), mesh_of(2))
    optimizer, rank = fastguard.AdamW(net.parameters()), distributed.get_rank()
    guard = GradGuard(net, max_norm=1e9)
    norms = []
    for value, skipped in ((3.0, False), (math.nan, True), (math.inf, True)):
        optimizer.zero_grad()
        if rank:
            net.plain.grad = torch.full((3,), value)
        report = guard.step(optimizer).result()  # rank 0 has no gradient at all
        assert report.skipped == skipped and report.nonfinite == ("plain",) * skipped
        norms.append(report.total_norm.hex())
    assert float.fromhex(norms[0]) == pytest.approx(math.sqrt(27 / 2))
    return norms


def a_window_leaves_out_what_was_bad_on_one_rank():
    nets = []
    for bad in (True, False):
        net = shard(Net(), mesh_of(2))
        optimizer, guard = fastguard.AdamW(net.parameters(), lr=0.1), GradGuard(net, max_norm=0.5)
        for step in range(3):
            optimizer.zero_grad()
            for i in range(4):
                if i == 1 and not bad:
                    continue
                backward(net, mine(batch_of(10 * step + i)))
                if i == 1 and distributed.get_rank() == step % 2:
                    local(net.body[0].weight.grad)[0, 0] = math.nan
                guard.accumulate()
            report = guard.step(optimizer).result()
            assert [r.batch_id for r in report.skipped_micro_batches] == ["micro-batch 1"] * bad
        nets.append(bits(net, optimizer))
    assert same(*nets)
    return report.total_norm.hex()


def a_scaler_backs_off_on_all_ranks():
    """Also where its own unscale_ goes by the first gradient's placements (pytorch, 2.14)."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = mesh_of(2)
    scales = []
    optimizers = {
        "fastguard": fastguard.AdamW,
        "fused": lambda p: torch.optim.AdamW(p, fused=True),
        "foreign": torch.optim.SGD,
    }
    for name in optimizers:
        for unscale in (False, True):
            parameters = [
                nn.Parameter(distribute_tensor(torch.ones(4), mesh, [placement]))
                for placement in (Replicate(), Shard(0))
            ]
            optimizer, scaler = optimizers[name](parameters), torch.amp.GradScaler("cpu", 1024.0)
            guard = GradGuard(parameters, max_norm=1.0)
            for bad in (False, True):
                scaler.scale(torch.ones(()))
                for p in parameters:
                    p.grad = distribute_tensor(torch.full((4,), 1024.0), mesh, p.placements)
                if bad and distributed.get_rank() == 1:
                    local(parameters[1].grad)[0] = math.inf
                if unscale:
                    scaler.unscale_(optimizer)
                before = [flat(p).clone() for p in parameters]
                report = guard.step(optimizer, scaler=scaler).result()
                assert report.skipped == bad == same(before, [flat(p) for p in parameters])
                assert bad or report.total_norm == pytest.approx(math.sqrt(8))
            assert scaler.get_scale() == 512.0
            scales.append(scaler.get_scale())
    return scales


def gradients_that_are_sums_yet_to_be_made_are_made():
    """As tensor parallelism leaves them for replicated parameters."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor

    mesh, rank = mesh_of(2), distributed.get_rank()
    p = nn.Parameter(distribute_tensor(torch.ones(2), mesh, [Replicate()]))
    q = nn.Parameter(torch.ones(2))
    q.grad = torch.tensor([4.0, -3.0])
    for guarded in (True, False):
        summand = torch.tensor([9.0, 1.0]) if rank == 0 else torch.tensor([-5.0, -4.0])
        p.grad = DTensor.from_local(summand, mesh, [Partial("sum")])
        steps = [fastguard.Adam([r], lr=0.1) for r in (p, q)]
        if guarded:
            norms = [GradGuard([s.param_groups[0]["params"][0]]).step(s).total_norm for s in steps]
            assert norms == [5.0, 5.0]
        else:
            for optimizer in steps:
                optimizer.step()
        assert torch.equal(local(p.detach()), q.detach())
    return local(p.detach()).tolist()


def states_go_through_torchs_checkpoints():
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint import state_dict as helpers

    folder = [tempfile.mkdtemp()] if distributed.get_rank() == 0 else [None]
    distributed.broadcast_object_list(folder)
    nets = []
    for name, into in (("grouped", "fused"), ("fused", "grouped"), ("fastguard", "fastguard")):
        net = shard(Net(), mesh_of(2))
        _, optimizer = follow(net, name, sharded=True)
        model, state = helpers.get_state_dict(net, optimizer)
        path = f"{folder[0]}/{name}_{into}"
        checkpoint.save({"model": model, "optimizer": state}, checkpoint_id=path)

        other = shard(Net(), mesh_of(2))
        resumed = OPTIMIZERS[into](other.parameters())
        model, state = helpers.get_state_dict(other, resumed)
        checkpoint.load({"model": model, "optimizer": state}, checkpoint_id=path)
        helpers.set_state_dict(other, resumed, model_state_dict=model, optim_state_dict=state)
        assert same(bits(net, optimizer), bits(other, resumed))
        for each in (net, other):
            each.zero_grad()
            backward(each, mine(batch_of(99)))
        GradGuard(net).step(optimizer)
        GradGuard(other).step(resumed)
        for p, q in zip(net.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(local(p), local(q))
        nets.append([full(p.detach()).tolist() for p in net.parameters()])
        whole = helpers.get_optimizer_state_dict(
            net, optimizer, options=helpers.StateDictOptions(full_state_dict=True)
        )
        if distributed.get_rank() == 0:
            moment = optimizer.state[net.head.weight]["exp_avg"]
            assert whole["state"]["head.weight"]["exp_avg"].shape == moment.shape
    return nets


def shards_go_back_together():
    """Exactly, and with them the buffers, whichever rank saw the NaN."""
    found = []
    for name in ("fastguard", "foreach", "amsgrad"):
        net = shard(Net(nn.BatchNorm1d), mesh_of(2))
        optimizer = OPTIMIZERS[name](net.parameters())
        guard = GradGuard(net, patience=2, on_patience="rollback", rollback=Rollback(every=2))
        for step in range(6):
            optimizer.zero_grad()
            backward(net, mine(batch_of(step)))
            if step >= 4 and distributed.get_rank() == step % 2:
                flat(net.body[2].weight.grad)[0] = math.nan
            guard.step(optimizer)
            if step == 2:
                kept = bits(net, optimizer)
        assert guard.lr_factor == 0.5
        assert same(kept, bits(net, optimizer))
        optimizer.zero_grad()
        backward(net, mine(batch_of(9)))
        report = guard.step(optimizer)
        assert not report.skipped and not same(kept, bits(net, optimizer))
        found.append([full(net.head.weight.detach()).tolist(), report.total_norm.hex()])
    return found


def what_is_not_for_shards_is_refused():
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.optim import ZeroRedundancyOptimizer
    from torch.distributed.tensor import Shard, distribute_tensor

    net = shard(Net(), mesh_of(2))
    with pytest.raises(ValueError, match='measure="backward" sees gradients before'):
        GradGuard(net, measure="backward")
    flat = FullyShardedDataParallel(nn.Sequential(Net()), device_id=torch.device("cpu"))
    for given in (flat, nn.Sequential(flat), flat.parameters()):
        with pytest.raises(ValueError, match=r"FSDP1.* Use fully_shard of torch.distributed.fsdp"):
            GradGuard(given)
    whole = Net()
    zero = ZeroRedundancyOptimizer(whole.parameters(), optimizer_class=torch.optim.SGD, lr=0.1)
    whole(batch_of(0)).mean().backward()
    with pytest.raises(ValueError, match=r"ZeroRedundancyOptimizer steps a part.* Use fully_shard"):
        GradGuard(whole).step(zero)
    first = distributed.new_group([0])
    if distributed.get_rank() == 1:
        with pytest.raises(ValueError, match="not in the process_group"):
            GradGuard(net, process_group=first)
    half = DeviceMesh("cpu", [distributed.get_rank()])
    alone = nn.Parameter(distribute_tensor(torch.ones(2), half, [Shard(0)]))
    two = [nn.Parameter(distribute_tensor(torch.ones(2), mesh_of(2), [Shard(0)])), alone]
    GradGuard(two)  # one mesh is part of the other
    with pytest.raises(ValueError, match=r"parameter 0 .* on the ranks \[0, 1\], while \[[01]\]"):
        GradGuard(two, process_group=half.get_group())
    optimizer = fastguard.AdamW(net.parameters())
    backward(net, mine(batch_of(0)))
    GradGuard(net).step(optimizer)
    optimizer.state[net.head.weight]["exp_avg"] = torch.zeros(1, 8)
    with pytest.raises(RuntimeError, match=r"its exp_avg must be a DTensor .* got None"):
        optimizer.step()


def ddp_replicas_stay_equal():
    rank = distributed.get_rank()
    net = nn.parallel.DistributedDataParallel(Net(nn.BatchNorm1d))
    optimizer = fastguard.AdamW(net.parameters(), lr=0.1)
    guard = GradGuard(net, max_norm=0.5, process_group=distributed.group.WORLD)
    verdicts = []
    for step in range(6):
        optimizer.zero_grad()
        buffers = [b.clone() for b in net.buffers()]
        loss = net(mine(batch_of(step))).square().mean()
        loss.backward()
        given = {2: math.nan if rank else 1.0, 3: None if rank else 2.0}.get(step, loss)
        if step == 4:
            guard._batches_to_skip = rank  # who asked skip_batch on one rank only
        before = [p.detach().clone() for p in net.parameters()]
        report = guard.step(optimizer, loss=given).result()
        verdicts.append(report.verdict if step != 4 else report.skipped)
        assert report.skipped == (step in (2, 4)) == same(before, net.parameters())
        assert report.skipped == same(buffers, net.buffers())
        if step == 3:
            assert report.loss == (None if rank else 2.0)
    everything = torch.cat([p.detach().flatten() for p in net.parameters()])
    others = [torch.empty_like(everything) for _ in range(2)]
    distributed.all_gather(others, everything)
    assert torch.equal(*others)
    return [verdicts, report.total_norm.hex()]


def without_a_group_ddp_replicas_would_part():
    """So that the case above can fail."""
    net = nn.parallel.DistributedDataParallel(Net())
    optimizer, guard = fastguard.AdamW(net.parameters(), lr=0.1), GradGuard(net)
    net(mine(batch_of(0))).square().mean().backward()
    report = guard.step(optimizer, loss=math.nan if distributed.get_rank() else 1.0)
    assert report.skipped == (distributed.get_rank() == 1)


class Given(nn.Module):
    """A gradient of each element is what it is given; ``sometimes`` has one where ``also`` says."""

    def __init__(self):
        super().__init__()
        self.always = nn.Parameter(torch.zeros(2))
        self.sometimes = nn.Parameter(torch.zeros(3))
        self.never = nn.Parameter(torch.ones(1))

    def forward(self, x, also):
        total = (self.always * x).sum()
        return total + (self.sometimes * x).sum() if also else total


def windows_of_replicas(gradients, weights, synced, make=torch.optim.SGD, scaler=None, views=False):
    """Two windows of the same micro-batches; the module after them, optimizer and last report."""
    rank = distributed.get_rank()
    net = nn.parallel.DistributedDataParallel(
        Given(), find_unused_parameters=True, gradient_as_bucket_view=views
    )
    optimizer = make(net.parameters(), lr=1.0, weight_decay=0.5)
    guard = GradGuard(net, max_norm=math.inf, process_group=distributed.group.WORLD)
    bad = []
    for _ in range(2):
        optimizer.zero_grad(set_to_none=not views)
        for i, (value, weight) in enumerate(zip(gradients[rank], weights[rank], strict=True)):
            with contextlib.nullcontext() if i in synced else net.no_sync():
                loss = net(torch.tensor(value), also=rank == 1)
                (loss if scaler is None else scaler.scale(loss)).backward()
            bad.append(guard.accumulate(scaler=scaler, weight=weight).skipped)
        report = guard.step(optimizer, scaler=scaler).result()
    assert bad == [not math.isfinite(value) for value in gradients[rank]] * 2
    return net.module, optimizer, report


def a_window_of_replicas_is_the_mean_over_all_ranks():
    """1 and 3 on two ranks are not -1 on one and -3 on the other, whatever DDP averaged already."""
    found = []
    for synced in ((), (0,), (0, 1)):
        for views in (False, True):
            ones = [[1.0, 1.0]] * 2
            given = [[1.0, 1.0], [3.0, 3.0]]
            net, _, report = windows_of_replicas(given, ones, synced, views=views)
            # First -2, then -2 + 0.5 * 2; what no rank reaches is not decayed either.
            assert net.always.tolist() == [-3.0] * 2 and net.never.tolist() == [1.0]
            assert net.sometimes.tolist() == [-1.5 - 1.5 + 0.75] * 3
            assert report.total_norm == pytest.approx(math.sqrt(2 * 2**2 + 3 * 1.5**2))
            found.append(report.total_norm.hex())
    assert found == found[:1] * 6
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1)
    report = windows_of_replicas(given, ones, (), scaler=scaler)[-1]
    assert report.total_norm.hex() == found[0]
    assert scaler.get_scale() == 2.0**12  # no rank heard of an Inf where there was none
    return found


def a_bad_micro_batch_of_one_rank_is_left_out_there_alone():
    """With weights: of sums over 1, 2 and 1 items, and over 1, 1 and 2."""
    found = []
    for bad, make in ((math.nan, torch.optim.SGD), (math.inf, fastguard.AdamW)):
        for synced in ((), (2,)):
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
            gradients = [[1.0, bad, 5.0], [3.0, 7.0, 11.0]]
            weights = [[1.0, 2.0, 1.0], [1.0, 1.0, 2.0]]
            net, optimizer, report = windows_of_replicas(gradients, weights, synced, make, scaler)
            mean = (1 + 5 + 3 + 7 + 11) / 6
            assert report.total_norm == pytest.approx(
                math.sqrt(2 * mean**2 + 3 * ((3 + 7 + 11) / 6) ** 2)
            )
            if make is fastguard.AdamW:
                moment = optimizer.state[net.always]["exp_avg"]
                torch.testing.assert_close(moment, torch.full((2,), 0.19 * mean))
            else:
                assert net.always.tolist() == [-mean - mean + 0.5 * mean] * 2
            assert len(report.skipped_micro_batches) == (distributed.get_rank() == 0)
            assert scaler.get_scale() == 2.0**8  # both ranks heard of it, in both windows
            found.append([net.always.tolist(), net.sometimes.tolist(), report.total_norm.hex()])
    return found


def a_window_that_is_bad_everywhere_is_skipped_everywhere():
    nan, ones = math.nan, [[1.0, 1.0]] * 2
    net, *_, report = windows_of_replicas([[nan, nan], [nan, math.inf]], ones, ())
    assert report.verdict is Verdict.SKIP_NONFINITE and report.all_micro_batches_skipped
    assert net.always.tolist() == [0.0] * 2
    net, *_, report = windows_of_replicas([[nan, nan], [nan, 4.0]], ones, ())
    assert net.always.tolist() == [-4.0 - 4.0 + 2.0] * 2
    return report.total_norm.hex()


def a_window_without_a_group_is_refused_under_no_sync():
    net = nn.parallel.DistributedDataParallel(Given(), find_unused_parameters=True)
    guard = GradGuard(net)
    with net.no_sync():
        net(torch.tensor(1.0), True).backward()
        with pytest.raises(ValueError, match=r"those of this rank alone.*process_group=torch"):
            guard.accumulate()
    with pytest.raises(ValueError, match=r"under DistributedDataParallel.no_sync\(\)"):
        guard.accumulate()
    assert net.module.always.grad.tolist() == [1.0, 1.0] and guard._window is None
    net.zero_grad()
    net(torch.tensor(1.0), True).backward()
    assert not guard.accumulate().skipped


def a_search_for_a_loss_scale_is_one_on_all_ranks():
    """No rank may run out of patience before the others."""
    inf, nan, rank = math.inf, math.nan, distributed.get_rank()
    weight = nn.Parameter(torch.zeros(2))
    optimizer, scaler = fastguard.AdamW([weight]), torch.amp.GradScaler("cpu", 2.0**20)
    guard = GradGuard([weight], process_group=distributed.group.WORLD)
    windows = [  # of each rank gradients and losses; whether all overflowed
        (([inf, inf], [None, 1.0]), ([inf, inf], [None, None]), True),
        (([inf, inf], [None, None]), ([inf, nan], [None, None]), False),
        (([inf, inf], [None, None]), ([inf, inf], [None, inf]), False),
        (([inf, inf], [None, None]), ([inf, 4.0], [None, None]), False),
        (([inf], [None]), ([1.0], [None]), True),  # without a window
        (([inf], [None]), ([1.0], [1.0]), True),
        (([inf], [None]), ([1.0], [inf]), False),
    ]
    found = []
    for *of_ranks, search in windows:
        values, losses = of_ranks[rank]
        for value, loss in zip(values, losses, strict=True):
            scaler.scale(torch.ones(()))
            weight.grad = torch.full((2,), value * scaler.get_scale())
            if len(values) > 1:
                micro_batch = guard.accumulate(scaler=scaler, loss=loss)
                assert micro_batch.scale_search == (value == inf and loss in (None, 1.0))
        loss = None if len(values) > 1 else loss
        report = guard.step(optimizer, scaler=scaler, loss=loss)
        assert report.scale_search == search
        found.append((report.skipped, report.scale_search, report.loss_scale))
    assert [skipped for skipped, *_ in found] == [True, True, True, False, True, True, True]
    return found


# --- four ranks -----------------------------------------------------------------------------------


def replicas_of_shards_count_once():
    return compare_to_one_process(mesh_of(2, 2), "fastguard")


def meshes_of_a_part_of_the_ranks_decide_apart():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    pair = distributed.get_rank() // 2
    mesh = init_device_mesh("cpu", (2, 2, 1), mesh_dim_names=("pair", "x", "y"))["x", "y"]
    p = nn.Parameter(distribute_tensor(torch.ones(4, 2), mesh, [Shard(0), Replicate()]))
    guard, optimizer = GradGuard([p]), fastguard.AdamW([p])
    for _ in range(2):
        p.grad = distribute_tensor(
            torch.full((4, 2), math.nan if pair else 2.0), mesh, p.placements
        )
        report = guard.step(optimizer)
    assert report.skipped == bool(pair) and (
        pair or report.total_norm == pytest.approx(math.sqrt(32))
    )
    assert GradGuard([p])._decider.ranks._group is guard._decider.ranks._group

    # Of two meshes all of whose ranks train together, given their group: one decision.
    guard = GradGuard([p], process_group=distributed.group.WORLD)
    for value, skipped in ((math.nan if pair else 2.0, True), (2.0, False)):
        p.grad = distribute_tensor(torch.full((4, 2), value), mesh, p.placements)
        report = guard.step(optimizer)
        assert report.skipped == skipped
    assert report.total_norm == pytest.approx(math.sqrt(32))
    return report.total_norm.hex()


# --- saved by two ranks, loaded by one and by four -----------------------------------------------

#: A folder that the runs of all numbers of ranks share.
shared = Path()


def resumable():
    net = shard(Net(), mesh_of(distributed.get_world_size()))
    optimizer = fastguard.AdamW(net.parameters(), lr=1e-2)
    guards = [GradGuard(net, max_norm=2.0), GradGuard(net, max_norm=2.0, threshold=AdaGC())]
    return net, optimizer, guards


def steps_of(net, optimizer, guards, numbers):
    """Of two guards by turns; the loss of step 5 is NaN on the last rank."""
    reports = []
    for step in numbers:
        optimizer.zero_grad()
        loss = backward(net, mine(batch_of(step)))
        if step == 5 and distributed.get_rank() == distributed.get_world_size() - 1:
            loss = math.nan
        report = guards[step % 2].step(optimizer, loss=loss).result()
        reports.append([report.verdict, report.total_norm])
    return reports


def checkpoint_of(net, optimizer, guards):
    from torch.distributed.checkpoint import state_dict as helpers

    model, state = helpers.get_state_dict(net, optimizer)
    plain, adagc = (guard.state_dict() for guard in guards)
    return {"model": model, "optimizer": state, "guard": plain, "adagc": json.dumps(adagc)}


def guards_and_moments_are_saved():
    from torch.distributed import checkpoint

    net, optimizer, guards = resumable()
    steps_of(net, optimizer, guards[::-1], range(6))
    states = checkpoint_of(net, optimizer, guards)
    checkpoint.save(states, checkpoint_id=shared / "states")
    assert states["guard"]["budget"]["in_a_row"] == 1
    reports = steps_of(net, optimizer, guards, range(6, 10))
    expected = {
        "guards": [guard.state_dict()["steps"] for guard in guards],
        "reports": reports,
        "weights": [full(p.detach()).tolist() for p in net.parameters()],
    }
    if distributed.get_rank() == 0:
        (shared / "expected.json").write_text(json.dumps(expected))
    return reports


def guards_and_moments_are_loaded():
    """Into what has taken no step yet, on another number of ranks."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint import state_dict as helpers

    expected = json.loads((shared / "expected.json").read_text())
    net, optimizer, guards = resumable()
    states = checkpoint_of(net, optimizer, guards)
    checkpoint.load(states, checkpoint_id=shared / "states")
    helpers.set_state_dict(
        net, optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"]
    )
    guards[0].load_state_dict(states["guard"])
    guards[1].load_state_dict(json.loads(states["adagc"]))
    assert guards[0].state_dict() == states["guard"]
    assert json.dumps(guards[1].state_dict()) == states["adagc"]
    reports = steps_of(net, optimizer, guards, range(6, 10))
    for found, right in zip(reports, expected["reports"], strict=True):
        assert found == pytest.approx(right, rel=1e-4)
    for p, right in zip(net.parameters(), expected["weights"], strict=True):
        torch.testing.assert_close(full(p.detach()), torch.tensor(right), rtol=1e-4, atol=1e-5)
    assert [guard.state_dict()["steps"] for guard in guards] == expected["guards"]
    return reports


# --- running them ---------------------------------------------------------------------------------

CASES = {
    2: [
        fsdp_goes_as_one_process_does,
        replicas_count_once,
        adagc_has_a_coefficient_for_each_parameter,
        a_report_counts_on_all_ranks_and_has_places_of_this_one,
        one_all_reduce_and_no_dispatch_of_dtensors,
        a_gradient_that_one_rank_lacks_is_counted,
        a_window_leaves_out_what_was_bad_on_one_rank,
        a_scaler_backs_off_on_all_ranks,
        gradients_that_are_sums_yet_to_be_made_are_made,
        states_go_through_torchs_checkpoints,
        shards_go_back_together,
        guards_and_moments_are_saved,
        what_is_not_for_shards_is_refused,
        ddp_replicas_stay_equal,
        without_a_group_ddp_replicas_would_part,
        a_window_of_replicas_is_the_mean_over_all_ranks,
        a_bad_micro_batch_of_one_rank_is_left_out_there_alone,
        a_window_that_is_bad_everywhere_is_skipped_everywhere,
        a_window_without_a_group_is_refused_under_no_sync,
        a_search_for_a_loss_scale_is_one_on_all_ranks,
    ],
    1: [guards_and_moments_are_loaded],
    4: [
        guards_and_moments_are_loaded,
        replicas_of_shards_count_once,
        meshes_of_a_part_of_the_ranks_decide_apart,
    ],
}


def test_tensors_are_added_up_in_buckets_of_one_dtype(monkeypatch):
    monkeypatch.setattr(sharded, "_BUCKET_ELEMENTS", 5)
    sizes = [3, 2, 4, 1, 9, 1]
    dtypes = [torch.float32] * 3 + [torch.float64] * 3
    tensors = [torch.zeros(n, dtype=t) for n, t in zip(sizes, dtypes, strict=True)]
    assert [list(map(len, b)) for b in sharded._buckets(tensors)] == [
        [3, 2],
        [4],
        [1, 9],
        [1],
    ]
    assert list(sharded._buckets([])) == []


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """By number of ranks: of each rank what every case returned, up to the first that failed."""
    together = tmp_path_factory.mktemp("ranks")
    return functools.cache(lambda size: spawn(size, together))


def spawn(size, folder):
    command = [sys.executable, "-X", "faulthandler", "-m", "tests.guard.test_distributed"]
    store = folder / f"store_{size}"
    ranks = [
        subprocess.Popen(
            [*command, str(store), str(rank), str(size)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(folder / f"errors_{size}_{rank}").open("w"),
            text=True,
        )
        for rank in range(size)
    ]
    alarm = threading.Timer(240, lambda: [rank.kill() for rank in ranks])
    alarm.start()
    try:
        lines = [rank.stdout.readline() for rank in ranks]
    finally:
        alarm.cancel()
        for rank in ranks:
            rank.kill()
            rank.communicate()
    for i, line in enumerate(lines):
        assert line, f"rank {i} ended:\n{(folder / f'errors_{size}_{i}').read_text()}"
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize(
    "size, case",
    [
        pytest.param(size, case.__name__, marks=[pytest.mark.slow] * (size > 2))
        for size, cases in CASES.items()
        for case in cases
    ],
)
def test_on_ranks(size, case, answers):
    answers(2)  # saves what the others load
    failed = {rank: found["failed"] for rank, found in enumerate(answers(size))}
    here = {rank: text for rank, text in failed.items() if text and text[0] == case}
    assert not here, "\n".join(f"rank {rank}:\n{text[1]}" for rank, text in here.items())
    first, *others = [found["passed"].get(case, "not reached") for found in answers(size)]
    assert first != "not reached" and others == [first] * (size - 1)


def main(store, rank, size):
    global shared
    shared = Path(store).parent
    torch.set_num_threads(1)
    store = distributed.FileStore(store, int(size))
    distributed.init_process_group(
        "gloo",
        store=store,
        rank=int(rank),
        world_size=int(size),
        timeout=datetime.timedelta(seconds=20),
    )
    passed, failed = {}, None
    for case in CASES[int(size)]:
        try:
            passed[case.__name__] = case()
        except BaseException:
            failed = case.__name__, traceback.format_exc()
            break
    print(json.dumps({"passed": passed, "failed": failed}), flush=True)
    # No rank ends by itself: gloo's threads crash now and then, some while their interpreter shuts
    # down, some when another rank goes first.
    sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
