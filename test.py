"""Evaluates a MobileNetV2 in FP32, quantized and packed, or over a grid of bit widths.

examples:
  python test.py                                                         the FP32 checkpoint
  python test.py --weight-bits 4 --act-bits 8                            one evaluation
  python test.py --weight-bits 4 --save-packed mnv2_w4.safetensors       and keep the packed file
  python test.py --packed mnv2_w4.safetensors                            evaluate it; no checkpoint needed
  python test.py --weight-bits 8,6,4 --act-bits 8,6,4                    a grid, and parallel_coordinates.png
  python test.py --target-size-mb 0.8 --bits-file bits.yaml              per-layer bits for the best 0.8 MB file
  python test.py --max-drop 1.0 --bits-file bits.yaml                    the smallest file, at most a point below FP32
  python test.py --bits-file bits.yaml                                   the same bits again

Weights are quantized, packed to a file, and read back from it: what is evaluated is what was packed.
"""

if __name__ == "__main__":
    import startup  # noqa: F401 - first of all, see there

import contextlib
import dataclasses
import functools
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

import bitsfile
import checkpoint as checkpoints
import data
import mixed
import results
import subject as subjects
import tracking
from allocator import keep_freed_memory
from calibration import METHODS, Plan, method_plan, quantize_network
from cli import MOST_SEED, flag, option, parse
from compression import Packed, load_packed, read_packed, save_packed, size_report
from errors import UserError, run_main
from evaluation import Score, choose_device, score
from files import check_writable, same_file
from mixed import Target
from network import Network
from quantization import ACTIVATION_RANGES, WEIGHT_RANGES, QuantizedNetwork, float_network, predictor
from sizes import SizeReport
from subject import Subject

CALIBRATION_BATCH = 128  # images in a calibration batch, whatever --batch-size is: it must not change the result
BITS_COLUMNS = ("weight_quant_bits", "activation_quant_bits")
BITS = (2, 3, 4, 5, 6, 7, 8, 32)
MIXED_BITS = (3, 4)  # mixed weights and activations take the method of uniform ones at these bits, or their own least


