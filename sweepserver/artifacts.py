"""Artifacts: collections, versions, aliases, manifests; what the client's artifact operations ask for.

A version is PENDING until CommitArtifact, then gets its number and the alias `latest`. The manifest (a JSON file that
the client uploads) lists its files by MD5, and those are stored once however many versions hold them.
"""

import hashlib
import json
import re
import sqlite3

from .files import NO_FILE, Files, checked_name, hex_md5
from .runs import Runs
from .store import Store, iso, now, opaque, opaque_key, parsed
from .walker import Refused

_VERSION = re.compile(r"v[0-9]+")


class Artifacts:
    """Nodes and mutations. `nodes` is the request's `Nodes` (project, run, connection, url)."""

    def __init__(self, store: Store, files: Files, runs: Runs, nodes):
        self.store, self.files, self.runs, self.nodes = store, files, runs, nodes

    # -- mutations ------------------------------------------------------------------------------------------------

    def create(self, input: dict, **_) -> dict:
        """createArtifact: a PENDING version, or the version of the same content that is there already."""
        if input.get("distributedID"):
            raise Refused("distributed artifacts (upsert_artifact, finish_artifact) are not supported here")
        _check_ttl(input)
        aliases = _alias_names(input.get("aliases"))
        project = self._project(input, create=True)
        names = _listed(input.get("artifactCollectionNames")) or [input.get("artifactCollectionName")]
        if not names[0]:
            raise Refused("createArtifact needs a collection name")
        tags = [t.get("tagName") or t.get("name") for t in _listed(input.get("tags")) if isinstance(t, dict)]
        run = self.runs.get(project["id"], input["runName"]) if input.get("runName") else None
        with self.store.write() as db:
            collection = self._collection(
                project, names[0], input.get("artifactTypeName") or "unspecified", input.get("sequenceClientID")
            )
            same = self.store.one(
                "SELECT * FROM artifact WHERE collection=? AND digest=? AND state='COMMITTED' "
                "AND incremental=0 ORDER BY version DESC LIMIT 1",
                collection["id"],
                input.get("digest"),
            )
            if same:
                self._alias(same, ["latest", *aliases])
                key = same["id"]
                if run:
                    db.execute("INSERT OR IGNORE INTO logged VALUES(?,?)", (run["id"], key))
            else:
                key = self.store.insert(
                    "artifact",
                    collection=collection["id"],
                    state="PENDING",
                    digest=input.get("digest") or "",
                    algorithm=input.get("digestAlgorithm") or "MANIFEST_MD5",
                    description=input.get("description"),
                    metadata=input.get("metadata"),
                    run=run and run["id"],
                    client_id=input.get("clientID"),
                    aliases=json.dumps(aliases),
                    tags=json.dumps([t for t in tags if t]),
                    created=now(),
                    updated=now(),
                )
        return {"artifact": self.node(self._row(key))}

    def commit(self, input: dict, **_) -> dict:
        artifact = self._find(input["artifactID"])
        with self.store.write():
            artifact = self._row(artifact["id"])
            if artifact["state"] == "PENDING":
                last = self.store.value("SELECT MAX(version) FROM artifact WHERE collection=?", artifact["collection"])
                self.store.update(
                    "artifact",
                    artifact["id"],
                    state="COMMITTED",
                    updated=now(),
                    version=0 if last is None else last + 1,
                )
                self._own_files(artifact)
                self._alias(artifact, ["latest", *json.loads(artifact["aliases"])])
        return {"artifact": self.node(self._row(artifact["id"]))}

    def _own_files(self, artifact) -> None:
        """What the client leaves to the server: an incremental version lists what it adds to the latest one, and a
        draft of an earlier version sends nothing for the files that both hold; they must outlive the earlier one."""
        key, manifest = artifact["id"], self._uploaded(artifact)
        contents = manifest.get("contents", {})
        latest = artifact["incremental"] and manifest and self._member({"id": artifact["collection"]}, "latest")
        if latest:
            contents = manifest["contents"] = {**self._contents(latest), **contents}
            self.files.write(f"manifest:{key}", "manifest.json", json.dumps(manifest).encode())
            self.store.update("artifact", key, digest=_digest(contents))
        own = {row["name"] for row in self.files.list(f"artifact:{key}")}
        for name, entry in contents.items():
            known = name not in own and not entry.get("ref") and self.files.by_md5(hex_md5(entry.get("digest")) or "")
            if known:
                self.files.record(f"artifact:{key}", name, known["blob"], known["size"], known["md5"])

    def create_manifest(self, input: dict, **_) -> dict:
        artifact = self._find(input["artifactID"])
        self.store.update("artifact", artifact["id"], incremental=input.get("type") == "INCREMENTAL")
        return {"artifactManifest": self._manifest(artifact["id"])}

    def update_manifest(self, input: dict, **_) -> dict:
        return {"artifactManifest": self._manifest(opaque_key(input["artifactManifestID"]))}

    def create_files(self, input: dict, **_) -> dict:
        edges = []
        for spec in _listed(input.get("artifactFiles")):
            artifact, name = self._find(spec["artifactID"]), checked_name(spec["name"])
            owner, md5 = f"artifact:{artifact['id']}", hex_md5(spec.get("md5"))
            known = md5 and self.files.by_md5(md5)
            if known:  # these bytes are here; only their place in this version is new
                self.files.record(owner, name, known["blob"], known["size"], known["md5"])
            url = None if known else self.nodes.url(self.files.sign("upload", owner=owner, name=name, md5=md5))
            edges.append(
                {
                    "node": {
                        "__typename": "File",
                        "name": name,
                        "displayName": name,
                        "storagePath": f"artifacts/{artifact['id']}/{md5 or name}",
                        "uploadUrl": url,
                        "uploadHeaders": [],
                        "uploadMultipartUrls": None,
                        "artifact": self.node(artifact),
                    }
                }
            )
        return {"files": {"edges": edges}}

    def use(self, input: dict, **_) -> dict:
        artifact = self._find(input["artifactID"])
        project = self._project(input)
        run = project and input.get("runName") and self.runs.get(project["id"], input["runName"])
        if run:
            with self.store.write() as db:
                db.execute("INSERT OR IGNORE INTO used VALUES(?,?)", (run["id"], artifact["id"]))
        return {"artifact": self.node(artifact)}

    def update(self, input: dict, **_) -> dict:
        artifact = self._find(input["artifactID"])
        _check_ttl(input)
        columns = {k: input[k] for k in ("description", "metadata") if input.get(k) is not None}
        with self.store.write() as db:
            self.store.update("artifact", artifact["id"], updated=now(), **columns)
            if input.get("aliases") is not None:
                wanted = _alias_names(input["aliases"])
                db.execute("DELETE FROM alias WHERE artifact=?", (artifact["id"],))
                self._alias(artifact, wanted)
        self._tags("artifact", artifact, input.get("tagsToAdd"), input.get("tagsToDelete"))
        return {"artifact": self.node(self._row(artifact["id"]))}

    def add_aliases(self, input: dict, **_) -> dict:
        self._alias(self._find(input["artifactID"]), _alias_names(input.get("aliases")))
        return {"success": True}

    def delete_aliases(self, input: dict, **_) -> dict:
        artifact = self._find(input["artifactID"])
        with self.store.write() as db:
            for alias in _listed(input.get("aliases")):
                db.execute("DELETE FROM alias WHERE artifact=? AND alias=?", (artifact["id"], alias["alias"]))
        return {"success": True}

    def delete(self, input: dict, **_) -> dict:
        artifact = self._find(input["artifactID"])
        names = self.store.all("SELECT alias FROM alias WHERE artifact=? AND alias<>'latest'", artifact["id"])
        if names and not input.get("deleteAliases"):
            raise Refused("the artifact has aliases: delete it with delete_aliases=True")
        self.remove(artifact)
        return {"artifact": {"id": opaque("Artifact", artifact["id"]), "__typename": "Artifact"}, "success": True}

    def remove(self, artifact) -> None:
        with self.store.write() as db:
            key = artifact["id"]
            latest = db.execute("DELETE FROM alias WHERE artifact=? AND alias='latest'", (key,)).rowcount
            db.execute("DELETE FROM alias WHERE artifact=?", (key,))
            db.execute("DELETE FROM used WHERE artifact=?", (key,))
            db.execute("DELETE FROM logged WHERE artifact=?", (key,))
            db.execute("UPDATE artifact SET state='DELETED' WHERE id=?", (key,))
            last = self.store.one(
                "SELECT * FROM artifact WHERE collection=? AND state='COMMITTED' ORDER BY version DESC LIMIT 1",
                artifact["collection"],
            )
            if last and latest:
                self._alias(last, ["latest"])
        self.files.delete(self.files.list(f"artifact:{key}") + self.files.list(f"manifest:{key}"))

    def update_collection(self, input: dict, **_) -> dict:
        """updateArtifactSequence (name, description) and moveArtifactSequence (type): ArtifactCollection.save()."""
        key = self._find_collection(input["artifactSequenceID"])["id"]
        given = {
            "name": input.get("name"),
            "description": input.get("description"),
            "type": input.get("destinationArtifactTypeName"),
        }
        try:
            self.store.update("collection", key, **{name: v for name, v in given.items() if v is not None})
        except sqlite3.IntegrityError:
            raise Refused(f"the project has an artifact {given['name']!r} already") from None
        return {"artifactCollection": self.collection(self._find_collection(input["artifactSequenceID"]))}

    def delete_collection(self, input: dict, **_) -> dict:
        collection = self._find_collection(input["artifactSequenceID"])
        for artifact in self.store.all("SELECT * FROM artifact WHERE collection=?", collection["id"]):
            self.remove(artifact)
        with self.store.write() as db:
            db.execute("DELETE FROM artifact WHERE collection=?", (collection["id"],))
            db.execute("DELETE FROM collection WHERE id=?", (collection["id"],))
        return {"artifactCollection": {**self.collection(collection), "state": "DELETED"}}

    def tag_collection(self, input: dict, **_) -> dict:
        return {"tags": _tags(self._retagged(input, input.get("tags"), None))}

    def untag_collection(self, input: dict, **_) -> dict:
        return {"success": bool(self._retagged(input, None, input.get("tags")))}

    def _retagged(self, input: dict, added, dropped):
        project = self._project(input)
        collection = project and self._named(project, input["artifactCollectionName"])
        if not collection:
            raise Refused("artifact collection not found")
        self._tags("collection", collection, added, dropped)
        return self._named(project, input["artifactCollectionName"])

    # -- nodes ----------------------------------------------------------------------------------------------------

    def node(self, artifact) -> dict | None:
        if artifact is None:
            return None
        collection = self.store.one("SELECT * FROM collection WHERE id=?", artifact["collection"])
        sequence = self.collection(collection)
        manifest = self._manifest_file(artifact)
        entries = self._read(manifest).get("contents", {})
        manifest = manifest and self._file(manifest)
        run = artifact["run"] and self.store.one("SELECT * FROM run WHERE id=?", artifact["run"])
        return {
            "__typename": "Artifact", "id": opaque("Artifact", artifact["id"]), "artifactSequence": sequence,
            "versionIndex": artifact["version"], "artifactType": self.type(collection["type"]),
            "description": artifact["description"], "metadata": artifact["metadata"], "ttlDurationSeconds": -1,
            "ttlIsInherited": True, "tags": _tags(artifact), "historyStep": None, "state": artifact["state"],
            "size": sum(int(entry.get("size") or 0) for entry in entries.values()), "digest": artifact["digest"],
            "digestAlgorithm": artifact["algorithm"], "commitHash": f"{artifact['id']:020x}",
            "fileCount": len(entries), "createdAt": iso(artifact["created"]), "updatedAt": iso(artifact["updated"]),
            "aliases": lambda **_: [{**alias, "artifactCollection": sequence} for alias in self._aliases(artifact)],
            "currentManifest": manifest and {"__typename": "ArtifactManifest", "id": opaque("Manifest", artifact["id"]),
                                             "digest": manifest["digest"], "file": manifest},
            "createdBy": lambda **_: self.nodes.run(run) if run else None,
            "usedBy": lambda **k: self.nodes.connection(self.store.all(
                "SELECT run.* FROM run JOIN used ON used.run=run.id WHERE used.artifact=?", artifact["id"]),
                self.nodes.run, **k),
            "artifactMemberships": lambda **k: self.nodes.connection([artifact], self.membership, **k),
            "files": lambda **k: self._files(artifact, **k),
            "filesByManifestEntries": lambda entries=(), **k: self._files(
                artifact, [entry.get("name") or entry.get("path") for entry in _listed(entries)], **k),
        }  # fmt: skip

    def membership(self, artifact) -> dict | None:
        if artifact is None:
            return None
        collection = self.store.one("SELECT * FROM collection WHERE id=?", artifact["collection"])
        return {
            "__typename": "ArtifactCollectionMembership",
            "id": opaque("Membership", artifact["id"]),
            "versionIndex": artifact["version"],
            "createdAt": iso(artifact["created"]),
            "aliases": lambda **_: self._aliases(artifact),
            "artifactCollection": self.collection(collection),
            "artifact": lambda **_: self.node(artifact),
            "files": lambda **k: self._files(artifact, **k),
        }

    def collection(self, collection) -> dict | None:
        if collection is None:
            return None
        project = self.store.one("SELECT * FROM project WHERE id=?", collection["project"])
        kind = self.type(collection["type"])
        return {
            "__typename": "ArtifactSequence", "id": opaque("Collection", collection["id"]), "name": collection["name"],
            "description": collection["description"], "createdAt": iso(collection["created"]), "updatedAt": None,
            "project": lambda **_: self.nodes.project(project), "defaultArtifactType": kind, "type": kind,
            "state": "READY", "tags": {"edges": [{"node": tag} for tag in _tags(collection)]},
            "digestAlgorithm": "MANIFEST_MD5",
            "latestArtifact": lambda **_: self.node(self._member(collection, "latest")),
            "aliases": lambda **k: self.nodes.connection(self.store.all(
                "SELECT * FROM alias WHERE collection=?", collection["id"]), _alias_node, **k),
            "artifactMembership": lambda aliasName=None, **_: self.membership(self._member(collection, aliasName)),
            "artifacts": lambda **k: self._versions(collection, **k),
            "artifactMemberships": lambda **k: self.nodes.connection(self._committed(collection), self.membership, **k),
        }  # fmt: skip

    def type(self, name: str) -> dict:
        return {
            "__typename": "ArtifactType",
            "id": opaque("Type", name),
            "name": name,
            "description": None,
            "createdAt": "2026-01-01T00:00:00Z",
        }

    def of_project(self, project) -> dict:
        """The artifact fields of a project's node."""

        def collections(kind=None, **k):
            return self.nodes.connection(self._collections(project, kind), self.collection, **k)

        def one_collection(name=None, kind=None, **_):
            found = self._named(project, name)
            return self.collection(found) if found and kind in (None, found["type"]) else None

        def one_type(name=None, **_):
            if not self._collections(project, name):
                return None
            return {
                **self.type(name),
                "artifactCollections": lambda **k: collections(name, **k),
                "artifactCollection": lambda **k: one_collection(kind=name, **k),
                "artifacts": lambda **k: self.nodes.connection(
                    [a for c in self._collections(project, name) for a in self._committed(c)], self.node, **k
                ),
            }

        def types(**k):
            names = sorted({c["type"] for c in self._collections(project, None)})
            return self.nodes.connection(names, one_type, **k)

        def membership(name="", **_):
            collection, _, alias = name.partition(":")
            found = self._named(project, collection)
            return self.membership(found and self._member(found, alias or "latest"))

        return {
            "artifactCollections": collections,
            "artifactCollection": one_collection,
            "artifactType": one_type,
            "artifactTypes": types,
            "artifactCollectionMembership": membership,
            "artifact": lambda name="", **_: (membership(name) or {"artifact": lambda: None})["artifact"](),
        }

    def of_run(self, run) -> dict:
        """The artifact fields of a run's node."""

        def outputs(**k):
            return self.nodes.connection(self.runs.artifacts(run), self.node, **k)

        def inputs(**k):
            rows = self.store.all(
                "SELECT artifact.* FROM artifact JOIN used ON used.artifact=artifact.id "
                "WHERE used.run=? ORDER BY artifact.id",
                run["id"],
            )
            return self.nodes.connection(rows, self.node, **k)

        return {"outputArtifacts": outputs, "inputArtifacts": inputs}

    def by_id(self, id=None, **_) -> dict | None:
        return self.node(self._find(id, missing_ok=True))

    def collection_by_id(self, id=None, **_) -> dict | None:
        return self.collection(self._find_collection(id, missing_ok=True))

    def client_id(self, clientID=None, **_) -> dict:
        row = self.store.one("SELECT id FROM artifact WHERE client_id=? ORDER BY id DESC LIMIT 1", clientID)
        return {"serverID": row and opaque("Artifact", row["id"])}

    # -- helpers --------------------------------------------------------------------------------------------------

    def _row(self, key: int):
        return self.store.one("SELECT * FROM artifact WHERE id=?", key)

    def _find(self, id: str | None, missing_ok: bool = False, table: str = "artifact"):
        """The row of an id that `opaque()` made."""
        row = self.store.one(f"SELECT * FROM {table} WHERE id=?", opaque_key(id))
        if row is None and not missing_ok:
            raise Refused(f"{table} not found")
        return row

    def _find_collection(self, id: str | None, missing_ok: bool = False):
        return self._find(id, missing_ok, "collection")

    def _project(self, input: dict, create: bool = False):
        """The project of a mutation; `wandb sync` leaves the entity empty."""
        return self.runs.project(input.get("entityName") or self.nodes.entity_name, input["projectName"], create=create)

    def _named(self, project, name: str | None):
        return self.store.one("SELECT * FROM collection WHERE project=? AND name=?", project["id"], name)

    def _collection(self, project, name: str, kind: str, client_id: str | None):
        row = self._named(project, name)
        if row is None:
            self.store.insert(
                "collection", project=project["id"], name=name, type=kind, created=now(), client_id=client_id
            )
            return self._collection(project, name, kind, client_id)
        if row["type"] != kind:
            raise Refused(f"artifact {name!r} is of type {row['type']!r}, not {kind!r}")
        return row

    def _collections(self, project, kind: str | None) -> list:
        rows = self.store.all("SELECT * FROM collection WHERE project=? ORDER BY id", project["id"])
        return [row for row in rows if kind in (None, row["type"])]

    def _committed(self, collection) -> list:
        return self.store.all(
            "SELECT * FROM artifact WHERE collection=? AND state='COMMITTED' ORDER BY version DESC", collection["id"]
        )

    def _versions(self, collection, order=None, filters=None, **k) -> dict:
        wanted = parsed(filters, {}) or {}
        state = wanted.get("state", "COMMITTED")
        rows = self._committed(collection) if state == "COMMITTED" else []
        answer = self.nodes.connection(rows, self.node, **k)
        for edge in answer["edges"]:
            edge["version"] = f"v{edge['node']['versionIndex']}"
        return answer

    def _member(self, collection, alias: str | None):
        """The version of an alias, or of `v3`."""
        if _VERSION.fullmatch(alias or ""):
            return self.store.one(
                "SELECT * FROM artifact WHERE collection=? AND version=? AND state='COMMITTED'",
                collection["id"],
                int(alias[1:]),
            )
        return self.store.one(
            "SELECT artifact.* FROM artifact JOIN alias ON alias.artifact=artifact.id "
            "WHERE alias.collection=? AND alias.alias=?",
            collection["id"],
            alias,
        )

    def _alias(self, artifact, names: list[str]) -> None:
        with self.store.write() as db:
            for name in names:
                db.execute(
                    "INSERT OR REPLACE INTO alias(collection, alias, artifact) VALUES(?,?,?)",
                    (artifact["collection"], name, artifact["id"]),
                )

    def _aliases(self, artifact) -> list[dict]:
        rows = self.store.all("SELECT * FROM alias WHERE artifact=? ORDER BY alias", artifact["id"])
        return [_alias_node(row) for row in rows]

    def _tags(self, table: str, row, added, dropped) -> None:
        names = json.loads(row["tags"]) + [tag["tagName"] for tag in _listed(added)]
        gone = {tag["tagName"] for tag in _listed(dropped)}
        kept = [name for name in dict.fromkeys(names) if name not in gone]
        self.store.update(table, row["id"], tags=json.dumps(kept))

    def _manifest(self, key: int) -> dict:
        token = self.files.sign("upload", owner=f"manifest:{key}", name="manifest.json")
        return {
            "id": opaque("Manifest", key),
            "file": {"id": opaque("File", key), "uploadUrl": self.nodes.url(token), "uploadHeaders": []},
        }

    def _files(self, artifact, names=None, **k) -> dict:
        """The files of a version, from its manifest. References are among them, without bytes of ours: the client
        reads of each where it leads in the manifest, but downloads only what is listed here."""
        found = []
        for name, entry in sorted(self._contents(artifact).items()):
            if names and name not in names:
                continue
            if entry.get("ref"):
                row = {**NO_FILE, "name": name, "owner": "", "size": int(entry.get("size") or 0)}
            else:
                row = self.files.by_md5(hex_md5(entry.get("digest")) or "")
            if row:
                found.append((name, row))
        return self.nodes.connection(found, lambda pair: self._file(pair[1], pair[0]), **k)

    def _manifest_file(self, artifact):
        """The row of the manifest, None before it is there."""
        return self.files.get(f"manifest:{artifact['id']}", "manifest.json")

    def _uploaded(self, artifact) -> dict:
        """The manifest, {} before it is there."""
        return self._read(self._manifest_file(artifact))

    def _read(self, manifest) -> dict:
        return parsed(self.files.read(manifest), {}) if manifest else {}

    def _contents(self, artifact) -> dict[str, dict]:
        """The manifest's entries by name."""
        return self._uploaded(artifact).get("contents", {})

    def _file(self, row, name: str | None = None) -> dict:
        return self.nodes.file(row, name)


