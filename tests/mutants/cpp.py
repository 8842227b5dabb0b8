"""Mutants of C++ source as clang-format lays it out, and a build that compiles what changed."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from . import Mutant

# Binary operators have blanks around them; templates, ->, << and & of types have none.
_SWAPS = [
    (r" < ", " <= "), (r" <= ", " < "), (r" > ", " >= "), (r" >= ", " > "),
    (r" == ", " != "), (r" != ", " == "), (r" && ", " || "), (r" \|\| ", " && "),
    (r" \+ ", " - "), (r" - ", " + "), (r" \* ", " / "), (r" / ", " * "), (r" % ", " * "),
    (r" \+= ", " -= "), (r"(?<=[ (])!(?=[a-z(])", ""), (r"(?<=[ (])\+\+(?=[a-z])", "--"),
    (r"\bif \(.*\) \{", "if (true) {"), (r"\bif \(.*\) \{", "if (false) {"),
    (r" \? ", " ? 0 * "), (r"\bINFINITY\b", "0.0"), (r"\bNAN\b", "0.0"),
    (r"\bstd::isfinite\b", "!std::isfinite"), (r"\bstd::isinf\b", "!std::isinf"),
    (r"\btrue\b", "false"), (r"\bfalse\b", "true"),
    (r"(?<![\w.\"])1\.0(?!\d)", "2.0"), (r"(?<![\w.\"])0\.0(?!\d)", "1.0"),
    (r"\b(\d\d+)\.0\b", r"\1.5"), (r"\bVerdict::skip_outlier\b", "Verdict::apply"),
    (r"\bVerdict::clip\b", "Verdict::apply"), (r"\bVerdict::skip_nonfinite\b", "Verdict::clip"),
    (r"^ +[\w.]+ [-+*]?= .*;$", ""), (r"^ +(?!return|using|const)[\w.:]+\(.*\);$", ""),
]  # fmt: skip


def mutants(source: str) -> list[Callable[[], Mutant]]:
    found = []
    lines = source.splitlines()
    for number, line in enumerate(lines):
        code = line.split("//")[0].rstrip()
        if code.startswith(("#", "namespace", "enum", "template", "}")):
            continue
        for pattern, new in _SWAPS:
            for match in re.finditer(pattern, code):
                changed = code[: match.start()] + match.expand(new) + code[match.end() :]
                found.append(lambda n=number, c=changed: _mutant(lines, n, c))
    return found


def _mutant(lines: list[str], number: int, changed: str) -> Mutant:
    text = "\n".join([*lines[:number], changed, *lines[number + 1 :], ""])
    what = f"{lines[number].strip()} -> {changed.strip() or '(dropped)'}"
    return Mutant(number + 1, what, text)


class CpuLibrary:
    """fastguard/_cpu.so of a tree, built with the commands of setup.py."""

    def __init__(self, tree: Path, header: str):
        self.tree = tree
        run = [sys.executable, "setup.py", "build_ext", "--inplace", "--force"]
        done = subprocess.run(
            run, cwd=tree, env=os.environ | {"FASTGUARD_CUDA": "0"}, capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"setup.py build_ext failed:\n{done.stderr[-2000:]}")
        commands = [line for line in done.stdout.splitlines() if " -o " in line]
        name = Path(header).name
        self.compile = [
            command
            for command in commands
            if (source := re.search(r" -c (\S+\.cpp) ", command))
            and f'"{name}"' in (tree / source[1]).read_text(encoding="utf-8")
        ]
        self.link = next(command for command in commands if " -shared " in command)
        assert self.compile, f"no source includes {name}"

    def build(self) -> bool:
        """Build the library; returns whether the mutant compiles."""
        for command in [*self.compile, self.link]:
            if subprocess.run(command, shell=True, cwd=self.tree, capture_output=True).returncode:
                return False
        return True
