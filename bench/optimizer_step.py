"""Time of an optimizer step with its guard: fastguard beside torch and beside what peers' loops do.

    python bench/optimizer_step.py [--device cpu|cuda] [--repeats N] [--json FILE]

The table of each case: what does the step cost, right after a backward pass that does nothing but
write gradients and is not timed. All rows take turns in one run, each on parameters, gradients and
optimizer state of its own; the figures are medians. No row clips or skips; clipping costs neither
fastguard.AdamW nor torch's clip_grad_norm_ anything more. Bytes per parameter are counted from what
each sequence of calls reads and writes, not measured. The floor of a row is the time that its bytes
take at the bandwidth of one `a.add_(b)` over as much memory, measured in the same run; a share of
the floor above 100 % says that caches served a part.

The line below it is the first of the rows and torch with the fused AdamW, alone: seven rows of 2000
tensors are more objects than caches hold, which costs all rows about the same and evens out ratios.

The peers' rows are their published sequence of calls on the gradients of one step:

- SpeechBrain (core.py, optimizers_step and check_gradients): clip_grad_norm_, then isfinite().all()
  of each gradient, one after the other, then the optimizer.
- NeMo (ASR, skip_nan_grad): isfinite().all() of each gradient, then Lightning's clip_grad_norm_,
  then the optimizer.
- ESPnet (espnet2 trainer): clip_grad_norm_, a look at the norm on the host, then the optimizer.

zclip, smartclip and stabilityguard are packages of PyPI, which `pip install -e .[bench]` installs;
bench/peers.py has their configurations.
"""

import functools

import peers
import torch
from timing import arguments, interleaved, print_machine, table, write_json
from torch import nn

import fastguard

MAX_NORM = 1e30  # nothing exceeds it

CASES = {  # the small ones first: the others leave a heap that scatters them
    "2000 tensors of 64 fp32": [64] * 2000,
    "45 M fp32 in 600 tensors (300 matrices, 300 vectors)": [149_616, 384] * 300,
}


class Contender:
    """Parameters with gradients, an optimizer, and a step."""

    def __init__(self, step, optimizer, bytes_per_parameter, sizes, device):
        self.parameters = [nn.Parameter(torch.randn(n, device=device) * 0.02) for n in sizes]
        self.optimizer = optimizer(self.parameters)
        self.guard = fastguard.GradGuard(self.parameters, MAX_NORM)
        self.peer = None
        self.bytes_per_parameter = bytes_per_parameter
        self._step = step

    def __call__(self):
        self._step(self)


def guarded(c):
    c.guard.step(c.optimizer)


def bare(c):
    c.optimizer.step()


def torch_clip(c):
    nn.utils.clip_grad_norm_(c.parameters, MAX_NORM)
    c.optimizer.step()


def speechbrain(c):
    nn.utils.clip_grad_norm_(c.parameters, MAX_NORM)
    for p in c.parameters:
        if p.requires_grad and p.grad is not None and not torch.isfinite(p.grad).all():
            p.grad = None
    c.optimizer.step()


def nemo(c):
    valid = True
    for p in c.parameters:
        if p.grad is not None:
            valid = bool(torch.isfinite(p.grad).all())
            if not valid:
                break
    if not valid:
        c.optimizer.zero_grad()
    nn.utils.clip_grad_norm_(c.parameters, MAX_NORM)
    c.optimizer.step()


def espnet(c):
    norm = nn.utils.clip_grad_norm_(c.parameters, MAX_NORM)
    if torch.isfinite(norm):
        c.optimizer.step()


def of_peer(make):
    """The step of a peer that ``make`` makes at the first call, of a module and an optimizer."""

    def step(c):
        if c.peer is None:
            c.peer = make(nn.ParameterList(c.parameters), c.optimizer)
        c.peer()

    return step


def ours(parameters):
    return fastguard.AdamW(parameters)


