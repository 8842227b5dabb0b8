"""examples/onnx_client.py has the texts of `transcribe --no-vad`; int8 programs are checked."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from fastguard.speech.cli import export, transcribe
from fastguard.speech.data.features import load_audio
from fastguard.speech.data.text import normalize_text
from fastguard.speech.data.tokenizer import CharTokenizer, SentencePieceTokenizer
from fastguard.speech.models import build_model
from fastguard.speech.recognition.description import METADATA_KEY
from fastguard.speech.recognition.recognizer import untrained_model
from fastguard.speech.storage import checkpoint
from fastguard.speech.training.config import Config, FeaturesConfig
from tests.recordings import write_manifest

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

ROOT = Path(__file__).parents[3]
CLIENT = ROOT / "examples" / "onnx_client.py"
SMALL = {
    "teacher": {"d_model": 48, "num_heads": 2, "num_blocks": 1},
    "baseline": {"channels": 24, "num_layers": 2},
}
#: By how much the tokens that begin words are likelier.
SPACES = {"teacher": 4, "baseline": 1}
#: Seconds of the shortest recording of 16 kHz that is cut: kept + context + margin, and a sample.
TWO_WINDOWS = (256_000 + 32_000 + 34 + 1) / 16_000


def client(program, *files):
    command = [sys.executable, CLIENT, program, *files]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8")


def texts_of(program, files):
    done = client(program, *files)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def transcribed(model, files, capsys):
    capsys.readouterr()
    assert transcribe.main(["--checkpoint", str(model), "--no-vad", *map(str, files)]) == 0
    return [line.split("\t")[1] for line in capsys.readouterr().out.splitlines()]


def test_it_uses_onnxruntime_and_numpy_alone_in_forty_lines():
    text = CLIENT.read_text(encoding="utf-8")
    imported = re.findall(r"^(?:import|from) (\w+)", text, re.M)
    others = set(imported) - sys.stdlib_module_names
    assert others == {"numpy", "onnxruntime"}
    code = text.split('"""', 2)[2].splitlines()
    assert sum(bool(line.strip()) for line in code) <= 40


@pytest.fixture(scope="module")
def learnt(trained_run, tmp_path_factory):
    """The folder of the exported programs of a run that has learnt eight prompts."""
    folder = tmp_path_factory.mktemp("exported")
    options = ["--format", "onnx", "int8", "--split", "train", "--output", str(folder)]
    assert export.main([str(trained_run), *options]) == 0
    return folder


@pytest.fixture(scope="module")
def prompts(trained_run, tmp_path_factory):
    """WAV files of the eight prompts, and one of three minutes with all of them."""
    folder, parts = tmp_path_factory.mktemp("wav"), []
    rows = map(json.loads, (trained_run.parent / "eight.jsonl").read_text().splitlines())
    for row in rows:
        parts += [load_audio(row["audio_filepath"], 16_000).numpy(), np.zeros(8_000)]
        soundfile.write(folder / f"{len(parts)}.wav", parts[-2], 16_000, "PCM_16")
    soundfile.write(folder / "long.wav", np.concatenate(9 * parts), 16_000, "PCM_16")
    assert soundfile.info(folder / "long.wav").duration > 150
    return sorted(folder.iterdir())


def test_real_prompts_and_a_long_file_have_the_texts_of_transcribe(
    trained_run, learnt, prompts, capsys
):
    expected = transcribed(trained_run, prompts, capsys)
    assert min(map(len, expected)) > 3
    assert texts_of(learnt / "model.onnx", prompts) == expected


def test_the_int8_program_is_small_and_has_the_texts_of_the_prompts(
    trained_run, learnt, prompts, capsys
):
    sizes = [(learnt / name).stat().st_size for name in ("model.int8.onnx", "model.onnx")]
    assert sizes[0] < 0.3 * sizes[1]
    short = prompts[:-1]
    expected = transcribed(trained_run, short, capsys)
    found = texts_of(learnt / "model.int8.onnx", short)
    assert sum(a != b for a, b in zip(found, expected, strict=True)) <= 1


def test_the_metadata_is_model_json_and_names_no_path_of_this_machine(learnt):
    described = json.loads((learnt / "model.json").read_text("utf-8"))
    for name in described["files"]:
        assert ROOT.as_posix().encode() not in (learnt / name).read_bytes()
        model = onnx.load(learnt / name)
        onnx.checker.check_model(model)
        metadata = {prop.key: prop.value for prop in model.metadata_props}
        assert json.loads(metadata[METADATA_KEY]) == described
        assert not any(node.metadata_props for node in model.graph.node)
    assert described["files"] == ["model.onnx", "model.int8.onnx"]


def small(name, **options):
    return build_model(name, **SMALL[name], **options)


def write_untrained(path, config, tokenizer):
    """A checkpoint whose texts depend on every frame. `transcribe` cuts a word of over 20 s, so
    words are made to begin often."""
    torch.manual_seed(0)
    model = untrained_model(config, tokenizer.vocab_size)
    model.head.weight.data.mul_(20)
    begins = [symbol[0] in " \u2581" for symbol in tokenizer.symbols]
    model.head.bias.data[begins] += SPACES[config.model]
    model.train()(torch.randn(2, 200, config.features.n_mels), torch.tensor([200, 90]))
    state = {"model": model.state_dict(), "tokenizer": tokenizer.to_dict()}
    checkpoint.save(path, state | {"config": config.to_dict()})
    return path


