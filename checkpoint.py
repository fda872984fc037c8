"""FP32 checkpoints: weights with everything needed to use them, loaded without unpickling code.

A checkpoint is a `.safetensors` file (header: one JSON document) or, under any other name, a `torch.save` file of plain
tensors and JSON text, read with `weights_only=True`; reading goes by the content, not the name. Both hold the
architecture, the data set and its class names, the normalisation and the metrics of the run. Writes are atomic.
"""

import dataclasses
import hashlib
import io
import json
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data import Normalization, network_timeout
from errors import UserError, reason
from files import obstacle, write_bytes
from models import Architecture, MobileNetV2, skeleton
from models.mobilenetv2_cifar import replace_classifier
from vision import import_torchvision

FORMAT = "mobilenetv2-cifar-checkpoint"
TORCH = (b"PK", b"\x80")  # how torch.save's files begin: a zip archive, or, in old ones, a pickle
PACKED = b'{"__metadata__":{"packed":'  # how the header of a packed file (compression.py) begins
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
    """Writes the checkpoint atomically; the file name's suffix selects the format."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.state.items()}
    header = to_header(checkpoint)
    if Path(path).suffix == ".safetensors":
        import safetensors.torch

        write_bytes(path, safetensors.torch.save(state, {"checkpoint": header}))
    else:
        write_torch(path, {"checkpoint": header, "state": state})


def write_torch(path: Path, content: Any) -> None:
    """`torch.save`, atomically. Through memory, so that a full disk is an ordinary error of writing."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_bytes(path, buffer.getvalue())


def read_tensors(
    path: Path, advice: str = "give a checkpoint that train.py wrote"
) -> tuple[dict[str, Tensor], str | None]:
    """(tensors, header or None) of a weight file in either format, whatever its name; UserError with `advice` where it
    is no such file."""
    path = Path(path)
    if wrong := obstacle(path):
        raise UserError(f"{path} {wrong}; {advice}")
    with open(path, "rb") as file:
        begin = file.read(8 + len(PACKED))
        if begin[8:] == PACKED:
            raise UserError(f"{path} is a packed file; evaluate it with test.py --packed")
    try:
        if begin[8:9] == b"{":  # the header of a safetensors file, behind its length
            from safetensors import safe_open

            with safe_open(path, "pt") as file:
                state, header = {n: file.get_tensor(n) for n in file.keys()}, file.metadata() or {}  # noqa: SIM118
                header = header.get("checkpoint")
        elif begin.startswith(TORCH):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch warns about foreign files; the error below is enough
                with open(path, "rb") as file:  # given the name, torch goes by its suffix
                    content = dict(torch.load(file, map_location="cpu", weights_only=True))
            ours = content.keys() == {"checkpoint", "state"}
            state, header = (dict(content["state"]), content["checkpoint"]) if ours else (content, None)
        else:
            raise ValueError("it is neither a safetensors file nor one of torch.save")
        if not all(isinstance(tensor, Tensor) for tensor in state.values()):
            raise ValueError("it contains something other than tensors")
        return state, header
    except Exception as error:  # the readers raise many types; to the user they mean the same
        raise UserError(f"{path} is not a checkpoint that can be read safely ({reason(error)}); {advice}") from None


def load(path: Path) -> Checkpoint:
    """The checkpoint in `path`; UserError that says what does not fit."""
    state, header = read_tensors(path)
    if header is None:
        raise UserError(
            f"{path} is not a checkpoint of this project (bare weights, without class names and other metadata); "
            "only checkpoints that train.py wrote can be used"
        )
    try:
        fields = json.loads(header)
        if fields.pop("format") != FORMAT:
            raise ValueError
        checkpoint = Checkpoint(
            architecture=Architecture(**fields.pop("architecture")),
            state=state,
            classes=tuple(fields.pop("classes")),
            normalization=Normalization(**{**fields["normalization"], "mean": tuple(fields["normalization"]["mean"])}),
            **{name: fields[name] for name in ("dataset", "metrics")},
        )
        check_header(checkpoint)
        expected = skeleton(checkpoint.architecture)
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, OverflowError):
        raise UserError(
            f"{path} is not a checkpoint of this project (no header that fits); give one that train.py wrote"
        ) from None
    if len(checkpoint.classes) != checkpoint.architecture.num_classes:
        raise UserError(
            f"{path} names {len(checkpoint.classes)} classes for {checkpoint.architecture.num_classes} outputs; "
            "it is damaged, give another --checkpoint"
        )
    check_state(expected, state, path)
    if not all(tensor.isfinite().all() for tensor in state.values()):
        raise UserError(f"{path} has weights that are not finite numbers; give another --checkpoint")
    if negative := [n for n in state if n.endswith("running_var") and (state[n] < 0).any()]:
        raise UserError(f"{path} has negative variances ({negative[0]}); it is damaged, give another --checkpoint")
    return checkpoint


