"""Makes glibc's allocator keep freed memory; otherwise large CPU tensors are requested from and returned to the kernel
each time.

Every tensor above a moving limit of 128 KiB to 32 MiB is mapped afresh, and its pages are zeroed one fault at a time;
in a training step at width 1.0 this takes a fifth of the CPU time. See mallopt(3), M_MMAP_THRESHOLD and
M_TRIM_THRESHOLD; the variables MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_ do the same from outside; if set, they
are respected.
"""

import ctypes
import os
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
VARIABLES = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")  # other MALLOC_ variables ask for other things
LARGE = 2**30


def keep_freed_memory() -> bool:
    """Asks glibc not to give memory back before the process ends; False where there is no glibc or it declines."""
    if not sys.platform.startswith("linux") or any(name in os.environ for name in VARIABLES):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    return all(mallopt(option, LARGE) == 1 for option in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD))
