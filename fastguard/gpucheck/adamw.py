"""adamw_ against its reference in float64, with errors in units of the possible rounding."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fastguard import ops
from fastguard.ops import DTYPES, Verdict

from .cases import SENTINEL, Grid, Spec, draw, lists, on_cpu, place
from .checks import Case, Compared, same_bits, untouched_around

#: The allowed errors of a moment, and of a parameter with the dtype of the moments.
MOMENT_ULPS, PARAMETER_ULPS = 4.0, 8.0
_NARROW = (torch.bfloat16, torch.float16)
#: The allowed error of a 16-bit parameter: its rounding from a value with a much smaller error.
NARROW_ULPS = 1.0


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of a step, in the operator's order, then the other inputs of the case."""

    lr: float = 1e-2
    beta1: float = 0.9
    beta2: float = 0.98
    weight_decay: float = 0.1
    eps: float = 1e-8
    decoupled_weight_decay: bool = True
    amsgrad: bool = False
    maximize: bool = False
    coef: float | None = 0.3  # None: one coefficient for each parameter
    step: float = 3.0
    verdict: int = Verdict.CLIP
    grads: str = "as the parameters"  # or "float32"
    masters: bool = False  # for 16-bit parameters alone; some are not their rounded masters

    def numbers(self) -> tuple:
        return tuple(getattr(self, f.name) for f in dataclasses.fields(self))[:8]

    def __str__(self) -> str:
        default = Options()
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        other = {k: v for k, v in given.items() if v != getattr(default, k)}
        return ", ".join(f"{k}={v!r}" for k, v in other.items()) or "default options"


def adamw_(device: torch.device, grid: Grid) -> Iterator[Case]:
    for name, specs in lists(grid, extremes=False, expanded=False):
        for each in (Options(), Options(grads="float32", coef=None)):
            yield from _cases(name, specs, each, device)
    flags = ("amsgrad", "maximize", "decoupled_weight_decay")
    few = [Spec((size,), dtype) for dtype in DTYPES for size in (1, 65, 8193)]
    few += [Spec((3, 2731), dtype, "transposed") for dtype in DTYPES]
    for chosen in itertools.product([False, True], repeat=3):
        for weight_decay, step in ((0.0, 0.0), (0.1, 1000.0)):
            each = dict(zip(flags, chosen, strict=True))
            options = Options(**each, weight_decay=weight_decay, step=step)
            yield from _cases("16 tensors", few, options, device)
    narrow = [spec for spec in few if spec.dtype in _NARROW]
    for amsgrad, grads in itertools.product([False, True], ["as the parameters", "float32"]):
        options = Options(masters=True, amsgrad=amsgrad, grads=grads)
        yield from _cases("8 tensors with masters", narrow, options, device)
    large = [Spec((65,), torch.float32, magnitude="largest"), Spec((8193,), torch.float32)]
    yield from _cases("gradients of 4e37", large, Options(coef=1e-37), device)
    for verdict in (Verdict.SKIP_NONFINITE, Verdict.SKIP_OUTLIER, 77, -1):
        for coef in (1.0, math.nan):
            options = Options(verdict=int(verdict), coef=coef, amsgrad=True)
            yield from _cases("a skip", few, options, device, run=_skip)
            options = dataclasses.replace(options, masters=True)
            yield from _cases("a skip with masters", narrow, options, device, run=_skip)


def _cases(name, specs, options, device, run=None) -> Iterator[Case]:
    """One call for float64 parameters and one for the others: a call has one dtype of moments."""
    for wide in (False, True):
        some = [spec for spec in specs if (spec.dtype == torch.float64) == wide]
        if some or not (specs or wide):
            kind = "float64 of " if wide and len(some) < len(specs) else ""
            yield Case(
                f"{kind}{name}; {options}",
                functools.partial(run or _step, some, wide, options, device),
            )


