"""sweepserver's parts without a network: search, points, GraphQL walk, filters, permissions, figures."""

import asyncio
import contextlib
import itertools
import json
import math
import random
import sqlite3
import threading

import pytest

from sweepserver import app, figures, pages, walker
from sweepserver.files import Files, checked_name
from sweepserver.runs import Runs, best, spread
from sweepserver.scheduler import Rules, Scheduler
from sweepserver.search import BadSweep, bayes_point, check_library, draw, library, parse_sweep, random_point
from sweepserver.store import Store, clean, clean_text

# -- search -----------------------------------------------------------------------------------------------------------

GRID = """
method: grid
parameters:
  b: {values: [10, 20, 20]}
  a: {values: [x, y, z]}
  fixed: {value: 7}
  nest: {parameters: {q: {min: 1, max: 2}, p: {values: [true, false]}}}
"""


def test_grid_order_is_sorted_by_name_with_the_last_fastest():
    search = parse_sweep(GRID)
    product = itertools.product("xyz", [10, 20], [True, False], [1, 2])
    want = [{"a": a, "b": b, "fixed": 7, "nest": {"p": p, "q": q}} for a, b, p, q in product]
    assert [search.grid_point(i) for i in range(search.size)] == want
    assert [search.grid_index(point) for point in want] == list(range(24))
    assert search.grid_index({**want[0], "a": "none"}) is None


def test_grid_order_equals_the_sweeps_package():
    package = library()
    if package is None:
        pytest.skip("the sweeps package is not installed: pip install --no-deps sweeps")
    search, runs = parse_sweep(GRID), []
    while (run := package.next_run(search.config, runs)) is not None:
        runs.append(run)
    theirs = [{name: entry["value"] for name, entry in run.config.items()} for run in runs]
    assert theirs == [search.grid_point(i) for i in range(search.size)]


def test_a_random_point_depends_on_its_number_alone():
    parameters = {
        "lr": {"min": 1e-5, "max": 0.1, "distribution": "log_uniform_values"},
        "n": {"min": 1, "max": 9},
        "opt": {"parameters": {"m": {"values": ["a", "b"]}}},
    }
    assert random_point(parameters, random.Random("s:3")) == random_point(parameters, random.Random("s:3"))
    assert random_point(parameters, random.Random("s:3")) != random_point(parameters, random.Random("s:4"))


@pytest.mark.parametrize("spec, low, high, mean", [
    ({"min": 2, "max": 5}, 2, 5, 3.5),
    ({"min": 0.0, "max": 1.0}, 0, 1, 0.5),
    ({"min": 1, "max": 100, "distribution": "log_uniform_values"}, 1, 100, 99 / math.log(100)),
    ({"min": 0, "max": 1, "distribution": "log_uniform"}, 1, math.e, math.e - 1),
    ({"min": 1, "max": 4, "distribution": "inv_log_uniform_values"}, 1, 4, 3 / math.log(4)),
    ({"min": 0, "max": 10, "q": 5, "distribution": "q_uniform"}, 0, 10, 5),
    ({"distribution": "normal", "mu": 3, "sigma": 0.1}, 2, 4, 3),
    ({"values": [1, 9], "probabilities": [0.75, 0.25]}, 1, 9, 3),
    ({"value": 4}, 4, 4, 4),
])  # fmt: skip
def test_draws_have_the_range_and_mean_of_their_distribution(spec, low, high, mean):
    rng = random.Random(0)
    values = [draw(spec, rng) for _ in range(20000)]
    assert low <= min(values) and max(values) <= high + 1e-9
    assert sum(values) / len(values) == pytest.approx(mean, rel=0.03)


@pytest.mark.parametrize("text, word", [
    ("method: magic\nparameters: {a: {value: 1}}", "grid, random or bayes"),
    ("method: grid", "at least one parameter"),
    ("method: grid\nparameters: {a: {values: []}}", "parameters.a.values"),
    ("method: grid\nparameters: {a: {min: 0.0, max: 1.0}}", "parameters.a"),
    ("method: random\nparameters: {lr: {min: 1e-4, max: 0.1}}", "1.0e-4"),
    ("method: random\nparameters: {a: {min: 0, max: 1, distribution: log_uniform_values}}", "above 0"),
    ("method: bayes\nparameters: {a: {values: [1, 2]}}", "metric.name"),
    ("method: grid\nmetric: {name: x, target: high}\nparameters: {a: {value: 1}}", "metric.target"),
    ("method: grid\nmetric: {target: 1}\nparameters: {a: {value: 1}}", "metric.target"),
    ("method: grid\nrun_cap: -1\nparameters: {a: {value: 1}}", "run_cap"),
    ("[1, 2", "YAML"),
    ("method: grid\nmetric: acc\nparameters: {a: {value: 1}}", "metric: expected a mapping"),
    ("method: grid\nparameters: {a: {value: 1}, 1: {value: 2}}", "parameters.1: a name is a text"),
    ("method: random\nparameters: {a: {values: [2020-01-01]}}", "put it in quotes"),
    ("method: grid\nparameters: {a: {min: 0, max: 100000000000000000000}}", "too many for a grid"),
    ("method: random\nmetric: {name: x}\nearly_terminate: {type: hyperband}\nparameters: {a: {value: 1}}", "min_iter"),
    ("method: random\nmetric: {name: x}\nearly_terminate: {type: hyperband, min_iter: 2, eta: 1}\n"
     "parameters: {a: {value: 1}}", "early_terminate.eta"),
])  # fmt: skip
def test_a_bad_configuration_is_refused_in_one_line_that_names_the_place(text, word):
    with pytest.raises(BadSweep) as caught:
        parse_sweep(text)
    assert word in str(caught.value)


