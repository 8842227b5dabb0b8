"""What torch.load must not see is refused before it, in one line, without time and memory."""

import io
import pickle
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from fastguard.speech.storage import checkpoint, torch_archive
from fastguard.speech.storage.checkpoint import CheckpointError

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def whole(tmp_path):
    path = tmp_path / "whole.pt"
    weights = {"w": torch.arange(1000.0), "half": torch.ones(3, dtype=torch.bfloat16),
               "part": torch.arange(10)[2:5], "empty": torch.empty(0, 4), "n": torch.tensor(3),
               "t": torch.ones(2, 3).T}  # fmt: skip
    checkpoint.save(path, {"model": weights, "config": {}, "tokenizer": {}})
    return path


def rewritten(whole, *, compression=zipfile.ZIP_STORED, pickled=lambda content: content, more=()):
    """The archive, written anew with changes."""
    path = whole.with_name("changed.pt")
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(path, "w", compression) as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, pickled(content) if name.endswith("data.pkl") else content)
        for name, content in more:
            new.writestr(name, content)
    return path


def refused(path, reason):
    with pytest.raises(CheckpointError, match=reason) as caught:
        checkpoint.load(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_what_torch_saves_is_read_as_it_was(whole):
    with whole.open("rb") as file:
        torch_archive.check(file)
    loaded, expected = checkpoint.load(whole)["model"], torch.load(whole)["model"]
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


def test_a_flipped_bit_is_noticed_wherever_it_is(whole):
    content = bytearray(whole.read_bytes())
    place = content.index(torch.arange(1000.0).numpy().tobytes()) + 1234
    content[place] ^= 1
    whole.write_bytes(content)
    refused(whole, "the checksum of .* differs")


def test_a_compressed_bomb_is_not_unpacked(whole):
    zeros = bytes(64 << 20)
    path = rewritten(whole, compression=zipfile.ZIP_DEFLATED, more=[("archive/data/99", zeros)])
    assert path.stat().st_size < 1 << 20
    refused(path, "compressed")


def test_records_that_lie_over_each_other_are_refused(whole):
    """Each of many entries of the directory names the same stored bytes."""
    content = bytearray(rewritten(whole, more=[("archive/x", bytes(1 << 20))]).read_bytes())
    end = content.rindex(b"PK\5\6")
    start = int.from_bytes(content[end + 16 : end + 20], "little")
    entry = bytes(content[content.rindex(b"PK\1\2") : end])
    more = b"".join(entry.replace(b"archive/x", b"archive/%c" % (97 + i)) for i in range(20))
    content[end:end] = more
    end += len(more)
    count = int.from_bytes(content[end + 8 : end + 10], "little") + 20
    content[end + 8 : end + 12] = 2 * count.to_bytes(2, "little")
    content[end + 12 : end + 16] = (end - start).to_bytes(4, "little")
    whole.write_bytes(content)
    refused(whole, "its records claim")


@pytest.mark.parametrize(
    "old, new, reason",
    [
        (b"M\xe8\x03t", b"M\xff\x03t", "does not have the size of its record"),
        (b"M\xe8\x03\x85", b"M\xff\x03\x85", "larger than its record"),
        (rb"M\xe8\x03\x85(q[^q])K\x01\x85", b"J\xff\xff\xff\x7f\x85\\1K\0\x85", "is larger than"),
        (b"FloatStorage", b"LongStorage", "does not have the size of its record"),
        (b"ctorch._utils\n_rebuild_tensor_v2", b"cos\nsystem", "has a os.system"),
        (b"ctorch._utils\n_rebuild_tensor_v2", b"ctorch._utils\n_rebuild_sparse_tensor", "_sparse"),
    ],
)  # fmt: skip
def test_a_tensor_is_dense_and_no_larger_than_its_record(whole, old, new, reason):
    def change(content):
        changed = re.sub(old, new, content, count=1)
        assert changed != content
        return changed

    refused(rewritten(whole, pickled=change), reason)


def test_a_pickle_without_end_is_refused(whole):
    refused(
        rewritten(whole, pickled=lambda content: b"]" * (33 << 20)), "what is not a tensor in it"
    )


@pytest.mark.parametrize(
    "claim",
    [
        b"r" + (1 << 27).to_bytes(4, "little"),  # this value's number in the table of values
        b"B" + (1 << 31).to_bytes(4, "little"),  # bytes that follow
        b"\x96" + (1 << 31).to_bytes(8, "little"),
        b"\x8b" + ((1 << 31) - 1).to_bytes(4, "little"),
    ],
    ids=["memo", "bytes", "bytearray", "integer"],
)
def test_a_number_in_a_pickle_takes_no_memory(whole, claim):
    path = rewritten(whole, pickled=lambda content: b"\x80\x02]" + claim + content[2:])
    command = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from fastguard.speech.storage import checkpoint\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try:\n    checkpoint.load(Path(sys.argv[1]))\n"
        "except checkpoint.CheckpointError as error:\n    print(error, file=sys.stderr)\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", command, path], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 100  # MiB


@pytest.mark.parametrize(
    "content", [b"\x80\x02]" + b"]" * 10_000, b".", b"", b"garbage", pickle.dumps({1: {2}})]
)
def test_a_pickle_that_is_none_is_refused(whole, content):
    refused(rewritten(whole, pickled=lambda _: content), "damaged|it is|it has|lacks")


def test_an_archive_of_something_else_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("a/b", "text")
        archive.writestr("c/data.pkl", "text")
    refused(tmp_path / "a.pt", "not an archive of torch.save")


def test_a_record_that_comes_twice_is_refused(whole):
    with pytest.warns(UserWarning, match="Duplicate name"):
        path = rewritten(whole, more=[("archive/version", "3")])
    refused(path, "two records with the same name")


@pytest.mark.parametrize(
    "key, value, reason",
    [
        ("model", [], "its model is a list"),
        ("model", {"w": 1}, "'w' is 1, not a tensor"),
        ("model", {3: torch.ones(1)}, "3 is a Tensor"),
        ("config", None, "its config is None"),
        ("tokenizer", "abc", "its tokenizer is 'abc'"),
        ("wer", "low", "its wer is 'low'"),
        ("cer", 1, "its cer is 1"),
        ("loss", None, "its loss is None"),
    ],
)
def test_what_a_checkpoint_holds_has_types(tmp_path, key, value, reason):
    state = {"model": {}, "config": {}, "tokenizer": {}, key: value}
    torch.save(state, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", re.escape(reason))


def test_a_value_that_holds_itself_many_times_is_not_printed(tmp_path):
    bomb = []
    for _ in range(60):
        bomb = [bomb, bomb]
    torch.save({"model": {}, "config": bomb, "tokenizer": {}}, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", "its config is a list")


def test_of_what_is_no_file_a_reason_is_given(tmp_path):
    refused(tmp_path, "is a folder")
    refused(tmp_path / "absent.pt", "No such file")
    (tmp_path / "text.pt").write_text("text")
    refused(tmp_path / "text.pt", "not an archive of torch.save")
    buffer = io.BytesIO()
    torch.save({"model": {}}, buffer, _use_new_zipfile_serialization=False)
    (tmp_path / "old.pt").write_bytes(buffer.getvalue())
    refused(tmp_path / "old.pt", "not an archive of torch.save")
