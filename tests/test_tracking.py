"""tracking.py with the real W&B client, each program a process in a folder of its own, against the embedded server."""

import ast
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

import sweepserver
import tracking
from errors import UserError
from tests.conftest import ROOT
from tests.sweepserver_helpers import create_sweep, environment, python, wandb

# What test.py does, without torch: settings, a run, curves, a row, a table, an artifact.
PROGRAM = """
import sys, time
from dataclasses import dataclass
from pathlib import Path
import tracking
from cli import option, parse
from errors import run_main

@dataclass(frozen=True)
class Settings:
    weight_quant_bits: int | None = option(None, "bits", aliases=("weight_bits",), low=2, high=8)
    batch_size: int = option(128, "images at once", low=1)
    checkpoint: Path = option(Path("checkpoint.bin"), "file")
    output: Path = option(Path("out.txt"), "file")
    sleep: float = option(0.0, "seconds")
    log_wandb: bool = option(False, "report")

def label(settings):
    name = f"w{settings.weight_quant_bits or 32}-b{settings.batch_size}"
    return tracking.Labels(name, settings.checkpoint.stem, ("a tag", "another", 70 * "x"))

def main():
    settings = parse(Settings, "test", sys.argv[1:])
    with tracking.run(settings, "evaluation", label, settings.log_wandb) as tracked:
        settings = tracked.settings
        row = {"weight_quant_bits": settings.weight_quant_bits, "batch_size": settings.batch_size, "dataset": "none",
               "test_acc_quantized": 90.0 + (settings.weight_quant_bits or 9), "eval_seconds": float("nan"),
               "val_acc": 99.5}
        for step in (1, 2):
            tracked.log({"val_acc": 10.0 * step, "missing": None}, step=step)
        print("started", flush=True)
        time.sleep(settings.sleep)
        tracked.summary(row)
        tracked.table("size_by_layer", [{"name": "conv", "code_bytes": 10}, {"name": "fc", "code_bytes": 20}])
        settings.output.write_text(repr(row))
        tracked.artifact(settings.output, "packed", row, settings.checkpoint)
    print("imported", "wandb" in sys.modules)

run_main(main)
"""

SWEEP = """
program: program.py
method: grid
metric: {{name: test_acc_quantized, goal: maximize}}
parameters: {parameters}
command: ["${{env}}", "${{interpreter}}", "${{program}}"]
"""

