"""The text of 16-bit WAV files by an exported model, whose file has all settings.

python examples/onnx_client.py model.onnx speech.wav
"""

import json
import sys
import wave
from itertools import groupby

import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession(sys.argv[1])
made = json.loads(session.get_modelmeta().custom_metadata_map["fastguard"])
spec, cut, n_fft = made["features"], made["windows"], made["features"]["n_fft"]
hann, before = np.hanning(spec["win_length"] + 1)[:-1], spec["window_offset"]
window = np.pad(hann, (before, n_fft - len(hann) - before))
points, bins = np.array(spec["filter_hertz"]), np.linspace(0, spec["f_max"], n_fft // 2 + 1)
slopes = (bins[:, None] - points[:-1]) / np.diff(points)
filters = np.minimum(slopes[:, :-1], 1 - slopes[:, 1:]).clip(0)


def features_of(samples):
    rows = np.lib.stride_tricks.sliding_window_view(np.pad(samples, n_fft // 2), n_fft)
    energies = np.abs(np.fft.rfft(rows[:: spec["hop_length"]] * window)) ** 2 @ filters
    floor = max(energies.max() / spec["dynamic_range"], spec["silence"])
    x = np.log(np.maximum(energies, floor))
    if spec["normalization"] == "level":
        return (x - np.log(floor * spec["dynamic_range"])) / np.log(100) + 2
    loud, speech = energies.sum(1), spec["normalization"] == "speech"
    spoken = x[loud >= loud.max() / spec["speech_range"]] if speech else x
    x = (x - spoken.mean(0)) / np.maximum(spoken.std(0), spec["min_deviation"])
    return np.maximum(x, spec["least"]) if speech else x


for path in sys.argv[2:]:
    with wave.open(path) as file:
        if file.getparams()[:3] != (1, 2, rate := spec["sample_rate"]):
            sys.exit(f"{path}: use ffmpeg -i {path} -ac 1 -ar {rate} -c:a pcm_s16le mono.wav")
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2") / 32768
    best, until = [], len(samples) - cut["context"] - cut["margin"]
    for start in range(0, max(until, 1), cut["kept"]):
        first, last = max(0, start - cut["context"]), start + cut["kept"] >= until
        x = features_of(samples[first : None if last else start + cut["kept"] + cut["context"]])
        feed = {"features": x[None].astype("f"), "feature_lengths": np.array([len(x)])}
        log_probs, (length,) = session.run(["log_probs", "output_lengths"], feed)
        skip, kept = (n // cut["samples_per_frame"] for n in (start - first, cut["kept"]))
        best += log_probs[0, skip : length if last else skip + kept].argmax(-1).tolist()
    print(" ".join("".join(made["symbols"][token] for token, _ in groupby(best)).split()))
