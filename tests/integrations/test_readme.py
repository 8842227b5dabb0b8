"""The blocks of README's "The guard in other loops" run, and a NaN batch leaves no NaN."""

import re
from pathlib import Path

import lightning
import pytest
import torch

from fastguard import GradGuard

from .runs import (
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

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
START, END = map(README.index, ("## The guard in other loops", "## What it costs"))
BLOCKS = re.findall(r"```python\n(.*?)```", README[START:END], re.DOTALL)
ADAMW = OPTIMIZERS["torch.AdamW"]
DATA = batches(6, {2: "NaN input"})


def block(word):
    """The one block with this word."""
    (found,) = [text for text in BLOCKS if word in text]
    return found


def assert_finite(model):
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())


def skips(caplog):
    return [r.message for r in caplog.records if "skipping batch" in r.message]


def test_every_block_is_run_here():
    words = "guard.attach(", "integrations.lightning", "integrations.transf", "integrations.acc"
    assert sorted(map(block, words)) == sorted(BLOCKS)


def test_attach(caplog):
    model = Net()
    optimizer = ADAMW(model.parameters())
    here = {"torch": torch, "GradGuard": GradGuard, "model": model, "optimizer": optimizer}
    here |= {"scheduler": scheduler_of(optimizer), "scaler": grad_scaler(), "device": "cpu"}
    here |= {"loader": DATA, "loss": lambda model, batch: model(batch)["loss"]}
    exec(block("guard.attach("), here)
    assert_finite(model)
    assert len(skips(caplog)) == 1
    assert here["scheduler"].last_epoch == 5


def test_lightning(caplog):
    def trainer_of(**options):
        return lightning_trainer(**options)

    here = {"Trainer": trainer_of}
    exec(block("integrations.lightning"), here)
    module = LightningNet(ADAMW)
    assert isinstance(here["trainer"], lightning.Trainer)
    here["trainer"].fit(module, torch.utils.data.DataLoader(DATA, batch_size=None))
    assert_finite(module)
    assert len(skips(caplog)) == 1


def test_transformers(caplog):
    trainer = transformers_trainer(ADAMW, "fp32", DATA, max_grad_norm=0.5)
    exec(block("integrations.transf"), {"trainer": trainer})
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
    exec(block("integrations.acc"), here)
    for batch in DATA:
        here["accelerator"].backward(here["model"](batch)["loss"])
        here["optimizer"].step()
        here["scheduler"].step()
        here["optimizer"].zero_grad()
    assert_finite(model)
    assert len(skips(caplog)) == 1
    assert here["scheduler"].scheduler.last_epoch == 5
