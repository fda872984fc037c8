"""Ctrl-C while a program still imports its modules: one line and exit code 130, as later.

Imported before all others, and only where the program is what runs; `errors.run_main` takes over from here.
"""

import os
import signal
from typing import Any


def leave(*_: Any) -> None:
    os.write(2, b"interrupted\n")
    os._exit(130)


if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else the one who started us has it ignored
    signal.signal(signal.SIGINT, leave)
