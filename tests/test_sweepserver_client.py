"""The real, unmodified W&B client against sweepserver: the CLI, agents, runs and `wandb.Api()`, as subprocesses.

The scenarios wait more than they compute (an agent asks every 5 s), so all of them are started at once and each test
looks at what its own one found.
"""

import contextlib
import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import sweepserver
from tests.sweepserver_helpers import Direct, agent, create_sweep, python, wandb

FLAGS = ("--agent-timeout", "12", "--stop-grace", "3")

SWEEP = """
program: program.py
method: grid
metric: {name: score, goal: maximize}
parameters:
  a: {values: [1, 2]}
  b: {values: [10, 20]}
command: ["${env}", "${interpreter}", "${program}"]
"""

PROGRAM = """
import time, wandb
run = wandb.init(job_type="test", group="g", tags=["t"])
a, b = run.config["a"], run.config["b"]
run.name = f"a{a}b{b}"
run.define_metric("acc", summary="max")
for step, acc in enumerate([0.1, 0.9, 0.5]):
    run.log({"acc": acc, "odd": float("nan") if step == 1 else step, "big": float("inf")})
run.summary["score"] = a + b / 100
print("the score is", a + b / 100)
run.log({"sizes": wandb.Table(columns=["layer", "bytes"], data=[["conv", 10 * a], ["fc", b]])})
open("weights.bin", "wb").write(bytes([a, b]) * 1000)
artifact = wandb.Artifact(f"model-a{a}b{b}", type="model", metadata={"a": a})
artifact.add_file("weights.bin")
run.log_artifact(artifact)
run.finish()
"""

