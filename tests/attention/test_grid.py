"""Other people's models, in each mode and each way to run them: the clamp acts, or changes nothing.

In each cell a tiny clamp gives what attention written out gives in float64, and no clamp what the
stock model gives, gradients too. Two ways to run, compiled and exported, take a second a cell: the
modes in which they are most used run by default, the others and inductor are slow.
"""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from fastguard import ClampedMultiheadAttention, replace_attention_, unused_attention

from .cases import TORCHS_WARNINGS, draw
from .grid_models import EXAMPLES, Example, example, write_out_attention_

pytestmark = TORCHS_WARNINGS

CLAMP = 1e-3

MODES = {
    "train": contextlib.nullcontext,
    "eval": contextlib.nullcontext,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
}

#: Where the two slow ways run by default: in training and in one kind of inference each.
BY_DEFAULT = {"compile": ("train", "inference_mode"), "export": ("train", "no_grad")}


#: What the stock model cannot do either, and the errors of torch that say so.
IMPOSSIBLE = {
    # Its length is the largest element of a tensor.
    ("torchaudios_conformer", "export"): (RuntimeError, "data-dependent expression"),
    # LoRA puts other weights into the module in each forward. Merged, it has none: see below.
    ("pefts_encoder", "export"): ((RuntimeError, StopIteration), "fake tensor|^$"),
    ("pefts_encoder", "compile"): (RuntimeError, "set_ on a graph input"),
}


def expected_error(name: str, mode: str, how: str):
    """Of a cell that is impossible, what raises its error; nothing of others."""
    without_gradients = mode in ("no_grad", "inference_mode")
    if (name, how) not in IMPOSSIBLE or (how == "compile" and without_gradients):
        return None
    error, message = IMPOSSIBLE[name, how]
    return lambda: pytest.raises(error, match=message)


@contextlib.contextmanager
def fast_path(on: bool):
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(on)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def outcome(
    given: Example, run: nn.Module, mode: str, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, dict[str, Tensor]]:
    """The output and, where gradients are on, those of the parameters."""
    args, kwargs = given.to(dtype)
    with MODES[mode]():
        output = given.output(run(*args, **kwargs))
    if not output.requires_grad:
        return output, {}
    output.square().sum().backward()
    return output.detach(), {n: p.grad for n, p in run.named_parameters() if p.grad is not None}


def through(how: str, model: nn.Module, given: Example, mode: str, backend: str = "aot_eager"):
    """What runs the model: itself, or what compiles or exports it."""
    if how == "compile":
        torch._dynamo.reset()
        model.compile(backend=backend)
        return model
    if how == "export":
        with MODES[mode]():
            return torch.export.export(model, given.args, given.kwargs).module()
    return model


def assert_close(got, expected, what: str) -> None:
    """Differences small beside the largest element."""
    (output, grads), (expected_output, expected_grads) = got, expected
    assert grads.keys() == expected_grads.keys()
    pairs = {"output": (output, expected_output)}
    pairs |= {name: (grads[name], expected_grads[name]) for name in grads}
    for name, (a, b) in pairs.items():
        tolerance = 1e-5 * max(1.0, b.abs().max().item())
        message = lambda m, name=name: f"{what}: {name}: {m}"  # noqa: E731
        torch.testing.assert_close(a.double(), b.double(), rtol=0, atol=tolerance, msg=message)


def replaced(name: str, mode: str, clamp: float | None) -> Example:
    given = example(name)
    given.model.train(mode == "train")
    assert replace_attention_(given.model, clamp=clamp).left_alone == {}
    return given


def check(name: str, mode: str, how: str, **options) -> None:
    stock = example(name)
    stock.model.train(mode == "train")
    if raises := expected_error(name, mode, how):
        for given in (stock, replaced(name, mode, CLAMP)):
            with fast_path(False), raises():
                outcome(given, through(how, given.model, given, mode, **options), mode)
        return
    # In evaluation torch's fast path reads weights, and leaves out an adapter.
    with fast_path(name != "pefts_encoder"):
        expected = outcome(stock, stock.model, mode)
    given = replaced(name, mode, None)
    got = outcome(given, through(how, given.model, given, mode, **options), mode)
    assert_close(got, expected, "stock")

    written = example(name)
    write_out_attention_(written.model.train(mode == "train").double(), CLAMP)
    with fast_path(False):
        expected_clamped = outcome(written, written.model, mode, torch.float64)
    given = replaced(name, mode, CLAMP)
    got = outcome(given, through(how, given.model, given, mode, **options), mode)
    assert_close(got, expected_clamped, "clamped")
    assert (got[0] - expected[0]).abs().max() > 1e-2, "the clamp does nothing"
    assert (mode in ("train", "eval")) == bool(got[1])
    if how != "export":
        assert unused_attention(given.model) == []


CELLS = [
    pytest.param(
        *(name, mode, how),
        marks=[pytest.mark.slow] * (how != "eager" and mode not in BY_DEFAULT[how]),
    )
    for name in EXAMPLES
    for mode in MODES
    for how in ("eager", "compile", "export")
]


@pytest.mark.parametrize("name, mode, how", CELLS)
def test_a_cell(name, mode, how):
    check(name, mode, how)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["train", "no_grad"])
@pytest.mark.parametrize("name", EXAMPLES)
def test_inductor(name, mode):
    check(name, mode, "compile", backend="inductor")


@pytest.mark.parametrize("how", ["compile", "export"])
def test_a_merged_adapter_is_compiled_and_exported(how):
    given, free = replaced("pefts_encoder", "eval", CLAMP), replaced("pefts_encoder", "eval", None)
    expected = outcome(given, given.model, "no_grad")
    merged = given.model.merge_and_unload()
    assert_close(outcome(given, through(how, merged, given, "no_grad"), "no_grad"), expected, how)
    assert (expected[0] - outcome(free, free.model, "no_grad")[0]).abs().max() > 1e-2


@pytest.mark.parametrize("record", [False, True])
@pytest.mark.parametrize("name", ["encoder", "torchvisions_vit"])
def test_one_graph_of_any_length(name, record):
    """`fullgraph=True` and `dynamic=True`: no break of the graph, and no compilation anew."""
    torch._dynamo.reset()
    given, counter = replaced(name, "train", CLAMP), CompileCounterWithBackend("eager")
    for module in given.model.modules():
        if isinstance(module, ClampedMultiheadAttention):
            module.record_stats, recorded = record, module
    compiled = torch.compile(given.model, fullgraph=True, dynamic=True, backend=counter)
    for batch in (2, 3, 5):
        shape = (batch, batch + 4, 8) if name == "encoder" else (batch, *given.args[0].shape[1:])
        x = draw(*shape, seed=batch).float()
        output = compiled(x)
        assert counter.frame_count == 1
        stats = recorded.stats
        assert (stats is not None) is record and unused_attention(given.model) == []
        torch.testing.assert_close(output, given.model(x))
        torch.testing.assert_close(recorded.stats, stats)


@pytest.mark.parametrize("how", ["compile", "export"])
def test_dropout_of_a_program_is_drawn_anew(how):
    """A program that was exported in training drops weights as the model does: at each call."""
    given = replaced("decoder", "train", 10.0)
    for module in given.model.modules():
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.5
    run = through(how, given.model, given, "train")
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(run(*given.args, **given.kwargs))
    torch.testing.assert_close(outputs[0], outputs[1])
    assert (outputs[0] - outputs[2]).abs().max() > 1e-2
