"""Makes text from files safe to print on terminals and in logs.

An escape sequence in an id, a file name or a symbol of a checkpoint can clear the screen or imitate
output; U+202E reverses the text after it. They are printed as ``\\u001b`` and ``\\u202e``, as in
JSON, so that lines of JSON stay valid. The same is done for characters that the encoding of the
stream lacks, such as Cyrillic letters in cp1252.
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
#: Newlines, tabs, and the joiners that Persian and Indian scripts and emoji need.
_SHOWN = frozenset("\n\t\u200c\u200d")
_CURSOR_UP = re.compile(r"(\x1b\[A)*")


def visible(text: str) -> str:
    """``text`` with every invisible character escaped, except tabs and newlines."""
    if text.isascii() and text.replace("\n", "").replace("\t", "").isprintable():
        return text
    return "".join(map(_visible, text))


def one_line(text: str) -> str:
    """:func:`visible` text with escaped newlines too: a newline in a file name could imitate a line
    of a log."""
    return visible(text).replace("\n", _escaped("\n"))


@functools.lru_cache(4096)
def _visible(character: str) -> str:
    hidden = character not in _SHOWN and unicodedata.category(character) in _HIDDEN
    return _escaped(character) if hidden else character


def _escaped(text: str) -> str:
    """Escapes as in JSON, by UTF-16: a character beyond U+FFFF becomes two."""
    units = text.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[i : i + 2].hex()}" for i in range(0, len(units), 2))


def _escape_unencodable(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return _escaped(error.object[error.start : error.end]), error.end


codecs.register_error("fastguard.escape", _escape_unencodable)


class _Visible:
    """A text stream that escapes invisible characters, and otherwise behaves as ``stream``."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        # A progress bar begins with a carriage return, and clears itself with two. At the start of
        # a line, where other text begins, they have no effect.
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
    # A stream that was closed before Python started is None, and print ignores it.
    sys.stdout, sys.stderr = (None if stream is None else _Visible(stream) for stream in before)
    try:
        yield
    except Exception:
        sys.excepthook = _show_traceback  # which is called after the streams are restored
        raise
    finally:
        sys.stdout, sys.stderr = before


def _show_traceback(*error) -> None:
    sys.stderr.write(visible("".join(traceback.format_exception(*error))))


def command(main: Callable[..., int]) -> Callable[..., int]:
    """Decorate the ``main`` of a command: :func:`visible` is applied to all that it prints, logs
    and raises."""

    @functools.wraps(main)
    def shown(*args, **kwargs) -> int:
        with _protected():
            return main(*args, **kwargs)

    return shown
