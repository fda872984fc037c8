"""The peers' table: what is in which row, what stands between the markers, a failure that stops nothing."""

import json
import subprocess
from pathlib import Path

import pytest
from conftest import load_program


@pytest.fixture(scope="module")
def peers():
    return load_program("benchmarks/peers.py", "peers")


def row(peers, tool: str, bits: str, accuracy: float, size: int, **others: str) -> dict[str, str]:
    full = dict.fromkeys(peers.COLUMNS, "")
    return full | {
        "tool": tool,
        "bits": bits,
        "accuracy": str(accuracy),
        "bytes": str(size),
        "quantize_seconds": "1",
        "images_per_second": "2",
        "test_images": "10000",
        "stored": "quantized",
        **others,
    }


def test_verdict_takes_the_best_other_and_tells_where_we_are_behind(peers) -> None:
    rows = [
        row(peers, "ours", "4/8", 90.0, 1000),
        row(peers, "ours-plain", "4/8", 99.0, 1),
        row(peers, "quanto", "4/8", 91.5, 3000),
        row(peers, "aimet", "4/8", 91.0, 900),
        row(peers, "nncf", "4/8", 90.9, 5, stored="FP32 export"),
        row(peers, "torchao", "4/8", 99.0, 1, error="it fell over"),
    ]
    assert peers.verdict(rows, "4/8") == "| 4/8 | 90.00 | 91.50 (quanto) | -1.50 | 1,000 | 900 (aimet) |"
    assert peers.verdict(rows, "8/8") is None
    failed = [row(peers, "ours", "2/2", 70.0, 1000), row(peers, "brevitas", "2/2", 10.0, 3000)]
    assert "| 10.00 (brevitas) | none of them works |" in peers.verdict(failed, "2/2")


def test_page_orders_rows_and_shows_failures(peers) -> None:
    rows = [
        row(peers, "quanto", "4/8", 0, 0, error="no | such thing"),
        row(peers, "ours", "4/8", 90.0, 1000),
        row(peers, "onnxruntime", "8/8", 90.5, 2000),
        row(peers, peers.FP32, "32/32", 91.0, 8000),
    ]
    lines = [line for line in peers.page(rows).splitlines() if line.startswith(("| 32", "| 8/", "| 4/"))]
    assert [line.split(" | ")[1].strip() for line in lines] == [peers.FP32, "onnxruntime", "ours", "quanto"]
    assert "| 90.00 | 1.00 | 1,000 |" in lines[2]
    assert "fails: no / such thing" in lines[3]
    assert "| 5 (FP32 export) |" in peers.table_line(row(peers, "aimet", "4/8", 91.0, 5, stored="FP32 export"), 91.0)


def test_rows_of_another_machine_are_told(peers) -> None:
    rows = [row(peers, tool, "4/8", 90.0, 1, machine=m) for tool, m in (("aimet", "A"), ("ours", "B"), ("quanto", "A"))]
    assert peers.machines(rows) == "A; on B, whose times do not compare with these: ours 4/8"
    assert peers.machines(rows[:1]) == "A"


def test_a_worker_that_fails_is_one_line(peers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "export", lambda settings, material: tmp_path)
    monkeypatch.setattr(peers, "environment", lambda folder, tool: Path("/bin/false"))
    assert peers.peer(peers.Settings(), None, "quanto", "8/8") == {"error": "it ended without any output"}

    def fake(command, **kwargs):
        Path(command[-1]).write_text(json.dumps({"accuracy": 1.0}))

    monkeypatch.setattr(subprocess, "run", fake)
    assert peers.peer(peers.Settings(), None, "quanto", "8/8") == {"accuracy": 1.0}


def test_bits_run_in_order_and_only_where_offered(peers) -> None:
    settings = peers.Settings(tools=("nncf", "ours"), bits=("4/8", "8/8"))
    assert peers.points(settings) == [(peers.FP32, "32/32"), ("ours", "8/8"), ("nncf", "8/8"), ("ours", "4/8")]


def test_the_committed_page_is_that_of_the_committed_rows(peers) -> None:
    import results

    rows = results.read(peers.Settings().output, peers.COLUMNS)
    newest = [r for r in rows if r["checkpoint_hash"] == rows[-1]["checkpoint_hash"]]
    assert peers.page(newest) in peers.Settings().page.read_text()
