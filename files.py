"""Files that are either there and whole, or not there: atomic writes.

A write goes to a temporary file in the same folder, is flushed to the disk, and takes the name in one step
(`os.replace`, POSIX rename). A `kill -9` at any moment leaves the file that was there before.
"""

import contextlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from errors import UserError


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Calls `write(temporary path)`, then gives what it wrote the name `path`. Makes the folder if it is missing."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose a folder that can be written") from None
    os.close(handle)
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


def current_umask() -> int:
    """The process's umask (it can only be read by setting it)."""
    umask = os.umask(0o022)
    os.umask(umask)
    return umask


def write_bytes(path: Path, content: bytes) -> None:
    write_atomically(path, lambda temporary: temporary.write_bytes(content))