@dataclass(frozen=True)
class Settings:
    """The command line of test.py, and the parameters of a sweep."""

    checkpoint: Path | None = option(
        None,
        "FP32 checkpoint (default: checkpoints/mnv2_fp32_best.pth if there, else the bundled one)",
        group="what is evaluated",
    )
    packed: Path | None = option(None, "a packed file to evaluate instead of a checkpoint", group="what is evaluated")
    dataset: str | None = option(
        None,
        "data set (default: found from DATA_DIR and the checkpoint)",
        choices=data.DATASETS,
        group="what is evaluated",
    )
    data_dir: Path = option(Path("data"), "folder of the data set", group="what is evaluated")

    weight_quant_bits: tuple[int, ...] = option(
        (),
        "bits of the weights, 2 to 8, 32 for FP32; a comma list makes a grid",
        aliases=["weight_bits"],
        choices=BITS,
        group="quantization",
    )
    activation_quant_bits: tuple[int, ...] = option(
        (),
        "bits of the activations, likewise",
        aliases=["act_bits", "activation_bits"],
        choices=BITS,
        group="quantization",
    )
    weight_per_channel: bool = option(True, "one grid per output channel", group="quantization")
    weight_per_tensor: bool = option(False, "one grid per weight tensor instead", group="quantization")
    symmetric: bool = option(False, "zero-point in the middle of the weights' codes", group="quantization")
    rounding: str = option(
        "auto",
        "the method: how codes are chosen; auto: what won on validation at these bits",
        aliases=["method"],
        choices=("auto", *METHODS),
        group="quantization",
    )
    weight_range: str | None = option(None, "range of the weights' grids", choices=WEIGHT_RANGES, group="quantization")
    act_range: str | None = option(
        None, "range of the activations' grids", choices=ACTIVATION_RANGES, group="quantization"
    )
    bias_correction: bool | None = option(None, "biases that keep each layer's mean", group="quantization")
    equalize: bool | None = option(
        None, "channels of about equal range, where activations are quantized", group="quantization"
    )
    tune: bool | None = option(
        None, "scales and biases tuned with gradients on the FP32 network's logits, last", group="quantization"
    )
    edge_bits: int | None = option(
        None,
        "minimum bits of the first and last layers; 0: no exception",
        low=0,
        high=8,
        group="quantization",
    )
    calib_batches: int = option(
        4, f"batches of {CALIBRATION_BATCH} training images for calibration", low=1, group="quantization"
    )
    entropy: bool = option(False, "entropy-code the packed codes", group="quantization")

    target_size_mb: float | None = option(
        None,
        "choose per-layer bits for the best packed file of at most this many MB",
        low=0.001,
        group="mixed precision",
    )
    max_drop: float | None = option(
        None,
        "choose per-layer bits for the smallest file at most this many points below FP32 on validation images",
        low=0,
        high=100,
        group="mixed precision",
    )
    target_activation_bits: float | None = option(
        None,
        "choose per-tensor activation bits for the least harm at this many bits per element on average",
        low=2,
        high=8,
        group="mixed precision",
    )
    bits_file: Path | None = option(
        None,
        "YAML file with per-layer bits: written together with one of the flags above, otherwise read",
        group="mixed precision",
    )

    batch_size: int = option(
        256,
        "images per batch; affects speed only if weights and activations are both quantized",
        low=1,
        group="evaluation",
    )
    seed: int = option(0, "seed that draws the calibration images", low=0, high=MOST_SEED, group="evaluation")
    device: str | None = option(None, "cpu, cuda, cuda:1, mps (default: the best there is)", group="evaluation")

    output: Path = option(Path("results.csv"), "one row is added per evaluation", group="files")
    plot: Path = option(Path("parallel_coordinates.png"), "figure of a grid, and an .html beside it", group="files")
    save_packed: Path | None = option(None, "keep the packed file here", group="files")
    again: bool = option(False, "measure a grid's points again that are in OUTPUT already", group="files")
    log_wandb: bool = option(False, "report to Weights & Biases (under `wandb agent` by itself)", group="W&B")
    log_artifact: bool = option(False, "upload the packed file as an artifact", group="W&B")

    @property
    def per_channel(self) -> bool:
        return self.weight_per_channel and not self.weight_per_tensor

    @property
    def target(self) -> Target:
        return Target(self.target_size_mb, self.max_drop, self.target_activation_bits)

    @property
    def searches(self) -> bool:
        """Whether bits are to be found."""
        return self.target.layers or self.target.values

    @property
    def mixed(self) -> bool:
        return self.searches or self.bits_file is not None


@dataclass(frozen=True)
class Point:
    """One evaluation: the bits (None: FP32; mixed: their mean) and the plan that they and the other settings make."""

    weight_bits: float | None
    activation_bits: float | None
    plan: Plan
    method: str


@dataclass(frozen=True)
class Outcome:
    """A row of results.csv, the sizes behind it, the packed file while it exists, and how long reading it took."""

    row: dict[str, Any]
    sizes: SizeReport
    packed: Path
    unpack_seconds: float


@dataclass(frozen=True)
class Shared:
    """What the points of a grid share, loaded when it is first needed."""

    settings: Settings

    @functools.cached_property
    def subject(self) -> Subject:
        settings = self.settings
        if not settings.checkpoint:
            print(f"checkpoint: {subjects.default_checkpoint()}")
        return subjects.load(settings.checkpoint, settings.dataset, settings.data_dir, validation=settings.mixed)

    @functools.cached_property
    def fp32(self) -> Score:
        device = choose_device(self.settings.device)
        forward = predictor(float_network(self.subject.network), device)
        with bar("FP32", len(self.subject.test), "img") as on_batch:
            return score(forward, self.subject.test, self.settings.batch_size, device, on_batch)


