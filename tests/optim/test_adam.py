"""Adam and AdamW against torch's, and adamw_ against a float64 step written out here."""

import copy
import io
import math
import pickle
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fastguard
from fastguard import ops
from fastguard.ops import Verdict, _library
from tests.drawn import DTYPES
from tests.ops.test_ops import assert_same_from_every_instruction_set, needs_kernel
from tests.simt.kernels.devices import DEVICES

F64 = torch.float64
PAIRS = [(fastguard.Adam, torch.optim.Adam), (fastguard.AdamW, torch.optim.AdamW)]
ROLES = ("params", "grads", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "state_steps")

OPTIONS = {
    "lr": 1e-2,
    "beta1": 0.9,
    "beta2": 0.98,
    "weight_decay": 0.1,
    "eps": 1e-8,
    "decoupled_weight_decay": True,
    "amsgrad": False,
    "maximize": False,
}


def pack(params, moments, dtype, fill=0.0):
    """One tensor out of each parameter's moments; ``fill`` lies between them."""
    offsets = ops.packed_offsets(p.numel() for p in params)
    packed = torch.full((offsets[-1] if moments else 0,), fill, dtype=dtype)
    for p, moment, offset in zip(params, moments, offsets, strict=False):
        ops.packed_view(packed, p, offset).copy_(moment)
    return packed


def on_lists(function):
    """An op's function on lists of moments and steps: a call for each dtype of moments."""

    def call(params, grads, exp_avg, exp_avg_sq, max_exp_avg_sq, state_steps, *, grad_coef, **kw):
        for wide in {p.dtype == F64 for p in params} or {False}:
            rows = [i for i, p in enumerate(params) if (p.dtype == F64) == wide]
            some = [params[i] for i in rows]
            dtype = F64 if wide else torch.float32
            moments = [[m[i] for i in rows if m] for m in (exp_avg, exp_avg_sq, max_exp_avg_sq)]
            packed = [pack(some, m, dtype, fill=77.0) for m in moments]
            steps = torch.tensor([state_steps[i] for i in rows])
            coef = grad_coef if grad_coef.dim() == 0 else grad_coef[rows]
            function(some, [grads[i] for i in rows], *packed, steps, grad_coef=coef, **kw)
            offsets = ops.packed_offsets(p.numel() for p in some)
            for whole, parts in zip(packed, moments, strict=True):
                for p, part, offset in zip(some, parts, offsets, strict=False):
                    view = ops.packed_view(whole, p, offset)
                    part.copy_(view)
                    view.fill_(77.0)
                assert (whole == 77.0).all()  # the gaps between parameters
            for i, step in zip(rows, steps, strict=True):
                state_steps[i].copy_(step)

    return call


FUNCTIONS = [
    pytest.param(on_lists(ops.adamw_), id="adamw_"),
    pytest.param(on_lists(ops.adamw_ref_), id="adamw_ref_"),
]
PACKED = [ops.adamw_, ops.adamw_ref_]
CUDA = [pytest.param(on_lists(d.values[0].adamw_), id=f"adamw_ {d.id}") for d in DEVICES]


def scalar(value):
    return torch.tensor(value, dtype=F64)


def verdict_(value):
    return torch.tensor(int(value))


def moment_dtype(dtype):
    return F64 if dtype == F64 else torch.float32


def laid_out(tensor, layout):
    """The same values in another order or with gaps."""
    if layout == "transposed" and tensor.dim() >= 2:
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "gaps":
        wide = torch.full((*tensor.shape, 2), 7.0, dtype=tensor.dtype)
        wide[..., 0] = tensor
        return wide[..., 0]
    if layout == "offset":
        return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)
    return tensor.clone()


def lists(shapes, dtypes, amsgrad=False, layouts=None, seed=0, grad_dtypes=None, step=3.0):
    """The op's tensors, the state as lists, in the middle of a training."""
    generator = torch.Generator().manual_seed(seed)
    layouts = iter(layouts or ["contiguous"] * 5 * len(shapes))

    def drawn(shape, dtype, positive=False):
        values = torch.randn(shape, generator=generator, dtype=F64)
        # Away from 0, where the quotient of the moments is all rounding.
        values = values.square() + 0.01 if positive else values
        return laid_out(values.to(dtype), next(layouts))

    result = {name: [] for name in ROLES}
    for shape, dtype, grad_dtype in zip(shapes, dtypes, grad_dtypes or dtypes, strict=True):
        result["params"].append(drawn(shape, dtype))
        result["grads"].append(drawn(shape, grad_dtype))
        result["exp_avg"].append(drawn(shape, moment_dtype(dtype)))
        result["exp_avg_sq"].append(drawn(shape, moment_dtype(dtype), positive=True))
        largest = drawn(shape, moment_dtype(dtype), positive=True)
        if amsgrad:
            result["max_exp_avg_sq"].append(largest)
        result["state_steps"].append(torch.tensor(step + len(result["state_steps"]) % 3))
    return result