@pytest.mark.parametrize("spec, word", [
    ("{vals: [1, 2]}", "a.vals"), ("{max: 0.1}", "min <= max"),
    ("{min: 0.1, max: 1.0, distrbution: log_uniform_values}", "a.distrbution"),
    ("{min: 0, max: 1, q: 0, distribution: q_uniform}", "a.q"), ("{min: 0, max: 9, q: 2}", "a.q"),
    ("{min: 0, max: 0.5, distribution: int_uniform}", "whole numbers"), ("{min: 0.0, max: .inf}", "min <= max"),
    ("{values: [1, 2], probabilities: [0, 0]}", "a.probabilities"),
    ("{values: [1, 2], probabilities: 3}", "a.probabilities"), ("{value: 1, values: [1]}", "a.values"),
    ("{distribution: normal, mu: x}", "a.mu"), ("{distribution: normal, sigma: -1}", "a.sigma"),
    ("{distribution: log_uniform, min: 0, max: 1000}", "exponents"), ("{distribution: beta, a: 0}", "a.a"),
    ("{distribution: log_normal, mu: 5000}", "cannot be drawn"), ("{distribution: [x]}", "a.distribution"),
    ("{distribution: constant}", "a.distribution"),
])  # fmt: skip
def test_a_bad_parameter_is_refused_before_it_is_drawn(spec, word):
    with pytest.raises(BadSweep) as caught:
        parse_sweep(f"method: random\nparameters: {{a: {spec}}}")
    assert word in str(caught.value) and "\n" not in str(caught.value)


def test_a_step_of_a_grid_is_one_where_none_is_named():
    assert parse_sweep("method: grid\nparameters: {a: {distribution: q_uniform, min: 0, max: 3}}").size == 3


def test_bayes_without_the_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr("sweepserver.search.library", lambda: None)
    for extra in ("method: bayes", "method: random\nearly_terminate: {type: hyperband, min_iter: 2}"):
        search = parse_sweep(f"{extra}\nmetric: {{name: x}}\nparameters: {{a: {{min: 0.0, max: 1.0}}}}")
        with pytest.raises(BadSweep, match="pip install --no-deps sweeps"):
            check_library(search)


with_sweeps = pytest.mark.skipif(not library(), reason="the sweeps package is not installed")


@with_sweeps
@pytest.mark.parametrize("text", [
    "method: random\nearly_terminate: {type: hyperband, max_iter: 2, s: 1, eta: 3}\nparameters: {a: {values: [1, 2]}}",
    "method: random\nearly_terminate: {type: hyperband, max_iter: 9, s: 2.0}\nparameters: {a: {values: [1, 2]}}",
    "method: bayes\nparameters: {a: {value: 1}}",
])  # fmt: skip
def test_what_the_sweeps_package_cannot_use_is_refused_when_the_sweep_is_created(text):
    with pytest.raises(BadSweep, match="the `sweeps` package cannot use"):
        check_library(parse_sweep(f"metric: {{name: x}}\n{text}"))


@with_sweeps
def test_bayes_leaves_out_runs_whose_categorical_value_is_no_longer_in_the_sweep():
    search = parse_sweep(
        "method: bayes\nmetric: {name: x}\nparameters: {a: {values: [u, v]}, n: {parameters: "
        "{b: {min: 0.0, max: 1.0}}}}"
    )
    runs = [
        {
            "name": f"r{i}",
            "state": "finished",
            "config": {"a": {"value": a}, "n": {"value": {"b": 0.1 * i}}},
            "summary": {"x": i},
            "history": [],
        }
        for i, a in enumerate("uvgu")
    ]
    assert bayes_point(search, runs)["a"] in ("u", "v")


# -- GraphQL ----------------------------------------------------------------------------------------------------------

ROOTS = {
    "query": {
        "thing": lambda id=None, **k: {
            "__typename": "Run",
            "id": id,
            "more": lambda **k: [{"n": 1}, None],
            "given": lambda **kw: sorted(kw.items()),
            "extra": k,
        }
    }
}


@pytest.mark.parametrize("query, variables, want", [
    ("{ thing { id } }", {}, {"thing": {"id": None}}),
    ("query Q($i: Int = 3) { x: thing(id: $i) { y: id } }", {}, {"x": {"y": 3}}),
    ("query Q($i: Int = 3) { thing(id: $i) { id } }", {"i": 4}, {"thing": {"id": 4}}),
    ("{ thing { ...F more { n } } } fragment F on Run { id more { n } }", {},
     {"thing": {"id": None, "more": [{"n": 1}, None]}}),
    ("{ thing { ... on Run { id } ... on ArtifactSequence { more { n } } } }", {}, {"thing": {"id": None}}),
    ("query Q($on: Boolean!) { thing { id @include(if: $on) unknown } }", {"on": False}, {"thing": {"unknown": None}}),
    ("query Q($v: S) { thing { given(a: 1, b: [$v, {c: null, d: $w}], e: $w) } }", {"v": "s"},
     {"thing": {"given": [("a", 1), ("b", ["s", {"c": None}])]}}),
])  # fmt: skip
def test_walk(query, variables, want):
    assert walker.execute(query, variables, ROOTS)["data"] == want


def test_an_unknown_root_field_is_an_error_and_the_others_are_answered():
    answer = walker.execute("{ thing { id } newer { x } }", {}, ROOTS)
    assert answer["data"] == {"thing": {"id": None}, "newer": None}
    assert "newer" in answer["errors"][0]["message"]
    with pytest.raises(walker.Refused) as caught:
        walker.execute("no { graphql", {}, ROOTS)
    assert caught.value.status == 400


