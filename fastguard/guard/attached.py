"""An optimizer whose own ``step`` is the guarded step: what :meth:`GradGuard.attach` makes of it.

Trainers call ``optimizer.step()`` from their own code, through schedulers, GradScalers and wrappers
of their own. So the class of the optimizer is changed to a subclass with another ``step``: all of
these then call the guard, also those that got the optimizer before. Code that kept the *method*
from before would step without the guard: a pre-step hook refuses that.
"""

import functools
import json
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from .update import OnStep, calls_hooks, plain_class, unwrapped

if TYPE_CHECKING:
    from .grad_guard import GradGuard

#: Where a guard's state lies in the state dict of its optimizer: in the first param group, as JSON.
#: torch.distributed.checkpoint keeps param groups only, and flattens all that is no plain value. It
#: asks for the keys that the optimizer's own groups have: they have this one, with an empty text.
STATE_KEY = "fastguard"


class _Link(OnStep):
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


class Attached:
    """Comes before the optimizer's own class in the class of an attached optimizer."""

    # GradScaler.step then calls step on a bad step too, and leaves grad_scale and found_inf here.
    _step_supports_amp_scaling = True

    @torch._disable_dynamo  # as torch's own optimizers: torch.compile would trace the guard
    def step(self, closure: Callable[[], object] | None = None):
        """The guarded step.

        Args:
            closure: evaluates the model and returns the loss; called first, with gradients enabled.
                A NaN or Inf loss skips the step.

        Returns:
            What the closure returned, or None. The guard's ``last_report`` tells what was done.

        Raises:
            As :meth:`GradGuard.step`.
        """
        link = link_of(self)
        if link is None:  # detached, and something kept this method
            return type(self).step(self, *(() if closure is None else (closure,)))
        if link.stepping:
            return plain_class(self).step(self)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        handed = {name: vars(self).pop(name) for name in _HANDED if name in vars(self)}
        try:
            link.guard.step_attached(
                self,
                (handed.get("grad_scale"), handed.get("found_inf", 0.0)) if handed else None,
                loss if _is_one_number(loss) else None,
            )
        finally:
            vars(self).update(handed)  # GradScaler deletes them
        return loss

    # torch would call the hooks of a step here too, also on a skip. The optimizer's own step does.
    step.hooked = True

    def state_dict(self) -> dict:
        """The optimizer's, and in it the guard's."""
        state = super().state_dict()
        if (link := link_of(self)) is not None:
            first, *others = state["param_groups"]
            text = json.dumps(link.guard.state_dict())
            state["param_groups"] = [first | {STATE_KEY: text}, *others]
        return state

    def load_state_dict(self, state_dict: dict) -> None:
        """Load the optimizer's state, and the guard's if it is in it.

        Raises:
            ValueError: one of them does not fit. Neither was changed then.
        """
        state_dict, text = _without_guard(state_dict)
        link = link_of(self)
        if link is None or not text:
            super().load_state_dict(state_dict)
        else:
            before = link.guard.state_dict()
            link.guard.load_state_dict(_parsed(text))
            try:
                super().load_state_dict(state_dict)
            except BaseException:
                link.guard.load_state_dict(before)
                raise
        if link is not None:
            self.param_groups[0][STATE_KEY] = ""

    def __reduce_ex__(self, protocol):
        return _new, (plain_class(self),), self.__getstate__()

    def __getstate__(self) -> dict:
        return super().__getstate__() | {_LINK: link_of(self)}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        if (link := state.get(_LINK)) is not None:
            link.guard.adopt(self)
            if calls_hooks(self):
                self.register_step_pre_hook(link)


_LINK = "_fastguard_link"
_HANDED = ("grad_scale", "found_inf")


@functools.cache
def _attached_class(cls: type) -> type:
    # Under the same name, for logs and progress bars print it.
    names = {"__module__": cls.__module__, "__doc__": cls.__doc__, "_plain_class": cls}
    return type(cls.__name__, (Attached, cls), names)


def _new(cls: type) -> torch.optim.Optimizer:
    """An attached optimizer without a state, for pickle and copy."""
    attached = _attached_class(cls)
    return attached.__new__(attached)


def link_of(optimizer: torch.optim.Optimizer) -> _Link | None:
    return vars(optimizer).get(_LINK)


