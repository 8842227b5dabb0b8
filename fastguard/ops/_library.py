"""Loads the shared libraries that setup.py built. Imported by fastguard.ops, by nobody else."""

import sys
import warnings
from pathlib import Path

import torch

_SUFFIX = ".dll" if sys.platform == "win32" else ".so"


def _load(name: str) -> str | None:
    """Load one library; return None if that worked, else why not."""
    path = Path(__file__).parent.parent / (name + _SUFFIX)
    if not path.is_file():
        return f"{path} was not built (`pip install -v -e .` shows why)"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"{path} does not load: {error}"
    return None


#: Why a library is not in use, or None where it is.
cpu_problem = _load("_cpu")
cuda_problem = (
    "this torch has no CUDA"
    if torch.version.cuda is None
    else cpu_problem or _load("_cuda")  # the op schemas are in the CPU library
)

if cpu_problem is not None:
    warnings.warn(
        f"fastguard runs on its slow pure-torch references: {cpu_problem}. With a C++20 compiler "
        "on the PATH, `pip install --force-reinstall --no-deps -e .` builds the kernels.",
        RuntimeWarning,
        stacklevel=2,
    )
