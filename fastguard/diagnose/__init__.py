"""``python -m fastguard.diagnose``. The attribute ``fastguard.diagnose`` is the function.

A package allows both. ``fastguard/__init__.py`` imports the package and then binds the function to
its name. ``python -m`` runs the package's ``__main__``.
"""

from .diagnosis import Diagnosis, diagnose

__all__ = ["Diagnosis", "diagnose"]
