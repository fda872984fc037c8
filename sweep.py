"""Runs a whole W&B sweep (server, sweep, agents, notebook) and prints where to find the results.

examples:
  python sweep.py                                            the 32 runs of sweeps/quant_sweep.yaml on two agents
  python sweep.py --checkpoint C --data-dir D --agents 4     the same for your checkpoint
  python sweep.py --no-server                                on the server of WANDB_BASE_URL, else on W&B's cloud
"""

if __name__ == "__main__":
    import startup  # noqa: F401 - first of all, see there

import ast
import contextlib
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import report
import sweepresults
import sweepserver
import tracking
from cli import option, parse
from errors import UserError, reason, run_main
from files import write_bytes

ROOT = Path(__file__).resolve().parent
POLL_SECONDS = 3.0


@dataclass(frozen=True)
class Settings:
    """The command line of sweep.py."""

    config: Path = option(Path("sweeps/quant_sweep.yaml"), "the sweep", group="sweep")
    agents: int = option(2, "agents side by side on this machine", low=1, high=64, group="sweep")
    dataset: str | None = option(None, "passed to all runs", group="sweep")
    data_dir: Path | None = option(None, "passed to all runs", group="sweep")
    checkpoint: Path | None = option(None, "passed to all runs", group="sweep")
    server: bool = option(True, "use the embedded server, starting it if it is not running", group="server")
    server_dir: Path = option(Path("sweepserver-data"), "where the embedded server keeps its data", group="server")
    port: int = option(8085, "of the embedded server; 0: a free one", low=0, high=65535, group="server")
    notebook: bool = option(True, "execute notebooks/analysis.ipynb on the result", group="output")
    output: Path = option(
        Path("runs/sweeps"), "folder for tables, plots, the notebook and the agents' logs", group="output"
    )


def python(*arguments: str) -> list[str]:
    return [sys.executable, "-m", *arguments]


def embedded_server(folder: Path, port: int) -> dict[str, str]:
    """The environment that leads the W&B client to the embedded server; starts it where it does not run.

    It goes on running after this program, for its pages.
    """
    ask = python("sweepserver", "env", "--data-dir", str(folder.resolve()))
    answer = subprocess.run(ask, cwd=ROOT, capture_output=True, text=True)
    if "does not answer" in answer.stderr:
        raise UserError(answer.stderr.strip().removeprefix("error: "))
    if answer.returncode:
        try:
            server = sweepserver.launch(folder.resolve(), port=port, wait=60, detached=True)
        except OSError as error:
            raise UserError(f"--server-dir {folder}: cannot write there ({error.strerror})") from None
        except RuntimeError as error:
            raise UserError(f"the embedded server did not start: {str(error).splitlines()[-1]}") from None
        print(f"started the embedded server; `kill {server.pid}` ends it")
        return server.env
    return dict(re.findall(r"^export (\w+)=(\S+)$", answer.stdout, re.MULTILINE))


