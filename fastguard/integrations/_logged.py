"""What the integrations log."""

from fastguard.guard.report import StepReport


def logged(report: StepReport) -> dict[str, float]:
    """The values of one step under the names that every integration logs.

    ``guard/verdict`` is the number of a :class:`fastguard.ops.Verdict`: 0 applied, 1 clipped, 2 and
    more skipped. ``guard/grad_norm`` is the L2 norm before clipping, after unscaling.
    """
    return {
        "guard/verdict": float(report.verdict),
        "guard/grad_norm": report.total_norm,
        "guard/clip_coef": report.clip_coef,
    }