def main() -> int:
    settings = parse(Settings, __doc__, sys.argv[1:])
    keep_freed_memory()
    points = [settings] if tracking.under_agent() else grid(settings)
    if not tracking.under_agent():  # where the run that is to say why it failed begins later
        choose_device(settings.device)  # fail on an unusable device before reading the data set
        results.read(settings.output)  # and on a file that is not ours
    if len(points) > 1:
        measure_grid(settings, points)
    else:
        measure(points[0])
    return 0


def measure(settings: Settings, shared: Shared | None = None) -> None:
    """Runs one evaluation (under `wandb agent` with the sweep's parameters), appends its row and reports it to W&B."""
    with tracking.run(settings, "evaluation", label, settings.log_wandb or settings.log_artifact) as tracked:
        settings = tracked.settings
        check_used(settings)
        check_targets(settings)
        shared = shared or Shared(settings)
        with tempfile.TemporaryDirectory() as folder:
            path = settings.save_packed or Path(folder) / "packed.safetensors"
            outcome = evaluate_packed(settings) if settings.packed else evaluate(settings, shared, path)
            results.append(settings.output, outcome.row)
            report_to(tracked, settings, outcome)
    tqdm.write(summary(outcome), file=sys.stdout)


def measure_grid(settings: Settings, points: Sequence[Settings]) -> None:
    """Every point that results.csv does not have yet, and the figure of all of them."""
    import report

    shared, known = Shared(settings), 0
    try:
        for point in tqdm(points, desc="grid", unit="point", disable=None):
            if not settings.again and results.has(results.read(settings.output), key(point, shared.subject)):
                known += 1
            else:
                measure(point, shared)
    except KeyboardInterrupt:
        print(f"{settings.output} has the points so far; the same command measures the rest", file=sys.stderr)
        raise
    if known:
        print(f"{known} of {len(points)} points are in {settings.output} already; --again measures them again")
    keys = [key(point, shared.subject) for point in points]  # plot only this grid's points
    rows = [row for row in results.read(settings.output) if any(results.same(row, one) for one in keys)]
    page = report.write_plots(report.to_frame(rows), settings.plot)
    print(f"wrote {settings.output}, {settings.plot} and {page}")


# ---------------------------------------------------------------------------------------------------------- the points


def grid(settings: Settings) -> list[Settings]:
    """One Settings per combination of the bits; several points cannot share one --save-packed."""
    check_used(settings)
    axes = (settings.weight_quant_bits or (32,), settings.activation_quant_bits or (32,))
    pairs = list(dict.fromkeys(itertools.product(*axes)))  # duplicates count once
    check_effect(settings)
    if len(pairs) > 1:
        if settings.save_packed or settings.packed or settings.mixed:
            given = ("save_packed", "packed", "bits_file", "target_size_mb", "max_drop", "target_activation_bits")
            name = next(flag(n) for n in given if getattr(settings, n) is not None)
            raise UserError(f"{name} goes with one pair of bits, not with a grid of {len(pairs)}")
        if settings.plot.suffix != ".png":
            raise UserError(f"--plot is {settings.plot}; expected a .png, an .html is written beside it")
        for path in (settings.plot, settings.plot.with_suffix(".html")):
            check_writable(path)
        if any(same_file(settings.output, path) for path in (settings.plot, settings.plot.with_suffix(".html"))):
            raise UserError(f"--output and --plot both write {settings.output}; give one of them another name")
    points = [dataclasses.replace(settings, weight_quant_bits=(w,), activation_quant_bits=(a,)) for w, a in pairs]
    if settings.mixed and not settings.packed:
        point_of(points[0])  # reports conflicting settings before anything is loaded
    return points


def check_used(settings: Settings) -> None:
    """UserError for a quantization flag if nothing is quantized."""
    if settings.weight_quant_bits or settings.activation_quant_bits or settings.mixed or settings.packed:
        return
    for field in dataclasses.fields(settings):
        if field.metadata["group"] == "quantization" and getattr(settings, field.name) != field.default:
            raise UserError(f"{flag(field.name)} goes with --weight-bits or --act-bits; leave it out, or add one")


