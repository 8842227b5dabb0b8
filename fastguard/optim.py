"""Adam and AdamW whose step takes the guard's decision: one pass that clips as it reads, or none.

They are torch's classes with another ``step``: param groups, state and state dicts have torch's
keys, so that either loads what the other saved.
"""

from collections.abc import Callable, Iterable
from itertools import repeat
from operator import is_, is_not, itemgetter

import torch
from torch import Tensor

from . import ops

_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")

_SPARSE = (
    "Adam does not support sparse gradients, please consider SparseAdam instead; or make them "
    "dense, with nn.Embedding(..., sparse=False) or p.grad = p.grad.to_dense()"
)


class _Fused:
    """What Adam and AdamW share: the step, the dtypes of the state, and its loading."""

    # GradScaler hands over grad_scale and found_inf in place of unscaling. On the class, for
    # pickling loses what torch sets on the instance.
    _step_supports_amp_scaling = True

    #: grad_coef and verdict of :func:`fastguard.ops.adamw_` for the next step; a guard sets it
    #: around ``step``. It is the whole decision: GradScaler's tensors are not looked at beside it.
    decision: ops.Decision | None = None

    #: The row of grad_coef for each gradient, by ``id(grad)``, where grad_coef has shape (N,).
    decision_index: dict[int, int] | None = None

    _buckets: "list[_Bucket] | None" = None
    _loading: dict | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], object] | None = None):
        """One step; on a skip, by ``decision`` or GradScaler's ``found_inf``, nothing is written.

        No gradient, verdict, scale or ``found_inf`` is read on the host. A ``lr`` that is a tensor
        is: leave it on the CPU.

        Args:
            closure: reevaluates the model and returns the loss; called with gradients enabled.

        Returns:
            What the closure returned, or None.

        Raises:
            RuntimeError: a sparse gradient, one that ``decision_index`` does not know, or state of
                a wrong shape or dtype.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work = self._collect()
        # What fails here fails before the first bucket is stepped.
        decisions = self._decide(work)
        options = [bucket.options() for bucket, *_ in work]
        for (_, grads, lists), decision, option in zip(work, decisions, options, strict=True):
            params, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps = lists
            ops.adamw_(
                params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, *decision, *option
            )
        return loss

    def _collect(self) -> "list[tuple[_Bucket, list[Tensor], tuple[list[Tensor], ...]]]":
        """The buckets of the moment, each with its gradients and its lists."""
        if self._buckets is None or not self._unchanged():
            self._fill_buckets()
        grads = [bucket.grads() for bucket in self._buckets]
        try:
            if not all(all(map(is_not, listed, repeat(None))) for listed in grads):
                raise KeyError  # a parameter has lost its gradient
            lists = [bucket.lists() for bucket in self._buckets]
        except KeyError:  # or the state an entry; amsgrad may have been turned on, too
            self._fill_buckets()
            grads = [bucket.grads() for bucket in self._buckets]
            lists = [bucket.lists() for bucket in self._buckets]
        for listed in grads:
            if any(grad.layout is not torch.strided for grad in listed):
                raise RuntimeError(_SPARSE)
        for i, bucket in enumerate(self._buckets):
            if bucket.complex:
                grads[i] = _real(grads[i])
                lists[i] = tuple(map(_real, lists[i]))
        return list(zip(self._buckets, grads, lists, strict=True))

    def _unchanged(self) -> bool:
        """Whether groups, parameters and the state's dicts are those that filled the buckets."""
        return (
            _same(self.param_groups, self._groups)
            and all(_same(group["params"], kept) for group, kept in self._params)
            and _same(self.state.values(), self._states)
            and all(p.grad is None for p in self._without_grad)
        )

    def _fill_buckets(self) -> None:
        """Sort the parameters with gradients by group and device, and make the state they lack."""
        self._buckets = None
        buckets: list[_Bucket] = []
        without_grad: list[Tensor] = []
        for group in self.param_groups:
            by_device: dict[torch.device, _Bucket] = {}
            # Once each: torch only warns about a parameter that is in a group twice.
            for p in {id(p): p for p in group["params"]}.values():
                if p.grad is None:
                    without_grad.append(p)
                    continue
                if p.grad.layout != torch.strided:
                    raise RuntimeError(_SPARSE)
                if p.device not in by_device:
                    by_device[p.device] = _Bucket(group, p.device)
                by_device[p.device].add(p, self._state_of(p, group["amsgrad"]))
            buckets += by_device.values()
        self._groups = list(self.param_groups)
        self._params = [(group, list(group["params"])) for group in self.param_groups]
        self._states = list(self.state.values())
        self._without_grad = without_grad
        self._buckets = buckets

    def _state_of(self, p: Tensor, amsgrad: bool) -> dict[str, Tensor]:
        state = self.state[p]
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
        for name in _MOMENTS if amsgrad else _MOMENTS[:2]:
            if name not in state:
                state[name] = torch.zeros_like(
                    p, dtype=_moment_dtype(p), memory_format=torch.preserve_format
                )
        return state

    def _decide(self, work) -> list[tuple[Tensor, Tensor]]:
        """grad_coef and verdict for each bucket, on its device."""
        if self.decision is None:
            by_device = {b.device: self._scaler_decision(b.device) for b, *_ in work}
            return [by_device[bucket.device] for bucket, *_ in work]
        coef, verdict = self.decision[:2]
        return [
            (
                _to(coef if coef.dim() == 0 else coef[self._rows(bucket, coef)], bucket.device),
                _to(verdict, bucket.device),
            )
            for bucket, *_ in work
        ]

    def _scaler_decision(self, device: torch.device) -> tuple[Tensor, Tensor]:
        coef = torch.ones((), dtype=torch.float64, device=device)
        verdict = torch.zeros((), dtype=torch.int64, device=device)
        if (scale := getattr(self, "grad_scale", None)) is not None:
            coef = coef / _to(torch.as_tensor(scale), device).reshape(())
        if (found_inf := getattr(self, "found_inf", None)) is not None:
            # Any count and NaN: torch's fused step takes 1.0 alone for a skip.
            found = (_to(torch.as_tensor(found_inf), device) != 0).any()
            verdict = found.to(torch.int64) * int(ops.Verdict.SKIP_NONFINITE)
        return coef, verdict

    def _rows(self, bucket: "_Bucket", coef: Tensor) -> slice | Tensor:
        try:
            rows = [self.decision_index[id(grad)] for grad in bucket.grads()]
        except (KeyError, TypeError):
            raise RuntimeError(
                f"the decision has {len(coef)} coefficients, and decision_index does not say which "
                "of them is for each gradient: let it map id(grad) to a row for every gradient of "
                "the optimizer, or give one coefficient of shape ()"
            ) from None
        if rows == list(range(rows[0], rows[0] + len(rows))):
            return slice(rows[0], rows[0] + len(rows))
        index = torch.tensor(rows)
        # From memory that is not pinned the host would wait for the copy.
        return _to(index.pin_memory() if coef.is_cuda else index, coef.device)

    def load_state_dict(self, state_dict: dict) -> None:
        """Load what this class, or torch's Adam or AdamW of any implementation, has saved.

        The state is copied. Moments of bfloat16 and float16 parameters are float32, whatever the
        dtype they were saved in; torch's ``load_state_dict`` would round them to the parameter's.
        """
        handle = self.register_load_state_dict_pre_hook(_remember)  # called after the user's own
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
            self._loading = None

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._buckets = None  # lets go of the old state
        for group in self.param_groups:
            group.update(foreach=None, capturable=False, differentiable=False, fused=True)
        for p, original in self._before_torch_cast_it():
            own = self.state[p]
            for name in own.keys() & original.keys() & set(_MOMENTS):
                own[name] = original[name].to(p.device, _moment_dtype(p), copy=True)
            if "step" in own:
                step = torch.as_tensor(own["step"], dtype=torch.float32, device=p.device)
                own["step"] = step.reshape(()).clone()

    def _before_torch_cast_it(self) -> Iterable[tuple[Tensor, dict]]:
        """Each parameter with its state in the dict that is being loaded."""
        if self._loading is not None:
            groups = zip(self._loading["param_groups"], self.param_groups, strict=True)
            for there, here in groups:
                for number, p in zip(there["params"], here["params"], strict=True):
                    if number in self._loading["state"]:
                        yield p, self._loading["state"][number]


