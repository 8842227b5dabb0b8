"""fastguard's operators, run by the kernels' PTX.

A :class:`PtxDevice` has the functions of tests/simt's Device, and gives the same arguments to the
kernels. The launches and the layouts of the arguments are those of csrc/cuda.
"""

import struct

import numpy as np

from tests.simt.kernels.ops import Device

from . import library
from .machine import STEP_LIMIT, Machine, Order

THREADS = 256
CHUNK = 8192  # elements
UPLOAD_WORDS = 2000
KEPT_BYTES = 4 * CHUNK
PACKED = 16  # elements
BYTES = (4, 8, 2, 2, 1)  # of an element of each type


class PtxDevice(Device):
    """A GPU with ``blocks`` blocks, which run in an order."""

    def __init__(self, blocks=3, order=None, programs=None, step_limit=STEP_LIMIT):
        super().__init__(blocks)
        self.order = order or Order()
        self.programs = programs or library.programs()
        self.step_limit = step_limit

    def run_one_block(self, kernel, *args):
        machine = Machine(self.programs, self.order, self.step_limit)
        getattr(Launcher(machine), kernel)(*args)


class Launcher:
    """Launches kernels as csrc/cuda/*.cu do. The functions are those of fastguard_kernels.cpp."""

    def __init__(self, machine):
        self.machine = machine

    def launch(self, name, blocks, *arguments, **more):
        self.machine.launch(name, blocks, THREADS, *arguments, **more)

    def address(self, array, name, writable=True):
        """The address of an array, which kernels may then read; 0 for None."""
        if array is None:
            return 0
        self.machine.memory.allow(array.ctypes.data, array.nbytes, name, writable)
        return array.ctypes.data if array.nbytes else 0

    def addresses(self, arrays, *names, writable=True):
        return [self.address(arrays[name], name, writable) for name in names]

    def grad_norm(self, blocks, tensors, repeats, out, given):
        plan = Plan(self, tensors, writes=False)
        deciding = self.deciding(given) if given else bytes(DECIDING.size)
        for _ in range(repeats):
            self.launch("grad_norm_kernel", blocks, plan.argument, self.norms(out), deciding)

    def guard_decide(self, total_norm, norms, given):
        arguments = [self.address(total_norm, "total_norm", False)]
        arguments += [self.address(norms, "norms", False)]
        packed = [struct.pack("<Q", x) for x in arguments] + [struct.pack("<i", norms.size)]
        self.launch("guard_decide_kernel", 1, self.deciding(given), *packed)

    def decide(self, total_norm, max_norm, skip_norm, out):
        arguments = [
            struct.pack("<Q", self.address(total_norm, "total_norm", False)),
            struct.pack("<d", max_norm),
            struct.pack("<d", skip_norm),
        ]
        results = self.addresses(out, "clip_coef", "verdict")
        self.launch("decide_kernel", 1, *arguments, *(struct.pack("<Q", x) for x in results))

    def scale(self, blocks, tensors, clip_coef, next_coef):
        plan = Plan(self, tensors, writes=True)
        coef = struct.pack("<Q", self.address(clip_coef, "clip_coef", False))
        self.launch("scale_kernel", blocks, plan.argument, coef, struct.pack("<i", next_coef))

    def clip(self, blocks, tensors, max_norm, skip_norm, float32_norm, out):
        plan = Plan(self, tensors, writes=True)
        results = self.addresses(out, "clip_coef", "verdict")
        clipping = struct.pack("<dd?7xQQ", max_norm, skip_norm, float32_norm, *results)
        arguments = [plan.argument, self.norms(out), clipping]
        more = {"dynamic_shared": KEPT_BYTES, "cooperative": True}
        self.launch("clip_kernel", blocks, *arguments, **more)

    def adamw(self, blocks, tensors, state, grad_coef, next_coef, verdict, rule):
        plan = Plan(self, tensors, writes=True)
        moments = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "state_steps", "master_param")
        packed = self.addresses(state, *moments)
        amsgrad, masters = (str(bool(packed[i])).lower() for i in (2, 4))
        decision = struct.pack(
            "<Qi4xQ",
            self.address(grad_coef, "grad_coef", False),
            next_coef,
            self.address(verdict, "verdict", False),
        )
        names = ("lr", "beta1", "beta2", "weight_decay", "eps")
        flags = (rule["decoupled_weight_decay"], rule["maximize"])
        options = struct.pack("<5d??6x", *(rule[name] for name in names), *flags)
        arguments = [plan.argument, struct.pack("<5Q", *packed), decision, options]
        self.launch(f"adamw_kernel<{amsgrad},{masters}>", blocks, *arguments)

    def accumulate(self, blocks, tensors, verdict, window, weight):
        plan = Plan(self, tensors, writes=True)
        arguments = [
            struct.pack("<Q", self.address(verdict, "verdict", False)),
            struct.pack("<Q", self.address(window, "window")),
            struct.pack("<d", weight),
        ]
        self.launch("accumulate_kernel", blocks, plan.argument, *arguments)

    def settle(self, blocks, tensors, verdict, owners, lost):
        plan = Plan(self, tensors, writes=True, writes_others=True)
        arguments = [
            struct.pack("<Q", self.address(verdict, "verdict", False)),
            struct.pack("<Q", self.address(owners, "owners", False)),
            struct.pack("<Q", self.address(lost, "lost")),
        ]
        self.launch("find_lost_kernel", blocks, plan.argument, *arguments)
        self.launch("settle_kernel", blocks, plan.argument, *arguments)

    def norms(self, out):
        return struct.pack("<3Q", *self.addresses(out, "total_norm", "norms", "nonfinite"))

    def deciding(self, given):
        """The bytes of csrc/cuda/judge.cuh's Deciding."""
        known = ("statistics", "seen_norms", "accepted_norms")
        return DECIDING.pack(
            given["threshold"],
            given["max_norm"],
            given["skip_norm"],
            *given["options"][:3],
            *self.addresses(given, "unscale", "loss", writable=False),
            *self.addresses(given, *known),
            given["seen_norms"].size,
            self.address(given["per_tensor"], "per_tensor"),
            given["columns"],
            given["step"],
            *self.addresses(given, "scale", "growth_tracker"),
            *given["growth"][:2],
            int(given["growth"][2]),
            *self.addresses(given, "grad_coef", "verdict", "record"),
        )


