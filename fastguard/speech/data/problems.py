"""Finds what is wrong with the recordings and texts of a batch, for each utterance."""

from __future__ import annotations

from torch import Tensor

from fastguard.diagnose.findings import Finding
from fastguard.speech.models.ctc import CTCModel

from .batching import Batch
from .ctc_targets import Needed

QUIETEST = 1e-4  # 80 dB below full scale: a recording with a lower peak has no speech
LOUDEST = 1.5  # decoders of MP3 and Vorbis overshoot full scale a little


def ctc_problems(batch: Batch) -> list[Finding]:
    """The utterances without a CTC alignment: their loss is infinite."""
    available = CTCModel.output_lengths(batch.feature_lengths).tolist()
    texts = batch.targets.split(batch.target_lengths.tolist())
    found = []
    for name, tokens, frames in zip(batch.ids, texts, available, strict=True):
        needed = Needed.by(tokens.tolist())
        if frames < needed.frames:
            found.append(_infeasible(name, needed, frames))
    return found


def _infeasible(name: str, needed: Needed, frames: int) -> Finding:
    return Finding(
        "infeasible target",
        name,
        f"the target needs {needed}, and the recording has {frames}: the CTC loss is infinite",
        "correct the text or the cut of the recording, or leave it out; a model of smaller stride "
        "has more frames; zero_infinity would only hide it",
        evidence={"utterance": name, "needed": needed.frames, "available": frames},
    )


def recording_problems(name: str, waveform: Tensor, features: Tensor) -> list[Finding]:
    """What is wrong with one recording: its samples (N,), and their features (T, n_mels)."""
    bad = int((~waveform.isfinite()).sum())
    if bad:
        what = f"{bad} of {waveform.numel()} samples are NaN or Inf"
        return [_bad_input(name, what, "export the recording again, or leave it out")]
    peak = float(waveform.abs().max())
    if not features.isfinite().all():
        what = f"its features are not finite; its loudest sample is {peak:.3g}, full scale is 1"
        return [_bad_input(name, what, "scale the recording to [-1, 1], or leave it out")]
    if peak < QUIETEST:
        what = f"it is silent: its loudest sample is {peak:.3g}, full scale is 1"
        return [_bad_input(name, what, "leave it out, or record it again", False)]
    if peak > LOUDEST:
        what = f"it is too loud: its loudest sample is {peak:.3g}, full scale is 1"
        return [_bad_input(name, what, "scale the recording to [-1, 1]", False)]
    return []


def _bad_input(name: str, what: str, suggestion: str, fault: bool = True) -> Finding:
    return Finding("bad input", name, what, suggestion, fault, {"utterance": name})
