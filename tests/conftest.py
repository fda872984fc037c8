"""Shared by the tests: one thread (faster for small networks), and small data sets made on the fly."""

import importlib.util
import os
import sys
import tarfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, here and in the programs that tests start

import numpy as np  # noqa: E402
import pytest  # noqa: E402

ROOT = Path(__file__).parent.parent


def load_program(path: str, name: str):
    """A program as a module called `name`, by its path in the repository: Python has a package `test` of its own."""
    spec = importlib.util.spec_from_file_location(name, ROOT / path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def no_weights_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretrained weights exist only if a test puts them there."""
    monkeypatch.setenv("TORCH_HOME", "/nonexistent")


def write_images(root: Path, classes: int = 3, train: int = 16, test: int = 4, size: int = 32) -> dict[str, np.ndarray]:
    """PNGs in root/train/<class>/ and root/test/<class>/, class i brighter than class i-1; returns path → pixels."""
    from PIL import Image

    random = np.random.default_rng(0)
    pixels = {}
    for part, count in (("train", train), ("test", test)):
        for label in range(classes):
            folder = root / part / f"class{label}"
            folder.mkdir(parents=True)
            for i in range(count):
                array = random.integers(60 * label, 60 * label + 100, (size, size, 3), dtype=np.uint8)
                Image.fromarray(array).save(folder / f"{i:03}.png")
                pixels[f"{part}/class{label}/{i:03}.png"] = array
    return pixels


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder data set: 3 classes, 48 training and 12 test images of 32x32."""
    root = tmp_path_factory.mktemp("images")
    write_images(root)
    return root


@pytest.fixture
def run_main(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """Runs the `main` of a command line in this process: (exit code, stdout, stderr)."""
    import errors

    def run(module, *argv: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, argv)])
        with pytest.raises(SystemExit) as stop:
            errors.run_main(module.main)
        return stop.value.code, *capsys.readouterr()

    return run


@pytest.fixture(scope="session")
def real_images(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[tuple[str, str], int]]:
    """(a folder with the first 20 images of each class and part of CIFAR-10, how many there are of each)."""
    archive = Path(os.environ.get("CIFAR10_JPEG", ROOT / ".." / "shared" / "data" / "cifar10.tar.xz"))
    if not archive.exists():
        pytest.skip(f"needs the real CIFAR-10 as JPEG: no {archive}; CIFAR10_JPEG names another place")
    folder, counts = tmp_path_factory.mktemp("real"), {}
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.isfile():
                _, part, name, file = member.name.split("/")
                counts[part, name] = counts.get((part, name), 0) + 1
                if int(file.removesuffix(".jpg")) < 20:
                    tar.extract(member, folder, filter="data")
    return folder / "cifar10", counts
