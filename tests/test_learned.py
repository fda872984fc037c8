"""The trainable network against integer execution, and LSQ's gradients against plain autograd."""

import pytest
import torch

from calibration import Plan, quantize_network
from data import Normalization
from learned import AtMost, LearnedNetwork, Quantize, latent_codes
from models import Architecture, MobileNetV2
from network import Network, fold_batch_norm
from quantization import QuantizedNetwork, predictor


def small_network(seed: int = 0) -> tuple[Network, torch.Tensor]:
    """A network of width 0.1 with batch norm that fits its 24 images of 16x16."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, 256, (24, 3, 4, 4), generator=generator, dtype=torch.uint8)
    images = coarse.repeat_interleave(4, 2).repeat_interleave(4, 3)
    torch.manual_seed(seed)
    model = MobileNetV2(Architecture(10, 0.1))
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.uniform_(module.bias, -0.3, 0.6)
    torch.nn.init.normal_(model.classifier[1].weight)
    with torch.no_grad():
        model.train()(Normalization()(images))
    return fold_batch_norm(model.eval(), Normalization()), images


def start_of(
    network: Network, images: torch.Tensor, weights: int | None, values: int | None, rounding: str = "nearest"
) -> QuantizedNetwork:
    """Ranges are min-max, so that there is something left to learn. By cd with 2 bits, zero-points lie between codes
    too."""
    plan = Plan(weights, values, rounding=rounding, bias_correction=True, act_range="minmax")
    return quantize_network(network, images, plan)


def assert_same(one: QuantizedNetwork, two: QuantizedNetwork) -> None:
    for name, layer in one.layers.items():
        other = two.layers[name]
        assert torch.equal(layer.codes, other.codes) and torch.equal(layer.bias, other.bias), name
        if layer.grid:
            assert torch.equal(layer.grid.scale, other.grid.scale), name
            assert torch.equal(layer.grid.zero_point, other.grid.zero_point), name
    assert one.activations.keys() == two.activations.keys()
    for name, grid in one.activations.items():
        other = two.activations[name]
        assert (grid.bits, grid.scale, grid.zero_point) == (other.bits, other.scale, other.zero_point), name


@pytest.mark.parametrize("rounding", ["nearest", "cd"])
@pytest.mark.parametrize(("weights", "values"), [(2, 2), (4, 8), (8, None), (None, 4)])
def test_untrained_is_its_start(weights: int | None, values: int | None, rounding: str) -> None:
    network, images = small_network()
    start = start_of(network, images, weights, values, rounding)
    assert_same(LearnedNetwork(network, start).quantized(), start)


@pytest.mark.parametrize("rounding", ["nearest", "cd"])
@pytest.mark.parametrize(("weights", "values"), [(2, 4), (4, 2), (8, 8), (3, None)])
def test_forward_is_integer_execution(weights: int, values: int | None, rounding: str) -> None:
    """With scales, biases and codes that are no longer the start's."""
    network, images = small_network()
    model = LearnedNetwork(network, start_of(network, images, weights, values, rounding))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            size = 1.0 if name.startswith("latent") else 0.05
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
        logits = model(network.normalization(images))
    exact = predictor(model.quantized())(images)
    # Both are exact but for the last bit of real products, which may move a number over a rounding boundary.
    close = ((logits - exact).abs() < 1e-3 * exact.abs().max()).all(1)
    assert close.float().mean() >= 0.75


