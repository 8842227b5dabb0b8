"""Transcribes recordings of any length, rate and number of channels to words with times.

A long recording is read and recognised in overlapping segments. The output for the context at the
ends of a segment is dropped: the neighbours have more context there. Each segment is normalised by
itself (:class:`fastguard.speech.data.features.LogMel`), as training utterances are, so loudness and
channel may change within a recording. The cost: in a segment without speech, noise is amplified to
the level of speech.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from fastguard.speech.data.audio import AudioError, open_recording
from fastguard.speech.data.features import one_thread
from fastguard.speech.data.part import WHOLE, Part
from fastguard.speech.data.tokenizer import Tokenizer
from fastguard.speech.models.layers import Subsampling

from .alignment import Word, word_times, words_of
from .decoding import Decode, greedy_decode
from .recognizer import Recognizer
from .segments import Segment, Segments


class TranscriptionError(ValueError):
    """A recording cannot be transcribed; the message says why."""


@dataclass(frozen=True)
class Transcript:
    """The words of a recording, and its duration in seconds."""

    duration: float
    words: list[Word]

    @property
    def text(self) -> str:
        """The words, separated by spaces."""
        return " ".join(word.word for word in self.words)


def transcribe(
    recognizer: Recognizer,
    path: Path | str,
    decode: Decode = greedy_decode,
    segment_seconds: float = 20.0,
    part: Part = WHOLE,
) -> Transcript:
    """Transcribe a recording.

    Args:
        recognizer: the model with its features and tokenizer.
        path: a file in a format that fastguard.speech.data.containers or .ffmpeg lists.
        decode: log-probabilities to tokens.
        segment_seconds: approximate length of what the model gets at once, context included.
        part: of the recording; times are counted from its start.

    Raises:
        TranscriptionError: the file is missing, damaged, incomplete or empty, or samples or model
            outputs are not finite.
    """
    hop = recognizer.log_mel.hop * Subsampling.FACTOR
    seconds_per_frame = hop / recognizer.log_mel.sample_rate
    words: list[Word] = []
    try:
        with open_recording(path, part) as file:
            segments = Segments(file, recognizer.log_mel.sample_rate, hop, segment_seconds)
            scored = (_log_probs(recognizer, segment) for segment in segments)
            limit = max(1, int(segment_seconds / seconds_per_frame))
            for start, log_probs in cut_before_words(scored, recognizer.tokenizer, limit):
                tokens = decode(log_probs[None], torch.tensor([len(log_probs)]))[0]
                words += word_times(
                    log_probs,
                    tokens,
                    recognizer.tokenizer,
                    seconds_per_frame,
                    start * seconds_per_frame,
                )
    except AudioError as error:
        raise TranscriptionError(str(error)) from error
    if (duration := segments.seconds_read) == 0:
        raise TranscriptionError("holds no samples: record it again")
    # The last frame may end after the last sample.
    return Transcript(duration, [replace(w, end=min(w.end, duration)) for w in words])


def _log_probs(recognizer: Recognizer, segment: Segment) -> Tensor:
    """Log-probabilities (T, V) float32, on the CPU, of the frames that belong to the segment."""
    if not segment.samples.isfinite().all():
        raise TranscriptionError("holds samples that are NaN or Inf: export it again")
    with one_thread():
        features = recognizer.log_mel(segment.samples)[None]
    device = next(recognizer.model.parameters()).device
    lengths = torch.tensor([features.shape[1]], device=device)
    log_probs, frames = recognizer(features.to(device), lengths)
    end = int(frames) if segment.keep is None else segment.skip + segment.keep
    kept = log_probs[0, segment.skip : end].cpu()
    if kept.isnan().any():
        raise TranscriptionError("the model's output is NaN: try another checkpoint")
    return kept


def cut_before_words(
    scored: Iterator[Tensor], tokenizer: Tokenizer, limit: int
) -> Iterator[tuple[int, Tensor]]:
    """Cut consecutive log_probs (T, V) into pieces of at most about ``limit`` frames.

    Each piece comes with its first frame. Cuts lie before words of the most likely path, so the
    text of the pieces is the text of the whole.
    """
    held, start = torch.empty(0), 0
    for log_probs in scored:
        held = torch.cat([held, log_probs]) if len(held) else log_probs
        while len(held) > limit:
            cut = _last_word(held[:limit], tokenizer) or limit
            yield start, held[:cut]
            held, start = held[cut:], start + cut
    if len(held):
        yield start, held


def _last_word(log_probs: Tensor, tokenizer: Tokenizer) -> int:
    """The frame in which the last word of the most likely path begins.

    For a single word, or none: the frame after the last change of the path, 0 if it is constant.
    """
    runs, counts = log_probs.argmax(dim=-1).unique_consecutive(return_counts=True)
    starts = (counts.cumsum(0) - counts).tolist()
    spoken = [(token, start) for token, start in zip(runs.tolist(), starts, strict=True) if token]
    touched = words_of([token for token, _ in spoken], tokenizer)
    heads = [
        start
        for (_, start), words, before in zip(spoken[1:], touched[1:], touched, strict=False)
        if words and words.start == before.stop > 0
    ]
    return heads[-1] if heads else starts[-1]