# -- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def runs(tmp_path):
    runs = Runs(Store(tmp_path))
    project = runs.project("e", "p", create=True)["id"]
    states = [("finished", 0.5), ("finished", float("nan")), ("failed", None), ("running", 0.9)]
    for i, (state, acc) in enumerate(states):
        summary = {"val/acc": acc, "deep": {"max": i}} if acc is not None else {}
        runs.create(
            project,
            f"r{i}",
            state=state,
            sweep="s" if i else None,
            tags=json.dumps([f"t{i}"]),
            config=json.dumps(
                {
                    "bits": {"value": i},
                    "opt": {"value": {"lr": i / 10}},
                    "s": {"value": f"lr{i}_w{i + 2}a8_s{i}"},
                    "a": {"value": {"value": "b"} if i == 2 else "c"},
                }
            ),
            summary=json.dumps(summary),
        )
    return runs


@pytest.mark.parametrize("filters, want", [
    ({}, "0123"), ({"state": "finished"}, "01"), ({"$and": [{"sweep": "s"}]}, "123"), ({"config.bits": 2}, "2"),
    ({"config.bits.value": {"$gte": 2}}, "23"), ({"config.opt.lr": 0.3}, "3"), ({"summary_metrics.val/acc": 0.5}, "0"),
    ({"summary_metrics.deep": {"$lt": 2}}, "01"), ({"$or": [{"name": "r0"}, {"name": {"$in": ["r3"]}}]}, "03"),
    ({"tags": "t1"}, "1"), ({"tags": {"$nin": ["t1"]}}, "023"), ({"display_name": {"$regex": "^zzz"}}, ""),
    ({"state": {"$ne": "finished"}}, "23"), ({"summary_metrics.val/acc": {"$exists": False}}, "2"),
    ({"config.bits": {"$gt": "a"}}, ""), ({"$not": {"state": "failed"}}, "013"),
    ({"name": {"$regex": "^R[01]", "$options": "i"}}, "01"), ({"name": {"$regex": "^R"}}, ""),
    ({"username": "local"}, "0123"), ({"user": {"$ne": "local"}}, ""), ({"entity": "e"}, "0123"),
    ({"created_at": {"$gt": "2020-01-01T00:00:00"}}, "0123"), ({"created_at": {"$gt": "2999-01-01"}}, ""),
    ({"config.s": {"$regex": "^lr.*s0$"}}, "0"), ({"config.s": {"$regex": "w[24]a8"}}, "02"),
    ({"config.s": {"$regex": "s1|lr0"}}, "01"), ({"config.s": {"$not": {"$regex": "(lr){1,2}0"}}}, "123"),
    ({"$nor": [{"name": "r0"}, {"state": "failed"}]}, "13"), ({"name": {"$in": []}}, ""),
    ({"config.opt.value.lr": 0.3}, "3"), ({"config.opt.value.lr": {"$lt": 0.2}}, "01"), ({"config.a.value": "b"}, "2"),
])  # fmt: skip
def test_filters(runs, filters, want):
    assert "".join(run["name"][1] for run in runs.find(1, filters)) == want


@pytest.mark.parametrize("filters, word", [
    ({"config.bits": {"$mod": 2}}, "$mod"), ({"$where": "1"}, "$where"), ({"name": {"$options": "i"}}, "$options"),
    ({"name": {"$regex": "("}}, "$regex '('"), ({"name": {"$regex": "r", "$options": "q"}}, "$options 'q'"),
    ({"name": {"$regex": 3}}, "$regex '3'"), ({"name": {"$regex": "(" * 5000}}, "$regex"),
    ({"name": {"$in": "r1"}}, "$in of name takes a list"), ({"tags": {"$all": 3}}, "$all of tags takes a list"),
    ({"$and": [3]}, "expected a mapping"), ("nonsense", "expected a mapping"),
    ({"created_at": {"$gt": "yesterday"}}, "'yesterday' is no date"),
])  # fmt: skip
def test_a_filter_that_is_not_known_is_refused(runs, filters, word):
    with pytest.raises(walker.Refused) as caught:
        runs.find(1, filters)
    assert word in str(caught.value) and "\n" not in str(caught.value)


def test_a_pattern_that_takes_for_ever_is_refused_and_holds_up_no_other_thread(runs):
    for i in range(4):
        runs.store.update("run", i + 1, config=json.dumps({"s": {"value": "a" * 40 + "b"}}))
    beats, over = [], threading.Event()

    def beat():
        while not over.wait(0.01):
            beats.append(1)

    other = threading.Thread(target=beat)
    other.start()
    try:
        with pytest.raises(walker.Refused, match="takes too long"):
            runs.find(1, {"config.s": {"$regex": "(a+)+$"}})
    finally:
        over.set()
        other.join()
    assert len(beats) > 20  # of about 100: `re` in this process would have let through none


@pytest.mark.parametrize(
    "entity, name",
    [("e", name) for name in ("a/b", "a\\b", "a#b", "a?b", "50%", "a:b", "..", " ", "a\nb", "n" * 129)]
    + [("", "p"), ("e/f", "p")],
)
def test_a_project_that_no_address_leads_to_is_refused(runs, entity, name):
    with pytest.raises(walker.Refused, match="expected at most 128 letters"):
        runs.project(entity, name, create=True)
    assert runs.project(entity, name) is None and runs.project("e", "two words", create=True)


@pytest.mark.parametrize("order, want", [
    ("+created_at", "0123"), ("-created_at", "3210"), ("-summary_metrics.val/acc", "3012"),
    ("+summary_metrics.val/acc", "0312"), ("-config.bits.value", "3210"), ("+state,-created_at", "2103"),
])  # fmt: skip
def test_orders_put_what_is_unknown_or_nan_last(runs, order, want):
    assert "".join(run["name"][1] for run in runs.find(1, None, order)) == want


