import random
from collections import Counter

import numpy as np
import pytest
import soundfile
import torch
import torchaudio
from hypothesis import given, settings
from hypothesis import strategies as st

from fastguard.speech.data.audio import AudioError
from fastguard.speech.data.features import LogMel, SpecAugment, SpeedPerturb, load_audio, one_thread
from tests.speech.conftest import tones

RATE = 16_000
LOG_MEL = LogMel()
UTTERANCE = LogMel(normalization="utterance")
LEVEL = LogMel(normalization="level")
TONE = 15  # the bin of 440 Hz


def waveform(seconds=1.0, rate=RATE):
    return torch.from_numpy(tones(seconds, rate)[:, 0]).float()


def energy(samples, low, high):
    """Share of the energy between two frequencies in Hz, at 16 kHz."""
    power = torch.fft.rfft(samples).abs().square()
    hertz = torch.fft.rfftfreq(len(samples), 1 / RATE)
    return (power[(hertz >= low) & (hertz < high)].sum() / power.sum()).item()


def test_one_thread_is_given_back():
    threads = torch.get_num_threads()
    with pytest.raises(KeyError), one_thread():
        assert torch.get_num_threads() == 1
        raise KeyError
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".ogg", ".mp3"])
@pytest.mark.parametrize("rate, channels", [(8_000, 1), (16_000, 1), (44_100, 2)])
def test_load_audio_of_every_format(tmp_path, record, suffix, rate, channels):
    samples = load_audio(record(tmp_path / f"a{suffix}", 1.0, rate, channels), RATE)
    assert samples.dtype == torch.float32
    assert samples.dim() == 1
    assert len(samples) == pytest.approx(RATE, rel=0.05)  # lossy codecs pad
    assert samples.abs().max() == pytest.approx(0.3 if channels == 1 else 0.225, rel=0.1)
    assert energy(samples, 430, 450) > 0.98


def test_channels_are_averaged(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.array([[0.5, -0.25]] * 100), RATE, subtype="FLOAT")
    assert torch.equal(load_audio(tmp_path / "a.wav", RATE), torch.full((100,), 0.125))


def test_a_native_recording_is_not_touched(tmp_path):
    samples = waveform()
    soundfile.write(tmp_path / "a.wav", samples.numpy(), RATE, subtype="FLOAT")
    assert torch.equal(load_audio(tmp_path / "a.wav", RATE), samples)


@pytest.mark.parametrize("rate", [44_101, 127_997, 1_000, 384_000])
def test_an_uncommon_rate_is_resampled(tmp_path, record, rate):
    """Of 127,997 Hz the exact filter would have 2e9 coefficients."""
    samples = load_audio(record(tmp_path / "a.wav", 1.0, rate), RATE)
    assert len(samples) == pytest.approx(RATE, abs=1)
    assert energy(samples, 430, 450) > (0.98 if rate > 1_000 else 0.9)


def test_load_audio_names_a_missing_file(tmp_path):
    with pytest.raises(AudioError, match=r"no recording: '.*gone\.wav' does not exist"):
        load_audio(tmp_path / "gone.wav", RATE)


@given(st.integers(1, 4_000) | st.integers(1, 25).map(lambda hops: hops * LOG_MEL.hop - 1))
@settings(max_examples=40, deadline=None)
def test_shape(samples):
    features = LOG_MEL(waveform()[:samples])
    assert features.dtype == torch.float32
    assert features.shape == (LOG_MEL.num_frames(samples), 80)
    assert features.isfinite().all()
    assert LOG_MEL.num_frames_of(samples / RATE) == LOG_MEL.num_frames(samples)


@given(st.integers(500, 30_000), st.sampled_from([8_000, 11_025, 22_050, 44_100, 48_000]))
@settings(max_examples=40, deadline=None)
def test_num_frames_of_never_promises_too_many(tmp_path_factory, samples, rate):
    path = tmp_path_factory.getbasetemp() / "a.wav"
    soundfile.write(path, np.zeros(samples), rate)
    frames = LOG_MEL.num_frames(len(load_audio(path, RATE)))
    assert frames - 1 <= LOG_MEL.num_frames_of(samples / rate) <= frames


