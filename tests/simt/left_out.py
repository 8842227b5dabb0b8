"""A plugin of pytest, ``-p tests.simt.left_out``: it leaves out what the executor would run.

The executor needs pybind11, and minutes to compile: runs about something else leave it out.
"""

_DEVICES = ("cuda kernel", "warps one by one", "at random")  # as their parameters are called


def pytest_collection_modifyitems(items):
    items[:] = [item for item in items if not any(name in item.name for name in _DEVICES)]
