"""Subtitles and CTM, read by other programs than ours."""

import itertools

import pysubs2
import pytest

from fastguard.speech.recognition.alignment import Word
from fastguard.speech.recognition.captions import ctm, srt, subtitles, vtt


def spoken(text, gap=0.1, start=0.0):
    """The words of a text, each 0.3 s long."""
    return [
        Word(word, start + i * (0.3 + gap), start + i * (0.3 + gap) + 0.3, 0.5)
        for i, word in enumerate(text.split())
    ]


LONG = " ".join(f"word{i}" for i in range(200))


@pytest.mark.parametrize("write, kind", [(srt, "srt"), (vtt, "vtt")])
def test_another_program_reads_what_was_written(write, kind):
    words = [*spoken(LONG), *spoken("after an hour <i>&amp; -- <b", start=3661.5)]
    found = pysubs2.SSAFile.from_string(write(words), format_=kind)
    expected = subtitles(words)
    assert len(found) == len(expected)
    for ours, theirs in zip(expected, found, strict=True):
        assert (theirs.start, theirs.end) == (round(1000 * ours.start), round(1000 * ours.end))
    assert found[0].plaintext.split() == LONG.split()[: len(found[0].plaintext.split())]
    assert found[-1].start == 3_661_500


def test_subtitles_hold_all_words_within_their_bounds():
    words = [*spoken(LONG), *spoken("next sentence", start=90.0)]
    found = subtitles(words)
    assert " ".join(line for each in found for line in each.lines).split() == [
        word.word for word in words
    ]
    assert all(len(each.lines) <= 2 for each in found)
    assert all(len(line) <= 42 for each in found for line in each.lines)
    assert all(1.0 <= each.end - each.start <= 7.0 for each in found)
    assert found[-1].lines == ["next sentence"]
    assert all(a.end <= b.start for a, b in itertools.pairwise(found))


def test_a_pause_ends_a_subtitle_and_a_short_one_ends_before_the_next():
    assert len(subtitles(spoken("a b c", gap=1.2))) == 3
    long = [Word("x" * 50, 0.0, 0.1, 1.0), Word("y" * 50, 0.2, 0.3, 1.0)]
    one, two = subtitles([*long, Word("z" * 90, 0.5, 0.9, 1.0)])
    assert (one.end, two.start, two.end) == (0.5, 0.5, 1.5)
    assert (one.lines, two.lines) == (["x" * 50, "y" * 50], ["z" * 90])


def test_markup_and_arrows_in_words_are_text():
    assert "&lt;b&gt; --&gt; &amp;amp;" in vtt(spoken("<b> --> &amp;"))
    assert srt(spoken("a --> b")).splitlines()[2] == "a -> b"


def test_no_words():
    assert (srt([]), vtt([]), ctm([], "a")) == ("", "WEBVTT\n\n", "")


def test_times_near_the_next_second_are_rounded():
    assert "00:01:00,000 --> 00:01:01,000" in srt([Word("a", 59.9996, 60.5, 1.0)])


def test_ctm_has_six_fields_a_word():
    lines = ctm(spoken("so it is"), "my call", channel=1).splitlines()
    assert lines[1] == "my_call 2 0.400 0.300 it 0.500"
    assert all(len(line.split(" ")) == 6 for line in lines)
