"""The machine code in fastguard/_cuda.so: what each kernel takes, and what its loops move.

``python -m tests.sass`` prints it as two tables, docs/results/sass.txt; tests/test_sass.py holds
it to what is promised in promises.py.
"""

from .cuobjdump import LIBRARY, Kernel, Usage, kernels, parse_code, parse_usage
from .promises import PROMISES, Promise, problems

__all__ = [
    "LIBRARY",
    "PROMISES",
    "Kernel",
    "Promise",
    "Usage",
    "kernels",
    "parse_code",
    "parse_usage",
    "problems",
]
