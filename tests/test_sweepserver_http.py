"""A running sweepserver asked over HTTP by a small client: hand-out, loss and return of points, permissions."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

import sweepserver
from tests.sweepserver_helpers import Direct

ROOT = Path(__file__).parent.parent
GRID = "method: grid\nparameters: {{a: {{values: [{}]}}}}"
FLAGS = ("--agent-timeout", "1.5", "--stop-grace", "0.5", "--max-upload-mb", "1")


def grid(count: int) -> str:
    return GRID.format(", ".join(map(str, range(count))))


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with sweepserver.start(tmp_path_factory.mktemp("server"), *FLAGS) as running:
        yield running


@pytest.fixture(scope="module")
def direct(server):
    return Direct(server.url, server.key)


def take(direct, agent) -> dict:
    """The run that the agent is given."""
    (command,) = direct.beat(agent)
    assert command["type"] == "run"
    return command


def a(command) -> int:
    return command["args"]["a"]["value"]


# -- hand-out ---------------------------------------------------------------------------------------------------------


def test_eight_agents_at_once_get_every_point_exactly_once(direct):
    sweep = direct.sweep(grid(48))
    got, gate = [], threading.Barrier(8)

    def work():
        agent = direct.agent(sweep)
        gate.wait()
        while True:
            commands = direct.beat(agent)
            if commands and commands[0]["type"] == "exit":
                return
            for command in commands:
                got.append(a(command))
                direct.begin(command["run_id"], sweep)
                direct.finish(command["run_id"])

    threads = [threading.Thread(target=work) for _ in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert sorted(got) == list(range(48)) and direct.state(sweep) == "FINISHED"
    assert Counter(run["state"] for run in direct.runs(sweep)) == {"finished": 48}


def test_a_run_gone_without_a_word_is_handed_out_again_two_times_and_then_given_up(direct):
    sweep = direct.sweep(grid(1))
    agent = direct.agent(sweep)
    for _ in range(3):
        assert a(take(direct, agent)) == 0  # and the next heartbeat does not name it: it has crashed
    assert direct.beat(agent) == [{"type": "exit"}]
    assert [run["state"] for run in direct.runs(sweep)] == ["crashed"] * 3 and direct.state(sweep) == "FINISHED"
    direct.set_state(sweep, "RUNNING")  # `wandb sweep --resume`: another chance
    command = take(direct, agent)
    direct.begin(command["run_id"], sweep)
    direct.finish(command["run_id"])
    assert direct.state(sweep) == "FINISHED"


def test_a_run_whose_own_program_failed_is_not_tried_again_but_an_interrupted_one_is(direct):
    sweep = direct.sweep(grid(2))
    agent = direct.agent(sweep)
    for exit_code in (1, 255, 0):
        command = take(direct, agent)
        direct.begin(command["run_id"], sweep)
        direct.finish(command["run_id"], exit_code=exit_code)
    assert direct.beat(agent) == [{"type": "exit"}]
    assert [(r["params"]["a"], r["state"]) for r in direct.runs(sweep)] == [
        (0, "failed"),
        (1, "killed"),
        (1, "finished"),
    ]


def test_a_preempted_run_comes_back_and_costs_no_retry(direct):
    sweep = direct.sweep(grid(1))
    agent = direct.agent(sweep)
    for _ in range(4):
        command = take(direct, agent)
        direct.begin(command["run_id"], sweep)
        direct.stream(command["run_id"], preempting=True)
    direct.beat(agent)
    assert {run["state"] for run in direct.runs(sweep)[:-1]} == {"preempted"}


def test_an_idle_agent_waits_while_a_point_may_still_come_back(direct):
    sweep = direct.sweep(grid(1))
    first, second = direct.agent(sweep), direct.agent(sweep)
    command = take(direct, first)
    assert direct.beat(second) == []
    direct.begin(command["run_id"], sweep)
    assert direct.beat(first, command["run_id"]) == [] and direct.beat(second) == []
    direct.finish(command["run_id"])
    assert direct.beat(second) == [{"type": "exit"}]


def test_a_silent_run_is_given_to_another_and_the_first_to_finish_counts(direct):
    sweep = direct.sweep(grid(1))
    silent, other = direct.agent(sweep), direct.agent(sweep)
    lost = take(direct, silent)["run_id"]
    direct.begin(lost, sweep)
    commands, end = [], time.monotonic() + 10
    while not commands and time.monotonic() < end:
        commands = direct.beat(other)
        time.sleep(0.2)
    second = commands[0]["run_id"]
    direct.begin(second, sweep)
    direct.finish(lost, summary={"x": 1})  # it was only asleep
    assert direct.stream(second)["stopped"] is True
    direct.finish(second, exit_code=255)
    states = {run["name"]: run["state"] for run in direct.runs(sweep)}
    assert states == {lost: "finished", second: "killed"} and direct.state(sweep) == "FINISHED"


def test_pause_stop_and_cancel(direct):
    sweep = direct.sweep(grid(9))
    agent = direct.agent(sweep)
    run = take(direct, agent)["run_id"]
    direct.begin(run, sweep)
    direct.set_state(sweep, "PAUSED")
    direct.finish(run)
    assert direct.beat(agent) == [] and direct.state(sweep) == "PAUSED"
    direct.set_state(sweep, "RUNNING")
    run = take(direct, agent)["run_id"]
    direct.begin(run, sweep)
    direct.set_state(sweep, "CANCELED")
    assert direct.stream(run)["stopped"] is True  # the gentle way first
    assert direct.beat(agent, run) == []
    time.sleep(0.6)
    assert direct.beat(agent, run) == [{"type": "stop", "run_id": run}]
    assert direct.beat(agent, run) == []  # said once
    assert direct.beat(agent) == [{"type": "exit"}]
    assert [r["state"] for r in direct.runs(sweep)] == ["finished", "killed"]
    direct.set_state(sweep, "RUNNING")
    assert a(take(direct, agent)) == 1  # the cancelled point was not lost
    direct.set_state(sweep, "FINISHED")
    assert direct.beat(agent) == [{"type": "exit"}]


def test_a_changed_grid_keeps_the_points_that_it_shares_with_the_old_one(direct):
    sweep = direct.sweep(grid(3))
    agent = direct.agent(sweep)
    for _ in range(2):
        command = take(direct, agent)
        direct.begin(command["run_id"], sweep)
        direct.finish(command["run_id"])
    query = "mutation U($id: ID, $c: String) { upsertSweep(input: {id: $id, config: $c}) { sweep { name } } }"
    direct.ask(query, id=sweep, c=GRID.format("1, 5, 0"))
    command = take(direct, agent)
    assert a(command) == 5
    direct.begin(command["run_id"], sweep)
    direct.finish(command["run_id"])
    assert direct.beat(agent) == [{"type": "exit"}]


def done(direct, agent, sweep) -> int:
    """Runs the point that the agent is given."""
    command = take(direct, agent)
    direct.begin(command["run_id"], sweep)
    direct.finish(command["run_id"])
    return a(command)


def update(direct, sweep, config) -> None:
    direct.ask(
        "mutation U($id: ID, $c: String) { upsertSweep(input: {id: $id, config: $c}) { sweep { name } } }",
        id=sweep,
        c=config,
    )


def test_an_updated_random_sweep_repeats_no_draw_and_a_lower_run_cap_ends_it(direct):
    config = "method: random\nrun_cap: {}\nparameters: {{a: {{min: 0, max: 10000000}}}}"
    sweep = direct.sweep(config.format(9))
    agent = direct.agent(sweep)
    seen = [done(direct, agent, sweep) for _ in range(2)]
    update(direct, sweep, config.format(8))
    seen += [done(direct, agent, sweep) for _ in range(2)]
    assert len(set(seen)) == 4
    update(direct, sweep, config.format(3))
    assert direct.beat(agent) == [{"type": "exit"}] and direct.state(sweep) == "FINISHED"


def test_a_point_that_a_changed_grid_no_longer_holds_does_not_come_back(direct):
    sweep = direct.sweep(grid(2))
    agent = direct.agent(sweep)
    assert a(take(direct, agent)) == 0
    update(direct, sweep, GRID.format("1"))  # while 0 is out; then its run is gone
    assert done(direct, agent, sweep) == 1
    assert direct.beat(agent) == [{"type": "exit"}]


def test_run_cap_and_random_points_and_a_deleted_run(direct):
    sweep = direct.sweep("method: random\nrun_cap: 3\nparameters: {a: {min: 0, max: 10000000}}")
    agent, seen = direct.agent(sweep), []
    for _ in range(3):
        command = take(direct, agent)
        seen.append(a(command))
        direct.begin(command["run_id"], sweep)
        direct.finish(command["run_id"])
    assert direct.beat(agent) == [{"type": "exit"}] and len(set(seen)) == 3
    delete = "mutation D($id: ID!) { deleteRun(input: {id: $id}) { clientMutationId } }"
    direct.ask(delete, id=direct.runs(sweep)[1]["id"])
    direct.set_state(sweep, "RUNNING")
    assert a(take(direct, agent)) == seen[1]


@pytest.mark.skipif(not __import__("sweepserver.search").search.library(), reason="the sweeps package is not installed")
def test_bayes_and_hyperband_through_the_sweeps_package(direct):
    config = (
        "method: bayes\nmetric: {name: loss, goal: minimize}\nearly_terminate: {type: hyperband, min_iter: 2, "
        "eta: 2, strict: true}\nparameters: {x: {min: 0.0, max: 1.0}}"
    )
    sweep = direct.sweep(config)
    agents = [direct.agent(sweep) for _ in range(4)]
    runs = []
    for i, agent in enumerate(agents):
        command = take(direct, agent)
        assert 0 <= command["args"]["x"]["value"] <= 1
        runs.append(command["run_id"])
        direct.begin(runs[-1], sweep)
        lines = [json.dumps({"_step": step, "loss": float(i)}) for step in range(3)]
        direct.stream(runs[-1], files={"wandb-history.jsonl": {"offset": 0, "content": lines}})
    deadline = time.monotonic() + 12
    while not direct.stream(runs[3])["stopped"] and time.monotonic() < deadline:
        for agent, run in zip(agents, runs, strict=True):
            direct.beat(agent, run)
        time.sleep(0.5)
    assert direct.stream(runs[3])["stopped"] and not direct.stream(runs[0])["stopped"]


def test_a_bad_configuration_and_an_unknown_sweep_say_so(direct):
    answer = direct.graphql("mutation U($c: String) { upsertSweep(input: {config: $c}) { sweep { name } } }", c="x: 1")
    assert answer["status"] == 200 and "at least one parameter" in answer["errors"][0]["message"]
    query = 'mutation U($c: String) { upsertSweep(input: {config: $c, projectName: "refused"}) { sweep { name } } }'
    assert direct.graphql(query, c="x: 1")["errors"] and direct.ask('{ project(name: "refused") { id } }') == {
        "project": None
    }
    query = 'query SweepWithRuns($specs: [JSONString!]!) { project(name: "p") { sweep(sweepName: "nope") { id } } }'
    assert direct.ask(query, specs="{}") == {"project": {"sweep": None}}
    heartbeat = 'mutation { agentHeartbeat(input: {id: "nobody"}) { commands } }'
    assert direct.graphql(heartbeat)["status"] == 404  # the client reads this as: the sweep is gone


def test_a_killed_server_goes_on_where_it_was(tmp_path):
    server = sweepserver.launch(tmp_path, *FLAGS)
    direct = Direct(server.url, server.key)
    try:
        sweep = direct.sweep(grid(2))
        agent = direct.agent(sweep)
        command = take(direct, agent)
        direct.begin(command["run_id"], sweep)
        direct.stream(command["run_id"], files={"output.log": {"offset": 0, "content": ["a line"]}})
    finally:
        server.process.kill()  # SIGKILL
        server.process.wait()
    time.sleep(2)  # longer than --agent-timeout: nobody could be heard, so nobody is lost
    port = int(server.url.rsplit(":", 1)[1])
    with sweepserver.start(tmp_path, *FLAGS, port=port) as again:
        assert (again.key, again.url) == (server.key, server.url)
        assert direct.beat(agent, command["run_id"]) == []
        direct.finish(command["run_id"], summary={"x": 1})
        second = take(direct, agent)
        assert a(second) == 1
        assert [run["state"] for run in direct.runs(sweep)] == ["finished", "pending"]


# -- permissions ------------------------------------------------------------------------------------------------------


def test_the_clients_telemetry_is_told_that_it_is_not_wanted(direct):
    for path in ("/sdk/otel/v1/metrics", "/sdk/otel/v1/logs"):  # wandb/analytics/opentelemetry: it sends no key
        assert direct.request("POST", path, b"", {})[0] == 404


@pytest.mark.parametrize("method, path", [
    ("POST", "/graphql"), ("POST", "/files/local/p/x/file_stream"), ("GET", "/"), ("GET", "/local/p"),
    ("GET", "/files/local/p/x/output.log"), ("POST", "/link"), ("GET", "/upload/x"), ("GET", "/loginx"),
    ("GET", "/upload/x/sweeps/y"), ("GET", "/download/x/y"), ("GET", "/artifactsV2/default/local/x"),
    ("GET", "/local/p/sweeps/x/data"), ("PUT", "/upload/a/b"),
])  # fmt: skip
def test_every_request_without_the_key_is_refused(direct, method, path):
    for headers in (
        {},
        {"Authorization": "Basic YXBpOndyb25n"},
        {"Authorization": "Bearer x"},
        {"Authorization": "Basic ###"},
    ):
        assert direct.request(method, path, b"{}" if method != "GET" else None, headers)[0] == 401


def test_pages_open_with_a_link_that_works_once(direct):
    link = json.loads(direct.request("POST", "/link")[2])["url"]
    status, headers, _ = direct.request("GET", link, headers={})
    cookie = headers["set-cookie"]
    assert status == 303 and headers["location"] == "/" and "HttpOnly" in cookie and "SameSite=lax" in cookie
    with_cookie = {"Cookie": cookie.split(";")[0]}
    assert direct.request("GET", "/", headers=with_cookie)[0] == 200
    assert direct.request("POST", "/graphql", b"{}", with_cookie)[0] == 401  # a cookie only reads
    assert direct.request("GET", link, headers={})[0] == 401
    assert direct.request("GET", "/", headers={"Cookie": with_cookie["Cookie"][:-3] + "abc"})[0] == 401
    assert direct.request("POST", "/login", b"key=wrong&next=/", {})[0] == 401
    assert b"Sign in" in direct.request("GET", "/", headers={"Accept": "text/html"})[2]


@pytest.mark.parametrize("target", ["//evil.example", "https://evil.example", "/\\evil.example"])
def test_login_leads_nowhere_else(direct, server, target):
    body = f"key={server.key}&next={target}".encode()
    status, headers, _ = direct.request("POST", "/login", body, {})
    assert status == 303 and headers["location"] == "/"


def upload_address(direct, run: str, name: str) -> dict:
    query = (
        'mutation C($r: String!, $f: [String!]!) { createRunFiles(input: {entityName: "local", projectName: '
        '"p", runName: $r, files: $f}) { runID uploadHeaders files { name uploadUrl } } }'
    )
    return direct.graphql(query, r=run, f=[name])


def test_files_go_up_and_come_back_and_nothing_else_can_be_reached(direct, server, tmp_path_factory):
    direct.begin("files")
    for name in ("../../key", "/etc/passwd", "a/../../b"):
        assert "expected a relative path" in upload_address(direct, "files", name)["errors"][0]["message"]
    url = upload_address(direct, "files", "media/x.html")["data"]["createRunFiles"]["files"][0]["uploadUrl"]
    assert direct.request("PUT", url, b"<script>1</script>", {})[0] == 200  # the client sends no Authorization here
    assert direct.request("PUT", url[:-4] + "AAAA", b"x", {})[0] == 403
    status, _, body = direct.request("PUT", url, b"x" * (2**20 + 1), {})
    assert status == 413 and b"--max-upload-mb" in body
    status, headers, body = direct.request("GET", "/files/local/p/files/media/x.html")
    assert (status, body) == (200, b"<script>1</script>")
    assert headers["content-disposition"].startswith("attachment") and headers["content-security-policy"] == "sandbox"
    for path in (
        "/files/local/p/files/../../../../key",
        "/files/local/p/files/..%2f..%2fkey",
        "/static/../app.py",
        "/static/%2e%2e/app.py",
        "/static/..%2fapp.py",
        "/download/..%2f..%2fkey",
    ):
        assert direct.request("GET", path)[0] in (401, 404)


def test_bodies_are_bounded(direct):
    assert direct.request("POST", "/graphql", b" " * (64 * 2**20 + 1))[0] == 413


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{}",
        b"nonsense",
        b'{"query": 3}',
        b'{"query": "{ x"}',
        b"\xff\xfe",
        b'{"query": "{ viewer { ...F } } fragment F on User { id ...F }"}',
        b'{"files": []}',
        b'{"files": {"output.log": 3}}',
        b'{"exitcode": "x"}',
        b'{"query": "{ project { run { id } } }", "variables": [1]}',
        b'{"query": "mutation { createAgent(input: 3) { agent { id } } }"}',
        b'{"files": ' + b"[" * 100000,
        b'{"exitcode": 1e999}',
        b'{"files": {"wandb-summary.json": {"content": {"a": 1}}}}',
        b'{"files": {"output.log": {"content": ["x"], "offset": 9223372036854775808}}}',
        b'{"files": {"wandb-history.jsonl": {"content": ["{\\"_step\\": [1]}"]}}}',
    ],
)
def test_nonsense_never_gets_a_5xx(direct, body):
    status, _, text = direct.request("POST", "/graphql", body)
    assert status in (200, 400) and json.loads(text)["errors"]
    assert direct.request("POST", "/files/local/p/none/file_stream", body)[0] in (400, 404)
    direct.begin("nonsense")
    assert direct.request("POST", "/files/local/p/nonsense/file_stream", body)[0] in (200, 400)


@pytest.mark.parametrize("field, given, word", [
    ("createArtifact", {"distributedID": "g"}, "distributed artifacts"),
    ("createArtifact", {"ttlDurationSeconds": 60}, "artifact.ttl"),
    ("createArtifact", {"aliases": [{"alias": "v5"}]}, "alias 'v5'"),
    ("createArtifact", {"projectName": "a#b"}, "project 'a#b'"),
    ("updateArtifact", {"ttlDurationSeconds": 60}, "artifact.ttl"),
    ("updateArtifact", {"aliases": [{"alias": "v5"}]}, "alias 'v5'"),
    ("addAliases", {"aliases": [{"alias": "v5"}]}, "alias 'v5'"),
    ("upsertBucket", {"config": json.dumps({"_wandb": {"value": {"branch_point": {"run_id": "x", "step": 1}}}})},
     "fork_from"),
    ("upsertModel", {"name": "a/b"}, "project 'a/b'"), ("upsertBucket", {"modelName": "a?"}, "project 'a?'"),
    ("upsertSweep", {"config": grid(1), "projectName": "a:b"}, "project 'a:b'"),
])  # fmt: skip
def test_what_is_not_supported_is_refused_in_one_line(direct, field, given, word):
    create = "mutation C($i: CreateArtifactInput!) { createArtifact(input: $i) { artifact { id } } }"
    whole = {
        "entityName": "",
        "projectName": "p",
        "artifactCollectionName": "refused",
        "artifactTypeName": "t",
        "digest": "d",
    }  # no entity: as `wandb sync` asks
    key = direct.ask(create, i={**whole, "ttlDurationSeconds": -1})["createArtifact"]["artifact"]["id"]
    inputs = {
        "createArtifact": whole,
        "updateArtifact": {"artifactID": key},
        "addAliases": {"artifactID": key},
        "upsertBucket": {"name": "refused", "modelName": "p"},
    }
    answer = direct.graphql(
        f"mutation M($i: I!) {{ {field}(input: $i) {{ __typename }} }}", i={**inputs.get(field, {}), **given}
    )
    (error,) = answer["errors"]
    assert word in error["message"] and "\n" not in error["message"] and answer["data"] == {field: None}


def test_what_the_client_asks_of_a_server_before_it_goes_on(direct):
    info = direct.ask("{ serverInfo { features { name isEnabled } cliVersionInfo } }")["serverInfo"]
    assert {"name": "TOTAL_COUNT_IN_FILE_CONNECTION", "isEnabled": True} in info["features"]
    assert info["cliVersionInfo"]["max_cli_version"]
    direct.begin("dotted")
    url = upload_address(direct, "dotted", "sub/a.txt")["data"]["createRunFiles"]["files"][0]["uploadUrl"]
    assert direct.request("PUT", url, b"here", {})[0] == 200
    query = (
        '{ project(name: "p") { run(name: "dotted") { files(names: ["./sub/a.txt"]) { edges { node { '
        "name sizeBytes } } } } } }"
    )
    (edge,) = direct.ask(query)["project"]["run"]["files"]["edges"]
    assert edge["node"] == {"name": "sub/a.txt", "sizeBytes": 4}
    query = query.replace('names: ["./sub/a.txt"]', "pattern: $like")
    for like, count in (("sub/%", 1), ("%.t_t", 1), ("sub", 0), ("%", 1)):
        answer = direct.ask(f"query Q($like: String) {query}", like=like)
        assert len(answer["project"]["run"]["files"]["edges"]) == count, like


def test_an_unknown_operation_is_an_error_with_status_200(direct):
    answer = direct.graphql("query Newer { viewer { id } newThing(id: 1) { x } }")
    assert answer["status"] == 200 and answer["data"]["viewer"]["id"] and "newThing" in answer["errors"][0]["message"]
    assert direct.ask("{ viewer { id newField { x } } }")["viewer"]["newField"] is None


def test_text_from_a_run_is_escaped_and_nan_is_a_string(direct):
    evil = "<script>alert(1)</script>"
    direct.ask(
        'mutation U($c: JSONString, $n: String) { upsertBucket(input: {name: "evil", modelName: "p", '
        "displayName: $n, config: $c, host: $n, notes: $n, groupName: $n, jobProgram: $n}) { bucket { id } } }",
        n=evil,
        c=json.dumps({evil: {"value": evil}}),
    )
    direct.stream(
        "evil",
        files={
            "output.log": {"offset": 0, "content": [f"ERROR {evil}"]},
            "wandb-summary.json": {"offset": 0, "content": [f'{{"{evil}": "{evil}", "x": NaN, "y": -Infinity}}']},
            "wandb-history.jsonl": {"offset": 0, "content": [f'{{"_step": 0, "{evil}": 1.0, "x": NaN}}']},
        },
    )
    for path in ("/local/p", "/local/p/runs/evil"):
        status, headers, body = direct.request("GET", path)
        assert status == 200 and b"<script>alert" not in body and b"&lt;script&gt;alert" in body
        assert "script-src 'self'" in headers["content-security-policy"]
    data = json.loads(direct.request("GET", "/local/p/runs/evil/data")[2])
    assert "<script>alert" not in "".join(data["parts"].values()) and "<script" not in json.dumps(data["curves"][evil])
    query = '{ project(name: "p") { run(name: "evil") { summaryMetrics history(samples: 9) } } }'
    run = direct.ask(query)["project"]["run"]
    summary = json.loads(run["summaryMetrics"], parse_constant=lambda text: pytest.fail(f"bare {text}"))
    assert (summary["x"], summary["y"], json.loads(run["history"][0])["x"]) == ("NaN", "-Infinity", "NaN")


# -- the command line -------------------------------------------------------------------------------------------------


def command(*flags: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "sweepserver", *flags], cwd=ROOT, capture_output=True, text=True, timeout=30
    )


def broken_folders(tmp_path):
    """Flags that name a data folder in which something is not what the server put there, and words of its answer."""
    for what, word in {
        "bytes": "sweepserver.sqlite is damaged (file is not a database); move it away",
        "sqlite": "sweepserver.sqlite cannot be used",
        "key": "key is no file; move it away",
        "key bytes": "key holds no key of 40 letters",
        "blobs": "blobs is no folder; move it away",
    }.items():
        folder = tmp_path / what
        folder.mkdir()
        if what == "bytes":
            (folder / "sweepserver.sqlite").write_bytes(b"\x01\x02\xff" * 4000)
        elif what == "key bytes":
            (folder / "key").write_bytes(b"\xff\xfe" * 40)
            (folder / "key").chmod(0o600)
        elif what == "blobs":
            (folder / "blobs").write_text("")
        else:
            (folder / {"sqlite": "sweepserver.sqlite", "key": "key"}[what]).mkdir()
        yield ("--port", "0", "--data-dir", str(folder)), word


def test_bad_input_gets_one_line_and_exit_code_2(server, tmp_path):
    folder = Path(server_folder(server))
    (tmp_path / "file").write_text("")
    (tmp_path / "server.json").write_text("[1]")
    port = server.url.rsplit(":", 1)[1]
    for flags, word in [
        (("--port", port, "--data-dir", str(tmp_path / "d")), "--port"),
        (("--port", "0", "--data-dir", str(tmp_path / "file" / "x")), "--data-dir"),
        (("--port", "0", "--data-dir", str(folder)), "in use"),
        (("--port", "70000", "--data-dir", str(tmp_path / "d")), "--port"),
        (("--host", "nowhere.invalid", "--data-dir", str(tmp_path / "d")), "--host"),
        (("--port", "x"), "--port"),
        (("--nonsense",), "--nonsense"),
        (("start",), "start"),
        (("--agent-timeout", "nan"), "--agent-timeout"),
        (("env", "--wait", "nan"), "--wait"),
        (("env", "--data-dir", str(tmp_path / "none")), "no server runs"),
        (("link", "--data-dir", str(tmp_path)), "no server runs"),
        (("--entity", "a/b", "--data-dir", str(tmp_path / "d")), "--entity 'a/b'"),
        (("--entity", "", "--data-dir", str(tmp_path / "d")), "--entity ''"),
        *broken_folders(tmp_path),
    ]:
        done = command(*flags)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert done.stderr.startswith("error: ") and word in done.stderr


def test_a_server_that_does_not_answer_is_not_taken_for_none(tmp_path):
    with sweepserver.start(tmp_path) as running:
        os.kill(running.pid, signal.SIGSTOP)
        try:
            done = command("env", "--data-dir", str(tmp_path))
        finally:
            os.kill(running.pid, signal.SIGCONT)
    assert done.returncode == 2 and f"kill {running.pid}" in done.stderr and "does not answer" in done.stderr


def test_a_server_is_started_with_our_modules_whatever_the_folder_holds(tmp_path, monkeypatch):
    (tmp_path / "errors.py").write_text("raise SystemExit(9)")
    monkeypatch.chdir(tmp_path)
    for words in ("", "of before\n"):
        Path("data").mkdir(exist_ok=True)
        Path("data/server.log").write_text(words)
        with sweepserver.start("data") as running:
            assert server_folder(running) == str(tmp_path / "data")
            with pytest.raises(RuntimeError, match="^sweepserver did not start: error: .* in use"):
                sweepserver.launch("data")
        assert Path("data/server.log").read_text().startswith(words)


def server_folder(server) -> str:
    arguments = Path(f"/proc/{server.pid}/cmdline").read_text().split("\0")
    return arguments[arguments.index("--data-dir") + 1]


def test_a_proxy_is_not_asked_for_a_server_of_ours(server, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # nobody answers there
    monkeypatch.delenv("no_proxy", raising=False)
    folder = server_folder(server)
    assert command("env", "--data-dir", folder).stdout.startswith("export WANDB_BASE_URL=")
    assert "/login?ticket=" in command("link", "--data-dir", folder).stdout


def test_the_key_is_private_and_env_prints_the_exports(server):
    folder = Path(server_folder(server))
    assert (folder / "key").stat().st_mode & 0o777 == 0o600 and len((folder / "key").read_text()) == 40
    for name in ("server.json", "sweepserver.sqlite", "blobs"):
        assert (folder / name).stat().st_mode & 0o077 == 0, name
    done = command("env", "--data-dir", str(folder))
    assert done.stdout == f"export WANDB_BASE_URL={server.url}\nexport WANDB_API_KEY={server.key}\n"
