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


def run_main(main: Callable[[], int | None]) -> None:
    """Runs a command line's `main` and exits: 0, its own code, 2 with one line for a `UserError` or a file that fails,
    130 for Ctrl-C, 141 silently if the reader of stdout has gone."""
    if callable(signal.getsignal(signal.SIGINT)):  # unless our parent process set it to ignored
        signal.signal(signal.SIGINT, signal.default_int_handler)  # until here startup.py's
    try:
        code = main()
        print(end="", flush=True)
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    except BrokenPipeError:
        code = 141
    except OSError as error:
        print(f"error: {error.filename or 'input or output'}: {error.strerror or reason(error)}", file=sys.stderr)
        code = 2
    try:
        print(end="", flush=True)
    except OSError:  # discard the rest: Python would try to flush again at exit and print a traceback
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code or 0)
