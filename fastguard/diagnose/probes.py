"""What every module of a model sees in one forward and one backward pass."""

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

ROOT = "(model)"  # the name of the model itself, which has none
RECTIFIERS = (nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.Threshold, nn.RReLU, nn.Hardswish)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_WIDER = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float32: torch.float64,
}


@dataclass(eq=False)
class Call:
    """One call of one module. Summaries are None where there was nothing to read."""

    name: str
    module: nn.Module
    parent: Call | None
    inputs: Summary | None = None
    outputs: Summary | None = None
    #: Gradient of the loss by the outputs: what enters the module in backward.
    entering: Summary | None = None
    #: Gradient of the loss by the inputs, as far as it came through this module.
    leaving: Summary | None = None
    #: Place among the calls in the order of backward.
    entered: int | None = None
    #: For each channel, whether all its outputs are zero, and whether their gradients are.
    silent: Tensor | None = None
    zero_grad_channels: Tensor | None = None
    #: Of how many values each.
    positions: int = 0
    #: BatchNorm: the variance of each channel that it divides by, and of how many values.
    variances: Tensor | None = None
    values: int = 0
    attention: AttentionStats | None = None
    # Of the original inputs, by all that uses them: see Probe._tap.
    _reaching: Summary | None = field(default=None, repr=False)
    _versions: list[tuple[Tensor, int]] = field(default_factory=list, repr=False)
    #: Whether the module wrote over what it was given.
    _in_place: bool = False


@dataclass(frozen=True)
class ForwardOrigin:
    """Where the first value that is not finite came from in forward."""

    #: "input": it was given; "parameter": from a parameter or buffer that is not finite;
    #: "computed": by the module, from finite values.
    kind: str
    #: The module; of a value that was given, the module that it was given to.
    name: str
    module: nn.Module
    found: Summary
    #: The module's finite inputs.
    inputs: Summary | None = None
    #: The module that met the value first, if it was computed between two modules of `name`.
    met_by: str | None = None
    #: Parameters and buffers of the module that were not finite before.
    poisoned: tuple[str, ...] = ()
    #: Its result in the next wider dtype; None where that could not be computed.
    wider: Summary | None = None


class Probe:
    """Watches the modules of `model` while it is entered; leaves no hook behind."""

    def __init__(self, model: nn.Module):
        self.names = {module: name or ROOT for name, module in model.named_modules()}
        #: Parameters and buffers that were not finite before the forward pass wrote any.
        self.poisoned = poisoned_tensors(model)
        self.calls: list[Call] = []
        self.origin: ForwardOrigin | None = None
        self.backward = False  # modules called now are recomputed, by activation checkpointing
        self._open: list[tuple[Call, tuple, dict]] = []
        self._entered = 0
        self._paused = False
        self._stack = contextlib.ExitStack()  # of the hooks that are to be removed
        self._origin_of: Call | None = None
        self._channels: tuple[int, int] | None = None  # dimensions, channel's index from the end

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
            call = known[-1]  # of several calls the last is recomputed first
        self._open.append((call, args, kwargs))
        memo: dict[int, Tensor] = {}  # attention asks whether its query is its key
        tap = partial(self._tap, call, memo)
        return with_tensors(args, tap), with_tensors(kwargs, tap)

    def _after(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        if self._paused:
            return
        while self._open[-1][0].module is not module:  # left by an exception that was caught
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
        """The inputs of `call` are not finite, and nothing was before."""
        parent = call.parent
        given = parent is None or (
            # The parent was given something that hides its tensors.
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
        """The result of the same call, computed in a wider dtype."""
        found = call.outputs or call.inputs
        wide = _WIDER.get(found.dtype if found else None)
        # An operation in place has written over what the call was given.
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
        except Exception:  # a module may insist on its dtype; the diagnosis then says less
            return None
        finally:
            self._paused = False

    # --- backward -------------------------------------------------------------------------------

    def _tap(self, call: Call, memo: dict[int, Tensor], x: Tensor) -> Tensor:
        """A view of `x` whose gradient is the one that came through this call alone.

        An operation in place on it would go by the view, and through `x`, whose hook serves then.
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
        """Dimension of the channels, from the end; None where it is not known."""
        if not readable(output) or output.numel() == 0:
            return None
        dims = output.dim()
        if isinstance(module, RECTIFIERS):  # those of the layer before
            same = self._channels is not None and self._channels[0] == dims
            return self._channels[1] if same else -1 if dims <= 2 else None
        width, index = _width(module, dims)
        if width is None:
            return None
        for candidate in (index, -1):  # a convolution may keep its channels last
            if -dims <= candidate and output.size(candidate) == width:
                self._channels = dims, candidate
                return candidate
        return None


def _width(module: nn.Module, dims: int) -> tuple[int | None, int]:
    """Number of channels and their dimension, by the convention of the layer."""
    if isinstance(module, nn.Linear):
        return module.out_features, -1
    if isinstance(module, _CONVOLUTIONS):
        return module.out_channels, -1 - len(module.kernel_size)
    if isinstance(module, _BatchNorm):
        return module.num_features, min(1 - dims, -1)
    return None, -1


def _all_zero(tensor: Tensor, index: int) -> Tensor:
    """(C,) bool."""
    others = [i for i in range(tensor.dim()) if i != tensor.dim() + index]
    zero = tensor.detach() == 0
    return zero.all(dim=others) if others else zero


def poisoned_tensors(module: nn.Module) -> dict[str, Summary]:
    """The parameters and buffers that are not finite. A buffer with -Inf is a mask."""
    found = {}
    for name, x in (*module.named_parameters(), *module.named_buffers()):
        known = not nn.parameter.is_lazy(x) and readable(x)
        if known and not x.isfinite().all() and not mask(x):
            found[name] = summarize([x])
    return found


def mask(x: Tensor) -> bool:
    """Whether -Inf says in it what is hidden: no gradient, no NaN and no +Inf."""
    if not readable(x) or x.is_complex() or x.requires_grad:
        return False
    if not (x == -torch.inf).any():
        return False
    return not (x.isnan() | (x == torch.inf)).any()


def _without_masks(args: tuple, kwargs: dict) -> list[Tensor]:
    """The tensors given to a module, less those behind the first that mask what is hidden."""
    first, *others = [*tensors_in((args, kwargs))] or [None]
    return [x for x in (first, *others) if x is not None and (x is first or not mask(x))]


@torch.no_grad()
def _variances(module: _BatchNorm, args: tuple) -> tuple[Tensor | None, int]:
    """Of each channel, in float64, and the number of values that it was taken of."""
    x = next((x for x in args if readable(x)), None)
    if x is None or x.dim() < 2:
        return None, 0
    rows = x.detach().to(torch.float64).transpose(0, 1).flatten(1)  # (C, N)
    # A mask (B, T) beside (B, C, T) says which frames are padding.
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
