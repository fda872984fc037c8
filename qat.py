"""Quantization-aware fine-tuning: trains a post-training quantized network further, with the FP32 network as teacher.

What is trained is learned.py's network: batch norm folded, all codes, step sizes and biases as parameters, with
straight-through gradients for rounding (LSQ: Esser et al. 2020). The loss is distillation (Hinton et al. 2015, section
2, temperature 1; for quantization: Mishra & Marr 2018): (1 - share) * cross-entropy(labels) + share * KL(teacher ||
student). One Adam rate fits all, for codes are in units of their step and scales are logarithms. Epochs, schedule,
augmentation, resuming and the choice of the best epoch are those of training.py and train.py; the result is a packed
file like test.py's.
"""

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import checkpoint as checkpoints
import training
from calibration import method_plan, prepared, quantize_network
from checkpoint import Checkpoint
from compression import load_packed, save_packed
from data import Dataset, Split, random_subset
from errors import UserError
from evaluation import divergence, score
from learned import LearnedNetwork
from network import Network, run_ops, to_device
from quantization import float_network, predictor
from subject import data_flag, folded, split_as_trained, split_of
from training import Recipe, State

IMAGES = 512  # calibration images for the initial network; fine-tuning makes more unnecessary


@dataclass(frozen=True)
class FineTuning:
    """What a run of fine-tuning works with: the FP32 network and its quantized form, the images its checkpoint was
    trained on and selected by (the latter drawn with split_seed), and the results.csv cells known in advance."""

    teacher: Network
    model: LearnedNetwork
    train: Split
    val: Split
    split_seed: int
    row: Mapping[str, Any]


def first_tuning(
    path: Path | None,
    dataset: Dataset,
    weight_bits: int | None,
    activation_bits: int | None,
    seed: int,
    device: torch.device,
) -> FineTuning:
    """Loads the checkpoint and quantizes it post-training, by the method `auto`. Bits None: FP32.

    The validation images are those that chose the checkpoint. UserError if settings and files do not match.
    """
    if not weight_bits and not activation_bits:
        raise UserError("--qat needs --weight-quant-bits or --activation-quant-bits, 2 to 8")
    if path is None:
        raise UserError("--qat needs --checkpoint: the FP32 network that it starts from and learns from")
    checkpoint = checkpoints.load(path)
    if checkpoint.classes != dataset.classes:
        raise UserError(
            f"{path} was trained on other classes ({checkpoint.dataset}) than {dataset.name} has; "
            f"{data_flag(checkpoint.dataset)}"
        )
    train, val = split_as_trained(checkpoint, dataset.train)
    teacher = folded(checkpoint, path)
    images = random_subset(train, IMAGES, seed).images
    begun = time.perf_counter()
    plan = method_plan("auto", weight_bits, activation_bits)
    plan = dataclasses.replace(plan, tune=False)  # fine-tuning does that, and more
    network, plan = prepared(teacher, images, plan)
    model = LearnedNetwork(network, quantize_network(network, images, plan))
    row = {
        "dataset": dataset.name,
        "checkpoint": path.name,
        "checkpoint_hash": checkpoints.short_hash(path),
        "width_mult": checkpoint.architecture.width_mult,
        "weight_quant_bits": weight_bits,
        "activation_quant_bits": activation_bits,
        "weight_per_channel": True,
        "seed": seed,
        "method": "qat",
        "calib_images": len(images),
        "dataset_crc32": dataset.crc32,
        "calib_seconds": time.perf_counter() - begun,
        "test_acc_fp32": score(predictor(float_network(teacher), device), dataset.test, 256, device).accuracy,
    }
    return FineTuning(to_device(teacher, device), model, train, val, split_of(checkpoint)[1], row)


def start(tuning: FineTuning, recipe: Recipe, device: torch.device) -> State:
    """The state before the first step: that of training.py, with Adam over all parameters."""
    state = training.start(tuning.model, recipe, device)
    kinds = {"fused": device.type in training.FUSED, "capturable": device.type == "cuda"}  # recording.py records it
    optimizer = torch.optim.Adam(tuning.model.parameters(), recipe.lr, **kinds)
    return dataclasses.replace(state, optimizer=optimizer)


def distillation(
    network: Network, share: float, label_smoothing: float, bf16: bool = False, compiled: bool = False
) -> training.Loss:
    """The loss of (logits, normalised images, labels) in nats, with `network`, on their device, as the teacher.

    bf16: the teacher runs in bfloat16 autocast; compiled: through torch.compile.
    """

    def answer(x: Tensor) -> Tensor:
        return run_ops(network, network.ops, x)

    teacher = torch.compile(answer, dynamic=False) if compiled else answer

    def loss(logits: Tensor, x: Tensor, labels: Tensor) -> Tensor:
        total = (1 - share) * F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
        if share:
            with torch.no_grad(), torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
                target = teacher(x).float()
            total = total + share * divergence(logits, target)
        return total

    return loss


def save(model: LearnedNetwork, tuning: FineTuning, checkpoint: Checkpoint, path: Path) -> None:
    """Writes the packed file of `model`, with what test.py --packed and a resumed run want to know."""
    info = {
        "row": tuning.row,
        "metrics": checkpoint.metrics,
        "classes": checkpoint.classes,
        "dataset": checkpoint.dataset,
    }
    save_packed(model.quantized(), path, info)


def load(path: Path) -> Checkpoint:
    """A packed file that `save` wrote, as a checkpoint without weights: its metrics. UserError if it is none."""
    network, info = load_packed(path)
    try:
        metrics = dict(info["metrics"])
    except (KeyError, TypeError):
        raise UserError(f"{path} was not written by train.py --qat; give another --save-path") from None
    return Checkpoint(network.architecture, {}, info["dataset"], tuple(info["classes"]), network.normalization, metrics)
