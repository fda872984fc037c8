"""Trains an FP32 MobileNetV2 and saves its best checkpoint.

examples:
  python train.py --dataset digits --width-mult 0.35 --epochs 15 --save-path digits.pth    a minute, no download
  python train.py --data-dir ./data                            CIFAR-10 (fetched) or a folder of images
  python train.py --data-dir ./data --resume                   goes on after Ctrl-C, SIGTERM or a crash
  python train.py --qat --weight-quant-bits 2 --activation-quant-bits 4 --checkpoint C --epochs 5
                                                               quantization-aware fine-tuning to a packed file
"""

if __name__ == "__main__":
    import startup  # noqa: F401 - first of all, see there

import dataclasses
import itertools
import math
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor
from tqdm import tqdm

import checkpoint as checkpoints
import data
import pace
import qat
import runstate
import tracking
import training
from allocator import keep_freed_memory
from augmentation import Augmentation
from checkpoint import Checkpoint
from cli import MOST_SEED, flag, option, parse, to_argv
from errors import UserError, reason, run_main
from evaluation import Score, choose_device, normalized, score
from files import check_writable, locked, same_file
from interrupts import Interrupted, signals_caught
from models import Architecture, MobileNetV2, multiply_adds, skeleton
from quantization import predictor
from subject import split_as_trained, split_of
from traininglog import COLUMNS, Epoch, open_log

IMAGENET = data.Normalization((124, 116, 104), 58.0)  # what torchvision's weights were trained with, rounded to pixels


@dataclass(frozen=True)
class Settings:
    """The command line of train.py."""

    dataset: str | None = option(
        None, "data set; without it: folder if DATA_DIR/train exists, else cifar10", choices=data.DATASETS, group="data"
    )
    data_dir: Path = option(Path("data"), "folder of the data set", group="data")
    val_size: int = option(
        5000, "training images held out to choose the best epoch (at most a tenth of them)", low=0, group="data"
    )
    pad: int = option(4, "random shift by up to this many pixels", low=0, high=16, group="data")
    flip: bool | None = option(None, "mirror half of the images (default: yes, except for digits)", group="data")
    cutout: int = option(0, "side of a random blank square", low=0, high=32, group="data")
    trivial_augment: bool = option(
        False, "change each image by one random operation of random strength (TrivialAugment)", group="data"
    )
    cutmix: float = option(0.0, "share of the images that get a square of another", low=0, high=1, group="data")
    progressive_sizes: tuple[int, ...] = option(
        (),
        "image sizes, one after another in equal shares of the run, e.g. 16,24,32 (faster)",
        low=8,
        high=32,
        group="data",
    )

    width_mult: float = option(1.0, "channels relative to the paper's network", low=0.05, high=4, group="network")
    dropout: float = option(0.0, "dropout before the classifier", low=0, high=0.9, group="network")
    pretrained: bool = option(False, "start from torchvision's ImageNet weights (width 1.0 only)", group="network")
    checkpoint: Path | None = option(
        None, "start from the weights of this checkpoint; a new classifier if its classes are others", group="network"
    )

    epochs: int = option(300, "passes over the training images", low=1, high=10**6, group="training")
    batch_size: int = option(128, "images per step", low=2, high=10**6, group="training")
    lr: float = option(0.1, "highest learning rate", low=0, high=1000, group="training")
    scheduler: str = option(
        "cosine", "learning rate after the warm-up", choices=("cosine", "constant"), group="training"
    )
    warmup_epochs: float | None = option(
        None, "length of the linear warm-up (default: 5, at most a tenth of the epochs)", low=0, group="training"
    )
    momentum: float = option(0.9, "Nesterov momentum", low=0, high=0.999, group="training")
    weight_decay: float = option(5e-4, "on convolution and linear weights", low=0, high=1000, group="training")
    label_smoothing: float = option(0.1, "share of the target given to all classes", low=0, high=0.9, group="training")
    ema_decay: float = option(
        0.0, "evaluate and save a moving average of the weights, e.g. 0.999", low=0, high=0.99999, group="training"
    )
    seed: int = option(0, "seed of weights, split, order and augmentation", low=0, high=MOST_SEED, group="training")
    max_minutes: float = option(
        0.0,
        "stop after this much time of training and evaluation; the schedule is compressed to fit",
        low=0,
        high=10**6,
        group="training",
    )
    eval_every: int = option(1, "epochs between evaluations on validation and test", low=1, group="training")

    qat: bool = option(
        False, "quantize --checkpoint and fine-tune it, with the FP32 network as teacher", group="fine-tuning"
    )
    weight_quant_bits: int | None = option(
        None, "bits of the weights, 2 to 8", aliases=["weight_bits"], low=2, high=8, group="fine-tuning"
    )
    activation_quant_bits: int | None = option(
        None,
        "bits of the activations, 2 to 8",
        aliases=["act_bits", "activation_bits"],
        low=2,
        high=8,
        group="fine-tuning",
    )
    qat_lr: float = option(0.002, "highest learning rate of --qat (Adam's)", low=0, high=1000, group="fine-tuning")
    distill: float = option(
        1.0, "the teacher's share of the --qat loss; the labels get the rest", low=0, high=1, group="fine-tuning"
    )

    device: str | None = option(None, "cpu, cuda, cuda:1, mps (default: the best there is)", group="machine")
    bf16: bool | None = option(None, "bfloat16 autocast (default: on CUDA)", group="machine")
    compile: bool = option(False, "torch.compile the network; adds a minute at the start", group="machine")
    save_path: Path = option(
        Path("checkpoints/mnv2_fp32_best.pth"), "where the best checkpoint goes; .safetensors or .pth", group="files"
    )
    log_file: Path | None = option(
        None, "log file, one line per epoch (default: training_log.txt next to the checkpoint)", group="files"
    )
    resume: bool = option(False, "go on from the state saved beside the checkpoint, if there is one", group="files")
    log_wandb: bool = option(False, "report to Weights & Biases (automatic under `wandb agent`)", group="W&B")
    log_artifact: bool = option(False, "upload the best checkpoint as an artifact", group="W&B")


