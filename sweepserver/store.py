"""What the server remembers: one SQLite file in WAL mode, one writer at a time, readers that never wait.

Every change is one transaction on disk before its answer leaves, so a `kill -9` loses nothing that a client was told.
Times are seconds since 1970; `config`, `summary`, `params` and `tags` are JSON texts.
"""

import base64
import contextlib
import json
import math
import sqlite3
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

SCHEMA = """
CREATE TABLE IF NOT EXISTS project(id INTEGER PRIMARY KEY, entity TEXT NOT NULL, name TEXT NOT NULL, created REAL,
    UNIQUE(entity, name));
CREATE TABLE IF NOT EXISTS sweep(id TEXT PRIMARY KEY, project INTEGER NOT NULL, config TEXT NOT NULL, state TEXT,
    display_name TEXT, description TEXT, created REAL, updated REAL, cursor INTEGER NOT NULL DEFAULT 0);
CREATE TABLE IF NOT EXISTS agent(id TEXT PRIMARY KEY, sweep TEXT NOT NULL, host TEXT, created REAL, heartbeat REAL,
    state TEXT);
-- One configuration that was handed out. status: out (a run has it), again (to hand out anew), done, failed, lost.
CREATE TABLE IF NOT EXISTS point(id INTEGER PRIMARY KEY, sweep TEXT NOT NULL, idx INTEGER, params TEXT NOT NULL,
    status TEXT NOT NULL, losses INTEGER NOT NULL DEFAULT 0, UNIQUE(sweep, idx));
-- AUTOINCREMENT: ids and signed addresses of what was deleted must not become those of the next one.
CREATE TABLE IF NOT EXISTS run(id INTEGER PRIMARY KEY AUTOINCREMENT, project INTEGER NOT NULL, name TEXT NOT NULL,
    display_name TEXT, state TEXT NOT NULL, config TEXT NOT NULL DEFAULT '{}', summary TEXT NOT NULL DEFAULT '{}',
    sweep TEXT, agent TEXT, point INTEGER, "group" TEXT, job_type TEXT, tags TEXT NOT NULL DEFAULT '[]', notes TEXT,
    description TEXT, host TEXT, program TEXT, "commit" TEXT, created REAL, heartbeat REAL, ended REAL,
    exit_code INTEGER, stop_at REAL, stop_why TEXT, stop_sent INTEGER NOT NULL DEFAULT 0,
    preempting INTEGER NOT NULL DEFAULT 0,
    UNIQUE(project, name));
CREATE INDEX IF NOT EXISTS run_sweep ON run(sweep);
CREATE INDEX IF NOT EXISTS run_agent ON run(agent, state);
CREATE TABLE IF NOT EXISTS line(run INTEGER, stream TEXT, idx INTEGER, step INTEGER, text TEXT,
    PRIMARY KEY(run, stream, idx)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS file(id INTEGER PRIMARY KEY AUTOINCREMENT, owner TEXT NOT NULL, name TEXT NOT NULL,
    blob TEXT, size INTEGER, md5 TEXT, mimetype TEXT, updated REAL, UNIQUE(owner, name));
CREATE INDEX IF NOT EXISTS file_md5 ON file(md5);
CREATE TABLE IF NOT EXISTS collection(id INTEGER PRIMARY KEY AUTOINCREMENT, project INTEGER, name TEXT, type TEXT,
    created REAL, description TEXT, tags TEXT NOT NULL DEFAULT '[]', client_id TEXT, UNIQUE(project, name));
CREATE TABLE IF NOT EXISTS artifact(id INTEGER PRIMARY KEY AUTOINCREMENT, collection INTEGER, version INTEGER,
    state TEXT, digest TEXT, algorithm TEXT, description TEXT, metadata TEXT, run INTEGER, client_id TEXT,
    aliases TEXT NOT NULL DEFAULT '[]', tags TEXT NOT NULL DEFAULT '[]', created REAL, updated REAL,
    incremental INTEGER NOT NULL DEFAULT 0);
CREATE TABLE IF NOT EXISTS alias(collection INTEGER, alias TEXT, artifact INTEGER, PRIMARY KEY(collection, alias));
CREATE TABLE IF NOT EXISTS used(run INTEGER, artifact INTEGER, PRIMARY KEY(run, artifact));
-- A run that logged what was there already, beside the one (artifact.run) that brought it.
CREATE TABLE IF NOT EXISTS logged(run INTEGER, artifact INTEGER, PRIMARY KEY(run, artifact));
CREATE TABLE IF NOT EXISTS ticket(hash TEXT PRIMARY KEY, kind TEXT, expires REAL);
"""


