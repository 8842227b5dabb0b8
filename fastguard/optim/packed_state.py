"""The packed state of one group's parameters, which :func:`fastguard.ops.adamw_` steps in one call.

The optimizer's ``state`` holds views of it, under torch's keys.
"""

from itertools import repeat
from operator import attrgetter, is_

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastguard import ops
from fastguard._tensors import grad_of, is_dtensor, local_parts
from fastguard.guard.distributed import lay_out_

from . import huge_pages
from .checks import LARGEST_OPTION, check_group, state_problem

MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
MASTER = "master_param"  # as in TransformerEngine's FusedAdam
ENTRIES = (*MOMENTS, MASTER)

_dtype_of = attrgetter("dtype")

_SPARSE = (
    "Adam does not support sparse gradients, please consider SparseAdam instead; or make them "
    "dense, with nn.Embedding(..., sparse=False) or p.grad = p.grad.to_dense()"
)


class _NoComparison(TorchFunctionMode):
    """Raises TypeError instead of comparing tensors by their values."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        raise TypeError(f"{function} of tensors that should be the same object")


class Bucket:
    """The parameters of one group with a gradient, on one device, with one dtype of moments.

    All of them have masters, or none has. ``masters`` is None where the optimizer keeps none. The
    constructor packs the present state, and replaces its entries by views of the packed state. A
    master that is absent gets its parameter's value.
    """

    def __init__(
        self,
        group: dict,
        number: int,
        device: torch.device,
        dtype: torch.dtype,
        masters: bool | None,
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
        self._dtypes = None if masters is None else list(map(_dtype_of, params))
        self._entries = (MOMENTS if self.amsgrad else MOMENTS[:2]) + (MASTER,) * bool(masters)
        self._check_states(written)
        self._packs, self.views = self._empty_packs(dtype)
        self._move_states_in()
        self._copies = list(map(dict, states))

    def _check_apart(self, parts: list[Tensor]) -> None:
        """Raise RuntimeError if two parameters share memory: two threads might write it at once."""
        if (shared := ops.sharing_memory(parts)) is not None:
            places = {id(p): place for place, p in enumerate(self.group["params"])}
            first, second = sorted(places[id(self.params[i])] for i in shared)
            raise RuntimeError(
                f"parameters {first} and {second} of group {self.number} share memory: give the "
                "optimizer one of them, or clone the other"
            )

    def _check_states(self, written: set[int]) -> None:
        """Raise RuntimeError if the present state does not fit its parameter."""
        for p, state in zip(self.params, self.states, strict=True):
            if problem := _problem(p, state, self._entries, written):
                index = next(i for i, q in enumerate(self.group["params"]) if q is p)
                raise RuntimeError(f"parameter {index} of group {self.number}: {problem}")

    def _empty_packs(self, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, list[Tensor]]]:
        """The packed state, all zero, and for each entry the parameters' views of it."""
        real = _real(self._parts) if self.complex else self._parts
        offsets = ops.packed_offsets(p.numel() for p in real)
        packs = {
            name: huge_pages.zeros(offsets[-1] if name in self._entries else 0, dtype, self.device)
            for name in ENTRIES
        }
        packs["step"] = torch.zeros(len(real), dtype=torch.float32, device=self.device)
        views = {
            name: [
                torch.view_as_complex(view) if p.is_complex() else view
                for view, p in zip(
                    map(ops.packed_view, repeat(packs[name]), real, offsets),
                    self.params,
                    strict=False,  # the last offset is the end of the pack
                )
            ]
            for name in self._entries
        }
        views["step"] = [packs["step"][i] for i in range(len(real))]
        return packs, views

    def _move_states_in(self) -> None:
        """Copy the present state into the views, and replace its entries by the views."""
        for name in ("step", *self._entries):
            for view, state, part in zip(self.views[name], self.states, self._parts, strict=True):
                if name in state:
                    view.copy_(*local_parts([state[name]]))
                elif name == MASTER:
                    view.copy_(part)
            if self.sharded and name != "step":
                self.views[name] = list(map(laid_out_as, self.params, self.views[name]))
            for view, state in zip(self.views[name], self.states, strict=True):
                state[name] = view

    def unchanged(self) -> bool:
        """Whether the state's entries are still the views, and the parameters' layouts the same."""
        return (
            bool(self.group["amsgrad"]) == self.amsgrad
            and self._holds_the_views()
            and self._in_place()
        )

    def _holds_the_views(self) -> bool:
        # Dicts with the same objects as values are equal. This comparison takes a third of the time
        # of the three passes below. If an object differs, it would compare tensors and raises.
        try:
            with _NoComparison():
                if self.states == self._copies:
                    return True
        except (TypeError, ValueError, RuntimeError):
            pass  # an entry cannot be compared; the passes below compare the views
        same = all(
            all(map(is_, map(dict.get, self.states, repeat(name)), views))
            for name, views in self.views.items()
        )
        if same:  # another entry of the state changed
            self._copies = list(map(dict, self.states))
        return same

    def _in_place(self) -> bool:
        if self._dtypes is not None and list(map(_dtype_of, self.params)) != self._dtypes:
            return False  # a parameter may have got, or lost, the need of a master
        if self.sharded:  # to_local returns new tensors, and FSDP may have moved the shards
            before, self._parts = self._parts, local_parts(self.params)
            return list(map(_layout, before)) == list(map(_layout, self._parts))
        # Contiguity and the number of elements suffice, in half the time of the strides.
        return (
            all(map(Tensor.is_contiguous, self._contiguous))
            and list(map(Tensor.numel, self._contiguous)) == self._numels
            and list(map(_layout, self._others)) == self._layouts
        )

    def grads(self) -> list[Tensor | None]:
        if self.sharded:
            lay_out_(self.params)
        return list(map(grad_of, self.params))

    def step(
        self,
        grads: list[Tensor],
        decision: tuple[Tensor, Tensor],
        options: ops.AdamwOptions,
        only_check: bool = False,
    ) -> None:
        params = self._parts
        grads = local_parts(grads) if self.sharded else grads
        state = (*(self._packs[name] for name in MOMENTS), self._packs["step"])
        master = self._packs[MASTER] if MASTER in self._entries else None
        try:
            if self.complex:
                params, grads = _real(params), _real(grads)
            step = ops.check_adamw if only_check else ops.adamw_
            step(params, grads, *state, *decision, *options, master)
            if self.sharded:  # the version of a DTensor does not count writes to its shard
                ops.count_writes(self.params)
        except RuntimeError:
            check_dense(grads)
            raise

    def options(self) -> ops.AdamwOptions:
        """The group's options for :func:`fastguard.ops.adamw_`.

        Raises:
            ValueError: an option is NaN, infinite or too large for float32.
        """
        group = self.group
        beta1, beta2 = map(float, group["betas"])
        options = ops.AdamwOptions(
            lr=float(group["lr"]),
            beta1=beta1,
            beta2=beta2,
            weight_decay=float(group["weight_decay"]),
            eps=float(group["eps"]),
            decoupled_weight_decay=bool(group["decoupled_weight_decay"]),
            amsgrad=bool(group["amsgrad"]),
            maximize=bool(group["maximize"]),
        )
        if not all(abs(option) <= LARGEST_OPTION for option in options[:5]):
            values = options._asdict()
            check_group(self.number, values | {"betas": (beta1, beta2)})
        return options


