"""Reads kernels from the text of PTX."""

import re
from dataclasses import dataclass, field

from .numbers import bits_of

COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
MODULE = re.compile(r"^\.version ", re.MULTILINE)
TARGET = re.compile(r"^\.target (\w+)", re.MULTILINE)
ENTRY = re.compile(r"\.visible \.entry (\w+)\(([^)]*)\)([^{]*)\{")
SHARED = re.compile(r"\.shared \.align (\d+) \.(\w+) ([\w$]+)(?:\[(\d*)\])?;")
PARAMETER = re.compile(
    r"\.param (?:\.align (?P<align>\d+) )?\.(?P<type>\w+) "
    r"(?:\.ptr(?: \.\w+)? \.align \d+ )?(?P<name>\w+)(?:\[(?P<count>\d+)\])?"
)
LABEL = re.compile(r"([$\w]+):(?!:)")
DIRECTIVE = re.compile(r"\.(?:pragma|loc|file)\b")


@dataclass(frozen=True)
class Variable:
    """A parameter of a kernel, or an array in shared memory. The dynamic one has 0 bytes."""

    name: str
    bytes: int
    align: int


@dataclass(frozen=True)
class Instruction:
    opcode: str
    operands: tuple[str, ...]
    predicate: str | None  # `%p1`, or `!%p1`
    text: str


@dataclass
class Kernel:
    name: str
    target: str
    threads: int | None  # the most that a block may have, if it is said
    parameters: list[Variable]
    shared: list[Variable]
    registers: dict[str, str] = field(default_factory=dict)  # name: type
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)


def sources(text):
    """The text of every kernel, its head and the text of its module by (target, name)."""
    found = {}
    for module in MODULE.split(COMMENT.sub("", text))[1:]:
        target = TARGET.search(module)[1]
        for head in ENTRY.finditer(module):
            found[target, head[1]] = module, head
    return found


def parse(target, name, module, head):
    threads = re.search(r"\.maxntid (\d+)", head[3])
    body = body_of(module, head.end())
    outside = module[: ENTRY.search(module).start()]
    kernel = Kernel(
        name=name,
        target=target,
        threads=int(threads[1]) if threads else None,
        parameters=[parameter(text) for text in head[2].split(",") if text.strip()],
        shared=[
            variable
            for variable in map(array, SHARED.finditer(outside + body))
            if re.search(re.escape(variable.name) + r"(?![\w$])", body)
        ],
    )
    Body(kernel, body).read()
    return kernel


def body_of(module, start):
    """The text from ``start`` to the brace that closes the one before it."""
    depth = 1
    for match in re.compile(r"[{}]").finditer(module, start):
        depth += 1 if match[0] == "{" else -1
        if depth == 0:
            return module[start : match.start()]
    raise ValueError("a brace is not closed")


def parameter(text):
    match = PARAMETER.fullmatch(" ".join(text.split()))
    if match is None:
        raise ValueError(f"not read as a parameter: {text}")
    size = bits_of(match["type"]) // 8
    return Variable(match["name"], size * int(match["count"] or 1), int(match["align"] or size))


def array(match):
    align, type_, name, count = match.groups()
    count = 1 if count is None else int(count or 0)
    return Variable(name, count * bits_of(type_) // 8, int(align))


class Body:
    """The statements of a kernel. Registers declared within braces get a name of their own."""

    def __init__(self, kernel, text):
        self.kernel = kernel
        self.text = text
        self.scopes = [{}]
        self.declared = 0

    def read(self):
        at = 0
        while match := re.compile(r"\s*").match(self.text, at):
            at = match.end()
            if at == len(self.text):
                return
            if self.text[at] in "{}":
                self.scopes.append({}) if self.text[at] == "{" else self.scopes.pop()
                at += 1
            elif label := LABEL.match(self.text, at):
                self.kernel.labels[label[1]] = len(self.kernel.code)
                at = label.end()
            else:
                end = self.text.index(";", at)
                self.statement(" ".join(self.text[at:end].split()))
                at = end + 1

    def statement(self, text):
        if text.startswith(".reg "):
            self.declare(text)
        elif text.startswith(".shared ") or DIRECTIVE.match(text):
            pass
        elif text.startswith("."):
            raise ValueError(f"not known: {text}")
        else:
            self.kernel.code.append(self.instruction(text))

    def declare(self, text):
        type_, names = re.fullmatch(r"\.reg \.(\w+) (.*)", text).groups()
        for name in re.split(r",\s*", names):
            if several := re.fullmatch(r"(%?\w+)<(\d+)>", name):
                for i in range(int(several[2])):
                    self.kernel.registers[f"{several[1]}{i}"] = type_
            else:
                self.declared += 1
                own = f"{name}.{self.declared}"
                self.scopes[-1][name] = own
                self.kernel.registers[own] = type_

    def instruction(self, text):
        predicate, rest = re.fullmatch(r"(?:@(!?[%\w]+) )?(.*)", text).groups()
        opcode, _, operands = rest.partition(" ")
        split = re.split(r",\s*(?![^{\[]*[}\]])", operands.strip()) if operands else []
        operands = tuple(self.in_scope(operand.strip()) for operand in split)
        return Instruction(opcode, operands, predicate, text)

    def in_scope(self, operand):
        for scope in self.scopes:
            for name, own in scope.items():
                operand = re.sub(rf"(?<![\w.%$]){name}(?![\w.$])", own, operand)
        return operand
