"""The same network through other quantizers, side by side with ours: accuracy, bytes on disk, time.

    pip install -r benchmarks/requirements-peers-export.txt
    python benchmarks/peers.py                            everything; what peers.csv has already is not run again
    python benchmarks/peers.py --tools quanto --bits 4/8 --limit-test 500 --output trial.csv --page trial.md

All see the same FP32 checkpoint, calibration images (those that test.py draws), images to choose settings with (held
out of training by the checkpoint) and test images. The tools conflict, so each has its own environment, made from
requirements-peers-TOOL.txt when first needed, and runs there as a process of its own (peer_worker.py): one that fails
is reported and does not stop the others. Everything runs in one thread, and times are CPU seconds of that thread rather
than wall-clock time, so other work on the machine hardly affects them.
"""

import dataclasses
import datetime
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

import data
import results
import subject as subjects
import test
from calibration import quantize_network
from checkpoint import Checkpoint, build_model
from cli import option, parse
from compression import load_packed, save_packed
from errors import UserError, run_main
from evaluation import Score, score
from files import check_writable, write_between
from quantization import float_network, predictor
from subject import Subject

HERE = Path(__file__).resolve().parent
# The bit widths (weights/activations, 32: FP32) that each tool offers for convolutions.
OFFERED = {
    "onnxruntime": ("8/8", "4/8", "8/4", "4/4"),
    "nncf": ("8/8", "8/32"),
    "aimet": ("8/8", "6/8", "6/6", "4/8", "8/4", "4/4"),
    "brevitas": ("8/8", "6/8", "6/6", "4/8", "3/8", "2/8", "8/4", "4/4", "2/4", "2/2"),
    "quanto": ("8/8", "4/8", "2/8", "8/32", "4/32", "2/32"),
    "torchao": ("8/8", "4/8"),
}
BITS = ("8/8", "6/8", "4/8", "3/8", "2/8", "8/4", "6/6", "4/4", "2/4", "2/2", "8/32", "4/32", "2/32")
OURS = {"ours": "auto", "ours-plain": "plain"}  # the name in the table → --rounding of test.py
FP32 = "FP32 network"
# The value of `stored` if the measured file holds quantized weights; any other text says what it holds instead.
QUANTIZED = "quantized"
WORKS = 50.0  # percent; below this a tool's recipe has failed, and comparing with it is meaningless
BEGIN, END = "<!-- peers: written by peers.py -->", "<!-- end of peers -->"

COLUMNS = (
    "tool",
    "version",
    "bits",
    "settings",
    "accuracy",
    "bytes",
    "quantize_seconds",
    "images_per_second",
    "arithmetic",
    "note",
    "error",
    "checkpoint_hash",
    "calibration_images",
    "validation_images",
    "test_images",
    "seed",
    "machine",
    "beside",
    "date",
    "dataset_crc32",
    "stored",
)
# One measurement's name. The data set counts with its images: the same checkpoint on others is another measurement.
SAME = ("tool", "bits", "checkpoint_hash", "dataset_crc32", "calibration_images", "test_images", "seed")


@dataclass(frozen=True)
class Settings:
    """The command line of peers.py."""

    checkpoint: Path | None = option(None, "FP32 checkpoint (default: test.py's)")
    dataset: str | None = option(None, "data set (default: test.py's)", choices=data.DATASETS)
    data_dir: Path = option(Path("data"), "folder of the data set")
    tools: tuple[str, ...] = option((*OURS, *OFFERED), "which to run", choices=(*OURS, *OFFERED))
    bits: tuple[str, ...] = option(BITS, "weights/activations; each tool runs those it offers", choices=BITS)
    calib_images: int = option(512, "training images for calibration", low=1)
    val_images: int = option(1000, "held-out training images that choose between a tool's settings", low=1)
    limit_test: int | None = option(None, "use so many random test images (default: all), for a trial", low=1)
    adaround_iterations: int = option(1000, "of AIMET's AdaRound for each layer; 0: nearest only", low=0)
    gptq_images: int = option(256, "calibration images for Brevitas's GPTQ; 0: nearest only", low=0)
    seed: int = option(0, "of the choice of images", low=0)
    minutes: float = option(120.0, "time limit for one tool at one pair of bits", low=0.1)
    venvs: Path = option(Path(".venvs-peers"), "folder of the tools' environments and of the exported network")
    output: Path = option(HERE / "peers.csv", "one row for each measurement")
    page: Path = option(HERE / "README.md", "the table is written there, between its markers")
    beside: str = option("nothing", "what else ran on the machine, for the record")
    again: bool = option(False, "measure again what OUTPUT has already")


