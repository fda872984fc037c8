"""Freed memory is kept: counted in page faults, in a process of its own."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

COUNT = """
import ctypes, resource, sys
from allocator import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    block = ctypes.c_void_p(libc.malloc(40_000_000))
    libc.memset(block, 1, 40_000_000)
    libc.free(block)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator is Linux's")
def test_a_second_block_takes_no_page_faults():
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}

    def faults(mode: str, **extra: str) -> int:
        run = subprocess.run(
            [sys.executable, "-c", COUNT, mode], cwd=ROOT, env={**clean, **extra}, capture_output=True, text=True
        )
        if "AssertionError" in run.stderr and not extra:
            pytest.skip("this C library has no mallopt that keeps memory")
        return int(run.stdout) if run.returncode == 0 else -1

    assert faults("keep") < 0.2 * faults("plain")
    assert faults("keep", MALLOC_ARENA_MAX="2") < 0.2 * faults("plain")
    assert faults("keep", MALLOC_TRIM_THRESHOLD_="131072") == -1  # what the user has set stands
