"""Names of parameters and modules without the prefixes of wrappers.

DistributedDataParallel calls a weight ``module.0.weight``, torch.compile ``_orig_mod.0.weight``.
The guard uses the names of the wrapped module, so its state fits with and without wrappers.
"""

import functools

from torch import nn

#: A wrapper's class, as (module, name), and the attribute that holds the wrapped module. Names need
#: no import of packages that are not in use.
_WRAPS = {
    ("torch.nn.parallel.distributed", "DistributedDataParallel"): "module",
    ("torch.nn.parallel.data_parallel", "DataParallel"): "module",
    ("torch._dynamo.eval_frame", "OptimizedModule"): "_orig_mod",
    (
        "torch.distributed.algorithms._checkpoint.checkpoint_wrapper",
        "ActivationWrapper",
    ): "_checkpoint_wrapped_module",
    (
        "torch.distributed.fsdp.fully_sharded_data_parallel",
        "FullyShardedDataParallel",
    ): "_fsdp_wrapped_module",
    ("lightning.fabric.wrappers", "_FabricModule"): "_forward_module",
    ("lightning_fabric.wrappers", "_FabricModule"): "_forward_module",
}


@functools.cache
def _wrapped_by(cls: type) -> str | None:
    places = ((base.__module__, base.__name__) for base in cls.__mro__)
    return next((_WRAPS[place] for place in places if place in _WRAPS), None)


class Names:
    """The names of a module's submodules and parameters without wrappers.

    A prefix is removed only if the module at that path is a wrapper: a submodule that the user
    called ``module`` keeps its name.
    """

    def __init__(self, root: nn.Module):
        self._known: dict[str, tuple[nn.Module | None, str]] = {"": (root, "")}

    def of_module(self, path: str) -> str:
        return self._resolve(path)[1]

    def of_parameter(self, name: str) -> str:
        path, _, last = name.rpartition(".")
        return _join(self.of_module(path), last)

    def _resolve(self, path: str) -> tuple[nn.Module | None, str]:
        if path not in self._known:
            above, _, last = path.rpartition(".")
            parent, name = self._resolve(above)
            if parent is None or _wrapped_by(type(parent)) != last:
                name = _join(name, last)
            # No child is found where a wrapper gave names without its own prefix.
            child = None if parent is None else parent._modules.get(last)
            self._known[path] = child, name
        return self._known[path]


def bare(name: str) -> str:
    """The name without all words that are a wrapper's prefix, even if the user chose the word."""
    prefixes = set(_WRAPS.values())
    return ".".join(part for part in name.split(".") if part not in prefixes)


def _join(path: str, last: str) -> str:
    return f"{path}.{last}" if path else last
