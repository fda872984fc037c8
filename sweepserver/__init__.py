"""A small local server that the real, unmodified W&B client talks to: sweeps, runs, files, artifacts, pages.

`python -m sweepserver` starts it; `start()` here starts one as a process of its own, for tests and scripts. README.md
beside this file says what it can do.
"""

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Running:
    """A running server. `env` is what the W&B client needs to find it."""

    url: str
    key: str
    link: str
    pid: int
    process: subprocess.Popen

    @property
    def env(self) -> dict[str, str]:
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": self.key}


def launch(folder: str | Path, *flags: str, port: int = 0, wait: float = 30.0, detached: bool = False) -> Running:
    """Starts `python -m sweepserver` on `folder` and waits until it answers. The caller ends `process`.

    What it says, but for the key, is added to `server.log` in the folder. detached: Ctrl-C at the caller does not end
    it.

    Raises OSError where the folder cannot be written, and RuntimeError with the server's own words where it does not
    come up.
    """
    folder = Path(folder).resolve()
    command = [sys.executable, "-m", "sweepserver", "--data-dir", str(folder), "--port", str(port), *flags]
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    log = folder / "server.log"
    with log.open("a") as out:
        begin = out.tell()
        root = Path(__file__).parent.parent  # `python -m` looks for modules where it is started
        process = subprocess.Popen(command, cwd=root, stdout=subprocess.DEVNULL, stderr=out, start_new_session=detached)
    end = time.monotonic() + wait
    while time.monotonic() < end and process.poll() is None:
        ready = read_ready(folder)
        if ready and ready["pid"] == process.pid:
            return Running(ready["url"], ready["key"], ready["link"], process.pid, process)
        time.sleep(0.05)
    if process.poll() is None:
        process.kill()
    raise RuntimeError(f"sweepserver did not start: {log.read_bytes()[begin:].decode(errors='replace').strip()}")


@contextlib.contextmanager
def start(folder: str | Path, *flags: str, port: int = 0, wait: float = 30.0) -> Iterator[Running]:
    """`launch`, ended with the block."""
    server = launch(folder, *flags, port=port, wait=wait)
    try:
        yield server
    finally:
        server.process.terminate()
        try:
            server.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            server.process.kill()
            server.process.wait()


def read_ready(folder: str | Path) -> dict | None:
    """What a running server says of itself (url, key, link, pid); None where there is none."""
    try:
        ready = json.loads((Path(folder) / "server.json").read_text())
        return ready if ready.keys() >= {"url", "key", "link", "pid"} else None
    except (OSError, ValueError, AttributeError):
        return None
