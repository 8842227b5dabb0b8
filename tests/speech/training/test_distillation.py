"""The distillation loss against its definition in loops."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastguard.speech.training.distillation import (
    consistency_loss,
    distillation_loss,
    distillation_loss_ref,
)
from fastguard.speech.training.loss import ctc_loss

NAN, INF = math.nan, math.inf


def drawn(batch, frames, symbols, seed=0, dtype=torch.float64, peaky=3.0):
    """Student, teacher, lengths, with NaN where nothing may be read."""
    generator = torch.Generator().manual_seed(seed)
    logits = peaky * torch.randn(2, batch, frames, symbols, generator=generator, dtype=dtype)
    lengths = torch.randint(1, frames + 1, (batch,), generator=generator)
    padding = torch.arange(frames) >= lengths[:, None]
    log_probs = logits.log_softmax(-1).masked_fill(padding[:, :, None], NAN)
    return *log_probs, lengths


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 4),
    st.integers(1, 9),
    st.integers(2, 6),
    st.integers(0, 2**31),
    st.sampled_from([0.3, 1.0, 2.0, 7.0]),
    st.sampled_from([None, 0, 1, 3, 20]),
)
def test_is_its_definition(batch, frames, symbols, seed, temperature, blank_context):
    inputs = drawn(batch, frames, symbols, seed)
    loss = distillation_loss(*inputs, temperature, blank_context)
    expected = distillation_loss_ref(*inputs, temperature, blank_context)
    assert float(loss) == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert loss >= -1e-12
    same = distillation_loss(inputs[1], inputs[1], inputs[2], temperature, blank_context)
    assert float(same) == 0


def test_two_symbols_by_hand():
    student = torch.tensor([[[0.5, 0.5], [0.9, 0.1]]]).log()
    teacher = torch.tensor([[[0.8, 0.2], [0.9, 0.1]]]).log()
    kl = 0.8 * math.log(0.8 / 0.5) + 0.2 * math.log(0.2 / 0.5)
    loss = distillation_loss(student, teacher, torch.tensor([2]))
    assert float(loss) == pytest.approx(kl / 2, rel=1e-6)
    assert loss.dtype == torch.float32


@pytest.mark.parametrize("blank_context", [None, 1])
def test_gradient_is_the_students_alone_and_zero_where_nothing_is_compared(blank_context):
    student, teacher, lengths = drawn(3, 8, 4, seed=1)
    student.requires_grad_()
    teacher.requires_grad_()
    distillation_loss(student, teacher, lengths, 2.0, blank_context).backward()
    assert teacher.grad is None
    assert student.grad.isfinite().all()
    padding = torch.arange(8) >= lengths[:, None]
    assert padding.any() and (student.grad[padding] == 0).all()
    assert student.grad[~padding].abs().sum() > 0


@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_gradcheck(temperature):
    student, teacher, lengths = drawn(2, 5, 4, seed=2)
    student = student.nan_to_num(0.0).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: distillation_loss(x, teacher, lengths, temperature), student
    )


def test_gradients_keep_their_size_over_temperatures():
    """The square of the temperature is there for that (Hinton et al. 2015, section 2)."""
    student, teacher, lengths = drawn(4, 30, 20, seed=3, peaky=0.3)
    norms = []
    for temperature in (4.0, 40.0):
        x = student.nan_to_num(0.0).requires_grad_()
        distillation_loss(x, teacher, lengths, temperature).backward()
        norms.append(float(x.grad.norm()))
    assert norms[0] == pytest.approx(norms[1], rel=0.1)


def test_adds_up_over_frames_as_the_ctc_loss_does():
    generator = torch.Generator().manual_seed(4)
    student, teacher = torch.randn(2, 2, 6, 5, generator=generator).log_softmax(-1)
    both = torch.tensor([6, 2])
    targets, ones = torch.tensor([1, 2]), torch.tensor([1, 1])

    def alone(loss, i, *rest):
        return float(loss(student[i : i + 1], *rest)) * int(both[i]) / 8

    ctc = sum(alone(ctc_loss, i, both[i : i + 1], targets[i : i + 1], ones[:1]) for i in (0, 1))
    assert float(ctc_loss(student, both, targets, ones)) == pytest.approx(ctc, rel=1e-5)
    kl = sum(alone(distillation_loss, i, teacher[i : i + 1], both[i : i + 1]) for i in (0, 1))
    assert float(distillation_loss(student, teacher, both)) == pytest.approx(kl, rel=1e-5)


def test_what_is_ruled_out():
    possible = torch.tensor([[[0.5, 0.25, 0.25]]]).log()
    ruled_out = torch.tensor([[[0.5, 0.5, 0.0]]]).log()
    length = torch.tensor([1])
    student = possible.clone().requires_grad_()
    loss = distillation_loss(student, ruled_out, length)  # by the teacher
    loss.backward()
    assert loss.item() == pytest.approx(0.5 * math.log(2), rel=1e-6)
    assert student.grad.isfinite().all()
    assert float(distillation_loss(ruled_out, possible, length)) == INF  # by the student
    assert distillation_loss_ref(ruled_out, possible, length) == INF
    assert float(distillation_loss(ruled_out, ruled_out, length)) == 0  # by both


def test_nan_in_a_valid_frame_is_seen():
    student, teacher, lengths = drawn(1, 4, 3)
    student[0, 0, 0] = NAN
    assert distillation_loss(student, teacher, lengths).isnan()


def test_blank_context_keeps_frames_around_the_teachers_spikes():
    teacher = torch.tensor([[0.9, 0.1]] * 7)
    teacher[2] = torch.tensor([0.1, 0.9])
    teacher[6] = torch.tensor([0.1, 0.9])  # past the end
    teacher = teacher.log()[None]
    student = torch.zeros(1, 7, 2).requires_grad_()
    (gradient,) = torch.autograd.grad(
        distillation_loss(student, teacher, torch.tensor([6]), blank_context=1), student
    )
    assert gradient[0].abs().sum(-1).nonzero().flatten().tolist() == [1, 2, 3]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_is_computed_in_float32_under_autocast(dtype):
    student, teacher, lengths = drawn(2, 9, 5, seed=5, dtype=torch.float32)
    expected = distillation_loss(student, teacher, lengths, 2.0)
    with torch.autocast("cpu", dtype=dtype):
        loss = distillation_loss(student, teacher, lengths, 2.0)
    assert loss.dtype == torch.float32
    assert float(loss) == float(expected)
    narrow = distillation_loss(student.to(dtype), teacher, lengths, 2.0)
    assert narrow.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher_log_probs": torch.zeros(2, 5, 3)}, r"\(2, 5, 4\) and teacher \(2, 5, 3\)"),
        ({"student_log_probs": torch.zeros(5, 4)}, "must both be"),
        ({"output_lengths": torch.tensor([5])}, r"shape \(2,\)"),
        ({"output_lengths": torch.tensor([5.0, 1.0])}, "float32"),
        ({"output_lengths": torch.tensor([0, 5])}, r"\{0: 0\}"),
        ({"output_lengths": torch.tensor([5, 6])}, r"\{1: 6\}"),
        ({"temperature": 0.0}, "temperature .* got 0.0"),
        ({"temperature": NAN}, "temperature .* got nan"),
        ({"blank_context": -1}, "blank_context .* got -1"),
    ],
)
def test_refuses_what_does_not_fit(change, message):
    inputs = {
        "student_log_probs": torch.zeros(2, 5, 4),
        "teacher_log_probs": torch.zeros(2, 5, 4),
        "output_lengths": torch.tensor([5, 1]),
    }
    with pytest.raises(ValueError, match=message):
        distillation_loss(**(inputs | change))


def test_a_student_learns_the_teachers_output_where_the_two_are_compared():
    student, teacher, lengths = drawn(2, 6, 4, seed=6, dtype=torch.float32)
    logits = torch.zeros_like(student).requires_grad_()
    optimizer = torch.optim.SGD([logits], lr=5.0)
    for _ in range(300):
        optimizer.zero_grad()
        distillation_loss(logits.log_softmax(-1), teacher, lengths, 2.0).backward()
        optimizer.step()
    valid = torch.arange(6) < lengths[:, None]
    torch.testing.assert_close(
        logits.softmax(-1)[valid], teacher.exp()[valid].detach(), rtol=0, atol=0.01
    )
    assert (logits[~valid] == 0).all()


# --- two views ------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(1, 9), st.integers(2, 6), st.integers(0, 2**31))
def test_consistency_is_the_mean_of_both_directions(batch, frames, symbols, seed):
    first, second, lengths = drawn(batch, frames, symbols, seed)
    loss = consistency_loss(torch.cat([first, second]), lengths.repeat(2))
    there = distillation_loss_ref(first, second, lengths)
    back = distillation_loss_ref(second, first, lengths)
    assert float(loss) == pytest.approx((there + back) / 2, rel=1e-9, abs=1e-12)


def test_consistency_pulls_each_view_to_the_other():
    views, lengths = torch.randn(2, 5, 4, dtype=torch.float64), torch.tensor([5, 5])
    views.requires_grad_()
    log_probs = views.log_softmax(-1)
    (gradient,) = torch.autograd.grad(consistency_loss(log_probs, lengths), views)
    # The gradient of KL(sg(p) || softmax(x)) is (softmax(x) - p) / frames.
    difference = (log_probs[0].exp() - log_probs[1].exp()) / 5 / 2
    torch.testing.assert_close(gradient, torch.stack([difference, -difference]))
    assert consistency_loss(log_probs[[0, 0]], lengths).item() == 0


@pytest.mark.parametrize("lengths", [[3, 2], [3, 3, 3], [3, 2, 2, 3]])
def test_views_that_do_not_pair(lengths):
    with pytest.raises(ValueError, match="all first views and then all second views"):
        consistency_loss(torch.zeros(len(lengths), 3, 4), torch.tensor(lengths))
