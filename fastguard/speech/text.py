"""Text as it is spoken: letters, apostrophes inside words, single spaces."""

import re
import unicodedata

_APOSTROPHES = str.maketrans(dict.fromkeys("\u2018\u2019\u02bc\uff07", "'"))
_INNERMOST_NOTE = re.compile(r"\[[^\[\]()<>]*\]|\([^\[\]()<>]*\)|<[^\[\]()<>]*>")
_UNCLOSED_NOTE = re.compile(r"[\[(<].*")  # "." stops at the end of the line
_NOT_PLAIN = re.compile(r"[^a-z' ]")
_KEYS = {"*": " star ", "#": " pound "}
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def normalize_text(raw: str) -> str:
    """What the voice says, as a character tokenizer can spell it.

    - notes in ``[...]``, ``(...)`` or ``<...>`` are not spoken: dropped, also when they nest or
      are still open at the end of the line;
    - ``*`` and ``#`` are the telephone keys "star" and "pound";
    - digits are read one by one, the way menu keys are: "3D" is "three d" and "42" is
      "four two".  Text in which "42" is read "forty-two" has to spell it so itself;
    - a letter with its accent is one symbol (NFC), and a curly apostrophe equals the straight one;
    - an apostrophe stays between two letters ("o'clock"), any other mark separates words:
      "A.M." is "a m", "re-enter" is "re enter".

    The result is lower-case and may be empty; normalising it again changes nothing.
    """
    text = unicodedata.normalize("NFC", drop_notes(raw).lower()).translate(_APOSTROPHES)
    text = _NOT_PLAIN.sub(lambda char: _spoken(char[0]), text)
    text = re.sub(r"(?<!\w)'|'(?!\w)", " ", text)
    return " ".join(text.split())


def drop_notes(raw: str) -> str:
    """``raw`` without the remarks in brackets that nobody speaks."""
    while (text := _INNERMOST_NOTE.sub(" ", raw)) != raw:
        raw = text
    return _UNCLOSED_NOTE.sub(" ", raw)


def needs_english(raw: str) -> bool:
    """Whether :func:`normalize_text` would put English words (digits, keys) into ``raw``."""
    return any(char in _KEYS or char.isdecimal() for char in drop_notes(raw))


def _spoken(char: str) -> str:
    if char in _KEYS:
        return _KEYS[char]
    if char.isdecimal():
        return f" {_DIGITS[int(char)]} "
    # L: letters; M: the combining marks that NFC found no letter for
    return char if char == "'" or unicodedata.category(char)[0] in "LM" else " "
