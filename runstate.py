"""The state of a training run, in a file beside its checkpoint: what `--resume` goes on from.

It is saved before the first step, after every epoch, and where a signal stops the run; when the run is over a small
marker takes its place, so that `--resume` does not begin again. Settings are kept as JSON, tensors as torch saves them
(read with `weights_only`).
"""

import dataclasses
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

import checkpoint as checkpoints
import training
from cli import flag
from errors import UserError, reason

MARKER_BYTES = 10_000  # the marker of a finished run is smaller than this, a state with weights is larger


def path_beside(checkpoint: Path) -> Path:
    return Path(f"{checkpoint}.resume")


def save(path: Path, settings: Any, state: training.State, known: Mapping[str, Any]) -> None:
    """Writes the state of a run with these settings (a dataclass); `known`: what else its next part needs, JSON's
    types only."""
    content = {"settings": json.dumps(plain(settings)), "finished": False, **known, **training.to_dict(state)}
    checkpoints.write_torch(path, content)


def save_finished(path: Path, settings: Any) -> None:
    """Leaves the marker of a finished run in place of its state."""
    checkpoints.write_torch(path, {"settings": json.dumps(plain(settings)), "finished": True})


def read(path: Path, settings: Any, free: Collection[str]) -> dict[str, Any] | None:
    """What was saved, None where there is no file. `free`: the settings that may differ from the saved ones. UserError
    if the file is damaged, or belongs to a run with other settings."""
    if not path.exists():
        return None
    try:
        saved = {"finished": False, **torch.load(path, map_location="cpu", weights_only=True)}
        theirs = {**plain(type(settings)()), **json.loads(saved["settings"])}  # settings younger than the file
    except Exception as error:
        raise UserError(f"--resume: {path} cannot be read ({reason(error)}); delete it to start over") from None
    for name, mine in plain(settings).items():
        if name not in free and theirs[name] != mine:
            raise UserError(
                f"--resume: the run of {path} has {flag(name)} {theirs[name]}, not {mine}; "
                f"give the same settings, delete {path} to start anew, or give another --save-path"
            )
    return saved


def restore(path: Path, state: training.State, saved: Mapping[str, Any]) -> None:
    """Puts what `read` returned into `state`. UserError if the network or the optimizer is another."""
    try:
        training.restore(state, saved)
    except (KeyError, ValueError, RuntimeError, TypeError) as error:
        raise UserError(f"--resume: {path} does not fit ({reason(error)}); delete it to start over") from None


def check_none(path: Path) -> None:
    """UserError if a run that was interrupted left its state here."""
    if path.exists() and path.stat().st_size > MARKER_BYTES:
        raise UserError(
            f"{path} is the state of an interrupted run; add --resume to continue it, delete it, or give another "
            "--save-path"
        )


def plain(settings: Any) -> dict[str, Any]:
    """The settings as JSON knows them: paths are text, tuples are lists."""
    return json.loads(json.dumps(dataclasses.asdict(settings), default=str))
