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


def wants_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd would record an operator of these tensors."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


class Differentiable:
    """An operator of csrc/ops.cpp with its derivative.

    Its registered autograd costs some 20 us a pass more than an autograd.Function, a tenth of short
    attention; compilers and torch.func need the former. Autograd also takes some 0.5 us for each
    argument and each result. It does not look into tuples: one holds the arguments that have no
    gradient, and one the results.

    Args:
        name: as in csrc/ops.cpp. The operator of its derivative is ``name_backward``.
        save: called with ctx, all arguments and the results (a tensor or a tuple), saves what the
            derivative needs.
        backward: called with ctx, the backward operator and the gradients of the first results
            (None where there is none, but not all None), returns the gradients of the first
            arguments.
        arguments: how many of the arguments may have a gradient; they come first.
        results: how many of the results have a gradient; they come first.
        instead: what to use where second derivatives are needed, for the error.
    """

    def __init__(
        self,
        name: str,
        save: Callable,
        backward: Callable,
        arguments: int,
        results: int = 1,
        instead: str = "",
    ):
        self._first = arguments
        if _library.cpu_problem is not None:
            return
        operator = getattr(torch.ops.fastguard, name).default
        derivative = getattr(torch.ops.fastguard, f"{name}_backward").default
        every = len(operator._schema.arguments)
        alone = len(operator._schema.returns) == 1

        def derive(*args):
            if torch.is_grad_enabled() or torch.compiler.is_compiling():
                return derivative(*args)  # of second derivatives, which are refused
            return without_autograd(derivative, *args)

        def differentiate(ctx, *grads):
            if all(grad is None for grad in grads[:results]):
                return (None,) * arguments
            found = backward(ctx, derive, *grads[:results])
            return (found,) if isinstance(found, Tensor) else tuple(found)

        def differentiate_all(ctx, *grads):
            return (*differentiate(ctx, *grads), *[None] * (every - arguments))

        def refuse(ctx, *grads):
            raise NotImplementedError(
                f"fastguard's {name} has first derivatives only: use create_graph=False{instead}"
            )

        class Function(torch.autograd.Function):
            @staticmethod
            def forward(ctx, options, *tensors):
                inputs = (*tensors, *options)
                output = without_autograd(operator, *inputs)
                save(ctx, inputs, output)
                ctx.set_materialize_grads(False)
                return (output, ()) if alone else (*output[:results], output[results:])

            @staticmethod
            def backward(ctx, *grads):
                return (None, *differentiate(ctx, *grads))

        torch.library.register_autograd(f"fastguard::{name}", differentiate_all, setup_context=save)
        torch.library.register_autograd(f"fastguard::{name}_backward", refuse)
        self._operator, self._function, self._alone = operator, Function, alone

    def __call__(self, *args):
        """The operator's results."""
        transformed = torch._C._functorch.peek_interpreter_stack() is not None
        if torch.compiler.is_compiling() or transformed:
            return self._operator(*args)
        tensors = args[: self._first]
        return self.at_once(tensors, args[self._first :], wants_grad(*tensors))

    def at_once(self, tensors: tuple[Tensor | None, ...], options: tuple, recorded: bool):
        """The results where no compiler and no transformation runs.

        Args:
            tensors: the arguments that may have a gradient.
            options: the others.
            recorded: whether a gradient is wanted.
        """
        if not recorded:
            return without_autograd(self._operator, *tensors, *options)
        *found, rest = self._function.apply(options, *tensors)
        return found[0] if self._alone else (*found, *rest)
