"""The guard in Lightning's Trainer: one callback.

python examples/lightning_trainer.py
"""

import logging
import math

import lightning
import torch
from torch import nn

from fastguard.integrations.lightning import GuardCallback


def batches(count, bad):
    """Pairs (x, y) of a linear task; the batch with number ``bad`` has one NaN."""
    generator = torch.Generator().manual_seed(0)
    for i in range(count):
        x = torch.randn(32, 8, generator=generator)
        y = x.sum(dim=1, keepdim=True)
        if i == bad:
            x[5, 2] = math.nan
        yield x, y


class Regression(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 1))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.mse_loss(self.net(x), y)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=100)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def main():
    logging.basicConfig(format="%(message)s")  # the guard warns of each step that it skips
    torch.manual_seed(0)
    module = Regression()
    callback = GuardCallback(max_norm=1.0, skip_norm=10.0)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    trainer = lightning.Trainer(accelerator="cpu", max_epochs=1, callbacks=[callback], **quiet)
    trainer.fit(module, torch.utils.data.DataLoader([*batches(100, bad=40)], batch_size=None))

    skipped = trainer.callback_metrics["guard/skipped_steps"]
    steps = trainer.lr_scheduler_configs[0].scheduler.last_epoch
    print(f"skipped {skipped:.0f} of {trainer.global_step} steps; the scheduler took {steps}")
    finite = all(tensor.isfinite().all() for tensor in module.state_dict().values())
    print(f"weights and BatchNorm's statistics finite: {finite}")


if __name__ == "__main__":
    main()
