"""One cell of the grid: a patient, trained by a recipe, with a fault; and what is left of it."""

import contextlib
import functools
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .faults import Fault
from .patients import HELD_OUT, Patient
from .recipes import Recipe

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class State:
    """Copies of what training changes, each in one tensor."""

    parameters: Tensor
    moments: Tensor
    buffers: Tensor

    def same_weights(self, other: "State") -> bool:
        return same_bits(self.parameters, other.parameters) and same_bits(
            self.moments, other.moments
        )


@dataclass
class Run:
    """What a cell did."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    #: Numbers of the batches whose step changed no bit of finite parameters.
    skipped: list[int] = field(default_factory=list)
    #: Steps after which parameters or moments hold a NaN or an Inf.
    nonfinite_updates: int = 0
    #: The class of the error that ended the run.
    ended: str | None = None
    #: Mean loss of the held-out batches before and after.
    evaluation: tuple[float, float] = (math.nan, math.nan)
    state: State | None = None
    seconds: float = 0.0


def one(tensors: Iterable[Tensor]) -> Tensor:
    flat = [tensor.detach().flatten().float() for tensor in tensors]
    return torch.cat(flat) if flat else torch.zeros(0)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


def finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())


def moments(optimizer: torch.optim.Optimizer) -> Tensor:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    states = [optimizer.state.get(p, {}) for p in parameters]
    return one(state[name] for state in states for name in MOMENTS if name in state)


@torch.no_grad()
def evaluate(patient: Patient, model: nn.Module) -> float:
    model.eval()
    losses = [patient.loss(model, patient.batch(number)).item() for number in HELD_OUT]
    model.train()
    return sum(losses) / len(losses)


def run(patient: Patient, recipe: Recipe, fault: Fault, seed: int = 0, bad: bool = True) -> Run:
    """Train.

    Args:
        seed: of the weights. Batches do not depend on it.
        bad: False leaves the faulty batches out, for comparison.
    """
    start = time.perf_counter()
    torch.manual_seed(seed)
    model = patient.make()
    scaler = torch.amp.GradScaler("cpu", enabled=fault.fp16)
    optimizer, step = recipe.build(model, fault.lr_factor * patient.lr, scaler)
    found = Run()
    first = evaluate(patient, model)
    before = one(model.parameters())
    for number in range(patient.steps):
        faulty = number in patient.bad
        if faulty and not (bad and fault.in_batches):
            if bad and fault.optimizer and number == patient.bad[0]:
                fault.optimizer(optimizer)
            continue
        optimizer.zero_grad()
        loss = forward(patient, fault, model, number, faulty)
        scale = scaler.get_scale()
        scaler.scale(loss).backward()
        if faulty and fault.backward:
            fault.backward(model)
        found.losses.append(loss.item())
        found.norms.append(norm(model) / scale)
        try:
            step(loss)
        except (RuntimeError, ValueError) as error:
            found.ended = type(error).__name__
        after = one(model.parameters())
        if same_bits(before, after) and finite(after):
            found.skipped.append(number)
        found.nonfinite_updates += not (finite(after) and finite(moments(optimizer)))
        before = after
        if found.ended:
            break
    found.evaluation = first, evaluate(patient, model)
    found.state = State(before, moments(optimizer), one(model.buffers()))
    found.seconds = time.perf_counter() - start
    return found


def forward(patient: Patient, fault: Fault, model: nn.Module, number: int, faulty: bool) -> Tensor:
    batch = patient.batch(number)
    if faulty and fault.batches:
        batch = fault.batches[patient.bad.index(number) % len(fault.batches)](batch)
    around = fault.forward(model) if faulty and fault.forward else contextlib.nullcontext()
    with around, torch.autocast("cpu", torch.float16, enabled=fault.fp16):
        return patient.loss(model, batch)


def norm(model: nn.Module) -> float:
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return torch.nn.utils.get_total_norm(grads).item()


@functools.lru_cache(maxsize=2)
def without_faults(patient: Patient, recipe: Recipe, fault: Fault, seed: int) -> Run:
    """The same without the faulty batches; of a fault that is in nothing else, the cell "none"."""
    return run(patient, recipe, fault, seed, bad=False)
