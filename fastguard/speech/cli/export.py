"""``python -m fastguard.export``: a checkpoint for use without fastguard.

Writes model.safetensors (the weights; fastguard reads it like a checkpoint),
model.pt2 (torch.export; runs with torch alone), model.onnx (standard operators
only) and model.json (features, windows, symbols: what a consumer needs besides
the model; model.onnx has the same in its metadata). The programs take batches
of any size and length. Each file is checked before it gets its name: the
weights bit for bit, the programs against the model on batches of several sizes.

With --format int8 also model.int8.onnx, model.onnx in 8-bit integers: a quarter
of the size. Its ranges come from the training split. It is checked by its WER
on the dev split, and not kept if it loses too much.
"""

import argparse
import importlib.util
import io
import json
import logging
import math
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from tqdm import tqdm

from fastguard._command import exit_status
from fastguard._extras import MissingExtra
from fastguard._io import files, terminal
from fastguard.speech.data.corpora import SPLITS
from fastguard.speech.data.readers import CorpusError
from fastguard.speech.data.specs import SPECS
from fastguard.speech.recognition import int8
from fastguard.speech.recognition.description import METADATA_KEY, PIECES_FILE, describe
from fastguard.speech.recognition.recognizer import Recognizer
from fastguard.speech.storage import checkpoint, weights

from .evaluate import load_split

#: Maps features and feature_lengths to log_probs and output_lengths.
Program = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

PACKAGES = {
    "safetensors": ["safetensors"],
    "torch": [],
    "onnx": ["onnx", "onnxscript", "onnxruntime"],
    "int8": ["onnx", "onnxscript", "onnxruntime"],
}
SUFFIXES = {"safetensors": ".safetensors", "torch": ".pt2", "onnx": ".onnx", "int8": ".int8.onnx"}
DEFAULT_FORMATS = "safetensors", "torch", "onnx"  # int8 needs the corpus

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


def add_metadata(path: Path, description: dict) -> None:
    """Write ``description`` into the metadata of a .onnx file, and remove what torch says of the
    nodes' origin: it holds lines and paths of this machine's source files."""
    import onnx

    model = onnx.load(path)
    for node in model.graph.node:
        node.ClearField("metadata_props")
    text = json.dumps(description, ensure_ascii=False)
    onnx.helper.set_model_props(model, {METADATA_KEY: text})
    onnx.save(model, path)


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


@dataclass(frozen=True)
class Check:
    """On what a program in 8-bit integers is checked.

    Attributes:
        data: spec of the corpus; None for that of the training.
        split: of SPLITS, or "all".
        wer_loss: largest rise of the WER.
    """

    data: str | None = None
    split: str = "dev"
    wer_loss: float = int8.WER_LOSS


def export(
    recognizer: Recognizer,
    folder: Path,
    formats: list[str],
    named: bool = True,
    check: Check | None = None,
) -> Iterator[str]:
    """Write the files of ``formats`` and model.json into ``folder``; yield a line about each file.

    Args:
        recognizer: what is exported.
        folder: is made if it does not exist.
        formats: of SUFFIXES.
        named: whether the user named the folder; only then it may be a link.
        check: of the format int8; default: Check().

    Raises:
        MissingExtra: a package that a format needs is missing.
        ExportError: a file fails its check; an earlier file with its name is kept.
        CorpusError: int8 has no recordings to be checked on.
        OSError: the disk is full, or the folder is not writable.
    """
    _check_packages(formats)
    files.make_folder(folder, named)
    description = describe(recognizer, [f"model{SUFFIXES[name]}" for name in formats])
    program = None
    for name in formats:
        path = folder / f"model{SUFFIXES[name]}"
        with files.replacing(path) as temporary:
            if name == "safetensors":
                result = _write_weights(temporary, recognizer)
            else:
                program = program or trace(recognizer.model)
                if name == "int8":
                    result = _write_int8(temporary, program, recognizer, check or Check())
                else:
                    result = _write_program(temporary, name, program, recognizer.model)
            if path.suffix == ".onnx":
                add_metadata(temporary, description)
            size = temporary.stat().st_size / 1e6
        yield f"{path}: {size:.1f} MB, {result}"
    _write_pieces(folder, recognizer.tokenizer.to_dict())
    path = folder / "model.json"
    files.write_text(path, json.dumps(description, indent=2, ensure_ascii=False))
    yield f"{path}: features, windows, symbols, shapes"


