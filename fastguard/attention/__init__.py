"""Attention whose output is clamped."""

from .functional import AttentionStats, clamped_attention, clamped_attention_and_weights
from .module import ClampedMultiheadAttention
from .replacement import Replacement, replace_attention_, unused_attention

__all__ = [
    "AttentionStats",
    "ClampedMultiheadAttention",
    "Replacement",
    "clamped_attention",
    "clamped_attention_and_weights",
    "replace_attention_",
    "unused_attention",
]
