"""Exported programs and weights against the model they were made of."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from fastguard import clamped_attention
from fastguard.ops import attention as attention_ops
from fastguard.speech.cli import export
from fastguard.speech.data.features import NORMALIZATIONS, LogMel, load_audio
from fastguard.speech.data.tokenizer import CharTokenizer
from fastguard.speech.models import build_model
from fastguard.speech.recognition.decoding import greedy_decode
from fastguard.speech.recognition.description import describe_features
from fastguard.speech.recognition.recognizer import Recognizer, untrained_model
from fastguard.speech.storage import checkpoint, weights
from fastguard.speech.training.config import Config
from tests.recordings import asterisk_or_skip

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
pytest.importorskip("safetensors")

SMALL = {
    "teacher": {"d_model": 48, "num_heads": 2, "num_blocks": 1},
    "baseline": {"channels": 24, "num_layers": 2},
}


def small(name, **options):
    return build_model(name, **SMALL[name], **options)


def write_checkpoint(path, name):
    """Weights that matter: as they are drawn, with running statistics of a training step."""
    torch.manual_seed(0)
    config = Config(model=name, run_dir=path.parent)
    config.network.attention_clamp = 0.2 if name == "teacher" else None  # which then holds values
    tokenizer = CharTokenizer.from_texts(["abc"])
    model = untrained_model(config, tokenizer.vocab_size)
    model.head.weight.data.mul_(20)
    model.train()(torch.randn(2, 200, 80), torch.tensor([200, 90]))
    state = {
        "model": model.state_dict(),
        "tokenizer": tokenizer.to_dict(),
        "config": config.to_dict(),
    }
    checkpoint.save(path, state)
    return path


class Exported(NamedTuple):
    folder: Path
    recognizer: Recognizer
    programs: list[export.Program]


@pytest.fixture(scope="module", params=["teacher", "baseline"])
def exported(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastguard.speech.recognition.recognizer.build_model", small)
        assert export.main([str(write_checkpoint(folder / "last.pt", request.param))]) == 0
        files = folder / "exported"
        programs = [export.load_torch(files / "model.pt2"), export.load_onnx(files / "model.onnx")]
        yield Exported(files, Recognizer.load(folder / "last.pt"), programs)


def test_the_programs_are_the_model(exported):
    _, recognizer, programs = exported
    generator = torch.Generator().manual_seed(1)
    for batch, frames in ((1, 1), (1, 1999), (4, 2), (2, 50), (7, 101)):
        inputs = torch.randn(batch, frames, 80, generator=generator)
        lengths = torch.randint(1, frames + 1, (batch,), generator=generator)
        log_probs, output_lengths = recognizer(inputs, lengths)
        valid = torch.arange(log_probs.size(1)) < output_lengths[:, None]
        for program in programs:
            with torch.no_grad():
                ours, our_lengths = program(inputs, lengths)
            assert ours.shape == (batch, log_probs.size(1) + 1, log_probs.size(2))
            assert ours.isfinite().all()
            assert torch.equal(our_lengths, output_lengths)
            torch.testing.assert_close(ours[:, :-1][valid], log_probs[valid], rtol=1e-4, atol=1e-4)


def test_a_real_prompt_gives_the_same_text(exported):
    _, recognizer, programs = exported
    utterance = asterisk_or_skip().split("dev")[0]
    inputs = recognizer.log_mel(load_audio(utterance.audio, 16_000))[None]
    lengths = torch.tensor([inputs.size(1)])
    texts = []
    for program in (recognizer, *programs):
        with torch.no_grad():
            (tokens,) = greedy_decode(*program(inputs, lengths))
        texts.append(recognizer.tokenizer.decode(tokens))
    assert len(texts[0]) > 3
    assert texts == [texts[0]] * 3


WITHOUT_FASTGUARD = """
import sys
sys.modules["fastguard"] = None  # importing it raises ImportError
import torch
program = torch.export.load(sys.argv[1]).module()
inputs = torch.load(sys.argv[2])
with torch.no_grad():
    torch.save(program(*inputs), sys.argv[3])
