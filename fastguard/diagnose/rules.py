"""All rules, in order. A rule turns the recorded evidence into findings with suggestions."""

from . import growth, layer_rules, nonfinite, weight_rules
from .findings import KINDS, Evidence, Finding

_RULES = (
    nonfinite.first_nonfinite_value,
    nonfinite.poisoned,
    nonfinite.loss,
    nonfinite.first_nonfinite_gradient,
    layer_rules.logits,
    growth.exploding,
    growth.vanishing,
    layer_rules.batch_norm,
    layer_rules.dead,
    layer_rules.unreached,
    weight_rules.learning_rate,
    weight_rules.weight_growth,
)


def find(evidence: Evidence, known: tuple[Finding, ...] = ()) -> list[Finding]:
    """All findings, causes first. `known` are the findings about the data."""
    found = [*known]
    for rule in _RULES:
        found += rule(evidence)
    found = [finding for finding in found if not _explained(finding, found)]
    return sorted(found, key=lambda f: (not f.fault, KINDS.index(f.kind)))


def _explained(finding: Finding, found: list[Finding]) -> bool:
    """Whether another finding explains this one."""
    kinds = {f.kind for f in found if f is not finding and f.fault}
    if finding.kind == "bad input":  # findings about the data name the utterance too
        return "utterance" not in finding.evidence and any(
            f.kind == "bad input" and "utterance" in f.evidence for f in found
        )
    if finding.kind.startswith("undefined") and "learning rate" in kinds:
        return True  # an eps does not help against weights of that size
    if finding.kind == "undefined loss":
        return "infeasible target" in kinds
    return finding.kind in ("undefined value", "overflow") and any(
        f.kind == "zero variance" and f.fault and f.where == finding.where for f in found
    )
