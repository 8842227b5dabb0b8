"""Run folders, states and evaluations for tests."""

import torch

from fastguard.speech.recognition.evaluation import Evaluation, score
from fastguard.speech.training.config import Config
from fastguard.speech.training.ranking import FEW
from fastguard.speech.training.run_folder import RunFolder


def state(step, value=1.0, loss=1.0):
    return {
        "model": {"w": torch.full((4,), value)},
        "config": Config().to_dict(),
        "tokenizer": {},
        "optimizer": {},
        "guard": {},
        "loader": [],
        "random": [],
        "step": step,
        "loss": loss,
    }


def of_wer(wer, utterances=FEW):
    """An evaluation of equal utterances of two seconds with this error rate in tenths."""
    right = round(10 * (1 - wer))
    words, recognised = " ".join("abcdefghij"), " ".join("abcdefghij"[:right])
    return Evaluation(
        [score(f"utt{i}", words, recognised, duration=2.0) for i in range(utterances)]
    )


def begun(path, **settings):
    folder = RunFolder(path, Config(**settings))
    folder.begin()
    return folder


def names(folder):
    return sorted(p.name for p in folder.path.rglob("*.pt"))
