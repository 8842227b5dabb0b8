"""How sentences are assigned to the train, dev and test splits."""

from collections import Counter, defaultdict
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from fastguard.speech.data.corpora import assign_splits


@given(st.sets(st.text("ab ", min_size=1).filter(str.strip), max_size=120), st.randoms())
def test_splits_are_a_tenth_of_each_length(texts, shuffle):
    splits = assign_splits(texts)
    assert splits.keys() == texts
    counts = defaultdict(Counter)
    for text, split in splits.items():
        words = len(text.split())
        counts[min(words, 4) if words != 3 else 2][split] += 1
    for stratum in counts.values():
        for name in ("dev", "test"):
            assert abs(stratum[name] - stratum.total() / 10) <= 0.5
    shuffled = sorted(texts)
    shuffle.shuffle(shuffled)
    assert assign_splits(shuffled + shuffled) == splits


def test_a_new_sentence_moves_few_others():
    texts = [f"sentence number {i}" for i in range(300)]
    before = assign_splits(texts)
    after = assign_splits([*texts, "one more"])
    assert sum(before[text] != after[text] for text in texts) <= 2


def test_splits_are_no_run_of_the_alphabet():
    texts = [f"sentence number {i:03}" for i in range(300)]
    splits = [split for _, split in sorted(assign_splits(texts).items())]
    assert sum(a != b for a, b in pairwise(splits)) > 50
