"""Arguments of the attention operator for its tests."""

import torch

OPS = torch.ops.fastguard

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

SEED = torch.tensor([0x123456789ABCDEF0, 0x7EDCBA9876543210])
