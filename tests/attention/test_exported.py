"""Replaced attention through torch's exporters: ONNX's old and new one, and `torch.export`."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn

from fastguard import clamped_attention, replace_attention_

from .cases import TORCHS_WARNINGS, draw, length_mask

pytestmark = [
    *TORCHS_WARNINGS,
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

#: Frames and batch sizes of the example, and those that the exported program then runs.
EXAMPLE, RUNS = (2, 5), [(2, 5), (3, 9), (1, 4)]


def encoder(clamp: float | None) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval()
    replace_attention_(model, clamp=clamp)
    return model


def inputs(batch: int, frames: int, masked: str) -> dict[str, Tensor | bool]:
    """Arguments of the encoder, by name."""
    given: dict[str, Tensor | bool] = {"src": draw(batch, frames, 8, seed=frames).float()}
    if masked == "padded":
        lengths = [frames, *range(1, batch)]
        given["src_key_padding_mask"] = length_mask(lengths, frames)
    if masked == "causal":
        given["mask"] = nn.Transformer.generate_square_subsequent_mask(frames)
        given["is_causal"] = True
    return given


def tensors(given: dict) -> dict[str, Tensor]:
    return {name: x for name, x in given.items() if isinstance(x, Tensor)}


def export_to_onnx(model: nn.Module, given: dict, dynamo: bool, path) -> None:
    example = dict(given)
    src, names = example.pop("src"), list(tensors(given))
    if dynamo:
        batch, frames = torch.export.Dim("batch"), torch.export.Dim("frames")
        axes = {"src": {0: batch, 1: frames}, "src_key_padding_mask": {0: batch, 1: frames}}
        axes |= {"mask": {0: frames, 1: frames}, "is_causal": None}
        torch.onnx.export(
            model, (src,), path, kwargs=example, dynamo=True, verbose=False,
            dynamic_shapes={name: axes[name] for name in given},
        )  # fmt: skip
    else:
        torch.onnx.export(
            model, (src,), path, kwargs=example, dynamo=False, input_names=names,
            dynamic_axes={name: [0, 1] for name in names},
        )  # fmt: skip


@pytest.mark.parametrize("masked", ["no mask", "padded", "causal"])
@pytest.mark.parametrize("dynamo", [False, True])
def test_onnx_of_any_batch_and_length(dynamo, masked, tmp_path):
    """Stock attention, by the old exporter, has the length of the example alone."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, free = encoder(clamp=1e-2), encoder(clamp=None)
    path = tmp_path / "encoder.onnx"
    export_to_onnx(model, inputs(*EXAMPLE, masked), dynamo, path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    for batch, frames in RUNS:
        given = inputs(batch, frames, masked)
        feed = {name: x.numpy() for name, x in tensors(given).items() if name in names}
        assert len(feed) == len(names)
        got = torch.from_numpy(session.run(None, feed)[0])
        with torch.no_grad():
            torch.testing.assert_close(got, model(**given), rtol=1e-5, atol=1e-5)
            assert (got - free(**given)).abs().max() > 0.1


@pytest.mark.parametrize("masked", ["no mask", "padded", "causal"])
@pytest.mark.parametrize("strict", [False, True])
def test_export_of_any_batch_and_length(strict, masked):
    model, free = encoder(clamp=1e-2), encoder(clamp=None)
    batch, frames = torch.export.Dim("batch"), torch.export.Dim("frames")
    axes = {"src": {0: batch, 1: frames}, "src_key_padding_mask": {0: batch, 1: frames}}
    axes |= {"mask": {0: frames, 1: frames}, "is_causal": None}
    given = inputs(*EXAMPLE, masked)
    program = torch.export.export(
        model, (), given, dynamic_shapes={name: axes[name] for name in given}, strict=strict
    )
    assert "fastguard" not in str(program.graph)
    saved = io.BytesIO()
    torch.export.save(program, saved)
    saved.seek(0)
    for exported in (program, torch.export.load(saved)):
        for run in RUNS:
            given = inputs(*run, masked)
            got = exported.module()(**given)
            torch.testing.assert_close(got, model(**given))
            assert (got - free(**given)).abs().max() > 0.1


class Grouped(nn.Module):
    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        return clamped_attention(query, key, key, clamp=0.1, is_causal=True)


def test_onnx_of_the_function_with_grouped_heads():
    onnxruntime = pytest.importorskip("onnxruntime")
    file = io.BytesIO()
    torch.onnx.export(
        Grouped(), (draw(2, 4, 5, 8, seed=0).float(), draw(2, 2, 5, 8, seed=1).float()), file,
        dynamo=False, input_names=["query", "key"],
        dynamic_axes={"query": [0, 2], "key": [0, 2]},
    )  # fmt: skip
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    for batch, frames in RUNS:
        query, key = draw(batch, 4, frames, 8, seed=2), draw(batch, 2, frames, 8, seed=3)
        query, key = query.float(), key.float()
        (got,) = session.run(None, {"query": query.numpy(), "key": key.numpy()})
        torch.testing.assert_close(torch.from_numpy(got), Grouped()(query, key))


def test_torchvisions_feature_extractor():
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    vit = pytest.importorskip("torchvision.models.vision_transformer")
    torch.manual_seed(0)
    stock = vit.VisionTransformer(8, 4, 1, 2, 8, 16, num_classes=3).eval()
    ours = copy.deepcopy(stock)
    replace_attention_(ours, clamp=None)
    name, image = "encoder.layers.encoder_layer_0.self_attention", draw(2, 3, 8, 8, seed=0).float()
    expected, got = (
        extraction.create_feature_extractor(each, [name, "encoder.ln"]) for each in (stock, ours)
    )
    torch.testing.assert_close(got(image), expected(image))
    ours.get_submodule(name).clamp = 1e-3
    clamped = extraction.create_feature_extractor(ours, [name])(image)[name][0]
    assert (clamped - expected(image)[name][0]).abs().max() > 1e-2
    bias = ours.get_submodule(name).out_proj.bias
    assert (clamped - bias).abs().max() < 1e-2
