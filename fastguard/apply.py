"""Carrying a decision out: the optimizer steps by it, the GradScaler learns of it."""

import torch
from torch import Tensor

from . import ops, optim
from .clip import scale_


def step_optimizer(
    optimizer: torch.optim.Optimizer, grads: list[Tensor], decision: ops.GuardDecision
) -> None:
    """Step with the gradients times ``decision.grad_coef``, or leave everything as it is.

    fastguard's optimizers and torch's fused ones read the decision on the device; for any other the
    host has to know the verdict.
    """
    one_coef = decision.grad_coef.dim() == 0
    if leaves_gradients(optimizer):
        optimizer.decision = decision
        optimizer.decision_index = None if one_coef else {id(g): i for i, g in enumerate(grads)}
        try:
            optimizer.step()
        finally:
            optimizer.decision = optimizer.decision_index = None
    elif one_coef and _is_fused(optimizer):
        _step_fused(optimizer, decision)
    elif not ops.Verdict(int(decision.verdict)).skipped:
        _scale_own_(optimizer, grads, decision.grad_coef)
        optimizer.step()


def leaves_gradients(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer reads the decision itself and writes no gradient."""
    return isinstance(optimizer, (optim.Adam, optim.AdamW))


def _scale_own_(optimizer: torch.optim.Optimizer, grads: list[Tensor], coef: Tensor) -> None:
    """Scale the gradients among ``grads`` that this optimizer is to use; others may share them."""
    held = {id(p.grad) for group in optimizer.param_groups for p in group["params"]}
    rows = [i for i, grad in enumerate(grads) if id(grad) in held]
    if coef.dim() > 0 and len(rows) < len(grads):
        coef = coef[torch.tensor(rows, device=coef.device)]
    scale_([grads[i] for i in rows], coef)


def _is_fused(optimizer: torch.optim.Optimizer) -> bool:
    return (
        getattr(optimizer, "_step_supports_amp_scaling", False)
        and all(group.get("fused") for group in optimizer.param_groups)
        and not _would_skip_into_garbage(optimizer)
    )


def _would_skip_into_garbage(optimizer: torch.optim.Optimizer) -> bool:
    # torch's fused SGD allocates its momentum with empty_like, and on a skip leaves it so.
    return any(
        group.get("momentum") and p.grad is not None and "momentum_buffer" not in optimizer.state[p]
        for group in optimizer.param_groups
        for p in group["params"]
    )


def _step_fused(optimizer: torch.optim.Optimizer, decision: ops.GuardDecision) -> None:
    """By way of what torch made for its GradScaler.

    Its kernels divide by ``grad_scale`` and skip if ``found_inf`` is 1, exactly, and of shape ().
    A coefficient below 1/3.4e38 can not be said in this way: such gradients are clipped less.
    """
    skip = decision.verdict >= int(ops.Verdict.SKIP_NONFINITE)
    largest = torch.finfo(torch.float32).max
    optimizer.grad_scale = decision.grad_coef.reciprocal().clamp(max=largest).float()
    optimizer.found_inf = skip.float()
    try:
        optimizer.step()
    finally:
        del optimizer.grad_scale, optimizer.found_inf


def scale_of(scaler: torch.amp.GradScaler | None, device: torch.device) -> Tensor | None:
    """What the scaler multiplied the loss by, float64, shape (); None for 1."""
    if scaler is None or not scaler.is_enabled():
        return None
    return scaler.scale(torch.ones((), device=device)).double()


def found_by_unscaling(
    scaler: torch.amp.GradScaler | None, optimizers: list[torch.optim.Optimizer]
) -> Tensor | None:
    """What ``scaler.unscale_`` found, non-zero for an Inf or NaN, if it was called since the last
    update; ShardedGradScaler has asked all ranks for it. None if it was not called.

    Raises:
        ValueError: it was called for some of the optimizers only.
    """
    if scaler is None or not scaler.is_enabled():
        return None
    states = [scaler._per_optimizer_states[id(optimizer)] for optimizer in optimizers]
    unscaled = {state["stage"].name == "UNSCALED" for state in states}
    if unscaled == {True, False}:
        raise ValueError("scaler.unscale_ was called for some of the optimizers; call it for none")
    if True not in unscaled:
        return None
    found = [f for state in states for f in state["found_inf_per_device"].values()]
    return torch.stack([f.reshape(()).to(found[0].device) for f in found]).sum()


def scaling_of(
    scaler: torch.amp.GradScaler | None,
    device: torch.device,
    optimizers: list[torch.optim.Optimizer],
) -> ops.Scaling | None:
    """The scaler's state, for the decision to update on the way, after :func:`scale_of`.

    None where that is not all that ``update`` has to do: a scaler of another class may do more, as
    ShardedGradScaler asks all ranks, and what it found for an optimizer that the guard does not
    step counts too. GradScaler has no public way to its tensors.
    """
    if scaler is None or not scaler.is_enabled():
        return None
    if type(scaler).update is not torch.amp.GradScaler.update or scaler._scale.device != device:
        return None
    ours = {id(optimizer) for optimizer in optimizers}
    if any(key not in ours for key in scaler._per_optimizer_states):
        return None
    return ops.Scaling(
        scaler._scale,
        scaler._growth_tracker,
        scaler.get_growth_factor(),
        scaler.get_backoff_factor(),
        scaler.get_growth_interval(),
    )


def copy_of(scaling: ops.Scaling | None) -> tuple[Tensor, ...]:
    return () if scaling is None else tuple(tensor.clone() for tensor in scaling[:2])


def restore(scaling: ops.Scaling | None, copies: tuple[Tensor, ...]) -> None:
    for tensor, copy in zip(scaling or (), copies, strict=False):
        tensor.copy_(copy)


def update_scaler(
    scaler: torch.amp.GradScaler | None,
    optimizers: list[torch.optim.Optimizer],
    found_inf: Tensor,
) -> None:
    """Let the scale grow, or shrink where ``found_inf`` is True: after a NaN or Inf.

    ``unscale_`` would find that out by reading and writing all gradients once more, and has no
    bf16 on CUDA; the norm has told already. GradScaler has no public way to take it.
    """
    if scaler is None or not scaler.is_enabled():
        return
    for optimizer in optimizers:
        found = scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"]
        # What unscale_ found counts too; found_inf tells what it found on other ranks.
        found[found_inf.device] = found.get(found_inf.device, 0) + found_inf.float()
    scaler.update()