def test_streams_are_stored_by_offset_so_that_a_retry_is_harmless(runs):
    run = runs.get(1, "r0")
    part = {"offset": 0, "content": ['{"_step": 0, "x": NaN}', '{"_step": 1, "x": 2.5, "y": Infinity}']}
    for _ in range(2):
        runs.stream(run, {"wandb-history.jsonl": part, "output.log": {"offset": 0, "content": ["one"]}})
    runs.stream(run, {"output.log": {"offset": 0, "content": ["two"]}})
    assert runs.history(run, "history", 10, None, None) == [
        '{"_step": 0, "x": "NaN"}',
        '{"_step": 1, "x": 2.5, "y": "Infinity"}',
    ]
    assert runs.texts(run, "log") == ["two"]
    assert runs.sampled(run, {"keys": ["_step", "y"]}) == [{"_step": 1, "y": "Infinity"}]
    assert runs.sampled(run, {"keys": ["x"], "minStep": 1, "maxStep": 1}) == [{"x": 2.5}]
    assert runs.history(run, "history", 10, 0, 1) == ['{"_step": 0, "x": "NaN"}']  # maxStep exclusive here
    assert runs.history_keys(run)["lastStep"] == 1


def test_nested_metrics_are_kept_under_dotted_names_and_media_whole(runs):
    run, image = runs.get(1, "r0"), {"_type": "image-file", "path": "p"}
    row = {"_step": 0, "a": {"b": 1.5, "c": {"d": 2, "p": image}}, "e": {}}
    runs.stream(run, {"wandb-history.jsonl": {"offset": 0, "content": [json.dumps(row)]}})
    assert runs.rows(run, "history") == [{"_step": 0, "a.b": 1.5, "a.c.d": 2, "a.c.p": image, "e": {}}]
    assert runs.sampled(run, {"keys": ["a.b"]}) == [{"a.b": 1.5}]
    assert runs.history_keys(run)["keys"]["a.c.d"] == {
        "typeCounts": [{"type": "number", "count": 1}],
        "previousValue": 2,
    }


@pytest.mark.parametrize("given, rows, state", [
    ({"jobProgram": "p.py"}, 0, "running"), ({"jobProgram": "<python with no main file>"}, 0, "running"),
    ({"jobProgram": "p.py", "id": True}, 2, "running"),  # resumed
    ({"jobProgram": "/venv/bin/wandb"}, 2, "running"), ({"jobProgram": "-m wandb.__main__"}, 2, "running"),  # synced
    ({"host": "h"}, 2, "running"), ({"notes": "n", "id": True}, 2, "finished"),
])  # fmt: skip
def test_a_run_id_used_again_begins_anew_but_for_a_resume_and_a_sync(runs, given, rows, state):
    run = runs.get(1, "r0")
    lines = {"offset": 0, "content": ['{"_step": 0, "x": 1}', '{"_step": 1, "x": 2}']}
    runs.stream(run, {"wandb-history.jsonl": lines, "output.log": lines})
    assert runs.metric(run, "x") == [1, 2]
    row, inserted = runs.upsert(1, {"name": "r0", **given, **({"id": runs.storage_id(run)} if "id" in given else {})})
    assert (row["state"], inserted) == (state, False)
    assert [runs.count(run, "history"), runs.count(run, "log"), len(runs.metric(run, "x"))] == [rows] * 3


def test_a_sync_of_less_than_was_streamed_takes_nothing_back_and_one_of_more_adds_it(runs):
    run = runs.get(1, "r0")

    def send(offset, *rows):
        runs.stream(run, {"wandb-history.jsonl": {"offset": offset, "content": rows}})
        return [(row["_step"], row["x"]) for row in runs.rows(run, "history")]

    sent = [f'{{"_step": {i}, "x": {i}, "nan": NaN}}' for i in range(4)]
    again = [f'{{"nan": NaN, "x": {i}, "_step": {i}}}' for i in range(6)]
    whole = [(i, i) for i in range(4)]
    assert send(0, *sent) == send(4, *again[:3]) == whole
    for _ in range(2):  # the second time: a retry
        assert send(4, *again) == [*whole, (4, 4), (5, 5)]
    assert send(20, *again[:1], '{"_step": 1, "x": 9}') == [(0, 0), (1, 9)]  # another log under the same id


def test_a_run_that_begins_anew_takes_back_the_lines_from_there_on_and_a_retry_none(runs):
    run = runs.get(1, "r0")

    def send(offset, *steps):
        content = [json.dumps({"_step": step, "x": offset + step}) for step in steps]
        runs.stream(run, {"wandb-history.jsonl": {"offset": offset, "content": content}})
        return [row["_step"] for row in runs.rows(run, "history")], runs.metric(run, "x"), runs.count(run, "history")

    assert send(0, 0, 1, 2) == ([0, 1, 2], [0, 1, 2], 3)
    for _ in range(2):
        assert send(3, 3, 4) == ([0, 1, 2, 3, 4], [0, 1, 2, 6, 7], 5)
    for _ in range(2):
        assert send(5, 2, 3) == ([0, 1, 2, 3], [0, 1, 7, 8], 7)  # the next line's number is still the client's


def test_null_never_erases(runs):
    runs.upsert(1, {"name": "r0", "notes": "kept", "groupName": "g"})
    row, inserted = runs.upsert(1, {"name": "r0", "notes": None, "groupName": None, "config": None, "sweep": None})
    assert (row["notes"], row["group"], inserted) == ("kept", "g", False) and runs.config(row)["bits"] == 0


def test_the_best_is_a_finite_number():
    values = [None, "9", True, float("nan"), math.inf, 10**400, 1, 3.0, 2]
    assert (best(values, "maximize"), best(values, "minimize"), best(values[:6], "maximize")) == (7, 6, None)


def test_spread_keeps_the_ends():
    assert spread(list(range(100)), 3) == [0, 50, 99] and spread([1, 2], 5) == [1, 2]


