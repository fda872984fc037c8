"""Training speed: this repository's training step against a plain DataLoader recipe, alternating within one run.

Ours: the images lie on the device, augmentation works on whole tensors, channels_last; on CUDA bfloat16, fused SGD and
a step recorded as a CUDA graph (with --compile, of torch.compile's kernels); on a CPU in FP32 and, with --bf16, in
bfloat16 too. Plain: torchvision's RandomCrop, RandomHorizontalFlip, ToTensor and Normalize on PIL images, a DataLoader
with worker processes, contiguous FP32, no compile. Same network, loss and batch size, and the same allocator
(allocator.py); random images, since speed does not depend on what they show. With --qat also the step of train.py --qat
at 2/2, the FP32 network as its teacher. On CUDA it also states a floor: the bytes that a step's convolutions and norms
must move, over the copy bandwidth measured here.

python benchmarks/train_speed.py --compile --steps 100 --rounds 3        on CUDA: width 1.0, batch 128
python benchmarks/train_speed.py --width-mult 0.35 --steps 5 --rounds 3  on a CPU: a minute
python benchmarks/train_speed.py --steps 3 --rounds 5 --bf16             on a CPU with bfloat16 units
python benchmarks/train_speed.py --steps 3 --batch-size 64 --bf16 --qat  the same for fine-tuning; --compile: minutes
"""

import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from torch import nn

import qat
import training
from allocator import keep_freed_memory
from calibration import method_plan, quantize_network
from cli import option, parse
from data import Normalization, Split
from errors import run_main
from evaluation import choose_device, device_name
from learned import LearnedNetwork
from models import Architecture, MobileNetV2
from network import fold_batch_norm, to_device
from vision import import_torchvision


@dataclass(frozen=True)
class Settings:
    width_mult: float = option(1.0, "width of the network", low=0.05, high=4)
    batch_size: int = option(128, "images a step", low=2)
    steps: int = option(20, "steps of each kind in a round", low=1)
    rounds: int = option(5, "rounds; the table shows medians over them", low=1)
    workers: int | None = option(None, "worker processes of the plain recipe (default: one a core, at most 8)", low=0)
    device: str | None = option(None, "cpu, cuda or mps (default: the best there is)")
    compile: bool = option(False, "torch.compile our networks")
    bf16: bool = option(False, "ours once more with bfloat16 autocast (on CUDA training has it by itself)")
    qat: bool = option(False, "quantization-aware fine-tuning at 2/2 too, from the plain method's network")


def our_steps(settings: Settings, device: torch.device, bf16: bool, tuned: bool) -> Callable[[], float]:
    """A function that does `steps` steps of training.train_epoch and returns images/s; tuned: those of --qat."""
    images = settings.steps * settings.batch_size
    split = random_images(images)
    recipe = training.Recipe(epochs=10**6, batch_size=settings.batch_size, bf16=bf16)
    model, criterion = MobileNetV2(Architecture(10, settings.width_mult)), None
    if tuned:
        network = to_device(fold_batch_norm(model.eval(), Normalization()), "cpu")
        plan = method_plan("plain", 2, 2)
        learned = LearnedNetwork(network, quantize_network(network, split.images, plan))
        teacher = to_device(network, device)
        state = qat.start(qat.FineTuning(teacher, learned, split, split, 0, {}), recipe, device)
        criterion = qat.distillation(teacher, 1.0, 0.0, bf16, settings.compile)
    else:
        state = training.start(model, recipe, device)
    split = split.to(device)
    forward = torch.compile(state.model, dynamic=False) if settings.compile else state.model
    step = training.stepper(state, split, recipe, Normalization(), forward, criterion)

    def run() -> float:
        training.train_epoch(state, split, recipe, step, lambda: None)
        speed = images / state.epoch_seconds
        training.next_epoch(state)
        return speed

    return run


