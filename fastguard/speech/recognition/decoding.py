"""From the model's output to text."""

import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fastguard._extras import MissingExtra
from fastguard._io import files
from fastguard._io.terminal import visible
from fastguard.speech.data.text import TextError, TextRules, normalize_text
from fastguard.speech.data.tokenizer import Tokenizer

#: Maps log_probs (B, T, V) and lengths (B,) to the tokens of each utterance.
Decode = Callable[[Tensor, Tensor], list[list[int]]]

#: log p; if all hypotheses have -inf, flashlight returns NaN.
IMPOSSIBLE = -1e4
_LARGEST_LM = 64 << 30  # bytes
_LARGEST_LEXICON = 1 << 28
_HEAD = 1 << 12  # bytes of an ARPA file that hold its counts
_KENLM = b"mmap lm http://kheafield.com/code"
_COUNT = re.compile(rb"ngram \d+=(\d{1,18})\s*")
_SHORTEST_NGRAM = 4  # bytes of its line: a digit, a tab, a letter, a newline
_LONGEST_MESSAGE = 300  # characters
_SPACE = "|"  # in lexicons and language models white space separates


def greedy_decode(log_probs: Tensor, lengths: Tensor, blank: int = 0) -> list[list[int]]:
    """Tokens of the most likely CTC path of each utterance: repeats merged, then blanks dropped
    (Graves et al. 2006).

    Args:
        log_probs: (B, T, V) floating point; any scores with the same maxima will do.
        lengths: (B,) integers, frames of each utterance. Later frames are not read.
        blank: index of the blank in V.

    Raises:
        ValueError: the shapes do not match, or a length is over T.
    """
    frames = _frames(log_probs, lengths)
    paths = log_probs.argmax(dim=-1).cpu()
    return [
        [token for token in torch.unique_consecutive(path[:end]).tolist() if token != blank]
        for path, end in zip(paths, frames, strict=True)
    ]


def _frames(log_probs: Tensor, lengths: Tensor) -> list[int]:
    """The lengths as a list; raises ValueError if they do not fit the log_probs."""
    if log_probs.dim() != 3 or lengths.shape != log_probs.shape[:1]:
        raise ValueError(
            f"log_probs {tuple(log_probs.shape)} and lengths {tuple(lengths.shape)}: "
            "give (B, T, V) and (B,)"
        )
    frames = lengths.tolist()
    if max(frames, default=0) > log_probs.shape[1]:
        raise ValueError(
            f"lengths up to {max(frames)} for {log_probs.shape[1]} frames: give the lengths of the "
            "model's output, not of its input"
        )
    return frames


