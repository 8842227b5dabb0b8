"""``python -m fastguard.evaluate``: error rates of a checkpoint, and every hypothesis in a file."""

import argparse
import dataclasses
import json
import logging
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jiwer
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from . import _options
from .checkpoint import CheckpointError, best_of
from .evaluation import LONG, Evaluation, Scored, evaluate, pooled, wer_interval
from .recognizer import Recognizer
from .speech.batching import Batch, Item, collate
from .speech.corpora import SPECS, SPLITS, Utterance, load_corpus
from .speech.features import LogMel, load_audio, one_thread
from .speech.models.ctc import CTCModel
from .speech.readers import CorpusError

_AUTOCAST = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_WORST = 10


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m fastguard.evaluate",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Word and character error rate of a checkpoint on a split of a corpus, the one "
        "it was trained on\nunless --data says otherwise. The interval is the 95 % bootstrap "
        "interval of the WER over utterances.",
        epilog=_options.LANGUAGE_MODEL_HELP
        + "\nexample:\n"
        + "  python -m fastguard.evaluate runs/teacher-20261123-140000 --split test --decoder beam",
    )
    parser.add_argument("checkpoint", type=Path, help="a .pt file, or the folder of a run")
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
        choices=tuple(_AUTOCAST),
        default="fp32",
        help="of the model; fp32 turns autocast off (default: %(default)s)",
    )
    _options.add_device_option(parser)
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="folder for hypotheses.jsonl and alignments.txt, worst first, and rates.json; what is "
        "there is replaced (default: evaluation-SPLIT-DECODER beside the checkpoint)",
    )
    _options.add_decoder_options(parser)
    args = parser.parse_args(argv)
    _options.check_decoder_options(parser, args)
    if args.batch_size < 1:
        parser.error(f"--batch-size must be at least 1, got {args.batch_size}")
    return args


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 failed, 2 wrong usage, 130 stopped by Ctrl-C."""
    args = parse(argv)
    logging.basicConfig(format="%(levelname)s - %(message)s")
    try:
        path = best_of(args.checkpoint)
        recognizer = Recognizer.load(path, args.device)
        decode = _options.decoder(args, recognizer.tokenizer)
        folder = args.output or path.parent / f"evaluation-{args.split}-{args.decoder}"
        data = args.data or recognizer.config.data
        utterances = load_split(data, args.split, recognizer)
        folder.mkdir(parents=True, exist_ok=True)
        found = evaluate(
            partial(_forward, recognizer, args.device, args.precision),
            evaluation_loader(utterances, recognizer.log_mel, args.batch_size),
            recognizer.tokenizer,
            decode,
            durations={u.id: u.duration for u in utterances},
            progress=f"evaluating {args.split}",
        )
        print(f"checkpoint  {path}\ndata        {data}, {args.split}")
        print(f"decoding    {_options.decoder_name(args)}, {args.precision}\n")
        print(table(found))
        write(folder, found)
        print(f"\n{worst_table(found)}\n\nAll hypotheses and their alignments are in {folder}")
    except (CheckpointError, CorpusError, _options.DecoderError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def load_split(data: str, split: str, recognizer: Recognizer) -> list[Utterance]:
    """The utterances that a training with these settings would have in this split; or in "all".

    Raises CorpusError if there are none.
    """
    config = recognizer.config
    corpus = load_corpus(
        data,
        max_duration=config.max_duration,
        seed=config.seed,
        max_output_length=lambda s: CTCModel.output_lengths(recognizer.log_mel.num_frames_of(s)),
        needed=SPLITS if split == "all" else (split,),
    )
    return corpus.utterances if split == "all" else corpus.split(split)


class _Recordings(Dataset[Item]):
    """Without targets: a reference may have characters that the tokenizer lacks."""

    def __init__(self, utterances: Sequence[Utterance], log_mel: LogMel) -> None:
        self.utterances = utterances
        self.log_mel = log_mel

    def __len__(self) -> int:
        return len(self.utterances)

    def __getitem__(self, index: int) -> Item:
        utterance = self.utterances[index]
        with one_thread():
            features = self.log_mel(load_audio(utterance.audio, self.log_mel.sample_rate))
        return Item(utterance.id, utterance.text, features, torch.empty(0, dtype=torch.int64))


def evaluation_loader(
    utterances: Sequence[Utterance], log_mel: LogMel, batch_size: int
) -> DataLoader:
    """Each utterance once, in batches of similar duration, the shortest first."""
    order = sorted(range(len(utterances)), key=lambda index: utterances[index].duration)
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    return DataLoader(_Recordings(utterances, log_mel), batch_sampler=batches, collate_fn=collate)


def _forward(recognizer: Recognizer, device: torch.device, precision: str, batch: Batch):
    dtype = _AUTOCAST[precision]
    with torch.autocast(device.type, dtype, enabled=precision != "fp32"):
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


def write(folder: Path, found: Evaluation) -> None:
    """hypotheses.jsonl, alignments.txt and rates.json, utterances with most errors first."""
    rows = found.worst()
    with (folder / "hypotheses.jsonl").open("w", encoding="utf-8") as file:
        for row in rows:
            values = {**dataclasses.asdict(row), "wer": row.wer, "cer": row.cer}
            print(json.dumps(values, ensure_ascii=False), file=file)
    with (folder / "alignments.txt").open("w", encoding="utf-8") as file:
        for row in tqdm(rows, "aligning", leave=False, delay=1, disable=not sys.stderr.isatty()):
            file.write(f"{row.id}: {row.errors} errors in {row.words} words\n{alignment(row)}\n")
    summary = {
        "utterances": len(rows),
        "minutes": found.seconds / 60,
        **dataclasses.asdict(found.rates),
        "wer_interval": wer_interval(found.rows),
        "nonfinite": [row.id for row in rows if not row.finite],
    }
    (folder / "rates.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")


def alignment(row: Scored) -> str:
    """Three lines: the reference, the hypothesis under it, and S, D or I under each error."""
    words = jiwer.process_words(row.reference, row.hypothesis)
    text = jiwer.visualize_alignment(words, show_measures=False, skip_correct=False)
    return text[text.index("REF:") :].rstrip("\n") + "\n"


if __name__ == "__main__":
    sys.exit(main())
