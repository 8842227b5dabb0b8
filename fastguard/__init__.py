"""fastguard: make a PyTorch training step survive a gradient explosion at almost no cost."""

from .attention import clamped_attention
from .bad_steps import GradientExplosionError
from .clip import clip_grad_norm_, clip_grads_with_norm_, get_total_norm
from .diagnose import Diagnosis, diagnose
from .guard import GradGuard
from .init import stable_init_
from .multihead import ClampedMultiheadAttention
from .ops import Verdict
from .optim import Adam, AdamW
from .replacement import Replacement, replace_attention_, unused_attention
from .rollback import Rollback
from .step_report import StepReport

__all__ = [
    "Adam",
    "AdamW",
    "ClampedMultiheadAttention",
    "Diagnosis",
    "GradGuard",
    "GradientExplosionError",
    "Replacement",
    "Rollback",
    "StepReport",
    "Verdict",
    "clamped_attention",
    "clip_grad_norm_",
    "clip_grads_with_norm_",
    "diagnose",
    "get_total_norm",
    "replace_attention_",
    "stable_init_",
    "unused_attention",
]
