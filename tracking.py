"""Weights & Biases. The only module that imports wandb, and only once a run asks for it.

`with run(settings, ...) as tracked:` is all that train.py and test.py need. Under `wandb agent` the sweep's parameters
override the settings; outside a sweep it does nothing unless `enabled`. `read_sweep` reads a sweep back.
WANDB_MODE (online, offline, disabled), WANDB_BASE_URL, WANDB_API_KEY, WANDB_ENTITY and WANDB_PROJECT are W&B's own.
"""

import contextlib
import dataclasses
import json
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NoReturn, TypeVar

from cli import from_mapping
from errors import UserError, reason
from interrupts import Interrupted

Settings = TypeVar("Settings")
PROJECT = "mobilenetv2-quantization"  # where WANDB_PROJECT names none
RUN_ID = "$WANDB_RUN_ID"  # in a sweep's parameters: the run's own id, so that runs side by side write to own files


@dataclass(frozen=True)
class Labels:
    """How a run shows in W&B: its name, the group it is shown with (the checkpoint's hash), and tags."""

    name: str | None = None
    group: str | None = None
    tags: tuple[str, ...] = ()


class Untracked(Generic[Settings]):
    """A run that is not tracked: does nothing. Also the interface of the run that reports to W&B."""

    tracked = False

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def log(self, values: Mapping[str, Any], step: int | None = None) -> None:
        """One point of the curves."""

    def summary(self, row: Mapping[str, Any]) -> None:
        """The final numbers, flat, under the names of results.csv's columns."""

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """A table; every row has the same keys."""

    def artifact(self, path: Path, name: str, metadata: Mapping[str, Any], source: Path | None = None) -> None:
        """A file as an artifact of type model; `source`: the checkpoint it was made from, its input in W&B."""


class Tracked(Untracked[Settings]):
    """A run that reports to W&B. What a mode does not support is skipped with a warning on stderr: the result comes
    first."""

    tracked = True

    def __init__(self, settings: Settings, wandb_run: Any) -> None:
        super().__init__(settings)
        self.run = wandb_run

    def log(self, values: Mapping[str, Any], step: int | None = None) -> None:
        self.run.log({name: value for name, value in values.items() if value is not None}, step=step, commit=True)

    def summary(self, row: Mapping[str, Any]) -> None:
        self.run.summary.update({name: simple(value) for name, value in row.items()})

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        import wandb

        with guarded(f"the table {name}"):
            data = [[simple(value) for value in row.values()] for row in rows]
            self.run.log({name: wandb.Table(columns=list(rows[0]), data=data)})

    def artifact(self, path: Path, name: str, metadata: Mapping[str, Any], source: Path | None = None) -> None:
        import wandb

        if source is not None:
            with guarded("the link to the checkpoint"):
                checkpoint = wandb.Artifact(Path(source).stem, type="model")
                checkpoint.add_file(str(source))
                self.run.use_artifact(checkpoint)  # the same bytes become the same version: uploaded once
        with guarded(f"the artifact {name}"):
            packed = wandb.Artifact(name, type="model", metadata={k: simple(v) for k, v in metadata.items()})
            packed.add_file(str(path))
            self.run.log_artifact(packed)


def simple(value: Any) -> Any:
    """A value that W&B can store: paths as text, tuples as lists."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple | list):
        return [simple(part) for part in value]
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", 1) == 0 else value


def single(value: Any) -> Any:
    """A list of one as its member, so that W&B can group and filter by it."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


@contextlib.contextmanager
def guarded(what: str) -> Iterator[None]:
    """Turns a W&B error (there are many types) into one line on stderr."""
    try:
        yield
    except Exception as error:
        print(f"warning: W&B did not get {what}: {reason(error)}", file=sys.stderr)


def under_agent() -> bool:
    """Whether `wandb agent` started this process."""
    return bool(os.environ.get("WANDB_SWEEP_ID"))


