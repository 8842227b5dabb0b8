"""Adam and AdamW: the step, decisions, GradScaler, closures, kinds of parameters."""

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fastguard
from fastguard import ops
from tests.ops.adamw_cases import scalar, verdict_
from tests.optim.adam_cases import PAIRS, give_grads, parameters, run, state_bits
from tests.tensors import F64, assert_close, assert_same_bits, bits


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([torch.float32, F64]),
    st.fixed_dictionaries(
        {
            "amsgrad": st.booleans(),
            "maximize": st.booleans(),
            "weight_decay": st.sampled_from([0.0, 0.01, 0.3]),
            "betas": st.sampled_from([(0.9, 0.999), (0.9, 0.98), (0.0, 0.5)]),
            "lr": st.sampled_from([1e-5, 1e-3]),
            "eps": st.sampled_from([1e-8, 1e-3]),
        }
    ),
)
@pytest.mark.parametrize("ours, theirs", PAIRS)
def test_the_step_is_torchs(ours, theirs, dtype, options):
    here, there = parameters(dtype), parameters(dtype)
    mine, other = ours(here, **options), theirs(there, **options)
    run(mine, here)
    run(other, there)
    assert_close(here, there)
    for p, q in zip(here, there, strict=True):
        assert mine.state[p].keys() == other.state[q].keys()
        assert mine.state[p]["step"] == other.state[q]["step"] == 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_parameters_have_float32_moments(dtype):
    here, there = parameters(dtype), [p.detach().float() for p in parameters(dtype)]
    mine, other = fastguard.AdamW(here, 0.01), torch.optim.AdamW(there, 0.01)
    for seed in range(4):
        give_grads(here, seed)
        for p, q in zip(here, there, strict=True):
            q.grad = p.grad.float()
            q.copy_(p.detach())  # only the parameter is rounded at every step
        mine.step()
        other.step()
    for p, q in zip(here, there, strict=True):
        assert mine.state[p]["exp_avg"].dtype == mine.state[p]["exp_avg_sq"].dtype == torch.float32
        assert_close([p.detach()], [q.to(dtype)], ulps=1)


def test_a_decision_scales_or_skips():
    here, there = parameters(), parameters()
    mine, other = fastguard.AdamW(here), fastguard.AdamW(there)
    for seed in range(4):
        mine.decision = ops.Decision(scalar(0.25), verdict_(1))
        run(mine, here, [seed])
        assert mine.decision is None  # it was carried out
    run(other, there, scale=0.25)
    assert_same_bits(bits(here), bits(there))
    give_grads(here, 9, scale=math.nan)
    grads = bits([p.grad for p in here])
    mine.decision = ops.Decision(scalar(1.0), verdict_(2))
    state = state_bits(mine)
    mine.step()
    assert_same_bits(bits(here), bits(there))
    assert_same_bits(state_bits(mine), state)
    assert_same_bits(bits([p.grad for p in here]), grads)


