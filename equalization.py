"""Gives every channel of an activation about the same range and centre without changing the FP32 function.

Activations have one grid per tensor, so a channel that uses a tenth of the tensor's range loses about three bits, and
one that is off-centre loses more. Two exact changes of the network help:

Factors (Nagel et al. 2019, "Data-Free Quantization", section 4.1; here the ranges are those of the activations, as in
SmoothQuant, Xiao et al. 2023, section 4):

    x'_c = x_c / s_c      W'[o, i] = W[o, i] * s_in[i] / s_out[o]      b'[o] = b[o] / s_out[o]      cap'_c = 6 / s_c

Activations that are added or averaged share their factors. ReLU6 commutes with the factors if its cap is scaled as
well, so the FP32 network computes the same function up to rounding. All s_c are at most 1, hence every cap' is at least
6, and a quantizer that ends at 6 or below clips before the cap does: the quantized network needs no caps. Each weight
row has its own grid, so factors on a layer's output cost nothing, and neither do factors on the input of a depthwise
layer. The columns of other layers become uneven, which costs more than it gains if their weights have fewer bits than
the activation: such activations keep their ranges.

Offsets (channel-wise shifting: Wei et al. 2023, "Outlier Suppression+", section 4.1), for the results of the linear
bottlenecks and their sums. No ReLU follows, and 1x1 convolutions without padding read them:

    x'_c = x_c - z_c      b'[o] = b[o] - z_out[o] + sum_i W[o, i] z_in[i]

A sum's offset is the sum of its operands' offsets; since one operand comes from a convolution, whose bias can absorb
any offset, every stored activation can have its own. The offset puts the channel's mean between the two middle codes:
2^b levels lie evenly around it. (With a code at the mean, 2 bits have three useful levels of four.)
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from network import INPUT, Network, Op, accumulated
from quantization import shares

# By bits: the step of a signed grid in the quantized network, as a share of the best step for exact numbers
# (`quantization.fitted_scale`). With more bits a step is so small that the difference does not matter.
NOISY_STEPS = {2: 0.8}
SMALLEST = 1 / 16  # an almost silent channel is not amplified further, since its noise would be as well


def even_channels(
    network: Network, samples: Mapping[str, Tensor], bits: Mapping[str, int], weight_bits: Mapping[str, int | None]
) -> Network:
    """The same function with channels of about the same range and middle.

    samples: value → [channels, n], numbers that its channels take on; bits: value → bits of its grid, stored ones only;
    weight_bits: layer → bits of its weights, None for FP32.
    """
    kept = kept_values(network.ops, bits, weight_bits)
    factors = {name: s for name, s in channel_factors(network, samples, bits).items() if name not in kept}
    scaled = {name: x / factors[name].unsqueeze(1) if name in factors else x for name, x in samples.items()}
    return shifted(scaled_by(network, factors), channel_offsets(network, scaled, bits))


# ------------------------------------------------------------------------------------------------------------- factors


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


def kept_values(ops: tuple[Op, ...], bits: Mapping[str, int], weight_bits: Mapping[str, int | None]) -> frozenset[str]:
    """The values (with all that are tied to them) that a layer reads whose columns must not become uneven."""
    group, kept = tied_values(ops), set()
    for op in ops:
        coarse = op.has_weight and not op.depthwise and (weight_bits[op.name] or 32) < bits.get(op.inputs[0], 0)
        if coarse:
            kept.add(group[op.inputs[0]])
    return frozenset(name for name, first in group.items() if first in kept)


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
    """Value → s [channels], 1/16 to 1: the best end of each channel's range, as a share of the widest channel's."""
    group = tied_values(network.ops)
    clips: dict[str, Tensor] = {}
    for op in network.ops[:-1]:  # the logits stay as they are
        if op.name in bits and op.kind != "pool":
            clip = best_clips(
                samples[op.name] if op.unsigned else centred(samples[op.name]), bits[op.name], op.unsigned
            )
            before = clips.get(group[op.name])
            clips[group[op.name]] = clip if before is None else torch.maximum(before, clip)
    factors = {name: (clip / clip.max().clamp(min=1e-8)).clamp(SMALLEST, 1) for name, clip in clips.items()}
    return {name: factors[g] for name, g in group.items() if g in factors}


def scaled_by(network: Network, factors: Mapping[str, Tensor]) -> Network:
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


# ------------------------------------------------------------------------------------------------------------- offsets


def channel_offsets(network: Network, samples: Mapping[str, Tensor], bits: Mapping[str, int]) -> dict[str, Tensor]:
    """Stored value without ReLU6 → z [channels]: its channels' means, less half a step of the value's grid."""
    offsets = {}
    for op in network.ops[:-1]:
        if op.name in bits and not op.unsigned:
            sample = samples[op.name]
            step = even_step(centred(sample), bits[op.name]) * NOISY_STEPS.get(bits[op.name], 1.0)
            offsets[op.name] = sample.mean(1) - step / 2
    return offsets


def centred(sample: Tensor) -> Tensor:
    """[channels, n] with each channel's mean taken off."""
    return sample - sample.mean(1, keepdim=True)


def even_step(sample: Tensor, bits: int, steps: int = 60) -> float:
    """The step of the grid of 2^bits levels evenly around 0, none at 0, with the least squared error over `sample`."""
    half, top = 2 ** (bits - 1), float(sample.abs().max())

    def error(step: float) -> float:
        codes = (sample / step).floor_().clamp_(-half, half - 1).add_(0.5)
        return float(codes.mul_(step).sub_(sample).square_().sum())

    return min((max(top * share, 1e-8) / (half - 0.5) for share in shares(steps)), key=error)


def shifted(network: Network, offsets: Mapping[str, Tensor]) -> Network:
    """The same function with every value x' = x - z; values without an offset keep theirs, but sums follow their sides.

    offsets: of results of convolutions without ReLU6, and of sums, which only 1x1 convolutions without padding read.
    """
    sums = accumulated(network.ops)
    biases, moved = dict(network.biases), {}
    for op in network.ops:
        before = [moved.get(name) for name in op.inputs]
        if op.has_weight:
            if before[0] is not None:
                biases[op.name] = biases[op.name] + network.weights[op.name].flatten(1) @ before[0]
            offset = offsets.get(op.name)
            if op.name in sums and op.name not in offsets:  # it absorbs whatever offset gives the sum its own
                total, other = sums[op.name].name, moved.get(sums[op.name].inputs[0])
                offset = offsets.get(total) if other is None else offsets.get(total, other) - other
            if offset is not None:
                biases[op.name] = biases[op.name] - offset
                moved[op.name] = offset
        elif op.kind == "add" and any(offset is not None for offset in before):
            moved[op.name] = sum(offset for offset in before if offset is not None)
    return replace(network, biases=biases)