# Settings that may differ between the parts of a resumed run. max_minutes, eval_every and device (bf16 depends on it)
# affect how the rest of it goes; the others do not decide its result.
FREE = {"data_dir", "eval_every", "max_minutes", "device", "compile", "save_path", "log_file", "resume"}
FREE |= {"log_wandb", "log_artifact"}


# Settings that only fine-tuning uses, and those that only FP32 training uses (fine-tuning takes width and split from
# its checkpoint).
QAT_ONLY = ("weight_quant_bits", "activation_quant_bits", "qat_lr", "distill")
FP32_ONLY = ("lr", "momentum", "weight_decay", "width_mult", "dropout", "pretrained", "val_size")


@dataclass(frozen=True)
class Run:
    """Everything a run needs. train, val and test are on the device; only `state` changes. digest, val_digest: CRC-32
    of train and val; split_seed: the seed that drew val; title: the command line that started the run."""

    settings: Settings
    recipe: training.Recipe
    classes: tuple[str, ...]
    normalization: data.Normalization
    train: data.Split
    val: data.Split
    test: data.Split
    state: training.State
    digest: str
    val_digest: str
    split_seed: int
    title: str
    tuning: qat.FineTuning | None = None

    @property
    def steps(self) -> int:
        return training.steps_per_epoch(len(self.train), self.recipe.batch_size)


def train(settings: Settings, on_epoch: Callable[[Epoch], None] = lambda _: None) -> Checkpoint:
    """One run: data, network, epochs, best checkpoint. Returns the checkpoint; calls `on_epoch` after every epoch.

    Raises `Interrupted` after Ctrl-C or SIGTERM, with the state saved.
    """
    settings = dataclasses.replace(settings, dataset=settings.dataset or data.default_name(settings.data_dir))
    check_together(settings)
    device = choose_device(settings.device)
    if settings.compile:
        check_compiler(device)
    recipe = make_recipe(settings, device)
    for path in (settings.save_path, resume_path(settings), log_path(settings)):
        check_writable(path)
    with locked(settings.save_path, wait=False):
        saved = runstate.read(resume_path(settings), settings, FREE) if settings.resume else None
        if saved and saved["finished"]:
            return finished(settings)
        if not saved:
            check_free(settings)
        with locked(log_path(settings), wait=False, otherwise="give another --log-file"):
            return train_epochs(start(settings, recipe, device, saved), saved is not None, on_epoch)


