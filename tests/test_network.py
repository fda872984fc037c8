"""The folded network against the trained one, and the list of operations against counting by hand."""

import pytest
import torch
from networks import random_model

from data import Normalization
from models import Architecture, MobileNetV2
from network import (
    INPUT,
    fold_batch_norm,
    forward,
    fused_operations,
    operations,
    peak_bytes,
    stored_values,
    to_device,
    value_sizes,
    walk,
)


@pytest.mark.parametrize("width", [0.1, 0.35])
def test_folding_changes_nothing(width):
    model, normalization = random_model(width), Normalization()
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        expected = model(normalization(images))
        folded = forward(to_device(fold_batch_norm(model, normalization), "cpu"), images)
    assert expected.std() > 0.01  # a network that says nothing would agree with anything
    torch.testing.assert_close(folded, expected, rtol=1e-4, atol=1e-5)


def test_operations_are_the_networks():
    model = MobileNetV2(Architecture())
    ops = operations(model.architecture)
    assert [op.kind for op in ops].count("conv") == sum(isinstance(m, torch.nn.Conv2d) for m in model.modules())
    assert [op.kind for op in ops].count("add") == 10  # table 2 of the paper: 1 + 2 + 3 + 2 + 2 repeats at stride 1
    assert sum(op.relu6 for op in ops) == sum(isinstance(m, torch.nn.ReLU6) for m in model.modules())
    assert ops[-1].name == "classifier.1" and ops[0].inputs == (INPUT,)


def test_walk_drops_values_after_their_last_use():
    ops, alive = operations(random_model(0.1).architecture), []

    class Value:
        def __del__(self):
            alive.remove(self.name)

    def do(op, inputs):
        assert len(alive) <= 3, "a residual block needs its input, and the input and the result of a layer"
        value = Value()
        value.name = op.name
        alive.append(op.name)
        return value

    first = Value()
    first.name = INPUT
    alive.append(INPUT)
    result = walk(ops, first, do)
    assert result.name == "classifier.1"


def test_value_sizes_and_peak():
    model = random_model(1.0)
    ops = operations(model.architecture)
    network = fold_batch_norm(model, Normalization())
    sizes = value_sizes(ops, network.weights)
    assert sizes[INPUT] == 3 * 32 * 32
    assert sizes["features.2.conv.0.0"] == 96 * 32 * 32  # the first expansion: 16 channels, six times
    assert sizes["pool"] == 1280 and sizes["classifier.1"] == 10
    # The third block's expansion lies beside its depthwise result and the block's input, which the sum still needs.
    block = 2 * 144 * 32 * 32 + 24 * 32 * 32
    assert peak_bytes(ops, sizes) == block


def test_sums_are_fused_with_the_convolution_before():
    ops = operations(Architecture())
    fused = fused_operations(ops)
    sums = [op.name for op in ops if op.kind == "add"]
    assert len(fused) == len(ops) - len(sums) and not any(op.kind == "add" for op in fused)
    third = next(op for op in fused if op.name == "features.3.add")
    assert third.inputs == ("features.3.conv.1.0", "features.2.conv.2")
    assert stored_values(ops) == {op.name for op in ops} - {name.replace("add", "conv.2") for name in sums}
    # The hidden result, the block's input and the sum lie side by side; unfused, the bottleneck did, too.
    sizes = dict.fromkeys([INPUT, *(op.name for op in ops)], 0.0)
    sizes |= {
        "features.3.conv.1.0": 100.0,
        "features.2.conv.2": 10.0,
        "features.3.conv.2": 10.0,
        "features.3.add": 10.0,
    }
    assert peak_bytes(fused, sizes) == 120
