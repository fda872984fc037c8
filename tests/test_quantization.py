"""Grids against a search over all their points, and the quantized network against integer arithmetic in numpy."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import fake_forward, largest_sum, random_model

import quantization as q
from calibration import Plan, quantize_network
from data import Normalization
from network import INPUT, Op, fold_batch_norm, forward


@settings(max_examples=60, deadline=None)
@given(
    st.integers(2, 8),
    st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=30),
    st.floats(-10, 0, width=32),
    st.floats(0, 10, width=32),
    st.booleans(),
)
def test_codes_are_the_nearest_points_of_the_grid(bits, numbers, low, high, symmetric):
    grid = q.make_grid(bits, torch.tensor(low), torch.tensor(high), symmetric)
    x = torch.tensor(numbers)
    points = q.dequantize(torch.arange(2**bits), grid)
    distance = (x.unsqueeze(1) - points).abs()
    chosen = (q.dequantize(q.quantize(x, grid), grid) - x).abs()
    torch.testing.assert_close(chosen, distance.amin(1), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(q.fake_quantize(x, grid), q.dequantize(q.quantize(x, grid), grid))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [False, True])
def test_grids_hold_zero_and_are_what_the_file_holds(bits, symmetric):
    weight = torch.randn(5, 4, 3, 3) + 0.3
    grid = q.weight_grid(weight, bits, symmetric=symmetric)
    assert torch.equal(grid.scale, grid.scale.half().float())
    assert torch.equal(q.fake_quantize(torch.zeros_like(weight), grid), torch.zeros_like(weight))
    assert grid.zero_point.min() >= 0 and grid.zero_point.max() <= grid.highest
    if symmetric:
        assert (grid.zero_point == 2 ** (bits - 1)).all()


def test_the_smallest_grids_known_by_heart():
    grid = q.make_grid(2, torch.tensor(-1.0), torch.tensor(2.0))
    assert q.dequantize(torch.arange(4), grid).tolist() == [-1, 0, 1, 2]
    grid = q.make_grid(3, torch.tensor(-3.0), torch.tensor(1.0), symmetric=True)
    assert q.dequantize(torch.arange(8), grid).tolist() == [-4, -3, -2, -1, 0, 1, 2, 3]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
def test_least_squares_ranges_are_never_worse_than_the_whole(bits, per_channel, symmetric):
    generator = torch.Generator().manual_seed(bits)
    weight = torch.randn(6, 8, 3, 3, generator=generator) ** 3

    def error(range_):
        grid = q.weight_grid(weight, bits, per_channel, symmetric, range_)
        wrong = (q.fake_quantize(weight, grid) - weight).square().flatten(1).sum(1)
        return wrong if per_channel else wrong.sum()

    assert (error("mse") <= error("minmax")).all()
    if bits < 4:
        assert error("mse").sum() < error("minmax").sum()


@pytest.mark.parametrize("range_", q.ACTIVATION_RANGES)
@pytest.mark.parametrize(("low", "high"), [(-3.0, -1.0), (1.0, 3.0), (0.0, 0.0)])
def test_values_of_one_sign_and_of_none_have_a_grid(range_, low, high):
    sample = torch.linspace(low, high, 100)
    grid = q.activation_grid(q.Observation(low, high, sample), 4, False, range_)
    assert float((q.fake_quantize(sample, grid) - sample).abs().max()) <= 0.51 * float(grid.scale) + 1e-3


@pytest.mark.parametrize("unsigned", [True, False])
def test_activation_ranges(unsigned):
    sample = torch.randn(4000, generator=torch.Generator().manual_seed(0))
    sample = sample.clamp(min=0) if unsigned else sample
    seen = q.Observation(float(sample.min()), float(sample.max()), sample)
    grids = {r: q.activation_grid(seen, 3, unsigned, r, percentile=99) for r in q.ACTIVATION_RANGES}
    errors = {r: float((q.fake_quantize(sample, g) - sample).square().sum()) for r, g in grids.items()}
    assert errors["mse"] < errors["percentile"] < errors["minmax"]
    assert all((g.zero_point == 0) == unsigned for g in grids.values())
    top = grids["minmax"].scale * (grids["minmax"].highest - grids["minmax"].zero_point)
    assert abs(float(top) - seen.high) < float(grids["minmax"].scale)


@pytest.mark.parametrize(
    ("low", "noise", "least", "most"), [(0, 0.0, 0.97, 1.03), (0, 0.4, 0.6, 0.9), (-3, 0.7, 0.6, 0.95)]
)
def test_a_fitted_scale_is_the_best_for_noisy_numbers(low, noise, least, most):
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(20000, generator=generator).clamp(min=low)
    seen = (exact + noise * torch.randn(20000, generator=generator)).clamp(min=low)
    grid = q.activation_grid(q.Observation(float(exact.min()), float(exact.max()), exact), 2, low == 0)

    def error(scale):  # in numpy, of any scale
        codes = np.clip(np.rint(seen.numpy() / scale), -int(grid.zero_point), 3 - int(grid.zero_point))
        return float(((codes * scale - exact.numpy()) ** 2).sum())

    fitted = q.fitted_scale(grid, seen, exact, np.inf)
    scale = float(fitted.scale)
    assert least < scale / float(grid.scale) < most and torch.equal(fitted.zero_point, grid.zero_point)
    assert error(scale) < 1.002 * min(error(float(grid.scale) * share) for share in np.linspace(0.4, 1.4, 301))
    louder = q.fitted_scale(grid, 2 * seen, 2 * exact, 3.1 * float(grid.scale))
    assert float(grid.scale) < float(louder.scale) <= 3.1 / (3 - int(grid.zero_point)) * float(grid.scale)


def quantized_network(weight_bits, activation_bits, width=0.1, **changes):
    network = fold_batch_norm(random_model(width), Normalization())
    images = torch.randint(0, 256, (16, 3, 32, 32), dtype=torch.uint8)
    return network, quantize_network(network, images, Plan(weight_bits, activation_bits, **changes)), images


def integer_convolution(x, weight, op):
    """int64 sums of products, one tap after the other. x: [N, in, h, w], weight: [out, in/groups, kh, kw]."""
    pad, stride = op.padding, op.stride
    x = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    kh, kw = weight.shape[2:]
    height, width = (x.shape[2] - kh) // stride + 1, (x.shape[3] - kw) // stride + 1
    total = np.zeros((len(x), len(weight), height, width), np.int64)
    for i in range(kh):
        for j in range(kw):
            view = x[:, :, i : i + height * stride : stride, j : j + width * stride : stride]
            if op.groups > 1:
                total += view * weight[None, :, 0, i, j, None, None]
            else:
                total += np.einsum("nchw,oc->nohw", view, weight[:, :, i, j])
    return total


def left_shift(weight, bias, end, most):
    """How far an accumulator of 24 bits can be shifted before the bias is added. end: the input's largest integer."""
    shift = 0
    bound = (np.abs(weight.reshape(len(weight), -1)).sum(1) * end + np.abs(bias)).max()
    while shift < most and (bound + 1) * 2 ** (shift + 1) < 2**24:
        shift += 1
    return shift


