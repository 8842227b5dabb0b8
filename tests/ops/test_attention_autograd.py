"""The operator of attention in autograd, checkpointing, torch.compile and torch.func."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from fastguard import clamped_attention, ops
from tests.native import needs_kernel
from tests.ops.attention_cases import OPS, SEED


@needs_kernel
def test_checkpointing_replays_dropout():
    inputs = [torch.randn(1, 2, 70, 16).requires_grad_() for _ in range(3)]
    results = []
    for again in (lambda f, *x: f(*x), lambda f, *x: checkpoint(f, *x, use_reentrant=False)):
        torch.manual_seed(0)
        output = again(lambda q, k, v: clamped_attention(q, k, v, dropout_p=0.3), *inputs)
        results.append((output, *torch.autograd.grad(output.square().sum(), inputs)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_gradcheck(dropout_p, softcap):
    torch.manual_seed(1)
    query = torch.randn(2, 4, 5, 3, dtype=torch.float64, requires_grad=True)
    key = torch.randn(2, 2, 7, 3, dtype=torch.float64, requires_grad=True)
    value = torch.randn(2, 2, 7, 4, dtype=torch.float64, requires_grad=True)
    padding = torch.arange(7) >= torch.tensor([[7], [4]])
    bias = torch.randn(4, 5, 7, dtype=torch.float64)

    def attend(query, key, value):
        torch.manual_seed(2)
        return clamped_attention(
            query, key, value, key_padding_mask=padding, attn_mask=bias, is_causal=True,
            dropout_p=dropout_p, softcap=softcap, clamp=1.0,
        )  # fmt: skip

    assert (attend(query, key, value).abs() == 1).any()
    assert torch.autograd.gradcheck(attend, (query, key, value))


def test_second_derivatives_are_refused():
    x = torch.randn(1, 1, 3, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(clamped_attention(x, x, x).sum(), x, create_graph=True)
    if ops.cpu_info():
        with pytest.raises(NotImplementedError, match="create_graph=False"):
            grad.sum().backward()


def test_a_mask_that_wants_a_gradient_gets_it():
    bias = torch.zeros(4, 6, requires_grad=True)
    query, key, value = torch.randn(1, 2, 4, 8), torch.randn(1, 2, 6, 8), torch.randn(1, 2, 6, 8)
    output = clamped_attention(query, key, value, attn_mask=bias)
    (got,) = torch.autograd.grad(output.sum(), bias)
    peer = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    torch.testing.assert_close(got, torch.autograd.grad(peer.sum(), bias)[0])
    assert got.abs().max() > 0


@needs_kernel
@pytest.mark.parametrize("asked", [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [0, 2])
def test_opcheck(batch, dtype, asked):
    query = torch.randn(batch, 5, 4, 8).to(dtype).transpose(1, 2).requires_grad_()
    key, value = (torch.randn(batch, 2, 6, 8).to(dtype).requires_grad_() for _ in range(2))
    padding = torch.zeros(batch, 6, dtype=torch.bool)
    options = (padding, None, SEED, True, 0.1, 0.3, 2.0, 1.0)
    torch.library.opcheck(OPS.attention.default, (query, key, value, *options, *asked))
    output, logsumexp, _, unrounded = OPS.attention(query, key, value, *options, *asked)
    output, inputs = output.detach(), [x.detach() for x in (query, key, value)]
    saved = (output, *inputs, unrounded if asked[1] else output)
    torch.library.opcheck(
        OPS.attention_backward.default,
        (*saved, logsumexp, *options),
        test_utils=("test_schema", "test_faketensor"),
    )


@needs_kernel
def test_compiles_without_a_graph_break():
    inputs = [torch.randn(2, 3, 20, 16).requires_grad_() for _ in range(3)]
    padding = torch.arange(20) >= torch.tensor([[20], [11]])

    def attend(query, key, value):
        output, stats = clamped_attention(
            query, key, value, key_padding_mask=padding, dropout_p=0.2, return_stats=True
        )
        return output * 2, stats

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    results = []
    for each in (attend, compiled):
        torch.manual_seed(3)
        output, stats = each(*inputs)
        results.append((output, *stats, *torch.autograd.grad(output.sum(), inputs)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


_PEAK = """
import sys, torch
from fastguard import clamped_attention

def peak():
    status = open("/proc/self/status").read()  # getrusage's may be that of the parent
    return int(status.split("VmHWM:")[1].split()[0]) * 1024

def step(length):
    inputs = [torch.randn(1, 1, length, 16, requires_grad=True) for _ in range(3)]
    clamped_attention(*inputs, dropout_p=float(sys.argv[1]), softcap=5.0).square().sum().backward()

step(64)
before = peak()
step(16384)
print(peak() - before)
"""


@needs_kernel
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_no_tensor_is_of_rows_times_keys(dropout_p):
    run = subprocess.run(
        [sys.executable, "-c", _PEAK, str(dropout_p)], capture_output=True, text=True, check=True
    )
    # In units of one input, 1 MB: inputs, output and gradients are 8, the parts of the query's
    # gradient 32, scratch 8 for each thread. The weights of one head would be 1024.
    linear = 16384 * 16 * 4 * (8 + 32 + 8 * torch.get_num_threads())
    assert 2**20 < int(run.stdout) < linear
    print(f"peak {int(run.stdout) / 2**20:.0f} MB, bound {linear / 2**20:.0f} MB")


def test_forward_derivatives_and_torch_func():
    x, tangent = torch.randn(2, 1, 2, 4, 8, dtype=torch.float64)

    def attend(x):
        return clamped_attention(x, x, x, clamp=1.0)

    _, got = torch.func.jvp(attend, (x,), (tangent,))
    step = 1e-6 * tangent
    torch.testing.assert_close(got, (attend(x + step) - attend(x - step)) / 2e-6)
    with torch.autograd.forward_ad.dual_level():
        dual = attend(torch.autograd.forward_ad.make_dual(x, tangent))
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(dual).tangent, got)
    wanted = torch.autograd.grad(attend(x.requires_grad_()).sum(), x)[0]
    torch.testing.assert_close(torch.func.grad(lambda x: attend(x).sum())(x.detach()), wanted)
    of_each = torch.func.grad(lambda x: torch.vmap(attend)(x).sum())(x.detach().unsqueeze(0))
    torch.testing.assert_close(of_each, wanted.unsqueeze(0))
    each = torch.vmap(attend)(torch.stack([x, 2 * x]))
    torch.testing.assert_close(each, torch.stack([attend(x), attend(2 * x)]))
