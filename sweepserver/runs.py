"""Runs: what the client reports (upsert, file stream), and reading it back (history, filters, orders)."""

import itertools
import json
import math
import random
import re
from datetime import UTC, datetime

from .patterns import holding
from .store import Store, clean, clean_text, now, number, opaque, opaque_key, parsed
from .walker import Refused

STREAMS = {"wandb-history.jsonl": "history", "wandb-events.jsonl": "events", "output.log": "log"}
UNREACHABLE = re.compile(r"[/\\#?%:\x00-\x1f]")  # in a name: no address leads to it (W&B refuses them too)
_ADJECTIVES = "amber bold brisk calm clear crisp eager fair fresh gentle keen light lively lucid neat quick quiet warm"
_NOUNS = "aurora brook cedar cloud dune ember fern field harbor lake maple meadow moon pine reef river sky star"


def check_place(what: str, text: str) -> None:
    """Refuses a name of an entity or project that no address can lead to. `what`: what it names, for the message."""
    if not text.strip() or text in (".", "..") or UNREACHABLE.search(text) or len(text) > 128:
        raise Refused(f"{what} {text!r}: expected at most 128 letters without / \\ # ? % : or a line break")


class Runs:
    def __init__(self, store: Store, user: str = "local"):
        """user: whose runs these are."""
        self.store, self.user = store, user
        self._metrics: dict[int, dict[str, tuple[int, list]]] = {}  # run: name: (last line read, values)

    def project(self, entity: str, name: str, create: bool = False):
        """The row of a project, None where there is none (and `create` is false)."""
        row = self.store.one("SELECT * FROM project WHERE entity=? AND name=?", entity, name)
        if row is None and create:
            for what, text in (("entity", entity), ("project", name)):
                check_place(what, text)
            with self.store.write() as db:
                db.execute("INSERT OR IGNORE INTO project(entity, name, created) VALUES(?,?,?)", (entity, name, now()))
            row = self.project(entity, name)
        return row

    def get(self, project: int, name: str):
        return self.store.one("SELECT * FROM run WHERE project=? AND name=?", project, name)

    def by_id(self, storage_id: str):
        """The run of an opaque id that `storage_id()` made."""
        return self.store.one("SELECT * FROM run WHERE id=?", opaque_key(storage_id))

    @staticmethod
    def storage_id(run) -> str:
        return opaque("Run", f"{run['id']}:{run['name']}")

    def create(self, project: int, name: str, **columns) -> int:
        columns.setdefault("display_name", display_name(name))
        return self.store.insert("run", project=project, name=name, created=now(), heartbeat=now(), **columns)

    def upsert(self, project: int | None, given: dict):
        """UpsertBucket in all its shapes; answers (row, inserted). A null never erases."""
        known = {
            "config": "config",
            "summaryMetrics": "summary",
            "displayName": "display_name",
            "notes": "notes",
            "description": "description",
            "groupName": "group",
            "jobType": "job_type",
            "host": "host",
            "jobProgram": "program",
            "commit": "commit",
            "sweep": "sweep",
        }
        columns = {known[key]: value for key, value in given.items() if key in known and value is not None}
        if given.get("tags") is not None:
            columns["tags"] = json.dumps(given["tags"])
        with self.store.write():
            row = self.by_id(given["id"]) if given.get("id") else self.get(project, given["name"])
            if row is None:
                if given.get("id"):
                    return None, False
                columns = {**columns, "state": given.get("state") or "running"}
                key = self.create(project, given["name"], **columns)
                return self.store.one("SELECT * FROM run WHERE id=?", key), True
            by_run = given.get("host") or given.get("jobProgram")
            if by_run and row["state"] == "pending":  # the clock of a run starts when it does; a stop asked of it holds
                columns.update(state="running", heartbeat=now(), created=now())
            elif by_run and row["state"] != "running":  # an ended one resumed (then it has an id), synced or begun anew
                if not given.get("id") and _is_program(given.get("jobProgram")):
                    self._forget_lines(row)
                columns.update(
                    state="running", heartbeat=now(), ended=None, stop_at=None, stop_why=None, stop_sent=0, preempting=0
                )
            if columns.get("display_name") == "":
                del columns["display_name"]
            self.store.update("run", row["id"], **columns)
            return self.store.one("SELECT * FROM run WHERE id=?", row["id"]), False

    def _forget_lines(self, run) -> None:
        with self.store.write() as db:
            db.execute("DELETE FROM line WHERE run=?", (run["id"],))
        self._metrics.pop(run["id"], None)

    def touch(self, run) -> None:
        self.store.update("run", run["id"], heartbeat=now())

    def stream(self, run, files: dict) -> None:
        """The `files` part of a file stream: lines by offset, so that a retry overwrites what it sent before."""
        lines = []
        for name, part in files.items():
            content = part.get("content") or []
            offset = int(part.get("offset") or 0)
            if name == "wandb-summary.json":
                if content and isinstance(parsed(content[-1]), dict):
                    self.store.update("run", run["id"], summary=content[-1])
            elif name in STREAMS:
                stream = STREAMS[name]
                for i, text in enumerate(content):
                    step, text = offset + i, str(text)
                    row = parsed(text, {}) if stream == "history" else {}
                    if isinstance(row, dict):
                        step = row.get("_step", step)
                        text = json.dumps(flat(row)) if any(isinstance(v, dict) for v in row.values()) else text
                    lines.append((run["id"], stream, offset + i, step, text))
        with self.store.write() as db:
            history = self._unsaid(run, [line for line in lines if line[1] == "history"])
            if history and self._goes_back(run, *history[0][2:4]):
                self._rewind(run, *history[0][2:4])
            lines = [line for line in lines if line[1] != "history"] + history
            db.executemany("INSERT OR REPLACE INTO line(run, stream, idx, step, text) VALUES(?,?,?,?,?)", lines)

    def _goes_back(self, run, idx: int, step: int) -> bool:
        """Whether the history's next line, `idx` with this step, is not above its last step."""
        return bool(
            self.store.value(
                "SELECT step>=? FROM line WHERE run=? AND stream='history' AND idx<? ORDER BY idx DESC LIMIT 1",
                step,
                run["id"],
                idx,
            )
        )

    def _unsaid(self, run, lines: list[tuple]) -> list[tuple]:
        """The lines without the first ones that are there already, under lower numbers: `wandb sync` sends anew what
        the run had sent by itself, perhaps less of it."""
        if not lines or not self._goes_back(run, *lines[0][2:4]):
            return lines
        steps = [line[3] for line in lines]
        said = {
            (row["step"], _canonical(row["text"]))
            for row in self.store.all(
                "SELECT step, text FROM line WHERE run=? AND stream='history' AND idx<? AND step BETWEEN ? AND ?",
                run["id"],
                lines[0][2],
                min(steps),
                max(steps),
            )
        }
        return list(itertools.dropwhile(lambda line: (line[3], _canonical(line[4])) in said, lines))

    def _rewind(self, run, idx: int, step: int) -> None:
        """A run that goes back began anew under the same id while it counted as running (a resumed one goes on above
        its last step): what it had said from there on no longer holds."""
        with self.store.write() as db:
            db.execute(
                "DELETE FROM line WHERE run=? AND stream='history' AND idx<? AND step>=?", (run["id"], idx, step)
            )
        self._metrics.pop(run["id"], None)

    # -- reading --------------------------------------------------------------------------------------------------

    def config(self, run) -> dict:
        """Flat config, without W&B's own entries."""
        return {
            name: entry.get("value") if isinstance(entry, dict) and "value" in entry else entry
            for name, entry in parsed(run["config"], {}).items()
            if name not in ("_wandb", "wandb_version")
        }

    def summary(self, run) -> dict:
        return parsed(run["summary"], {})

    def count(self, run, stream: str) -> int:
        """How many lines there ever were: a client that goes on with a run numbers its next one so."""
        return self.store.value("SELECT COALESCE(MAX(idx)+1, 0) FROM line WHERE run=? AND stream=?", run["id"], stream)

    def texts(self, run, stream: str, low: int | None = None, high: int | None = None) -> list[str]:
        """The stored lines in order, those with low <= step < high where asked."""
        sql = "SELECT text FROM line WHERE run=? AND stream=? AND step>=? AND step<? ORDER BY idx"
        values = (-(2**62) if low is None else low, 2**62 if high is None else high)
        return [row["text"] for row in self.store.all(sql, run["id"], stream, *values)]

    def tail(self, run, stream: str) -> list[str]:
        """The last line, [] where there is none."""
        return [
            row["text"]
            for row in self.store.all(
                "SELECT text FROM line WHERE run=? AND stream=? ORDER BY idx DESC LIMIT 1", run["id"], stream
            )
        ]

    def metric(self, run, name: str) -> list:
        """The values that a run logged of one metric, in order. Each line is parsed once: a sweep's search asks for
        all of its runs again and again, under the one lock."""
        known = self._metrics.setdefault(run["id"], {})
        last, values = known.get(name, (-1, []))
        for line in self.store.all(
            "SELECT idx, text FROM line WHERE run=? AND stream='history' AND idx>? ORDER BY idx", run["id"], last
        ):
            last, row = line["idx"], parsed(line["text"])
            if isinstance(row, dict) and name in row:
                values.append(row[name])
        known[name] = last, values
        return values

    def rows(self, run, stream: str, low: int | None = None, high: int | None = None) -> list[dict]:
        return [row for row in (parsed(text) for text in self.texts(run, stream, low, high)) if isinstance(row, dict)]

    def history(self, run, stream: str, samples: int | None, low: int | None, high: int | None) -> list[str]:
        """JSON texts, at most `samples` of them: the next page where steps are given, else evenly spread."""
        texts = self.texts(run, stream, low, high)
        if samples and len(texts) > samples:
            texts = texts[:samples] if high is not None else spread(texts, samples)
        return [clean_text(text) for text in texts]

    def sampled(self, run, spec: dict) -> list[dict]:
        """Rows that hold all of `keys`, those keys alone; minStep and maxStep both inclusive."""
        keys, samples = spec.get("keys") or [], int(spec.get("samples") or 500)
        high = spec.get("maxStep")
        rows = self.rows(run, "history", spec.get("minStep"), None if high is None else int(high) + 1)
        rows = [{key: row[key] for key in keys} if keys else row for row in rows if all(key in row for key in keys)]
        return clean(spread(rows, samples))

    def artifacts(self, run) -> list:
        """The versions that a run logged, with the name and type of their collections."""
        return self.store.all(
            "SELECT a.*, collection.name, collection.type FROM artifact a JOIN collection ON "
            "collection.id=a.collection WHERE a.state='COMMITTED' AND (a.run=? OR a.id IN (SELECT "
            "artifact FROM logged WHERE run=?)) ORDER BY a.id",
            run["id"],
            run["id"],
        )

    def history_keys(self, run) -> dict:
        kinds: dict[str, dict[str, int]] = {}
        latest: dict = {}
        last = -1
        for row in self.rows(run, "history"):
            last = max(last, row.get("_step", last))
            latest.update(row)
            for key, value in row.items():
                kind = "number" if isinstance(value, int | float) else ("string" if isinstance(value, str) else "map")
                counts = kinds.setdefault(key, {})
                counts[kind] = counts.get(kind, 0) + 1
        keys = {
            key: {
                "typeCounts": [{"type": kind, "count": n} for kind, n in counts.items()],
                "previousValue": latest[key],
            }
            for key, counts in kinds.items()
        }
        return {"lastStep": last, "sets": [], "keys": keys}

    def find(self, project: int, filters=None, order: str | None = None) -> list:
        """The runs of a project that pass Mongo-like `filters`, in `order` ("-summary_metrics.acc,+created_at")."""
        rows = self.store.all("SELECT * FROM run WHERE project=?", project)
        if isinstance(filters, str) and filters:
            filters = parsed(filters, filters)  # what is no JSON is refused below
        views = [_View(self, row) for row in rows]
        if filters:
            views = [view for view, passed in zip(views, matches(views, filters), strict=True) if passed]
        views.sort(key=lambda view: view.row["id"])
        for part in reversed((order or "+created_at").split(",")):
            name, descending = part.strip().lstrip("+-"), part.strip().startswith("-")
            keyed = [(sortable(view.get(name)), view) for view in views]
            known = [pair for pair in keyed if pair[0] is not None]
            known.sort(key=lambda pair: pair[0], reverse=descending)
            views = [view for _, view in known] + [view for key, view in keyed if key is None]  # unknown ones last
        return [view.row for view in views]


