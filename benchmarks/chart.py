"""Accuracy over bytes on disk, ours and the peers', as one figure: accuracy_per_byte.png; and every run as
parallel_coordinates.png.

Ours: the rows of a results file (mean over seeds) by the method `auto`, the same with entropy coding and mixed
precision, and the plain method. The others: peers.csv, of the same checkpoint. A panel each for activations of 8 and
of 4 bits. Points below the axis range are drawn as arrows at the lower edge, labelled with their accuracy.

python benchmarks/chart.py
"""

import itertools
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import peers
import tables

import report
import results
from cli import option, parse
from errors import run_main
from report import ACCURACY, ACTIVATIONS, FP32_ACCURACY, SIZE, WEIGHTS

if TYPE_CHECKING:
    import pandas as pd

HERE = Path(__file__).resolve().parent
PANELS = (8, 4)  # bits of the activations
LOWEST = 72.0  # percent; what is less accurate is told in words
OURS = {  # name of a line → its methods
    "ours": ("auto",),
    "ours, entropy coding": ("auto+entropy",),
    "ours, mixed bits and entropy coding": ("auto+entropy+mixed",),
    "ours, plain method": ("plain",),
}
STYLES = {  # color, marker, line
    "ours": ("#1d4e89", "o", "-"),
    "ours, entropy coding": ("#1d4e89", "d", "-"),
    "ours, mixed bits and entropy coding": ("#1d4e89", "*", "-"),
    "ours, plain method": ("#7f9fc4", "o", ":"),
    "onnxruntime": ("#c2410c", "s", "--"),
    "nncf": ("#444444", "D", "--"),
    "aimet": ("#2a9d8f", "^", "--"),
    "brevitas": ("#e9a23b", "v", "--"),
    "quanto": ("#6d3fa0", "P", "--"),
    "torchao": ("#6a994e", "X", "--"),
}


@dataclass(frozen=True)
class Settings:
    """The command line of chart.py."""

    results: Path = option(HERE / "results_cifar10.csv", "results file of test.py, of one checkpoint")
    peers: Path = option(HERE / "peers.csv", "what peers.py measured for that checkpoint")
    figure: Path = option(HERE / "accuracy_per_byte.png", "where the figure goes")
    runs: Path = option(HERE / "parallel_coordinates.png", "where the figure of all rows of RESULTS goes")


@dataclass(frozen=True)
class Point:
    """One measured file. bits: of the weights, as text."""

    size: float  # MB of 10^6 bytes
    accuracy: float  # percent
    bits: str


Series = Mapping[str, Sequence[Point]]  # name of a line → its points by falling size


def main() -> None:
    settings = parse(Settings, __doc__, sys.argv[1:])
    frame = tables.read_one_checkpoint(settings.results)
    subject = {name: frame[name].iloc[0] for name in ("checkpoint_hash", "dataset_crc32")}
    measured = results.read(settings.peers, peers.COLUMNS, "--peers")
    rows = [row for row in measured if results.same(row, subject, list(subject))]
    draw([{**ours(frame, bits), **others(rows, bits)} for bits in PANELS], frame[FP32_ACCURACY].iloc[0], settings)
    report.parallel_coordinates_png(frame, settings.runs)
    print(f"wrote {settings.figure} and {settings.runs}")


def ours(frame: "pd.DataFrame", activations: int) -> dict[str, list[Point]]:
    """Our lines at that width of the activations; means over seeds."""
    frame = frame[(frame[ACTIVATIONS] == activations) & frame["weight_per_channel"]]
    lines = {}
    for name, methods in OURS.items():
        means = frame[frame["method"].isin(methods)].groupby(["method", WEIGHTS])[[SIZE, ACCURACY]].mean()
        lines[name] = by_size([Point(size, accuracy, f"{i[1]:g}") for i, size, accuracy in means.itertuples()])
    return lines


