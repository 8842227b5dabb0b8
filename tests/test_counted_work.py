"""What a guarded step asks for, counted: operators and Python calls. No time is measured.

The bytes and launches of the CUDA kernels are counted in tests/simt/test_kernels.py.
"""

import sys
from collections import Counter

import pytest
import torch
from torch.profiler import profile

import fastguard
from tests.tensors import parameters_with

OURS = "fastguard::"


def step_of(count, dtype=torch.float32, **options):
    """A guarded step of so many parameters that has run before, with new gradients."""
    parameters = parameters_with([torch.randn(7, dtype=dtype) for _ in range(count)])
    guard = fastguard.GradGuard(parameters, max_norm=1.0)
    optimizer = fastguard.AdamW(parameters, **options)
    for _ in range(3):
        guard.step(optimizer)
    return lambda: guard.step(optimizer)


def operators(function):
    with profile() as profiler:
        function()
    return Counter({event.key: event.count for event in profiler.key_averages()})


def python_calls(function):
    """Calls of Python's functions and of C's."""
    calls = Counter()

    def count(frame, event, argument):
        calls[event] += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(None)
    return calls.total()


@pytest.mark.parametrize(
    "options",
    [{}, {"dtype": torch.bfloat16, "master_weights": True}, {"amsgrad": True}],
    ids=["fp32", "masters", "amsgrad"],
)
def test_a_guarded_step_is_two_operators_for_any_number_of_tensors(options):
    few, many = (operators(step_of(count, **options)) for count in (3, 300))
    ours = {name: count for name, count in many.items() if name.startswith(OURS)}
    assert ours == {"fastguard::grad_norm_decide_": 1, "fastguard::adamw_": 1}
    assert few == many
    # The report's ring, views of it, and the order of the optimizer's coefficients.
    assert many.total() <= 24


def test_a_tensor_costs_no_call_of_python():
    few, many = (python_calls(step_of(count)) for count in (100, 300))
    assert few == many <= 500


@pytest.mark.parametrize("count", [3, 300])
def test_clipping_is_one_operator(count):
    parameters = parameters_with([torch.ones(7) for _ in range(count)])
    found = operators(lambda: fastguard.clip_grad_norm_(parameters, 1.0))
    assert sum(n for name, n in found.items() if name.startswith(OURS)) == 1
