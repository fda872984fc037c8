"""Trains an FP32 MobileNetV2 and saves its best checkpoint.

python train.py --dataset digits --width-mult 0.35 --epochs 15
python train.py --data-dir ./data --batch-size 128 --epochs 300 --lr 0.1
python train.py --resume                     (goes on after Ctrl-C, SIGTERM or a crash)
"""

import contextlib
import dataclasses
import json
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch
from tqdm import tqdm

import checkpoint as checkpoints
import data
import training
from checkpoint import Checkpoint
from cli import flag, option, parse
from errors import UserError, run_main
from evaluation import Score, choose_device, normalized, score
from files import write_atomically
from models import Architecture, MobileNetV2

LOG_HEADER = "epoch lr train_loss train_acc val_loss val_acc test_loss test_acc images_per_second"


@dataclass(frozen=True)
class Settings:
    """The command line of train.py."""

    dataset: str | None = option(
        None, "data set; without it: folder if DATA_DIR/train exists, else cifar10", choices=data.DATASETS, group="data"
    )
    data_dir: Path = option(Path("data"), "folder of the data set", group="data")
    val_size: int = option(
        5000, "training pictures held out to choose the best epoch (at most a tenth of them)", low=0, group="data"
    )
    pad: int = option(4, "random shift by up to this many pixels", low=0, high=16, group="data")
    flip: bool | None = option(None, "mirror half of the pictures (default: yes, except for digits)", group="data")
    cutout: int = option(0, "side of a random blank square", low=0, high=32, group="data")
    progressive_sizes: tuple[int, ...] = option(
        (), "train on smaller pictures first, in equal shares of the run, e.g. 16,24,32", low=8, high=32, group="data"
    )

    width_mult: float = option(1.0, "channels relative to the paper's network", low=0.05, high=4, group="network")
    dropout: float = option(0.0, "dropout before the classifier", low=0, high=0.9, group="network")
    pretrained: bool = option(False, "start from torchvision's ImageNet weights (width 1.0)", group="network")
    checkpoint: Path | None = option(None, "start from the weights of this checkpoint", group="network")

    epochs: int = option(300, "passes over the training pictures", low=1, group="training")
    batch_size: int = option(128, "pictures a step", low=2, group="training")
    lr: float = option(0.1, "highest learning rate", low=0, group="training")
    scheduler: str = option(
        "cosine", "learning rate after the warm-up", choices=("cosine", "constant"), group="training"
    )
    warmup_epochs: float | None = option(
        None, "linear warm-up (default: 5, at most a tenth of the epochs)", low=0, group="training"
    )
    momentum: float = option(0.9, "Nesterov momentum", low=0, high=0.999, group="training")
    weight_decay: float = option(5e-4, "on convolution and linear weights", low=0, group="training")
    label_smoothing: float = option(0.1, "share of the target given to all classes", low=0, high=0.9, group="training")
    ema_decay: float = option(
        0.0, "evaluate a moving average of the weights, e.g. 0.999", low=0, high=0.99999, group="training"
    )
    seed: int = option(0, "of weights, split, order and augmentation", low=0, group="training")
    max_minutes: float = option(
        0.0, "end after this much training time; the schedule bends to it", low=0, group="training"
    )
    eval_every: int = option(1, "epochs between evaluations on validation and test", low=1, group="training")

    device: str | None = option(None, "cpu, cuda, cuda:1, mps (default: the best there is)", group="machine")
    bf16: bool | None = option(None, "bfloat16 autocast (default: on CUDA)", group="machine")
    compile: bool = option(False, "torch.compile the network", group="machine")
    save_path: Path = option(
        Path("checkpoints/mnv2_fp32_best.pth"), "best checkpoint; .safetensors or .pth", group="files"
    )
    log_file: Path | None = option(
        None, "one line an epoch (default: training_log.txt beside the checkpoint)", group="files"
    )
    resume: bool = option(False, "go on from the state saved beside SAVE_PATH, if there is one", group="files")


# Settings that may differ between the parts of a resumed run: they do not change its result.
FREE = {"data_dir", "eval_every", "device", "compile", "save_path", "log_file", "resume"}


