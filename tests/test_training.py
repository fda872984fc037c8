"""Training: schedule, averages and, above all, that a run interrupted anywhere ends bit for bit like an uninterrupted
one."""

import contextlib
import copy
import dataclasses
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from test_files import full_disk
from torch import nn

import checkpoint as checkpoints
import data
import pace
import recording
import runstate
import train
import training
from cli import flag
from data import Augmentation, Normalization, Split
from errors import UserError
from evaluation import choose_device, normalized, score
from interrupts import Interrupted
from models import Architecture, MobileNetV2
from subject import split_as_trained
from training import Recipe
from traininglog import Epoch, open_log

# 44 of the 48 training images of the fixture remain after --val-size 5 is cut to a tenth of them: 3 steps an epoch.
# On the CPU: there a cut run ends with the same bits.
FAST = dict(device="cpu", width_mult=0.1, batch_size=14, epochs=3, lr=0.05, progressive_sizes=(8,), val_size=5)


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


# ------------------------------------------------------------------------------------------------ cut and resumed runs

VARIANTS = {
    "plain": {},
    "all": dict(ema_decay=0.9, dropout=0.3, progressive_sizes=(8, 16), cutout=8, eval_every=2),
    "last": dict(val_size=0, scheduler="constant", momentum=0.0),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_cut_at_every_second_step_ends_with_the_same_bits(tmp_path, image_folder, monkeypatch, variant):
    one, other = tmp_path / "one", tmp_path / "other"
    train.train(settings(image_folder, one, **VARIANTS[variant]))
    learning_rate, steps = training.learning_rate, 0

    def cut(done, recipe):
        nonlocal steps
        steps += 1
        if steps % 2 == 0:
            os.kill(os.getpid(), signal.SIGTERM if steps % 4 else signal.SIGINT)
        return learning_rate(done, recipe)

    monkeypatch.setattr(training, "learning_rate", cut)
    cuts = 0
    for _ in range(40):
        try:
            train.train(settings(image_folder, other, resume=True, **VARIANTS[variant]))
            break
        except Interrupted:
            cuts += 1
    assert cuts >= 4
    assert_same_end(one, other)


def test_a_run_cut_during_an_evaluation_ends_with_the_same_bits(tmp_path, image_folder, monkeypatch):
    one, other = tmp_path / "one", tmp_path / "other"
    train.train(settings(image_folder, one))
    plain = train.score
    cut = []

    def cut_score(forward, *rest):
        if len(cut) < 3:
            cut.append(os.kill(os.getpid(), signal.SIGTERM))
        return plain(forward, *rest)

    monkeypatch.setattr(train, "score", cut_score)
    for _ in range(3):
        with pytest.raises(Interrupted):
            train.train(settings(image_folder, other, resume=True))
    train.train(settings(image_folder, other, resume=True))
    assert_same_end(one, other)


def test_a_real_process_killed_and_stopped_goes_on_with_the_same_bits(tmp_path, image_folder):
    """SIGKILL, then SIGTERM at moments that nobody chose; then, in this process, to the end."""
    one, other = tmp_path / "one", tmp_path / "other"
    changes = dict(epochs=15, ema_decay=0.9, dropout=0.2)
    train.train(settings(image_folder, one, **changes))
    wanted = settings(image_folder, other, resume=True, **changes)
    argv = [sys.executable, "train.py", *train.to_argv(wanted)]
    moments = random.Random(0)
    for number, code in ((signal.SIGKILL, -9), (signal.SIGTERM, 143)):
        log, before = other / "training_log.txt", len(log_rows(other)) if other.exists() else 0
        process = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        while process.poll() is None and not (log.exists() and len(log_rows(other)) > before):
            time.sleep(0.005)
        time.sleep(0.2 * moments.random())
        process.send_signal(number)
        _, err = process.communicate(timeout=120)
        assert err == "" and process.returncode in (code, 0, -15)  # 0 and -15: it was done before the signal
        checkpoints.load(other / "net.safetensors")
    train.train(wanted)
    assert_same_end(one, other)


def test_a_kill_between_checkpoint_log_and_state_is_made_good(tmp_path, image_folder, monkeypatch):
    one, other = tmp_path / "one", tmp_path / "other"
    train.train(settings(image_folder, one))
    saves, save_state = [], train.save_state

    def killed(run):
        saves.append(run.state.epoch)
        if len(saves) == 3:  # the state at the start, after epoch 1, and this one
            raise ZeroDivisionError  # as if killed: nothing after this line happens
        save_state(run)

    monkeypatch.setattr(train, "save_state", killed)
    with pytest.raises(ZeroDivisionError):
        train.train(settings(image_folder, other))
    assert len(log_rows(other)) == 2
    train.train(settings(image_folder, other, resume=True))
    assert_same_end(one, other)


def test_resume_says_what_does_not_fit(tmp_path, image_folder, monkeypatch, capsys):
    state = tmp_path / "net.safetensors.resume"
    train.train(settings(image_folder, tmp_path, epochs=1, resume=True))
    assert "nothing to resume" in capsys.readouterr().out

    saved = (tmp_path / "net.safetensors").read_bytes()
    train.train(settings(image_folder, tmp_path, epochs=1, resume=True))
    assert "this run is finished" in capsys.readouterr().out
    assert (tmp_path / "net.safetensors").read_bytes() == saved
    with pytest.raises(UserError, match="--epochs 1, not 2; give the same settings, delete .*resume to start anew"):
        train.train(settings(image_folder, tmp_path, epochs=2, resume=True))

    with pytest.raises(UserError, match="net.safetensors already exists; give another --save-path"):
        train.train(settings(image_folder, tmp_path, epochs=1))
    assert (tmp_path / "net.safetensors").read_bytes() == saved

    monkeypatch.setattr(runstate, "save_finished", lambda *_: None)
    (tmp_path / "net.safetensors").unlink()
    train.train(settings(image_folder, tmp_path, epochs=1))
    for name, value in (("lr", 0.1), ("batch_size", 5), ("ema_decay", 0.5), ("progressive_sizes", (8, 16))):
        with pytest.raises(UserError, match=f"--resume: .*{flag(name)} "):
            train.train(settings(image_folder, tmp_path, **{"epochs": 1, name: value}, resume=True))
    with pytest.raises(UserError, match="--resume: .* belongs to other images"):
        pixels = data.load("folder", image_folder)
        monkeypatch.setattr(
            data,
            "load",
            lambda *_: dataclasses.replace(pixels, train=Split(255 - pixels.train.images, pixels.train.labels)),
        )
        train.train(settings(image_folder, tmp_path, epochs=1, resume=True))
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(UserError, match="resume cannot be read .*delete it"):
        train.train(settings(image_folder, tmp_path, epochs=1, resume=True))
    (tmp_path / "net.safetensors").unlink()
    train.train(settings(image_folder, tmp_path, epochs=1))  # a damaged state does not keep a new run from starting


def test_the_work_of_a_run_before_is_not_overwritten(tmp_path, image_folder, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(training, "next_epoch", lambda state: os.kill(os.getpid(), signal.SIGTERM) or next_epoch(state))
        with pytest.raises(Interrupted):
            train.train(settings(image_folder, tmp_path))
    state = tmp_path / "net.safetensors.resume"
    saved = state.read_bytes()
    for _ in range(2):  # also before there is a checkpoint
        with pytest.raises(UserError, match="net.safetensors.resume is the state of an interrupted run; add --resume"):
            train.train(settings(image_folder, tmp_path))
        (tmp_path / "net.safetensors").unlink(missing_ok=True)
    assert state.read_bytes() == saved
    again = settings(image_folder, tmp_path, resume=True)
    train.train(again)
    (tmp_path / "net.safetensors").unlink()
    with pytest.raises(UserError, match="net.safetensors is gone; delete .*net.safetensors.resume to train anew"):
        train.train(again)


def test_two_runs_do_not_write_the_same_files(tmp_path, image_folder):
    def second(_: Epoch) -> None:
        for resume in (False, True):
            with pytest.raises(UserError, match="another program is writing .*net.safetensors; wait"):
                train.train(settings(image_folder, tmp_path, resume=resume))
        neighbour = dataclasses.replace(settings(image_folder, tmp_path), save_path=tmp_path / "b.pth")
        with pytest.raises(UserError, match="another program is writing .*training_log.txt; .* another --log-file"):
            train.train(neighbour)
        train.train(dataclasses.replace(neighbour, epochs=1, log_file=tmp_path / "b.txt"))

    train.train(settings(image_folder, tmp_path, epochs=1), second)
    log = (tmp_path / "training_log.txt").read_text()
    assert log.count("# ") == 1 and log.count("\n") == (tmp_path / "b.txt").read_text().count("\n") == 3


class Gone:
    """A stdout whose reader goes after the header."""

    def write(self, text: str) -> None:
        if text[:1].isdigit():
            raise BrokenPipeError

    def flush(self) -> None:
        pass


@pytest.mark.parametrize("fails", ["output", "log"])
def test_an_output_that_fails_loses_no_epoch(tmp_path, image_folder, monkeypatch, fails):
    one, other = tmp_path / "one", tmp_path / "other"
    train.train(settings(image_folder, one))
    cut = settings(image_folder, other, dataset="folder")
    with contextlib.ExitStack() as stack:
        if fails == "output":
            stack.enter_context(monkeypatch.context()).setattr(sys, "stdout", Gone())
            stack.enter_context(pytest.raises(BrokenPipeError))
        else:  # room for the first line, and a part of the second
            other.mkdir()
            (other / "training_log.txt").write_text("#" * 10_000_000 + "\n")
            room = len(f"# {train.command(cut)}\n") + len((one / "training_log.txt").read_text().splitlines()[1]) + 80
            stack.enter_context(full_disk(10_000_001 + room))
            stack.enter_context(pytest.raises(UserError, match="cannot write .*log.txt: .*; the state is saved"))
        train.train(cut)
    assert len(log_rows(other)) == (1 if fails == "output" else 2)
    assert torch.load(other / "net.safetensors.resume", weights_only=True)["numbers"]["epoch"] == 1
    train.train(dataclasses.replace(cut, resume=True))
    assert_same_end(one, other)


def test_a_lost_checkpoint_is_said_and_a_new_one_saved(tmp_path, image_folder, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(training, "next_epoch", lambda state: os.kill(os.getpid(), signal.SIGTERM) or next_epoch(state))
        with pytest.raises(Interrupted):
            train.train(settings(image_folder, tmp_path))
    (tmp_path / "net.safetensors").unlink()
    saved = train.train(settings(image_folder, tmp_path, resume=True))
    assert "the best checkpoint so far is lost" in capsys.readouterr().out
    assert saved.metrics == checkpoints.load(tmp_path / "net.safetensors").metrics


next_epoch = training.next_epoch


# ----------------------------------------------------------------------------------------------- what a run leaves


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
    order, _ = data.epoch_draws(len(run.train), 0, 0, "cpu")
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


def test_the_readmes_line_parses():
    line = (
        "--data-dir ./data --batch-size 128 --epochs 300 --lr 0.03 --scheduler cosine --pretrained "
        "--save-path ./checkpoints/mnv2_cifar10_fp32_best.pth"
    )
    parsed = train.parse(train.Settings, "", line.split())
    assert parsed == train.Settings(
        lr=0.03, pretrained=True, save_path=Path("checkpoints/mnv2_cifar10_fp32_best.pth"), data_dir=Path("data")
    )
    assert parsed == train.parse(train.Settings, "", line.replace("-size", "_size").replace("-path", "_path").split())


# -------------------------------------------------------------------------------------------------- pieces of a step


def test_learning_rate_and_image_size_by_hand():
    recipe = Recipe(epochs=10, warmup_epochs=2, lr=1.0)
    assert training.learning_rate(0.1, recipe) == pytest.approx(0.5)
    assert training.learning_rate(0.2, recipe) == 1.0
    assert training.learning_rate(0.6, recipe) == pytest.approx(0.5)
    assert training.learning_rate(1.0, recipe) == pytest.approx(0.0)
    assert training.learning_rate(0.9, dataclasses.replace(recipe, scheduler="constant")) == 1.0
    assert training.learning_rate(0.0, dataclasses.replace(recipe, warmup_epochs=0.0)) == 1.0
    sized = dataclasses.replace(recipe, progressive_sizes=(16, 24, 32))
    assert [training.image_size(done, sized, 32) for done in (0, 0.33, 0.34, 0.66, 0.67, 1.0)] == [
        16,
        16,
        24,
        24,
        32,
        32,
    ]
    assert training.image_size(0.0, recipe, 28) == 28


def test_progress_is_by_epochs_or_by_the_clock_whichever_is_further():
    state = training.State(None, None, None, epoch=2, step=5, seconds=90.0)
    assert training.progress(state, Recipe(epochs=10), steps=10) == 0.25
    assert training.progress(state, Recipe(epochs=10, max_minutes=2), steps=10) == 0.75
    assert training.progress(state, Recipe(epochs=10, max_minutes=100), steps=10) == 0.25
    assert training.progress(state, Recipe(epochs=10, max_minutes=1), steps=10) == 1.0


def test_batches_of_an_epoch_are_whole():
    assert [training.steps_per_epoch(n, 10) for n in (1, 9, 10, 11, 19, 20, 21)] == [1, 1, 1, 1, 1, 2, 2]


def test_one_step_is_pytorchs_sgd_by_hand():
    """Weight decay on matrices only, Nesterov momentum, label smoothing, normalised images, channels_last."""
    torch.manual_seed(0)
    model = MobileNetV2(Architecture(4, 0.1))
    split = Split(torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8), torch.randint(0, 4, (6,)))
    recipe = Recipe(
        epochs=1, batch_size=6, lr=0.1, warmup_epochs=0.0, weight_decay=0.2, augmentation=Augmentation(0, False, 0)
    )
    hand = copy.deepcopy(model).double().train()
    model = model.double()  # batch norm over 6 values magnifies rounding
    state = training.start(model, recipe, torch.device("cpu"))
    step = training.stepper(state, split, recipe, Normalization(), lambda x: model(x.double()))
    training.train_epoch(state, split, recipe, step, lambda: None)

    order, _ = data.epoch_draws(6, recipe.seed, 0, "cpu")
    x = (split.images[order].double() - torch.tensor([125.0, 123, 114]).view(1, 3, 1, 1)) / 64
    log_p = hand(x).log_softmax(1)
    target = torch.full((6, 4), 0.1 / 4).scatter_add_(1, split.labels[order, None], torch.full((6, 1), 0.9))
    (-(target.double() * log_p).sum(1).mean()).backward()
    for (name, theirs), mine in zip(hand.named_parameters(), model.parameters(), strict=True):
        gradient = theirs.grad + (0.2 * theirs.detach() if theirs.ndim > 1 else 0)
        expected = theirs.detach() - 0.1 * (gradient + 0.9 * gradient)
        torch.testing.assert_close(mine.detach(), expected, rtol=1e-4, atol=1e-6, msg=name)


def test_the_average_is_the_recurrence():
    torch.manual_seed(0)
    model = MobileNetV2(Architecture(4, 0.1))
    average = copy.deepcopy(model)
    pairs = training.average_pairs(average, model)
    expected = {name: t.double() for name, t in model.state_dict().items() if t.is_floating_point()}
    for step in range(5):
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.add_(1)
        training.update_average(pairs, 0.3, step)
        decay = min(0.3, (1 + step) / (10 + step))
        now = model.state_dict()
        expected = {name: decay * old + (1 - decay) * now[name].double() for name, old in expected.items()}
    mine = average.state_dict()
    assert all(torch.allclose(mine[name].double(), value, atol=1e-5) for name, value in expected.items())


def test_score_against_a_plain_loop():
    torch.manual_seed(0)
    split = Split(torch.randint(0, 256, (23, 3, 4, 4), dtype=torch.uint8), torch.randint(0, 5, (23,)))
    weight = torch.randn(48, 5)

    def forward(images):
        return images.float().flatten(1) / 255 @ weight

    logits = forward(split.images)
    right = sum(int(row.argmax()) == label for row, label in zip(logits, split.labels.tolist(), strict=True))
    loss = sum(-math.log(row.softmax(0)[label]) for row, label in zip(logits, split.labels.tolist(), strict=True))
    got = score(forward, split, 10, "cpu")
    assert got.count == 23 and got.accuracy == pytest.approx(100 * right / 23) and got.loss == pytest.approx(loss / 23)


def test_strided_depthwise_is_float32_under_a_cpus_autocast():
    """Same gradients as without autocast; the average and the network itself stay ordinary convolutions."""
    recipe, device = Recipe(bf16=True, ema_decay=0.9), torch.device("cpu")
    model = nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1, groups=8, bias=False), nn.Conv2d(8, 8, 1))
    plain = copy.deepcopy(model[0])
    state = training.start(model, recipe, device)
    assert [type(m) for m in state.model] == [training.Float32Conv, nn.Conv2d]
    x = torch.randn(2, 8, 6, 6).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        state.model[0](x).square().sum().backward()
    plain(x.float()).square().sum().backward()
    torch.testing.assert_close(state.model[0].weight.grad, plain.weight.grad)
    assert type(training.start(plain, Recipe(), device).model) is nn.Conv2d


