"""The sweep page's figures: rows in, plotly figures out, as plain JSON-able dicts. Pure functions.

A row is one finished run: {"name", "params": {...}, "values": {numeric summary keys}, "config": {...}}. They work for
any sweep. A sweep of bit widths gets this project's own figures from report.py, the ones that the notebook shows.
"""

import json
import logging
import math
import re
from collections.abc import Callable, Sequence

from .store import number

log = logging.getLogger("sweepserver")
SIZE = ("model_size_mb", "packed_bytes", "model_size", "size_mb", "num_params", "n_params", "flops", "macs")
ROWS = ("weight_quant_bits", "weight_bits")
COLUMNS = ("activation_quant_bits", "activation_bits", "act_bits")
SCALE = [[0.0, "#3b2f8f"], [0.35, "#2f7f9e"], [0.7, "#4fbf8b"], [1.0, "#f5dd4b"]]
ACCENT, MUTED, REFERENCE = "#5b6cff", "#9aa3b2", "#e0645c"


def draw(rows: Sequence[dict], metric: str | None, goal: str) -> dict[str, dict | None]:
    """The three figures of a sweep, each None where the rows have too little for it."""
    if not metric:
        return {"parallel": None, "pareto": None, "heatmap": None}
    own = {figure.__name__: _drawn(figure, rows, metric, goal) for figure in (parallel, pareto, heatmap)}
    return {**own, **reported(rows)} if metric == "test_acc_quantized" and size_key(rows) == "model_size_mb" else own


def _drawn(figure: Callable, rows: Sequence[dict], metric: str, goal: str) -> dict | None:
    """A figure, None where it fails: rows come from any program, and the page's table does not depend on it."""
    try:
        return figure(rows, metric, goal)
    except Exception:
        log.exception("a sweep's %s figure could not be drawn", figure.__name__)
        return None


def reported(rows: Sequence[dict]) -> dict[str, dict]:
    """report.py's figures of a sweep of bit widths; {} where it cannot be had or the rows are not of its kind."""
    if not all(any(name in row["config"] for name in ROWS + COLUMNS) for row in rows):
        return {}
    try:
        import report

        frame = report.to_frame([{**row["config"], **row["values"]} for row in rows])
        if frame.empty:
            return {}
        drawn = {
            "parallel": report.parallel_coordinates_figure(frame),
            "pareto": report.pareto_figure(frame),
            "heatmap": report.heatmap_figure(frame),
        }
    except ImportError:  # the server alone, without the rest of the project
        return {}
    except Exception:  # rows come from any program; the page has figures of its own
        log.exception("report.py could not draw a sweep")
        return {}
    figures = {name: json.loads(figure.to_json()) for name, figure in drawn.items()}
    for name, figure in figures.items():  # the card has the title; the figure, less to say
        figure["layout"].pop("title", None)
        figure["layout"].pop("template", None)
        margin = {"l": 60, "r": 30, "t": 70, "b": 24} if name == "parallel" else {"l": 60, "r": 20, "t": 30, "b": 50}
        figure["layout"].update(height=430 if name == "parallel" else 420, margin=margin)
    figures["pareto"]["layout"]["legend"] = {"orientation": "h", "y": -0.2}
    return figures


def parallel(rows: Sequence[dict], metric: str, goal: str = "maximize") -> dict | None:
    """A line a run through its parameters, its size where known, and the metric, which colours it."""
    rows = [row for row in rows if number(row["values"].get(metric))]
    names = varying(rows)
    if not rows or not names:
        return None
    dimensions = [_dimension(short(name), [row["params"].get(name) for row in rows]) for name in names]
    for key in ("compression_ratio_model", size_key(rows)):
        values = [row["values"].get(key) for row in rows] if key else []
        if values and all(number(v) for v in values) and len(set(values)) > 1:
            dimensions.append(_dimension(short(key), values))
    scores = [row["values"][metric] for row in rows]
    dimensions.append(_dimension(short(metric), scores))
    line = {
        "color": scores,
        "colorscale": SCALE,
        "reversescale": goal == "minimize",
        "showscale": True,
        "colorbar": {"thickness": 10, "outlinewidth": 0, "title": {"text": ""}},
    }
    trace = {"type": "parcoords", "dimensions": dimensions, "line": line, "labelangle": 0}
    return {"data": [trace], "layout": {"margin": {"l": 70, "r": 40, "t": 64, "b": 24}, "height": 400}}


