"""Copies of a module's buffers, made after the last accepted step.

A forward pass writes a NaN activation into BatchNorm's running statistics before any gradient
exists. Without a copy the NaN would stay there for ever. The forward pass may belong to the step of
another guard: the discriminator's step of a GAN also writes the generator's statistics.
"""

import logging
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastguard import ops

from .module_names import Names
from .report import Transfer

logger = logging.getLogger(__name__)

Place = tuple[nn.Module, str]  # a module and the name of its buffer


class _Saved(NamedTuple):
    buffer: Tensor | None  # the object that was in the buffer's place
    copy: Tensor | None  # its values; None without a buffer that can be written in place


class Buffers:
    """Copies of modules' buffers. A verdict on the device updates them or restores the buffers.

    Every buffer is copied in every step. ``_version`` cannot tell which ones changed: torch's batch
    normalisation writes its running statistics without incrementing it.

    A NaN or Inf never replaces a finite value in a copy, whatever the verdict is. In this case all
    buffers of the module that owns the buffer are restored, because its mean, variance and count
    belong together.

    Args:
        module: the guarded module, or None.
        others: more modules, or (name, buffer) pairs as ``named_buffers`` gives them.

    Raises:
        TypeError: ``others`` holds something else.
    """

    def __init__(
        self,
        module: nn.Module | None,
        others: nn.Module | Iterable[nn.Module | tuple[str, Tensor]] = (),
    ):
        self._roots = [] if module is None else [("", module)]
        self._roots += _named([others] if isinstance(others, nn.Module) else others)
        self._saved: dict[Place, _Saved] = {}
        #: The modules that have buffers, and the name of each.
        self._owners: dict[nn.Module, str] = {}
        self._lost = _Lost()
        #: The places in the last call of ops.settle_, the numbers of their owners, their names.
        self._settled: tuple[list[Place], Tensor, list[str]] | None = None
        self.commit()

    def modules(self) -> Iterator[nn.Module]:
        """All modules that may have buffers, with their submodules."""
        return (part for _, root in self._roots for part in root.modules())

    @torch.inference_mode(False)  # a copy made in inference mode could not be written later
    @torch.no_grad()
    def commit(self, part: nn.Module | None = None) -> None:
        """Copy the present values: of all modules, or of ``part`` without its submodules."""
        copies: dict[int, Tensor] = {}  # two places may share a buffer
        if part is None:
            self.look_up()
            self._saved = {place: _save(buffer, copies) for place, buffer in self._current()}
            return
        for name, buffer in part._buffers.items():
            self._saved[part, name] = _save(buffer, copies)
        if part._buffers:
            self._owners.setdefault(part, type(part).__name__)

    def look_up(self) -> None:
        """Find the modules that have buffers."""
        self._owners = {}
        for prefix, root in self._roots:
            names = Names(root)
            for path, owner in root.named_modules():
                if owner._buffers:
                    path = ".".join(filter(None, (prefix, names.of_module(path))))
                    self._owners.setdefault(owner, path)

    @torch.inference_mode(False)
    @torch.no_grad()
    def settle(self, verdict: Tensor) -> None:
        """Restore the buffers if the verdict is a skip; else copy them.

        This needs no host-device sync, with one exception: the forward pass registered a new
        buffer, removed one, or replaced one by a tensor of another shape, dtype or device.
        """
        current = dict(self._current())
        places = self._saved | current
        on_host = {place[0] for place in places if self._needs_host(place, current)}
        pairs: dict[int, tuple[Tensor, Tensor]] = {}
        replaced: dict[int, _Saved] = {}
        settled = []
        for place in places:
            buffer, saved = current.get(place), self._saved.get(place)
            if place[0] in on_host or buffer is None or saved.copy is None:
                continue
            if buffer is not saved.buffer or buffer.is_inference():
                # Replace it by a clone: the module may hold a tensor of the user, such as a batch,
                # which settle_ must not write.
                if id(buffer) not in replaced:
                    replaced[id(buffer)] = _Saved(buffer.detach().clone(), saved.copy)
                saved = self._saved[place] = replaced[id(buffer)]
                owner, name = place
                owner._buffers[name] = buffer = saved.buffer
            if id(buffer) not in pairs:
                pairs[id(buffer)] = buffer, saved.copy
                settled.append(place)
        if pairs:
            owners, names = self._owners_of(settled, verdict.device)
            lost = ops.settle_(*map(list, zip(*pairs.values(), strict=True)), verdict, owners)
            self._lost.note(names, lost)
        if on_host:
            skip = ops.Verdict(int(verdict)).skipped
            for owner in on_host:
                self._settle_on_host(owner, [p for p in places if p[0] is owner], current, skip)

    def _needs_host(self, place: Place, current: dict[Place, Tensor | None]) -> bool:
        buffer, saved = current.get(place), self._saved.get(place)
        if place not in current or saved is None or (buffer is None) != (saved.buffer is None):
            return True
        if buffer is None:
            return False
        if saved.copy is None:  # a lazy layer may have materialised its buffer since
            return buffer is not saved.buffer or (_writable(buffer) and not buffer.is_meta)
        return not (_alike(buffer, saved.copy) and _writable(buffer))

    def _owners_of(self, places: list[Place], device: torch.device) -> tuple[Tensor, list[str]]:
        """The number of each place's owner, int64, shape (N,), and the name of each place."""
        if (
            self._settled is None
            or self._settled[0] != places
            or (self._settled[1].device != device)
        ):
            numbers: dict[nn.Module, int] = {}
            rows = [numbers.setdefault(owner, len(numbers)) for owner, _ in places]
            names = list(map(self._name, places))
            self._settled = places, torch.tensor(rows, device=device), names
        return self._settled[1:]

    def _name(self, place: Place) -> str:
        owner, name = place
        path = self._owners.get(owner, type(owner).__name__)
        return f"{path}.{name}" if path else name

    def tell(self, wait: bool = False) -> None:
        """Warn of buffers that were restored in accepted steps; ``wait`` for the last ones too."""
        self._lost.tell(wait)

    def copy(self) -> "Buffers":
        """An independent clone of these copies."""
        other = Buffers(None)
        other._roots, other._owners, other._lost = self._roots, self._owners, self._lost
        copies: dict[int, Tensor] = {}
        for place, (buffer, copy) in self._saved.items():
            if copy is not None:
                copy = copies.setdefault(id(copy), copy.clone())
            other._saved[place] = _Saved(buffer, copy)
        return other

    def restore(self) -> None:
        """Write the copies back into the buffers."""
        self.settle(torch.tensor(int(ops.Verdict.SKIP_ROLLBACK), device="cpu"))

    @torch.no_grad()
    def heal(self) -> None:
        """Restore if a buffer is NaN or Inf and its copy is finite. This is a host-device sync."""
        current = dict(self._current())
        if any(_is_lost(current.get(place), saved) for place, saved in self._saved.items()):
            self.restore()

    def _settle_on_host(
        self, owner: nn.Module, places: list[Place], current: dict, skip: bool
    ) -> None:
        lost = [p for p in places if _is_lost(current.get(p), self._saved.get(p))]
        if lost and not skip:
            self._lost.warn([self._name(place) for place in lost])
        unknown = [p for p in places if p not in self._saved or self._saved[p].copy is None]
        if hasattr(owner, "reset_running_stats") and not all(
            _finite(current.get(place)) for place in unknown
        ):
            owner.reset_running_stats()  # a lazy or a new normalisation layer
        known = any(place in self._saved for place in places)
        for place in places:
            name = place[1]
            buffer, saved = owner._buffers.get(name), self._saved.get(place)
            if not (skip or lost):
                if place in current:
                    self._saved[place] = _save(buffer, {})
                else:
                    del self._saved[place]
            elif saved is None and known:
                owner._buffers.pop(name, None)  # registered by the forward pass
            elif saved is not None and saved.buffer is None:
                owner._buffers[name] = None
            elif saved is not None and saved.copy is not None:
                owner._buffers[name] = _as(saved.copy, buffer)
                self._saved[place] = _save(owner._buffers[name], {})

    def _current(self) -> Iterator[tuple[Place, Tensor | None]]:
        for owner in self._owners:
            for name, buffer in owner._buffers.items():
                yield (owner, name), buffer


