"""The statistics of earlier norms: of all gradients together, and of each parameter.

:class:`fastguard.ops.Statistics` holds the numbers. :class:`TensorNorms` maps the columns of its
``per_tensor`` to parameters.
"""

import math
import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from fastguard import ops
from fastguard.thresholds import Kind

#: Version of the state dict. Version 1 had no version entry and held the accepted norms alone.
VERSION = 2

WINDOW = 128  # the number of norms whose median is the usual norm, as in llm.c and OLMo-core


def fresh_statistics(device: torch.device) -> ops.Statistics:
    zeros = lambda n: torch.zeros(n, dtype=torch.float64, device=device)  # noqa: E731
    return ops.Statistics(zeros(4), zeros(WINDOW), zeros(WINDOW), zeros(0).view(4, 0))


def as_plain(known: ops.Statistics) -> dict:
    """The statistics as numbers and lists, for a checkpoint, without those of each parameter."""
    seen, accepted, mean, variance = known.numbers.tolist()
    return {
        "seen": int(seen),
        "accepted": int(accepted),
        "mean": mean,
        "variance": variance,
        "seen_norms": _in_order(known.seen_norms, int(seen)),
        "accepted_norms": _in_order(known.accepted_norms, int(accepted)),
    }


def from_plain(plain: dict, device: torch.device, new_moments: bool) -> ops.Statistics:
    """The statistics from the result of :func:`as_plain`.

    Args:
        new_moments: compute mean and variance from the accepted norms, because another threshold
            wrote the state.

    Raises:
        ValueError: a number is negative or not finite, or a list has not the length of its count.
        AttributeError, KeyError, TypeError: ``plain`` is something else.
    """
    known = fresh_statistics(device)
    counts = [int(plain["seen"]), int(plain["accepted"])]
    moments = [float(plain["mean"]), float(plain["variance"])]
    windows = [[float(norm) for norm in plain[name]] for name in ("seen_norms", "accepted_norms")]
    if not all(0 <= number < math.inf for number in (*counts, *moments, *windows[0], *windows[1])):
        raise ValueError("a number is negative or not finite")
    for count, norms, window in zip(counts, windows, known[1:3], strict=True):
        if len(norms) != min(count, WINDOW):
            raise ValueError(f"of {count} norms the last {len(norms)} are there")
        places = [i % WINDOW for i in range(count - len(norms), count)]
        window[places] = window.new_tensor(norms)
    accepted = windows[1]
    if new_moments and accepted:
        moments = [statistics.fmean(accepted), statistics.pvariance(accepted)]
    known.numbers.copy_(torch.tensor([*counts, *moments], dtype=torch.float64))
    return known


def _in_order(window: Tensor, count: int) -> list[float]:
    """The last norms of ``count`` in all, the oldest first."""
    norms = window.tolist()
    return [norms[i % WINDOW] for i in range(max(0, count - WINDOW), count)]


# --- the norm of each parameter -------------------------------------------------------------------

#: The rows, named by the properties of :class:`fastguard.ops.Statistics`, and the value of each
#: where nothing is known yet.
ROWS = {"ema_norms": math.inf, "clipped_since": -1, "usual_norms": math.inf, "risen_since": -1}


def unseen(n: int, device: torch.device) -> Tensor:
    """Columns of ``n`` parameters without earlier norms, float64, shape (4, n)."""
    columns = torch.full((4, n), math.inf, dtype=torch.float64, device=device)
    columns[1::2] = -1.0
    return columns


class TensorNorms:
    """Maps columns to parameters, and keeps the columns of parameters without a gradient.

    Most steps have the same parameters. The operators then read and write the same tensor.
    """

    def __init__(self, aside: dict[str, Tensor] | None = None):
        self._names: list[str] = []
        self._aside = {} if aside is None else aside  # each (4,); never written in place

    def copy(self) -> "TensorNorms":
        copy = TensorNorms(dict(self._aside))
        copy._names = self._names
        return copy

    def select(self, held: Tensor, names: list[str]) -> Tensor:
        """The columns of these parameters, float64, shape (4, N), on the device of ``held``.

        Args:
            held: the columns of the last call's names.
        """
        if names == self._names:
            return held
        self._aside = self._by_name(held)
        self._names = list(names)
        new = unseen(1, held.device)[:, 0]
        columns = [self._aside.pop(name, new).to(held.device) for name in names]
        return torch.stack(columns, dim=1) if columns else unseen(0, held.device)

    def _by_name(self, held: Tensor) -> dict[str, Tensor]:
        return self._aside | dict(zip(self._names, held.unbind(1), strict=True))

    # --- checkpoints ------------------------------------------------------------------------------

    def as_plain(self, held: Tensor) -> dict[str, dict[str, float]]:
        """For each row a dict from parameter names to the known values."""
        columns = self._by_name(held)
        rows = torch.stack([*columns.values()], dim=1) if columns else held[:, :0]
        return {
            row: {name: x for name, x in zip(columns, values, strict=True) if x != unknown}
            for (row, unknown), values in zip(ROWS.items(), rows.tolist(), strict=True)
        }

    @classmethod
    def from_plain(
        cls, plain: dict, device: torch.device, renamed: Callable[[dict], dict] = dict
    ) -> "TensorNorms":
        """The object from the result of :meth:`as_plain`. No column is selected yet.

        Rows may be missing, because older versions did not have all. ``renamed`` replaces the keys
        of a dict by the present names of the parameters.

        Raises:
            ValueError: a number is negative or not finite.
            AttributeError, TypeError: ``plain`` is something else.
        """
        rows = [renamed(plain.get(row, {})) for row in ROWS]
        names = list(dict.fromkeys(name for row in rows for name in row))
        if not all(0 <= number < math.inf for row in rows for number in row.values()):
            raise ValueError("a norm or a step is negative or not finite")
        values = [
            [float(row.get(name, unknown)) for name in names]
            for row, unknown in zip(rows, ROWS.values(), strict=True)
        ]
        columns = torch.tensor(values, dtype=torch.float64, device=device)
        return cls(dict(zip(names, columns.unbind(1), strict=True)) if names else {})


