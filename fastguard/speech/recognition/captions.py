"""Words with times as subtitles (SubRip, WebVTT) or as NIST's CTM."""

import html
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from .alignment import Word

# What broadcasters ask of subtitles: two lines of 42 characters, one to seven seconds.
_WIDTH, _LINES = 42, 2
_SHORTEST, _LONGEST = 1.0, 7.0  # seconds
_PAUSE = 1.0  # seconds without a word that end a subtitle


@dataclass(frozen=True)
class Subtitle:
    """Lines of text, and the seconds from and to which they are shown."""

    start: float
    end: float
    lines: list[str]


def subtitles(words: Sequence[Word]) -> list[Subtitle]:
    """The words in subtitles of up to two lines of 42 characters and 7 s. A longer word has a line
    of its own. A pause of a second ends a subtitle; each is shown for a second at least, unless the
    next one begins before."""
    groups: list[list[Word]] = []
    for word in words:
        if groups and _fits(groups[-1], word):
            groups[-1].append(word)
        else:
            groups.append([word])
    if not groups:
        return []
    starts = [group[0].start for group in groups[1:]]
    found = []
    for group, following in zip(groups, [*starts, float("inf")], strict=True):
        start = group[0].start
        end = max(group[-1].end, min(start + _SHORTEST, following))
        found.append(Subtitle(start, end, _lines(group)))
    return found


def _fits(group: list[Word], word: Word) -> bool:
    return (
        word.start - group[-1].end < _PAUSE
        and word.end - group[0].start <= _LONGEST
        and len(_lines([*group, word])) <= _LINES
    )


def _lines(words: list[Word]) -> list[str]:
    text = " ".join(word.word for word in words)
    return textwrap.wrap(text, _WIDTH, break_long_words=False, break_on_hyphens=False)


def srt(words: Sequence[Word]) -> str:
    """The words as a SubRip file."""
    return "".join(
        f"{number}\n{_clock(each.start, ',')} --> {_clock(each.end, ',')}\n"
        + "".join(f"{_plain(line)}\n" for line in each.lines)
        + "\n"
        for number, each in enumerate(subtitles(words), start=1)
    )


def vtt(words: Sequence[Word]) -> str:
    """The words as a WebVTT file."""
    return "WEBVTT\n\n" + "".join(
        f"{_clock(each.start, '.')} --> {_clock(each.end, '.')}\n"
        + "".join(f"{html.escape(line, quote=False)}\n" for line in each.lines)
        + "\n"
        for each in subtitles(words)
    )


def ctm(words: Sequence[Word], recording: str, channel: int = 0) -> str:
    """A line for each word: recording, channel (counted from 1), start and duration in seconds,
    word, confidence. White space in the name of the recording becomes _."""
    name = "_".join(recording.split()) or "_"
    return "".join(
        f"{name} {channel + 1} {word.start:.3f} {word.end - word.start:.3f} {word.word} "
        f"{word.confidence:.3f}\n"
        for word in words
    )


def _plain(line: str) -> str:
    """A line that is not read as the times of a subtitle."""
    return line.replace("-->", "->")


def _clock(seconds: float, point: str) -> str:
    milliseconds = round(1000 * seconds)
    minutes, milliseconds = divmod(milliseconds, 60_000)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02}:{minutes:02}:{milliseconds // 1000:02}{point}{milliseconds % 1000:03}"
