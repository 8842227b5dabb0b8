"""fastguard: make a PyTorch training step survive a gradient explosion at almost no cost."""

from .attention import ClampedMultiheadAttention, clamped_attention
from .clip import clip_grad_norm_, clip_grads_with_norm_, get_total_norm
from .guard import GradGuard, GradientExplosionError, StepReport
from .init import stable_init_
from .ops import Verdict

__all__ = [
    "ClampedMultiheadAttention",
    "GradGuard",
    "GradientExplosionError",
    "StepReport",
    "Verdict",
    "clamped_attention",
    "clip_grad_norm_",
    "clip_grads_with_norm_",
    "get_total_norm",
    "stable_init_",
]