def make_recipe(settings: Settings, device: torch.device, dataset: str) -> training.Recipe:
    flip = settings.flip if settings.flip is not None else dataset != "digits"
    shared = {
        f.name: getattr(settings, f.name) for f in dataclasses.fields(training.Recipe) if hasattr(settings, f.name)
    }
    shared["augmentation"] = data.Augmentation(settings.pad, flip, settings.cutout)
    shared["bf16"] = settings.bf16 if settings.bf16 is not None else device.type == "cuda"
    shared["warmup_epochs"] = (
        min(5.0, settings.epochs / 10) if settings.warmup_epochs is None else settings.warmup_epochs
    )
    if shared["warmup_epochs"] >= settings.epochs:
        raise UserError(f"--warmup-epochs is {shared['warmup_epochs']}; expected less than --epochs {settings.epochs}")
    return training.Recipe(**shared)


def first_model(settings: Settings, classes: int) -> MobileNetV2:
    torch.manual_seed(settings.seed)
    model = MobileNetV2(Architecture(classes, settings.width_mult), settings.dropout)
    if settings.pretrained:
        model.load_state_dict(checkpoints.pretrained_state(model))
    elif settings.checkpoint:
        checkpoints.load_state(model, checkpoints.load(settings.checkpoint).state, settings.checkpoint)
    return model


def resume_path(settings: Settings) -> Path:
    return settings.save_path.with_name(settings.save_path.name + ".resume")


def save_state(state: training.State, settings: Settings) -> None:
    content = {"settings": json.dumps(dataclasses.asdict(settings), default=str), **training.to_dict(state)}
    write_atomically(resume_path(settings), lambda temporary: torch.save(content, temporary))


def load_state(state: training.State, settings: Settings) -> bool:
    """Restores the saved state if there is one; refuses a state of other settings."""
    path = resume_path(settings)
    if not path.exists():
        return False
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        theirs = json.loads(saved["settings"])
        for name, mine in json.loads(json.dumps(dataclasses.asdict(settings), default=str)).items():
            if name not in FREE and theirs.get(name) != mine:
                raise UserError(
                    f"--resume: {path} was made with {flag(name)} {theirs.get(name)}, not {mine}; "
                    "give the same settings, or start anew without --resume"
                )
        training.restore(state, saved)
    except UserError:
        raise
    except Exception as error:
        reason = str(error).splitlines()[0][:100]
        raise UserError(f"--resume: {path} cannot be read ({reason}); delete it to start anew") from None
    return True


