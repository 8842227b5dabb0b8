"""Recordings of any length, rate and number of channels to words with times.

A long recording is read and recognised in overlapping windows. What the model says of the context
at the ends of a window is left to its neighbours, which know what comes before and after. Each
window is normalised by itself (:class:`fastguard.speech.data.features.LogMel`), as the
utterances of a training are, so that loudness and channel may change on the way; in return a window
in which nobody speaks has its noise raised to the level of speech.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from fastguard.speech.data.audio import AudioError, open_recording
from fastguard.speech.data.features import one_thread
from fastguard.speech.data.tokenizer import Tokenizer
from fastguard.speech.models.layers import Subsampling

from .alignment import Word, word_times, words_of
from .decoding import Decode, greedy_decode
from .recognizer import Recognizer
from .windows import Window, Windows


class TranscriptionError(ValueError):
    """A recording that can not be transcribed; the message says why."""


@dataclass(frozen=True)
class Transcript:
    """``duration`` in seconds."""

    duration: float
    words: list[Word]

    @property
    def text(self) -> str:
        return " ".join(word.word for word in self.words)


def transcribe(
    recognizer: Recognizer,
    path: Path | str,
    decode: Decode = greedy_decode,
    window_seconds: float = 20.0,
) -> Transcript:
    """What is said in a recording of a format that fastguard.speech.data.containers knows.

    ``window_seconds`` is about the longest that the model gets to hear at once, context included.

    Raises TranscriptionError for a file that is missing, broken, torn or empty, and for samples or
    model outputs that are not finite.
    """
    hop = recognizer.log_mel.hop * Subsampling.FACTOR
    seconds_per_frame = hop / recognizer.log_mel.sample_rate
    words: list[Word] = []
    try:
        with open_recording(path) as file:
            windows = Windows(file, recognizer.log_mel.sample_rate, hop, window_seconds)
            scored = (_log_probs(recognizer, window) for window in windows)
            limit = max(1, int(window_seconds / seconds_per_frame))
            for start, log_probs in segments(scored, recognizer.tokenizer, limit):
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
    if (duration := windows.seconds_read) == 0:
        raise TranscriptionError("holds no samples: record it again")
    # The last frame may go on after the last sample.
    return Transcript(duration, [replace(w, end=min(w.end, duration)) for w in words])


def _log_probs(recognizer: Recognizer, window: Window) -> Tensor:
    """(T, V) float32 of the frames that are kept, on the CPU."""
    if not window.samples.isfinite().all():
        raise TranscriptionError("holds samples that are NaN or Inf: export it again")
    with one_thread():
        features = recognizer.log_mel(window.samples)[None]
    device = next(recognizer.model.parameters()).device
    lengths = torch.tensor([features.shape[1]], device=device)
    log_probs, frames = recognizer(features.to(device), lengths)
    end = int(frames) if window.keep is None else window.skip + window.keep
    kept = log_probs[0, window.skip : end].cpu()
    if kept.isnan().any():
        raise TranscriptionError("the model's output is NaN: try another checkpoint")
    return kept


def segments(
    scored: Iterator[Tensor], tokenizer: Tokenizer, limit: int
) -> Iterator[tuple[int, Tensor]]:
    """Consecutive log_probs (T, V), cut anew: (first frame, log_probs) of at most about ``limit``
    frames.  They are cut before words of the likeliest path, whose text is that of the whole."""
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
    """The frame in which the last of several words of the likeliest path begins.

    Of a single word, or none, the frame after the last change; 0 if nothing changes.
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
