"""Run folders for reports, and a parser of the HTML page."""

from html.parser import HTMLParser

import yaml

from fastguard.speech.reporting.html_report import render
from fastguard.speech.reporting.run_history import read
from fastguard.speech.training.metrics import EpochMetrics, MetricsFile, StepMetrics

HOSTILE = (
    "<script>alert(1)</script>\n\"'><img src=x onerror=alert(2)> $\\frac$ {{ 7 * 7 }} \u202e \x00"
)


VOID = {"meta", "link", "br", "img", "path", "circle", "use", "rect"}


class Page(HTMLParser):
    """Tags with their attributes, the text, and the rows of tables. All tags have to be closed."""

    def __init__(self, html: str):
        super().__init__()
        self.tags, self.open, self.text = [], [], ""
        self.rows: list[list[str]] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "small":
            self.text += " "
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag
        if tag in ("dt", "dd", "div"):
            self.text += " "

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.text += data
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data

    def names(self):
        return {tag for tag, _ in self.tags}

    def row(self, first):
        return next(row for row in self.rows if row and row[0].strip() == first)


def step(number, loss=2.0, norm=1.5, verdict="clip", **more):
    coef = 0.5 if verdict == "clip" else 1.0
    return StepMetrics(number, 1, number - 1, loss, norm, coef, verdict, 1e-3, 0.25, **more)


def epoch(number, step, wer, loss=2.0, skipped=0, split="dev"):
    return EpochMetrics(number, step, loss, wer, wer / 2, 1.5, skipped, 10, 2.5, split=split)


def run_folder(path, lines, settings=None):
    path.mkdir()
    file = MetricsFile(path / "metrics.jsonl")
    for line in lines:
        file.write(line)
    file.close()
    (path / "config.yaml").write_text(yaml.safe_dump(settings or {"model": "baseline"}), "utf-8")
    log = "run folder: x\nbaseline: 15.6 M parameters on cpu, bf16\n"
    (path / "train.log").write_text(log, "utf-8")
    return path


def page_of(*folders):
    return Page(render([read(folder) for folder in folders]))
