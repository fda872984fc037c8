"""Random changes of training images, as whole tensors on the device: a batch is one tensor, not a list of images.

Shift and flip; cutout (DeVries & Taylor 2017); TrivialAugment, "wide" space (Mueller & Hutter 2021, table 1): one of 14
operations of random strength for each image; CutMix (Yun et al. 2019) with alpha 1. Every random number is a column of
`draws`, uniform in [0, 1), so that an image's changes can be had again and no step waits for a generator. All of a
batch goes through all operations and each image keeps the result of its own: on a GPU that costs less than choosing.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from data import Normalization

# The columns of `draws`. Shift and places are pairs: down, right.
SHIFT, MIRROR, HOLE = slice(0, 2), 2, slice(3, 5)
OPERATION, STRENGTH, SIGN = 5, 6, 7
MIXED, AREA, PLACE = 8, 9, slice(10, 12)
DRAWS = 12

OPERATIONS = (
    *("identity", "shear x", "shear y", "translate x", "translate y", "rotate"),
    *("brightness", "color", "contrast", "sharpness", "posterize", "solarize", "autocontrast", "equalize"),
)
GREY = (0.299, 0.587, 0.114)  # ITU-R 601, as Pillow's
MOST_SHIFT, MOST_TURN, MOST_SHEAR, MOST_BLEND, MOST_BITS = 32, math.radians(135), 0.99, 0.99, 6  # the "wide" space


@dataclass(frozen=True)
class Augmentation:
    """pad: pixels of random shift; flip: mirror half of the images; cutout: side of a blank square, 0 for none;
    trivial: TrivialAugment; cutmix: share of the images that get a part of another one."""

    pad: int = 4
    flip: bool = True
    cutout: int = 0
    trivial: bool = False
    cutmix: float = 0.0


def epoch_draws(count: int, seed: int, epoch: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """(order [count], draws [count, DRAWS]) of one epoch, from (seed, epoch) alone: a resumed epoch draws the same."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(count, generator=generator)
    # The first five on their own, as before there were more: such runs are resumed with the same images.
    columns = [torch.rand(count, n, generator=generator) for n in (5, DRAWS - 5)]
    return order.to(device), torch.cat(columns, 1).to(device)


def augment(images: Tensor, augmentation: Augmentation, normalization: Normalization, draws: Tensor) -> Tensor:
    """Normalised float32 [B, 3, H, W], channels_last, from uint8 images; what comes from outside of an image, and
    cutout, is the mean colour (0). All but CutMix. draws: [B, DRAWS]."""
    size, pad = images.shape[-1], augmentation.pad
    if augmentation.trivial:
        operation, strength = (draws[:, OPERATION] * len(OPERATIONS)).long(), draws[:, STRENGTH]
        sign = (draws[:, SIGN] < 0.5) * 2.0 - 1
        x = warped(normalization(recoloured(images, operation, strength, sign)), operation, strength * sign)
    else:
        x = normalization(images)
    if pad:
        rows, columns = (draws[:, SHIFT] * (2 * pad + 1)).long().unbind(1)
        windows = F.pad(x, (pad,) * 4).permute(0, 2, 3, 1).unfold(1, size, 1).unfold(2, size, 1)
        picks = torch.arange(len(x), device=x.device)
        x = windows[picks, rows, columns].contiguous(memory_format=torch.channels_last)
    if augmentation.flip:
        x = torch.where(draws[:, MIRROR].view(-1, 1, 1, 1) < 0.5, x.flip(3), x)
    if augmentation.cutout:
        sides = torch.full((len(x),), augmentation.cutout, device=x.device)
        x = x.masked_fill(squares(size, draws[:, HOLE], sides), 0.0)
    return x.contiguous(memory_format=torch.channels_last)


def squares(size: int, places: Tensor, sides: Tensor) -> Tensor:
    """bool [B, 1, size, size]: inside a square of `sides` [B] pixels around `places` [B, 2] (shares of the size)."""
    pixels = torch.arange(size, device=places.device) + 0.5
    inside = (pixels - places[:, :, None] * size).abs() < sides[:, None, None] / 2
    return (inside[:, 0, :, None] & inside[:, 1, None, :])[:, None]


# ------------------------------------------------------------------------------------------------------------- CutMix


def cutmix(x: Tensor, augmentation: Augmentation, draws: Tensor) -> tuple[Tensor, Tensor]:
    """(images, share [B] of each that is its own): the rest is a square of the image before it in the batch."""
    size = x.shape[-1]
    sides = torch.where(draws[:, MIXED] < augmentation.cutmix, size * (1 - draws[:, AREA]).sqrt(), 0.0)
    inside = squares(size, draws[:, PLACE], sides)
    x = torch.where(inside, x.roll(1, 0), x).contiguous(memory_format=torch.channels_last)
    return x, 1 - inside.float().mean((1, 2, 3))


