"""Normalises text to what is spoken: letters, apostrophes inside words, single spaces."""

import re
import unicodedata
from dataclasses import dataclass
from typing import Literal, get_args, get_type_hints

from fastguard._extras import MissingExtra

_APOSTROPHES = str.maketrans(dict.fromkeys("\u2018\u2019\u02bc\uff07\u00b4`", "'"))
_CLOSING = {")": "(", "]": "[", ">": "<"}
_EMOTICON = re.compile(r"[:;=]['-]?[()\[\]<>]")
# A number between spaces or punctuation. "$3", "3 %", "10:30" and "3/4" are spoken differently.
_NUMBER = re.compile(
    r"""(?<![^\s"'(¿¡“„«])(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?![^\s.,;:!?)"'”»…]|['.,:][\w])(?!\s*[%‰€£$])"""
)
_LONGEST_NUMBER = 15  # digits; a longer number is not spoken as one
_DOTLESS = ("tr", "az")  # languages in which I is not the capital of i
_KEYS = {"*": " star ", "#": " pound "}
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


class TextError(ValueError):
    """The rules refuse a text; the message reads "kind: what; what to do"."""


@dataclass(frozen=True)
class TextRules:
    """How the texts of a corpus are normalised. The rules are saved with the model, so that test
    texts are written like training texts.

    Raises:
        ValueError: a value is not one of the choices.
    """

    language: str = "en"
    """Language of the texts: for number words, and for the Turkish and Azeri dotless i."""
    numbers: Literal["keep", "reject", "words"] = "keep"
    """Digits are kept, or their row is left out, or they become words of the language."""
    brackets: Literal["drop", "keep", "reject"] = "drop"
    """Text in (...), [...] or <...> is a note and dropped, or it is spoken and kept, or its row is
    left out."""
    case: Literal["lower", "keep"] = "lower"
    """Letters become lower case, or are kept."""
    unicode: Literal["NFKC", "NFC"] = "NFKC"
    """Unicode normal form; NFKC also replaces ligatures and wide letters by plain letters."""

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(TextRules).items():
            value, choices = getattr(self, name), get_args(hint)
            if choices and value not in choices:
                raise ValueError(f"text.{name} is {value!r}: choose one of {', '.join(choices)}")
        if not re.fullmatch(r"[a-z]{2,3}([_-][A-Za-z]{2,4})?", self.language):
            raise ValueError(
                f"text.language is {self.language!r}: give a code like en, fr or pt_BR"
            )

    def check(self) -> None:
        """Check that numbers can be spelled, if the rules ask for it.

        Raises:
            TextError: the language has no number words.
            MissingExtra: num2words is not installed.
        """
        if self.numbers == "words":
            _words_of("1", self.language)


def normalize_text(raw: str, rules: TextRules | None = None) -> str:
    """The text as it is spoken, by ``rules`` (default: TextRules()); see :func:`normalized`.

    Raises:
        TextError: the rules refuse the text.
    """
    return normalized(raw, rules or TextRules())[0]


def normalized(raw: str, rules: TextRules) -> tuple[str, set[str]]:
    """Normalise a text. The steps are:

    - "unicode": the normal form of ``rules``;
    - "joiners": soft hyphens, zero-width joiners and other invisible characters are removed, and
      split no word;
    - "brackets": notes are removed, nested ones too. A bracket without a partner, or of an
      emoticon, is a punctuation mark;
    - "numbers": as number words;
    - "case": lower case;
    - "marks": an apostrophe stays between two letters ("o'clock"). Any other mark separates words:
      "A.M." becomes "a m", "re-enter" becomes "re enter".

    The time is linear in the length of ``raw``.

    Returns:
        The text, which may be empty and does not change when it is normalised again, and the names
        of the steps that changed it.

    Raises:
        TextError: the rules reject a number or a note, or a number cannot be spelled.
    """
    changed = set()

    def became(name: str, before: str, after: str) -> str:
        if " ".join(before.split()) != " ".join(after.split()):
            changed.add(name)
        return after

    text = raw.translate(_APOSTROPHES)
    text = became("unicode", text, unicodedata.normalize(rules.unicode, text))
    text = became("joiners", text, "".join(c for c in text if not _unseen(c)))
    if rules.brackets != "keep":
        text = became("brackets", text, drop_notes(text))
        if rules.brackets == "reject" and "brackets" in changed:
            raise TextError(f"note in brackets: in {raw!r:.60}; remove it from the text")
    if any(char.isdecimal() for char in text):
        text = became("numbers", text, _numbers(text, rules))
    if rules.case == "lower":
        text = became("case", text, _lower(text, rules.language))
    # After lower case and removals, parts of one letter may be neighbours.
    text = unicodedata.normalize(rules.unicode, text)
    text = became("marks", text, _without_marks(text))
    return " ".join(text.split()), changed