def test_one_graph_compiles_all_of_it() -> None:
    """A number read from a tensor on the way would split it."""
    network, images = small_network()
    model = LearnedNetwork(network, start_of(network, images, 2, 4, "cd"))
    explained = torch._dynamo.explain(model)(network.normalization(images))
    assert (explained.graph_count, explained.break_reasons) == (1, [])


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_of_quantize_are_those_of_lsq(compiled: bool) -> None:
    """Oracle: the plain form with a detached rounding, differentiated by autograd."""

    def quantize(value: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return Quantize.apply(value, scale, -2, 5)

    if compiled:
        quantize = torch.compile(quantize, backend="aot_eager", dynamic=False)
    x = (3 * torch.randn(1000, generator=torch.Generator().manual_seed(0))).double()
    results = []
    for ours in (True, False):
        value, scale = x.clone().requires_grad_(True), torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
        if ours:
            y = quantize(value, scale)
        else:
            v = (value / scale).clamp(-2, 5)
            y = (v + (v.round() - v).detach()) * scale
        (y * torch.linspace(-1, 1, 1000, dtype=torch.float64)).sum().backward()
        results.append((y.detach(), value.grad, scale.grad))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_gradient_of_a_scale_keeps_its_digits_in_bfloat16() -> None:
    """Oracle: float32. Products or sums that are rounded to bfloat16 are off by a part in 2,000."""
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(8, 16, 28, 28, generator=generator).bfloat16() for _ in range(2))
    slopes = []
    for dtype in (torch.bfloat16, torch.float32):
        scale = torch.tensor(0.5, requires_grad=True)
        Quantize.apply(x.to(dtype), scale, -2, 1).backward(grad.to(dtype))
        slopes.append(float(scale.grad))
    assert slopes[0] == pytest.approx(slopes[1], rel=1e-5)


def test_gradient_of_a_weight_scale_is_the_slope() -> None:
    """The layer's output is linear in its weight scale (activations in FP32): compare with a difference."""
    network, images = small_network()
    model = LearnedNetwork(network, start_of(network, images, 4, None))
    name = "classifier/1"

    def loss() -> torch.Tensor:
        return model(network.normalization(images)).square().mean()

    loss().backward()
    slope = float(model.weight_scales[name].grad.sum())
    step = 2.0**-5  # well above float16's rounding
    with torch.no_grad():
        model.weight_scales[name] += step
        high = float(loss())
        model.weight_scales[name] -= 2 * step
        assert slope == pytest.approx((high - float(loss())) / (2 * step), rel=0.02)


def test_latent_codes_round_to_the_start_and_lie_towards_the_weight() -> None:
    network, images = small_network()
    start = start_of(network, images, 3, None)
    for name, layer in start.layers.items():
        scale, zero_point = layer.grid.shaped(layer.codes.ndim)
        codes, target = layer.codes - zero_point, network.weights[name] / scale
        latent = latent_codes(network.weights[name], layer)
        assert torch.equal(latent.round(), codes.float())
        assert ((latent - target).abs() <= (codes - target).abs() + 1e-6).all()


def test_weights_in_fp32_are_learned_in_units_of_about_a_step_of_8_bits() -> None:
    """So that one rate fits them and codes; the units are powers of two, so that untrained weights are as they were."""
    network, images = small_network()
    model = LearnedNetwork(network, start_of(network, images, None, 4))
    for name, weight in network.weights.items():
        largest = model.latent[name.replace(".", "/")].detach().abs().flatten(1).amax(1)
        assert ((largest >= 64) & (largest < 128)).all()
        assert torch.equal(model.layer(name).weight, weight)


def test_a_value_after_relu6_never_passes_six() -> None:
    network, images = small_network()
    model = LearnedNetwork(network, start_of(network, images, 4, 2))
    with torch.no_grad():
        for parameter in model.value_scales.values():
            parameter.fill_(5.0)
    quantized = model.quantized()
    for op in network.ops:
        if op.relu6:
            grid = quantized.activations[op.name]
            assert float(grid.scale) * grid.highest <= 6.01


@pytest.mark.parametrize(("x", "grad", "passes"), [(0.5, 1, 1), (0.5, -1, -1), (2.0, 1, 1), (2.0, -1, 0)])
def test_a_scale_above_its_end_finds_back(x: float, grad: int, passes: int) -> None:
    value = torch.tensor(x, requires_grad=True)
    y = AtMost.apply(value, 1.0)
    y.backward(torch.tensor(float(grad)))
    assert float(y.detach()) == min(x, 1.0) and float(value.grad) == passes
