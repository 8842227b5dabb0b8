"""``python -m tests.attention.torch_suite --tests DIRECTORY``: torch's own tests of attention.

DIRECTORY is the folder `test` of torch's sources, which torch's wheel does not have. Each file of
tests runs in two processes: with torch's nn.MultiheadAttention, and with ClampedMultiheadAttention
and ``clamp=None`` in its place. A test that fails with ours alone must be in `DIFFERENCES`, which
says why; where that is the text of an error, the test runs once more and only the type counts.

Exit status: 0 no other test fails with ours alone, 1 one does, or one of `DIFFERENCES` passes or is
not there any more, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

REPOSITORY = Path(__file__).parents[2]

#: Files of torch's tests, and which of their tests are about attention (pytest's -k).
FILES = {
    "nn/test_multihead_attention.py": "",
    "test_native_mha.py": "",
    "test_transformers.py": "TestTransformers",
    "test_nn.py": "Transformer or transformer",
    "test_modules.py": "Transformer or MultiheadAttention",
    "test_jit.py": "multi_head_attn or nn_Transformer or nn_MultiheadAttention",
    "nn/test_module_hooks.py": "test_register_state_dict_post_hook",
    "functorch/test_aotdispatch.py": "autograd_module and (Transformer or Multihead)",
    "quantization/core/test_quantized_op.py": "custom_module_multi_head_attention",
    "quantization/eager/test_quantize_eager_ptq.py": "mha_batch_first",
}


class Difference(NamedTuple):
    """Why a test fails with ours alone."""

    why: str
    #: Part of the failure's message.
    message: str


FAST_PATH = Difference(
    "asserts that the fast path is taken, which would leave out the clamp", "False is not true"
)
NO_KEY = Difference(
    "asserts NaN for a row without a key, which is zero here", "np.False_ is not true"
)
CAUSAL = Difference(
    "asserts that is_causal=True without attn_mask is refused, which is taken here",
    "RuntimeError not raised",
)
NESTED = Difference(
    "asserts that a nested tensor is refused while gradients are on, which is taken here",
    "AssertionError not raised",
)
TEXT = Difference(
    "asserts the text of an error, which is of the same type here and says more", "does not match"
)
OLD_SCRIPT = Difference(
    "puts the module into a class that derives from torch.jit.ScriptModule, which takes it only "
    "after torch.jit.script",
    "Unknown type annotation",
)
QUANTIZED = Difference(
    "quantizes the module for integers, which is refused here: the clamp would be lost",
    "ClampedMultiheadAttention is not quantized",
)

#: Tests that fail with ours alone, by their file and name, and why.
DIFFERENCES = {
    "nn/test_multihead_attention.py": {
        "TestMultiheadAttentionNN::test_multihead_attn_fast_path_invalid_shape": TEXT,
        "TestMultiheadAttentionNN::test_multihead_attn_invalid_shape": TEXT,
        "TestMultiheadAttentionNN::test_multihead_attn_nested_tensor_outside_fast_path": NESTED,
        "TestMultiheadAttentionNNDeviceTypeCPU::"
        "test_multihead_self_attn_two_masks_fast_path_mock_cpu": FAST_PATH,
    },
    "test_transformers.py": {
        "TestTransformersCPU::test_disable_fastpath_cpu": FAST_PATH,
        "TestTransformersCPU::test_mask_check_fastpath_cpu": FAST_PATH,
        "TestTransformersCPU::test_train_with_is_causal_cpu": CAUSAL,
    },
    "test_nn.py": {
        "TestNNDeviceTypeCPU::test_TransformerEncoderLayer_empty_cpu": TEXT,
        "TestNNDeviceTypeCPU::test_transformerencoderlayer_cpu_float32": NO_KEY,
    },
    "test_jit.py": {
        "TestJitGeneratedModule::test_nn_MultiheadAttention": OLD_SCRIPT,
        "TestJitGeneratedModule::test_nn_Transformer": OLD_SCRIPT,
    },
    "quantization/core/test_quantized_op.py": {
        "TestQuantizedOps::test_custom_module_multi_head_attention": QUANTIZED,
    },
}


def outcomes(tests: Path, file: str, names: str | list[str], *options: str) -> dict[str, list]:
    """{test: [outcome, message, number of attentions of ours that were made]} of one file.

    Args:
        names: pytest's -k, or the tests.
    """
    wanted = [f"{tests / file}::{name}" for name in names]
    if isinstance(names, str):
        wanted = [str(tests / file), "-k", names]
    with tempfile.TemporaryDirectory() as folder:
        path, settings = Path(folder, "outcomes.json"), Path(folder, "pytest.ini")
        settings.write_text("[pytest]\n", encoding="utf-8")
        command = [
            *(sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider"),
            *("-p", "tests.attention.torch_plugin", "-c", str(settings), "--rootdir", str(tests)),
            *("--basetemp", str(Path(folder, "temp")), "--outcomes", str(path), *options, *wanted),
        ]
        ways = [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
        surroundings = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, ways)),
            "PYTORCH_TEST_WITH_SLOW": "1",  # tests of attention that torch runs in its CI only
        }
        run = subprocess.run(
            command, cwd=folder, env=surroundings, capture_output=True, text=True, errors="replace"
        )
        # 0 all passed, 1 some did not; others, and no outcomes, say that they did not run.
        if run.returncode not in (0, 1) or not path.exists():
            end = "\n".join((run.stdout + run.stderr).splitlines()[-30:])
            raise SystemExit(f"{file} did not run (status {run.returncode}):\n{end}")
        found = json.loads(path.read_text(encoding="utf-8"))
    return {name.split("::", 1)[1]: outcome for name, outcome in found.items()}


def compared(tests: Path, file: str, names: str) -> tuple[Counter, list[str], bool]:
    """What the tests of one file come to: numbers, lines about differences, whether all is well."""
    with ThreadPoolExecutor(2) as pool:
        torchs, ours = pool.map(
            lambda which: outcomes(tests, file, names, "--attention", which), ("torch", "ours")
        )
    if torchs.keys() != ours.keys():
        raise SystemExit(f"{file}: not the same tests: {sorted(torchs.keys() ^ ours.keys())}")
    counts, lines, well = Counter(), [], True
    known = DIFFERENCES.get(file, {})
    for name, (outcome, message, made) in ours.items():
        counts["with ours"] += made > 0
        if outcome == torchs[name][0]:
            counts[f"{outcome} with both"] += 1
        elif outcome == "failed":
            counts["failed with ours alone"] += 1
            documented = name in known and known[name].message in message
            why = known[name].why if documented else f"NOT DOCUMENTED: {message[:600]}"
            lines.append(f"{name}\n    {why}")
            well &= documented
        else:
            lines.append(f"{name}\n    {torchs[name][0]} with torch's, {outcome} with ours")
            well = False
    texts = [name for name, why in known.items() if why is TEXT and name in ours]
    if texts:
        again = outcomes(tests, file, texts, "--attention", "ours", "--any-text")
        for name in texts:
            if again[name][0] != "passed":
                lines.append(f"{name}\n    FAILS WITH ANY TEXT TOO: {again[name][1][:600]}")
                well = False
    for name in known:
        if ours.get(name, [""])[0] != "failed":
            lines.append(f"{name}\n    DOCUMENTED, and does not fail or is not there")
            well = False
    return counts, lines, well


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.attention.torch_suite",
        description="Run torch's own tests of attention with ClampedMultiheadAttention.",
    )
    parser.add_argument("--tests", type=Path, required=True, help="torch's folder `test`")
    parser.add_argument("--file", choices=FILES, action="append", help="only this; repeatable")
    options = parser.parse_args()
    tests = options.tests.resolve()
    files = {file: FILES[file] for file in options.file or FILES}
    if missing := [file for file in files if not (tests / file).is_file()]:
        parser.error(f"{tests} has no {', '.join(missing)}: it must be torch's folder `test`")
    version = tests.parent / "version.txt"
    of = f" of torch {version.read_text(encoding='utf-8').strip()}" if version.is_file() else ""
    print(f"torch {torch.__version__}, tests{of}, clamp=None\n", flush=True)
    total, well = Counter(), True
    for file, names in files.items():
        counts, lines, fine = compared(tests, file, names)
        total, well = total + counts, well and fine
        print(f"{file}: {shown(counts)}")
        print("".join(f"  {line}\n" for line in lines), end="", flush=True)
    print(f"\nall: {shown(total)}")
    return 0 if well else 1


def shown(counts: Counter) -> str:
    order = [f"{outcome} with both" for outcome in ("passed", "failed")]
    order.append("failed with ours alone")
    order += [f"{outcome} with both" for outcome in ("skipped", "expected to fail")]
    assert {*counts} <= {*order, "with ours"}
    parts = [f"{counts[name]} {name}" for name in order if counts[name] or name in order[:3]]
    return f"{', '.join(parts)}; {counts['with ours']} made an attention of ours"


if __name__ == "__main__":
    sys.exit(main())
