"""Errors that are the user's to mend: one clear line, exit code 2, nothing half written.

Library code raises `UserError` with a sentence that names the flag or file and what was expected; `run_main` is the
one place that turns it into `error: ...` on stderr.
"""

import sys
from collections.abc import Callable


class UserError(Exception):
    """Bad input. The message is one line that says what to do."""


def run_main(main: Callable[[], int | None]) -> None:
    """Runs a command line's `main` and exits: 0, its own code, 2 with one line for a `UserError`, 130 for Ctrl-C."""
    try:
        code = main()
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    sys.exit(code or 0)
