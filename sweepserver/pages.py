"""The pages at the addresses that the client prints: projects, a project, a sweep, a run.

Templates escape everything that came from a run. A sweep's and a run's page fetch `…/data` (the same templates' parts
and the figures as JSON) and again every few seconds while there is something to wait for.
"""

import importlib.util
import json
import re
import time
from pathlib import Path
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, select_autoescape

from . import figures
from .runs import best, dig, flat, inner, log_line, spread
from .scheduler import LIVE
from .search import parse_sweep
from .store import clean, iso, number

LOG_LINES = 1000
CURVES = 30
ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b\][^\x07]*\x07")


class Pages:
    def __init__(self, server):
        self.server, self.store, self.runs = server, server.store, server.runs
        self.drawn: dict[str, tuple[int, dict]] = {}
        self.templates = Environment(
            loader=FileSystemLoader(Path(__file__).parent / "templates"),
            autoescape=select_autoescape(default=True, default_for_string=True),
        )
        self.templates.filters.update(value=show, ago=ago, duration=duration, seg=lambda t: quote(str(t), safe=""))
        self.templates.globals.update(iso=iso, now=time.time)

    def answer(self, path: dict, address: str) -> tuple[int, str | dict]:
        """(status, HTML) of a page, or (status, dict) of its data."""
        entity, project = path.get("entity"), path.get("project")
        kind, name, view = path.get("kind"), path.get("name"), path.get("view")
        if project is None:
            return 200, self._home(entity)
        row = self.runs.project(entity, project)
        if row is None:
            return self._missing(f"There is no project {entity}/{project} here.")
        if name is None or kind not in ("sweeps", "runs"):
            return 200, self._project(row)
        if kind == "sweeps":
            sweep = self.server.scheduler.sweep(name)
            if sweep is None or sweep["project"] != row["id"]:
                return self._missing(f"There is no sweep {name} in {entity}/{project}.")
            return 200, self._sweep_data(row, sweep) if view == "data" else self._sweep(row, sweep)
        run = self.runs.get(row["id"], name)
        if run is None:
            return self._missing(f"There is no run {name} in {entity}/{project}.")
        return 200, self._run_data(run) if view == "data" else self._run(row, run)

    def find_run(self, entity: str, project: str, name: str):
        row = self.runs.project(entity, project)
        return row and self.runs.get(row["id"], name)

    def login(self, target: str, failed: bool = False) -> str:
        return self._render("login.html", target=target, failed=failed, trail=[])

    @staticmethod
    def plotly_js() -> Path:
        """plotly.min.js of the installed plotly package (found without importing it)."""
        return Path(importlib.util.find_spec("plotly").origin).parent / "package_data" / "plotly.min.js"

    # -- pages ----------------------------------------------------------------------------------------------------

    def _home(self, entity: str | None) -> str:
        rows = self.store.all(
            "SELECT p.*, (SELECT COUNT(*) FROM run WHERE project=p.id) AS runs, "
            "(SELECT COUNT(*) FROM sweep WHERE project=p.id) AS sweeps, "
            "(SELECT MAX(heartbeat) FROM run WHERE project=p.id) AS last FROM project p "
            "ORDER BY COALESCE(last, created) DESC"
        )
        rows = [row for row in rows if entity in (None, row["entity"])]
        return self._render("home.html", projects=rows, entity=self.server.entity, trail=[])

    def _project(self, project) -> str:
        sweeps = [
            {"row": row, "counts": self.server.scheduler.counts(row), "name": self._sweep_name(row)}
            for row in self.store.all("SELECT * FROM sweep WHERE project=? ORDER BY created DESC", project["id"])
        ]
        runs = self.store.all("SELECT * FROM run WHERE project=? ORDER BY id DESC LIMIT 500", project["id"])
        return self._render("project.html", project=project, sweeps=sweeps, runs=runs, trail=_trail(project))

    def _sweep(self, project, sweep) -> str:
        data = self._sweep_view(project, sweep)
        return self._render("sweep.html", **data, trail=[*_trail(project), ("sweep " + data["name"], None)])

    def _sweep_data(self, project, sweep) -> dict:
        view = self._sweep_view(project, sweep)
        metric, goal = view["metric"], view["goal"]
        rows = [
            {
                "name": run["name"],
                "params": run["params"],
                "config": self.runs.config(run["row"]),
                "values": {key: value for key, value in run["summary"].items() if number(value)},
            }
            for run in view["runs"]
            if run["state"] == "finished"
        ]
        live = sweep["state"] in ("PENDING", "RUNNING", "PAUSED") or any(r["state"] in LIVE for r in view["runs"])
        return {
            "live": live,
            "figures": self._figures(sweep["id"], rows, metric, goal),
            "parts": {
                "status": self._render("_sweep_status.html", **view),
                "runs": self._render("_sweep_runs.html", **view),
            },
        }

    def _figures(self, sweep_id: str, rows: list[dict], metric: str | None, goal: str) -> dict:
        """The sweep's figures, drawn anew only when its finished runs changed: a page asks every 3 s."""
        key = hash(json.dumps([rows, metric, goal], sort_keys=True, default=str))
        if self.drawn.get(sweep_id, (None,))[0] != key:
            self.drawn[sweep_id] = (key, figures.draw(rows, metric, goal))
        return self.drawn[sweep_id][1]

    def _sweep_view(self, project, sweep) -> dict:
        search = parse_sweep(sweep["config"])
        metric, goal = search.metric, search.goal
        runs = []
        for row in self.store.all(
            "SELECT run.*, agent.host AS agent_host FROM run LEFT JOIN agent ON "
            "agent.id=run.agent WHERE run.sweep=? ORDER BY run.id",
            sweep["id"],
        ):
            config = self.runs.config(row)
            params = flat({name: config.get(name) for name in search.parameters})
            logged = self.runs.summary(row)
            summary = {k: inner(v) for k, v in logged.items()}
            if metric:  # one that is nested has a name with dots
                summary[metric] = dig(logged, metric)
            runs.append(
                {
                    "row": row,
                    "name": row["name"],
                    "state": row["state"],
                    "params": params,
                    "summary": summary,
                    "seconds": _seconds(row),
                }
            )
        metric = metric or _guess_metric(runs)
        counts = self.server.scheduler.counts(sweep)
        columns = _summary_columns(runs, metric)
        best = self._best(runs, metric, goal)
        fixed, names = {}, sorted({name for run in runs for name in run["params"]})
        for name in list(names):
            values = {str(run["params"].get(name)) for run in runs}
            if len(values) == 1 and len(runs) > 1:
                fixed[name] = next(iter(values))
                names.remove(name)
        return {
            "project": project,
            "sweep": sweep,
            "name": self._sweep_name(sweep),
            "metric": metric,
            "goal": goal,
            "method": search.method,
            "runs": runs,
            "counts": counts,
            "params": names,
            "fixed": fixed,
            "columns": columns,
            "best": best,
            "left": self._time_left(sweep, counts, runs),
            "agents": self.store.value(
                "SELECT COUNT(*) FROM agent WHERE sweep=? AND state='RUNNING' AND heartbeat>?",
                sweep["id"],
                time.time() - 30,
            ),
            "base": _trail(project)[0][1],
            "path": f"{_trail(project)[0][1]}/sweeps/{sweep['id']}",
        }

    def _run(self, project, run) -> str:
        trail = _trail(project)
        if run["sweep"]:
            trail.append(("sweep " + run["sweep"], f"{trail[0][1]}/sweeps/{run['sweep']}"))
        others = self.store.all("SELECT * FROM run WHERE point=? AND id<>? ORDER BY id", run["point"] or -1, run["id"])
        return self._render(
            "run.html",
            project=project,
            run=run,
            config=sorted(flat(self.runs.config(run)).items()),
            others=others,
            **self._run_view(run),
            trail=[*trail, (run["display_name"] or run["name"], None)],
        )

    def _run_data(self, run) -> dict:
        rows = self.runs.rows(run, "history")
        names = sorted({k for row in rows for k, v in row.items() if not k.startswith("_") and number(v)})
        drawn = {}
        for name in names[:CURVES]:
            points = [(row.get("_step", i), row[name]) for i, row in enumerate(rows) if number(row.get(name))]
            points = spread(points, 1000)
            drawn[name] = figures.curve(figures.short(name), [p[0] for p in points], [p[1] for p in points])
        view = self._run_view(run)
        return {
            "live": run["state"] in LIVE,
            "curves": drawn,
            "left_out": len(names) - len(drawn),
            "parts": {
                name: self._render(f"_run_{name}.html", run=run, **view)
                for name in ("status", "summary", "log", "files")
            },
        }

    def _run_view(self, run) -> dict:
        lines = self.store.all(
            "SELECT text FROM line WHERE run=? AND stream='log' ORDER BY idx DESC LIMIT ?", run["id"], LOG_LINES
        )
        log = [log_line(0, row["text"]) for row in reversed(lines)]
        for line in log:
            line["line"] = ANSI.sub("", line["line"]).rstrip("\n").rpartition("\r")[2]
        project = self.store.one("SELECT * FROM project WHERE id=?", run["project"])
        base = f"/files/{quote(project['entity'], safe='')}/{quote(project['name'], safe='')}/{quote(run['name'])}"
        summary = [(k, inner(v)) for k, v in sorted(self.runs.summary(run).items()) if k != "_wandb"]
        return {
            "summary": [(k, v) for k, v in summary if not k.startswith("_")],
            "log": log,
            "hidden_lines": max(0, self.runs.count(run, "log") - LOG_LINES),
            "seconds": _seconds(run),
            "files": self.server.files.list(f"run:{run['id']}"),
            "files_base": base,
            "artifacts": self.runs.artifacts(run),
        }

    # -- helpers --------------------------------------------------------------------------------------------------

    def _render(self, template: str, **values) -> str:
        return self.templates.get_template(template).render(**values)

    def _missing(self, message: str) -> tuple[int, str]:
        return 404, self._render("missing.html", message=message, trail=[])

    def _sweep_name(self, sweep) -> str:
        return sweep["display_name"] or str(parse_sweep(sweep["config"]).config.get("name") or sweep["id"])

    @staticmethod
    def _best(runs: list[dict], metric: str | None, goal: str):
        finished = [run for run in runs if run["state"] == "finished"]
        place = best([run["summary"].get(metric) for run in finished], goal)
        return None if place is None else finished[place]

    @staticmethod
    def _time_left(sweep, counts: dict, runs: list[dict]) -> float | None:
        """Seconds: what is left, at the mean time of a finished run, shared by the runs that go on now."""
        done = [run["seconds"] for run in runs if run["state"] == "finished"]
        going = [run["seconds"] for run in runs if run["state"] == "running"]
        if sweep["state"] != "RUNNING" or counts["waiting"] is None or not done or not going:
            return None
        mean = sum(done) / len(done)
        rest = counts["waiting"] * mean + sum(max(0.0, mean - seconds) for seconds in going)
        return rest / len(going)