def mixed_targets(labels: Tensor, share: Tensor, classes: int) -> Tensor:
    """Probabilities [B, classes]: `share` of the own label, the rest of the label before it in the batch."""
    own = (labels[:, None] == torch.arange(classes, device=labels.device)).float()
    return share[:, None] * own + (1 - share[:, None]) * own.roll(1, 0)


# ----------------------------------------------------------------------------------------------------- TrivialAugment


def recoloured(images: Tensor, operation: Tensor, strength: Tensor, sign: Tensor) -> Tensor:
    """uint8 [B, 3, H, W]: each image after its operation [B], where that changes colours; strength [B] in [0, 1), sign
    [B] -1 or 1. The arithmetic is that of Pillow's ImageEnhance and ImageOps."""

    def per_image(values: Tensor) -> Tensor:
        return values.view(-1, 1, 1, 1)

    def is_(name: str) -> Tensor:
        return per_image(operation == OPERATIONS.index(name))

    x = images.float()
    strength, sign = per_image(strength), per_image(sign)
    grey = sum(weight * x[:, i : i + 1] for i, weight in enumerate(GREY))
    away = x  # the image that is blended with; x itself changes nothing
    for name, other in (
        ("brightness", torch.zeros_like(x)),
        ("color", grey),
        ("contrast", grey.floor().mean((1, 2, 3), keepdim=True)),
        ("sharpness", smoothed(x)),
    ):
        away = torch.where(is_(name), other, away)
    out = (away + (1 + MOST_BLEND * sign * strength) * (x - away)).clamp(0, 255)
    step = torch.where(is_("posterize"), 2.0 ** (MOST_BITS * strength).round(), 1.0)
    out = (out / step).floor() * step
    out = torch.where(is_("solarize") & (x >= 255 * (1 - strength)), 255 - x, out)
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    stretched = (x - low) * 255 / (high - low).clamp(min=1)
    out = torch.where(is_("autocontrast") & (high > low), stretched, out)
    return torch.where(is_("equalize"), equalized_histogram(images), out).to(torch.uint8)


def smoothed(x: Tensor) -> Tensor:
    """A 3x3 mean in which the middle counts five times; the border stays as it is (Pillow's SMOOTH)."""
    kernel = torch.ones(3, 1, 3, 3, device=x.device)
    kernel[:, :, 1, 1] = 5
    inner = F.conv2d(x, kernel / 13, groups=3).round()
    out = x.clone()
    out[:, :, 1:-1, 1:-1] = inner
    return out


def equalized_histogram(images: Tensor) -> Tensor:
    """float32 [B, 3, H, W] of uint8 images, every colour's values spread evenly over 0..255 (Pillow's equalize)."""
    index = images.long().flatten(2)
    counts = torch.zeros(*index.shape[:2], 256, device=images.device)
    counts = counts.scatter_add(2, index, torch.ones_like(index, dtype=torch.float32))
    below = counts.cumsum(2) - counts
    step = ((index < index.amax(2, keepdim=True)).sum(2, keepdim=True) // 255).float()
    table = ((below + (step / 2).floor()) / step.clamp(min=1)).floor().clamp(0, 255)
    return torch.where(step > 0, table.gather(2, index), index.float()).view(images.shape)


def warped(x: Tensor, operation: Tensor, amount: Tensor) -> Tensor:
    """[B, C, H, W]: each image after its operation, where that moves pixels (nearest neighbour, 0 from outside); amount
    [B] in (-1, 1)."""
    size = x.shape[-1]

    def where(name: str, value: Tensor, otherwise: float = 0.0) -> Tensor:
        return torch.where(operation == OPERATIONS.index(name), value, otherwise)

    # From places in the result to places in x, in coordinates of -1 to 1. Shears keep the upper left corner.
    turn = MOST_TURN * amount
    right, down = where("shear x", MOST_SHEAR * amount), where("shear y", MOST_SHEAR * amount)
    pixels = (MOST_SHIFT * amount).trunc() * 2 / size
    cosine, sine = where("rotate", turn.cos(), 1.0), where("rotate", turn.sin())
    rows = [cosine, right - sine, right + where("translate x", pixels)]
    columns = [down + sine, cosine, down + where("translate y", pixels)]
    matrix = torch.stack([torch.stack(rows, 1), torch.stack(columns, 1)], 1)
    grid = F.affine_grid(matrix, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="nearest", padding_mode="zeros", align_corners=False)
