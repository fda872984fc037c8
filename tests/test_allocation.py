"""Mixed precision: allocation against exhaustive search, harms against whole runs, sizes against files on disk."""

import dataclasses
import itertools
import random

import pytest
import torch
from networks import fake_forward, random_model

import allocation
from allocation import Trial, allocate, fit_size, sensitivities, smallest_within, value_sensitivities
from calibration import Plan, method_plan, quantize_network
from compression import save_packed
from data import Normalization
from entropy import LANES
from errors import UserError
from network import fold_batch_norm, forward, fused_operations, value_sizes
from quantization import float_network, with_layers

CHOICES = (2, 4, 8)


@pytest.fixture(scope="module")
def case():
    """(network, training images)."""
    network = fold_batch_norm(random_model(0.1, gains=(0.3, 1.0)), Normalization())
    torch.manual_seed(0)
    smooth = torch.nn.functional.interpolate(torch.rand(64, 3, 6, 6) * 255, (32, 32), mode="bilinear")
    return network, smooth.to(torch.uint8)


@pytest.fixture(scope="module")
def table(case):
    return sensitivities(*case, method_plan("auto", 4, None), CHOICES)


def random_table(seed, rows=6, monotonic=False):
    """Sizes and harms without any order between them, or falling harms as real layers have; ties happen."""
    draw = random.Random(seed)
    table = {}
    for i in range(rows):
        sizes = [draw.randint(1, 30) for _ in CHOICES]
        harms = [draw.choice((draw.random(), 0.5)) for _ in CHOICES]
        if monotonic:
            sizes, harms = sorted(sizes), sorted(harms, reverse=True)
        table[f"layer{i}"] = {b: Trial(h, s) for b, h, s in zip(CHOICES, harms, sizes, strict=True)}
    return table


def exhaustive(table, budget):
    """The least sum of harms within the budget; None where nothing fits."""
    rows = [list(row.values()) for row in table.values()]
    fitting = [c for c in itertools.product(*rows) if sum(t.bytes for t in c) <= budget]
    return min((sum(t.harm for t in c) for c in fitting), default=None)


@pytest.mark.parametrize("seed", range(20))
def test_allocation_is_the_best_of_all(seed):
    table = random_table(seed, monotonic=seed % 2)
    smallest = sum(min(t.bytes for t in row.values()) for row in table.values())
    for budget in (smallest, smallest + 3, smallest + 11, smallest + 40, 10**9):
        bits = allocate(table, budget)
        assert list(bits) == list(table)
        assert sum(table[n][b].bytes for n, b in bits.items()) <= budget
        assert sum(table[n][b].harm for n, b in bits.items()) == pytest.approx(exhaustive(table, budget), abs=1e-12)
    with pytest.raises(UserError, match="budget"):
        allocate(table, smallest - 1)


