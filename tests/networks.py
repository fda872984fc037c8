"""Small networks with lively batch norms, for the tests of what comes after training."""

from collections.abc import Callable

import torch

from data import Normalization
from models import Architecture, MobileNetV2
from network import Op, apply_float, walk
from quantization import QuantizedNetwork, fake_quantize, prepare


def random_model(
    width: float, classes: int = 10, seed: int = 0, gains: tuple[float, float] = (0.5, 2.0)
) -> MobileNetV2:
    """Random weights; batch statistics are those of random images, so every layer's results have about unit scale.

    gains: the range of the batch norms' factors; a wide one makes channels of very different ranges.
    """
    torch.manual_seed(seed)
    model = MobileNetV2(Architecture(classes, width))
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
            torch.nn.init.uniform_(module.weight, *gains)
            torch.nn.init.normal_(module.bias, 0.3, 0.5)
    torch.nn.init.normal_(model.classifier[1].weight, 0, 0.3)
    images = torch.randint(0, 256, (16, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        model.train()(Normalization()(images))
    return model.eval()


def largest_sum(network: QuantizedNetwork) -> float:
    """A bound on every partial sum of the integer convolutions: below quantization.EXACT, float32 sums are exact."""
    return max(step.largest for step in prepare(network))


def fake_forward(
    network: QuantizedNetwork, images: torch.Tensor, see: Callable[[Op, torch.Tensor], None] = lambda op, y: None
) -> torch.Tensor:
    """The network in floating point with fake quantization, as in textbooks. see(op, its result before its grid)."""

    def do(op: Op, inputs: list[torch.Tensor]) -> torch.Tensor:
        layer = network.layers.get(op.name)
        y = apply_float(op, inputs, layer and layer.weight, layer and layer.bias)
        see(op, y)
        grid = network.activations.get(op.name)
        return fake_quantize(y, grid) if grid else y

    return walk(network.ops, network.normalization(images), do)