def attach(guard: "GradGuard", optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Make the optimizer inside ``optimizer`` an attached one, and return it.

    Raises:
        TypeError: no torch optimizer, or one whose class cannot be changed.
        ValueError: another guard is attached to it; its ``step`` was replaced by something unknown.
    """
    inner = unwrapped(optimizer)
    if not isinstance(inner, torch.optim.Optimizer):
        raise TypeError(
            f"guard.attach takes a torch.optim.Optimizer, got {type(optimizer).__name__}; attach "
            "the optimizer inside of it, before it is wrapped"
        )
    link = link_of(inner)
    if link is not None and link.guard is not guard:
        raise ValueError(
            f"this {type(inner).__name__} is attached to another GradGuard: call detach() of that "
            "one first, or give both networks' parameters to one guard"
        )
    if link is None:
        plain, own_step = type(inner), vars(inner).pop("step", None)
        tracked = getattr(own_step, "_wrapped_by_lr_sched", False)
        if own_step is not None and not tracked and own_step != plain.step.__get__(inner):
            inner.step = own_step
            raise ValueError(
                f"{plain.__name__}.step of this optimizer was replaced by {own_step!r}: attach "
                "before that, or remove it with `del optimizer.step`"
            )
        try:
            inner.__class__ = _attached_class(plain)
        except TypeError as error:
            raise TypeError(f"the class {plain.__name__} cannot be extended: {error}") from error
        link = _Link(guard)
        setattr(inner, _LINK, link)
        if calls_hooks(inner):
            inner.register_step_pre_hook(link)
        if tracked:
            inner.step = _tracked(inner)
        _load_left_over(guard, inner)
    _take_hold_again(optimizer, inner)
    return inner


def detach(optimizer: torch.optim.Optimizer) -> None:
    """Give the optimizer its own class and step back."""
    link = vars(optimizer).pop(_LINK)
    optimizer.param_groups[0].pop(STATE_KEY, None)
    hooks = vars(optimizer).get("_optimizer_step_pre_hooks", {})
    for key in [key for key, hook in hooks.items() if hook is link]:
        del hooks[key]
    optimizer.__class__ = plain_class(optimizer)


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


def _tracked(optimizer: torch.optim.Optimizer) -> Callable:
    """The step that torch's LRScheduler puts in the place of an optimizer's, to see that it ran."""
    reference = weakref.ref(optimizer)

    @functools.wraps(Attached.step)
    def step(*args, **kwargs):
        optimizer = reference()
        optimizer._opt_called = True
        return type(optimizer).step(optimizer, *args, **kwargs)

    step._wrapped_by_lr_sched = True
    return step


def _take_hold_again(wrapper: torch.optim.Optimizer, inner: torch.optim.Optimizer) -> None:
    """accelerate's wrapper keeps the method of the optimizer that it got."""
    if hasattr(wrapper, "_optimizer_original_step_method"):
        from accelerate.optimizer import patch_optimizer_step

        wrapper._optimizer_original_step_method = inner.step
        wrapper._optimizer_patched_step_method = patch_optimizer_step(wrapper, inner.step)


def _load_left_over(guard: "GradGuard", optimizer: torch.optim.Optimizer) -> None:
    """A guard's state that the optimizer loaded before it was attached lies in its param group."""
    if text := optimizer.param_groups[0].get(STATE_KEY):
        guard.load_state_dict(_parsed(text))
    optimizer.param_groups[0][STATE_KEY] = ""


def _without_guard(state_dict: dict) -> tuple[dict, str | None]:
    """The optimizer's part of a state dict, and the guard's."""
    first, *others = state_dict["param_groups"]
    plain = {key: value for key, value in first.items() if key != STATE_KEY}
    return state_dict | {"param_groups": [plain, *others]}, first.get(STATE_KEY)


def _parsed(text: str) -> dict:
    try:
        return json.loads(text)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"the guard's state in param_groups[0][{STATE_KEY!r}] is damaged: {error}; delete the "
            "entry to load the optimizer alone"
        ) from error


def _is_one_number(loss: object) -> bool:
    if isinstance(loss, torch.Tensor):
        return loss.numel() == 1 and not loss.is_complex()
    return isinstance(loss, (int, float)) and not isinstance(loss, bool)
