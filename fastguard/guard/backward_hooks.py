"""Norms of gradients that are measured in the backward pass, while they are in the cache."""

import weakref
from collections.abc import Iterable

import torch
from torch import Tensor

from fastguard import ops

_BUCKET_BYTES = 16 << 20  # fits into a last-level cache; smaller buckets cost too many calls


def _no_parameter() -> None:
    """Replaces the weak reference of a parameter that was never seen."""


class BackwardMeasure:
    """Measures one bucket of gradients per native call, from hooks that run as each is ready.

    The step measures a gradient again if it was written or replaced after its hook ran. Its
    identity and its version counter show this. They do not show writes through ``.data`` and the
    all-reduces of DistributedDataParallel, which follow the hook. These need ``measure="step"``.
    """

    def __init__(self):
        self._hooked: dict[int, weakref.ref] = {}
        #: id of a parameter -> its gradient, not measured yet
        self._open: dict[int, Tensor] = {}
        self._open_bytes = 0
        self._norms: list[ops.GradNorm] = []
        #: id of a parameter -> its gradient, the gradient's version, its row in all of _norms
        self._rows: dict[int, tuple[Tensor, int, int]] = {}
        self._measured = 0

    def watch(self, parameters: Iterable[Tensor]) -> None:
        """Register a hook on each parameter that has none yet."""
        me = weakref.ref(self)  # a hook must not keep an unused guard alive

        def hook(parameter: Tensor) -> None:
            if (measure := me()) is not None:
                measure._note(parameter)

        for parameter in parameters:
            if (
                parameter.requires_grad
                and self._hooked.get(id(parameter), _no_parameter)() is not parameter
            ):
                parameter.register_post_accumulate_grad_hook(hook)
                self._hooked[id(parameter)] = weakref.ref(parameter)

    def _note(self, parameter: Tensor) -> None:
        grad = parameter.grad
        if grad is None or grad.layout != torch.strided or grad.dtype not in ops.DTYPES:
            return  # another hook took the gradient, or the step handles it
        self._open[id(parameter)] = grad
        self._open_bytes += grad.nbytes
        if self._open_bytes >= _BUCKET_BYTES:
            self._close()

    def _close(self) -> None:
        """Measure the open bucket. Of each parameter only the newest gradient counts."""
        if not self._open:
            return
        if self._measured > 8 * len(self._rows):
            # No step used these: the loop runs backward passes without steps.
            self._measured, self._norms, self._rows = 0, [], {}
        grads = list(self._open.values())
        for row, (parameter, grad) in enumerate(self._open.items(), start=self._measured):
            self._rows[parameter] = grad, grad._version, row
        self._measured += len(grads)
        self._norms.append(ops.grad_norm(grads))
        self._open, self._open_bytes = {}, 0

    def collect(self, grads: list[Tensor]) -> ops.GradNorm:
        """The result of :func:`fastguard.ops.grad_norm` for ``grads``; drops all measurements."""
        self._close()
        rows = {id(grad): (version, row) for grad, version, row in self._rows.values()}
        order, stale = [], []
        for grad in grads:
            version, row = rows.get(id(grad), (None, 0))
            if version == grad._version:
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
        if order != list(range(len(norms))):
            rows = torch.tensor(order, device=norms.device)
            norms, nonfinite = norms[rows], nonfinite[rows]
        return ops.GradNorm(torch.linalg.vector_norm(norms), norms, nonfinite)

    def forget(self) -> None:
        """Drop the measurements that were not collected."""
        self._open, self._open_bytes = {}, 0
        self._norms, self._rows, self._measured = [], {}, 0