class _View:
    """One run as filters and orders see it; parses config and summary only when they are asked for."""

    COLUMNS = {"name": "name", "display_name": "display_name", "displayName": "display_name", "state": "state",
               "sweep": "sweep", "group": "group", "job_type": "job_type", "jobType": "job_type", "tags": "tags",
               "created_at": "created", "createdAt": "created", "heartbeat_at": "heartbeat", "updated_at": "heartbeat",
               "heartbeatAt": "heartbeat", "host": "host", "commit": "commit", "notes": "notes",
               "description": "description"}  # fmt: skip

    def __init__(self, runs: Runs, row):
        self.runs, self.row, self._cache = runs, row, {}

    def get(self, name: str):
        """The value of a filter's field, None where the run lacks it."""
        root, _, rest = name.partition(".")
        if root in ("config", "summary_metrics", "summaryMetrics", "summary") and rest:
            if root not in self._cache:
                self._cache[root] = self.runs.config(self.row) if root == "config" else self.runs.summary(self.row)
            shorter = [rest[: at.start()] + rest[at.end() :] for at in re.finditer(r"\.value(?=\.|$)", rest)]
            found = (dig(self._cache[root], path) for path in (rest, *shorter))  # config.opt.value.lr: as it is stored
            return next((value for value in found if value is not None), None)
        if root == "tags":
            return json.loads(self.row["tags"])
        if root in ("username", "user"):
            return self.runs.user
        if root == "entity":
            return self.runs.store.value("SELECT entity FROM project WHERE id=?", self.row["project"])
        if root == "duration":
            return (self.row["ended"] or self.row["heartbeat"]) - self.row["created"]
        return self.row[self.COLUMNS[root]] if root in self.COLUMNS else None


