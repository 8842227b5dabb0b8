"""``python -m fastguard.transcribe``: recordings to text, or to JSON with times."""

import argparse
import os
import shutil
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from fastguard._command import check_words, exit_status
from fastguard._io import terminal
from fastguard.speech.data import containers, ffmpeg
from fastguard.speech.data.audio import open_recording
from fastguard.speech.data.part import CHANNELS, Part
from fastguard.speech.data.recording import AudioError, shown_path
from fastguard.speech.recognition.recognizer import Recognizer
from fastguard.speech.recognition.transcription import TranscriptionError, transcribe
from fastguard.speech.storage.checkpoint import CheckpointError, best_of

from . import recognition_options, streaming
from .transcripts import ONE_EACH, SUFFIXES, Transcripts, shown_name

_NAMED, _KINDS = 3, 8  # ignored files, and extensions of ignored files, that are named
# Formats of recorders whose length or encoding is not known from the file.
_UNREADABLE = (".avr", ".raw", ".vox")


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
        help="recordings, folders, whose recordings are found recursively, or - for a recording "
        "on standard input; m4a, aac, webm, wma, amr and videos need the program ffmpeg",
    )
    parser.add_argument(
        "--checkpoint",
        type=Path,
        metavar="PATH",
        help="a .pt or .safetensors file, or the folder of a run (default: the newest run in "
        "runs/)",
    )
    parser.add_argument(
        "--format",
        choices=SUFFIXES,
        default="text",
        help="text; json: one object per line with file, duration, text, and words with start and "
        "end in seconds and confidence, the mean probability of the tokens of the word; srt, vtt: "
        "subtitles; ctm: a line for each word with recording, channel, start, duration in seconds, "
        "word and confidence (default: %(default)s)",
    )
    parser.add_argument(
        "--json",
        dest="format",
        action="store_const",
        const="json",
        help="the same as --format json",
    )
    parser.add_argument(
        "--output-dir",
        type=Path,
        metavar="DIR",
        help="write a file for each recording, or for each channel, into this folder (default: "
        "print; srt and vtt of several recordings need the folder)",
    )
    parser.add_argument(
        "--channel",
        choices=(*CHANNELS, "each"),
        help="mix: the mean of all channels, or the loudest of those that cancel; left, right: one "
        "of them; each: a line for each channel, with its number from 0 (default: as in training)",
    )
    parser.add_argument(
        "--window",
        type=_window,
        default=20.0,
        metavar="SECONDS",
        help="what the model gets at once; 2 s at either end are context (default: %(default)g)",
    )
    parser.add_argument(
        "--no-vad",
        dest="vad",
        action="store_false",
        help="recognise everything, also what Silero VAD takes for no speech (default: silence, "
        "tones and noise give no words)",
    )
    recognition_options.add_device_option(parser)
    recognition_options.add_decoder_options(parser)
    streaming.add_options(parser)
    check_words(parser, argv)
    args = parser.parse_args(argv)
    recognition_options.check_decoder_options(parser, args)
    streaming.check_options(parser, args)
    if (times := args.files.count(streaming.STDIN)) > 1:
        parser.error(f"- is given {times} times: standard input is read once")
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
    run = streaming.transcribe_stream if args.streaming else _transcribe_all
    return run(args, recognizer, decode)


def _window(text: str) -> float:
    """The option --window; under 5 s little is left beside the context of 4 s."""
    if not 5 <= (seconds := float(text)) <= 600:
        raise argparse.ArgumentTypeError(f"must be between 5 and 600 seconds, got {text}")
    return seconds


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
    chosen = args.channel or recognizer.config.channel
    if args.format in ONE_EACH and args.output_dir is None and (not alone or chosen == "each"):
        print(
            f"error: {args.format} of several recordings needs files: add --output-dir DIR",
            file=sys.stderr,
        )
        return 2
    output = Transcripts(args.format, args.output_dir, alone)
    for file in tqdm(files, "transcribing", leave=False, disable=hidden, unit="file"):
        try:
            with _on_disk(file) as path:
                for part in _parts(path, chosen):
                    with _progress(shown=alone) as progress:
                        found = transcribe(
                            recognizer, path, decode, args.window, part, args.vad, progress
                        )
                    output.add(file, found, part.channel if chosen == "each" else None)
        except (AudioError, TranscriptionError) as error:
            print(f"error: {shown_name(file)}: {terminal.one_line(str(error))}", file=sys.stderr)
            failed = True
    if not files:
        print("error: the arguments have no recordings", file=sys.stderr)
    return int(failed or not files)


