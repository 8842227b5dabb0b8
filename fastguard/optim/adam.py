"""Adam and AdamW whose step takes the guard's decision: one pass that clips as it reads, or none.

They are torch's classes with another ``step``: param groups, state and state dicts have torch's
keys, so that either loads what the other saved. The state of a group lies packed in a few tensors,
as :func:`fastguard.ops.adamw_` takes it; the entries of ``state`` are views of these.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from itertools import repeat
from operator import is_

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastguard import ops
from fastguard._tensors import is_dtensor, local_parts
from fastguard.guard.distributed import lay_out_

from .checks import check_group, state_problem

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

    #: grad_coef and verdict of :func:`fastguard.ops.adamw_` for the next step, which a guard sets.
    #: It is the whole decision: GradScaler's tensors are not looked at beside it. ``step`` sets it
    #: to None when it has carried it out, by which the guard sees that it was.
    decision: ops.Decision | None = None

    #: The row of grad_coef for each gradient, by ``id(grad)``, where grad_coef has shape (N,).
    decision_index: dict[int, int] | None = None

    _buckets: "list[_Bucket] | None" = None
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
        # What fails here fails before the first bucket is stepped, which looks at itself.
        decisions = self._decide(grads)
        options = [bucket.options() for bucket in self._buckets]
        for bucket, *arguments in [*zip(self._buckets, grads, decisions, options, strict=True)][1:]:
            bucket.step(*arguments, only_check=True)
        for bucket, *arguments in zip(self._buckets, grads, decisions, options, strict=True):
            bucket.step(*arguments)
        vars(self).pop("decision", None)  # back to the None of the class
        return loss

    def _collect(self) -> list[list[Tensor]]:
        """The gradients of each bucket, after the buckets were brought up to date."""
        if self._buckets is None or not self._unchanged():
            self._fill_buckets()
        grads = [bucket.grads() for bucket in self._buckets]
        if any(any(map(is_, listed, repeat(None))) for listed in grads):
            self._fill_buckets()
            grads = [bucket.grads() for bucket in self._buckets]
        # A single bucket's op looks itself before it writes, see _Bucket.step.
        if len(grads) > 1:
            for listed in grads:
                _check_dense(listed)
        return grads

    def _unchanged(self) -> bool:
        """Whether groups, parameters and state are those that filled the buckets."""
        return (
            _same(self.param_groups, self._groups)
            and all(_same(group["params"], kept) for group, kept in self._params)
            and _same(self.state.values(), self._states)
            and all(bucket.unchanged() for bucket in self._buckets)
            and all(p.grad is None for p in self._without_grad)
        )

    def _fill_buckets(self) -> None:
        """Sort the parameters with gradients by group, device and dtype, and pack their state.

        The values stay, bit for bit; what lies in the right place already is not moved.
        """
        before, self._buckets = self._buckets or [], None
        written = {id(view) for b in before for views in b.views.values() for view in views}
        sorted_: dict[tuple, list[Tensor]] = {}
        without_grad: list[Tensor] = []
        for number, group in enumerate(self.param_groups):
            # Once each: torch only warns about a parameter that is in a group twice.
            for p in {id(p): p for p in group["params"]}.values():
                if p.grad is None:
                    without_grad.append(p)
                    continue
                _check_dense([p.grad])
                _check_fused(group, number, p)
                key = (number, p.device, _moment_dtype(p).to_real())
                sorted_.setdefault(key, []).append(p)
        buckets = []
        for (number, device, dtype), params in sorted_.items():
            group = self.param_groups[number]
            kept = (b for b in before if b.group is group and _same(params, b.params))
            bucket = next(kept, None)
            states = [self.state[p] for p in params]
            if bucket is None or not _same(states, bucket.states) or not bucket.unchanged():
                bucket = _Bucket(group, number, device, dtype, params, states, written)
            bucket.number = number
            buckets.append(bucket)
        for p in without_grad:
            _leave_the_pack(self.state.get(p, {}))
        self._groups = list(self.param_groups)
        self._params = [(group, list(group["params"])) for group in self.param_groups]
        self._states = list(self.state.values())
        self._without_grad = without_grad
        self._buckets = buckets

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
            # Any count and NaN: torch's fused step takes 1.0 alone for a skip.
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
        # From memory that is not pinned the host would wait for the copy.
        return _to(index.pin_memory() if coef.is_cuda else index, coef.device)

    def load_state_dict(self, state_dict: dict) -> None:
        """Load what this class, or torch's Adam or AdamW of any implementation, has saved.

        The state is copied. Moments of bfloat16 and float16 parameters are float32, whatever the
        dtype they were saved in; torch's ``load_state_dict`` would round them to the parameter's.
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
        """For pickle, which would write the whole pack once for each view of it."""
        state = defaultdict(dict)
        for p, entries in self.state.items():
            if isinstance(entries, dict):  # a hook may keep anything else here
                entries = {k: v.clone() if _shares(v) else v for k, v in entries.items()}
            state[p] = entries
        return super().__getstate__() | {"state": state}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._buckets = None  # lets go of the old state
        for group in self.param_groups:
            group["differentiable"] = False
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