def _trail(project) -> list[tuple[str, str]]:
    return [
        (
            f"{project['entity']}/{project['name']}",
            f"/{quote(project['entity'], safe='')}/{quote(project['name'], safe='')}",
        )
    ]


def _seconds(run) -> float:
    end = run["ended"] or (time.time() if run["state"] in LIVE else run["heartbeat"])
    return max(0.0, end - run["created"])


def _summary_columns(runs: list[dict], metric: str | None, most: int = 7) -> list[str]:
    """The numeric summary keys that the table shows: the metric, then known ones and those that vary."""
    known = [
        "acc_drop",
        "model_size_mb",
        "compression_ratio_model",
        "compression_ratio_weights",
        "compression_ratio_activations",
        "calib_seconds",
        "eval_seconds",
    ]
    keys = {key for run in runs for key, value in run["summary"].items() if not key.startswith("_") and number(value)}
    kinds = {key: len({str(run["summary"].get(key)) for run in runs}) for key in keys}  # str: it may be a dict
    keys = {key for key in keys if key != metric and (key in known or kinds[key] > 1)}
    ranked = sorted(keys, key=lambda key: (known.index(key) if key in known else len(known), key))
    return ([metric] if metric else []) + ranked[: most - 1]


def _guess_metric(runs: list[dict]) -> str | None:
    keys = {key for run in runs for key, value in run["summary"].items() if not key.startswith("_") and number(value)}
    liked = [k for k in ("test_acc_quantized", "val_acc", "accuracy", "acc", "val_loss", "loss") if k in keys]
    return (liked or sorted(keys) or [None])[0]


def show(value) -> str:
    """A value for people: numbers with five digits, the rest as JSON."""
    if isinstance(value, bool) or value is None:
        return "–" if value is None else str(value).lower()
    if isinstance(value, float):
        return f"{value:.5g}".replace("nan", "NaN")
    if isinstance(value, str | int):
        return str(value)
    if isinstance(value, dict) and "_type" in value:  # a Table, an image, a histogram
        size = f" {value['nrows']} × {value['ncols']}" if "nrows" in value and "ncols" in value else ""
        return f"{value['_type']}{size}"
    text = json.dumps(clean(value), default=str)
    return text if len(text) < 400 else text[:400] + " …"


def ago(seconds: float | None) -> str:
    return "–" if seconds is None else f"{duration(time.time() - seconds)} ago"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    seconds = int(seconds + 0.5)
    if seconds < 90:
        return f"{seconds} s"
    minutes, hours = seconds // 60, seconds // 3600
    if minutes < 90:
        return f"{minutes} min"
    return f"{hours} h {minutes % 60} min" if hours < 48 else f"{hours // 24} d"
