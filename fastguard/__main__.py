"""``python -m fastguard`` lists the commands; ``python -m fastguard NAME ...`` runs one."""

import difflib
import runpy
import sys

from ._io import terminal

COMMANDS = {
    "train": "train a CTC speech model; train --help lists the settings",
    "evaluate": "word and character error rates of a checkpoint",
    "transcribe": "the text of recordings",
    "report": "an HTML page about one or several runs",
    "diagnose": "find what is wrong with the model of a run, and what to try",
    "export": "write a checkpoint as ONNX, torch.export or safetensors",
    "env": "what was built, and what is used on this machine",
    "gpucheck": "all checks that need a GPU",
}


def main(argv: list[str] | None = None) -> int:
    """Exit status: that of the command; 0 after the list of commands, 2 for an unknown command."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name not in COMMANDS:
        near = difflib.get_close_matches(name.removeprefix("fastguard."), COMMANDS, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}"
        print(f"error: unknown command {terminal.visible(name)}; {hint}", file=sys.stderr)
        return 2
    sys.argv[1:] = rest
    runpy.run_module(f"fastguard.{name}", run_name="__main__", alter_sys=True)
    return 0


def usage() -> str:
    lines = [f"  {name:12} {says}" for name, says in COMMANDS.items()]
    title = "usage: python -m fastguard COMMAND ...   (COMMAND --help has details)\n\ncommands:"
    return "\n".join([title, *lines])


if __name__ == "__main__":
    sys.exit(main())