def pareto(rows: Sequence[dict], metric: str, goal: str = "maximize") -> dict | None:
    """The metric against the size (the run time where no size is known), with the runs that no other beats."""
    size = size_key(rows) or "_runtime"
    points = [
        (row["values"][size], row["values"][metric], label(row), row["name"])
        for row in rows
        if number(row["values"].get(size)) and number(row["values"].get(metric))
    ]
    if not points:
        return None
    front = pareto_front([(x, y) for x, y, *_ in points], goal)
    data = [
        {
            "type": "scatter",
            "mode": "markers",
            "name": "runs",
            "x": [p[0] for p in points],
            "y": [p[1] for p in points],
            "text": [p[2] for p in points],
            "customdata": [p[3] for p in points],
            "hovertemplate": f"%{{text}}<br>{short(metric)} %{{y:.5g}}<br>{short(size)} %{{x:.5g}}<extra></extra>",
            "marker": {"size": 9, "color": ACCENT, "opacity": 0.7},
        },
        {
            "type": "scatter",
            "mode": "lines",
            "name": "Pareto front",
            "x": [points[i][0] for i in front],
            "y": [points[i][1] for i in front],
            "line": {"shape": "hv", "width": 2, "color": "#1f9d76"},
            "hoverinfo": "skip",
        },
    ]
    fp32 = [(row["values"].get("model_size_fp32_mb"), row["values"].get("test_acc_fp32")) for row in rows]
    fp32 = [pair for pair in fp32 if number(pair[0]) and number(pair[1])]
    layout = {
        "xaxis": {"title": {"text": short(size)}},
        "yaxis": {"title": {"text": short(metric)}},
        "legend": {"orientation": "h", "y": 1.12},
        "margin": {"l": 60, "r": 20, "t": 36, "b": 50},
        "height": 380,
    }
    if size == "model_size_mb" and fp32:
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": "FP32",
                "x": [fp32[0][0]],
                "y": [fp32[0][1]],
                "marker": {"symbol": "star", "size": 14, "color": REFERENCE},
                "hovertemplate": "FP32<br>%{y:.5g} at %{x:.5g} MB<extra></extra>",
            }
        )
        layout["xaxis"].update(type="log", dtick="D2")
    return {"data": data, "layout": layout}


def heatmap(rows: Sequence[dict], metric: str, goal: str = "maximize") -> dict | None:
    """The best metric for each pair of two parameters: weight x activation bits, else the first two that vary.

    Where one of the two has many values (a random search), a point a run, coloured by the metric.
    """
    rows = [row for row in rows if number(row["values"].get(metric))]
    names = varying(rows)
    y = next((name for name in ROWS if name in names), None)
    x = next((name for name in COLUMNS if name in names), None)
    if not (x and y):
        if len(names) < 2:
            return None
        y, x = sorted(names, key=lambda name: len({str(row["params"].get(name)) for row in rows}), reverse=True)[:2]
        if len({str(row["params"].get(y)) for row in rows}) > 12:
            return _cloud(rows, x, y, metric, goal)
    pick = max if goal == "maximize" else min
    cells: dict[tuple, list[float]] = {}
    for row in rows:
        key = (_hashable(row["params"].get(y)), _hashable(row["params"].get(x)))
        cells.setdefault(key, []).append(row["values"][metric])
    ys, xs = ordered({key[0] for key in cells}), ordered({key[1] for key in cells})
    z = [[pick(cells[a, b]) if (a, b) in cells else None for b in xs] for a in ys]
    text = [["" if v is None else f"{v:.4g}" for v in line] for line in z]
    trace = {
        "type": "heatmap",
        "x": [str(v) for v in xs],
        "y": [str(v) for v in ys],
        "z": z,
        "text": text,
        "texttemplate": "%{text}",
        "colorscale": SCALE,
        "reversescale": goal == "minimize",
        "xgap": 3,
        "ygap": 3,
        "colorbar": {"thickness": 10, "outlinewidth": 0},
        "hovertemplate": f"{short(y)} %{{y}}<br>{short(x)} %{{x}}<br>{short(metric)} %{{z:.5g}}<extra></extra>",
    }
    return {
        "data": [trace],
        "layout": {
            "xaxis": {"title": {"text": short(x)}, "type": "category"},
            "height": 380,
            "yaxis": {"title": {"text": short(y)}, "type": "category"},
            "margin": {"l": 60, "r": 20, "t": 36, "b": 50},
        },
    }


