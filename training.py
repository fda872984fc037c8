"""One training run of a network: schedule, optimiser, epoch loop, and a state that is saved and resumed at any step.

Recipe: SGD with Nesterov momentum, cosine with linear warm-up (Loshchilov & Hutter 2017; Goyal et al. 2017), label
smoothing (Szegedy et al. 2016), weight decay on convolution and linear weights only, optional exponential moving
average of the weights. All random draws of an epoch come from (seed, epoch), so a run resumed in the middle of an epoch
continues with the same images, and on a CPU ends with the same bits as the uninterrupted run. Nothing in a step waits
for the device; the sums of an epoch are read once, at its end.
"""

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from augmentation import Augmentation, augment, cutmix, epoch_draws, mixed_targets
from data import Normalization, Split
from recording import Step, recorded, set_rate

# (logits, normalised images, labels [B] or probabilities [B, classes]) → mean over the batch
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result of a run, given the data and the first weights.

    Defaults are those of train.py's flags of the same names. warmup_epochs: may be a fraction. max_minutes: wall clock,
    0 for no limit.
    """

    epochs: int = 300
    batch_size: int = 128
    lr: float = 0.1
    scheduler: str = "cosine"
    warmup_epochs: float = 5.0
    momentum: float = 0.9
    weight_decay: float = 5e-4
    label_smoothing: float = 0.1
    ema_decay: float = 0.0
    augmentation: Augmentation = Augmentation()
    progressive_sizes: tuple[int, ...] = ()
    max_minutes: float = 0.0
    bf16: bool = False
    seed: int = 0


@dataclass
class State:
    """A run in progress: the network, its average, the optimiser and how far it is. The only mutable thing here."""

    model: nn.Module
    average: nn.Module | None
    optimizer: torch.optim.Optimizer
    epoch: int = 0
    step: int = 0  # within the epoch
    seconds: float = 0.0  # of training and evaluation, over all parts of the run
    startup: float = 0.0  # of these, the first step of each part, in which compilers work
    started: bool = False  # whether this part had its first step
    epoch_seconds: float = 0.0  # of training in this epoch
    sums: Tensor = field(default_factory=lambda: torch.zeros(2, dtype=torch.float64))  # loss, correct of this epoch
    best_accuracy: float = -1.0  # percent on validation, of the checkpoint saved last

    def evaluated(self) -> nn.Module:
        """The network that is evaluated and saved: the average if there is one."""
        return self.average if self.average is not None else self.model


FUSED = ("cuda", "mps")  # devices on which one kernel steps all weights
NUMBERS = ("epoch", "step", "seconds", "startup", "epoch_seconds", "best_accuracy")  # of State, kept when it is saved


class Float32Conv(nn.Conv2d):
    """A convolution that stays in float32 under a CPU's bfloat16 autocast.

    oneDNN (3.12) has no fast bfloat16 gradient for strided depthwise convolutions: MobileNetV2's three took half of the
    total time (a step of batch 128 on two cores with AMX took 0.94 s instead of 0.73 s).
    """

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.float())


class ClampedBits(torch.autograd.Function):
    """ReLU6 of bfloat16 in place, on the bits: read as 16-bit integers, floats from 0 on are ordered as numbers are.

    torch clamps bfloat16 via float32, six times slower than it clamps integers (10.6 ms instead of 1.6 ms for 38 MB).
    NaN becomes 0 or 6 here; divergence is still detected in the weights (`all_finite`).
    """

    SIX = 0x40C0  # 6.0 in bfloat16

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x.view(torch.int16).clamp_(0, ClampedBits.SIX)
        ctx.mark_dirty(x)
        ctx.save_for_backward(x)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return torch.ops.aten.hardtanh_backward(gradient, y, 0.0, 6.0)


class BitsReLU6(nn.ReLU6):
    """ReLU6 that is fast where its input is bfloat16: a step of batch 128 on two cores runs at 1.16 times the speed."""

    def forward(self, x: Tensor) -> Tensor:
        return ClampedBits.apply(x) if x.dtype == torch.bfloat16 else super().forward(x)


def start(model: nn.Module, recipe: Recipe, device: torch.device) -> State:
    """The state before the first step; `model` is moved to the device, in channels_last."""
    model = model.to(device, memory_format=torch.channels_last)
    if recipe.bf16 and device.type == "cpu":  # done here rather than in the network, which other tools trace
        for module in model.modules():
            if isinstance(module, nn.Conv2d) and module.groups > 1 and module.stride != (1, 1):
                module.__class__ = Float32Conv
            elif type(module) is nn.ReLU6:
                module.__class__ = BitsReLU6
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]  # norms and biases
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(
        groups, recipe.lr, momentum=recipe.momentum, nesterov=recipe.momentum > 0, fused=device.type in FUSED
    )
    average = copy.deepcopy(model).requires_grad_(False).eval() if recipe.ema_decay else None
    exact = torch.float32 if device.type == "mps" else torch.float64  # Apple's MPS has no float64
    return State(model, average, optimizer, sums=torch.zeros(2, dtype=exact, device=device))


def steps_per_epoch(images: int, batch_size: int) -> int:
    """Batches per epoch. Only full ones: the leftover images differ from epoch to epoch, because the order is random.

    So every step has the same shape (as CUDA graphs need), and none sees a batch of one image, which has no variance
    for batch norm. If there are fewer images than `batch_size`, they form one batch.
    """
    return max(1, images // batch_size)


def images_seen(state: State, images: int, recipe: Recipe) -> int:
    """Images trained on in this epoch so far, of the `images` there are."""
    return state.step * min(recipe.batch_size, images)


def progress(state: State, recipe: Recipe, steps: int) -> float:
    """Progress of the run, 0 to 1: by epochs, or by the clock if `max_minutes` ends it sooner.

    A minute in which the first step is compiled shortens the run, but is no part of its schedule: the warm-up would be
    over after it."""
    done = (state.epoch + state.step / steps) / recipe.epochs
    if budget := 60 * recipe.max_minutes:
        if state.seconds >= budget:
            return 1.0
        done = max(done, (state.seconds - state.startup) / (budget - state.startup))
    return min(done, 1.0)


def learning_rate(done: float, recipe: Recipe) -> float:
    """Linear warm-up over `warmup_epochs` of the epochs, then cosine to 0 (or constant)."""
    warmup = recipe.warmup_epochs / recipe.epochs
    if done < warmup:
        return recipe.lr * max(done, 1e-3 * warmup) / warmup
    if recipe.scheduler == "constant":
        return recipe.lr
    return recipe.lr * 0.5 * (1 + math.cos(math.pi * (done - warmup) / max(1 - warmup, 1e-9)))


def image_size(done: float, recipe: Recipe, full: int) -> int:
    """Progressive resolution (Tan & Le 2021, EfficientNetV2, section 4): equal shares of the run for each size."""
    sizes = recipe.progressive_sizes or (full,)
    return sizes[min(int(done * len(sizes)), len(sizes) - 1)]


def stepper(
    state: State,
    train: Split,
    recipe: Recipe,
    normalization: Normalization,
    forward: Callable[[Tensor], Tensor],
    criterion: Loss | None = None,
) -> Step:
    """A step as a function of (picks [B] of the images of `train`, draws [B, DRAWS], image size): it moves the weights
    and the sums of `state`. On CUDA it is replayed from a recording (recording.py).

    forward: `state.model` or its compiled form. criterion: the loss; None: cross-entropy with label smoothing.
    """
    device = train.images.device

    def step(picks: Tensor, draws: Tensor, size: int) -> None:
        batch = train[picks]
        x, share = augment(batch.images, recipe.augmentation, normalization, draws), None
        if recipe.augmentation.cutmix:
            x, share = cutmix(x, recipe.augmentation, draws)
        if size != x.shape[-1]:
            x = F.interpolate(x, (size, size), mode="bilinear", antialias=True)
            x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=recipe.bf16):
            logits = forward(x)
        labels = batch.labels if share is None else mixed_targets(batch.labels, share, logits.shape[1])
        if criterion:
            loss = criterion(logits.float(), x, labels)
        else:
            loss = F.cross_entropy(logits.float(), labels, label_smoothing=recipe.label_smoothing)
        state.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        state.optimizer.step()
        with torch.no_grad():
            state.sums[0] += loss.detach() * len(batch)
            state.sums[1] += (logits.argmax(1) == (labels if share is None else labels.argmax(1))).sum()

    return recorded(step, state.optimizer) if device.type == "cuda" else step


def train_epoch(state: State, train: Split, recipe: Recipe, step: Step, on_step: Callable[[], None]) -> None:
    """Trains to the end of the epoch, or of `max_minutes`. `train` lies on the device; step: from `stepper`.

    `on_step()` is called after every step; if it raises, the epoch stops there in a state that can be saved and
    resumed.
    """
    device = train.images.device
    order, draws = epoch_draws(len(train), recipe.seed, state.epoch, device)
    steps = steps_per_epoch(len(train), recipe.batch_size)
    pairs = average_pairs(state.average, state.model) if state.average is not None else None
    state.model.train()
    clock = time.perf_counter()

    def count_time() -> float:
        """Seconds since the last call, which are added to the state's."""
        nonlocal clock
        before, clock = clock, time.perf_counter()
        state.seconds, state.epoch_seconds = state.seconds + clock - before, state.epoch_seconds + clock - before
        return clock - before

    while not epoch_over(state, recipe, steps):
        done = progress(state, recipe, steps)
        set_rate(state.optimizer, learning_rate(done, recipe))
        picks = slice(state.step * recipe.batch_size, (state.step + 1) * recipe.batch_size)
        step(order[picks], draws[picks], image_size(done, recipe, train.images.shape[-1]))
        if pairs is not None:
            update_average(pairs, recipe.ema_decay, state.epoch * steps + state.step)
        state.step += 1
        taken = count_time()
        if not state.started:
            state.startup, state.started = state.startup + taken, True
        on_step()
    state.sums.cpu()  # waits for the device, so that its time counts
    count_time()


