"""A pytest plugin, ``-p tests.simt.left_out``, that leaves out the tests on the executor.

The executor needs pybind11, and minutes to compile. Test runs about other things leave it out.
"""

_DEVICES = ("cuda kernel", "warps one by one", "at random")  # the names of test parameters


def pytest_collection_modifyitems(items):
    items[:] = [item for item in items if not any(name in item.name for name in _DEVICES)]