def check_effect(settings: Settings) -> None:
    """UserError for a flag that changes nothing at any point of the grid."""
    given = {name for name in vars(settings) if getattr(settings, name) != getattr(Settings, name)}
    weights = any(b != 32 for b in settings.weight_quant_bits) or settings.target.layers or settings.bits_file
    values = any(b != 32 for b in settings.activation_quant_bits) or settings.target.values or settings.bits_file
    for names, used, needed in (
        (("weight_per_tensor", "symmetric", "weight_range", "entropy"), weights, "--weight-bits"),
        (("act_range", "equalize"), values, "--act-bits"),
        (("plot",), len(settings.weight_quant_bits) > 1 or len(settings.activation_quant_bits) > 1, "a list of bits"),
    ):
        for name in names:
            if name in given and not used and not settings.packed:
                raise UserError(f"{flag(name)} goes with {needed}; leave it out, or add one")


def check_targets(settings: Settings) -> None:
    """UserError, before any work, if an output cannot be written or would overwrite an input."""
    written = {"--save-packed": settings.save_packed, "--output": settings.output}
    read = {"--packed": settings.packed, "the checkpoint": settings.checkpoint or subjects.default_checkpoint()}
    (written if settings.searches else read)["--bits-file"] = settings.bits_file
    pairs = [*itertools.combinations(written.items(), 2), *itertools.product(written.items(), read.items())]
    for (one, path), (other, second) in pairs:
        if same_file(path, second):
            raise UserError(f"{one} and {other} are both {path}; give {one} another name")
    for path in filter(None, written.values()):
        check_writable(path)
    if settings.save_packed and os.path.exists(settings.save_packed):
        load_packed(settings.save_packed)  # UserError for a file of another kind: it is not replaced
    if settings.searches and settings.bits_file and os.path.exists(settings.bits_file):
        bitsfile.read(settings.bits_file)


def point_of(settings: Settings, found: tuple[dict[str, int], dict[str, int]] | None = None) -> Point:
    """The plan of one evaluation; `found`: with these bits of layers and of values, as if --bits-file held them.
    UserError for settings that do not go together."""
    bits = [settings.weight_quant_bits or (32,), settings.activation_quant_bits or (32,)]
    if any(len(b) > 1 for b in bits):
        raise UserError("a sweep run takes a single bit width, not a list; let the sweep define the grid")
    weight_bits, activation_bits = (None if b[0] == 32 else b[0] for b in bits)
    layers, values = found or (exceptions(settings, weight_bits, activation_bits) if settings.mixed else ({}, {}))
    if layers or settings.target.layers:
        weight_bits = weight_bits or max(MIXED_BITS[0], min(layers.values(), default=0))
    if values or settings.target.values:
        activation_bits = activation_bits or max(MIXED_BITS[1], min(values.values(), default=0))
    if settings.rounding == "reconstruct" and settings.tune is not None:
        raise UserError("--rounding reconstruct always tunes last; leave out --tune and --no-tune")
    names = ["weight_range"] if weight_bits else []
    names += ["act_range", "equalize"] if activation_bits else []
    names += ["bias_correction", "tune"] if weight_bits or activation_bits else []
    changes = {n: getattr(settings, n) for n in (*names, "edge_bits") if getattr(settings, n) is not None}
    plan = method_plan(settings.rounding, weight_bits, activation_bits, settings.per_channel)
    plan = dataclasses.replace(plan, symmetric=settings.symmetric, layer_bits=layers, value_bits=values, **changes)
    notes = [f"{name}={value}" for name, value in changes.items()]
    told = {"symmetric": settings.symmetric and weight_bits, "entropy": settings.entropy, "mixed": settings.mixed}
    notes += [name for name, is_so in told.items() if is_so]
    return Point(weight_bits, activation_bits, plan, "+".join([settings.rounding, *notes]))


