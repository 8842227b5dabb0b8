"""Adam and AdamW whose step takes the guard's decision.

They are torch's classes with another ``step``: param groups, state and state dicts have torch's
keys, so that either loads what the other saved.
"""

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .fused import Fused

_ARGUMENTS = """
    Clipping, unscaling and skipping take no pass of their own. :class:`fastguard.GradGuard` sets
    ``decision``; GradScaler sets its scale and ``found_inf``, of which NaN and any nonzero value
    skip the step. The step multiplies the gradients while it reads them and does not change them.
    On a skip, parameters and state stay unchanged too, bit for bit.

    One call of a native kernel steps all parameters of a group, device and dtype. Without a kernel
    the pure-torch :func:`fastguard.ops.adamw_ref_` serves. The step is always fused.

    Args:
        params: parameters, (name, parameter) pairs or param groups, as for torch's optimizers, of
            float32, float64, bfloat16, float16 or complex64 and complex128, and of any shape.
        lr: learning rate, a float or a tensor with one element.
        betas: decay of the two moments.
        eps: is added to the denominator.
        weight_decay: {weight_decay}.
        amsgrad: divide by the largest second moment so far instead of the present one.
        maximize: step along the gradient, not against it.
        foreach, fused: None, False or True, but not both True. They do not change the step, which
            is always fused. They stay in the groups for a torch optimizer that loads the state.
        capturable: must be True while a CUDA graph is captured, and has no other effect. ``step``
            is an argument on the device. lr, betas, eps and weight_decay are read on the host: a
            replay repeats those of the capture.
        differentiable: False.
        master_weights: keep a float32 master of each bfloat16 and float16 parameter. See below.

    Its state, per parameter: ``step``, float32 of shape () on the parameter's device, and
    ``exp_avg``, ``exp_avg_sq`` and with amsgrad ``max_exp_avg_sq`` of the parameter's shape, in
    float32 for bfloat16 and float16 parameters too; torch's are in the parameter's dtype. All are
    views of a few packed tensors. An entry that is replaced is copied into these at the next step.
    ``torch.save`` writes a packed tensor once, and all of it even if the state of a single
    parameter is saved: clone that first. Plain ``pickle`` writes it once for each view: pickle the
    optimizer, which clones the views, or a deep copy made of clones, but not the state dict.

    **Master weights.** A step of 1e-3 is less than half of the last bit of a bfloat16 weight of 0.5
    or more, and is rounded away. With ``master_weights=True`` the step is taken in float32, on
    ``state[p]["master_param"]``, and the same pass writes the parameter, which is the rounded
    master. Nothing casts a weight before or after: forward and backward pass run on parameters of
    16 bits. float32 and float64 parameters of the same optimizer, such as those of normalization
    layers, have no master and are stepped as they are. (Micikevicius et al., "Mixed Precision
    Training", ICLR 2018. TransformerEngine's and Apex's FusedAdam have the option too.)

    Something else than the step may write a parameter: ``model.load_state_dict``, an exchange with
    averaged weights, ``p.data.copy_``. The step compares each element with its rounded master, bit
    for bit. Where they differ, the parameter's value replaces the master; where they are equal, the
    master stays. So a new value is never overwritten by an old master, and weights that were
    exchanged and put back keep the bits that 16-bit copies do not hold. :meth:`master_state_dict`
    and :meth:`load_master_state_dict` exchange float32 weights with checkpoints and float32 models.
    A float16 parameter is Inf where its master is above 65504, as after any rounding to float16.

    The moments of a parameter that is a DTensor (FSDP2) are DTensors with its mesh and placements,
    as torch.distributed.checkpoint saves them; the step works on this rank's shards, and takes
    DTensors and plain parameters in one group, which torch's refuses.

    Raises:
        ValueError: an option outside of its range, or no parameters.
        RuntimeError: ``differentiable``, or both ``foreach`` and ``fused``.

    Source: {source}
    """


class Adam(Fused, torch.optim.Adam):
    __doc__ = "``torch.optim.Adam`` whose step takes the guard's decision.\n" + _ARGUMENTS.format(
        weight_decay="is added to the gradient, times the parameter",
        source='Kingma & Ba, "Adam: A Method for Stochastic Optimization", ICLR 2015.',
    )

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        master_weights: bool = False,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=decoupled_weight_decay,
        )
        self._master_weights = bool(master_weights)


class AdamW(Fused, torch.optim.AdamW):
    __doc__ = "``torch.optim.AdamW`` whose step takes the guard's decision.\n" + _ARGUMENTS.format(
        weight_decay="times lr, the part of the parameter that is taken off at every step",
        source='Loshchilov & Hutter, "Decoupled Weight Decay Regularization", ICLR 2019.',
    )

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        master_weights: bool = False,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
        )
        self._master_weights = bool(master_weights)
