"""Transcribes recordings of any length, rate and number of channels to words with times.

A long recording is recognised in overlapping windows. The output for the context at the ends of a
window is dropped: the neighbours have more context there. In a window each part with speech is
recognised by itself, with features of its own, as training utterances are: neither the silence
between parts nor their loudness matters. The output outside of them is silence.

A file is transcribed by the same :class:`Transcriber` as samples that still come in. The texts are
therefore the same, however the samples are divided.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from fastguard.speech.data.audio import AudioError, open_recording
from fastguard.speech.data.features import one_thread
from fastguard.speech.data.part import WHOLE, Part
from fastguard.speech.data.tokenizer import Tokenizer
from fastguard.speech.models.layers import Subsampling, subsampled

from .alignment import Word, word_times, words_of
from .decoding import IMPOSSIBLE, Decode, greedy_decode
from .recognizer import Recognizer
from .segments import Segment, Segments
from .speech_detector import speech_spans

_BLOCK = 1.0  # seconds that are read from a file at once


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
    vad: bool = True,
    progress: Callable[[float, float | None], None] | None = None,
) -> Transcript:
    """Transcribe a recording.

    Args:
        recognizer: the model with its features and tokenizer.
        path: a file in a format that fastguard.speech.data.containers or .ffmpeg lists.
        decode: log-probabilities to tokens.
        segment_seconds: approximate length of what the model gets at once, context included.
        part: of the recording; times are counted from its start.
        vad: see :class:`Transcriber`.
        progress: called with the seconds done and the seconds that the file claims, None if it
            claims nothing.

    Raises:
        TranscriptionError: the file is missing, damaged, incomplete or empty, or samples or model
            outputs are not finite.
    """
    words: list[Word] = []
    try:
        with open_recording(path, part) as file:
            claimed = None if file.frames is None else file.frames / file.samplerate
            transcriber = Transcriber(recognizer, file.samplerate, decode, segment_seconds, vad)
            while len(samples := file.read(math.ceil(_BLOCK * file.samplerate))):
                words += transcriber.feed(torch.from_numpy(samples))
                if progress is not None:
                    progress(transcriber.seconds_read, claimed)
    except AudioError as error:
        raise TranscriptionError(str(error)) from error
    words += transcriber.finish()
    return Transcript(transcriber.seconds_read, words)


class Transcriber:
    """Transcribes samples while they come in.

    ``feed`` returns words that are final. A word is final when the window that it is in is complete
    and a pause or another word follows: within ``window_seconds`` of audio after it is spoken, or,
    for the last word of a window, within twice that. ``partial`` returns what has been recognised
    of the words since, which may still change.

    Args:
        recognizer: the model with its features and tokenizer.
        rate: of the samples, in Hz.
        decode: log-probabilities to tokens.
        window_seconds: approximate length of what the model gets at once, context included.
        vad: whether only what Silero VAD takes for speech is recognised; False: everything.
    """

    def __init__(
        self,
        recognizer: Recognizer,
        rate: int,
        decode: Decode = greedy_decode,
        window_seconds: float = 20.0,
        vad: bool = True,
    ) -> None:
        self.recognizer = recognizer
        self._decode = decode
        self._vad = vad
        hop = recognizer.log_mel.hop * Subsampling.FACTOR
        self._seconds_per_frame = hop / recognizer.log_mel.sample_rate
        self._segments = Segments(rate, recognizer.log_mel.sample_rate, hop, window_seconds)
        limit = max(1, int(window_seconds / self._seconds_per_frame))
        self._pieces = WordCutter(recognizer.tokenizer, limit)

    @property
    def seconds_read(self) -> float:
        """Duration of the samples so far."""
        return self._segments.seconds_read

    def feed(self, samples: Tensor) -> list[Word]:
        """The words that further samples (N,) float32 make final.

        Raises:
            TranscriptionError: samples or model outputs are not finite.
        """
        words = []
        for segment in self._segments.push(samples):
            for start, log_probs in self._pieces.push(*self._log_probs(segment)):
                words += self._words(start, log_probs)
        return words

    def partial(self) -> list[Word]:
        """The words after the final ones, as if the recording ended here. Each call runs the model
        on up to a window.

        Raises:
            TranscriptionError: as :meth:`feed`.
        """
        return self._last_words()

    def finish(self) -> list[Word]:
        """The words after the final ones, at the end of the recording.

        Raises:
            TranscriptionError: as :meth:`feed`; or there were no samples.
        """
        if self._segments.samples_read == 0:
            raise TranscriptionError("holds no samples: record it again")
        return self._last_words()

    def _last_words(self) -> list[Word]:
        segment = self._segments.rest()
        log_probs = None if segment is None else self._log_probs(segment)[0]
        pieces = self._pieces.rest(log_probs)
        return [word for start, piece in pieces for word in self._words(start, piece)]

    def _words(self, start: int, log_probs: Tensor) -> list[Word]:
        """The words of a piece (T, V) whose first frame is ``start``."""
        tokens = self._decode(log_probs[None], torch.tensor([len(log_probs)]))[0]
        words = word_times(
            log_probs,
            tokens,
            self.recognizer.tokenizer,
            self._seconds_per_frame,
            start * self._seconds_per_frame,
        )
        # The last frame may end after the last sample.
        return [replace(word, end=min(word.end, self.seconds_read)) for word in words]

    def _log_probs(self, segment: Segment) -> tuple[Tensor, bool]:
        """Log-probabilities (T, V) float32, on the CPU, of the frames that belong to the segment;
        and whether the last of them is in a pause."""
        if not segment.samples.isfinite().all():
            raise TranscriptionError("holds samples that are NaN or Inf: export it again")
        hop, frames = self._segments.samples_per_frame, self._frames(segment.samples)
        end = frames if segment.keep is None else segment.skip + segment.keep
        log_probs = torch.full((frames, self.recognizer.tokenizer.vocab_size), IMPOSSIBLE)
        log_probs[:, 0] = 0.0
        paused_from = 0
        for start, stop in self._spoken(segment.samples):
            first = start // hop
            last = min(frames, first + self._frames(segment.samples[first * hop : stop]))
            self._separate_words(log_probs[paused_from:first])
            paused_from = last
            if first < end and last > segment.skip:
                found = self._recognized(segment.samples[first * hop : stop])
                log_probs[first:last] = found[: last - first]
        self._separate_words(log_probs[paused_from:])
        return log_probs[segment.skip : end], paused_from < end

    def _spoken(self, samples: Tensor) -> list[tuple[int, int]]:
        """The first sample of each part with speech, and the sample after its last."""
        if not self._vad:
            return [(0, len(samples))]
        rate = self._segments.sample_rate
        spans = speech_spans(samples, rate)
        return [(int(start * rate), math.ceil(end * rate)) for start, end in spans]

    def _separate_words(self, pause: Tensor) -> None:
        """Put a space into the middle of the frames (T, V) of a pause. The model puts none before
        the first word and after the last one of what it recognises at once."""
        symbols = self.recognizer.tokenizer.symbols
        if len(pause) and " " in symbols:
            pause[len(pause) // 2, 0] = IMPOSSIBLE
            pause[len(pause) // 2, symbols.index(" ")] = 0.0

    def _frames(self, samples: Tensor) -> int:
        """The number of output frames of samples (N,)."""
        return subsampled(self.recognizer.log_mel.num_frames(len(samples)))

    def _recognized(self, samples: Tensor) -> Tensor:
        """Log-probabilities (T, V) float32, on the CPU, of samples (N,)."""
        with one_thread():
            features = self.recognizer.log_mel(samples)[None]
        device = next(self.recognizer.model.parameters()).device
        lengths = torch.tensor([features.shape[1]], device=device)
        log_probs, frames = self.recognizer(features.to(device), lengths)
        found = log_probs[0, : int(frames)].cpu()
        if found.isnan().any():
            raise TranscriptionError("the model's output is NaN: try another checkpoint")
        return found


class WordCutter:
    """Cuts consecutive log_probs (T, V) into pieces of at most about ``limit`` frames.

    Each piece comes with its first frame. Cuts lie in pauses or before words of the most likely
    path, so the text of the pieces is the text of the whole.
    """

    def __init__(self, tokenizer: Tokenizer, limit: int) -> None:
        self._tokenizer, self._limit = tokenizer, limit
        self._held, self._start = torch.empty(0), 0

    def push(self, log_probs: Tensor, paused: bool = False) -> Iterator[tuple[int, Tensor]]:
        """The pieces that are complete with further log_probs. The last word, which may go on, is
        held back, unless the log_probs end in a pause (``paused``)."""
        self._held = torch.cat([self._held, log_probs]) if len(self._held) else log_probs
        yield from self._cut_long()
        if cut := len(self._held) if paused else _last_word(self._held, self._tokenizer):
            yield self._cut(cut)

    def _cut_long(self) -> Iterator[tuple[int, Tensor]]:
        while len(self._held) > self._limit:
            head = self._held[: self._limit]
            yield self._cut(_last_word(head, self._tokenizer) or _last_change(head) or self._limit)

    def _cut(self, frames: int) -> tuple[int, Tensor]:
        piece = self._start, self._held[:frames]
        self._held, self._start = self._held[frames:], self._start + frames
        return piece

    def rest(self, log_probs: Tensor | None) -> Iterator[tuple[int, Tensor]]:
        """The pieces of all that is held, if these are the last log_probs."""
        last = WordCutter(self._tokenizer, self._limit)
        last._held, last._start = self._held, self._start
        if log_probs is not None:
            last._held = torch.cat([last._held, log_probs]) if len(last._held) else log_probs
        yield from last._cut_long()
        if len(last._held):
            yield last._cut(len(last._held))


def _last_word(log_probs: Tensor, tokenizer: Tokenizer) -> int:
    """The frame in which the last word of the most likely path begins; 0 for one word or none."""
    runs, counts = log_probs.argmax(dim=-1).unique_consecutive(return_counts=True)
    starts = (counts.cumsum(0) - counts).tolist()
    spoken = [(token, start) for token, start in zip(runs.tolist(), starts, strict=True) if token]
    touched = words_of([token for token, _ in spoken], tokenizer)
    heads = [
        start
        for (_, start), words, before in zip(spoken[1:], touched[1:], touched, strict=False)
        if words and words.start == before.stop > 0
    ]
    return heads[-1] if heads else 0


def _last_change(log_probs: Tensor) -> int:
    """The frame after the last change of the most likely path; 0 if it is constant."""
    _, counts = log_probs.argmax(dim=-1).unique_consecutive(return_counts=True)
    return len(log_probs) - int(counts[-1])
