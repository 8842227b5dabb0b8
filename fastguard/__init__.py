"""fastguard: make a PyTorch training step survive a gradient explosion at almost no cost."""

from .attention import ClampedMultiheadAttention, clamped_attention
from .clip import clip_grad_norm_
from .guard import GradGuard, GradientExplosionError, StepReport
from .init import stable_init_
from .ops import Verdict
from .optim import Adam, AdamW

__all__ = [
    "Adam",
    "AdamW",
    "ClampedMultiheadAttention",
    "GradGuard",
    "GradientExplosionError",
    "StepReport",
    "Verdict",
    "clamped_attention",
    "clip_grad_norm_",
    "stable_init_",
]
