"""Checks a state before a run continues from it, and before anything is changed.

Parts that check their own state when they load it, such as the guard and the order of batches, are
not checked here.
"""

import math
import random
from collections.abc import Mapping

import numpy
import torch
from torch import Tensor

from fastguard.speech.storage.checkpoint import check_fit
from fastguard.speech.storage.plain import from_plain, shown

from .metrics import EpochMetrics, EpochTotals

_MOST = 10**18  # steps; the largest count in a file
_SET_ANEW = {
    "lr",
    "initial_lr",
    "betas",
    "eps",
    "weight_decay",
    "params",
}  # options of a group that the settings replace
_EITHER = {"foreach", "fused"}  # options that do not change results


def check_state(
    state: dict,
    weights: Mapping[str, Tensor],
    average: Mapping[str, Tensor] | None,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler | None,
    batches: int,
    ranks: int,
) -> None:
    """Compare a state with the objects that will load it.

    Args:
        state: as a run saves it.
        weights: the model's state dict.
        average: state dict of the averaged weights; None without one.
        optimizer, scaler: of the run.
        batches: of a whole epoch.
        ranks: processes that train together. If the state has another number, its epoch begins
            again, and its place is not checked.

    Raises:
        ValueError: a part is missing, of another type or shape than the run's, not finite where it
            must be, or out of its range; one line names it.
    """
    try:
        check_finite("model", state["model"], weights)
        if average is not None:
            check_finite("ema", state["ema"], average)
        _check_optimizer(state["optimizer"], optimizer)
        if scaler is not None:
            _check_scaler(state["scaler"])
        _check_progress(state)
        _check_ranks(state)
        if len(state["loader"]) == ranks and state["batches"]:
            _check_place(state, batches)
    except KeyError as error:
        raise ValueError(f"it lacks {shown(error.args[0])}") from error


