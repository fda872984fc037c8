"""A quantized network with gradients: codes, step sizes and biases as parameters, for reconstruction.py and qat.py.

A forward pass computes what integer hardware will compute, except for ties that float32 breaks the other way: codes are
rounded to levels, scales to float16, biases to float16 and to the units of the integer sums. Backwards, rounding counts
as the identity (straight-through estimator: Bengio et al. 2013).

Weights: w = s * clip(round(v), low, high) with v in units of the step s, so that all weights move at the same rate
under Adam (channels of a folded network differ in scale by a factor of a hundred). dL/dv = s dL/dw, dL/ds = sum u
dL/dw. Weights that stay in FP32 are learned in units of about a step of 8 bits, for the same reason.

Activations: learned step size quantization, LSQ (Esser et al. 2020, equations 1-3): y = s * clip(round(x / s)),
with dy/ds = round(x / s) - x / s inside the range, and the bound itself outside. Scales are learned as logarithms, so
that one learning rate fits all. Zero-points stay what calibration chose.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from network import INPUT, Network, Op, apply_float, walk
from quantization import (
    Grid,
    Layer,
    QuantizedNetwork,
    fraction_factor,
    largest_pixel,
    largest_sum,
    nearest_level,
    round_bias,
    round_scale,
)

MARGIN = 0.45  # how far from its code a latent code may start, in steps; at 0.5 it would be another code


class LearnedNetwork(nn.Module):
    """The trainable form of `start`; the FP32 `network` tells on which side of its code a weight begins.

    forward: normalised images [B, 3, H, W] → logits [B, classes]. `quantized()`: the network it stands for.
    """

    def __init__(self, network: Network, start: QuantizedNetwork) -> None:
        super().__init__()
        self.start = start
        self.architecture = start.architecture  # as the FP32 network has it: train.py tells and saves it
        by_name = {op.name: op for op in start.ops}
        self.sources = {op.name: by_name.get(op.inputs[0]) for op in start.ops}  # of each first input; None: the image
        self.latent, self.biases = nn.ParameterDict(), nn.ParameterDict()
        self.weight_scales, self.value_scales = nn.ParameterDict(), nn.ParameterDict()
        self.parts = {name: layer.grid.parts for name, layer in start.layers.items() if layer.grid}
        for name, layer in start.layers.items():
            self.latent[key(name)] = latent_codes(network.weights[name], layer)
            self.biases[key(name)] = layer.bias.clone()
            if layer.grid is None:
                self.register_buffer(f"unit/{key(name)}", unit_of(layer.codes), persistent=False)
            else:
                self.weight_scales[key(name)] = layer.grid.scale.log()
                for which, end in zip(("low", "high"), code_ends(layer.grid, layer.codes.ndim), strict=True):
                    self.register_buffer(f"{which}/{key(name)}", end, persistent=False)  # moves with the parameters
        self.value_ends: dict[str, tuple[int, ...]] = {}  # numbers: tensors would split a compiled graph
        self.largest_scales: dict[str, float] = {}
        for op in start.ops:
            if grid := start.activations.get(op.name):
                self.value_scales[key(op.name)] = grid.scale.log()
                self.value_ends[op.name] = tuple(int(end) for end in code_ends(grid, 0))
                if op.relu6:  # the grid must not extend beyond ReLU6's cap, since it does the clipping
                    end = float(network.caps[op.name].max()) if op.name in network.caps else 6.0
                    self.largest_scales[op.name] = end / grid.highest

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self.start.ops, x)

    def run(self, ops: Sequence[Op], x: Tensor) -> Tensor:
        """The value of the last of `ops`, from x in place of INPUT."""
        return walk(ops, x, self.apply_op)

    def apply_op(self, op: Op, inputs: Sequence[Tensor]) -> Tensor:
        weight, bias = self.weight_and_bias(op) if op.has_weight else (None, None)
        if op.name not in self.value_ends:
            return apply_float(op, inputs, weight, bias)
        return Quantize.apply(before_relu6(op, inputs, weight, bias), self.value_scale(op), *self.value_ends[op.name])

    def weight_and_bias(self, op: Op) -> tuple[Tensor, Tensor]:
        """As real numbers. The bias is a whole multiple of the unit of the integer sums (`quantization.prepare`)."""
        bias = self.biases[key(op.name)]
        scale = self.weight_scale(op.name)
        if scale is None:
            return self.float_weight(op.name), bias
        codes = self.codes(op.name)
        weight = codes * scale.view(-1, *(1,) * (codes.ndim - 1))
        bias = straight_through(bias, bias.half().float())
        if self.start.activations:
            bias = straight_through(bias, self.on_the_sums_grid(op, codes.detach(), scale.detach(), bias.detach()))
        return weight, bias

    def on_the_sums_grid(self, op: Op, codes: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        """The bias as integer execution adds it to sums of `codes`."""
        input_scale, end = self.input_grid(op)
        parts = self.parts[op.name]
        unit = scale / parts * input_scale
        unit = unit / fraction_factor(largest_sum(codes * parts, bias / unit, end), self.start.bias_fraction_bits)
        return (bias / unit).round() * unit

    def float_weight(self, name: str) -> Tensor:
        """The weight of a layer in FP32."""
        return self.latent[key(name)] * self.get_buffer(f"unit/{key(name)}")

    def codes(self, name: str) -> Tensor:
        """The hard codes of a layer, zero-point taken off, as real numbers with straight-through gradients."""
        latent, (low, high) = self.latent[key(name)], self.code_ends(name)
        beside = -low % 1 if self.parts[name] > 1 else None
        return straight_through(latent, torch.clamp(nearest_level(latent, beside), low, high))

    def code_ends(self, name: str) -> tuple[Tensor, Tensor]:
        return self.get_buffer(f"low/{key(name)}"), self.get_buffer(f"high/{key(name)}")

    def weight_scale(self, name: str) -> Tensor | None:
        """[out] or [], as the packed file will hold it; None for a layer in FP32."""
        if self.start.layers[name].grid is None:
            return None
        scale = self.weight_scales[key(name)].exp()
        return straight_through(scale, round_scale(scale))

    def value_scale(self, op: Op) -> Tensor:
        """[], as the packed file will hold it."""
        scale = self.value_scales[key(op.name)].exp()
        if op.name in self.largest_scales:
            scale = AtMost.apply(scale, self.largest_scales[op.name])
        return straight_through(scale, round_scale(scale))

    def input_grid(self, op: Op) -> tuple[Tensor | float, float]:
        """(scale, largest integer) of a layer's input in the whole network; a block's own list calls it INPUT."""
        source = self.sources[op.name]
        if source is None:
            return 1 / self.start.normalization.std, largest_pixel(self.start.normalization)
        low, high = self.value_ends[source.name]
        return self.value_scale(source).detach(), max(-low, high)

    @torch.no_grad()
    def quantized(self) -> QuantizedNetwork:
        """The network as it would be packed now, on the CPU."""
        layers, activations = {}, {}
        for op in self.start.ops:
            if op.has_weight:
                layers[op.name] = self.layer(op.name)
            if grid := self.start.activations.get(op.name):
                activations[op.name] = replace(grid, scale=self.value_scale(op).detach().cpu())
        return replace(self.start, layers=layers, activations=activations)

    def layer(self, name: str) -> Layer:
        before, bias = self.start.layers[name], self.biases[key(name)].detach().cpu()
        if before.grid is None:
            return Layer(self.float_weight(name).detach().cpu(), None, bias)
        grid = replace(before.grid, scale=self.weight_scale(name).detach().cpu())
        _, zero_point = grid.shaped(before.codes.ndim)
        codes = self.codes(name).detach().cpu() + zero_point
        return Layer(codes.to(torch.uint8).contiguous(), grid, round_bias(bias))


def before_relu6(op: Op, inputs: Sequence[Tensor], weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """The operation without its ReLU6. What training.Float32Conv keeps in float32 under a CPU's bfloat16 autocast stays
    so here, for the same reason."""
    op = replace(op, relu6=False)
    if op.depthwise and op.stride > 1 and inputs[0].device.type == "cpu":
        with torch.autocast("cpu", enabled=False):
            return apply_float(op, [x.float() for x in inputs], weight, bias)
    return apply_float(op, inputs, weight, bias)


def key(name: str) -> str:
    """A parameter's name may hold no dot."""
    return name.replace(".", "/")


