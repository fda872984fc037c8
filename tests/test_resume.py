"""A run interrupted anywhere ends bit for bit like an uninterrupted one, and no file of a run is lost or mixed up."""

import contextlib
import dataclasses
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT
from test_files import full_disk

import checkpoint as checkpoints
import data
import runstate
import train
import training
from cli import flag
from data import Split
from errors import UserError
from interrupts import Interrupted
from tests.training_helpers import assert_same_end, log_rows, settings
from traininglog import Epoch, open_log

VARIANTS = {
    "plain": {},
    "all": dict(
        ema_decay=0.9, dropout=0.3, progressive_sizes=(8, 16), cutout=8, trivial_augment=True, cutmix=0.5, eval_every=2
    ),
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
    moments, codes = random.Random(0), []
    for number, code in ((signal.SIGKILL, -9), (signal.SIGTERM, 143)):
        log, before = other / "training_log.txt", len(log_rows(other)) if other.exists() else 0
        process = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        while process.poll() is None and not (log.exists() and len(log_rows(other)) > before):
            time.sleep(0.005)
        time.sleep(0.2 * moments.random())
        process.send_signal(number)
        _, err = process.communicate(timeout=120)
        assert err == "" and process.returncode in (code, 0, -15)  # 0 and -15: it was done before the signal
        codes.append(process.returncode)
        checkpoints.load(other / "net.safetensors")
    assert {-9, 143} & {*codes}  # one of them at least was not over yet
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