@pytest.mark.parametrize("rows", [[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [0, 1, 2, 4, 3, 5]])
def test_a_decision_for_each_gradient(rows):
    here, there = parameters(), parameters()
    mine = fastguard.Adam([{"params": here[:2]}, {"params": here[2:], "lr": 0.01}])
    other = fastguard.Adam([{"params": there[:2]}, {"params": there[2:], "lr": 0.01}])
    coefs = torch.arange(1.0, 7.0, dtype=F64)
    for seed in range(3):
        give_grads(here, seed)
        give_grads(there, seed)
        mine.decision = ops.Decision(coefs, verdict_(1))
        mine.decision_index = {id(p.grad): rows[i] for i, p in enumerate(here)}
        for i, p in enumerate(there):
            p.grad *= coefs[rows[i]]
        mine.step()
        other.step()
    assert_same_bits(bits(here), bits(there))
    mine.decision = ops.Decision(coefs, verdict_(1))
    mine.decision_index.popitem()
    before = bits(here)
    with pytest.raises(RuntimeError, match="6 coefficients, and decision_index does not say"):
        mine.step()
    assert_same_bits(bits(here), before)


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("found", [0.0, 1.0, 2.0, math.nan, math.inf])
def test_found_inf_of_any_value_and_shape(found, shape):
    here, there = parameters(), parameters()
    mine, other = fastguard.AdamW(here), torch.optim.AdamW(there)
    run(mine, here)
    run(other, there)
    before, state = bits(here), state_bits(mine)
    mine.found_inf, mine.grad_scale = torch.full(shape, found), torch.full(shape, 4.0)
    run(mine, here, [7], scale=4.0)
    if found == 0:
        run(other, there, [7])
        assert_close(here, there)
    else:
        assert_same_bits(bits(here), before)
        assert_same_bits(state_bits(mine), state)


def test_a_real_grad_scaler():
    here, there = parameters(), parameters()
    mine, other = fastguard.AdamW(here), torch.optim.AdamW(there)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    for seed in range(6):
        scale = scaler.get_scale()
        scaler.scale(torch.ones(()))  # makes the scale's tensor
        give_grads(here, seed, scale)
        give_grads(there, seed)
        if seed == 3:
            here[4].grad[2, 5] = math.inf
            before = bits(here) + state_bits(mine)
        if seed == 4:
            scaler.unscale_(mine)
        scaler.step(mine)
        scaler.update()
        if seed == 3:
            assert_same_bits(bits(here) + state_bits(mine), before)
            assert scaler.get_scale() == scale / 2
        else:
            other.step()
    assert_close(here, there)
    assert not hasattr(mine, "found_inf")


@pytest.mark.parametrize("each", [False, True])
def test_default_device_and_dtype_change_nothing(each):
    here, there = parameters(), parameters()
    mine, other = fastguard.AdamW(here, amsgrad=True), fastguard.AdamW(there, amsgrad=True)
    coefs = torch.tensor([0.5, 0.25, 1.0, 0.5, 0.75, 0.3], dtype=F64)

    def step(optimizer, params, seed):
        give_grads(params, seed)
        if each:
            optimizer.decision = ops.Decision(coefs, verdict_(1))
            rows = [2, 0, 1, 3, 5, 4]
            optimizer.decision_index = {id(p.grad): rows[i] for i, p in enumerate(params)}
        return optimizer.step

    for seed in range(2):
        step(other, there, seed)()
        call = step(mine, here, seed)
        before = torch.get_default_dtype()
        torch.set_default_dtype(F64)
        try:
            with torch.device("meta"):
                call()
        finally:
            torch.set_default_dtype(before)
    assert_same_bits(bits(here), bits(there))
    assert_same_bits(state_bits(mine), state_bits(other))


def test_amsgrad_turned_on_later_starts_from_zero():
    here = parameters()
    mine = fastguard.Adam(here)
    run(mine, here)
    mine.param_groups[0]["amsgrad"] = True
    run(mine, here, [4])
    for p in here:
        state = mine.state[p]
        assert torch.equal(state["max_exp_avg_sq"], state["exp_avg_sq"])


def test_a_scheduler_with_lr_as_a_tensor_and_hooks():
    here, there = parameters(), parameters()
    mine = fastguard.AdamW(here, lr=torch.tensor(0.01))
    other = torch.optim.AdamW(there, lr=0.01)
    seen = []
    mine.register_step_pre_hook(lambda *args: seen.append("pre"))
    mine.register_step_post_hook(lambda *args: seen.append("post"))
    schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in (mine, other)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in range(4):
            run(mine, here, [seed])
            run(other, there, [seed])
            for schedule in schedules:
                schedule.step()
    assert_close(here, there)
    assert seen == ["pre", "post"] * 4


def test_the_closure_has_gradients_and_its_loss_is_returned():
    p = nn.Parameter(torch.tensor([3.0]))
    mine = fastguard.AdamW([p], lr=0.1, weight_decay=0.0)

    def closure():
        mine.zero_grad()
        loss = (p * p).sum()
        loss.backward()
        return loss

    assert mine.step(closure).item() == 9.0
    assert p.item() == pytest.approx(2.9)
    assert mine.step() is None


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_parameters(dtype):
    torch.manual_seed(0)
    start, real = torch.randn(7, 3, dtype=dtype), torch.randn(4)
    here, there = ([nn.Parameter(start.clone()), nn.Parameter(real.clone())] for _ in range(2))
    options = {"amsgrad": True, "maximize": True}
    mine, other = fastguard.Adam(here, **options), torch.optim.Adam(there, **options)
    for _ in range(3):
        grad = torch.randn(7, 3, dtype=dtype)
        for params in (here, there):
            params[0].grad, params[1].grad = grad.clone(), grad.real.flatten()[:4].float()
        mine.step()
        other.step()
    torch.testing.assert_close(here[0], there[0], rtol=1e-5, atol=1e-6)
    assert_close(here[1:], there[1:])


def test_a_sparse_gradient_is_refused_before_anything_is_written():
    dense, sparse = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(5))
    mine = fastguard.Adam([{"params": [dense]}, {"params": [sparse]}])
    for _ in range(2):  # when the state is made, and when it is there already
        dense.grad = torch.ones(3)
        sparse.grad = torch.ones(5).to_sparse()
        before = bits([dense])
        with pytest.raises(
            RuntimeError, match=r"Adam does not support sparse gradients.*sparse=False"
        ):
            mine.step()
        assert_same_bits(bits([dense]), before)
        sparse.grad = torch.ones(5)
        mine.step()


def test_no_parameter_has_a_gradient():
    p = nn.Parameter(torch.ones(3))
    mine = fastguard.AdamW([p])
    mine.step()
    assert not mine.state
    mine.found_inf = 0  # what GradScaler makes of no gradients
    mine.step()


def test_a_parameter_given_twice_is_stepped_once():
    p, q = (nn.Parameter(torch.ones(3)) for _ in range(2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mine = fastguard.Adam([p, p])
    run(mine, [p])
    run(fastguard.Adam([q]), [q])
    assert torch.equal(p, q)


def test_the_host_reads_nothing():
    """On the meta device reading a value raises."""
    params = [nn.Parameter(torch.empty(3, device="meta")) for _ in range(2)]
    for p in params:
        p.grad = torch.empty(3, device="meta")
    mine = fastguard.AdamW(params, amsgrad=True, maximize=True)
    mine.step()
    mine.found_inf = mine.grad_scale = torch.empty(1, device="meta")
    mine.step()
    verdict = torch.empty((), dtype=torch.int64, device="meta")
    mine.decision = ops.Decision(torch.empty(2, dtype=F64, device="meta"), verdict)
    mine.decision_index = {id(p.grad): 1 - i for i, p in enumerate(params)}
    mine.step()
    with pytest.raises(RuntimeError):
        verdict.item()
