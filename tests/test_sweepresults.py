"""sweepresults.py: what of a sweep counts, what is missing, and what is taken from the cache."""

import itertools
import json
from pathlib import Path

import pytest
from test_report import FP32, GRID, row

import report
import sweepresults
import tracking
from errors import UserError


def test_missing_points_in_grid_order():
    frame = report.to_frame([r for r in GRID if (r["weight_quant_bits"], r["batch_size"]) != (4, 256)] + [FP32])
    grid = {"activation_quant_bits": [2, 4, 6, 8], "batch_size": [128, 256], "weight_quant_bits": [None, 2, 4, 6, 8]}
    missing = sweepresults.missing_points(frame, grid)
    present = {(a, b, w) for a, b, w in zip(*(frame[n] for n in grid), strict=True)}
    expected = [p for p in itertools.product([2, 4, 6, 8], [128, 256], [32, 2, 4, 6, 8]) if p not in present]
    assert list(missing.fillna(32).itertuples(index=False, name=None)) == expected
    found = sweepresults.missing_points(frame, {"weight_quant_bits": [32, "7", "nan"], "weight_per_channel": [True]})
    assert found.shape == (2, 2)
    assert len(sweepresults.missing_points(frame, {})) == len(sweepresults.missing_points(report.to_frame([]), {})) == 0


def read(runs, state="FINISHED", method="grid", values=(4, 8), **more):
    config = {"method": method, "parameters": {"weight_bits": {"values": list(values)}, "batch_size": {"value": 64}}}
    config |= more
    return {"path": "me/p/s1", "name": "s", "state": state, "url": "u", "config": config, "runs": runs, "tables": {}}


def run(name, weight_bits, accuracy, created, state="finished"):
    summary = row(weight_bits, 8, accuracy, 1.0)
    return {"id": name, "name": name, "state": state, "created_at": created, "config": {"weight_bits": weight_bits},
            "summary": summary}  # fmt: skip


RUNS = [
    run("old", 4, 80.0, "2026-01-01T10:00:00Z"),
    run("new", 4, 90.0, "2026-01-01T11:00:00Z"),
    run("bad", 4, 10.0, "2026-01-01T12:00:00Z", "crashed"),
]


def test_sweep_keeps_the_latest_finished_run_of_a_point():
    results = sweepresults.sweep_results(read(RUNS))
    assert results.frame["run_id"].tolist() == ["new"]
    assert results.states == {"finished": 2, "crashed": 1}
    assert results.missing.to_dict("records") == [{"weight_bits": 8}]
    assert sweepresults.sweep_results(read(RUNS, method="random")).frame["run_id"].tolist() == ["old", "new"]


def test_a_grid_whose_numbers_are_text_is_whole():
    runs = [run("a", 4, 80.0, "2026-01-01"), run("b", "8", 90.0, "2026-01-02"), run("c", 8, 91.0, "2026-01-03")]
    results = sweepresults.sweep_results(read(runs, values=("4", "8.0")))
    assert results.frame["run_id"].tolist() == ["a", "c"] and len(results.missing) == 0


def test_sweep_table_has_the_best_first_and_may_be_empty():
    best = sweepresults.sweep_results(read([*RUNS, run("top", 8, 93.0, "2026-01-01T09:00:00Z")])).table
    assert best["run_name"].tolist() == ["top", "new"] and best["batch_size"].tolist() == [128, 128]
    nothing = sweepresults.sweep_results(read([]))
    assert nothing.table.empty and list(nothing.table) == list(best)
    assert nothing.missing.to_dict("records") == [{"weight_bits": 4}, {"weight_bits": 8}]


@pytest.mark.parametrize("changes", [dict(method="random"), dict(run_cap=1), dict(values=[4])])
def test_a_sweep_that_need_not_run_every_point_misses_none(changes):
    results = sweepresults.sweep_results(read(RUNS, **changes))
    assert len(results.missing) == 0 and results.grid == {}
    assert results.frame["run_id"].tolist() == (["old", "new"] if "method" in changes else ["new"])


WHOLE = [*RUNS, run("other", 8, 93.0, "2026-01-01T13:00:00Z")]


