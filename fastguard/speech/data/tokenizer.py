"""Maps text to symbols of the CTC output and back: characters, or pieces of words."""

import io
import re
import string
from collections.abc import Iterable
from typing import Literal, Protocol

import sentencepiece
import torch

from fastguard.speech.storage.plain import shown

BLANK = "<blank>"


class Tokenizer(Protocol):
    """What training and recognition need from a tokenizer; token 0 is the CTC blank."""

    @property
    def vocab_size(self) -> int:
        """Number of tokens, the blank included."""

    @property
    def symbols(self) -> list[str]:
        """The text of each token, BLANK for token 0."""

    def encode(self, text: str) -> list[int]:
        """The tokens of a text; raises ValueError if it has none."""

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of tokens without blanks."""

    def to_dict(self) -> dict:
        """The part of a checkpoint that :func:`tokenizer_from_dict` restores."""


class CharTokenizer:
    """One token per character; ``symbols[i]`` is the character of token i, token 0 the CTC blank.

    Raises:
        ValueError: the symbols are not the blank and distinct single characters.
    """

    def __init__(self, symbols: Iterable[str]) -> None:
        self.symbols = list(symbols)
        blank, characters = self.symbols[:1], self.symbols[1:]
        self._tokens = {}
        odd = []
        for token, symbol in enumerate(characters, start=1):
            if len(symbol) != 1 or self._tokens.setdefault(symbol, token) != token:
                odd.append(symbol)
        if blank != [BLANK] or odd:
            raise ValueError(
                f"symbols start with {blank!r:.60} and hold {odd!r:.60}: give {BLANK!r} and then "
                "single, distinct characters"
            )

    @classmethod
    def from_texts(cls, texts: Iterable[str]) -> "CharTokenizer":
        """A tokenizer for all characters of the texts, and always for the space, ' and a to z."""
        characters = set(" '" + string.ascii_lowercase).union(*texts)
        return cls([BLANK, *sorted(characters)])

    @property
    def vocab_size(self) -> int:
        """Number of tokens, the blank included."""
        return len(self.symbols)

    def encode(self, text: str) -> list[int]:
        """The token of each character; raises ValueError for a character without a symbol."""
        if unknown := sorted(set(text) - self._tokens.keys()):
            raise ValueError(
                f"no symbol for {unknown} in {text!r}: normalize the text, or build the tokenizer "
                "from a training set that has these characters"
            )
        return [self._tokens[char] for char in text]

    def decode(self, tokens: Iterable[int]) -> str:
        """The text; raises ValueError for the blank and for tokens outside the vocabulary."""
        return "".join(self.symbols[token] for token in _text_tokens(tokens, self.vocab_size))

    def to_dict(self) -> dict:
        """The part of a checkpoint from which :meth:`from_dict` restores the tokenizer."""
        return {"kind": "char", "symbols": list(self.symbols)}

    @classmethod
    def from_dict(cls, state: dict) -> "CharTokenizer":
        """The tokenizer of :meth:`to_dict`; raises ValueError for a damaged state."""
        symbols = state["symbols"]
        if not isinstance(symbols, list) or not all(isinstance(s, str) for s in symbols):
            raise ValueError("the symbols of a tokenizer are not a list of strings")
        return cls(symbols)