def bits(tensors):
    return [torch.cat([t.detach().reshape(-1)]).view(torch.uint8) for t in tensors]


def assert_same_bits(these, those):
    assert len(these) == len(those)
    for this, that in zip(these, those, strict=True):
        assert torch.equal(this, that)


def everything(tensors):
    return [t for name in ROLES for t in tensors[name]]


def expected(tensors, coefs, **options):
    """What one step must make of copies of the tensors, in float64."""
    o = OPTIONS | options
    result = {name: [] for name in ROLES}
    for i, step in enumerate(tensors["state_steps"]):
        t = step.item() + 1
        p, g, m, v = (tensors[name][i].double() for name in ROLES[:4])
        g = g * coefs[i] * (-1 if o["maximize"] else 1)
        decay = o["weight_decay"] * p
        if not o["decoupled_weight_decay"]:
            g, decay = g + decay, 0.0
        m = o["beta1"] * m + (1 - o["beta1"]) * g
        v = o["beta2"] * v + (1 - o["beta2"]) * g * g
        root = v
        if o["amsgrad"]:
            root = torch.maximum(v, tensors["max_exp_avg_sq"][i].double())
            result["max_exp_avg_sq"].append(root)
        m_hat, v_hat = m / (1 - o["beta1"] ** t), root / (1 - o["beta2"] ** t)
        p = p - o["lr"] * (decay + m_hat / (v_hat.sqrt() + o["eps"]))
        for name, value in zip(ROLES[:4], (p, None, m, v), strict=True):
            result[name].append(value)
        result["state_steps"].append(torch.tensor(t))
    return result


def assert_stepped(found, right, grads_before):
    assert_same_bits(bits(found["grads"]), grads_before)
    for name in ROLES[2:] + ROLES[:1]:
        assert len(found[name]) == len(right[name])
        for tensor, value in zip(found[name], right[name], strict=True):
            eps = torch.finfo(tensor.dtype).eps
            # A few roundings of the terms, which may cancel; they are of the size of 1 to 30.
            torch.testing.assert_close(tensor.double(), value.double(), rtol=4 * eps, atol=60 * eps)


layout = st.sampled_from(["contiguous", "transposed", "gaps", "offset"])
shapes_ = st.lists(
    st.one_of(
        st.lists(st.integers(0, 5), max_size=4).map(tuple),
        st.sampled_from([(1,), (255,), (257,), (16385,), (3, 11003), (40000,)]),
    ),
    max_size=5,
)


@settings(max_examples=120, deadline=None)
@given(st.data())
@pytest.mark.parametrize("function", FUNCTIONS)
def test_adamw_(function, data):
    check_adamw_(function, data)


@settings(max_examples=40, deadline=None)
@given(st.data())
@pytest.mark.parametrize("function", CUDA)
def test_adamw_of_the_cuda_kernel(function, data):
    check_adamw_(function, data)


def check_adamw_(function, data):
    shapes = data.draw(shapes_)
    n = len(shapes)
    dtypes = data.draw(st.lists(st.sampled_from(DTYPES), min_size=n, max_size=n))
    grad_dtypes = [d if d == F64 or data.draw(st.booleans()) else torch.float32 for d in dtypes]
    options = {
        "amsgrad": data.draw(st.booleans()),
        "maximize": data.draw(st.booleans()),
        "decoupled_weight_decay": data.draw(st.booleans()),
        "weight_decay": data.draw(st.sampled_from([0.0, 0.1])),
        "beta1": data.draw(st.sampled_from([0.0, 0.5, 0.9])),
        "beta2": data.draw(st.sampled_from([0.0, 0.98, 0.999])),
        "lr": data.draw(st.sampled_from([1e-5, 1e-2])),
    }
    options["eps"] = 1e-8 if options["beta2"] else 0.1
    tensors = lists(
        shapes,
        dtypes,
        options["amsgrad"],
        data.draw(st.lists(layout, min_size=5 * n, max_size=5 * n)),
        data.draw(st.integers(0, 2**31)),
        grad_dtypes,
        step=float(data.draw(st.sampled_from([0, 1, 1000]))),
    )
    each = data.draw(st.booleans())
    coefs = [data.draw(st.floats(0.01, 2.0)) for _ in range(n if each else 1)]
    coef = torch.tensor(coefs, dtype=F64) if each else scalar(coefs[0])
    verdict = verdict_(data.draw(st.sampled_from([Verdict.APPLY, Verdict.CLIP])))
    right = expected(tensors, coefs if each else coefs * n, **options)
    grads_before = bits(tensors["grads"])
    function(**tensors, grad_coef=coef, verdict=verdict, **(OPTIONS | options))
    assert_stepped(tensors, right, grads_before)


