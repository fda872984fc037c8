"""Small networks with lively batch norms, for the tests of what comes after training."""

import torch

from data import Normalization
from models import Architecture, MobileNetV2


def random_model(
    width: float, classes: int = 10, seed: int = 0, gains: tuple[float, float] = (0.5, 2.0)
) -> MobileNetV2:
    """Random weights; batch statistics are those of random pictures, so every layer's results have about unit scale.

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
