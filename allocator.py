"""glibc's allocator told to keep freed memory: on a CPU large tensors otherwise come from and go back to the kernel.

Every tensor above 128 KiB to 32 MiB (a moving limit) is mapped anew and its pages are zeroed one fault at a time; in a
training step of width 1.0 that is a fifth of the CPU's time. See mallopt(3), M_MMAP_THRESHOLD and M_TRIM_THRESHOLD; the
variables MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_ do the same from outside, and where set they are left alone.
"""

import ctypes
import os
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
LARGE = 2**30


def keep_freed_memory() -> bool:
    """Asks glibc not to give memory back before the process ends; False where there is no glibc or it declines."""
    if not sys.platform.startswith("linux") or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    return all(mallopt(option, LARGE) == 1 for option in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD))
