"""The same small training in every trainer, for tests that compare the results bitwise."""

import contextlib
import json
import logging
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import accelerate
import bitsandbytes
import lightning
import schedulefree
import torch
import torchao.optim
import transformers
from lightning.fabric.plugins import MixedPrecision as FabricMixedPrecision
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn

import fastguard
from fastguard import GradGuard
from fastguard.integrations.accelerate import attach_guard
from fastguard.integrations.lightning import GuardCallback as LightningCallback
from fastguard.integrations.transformers import GuardCallback as TransformersCallback

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
logging.getLogger("lightning.fabric").setLevel(logging.ERROR)

WIDTH = 64  # a matrix of 64 x 64 is the smallest that 8-bit optimizers quantise
MAX_NORM, SKIP_NORM = 1.0, 50.0
PRECISIONS = ("fp32", "bf16", "fp16")

#: For each kind of bad batch: the factor of its gradient, and the value in its input.
FAULTS = {
    "NaN input": (1.0, math.nan),
    "NaN gradient": (math.nan, None),
    "Inf": (math.inf, None),
    "1e30": (1e30, None),
}


class ScaleGradient(torch.autograd.Function):
    """The identity; backward multiplies the gradient by ``factor``."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.save_for_backward(factor)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0], None


class Net(nn.Module):
    """Matrices without biases, all of which Muon can hold, and BatchNorm's buffers.

    ``forward`` takes a result of :func:`batches`, and returns the loss in transformers' form.
    """

    def __init__(self, autocast: torch.dtype | None = None):
        super().__init__()
        torch.manual_seed(0)
        self.autocast = autocast  # for trainers without autocast of this type on the CPU
        self.net = nn.Sequential(
            nn.Linear(WIDTH, WIDTH, bias=False),
            nn.BatchNorm1d(WIDTH, affine=False),
            nn.Tanh(),
            nn.Linear(WIDTH, 8, bias=False),
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x, factor = x[:, :-1], x[:, -1:]
        with torch.autocast("cpu", self.autocast) if self.autocast else contextlib.nullcontext():
            y = self.net(x)
        return {"loss": (ScaleGradient.apply(y.float(), factor.float()) - 1).square().mean()}


def batches(count: int = 24, bad: dict[int, str] | None = None) -> list[Tensor]:
    """Inputs of 6 rows; the last column is a factor of the gradient. ``bad``: faults by place."""
    made = []
    for i in range(count):
        batch = torch.randn(6, WIDTH + 1, generator=torch.Generator().manual_seed(i))
        batch[:, -1] = 1.0
        if bad is not None and i in bad:
            factor, value = FAULTS[bad[i]]
            batch[2, -1] = factor
            if value is not None:
                batch[2, 3] = value
        made.append(batch)
    return made


@dataclass
class Run:
    """The end state of a training."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    guard: GradGuard
    learning_rate_steps: int

    def everything(self) -> dict[str, object]:
        """Weights, buffers, the optimizer's state and settings by name, without the guard's."""
        state = self.optimizer.state_dict()
        state["param_groups"][0].pop("fastguard")
        found = {name: value.clone() for name, value in self.model.state_dict().items()}
        _flatten("optimizer", state, found)
        found["learning rate steps"] = self.learning_rate_steps
        return found


def state_of(guard: GradGuard) -> str:
    """The state as text, in which two NaNs are equal."""
    return json.dumps(guard.state_dict())


def _flatten(name: str, value: object, found: dict[str, object]) -> None:
    if isinstance(value, dict):
        for key, each in value.items():
            _flatten(f"{name}.{key}", each, found)
    elif hasattr(value, "__tensor_flatten__"):  # torchao's quantised tensors
        for key in value.__tensor_flatten__()[0]:
            found[f"{name}.{key}"] = getattr(value, key)
    elif isinstance(value, (list, tuple)):
        for i, each in enumerate(value):
            _flatten(f"{name}.{i}", each, found)
    else:
        found[name] = value


def differences(one: dict, other: dict) -> list[str]:
    """The names of values that are not finite or not bitwise equal."""
    return sorted(
        name
        for name in one.keys() | other.keys()
        if name not in one or name not in other or not _same(one[name], other[name])
    )


