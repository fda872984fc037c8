"""Process set-up that must happen before anything else is imported, and only when run as a program. Ctrl-C during the
imports prints one line and exits with code 130, as it does later under `errors.run_main`.

OpenMP threads (libgomp's, which torch uses) spin for a few milliseconds before they sleep. If another program occupies
a core, the thread being waited for may not run meanwhile: on two cores, training at width 0.35 ran at 10 images/s. With
10,000 spins it runs at 95 images/s, and at 0.98 of full speed on an idle machine. GOMP_SPINCOUNT is read when libgomp
is loaded; if the user has set it or OMP_WAIT_POLICY, that takes precedence.

Closed standard streams are opened, before another file takes their place.
"""

import os
import signal
from typing import Any

from errors import open_streams

SPINS = "10000"


def leave(*_: Any) -> None:
    os.write(2, b"interrupted\n")
    os._exit(130)


if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # otherwise our parent process set it to ignored
    signal.signal(signal.SIGINT, leave)
open_streams()
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
