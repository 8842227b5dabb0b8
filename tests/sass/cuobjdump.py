"""Reads kernels out of the library that setup.py built, with NVIDIA's cuobjdump and nvdisasm."""

import functools
import os
import re
import subprocess
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import fastguard
from fastguard._extras import MissingExtra

from .instruction import Instruction, parse
from .loop import innermost_loops

LIBRARY = Path(fastguard.__file__).with_name("_cuda.so")
REGISTERS = 65536  # registers of an SM, for all architectures
SYSTEM = 1024  # bytes of shared memory that the system takes for each block
# KiB of shared memory and threads of an SM, from "Compute Capabilities" in the CUDA programming
# guide. 8.6 and 8.9, which run the code of 8.0, have the numbers of 12.0.
SHARED = {"80": 164, "90": 228, "100": 228, "120": 100}
THREADS = {"80": 2048, "90": 2048, "100": 2048, "120": 1536}


@dataclass(frozen=True)
class Usage:
    registers: int  # per thread
    stack: int  # bytes per thread
    shared: int  # bytes per block, without dynamic shared memory
    local: int


@dataclass(frozen=True)
class Kernel:
    arch: str
    name: str
    usage: Usage
    code: list[Instruction]

    def __str__(self):
        return f"sm_{self.arch} {self.name}"

    @functools.cached_property
    def streaming_loops(self):
        return [loop for loop in innermost_loops(self.code) if loop.streams]

    def blocks_by_registers(self, threads):
        """The number of blocks that fit on an SM. A warp gets registers in units of 8 a thread."""
        taken = -(-self.usage.registers // 8) * 8 * threads
        return min(REGISTERS // taken, THREADS[self.arch] // threads)

    def blocks_by_shared(self, threads, dynamic):
        taken = self.usage.shared + dynamic + SYSTEM
        return min(SHARED[self.arch] * 1024 // taken, THREADS[self.arch] // threads)


@functools.cache
def kernels():
    """All kernels of the library by (architecture, name)."""
    usage = parse_usage(run("-res-usage", str(LIBRARY)))
    code = parse_code(run("-sass", str(LIBRARY)))
    return {key: Kernel(*key, usage[key], code[key]) for key in usage}


def run(*arguments):
    folders = [str(executable(name).parent) for name in ("cuobjdump", "nvdisasm")]
    return subprocess.run(
        [executable("cuobjdump"), *arguments],
        env={**os.environ, "PATH": os.pathsep.join([*folders, os.environ.get("PATH", "")])},
        check=True,
        capture_output=True,
        text=True,
    ).stdout


def executable(name):
    """The path of a program of the package nvidia-cuda-NAME."""
    package = f"nvidia-cuda-{name}"
    try:
        files = metadata.files(package)
    except metadata.PackageNotFoundError:
        raise MissingExtra(f"{package} is not installed", "test") from None
    return next(Path(file.locate()) for file in files if Path(file).stem == name)


def parse_code(text):
    """The instructions by (architecture, kernel), from the text of `cuobjdump -sass`."""
    found, arch, code = {}, None, None
    for line in text.splitlines():
        if instruction := parse(line):
            code.append(instruction)
        elif match := re.match(r"arch = sm_(\d+)", line):
            arch = match[1]
        elif match := re.match(r"\s+Function : (\w+)", line):
            code = found.setdefault((arch, readable(match[1])), [])
    return found


def parse_usage(text):
    """Usage by (architecture, kernel), from the text of `cuobjdump -res-usage`.

    From sm_90 on its shared memory includes that of the system, if the kernel has any.
    """
    found, arch = {}, None
    for line in text.splitlines():
        if match := re.match(r"arch = sm_(\d+)", line):
            arch = match[1]
        elif match := re.match(r"\s+Function (\w+):", line):
            name = readable(match[1])
        elif match := re.match(r"\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            registers, stack, shared, local = map(int, match.groups())
            system = SYSTEM if int(arch) >= 90 and shared >= SYSTEM else 0
            found[arch, name] = Usage(registers, stack, shared - system, local)
    return found


def readable(mangled):
    """A readable name: `adamw_kernel<true,false>`, `attention_kernel<BFloat16,64>`."""
    length, rest = re.match(r"_ZN9fastguard(\d+)(.*)", mangled).groups()
    name, parameters = rest[: int(length)], rest[int(length) :]
    arguments = re.match(r"I((?:Lb[01]E|Li\d+E|NS_\d+\w+?E|S1_|f)+)E", parameters)
    if arguments is None:
        return name
    texts = []
    for flag, number, own, again, float_ in re.findall(
        r"Lb([01])E|Li(\d+)E|NS_\d+(\w+?)E|(S1_)|(f)", arguments[1]
    ):
        if again:  # the first type of ours
            own = texts[0]
        texts.append(number or own or ("float" if float_ else ("false", "true")[int(flag)]))
    return f"{name}<{','.join(texts)}>"
