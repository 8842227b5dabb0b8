"""``python -m fastguard.report``: one HTML page about runs."""

import argparse
from pathlib import Path

from fastguard._command import exit_status
from fastguard._io import files, terminal
from fastguard.speech.reporting.html_report import render
from fastguard.speech.reporting.run_history import RunFolderError, read


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options of the command; wrong ones end the program with exit status 2."""
    parser = argparse.ArgumentParser(
        prog="python -m fastguard.report",
        description="Write one HTML page about a run, or about several side by side: curves,\n"
        "settings, bad steps and worst utterances. The page needs no other file and no\n"
        "network. A run may still be running, or have crashed.",
        epilog="example:\n  python -m fastguard.report runs/first runs/second -o report.html",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help="file of the page (default: report.html in the folder of the first run)",
    )
    return parser.parse_args(argv)


@terminal.command
def main(argv: list[str] | None = None) -> int:
    """Print the path of the page. Exit status: 0 done, 1 failed, 2 wrong usage, 130 Ctrl-C."""
    args = parse(argv)
    return exit_status(lambda: _write(args), RunFolderError, OSError)


def _write(args: argparse.Namespace) -> None:
    path = args.output or args.runs[0] / "report.html"
    page = render([read(run) for run in args.runs])
    write = files.write_where_told if args.output else files.write_text
    try:
        # A lone surrogate is possible in JSON but not in UTF-8; it becomes a question mark.
        write(path, page, errors="replace")
    except OSError as error:
        raise OSError(f"cannot write the report: {error}; choose --output") from error
    print(path)
