"""Atomic writes: whole or not there, also under SIGKILL."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import files
from errors import UserError
from files import check_writable, locked, obstacle, same_file, write_atomically, write_between, write_bytes

ROOT = Path(__file__).parent.parent
WRITER = """
import sys
from files import write_bytes
from pathlib import Path
for i in range(10**9):
    write_bytes(Path(sys.argv[1]), bytes([i % 251]) * 3_000_000)
"""


def test_a_write_replaces_the_file_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "new" / "a.bin"
    write_bytes(path, b"one")
    write_bytes(path, b"two")
    assert path.read_bytes() == b"two"
    assert os.listdir(path.parent) == ["a.bin"]
    assert path.stat().st_mode & 0o777 == 0o666 & ~files.current_umask()


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_a_write_that_fails_leaves_the_old_file(tmp_path, error):
    path = tmp_path / "a.bin"
    write_bytes(path, b"old")

    def broken(temporary):
        temporary.write_bytes(b"half")
        raise error

    with pytest.raises(error):
        write_atomically(path, broken)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_kill_9_at_any_moment_leaves_a_whole_file(tmp_path):
    path = tmp_path / "a.bin"
    moments = random.Random(0)
    for _ in range(8):
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], cwd=ROOT)
        while not path.exists():
            time.sleep(0.01)
        time.sleep(0.1 * moments.random() + 0.1)
        process.send_signal(signal.SIGKILL)
        process.wait()
        content = path.read_bytes()
        assert len(content) == 3_000_000 and content == content[:1] * len(content)


def test_what_cannot_be_written_is_said_before_the_work(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "a.bin", tmp_path):
        with pytest.raises(UserError, match="cannot write"):
            check_writable(path)
    with pytest.raises(UserError, match="cannot write"):
        write_bytes(tmp_path / "file" / "a.bin", b"")
    check_writable(tmp_path / "new.bin")
    assert os.listdir(tmp_path) == ["file"]


def test_links_stay_and_what_they_lead_to_is_written(tmp_path):
    (tmp_path / "there").mkdir()
    file, link, loop = tmp_path / "there" / "a.bin", tmp_path / "link", tmp_path / "loop"
    link.symlink_to(file)
    loop.symlink_to(loop)
    for content in (b"one", b"two"):  # the first through a link to nothing
        check_writable(link)
        write_bytes(link, content)
        assert link.is_symlink() and file.read_bytes() == content and os.listdir(file.parent) == ["a.bin"]
    assert same_file(link, file) and not same_file(loop, file)
    for write in (check_writable, lambda path: write_bytes(path, b"")):
        with pytest.raises(UserError, match="cannot write .*loop: Too many levels"):
            write(loop)
    assert loop.is_symlink()


def test_what_is_no_file_is_named_and_not_waited_for(tmp_path):
    pipe, loop = tmp_path / "pipe", tmp_path / "loop"
    os.mkfifo(pipe)
    loop.symlink_to(loop)
    for path in (pipe, Path("/dev/null")):
        with pytest.raises(UserError, match=f"cannot write {path}: it is a device or a pipe"):
            check_writable(path)
    assert obstacle(Path(__file__)) is None and obstacle(pipe) == "is a device or a pipe"
    assert obstacle(tmp_path) == "is a folder" and obstacle(tmp_path / "none") == "does not exist"
    assert obstacle(Path(__file__) / "none") == "does not exist"
    assert "Too many levels" in obstacle(loop) and "too long" in obstacle(tmp_path / ("x" * 300))


def test_two_programs_do_not_write_one_file(tmp_path):
    path = tmp_path / "a.bin"
    (tmp_path / "link").symlink_to(path)
    for _ in range(2):  # the lock ends with the block
        with locked(path, wait=False), locked(tmp_path / "b.bin", wait=True):
            with pytest.raises(UserError, match="another program is writing .*link; wait for it, or choose"):
                with locked(tmp_path / "link", wait=False):
                    pass


@contextlib.contextmanager
def full_disk(largest: int):
    """No file grows beyond `largest` bytes."""
    resource = pytest.importorskip("resource")
    old, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_is_one_line_and_the_old_file_stays(tmp_path):
    path = tmp_path / "a.bin"
    write_bytes(path, b"old")
    with full_disk(1000), pytest.raises(UserError, match="cannot write"):
        write_bytes(path, b"x" * 5000)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_what_a_killed_writer_left_is_removed_once_it_is_old(tmp_path):
    path = tmp_path / "a.bin"
    old, new = (files.new_temporary(path) for _ in range(2))
    os.utime(old, (0, 0))
    check_writable(path)
    assert os.listdir(tmp_path) == [Path(new).name]


def test_only_what_is_between_the_markers_is_replaced(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("# Before\n\n<!-- a -->\nold\n<!-- b -->\n\nAfter\n")
    for content in ("new\n", "newer\n"):
        write_between(path, "<!-- a -->", "<!-- b -->", content)
        assert path.read_text() == f"# Before\n\n<!-- a -->\n\n{content}\n<!-- b -->\n\nAfter\n"
    path.write_text("# Before\n")
    write_between(path, "<!-- a -->", "<!-- b -->", "new\n")
    assert path.read_text() == "# Before\n\n<!-- a -->\n\nnew\n\n<!-- b -->\n"
    path.write_text("<!-- b -->\n<!-- a -->\nmine\n")
    with pytest.raises(UserError, match="has the line '<!-- a -->' but not '<!-- b -->' after it"):
        write_between(path, "<!-- a -->", "<!-- b -->", "new\n")
    assert path.read_text().endswith("mine\n")
