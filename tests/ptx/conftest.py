"""Fixtures of the tests that run the PTX of the built library."""

import shutil

import pytest
import torch

from tests.sass import LIBRARY

from . import library


@pytest.fixture(scope="session")
def programs():
    """The kernels of the built library, by name. Without a library the tests are skipped."""
    if not LIBRARY.is_file():
        if shutil.which("nvcc") is None or torch.version.cuda is None:
            pytest.skip(f"{LIBRARY.name} was not built: no nvcc, or a torch without CUDA")
        pytest.fail(f"{LIBRARY} was not built, though nvcc is here: pip install -v -e .")
    return library.programs()
