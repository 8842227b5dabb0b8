"""A synthetic corpus: short sentences of a small grammar, spoken by eSpeak NG.

The corpus is written once into a cache folder, as 16 kHz WAV files with a manifest, and reused as
long as its checksums match. No voice is in two splits, and no sentence is spoken twice.
"""

import hashlib
import importlib.metadata
import json
import logging
import os
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import soundfile
import torch
import torchaudio
from tqdm import tqdm

from . import espeak
from .cache import default_cache
from .features import one_thread
from .readers import CorpusError

SIZES = {"train": 360, "dev": 40, "test": 40}
VOICES = {
    "train": ("m1", "m2", "m3", "m4", "m5", "f1", "f2", "f3"),
    "dev": ("m6", "f4"),
    "test": ("m7", "f5"),
}
RATES = range(110, 171, 10)  # words per minute
PITCHES = range(35, 66, 5)
WORDS = range(2, 8)
SAMPLE_RATE = 16_000

# Alternatives of words and of <names>, which refer to other rules.
GRAMMAR = {
    "sentence": (
        "<order> | please <order> | <order> <when> | <order> <where> | wait <where> | "
        "<who> <did> <thing> | <who> <did> <thing> <when> | <who> <did> <thing> <where> | "
        "<thing> is <where> | <thing> was <quality> <when> | is <thing> <quality> | "
        "<who> will be <where> <when> | <number> <things> are <where> | "
        "we need <number> <things> | <who> sold <number> <things> <when>"
    ),
    "order": "<act> <thing> | <act> <number> <things>",
    "act": "find | move | clean | paint | bring | hide | count | keep",
    "did": "found | moved | cleaned | painted | brought | hid | liked | wanted",
    "who": "anna | peter | my sister | your father | the doctor | the farmer",
    "thing": "the <noun> | my <noun> | the <quality> <noun>",
    "noun": "window | garden | bottle | letter | kitchen | basket | boat | guitar",
    "things": "horses | apples | chairs | tickets | books | lamps | shoes | eggs",
    "quality": "green | heavy | broken | quiet | little | yellow | warm | empty",
    "number": "two | three | four | six | seven | nine | twelve | twenty",
    "where": "here | outside | under the bridge | behind the house | near the river",
    "when": "today | tonight | again | on monday | this morning | before dinner",
}

_FORMAT = 1  # increase it when the files or the computation of the samples change
_MANIFEST = "manifest.jsonl"
_CHECKSUMS = "SHA256SUMS"
_log = logging.getLogger(__name__)


def build_synthetic(
    cache_dir: Path | None, seed: int, *, sizes: Mapping[str, int] | None = None
) -> Path:
    """Path of the manifest of a synthetic corpus, which is built unless the cache has it.

    The same seed gives the same bytes in any process. Several processes may build at the same time:
    each works in its own folder, and all use the corpus of the first that finishes.

    Args:
        cache_dir: default ``fastguard`` in $XDG_CACHE_HOME or ~/.cache.
        seed: of sentences, voices, rates and pitches.
        sizes: utterances of each split; default :data:`SIZES`.

    Raises:
        CorpusError: eSpeak NG is missing or fails, or the cache cannot be written.
    """
    library, data, version = _find_espeak()
    cache = cache_dir or default_cache("the synthetic corpus")
    sizes = dict(sizes or SIZES)
    recipe = [_FORMAT, version, seed, sizes, VOICES, [*RATES], [*PITCHES], SAMPLE_RATE, GRAMMAR]
    corpus = cache / f"synthetic-{hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:12]}"
    try:
        return _cached(corpus, [*_requests(seed, sizes)], library, data)
    except OSError as error:
        raise CorpusError(
            f"the synthetic corpus cannot be written to {cache}: {error}; set XDG_CACHE_HOME to a "
            "writable folder"
        ) from error


def _cached(corpus: Path, requests: list[dict], library: str, data: str) -> Path:
    """Path of the manifest in the folder ``corpus``, which is built unless it is complete."""
    if corpus.exists():
        if not (damage := _damage(corpus)):
            return corpus / _MANIFEST
        _log.warning("%s: %s; building it again", corpus, damage)
    cache = corpus.parent
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{corpus.name}-", dir=cache) as scratch:
        built = Path(scratch, "built")
        built.mkdir()
        with one_thread():
            _write(built, requests, library, data)
        _publish(built, corpus)
    return corpus / _MANIFEST


