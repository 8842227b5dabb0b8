"""A recognizer in one safetensors file: weights, and the rest as metadata."""

import base64
import hashlib
import json
from pathlib import Path

import torch
from torch import Tensor, nn

from fastguard._extras import require
from fastguard._io import files

from .checkpoint import LARGEST, CheckpointError, check

_KEY = "fastguard"  # in the metadata, whose values must be strings


def save(path: Path, model: nn.Module, tokenizer: dict, config: dict) -> None:
    """Write what :func:`load` reads.

    Args:
        path: of the file.
        model: its state dict is written.
        tokenizer: plain values, and uint8 tensors.
        config: plain values.

    Raises:
        MissingExtra: the safetensors package is missing.
        OSError: the disk is full, or the folder is not writable.
    """
    safetensors = require("safetensors.torch", "export")
    tokenizer = {key: _packed(value) for key, value in tokenizer.items()}
    tensors = {name: value.contiguous() for name, value in model.state_dict().items()}
    held = {"tokenizer": tokenizer, "config": config, "sha256": _checksum(tensors)}
    metadata = {"format": "pt", _KEY: json.dumps(held)}
    # Not save_file, which wraps an OSError in its own exception.
    path.write_bytes(safetensors.save(tensors, metadata))


def load(path: Path) -> dict:
    """{"model": state dict, "tokenizer": dict, "config": dict}, as a checkpoint has them.

    Raises:
        CheckpointError: the file is missing, not a regular file, truncated, damaged, or not
            written by fastguard.
        MissingExtra: the safetensors package is missing.
    """
    safetensors = require("safetensors.torch", "export")
    try:
        files.open_regular(path, LARGEST).close()  # safe_open would wait for the writer of a FIFO
        with safetensors.safe_open(path, framework="pt") as file:
            model = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except Exception as error:  # its Rust code raises several types
        raise CheckpointError(f"{path} cannot be read as safetensors: {error}") from error
    try:
        state = json.loads(metadata[_KEY])
        tokenizer = {key: _unpacked(value) for key, value in state["tokenizer"].items()}
        found = {"model": model, "tokenizer": tokenizer, "config": state["config"]}
        check(found)
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} has no settings and no tokenizer of fastguard in its metadata "
            f"({type(error).__name__}: {error}): write it with python -m fastguard.export"
        ) from error
    # Older files have no checksum.
    if state.get("sha256", expected := _checksum(model)) != expected:
        raise CheckpointError(f"{path} is damaged: its weights do not match its checksum")
    return found


def _checksum(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of the bytes of all tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _packed(value):
    if isinstance(value, Tensor):
        return {"base64": base64.b64encode(bytes(value.tolist())).decode()}
    return value


def _unpacked(value):
    if isinstance(value, dict) and value.keys() == {"base64"}:
        return torch.frombuffer(bytearray(base64.b64decode(value["base64"])), dtype=torch.uint8)
    return value
