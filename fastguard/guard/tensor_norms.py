"""What the guard remembers of each parameter's norm, by name.

The numbers are the columns of :class:`fastguard.ops.Statistics`'s ``per_tensor``.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

#: The rows, as the properties of :class:`fastguard.ops.Statistics` that they are, and what they
#: hold where nothing is known yet.
ROWS = {"ema_norms": math.inf, "clipped_since": -1, "usual_norms": math.inf, "risen_since": -1}


def unseen(n: int, device: torch.device) -> Tensor:
    """Columns of ``n`` parameters of which nothing is known, float64, shape (4, n)."""
    columns = torch.full((4, n), math.inf, dtype=torch.float64, device=device)
    columns[1::2] = -1.0
    return columns


class TensorNorms:
    """Whose the columns are. Those of parameters without a gradient at the moment are put aside.

    Steps have mostly the same parameters; the operators then read and write the same tensor.
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
            held: the columns of the names of the last call.
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
        """For each row a dict of the parameters of which there is something to say."""
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
        """The names of which :meth:`as_plain` made ``plain``; all columns are put aside.

        Rows that an older fastguard did not have may be missing. ``renamed`` gives a dict by names
        the names of now.

        Raises:
            ValueError: a number is negative or not finite.
            AttributeError, TypeError: it is something else.
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
