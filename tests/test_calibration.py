"""Post-training quantization of a whole network: what a plan promises, and that better methods are better."""

import dataclasses

import pytest
import torch
from networks import fake_forward, random_model

from calibration import METHODS, Plan, method_plan, observe, quantize_network
from data import Normalization
from network import INPUT, fold_batch_norm, forward, fused_operations, run_float, walk
from quantization import fake_quantize, float_network, predictor
from reconstruction import Reconstruction


@pytest.fixture(scope="module")
def case():
    """(network, calibration images, other images, their FP32 logits)."""
    network = fold_batch_norm(random_model(0.1, gains=(0.3, 1.0)), Normalization())
    smooth = torch.nn.functional.interpolate(torch.rand(160, 3, 6, 6) * 255, (32, 32), mode="bilinear")
    images = smooth.to(torch.uint8)
    with torch.no_grad():
        return network, images[:96], images[96:], forward(network, images[96:])


def logit_error(case, plan):
    network, calibration, images, expected = case
    return float((predictor(quantize_network(network, calibration, plan))(images) - expected).square().mean())


def test_better_methods_are_better(case):
    plans = {m: method_plan(m, 3, 8) for m in ("plain", "nearest", "gptq", "cd")}
    plans["corrected"] = dataclasses.replace(plans["cd"], bias_correction=True)
    errors = {name: logit_error(case, plan) for name, plan in plans.items()}
    assert errors["gptq"] < errors["nearest"] and errors["cd"] < errors["nearest"]
    assert errors["corrected"] < errors["plain"]


def test_more_bits_are_better(case):
    errors = [logit_error(case, Plan(bits, bits)) for bits in (8, 6, 4, 2)]
    assert errors == sorted(errors) and errors[0] < 0.1 * errors[3]


@pytest.mark.parametrize("method", ["auto", *METHODS])
def test_every_method_keeps_the_promised_bits(case, method):
    network, calibration, _, _ = case
    short = Reconstruction(iterations=1, network_iterations=1, batch_size=8)
    plan = dataclasses.replace(method_plan(method, 4, 4), edge_bits=None, reconstruction=short)
    quantized = quantize_network(network, calibration[:16], plan)
    assert {layer.grid.bits for layer in quantized.layers.values()} == {4}
    assert {grid.bits for grid in quantized.activations.values()} == {4}
    assert set(quantized.activations) == {op.name for op in fused_operations(network.ops)[:-1]}
    assert all(torch.equal(layer.bias, layer.bias.half().float()) for layer in quantized.layers.values())


@pytest.mark.parametrize(("bits", "range_"), [(8, "minmax"), (4, "mse"), (4, "percentile")])
def test_grids_of_equalized_channels_end_where_relu6_does(case, bits, range_):
    """Above 6 execution would let through what calibration clips."""
    network, calibration, _, _ = case
    louder = dataclasses.replace(network, biases={n: b + 5 for n, b in network.biases.items()})
    plan = Plan(None, bits, act_range=range_, equalize=True)
    grids = quantize_network(louder, calibration[:16], plan).activations
    ends = [float(grids[op.name].scale) * grids[op.name].highest for op in network.ops if op.relu6]
    assert max(ends) == pytest.approx(6, rel=2**-10)


def test_exceptions_to_the_bits(case):
    network, calibration, _, _ = case
    first, last = network.ops[0].name, network.ops[-1].name
    middle = network.weighted[4].name
    plan = Plan(2, 3, edge_bits=8, layer_bits={middle: 5}, value_bits={middle: 6})
    quantized = quantize_network(network, calibration[:16], plan)
    bits = {name: layer.grid.bits for name, layer in quantized.layers.items()}
    assert (bits[first], bits[last], bits[middle]) == (8, 8, 5)
    assert set(bits.values()) == {2, 5, 8}
    values = {name: grid.bits for name, grid in quantized.activations.items()}
    assert (values["pool"], values[middle]) == (8, 6) and set(values.values()) == {3, 6, 8}


@pytest.mark.parametrize("weight_bits", [2, None])
def test_scales_of_activations_are_fitted_to_what_arrives(case, weight_bits):
    """The quantized network's logits are closer, and no scale a little smaller or larger suits its numbers better."""
    network, calibration, images, expected = case
    plan = Plan(weight_bits, 2, rounding="cd", bias_correction=True, act_range="mse")
    quantized = quantize_network(network, calibration, plan)
    observed = quantize_network(network, calibration, dataclasses.replace(plan, act_range="percentile", percentile=99))
    errors = [float((predictor(one)(images) - expected).square().mean()) for one in (quantized, observed)]
    assert errors[0] < errors[1]
    exact = {}
    fake_forward(float_network(network), calibration, lambda op, y: exact.update({op.name: y}))

    def check(op, y):
        if grid := quantized.activations.get(op.name):
            grids = [dataclasses.replace(grid, scale=grid.scale * share) for share in (1.0, 0.85, 1.15)]
            error = [float((fake_quantize(y, one) - exact[op.name]).square().sum()) for one in grids]
            assert error[0] <= min(error) * 1.01  # they were chosen on a sample

    fake_forward(quantized, calibration, check)


def test_biases_are_corrected_where_only_activations_are_quantized(case):
    network, calibration, images, expected = case
    plan = Plan(None, 2, rounding="cd", bias_correction=True)
    corrected = logit_error(case, plan)
    assert corrected < logit_error(case, dataclasses.replace(plan, bias_correction=False))


def test_nothing_quantized_is_fp32(case):
    network, calibration, images, expected = case
    torch.testing.assert_close(predictor(quantize_network(network, calibration, Plan()))(images), expected)


def test_the_same_again_is_the_same(case):
    network, calibration, images, _ = case
    plan = method_plan("auto", 2, 4)
    twice = [predictor(quantize_network(network, calibration[:32], plan))(images) for _ in range(2)]
    assert torch.equal(*twice)


def test_observed_extremes_are_exact(case):
    network, calibration, _, _ = case
    seen, low, high = observe(network, calibration), {}, {}

    def do(op, inputs):
        y = run_float(network, op, inputs)
        low[op.name], high[op.name] = float(y.min()), float(y.max())
        return y

    walk(network.ops, network.normalization(calibration), do)
    assert set(seen) == set(low) and INPUT not in seen
    assert all(abs(seen[name].low - low[name]) < 1e-4 and abs(seen[name].high - high[name]) < 1e-4 for name in low)


def test_a_method_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match="'foo'; expected auto, plain"):
        method_plan("foo", 8, 8)


@pytest.mark.parametrize("weights", [8, 4, 3, 2, None])
@pytest.mark.parametrize("activations", [8, 5, 4, 3, 2, None])
def test_what_auto_does_at_which_bits(weights, activations):
    plan = method_plan("auto", weights, activations)
    few = any(bits in (2, 3) for bits in (weights, activations))
    assert (plan.rounding, plan.act_range, plan.bias_correction) == ("cd", "mse", True)
    assert plan.edge_bits == (8 if few else None)
    assert plan.equalize == (activations in (4, 3, 2))
    assert plan.tune == ((weights, activations) == (2, 2))