def _problem(
    p: Tensor, state: dict[str, Tensor], names: tuple[str, ...], written: set[int]
) -> str | None:
    """A message about present state that does not fit ``p``; None if it fits.

    Args:
        written: ids of the tensors that an earlier step wrote. Their values are not checked.
    """
    for name in ("step", *names):
        shape, dtype = p.shape, moment_dtype(p)
        if name == "step":
            shape, dtype = torch.Size(), torch.float32
        if name in state:
            entry = state[name]
            found = type(entry).__name__
            if isinstance(entry, Tensor):
                if entry.shape == shape and entry.dtype == dtype:
                    if name == "step" or _placed(entry) == _placed(p):
                        # A check of state on a GPU would be a host-device sync.
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


def laid_out_as(p: Tensor, part: Tensor) -> Tensor:
    """``part`` itself; if ``p`` is a DTensor, a DTensor with ``part`` as its shard on this rank."""
    if not is_dtensor(p):
        return part
    # DTensor.from_local would move an offloaded shard to the device of the mesh.
    whole = torch.empty_like(p, dtype=part.dtype)
    whole.to_local().set_(part)
    return whole


def _layout(p: Tensor) -> tuple[torch.Size, tuple[int, ...]]:
    return p.shape, p.stride()


def shares_memory(value: object) -> bool:
    """Whether a tensor, or the shard of a DTensor, is a part of a larger storage."""
    if is_dtensor(value):
        return shares_memory(value.to_local())
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.untyped_storage().nbytes() > value.numel() * value.element_size()
    )


def fresh_state(p: Tensor, amsgrad: bool) -> dict[str, Tensor]:
    """The state of a parameter before its first step, without a master."""
    moments = MOMENTS if amsgrad else MOMENTS[:2]
    zeros = {name: torch.zeros_like(p, dtype=moment_dtype(p)) for name in moments}
    return {"step": torch.zeros((), dtype=torch.float32, device=p.device), **zeros}


def leave_pack(state: dict[str, Tensor]) -> None:
    """Clone the state of an idle parameter: a view would keep the whole old pack in memory."""
    for name in ("step", *ENTRIES):
        if shares_memory(state.get(name)):
            state[name] = state[name].clone()


def check_dense(grads: list[Tensor]) -> None:
    if any(grad.layout is not torch.strided for grad in grads):
        raise RuntimeError(_SPARSE)


def _real(tensors: list[Tensor]) -> list[Tensor]:
    return [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in tensors]


def moment_dtype(p: Tensor) -> torch.dtype:
    return torch.promote_types(p.dtype, torch.float32)