def train_epochs(run: Run, resumed: bool, on_epoch: Callable[[Epoch], None]) -> Checkpoint:
    """All epochs of the run, or those that are left of it where it is `resumed`."""
    settings, recipe, state = run.settings, run.recipe, run.state
    best = checkpoint_so_far(run)
    forward = torch.compile(state.model, dynamic=False) if settings.compile else state.model
    criterion = None
    if run.tuning:
        options = recipe.label_smoothing, recipe.bf16, settings.compile
        criterion = qat.distillation(run.tuning.teacher, settings.distill, *options)
    step = training.stepper(state, run.train, recipe, run.normalization, forward, criterion)
    with (
        open_log(log_path(settings), run.title, state.epoch if resumed else None) as log,
        signals_caught() as signals,
        pace.new_bar() as bar,
    ):
        watch = watcher(run, bar, signals)
        if not resumed:
            save_state(run)  # so that --resume knows this run from here on
        if bar.disable:
            print(COLUMNS, flush=True)
        try:
            while unfinished(run, best):
                training.train_epoch(state, run.train, recipe, step, watch)
                row = end_epoch(run, watch)
                if row.test and (row.val is None or row.val.accuracy > state.best_accuracy):
                    state.best_accuracy = row.val.accuracy if row.val else math.nan
                    best = make_checkpoint(run, row)
                    save_best(run, best)
                write_line(run, row, log)
                training.next_epoch(state)
                save_state(run)
                if bar.disable:
                    print(row.line(), flush=True)  # after the state is saved: the reader of our output may be gone
                on_epoch(row)
        except Interrupted:
            save_state(run)
            raise
        except torch.OutOfMemoryError as error:
            if not state.epoch and not state.step:
                resume_path(settings).unlink()  # nothing to go on from: the next try is a new run
            raise UserError(f"out of memory ({reason(error)}); give a smaller --batch-size") from None
    runstate.save_finished(resume_path(settings), settings)
    return best


# -------------------------------------------------------------------------------------------------- before the epochs


def unfinished(run: Run, best: Checkpoint | None) -> bool:
    """Whether an epoch is left; one more is trained where the run was cut within one, or its checkpoint is lost."""
    state = run.state
    return best is None or state.step > 0 or training.progress(state, run.recipe, run.steps) < 1.0


def check_together(settings: Settings) -> None:
    """UserError for flags that would be ignored, and for output paths that coincide."""
    files = {
        "--save-path": settings.save_path,
        "the state of the run": resume_path(settings),
        "the log": log_path(settings),
        "the --checkpoint": settings.checkpoint,
    }
    for (one, path), (other, again) in itertools.combinations(files.items(), 2):
        if same_file(path, again):
            raise UserError(f"{one} is {other} itself ({path}); give it another name")
    if settings.pretrained and settings.checkpoint:
        raise UserError("--pretrained and --checkpoint both give first weights; choose one")
    for name in FP32_ONLY if settings.qat else QAT_ONLY:
        if getattr(settings, name) != getattr(Settings, name):
            there = "does nothing with --qat" if settings.qat else "goes with --qat"
            raise UserError(f"{flag(name)} {there}; leave it out" + ("" if settings.qat else ", or add --qat"))
    if settings.qat and settings.distill == 1 and settings.label_smoothing != Settings.label_smoothing:
        raise UserError("--label-smoothing does nothing where the teacher has all of the loss; give --distill below 1")