class _Lost:
    """Warns once of each buffer that was restored in an accepted step."""

    def __init__(self):
        self._under_way: deque[tuple[list[str], Transfer]] = deque()
        self._said: set[str] = set()

    def __getstate__(self) -> dict:
        return vars(self) | {"_under_way": deque()}  # events of a device cannot be copied

    def note(self, names: list[str], lost: Tensor) -> None:
        self._under_way.append((names, Transfer(lost)))

    def tell(self, wait: bool) -> None:
        while self._under_way and (wait or self._under_way[0][1].ready):
            names, transfer = self._under_way.popleft()
            (lost,) = transfer.wait()
            if any(lost):
                self.warn([name for name, n in zip(names, lost, strict=False) if n])

    def warn(self, names: list[str]) -> None:
        for name in names:
            if name not in self._said:
                self._said.add(name)
                logger.warning(
                    "The buffer %s became NaN or Inf though the gradients are finite, and was set "
                    "back with the other buffers of its module. A forward pass outside of this "
                    "guard's steps wrote it, as of a GAN's other network: name that module in "
                    "GradGuard(buffers=[...]) of the guard whose step was skipped. This is said "
                    "once",
                    name,
                )


def _named(others: Iterable[nn.Module | tuple[str, Tensor]]) -> list[tuple[str, nn.Module]]:
    """(name, module) pairs. A module's name is its class; one unnamed module holds all pairs."""
    named, pairs = [], nn.Module()
    for other in others:
        if isinstance(other, nn.Module):
            named.append((type(other).__name__, other))
        elif isinstance(other, tuple) and len(other) == 2 and isinstance(other[1], Tensor):
            pairs._buffers[other[0]] = other[1]
        else:
            raise TypeError(
                "GradGuard's buffers are modules or (name, buffer) pairs, as named_buffers() gives "
                f"them; got a {type(other).__name__}"
            )
    return [*named, ("", pairs)] if pairs._buffers else named


