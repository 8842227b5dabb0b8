"""Loops that others publish, for bench/stability.py, written anew from their sources.

Each takes a model, an optimizer, the settings and a GradScaler, which is disabled where the run is
not in fp16, and makes the step that follows a backward pass. What their authors leave off by
default and what would help is on. Warm-ups are shortened to WARM_UP steps: in the runs of the
bench the first fault comes after 24.

==================  ==============================================================================
``speechbrain``     speechbrain/core.py: optimizers_step, check_gradients, check_loss_isfinite
``nemo``            nemo/collections/asr/models/asr_model.py: on_after_backward; Lightning steps
``espnet``          espnet2/train/trainer.py: train_one_epoch
``olmo_core``       olmo_core/optim/skip_step_optimizer.py and adamw.py
``zclip``           the package of PyPI; so are ``smartclip`` and ``stabilityguard``
==================  ==============================================================================
"""

import contextlib
import io
import tempfile

import torch
from torch import Tensor, nn

from fastguard._extras import require

WARM_UP = 16
_folder = tempfile.TemporaryDirectory()  # StabilityGuard makes a folder for its reports


def fused_adamw(parameters, **options) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, fused=True, **options)


# --- torch alone ----------------------------------------------------------------------------------


def plain(model: nn.Module, optimizer, settings, scaler):
    def step(loss: Tensor) -> None:
        scaler.step(optimizer)
        scaler.update()

    return step


def clip(model: nn.Module, optimizer, settings, scaler):
    def step(loss: Tensor) -> None:
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), settings.max_norm)
        scaler.step(optimizer)
        scaler.update()

    return step


def clip_look_skip(model: nn.Module, optimizer, settings, scaler):
    return _clip_look_skip(model, optimizer, settings.max_norm, scaler)


def _clip_look_skip(model: nn.Module, optimizer, max_norm: float, scaler):
    def step(loss: Tensor) -> None:
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        if norm.isfinite():
            scaler.step(optimizer)
        scaler.update()

    return step


# --- the loops of trainers ------------------------------------------------------------------------


def espnet(model: nn.Module, optimizer, settings, scaler):
    """As by hand, with ESPnet's ``grad_clip`` of 5."""
    return _clip_look_skip(model, optimizer, 5.0, scaler)


def speechbrain(model: nn.Module, optimizer, settings, scaler):
    """With ``skip_nonfinite_grads=True``; ``max_grad_norm=5`` and ``nonfinite_patience=3``.

    SpeechBrain looks at each gradient after it has clipped them all together.
    """
    nonfinite = 0

    def step(loss: Tensor) -> None:
        nonlocal nonfinite
        if not loss.isfinite():
            nonfinite += 1
            if nonfinite > 3:
                raise ValueError("Loss is not finite and patience is exhausted.")
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 5.0)
        for p in model.parameters():
            if p.grad is not None and not p.grad.isfinite().all():
                p.grad = None
        if any(p.grad is not None for p in model.parameters()):
            scaler.step(optimizer)
        scaler.update()

    return step


def nemo(model: nn.Module, optimizer, settings, scaler):
    """With ``skip_nan_grad=True``; NeMo clips nothing by default.

    It looks at the gradients before Lightning unscales them, and takes them away. What a GradScaler
    that finds none does then is Lightning's matter, and fp16 is left out here.
    """

    def step(loss: Tensor) -> None:
        if any(not p.grad.isfinite().all() for p in model.parameters() if p.grad is not None):
            model.zero_grad()
        optimizer.step()

    return step


class SkipStepAdamW(torch.optim.Optimizer):
    """OLMo-core's arithmetic: a factor of 0 or 1 in each term in place of a branch."""

    def __init__(self, parameters, lr: float, betas: tuple[float, float], weight_decay: float):
        super().__init__(parameters, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, factor: Tensor) -> None:
        for group in self.param_groups:
            lr, (beta1, beta2) = group["lr"], group["betas"]
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["step"] = torch.zeros(())
                    state["exp_avg"] = torch.zeros_like(p)
                    state["exp_avg_sq"] = torch.zeros_like(p)
                state["step"] += factor
                average, square, step = state["exp_avg"], state["exp_avg_sq"], state["step"]
                p.mul_(1 - factor * lr * group["weight_decay"])
                average.lerp_(p.grad, factor * (1 - beta1))
                square.mul_(1 - factor * (1 - beta2)).add_(factor * (1 - beta2) * p.grad * p.grad)
                deviation = (square / (1 - beta2**step)).sqrt() + 1e-8
                p.sub_(factor * lr / (1 - beta1**step) * average / deviation)


def olmo_core(model: nn.Module, optimizer: SkipStepAdamW, settings, scaler):
    """Clips at ``max_norm``; skips a loss or norm 6 deviations from the mean of the last ones.

    The interval is 40 steps and not 128, so that 20 and not 64 steps must have been seen.
    """
    interval, sigmas = 40, 6
    losses, norms = [], []

    def far(values: list[Tensor]) -> Tensor:
        deviation, mean = torch.std_mean(torch.stack(values[:-1]))
        return (values[-1] - mean).abs() / deviation

    def step(loss: Tensor) -> None:
        losses.append(loss.detach())
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), settings.max_norm))
        del losses[: -interval - 1], norms[: -interval - 1]
        factor = torch.ones(())
        if len(losses) >= max(20, interval // 2):
            factor = ((far(losses) <= sigmas) & (far(norms) <= sigmas)).float()
        optimizer.step(factor)

    return step


# --- packages -------------------------------------------------------------------------------------


def zclip(model: nn.Module, optimizer, settings, scaler):
    """With its own ``max_grad_norm`` of 1."""
    guard = require("zclip", "bench").ZClip(warmup_steps=WARM_UP)

    def step(loss: Tensor) -> None:
        scaler.unscale_(optimizer)
        guard.step(model)
        scaler.step(optimizer)
        scaler.update()

    return step


def smartclip(model: nn.Module, optimizer, settings, scaler):
    """AutoClip in its mode "auto" over all gradients."""
    package = require("smartclip", "bench")
    clipper = package.AutoClip(warmup_steps=WARM_UP, min_history=WARM_UP)

    def step(loss: Tensor) -> None:
        scaler.unscale_(optimizer)
        package.apply(model, clipper)
        scaler.step(optimizer)
        scaler.update()

    return step


def stabilityguard(model: nn.Module, optimizer, settings, scaler):
    """GuardedOptimizer, which skips NaN, Inf and spikes of 10 times a layer's average."""
    package = require("stabilityguard", "bench")
    guarded = package.GuardedOptimizer(
        optimizer, model, warmup_steps=WARM_UP, verbose=False, log_dir=_folder.name
    )

    def step(loss: Tensor) -> None:
        scaler.unscale_(optimizer)
        with contextlib.redirect_stdout(io.StringIO()):  # it prints a box for each spike
            guarded.step(loss=loss.item())
        scaler.update()

    return step
