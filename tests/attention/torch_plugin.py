"""pytest's plugin for `tests.attention.torch_suite`: one run of torch's tests, with our attention.

It is loaded into a process of its own, because it changes torch.
"""

from __future__ import annotations

import functools
import json
import unittest
from pathlib import Path
from types import ModuleType

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--attention", choices=("torch", "ours"), required=True)
    parser.addoption("--outcomes", type=Path, required=True)
    parser.addoption("--any-text", action="store_true")


def pytest_configure(config):
    recorder = Recorder(config.option.outcomes)
    if config.option.attention == "ours":
        replace_attention(recorder)
    for file, restore in OLDER_NAMES.items():
        if any(file in argument for argument in config.args):
            restore()
    if config.option.any_text:
        accept_any_text()
    config.pluginmanager.register(recorder)


class Recorder:
    """Writes {test: [outcome, message, number of attentions of ours that were made]}."""

    def __init__(self, path: Path):
        self.path = path
        self.found = {}
        self.made = 0

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        before = self.made
        result = yield
        self.found[item.nodeid][2] = self.made - before
        return result

    def pytest_runtest_logreport(self, report):
        """Called for setup, call, teardown and each subtest; the worst outcome is the test's."""
        entry = self.found.setdefault(report.nodeid, ["passed", "", 0])
        outcome = "expected to fail" if hasattr(report, "wasxfail") else report.outcome
        if report.outcome != "passed" and entry[0] != "failed":
            entry[0] = outcome
        if report.outcome == "failed":
            crash = getattr(report.longrepr, "reprcrash", None)
            entry[1] = entry[1] or str(crash.message if crash else report.longrepr)

    def pytest_sessionfinish(self):
        self.path.write_text(json.dumps(self.found), encoding="utf-8")


def replace_attention(recorder: Recorder) -> None:
    """Put our class, with ``clamp=None``, in the places where torch and its tests look for it."""
    from fastguard.attention import ClampedMultiheadAttention as Ours

    init = Ours.__init__

    @functools.wraps(init)
    def without_clamp(self, *args, **options):
        recorder.made += 1
        init(self, *args, **({"clamp": None} | options))

    Ours.__init__ = without_clamp
    for module in (
        torch.nn,
        torch.nn.modules,
        torch.nn.modules.activation,
        torch.nn.modules.transformer,
    ):
        assert issubclass(Ours, module.MultiheadAttention)
        module.MultiheadAttention = Ours


def restore_names_of_test_nn() -> None:
    from torch.testing._internal import common_cuda, common_mkldnn, common_nn

    restore(common_cuda, "tf32_is_not_fp32", lambda: False)  # what it says on a CPU
    restore(common_mkldnn, "bf32_on_and_off", common_mkldnn.reduced_f32_on_and_off)
    restore(common_nn, "new_module_tests", common_nn.get_new_module_tests())


def restore_names_of_test_jit() -> None:
    from torch.jit import frontend
    from torch.testing._internal import common_nn, common_utils, jit_metaprogramming_utils

    new, every = common_nn.get_new_module_tests(), jit_metaprogramming_utils.get_all_nn_module_tests
    restore(frontend, "_IS_ASTUNPARSE_INSTALLED", True)
    restore(common_nn, "new_module_tests", new)
    additional = every()[len(common_nn.module_tests) + len(new) :]
    restore(jit_metaprogramming_utils, "additional_module_tests", additional)
    if common_utils.GRAPH_EXECUTOR is None:  # set by the command line of torch's own runner
        common_utils.GRAPH_EXECUTOR = common_utils.cppProfilingFlagsToProfilingMode()


def restore(module: ModuleType, name: str, value: object) -> None:
    if not hasattr(module, name):
        setattr(module, name, value)


#: Files of torch 2.6's tests that import, from torch's test helpers, names that torch 2.14 has not.
OLDER_NAMES = {
    "test_nn.py": restore_names_of_test_nn,
    "test_jit.py": restore_names_of_test_jit,
}


def accept_any_text() -> None:
    """Compare the types of errors only."""

    def of_type(self, error, _text, *args, **kwargs):
        return self.assertRaises(error, *args, **kwargs)

    unittest.TestCase.assertRaisesRegex = of_type
