import gzip
import math
import os
import sys
from collections import defaultdict
from functools import cache
from itertools import pairwise, product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastguard._extras import MissingExtra
from fastguard.speech.data.tokenizer import BLANK, CharTokenizer
from fastguard.speech.recognition.decoding import BeamSearch, greedy_decode

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


# --- beam search ----------------------------------------------------------------------------------

TOKENIZER = CharTokenizer([BLANK, " ", "a", "b"])

WORD_LM = """\\data\\
ngram 1=6
ngram 2=5

\\1-grams:
-99\t<s>\t-0.3
-1.0\t</s>
-2.5\t<unk>
-0.9\ta\t-0.2
-0.6\tab\t-0.3
-0.7\tbba\t-0.1

\\2-grams:
-0.5\t<s> a
-0.4\ta ab
-0.2\tab </s>
-0.9\tab bba
-0.3\tbba a

\\end\\
"""

TOKEN_LM = """\\data\\
ngram 1=6
ngram 2=5

\\1-grams:
-99\t<s>\t-0.3
-1.0\t</s>
-2.5\t<unk>
-0.9\ta\t-0.2
-0.6\tb\t-0.3
-0.7\t|\t-0.1

\\2-grams:
-0.5\t<s> a
-0.4\ta b
-0.2\tb </s>
-0.9\tb |
-0.3\t| a

\\end\\
"""


@pytest.fixture
def files(tmp_path):
    pytest.importorskip("flashlight.lib.text.decoder")
    (tmp_path / "words.arpa").write_text(WORD_LM)
    (tmp_path / "tokens.arpa").write_text(TOKEN_LM)
    (tmp_path / "words.txt").write_text("a\nAB 17\n\nbba\nxyz\n<s>\n")
    return tmp_path


def log10_of(arpa, words):
    """Katz's back-off, read from the text of the model."""
    rows = [line.split("\t") for line in arpa.splitlines() if "\t" in line]
    scores = {row[1]: float(row[0]) for row in rows}
    backoffs = {row[1]: float(row[2]) for row in rows if len(row) > 2}
    total = 0.0
    for before, word in pairwise(["<s>", *words, "</s>"]):
        pair = f"{before} {word}"
        total += scores[pair] if pair in scores else backoffs.get(before, 0.0) + scores[word]
    return total


@cache
def all_paths(frames):
    paths = list(product(range(TOKENIZER.vocab_size), repeat=frames))
    return torch.tensor(paths), [TOKENIZER.decode(collapse(path, 0)) for path in paths]


def labellings(log_probs):
    """The probability of every text that the frames allow, over all paths."""
    paths, texts = all_paths(len(log_probs))
    found = defaultdict(float)
    probabilities = log_probs.double().gather(1, paths.T).sum(dim=0).exp()
    for text, probability in zip(texts, probabilities.tolist(), strict=True):
        found[text] += probability
    return {text: probability for text, probability in found.items() if probability > 0}


def drawn(count, frames=6):
    torch.manual_seed(0)
    return (2 * torch.randn(count, frames, TOKENIZER.vocab_size)).log_softmax(dim=-1)


def beam_texts(search, log_probs):
    lengths = torch.full((len(log_probs),), log_probs.shape[1])
    return [TOKENIZER.decode(tokens) for tokens in search(log_probs, lengths)]


def test_beam_search_finds_the_likeliest_labelling(files):
    log_probs = drawn(60)
    sums = [labellings(row) for row in log_probs]
    best = [max(found, key=found.get) for found in sums]
    assert beam_texts(BeamSearch(TOKENIZER, 500), log_probs) == best
    greedy = map(TOKENIZER.decode, greedy_decode(log_probs, torch.full((60,), 6)))
    assert sum(a != b for a, b in zip(greedy, best, strict=True)) > 10


def test_beam_search_with_a_language_model_over_tokens(files):
    search = BeamSearch(TOKENIZER, 500, lm=files / "tokens.arpa", lm_weight=1.5)
    log_probs = drawn(60)
    best = []
    for found in map(labellings, log_probs):
        scores = {
            text: math.log(p) + 1.5 * log10_of(TOKEN_LM, text.replace(" ", "|"))
            for text, p in found.items()
        }
        best.append(max(scores, key=scores.get))
    assert beam_texts(search, log_probs) == best


@pytest.mark.parametrize("lm_weight", [None, 1.5])
def test_beam_search_over_the_words_of_a_lexicon(files, lm_weight):
    """Spaces may repeat, or stand at the ends."""
    model = {} if lm_weight is None else {"lm": files / "words.arpa", "lm_weight": lm_weight}
    lexicon = files / "words.txt"
    lexicon.write_text(lexicon.read_text().replace("AB", "ab"))
    search = BeamSearch(TOKENIZER, 500, lexicon=lexicon, word_score=-0.3, **model)
    log_probs = drawn(60)
    best = []
    for found in map(labellings, log_probs):
        sums = defaultdict(float)
        for text, p in found.items():
            if set(text.split()) <= {"a", "ab", "bba"}:
                sums[" ".join(text.split())] += p
        scores = {
            text: math.log(p)
            - 0.3 * len(text.split())
            + (lm_weight or 0) * log10_of(WORD_LM, text.split())
            for text, p in sums.items()
        }
        best.append(max(scores, key=scores.get))
    assert beam_texts(search, log_probs) == best


