import json
import logging
import math

import jiwer
import pytest
import torch

from fastguard.speech.data.batching import Batch
from fastguard.speech.data.readers import Rejected
from fastguard.speech.data.tokenizer import CharTokenizer
from fastguard.speech.recognition.evaluation import (
    ErrorRates,
    Evaluation,
    alignment,
    evaluate,
    pooled,
    score,
    wer_interval,
    write,
)

TOKENIZER = CharTokenizer.from_texts([])
REFERENCES = ["press one now please", "bye", "the été line is busy"]
HYPOTHESES = ["press on now uh please", "", "the line is busy"]


def batches(references, hypotheses):
    """Batches of two whose features are the log_probs that spell the hypotheses."""
    for start in range(0, len(references), 2):
        texts, said = references[start : start + 2], hypotheses[start : start + 2]
        paths = [[t for token in TOKENIZER.encode(text) for t in (token, 0)] for text in said]
        log_probs = torch.full((len(texts), max(map(len, paths)) + 3, TOKENIZER.vocab_size), -9.0)
        for row, path in zip(log_probs, paths, strict=True):
            row[range(len(path)), path] = 0.0
            row[len(path) :] = math.nan
        ids = [f"id{start + i}" for i in range(len(texts))]
        empty = torch.empty(0, dtype=torch.int64)
        yield Batch(log_probs, torch.tensor(list(map(len, paths))), empty, empty, ids, texts)


def forward(batch):
    return batch.features, batch.feature_lengths


def evaluated(**options):
    return evaluate(forward, batches(REFERENCES, HYPOTHESES), TOKENIZER, **options)


def test_rows_hold_each_utterance_and_its_errors():
    found = evaluated(durations={"id0": 1.5, "id1": 0.5})
    assert [(row.id, row.reference, row.hypothesis) for row in found.rows] == [
        (f"id{i}", *texts) for i, texts in enumerate(zip(REFERENCES, HYPOTHESES, strict=True))
    ]
    counts = [(r.words, r.substitutions, r.deletions, r.insertions) for r in found.rows]
    assert counts == [(4, 1, 0, 1), (1, 0, 1, 0), (5, 0, 1, 0)]
    assert [row.wer for row in found.rows] == [2 / 4, 1.0, 1 / 5]
    assert [row.cer for row in found.rows] == [4 / 20, 1.0, 4 / 20]
    assert [row.duration for row in found.rows] == [1.5, 0.5, None]
    assert found.seconds == 2.0
    assert all(row.finite for row in found.rows)  # the NaN past the lengths is not looked at


def test_all_rates_agree_with_jiwer_on_the_whole():
    found = evaluated()
    words = jiwer.process_words(REFERENCES, HYPOTHESES)
    assert found.rates == ErrorRates(
        wer=words.wer,
        cer=jiwer.cer(REFERENCES, HYPOTHESES),
        words=words.hits + words.substitutions + words.deletions,
        substitutions=words.substitutions,
        deletions=words.deletions,
        insertions=words.insertions,
    )
    assert found.rates.wer == 4 / 10
    assert pooled(found.long_rows).wer == 3 / 9


def test_error_rates_by_hand():
    rows = [score("a", "press one now", "press on"), score("b", "bye", "good bye")]
    assert pooled(rows) == ErrorRates(
        wer=3 / 4,  # on for one, now lost, good added
        cer=10 / 16,  # "e now" lost, "good " added
        words=4,
        substitutions=1,
        deletions=1,
        insertions=1,
    )


def test_the_worst_come_first():
    found = evaluated()
    assert [row.id for row in found.worst()] == ["id0", "id2", "id1"]
    assert [row.id for row in found.worst(1)] == ["id0"]


def test_an_utterance_with_nan_is_named_and_counts_as_deleted(caplog):
    def broken(batch):
        log_probs = batch.features.clone()
        if "id0" in batch.ids:
            log_probs[0, 2, 5] = math.nan
        return log_probs, batch.feature_lengths

    with caplog.at_level(logging.WARNING, "fastguard"):
        found = evaluate(broken, batches(REFERENCES, HYPOTHESES), TOKENIZER)
    assert [row.finite for row in found.rows] == [False, True, True]
    assert (found.rows[0].hypothesis, found.rows[0].deletions) == ("", 4)
    assert found.rows[2].hypothesis == HYPOTHESES[2]
    assert "NaN for 1 of 3 utterances, which count as deleted: id0" in caplog.text


def test_without_a_nan_nothing_is_said(caplog):
    evaluated()
    assert caplog.text == ""


def test_decode_can_be_another():
    found = evaluated(decode=lambda log_probs, lengths: [TOKENIZER.encode("bye")] * len(lengths))
    assert [row.hypothesis for row in found.rows] == ["bye"] * 3


def test_interval_of_the_wer():
    draw = torch.Generator().manual_seed(0)
    rows = [
        score(str(i), "a b", "a b" if torch.rand((), generator=draw) < 0.7 else "a c")
        for i in range(400)
    ]
    rate = pooled(rows).wer
    low, high = wer_interval(rows)
    deviation = math.sqrt(rate * (0.5 - rate) / 400)  # of a mean of values 0 and 1/2
    assert low == pytest.approx(rate - 1.96 * deviation, abs=0.3 * deviation)
    assert high == pytest.approx(rate + 1.96 * deviation, abs=0.3 * deviation)
    assert wer_interval(rows) == (low, high)
    assert wer_interval(rows, seed=1) != (low, high)
    narrow = wer_interval(rows, level=0.5)
    assert low < narrow[0] < narrow[1] < high


def test_no_rows():
    assert math.isnan(pooled([]).wer)
    assert all(map(math.isnan, wer_interval([])))


def test_of_silence_every_word_is_inserted():
    row = score("a", " ", "oh  no")
    assert (row.words, row.insertions, row.deletions, row.character_errors) == (0, 2, 0, 5)
    assert math.isnan(row.wer)
    assert score("a", "", "").errors == 0
    both = pooled([row, score("b", "press one", "press one")])
    assert (both.wer, both.insertions, both.words) == (2 / 2, 2, 2)
    assert math.isnan(pooled([row]).wer)
    assert all(map(math.isnan, wer_interval([row])))
    assert wer_interval([row, score("b", "yes", "yes")])[1] >= 2
    assert alignment(row) == "REF:\nHYP: oh  no\n     I  I\n"


def test_files_about_silence_are_json(tmp_path):
    write(tmp_path, Evaluation([score("a", "", "oh"), score("b", "", "")]))
    refuse = {"parse_constant": lambda name: pytest.fail(f"{name} is no JSON")}
    rates = json.loads((tmp_path / "rates.json").read_text(), **refuse)
    assert (rates["wer"], rates["insertions"], rates["wer_interval"]) == (None, 1, [None, None])
    lines = (tmp_path / "hypotheses.jsonl").read_text().splitlines()
    assert [json.loads(line, **refuse)["insertions"] for line in lines] == [1, 0]


def test_recordings_that_can_not_be_used_are_collected():
    def torn():
        for batch in batches(REFERENCES, HYPOTHESES):
            batch.rejected.append(Rejected("torn.wav", "cut off: half of it"))
            yield batch

    rejected = []
    found = evaluate(forward, torn(), TOKENIZER, rejected=rejected)
    assert len(found.rows) == 3
    assert [row.id for row in rejected] == ["torn.wav", "torn.wav"]
