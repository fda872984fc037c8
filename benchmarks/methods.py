"""Every method at every pair of bits: accuracy, drop, seconds, over several seeds of the calibration images.

Choices are made with `--split val` (the images that chose the checkpoint, never calibrated on); `--split test` is for
reporting. Rows go to a CSV as they come, and points already there are not measured again. Beside the accuracy stands
KL(FP32 || quantized) of the predicted classes, in nats: it tells methods apart with far fewer images.

    python benchmarks/methods.py --split val --weight-bits 4,2 --act-bits 8,4,2 --seeds 0
    python benchmarks/methods.py --split test --methods plain,auto --seeds 0,1,2
"""

import dataclasses
import itertools
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tables import spread
from torch import Tensor

import data
import results
from allocator import keep_freed_memory
from calibration import Plan, method_plan, quantize_network
from checkpoint import DEFAULT_CHECKPOINT
from cli import option, parse
from errors import UserError, run_main
from evaluation import divergence
from files import check_writable
from quantization import QuantizedNetwork, float_network, predictor
from subject import load
from test import BITS

CD = dict(rounding="cd", bias_correction=True)
VARIANTS = {
    "nearest": dict(act_range="mse"),
    "nearest+bc": dict(bias_correction=True),
    "gptq+bc": dict(rounding="gptq", bias_correction=True),
    "cd": dict(rounding="cd"),
    "cd+bc": CD,
    "cd+bc+edge": dict(**CD, edge_bits=8),
    "cd+bc+eq": dict(**CD, equalize=True),
    "cd+bc+eq+edge": dict(**CD, equalize=True, edge_bits=8),
    "cd+bc+eq+edge+tune": dict(**CD, equalize=True, edge_bits=8, tune=True),
}
POINT = ("checkpoint_hash", "split", "weight_bits", "activation_bits", "method", "seed", "calib_images", "images")
POINT += ("dataset_crc32",)
COLUMNS = (*POINT[:-1], "accuracy", "fp32", "kl", "seconds", POINT[-1])


@dataclass(frozen=True)
class Settings:
    """The command line of methods.py."""

    checkpoint: Path = option(DEFAULT_CHECKPOINT, "FP32 checkpoint")
    dataset: str = option("folder", "data set", choices=data.DATASETS)
    data_dir: Path = option(Path("data"), "folder of the data set")
    split: str = option("val", "images that are evaluated", choices=("val", "test"))
    limit: int = option(0, "evaluate only so many of them; 0: all", low=0)
    weight_bits: tuple[int, ...] = option((8, 6, 4, 2), "bits of the weights; 32: FP32", choices=BITS)
    act_bits: tuple[int, ...] = option((8, 6, 4, 2), "bits of the activations; 32: FP32", choices=BITS)
    methods: tuple[str, ...] = option(("plain", "auto"), f"plain, auto, reconstruct, {', '.join(VARIANTS)}")
    seeds: tuple[int, ...] = option((0,), "of the calibration images", low=0)
    calib_images: int = option(512, "training images for calibration", low=32)
    output: Path = option(Path("benchmarks/methods.csv"), "one row per measurement")


def plan_of(method: str, weight_bits: int | None, activation_bits: int | None) -> Plan:
    if method in VARIANTS:
        return dataclasses.replace(Plan(weight_bits, activation_bits), **VARIANTS[method])
    try:
        return method_plan(method, weight_bits, activation_bits)
    except ValueError:
        raise UserError(f"--methods has {method!r}; expected plain, auto, reconstruct, {', '.join(VARIANTS)}") from None


def main() -> None:
    settings = parse(Settings, __doc__, sys.argv[1:])
    keep_freed_memory()
    check_writable(settings.output)
    for method in settings.methods:
        plan_of(method, 8, 8)  # a name that is none is told before the first measurement
    rows = results.read(settings.output, COLUMNS)
    subject = load(settings.checkpoint, settings.dataset, settings.data_dir)
    network, split = subject.network, {"val": subject.validation, "test": subject.test}[settings.split]
    split = data.random_subset(split, settings.limit, seed=0) if settings.limit else split  # of all classes
    exact = logits_of(float_network(network), split)
    fp32 = accuracy(exact, split)
    print(f"FP32 on {len(split)} {settings.split} images: {fp32:.2f} %", flush=True)
    pairs = itertools.product(settings.weight_bits, settings.act_bits)
    for (weight_bits, act_bits), method, seed in itertools.product(pairs, settings.methods, settings.seeds):
        cells = (subject.hash, settings.split, weight_bits, act_bits, method, seed)
        cells += (settings.calib_images, len(split), subject.dataset_crc32)
        point = dict(zip(POINT, map(str, cells), strict=True))
        if results.has(rows, point, POINT):
            continue
        images = data.random_subset(subject.train, settings.calib_images, seed).images
        begun = time.perf_counter()
        plan = plan_of(method, *(None if b == 32 else b for b in (weight_bits, act_bits)))
        quantized = quantize_network(network, images, plan)
        seconds = time.perf_counter() - begun
        logits = logits_of(quantized, split)
        reached, kl = accuracy(logits, split), float(divergence(logits, exact))
        row = point | {"accuracy": f"{reached:.3f}", "fp32": f"{fp32:.3f}", "kl": f"{kl:.4f}"}
        rows = results.append(settings.output, row | {"seconds": f"{seconds:.1f}"}, COLUMNS)
        print(
            f"w{weight_bits}a{act_bits} {method} seed {seed}: {reached:.2f} % "
            f"(drop {fp32 - reached:.2f}, KL {kl:.4f}, {seconds:.0f} s)",
            flush=True,
        )
    alike = (subject.hash, subject.dataset_crc32, settings.split, str(settings.calib_images), str(len(split)))
    names = ("checkpoint_hash", "dataset_crc32", "split", "calib_images", "images")
    print(table([row for row in rows if tuple(row[name] for name in names) == alike]))


def logits_of(network: QuantizedNetwork, split: data.Split) -> Tensor:
    """float64 [N, classes], of the network on integers."""
    return predictor(network)(split.images).double()


def accuracy(logits: Tensor, split: data.Split) -> float:
    return 100.0 * float((logits.argmax(1) == split.labels).double().mean())


def table(rows: list[dict[str, str]]) -> str:
    """Markdown: points below FP32, mean ± deviation over the seeds, and KL; a row a method, a column a pair."""
    pairs = sorted({(int(r["weight_bits"]), int(r["activation_bits"])) for r in rows}, reverse=True)
    lines = ["| method | " + " | ".join(f"{w}/{a}" for w, a in pairs) + " |", "|---" * (len(pairs) + 1) + "|"]
    for method in dict.fromkeys(r["method"] for r in rows):
        cells = []
        for w, a in pairs:
            found = [
                r for r in rows if (r["method"], r["weight_bits"], r["activation_bits"]) == (method, str(w), str(a))
            ]
            drops = [float(r["fp32"]) - float(r["accuracy"]) for r in found]
            kl = f" (KL {statistics.mean(float(r['kl']) for r in found):.3f})" if found else ""
            cells.append(f"{spread(drops)}{kl}" if drops else "")
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    run_main(main)
