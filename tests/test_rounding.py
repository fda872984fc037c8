"""Rounding against exhaustive search on tiny layers, and its sums against plain convolution."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import rounding
from network import Op
from quantization import dequantize, quantize, weight_grid

LAYERS = {
    "pointwise": (Op("l", "conv", ("x",)), (5, 4, 1, 1)),
    "depthwise": (Op("l", "conv", ("x",), padding=1, groups=4, stride=2), (4, 1, 3, 3)),
    "full": (Op("l", "conv", ("x",), padding=1), (5, 2, 3, 3)),
    "linear": (Op("l", "linear", ("x",)), (5, 4)),
}


def layer(name, seed=0):
    """(op, weight, quantized inputs, FP32 results without bias) of a small layer with correlated inputs."""
    op, shape = LAYERS[name]
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    channels = shape[1] * op.groups
    mixed = torch.randn(channels, channels, generator=generator)
    x = torch.randn(12, channels, generator=generator) @ mixed
    if op.kind == "conv":
        x = torch.einsum("nchw,dc->ndhw", torch.randn(6, channels, 6, 6, generator=generator), mixed)
    seen = x + 0.3 * torch.randn(x.shape, generator=generator) + 0.2
    return op, weight, seen, run(op, weight, x)


def run(op, weight, x):
    if op.kind == "linear":
        return F.linear(x, weight)
    return F.conv2d(x, weight, None, op.stride, op.padding, 1, op.groups)


def squared_error(op, weight, x, y, centred):
    """[out]: the layer's squared error by running it, with the best bias where centred."""
    difference = (y - run(op, weight, x)).transpose(0, 1).flatten(1).double()
    if centred:
        difference = difference - difference.mean(1, keepdim=True)
    return difference.square().mean(1)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("centred", [False, True])