SLOW = """
import pathlib, sys, time, wandb
run = wandb.init()
pathlib.Path(f"began-{run.config['a']}-{run.config['b']}-{run.id}").touch()
for step in range(8):
    run.log({"x": step})
    time.sleep(0.5)
run.summary["score"] = run.config["a"] * run.config["b"]
run.finish()
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with sweepserver.start(tmp_path_factory.mktemp("server"), *FLAGS) as running:
        yield running


@pytest.fixture(scope="module")
def found(server, tmp_path_factory):
    """Starts every scenario at once; a test waits for its own."""
    with ThreadPoolExecutor(len(SCENARIOS)) as pool:
        futures = {}
        for name, scenario in SCENARIOS.items():
            folder = tmp_path_factory.mktemp(name)
            (folder / "program.py").write_text(PROGRAM)
            (folder / "slow.py").write_text(SLOW)
            futures[name] = pool.submit(scenario, server, folder)
        yield lambda name: futures[name].result(timeout=400)


def wait_for(what, seconds: float = 120.0):
    end = time.monotonic() + seconds
    while not (value := what()):
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.1)
    return value


def finish(agents, seconds: float = 100.0) -> None:
    try:
        for process in agents:
            process.wait(timeout=seconds)
    finally:
        for process in agents:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def grid_of(server, sweep_path: str) -> list[tuple]:
    _, project, sweep = sweep_path.split("/")
    runs = Direct(server.url, server.key).runs(sweep, project)
    return sorted((run["params"]["a"], run["params"]["b"], run["state"]) for run in runs)


FINISHED = [(1, 10, "finished"), (1, 20, "finished"), (2, 10, "finished"), (2, 20, "finished")]

# -- scenarios --------------------------------------------------------------------------------------------------------

READ = """
import json, sys, wandb
api = wandb.Api()
sweep = api.sweep(sys.argv[1])
run = sweep.best_run()
artifact = api.artifact("local/read/model-a2b20:latest")
folder = artifact.download(root="down")
table = next(a for a in run.logged_artifacts() if a.type == "run_table").get("sizes")
user = wandb.init(project="read", config={"lr": 1})
user.use_artifact("model-a2b20:latest")
user.config.update({"late": 2})
user.finish()
again = wandb.init(project="read", id=user.id, resume="must")
resumed = wandb.Api().run(again.path).state
again.log({"resumed": again.starting_step})
again.finish()
mine = api.run(f"local/read/{user.id}")
mine.summary["extra"] = 5
mine.summary.update()
mine.tags, mine.config["new"] = ["x"], 7
mine.update()
mine = wandb.Api().run(f"local/read/{user.id}")
gone = wandb.init(project="read"); gone.finish()
api.run(f"local/read/{gone.id}").delete()
output = run.file("output.log").download(root="files").read()
print(json.dumps({
    "name": sweep.name, "state": sweep.state, "expected": sweep.expected_run_count,
    "runs": sorted([r.config["a"], r.config["b"], r.state, r.name, r.summary["score"], r.group, r.job_type, r.tags]
                   for r in sweep.runs),
    "best": run.name, "big": run.summary["big"], "acc": dict(run.summary["acc"]),
    "history": run.history(keys=["acc"], pandas=False), "frame": len(run.history()),
    "scan": [row for row in run.scan_history(keys=["odd", "big"])], "last": run.lastHistoryStep,
    "bytes": list(open(folder + "/weights.bin", "rb").read()[:2]), "metadata": artifact.metadata,
    "version": artifact.version, "table": table.data, "files": sorted(f.name for f in run.files()),
    "ordered": [r.name for r in api.runs("local/read", {"config.a": 2}, order="-config.b.value")],
    "filtered": len(api.runs("local/read", {"summary_metrics.score": {"$gt": 2}})),
    "projects": [p.name for p in api.projects("local") if p.name == "read"],
    "sweeps": [s.id for s in api.project("read", "local").sweeps()],
    "used": [a.name for a in mine.used_artifacts()], "used_by": [r.id for r in artifact.used_by()] == [user.id],
    "logged_by": artifact.logged_by().id == run.id, "resumed": [resumed, mine.summary.get("resumed") is not None],
    "updated": [mine.config, mine.summary["extra"], mine.tags],
    "deleted": len(api.runs("local/read", {"name": gone.id})), "console": output,
}))
"""


def read_back(server, folder):
    path = create_sweep(server, folder, SWEEP, "read", "--name", "two by two")
    finish([agent(server, folder, path), agent(server, folder, path)])
    return path, python(server, folder, READ, path)


def killed_agent(server, folder):
    """One agent is killed with its run in the middle of it, then another without; a third one does the rest."""
    path = create_sweep(server, folder, SWEEP.replace("program.py", "slow.py"), "killed")
    victim, orphaner = agent(server, folder, path), agent(server, folder, path)
    wait_for(lambda: len(list(folder.glob("began-*"))) == 2)
    for pid in descendants(victim.pid):
        os.kill(pid, signal.SIGKILL)
    orphaner.kill()
    [process.wait() for process in (victim, orphaner)]
    finish([agent(server, folder, path)])
    return path, grid_of(server, path)


def descendants(pid: int) -> list[int]:
    """A process and all below it, whichever process groups they are in."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found


def killed_run(server, folder):
    """The program kills itself with SIGKILL the first time that it gets a point; its agent lives on."""
    dies = PROGRAM.replace(
        "run.name =",
        """import os, pathlib, signal
flag = pathlib.Path(f"died-{a}-{b}")
if a == 1 and not flag.exists():
    flag.touch()
    os.kill(os.getpid(), signal.SIGKILL)
run.name =""",
    )
    (folder / "program.py").write_text(dies)
    path = create_sweep(server, folder, SWEEP, "crash")
    finish([agent(server, folder, path), agent(server, folder, path)])
    return path, grid_of(server, path)


def killed_server(_, folder):
    """kill -9 of the server in the middle of two runs; a new one on the same folder and port goes on."""
    data = folder / "data"
    own = sweepserver.launch(data, *FLAGS)
    try:
        path = create_sweep(own, folder, SWEEP.replace("program.py", "slow.py"), "served")
        agents = [agent(own, folder, path), agent(own, folder, path)]
        wait_for(lambda: len(list(folder.glob("began-*"))) == 2)
        time.sleep(1)
    finally:
        own.process.kill()  # SIGKILL
        own.process.wait()
    time.sleep(3)
    with sweepserver.start(data, *FLAGS, port=int(own.url.rsplit(":", 1)[1])) as again:
        finish(agents)
        return path, grid_of(again, path)


