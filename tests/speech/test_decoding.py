import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastguard.speech.decoding import ErrorRates, error_rates, greedy_decode

VOCABULARY = 5


def collapse(path, blank):
    """The rule of CTC, word for word: a token counts where it is new and not the blank."""
    tokens, before = [], None
    for token in path:
        if token != before and token != blank:
            tokens.append(token)
        before = token
    return tokens


def scores(paths):
    """(B, T, V) log-probabilities whose maxima are the paths, all of one length."""
    one_hot = torch.nn.functional.one_hot(torch.tensor(paths), VOCABULARY)
    return (8.0 * one_hot).log_softmax(dim=-1)


@given(st.data())
def test_greedy_decode_collapses_the_likeliest_path(data):
    frames = data.draw(st.integers(1, 12))
    path = st.lists(st.integers(0, VOCABULARY - 1), min_size=frames, max_size=frames)
    paths = data.draw(st.lists(path, min_size=1, max_size=4))
    lengths = [data.draw(st.integers(0, frames)) for _ in paths]
    blank = data.draw(st.integers(0, VOCABULARY - 1))
    expected = [collapse(path[:end], blank) for path, end in zip(paths, lengths, strict=True)]
    assert greedy_decode(scores(paths), torch.tensor(lengths), blank) == expected


def test_greedy_decode_by_hand():
    log_probs = scores([[0, 3, 3, 0, 3, 4, 4, 0], [2, 2, 2, 1, 1, 4, 4, 4]])
    assert greedy_decode(log_probs, torch.tensor([8, 5])) == [[3, 3, 4], [2, 1]]
    assert greedy_decode(log_probs.bfloat16(), torch.tensor([3, 0])) == [[3], []]


def test_greedy_decode_refuses_lengths_of_the_input():
    with pytest.raises(ValueError, match="lengths up to 9 for 2 frames"):
        greedy_decode(scores([[1, 2], [3, 4]]), torch.tensor([2, 9]))


@pytest.mark.parametrize("shape, lengths", [((2, 5), [2, 2]), ((2, 3, 5), [3]), ((1, 3, 5), [[3]])])
def test_greedy_decode_refuses_other_shapes(shape, lengths):
    with pytest.raises(ValueError, match=r"give \(B, T, V\) and \(B,\)"):
        greedy_decode(torch.zeros(shape), torch.tensor(lengths))


def test_error_rates_by_hand():
    rates = error_rates(["press one now", "bye"], ["press on", "good bye"])
    assert rates == ErrorRates(
        wer=3 / 4,  # on for one, now lost, good added
        cer=10 / 16,  # "e now" lost, "good " added
        words=4,
        substitutions=1,
        deletions=1,
        insertions=1,
    )


def test_errors_are_pooled_over_utterances_not_averaged():
    assert error_rates(["a", "b c d"], ["x", "b c d"]).wer == 1 / 4


def test_no_hypothesis_at_all_deletes_every_word():
    rates = error_rates(["press one", "now"], ["", ""])
    assert (rates.wer, rates.cer, rates.deletions, rates.insertions) == (1.0, 1.0, 3, 0)


def test_perfect_hypotheses():
    rates = error_rates(["o'clock", "été"], ["o'clock", "été"])
    assert (rates.wer, rates.cer, rates.words) == (0.0, 0.0, 2)


@pytest.mark.parametrize(
    "references, hypotheses", [([], []), (["a"], []), (["a", " "], ["a", "b"])]
)
def test_nothing_to_score(references, hypotheses):
    with pytest.raises(ValueError, match="only references with words"):
        error_rates(references, hypotheses)
