"""How fast sweepserver is, and whether it loses or doubles anything: one server, many agents, long histories.

    python benchmarks/sweepserver_bench.py                     # everything; about two minutes
    python benchmarks/sweepserver_bench.py --agents 8 --runs 100 --rows 20000 --real 0

The 8 x 100 runs speak the protocol directly (threads of this process: heartbeat, UpsertBucket, CreateRunFiles, two
file streams and a PUT a run), since a real run costs the client about two seconds of its own. The history rows go in
and come out through the real client (`run.log`, `scan_history`, `history`); so do the `--real` runs, with real agents.
Times are wall clock; memory is the server's resident set. Prints one line a figure.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import sweepserver  # noqa: E402
from tests.sweepserver_helpers import Direct, agent, create_sweep, python  # noqa: E402

FILES = (
    "mutation CreateRunFiles($entity: String!, $project: String!, $run: String!, $files: [String!]!) { "
    "createRunFiles(input: {entityName: $entity, projectName: $project, runName: $run, files: $files}) { runID "
    "uploadHeaders files { name uploadUrl } } }"
)

ROWS = """
import json, sys, time, wandb
rows = int(sys.argv[1])
run = wandb.init(project="rows")
began = time.monotonic()
for step in range(rows):
    run.log({"loss": 1 / (step + 1), "acc": step / rows, "lr": 0.1})
run.finish()
wrote = time.monotonic() - began
run = wandb.Api().run(f"local/rows/{run.id}")
began = time.monotonic()
scanned = list(run.scan_history())
scan = time.monotonic() - began
began = time.monotonic()
keyed = list(run.scan_history(keys=["loss"]))
scan_keys = time.monotonic() - began
began = time.monotonic()
sampled = run.history(samples=500, pandas=False)
print(json.dumps({"wrote": wrote, "scan": scan, "scan_keys": scan_keys, "sampled": time.monotonic() - began,
    "whole": [row["_step"] for row in scanned] == list(range(rows)) and len(keyed) == rows and len(sampled) == 500
             and all(abs(row["loss"] - 1 / (row["_step"] + 1)) < 1e-9 for row in scanned)}))
"""

TRIVIAL = "import wandb\nrun = wandb.init()\nrun.log({'y': run.config['x']})\nrun.finish()\n"


def memory(pid: int) -> tuple[float, float]:
    """(now, most) MB of 10^6 bytes that a process holds in memory."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    kib = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.startswith(("VmRSS", "VmHWM"))}
    return kib["VmRSS"] * 1024 / 1e6, kib["VmHWM"] * 1024 / 1e6


