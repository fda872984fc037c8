"""The images that train, choose and test are apart: in what `load` returns, and in what test.py does with them."""

from pathlib import Path

import pytest
from conftest import load_program
from networks import random_model

import checkpoint as checkpoints
import data
import subject
from data import Normalization, Split


def keys(images) -> set[bytes]:
    return {image.numpy().tobytes() for image in images}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A network that held out 4 images, drawn with seed 3."""
    path = tmp_path_factory.mktemp("checkpoint") / "c.safetensors"
    model, classes = random_model(0.1, classes=3), ("class0", "class1", "class2")
    held_out = {"val_size": 4, "split_seed": 3}
    content = checkpoints.Checkpoint(
        model.architecture, model.state_dict(), "folder", classes, Normalization(), held_out
    )
    checkpoints.save(content, path)
    return path


@pytest.fixture(scope="module")
def splits(checkpoint, image_folder) -> dict[str, set[bytes]]:
    found = subject.load(checkpoint, "folder", image_folder)
    return {name: keys(getattr(found, name).images) for name in ("train", "validation", "test")}


def test_the_parts_are_apart_and_together_everything(splits, image_folder):
    everything = data.load("folder", image_folder)
    assert {name: len(part) for name, part in splits.items()} == {"train": 44, "validation": 4, "test": 12}
    assert splits["train"] | splits["validation"] == keys(everything.train.images)
    assert splits["test"] == keys(everything.test.images) and not splits["test"] & splits["train"]


@pytest.mark.parametrize(
    "flags",
    [
        ["--weight-bits", "4", "--act-bits", "4", "--rounding", "nearest"],
        ["--max-drop", "100", "--act-bits", "8", "--rounding", "nearest"],
        ["--target-activation-bits", "4", "--weight-bits", "8", "--rounding", "nearest"],
    ],
)
def test_calibration_sees_training_images_and_choices_see_validation(
    flags, checkpoint, image_folder, splits, run_main, monkeypatch, tmp_path
):
    program = load_program("test.py", "evaluate_program_again")
    monkeypatch.chdir(tmp_path)
    calibrated, scored = set(), []

    def spy(owner, name):
        real = getattr(owner, name)

        def watched(*args, **kwargs):
            for value in args:
                if isinstance(value, Split):
                    scored.append(keys(value.images))
                elif hasattr(value, "dtype"):
                    calibrated.update(keys(value))
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, watched)

    spy(program, "quantize_network")
    spy(program.mixed, "quantize_network")
    spy(program.mixed.allocation, "sensitivities")
    spy(program.mixed.allocation, "value_sensitivities")
    spy(program, "score")
    code, _, err = run_main(program, "--checkpoint", checkpoint, "--data-dir", image_folder, *flags)
    assert code == 0, err
    assert calibrated and calibrated <= splits["train"]
    reported, choosing = [s for s in scored if s == splits["test"]], [s for s in scored if s == splits["validation"]]
    assert len(reported) == 2 and len(reported) + len(choosing) == len(scored)  # FP32 and the result, once each
    assert bool(choosing) == ("--max-drop" in flags)
