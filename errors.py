"""Errors that are the user's to mend: one clear line, exit code 2, nothing half written.

Library code raises `UserError` with a sentence that names the flag or file and what was expected; `run_main` is the
one place that turns it into `error: ...` on stderr.
"""

import os
import re
import signal
import sys
from collections.abc import Callable


class UserError(Exception):
    """Bad input. The message is one line that says what to do."""


def reason(error: BaseException) -> str:
    """What a library's error says, for a message of ours: its first line, not too long, without a terminal's codes."""
    plain = re.sub(r"\x1b\[[0-9;]*[A-Za-z]|[\x00-\x08\x0e-\x1f\x7f]", "", str(error)).strip()
    return plain.splitlines()[0][:120] if plain else type(error).__name__


def run_main(main: Callable[[], int | None]) -> None:
    """Runs a command line's `main` and exits: 0, its own code, 2 with one line for a `UserError` or a file that fails,
    130 for Ctrl-C, 141 in silence where nobody reads the output any more."""
    if callable(signal.getsignal(signal.SIGINT)):  # not where the one who started us has it ignored
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
    except OSError:  # the rest goes nowhere: Python would try once more at the exit, and fail in many lines
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code or 0)
