"""Clipping of DTensors on two ranks (gloo), each case in two processes of its own.

A case is a function below that runs on both ranks. It returns what must be equal on them.
"""

import json
import math
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import fastguard

ROOT = Path(__file__).parents[1]
ORDERS = [2.0, 1.0, 0.5, 0.0, 3.5, 8.0, math.inf, -math.inf, -1.0, -8.0]


def dtensor(full, placements, mesh=None):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(full, mesh or init_device_mesh("cpu", (2,)), placements)


def parameter_with(grad):
    parameter = torch.nn.Parameter(torch.zeros_like(grad))
    parameter.grad = grad
    return parameter


def local_bits(parameters):
    grads = [p.grad for p in parameters]
    locals_ = [g.to_local() if hasattr(g, "to_local") else g for g in grads]
    return [g.detach().clone().view(torch.uint8) for g in locals_]


def same(before, after):
    return all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def fp16_norm_over_256_on_each_rank():
    """torch forms the squares of the local norms in fp16, gets Inf, and zeroes the gradients."""
    from torch.distributed.tensor import Shard

    def parameter():
        return parameter_with(dtensor(torch.full((32,), 100.0, dtype=torch.float16), [Shard(0)]))

    ours, theirs = parameter(), parameter()
    torch.nn.utils.clip_grad_norm_([theirs], 1.0)
    assert not theirs.grad.full_tensor().any()
    norm = fastguard.clip_grad_norm_([ours], 1.0)
    assert norm.full_tensor().item() == pytest.approx(565.685, rel=1e-5)
    assert norm.dtype == torch.float32 and norm.placements[0].is_replicate()
    expected = torch.full((32,), 100 / 565.685, dtype=torch.float16)
    torch.testing.assert_close(ours.grad.full_tensor(), expected)
    return norm.to_local().item()


def inf_on_rank_1_behind_a_replicated_gradient():
    """GradScaler reduces found_inf by the first gradient's placements: rank 0 steps, 1 skips."""
    from torch.distributed.tensor import Replicate, Shard

    sharded = torch.ones(6)
    sharded[5] = math.inf
    grads = [dtensor(torch.ones(3), [Replicate()]), dtensor(sharded, [Shard(0)])]
    norms = []
    for order in (grads, grads[::-1]):
        parameters = [parameter_with(g) for g in order]
        before = local_bits(parameters)
        for norm_type in ORDERS[:7]:
            norm = fastguard.clip_grad_norm_(parameters, 1e-3 if norm_type else 10.0, norm_type)
            norms.append(norm.to_local().item())
        with pytest.raises(RuntimeError, match=r"total norm of order 2.0 .* It is inf"):
            fastguard.clip_grad_norm_(parameters, 1e-3, error_if_nonfinite=True)
        assert same(before, local_bits(parameters))
    fastguard.clip_grad_norm_(parameters, 1e-3, nonfinite="torch")
    values = torch.cat([p.grad.full_tensor() for p in parameters])
    assert values.isnan().sum() == 1 and (values == 0).sum() == 8
    return norms


def nan_on_rank_1_survives_every_order():
    """A maximum over ranks may drop a NaN, as Apex's fmaxf does within one."""
    from torch.distributed.tensor import Shard

    bad = torch.tensor([1.0, 2.0, 3.0, math.nan])
    parameters = [parameter_with(dtensor(g, [Shard(0)])) for g in (torch.ones(4), bad)]
    before = local_bits(parameters)
    for norm_type in ORDERS:
        norm = fastguard.clip_grad_norm_(parameters, 10.0, norm_type).to_local()
        assert norm == 2 if norm_type == 0 else norm.isnan()
    assert same(before, local_bits(parameters))


