"""Images as whole uint8 tensors: loading, caching, splitting, normalising.

Every data set becomes uint8 [N, 3, 32, 32] once and is kept in one safetensors file beside its source, so later runs
load 60,000 images in a fraction of a second. Batches are sliced, augmented (augmentation.py) and normalised as whole
tensors on the device (the idea of KellerJordan/cifar10-airbench); there are no worker processes.

Data sets: `cifar10`, `cifar100` (Krizhevsky 2009, fetched and checked by torchvision), `folder` (any `train/<class>/*`,
`test/<class>/*` images, resized to 32x32), `digits` (scikit-learn's 1,797 handwritten digits, no download).

Normalisation is (pixel - mean) / std with a whole-number mean per colour and one std for all, in 8-bit units: then the
input of the first convolution is an integer grid (zero-point = mean) and integer hardware can run that layer too.
"""

import contextlib
import functools
import hashlib
import json
import os
import socket
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from errors import UserError, reason
from files import locked, obstacle, write_bytes
from vision import import_torchvision

DATASETS = ("cifar10", "cifar100", "folder", "digits")
CIFAR10_CLASSES = tuple("airplane automobile bird cat deer dog frog horse ship truck".split())
SIZE = 32
CACHE_VERSION = "1"


@dataclass(frozen=True)
class Normalization:
    """x = (pixel - mean[c]) / std, pixel in 0..255. Raises ValueError or TypeError for anything else, e.g. from a
    damaged file."""

    mean: tuple[int, int, int] = (125, 123, 114)  # CIFAR-10's training mean, rounded to whole pixels
    std: float = 64.0  # CIFAR-10's is 63.0, 62.1, 66.7; one value keeps the input a per-tensor grid

    def __post_init__(self) -> None:
        whole = len(self.mean) == 3 and all(type(m) is int and 0 <= m <= 255 for m in self.mean)
        if not whole or not 0 < self.std < float("inf"):
            raise ValueError("a normalisation out of range")

    def __call__(self, pixels: Tensor) -> Tensor:
        """uint8 [N, 3, H, W] → float32 [N, 3, H, W] in channels_last."""
        # Filled on the device: a tensor copied from the host would make a GPU wait at every batch.
        mean = torch.stack([torch.full((), m, dtype=torch.float32, device=pixels.device) for m in self.mean])
        mean = mean.view(1, 3, 1, 1)
        return pixels.float().contiguous(memory_format=torch.channels_last).sub_(mean).div_(self.std)


@dataclass(frozen=True)
class Split:
    """images: uint8 [N, 3, 32, 32]; labels: int64 [N]."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor | slice) -> "Split":
        return Split(self.images[index], self.labels[index])

    def to(self, device: torch.device | str) -> "Split":
        return Split(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Dataset:
    """A data set in memory: its name, its class names in label order, and its two published splits."""

    name: str
    classes: tuple[str, ...]
    train: Split
    test: Split

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All images and labels by name, as the cache holds them."""
        return {
            f"{part}.{kind}": getattr(getattr(self, part), kind).contiguous()
            for part in ("train", "test")
            for kind in ("images", "labels")
        }

    @functools.cached_property
    def crc32(self) -> str:
        """CRC-32 of both splits, which identifies the images a result was measured on."""
        return checksum(self.tensors)


# ---------------------------------------------------------------------------------------------------- reading sources


def read_folder(root: Path) -> Dataset:
    """`root/train/<class>/*` and `root/test/<class>/*`, classes in sorted order (ImageFolder's)."""
    names = {part: class_folders(root / part) for part in ("train", "test")}
    for part, other in (("train", "test"), ("test", "train")):
        missing = sorted(set(names[other]) - set(names[part]))
        if missing:
            raise UserError(f"{root / part} has no folder for class {missing[0]!r}, which {root / other} has; add it")
    splits = {part: read_class_folders(root / part, names["train"]) for part in ("train", "test")}
    return Dataset("folder", tuple(names["train"]), splits["train"], splits["test"])


