"""A pytest plugin for a process whose fastguard runs on the launchers.

It leaves out the tests that launchers cannot pass. It draws fewer examples, because a launch takes
milliseconds here.
"""

import re

from hypothesis import settings

from tests.simt.kernels.ops import Device

MOST_EXAMPLES = 8

LEFT_OUT = {
    "the reference, not a kernel": r"_ref_?[-\]]",
    "of the CPU's kernels alone": "instruction_set|capability|does_not_depend_on_threads"
    "|settle_on_the_cpu",
    # The CUDA norm adds 32 elements in float32, the CPU's adds all in float64: they differ by 1e-7.
    "a norm as exact as the CPU's": "(grad_norm|decide_|clip_)-1e-1[23]"
    "|test_grad_norm.py::test_grad_norm$|test_clips_to_the_true_norm|test_every_order_is_torchs",
    "rounding as the CPU's": "test_the_kernel_rounds_as_the_reference_does",
    # fastguard.ops gives CUDA's settle_ no buffers with gaps, and takes these for the CPU's.
    "buffers with gaps": r"test_settle\[|test_opcheck_settle",
    # Unpickled and copied storages do not come from the allocator that tells the allowed memory.
    "unpickled tensors": r"survives\[pickle|test_an_optimizer_that_raises_does_not_lose"
    "|test_a_deep_copy_with_a_guard_of_its_own",
    "too slow": "grad_norm_of_every_half"
    r"|test_fault_injection.py.*\[(?!AdamW-torch.float32)",
}
WITHOUT_LAUNCHERS = re.compile("cuda kernel|warps one by one|at random")  # ids of Devices


def leaves_out(item):
    parameters = getattr(item, "callspec", None)
    given = parameters.params.values() if parameters else ()
    if any(isinstance(getattr(value, "__self__", value), Device) for value in given):
        return True
    return WITHOUT_LAUNCHERS.search(item.nodeid) or any(
        re.search(pattern, item.nodeid) for pattern in LEFT_OUT.values()
    )


def pytest_collection_modifyitems(config, items):
    left_out = [item for item in items if leaves_out(item)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]
    for item in items:
        drawn = getattr(item.obj, "_hypothesis_internal_use_settings", None)
        if drawn is not None:
            few = min(drawn.max_examples, MOST_EXAMPLES)
            item.obj._hypothesis_internal_use_settings = settings(
                drawn, max_examples=few, deadline=None, derandomize=True, database=None
            )
