"""What the tests of training share: small settings, whether two runs ended alike, and what needs CUDA."""

from pathlib import Path

import pytest
import torch

import checkpoint as checkpoints
import train

# 44 of the 48 training images of the fixture remain after --val-size 5 is cut to a tenth of them: 3 steps an epoch.
# On the CPU: there a cut run ends with the same bits.
FAST = dict(device="cpu", width_mult=0.1, batch_size=14, epochs=3, lr=0.05, progressive_sizes=(8,), val_size=5)

NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA: records a step as a CUDA graph")


def settings(image_folder: Path, folder: Path, **changes) -> train.Settings:
    return train.Settings(data_dir=image_folder, save_path=folder / "net.safetensors", **{**FAST, **changes})


def log_rows(folder: Path) -> list[list[str]]:
    """The log without the last column (images/s), which is measured."""
    lines = (folder / "training_log.txt").read_text().splitlines()
    return [line.split()[:-1] for line in lines if line[0].isdigit()]


def assert_same_end(one: Path, other: Path) -> None:
    first, second = (checkpoints.load(folder / "net.safetensors") for folder in (one, other))
    for name in first.state:
        assert torch.equal(first.state[name], second.state[name]), name
    times = ("minutes", "command")
    assert [v for k, v in first.metrics.items() if k not in times] == [
        v for k, v in second.metrics.items() if k not in times
    ]
    assert log_rows(one) == log_rows(other)
