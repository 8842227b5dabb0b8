"""What GuardCallback does in Lightning besides the steps, which test_matrix.py compares."""

import csv
import math

import lightning
import pytest
import pytorch_lightning
import torch
from lightning.pytorch.loggers import CSVLogger

import fastguard
from fastguard import GradientExplosionError
from fastguard.integrations import pytorch_lightning as old_package
from fastguard.integrations.lightning import GuardCallback

from .runs import OPTIMIZERS, LightningNet, Net, batches, lightning_trainer, settings, state_of

ADAMW = OPTIMIZERS["fastguard.AdamW"]


def loader(data):
    return torch.utils.data.DataLoader(data, batch_size=None)


def fit(data, module=None, callback=None, **options):
    module = LightningNet(ADAMW) if module is None else module
    callback = GuardCallback(**settings()) if callback is None else callback
    ckpt_path = options.pop("ckpt_path", None)
    trainer = lightning_trainer(callbacks=[callback], **options)
    trainer.fit(module, loader(data), ckpt_path=ckpt_path)
    return trainer, callback


def everything(trainer):
    found = dict(trainer.lightning_module.state_dict())
    for key, state in trainer.optimizers[0].state.items():
        found |= {f"{id(key)}.{name}": value for name, value in state.items()}
    return [*found.values(), trainer.optimizers[0].param_groups[0]["lr"]]


def test_what_it_logs(tmp_path):
    logger = CSVLogger(tmp_path, name="", version="")
    fit(batches(6, {2: "NaN input"}), logger=logger, log_every_n_steps=1)
    rows = list(csv.DictReader((tmp_path / "metrics.csv").open()))
    steps = [row for row in rows if row["guard/verdict"]]
    assert [float(row["guard/verdict"]) for row in steps][2] == fastguard.ops.Verdict.SKIP_NONFINITE
    norms = [float(row["guard/grad_norm"]) for row in steps]
    assert [math.isnan(norm) for norm in norms] == [False, False, True, False, False, False]
    for norm, row in zip(norms, steps, strict=True):
        if math.isfinite(norm):
            assert float(row["guard/clip_coef"]) == pytest.approx(min(1, 1 / norm), rel=1e-4)
    assert [row["guard/skipped_steps"] for row in rows if row["guard/skipped_steps"]] == ["1.0"]


def test_a_warning_names_lightnings_batch(caplog):
    fit(batches(4, {1: "NaN gradient"}), max_epochs=2)
    found = [r.message for r in caplog.records if r.name == "fastguard.guard.report_files"]
    assert ["batch 1 of epoch 0" in found[0], "batch 1 of epoch 1" in found[1]] == [True, True]


def test_a_checkpoint_goes_on_exactly_with_the_guard(tmp_path):
    data = batches(6, {2: "NaN input"})
    trainer, callback = fit(data, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    kept = state_of(callback.guards[0])
    whole, straight = fit(data, max_epochs=2)
    resumed, again = fit(data, max_epochs=2, ckpt_path=tmp_path / "one.ckpt")
    for a, b in zip(everything(whole), everything(resumed), strict=True):
        assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))
    assert state_of(again.guards[0]) == state_of(straight.guards[0]) != kept


def test_a_checkpoint_is_loaded_without_the_callback(tmp_path):
    trainer, _ = fit(batches(6, {2: "NaN input"}))
    trainer.save_checkpoint(tmp_path / "guarded.ckpt")
    plain = lightning_trainer(max_epochs=2)
    module = LightningNet(ADAMW)
    plain.fit(module, loader(batches(6)), ckpt_path=tmp_path / "guarded.ckpt")
    (scheduler,) = plain.lr_scheduler_configs
    assert scheduler.scheduler.last_epoch == 5 + 6
    assert type(plain.optimizers[0]) is fastguard.AdamW
    assert all(p.isfinite().all() for p in module.parameters())


