"""Time of a training step of the speech teacher: fastguard beside stock torch.

    python bench/train_step.py [--dtype fp32|bf16] [--device cpu|cuda] [--repeats N] [--json FILE]

A step is the trainer's: zero_grad, forward, CTC loss, backward, clip and AdamW, and the loss read.
The model is the teacher at its real size (41.8 M parameters) under `train --stable`'s
initialisation, dropout 0.1 (of whole channels; the last cases drop attention weights too, as other
conformers do); the batch two utterances of random features, both 5 s or both 15 s long, T = 125 or
375 in the attention, with feasible random targets of 12 symbols a second. No row skips a step. bf16
is autocast, with fp32 parameters, as in the trainer. The rows:

- ours: ClampedMultiheadAttention, fastguard's operators for the other layers, GradGuard.step,
  fastguard.AdamW;
- SDPA + clamp: the same function, the attention by F.scaled_dot_product_attention and clamp;
  clip_grad_norm_ and torch's default AdamW;
- nn.MultiheadAttention: without a clamp, for it cannot clamp before its output projection;
  clip_grad_norm_ and the default AdamW;
- the same with AdamW(fused=True).

The rows without fastguard have their layers in torch's operators (plain_layers.py). All rows start
from the same weights, take turns, and have copies of their own of all that a step
changes; the figures are medians. Targets are those of issue 5.

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

SYMBOLS = 29
FRAMES_A_SECOND, SYMBOLS_A_SECOND = 100, 12
MAX_NORM = 0.5
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TARGETS = {5: 1.1, 15: 1.15}  # by seconds of an utterance
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

    def __init__(self, attention, optimizer, guarded, weights, dtype, batch, dropout):
        self.device = batch.features.device
        model = build_model("teacher", vocab_size=SYMBOLS, dropout=0.1)
        model.load_state_dict(weights)
        model = with_attention(model, attention, dropout)
        model = model if guarded else in_plain_torch(model)
        self.model = model.to(self.device).train()
        self.parameters = list(self.model.parameters())
        self.optimizer = optimizer(self.parameters, lr=1e-5, betas=(0.9, 0.98))
        self.guard = fastguard.GradGuard(self.model, MAX_NORM) if guarded else None
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
ROWS: dict[str, tuple[type, Callable, bool]] = {
    OURS: (fastguard.ClampedMultiheadAttention, fastguard.AdamW, True),
    SDPA: (SDPAttention, torch.optim.AdamW, False),
    STOCK: (nn.MultiheadAttention, torch.optim.AdamW, False),
    STOCK_FUSED: (nn.MultiheadAttention, fused, False),
}


def time_table(contenders: dict[str, Contender], title: str, target: float, repeats: int) -> dict:
    medians = interleaved(contenders, repeats, contenders[OURS].device)
    rows = []
    for name, seconds in medians.items():
        ratio = seconds / medians[OURS]
        aimed_at = name in (SDPA, STOCK)
        rows.append(
            [
                name,
                f"{seconds * 1e3:.1f}",
                f"{ratio:.2f}",
                f"{target:.2f}" if aimed_at else "-",
                "below" if aimed_at and ratio < target else "",
            ]
        )
    print(table(title, ["", "ms", "/ ours", "target", ""], rows), end="\n\n", flush=True)
    return medians


GROUPS = {  # the first that is found in an operator's name
    "attention": r"attention|clamp|bmm|(?<!log_)(?<!Log)softmax|^SoftmaxB|bernoulli|native_dropout",
    "linear (GEMM)": r"::(linear|addmm|mm|matmul|mkldnn_linear)|^(Addmm|Mm|T)Backward|gemm",
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
    spent = {name: seconds_by_group(contenders[name]) for name in (OURS, SDPA, STOCK)}
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
    for dropout, dtype, seconds in itertools.product((0.0, 0.1), dtypes, TARGETS):
        title = f"{dtype}, 2 x {seconds} s" + (f", attention dropout {dropout}" if dropout else "")
        batch = random_batch(seconds, args.device)
        contenders = {
            name: Contender(*row, weights, dtype, batch, dropout) for name, row in ROWS.items()
        }
        times = time_table(contenders, title, TARGETS[seconds], args.repeats)
        result["steps"][title], result["groups"][title] = times, breakdown_table(contenders)
    write_json(args.json, result)


if __name__ == "__main__":
    main()