def _same(a: object, b: object) -> bool:
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b) and bool(a.isfinite().all())
    return a == b


# --- optimizers -----------------------------------------------------------------------------------

Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def _schedule_free(parameters) -> torch.optim.Optimizer:
    optimizer = schedulefree.AdamWScheduleFree(parameters, lr=1e-2)
    optimizer.train()
    return optimizer


OPTIMIZERS: dict[str, Make] = {
    "fastguard.AdamW": lambda p: fastguard.AdamW(p, lr=1e-2),
    "torch.AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "torch.AdamW fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "torch.SGD": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "torch.Muon": lambda p: torch.optim.Muon(p, lr=1e-2),
    "schedulefree": _schedule_free,
    "bitsandbytes": lambda p: bitsandbytes.optim.AdamW8bit(p, lr=1e-2),
    "torchao": lambda p: torchao.optim.AdamW8bit(p, lr=1e-2),
}


def scheduler_of(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.95)


class HalvingScaler(torch.amp.GradScaler):
    """A GradScaler that halves its scale after given steps, as a bad step does."""

    def __init__(self, steps: int):
        super().__init__("cpu", **SCALER)
        self.steps = steps

    def update(self, new_scale=None):
        super().update(new_scale)
        self.steps -= 1
        if self.steps == 0:
            super().update(self.get_scale() / 2)


SCALER = {"init_scale": 1024.0, "growth_interval": 1000}


def grad_scaler(halve_after: int | None = None) -> torch.amp.GradScaler:
    if halve_after is not None:
        return HalvingScaler(halve_after)
    return torch.amp.GradScaler("cpu", **SCALER)


# --- trainers -------------------------------------------------------------------------------------


def plain_loop(make: Make, precision: str, data: list[Tensor], scaler=None) -> Run:
    """torch's recipe of a loop, with one line of fastguard, ``guard.attach``."""
    model = Net(autocast={"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision])
    optimizer = make(model.parameters())
    guard = GradGuard(model, **settings())
    guard.attach(optimizer)
    scheduler = guard.scheduler(scheduler_of(optimizer))
    for batch in data:
        optimizer.zero_grad()
        loss = model(batch)["loss"]
        if scaler is None:
            loss.backward()
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        scheduler.step()
    return Run(model, optimizer, guard, scheduler.last_epoch)


class LightningNet(lightning.LightningModule):
    def __init__(self, make: Make, automatic: bool = True):
        super().__init__()
        self.model = Net()
        self.make = make
        self.automatic_optimization = automatic

    def training_step(self, batch, batch_idx):
        if self.automatic_optimization:
            return self.model(batch)
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.model(batch)["loss"])
        optimizer.step()
        self.lr_schedulers().step()

    def configure_optimizers(self):
        optimizer = self.make(self.parameters())
        scheduler = {"scheduler": scheduler_of(optimizer), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}


def lightning_automatic(make: Make, precision: str, data: list[Tensor], scaler=None) -> Run:
    return _lightning(make, precision, data, scaler, automatic=True)


def lightning_manual(make: Make, precision: str, data: list[Tensor], scaler=None) -> Run:
    return _lightning(make, precision, data, scaler, automatic=False)


def _lightning(make: Make, precision: str, data: list[Tensor], scaler, automatic: bool) -> Run:
    module, callback = LightningNet(make, automatic), LightningCallback(**settings())
    trainer = lightning_trainer(precision, scaler, callbacks=[callback])
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=None))
    (scheduler,) = trainer.lr_scheduler_configs
    (guard,) = callback.guards
    return Run(module.model, trainer.optimizers[0], guard, scheduler.scheduler.last_epoch)


