"""Arguments that launchers refuse: tensors of several devices, and invalid arguments."""

import pytest
import torch

from fastguard import ops
from fastguard.thresholds import AdaGC
from tests.simt.launchers.tensors import F64, RULE, scalar

from . import gpu


def test_launches_go_to_the_device_of_the_tensors():
    grads = [torch.ones(10), torch.ones(5)]
    with gpu().on_device(1, *grads):
        measured = ops.grad_norm(grads)
    ops.grad_norm(grads)
    devices = [device for _, _, device, _ in gpu().launches()]
    assert devices == [1, 1, 1, 0, 0, 0]
    assert measured.total_norm == pytest.approx(15**0.5)


STATISTICS = ["statistics", "seen_norms", "accepted_norms", "per_tensor"]

OTHERS = ["unscale", "loss", *STATISTICS, "scale", "growth_tracker"]


@pytest.mark.parametrize("device", [-1, 1])
def test_tensors_of_several_devices_are_refused(device):
    """They are refused before a launch: a read of another device's memory breaks the context."""
    here, there = [torch.ones(4) for _ in range(3)], [torch.ones(4) for _ in range(3)]
    one, verdict, window = scalar(2.0), torch.tensor(0), torch.ones(3, dtype=F64)
    m, v, steps, none = torch.zeros(48), torch.zeros(48), torch.zeros(3), torch.zeros(0)
    master = torch.zeros(48)
    norms, owners = torch.ones(3, dtype=F64), torch.arange(3)
    decided = {
        "unscale": scalar(1.0), "loss": scalar(1.0), "statistics": torch.zeros(4, dtype=F64),
        "seen_norms": torch.zeros(4, dtype=F64), "accepted_norms": torch.zeros(4, dtype=F64),
        "per_tensor": torch.ones(4, 3, dtype=F64),
        "scale": torch.ones(1), "growth_tracker": torch.zeros(1, dtype=torch.int32),
    }  # fmt: skip

    def adamw():
        ops.adamw_(here, there, m, v, none, steps, one, verdict, *RULE, False, False)

    def with_masters():
        half, grads = [t.bfloat16() for t in here], [t.bfloat16() for t in there]
        ops.adamw_(half, grads, m, v, none, steps, one, verdict, *RULE, False, False, master)

    def decide():
        known = ops.Statistics(*(decided[name] for name in STATISTICS))
        scaling = ops.Scaling(decided["scale"], decided["growth_tracker"], 2.0, 0.5, 1)
        rest = (decided["unscale"], decided["loss"], known, 0, AdaGC(), 1.0, 1e9, scaling)
        ops.grad_norm_decide_(here, *rest)

    def decide_alone():
        known = ops.Statistics(*(decided[name] for name in STATISTICS))
        measured = ops.GradNorm(one, norms, None)
        rest = (decided["unscale"], decided["loss"], known, 0, AdaGC(), 1.0, 1e9)
        ops.guard_decide_(measured, *rest)

    runs = [
        (lambda: ops.grad_norm(here), here[2], "grad_norm: tensor 2 is not on cuda:0"),
        (lambda: ops.grad_norm(here), here[0], "."),
        (lambda: ops.scale_(here, one), here[1], "scale_: tensor 1 is not on cuda:0"),
        (lambda: ops.scale_(here, one), one, "scale_: clip_coef is not on cuda:0"),
        (lambda: ops.clip_(here, 1.0, 1e9), here[1], "clip_: tensor 1 is not on cuda:0"),
        (lambda: ops.accumulate_(here, there, verdict, window, 1.0), there[2], "tensor 2 is not"),
        (lambda: ops.accumulate_(here, there, verdict, window, 1.0), verdict, "verdict is not on"),
        (lambda: ops.settle_(here, there, verdict, owners), there[2], "settle_: tensor 2 is not"),
        (lambda: ops.settle_(here, there, verdict, owners), owners, "settle_: owners is not on"),
        (adamw, here[1], r"adamw_: params\[1\] is not on cuda:0"),
        (adamw, there[2], r"adamw_: grads\[2\] is not on cuda:0"),
        (adamw, m, "adamw_: exp_avg is not on cuda:0"),
        (adamw, v, "adamw_: exp_avg_sq is not on cuda:0"),
        (adamw, steps, "adamw_: state_steps is not on cuda:0"),
        (adamw, one, "adamw_: grad_coef is not on cuda:0"),
        (adamw, verdict, "adamw_: verdict is not on cuda:0"),
        (with_masters, master, "adamw_: master_param is not on cuda:0"),
        (decide_alone, norms, "guard_decide_: norms is not on cuda:0"),
        *((decide, decided[name], ".") for name in OTHERS),
        *((decide_alone, decided[name], f"guard_decide_: {name} is not on") for name in OTHERS[:6]),
    ]
    for run, elsewhere, text in runs:
        with gpu().on_device(device, elsewhere), pytest.raises(RuntimeError, match=text):
            run()
        assert gpu().launches() == [], text
    assert all((t == 1).all() for t in [*here, *there])


