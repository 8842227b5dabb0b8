"""One decision for all ranks that train together. Their gradients may be shards."""

import math
import sys
import weakref
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, distributed, nn

from fastguard import ops
from fastguard._tensors import is_dtensor

_BUCKET_ELEMENTS = 2**24  # 64 MiB of float32: large enough that the network's speed counts

_INSTEAD = (
    "Use fully_shard of torch.distributed.fsdp (FSDP2) with an optimizer of its parameters, which "
    "GradGuard supports"
)

_groups: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def ranks_of(names: list[str], parameters: list[Tensor], group) -> "Ranks | None":
    """The ranks that have to agree, or None where this process decides by itself."""
    if group is None and not any(map(is_dtensor, set(map(type, parameters)))):
        return None
    return Ranks(names, parameters, group)


class Ranks:
    """The processes that make one decision, each from its part of the gradients.

    The choice of the collective depends on the parameters alone. It must not depend on a value, on
    a local shape or on whether this rank has a gradient: a rank that does not take part makes the
    others wait for ever.

    Args:
        names, parameters: equal and in the same order on every rank. Every rank holds all of a
            plain tensor. The same number of ranks holds each shard of a DTensor.
        group: a process group. None stands for the ranks of the DTensors' mesh, of several meshes
            the largest one.

    Raises:
        ValueError: the mesh of a DTensor has ranks that the group lacks, or the number of its
            shards does not divide the size of the group.
    """

    def __init__(self, names: list[str], parameters: list[Tensor], group=None):
        meshes = {p.device_mesh: None for p in parameters if is_dtensor(p)}
        self.sharded = bool(meshes)
        self._names = names
        self._group = (
            _group_of(max(meshes, key=lambda mesh: mesh.size())) if group is None else group
        )
        self._size = distributed.get_world_size(self._group)
        if self._size < 1:
            raise ValueError("this process is not in the process_group that was given to GradGuard")
        self._check(names, parameters)
        #: The device of the group's collectives. Offloaded gradients are on another one.
        self._there = next((torch.device(mesh.device_type) for mesh in meshes), None)
        #: How many ranks hold each element of each gradient.
        self._copies = torch.tensor(
            [self._size / _number_of_parts(p) for p in parameters],
            dtype=torch.float64,
            device="cpu",
        )

    def _check(self, names: list[str], parameters: list[Tensor]) -> None:
        members = distributed.get_process_group_ranks(self._group)
        here = distributed.get_rank()
        for name, p in zip(names, parameters, strict=True):
            if not is_dtensor(p):
                continue
            ranks = p.device_mesh.mesh.flatten().tolist()
            if not {here} <= set(ranks) <= set(members) or self._size % _number_of_parts(p):
                raise ValueError(
                    f"{name} is a DTensor on the ranks {ranks}, while {members} decide together "
                    f"and this is rank {here}: each must hold a part of every parameter, and the "
                    "same number of ranks each part; give GradGuard the process_group of all ranks "
                    "that train the same parameters together"
                )

    def all_of(
        self, names: list[str], grads: list[Tensor], device: torch.device
    ) -> tuple[list[str], list[Tensor]]:
        """One gradient per parameter, in order; an empty tensor where this rank has none."""
        if names == self._names:
            return names, grads
        there = dict(zip(names, grads, strict=True))
        none = torch.empty(0, device=device)
        return self._names, [there.get(name, none) for name in self._names]

    def agree(
        self, measured: ops.GradNorm, unscale: Tensor | None, loss: Tensor | None
    ) -> tuple[ops.GradNorm, Tensor, Tensor]:
        """The inputs of the decision, bitwise equal on every rank, without a host-device sync.

        This is one all-reduce of 3 N + 4 float64 numbers for N parameters. The results are derived
        from the sums by correctly rounded operations, so they are equal on all ranks. A NaN from
        one rank becomes a NaN on all ranks.

        Returns:
            The norms of the whole gradients with the counts of their NaNs and Infs; the index of
            the first one refers to this rank's part. The mean of ``unscale``. The mean of the
            losses over the ranks that gave one.
        """
        squares = measured.norms.square()
        self._copies = copies = self._copies.to(squares.device)
        zero = torch.zeros_like(measured.total_norm)
        one = torch.ones_like(zero)
        told = [
            (squares / copies).sum(),
            zero if loss is None else loss,
            zero if loss is None else one,
            one if unscale is None else unscale,
        ]
        counts = measured.nonfinite[:, :2].double().flatten()
        summed = self.sum_of(torch.cat([squares, counts, torch.stack(told)]))
        n = len(squares)
        squares, counts, told = summed.split([n, 2 * n, len(told)])
        square, loss, losses, unscale = told.unbind()
        unscale = unscale / self._size
        # unscale is NaN on a rank whose GradScaler.unscale_ found a NaN or Inf (LossScale.reject).
        square = torch.where(unscale.isnan(), math.nan, square)
        counts = (counts.view(n, 2) / copies[:, None]).ceil().long()
        whole = ops.GradNorm(
            square.sqrt(),
            (squares / copies).sqrt(),
            torch.cat([counts, measured.nonfinite[:, 2:]], dim=1),
        )
        return whole, unscale, loss / losses.clamp(min=1)

    def add_up_(self, tensors: list[Tensor]) -> None:
        """Sum the tensors over all ranks, in place, several tensors per all-reduce.

        Args:
            tensors: strided, on one device, of the same shapes and dtypes on every rank. Their
                strides may differ between ranks.
        """
        for bucket in _buckets([torch.view_as_real(t) if t.is_complex() else t for t in tensors]):
            flat = self.sum_of(torch.cat([t.reshape(-1) for t in bucket]))
            for tensor, part in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
                tensor.copy_(part.view(tensor.shape))

    def sum_of(self, numbers: Tensor) -> Tensor:
        """The sum over all ranks, bitwise equal on each, as a new tensor."""
        there = numbers.device if self._there is None else self._there
        summed = numbers.to(there, copy=True)
        distributed.all_reduce(summed, group=self._group)
        return summed.to(numbers.device)