class SentencePieceTokenizer:
    """One token per piece of a word, by a sentencepiece model (Kudo and Richardson 2018).

    Token 0, the model's unknown piece, is the CTC blank: a text that would need it is refused.

    Raises:
        ValueError: the bytes are not such a model.
    """

    def __init__(self, model: bytes) -> None:
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise ValueError(
                f"{len(model)} bytes are not a sentencepiece model: {error}"
            ) from error
        if self._processor.unk_id() != 0:
            raise ValueError(
                f"the model's unknown piece is {self._processor.unk_id()}, not 0, which is the "
                "blank: train it with SentencePieceTokenizer.train"
            )

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        model_type: Literal["unigram", "bpe"] = "unigram",
    ) -> "SentencePieceTokenizer":
        """Train a model. The same texts in the same order give the same model, and every character
        of the texts has a piece.

        Args:
            texts: normalised.
            vocab_size: number of pieces, the blank included.
            model_type: of sentencepiece.

        Raises:
            ValueError: the texts have too few pieces or too many characters for ``vocab_size``; the
                message names the bound.
        """
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(texts),
                model_writer=model,
                vocab_size=vocab_size,
                model_type=model_type,
                character_coverage=1.0,
                normalization_rule_name="identity",  # the texts are normalised
                remove_extra_whitespaces=False,
                max_sentence_length=1 << 20,  # longer ones would be left out silently
                unk_id=0,
                bos_id=-1,
                eos_id=-1,
                pad_id=-1,
                num_threads=1,  # another order of sums gives another model
                minloglevel=3,
            )
        except RuntimeError as error:
            raise ValueError(_training_advice(vocab_size, str(error))) from error
        return cls(model.getvalue())

    @property
    def vocab_size(self) -> int:
        """Number of tokens, the blank included."""
        return self._processor.vocab_size()

    @property
    def symbols(self) -> list[str]:
        """The piece of each token, with "\u2581" for a space; BLANK for the blank."""
        return [BLANK, *map(self._processor.id_to_piece, range(1, self.vocab_size))]

    def encode(self, text: str) -> list[int]:
        """The token of each piece; raises ValueError for characters without a piece."""
        tokens = self._processor.encode(text)
        # The model confuses some characters, such as "\u2581" and the space.
        if 0 in tokens or self._processor.decode(tokens) != text:
            unknown = sorted({char for char in text if not self._has(char)})
            raise ValueError(
                f"no piece for {unknown} in {text!r}: normalize the text, or build the tokenizer "
                "from a training set that has these characters"
            )
        return tokens

    def _has(self, char: str) -> bool:
        tokens = self._processor.encode(char)
        return 0 not in tokens and self._processor.decode(tokens) == char

    def decode(self, tokens: Iterable[int]) -> str:
        """The text; raises ValueError for the blank and for tokens outside the vocabulary."""
        return self._processor.decode(_text_tokens(tokens, self.vocab_size))

    def to_dict(self) -> dict:
        """The part of a checkpoint from which :meth:`from_dict` restores the tokenizer."""
        model = torch.frombuffer(
            bytearray(self._processor.serialized_model_proto()), dtype=torch.uint8
        )
        return {"kind": "sentencepiece", "model": model}

    @classmethod
    def from_dict(cls, state: dict) -> "SentencePieceTokenizer":
        """The tokenizer of :meth:`to_dict`; raises ValueError for a damaged state."""
        model = state["model"]
        if not isinstance(model, torch.Tensor) or (model.dtype, model.dim()) != (torch.uint8, 1):
            raise ValueError("the sentencepiece model of a tokenizer is not a tensor of bytes")
        return cls(model.numpy().tobytes())


TokenizerKind = Literal["char", "unigram", "bpe"]


def build_tokenizer(kind: TokenizerKind, texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A tokenizer for a training set.

    Args:
        kind: "char" has a symbol for each character of the texts and ignores ``vocab_size``.
        texts: normalised.
        vocab_size: number of tokens of the other kinds.

    Raises:
        ValueError: ``vocab_size`` does not fit the texts.
    """
    if kind == "char":
        return CharTokenizer.from_texts(texts)
    return SentencePieceTokenizer.train(texts, vocab_size, kind)


def tokenizer_from_dict(state: dict) -> Tokenizer:
    """The tokenizer whose ``to_dict()`` gave ``state``. A state without a kind is of characters.

    Raises:
        ValueError: this version does not know the kind, or the state is damaged.
    """
    kinds = {"char": CharTokenizer, "sentencepiece": SentencePieceTokenizer}
    kind = state.get("kind", "char")
    if not isinstance(kind, str) or kind not in kinds:
        raise ValueError(f"unknown tokenizer {shown(kind)}: this version knows {', '.join(kinds)}")
    return kinds[kind].from_dict(state)


def _text_tokens(tokens: Iterable[int], vocab_size: int) -> list[int]:
    tokens = list(tokens)
    if odd := [token for token in tokens if not 0 < token < vocab_size]:
        raise ValueError(
            f"tokens {odd} are not between 1 and {vocab_size - 1}: collapse blanks first, with "
            "greedy_decode"
        )
    return tokens


def _training_advice(vocab_size: int, error: str) -> str:
    if most := re.search(r"value <= (\d+)", error):
        return f"vocab_size is {vocab_size}: the texts have at most {most[1]} pieces"
    if least := re.search(r"required_chars\. \d+ vs (\d+)", error):
        return f"vocab_size is {vocab_size}: the characters of the texts alone need {least[1]}"
    return f"a model of vocab_size {vocab_size} cannot be trained on the texts: {error}"