def test_nan_and_infinity_become_strings():
    assert clean({"a": [float("nan"), 1.0, {"b": -math.inf}]}) == {"a": ["NaN", 1.0, {"b": "-Infinity"}]}
    assert json.loads(clean_text('{"x": NaN, "text": "NaN it is"}')) == {"x": "NaN", "text": "NaN it is"}


# -- points -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def scheduler(runs):
    return Scheduler(runs.store, runs, Rules())


def sweep_of(scheduler, config: str = "method: grid\nparameters: {a: {values: [0, 1, 2]}}") -> str:
    return scheduler.upsert_sweep(1, {"config": config})


def hand_out(scheduler, sweep: str):
    """The run that a new agent is given, as its row."""
    (command,) = scheduler.heartbeat(scheduler.create_agent(sweep, "here"), set())
    return scheduler.runs.get(1, command["run_id"])


def again(scheduler, run):
    return scheduler.runs.get(1, run["name"])


def test_two_prior_runs_of_a_point_count_once_and_a_full_disk_is_not_hidden(scheduler, monkeypatch):
    for name in ("r0", "r1"):
        scheduler.runs.upsert(1, {"name": name, "config": json.dumps({"a": {"value": 1}})})
    given = {
        "config": "method: grid\nparameters: {a: {values: [0, 1, 2]}}",
        "priorRunsFilters": json.dumps({"name": {"$in": ["r0", "r1"]}}),
    }
    sweep = scheduler.upsert_sweep(1, given)
    assert scheduler.counts(scheduler.sweep(sweep))["done"] == 1
    insert = scheduler.store.insert

    def full(table, **columns):
        if table == "point":
            raise sqlite3.OperationalError("database or disk is full")
        return insert(table, **columns)

    monkeypatch.setattr(scheduler.store, "insert", full)
    with pytest.raises(sqlite3.OperationalError):
        scheduler.upsert_sweep(1, given)


def test_a_stop_asked_of_a_run_before_it_begins_is_not_lost(scheduler):
    sweep = sweep_of(scheduler)
    run = hand_out(scheduler, sweep)
    scheduler.upsert_sweep(1, {"id": sweep, "state": "CANCELED"})
    begun, _ = scheduler.runs.upsert(1, {"name": run["name"], "host": "here"})
    assert (begun["state"], begun["stop_why"]) == ("running", "cancel")
    scheduler.complete(begun, 0)
    resumed, _ = scheduler.runs.upsert(1, {"name": run["name"], "host": "here"})
    assert (resumed["state"], resumed["stop_at"], resumed["stop_why"], resumed["ended"]) == ("running", *[None] * 3)


def test_a_run_heard_again_is_stopped_where_its_point_is_done_or_its_sweep_is_cancelled(scheduler):
    sweep = sweep_of(scheduler)
    late, lost = hand_out(scheduler, sweep), hand_out(scheduler, sweep)
    scheduler.lose(late)
    scheduler.complete(hand_out(scheduler, sweep), 0)  # the same point, by another
    scheduler.lose(lost)
    scheduler.upsert_sweep(1, {"id": sweep, "state": "CANCELED"})
    for run, why in ((late, "superseded"), (lost, "cancel")):
        scheduler.revive(again(scheduler, run))
        assert (again(scheduler, run)["state"], again(scheduler, run)["stop_why"]) == ("running", why)
    assert scheduler.sweep(sweep)["state"] == "CANCELED"


def test_a_deleted_crashed_run_does_not_give_a_point_out_that_another_is_at(scheduler):
    sweep = sweep_of(scheduler)
    lost = hand_out(scheduler, sweep)
    scheduler.lose(lost)
    second = hand_out(scheduler, sweep)
    scheduler.forget(again(scheduler, lost))
    other = hand_out(scheduler, sweep)
    assert second["point"] == lost["point"] != other["point"]
    scheduler.forget(second)  # nobody else is at it
    assert hand_out(scheduler, sweep)["point"] == lost["point"]


@pytest.mark.parametrize("goal, short, enough", [("minimize", 0.2, 0.1), ("maximize", 0.0, 0.3)])
def test_no_run_begins_once_one_reached_the_target(scheduler, goal, short, enough):
    sweep = sweep_of(
        scheduler,
        f"method: grid\nmetric: {{name: val.x, goal: {goal}, target: 0.1}}\n"
        "parameters: {a: {values: [0, 1, 2, 3]}}",
    )

    def report(run, value):
        scheduler.runs.upsert(1, {"name": run["name"], "summaryMetrics": json.dumps({"val": {"x": value}})})

    first, second, third = (hand_out(scheduler, sweep) for _ in range(3))
    report(first, short)
    scheduler.complete(first, 0)
    assert scheduler.sweep(sweep)["state"] == "RUNNING"
    report(second, enough)  # it goes on
    assert scheduler.heartbeat(scheduler.create_agent(sweep, "here"), set()) == [{"type": "exit"}]
    assert scheduler.sweep(sweep)["state"] == "FINISHED"
    assert [again(scheduler, run)["stop_at"] for run in (second, third)] == [None, None]


class Package:
    """In place of the `sweeps` package: it fails as soon as there is a run."""

    SweepRun = dict

    @staticmethod
    def next_run(config, runs):
        return type("Run", (), {"config": {"a": {"value": 1 / (not runs)}}})

    @staticmethod
    def stop_runs(config, runs):
        return [1 / (not runs)][:0]


