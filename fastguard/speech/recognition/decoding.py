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

#: log_probs (B, T, V) and lengths (B,) to the tokens of each utterance.
Decode = Callable[[Tensor, Tensor], list[list[int]]]

_IMPOSSIBLE = -1e4  # log p; where all hypotheses have -inf flashlight makes NaN of them
_LARGEST_LM = 64 << 30  # bytes
_LARGEST_LEXICON = 1 << 28
_HEAD = 1 << 12  # bytes of an ARPA file in which its counts stand
_KENLM = b"mmap lm http://kheafield.com/code"
_COUNT = re.compile(rb"ngram \d+=(\d{1,18})\s*")
_SHORTEST_NGRAM = 4  # bytes of its line: a digit, a tab, a letter, an end
_LONGEST_MESSAGE = 300
_SPACE = "|"  # files of words and language models are separated by white space


def greedy_decode(log_probs: Tensor, lengths: Tensor, blank: int = 0) -> list[list[int]]:
    """Tokens of the likeliest CTC path of each utterance: repeats merged, then blanks dropped.

    ``log_probs`` (B, T, V) in any float dtype, or any scores with the same maxima; ``lengths`` (B,)
    integers, the frames of each utterance; frames after them are not read.  Raises ValueError if
    the shapes do not match or a length is over T.
    """
    frames = _frames(log_probs, lengths)
    paths = log_probs.argmax(dim=-1).cpu()
    return [
        [token for token in torch.unique_consecutive(path[:end]).tolist() if token != blank]
        for path, end in zip(paths, frames, strict=True)
    ]


def _frames(log_probs: Tensor, lengths: Tensor) -> list[int]:
    """The lengths, if they and the log_probs can be of one batch."""
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
    """CTC prefix beam search, by flashlight-text: a :data:`Decode` to be used like greedy_decode.

    Finds the tokens with the largest

        log p(tokens | recording) + lm_weight * log10 p(tokens or words) + word_score * words

    where the first is the sum over all alignments (Graves et al. 2006) that ``beam_size``
    hypotheses leave, and the second is of an n-gram language model with 2-grams at least: an ARPA
    file or, with ``lm_binary``, a binary file of KenLM.  KenLM maps the latter into memory and
    checks nothing of it: a damaged or hostile one crashes the process.  It is

    - over tokens, written as in ``tokenizer.symbols`` with "|" for the space: any text can come
      out; or
    - with ``lexicon``, a file with a word at the start of each line, over words: only these come
      out, spelled as :func:`normalize_text` writes them by ``rules``. This needs a tokenizer of
      characters.

    Raises MissingExtra without flashlight-text, ValueError for files that can not be used.
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
                    log_add=True,  # the default counts the likeliest alignment alone
                    blank_token=self._names[0],
                    # flashlight puts this token around each path; a blank changes nothing there
                    sil_token=self._names[0] if lexicon is None else _SPACE,
                    **options,
                )
            except RuntimeError as error:
                raise ValueError(
                    f"{lm} can not be used as a language model: {_last_line(error)}; give an ARPA "
                    "file of order 2 or more"
                ) from error

    def _write_lexicon(self, path: Path) -> str:
        """Words end with a space, where flashlight knows that the last letter may last on."""
        with path.open("w", encoding="utf-8") as file:
            for word, text in self._spoken.items():
                spelling = [self._names[token] for token in self.tokenizer.encode(text)]
                print(word, *spelling, _SPACE, file=file)
        return str(path)

    def _write_tokens(self, path: Path) -> str:
        """Without this list torchaudio numbers the words of a token's model as a hash table does,
        and scores each token as another."""
        path.write_text("\n".join(dict.fromkeys([*self._names, "<unk>"])), encoding="utf-8")
        return str(path)

    def _check_vocabulary(self, lm: Path) -> None:
        """Of the words of another vocabulary each is <unk>, and the search would go on in vain."""
        model, words = self._decoder.lm, self._decoder.word_dict
        start = model.start(False)

        def score(word: str) -> float:
            return model.score(start, words.get_index(word))[1]

        needed = self._names[1:] if self._spoken is None else list(self._spoken)
        foreign = score("<unk>")
        unknown = [word for word in needed if score(word) == foreign]
        if self._spoken is not None and len(unknown) == len(needed):
            raise ValueError(
                f"{lm} knows no word of the lexicon, as {' '.join(unknown[:5])}: give the words as "
                "they were written in the text that it was trained on"
            )
        if self._spoken is None and (2 * len(unknown) > len(needed) or _SPACE in unknown):
            raise ValueError(
                f"{lm} does not know the tokens {' '.join(unknown[:5])}: train it on text that is "
                f"cut into tokens, with {_SPACE} for the space; or, if it is one over words, give "
                "the list of its words as the lexicon"
            )

    def __call__(self, log_probs: Tensor, lengths: Tensor) -> list[list[int]]:
        """Tokens of each utterance, of log_probs (B, T, V) in any float dtype and lengths (B,).

        Raises ValueError if the shapes do not match, a length is over T, or a value is NaN.
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
        # A last frame, in which the space that the last word lacks is free of charge.
        end = torch.full_like(log_probs[:1], _IMPOSSIBLE)
        end[0, self._names.index(_SPACE)] = 0.0
        words = self._best(torch.cat([log_probs, end])).words
        return self.tokenizer.encode(" ".join(self._spoken[word] for word in words))

    def _best(self, emissions: Tensor):
        return self._decoder(emissions[None].contiguous(), torch.tensor([len(emissions)]))[0][0]


