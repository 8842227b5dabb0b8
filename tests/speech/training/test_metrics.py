"""metrics.jsonl and the epoch table."""

import json
import logging
import math

import pytest

from fastguard._io import files
from fastguard.speech.recognition.evaluation import Evaluation, score
from fastguard.speech.training.metrics import (
    EpochMetrics,
    EpochTotals,
    MetricsFile,
    StepMetrics,
    epoch_table,
    log_to,
)


def step(number, loss, norm, verdict="apply"):
    return StepMetrics(number, 1, number, loss, norm, 1.0, verdict, 1e-5, 0.5)


def summarize(epoch, steps, seconds=9.0):
    totals = EpochTotals()
    for each in steps:
        totals.add(each)
    found = Evaluation([score("long", "a b c d", "a b c x"), score("short", "a", "")])
    return totals.close(epoch, steps[-1].step if steps else 0, found, seconds, "dev")


def test_every_line_is_strict_json_and_nan_reads_back(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    file.write(step(1, 2.5, 3.0))
    file.write(
        StepMetrics(
            2,
            1,
            1,
            math.nan,
            math.inf,
            1.0,
            "skip_nonfinite",
            1e-5,
            0.5,
            ("utt-a", "utt-b"),
            ("head.weight",),
            65536.0,
            True,
        )
    )
    file.write(summarize(1, [step(1, 2.5, 3.0)]))

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    lines = [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["step", "step", "epoch"]
    assert {"step", "epoch", "loss", "grad_norm", "clip_coef", "verdict", "lr", "seconds"} <= set(
        lines[0]
    )
    assert not {"skipped_utterances", "loss_scale", "scale_search"} & set(lines[0])
    assert lines[0]["batch"] == 1
    assert math.isnan(float(lines[1]["loss"]))
    assert float(lines[1]["grad_norm"]) == math.inf
    assert lines[1]["skipped_utterances"] == ["utt-a", "utt-b"]
    assert (lines[1]["loss_scale"], lines[1]["scale_search"]) == (65536.0, True)
    assert {"loss", "wer", "cer", "grad_norm", "skipped"} <= set(lines[2])


def test_an_epoch_averages_the_steps_that_counted():
    steps = [
        step(1, 2.0, 1.0),
        step(2, math.nan, math.inf, "skip_nonfinite"),
        step(3, 4.0, 3.0),
        step(4, 99.0, 50.0, "skip_outlier"),
    ]
    epoch = summarize(1, steps)
    assert epoch.loss == 3.0
    assert epoch.grad_norm == 26.5  # the median of 1, 3, 50 and Inf
    assert epoch.skipped == 2
    assert epoch.steps == 4
    assert epoch.step == 4
    assert epoch.seconds == 9.0 + 4 * 0.5
    assert epoch.max_grad_norm == math.inf
    assert (epoch.wer, epoch.wer_long) == (2 / 5, 1 / 4)
    assert (epoch.dev_utterances, epoch.dev_words) == (2, 5)


def test_a_nan_norm_counts_as_the_largest():
    norms = [1.0, math.nan, 2.0, math.nan, 3.0]
    for order in (norms, norms[::-1], sorted(norms)):
        epoch = summarize(1, [step(i, 1.0, norm) for i, norm in enumerate(order)])
        assert epoch.grad_norm == 3.0
        assert math.isnan(epoch.max_grad_norm)


@pytest.mark.parametrize(
    "loss, wer, skipped, words",
    [
        (2.0, 1.0, 0, "stable start"),
        (2.0, 0.9, 0, "learning"),
        (2.0, 0.5, 0, "improving"),
        (2.0, 0.2, 0, "good progress"),
        (2.0, 0.1, 0, "target range"),
        (2.0, 0.05, 6, "WARNING: most steps skipped"),
        (math.nan, 0.05, 10, "WARNING: every step skipped"),
        (math.nan, 1.0, 0, "WARNING: loss not finite"),
        (2.0, math.nan, 0, "WARNING: nothing evaluated"),
    ],
)
def test_status(loss, wer, skipped, words):
    epoch = EpochMetrics(1, 10, loss, wer, 0.1, 1.0, skipped, 10, 1.0)
    assert epoch.status == words
    assert words in epoch_table([epoch])


def test_an_epoch_without_steps_has_no_loss():
    epoch = summarize(1, [])
    assert math.isnan(epoch.loss)
    assert epoch.status == "WARNING: loss not finite"


def test_what_lies_after_the_state_is_dropped_with_a_line_that_was_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    for number in (1, 2, 3):
        file.write(step(number, 1.0, 1.0))
    file.write(summarize(1, [step(3, 1.0, 1.0)]))
    file.write(step(4, 1.0, 1.0))
    file.close()
    with path.open("a") as lines:
        lines.write('{"kind": "step", "st')
    MetricsFile(path, 2, 0).write(step(3, 7.0, 1.0))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 1.0), (2, 1.0), (3, 7.0)]


