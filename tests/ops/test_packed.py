"""How the packed state lies in memory, and tensors that share it."""

import pytest
import torch

from fastguard import ops

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
