"""Recordings that the tests of speech/data write."""

import numpy as np
import pytest
import soundfile


def tones(seconds, rate, channels=1):
    """(N, channels) float64: a tone whose level rises and falls three times a second, and noise."""
    time = np.arange(round(seconds * rate)) / rate
    wave = 0.3 * np.sin(2 * np.pi * 440 * time) * np.sin(2 * np.pi * 1.5 * time) ** 2
    wave += 0.003 * np.random.default_rng(0).standard_normal(len(time))
    return np.stack([wave * (1 + channel) / channels for channel in range(channels)], axis=1)


@pytest.fixture
def record():
    """record(path, seconds=1.0, rate=16000, channels=1) writes the format of the suffix."""

    def write(path, seconds=1.0, rate=16_000, channels=1):
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, tones(seconds, rate, channels), rate)
        return path

    return write