assert not any(name.startswith("fastguard.") for name in sys.modules)
"""


def test_the_program_runs_where_there_is_no_fastguard(exported, tmp_path):
    folder, recognizer, _ = exported
    inputs = torch.randn(3, 77, 80), torch.tensor([77, 20, 1])
    torch.save(inputs, tmp_path / "in.pt")
    files = (folder / "model.pt2", tmp_path / "in.pt", tmp_path / "out.pt")
    subprocess.run([sys.executable, "-c", WITHOUT_FASTGUARD, *files], check=True, cwd=tmp_path)
    log_probs, lengths = torch.load(tmp_path / "out.pt")
    expected, expected_lengths = recognizer(*inputs)
    assert torch.equal(lengths, expected_lengths)
    torch.testing.assert_close(log_probs[0, :20], expected[0], rtol=1e-4, atol=1e-4)


def test_onnx_has_standard_operators_and_named_axes_in_one_file(exported):
    model = onnx.load(exported.folder / "model.onnx", load_external_data=False)
    onnx.checker.check_model(model)
    assert {node.domain for node in model.graph.node} == {""}
    assert not model.functions
    shapes = {
        value.name: [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }
    assert shapes["features"] == ["batch", "frames", 80]
    assert shapes["feature_lengths"] == shapes["output_lengths"] == ["batch"]
    assert shapes["log_probs"][::2] == ["batch", 29]
    assert sorted(path.name for path in exported.folder.iterdir()) == [
        "model.json",
        "model.onnx",
        "model.pt2",
        "model.safetensors",
    ]


def test_safetensors_are_the_checkpoint(exported):
    folder, recognizer, _ = exported
    again = Recognizer.load(folder / "model.safetensors")
    assert again.config == recognizer.config
    assert again.tokenizer.symbols == recognizer.tokenizer.symbols
    ours, theirs = again.model.state_dict(), recognizer.model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def features_of(samples, spec):
    """Log-mel features by model.json and NumPy alone."""
    n_fft, hop, width = spec["n_fft"], spec["hop_length"], spec["win_length"]
    window = np.zeros(n_fft)
    start = (n_fft - width) // 2
    window[start : start + width] = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(width) / width)
    padded = np.pad(samples.astype(np.float64), n_fft // 2)
    rows = np.stack([padded[i : i + n_fft] for i in range(0, len(padded) - n_fft + 1, hop)])
    power = np.abs(np.fft.rfft(rows * window)) ** spec["power"]

    def mel(hertz):
        return 2595 * np.log10(1 + hertz / 700)

    points = np.linspace(mel(spec["f_min"]), mel(spec["f_max"]), spec["n_mels"] + 2)
    points = 700 * (10 ** (points / 2595) - 1)
    bins = np.linspace(0, spec["sample_rate"] // 2, n_fft // 2 + 1)[:, None]
    rising = (bins - points[:-2]) / (points[1:-1] - points[:-2])
    falling = (points[2:] - bins) / (points[2:] - points[1:-1])
    energies = power @ np.maximum(0, np.minimum(rising, falling))
    floor = max(energies.max() / spec["dynamic_range"], spec["silence"])
    if spec["normalization"] == "level":
        return np.log10(np.maximum(energies, floor) / (floor * spec["dynamic_range"])) / 2 + 2
    x = spoken = np.log(np.maximum(energies, floor))
    if spec["normalization"] == "speech":
        frames = energies.sum(1)
        spoken = x[frames >= frames.max() / spec["speech_range"]]
    x = (x - spoken.mean(0)) / np.maximum(spoken.std(0), spec["min_deviation"])
    return np.maximum(x, spec["least"]) if spec["normalization"] == "speech" else x


def test_the_json_is_enough_to_make_the_features_and_read_the_output(exported):
    folder, recognizer, _ = exported
    description = json.loads((folder / "model.json").read_text("utf-8"))
    assert description["tokenizer"]["symbols"] == recognizer.tokenizer.symbols
    assert description["tokenizer"]["symbols"][description["blank_id"]] == "<blank>"
    assert (description["features"]["mel_scale"], description["features"]["mel_norm"]) == (
        "htk",
        None,
    )
    assert description["subsampling"] == math.ceil(1000 / recognizer.model.output_lengths(1000))
    samples = torch.randn(16_000, generator=torch.Generator().manual_seed(0)) * 0.1
    ours = features_of(samples.numpy(), description["features"])
    assert np.abs(ours - recognizer.log_mel(samples).numpy()).max() < 1e-3


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_the_recipe_of_each_normalization_is_enough_too(normalization):
    log_mel = LogMel(normalization=normalization)
    samples = torch.randn(16_000, generator=torch.Generator().manual_seed(0)) * 0.1
    samples[:4000] *= 1e-4
    ours = features_of(samples.numpy(), describe_features(log_mel))
    assert np.abs(ours - log_mel(samples).numpy()).max() < 1e-3


def run(tmp_path, monkeypatch, *options, name="baseline"):
    monkeypatch.setattr("fastguard.speech.recognition.recognizer.build_model", small)
    path = write_checkpoint(tmp_path / "last.pt", name)
    return export.main([str(path), "--output", str(tmp_path / "out"), *options])


@pytest.mark.parametrize("wrong", [1.01, math.nan])
def test_a_program_that_differs_is_refused_and_an_older_file_stays(
    tmp_path, monkeypatch, capsys, wrong
):
    load = export.load_torch

    def differs(path):
        program = load(path)
        return lambda *inputs: (program(*inputs)[0] * wrong, program(*inputs)[1])

    monkeypatch.setattr(export, "load_torch", differs)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.pt2").write_bytes(b"of yesterday")
    assert run(tmp_path, monkeypatch, "--format", "torch") == 1
    error = capsys.readouterr().err
    assert "the torch program is wrong and not kept: log_probs differ" in error
    assert len(error.splitlines()) == 1
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.pt2"]
    assert (tmp_path / "out" / "model.pt2").read_bytes() == b"of yesterday"


def test_other_lengths_are_refused():
    model = small("baseline").eval()
    with pytest.raises(export.ExportError, match=r"output_lengths \[2\], not \[1\]"):
        export.compare(lambda *inputs: (model(*inputs)[0], model(*inputs)[1] + 1), model)


def test_missing_packages_are_named(tmp_path, monkeypatch, capsys):
    find = export.importlib.util.find_spec
    monkeypatch.setattr(
        export.importlib.util, "find_spec", lambda name: None if "onnx" in name else find(name)
    )
    assert run(tmp_path, monkeypatch) == 2
    error = capsys.readouterr().err
    assert "onnx, onnxscript, onnxruntime missing" in error
    assert "pip install 'torch-fastguard[export]'" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "absent.pt cannot be read"), (b"text", "absent.pt cannot be read")],
)
def test_unusable_checkpoints(tmp_path, capsys, content, message):
    path = tmp_path / "absent.pt"
    if content is not None:
        path.write_bytes(content)
    assert export.main([str(path)]) == 1
    assert message in capsys.readouterr().err
    assert export.main([str(tmp_path / "empty")]) == 1


def test_an_output_that_is_a_file(tmp_path, monkeypatch, capsys):
    (tmp_path / "out").write_text("")
    assert run(tmp_path, monkeypatch, "--format", "safetensors") == 1
    assert capsys.readouterr().err.startswith("error: ")


def test_wrong_usage():
    with pytest.raises(SystemExit) as stop:
        export.main(["a.pt", "--format", "tflite"])
    assert stop.value.code == 2


def test_a_tokenizer_with_a_model_of_its_own(tmp_path, monkeypatch):
    """As SentencePiece's: bytes in a tensor."""
    monkeypatch.setattr("fastguard.speech.recognition.recognizer.build_model", small)
    recognizer = Recognizer.load(write_checkpoint(tmp_path / "last.pt", "baseline"))
    content = bytes(range(256))
    state = {"symbols": ["<blank>", "▁a"], "model": torch.tensor(list(content), dtype=torch.uint8)}
    monkeypatch.setattr(recognizer.tokenizer, "to_dict", lambda: state, raising=False)
    list(export.export(recognizer, tmp_path, ["safetensors"]))
    assert (tmp_path / "tokenizer.model").read_bytes() == content
    description = json.loads((tmp_path / "model.json").read_text("utf-8"))
    assert description["tokenizer"] == {"symbols": ["<blank>", "▁a"], "model": "tokenizer.model"}
    again = weights.load(tmp_path / "model.safetensors")["tokenizer"]
    assert again["symbols"] == state["symbols"]
    assert torch.equal(again["model"], state["model"])


