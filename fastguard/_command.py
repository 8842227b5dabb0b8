"""How every command ends, and how it reads its arguments."""

import argparse
import os
import sys
from collections.abc import Callable

from ._extras import MissingExtra
from ._io.failures import in_a_line, out_of_memory
from ._io.terminal import one_line

_MOST_DIGITS = 40


def exit_status(command: Callable[[], int | None], *failures: type[Exception]) -> int:
    """Run a command: 0 or what it returns; 1 after one of the failures, named in a line on stderr,
    where memory is too little, and where nobody reads its output any more; 2 where an extra is
    missing; 130 after Ctrl-C."""
    try:
        status = command()
        print(end="", flush=True)  # here a full disk is still an error that can be told
    except BrokenPipeError:  # the reader, such as `head`, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except MissingExtra as error:
        print(f"error: {one_line(str(error))}", file=sys.stderr)
        return 2
    except failures as error:
        print(f"error: {one_line(str(error))}", file=sys.stderr)
        _drop_unwritten()
        return 1
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if not out_of_memory(error):
            raise
        print(f"error: {in_a_line(error)}", file=sys.stderr)
        return 1
    return status or 0


def _drop_unwritten() -> None:
    """Of output that finds no room; at the interpreter's end it would be a second message, and
    the status 120."""
    try:
        print(end="", flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def check_words(parser: argparse.ArgumentParser, argv: list[str] | None) -> None:
    """End the program with a message where an argument is a number of more digits than any has;
    messages about its value would repeat them all."""
    for word in sys.argv[1:] if argv is None else argv:
        digits = word.rpartition("=")[2].lstrip("+-")
        if len(digits) > _MOST_DIGITS and digits.isdecimal():
            parser.error(
                f"{digits[:20]}... is a number of {len(digits)} digits: give a smaller one"
            )
