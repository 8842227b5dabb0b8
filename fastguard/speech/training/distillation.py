"""Losses of a student that learns from CTC outputs: of a teacher, or of its own other view."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

_BLANK = 0


def distillation_loss(
    student_log_probs: Tensor,
    teacher_log_probs: Tensor,
    output_lengths: Tensor,
    temperature: float = 1.0,
    blank_context: int | None = None,
) -> Tensor:
    """``temperature**2 * KL(teacher || student)`` per output frame: sum / sum of frames.

    This is Hinton et al. 2015 (arXiv 1503.02531) for each frame. Both distributions are softened by
    the temperature. Its square keeps the size of the gradients comparable with those of the CTC
    loss. The normalisation is that of :func:`fastguard.speech.training.loss.ctc_loss`, so both can
    be mixed as ``(1 - w) * ctc + w * distillation``.

    Most CTC frames are blank for teacher and student. In the others the two may disagree: models
    that are trained separately have spikes in different frames (Kurata and Audhkhasi 2018, 2019).
    `blank_context` addresses this in the loss alone. It keeps the frames in which the teacher's
    best symbol is not the blank, and so many frames on both sides (the symmetric selection of
    Hilmes et al. 2025, arXiv 2506.01503). They found that leaving out all blanks (0 here) does not
    always work, and that with some blanks the student does not need the CTC loss. Frames that are
    left out count as frames without a difference.

    Args:
        student_log_probs: (B, T', V) floating point, normalised or not.
        teacher_log_probs: (B, T', V) likewise; no gradient reaches it.
        output_lengths: (B,) int64, frames of each utterance, 1 <= length <= T'. Later frames are
            not read: NaN there changes nothing, and their gradient is zero.
        temperature: > 0; above 1 the small probabilities count for more.
        blank_context: None for all frames.

    Returns:
        Scalar float32 (float64 if either input is), in nats per frame. It is infinite if the
        student gives -inf to a symbol that the teacher does not exclude. Symbols with -inf of the
        teacher count as no difference.

    Raises:
        ValueError: shapes or options do not fit, or a length is outside [1, T']. Lengths on a GPU
            are not checked, because reading them needs a host-device sync.
    """
    _check(student_log_probs, teacher_log_probs, output_lengths, temperature, blank_context)
    dtype = torch.promote_types(student_log_probs.dtype, teacher_log_probs.dtype)
    dtype = torch.promote_types(dtype, torch.float32)
    device = student_log_probs.device
    output_lengths = output_lengths.to(device)
    teacher_log_probs = teacher_log_probs.detach()
    kept = torch.arange(student_log_probs.size(1), device=device) < output_lengths[:, None]
    if blank_context is not None:
        spikes = (teacher_log_probs.argmax(-1) != _BLANK) & kept
        kept = kept & _widened(spikes, blank_context)
    # Filled, not multiplied: 0 * NaN is NaN. Autocast changes the dtype of none of the operators
    # below.
    student, teacher = (
        (x.masked_fill(~kept[:, :, None], 0.0).to(dtype) / temperature).log_softmax(-1)
        for x in (student_log_probs, teacher_log_probs)
    )
    weight = teacher.exp()
    ruled_out = weight == 0  # where 0 * (-inf - x) would be NaN
    difference = (teacher - student).masked_fill(ruled_out, 0.0)
    return temperature**2 * (weight * difference).sum() / output_lengths.sum()


def consistency_loss(log_probs: Tensor, output_lengths: Tensor) -> Tensor:
    """Difference between the outputs for two views of the same utterances, per output frame.

    The mean of :func:`distillation_loss` in both directions: the consistency regularisation of
    CR-CTC (Yao et al. 2024, arXiv 2410.05101), whose views have different masks. It adds this loss
    with weight 0.2 to the mean CTC loss of both views.

    Args:
        log_probs: (2 B, T', V) floating point: all first views, then all second views.
        output_lengths: (2 B,) int64, equal in both halves.

    Returns:
        Scalar float32 (float64 if the input is), in nats per frame.

    Raises:
        ValueError: as :func:`distillation_loss`; or the views do not match. Lengths on a GPU are
            not compared.
    """
    if len(log_probs) % 2 or (
        output_lengths.is_cpu and not torch.equal(*output_lengths.tensor_split(2))
    ):
        raise ValueError(
            f"output_lengths of two views must be the same, got {output_lengths.tolist()}: give "
            "all first views and then all second views"
        )
    (first, second), (lengths, _) = log_probs.chunk(2), output_lengths.chunk(2)
    return (
        distillation_loss(first, second, lengths) + distillation_loss(second, first, lengths)
    ) / 2


def _widened(mask: Tensor, context: int) -> Tensor:
    """(B, T) bool: True within `context` frames of a True."""
    width = 2 * context + 1
    return F.max_pool1d(mask.float()[:, None], width, stride=1, padding=context)[:, 0] > 0


def distillation_loss_ref(
    student_log_probs: Tensor,
    teacher_log_probs: Tensor,
    output_lengths: Tensor,
    temperature: float = 1.0,
    blank_context: int | None = None,
) -> float:
    """:func:`distillation_loss` in float64 with loops, as defined."""
    total = 0.0
    student_log_probs, teacher_log_probs = student_log_probs.tolist(), teacher_log_probs.tolist()
    for student, teacher, length in zip(
        student_log_probs, teacher_log_probs, output_lengths.tolist(), strict=True
    ):
        spikes = [t for t in range(length) if max(teacher[t]) > teacher[t][_BLANK]]
        for t in range(length):
            if blank_context is None or any(abs(t - s) <= blank_context for s in spikes):
                p, q = _softened(teacher[t], temperature), _softened(student[t], temperature)
                total += sum(_kl_term(*pair) for pair in zip(p, q, strict=True))
    return temperature**2 * total / sum(output_lengths.tolist())


def _softened(log_probs: list[float], temperature: float) -> list[float]:
    largest = max(log_probs)
    powers = [math.exp((x - largest) / temperature) for x in log_probs]
    return [power / sum(powers) for power in powers]


def _kl_term(p: float, q: float) -> float:
    if p == 0:
        return 0.0
    return math.inf if q == 0 else p * math.log(p / q)


def _check(student, teacher, output_lengths, temperature, blank_context) -> None:
    shapes = f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)}"
    if student.dim() != 3 or student.shape != teacher.shape:
        raise ValueError(
            f"log-probabilities must both be (B, T', V), got {shapes}: give both models the same "
            "features, tokenizer and subsampling"
        )
    if output_lengths.shape != student.shape[:1] or output_lengths.is_floating_point():
        raise ValueError(
            f"output_lengths must be integers of shape ({student.size(0)},), got "
            f"{output_lengths.dtype} of shape {tuple(output_lengths.shape)}"
        )
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be finite and > 0, got {temperature}")
    if blank_context is not None and blank_context < 0:
        raise ValueError(
            f"blank_context must be at least 0, got {blank_context}: pass None for all frames"
        )
    if output_lengths.is_cpu:
        frames = student.size(1)
        wrong = {i: n for i, n in enumerate(output_lengths.tolist()) if not 1 <= n <= frames}
        if wrong:
            raise ValueError(
                f"output_lengths must lie in [1, {frames}], got {{utterance: length}} {wrong}: "
                "give those that the model returned"
            )
