"""When each word of a hypothesis is spoken."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchaudio.functional import forced_align, merge_tokens

from fastguard.speech.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Word:
    """A recognised word.

    Attributes:
        start, end: in seconds.
        confidence: mean probability of its tokens.
    """

    word: str
    start: float
    end: float
    confidence: float


def word_times(
    log_probs: Tensor,
    tokens: Sequence[int],
    tokenizer: Tokenizer,
    seconds_per_frame: float,
    start: float = 0.0,
) -> list[Word]:
    """The words of ``tokens`` with times, on the most likely CTC path through the log_probs.

    For tokens of greedy_decode this is the path that they were read from. CTC marks where it
    recognises a token, not how long it lasts: ``start`` and ``end`` of a word are those of the
    frames of its first and last token, and may be off by a few frames.

    Args:
        log_probs: (T, V) floating point.
        tokens: indices into V, without blanks.
        tokenizer: of the model.
        seconds_per_frame: duration of an output frame.
        start: time of the first frame, in seconds.

    Raises:
        RuntimeError: T frames are too few for the tokens.
    """
    if not tokens:
        return []
    targets = torch.tensor([tokens], device=log_probs.device)
    path, scores = forced_align(log_probs[None].float(), targets)
    spans = merge_tokens(path[0].cpu(), scores[0].exp().cpu())
    words = tokenizer.decode(tokens).split()
    parts_of: list[list] = [[] for _ in words]
    for span, touched in zip(spans, words_of(tokens, tokenizer), strict=True):
        for word in touched:
            parts_of[word].append(span)
    return [
        Word(
            word,
            start + seconds_per_frame * parts[0].start,
            start + seconds_per_frame * parts[-1].end,
            sum(part.score for part in parts) / len(parts),
        )
        for word, parts in zip(words, parts_of, strict=True)
    ]


def words_of(tokens: Sequence[int], tokenizer: Tokenizer) -> list[range]:
    """For each token the indices of the words that it is a part of; none for a space."""
    found: list[range] = []
    before: list[str] = []
    for end in range(1, len(tokens) + 1):
        words = tokenizer.decode(tokens[:end]).split()
        changes = (
            i for i, pair in enumerate(zip(before, words, strict=False)) if len(set(pair)) > 1
        )
        same = next(changes, len(before))
        found.append(range(same, len(words)))
        before = words
    return found
