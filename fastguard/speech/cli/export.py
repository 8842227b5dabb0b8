"""``python -m fastguard.export``: a checkpoint for use without fastguard.

Writes model.safetensors (the weights; fastguard reads it like a checkpoint),
model.pt2 (torch.export; runs with torch alone), model.onnx (standard operators
only) and model.json (the symbols, the features, the names of the tensors: what
a consumer needs besides the model). The two programs take batches of any size
and length. Each file is checked before it gets its name: the weights bit for
bit, the programs against the model on batches of several sizes.
"""

import argparse
import importlib.util
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from tqdm import tqdm

from fastguard import __version__
from fastguard._command import exit_status
from fastguard._extras import MissingExtra
from fastguard._io import files, terminal
from fastguard.speech.data.features import LogMel
from fastguard.speech.recognition.recognizer import Recognizer
from fastguard.speech.storage import checkpoint, weights
from fastguard.speech.storage.plain import to_plain

#: Maps features and feature_lengths to log_probs and output_lengths.
Program = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

PACKAGES = {
    "safetensors": ["safetensors"],
    "torch": [],
    "onnx": ["onnx", "onnxscript", "onnxruntime"],
}
SUFFIXES = {"safetensors": ".safetensors", "torch": ".pt2", "onnx": ".onnx"}

INPUTS, OUTPUTS = ("features", "feature_lengths"), ("log_probs", "output_lengths")
AXES = ({0: "batch", 1: "frames"}, {0: "batch"})

#: Batches and frames on which a program is compared; the traced example is not among them.
EXAMPLE = (2, 50)
SHAPES = ((1, 1), (1, 2000), (2, 4), (3, 7), (5, 333))
#: |program - eager| <= TOLERANCE * (1 + |eager|), about 800 units in the last place of float32. A
#: hundred layers of an untrained teacher differ by a tenth of it if summed in another order; an
#: operator with another meaning differs by more.
TOLERANCE = 1e-4


class ExportError(RuntimeError):
    """A file could not be written, or does not compute what the model does; the message says
    which."""


class Portable(nn.Module):
    """The model as a program for any number of frames from 1 on.

    torch.export treats a size of 1 as a constant, and 1 to 4 frames give one output frame. So four
    frames of padding are added: log_probs has ceil(T / 4) + 1 frames, the last one past every
    length.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, features: Tensor, feature_lengths: Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`fastguard.speech.models.ctc.CTCModel.forward`."""
        return self.model(F.pad(features, (0, 0, 0, 4)), feature_lengths)


@torch.no_grad()
def trace(model: nn.Module) -> ExportedProgram:
    """The graph of ``model`` in evaluation mode, with operators of torch only."""
    batch, frames = EXAMPLE
    example = (torch.zeros(batch, frames, model.n_mels), torch.full((batch,), frames))
    sizes = {"batch": Dim("batch", min=1), "frames": Dim("frames", min=1)}
    axes = tuple({axis: sizes[name] for axis, name in names.items()} for names in AXES)
    program = torch.export.export(Portable(model).eval(), example, dynamic_shapes=axes)
    program.graph.eliminate_dead_code()  # other results of attention's reference
    return program


def save_torch(path: Path, program: ExportedProgram) -> None:
    """Write a .pt2 file."""
    content = io.BytesIO()  # torch's writer of archives aborts the process if the disk is full
    torch.export.save(program, content)
    path.write_bytes(content.getbuffer())


def save_onnx(path: Path, program: ExportedProgram) -> None:
    """Write a .onnx file."""
    names = {"input_names": INPUTS, "output_names": OUTPUTS, "dynamic_shapes": AXES}
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "# The axis name: batch"
        )  # the name is given twice, for two inputs
        model = torch.onnx.export(program, verbose=False, **names)
    model.save(path, external_data=False)


def load_torch(path: Path) -> Program:
    """The program in a .pt2 file."""
    with open(path, "rb") as file:
        return torch.export.load(file).module()