@contextmanager
def _progress(shown: bool) -> Iterator[Callable[[float, float | None], None]]:
    """A bar of the seconds of one recording, on a terminal."""
    disable = not (shown and sys.stderr.isatty())
    form = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} s [{elapsed}<{remaining}]"
    with tqdm(desc="transcribing", leave=False, disable=disable, unit="s") as bar:

        def progress(done: float, total: float | None) -> None:
            if total is not None and bar.total is None and not disable:
                bar.total, bar.bar_format = total, form
            bar.update(done - bar.n)

        yield progress


@contextmanager
def _on_disk(file: Path) -> Iterator[Path]:
    """The file; for - a temporary copy of standard input, which is read to its end: the length of
    a recording is checked before its samples are used.

    Raises:
        AudioError, TranscriptionError: as the body, and where standard input is a terminal.
    """
    if file != streaming.STDIN:
        yield file
        return
    if sys.stdin is None or sys.stdin.isatty():
        raise TranscriptionError("standard input is a terminal: write a recording to it by |")
    with tempfile.TemporaryDirectory(prefix="fastguard-") as folder:
        path = Path(folder, "stdin")
        with path.open("wb") as copy:
            shutil.copyfileobj(sys.stdin.buffer, copy)
        try:
            yield path
        except (AudioError, TranscriptionError) as error:
            raise TranscriptionError(str(error).replace(shown_path(path), "it")) from error


def _parts(path: Path, channel: str) -> list[Part]:
    """What is transcribed of a recording, one after the other; raises AudioError."""
    if channel != "each":
        return [Part(channel=CHANNELS[channel])]
    with open_recording(path) as file:
        return [Part(channel=number) for number in range(file.channels)]


def recordings(paths: Iterable[Path], passed_over: list[Path]) -> Iterator[Path]:
    """The files, and the recordings in each folder, sorted by name. Other files, and folders that
    cannot be listed, are added to ``passed_over``. Links to folders are not followed."""
    suffixes = (*containers.SUFFIXES, *(ffmpeg.SUFFIXES if ffmpeg.available() else ()))
    for path in paths:
        if not path.is_dir():
            yield path
            continue
        found = []
        failed = lambda error: passed_over.append(Path(error.filename))  # noqa: E731
        for folder, _, names in os.walk(path, onerror=failed):
            found += [Path(folder, name) for name in names]
        for file in sorted(found):
            if file.suffix.lower() in suffixes:
                yield file
            else:
                passed_over.append(file)


def passed_over_lines(files: list[Path]) -> Iterator[str]:
    """A line for each extension of recordings, and one for all other files."""
    kinds = defaultdict(list)
    for file in files:
        kinds[file.suffix.lower()].append(file)
    ordered = sorted(kinds.items(), key=lambda item: (-len(item[1]), item[0]))
    known = (*ffmpeg.SUFFIXES, *_UNREADABLE)
    others = [(suffix, found) for suffix, found in ordered if suffix not in known]
    for suffix, found in ordered:
        ignored = f"ignored: {len(found)} {suffix} ({_first_names(found)}), which"
        if suffix in ffmpeg.SUFFIXES and not ffmpeg.available():
            yield f"{ignored} need the program ffmpeg: {ffmpeg.INSTALL}"
        elif suffix in known:
            yield f"{ignored} cannot be read: convert them, ffmpeg -i FILE{suffix} FILE.wav"
    if others:
        counts = ", ".join(
            f"{len(found)} {shown_name(Path(suffix)) if suffix else 'without an extension'}"
            for suffix, found in others[:_KINDS]
        )
        more = ", ..." if len(others) > _KINDS else ""
        everything = [file for _, found in others for file in found]
        yield (
            f"ignored: {len(everything)} other files, by extension {counts}{more} "
            f"({_first_names(everything)})"
        )


def _first_names(files: list[Path]) -> str:
    names = ", ".join(shown_name(file) for file in files[:_NAMED])
    return names + (", ..." if len(files) > _NAMED else "")
