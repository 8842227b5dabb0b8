"""Time and memory of fastguard.clamped_attention beside torch's attention and a clamp.

    python bench/attention_kernel.py [--dtype fp32|bf16|fp16] [--t N] [--device cpu|cuda]
                                     [--repeats N] [--json FILE]

Three ways to the same function take turns on the same (2, 8, T, 64) operands, views of memory of
(2, T, 8, 64) as a model's projections leave them:

- ours: fastguard.clamped_attention;
- SDPA: F.scaled_dot_product_attention, whichever backend torch picks, and clamp(-10, 10). On the
  CPU dropout makes it take the math path;
- math: the same, held to the math path, which keeps tensors of T x T.

T = 50, 125, 375 and 1000 are 2, 5, 15 and 40 s of speech in the teacher. "25 % padded" is the keys
of one of the two utterances, "half as long" one utterance beside one of twice its length; ours
takes them as `key_padding_mask`, torch as a bool `attn_mask`. "added mask" is an `attn_mask` of
(T, T) numbers in the dtype of the query, for both. Rows without a word have none of these.

Of each call the forward and the backward pass are timed (f, b); the figures are medians. The
columns SDPA and math are their time by ours: above 1, ours is faster. GF/s is ours, f+b, of
4 B H T S D operations forward and 2.5 times as many backward; half of that if causal, and padded
keys do not count. "target" is the least that SDPA f+b should be; SDPA f should be at least 1 for
fp32 without dropout. The last column names what is below its target. A row takes as many repeats as
fit into a few seconds, --repeats at most.

Second table: fastguard.ClampedMultiheadAttention beside nn.MultiheadAttention(need_weights=False),
512 channels and 8 heads, self-attention of (2, T, 512), gradients of input and parameters; torch's
does not clamp. Third table: peak memory of f+b beyond the inputs that torch allocates, see
bench/profiling.py. The working memory of our CPU kernel is not counted: it holds a head's keys and
values for each thread.
"""

import contextlib
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from profiling import peak_bytes
from timing import arguments, print_machine, table, write_json
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastguard
from fastguard._timing import in_turns, synchronize

BATCH, HEADS, WIDTH = 2, 8, 64
CLAMP = 10.0
SECONDS = 2.5  # of a row, more or less
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LENGTHS = (8, 16, 32, 50, 125, 375, 500, 1000, 1500)

PADDED, HALF, CAUSAL, ADDED = "25 % padded", "half as long", "causal", "added mask"

TARGETS = {  # of SDPA f+b / ours; by dtype and dropout, then T
    ("fp32", 0.0): {**dict.fromkeys(LENGTHS, 1.0), 125: 1.15},
    ("fp32", 0.1): {125: 1.8, 375: 2.0, 500: 2.2, 1500: 3.5},
    ("bf16", 0.0): {125: 1.5, 375: 1.5, 500: 1.5, 1500: 1.5},
    ("bf16", 0.1): {125: 2.0, 375: 2.5, 500: 3.0, 1500: 5.0},
    ("fp16", 0.0): {375: 1.5},
}
TARGETS_OF_KEYS = {PADDED: 1.15, HALF: 1.3, CAUSAL: 1.5}


