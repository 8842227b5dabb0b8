"""The step that Adam and AdamW have in common: one pass that clips as it reads, or none.

The state of a group lies packed in a few tensors, as :func:`fastguard.ops.adamw_` takes it; the
entries of ``state`` are views of these.
"""

import types
from collections import defaultdict
from collections.abc import Callable, Iterable
from operator import is_
from typing import NamedTuple

import torch
from torch import Tensor

from fastguard import ops

from .checks import state_problem
from .masters import Masters
from .packed_state import (
    ENTRIES,
    MASTER,
    Bucket,
    check_dense,
    leave_pack,
    moment_dtype,
    shares_memory,
)


class _Given(NamedTuple):
    """The groups, parameters and state from which the buckets were filled."""

    groups: list[dict]
    params: list[tuple[dict, list[Tensor]]]  # for each group
    states: list[dict]
    without_grad: list[Tensor]


class Fused(Masters):
    """The common part of Adam and AdamW: the step, the dtypes of the state, and its loading."""

    # With this flag GradScaler passes grad_scale and found_inf and does not unscale. It is set on
    # the class, because pickling loses the flag that torch sets on the instance.
    _step_supports_amp_scaling = True

    #: grad_coef and verdict of :func:`fastguard.ops.adamw_` for the next step, set by a guard. It
    #: is the whole decision, and GradScaler's tensors are ignored. ``step`` sets it to None after
    #: it has carried it out, which tells the guard so.
    decision: ops.Decision | None = None

    #: The row of grad_coef for each gradient, by ``id(grad)``, where grad_coef has shape (N,).
    decision_index: dict[int, int] | None = None

    _buckets: list[Bucket] | None = None
    _filled_from: "_Given | None" = None
    _loading: dict | None = None

    def add_param_group(self, param_group: dict) -> None:
        """Add a group, as torch does; the constructor calls this for each of its groups.

        Raises:
            RuntimeError: the group is ``differentiable``.
        """
        default = self.defaults["differentiable"]
        if isinstance(param_group, dict) and param_group.get("differentiable", default):
            name = type(self).__name__
            raise RuntimeError(
                f"`fused` does not support `differentiable`, and fastguard.{name} is always fused; "
                f"use torch.optim.{name}(..., differentiable=True)"
            )
        super().add_param_group(param_group)

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
            ValueError: an option of a group is NaN or infinite.
            RuntimeError: a sparse gradient, one that ``decision_index`` does not know, or state of
                a wrong shape or dtype, or one that is NaN, infinite or negative and was put there
                on the CPU; in a CUDA graph's capture, what the graph could not follow. Nothing is
                written then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        grads = self._collect()
        if _capturing(self._buckets):
            _check_capture(self.param_groups)
        # All buckets are checked before the first one is stepped. The first one needs no check in
        # advance: its step checks its arguments before it writes.
        decisions = self._decide(grads)
        options = [bucket.options() for bucket in self._buckets]
        for bucket, *arguments in [*zip(self._buckets, grads, decisions, options, strict=True)][1:]:
            bucket.step(*arguments, only_check=True)
        for bucket, *arguments in zip(self._buckets, grads, decisions, options, strict=True):
            bucket.step(*arguments)
        vars(self).pop("decision", None)  # back to the None of the class
        return loss

    def _collect(self) -> list[list[Tensor]]:
        """Bring the buckets up to date; returns the gradients of each bucket."""
        if self._buckets is None or not self._unchanged():
            self._fill_buckets()
        grads = [bucket.grads() for bucket in self._buckets]
        if any(types.NoneType in map(type, each) for each in grads):
            self._fill_buckets()
            grads = [bucket.grads() for bucket in self._buckets]
        # The operator checks a single bucket before it writes, see Bucket.step.
        if len(grads) > 1:
            for listed in grads:
                check_dense(listed)
        return grads

    def _unchanged(self) -> bool:
        """Whether groups, parameters and state are those that filled the buckets."""
        given = self._filled_from
        return (
            _same(self.param_groups, given.groups)
            and all(_same(group["params"], kept) for group, kept in given.params)
            and _same(self.state.values(), given.states)
            and all(bucket.unchanged() for bucket in self._buckets)
            and all(p.grad is None for p in given.without_grad)
        )

    def _fill_buckets(self) -> None:
        """Sort the parameters with gradients by group, device and dtype, and pack their state.

        The values stay bitwise equal. State that is already in its place is not moved.
        """
        before, self._buckets = self._buckets or [], None
        written = {id(view) for b in before for views in b.views.values() for view in views}
        params_of, without_grad = self._sorted_params()
        buckets = []
        for (number, device, dtype, masters), params in params_of.items():
            group = self.param_groups[number]
            kept = (b for b in before if b.group is group and _same(params, b.params))
            bucket = next(kept, None)
            states = [self.state[p] for p in params]
            if bucket is None or not _same(states, bucket.states) or not bucket.unchanged():
                bucket = Bucket(group, number, device, dtype, masters, params, states, written)
            bucket.number = number
            buckets.append(bucket)
        for p in without_grad:
            leave_pack(self.state.get(p, {}))
        self._filled_from = _Given(
            list(self.param_groups),
            [(group, list(group["params"])) for group in self.param_groups],
            list(self.state.values()),
            without_grad,
        )
        self._buckets = buckets

    def _sorted_params(self) -> tuple[dict[tuple, list[Tensor]], list[Tensor]]:
        """The parameters with gradients, by what one call of the operator takes; the others."""
        params_of: dict[tuple, list[Tensor]] = {}
        without_grad: list[Tensor] = []
        for number, group in enumerate(self.param_groups):
            # Each parameter once: torch only warns about one that is in a group twice.
            for p in {id(p): p for p in group["params"]}.values():
                if p.grad is None:
                    without_grad.append(p)
                    continue
                check_dense([p.grad])
                _check_fused(group, number, p)
                masters = self._has_master(p) if self._master_weights else None
                key = (number, p.device, moment_dtype(p).to_real(), masters)
                params_of.setdefault(key, []).append(p)
        return params_of, without_grad

    def _decide(self, grads: list[list[Tensor]]) -> list[tuple[Tensor, Tensor]]:
        """grad_coef and verdict for each bucket, on its device."""
        if self.decision is None:
            by_device = {b.device: self._scaler_decision(b.device) for b in self._buckets}
            return [by_device[bucket.device] for bucket in self._buckets]
        coef, verdict = self.decision[:2]
        return [
            (
                _to(coef if coef.dim() == 0 else coef[self._rows(listed, coef)], bucket.device),
                _to(verdict, bucket.device),
            )
            for bucket, listed in zip(self._buckets, grads, strict=True)
        ]

    def _scaler_decision(self, device: torch.device) -> tuple[Tensor, Tensor]:
        coef = torch.ones((), dtype=torch.float64, device=device)
        verdict = torch.zeros((), dtype=torch.int64, device=device)
        if (scale := getattr(self, "grad_scale", None)) is not None:
            coef = coef / _to(torch.as_tensor(scale), device).reshape(())
        if (found_inf := getattr(self, "found_inf", None)) is not None:
            # Any non-zero value and NaN is a skip. torch's fused step skips only for exactly 1.0.
            found = (_to(torch.as_tensor(found_inf), device) != 0).any()
            verdict = found.to(torch.int64) * int(ops.Verdict.SKIP_NONFINITE)
        return coef, verdict

    def _rows(self, grads: list[Tensor], coef: Tensor) -> slice | Tensor:
        try:
            rows = [self.decision_index[id(grad)] for grad in grads]
        except (KeyError, TypeError):
            raise RuntimeError(
                f"the decision has {len(coef)} coefficients, and decision_index does not say which "
                "of them is for each gradient: let it map id(grad) to a row for every gradient of "
                "the optimizer, or give one coefficient of shape ()"
            ) from None
        if rows == list(range(rows[0], rows[0] + len(rows))):
            return slice(rows[0], rows[0] + len(rows))
        index = torch.tensor(rows, device="cpu")
        # A copy from memory that is not pinned would be a host-device sync.
        return _to(index.pin_memory() if coef.is_cuda else index, coef.device)

    def load_state_dict(self, state_dict: dict) -> None:
        """Load what this class, or torch's Adam or AdamW of any implementation, has saved.

        The state is copied. Moments of bfloat16 and float16 parameters are float32, whatever the
        dtype they were saved in; torch's ``load_state_dict`` would round them to the parameter's.
        Masters are loaded where this optimizer keeps them; a parameter whose master is not in the
        state gets one from its own value at the next step. Masters that this optimizer does not
        keep are dropped, with a warning if a parameter differs from its master.
        The groups keep the saved ``fused``, ``foreach`` and ``capturable``, as with torch's.

        Raises:
            ValueError: other groups than the optimizer's; a moment or step that is NaN, infinite or
                negative where it cannot be, by the parameter's number. Nothing was loaded then.
        """
        handle = self.register_load_state_dict_pre_hook(_remember)  # called after the user's own
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
            self._loading = None

    def __getstate__(self) -> dict:
        """For pickle: clones of the views. Pickle would write the whole pack once per view."""
        state = defaultdict(dict)
        for p, entries in self.state.items():
            if isinstance(entries, dict):  # a hook may keep another object here
                entries = {k: v.clone() if shares_memory(v) else v for k, v in entries.items()}
            state[p] = entries
        return super().__getstate__() | {"state": state, "_master_weights": self._master_weights}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._buckets = None  # frees the old state
        for group in self.param_groups:
            group["differentiable"] = False
        without_master = []
        for p, original in self._before_torch_cast_it():
            own = self.state[p]
            for name in own.keys() & original.keys() & set(ENTRIES):
                own[name] = original[name].to(p.device, moment_dtype(p), copy=True)
            if "step" in own:
                step = torch.as_tensor(own["step"], dtype=torch.float32, device=p.device)
                own["step"] = step.reshape(()).clone()
            if MASTER in own and not self._has_master(p):
                without_master.append(p)
        self._drop_masters(without_master)

    def _before_torch_cast_it(self) -> Iterable[tuple[Tensor, dict]]:
        """Each parameter with its state in the loaded dict, before torch casts its dtype."""
        if self._loading is not None:
            groups = zip(self._loading["param_groups"], self.param_groups, strict=True)
            for there, here in groups:
                for number, p in zip(there["params"], here["params"], strict=True):
                    if number in self._loading["state"]:
                        yield p, self._loading["state"][number]