def uneven_and_empty_shards_in_every_order():
    from torch.distributed.tensor import Shard

    torch.manual_seed(0)
    fulls = [torch.randn(n, 3) for n in (5, 1, 2, 0)]
    norms = []
    for norm_type in ORDERS:
        parameters = [parameter_with(dtensor(g.clone(), [Shard(0)])) for g in fulls]
        expected = torch.nn.utils.get_total_norm(
            [g.double() for g in fulls if g.numel()], norm_type
        )
        norm = fastguard.clip_grad_norm_(parameters, expected / 2, norm_type)
        torch.testing.assert_close(norm.full_tensor(), expected.float())
        coef = expected / 2 / (expected + 1e-6)
        for parameter, full in zip(parameters, fulls, strict=True):
            torch.testing.assert_close(parameter.grad.full_tensor(), full * coef.float())
        norms.append(norm.to_local().item())
    empty = [parameter_with(dtensor(torch.zeros(0, 3), [Shard(0)]))]
    assert all(fastguard.clip_grad_norm_(empty, 1.0, p).to_local() == 0 for p in ORDERS)
    return norms


def mixed_with_tensors_and_other_meshes():
    """torch raises for both."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard

    line, square = init_device_mesh("cpu", (2,)), init_device_mesh("cpu", (2, 1))
    lists = {
        "tensor": lambda: [torch.full((4,), 2.0), dtensor(torch.ones(9), [Shard(0)], line)],
        "meshes": lambda: [
            dtensor(torch.ones(9), [Shard(0)], line),
            dtensor(torch.full((4,), 2.0), [Replicate(), Shard(0)], square),
        ],
    }
    norms = []
    for grads in lists.values():
        with pytest.raises(Exception):  # noqa: B017 - whichever: not ours
            torch.nn.utils.clip_grad_norm_([parameter_with(g) for g in grads()], 1.0)
        for norm_type, expected in ((2.0, 5.0), (1.0, 17.0), (math.inf, 2.0), (0.0, 2.0)):
            parameters = [parameter_with(g) for g in grads()]
            norm = fastguard.clip_grad_norm_(parameters, expected / 2, norm_type)
            assert type(norm) is torch.Tensor and norm.item() == pytest.approx(expected)
            for parameter, full in zip(parameters, grads(), strict=True):
                local = full.to_local() if hasattr(full, "to_local") else full
                grad = parameter.grad
                grad = grad.to_local() if hasattr(grad, "to_local") else grad
                torch.testing.assert_close(grad, local / 2)
            norms.append(norm.item())
    return norms


def replicas_count_once_and_partial_gradients_are_summed_first():
    from torch.distributed.tensor import DTensor, Partial, Replicate

    replicated = parameter_with(dtensor(torch.full((4,), 3.0), [Replicate()]))
    assert fastguard.get_total_norm([replicated.grad]).full_tensor() == 6
    mesh = replicated.grad.device_mesh
    rank = torch.distributed.get_rank()
    summand = torch.tensor([9.0, 1.0]) if rank == 0 else torch.tensor([-5.0, 2.0])  # 4, 3
    partial = parameter_with(DTensor.from_local(summand, mesh, [Partial("sum")]))
    norm = fastguard.clip_grad_norm_([partial], 1.0)
    assert norm.full_tensor().item() == pytest.approx(5.0)
    torch.testing.assert_close(partial.grad.full_tensor(), torch.tensor([0.8, 0.6]))
    return norm.to_local().item()


def a_mesh_without_this_rank_is_passed_over():
    """As for the other stages of a pipeline: whose ranks take part in nothing here."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Shard

    grads = [
        dtensor(torch.full((4,), 2.0), [Shard(0)], DeviceMesh("cpu", [1])),
        dtensor(torch.ones(9), [Shard(0)]),
    ]
    rank = torch.distributed.get_rank()
    for norm_type, expected in (
        (2.0, [3, 5]),
        (1.0, [9, 17]),
        (0.0, [1, 2]),
        (-1.0, [1 / 9, 1 / 11]),
    ):
        parameters = [parameter_with(g.clone()) for g in grads]
        norm = fastguard.clip_grad_norm_(parameters, 1e3, norm_type)
        assert norm.item() == pytest.approx(expected[rank])
        fastguard.clip_grads_with_norm_(parameters, 1.0, 2.0)
        torch.testing.assert_close(parameters[1].grad.full_tensor(), torch.full((9,), 0.5))
    alone = fastguard.clip_grad_norm_(parameters[0], 1.0)
    assert alone.to_local().numel() == rank


