"""Programs end with one line and an exit code: nobody reads their output, the disk is full, Ctrl-C at any moment."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from errors import reason

SAYS = "from errors import run_main\nrun_main(lambda: print('x' * 100_000))"
READS = "from errors import run_main\nrun_main(lambda: open('no file here').read())"
IMPORTS = "import startup, signal\nsignal.raise_signal(signal.SIGINT)\nprint(1)"
RUNS = "import startup, signal\nfrom errors import run_main\nrun_main(lambda: signal.raise_signal(signal.SIGINT))"


def closed_pipe() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


@pytest.mark.parametrize(
    ("program", "output", "code", "says"),
    [
        (SAYS, closed_pipe, 141, ""),
        (SAYS, lambda: os.open("/dev/full", os.O_WRONLY), 2, "error: input or output: No space left on device\n"),
        (READS, lambda: subprocess.DEVNULL, 2, "error: no file here: No such file or directory\n"),
        (IMPORTS, lambda: subprocess.DEVNULL, 130, "interrupted\n"),
        (RUNS, lambda: subprocess.DEVNULL, 130, "interrupted\n"),
    ],
)
def test_a_program_ends_with_one_line_at_most(program, output, code, says):
    if program is SAYS and says and not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job hands on that it is ignored
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, stdout=output(), stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (code, says)


BAR = "from errors import UserError, run_main\nfrom tqdm import tqdm\ndef main():\n    list(tqdm([1]))\n"
FAILS = BAR + "    raise UserError('no')\nrun_main(main)"


@pytest.mark.parametrize(
    ("program", "redirection", "code"),
    [(BAR + "run_main(main)", "2>&-", 0), (FAILS, "2>&-", 2), (FAILS, ">&- 2>&- <&-", 2), (FAILS, "2>/dev/full", 2)],
)
def test_a_program_runs_without_streams_and_ends_with_its_code(program, redirection, code):
    if "full" in redirection and not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    command = ["sh", "-c", f'exec "$0" "$@" {redirection}', sys.executable, "-c", program]
    assert subprocess.run(command, cwd=ROOT).returncode == code


def test_a_closed_stream_keeps_its_descriptor_from_files():
    code = "import startup, os, sys; sys.exit(open(os.devnull).fileno() != 3)"
    command = ["sh", "-c", 'exec "$0" "$@" 2>&- 3>&-', sys.executable, "-c", code]
    assert subprocess.run(command, cwd=ROOT).returncode == 0


def test_a_librarys_message_is_one_plain_line():
    assert reason(ValueError("\n\x1b[1mbad\x1b[0m news\x07\nand more")) == "bad news"
    assert reason(ValueError()) == "ValueError" and len(reason(ValueError("x" * 999))) == 120


@pytest.mark.parametrize(
    "given, spins",
    [({}, "10000"), ({"GOMP_SPINCOUNT": "5"}, "5"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None")],
)
def test_threads_wait_shortly_unless_the_user_says_otherwise(given, spins):
    env = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    code = "import startup, os; print(os.environ.get('GOMP_SPINCOUNT'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env | given, capture_output=True, text=True)
    assert done.stdout.strip() == spins
