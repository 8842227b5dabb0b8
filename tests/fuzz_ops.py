"""Drawn arguments, right and wrong, for the native operators, between guard pages.

    python -m tests.fuzz_ops --seconds 600 --seed 1
    python -m tests.fuzz_ops --case 1:37        # one again, in this process

A case ends well in one of two ways: an exception of an ordinary type and not a byte changed; or the
results and bytes of the pure-torch reference, on the same arguments in ordinary memory. Batches run
in processes of their own, each with another instruction set: a signal is a failure that names its
case. Linux only.
"""

import argparse
import collections
import contextlib
import json
import math
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import torch

from fastguard import ops
from fastguard.ops import attention as attention_ops
from tests.guard_pages import Guarded, Plain

ROOT = Path(__file__).resolve().parent.parent
F64, I64 = torch.float64, torch.int64
NUMBERS = [0.0, 1.0, -1.0, 0.5, 16.0, 17.5, 1e9, 1e300, -1e300, math.inf, -math.inf, math.nan]
INTEGERS = [0, 1, -1, 2, 4, 5, 1000, 2**31, 2**53, 2**62, -(2**63), 2**63 - 1]
#: What an operator may raise. The dispatcher has TypeError and ValueError for what is no argument.
EXPECTED = (RuntimeError, TypeError, ValueError)


