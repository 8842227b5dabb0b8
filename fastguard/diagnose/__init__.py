"""``python -m fastguard.diagnose``. The package's attribute of this name is the function.

It is a package so that both can be: it is imported, and overwritten by the function, before anyone
can import it, and what `-m` runs is its ``__main__``.
"""

from .diagnosis import Diagnosis, diagnose

__all__ = ["Diagnosis", "diagnose"]
