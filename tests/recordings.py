"""Tiny corpora for the trainer's tests: generated tones, and a few of the real prompts."""

import json
from pathlib import Path

import numpy as np
import soundfile

from fastguard.speech.cli.train import main
from fastguard.speech.data.corpora import CorpusError, load_corpus


def write_manifest(path: Path, rows: list[dict]) -> str:
    """The spec of a manifest with these rows."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return f"manifest:{path}"


def tones(folder: Path, count: int = 6) -> str:
    """A corpus of one-second chords, each letter a frequency; the last two rows are dev."""
    words = ["ab", "ba", "abba", "bab", "aab", "bba", "abab", "baba"]
    rows = []
    time = np.arange(16_000) / 16_000
    for i in range(count):
        samples = 0.1 * sum(np.sin(2 * np.pi * (300 + 40 * i + 200 * k) * time) for k in range(3))
        soundfile.write(folder / f"tone{i}.wav", samples, 16_000)
        rows.append(
            {
                "audio_filepath": f"tone{i}.wav",
                "text": words[i],
                "split": "dev" if i >= count - 2 else "train",
            }
        )
    return write_manifest(folder / "tones.jsonl", rows)


def asterisk_or_skip():
    """The recorded prompts; skips where the Debian packages are absent. .ci/run has them."""
    try:
        return load_corpus("asterisk", max_output_length=lambda seconds: int(25 * seconds))
    except CorpusError as error:
        import pytest  # python -m tests.soak does not need it

        pytest.skip(f"asterisk packages are absent: {error}")


#: Settings with which the baseline memorises a few recordings.
MEMORISING = [
    "--model", "baseline", "--stable", "--optim.lr", "1e-3", "--guard.max_norm", "5",
    "--init.linear_std", "0.01", "--network.dropout", "0", "--augment.freq_masks", "0",
    "--augment.time_masks", "0",
]  # fmt: skip


def eight_prompts(folder: Path) -> str:
    """A corpus of eight real prompts, all in train."""
    corpus = asterisk_or_skip()
    prompts = [
        u for u in corpus.split("train") if 3 <= len(u.text.split()) <= 6 and u.duration < 2.5
    ]
    rows = [{"audio_filepath": str(u.audio), "text": u.text, "split": "train"} for u in prompts[:8]]
    return write_manifest(folder / "eight.jsonl", rows)


def prompts_by_heart(folder: Path) -> Path:
    """The folder of a run in which the baseline memorises these prompts."""
    options = [*MEMORISING, "--epochs", "30", "--batch-size", "2", "--data", eight_prompts(folder)]
    assert main([*options, "--run-dir", str(folder / "run")]) == 0
    return folder / "run"


def without_xing(mp3: bytes) -> bytes:
    """The MP3 without its first frame, which holds the number of frames."""
    at = next(i for i in (mp3.find(b"Xing"), mp3.find(b"Info")) if i >= 0)
    start = mp3.rfind(b"\xff", 0, at)
    return mp3[start + mp3[start + 1 :].index(b"\xff" + mp3[start + 1 : start + 2]) + 1 :]


def concatenated(prompts, path, times):
    """The prompts one after the other, half a second of silence after each."""
    parts = [soundfile.read(prompt)[0] for prompt, _ in times * prompts]
    soundfile.write(path, np.concatenate([np.append(p, np.zeros(4_000)) for p in parts]), 8_000)
    return sum(len(part) + 4_000 for part in parts) / 8_000