def lightning_trainer(precision: str = "fp32", scaler=None, **options) -> lightning.Trainer:
    # Lightning replaces "16-mixed" by "bf16-mixed" on a CPU, unless it is given as a plugin.
    if precision == "fp16":
        options["plugins"] = [MixedPrecision("16-mixed", "cpu", scaler)]
    else:
        options["precision"] = {"fp32": "32-true", "bf16": "bf16-mixed"}[precision]
    names = "logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"
    options = {"max_epochs": 1, **dict.fromkeys(names, False), **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return lightning.Trainer(accelerator="cpu", **options)


def fabric(make: Make, precision: str, data: list[Tensor], scaler=None) -> Run:
    if precision == "fp16":
        options = {"plugins": [FabricMixedPrecision("16-mixed", "cpu", scaler)]}
    else:
        options = {"precision": {"fp32": "32-true", "bf16": "bf16-mixed"}[precision]}
    fabric = lightning.Fabric(accelerator="cpu", **options)
    model = Net()
    plain = make(model.parameters())
    wrapped, optimizer = fabric.setup(model, plain)
    guard = GradGuard(model, **settings())
    guard.attach(optimizer)
    scheduler = guard.scheduler(scheduler_of(plain))
    for batch in data:
        optimizer.zero_grad()
        fabric.backward(wrapped(batch)["loss"])
        optimizer.step()
        scheduler.step()
    return Run(model, plain, guard, scheduler.last_epoch)


def accelerate_loop(make: Make, precision: str, data: list[Tensor], scaler=None) -> Run:
    accelerator = accelerator_of(precision, scaler)
    model = Net(autocast=torch.float16 if precision == "fp16" else None)
    plain = make(model.parameters())
    wrapped, optimizer, scheduler = accelerator.prepare(model, plain, scheduler_of(plain))
    guard = attach_guard(accelerator, wrapped, optimizer, **settings())
    for batch in data:
        with accelerator.accumulate(wrapped):
            accelerator.backward(wrapped(batch)["loss"])
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    return Run(model, plain, guard, scheduler.scheduler.last_epoch)


def accelerator_of(precision: str = "fp32", scaler=None, **options) -> accelerate.Accelerator:
    forget_accelerate()
    mixed = "bf16" if precision == "bf16" else "no"
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision=mixed, **options)
    accelerator.scaler = scaler  # accelerate makes one on accelerators only
    return accelerator


def forget_accelerate() -> None:
    """Reset accelerate's settings, which belong to the process: each run here has its own."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


class Trainer(transformers.Trainer):
    """A Trainer that takes the batches in the given order."""

    def get_train_dataloader(self):
        return torch.utils.data.DataLoader(self.train_dataset, collate_fn=lambda items: items[0])


def transformers_trainer(
    make: Make, precision: str, data: list[Tensor], scaler=None, folder="unused", **options
) -> Trainer:
    forget_accelerate()
    fixed = {"use_cpu": True, "report_to": "none", "disable_tqdm": True}
    defaults = {"max_grad_norm": MAX_NORM, "num_train_epochs": 1, "bf16": precision == "bf16"}
    nothing = {"save_strategy": "no", "logging_strategy": "no"}
    arguments = transformers.TrainingArguments(
        folder, **{**fixed, **defaults, **nothing, **options}
    )
    model = Net(autocast=torch.float16 if precision == "fp16" else None)
    optimizer = make(model.parameters())
    trainer = Trainer(
        model,
        arguments,
        train_dataset=[{"x": batch} for batch in data],
        optimizers=(optimizer, scheduler_of(optimizer)),
    )
    trainer.accelerator.scaler = scaler
    return trainer


def transformers_run(make: Make, precision: str, data: list[Tensor], scaler=None) -> Run:
    trainer = transformers_trainer(make, precision, data, scaler)
    callback = TransformersCallback(trainer, skip_norm=SKIP_NORM)
    trainer.add_callback(callback)
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    return Run(trainer.model, optimizer, callback.guard, trainer.lr_scheduler.last_epoch)


def settings() -> dict[str, float]:
    return {"max_norm": MAX_NORM, "skip_norm": SKIP_NORM}


TRAINERS = {
    "plain loop": plain_loop,
    "Lightning, automatic": lightning_automatic,
    "Lightning, manual": lightning_manual,
    "Fabric": fabric,
    "accelerate": accelerate_loop,
    "transformers": transformers_run,
}
