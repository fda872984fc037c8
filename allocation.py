"""Mixed precision: the bits of each layer or activation that do the least harm within a byte budget.

1. Sensitivity: each layer is quantized alone, at every width, by the plan's own method; its harm is the divergence
   KL(FP32 || quantized) of the network's outputs, over images that its rounding did not see (HAWQ-V2, Dong et al. 2020,
   uses the trace of the Hessian instead; measuring directly costs only a run from that layer to the end).
2. Allocation: one bit width per layer with the least total harm and no more bytes than the budget. This is the
   multiple-choice knapsack problem (Kellerer, Pferschy & Pisinger 2004, chapter 11), solved exactly by dynamic
   programming with bounds.
3. The sum of harms is only a forecast: guaranteed sizes and drops are measured on the whole quantized network.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

import compression
import rounding
from calibration import Plan, observe, plain_layer, prepared, round_layer, run_observed
from errors import UserError
from evaluation import divergence
from network import (
    INPUT,
    Network,
    Op,
    apply_float,
    resume,
    run_float,
    stored_values,
    value_sizes,
    walk,
)
from packing import packed_bytes
from quantization import (
    CACHE_IMAGES,
    Layer,
    QuantizedNetwork,
    activation_grid,
    fake_quantize,
    with_layers,
)

CHOICES = (1, 2, 3, 4, 5, 6, 8)
MEASURED = 128  # images that harms are measured on
Variant = Callable[[Sequence[Tensor]], Tensor]  # inputs of an operation → its perturbed result


@dataclass(frozen=True)
class Trial:
    """One layer (or value: layer is None) at one width: what it costs, and what it does to the outputs, in nats."""

    harm: float
    bytes: int
    layer: Layer | None = None


Table = Mapping[str, Mapping[int, Trial]]  # name of a layer or value → bits → trial


# --------------------------------------------------------------------------------------------------------- sensitivity


@torch.inference_mode()
def sensitivities(
    network: Network,
    images: Tensor,
    plan: Plan,
    choices: Sequence[int] = CHOICES,
    entropy: bool = False,
    on_layer: Callable[[str], None] = lambda name: None,
) -> dict[str, dict[int, Trial]]:
    """Every layer at every width, alone, by the plan's method. images: uint8 [N, 3, H, W], training images: the last
    few (MEASURED, a quarter at most) measure the harm, the others round. entropy: bytes are counted after coding.
    on_layer(name) tells progress. UserError with a single image: rounding and measuring need different ones."""
    rounding_images, measuring = parts(images)
    choices = [bits for bits in choices if bits > 1 or not plan.symmetric]  # one bit has no middle code
    network, plan = prepared(network, rounding_images, plan)
    sums = layer_moments(network, rounding_images)
    layers: dict[str, dict[int, Layer]] = {}
    for op in network.weighted:
        moments = sums.pop(op.name)
        layers[op.name] = {bits: alone(network, op, moments, plan, bits) for bits in choices}
        on_layer(op.name)

    def variants(op: Op) -> dict[int, Variant]:
        return {bits: ran_with(op, layer, network.caps.get(op.name)) for bits, layer in layers.get(op.name, {}).items()}

    harms = output_harms(network, measuring, variants)
    return {
        op.name: {
            bits: Trial(harms[op.name][bits], layer_bytes(op, layer, entropy), layer)
            for bits, layer in layers[op.name].items()
        }
        for op in network.weighted
    }


@torch.inference_mode()
def value_sensitivities(
    network: Network, images: Tensor, plan: Plan, choices: Sequence[int] = CHOICES[1:]
) -> dict[str, dict[int, Trial]]:
    """Every stored value but the image and the logits, alone, on the plan's kind of grid; bytes: of one image. images
    and errors as in `sensitivities`: the last few measure, the others give the ranges."""
    range_images, measuring = parts(images)
    network, plan = prepared(network, range_images, plan)
    seen, stored = observe(network, range_images), stored_values(network.ops)
    elements = value_sizes(network.ops, network.weights, images.shape[-1])

    def variants(op: Op) -> dict[int, Variant]:
        if op == network.ops[-1] or op.name not in stored:
            return {}
        grids = {b: activation_grid(seen[op.name], b, op.unsigned, plan.act_range, plan.percentile) for b in choices}
        return {b: lambda inputs, g=grid: fake_quantize(run_float(network, op, inputs), g) for b, grid in grids.items()}

    harms = output_harms(network, measuring, variants)
    return {
        name: {bits: Trial(harm, packed_bytes(elements[name], bits)) for bits, harm in row.items()}
        for name, row in harms.items()
    }


def parts(images: Tensor) -> tuple[Tensor, Tensor]:
    """(images that round or give ranges, the last few, which measure the harm and were not seen before)."""
    if len(images) < 2:
        raise UserError("mixed precision needs two calibration images at least; give more with --calib-batches")
    measuring = min(MEASURED, max(1, len(images) // 4))
    return images[:-measuring], images[-measuring:]


def with_value_bits(network: Network, images: Tensor, plan: Plan, mean: float) -> Plan:
    """The plan with the bits of every stored value that do the least harm at `mean` bits an element at most."""
    table = value_sensitivities(network, images, plan)
    elements = value_sizes(network.ops, network.weights, images.shape[-1])
    return replace(plan, value_bits=allocate(table, mean * sum(elements[name] for name in table) / 8))


def layer_moments(network: Network, images: Tensor) -> dict[str, rounding.Moments]:
    """The least squares of every layer on FP32 inputs, by one run over the images: they serve all widths."""
    sums: dict[str, rounding.Moments] = {}

    def do(op: Op, inputs: list[Tensor]) -> Tensor:
        if not op.has_weight:
            return run_float(network, op, inputs)
        y, part = run_observed(network, op, inputs, inputs[0], len(images))
        sums[op.name] = sums[op.name] + part if op.name in sums else part
        return y

    for start in range(0, len(images), CACHE_IMAGES):
        walk(network.ops, network.normalization(images[start : start + CACHE_IMAGES]), do)
    return sums


def alone(network: Network, op: Op, sums: rounding.Moments, plan: Plan, bits: int) -> Layer:
    """The layer at that width, by the plan's method (coordinate descent if that method needs more than one layer)."""
    method = plan.rounding if plan.rounding in rounding.METHODS else "cd"
    plan = replace(plan, weight_bits=bits, edge_bits=None, layer_bits={}, rounding=method)
    return round_layer(network, op, plain_layer(network, op, plan), sums, plan)


