"""What attach_guard does in accelerate besides the steps, which test_matrix.py compares."""

import math

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.tracking import GeneralTracker

from fastguard.integrations.accelerate import attach_guard
from fastguard.ops import Verdict

from .runs import (
    OPTIMIZERS,
    Net,
    Run,
    accelerator_of,
    batches,
    differences,
    grad_scaler,
    scheduler_of,
    settings,
    state_of,
)


class Loop:
    """A loop as accelerate's documentation writes it."""

    def __init__(self, optimizer="fastguard.AdamW", scaler=None, trackers=(), **options):
        self.accelerator = accelerator_of(scaler=scaler, log_with=[*trackers] or None, **options)
        if trackers:
            self.accelerator.init_trackers("project")
        self.model = Net(torch.float16 if scaler else None)
        plain = OPTIMIZERS[optimizer](self.model.parameters())
        prepared = self.accelerator.prepare(self.model, plain, scheduler_of(plain))
        self.wrapped, self.optimizer, self.scheduler = prepared
        self.guard = attach_guard(self.accelerator, self.wrapped, self.optimizer, **settings())

    def train(self, data):
        """Whether accelerate says that a step was skipped, after each micro-batch."""
        said = []
        for batch in data:
            with self.accelerator.accumulate(self.wrapped):
                self.accelerator.backward(self.wrapped(batch)["loss"])
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()
            said.append(self.accelerator.optimizer_step_was_skipped)
            assert said[-1] == self.optimizer.step_was_skipped
        return said

    def everything(self):
        last_epoch = self.scheduler.scheduler.last_epoch
        return Run(self.model, self.optimizer.optimizer, self.guard, last_epoch).everything()


@pytest.mark.parametrize("optimizer", ["fastguard.AdamW", "torch.AdamW fused", "torch.SGD"])
@pytest.mark.parametrize("scaled", [False, True])
def test_accelerate_hears_of_each_skip(optimizer, scaled):
    loop = Loop(optimizer, grad_scaler() if scaled else None)
    said = loop.train(batches(5, {1: "NaN input", 3: "Inf"}))
    assert said == [False, True, False, True, False]
    assert loop.scheduler.scheduler.last_epoch == 3
    if scaled:
        assert loop.accelerator.scaler.get_scale() == grad_scaler().get_scale() / 4


@pytest.mark.parametrize("optimizer", ["fastguard.AdamW", "torch.AdamW"])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("bad", [2, 3])
def test_a_window_of_accumulate_is_one_step(optimizer, scaled, bad):
    def scaler(halve_after=None):
        return grad_scaler(halve_after) if scaled else None

    loop = Loop(optimizer, scaler(), gradient_accumulation_steps=2)
    loop.train(batches(8, {bad: "NaN gradient"}))
    assert loop.guard.last_report.step == 3
    without = Loop(optimizer, scaler(halve_after=1), gradient_accumulation_steps=2)
    data = batches(8)
    without.train([*data[:2], *data[4:]])
    assert differences(loop.everything(), without.everything()) == []


class Tracker(GeneralTracker):
    name = "kept"
    requires_logging_directory = False

    def __init__(self):
        super().__init__()
        self.values = []

    @property
    def tracker(self):
        return self.values

    def store_init_configuration(self, values):
        pass

    def log(self, values, step=None, **kwargs):
        self.values.append((step, values))


def test_what_it_logs():
    tracker = Tracker()
    loop = Loop(trackers=[tracker], gradient_accumulation_steps=2)
    loop.train(batches(6, {3: "NaN input"}))
    assert [step for step, _ in tracker.values] == [0, 1, 2]
    first, second, _ = (values for _, values in tracker.values)
    assert first["guard/clip_coef"] == pytest.approx(min(1, 1 / first["guard/grad_norm"]), rel=1e-4)
    assert second["guard/verdict"] == Verdict.SKIP_NONFINITE
    assert math.isnan(second["guard/grad_norm"])


def test_a_saved_state_goes_on_exactly(tmp_path):
    data = batches(6, {1: "NaN input", 4: "NaN gradient"})
    straight = Loop()
    straight.train(data)
    first = Loop()
    first.train(data[:3])
    first.accelerator.save_state(tmp_path)
    resumed = Loop()
    resumed.accelerator.load_state(tmp_path)
    resumed.train(data[3:])
    assert differences(resumed.everything(), straight.everything()) == []
    assert state_of(resumed.guard) == state_of(straight.guard)


def test_what_was_not_prepared_is_refused_by_name():
    accelerator = accelerator_of()
    model = Net()
    with pytest.raises(TypeError, match=r"accelerator\.prepare returned, got torch\.optim"):
        attach_guard(accelerator, model, torch.optim.SGD(model.parameters()))

    class DeepSpeedOptimizerWrapper(AcceleratedOptimizer):
        pass

    engine = DeepSpeedOptimizerWrapper(torch.optim.SGD(model.parameters()))
    with pytest.raises(TypeError, match=r"DeepSpeedOptimizerWrapper\. .*their engines"):
        attach_guard(accelerator, model, engine)


def test_a_second_guard_is_refused():
    loop = Loop()
    with pytest.raises(ValueError, match=r"has a guard already.*detach\(\)"):
        attach_guard(loop.accelerator, loop.model, loop.optimizer)
    assert loop.train(batches(2, {1: "Inf"})) == [False, True]
    loop.guard.detach()
    assert loop.train(batches(2)) == [False, False]
    guard = attach_guard(loop.accelerator, loop.model, loop.optimizer)
    assert loop.train(batches(2, {1: "Inf"})) == [False, True]
    assert guard.last_report.step == 1
