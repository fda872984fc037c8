"""Results as tables and figures: one row per measured configuration, columns named as in results.csv.

Shared by test.py (its plot), the notebook and `make sweep`. A frame comes from a file (`read_results`), from rows
(`to_frame`) or from a W&B sweep (`sweepresults.fetch_sweep`). pandas, plotly and matplotlib cost seconds to
import, so each function imports what it needs. Sizes are in MB of 10^6 bytes, accuracies in percent.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errors import UserError, reason
from files import write_bytes

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from plotly.graph_objects import Figure

    from sizes import SizeReport

WEIGHTS, ACTIVATIONS, ACCURACY = "weight_quant_bits", "activation_quant_bits", "test_acc_quantized"
SIZE, RATIO, FP32_SIZE, FP32_ACCURACY = (
    "model_size_mb",
    "compression_ratio_model",
    "model_size_fp32_mb",
    "test_acc_fp32",
)
BITS = (WEIGHTS, ACTIVATIONS)
FLOAT_BITS = 32  # an empty cell of a bits column
NUMBERS = (
    *("width_mult", "batch_size", "seed", FP32_ACCURACY, ACCURACY, "acc_drop", FP32_SIZE, SIZE, "packed_bytes", RATIO),
    *("compression_ratio_weights", "compression_ratio_activations", "calib_seconds", "eval_seconds"),
    "images_per_second",
)
SIZE_TABLE = "size_by_layer"  # the name of the size table in a W&B run
COLORS = ("#c2410c", "#e9a23b", "#8fbf6a", "#2a9d8f", "#1d4e89")  # accuracy, low to high; the best are the darkest
LEVEL_COLORS = ("#c2410c", "#e9a23b", "#6a994e", "#2a9d8f", "#3b6fb6", "#6d3fa0", "#444444", "#999999")  # for bits
REFERENCE = "#666666"
PLOTLY_SETTINGS = {"displaylogo": False, "responsive": True, "modeBarButtonsToRemove": ["sendChartToCloud"]}


# --------------------------------------------------------------------------------------------------------------- tables


def to_frame(rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Rows as a frame with results.csv's columns typed: bits whole numbers (empty = 32), numbers float64.

    Rows without an accuracy are dropped; missing columns are filled with NaN.
    """
    import pandas as pd

    frame = pd.DataFrame([dict(row) for row in rows])
    for name in (*BITS, *NUMBERS):
        frame[name] = pd.to_numeric(frame[name], errors="coerce").astype(float) if name in frame else math.nan
    unmeasured = frame[ACCURACY].isna() & frame[list(BITS)].isna().all(axis=1)
    frame[ACCURACY] = frame[ACCURACY].where(~unmeasured, frame[FP32_ACCURACY])  # FP32 itself, not quantized
    for name in BITS:
        bits = frame[name].fillna(FLOAT_BITS)
        frame[name] = bits.astype(int) if (bits % 1 == 0).all() else bits  # mixed precision has a mean, such as 3.27
    return frame[frame[ACCURACY].notna()].reset_index(drop=True)


