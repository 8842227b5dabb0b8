"""The guard in Lightning's Trainer, as the package ``lightning`` has it.

::

    from fastguard.integrations.lightning import GuardCallback

    trainer = Trainer(callbacks=[GuardCallback(max_norm=0.5, skip_norm=10.0)])

Fabric needs no callback: ``guard.attach`` takes the optimizer that ``fabric.setup`` returned.
"""

from fastguard._extras import require

from ._lightning import GuardHooks

Callback = require("lightning.pytorch", "integrations").Callback


class GuardCallback(GuardHooks, Callback):
    __doc__ = GuardHooks.__doc__
