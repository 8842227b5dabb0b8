"""Time of the global gradient norm: fastguard beside torch and beside a plain read of the bytes.

    python bench/norm_kernel.py [--device cpu|cuda] [--repeats N] [--json FILE]
    python bench/norm_kernel.py --model counted

The second counts what the CUDA kernels move, without a GPU: see bench/counted.py.

All rows of a table are measured in turns in one run; the figures are medians. The floor is one
read of the same number of bytes from one tensor: the faster of two of torch's own reductions, `sum`
and `dot` of the tensor with itself. On a machine that is busy otherwise torch's rows grow most, for
they open a parallel region per tensor: look at the load in the first line.
"""

import itertools

import torch
from timing import arguments, interleaved, print_machine, table, write_json
from torch import nn

import fastguard
from fastguard import ops


def cases(device):
    """Lists of parameters with gradients, by a name that says what they are."""
    shapes = {
        "45 M fp32 in 600 tensors (300 matrices, 300 vectors)": (
            [149_616, 384] * 300,
            torch.float32,
        ),
        "45 M bf16 in 600 tensors (300 matrices, 300 vectors)": (
            [149_616, 384] * 300,
            torch.bfloat16,
        ),
        "1000 tensors of 8 fp32": ([8] * 1000, torch.float32),
    }
    for name, (sizes, dtype) in shapes.items():
        parameters = [nn.Parameter(torch.empty(n, dtype=dtype, device=device)) for n in sizes]
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        yield name, parameters


def contenders(parameters):
    grads = [p.grad for p in parameters]
    flat = torch.cat(grads)
    never = 1e30  # a max_norm that nothing exceeds
    return {
        "plain read: sum": flat.sum,
        "plain read: dot": lambda: flat.dot(flat),
        "fastguard.ops.grad_norm": lambda: ops.grad_norm(grads),
        "fastguard.clip_grad_norm_": lambda: fastguard.clip_grad_norm_(parameters, never),
        "torch get_total_norm": lambda: nn.utils.get_total_norm(grads),
        "torch clip_grad_norm_": lambda: nn.utils.clip_grad_norm_(parameters, never),
        "python loop of isfinite": lambda: all(bool(g.isfinite().all()) for g in grads),
    }


def clipping_contenders(parameters):
    """The same with a max_norm that is always exceeded; each function has gradients of its own."""
    functions = {
        "fastguard.clip_grad_norm_, clipping": fastguard.clip_grad_norm_,
        "torch clip_grad_norm_, clipping": nn.utils.clip_grad_norm_,
    }
    return {name: _always_clipping(function, parameters) for name, function in functions.items()}


def _always_clipping(function, parameters):
    own = []
    for parameter in parameters:
        own.append(nn.Parameter(torch.empty_like(parameter)))
        own[-1].grad = parameter.grad.clone()
    norm = ops.grad_norm([p.grad for p in own]).total_norm.item()
    limits = (norm * 0.99**i for i in itertools.count(1))
    return lambda: function(own, next(limits))


def main():
    args = arguments(__doc__.splitlines()[0], repeats=31, model=("timed", "counted"))
    if args.model == "counted":
        import counted  # needs the tests' packages, a timing does not

        counted.main()
        return
    device = args.device
    result = {"machine": print_machine(device), "cases": {}}
    for name, parameters in cases(device):
        functions = contenders(parameters) | clipping_contenders(parameters)
        medians = interleaved(functions, args.repeats, device)
        ours = medians["fastguard.ops.grad_norm"]
        floor = min(medians["plain read: sum"], medians["plain read: dot"])
        print(
            table(
                name,
                ["", "ms", "/ floor", "/ grad_norm"],
                [
                    [row, f"{s * 1e3:.3f}", f"{s / floor:.2f}", f"{s / ours:.2f}"]
                    for row, s in medians.items()
                ],
            ),
            end="\n\n",
        )
        result["cases"][name] = medians
    write_json(args.json, result)


if __name__ == "__main__":
    main()
