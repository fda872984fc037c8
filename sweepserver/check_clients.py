"""Runs the same sweep with several versions of the W&B client against this server.

    python -m sweepserver.check_clients                       # the versions below, each in a venv of its own
    python -m sweepserver.check_clients 0.31.0 --venvs DIR    # keeps the venvs in DIR for the next time

Each version creates a 2 x 2 sweep, two agents of it run the points (history with NaN, a Table, an Artifact), and its
`wandb.Api()` reads all of it back. Exit code 1 where one of them saw something else. Needs a package registry.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

from . import start

VERSIONS = ("0.31.0", "0.22.3", "0.19.11")

SWEEP = """
program: program.py
method: grid
metric: {name: score, goal: maximize}
parameters: {a: {values: [1, 2]}, b: {values: [3, 4]}}
command: ["${env}", "${interpreter}", "${program}"]
"""

PROGRAM = """
import wandb
run = wandb.init(tags=["t"])
for step in range(3):
    run.log({"x": float("nan") if step == 1 else step})
run.summary["score"] = run.config["a"] * 10 + run.config["b"]
run.log({"table": wandb.Table(columns=["n"], data=[[run.config["a"]]])})
open(f"w-{run.id}.bin", "w").write(str(run.config["b"]))
artifact = wandb.Artifact(f"model-{run.config['a']}{run.config['b']}", type="model")
artifact.add_file(f"w-{run.id}.bin", name="w.bin")
run.log_artifact(artifact)
run.finish()
"""

READ = """
import json, sys, wandb
path, project = sys.argv[1], sys.argv[1].split("/")[1]
api = wandb.Api()
sweep = api.sweep(path)
best = sweep.best_run()
folder = api.artifact(f"local/{project}/model-24:latest").download(root=f"down-{project}")
tables = [a for a in best.logged_artifacts() if a.type == "run_table"]
best.summary["extra"] = 1
best.summary.update()
best.tags = ["u"]
best.update()
resumed = wandb.init(project=project, id=best.id, resume="must")
resumed.finish()
best = wandb.Api().run(f"local/{project}/{best.id}")
print(json.dumps({"state": sweep.state, "runs": sorted([r.config["a"], r.config["b"], r.state, r.summary["score"]]
                                                    for r in api.runs(f"local/{project}", {"sweep": sweep.id})),
                  "best": best.summary["score"], "extra": best.summary["extra"], "tags": best.tags,
                  "scan": [row["x"] for row in best.scan_history(keys=["x"])], "rows": len(best.history(pandas=False)),
                  "artifact": open(folder + "/w.bin").read(), "table": tables[0].get("table").data,
                  "files": "wandb-metadata.json" in [f.name for f in best.files()],
                  "found": [p.name for p in api.projects("local") if p.name == project] == [project]}))
"""

WANT = {
    "state": "FINISHED",
    "runs": [[a, b, "finished", 10 * a + b] for a in (1, 2) for b in (3, 4)],
    "best": 24,
    "extra": 1,
    "tags": ["u"],
    "scan": [0, "NaN", 2],
    "rows": 4,
    "artifact": "4",
    "table": [[2]],
    "files": True,
    "found": True,
}


def client(version: str, folder: Path) -> Path:
    """The python of a venv that holds this version of the client."""
    place = folder / version
    python = place / "bin" / "python"
    if not (place / "bin" / "wandb").exists():
        venv.create(place, with_pip=True)
        subprocess.run(
            [python, "-m", "pip", "install", "-q", f"wandb=={version}"], check=True, stderr=subprocess.DEVNULL
        )
    return python


def check(python: Path, server, folder: Path, project: str) -> dict:
    """What one version sees; raises CalledProcessError with its output where it fails."""
    folder.mkdir()
    (folder / "program.py").write_text(PROGRAM)
    (folder / "sweep.yaml").write_text(SWEEP)
    kept = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    places = {
        name: str(folder)
        for name in ("HOME", "WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR", "WANDB_ARTIFACT_DIR")
    }
    environment = {
        **kept,
        **server.env,
        **places,
        "WANDB_ERROR_REPORTING": "false",
        "PATH": f"{python.parent}{os.pathsep}{kept.get('PATH', '')}",
    }

    def run(*command: str) -> str:
        done = subprocess.run(
            [str(c) for c in command],
            cwd=folder,
            env=environment,
            text=True,
            timeout=240,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(map(str, command[1:4]))}:\n{done.stdout}")
        return done.stdout

    created = run(python, "-m", "wandb", "sweep", "--project", project, "sweep.yaml")
    path = next(line.split("wandb agent ")[1].strip() for line in created.splitlines() if "wandb agent " in line)
    agents = [
        subprocess.Popen(
            [python, "-m", "wandb", "agent", path],
            cwd=folder,
            env=environment,
            stdout=(folder / f"agent-{i}.log").open("w"),
            stderr=subprocess.STDOUT,
        )
        for i in range(2)
    ]
    for agent in agents:
        agent.wait(timeout=240)
    return json.loads(run(python, "-c", READ, path).splitlines()[-1])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m sweepserver.check_clients", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("versions", nargs="*", default=VERSIONS)
    parser.add_argument("--venvs", type=Path, help="folder that keeps the venvs (default: a temporary one)")
    args = parser.parse_args(argv)
    bad = 0
    with tempfile.TemporaryDirectory() as temporary, start(Path(temporary) / "data") as server:
        for version in args.versions:
            began = time.monotonic()
            try:
                python = client(version, args.venvs or Path(temporary) / "venvs")
                project = "client-" + version.replace(".", "-")
                seen = check(python, server, Path(temporary) / version, project)
                wrong = {key: (seen.get(key), want) for key, want in WANT.items() if seen.get(key) != want}
            except (RuntimeError, subprocess.SubprocessError, OSError) as error:
                wrong = {"failed": str(error)}
            bad += bool(wrong)
            print(f"wandb {version}: {'ok' if not wrong else 'WRONG'} ({time.monotonic() - began:.0f} s)", flush=True)
            for key, what in wrong.items():
                print(f"  {key}: {what}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