def integer_logits(network, images):
    """The network as an int32 accelerator runs it: integer sums, shifted, plus the bias, one float32 factor per
    channel, round, clip."""
    mean = np.array(network.normalization.mean).reshape(1, 3, 1, 1)
    values, scales = {INPUT: images.numpy().astype(np.int64) - mean}, {INPUT: 1 / network.normalization.std}
    ends = {INPUT: max(255 - mean.min(), mean.max())}
    for op in network.ops:
        grid = network.activations.get(op.name)
        out = float(grid.scale) if grid else 1.0
        scales[op.name] = out
        inputs = [values[name] for name in op.inputs]
        if op.has_weight:
            layer = network.layers[op.name]
            shape = (-1,) + (1,) * (layer.codes.ndim - 1)
            parts = layer.grid.parts  # in half steps, where a zero-point lies between two codes
            scale = layer.grid.scale.double().expand(len(layer.bias)).numpy() / parts
            zeros = (parts * layer.grid.zero_point).long().expand(len(layer.bias)).numpy().reshape(shape)
            weight = parts * layer.codes.long().numpy() - zeros
            factor = scale * scales[op.inputs[0]]
            bias = layer.bias.double().numpy() / factor
            shift = left_shift(weight, bias, ends[op.inputs[0]], network.bias_fraction_bits)
            bias, factor = np.rint(bias * 2**shift).astype(np.int64), factor / 2**shift
            if op.kind == "conv":
                total = (integer_convolution(inputs[0], weight, op) << shift) + bias.reshape(1, -1, 1, 1)
            else:
                total = ((inputs[0] @ weight.T) << shift) + bias
            assert np.abs(total).max() < 2**24
            shape = (1, -1) + (1,) * (total.ndim - 2)
            y = total.astype(np.float32) * (factor / out).astype(np.float32).reshape(shape)
        elif op.kind == "add":
            factors = [np.float32(scales[name] / out) for name in op.inputs]
            y = inputs[0].astype(np.float32) * factors[0] + inputs[1].astype(np.float32) * factors[1]
        else:
            places = inputs[0].shape[2] * inputs[0].shape[3]
            y = inputs[0].sum((2, 3)).astype(np.float32) * np.float32(scales[op.inputs[0]] / out / places)
        if grid:
            low = -int(grid.zero_point)
            y = np.clip(np.rint(y), low, low + grid.highest).astype(np.int64)
            ends[op.name] = max(-low, low + grid.highest)
        values[op.name] = y
    return values[network.ops[-1].name]


