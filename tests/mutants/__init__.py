"""Mutation testing: small faults in the guard's code. A test has to fail for each of them.

    python -m tests.mutants                            ten mutants of every file
    python -m tests.mutants fastguard/optim/fused.py --sample 40 --seed 3

A mutant that no test sees is printed with its line. Either it changes nothing (an equivalent
mutant), or a test is missing. mutmut and cosmic-ray do not serve: they leave out decorated
functions (mutmut) or statements and keyword arguments (cosmic-ray), take no samples, and do not
know C++.
"""

from typing import NamedTuple


class Mutant(NamedTuple):
    line: int
    what: str  # "before -> after"
    source: str  # the whole file
