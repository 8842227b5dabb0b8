"""The models that bench/stability.py trains, each with its data, on one thread.

Batches are drawn from their number, so that every recipe sees the same ones. No model has dropout:
a run without the faulty batches then takes the same steps on the others.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pydoc_data.topics import topics
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastguard.speech.models import build_model

HELD_OUT = (10_000, 10_001)  # numbers of the batches that nobody trains on


class Batch(NamedTuple):
    x: Tensor
    target: Tensor
    #: Of speech: valid frames of each utterance, and symbols of its target.
    lengths: Tensor | None = None
    target_lengths: Tensor | None = None


@dataclass(frozen=True)
class Patient:
    name: str
    #: What it is, with its size; a row of docs/results/stability.md.
    says: str
    make: Callable[[], nn.Module]
    batch: Callable[[int], Batch]
    loss: Callable[[nn.Module, Batch], Tensor]
    lr: float
    #: What a fault or a setting can need.
    has: frozenset[str]
    steps: int = 64
    #: The faulty batches by number. By the first, guards have seen the norms of 24 good steps.
    bad: tuple[int, ...] = (24, 34, 44)
    #: The recipes and faults that are run where all would take too long; empty for all.
    recipes: frozenset[str] = frozenset()
    faults: frozenset[str] = frozenset()
    #: Whether each loss and norm is kept.
    curves: bool = False


def generator(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


# --- speech ---------------------------------------------------------------------------------------

SYMBOLS, MELS = 29, 20
FRAMES = 8  # of each symbol of the target; the models keep a frame of four
SHORT, LONG = 3, 7  # symbols of the shortest target, and one more than those of the longest


@functools.cache
def sounds(mels: int) -> Tensor:
    """(SYMBOLS, mels): the frame that stands for each symbol."""
    return torch.randn(SYMBOLS, mels, generator=generator(0))


def speech(number: int, size: int, mels: int = MELS, scale: float = 1.0) -> Batch:
    """Utterances whose symbols are FRAMES frames each, in noise; 0 is the blank of CTC."""
    drawn = generator(number)
    counts = torch.randint(SHORT, LONG, (size,), generator=drawn)
    target = torch.randint(1, SYMBOLS, (size, LONG - 1), generator=drawn)
    x = sounds(mels)[target].repeat_interleave(FRAMES, dim=1)
    x = (x + 0.3 * torch.randn(x.shape, generator=drawn)) * scale
    return Batch(x, target, counts * FRAMES, counts)


def ctc(model: nn.Module, batch: Batch) -> Tensor:
    """torch's `mean`: of each utterance's loss by the symbols of its target."""
    log_probs, lengths = model(batch.x, batch.lengths)
    return F.ctc_loss(
        log_probs.transpose(0, 1).float(), batch.target, lengths, batch.target_lengths
    )


class Deep(nn.Module):
    """The model of the log that began this project: no norm on a branch but in its convolutions.

    Two strided convolutions, then blocks of three residual convolutions with BatchNorm, multi-head
    attention and a feed-forward layer, each added to its input as it is, and a head.
    """

    def __init__(self, width: int, mels: int, blocks: int = 12, heads: int = 4):
        super().__init__()
        self.front1 = nn.Conv1d(mels, width, 3, stride=2, padding=1)
        self.front2 = nn.Conv1d(width, width, 3, stride=2, padding=1)
        self.blocks = nn.ModuleList(DeepBlock(width, heads) for _ in range(blocks))
        self.head = nn.Linear(width, SYMBOLS)

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        x = self.front2(F.relu(self.front1(x.transpose(1, 2)))).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.head(x).log_softmax(-1, dtype=torch.float32), (lengths + 3) // 4


class DeepBlock(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.convolutions = nn.ModuleList(
            nn.Sequential(nn.Conv1d(width, width, 3, padding=1), nn.BatchNorm1d(width), nn.ReLU())
            for _ in range(3)
        )
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.feed_forward = nn.Sequential(
            nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        for convolution in self.convolutions:
            x = x + convolution(x.transpose(1, 2)).transpose(1, 2)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return x + self.feed_forward(x)


# --- text, images, waves --------------------------------------------------------------------------

CONTEXT = 32


@functools.cache
def text() -> Tensor:
    """Python's own manual as ASCII: the pages of `help()`, which are in its standard library."""
    pages = "".join(topics[name] for name in sorted(topics))
    return torch.tensor(list(pages.encode("ascii", "replace")), dtype=torch.int64)


