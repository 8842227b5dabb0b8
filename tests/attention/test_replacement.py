"""replace_attention_: what it replaces, what it leaves alone, and what never runs."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from fastguard import ClampedMultiheadAttention, replace_attention_, unused_attention

from .cases import draw


class Custom(nn.MultiheadAttention):
    pass


def test_replace_attention_shares_parameters_and_leaves_subclasses():
    shared = nn.MultiheadAttention(8, 2, kdim=4, vdim=4)
    model = nn.ModuleDict(
        {
            "transformer": nn.Transformer(8, 2, 2, 1, 16, dropout=0.0),
            "lists": nn.ModuleList([shared, shared, Custom(8, 2), nn.Linear(3, 3)]),
            "ours": ClampedMultiheadAttention(8, 2, clamp=2.0),
        }
    ).eval()
    parameters, keys = dict(model.named_parameters()), list(model.state_dict())
    x, y = draw(5, 2, 8, seed=0).float(), draw(5, 2, 4, seed=1).float()

    def outputs():
        with torch.no_grad():
            return model["transformer"](x, x), shared(x, y, y)[0]

    before = outputs()
    # Two layers of the encoder with one, one of the decoder with two, and the shared one.
    with pytest.warns(
        UserWarning, match=r"without this clamp: lists.2: it is a .*\.Custom, and what"
    ):
        done = replace_attention_(model, clamp=None)
    assert len(done.replaced) == 5 and list(done.left_alone) == ["lists.2", "ours"]
    torch.testing.assert_close(outputs(), before)
    assert type(shared) is ClampedMultiheadAttention and type(model["lists"][2]) is Custom
    assert model["ours"].clamp == 2.0
    assert list(model.state_dict()) == keys
    assert all(parameters[name] is now for name, now in model.named_parameters())
    again = replace_attention_(model, clamp=None, skip=["lists.2", "ours"])
    assert again.replaced == ()
    assert again.left_alone == dict.fromkeys(["lists.2", "ours"], "only= or skip= says so")


def test_replaced_attention_clamps_and_trains():
    attention = nn.MultiheadAttention(8, 2)
    optimizer = torch.optim.SGD(attention.parameters(), lr=1.0)
    assert replace_attention_(attention, clamp=1e-6, softcap=5.0).replaced == ("",)
    assert (attention.clamp, attention.softcap) == (1e-6, 5.0)
    x = draw(5, 2, 8, seed=0).float()
    output, _ = attention(x, x, x)
    assert 0 < output.abs().max() < 1e-4
    before = attention.out_proj.weight.detach().clone()
    output.sum().backward()
    optimizer.step()
    assert not torch.equal(attention.out_proj.weight, before)
    attention._reset_parameters()
    assert attention.out_proj.bias.abs().max() == 0


def test_replace_attention_refuses_before_anything_changes():
    model = nn.Sequential(nn.MultiheadAttention(8, 2), nn.MultiheadAttention(8, 2, dropout=1.0))
    for options in ({"clamp": -1.0}, {}):
        with pytest.raises(ValueError, match=r"got -1\.0|got 1\.0"):
            replace_attention_(model, **options)
    assert all(type(module) is nn.MultiheadAttention for module in model)


class Reader(nn.Module):
    """As torchaudio's WavLMSelfAttention: it holds an attention and never calls it."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)

    def forward(self, x):
        return nn.functional.linear(x, self.attention.in_proj_weight)


