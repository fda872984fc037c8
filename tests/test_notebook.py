"""End to end: sweep.py starts the embedded server, the real client sweeps test.py on digits, and the notebook reads the
result.

What comes back through `wandb.Api()` must equal what test.py writes without W&B.
"""

import ast
import csv
import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
import yaml

import sweepserver
from tests.conftest import ROOT
from tests.sweepserver_helpers import environment, python

NOTEBOOK = ROOT / "notebooks" / "analysis.ipynb"
TIMES = {"calib_seconds", "eval_seconds", "images_per_second"}  # differ between two measurements of one thing
NOBODY = SimpleNamespace(env={})

READ = """
import json, sys, wandb
sweep = wandb.Api().sweep(sys.argv[1])
runs = [{"name": run.name, "state": run.state, "group": run.group, "job_type": run.job_type,
         "summary": dict(run.summary._json_dict), "models": [a.type for a in run.logged_artifacts()].count("model"),
         "used": len(list(run.used_artifacts()))} for run in sweep.runs]
print(json.dumps({"state": sweep.state, "best": sweep.best_run().name, "runs": runs}))
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A small network that has learned something of the digits."""
    import train

    path = tmp_path_factory.mktemp("trained") / "small.safetensors"
    train.train(
        train.Settings(dataset="digits", data_dir=path.parent / "data", width_mult=0.1, epochs=3, batch_size=32,
                       eval_every=3, save_path=path)
    )  # fmt: skip
    return path


@pytest.fixture(scope="module")
def swept(checkpoint, tmp_path_factory):
    """sweep.py's 2 x 2 sweep with two agents, and the same four points from test.py alone."""
    root = tmp_path_factory.mktemp("sweep")
    env = environment(NOBODY, root, WANDB_PROJECT="two words", WANDB_SILENT="true")
    data = ["--dataset", "digits", "--data-dir", str(checkpoint.parent / "data"), "--checkpoint", str(checkpoint)]
    quantization = {"rounding": "nearest", "calib_batches": 2}
    config = yaml.safe_load((ROOT / "sweeps" / "quant_sweep.yaml").read_text())
    config["parameters"] = {
        "weight_quant_bits": {"values": [4, 8]},
        "activation_quant_bits": {"values": [4, 8]},
        "output": {"value": f"{root}/row-$WANDB_RUN_ID.csv"},
        "log_artifact": {"value": True},
        **{name: {"value": value} for name, value in quantization.items()},
    }
    (root / "sweep.yaml").write_text(yaml.safe_dump(config))

    flags = [word for name, value in quantization.items() for word in (f"--{name}", str(value))]
    files = ["--output", str(root / "direct.csv"), "--plot", str(root / "direct.png")]
    grid = ["test.py", "--weight-bits", "4,8", "--act-bits", "4,8", *flags, *files]
    direct = subprocess.run([sys.executable, *grid, *data], cwd=ROOT, env=env, capture_output=True, text=True)
    assert direct.returncode == 0, direct.stderr

    places = ["--server-dir", str(root / "server"), "--port", "0", "--output", str(root / "out")]
    command = [sys.executable, "sweep.py", "--config", str(root / "sweep.yaml"), *data, *places]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    ready = sweepserver.read_ready(root / "server")
    try:
        assert done.returncode == 0, done.stdout + done.stderr + logs(root)
        path = re.search(r"^sweep (local/two words/\w+); more agents: wandb agent '\1'$", done.stdout, re.MULTILINE)[1]
        server = SimpleNamespace(env={"WANDB_BASE_URL": ready["url"], "WANDB_API_KEY": ready["key"]})
        found = python(server, root, READ, path)
        yield SimpleNamespace(root=root, text=done.stdout, path=path, server=server, found=found)
    finally:
        if ready:
            os.kill(ready["pid"], signal.SIGTERM)


def logs(root: Path) -> str:
    return "".join(path.read_text()[-3000:] for path in root.glob("out/*/agent-*.log"))


def rows(path: Path) -> dict[tuple[int, int], dict[str, str]]:
    with open(path) as file:
        found = list(csv.DictReader(file))
    return {(int(float(row["weight_quant_bits"])), int(float(row["activation_quant_bits"]))): row for row in found}