@contextlib.contextmanager
def run(
    settings: Settings, job_type: str, label: Callable[[Settings], Labels], enabled: bool = False
) -> Iterator[Untracked[Settings]]:
    """A run of W&B around the block, under an agent or where `enabled`; otherwise only makes SIGTERM unwind the block.

    Under an agent the yielded `.settings` are `settings` with the sweep's parameters; `label` names the run from them.
    An unknown or ill-typed parameter raises `UserError` at once. An exception marks the run as failed, with the exit
    code that it leads to; SIGTERM marks it as preempted, so that the sweep hands out its configuration again.
    """
    if not enabled and not under_agent():
        with terminated_by_signal():  # so that temporary files go
            yield Untracked(settings)
        return
    labels = Labels()
    with contextlib.suppress(UserError, OSError):  # reported below, once there is a run to mark as failed
        labels = label(overridden(settings, sweep_parameters(), os.environ.get("WANDB_RUN_ID", "")))
    wandb_run = start(job_type, labels)
    code = 1
    try:
        with terminated_by_signal():
            # The config of a resumed run holds all settings of its first part, which override nothing.
            parameters = sweep_parameters() if wandb_run.resumed else dict(wandb_run.config)
            tracked = Tracked(overridden(settings, parameters, wandb_run.id), wandb_run)
            rest = {name: single(simple(value)) for name, value in dataclasses.asdict(tracked.settings).items()}
            rest = {name: value for name, value in rest.items() if name not in parameters}
            wandb_run.config.update(rest, allow_val_change=True)
            yield tracked
        code = 0
    except UserError as error:
        code = 2
        wandb_run.summary["error"] = str(error)  # the run's page shows why
        raise
    except (Terminated, Interrupted) as stop:
        code = 128 + stop.number
        if stop.number == signal.SIGTERM:
            wandb_run.mark_preempting()
        raise
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
        raise
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        raise
    finally:
        with guarded("the end of the run"):
            wandb_run.finish(exit_code=code)


def start(job_type: str, labels: Labels) -> Any:
    """`wandb.init`; its failures as one line. Tags are cut to the 64 characters that W&B takes."""
    try:
        import wandb
    except ImportError:
        raise UserError("--log-wandb needs the package wandb: pip install wandb") from None
    project = None if under_agent() else os.environ.get("WANDB_PROJECT") or PROJECT  # a sweep's runs stay in its own
    tags = tuple(tag[:64] for tag in labels.tags)
    with refusals():
        return wandb.init(project=project, job_type=job_type, name=labels.name, group=labels.group, tags=tags)


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """What the client raises, as `UserError`: besides its own Error a ValueError for a setting, and for a server that
    does not answer an exception that is neither."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        refuse(error)


def refuse(error: Exception) -> NoReturn:
    """Raises `UserError` with what W&B's error says, and advice where its kind allows some."""
    import wandb

    kind, text, advice = type(error).__name__, reason(error), ""
    if kind == "ValidationError":  # pydantic's, of a setting: its first line only counts
        text = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
    unheard = isinstance(error, wandb.errors.CommError) or kind == "WandbApiFailedError"
    if text.startswith(("Could not find", "Invalid path")):
        advice = " (check WANDB_ENTITY, WANDB_PROJECT and SWEEP_ID)"
    elif unheard or "api key" in text.lower().replace("_", " "):
        advice = (
            " (set WANDB_BASE_URL and WANDB_API_KEY, as `python -m sweepserver` prints them, or WANDB_MODE=offline)"
        )
    raise UserError(f"W&B: {text}{advice}") from None


def sweep_parameters() -> dict[str, Any]:
    """The parameters that the agent wrote for this run; W&B puts the same into `wandb.config`, but only after the run
    has its group."""
    path = os.environ.get("WANDB_SWEEP_PARAM_PATH")
    if not path:
        return {}
    import yaml

    content = yaml.safe_load(Path(path).read_text()) or {}
    return {name: entry["value"] for name, entry in content.items() if isinstance(entry, dict) and "value" in entry}