@pytest.mark.parametrize(
    "state, runs, changes, reads",
    [
        ("FINISHED", WHOLE, {}, 1),
        ("FINISHED", RUNS, {}, 2),  # a point is missing: somebody may have resumed it
        ("FINISHED", WHOLE, dict(method="random"), 2),  # these may be resumed as well
        ("FINISHED", WHOLE, dict(run_cap=2), 2),
        ("RUNNING", WHOLE, {}, 2),
        ("FINISHED", [*WHOLE, run("live", 8, 1.0, "2026-01-02T00:00:00Z", "running")], {}, 2),
    ],
)
def test_only_an_ended_and_whole_grid_is_taken_from_the_cache(tmp_path, monkeypatch, state, runs, changes, reads):
    asked = []
    monkeypatch.setattr(tracking, "read_sweep", lambda *a: asked.append(a) or read(runs, state, **changes))
    first = sweepresults.fetch_sweep("me", "p", "s1", tmp_path)
    second = sweepresults.fetch_sweep("me", "p", "s1", tmp_path)
    assert len(asked) == reads
    assert first.frame.equals(second.frame) and first.grid == second.grid
    assert json.loads(Path(tmp_path / "sweep-me-p-s1.json").read_text())["path"] == "me/p/s1"

    def unreachable(*_):
        raise UserError("no server")

    monkeypatch.setattr(tracking, "read_sweep", unreachable)
    if state == "FINISHED" and not any(run["state"] == "running" for run in runs):
        assert sweepresults.fetch_sweep("me", "p", "s1", tmp_path).frame.equals(first.frame)
    else:
        with pytest.raises(UserError):
            sweepresults.fetch_sweep("me", "p", "s1", tmp_path)


def test_size_tables_of_mixed_precision_are_found_by_their_mean():
    rows = {"8": [{"name": "a"}], "3.27": [{"name": "b"}]}
    read = dict(path="e/p/s", name="s", state="FINISHED", url="", config={"method": "random"}, runs=[], tables=rows)
    sizes = sweepresults.sweep_results(read).sizes
    assert sizes == {8: rows["8"], 3.27: rows["3.27"]} and min(sizes) == 3.27


def test_a_grid_over_whole_numbers_keeps_every_point():
    runs = [run(f"{w}-{s}", w, 90.0, f"2026-01-01T1{s}:00:00Z") for w in (4, 8) for s in range(3)]
    runs = [{**r, "summary": {**r["summary"], "seed": int(r["id"][-1])}} for r in runs]
    sweep = read(runs[:-1])
    sweep["config"]["parameters"]["seed"] = {"min": 0, "max": 2}
    results = sweepresults.sweep_results(sweep)
    assert len(results.frame) == 5 and results.missing.to_dict("records") == [{"weight_bits": 8, "seed": 2}]
    assert results.table["seed"].tolist() == [0, 0, 1, 1, 2]  # W&B's order: by name


def test_the_cache_is_of_the_project_that_was_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "read_sweep", lambda *a: read(WHOLE))
    kept = sweepresults.fetch_sweep("me", "p", "s1", tmp_path)
    monkeypatch.setattr(tracking, "read_sweep", lambda *a: read([]) | {"path": "/".join(a[:3])})
    assert sweepresults.fetch_sweep(None, None, "s1", tmp_path).path == kept.path == "me/p/s1"
    assert sweepresults.fetch_sweep("other", "q", "s1", tmp_path).path == "other/q/s1"


@pytest.mark.parametrize("content", ["[]", "{}", '{"path": "me/p/s1"}', json.dumps(read([]) | {"path": 3})])
def test_json_that_is_no_kept_sweep_is_one_line_and_stays(tmp_path, monkeypatch, content):
    monkeypatch.setattr(tracking, "read_sweep", lambda *a: read(WHOLE))
    path = tmp_path / "sweep-me-p-s1.json"
    path.write_text(content)
    with pytest.raises(UserError, match="sweep-me-p-s1.json is not a sweep .*; move it away"):
        sweepresults.fetch_sweep("me", "p", "s1", tmp_path)
    assert path.read_text() == content


@pytest.mark.parametrize(
    "parameter, values",
    [
        ({"distribution": "q_uniform", "min": 0.0, "max": 0.3, "q": 0.1}, [0.0, 0.1, 0.2]),
        ({"parameters": {"lr": {"values": [0.1, 0.01]}, "name": {"value": "sgd"}}}, [{"lr": 0.1}, {"lr": 0.01}]),
        ({"values": [[1, 2], [3]]}, [[1, 2], [3]]),
        ({"values": [True, False, "auto"]}, [True, False, "auto"]),
    ],
)
def test_a_grid_of_any_kind_of_parameter_keeps_every_point(parameter, values):
    sweep = read([{**run(str(i), 4, 90.0, "2026-01-01"), "config": {"extra": v}} for i, v in enumerate(values)])
    sweep["config"]["parameters"] = {"extra": parameter}
    results = sweepresults.sweep_results(sweep)
    assert sorted(results.frame["run_id"]) == ["0", "1", "2"][: len(values)] and len(results.missing) == 0
    assert sweepresults.complete(sweep)
    sweep["runs"].pop()
    assert len(sweepresults.sweep_results(sweep).missing) == 1 and not sweepresults.complete(sweep)


def test_a_grid_that_cannot_be_listed_keeps_every_run():
    sweep = read(WHOLE)
    sweep["config"]["parameters"]["lr"] = {"min": 0.1, "max": 0.5}
    results = sweepresults.sweep_results(sweep)
    assert len(results.frame) == 3 and results.grid == {} and not sweepresults.complete(sweep)
