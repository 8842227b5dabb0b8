"""What a run's settings say about its data: corpus, tokenizer, features, and batches of them."""

import logging

from torchdata.stateful_dataloader import StatefulDataLoader

from .config import Config
from .parallel import Parallel
from .recognizer import features
from .speech.batching import BucketBatchSampler, SpeechDataset, make_loader
from .speech.corpora import Corpus, load_corpus
from .speech.features import Augment, LogMel, SpecAugment, SpeedPerturb
from .speech.models.ctc import CTCModel
from .speech.readers import CorpusError
from .speech.tokenizer import Tokenizer, build_tokenizer
from .speech.utterances import Utterances

logger = logging.getLogger(__name__)

EVALUATION_BATCH = 8  # utterances


class Data:
    """The corpus of a run, and loaders of its splits.

    Args:
        config: the run's settings.
        tokenizer: of a trained model; by default a new one for the training split.

    Raises:
        CorpusError: the corpus is absent, has nothing to train on, or no texts to learn as many
            tokens from as the settings ask for.
    """

    def __init__(self, config: Config, tokenizer: Tokenizer | None = None):
        self.config = config
        self.log_mel = features(config)
        corpus = load_corpus(
            config.data, max_duration=config.max_duration, seed=config.seed, check=config.check
        )
        self.tokenizer = tokenizer or self._new_tokenizer(corpus)
        self.corpus = corpus.drop_infeasible(self.tokenizer.encode, self._output_length)
        logger.info(self.corpus.summary())

    def _new_tokenizer(self, corpus: Corpus) -> Tokenizer:
        kind, vocab_size = self.config.tokenizer.kind, self.config.tokenizer.vocab_size
        texts = (utterance.text for utterance in corpus.split("train"))
        try:
            return build_tokenizer(kind, texts, vocab_size)
        except ValueError as error:
            raise CorpusError(f"no tokenizer of kind {kind}: {error}") from error

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

    def evaluation_loader(self, split: str, parallel: Parallel) -> StatefulDataLoader:
        """This process's share of a split, unperturbed."""
        return evaluation_loader(
            self.corpus.split(split),
            self.log_mel,
            max_duration=self.config.max_duration,
            num_workers=self.config.num_workers,
            rank=parallel.rank,
            world_size=parallel.world_size,
        )


def evaluation_loader(
    utterances: Utterances,
    log_mel: LogMel,
    *,
    batch_size: int = EVALUATION_BATCH,
    max_duration: float,
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> StatefulDataLoader:
    """Each utterance once, in batches of similar duration, the shortest first, without targets."""
    sampler = BucketBatchSampler(
        utterances.durations,
        batch_size=batch_size,
        shuffle=False,
        rank=rank,
        world_size=world_size,
    )
    dataset = SpeechDataset(utterances, None, log_mel, max_duration=max_duration)
    return make_loader(dataset, sampler, num_workers)
