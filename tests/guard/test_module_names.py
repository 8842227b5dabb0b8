"""Names are those of the wrapped module, and a user's own parts keep theirs."""

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from fastguard.guard import module_names


class Part(nn.Module):
    """With parts that have the names that wrappers use."""

    def __init__(self):
        super().__init__()
        self.module = nn.Linear(2, 2)
        self._forward_module = nn.Linear(2, 2)
        self.own = nn.Parameter(torch.zeros(1))


EXPECTED = [
    "own",
    "module.weight",
    "module.bias",
    "_forward_module.weight",
    "_forward_module.bias",
]


def ddp(module):
    """Built without a process group."""
    wrapper = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(wrapper)
    wrapper.module = module
    return wrapper


def fabric(module):
    wrappers = pytest.importorskip("lightning.fabric.wrappers")
    return wrappers._FabricModule(module, None)


WRAPPERS = {
    "none": lambda module: module,
    "DDP": ddp,
    "DataParallel": nn.DataParallel,
    "compile": torch.compile,
    "checkpoint": checkpoint_wrapper,
    "Fabric": fabric,
    "Fabric of DDP of compile": lambda module: fabric(ddp(torch.compile(module))),
}


def names_of(module):
    names = module_names.Names(module)
    return [names.of_parameter(name) for name, _ in module.named_parameters()]


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_the_names_are_those_of_the_wrapped_module(wrap):
    assert names_of(wrap(Part())) == EXPECTED
    assert names_of(nn.ModuleDict({"a": wrap(Part())})) == ["a." + name for name in EXPECTED]


def test_names_of_modules():
    model = ddp(nn.Sequential(checkpoint_wrapper(Part())))
    names = module_names.Names(model)
    found = [names.of_module(path) for path, _ in model.named_modules()]
    assert found == ["", "", "0", "0", "0.module", "0._forward_module"]


def test_a_module_that_names_its_parameters_otherwise():
    class Renames(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = nn.Linear(2, 2)

        def named_parameters(self, *args, **kwargs):
            yield from ((f"at.{name}", p) for name, p in super().named_parameters(*args, **kwargs))

    assert names_of(Renames()) == ["at.module.weight", "at.module.bias"]


def test_a_subclass_of_a_wrapper_is_one_and_a_namesake_is_not():
    class Mine(nn.DataParallel):
        pass

    class DataParallel(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    assert names_of(Mine(Part())) == EXPECTED
    assert names_of(DataParallel(Part())) == ["module." + name for name in EXPECTED]
