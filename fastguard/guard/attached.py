"""Optimizers whose own ``step`` is the guarded step: the result of :meth:`GradGuard.attach`.

:class:`Attachable` holds the methods of :class:`fastguard.GradGuard` for loops that are not yours.

Trainers call ``optimizer.step()`` from their own code, through schedulers, GradScalers and
wrappers. ``attach`` therefore changes the class of the optimizer to a subclass with another
``step``. All callers then reach the guard, also those that got the optimizer earlier. Code that
kept the bound *method* would step without the guard; a pre-step hook refuses such a step.
"""

import functools
import json
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .grad_scaler import taken_from
from .lr_scheduler import GuardedScheduler
from .report import PendingReport
from .update import LINK, Link, StepCall, calls_hooks, link_of, plain_class, unwrapped

if TYPE_CHECKING:
    from .grad_guard import GradGuard

#: The key of a guard's state in the first param group of its optimizer's state dict, as JSON text.
#: torch.distributed.checkpoint keeps only param groups, and flattens all values that are not plain.
#: It loads only the keys that the groups of the optimizer have, so the groups hold an empty entry.
STATE_KEY = "fastguard"


class Attachable:
    """The methods of :class:`fastguard.GradGuard` for loops that call ``optimizer.step()``."""

    def __init__(self):
        self._attached: torch.optim.Optimizer | None = None
        #: Batch id and loss of the next step, from :meth:`describe`.
        self._described: tuple[object, Tensor | float | None] = None, None

    def attach(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Make ``optimizer.step(closure=None)`` the guarded step, for loops that are not yours.

        ::

            guard = GradGuard(model, max_norm=0.5, skip_norm=10.0)
            guard.attach(optimizer)
            ...
            loss.backward()
            optimizer.step()        # guarded: clips, or skips; report in guard.last_report

        Call it before or after accelerate, Lightning or Fabric wraps the optimizer (it attaches to
        the optimizer inside), and before or after schedulers are built. The class of the optimizer
        becomes a subclass of the same name. Its step calls a closure first and takes the loss from
        it. With a GradScaler the code stays as torch documents it: ``scaler.scale(loss).backward();
        scaler.step(optimizer); scaler.update()``. One scaler may serve several guarded optimizers.

        ``optimizer.state_dict()`` holds the guard's state in ``param_groups[0]["fastguard"]``. A
        plain optimizer loads such a state dict too, and ignores that entry. Load a
        torch.distributed.checkpoint without the entry before you attach the optimizer. Copies and
        pickles of the optimizer are guarded by a copy of the guard.

        Args:
            optimizer: a torch optimizer, or accelerate's, Lightning's or Fabric's wrapper of one.

        Returns:
            The optimizer that is now attached: ``optimizer``, or the one inside.

        Raises:
            ValueError: this guard is attached to another optimizer, another guard to this one; its
                ``step`` was replaced on the instance; what :meth:`step` would refuse. Nothing was
                changed then.
            TypeError: no torch optimizer.
        """
        if self._attached is not None and self._attached is not unwrapped(optimizer):
            raise ValueError(
                "this GradGuard is attached to another optimizer: give each optimizer a guard of "
                "its own parameters, or call guard.step([one, two]) to step several by one verdict"
            )
        if isinstance(unwrapped(optimizer), torch.optim.Optimizer):
            self._check([unwrapped(optimizer)])
        self._attached = attach(self, optimizer)
        return self._attached

    def adopt(self, optimizer: torch.optim.Optimizer) -> None:
        """Attach to a copy of the optimizer that was made together with this copy of the guard."""
        self._attached = optimizer

    def detach(self) -> None:
        """Give the attached optimizer its own step back; nothing if there is none."""
        if self._attached is not None:
            detach(self._attached)
            self._attached = None

    def describe(self, *, batch_id: object = None, loss: Tensor | float | None = None) -> None:
        """Say of the next step of the attached optimizer what :meth:`step` takes as arguments.

        Args:
            batch_id: names the batch in reports, warnings and errors.
            loss: of the batch, one number, unscaled; NaN or Inf skips the step.
        """
        self._described = batch_id, loss

    def scheduler(self, lr_scheduler) -> GuardedScheduler:
        """The scheduler, whose ``step()`` counts applied steps only.

        For a scheduler that is stepped once per optimizer step. The host does not wait: a skip
        that becomes known late, as on a GPU, is made up for by a later call that does nothing.

        Args:
            lr_scheduler: one of torch's, or anything with ``step``, ``state_dict`` and
                ``load_state_dict``.
        """
        guarded = GuardedScheduler(lr_scheduler)
        self._accounting.schedulers.append(guarded)
        return guarded

    @torch.no_grad()
    def step_attached(self, optimizer, handed, loss: Tensor | float | None) -> PendingReport:
        """The guarded step. The attached optimizer calls this from its own ``step``.

        Args:
            handed: ``grad_scale`` and ``found_inf`` that ``GradScaler.step`` left in the optimizer,
                or None.
            loss: the result of the closure. A loss from :meth:`describe` has priority.
        """
        if handed is not None and self._window is not None:
            raise ValueError(
                "scaler.step(optimizer) does not see the gradients that guard.accumulate() took: "
                "call guard.step(optimizer, scaler=scaler), which updates the scaler too"
            )
        (batch_id, given), self._described = self._described, (None, None)
        loss = loss if given is None else given
        call = StepCall([optimizer], loss, batch_id, handed=handed, called_by_it=True)
        return self._guarded(call)


class Attached:
    """The first base class of an attached optimizer, before the optimizer's own class."""

    # With this flag GradScaler.step calls step() also when it found an Inf, and leaves grad_scale
    # and found_inf in the optimizer.
    _step_supports_amp_scaling = True

    @torch._disable_dynamo  # torch.compile would trace the guard; torch's optimizers do the same
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
        with taken_from(self) as handed:
            link.guard.step_attached(self, handed, loss if _is_one_number(loss) else None)
        return loss

    # This keeps torch from wrapping the step to call the step hooks, which it would do on a skip
    # too. The optimizer's own step calls them.
    step.hooked = True

    def state_dict(self) -> dict:
        """The optimizer's state dict, which holds the guard's state."""
        state = super().state_dict()
        if (link := link_of(self)) is not None:
            first, *others = state["param_groups"]
            text = json.dumps(link.guard.state_dict())
            state["param_groups"] = [first | {STATE_KEY: text}, *others]
        return state

    def load_state_dict(self, state_dict: dict) -> None:
        """Load the optimizer's state, and the guard's state if it is included.

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
        return super().__getstate__() | {LINK: link_of(self)}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        if (link := state.get(LINK)) is not None:
            link.guard.adopt(self)
            if calls_hooks(self):
                self.register_step_pre_hook(link)


@functools.cache
def _attached_class(cls: type) -> type:
    # The name stays the same: logs and progress bars print it.
    names = {"__module__": cls.__module__, "__doc__": cls.__doc__, "_plain_class": cls}
    return type(cls.__name__, (Attached, cls), names)


def _new(cls: type) -> torch.optim.Optimizer:
    """An attached optimizer without state, for pickle and copy."""
    attached = _attached_class(cls)
    return attached.__new__(attached)


def attach(guard: "GradGuard", optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Attach the guard to the optimizer inside ``optimizer``, and return that optimizer.

    Raises:
        TypeError: this is no torch optimizer, or its class cannot be changed.
        ValueError: another guard is attached to it, or its ``step`` was replaced on the instance.
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
        link = Link(guard)
        setattr(inner, LINK, link)
        if calls_hooks(inner):
            inner.register_step_pre_hook(link)
        if tracked:
            inner.step = _tracked(inner)
        _load_left_over(guard, inner)
    _take_hold_again(optimizer, inner)
    return inner


def detach(optimizer: torch.optim.Optimizer) -> None:
    """Give the optimizer its own class and step back."""
    link = vars(optimizer).pop(LINK)
    optimizer.param_groups[0].pop(STATE_KEY, None)
    hooks = vars(optimizer).get("_optimizer_step_pre_hooks", {})
    for key in [key for key, hook in hooks.items() if hook is link]:
        del hooks[key]
    optimizer.__class__ = plain_class(optimizer)


def _tracked(optimizer: torch.optim.Optimizer) -> Callable:
    """A ``step`` that records its call, like the one that torch's LRScheduler puts in."""
    reference = weakref.ref(optimizer)

    @functools.wraps(Attached.step)
    def step(*args, **kwargs):
        optimizer = reference()
        optimizer._opt_called = True
        return type(optimizer).step(optimizer, *args, **kwargs)

    step._wrapped_by_lr_sched = True
    return step


def _take_hold_again(wrapper: torch.optim.Optimizer, inner: torch.optim.Optimizer) -> None:
    """Give accelerate's wrapper the new ``step``: it keeps the bound method from its creation."""
    if hasattr(wrapper, "_optimizer_original_step_method"):
        from accelerate.optimizer import patch_optimizer_step

        wrapper._optimizer_original_step_method = inner.step
        wrapper._optimizer_patched_step_method = patch_optimizer_step(wrapper, inner.step)


def _load_left_over(guard: "GradGuard", optimizer: torch.optim.Optimizer) -> None:
    """Load a guard's state that the optimizer loaded into a param group before it was attached."""
    if text := optimizer.param_groups[0].get(STATE_KEY):
        guard.load_state_dict(_parsed(text))
    optimizer.param_groups[0][STATE_KEY] = ""


def _without_guard(state_dict: dict) -> tuple[dict, str | None]:
    """A state dict without the guard's state, and the guard's state as text or None."""
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
