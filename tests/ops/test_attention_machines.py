"""The operator of attention gives the same bits on every machine, and rows do not mix."""

import pytest
import torch

from fastguard import clamped_attention, ops
from tests.native import needs_kernel, run_tests_on
from tests.ops.attention_cases import DTYPES, OPS, SEED


def digest_of(threads, dtype, heads):
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    tensors = [torch.randn(2, heads, 300, 40).to(dtype) for _ in range(4)]
    padding = torch.arange(300) >= torch.tensor([[300], [170]])
    options = (padding, None, SEED, False, 0.1, 0.2, 0.0, 0.1)
    output, logsumexp, _, unrounded = OPS.attention(*tensors[:3], *options, False, True)
    grads = OPS.attention_backward(tensors[3], *tensors[:3], unrounded, logsumexp, *options)
    return output, logsumexp, unrounded, *grads


@needs_kernel
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_for_any_number_of_threads_and_every_time(dtype, heads):
    threads = torch.get_num_threads()
    try:
        results = [digest_of(n, dtype, heads) for n in (1, 2, 2, 3, 7)]
    finally:
        torch.set_num_threads(threads)
    for each in results[1:]:
        for a, b in zip(each, results[0], strict=True):
            assert torch.equal(a, b)


@needs_kernel
def test_other_tensors_do_not_change_a_row():
    """A row of an utterance has the same bits whatever else is in the batch."""
    query, key, value = (torch.randn(3, 2, 100, 32) for _ in range(3))
    together = clamped_attention(query, key, value)
    for b in range(3):
        assert torch.equal(
            clamped_attention(*(x[b : b + 1] for x in (query, key, value))), together[b : b + 1]
        )


@needs_kernel
@pytest.mark.parametrize("capability", ops.cpu_info().get("compiled", "default").split())
def test_every_instruction_set(capability):
    names = ("test_attention", "test_attention_masks", "test_attention_machines")
    run_tests_on(
        capability,
        [f"tests/ops/{name}.py" for name in names],
        "against_the_reference or dropout_keeps or test_same_bits or is_its_float32 "
        "or read_at_every_place",
    )
