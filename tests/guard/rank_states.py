"""Cases of four ranks, and states saved by two ranks and loaded by one and by four."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import distributed, nn

import fastguard
from fastguard import GradGuard
from fastguard.thresholds import AdaGC

from .ranks import Net, backward, batch_of, compare_to_one_process, full, mesh_of, mine, shard

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

    # Two meshes whose ranks all train together make one decision if the guard gets their group.
    guard = GradGuard([p], process_group=distributed.group.WORLD)
    for value, skipped in ((math.nan if pair else 2.0, True), (2.0, False)):
        p.grad = distribute_tensor(torch.full((4, 2), value), mesh, p.placements)
        report = guard.step(optimizer)
        assert report.skipped == skipped
    assert report.total_norm == pytest.approx(math.sqrt(32))
    return report.total_norm.hex()


# --- saved by two ranks, loaded by one and by four -----------------------------------------------

#: A folder for the runs of all numbers of ranks.
shared = Path()


def resumable():
    net = shard(Net(), mesh_of(distributed.get_world_size()))
    optimizer = fastguard.AdamW(net.parameters(), lr=1e-2)
    guards = [GradGuard(net, max_norm=2.0), GradGuard(net, max_norm=2.0, threshold=AdaGC())]
    return net, optimizer, guards


def steps_of(net, optimizer, guards, numbers):
    """Steps of two guards in turns. The loss of step 5 is NaN on the last rank."""
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
        (shared / "expected.json").write_text(json.dumps(expected), encoding="utf-8")
    return reports


def guards_and_moments_are_loaded():
    """They are loaded into a guard and an optimizer without steps, on another number of ranks."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint import state_dict as helpers

    expected = json.loads((shared / "expected.json").read_text(encoding="utf-8"))
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