def latent_codes(weight: Tensor, layer: Layer) -> Tensor:
    """Real codes v, zero-point taken off, that round to the layer's codes and lie towards the FP32 weight; of a layer
    in FP32 the weight in its units."""
    if layer.grid is None:
        return layer.codes / unit_of(layer.codes)
    scale, zero_point = layer.grid.shaped(weight.ndim)
    codes = layer.codes.float() - zero_point
    low, high = code_ends(layer.grid, weight.ndim)
    return torch.clamp(codes + (weight / scale - codes).clamp(-MARGIN, MARGIN), low, high).contiguous()


def unit_of(weight: Tensor) -> Tensor:
    """[out, 1, ...]: for each channel the power of two next to a step of 8 bits, so that nothing is rounded."""
    largest = weight.abs().flatten(1).amax(1).clamp(min=2.0**-100).view(-1, *(1,) * (weight.ndim - 1))
    return largest / torch.frexp(largest).mantissa / 128


def code_ends(grid: Grid, ndim: int) -> tuple[Tensor, Tensor]:
    """Lowest and highest code, zero-point taken off, to broadcast over `ndim` dimensions."""
    _, zero_point = grid.shaped(ndim)
    return -zero_point, grid.highest - zero_point


class StraightThrough(torch.autograd.Function):
    """(x, y) → y, to the last bit, with the gradient of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        return y.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


straight_through = StraightThrough.apply


class AtMost(torch.autograd.Function):
    """min(x, most). Above `most`, clamp has zero gradient, so a scale that got there would stay for good; here
    gradients that lower x still pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, most: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.most = most
        return x.clamp(max=most)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return torch.where(x <= ctx.most, grad, grad.clamp(min=0)), None


