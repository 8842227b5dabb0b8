"""Measuring gradients while backward produces them, before they leave the cache."""

import weakref
from collections.abc import Iterable

import torch
from torch import Tensor

from . import ops

_BUCKET_BYTES = 4 << 20


def _gone() -> None:
    """As a reference to what is no more."""


class BackwardMeasure:
    """One native call per bucket of gradients, from hooks that torch calls as each is ready.

    A gradient that was written or replaced after its hook ran is measured again at the step, by
    its identity and version counter. What those do not show (writes through ``.data``, all-reduces
    of DistributedDataParallel, which happen after the hook) needs ``measure="step"``.
    """

    def __init__(self):
        self._hooked: dict[int, weakref.ref] = {}
        self._open: list[Tensor] = []
        self._open_bytes = 0
        self._norms: list[ops.GradNorm] = []
        #: id of a gradient -> the gradient, its version and its row among all rows
        self._rows: dict[int, tuple[Tensor, int, int]] = {}
        self._measured = 0

    def watch(self, parameters: Iterable[Tensor]) -> None:
        """Register a hook on each parameter that has none yet."""
        me = weakref.ref(self)  # a hook must not keep alive a guard that nobody uses any more

        def hook(parameter: Tensor) -> None:
            if (measure := me()) is not None:
                measure._note(parameter.grad)

        for parameter in parameters:
            if (
                parameter.requires_grad
                and self._hooked.get(id(parameter), _gone)() is not parameter
            ):
                parameter.register_post_accumulate_grad_hook(hook)
                self._hooked[id(parameter)] = weakref.ref(parameter)

    def _note(self, grad: Tensor) -> None:
        if grad.layout != torch.strided or grad.dtype not in ops.DTYPES:
            return  # the step will see to it
        self._open.append(grad)
        self._open_bytes += grad.nbytes
        if self._open_bytes >= _BUCKET_BYTES:
            self._close()

    def _close(self) -> None:
        if not self._open:
            return
        for grad in self._open:
            self._rows[id(grad)] = (grad, grad._version, self._measured)
            self._measured += 1
        self._norms.append(ops.grad_norm(self._open))
        self._open, self._open_bytes = [], 0

    def collect(self, grads: list[Tensor]) -> ops.GradNorm:
        """What :func:`fastguard.ops.grad_norm` says of ``grads``; forgets what it knows."""
        self._close()
        order, stale = [], []
        for grad in grads:
            seen, version, row = self._rows.get(id(grad), (None, 0, 0))
            if seen is grad and version == grad._version:
                order.append(row)
            else:
                order.append(self._measured + len(stale))
                stale.append(grad)
        if stale:
            self._norms.append(ops.grad_norm(stale))
        found = self._norms
        self.forget()
        if not found:
            return ops.grad_norm([])
        norms = torch.cat([bucket.norms for bucket in found])
        nonfinite = torch.cat([bucket.nonfinite for bucket in found])
        rows = torch.tensor(order, device=norms.device)
        norms, nonfinite = norms[rows], nonfinite[rows]
        return ops.GradNorm(torch.linalg.vector_norm(norms), norms, nonfinite)

    def forget(self) -> None:
        self._open, self._open_bytes, self._norms = [], 0, []
        self._rows, self._measured = {}, 0
