"""The blocks of docs/integrations.md run, and a NaN batch leaves no NaN."""

import lightning
import pytest
import torch

from tests.integrations.runs import (
    OPTIMIZERS,
    LightningNet,
    Net,
    accelerator_of,
    batches,
    grad_scaler,
    lightning_trainer,
    scheduler_of,
    transformers_trainer,
)

from .blocks import run_block

ADAMW = OPTIMIZERS["torch.AdamW"]
DATA = batches(6, {2: "NaN input"})


def assert_finite(model):
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())


def skips(caplog):
    return [r.message for r in caplog.records if "skipping batch" in r.message]


def test_lightning(caplog):
    def trainer_of(**options):
        return lightning_trainer(**options)

    here = {"Trainer": trainer_of}
    run_block("lightning", here)
    module = LightningNet(ADAMW)
    assert isinstance(here["trainer"], lightning.Trainer)
    here["trainer"].fit(module, torch.utils.data.DataLoader(DATA, batch_size=None))
    assert_finite(module)
    assert len(skips(caplog)) == 1


def test_transformers(caplog):
    trainer = transformers_trainer(ADAMW, "fp32", DATA, max_grad_norm=0.5)
    run_block("transformers", {"trainer": trainer})
    trainer.train()
    assert_finite(trainer.model)
    assert len(skips(caplog)) == 1
    assert trainer.lr_scheduler.last_epoch == 5


@pytest.mark.parametrize("scaler", [None, grad_scaler()])
def test_accelerate(scaler, caplog):
    model = Net()
    optimizer = ADAMW(model.parameters())
    here = {"accelerator": accelerator_of(scaler=scaler), "model": model, "optimizer": optimizer}
    here["scheduler"] = scheduler_of(optimizer)
    run_block("accelerate", here)
    for batch in DATA:
        here["accelerator"].backward(here["model"](batch)["loss"])
        here["optimizer"].step()
        here["scheduler"].step()
        here["optimizer"].zero_grad()
    assert_finite(model)
    assert len(skips(caplog)) == 1
    assert here["scheduler"].scheduler.last_epoch == 5
