"""The guard in the Trainer of Hugging Face transformers: one callback.

python examples/transformers_trainer.py
"""

import math
import tempfile

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from fastguard.integrations.transformers import GuardCallback


def rows(count, bad):
    """Examples {"x", "labels"} of a linear task; the one with number ``bad`` has a NaN."""
    generator = torch.Generator().manual_seed(0)
    for i in range(count):
        x = torch.randn(8, generator=generator)
        labels = x.sum(dim=0, keepdim=True)
        if i == bad:
            x[2] = math.nan
        yield {"x": x, "labels": labels}


class Regression(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, x, labels):
        return {"loss": nn.functional.mse_loss(self.net(x), labels)}


def main():
    torch.manual_seed(0)
    model = Regression()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_grad_norm=1.0,  # the guard clips there
            learning_rate=1e-2,
            per_device_train_batch_size=32,
            **{"logging_steps": 20, "num_train_epochs": 1, "disable_tqdm": True, "use_cpu": True},
        )
        trainer = Trainer(model, arguments, train_dataset=[*rows(3200, bad=1234)])
        trainer.add_callback(GuardCallback(trainer, skip_norm=10.0))
        trainer.train()

    skipped = sum(log.get("guard/skipped_steps", 0) for log in trainer.state.log_history)
    steps = trainer.lr_scheduler.last_epoch
    print(f"skipped {skipped:.0f} of {trainer.state.global_step} steps; the scheduler took {steps}")
    finite = all(tensor.isfinite().all() for tensor in model.state_dict().values())
    print(f"weights and BatchNorm's statistics finite: {finite}")


if __name__ == "__main__":
    main()
