"""Time of a training step of the speech teacher: fastguard beside stock torch.

    python bench/train_step.py [--dtype fp32|bf16] [--device cpu|cuda] [--repeats N] [--json FILE]

A step is the trainer's: zero_grad, forward, CTC loss, backward, clip and AdamW, and the loss read.
The model is the teacher at its real size (41.8 M parameters) under `train --stable`'s
initialisation, dropout 0.1 (of whole channels; the last cases drop attention weights too, as other
conformers do); the batch two utterances of random features, both 5 s or both 15 s long, T = 125 or
375 in the attention, with feasible random targets of 12 symbols a second. No row skips a step. bf16
is autocast. The rows:

- ours: ClampedMultiheadAttention, fastguard's operators for the other layers, GradGuard.step,
  fastguard.AdamW; in bf16 with master weights, as the trainer has them;
- SDPA + clamp: the same function, the attention by F.scaled_dot_product_attention and clamp;
  clip_grad_norm_ and torch's default AdamW;
- nn.MultiheadAttention: without a clamp, for it cannot clamp before its output projection;
  clip_grad_norm_ and the default AdamW;
- the same with AdamW(fused=True).

The rows without fastguard have their layers in torch's operators (plain_layers.py). All rows start
from the same weights, take turns, and have copies of their own of all that a step
changes; the figures are medians. The last case compiles the models of ours and of the last row.

The second table is where the time goes by torch.profiler, which itself takes some: self time of
the operators by their names, forward and backward. Torch's BatchNorm is made of elementwise
operators here and counts as "other". Attention is the fused operators, clamp, bmm and softmax,
without the projections; where there is a GPU, the groups hold the time of its kernels.
"""

import itertools
import re
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from plain_layers import in_plain_torch
from profiling import self_seconds
from timing import arguments, interleaved, print_machine, table, write_json
from torch import Tensor, nn

import fastguard
from fastguard.speech.models import build_model
from fastguard.speech.models.ctc import CTCModel
from fastguard.speech.training.loss import ctc_loss
from fastguard.speech.training.precision import narrow_

SYMBOLS = 29
FRAMES_A_SECOND, SYMBOLS_A_SECOND = 100, 12
MAX_NORM = 0.5
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SECONDS = (5, 15)  # of an utterance
PROFILED_STEPS = 3


class Batch(NamedTuple):
    features: Tensor
    feature_lengths: Tensor
    targets: Tensor
    target_lengths: Tensor


def random_batch(seconds: int, device: torch.device) -> Batch:
    frames, symbols = seconds * FRAMES_A_SECOND, seconds * SYMBOLS_A_SECOND
    return Batch(
        torch.randn(2, frames, 80, device=device),
        torch.full((2,), frames),
        torch.randint(1, SYMBOLS, (2 * symbols,), device=device),
        torch.full((2,), symbols),
    )


class SDPAttention(fastguard.ClampedMultiheadAttention):
    """The same function in torch's operators, for the teacher's calls: self-attention, padding."""

    def forward(self, query, key, value, key_padding_mask, need_weights):
        q, k, v = map(self._split_heads, self._project(query, key, value))
        seen = ~key_padding_mask[:, None, None, :]
        dropout_p = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, dropout_p=dropout_p)
        return self._join_heads(attended.clamp(-self.clamp, self.clamp), batched=True), None


def with_attention(
    model: CTCModel, attention: type[nn.MultiheadAttention], dropout: float
) -> CTCModel:
    for block in model.blocks:
        there = block.attention
        block.attention = attention(there.embed_dim, there.num_heads, dropout, batch_first=True)
        block.attention.load_state_dict(there.state_dict())
    return model


class Contender:
    """A model, its optimizer, and a step of the two."""

    def __init__(self, row: "Row", weights, dtype, batch, dropout, compiled=False):
        self.device = batch.features.device
        model = build_model("teacher", vocab_size=SYMBOLS, dropout=0.1)
        model.load_state_dict(weights)
        model = with_attention(model, row.attention, dropout)
        model = model if row.guarded else in_plain_torch(model)
        model = model.to(self.device).train()
        options = {"lr": 1e-5, "betas": (0.9, 0.98)}
        if row.guarded and dtype == "bf16":
            narrow_(model)
            options["master_weights"] = True
        self.parameters = list(model.parameters())
        self.optimizer = row.optimizer(self.parameters, **options)
        self.guard = fastguard.GradGuard(model, MAX_NORM) if row.guarded else None
        self.model = torch.compile(model) if compiled else model
        self.dtype, self.batch = DTYPES[dtype], batch

    def backward(self) -> Tensor:
        """The loss."""
        batch = self.batch
        self.optimizer.zero_grad()
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            log_probs, lengths = self.model(batch.features, batch.feature_lengths)
        loss = ctc_loss(log_probs, lengths, batch.targets, batch.target_lengths)
        loss.backward()
        return loss

    def update(self, loss: Tensor) -> None:
        if self.guard is not None:
            self.guard.step(self.optimizer, loss=loss)
        else:
            nn.utils.clip_grad_norm_(self.parameters, MAX_NORM)
            self.optimizer.step()

    def __call__(self):
        loss = self.backward()
        self.update(loss)
        if not loss.item() < float("inf"):
            raise RuntimeError("the loss is not finite: the guard skips what the others do not")


