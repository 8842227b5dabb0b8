"""A GPU that runs the blocks of a launch in some order."""

import random
from dataclasses import dataclass, field

import numpy as np

from .block import Block
from .memory import Space

STEP_LIMIT = 2_000_000  # instructions of a block
RESIDENT = 6  # blocks at a time, where the launch is not cooperative


@dataclass(frozen=True)
class Order:
    """The order of blocks: "in turn", "reversed", or "mixed", which draws it from a seed.

    In turn, a block ends before the next one begins. In the others, blocks that are there at the
    same time take turns at their atomics.
    """

    how: str = "in turn"
    seed: int = 0


@dataclass
class Launch:
    program: object
    memory: Space
    parameters: Space
    blocks: int
    threads: int
    dynamic_shared: int = 0
    cooperative: bool = False
    order: Order = field(default_factory=Order)
    step_limit: int = STEP_LIMIT
    workspace: int = 0  # the address of what a cooperative launch counts its blocks with

    def __post_init__(self):
        self.random = random.Random(self.order.seed)

    def run(self):
        """Runs all blocks to their ends."""
        waiting = self.indices()
        most = len(waiting) if self.cooperative else 1 if self.order.how == "in turn" else RESIDENT
        running = []
        with np.errstate(all="ignore"):
            while waiting or running:
                while waiting and len(running) < most:
                    running.append(Block(self.program, self, waiting.pop(0)).run())
                block = self.next_of(running)
                if next(block, "ended") == "ended":
                    running.remove(block)

    def indices(self):
        indices = list(range(self.blocks))
        if self.order.how == "reversed":
            indices.reverse()
        if self.order.how == "mixed":
            self.random.shuffle(indices)
        return indices

    def next_of(self, running):
        if self.order.how == "mixed":
            return self.random.choice(running)
        if self.order.how == "in turn" and not self.cooperative:
            return running[0]
        running.append(running.pop(0))
        return running[-1]

    def order_of(self, lanes):
        """The order in which an atomic serves the threads of a warp."""
        lanes = lanes.tolist()
        if self.order.how == "mixed":
            self.random.shuffle(lanes)
        return lanes


class Machine:
    def __init__(self, programs, order=None, step_limit=STEP_LIMIT):
        self.programs = programs  # name of a kernel: Program
        self.memory = Space("global")
        self.owners = []  # of memory that only the machine needs
        self.order = order or Order()
        self.step_limit = step_limit

    def launch(self, name, blocks, threads, *arguments, dynamic_shared=0, cooperative=False):
        """``arguments``: the bytes of each parameter."""
        program = self.programs(name)
        if program.kernel.threads is not None and threads > program.kernel.threads:
            raise ValueError(f"{name}: {threads} threads, at most {program.kernel.threads}")
        workspace = np.zeros(8, np.uint32) if cooperative else None
        if cooperative:
            self.memory.allow(workspace.ctypes.data, workspace.nbytes, "grid", True)
            self.owners.append(workspace)
        Launch(
            program,
            self.memory,
            program.parameter_memory(arguments),
            blocks,
            threads,
            dynamic_shared,
            cooperative,
            self.order,
            self.step_limit,
            workspace.ctypes.data if cooperative else 0,
        ).run()
