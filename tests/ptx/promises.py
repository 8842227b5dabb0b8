"""Gates on the text of kernels, where executing them cannot show a fault.

The interpreter's blocks see every store at once. A kernel whose last block goes on with what the
others wrote needs a fence before each arrival, and one after the last arrival; and it must not read
through the cache for data that no one writes.
"""

import re

MEMORY = re.compile(r"(?:ld|st)\.global|atom|membar")
ARRIVAL = re.compile(r"atom\.global\.add")


def problems(kernel, counts_arrivals=True):
    """What is wrong with a kernel; ``counts_arrivals``: whether its atomics are arrivals."""
    code = kernel.code
    found = [f"{i.text}: loads through the cache of constants" for i in code if ".nc" in i.opcode]
    for at, instruction in enumerate(code):
        if counts_arrivals and ARRIVAL.match(instruction.opcode):
            if not is_fence(before(code, at)):
                found.append(f"{instruction.text}: no fence before the arrival")
            if not is_fence(after(code, at)):
                found.append(f"{instruction.text}: no fence after the last arrival")
    return found


def is_fence(instruction):
    return instruction is not None and instruction.opcode == "membar.gl"


def before(code, at):
    """The access to global memory before an instruction, in the order of the text."""
    return next((i for i in reversed(code[:at]) if MEMORY.match(i.opcode)), None)


def after(code, at):
    return next((i for i in code[at + 1 :] if MEMORY.match(i.opcode)), None)
