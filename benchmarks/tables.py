"""Writes the tables of README.md and benchmarks/README.md from results that test.py measured: no number by hand.

    python benchmarks/tables.py

Means and standard deviations are over the rows that differ in the seed alone (of the choice of calibration images).
"""

import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import report
from cli import option, parse
from errors import UserError, run_main
from files import write_between
from report import ACCURACY, ACTIVATIONS, FP32_ACCURACY, RATIO, SIZE, WEIGHTS

if TYPE_CHECKING:
    import pandas as pd

HERE = Path(__file__).resolve().parent
GRID = (8, 6, 4, 2)
# Points below FP32 at most, post-training, for weights/activations.
AIMS = {"8/8": 0.1, "6/8": 0.1, "4/8": 0.4, "3/8": 1.0, "2/8": 3.0, "8/4": 1.5, "6/6": 0.3, "4/4": 2.0, "2/4": 5.0}
AIMS |= {"2/2": 25.0}

BEYOND = {  # method → what README.md calls it
    "auto": "other bits",
    "auto+entropy": "entropy coding (`--entropy`, lossless)",
    "auto+entropy+mixed": "mixed precision, entropy coding (`--max-drop`)",
    "reconstruct": "`--rounding reconstruct --calib-batches 8`",
    "qat": "fine-tuned (`train.py --qat`)",
}


@dataclass(frozen=True)
class Settings:
    """The command line of tables.py."""

    results: Path = option(HERE / "results_cifar10.csv", "results file of test.py, of one checkpoint")
    second: Path = option(HERE / "results_second.csv", "the same of the network that the fine-tuned files are of")
    first: Path = option(HERE / "results_first.csv", "the same of the network on which the methods were chosen")
    readme: Path = option(HERE.parent / "README.md", "gets the tables of accuracies and of what goes beyond")
    page: Path = option(HERE / "README.md", "gets the tables of points below FP32 and of entropy-coded files")


def main() -> None:
    settings = parse(Settings, __doc__, sys.argv[1:])
    frame = read_one_checkpoint(settings.results)
    second = read_one_checkpoint(settings.second, "--second")
    first = read_one_checkpoint(settings.first, "--first")
    write_table(settings.readme, "accuracies", accuracies(frame))
    write_table(settings.readme, "beyond", beyond(with_fine_tuned(frame, second)))
    write_table(settings.page, "drops", drops(frame))
    write_table(settings.page, "drops of the second network", drops(second))
    write_table(settings.page, "drops of the first network", drops(first))
    write_table(settings.page, "entropy-coded files", coded([frame, second, first]))


def with_fine_tuned(frame: "pd.DataFrame", earlier: "pd.DataFrame") -> "pd.DataFrame":
    """`frame` and, at bits where it has none of its own, the fine-tuned files of an earlier network."""
    import pandas as pd

    files = pd.concat([table[table["method"] == "qat"] for table in (frame, earlier)])
    files = files.drop_duplicates([WEIGHTS, ACTIVATIONS])
    return pd.concat([frame[frame["method"] != "qat"], files], ignore_index=True)


def write_table(page: Path, name: str, table: str) -> None:
    begin = f"<!-- {name}: written by benchmarks/{Path(__file__).name} -->"
    write_between(page, begin, f"<!-- end of {name} -->", table)


def read_one_checkpoint(path: Path, flag: str = "--results") -> "pd.DataFrame":
    """The frame of the results file that `flag` names; UserError unless its rows are of one checkpoint and data set."""
    frame = report.read_results(path)
    for column, several in (("checkpoint_hash", "checkpoints"), ("dataset_crc32", "data sets")):
        if not report.unique(frame, column):
            raise UserError(f"{flag} {path} has several {several} (see its column {column}); keep the rows of one")
    return frame


def of(frame: "pd.DataFrame", weights: int, activations: int, method: str) -> "pd.DataFrame":
    """The rows of one method at one pair of bits: one for each seed and number of calibration images."""
    return frame[(frame[WEIGHTS] == weights) & (frame[ACTIVATIONS] == activations) & (frame["method"] == method)]


def spread(numbers: Sequence[float]) -> str:
    """mean, ± standard deviation where there are several."""
    mean = f"{statistics.mean(numbers):.2f}"
    return f"{mean} ± {statistics.stdev(numbers):.2f}" if len(numbers) > 1 else mean