def _save(buffer: Tensor | None, copies: dict[int, Tensor]) -> _Saved:
    if buffer is None or buffer.is_meta or not _writable(buffer):
        return _Saved(buffer, None)  # a tensor on the meta device has no values
    return _Saved(buffer, copies.setdefault(id(buffer), buffer.detach().clone()))


def _is_lost(buffer: Tensor | None, saved: _Saved | None) -> bool:
    """Whether the copy is finite and the buffer is not. This is a host-device sync."""
    known = saved is not None and saved.copy is not None
    return known and _finite(saved.copy) and not _finite(buffer)


def _finite(buffer: Tensor | None) -> bool:
    if buffer is None or buffer.is_meta or not _writable(buffer):
        return True
    return buffer.dtype not in ops.FLOATING_DTYPES or bool(buffer.isfinite().all())


def _as(copy: Tensor, buffer: Tensor | None) -> Tensor:
    """``copy`` in the dtype and on the device of ``buffer``: the module may have been moved."""
    if buffer is None or buffer.is_floating_point() != copy.is_floating_point():
        return copy.clone()
    return copy.to(buffer.device, buffer.dtype, copy=True)


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device


def _writable(tensor: Tensor) -> bool:
    """Whether a copy can be written in place: not of a lazy, sparse, nested or expanded tensor."""
    return (
        not nn.parameter.is_lazy(tensor)
        and tensor.layout == torch.strided
        and not tensor.is_nested
        and all(s > 0 or n < 2 for s, n in zip(tensor.stride(), tensor.shape, strict=True))
    )


class OnLoad:
    """A load_state_dict hook with a weak reference to its guard. Copies of a module do nothing."""

    def __init__(self, method: Callable[[nn.Module], None] | None = None):
        self._method = None if method is None else weakref.WeakMethod(method)

    def __call__(self, module: nn.Module, incompatible_keys) -> None:
        method = None if self._method is None else self._method()
        if method is not None:
            method(module)

    def __reduce__(self):
        return type(self), ()
