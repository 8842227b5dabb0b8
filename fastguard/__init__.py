"""fastguard: make a PyTorch training step survive a gradient explosion at almost no cost."""

from .attention import clamped_attention
from .attention.module import ClampedMultiheadAttention
from .attention.replacement import Replacement, replace_attention_, unused_attention
from .clip import clip_grad_norm_, clip_grads_with_norm_, get_total_norm
from .diagnose import Diagnosis, diagnose
from .guard import GradGuard
from .guard.report import StepReport
from .guard.report_files import GradientExplosionError
from .guard.rollback import Rollback
from .ops import Verdict
from .optim import Adam, AdamW
from .stable_init import stable_init_

#: Of a commit, too: ``python -m fastguard.env`` prints both.
__version__ = "0.1.0"

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
