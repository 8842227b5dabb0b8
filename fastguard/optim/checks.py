"""Refuses options and optimizer state that would silently turn the weights into NaN."""

import math
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from fastguard._tensors import is_dtensor

_OPTIONS = ("lr", "betas", "eps", "weight_decay", "momentum")
#: The largest absolute value of an option of Adam: a step computes in float32.
LARGEST_OPTION = torch.finfo(torch.float32).max
_NEVER_NEGATIVE = ("exp_avg_sq", "max_exp_avg_sq", "step")


def check_options(param_groups: Iterable[dict]) -> None:
    """Refuse an option that is NaN, infinite, or too large for float32, in which a step computes.

    It checks lr, betas, eps, weight_decay and momentum. It does not check a tensor on a GPU, which
    would need a host-device sync.

    Raises:
        ValueError: names the group, the option and its value.
    """
    for number, group in enumerate(param_groups):
        check_group(number, group)


def check_group(number: int, group: Mapping[str, object]) -> None:
    """:func:`check_options` for the group with this number."""
    for option in _OPTIONS:
        value = group.get(option, 0.0)
        for each in value if isinstance(value, (tuple, list)) else (value,):
            if _on_host(each) and not abs(each) <= LARGEST_OPTION:
                raise ValueError(
                    f"{option} of param group {number} is {float(each)}; in float32 that is no "
                    "finite number, and a step would spoil all parameters of the group. Set "
                    f"optimizer.param_groups[{number}][{option!r}] to a finite number, and check "
                    "the scheduler or state dict that wrote it"
                )


def _on_host(value: object) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and value.device.type == "cpu"
    return isinstance(value, (int, float))


def state_problem(name: str, entry: object) -> str | None:
    """A message about a value that Adam cannot have written into its state; None without one.

    This is a host-device sync if ``entry`` is on a GPU.

    Args:
        name: ``step``, ``exp_avg``, ``exp_avg_sq`` or ``max_exp_avg_sq``.
        entry: a number, or a tensor of any shape. Of a DTensor only this rank's shard is read.
    """
    if isinstance(entry, (int, float)):
        entry = torch.tensor(entry, dtype=torch.float64)
    if not isinstance(entry, Tensor):
        return f"its {name} is no tensor but a {type(entry).__name__}"
    entry = entry.to_local() if is_dtensor(entry) else entry
    if entry.is_meta:
        return None
    if not _all_finite(entry):
        return f"its {name} is NaN or infinite"
    if name in _NEVER_NEGATIVE and not entry.is_complex() and (entry < 0).any():
        return f"its {name} is negative"
    return None


def nonfinite_state(
    optimizer: torch.optim.Optimizer, names: Mapping[int, str] | None = None
) -> list[tuple[str, str]]:
    """The entries of an optimizer's state that hold a NaN or Inf.

    This reads all of the state and is a host-device sync. It serves error messages.

    Args:
        optimizer: any optimizer. Of a DTensor in its state only this rank's shard is read.
        names: names of parameters by ``id(parameter)``. A parameter without an entry has the name
            that the optimizer was given, or "parameter I of group G".

    Returns:
        (name of the parameter, name of the entry) for each, in the optimizer's order.
    """
    found = []
    for number, group in enumerate(optimizer.param_groups):
        given = group.get("param_names") or [
            f"parameter {i} of group {number}" for i in range(len(group["params"]))
        ]
        for name, p in zip(given, group["params"], strict=True):
            name = (names or {}).get(id(p), name)
            found += [(name, entry) for entry in _nonfinite(optimizer.state.get(p))]
    return found


def poisoned(optimizers: Iterable[torch.optim.Optimizer], names: Mapping[int, str]) -> list[str]:
    """The parameters and the entries of state that hold a NaN or Inf, as text for a message."""
    found = []
    for optimizer in optimizers:
        held = (p for group in optimizer.param_groups for p in group["params"])
        found += [
            names.get(id(p), "a parameter")
            for p in held
            if [*_nonfinite({"parameter": p.detach()})]
        ]
        found += [f"{entry} of {name}" for name, entry in nonfinite_state(optimizer, names)]
    return found


def check_state(optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> None:
    """Refuse state that holds a NaN or Inf: the next step would write it to the weights.

    This reads all of the state and is a host-device sync. The guard calls it in the first step with
    an optimizer and in the first one after a ``load_state_dict``.

    Raises:
        ValueError: names the parameters and the entries.
    """
    if found := nonfinite_state(optimizer, names):
        listed = ", ".join(f"{entry} of {name}" for name, entry in found[:3])
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise ValueError(
            f"the state of {type(optimizer).__name__} is NaN or infinite: {listed}{more}. A step "
            "would write it to the weights: load an earlier state, or delete these entries of "
            "optimizer.state to start from zero"
        )


def _nonfinite(state: object) -> Iterator[str]:
    for name, entry in state.items() if isinstance(state, dict) else ():
        if isinstance(entry, Tensor):
            entry = entry.to_local() if is_dtensor(entry) else entry
            quantized = type(entry) is not Tensor  # torchao's tensors have no isfinite
            if not (quantized or entry.is_meta or _all_finite(entry)):
                yield name
        elif isinstance(entry, float) and not math.isfinite(entry):
            yield name


def _all_finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())