def fused(parameters):
    return torch.optim.AdamW(parameters, fused=True)


def default(parameters):
    return torch.optim.AdamW(parameters)


FUSED_BASELINE = "clip_grad_norm_ + AdamW(fused=True)"
BARE = "AdamW(fused=True), no clipping"
DEFAULT_BASELINE = "clip_grad_norm_ + AdamW()"
OURS = "guard.step(fastguard.AdamW)"

# step, optimizer, bytes per fp32 parameter: norm 4, clip 8 (always, in torch), fused AdamW 28 (and
# 4 where it writes gradients back), default AdamW 80, isfinite 5 (it writes a bool), its all() 1.
ROWS = {
    OURS: (guarded, ours, 4 + 28),
    "guard.step(torch AdamW(fused=True))": (guarded, fused, 4 + 28 + 4),
    BARE: (bare, fused, 28),
    FUSED_BASELINE: (torch_clip, fused, 12 + 28),
    DEFAULT_BASELINE: (torch_clip, default, 12 + 80),
    "as SpeechBrain, AdamW(fused=True)": (speechbrain, fused, 12 + 6 + 28),
    "as NeMo, AdamW(fused=True)": (nemo, fused, 6 + 12 + 28),
    "as ESPnet, AdamW(fused=True)": (espnet, fused, 12 + 28),
}


def all_rows():
    """ROWS, and those of the installed peers."""
    found = peers.installed().items()
    return ROWS | {name: (of_peer(make), fused, read + 28) for name, (make, read) in found}


class Backward:
    """Writes a gradient for each parameter, one after the other, and does nothing else."""

    def __init__(self, sizes, device):
        self._inputs = [torch.randn(n, device=device) * 1e-3 for n in sizes]

    def __call__(self, parameters):
        for p in parameters:
            p.grad = None
        loss = sum(torch.dot(p, x) for p, x in zip(parameters, self._inputs, strict=True))
        loss.backward()


def bandwidth(count, repeats, device):
    """Bytes per second of ``a.add_(b)``: two reads and a write, all of it streaming."""
    a, b = torch.zeros(count, device=device), torch.ones(count, device=device)
    return 12 * count / interleaved({"add_": lambda: a.add_(b)}, repeats, device)["add_"]


def step_table(name, sizes, specs, repeats, device):
    backward = Backward(sizes, device)

    def run(chosen):
        contenders = {row: Contender(*specs[row], sizes, device) for row in chosen}
        before = {row: functools.partial(backward, c.parameters) for row, c in contenders.items()}
        return interleaved(contenders, repeats, device, before)

    medians = run(specs)
    speed = bandwidth(max(sum(sizes), 45_000_000), 15, device)
    rows = []
    for row, seconds in medians.items():
        bytes_moved = specs[row][2]
        floor = bytes_moved * sum(sizes) / speed
        rows.append(
            [
                row,
                f"{seconds * 1e3:.3f}",
                f"{seconds / medians[OURS]:.2f}",
                str(bytes_moved),
                f"{floor / seconds:.0%}",
            ]
        )
    header = ["step", "ms", "/ ours", "bytes/param", "floor / time"]
    print(table(f"{name}   (add_: {speed / 1e9:.1f} GB/s)", header, rows))
    alone = run([OURS, FUSED_BASELINE])
    ours, theirs = alone.values()
    print(f"alone: {theirs * 1e3:.3f} / {ours * 1e3:.3f} ms = {theirs / ours:.2f}", end="\n\n")
    return {"seconds": medians, "seconds alone": alone, "bytes_per_second_of_add_": speed}


def main():
    args = arguments(__doc__.splitlines()[0], repeats=21)
    result = {"machine": print_machine(args.device), "step": {}}
    specs = all_rows()
    for name, sizes in CASES.items():
        result["step"][name] = step_table(name, sizes, specs, args.repeats, args.device)
    write_json(args.json, result)


if __name__ == "__main__":
    main()