def load_onnx(path: Path) -> Program:
    """The program in a .onnx file, run by onnxruntime on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        feed = {name: x.numpy() for name, x in zip(INPUTS, inputs, strict=True)}
        return tuple(map(torch.from_numpy, session.run(OUTPUTS, feed)))

    return run


@dataclass(frozen=True)
class Agreement:
    """How close a program is to the model."""

    frames: int  #: compared
    same_symbol: int  #: of these: frames with the same best symbol
    difference: float  #: largest, of any log-probability


@torch.no_grad()
def compare(program: Program, model: nn.Module) -> Agreement:
    """Compare both on batches of `SHAPES`, with NaN in the padding.

    Raises:
        ExportError: lengths differ, or a log-probability differs by more than `TOLERANCE`.
    """
    frames = same = 0
    largest = 0.0
    for features, feature_lengths in _batches(model.n_mels):
        log_probs, lengths = model(features, feature_lengths)
        ours, our_lengths = program(features, feature_lengths)
        shapes = f"on {tuple(features.shape)} features of lengths {feature_lengths.tolist()}"
        if not torch.equal(our_lengths, lengths):
            raise ExportError(
                f"output_lengths {our_lengths.tolist()}, not {lengths.tolist()} {shapes}"
            )
        valid = torch.arange(log_probs.size(1)) < lengths[:, None]
        log_probs, ours = log_probs[valid], ours[:, : log_probs.size(1)][valid]
        difference = (ours - log_probs).abs()
        # Not "any above": NaN is not above anything.
        if not (difference <= TOLERANCE * (1 + log_probs.abs())).all():
            raise ExportError(
                f"log_probs differ from the model's by up to {difference.max():.2g} {shapes}: "
                f"allowed is {TOLERANCE} * (1 + |log_prob|)"
            )
        frames += len(log_probs)
        same += int((ours.argmax(-1) == log_probs.argmax(-1)).sum())
        largest = max(largest, float(difference.max()))
    return Agreement(frames, same, largest)


def _batches(n_mels: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for batch, frames in SHAPES:
        features = torch.randn(batch, frames, n_mels, generator=generator)
        lengths = torch.randint(1, frames + 1, (batch,), generator=generator)
        lengths[0] = frames
        padding = torch.arange(frames) >= lengths[:, None]
        yield features.masked_fill(padding[:, :, None], torch.nan), lengths


def describe(recognizer: Recognizer, files: list[str]) -> dict:
    """The content of model.json, without the tokenizer."""
    symbols = recognizer.tokenizer.vocab_size
    return {
        "made_by": {"torch-fastguard": __version__, "torch": torch.__version__},
        "model": recognizer.config.model,
        "files": files,
        "inputs": {
            "features": f"float32 (batch, frames, {recognizer.model.n_mels}), frames >= 1",
            "feature_lengths": "int64 (batch,), 1 to frames; frames past them are ignored",
        },
        "outputs": {
            "log_probs": f"float32 (batch, ceil(frames / 4) + 1, {symbols}), natural logarithms",
            "output_lengths": "int64 (batch,), ceil(feature_lengths / 4), frames to be read",
        },
        "subsampling": 4,
        "blank_id": 0,
        "features": describe_features(recognizer.log_mel),
        "text": to_plain(recognizer.config.text),
    }


def describe_features(log_mel: LogMel) -> dict:
    """The parameters of :class:`LogMel`, enough to compute the same features elsewhere."""
    mel = log_mel.mel
    return {
        "sample_rate": log_mel.sample_rate,
        "window": "hann, periodic",
        "n_fft": mel.n_fft,
        "win_length": mel.win_length,
        "hop_length": mel.hop_length,
        "center": "n_fft / 2 zeros on either side",
        "power": mel.power,
        "n_mels": mel.n_mels,
        "f_min": mel.f_min,
        "f_max": mel.mel_scale.f_max,
        "mel_scale": mel.mel_scale.mel_scale,
        "mel_norm": mel.mel_scale.norm,
        "dynamic_range": log_mel.DYNAMIC_RANGE,
        "silence": log_mel.SILENCE,
        "normalization": log_mel.normalization,
        "min_deviation": log_mel.MIN_DEVIATION,
        "speech_range": log_mel.SPEECH_RANGE,
        "least": log_mel.LEAST,
        "recipe": [
            "energies (frames, n_mels): mel filters on |STFT|^power of mono samples in [-1, 1]",
            "floor = max(max(energies) / dynamic_range, silence)",
            *_NORMALIZATIONS[log_mel.normalization],
        ],
    }


_NORMALIZATIONS = {
    "speech": [
        "x = ln(max(energies, floor)); e = sum of energies over the bins, one for each frame",
        "s = x in the frames where e >= max(e) / speech_range; x = x - mean of s over its frames",
        "x = x / max(root of the mean of (s - mean of s)^2 over its frames, min_deviation)",
        "features = max(x, least)",
    ],
    "utterance": [
        "x = ln(max(energies, floor)); x = x - mean over the frames",
        "features = x / max(root of the mean of x^2 over the frames, min_deviation)",
    ],
    "level": ["features = log10(max(energies, floor) / (floor * dynamic_range)) / 2 + 2"],
}


def export(
    recognizer: Recognizer, folder: Path, formats: list[str], named: bool = True
) -> Iterator[str]:
    """Write the files of ``formats`` and model.json into ``folder``; yield a line about each file.

    Args:
        recognizer: what is exported.
        folder: is made if it does not exist.
        formats: of SUFFIXES.
        named: whether the user named the folder; only then it may be a link.

    Raises:
        MissingExtra: a package that a format needs is missing.
        ExportError: a file fails its check; an earlier file with its name is kept.
        OSError: the disk is full, or the folder is not writable.
    """
    _check_packages(formats)
    files.make_folder(folder, named)
    program = None
    for name in formats:
        path = folder / f"model{SUFFIXES[name]}"
        with files.replacing(path) as temporary:
            if name == "safetensors":
                result = _write_weights(temporary, recognizer)
            else:
                program = program or trace(recognizer.model)
                result = _write_program(temporary, name, program, recognizer.model)
            size = temporary.stat().st_size / 1e6
        yield f"{path}: {size:.1f} MB, {result}"
    path = folder / "model.json"
    description = describe(recognizer, [f"model{SUFFIXES[name]}" for name in formats])
    description["tokenizer"] = _write_tokenizer(folder, recognizer.tokenizer.to_dict())
    with files.replacing(path) as temporary:
        temporary.write_text(json.dumps(description, indent=2, ensure_ascii=False), "utf-8")
    yield f"{path}: symbols, features, shapes"


def _check_packages(formats: list[str]) -> None:
    missing = [p for f in formats for p in PACKAGES[f] if importlib.util.find_spec(p) is None]
    if missing:
        raise MissingExtra(f"{', '.join(missing)} missing (--format torch needs none)", "export")


def _write_weights(path: Path, recognizer: Recognizer) -> str:
    model = recognizer.model
    weights.save(path, model, recognizer.tokenizer.to_dict(), recognizer.config.to_dict())
    written, wanted = weights.load(path)["model"], model.state_dict()
    if written.keys() != wanted.keys() or not all(
        torch.equal(written[k], wanted[k]) for k in wanted
    ):
        raise ExportError(f"{path} does not have the weights that were written: check the disk")
    return f"{len(wanted)} tensors, equal bit for bit"


def _write_program(path: Path, name: str, program: ExportedProgram, model: nn.Module) -> str:
    save, load = {"torch": (save_torch, load_torch), "onnx": (save_onnx, load_onnx)}[name]
    save(path, program)
    try:
        found = compare(load(path), model)
    except ExportError as error:
        raise ExportError(f"the {name} program is wrong and not kept: {error}") from error
    return (
        f"log_probs differ from the model's by at most {found.difference:.2g}, "
        f"best symbol the same in {found.same_symbol} of {found.frames} frames"
    )


def _write_tokenizer(folder: Path, state: dict) -> dict:
    """``state`` for JSON; its SentencePiece model is written to tokenizer.model."""
    described = dict(state)
    for key, value in state.items():
        if isinstance(value, Tensor):
            with files.replacing(folder / "tokenizer.model") as temporary:
                temporary.write_bytes(bytes(value.tolist()))
            described[key] = "tokenizer.model"
    return described


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options of the command; wrong ones end the program with exit status 2."""
    parser = argparse.ArgumentParser(
        prog="python -m fastguard.export",
        description=__doc__.split("\n", 1)[1].strip(),
        epilog="example:\n  python -m fastguard.export runs/teacher --format onnx safetensors\n\n"
        "Exit status: 0 done, 1 failed, 2 wrong usage, 130 stopped by Ctrl-C.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "checkpoint", type=Path, help="a .pt or .safetensors file, or the folder of a run"
    )
    parser.add_argument(
        "--format",
        nargs="+",
        choices=SUFFIXES,
        default=list(SUFFIXES),
        metavar="FORMAT",
        help=f"of {', '.join(SUFFIXES)}; default: all",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="folder (default: exported, beside the checkpoint)",
    )
    return parser.parse_args(argv)


@terminal.command
def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 failed, 2 wrong usage, 130 stopped by Ctrl-C."""
    args = parse(argv)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it reports missing packages
    failures = checkpoint.CheckpointError, ExportError, OSError
    return exit_status(lambda: _export(args), *failures)


def _export(args: argparse.Namespace) -> None:
    path = checkpoint.best_of(args.checkpoint)
    recognizer = Recognizer.load(path)
    folder = args.output or path.parent / "exported"
    formats = list(dict.fromkeys(args.format))
    lines = export(recognizer, folder, formats, named=args.output is not None)
    for line in tqdm(lines, "exporting", len(formats) + 1, leave=False, disable=None):
        tqdm.write(line)
