"""An interpreter of PTX, which executes what nvcc made of the CUDA kernels. README.md says more."""

from .error import Error, UnknownForm
from .machine import Machine, Order
from .program import Program

__all__ = ["Error", "Machine", "Order", "Program", "UnknownForm"]
