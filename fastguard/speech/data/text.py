"""Text as it is spoken: letters, apostrophes inside words, single spaces."""

import re
import unicodedata
from dataclasses import dataclass
from typing import Literal, get_args, get_type_hints

from fastguard._extras import MissingExtra

_APOSTROPHES = str.maketrans(dict.fromkeys("\u2018\u2019\u02bc\uff07\u00b4`", "'"))
_CLOSING = {")": "(", "]": "[", ">": "<"}
_EMOTICON = re.compile(r"[:;=]['-]?[()\[\]<>]")
# Alone between spaces and the marks of a sentence: "$3", "3 %", "10:30" and "3/4" are read in
# words of their own.
_NUMBER = re.compile(
    r"""(?<![^\s"'(¿¡“„«])(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?![^\s.,;:!?)"'”»…]|['.,:][\w])(?!\s*[%‰€£$])"""
)
_LONGEST_NUMBER = 15  # digits; nobody reads a longer one as a number
_DOTLESS = ("tr", "az")  # languages whose I is no capital i
_KEYS = {"*": " star ", "#": " pound "}
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


class TextError(ValueError):
    """A text that the rules refuse; reads "kind: what, and the cure"."""


@dataclass(frozen=True)
class TextRules:
    """How the texts of a corpus are normalised; kept with the model, so that what it is tested on
    is written as what it was trained on.

    Raises ValueError for values that are none of these.
    """

    language: str = "en"
    """Of the texts: for the words of numbers, and for the Turkish and Azeri i without a dot."""
    numbers: Literal["keep", "reject", "words"] = "keep"
    """Digits stay as they are, or their row is left out, or they become words of the language."""
    brackets: Literal["drop", "keep", "reject"] = "drop"
    """What stands in (...), [...] or <...> is a note and dropped, or spoken, or its row left
    out."""
    case: Literal["lower", "keep"] = "lower"
    """Letters become small, or stay as they are."""
    unicode: Literal["NFKC", "NFC"] = "NFKC"
    """Unicode's form: NFKC also takes ligatures and wide letters for plain ones."""

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(TextRules).items():
            value, choices = getattr(self, name), get_args(hint)
            if choices and value not in choices:
                raise ValueError(f"text.{name} is {value!r}: choose one of {', '.join(choices)}")
        if not re.fullmatch(r"[a-z]{2,3}([_-][A-Za-z]{2,4})?", self.language):
            raise ValueError(f"text.language is {self.language!r}: give a code as en, fr or pt_BR")

    def check(self) -> None:
        """Whether numbers can be spelled, where they are to be.

        Raises TextError for a language without words for numbers, MissingExtra without num2words.
        """
        if self.numbers == "words":
            _words_of("1", self.language)


def normalize_text(raw: str, rules: TextRules | None = None) -> str:
    """What the voice says, as a character tokenizer can spell it; see :func:`normalized`.

    Raises TextError for a text that the rules refuse.
    """
    return normalized(raw, rules or TextRules())[0]


def normalized(raw: str, rules: TextRules) -> tuple[str, set[str]]:
    """The text by these rules, and what was changed for it: names of the steps below.

    - "unicode": one form for what looks the same; "joiners": soft hyphens, zero-width joiners and
      other characters that cannot be seen are dropped, and split no word;
    - "brackets": notes are dropped, also when they nest. A bracket without its partner, and one of
      an emoticon, is a mark and takes nothing with it;
    - "numbers": in words;
    - "case";
    - "marks": an apostrophe stays between two letters ("o'clock"), any other mark separates words:
      "A.M." is "a m", "re-enter" is "re enter".

    The text may be empty; normalising it again changes nothing.  Takes time in proportion to the
    length of ``raw``.  Raises TextError where ``rules`` reject a number or a note, and where a
    number is not one that can be spelled.
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
            raise TextError(f"note in brackets: in {raw!r:.60}; take it out of the text")
    if any(char.isdecimal() for char in text):
        text = became("numbers", text, _numbers(text, rules))
    if rules.case == "lower":
        text = became("case", text, _lower(text, rules.language))
    # Lower case and dropped characters may leave parts of a letter side by side.
    text = unicodedata.normalize(rules.unicode, text)
    text = became("marks", text, _without_marks(text))
    return " ".join(text.split()), changed


def drop_notes(raw: str) -> str:
    """``raw`` without the remarks in brackets that nobody speaks."""
    text = _EMOTICON.sub(" ", raw)
    open_at: list[int] = []
    notes: list[tuple[int, int]] = []
    open_count = dict.fromkeys(_CLOSING.values(), 0)
    for at, char in enumerate(text):
        if char in open_count:
            # "a < b": no note begins with a space after this one.
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
    """Whether :func:`spell_keys` would put English words (digits, keys) into ``raw``."""
    return any(char in _KEYS or char.isdecimal() for char in drop_notes(raw))


def spell_keys(raw: str) -> str:
    """``raw`` with the keys of a telephone in English words, one by one: "42" is "four two", "*"
    is "star", "#" is "pound". Notes are dropped."""
    return "".join(
        _KEYS.get(char) or (f" {_DIGITS[int(char)]} " if char.isdecimal() else char)
        for char in drop_notes(raw)
    )


def _unseen(char: str) -> bool:
    """Cf: format characters as joiners; then the selectors of a variant, which are marks."""
    return (
        unicodedata.category(char) == "Cf" or "\ufe00" <= char <= "\ufe0f" or char >= "\U000e0100"
    )


def _lower(text: str, language: str) -> str:
    """Of the dotted capital I Python makes an i and a combining dot."""
    if language[:2] in _DOTLESS:
        text = text.replace("I", "ı")
    return text.replace("İ", "i").replace("I\u0307", "i").lower()


def _numbers(text: str, rules: TextRules) -> str:
    if rules.numbers == "keep":
        return text
    if rules.numbers == "reject":
        raise TextError(
            f"number in digits: in {text!r:.60}; write it as it is spoken, or set text.numbers"
        )
    text = _NUMBER.sub(lambda found: f" {_words_of(found[0], rules.language)} ", text)
    if left := [word for word in text.split() if any(map(str.isdecimal, word))]:
        raise TextError(
            f"number not spelled: {left[0]!r:.60} is more than a number; write it as it is spoken"
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
            f"{_LONGEST_NUMBER}; write it as it is spoken"
        )
    try:
        return num2words(number, lang=language)
    except (NotImplementedError, ArithmeticError, KeyError, TypeError, ValueError) as error:
        raise TextError(
            f"number not spelled: there are no words in {language!r} for {number}; write it as it "
            "is spoken, or set text.language or text.numbers"
        ) from error


def _without_marks(text: str) -> str:
    kept, last = [], " "
    for char in text:
        kind = unicodedata.category(char)
        # L: letters; Nd: digits; M: combining marks, of the letter before them
        spoken = char == "'" or kind[0] == "L" or kind == "Nd"
        last = char if spoken or (kind[0] == "M" and last not in " '") else " "
        kept.append(last)
    return re.sub(r"(?<!\w)'|'(?!\w)", " ", "".join(kept))
