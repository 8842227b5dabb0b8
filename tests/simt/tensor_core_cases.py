"""Kernels and schedules that the tests of the tensor cores share."""

from functools import cache

import numpy as np
import pytest
import torch

from tests import simt

SCHEDULES = [
    (schedule, seed) for schedule in ("round_robin", "greedy", "random") for seed in (0, 7)
]


@cache
def kernels():
    try:
        return simt.load("tensor_kernels", ["tests/simt/kernels/tensor_bindings.cpp"])
    except simt.NoCompiler as error:
        pytest.skip(str(error))


def encoded(x, dtype):
    """The elements as a kernel takes them: 2 bytes each, or floats, of which tf32 drops 13 bits."""
    x = np.asarray(x, np.float32)
    if dtype == "bfloat16":
        return torch.from_numpy(x).bfloat16().view(torch.int16).numpy().view(np.uint16)
    return x.astype(np.float16).view(np.uint16) if dtype == "float16" else x


def decoded(x, dtype):
    if dtype == "bfloat16":
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16).double().numpy()
    return x.view(np.float16).astype(np.float64) if dtype == "float16" else x.astype(np.float64)


# Half a unit in the last place of the type of the stored product.
ROUNDING = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "tf32": 2.0**-24}