def test_hop_and_bins_are_parameters():
    log_mel = LogMel(8_000, n_mels=40, window_seconds=0.032, hop_seconds=0.016)
    assert log_mel(waveform(1.0, 8_000)).shape == (63, 40)


def test_every_bin_has_mean_0_and_variance_1():
    features = UTTERANCE(waveform(2.0))
    assert features.mean(dim=0).abs().max() < 1e-4
    deviation = features.std(dim=0, unbiased=False)
    assert deviation.max() < 1.001
    assert deviation[TONE] > 0.999


def test_speech_has_mean_0_and_variance_1_in_its_own_frames():
    samples = waveform(2.0)
    energies = LOG_MEL.mel(samples).T.sum(dim=1)
    spoken = LOG_MEL(samples)[10 * energies.log10() > 10 * energies.max().log10() - 30]
    assert len(spoken) < LOG_MEL.num_frames(len(samples))
    assert spoken[:, TONE].mean().abs() < 1e-4
    assert spoken[:, TONE].std(unbiased=False) == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("log_mel, same", [(LOG_MEL, True), (LEVEL, True), (UTTERANCE, False)])
@pytest.mark.parametrize("noise", [0.0, 1e-5])
def test_silence_around_speech_changes_nothing(log_mel, same, noise):
    """Half a minute on both sides: features of the frames that do not touch it are the same."""
    speech, silence = waveform(2.0), noise * torch.randn(30 * RATE)
    alone = log_mel(speech)
    found = log_mel(torch.cat([silence, speech, silence]))[3000 : 3000 + len(alone)]
    difference = (found - alone)[2:-2].abs().max()
    assert difference < 1e-3 if same else difference > 0.5
    assert log_mel(torch.cat([silence, speech, silence])).isfinite().all()


def test_silence_lies_two_to_three_deviations_below_speech():
    features = LOG_MEL(torch.cat([torch.zeros(RATE), waveform(2.0)]))
    assert features.min() == LogMel.LEAST == -3.0


@pytest.mark.parametrize("log_mel", [LOG_MEL, UTTERANCE, LEVEL])
@pytest.mark.parametrize("gain", [1e-4, 0.1, 30.0])
def test_loudness_does_not_matter(log_mel, gain):
    samples = waveform()
    torch.testing.assert_close(log_mel(gain * samples), log_mel(samples), atol=2e-3, rtol=0)


@pytest.mark.parametrize("level", [0.0, 0.5])
def test_silence_and_constants_are_finite(level):
    constant = torch.full((RATE,), level)
    features, levels = LOG_MEL(constant), LEVEL(constant)
    assert features.isfinite().all() and levels.isfinite().all()
    if level == 0:
        assert features.abs().max() == 0
        torch.testing.assert_close(levels, torch.full_like(levels, -2.0))


def test_levels_are_decibels_under_the_loudest():
    features, energies = LEVEL(waveform()), LEVEL.mel(waveform()).T.double()
    decibels = (10 * (energies / energies.max()).log10()).clamp(min=-80)
    torch.testing.assert_close(features.double(), (decibels + 40) / 20, atol=1e-5, rtol=0)
    assert [features.max().item(), features.min().item()] == pytest.approx([2, -2], abs=1e-5)


def test_the_spectrum_of_a_steady_sound_stays_where_levels_are_kept():
    noise = torch.randn(2 * RATE, generator=torch.Generator().manual_seed(0))
    dark = torchaudio.functional.lowpass_biquad(noise, RATE, 500)

    def spectrum(log_mel, samples):
        return log_mel(samples)[5:-5].mean(dim=0)

    assert (spectrum(LEVEL, noise) - spectrum(LEVEL, dark)).abs().max() > 1
    assert (spectrum(LOG_MEL, noise) - spectrum(LOG_MEL, dark)).abs().max() < 0.2


def test_an_unknown_normalization_is_refused():
    with pytest.raises(ValueError, match="'peak': give one of speech, utterance, level"):
        LogMel(normalization="peak")


