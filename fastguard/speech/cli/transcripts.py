"""How transcripts are printed, or written into a folder."""

import json
from collections.abc import Sequence
from pathlib import Path

from fastguard._io import files
from fastguard.speech.recognition import captions
from fastguard.speech.recognition.alignment import Word
from fastguard.speech.recognition.transcription import Transcript

#: Formats, and the suffix of a file in each.
SUFFIXES = {"text": "txt", "json": "json", "srt": "srt", "vtt": "vtt", "ctm": "ctm"}
#: Formats of which one stream holds one recording.
ONE_EACH = "srt", "vtt"


class Transcripts:
    """Prints transcripts, or writes each into a file of its own.

    Args:
        kind: of SUFFIXES.
        folder: for files NAME.SUFFIX, NAME-CHANNEL.SUFFIX for a channel; None: they are printed.
        alone: whether there is only one recording, whose text is printed without its name.
    """

    def __init__(self, kind: str, folder: Path | None, alone: bool) -> None:
        self._kind, self._folder, self._alone = kind, folder, alone
        self._written: dict[Path, Path] = {}
        if folder is not None:
            files.make_folder(folder, named=True)

    def add(self, file: Path, found: Transcript, channel: int | None) -> None:
        """Print or write a transcript.

        Raises:
            OSError: it cannot be written, or another recording has the same name.
        """
        if self._folder is None:
            text = self._text(file, found, self._alone, channel)
            print(text, end="" if text.endswith("\n") or not text else "\n", flush=True)
            return
        name = file.stem if channel is None else f"{file.stem}-{channel}"
        path = self._folder / f"{name}.{SUFFIXES[self._kind]}"
        if path in self._written:
            raise OSError(
                f"{shown_name(file)} and {shown_name(self._written[path])} would both be written "
                f"to {shown_name(path)}: rename one, or transcribe them into two folders"
            )
        text = self._text(file, found, True, None)
        files.write_text(path, text if text.endswith("\n") else text + "\n")
        self._written[path] = file

    def _text(self, file: Path, found: Transcript, alone: bool, channel: int | None) -> str:
        if self._kind == "json":
            return as_json(file, found.words, channel, duration=found.duration)
        if self._kind == "ctm":
            return captions.ctm(found.words, file.stem, channel or 0)
        if self._kind != "text":
            return {"srt": captions.srt, "vtt": captions.vtt}[self._kind](found.words)
        fields = [] if alone else [shown_name(file)]
        fields += [] if channel is None else [str(channel)]
        return "\t".join([*fields, found.text]) + "\n"


def as_json(file: Path, words: Sequence[Word], channel: int | None = None, **more: object) -> str:
    """A line of JSON: the file, the channel if there is one, ``more``, the text and the words."""
    values: dict[str, object] = {"file": str(file)}
    if channel is not None:
        values["channel"] = channel
    plain = [
        {key: round(value, 3) if key != "word" else value for key, value in vars(word).items()}
        for word in words
    ]
    values |= {**more, "text": " ".join(word.word for word in words), "words": plain}
    # Bytes of a file name that are not UTF-8 become \\udcXX, as in Python.
    return json.dumps(values, ensure_ascii=False).encode("utf-8", "backslashreplace").decode()


def shown_name(file: Path) -> str:
    """The name, for a field of a line: a tab or a newline in it is escaped."""
    name = str(file)
    return name if name.isprintable() else ascii(name)
