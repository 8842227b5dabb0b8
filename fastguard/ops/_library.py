"""Loads the shared libraries that setup.py built, and tells which tensors have a kernel."""

import functools
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

_SUFFIX = ".dll" if sys.platform == "win32" else ".so"


def _load(name: str) -> str | None:
    """Load one library; returns None, or the reason why it cannot be loaded."""
    path = Path(__file__).parent.parent / (name + _SUFFIX)
    if not path.is_file():
        return f"{path} was not built (`pip install -v -e .` shows why)"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"{path} does not load: {error}"
    return None


#: The reason why a library is not in use; None if it is in use.
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


def cpu_info() -> dict[str, str]:
    """The build of the CPU library and its chosen instruction set; {} if it was not built."""
    return {} if cpu_problem else _parse(torch.ops.fastguard.cpu_info.default())


def cuda_info() -> dict[str, str]:
    """The build of the CUDA library; {} if it is not in use."""
    return {} if cuda_problem else _parse(torch.ops.fastguard.cuda_info.default())


def _parse(info: str) -> dict[str, str]:
    return dict(line.split("=", 1) for line in info.splitlines())


def has_kernel(tensor: Tensor) -> bool:
    """Whether a native kernel serves this tensor. If none does, the reference serves it."""
    if tensor.is_cpu:
        return cpu_problem is None
    return tensor.is_cuda and cuda_problem is None and runs_on(tensor.device)


@functools.cache
def runs_on(device: torch.device) -> bool:
    """Whether the CUDA library holds code for this GPU: cubins of its generation, or PTX."""
    if not torch.cuda.is_available():
        return True  # the device of a fake tensor
    archs = cuda_info()["archs"].split()
    built = [int(arch) for arch in archs if arch.isdigit()]
    major, minor = torch.cuda.get_device_capability(device)
    here = 10 * major + minor
    as_cubin = any(arch // 10 == major and arch <= here for arch in built)
    return as_cubin or ("PTX" in archs and here >= built[-1])


def count_writes(tensors: Sequence[Tensor]) -> None:
    """Raise the version counters of tensors that a kernel wrote, so that autograd sees the write.

    The dispatcher does not count what an operator writes to the tensors of a list.
    """
    try:
        torch.autograd.graph.increment_version(tensors)
    except RuntimeError:  # a tensor made in inference mode has no version
        torch.autograd.graph.increment_version([t for t in tensors if not t.is_inference()])


# The registrations end with this object.
_registrations = None if cpu_problem else torch.library.Library("fastguard", "IMPL")


def register(name: str, fake: Callable, *, writes: bool = False) -> None:
    """Give an operator of csrc/ops.cpp its fake kernel, if the CPU library is there.

    Args:
        name: as in csrc/ops.cpp.
        fake: makes results of the operator's shapes and dtypes for fake tensors.
        writes: whether the operator writes to its arguments. It then refuses lazily negated and
            conjugated ones: torch would hand it a copy, whose new values are lost.
    """
    if _registrations is None:
        return
    torch.library.register_fake(f"fastguard::{name}", fake)
    if writes:
        for key in ("Negative", "Conjugate"):
            _registrations.impl(name, _refuse_lazy, key)


def _refuse_lazy(*args):
    raise RuntimeError(
        "fastguard: a tensor to be written has a lazy negation or conjugation; materialize it with "
        "resolve_neg() or resolve_conj()"
    )
