"""``python -m fastguard``: the commands; ``python -m fastguard NAME ...`` is one of them."""

import difflib
import runpy
import sys

from ._io import terminal

COMMANDS = {
    "train": "train a CTC speech model; its settings are listed by train --help",
    "evaluate": "word and character error rates of a checkpoint",
    "transcribe": "the text of recordings",
    "report": "a page about one run or several, for a browser",
    "diagnose": "what is wrong with a run's model, and what to try",
    "export": "a checkpoint as ONNX, torch.export or safetensors",
    "env": "what was built, and what this machine chose of it",
    "gpucheck": "everything that only a machine with a GPU can tell",
}


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 the commands were asked for, 2 there is no such command."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name not in COMMANDS:
        near = difflib.get_close_matches(name.removeprefix("fastguard."), COMMANDS, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}"
        print(f"error: no command {terminal.visible(name)}; {hint}", file=sys.stderr)
        return 2
    sys.argv[1:] = rest
    runpy.run_module(f"fastguard.{name}", run_name="__main__", alter_sys=True)
    return 0


def usage() -> str:
    lines = [f"  {name:12} {says}" for name, says in COMMANDS.items()]
    title = "usage: python -m fastguard COMMAND ...   (COMMAND --help says more)\n\ncommands:"
    return "\n".join([title, *lines])


if __name__ == "__main__":
    sys.exit(main())
