"""Checks of arguments for several references. They raise the errors of csrc/checks.h."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .types import DTYPES


def check_dtypes(op: str, tensors: Sequence[Tensor]) -> None:
    """Raise RuntimeError unless all are strided tensors of a dtype in :data:`DTYPES`."""
    for i, tensor in enumerate(tensors):
        # The dispatcher refuses both before it calls a kernel.
        if tensor.layout != torch.strided or hasattr(tensor, "full_tensor"):
            raise RuntimeError(
                f"{op}: tensor {i} is a {type(tensor).__name__} of layout {tensor.layout}; it must "
                "be a strided tensor, and a DTensor's local one"
            )
        if tensor.dtype not in DTYPES:
            raise RuntimeError(
                f"{op}: tensor {i} has dtype {tensor.dtype}; float32, float64, bfloat16 and "
                "float16 are supported"
            )


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether a tensor is expanded: several of its elements share one memory location."""
    sizes = zip(tensor.stride(), tensor.shape, strict=True)
    return tensor.numel() > 0 and any(stride == 0 and size > 1 for stride, size in sizes)


def check_no_overlap(op: str, tensors: Sequence[Tensor]) -> None:
    """Raise RuntimeError if one of the tensors is expanded."""
    for i, tensor in enumerate(tensors):
        if overlaps_itself(tensor):
            raise RuntimeError(
                f"{op}: tensor {i} is expanded: several of its elements share a single memory "
                "location; clone it"
            )


def check_tensor(op: str, name: str, tensor: Tensor, dtype: torch.dtype, *shape) -> None:
    """Raise RuntimeError unless the tensor is contiguous and has this dtype and shape.

    None in ``shape`` stands for any size.
    """
    fits = tensor.dtype == dtype and tensor.dim() == len(shape) and tensor.is_contiguous()
    if not fits or any(n not in (None, m) for n, m in zip(shape, tensor.shape, strict=True)):
        wanted = str(tuple("N" if n is None else n for n in shape)).replace("'", "")
        raise RuntimeError(
            f"{op}: {name} must be a contiguous tensor of {dtype} and shape {wanted}; got "
            f"{tensor.dtype} of shape {tuple(tensor.shape)}"
        )


def check_same_device(op: str, tensors: Iterable[Tensor | None]) -> None:
    """Raise RuntimeError if the tensors are on several devices. None is ignored.

    Fake kernels check this too: torch calls a fake kernel if meta tensors and others are mixed.
    """
    devices = {tensor.device for tensor in tensors if tensor is not None}
    if len(devices) > 1:
        raise RuntimeError(f"{op}: tensors on several devices, {sorted(map(str, devices))}")


def check_writable(op: str, tensors: Sequence[Tensor]) -> None:
    """Raise RuntimeError if torch would refuse to write one of the tensors.

    Torch itself would raise only after some of the tensors have been written.
    """
    if torch.is_inference_mode_enabled():
        return
    for i, tensor in enumerate(tensors):
        if tensor.is_inference():
            raise RuntimeError(
                f"{op}: tensor {i} was made in inference mode and cannot be written outside it; "
                "clone it"
            )