def test_wrong_arguments_are_named_and_nothing_is_written():
    good, verdict = torch.ones(4), torch.tensor(0)
    window = torch.ones(3, dtype=F64)
    ints = torch.ones(4, dtype=torch.int64)
    m, v, steps, none = torch.zeros(16), torch.zeros(16), torch.zeros(1), torch.zeros(0)
    one, half = torch.arange(1), torch.ones(4).half()

    def adamw(params=(good,), grads=(good,), m=m, v=v, most=none, steps=steps, amsgrad=False):
        rest = (scalar(1.0), verdict, *RULE, amsgrad, False)
        ops.adamw_(list(params), list(grads), m, v, most, steps, *rest)

    runs = [
        (lambda: ops.grad_norm([good, ints]), "tensor 1 has dtype number"),
        (lambda: ops.scale_([good, ints], scalar(2.0)), "scale_: tensor 1 has dtype number"),
        (lambda: ops.scale_([good], torch.tensor(2.0)), "clip_coef must be a float64 tensor"),
        (lambda: ops.scale_([good], torch.ones(2, dtype=F64)), "clip_coef must be"),
        (lambda: ops.clip_([good, ints], 1.0, 1e9), "clip_: tensor 1 has dtype number"),
        (lambda: ops.accumulate_([good], [], verdict, window, 1.0), "1 sums, 0 gradients"),
        (lambda: ops.accumulate_([good], [torch.ones(5)], verdict, window, 1.0), "sum 0 must have"),
        (lambda: ops.accumulate_([good], [good.double()], verdict, window, 1.0), "be float64 for"),
        (lambda: ops.accumulate_([half], [half], verdict, window, 1.0), "float32 for any other"),
        (lambda: torch.ops.fastguard.settle_([good], [], verdict, one), "1 buffers but 0 saved"),
        (lambda: ops.settle_([good], [torch.ones(5)], verdict, one), "differ in shape"),
        (lambda: ops.decide(torch.tensor(1.0), 1.0, 1.0), "total_norm must be a float64"),
        (lambda: adamw(grads=()), "grads has 0 tensors"),
        (lambda: adamw([ints], [ints]), r"params\[0\] has dtype Long"),
        (lambda: adamw(m=torch.zeros(15)), "exp_avg must be a contiguous Float tensor of shape"),
        (lambda: adamw(amsgrad=True), "max_exp_avg_sq must be"),
        (lambda: adamw([good.expand(2, 4)], [torch.ones(2, 4)]), "is expanded"),
    ]
    for run, text in runs:
        with pytest.raises(RuntimeError, match=text):
            run()
    assert gpu().launches() == []
    assert (good == 1).all() and (window == 1).all() and not m.any()
