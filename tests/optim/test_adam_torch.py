"""Adam and AdamW over the inputs of torch's own tests of its optimizers, beside torch's."""

import copy
import functools
import inspect
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

import fastguard
from tests.tensors import assert_close

PAIRS = [(fastguard.Adam, torch.optim.Adam), (fastguard.AdamW, torch.optim.AdamW)]
IMPLEMENTATIONS = [{}, {"foreach": True}, {"foreach": False}, {"fused": True}, {"fused": False}]

# In a process of its own, because importing torch's test helpers changes torch's global settings.
# Of the device the inputs know the name only; "cuda" adds those with capturable=True.
_INPUTS = """
import pickle, sys, torch
from torch.testing._internal.common_optimizers import optim_db
found = {}
for info in optim_db:
    if info.optim_cls in (torch.optim.Adam, torch.optim.AdamW):
        given = [i.kwargs for device in ("cpu", "cuda") for i in info.optim_inputs_func(device)]
        errors = info.optim_error_inputs_func(device="cpu", dtype=torch.float32)
        errors = [(e.optimizer_error_input.params, e.optimizer_error_input.kwargs, e.error_type,
                   e.error_regex, e.error_on.name) for e in errors]
        found[info.optim_cls.__name__] = given, errors
sys.stdout.buffer.write(pickle.dumps(found))
"""


@functools.cache
def _found():
    run = [sys.executable, "-W", "ignore", "-c", _INPUTS]
    return pickle.loads(subprocess.run(run, stdout=subprocess.PIPE, check=True).stdout)


def inputs_of(theirs):
    """Keyword arguments, and errors as (params, kwargs, type, regex, when)."""
    given, errors = copy.deepcopy(_found()[theirs.__name__])
    assert len(given) >= 10 and len(errors) >= 10
    assert any(kwargs.get("capturable") for kwargs in given)
    assert any(isinstance(kwargs.get("betas", (0,))[0], torch.Tensor) for kwargs in given)
    return given, errors


def parameters():
    """Of several layouts and kinds: 2-D, with gaps, complex, 0-d and empty."""
    torch.manual_seed(0)
    shapes = [(3, 4), (5, 2), (2, 3), (), (0,)]
    dtypes = [torch.float32, torch.float32, torch.complex64, torch.float32, torch.float32]
    made = [torch.randn(s, dtype=d) for s, d in zip(shapes, dtypes, strict=True)]
    made[1] = torch.randn(5, 2, 2)[..., 0]
    return [nn.Parameter(values) for values in made]


def closure_of(params, step):
    """Gives gradients for the step; the first parameter has none in step 2."""

    def closure():
        generator = torch.Generator().manual_seed(step)
        for p in params:
            p.grad = torch.randn(p.shape, dtype=p.dtype, generator=generator)
        if step == 2:
            params[0].grad = None
        return step

    return closure


def run(optimizer, steps):
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for step in steps:
        assert optimizer.step(closure_of(params, step)) == step
    return params


def assert_same(mine, other):
    here = [p for group in mine.param_groups for p in group["params"]]
    there = [p for group in other.param_groups for p in group["params"]]
    assert_close(here, there)
    assert [p in mine.state for p in here] == [q in other.state for q in there]
    for p, q in zip(here, there, strict=True):
        assert mine.state[p].keys() == other.state[q].keys()
        for name, entry in other.state[q].items():
            torch.testing.assert_close(mine.state[p][name], entry)


def on_cpu(kwargs):
    """For torch's, which refuses ``capturable`` on the CPU. It takes part in no formula."""
    return {name: value for name, value in kwargs.items() if name != "capturable"}


def pairs_of_optimizers(ours, theirs, params=parameters):
    """Each of torch's inputs with each implementation, but for those that torch refuses."""
    for implementation in IMPLEMENTATIONS:
        for kwargs in inputs_of(theirs)[0]:
            # torch has no fused step of complex parameters.
            there = {name: value for name, value in implementation.items() if name != "fused"}
            try:
                other = theirs(params(), **on_cpu(kwargs), **there)
            except ValueError as error:
                if kwargs.get("capturable"):
                    continue  # with it torch takes a tensor there
                with pytest.raises(ValueError, match=str(error)):
                    ours(params(), **kwargs, **implementation)
                continue
            yield ours(params(), **kwargs, **implementation), other


@pytest.mark.parametrize("ours, theirs", PAIRS)
def test_the_signature_is_torchs_and_master_weights(ours, theirs):
    mine, other = (dict(inspect.signature(each).parameters) for each in (ours, theirs))
    added = mine.pop("master_weights")
    assert added.kind == inspect.Parameter.KEYWORD_ONLY and added.default is False
    assert [*mine.values()] == [*other.values()]
    p = [torch.ones(1)]
    assert ours(p).param_groups[0].keys() == theirs(p).param_groups[0].keys()
    positional = (p, 0.1, (0.5, 0.6), 0.2, 0.3, True)
    (mine,), (other,) = ours(*positional).param_groups, theirs(*positional).param_groups
    assert mine == other


@pytest.mark.parametrize("ours, theirs", PAIRS)
def test_each_input_steps_as_torch(ours, theirs):
    count = 0
    for mine, other in pairs_of_optimizers(ours, theirs):
        run(mine, range(7))
        run(other, range(7))
        assert_same(mine, other)
        count += 1
    assert count >= 40


