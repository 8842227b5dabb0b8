"""``python -m fastguard.diagnose``: what is wrong with a training step, and what to change."""

from __future__ import annotations

import argparse
import json
from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path

import soundfile
import torch
from tqdm import tqdm

from fastguard._command import exit_status
from fastguard._deprecated import with_new_keys
from fastguard._io import files, terminal
from fastguard.diagnose.diagnosis import Diagnosis, Finding, diagnose
from fastguard.diagnose.weight_rules import excessive_rate
from fastguard.guard.report import OLD_KEYS
from fastguard.speech.data.batching import Batch, Item, collate
from fastguard.speech.data.corpora import read_rows
from fastguard.speech.data.features import load_audio, one_thread
from fastguard.speech.data.problems import ctc_problems, recording_problems
from fastguard.speech.data.readers import CorpusError, Row
from fastguard.speech.recognition.recognizer import Recognizer, untrained_model
from fastguard.speech.storage import checkpoint
from fastguard.speech.storage.yaml_file import read_yaml
from fastguard.speech.training.config import Config
from fastguard.speech.training.loss import ctc_loss
from fastguard.speech.training.precision import AUTOCAST, autocast

_EXAMPLE = """examples:
  python -m fastguard.diagnose runs/my --report runs/my/bad_step_000123.json
  python -m fastguard.diagnose runs/my/last.pt --batches 4 --precision fp16"""


class _Failure(Exception):
    """Nothing could be diagnosed; the message says why."""


@dataclass(frozen=True)
class _Diagnosed:
    ids: list[str]
    diagnosis: Diagnosis


