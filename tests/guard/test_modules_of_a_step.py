"""How many modules a reader meets on the path of a gradient, from ``guard.step`` to the kernels.

On the path are the modules one of whose functions holds a gradient of the step: in a local variable
or an argument, also inside of lists, tuples and dicts. ``ON_THE_PATH`` limits their number.
The other modules of a step decide nothing about gradients: statistics, buffers, reports, warnings.
``IN_A_STEP`` keeps the number of all modules of a step from growing.
"""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fastguard
from fastguard import GradGuard

PACKAGE = Path(fastguard.__file__).parent
ON_THE_PATH, IN_A_STEP = 8, 19


def tensors_in(value, depth=4):
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple, dict)) and depth:
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(item, depth - 1)


def modules_of_a_step(optimizer_class, **settings):
    """The modules whose functions ran, and those of them whose functions held a gradient."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    optimizer = optimizer_class(model.parameters(), lr=0.1)
    guard = GradGuard(model, **settings)
    ran, on_the_path = set(), set()

    def note(frame, event, _):
        path = Path(frame.f_code.co_filename)
        if event != "return" or PACKAGE not in path.parents:
            return
        module = path.relative_to(PACKAGE).as_posix()
        ran.add(module)
        if module not in on_the_path:
            held = tensors_in(list(frame.f_locals.values()))
            if any(id(tensor) in gradients for tensor in held):
                on_the_path.add(module)

    for step in range(3):
        optimizer.zero_grad()
        loss = model(torch.randn(8, 4)).sum()
        loss.backward()
        gradients = {id(p.grad) for p in model.parameters()}
        if step == 2:  # the steps before made what stays
            sys.setprofile(note)
        try:
            guard.step(optimizer, loss=loss)
        finally:
            sys.setprofile(None)
    return ran, on_the_path


@pytest.mark.parametrize("optimizer_class", [fastguard.AdamW, torch.optim.SGD])
def test_a_gradient_passes_few_modules(optimizer_class):
    ran, on_the_path = modules_of_a_step(optimizer_class)
    assert {"guard/grad_guard.py", "guard/decision.py", "guard/update.py"} <= on_the_path
    assert len(on_the_path) <= ON_THE_PATH, sorted(on_the_path)
    assert len(ran) <= IN_A_STEP, sorted(ran)


def test_what_is_not_in_use_is_not_on_the_way():
    ran, _ = modules_of_a_step(fastguard.AdamW)
    unused = {"accumulation", "attached", "distributed", "report_files", "state"}
    assert not ran & {f"guard/{name}.py" for name in unused}
