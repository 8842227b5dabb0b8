"""Time of adding gradients to a sum: fastguard.ops.accumulate_ beside torch's add_.

    python bench/accumulate.py [--device cpu|cuda] [--repeats N] [--json FILE]

One tensor of 45 M elements, and one of 0.1 M that stays in caches. The operator adds a gradient of
any dtype to a float32 sum, as torch's `add_` to a float32 sum does. `add_` to a sum of the
gradient's own dtype moves fewer bytes, and rounds each partial sum.
"""

import torch
from timing import arguments, interleaved, print_machine, table, write_json

from fastguard import ops

SIZES = (45_000_000, 100_000)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def contenders(grad):
    sums = [torch.zeros_like(grad, dtype=torch.float32) for _ in range(2)]
    narrow = torch.zeros_like(grad)
    verdict = torch.zeros((), dtype=torch.int64, device=grad.device)
    window = torch.zeros(3, dtype=torch.float64, device=grad.device)
    return {
        "fastguard": lambda: ops.accumulate_(sums[:1], [grad], verdict, window, 1.0),
        "torch": lambda: sums[1].add_(grad),
        "torch, own dtype": lambda: narrow.add_(grad),
    }


def main():
    args = arguments(__doc__.splitlines()[0], repeats=31)
    result = {"machine": print_machine(args.device), "seconds": {}}
    rows = []
    for name, dtype in DTYPES.items():
        for size in SIZES:
            grad = torch.randn(size, device=args.device).to(dtype)
            seconds = interleaved(contenders(grad), args.repeats, args.device)
            result["seconds"][f"{name}, {size}"] = seconds
            ours = seconds["fastguard"]
            times = [f"{s * 1e3:.3f}" for s in seconds.values()]
            rows.append([f"{name}, {size:,}", *times, f"{ours / seconds['torch']:.2f}"])
    header = ["", "accumulate_, ms", "add_, ms", "add_ in own dtype, ms", "accumulate_ / add_"]
    print(table("Adding a gradient to a sum", header, rows))
    write_json(args.json, result)


if __name__ == "__main__":
    main()