def _buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Lists of consecutive tensors of one dtype, each of about _BUCKET_ELEMENTS elements."""
    bucket, elements = [], 0
    for tensor in tensors:
        if bucket and (tensor.dtype != bucket[0].dtype or elements >= _BUCKET_ELEMENTS):
            yield bucket
            bucket, elements = [], 0
        bucket.append(tensor)
        elements += tensor.numel()
    if bucket:
        yield bucket


def check_whole(module: nn.Module | None, names: list[str], parameters: list[Tensor]) -> None:
    """ValueError for parameters whose gradients the guard sees in part or not at all."""
    fsdp = sys.modules.get("torch.distributed.fsdp.fully_sharded_data_parallel")
    parts = () if module is None else module.modules()
    if any(_is_deepspeed(part) for part in parts) or any(hasattr(p, "ds_id") for p in parameters):
        raise ValueError(f"DeepSpeed steps and shards by itself. {_INSTEAD}")
    parts = () if module is None or fsdp is None else module.modules()
    if any(isinstance(part, fsdp.FullyShardedDataParallel) for part in parts) or any(
        getattr(p, "_fsdp_flattened", False) for p in parameters
    ):
        raise ValueError(
            "FullyShardedDataParallel (FSDP1) holds flat shards that do not say what they are "
            f"parts of: each rank would see another norm. {_INSTEAD}"
        )
    for name, p in zip(names, parameters, strict=True):
        if getattr(p, "_in_backward_optimizers", None):
            raise ValueError(
                f"an optimizer steps {name} in the backward pass (_apply_optimizer_in_backward), "
                "before the norm of all gradients is known: build the optimizer over all "
                "parameters, and call guard.step(optimizer) after backward"
            )


def check_whole_state(optimizer: torch.optim.Optimizer) -> None:
    """ValueError for an optimizer that is sharded: each rank steps a part of the parameters."""
    zero = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    if zero is not None and isinstance(optimizer, zero.ZeroRedundancyOptimizer):
        raise ValueError(
            f"ZeroRedundancyOptimizer steps a part of the parameters on each rank. {_INSTEAD}"
        )
    if _is_deepspeed(optimizer):
        raise ValueError(f"{type(optimizer).__name__} steps by itself. {_INSTEAD}")


def _is_deepspeed(thing: object) -> bool:
    return any(base.__module__.partition(".")[0] == "deepspeed" for base in type(thing).__mro__)


def lay_out_(parameters: Iterable[Tensor]) -> None:
    """Give gradients the placements of their parameters; torch may leave them as partial sums."""
    for p in parameters:
        grad = p.grad
        if is_dtensor(grad) and is_dtensor(p) and grad.placements != p.placements:
            p.grad = grad.redistribute(p.device_mesh, p.placements)


def _number_of_parts(parameter: Tensor) -> int:
    if not is_dtensor(parameter):
        return 1
    sizes = zip(parameter.device_mesh.shape, parameter.placements, strict=True)
    return math.prod(size for size, placement in sizes if not placement.is_replicate())


def _group_of(mesh):
    """The process group of all ranks of a mesh."""
    if mesh.ndim == 1:
        return mesh.get_group()
    if mesh.size() == distributed.get_world_size():
        return distributed.group.WORLD
    # One group over all dimensions, not one reduction per dimension: one all-reduce gives its ranks
    # equal bits, while two all-reduces of equal numbers in two groups may differ in rounding.
    if mesh not in _groups:
        ranks = mesh.mesh.flatten().tolist()
        _groups[mesh] = distributed.new_group(ranks, use_local_synchronization=True)
    return _groups[mesh]