def overridden(settings: Settings, parameters: Mapping[str, Any], run_id: str) -> Settings:
    return from_mapping(
        settings, {k: v.replace(RUN_ID, run_id) if isinstance(v, str) else v for k, v in parameters.items()}
    )


class Terminated(SystemExit):
    """SIGTERM arrived: the machine is being preempted, or somebody ended the run."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number


@contextlib.contextmanager
def terminated_by_signal() -> Iterator[None]:
    """Within the block SIGTERM raises `Terminated`, unless it is handled already."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return

    def receive(number: int, _: Any) -> NoReturn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not stop the last upload
        raise Terminated(number)

    signal.signal(signal.SIGTERM, receive)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGTERM) is receive:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


# -------------------------------------------------------------------------------------------------------- reading back


def read_sweep(entity: str | None, project: str | None, sweep: str | None, table: str, per: str) -> dict[str, Any]:
    """A sweep and its runs through `wandb.Api()`, as plain data that JSON can hold.

    {path, name, state, url, config, runs: [{id, name, state, created_at, config, summary}], tables}. What is None is
    looked for: the latest sweep, in the project of WANDB_PROJECT or our own. `tables`: for each value of the summary
    column `per` the rows of the logged table `table`, from one run.
    """
    import wandb

    with refusals():
        api = wandb.Api(timeout=60)
        entity = entity or os.environ.get("WANDB_ENTITY") or api.default_entity
        project = project or os.environ.get("WANDB_PROJECT")
        if sweep:
            found = api.sweep(f"{entity}/{project or PROJECT}/{sweep}")
        else:
            found = latest_sweep(api, entity, project)
        place = f"{found.entity}/{found.project}"
        runs = list(api.runs(place, filters={"sweep": found.id}, order="+created_at", lazy=False))
        tables: dict[str, list[dict[str, Any]]] = {}
        for run in runs:
            key = str(run.summary.get(per) or 32)
            if run.state == "finished" and key not in tables and table in run.summary.keys():  # noqa: SIM118
                with guarded(f"the table of {run.name}"):
                    tables[key] = read_table(run, table)
    return {
        "path": f"{place}/{found.id}",
        "name": found.name,
        "state": found.state,
        "url": found.url.replace("+", "%20"),  # W&B encodes a space in a name as "+", which is wrong in a path
        "config": found.config,
        "runs": [
            {
                "id": run.id,
                "name": run.name,
                "state": run.state,
                "created_at": run.created_at,
                "config": dict(run.config),
                "summary": {k: v for k, v in run.summary._json_dict.items() if not isinstance(v, dict)},
            }
            for run in runs
        ],
        "tables": tables,
    }


def sweep_states(path: str) -> tuple[dict[str, int], int | None]:
    """(run state → count, number of runs that are expected where the sweep is a grid) of entity/project/id."""
    import wandb

    with refusals():
        api = wandb.Api(timeout=60)
        entity, project, name = path.split("/")
        states = Counter(run.state for run in api.runs(f"{entity}/{project}", filters={"sweep": name}))
        return dict(states), api.sweep(path).expected_run_count


def latest_sweep(api: Any, entity: str, project: str | None) -> Any:
    """The sweep created last in the project; without a project in our own, else in any of the entity's."""
    names = [p.name for p in api.projects(entity)]
    for wanted in [[project]] if project else [[PROJECT], names]:
        sweeps = [sweep for name in wanted if name in names for sweep in api.project(name, entity).sweeps()]
        if sweeps:
            break
    else:
        where = f"{entity}/{project}" if project else entity
        raise UserError(f"{where} has no sweep; create one: wandb sweep sweeps/quant_sweep.yaml")
    return max(sweeps, key=lambda sweep: sweep._attrs["createdAt"])


def read_table(run: Any, name: str) -> list[dict[str, Any]]:
    """The rows of a table that a run logged under `name`."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        with run.file(run.summary[name]["path"]).download(root=folder, replace=True) as file:
            content = json.load(file)
    return [dict(zip(content["columns"], row, strict=True)) for row in content["data"]]
