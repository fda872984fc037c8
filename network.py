"""MobileNetV2 as integer hardware sees it: batch norm folded, a flat list of operations over named values.

Folding (Jacob et al. 2018, section 3.2): W' = W * gamma / sqrt(var + eps), b' = beta - mean * gamma / sqrt(var + eps),
for each output channel. What runs over the network (FP32, observing, rounding layer by layer, integer arithmetic) is
one loop, `walk`, with a different function for "do this operation".
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from data import Normalization
from models import Architecture, MobileNetV2, skeleton

INPUT = "input"  # the name of the image among the values
Value = TypeVar("Value")


@dataclass(frozen=True)
class Op:
    """One operation; its result is the value of the same name. kind: conv, add, pool (global mean) or linear."""

    name: str
    kind: str
    inputs: tuple[str, ...]
    relu6: bool = False
    stride: int = 1
    padding: int = 0
    groups: int = 1

    @property
    def has_weight(self) -> bool:
        return self.kind in ("conv", "linear")

    @property
    def depthwise(self) -> bool:
        return self.groups > 1

    @property
    def unsigned(self) -> bool:
        """Whether the result is never negative: after ReLU6, and its mean."""
        return self.relu6 or self.kind == "pool"


@dataclass(frozen=True)
class Network:
    """ops in order; weights: name → [out, in/groups, kh, kw] or [out, in]; biases: name → [out]. All FP32.

    caps: name → [out], the caps of ReLU6, one per channel, if not 6 (equalization.py).
    """

    architecture: Architecture
    normalization: Normalization
    ops: tuple[Op, ...]
    weights: Mapping[str, Tensor]
    biases: Mapping[str, Tensor]
    caps: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def weighted(self) -> tuple[Op, ...]:
        return weighted(self.ops)


def operations(architecture: Architecture) -> tuple[Op, ...]:
    """The list of operations of an architecture; names are the parameter names of the convolutions."""
    model = skeleton(architecture)
    ops: list[Op] = []

    def add_conv(name: str, relu6: bool, source: str) -> str:
        conv = model.get_submodule(name)
        ops.append(Op(name, "conv", (source,), relu6, conv.stride[0], conv.padding[0], conv.groups))
        return name

    value = add_conv("features.0.0", True, INPUT)
    for i, block in enumerate(model.features[1:-1], 1):
        source = value
        for j in range(len(block.conv) - 2):
            value = add_conv(f"features.{i}.conv.{j}.0", True, value)
        value = add_conv(f"features.{i}.conv.{len(block.conv) - 2}", False, value)
        if block.use_res_connect:
            ops.append(Op(f"features.{i}.add", "add", (source, value)))
            value = ops[-1].name
    value = add_conv(f"features.{len(model.features) - 1}.0", True, value)
    ops.append(Op("pool", "pool", (value,)))
    ops.append(Op("classifier.1", "linear", ("pool",)))
    return tuple(ops)


def weighted(ops: Sequence[Op]) -> tuple[Op, ...]:
    return tuple(op for op in ops if op.has_weight)


def accumulated(ops: Sequence[Op]) -> dict[str, Op]:
    """Value → the sum that takes it from the accumulator: results of convolutions whose only use is that sum."""
    uses = Counter(name for op in ops for name in op.inputs)
    return {op.inputs[1]: op for op in ops if op.kind == "add" and uses[op.inputs[1]] == 1}


def fused_operations(ops: Sequence[Op]) -> tuple[Op, ...]:
    """The operations as integer hardware runs them: a sum is part of the convolution that makes one of its sides.

    A linear bottleneck whose only use is the sum stays in the accumulator, in int32; the other side is added to it
    there before the one requantization (epilogue fusion, as in CUTLASS and TensorRT). So this operand is never written
    to memory and needs no grid. The fused operation takes the sum's name; its inputs are the convolution's input and
    the other operand.
    """
    sums = accumulated(ops)
    return tuple(
        replace(op, name=sums[op.name].name, inputs=(*op.inputs, sums[op.name].inputs[0])) if op.name in sums else op
        for op in ops
        if op not in sums.values()
    )


def stored_values(ops: Sequence[Op]) -> frozenset[str]:
    """Names of the values that lie in memory: all results except those that a sum takes from the accumulator."""
    return frozenset(op.name for op in fused_operations(ops))


def norm_name(conv: str) -> str:
    """The batch norm that follows a convolution: the next entry of the same Sequential."""
    parent, _, index = conv.rpartition(".")
    return f"{parent}.{int(index) + 1}"


@torch.no_grad()
def fold_batch_norm(model: MobileNetV2, normalization: Normalization) -> Network:
    """The network in FP32 without batch norm; computed in float64, so that folding adds no error of its own."""
    weights, biases = {}, {}
    ops = operations(model.architecture)
    for op in ops:
        if not op.has_weight:
            continue
        layer = model.get_submodule(op.name)
        weight = layer.weight.double()
        if op.kind == "conv":
            norm = model.get_submodule(norm_name(op.name))
            gain = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
            weight = weight * gain.view(-1, 1, 1, 1)
            bias = norm.bias.double() - norm.running_mean.double() * gain
        else:
            bias = layer.bias.double()
        weights[op.name], biases[op.name] = weight.float().contiguous(), bias.float()
    return Network(model.architecture, normalization, ops, weights, biases)


def walk(ops: Sequence[Op], first: Value, do: Callable[[Op, list[Value]], Value]) -> Value:
    """Runs the operations in order: `do(op, inputs)` makes each value. Values are dropped after their last use."""
    return resume(ops, {}, INPUT, first, do)


def resume(
    ops: Sequence[Op], values: Mapping[str, Value], name: str, value: Value, do: Callable[[Op, list[Value]], Value]
) -> Value:
    """`walk` from the middle: `ops` are the remaining operations; `values`, and `value` under the name `name`, are the
    results they need."""
    last_use = {name: i for i, op in enumerate(ops) for name in op.inputs}
    values, result = {**values, name: value}, value
    for i, op in enumerate(ops):
        result = do(op, [values[name] for name in op.inputs])
        values[op.name] = result
        for name in set(op.inputs):
            if last_use[name] == i:
                del values[name]
    return result


def apply_float(
    op: Op, inputs: Sequence[Tensor], weight: Tensor | None, bias: Tensor | None, cap: Tensor | None = None
) -> Tensor:
    """One operation in floating point on real values. cap: [out], the end of ReLU6 for each channel if not 6."""
    if op.kind == "conv":
        y = F.conv2d(inputs[0], weight, bias, op.stride, op.padding, groups=op.groups)
        return relu6(y, cap) if op.relu6 else y
    if op.kind == "linear":
        return F.linear(inputs[0], weight, bias)
    if op.kind == "pool":
        return inputs[0].mean((2, 3))
    return inputs[0] + inputs[1]


def relu6(y: Tensor, cap: Tensor | None = None) -> Tensor:
    """min(max(y, 0), 6), or `cap` [out] in the place of 6; y [N, out, h, w]; in place where no gradient needs y."""
    if cap is not None:
        return torch.minimum(y.clamp(min=0), cap.view(-1, 1, 1))
    return y.clamp(0, 6) if y.requires_grad else y.clamp_(0, 6)


def forward(network: Network, images: Tensor) -> Tensor:
    """FP32 logits [B, classes] of uint8 images [B, 3, H, W]."""
    return run_ops(network, network.ops, network.normalization(images))


def run_ops(network: Network, ops: Sequence[Op], x: Tensor) -> Tensor:
    """The value of the last of `ops` in the FP32 network, from x in place of INPUT."""
    return walk(ops, x, lambda op, inputs: run_float(network, op, inputs))


def run_float(network: Network, op: Op, inputs: Sequence[Tensor]) -> Tensor:
    """One operation of the FP32 network."""
    parameters = (getattr(network, field).get(op.name) for field in ("weights", "biases", "caps"))
    return apply_float(op, inputs, *parameters)


def to_device(network: Network, device: torch.device | str) -> Network:
    """The network on a device, 4-d weights in channels_last."""

    def move(tensor: Tensor) -> Tensor:
        layout = torch.channels_last if tensor.ndim == 4 else torch.contiguous_format
        return tensor.to(device).contiguous(memory_format=layout)

    moved = {name: {k: move(v) for k, v in getattr(network, name).items()} for name in ("weights", "biases", "caps")}
    return replace(network, **moved)


@torch.inference_mode()
def value_sizes(ops: Sequence[Op], weights: Mapping[str, Tensor], size: int = 32) -> dict[str, int]:
    """Elements of every value for one image of `size` x `size`, the image included; found by a run on shapes."""
    sizes = {INPUT: 3 * size * size}

    def do(op: Op, inputs: list[Tensor]) -> Tensor:
        weight = weights[op.name].to("meta", torch.float32) if op.has_weight else None
        y = apply_float(op, inputs, weight, None)
        sizes[op.name] = y.numel()
        return y

    walk(ops, torch.empty(1, 3, size, size, device="meta"), do)
    return sizes


def peak_bytes(ops: Sequence[Op], value_bytes: Mapping[str, float]) -> float:
    """The most bytes of values alive at once: while an operation runs, its inputs, its result and all still needed."""
    last_use = {name: i for i, op in enumerate(ops) for name in op.inputs}
    last_use[ops[-1].name] = len(ops)
    born = {INPUT: -1, **{op.name: i for i, op in enumerate(ops)}}
    return max(sum(value_bytes[name] for name in born if born[name] <= i <= last_use[name]) for i in range(len(ops)))
