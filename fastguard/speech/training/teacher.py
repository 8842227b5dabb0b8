"""Loads the trained model that a student learns from."""

import torch

from fastguard.speech.recognition.recognizer import Recognizer
from fastguard.speech.storage import checkpoint

from .config import Config
from .run_folder import RunError


def load_teacher(config: Config, device: torch.device) -> Recognizer:
    """The model of ``--teacher``, on ``device``.

    Raises:
        RunError: the model cannot be read, or its features or text rules are not those of the
            settings.
    """
    try:
        teacher = Recognizer.load(checkpoint.best_of(config.teacher), device)
    except checkpoint.CheckpointError as error:
        raise RunError(f"--teacher {error}") from error
    if teacher.config.features != config.features:
        raise RunError(
            f"--teacher {config.teacher} was trained on {teacher.config.features}, these settings "
            f"say {config.features}: use the same"
        )
    if teacher.config.text != config.text:
        raise RunError(
            f"--teacher {config.teacher} was trained on texts by {teacher.config.text}, these "
            f"settings say {config.text}: use the same"
        )
    return teacher