def test_a_failing_sweeps_package_stops_no_run_and_costs_no_heartbeat(scheduler, monkeypatch):
    monkeypatch.setattr("sweepserver.search.library", lambda: Package)
    config = (
        "method: bayes\nmetric: {name: x}\nearly_terminate: {type: hyperband, min_iter: 1}\n"
        "parameters: {a: {min: 0.0, max: 0.5}}"
    )
    sweep = sweep_of(scheduler, f"{config}  # {random.random()}")
    runs = [hand_out(scheduler, sweep) for _ in range(2)]
    values = [scheduler.runs.config(run)["a"] for run in runs]
    assert values[0] == 1 and 0 <= values[1] <= 0.5  # a random point in its place
    scheduler._checked.clear()
    assert scheduler.heartbeat(runs[0]["agent"], {runs[0]["name"]}) == []
    assert again(scheduler, runs[0])["stop_at"] is None


def test_a_sweep_that_has_begun_ends_without_the_package(scheduler, monkeypatch):
    monkeypatch.setattr("sweepserver.search.library", lambda: Package)
    config = "method: bayes\nrun_cap: 1\nmetric: {name: x}\nparameters: {a: {min: 0.0, max: 0.5}}"
    sweep = sweep_of(scheduler, config)
    run = hand_out(scheduler, sweep)
    monkeypatch.setattr("sweepserver.search.library", lambda: None)
    parse_sweep.cache_clear()  # as after a restart
    scheduler.complete(run, 0)
    assert scheduler.sweep(sweep)["state"] == "FINISHED"
    with pytest.raises(walker.Refused, match="pip install"):
        sweep_of(scheduler, config)


def test_a_deleted_crashed_run_leaves_a_point_that_another_settled_by_an_early_stop(scheduler):
    sweep = sweep_of(scheduler)
    lost = hand_out(scheduler, sweep)
    scheduler.lose(lost)
    second = hand_out(scheduler, sweep)
    scheduler.stop(second, "early")
    scheduler.complete(again(scheduler, second), 1)
    done = scheduler.counts(scheduler.sweep(sweep))
    scheduler.forget(again(scheduler, lost))
    assert done["done"] == 1 and scheduler.counts(scheduler.sweep(sweep)) == done
    scheduler.forget(again(scheduler, second))
    assert scheduler.counts(scheduler.sweep(sweep))["done"] == 0


def test_a_search_parses_each_line_of_history_once(scheduler, monkeypatch):
    run = scheduler.runs.get(1, "r0")
    scheduler.runs.stream(run, {"wandb-history.jsonl": {"offset": 0, "content": ['{"x": 1}', '{"y": 2}', '{"x": 3}']}})
    assert scheduler.runs.metric(run, "x") == [1, 3]
    monkeypatch.setattr("sweepserver.runs.parsed", lambda text: pytest.fail("once more"))
    assert scheduler.runs.metric(run, "x") == [1, 3]


@pytest.mark.parametrize("before, after", [("FINISHED", "RUNNING"), ("PAUSED", "PAUSED"), ("CANCELED", "CANCELED")])
def test_a_run_heard_again_wakes_a_finished_sweep_alone(scheduler, before, after):
    sweep = sweep_of(scheduler)
    run = hand_out(scheduler, sweep)
    scheduler.lose(run)
    scheduler.store.update("point", run["point"], status="lost")
    scheduler.store.update("sweep", sweep, state=before)
    scheduler.revive(again(scheduler, run))
    assert scheduler.sweep(sweep)["state"] == after


def test_a_run_that_ended_while_it_was_counted_as_silent_stays_ended(scheduler):
    run = hand_out(scheduler, sweep_of(scheduler))
    scheduler.complete(run, 0)
    scheduler.lose(run)  # with the row as it was before
    assert again(scheduler, run)["state"] == "finished"


def test_the_number_of_a_deleted_run_is_not_given_out_again(runs):
    last = runs.get(1, "r3")["id"]
    with runs.store.write() as db:
        db.execute("DELETE FROM run WHERE id=?", (last,))
    assert runs.create(1, "new", state="running") == last + 1


# -- permissions ------------------------------------------------------------------------------------------------------


def status(served, method: str, path: str, body: bytes = b"", host: bytes = b"x") -> int:
    return answer(served, method, path, body, [(b"host", host)])[0]


def answer(served, method: str, path: str, body: bytes, headers: list[tuple[bytes, bytes]]) -> tuple[int, bytes]:
    """Status and body of what the application answers, without a network."""
    scope = {
        "type": "http",
        "root_path": "",
        "query_string": b"",
        "scheme": "http",
        "method": method,
        "path": path,
        "headers": headers,
        "server": ("127.0.0.1", 1),
        "http_version": "1.1",
    }
    answers = []

    async def receive():
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message):
        answers.append(message)

    asyncio.run(served(scope, receive, send))
    return answers[0]["status"], answers[1]["body"]


def test_the_guard_believes_no_host_header(tmp_path, monkeypatch):
    from starlette.datastructures import URL
    from starlette.requests import HTTPConnection

    # What starlette below 1.0.1 makes of the header `Host: x/healthz?`.
    monkeypatch.setattr(HTTPConnection, "url", property(lambda self: URL(f"http://x/healthz?{self.scope['path']}")))
    served = app.build(app.Settings(tmp_path, "k" * 40))
    for path, want in (("/", 401), ("/local/p", 401), ("/healthz", 200)):
        assert status(served, "GET", path, host=b"x/healthz?") == want, path


# -- files ------------------------------------------------------------------------------------------------------------


def test_signed_addresses_hold_for_one_thing_and_a_time(tmp_path, monkeypatch):
    files = Files(Store(tmp_path), tmp_path / "blobs", b"secret", 1000)
    token = files.sign("upload", owner="run:1", name="a").split("/", 1)[1]
    assert files.allowed("upload", token)["name"] == "a"
    assert files.allowed("download", token) is None
    payload, mac = token.split(".")
    assert files.allowed("upload", payload[:-2] + "AA." + mac) is None
    assert files.allowed("upload", payload + ".") is None and files.allowed("upload", "") is None
    assert Files(files.store, files.folder, b"other", 1000).allowed("upload", token) is None
    monkeypatch.setattr("sweepserver.files.now", lambda: 1e12)
    assert files.allowed("upload", token) is None


