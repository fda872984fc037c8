"""Images per second of evaluation: quantized W4A8 and FP32 here, against a plain eager FP32 evaluation, in one run.

plain: what a tutorial does: torchvision transforms in a DataLoader's workers, contiguous tensors, batch norm unfolded.
The three alternate over the same images for several rounds; prints medians over the rounds, and of the ratios within
each round.

    python benchmarks/eval_speed.py --images 2048 --rounds 5
"""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from train_speed import Images

import data
from allocator import keep_freed_memory
from calibration import Plan, quantize_network
from checkpoint import DEFAULT_CHECKPOINT, build_model, load
from cli import option, parse
from errors import run_main
from evaluation import choose_device, score
from models import Architecture, MobileNetV2
from network import fold_batch_norm
from quantization import float_network, predictor
from vision import import_torchvision


@dataclass(frozen=True)
class Settings:
    """The command line of eval_speed.py."""

    checkpoint: Path | None = option(None, "FP32 checkpoint (default: the bundled one, else random weights)")
    images: int = option(2048, "random images to evaluate", low=64)
    batch_size: int = option(256, "images at once", low=1)
    workers: int = option(2, "of the plain evaluation's DataLoader", low=0)
    rounds: int = option(5, "rounds of all three", low=1)
    weight_bits: int = option(4, "of the quantized network", low=2, high=8)
    act_bits: int = option(8, "of the quantized network", low=2, high=8)
    device: str | None = option(None, "cpu, cuda (default: the best there is)")


def plain_evaluation(model: torch.nn.Module, split: data.Split, settings: Settings, device: torch.device) -> None:
    """One pass as a tutorial writes it."""
    transforms = import_torchvision("torchvision.transforms")
    normal = transforms.Normalize((0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.262))
    steps = transforms.Compose([transforms.ToPILImage(), transforms.ToTensor(), normal])
    loader = torch.utils.data.DataLoader(Images(split, steps), settings.batch_size, num_workers=settings.workers)
    with torch.no_grad():
        for batch, _ in loader:
            model(batch.to(device)).argmax(1).cpu()


def main() -> None:
    settings = parse(Settings, __doc__, sys.argv[1:])
    keep_freed_memory()
    device = choose_device(settings.device)
    path = settings.checkpoint or DEFAULT_CHECKPOINT
    if settings.checkpoint or path.exists():
        checkpoint = load(path)
        model, normalization = build_model(checkpoint), checkpoint.normalization
    else:
        model, normalization = MobileNetV2(Architecture()).eval(), data.Normalization()
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (settings.images, 3, 32, 32), dtype=torch.uint8, generator=generator)
    split = data.Split(pixels, torch.zeros(len(pixels), dtype=torch.int64))
    network = fold_batch_norm(model, normalization)
    quantized = quantize_network(network, pixels[:128], Plan(settings.weight_bits, settings.act_bits))
    plain = model.to(device, memory_format=torch.contiguous_format)

    def ours(forward: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], object]:
        return lambda: score(forward, split, settings.batch_size, device)

    name = f"W{settings.weight_bits}A{settings.act_bits}"
    runs: dict[str, Callable[[], object]] = {
        "plain FP32": lambda: plain_evaluation(plain, split, settings, device),
        "FP32": ours(predictor(float_network(network), device)),
        name: ours(predictor(quantized, device)),
    }
    seconds: dict[str, list[float]] = {key: [] for key in runs}
    for round_ in range(settings.rounds + 1):
        for key, run in runs.items():
            begun = time.perf_counter()
            run()
            if round_:  # the first one warms up
                seconds[key].append(time.perf_counter() - begun)
    print(f"{device}, {torch.get_num_threads()} threads, {settings.images} images, batches of {settings.batch_size}")
    for key, times in seconds.items():
        print(f"{key:>12}: {settings.images / statistics.median(times):8.0f} images/s")
    for other in ("plain FP32", "FP32"):
        ratios = [theirs / mine for theirs, mine in zip(seconds[other], seconds[name], strict=True)]
        print(
            f"{name} is {statistics.median(ratios):.2f} times as fast as {other} "
            f"({min(ratios):.2f} to {max(ratios):.2f})"
        )


if __name__ == "__main__":
    run_main(main)
