"""Fixtures of the tests that run CUDA kernels on the executor."""

import pytest

from tests import simt

from .attention_cases import inputs
from .kernels.attention import AttentionDevice


@pytest.fixture(scope="module")
def attention_compiler():
    """Skip the module's tests if there is no compiler for attention's kernels."""
    try:
        AttentionDevice().attention(*inputs())
    except simt.NoCompiler as error:
        pytest.skip(str(error))
