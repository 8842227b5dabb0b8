"""Fixtures for all tests. Tests marked ``cuda`` run only on a machine with a GPU."""

import pytest
import torch


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory):
    """The folder of a run in which the baseline memorised eight real prompts."""
    from tests.recordings import prompts_by_heart  # the guard's tests do without what it imports

    return prompts_by_heart(tmp_path_factory.mktemp("prompts"))
