"""The states of all random number generators of a process, to be restored later.

They are those of Python's ``random``, of NumPy's global generator and of torch, on the CPU and on
CUDA. The values are plain numbers and tensors, so that ``torch.save`` with ``weights_only`` loading
holds them.
"""

import random

import numpy
import torch
from torch import Tensor


def random_state(device: torch.device | None = None) -> dict:
    """The states of all generators.

    Args:
        device: the device whose CUDA generator is saved; no CUDA generator if it is the CPU. None
            stands for all CUDA devices.

    Returns:
        A dict with the keys ``python``, ``numpy``, ``torch`` and ``cuda``. ``cuda`` is a tensor for
        one device, a list of tensors for all devices, or None. States are uint8 tensors; the keys
        of NumPy's generator are an int64 tensor, shape (624,).
    """
    name, keys, *rest = numpy.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype("int64")), *rest),
        "torch": torch.get_rng_state(),
        "cuda": _cuda_state(device),
    }


def set_random_state(state: dict, device: torch.device | None = None) -> None:
    """Restore what :func:`random_state` returned for the same ``device``."""
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    numpy.random.set_state((name, keys.numpy().astype("uint32"), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is None:
        return
    if device is None:
        torch.cuda.set_rng_state_all(state["cuda"])
    elif device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


def _cuda_state(device: torch.device | None) -> Tensor | list[Tensor] | None:
    if device is None:
        return torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else None