def direct_runs(server, agents: int, runs: int) -> dict:
    """`agents` threads work through a grid of agents x runs points; counts what each point came to."""
    direct = Direct(server.url, server.key)
    sweep = direct.sweep(f"method: grid\nparameters: {{x: {{min: 0, max: {agents * runs - 1}}}}}", "direct")
    waits = []

    def work():
        own, name = Direct(server.url, server.key), direct.agent(sweep)
        while True:
            began = time.monotonic()
            commands = own.beat(name)
            waits.append(time.monotonic() - began)
            if not commands:
                time.sleep(0.05)
            for command in commands:
                if command["type"] == "exit":
                    return
                run = command["run_id"]
                own.begin(run, sweep, "direct")
                asked = own.ask(FILES, entity="local", project="direct", run=run, files=["config.yaml"])
                own.stream(
                    run,
                    "direct",
                    files={"wandb-history.jsonl": {"offset": 0, "content": [json.dumps({"_step": 0, "y": 1.0})]}},
                )
                own.request("PUT", asked["createRunFiles"]["files"][0]["uploadUrl"], b"x: 1\n", {})
                own.finish(run, "direct", summary={"y": command["args"]["x"]["value"]})

    threads = [threading.Thread(target=work) for _ in range(agents)]
    began = time.monotonic()
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    seconds = time.monotonic() - began
    found = [run for page in range(0, agents * runs, 1000) for run in all_runs(direct, sweep, page)]
    points = Counter(run["params"]["x"] for run in found)
    states = Counter(run["state"] for run in found)
    waits.sort()
    return {
        "seconds": seconds,
        "handed": len(found),
        "finished": states["finished"],
        "lost": agents * runs - len(points),
        "doubled": sum(n > 1 for n in points.values()),
        "heartbeat_p50": waits[len(waits) // 2],
        "heartbeat_p99": waits[int(len(waits) * 0.99)],
    }


def all_runs(direct: Direct, sweep: str, skipped: int) -> list[dict]:
    import base64

    query = (
        'query Runs($f: JSONString, $c: String) { project(name: "direct") { runs(filters: $f, after: $c, '
        "first: 1000) { edges { node { state config } } } } }"
    )
    cursor = base64.b64encode(str(skipped).encode()).decode()
    answer = direct.ask(query, f=json.dumps({"sweep": sweep}), c=cursor)
    nodes = [edge["node"] for edge in answer["project"]["runs"]["edges"]]
    return [{"state": n["state"], "params": {k: v["value"] for k, v in json.loads(n["config"]).items()}} for n in nodes]


def real_runs(server, folder: Path, agents: int, runs: int) -> dict:
    """Real agents with real, trivial runs."""
    (folder / "p.py").write_text(TRIVIAL)
    path = create_sweep(
        server,
        folder,
        f"program: p.py\nmethod: grid\nparameters: {{x: {{min: 1, max: {runs}}}}}\n"
        'command: ["${env}", "${interpreter}", "${program}"]',
        "real",
    )
    began = time.monotonic()
    started = [agent(server, folder, path) for _ in range(agents)]
    [process.wait() for process in started]
    seconds = time.monotonic() - began
    found = Direct(server.url, server.key).runs(path.split("/")[2], "real")
    values = [run["params"]["x"] for run in found]
    return {
        "seconds": seconds,
        "once": sorted(values) == list(range(1, runs + 1)),
        "finished": all(run["state"] == "finished" for run in found),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--agents", type=int, default=8)
    parser.add_argument("--runs", type=int, default=100, help="runs per agent (default %(default)s)")
    parser.add_argument("--rows", type=int, default=20000, help="history rows; 0 leaves them out")
    parser.add_argument("--real", type=int, default=8, help="runs with two real agents; 0 leaves them out")
    args = parser.parse_args()
    model = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        "unknown CPU",
    )
    print(
        f"machine: {model}, {os.cpu_count()} cores, load before {os.getloadavg()[0]:.1f}; "
        f"Python {sys.version.split()[0]}"
    )
    ok = True
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        began = time.monotonic()
        with sweepserver.start(folder / "data") as server:
            print(f"start to ready: {time.monotonic() - began:.2f} s, memory {memory(server.pid)[0]:.0f} MB")
            seen = direct_runs(server, args.agents, args.runs)
            total = args.agents * args.runs
            ok &= seen["finished"] == total == seen["handed"] and not seen["lost"] and not seen["doubled"]
            print(
                f"{args.agents} agents x {args.runs} runs (protocol): {seen['seconds']:.1f} s, "
                f"{total / seen['seconds']:.1f} runs/s, {seen['finished']} finished, {seen['lost']} lost, "
                f"{seen['doubled']} doubled; heartbeat p50 {seen['heartbeat_p50'] * 1e3:.0f} ms, "
                f"p99 {seen['heartbeat_p99'] * 1e3:.0f} ms; memory {memory(server.pid)[1]:.0f} MB at most"
            )
            if args.rows:
                rows = python(server, folder, ROWS, str(args.rows))
                ok &= rows["whole"]
                print(
                    f"{args.rows} history rows (real client): in {rows['wrote']:.1f} s, scan_history out "
                    f"{rows['scan']:.1f} s, of one key {rows['scan_keys']:.1f} s, 500 samples "
                    f"{rows['sampled']:.2f} s, all there: {rows['whole']}; "
                    f"memory {memory(server.pid)[1]:.0f} MB at most"
                )
            if args.real:
                real = real_runs(server, folder, 2, args.real)
                ok &= real["once"] and real["finished"]
                print(
                    f"2 real agents, {args.real} trivial runs: {real['seconds']:.0f} s, "
                    f"{args.real / real['seconds']:.2f} runs/s, each once: {real['once'] and real['finished']}"
                )
            size = subprocess.run(["du", "-sb", folder / "data"], capture_output=True, text=True).stdout.split()[0]
            print(f"data folder: {int(size) / 1e6:.1f} MB")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
