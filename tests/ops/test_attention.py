"""The operator of attention against its reference, on whatever inputs it may be given."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastguard import clamped_attention, ops
from fastguard.attention import clamped_attention_and_weights
from fastguard.ops import attention as attention_ops
from tests.native import needs_kernel
from tests.ops.attention_cases import DTYPES, OPS, SEED


def laid_out(tensor, layout):
    if layout == "heads beside each other":
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "columns apart":
        return torch.stack([torch.full_like(tensor, math.nan), tensor], -1)[..., 1]
    return tensor


def masks_of(draw, sizes, generator, dtype):
    """A key_padding_mask and an attn_mask, either of which may be None."""
    batch, heads, rows, keys = sizes
    padding, kind = (
        draw(st.sampled_from(names))
        for names in (
            ["none", "lengths", "random"],
            ["none", "bool", "float", "same dtype", "same dtype, columns apart", "transposed"],
        )
    )
    key_padding_mask = attn_mask = None
    if padding == "lengths":
        lengths = torch.randint(0, keys + 1, (batch, 1), generator=generator)
        key_padding_mask = torch.arange(keys) >= lengths
    elif padding == "random":
        key_padding_mask = torch.rand(batch, keys, generator=generator) < 0.5
    if kind != "none":
        shape = draw(st.sampled_from([(rows, keys), (batch, 1, rows, keys), (1, heads, 1, keys)]))
        attn_mask = torch.rand(shape, generator=generator) < 0.8
        if kind not in ("bool", "transposed"):
            attn_mask = torch.randn(shape, generator=generator).where(attn_mask, -math.inf)
        if kind.startswith("same dtype"):
            attn_mask = laid_out(attn_mask.to(dtype), kind.removeprefix("same dtype, "))
        if kind == "transposed":
            attn_mask = attn_mask.transpose(-1, -2).contiguous().transpose(-1, -2)
        attn_mask = attn_mask.expand(sizes)
    return key_padding_mask, attn_mask


@st.composite
def problems(draw, dtype):
    """query, key, value, gradient of the output and the operators' options."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    batch, kv_heads, group = (draw(st.integers(1, high)) for high in (3, 2, 3))
    edges = [15, 16, 17, 63, 64, 65, 127, 128, 129, 200]
    rows, keys = (draw(st.integers(1, 40) | st.sampled_from(edges)) for _ in range(2))
    width, value_width = (
        draw(st.integers(1, 70) | st.sampled_from([1, 16, 64, 96, 128, 255, 256])) for _ in range(2)
    )
    heads = kv_heads * group
    gain = draw(st.sampled_from([0.1, 1.0, 3.0]))
    layout = draw(st.sampled_from(["contiguous", "heads beside each other", "columns apart"]))

    def tensor(*shape):
        return laid_out((gain * torch.randn(shape, generator=generator)).to(dtype), layout)

    query = tensor(batch, heads, rows, width)
    key, value = (tensor(batch, kv_heads, keys, each) for each in (width, value_width))
    grad = tensor(batch, heads, rows, value_width)
    sizes = (batch, heads, rows, keys)
    key_padding_mask, attn_mask = masks_of(draw, sizes, generator, dtype)
    if attn_mask is not None and attn_mask.is_floating_point() and dtype == torch.float64:
        attn_mask = attn_mask.double()
    options = (
        key_padding_mask,
        attn_mask,
        SEED + draw(st.integers(0, 9)),
        draw(st.booleans()),
        draw(st.sampled_from([0.0, 0.1, 0.5, 0.999])),
        draw(st.sampled_from([width**-0.5, -0.3, 0.0])),
        draw(st.sampled_from([0.0, 0.5, 30.0])),
        draw(st.sampled_from([math.inf, 0.7, 0.05])),
    )
    return query, key, value, grad, options


