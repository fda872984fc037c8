"""Files that are either there and whole, or not there: atomic writes.

A write goes to a temporary file in the same folder, is flushed to the disk, and takes the name in one step
(`os.replace`, POSIX rename). A `kill -9` at any moment leaves the file that was there before.
"""

import contextlib
import glob
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from errors import UserError

STALE_SECONDS = 3600  # a temporary file older than this belongs to no write that still goes on


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Calls `write(temporary path)`, then gives what it wrote the name `path`. Makes the folder if it is missing."""
    path = Path(path)
    try:
        name = new_temporary(path)
        try:
            write(Path(name))
            with open(name, "rb") as file:
                os.fsync(file.fileno())
            os.chmod(name, 0o666 & ~current_umask())  # mkstemp makes private files; ours are ordinary ones
            os.replace(name, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)
            raise
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose a place that can be written") from None


def new_temporary(path: Path) -> str:
    """The name of a new, empty, hidden file beside `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    return name


def check_writable(path: Path) -> None:
    """UserError if `path` cannot be written; to be called before hours of work whose result goes there.

    Writes nothing under that name. Removes what a killed process left of earlier writes to it.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise UserError(f"cannot write {path}: it is a folder; give the name of a file")
        os.unlink(new_temporary(path))
        for left_over in path.parent.glob(glob.escape(f".{path.name}.") + "????????" + glob.escape(path.suffix)):
            if time.time() - left_over.stat().st_mtime > STALE_SECONDS:
                left_over.unlink()
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose a place that can be written") from None


def same_file(one: Path | None, other: Path | None) -> bool:
    """Whether both are given and name one place."""
    return one is not None and other is not None and Path(one).resolve() == Path(other).resolve()


def current_umask() -> int:
    """The process's umask (it can only be read by setting it)."""
    umask = os.umask(0o022)
    os.umask(umask)
    return umask


def write_bytes(path: Path, content: bytes) -> None:
    write_atomically(path, lambda temporary: temporary.write_bytes(content))


def write_between(path: Path, begin: str, end: str, content: str) -> None:
    """Puts `content` between the lines `begin` and `end` of a text file; at its end, with them, where it has none."""
    old = path.read_text() if path.exists() else ""
    before, found, rest = old.partition(begin)
    after = rest.partition(end)[2] if found else "\n"
    if not found and before:
        before = before.rstrip() + "\n\n"
    write_bytes(path, f"{before}{begin}\n\n{content}\n{end}{after}".encode())
