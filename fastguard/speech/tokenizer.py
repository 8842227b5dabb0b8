"""Characters to symbols of the CTC output and back."""

import string
from collections.abc import Iterable
from typing import Protocol

BLANK = "<blank>"


class Tokenizer(Protocol):
    """What training and recognition need of a tokenizer; token 0 is the CTC blank."""

    @property
    def vocab_size(self) -> int: ...

    def encode(self, text: str) -> list[int]: ...

    def decode(self, tokens: Iterable[int]) -> str: ...

    def to_dict(self) -> dict: ...


class CharTokenizer:
    """``symbols[i]`` is the character of token i; token 0 is the CTC blank.

    Raises ValueError unless the symbols are the blank and distinct single characters.
    """

    def __init__(self, symbols: Iterable[str]) -> None:
        self.symbols = list(symbols)
        blank, characters = self.symbols[:1], self.symbols[1:]
        odd = [s for s in characters if len(s) != 1 or characters.count(s) > 1]
        if blank != [BLANK] or odd:
            raise ValueError(
                f"symbols start with {blank} and hold {odd}: give {BLANK!r} and then single, "
                "distinct characters"
            )
        self._tokens = {symbol: token for token, symbol in enumerate(characters, start=1)}

    @classmethod
    def from_texts(cls, texts: Iterable[str]) -> "CharTokenizer":
        """All characters of the texts, in order, and in any case the space, ' and a to z."""
        characters = set(" '" + string.ascii_lowercase).union(*texts)
        return cls([BLANK, *sorted(characters)])

    @property
    def vocab_size(self) -> int:
        """Number of tokens, the blank included."""
        return len(self.symbols)

    def encode(self, text: str) -> list[int]:
        """Raises ValueError for a character that is no symbol."""
        if unknown := sorted(set(text) - self._tokens.keys()):
            raise ValueError(
                f"no symbol for {unknown} in {text!r}: normalize the text, or build the tokenizer "
                "from a training set that has these characters"
            )
        return [self._tokens[char] for char in text]

    def decode(self, tokens: Iterable[int]) -> str:
        """Raises ValueError for the blank and for tokens outside the vocabulary."""
        tokens = list(tokens)
        if odd := [token for token in tokens if not 0 < token < self.vocab_size]:
            raise ValueError(
                f"tokens {odd} are not between 1 and {self.vocab_size - 1}: collapse blanks first, "
                "with greedy_decode"
            )
        return "".join(self.symbols[token] for token in tokens)

    def to_dict(self) -> dict:
        """What a checkpoint keeps; :meth:`from_dict` restores it."""
        return {"symbols": list(self.symbols)}

    @classmethod
    def from_dict(cls, state: dict) -> "CharTokenizer":
        return cls(state["symbols"])
