"""A sweep read back through W&B's API as one frame: its finished runs, the points that are missing, a cache on disk.

A grid point that ran twice counts once, with its latest run. pandas costs half a second to import, so each function
imports what it needs.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tracking
from errors import UserError
from files import write_bytes
from report import ACCURACY, BITS, FLOAT_BITS, RATIO, SIZE, SIZE_TABLE, WEIGHTS, to_frame
from sweepserver.search import BadSweep, grid_axes

if TYPE_CHECKING:
    import pandas as pd

KEPT = {"path", "name", "state", "url", "config", "runs", "tables"}  # what `tracking.read_sweep` returns


@dataclass(frozen=True)
class SweepResults:
    """A sweep read back: frame, one row a grid point (its latest finished run, with run_id, run_name and created_at);
    grid: parameter → values, of those with more than one value, {} where the sweep need not run all of them;
    states: run state → count; sizes: rows of the size table by weight bits, each from one run."""

    path: str
    name: str
    state: str
    url: str
    grid: dict[str, list[Any]]
    states: dict[str, int]
    frame: pd.DataFrame
    sizes: dict[float, list[dict[str, Any]]]

    @property
    def summary(self) -> str:
        """One line: which sweep, how far, where to look."""
        runs = ", ".join(f"{count} {state}" for state, count in sorted(self.states.items())) or "no runs"
        return f"{self.path} ({self.name}), {self.state.lower()}: {runs}; {self.url}"

    @property
    def table(self) -> pd.DataFrame:
        """The columns to read first, best accuracy first."""
        shown_anyway = {*BITS, "batch_size", "weight_bits", "act_bits", "activation_bits"}  # with test.py's other names
        swept = [name for name in self.grid if name in self.frame and name not in shown_anyway]
        shown = [*BITS, *swept, "batch_size", ACCURACY, "acc_drop", SIZE, RATIO, "compression_ratio_activations"]
        table = self.frame.sort_values(ACCURACY, ascending=False).reindex(columns=["run_name", *shown])
        return table.astype({"batch_size": "Int64"}).reset_index(drop=True)

    @property
    def missing(self) -> pd.DataFrame:
        return missing_points(self.frame, {n: v for n, v in self.grid.items() if self.frame.empty or n in self.frame})


def fetch_sweep(
    entity: str | None = None, project: str | None = None, sweep: str | None = None, cache: Path | None = None
) -> SweepResults:
    """A sweep (its id, or entity/project/id) through `wandb.Api()`; without one, the latest sweep.

    With `cache` (a folder) what was read is kept there in one JSON file a sweep, and a grid that has ended without a
    missing point is read from it the next time, with or without a server; a line says so, for the grid may have been
    changed since (`wandb sweep --update`). Any other finished sweep may have been resumed: it is fetched again, and
    read from the cache only if no server answers.
    """
    if sweep and sweep.count("/") == 2:
        entity, project, sweep = sweep.split("/")
    kept = read_cache(cache, entity, project, sweep) if cache and sweep else None
    if kept is None or not complete(kept):
        try:
            kept = tracking.read_sweep(entity, project, sweep, SIZE_TABLE, WEIGHTS)
        except UserError:
            if kept is None or not ended(kept):
                raise
        if cache:
            text = json.dumps(kept, indent=1, default=str)
            write_bytes(cache_file(cache, kept), text.encode())
    else:
        print(f"complete, as read before: {cache_file(cache, kept)}; delete it to ask the server again")
    return sweep_results(kept)


def cache_file(cache: Path, read: Mapping[str, Any]) -> Path:
    return Path(cache) / f"sweep-{read['path'].replace('/', '-')}.json"


def ended(read: Mapping[str, Any]) -> bool:
    """Whether nothing more will come: W&B calls a sweep finished when its last run has been given out."""
    going = any(run["state"] in ("running", "pending", "preempting") for run in read["runs"])
    return read["state"] in ("FINISHED", "CANCELED", "CANCELLED") and not going


def complete(read: Mapping[str, Any]) -> bool:
    """Whether it is a finished grid with no missing point: resuming it would add nothing, only changing it."""
    results = sweep_results(read)
    return ended(read) and bool(results.grid) and not len(results.missing)


def read_cache(folder: Path, entity: str | None, project: str | None, sweep: str) -> dict[str, Any] | None:
    """What `fetch_sweep` kept of `sweep` (its id, in any project where none is given); None where there is nothing that
    can be read. UserError for JSON that `fetch_sweep` did not write, which it would write over."""
    for path in sorted(Path(folder).glob(f"sweep-*-{sweep}.json")):
        try:
            kept = json.loads(path.read_text())
        except (OSError, ValueError):
            continue
        if not isinstance(kept, dict) or not kept.keys() >= KEPT or str(kept["path"]).count("/") != 2:
            raise UserError(f"{path} is not a sweep as it is kept here; move it away, or name another folder")
        asked = zip((entity, project, sweep), kept["path"].split("/"), strict=True)
        if all(name in (None, known) for name, known in asked):
            return kept
    return None


def sweep_results(read: Mapping[str, Any]) -> SweepResults:
    """Makes tables of what `tracking.read_sweep` returned."""
    axes = sweep_grid(read["config"])
    whole = axes is not None
    finished = [run for run in read["runs"] if run["state"] == "finished"]
    about = [{"run_id": run["id"], "run_name": run["name"], "created_at": run["created_at"]} for run in finished]
    rows = [{**flat(run["config"]), **run["summary"], **extra} for run, extra in zip(finished, about, strict=True)]
    states = dict(Counter(run["state"] for run in read["runs"]))
    sizes = {float(bits): table for bits, table in read["tables"].items()}  # mixed precision has a mean, such as 3.27
    frame = to_frame(rows)
    if whole:  # elsewhere every run is a point of its own
        frame = latest(frame, [name for name in axes if name in frame] or list(BITS))
    grid = axes if whole and not read["config"].get("run_cap") else {}
    return SweepResults(read["path"], read["name"], read["state"], read["url"], grid, states, frame, sizes)


def sweep_grid(config: Mapping[str, Any]) -> dict[str, list[Any]] | None:
    """Parameter → its values, for those parameters of a grid that have more than one; one that is nested has a name
    with dots. None for other methods, and where another server took for a grid what cannot be listed."""
    if config.get("method") != "grid":
        return None
    try:
        axes = {".".join(path): list(values) for path, values in grid_axes(config.get("parameters") or {})}
    except BadSweep:
        return None
    return {name: values for name, values in axes.items() if len(values) > 1}


def flat(config: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """A run's configuration with nested parameters under names with dots."""
    cells: dict[str, Any] = {}
    for name, value in config.items():
        cells |= flat(value, f"{path}{name}.") if isinstance(value, Mapping) else {f"{path}{name}": value}
    return cells