class State:
    """The operator's tensors on a device in the middle of a training, and a copy in float64."""

    def __init__(self, specs: list[Spec], wide: bool, options: Options, device: torch.device):
        generator = torch.Generator().manual_seed(len(specs) + 1)
        dtype = torch.float64 if wide else torch.float32
        calm = [spec._replace(magnitude="1") for spec in specs]
        params = [draw(spec, generator) for spec in calm]
        grad_dtype = dtype if options.grads == "float32" else None
        grads = [draw(s._replace(dtype=grad_dtype or s.dtype), generator) for s in specs]
        moments = [[draw(s._replace(dtype=dtype), generator) for s in calm] for _ in range(3)]
        # Second moments near 0 would make the quotient of the moments inexact.
        moments[1:] = [[v.square() + 0.01 for v in some] for some in moments[1:]]
        if not options.amsgrad:
            moments[2] = []
        steps = torch.tensor([options.step + i % 3 for i in range(len(specs))])
        n = len(specs)
        coef = torch.rand(n, generator=generator, dtype=torch.float64)
        coef = coef if options.coef is None else torch.tensor(options.coef, dtype=torch.float64)

        masters = [draw(s._replace(dtype=torch.float32), generator) for s in calm]
        right_params = params
        if options.masters:
            for p, master in list(zip(params, masters, strict=True))[::2]:
                p.copy_(master)
            right_params = list(map(ops.current_master, params, masters))
        self.right = _float64_arguments(right_params, grads, moments, steps, coef)
        self.params = [place(p, s.layout, device) for p, s in zip(params, specs, strict=True)]
        # Every second gradient has another memory layout than its parameter.
        self.grads = [
            place(g, s.layout if i % 2 else "contiguous", device)
            for i, (g, s) in enumerate(zip(grads, specs, strict=True))
        ]
        at_hand = [part.tensor for part in self.params]
        packs = [_pack(at_hand, some, dtype, device) for some in moments]
        self.master = _pack(at_hand, masters, dtype, device) if options.masters else None
        verdict = torch.tensor(int(options.verdict), device=device)
        self.arguments = (
            *(at_hand, [part.tensor for part in self.grads]),
            *(*packs, steps.to(device), coef.to(device), verdict),
        )
        self.numbers = (*options.numbers(), self.master)

    def unpacked(self, pack: Tensor) -> list[Tensor]:
        params = self.arguments[0]
        offsets = ops.packed_offsets(p.numel() for p in params)
        return on_cpu(list(map(ops.packed_view, [pack] * len(params), params, offsets)))


def _pack(params, moments, dtype, device) -> Tensor:
    offsets = ops.packed_offsets(p.numel() for p in params)
    size = offsets[-1] if moments or not params else 0
    pack = torch.full((size,), SENTINEL, dtype=dtype, device=device)
    for p, moment, offset in zip(params, moments, offsets, strict=False):
        ops.packed_view(pack, p, offset).copy_(moment)
    return pack


def _float64_arguments(params, grads, moments, steps, coef) -> tuple:
    params, grads = ([t.double() for t in some] for some in (params, grads))
    dtype = torch.float64 if params else torch.float32  # what the operator takes for none
    packs = [_pack(params, some, dtype, "cpu") for some in moments]
    return params, grads, *packs, steps.clone(), coef, torch.tensor(int(Verdict.APPLY))


def _step(specs, wide, options, device) -> Iterator[Compared]:
    state = State(specs, wide, options, device)
    grads = [g.clone() for g in state.arguments[1]]
    ulps = _ulps(state, options, torch.finfo(torch.float64 if wide else torch.float32))
    ops.adamw_(*state.arguments, *state.numbers)
    ops.adamw_ref_(*state.right, *options.numbers())
    params, _, m, v, v_max, steps = state.arguments[:6]
    right_params, _, *packs, right_steps = state.right[:6]
    yield Compared("state_steps", steps, right_steps)
    yield from same_bits("gradient", state.arguments[1], grads)
    names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    for name, pack, right in zip(names, (m, v, v_max), packs, strict=True):
        if len(pack):
            views = zip(state.unpacked(pack), _views(right, right_params), strict=True)
            for i, (found, expected) in enumerate(views):
                ulp = ulps[name][i]
                yield Compared(f"{name} of parameter {i}", found, expected, MOMENT_ULPS, ulp)
    for i, (p, expected) in enumerate(zip(params, right_params, strict=True)):
        narrow = p.dtype in _NARROW
        allowed = NARROW_ULPS if narrow else PARAMETER_ULPS
        ulp = _parameter_ulp(p.dtype, expected, ulps["move"][i], narrow)
        yield Compared(f"parameter {i}, {specs[i]}", p, expected, allowed, ulp)
    if state.master is not None:
        masters = state.unpacked(state.master)
        for i, (master, expected) in enumerate(zip(masters, right_params, strict=True)):
            ulp = ulps["move"][i]
            yield Compared(f"master of parameter {i}", master, expected, PARAMETER_ULPS, ulp)
        rounded = [m.to(p.dtype) for m, p in zip(masters, params, strict=True)]
        yield from same_bits("parameter, its rounded master", on_cpu(params), rounded)
    yield from untouched_around(state.params + state.grads)
    yield from _gaps(state)