def test_relu6_on_bits_is_relu6():
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)
    numbers = every[~every.isnan()]
    results = []
    for relu in (nn.ReLU6(), training.BitsReLU6(inplace=True)):
        x = numbers.clone().requires_grad_()
        y = relu(x * 1)  # in place on a result, as behind batch norm
        y.backward(torch.arange(len(x)).bfloat16())
        results.append((y.detach(), x.grad))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
    model = training.start(MobileNetV2(Architecture(10, 0.1)), Recipe(bf16=True), torch.device("cpu")).model
    assert sum(type(m) is training.BitsReLU6 for m in model.modules()) == 35
    model.features[5].conv[0][1].running_mean.fill_(math.nan)
    assert not training.all_finite(training.start(model, Recipe(), torch.device("cpu")))


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA: records a step as a CUDA graph")
STEPS = 8  # of the two runs below: some before the recording, most from it


def cuda_run(**changes):
    """(state, images on the device, recipe) before the first of `STEPS` steps of a small network."""
    device = choose_device("cuda")
    recipe = Recipe(epochs=1, batch_size=8, ema_decay=0.9, augmentation=Augmentation(4, True, 8), **changes)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (8 * STEPS, 3, 32, 32), dtype=torch.uint8, generator=generator)
    split = Split(images, torch.randint(0, 10, (8 * STEPS,), generator=generator)).to(device)
    torch.manual_seed(0)
    model = MobileNetV2(Architecture(10, 0.1))
    return training.start(model if changes.get("bf16") else model.double(), recipe, device), split, recipe


