"""Kernels with one wrong instruction, as a compiler or a line of assembly might have it."""

import copy
import re
from dataclasses import replace

from .error import Error, UnknownForm


def swapped(instruction):
    """Two operands in each other's place, where their order matters."""
    if not re.match(r"(sub|div|setp\.[lg][te]|selp|copysign)\b", instruction.opcode):
        return None
    to, a, b, *rest = instruction.operands
    return replace(instruction, operands=(to, b, a, *rest)) if a != b else None


def without_predicate(instruction):
    return replace(instruction, predicate=None) if instruction.predicate else None


def with_opposite_predicate(instruction):
    predicate = instruction.predicate
    if predicate is None:
        return None
    return replace(instruction, predicate=predicate[1:] if predicate[0] == "!" else f"!{predicate}")


def with_registers_swapped(instruction):
    """The first two registers of the last vector of a load, a store, or a product's fragments."""
    if not re.match(r"(ld|st|ldmatrix|mma)\b", instruction.opcode):
        return None
    operands = list(instruction.operands)
    vectors = [i for i, text in enumerate(operands) if text.startswith("{")]
    at = vectors[1] if instruction.opcode.startswith("mma") else vectors[0] if vectors else None
    if at is None:
        return None
    a, b, *rest = operands[at].strip("{}").replace(" ", "").split(",")
    operands[at] = "{" + ",".join((b, a, *rest)) + "}"
    return replace(instruction, operands=tuple(operands))


def with_lanes_of_b_swapped(instruction):
    if not instruction.opcode.startswith("mma"):
        return None
    to, a, b, c = instruction.operands
    first, second = b.strip("{}").replace(" ", "").split(",")
    return replace(instruction, operands=(to, a, f"{{{second},{first}}}", c))


def transposed(instruction):
    """A matrix loaded as it lies and not transposed, or the reverse."""
    if not instruction.opcode.startswith("ldmatrix"):
        return None
    if ".trans" in instruction.opcode:
        return replace(instruction, opcode=instruction.opcode.replace(".trans", ""))
    return replace(instruction, opcode=instruction.opcode.replace(".shared", ".trans.shared"))


def over_twice_the_distance(instruction):
    """A shuffle over twice the distance."""
    if not re.match(r"shfl", instruction.opcode) or not instruction.operands[2].isdigit():
        return None
    to, source, lane, *rest = instruction.operands
    return replace(instruction, operands=(to, source, str(2 * int(lane)), *rest))


def truncated(instruction):
    """A float becomes a bfloat16 by its upper half."""
    if instruction.opcode != "cvt.rn.bf16.f32":
        return None
    to, source = instruction.operands
    return replace(instruction, opcode="mov.b32", operands=(f"{{_, {to}}}", source))


def waiting_for_less(instruction):
    if instruction.opcode != "cp.async.wait_group":
        return None
    return replace(instruction, operands=(str(int(instruction.operands[0]) + 1),))


def counting_two(instruction):
    if not instruction.opcode.startswith("atom"):
        return None
    to, place, _ = instruction.operands
    return replace(instruction, operands=(to, place, "2"))


KINDS = [
    swapped,
    without_predicate,
    with_opposite_predicate,
    with_registers_swapped,
    with_lanes_of_b_swapped,
    transposed,
    over_twice_the_distance,
    truncated,
    waiting_for_less,
    counting_two,
]


class Programs:
    """The kernels of a library, of which one has another step."""

    def __init__(self, programs, name, changed):
        self.programs, self.name, self.changed = programs, name, changed

    def __call__(self, name):
        return self.changed if name == self.name else self.programs(name)


def executed(programs, name, run):
    """The numbers of the instructions of a kernel that ``run`` executes."""
    seen = set()
    program = copy.copy(programs(name))
    program.steps = [recorded(step, i, seen) for i, step in enumerate(program.steps)]
    run(Programs(programs, name, program))
    return sorted(seen)


def recorded(step, i, seen):
    def noting(function):
        def run(*arguments):
            seen.add(i)
            return function(*arguments)

        return run if function is not None else None

    return replace(step, execute=noting(step.execute), jump=noting(step.jump))


def mutants(programs, name, numbers, kind):
    """(text of the instruction, kernels with a mutant of it)."""
    program = programs(name)
    for number in numbers:
        instruction = kind(program.kernel.code[number])
        if instruction is None:
            continue
        changed = copy.copy(program)
        changed.steps = [*program.steps]
        changed.steps[number] = program.step(instruction)
        yield f"{number}: {instruction.text}", Programs(programs, name, changed)


def is_caught(run, programs):
    """``run`` raises AssertionError for a wrong result."""
    try:
        run(programs)
    except (AssertionError, Error, UnknownForm):
        return True
    return False