class BeamSearch:
    """CTC prefix beam search by flashlight-text, a :data:`Decode` like greedy_decode.

    It finds the tokens with the largest

        log p(tokens | recording) + lm_weight * log10 p(tokens or words) + word_score * words

    The first term is the sum over the alignments (Graves et al. 2006) that ``beam_size`` hypotheses
    leave. The second term is the score of an n-gram language model of order 2 or more. The model is

    - over tokens, written as in ``tokenizer.symbols`` with "|" for the space. Any text can be
      recognised; or
    - over words, with ``lexicon``. Only the words of the lexicon can be recognised. This needs a
      tokenizer of characters.

    Args:
        tokenizer: of the model.
        beam_size: hypotheses kept in each frame.
        lm: the language model, an ARPA file, or with ``lm_binary`` a binary file of KenLM.
        lexicon: file with a word at the start of each line.
        lm_weight: nats per decade of the language model's probability.
        word_score: added for each word of the lexicon.
        rules: by which :func:`normalize_text` spells the words of the lexicon.
        lm_binary: KenLM maps a binary file into memory without checks. A damaged or hostile file
            crashes the process.

    Raises:
        MissingExtra: flashlight-text is not installed.
        ValueError: a file cannot be used.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        beam_size: int = 50,
        lm: Path | None = None,
        lexicon: Path | None = None,
        lm_weight: float = 1.0,
        word_score: float = 0.0,
        rules: TextRules | None = None,
        lm_binary: bool = False,
    ) -> None:
        if beam_size < 1:
            raise ValueError(f"beam_size is {beam_size}: give 1 or more")
        if lm is not None:
            _check_language_model(lm, lm_binary)
        self.tokenizer = tokenizer
        self._names = [symbol.replace(" ", _SPACE) for symbol in tokenizer.symbols]
        self._spoken = None if lexicon is None else _spellings(lexicon, tokenizer, rules)
        options = {"beam_size": beam_size, "lm_weight": lm_weight, "word_score": word_score}
        self._decoder = self._build(lm, **options)
        if lm is not None:
            self._check_vocabulary(lm)

    def _build(self, lm: Path | None, **options):
        try:
            from torchaudio.models.decoder import ctc_decoder
        except (ImportError, RuntimeError) as error:
            raise MissingExtra("beam search needs flashlight-text", "beam") from error
        with tempfile.TemporaryDirectory() as folder:
            lexicon, lm_dict = None, None
            if self._spoken is not None:
                lexicon = self._write_lexicon(Path(folder, "lexicon"))
            elif lm is not None:
                lm_dict = self._write_tokens(Path(folder, "tokens"))
            try:
                return ctc_decoder(
                    lexicon=lexicon,
                    tokens=self._names,
                    lm=None if lm is None else str(lm),
                    lm_dict=lm_dict,
                    log_add=True,  # the default counts only the most likely alignment
                    blank_token=self._names[0],
                    # flashlight adds this token at both ends of a path; a blank changes nothing
                    sil_token=self._names[0] if lexicon is None else _SPACE,
                    **options,
                )
            except RuntimeError as error:
                raise ValueError(
                    f"{lm} cannot be used as a language model: {_last_line(error)}; give an ARPA "
                    "file of order 2 or more"
                ) from error

    def _write_lexicon(self, path: Path) -> str:
        """Write the words with a space at the end, before which the last letter may repeat."""
        with path.open("w", encoding="utf-8") as file:
            for word, text in self._spoken.items():
                spelling = [self._names[token] for token in self.tokenizer.encode(text)]
                print(word, *spelling, _SPACE, file=file)
        return str(path)

    def _write_tokens(self, path: Path) -> str:
        """Write the tokens: without a list torchaudio numbers the words of a token model in the
        order of a hash table, and scores each token as another one."""
        path.write_text("\n".join(dict.fromkeys([*self._names, "<unk>"])), encoding="utf-8")
        return str(path)

    def _check_vocabulary(self, lm: Path) -> None:
        """Raise ValueError if the language model has another vocabulary: it would score every word
        as <unk>."""
        model, words = self._decoder.lm, self._decoder.word_dict
        start = model.start(False)

        def score(word: str) -> float:
            return model.score(start, words.get_index(word))[1]

        needed = self._names[1:] if self._spoken is None else list(self._spoken)
        foreign = score("<unk>")
        unknown = [word for word in needed if score(word) == foreign]
        if self._spoken is not None and len(unknown) == len(needed):
            raise ValueError(
                f"{lm} has no word of the lexicon, such as {' '.join(unknown[:5])}: "
                "write the words as in the text that it was trained on"
            )
        if self._spoken is None and (2 * len(unknown) > len(needed) or _SPACE in unknown):
            raise ValueError(
                f"{lm} does not have the tokens {' '.join(unknown[:5])}: train it on text that "
                f"is split into tokens, with {_SPACE} for the space; or, if it is a model of "
                "words, give the list of its words as the lexicon"
            )

    def __call__(self, log_probs: Tensor, lengths: Tensor) -> list[list[int]]:
        """Tokens of each utterance.

        Args:
            log_probs: (B, T, V) floating point.
            lengths: (B,) integers, frames of each utterance.

        Raises:
            ValueError: the shapes do not match, a length is over T, or a value is NaN.
        """
        frames = _frames(log_probs, lengths)
        log_probs = log_probs.detach().float().cpu()
        return [self._search(row[:end]) for row, end in zip(log_probs, frames, strict=True)]

    def _search(self, log_probs: Tensor) -> list[int]:
        if log_probs.isnan().any():
            raise ValueError("log_probs hold NaN: leave this utterance out")
        if len(log_probs) == 0:
            return []
        if self._spoken is None:
            return self._best(log_probs).tokens.tolist()
        # One more frame with a space of probability 1, which the last word lacks.
        end = torch.full_like(log_probs[:1], IMPOSSIBLE)
        end[0, self._names.index(_SPACE)] = 0.0
        words = self._best(torch.cat([log_probs, end])).words
        return self.tokenizer.encode(" ".join(self._spoken[word] for word in words))

    def _best(self, emissions: Tensor):
        return self._decoder(emissions[None].contiguous(), torch.tensor([len(emissions)]))[0][0]


def _check_language_model(path: Path, binary: bool) -> None:
    """Raise ValueError for a file that KenLM must not read: a binary file without ``binary``, or an
    ARPA file for which KenLM would allocate more n-grams than can be in it."""
    try:
        with files.open_regular(path, _LARGEST_LM) as file:
            head = file.read(_HEAD)
            size = file.seek(0, 2)
        _check_head(head, size, binary)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be used as a language model: {error}") from error


def _check_head(head: bytes, size: int, binary: bool) -> None:
    if binary:
        if not head.startswith(_KENLM):
            raise ValueError("it is not a binary file of KenLM; leave out --lm-binary")
        return
    if head.startswith(_KENLM):
        raise ValueError(
            "it is a binary file of KenLM, which is not checked; give the ARPA file that it was "
            "made from, or --lm-binary if you trust it"
        )
    lines = head.split(b"\n")
    if next(filter(bytes.strip, lines), b"").strip() != b"\\data\\":
        raise ValueError(
            "it is not an ARPA file, which begins with \\data\\; decompress a compressed one"
        )
    claimed = sum(int(count[1]) for count in map(_COUNT.fullmatch, lines) if count)
    if claimed > size // _SHORTEST_NGRAM:
        raise ValueError(f"it claims {claimed} n-grams, more than fit into {size} bytes")


def _spellings(lexicon: Path, tokenizer: Tokenizer, rules: TextRules | None) -> dict[str, str]:
    """Each word of the file with its spelling; words without a spelling are left out."""
    if " " not in tokenizer.symbols:
        raise ValueError(
            f"{lexicon}: a lexicon needs a tokenizer of characters with a space; give a language "
            "model over tokens, and no lexicon"
        )
    try:
        lines = files.read_text(lexicon, _LARGEST_LEXICON).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{lexicon} cannot be read as a lexicon: {error}") from error
    spoken = {word: _spoken(word, rules) for line in lines for word in line.split()[:1]}
    letters = set(tokenizer.symbols)
    usable = {word: text for word, text in spoken.items() if text and letters.issuperset(text)}
    if not usable:
        raise ValueError(
            f"{lexicon}: none of {len(spoken)} words can be spelled with the symbols of the "
            "tokenizer; give a file with a word at the start of each line"
        )
    return usable


def _last_line(error: RuntimeError) -> str:
    """The message of KenLM, which may quote the file, safe to print."""
    *_, last = str(error).splitlines() or [""]
    return visible(" ".join(last.split()))[:_LONGEST_MESSAGE]


def _spoken(word: str, rules: TextRules | None) -> str:
    """The word as the rules spell it; empty if they refuse it."""
    try:
        return normalize_text(word, rules)
    except TextError:
        return ""
