"""``python -m tests.faults FAULT ...``: fastguard.train with a fault in it.

FAULT is WHAT:WHERE:RANK. WHERE is load (of tone2.wav), step (the third one, after its forward
pass), evaluation or save (of the second state). WHAT is killed, memory or error. Under torchrun the
fault happens only in the process with that RANK. A fault of load happens in a worker, if there are
workers.
"""

import os
import signal
import sys

from fastguard.speech.cli import train
from fastguard.speech.data import batching
from fastguard.speech.storage import checkpoint
from fastguard.speech.training.learner import Learner
from fastguard.speech.training.parallel import leave
from fastguard.speech.training.trainer import Trainer

WHERE = {
    "load": (batching, "load_audio"),
    "step": (Learner, "loss"),
    "evaluation": (Trainer, "evaluate"),
    "save": (checkpoint, "save"),
}


def happen(what: str) -> None:
    if what == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    raise MemoryError if what == "memory" else ZeroDivisionError("a fault of the program")


def put_in(patch, what: str, where: str) -> None:
    """Replace a function by one with the fault; ``patch`` works like pytest's setattr."""
    place, name = WHERE[where]
    whole = getattr(place, name)
    calls = []

    def faulty(*args, **options):
        calls.append(args)
        if where == "load":
            if "tone2.wav" in str(args[0]):
                happen(what)
        elif where == "step":
            loss = whole(*args, **options)  # the forward pass changes BatchNorm's statistics
            if len(calls) == 3:
                happen(what)
            return loss
        elif where == "evaluation" or len(calls) == 2:
            happen(what)
        return whole(*args, **options)

    patch(place, name, faulty)


if __name__ == "__main__":
    what, where, rank = sys.argv[1].split(":")
    if os.environ.get("RANK", "0") == rank:
        put_in(setattr, what, where)
    leave(train.main(sys.argv[2:]))
