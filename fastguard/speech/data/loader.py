"""A loader of batches whose place can be saved, and the signals of its worker processes."""

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
    """A loader of :class:`Batch` whose ``state_dict()`` tells which batch comes next.

    The state is the sampler's, of the batches that were given out, not of those that workers
    prepare ahead; so it fits a loader with any number of workers, and ``load_state_dict`` raises
    ValueError at once where the sampler's settings differ.  It holds only what
    ``torch.load(weights_only=True)`` accepts.

    A worker that dies, and an error in one, raise where a batch is asked for, and nowhere else.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "'set_vital' is deprecated")  # torchdata 0.11 calls it
        return _Loader(
            dataset,
            batch_sampler=sampler,
            num_workers=num_workers,
            collate_fn=partial(collate, n_mels=dataset.log_mel.n_mels),
            worker_init_fn=_leave_the_end_to_the_parent,
            # Its own, or each pass would draw from the global one: a resumed run once more.
            generator=torch.Generator(),
        )


class _Loader(StatefulDataLoader):
    def __iter__(self) -> Iterator[Batch]:
        batches = super().__iter__()
        return _Pass(batches) if self.num_workers else batches

    def state_dict(self) -> dict:
        if self._iterator is None:  # torchdata would begin a pass, and the next one go on with it
            return self.batch_sampler.state_dict()
        state = super().state_dict()
        if self.num_workers:
            state = state["_snapshot"]["_main_snapshot"]
        return state["_index_sampler_state"]

    def load_state_dict(self, state: dict) -> None:
        self.batch_sampler.load_state_dict(state)
        super().load_state_dict({})  # drops the pass that is under way


class _Pass(Iterator[Batch]):
    """The batches of workers.  torch raises for one that was killed in the handler of SIGCHLD:
    wherever the training is by then, in a forward pass, or in the writing of a state.  Here the
    handler waits until the next batch is asked for."""

    _waiting = False
    _handler: Callable | None = None  # torch's; there is one for all loaders

    def __init__(self, batches: Iterator[Batch]) -> None:
        self._batches = batches
        # Windows has no such signal, and a thread can set no handler: there torch finds the dead
        # where it waits for a batch.
        if not hasattr(signal, "SIGCHLD") or current_thread() is not main_thread():
            return
        handler = signal.getsignal(signal.SIGCHLD)
        if callable(handler) and handler is not _Pass._on_death:
            _Pass._handler = handler
            signal.signal(signal.SIGCHLD, _Pass._on_death)

    def __next__(self) -> Batch:
        _Pass._waiting = True
        try:
            if _Pass._handler is not None:  # one may have died since the last batch
                _Pass._handler(signal.SIGCHLD, None)
            return next(self._batches)
        finally:
            _Pass._waiting = False

    @staticmethod
    def _on_death(number: int, frame: object) -> None:
        if _Pass._waiting and _Pass._handler is not None:
            _Pass._handler(number, frame)


def _leave_the_end_to_the_parent(worker: int) -> None:
    """Ctrl-C, and the SIGTERM of a scheduler, reach the workers too; the parent ends the run, and
    them, in order.  Its own SIGTERM must end them: multiprocessing sends it, and then waits."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # elsewhere torch's handler ends them at any SIGTERM
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        Thread(target=_end_with_the_parents_sigterm, args=(os.getppid(),), daemon=True).start()


def _end_with_the_parents_sigterm(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
