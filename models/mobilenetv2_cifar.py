"""MobileNetV2 for 32x32 images, with torchvision's parameter names.

Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks" (2018), table 2, with stride 1 in the stem and
in the second stage, so that 32x32 images end at 4x4: 88 M multiply-adds and 2.24 M parameters at width 1.0 and 10
classes. Every parameter has the name and shape it has in `torchvision.models.mobilenet_v2` (strides have no
parameters), so ImageNet weights load without renaming; only the classifier differs with the number of classes.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# Expansion, output channels, repeats, stride of the first repeat (the paper's t, c, n, s; s of row 2 is 1 here, not 2).
STAGES = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
STEM_CHANNELS, LAST_CHANNELS = 32, 1280


@dataclass(frozen=True)
class Architecture:
    """What is needed to rebuild the network; stored in every checkpoint and packed file."""

    num_classes: int = 10
    width_mult: float = 1.0
    name: str = "mobilenetv2_cifar"


def make_divisible(value: float, divisor: int = 8) -> int:
    """Rounds a channel count to a multiple of `divisor`, never more than 10 % down (the paper's reference code)."""
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded


def conv_bn(inp: int, out: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """A convolution that keeps the image's size (at stride 1) and its batch norm: [conv, norm]."""
    conv = nn.Conv2d(inp, out, kernel, stride, (kernel - 1) // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(out)]


def conv_bn_relu6(*args: int, **kwargs: int) -> nn.Sequential:
    return nn.Sequential(*conv_bn(*args, **kwargs), nn.ReLU6(inplace=True))


class InvertedResidual(nn.Module):
    """Expand 1x1, depthwise 3x3, project 1x1 (linear); a residual sum where the shapes agree (section 3.3)."""

    def __init__(self, inp: int, out: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inp * expansion
        layers: list[nn.Module] = [conv_bn_relu6(inp, hidden, 1)] if expansion != 1 else []
        layers += [conv_bn_relu6(hidden, hidden, 3, stride=stride, groups=hidden), *conv_bn(hidden, out, 1)]
        self.conv = nn.Sequential(*layers)
        self.use_res_connect = stride == 1 and inp == out

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.use_res_connect else self.conv(x)


class MobileNetV2(nn.Module):
    """Input: normalised images [N, 3, 32, 32] (any size from 8x8 up works); output: logits [N, num_classes]."""

    def __init__(self, architecture: Architecture, dropout: float = 0.0) -> None:
        super().__init__()
        width = architecture.width_mult
        channels = make_divisible(STEM_CHANNELS * width)
        features: list[nn.Module] = [conv_bn_relu6(3, channels, 3)]
        for expansion, out, repeats, stride in STAGES:
            out = make_divisible(out * width)
            for i in range(repeats):
                features.append(InvertedResidual(channels, out, stride if i == 0 else 1, expansion))
                channels = out
        last = make_divisible(LAST_CHANNELS * max(1.0, width))
        features.append(conv_bn_relu6(channels, last, 1))
        self.architecture = architecture
        self.features = nn.Sequential(*features)
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(last, architecture.num_classes))
        self.apply(init_weights)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


def init_weights(module: nn.Module) -> None:
    """He's normal initialisation by fan-out for convolutions; a small normal for the classifier (as torchvision)."""
    if any(parameter.is_meta for parameter in module.parameters(recurse=False)):
        return  # nothing to fill; and torch's normal_ on the meta device first imports its compiler, for seconds
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out")
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, 0, 0.01)
        nn.init.zeros_(module.bias)


def skeleton(architecture: Architecture) -> MobileNetV2:
    """The network on the meta device: names, shapes and strides of its parameters, no memory, no random draws."""
    with torch.device("meta"):
        return MobileNetV2(architecture)


def multiply_adds(model: nn.Module, size: int = 32) -> int:
    """Multiply-adds of convolutions and linear layers for one `size` x `size` image, counted by running it."""
    total = 0

    def count(module: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        total += output[0].numel() * module.weight[0].numel()

    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    training = model.training
    try:
        with torch.inference_mode():
            model.eval()(torch.zeros(1, 3, size, size, device=next(model.parameters()).device))
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return total


def replace_classifier(state: Mapping[str, Tensor], model: MobileNetV2) -> dict[str, Tensor]:
    """A new state dict: `state` with the classifier of `model` (for a start from weights with other classes)."""
    return {**state, **{k: v for k, v in model.state_dict().items() if k.startswith("classifier.")}}
