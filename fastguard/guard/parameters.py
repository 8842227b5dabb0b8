"""The parameters that a guard watches, and the check of the optimizers that step them."""

import inspect
import operator
import weakref
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fastguard.attention import AttentionStats
from fastguard.attention.module import ClampedMultiheadAttention
from fastguard.optim.checks import check_options, check_state

from .buffers import Buffers, OnLoad
from .distributed import check_whole, check_whole_state, lay_out_, ranks_of
from .module_names import Names, bare
from .update import plain_class, reads_decision


class Watched:
    """The parameters of a module, or the given ones, with names, in order, each one once.

    A module's parameters are looked up again when an optimizer holds other parameters than in its
    last step, and when ``stale`` is set. They are not looked up in every step: for many parameters
    this takes longer than reading their gradients.

    Raises:
        ValueError: there are no parameters, or two have one name.
        TypeError: a parameter is not a tensor; the argument is an optimizer; the module is or holds
            a torch.jit.ScriptModule.
    """

    def __init__(
        self, params_or_model: nn.Module | Tensor | Iterable[Tensor] | Iterable[tuple[str, Tensor]]
    ):
        _check_guardable(params_or_model)
        self.module = params_or_model if isinstance(params_or_model, nn.Module) else None
        self._given = [] if self.module is not None else _name(params_or_model)
        # For each optimizer: the parameters that it held last, and the unwatched ones of them.
        self._checked: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
        self._listening: weakref.WeakSet = weakref.WeakSet()
        self.names: list[str] = []
        self.parameters: list[Tensor] = []
        self._ids: set[int] = set()
        self._attentions: list[tuple[str, ClampedMultiheadAttention]] = []
        #: Whether the parameters are to be looked up again before the next step.
        self.stale = False
        self._look_up()
        if len(set(self.names)) < len(self.names):
            twice = next(name for i, name in enumerate(self.names) if name in self.names[:i])
            raise ValueError(f"two parameters have the name {twice!r}; reports could not tell them")
        if not self.parameters:
            raise ValueError(
                "GradGuard got no parameters; pass the module, or its parameters() as a list if a "
                "generator was used up before"
            )

    def _look_up(self) -> None:
        named = self._given if self.module is None else self.module.named_parameters()
        once: dict[int, tuple[str, Tensor]] = {}
        for name, parameter in named:
            once.setdefault(id(parameter), (name, parameter))
        self.names = [name for name, _ in once.values()]
        self.parameters = [parameter for _, parameter in once.values()]
        self._ids = set(once)
        self._attentions = []
        if self.module is not None:
            names = Names(self.module)
            self.names = list(map(names.of_parameter, self.names))
            self._attentions = [
                (names.of_module(path), part)
                for path, part in self.module.named_modules()
                if isinstance(part, ClampedMultiheadAttention)
            ]
        self.stale = False

    def by_current_names(self, values: dict) -> dict:
        """``values`` under the present names. Saved names may have other prefixes of wrappers."""
        known, bare_of = set(self.names), {bare(name): name for name in self.names}
        return {
            name if name in known else bare_of.get(bare(name), name): value
            for name, value in values.items()
        }

    def __getstate__(self) -> dict:
        return vars(self) | {"_checked": None, "_listening": None, "_ids": None}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self._checked = weakref.WeakKeyDictionary()
        self._listening = weakref.WeakSet()
        self._ids = set(map(id, self.parameters))

    def attention_stats(self) -> dict[str, AttentionStats]:
        """The statistics that the module's attentions recorded in their last forward, by name."""
        return {name: each.stats for name, each in self._attentions if each.stats is not None}

    def refresh(self) -> bool:
        """Look the parameters up if no optimizer is known or one holds others; True if so."""
        if known := list(self._checked):
            return self.check(known)
        if self.module is not None:
            self._look_up()
        return self.module is not None

    def check(self, optimizers: list[torch.optim.Optimizer]) -> bool:
        """ValueError if a step with these cannot be guarded; True after a new look-up."""
        return any([self._check(optimizer) for optimizer in optimizers])

    def _check(self, optimizer: torch.optim.Optimizer) -> bool:
        groups = [group["params"] for group in optimizer.param_groups]
        seen, strangers = self._checked.get(optimizer, (None, []))
        walk = seen is None or self.stale or not _same(seen, groups)
        if walk:
            _check_no_closure(optimizer)
            _check_one_pass(optimizer)
            check_whole_state(optimizer)
            if self.module is not None:
                self._look_up()
            held = [p for group in groups for p in group]
            strangers = [p for p in held if id(p) not in self._ids]
            if held and len(strangers) == len(held):
                raise ValueError(
                    "the guard watches none of the optimizer's parameters: GradGuard was given "
                    "others, or the module's were replaced after the optimizer was built (by "
                    "load_state_dict(assign=True)?); build the optimizer anew"
                )
            names = dict(zip(map(id, self.parameters), self.names, strict=True))
            check_state(optimizer, names)
            self._listen(optimizer)
            self._checked[optimizer] = [list(group) for group in groups], strangers
        if not reads_decision(optimizer):  # such an optimizer checks its options itself
            check_options(optimizer.param_groups)
        for p in strangers:
            if p.grad is not None:
                raise ValueError(
                    f"the optimizer holds a parameter of shape {tuple(p.shape)} with a gradient "
                    "that the guard does not watch; give GradGuard the module or all parameters"
                )
        return walk

    def _listen(self, optimizer: torch.optim.Optimizer) -> None:
        """Check the optimizer anew after each ``load_state_dict``."""
        if optimizer in self._listening or not hasattr(
            optimizer, "_optimizer_load_state_dict_post_hooks"
        ):
            return
        me = weakref.ref(self)  # the hook must not keep the guard's parameters alive

        def loaded(optimizer):
            if (watched := me()) is not None:
                watched._checked.pop(optimizer, None)

        optimizer.register_load_state_dict_post_hook(loaded)
        self._listening.add(optimizer)


