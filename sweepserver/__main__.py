"""python -m sweepserver          starts the server; prints two exports and its address
python -m sweepserver env      prints the exports of a running one, for `eval "$(python -m sweepserver env)"`
python -m sweepserver link     prints a new one-time login link of a running one
"""

import argparse
import fcntl
import json
import logging
import os
import secrets
import signal
import socket
import sqlite3
import sys
import time
import urllib.request
from pathlib import Path

from cli import OneLineParser
from errors import UserError, reason, run_main

from . import read_ready

_open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open  # a server of ours is behind no proxy


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = OneLineParser(
        "python -m sweepserver", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", nargs="?", default="serve", choices=["serve", "env", "link"])
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default %(default)s)")
    parser.add_argument("--port", type=int, default=8085, help="port; 0 takes a free one (default %(default)s)")
    parser.add_argument(
        "--data-dir",
        type=Path,
        default=Path("sweepserver-data"),
        help="where all of it is kept (default ./%(default)s)",
    )
    parser.add_argument("--entity", default="local", help="name of the user that runs belong to (default %(default)s)")
    parser.add_argument(
        "--retries",
        type=int,
        default=2,
        help="how often the configuration of a crashed run is handed out again (default %(default)s)",
    )
    parser.add_argument(
        "--agent-timeout",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="silence of a run and its agent after which it counts as crashed (default %(default)s)",
    )
    parser.add_argument(
        "--stop-grace",
        type=float,
        default=20.0,
        metavar="SECONDS",
        help="time for a run to stop by itself before SIGTERM (default %(default)s)",
    )
    parser.add_argument("--max-upload-mb", type=int, default=8192, help="largest file taken (default %(default)s)")
    parser.add_argument(
        "--wait",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="env and link: how long to wait for the server to come up",
    )
    args = parser.parse_args(argv)
    if not (
        args.retries >= 0
        and args.agent_timeout > 0
        and args.stop_grace >= 0
        and args.max_upload_mb > 0
        and args.wait >= 0
    ):  # so written, it refuses nan too
        parser.error(
            "--retries, --stop-grace and --wait take 0 or more, --agent-timeout and --max-upload-mb more than 0"
        )
    return args


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    serve(args) if args.command == "serve" else ask(args)


def ask(args: argparse.Namespace) -> None:
    """`env` and `link`: speak to the running server of this data folder."""
    end = time.monotonic() + args.wait
    while (ready := _running(args.data_dir)) is None or not _answers(ready):
        if time.monotonic() >= end:
            raise UserError(
                f"no server runs on --data-dir {args.data_dir}; start one: python -m sweepserver &"
                if ready is None
                else f"the server of --data-dir {args.data_dir} (process {ready['pid']}) runs, but {ready['url']} does "
                f"not answer; try again with --wait 30, or end it (kill {ready['pid']}) and start it anew"
            )
        time.sleep(0.1)
    if args.command == "env":
        print(f"export WANDB_BASE_URL={ready['url']}\nexport WANDB_API_KEY={ready['key']}")
        return
    request = urllib.request.Request(ready["url"] + "/link", method="POST", headers={"Authorization": _basic(ready)})
    with _open(request, timeout=10) as answer:
        print(json.load(answer)["url"])


def serve(args: argparse.Namespace) -> None:
    """Runs until it is told to end."""
    from .runs import check_place
    from .walker import Refused

    try:
        check_place("--entity", args.entity)
    except Refused as refusal:
        raise UserError(str(refusal)) from None
    folder = args.data_dir
    os.umask(0o077)  # what runs logged is for this user alone
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = (folder / "lock").open("a")  # held as long as the process lives
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"--data-dir {folder} is in use by another sweepserver; give this one its own") from None
    except OSError as error:
        raise UserError(f"--data-dir {folder}: cannot write there ({error.strerror})") from None
    listener = _listen(args.host, args.port)
    key = _key(folder)

    import uvicorn

    from .app import LINK, Settings, build
    from .scheduler import Rules

    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.WARNING)
    rules = Rules(args.retries, args.agent_timeout, args.stop_grace)
    try:
        app = build(Settings(folder, key, args.entity, rules, args.max_upload_mb * 2**20))
    except sqlite3.DatabaseError as error:
        damaged = type(error) is sqlite3.DatabaseError  # else it is locked, full, a folder
        state, advice = ("is damaged", "move it away") if damaged else ("cannot be used", "check it")
        raise UserError(
            f"--data-dir {folder}: sweepserver.sqlite {state} ({reason(error)}); {advice} or give another --data-dir"
        ) from None
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"--data-dir {folder}: blobs is no folder; move it away or give another --data-dir") from None
    port = listener.getsockname()[1]
    shown = socket.gethostname() if args.host in ("0.0.0.0", "::", "") else args.host
    url = f"http://{f'[{shown}]' if ':' in shown else shown}:{port}"
    link = f"{url}/login?ticket={app.state.server.new_ticket('login', LINK)}"
    _write_private(folder / "server.json", json.dumps({"url": url, "key": key, "link": link, "pid": os.getpid()}))
    print(
        f"export WANDB_BASE_URL={url}\nexport WANDB_API_KEY={key}\n"
        f"# pages: {link}\n#        (works once; `python -m sweepserver link` prints a new one)",
        flush=True,
    )
    if args.host not in ("127.0.0.1", "localhost", "::1"):
        print("# plain HTTP on a network: the key travels readable; use a tunnel or a trusted network", flush=True)
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        lifespan="on",
        timeout_graceful_shutdown=3,
        timeout_keep_alive=65,
    )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # uvicorn ends in order and then raises it once more
    try:
        uvicorn.Server(config).run(sockets=[listener])
    except KeyboardInterrupt:
        pass
    finally:
        (folder / "server.json").unlink(missing_ok=True)


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(512)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot listen on --host {host} --port {port}: {reason}; --port 0 takes a free port") from None
    return listener


def _key(folder: Path) -> str:
    """This folder's API key, made once and readable by its owner alone."""
    path = folder / "key"
    if not path.exists():
        _write_private(path, secrets.token_hex(20))
    if not path.is_file():
        raise UserError(f"{path} is no file; move it away and a new key is made")
    if path.stat().st_mode & 0o077:
        raise UserError(f"{path} can be read by others: chmod 600 {path}")
    key = path.read_text(encoding="ascii", errors="replace").strip()
    if len(key) < 40 or not (key.isascii() and key.isprintable()):
        raise UserError(f"{path} holds no key of 40 letters; delete it and a new one is made")
    return key


def _write_private(path: Path, text: str) -> None:
    part = path.with_suffix(".part")
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as out:
        out.write(text)
    os.replace(part, path)


def _running(folder: Path) -> dict | None:
    """What the server of this folder says of itself, None where no such process lives."""
    ready = read_ready(folder)
    try:
        if ready is not None:
            os.kill(ready["pid"], 0)  # of a server that was killed, the file is still there
        return ready
    except OSError:
        return None


def _answers(ready: dict) -> bool:
    try:
        with _open(ready["url"] + "/healthz", timeout=2):
            return True
    except OSError:
        return False


def _basic(ready: dict) -> str:
    import base64

    return "Basic " + base64.b64encode(f"api:{ready['key']}".encode()).decode()


if __name__ == "__main__":
    run_main(main)
