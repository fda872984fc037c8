"""What each part of train.py's recipe is worth: the default run, and runs that differ from it in one thing.

A change is a flag of train.py without its dashes, or several with a plus between ("lr 0.2", "cutout 8 + dropout 0.1");
`default` changes nothing. Flags after `--` are passed to train.py in all runs. Every run is evaluated only at its end,
so that none benefits from choosing an epoch; changes are compared on validation images, and test images only report. A
row is saved as soon as its run ends, an interrupted run is resumed, and rows that exist are not trained again: those of
the same flags, change, seed and validation images.

python benchmarks/recipe.py --seeds 0,1,2 -- --data-dir D --device cuda --compile        300 epochs each: on a GPU
python benchmarks/recipe.py --changes default,"lr 0.2" -- --data-dir D --width-mult 0.35 --epochs 10 --bf16     a CPU
"""

import dataclasses
import functools
import shlex
import statistics
import sys
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from tables import spread

import checkpoint as checkpoints
import data
import results
import train
from allocator import keep_freed_memory
from cli import option, parse, to_argv
from errors import UserError, run_main
from evaluation import choose_device, device_name
from files import check_writable, write_between
from interrupts import Interrupted
from subject import split_as_trained

HERE = Path(__file__).resolve().parent
DEFAULT = "default"
CHANGES = (
    *(DEFAULT, "lr 0.05", "lr 0.2", "batch-size 64", "warmup-epochs 0", "scheduler constant", "weight-decay 0.0001"),
    *("label-smoothing 0", "no-flip", "pad 0", "cutout 8", "dropout 0.2", "ema-decay 0.999"),
)
KEY = ("flags", "change", "seed", "val_crc32")
COLUMNS = ("flags", "change", "seed", "val_acc", "test_acc", "minutes", "device", "val_crc32")
BEGIN, END = "<!-- recipe: written by benchmarks/recipe.py -->", "<!-- end of recipe -->"


@dataclass(frozen=True)
class Settings:
    """The command line of recipe.py, up to `--`."""

    changes: tuple[str, ...] = option(CHANGES, "what is changed, one run (and seed) each")
    seeds: tuple[int, ...] = option((0,), "of weights, split, order and augmentation", low=0)
    runs: Path = option(Path("runs/recipe"), "folder of the runs' checkpoints, logs and states")
    output: Path = option(HERE / "recipe.csv", "one row for each run")
    page: Path = option(HERE.parent / "README.md", "the table is written there, between its markers")


def main() -> int:
    own, common = split_at_dashes(sys.argv[1:])
    settings = parse(Settings, __doc__, own)
    keep_freed_memory()
    for path in (settings.output, settings.page):
        check_writable(path)
    runs = [(change, seed, run_settings(settings, common, change, seed)) for change, seed in order(settings)]
    flags = shown_flags(parse(train.Settings, "", common))
    rows = results.read(settings.output, COLUMNS)
    try:
        for change, seed, run in runs:
            point = {"flags": flags, "change": change, "seed": seed, "val_crc32": val_digest(run)}
            if not results.has(rows, point, KEY):
                print(f"{change}, seed {seed}: {train.command(run)}", flush=True)
                rows = results.append(settings.output, point | measured(run), COLUMNS)
    except Interrupted as stop:
        print("interrupted; the same command goes on")
        return 128 + stop.number
    rows = [row for row in rows if row["flags"] == flags]
    runs = [run_settings(settings, common, row["change"], int(row["seed"])) for row in rows]
    content = page([row for row, run in zip(rows, runs, strict=True) if row["val_crc32"] == val_digest(run)])
    write_between(settings.page, BEGIN, END, content)
    print(content)
    return 0