def make_recipe(settings: Settings, device: torch.device) -> training.Recipe:
    """The part of the settings that decides the result, with the defaults that depend on others filled in."""
    flip = settings.flip if settings.flip is not None else settings.dataset != "digits"
    shared = {
        f.name: getattr(settings, f.name) for f in dataclasses.fields(training.Recipe) if hasattr(settings, f.name)
    }
    shared["augmentation"] = Augmentation(
        settings.pad, flip, settings.cutout, settings.trivial_augment, settings.cutmix
    )
    if settings.bf16 is None:
        shared["bf16"] = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if settings.qat:  # bfloat16 has too few digits to tell the steps of 8 bits apart
        shared |= {"lr": settings.qat_lr, "bf16": bool(settings.bf16)}
    if settings.warmup_epochs is None:
        shared["warmup_epochs"] = min(5.0, settings.epochs / 10)
    elif settings.warmup_epochs >= settings.epochs:
        raise UserError(f"--warmup-epochs is {settings.warmup_epochs}; expected less than --epochs {settings.epochs}")
    return training.Recipe(**shared)


def check_free(settings: Settings) -> None:
    """UserError if this run would overwrite the checkpoint or state of an earlier one."""
    runstate.check_none(resume_path(settings))
    if settings.save_path.exists():
        raise UserError(f"{settings.save_path} already exists; give another --save-path, or delete it")


def finished(settings: Settings) -> Checkpoint:
    """The checkpoint of a run that is over."""
    if not settings.save_path.exists():
        raise UserError(
            f"this run is finished, but its checkpoint {settings.save_path} is gone; delete {resume_path(settings)} "
            "to train anew"
        )
    print(f"this run is finished; {settings.save_path} is its checkpoint")
    return load_best(settings)


def start(settings: Settings, recipe: training.Recipe, device: torch.device, saved: dict[str, Any] | None) -> Run:
    """Data and network before the first step, or, from `saved`, before the next one."""
    dataset = data.load(settings.dataset, settings.data_dir)
    tuning = None
    if settings.qat:
        bits = settings.weight_quant_bits, settings.activation_quant_bits
        tuning = qat.first_tuning(settings.checkpoint, dataset, *bits, settings.seed, device)
        rest, val, normalization = tuning.train, tuning.val, tuning.teacher.normalization
        split_seed = tuning.split_seed
        state = qat.start(tuning, recipe, device)
    else:
        first = checkpoints.load(settings.checkpoint) if settings.checkpoint else None
        rest, val, split_seed = split(settings, dataset, first)
        model, normalization = first_model(settings, dataset, rest, first, saved)
        state = training.start(model, recipe, device)
    run = Run(
        settings,
        recipe,
        dataset.classes,
        normalization,
        *(split.to(device) for split in (rest, val, dataset.test)),
        state,
        data.split_checksum(rest),
        data.split_checksum(val),
        split_seed,
        saved.get("title", command(settings)) if saved else command(settings),
        tuning,
    )
    if saved:
        restore(run, saved)
    describe(run, device, saved is not None)
    return run


