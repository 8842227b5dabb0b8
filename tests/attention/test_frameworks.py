"""What torch and others do to modules, done to attention before and after it is replaced."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint

from fastguard import replace_attention_, unused_attention

from .cases import TORCHS_WARNINGS, draw

pytestmark = [
    *TORCHS_WARNINGS,
    pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*spectral_norm:FutureWarning"),
]


def encoder(layers: int = 1) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


def results(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """Output in training, in inference, and the gradients."""
    model.train().zero_grad()
    output = model(x)
    output.square().sum().backward()
    with torch.no_grad():
        inference = model.eval()(x)
    return output.detach(), inference, [p.grad for p in model.parameters()]


X = draw(2, 5, 8, seed=0).float()

#: What changes the weights of an attention, and whether it makes another class of it.
CHANGES = {
    "weight norm, output": lambda a: parametrizations.weight_norm(a.out_proj),
    "spectral norm, output": lambda a: parametrizations.spectral_norm(a.out_proj),
    "old weight norm, output": lambda a: weight_norm(a.out_proj),
    "pruned output": lambda a: prune.l1_unstructured(a.out_proj, "weight", 0.5),
    "weight norm, input": lambda a: parametrizations.weight_norm(a, "in_proj_weight"),
    "old weight norm, input": lambda a: weight_norm(a, "in_proj_weight"),
    "old spectral norm, input": lambda a: spectral_norm(a, "in_proj_weight"),
    "pruned input": lambda a: prune.l1_unstructured(a, "in_proj_weight", 0.5),
}
MAKES_A_CLASS = {"weight norm, input"}


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("change", CHANGES)
def test_weights_that_are_made_of_others(change, order):
    def changed(clamp, order):
        model = encoder()
        if order == "before":
            replace_attention_(model, clamp=clamp)
        torch.manual_seed(1)
        CHANGES[change](model.layers[0].self_attn)
        if order == "after":
            assert len(replace_attention_(model, clamp=clamp).replaced) == 1
        return model

    stock = results(changed(None, None), X)
    if order == "after" and change in MAKES_A_CLASS:
        with pytest.warns(UserWarning, match="its parameters are parametrized: replace it before"):
            assert replace_attention_(changed(None, None)).replaced == ()
        return
    torch.testing.assert_close(results(changed(None, order), X), stock)
    clamped = results(changed(1e-3, order), X)
    assert min((a - b).abs().max() for a, b in zip(clamped[:2], stock[:2], strict=True)) > 0.1


@pytest.mark.parametrize("norm", [spectral_norm, weight_norm])
def test_hooks_of_the_output_projection_take_part(norm):
    """Stock attention reads its weight and never calls it: the hook does not make it anew."""

    def with_norm():
        attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()
        attention.load_state_dict(encoder().layers[0].self_attn.state_dict())
        torch.manual_seed(1)
        norm(attention.out_proj)
        return attention

    stock, ours, plain = with_norm(), with_norm(), encoder().layers[0].self_attn.eval()
    replace_attention_(ours, clamp=None)
    for attention in (stock, ours):
        original = "weight_g" if norm is weight_norm else "weight_orig"
        getattr(attention.out_proj, original).data.mul_(3)
    got = ours(X, X, X)[0]
    plain.out_proj.weight.data.copy_(ours.out_proj.weight)
    torch.testing.assert_close(got, plain(X, X, X)[0])
    assert (got - stock(X, X, X)[0]).abs().max() > 0.01


@pytest.mark.parametrize("order", ["before", "after"])
def test_hooks_see_the_module_run(order):
    def hooked(order):
        model, seen = encoder(), []
        attention = model.layers[0].self_attn
        if order == "before":
            replace_attention_(model, clamp=None)
        attention.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(("before", len(args), sorted(kwargs))),
            with_kwargs=True,
        )
        attention.register_forward_hook(lambda _m, _a, output: seen.append(("after", len(output))))
        attention.register_full_backward_hook(lambda *_: seen.append("backward"))
        if order == "after":
            replace_attention_(model, clamp=None)
        return model, seen

    (stock, expected), (ours, got) = hooked(None), hooked(order)
    torch.testing.assert_close(results(ours, X), results(stock, X))
    assert got == expected and "backward" in got


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_a_checkpoint_replays_it(reentrant, dropout):
    model = encoder()
    replace_attention_(model, clamp=0.1)
    model.layers[0].self_attn.dropout = dropout
    found = []
    for replayed in (False, True):
        x = X.clone().requires_grad_()
        torch.manual_seed(5)
        output = checkpoint(model, x, use_reentrant=reentrant) if replayed else model(x)
        output.square().sum().backward()
        found.append((output, x.grad))
    torch.testing.assert_close(found[1], found[0])


def saved_and_loaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved_and_loaded]
)
def test_a_replaced_model_is_copied_with_its_clamp(copied):
    model = encoder().eval()
    replace_attention_(model, clamp=1e-3, softcap=2.0)
    again = copied(model)
    assert unused_attention(again) == ["layers.0.self_attn"]
    with torch.no_grad():
        torch.testing.assert_close(again(X), model(X), rtol=0, atol=0)
        assert (again(X) - encoder().eval()(X)).abs().max() > 0.1
    assert unused_attention(again) == []


def test_functional_call_and_per_sample_gradients():
    stock, ours = encoder(), encoder()
    replace_attention_(ours, clamp=None)
    parameters = {name: 1.1 * p.detach() for name, p in stock.named_parameters()}

    def loss(parameters, x, model):
        return torch.func.functional_call(model, parameters, (x[None],)).square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, None))
    expected, got = (per_sample(parameters, X, model) for model in (stock, ours))
    torch.testing.assert_close(got, expected)
    ours.layers[0].self_attn.clamp = 1e-3
    clamped = per_sample(parameters, X, ours)["layers.0.self_attn.in_proj_weight"]
    assert clamped.abs().max() < 0.1 * got["layers.0.self_attn.in_proj_weight"].abs().max()
    for i, x in enumerate(X):
        alone = torch.func.grad(loss)(parameters, x, ours)["layers.0.self_attn.in_proj_weight"]
        torch.testing.assert_close(clamped[i], alone)


@pytest.mark.parametrize("in_place", [False, True])
def test_replacing_inside_what_was_compiled(in_place):
    """Dynamo's guards see the new class, and a new clamp."""
    torch._dynamo.reset()
    model, free = encoder().eval(), encoder().eval()
    compiled = torch.compile(model, backend="aot_eager")
    if in_place:
        model.compile(backend="aot_eager")
        compiled = model
    with torch.no_grad():
        torch.testing.assert_close(compiled(X), free(X))
        assert len(replace_attention_(compiled, clamp=1e-3).replaced) == 1
        clamped = compiled(X)
        assert (clamped - free(X)).abs().max() > 0.1
        model.layers[0].self_attn.clamp = None
        torch.testing.assert_close(compiled(X), free(X))
    assert unused_attention(model) == []