def write_sounds(folder, rate, *seconds):
    """WAV files of tones that change and noise."""
    draw, files = np.random.default_rng(0), []
    for number, duration in enumerate(seconds):
        time = np.arange(round(duration * rate)) / rate
        wave = 0.3 * np.sin(2 * np.pi * (400 + 100 * np.sin(3 * time)) * time)
        wave *= np.sin(2 * np.pi * 1.5 * time) ** 2
        wave += 0.01 * draw.standard_normal(len(time))
        files.append(folder / f"{number}.wav")
        soundfile.write(files[-1], wave, rate, "PCM_16")
    return files


LETTERS = CharTokenizer.from_texts(["äß я"])
PIECES = SentencePieceTokenizer.train(["the cat sat", "on the mat", "a hat on a cat"], 20, "bpe")


@pytest.mark.parametrize(
    ("name", "tokenizer", "features"),
    [
        ("baseline", LETTERS, {"sample_rate": 8_000}),
        ("baseline", PIECES, {"n_mels": 40, "normalization": "utterance"}),
        ("teacher", LETTERS, {"normalization": "level"}),
    ],
)
def test_every_kind_of_features_and_tokenizer(
    tmp_path, monkeypatch, capsys, name, tokenizer, features
):
    monkeypatch.setattr("fastguard.speech.recognition.recognizer.build_model", small)
    config = Config(model=name, run_dir=tmp_path, features=FeaturesConfig(**features))
    path = write_untrained(tmp_path / "last.pt", config, tokenizer)
    assert export.main([str(path), "--format", "onnx"]) == 0
    rate = features.get("sample_rate", 16_000)
    seconds = 1 / rate, 0.02, 0.9, TWO_WINDOWS - 1 / rate, TWO_WINDOWS, 47.3
    files = write_sounds(tmp_path, rate, *seconds)
    expected = transcribed(path, files, capsys)
    assert len(set(expected)) > 4
    assert max(map(len, expected[-1].split())) < 100  # characters
    assert texts_of(tmp_path / "exported" / "model.onnx", files) == expected
    symbols = json.loads((tmp_path / "exported" / "model.json").read_text("utf-8"))["symbols"]
    assert len(symbols) == tokenizer.vocab_size
    assert (tmp_path / "exported" / "tokenizer.model").exists() == (tokenizer is PIECES)


def test_the_client_names_the_cure_for_other_recordings(tmp_path, learnt):
    for name, rate, channels in (("rate", 8_000, 1), ("stereo", 16_000, 2)):
        other = tmp_path / f"{name}.wav"
        soundfile.write(other, np.zeros((800, channels)), rate, "PCM_16")
        done = client(learnt / "model.onnx", other)
        assert done.returncode == 1
        assert done.stderr.splitlines() == [
            f"{other}: use ffmpeg -i {other} -ac 1 -ar 16000 -c:a pcm_s16le mono.wav"
        ]


# --- int8 -----------------------------------------------------------------------------------


@pytest.fixture
def own_texts(tmp_path, monkeypatch, capsys):
    """A checkpoint, and a corpus whose texts are what it recognises in float32."""
    monkeypatch.setattr("fastguard.speech.recognition.recognizer.build_model", small)
    config = Config(model="baseline", run_dir=tmp_path)
    path = write_untrained(tmp_path / "last.pt", config, LETTERS)
    files = write_sounds(tmp_path, 16_000, 3, 4, 5)
    texts = map(normalize_text, transcribed(path, files, capsys))
    rows = [
        {"audio_filepath": str(file), "text": text, "split": split}
        for file, text, split in zip(files, texts, ("train", "dev", "dev"), strict=True)
    ]
    return path, write_manifest(tmp_path / "own.jsonl", rows)


def test_int8_that_loses_words_is_not_kept(own_texts, tmp_path, capsys):
    path, data = own_texts
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.int8.onnx").write_bytes(b"of yesterday")
    command = [str(path), "--format", "int8", "--data", data, "--output", str(tmp_path / "out")]
    assert export.main(command) == 1
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1
    numbers = r"WER (\S+), (\S+) in float32, on 2 utterances of \d+ words"
    int8, float32 = map(float, re.search(numbers, told[0]).groups())
    assert float32 + 0.01 < int8 < 0.5
    assert float32 < 0.05
    assert "the int8 program is not kept" in told[0]
    assert "allowed is a loss of 0.01: use model.onnx, or give a larger --wer-loss" in told[0]
    assert (tmp_path / "out" / "model.int8.onnx").read_bytes() == b"of yesterday"
    assert export.main([*command, "--wer-loss", "1"]) == 0
    line = capsys.readouterr().out.splitlines()[0]
    assert "model.int8.onnx: " in line
    assert f" MB, WER {int8:.4f}, {float32:.4f} in float32" in line
    assert (tmp_path / "out" / "model.int8.onnx").stat().st_size > 1000
    assert not list(tmp_path.glob("out/*tmp*"))


def test_int8_without_words_to_check_is_not_kept(own_texts, tmp_path, capsys):
    path, data = own_texts
    command = [str(path), "--format", "int8", "--data", data, "--split", "test"]
    assert export.main(command) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "test" in error
    assert not (tmp_path / "exported" / "model.int8.onnx").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "asterisk"], "--data needs --format int8"),
        (["--wer-loss", "0.1"], "--wer-loss needs --format int8"),
        (
            ["--format", "int8", "--wer-loss", "-1"],
            "--wer-loss must be 0 or more and finite, got -1.0",
        ),
        (["--format", "int8", "--wer-loss", "nan"], "0 or more and finite, got nan"),
    ],
)
def test_options_that_contradict_each_other(options, message, capsys):
    with pytest.raises(SystemExit) as stop:
        export.main(["a.pt", *options])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
