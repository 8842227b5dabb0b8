"""From a recording to normalised log-mel features, and their augmentation in training."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from random import Random

import torch
import torchaudio
from torch import Tensor, nn

from .audio import read_mono
from .part import WHOLE, Part

# torchaudio's default of 6 leaves aliases of an 8 kHz voice 62 dB below its peak in the bins above
# 4 kHz, where they look like speech; 32 reduces them to below LogMel.DYNAMIC_RANGE.
RESAMPLING_WIDTH = 32
_MOST_COEFFICIENTS = 1 << 24
#: How :class:`LogMel` normalises.
NORMALIZATIONS = "speech", "utterance", "level"
_STEPS = 640  # 11,025 Hz to 16,000 is 441 / 640


@contextmanager
def one_thread() -> Iterator[None]:
    """Use one thread in torch, because one recording is too little work for several. If other
    programs use the cores, torch's threads wait for one another: on a busy machine with two cores
    the features of 439 prompts took 33 s with two threads, and 1.1 s with one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def load_audio(
    path: Path | str,
    sample_rate: int,
    max_duration: float = 3600.0,
    finite: bool = True,
    part: Part = WHOLE,
) -> Tensor:
    """Read and resample a recording.

    Args:
        path: of the file.
        sample_rate: of the result, in Hz.
        max_duration: in seconds; it bounds the memory.
        finite: whether NaN and Inf samples are an error.
        part: of the recording; by default all, with the channels averaged.

    Returns:
        Samples (N,) float32 in [-1, 1].

    Raises:
        AudioError: the file is missing or cannot be decoded, samples are NaN or Inf, the rate is
            outside audio.SAMPLE_RATES, or the recording is too long. The message names the file.
    """
    samples, rate = read_mono(path, max_duration, finite, part)
    return resample(torch.from_numpy(samples), rate, sample_rate)


def resample(samples: Tensor, rate: int, sample_rate: int) -> Tensor:
    """Samples (N,) at ``rate`` Hz -> about N * sample_rate / rate at ``sample_rate`` Hz."""
    ratio = resampling_ratio(rate, sample_rate)
    return torchaudio.functional.resample(
        samples, ratio.numerator, ratio.denominator, lowpass_filter_width=RESAMPLING_WIDTH
    )


def resampling_ratio(rate: int, sample_rate: int) -> Fraction:
    """``rate / sample_rate`` as a fraction of small numbers.

    torchaudio's filter has numerator x denominator coefficients. The ratio of any two common rates
    is one of small numbers. 44,101 Hz to 16,000 would need 5 GB, and is treated as 44,100.
    """
    exact = Fraction(rate, sample_rate)
    if exact.numerator * exact.denominator <= _MOST_COEFFICIENTS:
        return exact
    return Fraction(round(_STEPS * exact), _STEPS)


class LogMel(nn.Module):
    """Normalised log-mel energies, clipped to DYNAMIC_RANGE below the loudest of the recording.

    Nothing is learned, and nothing depends on the loudness.

    Args:
        sample_rate: in Hz.
        n_mels: mel bins.
        window_seconds, hop_seconds: of the short-time Fourier transform.
        normalization: "speech" gives each bin mean 0 and, if it has speech, variance 1 in the
            frames whose energy is at most SPEECH_RANGE below that of the loudest. This removes the
            sound of the microphone, and the vowel from a recording of a single vowel. Silence
            before and after speech changes nothing. "utterance" does it in all frames, so that
            features of speech depend on the silence around it. "level" keeps the sound of the
            microphone: 20 dB are 1, and 40 dB below the loudest energy is 0 (as in Radford et al.
            2022, arXiv:2212.04356). It does not depend on the silence either.

    Raises:
        ValueError: another ``normalization``.
    """

    DYNAMIC_RANGE = 1e8  # 80 dB
    SILENCE = 1e-20  # the floor for silence; samples of 1e-5 have energies of about 1e-6
    # Bins with speech have a deviation of 2 to 5 (natural log). Bins above the Nyquist frequency of
    # a resampled recording have less than 0.2, and must not be amplified to look like speech.
    MIN_DEVIATION = 1.0
    SPEECH_RANGE = 1e3  # 30 dB: the frames of vowels and of most consonants
    LEAST = -3.0  # deviations; digital silence would be 5 or more below the mean

    def __init__(
        self,
        sample_rate: int = 16_000,
        n_mels: int = 80,
        window_seconds: float = 0.025,
        hop_seconds: float = 0.010,
        normalization: str = "speech",
    ) -> None:
        super().__init__()
        if normalization not in NORMALIZATIONS:
            raise ValueError(
                f"normalization is {normalization!r}: give one of {', '.join(NORMALIZATIONS)}"
            )
        self.normalization = normalization
        self.sample_rate = sample_rate
        self.n_mels = n_mels
        self.hop = round(hop_seconds * sample_rate)
        window = round(window_seconds * sample_rate)
        self.mel = torchaudio.transforms.MelSpectrogram(
            sample_rate,
            n_fft=1 << (window - 1).bit_length(),
            win_length=window,
            hop_length=self.hop,
            n_mels=n_mels,
            pad_mode="constant",  # "reflect" refuses recordings under half a window
        )

    def forward(self, waveform: Tensor) -> Tensor:
        """Features of a recording.

        Args:
            waveform: samples (N,) float32, N > 0.

        Returns:
            (T, n_mels) float32, T = num_frames(N).

        Raises:
            ValueError: the samples are not one non-empty row.
        """
        if waveform.dim() != 1 or waveform.numel() == 0:
            raise ValueError(
                f"LogMel needs samples of shape (N,) with N > 0, got {tuple(waveform.shape)}: "
                "average the channels, and drop empty recordings"
            )
        energies = self.mel(waveform).T
        loudest = energies.amax().clamp(min=self.DYNAMIC_RANGE * self.SILENCE)
        floor = loudest / self.DYNAMIC_RANGE
        log_energies = energies.clamp(min=floor).log()
        if self.normalization == "level":
            decibels = (log_energies - loudest.log()) * (10 / math.log(10))
            return decibels / 20 + 2
        if self.normalization == "utterance":
            return self._normalized(log_energies, log_energies)
        frames = energies.sum(dim=1)
        spoken = log_energies[frames >= frames.amax() / self.SPEECH_RANGE]
        return self._normalized(log_energies, spoken).clamp(min=self.LEAST)

    def _normalized(self, log_energies: Tensor, spoken: Tensor) -> Tensor:
        """All frames (T, n_mels) by each bin's mean and deviation in ``spoken`` (S, n_mels)."""
        mean = spoken.mean(dim=0)
        deviation = (spoken - mean).square().mean(dim=0).sqrt()
        return (log_energies - mean) / deviation.clamp(min=self.MIN_DEVIATION)

    def num_frames(self, num_samples: int) -> int:
        """Frames of so many samples at ``sample_rate``."""
        return 1 + num_samples // self.hop

    def num_frames_of(self, seconds: float) -> int:
        """Frames of a recording of any rate, never too many: resampling rounds the length up."""
        return self.num_frames(round(seconds * self.sample_rate))


