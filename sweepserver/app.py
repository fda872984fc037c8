"""The HTTP side: who may ask, how much a body may hold, and which function answers.

`POST /graphql` and the file stream come with basic auth `api:<key>`; pages with a cookie obtained through a one-time
link or the key itself; uploads and downloads with a signed address. Blocking work runs in threads, so a long read does
not hold up a heartbeat.
"""

import asyncio
import base64
import binascii
import contextlib
import hashlib
import hmac
import json
import logging
import re
import secrets
import sqlite3
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qs, quote

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from . import walker
from .files import Files, TooLarge
from .pages import Pages
from .resolvers import Nodes
from .runs import Runs
from .scheduler import Rules, Scheduler
from .store import Store, clean, now

log = logging.getLogger("sweepserver")
BODY_LIMIT = 64 * 2**20  # bytes of a GraphQL document or a file stream
DRAIN = 4 * 2**20  # bytes of a refused upload that are read and thrown away
SESSION = 30 * 86400  # seconds that a page cookie lasts
LINK = 3600  # seconds that an unused login link lasts
CSP = (
    "default-src 'none'; script-src 'self' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; img-src 'self' data: "
    "blob:; connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)  # plotly's WebGL: eval
HEADERS = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Content-Security-Policy": CSP}
_OPEN = re.compile(
    r"(PUT|POST) /upload/[^/]+|(GET|HEAD) (/download/[^/]+|/static/.*|/login|/healthz)|"
    r"POST (/login|/sdk/.*)"
)

# What parts of another shape than the client's raise: also numbers and values that SQLite has no place for.
_MISSHAPEN = (
    AttributeError,
    TypeError,
    ValueError,
    LookupError,
    OverflowError,
    RecursionError,
    sqlite3.InterfaceError,
    sqlite3.ProgrammingError,
)


@dataclass(frozen=True)
class Settings:
    folder: Path
    key: str
    entity: str = "local"
    rules: Rules = Rules()
    upload_limit: int = 8 * 2**30


class Server:
    """Everything that answers a request; one a process."""

    def __init__(self, settings: Settings):
        self.key, self.entity = settings.key, settings.entity
        self.store = Store(settings.folder)
        self.runs = Runs(self.store, settings.entity)
        secret = hashlib.sha256(b"signed addresses:" + settings.key.encode()).digest()
        self.files = Files(self.store, settings.folder / "blobs", secret, settings.upload_limit)
        self.scheduler = Scheduler(self.store, self.runs, settings.rules)
        self.pages = Pages(self)
        self.cookie = f"sweepserver_{hashlib.sha256(settings.key.encode()).hexdigest()[:8]}"

    # -- who may ask ----------------------------------------------------------------------------------------------

    def has_key(self, request: Request) -> bool:
        kind, _, text = request.headers.get("authorization", "").partition(" ")
        if kind.lower() != "basic":
            return False
        try:
            password = base64.b64decode(text).partition(b":")[2]
        except (binascii.Error, ValueError):
            return False
        return hmac.compare_digest(password, self.key.encode())

    def has_cookie(self, request: Request) -> bool:
        ticket = request.cookies.get(self.cookie)
        return request.method in ("GET", "HEAD") and bool(ticket) and self._ticket(ticket, "session") is not None

    def new_ticket(self, kind: str, seconds: float) -> str:
        ticket = secrets.token_urlsafe(24)
        with self.store.write() as db:
            db.execute("DELETE FROM ticket WHERE expires<?", (now(),))
            db.execute("INSERT INTO ticket VALUES(?,?,?)", (_hash(ticket), kind, now() + seconds))
        return ticket

    def use_ticket(self, ticket: str) -> bool:
        """True once for a login link."""
        with self.store.write() as db:
            known = self._ticket(ticket, "login") is not None
            db.execute("DELETE FROM ticket WHERE hash=?", (_hash(ticket),))
        return known

    def _ticket(self, ticket: str, kind: str):
        return self.store.one("SELECT 1 FROM ticket WHERE hash=? AND kind=? AND expires>=?", _hash(ticket), kind, now())

    def owner(self, text: str) -> str:
        """Whose a file is, in words: `run:7` as entity/project/run."""
        run = text.startswith("run:") and self.store.one("SELECT * FROM run WHERE id=?", text.removeprefix("run:"))
        if not run:
            return text
        project = self.store.one("SELECT * FROM project WHERE id=?", run["project"])
        return f"run {project['entity']}/{project['name']}/{run['name']}"

    # -- what the client asks -------------------------------------------------------------------------------------

    def graphql(self, body: bytes, base_url: str) -> tuple[int, str]:
        """Answers one GraphQL request: (status, JSON). Never 5xx: the client would repeat it for minutes."""
        try:
            query, variables, name = _asked(body)
            return 200, _dumps(walker.execute(query, variables, Nodes(self, base_url).roots(), name))
        except walker.Refused as refusal:
            status, message = refusal.status, str(refusal)
        except RecursionError:
            status, message = 400, "the request is nested too deeply, or one of its fragments holds itself"
        except Exception as error:  # whatever it is
            log.exception("a request could not be answered")
            return 200, _dumps({"errors": [{"message": f"bad request: {type(error).__name__}: {error}"}], "data": None})
        log.warning("a request was refused: %s", message)
        return status, _dumps({"errors": [{"message": message}], "data": None})

    def file_stream(self, entity: str, project: str, name: str, body: bytes) -> tuple[int, dict]:
        try:
            asked = json.loads(body or b"{}")
        except (ValueError, RecursionError):
            return 400, {"error": "the body is no JSON"}
        found = self.runs.project(entity, project)
        run = found and self.runs.get(found["id"], name)
        if not run:
            return 404, {"error": "run not found"}
        try:
            self._streamed(run, asked)
        except _MISSHAPEN as error:
            log.warning("a file stream of run %s/%s/%s was refused: %s", entity, project, name, error)
            return 400, {"error": f"the body is no file stream: {error}"}
        return 200, {"stopped": bool(run["stop_at"]), "exitcode": None, "limits": {}}

    def _streamed(self, run, asked: dict) -> None:
        with self.store.write():
            if run["state"] == "crashed" and "exitcode" not in asked:
                self.scheduler.revive(run)
            self.runs.touch(run)
            self.runs.stream(run, asked.get("files") or {})
            if asked.get("preempting"):
                self.store.update("run", run["id"], preempting=1)
            if asked.get("complete") or asked.get("exitcode") is not None:
                self.scheduler.complete(run, int(asked.get("exitcode") or 0))


def build(settings: Settings) -> Starlette:
    """The application. Its state holds the `Server`."""
    server = Server(settings)

    async def graphql(request: Request) -> Response:
        status, text = await run_in_threadpool(server.graphql, await _body(request), str(request.base_url))
        return Response(text, status, media_type="application/json")

    async def file_stream(request: Request) -> Response:
        path = request.path_params
        status, answer = await run_in_threadpool(
            server.file_stream, path["entity"], path["project"], path["run"], await _body(request)
        )
        return JSONResponse(answer, status)

    async def upload(request: Request) -> Response:
        what = server.files.allowed("upload", request.path_params["token"])
        if what is None:
            return JSONResponse({"error": "this upload address is unknown or has expired"}, 403)
        size = int(request.headers.get("content-length") or 0)
        try:
            if size > server.files.limit:
                drained = 0  # a client that is cut off while it still sends sees a broken pipe, not the 413
                async for chunk in request.stream():
                    drained += len(chunk)
                    if drained > DRAIN:
                        break
                raise TooLarge
            stored = await server.files.put(what["owner"], what["name"], request.stream(), what.get("md5"))
        except TooLarge:  # the client says nothing of it
            owner = await run_in_threadpool(server.owner, what["owner"])
            limit = f"{server.files.limit / 2**20:g} MB that --max-upload-mb allows"
            length = f"{size} bytes are" if size else "content is"
            log.warning("file %s of %s was not taken: its %s more than the %s", what["name"], owner, length, limit)
            return JSONResponse({"error": f"the file is larger than the {limit}"}, 413)
        except (OSError, sqlite3.OperationalError):  # a full disk: a 5xx would only make the client repeat it
            log.exception("a file could not be stored")
            stored = False
        return Response(status_code=200 if stored else 400)

    async def download(request: Request) -> Response:
        what = server.files.allowed("download", request.path_params["token"])
        row = what and server.store.one("SELECT * FROM file WHERE id=?", what["id"])
        return _send(server, row)

    async def artifact_bytes(request: Request) -> Response:  # artifactsV2/.../<md5 in hex>/<name>
        parts = request.path_params["path"].split("/")
        return _send(server, next((row for row in map(server.files.by_md5, reversed(parts)) if row), None))

    async def run_file(request: Request) -> Response:
        path = request.path_params
        run = server.pages.find_run(path["entity"], path["project"], path["run"])
        return _send(server, run and server.files.get(f"run:{run['id']}", path["name"]))

    async def login(request: Request) -> Response:
        if request.method == "POST":
            given = parse_qs((await _body(request, 4096)).decode(errors="replace"))
            known = hmac.compare_digest(given.get("key", [""])[0].strip().encode(), server.key.encode())
            target = given.get("next", ["/"])[0]
        else:
            known = await run_in_threadpool(server.use_ticket, request.query_params.get("ticket", ""))
            target = request.query_params.get("next", "/")
        target = target if target.startswith("/") and not target.startswith(("//", "/\\")) else "/"
        if not known:
            return HTMLResponse(server.pages.login(target, failed=True), 401)
        answer = RedirectResponse(quote(target, safe="/?&=%:"), 303)
        ticket = await run_in_threadpool(server.new_ticket, "session", SESSION)
        answer.set_cookie(server.cookie, ticket, max_age=SESSION, httponly=True, samesite="lax")
        return answer

    async def link(request: Request) -> Response:
        ticket = await run_in_threadpool(server.new_ticket, "login", LINK)
        return JSONResponse({"url": f"{request.base_url}login?ticket={ticket}"})

    async def page(request: Request) -> Response:
        status, content = await run_in_threadpool(server.pages.answer, dict(request.path_params), request.url.path)
        return (
            HTMLResponse(content, status)
            if isinstance(content, str)
            else Response(_dumps(content), status, media_type="application/json")
        )

    async def plotly(_: Request) -> Response:
        return FileResponse(
            server.pages.plotly_js(), media_type="text/javascript", headers={"Cache-Control": "private, max-age=86400"}
        )

    class Guard:
        """Every request is authorised here, but for addresses that carry their own permission."""

        def __init__(self, app):
            self.app = app

        async def __call__(self, scope, receive, send):
            if scope["type"] != "http":
                return await self.app(scope, receive, send)
            request = Request(scope, receive)
            asked = f"{scope['method']} {scope['path']}"  # request.url holds what the client wrote in its Host header
            if not (_OPEN.fullmatch(asked) or server.has_key(request) or server.has_cookie(request)):
                return await _denied(server, request)(scope, receive, send)
            await self.app(scope, receive, send)

    @contextlib.asynccontextmanager
    async def lifespan(_):
        async def watch():
            while True:
                await asyncio.sleep(min(2.0, settings.rules.agent_timeout / 4))
                try:
                    await run_in_threadpool(server.scheduler.check_silent)
                except Exception:  # the watch goes on
                    log.exception("looking for silent runs failed")

        task = asyncio.create_task(watch())
        yield
        task.cancel()

    routes = [
        Route("/graphql", graphql, methods=["POST"]),
        Route("/files/{entity}/{project}/{run}/file_stream", file_stream, methods=["POST"]),
        Route("/files/{entity}/{project}/{run}/{name:path}", run_file),
        Route("/upload/{token}", upload, methods=["PUT", "POST"]),
        Route("/download/{token}", download),
        Route("/artifactsV2/{path:path}", artifact_bytes),
        Route("/artifacts/{path:path}", artifact_bytes),
        Route("/login", login, methods=["GET", "POST"]),
        Route("/link", link, methods=["POST"]),
        # The client's telemetry goes to any server that does not say 404 here, without a key: users saw its 401s.
        Route("/sdk/{path:path}", lambda _: Response(status_code=404), methods=["POST"]),
        Route("/healthz", lambda _: JSONResponse({"ok": True})),
        Route("/static/plotly.min.js", plotly),
        Mount("/static", StaticFiles(directory=Path(__file__).parent / "static")),
        Route("/", page),
        Route("/favicon.ico", lambda _: Response(status_code=204)),
        Route("/{entity}", page),
        Route("/{entity}/{project}", page),
        Route("/{entity}/{project}/{kind:str}", page),
        Route("/{entity}/{project}/{kind:str}/{name}", page),
        Route("/{entity}/{project}/{kind:str}/{name}/{view:path}", page),
    ]
    handlers = {TooLarge: _too_large, ClientDisconnect: _gone}
    app = Starlette(routes=routes, lifespan=lifespan, exception_handlers=handlers)
    app.add_middleware(_Headers)
    app.add_middleware(Guard)
    app.state.server = server
    return app


class _Headers:
    """Adds the security headers to every answer that has none of its own."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        async def with_headers(message):
            if message["type"] == "http.response.start":
                present = {name.lower() for name, _ in message["headers"]}
                extra = [(k.lower().encode(), v.encode()) for k, v in HEADERS.items()]
                message["headers"] = [*message["headers"], *(pair for pair in extra if pair[0] not in present)]
            await send(message)

        await self.app(scope, receive, with_headers)


async def _too_large(_request, error: TooLarge) -> Response:
    return JSONResponse({"error": f"the body is too large: {error}"}, 413)


async def _gone(_request, _error: ClientDisconnect) -> Response:
    """The client ended while it sent: nobody reads this answer, and the log is spared a traceback."""
    return Response(status_code=400)


async def _body(request: Request, limit: int = BODY_LIMIT) -> bytes:
    parts, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit:
            raise TooLarge(f"more than {limit} bytes")
        parts.append(chunk)
    return b"".join(parts)


def _asked(body: bytes) -> tuple[str, dict, str]:
    """The document, variables and operation name that a GraphQL request holds."""
    try:
        asked = json.loads(body)
        variables = asked.get("variables") or {}
        variables = json.loads(variables) if isinstance(variables, str) else variables
        if isinstance(asked["query"], str) and isinstance(variables, dict):
            return asked["query"], variables, asked.get("operationName") or ""
    except (ValueError, AttributeError, KeyError):
        pass
    raise walker.Refused('the body is no GraphQL request: expected {"query": "...", "variables": {...}} in JSON', 400)


def _send(server: Server, row) -> Response:
    """A stored file. Images and plain text show in the browser, all else is saved, and none of it may run."""
    if not row or not server.files.path(row).exists():
        return JSONResponse({"error": "file not found"}, 404)
    kind, name = row["mimetype"], row["name"].rsplit("/", 1)[-1]
    shown = kind in ("image/png", "image/jpeg", "image/gif", "image/webp", "application/json") or kind == "text/plain"
    if not shown and (kind.startswith("text/") or name.endswith((".yaml", ".yml", ".log", ".patch", ".jsonl"))):
        kind, shown = "text/plain", not kind.startswith("text/html")
    disposition = f"{'inline' if shown else 'attachment'}; filename*=UTF-8''{quote(name)}"
    return FileResponse(
        server.files.path(row),
        media_type=kind if shown else "application/octet-stream",
        headers={"Content-Disposition": disposition, "Content-Security-Policy": "sandbox"},
    )


def _denied(server: Server, request: Request) -> Response:
    if request.method == "GET" and "text/html" in request.headers.get("accept", ""):
        return HTMLResponse(server.pages.login(request.scope["path"]), 401, headers=HEADERS)
    message = "wrong or missing API key: set WANDB_API_KEY to the one that sweepserver printed"
    return JSONResponse(
        {"errors": [{"message": message}], "error": message},
        401,
        headers={"WWW-Authenticate": 'Basic realm="sweepserver"'},
    )


def _dumps(value) -> str:
    try:
        return json.dumps(value, allow_nan=False)
    except ValueError:
        return json.dumps(clean(value))


def _hash(ticket: str) -> str:
    return hashlib.sha256(ticket.encode()).hexdigest()