def flat(values: dict, prefix: str = "") -> dict:
    """Nested values under dotted names, as W&B keeps metrics; what has a `_type` (an image, a Table) stays whole."""
    found = {}
    for name, value in values.items():
        nested = isinstance(value, dict) and value and "_type" not in value
        found.update(flat(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value})
    return found


def dig(values, path: str):
    """Flat first ("val/acc", "a.b"), then nested."""
    if not isinstance(values, dict):
        return None
    if path in values:
        return inner(values[path])
    for cut in [i for i, letter in enumerate(path) if letter == "."]:
        if path[:cut] in values:
            return dig(values[path[:cut]], path[cut + 1 :])
    return None


def inner(value):
    """{"max": v} of define_metric(summary="max") is v."""
    if isinstance(value, dict) and len(value) == 1 and next(iter(value)) in ("min", "max", "mean", "last", "best"):
        return next(iter(value.values()))
    return value


def best(values: list, goal: str) -> int | None:
    """The place of the best of a metric's values, None where none of them is a number."""
    known = [i for i, value in enumerate(values) if number(value)]
    pick = max if goal == "maximize" else min
    return pick(known, key=lambda i: values[i]) if known else None


def sortable(value):
    """A key that orders numbers before texts; None for what has no place (missing, NaN)."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, bool | int | float):
        return (0, value, "")
    return None if value in ("NaN", "") else (1, 0, str(value))


def matches(views: list[_View], filters: dict) -> list[bool]:
    """Which of the runs pass. MongoDB's query language, the part that the client uses; all else is refused."""
    if not isinstance(filters, dict):
        raise Refused(f"filters: expected a mapping of names to values, not {str(filters)[:80]!r}")
    passed = [True] * len(views)
    for name, wanted in filters.items():
        if name in ("$and", "$or", "$nor"):
            parts = [matches(views, part) for part in (wanted if isinstance(wanted, list) else [wanted])]
            hits = [(all if name == "$and" else any)(part[i] for part in parts) for i in range(len(views))]
            hits = [not hit for hit in hits] if name == "$nor" else hits
        elif name == "$not":
            hits = [not hit for hit in matches(views, wanted)]
        elif name.startswith("$"):
            raise Refused(f"filters: the operator {name} is not known here")
        else:
            hits = _passes([view.get(name) for view in views], wanted, name)
        passed = [before and hit for before, hit in zip(passed, hits, strict=True)]
    return passed


