"""``python -m fastguard.evaluate`` on recorded speech, as its user meets it."""

import json
import shutil

import jiwer
import numpy as np
import pytest
import soundfile

from fastguard.speech.cli.evaluate import main
from tests.recordings import tones, write_manifest


def rows_of(folder):
    return [json.loads(line) for line in (folder / "hypotheses.jsonl").read_text().splitlines()]


def test_the_prompts_it_learnt(trained_run, tmp_path, capsys):
    assert main([str(trained_run), "--split", "train", "--output", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    last = [json.loads(line) for line in (trained_run / "metrics.jsonl").read_text().splitlines()]
    best = min(line["wer"] for line in last if line["kind"] == "epoch")
    rates = json.loads((tmp_path / "out" / "rates.json").read_text())
    assert rates["wer"] == pytest.approx(best, abs=0.05)  # bf16 there, fp32 here
    assert rates["utterances"] == 8
    assert rates["nonfinite"] == []
    assert rates["long"]["words"] <= rates["words"]
    assert rates["long"]["utterances"] <= rates["utterances"]
    assert rates["wer_interval"][0] <= rates["wer"] <= rates["wer_interval"][1]
    rows = rows_of(tmp_path / "out")
    assert len(rows) == 8
    errors = [row["substitutions"] + row["deletions"] + row["insertions"] for row in rows]
    assert errors == sorted(errors, reverse=True)
    together = jiwer.wer([r["reference"] for r in rows], [r["hypothesis"] for r in rows])
    assert rates["wer"] == pytest.approx(together)
    assert f"{trained_run / 'best.pt'}" in out
    assert out.split("\nall ")[1].split()[0] == f"{rates['wer']:.3f}"
    for row in rows:
        assert f"    REF {row['reference']}\n    HYP {row['hypothesis']}\n" in out
    alignments = (tmp_path / "out" / "alignments.txt").read_text()
    positions = [alignments.index(f"{row['id']}: ") for row in rows]
    assert positions == sorted(positions)
    assert alignments.count("REF:") == alignments.count("HYP:") == 8


def test_beam_search_over_the_words_it_learnt_finds_nothing_else(trained_run, tmp_path):
    pytest.importorskip("flashlight.lib.text.decoder")
    lexicon = tmp_path / "words.txt"
    assert main([str(trained_run), "--split", "train", "--output", str(tmp_path / "a")]) == 0
    words = {word for row in rows_of(tmp_path / "a") for word in row["reference"].split()}
    lexicon.write_text("\n".join(words))
    options = ["--decoder", "beam", "--lexicon", str(lexicon), "--output", str(tmp_path / "b")]
    assert main([str(trained_run), "--split", "train", *options]) == 0
    rows = rows_of(tmp_path / "b")
    assert {word for row in rows for word in row["hypothesis"].split()} <= words
    assert sum(row["wer"] for row in rows) < 0.5


def test_a_reference_with_characters_that_the_tokenizer_lacks(trained_run, tmp_path, capsys):
    prompt = rows_prompt(trained_run)
    data = write_manifest(
        tmp_path / "foreign.jsonl",
        [{"audio_filepath": prompt["audio_filepath"], "text": "été дом", "split": "test"}],
    )
    options = ["--data", data, "--split", "test", "--output", str(tmp_path)]
    assert main([str(trained_run), *options]) == 0
    (row,) = rows_of(tmp_path)
    assert row["reference"] == "été дом"
    assert row["hypothesis"] != ""
    assert row["wer"] >= 1
    assert "REF été дом" in capsys.readouterr().out


def rows_prompt(trained_run):
    return json.loads((trained_run.parent / "eight.jsonl").read_text().splitlines()[0])


def test_all_splits_and_the_folder_that_it_chooses(trained_run, tmp_path, capsys):
    checkpoint = shutil.copy(trained_run / "best.pt", tmp_path / "a.pt")
    options = ["--data", tones(tmp_path), "--split", "all", "--precision", "bf16"]
    assert main([str(checkpoint), *options]) == 0
    assert len(rows_of(tmp_path / "evaluation-all-greedy")) == 6
    assert "4 words and more" not in capsys.readouterr().out


def test_what_is_evaluated_is_all_that_can_be(trained_run, tmp_path, capsys):
    """Longer recordings than those of the training, and silent ones; what is not is told."""
    prompt = rows_prompt(trained_run)
    samples, rate = soundfile.read(prompt["audio_filepath"])
    soundfile.write(tmp_path / "long.wav", np.tile(samples, round(21 * rate / len(samples))), rate)
    soundfile.write(tmp_path / "short.wav", samples[:400], rate)
    soundfile.write(tmp_path / "whole.wav", samples, rate)
    whole = (tmp_path / "whole.wav").read_bytes()
    (tmp_path / "torn.wav").write_bytes(whole[: len(whole) // 2])
    rows = [
        {"audio_filepath": name, "text": text, "split": "test"}
        for name, text in (
            ("long.wav", "Words! (noise)"),
            ("short.wav", "a"),
            ("whole.wav", ""),
            ("torn.wav", "b"),
            ("gone.wav", "c"),
        )
    ]
    data = write_manifest(tmp_path / "all.jsonl", rows)
    out = tmp_path / "out"
    options = ["--data", data, "--split", "test", "--output", str(out)]
    assert main([str(trained_run), *options]) == 0
    found = {row["id"]: row for row in rows_of(out)}
    assert sorted(found) == ["long.wav", "short.wav", "whole.wav"]
    assert found["long.wav"]["duration"] > 20
    assert found["long.wav"]["reference"] == "words"
    silent = found["whole.wav"]
    assert silent["insertions"] == len(silent["hypothesis"].split()) > 0
    told = capsys.readouterr().out
    assert "not used: 1 of the corpus: torn.wav (cut off: " in told
    assert "not used: 1 of the corpus: gone.wav (no recording: " in told
    left_out = (out / "left_out.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["id"] for line in left_out) == ["gone.wav", "torn.wav"]
    (changed,) = map(json.loads, (out / "changed_labels.jsonl").read_text().splitlines())
    assert changed["written"] == "Words! (noise)"


def test_a_manifest_without_splits(trained_run, tmp_path, capsys, caplog):
    """Of three rows none is dev; of eight one is, and it is said that the others are not."""
    tones(tmp_path, 8)
    words = ["ab", "ba", "abba", "bab", "aab", "bba", "abab", "baba"]
    rows = [{"audio_filepath": f"tone{i}.wav", "text": word} for i, word in enumerate(words)]
    few = write_manifest(tmp_path / "few.jsonl", rows[:3])
    options = [str(trained_run), "--output", str(tmp_path / "out")]
    assert main([*options, "--data", few]) == 1
    error = capsys.readouterr().err
    assert f"no usable row in the split dev: 3 rows of {few} name no split" in error
    assert "--split all evaluates all rows; " in error
    assert error.count("\n") == 1
    assert "\\u000a" not in error
    assert main([*options, "--data", few, "--split", "all"]) == 0
    assert len(rows_of(tmp_path / "out")) == 3
    assert not caplog.records
    many = write_manifest(tmp_path / "many.jsonl", rows)
    assert main([*options, "--data", many]) == 0
    assert len(rows_of(tmp_path / "out")) == 1
    (record,) = caplog.records
    assert record.getMessage().startswith(f"8 rows of {many} name no split: dev has only those")
    assert record.getMessage().endswith("--split all evaluates all rows")


@pytest.mark.parametrize(
    "options, status, message",
    [
        (["absent.pt"], 1, "error: absent.pt cannot be read as a checkpoint"),
        (["RUN", "--split", "dev"], 1, "error: no usable row in the split dev"),
        (["RUN", "--data", "manifest:absent"], 1, "error: the manifest absent does not exist"),
        (["RUN", "--output", "RUN/best.pt"], 1, "error: "),
        (["RUN", "--decoder", "beam", "--lm", "absent.arpa"], 1, "error: absent.arpa cannot be"),
        (["RUN", "--lm", "a.arpa"], 2, "--lm needs --decoder beam"),
        (["RUN", "--decoder", "beam", "--lm-weight", "1"], 2, "--lm-weight needs --lm FILE"),
        (["RUN", "--lm", "a.arpa", "--lm-weight", "nan"], 2, "--lm-weight: must be finite"),
        (["RUN", "--decoder", "beam", "--beam-size", "0"], 2, "--beam-size must be at least 1"),
        (["RUN", "--batch-size", 9_000 * "9"], 2, "9... is a number of 9000 digits"),
        (["RUN", "--batch-size", "0"], 2, "--batch-size must be at least 1, got 0"),
        (["RUN", "--device", "cuda:99"], 2, "cuda:99 does not exist"),
        (["RUN", "--device", "abacus"], 2, "--device"),
        ([], 2, "checkpoint"),
    ],
)
def test_what_can_not_be_done(trained_run, capsys, options, status, message):
    argv = [word.replace("RUN", str(trained_run)) for word in options]
    if status == 2:
        with pytest.raises(SystemExit) as ended:
            main(argv)
        assert ended.value.code == 2
    else:
        assert main(argv) == status
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_help_ends_with_an_example(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    assert "python -m fastguard.evaluate runs/" in capsys.readouterr().out.splitlines()[-1]


def test_the_channel_of_calls(trained_run, tmp_path, capsys):
    """The learnt prompts are on the right channel, and noise is on the left one."""
    rows = []
    for line in (trained_run.parent / "eight.jsonl").read_text().splitlines():
        row = json.loads(line)
        samples, rate = soundfile.read(row["audio_filepath"])
        noise = np.random.default_rng(0).uniform(-0.5, 0.5, len(samples))
        name = f"{len(rows)}.wav"
        soundfile.write(tmp_path / name, np.stack([noise, samples], axis=1), rate)
        rows.append(row | {"audio_filepath": name})
    data = write_manifest(tmp_path / "calls.jsonl", rows)
    command = [str(trained_run), "--split", "train", "--data", data, "--output"]
    rates = {}
    for options in ([], ["--channel", "right"]):
        assert main([*command, str(tmp_path / f"out{len(options)}"), *options]) == 0
        found = json.loads((tmp_path / f"out{len(options)}" / "rates.json").read_text())
        rates[len(options)] = found["cer"]
    assert rates[2] < 0.2 < 0.6 < rates[0]