class Quantize(torch.autograd.Function):
    """scale * clip(round(x / scale), low, high) with LSQ's gradients.

    It runs on every activation, so its cost is memory passes: four in the forward pass; in the backward pass one for
    the gradient of x and two sums. It saves x / scale and its own result, which the next layer saves anyway.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
        v = x / scale
        # The last operation is not in place: compiled by torch 2.11, its result would get no gradient.
        y = v.round().clamp_(low, high) * scale
        ctx.save_for_backward(v, y, scale)
        ctx.ends = low, high
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        v, y, scale = ctx.saved_tensors
        grad_x = torch.ops.aten.hardtanh_backward(grad, v, *ctx.ends)  # grad where low < v < high
        return grad_x, inner(grad, y) / scale - inner(grad_x, v), None, None


def inner(a: Tensor, b: Tensor) -> Tensor:
    """The sum of a * b, [], without a tensor of products; images [N, C, H, W] lie in channels_last."""
    flat = [t.permute(0, 2, 3, 1).flatten() if t.ndim == 4 else t.flatten() for t in (a, b)]
    if a.dtype == torch.bfloat16:  # bfloat16's dot product rounds to 8 bits and is slow on a CPU
        flat = [t.float() for t in flat]
    return torch.dot(*flat)


def inputs_renamed(ops: Sequence[Op]) -> tuple[Op, ...]:
    """The operations of a block on their own: what they read from outside is INPUT."""
    names = {op.name for op in ops}
    return tuple(replace(op, inputs=tuple(n if n in names else INPUT for n in op.inputs)) for op in ops)
