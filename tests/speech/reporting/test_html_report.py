"""``python -m fastguard.report``: what the page says, and what it survives."""

import json
import math
import os
import re

import numpy as np
import pytest

from fastguard.speech.cli.report import main
from fastguard.speech.reporting import plots
from fastguard.speech.reporting.html_report import render
from fastguard.speech.reporting.run_history import RunFolderError, read

from .pages import Page, epoch, page_of, run_folder, step


def test_what_the_page_says_of_a_run(good):
    page = page_of(good)
    words = " ".join(page.text.split())
    assert "WER of the best epoch 25.0 % epoch 2 of 3, dev split" in words
    assert "Steps 20" in words
    assert "Skipped 0 0.0 % of the steps" in words
    assert "Time 7.5 s" in words
    assert "Parameters 15.6 M" in words
    assert page.row("2")[1:4] == ["2", "25.0 %", "12.5 %"]
    assert page.row("2")[-1] == "good progress, best"
    assert page.row("optim.lr") == ["optim.lr", "0.001"]
    assert "run_dir" not in page.text
    for title in ("Training loss", "Error rates on the dev split", "Gradient norm"):
        assert title in page.text


def test_the_page_needs_nothing_else(good, hostile):
    page = page_of(good, hostile)
    assert not page.names() & {"script", "img", "iframe", "object", "form", "base"}
    policy = next(a["content"] for t, a in page.tags if a.get("http-equiv"))
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; img-src data:")
    for _, attributes in page.tags:
        for name in ("src", "href", "xlink:href"):
            assert attributes.get(name, "#").startswith(("#", "data:,"))
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    references = {a["xlink:href"][1:] for _, a in page.tags if "xlink:href" in a}
    assert references <= set(ids)


def test_markup_in_a_run_is_text(hostile):
    page = page_of(hostile)
    assert not page.names() & {"script", "img", "b"}
    assert page.text.count("<script>alert(1)</script>") >= 8  # each place that shows it
    assert "{{ 7 * 7 }}" in page.text
    assert "<b>hostile$x$: 3 points" in page.text  # an SVG's description


def test_a_search_for_a_loss_scale_is_no_bad_gradient(tmp_path):
    search = step(1, 12.82, math.inf, "skip_nonfinite", loss_scale=65536.0, scale_search=True)
    run = read(run_folder(tmp_path / "run", [search, step(2)]))
    assert run.bad_steps[1].verdict == "search for a loss scale"
    assert page_of(run.path).row("1")[1:4] == ["search for a loss scale", "∞", "12.82"]


@pytest.mark.parametrize("risen", [None, 3, [4], {"name": "x"}, [{}], [{"norm": []}]])
def test_a_spike_shows_what_has_risen(tmp_path, risen):
    folder = run_folder(tmp_path / "run", [step(1, norm=50.0, verdict="skip_outlier")])
    rise = {"name": "layer4.weight", "norm": 120.0, "usual_norm": 0.8, "since_step": 0}
    details = {"step": 0, "most_risen": [rise], "norms": {"layer4.weight": 120.0}}
    (folder / "bad_step_000000.json").write_text(json.dumps(details))
    assert "layer4.weight120, usually 0.8" in page_of(folder).text
    assert "skipped above" not in page_of(folder).text
    details["skip_norm"] = 10.0
    (folder / "bad_step_000000.json").write_text(json.dumps(details))
    assert "skipped above a norm of 10" in page_of(folder).text
    details["outlier_above"] = 40.0
    (folder / "bad_step_000000.json").write_text(json.dumps(details))
    assert "skipped above a norm of 40" in page_of(folder).text
    (folder / "bad_step_000000.json").write_text(json.dumps(details | {"most_risen": risen}))
    assert "120, usually" not in page_of(folder).text