def expected(problem, output):
    """Output, logsumexp, stats and gradients in float64; the clamp is where `output` says."""
    query, key, value, grad, options = problem
    *rest, clamp = options
    inputs = [x.double().requires_grad_() for x in (query, key, value)]
    if rest[1] is not None and rest[1].is_floating_point():
        rest[1] = rest[1].double()
    free = attention_ops.attention_ref(*inputs, *rest, math.inf, True)
    passed = grad.double() if clamp == math.inf else grad.double().where(output.abs() < clamp, 0.0)
    grads = torch.autograd.grad(free.output, inputs, passed)
    bound = torch.tensor(clamp, dtype=output.dtype).item()
    return (free.output.detach().clamp(-bound, bound), *free[1:3], *grads)


def sizes_of_terms(problem):
    """The largest sum of absolute terms behind output, logsumexp, stats and gradients: rounding
    errors are in proportion to these, the results themselves may cancel."""
    query, key, value, grad, options = problem
    *masks, _, _, dropout_p, scale, _, _ = options
    query, key, value, grad = (x.double().abs() for x in (query, key, value, grad))
    group = query.size(1) // key.size(1)
    key, value = (x.repeat_interleave(group, 1) for x in (key, value))
    logits = abs(scale) * (query @ key.transpose(2, 3)).amax()
    if masks[1] is not None and masks[1].is_floating_point():
        logits = logits + masks[1].nan_to_num(neginf=0.0).abs().amax()
    rescale = attention_ops.dropout_keep_ref(SEED, (1, 1, 1, 1), dropout_p)[1]
    back = 2 * rescale * (grad @ value.transpose(2, 3)).amax()
    rows, keys = query.size(2), key.size(2)
    return {
        "output": rescale * value.amax(),
        "logsumexp": logits + math.log(keys),
        "stats": logits + math.log(keys),
        "grad_query": abs(scale) * back * key.amax(),
        "grad_key": abs(scale) * back * group * min(rows, 8) * query.amax(),
        "grad_value": rescale * group * min(rows, 8) * grad.amax(),
        "logits": logits,
    }


def assert_near(got, wanted, name, terms):
    assert (got.isfinite() == wanted.isfinite()).all(), name
    assert torch.equal(got[got.isinf()].double(), wanted[wanted.isinf()]), name
    error = (got.double().nan_to_num(0, 0, 0) - wanted.nan_to_num(0, 0, 0)).abs().max()
    wide = torch.float64 if got.dtype == torch.float64 else torch.float32
    # Weights are rounded as elements are, and are as far off as the logits.
    eps = torch.finfo(got.dtype).eps + torch.finfo(wide).eps * terms["logits"]
    assert error <= 4 * eps * terms[name], (name, error / (eps * terms[name]))


SAME = {"rtol": 0, "atol": 0, "equal_nan": True}


@needs_kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_kernels_against_the_reference_in_float64(dtype, data):
    problem = query, key, value, grad, options = data.draw(problems(dtype))
    asked = data.draw(st.booleans())
    output, logsumexp, stats, unrounded = OPS.attention(query, key, value, *options, True, asked)
    saved = unrounded if asked else output
    grads = OPS.attention_backward(grad, query, key, value, saved, logsumexp, *options)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert unrounded.dtype == wide
    torch.testing.assert_close(
        unrounded.to(dtype), output if asked else output.new_empty(0), **SAME
    )
    assert [output.dtype, logsumexp.dtype, stats.dtype] == [dtype, wide, wide]
    for got, x in zip(grads, (query, key, value), strict=True):
        assert got.dtype == dtype and got.shape == x.shape
    terms = sizes_of_terms(problem)
    results = zip(
        (output, logsumexp, stats, *grads), expected(problem, output), terms, strict=False
    )
    for got, wanted, name in results:
        assert_near(got, wanted, name, terms)


