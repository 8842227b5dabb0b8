"""A trainer on recordings of tones."""

import pytest

from fastguard.speech.training.options import parse
from fastguard.speech.training.parallel import Parallel
from fastguard.speech.training.run_folder import RunFolder
from fastguard.speech.training.trainer import Trainer
from tests.recordings import tones


@pytest.fixture
def make(tmp_path):
    """make("--option", ...) returns a Trainer of the baseline on tones, by default in fp32."""

    def build(*options, data=None):
        run_dir = tmp_path / f"run{len(list(tmp_path.glob('run*')))}"
        run_dir.mkdir()
        options = ["--model", "baseline", "--precision", "fp32", "--batch-size", "2", *options]
        config = parse([*options, "--data", data or tones(tmp_path)])
        folder = RunFolder(run_dir, config)
        folder.begin()
        return Trainer(config, folder, Parallel())

    return build