def epoch_over(state: State, recipe: Recipe, steps: int) -> bool:
    """Whether all steps of the epoch are done, or at least one and with it the run (by `max_minutes`)."""
    return state.step >= steps or (state.step > 0 and progress(state, recipe, steps) >= 1.0)


def average_pairs(average: nn.Module, model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """(averaged, current) of every weight and statistic of batch norm; the count of batches is left out."""
    mine, theirs = average.state_dict(), model.state_dict()
    return [(mine[name], theirs[name]) for name in mine if mine[name].is_floating_point()]


@torch.no_grad()
def update_average(pairs: list[tuple[Tensor, Tensor]], decay: float, step: int) -> None:
    """Exponential moving average; the decay of the first steps is (1 + step) / (10 + step)."""
    weight = 1 - min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_([mine for mine, _ in pairs], [theirs for _, theirs in pairs], weight)


def epoch_means(state: State, images: int) -> tuple[float, float]:
    """(mean loss, accuracy in percent) of the epoch so far, over `images`; waits for the device."""
    loss, correct = (state.sums.cpu() / max(1, images)).tolist()
    return loss, 100 * correct


def all_finite(state: State) -> bool:
    """Whether every weight and every statistic of batch norm is a number; waits for the device."""
    return bool(torch.stack([t.isfinite().all() for t in state.model.state_dict().values()]).all())


def next_epoch(state: State) -> None:
    """Moves the state to the first step of the next epoch."""
    state.sums.zero_()
    state.epoch, state.step, state.epoch_seconds = state.epoch + 1, 0, 0.0


def to_dict(state: State) -> dict[str, Any]:
    """Everything needed to go on: plain tensors and numbers, so that it loads with `weights_only=True`."""
    return {
        "model": state.model.state_dict(),
        "average": state.average.state_dict() if state.average is not None else None,
        "optimizer": state.optimizer.state_dict(),
        "numbers": {name: getattr(state, name) for name in NUMBERS},
        "sums": state.sums.cpu(),
        "random": torch.get_rng_state(),
        "random_cuda": torch.cuda.get_rng_state(state.sums.device) if state.sums.is_cuda else None,
    }


def restore(state: State, saved: dict[str, Any]) -> None:
    """Puts `saved` (from `to_dict`) into `state`, made by `start` with the same recipe."""
    state.model.load_state_dict(saved["model"])
    if state.average is not None:
        state.average.load_state_dict(saved["average"])
    # This device's, not the one's where the state was saved.
    own = state.optimizer.defaults
    kinds = {name: own[name] for name in ("fused", "capturable") if name in own}
    groups = [{**group, **kinds} for group in saved["optimizer"]["param_groups"]]
    state.optimizer.load_state_dict({**saved["optimizer"], "param_groups": groups})
    for name, value in saved["numbers"].items():
        setattr(state, name, value)
    state.sums.copy_(saved["sums"])
    torch.set_rng_state(saved["random"].cpu())
    if saved["random_cuda"] is not None and state.sums.is_cuda:
        torch.cuda.set_rng_state(saved["random_cuda"].cpu(), state.sums.device)