@pytest.mark.parametrize(
    ("splits", "title"),
    [
        (["dev", "dev"], "Error rates on the dev split"),
        (["train"], "Error rates on the training split"),
        (["dev", "train"], "Error rates, not all on the same split"),
        (["dev", ""], "Error rates, not all on the same split"),  # a run of an older version
        ([""], "Error rates"),
        (["<b>"], "Error rates"),
    ],
)
def test_the_error_rates_name_the_split_that_was_scored(tmp_path, splits, title):
    folders = [
        run_folder(tmp_path / str(i), [step(1), epoch(1, 1, 0.5, split=split)])
        for i, split in enumerate(splits)
    ]
    runs = [read(folder) for folder in folders]
    (found,) = [p.title for p in plots.draw(runs, splits) if p.title.startswith("Error rates")]
    assert found == title
    page = page_of(*folders)
    assert ("epoch 1 of 1, training split" in page.text) == ("train" in splits)
    assert ("The corpus has no dev split" in page.text) == ("train" in splits)
    assert "the  split" not in page.text


def test_a_bad_step(hostile):
    page = page_of(hostile)
    row = page.row("3")
    assert row[1:4] == ["skip nonfinite", "∞", "NaN"]
    assert row[4].endswith("[7]")
    assert page.row("4")[1:4] == ["skip outlier", "50", "2"]
    assert "3 NaN, 1 Inf" in page.text
    assert "Largest finite norms of 2 parameters" in page.text
    assert "clipped to a norm of ∞" in page.text
    marks = [words for figure in plots.draw([read(hostile)], ["x"]) for words in figure.key]
    assert ("triangle", "skipped, norm NaN or Inf") in marks
    assert ("cross", "skipped") in marks


def test_words_are_aligned(good):
    row = {"id": "u", "reference": "one two three", "hypothesis": "one tow three four"}
    (good / "hypotheses.jsonl").write_text(
        json.dumps({**row, "id": "fine", "wer": 0, "cer": 0})
        + "\n"
        + json.dumps({**row, "wer": 0.667, "cer": 0.5})
        + "\n"
        + json.dumps({"id": "empty", "reference": "", "hypothesis": "", "wer": "nan", "cer": None})
    )
    html = render([read(good)])
    assert "<del>two</del><ins>tow</ins>" in html
    assert "<span></span><ins>four</ins>" in html
    assert '<span>three</span><span class="same">three</span>' in html
    assert html.index("<bdi>u</bdi>") < html.index("<bdi>fine</bdi>") < html.index("<bdi>empty<")


def test_two_runs_share_axes_and_show_what_differs(good, tmp_path):
    lines = [step(i) for i in range(1, 31)]
    other = run_folder(tmp_path / "other", lines, {"optim": {"lr": 1e-5}, "seed": 0})
    page = page_of(good, other)
    assert page.row("optim.lr") == ["optim.lr", "0.001", "1e-05"]
    differing = [a for t, a in page.tags if t == "tr" and a.get("class") == "differs"]
    assert len(differing) == 1
    assert "1 settings that are the same in all runs" in page.text
    loss = plots.draw([read(good), read(other)], ["good", "other"])[0].svg
    assert "--run-0" in loss and "--run-1" in loss
    assert "good: 20 points" in loss and "other: 30 points" in loss


def test_folders_of_one_name_are_told_apart(tmp_path):
    folders = []
    for parent in ("a", "b"):
        (tmp_path / parent).mkdir()
        folders.append(run_folder(tmp_path / parent / "run", [step(1)]))
    text = page_of(*folders).text
    assert all(str(folder) in text.splitlines()[0] + text for folder in folders)
    assert text.count(str(folders[1])) > 3


def test_steps_after_a_resume_replace_the_earlier_ones(tmp_path):
    bad = step(4, verdict="skip_outlier")
    lines = [step(1), step(2), epoch(1, 2, 0.9), step(3, loss=9.0), bad, step(5), epoch(2, 5, 0.1)]
    lines += [step(3, loss=7.0), step(4), epoch(2, 4, 0.8)]
    run = read(run_folder(tmp_path / "run", lines))
    assert run.steps.step == [1, 2, 3, 4]
    assert run.steps.loss[2] == 7.0
    assert run.bad_steps == {}
    assert [(e.metrics.epoch, e.metrics.wer) for e in run.epochs] == [(1, 0.9), (2, 0.8)]
    assert run.best.metrics.epoch == 2


