"""From a recording to normalised log-mel features, and their masking for training."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import soundfile
import torch
import torchaudio
from torch import Tensor, nn
from torchaudio.functional import mask_along_axis

# torchaudio's default of 6 leaves images of an 8 kHz voice 62 dB under its peak in the bins above
# 4 kHz, where they look like speech; 32 pushes them under LogMel.DYNAMIC_RANGE.
RESAMPLING_WIDTH = 32


@contextmanager
def one_thread() -> Iterator[None]:
    """Keep torch to one thread: a recording is too little to share.  Where other programs hold the
    cores, its threads wait for one another; the features of 439 prompts took 33 s on two threads of
    a busy machine with two cores, and 1.1 s on one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def load_audio(path: Path | str, sample_rate: int) -> Tensor:
    """Samples (N,) float32 in [-1, 1] at ``sample_rate`` Hz, the channels averaged.

    Raises soundfile.LibsndfileError for a file that is missing or can not be decoded.
    """
    samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    return resample(torch.from_numpy(samples).mean(dim=1), rate, sample_rate)


def resample(samples: Tensor, rate: int, sample_rate: int) -> Tensor:
    """Samples (N,) at ``rate`` Hz -> (ceil(N * sample_rate / rate),) at ``sample_rate`` Hz."""
    return torchaudio.functional.resample(
        samples, rate, sample_rate, lowpass_filter_width=RESAMPLING_WIDTH
    )


class LogMel(nn.Module):
    """Log-mel energies, each bin with mean 0 and (where it holds speech) variance 1.

    Nothing is learnt and nothing depends on the loudness: the floor under the logarithm lies
    DYNAMIC_RANGE below the loudest energy of the recording.
    """

    DYNAMIC_RANGE = 1e8  # 80 dB
    SILENCE = 1e-20  # the floor where all is silent; samples of 1e-5 have energies around 1e-6
    # Bins with speech vary by 2 to 5 (natural log); those above the Nyquist frequency of a
    # resampled recording by less than 0.2, and must not be blown up to look like speech.
    MIN_DEVIATION = 1.0

    def __init__(
        self,
        sample_rate: int = 16_000,
        n_mels: int = 80,
        window_seconds: float = 0.025,
        hop_seconds: float = 0.010,
    ) -> None:
        super().__init__()
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
        """Features (T, n_mels) float32 of the samples (N,) float32, T = num_frames(N).

        Raises ValueError unless the samples are one non-empty row.
        """
        if waveform.dim() != 1 or waveform.numel() == 0:
            raise ValueError(
                f"LogMel needs samples of shape (N,) with N > 0, got {tuple(waveform.shape)}: "
                "average the channels, and drop empty recordings"
            )
        energies = self.mel(waveform).T
        floor = (energies.amax() / self.DYNAMIC_RANGE).clamp(min=self.SILENCE)
        log_energies = energies.clamp(min=floor).log()
        centred = log_energies - log_energies.mean(dim=0)
        deviation = centred.square().mean(dim=0).sqrt()
        return centred / deviation.clamp(min=self.MIN_DEVIATION)

    def num_frames(self, num_samples: int) -> int:
        return 1 + num_samples // self.hop

    def num_frames_of(self, seconds: float) -> int:
        """Frames of a recording of any rate: resampling rounds its length up, so never too many."""
        return self.num_frames(round(seconds * self.sample_rate))


class SpecAugment(nn.Module):
    """Masks of random place and width over bins and frames, as in Park et al. 2019
    (arXiv:1904.08779), filled with 0, the mean of every bin.

    ``freq_width`` bounds a mask in bins, ``time_ratio`` in parts of the frames.  Draws from torch's
    global generator; in eval mode it changes nothing.
    """

    def __init__(
        self,
        freq_masks: int = 2,
        freq_width: int = 15,
        time_masks: int = 2,
        time_ratio: float = 0.05,
    ) -> None:
        super().__init__()
        self.freq_masks = freq_masks
        self.freq_width = freq_width
        self.time_masks = time_masks
        self.time_ratio = time_ratio

    def forward(self, features: Tensor) -> Tensor:
        """Features (T, n_mels) -> a masked copy."""
        if not self.training:
            return features
        time_width = int(self.time_ratio * features.shape[0])
        for _ in range(self.freq_masks):
            features = mask_along_axis(features, self.freq_width, 0.0, axis=1)
        for _ in range(self.time_masks):
            features = mask_along_axis(features, time_width, 0.0, axis=0)
        return features
