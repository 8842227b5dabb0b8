"""``python -m fastguard.transcribe``: recordings to text, or to JSON with times."""

import argparse
import json
import os
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

from tqdm import tqdm

from fastguard._command import check_words, exit_status
from fastguard._io import terminal
from fastguard.speech.data.containers import SUFFIXES
from fastguard.speech.recognition.recognizer import Recognizer
from fastguard.speech.recognition.transcription import Transcript, TranscriptionError, transcribe
from fastguard.speech.storage.checkpoint import CheckpointError, best_of

from . import recognition_options

_NAMED, _KINDS = 3, 8  # ignored files, and extensions of ignored files, that are named
# Formats of recorders and of the web that libsndfile does not read, or not to the end.
_OTHER_RECORDINGS = (
    *(".3gp", ".aac", ".ac3", ".amr", ".ape", ".avi", ".avr", ".dts", ".gsm", ".m4a", ".m4b"),
    *(
        ".mka",
        ".mkv",
        ".mov",
        ".mp4",
        ".ra",
        ".raw",
        ".voc",
        ".vox",
        ".weba",
        ".webm",
        ".wma",
        ".wv",
    ),
)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options of the command; wrong ones end the program with exit status 2."""
    parser = argparse.ArgumentParser(
        prog="python -m fastguard.transcribe",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Transcribe recordings of any length, rate and number of channels. For one\n"
        "file the text is printed, for several a line each: file, tab, text. Files that\n"
        "cannot be read are named on stderr, and the exit status is 1.",
        epilog=recognition_options.LANGUAGE_MODEL_HELP
        + "\nexample:\n"
        + "  python -m fastguard.transcribe --checkpoint runs/my --json call.wav lectures/",
    )
    parser.add_argument(
        "files",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="recordings, or folders, whose recordings are found recursively",
    )
    parser.add_argument(
        "--checkpoint",
        type=Path,
        metavar="PATH",
        help="a .pt or .safetensors file, or the folder of a run (default: the newest run in "
        "runs/)",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print one object per line: file, duration, text, and words with start and end in "
        "seconds and confidence, the mean probability of the tokens of the word",
    )
    recognition_options.add_device_option(parser)
    recognition_options.add_decoder_options(parser)
    check_words(parser, argv)
    args = parser.parse_args(argv)
    recognition_options.check_decoder_options(parser, args)
    return args


@terminal.command
def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 something failed, 2 wrong usage, 130 stopped by Ctrl-C."""
    args = parse(argv)
    failures = CheckpointError, recognition_options.DecoderError, OSError
    return exit_status(lambda: _transcribe(args), *failures)


def _transcribe(args: argparse.Namespace) -> int:
    path = best_of(args.checkpoint or _newest_run())
    recognizer = Recognizer.load(path, args.device)
    if args.checkpoint is None:
        print(f"checkpoint: {path}", file=sys.stderr)
    decode = recognition_options.decoder(args, recognizer.tokenizer, recognizer.config.text)
    return _transcribe_all(args, recognizer, decode)


def _newest_run() -> Path:
    found = [path for name in ("best.pt", "last.pt") for path in Path("runs").glob(f"*/{name}")]
    if not found:
        raise CheckpointError("runs/ has no run: give --checkpoint")
    return max(found, key=lambda path: path.stat().st_mtime).parent


def _transcribe_all(args: argparse.Namespace, recognizer: Recognizer, decode) -> int:
    passed_over: list[Path] = []
    files, failed = list(recordings(args.files, passed_over)), False
    for line in passed_over_lines(passed_over):
        print(line, file=sys.stderr)
    alone = len(files) == 1 and not args.files[0].is_dir()
    hidden = not sys.stderr.isatty() or alone
    for file in tqdm(files, "transcribing", leave=False, disable=hidden, unit="file"):
        try:
            found = transcribe(recognizer, file, decode)
        except TranscriptionError as error:
            print(f"error: {_shown(file)}: {terminal.one_line(str(error))}", file=sys.stderr)
            failed = True
            continue
        print(_line(file, found, args.json, alone), flush=True)
    if not files:
        print("error: the arguments have no recordings", file=sys.stderr)
    return int(failed or not files)


def recordings(paths: Iterable[Path], passed_over: list[Path]) -> Iterator[Path]:
    """The files, and the recordings in each folder, sorted by name. Other files, and folders that
    cannot be listed, are added to ``passed_over``. Links to folders are not followed."""
    for path in paths:
        if not path.is_dir():
            yield path
            continue
        found = []
        failed = lambda error: passed_over.append(Path(error.filename))  # noqa: E731
        for folder, _, names in os.walk(path, onerror=failed):
            found += [Path(folder, name) for name in names]
        for file in sorted(found):
            if file.suffix.lower() in SUFFIXES:
                yield file
            else:
                passed_over.append(file)


def passed_over_lines(files: list[Path]) -> Iterator[str]:
    """A line for each extension of recordings, and one for all other files."""
    kinds = defaultdict(list)
    for file in files:
        kinds[file.suffix.lower()].append(file)
    ordered = sorted(kinds.items(), key=lambda item: (-len(item[1]), item[0]))
    others = [(suffix, found) for suffix, found in ordered if suffix not in _OTHER_RECORDINGS]
    for suffix, found in ordered:
        if suffix in _OTHER_RECORDINGS:
            yield (
                f"ignored: {len(found)} {suffix} ({_first_names(found)}), which cannot be "
                f"read: convert them, ffmpeg -i FILE{suffix} FILE.wav"
            )
    if others:
        counts = ", ".join(
            f"{len(found)} {_shown(Path(suffix)) if suffix else 'without an extension'}"
            for suffix, found in others[:_KINDS]
        )
        more = ", ..." if len(others) > _KINDS else ""
        everything = [file for _, found in others for file in found]
        yield (
            f"ignored: {len(everything)} other files, by extension {counts}{more} "
            f"({_first_names(everything)})"
        )


def _first_names(files: list[Path]) -> str:
    names = ", ".join(_shown(file) for file in files[:_NAMED])
    return names + (", ..." if len(files) > _NAMED else "")


def _line(file: Path, found: Transcript, as_json: bool, alone: bool) -> str:
    if not as_json:
        return found.text if alone else f"{_shown(file)}\t{found.text}"
    words = [
        {key: round(value, 3) if key != "word" else value for key, value in vars(word).items()}
        for word in found.words
    ]
    values = {"file": str(file), "duration": found.duration, "text": found.text, "words": words}
    # Bytes of a file name that are not UTF-8 become \udcXX, as in Python.
    return json.dumps(values, ensure_ascii=False).encode("utf-8", "backslashreplace").decode()


def _shown(file: Path) -> str:
    """The name, for a field of a line: a tab or a newline in it is escaped."""
    name = str(file)
    return name if name.isprintable() else ascii(name)
