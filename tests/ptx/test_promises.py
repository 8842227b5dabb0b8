"""The gates of promises.py on the kernels of the library, and on kernels that break one each."""

import dataclasses

import pytest

from .promises import ARRIVAL, problems

LAST_BLOCK = [
    *(f"adamw_kernel<{a},{b}>" for a in ("false", "true") for b in ("false", "true")),
    "grad_norm_kernel",
    "clip_kernel",
]
# Its atomics count what is lost; the next kernel reads the counts.
COUNTING = ["find_lost_kernel"]


def test_the_kernels_with_atomics_are_known(programs):
    found = {
        name
        for name in programs.names
        if any(ARRIVAL.match(i.opcode) for i in programs(name).kernel.code)
    }
    assert found == {*LAST_BLOCK, *COUNTING}


def test_every_arrival_has_its_fences(programs):
    for name in programs.names:
        assert problems(programs(name).kernel, name not in COUNTING) == []


def changed(kernel, drop=(), opcodes=None):
    code = [
        dataclasses.replace(i, opcode=(opcodes or {}).get(i.opcode, i.opcode))
        for at, i in enumerate(kernel.code)
        if at not in drop
    ]
    return dataclasses.replace(kernel, code=code)


@pytest.mark.parametrize("name", LAST_BLOCK)
def test_a_missing_fence_is_seen(programs, name):
    kernel = programs(name).kernel
    fences = [at for at, i in enumerate(kernel.code) if i.opcode == "membar.gl"]
    assert fences
    for fence in fences:
        (problem,) = problems(changed(kernel, drop=[fence]))
        assert "no fence" in problem


def test_a_load_of_constants_is_seen(programs):
    kernel = programs("grad_norm_kernel").kernel
    loads = changed(kernel, opcodes={"ld.global.f64": "ld.global.nc.f64"})
    assert "loads through the cache of constants" in problems(loads)[0]
