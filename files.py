"""Files that are either there and whole, or not there: atomic writes.

A write goes to a temporary file in the same folder, is flushed to the disk, and takes the name in one step
(`os.replace`, POSIX rename). A `kill -9` at any moment leaves the file that was there before. A symbolic link stays a
link: its target is written.
"""

import contextlib
import errno
import fcntl
import glob
import os
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from errors import UserError

STALE_SECONDS = 3600  # no write takes this long: an older temporary file is a leftover


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Calls `write(temporary path)`, then gives what it wrote the name `path`. Makes the folder if it is missing."""
    try:
        end = link_end(path)
        name = new_temporary(end)
        try:
            write(Path(name))
            with open(name, "rb") as file:
                os.fsync(file.fileno())
            os.chmod(name, 0o666 & ~current_umask())  # mkstemp makes private files; ours are ordinary ones
            os.replace(name, end)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)
            raise
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose a writable location") from None


def link_end(path: Path) -> Path:
    """The place that `path` names, links followed. OSError for circular links."""
    end = os.path.realpath(path)
    if os.path.islink(end):
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
    return Path(end)


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
    try:
        end = link_end(path)
        if end.exists() and not end.is_file():
            raise UserError(f"cannot write {path}: it {obstacle(end)}; give the name of a file")
        os.unlink(new_temporary(end))
        for left_over in end.parent.glob(glob.escape(f".{end.name}.") + "????????" + glob.escape(end.suffix)):
            if time.time() - left_over.stat().st_mtime > STALE_SECONDS:
                left_over.unlink()
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose a writable location") from None


def obstacle(path: Path) -> str | None:
    """Why `path` cannot be read as a file ("does not exist", ...); None where it can. Never raises, unlike pathlib's
    is_file and friends, which do in folders without permission."""
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return "does not exist"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if not stat.S_ISREG(mode):
        return "is a folder" if stat.S_ISDIR(mode) else "is a device or a pipe"
    return None if os.access(path, os.R_OK) else f"cannot be read ({os.strerror(errno.EACCES)})"


@contextlib.contextmanager
def locked(path: Path, wait: bool, otherwise: str = "choose another place") -> Iterator[None]:
    """Holds a lock file beside `path`. wait: until another program lets go of it; else UserError where one holds it,
    with `otherwise` as advice. The operating system releases it when the process ends, however it ends."""
    try:
        end = link_end(path)
        end.parent.mkdir(parents=True, exist_ok=True)
        file = open(end.with_name(f".{end.name}.lock"), "w")
    except OSError as error:
        raise UserError(f"cannot write beside {path}: {error.strerror}; choose another place") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise UserError(f"another program is writing {path}; wait for it, or {otherwise}") from None
        except OSError:  # a file system without locks
            pass
        yield


def same_file(one: Path | None, other: Path | None) -> bool:
    """Whether both are given and name one place."""
    return one is not None and other is not None and os.path.realpath(one) == os.path.realpath(other)


def current_umask() -> int:
    """The process's umask (it can only be read by setting it)."""
    umask = os.umask(0o022)
    os.umask(umask)
    return umask


def write_bytes(path: Path, content: bytes) -> None:
    write_atomically(path, lambda temporary: temporary.write_bytes(content))


def write_between(path: Path, begin: str, end: str, content: str) -> None:
    """Puts `content` between the lines `begin` and `end` of a text file; at its end, with them, where it has none.
    UserError where `begin` stands there without `end`: what would be replaced is unknown."""
    old = path.read_text() if path.exists() else ""
    before, found, rest = old.partition(begin)
    if found and end not in rest:
        raise UserError(f"{path} has the line {begin!r} but not {end!r} after it; put it back")
    after = rest.partition(end)[2] if found else "\n"
    if not found and before:
        before = before.rstrip() + "\n\n"
    write_bytes(path, f"{before}{begin}\n\n{content}\n{end}{after}".encode())