@needs_kernel
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("decoupled", [False, True])
def test_the_kernel_rounds_as_the_reference_does(amsgrad, maximize, decoupled):
    """Moments bit for bit; parameters too, but that torch's sqrt and pow may miss the last bit."""
    dtypes = [*DTYPES, torch.bfloat16, torch.float16]
    grad_dtypes = [*DTYPES, torch.float32, torch.float32]
    shapes = [(1000,), (33, 31), (7,), (20_000,), (300,), ()]
    options = {"amsgrad": amsgrad, "maximize": maximize, "decoupled_weight_decay": decoupled}
    results = []
    for function in map(on_lists, PACKED):
        tensors = lists(shapes, dtypes, amsgrad, grad_dtypes=grad_dtypes)
        for verdict in (Verdict.APPLY, Verdict.SKIP_OUTLIER, Verdict.CLIP):
            function(
                **tensors,
                grad_coef=scalar(0.3),
                verdict=verdict_(verdict),
                **(OPTIONS | {**options, "weight_decay": 0.1 if decoupled else 0.0}),
            )
        results.append(tensors)
    here, there = results
    assert_close(here["params"], there["params"], ulps=1)
    for name in ROLES[1:]:
        assert_same_bits(bits(here[name]), bits(there[name]))


@pytest.mark.parametrize("function", FUNCTIONS + CUDA)
@pytest.mark.parametrize("verdict", [2, 3, 77, -1])
@pytest.mark.parametrize("coef", [1.0, math.nan, math.inf])
def test_a_skip_writes_nothing(function, verdict, coef):
    tensors = lists([(5,), (300, 7), (40_000,), ()], DTYPES, amsgrad=True)
    for tensor in everything(tensors):
        if tensor.numel() > 1:
            tensor.view(-1)[:3] = torch.tensor([math.nan, math.inf, -math.inf])
    before = bits(everything(tensors))
    options = OPTIONS | {"amsgrad": True}
    function(**tensors, grad_coef=scalar(coef), verdict=verdict_(verdict), **options)
    assert_same_bits(bits(everything(tensors)), before)


