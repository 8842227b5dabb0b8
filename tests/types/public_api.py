"""What a type checker must accept of the public API, and what it must refuse.

`mypy` reads this file and runs nothing of it; pyproject.toml has the options. A line that ends in
``type: ignore`` has to be an error: mypy reports an ignored error that is not there.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import fastguard
from fastguard import GradGuard, StepReport, Verdict, clamped_attention
from fastguard.thresholds import AdaGC, AutoClip, Fixed, RunningMedian, ZClip

model = nn.Linear(2, 2)
parameters: Iterable[Tensor] = model.parameters()


def heard(report: StepReport) -> None:
    assert_type(report.verdict, Verdict)
    assert_type(report.skipped, bool)
    assert_type(report.total_norm, float)
    assert_type(report.loss, float | None)
    assert_type(report.first_nonfinite, str | None)


def guarded() -> None:
    optimizer = fastguard.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98))
    with_masters = fastguard.Adam(model.parameters(), master_weights=True)
    assert_type(with_masters.master_weights, bool)
    assert_type(with_masters.master_state_dict(model), dict[str, Tensor])
    with_masters.load_master_state_dict(model, model.state_dict())
    guard = GradGuard(model, max_norm=1.0, skip_norm=10.0, on_skip=heard, report_dir=Path("bad"))
    GradGuard(model.parameters(), threshold=ZClip())
    GradGuard(model.named_parameters(), threshold=AdaGC())
    for threshold in (Fixed(), RunningMedian(), AutoClip()):
        GradGuard([model.weight], threshold=threshold)
    GradGuard(model, rollback=fastguard.Rollback(every=100), on_patience="rollback")
    loss = model(torch.ones(2)).sum()
    guard.step(optimizer, loss=loss, batch_id=3)
    guard.step([optimizer], scaler=torch.amp.GradScaler("cpu"))
    guard.accumulate(weight=2.0)
    assert_type(guard.poll(wait=True), list[StepReport])
    assert_type(guard.outlier_above, float)
    assert_type(guard.skip_batch(), bool)
    assert_type(guard.attach(optimizer), torch.optim.Optimizer)
    guard.load_state_dict(guard.state_dict())


def clipped() -> None:
    assert_type(fastguard.clip_grad_norm_(model.parameters(), 1.0), Tensor)
    assert_type(fastguard.get_total_norm([model.weight]), Tensor)
    fastguard.clip_grads_with_norm_(model.parameters(), 1.0, torch.tensor(2.0))


def attention(query: Tensor) -> None:
    clamped_attention(query, query, query, is_causal=True, clamp=None)
    module = fastguard.ClampedMultiheadAttention(8, 2, batch_first=True, clamp=5.0)
    assert_type(module.forward(query, query, query), tuple[Tensor, Tensor | None])
    replacement = fastguard.replace_attention_(model, only=["encoder"])
    assert_type(replacement.replaced, tuple[str, ...])
    assert_type(replacement.left_alone, dict[str, str])
    assert_type(fastguard.unused_attention(model), list[str])


def diagnosed() -> None:
    diagnosis = fastguard.diagnose(model, lambda: model(torch.ones(2)).sum())
    assert_type(diagnosis, fastguard.Diagnosis)
    assert_type(diagnosis.grad_norm, float)
    assert_type(fastguard.stable_init_(model), nn.Module)


def caught() -> Sequence[StepReport]:
    try:
        guarded()
    except fastguard.GradientExplosionError as error:
        return error.reports
    return ()


def refused(query: Tensor) -> None:
    GradGuard(model, max_norm="1")  # type: ignore[arg-type]
    GradGuard(model, threshold=1.0)  # type: ignore[arg-type]
    GradGuard(model, on_patience="stop")  # type: ignore[arg-type]
    GradGuard(model).step(model)  # type: ignore[arg-type]
    fastguard.clip_grad_norm_(model.parameters())  # type: ignore[call-arg]
    fastguard.AdamW(model)  # type: ignore[arg-type]
    fastguard.AdamW(model.parameters(), master_weights="yes")  # type: ignore[arg-type]
    clamped_attention(query, query, query, clamp="10")  # type: ignore[arg-type]
    fastguard.replace_attention_(model.parameters())  # type: ignore[arg-type]
    fastguard.diagnose(model, 1.0)  # type: ignore[arg-type]