@needs_kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropout_keeps_what_the_reference_keeps(dtype):
    """With queries of zero and values that are a unit matrix the output is the weights."""
    rows, keys = 150, 130
    query, key = torch.zeros(2, 3, rows, 8), torch.zeros(2, 3, keys, 8)
    value = torch.eye(keys).expand(2, 3, keys, keys)
    seen = []
    for dropout_p in (0.25, 0.9, 2**-16, 1 - 2**-17):
        options = (None, None, SEED, False, dropout_p, 1.0, 0.0, math.inf)
        args = [x.to(dtype) for x in (query, key, value)]
        weights = OPS.attention(*args, *options, False, False)[0]
        kept, rescale = attention_ops.dropout_keep_ref(SEED, (2, 3, rows, keys), dropout_p)
        assert torch.equal(weights != 0, kept)
        wanted = torch.tensor(rescale / keys, dtype=dtype)
        torch.testing.assert_close(weights[kept], wanted.expand(int(kept.sum())))
        seen.append(kept.double().mean().item())
    assert seen[0] == pytest.approx(0.75, abs=4 * math.sqrt(0.1875 / kept.numel()))
    assert seen[1] == pytest.approx(0.1, abs=4 * math.sqrt(0.09 / kept.numel()))


def test_the_share_that_is_kept_is_a_multiple_of_2_to_the_minus_16():
    for dropout_p, kept in [(0.1, 58982), (2**-18, 65536), (1 - 1e-9, 1), (0.5, 32768)]:
        _, rescale = attention_ops.dropout_keep_ref(SEED, (1, 1, 1, 1), dropout_p)
        assert rescale == 65536 / kept


def test_dropout_is_independent_between_heads_rows_columns_and_seeds():
    shape = (2, 2, 128, 128)
    seeds = [SEED, SEED + torch.tensor([1, 0]), SEED + torch.tensor([0, 1])]
    masks = [attention_ops.dropout_keep_ref(seed, shape, 0.5)[0].double() - 0.5 for seed in seeds]
    flat = torch.cat([mask.view(4, -1) for mask in masks])
    correlation = torch.corrcoef(flat).fill_diagonal_(0)
    assert correlation.abs().max() < 5 / 128
    for shift, dim in [(1, -1), (8, -1), (16, -1), (1, -2), (8, -2), (16, -2)]:
        assert (masks[0] * masks[0].roll(shift, dim)).mean().abs() < 0.25 * 5 / 256


def test_gradients_do_not_pass_rows_without_a_key_even_if_they_are_not_finite():
    query, key, value = (torch.randn(2, 1, 4, 8, requires_grad=True) for _ in range(3))
    padding = torch.tensor([[False] * 4, [True] * 4])
    output = clamped_attention(query, key, value, key_padding_mask=padding)
    grad = torch.ones_like(output)
    grad[1] = math.nan
    for each in torch.autograd.grad(output, (query, key, value), grad):
        assert each[0].isfinite().all()
        assert torch.equal(each[1], torch.zeros_like(each[1]))


def test_a_row_hidden_by_a_mask_passes_nothing_on():
    """Neither a NaN in its query nor one in the gradient of its output."""
    query, key, value = torch.randn(3, 1, 1, 5, 8)
    query[0, 0, 1] = math.nan
    inputs = [x.requires_grad_() for x in (query, key, value)]
    mask = torch.ones(5, 5, dtype=torch.bool)
    mask[1] = False
    output = clamped_attention(*inputs, attn_mask=mask)
    assert torch.equal(output[0, 0, 1], torch.zeros(8))
    grad = torch.ones_like(output)
    grad[0, 0, 1] = math.nan
    grad_query, grad_key, grad_value = torch.autograd.grad(output, inputs, grad)
    assert grad_value.isfinite().all()
    if ops.cpu_info():  # the reference multiplies the NaN in the query by zero
        assert grad_key.isfinite().all()
        assert torch.equal(grad_query[0, 0, 1], torch.zeros(8))


