"""The operators on frames, on every instruction set."""

import pytest

from fastguard import ops
from tests.native import needs_kernel, run_tests_on

NAMES = ("silu", "masked_batch_norm", "glu_depthwise", "add_layer_norm")


@needs_kernel
@pytest.mark.parametrize("capability", ops.cpu_info().get("compiled", "default").split())
def test_every_instruction_set(capability):
    files = [f"tests/ops/test_{name}.py" for name in NAMES]
    run_tests_on(capability, files, "reference or number_of_threads or nan_ or range")
