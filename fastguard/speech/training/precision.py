"""The precision that a model computes in: autocast by name."""

import torch

AUTOCAST = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """torch's autocast to ``precision``; "fp32" turns it off."""
    dtype = AUTOCAST[precision]
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
