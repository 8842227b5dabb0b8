import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastguard.speech.data.text import (
    TextError,
    TextRules,
    drop_notes,
    needs_english,
    normalize_text,
    normalized,
    spell_keys,
)

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
        ("3D audio, 1984", "3d audio 1984"),
        ("J'ai 3 chats", "j'ai 3 chats"),
        ("press *, then #", "press then"),
        ("it was cold :( but ok", "it was cold but ok"),
        ("it was :( cold but ok :)", "it was cold but ok"),
        ("cold ( or so", "cold or so"),
        ("(a [b) c] d", "c d"),
        ("if a < b and c > d", "if a b and c d"),
        ("Straße İzmir ΛΟΓΟΣ", "straße izmir λογος"),
        ("co\u00adoperate \u200bze\u200dro\u2060 wid\ufe0fth", "cooperate zero width"),
        ("\ufb01ne \uff21\uff22\uff13", "fine ab3"),
        ("it\u00b4s don`t", "it's don't"),
        ("ACTIVÉ e\u0301te\u0301", "activé été"),
        ("Нажмите", "нажмите"),
        ("हिन्दी!", "हिन्दी"),
        ("at [@]", "at"),
        ("[ascending tones]", ""),
        ("<beep>", ""),
        ("before (a [nested] note) after", "before after"),
        ("leave a message (simple tone", "leave a message simple tone"),
        ("open (note\nnext line) more", "open more"),
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
    assert all(c in " '" or unicodedata.category(c)[0] in "LM" or c.isdecimal() for c in text)
    assert unicodedata.is_normalized("NFKC", text)


@given(raw_texts)
def test_no_letter_is_added(raw):
    assert len(normalize_text(raw)) <= len(unicodedata.normalize("NFKD", raw.lower()))


@given(raw_texts)
def test_what_is_changed_is_told(raw):
    text, changed = normalized(raw, TextRules())
    assert bool(changed) == (text != " ".join(raw.split()))


@pytest.mark.parametrize(
    "raw, kinds",
    [
        ("as it is", set()),
        ("Case", {"case"}),
        ("a, b", {"marks"}),
        ("a (b) C", {"brackets", "case"}),
        ("so\u00adft", {"joiners"}),
        ("\ufb01ne", {"unicode"}),
    ],
)
def test_each_change_has_a_name(raw, kinds):
    assert normalized(raw, TextRules())[1] == kinds


@pytest.mark.parametrize(
    "rules, raw, spoken",
    [
        ({"case": "keep"}, "It's Ok", "It's Ok"),
        ({"brackets": "keep"}, "a (b) <c>", "a b c"),
        ({"unicode": "NFC"}, "\ufb01ne", "\ufb01ne"),
        ({"language": "tr"}, "ISPARTA İZMİR", "\u0131sparta izmir"),
        ({"language": "en"}, "İ I", "i i"),
        ({"numbers": "words"}, "I have 3 cats, and 42.", "i have three cats and forty two"),
        ({"numbers": "words"}, "it is 28.5 wide", "it is twenty eight point five wide"),
        ({"numbers": "words", "language": "fr"}, "J'ai 3 chats", "j'ai trois chats"),
        ({"numbers": "words", "language": "de"}, "42 Tage", "zweiundvierzig tage"),
        ({"numbers": "reject"}, "no number", "no number"),
        ({"brackets": "reject"}, "no note :)", "no note"),
    ],
)
def test_rules(rules, raw, spoken):
    assert normalize_text(raw, TextRules(**rules)) == spoken


@pytest.mark.parametrize(
    "rules, raw, reason",
    [
        ({"numbers": "reject"}, "it is 3 h", "number in digits: in 'it is 3 h'; write it as"),
        ({"brackets": "reject"}, "a (b)", r"note in brackets: in 'a \(b\)'"),
        ({"numbers": "words"}, "3D", "number not spelled: '3D' is not only a number"),
        ({"numbers": "words"}, "costs $3", r"number not spelled: '\$3'"),
        ({"numbers": "words"}, "3 % of it", "number not spelled: '3'"),
        ({"numbers": "words"}, "at 10:30", "number not spelled: '10:30'"),
        ({"numbers": "words"}, "1,000 of them", "number not spelled: '1,000'"),
        ({"numbers": "words"}, "agent 007", "number not spelled: '007'"),
        ({"numbers": "words"}, "\u0663", "number not spelled"),
        ({"numbers": "words"}, 9_000 * "9", "has 9000 digits, over 15"),
        ({"numbers": "words", "language": "xx"}, "3", "'xx' has no words for 3; .* text.language"),
    ],
)
def test_what_the_rules_refuse(rules, raw, reason):
    with pytest.raises(TextError, match=reason) as error:
        normalize_text(raw, TextRules(**rules))
    assert len(str(error.value)) < 200


def test_rules_are_checked():
    with pytest.raises(
        ValueError, match=r"text\.numbers is 'drop': choose one of keep, reject, words"
    ):
        TextRules(numbers="drop")
    with pytest.raises(ValueError, match=r"text\.language is 'english'"):
        TextRules(language="english")
    with pytest.raises(TextError, match="'xx' has no words"):
        TextRules(numbers="words", language="xx").check()


def test_keys_of_a_telephone():
    assert spell_keys("press 4, then 42#").split() == [
        "press",
        "four",
        ",",
        "then",
        "four",
        "two",
        "pound",
    ]


@pytest.mark.parametrize("raw", ["(" * 1_000_000, "([<" * 300_000 + ")" * 300_000, "1" * 1_000_000])
def test_a_long_text_takes_its_length(raw):
    """A million characters; what took the square of them would take hours."""
    normalize_text(raw)
    normalize_text(raw, TextRules(brackets="keep", unicode="NFC"))


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