def test_the_fields_of_newer_trainers(good):
    with (good / "metrics.jsonl").open("a") as file:
        line = {"kind": "epoch", "epoch": 4, "step": 30, "loss": 1, "wer": 0.2, "cer": 0.1}
        line |= {"wer_long": 0.35, "dev_utterances": 54, "steps": 10, "skipped": 0}
        file.write(json.dumps(line) + "\n")
    page = page_of(good)
    assert page.row("4")[2:5] == ["20.0 %", "35.0 %", "10.0 %"]
    assert "54 utterances" in page.text
    assert "WER, 4 words and more" in page.text


def test_a_crash_in_the_middle_of_a_line(good):
    path = good / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    run = read(good)
    assert len(run.epochs) == 2
    assert run.notes == ["the last line of metrics.jsonl is cut off"]
    path.write_bytes(b'\0\0\xff\n[1]\n{"kind": "step"}\n' + path.read_bytes())
    assert len(read(good).steps) == 20
    assert "2 lines of metrics.jsonl cannot be read" in " ".join(read(good).notes)
    assert "1 lines of metrics.jsonl have no step" in " ".join(read(good).notes)


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "train.log"])
def test_a_file_alone(good, name):
    for path in good.iterdir():
        if path.name != name:
            path.unlink()
    page = page_of(good)
    assert ("There is no step with a finite value yet." in page.text) == (name != "metrics.jsonl")
    assert " is missing" in page.text


@pytest.mark.parametrize("value", ["nan", "inf", 1e308, 0, -3, "many", None, [], 10**400])
def test_numbers_that_no_axis_can_show(tmp_path, value):
    folder = run_folder(tmp_path / "run", [])
    names = ("loss", "grad_norm", "clip_coef", "lr", "seconds", "wer", "cer")
    line = {"epoch": 1, "step": 1, **dict.fromkeys(names, value)}
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps({"kind": kind, **line}) + "\n" for kind in ("step", "epoch"))
    )
    page = page_of(folder)
    assert "Steps" in page.text
    drawn = "There is no step with a finite value yet." not in page.text
    assert drawn == (value in (1e308, 0, -3))


@pytest.mark.parametrize(
    "content", ["", "[]", "{", '{"step": "x"}', '{"step": 2, "offenders": 5, "norms": [1]}']
)
def test_a_bad_step_file_that_is_not_one(hostile, content):
    (hostile / "bad_step_000002.json").write_text(content)
    assert page_of(hostile).row("3")[1] == "skip nonfinite"


def test_how_a_run_ended(good):
    log = good / "train.log"
    assert "running, or killed" in page_of(good).text
    log.write_text("run folder: x\nERROR - 25 steps were skipped\n  what to try: less\n")
    page = page_of(good)
    assert "ERROR - 25 steps were skipped\n  what to try: less" in page.text
    log.write_text(log.read_text() + "run folder: x\nBatch 0: loss=1\n")  # resumed
    assert "running, or killed" in page_of(good).text
    log.write_text(log.read_text() + "Finished at step 20; results are in x\n")
    assert "finished" in page_of(good).text


def test_a_long_run_is_drawn_as_its_envelope(tmp_path):
    folder = run_folder(tmp_path / "long", [])
    with (folder / "metrics.jsonl").open("w") as file:
        for i in range(1, 200_001):
            values = {"loss": 2 + math.sin(i), "grad_norm": 1 + i % 7, "clip_coef": 0.5}
            line = {"kind": "step", "step": i, "epoch": 1, "lr": 1e-3, "seconds": 0.1, **values}
            if i % 3 == 0:
                line |= {"verdict": "skip_outlier", "skipped_utterances": ["x" * 30] * 8}
            file.write(json.dumps(line) + "\n")
    html = render([read(folder)])
    assert len(html) < 1_000_000
    assert "200,000" in html
    assert "The first 100 of 66666." in html


