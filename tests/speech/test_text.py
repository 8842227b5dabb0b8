import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastguard.speech.text import drop_notes, needs_english, normalize_text

# Letters, marks and everything that the rules treat apart, so that the rules meet one another.
raw_texts = st.text(st.one_of(st.characters(), st.sampled_from(" \n'’[]()<>*#.-3é\u0301A.MΣİ")))


@pytest.mark.parametrize(
    "raw, spoken",
    [
        ("Hello, World!", "hello world"),
        ("  press \t star\n", "press star"),
        ("A.M.", "a m"),
        ("o'clock", "o'clock"),
        ("the caller’s 'quoted' words'", "the caller's quoted words"),
        ("touch-tone/keypad", "touch tone keypad"),
        ("3D audio", "three d audio"),
        ("press 4 or 6", "press four or six"),
        ("dial 42", "dial four two"),
        ("press *, then #", "press star then pound"),
        ("ACTIVÉ e\u0301te\u0301", "activé été"),
        ("Нажмите", "нажмите"),
        ("हिन्दी!", "हिन्दी"),
        ("at [@]", "at"),
        ("[ascending tones]", ""),
        ("<beep>", ""),
        ("before (a [nested] note) after", "before after"),
        ("leave a message (simple tone", "leave a message"),
        ("open (note\nnext line", "open next line"),
        ("", ""),
        ("...", ""),
    ],
)
def test_examples(raw, spoken):
    assert normalize_text(raw) == spoken


@given(raw_texts)
def test_normalizing_again_changes_nothing(raw):
    once = normalize_text(raw)
    assert normalize_text(once) == once


@given(raw_texts)
def test_only_letters_marks_apostrophes_and_single_spaces_remain(raw):
    text = normalize_text(raw)
    assert text == " ".join(text.split())
    assert all(c in " '" or unicodedata.category(c)[0] in "LM" for c in text)
    assert unicodedata.is_normalized("NFC", text)


@given(raw_texts)
def test_without_english_no_letter_is_added(raw):
    if not needs_english(raw):
        assert len(normalize_text(raw)) <= len(unicodedata.normalize("NFD", raw.lower()))


@pytest.mark.parametrize(
    "raw, expected",
    [
        ("marque 1", True),
        ("touche #", True),
        ("oprima *", True),
        ("¿qué?", False),
        ("ñ (3)", False),
    ],
)
def test_needs_english(raw, expected):
    assert needs_english(raw) is expected


def test_drop_notes_keeps_the_rest_as_it_is():
    assert drop_notes("Hello [x]World").split() == ["Hello", "World"]
    assert drop_notes("I.B.M. 3") == "I.B.M. 3"
