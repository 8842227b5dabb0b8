"""Plans of launchers: when they are built, kept and forgotten, and CUDA graphs."""

import threading

import pytest
import torch

from fastguard import ops
from fastguard.thresholds import Fixed
from tests.simt.launchers.tensors import F64, assert_close, drawn, scalar, statistics

from . import gpu

BUILD = ["upload_kernel", "expand_plan_kernel"]


def test_a_plan_is_reused_while_nothing_moves():
    grads = drawn()[:5]
    ops.grad_norm(grads)
    assert gpu().kernels() == [*BUILD, "grad_norm_kernel"]
    ops.grad_norm(grads)
    assert gpu().kernels() == ["grad_norm_kernel"]
    ops.scale_(grads, scalar(0.5))  # the same tensors: the same plan
    ops.clip_(grads, 1.0, 1e9)
    ops.grad_norm_decide_(grads, None, None, statistics(5), 0, Fixed(), 1.0, 1e9)
    assert gpu().kernels() == ["scale_kernel", "clip_kernel", "grad_norm_kernel"]


@pytest.mark.parametrize("change", ["pointer", "size", "dtype", "order", "layout", "number"])
def test_a_plan_is_rebuilt_when_something_changes(change):
    room = torch.arange(64.0).view(8, 8)
    other = torch.ones(10)
    ops.grad_norm([room, other])
    gpu().launches()
    changed = {
        "pointer": [room, torch.ones(10)],
        "size": [room[:7], other],
        "dtype": [room.view(torch.bfloat16)[:, :8].as_strided((64,), (1,)), other],
        "order": [other, room],
        "layout": [room.t(), other],
        "number": [room],
    }[change]
    measured = ops.grad_norm(changed)
    assert gpu().kernels() == [*BUILD, "grad_norm_kernel"]
    assert_close(measured[:2], ops.grad_norm_ref(changed)[:2])
    ops.grad_norm([room, other])
    assert gpu().kernels() == ["grad_norm_kernel"]


def test_one_launch_for_any_number_of_tensors():
    grads = list(torch.randn(2000, 3).unbind())
    for expected in (["upload_kernel"] * 3 + ["expand_plan_kernel"], []):
        measured = ops.grad_norm(grads)
        assert gpu().kernels() == [*expected, "grad_norm_kernel"]
        assert_close(measured[:2], ops.grad_norm_ref(grads)[:2])
    ops.clip_(grads, 1.0, 1e9)
    assert gpu().kernels() == ["clip_kernel"]


def test_each_stream_has_plans_of_its_own():
    grads = [torch.randn(100)]
    ops.grad_norm(grads)
    with gpu().stream(5):
        ops.grad_norm(grads)
    assert [(name, stream) for name, _, _, stream in gpu().launches()] == [
        *((name, 0) for name in [*BUILD, "grad_norm_kernel"]),
        *((name, 5) for name in [*BUILD, "grad_norm_kernel"]),
    ]
    with gpu().stream(5):
        ops.grad_norm(grads)
    ops.grad_norm(grads)
    assert gpu().kernels() == ["grad_norm_kernel"] * 2


def test_plans_are_forgotten_when_they_are_many():
    """The limits are smaller here than on a GPU: tests/simt/launchers/runtime.h."""
    lists = [[torch.ones(1)] for _ in range(64)]
    for grads in [*lists, *lists]:
        ops.grad_norm(grads)
    assert gpu().kernels() == [*BUILD, "grad_norm_kernel"] * 64 + ["grad_norm_kernel"] * 64
    ops.grad_norm([torch.ones(1), torch.ones(1)])  # one too many
    gpu().launches()
    ops.grad_norm(lists[1])
    assert gpu().kernels() == ["grad_norm_kernel"]
    ops.grad_norm(lists[0])
    assert gpu().kernels() == [*BUILD, "grad_norm_kernel"]


def test_plans_are_forgotten_when_they_are_large():
    lists = [list(torch.ones(250, 1).unbind()) for _ in range(3)]  # of 112 bytes a tensor
    build = [*BUILD, "grad_norm_kernel"]
    for grads, expected in ((0, build), (1, build), (0, build[-1:]), (2, build), (1, build)):
        ops.grad_norm(lists[grads])
        assert gpu().kernels() == expected
    large = list(torch.ones(625, 1).unbind())  # only this plan is kept
    for expected in (build, build[-1:]):
        assert ops.grad_norm(large).total_norm == 25
        assert gpu().kernels() == expected
    ops.grad_norm(lists[1])
    assert gpu().kernels() == build


def test_threads_share_plans():
    lists = [[torch.full((9000,), float(i)), torch.ones(3)] for i in range(1, 4)]
    wanted = [ops.grad_norm_ref(grads).total_norm.item() for grads in lists]
    wrong = []

    def work():
        for _ in range(10):
            for grads, norm in zip(lists, wanted, strict=True):
                if abs(ops.grad_norm(grads).total_norm.item() - norm) > 1e-6 * norm:
                    wrong.append(norm)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    kernels = gpu().kernels()
    assert wrong == []
    assert kernels.count("grad_norm_kernel") == 120
    assert kernels.count("expand_plan_kernel") == 3


def test_a_captured_call_builds_its_plan_at_each_replay():
    grads, window = [torch.ones(20_000), torch.ones(3)], torch.zeros(3, dtype=F64)
    sums, verdict = [torch.zeros(20_000), torch.zeros(3)], torch.tensor(0)
    ops.grad_norm(grads)  # a plan is kept, and not for the graph
    gpu().launches()
    with gpu().capture():
        measured = ops.grad_norm(grads)
        ops.accumulate_(sums, grads, verdict, window, 1.0)
    assert gpu().launches() == []
    for value in (1.0, 2.0, 3.0):
        for g in grads:
            g.fill_(value)
        gpu().replay()
        assert gpu().kernels() == [*BUILD, "grad_norm_kernel", *BUILD, "accumulate_kernel"]
        assert measured.total_norm.item() == pytest.approx(value * 20_003**0.5)
    assert window.tolist() == [3, 3, 3]
    assert all((s == 6).all() for s in sums)
    gpu().forget_graph()
    ops.grad_norm(grads)
    assert gpu().kernels() == ["grad_norm_kernel"]


def test_what_was_captured_is_not_kept():
    grads = [torch.ones(77)]
    with gpu().capture():
        ops.grad_norm(grads)
    gpu().forget_graph()
    ops.grad_norm(grads)
    assert gpu().kernels() == [*BUILD, "grad_norm_kernel"]