def _passes(values: list, wanted, name: str) -> list[bool]:
    """Which of the runs' values of the field `name` are as wanted."""
    if not (isinstance(wanted, dict) and any(str(key).startswith("$") for key in wanted)):
        return [_equal(value, wanted) for value in values]
    wanted = dict(wanted)
    options = wanted.pop("$options", "") if "$regex" in wanted else ""  # of the pattern beside it
    passed = [True] * len(values)
    for key, operand in wanted.items():
        if key == "$regex":
            texts = {value for value in values if isinstance(value, str)}
            found = holding(sorted(texts), operand, options)  # of all runs at once: it costs a process
            hits = [isinstance(value, str) and value in found for value in values]
        elif key == "$not":
            hits = [not hit for hit in _passes(values, operand, name)]
        else:
            hits = [_operator(value, key, operand, name) for value in values]
        passed = [before and hit for before, hit in zip(passed, hits, strict=True)]
    return passed


def _operator(value, key: str, operand, name: str) -> bool:
    if key in ("$in", "$nin", "$all") and not isinstance(operand, list):
        raise Refused(f"filters: {key} of {name} takes a list, not {str(operand)[:80]!r}")
    if key == "$eq":
        return _equal(value, operand)
    if key == "$ne":
        return not _equal(value, operand)
    if key in ("$in", "$nin"):
        return any(_equal(value, item) for item in operand) == (key == "$in")
    if key == "$exists":
        return (value is not None) == bool(operand)
    if key == "$all":
        return isinstance(value, list) and all(item in value for item in operand)
    if key in ("$gt", "$gte", "$lt", "$lte"):
        if name.split(".")[0] in ("created_at", "createdAt", "heartbeat_at", "heartbeatAt", "updated_at"):
            operand = _seconds(operand, name)
        left, right = sortable(value), sortable(operand)
        if left is None or right is None or left[0] != right[0]:
            return False
        return {"$gt": left > right, "$gte": left >= right, "$lt": left < right, "$lte": left <= right}[key]
    raise Refused(f"filters: the operator {key} is not known here")