def others(rows: Sequence[Mapping[str, str]], activations: int) -> dict[str, list[Point]]:
    """The peers' lines at that width of the activations, without what failed or has no file of its own size."""
    lines: dict[str, list[Point]] = {}
    for row in rows:
        weights, values = row["bits"].split("/")
        measured = not row["error"] and row["stored"] == peers.QUANTIZED
        if row["tool"] in peers.OFFERED and values == str(activations) and measured:
            point = Point(int(row["bytes"]) / 1e6, float(row["accuracy"]), weights)
            lines.setdefault(row["tool"], []).append(point)
    return {tool: by_size(points) for tool, points in lines.items()}


def by_size(points: Sequence[Point]) -> list[Point]:
    return sorted(points, key=lambda point: -point.size)


def draw(panels: Sequence[Series], fp32: float, settings: Settings) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FormatStrFormatter, NullFormatter

    figure = Figure(figsize=(13, 5.6), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels), sharex=True, sharey=True)
    sizes = [point.size for lines in panels for points in lines.values() for point in points]
    for ax, bits, lines in zip(axes, PANELS, panels, strict=True):
        ax.axhline(fp32, color=report.REFERENCE, linewidth=1, linestyle=(0, (1, 2)))
        ax.annotate(
            f"FP32 {fp32:.2f} %", (1, fp32), xycoords=("axes fraction", "data"), xytext=(-4, 4),
            textcoords="offset points", ha="right", fontsize=10, color=report.REFERENCE,
        )  # fmt: skip
        for name in [name for name in STYLES if lines.get(name)]:
            draw_line(ax, name, lines[name])
        ax.set_xscale("log")
        ax.set_xlim(0.87 * min(sizes), 1.12 * max(sizes))
        ax.set_ylim(LOWEST, fp32 + 1.2)
        ax.set_xticks([tick for tick in (0.4, 0.6, 1, 1.5, 2.5, 4, 6, 9) if tick < 1.12 * max(sizes)])
        ax.xaxis.set_major_formatter(FormatStrFormatter("%g"))
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.grid(alpha=0.25)
        ax.set_title(f"activations of {bits} bits", fontsize=13, color="#222222")
        ax.set_xlabel("MB on disk (numbers at the points: bits of a weight)", fontsize=11)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("test accuracy, %", fontsize=11)
    handles = {label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    axes[0].legend(handles.values(), handles, loc="lower right", fontsize=10, frameon=False)
    report.write_figure(figure, settings.figure)


def draw_line(ax: Any, name: str, points: Sequence[Point]) -> None:
    """The points that the figure reaches, joined, with their bits; arrows for those below it."""
    color, marker, line = STYLES[name]
    first = name.startswith("ours") and line == "-"
    shown = [p for p in points if p.accuracy >= LOWEST]
    style = dict(color=color, marker=marker, linestyle=line, zorder=4 if first else 3)
    width, size = (2.2, 7) if first else (1.0, 6)
    ax.plot([p.size for p in shown], [p.accuracy for p in shown], label=name, linewidth=width, markersize=size, **style)
    for p in shown:
        above = dict(xytext=(0, 9), ha="center") if first else dict(xytext=(7, -4), ha="left")
        ax.annotate(p.bits, (p.size, p.accuracy), textcoords="offset points", fontsize=9, color=color, **above)
    below = [p for p in points if p.accuracy < LOWEST]
    for _, group in itertools.groupby(below, key=lambda p: round(10 * math.log(p.size))):  # about one size, one text
        told = list(group)
        ax.plot([told[0].size], [LOWEST + 0.5], color=color, marker="v", markersize=7, linestyle="none")
        text = "\n".join(f"{p.bits}: {p.accuracy:.0f} %" for p in told)
        place = dict(textcoords="offset points", xytext=(0, 8), ha="center", va="bottom")
        ax.annotate(text, (told[0].size, LOWEST + 0.5), fontsize=9, color=color, **place)


if __name__ == "__main__":
    run_main(main)
