import pytest
import torch

from fastguard.speech.data.tokenizer import BLANK, CharTokenizer
from fastguard.speech.recognition.alignment import Word, word_times, words_of
from fastguard.speech.recognition.decoding import greedy_decode

TOKENIZER = CharTokenizer([BLANK, " ", "a", "b"])


def scores(path, probability=0.7):
    """(T, V) log-probabilities in which the path's tokens have this probability."""
    rest = (1 - probability) / (TOKENIZER.vocab_size - 1)
    probabilities = torch.full((len(path), TOKENIZER.vocab_size), rest)
    probabilities[torch.arange(len(path)), torch.tensor(path)] = probability
    return probabilities.log()


def test_words_of_a_greedy_path_have_its_frames():
    path = [0, 2, 2, 0, 3, 1, 1, 0, 3, 0, 3, 3, 0]  # "ab bb"
    log_probs = scores(path)
    tokens = greedy_decode(log_probs[None], torch.tensor([len(path)]))[0]
    found = word_times(log_probs, tokens, TOKENIZER, 0.04, start=2.0)
    assert [(word.word, word.start, word.end) for word in found] == [
        ("ab", pytest.approx(2.04), pytest.approx(2.2)),
        ("bb", pytest.approx(2.32), pytest.approx(2.48)),
    ]
    assert [word.confidence for word in found] == pytest.approx([0.7, 0.7])


def test_a_hypothesis_that_is_not_the_likeliest_path_has_its_own_probability():
    log_probs = scores([2, 0, 3])
    (word,) = word_times(log_probs, TOKENIZER.encode("aa"), TOKENIZER, 1.0)
    assert (word.word, word.start, word.end) == ("aa", 0.0, 3.0)
    assert word.confidence == pytest.approx((0.7 + 0.1) / 2)


def test_nothing_said():
    assert word_times(scores([0, 0]), [], TOKENIZER, 1.0) == []
    assert word_times(scores([1, 1]), [1], TOKENIZER, 1.0) == []


def test_too_few_frames():
    with pytest.raises(RuntimeError, match="too long for CTC"):
        word_times(scores([2, 2]), [2, 2], TOKENIZER, 1.0)


def test_spaces_belong_to_no_word():
    tokens = TOKENIZER.encode(" ab  a ")
    assert list(map(list, words_of(tokens, TOKENIZER))) == [[], [0], [0], [], [], [1], []]


class Pieces:
    """Pieces that begin a word carry its space, as SentencePiece's do; one holds two words."""

    symbols = (BLANK, "▁a", "b", "▁", "▁a▁b")

    def decode(self, tokens):
        return "".join(self.symbols[token] for token in tokens).replace("▁", " ").strip()


def test_words_of_pieces():
    assert list(map(list, words_of([1, 2, 3, 2, 4], Pieces()))) == [[0], [0], [], [1], [2, 3]]
    log_probs = torch.full((5, 5), 0.05)
    log_probs[range(5), [1, 0, 4, 4, 0]] = 0.8
    found = word_times(log_probs.log(), [1, 4], Pieces(), 1.0)
    assert found[0] == Word("a", 0.0, 1.0, pytest.approx(0.8))
    assert [(w.word, w.start, w.end) for w in found[1:]] == [("a", 2.0, 4.0), ("b", 2.0, 4.0)]
