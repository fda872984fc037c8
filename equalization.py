"""Cross-layer equalization: every channel of a value gets about the same range, at no cost in the FP32 function.

Activations have one grid per tensor, so a channel that uses a tenth of the tensor's range loses three of its bits. A
factor per channel can move from a value into the weights around it (Nagel et al. 2019, "Data-Free Quantization",
section 4.1; here the ranges are those of the activations, as in SmoothQuant, Xiao et al. 2023, section 4):

    x'_c = x_c / s_c      W'[o, i] = W[o, i] * s_in[i] / s_out[o]      b'[o] = b[o] / s_out[o]      cap'_c = 6 / s_c

Values that are added, or averaged, share their factors. ReLU6 commutes with the factors when its cap moves along, so
the FP32 network computes the same function, exactly up to rounding. All s_c are at most 1, hence every cap' is at
least 6, and a quantizer that ends at 6 or below clips before the cap does: the quantized network needs no caps.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from network import INPUT, Network, Op
from quantization import shares

SMALLEST = 1 / 16  # a channel that is almost silent is not blown up further: its noise would be, too


def tied_values(ops: tuple[Op, ...]) -> dict[str, str]:
    """Value → the first value of its group: sums and means tie their inputs and their result together."""
    group: dict[str, str] = {}
    for op in ops:
        group[op.name] = op.name
        if not op.has_weight:
            merged = {group[name] for name in op.inputs}
            group = {name: op.inputs[0] if g in merged else g for name, g in group.items()}
            group[op.name] = op.inputs[0]
    return group


def best_clips(sample: Tensor, bits: int, unsigned: bool, steps: int = 24) -> Tensor:
    """[channels]: each channel's end of the range with the least squared error; sample: [channels, n]."""
    top = sample.abs().amax(1)
    levels = 2**bits - 1 if unsigned else 2 ** (bits - 1) - 1
    errors, clips = [], []
    for share in shares(steps):
        clip = (top * share).clamp(min=1e-8)
        scale = (clip / levels).unsqueeze(1)
        error = (sample / scale).round_().clamp_(0 if unsigned else -levels, levels).mul_(scale).sub_(sample)
        errors.append(error.square_().sum(1))
        clips.append(clip)
    return torch.stack(clips).gather(0, torch.stack(errors).argmin(0, keepdim=True)).squeeze(0)


def channel_factors(network: Network, samples: Mapping[str, Tensor], bits: Mapping[str, int]) -> dict[str, Tensor]:
    """Value → s [channels], 1/16 to 1; samples: value → [channels, n] of its numbers, bits: value → its grid's bits."""
    group = tied_values(network.ops)
    clips: dict[str, Tensor] = {}
    for op in network.ops[:-1]:  # the logits stay as they are
        if op.name in bits and op.kind != "pool":
            clip = best_clips(samples[op.name], bits[op.name], op.unsigned)
            before = clips.get(group[op.name])
            clips[group[op.name]] = clip if before is None else torch.maximum(before, clip)
    factors = {name: (clip / clip.max().clamp(min=1e-8)).clamp(SMALLEST, 1) for name, clip in clips.items()}
    return {name: factors[g] for name, g in group.items() if g in factors}


def equalize(network: Network, factors: Mapping[str, Tensor]) -> Network:
    """The same function with every value x' = x / s; values without a factor stay as they are."""
    weights, biases, caps = {}, {}, dict(network.caps)
    for op in network.weighted:
        weight, bias = network.weights[op.name], network.biases[op.name]
        shape = (-1,) + (1,) * (weight.ndim - 1)
        source = factors.get(op.inputs[0]) if op.inputs[0] != INPUT else None
        if source is not None:  # a depthwise weight [channels, 1, kh, kw] sees one input channel per row
            weight = weight * (source.view(shape) if op.depthwise else source.view(1, -1, *shape[2:]))
        if op.name in factors:
            weight, bias = weight / factors[op.name].view(shape), bias / factors[op.name]
            if op.relu6:
                caps[op.name] = network.caps.get(op.name, torch.tensor(6.0)) / factors[op.name]
        weights[op.name], biases[op.name] = weight, bias
    return replace(network, weights=weights, biases=biases, caps=caps)
