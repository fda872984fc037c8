"""Mixed precision: the bits of each layer and activation for a target, found on whole quantized networks.

allocation.py tells the harm of each layer and shares out bytes; here candidates are built, and their sizes and
accuracies measured. So a target holds for the file that is written, whatever the sum of harms forecast.
"""

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

from torch import Tensor
from tqdm import tqdm

import allocation
from calibration import Plan, activation_grids, observe, quantize_network
from evaluation import Score
from network import Network, value_sizes
from quantization import QuantizedNetwork, float_network

PlanOf = Callable[[dict[str, int], dict[str, int]], Plan]
Progress = Callable[[Network], AbstractContextManager[Callable[[str], None]]]  # gives a function called at each layer


@dataclass(frozen=True)
class Target:
    """What the bits are chosen for; None: not asked for. size_mb: the largest packed file, in MB of 10^6 bytes, or
    drop: the most points of accuracy below FP32; activation_bits: the mean of an activation's elements."""

    size_mb: float | None
    drop: float | None
    activation_bits: float | None

    @property
    def layers(self) -> bool:
        """Whether the bits of the layers are to be found."""
        return bool(self.size_mb) or self.drop is not None

    @property
    def values(self) -> bool:
        """Whether the bits of the activations are to be found."""
        return bool(self.activation_bits)


@dataclass(frozen=True)
class Found:
    """The plan with the bits, the network quantized by it, and what to tell about them, a sentence each."""

    plan: Plan
    network: QuantizedNetwork
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Measures:
    """How candidates are judged. size: bytes of the packed file; validate: the score on images that nothing trained;
    entropy: whether the file is entropy-coded."""

    size: Callable[[QuantizedNetwork], int]
    validate: Callable[[QuantizedNetwork], Score]
    entropy: bool


def search(
    network: Network, images: Tensor, plan_of: PlanOf, target: Target, measures: Measures, progress: Progress
) -> Found:
    """Activations first, then layers, each if the target asks for it. images: uint8 [N, 3, 32, 32], for calibration.
    plan_of(bits of layers, bits of values): the plan that these bits have when they are read from a file.

    UserError where no bits meet the target."""
    notes: tuple[str, ...] = ()
    plan = plan_of({}, {})
    if target.values:
        plan = allocation.with_value_bits(network, images, plan, target.activation_bits)
        mean = allocation.mean_bits(plan.value_bits, value_sizes(network.ops, network.weights))
        notes += (f"Activations: {mean:.2f} bits an element.",)

    values = dict(plan.value_bits)

    def build(bits: dict[str, int]) -> QuantizedNetwork:
        with progress(network) as on_layer:
            return quantize_network(network, images, plan_of(bits, values), on_layer)

    if not target.layers:
        return Found(plan_of({}, values), build({}), notes)
    with progress(network) as on_layer:
        table = allocation.sensitivities(network, images, plan, entropy=measures.entropy, on_layer=on_layer)
    if target.size_mb:
        start = float_network(network)
        if plan.activation_bits:
            start = replace(start, activations=activation_grids(network, observe(network, images), plan))
        bits, quantized = allocation.fit_size(start, table, int(target.size_mb * 1e6), build, measures.size)
    else:
        bits, quantized, told = within_drop(network, table, target.drop, build, measures)
        notes += (told,)
    notes += (f"Packed file: {measures.size(quantized)} bytes.",)
    return Found(plan_of(bits, values), quantized, notes)


def within_drop(
    network: Network, table: allocation.Table, most: float, build: allocation.Build, measures: Measures
) -> tuple[dict[str, int], QuantizedNetwork, str]:
    """(bits of every layer, the network with them, a note): the smallest found that loses at most `most` points."""
    fp32 = measures.validate(float_network(network))

    def drop(quantized: QuantizedNetwork) -> float:
        lost = fp32.accuracy - measures.validate(quantized).accuracy
        tqdm.write(f"{measures.size(quantized) / 1e6:.3f} MB: drop {lost:.2f} on validation", file=sys.stderr)
        return lost

    bits, quantized, lost = allocation.smallest_within(table, most, build, drop)
    return bits, quantized, f"Drop {lost:.2f} points on {fp32.count} validation images."


def mean_bits(quantized: QuantizedNetwork) -> tuple[float | None, float | None]:
    """(of weights, of activations), per element; None where all are FP32."""
    weights = {name: layer.codes for name, layer in quantized.layers.items()}
    layers = {name: layer.grid for name, layer in quantized.layers.items()}
    elements = {name: codes.numel() for name, codes in weights.items()}
    means = []
    for grids, sizes in ((layers, elements), (quantized.activations, value_sizes(quantized.ops, weights))):
        bits = {name: grid.bits for name, grid in grids.items() if grid}
        means.append(round(allocation.mean_bits(bits, sizes), 2) if bits else None)
    return means[0], means[1]