def test_padded_keys_have_zero_gradients_even_if_that_of_the_output_is_not_finite():
    query, key, value = (torch.randn(1, 1, 5, 8, requires_grad=True) for _ in range(3))
    padding = torch.tensor([[False, False, True, False, False]])
    output = clamped_attention(query, key, value, key_padding_mask=padding)
    grad = torch.ones_like(output)
    grad[0, 0, 0] = math.inf
    for each in torch.autograd.grad(output, (key, value), grad):
        assert torch.equal(each[0, 0, 2], torch.zeros(8))
        assert not each[0, 0, 1].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_that_overflow_are_not_taken_for_none(dtype):
    query = torch.full((1, 1, 3, 4), 1e15, dtype=dtype)
    output, stats = clamped_attention(query, query, query, scale=1e10, return_stats=True)
    assert output.isnan().all()
    assert not stats.max_logit.isfinite().any()


def test_a_bound_beyond_float16_is_none():
    x = torch.randn(1, 1, 3, 4).half()
    for attend in (
        clamped_attention,
        lambda *args, clamp: clamped_attention_and_weights(*args, clamp=clamp)[0],
    ):
        torch.testing.assert_close(attend(x, x, x, clamp=1e5), attend(x, x, x, clamp=None))


@needs_kernel
def test_a_key_of_denormals_is_not_flushed_by_some_threads_only():
    value = torch.full((1, 1, 600, 16), 1e-41)
    query = torch.zeros(1, 1, 600, 16)
    torch.set_flush_denormal(True)
    try:
        flushed = clamped_attention(query, query, value)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(flushed, clamped_attention(query, query, value))


def test_an_empty_batch():
    query, key = torch.zeros(0, 2, 3, 4, requires_grad=True), torch.zeros(0, 2, 5, 4)
    output, stats = clamped_attention(query, key, key, dropout_p=0.1, return_stats=True)
    assert output.shape == (0, 2, 3, 4)
    assert stats.entropy.shape == (2,)
    assert torch.autograd.grad(output.sum(), query)[0].shape == query.shape