# --- both together --------------------------------------------------------------------------------


class Memory:
    """The state that the next decision depends on: of steps, micro-batches and each parameter.

    Args:
        device: the device of the parameters, where the decisions are made.
    """

    def __init__(self, device: torch.device):
        self.statistics = fresh_statistics(device)
        #: The statistics of micro-batches, for ``GradGuard.accumulate``.
        self.micro_statistics = fresh_statistics(device)
        self.tensor_norms = TensorNorms()

    def copy(self) -> "Memory":
        copy = Memory(self.statistics.numbers.device)
        copy.statistics = self.statistics.copy()
        copy.micro_statistics = self.micro_statistics.copy()
        copy.tensor_norms = self.tensor_norms.copy()
        return copy

    def select(self, names: list[str], device: torch.device) -> None:
        """Move ``statistics`` to ``device``, and give it the columns of these parameters."""
        if self.statistics.numbers.is_meta and device.type != "meta":
            self.tensor_norms = TensorNorms()
        known = _on(self.statistics, device)
        columns = self.tensor_norms.select(known.per_tensor, names)
        self.statistics = known._replace(per_tensor=columns)

    def of_micro_batches(self, device: torch.device) -> ops.Statistics:
        """The statistics of micro-batches, on ``device``."""
        self.micro_statistics = _on(self.micro_statistics, device)
        return self.micro_statistics

    def state_dict(self, kind: Kind) -> dict:
        """The state as plain numbers. This is a host-device sync.

        Args:
            kind: the kind of the guard's threshold.
        """
        return {
            "threshold": kind.name.lower(),
            "statistics": as_plain(self.statistics),
            "micro_statistics": as_plain(self.micro_statistics),
            **self.tensor_norms.as_plain(self.statistics.per_tensor),
        }

    @classmethod
    def from_state(
        cls, state: dict, device: torch.device, kind: Kind, renamed: Callable[[dict], dict]
    ) -> "Memory":
        """The object from the result of :meth:`state_dict`.

        Args:
            kind: the kind of the loading guard's threshold, which may be another one.
            renamed: replaces the keys of a dict by the present names of the parameters.

        Raises:
            ValueError: a number is negative or not finite; AdaGC accepted steps, but the state has
                no norms by parameter.
            AttributeError, KeyError, TypeError: ``state`` is something else.
        """
        memory = cls(device)
        other = Kind[state["threshold"].upper()] is not kind
        memory.statistics = from_plain(
            state["statistics"], device, other
        )  # ZClip alone has moments
        memory.micro_statistics = from_plain(state["micro_statistics"], device, False)
        memory.tensor_norms = TensorNorms.from_plain(state, device, renamed)
        accepted = any(memory.statistics.accepted_norms)
        if state["threshold"] == "adagc" and not state["ema_norms"] and accepted:
            raise ValueError(
                "AdaGC accepted steps, but the state has no norms by parameter. torch.distributed."
                "checkpoint loses them where it loads into a fresh guard: save "
                "json.dumps(guard.state_dict()), and load json.loads() of it"
            )
        return memory


def _on(known: ops.Statistics, device: torch.device) -> ops.Statistics:
    if known.numbers.is_meta and device.type != "meta":  # the guard was built before to_empty
        return fresh_statistics(device)
    if known.numbers.device == device:
        return known
    return ops.Statistics(*(tensor.to(device) for tensor in known))


def of_this_version(state: dict) -> dict:
    """The state dict in the format of the present version.

    Raises:
        ValueError: a newer fastguard wrote it.
    """
    version = state.get("version", 1)
    if version == 1:
        return _from_version_1(state)
    if version != VERSION:
        raise ValueError(
            f"it is of version {version}, and this fastguard knows the versions 1 to {VERSION}; "
            "use the fastguard that wrote it, or a newer one"
        )
    return state


def _from_version_1(state: dict) -> dict:
    count, mean, variance = state["moments"]
    skips = list(state["skips_in_a_row"])
    norms = {"seen_norms": state["accepted"], "accepted_norms": state["accepted"]}
    counts = {"seen": count, "accepted": count, "mean": mean, "variance": variance}
    return state | {
        "statistics": counts | norms,
        "micro_statistics": as_plain(fresh_statistics(torch.device("cpu"))),
        "budget": {
            "steps": [skip["step"] for skip in skips],
            "skips": skips,
            "in_a_row": len(skips),
            "searches": state.get("searches", []),
        },
    }
