"""Reconstruction: no stage increases the loss it minimises, and the result can be packed."""

from pathlib import Path

import pytest
import torch
from test_learned import assert_same, small_network, start_of

from compression import load_packed, save_packed
from evaluation import divergence
from learned import LearnedNetwork
from network import INPUT, Network, forward, run_ops
from quantization import QuantizedNetwork, predictor
from reconstruction import Reconstruction, blocks, reconstruct, tune

FAST = Reconstruction(iterations=24, network_iterations=24, batch_size=8, held_out=0.25, code_rate=0.01)


@pytest.fixture(scope="module")
def done() -> tuple[Network, torch.Tensor, QuantizedNetwork, QuantizedNetwork, list]:
    """(network, images, start, result, stages) at 4-bit weights and activations."""
    network, images = small_network()
    start, stages = start_of(network, images, 4, 4), []
    result = reconstruct(network, start, images, FAST, on_stage=lambda *stage: stages.append(stage))
    return network, images, start, result, stages


def test_blocks_are_the_network() -> None:
    """Run one after the other, they give the logits; no operation is lost, and a sum stays with its block."""
    network, images = small_network()
    parts = blocks(network.ops)
    assert [op.name for ops in parts for op in ops] == [op.name for op in network.ops]
    assert len(parts) == 20  # stem, 17 inverted residuals, last convolution with the pool, classifier
    x = network.normalization(images)
    for ops in parts:
        assert ops[0].inputs == (INPUT,)
        x = run_ops(network, ops, x)
    torch.testing.assert_close(x, forward(network, images))


def test_quantized_blocks_are_the_quantized_network() -> None:
    """Biases are whole multiples of the same units, wherever a block gets its input from."""
    network, images = small_network()
    model = LearnedNetwork(network, start_of(network, images, 2, 2))
    x = network.normalization(images)
    with torch.no_grad():
        whole = model(x)
        for ops in blocks(network.ops):
            x = model.run(ops, x)
    assert torch.equal(x, whole)


def test_most_stages_lower_their_loss(done) -> None:
    *_, stages = done
    assert [name for name, _, _ in stages][-2:] == ["classifier.1", "network"]
    assert all(after <= before for _, before, after in stages)
    assert sum(after < before for _, before, after in stages) > len(stages) / 2


def test_the_last_loss_is_that_of_the_result(done) -> None:
    """Oracle: quantization.py's own forward pass of the network that comes back, on the held-out images."""
    network, images, start, result, stages = done
    held = images[-6:]
    with torch.no_grad():
        loss = float(divergence(predictor(result)(held), forward(network, held)))
        first = float(divergence(predictor(start)(held), forward(network, held)))
    assert loss == pytest.approx(stages[-1][2], rel=0.1)  # biases and rounding ties of real and integer arithmetic
    assert first == pytest.approx(stages[-1][1], rel=0.1)
    assert loss < first


def test_only_codes_scales_and_biases_change(done) -> None:
    _, _, start, result, _ = done
    moved = 0
    for name, layer in result.layers.items():
        before = start.layers[name]
        assert layer.codes.dtype == torch.uint8 and layer.codes.shape == before.codes.shape
        assert int(layer.codes.max()) <= layer.grid.highest
        assert layer.grid.bits == before.grid.bits and torch.equal(layer.grid.zero_point, before.grid.zero_point)
        for numbers in (layer.grid.scale, layer.bias):
            assert torch.equal(numbers.half().float(), numbers)
        moved += int((layer.codes != before.codes).sum())
    assert moved > 0
    for name, grid in result.activations.items():
        before = start.activations[name]
        assert (grid.bits, int(grid.zero_point)) == (before.bits, int(before.zero_point))
        assert float(grid.scale.half()) == float(grid.scale)


def test_packed_and_read_back(done, tmp_path: Path) -> None:
    _, images, _, result, _ = done
    save_packed(result, tmp_path / "packed.safetensors", {})
    network, _ = load_packed(tmp_path / "packed.safetensors")
    assert torch.equal(predictor(network)(images), predictor(result)(images))


def test_of_a_single_image_nothing_is_learned(done) -> None:
    network, images, start, *_ = done
    assert reconstruct(network, start, images[:1], FAST) is start


def test_same_seed_same_network(done) -> None:
    network, images, start, result, _ = done
    torch.rand(3)  # the global generator must not matter
    assert_same(reconstruct(network, start, images, FAST), result)


def test_no_iterations_change_nothing() -> None:
    network, images = small_network()
    start = start_of(network, images, 4, None)
    assert_same(reconstruct(network, start, images, Reconstruction(iterations=0, network_iterations=0)), start)


def test_tuning_comes_closer_and_moves_no_code() -> None:
    """Oracle: quantization.py's forward pass, on the images that decided."""
    network, images = small_network()
    start = start_of(network, images, 2, 2)
    settings = Reconstruction(network_iterations=20, batch_size=8, held_out=0.25, scale_rate=0.01)
    result = tune(network, start, images, settings)
    decided = images[-len(images) // 4 :]
    logits = forward(network, decided)
    before, after = (float(divergence(predictor(q)(decided), logits)) for q in (start, result))
    assert after < before
    assert all(torch.equal(result.layers[name].codes, layer.codes) for name, layer in start.layers.items())
    assert tune(network, start, images[:1]) is start


def test_a_step_too_far_is_taken_back() -> None:
    """With absurd rates every block fails, and the start comes back."""
    network, images = small_network()
    start = start_of(network, images, 8, 8)
    wild = Reconstruction(iterations=2, network_iterations=0, batch_size=8, code_rate=1e4, scale_rate=5.0)
    assert_same(reconstruct(network, start, images, wild), start)
