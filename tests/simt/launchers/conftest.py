"""Each case begins and ends with a launcher's own options, and no launch counted."""

import pytest

from . import gpu


@pytest.fixture(autouse=True)
def nothing_launched():
    gpu().launches()
    yield
    gpu().options()
