"""Errors the user can fix: one clear line, exit code 2, nothing half-written.

Library code raises `UserError` with a sentence that names the flag or file and what was expected; `run_main` is the
one place that turns it into `error: ...` on stderr.
"""

import importlib
import os
import re
import signal
import sys
from collections.abc import Callable
from types import ModuleType
from typing import TextIO


class UserError(Exception):
    """Bad input. The message is one line that says what to do."""


def reason(error: BaseException) -> str:
    """A library error's message for use in ours: its first line, shortened, without terminal escape codes."""
    plain = re.sub(r"\x1b\[[0-9;]*[A-Za-z]|[\x00-\x08\x0e-\x1f\x7f]", "", str(error)).strip()
    return plain.splitlines()[0][:120] if plain else type(error).__name__


def optional_import(package: str, what: str) -> ModuleType:
    """A package that not everybody needs; UserError where it is not installed. what: what needs it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(f"{what} needs the package {package} ({reason(error)}): pip install {package}") from None


def open_streams() -> None:
    """Opens the null device in place of a closed stdin, stdout or stderr (`2>&-`), which is None in Python. Otherwise
    libraries fail, and the next file opened would take the descriptor that C code prints its errors to."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))


def tell(line: str) -> None:
    """Prints a line on stderr; where that fails (a full disk), the exit code alone must tell."""
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        discard(sys.stderr)


def discard(stream: TextIO) -> None:
    """Sends what a stream could not write nowhere: Python would try again at exit and change the exit code."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def run_main(main: Callable[[], int | None]) -> None:
    """Runs a command line's `main` and exits: 0, its own code, 2 with one line for a `UserError` or a file that fails,
    130 for Ctrl-C, 141 silently if the reader of stdout has gone."""
    open_streams()
    if callable(signal.getsignal(signal.SIGINT)):  # unless our parent process set it to ignored
        signal.signal(signal.SIGINT, signal.default_int_handler)  # until here startup.py's
    try:
        code = main()
        print(end="", flush=True)
    except UserError as error:
        tell(f"error: {' '.join(str(error).split())}")
        code = 2
    except KeyboardInterrupt:
        tell("interrupted")
        code = 130
    except BrokenPipeError:
        code = 141
    except OSError as error:
        tell(f"error: {error.filename or 'input or output'}: {error.strerror or reason(error)}")
        code = 2
    try:
        print(end="", flush=True)
    except OSError:
        discard(sys.stdout)
    sys.exit(code or 0)
