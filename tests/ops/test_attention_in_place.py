"""What the backward pass of attention reads instead of the output, and when."""

import itertools
import math

import pytest
import torch
from torch import nn

from fastguard import ClampedMultiheadAttention, clamped_attention
from fastguard.attention.functional import operands
from fastguard.ops import attention as attention_ops
from tests.native import needs_kernel
from tests.ops.attention_cases import DTYPES, OPS, SEED

SIZES = (2, 4, 9, 8)


def problem(dtype, width=8):
    """query, key and value, what is added to the output, and a mask."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 4, 9, width), (2, 2, 9, width), (2, 2, 9, 8), SIZES]
    drawn = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    mask = torch.rand(9, 9, generator=generator) < 0.7
    return [x.requires_grad_() for x in drawn[:3]], drawn[3], mask


def out_of_place(output, added):
    return output + added


def in_place(output, added):
    return output.add_(added)


def in_place_of_a_view(output, added):
    view = output.transpose(1, 2)
    view += added.transpose(1, 2)
    return output


def results(change, attend, inputs, added):
    """The output, changed, and the gradients."""
    torch.manual_seed(3)
    output = change(attend(*inputs), added)
    return output.detach().clone(), *torch.autograd.grad(output.float().square().sum(), inputs)


OPTIONS = [
    {"clamp": clamp, "dropout_p": dropout_p, "attn_mask": masked}
    for clamp, dropout_p, masked in itertools.product((None, 0.5), (0.0, 0.3), (False, True))
]


@pytest.mark.parametrize("change", [in_place, in_place_of_a_view])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_output_may_be_changed_in_place(dtype, change):
    inputs, added, mask = problem(dtype)
    for options in OPTIONS:
        options = options | {"attn_mask": mask if options["attn_mask"] else None}

        def attend(*inputs, options=options):
            return clamped_attention(*inputs, **options)

        def by_reference(*inputs, options=options):
            given = {"key_padding_mask": None, "is_causal": False, "scale": None, "softcap": None}
            given = operands(*inputs, **given, **options)
            return attention_ops.attention_ref(*given, False).output

        found = results(change, attend, inputs, added)
        for a, b in zip(found, results(out_of_place, attend, inputs, added), strict=True):
            assert torch.equal(a, b)
        if options["clamp"] and dtype.itemsize == 2:
            continue  # of one of the two an output may be at the bound, of the other just below
        eps, wanted = torch.finfo(dtype).eps, results(out_of_place, by_reference, inputs, added)
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=4 * eps, atol=8 * eps * b.abs().max().item())


@needs_kernel
@pytest.mark.parametrize("change", [in_place, in_place_of_a_view])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_may_in_compiled_code(dtype, change):
    inputs, added, mask = problem(dtype)
    for options in ({"clamp": None}, {"dropout_p": 0.3, "attn_mask": mask, "clamp": 0.5}):

        def attend(*inputs, options=options):
            return clamped_attention(*inputs, **options)

        def changed(*inputs, attend=attend):
            return change(attend(*inputs), added)

        torch.compiler.reset()
        compiled = torch.compile(changed, fullgraph=True, backend="aot_eager")
        found = results(lambda output, _: output, compiled, inputs, added)
        wanted = results(out_of_place, attend, inputs, added)
        for a, b in zip(found, wanted, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("clamp", [0.5, math.inf])
@pytest.mark.parametrize("change", [in_place, in_place_of_a_view])
def test_it_may_where_torchs_own_attention_serves(clamp, change):
    """On CUDA alone it serves heads that are this narrow, of which it saves the output."""

    def attend(*inputs):
        options = (None, None, None, False, 0.0, 0.3, 0.0, clamp, False, True)
        return attention_ops.attention_sdpa(*inputs, *options).output

    def attend_wide_heads(*inputs):
        return clamped_attention(*inputs, clamp=clamp)

    for attend_, width in ((attend, 8), (attend_wide_heads, 264)):
        inputs, added, _ = problem(torch.float32, width)
        wanted = results(out_of_place, attend_, inputs, added)
        for a, b in zip(results(change, attend_, inputs, added), wanted, strict=True):
            assert torch.equal(a, b)


@needs_kernel
@pytest.mark.parametrize("which", range(3))
def test_inputs_that_were_changed_in_place_are_refused(which):
    """As torch does."""
    inputs, _, _ = problem(torch.float32)
    inputs[which] = inputs[which] * 1
    output = clamped_attention(*inputs)
    inputs[which].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def saved_floats(module, x):
    """How many float32 of memory a call keeps for the backward pass, but for parameters."""
    storages = {}
    parameters = {p.untyped_storage().data_ptr() for p in module.parameters()}

    def pack(x):
        if x.dtype == torch.float32:
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes() // 4
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        kept = module(x, x, x, need_weights=False)
    del kept
    return sum(n for place, n in storages.items() if place not in parameters)


class Projection(nn.Linear):
    pass


def doubled(_module, args):
    args[0].mul_(2)


def watch_before(module):
    return module.out_proj.register_forward_pre_hook(doubled)


def watch_after(module):
    return module.out_proj.register_forward_hook(lambda *_: None)


def watch_all(_module):
    return nn.modules.module.register_module_forward_pre_hook(lambda *_: None)


def put_a_subclass_there(module):
    module.out_proj = Projection(16, 16)


def wrap(module):
    module.out_proj.forward = lambda x: x.mul_(2)


@needs_kernel
@pytest.mark.parametrize(
    ("show", "projects"),
    [
        (watch_before, True),
        (watch_after, True),
        (watch_all, True),
        (put_a_subclass_there, True),
        (wrap, False),
    ],
)
def test_the_module_keeps_a_copy_only_where_somebody_may_see_the_output(show, projects):
    torch.manual_seed(0)
    module = ClampedMultiheadAttention(16, 2, batch_first=True)
    x = torch.randn(3, 5, 16, requires_grad=True)
    # The input, query, key and value in one, the output and a number for each row of each head.
    alone = 3 * 5 * (16 + 3 * 16 + 16 + 2)
    assert saved_floats(module, x) == alone
    handle = show(module)
    try:
        # Where no projection keeps the output, the copy stands for it.
        copied = 3 * 5 * 16 if projects else 0
        assert saved_floats(module, x) == alone + copied
        module(x, x, x, need_weights=False)[0].sum().backward()
    finally:
        if hasattr(handle, "remove"):
            handle.remove()


@needs_kernel
def test_no_copy_is_made_where_no_gradient_is_wanted():
    options = (None, None, SEED, False, 0.3, 1.0, 0.0, 1.0, False, True)
    for dtype in DTYPES:
        x = torch.randn(1, 1, 3, 8, dtype=dtype)
        assert attention_ops.attention(x, x, x, *options).unrounded.numel() == 0
        x.requires_grad_()
        with torch.no_grad():
            assert attention_ops.attention(x, x, x, *options).unrounded.numel() == 0
        assert attention_ops.attention(x, x, x, *options).unrounded.numel() == x.numel()


def torchs_own(query, key, value, mask, kept, rescale, scale):
    """F.scaled_dot_product_attention's formula in the operands' dtype, with these weights kept."""
    logits = (query @ key.mT * scale).masked_fill(~mask, -math.inf)
    return (logits.softmax(-1) * kept * rescale) @ value


@needs_kernel
@pytest.mark.parametrize("keys", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dropout_p", [0.1, 0.3, 0.7])
def test_dropout_in_16_bits_where_a_row_sees_few_keys(dtype, keys, dropout_p):
    """The gradient of the logits is a difference; of one key's logit it is 0."""
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(4, 4, 64, 32, generator=generator).to(dtype) for _ in range(4)]
    *inputs, grad = [x.requires_grad_() for x in drawn]
    mask = torch.rand(4, 4, 64, 64, generator=generator).argsort(-1) < keys
    scale = 32**-0.5
    options = (None, mask, SEED, False, dropout_p, scale, 0.0, math.inf, False)
    kept, rescale = attention_ops.dropout_keep_ref(SEED, mask.shape, dropout_p)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    wanted = torch.autograd.grad(
        attention_ops.attention_ref(*exact, *options).output, exact, grad.detach().double()
    )
    errors = []
    for output in (
        attention_ops.attention(*inputs, *options).output,
        torchs_own(*inputs, mask, kept, rescale, scale),
    ):
        grads = torch.autograd.grad(output, inputs, grad)
        errors.append([(a - b).abs() for a, b in zip(grads, wanted, strict=True)])
    # Torch's are exactly 0 where each row sees one key: there float32's rounding of sums remains.
    least = 32 * torch.finfo(torch.float32).eps * rescale * max(x.abs().max() for x in drawn) ** 3
    for name, ours, theirs in zip(("query", "key", "value"), *errors, strict=True):
        assert ours.max() <= max(3 * theirs.max(), least), name
        assert ours.square().mean() <= max(9 * theirs.square().mean(), least**2), name


@needs_kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_clamp_holds_the_same_elements_whatever_was_saved(dtype):
    """The rounded output is compared with the bound, which no unrounded one may reach."""
    bound = torch.tensor(0.3, dtype=dtype)
    below = torch.nextafter(bound, torch.zeros_like(bound))
    values = torch.stack([-bound, bound, below, -below, bound * 9, below * 0]).view(1, 1, 1, 6)
    # One key, whose values are the output; dropout's factor leaves them between two numbers.
    query = torch.zeros(1, 1, 64, 6, dtype=dtype)
    for dropout_p in (0.0, 2**-16, 2**-9):
        options = (None, None, SEED, False, dropout_p, 1.0, 0.0, 0.3)
        given = (query, values.clone(), values.clone())
        output, logsumexp, _, unrounded = OPS.attention(*given, *options, False, True)
        grad = torch.ones_like(output)
        of_value = [
            OPS.attention_backward(grad, *given, saved, logsumexp, *options)[2]
            for saved in (output, unrounded)
        ]
        assert torch.equal(*of_value)
        assert of_value[0][..., :2].eq(0).all() and of_value[0][..., 4].eq(0).all()
        assert of_value[0][..., 5].gt(0).all()
