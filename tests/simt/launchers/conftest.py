"""Each case begins and ends with the default options and without counted launches."""

import pytest

from . import gpu


@pytest.fixture(autouse=True)
def nothing_launched():
    gpu().launches()
    yield
    gpu().options()