def check_header(checkpoint: Checkpoint) -> None:
    """ValueError or AttributeError if a field used later has the wrong type or is out of range."""
    numbers = [checkpoint.metrics.get(name) for name in ("val_size", "split_seed", "seed")]
    texts = (checkpoint.dataset, *checkpoint.classes)
    if not all(n is None or (type(n) is int and 0 <= n < 2**31) for n in numbers):
        raise ValueError("numbers out of range")
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("names that are no text")


def build_model(checkpoint: Checkpoint, path: Path | str = "the checkpoint") -> MobileNetV2:
    """The FP32 network in evaluation mode, channels_last, with a copy of the checkpoint's weights."""
    model = skeleton(checkpoint.architecture)
    check_state(model, checkpoint.state, path)
    model.load_state_dict({name: tensor.clone() for name, tensor in checkpoint.state.items()}, assign=True)
    return model.requires_grad_(True).eval().to(memory_format=torch.channels_last)


def load_state(model: MobileNetV2, state: dict[str, Tensor], path: Path | str) -> None:
    """Copies `state` into `model`; UserError where it does not fit."""
    check_state(model, state, path)
    model.load_state_dict(state)


def check_state(
    model: MobileNetV2,
    state: dict[str, Tensor],
    path: Path | str,
    advice: str = "it is damaged, give another --checkpoint",
) -> None:
    """Raises UserError naming the first missing, unexpected or misshapen tensor, and `advice`, if `state` does not fit
    `model` exactly."""
    expected = model.state_dict()
    problems = [f"{name} is missing" for name in expected if name not in state]
    problems += [f"{name} is not a tensor of this network" for name in state if name not in expected]
    problems += [
        f"{name} is {describe(state[name])}, expected {describe(tensor)}"
        for name, tensor in expected.items()
        if name in state and (state[name].shape, state[name].dtype) != (tensor.shape, tensor.dtype)
    ]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        shape = model.architecture
        raise UserError(
            f"{path} does not fit a network of width {shape.width_mult} with {shape.num_classes} classes: "
            f"{problems[0]}{more}; {advice}"
        )


def describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def pretrained_state(model: MobileNetV2) -> dict[str, Tensor]:
    """ImageNet weights (torchvision's IMAGENET1K_V2) for `model`, with the classifier of `model`; width 1.0 only.

    From torchvision's cache ($TORCH_HOME/hub/checkpoints) or the network; UserError names the file where both fail.
    """
    if model.architecture.width_mult != 1.0:
        raise UserError(f"--pretrained has weights for --width-mult 1.0 only, not {model.architecture.width_mult}")
    weights = import_torchvision("torchvision.models").MobileNet_V2_Weights.IMAGENET1K_V2
    path = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rsplit("/", 1)[-1]
    if not os.path.isfile(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with network_timeout():
                prefix = path.stem.rpartition("-")[2]  # of the SHA-256
                torch.hub.download_url_to_file(weights.url, str(path), hash_prefix=prefix, progress=False)
        except Exception as error:  # URLError, HTTPError, OSError, RuntimeError for a wrong hash
            cause = getattr(error, "reason", None) or error
            raise UserError(
                f"--pretrained cannot download ImageNet weights ({reason(cause)}); put {weights.url} at {path}"
            ) from None
    advice = f"delete it, or put {weights.url} there"
    state = replace_classifier(read_tensors(path, advice)[0], model)
    check_state(model, state, path, advice)
    return state


def short_hash(path: Path) -> str:
    """The first 8 hex digits of the file's SHA-256: the checkpoint's name in tables and groups."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:8]
