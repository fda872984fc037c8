"""Equalization: the FP32 function stays, the ranges of the channels come together."""

import torch
from networks import random_model

from calibration import Plan, equalized
from data import Normalization
from equalization import tied_values
from network import fold_batch_norm, forward, run_float, walk


def channel_ranges(network, images):
    ranges = {}

    def do(op, inputs):
        y = run_float(network, op, inputs)
        if y.ndim == 4:
            ranges[op.name] = y.abs().amax((0, 2, 3))
        return y

    walk(network.ops, network.normalization(images), do)
    return ranges


def test_the_function_is_unchanged_and_the_ranges_are_not():
    network = fold_batch_norm(random_model(0.2, gains=(0.05, 1.0)), Normalization())
    images = torch.randint(0, 256, (24, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        even = equalized(network, images, Plan(8, 4))
        expected = forward(network, images)
        torch.testing.assert_close(forward(even, images), expected, rtol=1e-3, atol=1e-4 * float(expected.std()))
        before, after = channel_ranges(network, images), channel_ranges(even, images)
    # Values that no sum ties to others: within a block, after ReLU6. Spread: largest range over mean range.
    inner = [op.name for op in network.ops if op.relu6]
    spread = [torch.stack([r[n].max() / r[n].mean() for n in inner]).mean() for r in (before, after)]
    assert spread[1] < spread[0] - 0.05
    assert all((cap >= 6).all() for cap in even.caps.values()), "a quantizer that ends at 6 must clip before the cap"
    assert set(even.caps) == set(inner)


def test_sums_and_means_tie_their_values():
    network = fold_batch_norm(random_model(0.1), Normalization())
    group = tied_values(network.ops)
    for op in network.ops:
        if not op.has_weight:
            assert {group[name] for name in op.inputs} == {group[op.name]}
    assert group["features.18.0"] != group["features.17.conv.2"]
    chain = ["features.2.conv.2", "features.3.conv.2", "features.3.add"]
    assert len({group[name] for name in chain}) == 1