def accuracies(frame: "pd.DataFrame") -> str:
    """Test accuracy at 4 x 4 pairs of bits, in brackets that of the plain method; bytes at 8-bit activations."""
    lines = [f"| weights \\ activations, bits | {' | '.join(map(str, GRID))} | packed file | compression |"]
    lines.append("|---" * (len(GRID) + 3) + "|")
    for weights in GRID:
        cells = []
        for activations in GRID:
            ours, plain = (of(frame, weights, activations, method)[ACCURACY] for method in ("auto", "plain"))
            cells.append((f"**{spread(ours)}**" if len(ours) else "") + (f" ({spread(plain)})" if len(plain) else ""))
        sizes = of(frame, weights, GRID[0], "auto")
        cells += [f"{sizes[SIZE].mean():.3f} MB", f"{sizes[RATIO].mean():.2f}×"] if len(sizes) else ["", ""]
        lines.append(f"| {weights} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def beyond(frame: "pd.DataFrame") -> str:
    """What goes beyond the table of accuracies: other widths and methods, one row each; means over seeds."""
    lines = ["| | weights, bits | activations | accuracy, % | below FP32 | packed file | compression |"]
    lines.append("|---|---|---|---:|---:|---:|---:|")
    for method, name in BEYOND.items():
        rows = frame[(frame["method"] == method) & ~(frame[WEIGHTS].isin(GRID) & (method == "auto"))]
        for (weights, activations), part in rows.groupby([WEIGHTS, ACTIVATIONS]):
            mean = f"{weights:.2f} on average" if "mixed" in method else f"{weights:g}"
            fp32 = part[FP32_ACCURACY].iloc[0]
            of_which = f" of a network of {fp32:.2f} %" if fp32 != frame[FP32_ACCURACY].iloc[0] else ""
            lines.append(
                f"| {name}{of_which} | {mean} | {activations:g} | {spread(part[ACCURACY])} "
                f"| {spread(part[FP32_ACCURACY] - part[ACCURACY])} | {part[SIZE].mean():.3f} MB "
                f"| {part[RATIO].mean():.2f}× |"
            )
    return "\n".join(lines) + "\n"


def drops(frame: "pd.DataFrame") -> str:
    """Points below FP32 by each method that was measured, beside the aim."""
    names = dict.fromkeys(frame["method"])
    methods = [m for m in names if "+" not in m and m != "qat"]  # post-training, with nothing changed by flags
    counts = [sorted({int(n) for n in frame[frame["method"] == m]["calib_images"] if n}) for m in methods]
    heads = [f"{m}, {' or '.join(map(str, n))} images" for m, n in zip(methods, counts, strict=True)]
    lines = ["| w/a | aim | " + " | ".join(heads) + " |", "|---" * (len(methods) + 2) + "|"]
    for pair, aim in AIMS.items():
        weights, activations = map(int, pair.split("/"))
        rows = [of(frame, weights, activations, method) for method in methods]
        cells = [spread(part[FP32_ACCURACY] - part[ACCURACY]) if len(part) else "" for part in rows]
        lines.append(f"| {pair} | {aim} | {' | '.join(cells)} |")
    lines += ["", f"FP32 {frame[FP32_ACCURACY].iloc[0]:.2f} %."]
    return "\n".join(lines) + "\n"


def coded(frames: "Sequence[pd.DataFrame]") -> str:
    """Every entropy-coded file of each network (a frame each), the smallest first."""
    lines = ["| FP32, % | bits of weights | of activations | bytes | smaller than FP32 | points below FP32 |"]
    lines.append("|---:" * 6 + "|")
    for frame in frames:
        rows = frame[frame["method"].str.contains("entropy")].sort_values("packed_bytes")
        for row in rows.to_dict("records"):
            mean = f"{row[WEIGHTS]:.2f} on average" if "mixed" in row["method"] else f"{row[WEIGHTS]:g}"
            lines.append(
                f"| {row[FP32_ACCURACY]:.2f} | {mean} | {row[ACTIVATIONS]:g} | {row['packed_bytes']:,.0f} "
                f"| {row[RATIO]:.2f} times | {row[FP32_ACCURACY] - row[ACCURACY]:.2f} |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_main(main)
