"""Private names of torch and of other packages that the library uses, and whether torch has them.

``USED`` lists them by module. A name that is not listed turns the first test red, a torch without
the name the second. GradScaler's own are in tests/guard/test_grad_scaler.py.
"""

import ast
import importlib
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import optimizer as torch_optimizer

import fastguard

PACKAGE = Path(fastguard.__file__).parent

#: Modules of the library -> private names of others that they use.
USED = {
    "_compiling.py": {"_is_exporting_flag"},
    "_tensors.py": {"_values"},
    "attention/module.py": {
        "_C",
        "_forward_hooks",
        "_forward_pre_hooks",
        "_functorch",
        "_has_any_global_hook",
    },
    "attention/scripted.py": {"_forward_pre_hooks"},
    "clip.py": {"_foreach_norm", "_nnz"},
    "diagnose/probes.py": {"_version"},
    "gpucheck/checks.py": {"_python_dispatch", "_schema"},
    "gpucheck/timing.py": {"_sleep"},
    "guard/accumulation.py": {"_disable_dynamo", "_foreach_zero_", "_version"},
    "guard/attached.py": {
        "_disable_dynamo",
        "_opt_called",
        "_optimizer_original_step_method",
        "_optimizer_patched_step_method",
        "_optimizer_step_pre_hooks",
        "_wrapped_by_lr_sched",
    },
    "guard/distributed.py": {"_fsdp_flattened", "_in_backward_optimizers"},
    "guard/grad_guard.py": {"_disable_dynamo"},
    "guard/grad_scaler.py": {"_growth_tracker", "_per_optimizer_states"},
    "guard/module_names.py": {
        "_checkpoint_wrapped_module",
        "_forward_module",
        "_fsdp_wrapped_module",
        "_modules",
        "_orig_mod",
    },
    "guard/parameters.py": {"_optimizer_load_state_dict_post_hooks"},
    "guard/update.py": {
        "_global_optimizer_post_hooks",
        "_global_optimizer_pre_hooks",
        "_optimizer_step_post_hooks",
        "_optimizer_step_pre_hooks",
        "_strategy",
        "_torchdynamo_orig_callable",
    },
    "integrations/accelerate.py": {"_is_overflow"},
    "ops/_autograd.py": {"_AutoDispatchBelowAutograd", "_C", "_functorch", "_schema"},
    "ops/attention.py": {"_C", "_current_level", "_functorch"},
}
#: Names that are documented (of named tuples), or that are ours and set under a text.
NOT_PRIVATE = {"_asdict", "_fields", "_replace", "_plain_class", "_fastguard_link", "_log_to"}
NOT_PRIVATE |= {"_cpu", "_cuda"}  # our libraries


def _named(node):
    """What an expression names: an attribute, a text such as getattr takes, or an import."""
    if isinstance(node, ast.Attribute):
        return [node.attr]
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [node.value] if re.fullmatch(r"_[a-z]\w+", node.value) else []
    if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
        return [*node.module.split("."), *(alias.name for alias in node.names)]
    return []


def _defined(node):
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
        owner = node.value.id if isinstance(node.value, ast.Name) else ""
        return [node.attr] if owner in ("self", "cls", "copy", "other", "call") else []
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        return [node.id]
    if isinstance(node, ast.alias):
        return [(node.asname or node.name).rpartition(".")[2]]
    return [node.arg] if isinstance(node, ast.arg) else []


def _nodes(path):
    return ast.walk(ast.parse(path.read_text(encoding="utf-8")))


def test_every_private_name_of_others_is_listed():
    files = [p for p in PACKAGE.rglob("*.py") if p.relative_to(PACKAGE).parts[0] != "speech"]
    ours = {name for path in files for node in _nodes(path) for name in _defined(node)}
    found = {}
    for path in files:
        names = {name for node in _nodes(path) for name in _named(node)}
        names = {n for n in names if re.match(r"_[A-Za-z]", n)} - ours - NOT_PRIVATE
        if names and path.relative_to(PACKAGE).parts[0] != "_io":
            found[path.relative_to(PACKAGE).as_posix()] = names
    assert found == USED


def _wrapped_step():
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    return optimizer


def _compiled():
    return torch.compile(nn.Linear(1, 1), backend="eager")


def _source(module):
    return Path(importlib.import_module(module).__file__).read_text(encoding="utf-8")


