"""Float32 masters of bfloat16 and float16 parameters, and state dicts of models that hold them."""

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fastguard import ops
from fastguard._tensors import local_parts

from .packed_state import MASTER, fresh_state, laid_out_as

_NARROW = (torch.bfloat16, torch.float16)


class Masters:
    """The part of Adam and AdamW that knows which parameters have a master."""

    _master_weights = False

    @property
    def master_weights(self) -> bool:
        """Whether bfloat16 and float16 parameters have float32 masters; the constructor sets it."""
        return self._master_weights

    def _has_master(self, p: Tensor) -> bool:
        return self._master_weights and p.dtype in _NARROW

    @torch.no_grad()
    def master_state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        """``model.state_dict()`` with the float32 values of this optimizer's 16-bit parameters.

        A float32 model of the same architecture loads it, and so does
        :meth:`load_master_state_dict`. Save it in checkpoints, and average it: an average of
        bfloat16 weights does not move by less than their rounding.

        Args:
            model: holds parameters of this optimizer. It may hold others too.

        Returns:
            The model's names. A parameter with a master is its float32 value in memory of its own,
            see :func:`fastguard.ops.current_master`; everything else is as in ``state_dict``.

        Raises:
            ValueError: the optimizer has parameters with masters, and none is in the model.
        """
        weights = model.state_dict(keep_vars=True)
        found = self._with_masters(weights)
        for name, value in weights.items():
            if isinstance(value, Tensor):
                weights[name] = self._float32(value) if name in found else value.detach()
        return weights

    @torch.no_grad()
    def load_master_state_dict(self, model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
        """Load weights into the model, and their float32 values into the masters.

        ``model.load_state_dict`` alone rounds float32 weights to the parameters' dtype, and the
        next step goes on from the rounded values. If the optimizer's own state is loaded too, load
        it before: this method replaces its masters.

        Args:
            model: holds parameters of this optimizer.
            state_dict: of the model's names, floating-point tensors of any dtype.

        Raises:
            RuntimeError: names or shapes are not the model's.
            ValueError: the optimizer has parameters with masters, and none is in the model.
        """
        found = self._with_masters(model.state_dict(keep_vars=True))
        model.load_state_dict(state_dict)
        for name, p in found.items():
            state = self.state[p]
            if not state:
                state.update(fresh_state(p, self._group_of(p)["amsgrad"]))
            state[MASTER] = state_dict[name].detach().to(p.device, torch.float32, copy=True)

    def _with_masters(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Those of the weights that are parameters of this optimizer and have masters."""
        own = {id(p) for group in self.param_groups for p in group["params"] if self._has_master(p)}
        found = {name: value for name, value in weights.items() if id(value) in own}
        if own and not found:
            raise ValueError(
                f"none of the optimizer's {len(own)} parameters with masters is in the model: give "
                "the model that the optimizer was built for"
            )
        return found

    def _group_of(self, p: Tensor) -> dict:
        return next(group for group in self.param_groups if any(q is p for q in group["params"]))

    def _float32(self, p: Tensor) -> Tensor:
        master = self.state[p].get(MASTER) if p in self.state else None
        if master is None:  # no step so far
            return p.detach().float()
        return laid_out_as(p.detach(), ops.current_master(*local_parts([p.detach(), master])))

    def _drop_masters(self, params: list[Tensor]) -> None:
        """Remove loaded masters of parameters that have none here; warn of values that are lost."""
        lost = 0
        for p in params:
            master = self.state[p].pop(MASTER)
            here, there = local_parts([p.detach(), master])
            lost += not torch.equal(here.float(), there.float())
        if lost:
            warnings.warn(
                f"the loaded state has float32 masters, and this optimizer keeps none for {lost} "
                "parameters, which differ from them: training goes on from the parameters. Build "
                "the optimizer with master_weights=True and bfloat16 or float16 parameters, or "
                "load what master_state_dict returned into the float32 model first",
                stacklevel=3,
            )
