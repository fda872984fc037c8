"""The root fields that the client asks for, and the nodes below them, as dicts of values and callables.

One `Nodes` is made for a request, because URLs in answers start with the address the client connected to.
"""

import base64
import functools
import json
import logging
import posixpath
import re

from . import store as s
from .artifacts import Artifacts
from .files import NO_FILE, checked_name
from .patterns import holding
from .runs import best, dig, log_line
from .scheduler import LIVE
from .search import parse_sweep
from .walker import Refused

log = logging.getLogger("sweepserver")

# What the client asks before it asks for more. Features: the names of its ServerFeature; any version of it is welcome.
SERVER_INFO = {
    "features": [{"name": "TOTAL_COUNT_IN_FILE_CONNECTION", "isEnabled": True}],
    "cliVersionInfo": {"max_cli_version": "999.0.0"},
    "latestLocalVersionInfo": None,
}
# What is not here, by the fields that ask for it: the client shows the reason.
_NOT_HERE = {
    "linked artifacts and registries are not supported here: log the artifact in the project that uses it":
        "linkArtifact unlinkArtifact updateArtifactPortfolio deleteArtifactPortfolio",
    "users and teams are not supported here: there is one user, --entity of the server":
        "users createUser createTeam createInvite deleteInvite createServiceAccount generateApiKey deleteApiKey",
    "automations and integrations are not supported here":
        "triggers createFilterTrigger updateFilterTrigger deleteTrigger integrations createGenericWebhookIntegration",
}  # fmt: skip


def _refuse(why: str, /, **_):
    raise Refused(why)


NOT_HERE = {name: functools.partial(_refuse, why) for why, names in _NOT_HERE.items() for name in names.split()}