def test_foreign_and_truncated_safetensors_are_named(tmp_path, monkeypatch):
    from safetensors.torch import save_file

    save_file({"a": torch.ones(2)}, tmp_path / "foreign.safetensors")
    with pytest.raises(checkpoint.CheckpointError, match=r"(?s)foreign.*metadata"):
        Recognizer.load(tmp_path / "foreign.safetensors")
    save_file({"a": torch.ones(2)}, tmp_path / "odd.safetensors", {"fastguard": "[1]"})
    with pytest.raises(checkpoint.CheckpointError, match=r"(?s)odd.*metadata"):
        Recognizer.load(tmp_path / "odd.safetensors")
    assert run(tmp_path, monkeypatch, "--format", "safetensors") == 0
    whole = (tmp_path / "out" / "model.safetensors").read_bytes()
    (tmp_path / "half.safetensors").write_bytes(whole[: len(whole) // 2])
    flipped = bytearray(whole)
    flipped[-1234] ^= 1
    (tmp_path / "flipped.safetensors").write_bytes(flipped)
    with pytest.raises(checkpoint.CheckpointError, match="do not match its checksum"):
        Recognizer.load(tmp_path / "flipped.safetensors")
    os.mkfifo(tmp_path / "fifo.safetensors")
    with pytest.raises(checkpoint.CheckpointError, match="is a FIFO"):
        Recognizer.load(tmp_path / "fifo.safetensors")
    for name in ("half", "absent"):
        with pytest.raises(checkpoint.CheckpointError, match=rf"{name}\.safetensors"):
            Recognizer.load(tmp_path / f"{name}.safetensors")


def test_exported_attention_is_the_reference_and_eager_the_operator(monkeypatch):
    query = torch.randn(1, 2, 5, 8)
    calls = []
    reference = attention_ops.attention_ref
    monkeypatch.setattr(
        attention_ops, "attention_ref", lambda *args: calls.append(1) or reference(*args)
    )

    class Attention(torch.nn.Module):
        def forward(self, x):
            return clamped_attention(x, x, x, clamp=0.3)

    expected = Attention()(query)
    assert not calls
    program = torch.export.export(Attention(), (query,))
    assert calls
    targets = [str(node.target) for node in program.graph.nodes]
    assert not any("fastguard" in target for target in targets)
    assert not any("autocast" in target for target in targets)
    torch.testing.assert_close(program.module()(query), expected)


@pytest.mark.slow
def test_the_teacher_of_real_size(tmp_path, capsys):
    path = write_checkpoint(tmp_path / "last.pt", "teacher")
    assert export.main([str(path), "--format", "torch", "onnx"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert all("of 742 frames" in line for line in lines[:2])
