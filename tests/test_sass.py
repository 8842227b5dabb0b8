"""The machine code of the kernels, for each architecture.

tests/sass/promises.py has the gates. The tests apply them to the library that setup.py built, and
to small kernels that break one gate each.
"""

import dataclasses
import shutil
from importlib import metadata

import pytest
import torch

from fastguard._extras import MissingExtra
from tests.sass import cuobjdump
from tests.sass.__main__ import report
from tests.sass.dynamic_shared import dynamic_shared
from tests.sass.loop import innermost_loops

from . import sass

ARCHS = ("80", "90", "100", "120")


@pytest.fixture(scope="module")
def kernels():
    if not sass.LIBRARY.is_file():
        if shutil.which("nvcc") is None or torch.version.cuda is None:
            pytest.skip(f"{sass.LIBRARY.name} was not built: no nvcc, or a torch without CUDA")
        pytest.fail(f"{sass.LIBRARY} was not built, though nvcc is here: pip install -v -e .")
    found = sass.kernels()
    print(report(found))
    return found


def test_every_kernel_is_there_for_every_architecture(kernels):
    assert kernels.keys() == {(arch, name) for arch in ARCHS for name in sass.PROMISES}


@pytest.mark.parametrize("name", sass.PROMISES)
@pytest.mark.parametrize("arch", ARCHS)
def test_a_kernel_keeps_its_promises(kernels, arch, name):
    found = sass.problems(kernels[arch, name])
    assert not found, "\n".join([f"{len(found)}:", *found[:20]])


def test_the_headers_tell_the_dynamic_shared_memory_of_every_launch_that_has_some():
    promised = {name for name, promise in sass.PROMISES.items() if promise.dynamic_shared}
    assert dynamic_shared().keys() == promised


# --- the gates ------------------------------------------------------------------------------------