def controlled(server, folder):
    """--pause, --resume, --cancel while an agent works; --update and --stop with none; what each one left behind."""
    (folder / "slow.py").write_text(SLOW.replace("range(8)", "range(90 if pathlib.Path('paused').exists() else 6)"))
    path = create_sweep(server, folder, SWEEP.replace("program.py", "slow.py"), "control")
    direct, name = Direct(server.url, server.key), path.split("/")[2]
    seen = {}
    worker = agent(server, folder, path)
    wait_for(lambda: list(folder.glob("began-*")))
    assert wandb(server, folder, "sweep", "--pause", path).returncode == 0
    wait_for(lambda: [run for run in direct.runs(name, "control") if run["state"] == "finished"])
    wait_for(lambda: not [run for run in direct.runs(name, "control") if run["state"] in ("pending", "running")])
    before = len(direct.runs(name, "control"))
    time.sleep(7)  # longer than the agent's poll
    seen["paused"] = (direct.state(name, "control"), len(direct.runs(name, "control")) - before)
    (folder / "paused").touch()  # from here on a run takes long
    assert wandb(server, folder, "sweep", "--resume", path).returncode == 0
    wait_for(lambda: len(list(folder.glob("began-*"))) > before)
    assert wandb(server, folder, "sweep", "--cancel", path).returncode == 0
    finish([worker], 100)
    seen["cancelled"] = (direct.state(name, "control"), grid_of(server, path))
    other = create_sweep(server, folder, SWEEP, "control")
    (folder / "sweep.yaml").write_text(SWEEP.replace("[1, 2]", "[1, 2, 3]"))
    seen["update"] = wandb(server, folder, "sweep", "--update", other, "sweep.yaml").returncode
    assert wandb(server, folder, "sweep", "--stop", other).returncode == 0
    finish([agent(server, folder, other)], 100)
    seen["stopped"] = (direct.state(other.split("/")[2], "control"), grid_of(server, other))
    seen["twice"] = wandb(server, folder, "sweep", "--stop", other).stdout
    return seen


IN_PROCESS = """
import json, wandb
def train():
    run = wandb.init()
    run.log({"y": run.config["x"] ** 2})
sweep = wandb.sweep({"method": "random", "run_cap": 2, "metric": {"name": "y", "goal": "minimize"},
                     "parameters": {"x": {"min": -1.0, "max": 1.0}}}, project="inproc")
wandb.agent(sweep, train, project="inproc", count=2)
runs = wandb.Api().sweep(f"local/inproc/{sweep}").runs
print(json.dumps([[r.state, abs(r.config["x"] ** 2 - r.summary["y"]) < 1e-9, r.summary["y"]] for r in runs]))
"""

MEDIA = """
import json, numpy, wandb
run = wandb.init(project="media", settings=wandb.Settings(save_code=True))
run.log({"image": wandb.Image(numpy.zeros((4, 4, 3), dtype="uint8")), "page": wandb.Html("<b>x</b>")})
open("extra.txt", "w").write("kept")
run.save("extra.txt")
for i in range(2):
    artifact = wandb.Artifact("data", type="dataset")
    with artifact.new_file("a.txt") as file:
        file.write("same")
    with artifact.new_file(f"b.txt") as file:
        file.write(f"version {i}")
    run.log_artifact(artifact, aliases=[f"number-{i}"]).wait()
run.finish()
run = wandb.Api().run(f"local/media/{run.id}")
api = wandb.Api()
first, latest = api.artifact("local/media/data:v0"), api.artifact("local/media/data:latest")
first.description, first.metadata["k"] = "old", 1
first.aliases.append("kept")
first.save()
again = api.artifact("local/media/data:kept")
latest.delete(delete_aliases=True)
print(json.dumps({"files": sorted(f.name.split("_")[0] for f in run.files()),
    "versions": [first.version, latest.version], "aliases": [first.aliases, latest.aliases],
    "b": open(first.download(root="one") + "/b.txt").read(), "a": open(first.download(root="one") + "/a.txt").read(),
    "again": [again.version, again.description, again.metadata],
    "left": [a.version for a in api.artifacts("dataset", "local/media/data")],
    "extra": run.file("extra.txt").download(root="two").read()}))
"""


