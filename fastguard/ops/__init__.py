"""fastguard's operators: wrappers, fake kernels and pure-torch references.

Each module holds one operator, under the name that it has in csrc/cpu, csrc/cuda and tests/ops. No
other file touches ``torch.ops.fastguard``. An operator ``name`` has a reference ``name_ref`` with
the same arguments: the tests compare against it, and it serves where no kernel was built for a
device. The operator of attention is :func:`fastguard.ops.attention.attention`.
"""

from ._checks import overlaps_itself
from ._library import count_writes, cpu_info, cuda_info
from ._statistics import outlier_above
from .accumulate import accumulate_, accumulate_ref_
from .adamw import AdamwOptions, adamw_, adamw_ref_, check_adamw, current_master
from .clip import clip_, clip_ref_
from .decide import decide, decide_ref, guard_decide_, guard_decide_ref_
from .grad_norm import grad_norm, grad_norm_ref
from .grad_norm_decide import grad_norm_decide_, grad_norm_decide_ref_
from .packed import packed_offsets, packed_strides, packed_view, sharing_memory
from .scale import scale_, scale_ref_
from .settle import settle_, settle_ref_
from .types import (
    COMPLEX_DTYPES,
    DTYPES,
    FLOATING_DTYPES,
    LARGEST_APPLIED,
    OUTLIER_AFTER,
    OUTLIER_FACTOR,
    RISEN_FACTOR,
    Decision,
    GradNorm,
    GuardDecision,
    Record,
    Scaling,
    Statistics,
    Verdict,
)

__all__ = [
    "COMPLEX_DTYPES",
    "DTYPES",
    "FLOATING_DTYPES",
    "LARGEST_APPLIED",
    "OUTLIER_AFTER",
    "OUTLIER_FACTOR",
    "RISEN_FACTOR",
    "AdamwOptions",
    "Decision",
    "GradNorm",
    "GuardDecision",
    "Record",
    "Scaling",
    "Statistics",
    "Verdict",
    "accumulate_",
    "accumulate_ref_",
    "adamw_",
    "adamw_ref_",
    "check_adamw",
    "clip_",
    "clip_ref_",
    "count_writes",
    "cpu_info",
    "cuda_info",
    "current_master",
    "decide",
    "decide_ref",
    "grad_norm",
    "grad_norm_decide_",
    "grad_norm_decide_ref_",
    "grad_norm_ref",
    "guard_decide_",
    "guard_decide_ref_",
    "outlier_above",
    "overlaps_itself",
    "packed_offsets",
    "packed_strides",
    "packed_view",
    "scale_",
    "scale_ref_",
    "settle_",
    "settle_ref_",
    "sharing_memory",
]
