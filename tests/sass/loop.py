"""The innermost loops of a kernel, found in its machine code."""

import functools
import math
from collections import Counter
from dataclasses import dataclass

from .instruction import SIZE, Instruction

BITS = {"float32": 32, "float64": 64, "bfloat16": 16, "float16": 16}


@dataclass(frozen=True)
class Loop:
    header: int
    blocks: dict[int, list[Instruction]]  # by the address of the first instruction

    @functools.cached_property
    def body(self):
        return [each for start in sorted(self.blocks) for each in self.blocks[start]]

    def widths(self, kind):
        return Counter(each.width for each in self.body if each.kind == kind)

    @property
    def streams(self):
        """Whether it moves the aligned part of the tensors; other loops move the rest."""
        return self.widths("LDG")[128] > 0

    @property
    def elements(self):
        """The dtype of the tensors' elements, by the operations on them."""
        if any(each.opcode == "HADD2.F32" for each in self.body):
            return "float16"
        if any(each.widens_bfloat16 for each in self.body):
            return "bfloat16"
        computes = any(each.kind in ("DADD", "DMUL", "DFMA") for each in self.body)
        converts = any(each.opcode == "F2F.F64.F32" for each in self.body)
        return "float64" if computes and not converts else "float32"

    @property
    def unrolled(self):
        """The number of vectors of each array in a pass."""
        return math.gcd(*self.widths("LDG").values(), *self.widths("STG").values())

    @property
    def moves(self):
        """Elements, loads and stores, for one vector of each array: `1 x 64, 3 x 128`."""
        return self.elements, *(
            ", ".join(
                f"{count // self.unrolled} x {width}"
                for width, count in sorted(self.widths(kind).items())
            )
            or "-"
            for kind in ("LDG", "STG")
        )

    @property
    def elements_a_pass(self):
        return min(self.widths("LDG")) // BITS[self.elements] * self.unrolled

    @property
    def in_flight(self):
        """The number of loads that are issued before the first one is needed, on the best path."""

        def walk(start, awaited, issued):
            for each in self.blocks[start]:
                if awaited & each.named:
                    return issued
                if each.kind == "LDG":
                    awaited, issued = awaited | each.loaded, issued + 1
            ways = self.blocks[start][-1].following & (self.blocks.keys() - {self.header})
            return max((walk(way, awaited, issued) for way in ways), default=issued)

        return walk(self.header, set(), 0)


def innermost_loops(code):
    blocks = _basic_blocks(code)
    after = {start: block[-1].following & blocks.keys() for start, block in blocks.items()}
    before = {start: set() for start in blocks}
    for start, ways in after.items():
        for way in ways:
            before[way].add(start)

    def within(nodes):
        for loop in _components(nodes, after, before):
            if not any(after[node] & loop for node in loop):
                continue
            header = min({node for node in loop if before[node] - loop} or loop)
            inner = list(within(loop - {header}))
            yield from inner or [Loop(header, {start: blocks[start] for start in loop})]

    return sorted(within(blocks.keys()), key=lambda loop: loop.header)


def _basic_blocks(code):
    """Sequences of instructions without a jump, by the address of the first instruction."""
    starts = {code[0].address}
    for each in code:
        behind = each.address + SIZE
        if each.following != {behind}:
            starts |= each.following | {behind}
    blocks = {}
    for each in code:
        if each.address in starts:
            block = blocks[each.address] = []
        block.append(each)
    return blocks


def _components(nodes, after, before):
    """The strongly connected components, by Kosaraju's two walks."""
    order = [node for tree in _walks(sorted(nodes), nodes, after) for node in tree]
    return map(set, _walks(reversed(order), nodes, before))


def _walks(roots, nodes, after):
    """Depth-first walks: for each root that was not met before, the nodes from it in post-order."""
    met = set()
    for root in roots:
        if root in met:
            continue
        met.add(root)
        done, path = [], [(root, iter(after[root] & nodes))]
        while path:
            node, rest = path[-1]
            new = next((each for each in rest if each not in met), None)
            if new is None:
                done.append(node)
                path.pop()
            else:
                met.add(new)
                path.append((new, iter(after[new] & nodes)))
        yield done
