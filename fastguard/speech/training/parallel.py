"""One process, or several under torchrun: the rank of this process, and their communication."""

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from fastguard.optim.packed_state import MASTER

from .precision import float32_weights, load_float32_weights

_WORD = "fastguard/ended"  # key in the store


class Parallel:
    """This process among ``world_size``. In a run of one process no method communicates.

    Args:
        kind: "ddp", a whole model in each process, or "fsdp", a shard in each (FSDP2).
        store: where a process writes what ended it.
    """

    def __init__(self, kind: str = "ddp", store: dist.Store | None = None):
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1
        self.sharded = kind == "fsdp" and dist.is_initialized()
        self._store = store
        self.device = torch.device("cpu")
        if torch.cuda.is_available():
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(self.device)

    @classmethod
    @contextlib.contextmanager
    def start(cls, kind: str) -> Iterator["Parallel"]:
        """Join the processes that torchrun started, and leave them at the end."""
        torchrun = _under_torchrun()
        store = None
        if torchrun:
            store, rank, size = next(
                rendezvous("env://")
            )  # torchrun's own, which outlives the processes
            backend = "nccl" if torch.cuda.is_available() else "gloo"
            dist.init_process_group(backend, store=store, rank=rank, world_size=size)
        try:
            yield cls(kind, store)
        finally:
            if torchrun:
                dist.destroy_process_group()

    @property
    def main(self) -> bool:
        """Whether this is the process that writes files."""
        return self.rank == 0

    @property
    def group(self) -> dist.ProcessGroup | None:
        """All processes; None if there is one."""
        return dist.group.WORLD if self.world_size > 1 else None

    def wrap(self, model: nn.Module) -> nn.Module:
        """The module to call in training; the parameters of ``model`` may become shards."""
        if self.sharded:
            for part in model.children():
                for block in part if isinstance(part, nn.ModuleList) else ():
                    fully_shard(block)
            fully_shard(model)
        elif self.world_size > 1:
            ids = [self.device.index] if self.device.type == "cuda" else None
            return DistributedDataParallel(model, device_ids=ids)
        return model

    def share_buffers(self, model: nn.Module) -> None:
        """Copy the buffers of the first process to all, as DistributedDataParallel does before each
        forward pass. FSDP does not share BatchNorm's statistics."""
        by_dtype: dict[torch.dtype, list[torch.Tensor]] = {}
        for buffer in model.buffers() if self.world_size > 1 else ():
            by_dtype.setdefault(buffer.dtype, []).append(buffer)
        for buffers in by_dtype.values():
            flat = _flatten_dense_tensors(buffers)
            dist.broadcast(flat, 0)
            torch._foreach_copy_(buffers, list(_unflatten_dense_tensors(flat, buffers)))

    def wait(self) -> None:
        """Wait until every process is here."""
        if self.world_size > 1:
            dist.barrier()

    # --- what the processes tell each other -------------------------------------------------------

    def sum(self, value: float) -> float:
        """The sum of a number over all processes, in float64."""
        if self.world_size == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.item()

    def any(self, flag: bool) -> bool:
        """Whether a flag is set in any process."""
        return self.sum(float(flag)) > 0

    def gather(self, value: Any) -> list:
        """The values of all processes, in the order of the ranks."""
        if self.world_size == 1:
            return [value]
        values: list = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def from_main(self, value: Any) -> Any:
        """The value of the first process."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]

    # --- how they end -----------------------------------------------------------------------------

    def leave_word(self, cause: str) -> None:
        """Tell the others what ends this process; the first message counts."""
        if self._store is not None:
            with contextlib.suppress(dist.DistError, RuntimeError):  # torchrun may be gone too
                self._store.compare_set(_WORD, "", f"process {self.rank}: {cause}")

    def word(self) -> str | None:
        """What ended another process; None if no process left a message."""
        if self._store is not None:
            with contextlib.suppress(dist.DistError, RuntimeError):
                return self._store.get(_WORD).decode() if self._store.check([_WORD]) else None
        return None

    def lost_another(self, error: Exception) -> bool:
        """Whether the error means that another process is gone."""
        words = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer")
        return self.world_size > 1 and (
            isinstance(error, dist.DistError)
            or (isinstance(error, RuntimeError) and any(word in str(error) for word in words))
        )

    # --- whole states out of shards, and back -----------------------------------------------------

    def weights_of(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict:
        """The float32 state dict of the whole model; it may be empty except in the first process.

        Args:
            model: the one in training, or an averaged one.
            optimizer: of the model in training; its masters take the place of their weights.
        """
        if not self.sharded:
            return float32_weights(model, optimizer)
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return get_model_state_dict(model, options=options)

    def state_of(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict, dict]:
        """The state dicts of the whole model and optimizer; they may be empty except in the first
        process."""
        if not self.sharded:
            return float32_weights(model, optimizer), _without_masters(optimizer.state_dict())
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return (
            get_model_state_dict(model, options=options),
            get_optimizer_state_dict(model, optimizer, options=options),
        )

    def load(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, weights: dict, moments: dict
    ) -> None:
        """Load what :meth:`state_of` gave."""
        if not self.sharded:
            optimizer.load_state_dict(moments)
            load_float32_weights(model, optimizer, weights)
            return
        options = StateDictOptions(full_state_dict=True)
        moments = _by_name(moments, model)
        set_model_state_dict(model, weights, options=options)
        set_optimizer_state_dict(model, optimizer, moments, options=options)


def leave(status: int) -> NoReturn:
    """End this process with ``status``, with sys.exit if it is the only one.

    One of several processes ends without the interpreter's shutdown. FSDP's mesh keeps the process
    group alive after destroy_process_group. If a thread of gloo releases the tensors of the last
    collective in the shutdown, the process aborts with "terminate called without an active
    exception" (pytorch/pytorch 179291), and torchrun reports a finished run as failed.
    """
    if not _under_torchrun():
        sys.exit(status)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _under_torchrun() -> bool:
    return "RANK" in os.environ and "MASTER_ADDR" in os.environ


def _without_masters(moments: dict) -> dict:
    """An optimizer's state dict for a checkpoint that has the masters as the model's weights."""
    state = {
        number: {name: value for name, value in entries.items() if name != MASTER}
        for number, entries in moments["state"].items()
    }
    return {**moments, "state": state}


def _by_name(moments: dict, model: nn.Module) -> dict:
    """An optimizer's state dict with parameter names in place of numbers."""
    numbers = [key for group in moments["param_groups"] for key in group["params"]]
    names = [name for name, _ in model.named_parameters()]
    called = dict(zip(numbers, names, strict=True))
    return {
        "state": {called[key]: value for key, value in moments["state"].items()},
        "param_groups": [
            {**group, "params": [called[key] for key in group["params"]]}
            for group in moments["param_groups"]
        ],
    }