def split(settings: Settings, dataset: data.Dataset, first: Checkpoint | None) -> tuple[data.Split, data.Split, int]:
    """(training images, validation images, the seed that drew them). What a checkpoint `first` held out stays held
    out: the other images trained its weights, and validation would choose by what they know by heart."""
    seed, size = settings.seed, min(settings.val_size, len(dataset.train) // 10)
    if first and first.classes == dataset.classes:
        held_out, seed = split_of(first)
        if held_out:
            if settings.val_size != Settings.val_size and size != held_out:
                raise UserError(
                    f"--val-size is {settings.val_size}, but {settings.checkpoint} was trained without {held_out} "
                    "images, and they are held out again; leave it out"
                )
            return *split_as_trained(first, dataset.train), seed
        if size:
            print(
                f"note: {settings.checkpoint} names no images that it was not trained on: those held out here may "
                "have trained it",
                file=sys.stderr,
            )
    return *data.stratified_split(dataset.train, size, seed), seed


def first_model(
    settings: Settings, dataset: data.Dataset, rest: data.Split, first: Checkpoint | None, saved: dict[str, Any] | None
) -> tuple[MobileNetV2, data.Normalization]:
    """The network before its first step and the normalisation of its images: that of the weights it starts from.

    first: the --checkpoint, where one is given."""
    torch.manual_seed(settings.seed)
    model = MobileNetV2(Architecture(len(dataset.classes), settings.width_mult), settings.dropout)
    normalization = data.normalization_for(settings.dataset, rest)
    if saved and "normalization" in saved:  # the weights follow, with the rest of the state
        normal = saved["normalization"]
        return model, data.Normalization(tuple(normal["mean"]), normal["std"])
    if settings.pretrained:
        model.load_state_dict(checkpoints.pretrained_state(model))
        normalization = IMAGENET
    if first:
        state, normalization = first.state, first.normalization
        width = first.architecture.width_mult
        if width != settings.width_mult:
            raise UserError(f"{settings.checkpoint} is a network of width {width}; give --width-mult {width}")
        if first.classes != dataset.classes:
            print(f"{settings.checkpoint} knows other classes ({first.dataset}); the classifier is reinitialised")
            state = checkpoints.replace_classifier(state, model)
        checkpoints.load_state(model, state, settings.checkpoint)
    return model, normalization


def describe(run: Run, device: torch.device, resumed: bool) -> None:
    """Prints the network, the device, the data and where training starts."""
    state, settings = run.state, run.settings
    architecture = state.model.architecture
    model = skeleton(architecture)
    parameters, operations = sum(p.numel() for p in model.parameters()) / 1e6, multiply_adds(model) / 1e6
    print(
        f"MobileNetV2 x{architecture.width_mult:g} ({parameters:.2f} M parameters, {operations:.0f} M multiply-adds), "
        f"{device}, {settings.dataset}: {len(run.train)} training, "
        f"{len(run.val)} validation and {len(run.test)} test images"
    )
    path = resume_path(settings)
    if resumed:
        print(f"resuming from {path}: epoch {state.epoch + 1}, step {state.step + 1}")
    elif settings.resume:
        print(f"nothing to resume ({path} does not exist): starts at epoch 1")


def check_compiler(device: torch.device) -> None:
    """UserError where torch.compile would find no compiler, after minutes and in many lines."""
    variable, names = ("CC", ["gcc", "clang"]) if device.type == "cuda" else ("CXX", ["g++", "clang++"])
    names = os.environ.get(variable, "").split()[:1] or names
    if not any(map(shutil.which, names)):
        raise UserError(f"--compile needs a compiler, and there is no {names[0]}; install it, or leave out --compile")


# ---------------------------------------------------------------------------------------------------- in every epoch


def watcher(run: Run, bar: tqdm, signals: list[int]) -> Callable[..., None]:
    """A callback for every step: updates the bar, and raises `Interrupted` once a signal has arrived. During evaluation
    it is passed the number of val and test images done.
    """
    state, recipe, images = run.state, run.recipe, len(run.train)
    sizes = recipe.progressive_sizes or (run.train.images.shape[-1],)
    costs = (1.0,) if bar.disable else pace.size_costs(state.model, sizes, min(recipe.batch_size, images))
    full, evaluation = images * (1 + pace.BACKWARD), len(run.val) + len(run.test)
    work = pace.Work(recipe.epochs, tuple(full * c / costs[-1] for c in costs), evaluation, run.settings.eval_every)
    first, begun = work.done(state.epoch, state.step / run.steps), time.perf_counter()
    budget = 60 * recipe.max_minutes

    def watch(evaluated: int = 0) -> None:
        if signals:
            raise Interrupted(signals[0])
        if bar.disable:
            return
        now = work.done(state.epoch, state.step / run.steps, evaluated / evaluation)
        left, share = pace.seconds_left(work, first, now, time.perf_counter() - begun), now / work.total
        if budget:
            left = min(budget - state.seconds, math.inf if left is None else left)
            share = max(share, state.seconds / budget)
        speed = training.images_seen(state, images, recipe) / max(state.epoch_seconds, 1e-9)
        what = "evaluates" if evaluated else f"{speed:.0f} img/s"
        best = f", best {state.best_accuracy:.2f} %" if state.best_accuracy >= 0 else ""
        pace.show(bar, share, left, f"epoch {state.epoch + 1}/{recipe.epochs}, {what}{best}")

    return watch


def end_epoch(run: Run, watch: Callable[..., None]) -> Epoch:
    """Means of the epoch that has just been trained and, every `--eval-every` epochs and at the end, evaluations."""
    state, recipe, settings = run.state, run.recipe, run.settings
    seen = training.images_seen(state, len(run.train), recipe)
    loss, accuracy = training.epoch_means(state, seen)
    if not (math.isfinite(loss) and training.all_finite(state)):
        kept = f"{settings.save_path} is as it was before" if settings.save_path.exists() else "no checkpoint was saved"
        raise UserError(
            f"training diverged in epoch {state.epoch + 1} (loss {loss}), {kept}; "
            f"try a lower {'--qat-lr' if settings.qat else '--lr'} than {recipe.lr:g} or a longer --warmup-epochs, "
            "with another --save-path"
        )
    scores: tuple[Score | None, ...] = (None, None)
    if (state.epoch + 1) % settings.eval_every == 0 or training.progress(state, recipe, run.steps) >= 1.0:
        begun, done, forward = time.perf_counter(), 0, as_evaluated(run)

        def on_batch(count: int) -> None:
            nonlocal done
            done += count
            watch(done)

        size = 1024 if run.test.images.is_cuda else 256
        splits = (run.val, run.test)
        scores = tuple(score(forward, s, size, s.images.device, on_batch) if len(s) else None for s in splits)
        state.seconds += time.perf_counter() - begun
    rate = state.optimizer.param_groups[0]["lr"]
    return Epoch(state.epoch + 1, rate, loss, accuracy, *scores, images_per_second=seen / state.epoch_seconds)


def write_line(run: Run, row: Epoch, log: TextIO) -> None:
    """Appends the epoch to the log. If that fails, saves the state as it was before this line and raises UserError, so
    that --resume evaluates the epoch again and logs it."""
    try:
        print(row.line(), file=log, flush=True)
    except OSError as error:
        save_state(run)
        raise UserError(
            f"cannot write {log_path(run.settings)}: {error.strerror}; the state is saved: free some space, "
            "then run again with --resume"
        ) from None


def as_evaluated(run: Run) -> Callable[[Tensor], Tensor]:
    """uint8 images → logits, of the network as it is saved: fine-tuning evaluates the integers that it packs."""
    model = run.state.evaluated().eval()
    if run.tuning:
        return predictor(model.quantized(), run.test.images.device)
    return normalized(model, run.normalization)


def make_checkpoint(run: Run, row: Epoch) -> Checkpoint:
    """The evaluated weights with all that is needed to use them, and how the run got there."""
    state, settings = run.state, run.settings
    metrics = {
        "epoch": row.epoch,
        "val_acc": row.val.accuracy if row.val else None,
        "test_acc": row.test.accuracy,
        "seed": settings.seed,
        "split_seed": run.split_seed,
        "val_size": len(run.val),
        "val_crc32": run.val_digest,
        "minutes": round(state.seconds / 60, 1),
        "command": command(settings),
    }
    weights = {name: tensor.detach().cpu().clone() for name, tensor in state.evaluated().state_dict().items()}
    return Checkpoint(state.model.architecture, weights, settings.dataset, run.classes, run.normalization, metrics)


def save_best(run: Run, best: Checkpoint) -> None:
    """Writes the best checkpoint so far; fine-tuning writes a packed file."""
    if run.tuning:
        qat.save(run.state.evaluated(), run.tuning, best, run.settings.save_path)
    else:
        checkpoints.save(best, run.settings.save_path)


def load_best(settings: Settings) -> Checkpoint:
    """What `save_best` wrote."""
    if settings.qat:
        return qat.load(settings.save_path)
    return checkpoints.load(settings.save_path)


def command(settings: Settings) -> str:
    """The command line of these settings (without --resume: an interrupted and resumed run is still one run)."""
    return shlex.join(
        [
            "python",
            "train.py",
            *to_argv(dataclasses.replace(settings, resume=False, log_wandb=False, log_artifact=False)),
        ]
    )


# --------------------------------------------------------------------------------------------- the files of a run


def resume_path(settings: Settings) -> Path:
    return runstate.path_beside(settings.save_path)


def save_state(run: Run) -> None:
    known = {"normalization": dataclasses.asdict(run.normalization), "data": run.digest, "title": run.title}
    if run.tuning:
        known["teacher"] = run.tuning.row["checkpoint_hash"]
    runstate.save(resume_path(run.settings), run.settings, run.state, known)


def restore(run: Run, saved: dict[str, Any]) -> None:
    """Puts what was saved into the state of `run`; UserError if the training images are others."""
    path = resume_path(run.settings)
    if saved.get("data", run.digest) != run.digest:
        raise UserError(f"--resume: {path} belongs to other images than those in --data-dir {run.settings.data_dir}")
    if run.tuning and saved.get("teacher") not in (None, run.tuning.row["checkpoint_hash"]):
        raise UserError(f"--resume: {path} began from another network than {run.settings.checkpoint} is now")
    runstate.restore(path, run.state, saved)


def checkpoint_so_far(run: Run) -> Checkpoint | None:
    """The best checkpoint that a resumed run has saved. If it is gone, the next evaluation saves a new one."""
    if run.state.best_accuracy < 0:
        return None
    try:
        return load_best(run.settings)
    except UserError as error:
        print(f"the best checkpoint so far is lost ({error}); the best of the epochs to come will be saved")
        run.state.best_accuracy = -1.0
        return None


def with_save_path(settings: Settings) -> Settings:
    """A packed file does not take the place of an FP32 checkpoint: without --save-path, --qat names its own."""
    if not settings.qat or settings.save_path != Settings.save_path:
        return settings
    name = f"mnv2_w{settings.weight_quant_bits or 32}a{settings.activation_quant_bits or 32}_qat.safetensors"
    return dataclasses.replace(settings, save_path=settings.save_path.with_name(name))


def log_path(settings: Settings) -> Path:
    return settings.log_file or settings.save_path.parent / "training_log.txt"


def label(settings: Settings) -> tracking.Labels:
    """How W&B shows the run: by what is searched over, grouped by data set."""
    dataset = settings.dataset or data.default_name(settings.data_dir)
    if settings.qat:
        bits = f"w{settings.weight_quant_bits or 32}a{settings.activation_quant_bits or 32}"
        return tracking.Labels(f"{bits}-qat-lr{settings.qat_lr:.3g}-s{settings.seed}", dataset, ("QAT",))
    numbers = f"lr{settings.lr:.3g}-wd{settings.weight_decay:.3g}-ls{settings.label_smoothing:.3g}"
    return tracking.Labels(f"width{settings.width_mult:g}-{numbers}-s{settings.seed}", dataset, ("FP32",))


def curves(row: Epoch) -> dict[str, float | None]:
    """One point of W&B's curves; None where the epoch was not evaluated."""
    losses = {f"{name}_loss": part and part.loss for name, part in (("val", row.val), ("test", row.test))}
    accuracies = {f"{name}_acc": part and part.accuracy for name, part in (("val", row.val), ("test", row.test))}
    train_row = {n: getattr(row, n) for n in ("epoch", "lr", "train_loss", "train_acc", "images_per_second")}
    return {**train_row, **losses, **accuracies}


def main() -> int:
    settings = parse(Settings, __doc__, sys.argv[1:])
    keep_freed_memory()
    try:
        with tracking.run(settings, "training", label, settings.log_wandb or settings.log_artifact) as tracked:
            settings = with_save_path(tracked.settings)
            checkpoint = train(settings, lambda row: tracked.log(curves(row), row.epoch))
            tracked.summary({name: checkpoint.metrics[name] for name in ("epoch", "val_acc", "test_acc", "minutes")})
            if settings.log_artifact:
                tracked.artifact(settings.save_path, settings.save_path.stem, checkpoint.metrics, settings.checkpoint)
    except Interrupted as stop:
        print(f"interrupted; the state is saved in {resume_path(settings)}: the same command with --resume continues")
        return 128 + stop.number
    metrics = checkpoint.metrics
    chosen = f"validation {metrics['val_acc']:.2f} %" if metrics["val_acc"] is not None else "last epoch"
    print(f"saved {settings.save_path}: epoch {metrics['epoch']}, {chosen}, test {metrics['test_acc']:.2f} %")
    return 0


if __name__ == "__main__":
    run_main(main)
