"""Conversion of tensors to the kind that the operators take: dense, real, local, on one device.

torch.distributed.tensor is imported only where there is a DTensor.
"""

import operator

import torch
from torch import Tensor

from . import ops

#: The gradient of a parameter, or None. `list(map(grad_of, parameters))` is one allocation. A list
#: of unknown length would be allocated several times, among the memory that the backward pass has
#: just freed: for 2000 parameters this took as long as a measurement of the gradients.
grad_of = operator.attrgetter("grad")


def is_dtensor(tensor_or_type: object) -> bool:
    """Whether a tensor, or a type of tensors, is a ``torch.distributed.tensor.DTensor``."""
    return hasattr(tensor_or_type, "full_tensor")


def local_parts(tensors: list[Tensor]) -> list[Tensor]:
    """This rank's part of each tensor: the shard of a DTensor, or the tensor itself."""
    if not any(map(is_dtensor, set(map(type, tensors)))):
        return tensors
    return [local_part(t) if is_dtensor(t) else t for t in tensors]


def local_part(dtensor: Tensor) -> Tensor:
    """This rank's shard of a DTensor."""
    local = dtensor.to_local()
    return local.wait() if hasattr(local, "wait") else local  # a collective may be in progress


def from_first_rank(tensor: Tensor, like: Tensor) -> Tensor:
    """The first rank's `tensor` on all ranks of the mesh of `like`; itself beside no DTensor."""
    if not is_dtensor(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return local_part(distribute_tensor(tensor, like.device_mesh))


def replicated_beside(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor that all ranks have, as a DTensor if `like` is one: torch does not mix the two."""
    if not is_dtensor(like):
        return tensor
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(tensor, like.device_mesh, run_check=False)


def by_device(tensors: list[Tensor]) -> list[list[Tensor]]:
    """The tensors of each device. The devices are in the order of their first tensors."""
    if len({t.device for t in tensors}) == 1:
        return [tensors]
    groups: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.device, []).append(tensor)
    return list(groups.values())


def readable(grads: list[Tensor]) -> list[Tensor]:
    """The elements of each gradient as a strided real tensor with the same 2-norm.

    These are the values of a sparse gradient, with duplicates added up, and the real and imaginary
    parts of a complex one.
    """
    if {g.layout for g in grads} == {torch.strided} and {g.dtype for g in grads} <= set(ops.DTYPES):
        return grads
    return [as_real(values_of(g)) for g in grads]


def values_of(grad: Tensor) -> Tensor:
    """The values of a sparse gradient, duplicates added up; a strided gradient itself."""
    if grad.layout == torch.strided:
        return grad
    return (grad.coalesce() if grad.layout == torch.sparse_coo else grad).values()


def as_real(tensor: Tensor) -> Tensor:
    """The real and imaginary parts of a complex tensor, in its memory; a real tensor itself.

    The memory of a lazily conjugated tensor, which autograd may return, is not conjugated.
    """
    if not tensor.is_complex():
        return tensor
    return torch.view_as_real(tensor.conj() if tensor.is_conj() else tensor)


def scale_(grads: list[Tensor], clip_coef: Tensor) -> None:
    """:func:`fastguard.ops.scale_` for gradients of any layout, dtype, device, and DTensors."""
    plain = readable(grads) is grads and not any(map(is_dtensor, set(map(type, grads))))
    for group in by_device(grads if plain else [_memory(g) for g in grads]):
        ops.scale_(group, clip_coef.to(group[0].device))
    if not plain:  # the version of a DTensor does not count writes to its shard
        ops.count_writes([g for g in grads if is_dtensor(g)])


def _memory(grad: Tensor) -> Tensor:
    """The memory of a gradient on this rank, as a strided real tensor."""
    grad = local_part(grad) if is_dtensor(grad) else grad
    if grad.layout == torch.sparse_coo:
        return as_real(grad._values())  # coalesce() would copy; summands scale like their sum
    return as_real(values_of(grad))