class _Bucket:
    """The parameters of one group on one device that have a gradient, with their state."""

    def __init__(self, group: dict, device: torch.device):
        self.group = group
        self.device = device
        self.params: list[Tensor] = []
        self.states: list[dict[str, Tensor]] = []
        self.complex = False

    def add(self, p: Tensor, state: dict[str, Tensor]) -> None:
        self.params.append(p)
        self.states.append(state)
        self.complex = self.complex or p.is_complex()

    def grads(self) -> list[Tensor | None]:
        return [p.grad for p in self.params]

    def lists(self) -> tuple[list[Tensor], ...]:
        """Anew at each step, so that whoever replaces an entry of the state is heard."""
        names = _MOMENTS if self.group["amsgrad"] else _MOMENTS[:2]
        moments = [list(map(itemgetter(name), self.states)) for name in names]
        if len(moments) == 2:
            moments.append([])
        return self.params, *moments, list(map(itemgetter("step"), self.states))

    def options(self) -> tuple[float | bool, ...]:
        """The options of :func:`fastguard.ops.adamw_`, in its order."""
        group = self.group
        beta1, beta2 = group["betas"]
        numbers = (group["lr"], beta1, beta2, group["weight_decay"], group["eps"])
        flags = (group["decoupled_weight_decay"], group["amsgrad"], group["maximize"])
        return *map(float, numbers), *map(bool, flags)


