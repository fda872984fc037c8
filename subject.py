"""What is measured: a checkpoint's FP32 network, and the images it was trained, selected and tested on.

Calibration sees `train` alone; choices may be made on `validation`, which the checkpoint held out of training; `test`
is for reporting.
"""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import checkpoint as checkpoints
import data
from checkpoint import Checkpoint
from errors import UserError
from network import Network, fold_batch_norm, to_device


@dataclass(frozen=True)
class Subject:
    """dataset: its name; dataset_crc32: of its images and labels. hash: of the checkpoint's file, short. The network
    is on the CPU, batch norm folded."""

    path: Path
    hash: str
    checkpoint: Checkpoint
    network: Network
    dataset: str
    dataset_crc32: str
    train: data.Split
    validation: data.Split
    test: data.Split


def load(path: Path | None, dataset: str | None, data_dir: Path, validation: bool = False) -> Subject:
    """None: the default checkpoint, the data set that is found. validation: hold out images here if the checkpoint did
    not; the network has then seen them, but calibration has not. UserError if the files do not match."""
    path = path or default_checkpoint()
    checkpoint = checkpoints.load(path)
    loaded = load_data(dataset, data_dir, path, checkpoint.dataset, checkpoint.classes)
    splits = split_as_trained(checkpoint, loaded.train, validation)
    named = loaded.name, loaded.crc32
    return Subject(
        path, checkpoints.short_hash(path), checkpoint, folded(checkpoint, path), *named, *splits, loaded.test
    )


def folded(checkpoint: Checkpoint, path: Path) -> Network:
    """The checkpoint's network on the CPU, batch norm folded. UserError where a weight is too large for that."""
    network = to_device(fold_batch_norm(checkpoints.build_model(checkpoint), checkpoint.normalization), "cpu")
    for name, weight in network.weights.items():
        if not (weight.isfinite().all() and network.biases[name].isfinite().all()):
            raise UserError(
                f"{path} has weights in {name} that are not finite once batch norm is folded; give another --checkpoint"
            )
    return network


def default_checkpoint() -> Path:
    """The user's own checkpoint if there is one, else the bundled one; a path as short as it can be, for tables."""
    own, bundled, here = Path("checkpoints/mnv2_fp32_best.pth"), checkpoints.DEFAULT_CHECKPOINT, Path.cwd()
    if os.path.exists(own):
        return own
    return bundled.relative_to(here) if bundled.is_relative_to(here) else bundled


def origin(path: Path, info: Mapping[str, Any], *needed: str) -> tuple[dict[str, Any], tuple[str, ...], str]:
    """(cells of results.csv, class names, name of the data set) in a packed file's header. UserError where these, or
    one of the `needed` cells, are missing: neither test.py nor train.py wrote the file."""
    try:
        row, classes, dataset = dict(info["row"]), tuple(info["classes"]), info["dataset"]
        missing = set(needed) - row.keys()
    except (KeyError, TypeError, ValueError):
        missing = {"row"}
    if missing:
        raise UserError(f"{path} was not written by test.py --save-packed; it does not name its classes")
    return row, classes, dataset


def load_data(name: str | None, data_dir: Path, model: Path, hint: str, classes: tuple[str, ...]) -> data.Dataset:
    """The data set asked for, else a folder of images in `data_dir`, else `hint`; its classes must be `classes`,
    which are those of the file `model`."""
    found = name or data.default_name(data_dir)
    if not name and found != "folder" and classes != data.CIFAR10_CLASSES:
        found = hint
    dataset = data.load(found, data_dir)
    if dataset.classes != classes:
        raise UserError(
            f"--data-dir {data_dir} ({found}) has the classes {', '.join(dataset.classes[:3])}, ... but the "
            f"model {model} knows {', '.join(classes[:3])}, ...; {data_flag(hint)}"
        )
    return dataset


def data_flag(name: str) -> str:
    """The flag to suggest for a model trained on the data set `name`."""
    known = name in data.DATASETS and name != "folder"  # "folder" says nothing about which images were in it
    return f"give --dataset {name}" if known else "give the --data-dir of the images it was trained on"


def split_as_trained(checkpoint: Checkpoint, train: data.Split, validation: bool = False) -> tuple[data.Split, ...]:
    """(train, validation), as train.py split them for this checkpoint; validation as in `load`."""
    size, seed = split_of(checkpoint)
    known = checkpoint.metrics.get("val_crc32") if size else None
    if validation and not size:
        size = len(train) // 10
    rest, held_out = data.stratified_split(train, min(size, len(train) // 10), seed)  # as train.py
    if known and data.split_checksum(held_out) != known:
        print(
            "note: these are not the checkpoint's training images, or their order differs: images held out here may "
            "have been used to train it",
            file=sys.stderr,
        )
    return rest, held_out


def split_of(checkpoint: Checkpoint) -> tuple[int, int]:
    """(images held out, seed that drew them) when the checkpoint was trained."""
    metrics = checkpoint.metrics
    return int(metrics.get("val_size") or 0), int(metrics.get("split_seed", metrics.get("seed")) or 0)