def test_the_gram_form_is_the_layers_squared_error(name, centred):
    op, weight, x, y = layer(name)
    half = len(x) // 2
    kernel = tuple(weight.shape[2:])
    sums = rounding.moments(op, x[:half], y[:half], kernel) + rounding.moments(op, x[half:], y[half:], kernel)
    problem = rounding.make_problem(weight, sums, centred, damping=0.0)
    grids = [weight_grid(weight, b) for b in (2, 4)]
    errors = [squared_error(op, dequantize(quantize(weight, g), g), x, y, centred) for g in grids]
    losses = []
    for grid in grids:
        u = (quantize(weight, grid).double() - grid.shaped(weight.ndim)[1]).flatten(1)
        losses.append(problem.loss(u, grid.scale.double()))
    # Up to a constant, and to the floor that keeps H regular.
    torch.testing.assert_close(losses[0] - losses[1], errors[0] - errors[1], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_bias_correction_keeps_the_mean(name):
    op, weight, x, y = layer(name)
    sums = rounding.moments(op, x, y, tuple(weight.shape[2:]))
    grid = weight_grid(weight, 3)
    rounded = dequantize(quantize(weight, grid), grid)
    means = (y - run(op, rounded, x)).transpose(0, 1).flatten(1).mean(1)
    torch.testing.assert_close(rounding.bias_correction(rounded, sums), means, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["pointwise", "linear"])
@pytest.mark.parametrize("bits", [2, 3])
def test_descent_comes_close_to_the_best_of_all_codes(name, bits):
    gaps = {"nearest": [], "gptq": [], "cd": []}
    for seed in range(6):
        op, weight, x, y = layer(name, seed)
        sums = rounding.moments(op, x, y, tuple(weight.shape[2:]))
        problem = rounding.make_problem(weight, sums, centred=True)
        grids = rounding.candidates(weight, weight_grid(weight, bits), False, ())
        everything = torch.tensor(list(itertools.product(range(2**bits), repeat=4)), dtype=torch.float64)
        all_codes = everything.unsqueeze(1) + grids.low[0].view(1, -1, 1)
        best = problem.loss(all_codes, grids.scale.expand(len(all_codes), -1)).amin(0)
        constant = problem.loss(problem.weight, torch.ones(len(weight), dtype=torch.float64))  # a scale to compare on
        for method in gaps:
            u, chosen = rounding.round_rows(problem, grids, method, fit_scale=False)
            loss = problem.loss(u, chosen.scale)[0]
            assert (loss >= best - 1e-9).all()
            gaps[method].append(((loss - best) / constant.abs()).mean())
    means = {method: float(torch.stack(values).mean()) for method, values in gaps.items()}
    assert means["cd"] < means["nearest"] and means["cd"] <= means["gptq"]
    assert means["cd"] < 0.02


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_objective_never_rises(name, bits):
    op, weight, x, y = layer(name)
    sums = rounding.moments(op, x, y, tuple(weight.shape[2:]))
    problem = rounding.make_problem(weight, sums, centred=True)
    grids = rounding.candidates(weight, weight_grid(weight, bits), False, ())
    u = rounding.nearest(problem, grids)
    losses = [problem.loss(u, grids.scale)]
    for _ in range(4):
        u = rounding.descend(problem, u, grids, cycles=1)
        losses.append(problem.loss(u, grids.scale))
        grids = rounding.best_scale(problem, u, grids)
        losses.append(problem.loss(u, grids.scale))
    slack = 1e-5 * losses[0].abs().max()
    assert all((after <= before + slack).all() for before, after in itertools.pairwise(losses))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("method", rounding.METHODS)
@pytest.mark.parametrize("per_channel", [True, False])
def test_codes_and_grid_describe_the_rounded_layer(name, method, per_channel):
    op, weight, x, y = layer(name)
    sums = rounding.moments(op, x, y, tuple(weight.shape[2:]))
    start = weight_grid(weight, 3, per_channel)
    codes, grid = rounding.round_weight(weight, sums, start, method, True, False, (0.8, 0.6))
    assert grid.scale.shape == grid.zero_point.shape == start.scale.shape
    assert codes.dtype == torch.uint8 and codes.shape == weight.shape and codes.max() <= 7
    assert torch.equal(grid.scale, grid.scale.half().float())
    if method == "nearest":
        assert torch.equal(codes, quantize(weight, start))
    ends = (dequantize(quantize(weight, start), start), dequantize(codes, grid))
    plain, found = (squared_error(op, w, x, y, True) for w in ends)
    if method == "cd":
        assert (found <= plain * 1.05).all() if per_channel else found.sum() < plain.sum()


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("bits", [1, 2])
def test_levels_around_zero_are_found(name, bits):
    """A weight of 2^b equally spaced levels without a 0 among them is represented exactly."""
    op, weight, x, _ = layer(name)
    levels = torch.arange(2**bits) - (2**bits - 1) / 2
    picks = torch.randint(2**bits, weight.shape, generator=torch.Generator().manual_seed(1))
    picks.view(len(picks), -1)[:, 0] = 0  # both ends are there
    picks.view(len(picks), -1)[:, -1] = 2**bits - 1
    weight = 0.25 * levels[picks]
    sums = rounding.moments(op, x, run(op, weight, x), tuple(weight.shape[2:]))
    codes, grid = rounding.round_weight(weight, sums, weight_grid(weight, bits), "cd", True, False, (0.8,))
    assert grid.parts == 2 and torch.equal(dequantize(codes, grid), weight)


def gptq_column_by_column(h, b, scale, low, high):
    """The paper's algorithm 1 for one row in float64, without blocks: columns by falling diagonal of h [k, k], from the
    optimum b h^-1; the error of each goes into those that are left, by what h^-1 of these says."""
    order = np.argsort(-np.diag(h), kind="stable")
    h, b, u = h[np.ix_(order, order)], b[order], np.zeros(len(b))
    w = np.linalg.solve(h, b)
    for j in range(len(b)):
        u[j] = np.clip(np.round(w[j] / scale), low, high)
        inverse = np.linalg.inv(h[j:, j:])
        w[j:] -= (w[j] - u[j] * scale) / inverse[0, 0] * inverse[0]
    return u[np.argsort(order, kind="stable")]


@pytest.mark.parametrize("block", [3, 32])
@pytest.mark.parametrize("name", LAYERS)
def test_gptq_is_the_papers_algorithm(name, block, monkeypatch):
    monkeypatch.setattr(rounding, "BLOCK", block)
    op, weight, x, y = layer(name)
    sums = rounding.moments(op, x, y, tuple(weight.shape[2:]))
    problem = rounding.make_problem(weight, sums, centred=True)
    grids = rounding.candidates(weight, weight_grid(weight, 3), False, ())
    found = rounding.gptq(problem, grids)[0].numpy()
    for row, codes in enumerate(found):
        h, b = problem.h[row if len(problem.h) > 1 else 0].numpy(), problem.b[row].numpy()
        scale, low, high = (float(t[0, row]) for t in (grids.scale, grids.low, grids.high))
        assert np.array_equal(codes, gptq_column_by_column(h, b, scale, low, high))


def long_layer(name):
    """(op, weight, inputs) with more taps than are in a block."""
    generator = torch.Generator().manual_seed(3)
    if name == "linear":
        weight, x = torch.randn(7, 50, generator=generator), torch.randn(200, 50, generator=generator)
        return Op("l", "linear", ("x",)), weight, x
    op = Op("l", "conv", ("x",), padding=3, groups=4)
    x = torch.randn(4, 8, 1, 1, generator=generator) * torch.randn(6, 8, 12, 12, generator=generator).cumsum(3)[:4]
    return op, torch.randn(4, 1, 7, 7, generator=generator), x[:, :4]


@pytest.mark.parametrize("name", ["linear", "depthwise"])
def test_blocks_of_columns_change_nothing(name, monkeypatch):
    op, weight, x = long_layer(name)
    sums = rounding.moments(op, x, run(op, weight, x), tuple(weight.shape[2:]))
    found = []
    for block in (4, 64):
        monkeypatch.setattr(rounding, "BLOCK", block)
        found.append(rounding.round_weight(weight, sums, weight_grid(weight, 3), "cd", True, False, ())[0])
    assert (found[0] != found[1]).float().mean() < 0.02  # float32 sums in another order may move a tie


def test_an_unknown_method_is_refused():
    op, weight, x, y = layer("linear")
    sums = rounding.moments(op, x, y, ())
    with pytest.raises(ValueError, match="'best'; expected one of nearest, gptq, cd"):
        rounding.round_weight(weight, sums, weight_grid(weight, 3), "best", True, False, ())


@pytest.mark.parametrize("spread", [1e-4, 1e-2, 0.3])
def test_fewer_images_than_inputs_that_hardly_vary(spread):
    """Centred moments of a classifier: without a floor under the damping, rounding errors make H indefinite."""
    generator = torch.Generator().manual_seed(0)
    x = 0.2 * torch.rand(640, generator=generator) + spread * torch.rand(34, 640, generator=generator)
    weight = 0.02 * torch.randn(3, 640, generator=generator)
    sums = rounding.moments(Op("classifier", "linear", ("pool",)), x, x @ weight.T, ())
    codes, grid = rounding.round_weight(weight, sums, weight_grid(weight, 8), "cd", True, False, ())
    assert float((dequantize(codes, grid) - weight).abs().max()) < 20 * float(grid.scale.max())


@pytest.mark.parametrize("method", ["gptq", "cd"])
@pytest.mark.parametrize("positions", [256, 8192, 32768])
def test_inputs_that_never_change_over_many_positions(method, positions):
    """Centred moments of constants are rounding errors of float32 alone, which grow with the positions."""
    generator = torch.Generator().manual_seed(0)
    x = (3 * torch.rand(1, 24, 1, 1, generator=generator)).expand(positions // 64, -1, 8, 8)
    weight = torch.randn(5, 24, 1, 1, generator=generator)
    sums = rounding.moments(Op("l", "conv", ("x",)), x, F.conv2d(x, weight), (1, 1))
    codes, grid = rounding.round_weight(weight, sums, weight_grid(weight, 8), method, True, False, ())
    assert float((dequantize(codes, grid) - weight).abs().max()) < 20 * float(grid.scale.max())
