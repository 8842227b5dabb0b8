import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastguard.speech.tokenizer import BLANK, CharTokenizer

texts = st.lists(st.text(), min_size=1)


@given(texts)
def test_round_trip_of_the_texts_it_was_built_from(texts):
    tokenizer = CharTokenizer.from_texts(texts)
    for text in texts:
        tokens = tokenizer.encode(text)
        assert len(tokens) == len(text)
        assert all(0 < token < tokenizer.vocab_size for token in tokens)
        assert tokenizer.decode(tokens) == text


@given(texts)
def test_checkpoints_restore_the_same_tokens(texts):
    tokenizer = CharTokenizer.from_texts(texts)
    restored = CharTokenizer.from_dict(tokenizer.to_dict())
    assert restored.symbols == tokenizer.symbols
    assert [*map(restored.encode, texts)] == [*map(tokenizer.encode, texts)]


def test_symbols_do_not_depend_on_the_order_or_number_of_texts():
    assert CharTokenizer.from_texts(["été", "oui"]).symbols == (
        CharTokenizer.from_texts(["oui", "oui", "été"]).symbols
    )


def test_english_needs_no_text():
    tokenizer = CharTokenizer.from_texts([])
    assert tokenizer.symbols == [BLANK, " ", "'", *string.ascii_lowercase]
    assert tokenizer.vocab_size == 29
    assert tokenizer.encode("a b") == [3, 1, 4]


def test_unknown_characters_are_named():
    with pytest.raises(ValueError, match=r"\['É', 'ß'\] in 'aÉßa'.*normalize"):
        CharTokenizer.from_texts([]).encode("aÉßa")


@pytest.mark.parametrize("token", [0, -1, 29])
def test_the_blank_and_unknown_tokens_are_not_text(token):
    with pytest.raises(ValueError, match=rf"\[{token}\].*between 1 and 28"):
        CharTokenizer.from_texts([]).decode([3, token])


@pytest.mark.parametrize("symbols", [["a", "b"], [], [BLANK, "ab"], [BLANK, "a", "a"], [BLANK, ""]])
def test_bad_symbols_are_refused(symbols):
    with pytest.raises(ValueError, match="symbols"):
        CharTokenizer(symbols)