READ = """
import json, sys, wandb
found = []
for run in wandb.Api().runs("local/" + sys.argv[1]):
    logged = list(run.logged_artifacts())
    made = [(a.type, a.name, dict(a.metadata)) for a in logged if a.type == "model"]
    tables = [name for a in logged if a.type == "run_table" for name in run.summary.keys() if a.get(name)]
    found.append({"id": run.id, "name": run.name, "state": run.state, "group": run.group, "job_type": run.job_type,
                  "tags": sorted(run.tags), "config": dict(run.config), "made": made, "tables": tables,
                  "summary": dict(run.summary._json_dict), "used": [a.name for a in run.used_artifacts()],
                  "history": [row["val_acc"] for row in run.scan_history(keys=["val_acc", "_step"])]})
print(json.dumps(found, default=str))
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with sweepserver.start(tmp_path_factory.mktemp("server")) as running:
        yield running


def folder_with_program(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "program.py").write_text(PROGRAM)
    (folder / "checkpoint.bin").write_bytes(b"weights")
    return folder


def start(server, folder: Path, *flags: str, **extra: str) -> subprocess.Popen:
    env = environment(server, folder, PYTHONPATH=str(ROOT), **extra)
    command = [sys.executable, "program.py", *flags]
    return subprocess.Popen(
        command, cwd=folder_with_program(folder), env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def read(server, folder: Path, project: str) -> list[dict]:
    return python(server, folder, READ, project)


def swept(server, folder: Path, project: str, parameters: str) -> list[dict]:
    """The runs of a sweep of the program, one agent for one run."""
    folder_with_program(folder)
    path = create_sweep(server, folder, SWEEP.format(parameters=parameters), project)
    done = wandb(server, folder, "agent", "--count", "1", path, PYTHONPATH=str(ROOT))
    (folder / "agent.txt").write_text(done.stdout)
    return read(server, folder, project)


def terminated(server, folder: Path, project: str) -> tuple[int, list[dict]]:
    """Exit code and runs of a program that SIGTERM met in the middle."""
    program = start(server, folder, "--log-wandb", "--sleep", "60", WANDB_PROJECT=project)
    while "started" not in program.stdout.readline():
        assert program.poll() is None
    program.send_signal(signal.SIGTERM)
    program.communicate(timeout=60)
    return program.returncode, read(server, folder, project)


def resumed(server, folder: Path) -> list[dict]:
    """The runs of a program that is run twice under one id, with other settings the second time."""
    for bits in ("8", "6"):
        extra = dict(WANDB_PROJECT="again", WANDB_RUN_ID="again", WANDB_RESUME="allow")
        code, text = finished(server, folder, "--log-wandb", "--weight-bits", bits, **extra)
        assert code == 0, text
    return read(server, folder, "again")


def finished(server, folder: Path, *flags: str, **extra: str) -> tuple[int, str]:
    program = start(server, folder, *flags, **extra)
    text = program.communicate(timeout=120)[0]
    return program.returncode, text


BAD = {
    "unknown": {"nonsense": 1},
    "ill_typed": {"weight_quant_bits": "four"},
    "out_of_range": {"weight_bits": 9},
    "twice": {"weight_bits": 4, "weight_quant_bits": 4},
}


def refused(server, folder: Path, parameters: dict) -> tuple[int, str]:
    """The program as an agent would start it, with parameters that it must not take."""
    folder.mkdir(parents=True)
    content = {"wandb_version": 1, **{name: {"value": value} for name, value in parameters.items()}}
    (folder / "parameters.yaml").write_text(json.dumps(content))  # JSON is YAML
    agents = {"WANDB_SWEEP_ID": "handmade", "WANDB_SWEEP_PARAM_PATH": "parameters.yaml", "WANDB_RUN_ID": folder.name}
    return finished(server, folder, WANDB_PROJECT="bad", **agents)


@pytest.fixture(scope="module")
def outcomes(server, tmp_path_factory):
    """Every scenario, side by side: they wait more than they compute."""
    root = tmp_path_factory.mktemp("tracking")
    good = "{weight_bits: {value: 4}, output: {value: $WANDB_RUN_ID.txt}, checkpoint: {value: checkpoint.bin}}"
    jobs = {
        "plain": lambda: finished(server, root / "plain"),
        "offline": lambda: finished(server, root / "offline", "--log-wandb", WANDB_MODE="offline", WANDB_PROJECT="off"),
        "disabled": lambda: finished(server, root / "disabled", "--log-wandb", WANDB_MODE="disabled"),
        "online": lambda: finished(server, root / "online", "--log-wandb", "--weight-bits", "8", WANDB_PROJECT="on"),
        "no_key": lambda: finished(server, root / "no_key", "--log-wandb", WANDB_API_KEY="", HOME=str(root)),
        "no_scheme": lambda: finished(server, root / "no_scheme", "--log-wandb", WANDB_BASE_URL="127.0.0.1:8085"),
        "again": lambda: resumed(server, root / "again"),
        "term": lambda: terminated(server, root / "term", "term"),
        "good": lambda: swept(server, root / "good", "good", good),
        **{name: lambda n=name: refused(server, root / n, BAD[n]) for name in BAD},
    }
    with ThreadPoolExecutor(4) as pool:
        running = {name: pool.submit(job) for name, job in jobs.items()}
        return root, {name: job.result() for name, job in running.items()}


def test_nothing_of_wandb_is_imported_without_asking(outcomes):
    root, results = outcomes
    assert results["plain"] == (0, "started\nimported False\n")
    assert not (root / "plain" / "wandb").exists()


def test_offline_keeps_the_run_for_later(outcomes, server):
    root, (code, text) = outcomes[0], outcomes[1]["offline"]
    assert code == 0 and "imported True" in text, text
    assert "W&B did not get the link to the checkpoint" in text  # what the mode cannot do is said, and the rest goes on
    (kept,) = (root / "offline" / "wandb").glob("offline-run-*")
    done = wandb(server, root / "offline", "sync", str(kept))
    assert done.returncode == 0, done.stdout
    (run,) = read(server, root, "off")
    assert run["name"] == "w32-b128" and run["history"] == [10.0, 20.0]
    assert [made[:2] for made in run["made"]] == [["model", "packed:v0"]] and run["tables"] == ["size_by_layer"]
    assert run["summary"]["test_acc_quantized"] == 99.0


def test_disabled_writes_nothing(outcomes):
    root, (code, text) = outcomes[0], outcomes[1]["disabled"]
    assert code == 0 and "imported True" in text and "warning" not in text, text
    assert not list(root.glob("disabled/wandb/*run-*"))


def test_a_missing_key_is_one_line(outcomes):
    code, text = outcomes[1]["no_key"]
    assert code == 2
    (line,) = [line for line in text.splitlines() if line.startswith("error: ")]
    assert "WANDB_API_KEY" in line and "started" not in text


def test_an_address_without_a_scheme_is_one_line(outcomes):
    code, text = outcomes[1]["no_scheme"]
    (line,) = [line for line in text.splitlines() if line.startswith("error: ")]
    assert code == 2 and "base_url" in line and "started" not in text


def test_the_command_line_of_a_resumed_run_counts_and_not_what_wandb_kept(outcomes):
    (run,) = outcomes[1]["again"]
    assert run["summary"]["test_acc_quantized"] == 96.0 and run["config"]["weight_quant_bits"] == 6


def test_what_the_client_raises_is_one_line():
    kind = type("WandbApiFailedError", (Exception,), {})
    with pytest.raises(UserError, match="W&B: no route .*set WANDB_BASE_URL"), tracking.refusals():
        raise kind("no route")
    with pytest.raises(UserError, match="^mine$"), tracking.refusals():
        raise UserError("mine")


def test_advice_fits_the_error(outcomes, server):
    root = outcomes[0]
    program = (
        "import os, tracking; from errors import run_main; "
        "run_main(lambda: tracking.read_sweep(None, None, os.environ['SWEEP_ID'], 'size_by_layer', 'b'))"
    )
    for sweep, extra, wanted, unwanted in [
        ("nonesuch", {}, "check WANDB_ENTITY, WANDB_PROJECT and SWEEP_ID", "WANDB_BASE_URL"),
        ("a/b/c/d", {}, "check WANDB_ENTITY, WANDB_PROJECT and SWEEP_ID", "WANDB_BASE_URL"),
        ("nonesuch", {"WANDB_API_KEY": "k" * 40}, "set WANDB_BASE_URL and WANDB_API_KEY", "SWEEP_ID"),
    ]:
        env = environment(server, root, PYTHONPATH=str(ROOT), WANDB_PROJECT="good", SWEEP_ID=sweep, **extra)
        done = subprocess.run([sys.executable, "-c", program], cwd=root, env=env, capture_output=True, text=True)
        line = done.stderr.splitlines()[-1]
        assert done.returncode == 2 and wanted in line and unwanted not in line, done.stderr
    with pytest.raises(UserError, match=r"^W&B: something else$"):
        tracking.refuse(ValueError("something else"))


def test_a_run_holds_row_table_artifact_and_labels(outcomes, server):
    root, (code, text) = outcomes[0], outcomes[1]["online"]
    assert code == 0 and "warning" not in text, text
    (run,) = read(server, root, "on")
    assert (run["name"], run["group"], run["job_type"]) == ("w8-b128", "checkpoint", "evaluation")
    assert run["tags"] == ["a tag", "another", 64 * "x"] and run["state"] == "finished"
    expected = {"weight_quant_bits": 8, "batch_size": 128, "dataset": "none", "test_acc_quantized": 98.0}
    assert expected.items() <= run["summary"].items()
    assert run["summary"]["size_by_layer"]["nrows"] == 2
    assert run["summary"]["val_acc"] == 99.5  # the final number, not the last one of the curve
    assert run["history"] == [10.0, 20.0] and "missing" not in run["summary"]
    assert run["config"]["batch_size"] == 128 and run["config"]["checkpoint"] == "checkpoint.bin"
    ((kind, name, metadata),) = run["made"]
    assert (kind, name) == ("model", "packed:v0") and metadata["test_acc_quantized"] == 98.0
    assert [used.split(":")[0] for used in run["used"]] == ["checkpoint"]


def test_a_sweeps_parameters_override_settings(outcomes):
    root, (run,) = outcomes[0], outcomes[1]["good"]
    assert (run["name"], run["state"]) == ("w4-b128", "finished")
    assert run["summary"]["test_acc_quantized"] == 94.0
    assert run["config"]["weight_quant_bits"] == run["config"]["weight_bits"] == 4
    assert (root / "good" / f"{run['id']}.txt").exists() and not (root / "good" / "out.txt").exists()


@pytest.fixture(scope="module")
def bad_runs(outcomes, server):
    return {run["id"]: run for run in read(server, outcomes[0], "bad")}


@pytest.mark.parametrize(
    "name, words",
    [
        ("unknown", ["nonsense", "known ones are", "batch_size"]),
        ("ill_typed", ["--weight-quant-bits", "four", "whole number"]),
        ("out_of_range", ["--weight-quant-bits", "9", "at most 8"]),
        ("twice", ["--weight-quant-bits", "twice"]),
    ],
)
def test_a_bad_configuration_is_refused_by_name_and_fails(outcomes, bad_runs, name, words):
    code, text = outcomes[1][name]
    (line,) = [line for line in text.splitlines() if line.startswith("error: ")]
    assert code == 2 and all(word in line for word in words), line
    assert "started" not in text
    run = bad_runs[name]
    assert run["state"] == "failed" and words[0] in run["summary"]["error"]
    assert "test_acc_quantized" not in run["summary"]


def test_sigterm_marks_the_run_as_preempted(outcomes):
    code, (run,) = outcomes[1]["term"]
    assert code == 128 + signal.SIGTERM
    assert run["state"] == "preempted"


def test_agents_side_by_side_lose_no_row(tmp_path):
    program = (
        "import sys, results\n"
        "for i in range(20): results.append('rows.csv', {n: f'{sys.argv[1]}-{i}' for n in results.COLUMNS})"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    running = [subprocess.Popen([sys.executable, "-c", program, str(i)], cwd=tmp_path, env=env) for i in range(4)]
    assert [process.wait(60) for process in running] == [0] * 4
    import results

    found = sorted(row["dataset"] for row in results.read(tmp_path / "rows.csv"))
    assert found == sorted(f"{process}-{i}" for process in range(4) for i in range(20))


def test_sigterm_unwinds_a_program_without_a_run(monkeypatch):
    monkeypatch.delenv("WANDB_SWEEP_ID", raising=False)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as stop, tracking.run(None, "evaluation", lambda _: tracking.Labels()):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert stop.value.code == 143


# A module imports only what stands above its line. Above the rule: what computes, with nothing of reports and tracking.
COMPUTES = (
    "errors interrupts entropy vision models allocator pace recording",
    "files cli startup",
    "data",
    "network evaluation checkpoint augmentation",
    "training",
    "quantization bitsfile subject traininglog runstate",
    "equalization rounding learned",
    "reconstruction packing",
    "sizes",
    "compression",
    "calibration",
    "allocation qat",
    "mixed",
)
REPORTS = ("tracking results report", "sweepserver", "sweepresults", "export test train sweep")


def imported(path: Path) -> set[str]:
    """The top names of what a file imports, at its head or in a function."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
    return {name.split(".")[0] for name in names}


