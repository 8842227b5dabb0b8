"""What is wrong with a recording or its text is named by utterance."""

import math

import pytest
import torch

from fastguard.speech.data.batching import Item, collate
from fastguard.speech.data.features import LogMel
from fastguard.speech.data.problems import ctc_problems, recording_problems


def item(name, frames, tokens):
    return Item(name, "", torch.zeros(frames, 80), torch.tensor(tokens, dtype=torch.int64))


def test_infeasible_targets_count_repeats():
    batch = collate(
        [
            item("fits", 12, [1, 2, 3]),  # 3 output frames
            item("repeats", 12, [1, 1, 3]),
            item("long", 16, [1, 2, 3, 4, 5, 5]),
            item("empty", 4, []),
        ]
    )
    found = ctc_problems(batch)
    assert [(f.kind, f.where) for f in found] == [
        ("infeasible target", "repeats"),
        ("infeasible target", "long"),
    ]
    assert [(f.evidence["needed"], f.evidence["available"]) for f in found] == [(4, 3), (7, 4)]
    assert "needs 7 frames (6 symbols + 1 repeats), and the recording has 4" in found[1].what


def test_ctc_problems_are_those_whose_loss_is_infinite():
    batch = collate([item(str(n), 40, [1, 1] * n) for n in range(1, 6)])
    log_probs = torch.zeros(10, 5, 3).log_softmax(-1)
    losses = torch.nn.functional.ctc_loss(
        log_probs, batch.targets, torch.full((5,), 10), batch.target_lengths, reduction="none"
    )
    infinite = [name for name, loss in zip(batch.ids, losses, strict=True) if math.isinf(loss)]
    assert [f.where for f in ctc_problems(batch)] == infinite == ["3", "4", "5"]


@pytest.mark.parametrize(
    ("change", "fault", "what"),
    [
        (lambda x: x, None, None),
        (lambda x: x.index_fill(0, torch.tensor([5]), math.inf), True, "1 of 8000 samples"),
        (lambda x: x.index_fill(0, torch.tensor([5, 6]), math.nan), True, "2 of 8000 samples"),
        (lambda x: x * 1e25, True, "features are not finite"),
        (lambda x: x * 0, False, "silent"),
        (lambda x: x * 32768, False, "too loud"),
    ],
)
def test_recordings(change, fault, what):
    waveform = change(torch.randn(8000, generator=torch.Generator().manual_seed(0)) / 5)
    found = recording_problems("it", waveform, LogMel()(waveform))
    assert [(f.kind, f.where, f.fault) for f in found] == (
        [] if what is None else [("bad input", "it", fault)]
    )
    assert what is None or what in found[0].what