def class_folders(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise UserError(
            f"{folder} is missing; --dataset folder needs --data-dir with train/<class>/* and test/<class>/*"
        )
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    if len(names) < 2:
        raise UserError(f"{folder} has {len(names)} class folders; expected at least 2, one per class")
    return names


def read_class_folders(folder: Path, names: list[str]) -> Split:
    """The images of all classes, by class and then by file name; hidden files are left out."""
    files = []
    for label, name in enumerate(names):
        paths = sorted(p for p in (folder / name).iterdir() if not p.name.startswith(".") and not p.is_dir())
        if not paths:
            raise UserError(f"{folder / name} is empty; every class needs at least one image in train and in test")
        files += [(path, label) for path in paths]
    bar = tqdm(files, desc=f"reading {folder}", unit="img", disable=None, leave=False)
    images = np.stack([read_image(path) for path, _ in bar])
    return Split(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.tensor([label for _, label in files]))


def read_image(path: Path) -> np.ndarray:
    """uint8 [32, 32, 3] of any image file that Pillow reads."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, of palettes and of large images
            if wrong := obstacle(path):  # a pipe would be waited for
                raise ValueError(f"it {wrong}")
            with Image.open(path) as image:
                colours = eight_bits(image).convert("RGB")
    except Exception as error:  # Pillow's decoders raise OSError, ValueError, SyntaxError, struct.error and more
        raise UserError(f"{path} is not a readable image ({reason(error)}); remove or replace it") from None
    if colours.size != (SIZE, SIZE):
        colours = colours.resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    return np.asarray(colours)


def eight_bits(image: Any) -> Any:
    """The Pillow image with 16-bit grey converted to 8 bits (Pillow's own conversion clips at 255); other modes
    unchanged."""
    from PIL import Image

    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers of unknown range")
    if image.mode.startswith("I;16") or (image.mode == "I" and image.getextrema()[1] > 255):
        return Image.fromarray((np.asarray(image) / 257).round().clip(0, 255).astype(np.uint8))
    return image


def read_cifar(name: str, root: Path) -> Dataset:
    """CIFAR-10 or CIFAR-100 through torchvision, which downloads the archive and checks its MD5."""
    datasets = import_torchvision("torchvision.datasets")
    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    new = not root.exists()
    try:
        with warnings.catch_warnings(), network_timeout(), contextlib.ExitStack() as stack:
            warnings.simplefilter("ignore")
            with contextlib.suppress(UserError):  # a read-only folder
                stack.enter_context(locked(root / kind.filename, wait=True))  # of several programs one downloads
            parts = [kind(str(root), train=train, download=True) for train in (True, False)]
    except Exception as error:  # torchvision lets URLError, RuntimeError, tarfile and zlib errors through
        if new:  # it was made here; a mistyped name leaves no folder
            with contextlib.suppress(OSError):
                for lock in root.glob(".*.lock"):
                    lock.unlink()
                root.rmdir()
        archive, why = root / kind.filename, f"{type(error).__name__}: {reason(error)}"
        if archive.is_file() and not datasets.utils.check_integrity(str(archive), kind.tgz_md5):
            why = f"{archive} has a wrong MD5: it is damaged or incomplete; {why}"
        own = f"; your own images would go in {root / 'train'}, which does not exist, and {root / 'test'}"
        raise UserError(
            f"cannot get {name} ({why}); put the whole {kind.filename} (MD5 "
            f"{kind.tgz_md5}) into {root} or give another --data-dir, or try --dataset digits, which needs no "
            f"download{own if default_name(root) == name else ''}"
        ) from None
    splits = [Split(torch.from_numpy(p.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(p.targets)) for p in parts]
    return Dataset(name, tuple(parts[0].classes), *splits)


@contextlib.contextmanager
def network_timeout(seconds: float = 30.0) -> Iterator[None]:
    """Downloads inside give up after `seconds` without an answer; torchvision sets no limit of its own."""
    previous = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(previous)


def read_digits(root: Path) -> Dataset:
    """scikit-learn's digits (UCI, 8x8, 0..16) as 3x32x32; a fixed stratified fifth (seed 0) is the test split."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    small = torch.from_numpy(bunch.images).float().unsqueeze(1) * (255 / 16)
    large = F.interpolate(small, (SIZE, SIZE), mode="bilinear", align_corners=False)
    images = large.round().clamp(0, 255).to(torch.uint8).expand(-1, 3, -1, -1).contiguous()
    everything = Split(images, torch.from_numpy(bunch.target).long())
    train, test = stratified_split(everything, len(everything) // 5, seed=0)
    return Dataset("digits", tuple(str(d) for d in range(10)), train, test)


READERS: dict[str, Callable[[Path], Dataset]] = {
    "cifar10": lambda root: read_cifar("cifar10", root),
    "cifar100": lambda root: read_cifar("cifar100", root),
    "folder": read_folder,
    "digits": read_digits,
}


def source_fingerprint(name: str, root: Path) -> str:
    """A hash of the names, sizes and times of the source's files, and of the names of empty class folders; empty where
    there is no source beside the cache."""
    parts = {"folder": ("train", "test"), "cifar10": ("cifar-10-batches-py",), "cifar100": ("cifar-100-python",)}
    digest = hashlib.sha256()
    found = False
    for part in parts.get(name, ()):
        folders = [root / part]
        if name == "folder" and folders[0].is_dir():
            folders = [folders[0] / sub for sub in class_folders(folders[0])]
        for folder in folders:
            if not folder.is_dir():
                continue
            with os.scandir(folder) as entries:
                files = sorted(entries, key=lambda e: e.name)
            for entry in files:
                stat = entry.stat(follow_symlinks=entry.is_file())  # a broken link has only a stat of its own
                line = f"{folder.name}/{entry.name} {stat.st_size} {stat.st_mtime_ns}\n"
                digest.update(os.fsencode(line))  # file names need not be valid UTF-8
                found = True
            if name == "folder" and not files:
                digest.update(os.fsencode(f"{folder.name}/\n"))
    return digest.hexdigest() if found else ""


# --------------------------------------------------------------------------------------------------------- the cache


def default_name(root: Path) -> str:
    """The data set meant where --dataset is not given: `folder` if there is a `train` folder, else `cifar10`."""
    return "folder" if os.path.isdir(Path(root) / "train") else "cifar10"


def load(name: str, root: Path) -> Dataset:
    """The data set `name` whose source is in `root`, from its cache if that is intact and up to date."""
    if name not in DATASETS:
        raise UserError(f"--dataset is {name!r}; expected one of {', '.join(DATASETS)}")
    if os.path.exists(root) and not os.path.isdir(root):
        raise UserError(f"--data-dir {root} is a file; give the folder that holds the data set")
    try:
        return read_source(name, Path(root))
    except OSError as error:  # no permission, a circular link, a name that is too long
        raise UserError(f"--data-dir {root}: cannot read {error.filename} ({error.strerror})") from None


def read_source(name: str, root: Path) -> Dataset:
    """`load` without its checks."""
    cache = root / f"{name}-{SIZE}x{SIZE}.safetensors"
    fingerprint = source_fingerprint(name, root)
    dataset = read_cache(cache, name, fingerprint) if cache.exists() else None
    if dataset is None:
        dataset = READERS[name](root)
        fingerprint = source_fingerprint(name, root)
        with contextlib.suppress(UserError):  # a read-only data folder works too, only slower
            write_cache(cache, dataset, fingerprint)
    return dataset


def write_cache(path: Path, dataset: Dataset, fingerprint: str) -> None:
    from safetensors.torch import save

    metadata = {
        "version": CACHE_VERSION,
        "name": dataset.name,
        "classes": json.dumps(dataset.classes),
        "source": fingerprint,
        "crc32": dataset.crc32,
    }
    write_bytes(path, save(dataset.tensors, metadata))


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """CRC-32 over the bytes of the tensors (on the CPU), in the order of their names; 8 hex digits."""
    value = 0
    for _, tensor in sorted(tensors.items()):
        value = zlib.crc32(tensor.contiguous().numpy(), value)
    return f"{value:08x}"


def split_checksum(split: Split) -> str:
    """CRC-32 of a split on the CPU: the same images in the same order."""
    return checksum({"images": split.images, "labels": split.labels})


def read_cache(path: Path, name: str, fingerprint: str) -> Dataset | None:
    """The cached data set; None where the file is damaged, of another version, or older than its source."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        current = metadata["version"] == CACHE_VERSION and (not fingerprint or metadata["source"] == fingerprint)
        if not current or metadata["name"] != name:
            return None
        splits = [Split(tensors[f"{part}.images"], tensors[f"{part}.labels"]) for part in ("train", "test")]
        dataset = Dataset(name, tuple(json.loads(metadata["classes"])), *splits)
        return dataset if metadata["crc32"] == dataset.crc32 else None
    except (SafetensorError, OSError, KeyError, ValueError, TypeError):
        return None


# ------------------------------------------------------------------------------------------------ splits and batches


def stratified_split(split: Split, held_out: int, seed: int) -> tuple[Split, Split]:
    """(rest, held out): `held_out` images drawn at random, in proportion to class sizes (largest remainders round
    up)."""
    if not 0 <= held_out < len(split):
        raise UserError(f"--val-size is {held_out}; expected 0 to {len(split) - 1}, fewer than the training images")
    generator = torch.Generator().manual_seed(seed)
    counts = torch.bincount(split.labels)
    shares = counts.double() * held_out / len(split)
    take = shares.floor().long()
    while missing := held_out - int(take.sum()):
        room = take < counts - 1  # the last image of a class is taken only where all classes are down to it
        room = room if room.any() else take < counts
        order = torch.argsort((shares - take).masked_fill(~room, -torch.inf), descending=True, stable=True)
        take[order[: min(missing, int(room.sum()))]] += 1
    chosen = torch.zeros(len(split), dtype=torch.bool)
    for label, count in enumerate(take.tolist()):
        members = torch.nonzero(split.labels == label).flatten()
        chosen[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    return split[~chosen], split[chosen]


def random_subset(split: Split, count: int, seed: int) -> Split:
    """`count` (at most all) images drawn at random without replacement."""
    generator = torch.Generator().manual_seed(seed)
    return split[torch.randperm(len(split), generator=generator)[:count]]


def batches(split: Split, size: int) -> Iterator[Split]:
    """The images in order, `size` at a time; the last batch may be smaller."""
    for start in range(0, len(split), size):
        yield split[slice(start, start + size)]


def normalization_for(name: str, train: Split) -> Normalization:
    """CIFAR's published statistics for CIFAR; for other data sets those of the training images, rounded the same
    way."""
    if name.startswith("cifar"):
        return Normalization()
    pixels = train.images[:: max(1, len(train) // 5000)].float()
    mean = pixels.mean((0, 2, 3)).round().int().tolist()
    return replace(Normalization(), mean=tuple(mean), std=max(1.0, round(float(pixels.std()))))
