"""The machine code in fastguard/_cuda.so: the resources of each kernel, and the moves of its loops.

``python -m tests.sass`` prints tables of them, docs/results/sass.txt. tests/test_sass.py compares
them with promises.py.
"""

from .cuobjdump import LIBRARY, Kernel, Usage, kernels, parse_code, parse_usage
from .promises import PROMISES, Promise, dynamic_shared_of, problems

__all__ = [
    "LIBRARY",
    "PROMISES",
    "Kernel",
    "Promise",
    "Usage",
    "dynamic_shared_of",
    "kernels",
    "parse_code",
    "parse_usage",
    "problems",
]