def one_reduction_whatever_the_values():
    """Ranks that disagreed on the collectives would wait for each other for ever."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.debug import CommDebugMode

    counts = []
    for value in (1.0, math.nan, math.inf, 0.0):
        grads = [dtensor(torch.full((4, 4), value), [Shard(i % 2)]) for i in range(6)]
        grads.append(dtensor(torch.ones(3), [Replicate()]))
        with CommDebugMode() as communication:
            fastguard.clip_grad_norm_([parameter_with(g) for g in grads], 1.0)
        counts.append({str(op): n for op, n in communication.get_comm_counts().items()})
    assert counts == counts[:1] * 4 and sum(counts[0].values()) == 1
    return counts


def in_two_steps_the_same_bits():
    from torch.distributed.tensor import Shard

    torch.manual_seed(0)
    fulls = [torch.randn(7), torch.randn(3, 3)]
    one, two = ([parameter_with(dtensor(g, [Shard(0)])) for g in fulls] for _ in range(2))
    untouched = local_bits(one)
    norm = fastguard.clip_grad_norm_(one, 0.3)
    total_norm = fastguard.get_total_norm([p.grad for p in two])
    assert torch.equal(norm.to_local(), total_norm.to_local())
    versions = [p.grad._version for p in two]
    fastguard.clip_grads_with_norm_(two, 10.0, total_norm)
    assert versions == [p.grad._version for p in two] and same(untouched, local_bits(two))
    fastguard.clip_grads_with_norm_(two, 0.3, total_norm)
    assert all(p.grad._version > v for p, v in zip(two, versions, strict=True))
    assert same(local_bits(one), local_bits(two)) and not same(untouched, local_bits(two))
    return norm.to_local().item()


CASES = [
    fp16_norm_over_256_on_each_rank,
    inf_on_rank_1_behind_a_replicated_gradient,
    nan_on_rank_1_survives_every_order,
    uneven_and_empty_shards_in_every_order,
    mixed_with_tensors_and_other_meshes,
    replicas_count_once_and_partial_gradients_are_summed_first,
    a_mesh_without_this_rank_is_passed_over,
    one_reduction_whatever_the_values,
    in_two_steps_the_same_bits,
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_on_two_ranks(case, tmp_path):
    command = [
        *(sys.executable, "-X", "faulthandler", "-m", "tests.test_clip_distributed"),
        *(case.__name__, tmp_path / "store"),
    ]
    errors = [tmp_path / f"errors_{rank}" for rank in range(2)]
    ranks = [
        subprocess.Popen(
            [*command, str(rank)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors[rank].open("w"),
            text=True,
        )
        for rank in range(2)
    ]
    alarm = threading.Timer(120, lambda: [rank.kill() for rank in ranks])
    alarm.start()
    try:
        answers = [rank.stdout.readline() for rank in ranks]
    finally:
        alarm.cancel()
        for rank in ranks:
            rank.kill()
            rank.communicate()
    for answer, rank, log in zip(answers, ranks, errors, strict=True):
        assert answer, f"a rank ended with {rank.returncode}:\n{log.read_text()}"
    assert answers[0] == answers[1]


def main(case, store, rank):
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(store, 2)
    torch.distributed.init_process_group("gloo", store=store, rank=int(rank), world_size=2)
    print(json.dumps(globals()[case]()), flush=True)
    # Neither rank ends by itself: gloo's threads crash now and then, some while their interpreter
    # shuts down, some when the other rank goes first.
    sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