class _NoComparison(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        raise TypeError(f"{function} of tensors that should be the same object")


class _Bucket:
    """The parameters of one group that have a gradient, of one device and one dtype of moments.

    Builds the packed state from whatever state there is, and puts views of it in its place.
    """

    def __init__(
        self,
        group: dict,
        number: int,
        device: torch.device,
        dtype: torch.dtype,
        params: list[Tensor],
        states: list[dict[str, Tensor]],
        written: set[int],
    ):
        self.group = group
        self.number = number
        self.device = device
        self.params = params
        self.states = states
        self._parts = parts = local_parts(params)
        self._check_apart(parts)
        self.sharded = parts is not params
        self.complex = any(p.is_complex() for p in params)
        self.amsgrad = bool(group["amsgrad"])
        self._contiguous = [p for p in parts if p.is_contiguous()]
        self._numels = list(map(Tensor.numel, self._contiguous))
        self._others = [p for p in parts if not p.is_contiguous()]
        self._layouts = list(map(_layout, self._others))
        names = _MOMENTS if self.amsgrad else _MOMENTS[:2]
        for p, state in zip(params, states, strict=True):
            if problem := _problem(p, state, names, written):
                index = next(i for i, q in enumerate(group["params"]) if q is p)
                raise RuntimeError(f"parameter {index} of group {number}: {problem}")
        real = _real(parts) if self.complex else parts
        offsets = ops.packed_offsets(p.numel() for p in real)
        self._packs = {
            name: torch.zeros(offsets[-1] if name in names else 0, dtype=dtype, device=device)
            for name in _MOMENTS
        }
        self._packs["step"] = torch.zeros(len(params), dtype=torch.float32, device=device)
        self.views = {
            name: [
                torch.view_as_complex(view) if p.is_complex() else view
                for view, p in zip(
                    map(ops.packed_view, repeat(self._packs[name]), real, offsets),
                    params,
                    strict=False,  # the last of the offsets is the end
                )
            ]
            for name in names
        }
        self.views["step"] = [self._packs["step"][i] for i in range(len(params))]
        for name in ("step", *names):
            for view, state in zip(self.views[name], states, strict=True):
                if name in state:
                    view.copy_(*local_parts([state[name]]))
            if self.sharded and name != "step":
                self.views[name] = list(map(_laid_out_as, params, self.views[name]))
            for view, state in zip(self.views[name], states, strict=True):
                state[name] = view
        self._copies = list(map(dict, states))

    def _check_apart(self, parts: list[Tensor]) -> None:
        """RuntimeError where two parameters share memory, which threads would write at once."""
        if (shared := ops.sharing_memory(parts)) is not None:
            places = {id(p): place for place, p in enumerate(self.group["params"])}
            first, second = sorted(places[id(self.params[i])] for i in shared)
            raise RuntimeError(
                f"parameters {first} and {second} of group {self.number} share memory: give the "
                "optimizer one of them, or clone the other"
            )

    def unchanged(self) -> bool:
        """Whether the state's entries are the views, and parameters lie in memory as they did."""
        return (
            bool(self.group["amsgrad"]) == self.amsgrad
            and self._holds_the_views()
            and self._in_place()
        )

    def _holds_the_views(self) -> bool:
        # Dicts are equal where their values are the same objects, found at a third of the price of
        # three passes; where they are not, tensors would be compared, and that is an answer too.
        try:
            with _NoComparison():
                if self.states == self._copies:
                    return True
        except (TypeError, ValueError, RuntimeError):
            pass  # of an entry that can not be compared; what counts is compared below
        same = all(
            all(map(is_, map(dict.get, self.states, repeat(name)), views))
            for name, views in self.views.items()
        )
        if same:  # what changed is an entry of somebody else's
            self._copies = list(map(dict, self.states))
        return same

    def _in_place(self) -> bool:
        if self.sharded:  # to_local makes new ones each time, and FSDP may have moved them
            before, self._parts = self._parts, local_parts(self.params)
            return list(map(_layout, before)) == list(map(_layout, self._parts))
        # Contiguous and of one number of elements says enough, at half the price of the strides.
        return (
            all(map(Tensor.is_contiguous, self._contiguous))
            and list(map(Tensor.numel, self._contiguous)) == self._numels
            and list(map(_layout, self._others)) == self._layouts
        )

    def grads(self) -> list[Tensor | None]:
        if self.sharded:
            lay_out_(self.params)
        return [p.grad for p in self.params]

    def step(
        self,
        grads: list[Tensor],
        decision: tuple[Tensor, Tensor],
        options: tuple[float | bool, ...],
        only_check: bool = False,
    ) -> None:
        params = self._parts
        grads = local_parts(grads) if self.sharded else grads
        state = (*(self._packs[name] for name in _MOMENTS), self._packs["step"])
        try:
            if self.complex:
                params, grads = _real(params), _real(grads)
            step = ops.check_adamw if only_check else ops.adamw_
            step(params, grads, *state, *decision, *options)
            if self.sharded:  # a DTensor's version does not count what is written to its shard
                ops.count_writes(self.params)
        except RuntimeError:
            _check_dense(grads)
            raise

    def options(self) -> tuple[float | bool, ...]:
        """The options of :func:`fastguard.ops.adamw_`, in its order.

        Raises:
            ValueError: one is NaN or infinite.
        """
        group = self.group
        beta1, beta2 = group["betas"]
        options = (group["lr"], beta1, beta2, group["weight_decay"], group["eps"])
        numbers = tuple(map(float, options))
        if not all(map(math.isfinite, numbers)):
            lr, beta1, beta2, weight_decay, eps = numbers
            check_group(
                self.number,
                {"lr": lr, "betas": (beta1, beta2), "weight_decay": weight_decay, "eps": eps},
            )
        flags = (group["decoupled_weight_decay"], group["amsgrad"], group["maximize"])
        return *numbers, *map(bool, flags)


def _problem(
    p: Tensor, state: dict[str, Tensor], names: tuple[str, ...], written: set[int]
) -> str | None:
    """What is wrong with state that was there already; ``written``, by id, what a step wrote."""
    for name in ("step", *names):
        shape, dtype = p.shape, _moment_dtype(p)
        if name == "step":
            shape, dtype = torch.Size(), torch.float32
        if name in state:
            entry = state[name]
            found = type(entry).__name__
            if isinstance(entry, Tensor):
                if entry.shape == shape and entry.dtype == dtype:
                    if name == "step" or _placed(entry) == _placed(p):
                        # Elsewhere the host would have to wait for the device.
                        look = entry.device.type == "cpu" and id(entry) not in written
                        if look and (problem := state_problem(name, entry)):
                            return f"{problem}; delete it from the state to start from zero"
                        continue
                    return (
                        f"its {name} must be a DTensor with the parameter's mesh and placements, "
                        f"{_placed(p)}, got {_placed(entry)}; load it with "
                        "torch.distributed.checkpoint.state_dict.set_optimizer_state_dict"
                    )
                found = f"{entry.dtype} of shape {tuple(entry.shape)}"
            return (
                f"its {name} must be a {dtype} tensor of shape {tuple(shape)}, got {found}; "
                "delete it from the state to start from zero, or load it with load_state_dict"
            )
    return None


def _placed(tensor: Tensor) -> tuple | None:
    return (tensor.device_mesh, tensor.placements) if is_dtensor(tensor) else None


def _laid_out_as(p: Tensor, part: Tensor) -> Tensor:
    """``part`` itself or, where ``p`` is a DTensor, one whose shard here is in the same memory."""
    if not is_dtensor(p):
        return part
    # DTensor.from_local would move what is offloaded to the mesh's device.
    whole = torch.empty_like(p, dtype=part.dtype)
    whole.to_local().set_(part)
    return whole


def _check_fused(group: dict, number: int, p: Tensor) -> None:
    if group["fused"] and p.is_meta:  # as torch's
        raise RuntimeError(
            "`fused=True` requires all the params to be floating point Tensors of a device that "
            f"has memory, but one of group {number} is on meta; call model.to_empty(device=...) "
            "first and build the optimizer of the parameters that it makes"
        )


def _capturing(buckets: list[_Bucket]) -> bool:
    on_cuda = any(bucket.device.type == "cuda" for bucket in buckets)
    # Without a driver the question itself is an error; tests with fake tensors have none.
    return on_cuda and torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _check_capture(groups: list[dict]) -> None:
    """RuntimeError where a CUDA graph would replay something else than this step."""
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


def _check_dense(grads: list[Tensor]) -> None:
    if any(grad.layout is not torch.strided for grad in grads):
        raise RuntimeError(_SPARSE)


def _layout(p: Tensor) -> tuple[torch.Size, tuple[int, ...]]:
    return p.shape, p.stride()


def _shares(value: object) -> bool:
    """Whether a tensor, or of a DTensor its shard, is part of a larger one."""
    if is_dtensor(value):
        return _shares(value.to_local())
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.untyped_storage().nbytes() > value.numel() * value.element_size()
    )


