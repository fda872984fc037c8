"""Augmentation: shift, flip and cutout against a plain loop, TrivialAugment against torchvision, CutMix by hand."""

import math

import numpy as np
import pytest
import torch

import augmentation
from augmentation import DRAWS, OPERATIONS, Augmentation, augment
from data import Normalization
from vision import import_torchvision


def plain_augment(image: np.ndarray, kind: Augmentation, normal: Normalization, draw: np.ndarray) -> np.ndarray:
    """One image [3, S, S], pixel by pixel."""
    size = image.shape[-1]
    out = np.zeros((3, size, size), np.float32)
    down, right = (int(draw[i] * (2 * kind.pad + 1)) - kind.pad for i in (0, 1))
    for row in range(size):
        for column in range(size):
            hole = [abs(at + 0.5 - draw[i] * size) < kind.cutout / 2 for at, i in ((row, 3), (column, 4))]
            if all(hole):
                continue
            source = size - 1 - column if kind.flip and draw[2] < 0.5 else column
            r, c = row + down, source + right
            if 0 <= r < size and 0 <= c < size:
                out[:, row, column] = (image[:, r, c].astype(np.float32) - np.array(normal.mean)) / normal.std
    return out


@pytest.mark.parametrize("pad", [0, 2, 4])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("cutout", [0, 3, 8])
def test_augmentation_against_a_plain_loop(pad, flip, cutout):
    generator = torch.Generator().manual_seed(pad + 10 * flip + cutout)
    images = torch.randint(0, 256, (12, 3, 12, 12), dtype=torch.uint8, generator=generator)
    draws = torch.rand(12, DRAWS, generator=generator)
    kind, normal = Augmentation(pad, flip, cutout), Normalization((10, 200, 100), 50.0)
    x = augment(images, kind, normal, draws)
    assert x.is_contiguous(memory_format=torch.channels_last)
    for i in range(len(images)):
        expected = plain_augment(images[i].numpy(), kind, normal, draws[i].numpy())
        np.testing.assert_allclose(x[i].numpy(), expected, rtol=0, atol=1e-6)


def test_an_epochs_draws_depend_on_seed_and_epoch_alone():
    order, draws = augmentation.epoch_draws(100, seed=3, epoch=7, device="cpu")
    torch.rand(5)
    again = augmentation.epoch_draws(100, seed=3, epoch=7, device="cpu")
    assert torch.equal(order, again[0]) and torch.equal(draws, again[1])
    assert sorted(order.tolist()) == list(range(100))
    for other in (augmentation.epoch_draws(100, 3, 8, "cpu"), augmentation.epoch_draws(100, 4, 7, "cpu")):
        assert not torch.equal(order, other[0])


def reference(image: torch.Tensor, name: str, strength: float, sign: int) -> torch.Tensor:
    """torchvision's TrivialAugmentWide with this operation, for one uint8 image [3, S, S]; its fill is black."""
    functional = import_torchvision("torchvision.transforms.functional")
    amount = 0.99 * sign * strength
    degrees = math.degrees(math.atan(amount))
    still = dict(angle=0.0, translate=[0, 0], scale=1.0, shear=[0.0, 0.0])
    affine = {
        "shear x": dict(shear=[degrees, 0.0], center=[0, 0]),
        "shear y": dict(shear=[0.0, degrees], center=[0, 0]),
        "translate x": dict(translate=[int(32 * sign * strength), 0]),
        "translate y": dict(translate=[0, int(32 * sign * strength)]),
    }
    enhance = {"brightness": "brightness", "color": "saturation", "contrast": "contrast", "sharpness": "sharpness"}
    if name in affine:
        return functional.affine(image, **{**still, **affine[name]})
    if name == "rotate":
        return functional.rotate(image, 135 * sign * strength)
    if name in enhance:
        return getattr(functional, f"adjust_{enhance[name]}")(image, 1 + amount)
    if name == "posterize":
        return functional.posterize(image, 8 - round(6 * strength))
    if name == "solarize":
        return functional.solarize(image, 255 * (1 - strength))
    return image if name == "identity" else getattr(functional, name)(image)


@pytest.mark.parametrize("name", OPERATIONS)
def test_trivial_augment_does_what_torchvision_does(name):
    generator = torch.Generator().manual_seed(1)
    smooth = torch.rand(12, 3, 4, 4, generator=generator)
    smooth = torch.nn.functional.interpolate(smooth, (32, 32), mode="bilinear") * 200 + 20
    images = (smooth + 20 * torch.rand(12, 3, 32, 32, generator=generator)).to(torch.uint8)
    images[0] = 77  # one colour: nothing to stretch or to spread
    draws = torch.rand(12, DRAWS, generator=generator)
    draws[:, augmentation.OPERATION] = (OPERATIONS.index(name) + 0.5) / len(OPERATIONS)
    normal = Normalization((0, 0, 0), 1.0)
    x = augment(images, Augmentation(0, False, trivial=True), normal, draws)
    signs = []
    for i, image in enumerate(images):
        options = [reference(image, name, float(draws[i, augmentation.STRENGTH]), sign).float() for sign in (-1, 1)]
        away = [float(((option - x[i]).abs() > 1).float().mean()) for option in options]
        signs.append(away[1] < away[0])
        # A level of rounding is allowed; of moved pixels those that fall between two.
        assert min(away) <= (0.02 if OPERATIONS.index(name) in range(1, 6) else 0), (i, away)
    changed = sum(not torch.equal(x[i], image.float()) for i, image in enumerate(images))
    assert changed == 0 if name == "identity" else changed >= 9
    if name in ("rotate", "shear x", "translate y", "brightness", "contrast"):
        assert any(signs) and not all(signs)


def test_what_a_shift_brings_in_is_the_mean_colour():
    draws = torch.full((1, DRAWS), 0.99)
    draws[0, augmentation.OPERATION] = (OPERATIONS.index("translate x") + 0.5) / len(OPERATIONS)
    images = torch.full((1, 3, 32, 32), 9, dtype=torch.uint8)
    x = augment(images, Augmentation(0, False, trivial=True), Normalization((100, 50, 20), 2.0), draws)
    assert sorted(set(x.flatten().tolist())) == [-45.5, -20.5, -5.5, 0.0] and (x == 0).sum() == 3 * 32 * 31


def test_cutmix_mixes_labels_as_it_mixes_pixels():
    generator = torch.Generator().manual_seed(2)
    x = torch.arange(1.0, 65.0).view(-1, 1, 1, 1).expand(64, 3, 16, 16)
    labels = torch.randint(0, 10, (64,), generator=generator)
    draws = torch.rand(64, DRAWS, generator=generator)
    mixed, share = augmentation.cutmix(x, Augmentation(cutmix=0.5), draws)
    target = augmentation.mixed_targets(labels, share, 10)
    assert mixed.is_contiguous(memory_format=torch.channels_last)
    for i in range(64):
        own, other = (mixed[i] == x[i]).all(0), (mixed[i] == x[i - 1]).all(0)
        assert bool((own ^ other).all()) and math.isclose(share[i], float(own.float().mean()), abs_tol=1e-6)
        expected = torch.zeros(10)
        expected[labels[i]] += share[i]
        expected[labels[i - 1]] += 1 - share[i]
        torch.testing.assert_close(target[i], expected)
        if draws[i, augmentation.MIXED] >= 0.5:
            assert share[i] == 1
    alone = augmentation.cutmix(x, Augmentation(cutmix=0.0), draws)[0]
    assert torch.equal(alone, x)
