"""Where in a recording someone speaks, by Silero VAD."""

import warnings
from functools import lru_cache

import torch
from torch import Tensor

from fastguard.speech.data.features import one_thread, resample

SAMPLE_RATE = 16_000  # Hz; the network also has weights for 8 kHz, which are worse
# The package's default. Recorded prompts reach 0.9 or more. Hiss, hum, tones and clicks stay below
# 0.1; of the keys of a telephone some reach 0.6.
_THRESHOLD = 0.5
_LEAST_SPEECH = 0.05  # seconds
_LEAST_PAUSE = 1.0
_PADDING = 0.1  # seconds before and after
_LEAD = SAMPLE_RATE // 4  # samples of silence in front: the network needs a start


def speech_spans(samples: Tensor, sample_rate: int) -> list[tuple[float, float]]:
    """The parts of a recording with speech, 0.1 s before and after included.

    Args:
        samples: (N,) float32.
        sample_rate: in Hz.

    Returns:
        Start and end of each part in seconds, in order, without overlap.
    """
    with one_thread(), torch.no_grad():  # importing the package sets one thread for good
        from silero_vad import get_speech_timestamps

        heard = resample(samples, sample_rate, SAMPLE_RATE)
        found = get_speech_timestamps(
            torch.nn.functional.pad(heard, (_LEAD, 0)),
            _network(),
            threshold=_THRESHOLD,
            sampling_rate=SAMPLE_RATE,
            min_speech_duration_ms=round(1000 * _LEAST_SPEECH),
            min_silence_duration_ms=round(1000 * _LEAST_PAUSE),
            speech_pad_ms=round(1000 * _PADDING),
        )
    spans = []
    for span in found:
        first, last = max(0, span["start"] - _LEAD), span["end"] - _LEAD
        sounding = heard[first:last].nonzero().flatten()
        if len(sounding):
            spans.append((first + int(sounding[0]), first + int(sounding[-1]) + 1))
    return [(first / SAMPLE_RATE, last / SAMPLE_RATE) for first, last in spans]


@lru_cache(maxsize=1)
def _network() -> torch.nn.Module:
    with one_thread(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit.load is deprecated; the package has no other
        from silero_vad import load_silero_vad

        return load_silero_vad()