def fused(parameters, **options):
    return torch.optim.AdamW(parameters, fused=True, **options)


OURS, SDPA, STOCK = "fastguard", "SDPA + clamp, AdamW()", "nn.MultiheadAttention, AdamW()"
STOCK_FUSED = "nn.MultiheadAttention, AdamW(fused=True)"


class Row(NamedTuple):
    attention: type[nn.MultiheadAttention]
    optimizer: Callable
    guarded: bool


ROWS = {
    OURS: Row(fastguard.ClampedMultiheadAttention, fastguard.AdamW, True),
    SDPA: Row(SDPAttention, torch.optim.AdamW, False),
    STOCK: Row(nn.MultiheadAttention, torch.optim.AdamW, False),
    STOCK_FUSED: Row(nn.MultiheadAttention, fused, False),
}
TARGETS = {  # by dtype, seconds, dropout and whether the models are compiled
    ("fp32", 5, 0.0, False): {STOCK_FUSED: 1.25},
    ("bf16", 5, 0.0, False): {STOCK: 2.0, STOCK_FUSED: 1.6},
    ("bf16", 15, 0.1, False): {STOCK_FUSED: 1.9},
    ("bf16", 5, 0.0, True): {STOCK_FUSED: 1.3},
}


def time_table(
    contenders: dict[str, Contender], title: str, targets: dict[str, float], repeats: int
) -> dict:
    medians = interleaved(contenders, repeats, contenders[OURS].device)
    rows = []
    for name, seconds in medians.items():
        ratio = seconds / medians[OURS]
        target = targets.get(name)
        rows.append(
            [
                name,
                f"{seconds * 1e3:.1f}",
                f"{ratio:.2f}",
                "-" if target is None else f"{target:.2f}",
                "below" if target is not None and ratio < target else "",
            ]
        )
    print(table(title, ["", "ms", "/ ours", "target", ""], rows), end="\n\n", flush=True)
    return medians


GROUPS = {  # the first that is found in an operator's name
    "attention": r"attention|clamp|bmm|(?<!log_)(?<!Log)softmax|^SoftmaxB|bernoulli|native_dropout",
    "linear (GEMM)": (
        r"::(linear|addmm|mm|matmul|mkldnn_linear|_linear_pointwise)|^(Addmm|Mm|T)Backward|gemm"
    ),
    "convolution": r"conv(?!ert)|depthwise",
    "LayerNorm": r"layer_norm|LayerNorm",
    "copies and casts": r"::(copy_|_to_copy|to|contiguous|clone|cat)$|Memcpy",
}
UPDATE, OTHER = "optimizer and norm", "other"


def group_of(operator: str) -> str:
    return next((g for g, pattern in GROUPS.items() if re.search(pattern, operator)), OTHER)


def seconds_by_group(contender: Contender) -> Counter[str]:
    """Of a few steps."""
    device, losses, groups = contender.device, [], Counter()
    for _ in range(PROFILED_STEPS):
        operators = self_seconds(lambda: losses.append(contender.backward()), device)
        for operator, seconds in operators.items():
            groups[group_of(operator)] += seconds / PROFILED_STEPS
        operators = self_seconds(lambda: contender.update(losses.pop()), device)
        groups[UPDATE] += operators.total() / PROFILED_STEPS
    return groups


def breakdown_table(contenders: dict[str, Contender]) -> dict:
    spent = {name: seconds_by_group(contenders[name]) for name in (OURS, SDPA, STOCK_FUSED)}
    rows = [
        [
            group,
            *(f"{s[group] * 1e3:.1f} ({s[group] / s.total():4.0%})" for s in spent.values()),
        ]
        for group in (*GROUPS, UPDATE, OTHER)
    ]
    rows.append(["all", *(f"{s.total() * 1e3:.1f} (100%)" for s in spent.values())])
    print(table("where the time goes, ms", ["", *spent], rows), end="\n\n", flush=True)
    return spent


def main():
    args = arguments(__doc__.splitlines()[0], repeats=7, dtype=("all", *DTYPES))
    result = {"machine": print_machine(args.device), "steps": {}, "groups": {}}
    model = build_model("teacher", vocab_size=SYMBOLS, dropout=0.1)
    weights = fastguard.stable_init_(model).state_dict()
    dtypes = [dtype for dtype in DTYPES if args.dtype in ("all", dtype)]
    cases = [*itertools.product(dtypes, SECONDS, (0.0, 0.1), (False,))]
    cases += [("bf16", 5, 0.0, True)] * ("bf16" in dtypes)
    for dtype, seconds, dropout, compiled in cases:
        title = f"{dtype}, 2 x {seconds} s" + (f", attention dropout {dropout}" if dropout else "")
        title += ", compiled" * compiled
        batch = random_batch(seconds, args.device)
        contenders = {
            name: Contender(row, weights, dtype, batch, dropout, compiled)
            for name, row in ROWS.items()
            if not compiled or name in (OURS, STOCK_FUSED)
        }
        targets = TARGETS.get((dtype, seconds, dropout, compiled), {})
        result["steps"][title] = time_table(contenders, title, targets, args.repeats)
        if not compiled:
            result["groups"][title] = breakdown_table(contenders)
    write_json(args.json, result)


if __name__ == "__main__":
    main()
