"""Uniform quantization from scratch: grids, codes, range finding, and a network that runs on integer codes.

A grid is (bits, scale, zero-point): code q in 0 .. 2^bits - 1 stands for the real number scale * (q - zero_point)
(Jacob et al. 2018, equation 1). A weight's zero-point may lie halfway between two codes: where there are only two or
four levels, an exact 0 among them is often a level badly spent. Weights have one grid per output channel or one per
tensor, activations one per tensor. Choosing a grid (`weight_grid`, `activation_grid`) is separate from applying it
(`quantize`, `dequantize`).

`integer_forward` runs a quantized network on the codes themselves, held in float32: sums of products of integers are
exact there below 2^24, so with both weights and activations quantized the result is that of int32 hardware, to the last
code, whatever the batch size or device. (A layer whose sums may exceed that, as in wide networks at 8 bits, runs in
float64, which is exact below 2^53; so does the stem on CUDA, see `transformed`. No trained network comes near int32's
limit of 2^31.) Scales and biases are rounded to float16 when a grid is made, before anything is evaluated: what is
evaluated is what is packed. No quantization API of torch is used.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from data import Normalization
from errors import UserError
from models import Architecture
from network import INPUT, Network, Op, walk

HALF_MAX = 65504.0  # the largest float16
SMALLEST_SCALE = 2.0**-14  # the smallest normal float16; a channel that would need a smaller scale uses fewer levels
# On a CPU, images are processed in chunks whose activations fit the cache: two to four times as fast as 256 at once.
CACHE_IMAGES = 32
EXACT = 2**24  # float32 represents every integer below this
BIAS_FRACTION_BITS = 16  # of one unit of the sums, at most: as many as float32 has room for in most layers
WEIGHT_RANGES = ("minmax", "mse")
ACTIVATION_RANGES = ("minmax", "percentile", "mse")


@dataclass(frozen=True)
class Grid:
    """scale: float32 [] or [channels], exactly representable in float16; zero_point: float32, same shape, a code or (of
    weights) halfway between two."""

    bits: int
    scale: Tensor
    zero_point: Tensor

    @property
    def highest(self) -> int:
        return 2**self.bits - 1

    @property
    def parts(self) -> int:
        """Parts of a step of which every level is a whole number: 2 if a zero-point lies between two codes, else 1."""
        return 1 if aside(self.zero_point) is None else 2

    def shaped(self, ndim: int) -> tuple[Tensor, Tensor]:
        """(scale, zero_point) with trailing dimensions added, to broadcast over a tensor [channels, ...] of `ndim`."""
        shape = (-1,) + (1,) * (ndim - 1) if self.scale.ndim else ()
        return self.scale.reshape(shape), self.zero_point.reshape(shape)


def make_grid(bits: int, low: Tensor, high: Tensor, symmetric: bool = False) -> Grid:
    """The grid over [low, high] (widened to hold 0, which padding and ReLU need exactly), shapes [] or [channels].

    Symmetric: the zero-point is the middle code 2^(bits-1) and the scale is max(|low|, |high|) / (2^(bits-1) - 1).
    UserError for a range whose scale float16 cannot hold; ValueError for one bit, which has no middle code, where
    symmetric.
    """
    if symmetric and bits < 2:
        raise ValueError("one bit has no middle code for a symmetric grid")
    low, high = low.clamp(max=0), high.clamp(min=0)
    highest = 2**bits - 1
    if symmetric:
        middle = 2 ** (bits - 1)
        scale = round_scale(within_half(torch.maximum(-low, high) / (middle - 1), "scale"))
        return Grid(bits, scale, torch.full_like(scale, middle))
    scale = round_scale(within_half((high - low) / highest, "scale"))
    return Grid(bits, scale, (-low / scale).round().clamp(0, highest))


def round_scale(scale: Tensor) -> Tensor:
    """To the nearest float16 number that is normal, as float32: this is the scale that the packed file holds."""
    return scale.clamp(SMALLEST_SCALE, HALF_MAX).half().float()


def round_bias(bias: Tensor) -> Tensor:
    """To the nearest float16 numbers, as float32: these are the biases that the packed file holds."""
    return within_half(bias, "bias").half().float()


def within_half(numbers: Tensor, what: str) -> Tensor:
    """`numbers`; UserError if one of them exceeds float16's range, as when weights or norms have grown without
    bound."""
    largest = float(numbers.abs().max())
    if not largest < HALF_MAX + 8:  # what rounds to HALF_MAX; NaN is not below it either
        raise UserError(
            f"a {what} of {largest:.3g} does not fit in float16 (at most {HALF_MAX:g}): weights or norms of the "
            "checkpoint are too large; train it again with a lower --lr or more --weight-decay"
        )
    return numbers


def aside(zero_point: Tensor) -> Tensor | None:
    """How far the levels q - zero_point lie beside the whole numbers, 0 or 1/2 each; None where all are whole."""
    part = zero_point % 1
    return part if part.any() else None


def nearest_level(x: Tensor, beside: Tensor | None) -> Tensor:
    """x, in steps of a grid, moved to the nearest whole number, or the nearest one that lies `beside` (`aside`) it."""
    return x.round() if beside is None else (x + beside).round() - beside


def quantize(x: Tensor, grid: Grid) -> Tensor:
    """Codes, uint8, of x's shape: the nearest grid point, ties to even, clipped to the grid's ends."""
    scale, zero_point = grid.shaped(x.ndim)
    return (nearest_level(x / scale, aside(zero_point)) + zero_point).clamp(0, grid.highest).to(torch.uint8)


def dequantize(codes: Tensor, grid: Grid) -> Tensor:
    """Real numbers, float32, of the codes' shape."""
    scale, zero_point = grid.shaped(codes.ndim)
    return (codes.float() - zero_point) * scale