VERSIONS = """
import datetime, json, os, wandb
run, api = wandb.init(project="versions"), wandb.Api()
def log(artifact, **files):
    for name, text in files.items():
        with artifact.new_file(name) as file:
            file.write(text)
    return run.log_artifact(artifact).wait()
def new(name, **more):
    return wandb.Artifact(name, type="data", **more)
def named(name):
    return api.artifact(f"local/versions/{name}")
log(log(new("kept"), one="1").new_draft(), two="2")
for text in "0120":
    log(new("moved"), x=text)
for name in "abc":
    log(new("grown", incremental=True), **{name: name})
table = wandb.Table(columns=["x"], log_mode="INCREMENTAL")
for x in range(3):
    table.add_data(x)
    run.log({"rows": table})
open("far.txt", "w").write("far")
far = new("far")
far.add_reference("file://" + os.path.abspath("far.txt"))
far.add_reference(named("kept:v1").get_entry("two").ref_url(), name="two")
log(far, near="near")
refused = []
for ttl, aliases, way in ((1, [], run.log_artifact), (0, ["v7"], run.log_artifact), (0, [], run.upsert_artifact)):
    artifact = new("refused")
    if ttl:
        artifact.ttl = datetime.timedelta(days=ttl)
    try:
        way(artifact, aliases=aliases, **({} if way == run.log_artifact else {"distributed_id": "g"})).wait()
    except ValueError as error:
        refused.append(str(error))
run.finish()
far = named("far:v0")
folder = far.download(root="far")
far = [{name: open(f"{folder}/{name}").read() for name in sorted(os.listdir(folder))}, len(far.files())]
named("kept:v0").delete(delete_aliases=True)
named("moved:v1").delete()
kept, grown = named("kept:v1"), named("grown:latest")
other = wandb.init(project="versions")
again = other.log_artifact(kept.new_draft()).wait().version
other.finish()
folder = kept.download(root="kept")
kept.verify(folder)  # the digest is the client's own
grown.verify(grown.download(root="grown"))
rows = named(f"run-{run.id}-incr-rows:latest")
changed = api.artifact_collection("data", "local/versions/moved")
changed.name, changed.description, changed.type, changed.tags = "renamed", "text", "other", ["a", "b"]
changed.save()
changed.tags = ["b"]
changed.save()
changed = wandb.Api().artifact_collection("other", "local/versions/renamed")
api.artifact_collection("data", "local/versions/grown").delete()
print(json.dumps({
    "kept": [open(f"{folder}/{name}").read() for name in ("one", "two")], "files": sorted(f.name for f in kept.files()),
    "again": [again, [a.name for a in api.run(f"local/versions/{other.id}").logged_artifacts()]],
    "latest": named("renamed:latest").version, "grown": [sorted(grown.manifest.entries), grown.version],
    "far": far, "refused": refused, "rows": rows.get(sorted(rows.manifest.entries)[-1]).data,
    "changed": [changed.name, changed.description, changed.type, changed.tags],
    "left": sorted(c.name for c in wandb.Api().artifact_type("data", "local/versions").collections())}))
"""

TWICE = """
import json, os, subprocess, sys, wandb
for count, more in ((5, {}), (2, {}), (1, {"resume": "must"})):
    run = wandb.init(project="twice", id="same", **more)
    for i in range(count):
        run.log({"a": {"b": count + i / 10, "c": {"d": i}}})
    run.finish()
def go(name, *steps, **more):
    run = wandb.init(project="twice", id=name, **more)
    for step in steps:
        run.log({"x": step}, step=step)
    run.finish()
    return os.path.dirname(run.dir)
def steps(name):
    return [row["_step"] for row in wandb.Api().run(f"local/twice/{name}").scan_history()]
kept = go("kept", 0, 1)
go("later", 0, 1, 2)
go("later", 7)
go("kept", 5, resume="must")
sync = [sys.executable, "-m", "wandb", "sync", "--yes", "--include-online", "--include-synced", kept]
subprocess.run(sync, check=True, capture_output=True)
try:
    wandb.init(project="twice", fork_from="kept?_step=0")
    forked = ""
except wandb.Error as error:
    forked = str(error)
run = wandb.Api().run("local/twice/same")
whole = [[row["_step"], row["a.b"], row["a.c.d"]] for row in run.scan_history()]
print(json.dumps({"whole": whole, "later": steps("later"), "kept": steps("kept"), "forked": forked,
    "frame": len(run.history()), "last": run.lastHistoryStep,
    "sampled": [row["a.b"] for row in run.history(keys=["a.b"], pandas=False)],
    "scan": [row["a.c.d"] for row in run.scan_history(keys=["a.c.d"])],
    "mine": [len(wandb.Api().runs("local/twice", {"username": name})) for name in (run.user.username, "other")]}))
"""