@pytest.mark.parametrize("weight_bits,activation_bits", [(8, 8), (4, 8), (4, 4), (2, 3)])
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("bias_fraction_bits", [0, 8])
def test_evaluation_is_integer_arithmetic(weight_bits, activation_bits, per_channel, bias_fraction_bits):
    _, quantized, images = quantized_network(weight_bits, activation_bits, per_channel=per_channel)
    quantized = dataclasses.replace(quantized, bias_fraction_bits=bias_fraction_bits)
    assert largest_sum(quantized) < 2**24
    logits = q.predictor(quantized)(images[:3]).numpy()
    np.testing.assert_array_equal(logits, integer_logits(quantized, images[:3]))


@pytest.mark.parametrize("weight_bits", [1, 2])
def test_levels_between_whole_numbers_are_integer_arithmetic_in_half_steps(weight_bits):
    _, quantized, images = quantized_network(weight_bits, 8, rounding="cd")
    assert {layer.grid.parts for layer in quantized.layers.values()} >= {2}
    np.testing.assert_array_equal(q.predictor(quantized)(images[:3]).numpy(), integer_logits(quantized, images[:3]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA: its sums against the CPU's")
@pytest.mark.parametrize("batch_size", [3, 64])
def test_cuda_gives_the_bits_of_the_cpu(batch_size):
    _, quantized, images = quantized_network(8, 8)
    images = images.repeat(8, 1, 1, 1)[:batch_size]
    assert torch.equal(q.predictor(quantized, "cuda")(images.cuda()).cpu(), q.predictor(quantized)(images))


def test_only_convolutions_over_several_places_are_transformed_by_cudnn():
    network, _, _ = quantized_network(8, 8)
    found = [op.name for op in network.weighted if q.transformed(op, network.weights[op.name], "cuda")]
    assert found == ["features.0.0"]
    assert not any(q.transformed(op, network.weights[op.name], "cpu") for op in network.weighted)


def test_layers_with_larger_sums_run_in_float64(monkeypatch):
    """Oracle: the same network in float32, which holds its sums; and a layer whose sums it does not hold, in numpy."""
    _, quantized, images = quantized_network(8, 8)
    quantized = dataclasses.replace(quantized, bias_fraction_bits=0)  # their number follows from EXACT too
    logits = q.predictor(quantized)(images[:3])
    monkeypatch.setattr(q, "EXACT", largest_sum(quantized) / 2)
    kinds = {step.weight.dtype for step in q.prepare(quantized) if step.weight is not None}
    assert kinds == {torch.float32, torch.float64}
    assert torch.equal(q.predictor(quantized)(images[:3]), logits)

    generator = np.random.default_rng(0)
    weight, x = (generator.integers(200, 255, (5, 3001)) for _ in range(2))
    op = Op("l", "linear", (INPUT,))
    sums = (x @ weight.T).astype(np.float32)
    for kind in (torch.float64, torch.float32):
        made = q.run_step(q.Step(op, torch.tensor(weight, dtype=kind)), [torch.tensor(x, dtype=torch.float32)])
        assert np.array_equal(made.numpy(), sums) == (kind == torch.float64)


@pytest.mark.parametrize("threads", [1, 2])
def test_the_number_of_threads_changes_no_bit(threads):
    _, quantized, images = quantized_network(8, 8)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert np.array_equal(q.predictor(quantized)(images).numpy(), integer_logits(quantized, images))
    finally:
        torch.set_num_threads(before)


def test_batch_size_changes_no_bit():
    _, quantized, images = quantized_network(4, 4)
    forward_ = q.predictor(quantized)
    together = forward_(images)
    assert torch.equal(together, torch.cat([forward_(images[i : i + 3]) for i in range(0, 16, 3)]))


@pytest.mark.parametrize("weight_bits,activation_bits", [(None, None), (8, None), (None, 8), (8, 8)])
def test_eight_bits_are_close_to_fp32_and_two_are_not(weight_bits, activation_bits):
    network, quantized, images = quantized_network(weight_bits, activation_bits)
    with torch.no_grad():
        expected = forward(network, images)
        fake = fake_forward(quantized, images)
    logits = q.predictor(quantized)(images)
    scale = expected.std()
    tolerance = 0.2 if weight_bits or activation_bits else 1e-5
    assert (logits - expected).std() < tolerance * scale
    assert (logits - fake).std() < tolerance * scale
    _, coarse, _ = quantized_network(weight_bits and 2, activation_bits and 2)
    if weight_bits or activation_bits:
        assert (q.predictor(coarse)(images) - expected).std() > 0.3 * scale


def test_a_channel_with_no_weights_stays_silent():
    weight = torch.zeros(3, 4, 1, 1)
    weight[0] = 1.0
    grid = q.weight_grid(weight, 4)
    assert torch.equal(q.fake_quantize(weight, grid)[1:], weight[1:])
    layer = q.quantize_layer(weight, torch.tensor([1.0, 2.0, 3.0]), grid)
    assert dataclasses.replace(layer).weight.isfinite().all()