def check_finite(name: str, weights: object, wanted: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless ``weights`` fit ``wanted`` and are finite."""
    try:
        check_fit(weights, wanted)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    for key, value in weights.items():
        if not bool(value.isfinite().all()):
            raise ValueError(f"{name}: {key} has NaN or Inf")


# --- the optimizer --------------------------------------------------------------------------------


def _check_optimizer(state: object, optimizer: torch.optim.Optimizer) -> None:
    """Check the moments, and the options that the settings do not replace."""
    _check_dict("optimizer", state)
    groups = state["param_groups"]
    if not isinstance(groups, list) or len(groups) != len(optimizer.param_groups):
        raise ValueError(f"optimizer: param_groups is {shown(groups)}, or has another length")
    known: dict[int | str, Tensor] = {}  # by number, or by name for a sharded run
    for saved, group in zip(groups, optimizer.param_groups, strict=True):
        _check_dict("optimizer: a group", saved)
        numbers = saved["params"]
        if not isinstance(numbers, list) or len(numbers) != len(group["params"]):
            raise ValueError("optimizer: a group has other parameters")
        if not all(isinstance(number, int | str) for number in numbers):
            raise ValueError("optimizer: params are neither numbers nor names")
        known.update(zip(numbers, group["params"], strict=True))
        for key, value in saved.items():
            if key in _EITHER and isinstance(value, bool | None):
                continue
            if key not in _SET_ANEW and not (key in group and value is group[key]):
                raise ValueError(
                    f"optimizer: {shown(key)} is {shown(value)}, unlike that of the run"
                )
    _check_dict("optimizer: state", state["state"])
    for number, moments in state["state"].items():
        if number not in known:
            raise ValueError(f"optimizer: state of {shown(number)}, which is not a parameter")
        _check_moments(number, moments, known[number])


def _check_moments(number: int | str, moments: object, parameter: Tensor) -> None:
    _check_dict(f"optimizer: state of parameter {shown(number)}", moments)
    if moments.keys() != {"step", "exp_avg", "exp_avg_sq"}:
        raise ValueError(f"optimizer: parameter {shown(number)} does not have the entries of AdamW")
    for name, value in moments.items():
        where = f"optimizer: {name} of parameter {shown(number)}"
        shape = () if name == "step" else parameter.shape
        if not isinstance(value, Tensor) or value.shape != shape or value.dtype != torch.float32:
            raise ValueError(f"{where} must be a float32 tensor of shape {tuple(shape)}")
        if not bool(value.isfinite().all()):
            raise ValueError(f"{where} has NaN or Inf")
        if name != "exp_avg" and bool((value < 0).any()):
            raise ValueError(f"{where} is below 0")


def _check_scaler(state: object) -> None:
    """Check the state of torch's GradScaler, which checks nothing when it loads."""
    _check_dict("scaler", state)
    for key in ("scale", "growth_factor", "backoff_factor"):
        value = state[key]
        if type(value) is not float or not 0 < value < math.inf:
            raise ValueError(f"scaler: {key} must be finite and above 0, got {shown(value)}")
    if not state["backoff_factor"] < 1 < state["growth_factor"]:
        raise ValueError("scaler: backoff_factor must be below 1 and growth_factor above 1")
    _check_count("scaler: growth_interval", state["growth_interval"], 1)
    _check_count("scaler: _growth_tracker", state["_growth_tracker"])


# --- how far the run has come ---------------------------------------------------------------------


def _check_progress(state: dict) -> None:
    _check_count("step", state["step"])
    _check_count("epoch", state["epoch"])
    _check_count("batches", state["batches"])
    totals = from_plain(EpochTotals, state["totals"], "totals.")
    if not 0 <= totals.accepted <= len(totals.norms):
        raise ValueError(f"totals.accepted is {totals.accepted} of {len(totals.norms)} steps")
    if not 0 <= totals.seconds < math.inf:
        raise ValueError(f"totals.seconds must be finite and at least 0, got {totals.seconds}")
    if not isinstance(state["epochs"], list) or len(state["epochs"]) != state["epoch"]:
        raise ValueError(f"epochs is {shown(state['epochs'])}, or its length is not epoch")
    for number, values in enumerate(state["epochs"], start=1):
        epoch = from_plain(EpochMetrics, values, f"epochs[{number - 1}].")
        if epoch.epoch != number or not 0 <= epoch.skipped <= epoch.steps:
            raise ValueError(
                f"epochs[{number - 1}] is of epoch {shown(epoch.epoch)}, or skips too many"
            )
        _check_count(f"epochs[{number - 1}].step", epoch.step, most=state["step"])


def _check_ranks(state: dict) -> None:
    """Check the place in the epoch and the random numbers of each process."""
    for name in ("loader", "random"):
        if not isinstance(state[name], list) or not state[name]:
            raise ValueError(
                f"{name} is {shown(state[name])}, not a list with an entry per process"
            )
    if len(state["loader"]) != len(state["random"]):
        raise ValueError("loader and random have different lengths")
    for place in state["loader"]:
        _check_dict("loader", place)
        _check_count("loader: epoch", place["epoch"])
        _check_count("loader: position", place["position"])
        for key, value in place.items():
            if not isinstance(key, str) or not isinstance(value, bool | int | float | type(None)):
                raise ValueError(f"loader: {shown(key)} is {shown(value)}")
    for numbers in state["random"]:
        _check_dict("random", numbers)
        try:
            _check_random(numbers)
        except (IndexError, OverflowError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"random: it is not a state of a generator: {error}") from error


def _check_place(state: dict, batches: int) -> None:
    """Check the place within an epoch."""
    _check_count("batches", state["batches"], most=batches)
    for place in state["loader"]:
        if (place["epoch"], place["position"]) != (state["epoch"] + 1, state["batches"]):
            raise ValueError(
                f"loader: epoch {place['epoch']}, position {place['position']} is not batch "
                f"{state['batches']} of epoch {state['epoch'] + 1}"
            )


def _check_random(state: dict) -> None:
    """Load the state into generators that are not used."""
    python = state["python"]
    if not isinstance(python, tuple | list) or len(python) != 3:
        raise ValueError(f"python's is {shown(python)}, not (version, numbers, rest)")
    random.Random().setstate(python)
    if not isinstance(state["numpy"], tuple | list):
        raise ValueError(f"numpy's is {shown(state['numpy'])}")
    name, keys, position, has_gauss, gauss = state["numpy"]
    if not isinstance(keys, Tensor) or keys.shape != (624,):
        raise ValueError(f"numpy's must have 624 numbers, got {shown(keys)}")
    if type(position) is not int or not 0 <= position <= 624:
        raise ValueError(
            "numpy's position must lie between 0 and 624"
        )  # numpy would read out of bounds
    numpy.random.RandomState().set_state(
        (name, keys.numpy().astype("uint32"), position, has_gauss, gauss)
    )
    torch.Generator().set_state(state["torch"])
    if not isinstance(state["cuda"], Tensor | None):
        raise ValueError(f"cuda's is {shown(state['cuda'])}")


def _check_dict(name: str, value: object) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{name} is {shown(value)}, not a dict")


def _check_count(name: str, value: object, least: int = 0, most: int = _MOST) -> None:
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{name} must be an integer from {least} to {most}, got {shown(value)}")
