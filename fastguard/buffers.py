"""A module's buffers as they were after the last accepted step.

A NaN activation gets into BatchNorm's running statistics before any gradient exists, and would stay
there for ever.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from . import ops


class Buffers:
    """Copies of a module's buffers, to be kept or put back by a verdict that is on the device.

    All are copied each time: torch's own batch normalisation writes its running statistics without
    counting it in ``_version``, so there is no telling what changed.
    """

    def __init__(self, module: nn.Module | None):
        self._module = module
        self._saved: dict[tuple[nn.Module, str], Tensor | None] = {}
        self.commit()

    @torch.no_grad()
    def commit(self) -> None:
        """What is in the buffers now is good; also looks for new ones."""
        self._owners = [] if self._module is None else list(self._module.modules())
        self._saved = {
            place: None if buffer is None else buffer.detach().clone()
            for place, buffer in self._current()
        }
        # A module without buffers is not looked at again before the next commit.
        self._owners = list({owner: None for owner, _ in self._saved})

    @torch.no_grad()
    def settle(self, verdict: Tensor) -> None:
        """Put back what was saved if the verdict is a skip; else save what is there.

        The host does not wait, unless the forward pass put a tensor of another shape, or none, in
        a buffer's place.
        """
        if not self._saved:
            return
        current = dict(self._current())
        alike, replaced = {}, []
        for place in self._saved | current:
            buffer, copy = current.get(place), self._saved.get(place)
            if buffer is not None and copy is not None and _alike(buffer, copy):
                alike[id(buffer)] = (buffer, copy)
            elif buffer is not copy:
                replaced.append(place)
        buffers, copies = zip(*alike.values(), strict=True) if alike else ((), ())
        ops.settle_(buffers, copies, verdict)
        if replaced:
            skip = ops.Verdict(int(verdict)).skipped
            for place in replaced:
                self._settle_replaced(place, current.get(place), skip)

    def copy(self) -> "Buffers":
        """With copies of its own, of what is saved here."""
        other = Buffers(None)
        other._module, other._owners = self._module, self._owners
        other._saved = {k: None if c is None else c.clone() for k, c in self._saved.items()}
        return other

    def restore(self) -> None:
        """Put back what was saved."""
        current = dict(self._current())
        for place in self._saved | current:
            buffer, copy = current.get(place), self._saved.get(place)
            if buffer is not None and copy is not None and _alike(buffer, copy):
                buffer.copy_(copy)
            else:
                self._settle_replaced(place, buffer, skip=True)

    def _settle_replaced(self, place, buffer: Tensor | None, skip: bool) -> None:
        owner, name = place
        copy = self._saved.get(place)
        if not skip:
            self._saved[place] = None if buffer is None else buffer.detach().clone()
        elif place in self._saved:
            owner._buffers[name] = None if copy is None else copy.clone()
        else:
            del owner._buffers[name]  # registered by the forward pass

    def _current(self) -> Iterator[tuple[tuple[nn.Module, str], Tensor | None]]:
        for owner in self._owners:
            for name, buffer in owner._buffers.items():
                if buffer is None or not (nn.parameter.is_lazy(buffer) or _expanded(buffer)):
                    yield (owner, name), buffer


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device


def _expanded(tensor: Tensor) -> bool:
    """Whether elements share memory; such a tensor can not be written in place, by nobody."""
    return any(s == 0 and n > 1 for s, n in zip(tensor.stride(), tensor.shape, strict=True))
