"""Time remaining of a training run: an estimate that holds when steps get slower and evaluations interleave.

Work is counted in the cost of what is done, not in steps: an epoch on small images costs less than one on large images,
and evaluations are counted too. Time left = work left x time per work so far.
"""

import copy
import time
from dataclasses import dataclass

import torch
from torch import nn
from tqdm import tqdm

BACKWARD = 2.0  # the backward pass costs about twice the forward pass: gradients of inputs and of weights


@dataclass(frozen=True)
class Work:
    """A run's work, in any unit. epoch_costs: of one epoch at each image size in turn (equal shares of the run)."""

    epochs: int
    epoch_costs: tuple[float, ...]
    evaluation_cost: float
    eval_every: int

    def done(self, epoch: int, part: float = 0.0, evaluated: float = 0.0) -> float:
        """Work after `epoch` whole epochs, `part` of the next one and `evaluated` (0 to 1) of its evaluation."""
        shares = len(self.epoch_costs)
        position = (epoch + part) / self.epochs * shares
        training = sum(cost * min(max(position - i, 0.0), 1.0) for i, cost in enumerate(self.epoch_costs))
        evaluations = epoch // self.eval_every + (epoch == self.epochs and epoch % self.eval_every > 0)
        return training * self.epochs / shares + (evaluations + evaluated) * self.evaluation_cost

    @property
    def total(self) -> float:
        return self.done(self.epochs)


def seconds_left(work: Work, first: float, now: float, elapsed: float) -> float | None:
    """Seconds from work `now` to the end, where work `first` to `now` took `elapsed` seconds; None before any work is
    done."""
    return (work.total - now) * elapsed / (now - first) if now > first and elapsed > 0 else None


def size_costs(model: nn.Module, sizes: tuple[int, ...], batch_size: int) -> tuple[float, ...]:
    """Relative cost of a training step at each image size, measured on a copy (small ones cost more than their area).

    Draws no random numbers and leaves `model` as it is.
    """
    if len(sizes) < 2:
        return (1.0,) * len(sizes)
    device = next(model.parameters()).device
    trial = copy.deepcopy(model).eval()
    costs = []
    for size in sizes:
        x = torch.zeros(batch_size, 3, size, size, device=device).to(memory_format=torch.channels_last)
        for _ in range(2):  # the first one warms up
            begun = time.perf_counter()
            trial(x).sum().backward()
            next(trial.parameters()).grad.sum().item()  # waits for the device
            seconds = time.perf_counter() - begun
        costs.append(seconds)
    return tuple(costs)


def clock_text(seconds: float) -> str:
    return tqdm.format_interval(max(0.0, seconds))


def new_bar() -> tqdm:
    """A bar from 0 to 100 %, for `show`; hidden if stderr is not a terminal."""
    layout = "{percentage:3.0f} %|{bar:30}| {elapsed}{postfix}"
    return tqdm(total=100.0, bar_format=layout, miniters=0, mininterval=0.2, disable=None)


def show(bar: tqdm, share: float, left: float | None, note: str) -> None:
    """Moves the bar to `share` (0 to 1) and shows the seconds left and a note, at most five times a second."""
    bar.n = 100.0 * min(share, 1.0)
    bar.set_postfix_str(f"{clock_text(left)} left, {note}" if left is not None else note, refresh=False)
    bar.update(0)