def test_each_point_ran_once_and_finished(swept):
    assert swept.found["state"] == "FINISHED"
    assert sorted(run["name"] for run in swept.found["runs"]) == ["w4a4-b256", "w4a8-b256", "w8a4-b256", "w8a8-b256"]
    assert {run["state"] for run in swept.found["runs"]} == {"finished"}


def test_what_comes_back_equals_test_py_without_wandb(swept):
    direct = rows(swept.root / "direct.csv")
    assert len(direct) == 4 and len({row["test_acc_quantized"] for row in direct.values()}) > 1
    for run in swept.found["runs"]:
        summary = run["summary"]
        row = direct.pop((summary["weight_quant_bits"], summary["activation_quant_bits"]))
        for name, text in row.items():
            if name in TIMES:
                assert summary[name] >= 0
            elif isinstance(summary[name], float):
                assert float(text) == float(f"{summary[name]:.6g}"), name  # the file holds six digits
            else:
                assert text == str(summary[name]), name
    assert not direct


def test_the_best_run_is_the_most_accurate(swept):
    best = max(swept.found["runs"], key=lambda run: run["summary"]["test_acc_quantized"])
    score = {run["name"]: run["summary"]["test_acc_quantized"] for run in swept.found["runs"]}
    assert score[swept.found["best"]] == best["summary"]["test_acc_quantized"]


def test_runs_are_grouped_and_hold_the_packed_model_and_its_checkpoint(swept, checkpoint):
    import checkpoint as checkpoints

    for run in swept.found["runs"]:
        assert (run["group"], run["job_type"]) == (checkpoints.short_hash(checkpoint), "evaluation")
        assert (run["models"], run["used"]) == (1, 1)


def test_the_size_table_adds_up_to_the_file(swept):
    kept = json.loads(next((swept.root / "out").glob("sweep-*.json")).read_text())
    packed = {}
    for run in kept["runs"]:  # the first run at these bits is the one whose table is kept
        packed.setdefault(str(run["summary"]["weight_quant_bits"]), run["summary"]["packed_bytes"])
    assert set(kept["tables"]) == {"4", "8"}
    for bits, table in kept["tables"].items():
        assert sum(value for row in table for name, value in row.items() if name.endswith("_bytes")) == packed[bits]


def test_everything_it_names_is_there(swept):
    folder = swept.root / "out" / swept.path.rsplit("/", 1)[1]
    names = {"results.csv", "parallel_coordinates.png", "parallel_coordinates.html", "analysis.html", "agent-1.log"}
    assert names <= {path.name for path in folder.iterdir()}
    assert set(rows(folder / "results.csv")) == {(4, 4), (4, 8), (8, 4), (8, 8)}
    link = next(line.split()[-1] for line in swept.text.splitlines() if line.startswith("sweep page: "))
    opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
    with opener.open(link, timeout=30) as page:
        assert page.status == 200 and page.url.endswith(f"/sweeps/{swept.path.rsplit('/', 1)[1]}")


def test_the_notebook_ran_headless_and_shows_every_figure(swept):
    """sweep.py executed it with `jupyter nbconvert --execute`, in a kernel of its own."""
    html = (swept.root / "out" / swept.path.rsplit("/", 1)[1] / "analysis.html").read_text()
    shown = html[html.index("Which sweep") :]  # behind plotly.js
    assert swept.path in shown and "4 finished" in shown and ">'none: the grid is complete'<" in shown
    plots = shown.count("Plotly.newPlot(")
    assert plots == 4  # parallel coordinates, accuracy against size, heat map, size by layer
    for kind in ("parcoords", "heatmap"):  # each plot's template names them once, and one plot is of that kind
        assert shown.count(f'"type":"{kind}"') == plots + 1
    assert ">not run<" in shown  # w6a8 was no point of this sweep, and the table of configurations says so


