"""What a consumer of an exported model needs besides it: features, windows and texts.

:mod:`fastguard.export` writes the description to model.json and into the ONNX files.
examples/onnx_client.py needs nothing else.
"""

import math

import torch
from torch import Tensor
from torchaudio.transforms import MelScale

from fastguard import __version__
from fastguard.speech.data.features import LogMel
from fastguard.speech.models.layers import Subsampling
from fastguard.speech.storage.plain import to_plain

from .recognizer import Recognizer
from .segments import Cuts

#: The key of the description, as JSON, in the metadata of an ONNX file.
METADATA_KEY = "fastguard"
#: The file beside model.json that has the SentencePiece model.
PIECES_FILE = "tokenizer.model"


def describe(recognizer: Recognizer, files: list[str]) -> dict:
    """The content of model.json, in types that JSON has.

    Args:
        recognizer: what is exported.
        files: names of the exported files.
    """
    symbols = recognizer.tokenizer.vocab_size
    state = recognizer.tokenizer.to_dict()
    return {
        "made_by": {"torch-fastguard": __version__, "torch": torch.__version__},
        "model": recognizer.config.model,
        "files": files,
        "inputs": {
            "features": f"float32 (batch, frames, {recognizer.model.n_mels}), frames >= 1",
            "feature_lengths": "int64 (batch,), 1 to frames; frames past them are ignored",
        },
        "outputs": {
            "log_probs": f"float32 (batch, ceil(frames / 4) + 1, {symbols}), natural logarithms",
            "output_lengths": "int64 (batch,), ceil(feature_lengths / 4), frames to be read",
        },
        "subsampling": Subsampling.FACTOR,
        "features": describe_features(recognizer.log_mel),
        "windows": describe_windows(recognizer.log_mel),
        "blank_id": 0,
        "symbols": texts_of(recognizer.tokenizer.symbols, state),
        "decoding": [
            "the most likely symbol of each frame; equal neighbours are one; blanks are dropped",
            "text: the symbols joined, with single spaces between words and none at the ends",
        ],
        "text": to_plain(recognizer.config.text),
        "tokenizer": {
            key: PIECES_FILE if isinstance(value, Tensor) else value for key, value in state.items()
        },
    }


def texts_of(symbols: list[str], state: dict) -> list[str]:
    """The text of each token, "" for the blank; SentencePiece writes spaces as \\u2581."""
    pieces = state.get("kind") == "sentencepiece"
    return ["", *(s.replace("\u2581", " ") if pieces else s for s in symbols[1:])]


def describe_features(log_mel: LogMel) -> dict:
    """The parameters of :class:`LogMel`, enough to compute the same features elsewhere."""
    mel = log_mel.mel
    return {
        "sample_rate": log_mel.sample_rate,
        "window": "hann, periodic",
        "n_fft": mel.n_fft,
        "win_length": mel.win_length,
        "window_offset": (mel.n_fft - mel.win_length) // 2,
        "hop_length": mel.hop_length,
        "center": "n_fft / 2 zeros on either side",
        "power": mel.power,
        "n_mels": mel.n_mels,
        "f_min": mel.f_min,
        "f_max": mel.mel_scale.f_max,
        "filter_hertz": _filter_points(mel.mel_scale),
        "mel_scale": mel.mel_scale.mel_scale,
        "mel_norm": mel.mel_scale.norm,
        "dynamic_range": log_mel.DYNAMIC_RANGE,
        "silence": log_mel.SILENCE,
        "normalization": log_mel.normalization,
        "min_deviation": log_mel.MIN_DEVIATION,
        "speech_range": log_mel.SPEECH_RANGE,
        "least": log_mel.LEAST,
        "recipe": [
            "samples: mono, in [-1, 1], n_fft / 2 zeros before and after",
            "frame t: padded samples from t * hop_length to t * hop_length + n_fft, in all "
            "1 + samples // hop_length frames",
            "window[window_offset + k] = 0.5 - 0.5 cos(2 pi k / win_length), 0 <= k < win_length; "
            "0 elsewhere",
            "power spectrum: |FFT(frame * window)|^power, n_fft / 2 + 1 bins from 0 Hz to f_max",
            "filter_hertz: n_mels + 2 points from f_min to f_max, at equal distances on the scale "
            "2595 log10(1 + f / 700)",
            "filter i over Hz: 0 up to filter_hertz[i], 1 at filter_hertz[i + 1], 0 from "
            "filter_hertz[i + 2] on, linear between",
            "energies (frames, n_mels): the sum of filter times power spectrum",
            "floor = max(max(energies) / dynamic_range, silence)",
            *_NORMALIZATIONS[log_mel.normalization],
        ],
    }


def _filter_points(scale: MelScale) -> list[float]:
    """Corners of the filters in Hz, by the formula of the HTK book, which ``scale`` has."""
    ends = [2595 * math.log10(1 + f / 700) for f in (scale.f_min, scale.f_max)]
    points = torch.linspace(*ends, scale.n_mels + 2, dtype=torch.float64)
    return (700 * (10 ** (points / 2595) - 1)).tolist()


_NORMALIZATIONS = {
    "speech": [
        "x = ln(max(energies, floor)); e = sum of energies over the bins, one for each frame",
        "s = x in the frames where e >= max(e) / speech_range; x = x - mean of s over its frames",
        "x = x / max(root of the mean of (s - mean of s)^2 over its frames, min_deviation)",
        "features = max(x, least)",
    ],
    "utterance": [
        "x = ln(max(energies, floor)); x = x - mean over the frames",
        "features = x / max(root of the mean of x^2 over the frames, min_deviation)",
    ],
    "level": ["features = log10(max(energies, floor) / (floor * dynamic_range)) / 2 + 2"],
}


def describe_windows(log_mel: LogMel) -> dict:
    """How `transcribe --no-vad` cuts a recording whose rate is that of the features. The network
    that finds speech is not part of the model."""
    rate, step = log_mel.sample_rate, log_mel.hop * Subsampling.FACTOR
    cuts = Cuts.of(rate, rate, step)
    return {
        "samples_per_frame": step,
        "kept": cuts.kept,
        "context": cuts.context,
        "margin": cuts.margin,
        "recipe": [
            "counts are of samples at sample_rate; a frame is one of log_probs",
            "window n: samples from max(0, n * kept - context) to (n + 1) * kept + context; "
            "features of each window are computed from it alone",
            "the first window with (n + 1) * kept + context + margin >= samples is the last, and "
            "goes to the end of the recording",
            "of its log_probs, min(n * kept, context) / samples_per_frame frames are dropped, and "
            "the next kept / samples_per_frame are used, in the last window all up to "
            "output_lengths",
            "frames of all windows, one after the other, are decoded as one",
        ],
    }