def fake_quantize(x: Tensor, grid: Grid) -> Tensor:
    """x moved to the grid: `dequantize(quantize(x))` without the detour over integers."""
    scale, zero_point = grid.shaped(x.ndim)
    return nearest_level(x / scale, aside(zero_point)).clamp(-zero_point, grid.highest - zero_point) * scale


# ------------------------------------------------------------------------------------------------- choosing the grids


def weight_grid(
    weight: Tensor,
    bits: int,
    per_channel: bool = True,
    symmetric: bool = False,
    range_: str = "minmax",
    steps: int = 80,
) -> Grid:
    """The grid of a weight [out, ...]; scale and zero-point of shape [out], or [] where not `per_channel`.

    minmax: the whole range. mse: of `steps` shrunken ranges (down to a fifth) the one with the least squared error; the
    whole range is among them, so it is never worse than minmax in squared error.
    """
    rows = weight.flatten(1) if per_channel else weight.reshape(1, -1)
    low, high = rows.amin(1), rows.amax(1)
    if range_ == "minmax":
        grid = make_grid(bits, low, high, symmetric)
    elif range_ == "mse":
        candidates = [make_grid(bits, low * share, high * share, symmetric) for share in shares(steps)]
        errors = torch.stack([(fake_quantize(rows, g) - rows).square().sum(1) for g in candidates])
        best = errors.argmin(0)
        grid = Grid(bits, *(pick(candidates, name, best) for name in ("scale", "zero_point")))
    else:
        raise ValueError(range_)
    return grid if per_channel else Grid(bits, grid.scale[0], grid.zero_point[0])


def shares(steps: int) -> list[float]:
    return [1 - 0.8 * i / steps for i in range(steps)]


def pick(candidates: Sequence[Grid], name: str, best: Tensor) -> Tensor:
    """[channels]: the field `name` of each channel's best candidate."""
    return torch.stack([getattr(g, name) for g in candidates]).gather(0, best.unsqueeze(0)).squeeze(0)