def _remember(optimizer: _Fused, state_dict: dict) -> None:
    optimizer._loading = state_dict


def _same(these: Iterable, those: list) -> bool:
    return len(these) == len(those) and all(map(is_, these, those))


def _to(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.to(device, non_blocking=True)


def _real(tensors: list[Tensor]) -> list[Tensor]:
    return [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in tensors]


def _moment_dtype(p: Tensor) -> torch.dtype:
    return torch.promote_types(p.dtype, torch.float32)


_ARGUMENTS = """
    Clipping, unscaling and skipping take no pass of their own: :class:`fastguard.GradGuard` leaves
    its decision in ``decision`` and GradScaler its scale and ``found_inf`` (of which any non-zero
    value and NaN skip), the step multiplies as it reads, the gradients stay as they are, and on a
    skip parameters and state stay so too, bit for bit.

    On the CPU all parameters of a group are one call of a native kernel; on CUDA, and without a
    compiler, the pure-torch :func:`fastguard.ops.adamw_ref_` serves. Always fused: there are no
    ``foreach``, ``fused``, ``capturable`` and ``differentiable``.

    Args:
        params: parameters, (name, parameter) pairs or param groups, as for torch's optimizers, of
            float32, float64, bfloat16, float16 or complex64 and complex128, and of any shape.
        lr: learning rate, a float or a tensor with one element.
        betas: decay of the two moments.
        eps: is added to the denominator.
        weight_decay: {weight_decay}.
        amsgrad: divide by the largest second moment so far instead of the present one.
        maximize: step along the gradient, not against it.

    Its state, per parameter: ``step``, float32 of shape () on the parameter's device, and
    ``exp_avg``, ``exp_avg_sq`` and with amsgrad ``max_exp_avg_sq`` of the parameter's shape, in
    float32 for bfloat16 and float16 parameters too, where torch's are in the parameter's dtype.

    Raises:
        ValueError: an option outside of its range, or no parameters.

    Source: {source}
    """


class Adam(_Fused, torch.optim.Adam):
    __doc__ = "``torch.optim.Adam`` whose step takes the guard's decision.\n" + _ARGUMENTS.format(
        weight_decay="is added to the gradient, times the parameter",
        source='Kingma & Ba, "Adam: A Method for Stochastic Optimization", ICLR 2015.',
    )

    def __init__(
        self,
        params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
    ):
        super().__init__(
            params, lr, betas, eps, weight_decay, amsgrad, maximize=maximize, fused=True
        )


class AdamW(_Fused, torch.optim.AdamW):
    __doc__ = "``torch.optim.AdamW`` whose step takes the guard's decision.\n" + _ARGUMENTS.format(
        weight_decay="times lr, the part of the parameter that is taken off at every step",
        source='Loshchilov & Hutter, "Decoupled Weight Decay Regularization", ICLR 2019.',
    )

    def __init__(
        self,
        params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
    ):
        super().__init__(
            params, lr, betas, eps, weight_decay, amsgrad, maximize=maximize, fused=True
        )