def test_the_notebook_of_a_sweep_without_a_measured_run_says_so(monkeypatch, capsys):
    import plotly.io

    import sweepresults

    run = {
        "id": "r",
        "name": "r",
        "state": "finished",
        "created_at": "2026-01-01",
        "config": {"epochs": 1},
        "summary": {"val_acc": 90.0},
    }  # of train.py
    read = dict(path="e/p/s", name="s", state="RUNNING", url="u", config={"method": "random"}, runs=[run], tables={})
    monkeypatch.setattr(sweepresults, "fetch_sweep", lambda *_, **__: sweepresults.sweep_results(read))
    monkeypatch.setattr(plotly.io.renderers, "default", None)  # set back at the end
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", list(sys.path))
    names, shown = {}, []
    for cell in nbformat.read(NOTEBOOK, 4).cells:
        if cell.cell_type == "code":
            *rest, last = ast.parse(cell.source).body
            value = ast.Expression(last.value) if isinstance(last, ast.Expr) else rest.append(last)
            exec(compile(ast.Module(rest, []), "cell", "exec"), names)
            shown.append(eval(compile(value, "cell", "eval"), names) if value else None)
    said = [value for value in shown if isinstance(value, str) and value.startswith("no finished run yet")]
    assert len(said) == 4 and "1 finished" in capsys.readouterr().out


def test_the_notebook_is_thin_and_committed_clean():
    notebook = nbformat.read(NOTEBOOK, 4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert len(cell.source.splitlines()) < 25 and "def " not in cell.source
            assert not cell.outputs and cell.execution_count is None


@pytest.mark.parametrize("path", sorted((ROOT / "sweeps").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_sweeps_fit_their_programs(path):
    """Every value that a sweep names is one that its program takes, and the command is the venv's Python."""
    import importlib

    import cli

    config = yaml.safe_load(path.read_text())
    settings = importlib.import_module(config["program"].removesuffix(".py")).Settings()
    for name, parameter in config["parameters"].items():
        values = [parameter["value"]] if "value" in parameter else parameter.get("values")
        for value in values or [parameter["min"], parameter["max"]]:
            cli.from_mapping(settings, {name: value})
    assert config["command"] == ["${env}", "PATH=.venv/bin:${envvar:PATH}", "${interpreter}", "${program}"]


def test_the_quantization_sweep_has_32_points():
    import report
    import sweepresults

    grid = sweepresults.sweep_grid(yaml.safe_load((ROOT / "sweeps" / "quant_sweep.yaml").read_text()))
    assert len(sweepresults.missing_points(report.to_frame([]), grid)) == 32


@pytest.mark.parametrize("content", [None, b"just a line", b"method: grid", b"a: [1", b"\x89PNG\r\n\xff"])
def test_a_file_that_is_no_sweep_is_one_line_before_a_server_starts(run_main, tmp_path, content):
    import sweep

    path = tmp_path / "sweep.yaml"
    if content:
        path.write_bytes(content)
    code, _, text = run_main(sweep, "--config", path, "--server-dir", tmp_path / "server", "--port", "0")
    assert code == 2 and text.startswith(f"error: --config {path} is not a sweep") and text.count("\n") == 1
    assert not (tmp_path / "server").exists()


@pytest.mark.parametrize(
    "flags, word",
    [
        (("--server-dir", "file"), "--server-dir file: cannot write"),
        (("--server-dir", "file/deeper"), "--server-dir file/deeper: cannot write"),
        (("--checkpoint", "none.safetensors"), "--checkpoint none.safetensors does not exist"),
    ],
)
def test_a_place_that_cannot_be_is_one_line(run_main, tmp_path, monkeypatch, flags, word):
    import sweep

    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    code, _, text = run_main(sweep, "--config", ROOT / "sweeps" / "quant_sweep.yaml", "--port", "0", *flags)
    assert code == 2 and word in text and text.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_paths_of_another_folder_reach_the_agents_whole(tmp_path, monkeypatch):
    import sweep

    (tmp_path / "c.pth").write_text("")
    monkeypatch.chdir(tmp_path)
    shared = sweep.shared_parameters(sweep.Settings(data_dir=Path("d"), checkpoint=Path("c.pth")))
    assert shared == {"dataset": None, "data_dir": tmp_path / "d", "checkpoint": tmp_path / "c.pth"}
    monkeypatch.chdir(ROOT)
    assert sweep.shared_parameters(sweep.Settings(data_dir=Path("d")))["data_dir"] == Path("d")


def test_the_servers_log_holds_no_key(tmp_path):
    import sweep

    folder = tmp_path / "server"
    found = sweep.embedded_server(folder, 0)
    try:
        assert found["WANDB_API_KEY"] == (folder / "key").read_text()
        assert found["WANDB_API_KEY"] not in (folder / "server.log").read_text()
        assert folder.stat().st_mode & 0o777 == 0o700
    finally:
        os.kill(sweepserver.read_ready(folder)["pid"], signal.SIGTERM)
