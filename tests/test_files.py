"""What is read is a regular file of bounded size; what is written is whole, and in its place."""

import json
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from fastguard._io import files


@pytest.fixture
def odd(tmp_path):
    """Files that are no regular ones, by kind."""
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    with socket.socket(socket.AF_UNIX) as listener:
        os.chdir(tmp_path)  # a socket's path is short
        listener.bind("socket")
        yield tmp_path


@pytest.fixture(autouse=True)
def _stay(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("kind", ["fifo", "folder", "loop", "socket", "/dev/zero", "\0b", "absent"])
def test_only_a_regular_file_is_read(odd, kind):
    for read in (files.read_bytes, files.open_regular, files.read_text):
        with pytest.raises(OSError, match=kind[-1]) as caught:
            read(odd / kind, 100)
        assert len(str(caught.value).splitlines()) == 1


def test_a_link_to_a_regular_file_is_read(tmp_path):
    (tmp_path / "real").write_text("text")
    (tmp_path / "link").symlink_to("real")
    assert files.read_text(tmp_path / "link", 4) == "text"


def test_a_file_over_the_limit_is_refused_before_it_is_read(tmp_path):
    with open(tmp_path / "sparse", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(OSError, match="over 100 bytes"):
        files.read_bytes(tmp_path / "sparse", 100)


@pytest.mark.skipif(not os.path.exists("/proc/cpuinfo"), reason="a file that tells no size")
def test_a_file_that_tells_no_size_is_read_up_to_the_limit():
    with pytest.raises(OSError, match="over 100 bytes"):
        files.read_bytes("/proc/cpuinfo", 100)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "1" * 5_000, "{", "\ud800".encode("utf-8", "surrogatepass")]
)
def test_json_that_is_none_is_a_value_error_of_one_line(tmp_path, text):
    (tmp_path / "a.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=r"\A.+\Z"):
        files.read_json(tmp_path / "a.json")


def test_lines_of_json_one_by_one(tmp_path):
    long = "x" * (3 * files.LARGEST_LINE)
    (tmp_path / "a.jsonl").write_text(f'{{"a": 1}}\n\n[1]\n{long}\n{{"a": 2}}\n{{"a"')
    assert list(files.json_lines(tmp_path / "a.jsonl", 1 << 30)) == [
        (1, {"a": 1}, True), (3, None, True), (4, None, True), (5, {"a": 2}, True),
        (6, None, False),
    ]  # fmt: skip


# --- writing --------------------------------------------------------------------------------------


def test_an_output_takes_the_place_of_a_link_and_not_of_what_it_leads_to(tmp_path):
    (tmp_path / "mine").write_text("precious")
    (tmp_path / "out").symlink_to("mine")
    files.write_text(tmp_path / "out", "new")
    assert (tmp_path / "mine").read_text() == "precious"
    assert (tmp_path / "out").read_text() == "new"
    assert not (tmp_path / "out").is_symlink()


@pytest.mark.parametrize("kind", ["fifo", "folder", "socket"])
def test_an_output_takes_the_place_of_nothing_else(odd, kind):
    before = os.lstat(kind)
    with pytest.raises(OSError, match=f"{kind} is a"):
        files.write_text(odd / kind, "new")
    with pytest.raises(OSError, match=f"{kind} is a"):
        files.open_appending(odd / kind)
    assert os.path.samestat(before, os.lstat(kind))
    assert not list(odd.glob("*.tmp"))


def test_what_fails_half_way_leaves_the_old_file_and_no_litter(tmp_path):
    files.write_text(tmp_path / "a", "old")
    with pytest.raises(ZeroDivisionError), files.replacing(tmp_path / "a") as temporary:
        temporary.write_text("half")
        1 / 0  # noqa: B018
    assert os.listdir(tmp_path) == ["a"]
    assert (tmp_path / "a").read_text() == "old"


def test_files_that_look_temporary_are_nobody_elses(tmp_path):
    """A file of the user's under the old temporary name, and a link that waits for one."""
    (tmp_path / "a.tmp").write_text("precious")
    (tmp_path / "a").write_text("old")
    files.write_text(tmp_path / "a", "new")
    files.copy(tmp_path / "a", tmp_path / "b")
    files.link(tmp_path / "a", tmp_path / "c")
    assert sorted(os.listdir(tmp_path)) == ["a", "a.tmp", "b", "c"]
    assert (tmp_path / "a.tmp").read_text() == "precious"


def test_a_name_of_255_bytes_can_be_written(tmp_path):
    files.write_text(tmp_path / ("a" * 255), "text")


def test_an_output_is_made_with_the_permissions_of_the_umask(tmp_path):
    files.write_text(tmp_path / "a", "text")
    (tmp_path / "b").touch()
    assert os.stat("a").st_mode == os.stat("b").st_mode


def test_what_a_killed_process_was_writing_is_found_again(tmp_path):
    code = "import sys, os, pathlib, fastguard._io.files as f\n"
    code += "with f.replacing(pathlib.Path('a')): os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": _root()})
    (tmp_path / "mine.tmp").touch()
    (tmp_path / "fastguard-notes.tmp").touch()
    (tmp_path / "fastguard-0123456789abcdef.tmp").symlink_to("mine.tmp")
    (left,) = files.left_overs(tmp_path)
    assert left.name not in ("mine.tmp", "fastguard-notes.tmp", "fastguard-0123456789abcdef.tmp")


def _root():
    return str(Path(files.__file__).parents[2])


def test_what_the_user_names_is_followed(tmp_path):
    (tmp_path / "link").symlink_to("real")
    files.write_where_told(tmp_path / "link", "text")
    assert (tmp_path / "real").read_text() == "text"
    files.write_where_told(tmp_path / "link", "again")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "again"


def test_a_device_is_written_into_and_stays_one():
    files.write_where_told(os.devnull, "text")
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)


def test_a_pipe_without_a_reader_is_an_error(odd):
    with pytest.raises(OSError, match="fifo"):
        files.write_where_told(odd / "fifo", "text")


def test_a_pipe_is_written_into(odd):
    text = json.dumps(list(range(8_000)))
    with subprocess.Popen(["cat", "fifo"], stdout=subprocess.PIPE, text=True) as reader:
        while True:
            try:
                files.write_where_told(odd / "fifo", text)
            except OSError:  # the reader is not there yet
                continue
            break
        assert reader.stdout.read() == text


def test_appending_makes_a_file_and_goes_on_at_its_end(tmp_path):
    for word in ("one", "two"):
        with files.open_appending(tmp_path / "log") as file:
            file.write(word)
    assert (tmp_path / "log").read_text() == "onetwo"


def test_a_link_is_a_copy_where_there_are_no_links(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("text")

    def refuse(*names):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    files.link(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_text() == "text"
    assert not os.path.samefile("a", "b")


def test_a_folder_of_our_own_naming_is_no_link(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").symlink_to("elsewhere")
    with pytest.raises(files.UnusableFile, match="out is a symbolic link, and a folder is"):
        files.make_folder(tmp_path / "out", named=False)
    files.make_folder(tmp_path / "out", named=True)
    files.make_folder(tmp_path / "new" / "one", named=False)
    assert (tmp_path / "new" / "one").is_dir()
