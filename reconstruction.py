"""Rounding and ranges with gradients, block by block, from the codes that coordinate descent found.

For every block (stem, inverted residual with its sum, last convolution and pool, classifier), in order: its inputs come
from the network quantized so far, its target is the FP32 block's output, and Adam minimises the squared error between
the two over codes, scales and biases, || f(x) - f^(x^) ||^2 / var f(x) (BRECQ: Li et al. 2021, section 3.2, without the
Fisher weights of its equation 10: the last stage sees the logits). Last, scales and biases of the whole network are
tuned in the same way on the FP32 network's logits, KL(p || p^) (Hinton et al. 2015).

Codes: AdaRound (Nagel et al. 2020, equation 21) lets each code move softly between two neighbours of the FP32 weight.
Coordinate descent's codes are often further away, and depend on each other: a soft start between neighbours loses them,
and a short run does not recover them. So each code is a latent number v that rounds to the initial code, offset towards
the FP32 weight, and is trained with straight-through gradients: training begins at exactly the initial loss, and a code
may move as far as it helps. Scales of weights and values are learned (LSQ: Esser et al. 2020; see learned.py).
Leaving numbers real at random (QDrop: Wei et al. 2022, section 4.2) showed no clear gain in a few hundred steps.

`tune` is the last stage alone, from any start.

Some of the images are held out. A stage's result is kept only if it lowers the stage's loss on those images, with the
network rounded as it will be packed; the final result only if its divergence is below the initial one.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from evaluation import divergence
from learned import LearnedNetwork, inputs_renamed, key
from network import Network, Op, run_ops
from quantization import CACHE_IMAGES, QuantizedNetwork

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Reconstruction:
    """iterations: Adam steps a block, network_iterations: over the whole network at the end, each of batch_size
    images. held_out: share of the images that accept or reject. Rates, falling to 0 by a cosine: of codes (in
    steps), of scales (in shares of themselves) and biases."""

    iterations: int = 200
    network_iterations: int = 200
    batch_size: int = 32
    held_out: float = 0.125
    code_rate: float = 0.005
    scale_rate: float = 0.003
    seed: int = 0


def reconstruct(
    network: Network,
    start: QuantizedNetwork,
    images: Tensor,
    settings: Reconstruction = Reconstruction(),
    on_layer: Callable[[str], None] = lambda name: None,
    on_stage: Callable[[str, float, float], None] = lambda name, before, after: None,
) -> QuantizedNetwork:
    """`start` with better codes, scales and biases; the same seed gives the same network.

    images: uint8 [N, 3, H, W], training images; with a single image nothing is learned (as in `tune`). Progress:
    on_layer(name) for every layer with weights, on_stage(name of its last operation, loss before, loss after) for every
    stage, on the held-out images; at the end with the name `network` and the losses of the start and the result.
    """
    if len(images) < 2:
        return start
    generator = torch.Generator().manual_seed(settings.seed)
    whole = whole_network(network, start, images, settings)
    model, held_out, loss_of_start = whole.model, whole.held_out, whole.hard_loss()
    exact = quantized = whole.inputs
    for ops in blocks(network.ops):
        target = in_chunks(lambda x, ops=ops: run_ops(network, ops, x), exact)
        stage = Stage(model, ops, quantized, target, relative_error(target), held_out, settings.iterations)
        on_stage(ops[-1].name, *improve(stage, settings, generator))
        exact, quantized = target, in_chunks(lambda x, ops=ops: model.run(ops, x), quantized)
        for op in ops:
            if op.has_weight:
                on_layer(op.name)
    _, loss = improve(whole, settings, generator)
    on_stage("network", loss_of_start, min(loss, loss_of_start))
    return model.quantized() if loss < loss_of_start else start


def tune(
    network: Network, start: QuantizedNetwork, images: Tensor, settings: Reconstruction = Reconstruction()
) -> QuantizedNetwork:
    """`start` with scales and biases tuned on the FP32 network's logits; its codes stay. Arguments: see `reconstruct`.

    With a single image none can be held out, so nothing is tuned.
    """
    if len(images) < 2:
        return start
    whole = whole_network(network, start, images, settings)
    before, after = improve(whole, settings, torch.Generator().manual_seed(settings.seed))
    return whole.model.quantized() if after < before else start


@dataclass(frozen=True)
class Stage:
    """What is improved at once: operations `ops` of the model, from the quantized network's `inputs` towards `target`,
    both [N, ...]; loss(results, targets) is a mean over images. The last `held_out` ones decide.
    with_codes: whether codes may move; with few images the logits alone do not determine them well."""

    model: LearnedNetwork
    ops: tuple[Op, ...]
    inputs: Tensor
    target: Tensor
    loss: Loss
    held_out: int
    iterations: int
    with_codes: bool = True

    @torch.no_grad()
    def hard_loss(self) -> float:
        """The loss of the network as it would be packed, over the held-out images."""
        pairs = zip(*(t[-self.held_out :].split(CACHE_IMAGES) for t in (self.inputs, self.target)), strict=True)
        return sum(float(self.loss(self.model.run(self.ops, x), t)) * len(x) for x, t in pairs) / self.held_out

    def parameters(self) -> tuple[list[Tensor], list[Tensor]]:
        """(latent codes, scales and biases) of the operations; weights in FP32 stay as they are."""
        model, names = self.model, [key(op.name) for op in self.ops]
        codes = [model.latent[name] for name in names if self.with_codes and name in model.weight_scales]
        tables = (model.weight_scales, model.value_scales, model.biases)
        return codes, [table[name] for table in tables for name in names if name in table]


def whole_network(network: Network, start: QuantizedNetwork, images: Tensor, settings: Reconstruction) -> Stage:
    """The stage of all operations, from the images to the logits."""
    model = LearnedNetwork(network, start).requires_grad_(False)
    held_out = count_held_out(len(images), settings)
    first = network.normalization(images)
    logits = in_chunks(lambda x: run_ops(network, network.ops, x), first)
    steps = settings.network_iterations
    return Stage(model, network.ops, first, logits, divergence, held_out, steps, with_codes=False)


def count_held_out(images: int, settings: Reconstruction) -> int:
    """How many images, the last ones, decide what is kept; none of a single one. They must not have rounded the start
    either: it fits the images that it was rounded on so well, at 2 bits, that nothing learned would ever beat it."""
    return max(1, round(images * settings.held_out)) if images > 1 else 0


def blocks(ops: Sequence[Op]) -> list[tuple[Op, ...]]:
    """The operations by inverted residual: by the entry of `features` in their name; the pool belongs to the last
    convolution. What a block reads from outside is INPUT."""
    names = [".".join(op.name.split(".")[:2]) for op in ops]
    names = [names[i - 1] if op.kind == "pool" else name for i, (op, name) in enumerate(zip(ops, names, strict=True))]
    groups = itertools.groupby(zip(names, ops, strict=True), key=lambda pair: pair[0])
    return [inputs_renamed([op for _, op in group]) for _, group in groups]


@torch.no_grad()
def in_chunks(do: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.cat([do(part) for part in x.split(CACHE_IMAGES)])


def relative_error(target: Tensor) -> Loss:
    """Mean squared error as a share of the target's variance."""
    variance = float(target.var()) + 1e-12
    return lambda y, t: (y - t).square().mean() / variance