def split_at_dashes(argv: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
    """(flags of this program, flags of train.py)."""
    at = argv.index("--") if "--" in argv else len(argv)
    return argv[:at], argv[at + 1 :]


def order(settings: Settings) -> list[tuple[str, int]]:
    """Every change at the first seed, then at the next one: what is cut short is a table of fewer seeds."""
    return [(change, seed) for seed in settings.seeds for change in settings.changes]


def run_settings(settings: Settings, common: Sequence[str], change: str, seed: int) -> train.Settings:
    """train.py's settings of one run; UserError for a change that is no flags of train.py."""
    parts = [] if change == DEFAULT else change.split("+")
    extra = [word for part in parts for word in f"--{part.strip()}".split()]
    try:
        run = parse(train.Settings, "", [*common, *extra])
        flags = shown_flags(parse(train.Settings, "", common))
    except UserError as error:
        raise UserError(f"--changes {change!r} or what follows --: {error}") from None
    if not run.val_size:
        raise UserError("--val-size 0 leaves no images to tell the changes apart with; leave it out")
    digest = f"{zlib.crc32(flags.encode()):08x}"  # a table of other flags has files of its own
    name = settings.runs / f"{change.replace(' ', '_')}_seed{seed}_{digest}.safetensors"
    files = dict(save_path=name, log_file=name.with_suffix(".log"), resume=True)
    return dataclasses.replace(run, seed=seed, eval_every=run.epochs, **files)


def shown_flags(common: train.Settings) -> str:
    """The flags of all runs that decide their results, as text: by it a row is found again."""
    defaults = {name: getattr(train.Settings(), name) for name in (*train.FREE - {"max_minutes"}, "seed")}
    return shlex.join(to_argv(dataclasses.replace(common, **defaults)))


def val_digest(run: train.Settings) -> str:
    """CRC-32 of the run's validation images, as its checkpoint will name it: it tells data sets and splits apart."""
    names = ("dataset", "data_dir", "val_size", "seed", "checkpoint", "qat")
    return digest_of(train.Settings(**{name: getattr(run, name) for name in names}))


@functools.cache
def digest_of(run: train.Settings) -> str:
    dataset = data.load(run.dataset or data.default_name(run.data_dir), run.data_dir)
    first = checkpoints.load(run.checkpoint) if run.checkpoint else None
    fine_tuned = run.qat and first is not None
    val = split_as_trained(first, dataset.train)[1] if fine_tuned else train.split(run, dataset, first)[1]
    return data.split_checksum(val)


def measured(run: train.Settings) -> dict[str, object]:
    """Trains, or goes on with, one run: the cells of its row. UserError where the run that is there, finished, is of
    other images."""
    torch._dynamo.reset()  # compiled code of the run before, which counts against torch's limit
    metrics = train.train(run).metrics
    if metrics["val_crc32"] != val_digest(run):
        raise UserError(f"{run.save_path} was trained on other images; give another --runs, or delete it and its state")
    shown = {name: metrics[name] for name in ("val_acc", "test_acc", "minutes", "val_crc32")}
    return shown | {"device": device_name(choose_device(run.device))}


def page(rows: Sequence[Mapping[str, str]]) -> str:
    """Markdown: accuracies of each change, best on validation first, and how far it is from the default run of the same
    seeds; mean ± standard deviation where there are several."""
    default = {row["seed"]: float(row["val_acc"]) for row in rows if row["change"] == DEFAULT}
    cells = []
    for change in dict.fromkeys(row["change"] for row in rows):
        mine = [row for row in rows if row["change"] == change]
        val, test = ([float(row[name]) for row in mine] for name in ("val_acc", "test_acc"))
        gains = [float(row["val_acc"]) - default[row["seed"]] for row in mine if row["seed"] in default]
        gain = f"{statistics.mean(gains):+.2f}" if gains and change != DEFAULT else ""
        cells.append((statistics.mean(val), f"| {change} | {spread(val)} | {gain} | {spread(test)} | {len(mine)} |"))
    lines = [f"`train.py {rows[0]['flags']}`:", "", "| changed | validation, % | to default | test, % | seeds |"]
    lines += ["|---|---:|---:|---:|---:|", *(line for _, line in sorted(cells, key=lambda cell: -cell[0]))]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_main(main)