async def chunks(content: bytes):
    yield content


def test_a_file_keeps_its_id_and_no_later_one_gets_that_of_a_deleted_one(tmp_path):
    files = Files(Store(tmp_path), tmp_path / "blobs", b"secret", 1000)
    ids = []
    for name, content in (("a", b"one"), ("b", b"two"), ("a", b"three")):
        assert asyncio.run(files.put("run:1", name, chunks(content)))
        ids.append(files.get("run:1", name)["id"])
    files.delete(files.list("run:1"))
    assert asyncio.run(files.put("run:2", "c", chunks(b"four")))
    assert ids[0] == ids[2] and files.get("run:2", "c")["id"] > max(ids) and len(list(files.folder.iterdir())) == 1


def test_a_folder_of_an_older_server_is_renewed_with_what_it_holds(tmp_path):
    with contextlib.closing(sqlite3.connect(tmp_path / "sweepserver.sqlite")) as old:
        old.executescript(
            "CREATE TABLE file(id INTEGER PRIMARY KEY, owner TEXT NOT NULL, name TEXT NOT NULL, "
            "blob TEXT, gone TEXT, UNIQUE(owner, name)); CREATE INDEX file_md5 ON file(blob);"
            "INSERT INTO file VALUES(7, 'run:1', 'a', 'b', 'g')"
        )
    for _ in range(2):
        files = Files(Store(tmp_path), tmp_path / "blobs", b"secret", 1000)
        row = files.get("run:1", "a")
        assert (row["id"], row["blob"], row["size"]) == (7, "b", None) and "gone" not in row.keys()
    files.delete([row])
    files.record("run:1", "new", "blob", 1, "md5")
    assert files.get("run:1", "new")["id"] == 8


@pytest.mark.parametrize("headers, said", [([(b"content-length", b"2000000")], "2000000 bytes"), ([], "content")])
def test_a_file_over_the_limit_is_told_of_in_the_log_and_the_answer(tmp_path, caplog, headers, said):
    served = app.build(app.Settings(tmp_path, "k" * 40, upload_limit=2**20))
    server = served.state.server
    key = server.runs.create(server.runs.project("local", "p", create=True)["id"], "r1", state="running")
    for owner, shown in ((f"run:{key}", "run local/p/r1"), ("artifact:3", "artifact:3")):
        caplog.clear()
        address = "/" + server.files.sign("upload", owner=owner, name="media/x.bin")
        code, body = answer(served, "PUT", address, b"x" * 2000000, headers)
        assert code == 413 and "1 MB that --max-upload-mb allows" in json.loads(body)["error"]
        (line,) = caplog.messages
        assert all(word in line for word in ("media/x.bin", shown, said, "1 MB", "--max-upload-mb")), line


def test_what_cannot_be_answered_is_one_line_in_the_log_and_an_alert_is_kept_there(tmp_path, caplog):
    server = app.Server(app.Settings(tmp_path, "k" * 40))
    loop = "fragment F on User { id ...F }"
    for asked, word in [
        ([], "no GraphQL request"),
        ({"query": 3}, "no GraphQL request"),
        ({"query": "{ viewer { id } }", "variables": [1]}, "no GraphQL request"),
        ({"query": f"{{ viewer {{ ...F }} }} {loop}"}, "one of its fragments holds itself"),
        ({"query": 'mutation { linkArtifact(input: {artifactID: "x"}) { versionIndex } }'}, "linked artifacts"),
        ({"query": '{ users(query: "x") { edges { node { id } } } }'}, "users and teams"),
        ({"query": "{ entity { integrations { edges { node { id } } } } }"}, "automations and integrations"),
    ]:
        caplog.clear()
        _, text = server.graphql(json.dumps(asked).encode(), "http://x/")
        (error,) = json.loads(text)["errors"]
        (record,) = caplog.records
        assert word in error["message"] and word in record.getMessage() and not record.exc_info, asked
    caplog.clear()
    alert = (
        'mutation { notifyScriptableRunAlert(input: {entityName: "e", projectName: "p", runName: "r", '
        'title: "low", text: "loss\\nis nan"}) { success } }'
    )
    assert "errors" not in server.graphql(json.dumps({"query": alert}).encode(), "http://x/")[1]
    assert caplog.messages == ["alert of run e/p/r: low: loss is nan"]


def test_a_database_without_room_leaves_no_bytes_and_no_5xx(tmp_path, monkeypatch):
    served = app.build(app.Settings(tmp_path, "k" * 40))
    files = served.state.server.files
    address = "/" + files.sign("upload", owner="run:1", name="a")
    (files.folder / ("0" * 32)).write_bytes(b"of a server that was killed")
    (files.folder / "mine").write_bytes(b"of a person")

    def full(*_):
        raise sqlite3.OperationalError("database or disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(files, "record", full)
        assert status(served, "PUT", address, b"x") == 400
    assert status(served, "PUT", address, b"kept") == 200
    kept = files.get("run:1", "a")["blob"]
    Files(files.store, files.folder, b"secret", 1000)
    assert {path.name for path in files.folder.iterdir()} == {"mine", kept}


def test_a_write_that_fails_at_its_end_is_undone(tmp_path):
    store = Store(tmp_path)
    store.read().executescript(
        "PRAGMA foreign_keys=on; CREATE TABLE child(parent REFERENCES project(id) DEFERRABLE INITIALLY DEFERRED)"
    )
    with pytest.raises(sqlite3.IntegrityError), store.write():  # COMMIT itself fails, as on a full disk
        store.insert("child", parent=99)
    store.insert("ticket", hash="after")
    with contextlib.closing(sqlite3.connect(store.path)) as other:
        assert other.execute("SELECT (SELECT COUNT(*) FROM child), hash FROM ticket").fetchall() == [(0, "after")]


def test_an_upload_that_waits_for_the_database_does_not_hold_up_the_others(tmp_path):
    files = Files(Store(tmp_path), tmp_path / "blobs", b"secret", 1000)
    held, release = threading.Event(), threading.Event()

    def hold():
        with files.store.write():
            held.set()
            release.wait(5)

    async def upload() -> bool:
        task = asyncio.create_task(files.put("run:1", "a", chunks(b"x")))
        await asyncio.sleep(0.2)
        waited = not task.done()
        release.set()
        return waited and await task

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    assert asyncio.run(upload())
    thread.join()


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "..\\x", "", "a\0b"])
def test_names_that_leave_the_run_are_refused(name):
    with pytest.raises(walker.Refused):
        checked_name(name)


