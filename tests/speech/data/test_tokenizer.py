import pickle
import re
import string
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastguard.speech.data.tokenizer import (
    BLANK,
    CharTokenizer,
    build_tokenizer,
    tokenizer_from_dict,
)

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


def test_as_many_symbols_as_there_are_take_a_moment():
    symbols = [BLANK, *map(chr, range(0x10000, 0x60000))]  # 327,680; their square took an hour
    assert CharTokenizer(symbols).vocab_size == len(symbols)
    with pytest.raises(ValueError) as error:
        CharTokenizer([*symbols, *symbols[1:]])
    assert len(str(error.value)) < 200


# --- pieces of words -----------------------------------------------------------------------------

SENTENCES = [
    f"{who} {does} {what}"
    for who in ("the cat", "no one", "it's o'clock", "été")
    for does in ("sat on", "is", "presses")
    for what in ("the mat", "home tonight", "the pound key")
]
kinds = pytest.mark.parametrize("kind", ["unigram", "bpe"])


@cache
def pieces(kind, vocab_size=30):
    return build_tokenizer(kind, SENTENCES, vocab_size)


@kinds
def test_pieces_are_fewer_than_characters(kind):
    tokenizer = pieces(kind)
    assert tokenizer.vocab_size == len(tokenizer.symbols) == 30
    assert tokenizer.symbols[0] == BLANK
    for text in SENTENCES:
        tokens = tokenizer.encode(text)
        assert len(tokens) < len(text)
        assert all(0 < token < 30 for token in tokens)
        assert tokenizer.decode(tokens) == text


@given(st.text(" 'acehiknoprstuxyé"), st.sampled_from(["unigram", "bpe"]))
def test_pieces_spell_every_text_of_known_characters(text, kind):
    try:
        tokens = pieces(kind).encode(text)
    except ValueError as error:
        assert "'x'" in str(error) and "x" in text
    else:
        assert "x" not in text
        assert pieces(kind).decode(tokens) == text


@kinds
def test_unknown_pieces_are_named(kind):
    with pytest.raises(ValueError, match=r"\['q', 'ß', '▁'\] in 'the q▁ß'"):
        pieces(kind).encode("the q▁ß")


@kinds
@pytest.mark.parametrize("token", [0, -1, 30])
def test_the_blank_and_unknown_tokens_are_not_pieces(kind, token):
    with pytest.raises(ValueError, match=rf"\[{token}\].*between 1 and 29"):
        pieces(kind).decode([3, token])


@kinds
def test_training_is_deterministic(kind):
    state = pieces(kind).to_dict()
    again = build_tokenizer(kind, iter(SENTENCES), 30).to_dict()
    assert torch.equal(state["model"], again["model"])


def test_the_kinds_differ():
    assert pieces("unigram").symbols != pieces("bpe").symbols


@pytest.mark.parametrize("kind", ["char", "unigram", "bpe"])
def test_checkpoints_restore_a_tokenizer_of_any_kind(tmp_path, kind):
    tokenizer = build_tokenizer(kind, SENTENCES, 30)
    torch.save(tokenizer.to_dict(), tmp_path / "state.pt")
    restored = tokenizer_from_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert type(restored) is type(tokenizer)
    assert [*map(restored.encode, SENTENCES)] == [*map(tokenizer.encode, SENTENCES)]
    sent = pickle.loads(pickle.dumps(tokenizer))  # as to a worker
    assert [*map(sent.encode, SENTENCES)] == [*map(tokenizer.encode, SENTENCES)]


def test_states_without_a_kind_are_of_characters():
    assert tokenizer_from_dict({"symbols": [BLANK, "a", "b"]}).encode("ba") == [2, 1]


@pytest.mark.parametrize(
    "state",
    [{"kind": "words"}, {"kind": "sentencepiece", "model": torch.ones(9, dtype=torch.uint8)}],
)
def test_foreign_states_are_refused(state):
    with pytest.raises(ValueError, match=r"unknown tokenizer 'words'|not a sentencepiece model"):
        tokenizer_from_dict(state)


@kinds
def test_a_vocabulary_has_bounds_that_are_named(kind):
    with pytest.raises(ValueError, match=r"vocab_size is 5000: .* at most \d+ pieces") as high:
        build_tokenizer(kind, SENTENCES, 5000)
    most = int(re.search(r"at most (\d+)", str(high.value))[1])
    assert build_tokenizer(kind, SENTENCES, most).vocab_size == most
    with pytest.raises(ValueError, match=r"vocab_size is 5: the characters .* need 22"):
        build_tokenizer(kind, SENTENCES, 5)
    with pytest.raises(ValueError, match="a model of vocab_size 60"):
        build_tokenizer(kind, [], 60)
