"""The pages in headless Chromium: they draw, sort, refresh while a sweep runs, and load nothing from elsewhere."""

import json
import shutil
import subprocess
import time

import pytest

import sweepserver
from tests.sweepserver_helpers import Direct

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
    "--enable-unsafe-swiftshader",
    "--window-size=1300,1600",
)

pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no chromium with chromedriver on this machine")

SWEEP = """
name: <b>bits</b>
method: grid
metric: {name: score, goal: maximize}
parameters: {w: {values: [2, 4, 8]}, a: {values: [4, 8]}, "<i>p</i>": {values: [0, 1]}}
"""


class Browser:
    """A session of chromedriver over its HTTP protocol (W3C WebDriver), without further packages."""

    def __init__(self, folder):
        self.driver = subprocess.Popen(
            [DRIVER, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        port = None
        while port is None:
            line = self.driver.stdout.readline()
            assert line, "chromedriver did not start"
            if "started successfully on port " in line:
                port = int(line.strip().rstrip(".").rsplit(" ", 1)[1])
        self.direct = Direct(f"http://127.0.0.1:{port}", "")
        options = {"binary": CHROMIUM, "args": [*FLAGS, f"--user-data-dir={folder}"]}
        wanted = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        answer = self.ask("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self.session = f"/session/{answer['sessionId']}"

    def ask(self, method, path, body=None):
        sent = json.dumps(body or {}).encode() if method == "POST" else None
        status, _, text = self.direct.request(method, path, sent, {"Content-Type": "application/json"})
        value = json.loads(text)["value"]
        assert status == 200, value
        return value

    def open(self, url):
        self.ask("POST", f"{self.session}/url", {"url": url})

    def run(self, script):
        return self.ask("POST", f"{self.session}/execute/sync", {"script": f"return {script}", "args": []})

    def wait(self, script, seconds=30):
        end = time.monotonic() + seconds
        while not (value := self.run(script)):
            assert time.monotonic() < end, f"waited too long for {script}"
            time.sleep(0.1)
        return value

    def problems(self):
        entries = self.ask("POST", f"{self.session}/se/log", {"type": "browser"})
        return [entry["message"] for entry in entries if entry["level"] == "SEVERE"]

    def close(self):
        try:
            self.ask("DELETE", self.session)
        finally:
            self.driver.kill()
            self.driver.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with sweepserver.start(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def sweep(server):
    """A sweep of twelve points with ten finished, one failed and one running."""
    direct = Direct(server.url, server.key)
    name = direct.sweep(SWEEP, "web")
    agent, kept = direct.agent(name), None
    for i in range(12):
        (command,) = direct.beat(agent) if i < 11 else direct.beat(direct.agent(name))
        run, params = command["run_id"], {key: entry["value"] for key, entry in command["args"].items()}
        direct.begin(run, name, "web")
        rows = [json.dumps({"_step": step, "loss": 1 / (step + 1)}) for step in range(5)]
        files = {
            "wandb-history.jsonl": {"offset": 0, "content": rows},
            "output.log": {"offset": 0, "content": ["<img src=x onerror=window.hacked=1>"]},
            "wandb-summary.json": {
                "offset": 0,
                "content": [json.dumps({"score": params["w"] + params["a"] / 100, "size_mb": params["w"] / 4})],
            },
        }
        direct.stream(run, "web", files=files)
        if i < 11:
            direct.finish(run, "web", exit_code=int(i == 5))
        else:
            kept = run
    return direct, name, kept


def test_the_pages_draw_sort_and_refresh(server, browser, sweep):
    direct, name, kept = sweep
    browser.open(server.link)
    browser.open(f"{server.url}/local/web/sweeps/{name}")
    browser.wait("document.querySelectorAll('.js-plotly-plot').length == 3")
    assert browser.run("document.querySelector('h1').textContent") == "<b>bits</b>"
    assert browser.run("document.querySelector('.facts').innerText.replace(/\\s+/g, ' ')").startswith(
        "Done 10 of 12 Running 1 Failed 1"
    )
    heat = browser.run("document.querySelector('[data-figure=heatmap]').data[0].z.flat()")
    assert len([value for value in heat if value is not None]) == 6  # three values of w times two of "<i>p</i>"
    assert browser.run("document.querySelector('[data-figure=pareto]').data[1].x") == [0.5, 1, 2]
    column = "[...document.querySelectorAll('#runs thead th')].findIndex(h => h.textContent == 'score')"
    cells = f"[...document.querySelectorAll('#runs tbody tr')].map(r => r.cells[{column}].dataset.value)"
    for want in (sorted, lambda values: sorted(values, reverse=True)):
        browser.run(f"document.querySelectorAll('#runs thead th')[{column}].click()")
        values = [float(value) for value in browser.run(cells)]
        assert values in (sorted(values), sorted(values, reverse=True)) and want(values)
    first = browser.run(cells)[0]
    shown = int(browser.run("document.getElementById('page').dataset.shown"))
    direct.finish(kept, "web")
    browser.wait("document.querySelector('.facts').innerText.replace(/\\s+/g, ' ').startsWith('Done 11 of 12')")
    assert int(browser.run("document.getElementById('page').dataset.shown")) > shown
    assert browser.run(cells)[0] == first  # the order that was chosen stays
    browser.wait("document.querySelector('.badge').textContent == 'finished'")

    browser.open(f"{server.url}/local/web/runs/{kept}")
    browser.wait("document.querySelectorAll('#curves .js-plotly-plot').length == 1")
    assert "onerror" in browser.run("document.querySelector('.console').textContent")
    assert browser.run("window.hacked === undefined && !document.querySelector('.console img')")
    for path in ("/", "/local/web"):
        browser.open(server.url + path)
        assert "web" in browser.run("document.body.innerText")
    outside = "performance.getEntriesByType('resource').map(e => e.name).filter(n => !n.startsWith(location.origin))"
    assert browser.run(outside) == [] and browser.problems() == []
