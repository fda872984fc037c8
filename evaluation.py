"""Accuracy and loss of any forward function over a split, without a host synchronisation per batch; and how far the
logits of one network are from those of another."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from data import Normalization, Split, batches
from errors import UserError, reason


@dataclass(frozen=True)
class Score:
    """accuracy: percent of images whose highest logit is their label; loss: mean cross-entropy in nats."""

    accuracy: float
    loss: float
    count: int


@torch.inference_mode()
def score(
    forward: Callable[[Tensor], Tensor],
    split: Split,
    batch_size: int,
    device: torch.device | str,
    on_batch: Callable[[int], None] = lambda count: None,
) -> Score:
    """`forward`: uint8 images [B, 3, 32, 32] → logits [B, classes]. Reads the result back once, at the end.
    on_batch(images of the batch) reports progress."""
    correct, losses = [], []
    for batch in batches(split, batch_size):
        labels = batch.labels.to(device)
        logits = forward(batch.images.to(device)).float()
        correct.append((logits.argmax(1) == labels).sum())
        losses.append(F.cross_entropy(logits, labels, reduction="sum"))
        on_batch(len(labels))
    hits, loss = int(torch.stack(correct).sum()), float(torch.stack(losses).cpu().double().sum())
    return Score(100.0 * hits / len(split), loss / len(split), len(split))


def divergence(logits: Tensor, target: Tensor) -> Tensor:
    """Kullback-Leibler divergence of the predicted classes from the target's, in nats."""
    return F.kl_div(logits.log_softmax(1), target.log_softmax(1), log_target=True, reduction="batchmean")


def normalized(model: Callable[[Tensor], Tensor], normalization: Normalization) -> Callable[[Tensor], Tensor]:
    """`model` with the normalisation before it: takes uint8 images."""
    return lambda images: model(normalization(images))


def choose_device(name: str | None) -> torch.device:
    """The device named by `--device`; by default CUDA, else Apple's MPS, else the CPU.

    Turns TF32 off: what is reported as FP32 is FP32."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name.partition(":")[0] not in ("cpu", "cuda", "mps"):
        raise UserError(f"--device is {name!r}; expected cpu, cuda, cuda:1 or mps")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # for calls that use the current device implicitly
        return device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} cannot be used here ({reason(error)}); try --device cpu") from None


def device_name(device: torch.device) -> str:
    """For tables of measurements: the GPU's name, or the CPU with its threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"
