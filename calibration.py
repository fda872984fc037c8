"""Post-training quantization of a whole network: observe activations, choose grids, round the layers in order.

`quantize_network` takes FP32 `Network`, training images and a `Plan`, and returns a `QuantizedNetwork`. The plain
method (min-max weights rounded to nearest) needs one look at the activations. The others walk the network once with two
streams, FP32 values and quantized values, so that each layer is rounded for the inputs it will actually see, and the
scale of an activation of 2 bits suits the numbers that will actually arrive.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

import equalization
import rounding
from network import Network, Op, apply_float, relu6, run_float, stored_values, walk
from quantization import (
    CACHE_IMAGES,
    Grid,
    Layer,
    Observation,
    QuantizedNetwork,
    activation_grid,
    fake_quantize,
    fitted_scale,
    float_network,
    quantize_layer,
    round_bias,
    weight_grid,
)
from reconstruction import Reconstruction, count_held_out, reconstruct, tune

POSITIONS = 2**18  # output positions per layer used in the least squares; more take longer and change nothing
SAMPLE = 2**16  # numbers of an activation that its scale is fitted to
# Shrunken weight ranges that coordinate descent tries besides the whole one, by bits.
SHARES = {1: (0.9, 0.8, 0.7, 0.6, 0.5, 0.4), 2: (0.9, 0.8, 0.7, 0.6, 0.5, 0.4), 3: (0.9, 0.8, 0.7, 0.6), 4: (0.9, 0.8)}


@dataclass(frozen=True)
class Plan:
    """How to quantize. Bits None: FP32. edge_bits: at least so many for the first and last layer's weights and the
    classifier's input. tune: scales and biases are tuned on the FP32 network's logits, last (as `reconstruct` always
    does). layer_bits, value_bits: exceptions by name of a layer, of a value (mixed precision)."""

    weight_bits: int | None = None
    activation_bits: int | None = None
    per_channel: bool = True
    symmetric: bool = False
    weight_range: str = "minmax"
    act_range: str = "mse"
    percentile: float = 99.99
    rounding: str = "nearest"
    bias_correction: bool = False
    equalize: bool = False
    tune: bool = False
    edge_bits: int | None = None
    layer_bits: Mapping[str, int] = field(default_factory=dict)
    value_bits: Mapping[str, int] = field(default_factory=dict)
    reconstruction: Reconstruction = Reconstruction()

    def bits_of_layer(self, op: Op, ops: Sequence[Op]) -> int | None:
        return self._bits(self.weight_bits, op.name, self.layer_bits, op in (ops[0], ops[-1]))

    def bits_of_value(self, op: Op, ops: Sequence[Op]) -> int | None:
        """None for the logits, which stay FP32, and for the operand of a sum that stays in the accumulator."""
        if op == ops[-1] or op.name not in stored_values(ops):
            return None
        return self._bits(self.activation_bits, op.name, self.value_bits, op.name in ops[-1].inputs)

    def _bits(self, bits: int | None, name: str, exceptions: Mapping[str, int], edge: bool) -> int | None:
        if bits is None or name in exceptions:
            return exceptions.get(name) if bits is not None else None
        return max(bits, self.edge_bits) if edge and self.edge_bits else bits


FEW_BITS = 3  # weights or activations with at most this many: the first and last layers keep 8 bits
EVEN_BITS = 4  # activations with at most this many: channels are equalized
ROUGH_BITS = 2  # activations with at most this many: their scales are fitted to what arrives (at 3 bits a loss)
TUNE_BITS = 2  # if weights and activations both have at most this many: scales and biases are tuned
METHODS = ("plain", "nearest", "gptq", "cd", "reconstruct")


def method_plan(method: str, weight_bits: int | None, activation_bits: int | None, per_channel: bool = True) -> Plan:
    """The plan of a method at these bits. ValueError for an unknown method.

    plain: the textbook method: min-max weights rounded to nearest, min-max activations, no correction.
    auto: what won on validation images of CIFAR-10 at these bits (benchmarks/README.md): coordinate descent with
    corrected biases; 8 bits at both ends where the rest has 3 or fewer; equalization where activations have 4 or
    fewer; scales and biases tuned where both have 2. reconstruct: the same, then gradients.
    """
    if method not in ("auto", *METHODS):
        raise ValueError(f"method {method!r}; expected auto, {', '.join(METHODS)}")
    plan = Plan(weight_bits, activation_bits, per_channel)
    if method == "plain":
        return replace(plan, act_range="minmax")
    if method in ("auto", "reconstruct"):
        few = min(weight_bits or 32, activation_bits or 32) <= FEW_BITS
        even = (activation_bits or 32) <= EVEN_BITS
        tuned = method == "auto" and max(weight_bits or 32, activation_bits or 32) <= TUNE_BITS
        plan = replace(plan, bias_correction=True, edge_bits=8 if few else None, equalize=even, tune=tuned)
    return replace(plan, rounding="cd" if method == "auto" else method)


@torch.inference_mode()
def observe(network: Network, images: Tensor, sample: int = 2**15, seed: int = 0) -> dict[str, Observation]:
    """The observed range and a sample (about `sample` numbers) of each activation over `images` (uint8 [N, 3, H, W]).

    The upper end of a ReLU6 output is at most 6. Equalized channels have individual caps of 6 or more, but the
    quantized network has only its grid's upper end; with the grid ending at 6, it clips before any cap does, both in
    calibration and in execution.
    """
    generator = torch.Generator().manual_seed(seed)
    lows: dict[str, float] = {}
    highs: dict[str, float] = {}
    kept: dict[str, list[Tensor]] = {}

    def do(op: Op, inputs: list[Tensor]) -> Tensor:
        y = run_float(network, op, inputs)
        flat = y.permute(0, 2, 3, 1).reshape(-1) if y.ndim == 4 else y.reshape(-1)
        low, high = (float(v) for v in flat.aminmax())
        high = min(high, 6.0) if op.relu6 else high
        lows[op.name], highs[op.name] = min(low, lows.get(op.name, low)), max(high, highs.get(op.name, high))
        share = max(1, sample * len(y) // len(images))  # every image counts alike, also in a short last chunk
        picks = torch.randint(len(flat), (min(share, len(flat)),), generator=generator)
        kept.setdefault(op.name, []).append(flat[picks])
        return y

    for start in range(0, len(images), CACHE_IMAGES):
        walk(network.ops, network.normalization(images[start : start + CACHE_IMAGES]), do)
    return {name: Observation(lows[name], highs[name], torch.cat(kept[name])) for name in lows}


def activation_grids(network: Network, seen: Mapping[str, Observation], plan: Plan) -> dict[str, Grid]:
    """One grid for every stored value but the image (8-bit pixels) and the logits; empty where they stay FP32."""
    grids = {}
    for op in network.ops:
        bits = plan.bits_of_value(op, network.ops)
        if bits is not None:
            grids[op.name] = activation_grid(seen[op.name], bits, op.unsigned, plan.act_range, plan.percentile)
    return grids


def plain_layer(network: Network, op: Op, plan: Plan) -> Layer:
    """The layer rounded to nearest on the grid the plan asks for."""
    bits = plan.bits_of_layer(op, network.ops)
    weight, bias = network.weights[op.name], network.biases[op.name]
    if bits is None:
        return quantize_layer(weight, bias, None)
    return quantize_layer(weight, bias, weight_grid(weight, bits, plan.per_channel, plan.symmetric, plan.weight_range))


def quantize_network(
    network: Network,
    images: Tensor,
    plan: Plan,
    on_layer: Callable[[str], None] = lambda name: None,
) -> QuantizedNetwork:
    """The quantized network; `images`: uint8 [N, 3, H, W], training images. `on_layer(name)` reports progress."""
    if plan.rounding == "reconstruct" or plan.tune:
        rounding_images = images[: len(images) - count_held_out(len(images), plan.reconstruction)]
        network, plan = prepared(network, rounding_images, plan)
        if plan.rounding == "reconstruct":
            start = quantize_network(network, rounding_images, replace(plan, rounding="cd", tune=False))
            return reconstruct(network, start, images, plan.reconstruction, on_layer)
        start = quantize_network(network, rounding_images, replace(plan, tune=False), on_layer)
        return tune(network, start, images, plan.reconstruction)
    network, plan = prepared(network, images, plan)
    grids = activation_grids(network, observe(network, images), plan) if plan.activation_bits else {}
    quantized = replace(
        float_network(network),
        layers={op.name: plain_layer(network, op, plan) for op in network.weighted},
        activations=grids,
    )
    if (plan.weight_bits or plan.activation_bits) and (plan.rounding != "nearest" or plan.bias_correction):
        quantized = round_layers(network, quantized, images, plan, on_layer)
    return quantized


def prepared(network: Network, images: Tensor, plan: Plan) -> tuple[Network, Plan]:
    """(network with equalized channels, plan without that step) if the plan asks for it, else (network, plan)."""
    if plan.equalize and plan.activation_bits:
        network = equalized(network, images, plan)
    return network, replace(plan, equalize=False)


@torch.inference_mode()
def equalized(network: Network, images: Tensor, plan: Plan, most: int = 256, sample: int = 2048) -> Network:
    """The same function with channels of about equal range, estimated from `sample` numbers per channel."""
    generator = torch.Generator().manual_seed(0)
    samples: dict[str, Tensor] = {}

    def do(op: Op, inputs: list[Tensor]) -> Tensor:
        y = run_float(network, op, inputs)
        if y.ndim == 4:
            channels = y.permute(0, 2, 3, 1).reshape(-1, y.shape[1])
            picks = torch.randint(len(channels), (min(sample, len(channels)),), generator=generator)
            samples[op.name] = channels[picks].T.contiguous()
        return y

    walk(network.ops, network.normalization(images[:most]), do)
    bits = {op.name: plan.bits_of_value(op, network.ops) for op in network.ops}
    bits = {name: count for name, count in bits.items() if count}
    weight_bits = {op.name: plan.bits_of_layer(op, network.ops) for op in network.weighted}
    return equalization.even_channels(network, samples, bits, weight_bits)


@dataclass(frozen=True)
class Streams:
    """One activation over all calibration images, in chunks: in the FP32 network and in the quantized one."""

    exact: list[Tensor]
    quantized: list[Tensor]


@torch.inference_mode()
def round_layers(
    network: Network,
    start: QuantizedNetwork,
    images: Tensor,
    plan: Plan,
    on_layer: Callable[[str], None] = lambda name: None,
) -> QuantizedNetwork:
    """`start` with every layer rounded by `plan.rounding`, in order, for the quantized inputs it will see and its FP32
    results. Scales of activations of 2 bits are chosen again, for what arrives there, if the plan's ranges are those of
    least squared error."""
    layers, grids = dict(start.layers), dict(start.activations)
    generator = torch.Generator().manual_seed(0)

    def do(op: Op, inputs: list[Streams]) -> Streams:
        results, sums = [], None
        changes = op.has_weight and (plan.bias_correction or layers[op.name].grid)
        for i in range(len(inputs[0].exact)):
            exact = [s.exact[i] for s in inputs]
            if changes:
                y, part = run_observed(network, op, exact, inputs[0].quantized[i], len(images))
                sums = part if sums is None else sums + part
            else:
                y = run_float(network, op, exact)
            results.append(y)
        if changes:
            layers[op.name] = round_layer(network, op, layers[op.name], sums, plan)
        if op.has_weight:
            on_layer(op.name)
        layer, grid = layers.get(op.name), grids.get(op.name)
        real = layer.weight if layer else None
        seen = [
            apply_float(op, [s.quantized[i] for s in inputs], real, layer and layer.bias) for i in range(len(results))
        ]
        if grid and grid.bits <= ROUGH_BITS and plan.act_range == "mse":
            pairs = sampled_pairs(seen, results, SAMPLE, generator)
            grid = grids[op.name] = fitted_scale(grid, *pairs, highest=6.0 if op.relu6 else math.inf)
        return Streams(results, [fake_quantize(y, grid) if grid else y for y in seen])

    chunks = [network.normalization(images[i : i + CACHE_IMAGES]) for i in range(0, len(images), CACHE_IMAGES)]
    walk(network.ops, Streams(chunks, chunks), do)
    return replace(start, layers=layers, activations=grids)


def sampled_pairs(
    seen: Sequence[Tensor], exact: Sequence[Tensor], count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """About `count` numbers of `seen`, and those of `exact` at the same places, drawn evenly from all chunks."""
    share = min(1.0, count / sum(y.numel() for y in seen))
    ours, theirs = [], []
    for x, y in zip(seen, exact, strict=True):
        picks = torch.randint(x.numel(), (max(1, round(share * x.numel())),), generator=generator)
        ours.append(x.reshape(-1)[picks])
        theirs.append(y.reshape(-1)[picks])
    return torch.cat(ours), torch.cat(theirs)


def run_observed(
    network: Network, op: Op, exact: Sequence[Tensor], seen: Tensor, count: int
) -> tuple[Tensor, rounding.Moments]:
    """A layer of the FP32 network on its inputs of one chunk: (result, the sums that say how to round it for the inputs
    `seen`). count: how many images there are in all chunks."""
    weight, bias = network.weights[op.name], network.biases[op.name]
    y = apply_float(replace(op, relu6=False), exact, weight, None)
    take = share_of_images(op, y, count)
    sums = rounding.moments(op, seen[:take], y[:take], tuple(weight.shape[2:]))
    y = y + bias.view(-1, *(1,) * (y.ndim - 2))
    return relu6(y, network.caps.get(op.name)) if op.relu6 else y, sums


def share_of_images(op: Op, y: Tensor, count: int) -> int:
    """How many images of a chunk's result y to use; depthwise layers (k = 9) need the fewest places."""
    places = y[0, 0].numel() if y.ndim == 4 else 1
    enough = (POSITIONS // 4 if op.depthwise else POSITIONS) / (places * count)
    return max(1, min(len(y), math.ceil(len(y) * enough)))


def round_layer(network: Network, op: Op, layer: Layer, sums: rounding.Moments, plan: Plan) -> Layer:
    """One layer's codes by the plan's method, and its bias, corrected where the plan says so."""
    codes, grid, weight, bias = layer.codes, layer.grid, network.weights[op.name], network.biases[op.name]
    if grid and plan.rounding != "nearest":
        codes, grid = rounding.round_weight(
            weight, sums, grid, plan.rounding, plan.bias_correction, plan.symmetric, SHARES.get(grid.bits, ())
        )
    result = Layer(codes, grid, layer.bias)
    if plan.bias_correction:
        bias = bias + rounding.bias_correction(result.weight, sums)
        result = replace(result, bias=round_bias(bias) if grid else bias)
    return result