def read_results(path: Path) -> pd.DataFrame:
    """The frame of a results.csv."""
    import pandas as pd

    try:
        text = dict.fromkeys(("checkpoint_hash", "dataset_crc32"), str)  # eight hex digits may look like a number
        return to_frame(pd.read_csv(path, dtype=text).to_dict("records"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; test.py writes it, see --output") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a table that test.py wrote ({reason(error)})") from None


def configuration(weight_bits: float, activation_bits: float) -> str:
    """The short name of a pair of bit widths: w4a8, w4a32, or FP32 where neither is quantized."""
    return "FP32" if weight_bits == activation_bits == FLOAT_BITS else f"w{weight_bits:g}a{activation_bits:g}"


def names(frame: pd.DataFrame) -> list[str]:
    """Each row's configuration."""
    return [configuration(w, a) for w, a in zip(frame[WEIGHTS], frame[ACTIVATIONS], strict=True)]


def pareto_front(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows that no other row beats: none is at most as large and more accurate, or smaller and as accurate.

    Sorted by size; of equal rows the first is kept.
    """
    ordered = frame[frame[SIZE].notna()].sort_values([SIZE, ACCURACY], ascending=[True, False], kind="stable")
    best_before = ordered[ACCURACY].cummax().shift(fill_value=-math.inf)
    return ordered[ordered[ACCURACY] > best_before]


def batch_effect(frame: pd.DataFrame) -> pd.DataFrame:
    """Per configuration: the batch sizes it ran with, and how accuracy and speed varied with them.

    `spread` is the highest minus the lowest accuracy in points. Each image is evaluated by itself on frozen ranges,
    so it should be 0; configurations that ran with only one batch size are left out.
    """
    import pandas as pd

    others = ["dataset", "dataset_crc32", "checkpoint", "checkpoint_hash", "width_mult", "weight_per_channel"]
    others += ["seed", "method", "calib_images"]  # what may differ beside the batch
    keys = [*BITS, *(name for name in others if name in frame and frame[name].nunique(dropna=False) > 1)]
    rows = []
    for key, group in frame.groupby(keys, dropna=False):
        if group["batch_size"].nunique() < 2:
            continue
        speed = group.groupby("batch_size")["images_per_second"].mean()
        rows.append(
            dict(zip(keys, key, strict=True))
            | {
                "configuration": configuration(*key[:2]),
                "batch_sizes": ", ".join(f"{size:.0f}" for size in sorted(group["batch_size"].unique())),
                "lowest": group[ACCURACY].min(),
                "highest": group[ACCURACY].max(),
                "spread": group[ACCURACY].max() - group[ACCURACY].min(),
                "images_per_second": ", ".join("-" if math.isnan(s) else f"{s:.0f}" for s in speed),
            }
        )
    columns = ["configuration", *keys[2:], "batch_sizes", "lowest", "highest", "spread", "images_per_second"]
    return pd.DataFrame(rows, columns=columns)


MILESTONES = (  # title, bits of the weights (None: any), of the activations from and to
    ("FP32", FLOAT_BITS, FLOAT_BITS, FLOAT_BITS),
    ("w8a8", 8, 8, 8),
    ("w6a8", 6, 8, 8),
    ("w4a8", 4, 8, 8),
    ("a ≤ 4", None, 0, 4),
)


def milestones(frame: pd.DataFrame) -> pd.DataFrame:
    """The headline configurations (FP32, w8a8, w6a8, w4a8, best with a ≤ 4 bits) and the accuracy reached at each.

    A row is a configuration by one method: the mean over its runs; of several the most accurate. If FP32 was not
    measured itself, it is filled in from another row's reference.
    """
    import pandas as pd

    by = [*BITS, *(name for name in ("method", "weight_per_channel") if name in frame)]
    numbers = [ACCURACY, FP32_ACCURACY, SIZE, RATIO]
    rows = []
    for title, weight_bits, low, high in MILESTONES:
        found = frame[frame[ACTIVATIONS].between(low, high)]
        found = found if weight_bits is None else found[found[WEIGHTS] == weight_bits]
        row = {"configuration": title, "run": "not run", "runs": len(found)}
        if len(found):
            means = found.groupby(by, dropna=False)[numbers].mean().reset_index()
            best = means.loc[means[ACCURACY].idxmax()]
            row["run"] = configuration(best[WEIGHTS], best[ACTIVATIONS])
            row |= {"accuracy": best[ACCURACY], "drop": best[FP32_ACCURACY] - best[ACCURACY]}
            row |= {"size_mb": best[SIZE], "compression": best[RATIO]}
        elif title == "FP32" and frame[FP32_ACCURACY].notna().any():
            best = frame.loc[frame[FP32_ACCURACY].idxmax()]
            row |= {"run": "reference of the others", "accuracy": best[FP32_ACCURACY], "drop": 0.0}
            row |= {"size_mb": best[FP32_SIZE], "compression": 1.0}
        rows.append(row)
    columns = ["configuration", "run", "accuracy", "drop", "size_mb", "compression", "runs"]
    return pd.DataFrame(rows, columns=columns)


def size_table(sizes: SizeReport) -> list[dict[str, Any]]:
    """One row per layer and one for the rest of the file; all `_bytes` columns together add up to the file's size."""
    rows = [{**dataclasses.asdict(row), "other_bytes": 0} for row in sizes.rows]
    rest = sizes.total_bytes - sum(row.total_bytes for row in sizes.rows)
    empty = {name: 0 for name in rows[0]}
    return [*rows, {**empty, "name": "grids, tables, header", "kind": "file", "other_bytes": rest}]


# ------------------------------------------------------------------------------------------------- parallel coordinates


@dataclass(frozen=True)
class Axis:
    """One axis of the parallel coordinates: places [rows] in 0 … 1 from the bottom, ticks (place, text)."""

    label: str
    places: np.ndarray
    ticks: tuple[tuple[float, str], ...]
    ordinal: bool


def parallel_axes(frame: pd.DataFrame) -> list[Axis]:
    """ActBits and WeightBits as levels at equal distances; ratio and size on log scales, accuracy on a linear one."""
    return [
        level_axis("ActBits", frame[ACTIVATIONS]),
        level_axis("WeightBits", frame[WEIGHTS]),
        number_axis("CompressionRatio", frame[RATIO], log=True, unit="×"),
        number_axis("ModelSizeMB", frame[SIZE], log=True),
        number_axis("QuantAcc", frame[ACCURACY]),
    ]


def level_axis(label: str, values: pd.Series) -> Axis:
    levels = sorted(values.unique())
    places = {level: (i + 0.5) / len(levels) for i, level in enumerate(levels)}
    return Axis(label, values.map(places).to_numpy(float), tuple((places[v], f"{v:g}") for v in levels), True)


def number_axis(label: str, values: pd.Series, log: bool = False, unit: str = "") -> Axis:
    """Between the smallest and the largest value, on a log scale by choice where all are positive."""
    numbers = values.to_numpy(float)
    low, high = float(values.min()), float(values.max())
    log = log and low > 0
    transform = math.log if log else float
    if not high > low:
        text = f"{low:.4g}{unit}" if low == low else "unknown"
        return Axis(label, 0 * numbers + 0.5, ((0.5, text),), False)
    start, span = transform(low), transform(high) - transform(low)
    places = [0.03 + 0.94 * (transform(v) - start) / span for v in numbers]
    ticks = log_ticks(low, high) if log else linear_ticks(low, high)
    shown = tuple((0.03 + 0.94 * (transform(t) - start) / span, f"{t:.4g}{unit}") for t in ticks)
    import numpy as np

    return Axis(label, np.array(places), shown, False)


def linear_ticks(low: float, high: float, most: int = 9) -> list[float]:
    """At most `most` round numbers at equal steps within [low, high]; [low] where that is one place."""
    if not high > low:
        return [low]
    step = 10.0 ** math.floor(math.log10((high - low) / most))
    step *= next(m for m in (1, 2, 2.5, 5, 10, 20) if (high - low) / (step * m) <= most - 1)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 10) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers within [low, high] for a log scale: the finest series that has at most 9 of them."""
    for steps in ((1, 1.2, 1.5, 1.8, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 9), (1, 1.5, 2, 3, 4, 5, 7), (1, 2, 5), (1,)):
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = [float(f"{s * 10.0**d:.10g}") for d in decades for s in steps]
        ticks = [t for t in ticks if low * 0.9999 <= t <= high * 1.0001]
        if len(ticks) <= 9:
            break
    return ticks if len(ticks) > 1 else linear_ticks(low, high, 5)


def spread(axes: Sequence[Axis], index: int) -> np.ndarray:
    """Places on axis `index`, with lines that would coincide there spread apart slightly, ordered by where they lead.

    Levels have room; on a number axis a bundle stays within 4 % of the axis. The accuracies stay as they are.
    """
    import numpy as np

    axis, moved = axes[index], axes[index].places.copy()
    if index == len(axes) - 1:
        return moved
    order = np.lexsort((axes[-1].places, sum(axes[i].places for i in (index - 1, index + 1) if i >= 0)))
    widest = 0.45 / len(axis.ticks) if axis.ordinal else 0.04
    bundles = np.zeros(len(moved), int)  # places closer than 1 % of the axis to the next one are one bundle
    by_place = np.argsort(axis.places, kind="stable")
    bundles[by_place[1:]] = np.cumsum(np.diff(axis.places[by_place]) > 0.01)
    for bundle in range(bundles.max() + 1):
        members = order[bundles[order] == bundle]
        width = min(widest, 0.008 * (len(members) - 1))
        members = members[np.isfinite(axis.places[members])]
        if not len(members):
            continue
        moved[members] = axis.places[members].mean() + np.linspace(-width / 2, width / 2, len(members))
    return moved


def heading(frame: pd.DataFrame) -> str:
    """What the rows are of, for a title: data set, and FP32 accuracy where they agree on it."""
    parts = [f"MobileNetV2 on {frame['dataset'].iloc[0]}"] if unique(frame, "dataset") else ["MobileNetV2"]
    if unique(frame, FP32_ACCURACY):
        parts.append(f"FP32 {frame[FP32_ACCURACY].iloc[0]:.2f} %")
    return ", ".join([*parts, f"{len(frame)} runs"])


def unique(frame: pd.DataFrame, column: str) -> bool:
    return column in frame and frame[column].nunique(dropna=False) == 1 and frame[column].notna().all()


def need_rows(frame: pd.DataFrame) -> None:
    if frame.empty:
        raise UserError("there are no results to draw; run test.py on at least one configuration first")


def parallel_coordinates_png(frame: pd.DataFrame, path: Path) -> None:
    """The parallel coordinates as a PNG; needs no browser and no display."""
    import numpy as np
    from matplotlib import patheffects
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.cm import ScalarMappable
    from matplotlib.collections import LineCollection
    from matplotlib.colors import LinearSegmentedColormap, Normalize
    from matplotlib.figure import Figure

    need_rows(frame)
    axes = parallel_axes(frame)
    places = np.stack([spread(axes, i) for i in range(len(axes))], axis=1)  # [rows, axes]
    t = np.linspace(0, 1, 40)
    ease = t * t * (3 - 2 * t)  # curves cross each axis at a right angle, so lines can be followed across it
    pieces = [places[:, i, None] * (1 - ease) + places[:, i + 1, None] * ease for i in range(len(axes) - 1)]
    x = np.concatenate([i + t for i in range(len(axes) - 1)])
    curves = np.stack([np.broadcast_to(x, (len(frame), len(x))), np.concatenate(pieces, axis=1)], axis=2)

    accuracy = frame[ACCURACY].to_numpy(float)
    order = np.argsort(accuracy, kind="stable")  # the best are drawn last, on top
    margin = 0.5 if accuracy.max() == accuracy.min() else 0.0
    scale = Normalize(accuracy.min() - margin, accuracy.max() + margin)
    colors = LinearSegmentedColormap.from_list("accuracy", COLORS)

    figure = Figure(figsize=(13, 6.4), facecolor="white")
    FigureCanvasAgg(figure)
    ax = figure.add_axes((0.045, 0.06, 0.85, 0.76))
    widths = 1.3 if len(frame) > 60 else 1.9
    lines = LineCollection(curves[order], cmap=colors, norm=scale, linewidths=widths, alpha=0.85, capstyle="round")
    lines.set_array(accuracy[order])
    ax.add_collection(lines)
    halo = [patheffects.withStroke(linewidth=3.5, foreground="white")]
    for i, axis in enumerate(axes):
        ax.plot([i, i], [0, 1], color="#333333", linewidth=1.1, zorder=3)
        ax.text(i, 1.045, axis.label, ha="center", va="bottom", fontsize=14, fontweight="bold", color="#222222")
        for place, text in axis.ticks:
            ax.plot([i - 0.012, i + 0.012], [place, place], color="#333333", linewidth=1.1, zorder=3)
            side = -1 if axis is not axes[-1] else 1
            ax.text(
                i + 0.025 * side, place, text, ha="right" if side < 0 else "left", va="center", fontsize=12,
                color="#222222", zorder=4, path_effects=halo,
            )  # fmt: skip
    ax.set_xlim(-0.16, len(axes) - 1 + 0.22)
    ax.set_ylim(-0.02, 1.02)
    ax.axis("off")
    bar = figure.colorbar(ScalarMappable(scale, colors), cax=figure.add_axes((0.905, 0.077, 0.014, 0.728)))
    bar.set_label("accuracy of the quantized model, %", fontsize=12)
    bar.ax.tick_params(labelsize=11)
    bar.outline.set_visible(False)
    figure.text(0.045, 0.945, heading(frame), fontsize=15, color="#222222")

    write_figure(figure, Path(path))


def write_figure(figure: Any, path: Path) -> None:
    from io import BytesIO

    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    write_bytes(path, buffer.getvalue())


def color_scale() -> list[list[Any]]:
    return [[i / (len(COLORS) - 1), color] for i, color in enumerate(COLORS)]


def parallel_coordinates_figure(frame: pd.DataFrame) -> Figure:
    """The same, interactive: drag along an axis to pick runs, drag an axis to move it."""
    from plotly import graph_objects as go

    need_rows(frame)
    axes = parallel_axes(frame)
    dimensions = [
        dict(
            label=axis.label,
            values=spread(axes, i),
            range=[0, 1],
            tickvals=[place for place, _ in axis.ticks],
            ticktext=[text for _, text in axis.ticks],
        )
        for i, axis in enumerate(axes)
    ]
    bar = dict(title=dict(text="accuracy, %", side="right"), thickness=14, outlinewidth=0)
    line = dict(color=frame[ACCURACY], colorscale=color_scale(), showscale=True, colorbar=bar)
    figure = go.Figure(go.Parcoords(dimensions=dimensions, line=line, labelfont_size=15, tickfont_size=12))
    figure.update_layout(
        title=heading(frame), height=540, margin=dict(l=60, r=40, t=130, b=30), template="plotly_white"
    )
    return figure


# ---------------------------------------------------------------------------------------------------------- the figures


def pareto_figure(frame: pd.DataFrame) -> Figure:
    """Accuracy against size, a colour for each width of the activations; the Pareto front and FP32 drawn."""
    from plotly import graph_objects as go

    need_rows(frame)
    figure = go.Figure()
    front = pareto_front(frame)
    figure.add_scatter(
        x=front[SIZE], y=front[ACCURACY], mode="lines+text", name="Pareto front", text=names(front),
        textposition="top left", line=dict(shape="hv", color="#222222", width=1.5), hoverinfo="skip",
    )  # fmt: skip
    details = ["batch_size", "seed", "acc_drop", RATIO]
    hover = (
        "<b>%{text}</b><br>%{y:.2f} % at %{x:.3f} MB<br>%{customdata[3]:.2f}× smaller, drop %{customdata[2]:.2f}"
        "<br>batch %{customdata[0]}, seed %{customdata[1]}<extra></extra>"
    )
    for bits in sorted(frame[ACTIVATIONS].unique()):
        part = frame[frame[ACTIVATIONS] == bits]
        name = f"{bits:g}-bit activations" if bits < FLOAT_BITS else "FP32 activations"
        color = LEVEL_COLORS[-1] if bits == FLOAT_BITS else LEVEL_COLORS[(int(bits) - 2) % len(LEVEL_COLORS)]
        marker = dict(size=10, color=color, line=dict(width=1, color="white"))
        figure.add_scatter(
            x=part[SIZE], y=part[ACCURACY], mode="markers", name=name, marker=marker, text=names(part),
            customdata=part[details], hovertemplate=hover,
        )  # fmt: skip
    for size, accuracy in {(s, a) for s, a in zip(frame[FP32_SIZE], frame[FP32_ACCURACY], strict=True) if a == a}:
        figure.add_hline(accuracy, line=dict(color=REFERENCE, width=1, dash="dash"))
        figure.add_scatter(
            x=[size], y=[accuracy], mode="markers", name="FP32",
            marker=dict(symbol="star", size=14, color=REFERENCE),
            hovertemplate="FP32<br>%{y:.2f} % at %{x:.3f} MB<extra></extra>",
        )  # fmt: skip
    known = [size for size in (*frame[SIZE], *frame[FP32_SIZE]) if size == size]
    ticks = log_ticks(min(known), max(known)) if known else []
    axis = dict(title="model size, MB (all included)", type="log", tickvals=ticks, ticktext=[f"{t:g}" for t in ticks])
    figure.update_layout(
        title="Accuracy against size", xaxis=axis, yaxis_title="test accuracy, %", height=520, template="plotly_white"
    )
    return figure


def heatmap_figure(frame: pd.DataFrame) -> Figure:
    """Mean accuracy for each pair of weight bits (down) and activation bits (across)."""
    from plotly import graph_objects as go

    need_rows(frame)
    table = frame.pivot_table(index=WEIGHTS, columns=ACTIVATIONS, values=ACCURACY, aggfunc="mean").sort_index()
    texts = [["" if v != v else f"{v:.2f}" for v in row] for row in table.to_numpy()]
    figure = go.Figure(
        go.Heatmap(
            z=table.to_numpy(),
            x=[f"a{bits:g}" for bits in table.columns],
            y=[f"w{bits:g}" for bits in table.index],
            text=texts,
            texttemplate="%{text}",
            textfont_size=14,
            colorscale=color_scale(),
            colorbar=dict(title=dict(text="accuracy, %", side="right"), outlinewidth=0),
            hovertemplate="%{y}%{x}: %{z:.2f} %<extra></extra>",
            xgap=3,
            ygap=3,
        )
    )
    figure.update_layout(
        title="Mean test accuracy, %: weight bits × activation bits",
        xaxis=dict(title="activation bits", type="category", showgrid=False),
        yaxis=dict(title="weight bits", type="category", showgrid=False),
        height=460,
        template="plotly_white",
    )
    return figure


def sizes_figure(sizes: Sequence[Mapping[str, Any]] | pd.DataFrame, title: str = "Size by layer") -> Figure:
    """Bytes of each layer of a packed model, stacked by kind: every column of the size table that ends in `_bytes`."""
    import pandas as pd
    from plotly import graph_objects as go

    table = pd.DataFrame(sizes)
    if table.empty:
        raise UserError("there is no size table to draw; its run logged none")
    kinds = [name for name in table if name.endswith("_bytes") and table[name].sum()]
    figure = go.Figure()
    for kind, color in zip(kinds, LEVEL_COLORS[::-1] if len(kinds) > 6 else COLORS[::-1], strict=False):
        figure.add_bar(
            x=table["name"], y=table[kind] / 1000, name=kind.removesuffix("_bytes").replace("_", " "),
            marker_color=color, hovertemplate="%{x}<br>%{y:.3f} kB<extra>%{fullData.name}</extra>",
        )  # fmt: skip
    total = sum(table[kind].sum() for kind in kinds)
    figure.update_layout(
        title=f"{title}: {total / 1e6:.3f} MB", barmode="stack", yaxis_title="kB", height=520, template="plotly_white",
        xaxis=dict(tickangle=-90, tickfont_size=9),
    )  # fmt: skip
    return figure


def write_plots(frame: pd.DataFrame, png_path: Path) -> Path:
    """Writes the parallel coordinates as PNG and, beside it, an interactive page; returns the page's path.

    The page holds plotly.js from the installed package, so it opens without a network.
    """
    from plotly.io import to_html

    parallel_coordinates_png(frame, png_path)
    figures = [parallel_coordinates_figure(frame), pareto_figure(frame), heatmap_figure(frame)]
    settings = dict(full_html=False, config=PLOTLY_SETTINGS)
    parts = [to_html(figure, include_plotlyjs=i == 0, **settings) for i, figure in enumerate(figures)]
    page = "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width"><title>Bit widths and accuracy</title>',
            "<style>body{margin:1rem auto;max-width:80rem;font-family:sans-serif}</style></head><body>",
            *parts,
            "</body></html>",
        ]
    )
    html_path = Path(png_path).with_suffix(".html")
    write_bytes(html_path, page.encode())
    return html_path
