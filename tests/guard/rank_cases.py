"""Cases of two ranks: FSDP2's shards, replicas of DDP. Each returns values equal on all ranks."""

import math
import tempfile

import pytest
import torch
from torch import distributed, nn

import fastguard
from fastguard import GradGuard, Rollback
from fastguard.thresholds import AdaGC

from .ranks import (
    OPTIMIZERS,
    Net,
    backward,
    batch_of,
    bits,
    compare_to_one_process,
    flat,
    follow,
    full,
    local,
    mesh_of,
    mine,
    same,
    shard,
)

# --- two ranks ------------------------------------------------------------------------------------


def fsdp_goes_as_one_process_does():
    return [compare_to_one_process(mesh_of(2), name) for name in OPTIMIZERS if name != "grouped"]


def replicas_count_once():
    return compare_to_one_process(mesh_of(2, 1), "fastguard")


def adagc_has_a_coefficient_for_each_parameter():
    """The coefficients depend on the norms of the whole gradients."""
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
    """Its unscale_ follows the first gradient's placements (torch 2.14); this must not matter."""
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
    """Tensor parallelism leaves such gradients for replicated parameters."""
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
    """Shards and buffers are restored exactly, whichever rank saw the NaN."""
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
    """This shows that the case above can fail."""
    net = nn.parallel.DistributedDataParallel(Net())
    optimizer, guard = fastguard.AdamW(net.parameters(), lr=0.1), GradGuard(net)
    net(mine(batch_of(0))).square().mean().backward()
    report = guard.step(optimizer, loss=math.nan if distributed.get_rank() else 1.0)
    assert report.skipped == (distributed.get_rank() == 1)
