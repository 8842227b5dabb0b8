"""One instruction of a GPU's machine code (SASS), as cuobjdump writes it."""

import re
from dataclasses import dataclass

SIZE = 0x10  # bytes, from sm_70 on
_TEXT = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(@!?\w+ )?\s*([A-Z][\w.]*)\s*([^;]*?)\s*;")
_BITS = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128}


@dataclass(frozen=True)
class Instruction:
    address: int
    guard: str  # `@P0`, or nothing
    opcode: str
    operands: str

    def __str__(self):
        return f"{self.address:#06x} {self.guard} {self.opcode} {self.operands}".replace("  ", " ")

    @property
    def kind(self):
        return self.opcode.split(".")[0]

    @property
    def width(self):
        """The number of bits that it moves."""
        return next((_BITS[part] for part in self.opcode.split(".") if part in _BITS), 32)

    @property
    def named(self):
        """Its registers; of aligned groups for 64 and more bits the first one."""
        return {int(number) for number in re.findall(r"\bR(\d+)", self.operands)}

    @property
    def loaded(self):
        """The registers that a load writes."""
        first = int(re.match(r"R(\d+)", self.operands)[1])
        return set(range(first, first + max(1, self.width // 32)))

    @property
    def is_fp64(self):
        """Whether it uses the fp64 units, as conversions do."""
        return self.kind in ("DADD", "DMUL", "DFMA", "DSETP") or "F64" in self.opcode

    @property
    def is_call(self):
        """Whether it is a call. A call of the instruction after next is none.

        ptxas leaves loops in this way on sm_80.
        """
        return self.kind == "CALL" and self._target != self.address + 2 * SIZE

    @property
    def widens_bfloat16(self):
        """Whether it moves 16 bits to the upper half of a word."""
        return (
            (self.kind == "IMAD" and re.search(r"\b0x10000\b", self.operands))
            or (self.opcode == "SHF.L.U32" and re.search(r"\b0x10\b", self.operands))
            or (self.kind == "LOP3" and re.search(r"\b0xffff0000\b", self.operands))
        )

    @property
    def _target(self):
        return int(re.findall(r"0x([0-9a-f]+)", self.operands)[-1], 16)

    @property
    def following(self):
        """The addresses of the next instructions. BSYNC is no jump: it waits for what follows."""
        behind = self.address + SIZE
        if self.kind in ("BRX", "BRXU", "JMP", "JMX"):
            raise ValueError(f"where it goes on cannot be seen: {self}")
        if self.kind == "BRA":
            always = not self.guard and self.operands == f"{self._target:#x}"
            return {self._target} if always else {self._target, behind}
        if self.kind in ("EXIT", "RET"):
            return {behind} if self.guard else set()
        if self.kind == "CALL" and not self.is_call:
            return {self._target, behind} if self.guard else {self._target}
        return {behind}


def parse(line):
    """The instruction of a line; None if the line has none."""
    match = _TEXT.match(line)
    if match is None:
        return None
    address, guard, opcode, operands = match.groups()
    return Instruction(int(address, 16), (guard or "").strip(), opcode, operands)
