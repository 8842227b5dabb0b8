"""Drawn ARPA files, whose bodies KenLM reads: a decoder that works, or one line. No crash, no hang.

Each is read in a process of its own, since a fault of native code would end this one.
"""

import os
import resource
import signal
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastguard.speech.recognition.decoding import BeamSearch
from tests.speech.test_readers_fuzzed import damaged

from .test_decoding import TOKEN_LM, TOKENIZER, WORD_LM

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="memory is bounded as on Linux"),
]
pytest.importorskip("flashlight.lib.text.decoder")
FUZZED = settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
SECONDS, MEMORY = 20, 1 << 30
READ, REFUSED, WRONG = 0, 10, 11

NUMBERS = st.sampled_from(
    ["0", "-0", "1", "-99", "nan", "inf", "-inf", "1e400", "-1e-400", "", "x", "9" * 400, "-0.5"]
)
WORDS = st.sampled_from(
    [
        "a",
        "b",
        "|",
        "<s>",
        "</s>",
        "<unk>",
        "<UNK>",
        "",
        "é",
        "\ud83d\ude00",
        "a" * 5000,
        "\0",
        "\x1b[2J",
    ]
)


@st.composite
def lines(draw):
    """A line as of an n-gram, with odd numbers, words and gaps."""
    gap = draw(st.sampled_from(["\t", " ", "\t\t", "\r", ""]))
    words = draw(st.lists(WORDS, max_size=4))
    return gap.join([draw(NUMBERS), " ".join(words), draw(NUMBERS)])


@st.composite
def bodies(draw, whole):
    """The file with lines of its body replaced, dropped, doubled or put elsewhere."""
    rows = whole.split("\n")
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(1, len(rows) - 1))
        how = draw(st.sampled_from(["replace", "drop", "double", "move", "count", "section"]))
        if how == "replace":
            rows[at] = draw(lines())
        elif how == "drop":
            del rows[at]
        elif how == "double":
            rows[at:at] = rows[at : at + draw(st.integers(1, 5))]
        elif how == "move":
            rows.insert(draw(st.integers(1, len(rows) - 1)), rows.pop(at))
        elif how == "count":
            order, count = draw(st.integers(-1, 9)), draw(st.sampled_from([0, 1, 5, 6, 7, 20]))
            rows.insert(at, f"ngram {order}={count}")
        else:
            rows.insert(at, draw(st.sampled_from(["\\1-grams:", "\\2-grams:", "\\3-grams:",
                                                  "\\end\\", "\\data\\"])))  # fmt: skip
        if len(rows) < 2:
            break
    return "\n".join(rows).encode("utf-8", "surrogatepass")


def read(path, lexicon):
    """What becomes of a file, in a process of its own: one of the three, or of a signal."""
    pid = os.fork()
    if pid == 0:
        status = WRONG
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            signal.alarm(SECONDS)
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY,) * 2)
            search = BeamSearch(TOKENIZER, 5, lm=path, lexicon=lexicon)
            search(torch.randn(1, 6, 4).log_softmax(-1), torch.tensor([6]))
            status = READ
        except ValueError as error:
            one_line = str(error).isprintable() and len(str(error)) < 1_000
            status = REFUSED if one_line else WRONG
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@FUZZED
@given(data=st.data())
def test_language_models(tmp_path, data):
    whole, words = data.draw(st.sampled_from([(TOKEN_LM, False), (WORD_LM, True)]))
    content = data.draw(bodies(whole))
    if data.draw(st.booleans()):
        content = damaged(data.draw, content)
    (tmp_path / "a.arpa").write_bytes(content)
    (tmp_path / "words.txt").write_text("a\nab\nbba\n")
    found = read(tmp_path / "a.arpa", tmp_path / "words.txt" if words else None)
    assert found in (READ, REFUSED), content


@pytest.mark.parametrize("whole, words", [(TOKEN_LM, False), (WORD_LM, True)])
def test_a_whole_one_is_read(tmp_path, whole, words):
    (tmp_path / "a.arpa").write_text(whole)
    (tmp_path / "words.txt").write_text("a\nab\nbba\n")
    assert read(tmp_path / "a.arpa", tmp_path / "words.txt" if words else None) == READ