@terminal.command
def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 diagnosed, 1 nothing could be diagnosed, 2 wrong usage, 130 Ctrl-C."""
    options = _parser().parse_args(argv)
    failures = _Failure, CorpusError, checkpoint.CheckpointError, OSError
    return exit_status(lambda: _report(options), *failures)


def _report(options: argparse.Namespace) -> None:
    results = _run(options)
    if options.json is not None:
        text = json.dumps([_plain(r) for r in results], indent=1) + "\n"
        files.write_where_told(options.json, text)
    print(_text(results))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fastguard.diagnose",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Run batches through a trained model, forward and backward, and report what\n"
        "is wrong: first the verdict, with the module or the setting that is the cause and what\n"
        "to change, then a row for each layer. Recordings that training leaves out are included.",
        epilog=_EXAMPLE,
    )
    parser.add_argument(
        "checkpoint",
        type=Path,
        metavar="CHECKPOINT",
        help="a .pt or .safetensors file, or the folder of a run",
    )
    parser.add_argument("--data", metavar="SPEC", help="corpus; default: that of the run")
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument(
        "--report", type=Path, metavar="FILE", help="the batch of a bad_step_NUMBER.json"
    )
    chosen.add_argument(
        "--utterances", nargs="+", metavar="ID", help="one batch of these utterances"
    )
    chosen.add_argument(
        "--batches",
        type=_positive,
        metavar="N",
        help="the first N batches of the train split, in the order of the corpus; default 1",
    )
    parser.add_argument("--precision", choices=[*AUTOCAST], help="default: that of the run")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="also write all numbers to this file"
    )
    return parser


def _positive(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {text}")
    return int(text)


def _checkpoint(path: Path) -> Path:
    """The checkpoint at a path. Where a run kept none, the error names a learning rate that
    explains it."""
    try:
        return checkpoint.best_of(path)
    except checkpoint.CheckpointError as error:
        try:
            config = Config.from_dict(read_yaml(path / "config.yaml"))
        except (OSError, TypeError, ValueError):
            raise error from None
        model = untrained_model(config, vocab_size=2)
        for finding in excessive_rate(model, config.optim.lr):
            cause = f"{finding.kind} at {finding.where}: {finding.what}"
            raise _Failure(f"{path} has no checkpoint. {cause}; {finding.suggestion}") from None
        raise


def _run(options: argparse.Namespace) -> list[_Diagnosed]:
    path = _checkpoint(options.checkpoint)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    recognizer = Recognizer.load(path, device)
    recognizer.model.train()
    config = recognizer.config
    rows, rejected = read_rows(
        options.data or config.data, seed=config.seed, channel=config.channel, rules=config.text
    )
    known = {row.id: row for row in rows}
    ids = utterances_of(options.report, known) if options.report else options.utterances
    if ids is None:
        batches = [*_first_batches(rows, config.batch_size, options.batches or 1)]
    else:
        reasons = {row.id: f"left out ({row.reason})" for row in rejected}
        for name in ids:
            if name not in known:
                reason = reasons.get(name, "missing; choose --data")
                raise _Failure(f"utterance {name} of {options.data or config.data} is {reason}")
        batches = [[known[name] for name in ids]]
    precision = options.precision or config.precision
    bar = tqdm(batches, "diagnosing", leave=False, disable=None, unit="batch")
    return [_diagnose(recognizer, batch, precision, device) for batch in bar]


def _first_batches(rows: list[Row], size: int, count: int) -> Iterator[list[Row]]:
    train = [row for row in rows if row.split == "train"]
    if not train:
        raise _Failure("the corpus has no train split: choose --utterances, or other --data")
    for start in range(0, min(len(train), size * count), size):
        yield train[start : start + size]


def utterances_of(report: Path, known: Container[str]) -> list[str]:
    """Ids of the utterances of a bad step, or of its bad micro-batches if it names any.

    Args:
        report: a bad_step_NUMBER.json, whose batch reads ``NUMBER [ID, ID, ...]``.
        known: ids of the corpus; they show whether a comma separates ids or is part of one.
    """
    try:
        content = with_new_keys(files.read_json(report), OLD_KEYS)
        parts = content["skipped_micro_batches"] or [content]
        texts = [str(part["batch_id"]) for part in parts]
    except (AttributeError, ValueError, KeyError, TypeError) as error:
        raise _Failure(
            f"{report} is not a report on a bad step ({type(error).__name__}: {error}): give a "
            "bad_step_NUMBER.json of the folder of a run"
        ) from error
    ids = []
    for text in texts:
        _, bracket, rest = text.partition("[")
        if not bracket or not rest.endswith("]"):
            raise _Failure(f"{report} names no utterances in its batch {text!r}: give --utterances")
        ids += _split_ids(rest[:-1].split(", "), known)
    return ids


def _split_ids(pieces: list[str], known: Container[str]) -> list[str]:
    """The longest known ids that the pieces form; unknown pieces are returned unchanged."""
    ids = []
    while pieces:
        lengths = range(len(pieces), 0, -1)
        length = next((n for n in lengths if ", ".join(pieces[:n]) in known), 1)
        ids.append(", ".join(pieces[:length]))
        pieces = pieces[length:]
    return ids


def _batch(recognizer: Recognizer, rows: list[Row]) -> tuple[Batch, list[Finding]]:
    """The batch of the rows, without masks, and what is wrong with their recordings."""
    items, found = [], []
    for row in rows:
        try:
            with one_thread():
                waveform = load_audio(
                    row.audio, recognizer.log_mel.sample_rate, finite=False, part=row.part
                )
                features = recognizer.log_mel(waveform)
            tokens = torch.tensor(recognizer.tokenizer.encode(row.text))
        except (soundfile.SoundFileError, OSError, TypeError, ValueError) as error:
            raise _Failure(f"utterance {row.id} cannot be read: {error}") from error
        found += recording_problems(row.id, waveform, features)
        items.append(Item(row.id, row.text, features, tokens))
    batch = collate(items)
    return batch, found + ctc_problems(batch)


def _diagnose(recognizer: Recognizer, rows: list[Row], precision: str, device: str) -> _Diagnosed:
    batch, found = _batch(recognizer, rows)
    batch = batch.to(device)

    def loss_fn() -> torch.Tensor:
        with autocast(torch.device(device), precision):
            log_probs, lengths = recognizer.model(batch.features, batch.feature_lengths)
        return ctc_loss(log_probs, lengths, batch.targets, batch.target_lengths)

    scale = 2.0**16 if precision == "fp16" else 1.0
    while True:
        result = diagnose(
            recognizer.model,
            loss_fn,
            loss_scale=scale,
            learning_rate=recognizer.config.optim.lr,
            data_findings=found,
        )
        # Like a GradScaler: overflowing gradients are a fault only if no scale helps.
        if scale == 1 or not result.gradients_overflow:
            return _Diagnosed(batch.ids, result)
        scale /= 16


def _text(results: list[_Diagnosed]) -> str:
    """The verdict of each batch, that of the first one with a fault first, and its table."""
    shown = next((r for r in results if not r.diagnosis.healthy), results[0])
    lines = []
    for each in (shown, *(r for r in results if r is not shown)):
        lines += [each.diagnosis.verdict, f"batch [{', '.join(each.ids)}]", ""]
    if len(results) > 1:
        lines.append(f"The layers in batch [{', '.join(shown.ids)}]:")
    return "\n".join([*lines, shown.diagnosis.table])


def _plain(result: _Diagnosed) -> dict:
    return {"utterances": result.ids, **result.diagnosis.to_dict()}
