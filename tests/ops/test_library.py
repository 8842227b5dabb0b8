"""The CPU library: its instruction sets."""

import os
import subprocess
import sys

from tests.native import assert_same_from_every_instruction_set, needs_kernel

_DUMP = """
import hashlib, math, torch
from fastguard import ops
torch.manual_seed(1)
grads = [(torch.randn(n, dtype=torch.float64) * s).to(dtype)
         for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
         for n, s in ((1, 1.0), (63, 1e-3), (4097, 100.0), (70_003, 1.0))]
grads[2][4000] = math.nan
found = ops.grad_norm(grads)
ops.scale_(grads, torch.tensor(0.7, dtype=torch.float64))
sums = [torch.randn(g.shape, dtype=torch.promote_types(g.dtype, torch.float32)) for g in grads]
window = torch.ones(3, dtype=torch.float64)
ops.accumulate_(sums, grads, torch.tensor(0), window, 1.0)
tensors = [*found, *grads, *sums]
print(ops.cpu_info()["chosen"], hashlib.sha256(b"".join(
    t.view(-1).view(torch.uint8).numpy().tobytes() for t in tensors)).hexdigest())
"""


@needs_kernel
def test_every_instruction_set_gives_the_same_bits():
    assert_same_from_every_instruction_set(_DUMP)


@needs_kernel
def test_unknown_capability_is_named():
    run = subprocess.run(
        [sys.executable, "-c", _DUMP],
        capture_output=True,
        text=True,
        env={**os.environ, "FASTGUARD_CPU_CAPABILITY": "sse9"},
    )
    assert run.returncode != 0
    assert "FASTGUARD_CPU_CAPABILITY=sse9 is not one of default, avx2, avx512" in run.stderr