def test_an_envelope_keeps_every_peak_and_every_gap():
    x, y = np.arange(10_000.0), np.ones(10_000)
    y[1234], y[8765], y[5000:6000] = 50.0, -50.0, math.nan
    thin_x, thin_y = plots._envelope(x, y)
    assert len(thin_x) <= 800
    assert np.all(np.diff(thin_x) > 0)
    assert thin_y[thin_x == 1234] == 50 and thin_y[thin_x == 8765] == -50
    assert np.isnan(thin_y[(thin_x > 5025) & (thin_x < 5975)]).all()


def test_one_run_gives_one_page(good):
    assert render([read(good)]) == render([read(good)])


def test_the_command(good, tmp_path, capsys):
    assert main([str(good)]) == 0
    assert capsys.readouterr().out == f"{good / 'report.html'}\n"
    Page((good / "report.html").read_text(encoding="utf-8"))
    (good / "hypotheses.jsonl").write_text('{"id": "\\ud800", "reference": "a", "hypothesis": ""}')
    assert main([str(good), str(good), "-o", str(tmp_path / "two.html")]) == 0
    assert "<bdi>?</bdi>" in (tmp_path / "two.html").read_text(encoding="utf-8")
    capsys.readouterr()
    assert main([str(tmp_path / "absent")]) == 1
    assert "absent is not a folder" in capsys.readouterr().err
    assert main([str(good), "-o", str(tmp_path / "no" / "report.html")]) == 1
    assert "choose --output" in capsys.readouterr().err
    with pytest.raises(RunFolderError, match="is not a run"):
        (tmp_path / "empty").mkdir()
        read(tmp_path / "empty")


def test_a_run_on_recorded_prompts(trained_run):
    page = page_of(trained_run)
    words = " ".join(page.text.split())
    assert "Run finished" in words
    texts = [json.loads(line) for line in (trained_run / "hypotheses.jsonl").open()]
    assert len(texts) == 8
    for row in texts:
        assert row["id"] in words
    assert page.row("data")[1].startswith("manifest:")
    assert "Error rates on the training split" in words  # the corpus has no dev split
    assert re.search(r"WER of the best epoch \S+ % epoch \d+ of 30, training split", words)
    assert "The corpus has no dev split." in words
    assert "8 of 8 of the training split, highest WER first." in words


def test_a_run_of_the_trainer(trained):
    page = page_of(trained)
    words = " ".join(page.text.split())
    assert "Run finished Steps 4 Skipped 2 50.0 % of the steps" in words
    assert "Error rates on the dev split" in words
    assert re.search(r"WER of the best epoch \S+ % epoch \d of 2, dev split", words)
    assert "training split" not in words
    assert "Parameters 15." in words
    bad = [row for row in page.rows if len(row) > 1 and row[1] == "skip nonfinite"]
    assert len(bad) == 2
    for row in bad:
        assert "tone2.wav" in row[5]
        assert re.match(r"subsampling\S*\[\d+\]", row[4])
    assert page.row("guard.max_norm")[1] == "0.5"


def test_hypotheses_without_end_are_aligned_in_part(tmp_path):
    """The whole alignment of these two lines would take 4 GB."""
    row = {"id": "a", "reference": "a " * 180_000, "hypothesis": "b " * 180_000, "wer": 1, "cer": 1}
    (tmp_path / "hypotheses.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "train.log").touch()
    assert len(render([read(tmp_path)])) < 1_000_000


@pytest.mark.parametrize("name", ["metrics.jsonl", "hypotheses.jsonl", "train.log", "config.yaml"])
def test_a_fifo_in_the_place_of_a_file_is_said_and_not_waited_for(tmp_path, name):
    (tmp_path / "metrics.jsonl").touch()
    (tmp_path / "train.log").touch()
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    assert any("FIFO" in note for note in read(tmp_path).notes)


def test_the_default_page_takes_the_place_of_a_link(tmp_path):
    (tmp_path / "mine").write_text("precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "train.log").touch()
    (tmp_path / "run" / "report.html").symlink_to(tmp_path / "mine")
    assert main([str(tmp_path / "run")]) == 0
    assert (tmp_path / "mine").read_text() == "precious"
