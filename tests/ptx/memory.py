"""Memory with exact bounds.

A :class:`Space` is global memory, a block's shared memory or the parameters of a launch. It has
allocations; each byte outside of them is out of bounds.
"""

import bisect
import ctypes

import numpy as np

from .error import Error
from .numbers import UNSIGNED

LINE = 16  # bytes: the most that one access moves


class Allocation:
    """Bytes of this process, at addresses from ``start`` on."""

    def __init__(self, start, nbytes, name, writable=True, at=None):
        self.start, self.end = start, start + nbytes
        self.name = name
        self.writable = writable
        # Whole lines, so that an aligned element has an index. Only what is inside is touched.
        self.first = start // LINE * LINE
        lines = -(-(self.end - self.first) // LINE)
        at = self.first if at is None else at
        memory = (ctypes.c_uint8 * (lines * LINE)).from_address(at)
        whole = np.frombuffer(memory, np.uint8)
        self.elements = {bits // 8: whole.view(type_) for bits, type_ in UNSIGNED.items()}

    def __repr__(self):
        return f"{self.name} ({self.end - self.start} bytes)"


class Space:
    def __init__(self, name):
        self.name = name
        self.starts = []
        self.allocations = []

    def allow(self, start, nbytes, name, writable=True):
        """Makes bytes of this process a part of the space, at their own address."""
        if nbytes == 0:
            return
        at = bisect.bisect(self.starts, start)
        before = self.allocations[at - 1] if at > 0 else None
        if before and (before.start, before.end) == (start, start + nbytes):
            before.writable |= writable
            return
        following = self.starts[at] if at < len(self.starts) else start + nbytes
        if (before and before.end > start) or following < start + nbytes:
            raise ValueError(f"{name} overlaps another allocation")
        self.insert(at, Allocation(start, nbytes, name, writable))

    def make(self, start, nbytes, name, fill):
        """New bytes at addresses of the space's own; ``start`` is a multiple of a line."""
        lines = -(-nbytes // LINE) + 1
        memory = np.full(lines * LINE, fill, np.uint8)
        shift = -memory.ctypes.data % LINE
        at = memory.ctypes.data + shift
        allocation = Allocation(start, nbytes, name, at=at)
        allocation.owner = memory
        self.insert(bisect.bisect(self.starts, start), allocation)
        return allocation

    def insert(self, at, allocation):
        self.starts.insert(at, allocation.start)
        self.allocations.insert(at, allocation)

    def load(self, addresses, size, count, lanes):
        """``count`` elements of ``size`` bytes from each address: (addresses, count)."""
        result = np.empty((len(addresses), count), UNSIGNED[8 * size])
        for part, allocation, index in self.places(addresses, size, count, lanes, writes=False):
            result[part] = allocation.elements[size][index]
        return result

    def store(self, addresses, values, lanes):
        """Elements to each address; the last one counts where several go to the same address."""
        size, count = values.dtype.itemsize, values.shape[1]
        for part, allocation, index in self.places(addresses, size, count, lanes, writes=True):
            allocation.elements[size][index] = values[part]

    def places(self, addresses, size, count, lanes, writes):
        """Parts of the addresses, the allocation of each, and the indices of its elements."""
        nbytes = size * count
        misaligned = addresses % np.uint64(nbytes) != 0
        if misaligned.any():
            self.fail("misaligned", addresses, misaligned, nbytes, lanes)
        steps = np.arange(count)
        left = np.ones(len(addresses), bool)
        while left.any():
            allocation = self.allocation_of(addresses, left, nbytes, lanes)
            inside = (addresses >= np.uint64(allocation.start)) & (
                addresses <= np.uint64(max(allocation.end - nbytes, 0))
            )
            inside &= left
            if not inside[left.argmax()]:
                self.fail("out of bounds", addresses, left, nbytes, lanes)
            if writes and not allocation.writable:
                self.fail("read only", addresses, inside, nbytes, lanes)
            part = slice(None) if inside.all() else inside
            offsets = (addresses[part] - np.uint64(allocation.first)).astype(np.int64)
            yield part, allocation, offsets[:, None] // size + steps
            left &= ~inside

    def allocation_of(self, addresses, left, nbytes, lanes):
        at = bisect.bisect(self.starts, int(addresses[left.argmax()]))
        if at == 0:
            self.fail("out of bounds", addresses, left, nbytes, lanes)
        return self.allocations[at - 1]

    def fail(self, kind, addresses, where, nbytes, lanes):
        first = int(where.argmax())
        address = int(addresses[first])
        at = bisect.bisect(self.starts, address)
        near = self.allocations[at - 1] if at > 0 else None
        beside = f", {address - near.start} bytes from the start of {near}" if near else ""
        what = f"{nbytes} bytes at {self.name} address {address:#x}{beside}"
        raise Error(kind, what, thread=int(lanes[first]))