def test_clipping_by_lightning_is_refused_by_name():
    with pytest.raises(ValueError, match=r"gradient_clip_val=0\.5.*GuardCallback\(max_norm=0\.5\)"):
        fit(batches(2), gradient_clip_val=0.5)


def test_accumulated_batches_are_one_step():
    """A NaN in one of two micro-batches leaves the pair out, and its scheduler's step."""
    trainer, callback = fit(batches(8, {3: "NaN input"}), accumulate_grad_batches=2)
    data = batches(8)
    expected, _ = fit([*data[:2], *data[4:]], accumulate_grad_batches=2)
    for a, b in zip(everything(trainer), everything(expected), strict=True):
        assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))
    assert callback.guards[0].state_dict()["steps"] == 4


def test_patience_ends_the_fit_with_the_guards_error():
    callback = GuardCallback(patience=2, **settings())
    with pytest.raises(GradientExplosionError, match="2"):
        fit(batches(4, {1: "NaN input", 2: "NaN input"}), callback=callback)


def test_a_scheduler_of_epochs_steps_after_an_epoch_that_ends_with_a_skip():
    class Epochs(LightningNet):
        def configure_optimizers(self):
            found = super().configure_optimizers()
            found["lr_scheduler"]["interval"] = "epoch"
            return found

    trainer, _ = fit(batches(3, {2: "NaN gradient"}), Epochs(ADAMW), max_epochs=2)
    (scheduler,) = trainer.lr_scheduler_configs
    assert scheduler.scheduler.last_epoch == 2


class Adversaries(lightning.LightningModule):
    """Two networks with an optimizer each; the second one's loss passes through the first."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.one, self.other = Net(), Net()

    def training_step(self, batch, batch_idx):
        one, other = self.optimizers()
        for optimizer, x in ((one, batch[0]), (other, batch[1])):
            optimizer.zero_grad()
            loss = self.one(x)["loss"] + (self.other(x)["loss"] if optimizer is other else 0.0)
            self.manual_backward(loss)
            optimizer.step()

    def configure_optimizers(self):
        return [ADAMW(self.one.parameters()), ADAMW(self.other.parameters())]


def test_each_of_two_optimizers_has_a_guard_and_no_net_keeps_a_nan(tmp_path, caplog):
    pairs = list(zip(batches(6), batches(6, {3: "NaN input"}), strict=True))
    logger = CSVLogger(tmp_path, name="", version="")
    trainer, _ = fit(pairs, Adversaries(), logger=logger, log_every_n_steps=1)
    # The bad input is the other's: its optimizer skips once, the first one's never.
    assert len([r for r in caplog.records if "skipping batch" in r.message]) == 1
    assert all(t.isfinite().all() for t in trainer.lightning_module.state_dict().values())
    heads = csv.DictReader((tmp_path / "metrics.csv").open()).fieldnames
    assert {"guard/verdict", "guard/1/verdict"} <= set(heads)


class OldNet(pytorch_lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = Net()

    def training_step(self, batch, batch_idx):
        return self.model(batch)

    def configure_optimizers(self):
        return ADAMW(self.parameters())


def test_the_package_pytorch_lightning():
    module = OldNet()
    quiet = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    callback = old_package.GuardCallback(**settings())
    trainer = pytorch_lightning.Trainer(
        accelerator="cpu", max_epochs=1, callbacks=[callback], **quiet
    )
    trainer.fit(module, loader(batches(4, {2: "NaN input"})))
    assert callback.guards[0].state_dict()["steps"] == 4
    assert all(t.isfinite().all() for t in module.state_dict().values())


def test_buffers_that_a_hook_wrote_between_epochs_stay(caplog):
    class Counts(LightningNet):
        def __init__(self, make):
            super().__init__(make)
            self.register_buffer("epochs", torch.zeros(()))

        def on_train_epoch_end(self):
            self.epochs += 1

    trainer, _ = fit(batches(3, {0: "NaN input"}), Counts(ADAMW), max_epochs=3)
    assert trainer.lightning_module.epochs == 3