def page(folder: Path, path: str, otherwise: str) -> str:
    """An address that opens the sweep's page of the embedded server once, without a login; `otherwise`, the page's
    own, where the server does not answer."""
    ask = python("sweepserver", "link", "--data-dir", str(folder.resolve()))
    link = subprocess.run(ask, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    if not link:
        return otherwise
    entity, project, name = path.split("/")
    return f"{link}&next={quote(f'/{entity}/{project}/sweeps/{name}')}"


def configured(config: Path, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The sweep in the file, with `parameters` that all runs get."""
    import yaml

    try:
        sweep = yaml.safe_load(config.read_text())
        fixed = {name: {"value": tracking.simple(value)} for name, value in parameters.items() if value is not None}
        return {**sweep, "parameters": {**sweep["parameters"], **fixed}}
    except (OSError, ValueError, yaml.YAMLError, TypeError, KeyError) as error:  # ValueError: a file that is no text
        raise UserError(f"--config {config} is not a sweep ({reason(error)}); see sweeps/") from None


def shared_parameters(settings: Settings) -> dict[str, Any]:
    """What all runs get. The agents run in ROOT: paths that were given relative to another folder become absolute."""
    if settings.checkpoint and not settings.checkpoint.is_file():
        raise UserError(f"--checkpoint {settings.checkpoint} does not exist; give one that train.py wrote")
    paths = {"data_dir": settings.data_dir, "checkpoint": settings.checkpoint}
    if Path.cwd() != ROOT:
        paths = {name: path and path.resolve() for name, path in paths.items()}
    return {"dataset": settings.dataset, **paths}


def create(sweep: Mapping[str, Any], folder: Path) -> str:
    """Creates the sweep with `wandb sweep`; returns entity/project/id."""
    import yaml

    path = folder / "sweep.yaml"
    write_bytes(path, yaml.safe_dump(dict(sweep), sort_keys=False, allow_unicode=True).encode())
    command = python("wandb", "sweep", str(path.resolve()))
    speaking = {**os.environ, "WANDB_SILENT": "false"}  # the id is in what it says
    done = subprocess.run(command, cwd=ROOT, env=speaking, capture_output=True, text=True)
    found = re.search(r"wandb agent (\S+/.+/\S+)$", done.stdout + done.stderr, re.MULTILINE)
    if done.returncode or not found:
        raise UserError(f"wandb sweep: {(done.stderr.strip().splitlines() or ['no answer'])[-1]}")
    quoted = found[1][0] in "'\""  # quoted as in Python if the project's name contains a space
    return ast.literal_eval(found[1]) if quoted else found[1]


def run_agents(path: str, count: int, folder: Path) -> None:
    """Runs agents to the end of the sweep, with a progress bar; their output goes to files in `folder`."""
    from tqdm import tqdm

    threads = str(max(1, (os.cpu_count() or 1) // count))
    own = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}  # the agents' `python`
    environment = {"OMP_NUM_THREADS": threads, **os.environ, **own}
    agents = []
    for i in range(count):
        with open(folder / f"agent-{i + 1}.log", "w") as log:
            command = python("wandb", "agent", "--forward-signals", path)
            agents.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log))
    try:
        with tracking.terminated_by_signal(), tqdm(desc="runs", unit="run", disable=None) as bar:
            while any(agent.poll() is None for agent in agents):
                time.sleep(POLL_SECONDS)
                with contextlib.suppress(UserError):  # a server that is briefly unreachable does not stop the agents
                    show_progress(bar, *tracking.sweep_states(path))
    except KeyboardInterrupt:
        print(f"interrupted; the sweep goes on with: wandb agent {shlex.quote(path)}")
        raise SystemExit(130) from None
    finally:
        for agent in agents:
            if agent.poll() is None:
                agent.terminate()  # it forwards the signal to its run, whose configuration is then handed out again
        for agent in agents:
            agent.wait()


def show_progress(bar: Any, states: Mapping[str, int], total: int | None) -> None:
    """Moves the bar; where there is no terminal, prints a line when another run has finished."""
    done = states.get("finished", 0)
    bar.total = total
    if bar.disable and done > bar.n:
        print(f"{done} of {total or '?'} runs finished", flush=True)
        bar.n = done
    bar.set_postfix(states, refresh=False)
    bar.update(done - bar.n)


def execute_notebook(path: str, cache: Path, folder: Path) -> Path:
    """Executes the notebook on the sweep; returns the HTML page it became."""
    entity, project, name = path.split("/")
    given = {"WANDB_ENTITY": entity, "WANDB_PROJECT": project, "SWEEP_ID": name, "SWEEP_CACHE": str(cache.resolve())}
    html = folder / "analysis.html"
    command = python("jupyter", "nbconvert", "--execute", "--to", "html", "--output", str(html.resolve()))
    done = subprocess.run(
        [*command, "notebooks/analysis.ipynb"], cwd=ROOT, env={**os.environ, **given}, capture_output=True, text=True
    )
    if done.returncode:
        raise UserError(f"the notebook failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return html


def main() -> int:
    settings = parse(Settings, __doc__, sys.argv[1:])
    sweep = configured(settings.config, shared_parameters(settings))  # before a server is started for nothing
    if settings.server:
        for name in ("WANDB_ENTITY", "WANDB_MODE"):  # of another server
            os.environ.pop(name, None)
        os.environ.update(embedded_server(settings.server_dir, settings.port))
    path = create(sweep, settings.output)
    folder = settings.output / path.rsplit("/", 1)[-1]
    folder.mkdir(parents=True, exist_ok=True)
    print(f"sweep {path}; more agents: wandb agent {shlex.quote(path)}", flush=True)
    run_agents(path, settings.agents, folder)

    results = sweepresults.fetch_sweep(*path.split("/"), cache=settings.output)
    if len(results.frame):
        results.frame.to_csv(folder / "results.csv", index=False)
        report.write_plots(results.frame, folder / "parallel_coordinates.png")
    print(f"runs: {', '.join(f'{count} {state}' for state, count in results.states.items()) or 'none'}")
    url = results.url
    print(f"sweep page: {page(settings.server_dir, path, url) if settings.server else url}")
    print(f"tables, plots, agents' logs: {folder}")
    if settings.notebook and len(results.frame):
        print(f"notebook: {execute_notebook(path, settings.output, folder)}")
    if len(results.missing) or not results.states.get("finished"):
        what = f"{len(results.missing)} points are missing" if len(results.missing) else "no run finished"
        print(f"error: {what}; see the agents' logs", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    run_main(main)
