"""``python -m fastguard.evaluate``: error rates and hypotheses of a checkpoint."""

import argparse
import contextlib
import logging
from functools import partial
from pathlib import Path
from typing import TextIO

import torch

from fastguard._command import check_words, exit_status
from fastguard._io import files, terminal
from fastguard._table import aligned
from fastguard.speech.data.batching import Batch
from fastguard.speech.data.corpora import SPLITS, Corpus, load_corpus
from fastguard.speech.data.part import CHANNELS
from fastguard.speech.data.readers import CorpusError, Rejected
from fastguard.speech.data.specs import SPECS
from fastguard.speech.recognition.decoding import Decode
from fastguard.speech.recognition.evaluation import (
    LONG,
    Evaluation,
    evaluate,
    pooled,
    wer_interval,
    write,
)
from fastguard.speech.recognition.recognizer import Recognizer
from fastguard.speech.storage.checkpoint import CheckpointError, best_of
from fastguard.speech.training.data import evaluation_loader, listing
from fastguard.speech.training.precision import AUTOCAST, autocast

from . import recognition_options

logger = logging.getLogger(__name__)

_UNSPLIT = (
    "%d rows of %s name no split: %s has only those whose texts training would put there; "
    "--split all evaluates all rows"
)
_WORST = 10
_NAMED = 3  # rows that could not be used, for each reason
# Shortest and longest recording in seconds; the longest bounds the memory.
_SHORTEST, _LONGEST = 0.001, 3600.0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options of the command; wrong ones end the program with exit status 2."""
    parser = argparse.ArgumentParser(
        prog="python -m fastguard.evaluate",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Word and character error rate of a checkpoint on a split of a corpus: the\n"
        "corpus of the training, or that of --data. The interval is the 95 % bootstrap\n"
        "interval of the WER over utterances.",
        epilog=recognition_options.LANGUAGE_MODEL_HELP
        + "\nexample:\n"
        + "  python -m fastguard.evaluate runs/my-run --split test --decoder beam",
    )
    parser.add_argument(
        "checkpoint", type=Path, help="a .pt or .safetensors file, or the folder of a run"
    )
    parser.add_argument("--data", metavar="SPEC", help=f"{SPECS} (default: as in training)")
    parser.add_argument(
        "--split",
        choices=(*SPLITS, "all"),
        default="dev",
        help="split to recognise (default: %(default)s)",
    )
    parser.add_argument(
        "--channel",
        choices=tuple(CHANNELS),
        help="channel of each recording: the mean of all, or one (default: as in training)",
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        default=8,
        metavar="N",
        help="utterances per batch (default: %(default)s)",
    )
    parser.add_argument(
        "--precision",
        choices=tuple(AUTOCAST),
        default="fp32",
        help="precision of the model; fp32 turns autocast off (default: %(default)s)",
    )
    recognition_options.add_device_option(parser)
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="folder for hypotheses.jsonl and alignments.txt, worst first, rates.json, "
        "left_out.jsonl and changed_labels.jsonl; existing files are replaced (default: "
        "evaluation-SPLIT-DECODER beside the checkpoint)",
    )
    recognition_options.add_decoder_options(parser)
    check_words(parser, argv)
    args = parser.parse_args(argv)
    recognition_options.check_decoder_options(parser, args)
    if args.batch_size < 1:
        parser.error(f"--batch-size must be at least 1, got {args.batch_size}")
    return args


@terminal.command
def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 failed, 2 wrong usage, 130 stopped by Ctrl-C."""
    args = parse(argv)
    logging.basicConfig(format="%(levelname)s - %(message)s")
    failures = CheckpointError, CorpusError, recognition_options.DecoderError, OSError
    return exit_status(lambda: _evaluate(args), *failures)


def _evaluate(args: argparse.Namespace) -> None:
    path = best_of(args.checkpoint)
    recognizer = Recognizer.load(path, args.device)
    decode = recognition_options.decoder(args, recognizer.tokenizer, recognizer.config.text)
    folder = args.output or path.parent / f"evaluation-{args.split}-{args.decoder}"
    data = args.data or recognizer.config.data
    files.make_folder(folder, named=args.output is not None)
    with contextlib.ExitStack() as results:  # the files get their names when all are written
        changed = results.enter_context(listing(folder, "changed_labels.jsonl"))
        corpus = load_split(data, args.split, recognizer, changed, args.channel)
        if data != recognizer.config.data and args.split != "all" and corpus.unsplit:
            logger.warning(_UNSPLIT, corpus.unsplit, terminal.one_line(data), args.split)
        found = _recognised(args, recognizer, decode, corpus)
        left_out = results.enter_context(listing(folder, "left_out.jsonl"))
        corpus.write_left_out(left_out)
        for listed in (changed, left_out):
            listed.flush()  # a full disk is an error before anything is replaced
        write(folder, found)
    print(f"checkpoint  {path}\ndata        {data}, {args.split}")
    print(f"decoding    {recognition_options.decoder_name(args)}, {args.precision}\n")
    print(table(found))
    print(unused(corpus.rejected))
    print(f"\n{worst_table(found)}\n\nAll hypotheses and their alignments are in {folder}")