def ran_with(op: Op, layer: Layer, cap: Tensor | None) -> Variant:
    return lambda inputs: apply_float(op, inputs, layer.weight, layer.bias, cap)


def output_harms(
    network: Network, images: Tensor, variants: Callable[[Op], Mapping[int, Variant]]
) -> dict[str, dict[int, float]]:
    """Mean KL(FP32 || changed) of the outputs, in nats, for every variant of every operation: the FP32 network runs
    once, and each variant from its own operation to the end."""
    made = {op.name: variants(op) for op in network.ops}
    harms = {name: dict.fromkeys(row, 0.0) for name, row in made.items() if row}

    def do(op: Op, inputs: list[Tensor]) -> Tensor:
        return run_float(network, op, inputs)

    for start in range(0, len(images), CACHE_IMAGES):
        values = {INPUT: network.normalization(images[start : start + CACHE_IMAGES])}
        exact = walk(network.ops, values[INPUT], do).double()
        for i, op in enumerate(network.ops):
            inputs, rest = [values[name] for name in op.inputs], network.ops[i + 1 :]
            needed = {name for later in rest for name in later.inputs}
            values = {name: value for name, value in values.items() if name in needed}
            for bits, variant in made[op.name].items():
                changed = resume(rest, values, op.name, variant(inputs), do).double()
                harms[op.name][bits] += float(divergence(changed, exact)) * len(exact) / len(images)
            values[op.name] = do(op, inputs)
    return harms


def layer_bytes(op: Op, layer: Layer, entropy: bool) -> int:
    """What the layer takes in the packed file: codes, scales, zero-points, bias. With entropy coding: its codes coded,
    where that is smaller; what deflating scales and biases gains is not foreseen."""
    return compression.layer_size(op, layer, compression.layer_format(layer, entropy)[0]).total_bytes


