"""Tiny models that hold `nn.MultiheadAttention`, of the packages that people take them from."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from .cases import draw, length_mask


@dataclass(frozen=True)
class Example:
    """A model without dropout, and what it is called with; `output` picks one tensor of it."""

    model: nn.Module
    args: tuple
    kwargs: dict
    output: Callable = lambda output: output

    def to(self, dtype: torch.dtype) -> tuple[tuple, dict]:
        """The arguments, what is floating point in `dtype`."""

        def cast(x):
            floating = isinstance(x, Tensor) and x.is_floating_point()
            return x.to(dtype) if floating else x

        return tuple(map(cast, self.args)), {name: cast(x) for name, x in self.kwargs.items()}


def _input(*shape: int, seed: int = 0) -> Tensor:
    return draw(*shape, seed=seed).float()


def _encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 1)


def _padded(model: nn.Module) -> Example:
    """Rows of padding are left out: in inference the stock encoder has zeros there."""
    mask = length_mask([5, 3], 5)
    call = {"src_key_padding_mask": mask}
    return Example(model, (_input(2, 5, 8),), call, lambda output: output[~mask])


def encoder() -> Example:
    return _padded(_encoder())


def decoder() -> Example:
    layer = nn.TransformerDecoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    causal = torch.ones(5, 5, dtype=torch.bool).triu(1)
    masks = {"tgt_mask": causal, "memory_key_padding_mask": length_mask([7, 4], 7)}
    # Without the hint the decoder compares elements of the mask, which no program can record.
    masks["tgt_is_causal"] = True
    args = (_input(2, 5, 8), _input(2, 7, 8, seed=1))
    return Example(nn.TransformerDecoder(layer, 1), args, masks)


def torchvisions_vit() -> Example:
    vit = pytest.importorskip("torchvision.models.vision_transformer")
    model = vit.VisionTransformer(8, 4, 1, 2, 8, 16, num_classes=3)
    nn.init.normal_(model.heads.head.weight)  # zero at first, and the output with it
    return Example(model, (_input(2, 3, 8, 8),), {})


def torchaudios_conformer() -> Example:
    models = pytest.importorskip("torchaudio.models")
    args = (_input(2, 6, 8), torch.tensor([6, 4]))
    return Example(models.Conformer(8, 2, 16, 1, 3), args, {}, lambda output: output[0])


def torchaudios_conformer_layer() -> Example:
    """What `Conformer` calls with a mask in the place of the lengths."""
    conformer = pytest.importorskip("torchaudio.models.conformer")
    args = (_input(6, 2, 8), length_mask([6, 4], 6))
    return Example(conformer.ConformerLayer(8, 16, 2, 3), args, {})


def transformers_siglip() -> Example:
    transformers = pytest.importorskip("transformers")
    config = transformers.SiglipVisionConfig(
        hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        image_size=8, patch_size=4,
    )  # fmt: skip
    model = transformers.SiglipVisionModel(config)
    return Example(model, (_input(2, 3, 8, 8),), {}, lambda output: output.pooler_output)


def pefts_encoder() -> Example:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["self_attn"], r=2, init_lora_weights=False)
    return _padded(peft.get_peft_model(_encoder(), config))


EXAMPLES = {
    make.__name__: make
    for make in (
        encoder,
        decoder,
        torchvisions_vit,
        torchaudios_conformer,
        torchaudios_conformer_layer,
        transformers_siglip,
        pefts_encoder,
    )
}


def example(name: str) -> Example:
    """The same model each time, no bias of it at its initial zero."""
    torch.manual_seed(0)
    made = EXAMPLES[name]()
    for parameter in made.model.parameters():
        if parameter.dim() == 1:
            parameter.data.add_(0.2 * torch.randn_like(parameter))
    return made


class PlainAttention(nn.MultiheadAttention):
    """What a clamped attention computes, written out; `clamp` is set from outside."""

    clamp: float

    def forward(
        self, query, key, value, key_padding_mask=None, need_weights=True, attn_mask=None,
        average_attn_weights=True, is_causal=False,
    ):  # fmt: skip
        inputs = [query, key, value]
        if not self.batch_first:
            inputs = [x.transpose(0, 1) for x in inputs]
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        q, k, v = (
            (x @ w.T + b).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for x, w, b in zip(inputs, weights, biases, strict=True)
        )
        logits = q @ k.transpose(-2, -1) / math.sqrt(self.head_dim)
        masks = [attn_mask]
        if key_padding_mask is not None:
            masks.append(key_padding_mask[:, None, None])
        for mask in masks:
            if mask is not None and mask.dtype == torch.bool:
                logits = logits.masked_fill(mask, -math.inf)
            elif mask is not None:
                logits = logits + mask
        output = (logits.softmax(-1) @ v).clamp(-self.clamp, self.clamp)
        output = self.out_proj(output.transpose(1, 2).flatten(2))
        return output if self.batch_first else output.transpose(0, 1), None


def write_out_attention_(model: nn.Module, clamp: float) -> None:
    """Make each attention of a model one that is written out."""
    for module in model.modules():
        if type(module) is nn.MultiheadAttention:
            module.__class__, module.clamp = PlainAttention, clamp