def plain_steps(settings: Settings, device: torch.device) -> Callable[[], float]:
    """A function that does `steps` steps of the plain recipe and returns images/s; its loader runs on between calls."""
    workers = settings.workers if settings.workers is not None else min(8, cores())
    transforms = import_torchvision("torchvision.transforms")
    normal = Normalization()
    transform = transforms.Compose(
        [
            transforms.ToPILImage(),
            transforms.RandomCrop(32, padding=4),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize([m / 255 for m in normal.mean], [normal.std / 255] * 3),
        ]
    )
    dataset = Images(random_images(max(50, settings.steps) * settings.batch_size), transform)
    loader = torch.utils.data.DataLoader(
        dataset, settings.batch_size, shuffle=True, num_workers=workers, pin_memory=device.type == "cuda"
    )
    batches: Iterator[Any] = itertools.chain.from_iterable(itertools.repeat(loader))
    model = MobileNetV2(Architecture(10, settings.width_mult)).to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)

    def take(steps: int) -> float:
        torch.backends.cudnn.allow_tf32 = True  # as torch has it by itself; ours has bfloat16
        try:
            return timed(steps)
        finally:
            torch.backends.cudnn.allow_tf32 = False

    def timed(steps: int) -> float:
        begun = time.perf_counter()
        for _ in range(steps):
            images, labels = next(batches)
            images, labels = images.to(device), labels.to(device)
            loss = F.cross_entropy(model(images), labels, label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        loss.item()  # waits for the device
        return time.perf_counter() - begun

    def run() -> float:
        take(1 + 2 * workers)  # uses up the batches that the workers made in the meantime
        return settings.steps * settings.batch_size / take(settings.steps)

    return run


def cores() -> int:
    """That this process may use; macOS does not say."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Images(torch.utils.data.Dataset):
    """One image at a time through a transform, as torchvision's data sets give them."""

    def __init__(self, split: Split, transform: Callable) -> None:
        self.split, self.transform = split, transform

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(self.split.images[index]), int(self.split.labels[index])


def random_images(count: int) -> Split:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return Split(images, torch.randint(0, 10, (count,), generator=generator))


def bytes_per_image(model: MobileNetV2, element: int) -> int:
    """Bytes of activations that a training step must move for one image, with every ReLU6 fused into its norm.

    Forward, each convolution reads its input and writes its output; its norm reads that twice (statistics, then
    values) and writes once. Backward, the norm reads the gradient and its input twice and writes the input's gradient;
    the convolution reads gradient (twice) and input and writes the input's gradient. Weights are left out (2 %).
    """
    total = 0

    def count(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        nonlocal total
        total += inputs[0][0].numel() * (1 + 1 + 1) + output[0].numel() * (1 + 3 + 5 + 2)

    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, nn.Conv2d)]
    with torch.inference_mode():
        model.eval()(torch.zeros(1, 3, 32, 32))
    for hook in hooks:
        hook.remove()
    return total * element


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written, of copying 1 GiB on the device (median of 20)."""
    source = torch.empty(2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = []
    for _ in range(20):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    return 2 * 2**30 / statistics.median(times)


def main() -> int:
    settings = parse(Settings, __doc__, sys.argv[1:])
    device = choose_device(settings.device)
    keep_freed_memory()
    kinds = {}
    for name, tuned in (("ours", False), ("qat", True))[: 1 + settings.qat]:
        by_itself = device.type == "cuda" and not tuned  # as in train.py: --qat is in FP32 without --bf16
        kinds[name] = our_steps(settings, device, by_itself, tuned)
        if settings.bf16 and not by_itself:
            kinds[f"{name} bf16"] = our_steps(settings, device, True, tuned)
    kinds["plain"] = plain_steps(settings, device)
    speeds: dict[str, list[float]] = {name: [] for name in kinds}
    for steps in kinds.values():
        steps()  # warms up: worker processes, compilation, the choice of convolution algorithms
    for _ in range(settings.rounds):
        for name, steps in kinds.items():
            speeds[name].append(steps())
    name = device_name(device)
    print(f"MobileNetV2 x{settings.width_mult:g}, batch {settings.batch_size}, {name}, torch {torch.__version__}")
    plain = statistics.median(speeds["plain"])
    print(f"{'':10}{'images/s':>10}{'lowest':>10}{'highest':>10}{'to plain':>10}")
    for kind, values in speeds.items():
        median = statistics.median(values)
        print(f"{kind:10}{median:10.0f}{min(values):10.0f}{max(values):10.0f}{median / plain:10.2f}")
    print(f"medians of {settings.rounds} rounds of {settings.steps} steps, in alternation")
    if device.type == "cuda":
        bandwidth = copy_bandwidth(device)
        floor = bandwidth / bytes_per_image(MobileNetV2(Architecture(10, settings.width_mult)), 2)
        share = statistics.median(speeds["ours"]) / floor
        print(f"floor     {floor:10.0f}   images/s at {bandwidth / 1e12:.2f} TB/s copied; ours reaches {share:.0%}")
    return 0


if __name__ == "__main__":
    run_main(main)
