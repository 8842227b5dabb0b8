import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch.multiprocessing as multiprocessing
from hypothesis import given
from hypothesis import strategies as st

from fastguard.speech.data.utterances import SPLITS, Utterance, Utterances

rows = st.lists(
    st.builds(
        Utterance,
        st.text(st.characters()),
        st.text(st.characters()).map(Path),
        st.text(),
        st.sampled_from(SPLITS),
        st.floats(0, 100),
    )
)


def some(count):
    return [
        Utterance(f"id{i}", Path(f"/a/é{i}.wav"), f"text {i}", SPLITS[i % 3], i / 7)
        for i in range(count)
    ]


@given(rows)
def test_nothing_is_lost(rows):
    packed = Utterances(rows)
    assert len(packed) == len(rows)
    assert list(packed) == rows
    assert packed.durations.tolist() == [row.duration for row in rows]
    assert list(pickle.loads(pickle.dumps(packed))) == rows


def test_it_is_a_sequence():
    rows = some(10)
    packed = Utterances(iter(rows))
    assert packed[3] == packed[-7] == rows[3]
    assert list(packed[2:9:3]) == rows[2:9:3]
    assert list(reversed(packed)) == rows[::-1]
    assert rows[4] in packed
    for index in (10, -11):
        with pytest.raises(IndexError):
            packed[index]


def test_selections_share_the_buffer():
    rows = some(10)
    packed = Utterances(rows)
    dev = packed.of_split("dev")
    assert list(dev) == rows[1::3]
    assert list(dev.select(np.array([2, 0]))) == [rows[7], rows[1]]
    assert dev.durations.tolist() == [rows[i].duration for i in (1, 4, 7)]
    assert dev._buffer.data_ptr() == packed._buffer.data_ptr()
    assert list(packed.select([])) == []


def test_durations_are_replaced_where_they_are_selected():
    rows = some(6)
    packed = Utterances(rows)
    changed = packed[1:3].with_durations(np.array([5.0, 6.0]))
    assert [(u.id, u.duration) for u in changed] == [("id1", 5), ("id2", 6)]
    assert list(packed) == rows


def test_utterances_without_a_split_get_that_of_their_text():
    rows = [replace(row, split=None) if i % 2 else row for i, row in enumerate(some(4))]
    packed = Utterances(rows)
    assert [u.id for u in packed.of_split(None)] == ["id1", "id3"]
    filled = packed.with_splits({"text 0": "dev", "text 1": "test", "text 3": "dev"})
    assert [u.split for u in filled] == ["train", "test", "test", "dev"]
    assert list(filled.texts()) == ["text 0", "text 1", "text 2", "text 3"]
    assert list(packed) == rows


def _answer(packed, queue):
    shared = all(t.is_shared() for t in (packed._buffer, packed._ends, packed._durations))
    queue.put((len(packed), packed[-1], float(packed.durations.sum()), shared))


def test_a_spawned_worker_sees_the_same_memory():
    packed = Utterances(some(100))
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    worker = context.Process(target=_answer, args=(packed, queue))
    worker.start()
    assert queue.get(timeout=60) == (100, some(100)[-1], pytest.approx(99 * 50 / 7), True)
    worker.join()
    assert list(packed) == some(100)  # the columns were moved
