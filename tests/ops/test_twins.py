"""Constants that Python and C++ both write down: the same numbers in both."""

import re
from pathlib import Path

import pytest

from fastguard.ops import attention, glu_depthwise, packed, types
from fastguard.thresholds import Kind

CSRC = Path(__file__).parents[2] / "csrc"


def source(name):
    return (CSRC / name).read_text(encoding="utf-8")


def constant(name, file):
    found = re.findall(rf"constexpr \w+ {name} = ([\d.e+-]+);", source(file))
    assert len(found) == 1, f"csrc/{file} defines {name} {len(found)} times"
    return float(found[0])


def enumerators(name, file):
    (body,) = re.findall(rf"enum class {name} : int64_t \{{(.*?)\}};", source(file), re.DOTALL)
    return {key: int(value) for key, value in re.findall(r"(\w+) = (\d+)", body)}


@pytest.mark.parametrize(
    "module, name, file",
    [
        (types, "OUTLIER_AFTER", "decide.h"),
        (types, "OUTLIER_FACTOR", "decide.h"),
        (types, "USUAL_BETA", "decide.h"),
        (types, "RISEN_FACTOR", "decide.h"),
        (types, "ADAGC_RESTART_AFTER", "decide.h"),
        (types, "LARGEST_APPLIED", "decide.h"),
        (packed, "PACKED_ALIGNMENT", "adamw_options.h"),
        (attention, "MOST_HEAD_DIM", "attention.h"),
        (attention, "SMALLEST_SOFTCAP", "attention.h"),
        (attention, "LARGEST_SOFTCAP", "attention.h"),
        (attention, "LARGEST_SCALE", "attention.h"),
        (glu_depthwise, "MOST_TAPS", "cpu/glu_depthwise_kernel.h"),
    ],
)
def test_a_constant_is_the_same_in_both_languages(module, name, file):
    assert getattr(module, name) == constant(name.lower(), file)


def test_the_widest_head_of_cuda_is_the_same_in_both_languages():
    assert constant("most_kernel_width", "cuda/attention.cuh") == attention.MOST_CUDA_HEAD_DIM


def test_verdicts_have_the_same_numbers():
    known_on_the_host = {v.name.lower(): int(v) for v in types.Verdict}
    assert known_on_the_host.pop("skip_rollback") == 4
    assert enumerators("Verdict", "decide.h") == known_on_the_host


def test_thresholds_have_the_same_numbers():
    assert enumerators("Threshold", "decide.h") == {kind.name.lower(): int(kind) for kind in Kind}