@dataclass(frozen=True)
class Observation:
    """What calibration saw of one value: exact extremes, and a random sample [n] of its numbers."""

    low: float
    high: float
    sample: Tensor


def activation_grid(
    seen: Observation, bits: int, unsigned: bool, range_: str = "mse", percentile: float = 99.99, steps: int = 80
) -> Grid:
    """The per-tensor grid of a value. Unsigned values (after ReLU6) have zero-point 0, others an asymmetric grid.

    minmax: the whole observed range. percentile: the sample's percentiles 100 - p and p (p = 99 keeps the middle 98 %),
    within the observed range. mse: the range of least squared error over the sample, found by shrinking both ends in
    turn.
    """
    low, high = (0.0 if unsigned else min(seen.low, 0.0)), max(seen.high, 0.0)
    if range_ == "percentile":
        tail = (100 - percentile) / 100
        ends = torch.quantile(seen.sample, torch.tensor([tail, 1 - tail], dtype=seen.sample.dtype))
        low, high = min(max(low, float(ends[0])), 0.0), max(min(high, float(ends[1])), 0.0)
    elif range_ == "mse":
        low, high = least_squares_range(seen.sample, bits, low, high, steps)
    elif range_ != "minmax":
        raise ValueError(range_)
    return make_grid(bits, torch.tensor(low), torch.tensor(high))