def characters(number: int) -> Batch:
    starts = torch.randint(0, len(text()) - CONTEXT - 1, (8, 1), generator=generator(number))
    windows = text()[starts + torch.arange(CONTEXT + 1)]
    return Batch(windows[:, :-1], windows[:, 1:])


class GPT(nn.Module):
    def __init__(self, width: int = 48, layers: int = 2, heads: int = 4):
        super().__init__()
        self.symbols = nn.Embedding(128, width)
        self.places = nn.Embedding(CONTEXT, width)
        self.blocks = nn.ModuleList(PreNormBlock(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 128)
        ahead = torch.ones(CONTEXT, CONTEXT, dtype=torch.bool).triu(1)
        self.register_buffer("ahead", ahead, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.symbols(x) + self.places.weight
        for block in self.blocks:
            x = block(x, self.ahead)
        return self.head(self.norm(x))


class PreNormBlock(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.feed_forward = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.norm1(x)
        x = x + self.attention(y, y, y, attn_mask=mask, need_weights=False)[0]
        return x + self.feed_forward(self.norm2(x))


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch.x).float().flatten(0, -2), batch.target.flatten())


SIDE, PATCH = 16, 4
#: The lit segments of each digit: top, two above, middle, two below, bottom.
SEGMENTS = [
    "1110111",
    "0010010",
    "1011101",
    "1011011",
    "0111010",
    "1101011",
    "1101111",
    "1010010",
    "1111111",
    "1111011",
]


@functools.cache
def digits() -> Tensor:
    """(10, 11, 7): the digits of a display with seven segments."""
    drawn = torch.zeros(10, 11, 7)
    places = [
        (slice(0, 1), slice(1, 6)),
        (slice(1, 5), slice(0, 1)),
        (slice(1, 5), slice(6, 7)),
        (slice(5, 6), slice(1, 6)),
        (slice(6, 10), slice(0, 1)),
        (slice(6, 10), slice(6, 7)),
        (slice(10, 11), slice(1, 6)),
    ]
    for digit, lit in enumerate(SEGMENTS):
        for on, (rows, columns) in zip(lit, places, strict=True):
            drawn[digit, rows, columns] = float(on)
    return drawn


def images(number: int) -> Batch:
    """Digits at drawn places, in noise."""
    drawn = generator(number)
    target = torch.randint(0, 10, (16,), generator=drawn)
    x = 0.3 * torch.randn(16, SIDE, SIDE, generator=drawn)
    rows = torch.randint(0, SIDE - 10, (16,), generator=drawn).tolist()
    columns = torch.randint(0, SIDE - 6, (16,), generator=drawn).tolist()
    for i, (row, column) in enumerate(zip(rows, columns, strict=True)):
        x[i, row : row + 11, column : column + 7] += digits()[target[i]]
    return Batch(x, target)


class ViT(nn.Module):
    def __init__(self, width: int = 48, layers: int = 2, heads: int = 4):
        super().__init__()
        self.patches = nn.Conv2d(1, width, PATCH, stride=PATCH)
        self.places = nn.Parameter(0.02 * torch.randn((SIDE // PATCH) ** 2, width))
        self.blocks = nn.ModuleList(PreNormBlock(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x[:, None]).flatten(2).transpose(1, 2) + self.places
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


def waves(number: int) -> Batch:
    """The sum of two waves of drawn lengths, and the same one step later."""
    drawn = generator(number)
    length, phase = 4 + 12 * torch.rand(16, 2, generator=drawn), torch.rand(16, 2, generator=drawn)
    time = torch.arange(CONTEXT + 1)[:, None]
    x = torch.sin(2 * math.pi * (time / length[:, None] + phase[:, None])).sum(-1, keepdim=True)
    return Batch(x[:, :-1], x[:, 1:])


class Recurrent(nn.Module):
    def __init__(self, width: int = 48):
        super().__init__()
        self.lstm = nn.LSTM(1, width, num_layers=2, batch_first=True)
        self.head = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0])


def squared_error(model: nn.Module, batch: Batch) -> Tensor:
    return F.mse_loss(model(batch.x).float(), batch.target)


# --- all of them ----------------------------------------------------------------------------------


def teacher() -> nn.Module:
    return build_model(
        "teacher",
        n_mels=MELS,
        d_model=48,
        num_heads=4,
        num_blocks=3,
        dropout=0.0,
        attention_clamp=None,
    )


def baseline() -> nn.Module:
    return build_model("baseline", n_mels=MELS, channels=48, num_layers=4, dropout=0.0)


SPEECH = frozenset({"ctc", "real input", "batch norm", "conv", "fp16"})

PATIENTS = {
    patient.name: patient
    for patient in (
        Patient(
            "teacher",
            "`fastguard.speech`'s teacher, 3 blocks of width 48, batches of 2 utterances",
            teacher,
            functools.partial(speech, size=2),
            ctc,
            lr=1e-3,
            has=SPEECH | {"attention"},
        ),
        Patient(
            "baseline",
            "`fastguard.speech`'s baseline, 4 layers of width 48, batches of 4 utterances",
            baseline,
            functools.partial(speech, size=4),
            ctc,
            lr=1e-3,
            has=SPEECH,
        ),
        Patient(
            "deep",
            "the model of the log at a width of 32: 12 blocks without normalisation on their "
            "branches, batches of 2 utterances",
            functools.partial(Deep, 32, MELS),
            functools.partial(speech, size=2),
            ctc,
            lr=1e-4,
            has=SPEECH | {"attention"},
        ),
        Patient(
            "deep 54 M",
            "the same at a width of 512 with 80 mels, 54.5 M parameters, and few steps",
            functools.partial(Deep, 512, 80),
            functools.partial(speech, size=2, mels=80),
            ctc,
            lr=1e-4,
            has=SPEECH | {"attention"},
            steps=12,
            bad=(8,),
            recipes=frozenset(
                {"before", "clip, look, skip", "stable, literal", "stable", "guarded"}
            ),
            faults=frozenset({"none", "infeasible", "nan input", "fp16"}),
        ),
        Patient(
            "deep, 200 steps",
            "the same as deep, for the picture of the README",
            functools.partial(Deep, 32, MELS),
            functools.partial(speech, size=2),
            ctc,
            lr=1e-4,
            has=SPEECH | {"attention"},
            steps=200,
            bad=(40, 80, 120, 160),
            recipes=frozenset({"before", "before, guarded"}),
            faults=frozenset({"in turns"}),
            curves=True,
        ),
        Patient(
            "gpt",
            "2 blocks of width 48 on the characters of Python's manual (`pydoc_data.topics`), "
            "batches of 8 x 32",
            GPT,
            characters,
            cross_entropy,
            lr=1e-3,
            has=frozenset({"attention", "fp16"}),
        ),
        Patient(
            "vit",
            "2 blocks of width 48 on generated images of digits, batches of 16",
            ViT,
            images,
            cross_entropy,
            lr=1e-3,
            has=frozenset({"real input", "attention", "conv", "fp16"}),
        ),
        Patient(
            "lstm",
            "2 layers of width 48 that predict the next value of a wave, batches of 16 x 32",
            Recurrent,
            waves,
            squared_error,
            lr=1e-2,
            has=frozenset({"real input"}),
        ),
    )
}