X = torch.zeros(2, 4, 3, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("scale", [1e4, 1e7, 1e9, 1e30])
def test_logits_of_any_finite_size(dtype, scale):
    """With a product that is rounded once less, the largest logit of 2e9 lies 100 above itself."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, 2, 40, 8, generator=generator).to(dtype) for _ in range(3)]
    inputs = [x.requires_grad_() for x in inputs]
    output = clamped_attention(*inputs, scale=scale, clamp=None)
    grads = torch.autograd.grad(output.sum(), inputs)
    largest = (inputs[0].double() @ inputs[1].double().mT).argmax(-1)  # far above the second
    expected = inputs[2].gather(2, largest.unsqueeze(-1).expand(-1, -1, -1, 8))
    clear = (output - expected).abs().amax(-1) < 1e-2
    assert output.isfinite().all() and clear.float().mean() > 0.9
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        ((X[0], X, X), {}, r"4 dimensions .* query \(4, 3, 8\)"),
        ((X, X, X[:, :, :2]), {}, r"do not fit: got query \(2, 4, 3, 8\), key .* value \(2, 4, 2"),
        ((X, X[..., :4], X), {}, r"do not fit: .* key \(2, 4, 3, 4\)"),
        ((X, X[:, :3], X[:, :3]), {}, r"H must be a multiple of G.* key \(2, 3, 3, 8\)"),
        ((X[..., :0], X[..., :0], X), {}, r"at least 1 .* query \(2, 4, 3, 0\)"),
        ((X, X, X[..., :0]), {}, r"at least 1 .* value \(2, 4, 3, 0\)"),
        ((X, X.double(), X), {}, r"one dtype .* float64"),
        ((X.int(), X.int(), X.int()), {}, r"one dtype .* \[torch.int32"),
        ((X, X.to("meta"), X), {}, r"one device .* 'meta'"),
        ((X, X, X), {"dropout_p": 1.0}, r"dropout_p must be in \[0, 1\), got 1.0"),
        ((X, X, X), {"dropout_p": -0.1}, r"dropout_p .* got -0.1"),
        ((X, X, X), {"dropout_p": math.nan}, r"dropout_p .* got nan"),
        ((X, X, X), {"softcap": 0.0}, r"softcap .* got 0.0"),
        ((X, X, X), {"softcap": 1e300}, r"softcap must be in \[1e-30, 1e30\], got 1e\+300"),
        ((X, X, X), {"softcap": 1e-300}, r"softcap .* got 1e-300: pass None"),
        ((X, X, X), {"scale": 1e300}, r"scale must be between .* got 1e\+300"),
        ((X, X, X), {"scale": math.nan}, r"scale .* got nan"),
        ((X, X, X), {"clamp": -1.0}, r"clamp must be > 0, got -1.0"),
        ((X, X, X), {"attn_mask": torch.zeros(3, 3).int()}, r"attn_mask .* got torch.int32"),
        ((X, X, X), {"attn_mask": torch.zeros(3, 4)}, r"\(2, 4, 3, 3\), got shape \(3, 4\)"),
        ((X, X, X), {"key_padding_mask": torch.zeros(2, 4) > 0}, r"\(2, 3\), got .* \(2, 4\)"),
        ((X, X, X), {"key_padding_mask": torch.zeros(2, 3, device="meta") > 0}, r"cpu, got meta"),
        ((X, X, X), {"attn_mask": torch.zeros(3, 3, device="meta")}, r"attn_mask .* cpu, got meta"),
    ],
)
def test_bad_input_is_named(args, options, message):
    with pytest.raises(ValueError, match=message):
        clamped_attention(*args, **options)


@pytest.mark.parametrize("softcap", [1e-30, 1e-20, 1e20, 1e30])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_softcap_at_either_end_of_its_range(dtype, softcap):
    """A small one makes all logits equal, a large one leaves them as they are."""
    inputs = [torch.randn(1, 2, 5, 8, dtype=dtype, requires_grad=True) for _ in range(3)]
    found = clamped_attention(*inputs, softcap=softcap, clamp=None)
    if softcap < 1:
        expected = inputs[2].double().mean(2, keepdim=True).expand_as(found)
    else:
        expected = clamped_attention(*inputs, clamp=None).double()
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), expected, atol=8 * eps, rtol=8 * eps)
    found.sum().backward()
    assert all(x.grad.isfinite().all() for x in inputs)


@needs_kernel
def test_the_operator_itself_checks_what_it_is_given():
    options = [None, None, SEED, False, 0.0, 1.0, 0.0, 1.0, False, False]
    for position, wrong, message in [
        (0, torch.zeros(2, 3), "key_padding_mask must be bool of shape"),
        (1, torch.zeros(2, 4, 3, 3).int(), "attn_mask must be bool or"),
        (2, SEED[:1], "seed must be 2 numbers"),
        (4, 1.5, "dropout_p must be in"),
        (5, -1e300, r"scale must be between .* -1e\+300"),
        (5, math.nan, "scale must be .* nan"),
        (6, 1e300, r"softcap 0 or in \[1e-30, 1e30\].* 1e\+300"),
        (6, 1e-300, r"softcap 0 or in .* 1e-300"),
        (6, math.nan, "softcap 0 or in .* nan"),
        (7, -1.0, "clamp above 0"),
    ]:
        given_ = [*options[:position], wrong, *options[position + 1 :]]
        with pytest.raises(RuntimeError, match=message):
            OPS.attention(X, X, X, *given_)
    with pytest.raises(RuntimeError, match="dropout needs a seed"):
        OPS.attention(X, X, X, None, None, None, False, 0.1, 1.0, 0.0, 1.0, False, False)
    with pytest.raises(RuntimeError, match="do not fit"):
        OPS.attention(X, X[:, :3], X, *options)