class Hides(nn.Module):
    """Reads the weights where no source says so."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)

    def forward(self, x):
        return nn.functional.linear(x, next(self.parameters()))


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def model_of_all_kinds():
    attention = {name: nn.MultiheadAttention(8, 2) for name in ("plain", "wrapped", "parametrized")}
    parametrize.register_parametrization(attention["parametrized"], "in_proj_weight", Doubled())
    forward = attention["wrapped"].forward
    attention["wrapped"].forward = lambda *args, **kwargs: forward(*args, **kwargs)
    return nn.ModuleDict({**attention, "reader": Reader(), "sub": Custom(8, 2), "hides": Hides()})


def test_what_is_left_alone_is_named_with_the_reason():
    model = model_of_all_kinds()
    with pytest.warns(UserWarning, match="attention that stays without this clamp") as caught:
        done = replace_attention_(model)
    assert done.replaced == ("plain", "hides.attention")
    reasons = {
        "wrapped": "its forward was wrapped",
        "parametrized": "its parameters are parametrized",
        "reader.attention": "a Reader holds it, and reads its weights itself",
        "sub": f"it is a {__name__}.Custom, and what that computes is not known",
    }
    assert done.left_alone.keys() == reasons.keys()
    for name, why in reasons.items():
        assert done.left_alone[name].startswith(why)
        assert f"{name}: {why}" in str(caught[0].message)
        assert f"  left alone: {name}: {why}" in str(done)
        assert not isinstance(model.get_submodule(name), ClampedMultiheadAttention)
    assert str(done).startswith("replaced 2, left alone 4\n  replaced: plain\n")


def test_torchaudios_wavlm_is_named():
    models = pytest.importorskip("torchaudio.models")
    widths = dict.fromkeys(("encoder_embed_dim", "encoder_ff_interm_features"), 8)
    rates = (
        "projection_dropout",
        "attention_dropout",
        "ff_interm_dropout",
        "dropout",
        "layer_drop",
    )
    model = models.wavlm_model(
        **widths,
        **{f"encoder_{rate}": 0.0 for rate in rates},
        extractor_mode="group_norm",
        extractor_conv_layer_config=[(8, 10, 5)],
        extractor_conv_bias=False,
        encoder_pos_conv_kernel=3,
        encoder_pos_conv_groups=1,
        encoder_num_layers=2,
        encoder_num_heads=2,
        encoder_num_buckets=4,
        encoder_max_distance=8,
        encoder_layer_norm_first=False,
        aux_num_out=None,
    )
    with pytest.warns(UserWarning, match="a WavLMSelfAttention holds it, and reads its weights"):
        done = replace_attention_(model)
    assert done.replaced == () and len(done.left_alone) == 2


class MultiHeadAttention(nn.Module):
    """One of those that people write for themselves."""


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
def test_other_classes_of_attention_are_named():
    x = torch.ones(5, 2, 8)
    model = nn.ModuleDict(
        {
            "own": MultiHeadAttention(),
            "scripted": torch.jit.script(nn.MultiheadAttention(8, 2)),
            "traced": torch.jit.trace(nn.MultiheadAttention(8, 2), (x, x, x)),
            "torchs": nn.MultiheadAttention(8, 2),
        }
    )
    with pytest.warns(UserWarning, match="own: .*; scripted: .*; traced: "):
        done = replace_attention_(model)
    assert done.replaced == ("torchs",)
    assert done.left_alone["own"].startswith(f"it is a {__name__}.MultiHeadAttention")
    for name in ("scripted", "traced"):
        assert done.left_alone[name].startswith("it is a scripted MultiheadAttention: replace it")
    with pytest.warns(UserWarning, match="the model itself: it is a scripted MultiheadAttention"):
        replace_attention_(model["scripted"])


def test_a_model_without_attention_is_said_to_have_none(recwarn):
    with pytest.warns(UserWarning, match=r"no nn\.MultiheadAttention in Sequential, nothing was"):
        assert replace_attention_(nn.Sequential(nn.Linear(8, 8))).replaced == ()
    recwarn.clear()
    replace_attention_(nn.Sequential(ClampedMultiheadAttention(8, 2, clamp=3.0)), clamp=3.0)
    assert not recwarn


def test_other_bounds_than_asked_for_are_named():
    model = nn.Sequential(nn.MultiheadAttention(8, 2), nn.MultiheadAttention(8, 2))
    replace_attention_(model, clamp=3.0, only="0")
    with pytest.warns(UserWarning, match="0: it has its own bounds, clamp=3.0 and softcap=None"):
        done = replace_attention_(model, clamp=3.0, softcap=2.0)
    assert done.replaced == ("1",) and list(done.left_alone) == ["0"]
    assert (model[0].clamp, model[0].softcap) == (3.0, None)


def test_what_never_ran_is_named():
    model = model_of_all_kinds()
    replace_attention_(model, only=["plain", "hides.attention"])
    assert unused_attention(model) == ["plain", "hides.attention"]
    x = torch.ones(3, 1, 8)
    model["plain"](x, x, x)
    model["hides"](x)
    assert unused_attention(model) == ["hides.attention"]
    assert unused_attention(copy.deepcopy(model)["hides"]) == ["attention"]
    assert unused_attention(nn.Sequential(ClampedMultiheadAttention(8, 2))) == []


def test_only_and_skip_choose(recwarn):
    def replaced(**options):
        model = nn.ModuleDict({"encoder": nn.Transformer(8, 2, 2, 2, 16)})
        return [
            name.removeprefix("encoder.") for name in replace_attention_(model, **options).replaced
        ]

    own = [f"{part}.layers.{i}.self_attn" for part in ("encoder", "decoder") for i in range(2)]
    cross = [f"decoder.layers.{i}.multihead_attn" for i in range(2)]
    assert sorted(replaced()) == sorted(own + cross)
    assert replaced(only="*self_attn") == own
    assert replaced(only=["encoder.encoder.*", "*.decoder.*"], skip="*.multihead_attn") == own
    assert sorted(replaced(skip="*layers.1.*")) == sorted(n for n in own + cross if ".1." not in n)
    assert replaced(only="*", skip="*") == []
    assert not [w for w in recwarn if "without this clamp" in str(w.message)]


@pytest.mark.parametrize("option", ["only", "skip"])
def test_a_name_that_fits_nothing_is_refused(option):
    model = nn.Sequential(nn.MultiheadAttention(8, 2), nn.Linear(8, 8))
    with pytest.raises(ValueError, match=rf"{option}='1' fits no nn.MultiheadAttention.*has: 0"):
        replace_attention_(model, **{option: ["*", "1"]})
    assert type(model[0]) is nn.MultiheadAttention
    with pytest.raises(ValueError, match="it has: none"):
        replace_attention_(model[1], **{option: "x"})


def test_it_says_of_its_projections_what_torchs_says():
    """Others ask this, and fail on another answer: PEFT's LoRA among them."""
    for sizes in ({}, {"kdim": 3, "vdim": 5}):
        theirs = nn.MultiheadAttention(8, 2, **sizes)
        ours = ClampedMultiheadAttention(8, 2, **sizes)
        replaced = copy.deepcopy(theirs)
        replace_attention_(replaced)
        for each in (ours, replaced, copy.deepcopy(ours), pickle.loads(pickle.dumps(replaced))):
            assert each._qkv_same_embed_dim is theirs._qkv_same_embed_dim
            assert len(each._forward_pre_hooks) == 1


