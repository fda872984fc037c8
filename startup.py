"""What has to be done before the other modules are imported, in a program alone and first of all.

Ctrl-C while they still are imported is one line and exit code 130, as later, when `errors.run_main` has taken over.

OpenMP's threads (libgomp's, which torch computes with) wait for each other in a loop, for some milliseconds, before
they sleep. Beside another program that has one of the cores the one waited for does not run meanwhile: on two cores a
step of training at width 0.35 gave 10 images/s. With 10,000 turns of that loop it gives 95, and with nothing beside
0.98 of the speed. GOMP_SPINCOUNT is read when libgomp is loaded; where the user has set it or OMP_WAIT_POLICY, that
counts.
"""

import os
import signal
from typing import Any

SPINS = "10000"


def leave(*_: Any) -> None:
    os.write(2, b"interrupted\n")
    os._exit(130)


if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else the one who started us has it ignored
    signal.signal(signal.SIGINT, leave)
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