def test_words_of_a_lexicon_are_spelled_as_texts_are_normalised(files):
    log_probs = scores([[2, 3, 1, 1, 3, 0, 3, 2]])[..., :4]
    search = BeamSearch(TOKENIZER, lexicon=files / "words.txt")
    assert beam_texts(search, log_probs) == ["ab bba"]


def test_a_word_that_is_not_finished_does_not_come_out(files):
    (files / "words.txt").write_text("bba")
    search = BeamSearch(TOKENIZER, lexicon=files / "words.txt")
    assert beam_texts(search, scores([[3, 0, 3]])[..., :4]) == [""]
    assert beam_texts(search, scores([[3, 0, 3, 2]])[..., :4]) == ["bba"]


def test_beam_search_reads_no_frame_after_the_end_and_any_float_dtype(files):
    search = BeamSearch(TOKENIZER)
    log_probs = drawn(3, frames=9)
    lengths = torch.tensor([9, 4, 0])
    alone = [
        search(row[None, :end], torch.tensor([end]))[0]
        for row, end in zip(log_probs, lengths, strict=True)
    ]
    log_probs[1, 4:] = log_probs[2] = math.nan
    assert search(log_probs, lengths) == alone
    assert search(log_probs.double(), lengths) == alone
    assert alone[2] == []


def test_an_impossible_token_is_not_a_nan(files):
    log_probs = drawn(1)
    log_probs[..., 3] = -math.inf
    sums = labellings(log_probs[0])
    assert beam_texts(BeamSearch(TOKENIZER, 500), log_probs) == [max(sums, key=sums.get)]


def test_beam_search_refuses_nan_and_other_shapes(files):
    search = BeamSearch(TOKENIZER)
    with pytest.raises(ValueError, match="NaN"):
        search(torch.full((1, 2, 4), math.nan), torch.tensor([2]))
    with pytest.raises(ValueError, match="lengths up to 3 for 2 frames"):
        search(torch.zeros(1, 2, 4), torch.tensor([3]))


@pytest.mark.parametrize(
    "options, cause",
    [
        ({"beam_size": 0}, "beam_size is 0"),
        ({"lm": "absent"}, "absent cannot be used as a language model"),
        ({"lm": "words.txt"}, "words.txt cannot be used as a language model"),
        ({"lm": "fifo"}, "fifo cannot be used as a language model: .* is a FIFO"),
        ({"lm": "binary"}, "is a binary file of KenLM, which is not checked; .* --lm-binary"),
        (
            {"lm": "words.arpa", "lm_binary": True},
            "not a binary file of KenLM; leave out --lm-binary",
        ),
        ({"lm": "bomb"}, "it claims 999999999999 n-grams, more than fit into 53 bytes"),
        ({"lm": "packed"}, "not an ARPA file, .* decompress"),
        ({"lexicon": "fifo"}, "fifo cannot be read as a lexicon: .* is a FIFO"),
        ({"lm": "words.arpa"}, r"words.arpa does not have the tokens \| b"),
        ({"lm": "words.arpa", "lexicon": "upper.txt"}, "words.arpa has no word of the lexicon"),
        ({"lexicon": "absent"}, "absent cannot be read as a lexicon"),
        ({"lexicon": "foreign.txt"}, "none of 2 words can be spelled"),
    ],
)
def test_files_that_can_not_be_used(files, options, cause):
    os.mkfifo(files / "fifo")
    (files / "binary").write_bytes(b"mmap lm http://kheafield.com/code format version 5\n\0" * 9)
    bomb = "\\data\\\nngram 1=999999999999\n\n\\1-grams:\n-1.0\ta\n\n\\end\\\n"
    (files / "bomb").write_text(bomb)
    (files / "packed").write_bytes(gzip.compress(WORD_LM.encode()))
    (files / "foreign.txt").write_text("été\nдом\n")
    (files / "upper.txt").write_text("A\nAB\n")
    options = {k: files / v if isinstance(v, str) else v for k, v in options.items()}
    with pytest.raises(ValueError, match=cause):
        BeamSearch(TOKENIZER, **options)


def test_a_lexicon_needs_a_space(files):
    with pytest.raises(ValueError, match="needs a tokenizer of characters with a space"):
        BeamSearch(CharTokenizer([BLANK, "a", "b"]), lexicon=files / "words.txt")


def test_without_flashlight_it_says_what_to_install(monkeypatch):
    import torchaudio.models.decoder as decoder

    for name in ("ctc_decoder", "_ctc_decoder"):
        monkeypatch.delattr(decoder, name, raising=False)
    monkeypatch.setitem(sys.modules, "torchaudio.models.decoder._ctc_decoder", None)
    with pytest.raises(MissingExtra, match=r"pip install 'torch-fastguard\[beam\]'"):
        BeamSearch(TOKENIZER)
