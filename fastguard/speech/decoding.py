"""From the model's output to text, and from texts to error rates."""

from collections.abc import Sequence
from dataclasses import dataclass

import jiwer
import torch
from torch import Tensor


def greedy_decode(log_probs: Tensor, lengths: Tensor, blank: int = 0) -> list[list[int]]:
    """Tokens of the likeliest CTC path of each utterance: repeats merged, then blanks dropped.

    ``log_probs`` (B, T, V) in any float dtype, or any scores with the same maxima; ``lengths`` (B,)
    integers, the frames of each utterance; frames after them are not read.  Raises ValueError if
    the shapes do not match or a length is over T.
    """
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
    paths = log_probs.argmax(dim=-1).cpu()
    return [
        [token for token in torch.unique_consecutive(path[:end]).tolist() if token != blank]
        for path, end in zip(paths, frames, strict=True)
    ]


@dataclass(frozen=True)
class ErrorRates:
    """Errors over all utterances, per word and per character of the references; can exceed 1.

    ``words`` counts the references' words; the last three say what went wrong with them.
    """

    wer: float
    cer: float
    words: int
    substitutions: int
    deletions: int
    insertions: int


def error_rates(references: Sequence[str], hypotheses: Sequence[str]) -> ErrorRates:
    """Word and character error rate; an empty hypothesis deletes every word of its reference.

    Raises ValueError if there is nothing to score: no references, an empty one, or another number
    of hypotheses.
    """
    empty = [index for index, text in enumerate(references) if not text.strip()]
    if not references or len(references) != len(hypotheses) or empty:
        raise ValueError(
            f"{len(references)} references (without words: {empty}) and {len(hypotheses)} "
            "hypotheses: give one hypothesis for each, and only references with words"
        )
    words = jiwer.process_words(list(references), list(hypotheses))
    return ErrorRates(
        wer=words.wer,
        cer=jiwer.cer(list(references), list(hypotheses)),
        words=words.hits + words.substitutions + words.deletions,
        substitutions=words.substitutions,
        deletions=words.deletions,
        insertions=words.insertions,
    )