DECIDING = struct.Struct("<i4x5d5QqQqdQQddqQQQ")


class Plan:
    """A plan in memory: csrc/cuda/plan.h's HostPlan, but each of its arrays in its own bounds."""

    def __init__(self, launcher, tensors, writes, writes_others=False):
        self.launcher = launcher
        uploaded, first_dim_at, dims_at, chunks = self.uploaded(tensors)
        for i, (data, other, numel, type_, other_type, _) in enumerate(tensors):
            memory = launcher.machine.memory
            if numel and data:
                memory.allow(data, numel * BYTES[type_], f"tensor {i}", writes)
            if numel and other:
                memory.allow(other, numel * BYTES[other_type], f"other {i}", writes_others)
        base = self.make(len(uploaded), "the plan's description")
        arrays = {"chunks": 32 * chunks, "sums": 8 * len(tensors), "partials": 8 * chunks}
        arrays |= {"nonfinite": 24 * chunks, "arrived": 4 * (len(tensors) + 1)}
        places = [self.make(nbytes, name) for name, nbytes in arrays.items()]
        places = [base, base + first_dim_at, base + dims_at, *places]
        self.argument = struct.pack("<ii8Q", len(tensors), chunks, *places)
        self.upload(uploaded, base)
        launcher.launch("expand_plan_kernel", len(tensors) + 1, self.argument)

    def make(self, nbytes, name):
        """Memory of which nothing was written, aligned as the allocator of a GPU aligns it."""
        owner = np.full(nbytes + 256, 0xFF, np.uint8)
        shift = -owner.ctypes.data % 256
        self.launcher.machine.memory.allow(owner.ctypes.data + shift, nbytes, name)
        self.launcher.machine.owners.append(owner)
        return owner.ctypes.data + shift

    def uploaded(self, tensors):
        entries, first_dim, dims = [], [0], b""
        chunks = place = 0
        for data, other, numel, type_, other_type, permutation in tensors:
            types = numel << 6 | other_type << 3 | type_
            entries.append(struct.pack("<QQqii", data, other, types, chunks, place))
            chunks += max(-(-numel // CHUNK), 1)
            place += -(-numel // PACKED)
            dims += b"".join(struct.pack("<qq", *dim) for dim in permutation)
            first_dim.append(len(dims) // 16)
        entries = b"".join(entries)
        first_dim = struct.pack(f"<{len(first_dim)}i", *first_dim)
        first_dim += bytes(-len(first_dim) % 16)
        return entries + first_dim + dims, len(entries), len(entries) + len(first_dim), chunks

    def upload(self, uploaded, base):
        for begin in range(0, len(uploaded), 16 * UPLOAD_WORDS):
            part = uploaded[begin : begin + 16 * UPLOAD_WORDS]
            words = len(part) // 16
            arguments = [part.ljust(16 * UPLOAD_WORDS, b"\xff")]
            arguments += [struct.pack("<Q", base + begin), struct.pack("<i", words)]
            self.launcher.launch("upload_kernel", -(-words // THREADS), *arguments)
