"""The guard in Lightning's Trainer, as the package ``pytorch_lightning`` has it.

The same as :mod:`fastguard.integrations.lightning`: each package accepts its own callbacks only.
"""

from fastguard._extras import require

from ._lightning import GuardHooks

Callback = require("pytorch_lightning", "integrations").Callback


class GuardCallback(GuardHooks, Callback):
    __doc__ = GuardHooks.__doc__
