"""FP32 checkpoints: weights with all that is needed to use them, loaded without unpickling code.

A checkpoint is a `.safetensors` file (header: one JSON document) or, under any other name, a `torch.save` file of plain
tensors and JSON text, read with `weights_only=True`. Both hold the architecture, the data set and its class names, the
normalisation and the metrics of the run. Writes are atomic.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data import Normalization
from errors import UserError
from files import write_atomically
from models import Architecture, MobileNetV2
from models.mobilenetv2_cifar import replace_classifier
from vision import import_torchvision

FORMAT = "mobilenetv2-cifar-checkpoint"
DEFAULT_CHECKPOINT = Path(__file__).parent / "checkpoints" / "mnv2_cifar10_fp32.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """state: torchvision's names → FP32 tensors; metrics: what the training run measured and how it was started."""

    architecture: Architecture
    state: dict[str, Tensor]
    dataset: str
    classes: tuple[str, ...]
    normalization: Normalization
    metrics: dict[str, Any]


def to_header(checkpoint: Checkpoint) -> str:
    fields = {f.name: getattr(checkpoint, f.name) for f in dataclasses.fields(checkpoint) if f.name != "state"}
    fields["architecture"] = dataclasses.asdict(checkpoint.architecture)
    fields["normalization"] = dataclasses.asdict(checkpoint.normalization)
    return json.dumps({"format": FORMAT, **fields})


def save(checkpoint: Checkpoint, path: Path) -> None:
    """Writes the checkpoint atomically; the file's ending chooses the format."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.state.items()}
    header = to_header(checkpoint)
    if Path(path).suffix == ".safetensors":
        from safetensors.torch import save_file

        write_atomically(path, lambda temporary: save_file(state, temporary, {"checkpoint": header}))
    else:
        write_atomically(path, lambda temporary: torch.save({"checkpoint": header, "state": state}, temporary))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], str | None]:
    """(tensors, header or None) of a weight file in either format; UserError where it is no such file."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist; give --checkpoint a file that train.py wrote")
    try:
        if path.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(path, "pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}, (file.metadata() or {}).get("checkpoint")  # noqa: SIM118
        content = torch.load(path, map_location="cpu", weights_only=True)
        if isinstance(content, dict) and "state" in content and "checkpoint" in content:
            return content["state"], content["checkpoint"]
        return dict(content), None
    except Exception as error:  # the readers raise many kinds; for the user they mean one thing
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise UserError(
            f"{path} is not a checkpoint that can be read safely ({reason}); give one that train.py wrote"
        ) from None


def load(path: Path) -> Checkpoint:
    """The checkpoint in `path`; UserError that says what does not fit."""
    state, header = read_tensors(path)
    try:
        fields = json.loads(header or "")
        if fields.pop("format") != FORMAT:
            raise ValueError
        architecture = Architecture(**fields.pop("architecture"))
        normal = fields.pop("normalization")
        normalization = Normalization(tuple(normal["mean"]), normal["std"])
        checkpoint = Checkpoint(
            architecture, state, classes=tuple(fields.pop("classes")), normalization=normalization, **fields
        )
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{path} is not a checkpoint of this project (no header); give one that train.py wrote"
        ) from None
    if len(checkpoint.classes) != architecture.num_classes:
        raise UserError(
            f"{path} names {len(checkpoint.classes)} classes for {architecture.num_classes} outputs; it is damaged"
        )
    build_model(checkpoint, path)
    return checkpoint


def build_model(checkpoint: Checkpoint, path: Path | str = "the checkpoint") -> MobileNetV2:
    """The FP32 network in evaluation mode, channels_last."""
    model = MobileNetV2(checkpoint.architecture)
    load_state(model, checkpoint.state, path)
    return model.eval().to(memory_format=torch.channels_last)


def load_state(model: MobileNetV2, state: dict[str, Tensor], path: Path | str) -> None:
    """Loads `state` strictly; UserError that names the first missing, surplus or misshapen tensor."""
    expected = model.state_dict()
    problems = [f"{name} is missing" for name in expected if name not in state]
    problems += [f"{name} is not a tensor of this network" for name in state if name not in expected]
    problems += [
        f"{name} has shape {list(state[name].shape)}, expected {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise UserError(f"{path} does not fit {model.architecture}: {problems[0]}{more}")
    model.load_state_dict(state)


def pretrained_state(model: MobileNetV2) -> dict[str, Tensor]:
    """ImageNet weights (torchvision's IMAGENET1K_V2) for `model`, with the classifier of `model`; width 1.0 only."""
    if model.architecture.width_mult != 1.0:
        raise UserError(f"--pretrained has weights for --width-mult 1.0 only, not {model.architecture.width_mult}")
    weights = import_torchvision("torchvision.models").MobileNet_V2_Weights.IMAGENET1K_V2
    path = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rsplit("/", 1)[-1]
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(
                weights.url, str(path), hash_prefix=path.stem.rsplit("-", 1)[-1], progress=False
            )
        except Exception as error:  # URLError, HTTPError, OSError, RuntimeError for a wrong hash
            reason = getattr(error, "reason", None) or error
            raise UserError(
                f"--pretrained cannot download ImageNet weights ({reason}); put {weights.url} at {path}"
            ) from None
    return replace_classifier(read_tensors(path)[0], model)


def short_hash(path: Path) -> str:
    """The first 8 hex digits of the file's SHA-256: the checkpoint's name in tables and groups."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:8]
