"""train.py: what a run leaves, from which weights it starts, and what it says to bad input."""

import math
import os
from pathlib import Path

import pytest
import torch

import augmentation
import checkpoint as checkpoints
import data
import train
from data import Normalization
from errors import UserError
from evaluation import normalized, score
from models import Architecture, MobileNetV2
from subject import split_as_trained
from tests.training_helpers import log_rows, settings
from training import Recipe
from traininglog import Epoch


def test_the_best_epoch_on_validation_is_saved_and_its_figures_are_true(tmp_path, image_folder):
    rows: list[Epoch] = []
    learning = dict(epochs=6, batch_size=8, lr=0.02, progressive_sizes=(), ema_decay=0.8)
    saved = train.train(settings(image_folder, tmp_path, **learning), on_epoch=rows.append)
    assert rows[-1].train_acc > 80 and rows[-1].train_loss < rows[0].train_loss  # the classes differ in brightness
    best = max(rows, key=lambda row: (row.val.accuracy, -row.epoch))
    assert (saved.metrics["epoch"], saved.metrics["val_acc"]) == (best.epoch, best.val.accuracy)
    loaded = checkpoints.load(tmp_path / "net.safetensors")
    test = data.load("folder", image_folder).test
    again = score(normalized(checkpoints.build_model(loaded), loaded.normalization), test, 5, "cpu")
    assert again.accuracy == saved.metrics["test_acc"] == best.test.accuracy
    assert math.isclose(again.loss, best.test.loss, rel_tol=1e-4)
    lines = (tmp_path / "training_log.txt").read_text().splitlines()
    assert lines[0] == f"# {saved.metrics['command']}" and len(lines) == 2 + 6
    assert lines[2:] == [row.line() for row in rows]
    assert all(len(line.split()) == len(lines[1].split()) for line in lines[2:])


def test_without_validation_the_last_epoch_is_saved(tmp_path, image_folder):
    saved = train.train(settings(image_folder, tmp_path, val_size=0, eval_every=2))
    assert (saved.metrics["epoch"], saved.metrics["val_acc"]) == (3, None)
    assert [row[-2:] for row in log_rows(tmp_path)][0] == ["-", "-"]


def test_means_of_an_epoch_cut_by_the_clock_are_over_the_images_seen(tmp_path, image_folder):
    rows: list[Epoch] = []
    recipe = dict(lr=0.0, max_minutes=1e-6, pad=0, flip=False, warmup_epochs=0.0)
    saved = train.train(settings(image_folder, tmp_path, **recipe), on_epoch=rows.append)
    assert [row.epoch for row in rows] == [1] and saved.metrics["epoch"] == 1
    one = settings(image_folder, tmp_path, dataset="folder", **recipe)
    run = train.start(one, Recipe(**{}), torch.device("cpu"), None)
    order, _ = augmentation.epoch_draws(len(run.train), 0, 0, "cpu")
    batch = run.train[order[:14]]  # one step was done
    x = torch.nn.functional.interpolate(run.normalization(batch.images), (8, 8), mode="bilinear", antialias=True)
    with torch.no_grad():
        logits = run.state.model.train()(x)
    expected = torch.nn.functional.cross_entropy(logits, batch.labels, label_smoothing=0.1)
    assert math.isclose(rows[0].train_loss, float(expected), rel_tol=1e-4)
    assert math.isclose(rows[0].train_acc, 100 * float((logits.argmax(1) == batch.labels).float().mean()), abs_tol=0.01)


def test_divergence_is_one_line_and_leaves_no_checkpoint(tmp_path, image_folder, run_main):
    wild = settings(image_folder, tmp_path, lr=1000.0, weight_decay=1000.0, warmup_epochs=0.0)
    code, _, err = run_main(train, *train.to_argv(wild))
    assert code == 2 and err.startswith("error: training diverged in epoch ") and err.count("\n") == 1
    assert "--lr" in err and not (tmp_path / "net.safetensors").exists()


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--save-path {tmp}/file/net.pth", "cannot write {tmp}/file/net.pth"),
        ("--save-path {tmp}", "cannot write {tmp}: it is a folder"),
        ("--save-path .", "cannot write .: it is a folder"),
        ("--log-file {tmp}/file/log.txt", "cannot write {tmp}/file/log.txt"),
        ("--epochs 2 --warmup-epochs 2", "--warmup-epochs is 2.0; expected less than --epochs 2"),
        ("--device cuda", "--device cuda cannot be used here"),
        ("--device meta", "--device is 'meta'; expected cpu, cuda"),
        ("--dataset folder --data-dir {tmp}", "{tmp}/train is missing"),
        ("--dataset mnist", "--dataset is 'mnist'; expected one of"),
        ("--checkpoint {tmp}/none.pth", "{tmp}/none.pth does not exist"),
        ("--checkpoint {tmp}/file", "{tmp}/file is not a checkpoint"),
        ("--checkpoint {tmp}/file --pretrained", "choose one"),
        ("--pretrained --width-mult 0.5", "--pretrained has weights for --width-mult 1.0 only"),
        ("--checkpoint {tmp}", "{tmp} is a folder"),
        ("--data-dir {tmp}/file", "--data-dir {tmp}/file is a file"),
        ("--log-file {tmp}/net.pth", "--save-path is the log itself ({tmp}/net.pth)"),
        ("--log-file {tmp}/net.pth.resume", "the state of the run is the log itself"),
        ("--log-file {tmp}/file --checkpoint {tmp}/file", "the log is the --checkpoint itself"),
        ("--log-file /dev/null", "cannot write /dev/null: it is a device"),
        ("--epochs " + "9" * 400, "expected a whole number, at least 1, at most 1000000"),
        ("--lr 1e308", "--lr is '1e308'; expected a number, at least 0, at most 1000"),
    ],
)
def test_bad_input_is_one_line_before_the_first_step(tmp_path, image_folder, run_main, flags, message):
    if "--device cuda" in flags and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    (tmp_path / "file").write_text("hello")
    line = f"--data-dir {image_folder} --save-path {tmp_path}/net.pth {flags}".format(tmp=tmp_path)
    code, _, err = run_main(train, *line.split())
    assert code == 2 and err.count("\n") == 1
    assert message.format(tmp=tmp_path) in err and err.startswith("error: ")
    assert sorted(set(os.listdir(tmp_path)) - {".net.pth.lock", ".training_log.txt.lock"}) == ["file"]


