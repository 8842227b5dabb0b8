"""Hooks that record each module's inputs, outputs and gradients in one training step."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastguard.attention import AttentionStats
from fastguard.attention.module import ClampedMultiheadAttention

from .summary import Summary, merge, readable, summarize, tensors_in, with_tensors

ROOT = "(model)"  # stands for the model itself, whose name is empty
RECTIFIERS = (nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.Threshold, nn.RReLU, nn.Hardswish)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_WIDER = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float32: torch.float64,
}


@dataclass(eq=False)
class Call:
    """One call of one module. A summary is None if there was no tensor to summarize."""

    name: str
    module: nn.Module
    parent: Call | None
    inputs: Summary | None = None
    outputs: Summary | None = None
    #: Gradient of the loss with respect to the outputs. It enters the module in backward.
    entering: Summary | None = None
    #: Gradient of the loss with respect to the inputs, through this module alone.
    leaving: Summary | None = None
    #: The call's position in the order of the backward pass.
    entered: int | None = None
    #: (C,) bool: whether all outputs of the channel are zero.
    silent: Tensor | None = None
    #: (C,) bool: whether the gradients of all outputs of the channel are zero.
    zero_grad_channels: Tensor | None = None
    #: The number of outputs per channel.
    positions: int = 0
    #: BatchNorm: the variance of each channel, (C,), which the module divides by.
    variances: Tensor | None = None
    #: BatchNorm: the number of values per channel.
    values: int = 0
    attention: AttentionStats | None = None
    # Gradient of the loss with respect to the inputs, through all their users: see Probe._tap.
    _reaching: Summary | None = field(default=None, repr=False)
    _versions: list[tuple[Tensor, int]] = field(default_factory=list, repr=False)
    #: Whether the module wrote its inputs in place.
    _in_place: bool = False


@dataclass(frozen=True)
class ForwardOrigin:
    """The origin of the first NaN or Inf of the forward pass."""

    #: "input": the input was not finite. "parameter": a parameter or buffer was not finite.
    #: "computed": the module computed it from finite values.
    kind: str
    #: The module that computed the value or got it as its input.
    name: str
    module: nn.Module
    found: Summary
    #: The module's finite inputs.
    inputs: Summary | None = None
    #: The submodule that got the value first, if `name` computed it between its submodules.
    met_by: str | None = None
    #: Parameters and buffers of the module that were not finite before the forward pass.
    poisoned: tuple[str, ...] = ()
    #: The module's result in the next wider dtype; None if it could not be computed.
    wider: Summary | None = None


class Probe:
    """Records the calls of `model`'s modules inside its context. No hook stays afterwards."""

    def __init__(self, model: nn.Module):
        self.names = {module: name or ROOT for name, module in model.named_modules()}
        #: Parameters and buffers that were not finite before the forward pass.
        self.poisoned = poisoned_tensors(model)
        self.calls: list[Call] = []
        self.origin: ForwardOrigin | None = None
        self.backward = False  # in backward, activation checkpointing calls modules again
        self._open: list[tuple[Call, tuple, dict]] = []
        self._entered = 0
        self._paused = False
        self._stack = contextlib.ExitStack()  # removes the hooks
        self._origin_of: Call | None = None
        #: The last layer with channels: number of dimensions, index of the channels from the end.
        self._channels: tuple[int, int] | None = None

    def __enter__(self) -> Probe:
        with contextlib.ExitStack() as stack:
            for module in self.names:
                if isinstance(module, torch.jit.ScriptModule):
                    continue
                before = module.register_forward_pre_hook(self._before, with_kwargs=True)
                stack.callback(before.remove)
                after = module.register_forward_hook(self._after, with_kwargs=True)
                stack.callback(after.remove)
                if isinstance(module, ClampedMultiheadAttention):
                    stack.callback(_set_statistics, module, module.record_stats, module.stats)
                    module.record_stats = True
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc) -> None:
        self._stack.close()
        for call in self.calls:
            if call.leaving is None and call._in_place:
                call.leaving = call._reaching

    # --- forward --------------------------------------------------------------------------------

    def _before(self, module: nn.Module, args: tuple, kwargs: dict):
        if self._paused:
            return None
        call = Call(self.names[module], module, self._open[-1][0] if self._open else None)
        if not self.backward:
            self.calls.append(call)
            call.inputs = summarize(_without_masks(args, kwargs))
            if isinstance(module, _BatchNorm):
                call.variances, call.values = _variances(module, args)
            if self.origin is None and call.inputs is not None and not call.inputs.finite:
                self._trace_input(call, (args, kwargs))
        elif known := [c for c in self.calls if c.module is module and c.entering is None]:
            call = known[-1]  # checkpointing recomputes the last of several calls first
        self._open.append((call, args, kwargs))
        memo: dict[int, Tensor] = {}  # equal inputs stay one object: attention tests query is key
        tap = partial(self._tap, call, memo)
        return with_tensors(args, tap), with_tensors(kwargs, tap)

    def _after(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        if self._paused:
            return
        while self._open[-1][0].module is not module:  # such a call raised, and the model caught it
            self._open.pop()
        call, args, kwargs = self._open.pop()
        call._in_place = any(x._version != version for x, version in call._versions)
        call._versions.clear()
        if not self.backward:
            call.outputs = summarize(tensors_in(output))
            if (index := self._channel_index(module, output)) is not None:
                call.silent = _all_zero(output, index)
                call.positions = output.numel() // output.size(index)
            _read_attention(call)
            if call.outputs is not None and not call.outputs.finite and self.origin is None:
                found = (call.outputs, call.inputs)
                self.origin = self._computed(call, *found, wider=self._wider(call, args, kwargs))
            elif call is self._origin_of and self.origin.kind == "computed":
                wider = self._wider(call, args, kwargs)
                self.origin = self._computed(
                    call, self.origin.found, call.inputs, self.origin.met_by, wider
                )
        index = self._channel_index(module, output)
        for tensor in tensors_in(output):
            if readable(tensor) and tensor.requires_grad and torch.is_grad_enabled():
                handle = tensor.register_hook(partial(self._enter, call, index))
                self._stack.callback(handle.remove)

    def _trace_input(self, call: Call, arguments: tuple) -> None:
        """Set the origin: the inputs of `call` are the first values that are not finite."""
        parent = call.parent
        given = parent is None or (
            # The parent's arguments hide their tensors from tensors_in.
            parent.inputs is None and not any(x.requires_grad for x in tensors_in(arguments))
        )
        if given:
            self.origin = ForwardOrigin("input", call.name, call.module, call.inputs)
        else:
            self._origin_of = parent
            self.origin = self._computed(parent, call.inputs, parent.inputs, met_by=call.name)

    def _computed(
        self,
        call: Call,
        found: Summary,
        inputs: Summary | None,
        met_by: str | None = None,
        wider: Summary | None = None,
    ) -> ForwardOrigin:
        inside = "" if call.name == ROOT else f"{call.name}."
        poisoned = tuple(name for name in self.poisoned if name.startswith(inside))
        kind = "parameter" if poisoned else "computed"
        return ForwardOrigin(kind, call.name, call.module, found, inputs, met_by, poisoned, wider)

    @torch.no_grad()
    def _wider(self, call: Call, args: tuple, kwargs: dict) -> Summary | None:
        """The result of the same call in a wider dtype; None if it cannot be computed."""
        found = call.outputs or call.inputs
        wide = _WIDER.get(found.dtype if found else None)
        # A module that works in place has overwritten its inputs.
        if wide is None or call._in_place:
            return None

        def widen(x: Tensor) -> Tensor:
            return x.detach().to(wide, copy=True) if x.is_floating_point() else x.detach().clone()

        state = dict(call.module.named_parameters()) | dict(call.module.named_buffers())
        state = {name: widen(tensor) for name, tensor in state.items()}
        device = next((x.device.type for x in tensors_in((args, kwargs))), "cpu")
        self._paused = True
        try:
            with _same_draws(), torch.autocast(device, enabled=False):
                args, kwargs = with_tensors(args, widen), with_tensors(kwargs, widen)
                output = torch.func.functional_call(call.module, state, args, kwargs)
            return summarize(tensors_in(output))
        except Exception:  # the module may support only its dtype; the finding has fewer numbers
            return None
        finally:
            self._paused = False

    # --- backward -------------------------------------------------------------------------------

    def _tap(self, call: Call, memo: dict[int, Tensor], x: Tensor) -> Tensor:
        """A view of `x`: its gradient is that through this call, without other users of `x`.

        An operation in place on the view bypasses the view's hook. The hook of `x` records the
        gradient in this case (`_reaching`).
        """
        if not readable(x):
            return x
        if id(x) not in memo:
            memo[id(x)] = x
            if not x.is_inference():
                call._versions.append((x, x._version))
            if x.requires_grad and torch.is_grad_enabled():
                handle = x.register_hook(partial(self._reach, call))
                self._stack.callback(handle.remove)
                memo[id(x)] = x.view_as(x)
                memo[id(x)].register_hook(partial(self._leave, call))
        return memo[id(x)]

    def _reach(self, call: Call, gradient: Tensor) -> None:
        call._reaching = merge(call._reaching, summarize([gradient]))

    def _leave(self, call: Call, gradient: Tensor) -> None:
        call.leaving = merge(call.leaving, summarize([gradient]))

    def _enter(self, call: Call, index: int | None, gradient: Tensor) -> None:
        call.entering = merge(call.entering, summarize([gradient]))
        if call.entered is None:
            call.entered = self._entered
            self._entered += 1
        if index is not None and readable(gradient) and gradient.dim() >= -index:
            call.zero_grad_channels = _all_zero(gradient, index)

    # --- channels -------------------------------------------------------------------------------

    def _channel_index(self, module: nn.Module, output: Any) -> int | None:
        """Index of the channel dimension, from the end; None if it is not known."""
        if not readable(output) or output.numel() == 0:
            return None
        dims = output.dim()
        if isinstance(module, RECTIFIERS):  # the channels are those of the layer before
            same = self._channels is not None and self._channels[0] == dims
            return self._channels[1] if same else -1 if dims <= 2 else None
        width, index = _width(module, dims)
        if width is None:
            return None
        for candidate in (index, -1):  # the output of a convolution may have its channels last
            if -dims <= candidate and output.size(candidate) == width:
                self._channels = dims, candidate
                return candidate
        return None


def _width(module: nn.Module, dims: int) -> tuple[int | None, int]:
    """The number of channels and the index of their dimension, by the convention of the layer."""
    if isinstance(module, nn.Linear):
        return module.out_features, -1
    if isinstance(module, _CONVOLUTIONS):
        return module.out_channels, -1 - len(module.kernel_size)
    if isinstance(module, _BatchNorm):
        return module.num_features, min(1 - dims, -1)
    return None, -1


def _all_zero(tensor: Tensor, index: int) -> Tensor:
    """Whether all elements of each channel are zero, (C,) bool."""
    others = [i for i in range(tensor.dim()) if i != tensor.dim() + index]
    zero = tensor.detach() == 0
    return zero.all(dim=others) if others else zero


def poisoned_tensors(module: nn.Module) -> dict[str, Summary]:
    """The parameters and buffers that are not finite. A buffer that is a mask does not count."""
    found = {}
    for name, x in (*module.named_parameters(), *module.named_buffers()):
        known = not nn.parameter.is_lazy(x) and readable(x)
        if known and not x.isfinite().all() and not mask(x):
            found[name] = summarize([x])
    return found


def mask(x: Tensor) -> bool:
    """Whether `x` is an attention mask: it has -Inf, no NaN, no +Inf, and requires no gradient."""
    if not readable(x) or x.is_complex() or x.requires_grad:
        return False
    if not (x == -torch.inf).any():
        return False
    return not (x.isnan() | (x == torch.inf)).any()


def _without_masks(args: tuple, kwargs: dict) -> list[Tensor]:
    """The tensors in a module's arguments, without masks. The first tensor is no mask."""
    first, *others = [*tensors_in((args, kwargs))] or [None]
    return [x for x in (first, *others) if x is not None and (x is first or not mask(x))]


@torch.no_grad()
def _variances(module: _BatchNorm, args: tuple) -> tuple[Tensor | None, int]:
    """The variance of each channel, (C,) float64, and the number of values per channel."""
    x = next((x for x in args if readable(x)), None)
    if x is None or x.dim() < 2:
        return None, 0
    rows = x.detach().to(torch.float64).transpose(0, 1).flatten(1)  # (C, N)
    # A bool argument of shape (B, T) beside (B, C, T) is true for frames of padding.
    shape = (x.size(0), *x.shape[2:])
    for other in args:
        if isinstance(other, Tensor) and other.dtype == torch.bool and other.shape == shape:
            rows = rows[:, ~other.flatten()]
    if not module.training and module.running_var is not None:
        return module.running_var.detach().to(torch.float64).clone(), rows.size(1)
    return rows.var(dim=1, correction=0), rows.size(1)


def _read_attention(call: Call) -> None:
    if isinstance(call.module, ClampedMultiheadAttention):
        call.attention = call.module.stats


def _set_statistics(module: ClampedMultiheadAttention, record: bool, stats) -> None:
    module.record_stats, module.stats = record, stats


@contextlib.contextmanager
def _same_draws():
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices):
        yield
