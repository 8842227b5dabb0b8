"""The exit status of every command, and a check of its arguments."""

import argparse
import os
import sys
from collections.abc import Callable

from ._extras import MissingExtra
from ._io.failures import in_a_line, out_of_memory
from ._io.terminal import one_line

_MOST_DIGITS = 40


def exit_status(command: Callable[[], int | None], *failures: type[Exception]) -> int:
    """Run a command.

    Args:
        command: returns an exit status, or None for 0.
        failures: errors that are reported in one line on stderr.

    Returns:
        What the command returned. 1 after one of the failures, if memory is too little, or if
        nobody reads the output any more. 2 if a package is missing. 130 after Ctrl-C.
    """
    try:
        status = command()
        print(end="", flush=True)  # a full disk can still be reported here
    except BrokenPipeError:  # the reader, such as `head`, has ended
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
    """Drop output that cannot be written: at the end of the interpreter it would cause a second
    message and status 120."""
    try:
        print(end="", flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def check_words(parser: argparse.ArgumentParser, argv: list[str] | None) -> None:
    """End the program with a message if an argument is a number with too many digits: other
    messages would repeat all of them."""
    for word in sys.argv[1:] if argv is None else argv:
        digits = word.rpartition("=")[2].lstrip("+-")
        if len(digits) > _MOST_DIGITS and digits.isdecimal():
            parser.error(
                f"{digits[:20]}... is a number of {len(digits)} digits: give a smaller one"
            )
