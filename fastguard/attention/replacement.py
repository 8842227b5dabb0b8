"""Turns each `nn.MultiheadAttention` of a model into a clamped one, in place."""

from __future__ import annotations

import fnmatch
import inspect
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.utils import parametrize

from fastguard._tensors import is_dtensor

from .functional import check_options
from .module import ClampedMultiheadAttention


@dataclass(frozen=True)
class Replacement:
    """The result of `replace_attention_`. Its `str` has a line for each module."""

    #: Names of the modules that are clamped now, as `model.named_modules` has them; "" is `model`.
    replaced: tuple[str, ...] = ()
    #: Why other modules of attention were left as they are, by name.
    left_alone: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"replaced {len(self.replaced)}, left alone {len(self.left_alone)}"]
        lines += [f"  replaced: {_shown(name)}" for name in self.replaced]
        lines += [f"  left alone: {_shown(name)}: {why}" for name, why in self.left_alone.items()]
        return "\n".join(lines)


def replace_attention_(
    model: nn.Module,
    clamp: float | None = 10.0,
    softcap: float | None = None,
    *,
    only: str | Iterable[str] | None = None,
    skip: str | Iterable[str] = (),
) -> Replacement:
    """Make each `nn.MultiheadAttention` of `model` a `ClampedMultiheadAttention`, in place.

    The modules stay the same objects with the same parameters, so that optimizers, hooks and
    references to them go on working; only their class changes. What is known to compute something
    else is left alone: subclasses (quantized ones among them), modules whose parameters are
    parametrized or DTensors, those whose `forward` was wrapped, those whose owner reads their
    weights and never calls them, scripted ones, and classes that say by their name that they are
    multi-head attention and are not torch's. A `ClampedMultiheadAttention` keeps its own bounds.
    Each `nn.TransformerEncoder` stops making nested tensors, as if ``enable_nested_tensor=False``.

    Args:
        clamp, softcap: those of `ClampedMultiheadAttention`.
        only: names of the modules to replace, as `model.named_modules` has them; ``*`` stands for
            any part of a name. None: all.
        skip: names, likewise, of modules to leave alone.

    Returns:
        What was replaced and what was left alone, by name, and why. `unused_attention` tells after
        a forward pass which of the replaced never ran.

    Warns:
        UserWarning: attention was left alone that `skip` and `only` did not leave out; nothing
            clamps it, or other bounds do. Or the model has no `nn.MultiheadAttention` at all.

    Raises:
        ValueError: an option is out of its range, or a name of `only` or `skip` fits no attention
            of the model; nothing is replaced then.
    """
    bounds = (clamp, softcap)
    found = {name: m for name, m in model.named_modules() if _is_wanted(m, bounds)}
    wanted = set(found) if only is None else _fitting(found, "only", only)
    wanted -= _fitting(found, "skip", skip)
    readers = _readers(model)
    left_alone = {}
    for name, module in found.items():
        why = _obstacle(module, readers) if name in wanted else "only= or skip= says so"
        if why is not None:
            left_alone[name] = why
    replaced = tuple(name for name in found if name not in left_alone)
    for name in replaced:
        check_options(found[name].dropout, softcap, clamp)
    for name in replaced:
        found[name].__class__ = ClampedMultiheadAttention
        vars(found[name]).pop("forward", None)  # accelerate leaves the class's forward there
        found[name].clamp, found[name].softcap = clamp, softcap
        found[name].never_ran = True
        found[name].keep_fast_path_off()
    if replaced:
        for module in model.modules():
            if isinstance(module, nn.TransformerEncoder):
                module.use_nested_tensor = False
    if unclamped := {name: why for name, why in left_alone.items() if name in wanted}:
        listed = "; ".join(f"{_shown(name)}: {why}" for name, why in unclamped.items())
        warnings.warn(f"attention that stays without this clamp: {listed}", stacklevel=2)
    if not found and not any(isinstance(m, ClampedMultiheadAttention) for m in model.modules()):
        warnings.warn(
            f"no nn.MultiheadAttention in {type(model).__name__}, nothing was replaced: call "
            "clamped_attention where the model computes attention",
            stacklevel=2,
        )
    return Replacement(replaced, left_alone)


