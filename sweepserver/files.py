"""Bytes: blobs with names of their own, reached through signed addresses that expire.

A name that a client gives is only ever a text in SQLite; the file on disk is `blobs/<random>`. So no name can leave
the data folder. An address carries what it allows and until when, signed with HMAC-SHA256 under a secret of this data
folder; it therefore survives a restart of the server, and nothing else can be reached with it.
"""

import base64
import hashlib
import hmac
import json
import mimetypes
import os
import re
import secrets
from collections.abc import AsyncIterator
from pathlib import Path, PurePosixPath

from starlette.concurrency import run_in_threadpool

from .store import Store, now
from .walker import Refused

NO_FILE = {"id": 0, "mimetype": None, "updated": None, "md5": None}  # of the row of a file that is not here
LIFETIME = 6 * 3600  # seconds; a queue of uploads may take its time


class TooLarge(Exception):
    """A body over the limit."""


class Files:
    def __init__(self, store: Store, folder: Path, secret: bytes, limit: int):
        self.store, self.folder, self.secret, self.limit = store, Path(folder), secret, limit
        self.folder.mkdir(exist_ok=True)
        known = {row["blob"] for row in store.all("SELECT blob FROM file")}
        for path in self.folder.iterdir():  # of uploads that a kill cut off, or of a change that was rolled back
            if path.name not in known and re.fullmatch(r"[0-9a-f]{32}(\.part)?", path.name):
                path.unlink(missing_ok=True)

    def sign(self, kind: str, **what) -> str:
        """`upload/<token>` or `download/<token>`: allows just this until it expires."""
        payload = json.dumps({**what, "kind": kind, "until": int(now()) + LIFETIME}).encode()
        return f"{kind}/{_b64(payload)}.{self._mac(payload)}"

    def allowed(self, kind: str, token: str) -> dict | None:
        """What a token allows, None where it is forged, of another kind, or expired."""
        text, _, mac = token.partition(".")
        try:
            payload = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
        except ValueError:
            return None
        if not hmac.compare_digest(self._mac(payload).encode(), mac.encode()):
            return None
        what = json.loads(payload)
        return what if what["kind"] == kind and what["until"] >= now() else None

    async def put(self, owner: str, name: str, chunks: AsyncIterator[bytes], md5: str | None = None) -> bool:
        """Stores a file under `name`, replacing one before it. False where `md5` (hex) was given and differs."""
        blob = secrets.token_hex(16)
        part, digest, size = self.folder / f"{blob}.part", hashlib.md5(usedforsecurity=False), 0
        try:
            with part.open("wb") as out:
                async for chunk in chunks:
                    size += len(chunk)
                    if size > self.limit:
                        raise TooLarge(f"more than {self.limit} bytes")
                    digest.update(chunk)
                    out.write(chunk)
            if md5 and md5 != digest.hexdigest():
                return False
            os.replace(part, self.folder / blob)
        finally:
            part.unlink(missing_ok=True)
        await run_in_threadpool(self._kept, owner, name, blob, size, digest.hexdigest())  # it may wait for the lock
        return True

    def write(self, owner: str, name: str, content: bytes) -> None:
        """`put` of bytes that the server made itself."""
        blob = secrets.token_hex(16)
        (self.folder / blob).write_bytes(content)
        self._kept(owner, name, blob, len(content), hashlib.md5(content, usedforsecurity=False).hexdigest())

    def _kept(self, owner: str, name: str, blob: str, size: int, md5: str) -> None:
        """`record` of bytes that nobody else has: they go where it fails."""
        try:
            self.record(owner, name, blob, size, md5)
        except BaseException:
            self._drop(blob)
            raise

    def record(self, owner: str, name: str, blob: str, size: int, md5: str) -> None:
        kind = mimetypes.guess_type(name)[0] or "application/octet-stream"
        with self.store.write() as db:
            old = self.get(owner, name)
            db.execute(
                "INSERT INTO file(owner, name, blob, size, md5, mimetype, updated) VALUES(?,?,?,?,?,?,?) "
                "ON CONFLICT(owner, name) DO UPDATE SET blob=excluded.blob, size=excluded.size, "
                "md5=excluded.md5, mimetype=excluded.mimetype, updated=excluded.updated",
                (owner, name, blob, size, md5, kind, now()),
            )
        if old and not db.in_transaction:  # a larger change may yet be rolled back; then the next start drops them
            self._drop(old["blob"])

    def get(self, owner: str, name: str):
        return self.store.one("SELECT * FROM file WHERE owner=? AND name=?", owner, name)

    def by_md5(self, md5: str):
        """A stored artifact file with these bytes, whichever artifact brought it."""
        return self.store.one("SELECT * FROM file WHERE md5=? AND owner LIKE 'artifact:%' LIMIT 1", md5)

    def list(self, owner: str) -> list:
        return self.store.all("SELECT * FROM file WHERE owner=? ORDER BY name", owner)

    def delete(self, rows: list) -> None:
        with self.store.write() as db:
            db.executemany("DELETE FROM file WHERE id=?", [(row["id"],) for row in rows])
        for row in rows:
            self._drop(row["blob"])

    def path(self, row) -> Path:
        return self.folder / row["blob"]

    def read(self, row) -> bytes:
        return self.path(row).read_bytes()

    def _drop(self, blob: str) -> None:
        if not self.store.one("SELECT 1 FROM file WHERE blob=?", blob):
            (self.folder / blob).unlink(missing_ok=True)

    def _mac(self, payload: bytes) -> str:
        return _b64(hmac.new(self.secret, payload, hashlib.sha256).digest())


def checked_name(name: str) -> str:
    """A relative path without `..`; anything else is refused, for the sake of who downloads it."""
    parts = PurePosixPath(name.replace("\\", "/")).parts
    if not parts or name.startswith("/") or ".." in parts or "\0" in name or len(name) > 1000:
        raise Refused(f"file name {name!r}: expected a relative path inside the run")
    return name


def hex_md5(text: str | None) -> str | None:
    """The hex form of a base64 MD5, as the client sends it."""
    try:
        return base64.b64decode(text).hex() if text else None
    except ValueError:
        return None


def _b64(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")
