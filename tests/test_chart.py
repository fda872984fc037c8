"""benchmarks/chart.py: its lines against numbers by hand, and that a figure comes out."""

import sys
from pathlib import Path

import pytest

import report

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))


@pytest.fixture(scope="module")
def chart():
    import chart

    return chart


def frame():
    common = dict(activation_quant_bits=8, weight_per_channel=True, test_acc_fp32=90.0, checkpoint_hash="abc")
    names = ("weight_quant_bits", "method", "seed", "test_acc_quantized", "model_size_mb")
    made = [(4, "auto", 0, 88.0, 1.25), (4, "auto", 1, 89.0, 1.25), (8, "auto", 0, 90.0, 2.5)]
    made += [(2, "plain", 0, 20.0, 0.6), (1.5, "auto+entropy+mixed", 0, 87.0, 0.4)]
    return report.to_frame([{**common, **dict(zip(names, row, strict=True))} for row in made])


PEERS = [
    dict(tool="quanto", bits="4/8", bytes="1500000", accuracy="86.5", error="", stored="quantized"),
    dict(tool="quanto", bits="2/8", bytes="1000000", accuracy="50", error="", stored="quantized"),
    dict(tool="quanto", bits="8/32", bytes="2300000", accuracy="89", error="", stored="quantized"),
    dict(tool="torchao", bits="4/8", bytes="", accuracy="", error="it fails", stored=""),
    dict(tool="aimet", bits="4/8", bytes="9000000", accuracy="88", error="", stored="FP32 export"),
    dict(tool="ours", bits="4/8", bytes="1250000", accuracy="88", error="", stored="quantized"),
]


def test_lines_are_means_over_seeds_and_peers_without_failures(chart):
    lines = chart.ours(frame(), 8)
    assert lines["ours"] == [chart.Point(2.5, 90.0, "8"), chart.Point(1.25, 88.5, "4")]
    assert lines["ours, mixed bits and entropy coding"] == [chart.Point(0.4, 87.0, "1.5")]
    assert chart.others(PEERS, 8) == {"quanto": [chart.Point(1.5, 86.5, "4"), chart.Point(1.0, 50.0, "2")]}
    assert not any(chart.ours(frame(), 4).values())


def test_the_figure_is_a_png_with_a_line_for_each(chart, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(chart, "draw_line", lambda ax, name, points: drawn.append((name, len(points))))
    settings = chart.Settings(figure=tmp_path / "chart.png")
    chart.draw([{**chart.ours(frame(), bits), **chart.others(PEERS, bits)} for bits in chart.PANELS], 90.0, settings)
    assert settings.figure.read_bytes().startswith(b"\x89PNG")
    assert ("ours", 2) in drawn and ("quanto", 2) in drawn and not {"aimet", "torchao"} & {name for name, _ in drawn}