def _find_espeak() -> tuple[str, str, str]:
    """Paths of the library and of its data, and the version of their wheel."""
    try:
        import espeakng_loader

        version = importlib.metadata.version("espeakng-loader")
        return espeakng_loader.get_library_path(), espeakng_loader.get_data_path(), version
    except (ImportError, RuntimeError) as error:
        raise CorpusError(
            f"the synthetic corpus needs eSpeak NG ({error}): pip install espeakng-loader, or give "
            "another --data"
        ) from error


def _requests(seed: int, sizes: Mapping[str, int]) -> Iterator[dict]:
    """For each utterance: text, voice, rate, pitch and split."""
    draw = random.Random(seed)
    spoken = set()
    for split, size in sizes.items():
        for number in range(size):
            text = _expand("sentence", draw)
            while text in spoken or len(text.split()) not in WORDS:
                text = _expand("sentence", draw)
            spoken.add(text)
            voice = "en-us+" + VOICES[split][number % len(VOICES[split])]
            rate, pitch = draw.choice(RATES), draw.choice(PITCHES)
            yield {"split": split, "text": text, "voice": voice, "rate": rate, "pitch": pitch}


def _expand(rule: str, draw: random.Random) -> str:
    choice = draw.choice(GRAMMAR[rule].split(" | "))
    return re.sub(r"<(\w+)>", lambda name: _expand(name[1], draw), choice)


def _write(folder: Path, requests: list[dict], library: str, data: str) -> None:
    """Write the recordings, their manifest and the checksums of both into ``folder``."""
    rows = []
    spoken = _speak(requests, folder.with_name("requests.jsonl"), library, data)
    bar = tqdm(
        spoken, "speaking", len(requests), leave=False, delay=1, disable=not sys.stderr.isatty()
    )
    for number, (request, samples) in enumerate(zip(requests, bar, strict=True)):
        name = f"{request['split']}-{number:03}.wav"
        soundfile.write(folder / name, samples, SAMPLE_RATE, subtype="PCM_16")
        rows.append({"audio_filepath": name, "duration": len(samples) / SAMPLE_RATE, **request})
    manifest = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / _MANIFEST).write_text(manifest, encoding="utf-8", newline="\n")
    sums = "".join(line + "\n" for line in _checksums(folder))
    (folder / _CHECKSUMS).write_text(sums, encoding="utf-8", newline="\n")


def _speak(requests: list[dict], listing: Path, library: str, data: str) -> Iterator[np.ndarray]:
    """Samples (N,) int16 at SAMPLE_RATE, for each request."""
    listing.write_text("".join(json.dumps(line) + "\n" for line in requests), encoding="utf-8")
    command = [sys.executable, "-I", espeak.__file__, library, data, str(listing)]
    # In float64, so that rounding to 16 bits gives the same bytes on every processor.
    resample = torchaudio.transforms.Resample(espeak.SAMPLE_RATE, SAMPLE_RATE, dtype=torch.float64)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        for request in requests:
            size = int.from_bytes(child.stdout.read(4), "little")
            samples = child.stdout.read(size)
            if size == 0 or len(samples) < size:
                reason = child.stderr.read().decode(errors="replace").strip().splitlines()
                raise CorpusError(
                    f"eSpeak NG stopped at {request} ({reason[-1] if reason else 'silent'}): "
                    "pip install --force-reinstall espeakng-loader, or give another --data"
                )
            wave = resample(torch.from_numpy(np.frombuffer(samples, np.int16).astype(np.float64)))
            yield wave.round().clamp(-32768, 32767).short().numpy()


def _checksums(folder: Path) -> list[str]:
    """The output of ``sha256sum *`` without the file of checksums."""
    files = sorted(path for path in folder.iterdir() if path.name != _CHECKSUMS)
    return [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}" for path in files]


def _damage(corpus: Path) -> str | None:
    """A file that differs from its checksum, in words; None if there is none."""
    written = corpus / _CHECKSUMS
    if not written.is_file():
        return f"{_CHECKSUMS} is missing"
    lines = written.read_text(encoding="utf-8", errors="replace").splitlines()
    differing = sorted(line.partition("  ")[2] for line in set(lines) ^ set(_checksums(corpus)))
    return f"{differing[0]} differs from {_CHECKSUMS}" if differing else None


def _publish(built: Path, corpus: Path) -> None:
    """Move ``built`` to ``corpus``, unless another process has built it in the meantime."""
    if corpus.exists() and _damage(corpus):
        os.rename(corpus, built.with_name("damaged"))
    try:
        os.rename(built, corpus)
    except OSError:
        if _damage(corpus):
            raise
