"""ONNX programs in 8-bit integers, and whether they still recognise."""

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader

from fastguard.speech.data.batching import Batch
from fastguard.speech.data.utterances import Utterances
from fastguard.speech.training.data import evaluation_loader

from .evaluation import ErrorRates, evaluate
from .recognizer import Recognizer

#: Largest rise of the WER by 8-bit integers: one more wrong word in a hundred.
WER_LOSS = 0.01
#: Recordings from which the ranges of the activations are taken.
CALIBRATION = 64
_SHORTEST, _LONGEST = 0.001, 3600.0  # seconds; the longest bounds the memory


@dataclass(frozen=True)
class Losses:
    """Error rates of the same utterances in float32 and in 8-bit integers."""

    utterances: int
    float32: ErrorRates
    int8: ErrorRates

    @property
    def wer(self) -> float:
        """The rise of the WER; NaN if the references have no words."""
        return self.int8.wer - self.float32.wer


def quantize(source: Path, path: Path, recognizer: Recognizer, recordings: Utterances) -> None:
    """Write ``path``: the ONNX program ``source`` with weights and activations of matrix products
    and convolutions in 8-bit integers.

    Weights have a scale for each output channel. Each activation has one scale, from its least and
    largest value on the ``recordings`` (static quantization). Scales that are taken from each
    input (dynamic quantization) gave the same texts, but onnxruntime's convolutions with them are
    slower than in float32. Weights have seven bits, because processors without VNNI saturate sums
    of two products of eight bits: the WER that is measured here would not hold there.

    Args:
        source: inputs features and feature_lengths.
        path: is replaced.
        recognizer: has the features.
        recordings: at most CALIBRATION of them, evenly spaced, are used.
    """
    from onnxruntime.quantization import QuantType, quantize_static

    step = max(1, len(recordings) // CALIBRATION)
    loader = _one_by_one(recordings[::step][:CALIBRATION], recognizer)
    with _without_advice():
        quantize_static(
            source,
            path,
            _Reader(batch for batch in loader if len(batch)),
            op_types_to_quantize=["MatMul", "Conv"],
            per_channel=True,
            reduce_range=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )


def compare_texts(
    program: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    recognizer: Recognizer,
    utterances: Utterances,
) -> Losses:
    """Recognise ``utterances``, one at a time, by the recognizer and by the program."""

    def rates_of(run: Callable, progress: str) -> tuple[int, ErrorRates]:
        found = evaluate(
            lambda batch: run(batch.features, batch.feature_lengths),
            _one_by_one(utterances, recognizer),
            recognizer.tokenizer,
            progress=progress,
        )
        return len(found.rows), found.rates

    count, float32 = rates_of(recognizer, "evaluating float32")
    _, int8 = rates_of(program, "evaluating int8")
    return Losses(count, float32, int8)


def _one_by_one(utterances: Utterances, recognizer: Recognizer) -> DataLoader:
    return evaluation_loader(
        utterances,
        recognizer.log_mel,
        batch_size=1,
        min_duration=_SHORTEST,
        max_duration=_LONGEST,
    )


class _Reader:
    """onnxruntime's CalibrationDataReader, which it takes by its one method."""

    def __init__(self, batches: Iterator[Batch]) -> None:
        self._batches = batches

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self._batches, None)
        if batch is None:
            return None
        return {
            "features": batch.features.numpy(),
            "feature_lengths": batch.feature_lengths.numpy(),
        }


@contextlib.contextmanager
def _without_advice() -> Iterator[None]:
    """Drop the root logger's warnings "Please consider pre-processing": torch's exporter has done
    that."""

    def other(record: logging.LogRecord) -> bool:
        return "pre-processing" not in record.msg

    root = logging.getLogger()
    root.addFilter(other)
    try:
        yield
    finally:
        root.removeFilter(other)