@dataclass(frozen=True)
class Material:
    """What every tool gets."""

    subject: Subject
    parts: Mapping[str, data.Split]  # calibration, validation, test


def main() -> None:
    settings = parse(Settings, __doc__, sys.argv[1:])
    torch.set_num_threads(1)
    for path in (settings.output, settings.page):
        check_writable(path)
    rows = results.read(settings.output, COLUMNS)
    material = load(settings)
    common = {
        "checkpoint_hash": material.subject.hash,
        "dataset_crc32": material.subject.dataset_crc32,
        "seed": settings.seed,
        **{f"{part}_images": len(split) for part, split in material.parts.items()},
        "machine": machine(),
        "beside": settings.beside,
    }
    for tool, bits in points(settings):
        row = {**common, "tool": tool, "bits": bits}
        if not settings.again and results.has([old for old in rows if not old["error"]], row, SAME):
            continue
        print(f"{tool} {bits} ...", flush=True)
        if tool in (*OURS, FP32):
            fp32 = next((float(old["accuracy"]) for old in rows if old["tool"] == FP32 and fits(old, common)), None)
            measured = ours(material, tool, bits, fp32)
        else:
            measured = peer(settings, material, tool, bits)
        row |= measured | {"date": datetime.date.today().isoformat()}
        rows = results.append(settings.output, dict.fromkeys(COLUMNS) | row, COLUMNS, replaces=SAME)
        write_between(settings.page, BEGIN, END, page([r for r in rows if fits(r, common)]))
        print(measured.get("error") or f"  {measured['accuracy']:.2f} %, {measured['bytes']:,} bytes", flush=True)
    content = page([r for r in rows if fits(r, common)])
    write_between(settings.page, BEGIN, END, content)
    print(content)


def points(settings: Settings) -> list[tuple[str, str]]:
    """(tool, bits): the FP32 network first, then pair by pair, ours before the others."""
    tools = [t for t in (*OURS, *OFFERED) if t in settings.tools]
    pairs = [b for b in BITS if b in settings.bits]
    return [(FP32, "32/32")] + [(t, b) for b in pairs for t in tools if t in OURS or b in OFFERED[t]]


def load(settings: Settings) -> Material:
    """Checkpoint and images, drawn as test.py draws them; a limited test set is drawn at random."""
    subject = subjects.load(settings.checkpoint, settings.dataset, settings.data_dir)
    if not len(subject.validation):
        raise UserError(f"{subject.path} held no images out of training to choose with; train with --val-size")
    limit = settings.limit_test
    parts = {
        "calibration": data.random_subset(subject.train, settings.calib_images, settings.seed),
        "validation": data.random_subset(subject.validation, settings.val_images, settings.seed),
        "test": data.random_subset(subject.test, limit, settings.seed) if limit else subject.test,
    }
    return Material(subject, parts)


# --------------------------------------------------------------------------------------------------------------- ours


def ours(material: Material, tool: str, bits: str, fp32: float | None) -> dict[str, Any]:
    """Quantized, packed, read back and evaluated with test.py's parts, as test.py does it. fp32: the FP32 network's
    accuracy, which the file's header holds; None where that is what is measured."""
    pair = tuple(int(b) for b in bits.split("/"))
    choice = test.Settings(
        weight_quant_bits=pair[:1], activation_quant_bits=pair[1:], rounding=OURS.get(tool, test.Settings().rounding)
    )
    point = test.point_of(choice)
    begun = time.process_time()
    if tool == FP32:
        quantized = float_network(material.subject.network)
    else:
        quantized = quantize_network(material.subject.network, material.parts["calibration"].images, point.plan)
    seconds = time.process_time() - begun
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "packed.safetensors"
        known = Score(fp32 or 0.0, 0.0, len(material.parts["test"]))
        sizes = save_packed(quantized, path, test.described(choice, material.subject, known, point))
        forward = predictor(load_packed(path)[0])
    split = material.parts["test"]
    forward(split.images[:256])
    begun = time.process_time()
    result = score(forward, split, 256, "cpu")
    return {
        "version": f"torch {torch.__version__}",
        "settings": "" if tool == FP32 else f"test.py --rounding {OURS[tool]}",
        "accuracy": result.accuracy,
        "bytes": sizes.total_bytes,
        "quantize_seconds": seconds,
        "images_per_second": result.count / (time.process_time() - begun),
        "arithmetic": "float" if pair[1] == 32 else "integers in float32",
        "stored": QUANTIZED,
    }