def test_bins_that_a_telephone_does_not_carry_stay_quiet(tmp_path, record):
    features = LOG_MEL(load_audio(record(tmp_path / "a.wav", 2.0, rate=8_000), RATE))
    assert features[:, 70:].std(dim=0).max() < 0.2  # bin 70: from 4.9 kHz
    assert features[:, TONE].std() > 0.9


def test_steady_noise_is_not_blown_up():
    noise = torch.randn(2 * RATE, generator=torch.Generator().manual_seed(0))
    assert LOG_MEL(noise)[1:-1, 70:].std(dim=0).max() < 0.6


@pytest.mark.parametrize("shape", [(0,), (1, 100), (100, 2), ()])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match="average the channels"):
        LOG_MEL(torch.zeros(shape))


def test_spec_augment_masks_whole_bins_and_frames_with_zeros():
    draw = random.Random(0)
    features = torch.ones(200, 80)
    augment = SpecAugment(freq_masks=2, freq_width=15, time_masks=2, time_ratio=0.05)
    seen, first, last = set(), 80, 0
    for _ in range(200):
        masked = augment(features, draw)
        assert set(masked.unique().tolist()) <= {0.0, 1.0}
        empty = (masked.sum(dim=0) == 0).nonzero().flatten().tolist()
        bins, frames = len(empty), int((masked.sum(dim=1) == 0).sum())
        assert bins <= 2 * 15
        assert frames <= 2 * 0.05 * 200
        assert (masked == 0).sum() == bins * 200 + frames * 80 - bins * frames
        seen.add((bins, frames))
        first, last = min([first, *empty]), max([last, *empty])
    assert max(bins for bins, _ in seen) > 25  # two masks at work, up to the widest
    assert max(frames for _, frames in seen) > 16
    assert min(bins for bins, _ in seen) < 5
    assert (first, last) == (0, 79)  # no place is spared
    assert (features == 1).all()  # the input itself is left alone


def test_spec_augment_follows_its_generator():
    features, augment = torch.randn(100, 80), SpecAugment()
    draw = random.Random(3)
    first, second = augment(features, draw), augment(features, draw)
    torch.manual_seed(0)
    assert torch.equal(augment(features, random.Random(3)), first)
    assert not torch.equal(first, second)


def test_spec_augment_without_masks_changes_nothing():
    features = torch.randn(100, 80)
    augment = SpecAugment(freq_masks=0, time_masks=0)
    assert torch.equal(augment(features, random.Random(0)), features)


def test_spec_augment_of_features_smaller_than_its_masks():
    assert SpecAugment(time_ratio=1.0)(torch.ones(1, 4), random.Random(0)).shape == (1, 4)


@pytest.mark.parametrize("factor", [0.9, 1.1, 0.5, 2.0])
def test_a_speed_scales_length_and_pitch(factor):
    faster = SpeedPerturb((factor,))(waveform(2.0), random.Random(0), lambda samples: True)
    assert len(faster) == -(-2 * RATE * 100 // round(factor * 100))
    assert energy(faster, 440 * factor - 10, 440 * factor + 10) > 0.98


def test_speeds_are_drawn_evenly():
    samples, draw, speed = torch.zeros(900), random.Random(0), SpeedPerturb()
    lengths = Counter(len(speed(samples, draw, lambda samples: True)) for _ in range(300))
    assert lengths.keys() == {1000, 900, 819}
    assert min(lengths.values()) > 75


def test_a_speed_is_left_out_where_its_length_does_not_fit():
    samples, asked = waveform(), []
    refused = SpeedPerturb((0.9,))(samples, random.Random(0), lambda n: asked.append(n) or False)
    assert refused is samples
    assert asked == [17_778]


@pytest.mark.parametrize("factors", [(), (0.0,), (1.0, 2.5), (0.333,), (-1.0,), (float("inf"),)])
def test_odd_speeds_are_refused(factors):
    with pytest.raises(ValueError, match=r"speeds are \["):
        SpeedPerturb(factors)
