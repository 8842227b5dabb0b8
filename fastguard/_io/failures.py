"""Describes any error in one line: the last message of a run or a command."""

import errno

import torch

_FROM_WORKER = "in DataLoader worker process"  # torch puts the worker's traceback into the message


def in_a_line(error: BaseException) -> str:
    """The cause of an error and, for a lack of memory, what to do.

    The type of the error is added unless its message was written for users.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        text = ""
    elif _FROM_WORKER in lines[0]:
        name, _, text = lines[-1].partition(": ")
        text = text if name.rpartition(".")[2] == type(error).__name__ else lines[-1]
    else:
        text = lines[0]
    if text.startswith("DataLoader worker"):  # which the kernel kills first if memory is short
        return f"{text.rstrip('.')}: if memory is the reason, use fewer --num-workers"
    if out_of_memory(error):
        said = f" ({text})" if text else ""
        return f"out of memory{said}: make batches smaller, or use fewer --num-workers"
    if isinstance(error, OSError) or type(error).__module__.partition(".")[0] == "fastguard":
        return text or type(error).__name__
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def out_of_memory(error: BaseException) -> bool:
    """Whether the error is that the machine, or its GPU, had too little memory."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(
        words in str(error) for words in ("can't allocate memory", "not enough memory")
    )
