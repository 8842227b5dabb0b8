"""``python -m fastguard.evaluate``: error rates of a checkpoint, and every hypothesis in a file."""

import argparse
import logging
import sys
from functools import partial
from pathlib import Path

import torch

from . import _command
from .checkpoint import CheckpointError, best_of
from .data import evaluation_loader
from .evaluation import LONG, Evaluation, evaluate, pooled, wer_interval, write
from .precision import AUTOCAST, autocast
from .recognizer import Recognizer
from .speech.batching import Batch
from .speech.corpora import SPECS, SPLITS, load_corpus
from .speech.readers import CorpusError
from .speech.utterances import Utterances

_WORST = 10


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m fastguard.evaluate",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Word and character error rate of a checkpoint on a split of a corpus, the\n"
        "one it was trained on unless --data says otherwise. The interval is the 95 %\n"
        "bootstrap interval of the WER over utterances.",
        epilog=_command.LANGUAGE_MODEL_HELP
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
        help="what to recognise (default: %(default)s)",
    )
    parser.add_argument(
        "--batch-size", type=int, default=8, metavar="N", help="utterances (default: %(default)s)"
    )
    parser.add_argument(
        "--precision",
        choices=tuple(AUTOCAST),
        default="fp32",
        help="of the model; fp32 turns autocast off (default: %(default)s)",
    )
    _command.add_device_option(parser)
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="folder for hypotheses.jsonl and alignments.txt, worst first, and rates.json; what is "
        "there is replaced (default: evaluation-SPLIT-DECODER beside the checkpoint)",
    )
    _command.add_decoder_options(parser)
    args = parser.parse_args(argv)
    _command.check_decoder_options(parser, args)
    if args.batch_size < 1:
        parser.error(f"--batch-size must be at least 1, got {args.batch_size}")
    return args


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 failed, 2 wrong usage, 130 stopped by Ctrl-C."""
    args = parse(argv)
    logging.basicConfig(format="%(levelname)s - %(message)s")
    failures = CheckpointError, CorpusError, _command.DecoderError, OSError
    return _command.exit_status(lambda: _evaluate(args), *failures)


def _evaluate(args: argparse.Namespace) -> None:
    path = best_of(args.checkpoint)
    recognizer = Recognizer.load(path, args.device)
    decode = _command.decoder(args, recognizer.tokenizer)
    folder = args.output or path.parent / f"evaluation-{args.split}-{args.decoder}"
    data = args.data or recognizer.config.data
    utterances = load_split(data, args.split, recognizer)
    folder.mkdir(parents=True, exist_ok=True)
    found = evaluate(
        partial(_forward, recognizer, args.device, args.precision),
        evaluation_loader(
            utterances,
            recognizer.log_mel,
            batch_size=args.batch_size,
            max_duration=recognizer.config.max_duration,
        ),
        recognizer.tokenizer,
        decode,
        durations={u.id: u.duration for u in utterances},
        progress=f"evaluating {args.split}",
    )
    write(folder, found)
    print(f"checkpoint  {path}\ndata        {data}, {args.split}")
    print(f"decoding    {_command.decoder_name(args)}, {args.precision}\n")
    print(table(found))
    print(f"\n{worst_table(found)}\n\nAll hypotheses and their alignments are in {folder}")


def load_split(data: str, split: str, recognizer: Recognizer) -> Utterances:
    """The utterances that a training with these settings would have in this split; or in "all".

    Raises CorpusError if there are none.
    """
    config = recognizer.config
    corpus = load_corpus(
        data,
        max_duration=config.max_duration,
        seed=config.seed,
        needed=SPLITS if split == "all" else (split,),
    )
    return corpus.utterances if split == "all" else corpus.split(split)


def _forward(recognizer: Recognizer, device: torch.device, precision: str, batch: Batch):
    with autocast(device, precision):
        return recognizer(batch.features.to(device), batch.feature_lengths.to(device))


# --- what is told -------------------------------------------------------------------------------


def table(found: Evaluation) -> str:
    """The error rates of all utterances and of the long ones."""
    row = "{:<20}{:>8}{:>18}{:>8}{:>12}{:>8}{:>9}{:>6}{:>6}{:>6}".format
    lines = [
        row(
            "", "WER", "95 % interval", "CER", "utterances", "words", "minutes", "sub", "del", "ins"
        )
    ]
    for name, rows in (("all", found.rows), (f"{LONG} words and more", found.long_rows)):
        if rows:
            rates = pooled(rows)
            low, high = wer_interval(rows)
            minutes = sum(r.duration or 0.0 for r in rows) / 60
            lines.append(
                row(
                    name,
                    f"{rates.wer:.3f}",
                    f"{low:.3f} to {high:.3f}",
                    f"{rates.cer:.3f}",
                    len(rows),
                    rates.words,
                    f"{minutes:.1f}",
                    rates.substitutions,
                    rates.deletions,
                    rates.insertions,
                )
            )
    return "\n".join(lines)


def worst_table(found: Evaluation) -> str:
    """The utterances with most word errors, reference above hypothesis."""
    lines = [f"Most errors (of {len(found.rows)} utterances):"]
    for row in found.worst(_WORST):
        lines += [
            f"{row.errors} of {row.words} words  {row.id}",
            f"    REF {row.reference}",
            f"    HYP {row.hypothesis}",
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