def _equal(value, wanted) -> bool:
    if isinstance(value, list) and not isinstance(wanted, list):
        return wanted in value  # tags
    return value == wanted


def _seconds(text, name: str):
    """Seconds since 1970 of a date in a filter; a number is that already."""
    if not isinstance(text, str):
        return text
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise Refused(f"filters: {name}: {text[:80]!r} is no date such as 2026-01-31 or 2026-01-31T12:00:00Z") from None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _canonical(text: str) -> str:
    """A JSON text with its names in order: the client writes them in any."""
    return json.dumps(parsed(text), sort_keys=True)


def _is_program(name: str | None) -> bool:
    """Whether this is what a run says of its program: `wandb sync` names itself (older ones nothing)."""
    return bool(name) and not name.startswith("-m wandb") and name.rsplit("/", 1)[-1] != "wandb"


def log_line(index: int, text: str) -> dict:
    """A line of output.log: `[ERROR ]TIMESTAMP text`."""
    level = "error" if text.startswith("ERROR ") else None
    stamp, _, line = text.removeprefix("ERROR ").partition(" ")
    if not re.match(r"\d{4}-\d\d-\d\dT", stamp):
        stamp, line = None, text
    return {"number": index, "timestamp": stamp, "level": level, "label": None, "line": line}


def spread(rows: list, samples: int) -> list:
    """At most `samples` of the rows, evenly spread, first and last among them."""
    if len(rows) <= samples:
        return rows
    if samples < 2:
        return rows[-samples:] if samples else []
    return [rows[round(i * (len(rows) - 1) / (samples - 1))] for i in range(samples)]


def display_name(seed: str, rest: str | None = None) -> str:
    """quiet-river-12, or quiet- and `rest`."""
    rng = random.Random(seed)
    return f"{rng.choice(_ADJECTIVES.split())}-{rest or f'{rng.choice(_NOUNS.split())}-{rng.randint(1, 999)}'}"
