"""Sweeps, agents and points: who gets which configuration, and what happens when its run is lost.

A point is handed out in one transaction, so two agents never get the same one. It is settled by the first run of it
that ends well. A run that crashed, was killed or fell silent gives its point back, at most `retries` times; a run
whose own program failed (exit code not 0) does not, since it would fail again. All of it is in SQLite: a restarted
server goes on where the last one was.
"""

import contextlib
import json
import logging
import random
import secrets
import sqlite3
import string
from dataclasses import dataclass

from .runs import Runs, dig, display_name
from .search import BadSweep, Search, bayes_point, check_library, parse_sweep, random_point, runs_to_stop
from .store import Store, now, parsed
from .walker import Refused

log = logging.getLogger("sweepserver")
LIVE = ("pending", "running")  # in an f-string just as SQL writes it
INTERRUPTED = {130, 137, 143, 255}  # Ctrl-C (the client says 255), SIGKILL, SIGTERM


@dataclass(frozen=True)
class Rules:
    """retries: how often a lost point is handed out again. agent_timeout: seconds without a sign from a run and its
    agent before it counts as lost. stop_grace: seconds for a run to stop by itself before SIGTERM."""

    retries: int = 2
    agent_timeout: float = 60.0
    stop_grace: float = 20.0


class Scheduler:
    def __init__(self, store: Store, runs: Runs, rules: Rules):
        self.store, self.runs, self.rules = store, runs, rules
        self.started = self.looked = now()  # nobody could be heard before
        self._checked: dict[str, float] = {}

    # -- sweeps ---------------------------------------------------------------------------------------------------

    def upsert_sweep(self, project: int, given: dict) -> str:
        """Creates or changes a sweep (config, state, displayName, description); answers its id."""
        columns = {"display_name": given.get("displayName"), "description": given.get("description"), "updated": now()}
        columns = {name: value for name, value in columns.items() if value is not None}
        try:
            search = parse_sweep(given["config"]) if given.get("config") else None
            if search:
                check_library(search)
        except BadSweep as error:
            raise Refused(str(error)) from None
        with self.store.write():
            sweep_id = given.get("id")
            if not sweep_id:
                if search is None:
                    raise Refused("a new sweep needs a configuration")
                sweep_id = _new_name()
                self.store.insert(
                    "sweep",
                    id=sweep_id,
                    project=project,
                    config=given["config"],
                    created=now(),
                    state="PENDING",
                    **columns,
                )
                if given.get("state"):
                    self._set_state(sweep_id, given["state"].upper())
                self._adopt(sweep_id, project, search, parsed(given.get("priorRunsFilters")))
                return sweep_id
            if self.sweep(sweep_id) is None:
                raise Refused(f"sweep {sweep_id} not found")
            if search:
                columns["config"] = given["config"]
                if search.method == "grid":  # elsewhere a number that was given out stays with its draw
                    columns["cursor"] = 0
                    self._renumber(sweep_id, search)
            self.store.update("sweep", sweep_id, **columns)
            if given.get("state"):
                self._set_state(sweep_id, given["state"].upper())
            elif search and self.sweep(sweep_id)["state"] == "FINISHED":
                self.store.update("sweep", sweep_id, state="RUNNING")  # the new grid may hold new points
                self._finish_if_done(sweep_id)
        return sweep_id

    def sweep(self, sweep_id: str):
        return self.store.one("SELECT * FROM sweep WHERE id=?", sweep_id)

    def _set_state(self, sweep_id: str, state: str) -> None:
        if state not in ("PENDING", "RUNNING", "PAUSED", "FINISHED", "CANCELED"):
            raise Refused(f"sweep state {state!r}: expected RUNNING, PAUSED, FINISHED or CANCELED")
        before = self.sweep(sweep_id)["state"]
        self.store.update("sweep", sweep_id, state=state)
        with self.store.write() as db:
            if state == "CANCELED":
                for run in self._live(sweep_id):
                    self.stop(run, "cancel")
            elif state == "RUNNING" and before in ("FINISHED", "CANCELED"):  # resumed: what failed gets a new chance
                db.execute(
                    "UPDATE point SET status='again', losses=0 WHERE sweep=? AND status IN ('failed', 'lost')",
                    (sweep_id,),
                )

    def _renumber(self, sweep_id: str, search: Search) -> None:
        """A changed grid keeps the points that it shares with the old one; the others leave the count."""
        with self.store.write() as db:
            points = self.store.all("SELECT id, params, status FROM point WHERE sweep=?", sweep_id)
            db.execute("UPDATE point SET idx=NULL WHERE sweep=?", (sweep_id,))
            for point in points:
                index = search.grid_index(json.loads(point["params"]))
                if index is not None:
                    db.execute("UPDATE OR IGNORE point SET idx=? WHERE id=?", (index, point["id"]))
                elif point["status"] == "again":
                    db.execute("DELETE FROM point WHERE id=?", (point["id"],))

    def _adopt(self, sweep_id: str, project: int, search: Search, filters) -> None:
        """`wandb sweep --prior_run`: runs of before count as the points they already computed."""
        for run in self.runs.find(project, filters) if filters else ():
            params = {name: self.runs.config(run).get(name) for name in search.parameters}
            index = search.grid_index(params) if search.method == "grid" else None
            if index is not None:
                with contextlib.suppress(sqlite3.IntegrityError):  # two prior runs of one point: the first counts
                    self.store.insert("point", sweep=sweep_id, idx=index, params=json.dumps(params), status="done")
            self.store.update("run", run["id"], sweep=sweep_id)

    def counts(self, sweep) -> dict:
        """What the sweep page says: total (None without an end), done, running, failed, lost, waiting."""
        rows = self.store.all(
            "SELECT status, COUNT(*) AS n FROM point WHERE sweep=? AND idx IS NOT NULL GROUP BY status", sweep["id"]
        )
        by = {row["status"]: row["n"] for row in rows}
        total = parse_sweep(sweep["config"]).size
        counts = {
            "total": total,
            "done": by.get("done", 0),
            "running": by.get("out", 0),
            "failed": by.get("failed", 0),
            "lost": by.get("lost", 0),
            "again": by.get("again", 0),
        }
        given = sum(by.get(status, 0) for status in ("done", "out", "failed", "lost"))
        counts["waiting"] = None if total is None else max(0, total - given)  # a run_cap may be lowered below `given`
        return counts

    # -- agents ---------------------------------------------------------------------------------------------------

    def create_agent(self, sweep_id: str, host: str) -> str:
        if self.sweep(sweep_id) is None:
            raise Refused(f"sweep {sweep_id} not found")
        agent_id = secrets.token_hex(8)
        self.store.insert(
            "agent", id=agent_id, sweep=sweep_id, host=host or "", created=now(), heartbeat=now(), state="RUNNING"
        )
        return agent_id

    def heartbeat(self, agent_id: str, alive: set[str]) -> list[dict]:
        """`alive`: the names of the runs that the agent says are running. Answers its commands."""
        with self.store.write() as db:
            agent = self.store.one("SELECT * FROM agent WHERE id=?", agent_id)
            sweep = agent and self.sweep(agent["sweep"])
            if sweep is None:
                raise Refused("agent or sweep not found", 404)
            self.store.update("agent", agent_id, heartbeat=now(), state="RUNNING")
            mine = self.store.all(f"SELECT * FROM run WHERE agent=? AND state IN {(*LIVE, 'crashed')}", agent_id)
            for run in mine:
                if run["name"] in alive:
                    self.runs.touch(run)
                    if run["state"] == "crashed":
                        self.revive(run)
                elif run["state"] in LIVE:
                    self.lose(run)
            self.check_silent(sweep["id"])
            self._check_early(sweep)
            self._finish_if_done(sweep["id"])
            sweep = self.sweep(sweep["id"])
            live = self.store.all(f"SELECT * FROM run WHERE agent=? AND state IN {LIVE}", agent_id)
            commands = []
            for run in live:
                overdue = run["stop_at"] and now() - run["stop_at"] > self.rules.stop_grace
                if overdue and not run["stop_sent"] and not commands:  # the in-process agent reads one command only
                    self.store.update("run", run["id"], stop_sent=1)
                    commands.append({"type": "stop", "run_id": run["name"]})
            if commands or live or alive:
                return commands
            if sweep["state"] in ("FINISHED", "CANCELED"):
                db.execute("UPDATE agent SET state='FINISHED' WHERE id=?", (agent_id,))
                return [{"type": "exit"}]
            if sweep["state"] == "PAUSED":
                return []
            return self._hand_out(sweep, agent_id)

    def _hand_out(self, sweep, agent_id: str) -> list[dict]:
        """One point for one agent, [] where there is none now (a point that is out may still come back)."""
        search = parse_sweep(sweep["config"])
        point = self._next_point(sweep, search)
        if point is None:
            return []
        params = json.loads(point["params"])
        values = {name: {"value": value} for name, value in params.items()}
        self.store.update("point", point["id"], status="out")
        name = _new_name()
        count = self.store.value("SELECT COUNT(*) FROM run WHERE sweep=?", sweep["id"])
        self.runs.create(
            sweep["project"],
            name,
            state="pending",
            sweep=sweep["id"],
            agent=agent_id,
            point=point["id"],
            config=json.dumps(values),
            display_name=display_name(name, f"sweep-{count + 1}"),
        )
        self.store.update("sweep", sweep["id"], state="RUNNING")
        program = str(search.config.get("program") or "")
        return [{"type": "run", "run_id": name, "program": program, "args": values}]

    def _next_point(self, sweep, search: Search):
        there = "AND idx IS NOT NULL" if search.method == "grid" else ""  # not what a changed grid no longer holds
        point = self.store.one(
            f"SELECT * FROM point WHERE sweep=? AND status='again' {there} ORDER BY idx LIMIT 1", sweep["id"]
        )
        if point:
            return point
        index, size = sweep["cursor"], search.size
        if (
            size is not None
            and self.store.value("SELECT COUNT(*) FROM point WHERE sweep=? AND idx IS NOT NULL", sweep["id"]) >= size
        ):
            return None
        while self.store.one("SELECT 1 FROM point WHERE sweep=? AND idx=?", sweep["id"], index):
            index += 1
        if search.method == "grid":
            params = search.grid_point(index)
        else:
            params = random_point(search.parameters, random.Random(f"{sweep['id']}:{index}"))
        if search.method == "bayes":
            try:
                params = bayes_point(search, self._for_library(sweep, search))
            except BadSweep as error:  # the sweep was fine when it began: it goes on, with a random point
                log.warning("sweep %s gets a random point: %s", sweep["id"], error)
        self.store.update("sweep", sweep["id"], cursor=index + 1)
        key = self.store.insert("point", sweep=sweep["id"], idx=index, params=json.dumps(params), status="again")
        return self.store.one("SELECT * FROM point WHERE id=?", key)

    # -- runs of a sweep ------------------------------------------------------------------------------------------

    def complete(self, run, exit_code: int) -> None:
        """The run said that it ended."""
        with self.store.write():
            run = self.store.one("SELECT * FROM run WHERE id=?", run["id"])
            point = run["point"] and self.store.one("SELECT * FROM point WHERE id=?", run["point"])
            if exit_code == 0:
                state, status = "finished", "done"
            elif run["stop_why"]:
                state = "killed"
                status = {"cancel": "again", "early": "done"}.get(run["stop_why"], "failed")
            elif run["preempting"]:
                state, status = "preempted", "again"
            elif exit_code in INTERRUPTED:
                state, status = "killed", "lose"
            else:
                state, status = "failed", "failed"
            settled = point and point["status"] == "done"
            if settled and state == "finished" and self._settled_by_other(run):
                state = "killed"  # it was given up, its point handed out again, and the other one came first
            self.store.update("run", run["id"], state=state, exit_code=exit_code, ended=now(), heartbeat=now())
            if not point:
                return
            others = self._others(run)
            if status == "done":
                for other in others:
                    self.stop(other, "superseded")
            if status == "lose" and point["status"] != "out":
                pass  # it was given up before and counted then
            elif not settled and (status == "done" or not others):
                self._settle(point, status)
            self._finish_if_done(point["sweep"])

    def lose(self, run) -> None:
        """The run vanished without reporting an end."""
        with self.store.write():
            run = self.store.one("SELECT * FROM run WHERE id=?", run["id"])
            if run is None or run["state"] not in LIVE:  # it ended, or was deleted, since the caller looked
                return
            state = "preempted" if run["preempting"] else ("killed" if run["stop_why"] else "crashed")
            self.store.update("run", run["id"], state=state, ended=now())
            point = run["point"] and self.store.one("SELECT * FROM point WHERE id=?", run["point"])
            if not point or point["status"] != "out":
                return
            if self._others(run):
                return
            why = {"cancel": "again", "early": "done", "stop": "failed"}.get(run["stop_why"])
            self._settle(point, why or ("again" if run["preempting"] else "lose"))
            self._finish_if_done(point["sweep"])

    def revive(self, run) -> None:
        """A run that was given up is heard again. Its point may have gone to another: the first to finish counts."""
        with self.store.write():
            self.store.update("run", run["id"], state="running", ended=None, heartbeat=now())
            point = run["point"] and self.store.one("SELECT * FROM point WHERE id=?", run["point"])
            sweep = run["sweep"] and self.sweep(run["sweep"])
            if point and point["status"] == "done":
                self.stop(run, "superseded")
            elif sweep and sweep["state"] == "CANCELED":  # while nobody heard it
                self.stop(run, "cancel")
            if point and point["status"] in ("again", "lost"):
                self.store.update("point", point["id"], status="out", losses=max(0, point["losses"] - 1))
                if point["status"] == "lost" and sweep and sweep["state"] == "FINISHED":
                    self.store.update("sweep", sweep["id"], state="RUNNING")

    def stop(self, run, why: str) -> None:
        """Asks a run to stop: by the answer to its next file stream, later by its agent."""
        if not run["stop_at"]:
            self.store.update("run", run["id"], stop_at=now(), stop_why=why)

    def check_silent(self, sweep_id: str | None = None) -> None:
        """Gives up runs that neither they nor their agent have reported on for `agent_timeout` seconds."""
        limit = now() - self.rules.agent_timeout
        if now() - self.looked > 10:  # looked every 2 s: the server itself was asleep, as on a laptop that was closed
            self.started = now()
        self.looked = now()
        if self.started > limit:
            return
        where, values = ("AND sweep=?", (sweep_id,)) if sweep_id else ("", ())
        sql = f"SELECT * FROM run WHERE state IN {LIVE} AND heartbeat<? {where}"
        for run in self.store.all(sql, limit, *values):
            self.lose(run)
        with self.store.write() as db:
            db.execute("UPDATE agent SET state='CRASHED' WHERE state='RUNNING' AND heartbeat<?", (limit,))

    def forget(self, run) -> None:
        """The run is deleted: a point that only it had computed is to be run again, unless another run is at it."""
        with self.store.write() as db:
            point = run["point"] and self.store.one("SELECT * FROM point WHERE id=?", run["point"])
            mine = run["state"] == "finished" or (run["state"] == "killed" and run["stop_why"] == "early")
            if point and (mine or point["status"] != "done") and not self._settled_by_other(run):
                status = "out" if self._others(run) else "again"
                db.execute("UPDATE point SET status=?, losses=0 WHERE id=?", (status, run["point"]))

    def _settle(self, point, status: str) -> None:
        if status == "lose":
            losses = point["losses"] + 1
            status = "again" if losses <= self.rules.retries else "lost"
            self.store.update("point", point["id"], losses=losses)
        self.store.update("point", point["id"], status=status)

    def _settled_by_other(self, run) -> bool:
        return (
            self.store.one("SELECT 1 FROM run WHERE point=? AND id<>? AND state='finished'", run["point"], run["id"])
            is not None
        )

    def _others(self, run) -> list:
        """The other runs of the run's point that still go on."""
        return self.store.all(f"SELECT * FROM run WHERE point=? AND id<>? AND state IN {LIVE}", run["point"], run["id"])

    def _finish_if_done(self, sweep_id: str) -> None:
        sweep = self.sweep(sweep_id)
        if sweep is None or sweep["state"] not in ("PENDING", "RUNNING"):
            return
        counts = self.counts(sweep)
        if (counts["waiting"] == 0 and counts["running"] == 0) or self._reached(sweep):
            self.store.update("sweep", sweep_id, state="FINISHED", updated=now())

    def _reached(self, sweep) -> bool:
        """Whether one of the sweep's runs has come to `metric.target`; those that go on may end, none begins."""
        search = parse_sweep(sweep["config"])
        return search.target is not None and any(
            search.reached(dig(self.runs.summary(run), search.metric))
            for run in self.store.all("SELECT summary FROM run WHERE sweep=?", sweep["id"])
        )

    def _live(self, sweep_id: str):
        return self.store.all(f"SELECT * FROM run WHERE sweep=? AND state IN {LIVE}", sweep_id)

    def _check_early(self, sweep) -> None:
        """Hyperband, at most every 5 s a sweep."""
        search = parse_sweep(sweep["config"])
        if not search.early or now() - self._checked.get(sweep["id"], 0) < 5:
            return
        self._checked[sweep["id"]] = now()
        try:
            names = runs_to_stop(search, self._for_library(sweep, search))
        except BadSweep as error:
            log.warning("sweep %s stops no run early: %s", sweep["id"], error)
            return
        for run in self._live(sweep["id"]):
            if run["name"] in names:
                self.stop(run, "early")

    def _for_library(self, sweep, search: Search) -> list[dict]:
        known = {"preempted": "crashed"}
        answer = []
        for run in self.store.all("SELECT * FROM run WHERE sweep=? ORDER BY id", sweep["id"]):
            state = "finished" if run["stop_why"] == "early" and run["state"] == "killed" else run["state"]
            history = [{search.metric: value} for value in self.runs.metric(run, search.metric)]
            answer.append(
                {
                    "name": run["name"],
                    "state": known.get(state, state),
                    "config": parsed(run["config"], {}),
                    "summary": parsed(run["summary"], {}),
                    "history": history,
                }
            )
        return answer


def _new_name() -> str:
    """The name of a sweep or run, in the form of the client's own."""
    return "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(8))
