"""What adamw_ refuses, what it leaves as it was, and how its packed state lies."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastguard import ops
from fastguard.ops import _library
from tests.native import needs_kernel
from tests.ops.adamw_cases import OPTIONS, PACKED, ROLES, flat, lists, packed, scalar, verdict_
from tests.tensors import F64, assert_same_bits, bits


def wrong_arguments():
    """(the message, what makes the last of many tensors wrong)."""

    def put(name, value):
        return lambda kwargs: kwargs[name].__setitem__(-1, value)

    def change(name, function):
        return lambda kwargs: kwargs.__setitem__(name, function(kwargs[name]))

    def set_(name, value):
        return change(name, lambda _: value)

    size, packed_size = 6 * 40_000 + 16, r"contiguous .* tensor of shape \(240016,\), the last of"
    yield r"grads has 6 tensors; with 7 params", lambda kwargs: kwargs["grads"].pop()
    yield rf"exp_avg must be a {packed_size}.*\(240015,\)", change("exp_avg", lambda t: t[1:])
    yield (
        rf"exp_avg_sq must be a {packed_size}.*\(240017,\)",
        set_("exp_avg_sq", torch.ones(size + 1)),
    )
    yield rf"max_exp_avg_sq must be a {packed_size}.*\(0,\)", set_("max_exp_avg_sq", torch.ones(0))
    yield (
        rf"exp_avg must be a {packed_size}.*not contig",
        change("exp_avg", lambda t: t.repeat_interleave(2)[::2]),
    )
    yield rf"exp_avg must be a {packed_size}.*\(1, 240016\)", change("exp_avg", lambda t: t[None])
    yield (
        rf"exp_avg must be a {packed_size}.*not contig",
        set_("exp_avg", torch.ones(1).expand(size)),
    )
    yield r"exp_avg must be .*got .*(float64|Double)", change("exp_avg", torch.Tensor.double)
    yield (
        r"max_exp_avg_sq must .*got .*(BF|bf)loat16",
        change("max_exp_avg_sq", torch.Tensor.bfloat16),
    )
    yield r"max_exp_avg_sq must be .*\(0,\), as amsgrad is off; got", set_("amsgrad", False)
    yield (
        r"state_steps must be a .*\(7,\), one step for each",
        change("state_steps", lambda t: t[1:]),
    )
    yield (
        r"state_steps must be .*got .*(float64|Double)",
        change("state_steps", torch.Tensor.double),
    )
    yield r"params\[6\] has dtype .*; float32, float64", put("params", torch.zeros(3).int())
    yield r"params\[6\] has dtype .*a call of their own", put("params", torch.zeros(3).double())
    yield r"grads\[6\] has shape \(1, 3\), its parameter \(3,\)", put("grads", torch.zeros(1, 3))
    yield r"grads\[6\] has dtype .*its parameter", put("grads", torch.zeros(3).half())
    yield r"params\[6\] is expanded.*clone it", put("params", torch.zeros(1).expand(3))
    yield r"grad_coef must be a float64.*\(7,\)", set_("grad_coef", torch.tensor(1.0))
    yield r"grad_coef must be .*shape \(6,\)", set_("grad_coef", torch.ones(6, dtype=F64))
    yield r"verdict must be an int64", set_("verdict", torch.tensor(0.0))
    yield r"verdict must be .*shape \(1,\)", set_("verdict", torch.tensor([0]))


@pytest.mark.parametrize("function", PACKED)
@pytest.mark.parametrize("message, spoil", list(wrong_arguments()))
def test_nothing_is_written_where_the_last_tensor_is_wrong(function, message, spoil):
    tensors = packed(lists([(40_000,)] * 6 + [(3,)], [torch.float32] * 7, amsgrad=True))
    kwargs = {**tensors, "grad_coef": scalar(1.0), "verdict": verdict_(0), **OPTIONS}
    kwargs["amsgrad"] = True
    spoil(kwargs)
    before = bits(flat(kwargs))
    with pytest.raises(RuntimeError, match=f"adamw_: ({message})"):
        function(**kwargs)
    assert_same_bits(bits(flat(kwargs)), before)


def test_a_parameter_that_overlaps_itself_is_refused():
    tensors = packed(lists([(3, 4)], [torch.float32]))
    tensors["params"] = [torch.zeros(10).as_strided((3, 4), (2, 1))]
    if _library.has_kernel(tensors["params"][0]):
        with pytest.raises(RuntimeError, match=r"params\[0\] is expanded or overlaps itself"):
            ops.adamw_(**tensors, grad_coef=scalar(1.0), verdict=verdict_(0), **OPTIONS)


def test_copy_on_write_tensors_are_their_own_afterwards():
    tensors = packed(lists([(50,)], [torch.float32]))
    before = bits(flat(tensors))
    copies = {
        name: [torch._lazy_clone(t) for t in ts] if isinstance(ts, list) else torch._lazy_clone(ts)
        for name, ts in tensors.items()
    }
    ops.adamw_(**copies, grad_coef=scalar(1.0), verdict=verdict_(0), **OPTIONS)
    assert_same_bits(bits(flat(tensors)), before)
    for this, that in zip(flat(copies), flat(tensors), strict=True):
        assert torch.equal(this, that) == (this is copies["grads"][0] or this.numel() == 0)


@pytest.mark.parametrize("function", PACKED)
def test_versions_are_bumped_for_what_is_written_alone(function):
    tensors = packed(lists([(5,)], [torch.float32], amsgrad=True))
    before = [t._version for t in flat(tensors)]
    options = OPTIONS | {"amsgrad": True}
    function(**tensors, grad_coef=scalar(1.0), verdict=verdict_(0), **options)
    after = [t._version for t in flat(tensors)]
    bumped = {n for n, b, a in zip(ROLES, before, after, strict=True) if a > b}
    assert bumped == set(ROLES) - {"grads"}


@needs_kernel
@pytest.mark.parametrize("verdict", [0, 2])
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("dtypes", [[F64] * 4, [torch.float32, torch.bfloat16, torch.float16] * 2])
def test_opcheck_adamw_(verdict, amsgrad, dtypes):
    shapes = [(3,), (0,), (2, 3), ()]
    tensors = packed(lists(shapes, dtypes[:4], amsgrad, ["transposed"] * 20))
    options = (1e-2, 0.9, 0.98, 0.1, 1e-8, True, amsgrad, False)
    torch.library.opcheck(
        torch.ops.fastguard.adamw_.default,
        (*tensors.values(), scalar(0.5), verdict_(verdict), *options),
    )


def test_packed_offsets():
    assert ops.packed_offsets([]) == [0]
    assert ops.packed_offsets([1, 0, 16, 17, 3]) == [0, 16, 16, 32, 64, 80]


@given(st.lists(st.one_of(st.integers(0, 70), st.integers(0, 20_000)), max_size=8), st.booleans())
@pytest.mark.parametrize("function", PACKED)
def test_the_kernels_offsets_are_pythons(function, numels, wide):
    dtype = F64 if wide and numels else torch.float32
    offsets = ops.packed_offsets(numels)
    assert all(offset % 16 == 0 for offset in offsets)
    state = [torch.zeros(offsets[-1], dtype=dtype) for _ in range(2)]
    grads = [torch.full((n,), i + 1.0, dtype=dtype) for i, n in enumerate(numels)]
    params = [torch.zeros_like(g) for g in grads]
    options = OPTIONS | {"beta1": 0.0}
    function(
        params, grads, *state, torch.zeros(0, dtype=dtype), torch.zeros(len(numels)),
        grad_coef=scalar(1.0), verdict=verdict_(0), **options,
    )  # fmt: skip
    right = torch.zeros(offsets[-1], dtype=dtype)
    for i, (n, offset) in enumerate(zip(numels, offsets, strict=False)):
        right[offset : offset + n] = i + 1
    assert torch.equal(state[0], right)


@pytest.mark.parametrize("function", PACKED)
def test_the_packed_state_may_itself_be_a_part_of_something(function):
    results = []
    for begin in (0, 5):
        tensors = packed(lists([(3, 5), (7,)], [torch.float32] * 2, True, ["transposed"] * 10))
        for name in ROLES[2:]:
            whole = torch.cat([torch.ones(begin), tensors[name], torch.ones(1)])
            tensors[name] = whole[begin:-1]
        options = OPTIONS | {"amsgrad": True}
        function(**tensors, grad_coef=scalar(0.5), verdict=verdict_(1), **options)
        results.append(bits(flat(tensors)))
    assert_same_bits(*results)