def drop_notes(raw: str) -> str:
    """``raw`` without notes in brackets, which are not spoken."""
    text = _EMOTICON.sub(" ", raw)
    open_at: list[int] = []
    notes: list[tuple[int, int]] = []
    open_count = dict.fromkeys(_CLOSING.values(), 0)
    for at, char in enumerate(text):
        if char in open_count:
            # "a < b": a note does not begin with a space.
            if char != "<" or not text[at + 1 : at + 2].isspace():
                open_at.append(at)
                open_count[char] += 1
        elif char in _CLOSING and open_count[_CLOSING[char]]:
            start = open_at.pop()
            while text[start] != _CLOSING[char]:
                open_count[text[start]] -= 1
                start = open_at.pop()
            open_count[text[start]] -= 1
            while notes and notes[-1][0] > start:
                notes.pop()
            notes.append((start, at + 1))
    if not notes:
        return raw
    ends = [0, *(end for _, end in notes)]
    starts = [*(start for start, _ in notes), len(text)]
    return " ".join(text[end:start] for end, start in zip(ends, starts, strict=True))


def needs_english(raw: str) -> bool:
    """Whether :func:`spell_keys` would write English words for digits or keys in ``raw``."""
    return any(char in _KEYS or char.isdecimal() for char in drop_notes(raw))


def spell_keys(raw: str) -> str:
    """``raw`` with telephone keys as English words, one by one: "42" becomes "four two", "*"
    becomes "star", "#" becomes "pound". Notes are removed."""
    return "".join(
        _KEYS.get(char) or (f" {_DIGITS[int(char)]} " if char.isdecimal() else char)
        for char in drop_notes(raw)
    )


def _unseen(char: str) -> bool:
    """Whether a character is invisible: a format character (Cf) or a variation selector."""
    return (
        unicodedata.category(char) == "Cf" or "\ufe00" <= char <= "\ufe0f" or char >= "\U000e0100"
    )


def _lower(text: str, language: str) -> str:
    """Lower case; Python turns the dotted capital I into an i and a combining dot."""
    if language[:2] in _DOTLESS:
        text = text.replace("I", "ı")
    return text.replace("İ", "i").replace("I\u0307", "i").lower()


def _numbers(text: str, rules: TextRules) -> str:
    if rules.numbers == "keep":
        return text
    if rules.numbers == "reject":
        raise TextError(
            f"number in digits: in {text!r:.60}; write it as spoken, or set text.numbers"
        )
    text = _NUMBER.sub(lambda found: f" {_words_of(found[0], rules.language)} ", text)
    if left := [word for word in text.split() if any(map(str.isdecimal, word))]:
        raise TextError(
            f"number not spelled: {left[0]!r:.60} is not only a number; write it as spoken"
        )
    return text


def _words_of(number: str, language: str) -> str:
    try:
        from num2words import num2words
    except ImportError as error:
        raise MissingExtra("text.numbers=words needs num2words", "numbers") from error
    if len(number) > _LONGEST_NUMBER:
        raise TextError(
            f"number not spelled: {number[:20]}... has {len(number)} digits, over "
            f"{_LONGEST_NUMBER}; write it as spoken"
        )
    try:
        return num2words(number, lang=language)
    except (NotImplementedError, ArithmeticError, KeyError, TypeError, ValueError) as error:
        raise TextError(
            f"number not spelled: {language!r} has no words for {number}; write it as spoken, or "
            "set text.language or text.numbers"
        ) from error


def _without_marks(text: str) -> str:
    kept, last = [], " "
    for char in text:
        kind = unicodedata.category(char)
        # L: letters; Nd: digits; M: combining marks, part of the letter before them
        spoken = char == "'" or kind[0] == "L" or kind == "Nd"
        last = char if spoken or (kind[0] == "M" and last not in " '") else " "
        kept.append(last)
    return re.sub(r"(?<!\w)'|'(?!\w)", " ", "".join(kept))
