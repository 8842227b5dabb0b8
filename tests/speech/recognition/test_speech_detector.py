"""Where someone speaks: all recorded prompts, and no sound of a machine."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastguard.speech.data.features import load_audio
from fastguard.speech.recognition.speech_detector import speech_spans
from tests.recordings import asterisk_or_skip

RATE = 16_000
TIME = torch.arange(6 * RATE) / RATE


def tone(hertz):
    return torch.sin(2 * torch.pi * hertz * TIME)


def noise(slope):
    """Noise whose power falls with the frequency to the power of ``slope``."""
    spectrum = torch.fft.rfft(torch.randn(len(TIME), generator=torch.Generator().manual_seed(0)))
    spectrum /= torch.arange(len(spectrum)).clamp(min=1) ** (slope / 2)
    samples = torch.fft.irfft(spectrum)
    return samples / samples.abs().max()


SOUNDS = {
    "silence": torch.zeros(len(TIME)),
    "white noise": 0.3 * noise(0),
    "faint white noise": 1e-3 * noise(0),
    "pink noise": 0.3 * noise(1),
    "brown noise": 0.3 * noise(2),
    "tone": 0.3 * tone(440),
    "square wave": 0.1 * tone(220).sign(),
    "beats": 0.3 * tone(440) * tone(1.5) ** 2,
    "mains hum": 0.2 * (tone(50) + 0.3 * tone(150)),
    "keys of a telephone": 0.2 * (tone(770) + tone(1336)) * (TIME % 0.5 < 0.2),
    "clicks": 0.8 * (torch.arange(len(TIME)) % (RATE // 2) == 0),
}


@pytest.mark.parametrize("sound", SOUNDS)
def test_a_sound_without_speech_has_no_spans(sound):
    assert speech_spans(SOUNDS[sound], RATE) == []


def test_every_recorded_prompt_has_speech():
    prompts = [u for u in asterisk_or_skip().split("dev")]
    missed = [u.id for u in prompts if not speech_spans(load_audio(u.audio, RATE), RATE)]
    assert len(prompts) > 40
    assert missed == []


@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050])
def test_spans_are_where_the_speech_is(rate):
    prompt = next(u for u in asterisk_or_skip().split("train") if 2 < u.duration < 4)
    speech = load_audio(prompt.audio, rate)
    silence = torch.zeros(5 * rate)
    spans = speech_spans(torch.cat([silence, speech, silence, speech]), rate)
    seconds = len(speech) / rate
    expected = [(5, 5 + seconds), (10 + seconds, 10 + 2 * seconds)]
    assert len(spans) == 2
    for found, (start, end) in zip(spans, expected, strict=True):
        # A resampled recording rings for a moment before its start.
        assert found[0] == pytest.approx(start, abs=0.25)
        assert found[1] == pytest.approx(end, abs=0.25)


def test_no_samples_have_no_spans():
    assert speech_spans(torch.zeros(0), RATE) == []


def test_threads_are_given_back():
    """The package sets torch to one thread when it is imported."""
    program = (
        "import torch; torch.set_num_threads(3)\n"
        "from fastguard.speech.recognition.speech_detector import speech_spans\n"
        "speech_spans(torch.zeros(1600), 16_000); print(torch.get_num_threads())"
    )
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("3\n", "")