def latest(frame: pd.DataFrame, keys: Sequence[str]) -> pd.DataFrame:
    """Of rows that agree in `keys` the one created last; in the order of the keys."""
    if frame.empty:
        return frame
    newest = frame.sort_values("created_at", kind="stable")
    points = newest[list(keys)].apply(lambda column: column.map(lambda value: plain(value, column.name)))
    newest = newest[~points.duplicated(keep="last")]
    return newest.sort_values(list(keys), kind="stable", key=in_order).reset_index(drop=True)


def in_order(column: pd.Series) -> pd.Series:
    """The sort key for `column`: the values themselves, or their text if they have several types."""
    values = column.map(lambda value: plain(value, column.name))
    return values if len({type(value) for value in values}) == 1 else values.map(str)


def missing_points(frame: pd.DataFrame, grid: Mapping[str, Sequence[Any]]) -> pd.DataFrame:
    """The points of `grid` (column → values; None is 32 bits) that have no row, one row each, in grid order.

    An empty grid has no missing points.
    """
    import pandas as pd

    if not grid:
        return pd.DataFrame()
    columns = [[plain(value, name) for value in frame[name]] for name in grid] if len(frame) else []
    there = set(zip(*columns, strict=True))
    points = itertools.product(*grid.values())
    missing = [p for p in points if tuple(plain(v, name) for v, name in zip(p, grid, strict=True)) not in there]
    return pd.DataFrame(missing, columns=list(grid))


def plain(value: Any, column: str) -> Any:
    """A value in the form in which two are compared: numbers as floats of twelve digits (steps of 0.1 add up to 0.3 in
    several ways), also those that a sweep gives as text, missing bits as 32."""
    if value is None or value != value:
        return float(FLOAT_BITS) if column in BITS else None
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = float(value) if math.isfinite(float(value)) else value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(f"{value:.12g}")
    return str(value)