def test_compiling_without_a_compiler_is_one_line(tmp_path, image_folder, run_main, monkeypatch):
    monkeypatch.setenv("CXX", "/nonexistent/g++ -O3")
    code, _, err = run_main(train, *train.to_argv(settings(image_folder, tmp_path, compile=True)))
    assert code == 2 and "no /nonexistent/g++" in err and "--compile" in err and err.count("\n") == 1


def test_starting_from_a_checkpoint(tmp_path, image_folder, capsys):
    torch.manual_seed(5)
    for classes, width in ((3, 0.1), (10, 0.1), (3, 0.2)):
        model = MobileNetV2(Architecture(classes, width))
        names = tuple(f"class{i}" for i in range(classes))
        saved = checkpoints.Checkpoint(
            model.architecture, model.state_dict(), "folder", names, Normalization((1, 2, 3), 9.0), {}
        )
        checkpoints.save(saved, tmp_path / f"{classes}-{width}.pth")
    still = dict(lr=0.0, epochs=1)
    for first, same in (("3-0.1", True), ("10-0.1", False)):
        path = tmp_path / f"{first}.pth"
        end = train.train(settings(image_folder, tmp_path / first, checkpoint=path, **still))
        begin = checkpoints.load(path)
        assert end.normalization == begin.normalization
        assert torch.equal(end.state["features.0.0.weight"], begin.state["features.0.0.weight"])
        assert ("the classifier is reinitialised" in capsys.readouterr().out) != same
        assert torch.equal(end.state["classifier.1.weight"], begin.state["classifier.1.weight"]) if same else True
    with pytest.raises(UserError, match="3-0.2.pth is a network of width 0.2; give --width-mult 0.2"):
        train.train(settings(image_folder, tmp_path / "wide", checkpoint=tmp_path / "3-0.2.pth", **still))


def test_a_long_line_of_flags_parses_with_dashes_or_underscores():
    line = (
        "--data-dir ./data --batch-size 128 --epochs 300 --lr 0.03 --scheduler cosine --pretrained "
        "--save-path ./checkpoints/mnv2_cifar10_fp32_best.pth"
    )
    parsed = train.parse(train.Settings, "", line.split())
    assert parsed == train.Settings(
        lr=0.03, pretrained=True, save_path=Path("checkpoints/mnv2_cifar10_fp32_best.pth"), data_dir=Path("data")
    )
    assert parsed == train.parse(train.Settings, "", line.replace("-size", "_size").replace("-path", "_path").split())


def test_weights_that_go_on_keep_their_held_out_images_apart(image_folder, tmp_path, capsys):
    first = train.train(settings(image_folder, tmp_path, epochs=1, seed=3))
    (tmp_path / "b").mkdir()
    second = train.train(
        settings(image_folder, tmp_path / "b", epochs=1, seed=4, checkpoint=tmp_path / "net.safetensors")
    )
    assert first.metrics["val_crc32"] == second.metrics["val_crc32"] and second.metrics["split_seed"] == 3
    everything = data.load("folder", image_folder).train
    for made in (first, second):
        rest, held_out = split_as_trained(made, everything)
        assert data.split_checksum(held_out) == made.metrics["val_crc32"]
        assert len(rest) + len(held_out) == len(everything)
        assert not {i.numpy().tobytes() for i in rest.images} & {i.numpy().tobytes() for i in held_out.images}
    assert "their order differs" not in capsys.readouterr().err
    with pytest.raises(UserError, match="--val-size is 2, but .*trained without 4 images"):
        again = dict(epochs=1, val_size=2, checkpoint=tmp_path / "net.safetensors")
        train.train(settings(image_folder, tmp_path / "c", **again))
    whole = dict(epochs=1, val_size=0)
    train.train(settings(image_folder, tmp_path / "d", **whole))
    train.train(settings(image_folder, tmp_path / "e", epochs=1, checkpoint=tmp_path / "d" / "net.safetensors"))
    assert "may have trained it" in capsys.readouterr().err
    split_as_trained(first, everything[torch.arange(len(everything) - 1, -1, -1)])
    assert "their order differs" in capsys.readouterr().err
