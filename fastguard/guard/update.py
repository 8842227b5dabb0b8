"""The optimizer's step by a decision, for each kind of optimizer.

fastguard's optimizers and torch's fused ones read the decision on the device, if their ``step`` has
not been replaced. For every other optimizer the host reads the verdict, scales the gradients and
calls ``step`` with all its wrappers. In both cases the guard checks that the step was taken.
"""

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.optim import optimizer as torch_optimizer

from fastguard import ops, optim
from fastguard._tensors import is_dtensor, scale_

from .grad_scaler import handing

if TYPE_CHECKING:
    from .grad_guard import GradGuard

#: Packages whose classes wrap an optimizer: their ``step`` calls that of ``self.optimizer``.
_WRAPPERS = ("accelerate", "lightning", "lightning_fabric", "pytorch_lightning")


class StepCall(NamedTuple):
    """The arguments of one :meth:`GradGuard.step`, or of one step of an attached optimizer."""

    optimizers: list[torch.optim.Optimizer]
    loss: Tensor | float | None
    batch_id: object
    scaler: torch.amp.GradScaler | None = None
    update_scaler: bool = True
    #: ``grad_scale`` and ``found_inf`` that GradScaler left in an attached optimizer, if it did.
    handed: tuple | None = None
    #: Whether the optimizer's own step called the guard.
    called_by_it: bool = False


def listed(optimizer) -> list[torch.optim.Optimizer]:
    if hasattr(optimizer, "param_groups"):
        return [optimizer]
    listed = list(optimizer) if isinstance(optimizer, Iterable) else []
    different = len(set(map(id, listed))) == len(listed)
    if not listed or not different or not all(hasattr(o, "param_groups") for o in listed):
        raise ValueError(f"step takes one optimizer or several different ones, got {optimizer!r}")
    return listed