def _views(pack, params) -> list[Tensor]:
    offsets = ops.packed_offsets(p.numel() for p in params)
    return list(map(ops.packed_view, [pack] * len(params), params, offsets))


def _ulps(state: State, o: Options, limits: torch.finfo) -> dict[str, list[Tensor]]:
    """One ulp of the terms of each result, because the terms of a sum may cancel."""
    params, grads, m, v, v_max, steps, coef, _ = state.right
    result = {"exp_avg": [], "exp_avg_sq": [], "max_exp_avg_sq": [], "move": []}
    moments = zip(_views(m, params), _views(v, params), strict=True)
    largest = _views(v_max, params) if o.amsgrad else itertools.repeat(0.0)
    coefs = coef.expand(len(params))
    for p, g, (m, v), v_max, c, t in zip(
        params, grads, moments, largest, coefs, steps + 1, strict=False
    ):
        g = (g * c).abs() + (0.0 if o.decoupled_weight_decay else o.weight_decay * p.abs())
        mean = o.beta1 * m.abs() + (1 - o.beta1) * g
        square = o.beta2 * v + (1 - o.beta2) * g * g
        root = ((square if not o.amsgrad else square.maximum(v_max)) / (1 - o.beta2**t)).sqrt()
        move = p.abs() + o.lr * (mean / (1 - o.beta1**t) / (root + o.eps))
        result["exp_avg"].append(limits.eps * mean.clamp(min=limits.smallest_normal))
        result["exp_avg_sq"].append(limits.eps * square.clamp(min=limits.smallest_normal))
        result["max_exp_avg_sq"].append(limits.eps * square.maximum(torch.as_tensor(v_max)))
        result["move"].append(limits.eps * move)
    return result


def _parameter_ulp(dtype, expected, move, narrow) -> Tensor:
    """The rounding error of the computation, plus one ulp of the parameter's dtype if `narrow`."""
    limits = torch.finfo(dtype)
    own = limits.eps * expected.abs().clamp(min=limits.smallest_normal)
    return own + PARAMETER_ULPS * move if narrow else move


def _skip(specs, wide, options, device) -> Iterator[Compared]:
    state = State(specs, wide, options, device)
    params, grads, *others = state.arguments[:6]
    others += [] if state.master is None else [state.master]
    for tensor in [*params, *others]:
        if tensor.dim() == 1 and tensor.numel() > 3:  # a skip must keep earlier NaNs and Infs too
            tensor[:3] = torch.tensor([math.nan, math.inf, -math.inf]).to(tensor)
    everything = [*params, *grads, *others]
    before = [t.clone() for t in everything]
    ops.adamw_(*state.arguments, *state.numbers)
    yield from same_bits("tensor", everything, before)
    yield from untouched_around(state.params + state.grads)


def _gaps(state: State) -> Iterator[Compared]:
    """The gaps between the moments of two parameters, which a step must not write."""
    params = state.arguments[0]
    offsets = ops.packed_offsets(p.numel() for p in params)
    packs = [*state.arguments[2:5], *([] if state.master is None else [state.master])]
    for pack in packs:
        for i, p in enumerate(params if len(pack) else []):
            gap = pack[offsets[i] + p.numel() : offsets[i + 1]].cpu()
            yield Compared(f"gap after parameter {i}", gap, torch.full_like(gap, SENTINEL))