def versions(server, folder):
    return python(server, folder, VERSIONS)


def twice(server, folder):
    return python(server, folder, TWICE)


def in_process(server, folder):
    return python(server, folder, IN_PROCESS)


def media(server, folder):
    return python(server, folder, MEDIA)


def wrong_key(server, folder):
    (folder / "sweep.yaml").write_text(SWEEP)
    return wandb(server, folder, "sweep", "--project", "p", "sweep.yaml", WANDB_API_KEY="f" * 40)


def refused(server, folder):
    (folder / "sweep.yaml").write_text(SWEEP.replace("values: [1, 2]", "min: 0.0, max: 1.0"))
    return wandb(server, folder, "sweep", "--project", "p", "sweep.yaml")


SCENARIOS = {
    scenario.__name__: scenario
    for scenario in (
        killed_server,
        killed_agent,
        controlled,
        read_back,
        killed_run,
        in_process,
        media,
        versions,
        twice,
        wrong_key,
        refused,
    )
}

# -- what they must have found ----------------------------------------------------------------------------------------


def test_a_wrong_key_is_refused(found):
    done = found("wrong_key")
    assert done.returncode != 0 and "wrong or missing API key" in done.stdout, done.stdout


def test_a_bad_configuration_is_refused_with_its_reason(found):
    done = found("refused")
    assert done.returncode != 0 and "a grid needs value" in done.stdout, done.stdout


def test_agent_in_process(found):
    rows = found("in_process")
    assert [row[:2] for row in rows] == [["finished", True]] * 2 and rows[0][2] != rows[1][2]


def test_media_code_files_and_artifact_versions(found):
    seen = found("media")
    assert {"extra.txt", "media/images/image", "media/html/page", "config.yaml"} <= set(seen["files"])
    assert seen["versions"] == ["v0", "v1"] and (seen["a"], seen["b"], seen["extra"]) == ("same", "version 0", "kept")
    assert set(seen["aliases"][0]) == {"number-0", "kept"} and set(seen["aliases"][1]) == {"number-1", "latest"}
    assert seen["again"] == ["v0", "old", {"k": 1}] and seen["left"] == ["v0"]


def test_a_version_outlives_the_others_and_holds_what_it_adds_to(found):
    seen = found("versions")
    assert seen["kept"] == ["1", "2"] and seen["files"] == ["one", "two"]  # the draft's base is deleted
    assert seen["again"] == ["v1", ["kept:v1"]]  # the same content by another run: no new version
    assert seen["latest"] == "v0"  # the last one logged has its content, and v1 is deleted
    assert seen["grown"] == [["a", "b", "c"], "v2"] and seen["rows"] == [[0], [1], [2]]
    assert seen["changed"] == ["renamed", "text", "other", ["b"]] and seen["left"] == ["far", "kept"]


def test_references_are_downloaded_and_what_an_artifact_cannot_be_is_refused(found):
    seen = found("versions")
    assert seen["far"] == [{"far.txt": "far", "near": "near", "two": "2"}, 3]
    assert [word in line for word, line in zip(("ttl", "'v7'", "upsert_artifact"), seen["refused"], strict=True)] == [
        True
    ] * 3


def test_a_run_begun_anew_under_its_id_has_one_history_and_nested_metrics_have_dotted_names(found):
    seen = found("twice")
    assert [row[1:] for row in seen["whole"]] == [[2.0, 0], [2.1, 1], [1.0, 0]] and seen["frame"] == 3
    assert [row[0] for row in seen["whole"]] == [0, 1, seen["last"]] and seen["last"] > 1
    assert seen["sampled"] == [2.0, 2.1, 1.0] and seen["scan"] == [0, 1, 0] and seen["mine"] == [3, 0]
    assert seen["later"] == [7] and seen["kept"] == [0, 1, 5]  # a sync of the first two takes nothing from the third
    assert "fork_from" in seen["forked"]


