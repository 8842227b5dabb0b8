"""``python -m fastguard.transcribe --streaming``: text while the samples come in."""

import argparse
import math
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from fastguard._io import terminal
from fastguard.speech.data.audio import open_recording
from fastguard.speech.data.live import LiveSamples
from fastguard.speech.data.part import CHANNELS, Part
from fastguard.speech.data.recording import AudioError, Recording
from fastguard.speech.recognition.alignment import Word
from fastguard.speech.recognition.decoding import Decode
from fastguard.speech.recognition.recognizer import Recognizer
from fastguard.speech.recognition.transcription import Transcriber, TranscriptionError

from .transcripts import as_json, shown_name

STDIN = Path("-")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of streaming."""
    group = parser.add_argument_group("streaming")
    group.add_argument(
        "--streaming",
        action="store_true",
        help="transcribe one FILE, or - for standard input (WAV of integer PCM, or --raw-rate), "
        "while it is read. Words are printed when they are final: within one --window after they "
        "are spoken, or two for the last word of a window. On a terminal and in json, text that "
        "may still change follows each --chunk",
    )
    group.add_argument(
        "--chunk",
        type=_chunk,
        metavar="SECONDS",
        help="what is read at once (default: 1)",
    )
    group.add_argument(
        "--raw-rate",
        type=int,
        metavar="HZ",
        help="standard input is raw PCM of this rate: one channel, 16 bits, little-endian "
        "(default: it is WAV)",
    )


def _chunk(text: str) -> float:
    if not 0.1 <= (seconds := float(text)) <= 60:
        raise argparse.ArgumentTypeError(f"must be between 0.1 and 60 seconds, got {text}")
    return seconds


def check_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End the program with a message if options contradict each other."""
    for name in ("chunk", "raw_rate"):
        if getattr(args, name) is not None and not args.streaming:
            parser.error(f"--{name.replace('_', '-')} needs --streaming")
    if not args.streaming:
        return
    if len(args.files) != 1 or args.files[0].is_dir():
        parser.error("--streaming takes one recording, or - for standard input")
    if args.raw_rate is not None and args.files[0] != STDIN:
        parser.error("--raw-rate is of standard input: give - as the file")
    if args.format not in ("text", "json") or args.output_dir is not None:
        parser.error("--streaming prints text or json: leave out --output-dir and other formats")
    if args.channel == "each" or (args.channel and args.files[0] == STDIN):
        parser.error(f"--channel {args.channel} does not work with --streaming here: leave it out")


def transcribe_stream(args: argparse.Namespace, recognizer: Recognizer, decode: Decode) -> int:
    """Exit status: 0 done, 1 the stream cannot be used."""
    file = args.files[0]
    output = _Output(file, args.format == "json")
    try:
        with _source(args, args.channel or recognizer.config.channel) as source:
            transcriber = Transcriber(recognizer, source.samplerate, decode, args.window, args.vad)
            frames = math.ceil((args.chunk or 1.0) * source.samplerate)
            while len(samples := source.read(frames)):
                output.final(transcriber.feed(torch.from_numpy(samples)))
                if output.shows_partial:
                    output.partial(transcriber.partial())
        output.final(transcriber.finish())
    except (AudioError, TranscriptionError) as error:
        print(f"error: {shown_name(file)}: {terminal.one_line(str(error))}", file=sys.stderr)
        return 1
    return 0


@contextmanager
def _source(args: argparse.Namespace, channel: str) -> Iterator[Recording | LiveSamples]:
    if args.files[0] != STDIN:
        with open_recording(args.files[0], Part(channel=CHANNELS.get(channel))) as file:
            yield file
    elif sys.stdin is None or sys.stdin.isatty():
        raise AudioError("standard input is a terminal: write a recording to it by |")
    else:
        yield LiveSamples(sys.stdin.buffer, args.raw_rate)


class _Output:
    """Prints final words on stdout, a line for each time that there are any. Words that may change
    are shown in the last line of a terminal, or as JSON."""

    def __init__(self, file: Path, json: bool) -> None:
        self._file, self._json = file, json
        self._last: list[str] | None = None
        self._terminal = not json and sys.stderr.isatty()
        self.shows_partial = json or self._terminal

    def final(self, words: list[Word]) -> None:
        if not words:
            return
        if self._terminal:
            self._show("")
            print(end="\r", file=sys.stderr, flush=True)
        self._last = None
        self._print(words, final=True)

    def partial(self, words: list[Word]) -> None:
        found = [word.word for word in words]
        if found == self._last:
            return
        self._last = found
        if self._json:
            self._print(words, final=False)
            return
        self._show(" ".join(found))

    def _show(self, text: str) -> None:
        """The end of the text in the last line of the terminal, over what was there."""
        width = shutil.get_terminal_size().columns - 1
        print("\r" + text[-width:].ljust(width), end="", file=sys.stderr, flush=True)

    def _print(self, words: list[Word], final: bool) -> None:
        text = " ".join(word.word for word in words)
        print(as_json(self._file, words, final=final) if self._json else text, flush=True)
