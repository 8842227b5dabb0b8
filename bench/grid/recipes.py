"""How bench/stability.py trains: settings, and a loop that clips, skips and steps.

``before`` and ``stable`` are configs/teacher.yaml and configs/stable.yaml; learning rates are
relative to the patient's, of which ``stable`` has a tenth. ``guarded`` is configs/guarded.yaml
without its schedule.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import fastguard
from fastguard import thresholds

from . import published


@dataclass(frozen=True)
class Settings:
    """Those of ``before``."""

    lr: float = 1.0
    max_norm: float = 1.0
    skip_norm: float = math.inf
    linear_std: float = 0.01
    conv_scale: float = 1.0
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01
    clamp: float | None = None


BEFORE = Settings()
STABLE = Settings(
    lr=0.1,
    max_norm=0.5,
    skip_norm=10.0,
    linear_std=0.001,
    conv_scale=0.5,
    betas=(0.9, 0.98),
    clamp=10.0,
)
GUARDED = dataclasses.replace(BEFORE, betas=(0.9, 0.98), weight_decay=0.1, clamp=10.0)

#: One step after a backward pass.
Step = Callable[[Tensor], object]


@dataclass(frozen=True)
class Recipe:
    name: str
    #: What it does; a row of docs/results/stability.md.
    says: str
    settings: Settings
    #: (model, optimizer, settings, scaler) -> the step; may change the optimizer's class.
    loop: Callable[[nn.Module, torch.optim.Optimizer, Settings, torch.amp.GradScaler], Step]
    optimizer: Callable[..., torch.optim.Optimizer] = published.fused_adamw
    #: The package from PyPI that it needs.
    package: str | None = None
    #: Whether it has a way to use a GradScaler.
    scales: bool = True
    #: What a patient must have for it.
    needs: frozenset[str] = frozenset()

    def build(self, model: nn.Module, lr: float, scaler: torch.amp.GradScaler):
        """Initialise the model; the optimizer and the step."""
        s = self.settings
        fastguard.stable_init_(model, s.linear_std, s.conv_scale)
        if s.clamp is not None:
            clamp_attention_(model, s.clamp)
        optimizer = self.optimizer(
            model.parameters(), lr=s.lr * lr, betas=s.betas, weight_decay=s.weight_decay
        )
        return optimizer, self.loop(model, optimizer, s, scaler)


def clamp_attention_(model: nn.Module, clamp: float) -> None:
    for module in model.modules():
        if isinstance(module, fastguard.ClampedMultiheadAttention):
            module.clamp = clamp
    if any(isinstance(module, nn.MultiheadAttention) for module in model.modules()):
        fastguard.replace_attention_(model, clamp)


def guard(**options):
    """The loop of a GradGuard."""

    def loop(model, optimizer, settings, scaler) -> Step:
        guard = fastguard.GradGuard(model, settings.max_norm, settings.skip_norm, **options)
        return lambda loss: guard.step(optimizer, scaler=scaler, loss=loss)

    return loop


def literal(model, optimizer, settings, scaler) -> Step:
    """The rule of ``stable`` as first written: skip whatever is above ``skip_norm``."""
    parameters = list(model.parameters())

    def step(loss: Tensor) -> None:
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(parameters, settings.max_norm)
        if norm.isfinite() and norm <= settings.skip_norm:
            scaler.step(optimizer)
        scaler.update()

    return step


def ours(name: str, says: str, settings: Settings, loop=None, **options) -> Recipe:
    loop = guard() if loop is None else loop
    return Recipe(name, says, settings, loop, fastguard.AdamW, **options)


def put_back(setting: str, says: str, needs: tuple[str, ...] = ()) -> Recipe:
    """``stable`` with one setting of ``before``."""
    settings = dataclasses.replace(STABLE, **{setting: getattr(BEFORE, setting)})
    name = f"stable, {setting} of before"
    return ours(name, says, settings, needs=frozenset(needs))


ABLATIONS = [
    put_back("lr", "the full learning rate"),
    put_back("max_norm", "clipped at 1.0 and not at 0.5"),
    put_back("skip_norm", "no outliers: a norm is skipped only if it is NaN or Inf"),
    put_back("linear_std", "linear layers begin with 0.01 and not with 0.001"),
    put_back("conv_scale", "convolutions begin with their full weights", ("conv",)),
    put_back("betas", "0.999 and not 0.98"),
    put_back("clamp", "the attention's output is free", ("attention",)),
    Recipe("stable, unguarded", "clipped at 0.5, nothing skipped", STABLE, published.clip),
]

RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("plain", "the settings of `before` without clipping", BEFORE, published.plain),
        Recipe("before", "clip at 1.0, then AdamW: torch alone", BEFORE, published.clip),
        Recipe(
            "clip, look, skip",
            "the same, and no step if the norm is not finite",
            BEFORE,
            published.clip_look_skip,
        ),
        Recipe("stable, literal", "skip whatever is above 10, as first written", STABLE, literal),
        ours("stable", "`--stable` as it is", STABLE),
        ours(
            "guarded",
            "`--guarded`: the full learning rate, ZClip's threshold",
            GUARDED,
            guard(threshold=thresholds.ZClip(warmup=published.WARM_UP)),
        ),
        ours(
            "guarded, rollback",
            "the same; copies every 10 steps, back after 5 skips in a row",
            GUARDED,
            guard(
                threshold=thresholds.ZClip(warmup=published.WARM_UP),
                patience=5,
                on_patience="rollback",
                rollback=fastguard.Rollback(every=10),
            ),
        ),
        ours(
            "before, guarded",
            "the settings of `before` and a GradGuard with `skip_norm=10`",
            dataclasses.replace(BEFORE, skip_norm=STABLE.skip_norm),
        ),
        Recipe("zclip", "PyPI's zclip", BEFORE, published.zclip, package="zclip"),
        Recipe("smartclip", "PyPI's smartclip", BEFORE, published.smartclip, package="smartclip"),
        Recipe(
            "stabilityguard",
            "PyPI's stabilityguard",
            BEFORE,
            published.stabilityguard,
            package="stabilityguard",
        ),
        Recipe("SpeechBrain", "its loop", BEFORE, published.speechbrain),
        Recipe("NeMo", "its loop", BEFORE, published.nemo, scales=False),
        Recipe("ESPnet", "its loop", BEFORE, published.espnet),
        Recipe(
            "OLMo-core",
            "its SkipStepAdamW",
            BEFORE,
            published.olmo_core,
            published.SkipStepAdamW,
            scales=False,
        ),
        *ABLATIONS,
    )
}