def exceptions(
    settings: Settings, weight_bits: int | None, activation_bits: int | None
) -> tuple[dict[str, int], dict[str, int]]:
    """(bits of layers, of values) from --bits-file, where it is read. UserError where flags do not go together."""
    if settings.target_size_mb and settings.max_drop is not None:
        raise UserError("--target-size-mb and --max-drop both choose the weights' bits; give one of them")
    flags = ("--weight-bits", "--act-bits")
    found = settings.target.layers, settings.target.values
    for name, bits, searched in zip(flags, (weight_bits, activation_bits), found, strict=True):
        if bits and searched:
            raise UserError(f"{name} is what the target of mixed precision chooses; leave out {name}")
    if settings.searches:
        return {}, {}
    layers, values = bitsfile.read(settings.bits_file)
    if settings.symmetric and 1 in layers.values():
        raise UserError(f"--bits-file {settings.bits_file} has 1-bit layers; 1 bit has no middle code for --symmetric")
    return layers, values


def label(settings: Settings) -> tracking.Labels:
    """How W&B shows the run: w4a8-b128, grouped by checkpoint."""
    if settings.packed:
        path, row = settings.packed, subjects.origin(settings.packed, load_packed(settings.packed)[1])[0]
        weight_bits, activation_bits, method = (row.get(name) for name in (*BITS_COLUMNS, "method"))
    else:
        path, point = settings.checkpoint or subjects.default_checkpoint(), point_of(settings)
        weight_bits, activation_bits, method = point.weight_bits, point.activation_bits, point.method
    bits = "mixed" if settings.mixed else f"w{weight_bits or 32:g}a{activation_bits or 32:g}"
    return tracking.Labels(f"{bits}-b{settings.batch_size}", checkpoints.short_hash(path), (str(method), path.stem))


# ------------------------------------------------------------------------------------------------------ one evaluation


def evaluate(settings: Settings, shared: Shared, path: Path) -> Outcome:
    """Quantizes, packs to `path`, reads back, evaluates on the test images: one row."""
    point, subject, fp32 = point_of(settings), shared.subject, shared.fp32
    if settings.mixed and not settings.searches:
        uniform = [bits not in ((), (32,)) for bits in (settings.weight_quant_bits, settings.activation_quant_bits)]
        parts = point.plan.layer_bits, point.plan.value_bits
        bitsfile.check_names(settings.bits_file, *parts, subject.network.ops, uniform)
    begun = time.perf_counter()
    if settings.searches:
        point, quantized = searched(settings, subject, fp32, point)
    elif point.weight_bits or point.activation_bits:
        with layer_bar(subject.network) as on_layer:
            quantized = quantize_network(subject.network, calibration(settings, subject), point.plan, on_layer)
    else:
        quantized = float_network(subject.network)
    if settings.mixed:
        point = with_mean_bits(point, quantized)
    calib_seconds = time.perf_counter() - begun
    info = described(settings, subject, fp32, point)
    made = {"checkpoint": str(subject.path), "batch_size": settings.batch_size, "calib_seconds": calib_seconds}
    row = info["row"] | made
    sizes = save_packed(quantized, path, info, entropy=settings.entropy)
    assert not settings.target_size_mb or sizes.total_bytes <= settings.target_size_mb * 1e6, "the file is too large"
    packed, seconds = unpacked(path)
    row |= measured(settings, packed.network, subject.test, row["test_acc_fp32"]) | size_cells(sizes)
    return Outcome(row, sizes, path, seconds)


def described(settings: Settings, subject: Subject, fp32: Score, point: Point) -> dict[str, Any]:
    """How the packed file was made, for its header; without times or folders, so that the same network gives the same
    bytes."""
    row = {
        **identity(settings, point, subject),
        "checkpoint": subject.path.name,
        "width_mult": subject.checkpoint.architecture.width_mult,
        "test_acc_fp32": fp32.accuracy,
    }
    return {"row": row, "classes": subject.checkpoint.classes, "dataset": subject.checkpoint.dataset}