def unwrapped(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer inside the wrappers of accelerate, Lightning and Fabric."""
    while _is_wrapper(type(optimizer)):
        inner = getattr(optimizer, "optimizer", None)
        if not isinstance(inner, torch.optim.Optimizer) or inner is optimizer:
            break
        optimizer = inner
    return optimizer


@functools.lru_cache(64)
def _is_wrapper(cls: type) -> bool:
    return any(base.__module__.partition(".")[0] in _WRAPPERS for base in cls.__mro__)


def check_steppable(optimizer: torch.optim.Optimizer) -> None:
    """ValueError if ``guard.step`` cannot control a compiled or wrapped ``optimizer.step``."""
    if hasattr(vars(optimizer).get("step"), "_torchdynamo_orig_callable"):
        raise ValueError(
            f"{type(optimizer).__name__}.step is compiled by torch.compile, and a compiled step "
            "does not see the guard's verdict: compile the model, and leave optimizer.step as it "
            "is"
        )
    if unwrapped(optimizer) is optimizer:
        return
    name = type(optimizer).__name__
    if held_scaler(optimizer) is not None:
        raise ValueError(
            f"{name} holds a GradScaler and unscales in its own step: the guard would see scaled "
            "gradients. Call guard.attach(optimizer) once, and then optimizer.step() in place of "
            "guard.step(optimizer)"
        )
    gradient_state = getattr(optimizer, "gradient_state", None)
    if gradient_state is not None and not gradient_state.sync_gradients:
        raise ValueError(
            f"{name}.step does nothing inside accelerator.accumulate before the last micro-batch: "
            "call guard.step only where accelerator.sync_gradients is true, or guard.attach("
            "optimizer) once, and then optimizer.step() for each micro-batch"
        )


def held_scaler(optimizer: torch.optim.Optimizer) -> torch.amp.GradScaler | None:
    """The enabled GradScaler of a wrapper of accelerate, Lightning or Fabric, or None."""
    strategy = getattr(optimizer, "_strategy", None)
    precision = getattr(strategy, "precision_plugin", getattr(strategy, "precision", None))
    for holder in (optimizer, precision):
        scaler = getattr(holder, "scaler", None)
        if scaler is not None and scaler.is_enabled():
            return scaler
    return None


def step_optimizer(
    optimizer: torch.optim.Optimizer,
    grads: list[Tensor],
    decision: ops.GuardDecision,
    step: Callable[[], object],
) -> None:
    """Step with the gradients times ``decision.grad_coef``, or change nothing on a skip.

    Args:
        grads: the gradients of the decision; with AdaGC in the order of its coefficients.
        step: calls the optimizer's own step.

    Raises:
        RuntimeError: ``step`` returned, but the optimizer did not carry out the decision.
    """
    one_coef = decision.grad_coef.dim() == 0
    if _has_hooks(optimizer) and _skipped(decision):
        return  # step hooks, such as those of an EMA of the weights, must not run on a skip
    if reads_decision(optimizer):
        optimizer.decision = decision
        optimizer.decision_index = None if one_coef else {id(g): i for i, g in enumerate(grads)}
        try:
            step()
            if optimizer.decision is not None:
                raise _not_stepped(optimizer)
        finally:
            optimizer.decision = optimizer.decision_index = None
    elif one_coef and _is_fused(optimizer):
        _lay_out_grads_(optimizer)
        _step_fused(optimizer, decision, step)
    elif not _skipped(decision):
        _scale_own_(optimizer, grads, decision.grad_coef)
        _step_on_host(optimizer, step)


def reads_decision(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer's step reads the decision itself. Such a step writes no gradient.

    The class is not enough to know: a wrapper may pose as the class of the wrapped optimizer, and a
    subclass may override ``step``.
    """
    return _own_step(optimizer) is _READS_DECISION


def _is_fused(optimizer: torch.optim.Optimizer) -> bool:
    return (
        _own_step(optimizer) in _FUSED
        and all(group.get("fused") for group in optimizer.param_groups)
        and not _has_no_momentum_yet(optimizer)
    )


def plain_class(optimizer: torch.optim.Optimizer) -> type[torch.optim.Optimizer]:
    """The class of the optimizer as it was before :meth:`GradGuard.attach`."""
    return getattr(type(optimizer), "_plain_class", type(optimizer))


def _own_step(optimizer: torch.optim.Optimizer) -> Callable:
    """The innermost function of ``optimizer.step``, inside the wrappers of torch and schedulers."""
    cls = plain_class(optimizer)
    if cls is type(optimizer) and "step" in vars(optimizer):
        return _innermost(optimizer.step)
    return _innermost_of_class(cls.step)


def _innermost(step: Callable) -> Callable:
    step = inspect.unwrap(step)
    return getattr(step, "__func__", step)


_innermost_of_class = functools.lru_cache(64)(_innermost)


_READS_DECISION = _innermost(optim.AdamW.step)
#: Steps with torch's fused kernels, which divide by ``grad_scale`` and skip by ``found_inf``.
_FUSED = {
    _innermost(cls.step)
    for cls in (torch.optim.Adagrad, torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)
}


def _skipped(decision: ops.GuardDecision) -> bool:
    return ops.Verdict(int(decision.verdict)).skipped


class OnStep:
    """A hook of fastguard, which :func:`_has_hooks` does not count."""


#: The attribute of an attached optimizer that holds its :class:`Link`.
LINK = "_fastguard_link"


class Link(OnStep):
    """The guard of an attached optimizer, and a pre-step hook that refuses unguarded steps."""

    def __init__(self, guard: "GradGuard"):
        self.guard = guard
        #: Whether the guard is calling the optimizer's own step.
        self.stepping = False

    def __call__(self, optimizer, args, kwargs) -> None:
        if not self.stepping:
            raise RuntimeError(
                f"{type(optimizer).__name__}.step was called around its guard: something kept the "
                "method from before guard.attach(optimizer), as accelerate's prepare() does. Call "
                "attach before it, or with what it returned. guard.detach() gives the plain step "
                "back"
            )

    @contextmanager
    def plainly(self) -> Iterator[None]:
        before, self.stepping = self.stepping, True
        try:
            yield
        finally:
            self.stepping = before

    def __getstate__(self) -> dict:
        return {"guard": self.guard, "stepping": False}


def link_of(optimizer: torch.optim.Optimizer) -> Link | None:
    """The link of an attached optimizer; None if it is not attached."""
    return vars(optimizer).get(LINK)


def check_own(optimizer: torch.optim.Optimizer, guard: "GradGuard") -> None:
    """ValueError if the optimizer is attached to another guard."""
    link = link_of(unwrapped(optimizer))
    if link is not None and link.guard is not guard:
        raise ValueError(
            f"this {type(optimizer).__name__} is attached to another GradGuard, which has to step "
            "it: call optimizer.step(), or detach() of that guard first"
        )


def plain_step_of(optimizer: torch.optim.Optimizer, attached: bool) -> Callable[[], object]:
    """A function that calls the optimizer's own step.

    Args:
        attached: whether the optimizer's step called the guard. Its wrappers have run in this case
            and are not called again.
    """
    link = link_of(unwrapped(optimizer))
    if link is None:
        return optimizer.step

    def step():
        with link.plainly():
            if attached:
                plain_class(optimizer).step(optimizer)
            else:
                optimizer.step()

    return step


def _has_hooks(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer has step hooks of others."""
    own = vars(unwrapped(optimizer))
    return any(
        not isinstance(hook, OnStep)
        for hooks in (
            torch_optimizer._global_optimizer_pre_hooks,
            torch_optimizer._global_optimizer_post_hooks,
            own.get("_optimizer_step_pre_hooks"),
            own.get("_optimizer_step_post_hooks"),
        )
        if hooks
        for hook in hooks.values()
    )


def _has_no_momentum_yet(optimizer: torch.optim.Optimizer) -> bool:
    # torch's fused SGD allocates its momentum with empty_like. A skip leaves it uninitialised.
    return any(
        group.get("momentum") and p.grad is not None and "momentum_buffer" not in optimizer.state[p]
        for group in optimizer.param_groups
        for p in group["params"]
    )


def _step_fused(
    optimizer: torch.optim.Optimizer, decision: ops.GuardDecision, step: Callable[[], object]
) -> None:
    """Step by ``grad_scale`` and ``found_inf``, which torch's fused kernels have for GradScaler.

    The kernels divide by ``grad_scale`` and skip if ``found_inf`` of shape () is exactly 1. A
    coefficient below 1/3.4e38 cannot be represented: such gradients are clipped less.
    """
    skip = decision.verdict >= int(ops.Verdict.SKIP_NONFINITE)
    largest = torch.finfo(torch.float32).max
    grad_scale = decision.grad_coef.reciprocal().clamp(max=largest).float()
    with handing(optimizer, grad_scale, skip.float()):
        step()


class _Stepped(OnStep):
    """A post-step hook that records that it was called."""

    def __init__(self):
        self.called = False

    def __call__(self, optimizer, args, kwargs) -> None:
        self.called = True


def _step_on_host(optimizer: torch.optim.Optimizer, step: Callable[[], object]) -> None:
    inner = unwrapped(optimizer)
    if not calls_hooks(inner):
        step()
        return
    stepped = _Stepped()
    handle = inner.register_step_post_hook(stepped)
    try:
        step()
    finally:
        handle.remove()
    if not stepped.called:
        raise _not_stepped(optimizer)


def calls_hooks(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer's step calls step hooks.

    A class that never calls ``Optimizer.__init__`` has none. Lookahead of timm and of
    pytorch_optimizer is such a class.
    """
    hooked = getattr(plain_class(optimizer).step, "hooked", False)
    return hooked and "_optimizer_step_post_hooks" in vars(optimizer)


def _not_stepped(optimizer: torch.optim.Optimizer) -> RuntimeError:
    name = type(optimizer).__name__
    return RuntimeError(
        f"{name}.step() returned without the step of {plain_class(unwrapped(optimizer)).__name__}, "
        "so the guard's verdict was not carried out. Something replaced or wrapped its step: call "
        "guard.attach(optimizer) once, before that, and then optimizer.step() in place of "
        "guard.step(optimizer)"
    )


def _lay_out_grads_(optimizer: torch.optim.Optimizer) -> None:
    """Give dense gradients the memory layout of their parameters.

    torch's fused kernels read and write a gradient in the layout of its parameter and ignore the
    gradient's strides. An expanded gradient cannot be scaled in place.
    """
    held = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    dense = [p for p in held if p.grad.layout == torch.strided]
    grads = [p.grad for p in dense]
    contiguous = Tensor.is_contiguous
    # To compare strides takes far longer than this.
    if all(map(contiguous, dense)) and all(map(contiguous, grads)):
        return
    for p, grad in zip(dense, grads, strict=True):
        if grad.stride() != p.stride() and not is_dtensor(grad):
            p.grad = torch.empty_like(p, requires_grad=False).copy_(grad)


def _scale_own_(optimizer: torch.optim.Optimizer, grads: list[Tensor], coef: Tensor) -> None:
    """Scale those of ``grads`` that this optimizer holds, each once: parameters may share one."""
    row_of = {id(grad): row for row, grad in enumerate(grads)}
    params = [p for group in optimizer.param_groups for p in group["params"]]
    held = [(p, row_of[id(p.grad)]) for p in params if id(p.grad) in row_of]
    _lay_out_grads_(optimizer)
    own = {id(p.grad): (p.grad, row) for p, row in held}
    rows = [row for _, row in own.values()]
    if coef.dim() > 0 and rows != list(range(len(grads))):
        coef = coef[torch.tensor(rows, device=coef.device)]
    scale_([grad for grad, _ in own.values()], coef)