def unused_attention(model: nn.Module) -> list[str]:
    """Names of the modules that `replace_attention_` replaced and that have not run since.

    Call it after a forward pass. A module that is named there has an owner that reads its weights
    and computes attention by itself: nothing clamps it.
    """
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, ClampedMultiheadAttention) and module.never_ran
    ]


def _fitting(found: dict[str, nn.Module], option: str, patterns: str | Iterable[str]) -> set[str]:
    """The names that the patterns fit."""
    fitting = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        fits = fnmatch.filter(found, pattern)
        if not fits:
            names = ", ".join(map(_shown, found)) or "none"
            raise ValueError(
                f"{option}={pattern!r} fits no nn.MultiheadAttention of the model; it has: {names}"
            )
        fitting.update(fits)
    return fitting


def _is_wanted(module: nn.Module, bounds: tuple[float | None, float | None]) -> bool:
    """Whether the module is attention without these bounds."""
    if isinstance(module, ClampedMultiheadAttention):
        return (module.clamp, module.softcap) != bounds
    if isinstance(module, nn.MultiheadAttention):
        return True
    called = "multiheadattention" in _class_name(module).replace("_", "").lower()
    # PEFT's module of that name contains torch's.
    return called and not any(isinstance(m, nn.MultiheadAttention) for m in module.modules())


def _class_name(module: nn.Module) -> str:
    """The name of the module's class; of a scripted or traced module that of the original class."""
    return getattr(module, "original_name", type(module).__name__)


def _obstacle(module: nn.Module, readers: dict[nn.Module, str]) -> str | None:
    """The reason why this module cannot be replaced; None if it can."""
    if isinstance(module, ClampedMultiheadAttention):
        return (
            f"it has its own bounds, clamp={module.clamp} and softcap={module.softcap}: set these "
            "attributes to change them"
        )
    if isinstance(module, torch.jit.ScriptModule):
        return f"it is a scripted {_class_name(module)}: replace it before you script or trace it"
    if parametrize.is_parametrized(module):
        return "its parameters are parametrized: replace it before you parametrize it"
    if any(is_dtensor(p) for p in module.parameters()):
        return "its parameters are DTensors: replace it before you shard the model"
    if type(module) is not nn.MultiheadAttention:
        name = f"{type(module).__module__}.{type(module).__qualname__}"
        return f"it is a {name}, and what that computes is not known here"
    if getattr(module.forward, "__func__", None) is not nn.MultiheadAttention.forward:
        return (
            "its forward was wrapped, as accelerate's hooks do, and the wrapper calls what it "
            "wrapped: replace it before you wrap it"
        )
    if (owner := readers.get(module)) is not None:
        return f"a {owner} holds it, and reads its weights itself instead of calling it"
    return None


def _readers(model: nn.Module) -> dict[nn.Module, str]:
    """The attentions whose owner computes attention itself, and the class of each owner."""
    return {
        child: type(module).__name__
        for module in model.modules()
        for child in module.children()
        if type(child) is nn.MultiheadAttention and _reads_weights(type(module))
    }


def _reads_weights(cls: type[nn.Module]) -> bool:
    """Whether the module's forward reads an attention's weights, as torchaudio's WavLM does."""
    if cls.__module__.startswith("torch.nn."):
        return False  # only the fast path of these does, and it is switched off
    try:
        source = inspect.getsource(cls.forward)
    except (OSError, TypeError):  # compiled, or typed at a prompt
        return False
    return "in_proj_weight" in source or "multi_head_attention_forward" in source


def _shown(name: str) -> str:
    return name or "the model itself"