def least_squares_range(sample: Tensor, bits: int, low: float, high: float, steps: int) -> tuple[float, float]:
    """Ends of the grid with the least squared error over `sample`, by coordinate descent from both ends."""

    def error(ends: tuple[float, float]) -> float:
        grid = make_grid(bits, torch.tensor(ends[0]), torch.tensor(ends[1]))
        return float((fake_quantize(sample, grid) - sample).square().sum())

    best = min(((low * share, high * share) for share in shares(steps)), key=error)
    if low < 0:
        for _ in range(2):
            best = min(((low * share, best[1]) for share in [*shares(steps // 2), best[0] / low]), key=error)
            if high > 0:
                best = min(((best[0], high * share) for share in [*shares(steps // 2), best[1] / high]), key=error)
    return best


def fitted_scale(grid: Grid, seen: Tensor, exact: Tensor, highest: float, steps: int = 90) -> Grid:
    """The grid with the scale that brings its values of `seen` closest to `exact`, in squared error.

    seen, exact: [n], what a value is in the quantized network before it is moved to its grid, and in the FP32 network;
    highest: where the grid must end at the latest. With few bits the best scale is well below that of the exact numbers
    alone, 0.8 times at 2 bits: the farther out a number that carries the errors of earlier layers is, the more of it is
    error. (For the same reason the best linear estimate from a noisy number shrinks it.)
    """
    scales = round_scale(grid.scale * torch.linspace(0.4, 1.3, steps + 1))
    scales = [scale for scale in scales if float(scale) * (grid.highest - int(grid.zero_point)) <= highest]
    grids = [replace(grid, scale=scale) for scale in [grid.scale, *scales]]
    return min(grids, key=lambda one: float((fake_quantize(seen, one) - exact).square().sum()))


# ---------------------------------------------------------------------------------------------- the quantized network


@dataclass(frozen=True)
class Layer:
    """codes: uint8, the weight's shape, with its grid; or the FP32 weight itself where grid is None. bias: [out].

    A quantized layer's bias is exactly representable in float16.
    """

    codes: Tensor
    grid: Grid | None
    bias: Tensor

    @property
    def weight(self) -> Tensor:
        """The real weight, float32."""
        return self.codes if self.grid is None else dequantize(self.codes, self.grid)


@dataclass(frozen=True)
class QuantizedNetwork:
    """layers: name → Layer; activations: name of a value → its grid, empty where activations stay FP32.

    bias_fraction_bits: biases are added to the integer sums in units of 2^-k, k up to this (see `prepare`)."""

    architecture: Architecture
    normalization: Normalization
    ops: tuple[Op, ...]
    layers: Mapping[str, Layer]
    activations: Mapping[str, Grid]
    bias_fraction_bits: int = BIAS_FRACTION_BITS


def quantize_layer(weight: Tensor, bias: Tensor, grid: Grid | None) -> Layer:
    """Rounds a weight to the nearest codes of its grid (None: keeps it in FP32)."""
    return Layer(weight, None, bias) if grid is None else Layer(quantize(weight, grid), grid, round_bias(bias))


def float_network(network: Network) -> QuantizedNetwork:
    """The FP32 network in the form of a quantized one with nothing quantized."""
    layers = {op.name: Layer(network.weights[op.name], None, network.biases[op.name]) for op in network.weighted}
    return QuantizedNetwork(network.architecture, network.normalization, network.ops, layers, {})


def with_layers(network: QuantizedNetwork, changes: Mapping[str, Layer]) -> QuantizedNetwork:
    return replace(network, layers={**network.layers, **changes})


@dataclass(frozen=True)
class Step:
    """One prepared operation on values u that represent scale * u. weight, bias: integers, or real numbers if not
    quantized.

    multiplier: [1, out, 1, 1] or [1, out] or a number per input; low, high: the output's ends, None for no grid.
    largest: a bound on every partial sum, where they are sums of integers; from EXACT up weight and bias are float64.
    """

    op: Op
    weight: Tensor | None = None
    bias: Tensor | None = None
    multiplier: Tensor | tuple[float, ...] | None = None
    low: float | None = None
    high: float | None = None
    largest: float = 0.0


def prepare(network: QuantizedNetwork, device: torch.device | str = "cpu") -> list[Step]:
    """The steps of `integer_forward`, computed once per network: integer weights, int32 biases, requantization factors.

    A quantized value u is q - zero_point, an integer; an FP32 value is itself with scale 1.

    Sums and bias are both in units of 2^-k of the product of the scales (hardware shifts the sum to the left by k). At
    few bits that product is as large as the output's step, and a bias rounded to whole multiples of it would undo the
    bias correction: 13 points of accuracy at 2-bit weights and activations.
    """
    scales = {INPUT: 1.0 / network.normalization.std}
    highest = {INPUT: largest_pixel(network.normalization)}  # of the integers that a value holds
    steps = []
    for op in network.ops:
        grid = network.activations.get(op.name)
        out = float(grid.scale) if grid else 1.0
        scales[op.name] = out
        ends = (-float(grid.zero_point), float(grid.highest - grid.zero_point)) if grid else (None, None)
        if grid:
            highest[op.name] = max(-ends[0], ends[1])
        inputs = [scales[name] for name in op.inputs]
        if not op.has_weight:
            steps.append(Step(op, multiplier=tuple(s / out for s in inputs), low=ends[0], high=ends[1]))
            continue
        layer = network.layers[op.name]
        weight, bias, factor, largest = layer.weight.double(), layer.bias.double(), None, 0.0
        integer = bool(network.activations)
        if integer:
            layer_scale = layer.grid.scale.double() / layer.grid.parts if layer.grid else torch.ones(()).double()
            layer_scale = layer_scale.expand(len(bias))
            weight = weight / layer_scale.view(-1, *(1,) * (weight.ndim - 1))
            bias = bias / (layer_scale * inputs[0])
            if layer.grid:  # exact integers
                weight = weight.round()
                most = highest.get(op.inputs[0], 0.0)  # 0: real numbers
                sums = largest_sum(weight, bias, most)
                shift = fraction_factor(sums, network.bias_fraction_bits)
                weight, bias, layer_scale = weight * shift, (bias * shift).round(), layer_scale / shift
                largest = float(sums * shift)
            factor = (layer_scale * inputs[0] / out).float().view(1, -1, *(1,) * (weight.ndim - 2)).to(device)
        else:
            weight = weight * inputs[0]
        layout = torch.channels_last if weight.ndim == 4 else torch.contiguous_format
        kind = torch.float32 if largest < EXACT and not transformed(op, weight, device) else torch.float64
        if kind == torch.float64 and torch.device(device).type == "mps":
            raise UserError(f"the sums of {op.name} need float64, which Apple's MPS does not have; give --device cpu")
        weight = weight.to(device, kind).contiguous(memory_format=layout)
        steps.append(Step(op, weight, bias.to(device, kind), factor, *ends, largest))
    return steps


def largest_sum(codes: Tensor, bias: Tensor, end: float) -> Tensor:
    """A bound, [], on every partial sum of a layer: integers `codes` [out, ...] times inputs up to `end`, and `bias`
    [out] in units of the sums."""
    return (codes.abs().flatten(1).sum(1) * end + bias.abs()).max()


def fraction_factor(largest: Tensor, most: int) -> Tensor:
    """2^k, [], with the largest k from 0 to `most` such that sums bounded by `largest`, shifted by k bits, are exact in
    float32 (k = 0 where they are not exact as they are)."""
    return torch.exp2(((EXACT / (largest + 1)).log2().ceil() - 1).clamp(0, most))


def largest_pixel(normalization: Normalization) -> float:
    """The largest integer of an image with the mean subtracted."""
    return float(max(255 - min(normalization.mean), max(normalization.mean)))


def transformed(op: Op, weight: Tensor, device: torch.device | str) -> bool:
    """Whether cuDNN might run the layer with a Winograd or FFT algorithm, whose float32 integer sums are not exact
    (with 4x4 tiles, four in five of the stem's outputs are off): a dense convolution with a kernel larger than 1x1.
    cuDNN has neither algorithm for float64."""
    dense = op.kind == "conv" and not op.depthwise and weight.shape[-1] > 1
    return dense and torch.device(device).type == "cuda"


def run_step(step: Step, inputs: Sequence[Tensor]) -> Tensor:
    """One operation on prepared values; modifies only tensors it created itself."""
    op = step.op
    if op.kind == "add":
        y = torch.mul(inputs[0], step.multiplier[0]).add_(torch.mul(inputs[1], step.multiplier[1]))
    elif op.kind == "pool":
        y = inputs[0].sum((2, 3)).mul_(step.multiplier[0] / (inputs[0].shape[2] * inputs[0].shape[3]))
    else:
        x = inputs[0].to(step.weight.dtype)
        if op.kind == "conv":
            y = F.conv2d(x, step.weight, step.bias, op.stride, op.padding, groups=op.groups).float()
        else:
            y = F.linear(x, step.weight, step.bias).float()
        if step.multiplier is not None:
            y.mul_(step.multiplier)
    if step.low is not None:
        return y.round_().clamp_(step.low, step.high)  # ReLU6 is in the ends: 0 and at most about 6 / scale
    return y.clamp_(0, 6) if op.relu6 else y


@torch.inference_mode()
def integer_forward(steps: Sequence[Step], normalization: Normalization, images: Tensor) -> Tensor:
    """Logits [B, classes] of uint8 images [B, 3, H, W]. The image's grid: zero-point the mean, scale 1 / std."""
    pixels = replace(normalization, std=1.0)(images)
    by_name = {step.op.name: step for step in steps}
    return walk([step.op for step in steps], pixels, lambda op, inputs: run_step(by_name[op.name], inputs))


def predictor(network: QuantizedNetwork, device: torch.device | str = "cpu") -> Callable[[Tensor], Tensor]:
    """uint8 images [B, 3, 32, 32] on the device → logits [B, classes]."""
    steps = prepare(network, device)
    part = CACHE_IMAGES if torch.device(device).type == "cpu" else None

    def predict(images: Tensor) -> Tensor:
        parts = images.split(part or len(images))
        return torch.cat([integer_forward(steps, network.normalization, p) for p in parts])

    return predict