# -------------------------------------------------------------------------------------------------------------- others


def peer(settings: Settings, material: Material, tool: str, bits: str) -> dict[str, Any]:
    """What the worker of `tool` replies, or {"error": one line}."""
    try:
        python = environment(settings.venvs, tool)
        work = export(settings, material)
        reply = work / f"{tool}-{bits.replace('/', '-')}.json"
        reply.unlink(missing_ok=True)
        log = reply.with_suffix(".log")
        command = [python, HERE / "peer_worker.py", work.resolve(), tool, *bits.split("/"), reply.resolve()]
        with open(log, "wb") as out:
            subprocess.run(
                [str(part) for part in command],
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
                timeout=settings.minutes * 60,
                check=True,
            )
        return json.loads(reply.read_text())
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {settings.minutes:g} minutes"}
    except subprocess.CalledProcessError as error:
        return {"error": last_line(log) if error.cmd[0] == str(python) else "cannot be installed"}


def last_line(log: Path) -> str:
    """The last line that a failed process wrote, cut to the length of a table's cell; paths from this folder on."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return " ".join((lines or ["it ended without any output"])[-1].split()).replace(f"{Path.cwd()}{os.sep}", "")[:160]


def environment(folder: Path, tool: str) -> Path:
    """The Python of the tool's environment, made when its requirements are new."""
    requirements = HERE / f"requirements-peers-{tool}.txt"
    home = (folder / tool).resolve()
    python, stamp = home / "bin" / "python", home / "requirements.sha256"
    digest = hashlib.sha256(requirements.read_bytes()).hexdigest()
    if not stamp.is_file() or stamp.read_text() != digest:
        print(f"  making {home} from {requirements.name}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
        subprocess.run([str(home / "bin" / "pip"), "install", "-q", "-r", str(requirements)], check=True)
        stamp.write_text(digest)
    return python


def export(settings: Settings, material: Material) -> Path:
    """The neutral folder that workers read; made once for a checkpoint and a choice of images."""
    sizes = "-".join(str(len(split)) for split in material.parts.values())
    images = f"{material.subject.dataset_crc32}-{sizes}-{settings.seed}"
    folder = settings.venvs / "work" / f"{material.subject.hash}-{images}"
    folder.mkdir(parents=True, exist_ok=True)
    options = folder / "options.json"
    if not options.exists():
        checkpoint = material.subject.checkpoint
        for part, split in material.parts.items():
            np.save(folder / f"{part}.npy", checkpoint.normalization(split.images).contiguous().numpy())
            np.save(folder / f"{part}_labels.npy", split.labels.numpy())
        torch.save(checkpoint.state, folder / "fp32.pth")
        architecture = dataclasses.asdict(checkpoint.architecture)
        (folder / "architecture.json").write_text(json.dumps(architecture))
        export_onnx(checkpoint, folder / "fp32.onnx")
    slow = {name: getattr(settings, name) for name in ("adaround_iterations", "gptq_images")}
    options.write_text(json.dumps(slow))
    return folder


def export_onnx(checkpoint: Checkpoint, path: Path) -> None:
    """Opset 17 by the tracing exporter, which folds batch norm into the convolutions."""
    try:
        torch.onnx.export(
            build_model(checkpoint),
            (torch.zeros(1, 3, data.SIZE, data.SIZE),),
            str(path),
            opset_version=17,
            dynamo=False,
            input_names=["input"],
            output_names=["logits"],
            dynamic_axes={"input": {0: "batch"}, "logits": {0: "batch"}},
        )
    except torch.onnx.OnnxExporterError as error:
        raise UserError(f"{error}; pip install -r benchmarks/requirements-peers-export.txt") from None


# ------------------------------------------------------------------------------------------------------- rows and page


def fits(row: Mapping[str, str], common: Mapping[str, Any]) -> bool:
    """Whether a row belongs to the present checkpoint and images: only such rows stand in one table."""
    return results.same(row, common, [name for name in SAME if name in common])


def machine() -> str:
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return f"{model}, {os.cpu_count()} cores, one thread"


def page(rows: Sequence[Mapping[str, str]]) -> str:
    """The Markdown of both tables and of what they rest on, from rows of one checkpoint."""
    fp32 = next(float(r["accuracy"]) for r in rows if r["tool"] == FP32)
    order = {name: i for i, name in enumerate((FP32, *OURS, *OFFERED))}
    rows = sorted(rows, key=lambda r: (("32/32", *BITS).index(r["bits"]), order[r["tool"]]))
    first, choices = rows[0], {r["validation_images"]: None for r in rows}
    lines = [
        f"Checkpoint {first['checkpoint_hash']}, FP32 {fp32:.2f} %; {first['calibration_images']} calibration "
        f"images, {' or '.join(choices)} to choose settings with, {first['test_images']} test images. "
        f"{machines(rows)}; beside: {'; '.join(sorted({r['beside'] for r in rows}))}.",
        "",
        "| w/a | tool | settings | accuracy, % | drop | bytes on disk | s to quantize | images/s | arithmetic |",
        "|---|---|---|---:|---:|---:|---:|---:|---|",
        *(table_line(r, fp32) for r in rows),
        "",
        "| w/a | ours, % | best other, % | ahead by | ours, bytes | smallest other, bytes |",
        "|---|---:|---:|---:|---:|---:|",
        *filter(None, (verdict(rows, bits) for bits in BITS)),
        "",
        "Versions: " + "; ".join(sorted({r["version"] for r in rows if r["version"]})) + ".",
    ]
    measured = {(r["tool"], r["bits"]) for r in rows}
    missing = {tool: [b for b in bits if (tool, b) not in measured] for tool, bits in OFFERED.items()}
    if any(missing.values()):
        listed = "; ".join(f"{tool} {', '.join(bits)}" for tool, bits in missing.items() if bits)
        lines += ["", f"Offered, not measured on this checkpoint yet: {listed}."]
    notes = {r["note"] for r in rows if r["note"]}
    return "\n".join([*lines, *(f"\n{note}" for note in sorted(notes))]) + "\n"


def machines(rows: Sequence[Mapping[str, str]]) -> str:
    """The machine that most rows come from, and which rows come from others: times compare on one machine only."""
    (most, _), *others = Counter(row["machine"] for row in rows).most_common()
    told = [most]
    for name, _ in others:
        here = ", ".join(f"{row['tool']} {row['bits']}" for row in rows if row["machine"] == name)
        told.append(f"on {name}, whose times do not compare with these: {here}")
    return "; ".join(told)


def table_line(row: Mapping[str, str], fp32: float) -> str:
    start = f"| {row['bits']} | {row['tool']} "
    if row["error"]:
        return f"{start}| fails: {row['error'].replace('|', '/')} | | | | | | |"
    accuracy, size = float(row["accuracy"]), f"{int(row['bytes']):,}"
    size += f" ({row['stored']})" if row["stored"] != QUANTIZED else ""
    return (
        f"{start}| {row['settings']} | {accuracy:.2f} | {fp32 - accuracy:.2f} | {size} "
        f"| {float(row['quantize_seconds']):.0f} | {float(row['images_per_second']):.0f} | {row['arithmetic']} |"
    )


def verdict(rows: Sequence[Mapping[str, str]], bits: str) -> str | None:
    """Our default against the best of the others at these bits; None where one side has not been measured."""
    good = [r for r in rows if r["bits"] == bits and not r["error"]]
    mine = [r for r in good if r["tool"] == "ours"]
    others = [r for r in good if r["tool"] in OFFERED]
    if not mine or not others:
        return None
    best = max(others, key=lambda r: float(r["accuracy"]))
    smallest = min(others, key=lambda r: (r["stored"] != QUANTIZED, int(r["bytes"])))
    ahead = f"{float(mine[0]['accuracy']) - float(best['accuracy']):+.2f}"
    ahead = ahead if float(best["accuracy"]) >= WORKS else "none of them works"
    return (
        f"| {bits} | {float(mine[0]['accuracy']):.2f} | {float(best['accuracy']):.2f} ({best['tool']}) | {ahead} "
        f"| {int(mine[0]['bytes']):,} | {int(smallest['bytes']):,} ({smallest['tool']}) |"
    )


if __name__ == "__main__":
    run_main(main)