def test_a_sweep_of_two_agents_is_read_back_through_the_api(found):
    path, seen = found("read_back")
    want = [[a, b, "finished", f"a{a}b{b}", a + b / 100, "g", "test", ["t"]] for a in (1, 2) for b in (10, 20)]
    assert seen["runs"] == want
    assert (seen["name"], seen["state"], seen["expected"], seen["best"]) == ("two by two", "FINISHED", 4, "a2b20")
    assert seen["acc"] == {"max": 0.9} and seen["big"] == "Infinity"
    assert [row["acc"] for row in seen["history"]] == pytest.approx([0.1, 0.9, 0.5])
    assert [(row["odd"], row["big"]) for row in seen["scan"]] == [(0, "Infinity"), ("NaN", "Infinity"), (2, "Infinity")]
    assert (seen["frame"], seen["last"]) == (4, 3)
    assert seen["bytes"] == [2, 20] and seen["metadata"] == {"a": 2} and seen["version"] == "v0"
    assert seen["table"] == [["conv", 20], ["fc", 20]]
    assert {"config.yaml", "requirements.txt", "wandb-metadata.json", "wandb-summary.json"} <= set(seen["files"])
    assert seen["ordered"] == ["a2b20", "a2b10"] and seen["filtered"] == 2
    assert seen["projects"] == ["read"] and seen["sweeps"] == [path.split("/")[2]]
    assert seen["used"] == ["model-a2b20:v0"] and seen["used_by"] and seen["logged_by"]
    assert seen["resumed"] == ["running", True]
    assert "the score is 2.2" in seen["console"]
    assert seen["updated"] == [{"lr": 1, "late": 2, "new": 7}, 5, ["x"]] and seen["deleted"] == 0


def test_a_run_that_kills_itself_is_handed_out_again(found):
    _, grid = found("killed_run")
    assert grid == sorted([*FINISHED, (1, 10, "crashed"), (1, 20, "crashed")])


def test_an_agent_killed_in_the_middle_of_a_run_loses_nothing(found):
    _, grid = found("killed_agent")
    assert [row for row in grid if row[2] == "finished"] == FINISHED
    assert [row[2] for row in grid if row[2] != "finished"] == ["crashed"]  # the orphan finished and counts


def test_a_server_killed_in_the_middle_of_a_sweep_loses_nothing(found):
    _, grid = found("killed_server")
    assert grid == FINISHED  # nobody was lost, so nothing was done twice


def test_pause_resume_cancel_update_and_stop(found):
    seen = found("controlled")
    assert seen["paused"] == ("PAUSED", 0)
    state, grid = seen["cancelled"]
    assert state == "CANCELED" and {row[2] for row in grid} == {"finished", "killed"}
    assert seen["update"] == 0 and seen["stopped"] == ("FINISHED", [])
    assert "already finished" in seen["twice"]


def test_nothing_left_the_machine_and_no_error_lines(found, tmp_path_factory):
    found("read_back")
    logs = list(tmp_path_factory.getbasetemp().glob("read_back0/agent-*.log"))
    assert len(logs) == 2
    for log in logs:
        text = log.read_text()
        assert "ERROR" not in text and "wandb.ai" not in text, text


def test_sweep_and_run_pages_are_where_the_client_says(found, server):
    path, _ = found("read_back")
    direct = Direct(server.url, server.key)
    entity, project, sweep = path.split("/")
    run = direct.runs(sweep, project)[0]["name"]
    for address, word in (
        (f"/{entity}/{project}", sweep),
        (f"/{entity}/{project}/sweeps/{sweep}", "two by two"),
        (f"/{entity}/{project}/runs/{run}", "wandb-metadata.json"),
    ):
        status, _, body = direct.request("GET", address)
        assert status == 200 and word in body.decode()
    data = json.loads(direct.request("GET", f"/{entity}/{project}/sweeps/{sweep}/data")[2])
    assert not data["live"] and data["figures"]["heatmap"]["data"][0]["z"] == [[1.1, 1.2], [2.1, 2.2]]