def test_allocation_of_a_large_network_against_a_dense_table():
    """60 layers, six widths: the plain textbook recursion over every byte gives the same harm."""
    draw = random.Random(1)
    table = {}
    for i in range(60):
        count, harm = draw.randint(50, 3000), draw.lognormvariate(0, 2)
        table[str(i)] = {
            b: Trial(harm * 4.0**-b * draw.uniform(0.7, 1.4), -(-count * b // 8) + 20) for b in (2, 3, 4, 5, 6, 8)
        }
    budget = sum(row[3].bytes for row in table.values())
    dense = torch.zeros(budget + 1, dtype=torch.float64)
    for row in table.values():
        options = []
        for trial in row.values():
            shifted = torch.full_like(dense, float("inf"))
            shifted[trial.bytes :] = dense[: len(dense) - trial.bytes] + trial.harm
            options.append(shifted)
        dense = torch.stack(options).amin(0)
    bits = allocate(table, budget)
    assert sum(table[n][b].harm for n, b in bits.items()) == pytest.approx(float(dense[-1]), rel=1e-9)
    assert len(set(bits.values())) > 3


def test_a_harm_is_that_of_the_whole_network_with_one_layer_changed(case, table):
    network, images = case
    exact = forward(network, images[-16:]).double().log_softmax(1)
    for name in (network.ops[0].name, network.weighted[7].name, network.ops[-1].name):
        for bits in (2, 8):
            changed = with_layers(float_network(network), {name: table[name][bits].layer})
            logs = fake_forward(changed, images[-16:]).double().log_softmax(1)
            divergence = float((exact.exp() * (exact - logs)).sum(1).mean())
            assert table[name][bits].harm == pytest.approx(divergence, rel=1e-3, abs=1e-9)
    assert set(table) == {op.name for op in network.weighted}
    assert sum(row[2].harm for row in table.values()) > 10 * sum(row[8].harm for row in table.values()) > 0


def test_a_value_s_harm_is_that_of_the_whole_network_with_one_grid(case):
    network, images = case
    plan = Plan(None, 8, act_range="minmax")
    table = value_sensitivities(network, images[:32], plan, (3, 8))
    first, last = images[:24], images[24:32]  # those that give the ranges, those that measure
    grids = quantize_network(network, first, dataclasses.replace(plan, activation_bits=3)).activations
    exact = forward(network, last).double().log_softmax(1)
    assert list(table) == [op.name for op in fused_operations(network.ops)[:-1]]
    for name in (network.ops[0].name, "features.3.add", "pool"):
        changed = dataclasses.replace(float_network(network), activations={name: grids[name]})
        logs = fake_forward(changed, last).double().log_softmax(1)
        assert table[name][3].harm == pytest.approx(float((exact.exp() * (exact - logs)).sum(1).mean()), rel=1e-3)
    elements = value_sizes(network.ops, network.weights)
    assert table["pool"][3].bytes == -(-elements["pool"] * 3 // 8)


@pytest.mark.parametrize("entropy", [False, True])
def test_bytes_of_layers_are_those_of_the_file(case, entropy, tmp_path):
    """All but the header and what the coder shares: exact when packed, within the coder's lanes when coded."""
    network, images = case
    table = sensitivities(network, images[:16], method_plan("plain", 4, None), (3,), entropy)
    whole = with_layers(float_network(network), {name: row[3].layer for name, row in table.items()})
    report = save_packed(whole, tmp_path / "p.safetensors", {}, entropy=entropy)
    if not entropy:
        assert {row.name: row.total_bytes for row in report.rows} == {n: row[3].bytes for n, row in table.items()}
    else:
        foreseen = sum(row[3].bytes for row in table.values())
        packed = sensitivities(network, images[:16], Plan(3), (3,))
        assert foreseen < sum(row[3].bytes for row in packed.values())
        assert sum(row.total_bytes for row in report.rows) <= foreseen + 4 * LANES  # scales and biases deflated: less


@pytest.mark.parametrize("entropy", [False, True])
def test_the_file_is_as_small_as_asked(case, entropy, tmp_path):
    network, images = case[0], case[1][:32]
    plan = method_plan("auto", 4, None)
    table = sensitivities(network, images, plan, CHOICES, entropy)

    def size(quantized):
        return save_packed(quantized, tmp_path / "p.safetensors", {"a": 1}, entropy=entropy).total_bytes

    def build(bits):
        return quantize_network(network, images, dataclasses.replace(plan, layer_bits=bits))

    ends = [size(build({name: b for name in table})) for b in (2, 8)]
    target = (ends[0] + ends[1]) // 2
    bits, quantized = fit_size(float_network(network), table, target, build, size)
    assert 0.9 * target < size(quantized) <= target
    if not entropy:  # nothing better fits beside what the rows do not count
        best = allocate(table, target - (size(quantized) - allocation.total_bytes(table, bits)))
        harms = [sum(table[name][b].harm for name, b in one.items()) for one in (bits, best)]
        assert harms[0] == pytest.approx(harms[1], rel=1e-6)
    assert {name: layer.grid.bits for name, layer in quantized.layers.items()} == bits
    with pytest.raises(UserError, match="--target-size-mb"):
        fit_size(float_network(network), table, ends[0] * 9 // 10, build, size)


def test_the_smallest_network_within_a_drop():
    """A made-up drop that falls with the bytes: bisection finds the least budget that keeps it."""
    table = random_table(3, rows=8, monotonic=True)
    built = []

    def build(bits):
        built.append(bits)
        return bits

    def drop(bits):
        return 100.0 / allocation.total_bytes(table, bits)

    sizes = [allocation.total_bytes(table, allocate(table, b)) for b in range(69, 200)]
    bits, network, lost = smallest_within(table, 1.0, build, drop, precision=0.001)
    assert network == bits and lost <= 1.0 and lost == drop(bits)
    assert allocation.total_bytes(table, bits) == min(size for size in sizes if 100.0 / size <= 1.0)
    assert len(built) < 15
    with pytest.raises(UserError, match="--max-drop"):
        smallest_within(table, 1e-9, build, drop)


@pytest.mark.parametrize("small", [1e-7, 1e-9, 0.0])
@pytest.mark.parametrize("seed", range(10))
def test_a_generous_budget_gets_the_least_harm_however_small(seed, small):
    """The bounds are differences of the large harms, which lose the digits of the small ones."""
    draw = random.Random(seed)
    table = {f"l{i}": {1: Trial(draw.random(), 100), 8: Trial(small * draw.random(), 800)} for i in range(53)}
    assert set(allocate(table, 53 * 800).values()) == {8}


def test_the_least_size_that_there_is_can_be_had(case, table, tmp_path):
    network, images = case
    plan = dataclasses.replace(method_plan("auto", 4, 8), edge_bits=None)

    def build(bits):
        return quantize_network(network, images, dataclasses.replace(plan, layer_bits=bits))

    def size(quantized):
        return save_packed(quantized, tmp_path / "p", {}, entropy=True).total_bytes

    least = size(build(allocation.smallest_bits(table)))
    for more in (0, 1, 50):
        bits, built = fit_size(float_network(network), table, least + more, build, size)
        assert size(built) <= least + more
    with pytest.raises(UserError, match="out of reach"):
        fit_size(float_network(network), table, least // 2, build, size)


def test_one_image_cannot_both_round_and_measure(case):
    network, images = case
    with pytest.raises(UserError, match="two calibration images"):
        sensitivities(network, images[:1], Plan(3), (3,))