def _recognised(
    args: argparse.Namespace, recognizer: Recognizer, decode: Decode, corpus: Corpus
) -> Evaluation:
    """Evaluate the split of the options. Unusable recordings are added to ``corpus.rejected``."""
    utterances = corpus.utterances if args.split == "all" else corpus.split(args.split)
    # A recording longer than those of the training is its own batch.
    usual = recognizer.config.max_duration
    return evaluate(
        partial(_forward, recognizer, args.device, args.precision),
        evaluation_loader(
            utterances,
            recognizer.log_mel,
            batch_size=args.batch_size,
            batch_duration=args.batch_size * usual if utterances.durations.max() > usual else None,
            min_duration=_SHORTEST,
            max_duration=_LONGEST,
        ),
        recognizer.tokenizer,
        decode,
        durations={u.id: u.duration for u in utterances},
        progress=f"evaluating {args.split}",
        rejected=corpus.rejected,
    )


def load_split(
    data: str,
    split: str,
    recognizer: Recognizer,
    changed: TextIO | None = None,
    channel: str | None = None,
) -> Corpus:
    """A corpus, split as in training, with every row that can be recognised: neither its duration
    nor an empty text leaves a row out.

    Args:
        data: spec of the corpus.
        split: of SPLITS, or "all".
        recognizer: gives the settings.
        changed: as in load_corpus.
        channel: as in load_corpus; by default that of the settings.

    Raises:
        CorpusError: the split is empty.
    """
    config = recognizer.config
    wanted = SPLITS if split == "all" else (split,)
    corpus = load_corpus(
        data,
        min_duration=_SHORTEST,
        max_duration=_LONGEST,
        seed=config.seed,
        channel=channel or config.channel,
        needed=SPLITS,
        rules=config.text,
        silent=True,
        changed=changed,
    )
    if corpus.unsplit and not any(map(corpus.split, wanted)):
        raise CorpusError(
            f"no usable row in the split {split}: {corpus.unsplit} rows of {data} name no split, "
            "and their texts gave them others; --split all evaluates all rows; "
            + corpus.summary("; ")
        )
    return corpus.with_something_in(wanted)


def _forward(recognizer: Recognizer, device: torch.device, precision: str, batch: Batch):
    with autocast(device, precision):
        return recognizer(batch.features.to(device), batch.feature_lengths.to(device))


# --- output -------------------------------------------------------------------------------


def unused(rejected: list[Rejected]) -> str:
    """A line for each reason why rows could not be used; "" if there are none."""
    kinds: dict[str, list[Rejected]] = {}
    for row in rejected:
        kinds.setdefault(row.kind, []).append(row)
    lines = [""] if rejected else []
    for rows in sorted(kinds.values(), key=len, reverse=True):
        names = ", ".join(row.id for row in rows[:_NAMED]) + (", ..." if len(rows) > _NAMED else "")
        lines.append(f"not used: {len(rows)} of the corpus: {names} ({rows[0].reason})")
    return "\n".join(lines)


def table(found: Evaluation) -> str:
    """The error rates of all utterances and of the long ones."""
    rates_of = ["WER", "95 % interval", "CER"]
    lines = [["", *rates_of, "utterances", "words", "minutes", "sub", "del", "ins"]]
    for name, rows in (("all", found.rows), (f"{LONG} words and more", found.long_rows)):
        if rows:
            rates = pooled(rows)
            low, high = wer_interval(rows)
            minutes = sum(r.duration or 0.0 for r in rows) / 60
            numbers = [f"{rates.wer:.3f}", f"{low:.3f} to {high:.3f}", f"{rates.cer:.3f}"]
            numbers += [str(len(rows)), str(rates.words), f"{minutes:.1f}"]
            errors = rates.substitutions, rates.deletions, rates.insertions
            lines.append([name, *numbers, *map(str, errors)])
    return "\n".join(aligned(lines))


def worst_table(found: Evaluation) -> str:
    """The utterances with the most word errors, reference above hypothesis."""
    lines = [f"Most errors (of {len(found.rows)} utterances):"]
    for row in found.worst(_WORST):
        lines += [
            f"{row.errors} of {row.words} words  {row.id}",
            f"    REF {row.reference}",
            f"    HYP {row.hypothesis}",
        ]
    return "\n".join(lines)
