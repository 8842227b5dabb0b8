"""Cases of masters of shards: steps, skips and torch's checkpoints of bfloat16 parameters."""

import tempfile

import torch
from torch import distributed, nn

from fastguard import GradGuard

from .ranks import (
    OPTIMIZERS,
    Net,
    backward,
    batch_of,
    bits,
    follow,
    full,
    local,
    mesh_of,
    mine,
    same,
    shard,
)


def masters_of_shards_step_as_float32_copies():
    net = shard(Net().bfloat16(), mesh_of(2))
    copies = [nn.Parameter(local(p.detach()).float().clone()) for p in net.parameters()]
    other = torch.optim.AdamW(copies, lr=1e-2)
    optimizer = OPTIMIZERS["masters"](net.parameters())
    guard = GradGuard(net, max_norm=1e9)
    for step in range(4):
        optimizer.zero_grad()
        backward(net, mine(batch_of(step)).bfloat16())
        for p, q in zip(net.parameters(), copies, strict=True):
            q.grad = local(p.grad).float().clone()
        guard.step(optimizer)
        other.step()
    for p, q in zip(net.parameters(), copies, strict=True):
        master = optimizer.state[p]["master_param"]
        assert type(master) is type(p.data) and master.shape == p.shape
        torch.testing.assert_close(local(master), q.detach(), rtol=1e-6, atol=1e-7)
        assert torch.equal(local(p), local(master).bfloat16())
    return [full(p.detach()).tolist() for p in net.parameters()]


def masters_go_through_torchs_checkpoints():
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint import state_dict as helpers

    folder = [tempfile.mkdtemp()] if distributed.get_rank() == 0 else [None]
    distributed.broadcast_object_list(folder)
    net = shard(Net().bfloat16(), mesh_of(2))
    _, optimizer = follow(net, "masters", sharded=True)
    model, state = helpers.get_state_dict(net, optimizer)
    checkpoint.save({"model": model, "optimizer": state}, checkpoint_id=folder[0])

    other = shard(Net().bfloat16(), mesh_of(2))
    resumed = OPTIMIZERS["masters"](other.parameters())
    model, state = helpers.get_state_dict(other, resumed)
    checkpoint.load({"model": model, "optimizer": state}, checkpoint_id=folder[0])
    helpers.set_state_dict(other, resumed, model_state_dict=model, optim_state_dict=state)
    assert same(bits(net, optimizer), bits(other, resumed))

    # Float32 weights, by the model's names, into an optimizer that has made no step.
    weights = optimizer.master_state_dict(net)
    assert all(w.dtype == torch.float32 for w in weights.values())
    fresh = shard(Net().bfloat16(), mesh_of(2))
    unstepped = OPTIMIZERS["masters"](fresh.parameters())
    unstepped.load_master_state_dict(fresh, weights)
    for p, q in zip(net.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(local(p), local(q))
        masters = optimizer.state[p]["master_param"], unstepped.state[q]["master_param"]
        assert torch.equal(*map(local, masters))
    for each, one in ((net, optimizer), (other, resumed), (fresh, unstepped)):
        each.zero_grad()
        backward(each, mine(batch_of(99)).bfloat16())
        GradGuard(each).step(one)
    assert same(bits(net, optimizer), bits(other, resumed))
    return [full(w).tolist() for w in weights.values()]