def test_only_tracking_imports_wandb():
    paths = [path for part in (".", "models", "benchmarks", "sweepserver") for path in (ROOT / part).glob("*.py")]
    assert [path.name for path in paths if "wandb" in imported(path)] == ["tracking.py"]


def test_imports_run_one_way():
    place = {name: i for i, line in enumerate((*COMPUTES, *REPORTS)) for name in line.split()}
    wrong = []
    for path in [path for part in (".", "models", "sweepserver") for path in (ROOT / part).glob("*.py")]:
        name = path.stem if path.parent == ROOT else path.parent.name
        assert name in place, f"{name}.py has no place in the table above"
        others = imported(path) - {name}
        wrong += [f"{name} imports {other}" for other in others if place.get(other, -1) >= place[name]]
        if place[name] < len(COMPUTES):
            wrong += [f"{name} imports {other}" for other in others & {"pandas", "plotly", "matplotlib"}]
    assert not wrong


@pytest.mark.parametrize(("ours", "found"), [([1], 1), ([], 2)])
def test_the_latest_sweep_is_one_of_our_project_or_else_of_any(ours, found):
    class Api:
        def projects(self, entity):
            return [SimpleNamespace(name=name) for name in (tracking.PROJECT, "mine")]

        def project(self, name, entity):
            numbers = ours if name == tracking.PROJECT else [2]
            sweeps = [SimpleNamespace(id=i, _attrs={"createdAt": i}) for i in numbers]
            return SimpleNamespace(sweeps=lambda: sweeps)

    assert tracking.latest_sweep(Api(), "me", None).id == found
    with pytest.raises(UserError, match="me/other has no sweep"):
        tracking.latest_sweep(Api(), "me", "other")


def test_latest_sweep_is_found_without_a_name(outcomes, server):
    root, _ = outcomes
    program = "import json, tracking; print(json.dumps(tracking.read_sweep(None, None, None, 'size_by_layer', 'b')))"
    env = dict(PYTHONPATH=str(ROOT))
    command = [sys.executable, "-c", program]
    done = subprocess.run(
        command, cwd=root, env=environment(server, root, **env, WANDB_PROJECT="good"), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["path"].startswith("local/good/") and found["state"] == "FINISHED"
    assert [run["config"]["weight_bits"] for run in found["runs"]] == [4]
    assert found["tables"] == {"32": [{"name": "conv", "code_bytes": 10}, {"name": "fc", "code_bytes": 20}]}
    assert os.fspath(root) not in done.stdout