def _digest(contents: dict[str, dict]) -> str:
    """A manifest's digest, by the client's definition (ArtifactManifestV1.digest)."""
    lines = "".join(f"{name}:{entry['digest']}\n" for name, entry in sorted(contents.items()))
    return hashlib.md5(f"wandb-artifact-manifest-v1\n{lines}".encode(), usedforsecurity=False).hexdigest()


def _check_ttl(input: dict) -> None:
    if (input.get("ttlDurationSeconds") or 0) > 0:  # below 0: inherited or none, and no project has one
        raise Refused("artifact.ttl is not supported here: an artifact stays until it is deleted")


def _alias_names(given) -> list[str]:
    """The names that are given to a version. `v3` always is the version of that number."""
    names = [alias["alias"] for alias in _listed(given) if alias["alias"]]
    for name in names:
        if _VERSION.fullmatch(name):
            raise Refused(f"alias {name!r}: v and a number is the name of a version; choose another")
    return names


def _listed(value) -> list:
    """A list; the client may send a lone value or null."""
    return value if isinstance(value, list) else ([] if value is None else [value])


def _alias_node(row) -> dict:
    return {
        "__typename": "ArtifactAlias",
        "id": opaque("Alias", f"{row['collection']}:{row['alias']}"),
        "alias": row["alias"],
    }


def _tags(row) -> list[dict]:
    return [{"__typename": "Tag", "id": opaque("Tag", name), "name": name} for name in json.loads(row["tags"])]