def test_one_that_an_older_fastguard_pickled():
    old = ClampedMultiheadAttention(8, 2)
    old._qkv_same_embed_dim = False
    old._forward_pre_hooks.clear()
    new = pickle.loads(pickle.dumps(old))
    assert new._qkv_same_embed_dim and len(new._forward_pre_hooks) == 1


def test_parametrizing_and_wrapping_afterwards():
    attention = nn.MultiheadAttention(8, 2)
    x = draw(5, 2, 8, seed=0).float()
    replace_attention_(attention, clamp=1e-6)
    parametrize.register_parametrization(attention, "in_proj_weight", Doubled())
    forward = attention.forward
    attention.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    assert 0 < (attention(x, x, x)[0] - attention.out_proj.bias).abs().max() < 1e-4


def test_accelerates_hooks_before_and_after():
    hooks = pytest.importorskip("accelerate.hooks")
    x = draw(5, 2, 8, seed=0).float()
    before, after = nn.MultiheadAttention(8, 2), nn.MultiheadAttention(8, 2)
    hooks.add_hook_to_module(before, hooks.AlignDevicesHook("cpu", io_same_device=True))
    with pytest.warns(UserWarning, match="the model itself: its forward was wrapped"):
        assert replace_attention_(before).replaced == ()
    expected = before(x, x, x)[0]
    replace_attention_(after, clamp=1e-6)
    hooks.add_hook_to_module(after, hooks.AlignDevicesHook("cpu", io_same_device=True))
    assert (after(x, x, x)[0] - after.out_proj.bias).abs().max() < 1e-4
    hooks.remove_hook_from_module(before)
    replace_attention_(before, clamp=None)
    torch.testing.assert_close(before(x, x, x)[0], expected)