class Case(NamedTuple):
    dtype: str
    t: int
    dropout: float = 0.0
    keys: str = ""

    def __str__(self):
        dropout = f"dropout {self.dropout}" if self.dropout else ""
        return ", ".join(filter(None, [f"T={self.t}", dropout, self.keys]))

    @property
    def valid_keys(self) -> tuple[int, int]:
        """Of each utterance."""
        return self.t, {PADDED: self.t - self.t // 4, HALF: self.t // 2}.get(self.keys, self.t)

    @property
    def operations(self) -> float:
        """Forward and backward."""
        forward = 4 * HEADS * self.t * sum(self.valid_keys) * WIDTH
        return 3.5 * forward / (2 if self.keys == CAUSAL else 1)

    @property
    def target(self) -> float | None:
        """Of forward and backward."""
        if self.keys:
            return TARGETS_OF_KEYS.get(self.keys)
        return TARGETS.get((self.dtype, self.dropout), {}).get(self.t)

    @property
    def forward_target(self) -> float | None:
        return 1.0 if (self.dtype, self.dropout, self.keys) == ("fp32", 0.0, "") else None


CASES = [
    *(Case(dtype, t, p) for dtype in ("fp32", "bf16") for p in (0.0, 0.1) for t in LENGTHS),
    *(Case(dtype, t, 0.0, PADDED) for dtype in ("fp32", "bf16") for t in (125, 375, 1000)),
    *(Case(dtype, t, 0.0, HALF) for dtype in ("fp32", "bf16") for t in (125, 375, 1000)),
    *(Case(dtype, t, 0.0, CAUSAL) for dtype in ("fp32", "bf16") for t in (125, 375, 500)),
    *(Case("fp16", t, p) for p in (0.0, 0.1) for t in (50, 125, 375, 1000)),
    *(Case(dtype, 375, 0.0, ADDED) for dtype in DTYPES),
]

MODULE_CASES = [
    *(Case(dtype, t, p) for dtype in ("fp32", "bf16") for p in (0.0, 0.1) for t in (125, 375)),
    *(Case(dtype, t, 0.0, HALF) for dtype in ("fp32", "bf16") for t in (125, 375)),
]


class Contender(NamedTuple):
    attend: Callable[[], Tensor]
    inputs: tuple[Tensor, ...]
    grad_output: Tensor
    context: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext

    def __call__(self):
        output = self.attend()
        return output, torch.autograd.grad(output, self.inputs, self.grad_output)


class Times(NamedTuple):
    """Seconds."""

    forward: float
    backward: float
    both: float


def clock(contender: Contender) -> Times:
    device = contender.grad_output.device
    with contender.context():
        synchronize(device)
        start = time.perf_counter()
        output = contender.attend()
        synchronize(device)
        middle = time.perf_counter()
        grads = torch.autograd.grad(output, contender.inputs, contender.grad_output)
        synchronize(device)
        end = time.perf_counter()
        del output, grads
    return Times(middle - start, end - middle, end - start)


def medians(contenders: dict[str, Contender], most: int) -> dict[str, Times]:
    """Of at most so many repeats, and of fewer, but no less than three, where those take long."""
    seconds = sum(clock(contender).both for contender in contenders.values())
    repeats = min(most, max(3, int(SECONDS / seconds)))
    readings = in_turns(contenders, repeats, clock)
    return {
        name: Times(*map(statistics.median, zip(*times, strict=True)))
        for name, times in readings.items()
    }


def padding_mask(case: Case, device: torch.device) -> Tensor | None:
    """(B, S), True where the key is padding."""
    if case.keys not in (PADDED, HALF):
        return None
    valid = torch.tensor(case.valid_keys, device=device)
    return torch.arange(case.t, device=device) >= valid[:, None]


def kernels(case: Case, device: torch.device) -> dict[str, Contender]:
    shape = (BATCH, case.t, HEADS, WIDTH)
    *inputs, grad_output = (
        torch.randn(shape, device=device, dtype=DTYPES[case.dtype]).transpose(1, 2)
        for _ in range(4)
    )
    inputs = tuple(x.requires_grad_() for x in inputs)
    padding = padding_mask(case, device)
    seen = None if padding is None else ~padding[:, None, None, :]
    options = {"dropout_p": case.dropout, "is_causal": case.keys == CAUSAL}
    added = None
    if case.keys == ADDED:
        added = seen = torch.randn(case.t, case.t, device=device, dtype=DTYPES[case.dtype])

    def ours():
        return fastguard.clamped_attention(
            *inputs, key_padding_mask=padding, attn_mask=added, clamp=CLAMP, **options
        )

    def sdpa():
        attended = F.scaled_dot_product_attention(*inputs, attn_mask=seen, **options)
        return attended.clamp(-CLAMP, CLAMP)

    return {
        "ours": Contender(ours, inputs, grad_output),
        "SDPA": Contender(sdpa, inputs, grad_output),
        "math": Contender(sdpa, inputs, grad_output, lambda: sdpa_kernel(SDPBackend.MATH)),
    }


def modules(case: Case, device: torch.device) -> dict[str, Contender]:
    """Both with the same parameters."""
    width = HEADS * WIDTH
    options = {"batch_first": True, "device": device, "dtype": DTYPES[case.dtype]}
    ours = fastguard.ClampedMultiheadAttention(width, HEADS, case.dropout, clamp=CLAMP, **options)
    theirs = nn.MultiheadAttention(width, HEADS, case.dropout, **options)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(BATCH, case.t, width, device=device, dtype=DTYPES[case.dtype])
    x, grad_output = x.requires_grad_(), torch.randn_like(x)
    padding = padding_mask(case, device)

    def contender(module):
        def attend():
            return module(x, x, x, key_padding_mask=padding, need_weights=False)[0]

        return Contender(attend, (x, *module.parameters()), grad_output)

    return {"ours": contender(ours), "torch": contender(theirs)}


def kernel_row(case: Case, times: dict[str, Times]) -> list[str]:
    ours, sdpa, math = times["ours"], times["SDPA"], times["math"]
    reached = {"f": sdpa.forward / ours.forward, "f+b": sdpa.both / ours.both}
    wanted = {"f": case.forward_target, "f+b": case.target}
    below = [name for name, target in wanted.items() if target and reached[name] < target]
    return [
        str(case),
        f"{ours.forward * 1e3:.3f}",
        f"{ours.both * 1e3:.3f}",
        f"{sdpa.forward / ours.forward:.2f}",
        f"{sdpa.backward / ours.backward:.2f}",
        f"{sdpa.both / ours.both:.2f}",
        f"{math.forward / ours.forward:.2f}",
        f"{math.both / ours.both:.2f}",
        f"{case.operations / ours.both / 1e9:.0f}",
        "-" if case.target is None else f"{case.target:.2f}",
        " and ".join(below),
    ]


def kernel_tables(cases: list[Case], repeats: int, device: torch.device) -> dict:
    header = [
        "",
        "f ms",
        "f+b ms",
        "SDPA f",
        "b",
        "f+b",
        "math f",
        "f+b",
        "GF/s",
        "target",
        "below",
    ]
    result = {}
    for dtype in DTYPES:
        rows = []
        for case in cases:
            if case.dtype == dtype:
                times = medians(kernels(case, device), repeats)
                result[f"{dtype}, {case}"] = {name: t._asdict() for name, t in times.items()}
                rows.append(kernel_row(case, times))
        if rows:
            title = f"{dtype}, (2, 8, T, 64): SDPA / ours and math / ours"
            print(table(title, header, rows), end="\n\n", flush=True)
    return result


def module_table(cases: list[Case], repeats: int, device: torch.device) -> dict:
    result, rows = {}, []
    for case in cases:
        times = medians(modules(case, device), repeats)
        ours, theirs = times["ours"], times["torch"]
        result[f"{case.dtype}, {case}"] = {name: t._asdict() for name, t in times.items()}
        rows.append(
            [
                f"{case.dtype}, {case}",
                f"{ours.forward * 1e3:.3f}",
                f"{ours.both * 1e3:.3f}",
                f"{theirs.forward / ours.forward:.2f}",
                f"{theirs.both / ours.both:.2f}",
            ]
        )
    if rows:
        header = ["ClampedMultiheadAttention", "f ms", "f+b ms", "torch f / ours", "f+b"]
        title = "Modules, 512 channels, 8 heads: nn.MultiheadAttention / ours"
        print(table(title, header, rows), end="\n\n", flush=True)
    return result


def memory_table(cases: list[Case], device: torch.device) -> dict:
    result, rows = {}, []
    for case in cases:
        if not case.keys:
            name = f"{case.dtype}, {case}"
            result[name] = {}
            for way, contender in kernels(case, device).items():
                with contender.context():
                    result[name][way] = peak_bytes(contender, device)
            rows.append([name, *(f"{b / 1e6:.2f}" for b in result[name].values())])
    if rows:
        header = ["", "ours", "SDPA", "math"]
        print(table("Peak memory of f+b, MB", header, rows), end="\n\n", flush=True)
    return result


def main():
    args = arguments(
        __doc__.splitlines()[0],
        repeats=301,
        dtype=("all", *DTYPES),
        t=("all", *map(str, LENGTHS)),
    )

    def chosen(cases):
        return [c for c in cases if args.dtype in ("all", c.dtype) and args.t in ("all", str(c.t))]

    machine = print_machine(args.device)
    result = {
        "machine": machine,
        "kernels": kernel_tables(chosen(CASES), args.repeats, args.device),
        "modules": module_table(chosen(MODULE_CASES), args.repeats, args.device),
        "peak bytes": memory_table(chosen(CASES), args.device),
    }
    write_json(args.json, result)


if __name__ == "__main__":
    main()
