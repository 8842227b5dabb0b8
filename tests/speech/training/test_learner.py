"""The model in training: its initial weights and its loss."""

import pytest
import torch
import torch.nn.functional as F

from fastguard.speech.data.batching import collate
from fastguard.speech.data.readers import Rejected
from fastguard.speech.training.distillation import distillation_loss
from fastguard.speech.training.loss import ctc_loss


def test_convolutions_start_scaled(make):
    torch.manual_seed(0)
    plain = make("--init.conv_scale", "1.0").learner.model.layers[0].conv.weight
    half = make("--init.conv_scale", "0.5").learner.model.layers[0].conv.weight
    torch.testing.assert_close(half, plain / 2)


def test_the_student_learns_from_the_teacher_too(make, tmp_path):
    teacher = make("--epochs", "1", "--seed", "5")
    teacher.fit()
    options = ("--network.dropout", "0", "--augment.freq_masks", "0", "--augment.time_masks", "0")
    path = str(teacher.folder.path)
    losses = {}
    for weight in ("0", "0.25", "1"):
        made = make("--teacher", path, "--distill.weight", weight, *options)
        made.learner.model.eval()
        batch = next(iter(made.loader))
        losses[weight] = made.learner.loss(batch)[0].item()
        ours, lengths = made.learner.model(batch.features, batch.feature_lengths)
        theirs, _ = made.learner.teacher(batch.features, batch.feature_lengths)
    distance = distillation_loss(ours, theirs, lengths, 2.0).item()
    ctc = ctc_loss(ours, lengths, batch.targets, batch.target_lengths).item()
    assert losses["0"] == pytest.approx(ctc)
    assert losses["1"] == pytest.approx(distance)
    assert losses["0.25"] == pytest.approx(0.75 * ctc + 0.25 * distance)
    assert distance > 0


def test_two_views_are_to_be_heard_alike(make):
    losses = {}
    for weight in ("0.5", "2"):
        made = make("--consistency.weight", weight, "--network.dropout", "0")
        made.learner.model.eval()
        batch = next(iter(made.loader))
        losses[weight], frames = made.learner.loss(batch)
        log_probs, lengths = made.learner.model(batch.features, batch.feature_lengths)
    assert batch.views == 2
    assert frames == lengths.sum()
    ctc = ctc_loss(log_probs, lengths, batch.targets, batch.target_lengths).item()
    first, second = log_probs.chunk(2)
    there = distillation_loss(first, second, lengths.chunk(2)[0]).item()
    back = distillation_loss(second, first, lengths.chunk(2)[0]).item()
    assert there > 0
    for weight, loss in losses.items():
        assert loss.item() == pytest.approx(ctc + float(weight) * (there + back) / 2)
    assert next(iter(make().loader)).views == 1


def test_a_batch_of_nothing_teaches_nothing(make):
    made = make()
    made.learner.model.train()
    before = {name: value.clone() for name, value in made.learner.model.state_dict().items()}
    loss, frames = made.learner.loss(collate([Rejected("a", "gone")], n_mels=80))
    loss.backward()
    assert (loss.item(), frames) == (0.0, 0)
    assert made.learner.model.training
    assert all(not p.grad.any() for p in made.learner.model.parameters())
    for name, value in made.learner.model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_ctc_loss_is_per_frame_in_fp32_and_infinite_where_no_alignment_exists():
    torch.manual_seed(0)
    log_probs = torch.randn(2, 9, 5).log_softmax(-1)
    lengths, targets = torch.tensor([9, 6]), torch.tensor([1, 2, 2, 4])
    target_lengths = torch.tensor([3, 1])
    with torch.autocast("cpu", torch.bfloat16):
        loss = ctc_loss(log_probs, lengths, targets, target_lengths)
    one = F.ctc_loss(
        log_probs[0, :9, None].double(), targets[None, :3], (9,), (3,), reduction="sum"
    )
    two = F.ctc_loss(
        log_probs[1, :6, None].double(), targets[None, 3:], (6,), (1,), reduction="sum"
    )
    assert loss.item() == pytest.approx(((one + two) / 15).item(), rel=1e-5)
    assert ctc_loss(log_probs, torch.tensor([3, 6]), targets, target_lengths).item() == float("inf")