def _same(a: list[list[Tensor]], b: list[list[Tensor]]) -> bool:
    return list(map(len, a)) == list(map(len, b)) and all(
        all(map(operator.is_, x, y)) for x, y in zip(a, b, strict=True)
    )


def _check_no_closure(optimizer: torch.optim.Optimizer) -> None:
    # The class's step: a scheduler puts a wrapper into the instance.
    _, *parameters = inspect.signature(plain_class(optimizer).step).parameters.values()
    for parameter in parameters:
        if parameter.default is parameter.empty and parameter.kind not in (
            parameter.VAR_POSITIONAL,
            parameter.VAR_KEYWORD,
        ):
            raise ValueError(
                f"{type(optimizer).__name__}.step needs a {parameter.name}: it evaluates the model "
                "several times per step, and the guard would see but one of its gradients"
            )


def _check_guardable(params_or_model) -> None:
    if hasattr(params_or_model, "param_groups"):
        raise TypeError(
            f"GradGuard takes the model, not a {type(params_or_model).__name__}: write "
            "guard = GradGuard(model), and pass the optimizer to guard.step(optimizer)"
        )
    parts = params_or_model.named_modules() if isinstance(params_or_model, nn.Module) else ()
    for path, part in parts:
        if isinstance(part, torch.jit.ScriptModule):
            raise TypeError(
                f"{path or 'the model'} is a torch.jit.ScriptModule, which cannot tell the guard "
                "of its load_state_dict: write GradGuard(model.named_parameters(), "
                "buffers=model.named_buffers()), and call guard.commit_buffers() after a "
                "load_state_dict"
            )


def _check_one_pass(optimizer: torch.optim.Optimizer) -> None:
    if hasattr(optimizer, "first_step") and hasattr(optimizer, "second_step"):
        raise ValueError(
            f"{type(optimizer).__name__} (SAM) takes two backward passes per step, and the guard "
            "would see but one of them. Call guard.attach(optimizer.base_optimizer): then the "
            "second pass, which moves the weights, is guarded"
        )


def _name(
    parameters: Tensor | Iterable[Tensor] | Iterable[tuple[str, Tensor]],
) -> list[tuple[str, Tensor]]:
    if isinstance(parameters, Tensor):
        parameters = [parameters]
    named = [
        item if isinstance(item, tuple) and len(item) == 2 else (f"parameter {i}", item)
        for i, item in enumerate(parameters)
    ]
    for name, parameter in named:
        if not isinstance(parameter, Tensor):
            raise TypeError(
                f"GradGuard takes a module, parameters or (name, parameter) pairs; {name} is a "
                f"{type(parameter).__name__}"
            )
    return named


class Watching:
    """The part of :class:`fastguard.GradGuard` that knows its parameters, buffers and ranks.

    Args:
        params_or_model, buffers, process_group: the arguments of GradGuard.
    """

    def __init__(self, params_or_model, buffers, process_group):
        self._watched = Watched(params_or_model)
        self._buffers = Buffers(self._watched.module, buffers)
        self._group = process_group
        self._listening: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    def commit_buffers(self) -> None:
        """Tell the guard that the values in the module's buffers are good.

        Call this after something other than a training step wrote them, such as ``update_bn`` or an
        average of weights that is kept in buffers. Call it also after layers without parameters
        were added: the guard does not find them by itself. ``load_state_dict`` of the module or of
        a submodule needs no call.
        """
        self._buffers.commit()
        if self._window is not None:
            self._window.buffers.commit()

    def _check(self, optimizers: list[torch.optim.Optimizer]) -> None:
        """ValueError if a step with these cannot be guarded."""
        if self._watched.check(optimizers):
            self._look_up_again()
            names, parameters = self._watched.names, self._watched.parameters
            self._accounting.warnings.saw_optimizers(names, parameters, optimizers)

    def _lay_out(self) -> None:
        ranks = self._decider.ranks
        if ranks is not None and ranks.sharded:
            lay_out_(self._watched.parameters)

    def _look_up_again(self) -> None:
        """Follow a new look-up of the parameters: the module may have other submodules."""
        watched = self._watched
        check_whole(watched.module, watched.names, watched.parameters)
        self._decider.ranks = ranks_of(watched.names, watched.parameters, self._group)
        self._buffers.look_up()
        self._listen()

    def _listen(self) -> None:
        """Have :meth:`_on_load` called after ``load_state_dict`` of a module or a submodule."""
        for part in self._buffers.modules():
            if part not in self._listening:
                self._listening.add(part)
                part.register_load_state_dict_post_hook(OnLoad(self._on_load))

    def _on_load(self, part: nn.Module) -> None:
        """``part`` loaded another state. Its parameters may be new objects."""
        self._buffers.commit(part)
        if self._window is not None:
            self._window.buffers.commit(part)
        self._watched.stale = True
        if part is self._watched.module:  # sums and snapshots belong to the earlier weights
            self._window = None
            if self._snapshots is not None:
                self._snapshots.clear()

    def _heal_buffers(self) -> None:
        """After an exception, restore buffers with a NaN or Inf: a later step would commit them."""
        (self._buffers if self._window is None else self._window.buffers).heal()
