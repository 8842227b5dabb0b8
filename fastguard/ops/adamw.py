"""``adamw_``: one Adam or AdamW step that takes the guard's decision."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import _library
from ._checks import check_same_device, check_writable, overlaps_itself
from .packed import packed_offsets, packed_view
from .types import DTYPES, Verdict


class AdamwOptions(NamedTuple):
    """The last arguments of the operator ``adamw_``, which are the same for all parameters."""

    lr: float
    beta1: float
    beta2: float
    weight_decay: float
    eps: float
    decoupled_weight_decay: bool
    amsgrad: bool
    maximize: bool


class AdamwArguments(NamedTuple):
    """The arguments of the operator ``adamw_``, in the order of its schema; see :func:`adamw_`."""

    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    exp_avg: Tensor
    exp_avg_sq: Tensor
    max_exp_avg_sq: Tensor
    state_steps: Tensor
    grad_coef: Tensor
    verdict: Tensor
    lr: float
    beta1: float
    beta2: float
    weight_decay: float
    eps: float
    decoupled_weight_decay: bool
    amsgrad: bool
    maximize: bool
    master_param: Tensor | None = None


@torch.no_grad()
def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor,
    state_steps: Tensor,
    grad_coef: Tensor,
    verdict: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    eps: float,
    decoupled_weight_decay: bool,
    amsgrad: bool,
    maximize: bool,
    master_param: Tensor | None = None,
) -> None:
    """One Adam or AdamW step of N parameters, unless the verdict is a skip.

    ::

        if verdict not in (Verdict.APPLY, Verdict.CLIP):
            return                                          # nothing is written, bit for bit
        for each parameter p with its gradient, m, v, v_max and step t:
            t += 1
            g = gradient * grad_coef                        # the product in float64
            g = -g if maximize else g
            g = g if decoupled_weight_decay else g + weight_decay * p
            m = beta1 * m + (1 - beta1) * g
            v = beta2 * v + (1 - beta2) * g * g
            v_max = max(v_max, v) if amsgrad else v
            decay = lr * weight_decay * p if decoupled_weight_decay else 0
            p -= decay + lr / (1 - beta1**t) * m / (sqrt(v_max / (1 - beta2**t)) + eps)

    The arithmetic is in float32, in float64 for float64 parameters. The bias corrections are in
    float64. Gradients are only read. The result does not depend on the number of threads, nor on
    the CPU's instruction set. A gradient whose memory layout differs from its parameter's is
    copied, and so is a parameter with gaps.

    With ``master_param`` each bfloat16 or float16 parameter has a float32 copy, its master, which
    takes the update; the parameter is the master rounded to nearest, written in the same pass::

        p = :func:`current_master` of the parameter and its master
        p -= ...                                            # as above, in float32
        master, parameter = p, round(p)

    The state is packed, one tensor for all parameters. The moments of parameter i start at
    ``packed_offsets(p.numel() for p in params)[i]``. They lie in the order of the parameter's
    memory, or in row-major order if that has gaps.

    Source: Kingma & Ba, "Adam: A Method for Stochastic Optimization", ICLR 2015; Loshchilov &
    Hutter, "Decoupled Weight Decay Regularization", ICLR 2019; amsgrad: Reddi et al., "On the
    Convergence of Adam and Beyond", ICLR 2018.

    Args:
        params: N >= 0 dense tensors of one device, either all of float64, or of float32, bfloat16
            and float16; none overlaps itself or another.
        grads: N tensors of the parameters' shapes, of their dtypes or float32.
        exp_avg, exp_avg_sq: m and v, contiguous, 1-D and of the last of ``packed_offsets``
            elements; float64 for float64 parameters, else float32.
        max_exp_avg_sq: v_max, the same; of shape (0,) without amsgrad.
        state_steps: t, float32, shape (N,), contiguous.
        grad_coef: float64, shape () or (N,): factor for all gradients, or for each.
        verdict: a :class:`Verdict`, int64, shape ().
        master_param: the masters, packed like exp_avg, float32; all parameters must be bfloat16 or
            float16 then. None: the parameters have no masters.

    Raises:
        RuntimeError: a list has another length; a tensor has another dtype, shape or device; or one
            to be written is expanded. Nothing is written then.
    """
    params = params if isinstance(params, list) else list(params)
    grads = grads if isinstance(grads, list) else list(grads)
    state = (exp_avg, exp_avg_sq, max_exp_avg_sq, state_steps)
    options = (lr, beta1, beta2, weight_decay, eps, decoupled_weight_decay, amsgrad, maximize)
    if params and _library.has_kernel(params[0]):
        rest = (grad_coef, verdict, *options, master_param)
        torch.ops.fastguard.adamw_.default(params, grads, *state, *rest)
        _library.count_writes(params)
        _library.count_writes(state if master_param is None else (*state, master_param))
    else:
        adamw_ref_(params, grads, *state, grad_coef, verdict, *options, master_param)


@torch.no_grad()
def check_adamw(*arguments, **named) -> None:
    """Raise the errors that :func:`adamw_` would raise for these arguments; writes nothing."""
    given = AdamwArguments(*arguments, **named)
    params = given.params
    if params and params[0].device.type == "cpu" and _library.has_kernel(params[0]):  # no launch
        skip = torch.full_like(given.verdict, int(Verdict.SKIP_NONFINITE))
        torch.ops.fastguard.adamw_.default(*given._replace(verdict=skip))
    else:
        _check_adamw(given)


@torch.no_grad()
def adamw_ref_(*arguments, **named) -> None:
    """:func:`adamw_` in plain torch; on a skip it writes the old values, to avoid a sync.

    Args:
        arguments, named: those of :class:`AdamwArguments`.
    """
    given = AdamwArguments(*arguments, **named)
    _check_adamw(given)
    coefs = -given.grad_coef if given.maximize else given.grad_coef
    coefs = coefs.expand(len(given.params)).unbind()
    offsets = packed_offsets(p.numel() for p in given.params)
    for p, grad, coef, step, offset in zip(
        given.params, given.grads, coefs, given.state_steps, offsets[:-1], strict=True
    ):
        _step_one(given, p, grad, coef, step, offset)


def current_master(p: Tensor, master: Tensor) -> Tensor:
    """The float32 value of a parameter: its master where ``p`` is the rounded master, else ``p``.

    Elements are compared bit for bit. An element that something else than the optimizer wrote, such
    as a ``load_state_dict`` of the model, takes its new value; all others keep their master.

    Args:
        p: bfloat16 or float16.
        master: float32, of the same shape.

    Returns:
        float32, of the same shape, in memory of its own.
    """
    untouched = master.to(p.dtype).view(torch.int16) == p.view(torch.int16)
    return torch.where(untouched, master, p.float())


def _step_one(
    given: AdamwArguments, p: Tensor, grad: Tensor, coef: Tensor, step: Tensor, offset: int
) -> None:
    """The step of one parameter, whose moments start at ``offset``."""
    m = packed_view(given.exp_avg, p, offset)
    v = packed_view(given.exp_avg_sq, p, offset)
    new_step = step + 1
    t = new_step.double()
    # torch computes number / tensor as number * (1 / tensor), which rounds twice.
    step_size = (torch.full_like(t, given.lr) / (1 - given.beta1**t)).to(m.dtype)
    root_factor = (1 - given.beta2**t).sqrt().reciprocal().to(m.dtype)
    master = given.master_param
    master = None if master is None else packed_view(master, p, offset)
    old = p.to(m.dtype) if master is None else current_master(p, master)
    g = (grad.double() * coef).to(m.dtype)
    if given.weight_decay != 0 and not given.decoupled_weight_decay:
        g = g + given.weight_decay * old
    new_m = given.beta1 * m + (1 - given.beta1) * g
    new_v = given.beta2 * v + (1 - given.beta2) * g * g
    written = [(m, new_m), (v, new_v), (step, new_step)]
    under_root = new_v
    if given.amsgrad:
        largest = packed_view(given.max_exp_avg_sq, p, offset)
        under_root = torch.maximum(largest, new_v)
        written.append((largest, under_root))
    move = step_size * (new_m / (under_root.sqrt() * root_factor + given.eps))
    if given.decoupled_weight_decay:
        move = (given.lr * given.weight_decay) * old + move
    written.append((p, (old - move).to(p.dtype)))
    if master is not None:
        written.append((master, old - move))
    skip = (given.verdict != int(Verdict.APPLY)) & (given.verdict != int(Verdict.CLIP))
    for tensor, new in written:
        tensor.copy_(torch.where(skip, tensor, new))


def _check_adamw(given: AdamwArguments) -> None:
    n = len(given.params)
    if len(given.grads) != n:
        raise RuntimeError(
            f"adamw_: grads has {len(given.grads)} tensors; with {n} params it must have as many"
        )
    _check_decision(given.grad_coef, given.verdict, n)
    wide = n > 0 and given.params[0].dtype == torch.float64
    moment = torch.float64 if wide else torch.float32
    for i, (p, grad) in enumerate(zip(given.params, given.grads, strict=True)):
        _check_param(i, p, given.params[0].dtype, given.master_param is not None)
        _check_grad(i, p, grad, moment)
    state = (given.exp_avg, given.exp_avg_sq, given.max_exp_avg_sq, given.state_steps)
    state += () if given.master_param is None else (given.master_param,)
    tensors = (*given.params, *given.grads, *state, given.grad_coef, given.verdict)
    check_same_device("adamw_", tensors)
    check_writable("adamw_", (*given.params, *state))
    size = packed_offsets(p.numel() for p in given.params)[-1]
    end = (size, "the last of packed_offsets")
    largest = end if given.amsgrad else (0, "as amsgrad is off")
    _check_packed("exp_avg", given.exp_avg, moment, *end)
    _check_packed("exp_avg_sq", given.exp_avg_sq, moment, *end)
    _check_packed("max_exp_avg_sq", given.max_exp_avg_sq, moment, *largest)
    steps = (torch.float32, n, "one step for each parameter")
    _check_packed("state_steps", given.state_steps, *steps)
    if given.master_param is not None:
        _check_packed("master_param", given.master_param, torch.float32, *end)


def _check_decision(grad_coef: Tensor, verdict: Tensor, n: int) -> None:
    if grad_coef.dtype != torch.float64 or grad_coef.shape not in ((), (n,)):
        raise RuntimeError(
            f"adamw_: grad_coef must be a float64 tensor of shape () or ({n},), one factor for all "
            f"gradients or one for each; got {grad_coef.dtype} of shape {tuple(grad_coef.shape)}"
        )
    if verdict.dtype != torch.int64 or verdict.dim() != 0:
        raise RuntimeError(
            "adamw_: verdict must be an int64 tensor of shape (), as decide returns it; got "
            f"{verdict.dtype} of shape {tuple(verdict.shape)}"
        )


def _check_param(i: int, p: Tensor, first: torch.dtype, has_master: bool) -> None:
    if p.dtype not in DTYPES:
        raise RuntimeError(
            f"adamw_: params[{i}] has dtype {p.dtype}; float32, float64, bfloat16 and float16 "
            "are supported"
        )
    if (p.dtype == torch.float64) != (first == torch.float64):
        raise RuntimeError(
            f"adamw_: params[{i}] has dtype {p.dtype}, params[0] {first}; float64 "
            "parameters need a call of their own, for one call has one dtype of moments"
        )
    if has_master and p.dtype not in (torch.bfloat16, torch.float16):
        raise RuntimeError(
            f"adamw_: params[{i}] has dtype {p.dtype}; with master_param all must be bfloat16 or "
            "float16. Parameters without masters need a call of their own"
        )
    if overlaps_itself(p):
        raise RuntimeError(
            f"adamw_: params[{i}] is expanded or overlaps itself: several of its elements "
            "share a single memory location; clone it"
        )


def _check_grad(i: int, p: Tensor, grad: Tensor, moment: torch.dtype) -> None:
    if grad.layout != torch.strided:
        raise RuntimeError(f"adamw_: grads[{i}] is {grad.layout}; make it dense with to_dense")
    if grad.shape != p.shape:
        raise RuntimeError(
            f"adamw_: grads[{i}] has shape {tuple(grad.shape)}, its parameter "
            f"{tuple(p.shape)}; make it with torch.zeros_like"
        )
    if grad.dtype not in (p.dtype, moment):
        raise RuntimeError(
            f"adamw_: grads[{i}] has dtype {grad.dtype}, its parameter {p.dtype}; it must be "
            f"{' or '.join(sorted({str(p.dtype), str(moment)}))}"
        )


def _check_packed(name: str, tensor: Tensor, dtype: torch.dtype, numel: int, why: str) -> None:
    contiguous = tensor.is_contiguous()
    if tensor.dtype != dtype or tensor.shape != (numel,) or not contiguous:
        raise RuntimeError(
            f"adamw_: {name} must be a contiguous {dtype} tensor of shape ({numel},), {why}; "
            f"got {tensor.dtype} of shape {tuple(tensor.shape)}"
            + ("" if contiguous else ", not contiguous")
        )


def _fake_adamw_(*arguments):
    given = AdamwArguments(*arguments)
    tensors = [x for x in given if isinstance(x, Tensor)]
    check_same_device("adamw_", (*given.params, *given.grads, *tensors))


_library.register("adamw_", _fake_adamw_, writes=True)