SGD = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
SPARSE = torch.ones(2).to_sparse()
#: Private name -> whether this torch has it.
IN_TORCH = {
    "_AutoDispatchBelowAutograd": lambda: callable(torch._C._AutoDispatchBelowAutograd),
    "_C": lambda: hasattr(torch, "_C"),
    "_disable_dynamo": lambda: callable(torch._disable_dynamo),
    "_foreach_norm": lambda: callable(torch._foreach_norm),
    "_foreach_zero_": lambda: callable(torch._foreach_zero_),
    "_forward_hooks": lambda: nn.Linear(1, 1)._forward_hooks is not None,
    "_forward_pre_hooks": lambda: nn.Linear(1, 1)._forward_pre_hooks is not None,
    "_fsdp_flattened": lambda: "_fsdp_flattened" in _source("torch.distributed.fsdp._flat_param"),
    "_fsdp_wrapped_module": lambda: (
        torch.distributed.fsdp.fully_sharded_data_parallel.FSDP_WRAPPED_MODULE
        == "_fsdp_wrapped_module"
    ),
    "_checkpoint_wrapped_module": lambda: (
        "_checkpoint_wrapped_module"
        in _source("torch.distributed.algorithms._checkpoint.checkpoint_wrapper")
    ),
    "_current_level": lambda: torch.autograd.forward_ad._current_level == -1,
    "_functorch": lambda: all(
        callable(getattr(torch._C._functorch, name))
        for name in (
            "get_unwrapped",
            "is_batchedtensor",
            "is_gradtrackingtensor",
            "peek_interpreter_stack",
        )
    ),
    "_global_optimizer_post_hooks": lambda: (
        torch_optimizer._global_optimizer_post_hooks is not None
    ),
    "_global_optimizer_pre_hooks": lambda: torch_optimizer._global_optimizer_pre_hooks is not None,
    "_is_exporting_flag": lambda: torch.compiler._is_exporting_flag is False,
    "_has_any_global_hook": lambda: not nn.modules.module._has_any_global_hook(),
    "_in_backward_optimizers": lambda: (
        "_in_backward_optimizers" in _source("torch.distributed.optim.apply_optimizer_in_backward")
    ),
    "_modules": lambda: "0" in nn.Sequential(nn.Linear(1, 1))._modules,
    "_nnz": lambda: SPARSE._nnz() == 2,
    "_opt_called": lambda: "_opt_called" in _source("torch.optim.lr_scheduler"),
    "_optimizer_load_state_dict_post_hooks": lambda: (
        SGD._optimizer_load_state_dict_post_hooks is not None
    ),
    "_optimizer_step_post_hooks": lambda: SGD._optimizer_step_post_hooks is not None,
    "_optimizer_step_pre_hooks": lambda: SGD._optimizer_step_pre_hooks is not None,
    "_orig_mod": lambda: isinstance(_compiled()._orig_mod, nn.Linear),
    "_python_dispatch": lambda: importlib.import_module("torch.utils._python_dispatch") is not None,
    "_schema": lambda: torch.ops.aten.add.Tensor._schema is not None,
    "_sleep": lambda: callable(torch.cuda._sleep),
    "_torchdynamo_orig_callable": lambda: hasattr(
        torch.compile(SGD.step, backend="eager"), "_torchdynamo_orig_callable"
    ),
    "_values": lambda: SPARSE._values().tolist() == [1.0, 1.0],
    "_version": lambda: torch.ones(1).add_(1)._version == 1,
    "_wrapped_by_lr_sched": lambda: _wrapped_step().step._wrapped_by_lr_sched,
}
#: Names of GradScaler, tested beside it; of accelerate, Lightning and Fabric, tested by the
#: integrations.
ELSEWHERE = {"_growth_tracker", "_per_optimizer_states", "_strategy", "_is_overflow"}
ELSEWHERE |= {"_forward_module", "_optimizer_original_step_method"}
ELSEWHERE |= {"_optimizer_patched_step_method"}


def test_every_private_name_has_a_check():
    assert set.union(*USED.values()) == {*IN_TORCH, *ELSEWHERE}


@pytest.mark.parametrize("name", IN_TORCH)
def test_this_torch_has_it(name):
    users = sorted(module for module, names in USED.items() if name in names)
    try:
        there, why = IN_TORCH[name](), ""
    except (AttributeError, ImportError) as error:
        there, why = False, f" ({error})"
    assert there, f"torch {torch.__version__} changed {name}{why}: mend {', '.join(users)}"
