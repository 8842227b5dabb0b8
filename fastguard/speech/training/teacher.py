"""The trained model that a student learns from."""

import torch

from fastguard.speech.recognition.recognizer import Recognizer
from fastguard.speech.storage import checkpoint

from .config import Config
from .run_folder import RunError


def load_teacher(config: Config, device: torch.device) -> Recognizer:
    """The model to learn from.

    Raises:
        RunError: it cannot be read, or has other features or texts than the student.
    """
    try:
        teacher = Recognizer.load(checkpoint.best_of(config.teacher), device)
    except checkpoint.CheckpointError as error:
        raise RunError(f"--teacher {error}") from error
    if teacher.config.features != config.features:
        raise RunError(
            f"--teacher {config.teacher} was trained on {teacher.config.features}, these settings "
            f"say {config.features}: give the same"
        )
    if teacher.config.text != config.text:
        raise RunError(
            f"--teacher {config.teacher} was trained on texts by {teacher.config.text}, these "
            f"settings say {config.text}: give the same"
        )
    return teacher
