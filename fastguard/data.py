"""What a run's settings say about its data: corpus, tokenizer, features, and batches of them."""

import logging

from torchdata.stateful_dataloader import StatefulDataLoader

from .config import Config
from .parallel import Parallel
from .recognizer import features
from .speech.batching import BucketBatchSampler, SpeechDataset, make_loader
from .speech.corpora import load_corpus
from .speech.features import Augment, SpecAugment, SpeedPerturb
from .speech.models.ctc import CTCModel
from .speech.tokenizer import Tokenizer, build_tokenizer

logger = logging.getLogger(__name__)

EVALUATION_BATCH = 8  # utterances


class Data:
    """The corpus of a run, and loaders of its splits.

    Args:
        config: the run's settings.
        tokenizer: of a trained model; by default a new one for the training split.

    Raises:
        CorpusError: the corpus is absent, or has nothing to train on.
    """

    def __init__(self, config: Config, tokenizer: Tokenizer | None = None):
        self.config = config
        self.log_mel = features(config)
        corpus = load_corpus(
            config.data, max_duration=config.max_duration, seed=config.seed, check=config.check
        )
        self.tokenizer = tokenizer or build_tokenizer(
            config.tokenizer.kind,
            (utterance.text for utterance in corpus.split("train")),
            config.tokenizer.vocab_size,
        )
        self.corpus = corpus.drop_infeasible(self.tokenizer.encode, self._output_length)
        logger.info(self.corpus.summary())

    def _output_length(self, seconds: float) -> int:
        return CTCModel.output_lengths(self.log_mel.num_frames_of(seconds))

    def train_loader(self, parallel: Parallel) -> tuple[BucketBatchSampler, StatefulDataLoader]:
        """Batches of the training split, shuffled, perturbed and masked; this process's share."""
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
        dataset = self._dataset("train", Augment(speed, masks))
        return sampler, make_loader(dataset, sampler, config.num_workers)

    def evaluation_loader(self, split: str, parallel: Parallel) -> StatefulDataLoader:
        """Batches of a split in the order of their durations, as they are; this process's share."""
        utterances = self.corpus.split(split)
        sampler = BucketBatchSampler(
            utterances.durations,
            batch_size=EVALUATION_BATCH,
            shuffle=False,
            rank=parallel.rank,
            world_size=parallel.world_size,
        )
        dataset = self._dataset(split)
        return make_loader(dataset, sampler, self.config.num_workers)

    def _dataset(self, split: str, augment: Augment | None = None) -> SpeechDataset:
        return SpeechDataset(
            self.corpus.split(split),
            self.tokenizer,
            self.log_mel,
            augment,
            self.config.seed,
            max_output_length=self._output_length,
            max_duration=self.config.max_duration,
        )