def _cloud(rows: Sequence[dict], x: str, y: str, metric: str, goal: str) -> dict:
    def axis(name):
        values = [row["params"].get(name) for row in rows]
        title = {"title": {"text": short(name)}}
        if not all(number(v) for v in values):
            return [short(str(v)) for v in values], {**title, "type": "category"}
        return values, {**title, "type": "log"} if min(values) > 0 and max(values) > 100 * min(values) else title

    (xs, x_axis), (ys, y_axis) = axis(x), axis(y)
    scores = [row["values"][metric] for row in rows]
    marker = {
        "size": 13,
        "color": scores,
        "colorscale": SCALE,
        "reversescale": goal == "minimize",
        "showscale": True,
        "colorbar": {"thickness": 10, "outlinewidth": 0},
        "line": {"width": 1, "color": "white"},
    }
    trace = {
        "type": "scatter",
        "mode": "markers",
        "x": xs,
        "y": ys,
        "marker": marker,
        "text": [label(row) for row in rows],
        "customdata": scores,
        "hovertemplate": f"%{{text}}<br>{short(metric)} %{{customdata:.5g}}<extra></extra>",
    }
    return {
        "data": [trace],
        "layout": {"xaxis": x_axis, "yaxis": y_axis, "height": 380, "margin": {"l": 60, "r": 20, "t": 36, "b": 50}},
    }


def curve(name: str, steps: list, values: list) -> dict:
    """One metric over the steps of a run."""
    return {
        "data": [
            {
                "type": "scatter",
                "mode": "lines" if len(values) > 1 else "markers",
                "x": steps,
                "y": values,
                "line": {"width": 2, "color": ACCENT},
                "hovertemplate": "step %{x}<br>%{y:.6g}<extra></extra>",
            }
        ],
        "layout": {
            "title": {"text": name, "font": {"size": 13}, "x": 0.02, "xanchor": "left"},
            "height": 230,
            "margin": {"l": 50, "r": 14, "t": 36, "b": 30},
            "showlegend": False,
        },
    }


def pareto_front(points: Sequence[tuple[float, float]], goal: str = "maximize") -> list[int]:
    """Indices of the points that no other beats: no smaller x has a y at least as good. In order of x."""
    sign = 1 if goal == "maximize" else -1
    best, front = -math.inf, []
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], -sign * points[i][1])):
        if sign * points[i][1] > best:
            best = sign * points[i][1]
            front.append(i)
    return front


def varying(rows: Sequence[dict]) -> list[str]:
    """The parameters that take more than one value, in order of name."""
    names = sorted({name for row in rows for name in row["params"]})
    return [name for name in names if len({str(row["params"].get(name)) for row in rows}) > 1]


def size_key(rows: Sequence[dict]) -> str | None:
    """The summary key to read as the model's size, None where there is none."""
    keys = {key for row in rows for key, value in row["values"].items() if number(value)}
    named = sorted(
        key for key in keys if re.search(r"(^|[_/.])(size|bytes|mb|params)([_/.]|$)", key, re.I) and "fp32" not in key
    )
    found = [key for key in SIZE if key in keys] + named
    return next((k for k in found if len({row["values"].get(k) for row in rows}) > 1), found[0] if found else None)


def label(row: dict) -> str:
    return ", ".join(f"{short(name)} {value}" for name, value in sorted(row["params"].items()) if value is not None)


def short(name: str) -> str:
    """A key as a person reads it; markup that plotly would interpret is taken out."""
    return re.sub(r"[<>]", "", name.replace("_quant_bits", "_bits").replace("_", " "))


def ordered(values: set) -> list:
    return sorted(values, key=lambda v: (0, v, "") if number(v) else (1, 0, str(v)))


def _dimension(name: str, values: list) -> dict:
    """An axis: numbers as they are, a few distinct ones or texts as ticks."""
    distinct = ordered(set(map(_hashable, values)))
    if all(number(v) for v in distinct):
        ticks = {"tickvals": distinct, "ticktext": [f"{v:.4g}" for v in distinct]} if len(distinct) <= 8 else {}
        if len(distinct) > 2 and distinct[0] > 0 and distinct[-1] / distinct[0] > 500:  # a learning rate: by decades
            logs = [math.log10(v) for v in values]
            tens = range(math.floor(min(logs)), math.ceil(max(logs)) + 1)
            return {"label": name, "values": logs, "tickvals": list(tens), "ticktext": [f"1e{t}" for t in tens]}
        return {"label": name, "values": values, **ticks}
    places = {value: i for i, value in enumerate(distinct)}
    texts = [short(str(value))[:24] for value in distinct]
    return {
        "label": name,
        "values": [places[_hashable(v)] for v in values],
        "tickvals": list(range(len(distinct))),
        "ticktext": texts,
    }


def _hashable(value):
    return value if isinstance(value, str | int | float | bool | type(None)) else str(value)
