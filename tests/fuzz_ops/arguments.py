"""Draws the arguments of an operator, and makes some of them wrong."""

import contextlib
import math
import random

import torch

from fastguard import ops
from fastguard.ops import attention as attention_ops
from tests.guard_pages import Plain

F64, I64 = torch.float64, torch.int64
NUMBERS = [0.0, 1.0, -1.0, 0.5, 16.0, 17.5, 1e9, 1e300, -1e300, math.inf, -math.inf, math.nan]
INTEGERS = [0, 1, -1, 2, 4, 5, 1000, 2**31, 2**53, 2**62, -(2**63), 2**63 - 1]


class Draw:
    """Draws arguments. Equal seeds draw equal arguments, in any memory."""

    def __init__(self, seed: str, memory: Plain):
        self.rng = random.Random(seed)
        self.generator = torch.Generator().manual_seed(self.rng.getrandbits(32))
        self.memory = memory
        #: Reasons why the arguments cannot be compared with the reference.
        self.odd = set()
        self.mistyped = False  # torch refuses a call with such types, and prints the arguments

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
        """A tensor in one of many layouts."""
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

    # --- arguments of each operator, most of them valid ----------------------------------------

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
        params = self.gradients(dtypes=self.pick([[F64], narrow, narrow[1:]]))
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
        has_masters = all(p.dtype.itemsize == 2 for p in params) and self.chance(0.6)
        master = self.flat(self.values(size, torch.float32)) if has_masters else None
        for p, offset in zip(params, ops.packed_offsets(p.numel() for p in params), strict=False):
            if has_masters and 0 not in p.stride() and self.chance(0.7):
                p.copy_(ops.packed_view(master, p, offset))
        return [params, grads, *state, *decision, *rule, *switches, master]

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
            attn_mask = self.tensor((b, h, t, s), self.pick([torch.bool, added, dtype]), expand=0.3)
        p = self.pick([0.0, 0.0, 0.3, self.number(0.5)])
        if p or self.chance(0.2):
            seed = self.vector([self.pick(INTEGERS), self.pick(INTEGERS)], I64)
        softcap = self.pick([0.0, 0.0, 5.0, self.number(5.0)])
        clamp = self.pick([math.inf, 10.0, self.number(0.5)])
        options = [self.chance(0.4), p, self.pick([0.3, 0.1, -1.0, 0.0]), softcap, clamp]
        given = [q, k, v, padding, attn_mask, seed, *options]
        return given if backward else [*given, self.chance(0.5), self.chance(0.5)]

    def attention_backward(self):
        q, k, v, *rest = self.attention(backward=True)
        with contextlib.suppress(Exception):  # the saved tensors are invalid then, which is a case
            asked = self.chance(0.5)
            found = attention_ops.attention_ref(q, k, v, *rest, False, asked)
            output = found.unrounded if asked else found.output
            saved = (output, found.logsumexp)
            saved = [self.flat(x.contiguous().view(-1)).view(x.shape) for x in saved]
            return [self.tensor(output.shape, q.dtype), q, k, v, *saved, *rest]
        return [q, q, k, v, q, self.vector([0.0]).view(1, 1, 1), *rest]

    # --- invalid arguments ----------------------------------------------------------------------

    def malform(self, args: list) -> None:
        """Replace one argument, or one tensor of a list, by an invalid one."""
        if "freed" in self.odd:
            return  # nothing here may read it again
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
        """A tensor that overlaps another one, or itself."""
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
        """A lazily negated, conjugated or zero tensor."""
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