class Interrupted(Exception):
    """Ctrl-C or SIGTERM came; the state has been saved."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextlib.contextmanager
def caught_signals() -> Iterator[list[int]]:
    """A list that Ctrl-C and SIGTERM add their number to, instead of ending the program; a second Ctrl-C ends it."""
    received: list[int] = []

    def receive(number: int, _: FrameType | None) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    previous = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def log_line(
    epoch: int, rate: float, train: tuple[float, float], val: Score | None, test: Score | None, speed: float
) -> str:
    cells = [f"{epoch}", f"{rate:.5f}", f"{train[0]:.4f}", f"{train[1]:.2f}"]
    for part in (val, test):
        cells += [f"{part.loss:.4f}", f"{part.accuracy:.2f}"] if part else ["-", "-"]
    return " ".join([*cells, f"{speed:.0f}"])


def train(settings: Settings) -> Checkpoint:
    """One run: data, network, epochs, best checkpoint. Returns the checkpoint that it saved last."""
    device = choose_device(settings.device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    name = settings.dataset or ("folder" if (settings.data_dir / "train").is_dir() else "cifar10")
    dataset = data.load(name, settings.data_dir)
    val_size = min(settings.val_size, len(dataset.train) // 10)
    rest, val = data.stratified_split(dataset.train, val_size, settings.seed)
    normalization = data.normalization_for(name, rest)
    recipe = make_recipe(settings, device, name)

    state = training.start(first_model(settings, len(dataset.classes)), recipe, device)
    resumed = settings.resume and load_state(state, settings)
    forward = torch.compile(state.model) if settings.compile else state.model
    on_device, val, test = rest.to(device), val.to(device), dataset.test.to(device)
    log_path = settings.log_file or settings.save_path.parent / "training_log.txt"
    log_path.parent.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["python", "train.py", *sys.argv[1:]])
    saved = checkpoints.load(settings.save_path) if resumed and settings.save_path.exists() else None

    with open(log_path, "a") as log, caught_signals() as signals, progress_bar(recipe, len(rest), state) as bar:
        if not resumed:
            print(f"# {command}\n{LOG_HEADER}", file=log, flush=True)
        steps = training.steps_per_epoch(len(rest), recipe.batch_size)
        while training.progress(state, recipe, steps) < 1.0:
            pictures, begun, rate = 0, time.perf_counter(), 0.0

            def on_step(new_rate: float, size: int, count: int) -> bool:
                nonlocal pictures, rate
                pictures, rate = pictures + count, new_rate
                bar.update(state.seconds - bar.n if recipe.max_minutes else count * size**2 / data.SIZE**2)
                return not signals

            complete = training.train_epoch(state, on_device, recipe, normalization, forward, on_step)
            if not complete:
                save_state(state, settings)
                raise Interrupted(signals[0])
            speed = pictures / (time.perf_counter() - begun)
            means = training.end_epoch(state, len(rest))
            val_score = test_score = None
            last = training.progress(state, recipe, steps) >= 1.0
            if last or state.epoch % settings.eval_every == 0:
                forward_eval = normalized(state.evaluated().eval(), normalization)
                val_score = score(forward_eval, val, 256, device) if len(val) else None
                test_score = score(forward_eval, test, 256, device)
            line = log_line(state.epoch, rate, means, val_score, test_score, speed)
            print(line, file=log, flush=True)
            bar.set_postfix_str(
                f"epoch {state.epoch}, loss {means[0]:.3f}" + (f", val {val_score.accuracy:.2f} %" if val_score else "")
            )
            if test_score and (val_score is None or val_score.accuracy > state.best_accuracy):
                state.best_accuracy = val_score.accuracy if val_score else -1.0
                metrics = {
                    "epoch": state.epoch,
                    "val_acc": val_score.accuracy if val_score else None,
                    "test_acc": test_score.accuracy,
                    "seed": settings.seed,
                    "val_size": val_size,
                    "minutes": round(state.seconds / 60, 1),
                    "command": command,
                }
                saved = Checkpoint(
                    state.model.architecture,
                    state.evaluated().state_dict(),
                    name,
                    dataset.classes,
                    normalization,
                    metrics,
                )
                checkpoints.save(saved, settings.save_path)
            save_state(state, settings)
            if signals:
                raise Interrupted(signals[0])
    resume_path(settings).unlink(missing_ok=True)
    return saved


def progress_bar(recipe: training.Recipe, pictures: int, state: training.State) -> tqdm:
    """Counts seconds where the clock ends the run, else full-size pictures: so that small ones do not mislead it."""
    if recipe.max_minutes:
        return tqdm(
            total=round(60 * recipe.max_minutes),
            initial=state.seconds,
            unit="s",
            desc="training",
            bar_format="{l_bar}{bar}| {n:.0f}/{total:.0f} s {postfix}",
            smoothing=0.02,
            disable=None,
        )
    sizes = recipe.progressive_sizes or (data.SIZE,)
    cost = sum(size**2 / data.SIZE**2 for size in sizes) / len(sizes)
    done = training.progress(state, recipe, training.steps_per_epoch(pictures, recipe.batch_size))
    total = recipe.epochs * pictures * cost
    return tqdm(
        total=round(total),
        initial=done * total,
        unit="img",
        unit_scale=True,
        desc="training",
        smoothing=0.02,
        disable=None,
    )


def main() -> int:
    settings = parse(Settings, __doc__, sys.argv[1:])
    try:
        checkpoint = train(settings)
    except Interrupted as stop:
        print(f"interrupted; the state is saved in {resume_path(settings)}: the same command with --resume goes on")
        return 128 + stop.number
    metrics = checkpoint.metrics
    chosen = f"validation {metrics['val_acc']:.2f} %" if metrics["val_acc"] is not None else "last epoch"
    print(f"saved {settings.save_path}: epoch {metrics['epoch']}, {chosen}, test {metrics['test_acc']:.2f} %")
    return 0


if __name__ == "__main__":
    run_main(main)
