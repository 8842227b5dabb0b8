"""What terminals and logs are shown: text of other people's files with nothing hidden in it.

An escape sequence in an id, a file name or a checkpoint's symbols can clear the screen or feign
output; U+202E turns what follows it around. They are shown as ``\\u001b`` and ``\\u202e``, as JSON
writes them, so that lines of JSON stay JSON. So are characters that the stream's encoding lacks,
such as Cyrillic letters under cp1252.
"""

import codecs
import contextlib
import functools
import re
import sys
import traceback
import unicodedata
from collections.abc import Callable, Iterator
from typing import TextIO

#: Control and format characters, surrogates, private and unassigned ones, line separators.
_HIDDEN = frozenset(("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"))
#: Ends of lines, tabs; the joiners that Persian and Indian scripts and emoji are spelled with.
_SHOWN = frozenset("\n\t\u200c\u200d")
_CURSOR_UP = re.compile(r"(\x1b\[A)*")


def visible(text: str) -> str:
    """``text`` with every character escaped that would not be seen; tabs and newlines stay."""
    if text.isascii() and text.replace("\n", "").replace("\t", "").isprintable():
        return text
    return "".join(map(_visible, text))


def one_line(text: str) -> str:
    """``text`` as :func:`visible` has it, and its ends of lines escaped, with which a file name
    could forge a line of a log."""
    return visible(text).replace("\n", _escaped("\n"))


@functools.lru_cache(4096)
def _visible(character: str) -> str:
    hidden = character not in _SHOWN and unicodedata.category(character) in _HIDDEN
    return _escaped(character) if hidden else character


def _escaped(text: str) -> str:
    """As JSON writes it: UTF-16, so that what is beyond U+FFFF becomes two escapes."""
    units = text.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[i : i + 2].hex()}" for i in range(0, len(units), 2))


def _escape_unencodable(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return _escaped(error.object[error.start : error.end]), error.end


codecs.register_error("fastguard.escape", _escape_unencodable)


class _Visible:
    """A text stream that shows what would be hidden; in all else the stream that it is given."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        # A progress bar begins with a carriage return, and clears itself with two; at the start of
        # a line, where other texts begin, they do nothing.
        start = text[:1] if text.startswith("\r") else ""
        end = "\r" if len(text) > 1 and text.endswith("\r") else ""
        middle = text[len(start) : len(text) - len(end)]
        if self._stream is not sys.__stderr__ or not _CURSOR_UP.fullmatch(middle):
            middle = visible(middle)
        self._stream.write(start + middle + end)
        return len(text)

    def writelines(self, lines) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str):
        return getattr(self._stream, name)


@contextlib.contextmanager
def _protected() -> Iterator[None]:
    before = sys.stdout, sys.stderr
    for stream in before:
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="fastguard.escape")
    # Of a stream that was closed before Python began there is None, to which print writes nothing.
    sys.stdout, sys.stderr = (None if stream is None else _Visible(stream) for stream in before)
    try:
        yield
    except Exception:
        sys.excepthook = _show_traceback  # which is called after the streams are put back
        raise
    finally:
        sys.stdout, sys.stderr = before


def _show_traceback(*error) -> None:
    sys.stderr.write(visible("".join(traceback.format_exception(*error))))


def command(main: Callable[..., int]) -> Callable[..., int]:
    """Decorate a command's ``main``: `visible` shows all that it prints, logs and raises."""

    @functools.wraps(main)
    def shown(*args, **kwargs) -> int:
        with _protected():
            return main(*args, **kwargs)

    return shown
