"""The guard: measure the gradients, decide, apply."""

from .grad_guard import GradGuard
from .report import StepReport
from .report_files import GradientExplosionError
from .rollback import Rollback

__all__ = ["GradGuard", "GradientExplosionError", "Rollback", "StepReport"]