def _leave_the_pack(state: dict[str, Tensor]) -> None:
    """Lest the state of one idle parameter keep the whole of an old pack in memory."""
    for name in ("step", *_MOMENTS):
        if _shares(state.get(name)):
            state[name] = state[name].clone()


def _remember(optimizer: _Fused, state_dict: dict) -> None:
    for number, entries in state_dict["state"].items():
        for name in ("step", *_MOMENTS) if isinstance(entries, dict) else ():
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


def _real(tensors: list[Tensor]) -> list[Tensor]:
    return [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in tensors]


def _moment_dtype(p: Tensor) -> torch.dtype:
    return torch.promote_types(p.dtype, torch.float32)


_ARGUMENTS = """
    Clipping, unscaling and skipping take no pass of their own: :class:`fastguard.GradGuard` leaves
    its decision in ``decision`` and GradScaler its scale and ``found_inf`` (of which any non-zero
    value and NaN skip), the step multiplies as it reads, the gradients stay as they are, and on a
    skip parameters and state stay so too, bit for bit.

    All parameters of a group, device and dtype are one call of a native kernel; without one the
    pure-torch :func:`fastguard.ops.adamw_ref_` serves. The step is always fused.

    Args:
        params: parameters, (name, parameter) pairs or param groups, as for torch's optimizers, of
            float32, float64, bfloat16, float16 or complex64 and complex128, and of any shape.
        lr: learning rate, a float or a tensor with one element.
        betas: decay of the two moments.
        eps: is added to the denominator.
        weight_decay: {weight_decay}.
        amsgrad: divide by the largest second moment so far instead of the present one.
        maximize: step along the gradient, not against it.
        foreach, fused: None, False or True, without effect on the step: it is always fused. Not
            both True, as with torch's. They stay in the groups, so that torch's optimizer that
            loads the state steps as it was asked for here.
        capturable: without effect outside of a CUDA graph's capture, inside of which it must be
            True: ``step`` is an argument on the device, but lr, betas, eps and weight_decay are
            taken from the host, and a replay repeats those of the capture.
        differentiable: False.

    Its state, per parameter: ``step``, float32 of shape () on the parameter's device, and
    ``exp_avg``, ``exp_avg_sq`` and with amsgrad ``max_exp_avg_sq`` of the parameter's shape, in
    float32 for bfloat16 and float16 parameters too, where torch's are in the parameter's dtype. All
    are views of a few packed tensors; an entry that is replaced is copied into these at the next
    step. ``torch.save`` writes a packed tensor once, and all of it even where the state of a single
    parameter is saved: clone that first. So does plain ``pickle``, and once for each view: pickle
    the optimizer, which takes care of that, or a deep copy made of clones, not its state dict.

    The moments of a parameter that is a DTensor (FSDP2) are DTensors with its mesh and placements,
    as torch.distributed.checkpoint saves them; the step works on this rank's shards, and takes
    DTensors and plain parameters in one group, which torch's refuses.

    Raises:
        ValueError: an option outside of its range, or no parameters.
        RuntimeError: ``differentiable``, or both ``foreach`` and ``fused``.

    Source: {source}
    """


class Adam(_Fused, torch.optim.Adam):
    __doc__ = "``torch.optim.Adam`` whose step takes the guard's decision.\n" + _ARGUMENTS.format(
        weight_decay="is added to the gradient, times the parameter",
        source='Kingma & Ba, "Adam: A Method for Stochastic Optimization", ICLR 2015.',
    )


class AdamW(_Fused, torch.optim.AdamW):
    __doc__ = "``torch.optim.AdamW`` whose step takes the guard's decision.\n" + _ARGUMENTS.format(
        weight_decay="times lr, the part of the parameter that is taken off at every step",
        source='Loshchilov & Hutter, "Decoupled Weight Decay Regularization", ICLR 2019.',
    )
