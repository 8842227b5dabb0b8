"""Command-line options of recognition, shared by evaluate and transcribe."""

import argparse
import math
from pathlib import Path

import torch

from fastguard.speech.data.text import TextRules
from fastguard.speech.data.tokenizer import Tokenizer
from fastguard.speech.recognition.decoding import BeamSearch, Decode, greedy_decode

LANGUAGE_MODEL_HELP = """\
language models are made with lmplz of KenLM, for example over characters and
over words:
  sed 's/ /|/g; s/./& /g' text.txt |
    lmplz -o 6 --discount_fallback > characters.arpa
  lmplz -o 3 < text.txt > words.arpa
  tr ' ' '\\n' < text.txt | sort -u > words.txt
"""


class DecoderError(RuntimeError):
    """The requested decoder cannot be built; the message says why."""


def add_decoder_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of decoding."""
    group = parser.add_argument_group("decoding")
    group.add_argument(
        "--decoder",
        choices=("greedy", "beam"),
        default="greedy",
        help="greedy: the most likely path; beam: CTC prefix beam search, needs "
        "`pip install 'torch-fastguard[beam]'` (default: %(default)s)",
    )
    group.add_argument(
        "--beam-size",
        type=int,
        metavar="N",
        help="hypotheses that the beam search keeps (default: 50)",
    )
    group.add_argument(
        "--lm",
        type=Path,
        metavar="FILE",
        help="n-gram language model over tokens, or with --lexicon over words; an ARPA file; "
        "see below",
    )
    group.add_argument(
        "--lm-binary",
        action="store_true",
        default=None,
        help="the file of --lm is a binary file of KenLM, which is not checked: a damaged or "
        "hostile one crashes the program (default: it is an ARPA file)",
    )
    group.add_argument(
        "--lexicon",
        type=Path,
        metavar="FILE",
        help="file with a word at the start of each line; no other words are recognised",
    )
    group.add_argument(
        "--lm-weight",
        type=_finite,
        metavar="X",
        help="nats per decade of the language model's probability (default: 1)",
    )
    group.add_argument(
        "--word-score",
        type=_finite,
        metavar="X",
        help="added to the score for each word; above 0 gives more words (default: 0)",
    )


def _finite(text: str) -> float:
    """A finite number: with NaN as a score, the beam search finds nothing."""
    if not math.isfinite(number := float(text)):
        raise argparse.ArgumentTypeError(f"must be finite, got {text}")
    return number


def check_decoder_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End the program with a message if options contradict each other."""
    for name, needed, there in (
        ("beam_size", "--decoder beam", args.decoder == "beam"),
        ("lm", "--decoder beam", args.decoder == "beam"),
        ("lexicon", "--decoder beam", args.decoder == "beam"),
        ("lm_weight", "--lm FILE", args.lm is not None),
        ("lm_binary", "--lm FILE", args.lm is not None),
        ("word_score", "--lexicon FILE", args.lexicon is not None),
    ):
        if getattr(args, name) is not None and not there:
            parser.error(f"--{name.replace('_', '-')} needs {needed}")
    if args.beam_size is not None and args.beam_size < 1:
        parser.error(f"--beam-size must be at least 1, got {args.beam_size}")


def decoder(args: argparse.Namespace, tokenizer: Tokenizer, rules: TextRules) -> Decode:
    """The decoder of the options; the ``rules`` of the model spell the words of a lexicon.

    Raises:
        DecoderError: a file cannot be used.
        MissingExtra: flashlight-text is not installed.
    """
    if args.decoder == "greedy":
        return greedy_decode
    names = ("beam_size", "lm", "lm_binary", "lexicon", "lm_weight", "word_score")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    try:
        return BeamSearch(tokenizer, rules=rules, **given)
    except ValueError as error:
        raise DecoderError(str(error)) from error


def decoder_name(args: argparse.Namespace) -> str:
    """The decoding in words: greedy, or beam with the given files and sizes."""
    if args.decoder == "greedy":
        return "greedy"
    names = ("beam_size", "lm", "lexicon", "lm_weight", "word_score")
    given = [f"{name} {getattr(args, name)}" for name in names if getattr(args, name) is not None]
    return ", ".join(["beam", *given])


def add_device_option(parser: argparse.ArgumentParser) -> None:
    """Add the option --device."""
    parser.add_argument(
        "--device",
        type=device,
        default="auto",
        help="auto, cpu, cuda or cuda:N; auto is cuda if available (default: %(default)s)",
    )


def device(text: str) -> torch.device:
    """The device of the option; raises ArgumentTypeError if it does not exist."""
    if text == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(text)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(str(error).splitlines()[0]) from None
    if found.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"must be auto, cpu or cuda, got {text}")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(
            f"{text} does not exist: {torch.cuda.device_count()} CUDA devices found"
        )
    return found
