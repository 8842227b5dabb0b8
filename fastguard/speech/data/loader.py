"""A loader of batches whose place can be saved, and the handling of its workers' signals."""

import os
import signal
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from threading import Thread, current_thread, main_thread

import torch
from torchdata.stateful_dataloader import StatefulDataLoader

from .batching import Batch, SpeechDataset, collate
from .sampler import BucketBatchSampler


def make_loader(
    dataset: SpeechDataset, sampler: BucketBatchSampler, num_workers: int = 0
) -> StatefulDataLoader:
    """A loader of :class:`Batch` whose ``state_dict()`` says which batch is next.

    The state is the sampler's after the batches that were yielded, without those that workers have
    prepared. So it fits a loader with any number of workers. ``load_state_dict`` raises ValueError
    if the sampler's settings differ. The state has only what ``torch.load(weights_only=True)``
    accepts.

    The death of a worker, and an error in one, raise when the next batch is requested, and nowhere
    else.

    Args:
        dataset: gives the items.
        sampler: gives the order.
        num_workers: processes that load; 0 loads in this process.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "'set_vital' is deprecated")  # torchdata 0.11 calls it
        return _Loader(
            dataset,
            batch_sampler=sampler,
            num_workers=num_workers,
            collate_fn=partial(collate, n_mels=dataset.log_mel.n_mels),
            worker_init_fn=_leave_the_end_to_the_parent,
            # Otherwise each pass would draw from the global generator, and a resumed run once more.
            generator=torch.Generator(),
        )


class _Loader(StatefulDataLoader):
    def __iter__(self) -> Iterator[Batch]:
        batches = super().__iter__()
        return _Pass(batches) if self.num_workers else batches

    def state_dict(self) -> dict:
        if self._iterator is None:  # torchdata would begin a pass and continue it in the next one
            return self.batch_sampler.state_dict()
        state = super().state_dict()
        if self.num_workers:
            state = state["_snapshot"]["_main_snapshot"]
        return state["_index_sampler_state"]

    def load_state_dict(self, state: dict) -> None:
        self.batch_sampler.load_state_dict(state)
        super().load_state_dict({})  # ends the current pass


class _Pass(Iterator[Batch]):
    """The batches of workers. If a worker was killed, torch raises in the handler of SIGCHLD, at
    any place in the training: in a forward pass, or while a state is written. Here the handler
    waits until the next batch is requested."""

    _waiting = False
    _handler: Callable | None = None  # torch's; there is one for all loaders

    def __init__(self, batches: Iterator[Batch]) -> None:
        self._batches = batches
        # Windows has no such signal, and a thread cannot set a handler: there torch finds dead
        # workers while it waits for a batch.
        if not hasattr(signal, "SIGCHLD") or current_thread() is not main_thread():
            return
        handler = signal.getsignal(signal.SIGCHLD)
        if callable(handler) and handler is not _Pass._on_death:
            _Pass._handler = handler
            signal.signal(signal.SIGCHLD, _Pass._on_death)

    def __next__(self) -> Batch:
        _Pass._waiting = True
        try:
            if _Pass._handler is not None:  # a worker may have died since the last batch
                _Pass._handler(signal.SIGCHLD, None)
            return next(self._batches)
        finally:
            _Pass._waiting = False

    @staticmethod
    def _on_death(number: int, frame: object) -> None:
        if _Pass._waiting and _Pass._handler is not None:
            _Pass._handler(number, frame)


def _leave_the_end_to_the_parent(worker: int) -> None:
    """Ignore Ctrl-C and a scheduler's SIGTERM in a worker: the parent ends the run, and then its
    workers. The parent's own SIGTERM must end a worker: multiprocessing sends it, and waits."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # elsewhere torch's handler ends a worker at any SIGTERM
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        Thread(target=_end_with_the_parents_sigterm, args=(os.getppid(),), daemon=True).start()


def _end_with_the_parents_sigterm(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