class SpeedPerturb:
    """Changes speed and pitch together (Ko et al. 2015, INTERSPEECH, "Audio augmentation for
    speech recognition").

    Args:
        factors: speeds, of which one is drawn.

    Raises:
        ValueError: a factor is not a multiple of 0.01 between 0.5 and 2.
    """

    def __init__(self, factors: Sequence[float] = (0.9, 1.0, 1.1)) -> None:
        if not factors or any(not 0.5 <= f <= 2 or f != round(f, 2) for f in factors):
            raise ValueError(
                f"speeds are {list(factors)}: give one or more between 0.5 and 2 with at most two "
                "decimals, such as 0.9, 1.0 and 1.1"
            )
        self.ratios = [Fraction(round(100 * factor), 100) for factor in factors]

    def __call__(self, waveform: Tensor, draw: Random, fits: Callable[[int], bool]) -> Tensor:
        """Samples (N,) -> (ceil(N / factor),), or unchanged if ``fits`` returns False for that
        length."""
        ratio = draw.choice(self.ratios)
        if ratio == 1 or not fits(math.ceil(len(waveform) / ratio)):
            return waveform
        return resample(waveform, ratio.numerator, ratio.denominator)


@dataclass(frozen=True)
class SpecAugment:
    """Masks bins and frames at random places (Park et al. 2019, arXiv:1904.08779). Masks are filled
    with 0, the mean of every bin, or 40 dB below the loudest.

    Attributes:
        freq_masks, time_masks: their numbers.
        freq_width: largest width of a mask over bins.
        time_ratio: largest width of a mask over frames, as a fraction of all frames.
    """

    freq_masks: int = 2
    freq_width: int = 15
    time_masks: int = 2
    time_ratio: float = 0.05

    def __call__(self, features: Tensor, draw: Random) -> Tensor:
        """Features (T, n_mels) -> a masked copy."""
        frames, bins = features.shape
        features = features.clone()
        for _ in range(self.freq_masks):
            features[:, _mask(draw, self.freq_width, bins)] = 0
        for _ in range(self.time_masks):
            features[_mask(draw, int(self.time_ratio * frames), frames)] = 0
        return features


def _mask(draw: Random, widest: int, size: int) -> slice:
    width = draw.randint(0, min(widest, size))
    start = draw.randint(0, size - width)
    return slice(start, start + width)


@dataclass(frozen=True)
class Augment:
    """Augmentation of a training set.

    Attributes:
        speed: of the samples.
        spec: masks of the features.
        two_views: whether each utterance has two masked versions.
        warmup: epochs without masks and second views. With masks, a deep model with attention may
            not leave the plateau on which it outputs only blanks.
    """

    speed: SpeedPerturb | None = None
    spec: SpecAugment | None = None
    two_views: bool = False
    warmup: int = 0

    def views(self, features: Tensor, draw: Random, epoch: int) -> list[Tensor]:
        """One or two versions (T, n_mels) of the features in an epoch, counted from 1."""
        if self.warmup and epoch <= self.warmup:
            return [features]
        mask = self.spec or (lambda features, draw: features)
        return [mask(features, draw) for _ in range(1 + self.two_views)]
