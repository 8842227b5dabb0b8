"""A module's buffers as they were after the last accepted step.

A NaN activation gets into BatchNorm's running statistics before any gradient exists, and would stay
there for ever.
"""

import weakref
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import ops


class _Saved(NamedTuple):
    buffer: Tensor | None  # the object that was in the buffer's place
    copy: Tensor | None  # its values; None also of what can not be written in place


class Buffers:
    """Copies of a module's buffers, to be kept or put back by a verdict that is on the device.

    All are copied each time: torch's own batch normalisation writes its running statistics without
    counting it in ``_version``, so there is no telling what changed.
    """

    def __init__(self, module: nn.Module | None):
        self._module = module
        self._saved: dict[tuple[nn.Module, str], _Saved] = {}
        self.commit()

    @torch.no_grad()
    def commit(self, part: nn.Module | None = None) -> None:
        """What is in the buffers now is good: of the module, or of one part without its parts."""
        copies: dict[int, Tensor] = {}  # two places may share a buffer
        if part is None:
            self.look_up()
            self._saved = {place: _save(buffer, copies) for place, buffer in self._current()}
            return
        for name, buffer in part._buffers.items():
            self._saved[part, name] = _save(buffer, copies)
        if part._buffers and part not in self._owners:
            self._owners.append(part)

    def look_up(self) -> None:
        """Find the modules that have buffers."""
        modules = [] if self._module is None else self._module.modules()
        self._owners = [owner for owner in modules if owner._buffers]

    @torch.no_grad()
    def settle(self, verdict: Tensor) -> None:
        """Put back what was saved if the verdict is a skip; else save what is there.

        The host does not wait, unless the forward pass put a tensor of another shape, or none, in
        a buffer's place, or made a new place.
        """
        current = dict(self._current())
        same: dict[int, tuple[Tensor, Tensor]] = {}
        replaced: dict[int, _Saved] = {}
        others = []
        for place in self._saved | current:
            buffer, saved = current.get(place), self._saved.get(place)
            if place not in current or saved is None or (buffer is None) != (saved.buffer is None):
                others.append(place)
            elif buffer is None or not (_writable(buffer) or buffer is not saved.buffer):
                continue
            elif saved.copy is None or not _alike(buffer, saved.copy) or not _writable(buffer):
                others.append(place)
            elif buffer is saved.buffer and not buffer.is_inference():
                same[id(buffer)] = buffer, saved.copy
            else:
                if id(buffer) not in replaced:
                    replaced[id(buffer)] = _settled(buffer, saved.copy, verdict)
                owner, name = place
                self._saved[place] = replaced[id(buffer)]
                owner._buffers[name] = self._saved[place].buffer
        if same:
            ops.settle_(*map(list, zip(*same.values(), strict=True)), verdict)
        if others:
            self._settle_on_host(others, current, ops.Verdict(int(verdict)).skipped)

    def copy(self) -> "Buffers":
        """With copies of its own, of what is saved here."""
        other = Buffers(None)
        other._module, other._owners = self._module, self._owners
        copies: dict[int, Tensor] = {}
        for place, (buffer, copy) in self._saved.items():
            if copy is not None:
                copy = copies.setdefault(id(copy), copy.clone())
            other._saved[place] = _Saved(buffer, copy)
        return other

    def restore(self) -> None:
        """Put back what was saved."""
        self.settle(torch.tensor(int(ops.Verdict.SKIP_ROLLBACK), device="cpu"))

    @torch.no_grad()
    def heal(self) -> None:
        """Put back what was saved if a buffer that was finite no longer is; the host waits."""
        current = dict(self._current())
        for place, saved in self._saved.items():
            if saved.copy is not None and _finite(saved.copy) and not _finite(current.get(place)):
                return self.restore()

    def _settle_on_host(self, places: list, current: dict, skip: bool) -> None:
        for place in places:
            owner, name = place
            buffer, saved = current.get(place), self._saved.get(place)
            if not skip:
                if place in current:
                    self._saved[place] = _save(buffer, {})
                else:
                    del self._saved[place]
            elif saved is not None and saved.buffer is None:
                owner._buffers[name] = None
            elif saved is not None and saved.copy is not None:
                owner._buffers[name] = _as(saved.copy, buffer)
                self._saved[place] = _save(owner._buffers[name], {})
            elif saved is None and owner in {o for o, _ in self._saved}:
                owner._buffers.pop(name, None)  # registered by the forward pass
            elif hasattr(owner, "reset_running_stats") and not _finite(buffer):
                owner.reset_running_stats()  # a lazy or a new normalisation layer

    def _current(self) -> Iterator[tuple[tuple[nn.Module, str], Tensor | None]]:
        for owner in self._owners:
            for name, buffer in owner._buffers.items():
                yield (owner, name), buffer


def _save(buffer: Tensor | None, copies: dict[int, Tensor]) -> _Saved:
    if buffer is None or not _writable(buffer):
        return _Saved(buffer, None)
    return _Saved(buffer, copies.setdefault(id(buffer), buffer.detach().clone()))


def _settled(buffer: Tensor, copy: Tensor, verdict: Tensor) -> _Saved:
    """A new tensor: the one that took the buffer's place may be the user's, as a batch."""
    skip = (verdict >= int(ops.Verdict.SKIP_NONFINITE)).to(buffer.device)
    settled = torch.where(skip, copy, buffer)
    return _Saved(settled, settled.clone())


def _finite(buffer: Tensor | None) -> bool:
    return buffer is None or not _writable(buffer) or bool(buffer.isfinite().all())


def _as(copy: Tensor, buffer: Tensor | None) -> Tensor:
    """The values of before in the dtype and on the device of now: the module may have moved."""
    if buffer is None or buffer.is_floating_point() != copy.is_floating_point():
        return copy.clone()
    return copy.to(buffer.device, buffer.dtype, copy=True)


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device


def _writable(tensor: Tensor) -> bool:
    """Whether it can be copied and written in place: not lazy, sparse, nested or expanded."""
    return (
        not nn.parameter.is_lazy(tensor)
        and tensor.layout == torch.strided
        and not tensor.is_nested
        and all(s > 0 or n < 2 for s, n in zip(tensor.stride(), tensor.shape, strict=True))
    )


class OnLoad:
    """A load_state_dict hook that neither keeps its guard alive nor goes with a module's copy."""

    def __init__(self, method: Callable[[nn.Module], None] | None = None):
        self._method = None if method is None else weakref.WeakMethod(method)

    def __call__(self, module: nn.Module, incompatible_keys) -> None:
        method = None if self._method is None else self._method()
        if method is not None:
            method(module)

    def __reduce__(self):
        return type(self), ()