class WithAttention(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.last = nn.Linear(8, 3)

    def forward(self, x):
        return self.last(self.attention(x, x, x, need_weights=False)[0])


def test_opacus_is_refused_with_a_cure_that_works():
    """Its per-sample gradients replay a module with its first input alone."""
    opacus = pytest.importorskip("opacus")
    stock = opacus.GradSampleModule(WithAttention(), loss_reduction="sum")
    with pytest.raises(TypeError, match="missing 2 required positional arguments"):
        stock(X).sum().backward()
    ours = WithAttention()
    replace_attention_(ours, clamp=1e-3)
    with pytest.raises(NotImplementedError, match="opacus has no per-sample gradients of Clamped"):
        opacus.GradSampleModule(copy.deepcopy(ours), loss_reduction="sum")(X)
    frozen = copy.deepcopy(ours)
    frozen.attention.requires_grad_(False)
    wrapped = opacus.GradSampleModule(frozen, loss_reduction="sum")
    wrapped(X).square().sum().backward()
    for name, parameter in wrapped._module.named_parameters():
        if not parameter.requires_grad:
            continue
        for i, x in enumerate(X):
            ours.zero_grad()
            ours(x[None]).square().sum().backward()
            expected = ours.get_parameter(name).grad
            torch.testing.assert_close(parameter.grad_sample[i], expected)


def test_opacus_own_attention_is_left_alone_by_name():
    validators = pytest.importorskip("opacus.validators")
    fixed = validators.ModuleValidator.fix(WithAttention())
    with pytest.warns(UserWarning, match=r"attention: it is a opacus\..*\.DPMultiheadAttention"):
        assert replace_attention_(fixed).replaced == ()