def searched(settings: Settings, subject: Subject, fp32: Score, point: Point) -> tuple[Point, QuantizedNetwork]:
    """Mixed precision: the point with the plan that was found, and the network quantized so; --bits-file is written."""
    device = choose_device(settings.device)

    def size(quantized: QuantizedNetwork) -> int:
        info = described(settings, subject, fp32, with_mean_bits(point, quantized))
        with tempfile.TemporaryDirectory() as folder:
            return save_packed(quantized, Path(folder) / "one", info, entropy=settings.entropy).total_bytes

    def validate(quantized: QuantizedNetwork) -> Score:
        return score(predictor(quantized, device), subject.validation, settings.batch_size, device)

    if settings.max_drop is not None and not len(subject.validation):
        raise UserError("--max-drop needs images to choose on, and these training images are fewer than ten")
    images, measures = calibration(settings, subject), mixed.Measures(size, validate, settings.entropy)

    def plan_of(layers: dict[str, int], values: dict[str, int]) -> Plan:
        return point_of(settings, (layers, values)).plan

    found = mixed.search(subject.network, images, plan_of, settings.target, measures, layer_bar)
    if settings.bits_file:
        title = f"Bits of each layer and activation, by test.py; method {point.method}, checkpoint {subject.hash}."
        bitsfile.write(settings.bits_file, found.plan.layer_bits, found.plan.value_bits, [title, *found.notes])
    return dataclasses.replace(point, plan=found.plan), found.network


def with_mean_bits(point: Point, quantized: QuantizedNetwork) -> Point:
    """The point with the bits an element that the network has."""
    weight_bits, activation_bits = mixed.mean_bits(quantized)
    return dataclasses.replace(point, weight_bits=weight_bits, activation_bits=activation_bits)


def evaluate_packed(settings: Settings) -> Outcome:
    """Evaluates a packed file; what was known of the FP32 network when it was packed is in its header."""
    for field in dataclasses.fields(settings):
        made = field.metadata["group"] in ("quantization", "mixed precision")
        given = getattr(settings, field.name) not in (field.default, (32,))
        if given and (made or field.name in ("checkpoint", "save_packed")):
            raise UserError(f"--packed has weights, bits and method in the file; leave out {flag(field.name)}")
    packed, seconds = unpacked(settings.packed)
    known, classes, hint = subjects.origin(settings.packed, packed.info, "test_acc_fp32")
    fp32 = known["test_acc_fp32"]
    dataset = subjects.load_data(settings.dataset, settings.data_dir, settings.packed, hint, classes)
    if known.get("dataset_crc32", dataset.crc32) != dataset.crc32:
        print("note: the FP32 network was not measured on these images: no test_acc_fp32, no drop", file=sys.stderr)
        known["test_acc_fp32"] = fp32 = None
    sizes = size_report(packed)
    row = (
        {name: None for name in results.COLUMNS}
        | known
        | {"batch_size": settings.batch_size, "dataset": dataset.name, "calib_seconds": 0.0}
        | {"dataset_crc32": dataset.crc32}
        | measured(settings, packed.network, dataset.test, fp32)
        | size_cells(sizes)
    )
    return Outcome(row, sizes, settings.packed, seconds)


def unpacked(path: Path) -> tuple[Packed, float]:
    """(the file's content, seconds to read it: the digest checked, codes unpacked or decoded)."""
    begun = time.perf_counter()
    packed = read_packed(path)
    return packed, time.perf_counter() - begun


def calibration(settings: Settings, subject: Subject) -> Tensor:
    """uint8 [N, 3, 32, 32]: training images."""
    return data.random_subset(subject.train, calib_images(settings, subject), settings.seed).images


def calib_images(settings: Settings, subject: Subject) -> int:
    return min(settings.calib_batches * CALIBRATION_BATCH, len(subject.train))


