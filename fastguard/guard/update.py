"""Carrying a decision out: each kind of optimizer steps by it, or is not called.

fastguard's optimizers and torch's fused ones read the decision on the device, if their ``step``
really is the one that does. For everything else the host looks at the verdict, scales gradients and
calls the optimizer's own ``step``, with whatever wrappers are around it. In both cases the guard
checks that the step was taken.
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

#: Wrappers whose ``step`` calls that of their ``optimizer``, by the package of a class of theirs.
_WRAPPERS = ("accelerate", "lightning", "lightning_fabric", "pytorch_lightning")


class StepCall(NamedTuple):
    """What one step is asked to do; the fields are the arguments of :meth:`GradGuard.step`."""

    optimizers: list[torch.optim.Optimizer]
    loss: Tensor | float | None
    batch_id: object
    scaler: torch.amp.GradScaler | None = None
    update_scaler: bool = True
    #: ``grad_scale`` and ``found_inf`` of an attached optimizer, if it was handed any.
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
    """The optimizer inside the wrappers of accelerate, Lightning and Fabric, or itself."""
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
    """ValueError where ``optimizer.step()`` would not do what ``guard.step`` means by it."""
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
    """The enabled GradScaler that a wrapper of accelerate, Lightning or Fabric steps through."""
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
    """Step with the gradients times ``decision.grad_coef``, or leave everything as it is.

    Args:
        grads: those that the decision is about; with AdaGC in the order of its coefficients.
        step: calls the optimizer's own step.

    Raises:
        RuntimeError: ``step`` returned, and the optimizer has not stepped by the decision.
    """
    one_coef = decision.grad_coef.dim() == 0
    if _has_hooks(optimizer) and _skipped(decision):
        return  # hooks after a step, as those of an EMA of the weights, must not see a skip
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
    """Whether its step reads the decision itself, and writes no gradient.

    The class alone does not tell: wrappers take on the class of what they wrap, and a subclass may
    have a step of its own.
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
    """The function that ``optimizer.step`` comes to, without torch's and schedulers' wrappers."""
    cls = plain_class(optimizer)
    if cls is type(optimizer) and "step" in vars(optimizer):
        return _innermost(optimizer.step)
    return _innermost_of_class(cls.step)


def _innermost(step: Callable) -> Callable:
    step = inspect.unwrap(step)
    return getattr(step, "__func__", step)


_innermost_of_class = functools.lru_cache(64)(_innermost)


_READS_DECISION = _innermost(optim.AdamW.step)
#: torch's own kernels for GradScaler: they divide by ``grad_scale`` and heed ``found_inf``.
_FUSED = {
    _innermost(cls.step)
    for cls in (torch.optim.Adagrad, torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)
}


def _skipped(decision: ops.GuardDecision) -> bool:
    return ops.Verdict(int(decision.verdict)).skipped


class OnStep:
    """A hook of ours, which :func:`_has_hooks` does not count."""


#: The attribute of an attached optimizer that holds its :class:`Link`.
LINK = "_fastguard_link"


class Link(OnStep):
    """The guard of an attached optimizer; as a pre-step hook it refuses steps without the guard."""

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
    """None of an optimizer that is not attached."""
    return vars(optimizer).get(LINK)


def check_own(optimizer: torch.optim.Optimizer, guard: "GradGuard") -> None:
    """ValueError if ``guard`` is to step an optimizer that is attached to another."""
    link = link_of(unwrapped(optimizer))
    if link is not None and link.guard is not guard:
        raise ValueError(
            f"this {type(optimizer).__name__} is attached to another GradGuard, which has to step "
            "it: call optimizer.step(), or detach() of that guard first"
        )


def plain_step_of(optimizer: torch.optim.Optimizer, attached: bool) -> Callable[[], object]:
    """What calls the optimizer's own step.

    Args:
        attached: whether the guard was called by the optimizer's step: what wraps that has run.
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
    """Whether somebody wants to hear of the steps that are taken."""
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
    # torch's fused SGD allocates its momentum with empty_like, and on a skip leaves it so.
    return any(
        group.get("momentum") and p.grad is not None and "momentum_buffer" not in optimizer.state[p]
        for group in optimizer.param_groups
        for p in group["params"]
    )


def _step_fused(
    optimizer: torch.optim.Optimizer, decision: ops.GuardDecision, step: Callable[[], object]
) -> None:
    """Through what torch made for its GradScaler.

    Its kernels divide by ``grad_scale`` and skip if ``found_inf`` is 1, exactly, and of shape ().
    A coefficient below 1/3.4e38 cannot be represented so: such gradients are clipped less.
    """
    skip = decision.verdict >= int(ops.Verdict.SKIP_NONFINITE)
    largest = torch.finfo(torch.float32).max
    grad_scale = decision.grad_coef.reciprocal().clamp(max=largest).float()
    with handing(optimizer, grad_scale, skip.float()):
        step()


class _Stepped(OnStep):
    """A post-step hook that remembers that it was called."""

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
    """Whether its step calls hooks: not where its class never called ``Optimizer.__init__``.

    Lookahead of timm and pytorch_optimizer is such a class.
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

    torch's fused kernels read and write a gradient as its parameter lies, whatever its strides are;
    and an expanded gradient cannot be scaled in place.
    """
    held = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    dense = [p for p in held if p.grad.layout == torch.strided]
    grads = [p.grad for p in dense]
    contiguous = Tensor.is_contiguous
    if all(map(contiguous, dense)) and all(map(contiguous, grads)):  # the strides cost far more
        return
    for p, grad in zip(dense, grads, strict=True):
        if grad.stride() != p.stride() and not is_dtensor(grad):
            p.grad = torch.empty_like(p, requires_grad=False).copy_(grad)


def _scale_own_(optimizer: torch.optim.Optimizer, grads: list[Tensor], coef: Tensor) -> None:
    """Scale the gradients among ``grads`` that this optimizer is to use; others may share them."""
    row_of = {id(grad): row for row, grad in enumerate(grads)}
    params = [p for group in optimizer.param_groups for p in group["params"]]
    held = [(p, row_of[id(p.grad)]) for p in params if id(p.grad) in row_of]
    _lay_out_grads_(optimizer)
    own = {id(p.grad): (p.grad, row) for p, row in held}
    rows = [row for _, row in own.values()]
    if coef.dim() > 0 and rows != list(range(len(grads))):
        coef = coef[torch.tensor(rows, device=coef.device)]
    scale_([grad for grad, _ in own.values()], coef)