class Nodes:
    def __init__(self, server, base_url: str):
        self.server, self.base = server, base_url.rstrip("/")
        self.store, self.runs, self.files = server.store, server.runs, server.files
        self.scheduler, self.entity_name = server.scheduler, server.entity
        self.artifacts = Artifacts(self.store, self.files, self.runs, self)

    def url(self, path: str) -> str:
        return f"{self.base}/{path}"

    # -- roots ----------------------------------------------------------------------------------------------------

    def roots(self) -> dict:
        a = self.artifacts
        query = {
            "viewer": lambda **_: self.viewer(), "serverInfo": lambda **_: SERVER_INFO,
            "entity": self.entity, "project": self.find_project, "model": self.find_model, "models": self.projects,
            "artifact": a.by_id, "artifactCollection": a.collection_by_id, "clientIDMapping": a.client_id,
            "organization": lambda **_: None, "__type": self.type_,
            "agent": lambda id=None, **_: self.agent(self.store.one("SELECT * FROM agent WHERE id=?", id)),
        }  # fmt: skip
        mutation = {
            "upsertSweep": self.upsert_sweep, "createAgent": self.create_agent, "agentHeartbeat": self.heartbeat,
            "upsertBucket": self.upsert_run, "deleteRun": self.delete_run, "stopRun": self.stop_run,
            "updateRunState": self.update_run_state, "upsertModel": self.upsert_project,
            "createRunFiles": self.create_run_files, "deleteFiles": self.delete_files,
            "markRunFilesUploaded": lambda **_: {"success": True},
            "notifyScriptableRunAlert": self.alert,
            "createArtifact": a.create, "commitArtifact": a.commit, "createArtifactManifest": a.create_manifest,
            "updateArtifactManifest": a.update_manifest, "createArtifactFiles": a.create_files, "useArtifact": a.use,
            "updateArtifact": a.update, "addAliases": a.add_aliases, "deleteAliases": a.delete_aliases,
            "deleteArtifact": a.delete, "updateArtifactSequence": a.update_collection,
            "moveArtifactSequence": a.update_collection, "deleteArtifactSequence": a.delete_collection,
            "createArtifactCollectionTagAssignments": a.tag_collection,
            "deleteArtifactCollectionTagAssignments": a.untag_collection,
        }  # fmt: skip
        return {"query": {**NOT_HERE, **query}, "mutation": {**NOT_HERE, **mutation}}

    def type_(self, name=None, **_) -> dict:
        """Introspection as 0.19 and 0.22 use it: which fields there are. Null would break their Api."""
        fields = {
            "Artifact": ["aliases", "tags", "ttlDurationSeconds", "ttlIsInherited", "historyStep"],
            "Run": ["projectId", "summaryMetrics", "config"],
            "Project": ["internalId", "name"],
            "DeleteFilesInput": ["files", "projectId"],
        }.get(name, [])
        named = [{"name": field, "args": []} for field in fields]
        return {"name": name, "fields": named, "inputFields": named, "enumValues": []}

    def viewer(self) -> dict:
        name = self.entity_name
        return {
            "__typename": "User",
            "id": s.opaque("User", 1),
            "entity": name,
            "username": name,
            "name": name,
            "email": f"{name}@localhost",
            "admin": True,
            "flags": "{}",
            "projects": lambda **k: self.projects(name, **k),
            "deletedAt": None,
            "photoUrl": None,
            "teams": {"edges": [{"node": {"__typename": "Entity", "id": s.opaque("Entity", name), "name": name}}]},
            "apiKeys": {"edges": []},
            "organizations": [],
        }

    def entity(self, name=None, **_) -> dict:
        name = name or self.entity_name
        return {
            "__typename": "Entity",
            "id": s.opaque("Entity", name),
            "name": name,
            "organization": None,
            "isTeam": False,
            "available": True,
            "readOnly": False,
            "user": self.viewer(),
            "members": [],
            "defaultAccess": "PRIVATE",
            "codeSavingEnabled": False,
            "entityType": "user",
            "readOnlyAdmin": False,
            "privateOnly": False,
            "storageBytes": 0,
            "isPaid": False,
            "photoUrl": None,
            "xxhashDigestsEnabled": False,
            "integrations": NOT_HERE["integrations"],
            "projects": lambda **k: self.projects(name, **k),
            "project": lambda name=None, **_k: self.find_project(name, name),
        }

    def find_project(self, name=None, entityName=None, **_) -> dict | None:
        if not name:  # `wandb agent <id>`: the sweep alone says where it belongs
            return {"sweep": lambda sweepName=None, **_k: self.sweep(self.scheduler.sweep(sweepName or ""))}
        return self.project(self.runs.project(entityName or self.entity_name, name))

    def find_model(self, name=None, entityName=None, **_) -> dict:
        entity = entityName or self.entity_name
        known = self.find_project(name or "uncategorized", entity)
        return known or {"id": "", "name": name, "entity": self.entity(entity), "bucket": lambda **_k: None}

    def projects(self, entityName=None, **k) -> dict:
        rows = self.store.all(
            "SELECT * FROM project WHERE entity=? ORDER BY created DESC", entityName or self.entity_name
        )
        return self.connection(rows, self.project, **k)

    # -- nodes ----------------------------------------------------------------------------------------------------

    def connection(self, rows: list, node, first=None, after=None, limit=None, **_) -> dict:
        """A page of rows in the shape of a Relay connection; a cursor is the number of rows before the next."""
        try:
            start = int(base64.b64decode(after or "MA=="))
        except ValueError:
            start = 0
        page = rows[start : start + max(1, min(int(first or limit or 1000), 1000))]
        edges = [
            {"cursor": base64.b64encode(str(start + i + 1).encode()).decode(), "node": node(row)}
            for i, row in enumerate(page)
        ]
        info = {
            "__typename": "PageInfo",
            "hasNextPage": start + len(page) < len(rows),
            "hasPreviousPage": start > 0,
            "startCursor": None,
            "endCursor": edges[-1]["cursor"] if edges else None,
        }
        return {"edges": edges, "pageInfo": info, "totalCount": len(rows)}

    def project(self, project) -> dict | None:
        if project is None:
            return None
        key = project["id"]

        def run(name=None, **_):
            return self.run(self.runs.get(key, name or ""))

        def sweeps():
            return self.store.all("SELECT * FROM sweep WHERE project=? ORDER BY created DESC", key)

        def sweep(sweepName=None, **_):
            row = self.scheduler.sweep(sweepName or "")
            return self.sweep(row) if row and row["project"] == key else None

        return {
            "__typename": "Project", "id": s.opaque("Project", key), "internalId": str(key), "name": project["name"],
            "entityName": project["entity"], "entity": self.entity(project["entity"]), "user": self.viewer(),
            "createdAt": s.iso(project["created"]), "updatedAt": s.iso(project["created"]), "isBenchmark": False,
            "description": None, "access": "PRIVATE", "views": "{}", "readOnly": False, "isPublished": False,
            "runCount": lambda filters=None, **_: len(self.runs.find(key, filters)),
            "runs": lambda filters=None, order=None, **k: self.connection(self.runs.find(key, filters, order),
                                                                          self.run, **k),
            "run": run, "bucket": run, "sweep": sweep, "totalSweeps": lambda **_: len(sweeps()),
            "sweeps": lambda **k: self.connection(sweeps(), self.sweep, **k),
            "triggers": NOT_HERE["triggers"], **self.artifacts.of_project(project),
        }  # fmt: skip

    def run(self, run) -> dict | None:
        if run is None:
            return None
        runs = self.runs
        project = self.store.one("SELECT * FROM project WHERE id=?", run["project"])

        def tail(stream):
            return lambda **_: json.dumps([s.clean_text(text) for text in runs.tail(run, stream)])

        def system(**_):
            row = s.parsed("".join(runs.tail(run, "events")))
            row = row if isinstance(row, dict) else {}
            return json.dumps(s.clean({k: v for k, v in row.items() if k.startswith("system.")}))

        def own_config(keys=None, **_):  # a resume takes a run without it for one that never began
            values = _clients_own(run["config"])
            if values is None:
                return None
            return json.dumps(s.clean({k: v for k, v in values.items() if not keys or k in keys}))

        def lines(stream):
            return lambda samples=None, minStep=None, maxStep=None, **_: runs.history(
                run, stream, samples, minStep, maxStep
            )

        def sampled(specs=(), **_):
            specs = specs if isinstance(specs, list) else [specs]
            return [runs.sampled(run, spec) for spec in (s.parsed(text, {}) for text in specs) if spec]

        return {
            "__typename": "Run", "id": runs.storage_id(run), "name": run["name"], "displayName": run["display_name"],
            "sweepName": run["sweep"], "state": run["state"], "group": run["group"], "groupName": run["group"],
            "jobType": run["job_type"], "commit": run["commit"], "readOnly": False, "host": run["host"],
            "createdAt": s.iso(run["created"]), "heartbeatAt": s.iso(run["heartbeat"]),
            "updatedAt": s.iso(run["heartbeat"]), "description": run["description"], "notes": run["notes"],
            "tags": json.loads(run["tags"]), "user": self.viewer(), "exitcode": run["exit_code"],
            "projectId": str(run["project"]), "project": lambda **_: self.project(project),
            "shouldStop": bool(run["stop_at"]), "stopped": run["state"] == "killed",
            "failed": run["state"] in ("failed", "crashed"), "running": run["state"] in LIVE,
            "config": lambda **_: s.clean_text(run["config"]),
            "summaryMetrics": lambda **_: s.clean_text(run["summary"]),
            "systemMetrics": system, "wandbConfig": own_config,
            "historyLineCount": lambda **_: runs.count(run, "history"),
            "eventsLineCount": lambda **_: runs.count(run, "events"),
            "logLineCount": lambda **_: runs.count(run, "log"),
            "historyTail": tail("history"), "eventsTail": tail("events"),
            "historyKeys": lambda **_: runs.history_keys(run),
            "history": lines("history"), "events": lines("events"), "sampledHistory": sampled,
            "parquetHistory": lambda **_: {"parquetUrls": [], "liveData": []},
            "logLines": lambda **k: self.log_lines(run, **k),
            "fileCount": lambda **_: len(self.files.list(f"run:{run['id']}")),
            "files": lambda **k: self.run_files(run, **k), "runInfo": None,
            "sweep": lambda **_: self.sweep(self.scheduler.sweep(run["sweep"] or "")),
            **self.artifacts.of_run(run),
        }  # fmt: skip

    def run_files(self, run, names=None, pattern=None, **k) -> dict:
        rows = self.files.list(f"run:{run['id']}")
        names = [names] if isinstance(names, str) else names
        names = names and [posixpath.normpath(name) for name in names]  # `./x` was stored as `x`
        if names:
            known = {row["name"]: row for row in rows}
            absent = [
                {**NO_FILE, "name": name, "owner": f"run:{run['id']}", "size": 0} for name in names if name not in known
            ]
            rows = [known[name] for name in names if name in known] + absent
        elif pattern:  # SQL LIKE
            escaped = re.escape(pattern).replace("%", ".*").replace("_", ".")
            found = holding([row["name"] for row in rows], rf"\A{escaped}\Z", "s")
            rows = [row for row in rows if row["name"] in found]
        return self.connection(rows, self.file, **k)

    def file(self, row, name: str | None = None) -> dict:
        download = self.url(self.files.sign("download", id=row["id"]))
        md5 = base64.b64encode(bytes.fromhex(row["md5"])).decode() if row["md5"] else None

        def url(upload=False, **_):
            token = {"owner": row["owner"], "name": row["name"]}
            return self.url(self.files.sign("upload", **token)) if upload else download

        return {
            "__typename": "File",
            "id": s.opaque("File", row["id"]),
            "name": name or row["name"],
            "displayName": name or row["name"],
            "url": url,
            "directUrl": download,
            "sizeBytes": row["size"],
            "mimetype": row["mimetype"],
            "updatedAt": s.iso(row["updated"]),
            "md5": md5,
            "digest": md5,
            "storagePath": None,
        }

    def log_lines(self, run, last=None, **k) -> dict:
        texts = list(enumerate(self.runs.texts(run, "log")))
        return self.connection(texts[-last:] if last else texts, lambda pair: log_line(*pair), **k)

    def sweep(self, sweep) -> dict | None:
        if sweep is None:
            return None
        search = parse_sweep(sweep["config"])

        def runs(**k):
            return self.connection(
                self.store.all("SELECT * FROM run WHERE sweep=? ORDER BY id", sweep["id"]), self.run, **k
            )

        def agents():
            return self.store.all("SELECT * FROM agent WHERE sweep=? ORDER BY created", sweep["id"])

        def best_loss(**_):
            if not search.metric:
                return None
            found = [
                dig(self.runs.summary(row), search.metric)
                for row in self.store.all("SELECT * FROM run WHERE sweep=? AND state='finished'", sweep["id"])
            ]
            place = best(found, search.goal)
            return None if place is None else float(found[place])

        return {
            "__typename": "Sweep", "id": sweep["id"], "name": sweep["id"], "displayName": sweep["display_name"],
            "method": search.method if search else "bayes", "state": sweep["state"], "config": sweep["config"],
            "description": sweep["description"], "createdAt": s.iso(sweep["created"]),
            "updatedAt": s.iso(sweep["updated"] or sweep["created"]), "heartbeatAt": s.iso(sweep["updated"]),
            "bestLoss": best_loss, "runCount": lambda **_: self.store.value("SELECT COUNT(*) FROM run WHERE sweep=?",
                                                                      sweep["id"]),
            "runCountExpected": search and search.size, "earlyStopJobRunning": False, "controller": None,
            "scheduler": None, "controllerRunName": None, "runs": runs,
            "project": lambda **_: self.project(self.store.one("SELECT * FROM project WHERE id=?", sweep["project"])),
            "agents": lambda **k: self.connection(agents(), self.agent, **k),
            "agent": lambda agentName=None, **_: next((self.agent(row) for row in agents() if agentName in (
                row["id"], s.opaque("Agent", row["id"]))), None),
        }  # fmt: skip

    def agent(self, agent) -> dict | None:
        if agent is None:
            return None

        def rows():
            return self.store.all("SELECT * FROM run WHERE agent=? ORDER BY id", agent["id"])

        return {
            "__typename": "Agent",
            "id": agent["id"],
            "name": agent["id"],
            "host": agent["host"],
            "state": agent["state"],
            "createdAt": s.iso(agent["created"]),
            "totalRuns": lambda **_: len(rows()),
            "heartbeatAt": s.iso(agent["heartbeat"]),
            "runs": lambda **k: self.connection(rows(), self.run, **k),
        }

    # -- mutations ------------------------------------------------------------------------------------------------

    def upsert_sweep(self, input: dict, **_) -> dict:
        entity, name = input.get("entityName") or self.entity_name, input.get("projectName") or "uncategorized"
        with self.store.write():  # a sweep that is refused leaves no project behind
            project = self.runs.project(entity, name, create=True)
            sweep_id = self.scheduler.upsert_sweep(project["id"], input)
        return {"sweep": self.sweep(self.scheduler.sweep(sweep_id)), "configValidationWarnings": []}

    def create_agent(self, input: dict, **_) -> dict:
        agent = self.scheduler.create_agent(input["sweep"], input.get("host"))
        return {"agent": self.agent(self.store.one("SELECT * FROM agent WHERE id=?", agent))}

    def heartbeat(self, input: dict, **_) -> dict:
        states = s.parsed(input.get("runState"), {}) or {}
        commands = self.scheduler.heartbeat(input["id"], {name for name, alive in states.items() if alive})
        return {"agent": {"id": input["id"], "__typename": "Agent"}, "commands": json.dumps(commands)}

    def upsert_run(self, input: dict, **_) -> dict:
        entity, name = input.get("entityName") or self.entity_name, input.get("modelName") or "uncategorized"
        sweep = input.get("sweep") and self.scheduler.sweep(input["sweep"])
        if not input.get("id") and not input.get("name"):
            raise Refused("upsertBucket needs a name or an id")
        if (_clients_own(input.get("config")) or {}).get("branch_point"):
            raise Refused("fork_from and resume_from are not supported here: a run goes on with resume, or begins anew")
        if sweep and self.runs.get(sweep["project"], input.get("name") or ""):
            key = sweep["project"]  # the run that an agent was given, whatever project its program names
        else:
            key = self.runs.project(entity, name, create=not input.get("id"))
            key = key and key["id"]
        run, inserted = self.runs.upsert(key, input)
        if run is None:
            raise Refused("run not found")
        return {"bucket": self.run(run), "inserted": inserted}

    def delete_run(self, input: dict, **_) -> dict:
        run = self._run(input["id"])
        for artifact in self.store.all("SELECT * FROM artifact WHERE run=?", run["id"]):
            if input.get("deleteArtifacts"):
                self.artifacts.remove(artifact)
        with self.store.write() as db:
            self.scheduler.forget(run)
            for sql in (
                "DELETE FROM line WHERE run=?",
                "DELETE FROM used WHERE run=?",
                "DELETE FROM logged WHERE run=?",
                "DELETE FROM run WHERE id=?",
                "UPDATE artifact SET run=NULL WHERE run=?",
            ):
                db.execute(sql, (run["id"],))
        self.files.delete(self.files.list(f"run:{run['id']}"))
        return {"clientMutationId": None, "success": True}

    def stop_run(self, input: dict, **_) -> dict:
        run = self._run(input["id"])
        if run["state"] in LIVE:
            self.scheduler.stop(run, "stop")
        return {"success": True, "clientMutationId": None}

    def alert(self, input: dict, **_) -> dict:
        """`run.alert()`: nobody gets a message; the log keeps it."""
        run = "/".join(str(input.get(name)) for name in ("entityName", "projectName", "runName"))
        title, text = (" ".join(str(input.get(name) or "").split()) for name in ("title", "text"))
        log.warning("alert of run %s: %s: %s", run, title, text)
        return {"success": True}

    def update_run_state(self, input: dict, **_) -> dict:
        run, state = self._run(input["id"]), input.get("state")
        allowed = {"pending": ("running", "failed", "crashed", "preempted"), "failed": ("pending", "running")}
        if run["sweep"] or run["state"] not in allowed.get(state, ()):
            raise Refused(f"a run in state {run['state']!r} cannot be set to {state!r}")
        self.store.update("run", run["id"], state=state, ended=s.now() if state == "failed" else None)
        return {"success": True}

    def upsert_project(self, input: dict, **_) -> dict:
        entity, name = input.get("entityName") or self.entity_name, input.get("name")
        if not name:
            raise Refused("upsertModel needs a name")
        inserted = self.runs.project(entity, name) is None
        node = self.project(self.runs.project(entity, name, create=True))
        return {"project": node, "model": node, "inserted": inserted}

    def create_run_files(self, input: dict, **_) -> dict:
        project = self.runs.project(input.get("entityName") or self.entity_name, input.get("projectName") or "")
        run = project and self.runs.get(project["id"], input.get("runName") or "")
        if not run:
            raise Refused("run not found")
        names = input.get("files") or []
        names = [checked_name(name) for name in (names if isinstance(names, list) else [names])]
        files = [
            {"name": name, "uploadUrl": self.url(self.files.sign("upload", owner=f"run:{run['id']}", name=name))}
            for name in names
        ]
        return {"runID": self.runs.storage_id(run), "uploadHeaders": [], "files": files}

    def delete_files(self, input: dict, **_) -> dict:
        keys = [s.opaque_key(key) for key in input.get("files") or []]
        rows = [self.store.one("SELECT * FROM file WHERE id=? AND owner LIKE 'run:%'", key) for key in keys]
        self.files.delete([row for row in rows if row])
        return {"success": True}

    def _run(self, storage_id: str):
        run = self.runs.by_id(storage_id)
        if run is None:
            raise Refused("run not found")
        return run


def _clients_own(config: str | None) -> dict | None:
    """What the client itself keeps in a run's config, None where there is nothing."""
    values = s.parsed(config, {})
    entry = values.get("_wandb") if isinstance(values, dict) else None
    own = entry.get("value") if isinstance(entry, dict) else None
    return own if isinstance(own, dict) else None
