"""Tables of the epochs of training runs, in Markdown, with the command, machine and commit of each.

    python bench/epochs.py RUN [RUN ...] > docs/results/NAME.md

What stands above a table is what the run wrote into its train.log; the numbers are those of its
metrics.jsonl and rates.json.
"""

import argparse
import json
import re
import shlex
from pathlib import Path

import yaml

COLUMNS = ("epoch", "loss", "WER", "WER >= 4 words", "CER", "norm", "max norm", "skips", "seconds")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    runs = parser.parse_args().runs
    print(f"Written by `python bench/epochs.py {shlex.join(map(str, runs))}`.\n")
    for run in runs:
        print(section(run))


def section(run: Path) -> str:
    log = (run / "train.log").read_text(encoding="utf-8")
    lines = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    epochs = [line for line in lines if line["kind"] == "epoch"]
    last = epochs[-1]
    minutes = sum(float(epoch["seconds"]) for epoch in epochs) / 60
    said = [*found("machine", log), *found(r"\w+: [\d.]+ M parameters", log, whole=True)]
    said += found("Mean of the", log, whole=True)
    return "\n".join(
        [
            f"## {run.name}\n",
            *(f"    {command}" for command in found("command", log)),
            "",
            *(f"- {line}" for line in said),
            f"- seed {yaml.safe_load((run / 'config.yaml').read_text(encoding='utf-8'))['seed']}",
            f"- evaluated on {last['dev_utterances']} utterances, {last['dev_words']} words, "
            f"{last['dev_minutes']:.1f} min; {len(epochs)} epochs in {minutes:.0f} min",
            f"- best.pt: {rates(run)}",
            f"- of these, {rates_up_to(20, run)}",
            "",
            "| " + " | ".join(COLUMNS) + " |",
            "|" + "---:|" * len(COLUMNS),
            *map(row, epochs),
            "",
        ]
    )


def found(start: str, log: str, whole: bool = False) -> list[str]:
    """What follows a word and a colon in lines of the log; of resumed runs each of them once."""
    lines = re.findall(f"^{start}.*$" if whole else f"^{start}: (.*)$", log, re.MULTILINE)
    return list(dict.fromkeys(lines))


def rates(run: Path) -> str:
    best = json.loads((run / "rates.json").read_text(encoding="utf-8"))
    low, high = best["wer_interval"]
    long = best["long"]
    return (
        f"WER {best['wer']:.3f} (95 % interval {low:.3f} to {high:.3f}), CER {best['cer']:.3f}; "
        f"WER {long['wer']:.3f} of the {long['utterances']} utterances with 4 words and more "
        f"({long['words']} words)"
    )


def rates_up_to(seconds: float, run: Path) -> str:
    """Runs with another max_duration evaluate other utterances; these are in all of them."""
    lines = (run / "hypotheses.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if row["duration"] <= seconds]
    words, characters = (sum(row[unit] for row in rows) for unit in ("words", "characters"))
    wrong = sum(row["substitutions"] + row["deletions"] + row["insertions"] for row in rows)
    cer = sum(row["character_errors"] for row in rows) / characters
    return (
        f"the {len(rows)} utterances of up to {seconds} s ({words} words): "
        f"WER {wrong / words:.3f}, CER {cer:.3f}"
    )


def row(epoch: dict) -> str:
    values = (
        epoch["epoch"],
        f"{float(epoch['loss']):.3f}",
        f"{float(epoch['wer']):.3f}",
        f"{float(epoch['wer_long']):.3f}",
        f"{float(epoch['cer']):.3f}",
        f"{float(epoch['grad_norm']):.2f}",
        f"{float(epoch['max_grad_norm']):.2f}",
        f"{epoch['skipped']}/{epoch['steps']}",
        f"{float(epoch['seconds']):.0f}",
    )
    return "| " + " | ".join(map(str, values)) + " |"


if __name__ == "__main__":
    main()
