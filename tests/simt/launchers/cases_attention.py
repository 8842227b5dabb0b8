"""Cases of attention's launchers."""

import pytest
import torch

from fastguard.ops import attention as attention_ops
from tests.simt.launchers.tensors import F64, with_gaps

from . import gpu


def attended(query, key, value, padding=None, mask=None, causal=False, dropout_p=0.0):
    # In 16 bits an output could equal the bound on one device and be one unit below on the other.
    clamp = 1.0 if query.dtype == torch.float32 else 100.0
    return padding, mask, torch.tensor([3, 4]), causal, dropout_p, 0.2, 0.0, clamp, True


def heads(*shape, dtype, layout="side by side", seed=0):
    """A tensor (B, H, T, D) whose rows have the memory layout ``layout``."""
    batch, count, rows, columns = shape
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(batch, rows, count, columns, generator=generator).to(dtype)
    if layout == "misaligned":
        room = torch.empty(drawn.numel() + 1, dtype=dtype)[1:]
        drawn = room.view_as(drawn).copy_(drawn)
    drawn = with_gaps(drawn) if layout == "with gaps" else drawn
    return drawn.transpose(1, 2).requires_grad_()


def assert_attention(query, key, value, in_place=False, **options):
    options = attended(query, key, value, **options)
    found = attention_ops.attention(query, key, value, *options, in_place)
    wanted = attention_ops.attention_ref(query, key, value, *options)
    rel = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 1e-5}[query.dtype]
    for f, w in zip(found[:3], wanted[:3], strict=True):
        torch.testing.assert_close(f, w.to(f.dtype), rtol=rel, atol=rel)
    if in_place:
        for output in (found.output, wanted.output):
            output += 1
    # The gradient of a sum is one number, expanded.
    results = [
        torch.autograd.grad(output.sum(), (query, key, value)) for output in (found[0], wanted[0])
    ]
    for f, w in zip(*results, strict=True):
        torch.testing.assert_close(f, w, rtol=rel, atol=rel * w.abs().max().item())
    assert found.output.transpose(1, 2).is_contiguous()
    assert all(f.transpose(1, 2).is_contiguous() for f in results[0])


@pytest.mark.parametrize("layout", ["side by side", "misaligned", "with gaps"])
@pytest.mark.parametrize("width", [16, 128, 13])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_attention_on_every_layout(dtype, width, layout):
    query = heads(2, 4, 20, width, dtype=dtype, layout=layout)
    key = heads(2, 2, 70, width, dtype=dtype, layout=layout, seed=1)
    value = heads(2, 2, 70, 24, dtype=dtype, seed=2)
    padding = torch.arange(70).expand(2, 70).t().contiguous().t() > 40
    options = {"causal": width == 16, "dropout_p": 0.0 if layout == "with gaps" else 0.2}
    assert_attention(query, key, value, layout == "misaligned", padding=padding, **options)
    own = {torch.bfloat16: "BFloat16", torch.float16: "Float16", torch.float32: "float"}[dtype]
    least = 64 if dtype == torch.float32 else 32
    size = f"{own},{128 if width == 128 else least}"
    saved = own if layout == "with gaps" else "float"
    assert gpu().kernels() == [
        f"attention_kernel<{size}>",
        f"attention_delta_kernel<{own},{saved}>",
        f"attention_grad_query_kernel<{size}>",
        f"attention_grad_key_kernel<{size}>",
    ]


def test_attention_with_masks_of_other_strides():
    tensors = [heads(2, 2, 30, 32, dtype=torch.bfloat16, seed=seed) for seed in range(3)]
    added = torch.randn(2, 1, 30, 30).transpose(2, 3)
    for mask in (torch.rand(30, 30) < 0.8, added, added.bfloat16()):
        assert_attention(*tensors, mask=mask.expand(2, 2, 30, 30))


def test_attention_of_an_empty_batch():
    tensors = [heads(0, 2, 30, 32, dtype=torch.bfloat16) for _ in range(3)]
    found = attention_ops.attention(*tensors, *attended(*tensors))
    assert found.output.shape == (0, 2, 30, 32) and found.stats.shape == (2, 0, 2, 30)
    grads = torch.autograd.grad(found.output.sum(), tensors)
    assert [g.shape for g in grads] == [t.shape for t in tensors]
    assert gpu().launches() == []


def test_a_captured_attention_reads_its_seed_at_each_replay():
    tensors = [heads(1, 1, 20, 32, dtype=torch.float32, seed=seed).detach() for seed in range(3)]
    options = list(attended(*tensors, dropout_p=0.5))
    with gpu().capture():
        found = attention_ops.attention(*tensors, *options)
    for number in (1, 2):
        options[2].fill_(number)
        gpu().replay()
        wanted = attention_ops.attention_ref(*tensors, *options)
        torch.testing.assert_close(found.output, wanted.output)
    gpu().forget_graph()


@pytest.mark.parametrize("asked", [False, True])
def test_attention_is_described_as_it_is(asked):
    tensors = [heads(1, 2, 20, 24, dtype=torch.bfloat16, seed=seed) for seed in range(3)]
    torch.library.opcheck(
        torch.ops.fastguard.attention.default,
        (*tensors, *attended(*tensors), asked),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def test_attention_refuses_what_its_kernels_do_not_take():
    def run(dtype=torch.float32, width=16):
        tensors = [torch.ones(1, 1, 2, width, dtype=dtype) for _ in range(3)]
        return attention_ops.attention(*tensors, *attended(*tensors))

    for wrong in ({"dtype": F64}, {"width": 136}):
        with pytest.raises(RuntimeError, match="CUDA's kernels take float32, bfloat16 and float16"):
            run(**wrong)
    x, mask = torch.ones(1, 1, 2, 8), torch.zeros(1, 2, dtype=torch.bool)
    with gpu().on_device(1, mask), pytest.raises(RuntimeError, match="key_padding_mask is not on"):
        attention_ops.attention(x, x, x, *attended(x, x, x, padding=mask))
    assert gpu().launches() == []
