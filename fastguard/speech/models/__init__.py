"""Speech models by name: features (B, T, n_mels) in, CTC log-probabilities (B, T', V) out."""

from __future__ import annotations

from dataclasses import fields

from torch import nn

from .baseline import Baseline, BaselineConfig
from .teacher import Teacher, TeacherConfig

__all__ = ["MODELS", "build_model", "count_weight_layers"]

MODELS = {"baseline": (Baseline, BaselineConfig), "teacher": (Teacher, TeacherConfig)}


def build_model(name: str, **overrides) -> nn.Module:
    """A new model with torch's default initialisation, drawn from the global generator.

    Args:
        name: "baseline" or "teacher".
        overrides: fields of `BaselineConfig` or `TeacherConfig` that differ from its default.

    Returns:
        The model; ``model.config`` has the fields, ``model(features, feature_lengths)``
        the log-probabilities, ``model.output_lengths(feature_lengths)`` their number.

    Raises:
        ValueError: the name or an override is unknown, or a field has an impossible value.
    """
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}: choose one of {sorted(MODELS)}")
    model, config = MODELS[name]
    allowed = [field.name for field in fields(config)]
    unknown = sorted(set(overrides) - set(allowed))
    if unknown:
        raise ValueError(f"{name} has no option {unknown}: choose among {allowed}")
    return model(config(**overrides))


def count_weight_layers(model: nn.Module) -> int:
    """Number of weight matrices and filter banks: the depth of a model.

    Attention's packed input projection counts once. Normalisations and biases do not count.
    """
    return sum(parameter.dim() > 1 for parameter in model.parameters())