class Draw:
    """Draws arguments; the same seed draws the same ones, whatever memory they are placed in."""

    def __init__(self, seed: str, memory: Plain):
        self.rng = random.Random(seed)
        self.generator = torch.Generator().manual_seed(self.rng.getrandbits(32))
        self.memory = memory
        #: Of the arguments: what keeps them from being compared with the reference.
        self.odd = set()
        self.mistyped = False  # torch refuses such a call, and prints what it was given

    def chance(self, p: float) -> bool:
        return self.rng.random() < p

    def pick(self, choices):
        return self.rng.choice(choices)

    def number(self, ordinary: float) -> float:
        return self.pick(NUMBERS) if self.chance(0.1) else ordinary

    def shape(self, most=4) -> tuple[int, ...]:
        if self.chance(0.05):
            return (self.pick([16383, 16384, 16385, 40_001]),)
        sizes = [0, 1, 1, 2, 3, 5, 7, 8, 15, 16, 17, 33]
        return tuple(self.pick(sizes) for _ in range(self.rng.randint(0, most - 1)))

    def values(self, n: int, dtype: torch.dtype, *, odd=0.0) -> torch.Tensor:
        if dtype == torch.bool:
            return torch.rand(n, generator=self.generator) < 0.5
        if not (dtype.is_floating_point or dtype.is_complex):
            return torch.randint(0, 3, (n,), generator=self.generator).to(dtype)
        values = torch.randn(n, generator=self.generator, dtype=F64).to(dtype)
        if n and self.chance(odd):
            values[self.rng.randrange(n)] = self.pick([math.nan, math.inf, -math.inf, 0.0])
        return values

    def flat(self, values) -> torch.Tensor:
        return self.memory.place(values, at_end=self.chance(0.7))

    def tensor(self, shape, dtype, *, odd=0.0, expand=0.05) -> torch.Tensor:
        """In one of many layouts."""
        n = math.prod(shape)
        layout = self.pick(["plain"] * 3 + ["permuted", "gaps", "shifted"])
        if self.chance(expand) and shape:
            dim = self.rng.randrange(len(shape))
            inner = [1 if i == dim else size for i, size in enumerate(shape)]
            return self.flat(self.values(math.prod(inner), dtype)).view(inner).expand(shape)
        if layout == "permuted":
            order = self.rng.sample(range(len(shape)), len(shape))
            there = self.flat(self.values(n, dtype, odd=odd)).view([shape[i] for i in order])
            return there.permute([order.index(i) for i in range(len(shape))])
        if layout == "gaps" and shape:
            there = self.flat(self.values(3 * n, dtype, odd=odd)).view(*shape, 3)
            return there[..., self.rng.randrange(3)]
        if layout == "shifted":
            return self.flat(self.values(n + 1, dtype, odd=odd))[1:].view(shape)
        return self.flat(self.values(n, dtype, odd=odd)).view(shape)

    def scalar(self, value, dtype=F64) -> torch.Tensor:
        return self.flat(torch.tensor([value], dtype=dtype)).view(())

    def vector(self, values, dtype=F64) -> torch.Tensor:
        return self.flat(torch.tensor(values, dtype=dtype))

    # --- arguments of each operator, most of them right ----------------------------------------

    def gradients(self, least=0, dtypes=ops.DTYPES):
        n = self.rng.randint(least, 6)
        return [self.tensor(self.shape(), self.pick(dtypes), odd=0.1) for _ in range(n)]

    def verdict(self):
        return self.scalar(self.pick([0, 0, 1, 2, 3, 4, -1, 2**40]), I64)

    def coef(self, n):
        one = self.chance(0.5)
        drawn = [self.pick([0.5, 1.0, 0.25, self.number(2.0)]) for _ in range(1 if one else n)]
        return self.vector(drawn).view(() if one else (n,))

    def grad_norm(self):
        return [self.gradients()]

    def decide(self):
        return [self.scalar(self.number(3.0)), self.number(1.0), self.number(10.0)]

    def known(self, n):
        window = self.pick([1, 2, 7, 16, 128])
        count = self.rng.randint(0, 200)
        numbers = [self.number(x) for x in (count, count // 2, 1.0, 0.1)]
        windows = [[self.number(self.rng.random()) for _ in range(window)] for _ in range(2)]
        columns = self.pick([n, n, 0])
        each = [self.number(self.rng.random()) for _ in range(4 * columns)]
        per_tensor = self.vector(each).view(4, columns)
        return [self.vector(numbers), *map(self.vector, windows), per_tensor]

    def policy(self):
        options = [self.number(2.0), self.number(0.9), self.number(5.0)]
        step = self.pick([3, 100, self.pick(INTEGERS)])
        return [step, self.rng.randint(0, 4), self.number(1.0), self.number(10.0), options]

    def guard_decide_(self):
        norms = self.vector([self.number(self.rng.random()) for _ in range(self.rng.randint(0, 5))])
        scalars = [self.scalar(self.number(1.0)) if self.chance(0.5) else None for _ in range(2)]
        known = self.known(len(norms))
        return [self.scalar(self.number(2.0)), norms, *scalars, *known, *self.policy()]

    def grad_norm_decide_(self):
        grads = self.gradients()
        scalars = [self.scalar(self.number(1.0)) if self.chance(0.5) else None for _ in range(2)]
        scaling = [None, None]
        if self.chance(0.7):
            tracker = self.pick([0, 1, 2, -1, 2**31 - 1, -(2**31)])
            scaling = [self.scalar(8.0, torch.float32), self.scalar(tracker, torch.int32)]
        growth = [self.number(2.0), self.number(0.5), self.number(3.0)]
        return [grads, *scalars, *self.known(len(grads)), *self.policy(), *scaling, growth]

    def clip_(self):
        return [self.gradients(), self.number(0.5), self.number(1e9), self.chance(0.5)]

    def scale_(self):
        grads = self.gradients()
        return [grads, self.coef(len(grads))]

    def settle_(self):
        dtypes = [*ops.FLOATING_DTYPES, I64, torch.bool, torch.uint8]
        buffers, saved = [], []
        for _ in range(self.rng.randint(0, 5)):
            shape, dtype = self.shape(), self.pick(dtypes)
            buffers.append(self.tensor(shape, dtype, odd=0.2))
            saved.append(self.tensor(shape, dtype))
        owners = [self.rng.randrange(len(buffers)) for _ in buffers]
        if owners and self.chance(0.1):
            owners[0] = self.pick(INTEGERS)
        return [buffers, saved, self.verdict(), self.vector(owners, I64)]

    def accumulate_(self):
        grads = self.gradients()
        sums = [self.tensor(g.shape, F64 if g.dtype == F64 else torch.float32) for g in grads]
        window = self.vector([1.0, 1.0, self.number(1.0)])
        return [sums, grads, self.verdict(), window, self.number(0.5)]

    def adamw_(self):
        narrow = [dtype for dtype in ops.DTYPES if dtype != F64]
        params = self.gradients(dtypes=self.pick([[F64], narrow]))
        wide = F64 if params and params[0].dtype == F64 else torch.float32
        grads = [self.tensor(p.shape, self.pick([p.dtype, wide]), odd=0.1) for p in params]
        size = ops.packed_offsets(p.numel() for p in params)[-1]
        amsgrad = self.chance(0.5)
        moments = [self.flat(self.values(n, wide).abs()) for n in (size, size, size * amsgrad)]
        steps = [self.pick([0.0, 3.0, self.number(9.0)]) for _ in params]
        rule = [self.number(x) for x in (1e-2, 0.9, 0.99, 0.1, 1e-8)]
        decision = [self.coef(len(params)), self.verdict()]
        switches = [self.chance(0.5), amsgrad, self.chance(0.5)]
        state = [*moments, self.vector(steps, torch.float32)]
        return [params, grads, *state, *decision, *rule, *switches]

    def attention(self, backward=False):
        b, g, t, s = (self.rng.randint(1, n) for n in (2, 2, 70, 130))
        h = g * self.rng.randint(1, 2)
        d, dv = self.pick([1, 3, 16, 31, 64, 100]), self.pick([1, 8, 33, 64])
        dtype = self.pick(ops.DTYPES)
        shapes = (b, h, t, d), (b, g, s, d), (b, g, s, dv)
        q, k, v = (self.tensor(shape, dtype, expand=0.02) for shape in shapes)
        padding = attn_mask = seed = None
        if self.chance(0.4):
            padding = self.tensor((b, s), torch.bool)
        if self.chance(0.4):
            added = F64 if dtype == F64 else torch.float32
            attn_mask = self.tensor((b, h, t, s), self.pick([torch.bool, added]), expand=0.3)
        p = self.pick([0.0, 0.0, 0.3, self.number(0.5)])
        if p or self.chance(0.2):
            seed = self.vector([self.pick(INTEGERS), self.pick(INTEGERS)], I64)
        softcap = self.pick([0.0, 0.0, 5.0, self.number(5.0)])
        clamp = self.pick([math.inf, 10.0, self.number(0.5)])
        options = [self.chance(0.4), p, self.pick([0.3, 0.1, -1.0, 0.0]), softcap, clamp]
        given = [q, k, v, padding, attn_mask, seed, *options]
        return given if backward else [*given, self.chance(0.5)]

    def attention_backward(self):
        q, k, v, *rest = self.attention(backward=True)
        with contextlib.suppress(Exception):  # then what was saved is wrong: a case as well
            output, logsumexp, _ = attention_ops.attention_ref(q, k, v, *rest, False)
            saved = [self.flat(x.contiguous().view(-1)).view(x.shape) for x in (output, logsumexp)]
            return [self.tensor(output.shape, q.dtype), q, k, v, *saved, *rest]
        return [q, q, k, v, q, self.vector([0.0]).view(1, 1, 1), *rest]

    # --- what can be wrong with them ------------------------------------------------------------

    def malform(self, args: list) -> None:
        """Make one argument, or one tensor of a list, something else."""
        if "freed" in self.odd:
            return  # nothing here may look at it again
        place = self.rng.randrange(len(args))
        holder, key = args, place
        if isinstance(args[place], list) and args[place] and self.chance(0.8):
            holder, key = args[place], self.rng.randrange(len(args[place]))
        given = holder[key]
        if isinstance(given, torch.Tensor):
            wrong = [self._dtype, self._shape, self._alias, self._shift, self._freed, self._meta]
            wrong += [self._sparse, self._leaf, self._inference, self._lazy, self._gaps]
            with contextlib.suppress(RuntimeError, NotImplementedError):  # no such change of it
                holder[key] = self.pick(wrong)(given, args)
            if self.chance(0.03):
                holder[key], self.mistyped = None, True
        elif isinstance(given, list):
            change = self.pick(["shorter", "longer", "empty"])
            holder[key] = {"shorter": given[:-1], "longer": given + given[:1], "empty": []}[change]
            if change == "longer":
                self.odd.add("alias")
        elif isinstance(given, bool):
            holder[key] = not given
        elif isinstance(given, int):
            holder[key] = self.pick([*INTEGERS, 2**63, 2**70])
            self.mistyped |= holder[key] >= 2**63
        elif isinstance(given, float):
            holder[key] = self.pick([*NUMBERS, "1", None])
            self.mistyped |= not isinstance(holder[key], float)

    def _dtype(self, given, args):
        dtypes = [*ops.FLOATING_DTYPES, I64, torch.int32, torch.bool, torch.float8_e5m2]
        return self.tensor(given.shape, self.pick(dtypes))

    def _shape(self, given, args):
        return self.tensor(self.shape(), given.dtype)

    def _alias(self, given, args):
        self.odd.add("alias")
        return self.pick(tensors_of(args))

    def _shift(self, given, args):
        """Overlaps another, or itself."""
        self.odd.add("alias")
        room = self.pick(self.memory.placed)
        with contextlib.suppress(RuntimeError):
            strides = [self.pick([0, 1, 1, 2]) for _ in given.shape]
            return room.as_strided(given.shape, strides, self.pick([0, 1, 2]))
        return room

    def _freed(self, given, args):
        if given.numel() == 0 or self.mistyped:
            return given
        self.odd.add("freed")
        freed = given.clone()
        freed.untyped_storage().resize_(self.pick([0, freed.untyped_storage().nbytes() - 1]))
        return freed

    def _meta(self, given, args):
        return given.to("meta")

    def _sparse(self, given, args):
        return given.to_sparse() if given.dim() and given.layout == torch.strided else given

    def _leaf(self, given, args):
        if not given.is_floating_point() or given.is_inference():
            return given
        return given.detach().requires_grad_()

    def _inference(self, given, args):
        self.odd.add("inference")
        with torch.inference_mode():
            return given.clone()

    def _lazy(self, given, args):
        """Negated, conjugated or zero when it is read."""
        self.odd.add("lazy")
        if given.is_complex():
            return given.conj()
        if self.chance(0.3):
            return torch._efficientzerotensor(given.shape, dtype=given.dtype)
        pairs = torch.complex(*[given.to(F64 if given.dtype == F64 else torch.float32)] * 2)
        return pairs.conj().imag

    def _gaps(self, given, args):
        return self.flat(self.values(2 * given.numel(), given.dtype))[::2].view(given.shape)


def tensors_of(args) -> list[torch.Tensor]:
    flat = [x for arg in args for x in (arg if isinstance(arg, list) else [arg])]
    return [x for x in flat if isinstance(x, torch.Tensor)]


def is_freed(tensor) -> bool:
    if tensor.device.type != "cpu" or tensor.layout != torch.strided or tensor.numel() == 0:
        return False
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    last = tensor.storage_offset() + sum((size - 1) * stride for size, stride in sizes)
    return tensor.untyped_storage().nbytes() < (last + 1) * tensor.element_size()


REFERENCES = {
    "grad_norm": ops.grad_norm_ref,
    "decide": ops.decide_ref,
    "guard_decide_": ops.guard_decide_ref_,
    "grad_norm_decide_": ops.grad_norm_decide_ref_,
    "clip_": ops.clip_ref_,
    "scale_": ops.scale_ref_,
    "settle_": ops.settle_ref_,
    "accumulate_": ops.accumulate_ref_,
    "adamw_": ops.adamw_ref_,
    "attention": attention_ops.attention_ref,
    "attention_backward": attention_ops.attention_backward_ref,
}


def draw(seed, number, memory):
    """-> the operator's name, its arguments, and the drawer."""
    drawer = Draw(f"{seed}:{number}", memory)
    name = drawer.pick(list(REFERENCES))
    args = getattr(drawer, name)()
    for _ in range(drawer.pick([0, 0, 1, 1, 2])):
        drawer.malform(args)
        factors = {"attention": args[8:10], "attention_backward": args[11:13]}.get(name, [])
        if not all(isinstance(x, float) and abs(x) < 1e30 for x in factors):
            drawer.odd.add("overflow")  # elsewhere in the reference than in the kernels
        if name == "attention_backward":  # what was saved is of other arguments then
            drawer.odd.add("saved")
    return name, args, drawer


def outcome(function, args, expected=EXPECTED):
    """-> its results as a list of tensors, None; or None, what it raised."""
    try:
        found = function(*args)
    except expected as error:
        return None, error
    return [] if found is None else list(found) if isinstance(found, tuple) else [found], None


def run_case(seed, number) -> tuple[str, str]:
    """-> the operator and "accepted" or "refused"; raises AssertionError."""
    memory, ordinary = Guarded(), Plain()
    args = found = None
    try:
        name, args, drawer = draw(seed, number, memory)
        before = memory.bytes()
        with torch.set_grad_enabled(drawer.chance(0.5)):
            found, error = outcome(getattr(torch.ops.fastguard, name).default, args)
        if error is not None:
            assert str(error), f"{type(error).__name__} without a message"
            assert memory.bytes() == before, f"{error!r:.300}, but something was written"
        assert error is not None or not any(map(is_freed, tensors_of(args))), "read freed memory"
        if error is None and {x.device.type for x in tensors_of(args)} == {"meta"}:
            drawer.odd.add("fake")  # such kernels write nothing, and look at no dtypes
        if not drawer.odd:
            _, same, _ = draw(seed, number, ordinary)
            with torch.no_grad():
                expected, wrong = outcome(REFERENCES[name], same, Exception)
            check_same(name, args, found, error, expected, wrong)
            if found is not None:
                if name == "settle_":  # what is not zero is the result
                    found, expected = [found[0] != 0], [expected[0] != 0]
                compare([*found, *memory.placed], [*expected, *ordinary.placed], name)
        return name, "accepted" if error is None else "refused"
    finally:
        del args, found  # before their memory
        memory.free()


def check_same(name, args, found, error, expected, wrong):
    """Whether both the operator and its reference accept, or both refuse."""
    if (error is None) == (wrong is None):
        return
    # The dispatcher serves no call without a tensor, and takes no int beyond 64 bits.
    if error is not None and (not tensors_of(args) or "Expected a value of type" in str(error)):
        return
    # The references take sizes beyond the kernels', masks of float32 for float64, several devices.
    beyond = ("must be at least 1", "attn_mask must be bool", "several devices", "'SparseCPU'")
    if error is not None and any(words in str(error) for words in beyond):
        return
    raise AssertionError(f"the operator: {error!r:.300}; the reference: {wrong!r:.300}")


#: Of what is rounded once or twice.
TOLERANCE = {torch.float16: 2**-9, torch.bfloat16: 2**-6}
TOLERANCE |= dict.fromkeys((torch.float32, torch.complex64), 1e-4)


def compare(found, expected, name):
    assert len(found) == len(expected), f"{len(found)} results instead of {len(expected)}"
    loose = 20 if "attention" in name else 1
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        if a.device.type == "meta" or a.dtype in (torch.float8_e5m2, torch.complex32):
            assert a.shape == b.shape and a.dtype == b.dtype
            continue
        tolerance = loose * TOLERANCE.get(a.dtype, 1e-9)
        torch.testing.assert_close(
            a, b, rtol=tolerance, atol=tolerance, equal_nan=True,
            check_stride=False, msg=lambda said, i=i: f"result {i}: {said}",
        )  # fmt: skip


def run_batch(seed: int, seconds: float) -> None:
    """Cases until the time is over, a line of JSON for each that begins, fails or ends."""
    print(json.dumps({"capability": ops.cpu_info().get("chosen")}), flush=True)
    torch.set_num_threads(1 + seed % 2)
    counts = collections.Counter()
    end = time.monotonic() + seconds
    number = 0
    while time.monotonic() < end:
        print(json.dumps({"begins": number}), flush=True)
        try:
            counts[" ".join(run_case(seed, number))] += 1
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
            print(json.dumps({"case": f"{seed}:{number}", "failed": said[:1000]}), flush=True)
        number += 1
    print(json.dumps({"counts": counts}), flush=True)


def start_batch(seed: int, seconds: float, capability: str) -> tuple[dict, list[str]]:
    """-> how many cases of each operator were accepted and refused; the failures."""
    command = [sys.executable, "-m", "tests.fuzz_ops", "--batch", str(seed), "--seconds"]
    try:
        done = subprocess.run(
            [*command, str(seconds)], cwd=ROOT, capture_output=True, text=True,
            env={**os.environ, "FASTGUARD_CPU_CAPABILITY": capability}, timeout=seconds + 120,
        )  # fmt: skip
        printed, status, said = done.stdout, done.returncode, done.stderr[-500:]
    except subprocess.TimeoutExpired as error:
        printed, status, said = (error.stdout or b"").decode(), "timeout", ""
    lines = [json.loads(line) for line in printed.splitlines()]
    failures = [f"{line['case']} {line['failed']}" for line in lines if "failed" in line]
    if status != 0:
        begun = [line["begins"] for line in lines if "begins" in line]
        where = f"case {seed}:{begun[-1]}" if begun else "before the first case"
        failures.append(f"{where} under {capability} ended with status {status}: {said}")
    counts = next((line["counts"] for line in lines if "counts" in line), {})
    return counts, failures


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz_ops", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", metavar="SEED:NUMBER", help="run this one in this process")
    parser.add_argument("--batch", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.batch is not None:
        run_batch(args.batch, args.seconds)
        return 0
    if args.case:
        seed, number = map(int, args.case.split(":"))
        print(draw(seed, number, Plain())[:2])
        print(*run_case(seed, number))
        return 0
    counts, failures = fuzz(args.seconds, args.seed)
    for failure in failures:
        print(failure)
    for key, count in sorted(counts.items()):
        print(f"{count:8} {key}")
    print(f"{sum(counts.values())} cases, {len(failures)} failures")
    return 1 if failures else 0


def fuzz(seconds: float, seed: int) -> tuple[collections.Counter, list[str]]:
    """Batches of at most 20 seconds, by each instruction set in turn."""
    counts, failures = collections.Counter(), []
    capabilities = ops.cpu_info()["compiled"].split()
    end, batch = time.monotonic() + seconds, 0
    while (left := end - time.monotonic()) > 1:
        capability = capabilities[batch % len(capabilities)]
        found, failed = start_batch(1000 * seed + batch, min(left, 20.0), capability)
        counts.update(found)
        failures += failed
        batch += 1
    return counts, failures


if __name__ == "__main__":
    sys.exit(main())
