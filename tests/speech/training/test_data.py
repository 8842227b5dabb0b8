"""What a run makes of its corpus before the first step, and what it tells about it."""

import json

import pytest

from fastguard.speech.data.readers import CorpusError
from fastguard.speech.data.text import TextRules
from fastguard.speech.training.config import Config
from fastguard.speech.training.data import Data
from fastguard.speech.training.options import parse
from tests.recordings import tones


@pytest.fixture
def corpus(tmp_path):
    """corpus(*rows): the spec of six tones and more rows, by text, of the first tone's audio."""
    spec = tones(tmp_path)

    def add(*texts, split="train"):
        with (tmp_path / "tones.jsonl").open("a", encoding="utf-8") as file:
            for number, text in enumerate(texts):
                (tmp_path / f"copy{number}.wav").write_bytes((tmp_path / "tone0.wav").read_bytes())
                row = {"audio_filepath": f"copy{number}.wav", "text": text, "split": split}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        return spec

    return add


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("kind, size", [("char", 256), ("unigram", 6), ("bpe", 6)])
def test_rows_that_are_left_out_make_no_vocabulary(corpus, tmp_path, kind, size):
    """Two rows with a thousand characters each, of which CTC can align none."""
    foreign = ["".join(map(chr, range(0x4E00 + 1000 * i, 0x4E00 + 1000 * (i + 1)))) for i in (0, 1)]
    spec = corpus(*foreign)
    config = Config(model="baseline", data=spec)
    config.tokenizer.kind, config.tokenizer.vocab_size = kind, size
    if kind == "char":
        data = Data(config)
        assert data.tokenizer.vocab_size == 29
        assert {row.kind for row in data.corpus.rejected} == {"infeasible target"}
        assert len(data.corpus.split("train")) == 4
    else:
        with pytest.raises(CorpusError, match="the characters of the texts alone need"):
            Data(config)


def test_what_is_left_out_and_changed_is_listed_in_full(corpus, tmp_path, caplog):
    folder = tmp_path / "run"
    folder.mkdir()
    spec = corpus("Ab!", *("[noise]" for _ in range(5)), "aé")
    with caplog.at_level("INFO", "fastguard"):
        Data(Config(model="baseline", data=spec), folder=folder)
    assert [row["id"] for row in lines(folder / "left_out.jsonl")] == [
        f"copy{number}.wav" for number in range(1, 6)
    ]
    assert all(row["reason"].startswith("no words") for row in lines(folder / "left_out.jsonl"))
    assert lines(folder / "changed_labels.jsonl") == [
        {"id": "copy0.wav", "written": "Ab!", "text": "ab", "changed": ["case", "marks"]}
    ]
    assert "left out 5: copy1.wav, copy2.wav, copy3.wav, ... (no words" in caplog.text
    assert "texts changed 1, case: copy0.wav ('Ab!' -> 'ab')" in caplog.text
    assert sorted(path.name for path in folder.iterdir()) == [
        "changed_labels.jsonl",
        "left_out.jsonl",
    ]


def test_rules_of_texts_go_with_the_settings(corpus, tmp_path):
    spec = corpus("ab 3 Ba")
    config = Config(model="baseline", data=spec, text=TextRules(numbers="reject", case="keep"))
    assert Config.from_dict(config.to_dict()).text == config.text
    assert [row.kind for row in Data(config).corpus.rejected] == ["number in digits"]
    config = parse(["--data", spec, "--text.numbers", "words", "--text.case", "keep"])
    assert config.text == TextRules(numbers="words", case="keep")
    assert "ab three Ba" in Data(config).corpus.split("train").texts()


def test_a_relative_corpus_is_found_from_every_folder(corpus, tmp_path, monkeypatch):
    corpus()
    monkeypatch.chdir(tmp_path)
    assert parse(["--data", "manifest:tones.jsonl"]).data == f"manifest:{tmp_path}/tones.jsonl"


def test_the_channel_is_a_setting(corpus, capsys):
    """The tones have one channel."""
    data = Data(parse(["--model", "baseline", "--data", corpus(), "--channel", "left"]))
    assert {row.part.channel for row in data.corpus.utterances} == {0}
    with pytest.raises(CorpusError, match=r"no such channel: .*has 1, and channel 1, counted from"):
        Data(parse(["--model", "baseline", "--data", corpus(), "--channel", "right"]))
    with pytest.raises(SystemExit):
        parse(["--channel", "both"])
    assert "both" in capsys.readouterr().err