def _check_fused(group: dict, number: int, p: Tensor) -> None:
    if group["fused"] and p.is_meta:  # torch refuses this too
        raise RuntimeError(
            "`fused=True` requires all the params to be floating point Tensors of a device that "
            f"has memory, but one of group {number} is on meta; call model.to_empty(device=...) "
            "first and build the optimizer of the parameters that it makes"
        )


def _capturing(buckets: list[Bucket]) -> bool:
    on_cuda = any(bucket.device.type == "cuda" for bucket in buckets)
    # is_current_stream_capturing raises without a driver, as in tests with fake tensors.
    return on_cuda and torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _check_capture(groups: list[dict]) -> None:
    """RuntimeError if a replay of a CUDA graph would not follow the options of this step."""
    for number, group in enumerate(groups):
        if not group["capturable"]:
            raise RuntimeError(
                "step() is captured into a CUDA graph, but capturable of param group "
                f"{number} is False; a replay repeats the captured lr and weight_decay. If that is "
                "meant, build the optimizer with capturable=True"
            )
        if isinstance(group["lr"], Tensor) and group["lr"].is_cuda:
            raise RuntimeError(
                f"lr of param group {number} is a CUDA tensor, which a graph could not follow: the "
                "step takes lr from the host; use a float, or torch.optim's with capturable=True"
            )


def _remember(optimizer: Fused, state_dict: dict) -> None:
    for number, entries in state_dict["state"].items():
        for name in ("step", *ENTRIES) if isinstance(entries, dict) else ():
            if name in entries and (problem := state_problem(name, entries[name])):
                raise ValueError(
                    f"state of parameter {number}: {problem}; nothing was loaded. Load an earlier "
                    "state, or delete the parameter's entry to start from zero moments"
                )
    optimizer._loading = state_dict


def _same(these: Iterable, those: list) -> bool:
    return len(these) == len(those) and all(map(is_, these, those))


def _to(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.to(device, non_blocking=True)