# Doubles float32 values: 256 threads read two vectors each at a time, as ptxas would write it.
SCALE = """
Fatbin elf code:
================
arch = sm_90
	code for sm_90
		Function : _ZN9fastguard12scale_kernelENS_4PlanEPKdi
        /*0000*/                   LDC R1, c[0x0][0x28] ;             /* 0x00000a00ff017b82 */
                                                                      /* 0x000fe20000000800 */
        /*0010*/                   S2R R0, SR_TID.X ;                 /* 0x0000000000007919 */
        /*0020*/                   BSSY B0, 0x0110 ;                  /* 0x0000000000007919 */
        /*0030*/               @P1 BRA 0x100 ;                        /* 0x0000000000007919 */
        /*0040*/              @!P0 LDG.E.128 R4, desc[UR6][R24.64] ;  /* 0x0000000000007919 */
        /*0050*/              @!P2 LDG.E.128 R8, desc[UR6][R24.64+0x1000] ;
        /*0060*/                   FADD R4, R4, R4 ;
        /*0070*/                   FADD R8, R8, R8 ;
        /*0080*/                   @P3 BRA 0xb0 ;
        /*0090*/              @!P0 STG.E.128 desc[UR6][R24.64], R4 ;
        /*00a0*/              @!P2 STG.E.128 desc[UR6][R24.64+0x1000], R8 ;
        /*00b0*/                   IADD3 R24, R24, 0x2000, RZ ;
        /*00c0*/                   ISETP.GE.AND P1, PT, R24, R0, PT ;
        /*00d0*/              @!P1 BRA 0x40 ;
        /*00e0*/                   LDG.E R2, desc[UR6][R24.64] ;
        /*00f0*/                   STG.E desc[UR6][R24.64], R2 ;
        /*0100*/                   BSYNC B0 ;
        /*0110*/                   EXIT ;
        /*0120*/                   BRA 0x120;
"""
USAGE = """
arch = sm_90
Resource usage:
 Common:
  GLOBAL:0
 Function _ZN9fastguard12scale_kernelENS_4PlanEPKdi:
  REG:64 STACK:0 SHARED:1064 LOCAL:0 CONSTANT[0]:612 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
PROMISE = sass.Promise(4, moves=frozenset([("float32", "1 x 128", "1 x 128")]), in_flight=2)


def problems(code=SCALE, usage=USAGE, **promise):
    key = "90", "scale_kernel"
    kernel = sass.Kernel(*key, sass.parse_usage(usage)[key], sass.parse_code(code)[key])
    return sass.problems(kernel, dataclasses.replace(PROMISE, **promise))


def test_a_kernel_without_a_problem():
    assert problems() == []
    code = sass.parse_code(SCALE)["90", "scale_kernel"]
    assert len(code) == 19
    assert str(code[5]) == "0x0050 @!P2 LDG.E.128 R8, desc[UR6][R24.64+0x1000]"
    loops = innermost_loops(code)
    assert [(loop.header, len(loop.body)) for loop in loops] == [(0x40, 10), (0x120, 1)]
    assert [loop.streams for loop in loops] == [True, False]
    assert sass.parse_usage(USAGE)["90", "scale_kernel"] == sass.Usage(64, 0, 40, 0)


def test_a_loop_within_a_loop():
    """That of the chunks around that of their vectors."""
    code = SCALE.replace("BSYNC B0", "@!P4 BRA 0x10")
    assert problems(code) == []
    assert len(innermost_loops(sass.parse_code(code)["90", "scale_kernel"])) == 2


WIDE = "R8, desc[UR6][R24.64+0x1000]"


@pytest.mark.parametrize(
    ("there", "instead", "expected"),
    [
        ("LDG.E.128", "LDG.E.64", "no loop over float32 loads 1 x 128 and stores 1 x 128"),
        (f"LDG.E.128 {WIDE}", f"LDG.E.64 {WIDE}", "over float32 loads 1 x 64, 1 x 128 and stores"),
        (f"LDG.E.128 {WIDE}", f"LDG.E {WIDE}", "over float32 loads 1 x 32, 1 x 128 and stores"),
        ("STG.E.128", "STG.E.64", "over float32 loads 1 x 128 and stores 1 x 64"),
        (f"LDG.E.128 {WIDE}", "LDG.E.128 R8, desc[UR6][R4.64]", "the first load after 1, not 2"),
        ("LDG.E R2", "LDG.E.U8 R2", "byte by byte: 0x00e0 LDG.E.U8 R2"),
        ("LDG.E R2", "LD.E R2", "not known to be global memory: 0x00e0 LD.E R2"),
        ("STG.E desc", "ST.E desc", "not known to be global memory: 0x00f0 ST.E desc"),
        ("LDC R1, c[0x0][0x28]", "STL [R1+0x8], R4", "spilled: 0x0000 STL [R1+0x8], R4"),
        ("IADD3 R24", "LDL.LU R24, [R1]; IADD3 R24", "spilled: 0x00b0 LDL.LU R24, [R1]"),
        ("FADD R8, R8, R8", "CALL.REL.NOINC 0x200", "the loop at 0x40 over float32 has a call"),
    ],
)
def test_what_is_wrong_with_the_code_is_found(there, instead, expected):
    broken = SCALE.replace(there, instead)
    assert broken != SCALE
    found = problems(broken)
    assert any(expected in each for each in found), found


@pytest.mark.parametrize(
    ("there", "instead", "expected"),
    [
        ("REG:64", "REG:65", "65 registers: 3 blocks fit on an SM, not 4"),
        ("STACK:0", "STACK:48", "48 bytes of stack"),
        ("LOCAL:0", "LOCAL:8", "8 of local memory"),
        ("SHARED:1064", "SHARED:50177", "49153 bytes of shared memory"),
    ],
)
def test_what_is_wrong_with_the_resources_is_found(there, instead, expected):
    (found,) = problems(usage=USAGE.replace(there, instead))
    assert expected in found


def test_the_fp64_units_are_not_for_measuring():
    code = "".join(line for line in SCALE.splitlines(True) if "STG.E.128" not in line)
    code = code.replace("FADD R8, R8, R8", "F2F.F64.F32 R8, R8")
    moves = frozenset([("float32", "1 x 128", "-")])
    assert problems(code, moves=moves) == ["the loop at 0x40 over float32 takes the fp64 units"]


def test_a_call_behind_the_next_instruction_ends_a_loop():
    """As ptxas writes it for sm_80: `@P1 CALL` what follows the branch that goes on."""
    code = SCALE.replace("@!P1 BRA 0x40", " @P1 CALL.REL.NOINC 0xf0").replace(
        "LDG.E R2, desc[UR6][R24.64]", "BRA 0x40"
    )
    assert problems(code) == []


def test_a_jump_that_cannot_be_followed_is_not_passed_over():
    with pytest.raises(ValueError, match="BRX R2"):
        problems(SCALE.replace("BSYNC B0", "BRX R2 -0x20"))


def test_without_cuobjdump_it_says_what_to_install(monkeypatch):
    def files(package):
        raise metadata.PackageNotFoundError(package)

    monkeypatch.setattr(cuobjdump.metadata, "files", files)
    with pytest.raises(MissingExtra, match=r"nvidia-cuda-nvdisasm .*torch-fastguard\[test\]"):
        cuobjdump.executable("nvdisasm")
