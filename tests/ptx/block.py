"""One block of threads: its registers, and which threads execute which instruction.

A register is an array with an element for each thread. Threads that are at the same instruction
execute it together; those at the lowest instruction go first, so threads that parted meet again. At
an instruction of whole warps the lanes wait for the others of their warp.
"""

import numpy as np

from .error import Error
from .numbers import DTYPES, UNSIGNED

POISON = 0xFF  # of what was never written: as a float it is NaN
WARP = 32


def is_parted(threads):
    """Whether a warp is there in part."""
    if len(threads) % WARP != 0:
        return False  # a block without warps, in which no instruction of warps can be executed
    of_warp = threads.reshape(-1, WARP)
    return bool((of_warp.any(1) != of_warp.all(1)).any())


class Block:
    def __init__(self, program, launch, index):
        self.program = program
        self.launch = launch
        self.index = index
        self.threads = launch.threads
        self.memory = launch.memory
        self.parameters = launch.parameters
        self.shared = program.shared_memory(launch.dynamic_shared)
        self.lanes = np.arange(self.threads)
        self.files = self.register_files()
        self.specials = self.special_registers()
        self.steps = 0
        self.copies = []  # asynchronous ones that are in no group yet
        self.groups_of_copies = []
        self.groups = {0: np.ones(self.threads, bool)}  # instruction: the threads that are at it
        self.after_barrier = {}  # the same for those that wait at the barrier before it
        self.ended = np.zeros(self.threads, bool)

    def register_files(self):
        """A view of the registers of each size as every type of that size."""
        files = {}
        for bits, count in self.program.counts.items():
            if bits == 1:
                files["pred"] = np.ones((count, self.threads), bool)
                continue
            file = np.full((count, self.threads), 2**bits - 1, UNSIGNED[bits])
            for type_, dtype in DTYPES.items():
                if type_ != "pred" and 8 * dtype.itemsize == bits:
                    files[type_] = file.view(dtype)
        return files

    def special_registers(self):
        workspace = self.launch.workspace
        numbers = {
            "%ctaid.x": self.index,
            "%nctaid.x": self.launch.blocks,
            "%ntid.x": self.threads,
            "%envreg1": workspace >> 32,
            "%envreg2": workspace & 0xFFFFFFFF,
        }
        numbers |= {f"%{name}.{axis}": 0 for name in ("tid", "ctaid") for axis in "yz"}
        numbers |= {f"%{name}.{axis}": 1 for name in ("ntid", "nctaid") for axis in "yz"}
        specials = {name: np.array([n], np.uint32) for name, n in numbers.items()}
        return specials | {"%tid.x": self.lanes.astype(np.uint32)}

    def run(self):
        """Runs to the end. Yields before each access that other blocks can see in the meantime."""
        while True:
            if not self.groups:
                self.leave_barrier()
            if not self.groups:
                return
            at = self.next_group()
            active = self.groups.pop(at)
            later = (other for other in self.groups if other > at)
            until = min(later, default=len(self.program.steps))
            yield from self.run_until(at, until, active)

    def next_group(self):
        """The lowest instruction whose threads need not wait for other lanes of their warps."""
        for at in sorted(self.groups):
            if not (self.program.steps[at].of_warps and is_parted(self.groups[at])):
                return at
        return min(self.groups)

    def run_until(self, at, until, active):
        """Some threads execute from ``at`` on, until they jump or meet others at ``until``."""
        all_active, parted = active.all(), is_parted(active)
        steps, first = self.program.steps, at
        while at < until:
            step = steps[at]
            if parted and step.of_warps and at > first:
                break
            mask = None if all_active else active
            if step.predicate is not None:
                mask = active & step.predicate(self)
                if mask.all():
                    mask = None
            self.count(step)
            if step.jump is not None:
                return step.jump(self, at, active, active if mask is None else mask)
            if mask is None or mask.any():
                if step.is_seen:
                    yield
                self.execute(step, mask)
            at += 1
        return self.join(at, active)

    def execute(self, step, mask):
        try:
            step.execute(self, mask)
        except Error as error:
            raise self.located(error, step) from None

    def located(self, error, step):
        name = self.program.kernel.name
        return Error(error.kind, error.what, step.text, name, self.index, error.thread)

    def count(self, step):
        self.steps += 1
        if self.steps > self.launch.step_limit:
            raise self.located(Error("endless", f"{self.steps} steps"), step)

    def active(self, mask):
        """The numbers of the threads of a mask."""
        return self.lanes if mask is None else np.flatnonzero(mask)

    def whole_warps(self, mask):
        """The threads of a mask as (warps, lanes). A warp that is there in part is an error."""
        lanes = self.active(mask)
        if mask is not None and is_parted(mask):
            raise Error("divergent", "a part of a warp executes this", thread=int(lanes[0]))
        return lanes.reshape(-1, WARP)

    # --- jumps ------------------------------------------------------------------------------------

    def join(self, at, threads):
        if threads.any():
            there = self.groups.get(at)
            self.groups[at] = threads if there is None else there | threads

    def branch(self, to, at, active, taken):
        self.join(to, taken)
        self.join(at + 1, active & ~taken)

    def end(self, at, active, ending):
        if self.copies or any(self.groups_of_copies):
            step = self.program.steps[at]
            raise self.located(Error("unfinished", "copies were not waited for"), step)
        self.ended |= ending
        self.join(at + 1, active & ~ending)

    def barrier(self, at, active, arriving):
        self.after_barrier[at + 1] = self.after_barrier.get(at + 1, False) | arriving
        self.join(at + 1, active & ~arriving)

    def leave_barrier(self):
        """Called when no thread can go on. All must be at the same barrier then."""
        if len(self.after_barrier) > 1 or (self.after_barrier and self.ended.any()):
            step = self.program.steps[min(self.after_barrier) - 1]
            raise self.located(Error("divergent", "not all threads come to this barrier"), step)
        self.groups, self.after_barrier = self.after_barrier, {}