def _check_language_model(path: Path, binary: bool) -> None:
    """Raise ValueError for a file that KenLM must not see: a binary one that was not announced, or
    an ARPA file that would have it take memory for more n-grams than can be in it."""
    try:
        with files.open_regular(path, _LARGEST_LM) as file:
            head = file.read(_HEAD)
            size = file.seek(0, 2)
        _check_head(head, size, binary)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} can not be used as a language model: {error}") from error


def _check_head(head: bytes, size: int, binary: bool) -> None:
    if binary:
        if not head.startswith(_KENLM):
            raise ValueError("it is no binary file of KenLM; leave out --lm-binary")
        return
    if head.startswith(_KENLM):
        raise ValueError(
            "it is a binary file of KenLM, which is not checked; give the ARPA file that it was "
            "made of, or --lm-binary if you trust it"
        )
    lines = head.split(b"\n")
    if next(filter(bytes.strip, lines), b"").strip() != b"\\data\\":
        raise ValueError("it is no ARPA file, which begins with \\data\\; unpack a packed one")
    claimed = sum(int(count[1]) for count in map(_COUNT.fullmatch, lines) if count)
    if claimed > size // _SHORTEST_NGRAM:
        raise ValueError(f"it claims {claimed} n-grams, more than fit into {size} bytes")


def _spellings(lexicon: Path, tokenizer: Tokenizer, rules: TextRules | None) -> dict[str, str]:
    """Each word of the file, and what is spoken of it; words without a spelling are left out."""
    if " " not in tokenizer.symbols:
        raise ValueError(
            f"{lexicon}: a lexicon needs a tokenizer of characters, with a space; give a language "
            "model over the tokens, and no lexicon"
        )
    try:
        lines = files.read_text(lexicon, _LARGEST_LEXICON).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{lexicon} can not be read as a lexicon: {error}") from error
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
    """What KenLM says, in which pieces of the file are."""
    *_, last = str(error).splitlines() or [""]
    return visible(" ".join(last.split()))[:_LONGEST_MESSAGE]


def _spoken(word: str, rules: TextRules | None) -> str:
    """The word by the rules; nothing where they refuse it."""
    try:
        return normalize_text(word, rules)
    except TextError:
        return ""