@needs_cuda
@pytest.mark.parametrize("compiled", [False, True])
def test_a_recorded_step_trains_like_an_ordinary_one(compiled, monkeypatch):
    """Oracle: the same steps without a recording, in float64 and at a low rate, for an untrained network magnifies
    rounding (of the rate, which is a float32 in the recording); the rate changes at each step."""
    ends = []
    for record in (True, False):
        if not record:
            monkeypatch.setattr(training, "recorded", lambda step, optimizer: step)
        state, split, recipe = cuda_run(lr=0.002, warmup_epochs=0.5)
        network = torch.compile(state.model, dynamic=False) if compiled else state.model
        step = training.stepper(state, split, recipe, Normalization(), lambda x, f=network: f(x.double()))
        training.train_epoch(state, split, recipe, step, lambda: None)
        weights = torch.cat([p.detach().flatten() for p in state.model.state_dict().values() if p.ndim])
        ends.append((weights, state.sums.clone(), torch.cat([p.flatten() for p in state.average.parameters()])))
    for recorded, ordinary in zip(*ends, strict=True):
        torch.testing.assert_close(recorded, ordinary, rtol=1e-3, atol=1e-5)


@needs_cuda
def test_no_step_waits_for_the_gpu():
    state, split, recipe = cuda_run(bf16=True)
    seen = []

    def strict() -> None:  # from the end of the step that was recorded to the last step's
        seen.append(state.step)
        inside = recording.WARM_UP <= state.step < STEPS
        torch.cuda.set_sync_debug_mode("error" if inside else "default")

    step = training.stepper(state, split, recipe, Normalization(), state.model)
    training.train_epoch(state, split, recipe, step, strict)
    assert seen == list(range(1, STEPS + 1))


