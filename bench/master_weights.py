"""Time of a guarded step of bf16 parameters with float32 masters: fastguard beside torch.

    python bench/master_weights.py [--device cpu|cuda] [--repeats N] [--json FILE]

45 M parameters in 600 tensors, bf16, with bf16 gradients. All rows take turns in one run, each on
tensors of its own; the figures are medians. No row clips or skips.

- fastguard: `guard.step` with `AdamW(master_weights=True)`.
- torch: the gradients are copied to float32 by one foreach call, `clip_grad_norm_` and the fused
  AdamW take the float32 masters, and one foreach call rounds these into the parameters. All buffers
  are kept from step to step.
- torch, norm in bf16: the same, but `clip_grad_norm_` takes the bf16 gradients before the copy. It
  moves fewer bytes; its norm and its scaled gradients are rounded to bf16.
- without masters: both optimizers on the bf16 parameters. Steps below the last bit are lost, and
  torch's moments are bf16.

Bytes per parameter are counted from what each sequence of calls reads and writes, not measured.
"""

import torch
from timing import arguments, interleaved, print_machine, table, write_json
from torch import nn

import fastguard

MAX_NORM = 1e30  # nothing exceeds it
SIZES = [149_616, 384] * 300


def parameters(device):
    made = [nn.Parameter((torch.randn(n, device=device) * 0.02).bfloat16()) for n in SIZES]
    for p in made:
        p.grad = torch.randn_like(p) * 1e-3
    return made


def ours(device, master_weights=True):
    params = parameters(device)
    optimizer = fastguard.AdamW(params, master_weights=master_weights)
    guard = fastguard.GradGuard(params, MAX_NORM)
    return lambda: guard.step(optimizer)


def torchs(device, norm_in_bf16=False):
    params = parameters(device)
    narrow = [p.grad for p in params]
    masters = [nn.Parameter(p.detach().float()) for p in params]
    for master in masters:
        master.grad = torch.empty_like(master)
    wide = [master.grad for master in masters]
    optimizer = torch.optim.AdamW(masters, fused=True)

    @torch.no_grad()
    def step():
        if norm_in_bf16:
            nn.utils.clip_grad_norm_(params, MAX_NORM)
        torch._foreach_copy_(wide, narrow)
        if not norm_in_bf16:
            nn.utils.clip_grad_norm_(masters, MAX_NORM)
        optimizer.step()
        torch._foreach_copy_(params, masters)

    return step


def torchs_without_masters(device):
    params = parameters(device)
    optimizer = torch.optim.AdamW(params, fused=True)

    def step():
        nn.utils.clip_grad_norm_(params, MAX_NORM)
        optimizer.step()

    return step


OURS = "guard.step(fastguard.AdamW(master_weights=True))"
# A contender, and bytes per parameter: of bf16 2, of float32 4; clip_grad_norm_ reads the gradients
# twice and writes them once.
ROWS = {
    OURS: (ours, 2 + 2 + 3 * 8 + 4),
    "torch: copy, clip_grad_norm_, AdamW(fused=True), copy": (torchs, 6 + 12 + 28 + 6),
    "torch, norm in bf16": (lambda device: torchs(device, True), 6 + 6 + 28 + 6),
    "guard.step(fastguard.AdamW), no masters": (lambda d: ours(d, False), 2 + 2 + 2 * 8 + 4),
    "clip_grad_norm_ + AdamW(fused=True), no masters": (torchs_without_masters, 6 + 14),
}


def main():
    args = arguments(__doc__.splitlines()[0], repeats=21)
    machine = print_machine(args.device)
    contenders = {row: make(args.device) for row, (make, _) in ROWS.items()}
    seconds = interleaved(contenders, args.repeats, args.device)
    rows = [
        [row, f"{s * 1e3:.3f}", f"{s / seconds[OURS]:.2f}", str(ROWS[row][1])]
        for row, s in seconds.items()
    ]
    print(table("45 M bf16 in 600 tensors", ["step", "ms", "/ ours", "bytes/param"], rows))
    write_json(args.json, {"machine": machine, "seconds": seconds})


if __name__ == "__main__":
    main()
