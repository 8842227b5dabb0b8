"""The data of a run: its corpus, tokenizer, features and batches."""

import contextlib
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TextIO

from torchdata.stateful_dataloader import StatefulDataLoader

from fastguard._io.files import replacing
from fastguard.speech.data.batching import SpeechDataset
from fastguard.speech.data.corpora import Corpus, load_corpus
from fastguard.speech.data.features import Augment, LogMel, SpecAugment, SpeedPerturb
from fastguard.speech.data.loader import make_loader
from fastguard.speech.data.readers import CorpusError
from fastguard.speech.data.sampler import BucketBatchSampler
from fastguard.speech.data.tokenizer import Tokenizer, build_tokenizer
from fastguard.speech.data.utterances import Utterances
from fastguard.speech.models.ctc import CTCModel
from fastguard.speech.recognition.recognizer import features

from .config import Config
from .parallel import Parallel
from .ranking import FEW

logger = logging.getLogger(__name__)

EVALUATION_BATCH = 8  # utterances


class Data:
    """The corpus of a run, and loaders of its splits.

    Args:
        config: the run's settings.
        tokenizer: of a trained model; by default a new one for the training split.
        preferred: is taken in place of a new tokenizer if it has a token for every text.
        folder: gets left_out.jsonl, the rows that are not used, and changed_labels.jsonl, the texts
            that normalising changed.

    Raises:
        CorpusError: the corpus is missing, has nothing to train on, or has too few texts for the
            number of tokens in the settings.
    """

    def __init__(
        self,
        config: Config,
        tokenizer: Tokenizer | None = None,
        folder: Path | None = None,
        preferred: Tokenizer | None = None,
    ):
        self.config = config
        self.log_mel = features(config)
        with listing(folder, "changed_labels.jsonl") as changed:
            corpus = load_corpus(
                config.data,
                max_duration=config.max_duration,
                seed=config.seed,
                check=config.check,
                channel=config.channel,
                rules=config.text,
                changed=changed,
            )
        if tokenizer is None:
            self.tokenizer, self.corpus = self._new_tokenizer(corpus, preferred)
        else:
            self.tokenizer = tokenizer
            self.corpus = corpus.drop_infeasible(tokenizer.encode, self._output_length)
        logger.info(self.corpus.summary())
        with listing(folder, "left_out.jsonl") as left_out:
            if left_out is not None:
                self.corpus.write_left_out(left_out)

    def _new_tokenizer(
        self, corpus: Corpus, preferred: Tokenizer | None
    ) -> tuple[Tokenizer, Corpus]:
        """A tokenizer for the training rows that CTC can align, and the corpus with these alone:
        rows that are left out must not shape the vocabulary."""
        kind, vocab_size = self.config.tokenizer.kind, self.config.tokenizer.vocab_size
        if kind == "char":
            corpus = corpus.drop_infeasible(str, self._output_length)
        if preferred is not None and _encodes(preferred, corpus.split("train").texts()):
            return preferred, corpus.drop_infeasible(preferred.encode, self._output_length)
        while True:
            try:
                texts = corpus.split("train").texts()
                tokenizer = build_tokenizer(kind, texts, vocab_size)
            except ValueError as error:
                raise CorpusError(f"no tokenizer of kind {kind}: {error}") from error
            left = corpus.drop_infeasible(tokenizer.encode, self._output_length)
            if len(left.utterances) == len(corpus.utterances):
                return tokenizer, left
            corpus = left  # which has other pieces

    def _output_length(self, seconds: float) -> int:
        return CTCModel.output_lengths(self.log_mel.num_frames_of(seconds))

    def train_loader(self, parallel: Parallel) -> tuple[BucketBatchSampler, StatefulDataLoader]:
        """This process's share of the training split: shuffled and augmented batches."""
        config, utterances = self.config, self.corpus.split("train")
        augment = config.augment
        masks = SpecAugment(
            augment.freq_masks, augment.freq_width, augment.time_masks, augment.time_ratio
        )
        speed = SpeedPerturb(augment.speeds) if augment.speeds else None
        by_duration = config.batch_duration is not None
        sampler = BucketBatchSampler(
            utterances.durations,
            batch_size=None if by_duration else config.batch_size,
            batch_duration=config.batch_duration,
            seed=config.seed,
            rank=parallel.rank,
            world_size=parallel.world_size,
        )
        dataset = SpeechDataset(
            utterances,
            self.tokenizer,
            self.log_mel,
            Augment(speed, masks, config.consistency.weight > 0, augment.warmup),
            config.seed,
            max_output_length=self._output_length,
            max_duration=config.max_duration,
        )
        return sampler, make_loader(dataset, sampler, config.num_workers)

    @property
    def evaluation_split(self) -> str:
        """The split whose error rates are measured: "dev", or "train" where there is no dev."""
        return "dev" if self.corpus.split("dev") else "train"

    def warn_of_evaluation(self) -> None:
        """Log a warning where the error rates say little."""
        if self.evaluation_split == "train":
            logger.warning(
                "%s has no dev split: the error rates are those of the training split",
                self.config.data,
            )
            return
        dev = self.corpus.split("dev")
        if len(dev) < FEW:
            logger.warning(
                "best.pt is chosen by the CER of %d dev utterances with %d words, because fewer "
                "than %d utterances are too few for the WER: give more rows the split dev",
                len(dev),
                sum(len(text.split()) for text in dev.texts()),
                FEW,
            )

    def evaluation_loader(self, split: str, parallel: Parallel) -> StatefulDataLoader:
        """This process's share of a split, not augmented."""
        return evaluation_loader(
            self.corpus.split(split),
            self.log_mel,
            max_duration=self.config.max_duration,
            num_workers=self.config.num_workers,
            rank=parallel.rank,
            world_size=parallel.world_size,
        )


def _encodes(tokenizer: Tokenizer, texts: Iterable[str]) -> bool:
    try:
        for text in texts:
            tokenizer.encode(text)
    except ValueError:
        return False
    return True


@contextlib.contextmanager
def listing(folder: Path | None, name: str) -> Iterator[TextIO | None]:
    """A new text file in a folder, written whole or not at all; None without a folder.

    Raises OSError.
    """
    if folder is None:
        yield None
        return
    with replacing(folder / name) as path, path.open("w", encoding="utf-8") as file:
        yield file


def evaluation_loader(
    utterances: Utterances,
    log_mel: LogMel,
    *,
    batch_size: int = EVALUATION_BATCH,
    batch_duration: float | None = None,
    min_duration: float = 0.1,
    max_duration: float,
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> StatefulDataLoader:
    """Each utterance once, in batches of similar duration, the shortest first, without targets.

    Args:
        utterances: of a split.
        log_mel: the features.
        batch_size: utterances per batch.
        batch_duration: in seconds; replaces ``batch_size``, as in BucketBatchSampler.
        min_duration, max_duration: in seconds; other recordings are rejected.
        num_workers: processes that load.
        rank, world_size: of this process, and the number of processes.
    """
    sampler = BucketBatchSampler(
        utterances.durations,
        batch_size=None if batch_duration else batch_size,
        batch_duration=batch_duration,
        shuffle=False,
        rank=rank,
        world_size=world_size,
    )
    dataset = SpeechDataset(
        utterances, None, log_mel, min_duration=min_duration, max_duration=max_duration
    )
    return make_loader(dataset, sampler, num_workers)