@pytest.mark.parametrize(
    "line",
    ["5", "null", "[1]", "{}", '{"kind": "step"}', '{"kind": [], "step": 1}', "[" * 100_000,
     '{"kind": "step", "step": "1"}', '{"kind": "step", "step": true}', '{"kind": "epoch"}',
     '{"kind": "step", "step": ' + "1" * 100_000 + "}", "x" * (files.LARGEST_LINE + 1)],
)  # fmt: skip
def test_a_line_that_is_none_is_counted_named_and_dropped(tmp_path, caplog, line):
    good = '{"kind": "step", "step": 1}\n'
    (tmp_path / "metrics.jsonl").write_text(good + line + "\n" + good.replace("1", "2"))
    MetricsFile(tmp_path / "metrics.jsonl", 2, 0).close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
    assert "1 lines are not metrics and were removed, the first is line 2" in caplog.text


@pytest.mark.parametrize("name", ["metrics.jsonl", "train.log"])
def test_what_is_appended_follows_no_link(tmp_path, name):
    (tmp_path / "mine").write_text("precious")
    (tmp_path / name).symlink_to(tmp_path / "mine")
    with pytest.raises(OSError, match=f"{name} is a symbolic link"):
        log_to(tmp_path / name)
    log_to(None)
    (tmp_path / "mine").unlink()
    with pytest.raises(OSError, match=f"{name} is a symbolic link"):
        MetricsFile(tmp_path / name)


def test_a_full_disk_costs_lines_and_one_warning(tmp_path, caplog):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file._file.close()
    file._file = open("/dev/full", "a")  # noqa: SIM115
    file.write(step(1, 1.0, 1.0))
    file.write(step(2, 1.0, 1.0))
    assert [r.message.split(":")[0] for r in caplog.records] == ["metrics.jsonl is not complete"]


def test_a_full_disk_ends_the_log_file_and_not_the_run(tmp_path, capsys):
    log_to(tmp_path / "train.log")
    (handler,) = (h for h in logging.getLogger("fastguard").handlers if hasattr(h, "baseFilename"))
    handler.setStream(open("/dev/full", "a")).close()  # noqa: SIM115
    logger = logging.getLogger("fastguard.speech.training.trainer")
    logger.info("one")
    logger.info("two")
    error = capsys.readouterr().err
    assert "one\n" in error
    assert "two\n" in error
    assert error.count("train.log is not complete") == 1
    log_to(None)  # closes it
    assert "Traceback" not in error


def test_the_log_leaves_the_handlers_of_others_and_reaches_the_root(tmp_path, capsys, caplog):
    package, other = logging.getLogger("fastguard"), logging.NullHandler()
    package.addHandler(other)
    try:
        log_to(tmp_path / "train.log")
        log_to(tmp_path / "train.log")
        logging.getLogger("fastguard.x").info("once")
        assert other in package.handlers
    finally:
        package.removeHandler(other)
        log_to(None)
    assert capsys.readouterr().err == (tmp_path / "train.log").read_text() == "once\n"
    assert caplog.messages == ["once"]
