"""The operator of attention says that its working memory is not to be had."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.native import needs_kernel

OUT_OF_MEMORY = """
import resource, torch, fastguard
from pathlib import Path
query = torch.zeros(1, 1, 64, 64)
key = torch.zeros(1, 1, 400_000, 64)
fastguard.clamped_attention(query, key[:, :, :8], key[:, :, :8])
pages = int(Path("/proc/self/statm").read_text().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 50_000_000,) * 2)
try:
    fastguard.clamped_attention(query, key, key)
except RuntimeError as error:
    print(error)
"""


@needs_kernel
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc on this system")
def test_a_lack_of_memory_is_said():
    done = subprocess.run(
        [sys.executable, "-c", OUT_OF_MEMORY], capture_output=True, text=True, check=True
    )
    assert re.search(r"attention: not enough memory: \d+ threads need \d{8,} bytes", done.stdout)
    assert "torch.set_num_threads" in done.stdout