class Store:
    """A connection a thread; `write()` is the only way to change something and holds the one lock."""

    def __init__(self, folder: Path):
        self.path = Path(folder) / "sweepserver.sqlite"
        self._local = threading.local()
        self._lock = threading.RLock()
        self._renew()
        self.read().executescript(SCHEMA)

    def _renew(self) -> None:
        """Gives the tables of an older server's folder their present form, with the rows that they hold."""
        with contextlib.closing(sqlite3.connect(":memory:")) as fresh, self.write() as db:
            fresh.executescript(SCHEMA)
            for name, sql in fresh.execute("SELECT name, sql FROM sqlite_master WHERE type='table'").fetchall():
                if self.value("SELECT sql FROM sqlite_master WHERE name=?", name) in (None, sql):
                    continue
                here, there = (
                    [column[1] for column in known.execute(f'PRAGMA table_info("{name}")')] for known in (db, fresh)
                )
                shared = ", ".join(f'"{column}"' for column in here if column in there)
                db.execute(f'ALTER TABLE "{name}" RENAME TO older')
                db.execute(sql)
                db.execute(f'INSERT INTO "{name}"({shared}) SELECT {shared} FROM older')
                db.execute("DROP TABLE older")

    def read(self) -> sqlite3.Connection:
        connection = getattr(self._local, "connection", None)
        if connection is None:
            connection = sqlite3.connect(self.path, timeout=30, isolation_level=None)
            connection.row_factory = sqlite3.Row
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=NORMAL")
            self._local.connection = connection
        return connection

    @contextlib.contextmanager
    def write(self) -> Iterator[sqlite3.Connection]:
        """One transaction, all or nothing. A `write()` inside another joins it."""
        with self._lock:
            db = self.read()
            if db.in_transaction:
                yield db
                return
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:  # SQLite may have rolled back by itself: a full disk
                    db.execute("ROLLBACK")
                raise

    def one(self, sql: str, *values) -> sqlite3.Row | None:
        return self.read().execute(sql, values).fetchone()

    def all(self, sql: str, *values) -> list[sqlite3.Row]:
        return self.read().execute(sql, values).fetchall()

    def value(self, sql: str, *values):
        row = self.one(sql, *values)
        return row[0] if row else None

    def insert(self, table: str, **columns) -> int:
        names = ", ".join(f'"{name}"' for name in columns)
        marks = ", ".join("?" * len(columns))
        with self.write() as db:
            return db.execute(f'INSERT INTO "{table}"({names}) VALUES({marks})', tuple(columns.values())).lastrowid

    def update(self, table: str, key, **columns) -> None:
        """Sets columns of the row whose `id` is `key`."""
        if columns:
            names = ", ".join(f'"{name}"=?' for name in columns)
            with self.write() as db:
                db.execute(f'UPDATE "{table}" SET {names} WHERE id=?', (*columns.values(), key))


def now() -> float:
    return time.time()


def iso(seconds: float | None) -> str | None:
    """2026-01-31T12:00:00Z, as the client reads times."""
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def opaque(kind: str, key) -> str:
    """The id of a thing as the client sees it: `kind:key` in base64."""
    return base64.b64encode(f"{kind}:{key}".encode()).decode()


def opaque_key(text: str | None) -> int | None:
    """The row's number in an id that `opaque` made, None where it made no such id."""
    try:
        return int(base64.b64decode(text or "").split(b":")[1])
    except (ValueError, IndexError):
        return None


def number(value) -> bool:
    """Whether it is a finite number, within what a float can hold with room for a difference."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def clean(value):
    """The same JSON value with NaN and the infinities as strings: bare ones hang the client."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    if isinstance(value, dict):
        return {key: clean(item) for key, item in value.items()}
    return [clean(item) for item in value] if isinstance(value, list) else value


def clean_text(text: str | None) -> str:
    """`clean` for a JSON text; parses only where there is something to clean."""
    text = text or "{}"
    return json.dumps(clean(json.loads(text))) if "NaN" in text or "Infinity" in text else text


def parsed(text: str | None, default=None):
    """The value of a JSON text from a client, or `default` where it is none."""
    try:
        return json.loads(text) if text else default
    except (TypeError, ValueError, RecursionError):
        return default
