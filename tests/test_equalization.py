"""Equalization: the FP32 function stays, the ranges of the channels come together, their middles become the grid's."""

import pytest
import torch
from networks import random_model

from calibration import Plan, equalized
from data import Normalization
from equalization import channel_offsets, even_step, kept_values, shifted, tied_values
from models import Architecture
from network import Network, fold_batch_norm, forward, operations, run_float, walk
from quantization import make_grid, quantize


@pytest.fixture(scope="module")
def case() -> tuple[Network, torch.Tensor]:
    network = fold_batch_norm(random_model(0.2, gains=(0.05, 1.0)), Normalization())
    return network, torch.randint(0, 256, (24, 3, 32, 32), dtype=torch.uint8)


def channels(network, images):
    """Value → [channels, n], all its numbers."""
    seen = {}

    def do(op, inputs):
        y = run_float(network, op, inputs)
        if y.ndim == 4:
            seen[op.name] = y.transpose(0, 1).flatten(1)
        return y

    walk(network.ops, network.normalization(images), do)
    return seen


def assert_same_function(one, other, images):
    expected = forward(one, images)
    torch.testing.assert_close(forward(other, images), expected, rtol=1e-3, atol=1e-4 * float(expected.std()))


@torch.no_grad()
def test_the_function_is_unchanged_and_the_ranges_are_not(case):
    network, images = case
    even = equalized(network, images, Plan(8, 4))
    assert_same_function(network, even, images)
    before, after = channels(network, images), channels(even, images)
    # Values that no sum ties to others: within a block, after ReLU6. Spread: largest range over mean range.
    inner = [op.name for op in network.ops if op.relu6]
    ranges = [{name: seen[name].abs().amax(1) for name in inner} for seen in (before, after)]
    spread = [torch.stack([r[n].max() / r[n].mean() for n in inner]).mean() for r in ranges]
    assert spread[1] < spread[0] - 0.05
    assert all((cap >= 6).all() for cap in even.caps.values()), "a quantizer that ends at 6 must clip before the cap"
    assert set(even.caps) == set(inner)


@torch.no_grad()
@pytest.mark.parametrize("bits", [2, 4])
def test_offsets_move_every_stored_bottleneck_to_the_middle_of_its_grid(case, bits):
    network, images = case
    stored = {op.name: bits for op in network.ops[:-1] if not op.unsigned}
    stored = {
        name: b for name, b in stored.items() if name not in {o.inputs[1] for o in network.ops if o.kind == "add"}
    }
    seen = channels(network, images)
    offsets = channel_offsets(network, seen, stored)
    assert set(offsets) == set(stored) and any(name.endswith("add") for name in stored)
    moved = shifted(network, offsets)
    assert_same_function(network, moved, images)
    after = channels(moved, images)
    for name in stored:
        torch.testing.assert_close(after[name], seen[name] - offsets[name].unsqueeze(1), rtol=1e-3, atol=1e-3)
        middle = after[name].mean(1)
        torch.testing.assert_close(middle, middle[0].expand_as(middle), rtol=1e-3, atol=1e-3)
        step = even_step(after[name] - middle.unsqueeze(1), bits) * (0.8 if bits == 2 else 1)
        assert float(middle[0]) == pytest.approx(step / 2, rel=0.05)


def test_a_side_of_a_sum_with_an_offset_of_its_own_keeps_it():
    network = fold_batch_norm(random_model(0.2), Normalization())
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    total = next(op for op in network.ops if op.name == "features.5.add")
    for names in (total.inputs, total.inputs[:1], total.inputs[1:], (total.name,)):
        width = len(network.biases[total.inputs[1]])
        assert_same_function(network, shifted(network, {name: torch.randn(width) for name in names}), images)


def test_four_levels_around_the_mean_beat_three():
    """Of a bell of numbers, a grid with a code at the mean uses three of its four levels."""
    x = torch.randn(1, 20000, generator=torch.Generator().manual_seed(0))
    step = even_step(x, 2)
    assert step == pytest.approx(0.9957, rel=0.03)  # Max 1960, table I: the uniform 4-level quantizer of a Gaussian
    errors = {}
    for name, shift in (("between", step / 2), ("at", 0.0)):
        grid = make_grid(2, torch.tensor(-step), torch.tensor(2 * step))
        codes = quantize(x + shift, grid).float() - float(grid.zero_point)
        errors[name] = float((codes * float(grid.scale) - shift - x).square().mean())
    assert errors["between"] == pytest.approx(0.1188, rel=0.05) and errors["between"] < 0.85 * errors["at"]


def test_values_keep_their_ranges_where_the_weights_that_read_them_have_fewer_bits():
    ops = operations(Architecture())
    values = {op.name: 4 for op in ops if op.name != "classifier.1"}
    weights = {op.name: 8 for op in ops if op.has_weight}
    assert kept_values(ops, values, weights) == frozenset()
    assert kept_values(ops, values, dict.fromkeys(weights)) == frozenset()
    coarse = kept_values(ops, values, weights | {"features.3.conv.2": 2, "features.4.conv.0.0": 3})
    stage = {"features.2.conv.2", "features.3.conv.2", "features.3.add"}  # what the expansion of 4 reads, and its sides
    assert coarse == {"features.3.conv.1.0"} | stage
    every = kept_values(ops, values, {name: 2 for name in weights})
    assert not every & {op.inputs[0] for op in ops if op.depthwise}
    assert "pool" in every and "features.5.conv.1.0" in every and "features.5.conv.0.0" not in every


def test_the_classifiers_columns_stay_even_where_it_has_fewer_bits_than_the_pool(case):
    """And what is pooled with them."""
    network, images = case
    last, pooled = network.ops[-1].name, network.ops[-2].inputs[0]
    assert pooled not in equalized(network, images, Plan(2, 4)).caps
    assert pooled in equalized(network, images, Plan(2, 4, edge_bits=8)).caps
    assert torch.equal(equalized(network, images, Plan(2, 4)).weights[last], network.weights[last])


def test_sums_and_means_tie_their_values():
    group = tied_values(operations(Architecture()))
    for op in operations(Architecture()):
        if not op.has_weight:
            assert {group[name] for name in op.inputs} == {group[op.name]}
    assert group["features.18.0"] != group["features.17.conv.2"]
    chain = ["features.2.conv.2", "features.3.conv.2", "features.3.add"]
    assert len({group[name] for name in chain}) == 1
