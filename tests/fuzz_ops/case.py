"""One case: an operator with random arguments, compared with its reference."""

import torch

from fastguard import ops
from fastguard.ops import attention as attention_ops
from tests.guard_pages import Guarded, Plain

from .arguments import Draw, tensors_of

#: The errors that an operator may raise. The dispatcher raises TypeError and ValueError.
EXPECTED = (RuntimeError, TypeError, ValueError)


def is_freed(tensor) -> bool:
    if tensor.device.type != "cpu" or tensor.layout != torch.strided or tensor.numel() == 0:
        return False
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    last = tensor.storage_offset() + sum((size - 1) * stride for size, stride in sizes)
    return tensor.untyped_storage().nbytes() < (last + 1) * tensor.element_size()


REFERENCES = {
    "grad_norm": ops.grad_norm_ref,
    "decide": ops.decide_ref,
    "guard_decide_": ops.guard_decide_ref_,
    "grad_norm_decide_": ops.grad_norm_decide_ref_,
    "clip_": ops.clip_ref_,
    "scale_": ops.scale_ref_,
    "settle_": ops.settle_ref_,
    "accumulate_": ops.accumulate_ref_,
    "adamw_": ops.adamw_ref_,
    "attention": attention_ops.attention_ref,
    "attention_backward": attention_ops.attention_backward_ref,
}


def draw(seed, number, memory):
    """Returns the operator's name, its arguments, and the Draw."""
    drawer = Draw(f"{seed}:{number}", memory)
    name = drawer.pick(list(REFERENCES))
    args = getattr(drawer, name)()
    for _ in range(drawer.pick([0, 0, 1, 1, 2])):
        drawer.malform(args)
        factors = {"attention": args[8:10], "attention_backward": args[11:13]}.get(name, [])
        if not all(isinstance(x, float) and abs(x) < 1e30 for x in factors):
            drawer.odd.add("overflow")  # the reference overflows in other places than the kernels
        if name == "attention_backward":  # the saved tensors belong to other arguments then
            drawer.odd.add("saved")
    return name, args, drawer


def outcome(function, args, expected=EXPECTED):
    """Returns (the results as a list of tensors, None), or (None, the error)."""
    try:
        found = function(*args)
    except expected as error:
        return None, error
    return [] if found is None else list(found) if isinstance(found, tuple) else [found], None


def run_case(seed, number) -> tuple[str, str]:
    """Run a case; returns the operator and "accepted" or "refused". Raises AssertionError."""
    memory, ordinary = Guarded(), Plain()
    args = found = None
    try:
        name, args, drawer = draw(seed, number, memory)
        before = memory.bytes()
        with torch.set_grad_enabled(drawer.chance(0.5)):
            found, error = outcome(getattr(torch.ops.fastguard, name).default, args)
        if error is not None:
            assert str(error), f"{type(error).__name__} without a message"
            assert memory.bytes() == before, f"{error!r:.300}, but something was written"
        assert error is not None or not any(map(is_freed, tensors_of(args))), "read freed memory"
        if error is None and {x.device.type for x in tensors_of(args)} == {"meta"}:
            drawer.odd.add("fake")  # fake kernels write nothing and check no dtypes
        if not drawer.odd:
            _, same, _ = draw(seed, number, ordinary)
            with torch.no_grad():
                expected, wrong = outcome(REFERENCES[name], same, Exception)
            check_same(name, args, found, error, expected, wrong)
            if found is not None:
                if name == "settle_":  # the result is whether a number is zero
                    found, expected = [found[0] != 0], [expected[0] != 0]
                compare([*found, *memory.placed], [*expected, *ordinary.placed], name)
        return name, "accepted" if error is None else "refused"
    finally:
        del args, found  # tensors must be freed before their memory
        memory.free()


def check_same(name, args, found, error, expected, wrong):
    """Check that the operator and its reference both accept or both refuse the arguments."""
    if (error is None) == (wrong is None):
        return
    # The dispatcher refuses calls without a tensor, and ints of more than 64 bits.
    if error is not None and (not tensors_of(args) or "Expected a value of type" in str(error)):
        return
    # The references also accept larger sizes, float32 masks for float64, and several devices.
    beyond = ("must be at least 1", "attn_mask must be bool", "several devices", "'SparseCPU'")
    if error is not None and any(words in str(error) for words in beyond):
        return
    raise AssertionError(f"the operator: {error!r:.300}; the reference: {wrong!r:.300}")


#: The allowed errors of results that are rounded once or twice.
TOLERANCE = {torch.float16: 2**-9, torch.bfloat16: 2**-6}
TOLERANCE |= dict.fromkeys((torch.float32, torch.complex64), 1e-4)


def compare(found, expected, name):
    assert len(found) == len(expected), f"{len(found)} results instead of {len(expected)}"
    loose = 20 if "attention" in name else 1
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        if a.device.type == "meta" or a.dtype in (torch.float8_e5m2, torch.complex32):
            assert a.shape == b.shape and a.dtype == b.dtype
            continue
        tolerance = loose * TOLERANCE.get(a.dtype, 1e-9)
        torch.testing.assert_close(
            a, b, rtol=tolerance, atol=tolerance, equal_nan=True,
            check_stride=False, msg=lambda said, i=i: f"result {i}: {said}",
        )  # fmt: skip
