"""What the tests of sweepserver share: the unmodified client as a subprocess, and a small client of its protocol."""

import base64
import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

HEARTBEAT = (
    'mutation Heartbeat($id: ID!, $runState: JSONString) { agentHeartbeat(input: {id: $id, metrics: "{}", '
    "runState: $runState}) { agent { id } commands } }"
)
UPSERT_SWEEP = (
    "mutation UpsertSweep($id: ID, $config: String, $project: String, $state: String) { "
    "upsertSweep(input: {id: $id, config: $config, projectName: $project, state: $state}) { "
    "sweep { name state } configValidationWarnings } }"
)
CREATE_AGENT = (
    'mutation CreateAgent($sweep: String!) { createAgent(input: {host: "here", sweep: $sweep}) { agent { id } } }'
)
UPSERT_RUN = (
    "mutation UpsertBucket($name: String, $project: String, $sweep: String, $config: JSONString) { "
    'upsertBucket(input: {name: $name, modelName: $project, sweep: $sweep, config: $config, host: "here", '
    'jobProgram: "p.py"}) { bucket { id name displayName } inserted } }'
)


def environment(server, folder: Path, **extra: str) -> dict[str, str]:
    """The environment of a client that knows this server alone and keeps everything in `folder`."""
    own = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    places = {
        name: str(folder / "client")
        for name in ("HOME", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR", "WANDB_ARTIFACT_DIR")
    }
    (folder / "client").mkdir(parents=True, exist_ok=True)
    path = f"{Path(sys.executable).parent}{os.pathsep}{own.get('PATH', '')}"  # the agent's ${interpreter} is `python`
    return {
        **own,
        **places,
        **server.env,
        "PATH": path,
        "WANDB_ERROR_REPORTING": "false",
        "WANDB_DIR": str(folder),
        "WANDB_AGENT_DISABLE_FLAPPING": "true",
        "WANDB__DISABLE_STATS": "true",
        **extra,
    }


def wandb(server, folder: Path, *arguments: str, **extra: str) -> subprocess.CompletedProcess:
    """`wandb ...` to its end; stdout and stderr come together."""
    return subprocess.run(
        [sys.executable, "-m", "wandb", *arguments],
        cwd=folder,
        text=True,
        timeout=240,
        env=environment(server, folder, **extra),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def agent(server, folder: Path, path: str, *flags: str) -> subprocess.Popen:
    """A `wandb agent` in a process group of its own, so that a test can kill it with its run."""
    log = (folder / f"agent-{len(list(folder.glob('agent-*')))}.log").open("w")
    return subprocess.Popen(
        [sys.executable, "-m", "wandb", "agent", *flags, path],
        cwd=folder,
        stdout=log,
        stderr=log,
        env=environment(server, folder),
        start_new_session=True,
    )


def python(server, folder: Path, program: str, *arguments: str) -> dict:
    """Runs a program with the real client; answers the JSON of its last line of output."""
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=240,
        env=environment(server, folder, WANDB_SILENT="true"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def create_sweep(server, folder: Path, config: str, project: str, *flags: str) -> str:
    """Writes the configuration, creates the sweep with the real client, answers entity/project/id."""
    (folder / "sweep.yaml").write_text(config)
    done = wandb(server, folder, "sweep", "--project", project, *flags, "sweep.yaml")
    assert done.returncode == 0, done.stdout
    return next(line.split("wandb agent ")[1].strip() for line in done.stdout.splitlines() if "wandb agent " in line)


class Direct:
    """Speaks the protocol itself, for what need not cost two seconds a run."""

    def __init__(self, url: str, key: str):
        self.url = url
        self.headers = {"Authorization": "Basic " + base64.b64encode(f"api:{key}".encode()).decode()}

    def request(self, method: str, path: str, body: bytes | None = None, headers: dict | None = None):
        """(status, headers, body) whatever the status; `path` may be a whole address."""
        address = path if path.startswith("http") else self.url + path
        request = urllib.request.Request(
            address, data=body, method=method, headers=self.headers if headers is None else headers
        )
        try:
            with urllib.request.build_opener(_NoRedirect).open(request, timeout=30) as answer:
                return answer.status, answer.headers, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.headers, error.read()

    def graphql(self, query: str, **variables) -> dict:
        text = json.dumps({"query": query, "variables": variables}).encode()
        status, _, body = self.request("POST", "/graphql", text)
        return {"status": status, **json.loads(body)}

    def ask(self, query: str, **variables) -> dict:
        answer = self.graphql(query, **variables)
        assert answer["status"] == 200 and "errors" not in answer, answer
        return answer["data"]

    def sweep(self, config: str, project: str = "p") -> str:
        return self.ask(UPSERT_SWEEP, config=config, project=project)["upsertSweep"]["sweep"]["name"]

    def set_state(self, sweep: str, state: str) -> None:
        self.ask(UPSERT_SWEEP, id=sweep, state=state)

    def agent(self, sweep: str) -> str:
        return self.ask(CREATE_AGENT, sweep=sweep)["createAgent"]["agent"]["id"]

    def beat(self, agent: str, *alive: str) -> list[dict]:
        states = json.dumps({name: True for name in alive})
        return json.loads(self.ask(HEARTBEAT, id=agent, runState=states)["agentHeartbeat"]["commands"])

    def begin(self, run: str, sweep: str | None = None, project: str = "p") -> dict:
        return self.ask(UPSERT_RUN, name=run, project=project, sweep=sweep)["upsertBucket"]["bucket"]

    def stream(self, run: str, project: str = "p", **body) -> dict:
        text = json.dumps(body).encode()
        status, _, answer = self.request("POST", f"/files/local/{project}/{run}/file_stream", text)
        assert status == 200, answer
        return json.loads(answer)

    def finish(self, run: str, project: str = "p", exit_code: int = 0, summary: dict | None = None) -> None:
        files = {"wandb-summary.json": {"offset": 0, "content": [json.dumps(summary)]}} if summary else {}
        self.stream(run, project, files=files, complete=True, exitcode=exit_code)

    def state(self, sweep: str, project: str = "p") -> str:
        query = "query Q($p: String, $s: String!) { project(name: $p) { sweep(sweepName: $s) { state } } }"
        return self.ask(query, p=project, s=sweep)["project"]["sweep"]["state"]

    def runs(self, sweep: str, project: str = "p") -> list[dict]:
        query = (
            "query Runs($p: String!, $f: JSONString) { project(name: $p) { runs(filters: $f, first: 1000) { "
            "edges { node { id name state config summaryMetrics } } } } }"
        )
        answer = self.ask(query, p=project, f=json.dumps({"sweep": sweep}))
        nodes = [edge["node"] for edge in answer["project"]["runs"]["edges"]]
        for node in nodes:
            config = json.loads(node["config"])
            node["params"] = {key: config[key]["value"] for key in config if key != "_wandb"}
        return nodes


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_):
        return None
