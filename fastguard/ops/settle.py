"""``settle_``: keep the module's buffers, or set them back on a skip."""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _library
from ._checks import check_no_overlap, check_same_device, check_tensor, check_writable
from .packed import packed_strides
from .types import FLOATING_DTYPES, Verdict


@torch.no_grad()
def settle_(
    buffers: Sequence[Tensor], saved: Sequence[Tensor], verdict: Tensor, owners: Tensor
) -> Tensor:
    """Set ``buffers`` back to their ``saved`` copies on a skip, else bring the copies up to date.

    If an element is finite in a copy and NaN or Inf in its buffer, all buffers of the same owner
    are set back, whatever the verdict: BatchNorm's mean, variance and count belong together. The
    buffers of other owners follow the verdict.

    Two buffers may share memory: their copies are equal there, so both write the same values.

    Args:
        buffers, saved: N tensors each, of any dtype and device, equal in shape and dtype in pairs.
        verdict: int64, shape (), as :func:`guard_decide_` returns it.
        owners: int64, shape (N,), on the device of ``verdict``: for each buffer the number of the
            module that holds it, from 0 to N - 1.

    Returns:
        int32, shape (2 * N,). The first half is nonzero for each buffer that was set back because
        of its own NaN or Inf, the second half for each owner of such a buffer. All zero on a skip.

    Raises:
        RuntimeError: the lists differ in length, shapes or dtypes; on the CPU, an owner is out of
            range. On a GPU a buffer whose owner is out of range counts as its own owner.
    """
    if _library.has_kernel(verdict) and can_settle(buffers, saved, verdict.device):
        return torch.ops.fastguard.settle_.default(buffers, saved, verdict, owners)
    return settle_ref_(buffers, saved, verdict, owners)


def can_settle(buffers, saved, device: torch.device) -> bool:
    """Whether the operator takes the buffers: all are on the verdict's device.

    On a GPU they must also lie alike in memory, without gaps: the kernel copies memory.
    """
    if any(tensor.device != device for tensor in (*buffers, *saved)):
        return False
    return device.type == "cpu" or same_memory(buffers, saved)


def same_memory(buffers, saved) -> bool:
    """Whether each buffer and its copy have the same strides and no gaps."""
    return all(
        b.stride() == s.stride() == packed_strides(b) for b, s in zip(buffers, saved, strict=True)
    )


@torch.no_grad()
def settle_ref_(
    buffers: Sequence[Tensor], saved: Sequence[Tensor], verdict: Tensor, owners: Tensor
) -> Tensor:
    """:func:`settle_` in plain torch."""
    _check_settle(buffers, saved, verdict, owners)
    if owners.device.type != "cpu":  # the host cannot read the numbers without a sync
        known = (owners >= 0) & (owners < len(owners))
        owners = torch.where(known, owners, torch.arange(len(owners), device=owners.device))
    skip = verdict >= int(Verdict.SKIP_NONFINITE)
    none = torch.zeros_like(owners, dtype=torch.int32)
    if not buffers:
        return torch.cat([none, none])
    lost = [_lost(b, s).to(verdict.device) for b, s in zip(buffers, saved, strict=True)]
    of_buffer = torch.where(skip, none, torch.stack(lost).int())
    of_owner = none.index_add(0, owners, of_buffer)
    restore = skip | (of_owner[owners] > 0)
    for buffer, copy, back in zip(buffers, saved, restore, strict=True):
        buffer.copy_(torch.where(back.to(buffer.device), copy, buffer))
        copy.copy_(buffer)
    return torch.cat([of_buffer, of_owner])


def _check_settle(buffers, saved, verdict, owners) -> None:
    """Twins: check_settle and check_owner in csrc/checks.h."""
    check_tensor("settle_", "verdict", verdict, torch.int64)
    check_tensor("settle_", "owners", owners, torch.int64, None)
    n = len(buffers)
    if not n == len(saved) == len(owners):
        raise RuntimeError(
            f"settle_: {n} buffers but {len(saved)} saved copies and {len(owners)} owners"
        )
    for i, (buffer, copy) in enumerate(zip(buffers, saved, strict=True)):
        if buffer.shape != copy.shape or buffer.dtype != copy.dtype:
            raise RuntimeError(f"settle_: buffer {i} and its saved copy differ in shape or dtype")
    # Owners on a GPU are not read here (a sync), and a fake tensor has no values.
    known = owners.device.type == "cpu" and type(owners) is Tensor
    for owner in owners.tolist() if known else ():
        if not 0 <= owner < n:
            raise RuntimeError(
                f"settle_: owners must be numbers from 0 to {n - 1}, one for each buffer; got "
                f"{owner}"
            )
    for tensors in (buffers, saved):
        check_no_overlap("settle_", tensors)
        check_writable("settle_", tensors)


def _lost(buffer: Tensor, saved: Tensor) -> Tensor:
    """Whether an element is finite in the copy and not in the buffer; False for integers."""
    if buffer.dtype not in FLOATING_DTYPES:
        return torch.zeros((), dtype=torch.bool, device=buffer.device)
    if buffer.is_complex():
        buffer, saved = torch.view_as_real(buffer), torch.view_as_real(saved)
    return (saved.isfinite() & ~buffer.isfinite()).any()


def _fake_settle_(buffers, saved, verdict, owners):
    check_same_device("settle_", (*buffers, *saved, verdict, owners))
    return torch.empty(2 * len(buffers), dtype=torch.int32, device=verdict.device)


_library.register("settle_", _fake_settle_, writes=True)