@pytest.mark.parametrize("function", FUNCTIONS + CUDA)
@pytest.mark.parametrize(
    "size, coef", [(1e38, 1e-43), (3e38, 1e-44), (1e-30, 1e30), (1e-38, 1e40), (1e38, 3e-38)]
)
def test_a_coefficient_beyond_float_gives_the_right_product(function, size, coef):
    grad = torch.tensor([1.0, -0.7, 0.3]) * size
    tensors = {
        "params": [torch.zeros(3)],
        "grads": [grad],
        "exp_avg": [torch.zeros(3)],
        "exp_avg_sq": [torch.zeros(3)],
        "max_exp_avg_sq": [],
        "state_steps": [torch.tensor(0.0)],
    }
    options = OPTIONS | {"beta1": 0.0}
    function(**tensors, grad_coef=scalar(coef), verdict=verdict_(1), **options)
    product = (grad.double() * coef).float()
    assert torch.equal(tensors["exp_avg"][0], product)
    if size * coef > 1e-4:
        torch.testing.assert_close(tensors["params"][0], -0.01 * grad.sign(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("function", FUNCTIONS + CUDA)
def test_amsgrad_does_not_swallow_a_nan(function):
    tensors = lists([(4,)], [torch.float32], amsgrad=True)
    tensors["exp_avg_sq"][0][1] = math.nan
    tensors["max_exp_avg_sq"][0][2] = math.nan
    options = OPTIONS | {"amsgrad": True}
    function(**tensors, grad_coef=scalar(1.0), verdict=verdict_(0), **options)
    assert tensors["max_exp_avg_sq"][0].isnan().tolist() == [False, True, True, False]
    assert tensors["params"][0].isnan().tolist() == [False, True, True, False]


@needs_kernel
def test_adamw_does_not_depend_on_threads():
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            tensors = lists([(100_001,), (7,), (300, 65), (70_000,)], DTYPES)
            step = on_lists(ops.adamw_)
            step(**tensors, grad_coef=scalar(0.3), verdict=verdict_(1), **OPTIONS)
            results.append(bits(everything(tensors)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert_same_bits(results[0], other)


_DUMP = """
import hashlib, torch
from fastguard import ops
torch.manual_seed(1)
sizes = (1, 7, 8, 63, 255, 257, 4097, 20_003)
digest = hashlib.sha256()
for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    moment = torch.promote_types(dtype, torch.float32)
    for amsgrad, coupled in ((False, False), (True, False), (False, True), (True, True)):
        params, grads = ([torch.randn(n).to(dtype) for n in sizes] for _ in range(2))
        size = ops.packed_offsets(sizes)[-1]
        m, v, largest = (torch.rand(size, dtype=moment) for _ in range(3))
        steps = torch.full((len(sizes),), 2.0)
        ops.adamw_(params, grads, m, v, largest if amsgrad else largest[:0], steps,
                   torch.tensor(0.37, dtype=torch.float64), torch.tensor(0),
                   1e-2, 0.9, 0.98, 0.1, 1e-8, not coupled, amsgrad, False)
        for t in (*params, m, v, largest):
            digest.update(t.view(torch.uint8).numpy().tobytes())
print(ops.cpu_info()["chosen"], digest.hexdigest())
"""


@needs_kernel
def test_every_instruction_set_steps_to_the_same_bits():
    assert_same_from_every_instruction_set(_DUMP)


def packed(tensors):
    """The op's arguments out of lists; the parameters are of one dtype of moments."""
    dtype = moment_dtype(tensors["params"][0].dtype) if tensors["params"] else torch.float32
    state = {name: pack(tensors["params"], tensors[name], dtype) for name in ROLES[2:5]}
    steps = torch.tensor([float(step) for step in tensors["state_steps"]])
    return {**tensors, **state, "state_steps": steps}


def flat(kwargs):
    return [*kwargs["params"], *kwargs["grads"], *(kwargs[name] for name in ROLES[2:])]


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


MEMORY = torch.zeros(12)


@pytest.mark.parametrize(
    "tensors, shared",
    [
        ([MEMORY[:6], MEMORY[6:]], None),
        ([MEMORY[6:], MEMORY[:7]], (1, 0)),
        ([MEMORY[:2], MEMORY[3:], MEMORY[5:6], torch.zeros(12)], (1, 2)),
        ([MEMORY.view(3, 4).t(), MEMORY[11:]], (0, 1)),
        ([MEMORY[::2], MEMORY[1::2]], None),
        ([MEMORY[::2], MEMORY[::3]], (0, 1)),
        ([MEMORY[:0], MEMORY[:0], MEMORY], None),
    ],
)
def test_tensors_that_share_memory_are_found(tensors, shared):
    assert ops.sharing_memory(tensors) == shared


def test_parameters_that_share_memory_are_refused_and_none_is_written():
    memory = torch.ones(10)
    whole, *shared = map(torch.nn.Parameter, (torch.ones(3), memory[:6], memory[4:]))
    for p in (whole, *shared):
        p.grad = torch.ones_like(p)
    optimizer = fastguard.AdamW([whole, *shared], lr=0.1)
    with pytest.raises(RuntimeError, match="parameters 1 and 2 of group 0 share memory"):
        optimizer.step()
    assert (memory == 1).all() and (whole == 1).all()
    optimizer.param_groups[0]["params"].pop()
    optimizer.step()
    assert (memory[:6] < 1).all() and (memory[6:] == 1).all()


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


# --- the optimizers -----------------------------------------------------------------------------


def parameters(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    shapes = [(5,), (4, 3, 3, 3), (0,), (), (33, 7), (70, 300)]
    listed = [nn.Parameter(torch.randn(shape, dtype=F64).to(dtype)) for shape in shapes]
    listed[1].data = listed[1].data.contiguous(memory_format=torch.channels_last)
    listed[4].data = listed[4].data.t().contiguous().t()
    return listed


def give_grads(params, seed, scale=1.0, as_parameters=False):
    """Row-major gradients; ``as_parameters``, laid out as autograd does it."""
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        values = torch.randn(p.shape, generator=generator, dtype=F64)
        p.grad = (values * scale).to(p.dtype)
        if as_parameters:
            p.grad = torch.empty_like(p).copy_(p.grad)


def run(optimizer, params, steps=range(4), **kwargs):
    for seed in steps:
        give_grads(params, seed, **kwargs)
        optimizer.step()


def assert_close(these, those, ulps=8):
    for this, that in zip(these, those, strict=True):
        eps = torch.finfo(this.dtype).eps
        torch.testing.assert_close(this, that, rtol=ulps * eps, atol=ulps * eps)


def state_bits(optimizer):
    return bits([t for s in optimizer.state.values() for t in s.values()])


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


@pytest.mark.parametrize("ours, theirs", PAIRS)
@pytest.mark.parametrize(
    "implementation", [{}, {"foreach": True}, {"fused": True}, {"foreach": False}]
)
def test_state_dicts_load_both_ways(ours, theirs, implementation):
    # torch's fused step on the CPU takes a gradient that is laid out otherwise in memory order.
    laid = {"as_parameters": True}
    options = {"amsgrad": True, "betas": (0.8, 0.9), "weight_decay": 0.1}
    here, there = parameters(), parameters()
    other = theirs(there, **options, **implementation)
    run(other, there, **laid)
    for p, q in zip(here, there, strict=True):
        p.data = q.data.clone()
    mine = ours(here)
    mine.load_state_dict(other.state_dict())
    run(mine, here, range(4, 7), **laid)
    run(other, there, range(4, 7), **laid)  # whose state is not shared
    assert_close(here, there)
    back = theirs(there, **implementation)
    back.load_state_dict(copy.deepcopy(mine.state_dict()))
    for p, q in zip(here, there, strict=True):
        q.data = p.data.clone()
    run(mine, here, range(7, 9), **laid)
    run(back, there, range(7, 9), **laid)
    assert_close(here, there)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, F64])
@pytest.mark.parametrize("way", ["state_dict", "deepcopy", "pickle"])
def test_our_own_state_survives(dtype, way):
    params = parameters(dtype)
    mine = fastguard.AdamW(params, amsgrad=True)
    run(mine, params)
    if way == "state_dict":
        file = io.BytesIO()
        torch.save(mine.state_dict(), file)
        file.seek(0)
        others = [nn.Parameter(p.detach().clone()) for p in params]
        other = fastguard.AdamW(others)
        other.register_load_state_dict_post_hook(
            lambda o: [s["exp_avg"].add_(0) for s in o.state.values()]
        )
        other.load_state_dict(torch.load(file))
    else:
        other = copy.deepcopy(mine) if way == "deepcopy" else pickle.loads(pickle.dumps(mine))
        others = other.param_groups[0]["params"]
    assert other._step_supports_amp_scaling
    assert_same_bits(state_bits(other), state_bits(mine))
    run(mine, params, range(4, 7))
    run(other, others, range(4, 7))
    assert_same_bits(bits(others), bits(params))
    assert_same_bits(state_bits(other), state_bits(mine))


@pytest.mark.parametrize("source", PAIRS[1])
def test_a_loaded_state_is_a_copy(source):
    here, there = parameters(), parameters()
    mine, other = fastguard.AdamW(here), source(there)
    run(other, there)
    mine.load_state_dict(other.state_dict())
    before = state_bits(mine)
    run(other, there)
    assert_same_bits(state_bits(mine), before)
    run(mine, here)
    before = state_bits(mine)
    run(other, there)
    assert_same_bits(state_bits(mine), before)


def test_torch_rounds_the_moments_of_bfloat16_that_it_loads():
    params = parameters(torch.bfloat16)
    mine = fastguard.AdamW(params)
    run(mine, params)
    other = torch.optim.AdamW(params)
    other.load_state_dict(mine.state_dict())
    run(other, params)
    assert other.state[params[0]]["exp_avg"].dtype == torch.bfloat16


def test_parameters_come_and_go():
    """Late gradients, missing ones, new groups, replaced state and options changed on the way."""
    here, there = parameters(), parameters()
    mine, other = fastguard.Adam(here[:3]), torch.optim.Adam(there[:3])
    late, early = (nn.Parameter(torch.ones(4)) for _ in range(2))

    def act(params, optimizer, extra):
        give_grads(params, 1)
        params[1].grad = None
        optimizer.step()
        assert params[1] not in optimizer.state
        give_grads(params, 2)
        optimizer.step()
        optimizer.add_param_group({"params": [*params[3:], extra], "lr": 0.01, "maximize": True})
        give_grads([*params, extra], 3)
        optimizer.step()
        params[0].grad = None
        optimizer.step()
        give_grads(params, 4)
        optimizer.state[params[0]]["exp_avg"] = torch.full_like(params[0], 0.5)
        optimizer.step()
        optimizer.state[params[4]] = {k: v * 2 for k, v in optimizer.state[params[4]].items()}
        optimizer.param_groups[0]["weight_decay"] = 0.3
        optimizer.step()
        optimizer.param_groups[1]["params"].pop()  # extra
        give_grads([extra], 5)
        optimizer.step()

    act(here, mine, late)
    act(there, other, early)
    assert_close([*here, late], [*there, early])
    for p, q in zip(here, there, strict=True):
        assert mine.state[p]["step"] == other.state[q]["step"]


def gapped():
    wide = torch.zeros(6, 8)
    return nn.Parameter(wide[:, ::2])


def storages(optimizer, name="exp_avg"):
    states = optimizer.state.values()
    return {s[name].untyped_storage().data_ptr() for s in states if s[name].numel()}


def skip(optimizer):
    """A step that writes nothing, and so shows what bringing the buckets up to date does."""
    optimizer.decision = ops.Decision(scalar(1.0), verdict_(2))
    optimizer.step()
    optimizer.decision = None


def kept(optimizer):
    return {p: {k: v.clone() for k, v in s.items()} for p, s in optimizer.state.items()}


def assert_kept(optimizer, before):
    for p, entries in before.items():
        for name, entry in entries.items():
            assert_same_bits(bits([optimizer.state[p][name]]), bits([entry]))


def test_the_state_is_views_in_the_order_of_the_parameter():
    params = [*parameters(), gapped(), nn.Parameter(torch.zeros(2, 3, dtype=torch.complex64).t())]
    optimizer = fastguard.AdamW(params, amsgrad=True)
    run(optimizer, params)
    for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step"):
        assert len(storages(optimizer, name)) == 1
    real = [torch.view_as_real(p) if p.is_complex() else p for p in params]
    offsets = ops.packed_offsets(p.numel() for p in real)
    start = optimizer.state[params[0]]["exp_avg"].data_ptr()
    for i, p in enumerate(params):
        state = optimizer.state[p]
        assert state["step"].shape == () and state["step"]._base.shape == (len(params),)
        for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
            assert state[name].shape == p.shape and state[name].is_complex() == p.is_complex()
            assert state[name].stride() == ((4, 1) if i == 6 else p.stride())
        if p.numel():
            assert state["exp_avg"].data_ptr() - start == 4 * offsets[i]


def test_float64_parameters_have_packs_of_their_own():
    here, there = (
        [p for pair in zip(parameters(), parameters(F64), strict=True) for p in pair]
        for _ in range(2)
    )
    mine, other = fastguard.AdamW(here), torch.optim.AdamW(there)
    run(mine, here)
    run(other, there)
    assert_close(here, there)
    assert len(storages(mine)) == 2


def replace(optimizer, params):
    state = optimizer.state[params[4]]
    state["exp_avg"] = state["exp_avg"].clone()
    state["step"] = state["step"].clone()


def replace_all(optimizer, params):
    for p in params:
        optimizer.state[p] = {k: v.contiguous().clone() for k, v in optimizer.state[p].items()}


def reload(optimizer, params):
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def add_group(optimizer, params):
    extra = nn.Parameter(torch.ones(3))
    extra.grad = torch.ones(3)
    optimizer.add_param_group({"params": [extra]})


def add_parameter(optimizer, params):
    extra = nn.Parameter(torch.ones(3))
    extra.grad = torch.ones(3)
    optimizer.param_groups[0]["params"].insert(2, extra)


def lose_gradients(optimizer, params):
    params[1].grad = params[4].grad = None


def amsgrad_on(optimizer, params):
    optimizer.param_groups[0]["amsgrad"] = True


def delete(optimizer, params):
    del optimizer.state[params[0]]["exp_avg"]


def from_channels_last(optimizer, params):
    params[1].data = params[1].data.contiguous()


def to_transposed(optimizer, params):
    params[5].data = params[5].data.t().contiguous().t()


def from_transposed_to_gaps(optimizer, params):
    """Not contiguous before and after."""
    params[4].data = laid_out(params[4].data, "gaps")


@pytest.mark.parametrize(
    "change",
    [replace, replace_all, reload, add_group, add_parameter, lose_gradients, amsgrad_on, delete,
     from_channels_last, to_transposed, from_transposed_to_gaps],
)  # fmt: skip
def test_packing_anew_keeps_the_values_bit_for_bit(change):
    params = parameters()
    optimizer = fastguard.AdamW(params)
    run(optimizer, params)
    before = kept(optimizer)
    change(optimizer, params)
    if change is delete:
        before[params[0]]["exp_avg"].zero_()
    skip(optimizer)
    assert_kept(optimizer, before)
    assert len(storages(optimizer)) == {add_group: 2, lose_gradients: 3}.get(change, 1)
    for p in params:
        strides = ops.packed_strides(p)
        assert p.grad is None or optimizer.state[p]["exp_avg"].stride() == strides
    packed_now = storages(optimizer)
    skip(optimizer)
    assert storages(optimizer) == packed_now  # nothing moves without a reason
    # And all of them are stepped: as by an optimizer that has loaded the same.
    others = [nn.Parameter(p.detach().clone()) for p in optimizer.param_groups[0]["params"]]
    other = torch.optim.AdamW(others)
    if change is not add_group:
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        give_grads(optimizer.param_groups[0]["params"], 9, as_parameters=True)
        give_grads(others, 9, as_parameters=True)
        optimizer.step()
        other.step()
        assert_close(optimizer.param_groups[0]["params"], others)
        for p, q in zip(optimizer.param_groups[0]["params"], others, strict=True):
            for name, entry in optimizer.state[p].items():
                torch.testing.assert_close(entry, other.state[q][name])
        assert len(storages(optimizer)) == 1


@pytest.mark.parametrize("steps", [1, 3])
def test_an_equal_entry_is_not_the_same(steps):
    p = nn.Parameter(torch.ones(1))
    optimizer = fastguard.AdamW([p])
    run(optimizer, [p], range(steps))
    for name, entry in list(optimizer.state[p].items()):
        mine = optimizer.state[p][name] = entry.clone()
        run(optimizer, [p], [9])
        assert optimizer.state[p][name] is not mine  # it was copied into a pack that is stepped
        assert optimizer.state[p][name] != mine


def test_entries_of_others_in_the_state_move_nothing():
    params = parameters()
    optimizer = fastguard.AdamW(params)
    run(optimizer, params)
    before = [optimizer.state[p]["exp_avg"] for p in params]
    for calls in (torch.zeros(3), torch.ones(3), 5):
        for p in params:
            optimizer.state[p]["calls"] = calls
        run(optimizer, params, [1])
        assert all(optimizer.state[p]["exp_avg"] is m for p, m in zip(params, before, strict=True))


def test_packs_that_need_not_change_stay():
    params = parameters()
    optimizer = fastguard.AdamW([{"params": params[:3]}, {"params": params[3:]}])
    run(optimizer, params)
    first, second = ([optimizer.state[p]["exp_avg"] for p in ps] for ps in (params[:3], params[3:]))
    params[3].grad = None
    skip(optimizer)
    assert all(optimizer.state[p]["exp_avg"] is m for p, m in zip(params, first, strict=False))
    assert not any(
        optimizer.state[p]["exp_avg"] is m for p, m in zip(params[3:], second, strict=True)
    )


def in_two_groups(params):
    return [{"params": params[:3]}, {"params": params[3:], "lr": 0.01}]


def wakes_one_of_two(optimizer, params):
    """Both were idle until now."""
    give_grads(params[:1], 7)


def sleeps_in_the_second_group(optimizer, params):
    params[4].grad = None


def replaces_in_the_second_group(optimizer, params):
    for p in params[4:]:
        state = optimizer.state[p]
        state["exp_avg"] = state["exp_avg"] * 0.5


def joins_the_second_group(optimizer, params):
    params.append(nn.Parameter(torch.ones(3)))
    give_grads(params[-1:], 7)
    optimizer.param_groups[1]["params"].append(params[-1])


@pytest.mark.parametrize(
    "change",
    [wakes_one_of_two, sleeps_in_the_second_group, replaces_in_the_second_group,
     joins_the_second_group],
)  # fmt: skip
def test_a_change_in_one_of_two_groups_is_seen(change):
    here, there = parameters(), parameters()
    mine = fastguard.AdamW(in_two_groups(here))
    other = torch.optim.AdamW(in_two_groups(there))
    for params, optimizer in ((here, mine), (there, other)):
        run(optimizer, params)
        params[0].grad = params[1].grad = None
        optimizer.step()
        change(optimizer, params)
        optimizer.step()
        give_grads(params, 8)
        optimizer.step()
    assert_close(here, there)
    for p, q in zip(here, there, strict=True):
        assert mine.state[p]["step"] == other.state[q]["step"]


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


def test_a_state_of_some_parameters_with_steps_of_other_shapes_loads():
    here, there = parameters(), parameters()
    mine, other = fastguard.AdamW(here), torch.optim.AdamW(there)
    there[0].grad = None
    give_grads(there[1:], 0)
    other.step()
    saved = copy.deepcopy(other.state_dict())
    saved["state"][1]["step"] = torch.tensor([1.0], dtype=F64)  # default dtype float64, old torch
    mine.load_state_dict(saved)
    assert mine._loading is None and not mine._optimizer_load_state_dict_pre_hooks
    for p, q in zip(here, there, strict=True):
        p.data = q.data.clone()
    run(mine, here, [1])
    run(other, there, [1])
    assert_close(here, there)
    saved["state"][2]["step"] = math.nan
    with pytest.raises(ValueError, match="parameter 2: its step is NaN"):
        mine.load_state_dict(saved)
    assert mine._loading is None and not mine._optimizer_load_state_dict_pre_hooks


def test_an_error_names_the_group_by_its_number_now():
    params = parameters()
    mine = fastguard.AdamW(in_two_groups(params))
    run(mine, params)
    mine.param_groups.pop(0)
    mine.param_groups[0]["lr"] = math.nan
    with pytest.raises(ValueError, match="lr of param group 0 is nan"):
        mine.step()


def test_a_change_of_memory_alone_moves_no_state():
    params = parameters()
    optimizer = fastguard.AdamW(params)
    run(optimizer, params)
    before = [optimizer.state[p]["exp_avg"] for p in params]
    for p in params:
        p.data = p.data.clone()
    run(optimizer, params)
    assert all(optimizer.state[p]["exp_avg"] is m for p, m in zip(params, before, strict=True))


def test_a_parameter_that_shrinks_where_it_lies_is_seen():
    """Its moments would fit, rounded to 16."""
    p = nn.Parameter(torch.randn(20, 3))
    optimizer = fastguard.AdamW([p])
    run(optimizer, [p])
    p.data = p.data[:17]
    p.grad = torch.ones(17, 3)
    with pytest.raises(RuntimeError, match=r"exp_avg must be .*\(17, 3\), got .*\(20, 3\)"):
        optimizer.step()


def test_a_group_that_can_not_be_stepped_leaves_the_others_alone():
    one, two = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(1).expand(4))
    optimizer = fastguard.AdamW([{"params": [one]}, {"params": [two]}])
    one.grad, two.grad = torch.ones(4), torch.ones(4)
    with pytest.raises(RuntimeError, match="single memory location"):
        optimizer.step()
    assert one.tolist() == [1.0] * 4
    assert optimizer.state[one]["step"] == 0


def test_an_idle_parameter_does_not_keep_the_pack_alive():
    params = [nn.Parameter(torch.zeros(n)) for n in (4, 100_000)]
    optimizer = fastguard.AdamW(params)
    run(optimizer, params)
    params[0].grad = None
    before = kept(optimizer)
    skip(optimizer)
    assert_kept(optimizer, before)
    for entry in optimizer.state[params[0]].values():
        assert entry.untyped_storage().nbytes() == entry.numel() * 4


@pytest.mark.parametrize(
    "name, entry, message",
    [
        ("exp_avg", torch.zeros(1), r"exp_avg must be a torch.float32 .*\(5,\), got .*\(1,\)"),
        ("exp_avg_sq", torch.zeros(5, dtype=F64), "exp_avg_sq must be .*got torch.float64"),
        ("step", 3.0, r"step must be .*shape \(\), got float; delete it"),
        ("step", torch.tensor(3), "step must be .*got torch.int64"),
    ],
)
def test_state_that_does_not_fit_is_refused(name, entry, message):
    params = parameters()
    optimizer = fastguard.AdamW([{"params": params[1:]}, {"params": params[:1]}])
    run(optimizer, params)
    optimizer.state[params[0]][name] = entry
    before = bits(params)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=f"parameter 0 of group 1: its {message}"):
            optimizer.step()
    assert_same_bits(bits(params), before)
    del optimizer.state[params[0]][name]
    optimizer.step()


@pytest.mark.parametrize("save", [torch.save, pickle.dump], ids=["torch.save", "pickle"])
def test_files_are_not_larger_than_torchs(save):
    """Packed tensors are written once, not once for each of their views."""
    sizes = []
    for optimizer_class in (fastguard.AdamW, torch.optim.AdamW):
        params = [nn.Parameter(torch.zeros(100)) for _ in range(50)]
        optimizer = optimizer_class(params)
        run(optimizer, params, [0])
        file = io.BytesIO()
        save(optimizer.state_dict() if save is torch.save else optimizer, file)
        sizes.append(len(file.getvalue()))
    assert sizes[0] <= sizes[1] * 1.02


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
