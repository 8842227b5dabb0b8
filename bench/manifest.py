"""What a large manifest costs before the first batch: seconds, and memory of each process.

    python bench/manifest.py [--json FILE] [--rows N [N ...]]

A manifest of so many rows, each with a text of its own and a duration, points to a few recordings
of 1 to 5 seconds that this program writes. A fresh process for each size reads it (load_corpus),
plans an epoch (the sampler's first batch), and takes 8 batches of 16 from a loader with 2 workers.
Memory is the peak of the resident set (VmHWM), and for workers also what they alone hold (USS):
they are forks of the parent, whose pages count in both resident sets. The baseline is the peak
after the imports alone. The bytes per row are what the corpus itself keeps.
"""

import argparse
import itertools
import json
import multiprocessing
import pickle
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from string import ascii_lowercase

import numpy as np
import soundfile
import torch
from timing import print_machine, table, write_json

SIZES = [10_000, 100_000]
WORDS = 8  # a text
RECORDINGS = 16
BATCH = 16
BATCHES = 8


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the figures there")
    parser.add_argument("--rows", type=int, nargs="+", default=SIZES)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure)))
        return
    result = {"machine": print_machine(torch.device("cpu")), "rows": {}}
    with tempfile.TemporaryDirectory() as folder:
        for rows in args.rows:
            path = write(Path(folder), rows)
            command = [sys.executable, __file__, "--measure", str(path)]
            run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            result["rows"][rows] = json.loads(run.stdout)
            result["rows"][rows]["manifest MB"] = path.stat().st_size / 1e6
    figures = result["rows"]
    print(
        table(
            "seconds and MB by rows of the manifest",
            ["", *(f"{rows:,}" for rows in figures)],
            [
                [name, *(f"{figures[rows][name]:.2f}" for rows in figures)]
                for name in next(iter(figures.values()))
            ],
        ),
        end="\n\n",
    )
    write_json(args.json, result)


def write(folder: Path, rows: int) -> Path:
    """RECORDINGS files of 1 to 5 seconds; each speaker's folder is a link to the one they are in,
    so that every row has a path of its own."""
    draw = random.Random(0)
    seconds = [1 + 4 * i / RECORDINGS for i in range(RECORDINGS)]
    voice = folder / "voice"
    voice.mkdir(exist_ok=True)
    for i, length in enumerate(seconds):
        noise = np.random.default_rng(i).standard_normal(round(16_000 * length)) * 0.1
        soundfile.write(voice / f"utterance-{i:02d}.flac", noise, 16_000)
    vocabulary = ["".join(draw.choices(ascii_lowercase, k=draw.randint(2, 8))) for _ in range(9999)]
    path = folder / f"{rows}.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for row in range(rows):
            speaker, recording = divmod(row, RECORDINGS)
            if recording == 0:
                (folder / f"{rows}-speaker-{speaker:05d}").symlink_to(voice)
            entry = {
                "audio_filepath": f"{rows}-speaker-{speaker:05d}/utterance-{recording:02d}.flac",
                "text": " ".join(draw.choices(vocabulary, k=WORDS)),
                "duration": seconds[recording],
            }
            file.write(json.dumps(entry) + "\n")
    return path


def measure(manifest: Path) -> dict[str, float]:
    """Run in a process of its own: a peak does not go down again."""
    from fastguard.speech.data.batching import SpeechDataset
    from fastguard.speech.data.corpora import load_corpus
    from fastguard.speech.data.features import LogMel
    from fastguard.speech.data.loader import make_loader
    from fastguard.speech.data.sampler import BucketBatchSampler
    from fastguard.speech.data.tokenizer import CharTokenizer

    figures = {"baseline MB": memory("VmHWM")}
    clock = time.perf_counter()

    def lap(name):
        nonlocal clock
        figures[name] = time.perf_counter() - clock
        clock = time.perf_counter()

    corpus = load_corpus(f"manifest:{manifest}", max_output_length=lambda s: 1 + int(25 * s))
    lap("load_corpus s")
    utterances = corpus.split("train")
    tokenizer = CharTokenizer.from_texts(utterances.texts())
    lap("tokenizer s")
    sampler = BucketBatchSampler(utterances.durations, batch_size=BATCH)
    next(iter(sampler))
    lap("first batch of the sampler s")
    loader = make_loader(SpeechDataset(utterances, tokenizer, LogMel()), sampler, num_workers=2)
    batches = iter(loader)
    next(batches)
    lap("first batch of the loader s")
    assert all(len(batch) == BATCH for batch in itertools.islice(batches, BATCHES - 1))
    lap(f"{BATCHES - 1} more batches s")
    workers = [child.pid for child in multiprocessing.active_children()]
    figures["peak MB"] = memory("VmHWM")
    figures["peak of a worker MB"] = max(memory("VmHWM", pid) for pid in workers)
    figures["of a worker alone MB"] = max(alone(pid) for pid in workers)
    figures["packed bytes per row"] = len(pickle.dumps(corpus.utterances)) / len(corpus.utterances)
    return figures


def memory(field: str, pid: int | str = "self") -> float:
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    return int(status.split(f"{field}:")[1].split()[0]) / 1024


def alone(pid: int) -> float:
    """MB that no other process shares."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8").splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


if __name__ == "__main__":
    main()