def _check_packages(formats: list[str]) -> None:
    needed = dict.fromkeys(package for name in formats for package in PACKAGES[name])
    if missing := [package for package in needed if importlib.util.find_spec(package) is None]:
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


def _write_int8(path: Path, program: ExportedProgram, recognizer: Recognizer, check: Check) -> str:
    corpus = load_split(check.data or recognizer.config.data, check.split, recognizer)
    checked = corpus.utterances if check.split == "all" else corpus.split(check.split)
    with tempfile.TemporaryDirectory() as folder:
        float32 = Path(folder, "model.onnx")
        save_onnx(float32, program)
        int8.quantize(float32, path, recognizer, corpus.split("train") or checked)
    found = int8.compare_texts(load_onnx(path), recognizer, checked)
    rates = (
        f"WER {found.int8.wer:.4f}, {found.float32.wer:.4f} in float32, on {found.utterances} "
        f"utterances of {found.float32.words} words"
    )
    if not found.wer <= check.wer_loss:  # also NaN
        raise ExportError(
            f"the int8 program is not kept: {rates}, allowed is a loss of {check.wer_loss:g}: use "
            "model.onnx, or give a larger --wer-loss"
        )
    return rates


def _write_pieces(folder: Path, state: dict) -> None:
    """Write the model of a SentencePiece tokenizer beside model.json."""
    if isinstance(model := state.get("model"), Tensor):
        with files.replacing(folder / PIECES_FILE) as temporary:
            temporary.write_bytes(bytes(model.tolist()))


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
        default=list(DEFAULT_FORMATS),
        metavar="FORMAT",
        help=f"of {', '.join(SUFFIXES)}; default: {' '.join(DEFAULT_FORMATS)}",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="folder (default: exported, beside the checkpoint)",
    )
    group = parser.add_argument_group("check of --format int8")
    group.add_argument(
        "--data", metavar="SPEC", help=f"recordings with texts: {SPECS} (default: as in training)"
    )
    group.add_argument(
        "--split", choices=(*SPLITS, "all"), help=f"split to recognise (default: {Check.split})"
    )
    group.add_argument(
        "--wer-loss",
        type=float,
        metavar="X",
        help="largest rise of the WER by 8-bit integers; 0.01 is one more wrong word in a "
        f"hundred (default: {Check.wer_loss})",
    )
    args = parser.parse_args(argv)
    for name in ("data", "split", "wer_loss"):
        if getattr(args, name) is not None and "int8" not in args.format:
            parser.error(f"--{name.replace('_', '-')} needs --format int8")
    if args.wer_loss is not None and not 0 <= args.wer_loss < math.inf:
        parser.error(f"--wer-loss must be 0 or more and finite, got {args.wer_loss}")
    return args


@terminal.command
def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 failed, 2 wrong usage, 130 stopped by Ctrl-C."""
    args = parse(argv)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it reports missing packages
    logging.basicConfig(format="%(levelname)s - %(message)s")
    failures = checkpoint.CheckpointError, CorpusError, ExportError, OSError
    return exit_status(lambda: _export(args), *failures)


def _export(args: argparse.Namespace) -> None:
    path = checkpoint.best_of(args.checkpoint)
    recognizer = Recognizer.load(path)
    folder = args.output or path.parent / "exported"
    formats = list(dict.fromkeys(args.format))
    given = {n: getattr(args, n) for n in ("data", "split", "wer_loss")}
    check = Check(**{name: value for name, value in given.items() if value is not None})
    lines = export(recognizer, folder, formats, args.output is not None, check)
    for line in tqdm(lines, "exporting", len(formats) + 1, leave=False, disable=None):
        tqdm.write(line)