# -- figures ----------------------------------------------------------------------------------------------------------


def quadratic_front(points):
    """Oracle: the points that no other one beats, by definition."""
    return {
        i
        for i, (x, y) in enumerate(points)
        if not any((u <= x and v > y) or (u < x and v >= y) for j, (u, v) in enumerate(points) if j != i)
    }


@pytest.mark.parametrize("seed", range(5))
def test_pareto_front_equals_its_definition(seed):
    rng = random.Random(seed)
    points = list({(rng.randint(0, 9), rng.randint(0, 9)) for _ in range(30)})
    assert set(figures.pareto_front(points)) == quadratic_front(points)
    flipped = [(x, -y) for x, y in points]
    assert figures.pareto_front(flipped, "minimize") == figures.pareto_front(points)


def rows():
    return [
        {
            "name": f"r{w}{a}",
            "params": {"weight_quant_bits": w, "activation_quant_bits": a, "opt": "<b>x</b>"},
            "values": {"acc": 0.1 * w + 0.01 * a, "model_size_mb": w / 4},
        }
        for w in (2, 4, 8)
        for a in (4, 8)
    ]


def test_figures_hold_what_the_rows_hold():
    heat = figures.heatmap(rows(), "acc")["data"][0]
    assert heat["y"] == ["2", "4", "8"] and heat["x"] == ["4", "8"] and heat["z"][2][1] == pytest.approx(0.88)
    front = next(t for t in figures.pareto(rows(), "acc")["data"] if t["name"] == "Pareto front")
    assert front["x"] == [0.5, 1.0, 2.0] and front["y"] == pytest.approx([0.28, 0.48, 0.88])
    labels = [d["label"] for d in figures.parallel(rows(), "acc")["data"][0]["dimensions"]]
    assert labels == ["activation bits", "weight bits", "model size mb", "acc"]
    assert "<" not in json.dumps(
        figures.parallel([{**r, "params": {"opt": f"<i>{i}"}, "name": "n"} for i, r in enumerate(rows())], "acc")[
            "data"
        ]
    )
    assert figures.parallel([], "acc") is None and figures.heatmap(rows()[:1], "acc") is None
    assert figures.pareto([], "acc") is None


def test_a_sweep_of_bit_widths_is_drawn_with_the_projects_own_figures():
    report = pytest.importorskip("report")
    bits = [
        {
            **row,
            "config": row["params"],
            "values": {
                **row["values"],
                "test_acc_quantized": 90 + i,
                "model_size_fp32_mb": 9.0,
                "test_acc_fp32": 94.0,
                "compression_ratio_model": 4.0,
            },
        }
        for i, row in enumerate(rows())
    ]
    drawn = figures.draw(bits, "test_acc_quantized", "maximize")
    frame = report.to_frame([{**row["config"], **row["values"]} for row in bits])
    want = json.loads(report.heatmap_figure(frame).to_json())
    assert drawn["heatmap"]["data"] == want["data"]
    assert {"Pareto front", "FP32"} <= {trace.get("name") for trace in drawn["pareto"]["data"]}
    assert figures.draw(rows(), "acc", "maximize")["heatmap"]["data"][0]["x"] == ["4", "8"]  # any other: our own


def test_a_sweep_that_the_projects_figures_cannot_draw_gets_the_servers_own(monkeypatch):
    report = pytest.importorskip("report")
    bits = [{**row, "config": row["params"], "values": {**row["values"], "test_acc_quantized": 90.0}} for row in rows()]
    monkeypatch.setattr(report, "pareto_figure", lambda frame: 1 / 0)
    assert figures.draw(bits, "test_acc_quantized", "maximize")["pareto"]["data"]


def test_a_parameter_may_be_a_list_or_a_mapping():
    odd = [
        {"name": f"r{i}", "params": {"shape": [i], "opt": {"lr": i % 2}}, "values": {"acc": i}, "config": {}}
        for i in range(3)
    ]
    heat = figures.heatmap(odd, "acc")["data"][0]
    assert heat["y"] == ["[0]", "[1]", "[2]"] and heat["x"] == ["{'lr': 0}", "{'lr': 1}"] and heat["z"][2] == [2, None]


def test_a_figure_that_fails_takes_no_other_with_it(monkeypatch):
    monkeypatch.setattr(figures, "varying", lambda rows: 1 / 0)
    drawn = figures.draw(rows(), "acc", "maximize")
    assert drawn["parallel"] is None and drawn["heatmap"] is None and drawn["pareto"]["data"]


def test_a_summary_value_may_be_of_any_kind():
    runs = [{"summary": {"acc": i, "odd": odd, "n": i}} for i, odd in enumerate([1, {"a": 1}, [2]])]
    assert pages._summary_columns(runs, "acc") == ["acc", "n", "odd"]
