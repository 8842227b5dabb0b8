"""What goes wrong in bench/stability.py: in single batches, or in a whole run."""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .patients import Batch, Patient


@dataclass(frozen=True)
class Fault:
    name: str
    #: What it does; a row of docs/results/stability.md.
    says: str
    #: What a patient must have for it, and why the others are left out.
    needs: frozenset[str] = frozenset()
    #: What the faulty batches become, in turns.
    batches: tuple[Callable[[Batch], Batch], ...] = ()
    #: What surrounds their forward passes.
    forward: Callable[[nn.Module], contextlib.AbstractContextManager] | None = None
    #: What is done to the gradients after their backward passes.
    backward: Callable[[nn.Module], None] | None = None
    #: What is done to the optimizer once, before the first faulty batch, which stays good.
    optimizer: Callable[[torch.optim.Optimizer], None] | None = None
    #: Of the whole run.
    lr_factor: float = 1.0
    fp16: bool = False

    @property
    def in_batches(self) -> bool:
        return any((self.batches, self.forward, self.backward))

    @property
    def bitwise(self) -> bool:
        """Whether the run without the faulty batches can be compared bit for bit.

        Under fp16 a GradScaler lowers its scale at a faulty batch, which rounds otherwise.
        """
        return self.in_batches and not self.fp16

    def fits(self, patient: Patient) -> bool:
        return self.needs <= patient.has


def infeasible(batch: Batch) -> Batch:
    """The first target gets more symbols than its recording has output frames."""
    frames = int((batch.lengths[0] + 3) // 4)
    target = batch.target.new_ones(len(batch.target), frames + 2)
    target[:, : batch.target.size(1)] = batch.target
    lengths = batch.target_lengths.clone()
    lengths[0] = frames + 2
    return batch._replace(target=target, target_lengths=lengths)


def with_nan(batch: Batch) -> Batch:
    x = batch.x.clone()
    x[0].view(-1)[0] = math.nan
    return batch._replace(x=x)


def times(factor: float) -> Callable[[Batch], Batch]:
    """The first sample of the batch times ``factor``."""

    def louder(batch: Batch) -> Batch:
        x = batch.x.clone()
        x[0] *= factor
        return batch._replace(x=x)

    return louder


@contextlib.contextmanager
def nan_in_front(model: nn.Module) -> Iterator[None]:
    """One NaN in what the last BatchNorm is given."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]

    def spoil(module, inputs):
        x = inputs[0].clone()
        x[0].select(-1, 0)[0] = math.nan
        return (x, *inputs[1:])

    hook = norms[-1].register_forward_pre_hook(spoil)
    try:
        yield
    finally:
        hook.remove()


def one_gradient(value: float) -> Callable[[nn.Module], None]:
    """One element of the gradient of the last weight matrix."""

    def spoil(model: nn.Module) -> None:
        last = [p for p in model.parameters() if p.dim() > 1][-1]
        last.grad.view(-1)[0] = value

    return spoil


def poisoned_moment(optimizer: torch.optim.Optimizer) -> None:
    """One element of a moment of the last weight matrix; nothing where no step was ever taken."""
    last = [p for group in optimizer.param_groups for p in group["params"] if p.dim() > 1][-1]
    if state := optimizer.state.get(last):
        state["exp_avg"].view(-1)[0] = math.nan


REAL, CTC, NORM = frozenset({"real input"}), frozenset({"ctc"}), frozenset({"batch norm"})

#: Why a patient that lacks it cannot have the fault.
WITHOUT = {
    "real input": "its inputs are whole numbers",
    "ctc": "its loss has no targets that can be too long",
    "batch norm": "it has no BatchNorm",
    "fp16": "torch has no fp16 LSTM on the CPU",
}

FAULTS = {
    fault.name: fault
    for fault in (
        Fault("none", "no fault; the batches that are faulty elsewhere are left out"),
        Fault("infeasible", "a target longer than its recording", CTC, batches=(infeasible,)),
        Fault("nan input", "one NaN in one sample", REAL, batches=(with_nan,)),
        Fault("loud input", "one sample times 1000", REAL, batches=(times(1e3),)),
        Fault("nan forward", "one NaN before the last BatchNorm", NORM, forward=nan_in_front),
        Fault("inf gradient", "one Inf in one gradient", backward=one_gradient(math.inf)),
        Fault("1e30 gradient", "1e30 in one gradient", backward=one_gradient(1e30)),
        Fault("poisoned moment", "one NaN in one moment of AdamW, once", optimizer=poisoned_moment),
        Fault("lr x 100", "the learning rate times 100, in the whole run", lr_factor=100.0),
        Fault(
            "fp16",
            "fp16 autocast and a fresh GradScaler in the whole run; one sample times 1e5, which "
            "overflows in the forward pass",
            REAL | {"fp16"},
            batches=(times(1e5),),
            fp16=True,
        ),
        Fault(
            "in turns",
            "a sample times 1000, an infeasible target and a NaN input, one each",
            REAL | CTC,
            batches=(times(1e3), infeasible, with_nan),
        ),
    )
}  # fmt: skip