@pytest.mark.parametrize("ours, theirs", PAIRS)
def test_each_input_as_options_of_a_group(ours, theirs):
    for kwargs in inputs_of(theirs)[0]:
        optimizers = []
        for build, given in ((ours, kwargs), (theirs, on_cpu(kwargs))):
            one, *others = parameters()
            groups = [{"params": [one], **given, "weight_decay": 0.3}, {"params": others}]
            optimizers.append(build(groups, lr=0.01))
            run(optimizers[-1], range(5))
        assert_same(*optimizers)


@pytest.mark.parametrize("ours, theirs", PAIRS)
def test_a_state_dict_takes_its_flags_along_both_ways(ours, theirs):
    """torch's flags load into ours, and ours leave torch's optimizer as its user wants it."""
    flags = ("foreach", "fused", "capturable", "differentiable")
    for mine, other in pairs_of_optimizers(ours, theirs):
        run(other, range(3))
        saved = other.state_dict()
        loaded, back = ours(run(mine, range(3))), theirs(parameters())
        loaded.load_state_dict(saved)
        assert [[g[f] for f in flags] for g in loaded.param_groups] == [
            [g[f] for f in flags] for g in saved["param_groups"]
        ]
        run(other, range(3, 6))
        run(loaded, range(3, 6))
        assert_same(loaded, other)
        back.load_state_dict(copy.deepcopy(loaded.state_dict()))
        for p, q in zip(back.param_groups[0]["params"], parameters(), strict=True):
            p.data = q.data
        for p, q in zip(loaded.param_groups[0]["params"], parameters(), strict=True):
            p.data = q.data
        run(loaded, range(6, 9))
        run(back, range(6, 9))
        assert_same(loaded, back)


def test_nothing_given_leaves_torch_its_choice():
    mine = fastguard.AdamW(parameters())
    run(mine, range(2))
    saved = mine.state_dict()["param_groups"][0]
    assert (saved["fused"], saved["foreach"], saved["capturable"]) == (None, None, False)


@pytest.mark.parametrize("ours, theirs", PAIRS)
def test_a_differentiable_state_dict_loads(ours, theirs):
    def real():
        return [nn.Parameter(torch.arange(3.0))]

    def step(optimizer):
        optimizer.param_groups[0]["params"][0].grad = torch.tensor([0.3, -1.0, 2.0])
        optimizer.step()

    other, mine = theirs(real()), ours(real())
    step(other)
    saved = other.state_dict()
    saved["param_groups"][0]["differentiable"] = True
    mine.load_state_dict(saved)
    assert mine.param_groups[0]["differentiable"] is False
    mine.param_groups[0]["params"][0].data = other.param_groups[0]["params"][0].data.clone()
    step(mine)
    step(other)
    assert_same(mine, other)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
@pytest.mark.parametrize("ours, theirs", PAIRS)
def test_copies_go_on_as_the_original(ours, theirs, way):
    for mine, _ in pairs_of_optimizers(ours, theirs):
        run(mine, range(3))
        other = way(mine)
        assert vars(other).keys() >= {name for name in vars(mine) if name[0] != "_"}
        assert other.state_dict()["param_groups"] == mine.state_dict()["param_groups"]
        run(mine, range(3, 5))
        run(other, range(3, 5))
        assert_same(mine, other)


@pytest.mark.parametrize("ours, theirs", PAIRS)
def test_torchs_error_inputs_raise_the_same_errors(ours, theirs):
    for params, kwargs, kind, regex, when in inputs_of(theirs)[1]:
        assert when == "CONSTRUCTION_ERROR"
        # torch warns of one of them on the way to its error.
        with warnings.catch_warnings():
            warnings.simplefilter("error" if issubclass(kind, Warning) else "ignore")
            with pytest.raises(kind, match=regex):
                ours(params, **kwargs)


@pytest.mark.parametrize("ours, theirs", PAIRS)
def test_flags_that_exclude_each_other(ours, theirs):
    for build in (ours, theirs):
        with pytest.raises(RuntimeError, match="`fused` and `foreach` cannot be `True` together"):
            build(parameters(), foreach=True, fused=True)
        with pytest.raises(RuntimeError, match="`fused` does not support `differentiable`"):
            build(parameters(), fused=True, differentiable=True)


@pytest.mark.parametrize("ours, theirs", PAIRS)
def test_differentiable_is_refused_with_the_class_to_use(ours, theirs):
    message = rf"use torch\.optim\.{theirs.__name__}\(\.\.\., differentiable=True\)"
    with pytest.raises(RuntimeError, match=message):
        ours(parameters(), differentiable=True)
    with pytest.raises(RuntimeError, match=message):
        ours([{"params": parameters(), "differentiable": True}])
    mine = ours(parameters(), differentiable=False)
    with pytest.raises(RuntimeError, match=message):
        mine.add_param_group({"params": parameters(), "differentiable": True})
    assert len(mine.param_groups) == 1
    with pytest.raises(TypeError, match="param_group must be a dict"):
        mine.add_param_group(parameters())


def test_fused_is_refused_on_meta_as_by_torch():
    model = nn.Linear(2, 3, device="meta")
    mine = fastguard.AdamW(model.parameters(), fused=True)
    for p in model.parameters():
        p.grad = torch.empty_like(p)
    with pytest.raises(RuntimeError, match=r"`fused=True` requires .*call model.to_empty"):
        mine.step()
    assert not any(mine.state.values())
    for p in model.to_empty(device="cpu").parameters():
        p.data.zero_()
        p.grad = torch.ones_like(p)
    fastguard.AdamW(model.parameters(), fused=True).step()
    assert all(p.lt(0).all() for p in model.parameters())
