"""Attention on DTensors and FSDP2's shards, on each rank of a gloo group: see test_distributed.py.

``torchrun -m tests.attention.ranks CASE...``; a case is a function below.
"""

from __future__ import annotations

import sys
import warnings

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.nn.attention.bias import causal_lower_right

from fastguard import clamped_attention, replace_attention_

from .cases import draw, length_mask

PLACEMENTS = {"replicated": Replicate(), "batch": Shard(0), "heads": Shard(1)}


def mesh():
    return init_device_mesh("cpu", (distributed.get_world_size(),))


def spread(x: torch.Tensor, placement=None) -> DTensor:
    return distribute_tensor(x, mesh(), [placement or Replicate()])


def full(x):
    return x.full_tensor() if isinstance(x, DTensor) else x


def the_function_is_that_of_whole_tensors():
    q, k, v = (draw(4, 2, length, 8, seed=length) for length in (5, 6, 7))
    k, v = k[:, :, :6], v[:, :, :6]
    hidden = length_mask([6, 5, 4, 3], 6)
    for name, placement in PLACEMENTS.items():
        by_batch = Shard(0) if name == "batch" else Replicate()
        for options in (
            {},
            {"softcap": 2.0},
            {"is_causal": True},
            {"key_padding_mask": hidden},
            {"attn_mask": draw(5, 6, seed=9) > 0},
            {"attn_mask": draw(5, 6, seed=9)},
            {"attn_mask": causal_lower_right(5, 6)},
            {"dropout_p": 0.4},
        ):
            spreading = dict(options)
            if "key_padding_mask" in options:
                spreading["key_padding_mask"] = spread(hidden, by_batch)
            if type(options.get("attn_mask")) is torch.Tensor:
                spreading["attn_mask"] = spread(options["attn_mask"])
            found = []
            for spreads, call in ((False, options), (True, spreading)):
                inputs = [
                    (spread(x, placement) if spreads else x.clone()).requires_grad_()
                    for x in (q, k, v)
                ]
                # The first rank's generator counts.
                torch.manual_seed(distributed.get_rank() if spreads else 0)
                output = clamped_attention(*inputs, clamp=0.1, **call)
                assert not spreads or output.placements == (placement,)
                output.square().sum().backward()
                found.append([full(x) for x in (output, *(each.grad for each in inputs))])
            torch.testing.assert_close(found[1], found[0])
            assert found[1][0].abs().max() == 0.1
        stats = [
            clamped_attention(*each, clamp=0.1, return_stats=True)[1]
            for each in ((q, k, v), [spread(x, placement) for x in (q, k, v)])
        ]
        torch.testing.assert_close([full(x) for x in stats[1]], [*stats[0]])


class Encoder(nn.Module):
    """An encoder layer, and attention with what can be appended to its keys."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.appended = nn.MultiheadAttention(
            8, 2, batch_first=True, add_bias_kv=True, add_zero_attn=True
        )

    def forward(self, x, mask):
        x = self.layer(x, mask)
        return self.appended(x, x, x, attn_mask=mask, is_causal=True)[0]


def replaced(clamp: float | None) -> nn.Module:
    model = Encoder()
    assert len(replace_attention_(model, clamp=clamp).replaced) == 2
    return model


X = draw(4, 5, 8, seed=0).float()
CAUSAL = torch.ones(5, 5, dtype=torch.bool).triu(1)


def outputs_and_gradients(model, x, mask=CAUSAL, share=1):
    """Whole ones, of a loss that is the mean over the batch."""
    model.train()
    output = model(x, mask)
    (output.square().sum() / len(X) * share).backward()
    grads = [full(p.grad) for p in model.parameters()]
    model.eval()
    with torch.no_grad():
        inference = model(x, mask)
    return full(output.detach()), full(inference), grads


def the_module_takes_dtensors():
    for clamp in (None, 1e-2):
        expected = outputs_and_gradients(replaced(clamp), X)
        if clamp is None:
            free = expected
            torch.testing.assert_close(expected, outputs_and_gradients(Encoder(), X))
        for placement in (Replicate(), Shard(0)):
            model = replaced(clamp)
            distribute_module(model, mesh())
            got = outputs_and_gradients(model, spread(X, placement), spread(CAUSAL))
            torch.testing.assert_close(got, expected)
    assert min((a - b).abs().max() for a, b in zip(expected[:2], free[:2], strict=True)) > 0.1


def fsdp_shards_what_was_replaced():
    size, rank = distributed.get_world_size(), distributed.get_rank()
    for clamp in (None, 1e-2):
        expected = outputs_and_gradients(replaced(clamp), X)
        for parts in ((), ("layer",), ("layer.self_attn", "appended")):
            model = replaced(clamp)
            for part in parts:
                fully_shard(model.get_submodule(part), mesh=mesh())
            fully_shard(model, mesh=mesh())
            # FSDP takes the mean over the ranks.
            got = outputs_and_gradients(model, X.chunk(size)[rank], share=size)
            mine = [each.chunk(size)[rank] for each in expected[:2]]
            torch.testing.assert_close(got, (*mine, expected[2]))


def what_is_sharded_is_left_alone_by_name():
    why = "its parameters are DTensors: replace it before you shard the model"
    for parts in ((), ("layer.self_attn", "appended")):
        model = Encoder()
        for part in parts:
            fully_shard(model.get_submodule(part), mesh=mesh())
        fully_shard(model, mesh=mesh())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            done = replace_attention_(model)
        assert done.replaced == ()
        assert done.left_alone == {"layer.self_attn": why, "appended": why}
        assert any(why in str(each.message) for each in caught)
        torch.testing.assert_close(model(X, CAUSAL), Encoder()(X, CAUSAL))


if __name__ == "__main__":
    distributed.init_process_group("gloo")
    for case in sys.argv[1:]:
        globals()[case]()
        print(f"rank {distributed.get_rank()}: {case}", flush=True)
    distributed.destroy_process_group()
