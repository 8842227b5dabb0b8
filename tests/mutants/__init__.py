"""Mutation testing: small faults put into the guard's code, each of which a test has to see.

    python -m tests.mutants                            ten mutants of every file
    python -m tests.mutants fastguard/optim/adam.py --sample 40 --seed 3

A mutant that no test sees is printed with its line: either it changes nothing (an equivalent
mutant), or a test is missing. Written here rather than taken from mutmut or cosmic-ray, which
leave out decorated functions (mutmut) or statements and keyword arguments (cosmic-ray), have no
sample, and know no C++.
"""

from typing import NamedTuple


class Mutant(NamedTuple):
    line: int
    what: str  # "before -> after"
    source: str  # of the whole file
