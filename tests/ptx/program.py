"""A kernel made ready to run: each instruction as functions of a block.

The modules of opcodes register functions by the text of the opcode with its types, as a regular
expression. An instruction that no expression matches as a whole raises UnknownForm.
"""

import functools
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .error import UnknownForm
from .memory import Space
from .numbers import DTYPES, SIGNED, UNSIGNED, bits_of, literal

OPCODES = []  # (regular expression, function that makes a Step)
GAP = 64  # bytes between variables, so that the end of each is noticed


def places(variables):
    """The address of each variable. The dynamic one, whose size the launch gives, is last."""
    found, at = {}, 0
    for variable in sorted(variables, key=lambda variable: variable.bytes == 0):
        found[variable.name] = at
        at = -(-(at + variable.bytes + GAP) // 16) * 16
    return found


def opcode(pattern):
    """Registers a function (instruction, match, program) that returns the step's fields."""

    def register(function):
        OPCODES.append((re.compile(pattern), function))
        return function

    return register


@functools.cache
def function_of(text):
    """The function for an opcode, and how its expression matches."""
    for pattern, function in OPCODES:
        if match := pattern.fullmatch(text):
            return function, match
    raise ValueError("no such opcode, or not with these types")


@dataclass
class Step:
    text: str
    execute: Callable | None = None  # (block, mask): what the threads of the mask do
    jump: Callable | None = None  # (block, index, active, those with a true predicate)
    of_warps: bool = False  # whether the lanes of a warp execute it together
    is_seen: bool = False  # whether the order among blocks matters
    predicate: Callable | None = None


class Program:
    def __init__(self, kernel):
        self.kernel = kernel
        self.counts = Counter()
        self.slots = {}  # of each register: its size and its place among those of this size
        self.readers = {}
        for name, type_ in kernel.registers.items():
            bits = bits_of(type_)
            self.slots[name] = bits, self.counts[bits]
            self.counts[bits] += 1
        self.shared_at = places(kernel.shared)
        self.parameters_at = places(kernel.parameters)
        self.steps = [self.step(instruction) for instruction in kernel.code]

    def step(self, instruction):
        try:
            function, match = function_of(instruction.opcode)
            step = Step(instruction.text, **function(instruction, match, self))
            if instruction.predicate:
                step.predicate = self.predicate(instruction.predicate)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UnknownForm(f"{instruction.text}: {error}") from error
        return step

    def predicate(self, text):
        read = self.reader(text.lstrip("!"), "pred")
        return read if text[0] != "!" else lambda block: ~read(block)

    # --- operands ---------------------------------------------------------------------------------

    def reader(self, text, type_):
        """A function of a block that returns an operand's values, for all threads or for one."""
        if (text, type_) not in self.readers:
            self.readers[text, type_] = self.new_reader(text, type_)
        return self.readers[text, type_]

    def new_reader(self, text, type_):
        if text in self.slots:
            return self.register_reader(text, type_)
        if text.startswith("%"):
            dtype = DTYPES[type_]
            return lambda block: block.specials[text].astype(dtype)
        address = self.parameters_at.get(text, self.shared_at.get(text))
        value = literal(text if address is None else str(address), type_)
        return lambda block: value

    def register_reader(self, name, type_):
        bits, slot = self.slots[name]
        wanted = bits_of(type_)
        if bits == wanted:
            return lambda block: block.files[type_][slot]
        if bits < wanted:
            raise ValueError(f"{name} has {bits} bits, {type_} more")
        narrow, dtype = UNSIGNED[wanted], DTYPES[type_]
        return lambda block: block.files[f"b{bits}"][slot].astype(narrow).view(dtype)

    def writer(self, name, type_):
        """A function (block, values, mask). A larger register gets the value extended."""
        if name == "_":
            return lambda block, values, mask: None
        bits, slot = self.slots[name]
        own = bits_of(type_)
        if bits == own:
            file, widen = type_, None
        elif bits > own and type_[0] in "bus":
            file, widen = f"b{bits}", (SIGNED if type_[0] == "s" else UNSIGNED)[bits]
        else:
            raise ValueError(f"{name} has {bits} bits, {type_} has not")

        def write(block, values, mask):
            if widen is not None:
                values = values.astype(widen).view(UNSIGNED[bits])
            if mask is None:
                block.files[file][slot][:] = values
            else:
                np.copyto(block.files[file][slot], values, where=mask)

        return write

    def list_of(self, text):
        """The names within braces, or the one name."""
        return [name.strip() for name in text.strip("{}").split(",")]

    def address(self, text):
        """A function of a block that returns the addresses of `[%r1+8]` for all its threads."""
        base, offset = re.fullmatch(r"\[([%\w$.]+)(?:\+(-?\d+))?\]", text).groups()
        bits = self.slots[base][0] if base in self.slots else 64
        read = self.reader(base, f"u{bits}")
        step = UNSIGNED[bits](int(offset or 0) % 2**bits)

        def addresses(block):
            return np.broadcast_to((read(block) + step).astype(np.uint64), block.threads)

        return addresses

    # --- memory -----------------------------------------------------------------------------------

    def shared_memory(self, dynamic):
        """A block's shared memory, of which nothing was written."""
        space = Space("shared")
        for variable in self.kernel.shared:
            nbytes = variable.bytes or dynamic
            if nbytes:
                space.make(self.shared_at[variable.name], nbytes, variable.name, 0xFF)
        return space

    def parameter_memory(self, arguments):
        given = [len(argument) for argument in arguments]
        if given != [parameter.bytes for parameter in self.kernel.parameters]:
            wanted = [(p.name, p.bytes) for p in self.kernel.parameters]
            raise ValueError(f"arguments of {given} bytes, not {wanted}")
        space = Space("parameter")
        for parameter, argument in zip(self.kernel.parameters, arguments, strict=True):
            made = space.make(
                self.parameters_at[parameter.name], len(argument), parameter.name, 0xFF
            )
            made.elements[1][: len(argument)] = np.frombuffer(argument, np.uint8)
            made.writable = False
        return space