# ---------------------------------------------------------------------------------------------------------- allocation


def allocate(table: Table, budget: float) -> dict[str, int]:
    """Bits of every row of the table: the least sum of harms among all with at most `budget` bytes. Exact.

    States (bytes, harm) are extended row by row. A state is dropped if another has at most its bytes and its harm, or
    if a lower bound on the remaining rows (their linear relaxation) already exceeds the harm of a known solution.
    UserError where the budget is below the smallest choice of every row."""
    names = list(table)
    options = {name: sorted((t.bytes, t.harm, bits) for bits, t in table[name].items()) for name in names}
    smallest = sum(options[name][0][0] for name in names)
    if budget < smallest:
        raise UserError(f"a budget of {budget:.0f} bytes is below the minimum of {smallest}; give more")
    bounds = [relaxation([options[name] for name in names[i:]]) for i in range(len(names) + 1)]
    known = rounded_relaxation([options[name] for name in names], budget)
    # `known` and the bounds are sums of differences of large harms: keep states within that rounding error.
    known += 1e-9 * known + 1e-12 * sum(max(trial.harm for trial in row.values()) for row in table.values())
    costs, harms = np.zeros(1), np.zeros(1)
    history = []  # for each row: (index of the state it came from, bits)
    for name, bound in zip(names, bounds[1:], strict=True):
        sizes, added, bits = (np.array(column, float) for column in zip(*options[name], strict=True))
        new_costs, new_harms = (costs[:, None] + sizes).ravel(), (harms[:, None] + added).ravel()
        left = budget - new_costs
        least = new_harms + np.interp(left, *bound, left=np.inf)
        keep = np.flatnonzero((left >= bound[0][0]) & (least <= known))
        keep = keep[np.lexsort((new_harms[keep], new_costs[keep]))]
        before = np.concatenate([[np.inf], np.minimum.accumulate(new_harms[keep])[:-1]])
        keep = keep[new_harms[keep] < before]
        costs, harms = new_costs[keep], new_harms[keep]
        history.append((keep // len(sizes), bits[keep % len(sizes)].astype(int)))
    state, chosen = int(harms.argmin()), {}
    for name, (origin, bits) in zip(reversed(names), reversed(history), strict=True):
        chosen[name], state = int(bits[state]), origin[state]
    return {name: chosen[name] for name in names}


Options = Sequence[tuple[float, float, int]]  # (bytes, harm, bits), sorted


def hull(options: Options) -> list[tuple[float, float]]:
    """The lower convex hull of (bytes, harm), from the fewest bytes to the least harm. Of equal bytes the first has the
    least harm."""
    corners: list[tuple[float, float]] = []
    for x, y, _ in options:
        if corners and y >= corners[-1][1]:
            continue
        while len(corners) > 1 and slope(corners[-2], corners[-1]) >= slope(corners[-1], (x, y)):
            corners.pop()
        corners.append((x, y))
    return corners


def slope(a: tuple[float, float], b: tuple[float, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])


def steps_of(rows: Sequence[Options]) -> tuple[float, float, list[tuple[float, float]]]:
    """(least bytes, their harm, steps (bytes, harm) along all hulls, steepest first)."""
    hulls = [hull(options) for options in rows]
    steps = [(b[0] - a[0], b[1] - a[1]) for h in hulls for a, b in zip(h, h[1:], strict=False)]
    return sum(h[0][0] for h in hulls), sum(h[0][1] for h in hulls), sorted(steps, key=lambda s: s[1] / s[0])


def relaxation(rows: Sequence[Options]) -> tuple[np.ndarray, np.ndarray]:
    """(bytes, harm): corners of the least harm that a mix of neighbouring choices reaches, as a function of bytes."""
    cost, harm, steps = steps_of(rows)
    corners = np.array([(cost, harm), *steps]).cumsum(0)
    return corners[:, 0], corners[:, 1]


def rounded_relaxation(rows: Sequence[Options], budget: float) -> float:
    """The harm of a solution: the steepest steps that fit, until the first that does not."""
    cost, harm, steps = steps_of(rows)
    for more, change in steps:
        if cost + more > budget:
            break
        cost, harm = cost + more, harm + change
    return harm


# --------------------------------------------------------------------------------------------------- promises are kept


Build = Callable[[dict[str, int]], QuantizedNetwork]


def fit_size(
    start: QuantizedNetwork,
    table: Table,
    target: int,
    build: Build,
    size: Callable[[QuantizedNetwork], int],
    tries: int = 6,
) -> tuple[dict[str, int], QuantizedNetwork]:
    """The least harm whose whole file, by `size` of the network that `build` makes, takes at most `target` bytes.
    start: a network with the activations of that file, whatever its layers.

    The bytes the rows do not count (header, grids, coder's tables) are estimated by packing the table's layers without
    a new calibration; if the built network is still too large, the budget shrinks by the excess, down to the smallest
    choice. UserError where the target is out of reach."""

    def rest(bits: Mapping[str, int]) -> int:
        layers = {name: table[name][b].layer for name, b in bits.items()}
        return size(with_layers(start, layers)) - total_bytes(table, bits)

    def within(overhead: int) -> dict[str, int]:
        return allocate(table, max(target - overhead, total_bytes(table, smallest)))

    smallest = smallest_bits(table)
    overhead = rest(smallest)
    least = total_bytes(table, smallest) + overhead
    if least > target:
        raise UserError(f"--target-size-mb {target / 1e6:g} is out of reach; the smallest file takes {least / 1e6:.3f}")
    for _ in range(3):
        overhead = rest(within(overhead))
    for i in range(tries + 1):
        chosen = within(overhead) if i < tries else smallest
        built = build(chosen)
        excess = size(built) - target
        if excess <= 0:
            return chosen, built
        if chosen == smallest:
            break
        overhead += excess
    raise UserError(f"--target-size-mb {target / 1e6:g} is out of reach; give {excess / 1e6:.6f} more")


def smallest_within(
    table: Table, most_drop: float, build: Build, drop: Callable[[QuantizedNetwork], float], precision: float = 0.01
) -> tuple[dict[str, int], QuantizedNetwork, float]:
    """(bits, network, its drop): the smallest network found whose `drop` is at most `most_drop`, by bisection over
    budgets (in proportion, until they are `precision` apart). Every candidate is built and measured; drops need not be
    monotonic, so a smaller network may exist, but the one returned is within the limit. UserError if even the largest
    choice is not."""
    low, high = (float(total_bytes(table, pick)) for pick in (smallest_bits(table), largest_bits(table)))
    best: tuple[dict[str, int], QuantizedNetwork, float] | None = None
    tried: dict[tuple[int, ...], float] = {}
    while high / low > 1 + precision:
        budget = math.sqrt(low * high)
        bits = allocate(table, budget)
        if (key := tuple(bits.values())) not in tried:
            network = build(bits)
            tried[key] = drop(network)
            if tried[key] <= most_drop:
                best = bits, network, tried[key]
        low, high = (low, budget) if tried[key] <= most_drop else (budget, high)
    if best is None:
        bits = largest_bits(table)
        network = build(bits)
        if (lost := drop(network)) > most_drop:
            raise UserError(
                f"--max-drop {most_drop:g} is out of reach: with the most bits the drop is {lost:.2f} on the "
                "validation images"
            )
        best = bits, network, lost
    return best


def smallest_bits(table: Table) -> dict[str, int]:
    return {name: min(row, key=lambda bits: row[bits].bytes) for name, row in table.items()}


def largest_bits(table: Table) -> dict[str, int]:
    return {name: max(row, key=lambda bits: row[bits].bytes) for name, row in table.items()}


def total_bytes(table: Table, bits: Mapping[str, int]) -> int:
    return sum(table[name][b].bytes for name, b in bits.items())


def mean_bits(bits: Mapping[str, int], elements: Mapping[str, int]) -> float:
    """Bits an element, over the rows of `bits`."""
    return sum(elements[name] * b for name, b in bits.items()) / sum(elements[name] for name in bits)