# -------------------------------------------------------------------------------------------------- time left, log


def test_the_time_left_is_true_for_dearer_sizes_and_evaluations():
    """A run is played with known costs; the estimate is exact at every moment."""
    work = pace.Work(epochs=6, epoch_costs=(1.0, 3.0, 5.0), evaluation_cost=0.5, eval_every=4)
    moments, clock = [], 0.0
    for epoch in range(6):
        for part in (0.25, 0.5, 0.75, 1.0):
            clock += (1.0, 3.0, 5.0)[epoch // 2] / 4
            moments.append((clock, work.done(epoch, part)))
        if epoch in (3, 5):
            for part in (0.5, 1.0):
                clock += 0.25
                moments.append((clock, work.done(epoch, 1.0, part)))
    assert work.total == pytest.approx(clock) and work.done(6) == pytest.approx(clock)
    begin_clock, begin = moments[4]  # a run resumed here knows nothing of the time before
    for now, done in moments[5:]:
        left = pace.seconds_left(work, begin, done, 2 * (now - begin_clock))
        assert left == pytest.approx(2 * (clock - now))
    assert pace.seconds_left(work, begin, begin, 1.0) is None


def test_measuring_costs_changes_nothing():
    torch.manual_seed(0)
    model = MobileNetV2(Architecture(4, 0.1), dropout=0.5)
    before, numbers = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    costs = pace.size_costs(model, (8, 32), batch_size=16)
    assert len(costs) == 2 and 0 < costs[0] < costs[1]
    assert torch.equal(numbers, torch.get_rng_state()) and model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert pace.size_costs(model, (32,), 16) == (1.0,)


def test_a_resumed_run_goes_on_in_its_part_of_the_log(image_folder, tmp_path):
    """Also with another limit on the clock, and more than once."""
    one = settings(image_folder, tmp_path, epochs=3)
    for minutes, epochs in ((0.0, 1), (50.0, 2), (60.0, 3)):
        seen = []

        def stop(row: Epoch, seen=seen, epochs=epochs) -> None:
            seen.append(row)
            if row.epoch == epochs < 3:
                raise KeyboardInterrupt

        again = dataclasses.replace(one, max_minutes=minutes, resume=epochs > 1)
        with pytest.raises(KeyboardInterrupt) if epochs < 3 else contextlib.nullcontext():
            train.train(again, stop)
    lines = (tmp_path / "training_log.txt").read_text().splitlines()
    assert [line.split()[0] for line in lines] == ["#", "epoch", "1", "2", "3"]


def test_a_run_that_is_over_gives_back_its_checkpoint_without_validation(image_folder, tmp_path):
    """Killed after the last state was saved, before the note that the run is finished."""
    one = settings(image_folder, tmp_path, val_size=0, epochs=1)
    saved = tmp_path / "net.safetensors.resume"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runstate, "save_finished", lambda *_: None)
        made = train.train(one)
    assert saved.stat().st_size > runstate.MARKER_BYTES
    again = train.train(dataclasses.replace(one, resume=True))
    assert again.metrics == made.metrics


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