def improve(stage: Stage, settings: Reconstruction, generator: torch.Generator) -> tuple[float, float]:
    """Fits the stage's parameters and keeps the result if it is better on the held-out images. (loss before, after)
    there."""
    before = {name: value.clone() for name, value in stage.model.state_dict().items()}
    first = stage.hard_loss()
    fit(stage, settings, generator)
    last = stage.hard_loss()
    if last < first:  # NaN counts as no improvement
        return first, last
    stage.model.load_state_dict(before)
    return first, first


def fit(stage: Stage, settings: Reconstruction, generator: torch.Generator) -> None:
    """Adam on the stage's parameters, over random batches of the images that are not held out."""
    count = len(stage.inputs) - stage.held_out
    codes, others = stage.parameters()
    groups = [{"params": codes, "lr": settings.code_rate}, {"params": others, "lr": settings.scale_rate}]
    optimizer = torch.optim.Adam([group for group in groups if group["params"]])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, stage.iterations))

    for parameter in codes + others:
        parameter.requires_grad_(True)
    for _ in range(stage.iterations):
        picks = torch.randint(count, (settings.batch_size,), generator=generator)
        loss = stage.loss(stage.model.run(stage.ops, stage.inputs[picks]), stage.target[picks])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    for parameter in codes + others:
        parameter.requires_grad_(False)