def identity(settings: Settings, point: Point, subject: Subject) -> dict[str, Any]:
    """The cells that identify the network and the images it was calibrated on."""
    quantized = point.weight_bits or point.activation_bits
    return {
        "dataset": subject.dataset,
        "checkpoint_hash": subject.hash,
        "weight_quant_bits": point.weight_bits,
        "activation_quant_bits": point.activation_bits,
        "weight_per_channel": settings.per_channel,
        "seed": settings.seed,
        "method": point.method,
        "calib_images": calib_images(settings, subject) if quantized else 0,
        "dataset_crc32": subject.dataset_crc32,
    }


def key(settings: Settings, subject: Subject) -> dict[str, Any]:
    """The cells by which results.csv knows a point (results.KEY)."""
    return identity(settings, point_of(settings), subject) | {"batch_size": settings.batch_size}


def measured(settings: Settings, network: QuantizedNetwork, test: data.Split, fp32: float | None) -> dict[str, Any]:
    """Accuracy of the packed network and evaluation time. fp32: the FP32 accuracy on these images, None if unknown."""
    device = choose_device(settings.device)
    forward = predictor(network, device)
    # Warm-up: on a CPU the threads; elsewhere all kernels, including those for the smaller last batch.
    if device.type == "cpu":
        forward(test.images[: settings.batch_size])
    else:
        score(forward, test, settings.batch_size, device)
    begun = time.perf_counter()
    with bar("evaluation", len(test), "img") as on_batch:
        quantized = score(forward, test, settings.batch_size, device, on_batch)
    seconds = time.perf_counter() - begun
    return {
        "test_acc_quantized": quantized.accuracy,
        "acc_drop": None if fp32 is None else fp32 - quantized.accuracy,
        "eval_seconds": seconds,
        "images_per_second": quantized.count / seconds,
    }


def size_cells(sizes: SizeReport) -> dict[str, Any]:
    names = (
        "model_size_fp32_mb",
        "model_size_mb",
        "compression_ratio_model",
        "compression_ratio_weights",
        "compression_ratio_activations",
    )
    return {"packed_bytes": sizes.total_bytes, **{name: getattr(sizes, name) for name in names}}


# -------------------------------------------------------------------------------------------------------------- telling


@contextlib.contextmanager
def bar(what: str, total: int, unit: str) -> Iterator[Callable[[int], object]]:
    """A progress bar, on a terminal; yields the function that moves it."""
    with tqdm(total=total, desc=what, unit=unit, leave=False, disable=None) as shown:
        yield shown.update


@contextlib.contextmanager
def layer_bar(network: Network) -> Iterator[Callable[[str], None]]:
    """The bar of the layers while they are rounded: it moves at each layer's name."""
    with bar("calibration", len(network.weighted), "layer") as update:
        yield lambda name: update(1)


def summary(outcome: Outcome) -> str:
    row = outcome.row
    bits = [row[name] or 32 for name in BITS_COLUMNS]
    drop = f"FP32 {row['test_acc_fp32']:.2f}, drop {row['acc_drop']:.2f}" if row["acc_drop"] is not None else "no FP32"
    return (
        f"w{bits[0]:g}a{bits[1]:g}: test_acc_quantized {row['test_acc_quantized']:.2f} % ({drop}), "
        f"{row['model_size_mb']:.3f} MB of {row['model_size_fp32_mb']:.3f} "
        f"({row['compression_ratio_model']:.2f}x), unpacked in {outcome.unpack_seconds:.2f} s, "
        f"{row['images_per_second']:.0f} images/s"
    )


def report_to(tracked: tracking.Untracked, settings: Settings, outcome: Outcome) -> None:
    """Reports the row and the per-layer sizes to W&B and, if requested, uploads the packed file."""
    if not tracked.tracked:
        return
    import report

    tracked.summary(outcome.row)
    tracked.table(report.SIZE_TABLE, report.size_table(outcome.sizes))
    if settings.log_artifact:
        name = f"mnv2-{label(settings).name}"
        made_from = None if settings.packed else settings.checkpoint or subjects.default_checkpoint()
        tracked.artifact(outcome.packed, name, outcome.row, made_from)


if __name__ == "__main__":
    run_main(main)