def test_the_log_keeps_other_runs_and_cuts_only_the_line_that_is_repeated(tmp_path):
    path = tmp_path / "log.txt"

    def written(command: str, after: int | None, *lines: str) -> list[str]:
        with open_log(path, command, after) as log:
            log.writelines(f"{line}\n" for line in lines)
        return path.read_text().splitlines()

    columns = "epoch lr train_loss train_acc val_loss val_acc test_loss test_acc images_per_second"
    for command in ("a", "b"):
        written(command, None, "9 x", "10 x")
    first = ["# a", columns, "9 x"]
    between = ["# b", columns, "9 x", "10 new"]
    assert written("b", 9, "10 new") == [*first, "10 x", *between]
    assert written("a", 9, "10 new") == [*first, *between, "# a", columns, "10 new"]  # behind "b"
    lines = written("a", 10, "11 new")  # goes on there
    assert lines == [*first, *between, "# a", columns, "10 new", "11 new"]
    # Two lines after the state cannot be this run's: one of the same command in another folder, or lines that mixed.
    assert written("a", 9, "10 other") == [*lines, "# a", columns, "10 other"]
    path.write_text(path.read_text().rstrip())
    assert written("a", 10, "11 other")[-2:] == ["10 other", "11 other"]  # also behind a line that is not ended
