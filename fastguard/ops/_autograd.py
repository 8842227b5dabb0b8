"""Operators with a derivative, as eager calls, compilers and torch.func see them."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from fastguard._compiling import is_exporting
from fastguard._tensors import is_dtensor

from . import _library
from .types import DTYPES

#: The classes of tensors that no other package, and no tracer, gave a meaning of its own.
PLAIN = (Tensor, torch.nn.Parameter)


def without_autograd(operator, *args):
    """The operator's kernel. The registered autograd is Python and costs 3 us to pass through."""
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*args)


def is_transformed(*tensors: Tensor) -> bool:
    """Whether forward derivatives are wanted, or those of torch.func's grad, vjp and jvp."""
    if torch.compiler.is_compiling():
        return False
    functorch = torch._C._functorch
    if functorch.peek_interpreter_stack() is not None:
        for x in tensors:
            while functorch.is_batchedtensor(x):  # vmap inside of grad
                x = functorch.get_unwrapped(x)
            if functorch.is_gradtrackingtensor(x) or unpack_dual(x).tangent is not None:
                return True
    return any(unpack_dual(x).tangent is not None for x in tensors)


def are_dtensors(*tensors: Tensor) -> bool:
    """Plain torch shards them; an operator has no strategy of its own."""
    if all(type(x) in PLAIN for x in tensors):
        return False
    return any(map(is_dtensor, tensors))


def served_by_cpu(*tensors: Tensor) -> bool:
    """Whether an operator that has a kernel on the CPU alone serves these tensors.

    `torch.export` and `torch.jit.trace` see the reference, so that their programs run without
    fastguard; so do torch.func's transforms, and DTensors.
    """
    if not all(x.is_cpu and x.dtype in DTYPES for x in tensors) or _library.cpu_problem is not None:
        return False
    if is_exporting() or torch.jit.is_tracing() or are_dtensors(*tensors):
        return False
    if torch.compiler.is_compiling():
        return True
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    return not is_transformed(*tensors)


def computed_dtype(x: Tensor) -> torch.dtype:
    """What the kernels compute in: float64 for float64, float32 for any other dtype."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


class Differentiable:
    """An operator of csrc/ops.cpp with its derivative.

    Its registered autograd costs some 20 us a pass more than an autograd.Function; compilers need
    the former.

    Args:
        name: as in csrc/ops.cpp. The operator of its derivative is ``name_backward``.
        save: called with ctx, inputs and output (a tensor or a tuple), saves what the derivative
            needs.
        backward: called with ctx, the backward operator and the gradients of the results (None
            where there is none, but not all None), returns the gradients of the inputs.
        constant: the indices of results that have no gradient.
    """

    def __init__(
        self, name: str, save: Callable, backward: Callable, constant: tuple[int, ...] = ()
    ):
        if _library.cpu_problem is not None:
            return
        operator = getattr(torch.ops.fastguard, name).default
        derivative = getattr(torch.ops.fastguard, f"{name}_backward").default

        def differentiate(ctx, *grads):
            if all(grad is None for grad in grads):
                return (None,) * len(ctx.needs_input_grad)
            return backward(ctx, derivative, *grads)

        def refuse(ctx, *grads):
            raise NotImplementedError(
                f"fastguard's {name} has first derivatives only: use create_graph=False"
            )

        class Function(torch.autograd.Function):
            @staticmethod
            def forward(ctx, *inputs):
                output = without_autograd(operator, *inputs)
                save(ctx, inputs, output)
                ctx.mark_non_differentiable(*(output[i] for i in constant))
                ctx.set_materialize_grads(False)
                return output

            @staticmethod
            def backward(ctx, *grads):
                return differentiate(ctx, *grads)

        torch.library.register_autograd(f"fastguard::{name}", differentiate, setup_context=save)
        torch.library.register_autograd(f"fastguard::{name}_backward", refuse)
        self._operator, self._function = operator, Function

    def __call__(self, *args):
        """The operator's results."""
        if torch.compiler.is_compiling():
            return self._operator(*args)
        tensors = (x for x in args if isinstance(x, Tensor))
        if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
            return self._function.apply(*args)
        return without_autograd(self._operator, *args)
