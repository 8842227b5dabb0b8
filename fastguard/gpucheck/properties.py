"""Properties of the operators together: equal bits in repetitions, in graphs and on streams."""

import functools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fastguard import ops
from fastguard.guard.statistics import fresh_statistics, unseen
from fastguard.thresholds import AdaGC, Fixed, Threshold

from .cases import Grid, Spec, draw
from .checks import Case, Check, Compared, same_bits

_OPTIONS = (1e-2, 0.9, 0.98, 0.1, 1e-8, True, False, False)


class Chain:
    """The operators of guarded steps on tensors at fixed addresses, which a CUDA graph needs."""

    def __init__(
        self, sizes: list[int], device: torch.device, threshold: Threshold | None = None, seed=0
    ):
        self._generator = torch.Generator().manual_seed(seed)
        self._threshold = threshold or Fixed()
        dtypes = (torch.float32, torch.bfloat16, torch.float32, torch.float16)
        self._specs = [Spec((size,), dtypes[i % 4]) for i, size in enumerate(sizes)]
        self.params, self.grads, self.saved = (
            [draw(spec, self._generator).to(device) for spec in self._specs] for _ in range(3)
        )
        self.sums = [param.float() for param in self.params]
        packed = ops.packed_offsets(sizes)[-1]
        self.state = [torch.zeros(n, device=device) for n in (packed, packed, 0, len(sizes))]
        float64 = {"dtype": torch.float64, "device": device}
        columns = unseen(len(sizes), device)
        self.statistics = fresh_statistics(device)._replace(per_tensor=columns)
        self.window = torch.zeros(3, **float64)
        self.owners = torch.arange(len(sizes), device=device)
        self.outputs: list[Tensor] = []
        self._before = [t.clone() for t in self.tensors()]

    def step(self) -> None:
        """The operators of one guarded step."""
        rule = (None, None, self.statistics, 7, self._threshold, 1.0, math.inf)
        measured, decided = ops.grad_norm_decide_(self.grads, *rule)
        ops.adamw_(self.params, self.grads, *self.state, *decided[:2], *_OPTIONS)
        self.outputs = [*measured, *decided]

    def others(self) -> None:
        """The operators that a plain step does not call."""
        verdict, coef = self.outputs[4], self.outputs[3]
        ops.accumulate_(self.sums, self.grads, verdict, self.window, 1.0)
        ops.scale_(self.grads, coef)
        measured = ops.grad_norm(self.grads)
        rule = (None, None, self.statistics, 7, self._threshold, 0.5, math.inf)
        decided = ops.guard_decide_(measured, *rule)
        ops.clip_(self.grads, 0.5, math.inf)
        lost = ops.settle_(self.saved, self.grads, decided.verdict, self.owners)
        self.outputs += [*measured, *decided, lost]

    def new_gradients(self, bad: bool = False) -> None:
        for spec, grad in zip(self._specs, self.grads, strict=True):
            grad.copy_(draw(spec, self._generator))
        if bad:
            self.grads[-1][0] = math.nan

    def tensors(self) -> list[Tensor]:
        """All tensors that the operators write or returned."""
        lists = self.params + self.grads + self.sums + self.saved + self.state
        return [*lists, *self.statistics, self.window, *self.outputs]

    def restore(self) -> None:
        self.outputs = []
        for tensor, before in zip(self.tensors(), self._before, strict=True):
            tensor.copy_(before)


def _sizes(grid: Grid) -> list[int]:
    return [*grid.sizes, *[1 + 37 * i % 997 for i in range(grid.many)], max(grid.sizes)]


def determinism(device: torch.device, grid: Grid) -> Iterator[Case]:
    for threshold in (Fixed(), AdaGC(warmup=1)):
        name = f"three steps with {threshold}, {grid.repeats} times"
        yield Case(name, functools.partial(_determinism, threshold, grid, device))


def _determinism(threshold, grid, device) -> Iterator[Compared]:
    chain = Chain(_sizes(grid), device, threshold)
    first: list[Tensor] = []
    for repeat in range(grid.repeats):
        chain.restore()
        for _ in range(3):
            chain.step()
            chain.others()
        found = [t.clone() for t in chain.tensors()]
        first = first or found
        yield from same_bits(f"time {repeat}, tensor", found, first)


def graph(device: torch.device, grid: Grid) -> Iterator[Case]:
    for threshold in (Fixed(), AdaGC(warmup=1)):
        name = f"captured with {threshold}, replayed three times"
        yield Case(name, functools.partial(_graph, threshold, grid, device))


def _graph(threshold, grid, device) -> Iterator[Compared]:
    """The second replay has a NaN: the graph must make a new decision in each replay."""
    eager, captured = (Chain(_sizes(grid), device, threshold) for _ in range(2))
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        captured.step()
    torch.cuda.current_stream(device).wait_stream(side)
    captured.restore()
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):
        captured.step()
    for replay in range(3):
        for chain in (eager, captured):
            chain.new_gradients(bad=replay == 1)
        eager.step()
        recorded.replay()
        yield from same_bits(f"replay {replay}, tensor", captured.tensors(), eager.tensors())


def streams(device: torch.device, grid: Grid) -> Iterator[Case]:
    yield Case("two chains of 20 steps at once", functools.partial(_streams, grid, device))


def _streams(grid, device) -> Iterator[Compared]:
    """Two chains at once: shared memory, such as scratch memory, would mix their results up."""
    chains = [Chain(_sizes(grid), device, seed=seed) for seed in (1, 2)]
    for chain in chains:
        for _ in range(20):
            chain.step()
    alone = [[t.clone() for t in chain.tensors()] for chain in chains]
    for chain in chains:
        chain.restore()
    on = [torch.cuda.Stream(device) for _ in chains]
    torch.cuda.synchronize(device)
    for _ in range(20):
        for chain, stream in zip(chains, on, strict=True):
            with torch.cuda.stream(stream):
                chain.step()
    torch.cuda.synchronize(device)
    for i, chain in enumerate(chains):
        yield from same_bits(f"stream {i}, tensor", chain.tensors(), alone[i])


PROPERTIES = [
    Check("same input, same bits", determinism),
    Check("in a CUDA graph", graph, needs_cuda=True),
    Check("on two streams", streams, needs_cuda=True),
]
